"""The spelling equals the decision: packets walked through the iptables or nftables text of a
table must fare exactly as table.decide() says: same endpoints with equal chances, masqueraded or
not, refused or dropped. And reference 1.7's 30 flows in 4 configurations, written down by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from forwarding import (
    CLUSTER_CIDRS,
    NODE1,
    cluster_objects,
    endpoint,
    exposed,
    slice_of,
    table_of,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdns.proxy import iptables, nftables
from kdns.proxy.options import Detector, Family, NodeView, Options
from kdns.proxy.packet import Host, Outcome, Packet, parse_rules, walk
from kdns.proxy.packet_nftables import parse_nftables, walk_nftables
from kdns.proxy.table import Forwarding, ForwardingTable, Frontend, Origin, decide
from kdns.registry.objects import Object

NODES: Mapping[Family, NodeView] = {4: NODE1, 6: replace(NODE1, address="fd00:77::1")}
SECOND: Mapping[Family, str] = {4: "172.18.0.9", 6: "fd00:18::9"}  # another of the node's
LOCALHOST: Mapping[Family, str] = {4: "127.0.0.1", 6: "::1"}
# Clients by origin. Of the Pods one is an endpoint on this node, one nobody's.
PODS: Mapping[Family, tuple[str, ...]] = {
    4: ("10.244.1.1", "10.244.1.200"),
    6: ("fd00:10:244::1:1", "fd00:10:244::1:200"),
}
OUTSIDE: Mapping[Family, tuple[str, ...]] = {
    4: ("203.0.113.9", "8.8.8.8"),
    6: ("2001:db8::9", "2001:db8:1::8"),
}
RANGES: Mapping[Family, tuple[str, ...]] = {
    4: ("203.0.113.0/24", "192.168.77.1/32", "10.244.1.0/25", "192.168.0.0/16"),
    6: ("2001:db8::/64", "fd00:77::1/128", "fd00:10:244::1:0/120", "fd00:77::/64"),
}
DETECTORS: Mapping[str, str] = {"interface": "cni0", "prefix": "cni"}

# (verdict, where to, masqueraded) -> chance
Fate = dict[tuple[str, str, bool], Fraction]


@dataclass(frozen=True)
class Mode:
    """One way to spell a table, and in what it differs for clients (reference 2.2).

    spell        -- table and options -> how a packet fares: walk() with its rules
    refuses_node -- the node itself is refused where an address that it does not have has no
                    endpoints
    ranges_first -- source ranges are asked before it is known whether there are endpoints
    on_localhost -- node ports may answer on 127.0.0.1
    hairpins_here -- only endpoints here may be their own clients
    unknown_port -- what becomes of a packet to a ClusterIP, but to none of its ports
    last_second  -- of affinity, is still part of it
    """

    spell: Callable[[ForwardingTable, Options], Callable[..., tuple[Outcome, ...]]]
    refuses_node: bool = False
    ranges_first: bool = False
    on_localhost: bool = True
    hairpins_here: bool = False
    unknown_port: str = "untouched"
    last_second: bool = True


def in_iptables(table: ForwardingTable, options: Options) -> Callable[..., tuple[Outcome, ...]]:
    return partial(walk, parse_rules(iptables.render_rules(table, options)))


def in_nftables(table: ForwardingTable, options: Options) -> Callable[..., tuple[Outcome, ...]]:
    return partial(walk_nftables, parse_nftables(nftables.render_rules(table, options)))


MODES: Mapping[str, Mode] = {
    "iptables": Mode(in_iptables),
    "nftables": Mode(
        in_nftables,
        refuses_node=True,
        ranges_first=True,
        on_localhost=False,
        hairpins_here=True,
        unknown_port="reject",
        last_second=False,
    ),
}


@dataclass(frozen=True)
class Case:
    """One table with its text."""

    mode: Mode
    table: ForwardingTable
    options: Options
    host: Host
    rules: Callable[..., tuple[Outcome, ...]]

    def walk(self, packet: Packet, host: Host | None = None, **more: Any) -> tuple[Outcome, ...]:
        return self.rules(packet, host or self.host, **more)


def own_addresses(family: Family) -> tuple[str, str]:
    return NODES[family].address, SECOND[family]


def case(mode: str, table: ForwardingTable, options: Options) -> Case:
    host = Host(own_addresses(table.family))
    how = MODES[mode]
    return Case(how, table, options, host, how.spell(table, options))


def packets(
    mode: Mode, options: Options, frontend: Frontend, protocol: Any
) -> Iterator[tuple[Origin, Packet]]:
    """Yield who may send to a frontend."""
    family = options.family
    node, loopback = NODES[family].address, LOCALHOST[family]
    serving = options.node_port_addresses
    for address in (frontend.address,) if frontend.address else own_addresses(family):
        if not frontend.address and serving is not None and address not in serving:
            continue
        for origin, sources, interface in (
            ("pod", PODS[family], "cni0"),
            ("node", (node,), ""),
            ("outside", OUTSIDE[family], "eth0"),
        ):
            for source in sources:
                yield (
                    origin,  # type: ignore[misc]
                    Packet(source, address, frontend.port, protocol, interface=interface),
                )
    on_localhost = family == 4 and options.localhost_node_ports and mode.on_localhost
    if not frontend.address and on_localhost and (serving is None or loopback in serving):
        yield "node", Packet(loopback, loopback, frontend.port, protocol)


def decided(
    mode: Mode,
    one: Forwarding,
    frontend: Frontend,
    origin: Origin,
    packet: Packet,
    options: Options,
) -> Fate:
    """What decide() says, with source ranges and hairpin, which it leaves to who asks."""
    if (
        frontend.kind == "loadbalancer IP"
        and one.source_ranges
        and (one.has_endpoints or mode.ranges_first)
    ):
        source = ip_address(packet.source)
        if not any(source in ip_network(cidr) for cidr in one.source_ranges):
            return {("drop", "", False): Fraction(1)}
    decision = decide(
        one,
        frontend.kind,
        origin,
        masquerade_all=options.masquerade_all,
        detects=options.detector is not None,
    )
    elsewhere = bool(frontend.address) and frontend.address not in own_addresses(options.family)
    refused = (origin, decision.verdict) == ("node", "reject") and not mode.refuses_node
    if refused and frontend.kind != "cluster IP":
        # kube-proxy (reference 1.3) has no jump from OUTPUT to KUBE-EXTERNAL-SERVICES: what
        # the node itself sends to an address that is not its own is not refused but leaves.
        decision = replace(decision, verdict="untouched" if elsewhere else "reject")  # type: ignore[arg-type]
    if decision.verdict != "forward":
        return {(decision.verdict, "", False): Fraction(1)}
    share = Fraction(1, len(decision.endpoints))
    found: Fate = {}
    for e in decision.endpoints:
        itself = packet.source == e.ip and (e.local or not mode.hairpins_here)
        found["forward", str(e), decision.masquerade or itself] = share
    return found


VERDICTS = {"dropped": "drop", "rejected": "reject"}


def fate(outcomes: tuple[Outcome, ...], mark: int = 0x4000) -> Fate:
    """What the walker found, in the same form.

    A packet that came in and stays on the node passes no POSTROUTING. It keeps its source,
    with no harm done, but its mark shows that it was to be masqueraded had it left.
    """
    found: Fate = {}
    for one in outcomes:
        verdict = VERDICTS.get(one.verdict, "forward" if one.dnat else "untouched")
        place = ""
        if verdict == "forward":
            at = f"[{one.destination}]" if ":" in one.destination else one.destination
            place = f"{at}:{one.port}"
        wanted = one.masqueraded or (one.verdict == "delivered" and bool(one.mark & mark))
        key = verdict, place, wanted
        found[key] = found.get(key, Fraction(0)) + one.probability
    return found


def check(one: Case) -> int:
    """Hold every flow to every frontend against the decision; return how many there were."""
    flows = 0
    for forwarding in one.table:
        for frontend in forwarding.frontends:
            for origin, packet in packets(one.mode, one.options, frontend, forwarding.protocol):
                found = one.walk(packet)
                expected = decided(one.mode, forwarding, frontend, origin, packet, one.options)
                assert fate(found, one.options.mark) == expected, (
                    forwarding.name,
                    frontend,
                    origin,
                    packet,
                )
                check_answer(found, one.table.family)
                # Unmarked again, lest a second pass masquerades it twice.
                assert not any(o.masqueraded and o.mark & one.options.mark for o in found)
                if forwarding.affinity:
                    check_affinity(one, packet, found, forwarding.affinity)
                flows += 1
    return flows


def check_answer(found: tuple[Outcome, ...], family: Family) -> None:
    answers = {one.answer for one in found if one.verdict == "rejected"}
    assert answers <= {"icmp-port-unreachable" if family == 4 else "icmp6-port-unreachable"}


def check_affinity(one: Case, packet: Packet, found: tuple[Outcome, ...], seconds: int) -> None:
    """The client comes back to its endpoint until the time is over."""
    for first in found:
        if not first.dnat:
            continue
        for age in (0.0, seconds - (0.0 if one.mode.last_second else 0.5)):
            again = one.walk(packet, recent=dict.fromkeys(first.recent, age))
            assert {o.destination for o in again} == {first.destination}
            assert {o.port for o in again} == {first.port}
        end = seconds + (0.5 if one.mode.last_second else 0.0)
        over = one.walk(packet, recent=dict.fromkeys(first.recent, end))
        mark = one.options.mark
        assert fate(over, mark) == fate(found, mark)


def options_of(family: Family, detector: str = "cidr", **more: Any) -> Options:
    value = CLUSTER_CIDRS[family] if detector == "cidr" else DETECTORS.get(detector, "")
    known = Detector(detector, value) if value else None  # type: ignore[arg-type]
    return Options(family=family, detector=known, **more)


# --- The 30 flows of reference 1.7 -------------------------------------------------------------

POD, NODE, STRANGER = "10.244.1.200", "192.168.77.1", "203.0.113.9"
LOCAL, REMOTE = "10.244.1.1:8080", "10.244.2.1:8080"
ALL = (LOCAL, REMOTE)
# source, frontend -> (endpoints, masqueraded) for policies Cluster, eTP=Local, iTP=Local
FLOWS: Mapping[tuple[str, str], tuple[tuple[tuple[str, ...], bool], ...]] = {
    (POD, "ip"): ((ALL, False), (ALL, False), ((LOCAL,), False)),
    (POD, "port"): ((ALL, True), (ALL, False), (ALL, True)),
    (POD, "vip"): ((ALL, True), (ALL, False), (ALL, True)),
    (NODE, "ip"): ((ALL, True), (ALL, True), ((LOCAL,), True)),
    (NODE, "port"): ((ALL, True), (ALL, True), (ALL, True)),
    (NODE, "vip"): ((ALL, True), (ALL, True), (ALL, True)),
    ("127.0.0.1", "port"): ((ALL, True), (ALL, True), (ALL, True)),
    (STRANGER, "ip"): ((ALL, True), (ALL, True), ((LOCAL,), True)),
    (STRANGER, "port"): ((ALL, True), ((LOCAL,), False), (ALL, True)),
    (STRANGER, "vip"): ((ALL, True), ((LOCAL,), False), (ALL, True)),
}
CONFIGURATIONS = {
    "detector": options_of(4),
    "no detector": options_of(4, ""),
    "masqueradeAll": options_of(4, masquerade_all=True),
    "no detector, masqueradeAll": options_of(4, "", masquerade_all=True),
}
POLICIES: tuple[dict[str, Any], ...] = (
    {},
    {"externalTrafficPolicy": "Local"},
    {"internalTrafficPolicy": "Local"},
)


def by_hand(
    configuration: str, source: str, frontend: str, policy: int
) -> tuple[tuple[str, ...], bool]:
    """Reference 1.7, with what it says of the other configurations."""
    endpoints, masqueraded = FLOWS[source, frontend][policy]
    if frontend == "ip":
        if "no detector" in configuration:
            masqueraded = False
        if "masqueradeAll" in configuration:
            masqueraded = True
    elif "no detector" in configuration and source == POD and policy == 1:
        endpoints = (LOCAL,)
    return endpoints, masqueraded


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize(
    ("source", "frontend", "policy"),
    [(*flow, policy) for flow in FLOWS for policy in range(len(POLICIES))],
)
def test_thirty_flows(
    mode: str, configuration: str, source: str, frontend: str, policy: int
) -> None:
    service = exposed(node_port=30080, vips=["192.0.2.1"], **POLICIES[policy])
    endpoints = slice_of(
        "web",
        endpoint("10.244.1.1", nodeName="node1"),
        endpoint("10.244.2.1", nodeName="node2"),
        ports=(("http", 8080, "TCP"),),
    )
    one = case(mode, table_of(service, endpoints), CONFIGURATIONS[configuration])
    destination, port = {
        "ip": ("10.96.0.50", 80),
        "vip": ("192.0.2.1", 80),
        "port": ("127.0.0.1" if source == "127.0.0.1" else NODE, 30080),
    }[frontend]
    interface = {POD: "cni0", STRANGER: "eth0"}.get(source, "")
    packet = Packet(source, destination, port, interface=interface)
    places, masqueraded = by_hand(configuration, source, frontend, policy)
    if source == "127.0.0.1" and not one.mode.on_localhost:
        assert fate(one.walk(packet)) == {("untouched", "", False): 1}
        return
    share = Fraction(1, len(places))
    assert fate(one.walk(packet)) == {("forward", place, masqueraded): share for place in places}


# --- By hand -----------------------------------------------------------------------------------

HERE = endpoint("10.244.1.1", nodeName="node1")
THERE = endpoint("10.244.2.1", nodeName="node2")
LEAVING = {"ready": False, "serving": True, "terminating": True}
UNREADY = {"ready": False, "serving": False}
EVERY_WAY: dict[str, Any] = {
    "node_port": 30080,
    "vips": ["192.0.2.1", "192.0.2.2"],
    "externalIPs": ["198.51.100.1"],
}

TABLES: Mapping[str, tuple[Object, ...]] = {
    "nothing": (),
    "no endpoints": (exposed(**EVERY_WAY),),
    "nobody ready": (exposed(**EVERY_WAY), slice_of("web", {**HERE, "conditions": UNREADY})),
    "all leaving": (exposed(**EVERY_WAY), slice_of("web", {**THERE, "conditions": LEAVING})),
    "the node is the endpoint": (
        exposed(**EVERY_WAY),
        slice_of("web", endpoint("192.168.77.1", nodeName="node1"), HERE),
    ),
    "external IP of the node": (
        exposed(externalIPs=["192.168.77.1"]),
        slice_of("web", HERE, THERE),
    ),
    "eTP Local, here and there": (
        exposed(**EVERY_WAY, externalTrafficPolicy="Local", healthCheckNodePort=32000),
        slice_of("web", HERE, THERE),
    ),
    "eTP Local, there": (
        exposed(**EVERY_WAY, externalTrafficPolicy="Local"),
        slice_of("web", THERE),
    ),
    "iTP Local, there": (
        exposed(**EVERY_WAY, internalTrafficPolicy="Local"),
        slice_of("web", THERE),
    ),
    "both Local": (
        exposed(**EVERY_WAY, internalTrafficPolicy="Local", externalTrafficPolicy="Local"),
        slice_of("web", HERE, THERE),
    ),
    "both Local, nothing here": (
        exposed(**EVERY_WAY, internalTrafficPolicy="Local", externalTrafficPolicy="Local"),
        slice_of("web", THERE),
    ),
    "iTP Local without frontends": (
        exposed(internalTrafficPolicy="Local"),
        slice_of("web", HERE, THERE),
    ),
    "source ranges": (
        exposed(**EVERY_WAY, loadBalancerSourceRanges=["203.0.113.0/24", "192.168.77.1/32"]),
        slice_of("web", HERE, THERE),
    ),
    "source ranges, no endpoints": (
        exposed(**EVERY_WAY, loadBalancerSourceRanges=["203.0.113.0/24"]),
    ),
    "source ranges, eTP Local": (
        exposed(
            **EVERY_WAY,
            loadBalancerSourceRanges=["8.0.0.0/8"],
            externalTrafficPolicy="Local",
        ),
        slice_of("web", THERE),
    ),
    "affinity": (
        exposed(**EVERY_WAY, sessionAffinity="ClientIP", externalTrafficPolicy="Local"),
        slice_of("web", HERE, THERE, endpoint("10.244.1.2", nodeName="node1")),
    ),
    "three protocols on a port": (
        exposed(ports=[("t", 53, "TCP"), ("u", 53, "UDP"), ("s", 53, "SCTP")], node_port=30053),
        slice_of("web", HERE, ports=(("t", 5353, "TCP"), ("u", 5354, "UDP"))),
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("detector", ["cidr", "interface", "prefix", ""])
@pytest.mark.parametrize("name", TABLES)
def test_known_tables_are_spelt_as_decided(name: str, detector: str, mode: str) -> None:
    table = table_of(*TABLES[name])
    flows = check(case(mode, table, options_of(4, detector)))
    assert flows or name == "nothing"


@pytest.mark.parametrize("mode", MODES)
def test_more_than_a_thousand_endpoints_are_spelt_as_decided(mode: str) -> None:
    """kube-proxy's "large cluster": fewer comments, the same rules."""
    members = [endpoint(f"10.244.{n // 250}.{n % 250 + 1}", nodeName="node2") for n in range(1001)]
    table = table_of(exposed(), slice_of("web", *members))
    assert check(case(mode, table, options_of(4))) == 5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("masquerade_all", [False, True])
