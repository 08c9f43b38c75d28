"""`file`: answers from zone files; also what `auto` shares with it.

Decides which zone a question belongs to and what becomes of a CNAME that leaves it. What a
file says is zone/zonefile.py's, what a zone answers zone/zone.py's, reading and watching
files app.py's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from kdns.corefile import Directive, Option
from kdns.dns import types as t
from kdns.dns.message import AA, FOREVER, OPCODE, RR, Query, Reply, failure
from kdns.dns.name import ROOT, is_subdomain, render_name
from kdns.errors import ConfigError
from kdns.plugins.plugin import DROP, Ask, Outcome, Plugin, WatchFile, Work
from kdns.plugins.setup import Setup
from kdns.zone.zone import Found, Zone
from kdns.zone.zonefile import Read, parse_zone

RELOAD = 60.0  # seconds between two looks at a zone file, as CoreDNS

_OPTIONS = ("fallthrough", "reload", "reload_by_mtime")
# Options that CoreDNS had and what to write today.
REMOVED = {
    "upstream": "remove it: a CNAME that leaves the zone is looked up by this server itself",
    "transfer": "write a directive `transfer { to ... }` beside this one",
    "no_reload": "write `reload 0`",
}


class ZonePlugin(Plugin):
    """Answers from zones by origin (lower-case wire name); None: no usable file yet."""

    def __init__(self) -> None:
        self.zones: Mapping[bytes, Zone | None] = {}
        self._is_last = False

    def link(self, chain: Sequence[Plugin]) -> None:
        self._is_last = chain[-1] is self

    def falls_through(self, origin: bytes, key: bytes) -> bool:
        """True if a name that `origin` does not have is passed on."""
        return False

    def on_query(self, query: Query) -> Outcome:
        key = query.key
        zones = self.zones
        at = 0
        while (origin := key[at:]) not in zones:
            size = key[at]
            if size == 0:
                # An authority that nobody stands behind refuses (CoreDNS file.go).
                return failure(t.REFUSED) if self._is_last else None
            at += size + 1
        zone = zones[origin]
        if zone is None:
            return failure(t.SERVFAIL, f"zone {render_name(origin)} has no usable file")
        qtype = query.qtype
        if qtype == t.AXFR or qtype == t.IXFR:
            return failure(t.REFUSED)  # the `transfer` plugin stands above and did not want it
        if query.flags & OPCODE == t.NOTIFY << 11:
            return DROP  # no zone here is a copy of another server's (CoreDNS file.go)
        found = zone.lookup(key, qtype, query.do)
        if found.missing and not found.answer and self.falls_through(origin, key):
            return None
        target = found.target
        if found.missing and found.answer:
            # The zone lacks what its CNAME leads to; fallthrough or another block may have it.
            target = next(rr.rdata for rr in reversed(found.answer) if rr.type == t.CNAME)
        if target is not None:
            return self._follow(query, zone, found, target)
        return self._reply(found, FOREVER)

    def _reply(self, found: Found, keep: float) -> Reply:
        return Reply(
            found.rcode,
            found.answer,
            found.authority,
            found.additional,
            flags=AA if found.aa else 0,
            served_by=self.word,
            keep=keep,
        )

    def _follow(self, query: Query, zone: Zone, found: Found, target: bytes) -> Ask:
        """Ask this server for what the last CNAME leads to, and add its answer."""
        do = query.do

        def then(reply: Reply | None) -> Outcome:
            assert reply is not None  # only an Ask with a time-out gets None
            found.answer += reply.answer
            found.rcode = t.NOERROR
            # RFC 6604 s3: the rcode is that of the last name asked for.
            if reply.rcode in (t.NXDOMAIN, t.SERVFAIL):
                found.rcode = reply.rcode
            if reply.rcode == t.NXDOMAIN or (reply.rcode == t.NOERROR and not reply.answer):
                found.authority = zone.start(do)
            else:
                found.authority = zone.servers(do)
            found.additional = zone.addresses(found.answer, do)
            return self._reply(found, 0.0)

        return Ask(query.asking(name=target), then)

    def transfer_records(self, zone: bytes) -> tuple[int, Iterator[RR]] | None:
        """Return (serial, all records with the SOA first and last); None: not an origin."""
        found = self.zones.get(zone)
        return None if found is None else (found.serial, found.records())

    def serials(self) -> dict[bytes, int]:
        """Return the SOA serial of each zone that there is."""
        return {origin: zone.serial for origin, zone in self.zones.items() if zone is not None}


def load_zone(
    content: bytes, origin: bytes, path: str, read: Read, old: Zone | None, log: logging.Logger,
    always: bool = False,
) -> Zone | None:  # fmt: skip
    """Return the zone that a file holds now; None, with the reason logged, if `old` stays.

    always -- also if the SOA's serial is that of `old`
    """
    try:
        text = parse_zone(content, origin, path, read)
    except ConfigError as e:
        for problem in e.problems:
            log.log(logging.WARNING if problem.warning else logging.ERROR, "%s", problem)
        log.error(
            "zone %s is %s", render_name(origin),
            "served as it was before the file was changed" if old else
            "not served (SERVFAIL) until its file is right",
        )  # fmt: skip
        return None
    for problem in text.warnings:
        log.warning("%s", problem)
    zone = Zone(origin, text.records)
    if old is not None and not always and zone.serial == old.serial:
        log.warning(
            "%s was changed but its SOA serial is still %d: zone %s stays as it was",
            path, old.serial, render_name(origin),
        )  # fmt: skip
        return None
    log.info(
        "%s zone %s from %s with SOA serial %d",
        "Reloaded" if old else "Loaded", render_name(origin), path, zone.serial,
    )  # fmt: skip
    return zone


@dataclass(frozen=True, slots=True)
class Source:
    """One `file` directive.

    fallthrough -- zones whose missing names are passed on; ROOT is in it: all of them
    """

    path: str
    origins: tuple[bytes, ...]
    interval: float = RELOAD
    by_mtime: bool = False
    fallthrough: tuple[bytes, ...] = ()


class File(ZonePlugin):
    word = "file"

    def __init__(self, sources: Sequence[Source], read: Read, log: logging.Logger) -> None:
        super().__init__()
        self._sources = sources
        self._source_of = {origin: s for s in sources for origin in s.origins}
        self._read = read
        self._log = log
        self.zones: dict[bytes, Zone | None] = dict.fromkeys(self._source_of)

    def falls_through(self, origin: bytes, key: bytes) -> bool:
        return any(is_subdomain(key, zone) for zone in self._source_of[origin].fallthrough)

    def work(self) -> Sequence[Work]:
        return [WatchFile(s.path, s.interval, self._loader(s)) for s in self._sources]

    def _loader(self, source: Source) -> Callable[[bytes | None, str], bool]:
        def load(content: bytes | None, error: str) -> bool:
            if content is None:
                self._log.error("cannot read a zone file: %s", error)
                return False
            changed = False
            for origin in source.origins:
                if self._source_of[origin] is not source:
                    continue  # a later directive has this zone
                old = self.zones[origin]
                zone = load_zone(
                    content, origin, source.path, self._read, old, self._log, source.by_mtime
                )
                if zone is not None:
                    self.zones[origin] = zone
                    changed = True
            return changed

        return load


def setup(directives: list[Directive], cx: Setup) -> list[Plugin]:
    """`file DBFILE [ZONES...] { reload D; reload_by_mtime; fallthrough [ZONES...] }`"""
    sources: list[Source] = []
    seen: dict[bytes, Directive] = {}
    for directive in directives:
        if not cx.arg_count(directive, 1):
            continue
        source = _source(directive, cx)
        for origin in source.origins:
            if origin in seen:
                cx.problems.warn(
                    directive.word,
                    f"zone {render_name(origin)} is served from this file, and no longer from"
                    f" {seen[origin].args[0]} (line {seen[origin].word.line})",
                )
            seen[origin] = directive
        sources.append(source)
    return [File(sources, cx.read, cx.logger("file"))]


def _source(directive: Directive, cx: Setup) -> Source:
    interval, by_mtime = RELOAD, False
    fallthrough: tuple[bytes, ...] = ()
    for option in directive.options or ():
        match option.name:
            case "reload":
                if cx.arg_count(option, 1, 1):
                    interval = cx.duration(option.args[0])
            case "reload_by_mtime":
                cx.no_args(option)
                by_mtime = True
            case "fallthrough":
                fallthrough = fallthrough_zones(option, cx)
            case name if name in REMOVED:
                cx.problems.warn(option.word, f"'{name}' does nothing: {REMOVED[name]}")
            case _:
                cx.unknown_option(option, _OPTIONS)
    return Source(
        cx.path(directive.args[0].text),
        tuple(dict.fromkeys(cx.zones(directive.args[1:]))),
        interval,
        by_mtime,
        fallthrough,
    )


def fallthrough_zones(option: Option, cx: Setup) -> tuple[bytes, ...]:
    """Return the zones a `fallthrough` names; without arguments the root, which holds all."""
    if not option.args:
        return (ROOT,)
    return tuple(zone for token in option.args for zone in cx.zone(token))
