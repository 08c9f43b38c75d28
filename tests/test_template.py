"""`template`: answers made from the question."""

from __future__ import annotations

import pytest
from support import Stub, a, answer, build, errors_of, make_setup, question

from kdns.dns import types as t
from kdns.dns.message import AA, FOREVER, TC, Edns, Reply
from kdns.dns.text import parse_rr, render_rr
from kdns.plugins.plugin import Plugin
from kdns.plugins.setup import Setup

BELOW = 23  # the rcode of a reply that comes from below


def chain(text: str, cx: Setup | None = None, below: Plugin | None = None) -> list[Plugin]:
    cx = cx or make_setup()
    plugins = build(text, cx)
    assert cx.problems.errors == []

    class Below(Stub):
        def on_query(self, query: object) -> Reply:
            return Reply(BELOW)

    return [*plugins, below or Below()]


IP = r"""template IN A example {
  match "(^|[.])ip-(?P<a>[0-9]*)-(?P<b>[0-9]*)-(?P<c>[0-9]*)-(?P<d>[0-9]*)[.]example[.]$"
  answer "{{ .Name }} 60 IN A {{ .Group.a }}.{{ .Group.b }}.{{ .Group.c }}.{{ .Group.d }}"
  fallthrough
}
template IN PTR in-addr.arpa {
  match "^(?P<d>[0-9]*)[.](?P<c>[0-9]*)[.](?P<b>[0-9]*)[.](?P<a>[0-9]*)[.]in-addr[.]arpa[.]$"
  answer "{{ .Name }} 60 PTR ip-{{ .Group.a }}-{{ .Group.b }}-{{ .Group.c }}-{{.Group.d}}.example."
}
"""
HEX = r"""template IN A example {
  match "^ip0a5f(?P<c>[a-f0-9]{2})(?P<d>[a-f0-9]{2})[.]example[.]$"
  answer "{{ .Name }} 60 IN A 10.95.{{ parseInt .Group.c 16 8 }}.{{ parseInt .Group.d 16 8 }}"
}
"""
INVALID = """template ANY ANY invalid {
  rcode NXDOMAIN
  authority "invalid. 60 {{ .Class }} SOA ns.invalid. hostmaster.invalid. (1 60 60 60 60)"
  ederror 21 "Blocked according to RFC2606"
}
"""
MX = r"""template IN MX example {
  match "^ip-10-(?P<b>[0-9]*)-(?P<c>[0-9]*)-(?P<d>[0-9]*)[.]example[.]$"
  answer "{{ .Name }} 60 IN MX 10 {{ .Name }}"
  authority "example. 60 IN NS ns0.example." "example. 60 IN NS ns1.example."
  additional "{{ .Name }} 60 IN A 10.{{ .Group.b }}.{{ .Group.c }}.{{ .Group.d }}"
}
"""


