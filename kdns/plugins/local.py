"""`local`: answers names that only mean this host, so that they never leave it.

Decides which names those are: localhost, all below it, and 0, 127 and 255.in-addr.arpa
(RFC 6761, RFC 6303); by default also localhost.ANYTHING, which search paths make.
"""

from __future__ import annotations

import logging

from kdns.corefile import Directive
from kdns.dns import types as t
from kdns.dns.message import FOREVER, RR, Query, Reply
from kdns.dns.name import is_subdomain, parse_name, render_name
from kdns.metrics import Cell
from kdns.plugins.plugin import Outcome, Plugin
from kdns.plugins.setup import Setup

TTL = 604800  # a week, as CoreDNS

LOCALHOST = parse_name("localhost.")
PREFIX = LOCALHOST[:-1]
IN_ADDR = parse_name("in-addr.arpa.")
ZONES = (LOCALHOST, *(parse_name(f"{octet}.in-addr.arpa.") for octet in (0, 127, 255)))
LOOPBACK_PTR = parse_name("1.0.0.127.in-addr.arpa.")
ADDRESSES = {t.A: bytes((127, 0, 0, 1)), t.AAAA: bytes(15) + b"\x01"}

# mname, rname, then serial 1, refresh, retry and expire 0, and the negative TTL
SOA = LOCALHOST + parse_name("root.localhost.") + bytes(3) + b"\x01" + bytes(12)
SOA += TTL.to_bytes(4, "big")

OPTIONS = ("localhost_prefix",)


class Local(Plugin):
    word = "local"

    def __init__(self, log: logging.Logger, counted: Cell, prefix: bool = True) -> None:
        self._log = log
        self._counted = counted
        self._prefix = prefix

    def on_query(self, query: Query) -> Outcome:
        key = query.key
        prefixed = self._prefix and key.startswith(PREFIX) and key != LOCALHOST
        if not prefixed and not key.endswith((LOCALHOST, IN_ADDR)):
            return None
        if prefixed or (key != LOCALHOST and is_subdomain(key, LOCALHOST)):
            return self._special(query)
        for zone in ZONES:
            if is_subdomain(key, zone):
                return _answer(query, zone)
        return None

    def _special(self, query: Query) -> Reply:
        if self._log.isEnabledFor(logging.DEBUG):
            self._log.debug(
                "answering %s %s for %s with loopback addresses",
                render_name(query.key), t.type_name(query.qtype), query.client[0],
            )  # fmt: skip
        reply = _reply(query, query.qtype, ADDRESSES.get(query.qtype), query.name)
        reply.count(self._counted)
        return reply


def _answer(query: Query, zone: bytes) -> Reply:
    """Answer a name in one of ZONES, localhost itself among them but nothing below it."""
    key, qtype = query.key, query.qtype
    apex = query.name[len(key) - len(zone) :]
    if key == zone:
        rdata = {t.SOA: SOA, t.NS: LOCALHOST}.get(qtype)
        if zone == LOCALHOST and rdata is None:
            rdata = ADDRESSES.get(qtype)
        return _reply(query, qtype, rdata, apex)
    if key == LOOPBACK_PTR:
        return _reply(query, qtype, LOCALHOST if qtype == t.PTR else None, apex)
    reply = _reply(query, qtype, None, apex)
    reply.rcode = t.NXDOMAIN
    return reply


def _reply(query: Query, qtype: int, rdata: bytes | None, apex: bytes) -> Reply:
    """Return one record, or NODATA if there is no rdata. Not authoritative, as CoreDNS."""
    if rdata is None:
        authority = [RR(apex, t.SOA, TTL, SOA)]
        return Reply(authority=authority, flags=0, served_by="local", keep=FOREVER)
    answer = [RR(query.name, qtype, TTL, rdata)]
    return Reply(answer=answer, flags=0, served_by="local", keep=FOREVER)


def setup(directives: list[Directive], cx: Setup) -> list[Plugin]:
    """`local { localhost_prefix on|off }`"""
    prefix = True
    for directive in directives:
        cx.no_args(directive)
        for option in directive.options or ():
            if option.name != "localhost_prefix":
                cx.unknown_option(option, OPTIONS)
            elif cx.arg_count(option, 1, 1):
                word = option.args[0]
                if word.text not in ("on", "off"):
                    cx.problems.error(
                        word, f"localhost_prefix must be 'on' or 'off', found '{word}'"
                    )
                prefix = word.text != "off"
    counted = cx.metrics.counter(
        "coredns_local_localhost_requests_total",
        "Queries for names below or beginning with localhost.",
    ).labels()
    return [Local(cx.logger("local"), counted, prefix)]
