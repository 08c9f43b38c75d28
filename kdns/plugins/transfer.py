"""`transfer`: hands whole zones of other plugins to secondaries (AXFR, RFC 5936; IXFR as the
one SOA or a full transfer, RFC 1995 s4).

Decides who may have which zone and how it is cut into messages. The records are the zone's
plugin's (ZoneSource). NOTIFY is not sent: secondaries find a new serial by asking for the SOA.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Protocol, runtime_checkable

from kdns.corefile import Directive, Option, Token
from kdns.dns import types as t
from kdns.dns.message import RR, Query, Reply, failure
from kdns.dns.name import ancestors, render_name
from kdns.plugins.plugin import Outcome, Plugin
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


@dataclass(frozen=True, slots=True)
class Rule:
    """One `transfer` directive. clients -- addresses as text; empty: everyone."""

    zones: tuple[bytes, ...]
    clients: frozenset[str]


class Transfer(Plugin):
    word = "transfer"

    def __init__(self, rules: Sequence[Rule], log: logging.Logger) -> None:
        self._rules = {zone: rule for rule in rules for zone in rule.zones}
        self._log = log
        self._sources: list[ZoneSource] = []

    def link(self, chain: Sequence[Plugin]) -> None:
        self._sources = [plugin for plugin in chain if isinstance(plugin, ZoneSource)]

    def on_query(self, query: Query) -> Outcome:
        qtype = query.qtype
        if qtype != t.AXFR and qtype != t.IXFR:
            return None
        if query.proto not in _STREAMED:
            return failure(t.REFUSED)
        rule = next((r for zone in ancestors(query.key) if (r := self._rules.get(zone))), None)
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


def _newer(serial: int, than: int) -> bool:
    """RFC 1982 s3.2."""
    return 0 < (serial - than) & 0xFFFFFFFF < 1 << 31


def _plain(client: str) -> str:
    """Return an address without its interface, and IPv4 as such on a socket for both."""
    address = client.partition("%")[0]
    return address[7:] if address.startswith("::ffff:") and "." in address else address


def setup(directives: list[Directive], cx: Setup) -> list[Plugin]:
    """`transfer [ZONES...] { to ADDRESS|*...; source ADDRESS }`"""
    rules: list[Rule] = []
    for directive in directives:
        clients: set[str] = set()
        named = everyone = False
        for option in directive.options or ():
            match option.name:
                case "to":
                    named = True
                    if cx.arg_count(option, 1):
                        everyone |= any(token.text == "*" for token in option.args)
                        clients |= _clients(option, cx)
                case "source":
                    if cx.arg_count(option, 1, 1):
                        _read_source(option.args[0], cx)
                case _:
                    cx.unknown_option(option, _OPTIONS)
        if not named:
            cx.problems.error(directive.word, "'to ADDRESS...' is required; 'to *' is everyone")
        rules.append(
            Rule(cx.zones(directive.args), frozenset() if everyone else frozenset(clients))
        )
    return [Transfer(rules, cx.logger("transfer"))]


def _clients(option: Option, cx: Setup) -> set[str]:
    found: set[str] = set()
    for token in option.args:
        if token.text == "*":
            continue
        address = _address(token.text)
        if address is None:
            cx.problems.error(
                token,
                f"'{token}' is not an address; write an IP address, ADDRESS:PORT or * for everyone",
            )
        else:
            found.add(address)
    return found


def _address(text: str) -> str | None:
    """Return the address of ADDRESS, IPV4:PORT or [IPV6]:PORT; None if it is none of them."""
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
        return str(ip_address(host))
    except ValueError:
        return None


def _read_source(token: Token, cx: Setup) -> None:
    if _address(token.text) is None:
        cx.problems.error(token, f"'{token}' is not an address")
    else:
        cx.problems.warn(token, "'source' does nothing: kdns sends no NOTIFY; remove it")
