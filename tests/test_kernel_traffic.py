"""Real packets through real rules: what users of a Service get, from wherever they ask.

Each scenario loads Kubernetes objects into the node of a cluster of network namespaces
(netcluster.py), asks from a Pod, the node or outside, and says who must answer and whether
the endpoint sees the client's own address. Where the rules are iptables', the packet walker is
asked the same of the same rules and must say the same as the kernel.

Scenarios know no dataplane: another one is one more class in DATAPLANES. In what modes differ
for clients is said in one place, traffic.TRAITS.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from fractions import Fraction
from typing import Any, Protocol

import msgspec
import pytest
from forwarding import cluster_objects, exposed, slice_of, snapshot_of
from ipvs_node import IpvsNode
from netcluster import (
    BRIDGE_ADDRESS,
    CLUSTER_CIDR,
    NODE_ADDRESS,
    NODE_NAME,
    OUTSIDE,
    PATIENCE,
    PODS,
    SILENCE,
    NetCluster,
    Reply,
    Unavailable,
    pod,
)
from objects import external
from traffic import (
    CLUSTER_IP,
    DROPPED,
    EXTERNAL_IP,
    FAMILIES,
    GONE,
    LB_IP,
    LB_NODE_PORT,
    LEAVING,
    NODE_PORT,
    PASSED,
    PORT,
    READY,
    REFUSED,
    TARGET,
    TRAITS,
    WHERE,
    Fate,
    Served,
    Traits,
    at,
    backed,
    cluster_or_skip,
    fate_of,
    frontends,
    is_tested_here,
    on,
    own_address,
    place,
    served,
    web,
)
from userspace_node import UserspaceNode

from kdns.kernel.conntrack import Cleaned, FlowCleaner
from kdns.metrics import Metrics
from kdns.proxy import iptables, nftables, packet
from kdns.proxy.iptables import IptablesRules
from kdns.proxy.nftables import NftablesRules
from kdns.proxy.nftables_listing import parse_table
from kdns.proxy.nftables_rules import WORD
from kdns.proxy.nftables_text import NftRuleset
from kdns.proxy.options import Detector, Family, NodeView, Options
from kdns.proxy.packet_nftables import parse_nftables, walk_nftables
from kdns.proxy.ruleset import Ruleset
from kdns.proxy.table import ForwardingTable, TableCompiler
from kdns.registry.objects import Key, Object, Service
from kdns.registry.snapshot import Changes, Snapshot, everything

# --- What the packet walker says ---------------------------------------------------------------


def fate_in(ways: tuple[packet.Outcome, ...]) -> Fate:
    """Return what becomes of a packet for the walker, in the same terms."""
    found: dict[str, bool] = {}
    for way in ways:
        if way.verdict in ("dropped", "rejected"):
            (alone,) = ways
            return DROPPED if alone.verdict == "dropped" else REFUSED
        if not way.dnat:
            assert len(ways) == 1
            # To a process of the node, but none listens there.
            return PASSED if way.verdict == "forwarded" else REFUSED
        name = f"[{way.destination}]" if ":" in way.destination else way.destination
        found[f"{name}:{way.port}"] = way.masqueraded
    return Served(found)


THE_NODE = packet.Host([*NODE_ADDRESS.values(), *BRIDGE_ADDRESS.values()])


def first_packet(where: str, source: str, ip: str, port: int, protocol: str) -> packet.Packet:
    """Return the packet that opens a connection."""
    interface = {"node": "", "outside": "eth0", "node2": "eth0"}.get(where, f"v-{where}")
    return packet.Packet(source, ip, port, protocol, interface=interface)  # type: ignore[arg-type]


# --- Dataplanes -------------------------------------------------------------------------------


class Dataplane(Protocol):
    """A way to program the node. options -- those that `load` was last called with."""

    traits: Traits
    options: dict[Family, Options]

    def load(self, *objects: Object, **settings: Any) -> None:
        """Program the node with these objects and no others; settings as of Options."""

    def change(self, *objects: Object) -> None:
        """These are the objects now: do what a running proxy does."""

    def sync_fully(self) -> None:
        """Write everything once more, as after a restart."""

    def clear(self) -> None:
        """Leave nothing behind."""

    def close(self) -> None:
        """End what runs for it."""

    def held(self, family: Family) -> str:
        """Return the rules that the kernel holds."""

    def guard(self, family: Family, ports: str) -> None:
        """Write an operator's own rule behind ours: the node drops what comes to TCP ports
        "from:to"."""

    def predict(
        self, where: str, source: str, ip: str, port: int, protocol: str
    ) -> tuple[packet.Outcome, ...] | None:
        """Return what the packet walker makes of it; None if it cannot read these rules."""

    def table(self, family: Family) -> ForwardingTable:
        """Return what is programmed."""


class Compiled:
    """The objects, compiled for the node as the program does it; a mode gives the rules to the
    kernel."""

    def __init__(self, cluster: NetCluster) -> None:
        self.cluster = cluster
        self.snapshot = Snapshot()
        self.compilers: dict[Family, TableCompiler] = {}
        self.options: dict[Family, Options] = {}

    def load(self, *objects: Object, **settings: Any) -> None:
        self.snapshot = snapshot_of(*objects)
        for family in FAMILIES:
            mine = {"detector": Detector("cidr", CLUSTER_CIDR[family]), **settings}
            if "node_port_addresses" in settings:
                mine["node_port_addresses"] = tuple(
                    ip for ip in settings["node_port_addresses"] if (":" in ip) == (family == 6)
                )
            options = self.options[family] = Options(family, **mine)
            node = NodeView(NODE_NAME, NODE_ADDRESS[family], "z-a")
            compiler = self.compilers[family] = TableCompiler(family, node)
            compiler.update(self.snapshot, everything(self.snapshot))
            self.install(compiler.table, options)
        self.cluster.request("node", "forget")

    def change(self, *objects: Object) -> None:
        before, self.snapshot = self.snapshot, snapshot_of(*objects)
        touched = everything(before).services | everything(self.snapshot).services
        for family, compiler in self.compilers.items():
            changed = compiler.update(self.snapshot, Changes(services=touched))
            self.follow(family, compiler.table, changed)

    def install(self, table: ForwardingTable, options: Options) -> None:
        """Leave nothing of the scenario before, and program this."""
        raise NotImplementedError

    def follow(self, family: Family, table: ForwardingTable, changed: Collection[Key]) -> None:
        """Go on to this table."""
        raise NotImplementedError

    def guard(self, family: Family, ports: str) -> None:
        rule = f"-A INPUT -p tcp --dport {ports} -j DROP"
        program = "iptables" if family == 4 else "ip6tables"
        self.cluster.run("node", program, *rule.split())

    def predict(
        self, where: str, source: str, ip: str, port: int, protocol: str
    ) -> tuple[packet.Outcome, ...] | None:
        return None

    def table(self, family: Family) -> ForwardingTable:
        return self.compilers[family].table

    def close(self) -> None:
        pass


class Iptables(Compiled):
    """kdns' own tables and texts, given to one variant of iptables-restore."""

    traits = TRAITS["iptables"]

    def __init__(self, cluster: NetCluster, variant: str) -> None:
        super().__init__(cluster)
        self.programs = {
            family: f"{name}-{variant}" for family, name in ((4, "iptables"), (6, "ip6tables"))
        }
        self.rules: dict[Family, IptablesRules] = {}
        self.read: dict[Family, Ruleset] = {}

    def install(self, table: ForwardingTable, options: Options) -> None:
        # Without --noflush: nothing is left of the scenario before.
        text = iptables.render_rules(table, options)
        self.cluster.run("node", f"{self.programs[options.family]}-restore", text=text)
        rules = self.rules[options.family] = IptablesRules(options)
        rules.update(table, None)
        rules.committed()
        self.read = {}

    def follow(self, family: Family, table: ForwardingTable, changed: Collection[Key]) -> None:
        rules = self.rules[family]
        rules.update(table, changed)
        if text := rules.partial():
            self.cluster.run("node", f"{self.programs[family]}-restore", "--noflush", text=text)
        rules.committed()
        self.read = {}

    def sync_fully(self) -> None:
        for family, rules in self.rules.items():
            self.cluster.run(
                "node", f"{self.programs[family]}-restore", "--noflush", text=rules.full()
            )

    def clear(self) -> None:
        for program in self.programs.values():
            self.cluster.run("node", f"{program}-restore", text="*filter\nCOMMIT\n*nat\nCOMMIT\n")

    def guard(self, family: Family, ports: str) -> None:
        rule = f"-A INPUT -p tcp --dport {ports} -j DROP"
        self.cluster.run("node", self.programs[family], *rule.split())

    def held(self, family: Family) -> str:
        return self.cluster.run("node", f"{self.programs[family]}-save")

    def predict(
        self, where: str, source: str, ip: str, port: int, protocol: str
    ) -> tuple[packet.Outcome, ...]:
        family: Family = 6 if ":" in ip else 4
        if family not in self.read:
            # What the kernel holds, not what it was given.
            self.read[family] = packet.parse_rules(self.held(family))
        one = first_packet(where, source, ip, port, protocol)
        return packet.walk(self.read[family], one, THE_NODE)


