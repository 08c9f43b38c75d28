"""Which UDP flows are stale after a sync (reference 1.11), and reading them from netlink."""

from __future__ import annotations

import struct
from functools import partial
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdns.kernel.conntrack import ATTEMPTS, Dump, collect_flows, parse_flow, retried
from kdns.kernel.netlink import (
    NLM_F_DUMP_INTR,
    NLMSG_DONE,
    attribute,
    attributes,
    message,
    messages,
    nest,
)
from kdns.proxy.conntrack import (
    AddressSet,
    Flow,
    compile_check,
    misled_frontends,
    node_port_networks,
)
from kdns.proxy.options import Family, Options, Protocol
from kdns.proxy.table import Forwarding, ForwardingTable
from kdns.registry.endpoints import Endpoint

VIP, EXTERNAL, BALANCER, NODE = "10.96.0.10", "203.0.113.7", "203.0.113.9", "192.168.77.1"
LOCAL = ("127.0.0.0/8", NODE)
OLD, NEW, REMOTE = "10.244.1.5:5353", "10.244.1.6:5353", "10.244.2.7:5353"
DNS = ("kube-system", "kube-dns")


def _split(text: str) -> tuple[str, int]:
    ip, _, port = text.rpartition(":")
    return ip.strip("[]"), int(port)


def forwarding(
    *endpoints: str,
    vip: str = VIP,
    port: int = 53,
    protocol: Protocol = "udp",
    external_ips: tuple[str, ...] = (EXTERNAL,),
    load_balancer_ips: tuple[str, ...] = (BALANCER,),
    node_port: int = 30053,
    serving: tuple[str, ...] = (),
) -> Forwarding:
    """serving -- endpoints that get no new flows, besides `endpoints`."""
    found = tuple(Endpoint(*_split(text)) for text in endpoints)
    return Forwarding(
        DNS,
        "kube-system/kube-dns:dns",
        protocol,
        vip,
        port,
        node_port,
        external_ips,
        load_balancer_ips,
        cluster=found,
        has_endpoints=bool(endpoints),
        serving=tuple(Endpoint(*_split(text)) for text in (*endpoints, *serving)),
    )


def table(*forwardings: Forwarding, family: Family = 4, **others: Forwarding) -> ForwardingTable:
    services = {DNS: forwardings} if forwardings else {}
    return ForwardingTable(
        family, 0, {**services, **{("other", name): (one,) for name, one in others.items()}}
    )


def flow(destination: str, reply: str = "", protocol: Protocol = "udp") -> Flow:
    """A client's flow; without `reply` nothing has translated it."""
    address, port = _split(destination)
    answer, answer_port = _split(reply or destination)
    client = "10.244.9.9" if ":" not in address else "fd00::9"
    return Flow(
        protocol,
        ip_address(client).packed,
        40000,
        ip_address(address).packed,
        port,
        ip_address(answer).packed,
        answer_port,
    )


def stale(before: ForwardingTable, after: ForwardingTable, *flows: Flow) -> list[Flow]:
    misled = misled_frontends(before, after, {*before.services, *after.services})
    assert misled, "nothing changed"
    check = compile_check(misled, after)
    # Whoever reads flows reads only those to these ports.
    return [one for one in check.stale(flows, LOCAL) if one.destination_port in check.ports]


FRONTENDS = (f"{VIP}:53", f"{EXTERNAL}:53", f"{BALANCER}:53", f"{NODE}:30053", "127.0.0.1:30053")
NOTHING = table()


@pytest.mark.parametrize("destination", FRONTENDS)
@pytest.mark.parametrize(
    ("what", "after"),
    [
        ("the endpoint moved", table(forwarding(NEW))),
        ("scaled to zero", table(forwarding())),
        ("the Service is gone", NOTHING),
        ("no port is UDP any more", table(forwarding(OLD, protocol="tcp"))),
        (
            "every frontend is another",
            table(forwarding(OLD, vip="10.96.0.11", port=54, node_port=30054)),
        ),
        (
            "the endpoint has another port",
            table(forwarding("10.244.1.5:53")),
        ),
    ],
)
def test_a_flow_that_is_led_wrong_is_stale(
    what: str, after: ForwardingTable, destination: str
) -> None:
    before = table(forwarding(OLD))
    wrong = flow(destination, OLD)
    assert stale(before, after, wrong) == [wrong], what


