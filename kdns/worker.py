"""A process that answers for another one (server/workers.py): `python -m kdns.worker`.

An App that takes sockets instead of opening them, a registry from its parent instead of a
source, and leaves HTTP, the control socket and looking at the Corefile to it. Decides nothing
about answers. It ends when its parent says so, or is no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import socket
import stat
import sys
from collections.abc import Callable
from typing import Any

from kdns.app import App, host_search
from kdns.errors import ConfigError, Problem
from kdns.logs import setup_logging
from kdns.metrics import Metrics
from kdns.pipeline import Pipeline
from kdns.plugins.plugin import Feed
from kdns.registry.mirror import Mirror
from kdns.registry.snapshot import Changes, Snapshot, joined
from kdns.registry.spec import Spec
from kdns.runtime import raise_file_limit, take_turns_often
from kdns.server import listen
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
    read_down,
)
from kdns.server.http import HttpServer
from kdns.server.listen import Listener, Place
from kdns.server.loop import run_answering
from kdns.site import Site, build_site, read_corefile

log = logging.getLogger("kdns")

PR_SET_PDEATHSIG = 1
MAX_LINES = 2000  # of the query tap, on their way; more are lost, and that is told
MAX_UNREAD = 4 << 20  # octets of them that the parent has not read


class _Registry:
    """A registry of the parent's as it is here."""

    def __init__(self) -> None:
        self.mirror = Mirror()
        self.complete = asyncio.Event()
        self.pipeline: Pipeline | None = None
        self.latest: tuple[Snapshot, Changes] | None = None


class WorkerApp(App):
    """The App of a worker."""

    def __init__(self, order: Order, desk: Desk) -> None:
        super().__init__(
            order.conf, text=order.text, dns_port=order.dns_port, follow=self._follow_parent
        )
        self._desk = desk
        self._order = order
        self._numbers: dict[Spec, int] = {}

    async def take(self, order: Order) -> str:
        """Serve another Corefile; return why not, empty if it is served."""
        before = self._order, self.text, self._numbers
        self._order, self.text = order, order.text
        try:
            await self._switch(self._build())
        except ConfigError as e:
            self._order, self.text, self._numbers = before
            return str(e)
        except Exception as e:
            log.exception("a bug in kdns while a worker reloads; please report it")
            return f"{type(e).__name__}: {e}"
        return ""

    def _build(self) -> Site:
        assert self.text is not None
        corefile, problems = read_corefile(self.conf, self.text, self.dns_port, os.environ)
        site = build_site(corefile, problems, self.metrics, host_search())
        # The parent has said what is to be said of it. Registries go by their order.
        specs = site.registries()
        if len(specs) != len(self._order.registries):
            file = corefile.files[0] if corefile.files else ""
            raise ConfigError([Problem(file, 0, "it is not what the parent has read")])
        self._numbers = dict(zip(specs, self._order.registries, strict=True))
        return site

    async def _follow_parent(self, spec: Spec, pipeline: Pipeline, metrics: Metrics) -> None:
        """Be the source of a registry: for as long as it is read, and once."""
        number = self._numbers[spec]
        registry = self._desk.registry(number)
        pipeline.states = registry.mirror.state
        registry.pipeline = pipeline
        if registry.latest is not None:
            pipeline.take_over(*registry.latest)
            registry.latest = None
        try:
            await asyncio.Event().wait()
        finally:
            self._desk.forget(number)

    async def _wait_synced(self, site: Site, feeds: list[tuple[Pipeline, Feed]]) -> None:
        """The parent has waited for the source; wait for what it has, all of it."""
        for number in self._order.registries:
            await self._desk.registry(number).complete.wait()
        await asyncio.sleep(0)  # the sources' tasks have passed it on

    async def _open_listener(self, listener: Listener, context: Any) -> None:
        bound = self._desk.sockets.pop(listener.place, None)
        if bound is None:
            raise ConfigError([Problem(str(listener.place), 0, "no sockets came for it")])
        await listener.open(context, bound)

    async def _open_http(self, site: Site) -> list[HttpServer]:
        return []

    def _engage(self, site: Site) -> None:
        """A worker has none."""

    def _reload_interval(self) -> float | None:
        return None

    def _say_started(self) -> None:
        pass

    async def _lameduck(self) -> None:
        pass