@pytest.mark.parametrize("detector", ["cidr", ""])
def test_the_recorded_cluster_is_spelt_as_decided(
    family: Family, masquerade_all: bool, detector: str, mode: str
) -> None:
    table = table_of(*cluster_objects(), family=family, node=NODES[family])
    options = options_of(family, detector, masquerade_all=masquerade_all)
    assert check(case(mode, table, options)) >= (100 if family == 4 else 5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("serving", [("192.168.77.1",), ("172.18.0.9", "127.0.0.1"), ()])
@pytest.mark.parametrize("localhost", [True, False])
def test_node_ports_are_served_on_the_addresses_named_only(
    serving: tuple[str, ...], localhost: bool, mode: str
) -> None:
    table = table_of(exposed(node_port=30080), slice_of("web", HERE))
    options = options_of(4, node_port_addresses=serving, localhost_node_ports=localhost)
    one = case(mode, table, options)
    check(one)
    localhost = localhost and one.mode.on_localhost
    for address in ("192.168.77.1", "172.18.0.9", "127.0.0.1"):
        (found,) = one.walk(Packet(address, address, 30080))
        served = address in serving and (localhost or address != "127.0.0.1")
        assert found.dnat == served


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("family", "localhost"), [(4, False), (6, True), (6, False)])
def test_localhost_has_no_node_ports_where_that_is_off(
    family: Family, localhost: bool, mode: str
) -> None:
    pod, node = PODS[family][0], "IPv6" if family == 6 else "IPv4"
    service = exposed(node_port=30080, ip="10.96.0.50" if family == 4 else "fd00:10:96::50")
    table = table_of(
        service,
        slice_of("web", endpoint(pod, nodeName="node1"), family=node),
        family=family,
        node=NODES[family],
    )
    one = case(mode, table, options_of(family, localhost_node_ports=localhost))
    (found,) = one.walk(Packet(LOCALHOST[family], LOCALHOST[family], 30080))
    assert (found.verdict, found.dnat) == ("delivered", False)
    check(one)


