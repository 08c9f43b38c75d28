"""Zone files (RFC 1035 s5, RFC 2308 s4, BIND's $GENERATE): text to records.

Decides what a file says and where it is wrong. Opening $INCLUDE files is the caller's `read`;
what the records answer is zone.py's. All that is wrong is reported at once, with file and
line; a zone with an error is not served.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from kdns.dns import types as t
from kdns.dns.message import RR
from kdns.dns.name import is_subdomain, parse_name, render_name
from kdns.dns.text import WORD, BadText, parse_head, parse_rdata, parse_ttl
from kdns.errors import ConfigError, KdnsError, Problem

MAX_INCLUDE_DEPTH = 7  # as CoreDNS
MAX_INCLUDES = 1000  # files in all: one that includes itself twice would double each level
MAX_GENERATE = 65_536  # records of one $GENERATE, as CoreDNS
MAX_GENERATED = 1 << 20  # records of all $GENERATE lines of a zone
MAX_WIDTH = 255  # of a number in $GENERATE, as CoreDNS
MAX_PROBLEMS = 20  # more say nothing new to the reader

# Reads a file another file names: (content, "") or (None, why not).
Read = Callable[[str], tuple[bytes | None, str]]

_SPECIAL = re.compile(r'[;"()\\]')
_BLANK = re.compile(r"\s*")
_RANGE = re.compile(r"(\d{1,10})-(\d{1,10})(?:/(\d{1,10}))?", re.ASCII)
_DOLLAR = re.compile(r"\\\$|\$\$|\\.|\$\{([^}]*)\}|\$", re.DOTALL)
_MODIFIER = re.compile(r"(-?\d{1,10})(?:,(\d{1,3})(?:,([doxXnN]))?)?", re.ASCII)


@dataclass(slots=True)
class ZoneText:
    """The records of one zone as its file lists them.

    records  -- all of class IN, in the zone, names in the case they were written
    soa      -- the one SOA, also in records
    warnings -- what was left out or looks like a mistake
    """

    records: list[RR]
    soa: RR
    warnings: list[Problem]


def parse_zone(content: bytes, origin: bytes, path: str, read: Read) -> ZoneText:
    """Return the records of the zone `origin` (lower-case wire name) in a file's content.

    path -- for messages, and the start of relative $INCLUDE paths.
    Raises ConfigError with all problems (at most MAX_PROBLEMS).
    """
    parser = _Parser(origin, read)
    try:
        parser.parse_file(content, origin, path, 0)
        if parser.soa is None and not parser.found.errors:
            parser.found.error(path, 0, f"no SOA record for {render_name(origin)}")
    except _Enough:
        pass
    if parser.found.errors or parser.soa is None:
        raise ConfigError(parser.found.errors + parser.found.warnings)
    _warn_of_aliases(parser)
    return ZoneText(parser.records, parser.soa, parser.found.warnings)


class _Enough(Exception):
    """Too many problems to go on."""


@dataclass(slots=True)
class _Found:
    errors: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)

    def error(self, path: str, line: int, text: str) -> None:
        self.errors.append(Problem(path, line, text))
        if len(self.errors) >= MAX_PROBLEMS:
            raise _Enough

    def warn(self, path: str, line: int, text: str) -> None:
        if len(self.warnings) < MAX_PROBLEMS:
            self.warnings.append(Problem(path, line, text, warning=True))


def _warn_of_aliases(parser: _Parser) -> None:
    """RFC 1034 s3.6.2: a name with a CNAME has no other records, DNSSEC's apart."""
    if not parser.aliases:
        return
    others: dict[bytes, RR] = {}
    for rr in parser.records:
        key = rr.name.lower()
        if key in parser.aliases and rr.type not in (t.CNAME, t.RRSIG, t.NSEC):
            others.setdefault(key, rr)
    for key, rr in others.items():
        path, line = parser.aliases[key]
        parser.found.warn(
            path, line,
            f"{render_name(key)} has a CNAME and also {t.type_name(rr.type)}:"
            " only the CNAME will answer",
        )  # fmt: skip


