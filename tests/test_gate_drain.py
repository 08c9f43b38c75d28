"""What is forwarded for clients that still remember a name, and what ends it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import pytest
from forwarding import NODE1, exposed, slice_of, snapshot_of
from objects import endpoint, external, service

from kdns.kernel.conntrack import ADDRESS_FAMILY
from kdns.kernel.destinations import find_used
from kdns.kernel.netlink import attribute, message, nest
from kdns.proxy.drain import Drain, Place, Policy
from kdns.proxy.iptables import render_rules
from kdns.proxy.nftables import render_rules as render_nftables
from kdns.proxy.options import Options
from kdns.proxy.table import Forwarding, ForwardingTable, TableCompiler
from kdns.registry.objects import EndpointSlice, Key, Object
from kdns.registry.snapshot import Snapshot, everything

WEB: Key = ("default", "web")
IP, OTHER = "10.96.0.50", "10.96.0.60"
TTL = 30.0


class Node:
    """One node's IPv4 table, driven by hand."""

    def __init__(self, *objects: Object, policy: Policy = "ttl") -> None:
        self.now = 100.0
        self.compiler = TableCompiler(4, NODE1)
        self.drain = Drain(self.compiler.table, NODE1, policy)
        self.known = Snapshot()
        self.have(*objects)

    def have(self, *objects: Object) -> Collection[Key]:
        """Have these objects and no others; return whose rules are others now."""
        after = snapshot_of(*objects)
        changes = everything(after)
        touched = changes.services | everything(self.known).services
        changed = self.compiler.update(after, replace(changes, services=touched))
        found = self.drain.update(
            self.compiler.table, changed, touched, self.known, after, NODE1, self.now, TTL
        )
        self.known = after
        return found

    def later(self, seconds: float, used: Collection[Place] | None = None) -> Collection[Key]:
        self.now += seconds
        return self.drain.expire(self.now, used)

    @property
    def table(self) -> ForwardingTable:
        return self.drain.table

    def forwards(self, key: Key = WEB) -> dict[str, list[str]]:
        """Return where a Service's ClusterIPs and NodePorts lead."""
        return {
            f"{place.address or '*'}:{place.port}": [str(e) for e in one.cluster]
            for one in self.table.services.get(key, ())
            for place in one.frontends
        }


def ends(*numbers: int, name: str = "") -> EndpointSlice:
    return slice_of("web", *(endpoint(f"10.244.1.{n}") for n in numbers), name=name)


def at(*numbers: int) -> list[str]:
    return [f"10.244.1.{n}:80" for n in numbers]


def test_a_deleted_service_is_forwarded_as_it_was_for_the_ttl() -> None:
    node = Node(service("web"), ends(1, 2))
    before = node.table.services
    assert node.have() == ()  # nothing is to be written
    assert node.table.services == before
    assert node.drain.told(node.now) == {WEB: TTL}
    assert node.drain.deadline() == node.now + TTL
    assert node.later(TTL - 1) == ()
    assert node.later(1) == (WEB,)
    assert node.table.services == {}
    assert node.drain.deadline() is None


@pytest.mark.parametrize(
    ("after", "kept"),
    [
        ([external("web", "example.org")], {f"{IP}:80": at(1)}),
        ([service("web", ip="None"), ends(1)], {f"{IP}:80": at(1)}),
        ([service("web", ip=OTHER), ends(1)], {f"{IP}:80": at(1), f"{OTHER}:80": at(1)}),
        ([service("web", ports=[("http", 81, "TCP")]), ends(1)],
         {f"{IP}:80": at(1), f"{IP}:81": at(1)}),
        ([service("web", ports=[("http", 80, "UDP")]), ends(1)], {f"{IP}:80": []}),
        ([service("web"), ends(1)], {f"{IP}:80": at(1)}),
    ],
)  # fmt: skip
def test_what_is_no_more_is_kept_beside_what_is_new(
    after: list[Object], kept: dict[str, list[str]]
) -> None:
    node = Node(service("web"), ends(1))
    node.have(*after)
    assert node.forwards().keys() == kept.keys()
    if "UDP" not in str(after):
        assert node.forwards() == kept
    node.later(TTL)
    assert node.table is node.compiler.table


