"""DNS messages: strangers' bytes checked and parsed, replies rendered.

Decides what is a well-formed query, how a reply is laid out, compressed and
truncated. What is answered is the plugins' business; sizes that depend on the
transport are arguments. No stranger's octet reaches dnslib, whose parser recurses and leaks
exceptions (docs/DESIGN.md 1.3 point 3): it makes the questions of `kdns query` and no more.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from struct import Struct
from struct import error as StructError
from typing import TYPE_CHECKING, Any

from kdns.dns import types as t
from kdns.dns.ede import OPTION, Ede, render_ede
from kdns.errors import WireError

if TYPE_CHECKING:
    from kdns.metrics import Cell

QR, AA, TC, RD, RA, AD, CD = 0x8000, 0x0400, 0x0200, 0x0100, 0x0080, 0x0020, 0x0010
OPCODE = 0x7800
# In Reply.flags only, above the 16 bits of the wire: send RD set or cleared, whatever the
# query had (the `header` plugin).
SET_RD, CLEAR_RD = 0x10000, 0x20000

HEADER = Struct("!HHHHHH")
_FIXED = Struct("!HHIH")  # type, class, ttl, rdlength
_QTAIL = Struct("!HH")
# An OPT record's owner and type, and what lies between those and its options.
_ROOT_OPT = b"\0" + t.OPT.to_bytes(2, "big")
_OPT_FIXED = Struct("!HIH")
_U16 = Struct("!H")

MIN_UDP = 512  # RFC 1035 s4.2.1
MAX_TCP = 65535
# CoreDNS compresses a UDP reply that would otherwise not fit one Ethernet frame.
FRAGMENT_V4, FRAGMENT_V6 = 1480, 1220
FOREVER = float("inf")

# EDNS options that CoreDNS sends back as they came (reference 1.15): NSID, EXPIRE,
# COOKIE, TCP-KEEPALIVE, PADDING.
ECHOED_OPTIONS = frozenset((3, 9, 10, 11, 12))


class RR:
    """One resource record. Not changed after it is made: share it, or copy it.

    name  -- owner, wire form, case as it shall be sent
    rdata -- uncompressed wire form
    ttl   -- seconds
    """

    __slots__ = ("_tail", "cls", "name", "rdata", "ttl", "type")

    def __init__(self, name: bytes, type: int, ttl: int, rdata: bytes, cls: int = t.IN) -> None:
        self.name = name
        self.type = type
        self.cls = cls
        self.ttl = ttl
        self.rdata = rdata
        self._tail: bytes | None = None

    @property
    def tail(self) -> bytes:
        """All of the record behind its owner name."""
        tail = self._tail
        if tail is None:
            tail = self._tail = (
                _FIXED.pack(self.type, self.cls, self.ttl, len(self.rdata)) + self.rdata
            )
        return tail

    def owned_by(self, name: bytes) -> RR:
        """Return the same record under another owner name."""
        rr = RR.__new__(RR)
        rr.name = name
        rr.type = self.type
        rr.cls = self.cls
        rr.ttl = self.ttl
        rr.rdata = self.rdata
        rr._tail = self._tail or self.tail
        return rr

    def with_ttl(self, ttl: int) -> RR:
        """Return the same record with another TTL."""
        return self if ttl == self.ttl else RR(self.name, self.type, ttl, self.rdata, self.cls)

    def _key(self) -> tuple[bytes, int, int, int, bytes]:
        return (self.name, self.type, self.cls, self.ttl, self.rdata)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RR) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        from kdns.dns.text import render_rr

        return f"<RR {render_rr(self)}>"


class Edns:
    """The OPT pseudo-record (RFC 6891). size is the sender's UDP payload size."""

    __slots__ = ("do", "options", "size", "version")

    def __init__(
        self,
        size: int,
        do: bool = False,
        version: int = 0,
        options: Sequence[tuple[int, bytes]] = (),
    ) -> None:
        self.size = size
        self.do = do
        self.version = version
        self.options = options


