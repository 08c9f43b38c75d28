"""`acl`: who may ask what."""

from __future__ import annotations

import ipaddress

import dns.edns
import dns.message
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import Stub, a, answer, build, errors_of, make_setup, question, run

from kdns.dns import types as t
from kdns.dns.message import Edns, Reply, render_reply
from kdns.plugins.acl import NetworkSet, client_number
from kdns.plugins.plugin import DROP

ALLOWED, BLOCKED, FILTERED, DROPPED = "allowed", "blocked", "filtered", "dropped"


def outcome(text: str, name: str, qtype: str, client: str) -> str:
    """Return what becomes of one question behind these acl rules."""
    query = question(name, qtype, client=client)
    stub = Stub({(name.lower(), qtype): Reply(answer=[a(name, "10.0.0.1")])})
    result = run([*build(text), stub], query)
    if result is DROP:
        return DROPPED
    assert isinstance(result, Reply)
    if result.answer:
        return ALLOWED
    return {t.REFUSED: BLOCKED, t.NOERROR: FILTERED}[result.rcode]


BLOCK_A = "acl {\n block type A net 192.168.0.0/16\n}"
EXCEPT = "acl {\n allow net 192.168.1.0/24\n block net 192.168.0.0/16\n}"
ONLY = "acl {\n allow net 192.168.0.0/24 192.168.1.0/24 2001:db8::/32 10.0.0.7\n block\n}"
ZONE = "acl a.example.org 10.0.0.0/8 {\n filter net 192.168.1.0/24\n}"
TWICE = "acl a.example.org {\n allow net 10.0.0.0/8\n}\nacl example.org {\n drop type A AAAA\n}"
ORDER = "acl {\n filter type AAAA\n Drop Net 192.0.2.0/24 Type *\n}"
HOST_BITS = "acl {\n block net 10.1.2.3/8\n}"
STAR = "acl {\n block type MX net *\n}"
SECTIONS = "acl {\n block type A type MX net 10.0.0.0/8 net 192.0.2.1\n}"


@pytest.mark.parametrize(
    ("text", "name", "qtype", "client", "expected"),
    [
        (BLOCK_A, "example.org.", "A", "192.168.7.7", BLOCKED),
        (BLOCK_A, "example.org.", "AAAA", "192.168.7.7", ALLOWED),
        (BLOCK_A, "example.org.", "A", "192.169.0.1", ALLOWED),
        (BLOCK_A, "example.org.", "A", "::ffff:192.168.7.7", BLOCKED),
        (BLOCK_A, "example.org.", "A", "2001:db8::1", ALLOWED),
        (EXCEPT, "example.org.", "A", "192.168.1.9", ALLOWED),
        (EXCEPT, "example.org.", "A", "192.168.2.9", BLOCKED),
        (ONLY, "example.org.", "TXT", "192.168.1.255", ALLOWED),
        (ONLY, "example.org.", "TXT", "192.168.2.0", BLOCKED),
        (ONLY, "example.org.", "TXT", "10.0.0.7", ALLOWED),
        (ONLY, "example.org.", "TXT", "10.0.0.8", BLOCKED),
        (ONLY, "example.org.", "TXT", "2001:db8:1::1", ALLOWED),
        (ONLY, "example.org.", "TXT", "fe80::1%eth0", BLOCKED),
        (ZONE, "example.org.", "A", "192.168.1.1", ALLOWED),
        (ZONE, "X.a.Example.org.", "A", "192.168.1.1", FILTERED),
        (ZONE, "4.3.2.10.in-addr.arpa.", "PTR", "192.168.1.1", FILTERED),
        (TWICE, "a.example.org.", "A", "10.1.1.1", ALLOWED),
        (TWICE, "a.example.org.", "A", "11.1.1.1", DROPPED),
        (TWICE, "b.example.org.", "AAAA", "10.1.1.1", DROPPED),
        (TWICE, "b.example.org.", "MX", "10.1.1.1", ALLOWED),
        (ORDER, "example.org.", "AAAA", "192.0.2.1", FILTERED),
        (ORDER, "example.org.", "A", "192.0.2.1", DROPPED),
        (ORDER, "example.org.", "A", "192.0.3.1", ALLOWED),
        (HOST_BITS, "example.org.", "A", "10.200.1.1", BLOCKED),
        (STAR, "example.org.", "MX", "2001:db8::1", BLOCKED),
        (STAR, "example.org.", "A", "2001:db8::1", ALLOWED),
        (SECTIONS, "example.org.", "MX", "192.0.2.1", BLOCKED),
        (SECTIONS, "example.org.", "A", "10.9.9.9", BLOCKED),
        (SECTIONS, "example.org.", "TXT", "10.9.9.9", ALLOWED),
        (EXCEPT, "example.org.", "A", "not-an-address", BLOCKED),
    ],
)
def test_the_first_rule_that_fits_decides(
    text: str, name: str, qtype: str, client: str, expected: str
) -> None:
    assert outcome(text, name, qtype, client) == expected


