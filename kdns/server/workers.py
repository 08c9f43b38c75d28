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
import errno
import itertools
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
STARTING = 60.0  # seconds that one may take to start, or work at taking over a Corefile
AFTER_ALL = 0.2  # seconds more: if this process was stopped itself, answers lie in its buffers
MAX_WAITING = 64 << 20  # octets of changes that a worker may leave unread
COUNTING = 1.0  # seconds that a scrape waits for the workers' numbers
STEADY = 30.0  # seconds after which the end of a worker is not one of a row
# Seconds before a replacement: in a row of ends, and of tries to start one.
PAUSES = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
REAPED = 0.01  # seconds between two looks whether a killed process has ended
ENDING = 3.0  # seconds that workers have to end

REQUESTS = "coredns_dns_requests_total"
# What lets a worker start that the system has refused.
WOULD_HELP = {
    errno.EMFILE: "raise kdns's limit of open files (ulimit -n, LimitNOFILE=)",
    errno.ENFILE: "raise fs.file-max, the host's limit of open files",
    errno.EAGAIN: "raise the limit of processes (ulimit -u, TasksMax=, a container's of pids)",
    errno.ENOMEM: "give kdns more memory",
    errno.EADDRINUSE: "end the program that has taken its port",
}
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
    """One process. Made on the event loop; `gone` is set when it has ended. Raises OSError if
    the system has no room for it."""

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
        self._worked = 0.0  # seconds of processor time, when last looked at
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = _spawn(theirs)
            self.link = Link(ours, self._take, self._ended)
        except BaseException:
            ours.close()  # which also ends a process that was begun
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def order(self, order: Order) -> asyncio.Future[str]:
        """Have a Corefile served; the outcome is "" or why it is not."""
        answer = self._orders[order.number] = asyncio.get_running_loop().create_future()
        self._since, self._worked = time.monotonic(), _time_worked(self.pid)
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
        else:
            if self.serving and self._orders:
                self._look_at_work(now)
            if now - max(self.pinged, self._since) > (SILENT if self.serving else STARTING):
                asyncio.get_running_loop().call_later(AFTER_ALL, self._given_up, self.pinged, now)

    def _look_at_work(self, now: float) -> None:
        """Where a reload reads a long file or compiles a large registry, no step of its loop
        comes to answer: that it works is the sign of life. Workers.take() has an end to it."""
        worked = _time_worked(self.pid)
        if worked > self._worked:
            self._since, self._worked = now, worked

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
        # No thread waits: where no process can be started, no thread can.
        while (code := self._process.poll()) is None:
            await asyncio.sleep(REAPED)
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
        # What those have counted that have left each seat.
        self._past: dict[int, list[Samples]] = {number: [] for number in range(count)}
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
        """Start the processes. They wait for take(). Raises ConfigError if one cannot be."""
        for number in range(self.count):
            try:
                self._begin(number)
            except OSError as e:
                raise ConfigError([Problem("workers", 0, _refused(number, e))]) from e
            self._tasks.append(task := asyncio.create_task(self._keep(number)))
            task.add_done_callback(_say_bug)
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
            _, late = await asyncio.wait(self._tasks, timeout=ENDING)
            for worker in self.present():
                worker.give_up("did not end")
            if late:
                await asyncio.wait(late, timeout=ENDING)
            for task in self._tasks:
                task.cancel()

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
            await self._replace(number, pause)
            if self._end.is_set():
                return

    async def _replace(self, number: int, pause: float) -> None:
        """Have another one on a seat. What the system refuses now it may give later: there is no
        last try, and each reason is said once."""
        said: set[int | None] = set()
        for tries in itertools.count(1):
            if pause:
                await self._rest(number, pause)
            if self._end.is_set():
                return
            try:
                self._bind_again(number)
                worker = self._begin(number)
            except OSError as e:
                if e.errno not in said:
                    said.add(e.errno)
                    log.error(
                        "%s; it is tried again, at least every %g s",
                        _refused(number, e), PAUSES[-1],
                    )  # fmt: skip
                pause = PAUSES[min(tries, len(PAUSES) - 1)]
                continue
            if said:
                log.info("worker %d (process %d) could be started now", number, worker.pid)
            return

    async def _rest(self, number: int, pause: float) -> None:
        """Leave a seat empty; what is asked meanwhile is the others'."""
        self._empty.add(number)
        self._close_empty()
        await self._ended_within(pause)

    def _close_empty(self) -> None:
        for listener in self._listeners.values():
            for number in self._empty:
                listener.shared[number].close()

    async def _ended_within(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._end.wait()

    def _bind_again(self, number: int) -> None:
        """Bind the sockets of a seat that was left empty. Raises OSError."""
        for listener in self._listeners.values():
            if listener.shared[number].closed:
                try:
                    listener.bind_again(number)
                except OSError as e:
                    raise OSError(e.errno, f"{listener.place}: {e.strerror or e}") from e
        self._empty.discard(number)

    def _leave(self, worker: Worker) -> None:
        """Keep what one that ended has counted."""
        self._past[worker.number] = self._counted(worker.number)
        self._uncounted.discard(worker.number)
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
        # Seat by seat: were past and present added up in another order, what is rounded could
        # fall by its last digit, which is a restart to who reads it.
        return summed([own, *(self._counted(number) for number in range(self.count))])

    def _requests(self) -> list[tuple[tuple[str, ...], float]]:
        return [((str(n),), _requests_in(self._counted(n))) for n in range(self.count)]

    def _counted(self, number: int) -> list[Samples]:
        """Return what those on a seat have counted. One that has just ended still sits there."""
        past, worker = self._past[number], self._seats.get(number)
        if worker is None:
            return past
        if worker.gone.is_set():
            return summed([past, _lasting(worker.samples)])
        return summed([past, [one for one in worker.samples if one.name not in OURS]])


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


def _refused(number: int, error: OSError) -> str:
    """Return which worker the system does not let start, why, and what would."""
    text = f"worker {number} cannot be started: {error.strerror or error}"
    right = WOULD_HELP.get(error.errno or 0)
    return f"{text}: {right}" if right else text


def _say_bug(keeping: asyncio.Task[None]) -> None:
    if not keeping.cancelled() and (error := keeping.exception()) is not None:
        log.error("a bug in kdns while keeping a worker", exc_info=error)


def _time_worked(pid: int) -> float:
    """Return the seconds of processor time that a process has used."""
    with contextlib.suppress(OSError):  # it has just ended
        return time.clock_gettime(~pid << 3 | 2)  # as clock_getcpuclockid(3) makes it
    return 0.0


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
