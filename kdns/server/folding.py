"""One answer for a question however its letters are written: 0x20, DNS cookies, and for one
whose TTLs count down.

An answer of the cluster's zones holds the question's name, or the zone at its end, as it was
typed, in places that are known when the answer is made; a client's cookie comes back as it
came. A Template is the answer with holes for these, and knows where its TTLs are. It decides
whether an answer can be one; whether it may be sent again at all, and with which TTL, is said
by the Reply (docs/DESIGN.md 1.3 point 2).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Final, TypeAlias

from kdns.dns import types as t
from kdns.dns.message import RR, Query, Reply
from kdns.dns.name import MAX_LABEL, is_subdomain

HEADER: Final = 12
RECORD: Final = 10  # octets between an owner and its rdata: type, class, TTL, size
QUESTION_END: Final = 4  # type and class
OPT: Final = t.OPT.to_bytes(2, "big")
COOKIE: Final = 10  # RFC 7873 s4
CLIENT_COOKIE: Final = 8
# What a query with nothing but a client's cookie in its OPT ends in, before the cookie.
COOKIE_HEAD: Final = b"\0\x0a\0\x08"
# From the end of the name: its root, type and class; OPT with its owner; an option; a cookie.
WITH_COOKIE: Final = 1 + QUESTION_END + 1 + RECORD + 4 + CLIENT_COOKIE
# A question's first octet behind the ID is under 0x80, so the keys of both kinds differ.
MARK: Final = b"\xff"
MARK_BELOW: Final = b"\xfe"
# Where in the answer, which part of the query, how many octets.
Hole: TypeAlias = tuple[int, slice, int]
_COOKIE_HOLE: Final = slice(-CLIENT_COOKIE, None)


def fold(datagram: bytes) -> bytes:
    """Return the key that all spellings of a question share.

    Up to the root label a name has no octet 0 unless inside a label; a question with one there
    has a key that no answer was kept under, for a key is only made of a name read whole.
    """
    end = datagram.find(0, HEADER)
    rest = datagram[end:]
    if len(rest) == WITH_COOKIE and rest[-12:-8] == COOKIE_HEAD:
        rest = rest[:-CLIENT_COOKIE]
    return MARK + datagram[2:HEADER] + datagram[HEADER:end].lower() + rest


def starts_of(datagram: bytes) -> list[int]:
    """Return where the labels of a question's name begin, and where the root does; nothing if
    there is more in the datagram than this name, its type and class."""
    starts: list[int] = []
    at = HEADER
    try:
        while size := datagram[at]:
            if size > MAX_LABEL:
                return []
            starts.append(at)
            at += size + 1
    except IndexError:
        return []
    starts.append(at)
    return starts if at + 1 + QUESTION_END == len(datagram) else []


def below_key(datagram: bytes, start: int) -> bytes:
    """Return the key that all questions share whose names go on alike from octet `start` on,
    and are of one length."""
    return (
        MARK_BELOW + start.to_bytes(2, "big") + datagram[2:HEADER]
        + datagram[start:-QUESTION_END].lower() + datagram[-QUESTION_END:]
    )  # fmt: skip


class Template:
    """An answer with holes, each the part of a query that stands there.

    ttl -- of its records, where it can be changed; -1: whatever they had at first
    """

    __slots__ = ("_holes", "_pieces", "_ttls", "size", "ttl")

    def __init__(self, wire: bytes, holes: Iterable[Hole], ttls: Iterable[int] = ()) -> None:
        """holes -- in order
        ttls  -- where in `wire` the TTLs are that age() sets, in order; none is in a hole"""
        pieces: list[bytes] = []
        starts: list[int] = []
        self._holes: list[tuple[int, slice]] = []
        at = 0
        for start, part, size in holes:
            if start > at:
                pieces.append(wire[at:start])
                starts.append(at)
            self._holes.append((len(pieces), part))
            pieces.append(b"")
            starts.append(start)
            at = start + size
        pieces.append(wire[at:])
        starts.append(at)
        self._pieces = pieces
        self._ttls: list[tuple[int, int]] = []
        for place in ttls:
            n = bisect_right(starts, place) - 1
            self._ttls.append((n, place - starts[n]))
        self.size = len(wire)
        self.ttl = -1

    def fill(self, datagram: bytes) -> bytes:
        """Return the answer to a query that folds to the same key."""
        pieces = self._pieces.copy()
        for at, part in self._holes:
            pieces[at] = datagram[part]
        return b"".join(pieces)

    def age(self, ttl: int) -> None:
        """Have all records show `ttl`."""
        if ttl == self.ttl:
            return
        self.ttl = ttl
        octets, pieces = ttl.to_bytes(4, "big"), self._pieces
        for n, at in self._ttls:
            piece = pieces[n]
            pieces[n] = piece[:at] + octets + piece[at + 4 :]


def exact(wire: bytes, ttls: Iterable[int]) -> Template:
    """Return the template of an answer for one spelling of its question."""
    return Template(wire, [(0, slice(0, 2), 2)], ttls)


def places_of_ttls(wire: bytes, ttl: int) -> list[int] | None:
    """Return where in an answer the TTLs of its records are; None where one is not `ttl`."""
    records = sum(wire[n] << 8 | wire[n + 1] for n in (6, 8, 10))
    places = []
    octets = ttl.to_bytes(4, "big")
    at = _behind_name(wire, HEADER) + QUESTION_END
    for _ in range(records):
        at = _behind_name(wire, at)
        if wire[at : at + 2] != OPT:
            if wire[at + 4 : at + 8] != octets:
                return None
            places.append(at + 4)
        at += RECORD + (wire[at + 8] << 8 | wire[at + 9])
    return places


def _behind_name(wire: bytes, at: int) -> int:
    """Return where the name at `at` ends, in an answer that was rendered here."""
    while size := wire[at]:
        if size >= 0xC0:
            return at + 2
        at += size + 1
    return at + 1


def template_of(
    query: Query, reply: Reply, wire: bytes, ttls: Iterable[int] = ()
) -> Template | None:
    """Return the template of the answer `wire` that was rendered from `reply`; None if it
    cannot be one: compressed, cut, or with names whose spelling nobody vouches for.

    ttls -- as for Template
    """
    # Not where a plugin has the question's name rewritten on its way.
    if reply.folds is None or reply.folds[0] is not query.name:
        return None
    if query.name.find(0) != len(query.name) - 1:
        return None
    zone = reply.folds[1]
    holes: list[Hole] = [
        (0, slice(0, 2), 2),
        (HEADER, slice(HEADER, HEADER + len(query.name)), len(query.name)),
    ]
    at = HEADER + len(query.name) + QUESTION_END
    answers = len(reply.answer)
    for n, rr in enumerate((*reply.answer, *reply.authority, *reply.additional)):
        end = at + len(rr.name) + RECORD + len(rr.rdata)
        if wire[at : at + len(rr.name)] != rr.name or wire[end - len(rr.rdata) : end] != rr.rdata:
            return None
        if zone is not None:
            found = _holes_of(query, rr, at, zone, n < answers)
            if found is None:
                return None
            holes += found
        at = end
    cookie = _cookie_of(query)
    if cookie is None:
        return None
    if cookie:
        at += 1 + RECORD + 4
        if wire[at : at + CLIENT_COOKIE] != cookie:
            return None
        holes.append((at, _COOKIE_HOLE, CLIENT_COOKIE))
    return Template(wire, holes, ttls)


def _holes_of(query: Query, rr: RR, at: int, zone: int, answers: bool) -> list[Hole] | None:
    """Return the holes in a record that stands at `at`; None where it is spelt otherwise than
    was promised."""
    holes: list[Hole] = []
    for where, name in _names(rr):
        start = 0 if answers and not where else zone
        part = query.name[start:]
        if name.endswith(part):
            begin = HEADER + start
            where += at + len(name) - len(part)
            holes.append((where, slice(begin, begin + len(part)), len(part)))
        elif not start or is_subdomain(name.lower(), query.key[zone:]):
            return None
    return holes


def _names(rr: RR) -> Iterator[tuple[int, bytes]]:
    """Yield the names in a record and where in it they stand, its owner first. Of other types
    than these no Reply says that it folds."""
    yield 0, rr.name
    start = len(rr.name) + RECORD
    if rr.type == t.SRV:
        yield start + 6, rr.rdata[6:]
    elif rr.type == t.SOA:
        first = _name_size(rr.rdata, 0)
        second = _name_size(rr.rdata, first)
        yield start, rr.rdata[:first]
        yield start + first, rr.rdata[first : first + second]


def _name_size(rdata: bytes, at: int) -> int:
    start = at
    while rdata[at]:
        at += rdata[at] + 1
    return at + 1 - start


def _cookie_of(query: Query) -> bytes | None:
    """Return the client's cookie, b"" where it has none; None where a query has other options,
    too: what becomes of them is not known here."""
    options = query.edns.options if query.edns is not None else ()
    if not options:
        return b""
    if len(options) == 1 and options[0][0] == COOKIE and len(options[0][1]) == CLIENT_COOKIE:
        return options[0][1]
    return None