@pytest.mark.parametrize("destination", FRONTENDS)
@pytest.mark.parametrize("endpoint", [NEW, REMOTE])
def test_a_flow_to_an_endpoint_that_serves_is_kept(destination: str, endpoint: str) -> None:
    """Also to one that gets no new flows: it drains, or policies or hints leave it out."""
    before = table(forwarding(OLD, NEW, REMOTE))
    after = table(forwarding(REMOTE, serving=(NEW,)))
    assert stale(before, after, flow(destination, endpoint)) == []


@pytest.mark.parametrize(
    ("what", "other"),
    [
        ("TCP", flow(f"{VIP}:53", OLD, "tcp")),
        ("SCTP", flow(f"{VIP}:53", OLD, "sctp")),
        ("another port of the VIP", flow(f"{VIP}:54", OLD)),
        ("another VIP", flow("10.96.0.99:53", OLD)),
        ("straight to the endpoint", flow(OLD)),
        ("the node port's number at an address elsewhere", flow("198.51.100.1:30053", OLD)),
        ("the Service's port at the node", flow(f"{NODE}:53", OLD)),
        ("another family", flow("[fd00::10]:53", f"[fd00::1]:{53}")),
    ],
)
def test_flows_that_are_not_ours_are_kept(what: str, other: Flow) -> None:
    assert stale(table(forwarding(OLD)), NOTHING, other) == [], what


@pytest.mark.parametrize("destination", FRONTENDS)
def test_a_flow_that_nobody_led_anywhere_goes_when_there_are_endpoints(destination: str) -> None:
    """A client that sent before there were rules would else never reach the Service."""
    lost = flow(destination)
    assert stale(NOTHING, table(forwarding(NEW)), lost) == [lost]
    assert stale(table(forwarding()), table(forwarding(NEW)), lost) == [lost]


@pytest.mark.parametrize("destination", FRONTENDS)
def test_a_flow_to_an_address_that_is_no_frontend_any_more_may_be_answered_by_it(
    destination: str,
) -> None:
    """The node's own server on what was a node port, say."""
    assert stale(table(forwarding(OLD)), NOTHING, flow(destination)) == []


def test_a_vip_that_another_service_took_over_leads_to_the_other() -> None:
    before = table(forwarding(OLD))
    after = table(heir=forwarding(NEW))
    left, taken = flow(f"{VIP}:53", OLD), flow(f"{VIP}:53", NEW)
    assert stale(before, after, left, taken) == [left]


def test_an_external_ip_that_two_services_claim_keeps_the_flows_of_the_other() -> None:
    other = forwarding(REMOTE, vip="10.96.0.99", node_port=30099)
    kept = flow(f"{EXTERNAL}:53", REMOTE)
    assert stale(table(forwarding(OLD), other=other), table(other=other), kept) == []


def test_an_external_ip_of_the_node_with_a_node_ports_number_keeps_its_own_endpoints() -> None:
    other = forwarding(REMOTE, vip="10.96.0.99", port=30053, external_ips=(NODE,), node_port=0)
    kept, wrong = flow(f"{NODE}:30053", REMOTE), flow("127.0.0.1:30053", REMOTE)
    before, after = table(forwarding(OLD), other=other), table(forwarding(NEW), other=other)
    assert stale(before, after, kept, wrong) == [wrong]


def test_two_ports_of_one_service_do_not_answer_for_each_other() -> None:
    def ports(first: str, second: str) -> ForwardingTable:
        return table(forwarding(first, node_port=0), forwarding(second, port=54, node_port=0))

    crossed = flow(f"{VIP}:53", NEW)
    assert stale(ports(OLD, OLD), ports(OLD, NEW), crossed) == [crossed]


def test_ipv6() -> None:
    vip, old, new = "fd00:10:96::a", "[fd00:10:244::5]:53", "[fd00:10:244::6]:53"

    def of(endpoint: str) -> ForwardingTable:
        one = forwarding(endpoint, vip=vip, external_ips=(), load_balancer_ips=(), node_port=0)
        return table(one, family=6)

    wrong, right = flow(f"[{vip}]:53", old), flow(f"[{vip}]:53", new)
    assert stale(of(old), of(new), wrong, right) == [wrong]


