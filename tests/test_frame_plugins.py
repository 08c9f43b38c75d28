"""The plugins around the answering: bind, debug, tls, reload, health, ready, loop."""

from __future__ import annotations

import logging

import pytest
from support import FakeClock, build, errors_of, make_setup, question, run

from kdns.dns import types as t
from kdns.dns.message import Query, Reply
from kdns.dns.name import is_subdomain, parse_name, render_name
from kdns.plugins.bind import Bind
from kdns.plugins.chain import Pending
from kdns.plugins.debug import Debug
from kdns.plugins.forward import Forward
from kdns.plugins.health import Health
from kdns.plugins.loop import WINDOW, Loop
from kdns.plugins.plugin import Every, HttpRoute, Plugin, Probe
from kdns.plugins.ready import Ready
from kdns.plugins.reload import Reload
from kdns.plugins.setup import Setup
from kdns.plugins.tls import Tls

MISTAKES = {
    "bind": ["1: 'bind' needs at least one address or interface name, as in bind lo"],
    "bind 127.0.0.1:53": [
        "1: not a valid IP address or interface name: '127.0.0.1:53'; write 'bind 127.0.0.1',"
        " ports stand in the block's key"
    ],
    "bind 10.0.0.0/8": [
        "1: not a valid IP address or interface name: '10.0.0.0/8'; write 'bind 10.0.0.0',"
        " ports stand in the block's key"
    ],
    "bind 10.0.0.256": ["1: not a valid IP address or interface name: '10.0.0.256'"],
    "bind an-interface-too-long": [
        "1: not a valid IP address or interface name: 'an-interface-too-long'"
    ],
    "bind lo {\nexcept\nexept lo\n}": [
        "2: 'except' needs an argument, found none",
        "3: unknown property 'exept', did you mean 'except'?",
    ],
    "debug on": ["1: unexpected 'on' after 'debug'"],
    "tls": ["1: 'tls' needs 2 arguments, found none"],
    "tls cert.pem": ["1: 'tls' needs 2 arguments, found 1"],
    "tls a b c d": ["1: unexpected 'd' after 'tls'"],
    "tls a b\ntls a b": [
        "2: plugin/tls: this plugin can only be used once per Server Block; the first is in line 1"
    ],
    "tls a b {\nclient_auth verfy_if_given\nclient_auth\nkeylog\nciphers x\n}": [
        "2: unknown authentication type 'verfy_if_given', did you mean 'verify_if_given'?",
        "3: 'client_auth' needs an argument, found none",
        "4: 'keylog' needs an argument, found none",
        "5: unknown property 'ciphers' (known: client_auth, keylog)",
    ],
    "tls a b {\nclient_auth require\nkeylog /k\n}": [
        "2: warning: client_auth require is served as require_and_verify: a certificate that is"
        " given must verify",
        "3: warning: the secrets of all TLS sessions are written to /k",
    ],
    "tls {\nacme example.org\n}": [
        "1: kdns obtains no certificates by ACME; write 'tls CERT KEY' with files that another"
        " program keeps up to date"
    ],
    "reload 1s": ["1: interval value must be greater or equal to 2s"],
    "reload 0": ["1: interval value must be greater or equal to 2s"],
    "reload 30s 500ms": ["1: jitter value must be 0 or greater or equal to 1s"],
    "reload 30": ["1: '30' is not a duration; write it as 5s or 1m30s"],
    "reload 30s 15s 1s": ["1: unexpected '1s' after 'reload'"],
    "reload\nreload 5s": ["2: warning: 'reload' counts once; the one in line 1 is used"],
    "reload {\njitter 1s\n}": ["2: unknown property 'jitter'"],
    "health 8080": ["1: address 8080: missing port in address; write it as :8080 or [::1]:8080"],
    "health ::1:8080": [
        "1: address ::1:8080: missing port in address; write it as :8080 or [::1]:8080"
    ],
    "health :http": ["1: address :http: invalid port 'http'"],
    "health :70000": ["1: address :70000: invalid port '70000'"],
    "health a b": ["1: unexpected 'b' after 'health'"],
    "health {\nlameduck\nlameduck 5\nlameduk 5s\n}": [
        "2: 'lameduck' needs an argument, found none",
        "3: '5' is not a duration; write it as 5s or 1m30s",
        "4: unknown property 'lameduk', did you mean 'lameduck'?",
    ],
    "health\nhealth :8081": ["1: warning: 'health' counts once; line 2 is used"],
    "ready {\nmonitro continuously\n}": ["2: unknown property 'monitro', did you mean 'monitor'?"],
    "ready {\nmonitor continously\nmonitor\n}": [
        "2: monitor type 'continously' not supported, did you mean 'continuously'?",
        "3: 'monitor' needs an argument, found none",
    ],
    "ready localhost": [
        "1: address localhost: missing port in address; write it as :8080 or [::1]:8080"
    ],
    "ready\nready": [
        "2: plugin/ready: this plugin can only be used once per Server Block; the first is in"
        " line 1"
    ],
    "loop 5": ["1: unexpected '5' after 'loop'"],
    "loop {\nx\n}": ["2: unknown property 'x'"],
}


