"""`kdns_log json`: what a program reads of each query."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from objects import endpoint, kubernetes, namespace, pod, service, slice_of, snapshot
from support import FakeClock, a, answer, build, errors_of, make_setup, question, run

from kdns.dns import types as t
from kdns.dns.ede import Ede
from kdns.dns.message import AA, AD, FOREVER, RA, RR, TC, Edns, Query, Reply
from kdns.dns.name import parse_name
from kdns.logs import QUERIES, JsonFormatter, TextFormatter
from kdns.metrics import Metrics
from kdns.plugins.kdns_log import FIELDS
from kdns.plugins.plugin import DROP, Feed, Outcome, Plugin
from kdns.plugins.setup import Setup
from kdns.registry.clients import Clients
from kdns.registry.snapshot import Changes, everything
from kdns.site import build_site, read_corefile

WALL = 1_760_000_000.25  # 2025-10-09T08:53:20.250Z
A1 = a("example.org.", "10.0.0.1")
SOA = RR(parse_name("org."), t.SOA, 60, parse_name("ns.") + parse_name("mail.") + bytes(20))


class Lines(logging.Handler):
    """Collects lines as logs.py writes them."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        assert record.name.endswith(".queries")
        self.lines.append(record.getMessage())


@pytest.fixture
def lines() -> Iterator[list[str]]:
    logger = logging.getLogger("kdns-under-test")
    handler = Lines()
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    yield handler.lines
    logger.removeHandler(handler)


def prepared(clock: FakeClock | None = None) -> Setup:
    cx = make_setup(clock=clock)
    cx.log = logging.getLogger("kdns-under-test")
    cx.wall = lambda: WALL
    return cx


class Serve(Plugin):
    """A last plugin that answers the same to everything."""

    word = "serve"

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome

    def on_query(self, query: Query) -> Outcome:
        return self._outcome


def logged(text: str, query: Query, outcome: Outcome, lines: list[str]) -> dict[str, Any]:
    """Put one question; return the event it made."""
    run([*build(text, prepared(FakeClock(query.received + 0.000345))), Serve(outcome)], query)
    event: dict[str, Any] = json.loads(lines[-1])
    return event


# --- what an event says ---------------------------------------------------------------------


def test_all_of_an_answered_question_in_order(lines: list[str]) -> None:
    query = question("Example.ORG.", "A", edns=Edns(4096, True))
    reply = Reply(answer=[A1], served_by="hosts")
    event = logged("kdns_log json", query, reply, lines)
    assert list(event.items()) == [
        ("time", "2025-10-09T08:53:20.250Z"),
        ("server", "dns://:53"),
        ("client", "127.0.0.1:40000"),
        ("proto", "udp"),
        ("id", 4711),
        ("name", "example.org."),
        ("type", "A"),
        ("class", "IN"),
        ("rcode", "NOERROR"),
        ("flags", "qr,aa,rd"),
        ("answers", ["A 10.0.0.1"]),
        ("plugin", "hosts"),
        ("size", 56),
        ("duration_ms", 0.345),
    ]


def test_the_fields_are_written_in_the_order_of_the_table(lines: list[str]) -> None:
    reply = Reply(t.SERVFAIL, [A1], served_by="cache", deps=((b"default", b"web"),), error="e")
    reply.stored, reply.upstream, reply.ede = 999.0, "10.0.0.9:53", Ede(22, "no")
    plugins = build("kdns_log json", prepared())
    query = question("a.", client="10.1.1.1")
    clients = pods_known(plugins[0])
    clients(snapshot(pod("client", "10.1.1.1"), namespace("default")))
    run([*plugins, Serve(reply)], query)
    assert tuple(json.loads(lines[0])) == FIELDS


def pods_known(plugin: Plugin) -> Any:
    """Return what tells the plugin of a snapshot, as a `kubernetes` in the block would."""
    plugin.link(kubernetes_plugins())
    (feed,) = plugin.work()
    assert isinstance(feed, Feed)
    return lambda shot: feed.publish(shot, everything(shot), 0.0)