class _Parser:
    """Reads one zone; the state that $INCLUDE gives back is in parse_file's frame."""

    def __init__(self, zone: bytes, read: Read) -> None:
        self.zone = zone
        self.read = read
        self.records: list[RR] = []
        self.soa: RR | None = None
        self.found = _Found()
        self.aliases: dict[bytes, tuple[str, int]] = {}
        self.default_ttl: int | None = None  # $TTL
        self.last_ttl: int | None = None
        self.includes = 0
        self.generated = 0
        self.path = ""
        self.origin = zone
        self.owner: bytes | None = None

    def parse_file(self, content: bytes, origin: bytes, path: str, depth: int) -> None:
        outer = self.path, self.origin, self.owner
        self.path, self.origin = path, origin
        # Octets that are no UTF-8 do not matter in a comment and survive in a string.
        text = content.decode("utf-8-sig", "surrogateescape")
        for line, blank, words in self.lines(text):
            try:
                self.parse_line(line, blank, words, depth)
            except KdnsError as e:
                self.found.error(path, line, str(e))
            except UnicodeEncodeError:
                self.found.error(path, line, "a name is not UTF-8; write the octets as \\DDD")
        # RFC 1035 s5.1: after $INCLUDE origin and owner are what they were.
        self.path, self.origin, self.owner = outer

    # --- lines to words ---------------------------------------------------------------

    def lines(self, text: str) -> Iterator[tuple[int, bool, list[str]]]:
        """Yield (number, starts with a blank, words) of each entry that is not empty."""
        words: list[str] = []
        depth = start = 0
        blank = False
        for number, line in enumerate(text.split("\n"), 1):
            if depth == 0:
                if not _SPECIAL.search(line):
                    found = line.split()
                    if found:
                        yield number, line[0].isspace(), found
                    continue
                words, start, blank = [], number, line[0].isspace()
            depth = self.split_line(number, line, words, depth)
            if depth == 0 and words:
                yield start, blank, words
        if depth > 0:
            self.found.error(self.path, start, "the parenthesis opened here is never closed")

    def split_line(self, number: int, line: str, words: list[str], depth: int) -> int:
        """Append the words of one line; return how many parentheses are open after it."""
        at = 0
        while True:
            at = _BLANK.match(line, at).end()  # type: ignore[union-attr]  # matches nothing too
            if at == len(line) or line[at] == ";":
                return depth
            if line[at] == "(":
                depth += 1
                at += 1
            elif line[at] == ")":
                if depth == 0:
                    self.found.error(self.path, number, "a ) without its (")
                else:
                    depth -= 1
                at += 1
            else:
                match = WORD.match(line, at)
                if match is None:
                    self.found.error(
                        self.path, number,
                        "a quote is not closed on its line" if line[at] == '"'
                        else "a backslash ends the line",
                    )  # fmt: skip
                    words.clear()
                    return depth
                words.append(match[0])
                at = match.end()

    # --- words to records -------------------------------------------------------------

    def parse_line(self, line: int, blank: bool, words: list[str], depth: int) -> None:
        first = words[0]
        if first[0] == "$" and not blank:
            self.parse_directive(line, words, depth)
            return
        if blank:
            if self.owner is None:
                raise BadText("the first record needs an owner name; use @ for the zone itself")
            at = 0
        else:
            self.owner = parse_name(first, self.origin)
            at = 1
        ttl, cls, type, at = parse_head(words, at)
        self.add(line, self.owner, ttl, cls, type, words[at:])

    def add(
        self, line: int, owner: bytes, ttl: int | None, cls: int | None, type: int, words: list[str]
    ) -> None:
        if cls is not None and cls != t.IN:
            raise BadText(f"class {t.class_name(cls)}: a zone file's records are of class IN")
        rdata = parse_rdata(type, words, self.origin)
        if ttl is not None:
            self.last_ttl = ttl
        elif self.default_ttl is not None:
            ttl = self.default_ttl
        else:
            # RFC 1035 s5.1: the last stated one. BIND: an SOA without any takes its minimum.
            if self.last_ttl is None and type == t.SOA:
                self.last_ttl = min(int.from_bytes(rdata[-4:], "big"), 0x7FFFFFFF)
            ttl = self.last_ttl
            if ttl is None:
                raise BadText("no TTL; put one here, or a line such as $TTL 3600 at the top")
        key = owner.lower()
        if not is_subdomain(key, self.zone):
            self.found.warn(
                self.path, line,
                f"{render_name(owner)} is not in the zone {render_name(self.zone)}: left out",
            )  # fmt: skip
            return
        rr = RR(owner, type, ttl, rdata)
        if type == t.SOA:
            self.add_soa(line, key, rr)
        elif type == t.CNAME:
            if key in self.aliases:
                self.found.warn(self.path, line, f"{render_name(owner)} has two CNAMEs")
            self.aliases[key] = (self.path, line)
        elif type in _NOT_STORED:
            raise BadText(f"a zone cannot hold {t.type_name(type)} records")
        self.records.append(rr)

    def add_soa(self, line: int, key: bytes, rr: RR) -> None:
        if key != self.zone:
            raise BadText(
                f"the SOA is that of {render_name(key)}, the zone is {render_name(self.zone)}"
            )
        if self.soa is not None:
            raise BadText("a second SOA; a zone has one")
        self.soa = rr

    # --- directives -------------------------------------------------------------------

    def parse_directive(self, line: int, words: list[str], depth: int) -> None:
        word, args = words[0].upper(), words[1:]
        match word, len(args):
            case "$ORIGIN", 1:
                self.origin = parse_name(args[0], self.origin)
            case "$TTL", 1:
                ttl = parse_ttl(args[0])
                if ttl is None:
                    raise BadText(f"'{args[0]}' is not a TTL; write seconds or 1h30m")
                self.default_ttl = ttl
            case "$INCLUDE", 1 | 2:
                origin = parse_name(args[1], self.origin) if len(args) == 2 else self.origin
                self.include(args[0].strip('"'), origin, depth)
            case "$GENERATE", n if n >= 4:
                self.generate(line, args)
            case (("$ORIGIN" | "$TTL" | "$INCLUDE" | "$GENERATE"), n):
                raise BadText(f"{word} takes {_USAGE[word]}, found {n or 'nothing'}")
            case _:
                raise BadText(f"unknown directive '{words[0]}' (known: {', '.join(_USAGE)})")

    def include(self, name: str, origin: bytes, depth: int) -> None:
        folder = self.path.rpartition("/")[0]
        path = name if name.startswith("/") or not folder else f"{folder}/{name}"
        self.includes += 1
        if depth >= MAX_INCLUDE_DEPTH or self.includes > MAX_INCLUDES:
            raise BadText(f"$INCLUDE {name}: too many files in files; does it include itself?")
        content, error = self.read(path)
        if content is None:
            raise BadText(f"$INCLUDE {name}: {error}")
        self.parse_file(content, origin, path, depth + 1)

    def generate(self, line: int, args: list[str]) -> None:
        match = _RANGE.fullmatch(args[0])
        start, stop, step = (int(n or 1) for n in match.groups()) if match else (0, 0, 0)
        if not 0 <= start <= stop < 1 << 31 or step < 1:
            raise BadText(f"'{args[0]}' is not a range such as 1-10 or 0-100/2")
        count = (stop - start) // step + 1
        self.generated += count
        if count > MAX_GENERATE or self.generated > MAX_GENERATED:
            raise BadText(f"$GENERATE of {count} records; at most {MAX_GENERATE} are allowed")
        ttl, cls, type, at = parse_head(args, 2)
        for number in range(start, stop + 1, step):
            owner = parse_name(_expand(args[1], number), self.origin)
            self.add(line, owner, ttl, cls, type, [_expand(w, number) for w in args[at:]])


