"""`log` and `errors`: what an operator reads."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import pytest
from support import FakeClock, a, answer, build, errors_of, make_setup, question, run

from kdns.dns import types as t
from kdns.dns.message import AA, AD, CD, RA, RR, TC, Edns, Query, Reply
from kdns.dns.name import parse_name
from kdns.plugins.errors import render_duration
from kdns.plugins.plugin import DROP, Every, Outcome, Plugin
from kdns.plugins.setup import Setup


class Lines(logging.Handler):
    """Collects `LEVEL text` with the plugin prefix a kdns log line has."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        prefix = f"{record.name.partition('.')[2]}: " if "." in record.name else ""
        self.lines.append(f"[{record.levelname}] {prefix}{record.getMessage()}")


@pytest.fixture
def lines() -> Iterator[list[str]]:
    logger = logging.getLogger("kdns-under-test")
    handler = Lines()
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.addHandler(handler)
    yield handler.lines
    logger.removeHandler(handler)


def prepared(clock: FakeClock | None = None, label: str = "dns://:53") -> Setup:
    cx = make_setup(clock=clock)
    cx.log = logging.getLogger("kdns-under-test")
    cx.facts.label = label
    return cx


class Serve(Plugin):
    """A last plugin that answers `outcome` to everything, `seconds` later."""

    word = "serve"

    def __init__(self, outcome: Outcome, clock: FakeClock | None = None, seconds: float = 0):
        self._outcome = outcome
        self._clock = clock or FakeClock()
        self._seconds = seconds

    def on_query(self, query: Query) -> Outcome:
        self._clock.now += self._seconds
        return self._outcome


def asked(
    text: str,
    query: Query,
    outcome: Outcome,
    *,
    seconds: float = 0.0,
    label: str = "dns://:53",
) -> None:
    """Put one question through these plugins; the plugin below takes `seconds`."""
    clock = FakeClock(query.received)
    run([*build(text, prepared(clock, label)), Serve(outcome, clock, seconds)], query)


A1 = a("example.org.", "10.0.0.1")
SOA = RR(parse_name("org."), t.SOA, 60, parse_name("ns.") + parse_name("mail.") + bytes(20))
NS = RR(parse_name("org."), t.NS, 60, parse_name("ns."))


# --- log ----------------------------------------------------------------------------------


def test_the_common_line(lines: list[str]) -> None:
    query = question("Example.ORG.", "A", edns=Edns(4096, True))
    query.size = 40
    asked("log", query, Reply(answer=[A1]), seconds=0.000345)
    assert lines == [
        '[INFO] 127.0.0.1:40000 - 4711 "A IN example.org. udp 40 true 4096"'
        " NOERROR qr,aa,rd 56 0.000345s"
    ]


def test_the_combined_line_of_a_failure_from_ipv6(lines: list[str]) -> None:
    query = question("example.org.", "TYPE65280", client="2001:db8::7", proto="tls", rd=False)
    asked('log . "{combined}"', query, Reply(t.SERVFAIL, flags=0))
    assert lines == [
        '[INFO] [2001:db8::7]:40000 - 4711 "TYPE65280 IN example.org. tcp 29 false 65535"'
        ' SERVFAIL qr 29 0s "0"'
    ]


def test_a_dropped_query_is_logged_without_an_answer(lines: list[str]) -> None:
    asked("log", question("example.org.", "MX"), DROP, seconds=1.5)
    assert lines == [
        '[INFO] 127.0.0.1:40000 - 4711 "MX IN example.org. udp 29 false 512" - - 0 1.5s'
    ]


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("{remote} {port} {local}", "127.0.0.1 40000 [::]"),
        ("{type}/{class}/{name}", "A/IN/example.org."),
        ("{>opcode} {>rflags} {rcode}", "0 qr,aa,tc,rd,ra,ad,cd NOERROR"),
        ("100% {name} %s", "100% example.org. %s"),
        ('{"name":"{name}","id":{>id}}', '{"name":"example.org.","id":4711}'),
        ("{ {type} }", "{ A }"),
        ("A } {type}", "A } A"),
        ("{/log/type} {/log/class} {/zone} {/none}", "NOERROR success blue -"),
        ("{size} {rsize}", "29 56"),
    ],
)
def test_placeholders(lines: list[str], form: str, expected: str) -> None:
    query = question("example.org.")
    query.flags |= CD
    query.meta = {"zone": "blue"}
    reply = Reply(answer=[A1], flags=AA | TC | RA | AD)
    form = form.replace('"', '\\"')
    asked(f'log . "{form}"', query, reply)
    assert lines == [f"[INFO] {expected}"]


