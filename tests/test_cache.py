"""`cache`: what is kept, for how long, what TTL is shown, and when it asks again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import FakeClock, a, build, cname, directives, errors_of, make_setup, question

from kdns.dns import types as t
from kdns.dns.message import AA, AD, CD, FOREVER, RA, RR, TC, Edns, Lease, Query, Reply, failure
from kdns.dns.name import ROOT, name_of, parse_name
from kdns.plugins import cache as cache_module
from kdns.plugins.cache import Cache, Store
from kdns.plugins.chain import Chain, Pending, Result, Router
from kdns.plugins.plugin import DROP, Ask, Drop, Forward, Outcome, Plugin
from kdns.plugins.setup import Setup
from kdns.server.exchange import Exchange

NAME = "www.example.org."


def soa(zone: str, ttl: int = 300) -> RR:
    rdata = parse_name("ns." + zone) + parse_name("host." + zone) + bytes(20)
    return RR(parse_name(zone), t.SOA, ttl, rdata)


def rr(name: str, rtype: int, rdata: bytes, ttl: int = 300) -> RR:
    return RR(parse_name(name), rtype, ttl, rdata)


def positive(ttl: int = 300, flags: int = RA, address: str = "192.0.2.1") -> Reply:
    return Reply(t.NOERROR, [a(NAME, address, ttl)], flags=flags)


def nxdomain(ttl: int = 300) -> Reply:
    return Reply(t.NXDOMAIN, [], [soa("example.org.", ttl)], flags=RA)


def nodata(ttl: int = 300) -> Reply:
    return Reply(t.NOERROR, [], [soa("example.org.", ttl)], flags=RA)


class Below(Plugin):
    """What stands below the cache: answers `outcome`, or what it says for the query."""

    word = "below"

    def __init__(self, outcome: Outcome | Callable[[Query], Outcome]) -> None:
        self.outcome = outcome
        self.asked: list[Query] = []

    def on_query(self, query: Query) -> Outcome:
        self.asked.append(query)
        found = self.outcome(query) if callable(self.outcome) else self.outcome
        if not isinstance(found, Reply):
            return found
        reply = found.copy()
        if not reply.is_written and reply.error is None:
            reply.served_by = self.word  # a SERVFAIL that an upstream sent
        return reply


class World:
    """A cache over a plugin that answers `below`; background refreshes are run when told to."""

    def __init__(
        self, text: str = "cache", below: Outcome | Callable[[Query], Outcome] = None
    ) -> None:
        self.clock = FakeClock()
        self.cx: Setup = make_setup(clock=self.clock)
        plugins = build(text, self.cx)
        assert self.cx.problems.found == []
        assert isinstance(plugins[0], Cache)
        self.cache = plugins[0]
        self._below = Below(positive() if below is None else below)
        self.asked = self._below.asked
        self.chain = Chain([self.cache, self._below])
        self.spawned: list[Callable[[], Result]] = []
        self.chain.spawn = self.spawned.append

    @property
    def below(self) -> Outcome | Callable[[Query], Outcome]:
        return self._below.outcome

    @below.setter
    def below(self, outcome: Outcome | Callable[[Query], Outcome]) -> None:
        self._below.outcome = outcome

    def run(self, query: Query | None = None) -> Result:
        return self.chain.run(query or question(NAME))

    def ask(self, query: Query | None = None) -> Reply:
        result = self.run(query)
        assert isinstance(result, Reply)
        return result

    def refresh(self) -> int:
        """Run what waits in the background; return how much that was."""
        calls, self.spawned[:] = list(self.spawned), []
        for call in calls:
            call()
        return len(calls)

    def count(self, name: str, *types: str) -> float:
        return self.cx.metrics.value(f"coredns_cache_{name}", "dns://:53", *types, ".", "")


def ttls(reply: Reply) -> list[int]:
    return [rr.ttl for part in (reply.answer, reply.authority, reply.additional) for rr in part]


# --- what is kept -------------------------------------------------------------------------

ALIAS = cname(NAME, "target.example.org.")
TARGET = a("Target.example.org.", "192.0.2.1")


@pytest.mark.parametrize(
    ("reply", "kept"),
    [
        (positive(), "success"),
        (Reply(t.NOERROR, [ALIAS, TARGET]), "success"),
        (Reply(t.NOERROR, [cname(NAME, "TARGET.example.org."), TARGET]), "success"),
        (Reply(t.NOERROR, [], [], [a("else.", "192.0.2.1")]), "success"),
        (Reply(t.NOERROR), "success"),
        (Reply(t.NOERROR, [], [rr("example.org.", t.NS, parse_name("ns."))]), "success"),
        (nodata(), "denial"),
        (nxdomain(), "denial"),
        (Reply(t.NOERROR, [ALIAS], [soa("example.org.")]), "denial"),
        (Reply(t.SERVFAIL), "denial"),
        (Reply(t.NOTIMP), "denial"),
        (Reply(t.NXDOMAIN), ""),
        (Reply(t.NXDOMAIN, [ALIAS], [soa("example.org.")]), ""),
        (Reply(t.NOERROR, [ALIAS]), ""),
        (Reply(t.NOERROR, [ALIAS, cname(NAME, "other.")]), ""),
        (Reply(t.NOERROR, [ALIAS, cname("target.example.org.", NAME), a(NAME, "192.0.2.1")]), ""),
        (Reply(t.NOERROR, [a("other.example.org.", "192.0.2.1")]), ""),
        (positive(flags=TC), ""),
        (Reply(t.REFUSED), ""),
        (Reply(t.FORMERR), ""),
    ],
)  # fmt: skip
def test_which_replies_are_kept(reply: Reply, kept: str) -> None:
    world = World(below=reply)
    world.ask()
    again = world.ask()
    assert len(world.asked) == (1 if kept else 2)
    assert again.rcode == reply.rcode
    assert world.count("entries", "success") == (kept == "success")
    assert world.count("entries", "denial") == (kept == "denial")
    assert world.count("requests_total") == 2
    assert world.count("misses_total") == len(world.asked)
    if kept:
        assert world.count("hits_total", kept) == 1
        assert again.flags & AA, "a hit always has AA"
        assert again.served_by == "cache"


@pytest.mark.parametrize("qtype", ["AXFR", "IXFR"])
def test_a_transfer_is_neither_kept_nor_changed(qtype: str) -> None:
    world = World(below=Reply(t.NOERROR, [soa("example.org.", 86400)]))
    for _ in range(2):
        assert ttls(world.ask(question("example.org.", qtype, proto="tcp"))) == [86400]
    assert len(world.asked) == 2


@pytest.mark.parametrize(
    ("other", "shared"),
    [
        (question("WWW.example.ORG."), True),
        (question(NAME, proto="tcp"), True),
        (question(NAME, rd=False), True),
        (question(NAME, client="192.0.2.9"), True),
        (question(NAME, edns=Edns(4096)), True),
        (question(NAME, "AAAA"), False),
        (question(NAME, edns=Edns(4096, do=True)), False),
        (question(NAME, qclass="CH"), False),
        (question("w.example.org."), False),
    ],
)
def test_which_questions_share_an_entry(other: Query, shared: bool) -> None:
    world = World()
    world.ask()
    world.ask(other)
    assert len(world.asked) == (1 if shared else 2)


def test_checking_disabled_has_entries_of_its_own() -> None:
    world = World()
    world.ask()
    query = question(NAME)
    query.flags |= CD
    world.ask(query)
    assert len(world.asked) == 2


def test_owner_names_keep_the_case_of_the_question_that_filled_the_cache() -> None:
    world = World(below=lambda q: Reply(t.NOERROR, [RR(q.name, t.A, 300, bytes(4))]))
    world.ask(question("WwW.example.org."))
    assert world.ask().answer[0].name == parse_name("WwW.example.org.")


@pytest.mark.parametrize(
    ("upstream", "first_ad", "second_ad", "seen"),
    [
        (AD, False, False, [0, 0]),
        (AD, False, True, [0, AD]),
        (AD, True, False, [AD, 0]),
        (0, True, True, [0, 0]),
    ],
)
def test_the_ad_bit_is_for_those_who_ask_for_it(
    upstream: int, first_ad: bool, second_ad: bool, seen: list[int]
) -> None:
    world = World(below=positive(flags=RA | upstream))
    found = []
    for wanted in (first_ad, second_ad):
        query = question(NAME)
        query.flags |= AD if wanted else 0
        found.append(world.ask(query).flags & AD)
    assert found == seen


def test_the_upstreams_opt_ends_at_the_cache() -> None:
    def answer(query: Query) -> Reply:
        reply = positive()
        reply.edns = Edns(1232, options=[(3, b"here")])
        return reply

    world = World(below=answer)
    assert [world.ask().edns, world.ask().edns] == [None, None]


# --- answers of an upstream ---------------------------------------------------------------


class Waiting:
    """An upstream that answers when told to (server/exchange.py's Upstreams)."""

    def __init__(self) -> None:
        self.askers: list[Callable[[Reply], None]] = []

    def send(self, forward: Forward, done: Callable[[Reply], None]) -> None:
        self.askers.append(done)

    def answer(self, reply: Reply) -> None:
        reply.upstream = "192.0.2.53:53"
        self.askers.pop(0)(reply)


def forwarding(text: str = "cache") -> World:
    return World(text, lambda query: Forward(None, query))


def test_an_answer_of_an_upstream_leaves_before_it_is_kept() -> None:
    world, upstream = forwarding(), Waiting()
    exchange = Exchange(Router({ROOT: world.chain}), upstream, world.cx.metrics)
    kept_then: list[float] = []

    def sent(outcome: Reply | Drop) -> None:
        kept_then.append(world.count("entries", store))

    for n, (reply, store) in enumerate(((positive(), "success"), (nxdomain(), "denial")), 1):
        query = question(f"n{n}.example.org.")
        reply.answer = [rr.owned_by(query.name) for rr in reply.answer]
        exchange.answer(query, sent)
        upstream.answer(reply)
        assert kept_then == [0] * n
        assert world.count("entries", store) == 1
        assert isinstance(exchange.answer(query, lambda outcome: None), Reply)
        assert world.count("hits_total", store) == 1


@pytest.mark.parametrize("what", ["the next question", "the next answer", "a change"])
def test_an_answer_of_an_upstream_is_kept_whatever_comes_next(what: str) -> None:
    """Also where nobody says that it has left."""
    world = forwarding()
    reply = positive()
    reply.upstream, reply.deps = "192.0.2.53:53", ("service",)
    pending, other = world.run(), world.run(question("other.example.org."))
    assert isinstance(pending, Pending) and isinstance(other, Pending)
    pending.resume(reply)
    match what:
        case "the next question":
            assert ttls(world.ask()) == [300]
        case "the next answer":
            other.resume(Reply(t.REFUSED))
            assert world.count("entries", "success") == 1
        case _:
            world.cache.invalidate(["service"])
            assert isinstance(world.run(), Pending)  # it is not true any more


def test_what_is_kept_of_an_upstreams_answer_is_not_what_a_plugin_above_makes_of_it() -> None:
    world = forwarding()
    reply = positive(flags=RA | AD)
    reply.upstream = "192.0.2.53:53"
    pending = world.run()
    assert isinstance(pending, Pending)
    shown = pending.resume(reply)
    assert isinstance(shown, Reply) and not shown.flags & AD
    shown.answer.clear()
    shown.rcode = t.REFUSED
    validating = question(NAME)
    validating.flags |= AD
    again = world.ask(validating)
    assert again.rcode == t.NOERROR and len(again.answer) == 1 and again.flags & AD


# --- TTLs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reply", "expected"),
    [
        ("cache 30", positive(3600), 30),
        ("cache 30", positive(30), 30),
        ("cache 30", positive(12), 12),
        ("cache 30", positive(0), 5),
        ("cache", positive(86400), 3600),
        ("cache 86400", positive(86400), 86400),
        ("cache", nxdomain(86400), 1800),
        ("cache 30", nxdomain(300), 30),
        ("cache", nxdomain(1), 5),
        ("cache {\n success 5000 100 50\n}", positive(10), 50),
        ("cache {\n success 5000 100 50\n}", positive(3000), 100),
        ("cache {\n success 5000 100 50\n}", nodata(10), 10),
        ("cache {\n denial 5000 100 50\n}", nodata(10), 50),
        ("cache {\n success 5000 100 0\n}", positive(0), 0),
        ("cache", Reply(t.SERVFAIL, [], [soa("example.org.")]), 5),
        ("cache {\n servfail 1m\n}", Reply(t.SERVFAIL, [], [soa("example.org.")]), 60),
        ("cache", Reply(t.REFUSED, [], [soa("example.org.", 77)]), 5),
        ("cache", Reply(t.NOERROR, [], [rr("a.", t.NS, parse_name("b."), 99)]), 5),
    ],
)
def test_the_ttl_shown_at_first(text: str, reply: Reply, expected: int) -> None:
    assert ttls(World(text, reply).ask()) == [expected]