class Query:
    """One question on its way through the chain. Plugins change it by making another.

    name/key  -- the question name as typed, and lower-cased; wire form
    flags     -- the header's second word as it came
    client    -- (address, port) of the asker
    proto     -- "udp", "tcp", "tls" or "https": the transport it came by
    received  -- monotonic seconds when it arrived
    limit     -- largest reply in octets the asker can take
    depth     -- how many Asks deep this question is (plugins/chain.py bounds it)
    serial    -- the SOA serial an IXFR starts from (RFC 1995 s3), or None
    meta      -- what plugins higher up left for those below (reference 1.13 metadata), or None
    """

    __slots__ = (
        "client",
        "depth",
        "edns",
        "flags",
        "id",
        "key",
        "limit",
        "meta",
        "name",
        "proto",
        "qclass",
        "qtype",
        "received",
        "serial",
        "size",
    )

    id: int
    flags: int
    name: bytes
    key: bytes
    qtype: int
    qclass: int
    edns: Edns | None
    client: tuple[str, int]
    proto: str
    received: float
    limit: int
    size: int
    meta: dict[str, Any] | None
    depth: int
    serial: int | None

    def asking(
        self, name: bytes | None = None, qtype: int | None = None, qclass: int | None = None
    ) -> Query:
        """Return a copy that asks something else for the same client."""
        q = Query.__new__(Query)
        q.id = self.id
        q.flags = self.flags
        q.name = self.name if name is None else name
        q.key = self.key if name is None else name.lower()
        q.qtype = self.qtype if qtype is None else qtype
        q.qclass = self.qclass if qclass is None else qclass
        q.edns = self.edns
        q.client = self.client
        q.proto = self.proto
        q.received = self.received
        q.limit = self.limit
        q.size = self.size
        q.meta = self.meta
        q.depth = self.depth
        q.serial = self.serial
        return q

    @property
    def do(self) -> bool:
        """The DNSSEC OK bit (RFC 3225)."""
        return self.edns is not None and self.edns.do

    @property
    def question(self) -> bytes:
        """The question section as it goes into a reply."""
        return self.name + _QTAIL.pack(self.qtype, self.qclass)


def make_query(
    name: bytes,
    qtype: int,
    *,
    qclass: int = t.IN,
    client: tuple[str, int] = ("127.0.0.1", 0),
    proto: str = "udp",
    edns: Edns | None = None,
    rd: bool = True,
    id: int = 0,
    received: float = 0.0,
) -> Query:
    """Return a query made here and not parsed: for internal look-ups and for tests."""
    q = Query.__new__(Query)
    q.id, q.flags, q.name, q.key = id, RD if rd else 0, name, name.lower()
    q.qtype, q.qclass, q.edns, q.client, q.proto = qtype, qclass, edns, client, proto
    q.received, q.size, q.meta, q.depth, q.serial = received, 16 + len(name), None, 0, None
    q.limit = _limit(proto, edns)
    return q


def _limit(proto: str, edns: Edns | None) -> int:
    if proto != "udp":
        return MAX_TCP
    return MIN_UDP if edns is None else max(MIN_UDP, edns.size)


class Lease:
    """How long an answer of a cache may be repeated, its TTLs counting down: all its records
    have the same one.

    ttl    -- seconds at `stored` (monotonic seconds)
    floor  -- it may be repeated while more seconds than these are left
    counts -- False: the TTL is shown as it was at first
    held   -- False once the cache may answer something else
    """

    __slots__ = ("counts", "floor", "held", "stored", "ttl")

    def __init__(self, stored: float, ttl: int, floor: int = 0, counts: bool = True) -> None:
        self.stored = stored
        self.ttl = ttl
        self.floor = floor
        self.counts = counts
        self.held = True

    def shown(self, now: float) -> int | None:
        """Return the TTL to show at `now`; None once it may not be repeated any more."""
        left = self.ttl - int(now - self.stored)
        if left <= self.floor or not self.held:
            return None
        return left if self.counts else self.ttl

    def until(self, now: float) -> float:
        """Return when another TTL has to be shown, or none."""
        return self.stored + int(now - self.stored) + 1


_UNWRITTEN = frozenset((t.FORMERR, t.SERVFAIL, t.NOTIMP, t.REFUSED))


