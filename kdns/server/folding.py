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
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Final, TypeAlias

from kdns.dns import types as t
from kdns.dns.message import Query, Reply
from kdns.dns.name import MAX_LABEL, MAX_NAME, is_subdomain

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
NAME_AT: Final = 1 + HEADER - 2  # where in fold()'s key the name begins
# Where in the answer, which part of the query, how many octets.
Hole: TypeAlias = tuple[int, slice, int]
_ID_HOLE: Final[Hole] = (0, slice(0, 2), 2)
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
    """Return where in a datagram the labels of its question's name begin, and where the root
    does; nothing if it is no name."""
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
    return starts if at < HEADER + MAX_NAME else []


def below_head(folded: bytes, starts: list[int]) -> bytes:
    """Return the first part of the keys of answers for all names that end alike. With what
    stands in fold()'s key from NAME_AT + n on it is the key that all questions share whose names
    are of one length, of one number of labels, and alike from their octet n on.

    starts -- of the name's labels
    """
    shape = (len(starts) << 8 | starts[-1] - HEADER).to_bytes(2, "big")
    return MARK_BELOW + shape + folded[1:NAME_AT]


class Template:
    """An answer with holes, each the part of a query that stands there.

    ttl -- of its records, where it can be changed; -1: whatever they had at first
    """

    __slots__ = ("_form", "_parts", "_pieces", "_ttls", "size", "ttl")

    def __init__(self, wire: bytes, holes: Iterable[Hole], ttls: Iterable[int] = ()) -> None:
        """holes -- one or more, in order
        ttls  -- where in `wire` the TTLs are that age() sets, in order; none is in a hole"""
        pieces: list[bytes] = []  # what stands before each hole, and behind the last
        starts: list[int] = []
        parts: list[slice] = []
        at = 0
        for start, part, size in holes:
            pieces.append(wire[at:start])
            starts.append(at)
            parts.append(part)
            at = start + size
        pieces.append(wire[at:])
        starts.append(at)
        # Of a query's octets, what goes into the holes: a call and a filling-in, both in C.
        self._parts: Callable[[bytes], bytes | tuple[bytes, ...]] = itemgetter(*parts)
        self._form = _form_of(pieces)
        self._pieces: list[bytes] = []
        self._ttls: list[tuple[int, int]] = []
        for place in ttls:
            n = bisect_right(starts, place) - 1
            self._ttls.append((n, place - starts[n]))
        if self._ttls:
            self._pieces = pieces
        self.size = len(wire)
        self.ttl = -1

    def fill(self, datagram: bytes) -> bytes:
        """Return the answer to a query that folds to the same key."""
        return self._form % self._parts(datagram)

    def age(self, ttl: int) -> None:
        """Have all records show `ttl`."""
        if ttl == self.ttl:
            return
        self.ttl = ttl
        if not self._ttls:
            return
        octets, pieces = ttl.to_bytes(4, "big"), self._pieces
        for n, at in self._ttls:
            piece = pieces[n]
            pieces[n] = piece[:at] + octets + piece[at + 4 :]
        self._form = _form_of(pieces)


def _form_of(pieces: list[bytes]) -> bytes:
    """Return what `%` makes an answer of."""
    form = b"%b".join(pieces)
    if form.count(b"%") >= len(pieces):
        form = b"%b".join([piece.replace(b"%", b"%%") for piece in pieces])
    return form


def exact(wire: bytes, ttls: Iterable[int]) -> Template:
    """Return the template of an answer for one spelling of its question."""
    return Template(wire, [_ID_HOLE], ttls)


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
    datagram: bytes, query: Query, reply: Reply, wire: bytes, ttls: Iterable[int] = ()
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
    name = query.name
    at = HEADER + len(name)
    whole: Hole = (HEADER, slice(HEADER, at), len(name))
    holes: list[Hole] = [_ID_HOLE, whole]
    at += QUESTION_END
    start = 0  # of the names that answers have
    for section in (reply.answer, reply.authority, reply.additional):
        for rr in section:
            owner, rdata = rr.name, rr.rdata
            rest = at + len(owner) + RECORD
            end = rest + len(rdata)
            if wire[at : at + len(owner)] != owner or wire[rest:end] != rdata:
                return None
            if zone is not None:
                if owner is name:
                    holes.append((at, whole[1], len(name)))
                elif not _add_hole(holes, query, zone, start, at, owner):
                    return None
                if rr.type in _NAMES and not all(
                    _add_hole(holes, query, zone, zone, rest + where, one)
                    for where, one in _NAMES[rr.type](rdata)
                ):
                    return None
            at = end
        if zone is not None:
            start = zone
    cookie = _cookie_of(query)
    if cookie is None:
        return None
    if cookie:
        at += 1 + RECORD + 4
        # Other octets may stand behind the OPT.
        if wire[at : at + CLIENT_COOKIE] != cookie or datagram[_COOKIE_HOLE] != cookie:
            return None
        holes.append((at, _COOKIE_HOLE, CLIENT_COOKIE))
    return Template(wire, holes, ttls)


def _add_hole(holes: list[Hole], query: Query, zone: int, start: int, at: int, name: bytes) -> bool:
    """Add the hole of a name that stands at `at` and ends in the question's from octet `start`
    on; return False where it is spelt otherwise than was promised."""
    part = query.name[start:]
    if name.endswith(part):
        begin = HEADER + start
        size = len(part)
        holes.append((at + len(name) - size, slice(begin, begin + size), size))
        return True
    return start > 0 and not is_subdomain(name.lower(), query.key[zone:])


def _names_of_srv(rdata: bytes) -> Sequence[tuple[int, bytes]]:
    return ((6, rdata[6:]),)


@lru_cache(maxsize=64)  # one is in all negative answers
def _names_of_soa(rdata: bytes) -> Sequence[tuple[int, bytes]]:
    first = _name_size(rdata, 0)
    second = _name_size(rdata, first)
    return (0, rdata[:first]), (first, rdata[first : first + second])


# The names in records and where in the rdata they stand. Of other types that hold any no Reply
# says that it folds.
_NAMES: Final[dict[int, Callable[[bytes], Sequence[tuple[int, bytes]]]]] = {
    t.SRV: _names_of_srv,
    t.SOA: _names_of_soa,
}


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
