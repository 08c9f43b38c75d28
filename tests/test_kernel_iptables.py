"""The iptables dataplane on a real kernel: each test has a network namespace of its own.

What is asked is what an operator would ask of `iptables-save`: is what we wrote there, is
what others wrote still there, and is nothing left after a clean-up.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kdns.errors import ApplyError
from kdns.kernel.generation import parse_generation
from kdns.kernel.iptables import (
    CANARY,
    CANARY_TABLES,
    IptablesDataplane,
    cleanup_all,
    target_of,
    tokens,
)
from kdns.kernel.programs import (
    Programs,
    Survey,
    Variant,
    blame,
    choose_variant,
    find_programs,
    find_variants,
    is_busy,
    parse_version,
)
from kdns.metrics import Metrics
from kdns.proxy.iptables import Entry, IptablesRules, jumps
from kdns.proxy.options import Detector, Family, Options
from kdns.proxy.table import Forwarding, ForwardingTable
from kdns.registry.endpoints import Endpoint

needs_kernel = [
    pytest.mark.root,
    pytest.mark.skipif(
        any(
            shutil.which(name, path="/usr/sbin:/sbin:/usr/bin:/bin") is None
            for name in ("ip", "iptables-nft", "iptables-legacy", "ip6tables-nft")
        ),
        reason="needs the programs ip, iptables-nft and iptables-legacy",
    ),
]
kernel = [*needs_kernel, pytest.mark.parametrize("variant", ("nft", "legacy"))]
_numbers = itertools.count()

FOREIGN = """\
*nat
:CNI-HOSTPORT - [0:0]
:KUBE-OF-SOMEBODY - [0:0]
-A PREROUTING -m comment --comment "before ours" -j CNI-HOSTPORT
-A POSTROUTING -s {subnet} -j MASQUERADE
-A CNI-HOSTPORT -p tcp -m tcp --dport 8080 -j RETURN
COMMIT
*filter
:MINE - [0:0]
-A INPUT -m comment --comment "kubernetes health check service ports" -j MINE
-A FORWARD -j MINE
-A MINE -p udp -j ACCEPT
COMMIT
*mangle
:KUBE-KUBELET-CANARY - [0:0]
COMMIT
*raw
:OWN - [0:0]
-A PREROUTING -j OWN
COMMIT
"""
SUBNET: Mapping[Family, str] = {4: "10.1.0.0/16", 6: "fd01::/64"}


def all_of(
    marks: Iterable[pytest.MarkDecorator],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        for one in marks:
            function = one(function)
        return function

    return mark


mark = all_of(kernel)  # on both variants, where there is root and the programs


class Node:
    """A network namespace and the programs that work in it."""

    def __init__(self, lock: Path) -> None:
        self.name = f"kdns-ipt-{os.getpid()}-{next(_numbers)}"
        self.lock = lock
        # The lock file of the legacy programs is one for the machine; here each test has its
        # own, so that tests side by side do not wait for each other.
        self.prefix: tuple[str, ...] = (
            "ip", "netns", "exec", self.name, "env", f"XTABLES_LOCKFILE={lock}",
        )  # fmt: skip

    def run(self, *argv: str, text: str = "") -> str:
        done = subprocess.run(
            (*self.prefix, *argv), input=text, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{argv}: {done.stderr}"
        return done.stdout

    def programs(self, variant: Variant, family: Family = 4) -> Programs:
        return asyncio.run(find_variants(family, self.prefix))[variant]

    def saved(self, programs: Programs) -> dict[str, list[str]]:
        """Return what iptables-save prints, without counters and times, by table."""
        tables: dict[str, list[str]] = {}
        for line in self.run(f"{programs.name}-save").splitlines():
            if line.startswith("*"):
                lines = tables.setdefault(line, [])
            elif not line.startswith("#") and line != "COMMIT":
                lines.append(line.split(" [")[0] if line.startswith(":") else line)
        return tables

    def restore(self, programs: Programs, text: str) -> None:
        self.run(f"{programs.name}-restore", "--noflush", text=text)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path / "xtables.lock")
    subprocess.run(("ip", "netns", "add", node.name), check=True)
    yield node
    subprocess.run(("ip", "netns", "del", node.name), check=True)


# --- objects --------------------------------------------------------------------------


def service(
    number: int, endpoints: int, family: Family = 4, first: int = 1, node_port: int = 0
) -> Forwarding:
    base = "10.244.{}." if family == 4 else "fd00:{}::"
    addresses = [f"{base.format(number)}{first + i}" for i in range(endpoints)]
    return Forwarding(
        key=("default", f"svc{number}"),
        name=f"default/svc{number}:http",
        protocol="tcp",
        cluster_ip=f"10.96.0.{number}" if family == 4 else f"fd00:96::{number}",
        port=80,
        node_port=node_port,
        cluster=tuple(Endpoint(address, 8080) for address in addresses),
        has_endpoints=bool(endpoints),
    )


def table_of(*services: Forwarding, family: Family = 4) -> ForwardingTable:
    return ForwardingTable(
        family,
        1,
        {one.key: (one,) for one in services},
        sum(len(one.cluster) for one in services),
    )


def options_of(family: Family) -> Options:
    cidr = "10.244.0.0/16" if family == 4 else "fd00::/16"
    return Options(family=family, detector=Detector("cidr", cidr))


def dataplane_of(
    node: Node, variant: Variant, family: Family = 4, metrics: Metrics | None = None
) -> IptablesDataplane:
    return IptablesDataplane(node.programs(variant, family), options_of(family), metrics)


def sync(dataplane: IptablesDataplane, table: ForwardingTable, full: bool = True) -> None:
    asyncio.run(dataplane.sync(table, tuple(table.services), full))


def first_table(family: Family = 4) -> ForwardingTable:
    return table_of(
        service(1, 2, family), service(2, 0, family), service(3, 1, family, node_port=30080),
        family=family,
    )  # fmt: skip


# --- what is written ------------------------------------------------------------------


@mark
@pytest.mark.parametrize("family", (4, 6))
def test_kernel_holds_what_is_wanted(node: Node, variant: Variant, family: Family) -> None:
    dataplane = dataplane_of(node, variant, family)
    sync(dataplane, first_table(family))
    rules = IptablesRules(options_of(family))
    rules.update(first_table(family), None)
    saved = node.saved(dataplane.programs)
    for table, chains in rules.wanted().items():
        for chain, wanted in chains.items():
            held = [line for line in saved[f"*{table}"] if line.startswith(f"-A {chain} ")]
            assert held == [f"-A {chain} {rule}" for rule in wanted]
    for table, chains in jumps(options_of(family)).items():
        for chain, wanted in chains.items():
            held = [line for line in saved[f"*{table}"] if line.startswith(f"-A {chain} ")]
            assert held == [f"-A {chain} {rule}" for rule in wanted], "order of a fresh node"
    for table in CANARY_TABLES:
        assert f":{CANARY} -" in saved[f"*{table}"]
    assert asyncio.run(dataplane.verify())


@mark
def test_partial_after_full_equals_a_fresh_full(
    node: Node, variant: Variant, tmp_path: Path
) -> None:
    one, other = dataplane_of(node, variant), Node(tmp_path / "other.lock")
    steps = [
        first_table(),
        table_of(service(1, 3), service(2, 1), service(3, 1, node_port=30081)),
        table_of(service(1, 0), service(3, 2, first=9), service(4, 1)),
    ]
    sync(one, steps[0])
    for before, after in itertools.pairwise(steps):
        changed = before.services.keys() | after.services.keys()
        asyncio.run(one.sync(after, changed, False))
        assert asyncio.run(one.verify())
    subprocess.run(("ip", "netns", "add", other.name), check=True)
    try:
        fresh = dataplane_of(other, variant)
        sync(fresh, steps[-1])
        assert node.saved(one.programs) == other.saved(fresh.programs)
    finally:
        subprocess.run(("ip", "netns", "del", other.name), check=True)


@mark
def test_a_restart_removes_what_is_no_longer_wanted_and_doubles_nothing(
    node: Node, variant: Variant
) -> None:
    sync(dataplane_of(node, variant), first_table())
    again = dataplane_of(node, variant)
    sync(again, first_table())
    held = node.saved(again.programs)
    sync(again, first_table())
    assert node.saved(again.programs) == held
    restarted = dataplane_of(node, variant)
    sync(restarted, table_of(service(3, 1)))
    saved = node.saved(restarted.programs)["*nat"]
    assert not [line for line in saved if "svc1" in line]
    assert sum(line.startswith((":KUBE-SVC-", ":KUBE-SEP-")) for line in saved) == 2
    assert sum(line.startswith("-A PREROUTING ") for line in saved) == 1


@mark
def test_many_services_in_chunks_are_the_same_rules(
    node: Node, variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = table_of(*(service(number, number % 3) for number in range(1, 30)))
    whole = dataplane_of(node, variant)
    sync(whole, table)
    saved = node.saved(whole.programs)
    asyncio.run(whole.cleanup())
    monkeypatch.setattr("kdns.kernel.iptables.LARGE", 60)
    monkeypatch.setattr("kdns.kernel.iptables.CHUNK", 20)
    chunked = dataplane_of(node, variant)
    sync(chunked, table)
    assert node.saved(chunked.programs) == saved
    assert asyncio.run(chunked.verify())
    # A restart writes only what is not as wanted; without the canary nothing but it is not.
    node.restore(chunked.programs, f"*mangle\n-X {CANARY}\nCOMMIT\n")
    restarted = dataplane_of(node, variant)
    sync(restarted, table)
    assert node.saved(chunked.programs) == saved
    assert asyncio.run(restarted.verify())
    node.restore(chunked.programs, DAMAGE["a chain flushed"])
    assert not asyncio.run(restarted.verify())
    sync(dataplane_of(node, variant), table)
    assert node.saved(chunked.programs) == saved


class BadChunk(IptablesRules):
    """The real rules in chunks, but the text of that number holds a line nobody knows.

    given -- texts asked for so far
    """

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.bad: int | None = None
        self.given = 0

    def chunks(
        self,
        services: int,
        stale: Iterable[str] = (),
        entry: Entry = {},  # noqa: B006
        stay: Collection[str] = (),
    ) -> Iterator[str]:
        for number, text in enumerate(super().chunks(services, stale, entry, stay)):
            self.given = number + 1
            yield text if number != self.bad else text.replace("COMMIT\n", "nonsense\nCOMMIT\n")


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdns.kernel.iptables.LARGE", 60)
    monkeypatch.setattr("kdns.kernel.iptables.CHUNK", 20)


def led_to(saved: Mapping[str, list[str]]) -> set[str]:
    """Return the chains that KUBE-SERVICES and the chains behind it lead to."""
    targets: dict[str, set[str]] = {}
    for line in saved["*nat"]:
        words = line.split()
        if words[0] == "-A" and words[-2] == "-j":
            targets.setdefault(words[1], set()).add(words[-1])
    found, todo = set[str](), ["KUBE-SERVICES"]
    while todo:
        chain = todo.pop()
        todo += targets.get(chain, set()) - found
        found |= targets.get(chain, set())
    return {chain for chain in found if chain.startswith("KUBE-S")}


@pytest.mark.parametrize("bad", range(10))
@all_of(needs_kernel)
def test_chunks_that_fail_halfway_leave_every_service_working(
    node: Node, small_chunks: None, bad: int
) -> None:
    """Over older rules with other endpoints: each Service has its old ones or its new ones."""
    rules = BadChunk(options_of(4))
    dataplane = IptablesDataplane(node.programs("nft"), options_of(4), rules=rules)
    sync(dataplane, table_of(*(service(n, 2) for n in range(1, 30))))
    before = node.saved(dataplane.programs)
    after = table_of(*(service(n, 2, first=7) for n in range(1, 30)))
    rules.bad = bad
    with pytest.raises(ApplyError, match="nonsense"):
        sync(dataplane, after)
    assert rules.given > bad
    saved = node.saved(dataplane.programs)
    services = [line for line in saved["*nat"] if line.startswith("-A KUBE-SERVICES ")]
    assert services == [line for line in before["*nat"] if line.startswith("-A KUBE-SERVICES ")]
    filled = {line.split()[1] for line in saved["*nat"] if line.startswith("-A KUBE-S")}
    assert led_to(saved) <= filled
    assert len({chain for chain in led_to(saved) if "-SEP-" in chain}) == 2 * 29
    rules.bad = None
    sync(dataplane, after, full=False)
    assert asyncio.run(dataplane.verify())
    assert "10.244.9.1:8080" not in str(node.saved(dataplane.programs))


@pytest.mark.parametrize("bad", (0, 4, 9))
@all_of(needs_kernel)
def test_a_first_start_in_chunks_that_fails_leads_no_packet_anywhere(
    node: Node, small_chunks: None, bad: int
) -> None:
    rules = BadChunk(options_of(4))
    rules.bad = bad
    dataplane = IptablesDataplane(node.programs("nft"), options_of(4), rules=rules)
    with pytest.raises(ApplyError, match="nonsense"):
        sync(dataplane, table_of(*(service(n, 2) for n in range(1, 30))))
    text = node.run("iptables-nft-save")
    assert not [
        line for line in text.splitlines() if line.startswith(("-A PRE", "-A OUT", "-A IN"))
    ]


@mark
def test_a_first_start_that_fails_leaves_nothing(node: Node, variant: Variant) -> None:
    """Chains and the jumps to them come together or not at all."""
    rules = BadLine(options_of(4))
    rules.bad = "nonsense\n"
    dataplane = IptablesDataplane(node.programs(variant), options_of(4), rules=rules)
    with pytest.raises(ApplyError, match="nonsense"):
        sync(dataplane, first_table())
    assert not [line for line in node.saved(dataplane.programs).get("*nat", ()) if "KUBE-" in line]


@all_of(needs_kernel)
def test_both_families_and_somebody_else_at_once(node: Node, small_chunks: None) -> None:
    """All of them change one rule set of the kernel; each transaction finds another's done."""
    tables: dict[Family, ForwardingTable] = {
        4: table_of(*(service(n, 2) for n in range(1, 60))),
        6: table_of(*(service(n, 2, 6) for n in range(1, 60)), family=6),
    }
    planes = {family: dataplane_of(node, "nft", family) for family in tables}

    async def start() -> None:
        syncs = [
            plane.sync(tables[f], tuple(tables[f].services), True) for f, plane in planes.items()
        ]
        other = [planes[4].programs.restore(f"*raw\n:OWN-{n} - [0:0]\nCOMMIT\n") for n in range(9)]
        await asyncio.gather(*syncs, *other)

    asyncio.run(start())
    for family, plane in planes.items():
        assert asyncio.run(plane.verify())
        whole = IptablesRules(options_of(family))
        whole.update(tables[family], None)
        rules = [line for line in node.saved(plane.programs)["*nat"] if line.startswith("-A KUBE-")]
        assert len(rules) == whole.counts()["nat"]
    assert sum(line.startswith(":OWN-") for line in node.saved(planes[4].programs)["*raw"]) == 9