class Reply:
    """What the chain answers, and what is known of how long it may be repeated.

    rcode        -- may be over 15 (extended rcode, RFC 6891 s6.1.3)
    flags        -- only AA, TC, RA, AD, SET_RD and CLEAR_RD are read; the rest comes from
                    the query
    edns         -- the upstream's OPT if there was one; its options are passed on
    ede          -- why the answer is what it is (RFC 8914), or None; set only where the query
                    had EDNS, sent where there is room
    why          -- finds that out later: called where this reply is kept and given out again
                    (`cache`), returns what explain() takes
    error        -- text for the `errors` plugin, or None
    keep         -- seconds this very reply may be sent again to any client for the same
                    question bytes: 0 never (the default), FOREVER until a dep changes
    lease        -- with other TTLs it may be sent for longer than `keep` (unless that is 0):
                    see Lease. Whoever alters TTLs on the way up, or makes an answer of several,
                    takes this away. None: it may not
    deps         -- keys of the zone nodes it was made from (see server/packetcache.py)
    tally        -- what to count again for each repeat: (cell, value); value None means
                    the duration of the repeat in seconds
    on_repeat    -- called with the repeated query's (client, id) for each repeat (query log)
    shuffled     -- True when addresses are put in another order for each asker (loadbalance)
    folds        -- (the question's name, where in it the zone starts): the former is the owner
                    of all answers, as it was typed; all other names are fixed but for the zone
                    at their end, which is as typed. The second None: all names of records are
                    fixed. So it may be said again for other spellings (server/folding.py).
                    None where nobody vouches for that
    below        -- where in the question's name the part of it begins that this answer goes by,
                    one that a name is not there: all names of as many labels that end in it get
                    this answer, but for the name (RFC 8020). None where nobody vouches for that
    served_by    -- name of the plugin that made it
    upstream     -- whom it was forwarded to: "10.0.0.9:53"; empty for a cached answer
    stored       -- monotonic seconds since when a cache has held it, or None
    stream       -- further batches of answer records: a zone transfer over TCP
    """

    __slots__ = (
        "additional",
        "answer",
        "authority",
        "below",
        "deps",
        "ede",
        "edns",
        "error",
        "flags",
        "folds",
        "keep",
        "lease",
        "on_repeat",
        "rcode",
        "served_by",
        "shuffled",
        "stored",
        "stream",
        "tally",
        "upstream",
        "why",
    )

    def __init__(
        self,
        rcode: int = t.NOERROR,
        answer: list[RR] | None = None,
        authority: list[RR] | None = None,
        additional: list[RR] | None = None,
        *,
        flags: int = AA,
        error: str | None = None,
        served_by: str = "",
        keep: float = 0.0,
        deps: tuple[Any, ...] = (),
    ) -> None:
        self.rcode = rcode
        self.flags = flags
        self.answer: list[RR] = [] if answer is None else answer
        self.authority: list[RR] = [] if authority is None else authority
        self.additional: list[RR] = [] if additional is None else additional
        self.edns: Edns | None = None
        self.ede: Ede | None = None
        self.why: Callable[[], tuple[Ede | None, tuple[Any, ...] | None]] | None = None
        self.error = error
        self.keep = keep
        self.deps = deps
        self.tally: list[tuple[Cell, float | None]] | None = None
        self.on_repeat: list[Callable[[tuple[str, int], int, float], None]] | None = None
        self.folds: tuple[bytes, int | None] | None = None
        self.below: int | None = None
        self.lease: Lease | None = None
        self.shuffled = False
        self.served_by = served_by
        self.upstream = ""
        self.stored: float | None = None
        self.stream: Any = None

    @property
    def is_written(self) -> bool:
        """False for a mere rcode that a plugin ended the query with: CoreDNS's server makes a
        reply of it above all plugins, so none of them alters or keeps it (ClientWrite)."""
        return self.served_by != "" or self.rcode not in _UNWRITTEN

    def copy(self) -> Reply:
        """Return a copy whose lists can be changed; records are shared; nothing tallied."""
        r = Reply(
            self.rcode,
            self.answer.copy(),
            self.authority.copy(),
            self.additional.copy(),
            flags=self.flags,
            error=self.error,
            served_by=self.served_by,
            keep=self.keep,
            deps=self.deps,
        )
        r.edns = self.edns
        r.ede = self.ede
        r.why = self.why
        r.upstream, r.stored = self.upstream, self.stored
        r.stream = self.stream
        return r

    def explain(self, ede: Ede | None, deps: tuple[Any, ...] | None) -> None:
        """Say why this is the answer. deps -- what the reason was made from; None: it is true
        only now."""
        self.ede = ede
        if deps is None:
            self.keep = 0.0
        else:
            self.deps += deps

    def count(self, cell: Cell, value: float = 1) -> None:
        """Count once now, and once more for each time this reply is repeated."""
        cell.add(value, 1)
        if self.tally is None:
            self.tally = []
        self.tally.append((cell, value))