def test_all_records_get_the_lowest_ttl() -> None:
    reply = Reply(
        t.NOERROR, [a(NAME, "192.0.2.1", 300)], [rr("example.org.", t.NS, parse_name("ns."), 20)],
        [a("ns.", "192.0.2.2", 4000)],
    )  # fmt: skip
    assert ttls(World(below=reply).ask()) == [20, 20, 20]


def test_ttls_count_down_and_the_entry_ends_with_them() -> None:
    world = World(below=positive(10))
    seen = []
    for moment in (0, 0.9, 1.0, 5.5, 9.99, 10.0):
        world.clock.now = 1000.0 + moment
        seen.append(ttls(world.ask())[0])
    assert seen == [10, 10, 9, 5, 1, 10]
    assert len(world.asked) == 2


def test_keepttl_shows_the_first_ttl_to_the_end() -> None:
    world = World("cache {\n keepttl\n}", positive(10))
    seen = []
    for moment in (0, 5, 9.99, 10.0):
        world.clock.now = 1000.0 + moment
        seen.append((ttls(world.ask())[0], len(world.asked)))
    assert seen == [(10, 1), (10, 1), (10, 1), (10, 2)]


def test_askers_do_not_share_lists_of_records() -> None:
    world = World()
    world.ask().answer.clear()
    world.ask().answer.clear()
    assert len(world.ask().answer) == 1


