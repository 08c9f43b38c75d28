"""`hosts`: addresses and names from a hosts file (hosts(5)) and from lines in the Corefile.

Decides A, AAAA and PTR of the names in it, and who gets to answer the rest. Reading the file
again when it changes is app.py's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv6Address, ip_address

from kdns.corefile import Directive, Token
from kdns.dns import types as t
from kdns.dns.message import FOREVER, RR, Query, Reply, failure
from kdns.dns.name import ROOT, BadName, is_subdomain, parent, parse_name, render_name
from kdns.dns.reverse import address_of
from kdns.metrics import Cell
from kdns.plugins.file import fallthrough_zones
from kdns.plugins.plugin import Outcome, Plugin, WatchFile, Work
from kdns.plugins.setup import Setup

DEFAULT_FILE = "/etc/hosts"
DEFAULT_TTL = 3600
RELOAD = 5.0  # seconds between two looks at the file
# A block list gives one address to every name it holds. No message holds more PTR records.
MAX_REVERSE = 1000
MAX_TTL = 65535

_OPTIONS = ("fallthrough", "fallthrough_unsupported", "no_reverse", "reload", "ttl")
_STAR = b"\x01*"


class Table:
    """What one hosts file says. Names are lower-case wire names, addresses packed.

    entries -- as CoreDNS counts them: addresses by name, and names by address
    skipped -- lines that are no entry: (line number, what is wrong) of the first, and how many
    """

    __slots__ = ("entries", "first_skipped", "names", "skipped", "v4", "v6")

    def __init__(self) -> None:
        self.v4: dict[bytes, list[bytes]] = {}
        self.v6: dict[bytes, list[bytes]] = {}
        self.names: dict[bytes, dict[bytes, None]] = {}
        self.entries = 0
        self.skipped = 0
        self.first_skipped = (0, "")

    def skip(self, line: int, why: str) -> None:
        if not self.skipped:
            self.first_skipped = (line, why)
        self.skipped += 1


def parse_address(text: str) -> bytes | None:
    """Return the packed address, of IPv4 if it is one in IPv6's clothes; None if it is none."""
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped.packed
    return address.packed


def parse_hosts(lines: Iterable[str], zones: Sequence[bytes], reverse: bool) -> Table:
    """Return the entries whose names lie in `zones`; reverse: PTR records too."""
    table = Table()
    every = ROOT in zones
    packed: dict[str, bytes | None] = {}
    for number, line in enumerate(lines, 1):
        words = (line.partition("#")[0] if "#" in line else line).split()
        if not words:
            continue
        text = words[0]
        if text in packed:
            address = packed[text]
        else:
            address = parse_address(text)
            if len(packed) < 10_000:  # block lists repeat a few; others need no memory
                packed[text] = address
        if address is None:
            table.skip(number, f"'{text[:60]}' is not an address")
            continue
        if len(words) == 1:
            table.skip(number, f"no name behind {text}")
        for word in words[1:]:
            try:
                key = parse_name(word).lower()
            except (BadName, UnicodeEncodeError) as e:
                table.skip(number, str(e))
                continue
            if every or any(is_subdomain(key, zone) for zone in zones):
                _add(table, key, address, reverse)
    return table


def _add(table: Table, key: bytes, address: bytes, reverse: bool) -> None:
    by_name = table.v4 if len(address) == 4 else table.v6
    known = by_name.get(key)
    if known is None:
        by_name[key] = [address]
    elif address in known:
        return  # RFC 2181 s5: an RRset has no two equal records
    else:
        known.append(address)
    table.entries += 1
    if reverse and not key.startswith(_STAR):
        names = table.names.setdefault(address, {})
        table.entries += 1
        if len(names) < MAX_REVERSE:
            names[key] = None


@dataclass(slots=True)
class Options:
    """What a `hosts` directive says.

    fallthrough -- zones whose missing names are passed on; ROOT: all
    unsupported -- pass on types other than A and AAAA of known names too
    """

    path: str = DEFAULT_FILE
    zones: tuple[bytes, ...] = (ROOT,)
    ttl: int = DEFAULT_TTL
    reload: float = RELOAD
    reverse: bool = True
    fallthrough: tuple[bytes, ...] = ()
    unsupported: bool = False
    inline: list[tuple[Token, str]] = field(default_factory=list)