def failure(rcode: int, error: str | None = None, ede: Ede | None = None) -> Reply:
    """Return a reply that carries only an rcode: no AA, no records."""
    reply = Reply(rcode, flags=0, error=error)
    reply.ede = ede
    return reply


# --- queries in ---------------------------------------------------------------------------


def parse_query(wire: bytes, client: tuple[str, int], proto: str, received: float) -> Query:
    """Return the query in `wire`.

    Raises WireError: rcode None where nothing may be answered, else the rcode to answer
    (see render_refusal). Reference 1.15, as CoreDNS.
    """
    size = len(wire)
    if size < 12:
        raise WireError(None, "shorter than a header")
    qid, flags, qd, an, ns, ar = HEADER.unpack_from(wire)
    if flags & (QR | OPCODE):
        if flags & QR:
            # RFC 1035 s4.1.1: a response is not a query; answering one lets two servers loop.
            raise WireError(None, "a response, not a query")
        if flags & OPCODE and flags & OPCODE != 0x2000:  # QUERY or NOTIFY
            raise WireError(t.NOTIMP, "opcode not implemented")
    if qd != 1 or an > 1 or ns > 1 or ar > 2:
        raise WireError(t.FORMERR, "unexpected section counts")
    i = 12
    try:
        while label := wire[i]:
            if label > 63:
                raise WireError(t.FORMERR, "bad label in question")
            i += label + 1
        i += 1
        if i - 12 > 255:
            raise WireError(t.FORMERR, "question name too long")
        name = wire[12:i]
        qtype, qclass = _QTAIL.unpack_from(wire, i)
    except (IndexError, StructError):
        raise WireError(t.FORMERR, "question cut short") from None
    q = Query.__new__(Query)
    q.id = qid
    q.flags = flags
    q.name = name
    q.key = name.lower()
    q.qtype = qtype
    q.qclass = qclass
    q.client = client
    q.proto = proto
    q.received = received
    q.size = size
    q.meta = None
    q.depth = 0
    if an or ns or ar:
        try:
            q.serial = _ixfr_serial(wire, i + 4) if qtype == t.IXFR and ns and not an else None
            q.edns = edns = _find_opt(wire, i + 4, an + ns, ar)
        except WireError as e:
            e.question = wire[12 : i + 4]
            raise
        q.limit = _limit(proto, edns)
    else:
        q.serial = None
        q.edns = None
        q.limit = MIN_UDP if proto == "udp" else MAX_TCP
    return q


def _ixfr_serial(wire: bytes, at: int) -> int | None:
    """Return the serial of the SOA at `at`, the authority section of an IXFR."""
    at = _skip_name(wire, at)
    if at + 10 > len(wire):
        return None
    rtype, _, _, rdlength = _FIXED.unpack_from(wire, at)
    end = at + 10 + rdlength
    if rtype != t.SOA or rdlength < 22 or end > len(wire):
        return None
    return int.from_bytes(wire[end - 20 : end - 16], "big")


def _find_opt(wire: bytes, at: int, before: int, additional: int) -> Edns | None:
    """Walk at most four records; return the last OPT among the additional ones. Fewer records
    than the header tells of are no fault, a record that is cut is one (as miekg/dns)."""
    if not before and additional == 1 and wire[at : at + 3] == _ROOT_OPT:
        # What nearly every query with EDNS has, and no more than this.
        if at + 11 > len(wire):
            raise WireError(t.FORMERR, "record cut short")
        size, ttl, rdlength = _OPT_FIXED.unpack_from(wire, at + 3)
        if at + 11 + rdlength > len(wire):
            raise WireError(t.FORMERR, "rdata cut short")
        return _parse_opt(wire[at + 11 : at + 11 + rdlength], size, ttl)
    found: Edns | None = None
    for n in range(before + additional):
        if at == len(wire):
            break
        root = at < len(wire) and wire[at] == 0
        at = _skip_name(wire, at)
        if at + 10 > len(wire):
            raise WireError(t.FORMERR, "record cut short")
        rtype, cls, ttl, rdlength = _FIXED.unpack_from(wire, at)
        at += 10
        if at + rdlength > len(wire):
            raise WireError(t.FORMERR, "rdata cut short")
        if rtype == t.OPT and n >= before and root:
            found = _parse_opt(wire[at : at + rdlength], cls, ttl)
        at += rdlength
    return found