_NOT_STORED = frozenset((t.OPT, t.AXFR, t.IXFR, t.ANY, 249, 250, 253, 254))

_USAGE = {
    "$ORIGIN": "one name",
    "$TTL": "one time",
    "$INCLUDE": "a file and, if need be, an origin",
    "$GENERATE": "a range, an owner, a type and its rdata",
}


def _expand(word: str, number: int) -> str:
    """Return `word` with each `$` replaced by the number, as BIND's $GENERATE does."""

    def expand(match: re.Match[str]) -> str:
        text = match[0]
        if text in ("$$", "\\$"):
            return "$"
        if text[0] == "\\":
            return text
        if text == "$":
            return str(number)
        modifier = _MODIFIER.fullmatch(match[1])
        width = int(modifier[2] or 0) if modifier else MAX_WIDTH + 1
        if modifier is None or width > MAX_WIDTH or number + int(modifier[1]) < 0:
            raise BadText(f"'{text}' is not ${{offset,width,base}} with base d, o, x, X, n or N")
        return _format(number + int(modifier[1]), width, modifier[3] or "d")

    return _DOLLAR.sub(expand, word)


def _format(number: int, width: int, base: str) -> str:
    if base not in "nN":
        return format(number, f"0{width}{base}" if width else base)
    # Nibbles from the lowest up, with dots; width counts the dots too.
    text = ""
    while True:
        text += format(number & 15, "x" if base == "n" else "X")
        number >>= 4
        if not number and len(text) >= width:
            return text
        text += "."
        if not number and len(text) >= width:
            return text
