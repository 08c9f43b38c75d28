"""Small plugins in user terms: a Corefile, a question, what comes back."""

from __future__ import annotations

from collections import Counter

import dns.flags
import dns.message
import pytest
from support import Stub, a, answer, build, cname, errors_of, make_setup, question

from kdns.dns import types as t
from kdns.dns.message import AA, RA, RD, RR, Edns, Query, Reply, render_reply
from kdns.dns.name import parse_name
from kdns.plugins.loadbalance import BadWeights, parse_weights
from kdns.plugins.plugin import Plugin, WatchFile


def shown(query: Query, reply: Reply) -> dns.message.Message:
    """Return the reply as an independent reader sees it on the wire."""
    return dns.message.from_wire(render_reply(query, reply))


def records(query: Query, reply: Reply) -> list[str]:
    """Return rcode and records as `section: text` lines, for tables of cases."""
    message = shown(query, reply)
    lines = [t.rcode_name(message.rcode())]
    for section, rrsets in (
        ("answer", message.answer),
        ("authority", message.authority),
        ("additional", message.additional),
    ):
        lines += [f"{section}: {line}" for rrset in rrsets for line in str(rrset).splitlines()]
    return lines


def only(text: str, *, word: str) -> Plugin:
    (plugin,) = [p for p in build(text) if p.word == word]
    return plugin


# --- local --------------------------------------------------------------------------------

SOA = "604800 IN SOA localhost. root.localhost. 1 0 0 0 604800"
LOCAL = {
    ("localhost.", "A"): ["NOERROR", "answer: localhost. 604800 IN A 127.0.0.1"],
    ("LocalHost.", "AAAA"): ["NOERROR", "answer: LocalHost. 604800 IN AAAA ::1"],
    ("localhost.", "NS"): ["NOERROR", "answer: localhost. 604800 IN NS localhost."],
    ("localhost.", "SOA"): ["NOERROR", f"answer: localhost. {SOA}"],
    ("localhost.", "TXT"): ["NOERROR", f"authority: localhost. {SOA}"],
    ("foo.localhost.", "A"): ["NOERROR", "answer: foo.localhost. 604800 IN A 127.0.0.1"],
    ("foo.localhost.", "MX"): ["NOERROR", f"authority: foo.localhost. {SOA}"],
    ("localhost.example.com.", "AAAA"): [
        "NOERROR",
        "answer: localhost.example.com. 604800 IN AAAA ::1",
    ],
    ("127.In-addr.arpa.", "A"): ["NOERROR", f"authority: 127.In-addr.arpa. {SOA}"],
    ("0.in-addr.arpa.", "NS"): ["NOERROR", "answer: 0.in-addr.arpa. 604800 IN NS localhost."],
    ("1.0.0.127.in-addr.arpa.", "PTR"): [
        "NOERROR",
        "answer: 1.0.0.127.in-addr.arpa. 604800 IN PTR localhost.",
    ],
    ("1.0.0.127.in-addr.ARPA.", "A"): ["NOERROR", f"authority: 127.in-addr.ARPA. {SOA}"],
    ("2.0.0.127.in-addr.arpa.", "PTR"): ["NXDOMAIN", f"authority: 127.in-addr.arpa. {SOA}"],
    ("255.255.255.255.in-addr.arpa.", "PTR"): [
        "NXDOMAIN",
        f"authority: 255.in-addr.arpa. {SOA}",
    ],
}


@pytest.mark.parametrize(("name", "qtype"), list(LOCAL))
def test_local_names_are_answered_here(name: str, qtype: str) -> None:
    query = question(name, qtype)
    reply = answer(build("local"), query)
    assert records(query, reply) == LOCAL[name, qtype]
    assert not reply.flags & AA
    assert reply.served_by == "local"