class Nftables(Compiled):
    """kdns' own tables and texts, given to nft."""

    traits = TRAITS["nftables"]

    def __init__(self, cluster: NetCluster) -> None:
        super().__init__(cluster)
        self.rules: dict[Family, NftablesRules] = {}
        self.read: NftRuleset | None = None

    def install(self, table: ForwardingTable, options: Options) -> None:
        # Also an operator's own rules of the scenario before (guard).
        self.nft(f"flush ruleset {WORD[options.family]}\n")
        self.nft(nftables.render_rules(table, options))
        rules = self.rules[options.family] = NftablesRules(options)
        rules.update(table, None)
        rules.committed()

    def follow(self, family: Family, table: ForwardingTable, changed: Collection[Key]) -> None:
        rules = self.rules[family]
        rules.update(table, changed)
        if text := rules.partial():
            self.nft(text)
        rules.committed()

    def sync_fully(self) -> None:
        for family, rules in self.rules.items():
            self.nft("".join(f"flush chain {WORD[family]} kube-proxy {chain}\n"
                             for chain in rules.wanted().chains))  # fmt: skip
            self.nft(rules.full(parse_table(self.held(family).splitlines(), WORD[family])))

    def clear(self) -> None:
        self.nft("flush ruleset\n")

    def held(self, family: Family) -> str:
        return self.cluster.run("node", "nft", "-y", "list", "table", WORD[family], nftables.TABLE)

    def nft(self, text: str) -> None:
        self.cluster.run("node", "nft", "-f", "-", text=text)
        self.read = None

    def predict(
        self, where: str, source: str, ip: str, port: int, protocol: str
    ) -> tuple[packet.Outcome, ...]:
        if self.read is None:
            # What the kernel holds, with iptables' own tables for the guard.
            text = self.cluster.run("node", "nft", "-s", "list", "ruleset")
            self.read = parse_nftables(text, strict=False)
        one = first_packet(where, source, ip, port, protocol)
        return walk_nftables(self.read, one, THE_NODE)