@pytest.mark.parametrize(
    ("what", "before", "after"),
    [
        ("nothing at all", NOTHING, NOTHING),
        ("the same", table(forwarding(OLD)), table(forwarding(OLD))),
        ("one endpoint more", table(forwarding(OLD)), table(forwarding(OLD, NEW))),
        ("another order", table(forwarding(OLD, NEW)), table(forwarding(NEW, OLD))),
        ("only TCP", table(forwarding(OLD, protocol="tcp")), table(forwarding(protocol="tcp"))),
        ("only SCTP", table(forwarding(OLD, protocol="sctp")), NOTHING),
    ],
)
def test_no_flow_is_looked_at_when(
    what: str, before: ForwardingTable, after: ForwardingTable
) -> None:
    assert not misled_frontends(before, after, {*before.services, *after.services}), what


def test_services_that_are_not_said_to_have_changed_are_not_compared() -> None:
    assert not misled_frontends(table(forwarding(OLD)), table(forwarding(NEW)), ())


def test_all_flows_are_looked_at_on_demand() -> None:
    """After a failure nobody knows what the kernel holds."""
    same = table(forwarding(NEW), other=forwarding(protocol="tcp", vip="10.96.0.99"))
    check = compile_check(misled_frontends(same, same, None), same)
    wrong, right = flow(f"{VIP}:53", OLD), flow(f"{VIP}:53", NEW)
    assert list(check.stale([wrong, right], LOCAL)) == [wrong]
    assert check.ports == {53, 30053}


def test_a_flow_is_spelled_for_people() -> None:
    assert str(flow(f"{VIP}:53", OLD)) == (
        "udp 10.244.9.9:40000 -> 10.96.0.10:53 answered by 10.244.1.5:5353"
    )
    assert (
        str(flow("[fd00::a]:53")) == "udp [fd00::9]:40000 -> [fd00::a]:53 answered by [fd00::a]:53"
    )


@given(
    st.lists(
        st.ip_addresses().flatmap(
            lambda ip: st.integers(0, ip.max_prefixlen).map(lambda bits: f"{ip}/{bits}")
        ),
        max_size=4,
    ),
    st.ip_addresses(),
)
def test_an_address_set_holds_what_its_networks_hold(texts: list[str], ip: object) -> None:
    address = ip_address(str(ip))
    expected = any(address in ip_network(text, strict=False) for text in texts)
    assert (address.packed in AddressSet(texts)) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (Options(), {"127.0.0.0/8", "192.168.77.1/32"}),
        (Options(localhost_node_ports=False), {"192.168.77.1/32"}),
        (Options(node_port_addresses=("10.0.0.1", "127.0.0.1")), {"10.0.0.1", "127.0.0.1"}),
        (
            Options(node_port_addresses=("10.0.0.1", "127.0.0.1"), localhost_node_ports=False),
            {"10.0.0.1"},
        ),
        (Options(6), {"fd00::1/128"}),
    ],
)
def test_node_ports_answer_on(options: Options, expected: set[str]) -> None:
    v6 = options.family == 6
    local = ("::1/128", "fd00::1/128") if v6 else ("127.0.0.0/8", "192.168.77.1/32")
    assert set(node_port_networks(options, local)) == expected


# --- netlink -----------------------------------------------------------------------------------

NFGEN = b"\2\0\0\0"


def tuple_of(
    source: str, destination: str, source_port: int, destination_port: int, protocol: int = 17
) -> bytes:
    """A tuple as the kernel writes it."""
    a, b = ip_address(source).packed, ip_address(destination).packed
    first = 1 if len(a) == 4 else 3
    return nest(1, attribute(first, a), attribute(first + 1, b)) + nest(
        2,
        attribute(1, bytes([protocol])),
        attribute(2, struct.pack(">H", source_port)),
        attribute(3, struct.pack(">H", destination_port)),
    )


def entry(
    *,
    protocol: int = 17,
    more: bytes = b"",
    extra: bytes = b"",
    reply: bytes = b"",
    flags: int = 2,
) -> bytes:
    """A message about the flow 10.0.0.1:1000 -> 10.96.0.10:53, which 10.244.1.5:5353 answers.

    more -- attributes of the flow; extra, reply -- of its tuples
    """
    there = tuple_of("10.0.0.1", VIP, 1000, 53, protocol)
    back = tuple_of("10.244.1.5", "10.0.0.1", 5353, 1000, protocol)
    body = NFGEN + nest(1, there, extra) + nest(2, back, reply) + attribute(3, b"\0\0\1\x88") + more
    return message(0x100, flags, 7, body)


