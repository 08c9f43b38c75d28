"""`prometheus` and the numbers behind it: what a scrape of kdns shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse_plain
from support import FakeClock, Stub, a, answer, build, errors_of, make_setup, question, run

from kdns.dns import types as t
from kdns.dns.message import FOREVER, RR, Edns, Query, Reply, render_reply, reply_size
from kdns.dns.name import parse_name
from kdns.metrics import PLAIN_TEXT, HistogramCell, Metrics
from kdns.plugins.plugin import DROP, HttpRoute, Outcome, Plugin
from kdns.plugins.setup import Setup

SERVER = ("dns://:53", ".", "")
A1 = a("example.org.", "10.0.0.1")


def scrape(cx: Setup) -> dict[str, float]:
    """Return all samples of kdns's own families, as Prometheus reads them."""
    text = cx.metrics.render()[0].decode()
    return {
        sample.name + str(sorted(sample.labels.items())): sample.value
        for family in parse_plain(text)
        for sample in family.samples
    }


def histogram(cx: Setup, name: str, *labels: str) -> HistogramCell:
    cell = cx.metrics.families[name].labels(*labels)
    assert isinstance(cell, HistogramCell)
    return cell


class Serve(Plugin):
    """A last plugin that answers `outcome` to everything, a millisecond later."""

    word = "serve"

    def __init__(self, outcome: Outcome, clock: FakeClock) -> None:
        self._outcome = outcome
        self._clock = clock

    def on_query(self, query: Query) -> Outcome:
        self._clock.now += 0.001
        return self._outcome


def served(query: Query, outcome: Outcome, zones: tuple[str, ...] = (".",)) -> Setup:
    clock = FakeClock(query.received)
    cx = make_setup(zones, clock)
    run([*build("prometheus", cx), Serve(outcome, clock)], query)
    return cx


# --- what is counted ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "proto", "family", "qtype"),
    [
        (question("example.org.", "AAAA"), "udp", "1", "AAAA"),
        (question("example.org.", "HTTPS", proto="tcp"), "tcp", "1", "HTTPS"),
        (question("example.org.", "ANY", proto="tls", client="fd00::1"), "tcp", "2", "ANY"),
        (question("example.org.", "NAPTR", proto="https"), "tcp", "1", "other"),
        (question("example.org.", "TYPE65280", client="::ffff:10.0.0.1"), "udp", "1", "other"),
    ],
)
def test_a_query_is_counted_by_transport_family_and_type(
    query: Query, proto: str, family: str, qtype: str
) -> None:
    cx = served(query, Reply(answer=[A1]))
    value = cx.metrics.value
    assert value("coredns_dns_requests_total", *SERVER, proto, family, qtype) == 1
    sizes = histogram(cx, "coredns_dns_request_size_bytes", *SERVER, proto)
    assert sizes.sum == query.size


@pytest.mark.parametrize(
    ("reply", "rcode", "plugin"),
    [
        (Reply(answer=[A1], served_by="kubernetes"), "NOERROR", "kubernetes"),
        (Reply(t.NXDOMAIN, served_by="cache"), "NXDOMAIN", "cache"),
        (Reply(t.SERVFAIL, error="no next plugin found"), "SERVFAIL", ""),
        (Reply(t.BADVERS), "BADVERS", ""),
        (Reply(11), "RCODE11", ""),
    ],
)
def test_an_answer_is_counted_by_rcode_and_plugin(reply: Reply, rcode: str, plugin: str) -> None:
    cx = served(question("example.org."), reply)
    assert cx.metrics.value("coredns_dns_responses_total", *SERVER, rcode, plugin) == 1


def test_the_do_bit_is_counted_only_where_it_is_set() -> None:
    clock = FakeClock()
    cx = make_setup(clock=clock)
    plugins = [*build("prometheus", cx), Serve(Reply(), clock)]
    for edns in (None, Edns(1232), Edns(1232, True), Edns(1232, True)):
        run(plugins, question("example.org.", edns=edns))
    assert cx.metrics.value("coredns_dns_do_requests_total", *SERVER) == 2
    no_do = served(question("example.org."), Reply())
    assert not any(name.startswith("coredns_dns_do_requests_total") for name in scrape(no_do))


def test_durations_run_from_arrival_to_answer() -> None:
    cx = served(question("example.org."), Reply())
    cell = histogram(cx, "coredns_dns_request_duration_seconds", *SERVER)
    assert cell.sum == pytest.approx(0.001)
    bounds = [f"{bound:g}" for bound in cell.bounds]
    assert (len(bounds), bounds[:3], bounds[-1]) == (16, ["0.00025", "0.0005", "0.001"], "8.192")


