"""`rewrite`: what the plugins below are asked, and what the client gets to see."""

from __future__ import annotations

import random

import pytest
from support import FakeClock, Stub, answer, build, errors_of, make_setup, question

from kdns.corefile import Problems
from kdns.dns import types as t
from kdns.dns.message import TC, Edns, Query, Reply
from kdns.dns.name import render_name
from kdns.dns.text import parse_rr, render_rr
from kdns.metrics import Metrics
from kdns.plugins.plugin import Plugin, ServerFacts
from kdns.plugins.setup import Setup


def asked(stub: Stub) -> list[str]:
    return [f"{render_name(q.name)} {t.type_name(q.qtype)}" for q in stub.asked]


def saying(*records: str, rcode: int = t.NOERROR, flags: int = 0) -> Stub:
    """A last plugin that answers every question with these records."""
    reply = Reply(rcode, [parse_rr(text) for text in records], flags=flags)

    class Same(Stub):
        def on_query(self, query: Query) -> Reply:
            self.asked.append(query)
            return reply.copy()

    return Same()


def chain(rules: str, below: Plugin) -> list[Plugin]:
    cx = make_setup()
    plugins = build(rules, cx)
    assert cx.problems.found == []
    return [*plugins, below]


@pytest.mark.parametrize(
    ("rules", "name", "below"),
    [
        # the whole name
        ("rewrite name a.example b.example", "a.example.", "b.example."),
        ("rewrite name exact A.Example. b.example.", "a.EXAMPLE.", "b.example."),
        ("rewrite name a.example b.example", "x.a.example.", "x.a.example."),
        # its begin, its end, any part
        ("rewrite name prefix foo bar", "foo.example.", "bar.example."),
        ("rewrite name prefix foo bar", "food.example.", "food.example."),
        ("rewrite name suffix com org", "foo.example.com.", "foo.example.org."),
        ("rewrite name suffix .com .org", "com.example.", "com.example."),
        ("rewrite name suffix .in.x nginx.x", "shop.in.x.", "shopnginx.x."),
        ("rewrite name substring svc.us svc.eu", "a.svc.us.x.", "a.svc.eu.x."),
        # patterns
        (r'rewrite name regex "(.*)-(us-west-1)\.x" {1}.service.{2}.consul',
         "ftp-us-west-1.x.", "ftp.service.us-west-1.consul."),
        (r'rewrite name regex "^a(b)?\.x\.$" {0}c{1}d', "a.x.", "a.x.cd."),
        # several rules: the first that fires is the last, unless it says `continue`
        ("rewrite name a.x b.x\nrewrite name b.x c.x", "a.x.", "b.x."),
        ("rewrite continue name a.x b.x\nrewrite name b.x c.x", "a.x.", "c.x."),
        ("rewrite stop name a.x b.x\nrewrite name a.x c.x", "a.x.", "b.x."),
        # in a block
        ("rewrite stop {\n name suffix .old.x .new.x\n answer auto\n}", "a.old.x.", "a.new.x."),
    ],
)  # fmt: skip
def test_the_plugins_below_are_asked_for_the_rewritten_name(
    rules: str, name: str, below: str
) -> None:
    stub = saying()
    answer(chain(rules, stub), question(name))
    assert [render_name(q.name).lower() for q in stub.asked] == [below]