@pytest.mark.parametrize(("text", "asked"), [("cache", 1), ("cache {\n servfail 0\n}", 2)])
def test_servfail(text: str, asked: int) -> None:
    world = World(text, Reply(t.SERVFAIL))
    world.ask()
    world.clock.now += 4.9
    world.ask()
    assert len(world.asked) == asked
    world.clock.now += 0.1
    world.ask()
    assert len(world.asked) == asked + 1


def test_a_kept_answer_is_better_than_a_newer_servfail() -> None:
    """prefetch meets a SERVFAIL: clients go on getting the answer while it is fresh."""
    world = World("cache {\n prefetch 1 1m 90%\n}", positive(100))
    world.ask()
    world.clock.now += 20
    world.below = Reply(t.SERVFAIL)
    world.ask()
    assert world.refresh() == 1
    assert world.count("entries", "denial") == 1
    assert world.ask().rcode == t.NOERROR


# --- which names --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reply", "asked", "ttl"),
    [
        ("cache 30 example.org", positive(), 1, 30),
        ("cache 30 org", positive(), 1, 30),
        ("cache 30 example.net", positive(), 2, 300),
        ("cache 30 xample.org", positive(), 2, 300),
        ("cache 30 {\n disable success example.org\n}", positive(), 2, 30),
        ("cache 30 {\n disable success example.org\n}", nxdomain(), 1, 30),
        ("cache 30 {\n disable denial example.org\n}", nxdomain(), 2, 30),
        ("cache 30 {\n disable denial example.org\n}", positive(), 1, 30),
        ("cache 30 {\n disable success\n}", positive(), 2, 30),
        ("cache 30 {\n disable success a\n disable success org\n}", positive(), 2, 30),
    ],
)
def test_zones(text: str, reply: Reply, asked: int, ttl: int) -> None:
    """A zone that is not kept still has its TTLs set; one that is not the cache's has not."""
    world = World(text, reply)
    world.ask()
    assert ttls(world.ask()) == [ttl]
    assert len(world.asked) == asked