@pytest.mark.parametrize(
    "name",
    [
        "example.com.",
        "notlocalhost.",
        "localhosts.example.com.",
        "1.0.0.10.in-addr.arpa.",
        "27.in-addr.arpa.",
        "\\009localhost.",  # one label that ends like the name on the wire
    ],
)
def test_other_names_pass_local(name: str) -> None:
    stub = Stub()
    assert answer([*build("local"), stub], question(name)).rcode == t.NXDOMAIN
    assert len(stub.asked) == 1


def test_localhost_prefix_off_keeps_search_path_names_going() -> None:
    stub = Stub()
    plugins = [*build("local {\n localhost_prefix off\n}"), stub]
    assert answer(plugins, question("localhost.example.com.")).rcode == t.NXDOMAIN
    assert answer(plugins, question("a.localhost.")).answer == [
        a("a.localhost.", "127.0.0.1", 604800)
    ]
    assert len(stub.asked) == 1


def test_local_counts_all_but_localhost_itself() -> None:
    cx = make_setup()
    plugins = build("local", cx)
    for name in ("localhost.", "a.localhost.", "localhost.b.", "1.0.0.127.in-addr.arpa."):
        answer(plugins, question(name))
    assert cx.metrics.value("coredns_local_localhost_requests_total") == 2


# --- any ----------------------------------------------------------------------------------


def test_any_gets_one_small_record() -> None:
    query = question("Example.org.", "ANY")
    reply = answer(build("any"), query)
    assert records(query, reply) == [
        "NOERROR",
        'answer: Example.org. 8482 IN HINFO "ANY obsoleted" "See RFC 8482"',
    ]
    assert not reply.flags & AA


def test_other_types_pass_any() -> None:
    assert answer([*build("any"), Stub()], question("example.org.", "HINFO")).rcode == t.NXDOMAIN


# --- chaos --------------------------------------------------------------------------------


def chaos_strings(text: str, name: str, hostname: bytes | None = None) -> list[str]:
    plugins = build(text)
    (watch,) = plugins[0].work()
    assert isinstance(watch, WatchFile)
    watch.load(hostname, "" if hostname else "missing")
    reply = answer(plugins, question(name, "TXT", qclass="CH"))
    assert {(rr.type, rr.cls, rr.ttl) for rr in reply.answer} == {(t.TXT, t.CH, 0)}
    return [rr.rdata[1:].decode() for rr in reply.answer]


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("chaos CoreDNS-001 info@coredns.io", "version.bind.", ["CoreDNS-001"]),
        ("chaos CoreDNS-001 info@coredns.io", "VERSION.server.", ["CoreDNS-001"]),
        ("chaos CoreDNS-001 info@coredns.io", "authors.bind.", ["info@coredns.io"]),
        ("chaos " + "v" * 300, "version.bind.", ["v" * 255]),
        ("chaos", "hostname.bind.", ["node-7"]),
        ("chaos", "id.server.", ["node-7"]),
    ],
)
def test_chaos_says_what_runs_here(text: str, name: str, expected: list[str]) -> None:
    assert chaos_strings(text, name, b"node-7\n") == expected


def test_chaos_without_words_names_kdns() -> None:
    assert chaos_strings("chaos", "version.bind.")[0].startswith("kdns-")
    assert chaos_strings("chaos", "authors.bind.") == ["The kdns authors"]
    assert chaos_strings("chaos", "hostname.bind.") == ["localhost"]


def test_chaos_lists_every_author_once_in_any_order() -> None:
    plugins = build("chaos v1 zoe ada ben ada")
    orders = set()
    for _ in range(100):
        reply = answer(plugins, question("authors.bind.", "TXT", qclass="CH"))
        assert reply.keep == 0
        orders.add(tuple(rr.rdata[1:].decode() for rr in reply.answer))
    assert {tuple(sorted(order)) for order in orders} == {("ada", "ben", "zoe")}
    assert len(orders) == 6


@pytest.mark.parametrize(
    ("name", "qtype", "qclass"),
    [("version.bind.", "TXT", "IN"), ("version.bind.", "A", "CH"), ("x.bind.", "TXT", "CH")],
)
def test_other_questions_pass_chaos(name: str, qtype: str, qclass: str) -> None:
    reply = answer([*build("chaos"), Stub()], question(name, qtype, qclass=qclass))
    assert reply.rcode == t.NXDOMAIN