@pytest.mark.parametrize(
    ("rules", "name", "records", "seen"),
    [
        # `exact` repairs by itself, names below the new name too; the name is lower-case
        ("rewrite name A.x b.y", "A.x.", ["b.y. 5 IN A 10.0.0.1"], ["a.x. 5 IN A 10.0.0.1"]),
        ("rewrite name a.x b.y", "a.x.",
         ["b.y. 5 IN CNAME w.b.y.", "w.b.y. 5 IN A 10.0.0.1", "bb.y. 5 IN NS xb.y."],
         ["a.x. 5 IN CNAME w.a.x.", "w.a.x. 5 IN A 10.0.0.1", "bb.y. 5 IN NS xb.y."]),
        # the others do not, unless told
        ("rewrite name prefix foo bar", "foo.x.", ["bar.x. 5 IN A 10.0.0.1"],
         ["bar.x. 5 IN A 10.0.0.1"]),
        ("rewrite name prefix foo bar answer auto", "foo.x.", ["bar.x. 5 IN A 10.0.0.1"],
         ["foo.x. 5 IN A 10.0.0.1"]),
        ("rewrite name regex a(.) b{1} answer auto", "a1.x.", ["b1. 5 IN A 10.0.0.1"],
         ["a1.x. 5 IN A 10.0.0.1"]),
        (r'rewrite name regex "(.*).x" {1}.y answer name "(.*)\.y" {1}.z', "foo.x.",
         ["foo.y. 5 IN A 10.0.0.1", "other. 5 IN A 10.0.0.2"],
         ["foo.z. 5 IN A 10.0.0.1", "other. 5 IN A 10.0.0.2"]),
        # a suffix leads back for every name that ends in it
        ("rewrite name suffix .old .new answer auto", "a.old.",
         ["a.new. 5 IN CNAME b.new.", "b.new. 5 IN A 10.0.0.1"],
         ["a.old. 5 IN CNAME b.old.", "b.old. 5 IN A 10.0.0.1"]),
        # values of each type that holds a name
        (r'rewrite name suffix .x .x answer value "(.*)\.y\." {1}.z', "a.x.",
         ["a.x. 5 IN SRV 0 1 53 t.y.", "a.x. 5 IN MX 10 t.y.", "a.x. 5 IN PTR t.y.",
          "a.x. 5 IN DNAME t.y.", 'a.x. 5 IN NAPTR 1 2 "u" "s" "" t.y.',
          "a.x. 5 IN SOA t.y. h.y. 1 2 3 4 5", "a.x. 5 IN TXT t.y."],
         ["a.x. 5 IN SRV 0 1 53 t.z.", "a.x. 5 IN MX 10 t.z.", "a.x. 5 IN PTR t.z.",
          "a.x. 5 IN DNAME t.z.", 'a.x. 5 IN NAPTR 1 2 "u" "s" "" t.z.',
          "a.x. 5 IN SOA t.z. h.y. 1 2 3 4 5", 'a.x. 5 IN TXT "t.y."']),
        # as CoreDNS's README writes it
        ('rewrite stop {\n name suffix .arpa .arpa\n answer name auto\n'
         ' answer value "(.*)\\.consul\\." {1}.rocks.\n}', "1.arpa.",
         ["1.arpa. 5 IN PTR ftp.consul."], ["1.arpa. 5 IN PTR ftp.rocks."]),
        # `answer` only once
        ('rewrite name suffix .x .y answer name "(.*)[.]y" {1}.x value "(.*)[.]y" {1}.w', "a.x.",
         ["a.y. 5 IN CNAME b.y."], ["a.x. 5 IN CNAME b.w."]),
        # replies are undone in reverse order
        ("rewrite continue name a.x b.x\nrewrite name b.x c.x", "a.x.", ["c.x. 5 IN A 10.0.0.1"],
         ["a.x. 5 IN A 10.0.0.1"]),
        # a name that would be none stays
        ('rewrite name suffix .x .x answer name "(.*)" {1}..y', "a.x.", ["a.x. 5 IN A 10.0.0.1"],
         ["a.x. 5 IN A 10.0.0.1"]),
        # ttl
        ("rewrite ttl a.x 30", "a.x.", ["a.x. 5 IN A 10.0.0.1"], ["a.x. 30 IN A 10.0.0.1"]),
        ("rewrite ttl a.x 30", "b.x.", ["b.x. 5 IN A 10.0.0.1"], ["b.x. 5 IN A 10.0.0.1"]),
        ("rewrite ttl suffix .x 30-300", "a.x.",
         ["a.x. 5 IN A 10.0.0.1", "a.x. 900 IN A 10.0.0.2", "a.x. 60 IN A 10.0.0.3"],
         ["a.x. 30 IN A 10.0.0.1", "a.x. 300 IN A 10.0.0.2", "a.x. 60 IN A 10.0.0.3"]),
        ("rewrite ttl prefix a. -30", "a.x.", ["a.x. 90 IN A 10.0.0.1"], ["a.x. 30 IN A 10.0.0.1"]),
        ("rewrite ttl regex [ab][.]x 30-", "a.x.", ["a.x. 90 IN A 10.0.0.1"],
         ["a.x. 90 IN A 10.0.0.1"]),
        ("rewrite continue {\n ttl regex (.*)[.]x 15\n}", "a.x.", ["a.x. 90 IN A 10.0.0.1"],
         ["a.x. 15 IN A 10.0.0.1"]),
    ],
)  # fmt: skip
def test_the_client_sees(rules: str, name: str, records: list[str], seen: list[str]) -> None:
    reply = answer(chain(rules, saying(*records)), question(name))
    assert [render_rr(rr) for rr in reply.answer] == seen