@pytest.mark.parametrize(
    ("action", "rcode", "reason"),
    [
        ("block", "REFUSED", dns.edns.EDECode.BLOCKED),
        ("filter", "NOERROR", dns.edns.EDECode.FILTERED),
    ],
)
def test_a_refusal_says_why(action: str, rcode: str, reason: dns.edns.EDECode) -> None:
    plugins = build(f"acl {{\n {action}\n}}")
    query = question("example.org.", edns=Edns(1400))
    message = dns.message.from_wire(render_reply(query, answer(plugins, query)))
    assert t.rcode_name(message.rcode()) == rcode
    assert [option.code for option in message.options] == [reason]
    plain = question("example.org.")
    assert dns.message.from_wire(render_reply(plain, answer(plugins, plain))).edns == -1


def test_every_decision_is_counted() -> None:
    cx = make_setup(["example.org."])
    text = "acl {\n block type A\n filter type AAAA\n drop type MX\n}"
    plugins = [*build(text, cx), Stub()]
    for qtype, times in (("A", 1), ("AAAA", 2), ("MX", 3), ("TXT", 4)):
        for _ in range(times):
            run(plugins, question("www.example.org.", qtype))
    labels = ("dns://:53", "example.org.", "")
    value = cx.metrics.value
    assert value("coredns_acl_blocked_requests_total", *labels) == 1
    assert value("coredns_acl_filtered_requests_total", *labels) == 2
    assert value("coredns_acl_dropped_requests_total", *labels) == 3
    assert value("coredns_acl_allowed_requests_total", "dns://:53", "") == 4


def test_rules_for_types_alone_leave_the_packet_cache_in_use() -> None:
    cx = make_setup()
    (by_type,) = build("acl {\n block type ANY\n}", cx)
    (by_client,) = build("acl {\n block net 10.0.0.0/8\n}")
    assert (by_type.per_client, by_client.per_client) == (False, True)
    reply = answer([by_type], question("example.org.", "ANY"))
    assert reply.keep > 0
    assert reply.tally is not None
    for cell, value in reply.tally:
        assert value is not None
        cell.add(value, times=5)
    assert cx.metrics.value("coredns_acl_blocked_requests_total", "dns://:53", ".", "") == 6


MISTAKES = {
    "acl": "Corefile:1: warning: 'acl' without a rule allows everything",
    "acl {\n blok\n}": "Corefile:2: unexpected token 'blok'; expect 'allow', 'block', 'filter' or"
    " 'drop', did you mean 'block'?",
    "acl {\n block 10.0.0.0/8\n}": "Corefile:2: unexpected token '10.0.0.0/8'; expect 'type' or"
    " 'net'",
    "acl {\n block typ A\n}": "Corefile:2: unexpected token 'typ'; expect 'type' or 'net', did"
    " you mean 'type'?",
    "acl {\n block type\n}": "Corefile:2: 'type' needs at least one word behind it, or '*' for all",
    "acl {\n block net type A\n}": "Corefile:2: 'net' needs at least one word behind it, or '*'"
    " for all",
    "acl {\n block type AAA\n}": "Corefile:2: unexpected token 'AAA'; expect legal QTYPE, did you"
    " mean 'aaaa'?",
    "acl {\n block net 10.0.0.0/33\n}": "Corefile:2: illegal CIDR notation '10.0.0.0/33'; write"
    " it as 192.168.0.0/16 or 192.0.2.1",
    "acl a..b {\n block\n}": "Corefile:1: zone is not a valid domain name: 'a..b.' has an empty"
    " label",
}


@pytest.mark.parametrize("text", list(MISTAKES))
def test_mistakes_are_said_with_what_would_be_right(text: str) -> None:
    assert errors_of(text) == [MISTAKES[text]]


addresses = st.one_of(
    st.ip_addresses(v=4, network="10.0.0.0/12"), st.ip_addresses(v=6, network="2001:db8::/112")
)
networks = st.builds(
    lambda address, bits: ipaddress.ip_network(
        f"{address}/{address.max_prefixlen - bits}", strict=False
    ),
    addresses,
    st.integers(0, 20),
)


@given(st.lists(networks, max_size=8), addresses)
def test_a_network_set_holds_what_its_networks_hold(
    nets: list[ipaddress.IPv4Network | ipaddress.IPv6Network],
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    client = client_number(str(address))
    assert client is not None
    assert NetworkSet(nets).holds(*client) == any(address in net for net in nets)