# --- loadbalance --------------------------------------------------------------------------

POOL = [a("www.example.org.", f"10.0.0.{n}") for n in range(1, 5)]


def mx(target: str) -> RR:
    return RR(parse_name("www.example.org."), t.MX, 60, b"\x00\x0a" + parse_name(target))


def balanced(text: str, reply: Reply, qtype: str = "A", times: int = 1) -> list[Reply]:
    plugins = [*build(text), Stub({("www.example.org.", qtype): reply})]
    return [answer(plugins, question("www.example.org.", qtype)) for _ in range(times)]


def test_every_order_of_addresses_comes_up() -> None:
    replies = balanced("loadbalance", Reply(answer=POOL[:3]), times=600)
    orders = Counter(tuple(rr.rdata[3] for rr in reply.answer) for reply in replies)
    assert len(orders) == 6
    assert min(orders.values()) > 60
    assert all(reply.shuffled for reply in replies)
    assert [rr.rdata[3] for rr in POOL] == [1, 2, 3, 4], "the plugin below keeps its own order"


def test_cnames_first_then_others_then_addresses_then_mx() -> None:
    alias = cname("alias.example.org.", "www.example.org.")
    text = RR(parse_name("www.example.org."), t.TXT, 60, b"\x01x")
    mail = [mx("a."), mx("b.")]
    for section in ("answer", "authority", "additional"):
        mixed = [mail[0], POOL[0], text, mail[1], POOL[1], alias]
        reply = Reply()
        setattr(reply, section, mixed)
        replies = balanced("loadbalance", reply, times=40)
        for reply in replies:
            found = getattr(reply, section)
            assert found[:2] == [alias, text]
            assert {rr.type for rr in found[2:4]} == {t.A}
            assert {rr.type for rr in found[4:]} == {t.MX}
        assert {getattr(r, section)[2].rdata[3] for r in replies} == {1, 2}
        assert {getattr(r, section)[4].rdata for r in replies} == {rr.rdata for rr in mail}


@pytest.mark.parametrize(
    ("reply", "qtype"),
    [
        (Reply(answer=POOL[:1]), "A"),
        (Reply(answer=[mx("a.")], additional=POOL[:1]), "MX"),
        (Reply(t.SERVFAIL, answer=POOL), "A"),
        (Reply(answer=POOL), "AXFR"),
    ],
    ids=["one address", "one a section", "a failure", "a transfer"],
)
def test_order_is_left_alone(reply: Reply, qtype: str) -> None:
    for found in balanced("loadbalance", reply, qtype, times=20):
        assert (found.answer, found.additional) == (reply.answer, reply.additional)
        assert not found.shuffled


def test_preferred_networks_come_first_in_their_order() -> None:
    pool = [a("www.example.org.", x) for x in ("192.0.2.1", "10.9.20.7", "2001:db8::1", "10.1.1.1")]
    text = "loadbalance round_robin {\n prefer 2001:db8::/32 10.9.20.0/24\n prefer 10.0.0.0/8\n}"
    for reply in balanced(text, Reply(answer=pool), times=20):
        assert reply.answer == [pool[2], pool[1], pool[3], pool[0]]


WEIGHTS = b"""# a comment
WWW.example.org
10.0.0.1 3
10.0.0.2 1

10.0.0.3 2
other.example.org.
2001:db8::1 255
"""


def weigh(plugin: Plugin, content: bytes | None) -> bool:
    (watch,) = plugin.work()
    assert isinstance(watch, WatchFile)
    return watch.load(content, "" if content is not None else "no such file")


