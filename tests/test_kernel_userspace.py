"""The userspace mode with real packets: portal rules in a network namespace, and the process
behind them, in the middle of netcluster.py's drawing.

Every frontend is asked from a Pod, the node and outside, and what becomes of it must be what
proxy/table.py decides. Two things differ from the other modes by design, see DIFFERENCES.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from forwarding import exposed, snapshot_of
from netcluster import (
    BRIDGE_ADDRESS,
    CLUSTER_CIDR,
    NODE_ADDRESS,
    NODE_NAME,
    OUTSIDE,
    PATIENCE,
    SILENCE,
    NetCluster,
    Reply,
    lan,
)
from traffic import (
    CLUSTER_IP,
    FAMILIES,
    LB_IP,
    NODE_PORT,
    PORT,
    WHERE,
    at,
    backed,
    cluster_or_skip,
    frontends,
    on,
    web,
)
from userspace_node import UserspaceNode

from kdns.proxy.options import Detector, Family, NodeView, Options
from kdns.proxy.table import ForwardingTable, Origin, TableCompiler, decide
from kdns.proxy.userspace import CHAINS, NON_LOCAL, PORTALS_CONTAINER
from kdns.registry.objects import Object
from kdns.registry.snapshot import Changes, Snapshot, everything

# What scenarios of other modes ask for, and why it is otherwise here.
DIFFERENCES = {
    "the client's own address reaches the endpoint": "the process connects, not the client",
    "SCTP is forwarded": "the mode never had it; Services with SCTP ports are told of in the log",
    "a client outside the source ranges gets silence": "it is seen once it is accepted: reset",
}

pytestmark = pytest.mark.root
ORIGINS: tuple[Origin, ...] = ("pod", "node", "outside")


class Site:
    """The cluster and the node's process, as scenarios talk to them."""

    def __init__(self, cluster: NetCluster, variant: str) -> None:
        self.cluster = cluster
        self.node = UserspaceNode(cluster, variant)
        self.compilers: dict[Family, TableCompiler] = {}
        self.snapshot = Snapshot()
        self.options: dict[Family, Options] = {}

    def load(self, *objects: Object, **settings: Any) -> None:
        """Begin with these objects. settings -- of Options"""
        self.snapshot = snapshot_of(*objects)
        for family in FAMILIES:
            mine = {"detector": Detector("cidr", CLUSTER_CIDR[family]), **settings}
            if "node_port_addresses" in mine:
                mine["node_port_addresses"] = tuple(
                    ip for ip in mine["node_port_addresses"] if (":" in ip) == (family == 6)
                )
            self.options[family] = Options(family, **mine)
            node = NodeView(NODE_NAME, NODE_ADDRESS[family], "z-a")
            self.compilers[family] = TableCompiler(family, node)
            self.compilers[family].update(self.snapshot, everything(self.snapshot))
        self.node.begin(self.options, {f: NODE_ADDRESS[f] for f in FAMILIES})
        self.node.sync(self.tables())
        self.cluster.request("node", "forget")

    def change(self, *objects: Object) -> None:
        """These are the objects now: a partial sync."""
        before, self.snapshot = self.snapshot, snapshot_of(*objects)
        touched = everything(before).services | everything(self.snapshot).services
        for compiler in self.compilers.values():
            compiler.update(self.snapshot, Changes(services=touched))
        self.node.sync(self.tables(), touched)

    def tables(self) -> dict[Family, ForwardingTable]:
        return {family: one.table for family, one in self.compilers.items()}

    def ask(self, origin: str, ip: str, port: int, protocol: str = "tcp", times: int = 1,
            silent: bool = False, source: str = "") -> list[Reply]:  # fmt: skip
        return self.cluster.ask(
            WHERE.get(origin, origin), ip, port, protocol, times=times,
            sources=[source] if source else [], timeout=SILENCE if silent else PATIENCE,
        )  # fmt: skip

    def expect_decided(self, family: Family, protocol: str = "tcp") -> None:
        """Ask every frontend of web() from everywhere; compare with the table's decision."""
        (forwarding,) = self.tables()[family]
        for kind, ip, port in frontends(family):
            for origin in ORIGINS:
                decision = decide(forwarding, kind, origin)  # type: ignore[arg-type]
                expected = {
                    "forward": "answered", "reject": "refused", "drop": "timeout"
                }[decision.verdict]  # fmt: skip
                times = 2 * len(decision.endpoints) or 1
                replies = self.ask(
                    origin, ip, port, protocol, times, silent=decision.verdict == "drop"
                )
                who = f"{protocol} from {origin} to {kind} {ip} port {port}"
                assert {one.outcome for one in replies} == {expected}, who
                if decision.verdict == "forward":
                    assert {one.at for one in replies} == set(map(str, decision.endpoints)), who
                    assert all(one.masqueraded for one in replies), who
                    mine = {NODE_ADDRESS[family], BRIDGE_ADDRESS[family]}
                    assert {one.peer_ip for one in replies} <= mine, who

    def saved(self, family: Family) -> str:
        name = f"{'iptables' if family == 4 else 'ip6tables'}-{self.node.variant}-save"
        return self.cluster.run("node", name)


