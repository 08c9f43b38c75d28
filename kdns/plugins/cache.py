"""`cache`: keeps answers from below and gives them out again (reference 2.3; CoreDNS HEAD).

Decides what may be kept, for how long, and which TTL is shown. Everything that passes up has
its TTLs set to one value, kept or not. Two caches: success, and denial, which also holds
SERVFAIL. Asking again in the background (prefetch, serve_stale) is returned as a value.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable, Iterable, Sequence
from enum import Enum, auto
from typing import TypeAlias

from cachetools import RRCache

from kdns.corefile import Directive, Option, Token, nearest
from kdns.dns import ede
from kdns.dns import types as t
from kdns.dns.ede import Ede
from kdns.dns.message import AA, AD, CD, MAX_TCP, OPCODE, RA, RR, TC, Lease, Query, Reply
from kdns.dns.name import ROOT, is_subdomain, parse_name, render_name
from kdns.metrics import Cell
from kdns.plugins.plugin import Ask, Outcome, Plugin, Refresh
from kdns.plugins.setup import Setup, parse_duration

MIN_TTL = 5
MAX_TTL = 3600
MAX_DENIAL_TTL = 1800
FAILURE_TTL = 5
MAX_FAILURE_TTL = 300.0  # RFC 2308 s7.1
SHARDS = 256  # CoreDNS rounds capacities to what its shards can hold, four each at least
CAPACITY = 9984
# Most an entry may cost on average: keeps both default caches together within 40 MB of the
# stock 170 Mi limit, whatever upstreams answer.
OCTETS_PER_ENTRY = 2048
# Estimates of what Python needs for an entry and for a record besides their octets.
ENTRY_OVERHEAD, RECORD_OVERHEAD = 600, 300
WHY_OVERHEAD = 400
# A refresh that has said nothing for this long is lost; longer than any upstream may take.
REFRESH_LIMIT = 10.0

CACHED_ERROR = Ede(ede.CACHED_ERROR, "SERVFAIL of the upstream, kept from an earlier question")

OPTIONS = (
    "success", "denial", "prefetch", "serve_stale", "serve_stale_policy", "servfail", "disable",
    "keepttl",
)  # fmt: skip

# (lower-case name, type, class, DO and CD bits)
Key: TypeAlias = tuple[bytes, int, int, int]
Sections: TypeAlias = tuple[Sequence[RR], Sequence[RR], Sequence[RR]]


class Kind(Enum):
    """What a reply is to a cache (RFC 2308 s2)."""

    POSITIVE = auto()
    NXDOMAIN = auto()
    NODATA = auto()
    REFERRAL = auto()
    FAILURE = auto()
    OTHER = auto()  # never kept


# By names of their own: Python 3.11 looks an enum's member up in 0.1 µs, and each answer that
# passes is compared with many.
POSITIVE, NXDOMAIN, NODATA, REFERRAL, FAILURE, OTHER = Kind
# Kept in the success cache; the others in the denial cache.
SUCCESS = (POSITIVE, REFERRAL)


class Item:
    """One kept reply.

    ttl, stored -- seconds it is fresh, from when on
    hits, seen  -- how often in a row it was asked for, and when last (prefetch)
    retry_at    -- no refresh is begun before
    why -- finds out why this is the answer, for those who want to know, or None
    size  -- octets of memory it takes up, estimated
    lease -- what lets the packet cache repeat it, once somebody has asked
    answering   -- it answers its question; last_good: the one before that did, if this does not
    """

    __slots__ = (
        "_shown", "_shown_ttl", "answering", "deps", "flags", "hits", "last_good", "lease",
        "rcode", "retry_at", "sections", "seen", "size", "stored", "ttl", "why",
    )  # fmt: skip

    def __init__(self, reply: Reply, ttl: int, now: float) -> None:
        """Keep `reply`, whose TTLs all are `ttl` already."""
        self.rcode = reply.rcode
        self.flags = reply.flags & (RA | AD)
        self.sections: Sections = (
            tuple(reply.answer),
            tuple(reply.authority),
            tuple(reply.additional),
        )
        self.deps = tuple(dict.fromkeys(reply.deps)) if reply.deps else ()
        self.why = reply.why
        self.ttl = ttl
        self.stored = now
        self.hits = 0
        self.seen = now
        self.retry_at = 0.0
        self.lease: Lease | None = None
        self.answering = False
        self.last_good: Item | None = None
        size = ENTRY_OVERHEAD + (WHY_OVERHEAD if self.why is not None else 0)
        for section in self.sections:
            for rr in section:
                # Twice: once as rdata, once rendered.
                size += RECORD_OVERHEAD + len(rr.name) + 2 * len(rr.rdata)
        self.size = size
        self._shown_ttl = ttl
        self._shown: Sections = self.sections

    def left(self, now: float) -> int:
        """Return the seconds it stays fresh; zero or less once it is stale."""
        return self.ttl - int(now - self.stored)

    def show(self, ttl: int) -> Sections:
        """Return the sections with `ttl` in all records; made once for all who ask within
        the same second."""
        if ttl != self._shown_ttl:
            answer, authority, additional = self.sections
            self._shown = (
                [rr.with_ttl(ttl) for rr in answer],
                [rr.with_ttl(ttl) for rr in authority],
                [rr.with_ttl(ttl) for rr in additional],
            )
            self._shown_ttl = ttl
        return self._shown

    def begin_refresh(self, now: float) -> bool:
        """Return True if a refresh may begin now; it is taken to have begun then."""
        if now < self.retry_at:
            return False
        self.retry_at = now + REFRESH_LIMIT
        return True

    def end_lease(self) -> None:
        """Have the question asked here again: the answer may be another one."""
        if self.lease is not None:
            self.lease.held = False
            self.lease = None

    def answering_item(self) -> Item | None:
        return self if self.answering else self.last_good


class Store:
    """Items by key, bounded in number and octets; the victim is chosen at random, as in
    CoreDNS.

    Each item takes up its own size, but at least an equal share of the whole: so neither
    more items than `capacity` nor more octets than that many shares fit in.
    """

    def __init__(self, capacity: int, rng: random.Random, entries: Cell, evictions: Cell) -> None:
        capacity = max(capacity // SHARDS, 4) * SHARDS
        self.items: dict[Key, Item] = {}
        # What the items cost, and the choice of a victim. Not for looking items up, as each
        # question does: cachetools is written in Python.
        self._costs: RRCache[Key, int] = RRCache(capacity * OCTETS_PER_ENTRY, rng.choice, int)
        self._room = capacity * OCTETS_PER_ENTRY
        self._by_dep: dict[Hashable, set[Key]] = {}
        self._entries = entries
        self._evictions = evictions

    def add(self, key: Key, item: Item) -> None:
        items, costs = self.items, self._costs
        if key in items:
            self.remove(key)
        cost = max(item.size, OCTETS_PER_ENTRY)
        while items and costs.currsize + cost > self._room:
            victim, _ = costs.popitem()
            self._forget(victim, items.pop(victim))
            self._evictions.add()
        costs[key] = cost
        items[key] = item
        for dep in item.deps:
            self._by_dep.setdefault(dep, set()).add(key)
        self._entries.value = len(items)

    def remove(self, key: Key) -> None:
        item = self.items.pop(key, None)
        if item is not None:
            del self._costs[key]
            self._forget(key, item)

    def _forget(self, key: Key, item: Item) -> None:
        item.end_lease()
        for dep in item.deps:
            keys = self._by_dep[dep]
            keys.discard(key)
            if not keys:
                del self._by_dep[dep]
        self._entries.value = len(self.items)

    def invalidate(self, deps: Iterable[Hashable] | None) -> None:
        """Remove what was made from one of `deps`; None: from any."""
        for dep in list(self._by_dep) if deps is None else deps:
            for key in list(self._by_dep.get(dep, ())):
                self.remove(key)


class Rules:
    """What the directive says. Times are in seconds.

    ttl, min_ttl -- of the success cache; denial_ttl, min_denial_ttl: of the other
    no_success, no_denial -- zones not kept
    amount, gap, percent  -- prefetch: after so many questions without a longer gap, when so
                             much of the TTL is left
    stale     -- how long an expired item may be given out (0: not at all)
    verify    -- ask first; verify_timeout: for so long (0: as long as it takes)
    stale_ttl -- shown with stale answers; recheck: pause after a failed refresh
    prefer_positive -- serve_stale_policy
    """

    def __init__(self) -> None:
        self.zones: tuple[bytes, ...] = (ROOT,)
        self.capacity = self.denial_capacity = CAPACITY
        self.ttl, self.denial_ttl = MAX_TTL, MAX_DENIAL_TTL
        self.min_ttl = self.min_denial_ttl = MIN_TTL
        self.failure_ttl = float(FAILURE_TTL)
        self.no_success: tuple[bytes, ...] = ()
        self.no_denial: tuple[bytes, ...] = ()
        self.amount = 0
        self.gap = 60.0
        self.percent = 10
        self.stale = 0.0
        self.verify = False
        self.verify_timeout = 0.0
        self.stale_ttl = 0
        self.recheck = 0.0
        self.prefer_positive = False
        self.keep_ttl = False


class Cache(Plugin):
    """Looks before asking below, keeps what comes back."""

    word = "cache"

    def __init__(self, rules: Rules, cx: Setup) -> None:
        self.rules = rules
        self._clock = cx.clock
        self._everywhere = ROOT in rules.zones
        self._zones = rules.zones
        self._explains = True
        # The last reply of an upstream, until it has left: nobody need wait for its being kept.
        self._arrived: tuple[Query, Item, Kind] | None = None
        zones = ",".join(render_name(zone) for zone in rules.zones)
        labels = (cx.facts.label, zones, "")
        typed = ("server", "type", "zones", "view")
        plain = ("server", "zones", "view")
        m = cx.metrics
        entries = m.gauge("coredns_cache_entries", "Replies kept.", typed)
        hits = m.counter("coredns_cache_hits_total", "Questions answered from the cache.", typed)
        evictions = m.counter(
            "coredns_cache_evictions_total", "Replies dropped to make room.", typed
        )

        def cell(family: str, help: str) -> Cell:
            return m.counter(family, help, plain).labels(*labels)

        def store(kind: str, capacity: int) -> Store:
            label = (labels[0], kind, zones, "")
            return Store(capacity, cx.random, entries.labels(*label), evictions.labels(*label))

        self._requests = cell("coredns_cache_requests_total", "Questions to the cache.")
        self._misses = cell("coredns_cache_misses_total", "Questions it could not answer.")
        self._prefetches = cell("coredns_cache_prefetch_total", "Replies asked for in advance.")
        self._stales = cell("coredns_cache_served_stale_total", "Answers given out expired.")
        self._success = store("success", rules.capacity)
        self._denial = store("denial", rules.denial_capacity)
        self._success_hits = hits.labels(labels[0], "success", zones, "")
        self._denial_hits = hits.labels(labels[0], "denial", zones, "")
        self._miss_tally: list[tuple[Cell, float | None]] = [
            (self._requests, 1),
            (self._misses, 1),
        ]

    def link(self, chain: Sequence[Plugin]) -> None:
        self._explains = all(plugin.explains for plugin in chain)

    def heeds(self, zone: bytes) -> bool:
        return not self._everywhere or self.keeps(zone)

    def keeps(self, zone: bytes) -> bool:
        rules = self.rules
        return not (_has_whole(rules.no_success, zone) and _has_whole(rules.no_denial, zone))

    def invalidate(self, deps: Iterable[Hashable] | None) -> None:
        """Forget replies made from zone nodes that are different now; None: from any node.
        (CoreDNS keeps them until their TTL is over.)"""
        if deps is not None:
            deps = tuple(deps)
        self.on_sent()
        self._success.invalidate(deps)
        self._denial.invalidate(deps)

    # --- questions ------------------------------------------------------------------------

    def on_query(self, query: Query) -> Outcome:
        if self._arrived is not None:
            self.on_sent()
        edns = query.edns
        key = (
            query.key,
            query.qtype,
            query.qclass,
            query.flags & CD | (1 if edns is not None and edns.do else 0),
        )
        if key not in self._success.items and key not in self._denial.items:
            return None
        if query.flags & OPCODE or not self._is_mine(query.key):
            return None
        now = self._clock()
        found = self._find(key, now)
        if found is None:
            return None
        item, hits = found
        if item.left(now) <= 0:
            self._requests.add()
            hits.add()
            return self._serve_stale(query, key, item, now)
        refresh = self.rules.amount and self._is_popular(item, now)
        reply = self._fresh_reply(query, item, hits, now)
        if refresh and item.begin_refresh(now):
            self._prefetches.add()
            return Refresh(reply, _refreshing(query), self._prefetched(query, key, item))
        return reply

    def _is_mine(self, name: bytes) -> bool:
        return self._everywhere or any(is_subdomain(name, zone) for zone in self._zones)

    def _usable(self, item: Item | None, now: float) -> bool:
        if item is None:
            return False
        left = item.left(now)
        return left > 0 or -left < int(self.rules.stale)

    def _find(self, key: Key, now: float) -> tuple[Item, Cell] | None:
        """Return the item to answer with, and the hits it counts under."""
        positive = self._success.items.get(key)
        if self.rules.prefer_positive and positive is not None:
            good = positive.answering_item()
            if good is not None and self._usable(good, now):
                return good, self._success_hits
        denial = self._denial.items.get(key)
        if denial is not None and self._usable(denial, now):
            # A SERVFAIL passes; what was answered before it is better (CoreDNS 1.14.4 #8003).
            if denial.rcode == t.SERVFAIL and positive is not None and self._usable(positive, now):
                return positive, self._success_hits
            return denial, self._denial_hits
        if positive is not None and self._usable(positive, now):
            return positive, self._success_hits
        return None

    def _fresh_reply(self, query: Query, item: Item, hits: Cell, now: float) -> Reply:
        rules = self.rules
        age = now - item.stored
        if rules.keep_ttl:
            reply = _make_reply(query, item, item.ttl)
            reply.keep = item.ttl - age
        else:
            reply = _make_reply(query, item, item.ttl - int(age))
            # The TTL shown is true for the rest of this second.
            reply.keep = int(age) + 1 - age
        # Which of two items is the better answer is looked at for each question.
        if not rules.prefer_positive:
            reply.lease = item.lease or self._lease(item)
        reply.folds = query.name, None
        if query.edns is not None and self._explains:
            if item.why is not None:
                reply.explain(*item.why())
            elif item.rcode == t.SERVFAIL:
                reply.ede = CACHED_ERROR
        if rules.amount:
            self._count_repeats(reply, item, now)
        reply.count(self._requests)
        reply.count(hits)
        return reply

    def _lease(self, item: Item) -> Lease:
        """Let the packet cache repeat an item; not once it may be time to fetch it anew."""
        rules = self.rules
        floor = self._prefetch_at(item) if rules.amount else 0
        item.lease = Lease(item.stored, item.ttl, floor, not rules.keep_ttl)
        return item.lease

    def _count_repeats(self, reply: Reply, item: Item, now: float) -> None:
        """Have each repeat count for prefetch."""
        if item.left(now) <= self._prefetch_at(item):
            reply.keep = 0.0  # any question may be the one that begins it
        else:
            reply.on_repeat = [lambda client, qid, seconds: self._count(item, self._clock())]
            # With `keepttl` it would last for longer than until then.
            reply.keep = min(reply.keep, item.stored + int(now - item.stored) + 1 - now)

    # --- answers --------------------------------------------------------------------------

    def on_reply(self, query: Query, reply: Reply) -> Reply:
        if not self._everywhere and not self._is_mine(query.key):
            return reply
        self._requests.value += 1
        self._misses.value += 1
        if self._arrived is not None:
            self.on_sent()  # several waited for the same answer
        if reply.upstream:
            self._arrived = self._take(query, reply)
        else:
            self._take_at_once(query, reply)
        if reply.keep:
            if reply.tally is None:
                reply.tally = []
            reply.tally += self._miss_tally
        return reply

    def on_drop(self, query: Query) -> None:
        if self._is_mine(query.key):
            self._requests.add()
            self._misses.add()

    def _take_at_once(self, query: Query, reply: Reply) -> None:
        taken = self._take(query, reply)
        if taken is not None:
            self._keep(*taken)

    def on_sent(self) -> None:
        arrived = self._arrived
        if arrived is not None:
            self._arrived = None
            self._keep(*arrived)

    def _take(self, query: Query, reply: Reply) -> tuple[Query, Item, Kind] | None:
        """Set the TTLs of a reply from below; return what _keep() takes if it may be kept."""
        if query.qtype == t.AXFR or query.qtype == t.IXFR or query.flags & OPCODE:
            return None  # the records of a transfer are the zone's, TTL and all
        kind = classify(query, reply)
        ttl = self._set_ttls(kind, reply)
        reply.edns = None  # OPT goes from hop to hop (RFC 6891 s6.1.1)
        item = None
        if ttl > 0 and self._is_kept(query.key, kind) and is_storable(query, reply, kind):
            item = Item(reply, ttl, self._clock())
            # From now on the TTL counts down and hits are counted: this very reply is no more
            # true.
            reply.keep = 0.0
        if reply.flags & AD and not (query.flags & AD or query.do):
            reply.flags &= ~AD  # RFC 6840 s5.7
        return None if item is None else (query, item, kind)

    def _set_ttls(self, kind: Kind, reply: Reply) -> int:
        """Give all records the lowest TTL among them, within bounds; return it."""
        rules = self.rules
        low, high = MAX_TTL << 20, -1
        for section in (reply.answer, reply.authority, reply.additional):
            for rr in section:
                ttl = rr.ttl
                if ttl < low:
                    low = ttl
                if ttl > high:
                    high = ttl
        if high < 0 or kind is REFERRAL or kind is OTHER:
            ttl = MIN_TTL
        else:
            ttl = low
        if kind is NXDOMAIN or kind is NODATA:
            ttl = min(max(ttl, rules.min_denial_ttl), rules.denial_ttl)
        elif kind is FAILURE:
            ttl = int(rules.failure_ttl)
        else:
            ttl = min(max(ttl, rules.min_ttl), rules.ttl)
        if high >= 0 and (low != ttl or high != ttl):
            reply.answer = [rr.with_ttl(ttl) for rr in reply.answer]
            if reply.authority:
                reply.authority = [rr.with_ttl(ttl) for rr in reply.authority]
            if reply.additional:
                reply.additional = [rr.with_ttl(ttl) for rr in reply.additional]
        return ttl

    def _is_kept(self, name: bytes, kind: Kind) -> bool:
        """False if `disable` is said for this name."""
        for zone in self.rules.no_success if kind in SUCCESS else self.rules.no_denial:
            if name.endswith(zone) and is_subdomain(name, zone):
                return False
        return True

    def _keep(self, query: Query, item: Item, kind: Kind) -> None:
        rules = self.rules
        key = (query.key, query.qtype, query.qclass, query.flags & CD | (1 if query.do else 0))
        success, denial = self._success, self._denial
        before, denied = success.items.get(key), denial.items.get(key)
        for old in (before, denied):
            if old is not None:
                old.end_lease()
        if kind not in SUCCESS:
            denial.add(key, item)
            return
        if rules.prefer_positive:
            item.answering = answers_question(query, item.sections[0])
            if not item.answering and before is not None:
                item.last_good = before.answering_item()
        success.add(key, item)
        if denied is not None and (item.answering or not rules.prefer_positive):
            denial.remove(key)

    # --- asking again ---------------------------------------------------------------------

    def _is_popular(self, item: Item, now: float) -> bool:
        """Count a question; return True if it is time to fetch the answer anew."""
        self._count(item, now)
        return item.hits >= self.rules.amount and item.left(now) <= self._prefetch_at(item)

    def _count(self, item: Item, now: float) -> None:
        item.hits = 1 if item.seen < now - self.rules.gap else item.hits + 1
        item.seen = now

    def _prefetch_at(self, item: Item) -> int:
        """Return the seconds left at which a popular item is fetched anew."""
        return math.ceil(self.rules.percent / 100 * item.ttl)

    def _prefetched(self, query: Query, key: Key, item: Item) -> Callable[[Reply], None]:
        def take(reply: Reply) -> None:
            self._take_at_once(query, reply)
            self._hand_over(key, item)
            item.retry_at = 0.0

        return take

    def _hand_over(self, key: Key, item: Item) -> None:
        """Let the item that took the place of `item` know how popular it is."""
        fresh = self._denial.items.get(key) or self._success.items.get(key)
        if fresh is not None:
            fresh.hits, fresh.seen = item.hits, item.seen

    def _serve_stale(self, query: Query, key: Key, item: Item, now: float) -> Outcome:
        """Answer with an expired item, and ask below anew (RFC 8767)."""
        rules = self.rules
        tracked = not rules.verify or rules.recheck > 0
        if tracked and not item.begin_refresh(now):
            return self._stale_reply(query, item)
        if rules.verify:
            return Ask(
                query,
                self._verified(query, key, item),
                below=True,
                timeout=rules.verify_timeout or None,
            )
        self._prefetches.add()

        def take(reply: Reply) -> None:
            self._refreshed(query, key, item, reply)

        return Refresh(self._stale_reply(query, item), _refreshing(query), take)

    def _verified(self, query: Query, key: Key, item: Item) -> Callable[[Reply | None], Outcome]:
        def take(reply: Reply | None) -> Outcome:
            if reply is None:
                return self._stale_reply(query, item)  # no answer in time
            if not self._refreshed(query, key, item, reply):
                return self._stale_reply(query, item)
            reply.keep = 0.0
            return reply

        return take

    def _refreshed(self, query: Query, key: Key, item: Item, reply: Reply) -> bool:
        """Take the reply to a refresh of a stale item; return False if the stale one is still
        the better answer (RFC 8767 s4)."""
        rules = self.rules
        good = is_refresh(query, reply)
        if rules.prefer_positive:
            good = good and answers_question(query, reply.answer)
        if good or (rules.prefer_positive and not reply.flags & TC):
            self._take_at_once(query, reply)
        if good:
            self._hand_over(key, item)
            item.retry_at = 0.0
        else:
            item.retry_at = self._clock() + rules.recheck
        return good

    def _stale_reply(self, query: Query, item: Item) -> Reply:
        self._stales.add()
        reply = _make_reply(query, item, self.rules.stale_ttl)
        if query.edns is not None and self._explains:
            over = int(self._clock() - item.stored) - item.ttl
            code = ede.STALE_NXDOMAIN if item.rcode == t.NXDOMAIN else ede.STALE_ANSWER
            reply.ede = Ede(code, f"expired {over} s ago; no newer answer is there yet")
        return reply


def _make_reply(query: Query, item: Item, ttl: int) -> Reply:
    answer, authority, additional = item.show(ttl)
    flags = item.flags
    if flags & AD and not (query.flags & AD or query.do):
        flags &= ~AD
    reply = Reply(
        item.rcode,
        list(answer),
        list(authority),
        list(additional),
        # CoreDNS: some stub resolvers drop answers without AA, so a hit always has it.
        flags=flags | AA,
        served_by="cache",
        deps=item.deps,
    )
    reply.stored = item.stored
    return reply


def _refreshing(query: Query) -> Query:
    """Return the query of a refresh: as if it came over TCP, since a truncated reply would not
    be kept."""
    refresh = query.asking()
    refresh.proto = "tcp"
    refresh.limit = MAX_TCP
    return refresh


# --- what a reply is ----------------------------------------------------------------------


def classify(query: Query, reply: Reply) -> Kind:
    """Return what `reply` to `query` is to a cache."""
    rcode = reply.rcode
    if rcode == t.NOERROR:
        if reply.answer:
            # RFC 2308 s2.2: NODATA may come at the end of a CNAME chain.
            if not reply.authority or not _has(reply.authority, t.SOA):
                return POSITIVE
            return POSITIVE if answers_question(query, reply.answer) else NODATA
        if not reply.authority:
            return POSITIVE
        if _has(reply.authority, t.SOA):
            return NODATA
        return REFERRAL if _has(reply.authority, t.NS) else POSITIVE
    if rcode == t.NXDOMAIN:
        return OTHER if reply.answer else NXDOMAIN
    if rcode == t.SERVFAIL or rcode == t.NOTIMP:
        # An answer of an upstream's; that none came is found out anew each time (CoreDNS).
        return FAILURE if reply.is_written else OTHER
    return OTHER


def is_storable(query: Query, reply: Reply, kind: Kind) -> bool:
    """True if a reply of this kind may be kept."""
    if reply.flags & TC or kind is OTHER:
        return False
    if kind is NXDOMAIN:
        # RFC 2308 s5: without SOA there is no TTL to keep it for.
        return _has(reply.authority, t.SOA)
    if kind is POSITIVE and reply.answer:
        # A CNAME chain without its end is NODATA without SOA (CoreDNS 1.14.7 #8232).
        return answers_question(query, reply.answer)
    return True


def is_refresh(query: Query, reply: Reply) -> bool:
    """True if a reply may take the place of a stale one."""
    if reply.flags & TC or reply.rcode not in (t.NOERROR, t.NXDOMAIN):
        return False
    return classify(query, reply) is not OTHER


def answers_question(query: Query, answer: Sequence[RR]) -> bool:
    """True if a record of the queried type stands at the end of the CNAME chain that begins at
    the queried name (RFC 1034 s3.6.2)."""
    qtype, qclass = query.qtype, query.qclass
    name = query.key
    if qtype == t.ANY or qtype == t.CNAME:
        return any(
            (qtype == t.ANY or rr.type == t.CNAME) and rr.name.lower() == name for rr in answer
        )
    aliases: dict[bytes, bytes] = {}
    for rr in answer:
        if rr.type == t.CNAME and (rr.cls == qclass or qclass == t.ANYCLASS):
            owner, target = rr.name.lower(), rr.rdata.lower()
            if aliases.setdefault(owner, target) != target:
                return False  # RFC 2181 s10.1: an alias has one canonical name
    for _ in range(len(aliases)):
        if name not in aliases:
            break
        name = aliases[name]
    if name in aliases:
        return False  # a loop
    for rr in answer:
        if (
            rr.type == qtype
            and rr.name.lower() == name
            and (rr.cls == qclass or qclass == t.ANYCLASS)
        ):
            return True
    return False


def _has_whole(zones: Iterable[bytes], zone: bytes) -> bool:
    return any(is_subdomain(zone, one) for one in zones)


def _has(section: Sequence[RR], rtype: int) -> bool:
    return rtype in [rr.type for rr in section]  # a third of what any() of a generator takes


# --- reading the Corefile -----------------------------------------------------------------


def setup(directives: list[Directive], cx: Setup) -> list[Plugin]:
    """`cache [TTL] [ZONES...] { OPTIONS }`, once in a server block."""
    directive = cx.once(directives)
    reader = _Reader(directive, cx)
    reader.read()
    return [Cache(reader.rules, cx)]


class _Reader:
    def __init__(self, directive: Directive, cx: Setup) -> None:
        self.directive = directive
        self.cx = cx
        self.rules = Rules()
        self.stale_option: Option | None = None
        self.policy_option: Option | None = None

    def read(self) -> None:
        rules, args = self.rules, self.directive.args
        if args and _is_integer(args[0]):
            rules.ttl = rules.denial_ttl = self._ttl(args[0])
            args = args[1:]
        elif args:
            self._check_zone(args[0])
        rules.zones = self.cx.zones(args)
        for option in self.directive.options or ():
            if option.name not in OPTIONS:
                self.cx.unknown_option(option, OPTIONS)
            else:
                getattr(self, f"read_{option.name}")(option)
        if self.policy_option is not None and self.stale_option is None:
            self.cx.problems.error(
                self.policy_option.word, "serve_stale_policy requires serve_stale"
            )

    def _check_zone(self, token: Token) -> None:
        """Say what CoreDNS passes over in silence: a first argument that is no TTL is a zone."""
        text = token.text
        if parse_duration(text) is not None:
            self.cx.problems.error(
                token,
                f"cache TTL '{text}' must be a whole number of seconds without a unit"
                f" (write {max(1, int(parse_duration(text) or 0))})",
            )
            return
        mine = [parse_name(zone).lower() for zone in self.cx.facts.zones]
        found = self.cx.zone(token)
        if found and not any(is_subdomain(zone, one) for zone in found for one in mine):
            self.cx.problems.warn(
                token,
                f"'{text}' is neither a TTL in seconds nor a zone of this server block"
                f" ({', '.join(self.cx.facts.zones)}): nothing will be cached for it",
            )
        elif found and "." not in text and found[0] not in mine:
            self.cx.problems.warn(
                token,
                f"'{text}' is not a TTL in seconds and is taken as a zone: only names in"
                f" '{text}.' are cached; write '{text}.' if that is meant",
            )

    def _ttl(self, token: Token) -> int:
        """Return a maximum TTL; zero is reserved."""
        value = self._number(token, "cache TTL")
        if value <= 0:
            self.cx.problems.error(token, f"cache TTL can not be zero or negative: {token}")
            return 1
        return value

    def _number(self, token: Token, what: str) -> int:
        if not _is_integer(token):
            self.cx.problems.error(token, f"{what} must be a whole number, found '{token}'")
            return 1
        return int(token.text)

    def read_success(self, option: Option) -> None:
        found = self._capacity(option)
        if found is not None:
            rules = self.rules
            rules.capacity, ttl, low = found
            rules.ttl = rules.ttl if ttl is None else ttl
            rules.min_ttl = rules.min_ttl if low is None else low

    def read_denial(self, option: Option) -> None:
        found = self._capacity(option)
        if found is not None:
            rules = self.rules
            rules.denial_capacity, ttl, low = found
            rules.denial_ttl = rules.denial_ttl if ttl is None else ttl
            rules.min_denial_ttl = rules.min_denial_ttl if low is None else low

    def _capacity(self, option: Option) -> tuple[int, int | None, int | None] | None:
        """Read CAPACITY [TTL] [MINTTL]."""
        if not self.cx.arg_count(option, 1, 3):
            return None
        args = option.args
        capacity = self._number(args[0], f"{option.name} capacity")
        ttl = self._ttl(args[1]) if len(args) > 1 else None
        low = None
        if len(args) > 2:
            low = self._number(args[2], "cache min TTL")
            if low < 0:
                self.cx.problems.error(args[2], f"cache min TTL can not be negative: {low}")
        return capacity, ttl, low

    def read_prefetch(self, option: Option) -> None:
        if not self.cx.arg_count(option, 1, 3):
            return
        rules, args = self.rules, option.args
        rules.amount = self._number(args[0], "prefetch amount")
        if rules.amount < 0:
            self.cx.problems.error(args[0], f"prefetch amount should be positive: {args[0]}")
        if len(args) > 1:
            rules.gap = self.cx.duration(args[1])
        if len(args) > 2:
            rules.percent = self._percent(args[2])

    def _percent(self, token: Token) -> int:
        text = token.text
        if not text.endswith("%") or not text[:-1].isdecimal():
            self.cx.problems.error(token, f"percentage must be written as 10%, found '{text}'")
        elif not 10 <= int(text[:-1]) <= 90:
            self.cx.problems.error(token, f"percentage should fall in range [10, 90]: {text[:-1]}")
        else:
            return int(text[:-1])
        return 10

    def read_serve_stale(self, option: Option) -> None:
        """Read [DURATION] [immediate [TTL [RECHECK]] | verify [TIMEOUT [TTL [RECHECK]]]]."""
        if not self.cx.arg_count(option, 0, 5):
            return
        self.stale_option = option
        rules, args = self.rules, list(option.args)
        rules.stale = self.cx.duration(args.pop(0)) if args else 3600.0
        if not args:
            return
        mode = args.pop(0)
        if mode.text.lower() not in ("immediate", "verify"):
            hint = nearest(mode.text, ("immediate", "verify")) or " (known: immediate, verify)"
            self.cx.problems.error(
                mode, f"invalid value for serve_stale refresh mode: {mode}{hint}"
            )
            return
        rules.verify = mode.text.lower() == "verify"
        if rules.verify and args:
            rules.verify_timeout = self.cx.duration(args.pop(0))
        if args:
            rules.stale_ttl = self._stale_ttl(args.pop(0))
        if args:
            rules.recheck = self._limited(args.pop(0), "serve_stale failure recheck")
        if args:
            self.cx.problems.error(args[0], f"unexpected '{args[0]}' after 'serve_stale'")

    def _stale_ttl(self, token: Token) -> int:
        seconds = self.cx.duration(token)
        if seconds != int(seconds) or seconds >= 1 << 31:
            self.cx.problems.error(
                token, f"serve_stale response TTL must be a whole number of seconds: {token}"
            )
        return int(seconds)

    def _limited(self, token: Token, what: str) -> float:
        seconds = self.cx.duration(token)
        if seconds > MAX_FAILURE_TTL:
            self.cx.problems.error(token, f"{what} may not be over 5 minutes: {token}")
        return min(seconds, MAX_FAILURE_TTL)

    def read_serve_stale_policy(self, option: Option) -> None:
        if self.policy_option is not None:
            self.cx.problems.error(option.word, "serve_stale_policy can only be specified once")
        self.policy_option = option
        if not self.cx.arg_count(option, 1, 1):
            return
        if option.args[0].text.lower() != "prefer_positive":
            self.cx.problems.error(
                option.args[0],
                f"invalid serve_stale_policy: {option.args[0]} (known: prefer_positive)",
            )
        self.rules.prefer_positive = True

    def read_servfail(self, option: Option) -> None:
        if self.cx.arg_count(option, 1, 1):
            # RFC 2308 s7.1 allows no more than five minutes.
            self.rules.failure_ttl = self._limited(option.args[0], "caching of SERVFAIL")

    def read_disable(self, option: Option) -> None:
        if not self.cx.arg_count(option, 1):
            return
        which = option.args[0]
        zones: tuple[bytes, ...] = (ROOT,)
        if len(option.args) > 1:
            zones = self.cx.zones(option.args[1:])
        if which.text == "success":
            self.rules.no_success += zones
        elif which.text == "denial":
            self.rules.no_denial += zones
        else:
            hint = nearest(which.text, ("success", "denial"))
            self.cx.problems.error(
                which, f"cache type for disable must be 'success' or 'denial'{hint}"
            )

    def read_keepttl(self, option: Option) -> None:
        if self.cx.no_args(option):
            self.rules.keep_ttl = True


def _is_integer(token: Token) -> bool:
    text = token.text[1:] if token.text[:1] in ("-", "+") else token.text
    return text.isascii() and text.isdecimal() and len(text) < 10