@pytest.mark.parametrize(
    ("text", "name", "qtype", "rcode", "answers"),
    [
        (IP, "Ip-10-95-12-8.example.", "A", 0, ["ip-10-95-12-8.example. 60 IN A 10.95.12.8"]),
        (IP, "8.12.95.10.in-addr.arpa.", "PTR", 0,
         ["8.12.95.10.in-addr.arpa. 60 IN PTR ip-10-95-12-8.example."]),
        # no match: on with `fallthrough`, else SERVFAIL
        (IP, "www.example.", "A", BELOW, []),
        (IP, "x.in-addr.arpa.", "PTR", t.SERVFAIL, []),
        # another type, another zone: not for these templates
        (IP, "ip-10-95-12-8.example.", "AAAA", BELOW, []),
        (IP, "ip-10-95-12-8.example.org.", "A", BELOW, []),
        (HEX, "ip0a5f0c09.example.", "A", 0, ["ip0a5f0c09.example. 60 IN A 10.95.12.9"]),
        (INVALID, "x.invalid.", "MX", t.NXDOMAIN, []),
        (MX, "ip-10-1-2-3.example.", "MX", 0,
         ["ip-10-1-2-3.example. 60 IN MX 10 ip-10-1-2-3.example."]),
        # without options: NODATA for everything
        ("template ANY ANY", "x.", "TXT", 0, []),
        ("template IN A {\n rcode REFUSED\n}", "x.", "A", t.REFUSED, []),
        ("template IN A {\n rcode servfail\n}", "x.", "A", t.SERVFAIL, []),
        # a question for ANY is for each template; its type is then the template's
        ('template IN TXT {\n answer "{{ .Name }} IN {{ .Type }} hi"\n}', "x.", "ANY", 0,
         ['x. 3600 IN TXT "hi"']),
        # fallthrough for some names only
        ("template IN A {\n match ^a\n fallthrough x.y\n}", "b.x.y.", "A", BELOW, []),
        ("template IN A {\n match ^a\n fallthrough x.y\n}", "b.y.", "A", t.SERVFAIL, []),
        # to the next template first; patterns in order
        ('template IN A {\n match ^a\n fallthrough\n}\n'
         'template IN A {\n match ^c ^(b)\n match ^b\n'
         ' answer "{{.Name}} A 10.0.0.{{len .Match}}"\n}',
         "b.", "A", 0, ["b. 3600 IN A 10.0.0.2"]),
        # what a template sees
        ('template IN TXT a.b x.a.b {\n answer "{{.Name}} 5 TXT {{.Zone}} {{.Class}} {{.Type}}'
         ' {{.Remote}} {{.Question.Name}} {{.Message.Id}} {{.Message.RecursionDesired}}'
         ' {{.Regex}}"\n}',
         "Y.X.a.b.", "TXT", 0,
         ['y.x.a.b. 5 IN TXT "x.a.b." "IN" "TXT" "10.0.0.1" "Y.X.a.b." "4711" "true" ".*"']),
        ('template IN TXT {\n answer "{{.Name}} 5 TXT <{{.Meta `k`}}>"\n}', "x.", "TXT", 0,
         ['x. 5 IN TXT "<>"']),
    ],
)  # fmt: skip
def test_a_question_is_answered_by_the_first_template_it_matches(
    text: str, name: str, qtype: str, rcode: int, answers: list[str]
) -> None:
    reply = answer(chain(text), question(name, qtype, client="10.0.0.1"))
    assert reply.rcode == rcode
    assert [render_rr(rr) for rr in reply.answer] == answers


def test_all_sections_are_filled_and_the_reply_is_authoritative() -> None:
    reply = answer(chain(MX), question("ip-10-1-2-3.example.", "MX"))
    assert reply.flags == AA
    assert [render_rr(rr) for rr in reply.authority] == [
        "example. 60 IN NS ns0.example.",
        "example. 60 IN NS ns1.example.",
    ]
    assert [render_rr(rr) for rr in reply.additional] == ["ip-10-1-2-3.example. 60 IN A 10.1.2.3"]


def test_an_extended_dns_error_is_sent() -> None:
    reply = answer(chain(INVALID), question("x.invalid.", edns=Edns(1232)))
    assert reply.edns is not None
    assert reply.edns.options == [(15, b"\x00\x15Blocked according to RFC2606")]
    assert [render_rr(rr) for rr in reply.authority] == [
        "invalid. 60 IN SOA ns.invalid. hostmaster.invalid. 1 60 60 60 60"
    ]


def test_the_class_asked_for_is_seen() -> None:
    reply = answer(chain(INVALID), question("x.invalid.", qclass="CH"))
    assert reply.authority[0].cls == t.CH


def test_metadata_of_plugins_above_is_seen() -> None:
    query = question("x.", "TXT")
    query.meta = {"kubernetes/client-namespace": "default"}
    text = 'template IN TXT {\n answer "{{.Name}} TXT {{.Meta `kubernetes/client-namespace`}}"\n}'
    assert render_rr(answer(chain(text), query).answer[0]) == 'x. 3600 IN TXT "default"'


