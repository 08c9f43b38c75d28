"""`transfer`: hands whole zones of other plugins to secondaries (AXFR, RFC 5936; IXFR as the
one SOA or a full transfer, RFC 1995 s4), and has them told of new serials (NOTIFY, RFC 1996).

Decides who may have which zone, how it is cut into messages, and which secondary is to hear of
which serial. The records are the zone's plugin's (ZoneSource); how a NOTIFY is sent, and how
often, is server/notify.py's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Protocol, TypeAlias, runtime_checkable

from kdns.corefile import Directive, Option, Token
from kdns.dns import types as t
from kdns.dns.message import RR, Query, Reply, failure
from kdns.dns.name import ancestors, render_name
from kdns.plugins.plugin import Notice, Notify, Outcome, Plugin, Work
from kdns.plugins.setup import Setup

# One message of a transfer: well below 64 kB and short enough to write between two queries.
MAX_OCTETS = 32_000
MAX_RECORDS = 500

_OPTIONS = ("source", "to")
_STREAMED = frozenset(("tcp", "tls"))


@runtime_checkable
class ZoneSource(Protocol):
    """A plugin whose zones can be transferred."""

    def transfer_records(self, zone: bytes) -> tuple[int, Iterator[RR]] | None:
        """Return (serial, all records with the SOA first and last) of the zone with exactly
        this lower-case origin; None if it is not the plugin's or not there yet."""


@runtime_checkable
class FileZones(Protocol):
    """A plugin whose new serials secondaries are told of.

    That is `file` and `auto`, as in CoreDNS. The serial of `kubernetes` moves with the cluster,
    and a secondary that is told of each Pod would do nothing but transfer the zone.
    """

    def serials(self) -> Mapping[bytes, int]:
        """Return the SOA serial of each zone that there is, by lower-case origin."""


Place: TypeAlias = tuple[str, int]  # IP address, port


@dataclass(frozen=True, slots=True)
class Rule:
    """One `transfer` directive.

    clients     -- who may have the zones, addresses as text; empty: everyone
    secondaries -- who is told of new serials, and from which address (as in Notice)
    """

    zones: tuple[bytes, ...]
    clients: frozenset[str]
    secondaries: tuple[tuple[Place, str], ...] = ()


class Transfer(Plugin):
    word = "transfer"

    def __init__(self, rules: Sequence[Rule], log: logging.Logger) -> None:
        self._rules = {zone: rule for rule in rules for zone in rule.zones}
        self._log = log
        self._sources: list[ZoneSource] = []
        self._of_files: list[FileZones] = []
        self._told: dict[bytes, int] = {}  # serials, when it was last looked

    def link(self, chain: Sequence[Plugin]) -> None:
        self._sources = [plugin for plugin in chain if isinstance(plugin, ZoneSource)]
        self._of_files = [plugin for plugin in chain if isinstance(plugin, FileZones)]

    def work(self) -> Sequence[Work]:
        if not any(rule.secondaries for rule in self._rules.values()):
            return ()
        return (Notify(self._due, self._done),)

    def _rule_of(self, name: bytes) -> Rule | None:
        return next((r for zone in ancestors(name) if (r := self._rules.get(zone))), None)

    def on_query(self, query: Query) -> Outcome:
        qtype = query.qtype
        if qtype != t.AXFR and qtype != t.IXFR:
            return None
        if query.proto not in _STREAMED:
            return failure(t.REFUSED)
        rule = self._rule_of(query.key)
        if rule is None:
            return None
        if rule.clients and _plain(query.client[0]) not in rule.clients:
            return failure(t.REFUSED)
        if qtype == t.IXFR and query.serial is None:
            return failure(t.SERVFAIL, "IXFR without the SOA it starts from (RFC 1995 s3)")
        for source in self._sources:
            found = source.transfer_records(query.key)
            if found is not None:
                return self._send(query, *found)
        return None

    def _send(self, query: Query, serial: int, records: Iterator[RR]) -> Reply:
        if query.qtype == t.IXFR and query.serial is not None and not _newer(serial, query.serial):
            self._log.info(
                "zone %s of %s is up to date with SOA serial %d",
                render_name(query.key), query.client[0], serial,
            )  # fmt: skip
            return Reply(answer=[next(records)], served_by=self.word)
        batches = self._batches(query, serial, records)
        reply = Reply(answer=next(batches), served_by=self.word)
        reply.stream = batches
        return reply

    def _batches(self, query: Query, serial: int, records: Iterable[RR]) -> Iterator[list[RR]]:
        batch: list[RR] = []
        octets = sent = 0
        for rr in records:
            size = len(rr.name) + len(rr.rdata) + 10
            if batch and (octets + size > MAX_OCTETS or len(batch) >= MAX_RECORDS):
                yield batch
                batch, octets = [], 0
            batch.append(rr)
            octets += size
            sent += 1
        yield batch
        self._log.info(
            "zone %s sent to %s: %d records with SOA serial %d",
            render_name(query.key), query.client[0], sent, serial,
        )  # fmt: skip

    def _due(self) -> list[Notice]:
        """Return whom to tell of the serials that are not those of the last look."""
        serials: dict[bytes, int] = {}
        for plugin in reversed(self._of_files):
            serials.update(plugin.serials())  # a zone is the first one's, as in on_query
        before, self._told = self._told, serials
        return [
            Notice(zone, serial, to, source)
            for zone, serial in serials.items()
            if before.get(zone) != serial and (rule := self._rule_of(zone)) is not None
            for to, source in rule.secondaries
        ]

    def _done(self, notice: Notice, why: str) -> None:
        told = render_name(notice.zone), notice.serial, _render_place(notice.to)
        if why:
            self._log.warning(
                "NOTIFY for zone %s with SOA serial %d was not accepted by %s: %s", *told, why
            )
        else:
            self._log.debug("NOTIFY for zone %s with SOA serial %d was accepted by %s", *told)