@pytest.fixture(scope="module")
def cluster() -> Iterator[NetCluster]:
    with cluster_or_skip() as made:
        yield made


@pytest.fixture(scope="module", params=("nft", "legacy"))
def site(request: pytest.FixtureRequest, cluster: NetCluster) -> Iterator[Site]:
    site = Site(cluster, request.param)
    try:
        yield site
        site.node.cleanup()
    finally:
        site.node.close()


# --- who is forwarded where -------------------------------------------------------------------

LOCAL = {"externalTrafficPolicy": "Local"}
SCENARIOS: dict[str, tuple[dict[str, Any], list[tuple[int, int]]]] = {
    # policies, endpoints as (node, number)
    "endpoints here and elsewhere": ({}, [(1, 10), (1, 20), (2, 10)]),
    "external policy Local": (LOCAL, [(1, 10), (2, 10)]),
    "external policy Local, nobody here": (LOCAL, [(2, 10), (2, 11)]),
    "internal policy Local": ({"internalTrafficPolicy": "Local"}, [(1, 10), (2, 10)]),
    "internal policy Local, nobody here": ({"internalTrafficPolicy": "Local"}, [(2, 10)]),
    "no endpoints": ({}, []),
    "no endpoints, policies Local": ({**LOCAL, "internalTrafficPolicy": "Local"}, []),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("protocol", ("tcp", "udp"))
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_frontend_does_what_the_table_decides(
    site: Site, scenario: str, protocol: str, family: Family
) -> None:
    policies, where = SCENARIOS[scenario]
    endpoints = [on(node, number, family) for node, number in where]
    word = protocol.upper()
    site.load(
        web(family, protocol=word, **policies), backed(*endpoints, family=family, protocol=word)
    )
    site.expect_decided(family, protocol)


@pytest.mark.parametrize("family", FAMILIES)
def test_endpoints_that_come_and_go_need_no_rule_to_change(site: Site, family: Family) -> None:
    service = web(family)
    site.load(service, backed(on(1, 10, family), family=family))
    before = site.saved(family)
    site.change(service, backed(on(1, 20, family), on(2, 10, family), family=family))
    site.expect_decided(family)
    site.change(service)
    site.expect_decided(family)
    site.change(service, backed(on(1, 11, family), family=family))
    site.expect_decided(family)
    rules = [line for line in before.splitlines() if line.startswith("-A")]
    assert rules == [line for line in site.saved(family).splitlines() if line.startswith("-A")]


@pytest.mark.parametrize("family", FAMILIES)
def test_load_balancer_is_for_its_source_ranges_only(site: Site, family: Family) -> None:
    good, bad = OUTSIDE[family][0], lan("outside", family)
    ranges = [f"{good}/{32 if family == 4 else 128}"]
    site.load(
        web(family, loadBalancerSourceRanges=ranges), backed(on(1, 10, family), family=family)
    )
    (admitted,) = site.ask("outside", LB_IP[family], PORT, source=good)
    assert (admitted.outcome, admitted.at) == ("answered", at(10, family))
    (refused,) = site.ask("outside", LB_IP[family], PORT, source=bad)
    assert refused.outcome != "answered"
    (others,) = site.ask("outside", NODE_ADDRESS[family], NODE_PORT, source=bad)
    assert others.outcome == "answered", "the ranges are the load balancer's alone"


@pytest.mark.parametrize("family", FAMILIES)
def test_nobody_comes_to_a_door_but_through_a_portal(site: Site, family: Family) -> None:
    site.load(web(family), backed(on(1, 10, family), family=family))
    word = "--to-ports "
    rules = [line for line in site.saved(family).splitlines() if word in line]
    ports = {int(line.split(word)[1].split()[0]) for line in rules}
    (port,) = ports
    for origin in ORIGINS:
        (reply,) = site.ask(origin, NODE_ADDRESS[family], port)
        assert reply.outcome == "refused", origin


def test_node_ports_on_localhost_for_the_node_alone(site: Site) -> None:
    objects = (web(), backed(on(1, 10)))
    site.load(*objects)
    (reply,) = site.ask("localhost", "127.0.0.1", NODE_PORT)
    assert reply.at == at(10)
    (hostile,) = site.ask("neighbour", "127.0.0.1", NODE_PORT, silent=True)
    assert hostile.outcome != "answered"
    site.load(*objects, localhost_node_ports=False)
    (reply,) = site.ask("localhost", "127.0.0.1", NODE_PORT)
    assert reply.outcome == "refused"


def test_node_ports_on_chosen_addresses_only(site: Site) -> None:
    site.load(web(), backed(on(1, 10)), node_port_addresses=(NODE_ADDRESS[4],))
    (reply,) = site.ask("outside", NODE_ADDRESS[4], NODE_PORT)
    assert reply.at == at(10)
    (other,) = site.ask("pod", BRIDGE_ADDRESS[4], NODE_PORT)
    assert other.outcome == "refused"


def test_node_ports_pass_a_host_firewall(site: Site) -> None:
    """One that lets in only what belongs to connections it has let in."""
    site.load(web(), backed(on(1, 10)))
    program = f"iptables-{site.node.variant}"
    rule = "-i eth0 -p tcp -m conntrack --ctstate NEW -j DROP".split()
    site.cluster.run("node", program, "-A", "INPUT", *rule)
    try:
        (reply,) = site.ask("outside", NODE_ADDRESS[4], NODE_PORT)
        assert reply.at == at(10)
        (inner,) = site.ask("outside", NODE_ADDRESS[4], 10250, silent=True)
        assert inner.outcome == "timeout"
    finally:
        site.cluster.run("node", program, "-D", "INPUT", *rule)


# --- dead endpoints, affinity, what stays ---------------------------------------------------------


def test_a_dead_endpoint_costs_no_connection(site: Site) -> None:
    """10.244.1.99 is nobody's, and port 8080 of 10.244.1.5 nobody listens on."""
    site.load(web(), backed(on(1, 10), on(1, 5), on(1, 11)))
    replies = site.ask("pod", CLUSTER_IP[4], PORT, times=12)
    assert {one.outcome for one in replies} == {"answered"}
    assert {one.at for one in replies} == {at(10), at(11)}
    assert site.node.metric("kdns_userspace_dial_failures_total", "IPv4", "tcp") > 0


def test_a_client_stays_with_its_endpoint(site: Site) -> None:
    site.load(web(sessionAffinity="ClientIP"), backed(*[on(1, n) for n in (10, 11, 12, 20, 21)]))
    (first,) = site.ask("pod", CLUSTER_IP[4], PORT)
    again = site.ask("pod", CLUSTER_IP[4], PORT, times=10)
    through = site.ask("pod", NODE_ADDRESS[4], NODE_PORT, times=3)
    assert {one.at for one in (*again, *through)} == {first.at}
    (other,) = site.ask("outside", NODE_ADDRESS[4], NODE_PORT)
    assert {o.at for o in site.ask("outside", NODE_ADDRESS[4], NODE_PORT, times=5)} == {other.at}


def test_connections_outlive_their_endpoint_and_their_service(site: Site) -> None:
    site.load(web(), backed(on(1, 10)))
    stays = site.cluster.open("client", CLUSTER_IP[4], PORT)
    assert stays.again().at == at(10)
    site.change(web(), backed(on(1, 20)))
    assert stays.again().at == at(10)
    (fresh,) = site.ask("pod", CLUSTER_IP[4], PORT)
    assert fresh.at == at(20)
    site.change()
    assert stays.again().at == at(10)
    (gone,) = site.ask("pod", CLUSTER_IP[4], PORT)
    assert gone.outcome != "answered"
    stays.close()


def test_a_udp_client_that_never_rests_leaves_an_endpoint_that_is_gone(site: Site) -> None:
    service = web(protocol="UDP")
    site.load(service, backed(on(1, 10), protocol="UDP"))
    flow = site.cluster.open("client", CLUSTER_IP[4], PORT, "udp")
    assert flow.again().at == at(10)
    site.change(service, backed(on(1, 20), protocol="UDP"))
    assert flow.again().at == at(20)
    flow.close()


# --- what the kernel holds --------------------------------------------------------------------


def damages(variant: str) -> dict[str, list[str]]:
    program = f"iptables-{variant}"
    return {
        "a chain emptied": [program, "-t", "nat", "-F", PORTALS_CONTAINER],
        "a table flushed": [program, "-t", "nat", "-F"],
        "a jump deleted": [program, "-t", "filter", "-D", "INPUT", "1"],
    }


@pytest.mark.parametrize("damage", damages("nft"))
def test_what_somebody_else_destroys_is_found_and_healed(site: Site, damage: str) -> None:
    site.load(web(), backed(on(1, 10)))
    whole = site.saved(4)
    assert site.node.verify()
    site.cluster.run("node", *damages(site.node.variant)[damage])
    assert not site.node.verify()
    site.node.sync(site.tables(), full=True)
    assert site.node.verify()

    def rules(text: str) -> list[str]:
        return sorted(line for line in text.splitlines() if line.startswith("-A"))

    assert rules(site.saved(4)) == rules(whole)
    site.expect_decided(4)


@pytest.mark.parametrize("family", FAMILIES)
def test_rules_change_singly_and_end_as_a_fresh_node_has_them(site: Site, family: Family) -> None:
    names = [f"svc{n}" for n in range(6)]

    def objects(some: list[str]) -> list[Object]:
        base = "10.96.1." if family == 4 else "fd00:10:96::1:"
        return [
            exposed(name, ip=f"{base}{1 + names.index(name)}",
                    node_port=31000 + names.index(name)) for name in some
        ]  # fmt: skip

    site.load(*objects(names[:4]))
    site.change(*objects([names[5], *names[1:4]]))
    site.change(*objects(names[1:]))
    assert site.node.verify()
    changed = [line for line in site.saved(family).splitlines() if line.startswith("-A KUBE")]
    site.load(*objects(names[1:]))
    fresh = [line for line in site.saved(family).splitlines() if line.startswith("-A KUBE")]
    assert changed == fresh


@pytest.mark.parametrize("family", FAMILIES)
def test_clean_up_leaves_what_is_not_ours(site: Site, family: Family) -> None:
    program = f"{'iptables' if family == 4 else 'ip6tables'}-{site.node.variant}"
    site.node.cleanup()
    before = site.cluster.run("node", program, "-S")
    site.cluster.run("node", program, "-t", "nat", "-N", "KUBE-OF-SOMEBODY")
    site.load(web(family), backed(on(1, 10, family), family=family))
    assert NON_LOCAL in site.saved(family)
    site.node.cleanup()
    text = site.saved(family)
    assert not [chain for chains in CHAINS.values() for chain in chains if chain in text]
    assert "KUBE-OF-SOMEBODY" in text
    site.cluster.run("node", program, "-t", "nat", "-X", "KUBE-OF-SOMEBODY")
    assert site.cluster.run("node", program, "-S") == before