@pytest.mark.parametrize(("text", "expected"), MISTAKES.items(), ids=list(MISTAKES))
def test_mistakes(text: str, expected: list[str]) -> None:
    assert [line.removeprefix("Corefile:") for line in errors_of(text)] == expected


# --- bind, debug, tls, reload -----------------------------------------------------------------


def test_bind_keeps_the_exceptions_of_each_line_apart() -> None:
    plugins = build("bind lo 10.0.0.1 fe80::1%eth0 {\nexcept 127.0.0.1 ::1\n}\nbind eth0")
    found = [(p.addresses, p.excepted) for p in plugins if isinstance(p, Bind)]
    assert found == [
        (("lo", "10.0.0.1", "fe80::1%eth0"), ("127.0.0.1", "::1")),
        (("eth0",), ()),
    ]


def test_debug_is_a_flag() -> None:
    (plugin,) = build("debug\ndebug")
    assert isinstance(plugin, Debug)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tls /c /k", ("/c", "/k", "", "nocert", "")),
        ("tls c.pem /k /ca {\n}", ("./c.pem", "/k", "/ca", "nocert", "")),
        (
            "tls /c /k /ca {\nclient_auth require_and_verify\nkeylog l\n}",
            ("/c", "/k", "/ca", "require_and_verify", "./l"),
        ),
        ("tls /c /k {\nclient_auth request\n}", ("/c", "/k", "", "verify_if_given", "")),
    ],
)
def test_tls(text: str, expected: tuple[str, ...]) -> None:
    (tls,) = build(text)
    assert isinstance(tls, Tls)
    assert (tls.cert, tls.key, tls.ca, tls.client_auth, tls.keylog) == expected


@pytest.mark.parametrize(
    ("text", "interval", "jitter"),
    [
        ("reload", 30, 15),
        ("reload 10s", 10, 5),
        ("reload 2s 1s", 2, 1),
        ("reload 1m 10s", 60, 10),
        ("reload 1m 0", 60, 0),
    ],
)
def test_reload_pauses_within_half_a_jitter(text: str, interval: float, jitter: float) -> None:
    (plugin,) = build(text)
    assert isinstance(plugin, Reload)
    assert (plugin.interval, plugin.jitter) == (interval, jitter)
    pauses = [plugin.pause() for _ in range(200)]
    assert all(abs(pause - interval) <= jitter / 2 for pause in pauses)
    assert len(set(pauses)) > 100 or not jitter


# --- health -------------------------------------------------------------------------------------


def route(plugin: Plugin) -> HttpRoute:
    (found,) = [item for item in plugin.work() if isinstance(item, HttpRoute)]
    return found


