"""The nftables dataplane on a real kernel: each test has a network namespace of its own.

What is asked is what an operator would ask of `nft list ruleset`: is what we wrote there, is
what others wrote still there, and is nothing left after a clean-up.
"""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forwarding import CLUSTER_CIDRS, cluster_table

from kdns.errors import ApplyError
from kdns.kernel.nftables import (
    Nft,
    NftablesDataplane,
    blame,
    clean_up,
    find_leftovers,
    find_nft,
    is_busy,
    kernel_version,
    parse_version,
    refused_line,
    usable_families,
)
from kdns.kernel.nftables_netlink import NetlinkTables, NotPlain, encode
from kdns.kernel.sync import SyncLoop, Timing
from kdns.metrics import Metrics
from kdns.proxy.nftables import Held, NftablesRules
from kdns.proxy.nftables_listing import find_differences
from kdns.proxy.options import Detector, Family, Options
from kdns.proxy.table import Forwarding, ForwardingTable
from kdns.registry.endpoints import Endpoint

ROOT = Path(__file__).parents[1]
FAMILIES: tuple[Family, ...] = (4, 6)
WORD = {4: "ip", 6: "ip6"}
kernel = [
    pytest.mark.root,
    pytest.mark.skipif(
        any(shutil.which(name, path="/usr/sbin:/sbin:/usr/bin:/bin") is None
            for name in ("ip", "nft")),
        reason="needs the programs ip and nft",
    ),
]  # fmt: skip
_numbers = itertools.count()


def on_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    for mark in kernel:
        function = mark(function)
    return function