class Desk:
    """Where the parent's messages come in and are dealt with, one after the other."""

    def __init__(self, sock: socket.socket) -> None:
        self.sockets: dict[Place, listen.Sockets] = {}
        self._registries: dict[int, _Registry] = {}
        self._orders: asyncio.Queue[Order] = asyncio.Queue()
        self._end = asyncio.Event()
        self._app: WorkerApp | None = None
        self._unwatch: Callable[[], None] | None = None
        self._watched = False
        self._lines: list[str] = []
        self._lost = 0
        self._link = Link(sock, self._take, self._end.set)

    async def run(self) -> None:
        """Serve until the parent says that it is enough, or is gone."""
        order = await self._until_end(self._orders.get())
        if order is None:
            return
        self._app = app = WorkerApp(order, self)
        started = asyncio.Event()
        serving = asyncio.create_task(app.run(started.set))
        await self._until_end(_first(serving, started))
        if serving.done():
            self._link.send(frame_of(Taken(order.number, _why(serving.exception()))))
            return
        self._watch(self._watched)
        try:
            self._link.send(frame_of(Taken(order.number)))
            while (order := await self._until_end(self._orders.get())) is not None:
                error_text = await app.take(order)
                self._link.send(frame_of(Taken(order.number, error_text)))
        finally:
            app.stop()
            await serving

    async def _until_end(self, waited: Any) -> Any:
        """Return what is waited for; None: the end has come first."""
        task = asyncio.ensure_future(waited)
        end = asyncio.ensure_future(self._end.wait())
        await asyncio.wait((task, end), return_when=asyncio.FIRST_COMPLETED)
        end.cancel()
        if task.done():
            return task.result()
        task.cancel()
        return None

    # --- registries -------------------------------------------------------------------------

    def registry(self, number: int) -> _Registry:
        """Return the registry of a number, made when it is first spoken of."""
        return self._registries.setdefault(number, _Registry())

    def forget(self, number: int) -> None:
        """Nobody reads it any more."""
        self._registries.pop(number, None)

    def _change(self, change: Change) -> None:
        registry = self.registry(change.registry)
        published = registry.mirror.take(change.delta)
        if published is None:
            return
        if registry.pipeline is not None:
            registry.pipeline.take_over(*published)
        else:
            before = registry.latest
            if before is not None:
                published = published[0], joined(before[1], published[1])
            registry.latest = published
        registry.complete.set()
        self._link.send(frame_of(Shown(change.registry, change.number, change.delta.revision)))

    # --- messages ---------------------------------------------------------------------------

    def _take(self, body: memoryview) -> None:
        match read_down(body):
            case Change() as change:
                self._change(change)
            case Ping():
                self._link.send(frame_of(Pong()))
            case Count(number):
                samples = [] if self._app is None else self._app.metrics.samples()
                self._link.send(frame_of(Counted(number, samples)))
            case Sockets() as sockets:
                self._receive(sockets)
            case Order() as order:
                self._orders.put_nowait(order)
            case Watch(on):
                self._watch(on)
            case End():
                self._end.set()

    def _receive(self, sent: Sockets) -> None:
        """Take the sockets that came beside the frame."""
        count = len(sent.replies_from) + sent.streams
        got = [socket.socket(fileno=self._link.fds.popleft()) for _ in range(count)]
        place = Place(sent.scheme, sent.address, sent.place_port)
        stale = self.sockets.pop(place, None)
        if stale is not None:
            stale.close()
        udp = list(zip(got, sent.replies_from, strict=False))
        self.sockets[place] = listen.Sockets(sent.port, udp, got[len(udp) :])

    # --- the query tap ----------------------------------------------------------------------

    def _watch(self, on: bool) -> None:
        self._watched = on
        if self._app is None:
            return
        if on and self._unwatch is None:
            self._unwatch = self._app.tap.listen(self._show)
        elif not on and self._unwatch is not None:
            self._unwatch()
            self._unwatch = None

    def _show(self, line: str) -> None:
        if len(self._lines) >= MAX_LINES or self._link.waiting > MAX_UNREAD:
            self._lost += 1
            return
        if not self._lines:
            asyncio.get_running_loop().call_soon(self._send_lines)
        self._lines.append(line)

    def _send_lines(self) -> None:
        lines, self._lines = self._lines, []
        if self._lost:
            lines.append(f'{{"lost":{self._lost}}}')
            self._lost = 0
        self._link.send(frame_of(Questions(lines)))


def _why(error: BaseException | None) -> str:
    if isinstance(error, ConfigError):
        return str(error)
    if error is None:
        return "it has ended"
    log.error("a bug in kdns while a worker starts; please report it", exc_info=error)
    return f"{type(error).__name__}: {error}"


async def _first(serving: asyncio.Task[None], started: asyncio.Event) -> None:
    waiting = asyncio.ensure_future(started.wait())
    await asyncio.wait((serving, waiting), return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()


def main(link: int, out: int) -> None:
    """Serve at one end of a socket pair; log lines go to `out`."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # What is meant for all processes of a service is the parent's to act on.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    setup_logging(os.fdopen(_unblocked(out), "w"), quiet=True)
    raise_file_limit()
    take_turns_often()

    async def serve() -> None:
        await Desk(socket.socket(fileno=link)).run()

    run_answering(serve())


def _unblocked(out: int) -> int:
    """Return a pipe opened anew: several processes write into it, so that it may be full though
    it was not when it was looked at, and nobody may wait for it to be read."""
    if stat.S_ISFIFO(os.fstat(out).st_mode):
        with contextlib.suppress(OSError):
            return os.open(f"/proc/self/fd/{out}", os.O_WRONLY | os.O_NONBLOCK)
    return out


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