def test_health_answers_ok_and_lingers() -> None:
    (plugin,) = build("health")
    found = route(plugin)
    assert (found.address, found.path, found.lameduck) == (":8080", "/health", 0)
    assert found.handle({}) == (200, "text/plain; charset=utf-8", b"OK")
    (plugin,) = build("health 127.0.0.1:0 {\nlameduck 1m5s\n}")
    assert isinstance(plugin, Health) and plugin.lameduck == 65
    assert (route(plugin).address, route(plugin).lameduck) == ("127.0.0.1:0", 65)


def test_health_records_how_late_the_loop_is(caplog: pytest.LogCaptureFixture) -> None:
    cx = make_setup()
    (plugin,) = build("health", cx)
    (every,) = [item for item in plugin.work() if isinstance(item, Every)]
    name = "coredns_health_request_duration_seconds"
    for at in (100.0, 101.0, 102.01, 105.0):
        every.tick(at)
    text = cx.metrics.render()[0].decode()
    assert f'{name}_bucket{{le="0.00025"}} 1.0' in text
    assert f'{name}_bucket{{le="0.025"}} 2.0' in text
    assert f"{name}_count 3.0" in text
    assert "coredns_health_request_failures_total 0.0" in text
    assert [r.message for r in caplog.records] == [
        "/health would have answered 1.990 s late: the process is overloaded"
    ]


# --- ready --------------------------------------------------------------------------------------


class Waiting(Plugin):
    """A plugin that is ready when told so."""

    def __init__(self, word: str, why: str = "not listed yet") -> None:
        self.word = word  # type: ignore[misc]
        self.why = why

    def not_ready(self) -> str:
        return self.why


def ready(text: str, *others: Plugin) -> Ready:
    (plugin,) = build(text)
    assert isinstance(plugin, Ready)
    plugin.link([plugin, *others])
    return plugin


def status(plugin: Ready) -> tuple[int, str]:
    code, content_type, body = route(plugin).handle({})
    assert content_type == "text/plain; charset=utf-8"
    return code, body.decode()


def test_ready_where_nobody_has_to_wait() -> None:
    plugin = ready("ready")
    assert (route(plugin).address, route(plugin).path) == (":8181", "/ready")
    assert status(plugin) == (200, "OK")