@pytest.mark.parametrize("mode", MODES)
def test_the_load_balancers_own_address_may_use_it_where_the_node_may(mode: str) -> None:
    one = case(mode, table_of(*TABLES["source ranges"]), options_of(4))
    owner = Host([NODE, "192.0.2.1"])
    packet = Packet("192.0.2.1", "192.0.2.1", 80)
    assert {o.dnat for o in one.walk(packet, owner)} == {True}


@pytest.mark.parametrize("mode", MODES)
def test_what_is_no_service_passes_untouched(mode: str) -> None:
    one = case(mode, table_of(*cluster_objects()), options_of(4))
    for packet in (
        Packet(POD, "1.1.1.1", 443, interface="cni0"),
        Packet(POD, "10.97.20.1", 8081, interface="cni0"),
        Packet(STRANGER, NODE, 22, interface="eth0"),
        Packet(NODE, "10.244.2.1", 10250),
    ):
        assert fate(one.walk(packet)) == {("untouched", "", False): 1}
    other_port = Packet(POD, "10.96.20.1", 8081, interface="cni0")
    assert fate(one.walk(other_port)) == {(one.mode.unknown_port, "", False): 1}


def test_health_check_node_ports_are_let_in() -> None:
    """Also where the host's own rules drop everything else behind ours."""
    table = table_of(*TABLES["eTP Local, here and there"])
    text = iptables.render_rules(table, options_of(4))
    guarded = parse_rules(
        "*filter\n-A INPUT -j DROP\nCOMMIT\n", onto=parse_rules(text), file="host"
    )
    for port, verdict in ((32000, "delivered"), (32001, "dropped")):
        packet = Packet(STRANGER, NODE, port, interface="eth0")
        (found,) = walk(guarded, packet, Host([NODE]))
        assert found.verdict == verdict