def test_local_is_the_address_the_server_is_bound_to(lines: list[str]) -> None:
    asked('log . "{local}"', question("a."), Reply(), label="dns://127.0.0.53:53")
    asked('log . "{local}"', question("a."), Reply(), label="dns://[fd00::53]:53")
    assert lines == ["[INFO] 127.0.0.53", "[INFO] [fd00::53]"]


def test_an_rcode_without_a_name_is_logged_as_a_number(lines: list[str]) -> None:
    asked('log . "{rcode}"', question("a."), Reply(12))
    assert lines == ["[INFO] 12"]


def test_the_response_size_counts_an_opt_only_where_the_reply_brought_one(
    lines: list[str],
) -> None:
    reply = Reply(answer=[A1])
    reply.edns = Edns(1232, options=[(15, b"\x00\x0f")])
    asked('log . "{rsize}"', question("example.org.", edns=Edns(1232)), reply)
    assert lines == [f"[INFO] {56 + 11 + 6}"]


@pytest.mark.parametrize(
    ("reply", "qtype", "kind", "response_class"),
    [
        (Reply(answer=[A1]), "A", "NOERROR", "success"),
        (Reply(), "A", "NOERROR", "success"),
        (Reply(authority=[NS]), "A", "DELEGATION", "success"),
        (Reply(authority=[NS, SOA]), "A", "NODATA", "denial"),
        (Reply(t.NXDOMAIN, authority=[SOA]), "A", "NXDOMAIN", "denial"),
        (Reply(t.NXDOMAIN, answer=[A1]), "A", "OTHERERROR", "error"),
        (Reply(t.SERVFAIL), "A", "SERVERERROR", "error"),
        (Reply(t.REFUSED), "A", "OTHERERROR", "error"),
        (Reply(answer=[A1]), "AXFR", "META", "error"),
    ],
)
def test_classes_of_answers(
    lines: list[str], reply: Reply, qtype: str, kind: str, response_class: str
) -> None:
    form = '"{/log/type} {/log/class}"'
    for allowed in ("success", "denial", "error"):
        asked(f"log . {form} {{\n class {allowed}\n}}", question("a.", qtype), reply)
    asked(f"log . {form} {{\n class success\n class all\n}}", question("a.", qtype), reply)
    assert lines == [f"[INFO] {kind} {response_class}"] * 2


def names_logged(text: str, names: Sequence[str], lines: list[str]) -> list[str]:
    for name in names:
        asked(text, question(name), Reply())
    return [line.removeprefix("[INFO] ") for line in lines]


def test_only_names_in_the_scopes_are_logged(lines: list[str]) -> None:
    text = 'log Example.org net. "{name}"'
    names = ["www.example.org.", "EXAMPLE.org.", "badexample.org.", "a.net.", "com."]
    assert names_logged(text, names, lines) == ["www.example.org.", "example.org.", "a.net."]


def test_of_several_log_lines_the_first_whose_scope_fits_decides(lines: list[str]) -> None:
    text = 'log a.org "one {name}" {\n class error\n}\nlog org "two {name}"\nlog . "three {name}"'
    assert names_logged(text, ["x.a.org.", "b.org.", "com."], lines) == ["two b.org.", "three com."]


def test_a_repeat_from_the_packet_cache_is_logged_for_its_own_client(lines: list[str]) -> None:
    reply = Reply(answer=[A1], keep=30.0)
    query = question("100%.example.org.")
    found = answer([*build("log", prepared()), Serve(reply)], query)
    assert found.on_repeat is not None
    for client, qid, seconds in ((("10.1.1.1", 1), 7, 0.25), (("fe80::1", 2), 8, 0.000000002)):
        for call in found.on_repeat:
            call(client, qid, seconds)
    tail = '"A IN 100%.example.org. udp 34 false 512" NOERROR qr,aa,rd 61'
    assert lines == [
        f"[INFO] 127.0.0.1:40000 - 4711 {tail} 0s",
        f"[INFO] 10.1.1.1:1 - 7 {tail} 0.25s",
        f"[INFO] [fe80::1]:2 - 8 {tail} 0.000000002s",
    ]