def test_weighted_puts_an_address_on_top_as_often_as_its_weight_says() -> None:
    plugin = only("loadbalance weighted db.weights", word="loadbalance")
    assert weigh(plugin, WEIGHTS)
    stub = Stub({("www.example.org.", "A"): Reply(answer=POOL, keep=30.0)})
    tops: Counter[int] = Counter()
    for _ in range(1400):
        reply = answer([plugin, stub], question("www.example.org."))
        assert Counter(reply.answer) == Counter(POOL)
        assert reply.keep == 0, "repeats would not keep the proportions"
        tops[reply.answer[0].rdata[3]] += 1
    # weights 3, 1, 2 and, for the address not in the file, 1
    for address, expected in ((1, 600), (2, 200), (3, 400), (4, 200)):
        assert abs(tops[address] - expected) < 80


def test_weighted_leaves_other_types_alone() -> None:
    plugin = only("loadbalance weighted db.weights", word="loadbalance")
    stub = Stub({("www.example.org.", "MX"): Reply(answer=[mx("a."), mx("b.")], additional=POOL)})
    for _ in range(20):
        assert answer([plugin, stub], question("www.example.org.", "MX")).additional == POOL


def test_a_bad_or_missing_weight_file_leaves_the_old_weights() -> None:
    plugin = only("loadbalance weighted db.weights {\n reload 10s\n}", word="loadbalance")
    (watch,) = plugin.work()
    assert isinstance(watch, WatchFile)
    assert (watch.path, watch.interval) == ("./db.weights", 10.0)
    assert not weigh(plugin, None)
    assert weigh(plugin, b"www.example.org\n10.0.0.2 255\n")
    assert not weigh(plugin, b"www.example.org\n10.0.0.2 256\n")
    stub = Stub({("www.example.org.", "A"): Reply(answer=POOL)})
    tops = [answer([plugin, stub], question("www.example.org.")).answer[0] for _ in range(50)]
    assert tops.count(POOL[1]) > 40


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"10.0.0.1 1\n", "w:1: a domain name must stand before the first address"),
        (b"a.b\n10.0.0.1\n", "w:2: '10.0.0.1' is no domain name; is its weight missing?"),
        (b"a.b\n\n10.0.0 1\n", "w:3: '10.0.0' is no IP address"),
        (b"a.b\n10.0.0.1 0\n", "w:2: weight must be in range [1, 255]: 0"),
        (b"a.b\n10.0.0.1 x\n", "w:2: weight must be in range [1, 255]: x"),
        (b"a.b\n10.0.0.1 1 2\n", "w:2: '10.0.0.1 1 2' must be a domain name or ADDRESS WEIGHT"),
        (b"a..b\n", "w:1: 'a..b' has an empty label"),
    ],
)
def test_mistakes_in_a_weight_file_are_named(content: bytes, message: str) -> None:
    with pytest.raises(BadWeights) as caught:
        parse_weights(content, "w")
    assert str(caught.value) == message


# --- header -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "rd", "flags", "expected"),
    [
        ("response set ra", True, AA, AA | RA | RD),
        ("response set ra aa\n response clear rd", True, 0, AA | RA),
        ("response set rd", False, AA, AA | RD),
        ("response clear aa\n RESPONSE Set AA", True, 0, AA | RD),
        ("response set aa\n response clear aa", True, AA, RD),
        ("query set rd", False, 0, RD),
        ("query set rd\n response clear rd", False, 0, 0),
        ("query clear rd", True, AA, AA),
    ],
)
def test_header_sets_and_clears_flags(rules: str, rd: bool, flags: int, expected: int) -> None:
    stub = Stub({("example.org.", "A"): Reply(answer=[a("example.org.", "10.0.0.1")], flags=flags)})
    query = question("example.org.", rd=rd)
    reply = answer([*build(f"header {{\n {rules}\n}}"), stub], query)
    assert int(shown(query, reply).flags) & (AA | RA | RD) == expected


def test_header_changes_the_query_for_the_plugins_below() -> None:
    stub = Stub()
    query = question("example.org.", rd=False)
    answer([*build("header {\n query set rd ra\n}"), stub], query)
    assert stub.asked[0].flags & (RD | RA) == RD | RA
    assert query.flags & RD == 0