# --- Anything ----------------------------------------------------------------------------------

ADDRESSES: Mapping[Family, Mapping[str, tuple[str, ...]]] = {
    4: {
        "node1": ("10.244.1.1", "10.244.1.2", "192.168.77.1"),
        "node2": ("10.244.2.1", "10.244.2.2", "192.168.77.2"),
    },
    6: {
        "node1": ("fd00:10:244::1:1", "fd00:10:244::1:2", "fd00:77::1"),
        "node2": ("fd00:10:244::2:1", "fd00:10:244::2:2", "fd00:77::2"),
    },
}


@st.composite
def endpoints_(draw: st.DrawFn, family: Family) -> list[dict[str, Any]]:
    hinted = draw(st.booleans())
    found = []
    for node, addresses in ADDRESSES[family].items():
        for address in draw(st.lists(st.sampled_from(addresses), unique=True)):
            ready = draw(st.sampled_from([True, True, None, False]))
            conditions = {"ready": ready}
            if not ready:
                conditions["serving"] = draw(st.booleans())
                conditions["terminating"] = draw(st.booleans())
            more: dict[str, Any] = {"nodeName": node}
            if hinted:
                topology_zone = draw(st.sampled_from(["z-a", "z-b"]))
                more["hints"] = {"forZones": [{"name": topology_zone}]}
            found.append({**endpoint(address, **more), "conditions": conditions})
    return found


