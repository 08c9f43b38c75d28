"""What all sockets of the userspace mode share: one epoll inside the event loop, buffers, pipes,
and how many descriptors there may be.

The loop sees one descriptor, the epoll's; what is ready is handled here, without a task, a
handle or a selector key per socket: that costs more than to accept and connect. What sockets
carry is userspace_tcp.py's and userspace_udp.py's.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import resource
import select
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Final, TypeAlias

log = logging.getLogger("kdns.proxy")

# Called with what epoll says of a descriptor.
OnReady: TypeAlias = Callable[[int], None]

EVENTS: Final = 256  # taken from the kernel at a time
TURN: Final = 0.005  # seconds of relaying before timers and other sockets get their turn
TICK: Final = 0.05  # seconds between two looks at what may have taken too long
COPY: Final = 64 << 10  # octets copied at a time: what is unsent of them is all that is held
# A pipe of 64 pages takes a full read of the largest packets on loopback. 128 of them are as
# much as Linux lets a user have without root (fs.pipe-user-pages-soft); connections beyond
# are copied.
PIPE: Final = 256 << 10
MAX_PIPES: Final = 128
RESERVE: Final = 128  # descriptors left for all else: the API, programs, files
# Out of something that others may give back.
EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Pipe:
    """A pipe that octets pass through from socket to socket without being copied."""

    __slots__ = ("held", "reader", "writer")

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        with suppress(OSError):  # not so large for everybody: what it has will do
            fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, PIPE)
        self.held = 0

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


class Poller:
    """The sockets of all Services and both families. Used in the event loop's thread only.

    scratch -- what every copy goes through; empty between two calls
    on_tick -- called with the time, so long after tick() was
    on_room -- called when there is room again, after has_room() denied it
    """

    def __init__(self) -> None:
        self.scratch = memoryview(bytearray(COPY))
        self.on_tick: list[Callable[[float], None]] = []
        self.on_room: list[Callable[[], None]] = []
        self._loop = asyncio.get_running_loop()
        self._epoll = select.epoll()
        self._ready: dict[int, OnReady] = {}
        self._leaving: list[socket.socket] = []
        self._pipes: list[Pipe] = []
        self._pipes_made = 0
        self._ticking: asyncio.TimerHandle | None = None
        self._most = _descriptors() - RESERVE - 2 * MAX_PIPES
        self._full = False
        self._loop.add_reader(self._epoll.fileno(), self._take_turn)

    def time(self) -> float:
        """Return monotonic seconds."""
        return self._loop.time()

    def close(self) -> None:
        """Let go of everything; sockets are their owners' to close before."""
        self._loop.remove_reader(self._epoll.fileno())
        if self._ticking is not None:
            self._ticking.cancel()
            self._ticking = None
        self._finish_leaving()
        self._epoll.close()
        for pipe in self._pipes:
            pipe.close()
        self._pipes.clear()
        self._ready.clear()

    # --- sockets ----------------------------------------------------------------------

    def add(self, fd: int, mask: int, ready: OnReady) -> None:
        """Call `ready` when a descriptor is; each must be taken away by remove() or leave()."""
        self._ready[fd] = ready
        self._epoll.register(fd, mask)

    def replace(self, fd: int, ready: OnReady) -> None:
        """Call another function for a descriptor from now on."""
        self._ready[fd] = ready

    def change(self, fd: int, mask: int) -> None:
        self._epoll.modify(fd, mask)

    def pause(self, fd: int) -> None:
        """Hear nothing of a descriptor, not even that its peer is gone, until resume()."""
        self._epoll.unregister(fd)

    def resume(self, fd: int, mask: int) -> None:
        self._epoll.register(fd, mask)

    def remove(self, fd: int) -> None:
        if self._ready.pop(fd, None) is not None:
            with suppress(FileNotFoundError):  # paused
                self._epoll.unregister(fd)

    def leave(self, sock: socket.socket) -> None:
        """Take away and close a socket. Its number is free only after this turn: an event that
        was taken from the kernel already cannot meet another socket of that number."""
        self._ready.pop(sock.fileno(), None)
        if not self._leaving:
            self._loop.call_soon(self._finish_leaving)
        self._leaving.append(sock)

    def _finish_leaving(self) -> None:
        for sock in self._leaving:
            sock.close()
        self._leaving.clear()

    def _take_turn(self) -> None:
        until = self._loop.time() + TURN
        poll, handlers = self._epoll.poll, self._ready
        while events := poll(0, EVENTS):
            for fd, event in events:
                ready = handlers.get(fd)
                if ready is None:
                    continue
                try:
                    ready(event)
                except Exception:
                    log.exception("a socket of the userspace mode failed, a bug")
                    self.remove(fd)
            if self._leaving:
                self._finish_leaving()
            if self._loop.time() > until:
                return

    # --- time -------------------------------------------------------------------------

    def tick(self) -> None:
        """See to it that on_tick is called within TICK."""
        if self._ticking is None:
            self._ticking = self._loop.call_later(TICK, self._tick)

    def _tick(self) -> None:
        self._ticking = None
        now = self._loop.time()
        for call in self.on_tick:
            call(now)

    # --- descriptors and pipes --------------------------------------------------------

    def has_room(self) -> bool:
        """Say whether another connection may be taken; if not, on_room is called once one may."""
        if self._full:
            return False
        if len(self._ready) + 2 <= self._most:
            return True
        self.exhausted("the limit of open files")
        return False

    def exhausted(self, what: str) -> None:
        """Take no connections for a while; said once, until it has been good again."""
        if self._full:
            return
        self._full = True
        log.warning(
            "out of descriptors (%s), with %d sockets open: new connections wait until others"
            " end; a higher limit of open files (ulimit -Hn, LimitNOFILE=) lets in more",
            what, len(self._ready),
        )  # fmt: skip
        self._loop.call_later(2 * TICK, self._look_for_room)

    def _look_for_room(self) -> None:
        # So many must be free that it does not go to and fro.
        if len(self._ready) + 2 > self._most - RESERVE // 4:
            self._loop.call_later(2 * TICK, self._look_for_room)
            return
        self._full = False
        for call in self.on_room:
            call()

    def take_pipe(self) -> Pipe | None:
        """Return an empty pipe; None if all are in use."""
        if self._pipes:
            return self._pipes.pop()
        if self._pipes_made >= MAX_PIPES:
            return None
        try:
            pipe = Pipe()
        except OSError:
            return None
        self._pipes_made += 1
        return pipe

    def give_pipe(self, pipe: Pipe) -> None:
        """Take back a pipe; with octets in it, it is closed."""
        if pipe.held:
            pipe.close()
            self._pipes_made -= 1
        else:
            self._pipes.append(pipe)


def _descriptors() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft
