"""What mode ipvs asks of the kernel, as `kdns rules --mode ipvs` prints it."""

from __future__ import annotations

import ipaddress
import random
from typing import Any

import pytest
from forwarding import endpoint, exposed, slice_of, table_of
from hypothesis import given
from hypothesis import strategies as st

from kdns.kernel.ipset import HeldSet, parse_sets, plan_sets
from kdns.kernel.ipvs import settings_wanted
from kdns.kernel.ipvs_fingerprint import without_counters
from kdns.kernel.ipvs_netlink import canonical, parse_table
from kdns.proxy.ipvs import (
    MAX_NAME,
    SETS,
    At,
    Host,
    IpvsRules,
    IpvsSettings,
    Real,
    Virtual,
    compile_ipvs,
    constant_chains,
    create_line,
    host_view,
    is_excluded,
    render_rules,
    room_for,
    set_name,
)
from kdns.proxy.options import Detector, Family, Options
from kdns.proxy.ruleset import parse_rules
from kdns.proxy.table import ForwardingTable

HOST = Host(frozenset({"192.168.77.1", "127.0.0.1"}), ("192.168.77.1",))
OPTIONS = Options(detector=Detector("cidr", "10.244.0.0/16"))
HERE, THERE = "10.244.1.10", "10.244.2.10"


def ends(*ips: str, owner: str = "web", protocol: str = "TCP") -> Any:
    """Endpoints: those of 10.244.1.0/24 are on this node."""
    return slice_of(
        owner,
        *[endpoint(ip, nodeName="node1" if ip.startswith("10.244.1.") else "node2") for ip in ips],
        ports=[("http", 8080, protocol)],
    )


def web(**more: Any) -> Any:
    protocol = more.pop("protocol", "TCP")
    return exposed("web", ip="10.96.0.80", ports=[("http", 80, protocol)], **more)


def rules_of(*objects: Any, settings: IpvsSettings = IpvsSettings()) -> IpvsRules:  # noqa: B008
    return compile_ipvs(table_of(*objects), OPTIONS, settings, HOST)


def servers(rules: IpvsRules) -> dict[str, list[str]]:
    return {str(at): [str(real) for real in one.reals] for at, one in rules.servers.items()}


def members(rules: IpvsRules, *but: str) -> dict[str, list[str]]:
    """Set -> members, without the empty ones."""
    return {name: sorted(found) for name, found in rules.members.items() if found}


def test_each_frontend_is_a_virtual_server() -> None:
    rules = rules_of(
        web(node_port=30080, vips=["192.0.2.60"], externalIPs=["192.0.2.99"]), ends(HERE, THERE)
    )
    both = [f"{HERE}:8080", f"{THERE}:8080"]
    assert servers(rules) == dict.fromkeys(
        ["10.96.0.80:80/tcp", "192.0.2.99:80/tcp", "192.0.2.60:80/tcp", "192.168.77.1:30080/tcp"],
        both,
    )
    assert sorted(rules.addresses) == ["10.96.0.80", "192.0.2.60", "192.0.2.99"]
    assert members(rules) == {
        "KUBE-CLUSTER-IP": ["10.96.0.80,tcp:80"],
        "KUBE-LOOP-BACK": [f"{HERE},tcp:8080,{HERE}"],
        "KUBE-EXTERNAL-IP": ["192.0.2.99,tcp:80"],
        "KUBE-LOAD-BALANCER": ["192.0.2.60,tcp:80"],
        "KUBE-NODE-PORT-TCP": ["30080"],
        "KUBE-IPVS-IPS": ["10.96.0.80", "192.0.2.60", "192.0.2.99"],
    }


@pytest.mark.parametrize(
    ("here", "reals", "unserved"),
    [
        ([HERE, THERE], [f"{HERE}:8080"], []),
        ([THERE], [f"{THERE}:8080"], ["192.0.2.60,tcp:80", "192.168.77.1,tcp:30080"]),
        ([], [], []),
    ],
    ids=["one here", "none here", "none at all"],
)
def test_external_policy_local(here: list[str], reals: list[str], unserved: list[str]) -> None:
    rules = rules_of(
        web(node_port=30080, vips=["192.0.2.60"], externalTrafficPolicy="Local"), ends(*here)
    )
    assert servers(rules)["192.0.2.60:80/tcp"] == reals
    assert servers(rules)["192.168.77.1:30080/tcp"] == reals
    assert servers(rules)["10.96.0.80:80/tcp"] == [f"{ip}:8080" for ip in here]
    found = members(rules)
    assert found.get("KUBE-NO-LOCAL-ENDPOINTS", []) == unserved
    assert found["KUBE-LOAD-BALANCER-LOCAL"] == ["192.0.2.60,tcp:80"]
    assert found["KUBE-NODE-PORT-LOCAL-TCP"] == found["KUBE-NODE-PORT-TCP"] == ["30080"]


def test_internal_policy_local_keeps_to_this_node() -> None:
    rules = rules_of(web(internalTrafficPolicy="Local"), ends(HERE, THERE))
    assert servers(rules) == {"10.96.0.80:80/tcp": [f"{HERE}:8080"]}
    rules = rules_of(web(internalTrafficPolicy="Local"), ends(THERE))
    assert servers(rules) == {"10.96.0.80:80/tcp": []}


def test_source_ranges() -> None:
    rules = rules_of(
        web(vips=["192.0.2.60"], loadBalancerSourceRanges=["203.0.113.0/24", "198.51.100.7/32"]),
        ends(HERE),
    )
    assert members(rules)["KUBE-LOAD-BALANCER-FW"] == ["192.0.2.60,tcp:80"]
    assert members(rules)["KUBE-LOAD-BALANCER-SOURCE-CIDR"] == [
        "192.0.2.60,tcp:80,198.51.100.7",  # as ipset prints one address
        "192.0.2.60,tcp:80,203.0.113.0/24",
    ]


@pytest.mark.parametrize(
    ("protocol", "name", "text"),
    [
        ("TCP", "KUBE-NODE-PORT-TCP", "30080"),
        ("UDP", "KUBE-NODE-PORT-UDP", "30080"),
        ("SCTP", "KUBE-NODE-PORT-SCTP-HASH", "192.168.77.1,sctp:30080"),
    ],
)
def test_node_ports_of_each_protocol(protocol: str, name: str, text: str) -> None:
    rules = rules_of(web(node_port=30080, protocol=protocol), ends(HERE, protocol=protocol))
    assert members(rules)[name] == [text]


def test_what_the_node_has_already_is_not_bound() -> None:
    rules = rules_of(web(externalIPs=["192.168.77.1"]), ends(HERE))
    assert "192.168.77.1:80/tcp" in servers(rules)
    assert list(rules.addresses) == ["10.96.0.80"]
    assert members(rules)["KUBE-IPVS-IPS"] == ["10.96.0.80"]


def test_affinity_and_schedulers() -> None:
    affine = rules_of(web(sessionAffinity="ClientIP"), ends(HERE))
    (one,) = affine.servers.values()
    assert (one.persistence, one.flags) == (10800, 1)
    (one,) = rules_of(web(), ends(HERE), settings=IpvsSettings("mh")).servers.values()
    assert (one.scheduler, one.flags) == ("mh", 0x10)  # the client's port is hashed too


def test_of_two_claims_the_one_with_endpoints_wins_and_the_other_takes_over() -> None:
    first = exposed("a", ip="10.96.0.1", externalIPs=["192.0.2.1"], ports=[("http", 80, "TCP")])
    second = exposed("b", ip="10.96.0.2", externalIPs=["192.0.2.1"], ports=[("http", 80, "TCP")])
    place = "192.0.2.1:80/tcp"
    behind_a, behind_b = ends(HERE, owner="a"), ends(THERE, owner="b")
    assert servers(rules_of(first, second, behind_b))[place] == [f"{THERE}:8080"]
    both = table_of(first, second, behind_a, behind_b)
    rules = compile_ipvs(both, OPTIONS, host=HOST)
    assert servers(rules)[place] == [f"{HERE}:8080"]
    rules.update(table_of(second, behind_b), [("default", "a")])
    assert servers(rules)[place] == [f"{THERE}:8080"]
    assert rules.addresses["192.0.2.1"] == 1


TABLES = [
    table_of(),
    table_of(web(), ends(HERE)),
    table_of(web(node_port=30080), ends(HERE, THERE)),
    table_of(web(vips=["192.0.2.60"], externalTrafficPolicy="Local"), ends(THERE)),
    table_of(
        web(externalIPs=["192.0.2.60"]),
        ends(HERE),
        exposed("b", ip="10.96.0.2", externalIPs=["192.0.2.60"], ports=[("http", 80, "TCP")]),
    ),
]


@given(st.lists(st.sampled_from(range(len(TABLES))), max_size=8))
def test_changes_lead_where_a_fresh_start_leads(steps: list[int]) -> None:
    rules = compile_ipvs(TABLES[0], OPTIONS, host=HOST)
    last: ForwardingTable = TABLES[0]
    for step in steps:
        rules.touched.clear()
        before = dict(rules.servers), dict(rules.addresses)
        changed = TABLES[step].services.keys() | last.services.keys()
        last = TABLES[step]
        rules.update(last, changed)
        fresh = compile_ipvs(last, OPTIONS, host=HOST)
        assert rules.servers == fresh.servers
        assert rules.addresses == fresh.addresses
        assert rules.members == fresh.members
        # Whoever looks only at what was touched misses nothing.
        assert {a for a in before[0].keys() | rules.servers.keys()
                if before[0].get(a) != rules.servers.get(a)} <= rules.touched.servers  # fmt: skip
        assert before[1].keys() ^ rules.addresses.keys() <= rules.touched.addresses


# --- sets -------------------------------------------------------------------------------------


def test_names_of_sets_fit_and_differ_by_family() -> None:
    names = [set_name(name, family) for name in SETS for family in (4, 6)]
    assert len(set(names)) == len(names)
    assert max(map(len, names)) <= MAX_NAME
    assert set_name("KUBE-CLUSTER-IP", 6) == "KUBE-6-CLUSTER-IP"


@pytest.mark.parametrize(
    ("members", "room"), [(0, 65536), (65536, 65536), (65537, 131072), (300_000, 524288)]
)
def test_a_set_has_room_for_its_members(members: int, room: int) -> None:
    assert room_for(members) == room


def applied(text: list[str], held: dict[str, HeldSet]) -> dict[str, HeldSet]:
    """Do what ipset does with lines of `ipset restore -exist`."""
    sets = {name: HeldSet(one.kind, one.room, set(one.members)) for name, one in held.items()}
    for line in text:
        verb, name, *rest = line.split()
        match verb:
            case "create":
                room = int(rest[rest.index("maxelem") + 1]) if "maxelem" in rest else 0
                sets.setdefault(name, HeldSet(rest[0], room))
            case "add":
                one = sets[name]
                one.members.add(rest[0])
                assert not one.room or len(one.members) <= one.room, "Hash is full"
            case "del":
                sets[name].members.discard(rest[0])
            case "swap":
                sets[name], sets[rest[0]] = sets[rest[0]], sets[name]
            case "destroy":
                del sets[name]
    return sets


SOME = {"KUBE-CLUSTER-IP": ["10.96.0.1,tcp:80", "10.96.0.2,tcp:80"]}


@pytest.mark.parametrize(
    ("held", "told"),
    [
        ({}, 0),
        ({"KUBE-CLUSTER-IP": HeldSet("hash:ip,port", 65536, {"10.96.0.9,tcp:1"})}, 0),
        ({"KUBE-CLUSTER-IP": HeldSet("hash:ip,port", 2, {"1.2.3.4,tcp:1", "1.2.3.5,tcp:1"})}, 1),
        ({"KUBE-CLUSTER-IP": HeldSet("hash:ip", 65536, {"10.96.0.1"})}, 1),
        ({"KUBE-SPARE": HeldSet("hash:ip", 65536)}, 0),
    ],
    ids=["none", "a strange member", "full", "of another type", "stopped halfway"],
)
def test_sets_become_what_is_wanted(held: dict[str, HeldSet], told: int) -> None:
    plan = plan_sets(SOME, held, 4)
    assert len(plan.notes) == told
    found = applied([*plan.before, *plan.after], held)
    assert {name: one.members for name, one in found.items()} == {
        name: set(SOME.get(name, ())) for name in SETS
    }
    assert {name: one.kind for name, one in found.items()} == SETS
    again = plan_sets(SOME, found, 4)
    assert not (again.before or again.after or again.notes)


def test_a_set_is_known_to_hold_what_it_was_made_for() -> None:
    """So a change that fits needs no look at the sets; a bitmap holds every port."""
    many = {"KUBE-CLUSTER-IP": [f"10.96.{n >> 8}.{n & 255},tcp:80" for n in range(70_000)]}
    small = HeldSet("hash:ip,port", 4, {"10.96.0.1,tcp:80"})
    for held, room in (({}, 65536), ({"KUBE-CLUSTER-IP": small}, 4)):
        assert plan_sets(SOME, held, 4).room == {
            name: room if name == "KUBE-CLUSTER-IP" else 65536 for name in SETS
        }
        assert plan_sets(many, held, 4).room["KUBE-CLUSTER-IP"] == 131072


def test_what_ipset_prints_is_read() -> None:
    text = (
        b"create KUBE-6-CLUSTER-IP hash:ip,port family inet6 hashsize 1024 maxelem 65536"
        b" bucketsize 12 initval 0x8a3d3ad7\n"
        b"create THEIRS hash:ip family inet hashsize 1024 maxelem 65536\n"
        b"create KUBE-6-NODE-PORT-TCP bitmap:port range 0-65535\n"
        b"add KUBE-6-CLUSTER-IP ::1.2.3.4,tcp:80\nadd THEIRS 1.2.3.4\n"
        b"add KUBE-6-NODE-PORT-TCP 30080\n"
    )
    assert parse_sets(text.splitlines(True), 6) == {
        "KUBE-6-CLUSTER-IP": HeldSet("hash:ip,port", 65536, {"::102:304,tcp:80"}),
        "KUBE-6-NODE-PORT-TCP": HeldSet("bitmap:port", 0, {"30080"}),
    }
    assert parse_sets(text.splitlines(True), 4) == {}


# --- what the kernel says ---------------------------------------------------------------------

PROC = """\
IP Virtual Server version 1.2.1 (size=4096)
Prot LocalAddress:Port Scheduler Flags
  -> RemoteAddress:Port Forward Weight ActiveConn InActConn
TCP  0A600050:0050 rr persistent 2700000 FFFFFFFF
  -> 0AF4020A:1F90      Masq    1      2          1
  -> 0AF4010A:1F90      Masq    0      0          0
FWM  00000001 wlc
  -> 0AF4020A:0000      Route   1      0          0
UDP  [fd00:0010:0096:0000:0000:0000:0000:0080]:0035 mh ops
  -> [fd00:0010:0244:0001:0000:0000:0000:000a]:14E9 Masq 1 0 0
"""


def test_virtual_servers_are_read() -> None:
    found = {
        str(at): (one.scheduler, one.persistence, {str(r): (*s,) for r, s in one.reals.items()})
        for at, one in parse_table(PROC, 250).items()
    }
    assert found == {
        "10.96.0.80:80/tcp": (
            "rr", 10800, {"10.244.2.10:8080": (1, 3), "10.244.1.10:8080": (0, 0)},
        ),
        "[fd00:10:96::80]:53/udp": ("mh", 0, {"[fd00:10:244:1::a]:5353": (1, 0)}),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ("Masq    1      2          1", "Masq    1      0          77", True),
        ("Masq 1 0 0", "Masq 1 3 9", True),
        ("Masq    1      2          1", "Masq    0      2          1", False),
        ("0AF4020A:1F90", "0AF4020B:1F90", False),
        ("rr persistent 2700000 FFFFFFFF", "rr persistent 2700001 FFFFFFFF", False),
        ("mh ops", "mh persistent 2500 128", False),
    ],
    ids=["connections", "of IPv6", "a weight", "an address", "persistence", "of IPv6"],
)
def test_that_connections_come_and_go_is_no_change(before: str, after: str, same: bool) -> None:
    assert before in PROC
    one, other = (text.encode() for text in (PROC, PROC.replace(before, after)))
    assert (without_counters(one) == without_counters(other)) == same


@given(st.ip_addresses(v=6))
def test_addresses_are_written_one_way(address: Any) -> None:
    assert canonical(address.packed) == str(address)


@pytest.mark.parametrize("low", [0, 1, 0x102, 0x10000, 0x1020304, 0xFFFF0000])
def test_addresses_that_glibc_writes_otherwise(low: int) -> None:
    for high in (0, 0xFFFF << 32):
        address = ipaddress.IPv6Address(high | low)
        assert canonical(address.packed) == str(address)


# --- constant rules ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize(
    "detector",
    [None, Detector("interface", "cni0"), Detector("prefix", "veth"), "cidr"],
    ids=str,
)
def test_rules_of_each_family_are_the_same_whatever_services_there_are(
    family: Family, detector: Detector | str | None
) -> None:
    cidr = "10.244.0.0/16" if family == 4 else "fd00:10:244::/56"
    one = Detector("cidr", cidr) if detector == "cidr" else detector
    assert not isinstance(one, str)
    chains = constant_chains(Options(family, detector=one))
    rules = [rule for table in chains.values() for lines in table.values() for rule in lines]
    named = {word for rule in rules for word in rule.split() if word.startswith("KUBE-")}
    sets = {set_name(name, family) for name in SETS}
    defined = {chain for table in chains.values() for chain in table}
    assert named <= sets | defined
    # Every set is looked into by some rule.
    assert sets <= named
    for rule in rules:
        assert ("10.244" in rule) <= (family == 4)
    assert chains["nat"]["KUBE-SERVICES"][0].startswith("-s 127.0.0.0/8") == (family == 4)


def test_the_rules_are_text_that_iptables_restore_takes() -> None:
    text = render_rules(table_of(web(node_port=30080), ends(HERE)), OPTIONS)
    rules = text.partition("iptables-restore --noflush\n")[2]
    parsed = parse_rules(rules, strict=False)
    assert set(parsed.tables) == {"filter", "nat"}
    assert all("set" in problem.text for problem in parsed.problems)


# --- printing ---------------------------------------------------------------------------------


def test_what_kdns_rules_prints() -> None:
    service = web(node_port=30080, sessionAffinity="ClientIP")
    text = render_rules(table_of(service, ends(HERE, THERE)), OPTIONS, "wrr", host=HOST)
    lines = text.splitlines()
    at = lines.index("-A -t 10.96.0.80:80 -s wrr -p 10800")
    assert lines[at + 1 : at + 3] == [
        f"-a -t 10.96.0.80:80 -r {HERE}:8080 -m -w 1",
        f"-a -t 10.96.0.80:80 -r {THERE}:8080 -m -w 1",
    ]
    assert "-A -t 192.168.77.1:30080 -s wrr -p 10800" in lines
    created = create_line("KUBE-CLUSTER-IP", "hash:ip,port", 4).strip()
    assert created in lines
    assert "add KUBE-CLUSTER-IP 10.96.0.80,tcp:80" in lines
    assert "default/web:http" not in text


def test_explained_it_names_services_and_purposes() -> None:
    text = render_rules(table_of(web(), ends(HERE)), OPTIONS, explain=True)
    assert "# default/web:http: 1 endpoint, chosen by rr\n-A -t 10.96.0.80:80 -s rr\n" in text
    assert "# ClusterIPs: masqueraded unless a Pod of this node asks\ncreate KUBE-CLUSTER" in text


def test_a_node_whose_addresses_are_not_known_is_said_so() -> None:
    text = render_rules(table_of(web(node_port=30080), ends(HERE)), OPTIONS)
    assert "# 0.0.0.0 stands for each address of the node" in text
    known = Options(node_port_addresses=("192.0.2.7",))
    text = render_rules(table_of(web(node_port=30080), ends(HERE)), known)
    assert "-A -t 192.0.2.7:30080 -s rr\n" in text
    assert "stands for" not in text


def test_equal_tables_give_equal_text() -> None:
    objects = [exposed(f"s{i}", ip=f"10.96.1.{i}", node_port=30000 + i) for i in range(9)]
    shuffled = random.Random(5).sample(objects, len(objects))
    assert render_rules(table_of(*objects), OPTIONS) == render_rules(table_of(*shuffled), OPTIONS)


# --- small decisions --------------------------------------------------------------------------


def test_which_addresses_have_node_ports() -> None:
    found = ["127.0.0.1", "192.168.77.1", "10.0.0.1"]
    assert host_view(found, Options()).node_ports == ("10.0.0.1", "192.168.77.1")
    some = Options(node_port_addresses=("10.0.0.1", "127.0.0.1"))
    assert host_view(found, some).node_ports == ("10.0.0.1",)
    assert host_view(["fe80::1", "::1", "fd00::1"], Options(6)).node_ports == ("fd00::1",)


def test_excluded_addresses() -> None:
    assert is_excluded("192.0.2.1", ["10.0.0.0/8", "192.0.2.0/24"])
    assert not is_excluded("192.0.3.1", ["192.0.2.0/24"])
    assert not is_excluded("192.0.2.1", ["fd00::/8"])


@pytest.mark.parametrize(
    ("release", "slow"),
    [("4.0.9", False), ("4.1.0", True), ("5.8.18-generic", True), ("5.9.0", False), ("6.1", False)],
)
def test_reuse_of_ports_is_changed_where_the_kernel_is_slow_with_it(
    release: str, slow: bool
) -> None:
    names = dict(settings_wanted(False, release))
    assert ("vs/conn_reuse_mode" in names) == slow
    assert names["vs/conntrack"] == 1
    assert "conf/all/arp_ignore" not in names
    assert dict(settings_wanted(True, release))["conf/all/arp_announce"] == 2


def test_flags_and_places() -> None:
    assert str(At("udp", "fd00::1", 53)) == "[fd00::1]:53/udp"
    assert str(Real("10.0.0.1", 80)) == "10.0.0.1:80"
    assert Virtual("rr", 0, ()).flags == 0
