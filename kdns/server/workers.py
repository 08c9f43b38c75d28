"""The processes that answer in this one's place: started, fed, watched, replaced, added up.

Decides when a worker is given up and how soon another takes its place. This process has the
registry's sources, the gate, HTTP and the control socket, and holds every socket of every
worker: when one dies, what clients have sent lies in its sockets until its replacement reads
on. One that dies again and again is given time, and its sockets are closed meanwhile, so that
the kernel hands its share of the questions to the others. What a worker does is
kdns/worker.py's, how they talk is frames.py's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import site
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import kdns
from kdns.errors import ConfigError, Problem
from kdns.logs import JsonFormatter, LineHandler
from kdns.metrics import Metrics, Samples
from kdns.pipeline import Pipeline
from kdns.registry.mirror import delta_of, whole_of
from kdns.registry.snapshot import Changes, Snapshot
from kdns.server.frames import (
    Change,
    Count,
    Counted,
    End,
    Link,
    Order,
    Ping,
    Pong,
    Questions,
    Shown,
    Sockets,
    Taken,
    Watch,
    frame_of,
    read_up,
)
from kdns.server.listen import Listener, Place

log = logging.getLogger("kdns")

LOOK = 1.0  # seconds between two looks at each worker
SILENT = 5.0  # seconds without a word from one that serves, before it is given up
STARTING = 60.0  # seconds that one may take to start, or to take over a Corefile
AFTER_ALL = 0.2  # seconds more: if this process was stopped itself, answers lie in its buffers
MAX_WAITING = 64 << 20  # octets of changes that a worker may leave unread
COUNTING = 1.0  # seconds that a scrape waits for the workers' numbers
STEADY = 30.0  # seconds after which the end of a worker is not one of a row
PAUSES = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)  # seconds before a replacement, in a row of ends
ENDING = 3.0  # seconds that workers have to end

REQUESTS = "coredns_dns_requests_total"
# Of these metrics each worker has the same number: not added up.
SAME = frozenset(
    """coredns_build_info coredns_plugin_enabled coredns_reload_version_info
    coredns_hosts_entries coredns_hosts_reload_timestamp_seconds kdns_loop_detected
    kdns_forward_unusable_resolv_conf""".split()
)
# And these tell of what this process does for all.
OURS = frozenset(
    """kdns_revision kdns_source_last_event_age_seconds coredns_reload_failed_total
    coredns_kubernetes_dns_programming_duration_seconds""".split()
)


class Worker:
    """One process. Made on the event loop; `gone` is set when it has ended."""

    def __init__(self, number: int, moved: Callable[[], None], show: Callable[[str], None]) -> None:
        self.number = number
        self.gone = asyncio.Event()
        self.why = ""  # it was given up
        self.serving = False
        self.places: dict[Place, Listener] = {}  # whose sockets it has
        self.shown: dict[int, tuple[int, int]] = {}  # registry -> number and revision of Change
        self.samples: list[Samples] = []
        self.pinged: float | None = None
        self._moved = moved
        self._show = show
        self._orders: dict[int, asyncio.Future[str]] = {}
        self._counts: dict[int, asyncio.Future[None]] = {}
        self._since = time.monotonic()
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = _spawn(theirs)
        self.link = Link(ours, self._take, self._ended)

    @property
    def pid(self) -> int:
        return self._process.pid

    def order(self, order: Order) -> asyncio.Future[str]:
        """Have a Corefile served; the outcome is "" or why it is not."""
        answer = self._orders[order.number] = asyncio.get_running_loop().create_future()
        self._since = time.monotonic()
        self.link.send(frame_of(order))
        return answer

    def count(self, number: int) -> asyncio.Future[None]:
        """Ask for its numbers: `samples` has them when that is done."""
        answer = self._counts[number] = asyncio.get_running_loop().create_future()
        self.link.send(frame_of(Count(number)))
        return answer

    def look(self, now: float) -> None:
        """Ask whether it is still there; give it up if it did not say so for too long."""
        if self.link.waiting > MAX_WAITING:
            self.give_up(f"has left {MAX_WAITING >> 20} MB of changes unread")
        elif self.pinged is None:
            self.pinged = now
            self.link.send(frame_of(Ping()))
        elif now - max(self.pinged, self._since) > (SILENT if self._is_settled() else STARTING):
            asyncio.get_running_loop().call_later(AFTER_ALL, self._given_up, self.pinged, now)

    def _is_settled(self) -> bool:
        return self.serving and not self._orders

    def _given_up(self, pinged: float, now: float) -> None:
        if self.pinged == pinged and not self.gone.is_set():
            self.give_up(f"did not answer for {now - pinged:.0f} s")

    def give_up(self, why: str) -> None:
        """End it at once."""
        self.why = self.why or why
        self._process.kill()

    async def reap(self) -> str:
        """Return how the process ended."""
        self._process.kill()  # it may have closed its end and live on
        code = await asyncio.to_thread(self._process.wait)
        if self.why:
            return self.why
        if code >= 0:
            return f"ended with code {code}"
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(-code).name}"
        return f"was ended by signal {-code}"

    def _ended(self) -> None:
        self.serving = False
        self.gone.set()
        for order in self._orders.values():
            if not order.done():
                order.set_result("it has ended")
        for count in self._counts.values():
            if not count.done():
                count.set_result(None)
        self._orders.clear()
        self._counts.clear()
        self._moved()

    def _take(self, body: memoryview) -> None:
        match read_up(body):
            case Shown(registry, number, revision):
                self.shown[registry] = number, revision
                self._moved()
            case Pong():
                self.pinged = None
            case Questions(lines):
                for line in lines:
                    self._show(line)
            case Counted(number, samples):
                self.samples = samples
                count = self._counts.pop(number, None)
                if count is not None and not count.done():
                    count.set_result(None)
            case Taken(number, error):
                self.serving = self.serving or not error
                order = self._orders.pop(number, None)
                if order is not None and not order.done():
                    order.set_result(error)
                self._moved()


class Carried:
    """One registry on its way to the workers: a reader of its pipeline, which asks it how far
    they are (pipeline.Elsewhere)."""

    def __init__(self, number: int, pipeline: Pipeline, workers: Workers) -> None:
        self.number = number
        self.pipeline = pipeline
        self.changes = 0
        self._workers = workers
        self._begun = False
        pipeline.subscribe(self.publish)
        self._begun = True
        pipeline.elsewhere = self

    def end(self) -> None:
        """Nobody reads it any more."""
        self.pipeline.unsubscribe(self.publish)
        if self.pipeline.elsewhere is self:
            self.pipeline.elsewhere = None

    def publish(self, snapshot: Snapshot, changes: Changes, now: float) -> Sequence[Any]:
        """Pass a change on. There are no answers here that it could make wrong."""
        if not self._begun:
            return ()  # all there is; each worker is told that by itself
        self.changes += 1
        frame = b""
        for worker in self._having():
            if not frame:
                delta = delta_of(snapshot, changes, self.pipeline.gate_state)
                frame = frame_of(Change(self.number, self.changes, delta))
            worker.link.send(frame)
        return ()

    def tell_all(self, worker: Worker) -> None:
        """Give a worker all there is; from then on it gets the changes."""
        worker.shown[self.number] = -1, 0
        gate = self.pipeline.gate
        pieces = whole_of(
            self.pipeline.snapshot, self.pipeline.gate_state, () if gate is None else gate.held()
        )
        number = self.changes
        worker.link.send_each(frame_of(Change(self.number, number, one)) for one in pieces)

    def _having(self) -> list[Worker]:
        return [w for w in self._workers.present() if self.number in w.shown]

    def _late(self) -> list[int]:
        """Return the revisions of those that serve and do not show the last change yet."""
        shown = [w.shown[self.number] for w in self._having() if w.serving]
        return [revision for number, revision in shown if number < self.changes]

    def revision(self) -> int | None:
        """Return the revision that the last one of them shows; None: all show the newest."""
        return min(self._late(), default=None)

    async def settle(self) -> None:
        """Wait until all of them show what this process was told."""
        while self._late():
            await self._workers.moved()


class Workers:
    """All workers of one App.

    count -- how many; their seats are numbered from 0
    """

    def __init__(self, count: int, metrics: Metrics, show: Callable[[str], None]) -> None:
        self.count = count
        self._show = show
        self._seats: dict[int, Worker] = {}
        self._empty: set[int] = set()  # seats that wait for their next worker
        self._tasks: list[asyncio.Task[None]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._moves: list[asyncio.Future[None]] = []
        self._listeners: Mapping[Place, Listener] = {}
        self._carried: dict[Pipeline, Carried] = {}
        self._order: Order | None = None
        self._orders = self._counts = self._registries = 0
        self._started = False  # all have served once
        self._failed = ""  # and before that, why one does not
        self._end = asyncio.Event()
        self._watched = False
        self._uncounted: set[int] = set()  # said to be left out of the metrics
        # Of those that have ended, for no counter may fall.
        self._past: list[Samples] = []
        self._asked: dict[int, float] = dict.fromkeys(range(count), 0.0)
        metrics.gathered = self._gathered
        self._restarts = metrics.counter(
            "kdns_worker_restarts_total", "Workers that ended and were replaced.", ("worker",)
        )
        for number in range(count):
            self._restarts.labels(str(number))
        metrics.gauge("kdns_workers", "Processes that answer, of those there should be.").read = (
            lambda: [((), float(sum(w.serving for w in self.present())))]
        )
        asked = metrics.counter(
            "kdns_worker_requests_total", "DNS queries by the worker that answered.", ("worker",)
        )
        asked.read = self._requests

    # --- lifetimes --------------------------------------------------------------------------

    def start(self) -> None:
        """Start the processes. They wait for take()."""
        for number in range(self.count):
            self._begin(number)
            self._tasks.append(asyncio.create_task(self._keep(number)))
        self._look()

    async def stop(self) -> None:
        """End them all."""
        self._end.set()
        if self._timer is not None:
            self._timer.cancel()
        for carried in self._carried.values():
            carried.end()
        for worker in self.present():
            worker.link.send(frame_of(End()))
        if self._tasks:
            done, late = await asyncio.wait(self._tasks, timeout=ENDING)
            for worker in self.present():
                worker.give_up("did not end")
            if late:
                await asyncio.wait(late, timeout=ENDING)
            for task in self._tasks:
                task.cancel()
            for task in done:
                if not task.cancelled() and (error := task.exception()) is not None:
                    log.error("a bug in kdns while keeping a worker", exc_info=error)

    def present(self) -> list[Worker]:
        """Return those that have not ended."""
        return [w for _, w in sorted(self._seats.items()) if not w.gone.is_set()]

    def pids(self) -> list[int]:
        return [worker.pid for worker in self.present()]

    def _begin(self, number: int) -> Worker:
        worker = self._seats[number] = Worker(number, self._wake, self._show)
        if self._watched:
            worker.link.send(frame_of(Watch(True)))
        if self._order is not None:
            self._brief(worker)
            order = worker.order(self._order)
            order.add_done_callback(lambda outcome: self._outcome(worker, outcome.result()))
        return worker

    async def _keep(self, number: int) -> None:
        """Have somebody on a seat until the end."""
        ends = 0
        while True:
            began = time.monotonic()
            worker = self._seats[number]
            await worker.gone.wait()
            how = await worker.reap()
            self._leave(worker)
            if self._end.is_set():
                return
            if not self._started:
                self._failed = self._failed or f"worker {number} {how}"
                self._wake()
                return
            ends = 0 if time.monotonic() - began > STEADY else ends
            pause = PAUSES[min(ends, len(PAUSES) - 1)]
            ends += 1
            self._restarts.labels(str(number)).add()
            log.error(
                "worker %d (process %d) %s; another one takes its place%s",
                number, worker.pid, how, f" in {pause:g} s" if pause else "",
            )  # fmt: skip
            if pause:
                await self._rest(number, pause)
            if self._end.is_set():
                return
            self._begin(number)

    async def _rest(self, number: int, pause: float) -> None:
        """Leave a seat empty; what is asked meanwhile is the others'."""
        self._empty.add(number)
        self._close_empty()
        await self._ended_within(pause)
        while not self._end.is_set() and (why := self._bind_again(number)):
            log.error("worker %d does not get its sockets back: %s", number, why)
            await self._ended_within(PAUSES[-1])

    def _close_empty(self) -> None:
        for listener in self._listeners.values():
            for number in self._empty:
                listener.shared[number].close()

    async def _ended_within(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._end.wait()

    def _bind_again(self, number: int) -> str:
        for listener in self._listeners.values():
            if listener.shared[number].closed:
                try:
                    listener.bind_again(number)
                except OSError as e:
                    return f"{listener.place}: {e.strerror or e}"
        self._empty.discard(number)
        return ""

    def _leave(self, worker: Worker) -> None:
        """Keep what one that ended has counted."""
        self._past = summed([self._past, _lasting(worker.samples)])
        self._asked[worker.number] += _requests_in(worker.samples)
        self._uncounted.discard(worker.number)
        if self._seats.get(worker.number) is worker:
            del self._seats[worker.number]

    def _look(self) -> None:
        now = time.monotonic()
        for worker in self.present():
            worker.look(now)
        self._timer = asyncio.get_running_loop().call_later(LOOK, self._look)

    # --- what is served -----------------------------------------------------------------------

    async def take(
        self,
        conf: str | None,
        text: str,
        dns_port: int,
        registries: Iterable[Pipeline],
        listeners: Mapping[Place, Listener],
    ) -> None:
        """Have a Corefile served that was found good here. Raises ConfigError if at the start
        one of them cannot; later such a one is replaced."""
        self._listeners = listeners
        self._close_empty()
        numbers = self._carry(list(dict.fromkeys(registries)))
        self._orders += 1
        self._order = Order(self._orders, conf, text, dns_port, numbers)
        answers: dict[asyncio.Future[str], Worker] = {}
        for worker in self.present():
            self._brief(worker)
            answers[worker.order(self._order)] = worker
        for answer, worker in answers.items():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STARTING):
                    await asyncio.shield(answer)
            error = answer.result() if answer.done() else f"is not there after {STARTING:g} s"
            if self._started:
                self._outcome(worker, error)
            elif error:
                self._failed = self._failed or f"worker {worker.number}: {error}"
            if self._failed:
                raise ConfigError([Problem("workers", 0, self._failed)])
        if self._failed:
            raise ConfigError([Problem("workers", 0, self._failed)])
        self._started = True

    def _carry(self, registries: Sequence[Pipeline]) -> list[int]:
        """Return the registries' numbers; those that nobody reads any more are let go."""
        for pipeline in [one for one in self._carried if one not in registries]:
            self._carried.pop(pipeline).end()
        for pipeline in registries:
            if pipeline not in self._carried:
                self._registries += 1
                self._carried[pipeline] = Carried(self._registries, pipeline, self)
        return [self._carried[pipeline].number for pipeline in registries]

    def _brief(self, worker: Worker) -> None:
        """Give a worker the sockets and registries that it has not yet."""
        for place, listener in self._listeners.items():
            if worker.places.get(place) is not listener:
                _send_sockets(worker, listener)
        worker.places = dict(self._listeners)
        numbers = {carried.number for carried in self._carried.values()}
        worker.shown = {n: at for n, at in worker.shown.items() if n in numbers}
        for carried in self._carried.values():
            if carried.number not in worker.shown:
                carried.tell_all(worker)

    def _outcome(self, worker: Worker, error: str) -> None:
        if error and not worker.gone.is_set():
            worker.give_up(f"does not serve the Corefile: {error}")

    # --- how far they are -----------------------------------------------------------------------

    def why_not(self) -> str:
        """Return why not all of them answer, for /ready; empty if they do."""
        serving = sum(worker.serving for worker in self.present())
        return "" if serving == self.count else f"{serving} of {self.count} answer"

    async def moved(self) -> None:
        """Wait until one of them has come further."""
        move: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._moves.append(move)
        await move

    def _wake(self) -> None:
        moves, self._moves = self._moves, []
        for move in moves:
            if not move.done():
                move.set_result(None)

    # --- questions and numbers --------------------------------------------------------------------

    def watch(self, on: bool) -> None:
        """Have them show each question, or no more."""
        self._watched = on
        for worker in self.present():
            worker.link.send(frame_of(Watch(on)))

    async def count_all(self) -> None:
        """Get all their numbers, as of now. Of one that does not give them in time stay those
        it gave before."""
        self._counts += 1
        asked = {worker: worker.count(self._counts) for worker in self.present() if worker.serving}
        if not asked:
            return
        await asyncio.wait(asked.values(), timeout=COUNTING)
        for worker, answer in asked.items():
            late = not answer.done()
            if late and worker.number not in self._uncounted:
                log.warning(
                    "worker %d does not give its metrics in %g s: they are as they were before",
                    worker.number, COUNTING,
                )  # fmt: skip
            (self._uncounted.add if late else self._uncounted.discard)(worker.number)

    def _gathered(self, own: list[Samples]) -> list[Samples]:
        theirs = [[s for s in w.samples if s.name not in OURS] for w in self.present()]
        return summed([own, self._past, *theirs])

    def _requests(self) -> list[tuple[tuple[str, ...], float]]:
        now = dict(self._asked)
        for worker in self.present():
            now[worker.number] += _requests_in(worker.samples)
        return [((str(number),), value) for number, value in now.items()]