def _parse_opt(rdata: bytes, cls: int, ttl: int) -> Edns:
    if not rdata:
        return Edns(cls, bool(ttl & 0x8000), (ttl >> 16) & 0xFF)
    options: list[tuple[int, bytes]] = []
    i = 0
    while i < len(rdata):
        if i + 4 > len(rdata):
            raise WireError(t.FORMERR, "EDNS option cut short")
        code, size = _QTAIL.unpack_from(rdata, i)
        i += 4
        if i + size > len(rdata):
            raise WireError(t.FORMERR, "EDNS option cut short")
        option = rdata[i : i + size]
        well_formed = _OPTIONS.get(code)
        if well_formed is not None and not well_formed(option):
            raise WireError(t.FORMERR, "bad EDNS option")
        options.append((code, option))
        i += size
    return Edns(cls, bool(ttl & 0x8000), (ttl >> 16) & 0xFF, options)


def _is_subnet(option: bytes) -> bool:
    """Client subnet, RFC 7871 s6: family, source and scope prefix, address."""
    if len(option) < 4:
        return False
    most = {b"\0\1": 32, b"\0\2": 128}.get(option[:2])
    # Without a family it asks for no subnet to be told (`dig +subnet=0`).
    return option[:3] == b"\0\0\0" if most is None else max(option[2:4]) <= most


# EDNS options that are looked into, as miekg/dns does: LLQ, UL, client subnet, EXPIRE,
# TCP-KEEPALIVE, extended error. All others are octets.
_OPTIONS: dict[int, Callable[[bytes], bool]] = {
    1: lambda option: len(option) >= 18,
    2: lambda option: len(option) in (4, 8),
    8: _is_subnet,
    9: lambda option: not option or len(option) >= 4,
    11: lambda option: len(option) in (0, 2),
    OPTION: lambda option: len(option) >= 2,
}


def _skip_name(wire: bytes, at: int) -> int:
    try:
        while (label := wire[at]) != 0:
            if label >= 0xC0:
                wire[at + 1]
                return at + 2
            if label > 63:
                raise WireError(t.FORMERR, "bad label")
            at += label + 1
    except IndexError:
        raise WireError(t.FORMERR, "name cut short") from None
    return at + 1


def render_refusal(wire: bytes, error: WireError) -> bytes:
    """Return the answer to a query that could not be read, for which an error has an rcode: its
    header, and its question if that could be."""
    rcode, question = error.rcode or t.FORMERR, error.question
    qid, flags = HEADER.unpack_from(wire)[:2]
    keep = flags & (OPCODE | RD | CD | AD) if rcode == t.NOTIMP else flags & (RD | CD | AD)
    return HEADER.pack(qid, QR | keep | rcode, 1 if question else 0, 0, 0, 0) + question


# --- replies out --------------------------------------------------------------------------


def render_reply(query: Query, reply: Reply) -> bytes:
    """Return the octets of `reply` to `query`, no more than query.limit of them.

    As CoreDNS (reference 1.15): uncompressed while that fits; else compressed; else whole
    records dropped from the end with TC set. The question and OPT are always kept, but why the
    answer is what it is (reply.ede) goes before any record does.
    """
    if reply.ede is None or query.edns is None:
        return _render(query, reply, None)
    if not reply.flags & TC:
        wire = _render(query, reply, reply.ede)
        if not wire[2] & TC >> 8 and len(wire) <= query.limit:
            return wire
    return _render(query, reply, None)