def test_a_strangers_name_cannot_break_the_line(lines: list[str]) -> None:
    asked('log . "{name}"', question('a\\010b\\"%s.org.'), Reply())
    assert lines == ['[INFO] a\\010b\\"%s.org.']


# Text from the first quote on, as CoreDNS 1.13.1 logged it.
RECORDED = [
    (
        "whoami",
        question("a.b.example."),
        '"A IN a.b.example. udp 29 false 512" NOERROR qr,aa,rd 91',
    ),
    (
        "bufsize\nwhoami",
        question("A.b.example.", edns=Edns(4096)),
        '"A IN a.b.example. udp 40 false 1232" NOERROR qr,aa,rd 91',
    ),
    (
        "whoami",
        question("A.b.example.", edns=Edns(100, True)),
        '"A IN a.b.example. udp 40 true 512" NOERROR qr,aa,rd 91',
    ),
    (
        "acl {\n block type A net 127.0.0.0/8\n}",
        question("x.acl.test.", edns=Edns(1400)),
        '"A IN x.acl.test. udp 39 false 1400" REFUSED qr,rd 45',
    ),
    (
        "acl {\n filter type AAAA\n}",
        question("x.acl.test.", "AAAA"),
        '"AAAA IN x.acl.test. udp 28 false 512" NOERROR qr,rd 45',
    ),
    (
        "acl {\n drop type MX\n}",
        question("x.acl.test.", "MX"),
        '"MX IN x.acl.test. udp 28 false 512" - - 0',
    ),
    (
        "whoami\nheader {\n response set aa ra\n response clear rd\n}",
        question("x.acl.test.", "TXT"),
        '"TXT IN x.acl.test. udp 28 false 512" NOERROR qr,aa,ra 88',
    ),
    (
        "local",
        question("localhost.", "TXT"),
        '"TXT IN localhost. udp 27 false 512" NOERROR qr,rd 95',
    ),
    ("any", question("any.test.", "ANY"), '"ANY IN any.test. udp 26 false 512" NOERROR qr,rd 73'),
]


@pytest.mark.parametrize(("text", "query", "recorded"), RECORDED)
def test_lines_read_as_coredns_wrote_them(
    lines: list[str], text: str, query: Query, recorded: str
) -> None:
    if query.edns is not None:
        query.size += 11  # make_query does not count OPT
    run(build(f"log\n{text}", prepared(FakeClock(query.received))), query)
    assert lines == [f"[INFO] 127.0.0.1:40000 - 4711 {recorded} 0s"]


# --- errors -------------------------------------------------------------------------------


def test_a_failure_is_logged_with_its_question(lines: list[str]) -> None:
    failed = Reply(t.SERVFAIL, flags=0, error="read udp 10.0.0.9:53: i/o timeout")
    asked("errors", question("Example.org.", "AAAA"), failed)
    assert lines == [
        "[ERROR] plugin/errors: 2 example.org. AAAA: read udp 10.0.0.9:53: i/o timeout"
    ]


def test_an_rcode_alone_is_no_error(lines: list[str]) -> None:
    asked("errors stdout {\n stacktrace\n}", question("a."), Reply(t.SERVFAIL))
    assert lines == []


def test_a_repeated_failure_is_logged_again(lines: list[str]) -> None:
    failed = Reply(t.SERVFAIL, error="broken", keep=5.0)
    reply = answer([*build("errors", prepared()), Serve(failed)], question("a."))
    assert reply.on_repeat is not None
    for call in reply.on_repeat:
        call(("10.1.1.1", 1), 7, 0.0)
    assert lines == ["[ERROR] plugin/errors: 2 a. A: broken"] * 2


class Failing:
    """A server whose upstream fails; time moves when told to."""

    def __init__(self, options: str) -> None:
        self.clock = FakeClock()
        self.plugins = build(f"errors {{\n {options}\n}}", prepared(self.clock))
        (work,) = self.plugins[0].work()
        assert isinstance(work, Every)
        self.every = work

    def fail(self, error: str, times: int = 1) -> None:
        for _ in range(times):
            reply = Reply(t.SERVFAIL, error=error)
            answer([*self.plugins, Serve(reply)], question("a."))

    def wait(self, seconds: float) -> None:
        self.clock.now += seconds
        self.every.tick(self.clock.now)