# --- adding up --------------------------------------------------------------------------------


def summed(parts: Iterable[Sequence[Samples]]) -> list[Samples]:
    """Return one family for each name: what is the same everywhere once, the rest added up."""
    found: dict[str, Samples] = {}
    for part in parts:
        for one in part:
            first = found.get(one.name)
            found[one.name] = one if first is None else _sum(first, one)
    return list(found.values())


def _sum(one: Samples, other: Samples) -> Samples:
    numbers = dict(one.numbers)
    for labels, value in other.numbers.items():
        here = numbers.get(labels, 0.0)
        numbers[labels] = max(here, value) if one.name in SAME else here + value
    histograms = dict(one.histograms)
    for labels, (counts, total) in other.histograms.items():
        mine, sum_ = histograms.get(labels, ([0] * len(counts), 0.0))
        histograms[labels] = [a + b for a, b in zip(mine, counts, strict=True)], sum_ + total
    return Samples(
        one.name, one.help, one.kind, one.labels, one.buckets, numbers, histograms
    )  # fmt: skip


def _lasting(samples: Sequence[Samples]) -> list[Samples]:
    """Return what counts on when its worker has ended."""
    return [one for one in samples if one.kind != "gauge" and one.name not in OURS]


def _requests_in(samples: Sequence[Samples]) -> float:
    return sum(sum(one.numbers.values()) for one in samples if one.name == REQUESTS)