def _render(query: Query, reply: Reply, ede: Ede | None) -> bytes:
    # RFC 6891 s6.1.3: an extended rcode needs OPT; without one the low bits remain.
    opt = _render_opt(query.edns, reply, ede) if query.edns is not None else b""
    flags = query.flags
    head = QR | (flags & OPCODE) | (reply.flags & (AA | TC | RA | AD)) | (reply.rcode & 15)
    if not flags & OPCODE:
        head |= flags & (RD | CD)  # RFC 1035 s4.1.1, RFC 4035 s3.2.2
    if reply.flags > 0xFFFF:
        head = head | RD if reply.flags & SET_RD else head & ~RD
    question = query.name + _QTAIL.pack(query.qtype, query.qclass)
    answer, authority, additional = reply.answer, reply.authority, reply.additional
    extra = len(additional) + 1 if opt else len(additional)
    parts = [HEADER.pack(query.id, head, 1, len(answer), len(authority), extra), question]
    for rr in answer:
        parts.append(rr.name)
        parts.append(rr._tail or rr.tail)
    for rr in authority:
        parts.append(rr.name)
        parts.append(rr._tail or rr.tail)
    for rr in additional:
        parts.append(rr.name)
        parts.append(rr._tail or rr.tail)
    parts.append(opt)
    wire = b"".join(parts)
    size, limit = len(wire), query.limit
    if size <= limit and (size <= FRAGMENT_V6 or not _fragments(query, size)):
        return wire
    return _render_compressed(query.id, head, question, reply, opt, limit)


def reply_size(query: Query, reply: Reply) -> int:
    """Return the octets of `reply` before compression and truncation: what CoreDNS logs and
    counts as the size of a response. OPT is part of it only where the reply brought its own.
    """
    size = 16 + len(query.name)
    for rr in reply.answer:
        size += 10 + len(rr.name) + len(rr.rdata)
    for rr in reply.authority:
        size += 10 + len(rr.name) + len(rr.rdata)
    for rr in reply.additional:
        size += 10 + len(rr.name) + len(rr.rdata)
    if reply.edns is not None:
        size += 11
        for _, option in reply.edns.options:
            size += 4 + len(option)
    return size


def is_cut(query: Query, reply: Reply) -> bool:
    """True if render_reply has to leave out records of `reply` and sets TC."""
    # The query's own size is no less than that of the OPT to come.
    if reply_size(query, reply) + query.size <= query.limit:
        return False
    return bool(render_reply(query, reply)[2] & TC >> 8)


def _fragments(query: Query, size: int) -> bool:
    if query.proto != "udp":
        return False
    return size > (FRAGMENT_V6 if ":" in query.client[0] else FRAGMENT_V4)


def _render_opt(asked: Edns, reply: Reply, ede: Ede | None) -> bytes:
    """Return the OPT record to send to who sent `asked`."""
    rcode = reply.rcode
    if rcode == t.BADVERS:
        # Whatever a version says that is not known here is not sent back.
        return b"\x00" + _FIXED.pack(t.OPT, 0, rcode >> 4 << 24, 0)
    if reply.edns is not None:
        options: Sequence[tuple[int, bytes]] = reply.edns.options
    elif asked.options:
        options = [o for o in asked.options if o[0] in ECHOED_OPTIONS]
    else:
        options = ()
    if ede is not None:
        # In place of one that a plugin wrote itself without saying more (`acl`).
        why = render_ede(ede)
        options = [*[o for o in options if o[0] != OPTION], why] if options else (why,)
    rdata = b""
    for code, data in options:
        rdata += _QTAIL.pack(code, len(data)) + data
    ttl = ((rcode >> 4) << 24) | (0x8000 if asked.do else 0)
    return b"\x00" + _FIXED.pack(t.OPT, asked.size, ttl, len(rdata)) + rdata


def _render_compressed(
    qid: int, head: int, question: bytes, reply: Reply, opt: bytes, limit: int
) -> bytes:
    out = bytearray(HEADER.size) + question
    seen: dict[bytes, int] = {}
    _remember(seen, question[:-4], 12)
    room = limit - len(opt)
    counts = [0, 0, 0]
    full = False
    for n, section in enumerate((reply.answer, reply.authority, reply.additional)):
        if full:
            head |= TC if section else 0
            continue
        for rr in section:
            mark = len(out)
            _put_rr(out, seen, rr)
            if len(out) > room:
                del out[mark:]
                head |= TC
                full = True
                break
            counts[n] += 1
    HEADER.pack_into(out, 0, qid, head, 1, counts[0], counts[1], counts[2] + (1 if opt else 0))
    return bytes(out + opt)


