"""When each controller looks at what: queues of keys, retries, and "nothing left to do".

Decides order, repetition and back-off; what is done for a key is the controller's own. A key
is a promise to look at the present state once more: however often it is queued meanwhile, it
is looked at once, and never by two workers at the same time.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Hashable
from time import thread_time
from typing import Any, Final, NamedTuple, TypeAlias

from kdns.errors import ApiError

log = logging.getLogger("kdns.api.controllers")

# Returns the seconds after which to look again, None: when something happens.
Reconcile: TypeAlias = Callable[[str], Awaitable[float | None]]

# Keys worked on side by side, so that their writes share a commit (store.py).
WORKERS: Final = 8
# Back-off of a key that fails, seconds: the first, and at most.
FIRST_RETRY, LAST_RETRY = 0.005, 30.0
# Failures in a row after which settle() no longer waits for a key: it will not get better by
# waiting.
HOPELESS: Final = 4
# A key that keeps the loop for longer than LONG seconds rests REST times as long, MOST_REST at
# most, before the next look: a Service of 1,000 Pods that come up one by one is not written
# 1,000 times.
LONG: Final = 0.005
REST: Final = 3
MOST_REST: Final = 0.25
# What passes by looking again: somebody else was faster.
EXPECTED: Final = frozenset({404, 409})
# What the store says for all of us, once: it is closed, the disk is full.
SAID: Final = frozenset({503, 507})


class Work(NamedTuple):
    """One thing to look at. key -- "namespace/name", or whatever the controller calls it"""

    controller: str
    key: str


class _Timed:
    """Awaits something and counts the CPU seconds it takes from the loop."""

    __slots__ = ("_inner", "spent")

    def __init__(self, inner: Awaitable[float | None]) -> None:
        self._inner = inner
        self.spent = 0.0

    def __await__(self) -> Generator[Any, Any, float | None]:
        inner = self._inner.__await__()
        error: BaseException | None = None
        while True:
            begun = thread_time()
            try:
                # Of a coroutine: a generator, whatever Awaitable promises.
                waits = next(inner) if error is None else inner.throw(error)
            except StopIteration as end:
                answer: float | None = end.value
                return answer
            finally:
                self.spent += thread_time() - begun
            error = None
            try:
                yield waits
            except BaseException as thrown:
                error = thrown


class Runner:
    """Runs the reconcile functions of all controllers. Belongs to one event loop.

    clock -- seconds; what a controller wants to see again later is due by this clock
    """

    def __init__(self, clock: Callable[[], float], *, workers: int = WORKERS) -> None:
        self._clock = clock
        self._count = workers
        self._reconcilers: dict[str, Reconcile] = {}
        self._waiting: deque[Work] = deque()
        self._urgent: deque[Work] = deque()
        self._first: set[str] = set()  # controllers whose keys are urgent
        self._queued: set[Work] = set()
        self._running: set[Work] = set()
        self._again: set[Work] = set()  # queued while they run
        self._due: dict[Work, float] = {}
        self._heap: list[tuple[float, Work]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._failures: dict[Work, int] = {}
        self._retries: dict[Work, asyncio.TimerHandle] = {}
        self._rested: dict[Work, float] = {}  # resting until, by the loop's clock
        self._resting: dict[Work, asyncio.TimerHandle] = {}  # queued while they rest
        self._idle: deque[asyncio.Future[None]] = deque()  # workers that wait
        self._quiet: list[asyncio.Future[None]] = []  # settle() that waits
        self._task: asyncio.Task[None] | None = None

    def register(self, controller: str, reconcile: Reconcile, *, urgent: bool = False) -> None:
        """urgent -- its keys come before those of the others: names and traffic hang on them"""
        self._reconcilers[controller] = reconcile
        if urgent:
            self._first.add(controller)

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), name="kdns-controllers")

    async def stop(self) -> None:
        """End the workers; what they were writing is still written by the store."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        timers = [*self._retries.values(), *self._resting.values()]
        for handle in (*timers, *([self._timer] if self._timer else [])):
            handle.cancel()
        self._retries.clear()
        self._resting.clear()
        self._timer = None
        self._wake_settled()

    def queue(self, controller: str, key: Hashable) -> None:
        """Have a key looked at, soon."""
        self._add(Work(controller, key))  # type: ignore[arg-type]

    async def settle(self) -> None:
        """Wait until no controller has anything to do now. What is due later does not count,
        nor what has failed time and again."""
        while True:
            self._queue_due()
            if self._task is None or not self._busy():
                return
            waiter = asyncio.get_running_loop().create_future()
            self._quiet.append(waiter)
            await waiter

    # --- queue ------------------------------------------------------------------------

    def _add(self, work: Work) -> None:
        if work in self._running:
            self._again.add(work)
        elif work not in self._queued and not self._rests(work):
            self._queued.add(work)
            (self._urgent if work.controller in self._first else self._waiting).append(work)
            while self._idle:
                waiter = self._idle.popleft()
                if not waiter.done():
                    waiter.set_result(None)
                    break

    def _rests(self, work: Work) -> bool:
        """True if a key has to wait; it is queued when its rest is over."""
        until = self._rested.get(work)
        if until is None:
            return False
        if work in self._resting:
            return True
        loop = asyncio.get_running_loop()
        if until <= loop.time():
            del self._rested[work]
            return False
        self._resting[work] = loop.call_at(until, self._wake_rested, work)
        return True

    def _wake_rested(self, work: Work) -> None:
        self._resting.pop(work, None)
        self._rested.pop(work, None)
        self._add(work)

    async def _next(self) -> Work:
        while not (self._urgent or self._waiting):
            waiter = asyncio.get_running_loop().create_future()
            self._idle.append(waiter)
            await waiter
        work = (self._urgent or self._waiting).popleft()
        self._queued.discard(work)
        return work

    def _busy(self) -> bool:
        if self._queued or self._running or self._resting:
            return True
        return any(self._failures.get(work, 0) < HOPELESS for work in self._retries)

    def _wake_settled(self) -> None:
        waiters, self._quiet = self._quiet, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    # --- work -------------------------------------------------------------------------

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(self._count):
                group.create_task(self._work())

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            work = await self._next()
            self._running.add(work)
            self._forget_later(work)
            timed = _Timed(self._reconcilers[work.controller](work.key))
            try:
                after = await timed
            except Exception as error:
                self._failed(work, error)
            else:
                self._failures.pop(work, None)
                if after is not None:
                    self._put_off(work, after)
            finally:
                self._running.discard(work)
            if timed.spent > LONG:
                self._rested[work] = loop.time() + min(timed.spent * REST, MOST_REST)
            if work in self._again:
                self._again.discard(work)
                self._add(work)
            if self._quiet and not self._busy():
                self._wake_settled()
            # A store in memory answers at once: others are to have their turn as well.
            await asyncio.sleep(0)

    def _failed(self, work: Work, error: Exception) -> None:
        count = self._failures[work] = self._failures.get(work, 0) + 1
        delay = min(FIRST_RETRY * 2 ** min(count - 1, 20), LAST_RETRY)
        code = error.code if isinstance(error, ApiError) else 0
        if code in SAID or (code in EXPECTED and count < HOPELESS):
            log.debug("%s %s: %s; again", work.controller, work.key, error)
        elif code:
            log.warning("%s %s: %s; again in %.3g s", work.controller, work.key, error, delay)
        else:
            log.error(
                "%s %s failed; again in %.3g s", work.controller, work.key, delay, exc_info=error
            )
        loop = asyncio.get_running_loop()
        self._retries[work] = loop.call_later(delay, self._retry, work)

    def _retry(self, work: Work) -> None:
        self._retries.pop(work, None)
        self._add(work)

    # --- later ------------------------------------------------------------------------

    def _put_off(self, work: Work, seconds: float) -> None:
        due = self._clock() + seconds
        self._due[work] = due
        heapq.heappush(self._heap, (due, work))
        self._arm()

    def _forget_later(self, work: Work) -> None:
        """What is looked at now says anew when to look again."""
        self._due.pop(work, None)
        handle = self._retries.pop(work, None)
        if handle is not None:
            handle.cancel()

    def _queue_due(self) -> None:
        now = self._clock()
        while self._heap:
            due, work = self._heap[0]
            if self._due.get(work) != due:  # looked at since
                heapq.heappop(self._heap)
            elif due <= now:
                heapq.heappop(self._heap)
                del self._due[work]
                self._add(work)
            else:
                break

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._heap and self._task is not None:
            wait = max(self._heap[0][0] - self._clock(), 0.001)
            self._timer = asyncio.get_running_loop().call_later(wait, self._ring)

    def _ring(self) -> None:
        self._timer = None
        self._queue_due()
        self._arm()