class Userspace(Compiled):
    """A process of the node, and the rules that lead to it."""

    traits = TRAITS["userspace"]

    def __init__(self, cluster: NetCluster) -> None:
        super().__init__(cluster)
        self.node = UserspaceNode(cluster)

    def install(self, table: ForwardingTable, options: Options) -> None:
        # Also an operator's own rules of the scenario before (guard).
        program = "iptables" if options.family == 4 else "ip6tables"
        self.cluster.run("node", program, "-F", "INPUT")
        self.node.begin({options.family: options}, {f: NODE_ADDRESS[f] for f in FAMILIES})
        self.node.sync({options.family: table})

    def follow(self, family: Family, table: ForwardingTable, changed: Collection[Key]) -> None:
        self.node.sync({family: table}, changed)

    def sync_fully(self) -> None:
        for family, compiler in self.compilers.items():
            self.node.sync({family: compiler.table}, full=True)

    def clear(self) -> None:
        self.node.cleanup()

    def held(self, family: Family) -> str:
        return self.cluster.run("node", f"{'iptables' if family == 4 else 'ip6tables'}-save")

    def close(self) -> None:
        self.node.close()


class Ipvs(Compiled):
    """kdns' own dataplane, in a thread of the node. A scenario that starts like the one before
    is what a running proxy goes on to."""

    traits = TRAITS["ipvs"]

    def __init__(self, cluster: NetCluster) -> None:
        super().__init__(cluster)
        self.node = IpvsNode(cluster).__enter__()
        self.node.probe()
        self.running: dict[Family, Options] = {}
        self.guards: list[tuple[str, list[str]]] = []

    def install(self, table: ForwardingTable, options: Options) -> None:
        family = options.family
        while self.guards:
            program, rule = self.guards.pop()
            self.cluster.run("node", program, "-D", *rule)
        if self.running.get(family) == options:
            before = self.node.tables[family].services
            self.node.follow(family, table, before.keys() | table.services.keys())
        else:
            self.node.install(table, options)
            self.running[family] = options

    def follow(self, family: Family, table: ForwardingTable, changed: Collection[Key]) -> None:
        self.node.follow(family, table, changed)

    def sync_fully(self) -> None:
        self.node.sync_fully()

    def clear(self) -> None:
        assert all(self.node.verify(family) for family in self.running)
        self.running.clear()
        self.node.clear()

    def held(self, family: Family) -> str:
        return self.node.held(family)

    def guard(self, family: Family, ports: str) -> None:
        rule = f"INPUT -p tcp --dport {ports} -j DROP".split()
        program = "iptables" if family == 4 else "ip6tables"
        self.cluster.run("node", program, "-A", *rule)
        self.guards.append((program, rule))

    def close(self) -> None:
        self.node.__exit__()


DATAPLANES: dict[str, Callable[[NetCluster], Dataplane]] = {
    "iptables-nft": lambda cluster: Iptables(cluster, "nft"),
    "iptables-legacy": lambda cluster: Iptables(cluster, "legacy"),
    "nftables": Nftables,
    "userspace": Userspace,
    "ipvs": Ipvs,
}


class Site:
    """The cluster and its dataplane, as scenarios talk to them."""

    def __init__(self, cluster: NetCluster, plane: Dataplane) -> None:
        self.cluster = cluster
        self.plane = plane

    def expect(
        self,
        origin: str,
        ip: str,
        port: int,
        fate: Fate,
        protocol: str = "tcp",
        source: str = "",
    ) -> list[Reply]:
        """Ask often enough to meet every endpoint; both the kernel and the walker must say
        `fate`. origin -- pod, node, localhost, outside, or a namespace"""
        if isinstance(fate, Served) and not self.plane.traits.keeps_source:
            fate = served(*fate.endpoints, masquerade=True)
        family: Family = 6 if ":" in ip else 4
        where = WHERE.get(origin, origin)
        source = source or own_address(origin, family)
        endpoints = len(fate.endpoints) if isinstance(fate, Served) else 0
        replies = self.cluster.ask(
            where, ip, port, protocol, sources=[source],
            times=self.plane.traits.enough(endpoints) if endpoints else 1,
            timeout=SILENCE if fate == DROPPED else PATIENCE,
        )  # fmt: skip
        who = f"{protocol} from {origin} ({source}) to {ip} port {port}"
        assert fate_of(replies) == fate, f"{who}: the kernel"
        ways = self.plane.predict(where, source, ip, port, protocol)
        if ways is not None:
            assert fate_in(ways) == fate, f"{who}: the packet walker"
        # Masquerading takes an address that the node has on the way out.
        node = {NODE_ADDRESS[family], BRIDGE_ADDRESS[family]}
        assert {r.peer_ip for r in replies if r.masqueraded} <= node, who
        return replies


@pytest.fixture(scope="module")
def cluster() -> Iterator[NetCluster]:
    with cluster_or_skip() as made:
        yield made


@pytest.fixture(scope="module", params=[*filter(is_tested_here, DATAPLANES)])
def site(request: pytest.FixtureRequest, cluster: NetCluster) -> Iterator[Site]:
    plane = DATAPLANES[request.param](cluster)
    try:
        plane.load()
    except Unavailable as error:
        # Only before the first scenario: from then on a refused text is a fault of ours.
        pytest.skip(f"no rules of {request.param} here: {error}")
    yield Site(cluster, plane)
    plane.clear()
    plane.close()


@pytest.fixture(params=FAMILIES, ids=["ipv4", "ipv6"])
def family(request: pytest.FixtureRequest) -> Family:
    one: Family = request.param
    return one


# --- Every kind of Service --------------------------------------------------------------------