def test_names_of_chains_are_no_two_ports() -> None:
    node = Node(service("web"), ends(1))
    node.have(service("web", ip=OTHER), ends(1))
    node.have(service("web", ip="10.96.0.70"), ends(1))
    names = [one.name for one in node.table]
    assert len(set(names)) == 3
    assert "default/web:http" in names
    assert "default/web:http-draining-10-96-0-50-80" in names
    # As programs take them.
    for text in (render_rules(node.table, Options()), render_nftables(node.table, Options())):
        for ip in (IP, OTHER, "10.96.0.70"):
            assert ip in text


def test_who_comes_again_takes_its_own_place_without_a_write() -> None:
    node = Node(service("web"), ends(1))
    node.have()
    assert node.have(service("web"), ends(1)) == ()
    assert node.table is node.compiler.table
    assert node.later(2 * TTL) == ()
    assert node.forwards() == {f"{IP}:80": at(1)}


def test_an_address_that_another_service_gets_is_given_up_at_once() -> None:
    node = Node(service("web"), ends(1))
    node.have()
    new = slice_of("new", endpoint("10.244.1.9"))
    changed = node.have(service("new"), new)
    assert set(changed) == {WEB, ("default", "new")}
    assert node.forwards() == {}
    assert node.forwards(("default", "new")) == {f"{IP}:80": at(9)}


def test_a_node_port_that_another_service_gets_is_given_up_and_the_rest_is_not() -> None:
    node = Node(exposed("web", node_port=30080), ends(1))
    mine = node.compiler.table.services[WEB][0]
    node.have()
    assert f"{mine.cluster_ip}:{mine.port}" in node.forwards() and "*:30080" in node.forwards()
    other = exposed("new", node_port=30080, clusterIP=OTHER, clusterIPs=[OTHER])
    node.have(other)
    assert f"{mine.cluster_ip}:{mine.port}" in node.forwards()
    assert "*:30080" not in node.forwards()


def test_an_external_ip_that_somebody_else_had_all_along_is_theirs() -> None:
    first = service("a", externalIPs=["192.0.2.9"])
    second = service("b", ip=OTHER, externalIPs=["192.0.2.9"])
    slices = [slice_of(name, endpoint(f"10.244.1.{n}")) for n, name in ((1, "a"), (2, "b"))]
    node = Node(first, second, *slices)
    node.have(second, slices[1])
    assert node.forwards(("default", "a")) == {f"{IP}:80": at(1)}
    assert node.forwards(("default", "b"))["192.0.2.9:80"] == at(2)


@pytest.mark.parametrize(
    ("slices", "left"),
    [
        ([], at(1, 2)),  # garbage, collected after the Service
        ([ends(1, 2)], at(1, 2)),
        ([ends(2)], at(2)),  # a Pod has gone
        ([ends(1, 2), ends(7, name="web-2")], at(1, 2)),  # nobody's any more
        ([ends()], None),
    ],
)
def test_endpoints_that_go_leave_it_and_with_the_last_it_ends(
    slices: list[EndpointSlice], left: list[str] | None
) -> None:
    node = Node(service("web"), ends(1, 2))
    node.have(ends(1, 2))
    node.have(*slices)
    assert node.forwards() == ({} if left is None else {f"{IP}:80": left})


def test_a_service_without_endpoints_is_not_kept() -> None:
    node = Node(service("web"))
    node.have()
    assert node.table is node.compiler.table