# --- what others do -------------------------------------------------------------------

DAMAGE = {
    "a chain flushed": "*nat\n:KUBE-SERVICES - [0:0]\nCOMMIT\n",
    "a rule deleted": ("*nat\n-D KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\nCOMMIT\n"),
    "a rule added": "*filter\n-A KUBE-FORWARD -j ACCEPT\nCOMMIT\n",
    "a rule exchanged": (
        "*nat\n:KUBE-MARK-MASQ - [0:0]\n-A KUBE-MARK-MASQ -j MARK --set-xmark 0x1/0x1\nCOMMIT\n"
    ),
    "the canary gone": f"*mangle\n-X {CANARY}\nCOMMIT\n",
    "a jump removed": (
        '*nat\n-D PREROUTING -m comment --comment "kubernetes service portals"'
        " -j KUBE-SERVICES\nCOMMIT\n"
    ),
    "the guard of 127.0.0.0/8 flushed": "*filter\n:KUBE-FIREWALL - [0:0]\nCOMMIT\n",
    "a chain of a Service that is gone": "*nat\n:KUBE-SVC-AAAAAAAAAAAAAAAA - [0:0]\nCOMMIT\n",
    "everything flushed": "".join(f"*{t}\n-F\n-X\nCOMMIT\n" for t in ("nat", "filter", "mangle")),
}


