"""When the kernel is written: the loop with a dataplane of paper and a clock moved by hand."""

from __future__ import annotations

import asyncio
import heapq
import logging
import math
from collections.abc import Awaitable, Callable, Collection

import pytest

from kdns.errors import ApplyError
from kdns.kernel.sync import Clock, SyncLoop, Timing
from kdns.metrics import HistogramCell, Metrics
from kdns.proxy.health import NodeHealth
from kdns.proxy.table import ForwardingTable
from kdns.registry.objects import Key

A, B, C = ("ns", "a"), ("ns", "b"), ("ns", "c")
DEFAULT = Timing()
BUSY = ApplyError("iptables-restore", "the lock is held", busy=True)
BROKEN = ApplyError("iptables-restore", "line 3 failed")


class HandClock(Clock):
    """Time moves only by advance(); what waits is woken on the way, in order."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._waiting: list[tuple[float, int, asyncio.Event]] = []
        self._count = 0

    def monotonic(self) -> float:
        return self.now

    def unix(self) -> float:
        return self.now + 1_700_000_000

    async def wait(self, event: asyncio.Event, seconds: float) -> None:
        if seconds != math.inf:
            self._count += 1
            heapq.heappush(self._waiting, (self.now + seconds, self._count, event))
        await event.wait()

    async def advance(self, seconds: float) -> None:
        until = self.now + seconds
        await settle()
        while self._waiting and self._waiting[0][0] <= until:
            self.now, _, event = heapq.heappop(self._waiting)
            event.set()
            await settle()
        self.now = until
        await settle()


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(20):
        await asyncio.sleep(0)


class Paper:
    """A dataplane that notes what it was asked, and takes `takes` seconds for it.

    fails -- errors of the next syncs; found -- results of the next verifications
    """

    def __init__(self, clock: HandClock) -> None:
        self.clock = clock
        self.takes = 0.0
        self.fails: list[Exception] = []
        self.found: list[bool | Exception] = []
        self.syncs: list[tuple[float, set[Key], bool]] = []
        self.revision = 0
        self.verified: list[float] = []
        self.at_once = 0

    async def sync(self, table: ForwardingTable, changed: Collection[Key], full: bool) -> None:
        self.at_once += 1
        assert self.at_once == 1, "two syncs at a time"
        self.syncs.append((self.clock.now - 1000, set(changed), full))
        if self.takes:
            await self.clock.wait(asyncio.Event(), self.takes)
        self.at_once -= 1
        if self.fails:
            raise self.fails.pop(0)
        self.revision = table.revision

    async def verify(self) -> bool:
        self.verified.append(self.clock.now - 1000)
        found = self.found.pop(0) if self.found else True
        if isinstance(found, Exception):
            raise found
        return found

    async def cleanup(self) -> None:
        raise AssertionError("nobody asked to clean up")


class Bench:
    """A loop at work."""

    def __init__(self, timing: Timing) -> None:
        self.timing = timing
        self.clock = HandClock()
        self.paper = Paper(self.clock)
        self.metrics = Metrics()
        self.told: list[tuple[int, set[Key], bool]] = []
        self.loop = SyncLoop(self.paper, 4, self.metrics, timing, self._synced, self.clock)
        self.revision = 0

    def _synced(self, table: ForwardingTable, changed: frozenset[Key], full: bool) -> None:
        self.told.append((table.revision, set(changed), full))

    def request(self, *changed: Key, full: bool = False, endpoints: int = 0) -> None:
        self.revision += 1
        table = ForwardingTable(4, self.revision, endpoints=endpoints)
        self.loop.request(table, changed, full=full, services=len(changed))

    def healthy(self) -> bool:
        return NodeHealth(2 * self.timing.sync_period, {4: self.loop}).healthy(self.clock.unix())


def scenario(story: Callable[[Bench], Awaitable[None]], timing: Timing = DEFAULT) -> Bench:
    """Run a story with a loop that is closed at its end."""

    async def play() -> Bench:
        bench = Bench(timing)
        task = asyncio.create_task(bench.loop.run())
        await settle()
        await story(bench)
        closing = asyncio.create_task(bench.loop.close())
        await bench.clock.advance(100)
        await closing
        await task
        return bench

    return asyncio.run(play())


# --- changes --------------------------------------------------------------------------


def test_nothing_is_written_before_the_first_request() -> None:
    async def story(bench: Bench) -> None:
        await bench.clock.advance(3600)
        assert not bench.paper.syncs
        assert not bench.paper.verified
        assert bench.healthy()

    scenario(story)


def test_the_first_sync_is_full_and_a_single_change_goes_at_once() -> None:
    async def story(bench: Bench) -> None:
        bench.request(A, B)
        await settle()
        assert bench.paper.syncs == [(0, {A, B}, True)]
        await bench.clock.advance(10)
        bench.request(C)
        await settle()
        assert bench.paper.syncs[1:] == [(10, {C}, False)]
        assert bench.told == [(1, {A, B}, True), (2, {C}, False)]

    scenario(story)


def test_a_burst_during_a_sync_is_one_next_sync() -> None:
    async def story(bench: Bench) -> None:
        bench.paper.takes = 0.2
        bench.request(A)
        await settle()
        for key in (B, C, B, A, C):
            bench.request(key)
        await bench.clock.advance(5)
        assert [(keys, full) for _, keys, full in bench.paper.syncs] == [
            ({A}, True),
            ({A, B, C}, False),
        ]
        assert bench.paper.revision == 6

    scenario(story)


def test_a_service_that_flaps_100_times_a_second_takes_half_of_the_time_at_most() -> None:
    async def story(bench: Bench) -> None:
        bench.request(A)
        await bench.clock.advance(10)
        bench.paper.takes = 0.05
        for _ in range(6000):
            bench.request(A)
            await bench.clock.advance(0.01)
        await bench.clock.advance(5)
        busy = (len(bench.paper.syncs) - 1) * 0.05
        assert 20 < busy <= 31, "one minute, and a little"
        assert bench.paper.revision == bench.revision, "the last state is written"

    scenario(story)


def test_a_change_just_after_a_long_cold_start_does_not_wait_long() -> None:
    async def story(bench: Bench) -> None:
        bench.paper.takes = 6.0
        bench.request(A)
        await bench.clock.advance(6.0)
        bench.paper.takes = 0.0
        bench.request(B)
        await bench.clock.advance(1)
        assert bench.paper.syncs[1:] == [(6.5, {B}, False)]

    scenario(story)


def test_min_sync_period_counts_from_the_end_of_one_to_the_start_of_the_next() -> None:
    async def story(bench: Bench) -> None:
        bench.paper.takes = 2.0
        bench.request(A)
        await settle()
        bench.request(B)
        await bench.clock.advance(11.9)
        assert len(bench.paper.syncs) == 1
        await bench.clock.advance(0.2)
        assert bench.paper.syncs[1:] == [(12, {B}, False)]

    scenario(story, Timing(min_sync_period=10))


def test_the_nodes_new_labels_ask_for_a_full_sync() -> None:
    async def story(bench: Bench) -> None:
        bench.request(A)
        await bench.clock.advance(1)
        bench.request(full=True)
        await settle()
        assert bench.paper.syncs[1:] == [(1, set(), True)]

    scenario(story)


@pytest.mark.parametrize(("endpoints", "full"), ((1000, True), (1001, False)))
def test_a_sync_an_hour_after_the_last_full_one_is_full_unless_large(
    endpoints: int, full: bool
) -> None:
    async def story(bench: Bench) -> None:
        bench.request(A)
        await bench.clock.advance(3599)
        bench.request(B, endpoints=endpoints)
        await bench.clock.advance(2)
        bench.request(C, endpoints=endpoints)
        await settle()
        assert [kind for _, _, kind in bench.paper.syncs] == [True, False, full]

    scenario(story)


# --- verification ---------------------------------------------------------------------


def test_rules_are_verified_every_sync_period_and_repaired_when_changed() -> None:
    async def story(bench: Bench) -> None:
        bench.paper.found = [True, False]
        bench.request(A)
        await bench.clock.advance(59)
        assert bench.paper.verified == [30]
        await bench.clock.advance(2)
        assert bench.paper.verified == [30, 60]
        assert bench.paper.syncs[1:] == [(60, set(), True)]
        assert bench.told[1:] == [(1, set(), True)]
        await bench.clock.advance(30)
        assert bench.paper.verified == [30, 60, 90]
        name = "kdns_proxy_verifications_total"
        assert bench.metrics.value(name, "IPv4", "same") == 2
        assert bench.metrics.value(name, "IPv4", "changed") == 1

    scenario(story)


def test_changes_that_keep_coming_do_not_put_verification_off() -> None:
    async def story(bench: Bench) -> None:
        for _ in range(100):
            bench.request(A)
            await bench.clock.advance(1)
        assert bench.paper.verified == [30, 60, 90]

    scenario(story)


def test_a_verification_that_fails_is_no_sign_that_rules_are_gone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def story(bench: Bench) -> None:
        bench.paper.found = [BUSY, KeyError("a bug")]
        bench.request(A)
        await bench.clock.advance(100)
        assert bench.paper.verified == [30, 60, 90]
        assert len(bench.paper.syncs) == 1

    scenario(story)
    assert "could not be verified: iptables-restore: the lock is held" in caplog.text
    assert "Traceback" in caplog.text


# --- failures -------------------------------------------------------------------------


def test_a_lock_that_is_held_is_tried_again_soon_and_ever_later() -> None:
    async def story(bench: Bench) -> None:
        bench.request(A)
        await bench.clock.advance(1)
        bench.paper.fails = [BUSY] * 12
        bench.request(B)
        await bench.clock.advance(125)
        times = [when - 1 for when, _, _ in bench.paper.syncs[1:]]
        assert times == pytest.approx(
            [0, 0.1, 0.3, 0.7, 1.5, 3.1, 6.3, 12.7, 25.5, 51.1, 81.1, 111.1]
        )
        assert {full for _, _, full in bench.paper.syncs[2:]} == {True}
        assert not bench.healthy()
        await bench.clock.advance(30)
        assert bench.told[1:] == [(2, {B}, True)]
        assert bench.healthy()

    scenario(story)


def test_a_partial_sync_that_fails_is_followed_by_a_full_one_at_once() -> None:
    async def story(bench: Bench) -> None:
        bench.request(A)
        await bench.clock.advance(1)
        bench.paper.fails = [BROKEN]
        bench.request(B)
        await settle()
        assert bench.paper.syncs[1:] == [(1, {B}, False), (1, {B}, True)]

    scenario(story)


def test_a_full_sync_that_fails_is_tried_again_after_the_sync_period_or_a_change() -> None:
    async def story(bench: Bench) -> None:
        bench.paper.fails = [BROKEN] * 3
        bench.request(A)
        await bench.clock.advance(29)
        assert len(bench.paper.syncs) == 1
        await bench.clock.advance(2)
        assert len(bench.paper.syncs) == 2
        bench.request(B)  # at 31 s; the second failure holds changes back for 2 s
        await bench.clock.advance(1)
        assert [when for when, _, _ in bench.paper.syncs] == [0, 30, 32]
        await bench.clock.advance(30)
        assert bench.paper.syncs[3:] == [(62, {A, B}, True)]
        assert bench.told == [(2, {A, B}, True)]

    scenario(story)


def test_changes_that_keep_coming_while_all_fails_do_not_make_it_spin() -> None:
    async def story(bench: Bench) -> None:
        bench.paper.fails = [BROKEN] * 1000
        for _ in range(600):
            bench.request(A)
            await bench.clock.advance(0.1)
        assert len(bench.paper.syncs) == 6  # at 0, 1, 3, 7, 15, 31 s

    scenario(story)


def test_a_bug_does_not_end_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    async def story(bench: Bench) -> None:
        bench.paper.fails = [KeyError("ours")]
        bench.request(A)
        await bench.clock.advance(31)
        assert bench.told == [(1, {A}, True)]

    scenario(story)
    assert "Traceback" in caplog.text
    assert "KeyError: 'ours'" in caplog.text


def test_a_bug_in_what_follows_a_sync_does_not_end_the_loop(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def story(bench: Bench) -> None:
        del bench.told  # so _synced() fails
        bench.request(A)
        await settle()
        bench.request(B)
        await settle()
        assert len(bench.paper.syncs) == 2, "and the rules count as written"

    scenario(story)
    assert "what follows a sync failed" in caplog.text


def test_health_goes_with_a_change_that_waits_too_long_and_comes_back() -> None:
    async def story(bench: Bench) -> None:
        bench.request(A)
        await bench.clock.advance(1000)
        assert bench.healthy(), "nothing waits"
        bench.paper.takes = 100.0
        bench.request(B)
        await bench.clock.advance(59)
        bench.request(C)
        assert bench.healthy()
        await bench.clock.advance(2)
        assert not bench.healthy(), "B is not written yet"
        assert bench.loop.last_synced == 1_700_001_000
        assert bench.loop.last_queued == 1_700_000_000 + 2059
        bench.paper.takes = 0.0
        await bench.clock.advance(50)
        assert bench.healthy()

    scenario(story)


# --- ending, numbers ------------------------------------------------------------------


def test_close_lets_the_write_under_way_finish_and_starts_no_other() -> None:
    async def story(bench: Bench) -> None:
        bench.paper.takes = 5.0
        bench.request(A)
        await settle()
        bench.request(B)

    bench = scenario(story)
    assert bench.paper.syncs == [(0, {A}, True)]
    assert bench.told == [(1, {A}, True)]


def test_a_loop_that_never_ran_can_be_closed() -> None:
    async def close() -> None:
        await Bench(Timing()).loop.close()

    asyncio.run(close())


def test_metrics_have_kube_proxys_names() -> None:
    async def story(bench: Bench) -> None:
        bench.paper.takes = 0.25
        bench.request(A, B)
        await bench.clock.advance(0.1)
        assert bench.metrics.value(f"{name}_service_changes_pending", "IPv4") == 2
        bench.request(C)
        await bench.clock.advance(0.2)
        assert bench.metrics.value(f"{name}_service_changes_pending", "IPv4") == 1
        await bench.clock.advance(10)

    name = "kubeproxy_sync_proxy_rules"
    bench = scenario(story)
    value = bench.metrics.value
    assert value(f"{name}_service_changes_pending", "IPv4") == 0
    assert value(f"{name}_service_changes_total", "IPv4") == 3
    assert value(f"{name}_last_queued_timestamp_seconds", "IPv4") == 1_700_001_000.1
    assert value(f"{name}_last_timestamp_seconds", "IPv4") == pytest.approx(1_700_001_000.75)
    for kind, count in (("sync", 2), ("sync_full", 1), ("sync_partial", 1)):
        family = bench.metrics.families[f"kubeproxy_{kind}_proxy_rules_duration_seconds"]
        cell = family.labels("IPv4")
        assert isinstance(cell, HistogramCell)
        assert sum(cell.counts) == count
        assert cell.sum == pytest.approx(0.25 * count)
        assert cell.bounds[0] == 0.001
        assert len(cell.bounds) == 15


def test_the_clock_of_the_machine_waits_for_an_event_or_its_time() -> None:
    async def wait() -> None:
        clock, event = Clock(), asyncio.Event()
        await clock.wait(event, 0.001)
        event.set()
        await clock.wait(event, math.inf)
        assert clock.unix() > clock.monotonic() > 0

    asyncio.run(asyncio.wait_for(wait(), 10))


def test_a_failure_says_which_family_and_when_it_is_tried_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def story(bench: Bench) -> None:
        bench.paper.fails = [BROKEN]
        bench.request(A)
        await bench.clock.advance(31)

    caplog.set_level(logging.INFO, "kdns.proxy")
    scenario(story)
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "IPv4: sync failed, the rules before stay; next attempt in 30.0 s at the latest:"
        " iptables-restore: line 3 failed",
        "IPv4: rules written again",
    ]
