"""`prometheus`: counts every reply of a server block and serves all metrics over HTTP.

Decides which labels a query is counted under (reference 3.1). The numbers live in
kdns/metrics.py; the listener is opened by app.py, once for each address; queries that reach
no chain ("dropped") are counted where they are refused.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence

from kdns import __version__
from kdns.corefile import Directive, Option, Token
from kdns.dns import types as t
from kdns.dns.message import Query, Reply, reply_size
from kdns.dns.name import ancestors, parse_name
from kdns.metrics import Cell, Metrics
from kdns.plugins.plugin import HttpRoute, Plugin, ServerFacts, Work
from kdns.plugins.setup import Setup

DEFAULT_ADDRESS = "localhost:9153"
SERVER = ("server", "zone", "view")
NO_VIEW = ""  # kdns has no `view`; the label stays so that queries on it still work

# Bounds CoreDNS uses, so that recording rules and dashboards carry over.
SECONDS = tuple(0.00025 * 2**n for n in range(16))
OCTETS = (0, 100, 200, 300, 400, 511, 1023, 2047, 4095, 8291, 16e3, 32e3, 48e3, 64e3)

# Types with a label of their own; the rest is "other", which also bounds what strangers
# can make us remember.
TYPE_LABELS = {
    number: t.TYPE_NAMES[number]
    for number in (
        t.A, t.AAAA, t.CNAME, t.DNSKEY, t.DS, t.MX, t.NSEC, t.NSEC3, t.NS, t.PTR, t.RRSIG,
        t.SOA, t.SRV, t.TXT, t.HTTPS, t.SVCB, t.IXFR, t.AXFR, t.ANY,
    )
}  # fmt: skip

OPTIONS = ("runtime_metrics", "tls")


def family_label(host: str) -> str:
    """Return CoreDNS's `family` label of a client's address: "1" IPv4, "2" IPv6."""
    return "2" if ":" in host and not host.startswith("::ffff:") else "1"


class _Row:
    """The cells that one combination of labels adds to.

    always -- what is counted alike for each repeat of the reply (Reply.tally)
    """

    __slots__ = ("always", "counters", "durations", "request_sizes", "response_sizes")

    def __init__(
        self, counters: Sequence[Cell], durations: Cell, request_sizes: Cell, response_sizes: Cell
    ) -> None:
        self.counters = tuple(counters)
        self.durations = durations
        self.request_sizes = request_sizes
        self.response_sizes = response_sizes
        self.always: list[tuple[Cell, float | None]] = [(cell, 1) for cell in counters]
        self.always.append((durations, None))

    def count(self, seconds: float, asked: int, answered: int) -> None:
        for cell in self.counters:
            cell.value += 1
        self.durations.add(seconds)
        self.request_sizes.add(asked)
        self.response_sizes.add(answered)

    def tally(self, asked: int, answered: int) -> list[tuple[Cell, float | None]]:
        """Return what is to be counted for a repeat (Reply.tally)."""
        return [*self.always, (self.request_sizes, asked), (self.response_sizes, answered)]


class Prometheus(Plugin):
    """Counts on the way up, so that whatever was answered below is what is counted."""

    word = "prometheus"

    def __init__(
        self,
        cx: Setup,
        address: str = DEFAULT_ADDRESS,
        tls: tuple[str, str, str] | None = None,
    ) -> None:
        self.address = address
        self.tls = tls
        self._clock = cx.clock
        self._facts: ServerFacts = cx.facts
        self._metrics: Metrics = cx.metrics
        zones = cx.facts.zones or (".",)
        self._only_zone = zones[0] if len(zones) == 1 else None
        self._zones = {parse_name(zone).lower(): zone for zone in zones}
        # Cells of one combination of labels, made at its first query.
        self._rows: dict[tuple[str, str, str | bool, str | None, bool, int, str], _Row] = {}
        m = cx.metrics
        self._requests = m.counter(
            "coredns_dns_requests_total",
            "DNS queries by server block, transport and type.",
            (*SERVER, "proto", "family", "type"),
        )
        self._durations = m.histogram(
            "coredns_dns_request_duration_seconds",
            "Seconds from a query's arrival to its answer.",
            SERVER,
            SECONDS,
        )
        self._request_sizes = m.histogram(
            "coredns_dns_request_size_bytes", "Octets of a query.", (*SERVER, "proto"), OCTETS
        )
        self._response_sizes = m.histogram(
            "coredns_dns_response_size_bytes",
            "Octets of an answer before compression and truncation.",
            (*SERVER, "proto"),
            OCTETS,
        )
        self._do_requests = m.counter(
            "coredns_dns_do_requests_total", "Queries with the DO bit set.", SERVER
        )
        self._responses = m.counter(
            "coredns_dns_responses_total",
            "Answers by rcode and by the plugin that made them.",
            (*SERVER, "rcode", "plugin"),
        )
        self._enabled = m.gauge(
            "coredns_plugin_enabled", "1 for each plugin of a server block.", (*SERVER, "name")
        )
        m.counter("coredns_panics_total", "Queries that met a bug and got SERVFAIL.").labels()
        m.gauge(
            "coredns_build_info",
            "Always 1; the labels say what is running.",
            ("version", "revision", "goversion"),
        ).labels(__version__, "", f"python{platform.python_version()}").set(1)

    def heeds(self, zone: bytes) -> bool:
        return self._only_zone is None

    def on_reply(self, query: Query, reply: Reply) -> Reply:
        row = self._row(query, reply.rcode, reply.served_by)
        asked, answered = query.size, reply_size(query, reply)
        row.count(self._clock() - query.received, asked, answered)
        if reply.keep:
            tally = row.tally(asked, answered)
            reply.tally = tally if reply.tally is None else reply.tally + tally
        return reply

    def on_drop(self, query: Query) -> None:
        """Count a query that gets no answer, as CoreDNS does: NOERROR by nobody, 0 octets."""
        self._row(query, t.NOERROR, "").count(self._clock() - query.received, query.size, 0)

    def _row(self, query: Query, rcode: int, plugin: str) -> _Row:
        edns = query.edns
        host = query.client[0]
        labels = (
            self._only_zone or self._zone_of(query.key),
            query.proto,
            ":" in host and family_label(host),
            TYPE_LABELS.get(query.qtype),
            edns is not None and edns.do,
            rcode,
            plugin,
        )
        row = self._rows.get(labels)
        if row is None:
            row = self._rows[labels] = self._make_row(query, rcode, plugin, labels[0])
        return row

    def _zone_of(self, key: bytes) -> str:
        for name in ancestors(key):
            zone = self._zones.get(name)
            if zone is not None:
                return zone
        return "."

    def _make_row(self, query: Query, rcode: int, plugin: str, zone: str) -> _Row:
        server = (self._facts.label, zone, NO_VIEW)
        # CoreDNS knows two transports here: DoT and DoH count as tcp.
        proto = "udp" if query.proto == "udp" else "tcp"
        qtype = TYPE_LABELS.get(query.qtype, "other")
        counters = [
            self._requests.labels(*server, proto, family_label(query.client[0]), qtype),
            self._responses.labels(*server, t.rcode_name(rcode), plugin),
        ]
        if query.do:
            counters.append(self._do_requests.labels(*server))
        return _Row(
            counters,
            self._durations.labels(*server),
            self._request_sizes.labels(*server, proto),
            self._response_sizes.labels(*server, proto),
        )

    def link(self, chain: Sequence[Plugin]) -> None:
        """Say which plugins answer queries in this block; `bind` and such are not among
        them. What an earlier Corefile had in the same block is forgotten."""
        label = self._facts.label
        zones = set(self._zones.values())
        cells = self._enabled.cells
        for key in [k for k in cells if k[0] == label and k[1] in zones]:
            del cells[key]
        for plugin in chain:
            kind = type(plugin)
            if kind.on_query is Plugin.on_query and kind.on_reply is Plugin.on_reply:
                continue
            for zone in zones:
                self._enabled.labels(label, zone, NO_VIEW, plugin.word).set(1)

    def work(self) -> Sequence[Work]:
        return (HttpRoute(self.address, "/metrics", self._serve, self.tls),)

    def _serve(self, headers: dict[str, str]) -> tuple[int, str, bytes]:
        accept = [value for name, value in headers.items() if name.lower() == "accept"]
        openmetrics = any("application/openmetrics-text" in value for value in accept)
        body, content_type = self._metrics.render(openmetrics)
        return 200, content_type, body


def setup(directives: list[Directive], cx: Setup) -> list[Plugin]:
    """`prometheus [ADDRESS] { runtime_metrics; tls CERT KEY [CLIENT_CA] }`"""
    directive = cx.once(directives)
    address = DEFAULT_ADDRESS
    if cx.arg_count(directive, 0, 1) and directive.args:
        address = directive.args[0].text
        _check_address(directive.args[0], cx)
    tls = None
    for option in directive.options or ():
        match option.name:
            case "runtime_metrics":
                if cx.no_args(option):
                    cx.problems.warn(
                        option.word,
                        "'runtime_metrics' is ignored: it exports figures of the Go runtime,"
                        " and kdns is not written in Go",
                    )
            case "tls":
                if tls is not None:
                    cx.problems.error(option.word, "'tls' is given twice")
                tls = _tls(option, cx)
            case _:
                cx.unknown_option(option, OPTIONS)
    return [Prometheus(cx, address, tls)]


def _check_address(token: Token, cx: Setup) -> None:
    _, colon, port = token.text.rpartition(":")
    if not colon:
        right = f":{token}" if token.text.isdecimal() else f"{token}:9153"
        cx.problems.error(token, f"address {token}: missing port; write it as {right}")
    elif not (port.isascii() and port.isdecimal() and int(port) < 65536):
        cx.problems.error(token, f"address {token}: invalid port '{port}'")


def _tls(option: Option, cx: Setup) -> tuple[str, str, str] | None:
    if len(option.args) == 1:
        cx.problems.error(
            option.args[0],
            "'tls' takes no web configuration file here; write its cert_file, key_file and, if"
            " there is one, client_ca_file: tls CERT KEY [CLIENT_CA]",
        )
        return None
    if not cx.arg_count(option, 2, 3):
        return None
    files = [cx.path(token.text) for token in option.args]
    return files[0], files[1], files[2] if len(files) > 2 else ""