@pytest.mark.parametrize("ttl", [30, 28800])
def test_a_zone_node_of_a_zone_that_is_not_kept_may_still_be_repeated(ttl: int) -> None:
    node = positive(ttl)
    node.keep, node.deps = FOREVER, ("node",)
    world = World("cache 30 {\n disable success org\n}", node)
    reply = world.ask()
    assert (reply.keep, reply.deps, ttls(reply)) == (FOREVER, ("node",), [30])
    for cell, value in reply.tally or []:
        assert value is not None
        cell.add(value, 3)
    assert world.count("requests_total") == world.count("misses_total") == 4


def test_records_whose_ttl_is_right_already_are_not_made_anew() -> None:
    record = a(NAME, "192.0.2.1", 30)
    world = World("cache 30 {\n disable success org\n}", Reply(t.NOERROR, [record]))
    assert world.ask().answer[0] is record


# --- repeats from the packet cache --------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "age", "keep"),
    [
        ("cache", 0.0, 1.0),
        ("cache", 0.25, 0.75),
        ("cache", 7.5, 0.5),
        ("cache {\n keepttl\n}", 7.5, 292.5),
        ("cache {\n prefetch 5\n}", 0.25, 0.75),
        ("cache {\n prefetch 5 1m 10%\n}", 269.5, 0.5),
        ("cache {\n prefetch 5 1m 10%\n}", 270.5, 0.0),
        ("cache {\n prefetch 5 1m 10%\n keepttl\n}", 7.5, 0.5),
        ("cache {\n serve_stale\n}", 0.25, 0.75),
        ("cache {\n serve_stale\n}", 300.25, 0.0),
    ],
)
def test_a_hit_may_be_repeated_while_its_ttl_is_true(text: str, age: float, keep: float) -> None:
    world = World(text)
    first = world.ask()
    assert first.keep == 0.0, "the miss must not stand in for later hits"
    world.clock.now += age
    assert world.ask().keep == pytest.approx(keep)