def test_ready_names_who_is_not(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    one, other, again = Waiting("kubernetes"), Waiting("file", "no zone"), Waiting("kubernetes")
    plugin = ready("ready 127.0.0.1:0", one, other, again)
    assert status(plugin) == (503, "file,kubernetes")
    assert status(plugin) == (503, "file,kubernetes")
    one.why = other.why = ""
    assert status(plugin) == (503, "kubernetes")
    again.why = ""
    assert status(plugin) == (200, "OK")
    assert [r.message for r in caplog.records] == [
        'Plugins not ready: "file,kubernetes" (kubernetes: not listed yet; file: no zone;'
        " kubernetes: not listed yet)",
        'Plugins not ready: "kubernetes" (kubernetes: not listed yet)',
        "All plugins are ready",
    ]


@pytest.mark.parametrize(
    ("text", "after"),
    [
        ("ready", (503, "kubernetes")),
        ("ready {\nmonitor continuously\n}", (503, "kubernetes")),
        ("ready {\nmonitor until-ready\n}", (200, "OK")),
    ],
)
def test_ready_can_flip_back(text: str, after: tuple[int, str]) -> None:
    kubernetes = Waiting("kubernetes")
    plugin = ready(text, kubernetes)
    assert status(plugin) == (503, "kubernetes")
    kubernetes.why = ""
    assert status(plugin) == (200, "OK")
    kubernetes.why = "the API server is gone"
    assert status(plugin) == after


def test_ready_says_no_in_lameduck() -> None:
    plugin = ready("ready", Waiting("kubernetes", ""))
    plugin.lameduck = True
    assert status(plugin) == (503, "Shutting down")


# --- loop ---------------------------------------------------------------------------------------

TEXT = "loop\nforward cluster.local 10.0.0.1\nforward . 127.0.0.53:53"


class Looping:
    """A server block with `loop` whose upstream asks it back."""

    def __init__(self, text: str = TEXT, zones: tuple[str, ...] = (".",)) -> None:
        self.clock = FakeClock()
        self.cx: Setup = make_setup(zones, self.clock)
        self.plugins = build(text, self.cx)
        (self.loop,) = [p for p in self.plugins if isinstance(p, Loop)]
        self.forwards = [p for p in self.plugins if isinstance(p, Forward)]
        (self.probe,) = [w for w in self.loop.work() if isinstance(w, Probe)]

    def ask(self, query: Query | None = None) -> str:
        """Return what comes of a query, the probe's by default."""
        result = run(self.plugins, query or self.probe.query.asking())
        if isinstance(result, Pending):
            return "forwarded"
        assert isinstance(result, Reply)
        return t.rcode_name(result.rcode) + (f": {result.error}" if result.error else "")

    @property
    def gauge(self) -> list[float]:
        family = self.cx.metrics.families["kdns_loop_detected"]
        return [cell.value for cell in family.cells.values()]


@pytest.mark.parametrize("zone", [".", "Example.org."])
def test_loop_asks_for_a_random_name_of_its_first_zone(zone: str) -> None:
    block = Looping(zones=(zone, "other."))
    query = block.probe.query
    assert query.qtype == t.HINFO
    assert is_subdomain(query.key, parse_name(zone).lower())
    first, second, *rest = render_name(query.name).split(".")
    assert first.isdecimal() and second.isdecimal() and first != second
    assert ".".join(rest) in (zone.lower(), "")
    assert (block.probe.seconds, block.probe.interval) == (30, 1)


def test_loop_is_quiet_where_the_question_does_not_come_back() -> None:
    block = Looping()
    assert not block.probe.done()
    assert block.ask() == "forwarded"
    assert block.probe.done()
    assert block.ask() == "forwarded"
    assert block.ask(question("example.org.", "HINFO")) == "forwarded"
    assert block.gauge == [0]


def test_a_loop_turns_the_forward_off_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    block = Looping()
    text = 'SERVFAIL: loop detected for zone ".": what is forwarded comes back to this server'
    assert [block.ask() for _ in range(4)] == ["forwarded", "forwarded", "SERVFAIL", "SERVFAIL"]
    assert block.ask(question("example.org.")) == text
    assert block.ask(question("a.cluster.local.")) == "forwarded"
    assert block.gauge == [1]
    (record,) = caplog.records
    assert record.levelname == "ERROR" and record.name == "kdns.plugin/loop"
    assert record.message.startswith('Loop (from 127.0.0.1) detected for zone ".": ')
    assert record.message.endswith(f'Query: "HINFO {render_name(block.probe.query.name)}"')


def test_somebody_who_saw_the_name_cannot_turn_forwarding_off_later() -> None:
    block = Looping()
    assert block.ask() == "forwarded"
    block.clock.now += WINDOW + 1
    assert [block.ask() for _ in range(5)] == ["forwarded"] * 5
    assert block.gauge == [0]


def test_the_name_is_only_counted_as_hinfo() -> None:
    block = Looping()
    name = render_name(block.probe.query.name)
    assert [block.ask(question(name)) for _ in range(5)] == ["forwarded"] * 5
    assert not block.probe.done()


def test_loop_below_a_zone_that_leaves_no_room_for_a_name() -> None:
    zone = ".".join(["a" * 60] * 4) + "."
    assert errors_of("loop", (zone,)) == [
        f"Corefile:1: warning: 'loop' looks for nothing: no name fits below the zone {zone}"
    ]