@mark
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_what_somebody_broke_is_found_and_repaired(
    node: Node, variant: Variant, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    dataplane = dataplane_of(node, variant)
    sync(dataplane, first_table())
    saved = node.saved(dataplane.programs)
    assert asyncio.run(dataplane.verify())
    node.restore(dataplane.programs, damage)
    broken = node.saved(dataplane.programs)
    assert broken != saved, "the damage is none"
    assert not asyncio.run(dataplane.verify())
    assert "changed by somebody else" in caplog.text
    asyncio.run(dataplane.sync(first_table(), (), True))
    assert node.saved(dataplane.programs) == saved
    assert asyncio.run(dataplane.verify())


@mark
@pytest.mark.parametrize("family", (4, 6))
def test_rules_of_others_are_not_touched(node: Node, variant: Variant, family: Family) -> None:
    dataplane = dataplane_of(node, variant, family)
    node.restore(dataplane.programs, FOREIGN.format(subnet=SUBNET[family]))
    prior = node.saved(dataplane.programs)
    sync(dataplane, first_table(family))
    asyncio.run(dataplane.sync(table_of(family=family), tuple(first_table().services), False))
    sync(dataplane, first_table(family))
    saved = node.saved(dataplane.programs)
    for table, lines in prior.items():
        ours = [line for line in saved[table] if line in lines]
        assert ours == lines, "there, and in the order as before"
    # Added below and above ours meanwhile: stays where it is, and is no damage.
    node.restore(dataplane.programs, "*nat\n-I PREROUTING -j CNI-HOSTPORT\nCOMMIT\n")
    assert asyncio.run(dataplane.verify())
    sync(dataplane, first_table(family))
    node.restore(dataplane.programs, "*nat\n-D PREROUTING -j CNI-HOSTPORT\nCOMMIT\n")
    asyncio.run(dataplane.cleanup())
    cleaned = node.saved(dataplane.programs)
    # kubelet was here, so its KUBE-FIREWALL is not ours to take away (reference 1.12).
    left = [line for line in cleaned["*filter"] if "KUBE-FIREWALL" not in line]
    assert {**cleaned, "*filter": left} == prior
    assert ":KUBE-FIREWALL -" in cleaned["*filter"]


@mark
def test_clean_up_leaves_the_kernel_as_before(node: Node, variant: Variant) -> None:
    programs = [node.programs(variant, family) for family in (4, 6)]
    for one in programs:
        text = FOREIGN.format(subnet=SUBNET[one.family]).replace("KUBE-KUBELET-CANARY", "X")
        node.restore(one, text)
    prior = [node.saved(one) for one in programs]
    for one in programs:
        sync(IptablesDataplane(one, options_of(one.family)), first_table(one.family))
    asyncio.run(cleanup_all(prefix=node.prefix))
    assert [node.saved(one) for one in programs] == prior
    asyncio.run(cleanup_all(prefix=node.prefix))
    assert [node.saved(one) for one in programs] == prior


@mark
def test_clean_up_keeps_a_chain_that_a_rule_of_somebody_else_leads_to(
    node: Node, variant: Variant, caplog: pytest.LogCaptureFixture
) -> None:
    dataplane = dataplane_of(node, variant)
    sync(dataplane, first_table())
    node.restore(dataplane.programs, "*nat\n-A OUTPUT -d 10.9.9.9 -j KUBE-SERVICES\nCOMMIT\n")
    asyncio.run(dataplane.cleanup())
    ours = [line for line in node.saved(dataplane.programs)["*nat"] if "KUBE-" in line]
    assert ours == [":KUBE-SERVICES -", "-A OUTPUT -d 10.9.9.9/32 -j KUBE-SERVICES"]
    assert "a rule of somebody else in OUTPUT leads to it" in caplog.text


# --- failures -------------------------------------------------------------------------


def without_recent(node: Node, folder: Path) -> None:
    """Have iptables in `node` lack the match that session affinity needs."""
    (libraries,) = {one.parent for one in Path("/usr/lib").rglob("libxt_recent.so")}
    folder.mkdir()
    for one in libraries.iterdir():
        if one.name != "libxt_recent.so":
            (folder / one.name).symlink_to(one)
    node.prefix = (*node.prefix, f"XTABLES_LIBDIR={folder}")


@mark
@pytest.mark.parametrize("chunks", (False, True), ids=("at once", "in chunks"))
def test_a_service_with_a_rule_that_iptables_refuses_keeps_no_other_from_working(
    node: Node, variant: Variant, chunks: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if chunks:
        monkeypatch.setattr("kdns.kernel.iptables.LARGE", 10)
        monkeypatch.setattr("kdns.kernel.iptables.CHUNK", 20)
    without_recent(node, tmp_path / "xtables")
    programs, metrics, now = node.programs(variant), Metrics(), [0.0]
    dataplane = IptablesDataplane(programs, options_of(4), metrics, clock=lambda: now[0])
    sticky = [replace(service(n, 2), affinity=60) for n in (2, 5)]
    plain = [service(n, 2) for n in (1, 3, 4, 6)]

    def served() -> set[str]:
        saved = "".join(node.saved(programs)["*nat"])
        return {n for n in "123456" if f'"default/svc{n}:http cluster IP"' in saved}

    sync(dataplane, table_of(*plain, *sticky))
    assert served() == set("1346")
    assert metrics.value("kdns_proxy_services_refused", "IPv4") == 2
    told = [one.message for one in caplog.records if one.levelname == "ERROR"]
    assert [text.split(" is left out")[0] for text in told] == [
        "IPv4: Service default/svc2", "IPv4: Service default/svc5",
    ]  # fmt: skip
    assert "recent" in told[0]
    assert asyncio.run(dataplane.verify())

    # What changes elsewhere is written as ever; who is left out asks for nothing of that.
    asyncio.run(dataplane.sync(table_of(*plain[1:], *sticky), [plain[0].key], False))
    assert served() == set("346")
    # One that flaps is not tried each time.
    now[0] = 5.0
    table = table_of(*plain[1:], sticky[0], service(5, 1))
    asyncio.run(dataplane.sync(table, [sticky[1].key], False))
    assert served() == set("346") and asyncio.run(dataplane.verify())
    # But soon: with the next look at the rules.
    now[0] = 11.0
    assert not asyncio.run(dataplane.verify())
    asyncio.run(dataplane.sync(table, (), True))
    assert served() == set("3456") and asyncio.run(dataplane.verify())
    assert metrics.value("kdns_proxy_services_refused", "IPv4") == 1
    # And in the end the operator has installed what was missing.
    (tmp_path / "xtables" / "libxt_recent.so").symlink_to(
        next(Path("/usr/lib").rglob("libxt_recent.so"))
    )
    now[0] = 301.0
    assert not asyncio.run(dataplane.verify())
    asyncio.run(dataplane.sync(table, (), True))
    assert served() == set("23456") and asyncio.run(dataplane.verify())
    assert metrics.value("kdns_proxy_services_refused", "IPv4") == 0


@mark
def test_what_no_single_service_is_to_blame_for_fails_as_before(
    node: Node, variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdns.kernel.refusals.MOST_REFUSED", 1)
    dataplane = dataplane_of(node, variant)
    # No masquerading at all: every Service asks for what there is not.
    monkeypatch.setattr("kdns.proxy.iptables_rules._comment", lambda text: f"-m nosuch {text[:0]}")
    with pytest.raises(ApplyError, match="nosuch"):
        sync(dataplane, first_table())


@mark
def test_an_address_that_iptables_prints_in_its_own_way_is_no_change_by_somebody_else(
    node: Node, variant: Variant
) -> None:
    """glibc prints ::102:304 as ::1.2.3.4; it may be anybody's externalIP."""
    dataplane = dataplane_of(node, variant, 6)
    odd = ("::102:304", "::1:0", "::1", "::", "64:ff9b::102:304", "2001:db8::1:0:0:1")
    one = replace(service(1, 1, 6), external_ips=odd, source_ranges=("::102:0/120",),
                  load_balancer_ips=("::506:708",), node_in_ranges=True)  # fmt: skip
    sync(dataplane, table_of(one, family=6))
    assert "::1.2.3.4" in str(node.saved(dataplane.programs))
    assert asyncio.run(dataplane.verify())
    node.run(
        f"{dataplane.programs.name}", "-t", "nat", "-R", "KUBE-SERVICES", "2", "-d", "::1.2.3.5",
        "-j", target_of(node.saved(dataplane.programs)["*nat"][-1]) or "RETURN",
    )  # fmt: skip
    assert not asyncio.run(dataplane.verify())


@mark
def test_a_rule_of_somebody_that_leads_to_a_service_is_in_nobodys_way_when_the_service_goes(
    node: Node, variant: Variant, caplog: pytest.LogCaptureFixture
) -> None:
    """The chain cannot go before the rule: it stays, empty, until then."""
    dataplane = dataplane_of(node, variant)
    sync(dataplane, table_of(service(1, 1), service(2, 1)))
    saved = node.saved(dataplane.programs)
    chain = next(one for one in saved["*nat"] if "svc2:http cluster IP" in one).split()[-1]
    tool = dataplane.programs.name
    node.run(tool, "-t", "nat", "-A", "OUTPUT", "-d", "192.0.2.1", "-j", chain)
    after = table_of(service(1, 1), service(3, 1))
    with contextlib.suppress(ApplyError):
        asyncio.run(dataplane.sync(after, [("default", "svc2"), ("default", "svc3")], False))
    asyncio.run(dataplane.sync(after, (), True))
    text = str(node.saved(dataplane.programs))
    assert "svc3:http cluster IP" in text and "svc2" not in text and f":{chain} " in text
    assert f"{chain} stays, empty" in caplog.text
    caplog.clear()
    assert asyncio.run(dataplane.verify()), caplog.text  # nothing to be told of again and again
    node.run(tool, "-t", "nat", "-D", "OUTPUT", "-d", "192.0.2.1", "-j", chain)
    asyncio.run(dataplane.sync(after, (), True))
    assert f":{chain} " not in str(node.saved(dataplane.programs))
    assert asyncio.run(dataplane.verify())


class BadLine(IptablesRules):
    """The real rules, but one line of the next text is none that iptables knows."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.bad = ""
        self.asked: list[str] = []

    def _spoilt(self, text: str) -> str:
        at = text.index("COMMIT\n", text.index("*nat"))
        return text[:at] + self.bad + text[at:]

    def full(
        self,
        stale: Iterable[str] = (),
        entry: Entry = {},  # noqa: B006
        stay: Collection[str] = (),
    ) -> str:
        self.asked.append("full")
        return self._spoilt(super().full(stale, entry, stay))

    def partial(self) -> str:
        self.asked.append("partial")
        return self._spoilt(super().partial())


@mark
@pytest.mark.parametrize(
    "bad",
    (
        "-A KUBE-SERVICES -j KUBE-SVC-MISSING\n",
        "-A KUBE-SERVICES -d 10.96.0.300 -j RETURN\n",
        "-A KUBE-NOT-THERE -j RETURN\n",
        "nonsense\n",
    ),
)
def test_a_restore_that_fails_leaves_the_old_rules_and_says_the_line(
    node: Node, variant: Variant, bad: str
) -> None:
    options, metrics = options_of(4), Metrics()
    rules = BadLine(options)
    dataplane = IptablesDataplane(node.programs(variant), options, metrics, rules)
    sync(dataplane, first_table())
    before = node.saved(dataplane.programs)
    after = table_of(service(1, 2), service(2, 0), service(3, 1, node_port=30080), service(9, 2))
    rules.bad = bad
    with pytest.raises(ApplyError) as failure:
        asyncio.run(dataplane.sync(after, [("default", "svc9")], False))
    assert bad.strip() in str(failure.value)
    assert not failure.value.busy
    assert node.saved(dataplane.programs) == before
    rules.bad = ""
    asyncio.run(dataplane.sync(after, (), False))
    assert rules.asked == ["full", "partial", "full"]
    assert asyncio.run(dataplane.verify())
    assert "default/svc9:http cluster IP" in str(node.saved(dataplane.programs))
    name = "kubeproxy_sync_proxy_rules_iptables"
    assert metrics.value(f"{name}_restore_failures_total", "IPv4") == 1
    assert metrics.value(f"{name}_partial_restore_failures_total", "IPv4") == 1
    counts = IptablesRules(options)
    counts.update(after, None)
    for table, count in counts.counts().items():
        assert metrics.value(f"{name}_total", "IPv4", table) == count


@pytest.mark.root
@needs_kernel[1]
def test_a_lock_held_by_another_program_is_waited_for_counted_and_got_over(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdns.kernel.programs.LOCK_WAIT", "1")
    metrics = Metrics()
    dataplane = dataplane_of(node, "legacy", metrics=metrics)
    sync(dataplane, table_of(service(1, 1)))
    before = node.saved(dataplane.programs)
    with node.lock.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ApplyError) as failure:
            sync(dataplane, first_table())
    assert failure.value.busy
    assert metrics.value("kdns_proxy_iptables_lock_failures_total", "IPv4") == 1
    assert node.saved(dataplane.programs) == before
    sync(dataplane, first_table())
    assert asyncio.run(dataplane.verify())


@pytest.mark.root
@needs_kernel[1]
def test_nothing_is_read_again_while_the_generation_stays(node: Node) -> None:
    programs, number = node.programs("nft"), 7
    dataplane = IptablesDataplane(programs, options_of(4), generation=lambda: number)
    sync(dataplane, first_table())
    assert asyncio.run(dataplane.verify())
    node.restore(programs, DAMAGE["a chain flushed"])
    assert asyncio.run(dataplane.verify()), "not looked at: the kernel says nothing changed"
    number = 8
    assert not asyncio.run(dataplane.verify())


def test_the_generation_is_read_from_the_kernels_answer() -> None:
    answer = bytes.fromhex("2c0000000f0a0000010000000000000000000002")
    answer += bytes.fromhex("080001000000002a") + bytes(16)
    assert parse_generation(answer) == 42
    for cut in range(len(answer)):
        assert parse_generation(answer[:cut]) in (None, 42)
    assert parse_generation(bytes(64)) is None


# --- which programs -------------------------------------------------------------------


WITHOUT_NET_RAW = ("setpriv", "--inh-caps=-all", "--bounding-set=-net_raw")


@pytest.mark.root
@needs_kernel[1]
def test_a_legacy_node_on_which_kdns_may_not_see_that_is_told_of(node: Node) -> None:
    """Reading legacy rules takes NET_RAW, and where there are none, nothing is said."""
    programs = node.programs("legacy")
    node.prefix = (*node.prefix, *WITHOUT_NET_RAW)
    assert not asyncio.run(find_programs([4], node.prefix)).warnings
    node.prefix = node.prefix[: -len(WITHOUT_NET_RAW)]
    node.restore(programs, "*nat\n-A OUTPUT -j RETURN\nCOMMIT\n")
    found = asyncio.run(find_programs([4], (*node.prefix, *WITHOUT_NET_RAW)))
    assert found.programs[4].variant == "nft"
    (warning,) = found.warnings
    assert "variant legacy cannot be seen: it takes the capability NET_RAW" in warning


@pytest.mark.root
@needs_kernel[1]
@pytest.mark.parametrize(
    ("nft", "legacy", "chosen"),
    (
        ("", "", None),  # what plain iptables is
        ("*mangle\n:KUBE-IPTABLES-HINT - [0:0]\nCOMMIT\n", FOREIGN, "nft"),
        ("", "*mangle\n:KUBE-KUBELET-CANARY - [0:0]\nCOMMIT\n", "legacy"),
        ("*nat\n-A OUTPUT -j RETURN\nCOMMIT\n", "", "nft"),
        ("", "*nat\n-A OUTPUT -j RETURN\nCOMMIT\n", "legacy"),
    ),
)
def test_the_variant_in_use_on_the_node_is_chosen(
    node: Node, nft: str, legacy: str, chosen: Variant | None
) -> None:
    default = next(iter(asyncio.run(find_variants(4, node.prefix))))
    texts: tuple[tuple[Variant, str], ...] = (("nft", nft), ("legacy", legacy))
    for variant, text in texts:
        if text:
            node.restore(node.programs(variant), text.format(subnet="10.1.0.0/16"))
    found = asyncio.run(find_programs(prefix=node.prefix))
    assert {one.variant for one in found.programs.values()} == {chosen or default}
    mixed = bool(nft) and bool(legacy)
    assert bool(found.warnings) == mixed
    if mixed:
        assert "legacy holds" in found.warnings[0]


@pytest.mark.parametrize(
    ("nft", "legacy", "default", "chosen"),
    (
        (Survey(), Survey(), "nft", "nft"),
        (Survey(), Survey(), "legacy", "legacy"),
        (Survey(True, 0), Survey(True, 9), "legacy", "nft"),
        (Survey(False, 9), Survey(True, 0), "nft", "legacy"),
        (Survey(rules=3), Survey(rules=4), "nft", "legacy"),
        (Survey(rules=4), Survey(rules=3), "legacy", "nft"),
        (Survey(rules=3), Survey(rules=3), "legacy", "legacy"),
    ),
)
def test_the_choice(nft: Survey, legacy: Survey, default: Variant, chosen: Variant) -> None:
    assert choose_variant({"nft": nft, "legacy": legacy}, default) == chosen


@pytest.mark.parametrize(
    ("text", "variant", "version"),
    (
        ("iptables v1.8.9 (nf_tables)\n", "nft", (1, 8, 9)),
        ("ip6tables v1.8.10 (legacy)\n", "legacy", (1, 8, 10)),
        ("iptables v1.6.1\n", "legacy", (1, 6, 1)),
        ("iptables v1.9 (nf_tables)\n", "nft", (1, 9, 0)),
    ),
)
def test_a_version_is_read(text: str, variant: str, version: tuple[int, int, int]) -> None:
    assert parse_version("iptables", text) == (variant, version)


@pytest.mark.parametrize("text", ("", "usage: iptables", "v"))
def test_a_program_without_a_version_is_an_error(text: str) -> None:
    with pytest.raises(ApplyError, match="names no version"):
        parse_version("iptables", text)


def test_masquerading_is_fully_random_where_iptables_can() -> None:
    assert Programs(4, "legacy", (1, 6, 2), "iptables").random_fully
    assert not Programs(4, "legacy", (1, 6, 1), "iptables").random_fully


def test_a_missing_program_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("kdns.kernel.programs.SBIN", ())
    with pytest.raises(ApplyError, match="install the package iptables"):
        asyncio.run(find_programs([4]))


TEXT = "*nat\n:A - [0:0]\n-A A -d 1.2.3.400 -j RETURN\n-A A -j GONE\nCOMMIT\n"


@pytest.mark.parametrize(
    ("stderr", "said"),
    (
        (
            "iptables-restore v1.8.9 (nf_tables): host/network `1.2.3.400' not found\n"
            "Error occurred at line: 3\nTry `iptables-restore -h' for more information.\n",
            "iptables-restore v1.8.9 (nf_tables): host/network `1.2.3.400' not found;"
            " line 3 of its input: -A A -d 1.2.3.400 -j RETURN",
        ),
        (
            "iptables-restore v1.8.9 (nf_tables): Chain 'GONE' does not exist\n"
            "Error occurred at line: 5\n",
            "iptables-restore v1.8.9 (nf_tables): Chain 'GONE' does not exist;"
            " line 4 of its input: -A A -j GONE",
        ),
        ("iptables-restore: line 4 failed\n",
         "iptables-restore: line 4 failed; line 4 of its input: -A A -j GONE"),
        ("iptables-restore: line 400 failed\n", "iptables-restore: line 400 failed"),
        ("Out of memory\n", "Out of memory"),
        ("", "failed and said nothing"),
    ),
)  # fmt: skip
def test_an_error_quotes_the_line_it_is_about(stderr: str, said: str) -> None:
    assert blame(stderr, TEXT) == said


@pytest.mark.parametrize(
    ("status", "stderr", "busy"),
    (
        (4, "Another app is currently holding the xtables lock.", True),
        (4, "Could not fetch rule set generation id: Permission denied (you must be root)", False),
        # So iptables-nft leaves for a match that the kernel lacks: no lock will be free soon.
        (4, "line 5: RULE_APPEND failed (No such file or directory): rule in chain A", False),
        (4, "line 5: CHAIN_DEL failed (Device or resource busy): chain A", True),
        (1, "iptables-restore: line 4 failed", False),
        (2, "Bad argument", False),
    ),
)
def test_a_lock_is_told_from_other_failures(status: int, stderr: str, busy: bool) -> None:
    assert is_busy(status, stderr) == busy


def test_a_rule_is_known_again_whatever_the_order_of_its_matches() -> None:
    one = '-p tcp -m comment --comment "a b" -m conntrack --ctstate NEW -j KUBE-SERVICES'
    other = '-p tcp -m conntrack --ctstate NEW -m comment --comment "a b" -j KUBE-SERVICES'
    assert tokens(one) == tokens(other)
    assert tokens(one) != tokens(one.replace("a b", "a"))