def kubernetes_plugins() -> list[Plugin]:
    return build("kubernetes cluster.local")


FIELD_CASES: dict[str, tuple[Query, Reply, dict[str, Any]]] = {
    "IPv6, TCP, a type without a name": (
        question("a.", "TYPE65280", client="2001:db8::7", proto="tls", rd=False),
        Reply(t.REFUSED, flags=0),
        {"client": "[2001:db8::7]:40000", "proto": "tls", "type": "TYPE65280",
         "rcode": "REFUSED", "flags": "qr", "plugin": "", "answers": []},
    ),
    "a name that would break a line": (
        question('a\\010b\\"%s.org.'),
        Reply(t.NXDOMAIN, authority=[SOA], served_by="file"),
        {"name": 'a\\010b\\"%s.org.', "rcode": "NXDOMAIN"},
    ),
    "more answers than are shown": (
        question("a."),
        Reply(answer=[a("a.", f"10.0.0.{n}") for n in range(1, 12)]),
        {"answers": [f"A 10.0.0.{n}" for n in range(1, 9)], "more": 3},
    ),
    "a long answer": (
        question("a.", "TXT"),
        Reply(answer=[RR(parse_name("a."), t.TXT, 5, bytes((255,)) + b"x" * 255)] * 2),
        {"answers": ['TXT "' + "x" * 248 + "..."] * 2},
    ),
    "all flags": (
        question("a."), Reply(answer=[A1], flags=AA | TC | RA | AD),
        {"flags": "qr,aa,tc,rd,ra,ad"},
    ),
    "from an upstream": (
        question("a."), Reply(answer=[A1], served_by="forward"),
        {"plugin": "forward", "upstream": "10.0.0.9:53"},
    ),
    "from no upstream": (
        question("a."), Reply(t.SERVFAIL, flags=0, error="read udp 10.0.0.9:53: i/o timeout"),
        {"plugin": "forward", "upstream": "10.0.0.9:53", "rcode": "SERVFAIL",
         "error": "read udp 10.0.0.9:53: i/o timeout"},
    ),
    "of a Service": (
        question("a."), Reply(answer=[A1], served_by="kubernetes",
                              deps=("soa", (b"shop", b"web"), (b"shop",))),
        {"object": "Service shop/web"},
    ),
    "with a reason": (
        question("a.", edns=Edns(1232)), Reply(t.NXDOMAIN, served_by="kubernetes"),
        {"ede": {"code": 0, "text": 'no Service "a"'}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FIELD_CASES)
def test_an_event_says(case: str, lines: list[str]) -> None:
    query, reply, expected = FIELD_CASES[case]
    if "upstream" in expected:
        reply.upstream = expected["upstream"]
    if "ede" in expected:
        reply.ede = Ede(expected["ede"]["code"], expected["ede"]["text"])
    event = logged("kdns_log json", query, reply, lines)
    assert {key: event[key] for key in expected} == expected
    absent = {"object", "upstream", "ede", "error", "cache_age", "pod", "more"} - set(expected)
    assert not absent & set(event)


def test_a_query_that_gets_no_answer(lines: list[str]) -> None:
    event = logged("kdns_log json", question("a.", "MX"), DROP, lines)
    assert (event["rcode"], event["answers"], event["size"]) == ("DROPPED", [], 0)
    assert "flags" not in event


def test_the_age_of_a_cached_answer(lines: list[str]) -> None:
    clock = FakeClock(1000.0)
    plugins = [*build("kdns_log json\ncache", prepared(clock)), Serve(Reply(answer=[A1]))]
    for now in (1000.0, 1007.5):
        clock.now = now
        run(plugins, question("example.org.", received=now))
    first, second = map(json.loads, lines)
    assert "cache_age" not in first
    assert (second["plugin"], second["cache_age"]) == ("cache", 7.5)


def test_a_cached_answer_of_the_cluster_still_names_its_object(lines: list[str]) -> None:
    clock = FakeClock(1000.0)
    web = kubernetes("", namespace("default"), service("web"))
    plugins = [*build("kdns_log json\ncache", prepared(clock)), web]
    for _ in range(2):
        run(plugins, question("web.default.svc.cluster.local.", received=clock.now))
    events = [json.loads(line) for line in lines]
    assert [one["plugin"] for one in events] == ["kubernetes", "cache"]
    assert [one["object"] for one in events] == ["Service default/web"] * 2


# --- who asked ------------------------------------------------------------------------------

BACKEND = {"kind": "Pod", "name": "web-1", "namespace": "shop"}
SHOP = (namespace("shop"), service("web", "shop"))


@pytest.mark.parametrize(
    ("objects", "expected"),
    [
        ((pod("client", "10.1.1.1", "shop"),), "shop/client"),
        ((slice_of("web", endpoint("10.1.1.1", targetRef=BACKEND), ns="shop"),), "shop/web-1"),
        ((slice_of("web", endpoint("10.1.1.1"), ns="shop"),), ""),
        ((pod("client", "10.1.1.2", "shop"),), ""),
        ((pod("one", "10.1.1.1", "shop"), pod("two", "10.1.1.1", "shop")), ""),
    ],
    ids=["a Pod", "an endpoint's Pod", "an endpoint without one", "another's", "two have it"],
)
def test_the_pod_that_asked(objects: tuple[Any, ...], expected: str, lines: list[str]) -> None:
    plugins = build("kdns_log json", prepared())
    pods_known(plugins[0])(snapshot(*SHOP, *objects))
    run([*plugins, Serve(Reply(answer=[A1]))], question("a.", client="10.1.1.1"))
    assert json.loads(lines[0]).get("pod", "") == expected


def test_who_has_an_address_follows_the_registry() -> None:
    clients = Clients()
    one = slice_of("web", endpoint("10.1.1.1", targetRef=BACKEND), ns="shop")
    two = slice_of("api", endpoint("10.1.1.1", targetRef=BACKEND), ns="shop")
    web, api = ("shop", "web"), ("shop", "api")
    both = snapshot(*SHOP, service("api", "shop"), one, two)
    clients.publish(both, everything(both), 0.0)
    assert clients.pod_at("10.1.1.1") == "shop/web-1"
    clients.publish(snapshot(*SHOP, two), Changes(services=frozenset((web,))), 0.0)
    assert clients.pod_at("10.1.1.1") == "shop/web-1", "another Service has it still"
    clients.publish(snapshot(*SHOP), Changes(services=frozenset((api,))), 0.0)
    assert clients.pod_at("10.1.1.1") == ""


def test_a_log_without_a_registry_asks_for_none() -> None:
    (plugin,) = build("kdns_log json", prepared())
    plugin.link([plugin])
    assert plugin.work() == ()


# --- repeats --------------------------------------------------------------------------------

ASKERS = [(("10.1.1.1", 1), 7, 0.25), (("fe80::1", 2), 8, 0.000002), (("10.1.1.9", 3), 9, 0.0)]
BLOCKS = ["", "\n fields name client id rcode\n", "\n class denial\n"]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("case", [*FIELD_CASES, "cached"])
def test_a_repeat_reads_as_if_the_chain_had_run_for_its_asker(
    case: str, block: str, lines: list[str]
) -> None:
    """What the packet cache repeats says the very same as a chain that is asked anew."""
    if case == "cached":
        query, reply, _ = question("a."), Reply(answer=[A1], served_by="cache"), {}
        reply.stored = 990.0
    else:
        query, reply, _ = FIELD_CASES[case]
    text = f"kdns_log json {{{block}}}" if block else "kdns_log json"
    clock = FakeClock(1000.0)
    plugins = build(text, prepared(clock))
    pods_known(plugins[0])(snapshot(*SHOP, pod("client", "10.1.1.1", "shop")))
    kept = reply.copy()
    kept.keep = FOREVER
    found = answer([*plugins, Serve(kept)], query)
    lines.clear()
    for client, qid, seconds in ASKERS:
        clock.now += 1
        for call in found.on_repeat or ():
            call(client, qid, seconds)
        repeated = lines.copy()
        lines.clear()
        fresh = query.asking()
        fresh.client, fresh.id, fresh.received = client, qid, clock.now - seconds
        run([*plugins, Serve(reply.copy())], fresh)
        assert [rounded(line) for line in repeated] == [rounded(line) for line in lines]
        lines.clear()


def rounded(line: str) -> dict[str, Any]:
    """A clock's reading less another one is not exact to the last bit."""
    event: dict[str, Any] = json.loads(line)
    if "duration_ms" in event:
        event["duration_ms"] = round(event["duration_ms"], 2)
    return event


# --- which ----------------------------------------------------------------------------------


def test_only_the_fields_asked_for(lines: list[str]) -> None:
    text = "kdns_log json {\n fields rcode name\n fields time\n}"
    event = logged(text, question("a."), Reply(t.NXDOMAIN), lines)
    assert list(event) == ["time", "name", "rcode"]


def test_only_the_names_and_classes_asked_for(lines: list[str]) -> None:
    text = "kdns_log json example.org net. {\n class denial error\n}\nkdns_log json b.com"
    for name, rcode in (
        ("www.example.org.", t.NXDOMAIN), ("example.org.", t.NOERROR), ("a.net.", t.SERVFAIL),
        ("a.com.", t.NXDOMAIN), ("b.com.", t.NOERROR),
    ):  # fmt: skip
        authority = [SOA] if rcode == t.NXDOMAIN else []
        reply = Reply(rcode, authority=authority)
        run([*build(text, prepared()), Serve(reply)], question(name))
    assert [json.loads(line)["name"] for line in lines] == ["www.example.org.", "a.net.", "b.com."]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kdns_log", "Corefile:1: 'kdns_log' needs an argument, found none"),
        ("kdns_log .", "Corefile:1: 'kdns_log' writes json: kdns_log json .; CoreDNS's own lines"
                       " are plugin 'log'"),
        ("kdns_log json a..b", "Corefile:1: zone is not a valid domain name: 'a..b.' has an empty"
                               " label"),
        ("kdns_log json {\n fields nmae\n}", "Corefile:2: invalid field: nmae, did you mean"
                                             " 'name'?"),
        ("kdns_log json {\n class deny\n}", "Corefile:2: invalid class: deny, did you mean"
                                            " 'denial'?"),
        ("kdns_log json {\n fields\n}", "Corefile:2: 'fields' needs an argument, found none"),
        ("kdns_log json {\n sample 10\n}", "Corefile:2: unknown property 'sample' (known: class,"
                                           " fields)"),
    ],
)  # fmt: skip
def test_a_mistake_is_named(text: str, said: str) -> None:
    assert errors_of(text) == [said]