def hit(world: World) -> Lease:
    """Fill the cache and return what lets the answer be repeated."""
    world.ask()
    lease = world.ask().lease
    assert lease is not None and lease.shown(world.clock.now) == 300
    return lease


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cache", {0.0: 300, 0.9: 300, 1.0: 299, 299.9: 1, 300.0: None}),
        ("cache {\n keepttl\n}", {0.0: 300, 299.9: 300, 300.0: None}),
        ("cache {\n prefetch 5 1m 10%\n}", {269.9: 31, 270.0: None}),
        ("cache {\n serve_stale\n}", {299.9: 1, 300.0: None}),
    ],
)
def test_the_ttl_a_repeat_shows(text: str, shown: dict[float, int | None]) -> None:
    lease = hit(World(text))
    assert {age: lease.shown(1000.0 + age) for age in shown} == shown


@pytest.mark.parametrize(
    "event",
    [
        lambda world: world.cache._success.remove((parse_name(NAME), t.A, t.IN, 0)),
        lambda world: world.cache.invalidate(None),
        # Answers that two questions under way brought, which differ in what is no part of a key.
        lambda world: world.cache.on_reply(question(NAME), positive(77)),
        lambda world: world.cache.on_reply(question(NAME), nxdomain()),
        lambda world: world.cache.on_reply(question(NAME), Reply(t.SERVFAIL, served_by="forward")),
    ],
    ids=["evicted", "its zone changed", "answered anew", "denied", "failed"],
)
def test_what_is_no_more_the_cached_answer_is_not_repeated(event: Callable[[World], Any]) -> None:
    reply = positive()
    reply.deps = ("node",)
    world = World(below=reply)
    lease = hit(world)
    event(world)
    assert lease.shown(world.clock.now) is None


def test_what_of_two_answers_is_the_better_is_looked_at_each_time() -> None:
    world = World("cache {\n serve_stale 1h\n serve_stale_policy prefer_positive\n}")
    world.ask()
    assert world.ask().lease is None


def test_an_answer_made_of_a_cached_one_lasts_no_longer_than_this_second() -> None:
    """Other answers may be part of it, too: `autopath` has seen that the names before do not
    exist."""

    class Asks(Plugin):
        def on_query(self, query: Query) -> Outcome:
            return Ask(query.asking(), lambda reply: reply, below=True)

    world = World()
    hit(world)
    reply = Chain([Asks(), *world.chain.plugins]).run(question(NAME))
    assert isinstance(reply, Reply)
    assert (reply.keep, reply.lease, reply.folds) == (1.0, None, None)


def test_repeats_are_counted_as_hits() -> None:
    world = World()
    world.ask()
    reply = world.ask()
    for cell, value in reply.tally or []:
        assert value is not None
        cell.add(value, 10)
    assert world.count("requests_total") == 12
    assert world.count("hits_total", "success") == 11
    assert world.count("misses_total") == 1


# --- prefetch -----------------------------------------------------------------------------


def test_a_popular_answer_is_fetched_anew_before_it_ends() -> None:
    world = World("cache {\n prefetch 3 1m 20%\n}", positive(100))
    for moment in (0, 10, 20, 70, 80):
        world.clock.now = 1000.0 + moment
        world.ask()
        assert world.spawned == [] or moment == 80
    world.below = positive(100, address="192.0.2.2")
    world.ask()
    assert world.refresh() == 1, "two askers, one refresh"
    assert world.asked[-1].proto == "tcp", "a truncated answer would not be kept"
    reply = world.ask()
    assert reply.answer[0].rdata == bytes((192, 0, 2, 2))
    assert ttls(reply) == [100]
    assert world.count("prefetch_total") == 1
    assert len(world.asked) == 2


@pytest.mark.parametrize(
    ("moments", "prefetched"),
    [((95,), False), ((50, 95), True), ((20, 95), False), ((50, 60, 89), False)],
)
def test_popular_means_asked_for_without_a_gap(moments: Sequence[float], prefetched: bool) -> None:
    world = World("cache {\n prefetch 2 1m 10%\n}", positive(100))
    world.ask()
    for moment in moments:
        world.clock.now = 1000.0 + moment
        world.ask()
    assert bool(world.spawned) is prefetched