# --- starting ---------------------------------------------------------------------------------


def _send_sockets(worker: Worker, listener: Listener) -> None:
    bound, place = listener.shared[worker.number], listener.place
    frame = frame_of(
        Sockets(
            place.scheme, place.address, place.port, listener.port,
            [replies_from for _, replies_from in bound.udp], len(bound.tcp),
        )
    )  # fmt: skip
    worker.link.send(frame, [sock.fileno() for sock in bound.every()])


def _spawn(link: socket.socket) -> subprocess.Popen[bytes]:
    """Start a worker whose log goes where ours goes."""
    handler = next((h for h in logging.getLogger().handlers if isinstance(h, LineHandler)), None)
    out = 2
    if handler is not None:
        with contextlib.suppress(OSError, ValueError):
            out = handler.stream.fileno()
    environ = dict(os.environ)
    if handler is not None and isinstance(handler.formatter, JsonFormatter):
        environ["KDNS_LOG_FORMAT"] = "json"
    home = os.path.dirname(os.path.dirname(os.path.abspath(kdns.__file__)))
    if home not in [*site.getsitepackages(), site.getusersitepackages()]:
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, [home, environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        # -P: what lies in the folder we were started in is no module of ours.
        [sys.executable, "-P", "-m", "kdns.worker", str(link.fileno()), str(out)],
        stdin=subprocess.DEVNULL, pass_fds=(link.fileno(), out), env=environ,
        process_group=0,  # Ctrl-C is for us; we tell them
    )  # fmt: skip
