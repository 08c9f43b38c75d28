"""The command line of `kdns node`: ours and kube-proxy's flags in one, and mistakes."""

from __future__ import annotations

from typing import Any

import pytest

from kdns import cli
from kdns.agent import read_settings
from kdns.node import COREFILE, Wishes, addresses_for, corefile_for, leading_back
from kdns.node_command import split_flags
from kdns.proxy.flags import parse_flags


@pytest.mark.parametrize(
    ("given", "ours", "theirs"),
    [
        (["-conf", "C"], ["--conf=C"], []),
        (["--conf=C", "--config=K"], ["--conf=C"], ["--config=K"]),
        (["-f", "folder", "-conf=C", "-v", "2"], ["--conf=C"], ["-f", "folder", "-v", "2"]),
        (["--cluster_dns", "10.0.0.1,fd00::1"], ["--cluster-dns=10.0.0.1,fd00::1"], []),
        (["--local-dns="], ["--local-dns="], []),
        (["--cleanup"], [], ["--cleanup"]),
        (["--proxy-mode", "nftables", "stray"], [], ["--proxy-mode", "nftables", "stray"]),
        (["--drain"], ["--drain"], []),
    ],
)
def test_flags_of_both_may_be_mixed(given: list[str], ours: list[str], theirs: list[str]) -> None:
    assert split_flags(given) == (ours, theirs)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--cluster-dns=dns.example"], "'dns.example' is not an IP address"),
        (["--local-dns=127.0.0.1"], "127.0.0.1 cannot be the address of a DNS server of Pods"),
        (["--local-dns=::"], ":: cannot be the address of a DNS server of Pods"),
        (["--drain=later"], "'later' is not one of 'ttl', 'conntrack', 'none'"),
        (["--gate-timeout=soon"], "'soon' is not a duration; write it as 500ms, 30s or 1m30s"),
        (["--gate-timeout=-1s"], "'-1s' is out of range; it must be 0s or more"),
        (["--health-address=9256"], "'9256' must be IP:PORT, as in 127.0.0.1:9256"),
        (["--health-address=localhost:9256"], "'localhost:9256' must be IP:PORT"),
        (["-conf"], "Option '--conf' requires an argument"),
        (["--once"], "--once is for `kdns proxy`"),
        (["--dry-run", "--portmap=a/b=80"], "--portmap is for `kdns proxy`"),
        (["--proxy-mod=ipvs"], "no flag '--proxy-mod', did you mean '--proxy-mode'?"),
        (["--proxy-mode=bpf"], "must be iptables, nftables, ipvs or userspace"),
        (["--config=/nowhere/config.conf"], "/nowhere/config.conf: cannot be read"),
        (["stray"], "unexpected argument 'stray'"),
    ],
)
def test_what_is_wrong_is_told_and_nothing_is_started(
    args: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["node", *args]) == cli.USAGE_ERROR
    shown = capsys.readouterr().err
    assert told in shown
    assert "Traceback" not in shown


def test_help_names_the_flags_of_both(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["node", "--help"]) == 0
    shown = capsys.readouterr().out
    for flag in ("--cluster-dns", "--local-dns", "--gate-timeout", "--drain", "--control",
                 "--proxy-mode", "--cluster-cidr", "--cleanup"):  # fmt: skip
        assert flag in shown
    assert "Usage: kdns proxy" not in shown


@pytest.mark.parametrize(
    ("flags", "addresses"),
    [
        ([], ("169.254.20.10", "10.96.0.10")),
        (["--proxy-mode=nftables"], ("169.254.20.10", "10.96.0.10")),
        # There the address is a virtual server's, whatever is tracked.
        (["--proxy-mode=ipvs"], ("169.254.20.10",)),
    ],
)
def test_the_mode_decides_whose_the_clusters_address_is(
    flags: list[str], addresses: tuple[str, ...]
) -> None:
    assert addresses_for(Wishes(), read_settings(parse_flags(flags)).config) == addresses


def test_the_corefile_of_a_node_is_well(tmp_path: Any) -> None:
    from kdns.app import check_corefile

    path = tmp_path / "Corefile"
    path.write_text(corefile_for(["169.254.20.10", "10.96.0.10", "fd00::a"]))
    assert [str(p) for p in check_corefile(str(path))] == []
    assert "bind 169.254.20.10 10.96.0.10 fd00::a\n" in path.read_text()
    assert "{bind}" in COREFILE


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("nameserver 10.96.0.10\n", ["10.96.0.10"]),
        ("search a b\nnameserver 192.0.2.1\nnameserver 169.254.20.10", ["169.254.20.10"]),
        ("nameserver 192.0.2.1\n# nameserver 10.96.0.10\nnameserver\n", []),
    ],
)
def test_a_resolv_conf_that_leads_back_is_seen(tmp_path: Any, text: str, found: list[str]) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text(text)
    assert leading_back(["169.254.20.10", "10.96.0.10"], str(path)) == found
    assert leading_back(["10.96.0.10"], str(tmp_path / "none")) == []