def test_a_dropped_query_is_counted_as_coredns_does() -> None:
    cx = served(question("example.org."), DROP)
    assert cx.metrics.value("coredns_dns_requests_total", *SERVER, "udp", "1", "A") == 1
    assert cx.metrics.value("coredns_dns_responses_total", *SERVER, "NOERROR", "") == 1
    sizes = histogram(cx, "coredns_dns_response_size_bytes", *SERVER, "udp")
    assert (sum(sizes.counts), sizes.sum) == (1, 0)


@pytest.mark.parametrize(
    ("name", "zone"),
    [("www.Example.org.", "example.org."), ("a.b.example.org.", "b.example.org."), ("x.", ".")],
)
def test_a_block_of_several_zones_counts_under_the_longest(name: str, zone: str) -> None:
    cx = served(question(name), Reply(), zones=("example.org.", "b.example.org.", "net."))
    label = ("dns://:53", zone, "")
    assert cx.metrics.value("coredns_dns_requests_total", *label, "udp", "1", "A") == 1


@pytest.mark.parametrize(
    "reply",
    [
        Reply(),
        Reply(answer=[A1, A1], additional=[a("ns.example.org.", "2001:db8::1")]),
        Reply(t.NXDOMAIN, authority=[RR(parse_name("."), t.TXT, 5, b"\x05hello")]),
    ],
)
def test_the_response_size_is_that_of_the_uncompressed_answer(reply: Reply) -> None:
    query = question("example.org.")
    assert reply_size(query, reply) == len(render_reply(query, reply))


def test_a_repeated_reply_counts_like_a_new_one() -> None:
    """The packet cache adds Reply.tally once more for each repeat."""
    query = question("example.org.", "AAAA", edns=Edns(1232, True))
    reply = Reply(answer=[A1], keep=FOREVER, served_by="kubernetes")
    repeated = served(query, reply)
    assert reply.tally is not None
    for cell, value in reply.tally:
        cell.add(0.001 if value is None else value, 1)

    clock = FakeClock()
    asked_twice = make_setup(clock=clock)
    plugins = build("prometheus", asked_twice)
    for _ in range(2):
        query.received = clock.now
        run([*plugins, Serve(Reply(answer=[A1], served_by="kubernetes"), clock)], query)

    def counted(cx: Setup) -> dict[str, float]:
        return {name: value for name, value in scrape(cx).items() if "coredns_dns" in name}

    assert counted(repeated) == pytest.approx(counted(asked_twice))
    assert len(counted(repeated)) > 50


def test_a_reply_that_is_not_repeated_keeps_no_tally() -> None:
    reply = Reply(answer=[A1])
    served(question("example.org."), reply)
    assert reply.tally is None


# --- what is always there -----------------------------------------------------------------


def test_plugins_of_a_block_are_listed_until_the_corefile_drops_them() -> None:
    cx = make_setup(("example.org.",))
    name = "coredns_plugin_enabled"

    def enabled() -> set[str]:
        return {labels[3] for labels in cx.metrics.families[name].cells}

    answer([*build("prometheus\nerrors\nlog\nany\nwhoami", cx)], question("a."))
    assert enabled() == {"prometheus", "errors", "log", "any", "whoami"}
    answer([*build("prometheus\nlog\nwhoami", cx)], question("a."))
    assert enabled() == {"prometheus", "log", "whoami"}
    assert cx.metrics.value(name, "dns://:53", "example.org.", "", "log") == 1


def test_a_plugin_that_answers_no_queries_is_not_listed() -> None:
    class Waiting(Plugin):
        word = "health"

    cx = make_setup()
    run([*build("prometheus", cx), Waiting(), Stub()], question("a."))
    listed = {labels[3] for labels in cx.metrics.families["coredns_plugin_enabled"].cells}
    assert listed == {"prometheus", "stub"}


def test_what_runs_here_and_that_it_had_no_bugs_is_shown_from_the_start() -> None:
    cx = make_setup()
    build("prometheus", cx)
    text = cx.metrics.render()[0].decode()
    assert "coredns_panics_total 0.0" in text
    assert 'coredns_build_info{goversion="python3.' in text


# --- the page -----------------------------------------------------------------------------


def route(text: str, cx: Setup) -> HttpRoute:
    (work,) = build(text, cx)[0].work()
    assert isinstance(work, HttpRoute)
    return work


@pytest.mark.parametrize(
    ("text", "address", "tls"),
    [
        ("prometheus", "localhost:9153", None),
        ("prometheus :9253", ":9253", None),
        ("prometheus [::1]:0", "[::1]:0", None),
        ("prometheus {\n tls cert.pem /k.pem\n}", "localhost:9153", ("./cert.pem", "/k.pem", "")),
        ("prometheus {\n tls c k ca\n}", "localhost:9153", ("./c", "./k", "./ca")),
    ],
)
def test_metrics_are_served_under_their_address(
    text: str, address: str, tls: tuple[str, str, str] | None
) -> None:
    page = route(text, make_setup())
    assert (page.address, page.path, page.tls) == (address, "/metrics", tls)