def test_header_leaves_failures_alone() -> None:
    reply = answer(build("header {\n response set ra aa\n}"), question("example.org."))
    assert (reply.rcode, reply.flags) == (t.SERVFAIL, 0)


# --- minimal ------------------------------------------------------------------------------

NAME = parse_name("example.org.")
ZONE_SOA = RR(NAME, t.SOA, 60, parse_name("ns.") + parse_name("mail.") + bytes(20))
NS = RR(NAME, t.NS, 60, parse_name("ns.example.org."))
GLUE = a("ns.example.org.", "10.0.0.53")
ANSWER = a("example.org.", "10.0.0.1")


@pytest.mark.parametrize(
    ("reply", "qtype", "left"),
    [
        (Reply(answer=[ANSWER], authority=[NS], additional=[GLUE]), "A", (1, 0, 0)),
        (Reply(additional=[GLUE]), "A", (0, 0, 0)),
        (Reply(authority=[ZONE_SOA], additional=[GLUE]), "A", (0, 1, 1)),
        (Reply(authority=[NS], additional=[GLUE]), "A", (0, 1, 1)),
        (Reply(t.NXDOMAIN, authority=[ZONE_SOA]), "A", (0, 1, 0)),
        (Reply(t.SERVFAIL, additional=[GLUE]), "A", (0, 0, 1)),
        (Reply(answer=[ANSWER], additional=[GLUE]), "AXFR", (1, 0, 1)),
    ],
    ids=["answer", "empty", "NODATA", "referral", "NXDOMAIN", "failure", "transfer"],
)
def test_minimal_strips_what_is_not_needed(
    reply: Reply, qtype: str, left: tuple[int, int, int]
) -> None:
    stub = Stub({("example.org.", qtype): reply})
    found = answer([*build("minimal"), stub], question("example.org.", qtype))
    assert (len(found.answer), len(found.authority), len(found.additional)) == left


# --- bufsize ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "edns", "proto", "size", "limit"),
    [
        ("bufsize", 4096, "udp", 1232, 1232),
        ("bufsize 600", 4096, "udp", 600, 600),
        ("bufsize 1400", 1300, "udp", 1300, 1300),
        ("bufsize", 100, "udp", 100, 512),
        ("bufsize 512", 4096, "tcp", 512, 65535),
        ("bufsize", None, "udp", None, 512),
    ],
)
def test_bufsize_lowers_the_announced_size(
    text: str, edns: int | None, proto: str, size: int | None, limit: int
) -> None:
    stub = Stub()
    asked = None if edns is None else Edns(edns, True, options=[(10, b"12345678")])
    query = question("example.org.", edns=asked, proto=proto)
    answer([*build(text), stub], query)
    below = stub.asked[0]
    assert (below.edns and below.edns.size) == size
    assert below.limit == limit
    if below.edns is not None:
        assert (below.edns.do, below.edns.options) == (True, [(10, b"12345678")])


def test_bufsize_bounds_the_answer_on_the_wire() -> None:
    pool = [a("example.org.", f"10.0.0.{n}") for n in range(60)]
    query = question("example.org.", edns=Edns(4096))
    reply = answer(
        [*build("bufsize 600"), Stub({("example.org.", "A"): Reply(answer=pool)})], query
    )
    wire = render_reply(query, reply)
    message = dns.message.from_wire(wire)
    assert len(wire) <= 600
    assert message.flags & dns.flags.TC
    assert message.payload == 600