def test_a_refresh_that_says_nothing_is_tried_again() -> None:
    world = World("cache {\n prefetch 1 1m 90%\n}", positive(100))
    world.ask()
    world.below = DROP
    for moment, expected in ((20, 1), (21, 0), (31, 1)):
        world.clock.now = 1000.0 + moment
        world.ask()
        assert world.refresh() == expected


# --- serve_stale --------------------------------------------------------------------------


def stale_world(options: str, **more: Any) -> World:
    world = World(f"cache {{\n serve_stale {options}\n}}", positive(100), **more)
    world.ask()
    world.clock.now += 150
    return world


def test_an_expired_answer_is_given_out_and_fetched_anew() -> None:
    world = stale_world("1h")
    world.below = positive(100, address="192.0.2.2")
    stale = world.ask()
    assert (stale.answer[0].rdata, ttls(stale)) == (bytes((192, 0, 2, 1)), [0])
    world.ask()
    assert world.refresh() == 1, "two askers, one refresh"
    fresh = world.ask()
    assert (fresh.answer[0].rdata, ttls(fresh)) == (bytes((192, 0, 2, 2)), [100])
    assert world.count("served_stale_total") == 2
    assert world.count("prefetch_total") == 1


@pytest.mark.parametrize(
    ("options", "age", "served"),
    [("", 3599, True), ("", 3600, False), ("10s", 9, True), ("10s", 10, False)],
)
def test_how_long_an_expired_answer_is_given_out(options: str, age: float, served: bool) -> None:
    world = World(f"cache {{\n serve_stale {options}\n}}", positive(100))
    world.ask()
    world.clock.now += 100 + age
    world.ask()
    assert (len(world.asked) == 1) is served


@pytest.mark.parametrize(
    ("refresh", "replaced"),
    [
        (positive(100, address="192.0.2.2"), True),
        (nxdomain(), True),
        (nodata(), True),
        (Reply(t.SERVFAIL), False),
        (Reply(t.REFUSED), False),
        (positive(100, flags=TC), False),
    ],
)
@pytest.mark.parametrize("mode", ["immediate", "verify"])
def test_only_an_answer_takes_the_place_of_a_stale_one(
    refresh: Reply, replaced: bool, mode: str
) -> None:
    world = stale_world(f"1h {mode}")
    world.below = refresh
    first = world.ask()
    world.refresh()
    second = world.ask()
    old = bytes((192, 0, 2, 1))

    def is_old(reply: Reply) -> bool:
        return bool(reply.answer) and reply.answer[0].rdata == old and reply.rcode == t.NOERROR

    assert is_old(first) is (mode == "immediate" or not replaced)
    assert is_old(second) is not replaced
    if not replaced:
        assert ttls(second) == [0]


@pytest.mark.parametrize(
    ("options", "ttl"),
    [("1h", 0), ("1h immediate 30s", 30), ("1h verify 0 7s", 7), ("1h verify 100ms 9s", 9)],
)
def test_the_ttl_of_stale_answers(options: str, ttl: int) -> None:
    world = stale_world(options)
    world.below = Reply(t.SERVFAIL)
    assert ttls(world.ask()) == [ttl]


@pytest.mark.parametrize("mode", ["immediate", "verify 0"])
def test_a_failed_refresh_is_not_tried_again_at_once(mode: str) -> None:
    world = stale_world(f"1h {mode} 0s 30s")
    world.below = Reply(t.SERVFAIL)
    for _ in range(3):
        world.ask()
        world.refresh()
    assert len(world.asked) == 2
    world.clock.now += 30
    world.ask()
    world.refresh()
    assert len(world.asked) == 3


def test_verify_with_a_timeout_answers_stale_and_still_takes_what_comes_later() -> None:
    world = stale_world("1h verify 100ms")
    forward = Forward("upstreams", question(NAME))
    world.below = forward
    result = world.run()
    assert isinstance(result, Pending)
    assert result.timeout == pytest.approx(0.1)
    assert result.expire is not None
    late = result.expire()
    assert isinstance(late, Reply)
    assert (late.answer[0].rdata, ttls(late)) == (bytes((192, 0, 2, 1)), [0])
    result.resume(positive(100, address="192.0.2.2"))
    world.below = Reply(t.SERVFAIL)
    assert world.ask().answer[0].rdata == bytes((192, 0, 2, 2))