def test_authority_and_additional_records_are_repaired_too() -> None:
    rr = parse_rr("b.y. 5 IN A 10.0.0.1")
    stub = Stub({("b.y.", "A"): Reply(0, [], [rr], [rr])})
    reply = answer(chain("rewrite name a.x b.y", stub), question("a.x."))
    assert render_rr(reply.authority[0]) == render_rr(reply.additional[0]) == "a.x. 5 IN A 10.0.0.1"


def test_shared_records_of_the_plugins_below_are_left_as_they_are() -> None:
    rr = parse_rr("b.y. 5 IN CNAME c.b.y.")
    stub = Stub({("b.y.", "A"): Reply(0, [rr])})
    plugins = chain("rewrite continue ttl a.x 60\nrewrite name a.x b.y", stub)
    assert render_rr(answer(plugins, question("a.x.")).answer[0]) == "a.x. 60 IN CNAME c.a.x."
    assert render_rr(rr) == "b.y. 5 IN CNAME c.b.y."


@pytest.mark.parametrize(
    "rules", ["rewrite ttl a.x 60", "rewrite continue ttl a.x 60\nrewrite cname b c"]
)
def test_all_batches_of_a_zone_transfer_are_changed(rules: str) -> None:
    reply = Reply(0, [parse_rr("a.x. 5 IN SOA n. h. 1 2 3 4 5")])
    reply.stream = iter([[parse_rr("w.a.x. 5 IN A 10.0.0.1")]])
    stub = Stub({("a.x.", "AXFR"): reply})
    sent = answer(chain(rules, stub), question("a.x.", "AXFR", proto="tcp"))
    records = [*sent.answer, *(rr for batch in sent.stream for rr in batch)]
    assert [rr.ttl for rr in records] == [60, 60]


@pytest.mark.parametrize(
    ("rules", "rcode", "seen"),
    [
        ("rewrite rcode a.x SERVFAIL NOERROR", t.SERVFAIL, t.NOERROR),
        ("rewrite rcode a.x 2 0", t.SERVFAIL, t.NOERROR),
        ("rewrite rcode a.x SERVFAIL NOERROR", t.NXDOMAIN, t.NXDOMAIN),
        ("rewrite rcode b.x SERVFAIL NOERROR", t.SERVFAIL, t.SERVFAIL),
        ("rewrite rcode regex (.*)[.]x nxdomain BADSIG", t.NXDOMAIN, 16),
    ],
)
def test_rcodes_of_replies_without_records_are_rewritten(rules: str, rcode: int, seen: int) -> None:
    assert answer(chain(rules, saying(rcode=rcode)), question("a.x.")).rcode == seen


def test_type_and_class_are_rewritten() -> None:
    stub = saying()
    rules = "rewrite continue type ANY HINFO\nrewrite class CH IN"
    answer(chain(rules, stub), question("a.x.", "ANY", qclass="CH"))
    assert (stub.asked[0].qtype, stub.asked[0].qclass) == (t.TYPES["HINFO"], t.IN)
    answer(chain(rules, stub), question("a.x.", "A"))
    assert (stub.asked[1].qtype, stub.asked[1].qclass) == (t.A, t.IN)


def test_a_new_name_that_is_none_is_servfail_and_says_so() -> None:
    stub = saying()
    reply = answer(chain(r'rewrite name regex "(.*)[.]x" {1}..y', stub), question("a.x."))
    assert reply.rcode == t.SERVFAIL
    assert reply.error is not None and reply.error.startswith("invalid name after rewrite: ")
    assert stub.asked == []


def test_a_query_no_rule_is_for_goes_down_unchanged() -> None:
    stub = saying()
    query = question("other.")
    answer(chain("rewrite name a.x b.x\nrewrite type ANY HINFO", stub), query)
    assert stub.asked == [query]


