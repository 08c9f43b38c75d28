"""A zone from a file, compiled: what it answers to a name and a type (RFC 1034 s4.3.2).

Decides answers, referrals, wildcards, DNAMEs, NODATA and NXDOMAIN from the zone alone. A CNAME
that leaves the zone is reported (Found.target) and asked for by the plugin. Where CoreDNS's
`file` differs from an RFC in what a client sees, CoreDNS is followed and the line says so.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from kdns.dns import types as t
from kdns.dns.message import RR
from kdns.dns.name import MAX_NAME, is_subdomain, labels_of, parent

MAX_ALIASES = 10  # CNAMEs followed inside the zone for one question, as CoreDNS
YXDOMAIN = 6  # RFC 6672 s2.2: the name a DNAME makes is too long

_STAR = b"\x01*"
# Where the target name starts in the rdata of types whose addresses go along (RFC 2782, 9460).
_TARGET_AT = {t.MX: 2, t.SRV: 6, t.SVCB: 2, t.HTTPS: 2}

_APEX_ONLY = {t.SOA, t.NS, t.RRSIG}

Canonical = tuple[bytes, ...]


def canonical(key: bytes) -> Canonical:
    """Return what sorts names in the order of RFC 4034 s6.1."""
    return tuple(reversed(labels_of(key)))


def _name_at(rdata: bytes, at: int) -> bytes:
    """Return the name that starts at an offset; of malformed rdata, what there is."""
    end = at
    while size := rdata[end : end + 1]:
        if size == b"\0":
            return rdata[at : end + 1]
        end += size[0] + 1
    return rdata[at:]


class Found:
    """What a zone has to say to one question.

    aa      -- authoritative: not a mere referral
    missing -- nothing is at the name: NXDOMAIN, or an empty non-terminal
    target  -- the name out of the zone that the last CNAME leads to, or None
    """

    __slots__ = ("aa", "additional", "answer", "authority", "missing", "rcode", "target")

    def __init__(
        self,
        answer: list[RR],
        authority: list[RR],
        additional: list[RR] | None = None,
        *,
        rcode: int = t.NOERROR,
        aa: bool = True,
        missing: bool = False,
        target: bytes | None = None,
    ) -> None:
        self.answer = answer
        self.authority = authority
        self.additional = [] if additional is None else additional
        self.rcode = rcode
        self.aa = aa
        self.missing = missing
        self.target = target


class _Node:
    """An owner name; without records it is an empty non-terminal (RFC 4592 s2.2.2).

    above -- the highest delegation or DNAME owner above this name, or None
    """

    __slots__ = ("above", "key", "rrsets", "signatures")

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.rrsets: dict[int, list[RR]] = {}
        self.signatures: dict[int, list[RR]] = {}
        self.above: _Node | None = None


class Zone:
    """One zone's records, ready to answer. Not changed after it is made.

    origin  -- lower-case wire name
    records -- in the zone, with one SOA at the apex (zonefile.parse_zone sees to that)
    """

    def __init__(self, origin: bytes, records: Sequence[RR]) -> None:
        self.origin = origin
        self._nodes: dict[bytes, _Node] = {origin: _Node(origin)}
        self._apex = self._nodes[origin]
        self._fill(records)
        self._link()
        self.soa = self._apex.rrsets[t.SOA][0]
        self.serial = int.from_bytes(self.soa.rdata[-20:-16], "big")
        self._denials = sorted(
            (canonical(node.key), node.key)
            for node in self._nodes.values()
            if t.NSEC in node.rrsets
        )

    def _fill(self, records: Sequence[RR]) -> None:
        nodes = self._nodes
        seen: set[tuple[bytes, int, bytes]] = set()
        for rr in records:
            key = rr.name.lower()
            if (key, rr.type, rr.rdata) in seen:
                continue  # RFC 2181 s5: an RRset has no two equal records
            seen.add((key, rr.type, rr.rdata))
            node = nodes.get(key)
            if node is None:
                node = nodes[key] = _Node(key)
                above = parent(key)
                while above not in nodes:
                    nodes[above] = _Node(above)
                    above = parent(above)
            rr = rr if rr.name == key else rr.owned_by(key)  # lower-case owners, as CoreDNS
            node.rrsets.setdefault(rr.type, []).append(rr)
            if rr.type == t.RRSIG:
                covered = int.from_bytes(rr.rdata[:2], "big")
                node.signatures.setdefault(covered, []).append(rr)

    def _link(self) -> None:
        """Tell each node below a delegation or a DNAME of it; parents are shorter names."""
        nodes = self._nodes
        if not any(self._cuts_below(node) for node in nodes.values()):
            return
        for key in sorted(nodes, key=len):
            if key != self.origin:
                over = nodes[parent(key)]
                nodes[key].above = over.above or (over if self._cuts_below(over) else None)

    def _cuts_below(self, node: _Node) -> bool:
        return t.DNAME in node.rrsets or self._delegates(node)

    def _delegates(self, node: _Node) -> bool:
        return t.NS in node.rrsets and node is not self._apex

    # --- lookup -----------------------------------------------------------------------

    def lookup(self, key: bytes, qtype: int, do: bool = False) -> Found:
        """Answer a question for a lower-case name in this zone.

        do -- the asker wants signatures and proofs too (RFC 4035 s3.1), if there are any.
        """
        answer: list[RR] = []
        asked = {key}
        while True:
            node = self._nodes.get(key)
            encloser = self._encloser(key) if node is None else node
            cut = encloser.above
            if (
                cut is None
                and self._cuts_below(encloser)
                and (node is None or (self._delegates(node) and qtype != t.DS))
            ):  # RFC 4035 s3.1.4.1: DS belongs to the parent's side
                cut = encloser
            if cut is not None and t.DNAME in cut.rrsets and cut is not node:
                alias = self._substitute(cut, key, answer, do)
                if isinstance(alias, Found):
                    return alias
            elif cut is not None:
                return self._referral(cut, answer, do)
            else:
                source = node or self._nodes.get(_STAR + encloser.key)
                if source is None:
                    return self._missing(key, encloser, answer, do)
                aliases = source.rrsets.get(t.CNAME)
                if aliases is None or qtype == t.CNAME:
                    return self._at(source, key, node is None, qtype, answer, do)
                alias = aliases[0] if node is not None else aliases[0].owned_by(key)
                answer.append(alias)
                self._sign(answer, source, t.CNAME, key, do)
            if qtype == t.CNAME:
                return self._positive(answer, do)
            target = alias.rdata.lower()
            if not is_subdomain(target, self.origin):
                found = self._positive(answer, do)
                found.target = alias.rdata
                return found
            if target in asked or len(asked) >= MAX_ALIASES:
                return self._positive(answer, do)
            asked.add(target)
            key = target

    def _encloser(self, key: bytes) -> _Node:
        """RFC 4592 s3.3.1: the longest existing ancestor; an empty non-terminal exists."""
        nodes = self._nodes
        while True:
            key = parent(key)
            node = nodes.get(key)
            if node is not None:
                return node

    def _at(
        self, source: _Node, key: bytes, synthesized: bool, qtype: int, answer: list[RR], do: bool
    ) -> Found:
        """Answer from a node that is neither an alias nor cut off."""
        rrset = source.rrsets.get(qtype)
        if rrset is None:
            return self._nodata(source, key, synthesized, qtype, answer, do)
        if source is self._apex and not answer and qtype == t.NS:
            return Found(self._signed(source, t.NS, do), [], self._glue(rrset, do))
        answer += [rr.owned_by(key) for rr in rrset] if synthesized else rrset
        self._sign(answer, source, qtype, key, do)
        found = self._positive(answer, do)
        if synthesized and do:
            found.authority += self._proof(key)
        return found

    def _nodata(
        self, source: _Node, key: bytes, synthesized: bool, qtype: int, answer: list[RR], do: bool
    ) -> Found:
        # CoreDNS: an apex with nothing but SOA and NS counts as a name without records.
        bare = not (source.rrsets.keys() - _APEX_ONLY if source is self._apex else source.rrsets)
        aliases = sum(rr.type == t.CNAME for rr in answer)
        if answer and not bare and not synthesized and not (qtype == t.NS and aliases == 1):
            # CoreDNS: behind a CNAME in the zone NODATA has NS, not SOA (RFC 2308 s2.2 has SOA);
            # for the NS of what one CNAME leads to it has SOA.
            return self._positive(answer, do)
        authority = self._signed(self._apex, t.SOA, do)
        if do:
            authority += self._signed(source, t.NSEC, do)
            if synthesized or not source.rrsets:
                authority += [rr for rr in self._proof(key) if rr not in authority]
        return Found(answer, authority, missing=bare and not synthesized)

    def _missing(self, key: bytes, encloser: _Node, answer: list[RR], do: bool) -> Found:
        # CoreDNS sends the SOA with its own TTL; RFC 2308 s3 would lower it to the minimum.
        authority = self._signed(self._apex, t.SOA, do)
        if do:
            proof = self._proof(key)
            authority += proof
            authority += [rr for rr in self._proof(_STAR + encloser.key) if rr not in proof]
        return Found(answer, authority, rcode=t.NXDOMAIN, missing=True)

    def _referral(self, cut: _Node, answer: list[RR], do: bool) -> Found:
        servers = cut.rrsets[t.NS]
        authority = list(servers)
        if do:
            authority += self._signed(cut, t.DS if t.DS in cut.rrsets else t.NSEC, do)
        # With a CNAME in front the answer is authoritative for the question's own name.
        return Found(answer, authority, self._glue(servers, do), aa=bool(answer))

    def _substitute(self, cut: _Node, key: bytes, answer: list[RR], do: bool) -> RR | Found:
        """RFC 6672 s3.1: put the DNAME and a CNAME made from it into the answer; return that
        CNAME, or what to answer instead."""
        dname = cut.rrsets[t.DNAME][0]
        target = key[: len(key) - len(cut.key)] + dname.rdata
        if target.lower() == key:
            return Found([], [], rcode=t.SERVFAIL, aa=False)
        if dname not in answer:
            answer += self._signed(cut, t.DNAME, do)
        if len(target) > MAX_NAME:
            return Found(answer, self._signed(self._apex, t.NS, do), rcode=YXDOMAIN)
        alias = RR(key, t.CNAME, dname.ttl, target)
        answer.append(alias)
        return alias

    # --- sections ---------------------------------------------------------------------

    def _positive(self, answer: list[RR], do: bool) -> Found:
        # CoreDNS: the apex NS go along with every positive answer.
        return Found(answer, self.servers(do), self.addresses(answer, do))

    def servers(self, do: bool) -> list[RR]:
        """Return the apex NS records."""
        return self._signed(self._apex, t.NS, do)

    def start(self, do: bool) -> list[RR]:
        """Return the SOA as it goes into negative answers."""
        return self._signed(self._apex, t.SOA, do)

    def addresses(self, answer: Sequence[RR], do: bool) -> list[RR]:
        """Return the addresses, known here, of the targets that an answer names."""
        out: list[RR] = []
        done: set[bytes] = set()
        for rr in answer:
            at = _TARGET_AT.get(rr.type)
            if at is not None:
                self._add_addresses(out, done, _name_at(rr.rdata, at), do)
        return out

    def _glue(self, servers: Sequence[RR], do: bool) -> list[RR]:
        """As CoreDNS: only of name servers below the name they serve."""
        out: list[RR] = []
        done: set[bytes] = set()
        for rr in servers:
            if is_subdomain(rr.rdata.lower(), rr.name):
                self._add_addresses(out, done, rr.rdata, do)
        return out

    def _add_addresses(self, out: list[RR], done: set[bytes], target: bytes, do: bool) -> None:
        key = target.lower()
        node = self._nodes.get(key)
        if node is None or key in done:
            return
        done.add(key)
        out += self._signed(node, t.A, do)
        out += self._signed(node, t.AAAA, do)

    def _signed(self, node: _Node, type: int, do: bool) -> list[RR]:
        out = list(node.rrsets.get(type, ()))
        if do:
            out += node.signatures.get(type, ())
        return out

    def _sign(self, out: list[RR], source: _Node, type: int, key: bytes, do: bool) -> None:
        """Append a node's signatures over one type, under the name that was asked for."""
        if do and type != t.RRSIG:
            out += [rr.owned_by(key) for rr in source.signatures.get(type, ())]

    def _proof(self, key: bytes) -> list[RR]:
        """Return the NSEC record whose span holds `key`, with its signatures."""
        if not self._denials:
            return []
        at = bisect_left(self._denials, (canonical(key), key)) - 1
        return self._signed(self._nodes[self._denials[at][1]], t.NSEC, True)

    # --- everything -------------------------------------------------------------------

    def records(self) -> Iterator[RR]:
        """Yield the zone as a transfer sends it: SOA, NS, the rest in order, SOA (RFC 5936
        s2.2)."""
        first = (t.SOA, t.NS)
        for type in first:
            yield from self._signed(self._apex, type, True)
        for key in sorted(self._nodes, key=canonical):
            node = self._nodes[key]
            for type, rrset in node.rrsets.items():
                if node is not self._apex:
                    yield from rrset
                elif type == t.RRSIG:
                    yield from [
                        rr for rr in rrset if int.from_bytes(rr.rdata[:2], "big") not in first
                    ]
                elif type not in first:
                    yield from rrset
        yield self.soa