class Node:
    """A network namespace."""

    def __init__(self) -> None:
        self.name = f"kdns-nft-{os.getpid()}-{next(_numbers)}"
        self.prefix: tuple[str, ...] = ("ip", "netns", "exec", self.name)

    def run(self, *argv: str, text: str = "") -> str:
        done = subprocess.run(
            (*self.prefix, *argv), input=text, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{argv}: {done.stderr}"
        return done.stdout

    def nft(self, text: str) -> None:
        self.run("nft", "-f", "-", text=text)

    def ruleset(self) -> str:
        return self.run("nft", "-s", "list", "ruleset")

    def tables(self) -> NetlinkTables:
        """Open a socket to the kernel there."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/run/netns/{self.name}") as there, ThreadPoolExecutor(1) as thread:
            # Only that one thread moves, and it ends; the socket stays where it was made.
            assert thread.submit(libc.setns, there.fileno(), 0).result() == 0
            return thread.submit(NetlinkTables).result()

    def generation(self) -> int | None:
        code = "from kdns.kernel.generation import nft_generation; print(nft_generation())"
        path = f"PYTHONPATH={ROOT}"
        number = self.run("env", path, sys.executable, "-c", code).strip()
        return None if number == "None" else int(number)


@pytest.fixture
def node() -> Iterator[Node]:
    node = Node()
    subprocess.run(("ip", "netns", "add", node.name), check=True)
    yield node
    subprocess.run(("ip", "netns", "del", node.name), check=True)


# --- objects --------------------------------------------------------------------------


def service(number: int, endpoints: int, affinity: int = 0, **more: Any) -> Forwarding:
    return Forwarding(
        key=("default", f"svc{number}"),
        name=f"default/svc{number}:http",
        protocol="tcp",
        cluster_ip=f"10.96.0.{number}",
        port=80,
        affinity=affinity,
        cluster=tuple(Endpoint(f"10.244.{number}.{n + 1}", 8080, True) for n in range(endpoints)),
        has_endpoints=bool(endpoints),
        **more,
    )


def table_of(*services: Forwarding) -> ForwardingTable:
    return ForwardingTable(4, 1, {one.key: (one,) for one in services})


FIRST = table_of(
    service(1, 2),
    service(2, 0),
    service(3, 1, node_port=30080),
    service(4, 2, affinity=600),
    service(5, 12),
    service(6, 11, affinity=60, load_balancer_ips=("192.0.2.1",), source_ranges=("10.0.0.0/8",)),
)


def options_of(family: Family = 4) -> Options:
    return Options(family, detector=Detector("cidr", CLUSTER_CIDRS[family]))


def dataplane_of(
    node: Node, family: Family = 4, metrics: Metrics | None = None, **more: Any
) -> NftablesDataplane:
    nft = replace(asyncio.run(find_nft(node.prefix)), **more.pop("nft", {}))
    return NftablesDataplane(nft, options_of(family), metrics, **more)


def sync(plane: NftablesDataplane, table: ForwardingTable, full: bool = False) -> None:
    asyncio.run(plane.sync(table, tuple({*table.services, *FIRST.services}), full))


def held(node: Node, family: Family = 4) -> Held:
    return asyncio.run(Nft((1, 0, 6), (6, 2), node.prefix).held(family))


def differences(node: Node, table: ForwardingTable) -> list[str]:
    rules = NftablesRules(options_of(table.family))
    rules.update(table, None)
    return list(find_differences(held(node, table.family), rules.wanted()))


def counted(metrics: Metrics, name: str) -> float:
    """Return a number of IPv4 as /metrics shows it."""
    (line,) = (
        one for one in metrics.render()[0].decode().splitlines()
        if one.startswith(f"{name}{{") and "IPv4" in one
    )  # fmt: skip
    return float(line.split()[-1])


# --- what is written ------------------------------------------------------------------


@on_kernel
@pytest.mark.parametrize("family", FAMILIES)
def test_the_kernel_holds_what_is_wanted(node: Node, family: Family) -> None:
    plane, table = dataplane_of(node, family), cluster_table(family)
    asyncio.run(plane.sync(table, (), True))
    assert differences(node, table) == []
    assert asyncio.run(plane.verify())
    # Nothing outside our table, and nothing of the other family.
    tables = node.run("nft", "list", "tables").splitlines()
    assert tables == [f"table {WORD[family]} kube-proxy"]


SEQUENCES: list[list[ForwardingTable]] = [
    [FIRST, table_of(service(1, 1)), FIRST],
    [FIRST, table_of(service(4, 3, affinity=900)), table_of(service(4, 1))],
    [table_of(service(5, 1)), table_of(service(5, 20)), table_of(service(5, 0))],
    [table_of(), FIRST, table_of()],
]


@on_kernel
@pytest.mark.parametrize("sequence", SEQUENCES)
@pytest.mark.parametrize("release", [(5, 15), (6, 2)], ids=["delayed", "at-once"])
@pytest.mark.parametrize("direct", [False, True], ids=["nft", "netlink"])
def test_change_by_change_the_kernel_holds_what_is_wanted(
    node: Node, sequence: list[ForwardingTable], release: tuple[int, int], direct: bool
) -> None:
    tables = node.tables() if direct else None
    plane = dataplane_of(node, nft={"kernel": release}, tables=tables)
    for table in sequence:
        sync(plane, table)
        assert differences(node, table) == []
        assert asyncio.run(plane.verify())


@on_kernel
def test_on_an_old_kernel_a_chain_is_emptied_first_and_deleted_later(node: Node) -> None:
    plane = dataplane_of(node, nft={"kernel": (6, 1)})
    sync(plane, FIRST)
    sync(plane, table_of())
    there = held(node).chains
    emptied = [one for one in there if one.startswith(("service-", "endpoint-")) and "svc" in one]
    assert emptied and not any(there[name].rules for name in emptied)
    # One comes back before it went.
    sync(plane, table_of(service(1, 2)))
    assert asyncio.run(plane.verify())
    left = [one for one in held(node).chains if "svc" in one]
    assert left == [one for one in emptied if "svc1" in one]
    assert differences(node, table_of(service(1, 2))) == []


@on_kernel
def test_chains_that_cannot_be_deleted_stay_and_are_counted(node: Node) -> None:
    metrics = Metrics()
    plane = dataplane_of(node, metrics=metrics, nft={"kernel": (6, 1)})
    sync(plane, FIRST)
    sync(plane, table_of())
    (chain,) = (one for one in held(node).chains if "svc1" in one)
    node.nft(f"add rule ip kube-proxy reject-chain jump {chain}\n")
    asyncio.run(plane.verify())
    name = "kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total"
    assert counted(metrics, name) == 1
    # The rule of somebody else is found, goes, and so do they.
    sync(plane, table_of(), full=True)
    assert asyncio.run(plane.verify())
    assert not any("svc" in one for one in held(node).chains)
    assert counted(metrics, name) == 1


@on_kernel
def test_clients_stay_with_their_endpoints_over_syncs_and_restarts(node: Node) -> None:
    sync(dataplane_of(node), FIRST)
    (name, *_) = (one for one in held(node).sets if "svc4" in one)
    node.nft(f"add element ip kube-proxy {name} {{ 10.9.8.7 }}\n")
    plane = dataplane_of(node)  # a restart
    sync(plane, table_of(service(4, 3, affinity=600), service(1, 1)))
    sync(plane, FIRST)
    sync(plane, FIRST, full=True)
    assert "10.9.8.7" in node.run("nft", "list", "set", "ip", "kube-proxy", name)
    assert differences(node, FIRST) == []


@on_kernel
def test_a_restart_over_the_same_rules_writes_nothing(node: Node) -> None:
    sync(dataplane_of(node), FIRST)
    before = node.generation()
    assert before is not None
    sync(dataplane_of(node), FIRST)
    assert node.generation() == before


@on_kernel
def test_the_table_of_a_kube_proxy_is_taken_over(node: Node) -> None:
    recorded = (ROOT / "tests/golden/rules/nftables.txt").read_text()
    theirs = recorded[recorded.index("table ip kube-proxy") :]
    node.nft(theirs)
    (name, *_) = (one for one in held(node).sets if one.startswith("affinity-"))
    node.nft(f"add element ip kube-proxy {name} {{ 10.9.8.7 }}\n")
    for family in FAMILIES:
        plane, table = dataplane_of(node, family), cluster_table(family)
        asyncio.run(plane.sync(table, (), True))
        assert differences(node, table) == []
    assert "10.9.8.7" in node.run("nft", "list", "set", "ip", "kube-proxy", name)


# --- without nft ----------------------------------------------------------------------

SMALL = [
    table_of(*(replace(service(1, 2), protocol=one) for one in ("tcp",))),
    table_of(service(1, 5)),
    table_of(service(1, 0)),
    table_of(service(1, 1), service(2, 3)),
    table_of(replace(service(1, 2), protocol="udp"), service(2, 0)),
    table_of(replace(service(1, 2), protocol="sctp")),
    table_of(),
]


@on_kernel
def test_changes_of_endpoints_and_services_need_no_nft(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    plane = dataplane_of(node, tables=node.tables(), generation=node.generation)
    sync(plane, table_of(service(3, 1)))
    assert asyncio.run(plane.verify())

    async def refuse(nft: Nft, text: str, check: bool = False) -> None:
        raise AssertionError(text)

    monkeypatch.setattr(Nft, "apply", refuse)
    for table in SMALL:
        sync(plane, table)
        # nft reads what it would have written itself.
        assert differences(node, table) == []
    # And it was one transaction each, that only we made: nothing is read again.
    monkeypatch.setattr(Nft, "held", None)
    assert asyncio.run(plane.verify())


@on_kernel
def test_ipv6_endpoints_need_no_nft_either(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    plane, table = dataplane_of(node, 6, tables=node.tables()), cluster_table(6)
    asyncio.run(plane.sync(table, (), True))
    monkeypatch.setattr(Nft, "apply", None)
    (key,) = (key for key, ports in table.services.items() if ports[0].cluster)
    (port,) = table.services[key]
    more = tuple(Endpoint(f"fd00:10:244::{n}", 8443, n == 7) for n in (7, 8))
    other = replace(port, cluster=more, node_port=30443, external_ips=("2001:db8::1",))
    for services in ({}, {**table.services, key: (replace(port, cluster=more),)}, {}):
        changed = ForwardingTable(6, 2, services)
        asyncio.run(plane.sync(changed, tuple(table.services), False))
        assert differences(node, changed) == []
    # A mark and its comment are nft's to write.
    with pytest.raises(TypeError):
        asyncio.run(plane.sync(ForwardingTable(6, 3, {key: (other,)}), (key,), False))


@on_kernel
def test_what_the_kernel_refuses_without_nft_nft_explains(node: Node) -> None:
    plane = dataplane_of(node, tables=node.tables())
    sync(plane, FIRST)
    node.nft("delete table ip kube-proxy\n")
    with pytest.raises(ApplyError, match="No such file or directory"):
        sync(plane, table_of(service(1, 1)))
    sync(plane, table_of(service(1, 1)))
    assert differences(node, table_of(service(1, 1))) == []


@on_kernel
def test_a_change_too_large_for_one_message_is_nfts(node: Node) -> None:
    plane = dataplane_of(node, tables=node.tables())
    sync(plane, table_of())
    many = table_of(*(service(n, 8) for n in range(1, 200)))
    asyncio.run(plane.sync(many, tuple(many.services), False))
    assert differences(node, many) == []


LEFT_TO_NFT = [
    "add set ip kube-proxy mine { type ipv4_addr; }",
    "add chain ip kube-proxy mine { type filter hook input priority 0; }",
    "add rule ip kube-proxy mine fib saddr type local goto other",
    "add rule ip kube-proxy mine meta l4proto tcp dnat to [fd00::1]:80",
    "add rule ip kube-proxy mine meta l4proto tcp dnat to 10.0.0.300:80",
    "add rule ip kube-proxy mine meta l4proto tcp dnat to 10.0.0.3:80000",
    'add rule ip kube-proxy mine goto other comment "x"',
    "add element ip kube-proxy service-ips {\n10.0.0.1 . tcp . 99999 : drop\n}",
    "add element ip kube-proxy service-ips {\n10.0.0.1 . icmp . 9 : drop\n}",
    "add element ip kube-proxy service-ips {\n10.0.0.1 . tcp . 9 : accept\n}",
    "delete table ip kube-proxy",
    "flush ruleset",
]


@pytest.mark.parametrize("text", LEFT_TO_NFT)
def test_what_is_not_plain_is_left_to_nft(text: str) -> None:
    with pytest.raises(NotPlain):
        list(encode(text + "\n"))


# --- what others do -------------------------------------------------------------------

OTHERS = """\
table ip kube-proxy-of-somebody {
	chain filter-forward {
		type filter hook forward priority 0; policy accept;
		ct state new drop
	}
	chain nat-prerouting {
		type nat hook prerouting priority -100; policy accept;
		tcp dport 80 dnat to 192.0.2.1
	}
}
table inet firewall {
	set kube { type ipv4_addr; elements = { 10.96.0.1 } }
	chain input {
		type filter hook input priority 0; policy drop;
		ip saddr @kube accept
	}
}
table ip6 filter {
	chain KUBE-FIREWALL { }
}
"""

BROKEN = {
    "flush ruleset": "flush ruleset",
    "delete table": "delete table ip kube-proxy",
    "flush table": "flush table ip kube-proxy",
    "flush chain": "flush chain ip kube-proxy services",
    "flush map": "flush map ip kube-proxy service-ips",
    "delete element": "delete element ip kube-proxy service-ips { 10.96.0.1 . tcp . 80 }",
    "delete cluster IP": "delete element ip kube-proxy cluster-ips { 10.96.0.2 }",
    "other element": "add element ip kube-proxy cluster-ips { 10.96.0.77 }",
    "other verdict": "delete element ip kube-proxy service-ips { 10.96.0.1 . tcp . 80 }\n"
    "add element ip kube-proxy service-ips { 10.96.0.1 . tcp . 80 : drop }",
    "added rule": "insert rule ip kube-proxy services drop",
    "added chain": "add chain ip kube-proxy mine\nadd rule ip kube-proxy mine drop\n"
    "add rule ip kube-proxy services jump mine",
    "added base chain": "add chain ip kube-proxy mine"
    " { type filter hook input priority 0; policy drop; }",
    "added set": "add set ip kube-proxy mine { type ipv4_addr; }\n"
    "add rule ip kube-proxy services ip saddr @mine drop",
    "base chain's policy": "add chain ip kube-proxy filter-input { policy drop; }",
    "base chain gone": "flush chain ip kube-proxy nat-output\n"
    "delete chain ip kube-proxy nat-output",
}


@on_kernel
@pytest.mark.parametrize("how", BROKEN)
def test_what_somebody_broke_is_found_and_repaired(
    node: Node, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    plane = dataplane_of(node)
    sync(plane, FIRST)
    assert asyncio.run(plane.verify())
    node.nft(BROKEN[how] + "\n")
    assert not asyncio.run(plane.verify())
    assert "rules changed by somebody else" in caplog.text
    sync(plane, FIRST, full=True)
    assert differences(node, FIRST) == []
    assert asyncio.run(plane.verify())


@on_kernel
def test_a_single_rule_that_was_deleted_is_put_back(node: Node) -> None:
    plane = dataplane_of(node)
    sync(plane, FIRST)
    listed = node.run("nft", "-a", "list", "chain", "ip", "kube-proxy", "masquerading")
    handle = next(line.split()[-1] for line in listed.splitlines() if "masquerade" in line
                  and "rule" not in line and "chain" not in line)  # fmt: skip
    node.nft(f"delete rule ip kube-proxy masquerading handle {handle}\n")
    assert not asyncio.run(plane.verify())
    sync(plane, FIRST, full=True)
    assert differences(node, FIRST) == []


@on_kernel
def test_a_flushed_ruleset_is_healed_within_the_sync_period(node: Node) -> None:
    plane, synced = dataplane_of(node), 0

    def count(*_: object) -> None:
        nonlocal synced
        synced += 1

    async def reach(syncs: int) -> None:
        while synced < syncs:
            await asyncio.sleep(0.01)

    async def run() -> None:
        timing = Timing(sync_period=0.2)
        loop = SyncLoop(plane, 4, Metrics(), timing, on_synced=count)
        task = asyncio.create_task(loop.run())
        loop.request(FIRST, tuple(FIRST.services))
        await asyncio.wait_for(reach(1), 10)
        await asyncio.to_thread(node.nft, "flush ruleset\n")
        await asyncio.wait_for(reach(2), 10)
        await loop.close()
        await task

    asyncio.run(run())
    assert differences(node, FIRST) == []


@on_kernel
def test_a_partial_sync_over_broken_rules_fails_and_the_next_one_repairs_all(node: Node) -> None:
    metrics = Metrics()
    plane = dataplane_of(node, metrics=metrics)
    sync(plane, FIRST)
    node.nft("flush ruleset\n")
    with pytest.raises(ApplyError, match="No such file or directory"):
        sync(plane, table_of(service(1, 1)))
    assert counted(metrics, "kubeproxy_sync_proxy_rules_nftables_sync_failures_total") == 1
    sync(plane, table_of(service(1, 1)))
    assert differences(node, table_of(service(1, 1))) == []


@on_kernel
def test_tables_of_others_with_the_same_hooks_are_not_touched(node: Node) -> None:
    node.nft(OTHERS)
    before = node.ruleset()
    plane = dataplane_of(node)
    sync(plane, FIRST)
    node.nft("delete table ip kube-proxy\n")
    sync(plane, FIRST, full=True)
    sync(plane, table_of())
    assert asyncio.run(find_leftovers(prefix=node.prefix)) == ["ip kube-proxy"]
    asyncio.run(plane.cleanup())
    assert node.ruleset() == before
    assert asyncio.run(find_leftovers(prefix=node.prefix)) == []


@on_kernel
def test_clean_up_removes_both_tables_and_does_not_mind_that_there_are_none(node: Node) -> None:
    asyncio.run(clean_up(prefix=node.prefix))
    for family in FAMILIES:
        plane = dataplane_of(node, family)
        asyncio.run(plane.sync(cluster_table(family), (), True))
    asyncio.run(clean_up(prefix=node.prefix))
    assert node.ruleset() == ""
    asyncio.run(plane.cleanup())
    # After which a sync writes all again.
    asyncio.run(plane.sync(cluster_table(6), (), False))
    assert differences(node, cluster_table(6)) == []


@on_kernel
def test_an_nft_that_prints_rules_its_own_way_is_no_change_by_somebody_else(
    node: Node, tmp_path: Path
) -> None:
    own = tmp_path / "own-way"
    own.write_text(
        '#!/bin/sh\n"$@" > "$0.out"; s=$?\nsed s/fully-random/FULLY/ "$0.out"\nexit $s\n'
    )
    own.chmod(0o755)
    nft = Nft((1, 0, 6), (6, 2), (*node.prefix, str(own)))
    plane = NftablesDataplane(nft, options_of())
    sync(plane, FIRST)
    assert not asyncio.run(plane.verify())
    sync(plane, FIRST, full=True)
    assert asyncio.run(plane.verify())
    node.nft("flush chain ip kube-proxy masquerading\n")
    assert not asyncio.run(plane.verify())


@on_kernel
def test_nothing_is_read_again_while_only_we_change_anything(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    plane = dataplane_of(node, generation=node.generation)
    sync(plane, FIRST)
    assert asyncio.run(plane.verify())
    reads: list[Family] = []
    read = Nft.held

    async def noted(self: Nft, family: Family) -> Held:
        reads.append(family)
        return await read(self, family)

    monkeypatch.setattr(Nft, "held", noted)
    assert asyncio.run(plane.verify())
    sync(plane, table_of(service(1, 2)))
    sync(plane, FIRST)
    assert asyncio.run(plane.verify())
    assert reads == []
    node.nft("add table ip somebody\n")
    assert asyncio.run(plane.verify())
    assert reads == [4]
    sync(plane, table_of(service(1, 2)))
    node.nft("add element ip kube-proxy cluster-ips { 10.96.0.77 }\n")
    assert not asyncio.run(plane.verify())


# --- what is refused ------------------------------------------------------------------


@on_kernel
@pytest.mark.parametrize(
    "bad",
    [
        replace(service(7, 2), port=70000),  # an element of a map
        replace(service(7, 2), cluster=(Endpoint("10.244.0.300", 80),)),  # a rule
        replace(service(7, 2), load_balancer_ips=("192.0.2.7",), source_ranges=("10.0.0.0/8",),
                external_ips=("not.an.address",)),
    ],
    ids=["element", "rule", "address"],
)  # fmt: skip
def test_a_service_that_is_refused_keeps_no_other_from_working(
    node: Node, bad: Forwarding, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    metrics = Metrics()
    plane = dataplane_of(node, metrics=metrics, clock=lambda: now[0])
    every = ForwardingTable(4, 1, {**FIRST.services, bad.key: (bad,)})
    sync(plane, every)
    assert differences(node, FIRST) == []
    assert "Service default/svc7 is left out" in caplog.text
    assert counted(metrics, "kdns_proxy_services_refused") == 1
    assert asyncio.run(plane.verify())
    # Later it is tried again, and is in once it is right.
    now[0] = 301.0
    assert not asyncio.run(plane.verify())
    good = ForwardingTable(4, 1, {**FIRST.services, bad.key: (service(7, 2),)})
    asyncio.run(plane.sync(good, (bad.key,), False))
    assert differences(node, good) == []
    assert counted(metrics, "kdns_proxy_services_refused") == 0


@on_kernel
def test_a_change_that_is_refused_leaves_the_old_rules(node: Node) -> None:
    plane = dataplane_of(node)
    sync(plane, FIRST)
    bad = replace(service(1, 2), port=70000)
    with pytest.raises(ApplyError, match="70000"):
        sync(plane, ForwardingTable(4, 1, {bad.key: (bad,)}))
    assert differences(node, FIRST) == []


# --- what is missing ------------------------------------------------------------------


@on_kernel
def test_without_the_right_to_write_rules_that_is_said(node: Node) -> None:
    if shutil.which("setpriv") is None:
        pytest.skip("needs setpriv")
    drop = ("setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin")
    with pytest.raises(ApplyError, match="it takes the capability NET_ADMIN"):
        asyncio.run(find_nft((*node.prefix, *drop)))


def test_a_missing_program_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("kdns.kernel.programs.SBIN", ())
    with pytest.raises(ApplyError, match="install the package nftables, or use mode iptables"):
        asyncio.run(find_nft())
    asyncio.run(clean_up())
    assert asyncio.run(find_leftovers()) == []


def pretend(folder: Path, monkeypatch: pytest.MonkeyPatch, version: str, refusal: str = "") -> None:
    """Put an nft of that version into PATH; refusal -- what it says of every rule"""
    program = folder / "nft"
    program.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "nftables {version}" && exit\n'
        f"cat > /dev/null\n[ -z '{refusal}' ] || {{ echo '{refusal}' >&2; exit 1; }}\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


REFUSALS = [
    ("v0.9.8 (E.D.S.)", "6.1.0", "", "nft 0.9.8 is too old: mode nftables needs 1.0.1"),
    ("v1.0.0 (Fearless Fosdick)", "6.1.0", "", "needs 1.0.1; use mode iptables"),
    ("v1.0.6 (Lester Gooch #5)", "5.10.0-28-amd64", "", "kernel is 5.10: mode nftables needs 5.13"),
    ("v1.0.6", "6.1.0", "netlink: Error: cache initialization failed: Protocol not supported",
     "this kernel has no nf_tables; use mode iptables .legacy. or userspace"),
    ("v1.0.6", "6.1.0", "/dev/stdin:7:3-9: Error: Could not process rule: No such file",
     "this kernel lacks what `fib daddr type local ip daddr"),
    ("v1.0.6", "6.1.0", "Error: Operation not permitted (you must be root)", "NET_ADMIN"),
    ("whatever", "6.1.0", "", "which names no version"),
]  # fmt: skip


@pytest.mark.parametrize(("version", "release", "refusal", "said"), REFUSALS)
def test_what_is_missing_is_named_with_what_would_do(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    release: str,
    refusal: str,
    said: str,
) -> None:
    pretend(tmp_path, monkeypatch, version, refusal)
    with pytest.raises(ApplyError, match=said):
        asyncio.run(find_nft(release=release))


def test_a_family_that_the_kernel_cannot_translate_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(tmp_path, monkeypatch, "v1.0.6")
    program = tmp_path / "nft"
    text = program.read_text().replace(
        "cat > /dev/null", 'grep -q "table ip6" && echo "Error: Not supported" >&2 && exit 1'
    )
    program.write_text(f"{text}exit 0\n")
    found = asyncio.run(find_nft(release="6.1.0"))
    families, (warning,) = asyncio.run(usable_families(found, (4, 6)))
    assert families == (4,)
    assert warning.startswith("no Service is forwarded to over IPv6, this kernel cannot: nft: this")
    with pytest.raises(ApplyError, match="this kernel has no nf_tables"):
        asyncio.run(find_nft(release="6.1.0", families=FAMILIES[1:]))


def test_an_old_kernel_may_be_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(tmp_path, monkeypatch, "v1.0.1 (Fearless Fosdick #3)")
    found = asyncio.run(find_nft(release="4.18.0-553.el8", any_kernel=True))
    assert (found.version, found.kernel) == ((1, 0, 1), (4, 18))


@pytest.mark.parametrize(
    ("release", "version"),
    [("6.1.0-13-amd64", (6, 1)), ("5.15.167.4-microsoft", (5, 15)), ("strange", (999, 0))],
)
def test_a_kernels_version_is_read(release: str, version: tuple[int, int]) -> None:
    assert kernel_version(release) == version


def test_a_version_is_read() -> None:
    assert parse_version("nftables v1.1 (Commodore Bullmoose)") == (1, 1, 0)
    with pytest.raises(ApplyError, match="names no version"):
        parse_version("")


TEXT = "add table ip kube-proxy\nadd element ip kube-proxy m {\n1.2.3.4 . tcp . 99999 : drop\n}\n"
SAID = """\
/dev/stdin:3:17-21: Error: Value 99999 exceeds valid range 0-65535
1.2.3.4 . tcp . 99999 : drop
                ^^^^^
"""


def test_an_error_quotes_the_line_it_is_about() -> None:
    line = refused_line(SAID, TEXT)
    assert line == "1.2.3.4 . tcp . 99999 : drop"
    assert blame(SAID, line) == (
        "line 3: Error: Value 99999 exceeds valid range 0-65535"
        "; of its input: 1.2.3.4 . tcp . 99999 : drop"
    )  # fmt: skip
    assert blame("", "") == "failed and said nothing"
    assert refused_line("/dev/stdin:400:1-2: Error", TEXT) == ""


@pytest.mark.parametrize(
    ("stderr", "busy"),
    [
        ("Error: Could not process rule: Resource temporarily unavailable", True),
        ("Error: Could not process rule: Device or resource busy", False),
        ("Error: No such file or directory", False),
    ],
)
def test_what_may_pass_is_told_from_what_does_not(stderr: str, busy: bool) -> None:
    assert is_busy(stderr) is busy