def _remember(seen: dict[bytes, int], name: bytes, at: int) -> None:
    i = 0
    while i < len(name) and name[i]:
        if at + i >= 0x4000:
            return
        seen.setdefault(name[i:], at + i)
        i += name[i] + 1


def _put_name(out: bytearray, seen: dict[bytes, int], name: bytes) -> None:
    i = 0
    while name[i]:
        # miekg/dns compresses case-sensitively; so the case of each name survives.
        target = seen.get(name[i:])
        if target is not None:
            out += _U16.pack(0xC000 | target)
            return
        at = len(out)
        if at < 0x4000:
            seen[name[i:]] = at
        out += name[i : i + name[i] + 1]
        i += name[i] + 1
    out.append(0)


# Where names stand in rdata. Compressible: only types of RFC 1035 (RFC 3597 s4).
_NAME_AT_START = frozenset((t.NS, 3, 4, t.CNAME, 7, 8, 9, t.PTR))
_LAYOUT: dict[int, str] = {
    **dict.fromkeys(_NAME_AT_START, "n"),
    t.SOA: "nn20", 14: "nn", t.MX: "2n", 17: "nn", 18: "2n", 21: "2n", 26: "2nn", 24: "18n*",
    t.SRV: "6n", 36: "2n", t.DNAME: "n", t.NAPTR: "4sssn", t.RRSIG: "18n*", t.NSEC: "n*",
}  # fmt: skip
# Of each layout: a name, a string, the rest, or so many octets.
_STEPS: dict[int, list[str]] = {
    rtype: re.findall(r"\d+|\D", layout) for rtype, layout in _LAYOUT.items()
}
# Where the rdata of other types holds a name. It is written whole, but names after it may
# point at it (miekg/dns; so the glue of an SRV record costs two octets).
_PLAIN_NAME = {
    t.SRV: 6, t.DNAME: 0, t.NSEC: 0, t.RRSIG: 18, 17: 0, 18: 2, 21: 2, 36: 2,
}  # fmt: skip


def _put_rr(out: bytearray, seen: dict[bytes, int], rr: RR) -> None:
    _put_name(out, seen, rr.name)
    rtype = rr.type
    if rtype not in _NAME_AT_START and rtype != t.SOA and rtype != t.MX and rtype != 14:
        at = _PLAIN_NAME.get(rtype)
        if at is not None:
            _remember(seen, rr.rdata[at:], len(out) + 10 + at)
        out += rr.tail
        return
    out += rr.tail[:10]
    start = len(out)
    rdata = rr.rdata
    i = 0
    if rtype == t.MX:
        out += rdata[:2]
        i = 2
    for _ in range(2 if rtype in (t.SOA, 14) else 1):
        end = _skip_name(rdata, i)
        _put_name(out, seen, rdata[i:end])
        i = end
    out += rdata[i:]
    _U16.pack_into(out, start - 2, len(out) - start)


# --- whole messages in (upstream answers, clients) ----------------------------------------


class Message:
    """A parsed message: header word, question, sections without OPT, and OPT."""

    __slots__ = ("additional", "answer", "authority", "edns", "flags", "id", "question", "rcode")

    def __init__(self, id: int, flags: int, question: tuple[bytes, int, int] | None) -> None:
        self.id = id
        self.flags = flags
        self.rcode = flags & 15
        self.question = question
        self.answer: list[RR] = []
        self.authority: list[RR] = []
        self.additional: list[RR] = []
        self.edns: Edns | None = None