def test_walk_through_of_every_kind_of_service(site: Site) -> None:
    behind = backed(on(1, 10), on(2, 10))
    ends = (at(10), at(10, node=2))
    names = ("plain", "by-node-port", "balanced", "by-external-ip", "elsewhere", "headless")
    ips = {name: f"10.96.1.{number}" for number, name in enumerate(names, 1)}
    site.plane.load(
        exposed("plain", ip=ips["plain"]),
        exposed("by-node-port", ip=ips["by-node-port"], node_port=NODE_PORT),
        exposed("balanced", ip=ips["balanced"], node_port=LB_NODE_PORT, vips=[LB_IP[4]]),
        exposed("by-external-ip", ip=ips["by-external-ip"], externalIPs=[EXTERNAL_IP[4]]),
        external("elsewhere", "example.com"),
        exposed("headless", ip="None"),
        *(
            slice_of(name, *[msgspec.to_builtins(e) for e in behind.endpoints or ()],
                     ports=[("http", TARGET, "TCP")])
            for name in names if name != "elsewhere"
        ),
    )  # fmt: skip
    for name in ("plain", "by-node-port", "balanced", "by-external-ip"):
        site.expect("pod", ips[name], PORT, served(*ends, masquerade=False))
        site.expect("node", ips[name], PORT, served(*ends, masquerade=True))
    for ip, port in (
        (NODE_ADDRESS[4], NODE_PORT),
        (NODE_ADDRESS[4], LB_NODE_PORT),
        (LB_IP[4], PORT),
        (EXTERNAL_IP[4], PORT),
    ):
        site.expect("outside", ip, port, served(*ends, masquerade=True))
    # Neither has anything to forward.
    for name in ("elsewhere", "headless"):
        assert f"default/{name}" not in site.plane.held(4)
        site.expect("pod", ips[name], PORT, PASSED)


# Who is masqueraded on the way to the ClusterIP, whatever the policies; and to any other
# frontend: externalTrafficPolicy -> (which endpoints, masqueraded) (reference 1.7).
INNER = {"pod": False, "node": True, "outside": True}
OUTER = {
    "pod": {"Cluster": ("all", True), "Local": ("all", False)},
    "node": {"Cluster": ("all", True), "Local": ("all", True)},
    "outside": {"Cluster": ("all", True), "Local": ("local", False)},
}


@pytest.mark.parametrize("outer", ["Cluster", "Local"])
@pytest.mark.parametrize("inner", ["Cluster", "Local"])
def test_policies_choose_endpoints_and_masquerade(
    site: Site, family: Family, inner: str, outer: str
) -> None:
    here, there = at(10, family), at(10, family, node=2)
    ends = {"all": (here, there), "local": (here,)}
    site.plane.load(
        web(family, internalTrafficPolicy=inner, externalTrafficPolicy=outer),
        backed(on(1, 10, family), on(2, 10, family), family=family),
    )
    inside = ends["local" if inner == "Local" else "all"]
    for origin, masquerade in INNER.items():
        site.expect(origin, CLUSTER_IP[family], PORT, served(*inside, masquerade=masquerade))
    for origin, policies in OUTER.items():
        which, masquerade = policies[outer]
        if outer == "Local" and site.plane.traits.local_for_all:
            which = "local"
        for _, ip, port in frontends(family, cluster_ip=False):
            site.expect(origin, ip, port, served(*ends[which], masquerade=masquerade))


def test_without_a_detector_nobody_is_a_pod_of_the_node(site: Site) -> None:
    site.plane.load(web(externalTrafficPolicy="Local"), backed(on(1, 10), on(2, 10)), detector=None)
    both = (at(10), at(10, node=2))
    site.expect("pod", CLUSTER_IP[4], PORT, served(*both, masquerade=False))
    site.expect("pod", LB_IP[4], PORT, served(at(10), masquerade=False))
    to_node = both[:1] if site.plane.traits.local_for_all else both
    site.expect("node", LB_IP[4], PORT, served(*to_node, masquerade=True))
    # Whoever comes from outside keeps its address, so that only an endpoint here can answer.
    site.plane.change(web(), backed(on(1, 10)))
    site.expect("outside", CLUSTER_IP[4], PORT, served(at(10), masquerade=False))


def test_masquerade_all_hides_pods_as_well(site: Site) -> None:
    site.plane.load(web(), backed(on(1, 10), on(2, 10)), masquerade_all=True)
    both = served(at(10), at(10, node=2), masquerade=True)
    for origin in INNER:
        site.expect(origin, CLUSTER_IP[4], PORT, both)


def test_load_balancer_that_sends_to_node_ports_gets_its_own_traffic(site: Site) -> None:
    """ipMode Proxy: the packet must leave the node for the load balancer."""
    site.plane.load(web(ip_mode="Proxy"), backed(on(1, 10)))
    site.expect("pod", LB_IP[4], PORT, PASSED)
    site.expect("outside", NODE_ADDRESS[4], NODE_PORT, served(at(10), masquerade=True))


def test_other_ports_and_deleted_services_are_nobodys(site: Site) -> None:
    site.plane.load(web(), backed(on(1, 10)))
    site.expect("pod", CLUSTER_IP[4], PORT + 1, site.plane.traits.unknown_port)
    site.plane.change()
    for _, ip, port in frontends(4):
        site.expect("pod", ip, port, REFUSED if port == NODE_PORT else PASSED)


def test_endpoints_meant_for_this_topology_zone_serve_it(site: Site) -> None:
    near, far = on(1, 10), on(2, 10)
    near["hints"] = {"forZones": [{"name": "z-a"}]}
    far["hints"] = {"forZones": [{"name": "z-b"}]}
    site.plane.load(web(), backed(near, far))
    site.expect("pod", CLUSTER_IP[4], PORT, served(at(10), masquerade=False))


