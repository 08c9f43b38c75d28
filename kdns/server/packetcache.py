"""Ready-made answers: from the octets of a question to the octets of its answer.

Stands before the chain for one listener and address family (docs/DESIGN.md 1.3 point 2).
Decides only how long a reply may be sent again and forgets it when a zone node it was made
from changes; that it may be repeated at all, and what must be counted, logged and put in
another order each time, is said by the Reply itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from typing import Any, TypeAlias

from kdns.dns.message import FOREVER, Lease, Query, Reply
from kdns.server.datagrams import ID_SIZE, address_of
from kdns.server.folding import (
    HEADER,
    NAME_AT,
    Template,
    below_head,
    exact,
    fold,
    places_of_ttls,
    starts_of,
    template_of,
)

# Bounds of one cache: it has two generations of this many entries and octets each. A typical
# entry is under 600 octets in memory, so both stay under 20 MB of the stock 170 Mi limit.
MAX_ENTRIES = 16384
MAX_OCTETS = 4 << 20
# How many questions are remembered as asked once. Only a question asked again is kept: a
# flood of names that never come back (0x20, random labels) costs a hash and no entry.
MAX_ASKED = 65536
# How many entries are freed at one go.
LET_GO = 500
# How many orders of a shuffled answer are kept; each time round one is made anew, so that
# over time every order is as likely as if each query had been shuffled for itself.
ORDERS = 16

# All of an answer behind the ID, for one question octet by octet; or a template for all
# spellings of it, or with TTLs that count down.
Made: TypeAlias = bytes | Template
# Of all answers that are not a cache's.
FREEHOLD = Lease(0.0, 1)


class Entry:
    """One answer.

    size  -- octets of the whole answer
    wire  -- for `plain` ones: all of it behind the ID
    plain -- nothing to do for a repeat but to count and send
    place, rest -- for these: where `wire` is in memory, and how many octets it has
    lease -- says when it ends, besides `expires`
    template, until -- for those that would be plain if they were of one spelling and one TTL:
             what to fill as long as it is not later than that and the lease is held
    """

    __slots__ = (
        "deps", "expires", "hits", "key", "lease", "made", "next", "on_repeat", "orders", "place",
        "plain", "rest", "size", "tally", "template", "until", "wire",
    )  # fmt: skip

    def __init__(
        self, key: bytes, made: Made, reply: Reply, now: float, lease: Lease = FREEHOLD
    ) -> None:
        self.hits = 0
        self.tally = reply.tally
        self.deps = reply.deps
        self.lease = lease
        for_ever = reply.keep == FOREVER or lease is not FREEHOLD
        self.expires = FOREVER if for_ever else now + reply.keep
        self.on_repeat = reply.on_repeat
        self.orders: list[Made] | None = [made] if reply.shuffled else None
        self.next = 0
        self._settle_on(key, made)

    def _settle_on(self, key: bytes, made: Made) -> None:
        self.key = key
        self.made = made
        self.wire = made if isinstance(made, bytes) else b""
        self.size = len(made) + ID_SIZE if isinstance(made, bytes) else made.size
        self.place, self.rest = address_of(self.wire), len(self.wire)
        simple = self.orders is None and self.on_repeat is None and self.expires == FOREVER
        self.plain = simple and isinstance(made, bytes)
        self.template = made if simple and isinstance(made, Template) else None
        # The first repeat sees which TTL it is.
        self.until = FOREVER if self.lease is FREEHOLD else 0.0

    def spelt(self, key: bytes, wire: bytes) -> Entry:
        """Return the entry for one spelling of the question; wire -- the answer to it"""
        one = Entry.__new__(Entry)
        one.hits, one.tally, one.deps, one.expires = 0, self.tally, self.deps, self.expires
        one.on_repeat, one.orders, one.next = self.on_repeat, None, 0
        one.lease = self.lease
        made: Made = wire[2:]
        if self.lease is not FREEHOLD:
            assert isinstance(self.made, Template)
            made = exact(wire, places_of_ttls(wire, self.made.ttl) or ())
        one._settle_on(key, made)
        return one


class _Generation:
    __slots__ = ("by_dep", "entries", "octets")

    def __init__(self) -> None:
        self.entries: dict[bytes, Entry] = {}
        self.by_dep: defaultdict[Hashable, list[bytes]] = defaultdict(list)
        self.octets = 0


class PacketCache:
    """Two generations: entries asked for again move to the young one, the old one is dropped
    whole when the young one is full. So a flood of new names costs no search for a victim."""

    def __init__(self) -> None:
        self.young = _Generation()
        self.old = _Generation()
        self._gone: list[_Generation] = []
        self._asked: set[int] = set()
        # What was looked for last, and under which key: what is not held is kept next.
        self._folded = b"", b""
        # How many labels the names have that there is nothing below.
        self._depths: set[int] = set()
        # Seconds and number of repeats since the last settle(), for the duration metric.
        self.busy = 0.0
        self.repeats = 0
        self.total_hits = 0

    def __len__(self) -> int:
        return len(self.young.entries) + len(self.old.entries)

    def find(self, key: bytes) -> Entry | None:
        """Return an entry of the old generation, moved to the young one. (The listener
        looks into the young generation itself.)"""
        entry = self.old.entries.pop(key, None)
        if entry is not None:
            self._insert(entry)
        return entry

    def find_other(self, datagram: bytes) -> Entry | None:
        """Return the entry of a question of whose very octets the young generation has none: the
        old one's, else that of all spellings, else that of a name that is not there and that the
        question's name is below."""
        young, old = self.young.entries, self.old.entries
        if old and (key := datagram[ID_SIZE:]) in old:
            return self.find(key)
        folded = fold(datagram)
        self._folded = datagram, folded
        entry = young.get(folded)
        if entry is not None:
            return entry
        if folded in old:
            return self.find(folded)
        return self._find_below(datagram, folded) if self._depths else None

    def _find_below(self, datagram: bytes, folded: bytes) -> Entry | None:
        starts = starts_of(datagram)
        if not starts:
            return None
        last = len(starts) - 1
        young, old = self.young.entries, self.old.entries
        head = below_head(folded, starts)
        for depth in self._depths:
            if depth < last:
                key = head + folded[starts[last - depth] - HEADER + NAME_AT :]
                entry = young.get(key) or (self.find(key) if key in old else None)
                if entry is not None:
                    return entry
        return None

    def repeat(self, entry: Entry, datagram: bytes, now: float) -> bytes | None:
        """Return the answer to send for `datagram`; None if the chain must run (what is held
        has expired, or it is time for another order)."""
        if entry.expires <= now:
            self._forget(entry)
            return None
        ttl = None
        if entry.lease is not FREEHOLD:
            ttl = entry.lease.shown(now)
            if ttl is None:
                self._forget(entry)
                # What is asked that often is kept again as soon as may be.
                self._note_asked(entry.key)
                return None
        orders = entry.orders
        if orders is None:
            made = entry.made
        else:
            at = entry.next
            if at >= len(orders):
                return None
            entry.next = at + 1
            made = orders[at]
        if isinstance(made, bytes):
            return datagram[:2] + made
        if ttl is not None:
            made.age(ttl)
            if orders is None:
                entry.until = entry.lease.until(now)
        wire = made.fill(datagram)
        if orders is None:
            self.note_spelling(entry, datagram, wire)
        return wire

    def note_spelling(self, entry: Entry, datagram: bytes, wire: bytes) -> None:
        """Give a spelling that comes again and again an entry of its own, which is quicker."""
        key = datagram[2:]
        if entry.key != key and self._asked_before(key):
            self._insert(entry.spelt(key, wire))

    def keep(self, datagram: bytes, query: Query, wire: bytes, reply: Reply, now: float) -> None:
        """Remember an answer that may be repeated, if its question has been asked before."""
        if reply.below is not None and self._keep_below(datagram, query, wire, reply, now):
            return
        if reply.folds:
            key = self._fold(datagram)
            if not self._wanted(key, reply):
                return
            ttls, lease = _lease_of(reply, wire, now)
            template = template_of(datagram, query, reply, wire, ttls)
            if template is not None:
                self._put(key, template, reply, now, lease)
                return
        key = datagram[2:]
        if self._wanted(key, reply):
            ttls, lease = _lease_of(reply, wire, now)
            made = wire[2:] if lease is FREEHOLD else exact(wire, ttls)
            self._put(key, made, reply, now, lease)

    def _fold(self, datagram: bytes) -> bytes:
        looked_for, folded = self._folded
        return folded if looked_for is datagram else fold(datagram)

    def _keep_below(
        self, datagram: bytes, query: Query, wire: bytes, reply: Reply, now: float
    ) -> bool:
        """Remember an answer for all names below one that is not there, once two were asked
        for; return False if it cannot be kept for others."""
        starts = starts_of(datagram)
        if reply.keep != FOREVER or reply.on_repeat is not None or not starts:
            return False
        assert reply.below is not None
        folded = self._fold(datagram)
        key = below_head(folded, starts) + folded[NAME_AT + reply.below :]
        if self._asked_before(key):
            template = template_of(datagram, query, reply, wire)
            if template is None:
                return False
            self._insert(Entry(key, template, reply, now))
            self._depths.add(len(starts) - 1 - starts.index(HEADER + reply.below))
        return True

    def _wanted(self, key: bytes, reply: Reply) -> bool:
        """Whether an answer is to be kept: the question's second one, or another order."""
        if reply.shuffled:
            entry = self.young.entries.get(key)
            if entry is not None and entry.orders is not None:
                return True
        return self._asked_before(key)

    def _asked_before(self, key: bytes) -> bool:
        """True for every second time that a question is asked; the others are remembered."""
        asked, mark = self._asked, hash(key)
        if mark in asked:
            asked.discard(mark)
            return True
        self._note_asked(key)
        return False

    def _note_asked(self, key: bytes) -> None:
        if len(self._asked) >= MAX_ASKED:
            self._asked.clear()
        self._asked.add(hash(key))

    def _put(self, key: bytes, made: Made, reply: Reply, now: float, lease: Lease) -> None:
        entry = self.young.entries.get(key) if reply.shuffled else None
        if entry is None or entry.orders is None or entry.lease is not lease:
            self._insert(Entry(key, made, reply, now, lease))
        else:
            self._add_order(entry, made)

    def _add_order(self, entry: Entry, made: Made) -> None:
        orders = entry.orders
        assert orders is not None
        if len(orders) < ORDERS:
            orders.append(made)
            entry.next = len(orders)
        else:
            # A full round is over: replace the oldest and go round again.
            orders.pop(0)
            orders.append(made)
            entry.next = 0

    def _insert(self, entry: Entry) -> None:
        young = self.young
        if len(young.entries) >= MAX_ENTRIES or young.octets >= MAX_OCTETS:
            self._settle_all(self.old)
            self.old = young
            young = self.young = _Generation()
        old = young.entries.get(entry.key)
        if old is not None:
            self._settle(old)
        young.entries[entry.key] = entry
        young.octets += len(entry.key) + entry.size
        by_dep = young.by_dep
        for dep in entry.deps:
            by_dep[dep].append(entry.key)

    def _forget(self, entry: Entry) -> None:
        self._settle(entry)
        if self.young.entries.get(entry.key) is entry:
            del self.young.entries[entry.key]

    def drop(self, deps: Iterable[Hashable]) -> None:
        """Forget all answers that were made from one of `deps`."""
        for generation in (self.young, self.old):
            by_dep, entries = generation.by_dep, generation.entries
            for dep in deps:
                for key in by_dep.pop(dep, ()):
                    entry = entries.get(key)
                    if entry is not None and dep in entry.deps:
                        self._settle(entry)
                        del entries[key]

    def clear(self) -> None:
        """Forget everything and free it; what was counted is kept."""
        self.forget()
        for _ in self.let_go():
            pass

    def forget(self) -> None:
        """As clear(), but leave it to let_go() to free it; the next forget() does, too."""
        for generation in self._gone:
            self._settle_all(generation)
        self._gone = [self.young, self.old]
        self.young = _Generation()
        self.old = _Generation()

    def let_go(self) -> Iterator[int]:
        """Free what was forgotten, in parts, for all of it takes longer than answers may wait;
        yield how many entries each part had."""
        while self._gone:
            generation = self._gone[-1]
            left: list[dict[Any, Any]] = [generation.entries, generation.by_dep]
            for table in left:
                while table:
                    part = min(LET_GO, len(table))
                    for _ in range(part):
                        one = table.popitem()[1]
                        if one.__class__ is Entry:
                            self._settle(one)
                    yield part
            if generation in self._gone:  # else there was another forget()
                self._gone.remove(generation)

    @property
    def has_forgotten(self) -> bool:
        """Whether there is something for let_go()."""
        return bool(self._gone)

    def settle(self) -> None:
        """Add the repeats to the metrics they stand for."""
        for generation in (self.young, self.old, *self._gone):
            self._settle_all(generation)
        self.busy = 0.0
        self.repeats = 0

    def _settle_all(self, generation: _Generation) -> None:
        for entry in generation.entries.values():
            if entry.hits:
                self._settle(entry)

    def _settle(self, entry: Entry) -> None:
        hits = entry.hits
        if not hits:
            return
        entry.hits = 0
        self.total_hits += hits
        mean = self.busy / self.repeats if self.repeats else 0.0
        for cell, value in entry.tally or ():
            cell.add(mean if value is None else value, hits)


def _lease_of(reply: Reply, wire: bytes, now: float) -> tuple[list[int], Lease]:
    """Return where the TTLs of a cache's answer are and how long it may be repeated; nowhere
    and FREEHOLD where it is to be repeated as it is."""
    lease = reply.lease
    if lease is not None:
        ttl = lease.shown(now)
        ttls = None if ttl is None else places_of_ttls(wire, ttl)
        if ttls is not None:
            return ttls, lease
    return [], FREEHOLD