# --- CNAMEs -------------------------------------------------------------------------------

FOOGLE = """template IN ANY foogle.com {
  match "^foogle[.]com[.]$"
  answer "foogle.com 60 IN CNAME google.com"
}
"""


@pytest.mark.parametrize(
    ("qtype", "answers"),
    [
        ("A", ["foogle.com. 60 IN CNAME google.com.", "google.com. 300 IN A 10.0.0.1"]),
        ("AAAA", ["foogle.com. 60 IN CNAME google.com."]),
        ("CNAME", ["foogle.com. 60 IN CNAME google.com."]),
    ],
)
def test_what_a_cname_leads_to_is_looked_up_for_addresses(qtype: str, answers: list[str]) -> None:
    found = Reply(0, [a("google.com.", "10.0.0.1")], flags=TC)
    below = Stub({("google.com.", "A"): found})
    reply = answer(chain(FOOGLE, below=below), question("foogle.com.", qtype))
    assert [render_rr(rr) for rr in reply.answer] == answers
    assert bool(reply.flags & TC) == (qtype == "A")
    assert reply.rcode == t.NOERROR


def test_each_of_several_cnames_is_followed_in_place() -> None:
    below = Stub(
        {
            ("b.", "A"): Reply(0, [a("b.", "10.0.0.1")]),
            ("c.", "A"): Reply(0, [a("c.", "10.0.0.2")]),
        }
    )
    text = 'template IN A x {\n answer "x. CNAME b." "x. CNAME c." "x. A 10.0.0.3"\n}'
    reply = answer(chain(text, below=below), question("x."))
    assert [rr.type for rr in reply.answer] == [t.CNAME, t.A, t.CNAME, t.A, t.A]


def test_a_cname_to_itself_ends() -> None:
    text = 'template IN A {\n answer "{{ .Name }} CNAME {{ .Name }}"\n}'
    reply = answer(chain(text), question("x."))
    assert reply.rcode == t.NOERROR and 1 <= len(reply.answer) <= 11


# --- failures, metrics, repeats -----------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "family", "reason"),
    [
        ("{{ .Name }} TXT {{ index .Match 2 }}", "template_failures",
         "template: answer:1:19: executing \"answer\" at <index .Match 2>: error calling index:"
         " index out of range: 2"),
        ("{{ .Name }} TXT {{ parseInt `gg` 16 8 }}", "template_failures",
         'error calling parseInt: strconv.ParseUint: parsing "gg": invalid syntax'),
        ("{{ .Name }} TXT {{ parseInt `100` 16 8 }}", "template_failures", "value out of range"),
        ("{{ .Name }} TXT {{ parseInt `1` 99 8 }}", "template_failures", "invalid base 99"),
        ("{{ .Name }} TXT {{ parseInt 1 10 8 }}", "template_failures", "wrong type for value"),
        ("{{ .Name }}", "rr_failures", ""),
        ("{{ .Name }} A 10.0.0.999", "rr_failures", ""),
        ("{{ if false }}x{{ end }}", "rr_failures", ""),
    ],
)  # fmt: skip
def test_a_template_that_fails_is_servfail_counted_and_said(
    template: str, family: str, reason: str
) -> None:
    cx = make_setup()
    text = f'template IN TXT example {{\n answer "{template}"\n}}'
    reply = answer(chain(text, cx), question("x.example.", "TXT"))
    assert (reply.rcode, reply.answer, reply.keep) == (t.SERVFAIL, [], 0)
    assert reply.error is not None and reason in reply.error
    labels = ("dns://:53", "example.", "", "IN", "TXT")
    source = template.replace("{{ ", "{{").replace(" }}", "}}")
    counted = cx.metrics.value(f"coredns_template_{family}_total", *labels, "answer", source)
    assert counted == 1
    assert cx.metrics.value("coredns_template_matches_total", *labels) == 1