# --- the line -------------------------------------------------------------------------------


def test_a_line_is_nothing_but_its_object_in_both_forms_of_the_log() -> None:
    record = logging.makeLogRecord(
        {"name": QUERIES, "levelno": logging.INFO, "msg": '{"name":"100%s."}'}
    )
    for formatter in (TextFormatter(), JsonFormatter()):
        assert formatter.format(record) == '{"name":"100%s."}'


def test_the_documented_fields_are_those_there_are() -> None:
    text = (Path(__file__).parent.parent / "docs" / "LOG.md").read_text()
    (rows,) = re.findall(r"^\| Field \|.*\n((?:\|.*\n)+)", text, re.MULTILINE)
    table = re.findall(r"^\| `(\w+)` \|", rows, re.MULTILINE)
    assert [name for name in table if name != "more"] == list(FIELDS)


def test_the_registry_may_be_that_of_another_server_block() -> None:
    text = (
        ".:1053 {\n kdns_log json\n forward . 127.0.0.1\n}\n"
        "cluster.local:1053 {\n kubernetes cluster.local {\n manifests /nowhere\n}\n}\n"
    )
    corefile, problems = read_corefile(None, text, 53, {})
    site = build_site(corefile, problems, Metrics())
    log, kube = (next(p for p in site.plugins() if p.word == w) for w in ("kdns_log", "kubernetes"))
    (mine,), (other,) = log.work(), kube.work()
    assert isinstance(mine, Feed) and isinstance(other, Feed)
    assert mine.source == other.source