def test_verify_in_time_answers_what_came() -> None:
    world = stale_world("1h verify 100ms")
    world.below = Forward("upstreams", question(NAME))
    result = world.run()
    assert isinstance(result, Pending)
    reply = result.resume(positive(3600, address="192.0.2.2"))
    assert isinstance(reply, Reply)
    assert (reply.answer[0].rdata, ttls(reply)) == (bytes((192, 0, 2, 2)), [3600])
    assert world.count("served_stale_total") == 0


@pytest.mark.parametrize("policy", [True, False])
def test_prefer_positive_keeps_an_answer_over_its_denial(policy: bool) -> None:
    option = " serve_stale_policy prefer_positive\n" if policy else ""
    world = World(f"cache {{\n serve_stale 1h\n{option}}}", positive(100))
    world.ask()
    world.clock.now += 150
    world.below = nxdomain()
    world.ask()
    world.refresh()
    assert world.count("entries", "denial") == 1
    assert world.ask().rcode == (t.NOERROR if policy else t.NXDOMAIN)


def test_prefer_positive_keeps_an_answer_over_an_empty_reply() -> None:
    world = World("cache {\n serve_stale 1h\n serve_stale_policy prefer_positive\n}", positive(100))
    world.ask()
    world.clock.now += 150
    for below in (Reply(t.NOERROR), Reply(t.NOERROR)):
        world.below = below
        world.ask()
        world.refresh()
    assert world.ask().answer != []
    world.below = positive(100, address="192.0.2.2")
    world.clock.now += 10
    world.ask()
    world.refresh()
    assert world.ask().answer[0].rdata == bytes((192, 0, 2, 2))


# --- answers of the registry --------------------------------------------------------------


def registry(query: Query) -> Reply:
    """abc. exists, other names do not."""
    if query.key == parse_name("abc."):
        reply = Reply(t.NOERROR, [RR(query.name, t.A, 30, bytes(4))])
    else:
        reply = nxdomain()
    reply.keep, reply.deps = FOREVER, ("node", "other")
    return reply


def test_an_entry_goes_when_the_zone_node_it_was_made_from_changes() -> None:
    world = World("cache 30", registry)
    for name in ("abc.", "nosuch."):
        world.ask(question(name))
    hit = world.ask(question("abc."))
    assert (hit.deps, hit.served_by) == (("node", "other"), "cache")
    world.cache.invalidate(["elsewhere"])
    assert world.ask(question("nosuch.")).served_by == "cache"
    world.cache.invalidate(iter(["node"]))
    assert world.count("entries", "success") == world.count("entries", "denial") == 0
    assert world.ask(question("abc.")).served_by == ""


def test_when_any_node_may_have_changed_only_foreign_answers_stay() -> None:
    world = World("cache 30")
    world.ask()
    world.below = registry
    world.ask(question("abc."))
    world.cache.invalidate(None)
    assert world.ask(question("abc.")).served_by == ""
    assert world.ask().served_by == "cache"


# --- bounds -------------------------------------------------------------------------------


@pytest.mark.parametrize(("capacity", "most"), [(1, 1024), (1024, 1024), (1400, 1280)])
def test_the_number_of_entries_is_bounded(capacity: int, most: int) -> None:
    world = World(
        f"cache {{\n success {capacity}\n}}",
        lambda q: Reply(t.NOERROR, [RR(q.name, t.A, 300, bytes(4))]),
    )
    for n in range(most + 100):
        world.ask(question(f"n{n}."))
    assert world.count("entries", "success") == most
    assert world.count("evictions_total", "success") == 100


def test_the_octets_of_all_entries_are_bounded() -> None:
    big = [RR(parse_name("big."), t.TXT, 300, b"\xff" + bytes(255)) for _ in range(200)]
    world = World(
        "cache {\n success 1024\n}",
        lambda q: Reply(t.NOERROR, [RR(q.name, t.TXT, 300, b"\0"), *big]),
    )
    for n in range(60):
        world.ask(question(f"n{n}.", "TXT"))
    room = 1024 * cache_module.OCTETS_PER_ENTRY
    assert 2 <= world.count("entries", "success") <= room // (200 * 256)


OPERATIONS = st.lists(
    st.tuples(st.sampled_from("aaari"), st.integers(0, 40), st.integers(0, 5)),
    max_size=200,
)