# --- cname --------------------------------------------------------------------------------


def cdn() -> Stub:
    def records(*lines: str, flags: int = 0) -> Reply:
        return Reply(0, [parse_rr(line) for line in lines], flags=flags)

    return Stub(
        {
            ("app.", "A"): records(
                "app. 200 IN CNAME app.example.",
                "app.example. 200 IN CNAME app.cdn.example.net.",
                "app.cdn.example.net. 300 IN A 20.2.0.1",
            ),
            ("app.other.cdn.", "A"): records("app.other.cdn. 100 IN A 30.3.1.2", flags=TC),
            ("def.", "AAAA"): records("def. 5 IN CNAME xyz."),
            ("xyz.", "A"): records("xyz. 5 IN A 1.2.3.4"),
        }
    )


@pytest.mark.parametrize(
    ("rules", "name", "seen"),
    [
        (r'rewrite cname regex "(.*).cdn.example.net." {1}.other.cdn.', "app.",
         ["app. 200 IN CNAME app.example.", "app.example. 200 IN CNAME app.other.cdn.",
          "app.other.cdn. 100 IN A 30.3.1.2"]),
        ("rewrite cname suffix cdn.example.net. other.cdn.", "app.",
         ["app. 200 IN CNAME app.example.", "app.example. 200 IN CNAME app.other.cdn.",
          "app.other.cdn. 100 IN A 30.3.1.2"]),
        # exact is the default; nothing is found there
        ("rewrite cname app.example gone", "app.", ["app. 200 IN CNAME gone."]),
        # not meant
        ("rewrite cname prefix nope. x.", "xyz.", ["xyz. 5 IN A 1.2.3.4"]),
        # with other rules, in reverse order: first the target, then the TTL of all
        ("rewrite continue ttl app 7\nrewrite cname app.example xyz", "app.",
         ["app. 7 IN CNAME xyz.", "xyz. 7 IN A 1.2.3.4"]),
    ],
)  # fmt: skip
def test_a_cname_is_led_elsewhere(rules: str, name: str, seen: list[str]) -> None:
    reply = answer(chain(rules, cdn()), question(name))
    assert [render_rr(rr) for rr in reply.answer] == seen
    assert bool(reply.flags & TC) == ("30.3.1.2" in seen[-1])


def test_a_cname_led_in_a_circle_ends() -> None:
    stub = saying("a. 5 IN CNAME b.")
    reply = answer(chain("rewrite cname b a", stub), question("a."))
    assert render_rr(reply.answer[0]) == "a. 5 IN CNAME a."
    assert len(stub.asked) <= 11