def _newer(serial: int, than: int) -> bool:
    """RFC 1982 s3.2."""
    return 0 < (serial - than) & 0xFFFFFFFF < 1 << 31


def _plain(client: str) -> str:
    """Return an address without its interface, and IPv4 as such on a socket for both."""
    address = client.partition("%")[0]
    return address[7:] if address.startswith("::ffff:") and "." in address else address


def setup(directives: list[Directive], cx: Setup) -> list[Plugin]:
    """`transfer [ZONES...] { to ADDRESS|*...; source ADDRESS }`"""
    return [Transfer([_rule(directive, cx) for directive in directives], cx.logger("transfer"))]


def _rule(directive: Directive, cx: Setup) -> Rule:
    places: list[Place] = []
    sources: dict[int, Token] = {}  # by IP version
    named = everyone = False
    for option in directive.options or ():
        match option.name:
            case "to":
                named = True
                if cx.arg_count(option, 1):
                    everyone |= any(token.text == "*" for token in option.args)
                    places += _read_to(option, cx)
            case "source":
                if cx.arg_count(option, 1, 1):
                    _read_source(option.args[0], sources, cx)
            case _:
                cx.unknown_option(option, _OPTIONS)
    if not named:
        cx.problems.error(directive.word, "'to ADDRESS...' is required; 'to *' is everyone")
    for token in sources.values() if everyone and not places else ():
        cx.problems.warn(token, "'source' does nothing: 'to' names nobody whom NOTIFY is sent to")
    return Rule(
        cx.zones(directive.args),
        frozenset(() if everyone else (address for address, _ in places)),
        tuple((to, _source_for(to, sources)) for to in dict.fromkeys(places)),
    )


def _read_to(option: Option, cx: Setup) -> Iterator[Place]:
    for token in option.args:
        if token.text == "*":
            continue
        place = _parse_place(token.text)
        if place is None:
            cx.problems.error(
                token,
                f"'{token}' is not an address; write an IP address, ADDRESS:PORT or * for everyone",
            )
        else:
            yield place


def _read_source(token: Token, sources: dict[int, Token], cx: Setup) -> None:
    try:
        address = ip_address(token.text)
    except ValueError:
        cx.problems.error(
            token, f"'{token}' is not an address; write an IP address of this host, with no port"
        )
        return
    other = sources.setdefault(address.version, token)
    if other is not token:
        cx.problems.error(
            token,
            f"there is one source for IPv{address.version}: {other} (line {other.line}), or this",
        )


def _source_for(to: Place, sources: Mapping[int, Token]) -> str:
    """Return the source of a secondary's IP version; empty: there is none."""
    found = sources.get(ip_address(to[0]).version)
    return "" if found is None else found.text


def _parse_place(text: str) -> Place | None:
    """Return address and port of ADDRESS, IPV4:PORT or [IPV6]:PORT; None if it is none of
    them."""
    host, port = text, "53"
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            return None
        port = rest[1:] if rest else port
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    if not (port.isascii() and port.isdecimal() and len(port) < 6 and int(port) < 65536):
        return None
    try:
        return str(ip_address(host)), int(port)
    except ValueError:
        return None


def _render_place(place: Place) -> str:
    host, port = place
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