def test_errors_alike_are_summed_up(lines: list[str]) -> None:
    server = Failing('consolidate 5m ".* i/o timeout$" warning\n consolidate 30s "^Failed to .+"')
    server.fail("read udp: i/o timeout", times=3)
    server.fail("Failed to dial")
    server.fail("something else")
    assert lines == ["[ERROR] plugin/errors: 2 a. A: something else"]
    server.wait(29.9)
    assert len(lines) == 1
    server.wait(0.1)
    server.wait(270)
    server.wait(600)
    assert lines[1:] == [
        "[ERROR] plugin/errors: 1 errors like '^Failed to .+' occurred in last 30s",
        "[WARNING] plugin/errors: 3 errors like '.* i/o timeout$' occurred in last 5m0s",
    ]


def test_show_first_logs_the_first_at_once(lines: list[str]) -> None:
    server = Failing('consolidate 30s "timeout$" info show_first')
    server.fail("timeout")
    server.wait(30)
    assert lines == ["[INFO] plugin/errors: 2 a. A: timeout"]
    server.fail("timeout", times=3)
    server.wait(30)
    assert lines[1:] == [
        "[INFO] plugin/errors: 2 a. A: timeout",
        "[INFO] plugin/errors: 3 errors like 'timeout$' occurred in last 30s",
    ]


def test_the_first_pattern_that_fits_takes_the_error(lines: list[str]) -> None:
    server = Failing("consolidate 10s out$\n consolidate 10s timeout$")
    server.fail("timeout", times=2)
    server.wait(10)
    assert lines == ["[ERROR] plugin/errors: 2 errors like 'out$' occurred in last 10s"]


@pytest.mark.parametrize(("period", "seconds"), [("250ms", 0.25), ("30s", 1.0), ("1ns", 0.1)])
def test_summaries_are_looked_for_in_time(period: str, seconds: float) -> None:
    assert Failing(f"consolidate {period} x").every.interval == seconds


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.5, "500ms"), (1.5, "1.5s"), (90, "1m30s"), (300, "5m0s"), (3600, "1h0m0s")],
)
def test_durations_are_written_as_go_does(seconds: float, text: str) -> None:
    assert render_duration(seconds) == text


# --- the Corefile -------------------------------------------------------------------------

MISTAKES = {
    'log "{common}"': "Corefile:1: a format stands after a name: write log . '{common}' in double"
    " quotes",
    'log . "{nam} {x}"': "Corefile:1: warning: '{nam}' is no placeholder and is printed as it"
    " stands, did you mean '{name}'?",
    "log a..b": "Corefile:1: zone is not a valid domain name: 'a..b.' has an empty label",
    "log . {\n clas all\n}": "Corefile:2: unknown property 'clas', did you mean 'class'?",
    "log . {\n class\n}": "Corefile:2: 'class' needs an argument, found none",
    "log . {\n class denials\n}": "Corefile:2: invalid class: denials, did you mean 'denial'?",
    "errors stderr": "Corefile:1: invalid log file: stderr; errors go to standard output, write"
    " only 'errors'",
    "errors {\n stack\n}": "Corefile:2: unknown property 'stack', did you mean 'stacktrace'?",
    "errors {\n consolidate 5s\n}": "Corefile:2: 'consolidate' needs 2 arguments, found 1",
    "errors {\n consolidate 5 x\n}": "Corefile:2: '5' is not a duration; write it as 5s or 1m30s",
    "errors {\n consolidate 5s x warn\n}": "Corefile:2: unknown option in consolidate: warn, did"
    " you mean 'warning'?",
    "errors {\n consolidate 5s x info error\n}": "Corefile:2: consolidate takes one log level,"
    " found another: error",
    "errors {\n consolidate 5s x show_first info\n}": "Corefile:2: the log level must stand"
    " before show_first: info",
    "errors\nerrors": "Corefile:2: plugin/errors: this plugin can only be used once per Server"
    " Block; the first is in line 1",
}


@pytest.mark.parametrize("text", list(MISTAKES))
def test_mistakes_are_said_with_what_would_be_right(text: str) -> None:
    assert errors_of(text)[:1] == [MISTAKES[text]]


@pytest.mark.parametrize("pattern", ["(", "a**", "x{1001}", "a" * 10_001])
def test_a_bad_pattern_is_refused(pattern: str) -> None:
    (problem,) = errors_of(f'errors {{\n consolidate 5s "{pattern}"\n}}')
    assert problem.startswith(f"Corefile:2: '{pattern}' is not a regular expression: ")
