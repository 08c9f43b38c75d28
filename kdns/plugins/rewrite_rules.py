"""What the rules of `rewrite` do to a query and to its reply.

A rule that fires makes a changed query, and leaves in it what shall be done to the reply.
How rules are written is rewrite.py's business, and so is their order.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from struct import pack
from typing import TypeAlias

from kdns.dns import types as t
from kdns.dns.goregexp import Pattern
from kdns.dns.message import RR, TC, Edns, Query, Reply
from kdns.dns.name import BadName, is_subdomain, parse_name, render_name

NSID, SUBNET = 3, 8  # EDNS options: RFC 5001, RFC 7871
EDNS_SIZE = 4096  # of the OPT record put into a query without one, as CoreDNS


class Rewritten(Query):
    """A query as the plugins below see it.

    text    -- its name as text, lower-case
    answers -- what to do to the reply, last first
    """

    __slots__ = ("answers", "text")

    text: str
    answers: list[AnswerRule]

    @classmethod
    def of(cls, query: Query, text: str) -> Rewritten:
        """Return `query` itself if it is a rewritten one, else a copy that can be changed."""
        if isinstance(query, Rewritten):
            return query
        q = cls.__new__(cls)
        for slot in Query.__slots__:
            setattr(q, slot, getattr(query, slot))
        q.text = text
        q.answers = []
        return q

    def rename(self, text: str) -> None:
        """Ask for another name; raises BadName."""
        self.name = parse_name(text)
        self.key = self.name.lower()
        self.text = render_name(self.key)


# --- names --------------------------------------------------------------------------------

# A name's text to its new text; None if it is not meant.
Renaming: TypeAlias = Callable[[str], "str | None"]
# A name to its new name, both wire form.
NameMap: TypeAlias = Callable[[bytes], bytes]


def fill_groups(groups: Sequence[str], template: str) -> str:
    """Return `template` with each {n} replaced by group n."""
    for n, group in enumerate(groups):
        template = template.replace(f"{{{n}}}", group)
    return template


def renaming(kind: str, given: str, to: str, pattern: Pattern | None = None) -> Renaming:
    """Return how a name that matches `given` as `kind` says is changed."""
    match kind:
        case "exact":
            return lambda text: to if text == given else None
        case "prefix":
            return lambda text: to + text[len(given) :] if text.startswith(given) else None
        case "suffix":
            return lambda text: text[: -len(given)] + to if text.endswith(given) else None
        case "substring":
            return lambda text: text.replace(given, to) if given in text else None
    assert pattern is not None

    def by_pattern(text: str) -> str | None:
        groups = pattern.search(text)
        return None if groups is None else fill_groups(groups, to)

    return by_pattern


def map_text(change: Renaming) -> NameMap:
    """Return the map of wire names that changes their text; a result that is no name leaves
    the name as it is."""

    def change_name(name: bytes) -> bytes:
        new = change(render_name(name))
        if new is None:
            return name
        try:
            return parse_name(new)
        except BadName:
            return name

    return change_name


class Undo:
    """Maps the rewritten name, and what lies below it, back to what was asked for."""

    __slots__ = ("asked", "rewritten")

    def __init__(self, rewritten: bytes, asked: bytes) -> None:
        self.rewritten = rewritten
        self.asked = asked

    def __call__(self, name: bytes) -> bytes:
        key = name.lower()
        if key == self.rewritten:
            return self.asked
        if not is_subdomain(key, self.rewritten):
            return name
        new = name[: len(name) - len(self.rewritten)] + self.asked
        return new if len(new) <= 255 else name


# --- what is done to replies --------------------------------------------------------------


class AnswerRule:
    """A change of the reply to a query that a rule has fired for."""

    __slots__ = ()

    def apply(self, reply: Reply) -> None:
        """Change `reply`, whose records are shared and so are replaced."""
        raise NotImplementedError


def _replace_records(reply: Reply, change: Callable[[RR], RR]) -> None:
    reply.answer = [change(rr) for rr in reply.answer]
    reply.authority = [change(rr) for rr in reply.authority]
    reply.additional = [change(rr) for rr in reply.additional]


class OwnerAnswer(AnswerRule):
    __slots__ = ("names",)

    def __init__(self, names: NameMap) -> None:
        self.names = names

    def apply(self, reply: Reply) -> None:
        seen: dict[bytes, bytes] = {}

        def change(rr: RR) -> RR:
            new = seen.get(rr.name)
            if new is None:
                new = seen[rr.name] = self.names(rr.name)
            return rr if new == rr.name else rr.owned_by(new)

        _replace_records(reply, change)


# Types whose rdata holds a name that `answer value` changes, and where it stands.
_NAME_AT = {t.CNAME: 0, t.NS: 0, t.DNAME: 0, t.PTR: 0, t.SOA: 0, t.MX: 2, t.SRV: 6}


def _name_span(rr: RR) -> tuple[int, int] | None:
    """Return where the name in the rdata begins and ends."""
    rdata = rr.rdata
    start = _NAME_AT.get(rr.type)
    if rr.type == t.NAPTR:
        start = 4
        for _ in range(3):  # flags, service, regexp: RFC 3403 s4.1
            start += rdata[start] + 1
    if start is None:
        return None
    end = start
    while rdata[end]:
        end += rdata[end] + 1
    return start, end + 1


class ValueAnswer(AnswerRule):
    __slots__ = ("names",)

    def __init__(self, names: NameMap) -> None:
        self.names = names

    def apply(self, reply: Reply) -> None:
        def change(rr: RR) -> RR:
            span = _name_span(rr)
            if span is None:
                return rr
            start, end = span
            name = rr.rdata[start:end]
            new = self.names(name)
            if new == name:
                return rr
            return RR(rr.name, rr.type, rr.ttl, rr.rdata[:start] + new + rr.rdata[end:], rr.cls)

        _replace_records(reply, change)


class TtlAnswer(AnswerRule):
    __slots__ = ("high", "low")

    def __init__(self, low: int, high: int) -> None:
        self.low = low
        self.high = high

    def apply(self, reply: Reply) -> None:
        low, high = self.low, self.high
        reply.lease = None  # what becomes of the TTL of a second later is another matter
        _replace_records(reply, lambda rr: rr.with_ttl(min(max(rr.ttl, low), high)))


class RcodeAnswer(AnswerRule):
    __slots__ = ("new", "old")

    def __init__(self, old: int, new: int) -> None:
        self.old = old
        self.new = new

    def apply(self, reply: Reply) -> None:
        if reply.rcode == self.old:
            reply.rcode = self.new


class EdnsAnswer(AnswerRule):
    """Puts back an option as it was in the query: data None means it was not there."""

    __slots__ = ("code", "old")

    def __init__(self, code: int, old: bytes | None) -> None:
        self.code = code
        self.old = old

    def apply(self, reply: Reply) -> None:
        edns = reply.edns
        if edns is None:
            return
        options = list(edns.options)
        for n, (code, _) in enumerate(options):
            if code == self.code:
                options[n : n + 1] = [] if self.old is None else [(code, self.old)]
                reply.edns = Edns(edns.size, edns.do, edns.version, options)
                return


class CnameAnswer(AnswerRule):
    """Leads a CNAME elsewhere. The new target has to be looked up, so this is done by
    `target`, a look-up and `graft` in place of `apply`."""

    __slots__ = ("change",)

    def __init__(self, change: Renaming) -> None:
        self.change = change

    def target(self, reply: Reply) -> tuple[int, bytes] | None:
        """Return the place of the first CNAME in the answer that is meant, and its new target."""
        for n, rr in enumerate(reply.answer):
            if rr.type == t.CNAME:
                new = self.change(render_name(rr.rdata.lower()))
                if new is not None:
                    try:
                        return n, parse_name(new)
                    except BadName:
                        return None
        return None

    def graft(self, reply: Reply, at: int, target: bytes, found: Reply) -> None:
        """Replace what follows the CNAME at place `at` by the answer found for its new target."""
        old = reply.answer[at]
        before = [rr for rr in reply.answer[:at] if rr.type == t.CNAME]
        cname = RR(old.name, t.CNAME, old.ttl, target, old.cls)
        reply.answer = [*before, cname, *found.answer]
        # Of a truncated answer the client must know, or half of it is cached.
        reply.flags = (reply.flags & ~TC) | (found.flags & TC)
        # It is made from two replies; neither's conditions alone say how long it holds.
        reply.keep = 0


# --- rules --------------------------------------------------------------------------------


class Rule:
    """stop -- no rule after this one is tried if it fired."""

    __slots__ = ("stop",)

    def __init__(self, stop: bool) -> None:
        self.stop = stop

    def apply(self, query: Query, text: str) -> Rewritten | None:
        """Return the changed query, None if the rule does not fire; text is the name of the
        query, lower-case. Raises BadName if the new name is none."""
        raise NotImplementedError


class NameRule(Rule):
    """undo -- what was asked for is put back wherever the new name stands in the reply."""

    __slots__ = ("answers", "change", "undo")

    def __init__(
        self, stop: bool, change: Renaming, undo: bool, answers: Sequence[AnswerRule]
    ) -> None:
        super().__init__(stop)
        self.change = change
        self.undo = undo
        self.answers = tuple(answers)

    def apply(self, query: Query, text: str) -> Rewritten | None:
        new = self.change(text)
        if new is None:
            return None
        asked = query.key
        q = Rewritten.of(query, text)
        q.rename(new)
        if self.undo:
            back = Undo(q.key, asked)
            q.answers += (OwnerAnswer(back), ValueAnswer(back))
        q.answers += self.answers
        return q


class TypeRule(Rule):
    __slots__ = ("new", "old")

    def __init__(self, stop: bool, old: int, new: int) -> None:
        super().__init__(stop)
        self.old = old
        self.new = new

    def apply(self, query: Query, text: str) -> Rewritten | None:
        if query.qtype != self.old:
            return None
        q = Rewritten.of(query, text)
        q.qtype = self.new
        return q


class ClassRule(TypeRule):
    __slots__ = ()

    def apply(self, query: Query, text: str) -> Rewritten | None:
        if query.qclass != self.old:
            return None
        q = Rewritten.of(query, text)
        q.qclass = self.new
        return q


class ReplyRule(Rule):
    """Changes only the reply: ttl and rcode for names that match, cname for all."""

    __slots__ = ("answer", "matches")

    def __init__(self, stop: bool, matches: Callable[[str], bool], answer: AnswerRule) -> None:
        super().__init__(stop)
        self.matches = matches
        self.answer = answer

    def apply(self, query: Query, text: str) -> Rewritten | None:
        if not self.matches(text):
            return None
        q = Rewritten.of(query, text)
        q.answers.append(self.answer)
        return q


# What an EDNS option is filled with; None: the rule does not fire.
OptionContent: TypeAlias = Callable[[Query], "bytes | None"]


class EdnsRule(Rule):
    """action: set, append, replace or unset the option `code`; revert hides it from replies."""

    __slots__ = ("action", "code", "content", "revert")

    def __init__(
        self, stop: bool, action: str, code: int, content: OptionContent, revert: bool
    ) -> None:
        super().__init__(stop)
        self.action = action
        self.code = code
        self.content = content
        self.revert = revert

    def apply(self, query: Query, text: str) -> Rewritten | None:
        edns = query.edns or Edns(EDNS_SIZE)
        options = list(edns.options)
        old: bytes | None = None
        if self.action == "unset":
            options = [option for option in options if option[0] != self.code]
        else:
            content = self.content(query)
            if content is None:
                return None
            place = next((n for n, o in enumerate(options) if o[0] == self.code), None)
            if place is None:
                if self.action == "replace":
                    return None
                options.append((self.code, content))
            elif self.action == "append":
                return None
            else:
                old = options[place][1]
                options[place] = (self.code, content)
        q = Rewritten.of(query, text)
        q.edns = Edns(edns.size, edns.do, edns.version, options)
        if self.revert:
            q.answers.append(EdnsAnswer(self.code, old))
        return q


def client_address(query: Query) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return who asks; an IPv4 client of an IPv6 socket as IPv4."""
    address = ipaddress.ip_address(query.client[0])
    return getattr(address, "ipv4_mapped", None) or address


def subnet_of(query: Query, v4_bits: int, v6_bits: int) -> bytes:
    """Return the client's network as an EDNS Client Subnet option (RFC 7871 s6)."""
    address = client_address(query)
    bits = v4_bits if address.version == 4 else v6_bits
    network = ipaddress.ip_network((address.packed, bits), strict=False)
    # "padded with 0 bits to an octet boundary": no more octets than the prefix needs.
    octets = network.network_address.packed[: (bits + 7) // 8]
    return pack("!HBB", 1 if address.version == 4 else 2, bits, 0) + octets