def test_matches_are_counted_and_again_for_each_repeat() -> None:
    cx = make_setup()
    reply = answer(chain(IP, cx), question("ip-1-2-3-4.example."))
    labels = ("dns://:53", "example.", "", "IN", "A")
    assert cx.metrics.value("coredns_template_matches_total", *labels) == 1
    assert reply.keep == FOREVER
    assert [value for _, value in reply.tally or ()] == [1]


@pytest.mark.parametrize(
    ("template", "keep", "by_client"),
    [
        ("{{ .Name }} TXT {{ .Zone }}", FOREVER, False),
        ("{{ .Question.Name }} TXT x", FOREVER, False),
        ("{{ .Name }} TXT {{ .Message.Id }}", 0, False),
        ("{{ .Name }} TXT {{ .Remote }}", 0, True),
        ("{{ .Name }} TXT {{ with .Match }}{{ $.Remote }}{{ end }}", 0, True),
        ("{{ .Name }} TXT x{{ .Meta `k` }}", 0, True),
        ("{{ .Name }} TXT {{ with $x := . }}{{ $x.Remote }}{{ end }}", 0, True),
    ],
)
def test_a_reply_is_repeated_only_if_it_would_be_made_again(
    template: str, keep: float, by_client: bool
) -> None:
    plugins = chain(f'template IN TXT {{\n answer "{template}"\n}}')
    assert answer(plugins, question("x.", "TXT")).keep == keep
    assert plugins[0].per_client is by_client


# --- mistakes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("template", "'template' needs a CLASS and a TYPE"),
        ("template ANY", "'template' needs a CLASS and a TYPE"),
        ("template X A", "invalid query class 'X'"),
        ("template IN AAA", "invalid RR type 'AAA', did you mean 'aaaa'?"),
        ("template IN A {\n answre x\n}", "unknown property 'answre', did you mean 'answer'?"),
        ("template IN A {\n answer\n}", "'answer' needs an argument"),
        ("template IN A {\n match\n}", "'match' needs an argument"),
        ("template IN A {\n match (a\n}", "could not parse regex: (a, missing closing )"),
        ('template IN A {\n answer "{{"\n}', "could not compile template: {{, template: answer:1:"),
        ('template IN A {\n authority "{{ nope }}"\n}', 'function "nope" not defined'),
        ('template IN A {\n answer "{{ .Grup.a }}"\n}', "a template has no field .Grup (known: Z"),
        ("template IN A {\n rcode\n}", "'rcode' needs an argument"),
        ("template IN A {\n rcode NXDOMIAN\n}", "unknown rcode 'NXDOMIAN', did you mean"),
        ("template IN A {\n ederror x\n}", "an extended DNS error code must be a number"),
        ("template IN A {\n ederror 21 two words\n}", "unexpected 'words' after 'ederror'"),
        ("template IN A {\n var x 1\n}", "CoreDNS's 'var' is not in kdns"),
        ("template IN A {\n upstream\n}", "warning: 'upstream' has no effect any more"),
        (f"template IN A {{\n match {'a' * 10001}\n}}", "regex pattern too long"),
    ],
)  # fmt: skip
def test_mistakes_are_said(text: str, reason: str) -> None:
    (problem,) = errors_of(text)
    assert problem.startswith("Corefile:") and reason in problem


def test_zones_default_to_those_of_the_server_block() -> None:
    cx = make_setup(["example.org."])
    plugins = chain('template IN A {\n answer "{{.Name}} A 10.0.0.1"\n}', cx)
    assert answer(plugins, question("x.example.org.")).answer == [
        parse_rr("x.example.org. A 10.0.0.1")
    ]
    assert answer(plugins, question("x.example.com.")).rcode == BELOW
