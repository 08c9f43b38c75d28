"""`kdns rules --explain`: the same rules, each with whose it is and what it is for."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from kdns import agent
from kdns.proxy.options import Family

CLUSTER = str(Path(__file__).parent / "golden" / "cluster.json")
FLAGS = ("--cluster-cidr=10.244.0.0/16,fd00:10:244::/56", "--hostname-override=node1")


def printed(mode: str, family: Family, explain: bool) -> list[str]:
    text, _ = agent.rules_of([*FLAGS, f"--proxy-mode={mode}"], [CLUSTER], family, explain)
    return text.splitlines()


def above(lines: list[str]) -> list[tuple[str, str]]:
    """Return rules and what is said in the line above each."""
    rules = [n for n, line in enumerate(lines) if line.startswith(("-A ", "-I ", "add "))]
    return [(lines[n], lines[n - 1]) for n in rules]


def behind(lines: list[str]) -> list[tuple[str, str]]:
    """Return rules and elements of nft, and what is said behind each."""
    rules = [
        line
        for line in lines
        if re.match(r"\t\t(?!type |elements$|flags |timeout |comment |size )\S", line)
        or re.match(r"\t\t\t     \S", line)
    ]
    return [
        (rule.partition(" # ")[0], rule.partition(" # ")[2]) for rule in rules if rule != "\t\t}"
    ]


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize(
    ("mode", "read"), [("iptables", above), ("userspace", above), ("nftables", behind)]
)
def test_each_rule_is_explained_and_none_changes(
    mode: str, read: Callable[[list[str]], list[tuple[str, str]]], family: Family
) -> None:
    plain, explained = printed(mode, family, False), printed(mode, family, True)
    told = read(explained)
    assert len(told) > 10
    assert [rule for rule, why in told if len(why.lstrip("# ")) < 8] == []
    without = [line.partition(" # ")[0] if mode == "nftables" else line for line in explained]
    assert [line for line in without if not line.startswith("# ")] == plain


@pytest.mark.parametrize("family", [4, 6])
def test_ipvs_says_whose_each_virtual_server_is(family: Family) -> None:
    plain, explained = printed("ipvs", family, False), printed("ipvs", family, True)
    servers = [(line, explained[n - 1]) for n, line in enumerate(explained)
               if re.match(r"-A (-[tu]|--sctp-service) ", line)]  # fmt: skip
    assert servers
    assert [line for line, why in servers if not re.match(r"# [a-z0-9-]+/\S+: .", why)] == []

    def bare(lines: list[str]) -> list[str]:
        found = (re.sub(r"\s+#.*", "", line) for line in lines if not line.startswith("#"))
        return [line for line in found if line]

    assert bare(explained) == bare(plain)


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        (r"-A KUBE-NODEPORTS .* --dport 30080 -j KUBE-EXT-",
         "# prod/api:http 8080/tcp: node port 30080; goes on as what comes from outside"),
        (r"-A KUBE-SVC-\w+ ! -s 10.244.0.0/16 -d 10.96.10.1/32",
         "# default/web:http 80/tcp: to a ClusterIP, and not from a Pod of this cluster:"
         " masquerade"),
        (r"-A KUBE-SERVICES -d 10.96.10.5/32 .* -j REJECT",
         "# default/noeps:http 80/tcp: ClusterIP; no endpoints: refused at once"),
        (r"-A KUBE-POSTROUTING .* -j RETURN", "# not marked: the source stays"),
    ],
)  # fmt: skip
def test_what_is_said_of_some(rule: str, why: str) -> None:
    assert why in {said for line, said in above(printed("iptables", 4, True))
                   if re.match(rule, line)}  # fmt: skip