# --- Distribution and affinity ----------------------------------------------------------------


def test_each_endpoint_gets_its_share(site: Site, family: Family) -> None:
    ends = (at(10, family), at(20, family), at(10, family, node=2))
    site.plane.load(
        web(family),
        backed(on(1, 10, family), on(1, 20, family), on(2, 10, family), family=family),
    )
    times = 60 if site.plane.traits.in_turn else 600
    replies = site.cluster.ask("client", CLUSTER_IP[family], PORT, times=times)
    shares = Counter(reply.at for reply in replies)
    assert shares.keys() == set(ends)
    if site.plane.traits.in_turn:
        assert set(shares.values()) == {20}
        return
    # 200 of 600 each, give or take more than eight standard deviations.
    assert all(100 < count < 300 for count in shares.values()), shares
    source = own_address("pod", family)
    ways = site.plane.predict("client", source, CLUSTER_IP[family], PORT, "tcp")
    for way in ways or ():
        assert abs(way.probability - Fraction(1, 3)) < Fraction(1, 10**6)


# The addresses of 20 more Pods.
def clients(family: Family) -> list[str]:
    return [pod(number, family) for number in PODS["client"][1:]]


def sticky(family: Family, seconds: int | None) -> Service:
    config = {} if seconds is None else {"clientIP": {"timeoutSeconds": seconds}}
    return web(family, sessionAffinity="ClientIP", sessionAffinityConfig=config)


def test_clients_with_affinity_stay_with_their_endpoint(site: Site, family: Family) -> None:
    numbers = (10, 11, 20)
    site.plane.load(
        sticky(family, None), backed(*(on(1, n, family) for n in numbers), family=family)
    )
    chosen: dict[str, str] = {}
    for client in clients(family):
        times = 3 if site.plane.traits.in_turn else 8
        replies = site.cluster.ask(
            "client", CLUSTER_IP[family], PORT, times=times, sources=[client]
        )
        (chosen[client],) = {reply.at for reply in replies}
    # 20 clients at one of three endpoints: one time in 10^9.
    assert len(set(chosen.values())) > 1
    by_lb = site.cluster.ask("client", LB_IP[family], PORT, sources=clients(family))
    if site.plane.traits.shared_memory:
        # The same client comes to the same endpoint by another frontend as well, for as long as
        # both lead to the same Service port.
        assert [reply.at for reply in by_lb] == list(chosen.values())
    else:
        again = site.cluster.ask("client", LB_IP[family], PORT, sources=clients(family))
        assert [reply.at for reply in again] == [reply.at for reply in by_lb]


def test_affinity_outlives_changes_of_other_endpoints(site: Site) -> None:
    some = [on(1, n) for n in (10, 11, 20)]
    site.plane.load(sticky(4, None), backed(*some))
    first = [r.at for r in site.cluster.ask("client", CLUSTER_IP[4], PORT, sources=clients(4))]
    site.plane.change(sticky(4, None), backed(*some, on(2, 10)))
    again = [r.at for r in site.cluster.ask("client", CLUSTER_IP[4], PORT, sources=clients(4))]
    assert again == first


def test_affinity_ends_with_its_time_out(site: Site) -> None:
    site.plane.load(sticky(4, 1), backed(*(on(1, n) for n in (10, 11, 20))))
    first = [r.at for r in site.cluster.ask("client", CLUSTER_IP[4], PORT, sources=clients(4))]
    # The kernel's clock cannot be moved; longer than this changes nothing.
    time.sleep(1.1)
    later = [r.at for r in site.cluster.ask("client", CLUSTER_IP[4], PORT, sources=clients(4))]
    if not site.plane.traits.memory_ends:
        assert later == first  # test_kernel_ipvs.py: and then it does
        return
    # That all 20 choose as before: one time in 3 * 10^9.
    assert later != first


# --- Hairpin ----------------------------------------------------------------------------------


def test_pod_reaches_itself_through_its_own_service(site: Site, family: Family) -> None:
    """Its packets come back to it with the node's address, or it would answer itself."""
    ends = {at(10, family): True, at(20, family): False}
    site.plane.load(web(family), backed(on(1, 10, family), on(1, 20, family), family=family))
    site.expect("pod-a", CLUSTER_IP[family], PORT, Served(ends))


def test_only_endpoint_of_a_local_service_reaches_itself(site: Site) -> None:
    site.plane.load(
        web(internalTrafficPolicy="Local", externalTrafficPolicy="Local"),
        backed(on(1, 10), on(2, 10)),
    )
    site.expect("pod-a", CLUSTER_IP[4], PORT, served(at(10), masquerade=True))
    ends = {at(10): True, at(10, node=2): False}
    if site.plane.traits.local_for_all:
        del ends[at(10, node=2)]
    for _, ip, port in frontends(4, cluster_ip=False):
        site.expect("pod-a", ip, port, Served(ends))


# --- Source ranges ----------------------------------------------------------------------------