@st.composite
def objects_(draw: st.DrawFn, family: Family) -> list[Object]:
    """A few Services, each with addresses and ports of its own."""
    found: list[Object] = []
    v4 = family == 4
    policy = st.sampled_from(["Cluster", "Local"])
    for n in range(draw(st.integers(1, 3))):
        ports = draw(
            st.lists(
                st.sampled_from([("", 80, "TCP"), ("dns", 53, "UDP"), ("sig", 53, "SCTP")]),
                unique=True,
                min_size=1,
            )
        )
        if len(ports) > 1:
            ports = [(name or "http", port, protocol) for name, port, protocol in ports]
        vips = [f"192.0.2.{n + 1}" if v4 else f"2001:db8:2::{n + 1}"]
        more: dict[str, Any] = {
            "ip": f"10.96.0.{n + 1}" if v4 else f"fd00:10:96::{n + 1}",
            "ports": ports,
            "node_port": draw(st.sampled_from([0, 30000 + 10 * n])),
            "vips": draw(st.sampled_from([[], vips])),
            "internalTrafficPolicy": draw(policy),
            "externalTrafficPolicy": draw(policy),
            "sessionAffinity": draw(st.sampled_from(["None", "None", "ClientIP"])),
            "loadBalancerSourceRanges": draw(
                st.lists(st.sampled_from(RANGES[family]), unique=True, max_size=2)
            ),
        }
        if draw(st.booleans()):
            more["externalIPs"] = [f"198.51.100.{n + 1}" if v4 else f"2001:db8:3::{n + 1}"]
        name = f"web{n}"
        found.append(exposed(name, **more))
        targets = tuple((name, port + 8000, protocol) for name, port, protocol in ports)
        members = draw(endpoints_(family))
        found.append(slice_of(name, *members, ports=targets, family="IPv4" if v4 else "IPv6"))
    return found