def parse_message(wire: bytes) -> Message:
    """Return the message in `wire`, names uncompressed.

    Cost is bounded by the length of `wire`: pointers only go backwards and each target is
    read once. Raises WireError(FORMERR).
    """
    if len(wire) < 12:
        raise WireError(t.FORMERR, "shorter than a header")
    qid, flags, qd, an, ns, ar = HEADER.unpack_from(wire)
    if qd > 1:
        raise WireError(t.FORMERR, "more than one question")
    names: dict[int, bytes] = {}
    at = 12
    question = None
    if qd:
        name, at = _read_name(wire, at, names)
        if at + 4 > len(wire):
            raise WireError(t.FORMERR, "question cut short")
        qtype, qclass = _QTAIL.unpack_from(wire, at)
        question = (name, qtype, qclass)
        at += 4
    message = Message(qid, flags, question)
    for count, section in (
        (an, message.answer),
        (ns, message.authority),
        (ar, message.additional),
    ):
        for _ in range(count):
            name, at = _read_name(wire, at, names)
            if at + 10 > len(wire):
                raise WireError(t.FORMERR, "record cut short")
            rtype, cls, ttl, rdlength = _FIXED.unpack_from(wire, at)
            at += 10
            end = at + rdlength
            if end > len(wire):
                raise WireError(t.FORMERR, "rdata cut short")
            if rtype == t.OPT:
                message.edns = _parse_opt(wire[at:end], cls, ttl)
                message.rcode = (flags & 15) | (ttl >> 24) << 4
            else:
                # RFC 2181 s8: a TTL with the top bit set is taken as zero.
                section.append(
                    RR(name, rtype, ttl if ttl < 1 << 31 else 0,
                       _read_rdata(wire, at, end, rtype, names), cls)
                )  # fmt: skip
            at = end
    return message


def _read_name(wire: bytes, at: int, names: dict[int, bytes]) -> tuple[bytes, int]:
    start = at
    try:
        while 0 < (label := wire[at]) < 64:
            at += label + 1
        if not label:
            at += 1
            name = wire[start:at]
        elif label >= 0xC0:
            target = (label & 0x3F) << 8 | wire[at + 1]
            if target >= start:
                raise WireError(t.FORMERR, "pointer not backwards")
            tail = names.get(target)
            if tail is None:
                tail, _ = _follow(wire, target, names)
            name = wire[start:at] + tail
            at += 2
        else:
            raise WireError(t.FORMERR, "bad label")
    except IndexError:
        raise WireError(t.FORMERR, "name cut short") from None
    if len(name) > 255:
        raise WireError(t.FORMERR, "name too long")
    names[start] = name
    return name, at


MAX_POINTERS = 128  # a name has at most 127 labels, so more pointers say nothing new


def _follow(wire: bytes, at: int, names: dict[int, bytes]) -> tuple[bytes, int]:
    """Read the name at a pointer's target without recursion."""
    parts: list[bytes] = []
    start = at
    hops = 0
    while True:
        label = wire[at]
        if label == 0:
            parts.append(b"\x00")
            break
        if label >= 0xC0:
            target = (label & 0x3F) << 8 | wire[at + 1]
            hops += 1
            if target >= at or hops > MAX_POINTERS:
                raise WireError(t.FORMERR, "pointer loop")
            known = names.get(target)
            if known is not None:
                parts.append(known)
                break
            at = target
            continue
        if label > 63:
            raise WireError(t.FORMERR, "bad label")
        parts.append(wire[at : at + label + 1])
        at += label + 1
        if len(parts) > MAX_POINTERS:
            raise WireError(t.FORMERR, "name too long")
    name = b"".join(parts)
    names[start] = name
    return name, at


def _read_rdata(wire: bytes, at: int, end: int, rtype: int, names: dict[int, bytes]) -> bytes:
    steps = _STEPS.get(rtype)
    if steps is None:
        return wire[at:end]
    out: list[bytes] = []
    for step in steps:
        if step == "n":
            name, at = _read_name(wire, at, names)
            out.append(name)
        elif step == "s":
            size = wire[at] + 1 if at < end else 1
            out.append(wire[at : at + size])
            at += size
        elif step == "*":
            out.append(wire[at:end])
            at = end
        else:
            out.append(wire[at : at + int(step)])
            at += int(step)
    if at != end:
        raise WireError(t.FORMERR, "rdata of the wrong length")
    return b"".join(out)


def render_query(
    qid: int, name: bytes, qtype: int, qclass: int = t.IN, *, flags: int = RD,
    edns: Edns | None = None,
) -> bytes:  # fmt: skip
    """Return the octets of a query to send to another server."""
    opt = b""
    if edns is not None:
        rdata = b"".join([_QTAIL.pack(c, len(d)) + d for c, d in edns.options])
        ttl = (edns.version << 16) | (0x8000 if edns.do else 0)
        opt = b"\x00" + _FIXED.pack(t.OPT, edns.size, ttl, len(rdata)) + rdata
    head = HEADER.pack(qid, flags & ~QR, 1, 0, 0, 1 if opt else 0)
    return head + name + _QTAIL.pack(qtype, qclass) + opt