def test_source_ranges_close_the_load_balancer_to_others(site: Site, family: Family) -> None:
    inside = OUTSIDE[family][0]
    ranges = ["203.0.113.0/24 ", "198.51.100.7/32", "2001:db8:113::/48"]
    site.plane.load(
        web(family, loadBalancerSourceRanges=ranges), backed(on(1, 10, family), family=family)
    )
    hidden = served(at(10, family), masquerade=True)
    site.expect("outside", LB_IP[family], PORT, hidden, source=inside)
    site.expect("outside", LB_IP[family], PORT, site.plane.traits.out_of_ranges)
    site.expect("pod", LB_IP[family], PORT, site.plane.traits.out_of_ranges)
    to_node = site.plane.traits.out_of_ranges if site.plane.traits.ranges_bind_node else hidden
    site.expect("node", LB_IP[family], PORT, to_node)
    # Only the load balancer's address is closed.
    for kind, ip, port in frontends(family):
        if kind != "loadbalancer IP":
            site.expect("outside", ip, port, hidden)
    if family == 4:
        first, second, third = OUTSIDE[4]
        site.expect("outside", LB_IP[4], PORT, hidden, source=first)
        site.expect("outside", LB_IP[4], PORT, hidden, source=second)
        site.expect("outside", LB_IP[4], PORT, site.plane.traits.out_of_ranges, source=third)


def test_source_range_of_everybody_closes_nothing(site: Site) -> None:
    ranges = ["203.0.113.0/24", "0.0.0.0/0"]
    site.plane.load(web(loadBalancerSourceRanges=ranges), backed(on(1, 10)))
    site.expect("outside", LB_IP[4], PORT, served(at(10), masquerade=True))


def test_source_ranges_let_in_keep_their_address_with_policy_local(site: Site) -> None:
    site.plane.load(
        web(loadBalancerSourceRanges=["203.0.113.0/24"], externalTrafficPolicy="Local"),
        backed(on(1, 10), on(2, 10)),
    )
    kept = served(at(10), masquerade=False)
    site.expect("outside", LB_IP[4], PORT, kept, source=OUTSIDE[4][0])
    site.expect("outside", LB_IP[4], PORT, site.plane.traits.out_of_ranges)


# --- No endpoints -----------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_service_without_endpoints_refuses_at_once(
    site: Site, family: Family, protocol: str
) -> None:
    """Over IPv6 as well, where a client wants to know: netcluster_servers.learn_at_once."""
    kind = protocol.upper()
    for slices in ([], [backed(on(1, 10, family, GONE), family=family, protocol=kind)]):
        site.plane.load(web(family, protocol=kind), *slices)
        for origin in INNER:
            for name, ip, port in frontends(family):
                # As with kube-proxy, OUTPUT does not lead to KUBE-EXTERNAL-SERVICES: the node
                # itself is refused only where the packet comes back to it (reference 1.3).
                beside = origin == "node" and name in ("loadbalancer IP", "external IP")
                fate = site.plane.traits.node_beside if beside else REFUSED
                site.expect(origin, ip, port, fate, protocol)


def test_local_service_without_any_endpoint_refuses_too(site: Site) -> None:
    site.plane.load(web(internalTrafficPolicy="Local", externalTrafficPolicy="Local"))
    for _, ip, port in frontends(4):
        site.expect("pod", ip, port, REFUSED)
        site.expect("outside", ip, port, REFUSED)


def test_external_policy_local_without_local_endpoint_is_silent_outside_only(
    site: Site, family: Family
) -> None:
    """A load balancer must take another node; Pods and the node itself are served all the same."""
    there = at(10, family, node=2)
    site.plane.load(
        web(family, externalTrafficPolicy="Local"), backed(on(2, 10, family), family=family)
    )
    for _, ip, port in frontends(family, cluster_ip=False):
        site.expect("outside", ip, port, DROPPED)
        site.expect("pod", ip, port, served(there, masquerade=False))
        site.expect("node", ip, port, served(there, masquerade=True))
    site.expect("outside", CLUSTER_IP[family], PORT, served(there, masquerade=True))


def test_internal_policy_local_without_local_endpoint_is_silent(site: Site) -> None:
    site.plane.load(web(internalTrafficPolicy="Local"), backed(on(2, 10)))
    for origin in INNER:
        site.expect(origin, CLUSTER_IP[4], PORT, site.plane.traits.none_inside)
    site.expect("outside", LB_IP[4], PORT, served(at(10, node=2), masquerade=True))


# --- Terminating endpoints --------------------------------------------------------------------

# Conditions of the local endpoint and of the remote one -> who serves Pods at the ClusterIP,
# and outside at the load balancer with externalTrafficPolicy Local.
TERMINATING = [
    (READY, READY, ("local", "remote"), ("local",)),
    (READY, LEAVING, ("local",), ("local",)),
    (LEAVING, READY, ("remote",), ("local",)),
    (LEAVING, LEAVING, ("local", "remote"), ("local",)),
    (LEAVING, GONE, ("local",), ("local",)),
    (GONE, LEAVING, ("remote",), DROPPED),
    (GONE, READY, ("remote",), DROPPED),
    (GONE, GONE, REFUSED, REFUSED),
]


@pytest.mark.parametrize(("local", "remote", "inside", "outside"), TERMINATING)
def test_terminating_endpoints_serve_when_nobody_else_does(
    site: Site,
    local: dict[str, bool],
    remote: dict[str, bool],
    inside: tuple[str, ...] | str,
    outside: tuple[str, ...] | str,
) -> None:
    ends = {"local": at(10), "remote": at(10, node=2)}
    site.plane.load(
        web(externalTrafficPolicy="Local"),
        backed(on(1, 10, conditions=local), on(2, 10, conditions=remote)),
    )
    for origin, ip, who in (("pod", CLUSTER_IP[4], inside), ("outside", LB_IP[4], outside)):
        fate = who if isinstance(who, str) else served(*(ends[n] for n in who), masquerade=False)
        site.expect(origin, ip, PORT, fate)


# --- UDP --------------------------------------------------------------------------------------