@st.composite
def cases(draw: st.DrawFn) -> tuple[ForwardingTable, Options]:
    family: Family = draw(st.sampled_from([4, 6]))
    node = NODES[family]
    serving = st.sampled_from([None, None, (node.address,), (SECOND[family], LOCALHOST[family])])
    options = options_of(
        family,
        draw(st.sampled_from(["cidr", "cidr", "interface", "prefix", ""])),
        masquerade_all=draw(st.booleans()),
        masquerade_bit=draw(st.sampled_from([0, 14, 31])),
        localhost_node_ports=draw(st.booleans()),
        node_port_addresses=draw(serving),
        random_fully=draw(st.booleans()),
        drop_invalid=draw(st.booleans()),
    )
    table = table_of(*draw(objects_(family)), node=node, family=family)
    return table, options


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_any_table_is_spelt_as_decided(one: tuple[ForwardingTable, Options]) -> None:
    for mode in MODES:
        check(case(mode, *one))


def places(table: ForwardingTable, family: Family) -> list[tuple[str, int]]:
    """Addresses and ports that mean something, and some that do not: in any mixture."""
    fronts = [front for one in table for front in one.frontends]
    addresses = {front.address for front in fronts if front.address} | {*own_addresses(family)}
    addresses |= {"10.96.0.77", "1.1.1.1"} if family == 4 else {"fd00:10:96::77", "2001:db8:9::9"}
    ports = {front.port for front in fronts} | {81}
    return sorted((address, port) for address in addresses for port in ports)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(cases(), st.data())
