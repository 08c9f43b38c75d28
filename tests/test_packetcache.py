"""Ready-made answers: never older than the registry, counted and logged as if made anew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from objects import endpoint, kubernetes, service, slice_of, snapshot
from support import a, build, make_setup

from kdns.dns import types as t
from kdns.dns.message import (
    FOREVER,
    Edns,
    Lease,
    Query,
    Reply,
    parse_message,
    parse_query,
    render_query,
    render_reply,
)
from kdns.dns.name import ROOT, parse_name
from kdns.metrics import Cell, HistogramCell
from kdns.plugins.chain import Chain, Router
from kdns.plugins.plugin import Outcome, Plugin
from kdns.registry.snapshot import Changes
from kdns.server import packetcache
from kdns.server.packetcache import PacketCache

ASKED = render_query(7, parse_name("x."), t.A)
KEY = ASKED[2:]
QUERY = parse_query(ASKED, ("127.0.0.1", 5), "udp", 0.0)
ANSWER = ASKED[:2] + b"answer"


LEASE = Lease(100.0, 30)


def kept(reply: Reply, now: float = 0.0) -> PacketCache:
    cache = PacketCache()
    cache.keep(ASKED, QUERY, ANSWER, reply, now)
    assert len(cache) == 0, "a question asked once is not kept"
    cache.keep(ASKED, QUERY, ANSWER, reply, now)
    return cache


def found(cache: PacketCache, now: float = 0.0) -> bytes | None:
    entry = cache.young.entries.get(KEY) or cache.find_other(ASKED)
    return cache.repeat(entry, ASKED, now) if entry is not None else None


def test_a_kept_answer_is_found_until_one_of_its_nodes_changes() -> None:
    cache = kept(Reply(keep=FOREVER, deps=(("default", "web"), ("default",))))
    cache.drop([("default", "other")])
    assert found(cache) == ANSWER
    cache.drop([("default",)])
    assert found(cache) is None
    assert len(cache) == 0


def test_an_answer_with_a_time_is_not_sent_after_it() -> None:
    cache = kept(Reply(keep=5.0), now=100.0)
    assert found(cache, 104.9) == ANSWER
    assert found(cache, 105.0) is None
    assert len(cache) == 0


def test_an_order_whose_ttl_stands_still_is_not_kept_among_those_that_count_down() -> None:
    """It was made as the second turned: the lease shows one TTL, the answer another."""
    addresses = [a("x.", f"192.0.2.{n}", 30) for n in (1, 2)]
    cache = PacketCache()
    for shown, now in ((30, 100.0), (30, 100.1), (30, 101.0)):
        reply = Reply(answer=[rr.with_ttl(shown) for rr in addresses], keep=0.5)
        reply.shuffled, reply.lease = True, LEASE
        cache.keep(ASKED, QUERY, render_reply(QUERY, reply), reply, now)
    entry = cache.young.entries.get(KEY) or cache.find_other(ASKED)
    assert entry is not None
    answers = [cache.repeat(entry, ASKED, 101.1) for _ in range(2)]
    assert {rr.ttl for wire in answers if wire for rr in parse_message(wire).answer} == {30}
    assert cache.repeat(entry, ASKED, 101.6) is None, "as it is for half a second and no longer"


def test_repeats_are_counted_in_the_metrics_of_the_first() -> None:
    cell, seconds = Cell(), HistogramCell((1.0,))
    reply = Reply(keep=FOREVER)
    reply.count(cell)
    assert reply.tally is not None
    reply.tally.append((seconds, None))
    cache = kept(reply)
    cache.young.entries[KEY].hits += 7
    cache.busy, cache.repeats = 0.014, 7
    cache.settle()
    cache.settle()
    assert cell.value == 8, "the first and seven repeats, once each"
    assert (seconds.counts[0], round(seconds.sum, 6)) == (7, 0.014)


def test_counts_survive_being_dropped_and_cleared() -> None:
    def free(cache: PacketCache) -> None:
        cache.forget()
        assert cache.has_forgotten
        assert sum(cache.let_go()) > 0
        assert not cache.has_forgotten

    def forget_twice(cache: PacketCache) -> None:
        cache.forget()
        cache.forget()

    def forget_and_be_scraped(cache: PacketCache) -> None:
        cache.forget()
        cache.settle()
        list(cache.let_go())

    cell = Cell()
    ways: list[Callable[[PacketCache], None]] = [
        lambda c: c.drop(["x"]), PacketCache.clear, free, forget_twice, forget_and_be_scraped,
    ]  # fmt: skip
    for forget in ways:
        reply = Reply(keep=FOREVER, deps=("x",))
        reply.count(cell)
        cache = kept(reply)
        cache.young.entries[KEY].hits += 2
        forget(cache)
        assert len(cache) == 0
    assert cell.value == 15


def test_a_flood_of_questions_is_bounded_and_asked_again_ones_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packetcache, "MAX_ENTRIES", 100)
    cache = kept(Reply(keep=FOREVER))
    for n in range(1000):
        for _ in range(2):
            cache.keep(b"id%d" % n, QUERY, b"idx", Reply(keep=FOREVER), 0.0)
        assert len(cache) <= 201
        assert found(cache) == ANSWER


def test_shuffled_answers_come_in_all_orders_about_equally_often() -> None:
    reply = Reply(t.NOERROR, [a("x.", f"10.0.0.{n}") for n in range(3)], keep=FOREVER)
    plugins = [*build("loadbalance"), _Fixed(reply)]
    seen = Counter(_first_addresses(plugins, 3000))
    assert len(seen) == 3
    assert min(seen.values()) > 600, seen


class _Fixed(Plugin):
    word = "fixed"

    def __init__(self, reply: Reply) -> None:
        self.reply = reply

    def on_query(self, query: Query) -> Outcome:
        return self.reply.copy()


def _first_addresses(plugins: list[Plugin], times: int) -> list[bytes]:
    router = Router({ROOT: Chain(plugins)})
    cache = PacketCache()
    wire = render_query(1, parse_name("x."), t.A)
    out = []
    for _ in range(times):
        answer = _through(cache, router, wire)
        out.append(parse_message(answer).answer[0].rdata)
    assert cache.total_hits == 0
    cache.settle()
    assert cache.total_hits > times // 2, "most must come from the cache"
    return out


def _through(cache: PacketCache, router: Router, wire: bytes) -> bytes:
    """What a UDP listener does with one datagram, without its socket."""
    entry = cache.young.entries.get(wire[2:]) or cache.find_other(wire)
    if entry is not None:
        ready = cache.repeat(entry, wire, 0.0)
        if ready is not None:
            entry.hits += 1
            return ready
    query = parse_query(wire, ("127.0.0.1", 5), "udp", 0.0)
    reply = router.resolve(query)
    assert isinstance(reply, Reply)
    out = render_reply(query, reply)
    if reply.keep > 0:
        cache.keep(wire, query, out, reply, 0.0)
    return out


def spelt(name: str, turn: int) -> str:
    """Return the name in other letters, as resolvers do that draw 0x20."""
    if turn == 0:
        return name
    return "".join(c.upper() if at * turn % 3 else c.lower() for at, c in enumerate(name, 1))


NAMES = [
    "s0.default.svc.cluster.local.", "s1.default.svc.cluster.local.",
    "S1.default.svc.Cluster.local.", "h.default.svc.cluster.local.",
    "_http._tcp.s0.default.svc.cluster.local.", "nosuch.default.svc.cluster.local.",
    "default.svc.cluster.local.", "cluster.local.", "s0.prod.svc.cluster.local.",
    "1.0.96.10.in-addr.arpa.", "7.0.244.10.in-addr.arpa.", "1-2-3-4.default.pod.cluster.local.",
]  # fmt: skip
ASK = st.tuples(
    st.just("ask"),
    st.sampled_from(NAMES),
    st.sampled_from([t.A, t.AAAA, t.SRV, t.TXT, t.SOA, t.PTR, t.HTTPS]),
    st.sampled_from([None, 512, 1232]),
    st.integers(0, 3),
)
CHANGE = st.one_of(
    st.tuples(st.just("service"), st.sampled_from(["s0", "s1", "nosuch"]), st.integers(0, 3)),
    st.tuples(st.just("slice"), st.sampled_from(["h", "s0"]), st.integers(0, 3)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(ASK, ASK, CHANGE), max_size=40))
def test_the_fast_answer_is_the_chains_answer_whatever_happens_between(
    steps: list[tuple[Any, ...]],
) -> None:
    head = service("h", ip="None")
    world: dict[str, object] = {"s0": service("s0", ip="10.96.0.1"), "h": head}
    slices: dict[str, object] = {}
    fast = kubernetes("pods insecure", *world.values())
    cx = make_setup()
    metered = build("prometheus", cx)
    router = Router({ROOT: Chain([*metered, fast])})
    cache = PacketCache()
    asked = 0
    for revision, (kind, name, number, *more) in enumerate(steps):
        if kind == "ask":
            size, turn = more
            cookie = [(10, b"%08d" % revision)] if turn == 2 else []
            edns = Edns(size, options=cookie) if size else None
            wire = render_query(revision, parse_name(spelt(name, turn)), number, edns=edns)
            oracle = kubernetes("pods insecure", *world.values(), *slices.values())
            oracle.records.serial = fast.records.serial
            plain = Router({ROOT: Chain([oracle])})
            query = parse_query(wire, ("127.0.0.1", 5), "udp", 0.0)
            expected = plain.resolve(query)
            assert isinstance(expected, Reply)
            assert _through(cache, router, wire) == render_reply(query, expected)
            asked += 1
            continue
        if kind == "service":
            if number == 0:
                world.pop(name, None)
            else:
                world[name] = service(name, ip=f"10.96.0.{number}")
        elif number == 0:
            slices.pop(name, None)
        else:
            slices[name] = slice_of(name, endpoint(f"10.244.0.{number + 6}"))
        now = snapshot(*world.values(), *slices.values(), changed_at=1700000000 + revision)
        deps = fast.publish(now, Changes(services=frozenset({("default", name)})), 0.0)
        if deps is None:
            cache.clear()
        else:
            cache.drop(deps)
    cache.settle()
    family = cx.metrics.families["coredns_dns_requests_total"]
    assert sum(cell.value for cell in family.cells.values()) == asked