# --- edns0 --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "before", "below", "seen"),
    [
        ("local set 0xffee 0x61626364", [], [(0xFFEE, b"abcd")], [(0xFFEE, b"abcd")]),
        ("local set 0xffee abcd", [(0xFFEE, b"x")], [(0xFFEE, b"abcd")], [(0xFFEE, b"abcd")]),
        ("local append 65518 b", [(0xFFEE, b"x")], [(0xFFEE, b"x")], [(0xFFEE, b"x")]),
        ("local append 65518 b", [(10, b"c")], [(10, b"c"), (0xFFEE, b"b")],
         [(10, b"c"), (0xFFEE, b"b")]),
        ("local replace 0xffee b", [], [], []),
        ("local replace 0xffee b", [(0xFFEE, b"x")], [(0xFFEE, b"b")], [(0xFFEE, b"b")]),
        ("local unset 0xffee", [(0xFFEE, b"x"), (10, b"c")], [(10, b"c")], [(10, b"c")]),
        ("nsid set", [], [(3, b"")], [(3, b"")]),
        ("nsid replace", [(3, b"x")], [(3, b"")], [(3, b"")]),
        ("nsid unset", [(3, b"")], [], []),
        # CoreDNS never shows clients a subnet
        ("subnet set 24 56", [], [(8, b"\x00\x01\x18\x00\x0a\x01\x02")], []),
        ("subnet set 20 56", [(8, b"x")], [(8, b"\x00\x01\x14\x00\x0a\x01\x00")], []),
        ("subnet unset", [(8, b"x")], [], []),
        # revert
        ("local set 0xffee abcd revert", [], [(0xFFEE, b"abcd")], []),
        ("local set 0xffee abcd revert", [(0xFFEE, b"x")], [(0xFFEE, b"abcd")], [(0xFFEE, b"x")]),
        ("nsid set revert", [], [(3, b"")], []),
        # variables
        ("local set 0xffee {qname}", [], [(0xFFEE, b"Www.example.")], [(0xFFEE, b"Www.example.")]),
        ("local set 0xffee {qtype}", [], [(0xFFEE, b"\x00\x01")], [(0xFFEE, b"\x00\x01")]),
        ("local set 0xffee {client_ip}", [], [(0xFFEE, b"\x0a\x01\x02\x03")],
         [(0xFFEE, b"\x0a\x01\x02\x03")]),
        ("local set 0xffee {client_port}", [], [(0xFFEE, b"\x9c\x40")], [(0xFFEE, b"\x9c\x40")]),
        ("local set 0xffee {protocol}", [], [(0xFFEE, b"udp")], [(0xFFEE, b"udp")]),
        ("local set 0xffee {server_port}", [], [(0xFFEE, b"\x00\x35")], [(0xFFEE, b"\x00\x35")]),
        ("local set 0xffee {some/label}", [], [], []),
    ],
)  # fmt: skip
def test_edns_options(
    rule: str,
    before: list[tuple[int, bytes]],
    below: list[tuple[int, bytes]],
    seen: list[tuple[int, bytes]],
) -> None:
    stub = saying()
    query = question("Www.example.", client="10.1.2.3", edns=Edns(1232, options=before))
    reply = answer(chain(f"rewrite edns0 {rule}", stub), query)
    edns = stub.asked[0].edns
    assert edns is not None and list(edns.options) == below
    # None: the server shows those options of the query that CoreDNS always echoes.
    assert (list(reply.edns.options) if reply.edns else []) == seen
    assert query.edns is not None and list(query.edns.options) == before


def test_a_query_without_edns_gets_it_for_the_plugins_below() -> None:
    stub = saying()
    answer(chain("rewrite edns0 local set 0xffee a", stub), question("a."))
    edns = stub.asked[0].edns
    assert edns is not None and (edns.size, edns.options) == (4096, [(0xFFEE, b"a")])


def test_options_an_upstream_answered_with_are_passed_on_and_reverted() -> None:
    reply = Reply()
    reply.edns = Edns(1232, options=[(0xFFEE, b"abcd"), (15, b"\x00\x12")])
    stub = Stub({("a.", "A"): reply})
    rules = "rewrite edns0 local set 0xffee abcd revert"
    seen = answer(chain(rules, stub), question("a.", edns=Edns(1232))).edns
    assert seen is not None and list(seen.options) == [(15, b"\x00\x12")]


def test_metadata_of_plugins_above_can_be_put_in() -> None:
    stub = saying()
    query = question("a.")
    query.meta = {"some/label": "v1"}
    answer(chain("rewrite edns0 local set 0xffee {some/label}", stub), query)
    assert stub.asked[0].edns is not None
    assert stub.asked[0].edns.options == [(0xFFEE, b"v1")]


@pytest.mark.parametrize(
    ("addresses", "option"),
    [
        ((b"\x0a\0\0\x05", b"\xfe\x80" + b"\0" * 13 + b"\x01"), [(0xFFEE, b"\x0a\0\0\x05")]),
        ((b"\x0a\x00\x00\x05", b"\x0a\x00\x00\x06"), None),
    ],
)  # fmt: skip
def test_the_servers_address_is_put_in_where_it_is_known(
    addresses: tuple[bytes, ...], option: list[tuple[int, bytes]] | None
) -> None:
    facts = ServerFacts((".",), "dns://:53", ".", local_addresses=addresses)
    cx = Setup(Problems(), facts, Metrics(), FakeClock(), random.Random(1))
    stub = saying()
    plugins = build("rewrite edns0 local set 0xffee {server_ip}", cx)
    answer([*plugins, stub], question("a."))
    edns = stub.asked[0].edns
    assert (edns.options if edns else None) == option
    assert [p.warning for p in cx.problems.found] == ([] if option else [True])