class Hosts(Plugin):
    word = "hosts"

    def __init__(self, options: Options, cx: Setup) -> None:
        self._options = options
        self._wall = cx.wall
        self._log: logging.Logger = cx.logger("hosts")
        self._inline = parse_hosts(
            [line for _, line in options.inline], options.zones, options.reverse
        )
        self._tables = (Table(), self._inline)
        self._entries: Cell = cx.metrics.gauge(
            "coredns_hosts_entries",
            "The combined number of entries in hosts and Corefile.",
            ("hostsfile",),
        ).labels(options.path)
        self._reloaded = cx.metrics.gauge(
            "coredns_hosts_reload_timestamp_seconds",
            "The timestamp of the last reload of hosts file.",
        )
        self._entries.set(self._inline.entries)

    def work(self) -> Sequence[Work]:
        return (WatchFile(self._options.path, self._options.reload, self.load),)

    def load(self, content: bytes | None, error: str) -> bool:
        """Take over the file's content; a file that cannot be read changes nothing."""
        if content is None:
            self._log.warning("no hosts file: %s", error)
            return False
        text = content.decode("utf-8-sig", "surrogateescape")
        table = parse_hosts(text.split("\n"), self._options.zones, self._options.reverse)
        if table.skipped:
            line, why = table.first_skipped
            self._log.warning(
                "%s:%d: %s (%d such places are left out)",
                self._options.path, line, why, table.skipped,
            )  # fmt: skip
        self._tables = (table, self._inline)
        self._entries.set(table.entries + self._inline.entries)
        self._reloaded.labels().set(self._wall())
        return True

    def on_query(self, query: Query) -> Outcome:
        key = query.key
        qtype = query.qtype
        options = self._options
        if qtype == t.PTR:
            # CoreDNS: of any zone, and passed on without a fallthrough.
            return self._pointer(key)
        zones = options.zones
        if ROOT not in zones and not any(is_subdomain(key, zone) for zone in zones):
            return None
        v4, v6 = self._addresses(key, False), self._addresses(key, True)
        if not v4 and not v6:
            if self._falls_through(key):
                return None
            # There is no SOA to say NXDOMAIN with, so CoreDNS says SERVFAIL.
            return failure(t.SERVFAIL)
        ttl = options.ttl
        if qtype == t.A:
            answer = [RR(key, t.A, ttl, address) for address in v4]
        elif qtype == t.AAAA:
            answer = [RR(key, t.AAAA, ttl, address) for address in v6]
        elif options.unsupported and self._falls_through(key):
            return None
        else:
            answer = []
        return Reply(answer=answer, served_by="hosts", keep=FOREVER)

    def _addresses(self, key: bytes, six: bool) -> list[bytes]:
        """Return the file's and the Corefile's addresses of a name, or of the `*` beside it."""
        found: list[bytes] = []
        for table in self._tables:
            by_name = table.v6 if six else table.v4
            own = by_name.get(key)
            if own is None and key != ROOT:
                own = by_name.get(_STAR + parent(key))
            for address in own or ():
                if address not in found:
                    found.append(address)
        return found

    def _pointer(self, key: bytes) -> Outcome:
        address = address_of(key)
        if address is None:
            return None
        packed = parse_address(address)
        assert packed is not None  # address_of returns addresses
        names: dict[bytes, None] = {}
        for table in self._tables:
            names |= table.names.get(packed, {})
        if not names:
            return None
        answer = [RR(key, t.PTR, self._options.ttl, name) for name in names]
        return Reply(answer=answer, served_by="hosts", keep=FOREVER)

    def _falls_through(self, key: bytes) -> bool:
        return any(is_subdomain(key, zone) for zone in self._options.fallthrough)


def setup(directives: list[Directive], cx: Setup) -> list[Plugin]:
    """`hosts [FILE [ZONES...]] { ADDRESS NAME...; ttl N; no_reverse; reload D;
    fallthrough [ZONES...]; fallthrough_unsupported }`"""
    directive = cx.once(directives)
    options = Options()
    if directive.args:
        options.path = cx.path(directive.args[0].text)
    options.zones = cx.zones(directive.args[1:])
    _read_options(directive, options, cx)
    _check_inline(options, cx)
    return [Hosts(options, cx)]


def _read_options(directive: Directive, options: Options, cx: Setup) -> None:
    unsupported: Token | None = None
    for option in directive.options or ():
        match option.name:
            case "fallthrough":
                options.fallthrough = fallthrough_zones(option, cx)
            case "fallthrough_unsupported":
                cx.no_args(option)
                options.unsupported = True
                unsupported = option.word
            case "no_reverse":
                cx.no_args(option)
                options.reverse = False
            case "reload":
                if cx.arg_count(option, 1, 1):
                    options.reload = cx.duration(option.args[0])
            case "ttl":
                if cx.arg_count(option, 1, 1):
                    options.ttl = cx.integer(option.args[0], 1, MAX_TTL, "ttl")
            case name if parse_address(name) is not None:
                line = " ".join([name, *[token.text for token in option.args]])
                options.inline.append((option.word, line))
            case _:
                cx.unknown_option(option, _OPTIONS)
    if unsupported is not None and not options.fallthrough:
        cx.problems.error(unsupported, "fallthrough_unsupported requires fallthrough")


def _check_inline(options: Options, cx: Setup) -> None:
    """Say which lines of the Corefile would never answer."""
    for token, line in options.inline:
        table = parse_hosts([line], (ROOT,), False)
        if table.skipped:
            cx.problems.error(token, f"{table.first_skipped[1]}; write ADDRESS NAME...")
            continue
        for key in [*table.v4, *table.v6]:
            if not any(is_subdomain(key, zone) for zone in options.zones):
                zones = " ".join(render_name(zone) for zone in options.zones)
                cx.problems.warn(
                    token, f"{render_name(key)} never answers: it is not in the zones {zones}"
                )