def test_the_health_check_of_a_load_balancer_ends_at_once() -> None:
    one = exposed(
        "web", node_port=30080, type="LoadBalancer", externalTrafficPolicy="Local",
        healthCheckNodePort=32000,
    )  # fmt: skip
    node = Node(one, slice_of("web", endpoint("10.244.1.1", nodeName=NODE1.name)))
    assert ports_checked(node.table) == {32000}
    node.have()
    assert node.forwards() and ports_checked(node.table) == {0}


def ports_checked(table: ForwardingTable) -> set[int]:
    return {one.health_check_node_port for one in table}


def test_policy_none_keeps_nothing() -> None:
    node = Node(service("web"), ends(1), policy="none")
    assert node.have() == (WEB,)
    assert node.table.services == {}


# --- until connections need it no more --------------------------------------------------------


def test_rules_stay_until_no_connection_uses_them() -> None:
    node = Node(service("web"), ends(1), policy="conntrack")
    node.have()
    assert node.drain.places() == {(IP, 80, "tcp")}
    assert node.drain.deadline() == node.now + 1
    assert node.later(0.5, used=set()) == ()  # who has looked it up is about to connect
    assert node.later(0.6, used={(IP, 80, "tcp")}) == ()
    assert node.later(100, used=None) == ()  # nobody could look
    assert node.drain.told(node.now) == {WEB: None}
    assert node.later(1, used={("10.96.0.1", 443, "tcp")}) == (WEB,)
    assert node.table.services == {}


def test_but_not_for_ever() -> None:
    node = Node(service("web"), ends(1), policy="conntrack")
    node.have()
    assert node.later(3600, used={(IP, 80, "tcp")}) == (WEB,)


def test_where_connections_cannot_be_read_time_decides() -> None:
    node = Node(service("web"), ends(1), policy="conntrack")
    node.have()
    node.drain.fall_back(node.now + TTL)
    assert node.later(TTL - 1) == ()
    assert node.later(1) == (WEB,)


def connection(destination: bytes, port: int, protocol: int = 6) -> bytes:
    """Return a message of the kernel's table, as far as it is read."""
    size = len(destination)
    source, target = {4: (1, 2), 16: (3, 4)}[size]
    ips = nest(1, attribute(source, bytes(size)), attribute(target, destination))
    proto = nest(
        2, attribute(1, bytes((protocol,))), attribute(2, b"\x80\x00"),
        attribute(3, port.to_bytes(2, "big")),
    )  # fmt: skip
    return message(0x100, 0, 0, bytes((ADDRESS_FAMILY[4], 0, 0, 0)) + nest(1, ips, proto))


DONE = message(3, 0, 0, bytes(4))
PLACES: list[Place] = [(IP, 80, "tcp"), (IP, 53, "udp"), ("", 30080, "tcp"), ("fd00::1", 80, "tcp")]


@pytest.mark.parametrize(
    ("flow", "found"),
    [
        (connection(bytes((10, 96, 0, 50)), 80), {(IP, 80, "tcp")}),
        (connection(bytes((10, 96, 0, 50)), 53, 17), {(IP, 53, "udp")}),
        (connection(bytes((10, 96, 0, 50)), 53, 6), set()),
        (connection(bytes((10, 96, 0, 51)), 80), set()),
        (connection(bytes((192, 0, 2, 7)), 30080), {("", 30080, "tcp")}),
        (connection(b"\xfd" + bytes(14) + b"\1", 80), {("fd00::1", 80, "tcp")}),
        (connection(bytes((10, 96, 0, 50)), 80, 1), set()),  # no ports
        (message(0x100, 0, 0, b"\2\0\0\0"), set()),
    ],
)
def test_destinations_are_found_among_connections(flow: bytes, found: set[Place]) -> None:
    assert find_used([flow + DONE, connection(bytes((10, 96, 0, 50)), 80)], PLACES) == found


def test_settings_of_a_service_are_kept_with_it() -> None:
    node = Node(service("web", sessionAffinity="ClientIP"), ends(1))
    kept: Forwarding = node.table.services[WEB][0]
    node.have()
    assert kept.affinity
    assert node.table.services[WEB] == (kept,)