@pytest.mark.parametrize(
    ("headers", "content_type", "parse"),
    [
        ({}, PLAIN_TEXT, parse_plain),
        ({"Accept": "text/plain;version=0.0.4"}, PLAIN_TEXT, parse_plain),
        (
            {"ACCEPT": "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;q=0.5"},
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
            parse_openmetrics,
        ),
    ],
)  # fmt: skip
def test_the_page_is_readable_in_the_format_asked_for(
    headers: dict[str, str], content_type: str, parse: Callable[[str], Iterable[Metric]]
) -> None:
    cx = make_setup()
    page = route("prometheus", cx)
    run([*build("prometheus", cx), Stub()], question("example.org."))
    status, found, body = page.handle(headers)
    assert (status, found) == (200, content_type)
    families = {family.name: family for family in parse(body.decode())}
    assert "process_resident_memory_bytes" in families
    requests = families.get("coredns_dns_requests") or families["coredns_dns_requests_total"]
    (sample,) = requests.samples
    assert sample.labels == {
        "server": "dns://:53", "zone": ".", "view": "", "proto": "udp", "family": "1", "type": "A",
    }  # fmt: skip
    sizes = families["coredns_dns_response_size_bytes"]
    bounds = [s.labels["le"] for s in sizes.samples if s.name.endswith("_bucket")]
    assert [float(bound) for bound in bounds] == [
        0, 100, 200, 300, 400, 511, 1023, 2047, 4095, 8291, 16000, 32000, 48000, 64000,
        float("inf"),
    ]  # fmt: skip


MISTAKES = {
    "prometheus 9153": "Corefile:1: address 9153: missing port; write it as :9153",
    "prometheus localhost": "Corefile:1: address localhost: missing port; write it as"
    " localhost:9153",
    "prometheus localhost:http": "Corefile:1: address localhost:http: invalid port 'http'",
    "prometheus :99999": "Corefile:1: address :99999: invalid port '99999'",
    "prometheus a:1 b:2": "Corefile:1: unexpected 'b:2' after 'prometheus'",
    "prometheus {\n runtime_metric\n}": "Corefile:2: unknown property 'runtime_metric', did you"
    " mean 'runtime_metrics'?",
    "prometheus {\n runtime_metrics\n}": "Corefile:2: warning: 'runtime_metrics' is ignored: it"
    " exports figures of the Go runtime, and kdns is not written in Go",
    "prometheus {\n tls web.yml\n}": "Corefile:2: 'tls' takes no web configuration file here;"
    " write its cert_file, key_file and, if there is one, client_ca_file: tls CERT KEY"
    " [CLIENT_CA]",
    "prometheus {\n tls a b\n tls a b\n}": "Corefile:3: 'tls' is given twice",
    "prometheus\nprometheus": "Corefile:2: plugin/prometheus: this plugin can only be used once"
    " per Server Block; the first is in line 1",
}


@pytest.mark.parametrize("text", list(MISTAKES))
def test_mistakes_are_said_with_what_would_be_right(text: str) -> None:
    assert errors_of(text) == [MISTAKES[text]]


# --- the numbers --------------------------------------------------------------------------


def test_families_without_a_sample_are_not_shown() -> None:
    metrics = Metrics()
    metrics.counter("kdns_a_total", "x", ("y",))
    metrics.histogram("kdns_b", "x", (), (1,))
    metrics.gauge("kdns_c", "x").read = list
    assert not any(family.name.startswith("kdns_") for family in metrics.collect())


def test_a_gauge_may_be_read_on_a_scrape() -> None:
    metrics = Metrics()
    ages = {("api",): 3.0}
    metrics.gauge("kdns_age_seconds", "x", ("source",)).read = lambda: list(ages.items())
    ages["api",] = 4.5
    assert metrics.value("kdns_age_seconds", "api") == 4.5
    assert 'kdns_age_seconds{source="api"} 4.5' in metrics.render()[0].decode()


def test_lazily_kept_numbers_are_brought_up_to_date_before_a_scrape() -> None:
    metrics = Metrics()
    cell = metrics.counter("kdns_a_total", "x").labels()
    metrics.before_scrape.append(lambda: cell.add(2, 3))
    assert metrics.value("kdns_a_total") == 6
    assert "kdns_a_total 12.0" in metrics.render()[0].decode()


def test_wrong_label_values_are_a_bug() -> None:
    family = Metrics().counter("kdns_a_total", "x", ("one", "two"))
    with pytest.raises(ValueError, match="kdns_a_total"):
        family.labels("1")


def test_an_observation_falls_into_the_bucket_that_holds_it() -> None:
    cell = Metrics().histogram("kdns_h", "x", (), (1, 2)).labels()
    assert isinstance(cell, HistogramCell)
    for value in (0, 1, 1.5, 2, 3):
        cell.add(value)
    cell.add(2, times=3)
    assert (cell.counts, cell.sum) == ([2, 5, 1], 13.5)