DONE = message(NLMSG_DONE, 2, 7, bytes(4))
ID = attribute(12, b"abcd")
ZONE = attribute(18, b"\0\5")
TUPLE_ZONE = attribute(3, b"\0\5")
SEEN = flow(f"{VIP}:53", OLD)._replace(source=b"\x0a\0\0\1", source_port=1000)


def _without_handle(dump: Dump) -> list[Flow]:
    return [one._replace(handle=b"") for one in dump.flows]


@pytest.mark.parametrize(
    ("what", "octets", "handle", "reply"),
    [
        ("plain", entry(), (), b""),
        ("with its ID", entry(more=ID), (12,), b""),
        ("in a zone", entry(more=ZONE + ID), (18, 12), b""),
        ("in a zone there", entry(extra=TUPLE_ZONE), (), b""),
        ("in a zone back", entry(reply=TUPLE_ZONE), (), TUPLE_ZONE),
        ("with attributes nobody knows", entry(more=attribute(99, b"xyz")), (), b""),
    ],
)
def test_a_flow_is_read_and_can_be_named(
    what: str, octets: bytes, handle: tuple[int, ...], reply: bytes
) -> None:
    dump = collect_flows([octets + DONE])
    assert dump.complete
    assert _without_handle(dump) == [SEEN], what
    name = dump.flows[0].handle
    assert tuple(attributes(name, 0, len(name))) == (2, *handle)
    # The tuple of the replies goes back as it came, with a zone if it holds one.
    assert name.startswith(nest(2, tuple_of("10.244.1.5", "10.0.0.1", 5353, 1000), reply))


def test_an_ipv6_flow_is_read() -> None:
    there, back = tuple_of("fd00::1", "fd00::a", 1, 53), tuple_of("fd00::5", "fd00::1", 5353, 1)
    body = b"\x0a\0\0\0" + nest(1, there) + nest(2, back)
    (seen,) = collect_flows([message(0x100, 2, 7, body) + DONE]).flows
    assert str(seen) == "udp [fd00::1]:1 -> [fd00::a]:53 answered by [fd00::5]:5353"


def test_only_udp_flows_to_the_ports_asked_for_are_read() -> None:
    """A kernel before 5.8 gives all it has."""
    datagram = entry(protocol=6) + entry() + DONE
    assert len(collect_flows([datagram], {53}).flows) == 1
    assert collect_flows([datagram], {54}).flows == []


@pytest.mark.parametrize(
    ("what", "datagrams", "complete"),
    [
        ("all", [entry(), entry() + DONE], True),
        ("the table changed its size", [entry(flags=2 | NLM_F_DUMP_INTR), entry() + DONE], False),
        (
            "found out at the end",
            [entry(), entry() + message(NLMSG_DONE, 2 | NLM_F_DUMP_INTR, 7, bytes(4))],
            False,
        ),
        (
            "the kernel gave up",
            [entry(), entry() + message(NLMSG_DONE, 2, 7, struct.pack("=i", -4))],
            False,
        ),
        ("it never ended", [entry(), entry()], False),
    ],
)
def test_a_dump_says_whether_it_is_complete(
    what: str, datagrams: list[bytes], complete: bool
) -> None:
    dump = collect_flows(datagrams)
    assert len(dump.flows) == 2, what
    assert dump.complete == complete, what


def test_of_a_million_flows_those_that_stay_are_not_held() -> None:
    datagrams = [entry()] * 10 + [DONE]
    none = collect_flows(datagrams, chosen=lambda flows: (one for one in flows if not one.handle))
    assert none == Dump([], True)
    some = collect_flows(datagrams, most=3)
    assert len(some.flows) == 3 and some.complete


def test_an_interrupted_dump_is_tried_again_a_few_times_and_then_used_as_it_is() -> None:
    good, bad = Dump([SEEN], True), Dump([], False)
    for answers, expected, left in (
        ([good, bad], good, 1),
        ([bad, good], good, 0),
        ([bad] * ATTEMPTS + [good], bad, 1),
    ):
        assert retried(partial(answers.pop, 0)) is expected
        assert len(answers) == left


@given(st.binary(max_size=200), st.integers(0, 200), st.integers(0, 255))
def test_octets_that_are_no_flow_are_passed_over(noise: bytes, where: int, value: int) -> None:
    parse_flow(noise, 0, len(noise))
    damaged = bytearray(entry(more=ID))
    damaged[where % len(damaged)] = value
    for one in messages(bytes(damaged)):
        parse_flow(bytes(damaged), one.start + 4, one.end)