def test_what_becomes_of_a_packet_is_the_same_in_both_but_where_they_differ_by_design(
    one: tuple[ForwardingTable, Options], data: st.DataObject
) -> None:
    table, options = one
    family = options.family
    both = [case(mode, *one) for mode in MODES]
    cluster_ips = {port.cluster_ip for port in table}
    elsewhere = {str(e) for port in table for e in port.reachable if not e.local}
    ranged = {ip for port in table if port.source_ranges for ip in port.load_balancer_ips}
    sources = [*((pod, "cni0") for pod in PODS[family]), *((o, "eth0") for o in OUTSIDE[family])]
    for address, port in places(table, family):
        source, interface = data.draw(st.sampled_from([*sources, (NODES[family].address, "")]))
        protocol = data.draw(st.sampled_from(["tcp", "udp", "sctp"]))
        packet = Packet(source, address, port, protocol, interface=interface)  # type: ignore[arg-type]
        fates = [fate(each.walk(packet), options.mark) for each in both]
        (theirs,), (ours,) = ({verdict for verdict, _, _ in found} for found in fates)
        match theirs, ours:
            case "untouched", "reject":
                # Any port of a ClusterIP is refused; and so is the node itself.
                assert address in cluster_ips or not interface
            case "reject" | "drop", "untouched":
                # iptables refuses a node port without endpoints, or without one here, on every
                # address of the node.
                assert options.node_port_addresses is not None
                assert address not in options.node_port_addresses
            case "untouched" | "reject", "drop":
                assert address in ranged
            case "forward", "forward":
                assert [by_place(found, source, elsewhere) for found in fates] == [
                    by_place(fates[0], source, elsewhere)
                ] * 2
            case _:
                assert fates[0] == fates[1]


def by_place(found: Fate, source: str, elsewhere: set[str]) -> dict[str, tuple[Fraction, bool]]:
    """Chances and masquerading by endpoint; an endpoint elsewhere that is its own client counts
    as masqueraded: iptables does so, and nobody sees it."""
    return {
        place: (
            share,
            masked or (place in elsewhere and place.rpartition(":")[0].strip("[]") == source),
        )
        for (_, place, masked), share in found.items()
    }