# --- whoami -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("client", "proto", "name", "expected"),
    [
        ("10.240.0.1", "udp", "Example.org.", [
            "Example.org. 0 IN A 10.240.0.1", "_udp.Example.org. 0 IN SRV 0 0 40000 .",
        ]),
        ("2001:db8::7", "tcp", "example.org.", [
            "example.org. 0 IN AAAA 2001:db8::7", "_tcp.example.org. 0 IN SRV 0 0 40000 .",
        ]),
        ("fe80::1%eth0", "tls", ".", [". 0 IN AAAA fe80::1", "_tcp. 0 IN SRV 0 0 40000 ."]),
        ("::ffff:10.0.0.9", "udp", "a.", ["a. 0 IN A 10.0.0.9", "_udp.a. 0 IN SRV 0 0 40000 ."]),
    ],
)  # fmt: skip
def test_whoami_tells_the_client_its_address(
    client: str, proto: str, name: str, expected: list[str]
) -> None:
    query = question(name, "TXT", client=client, proto=proto)
    reply = answer(build("whoami"), query)
    assert records(query, reply) == ["NOERROR", *(f"additional: {line}" for line in expected)]
    assert reply.flags & AA


def test_whoami_leaves_out_a_name_that_would_be_too_long() -> None:
    name = ".".join(["x" * 62] * 4) + "."
    reply = answer(build("whoami"), question(name))
    assert [rr.type for rr in reply.additional] == [t.A]


# --- the Corefile -------------------------------------------------------------------------

MISTAKES = {
    "any x": "Corefile:1: unexpected 'x' after 'any'",
    "any\nany": "Corefile:2: plugin/any: this plugin can only be used once per Server Block;"
    " the first is in line 1",
    "any {\n on\n}": "Corefile:2: unknown property 'on'",
    "local on": "Corefile:1: unexpected 'on' after 'local'",
    "local {\n localhost_prefix maybe\n}": "Corefile:2: localhost_prefix must be 'on' or 'off',"
    " found 'maybe'",
    "local {\n localhost_prefx off\n}": "Corefile:2: unknown property 'localhost_prefx',"
    " did you mean 'localhost_prefix'?",
    "minimal x": "Corefile:1: unexpected 'x' after 'minimal'",
    "whoami x": "Corefile:1: unexpected 'x' after 'whoami'",
    "bufsize 511": "Corefile:1: bufsize must be in range [512, 4096]: 511",
    "bufsize big": "Corefile:1: bufsize must be a number, found 'big'",
    "bufsize 600 700": "Corefile:1: unexpected '700' after 'bufsize'",
    "chaos {\n version 1\n}": "Corefile:2: unknown property 'version'",
    "header": "Corefile:1: 'header' needs a rule, such as { response set ra }",
    "header {\n respnse set ra\n}": "Corefile:2: unknown property 'respnse', did you mean"
    " 'response'?",
    "header {\n response sett ra\n}": "Corefile:2: unknown flag action 'sett', it must be 'set'"
    " or 'clear', did you mean 'set'?",
    "header {\n response set ad\n}": "Corefile:2: unknown flag 'ad' (known: aa, ra, rd)",
    "header {\n response set\n}": "Corefile:2: 'response' needs 2 arguments, found 1",
    "loadbalance round-robin": "Corefile:1: unknown policy: round-robin, did you mean"
    " 'round_robin'?",
    "loadbalance fair": "Corefile:1: unknown policy: fair (known: round_robin, weighted)",
    "loadbalance round_robin x": "Corefile:1: unexpected 'x' after 'loadbalance'",
    "loadbalance weighted": "Corefile:1: missing weight file: write weighted FILE",
    "loadbalance {\n reload 5s\n}": "Corefile:2: 'reload' belongs to the weighted policy:"
    " weighted FILE",
    "loadbalance weighted w {\n reload 5x\n}": "Corefile:2: '5x' is not a duration; write it as"
    " 5s or 1m30s",
    "loadbalance {\n prefer 10.0.0.1\n}": "Corefile:2: invalid CIDR '10.0.0.1'; write it as"
    " 10.9.20.0/24",
    "loadbalance {\n prefer\n}": "Corefile:2: 'prefer' needs an argument, found none",
    "loadbalance {\n prefr 10.0.0.0/8\n}": "Corefile:2: unknown property 'prefr', did you mean"
    " 'prefer'?",
}


@pytest.mark.parametrize("text", list(MISTAKES))
def test_mistakes_are_said_with_what_would_be_right(text: str) -> None:
    assert errors_of(text) == [MISTAKES[text]]