def test_udp_is_forwarded_as_tcp_is(site: Site, family: Family) -> None:
    both = (at(10, family), at(10, family, node=2))
    site.plane.load(
        web(family, protocol="UDP"),
        backed(on(1, 10, family), on(2, 10, family), family=family, protocol="UDP"),
    )
    for origin, masquerade in INNER.items():
        fate = served(*both, masquerade=masquerade)
        site.expect(origin, CLUSTER_IP[family], PORT, fate, "udp")
        for _, ip, port in frontends(family, cluster_ip=False):
            site.expect(origin, ip, port, served(*both, masquerade=True), "udp")
    # The same numbers with another protocol are another port.
    site.expect("pod", CLUSTER_IP[family], PORT, site.plane.traits.unknown_port)


def clean(site: Site, family: Family, before: ForwardingTable) -> Cleaned:
    """Delete stale flows as the proxy does after a sync, in the node's namespace."""
    return site.cluster.call(
        "node", clean_here, site.plane.options[family], before, site.plane.table(family)
    )


def clean_one(site: Site, family: Family, before: ForwardingTable) -> bool:
    """Delete a flow that is stale; say whether it is gone."""
    cleaned = clean(site, family, before)
    return cleaned.complete and (cleaned.deleted == 1 or not site.plane.traits.flows_linger)


def clean_here(options: Options, before: ForwardingTable, after: ForwardingTable) -> Cleaned:
    async def both() -> Cleaned:
        cleaner = FlowCleaner(options, Metrics())
        cleaner.note(before, None)
        await cleaner.clean()
        return await cleaner.clean(after, [*before.services, *after.services])

    return asyncio.run(both())


@pytest.mark.parametrize("via", ["cluster IP", "node port", "loadbalancer IP"])
def test_udp_client_follows_a_server_that_moved(site: Site, family: Family, via: str) -> None:
    """A client that never changes its port, as DNS and syslog clients do."""
    service = web(family, protocol="UDP")
    old, new = on(1, 10, family), on(2, 10, family)
    site.plane.load(service, backed(old, family=family, protocol="UDP"))
    ip, port = place(family, via)
    client = site.cluster.open("client" if via == "cluster IP" else "outside", ip, port, "udp")
    assert client.again().at == at(10, family)
    before = site.plane.table(family)
    site.plane.change(service, backed(new, family=family, protocol="UDP"))
    if not site.plane.traits.flows_follow:
        # The kernel remembers where the flow went: this is why it must be told.
        if site.plane.traits.flows_linger:
            assert client.again().at == at(10, family)
        assert clean_one(site, family, before)
    assert client.again().at == at(10, family, node=2)
    assert clean(site, family, site.plane.table(family)).deleted == 0
    client.close()


@pytest.mark.parametrize("end", ["scaled to zero", "deleted"])
def test_udp_client_learns_that_nobody_is_left(site: Site, end: str) -> None:
    service = web(protocol="UDP")
    site.plane.load(service, backed(on(1, 10), protocol="UDP"))
    client = site.cluster.open("client", CLUSTER_IP[4], PORT, "udp")
    assert client.again().at == at(10)
    before = site.plane.table(4)
    site.plane.change(*([service] if end == "scaled to zero" else []))
    if site.plane.traits.flows_follow:
        # Where nothing listens any more; the kernel still leads it there.
        assert client.again().outcome == "refused"
        return
    assert clean_one(site, 4, before)
    assert client.again().outcome == {"scaled to zero": "refused", "deleted": "unreachable"}[end]
    client.close()


# --- What goes on while rules change ----------------------------------------------------------


def test_open_connections_outlive_full_syncs_and_their_endpoints_withdrawal(
    site: Site, family: Family
) -> None:
    ends = [on(1, 10, family), on(2, 10, family)]
    site.plane.load(web(family), backed(*ends, family=family))
    connections = [
        site.cluster.open(where, ip, port)
        for where in ("client", "node", "outside")
        for _, ip, port in frontends(family)
    ]
    before = [connection.again() for connection in connections]
    assert {reply.outcome for reply in before} == {"answered"}

    site.plane.sync_fully()
    assert [connection.again() for connection in connections] == before
    # Drained, not cut: the endpoint leaves the Service while its connections go on.
    site.plane.change(web(family), backed(ends[1], family=family))
    assert [connection.again() for connection in connections] == before
    if site.plane.traits.outlives_service:
        site.plane.change()
        assert [connection.again() for connection in connections] == before
    for connection in connections:
        connection.close()


def test_partial_sync_is_seen_by_the_next_connection(site: Site) -> None:
    other: list[Object] = [exposed("other", ip="10.96.0.90"), backed(on(1, 20), owner="other")]
    site.plane.load(web(), backed(on(1, 10)), *other)
    steps: list[tuple[list[dict[str, Any]], Fate]] = [
        ([on(1, 10), on(2, 10)], served(at(10), at(10, node=2), masquerade=False)),
        ([on(2, 10)], served(at(10, node=2), masquerade=False)),
        ([], REFUSED),
        ([on(1, 11)], served(at(11), masquerade=False)),
    ]
    for ends, fate in steps:
        site.plane.change(web(), backed(*ends), *other)
        site.expect("pod", CLUSTER_IP[4], PORT, fate)
        site.expect("pod", "10.96.0.90", PORT, served(at(20), masquerade=False))


# --- SCTP -------------------------------------------------------------------------------------