@pytest.mark.parametrize(
    ("rules", "by_client"),
    [
        ("rewrite name a b", False),
        ("rewrite edns0 local set 1 {qname}", False),
        ("rewrite name a b\nrewrite edns0 local set 1 {client_ip}", True),
        ("rewrite edns0 subnet set 24 56", True),
    ],
)
def test_rules_that_look_at_the_client_keep_replies_from_being_repeated_to_others(
    rules: str, by_client: bool
) -> None:
    assert build(rules)[0].per_client is by_client


# --- mistakes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("rewrite", "no rule type specified for rewrite"),
        ("rewrite stop", "stop rule must begin with a rule type"),
        ("rewrite nmae a b", "invalid rule type 'nmae', did you mean 'name'?"),
        ("rewrite answer name a b", "response rewrites must begin with a name rule"),
        ("rewrite stop {\nanswer name a b\nname regex a b\n}", "must begin with a name rule"),
        ("rewrite name a", "too few arguments for a name rule"),
        ("rewrite name exact a", "too few arguments for a name rule"),
        ("rewrite name sufix a b", "found 'sufix', did you mean 'suffix'?"),
        ("rewrite name exact a b..c", "not a name: 'b..c.' has an empty label"),
        ("rewrite name regex [bad[ b", "invalid regex matching pattern: missing closing ]"),
        ("rewrite name regex (a) {1}{2}", "uses more subexpressions"),
        ("rewrite name exact a b c", "unexpected 'c' after a exact rule"),
        ("rewrite name suffix a b answer", "type missing for answer rule for suffix rule"),
        ("rewrite name suffix a b answer nam x y", "invalid type 'nam' for answer rule"),
        ("rewrite name suffix a b answer name x", "name answer rule for suffix rule: 2 arguments"),
        ("rewrite stop {\nname regex a b\nanswer name b a\nname baz\n}", "2 arguments required"),
        ("rewrite name suffix a b answer auto name x y", "cannot be combined"),
        ("rewrite name a b {\nanswer auto\n}", "either on the line or in the block"),
        ("rewrite type A", "type rules must have exactly two arguments"),
        ("rewrite type A AAA", "invalid type 'AAA', did you mean 'aaaa'?"),
        ("rewrite class IN XX", "invalid class 'XX'"),
        ("rewrite ttl a.x 30-10", "invalid TTL '30-10'"),
        ("rewrite ttl a.x -", "invalid TTL '-'"),
        ("rewrite ttl a.x", "a ttl rule takes"),
        ("rewrite ttl exakt a.x 5", "found 'exakt', did you mean 'exact'?"),
        ("rewrite rcode a.x 2 24", "invalid RCODE '24'"),
        ("rewrite rcode a.x SERVFIAL 0", "invalid RCODE 'SERVFIAL' for a rcode rule, did you mean"),
        ("rewrite rcode a.x 2", "a rcode rule takes"),
        ("rewrite cname a", "a cname rule takes"),
        ("rewrite edns0 local", "too few arguments for an EDNS0 rule"),
        ("rewrite edns0 lokal set 1 a", "invalid rule type 'lokal', did you mean 'local'?"),
        ("rewrite edns0 local sett 1 a", "invalid action: 'sett', did you mean 'set'?"),
        ("rewrite edns0 local set 65536 a", "an EDNS option code is a number from 0 to 65535"),
        ("rewrite edns0 local set 1 0xabc", "'0xabc' is not hexadecimal"),
        ("rewrite edns0 local set 1 {client}", "unsupported variable name '{client}'"),
        ("rewrite edns0 local unset 1 a", "edns0 local unset takes CODE, found 2"),
        ("rewrite edns0 nsid set junk", "edns0 nsid set takes no arguments, found 1"),
        ("rewrite edns0 subnet set 33 56", "an IPv4 bit mask length is a number from 0 to 32"),
        (f"rewrite name regex {'a' * 10001} b", "regex pattern too long: 10001 > 10000"),
    ],
)
def test_mistakes_are_said(text: str, reason: str) -> None:
    (problem,) = errors_of(text)
    assert problem.startswith("Corefile:") and reason in problem


def test_every_bad_rule_is_said_with_its_line() -> None:
    found = errors_of("rewrite nam a b\nrewrite name a b\nrewrite ttl a x")
    assert [problem.split(": ")[0] for problem in found] == ["Corefile:1", "Corefile:3"]