@given(OPERATIONS)
@settings(max_examples=60, deadline=None)
def test_a_store_agrees_with_a_plain_dict(operations: list[tuple[str, int, int]]) -> None:
    cx = make_setup()
    gauge = cx.metrics.gauge("entries", "").labels()
    store = Store(1024, cx.random, gauge, cx.metrics.counter("evicted_total", "").labels())
    model: dict[cache_module.Key, int] = {}
    for what, number, dep in operations:
        key = (name_of([b"n%d" % number]), t.A, t.IN, 0)
        if what == "a":
            reply = Reply(t.NOERROR, [RR(key[0], t.A, 5, bytes(4))], deps=(dep,))
            store.add(key, cache_module.Item(reply, 5, 0.0))
            model[key] = dep
        elif what == "r":
            store.remove(key)
            model.pop(key, None)
        else:
            store.invalidate([dep])
            model = {k: d for k, d in model.items() if d != dep}
        assert {k: item.deps for k, item in store.items.items()} == {
            k: (d,) for k, d in model.items()
        }
        assert gauge.value == len(model)
        assert set(store._costs) == set(model)


# --- mistakes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cache\ncache", "can only be used once per Server Block"),
        ("cache abc", "warning: 'abc' is not a TTL in seconds and is taken as a zone"),
        ("cache 30s", "must be a whole number of seconds without a unit (write 30)"),
        ("cache 0", "cache TTL can not be zero or negative: 0"),
        ("cache -5", "cache TTL can not be zero or negative: -5"),
        ("cache 30 a..b", "zone is not a valid domain name"),
        ("cache {\n foo\n}", "unknown property 'foo'"),
        ("cache {\n sucess 1\n}", "did you mean 'success'?"),
        ("cache {\n success\n}", "'success' needs an argument"),
        ("cache {\n success x\n}", "success capacity must be a whole number"),
        ("cache {\n success 1 0\n}", "cache TTL can not be zero"),
        ("cache {\n denial 1 1 -1\n}", "cache min TTL can not be negative: -1"),
        ("cache {\n denial 1 1 1 1\n}", "unexpected '1' after 'denial'"),
        ("cache {\n prefetch\n}", "'prefetch' needs an argument"),
        ("cache {\n prefetch -1\n}", "prefetch amount should be positive: -1"),
        ("cache {\n prefetch 1 x\n}", "'x' is not a duration"),
        ("cache {\n prefetch 1 1m 20\n}", "percentage must be written as 10%"),
        ("cache {\n prefetch 1 1m 95%\n}", "percentage should fall in range [10, 90]: 95"),
        ("cache {\n serve_stale x\n}", "'x' is not a duration"),
        ("cache {\n serve_stale 1h verfy\n}", "did you mean 'verify'?"),
        ("cache {\n serve_stale 1h immediate 1500ms\n}", "must be a whole number of seconds"),
        ("cache {\n serve_stale 1h immediate 1s 6m\n}", "may not be over 5 minutes"),
        ("cache {\n serve_stale 1h immediate 1s 1s 1s\n}", "unexpected '1s'"),
        ("cache {\n serve_stale_policy prefer_positive\n}", "requires serve_stale"),
        ("cache {\n serve_stale\n serve_stale_policy x\n}", "invalid serve_stale_policy: x"),
        ("cache {\n servfail 6m\n}", "caching of SERVFAIL may not be over 5 minutes"),
        ("cache {\n disable\n}", "'disable' needs an argument"),
        ("cache {\n disable succes\n}", "did you mean 'success'?"),
        ("cache {\n keepttl 1\n}", "unexpected '1' after 'keepttl'"),
    ],
)
def test_mistakes(text: str, said: str) -> None:
    (problem,) = errors_of(text)
    assert said in problem


@pytest.mark.parametrize(
    ("text", "zones", "said"),
    [
        ("cache example.org", ["."], []),
        ("cache com.", ["."], []),
        ("cache local", ["local."], []),
        ("cache 10.0.0.0/8", ["."], []),
        ("cache example.net", ["example.org."], ["neither a TTL in seconds nor a zone"]),
    ],
)
def test_a_first_argument_that_is_a_zone(text: str, zones: list[str], said: list[str]) -> None:
    found = errors_of(text, zones)
    assert len(found) == len(said)
    for problem, part in zip(found, said, strict=True):
        assert part in problem and "warning" in problem


def test_without_zones_those_of_the_server_block_are_cached() -> None:
    cx = make_setup(["example.org.", "Example.net."])
    (plugin,) = cache_module.setup(directives("cache"), cx)
    assert isinstance(plugin, Cache)
    assert plugin.rules.zones == (parse_name("example.org."), parse_name("example.net."))


def test_a_failure_that_is_nobodys_answer_is_not_kept() -> None:
    """CoreDNS: no upstream answered, so the next query tries again at once, without AA."""
    world = World("cache", failure(t.SERVFAIL, "no upstream answers"))
    assert [world.ask().flags & AA for _ in range(2)] == [0, 0]
    assert len(world.asked) == 2