def test_sctp_is_forwarded_as_tcp_is(site: Site, family: Family) -> None:
    """And its checksum, over ports as well, is right on both ways (netcluster_servers.py)."""
    if not site.plane.traits.carries_sctp:
        pytest.skip("this mode never had SCTP; such Services are told of in the log")
    both = (at(10, family), at(10, family, node=2))
    service = web(family, protocol="SCTP")
    ends = on(1, 10, family), on(2, 10, family)
    site.plane.load(service, backed(*ends, family=family, protocol="SCTP"))
    for origin, masquerade in INNER.items():
        fate = served(*both, masquerade=masquerade)
        site.expect(origin, CLUSTER_IP[family], PORT, fate, "sctp")
        for _, ip, port in frontends(family, cluster_ip=False):
            site.expect(origin, ip, port, served(*both, masquerade=True), "sctp")
    # Hairpin: it would answer itself.
    site.expect(
        "pod-a",
        CLUSTER_IP[family],
        PORT,
        Served(dict(zip(both, (True, False), strict=True))),
        "sctp",
    )
    site.plane.change(service)
    for origin in INNER:
        site.expect(origin, CLUSTER_IP[family], PORT, REFUSED, "sctp")


# --- The node itself --------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["Cluster", "Local"])
def test_node_port_answers_on_localhost(site: Site, policy: str) -> None:
    site.plane.load(web(externalTrafficPolicy=policy), backed(on(1, 10), on(2, 10)))
    both = served(at(10), at(10, node=2), masquerade=True)
    fate = both if site.plane.traits.on_localhost else REFUSED
    site.expect("localhost", "127.0.0.1", NODE_PORT, fate)


def test_node_port_stays_off_localhost_where_told(site: Site) -> None:
    site.plane.load(web(), backed(on(1, 10)), localhost_node_ports=False)
    site.expect("localhost", "127.0.0.1", NODE_PORT, REFUSED)
    site.expect("node", NODE_ADDRESS[4], NODE_PORT, served(at(10), masquerade=True))


def test_node_port_answers_on_every_address_of_the_node_or_on_the_chosen(
    site: Site, family: Family
) -> None:
    objects = web(family), backed(on(1, 10, family), family=family)
    fate = served(at(10, family), masquerade=True)
    site.plane.load(*objects)
    site.expect("pod", NODE_ADDRESS[family], NODE_PORT, fate)
    site.expect("pod", BRIDGE_ADDRESS[family], NODE_PORT, fate)
    site.plane.load(*objects, node_port_addresses=tuple(NODE_ADDRESS.values()))
    site.expect("pod", NODE_ADDRESS[family], NODE_PORT, fate)
    site.expect("pod", BRIDGE_ADDRESS[family], NODE_PORT, REFUSED)


def test_health_check_node_port_passes_the_nodes_own_firewall(site: Site, family: Family) -> None:
    health, other = 32100, 32101
    node = NODE_ADDRESS[family]
    site.plane.load(
        web(family, externalTrafficPolicy="Local", healthCheckNodePort=health),
        backed(on(2, 10, family), family=family),
    )
    site.plane.guard(family, f"{health}:{other}")
    for port in (health, other):
        site.cluster.request("node", "listen", protocol="tcp", ip=node, port=port)
    try:
        if site.plane.traits.passes_checks:
            (answer,) = site.cluster.ask("outside", node, health)
            assert (answer.outcome, answer.who) == ("answered", "node")
        else:
            (none,) = site.cluster.ask("outside", node, health, timeout=SILENCE)
            assert none.outcome == "timeout"
        (silence,) = site.cluster.ask("outside", node, other, timeout=SILENCE)
        assert silence.outcome == "timeout"
    finally:
        for port in (health, other):
            site.cluster.request("node", "close", protocol="tcp", ip=node, port=port)


def test_neighbour_cannot_reach_what_listens_on_localhost_only(site: Site) -> None:
    """CVE-2020-8558: with route_localnet, packets to 127.0.0.1 from the network would arrive."""
    site.cluster.request("node", "listen", protocol="tcp", ip="127.0.0.1", port=10255)
    setting = "/proc/sys/net/ipv4/conf/all/route_localnet"
    try:
        site.plane.clear()
        (open_door,) = site.cluster.ask("neighbour", "127.0.0.1", 10255)
        assert open_door.who == "node"  # the attack is a real one
        if not site.plane.traits.guards_localhost:
            # Who has no use for it leaves it alone, and the door stays shut by itself.
            site.cluster.request("node", "write", path=setting, text="0")
        site.plane.load()
        (shut,) = site.cluster.ask("neighbour", "127.0.0.1", 10255, timeout=SILENCE)
        assert shut.outcome == "timeout"
        (own,) = site.cluster.ask("node", "127.0.0.1", 10255)
        assert own.who == "node"
    finally:
        site.cluster.request("node", "write", path=setting, text="1")
        site.cluster.request("node", "close", protocol="tcp", ip="127.0.0.1", port=10255)


# --- Many Services together -------------------------------------------------------------------


def test_recorded_cluster_serves_dual_stack_and_every_port(site: Site) -> None:
    """The objects that kube-proxy's rules were recorded with, as a whole."""
    site.plane.load(*cluster_objects())
    for family in FAMILIES:
        for forwarding in site.plane.table(family):
            source = own_address("pod", family)
            ways = site.plane.predict(
                "client", source, forwarding.cluster_ip, forwarding.port, forwarding.protocol
            )
            ends = forwarding.local if forwarding.internal_local else forwarding.cluster
            expected: Fate = served(*map(str, ends), masquerade=False)
            if forwarding.internal != "forward":
                none_here = site.plane.traits.none_inside
                expected = {"reject": REFUSED, "drop": none_here}[forwarding.internal]
                replies = site.cluster.ask(
                    "client", forwarding.cluster_ip, forwarding.port, forwarding.protocol,
                    timeout=SILENCE if expected == DROPPED else PATIENCE,
                )  # fmt: skip
                assert fate_of(replies) == expected, forwarding.name
            if ways is not None:
                assert fate_in(ways) == expected, forwarding.name
