"""The event loop of whoever answers names: asyncio's, which answers while it waits.

Decides who is called, and when the loop must go on; what is read and said is others'. asyncio
turns what its selector found into callbacks and runs these in its next step, which costs more
than reading a datagram and answering it from memory. So datagrams are answered within the
selector's wait, and the loop hears only of what it must see to: other sockets, timers, and
questions whose answers were not at hand.
"""

from __future__ import annotations

import asyncio
import os
import select
import selectors
import time
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

T = TypeVar("T")
# Reads a socket; returns whether it has begun nothing that the loop must see to.
Read = Callable[[], bool]
# Sockets looked at in one go; the kernel begins with the others the next time.
AT_ONCE: Final = 64
# Seconds that what the loop has to do at once may go before what is read within its wait: a
# change that has come takes some steps of the loop to the names, and each would let a question
# pass that is then answered as things were.
FIRST: Final = 0.0005
_IN: Final = select.EPOLLIN
_OUT: Final = select.EPOLLOUT


class AnsweringSelector(selectors.EpollSelector):
    """epoll, with sockets that are read within select() and never returned by it."""

    def __init__(self) -> None:
        super().__init__()
        # The base class keeps its own to itself; both are one to the kernel.
        self._own = select.epoll.fromfd(os.dup(self.fileno()))
        self._reads: dict[int, Read] = {}
        self._waited = 0.0  # when what has come was last read

    def read(self, fd: int, call: Read) -> None:
        """Have a socket read by `call` whenever there is something."""
        self.register(fd, selectors.EVENT_READ)
        self._reads[fd] = call

    def forget(self, fd: int) -> None:
        if self._reads.pop(fd, None) is not None:
            self.unregister(fd)

    def close(self) -> None:
        self._own.close()
        super().close()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Return what is ready, as any selector; an empty list also as soon as a read has begun
        something."""
        wait = -1.0 if timeout is None else max(0.0, timeout)
        now = time.monotonic()
        until = now + wait
        reading = wait != 0 or now - self._waited >= FIRST
        while True:
            try:
                came = self._own.poll(wait, AT_ONCE)
            except InterruptedError:
                return []
            # What a descriptor is when it comes counts: a read may close a neighbour's, and open
            # another one of the same number.
            others = [one for one in came if one[0] not in self._reads]
            done = True
            for fd, _ in came if len(others) < len(came) else ():
                call = self._reads.get(fd)
                if call is not None and reading:
                    try:
                        if not call():
                            done = False
                    except Exception as e:
                        _report(e, fd)
                        done = False
            if others or not done or not came or wait == 0:
                if reading:
                    self._waited = time.monotonic()
                return self._keys(others)
            if wait > 0:
                wait = until - time.monotonic()
                if wait <= 0:
                    return []

    def _keys(self, came: list[tuple[int, int]]) -> list[tuple[selectors.SelectorKey, int]]:
        keys = self.get_map()
        ready = []
        for fd, events in came:
            key = keys.get(fd)
            # Else a read has ended it, and perhaps begun another of the same number to be read.
            if key is not None and key.data is not None:
                # An error or an end makes both ways ready, as in selectors.EpollSelector.
                read = selectors.EVENT_READ if events & ~_OUT else 0
                write = selectors.EVENT_WRITE if events & ~_IN else 0
                ready.append((key, (read | write) & key.events))
        return ready


def _report(error: Exception, fd: int) -> None:
    text = f"a bug in kdns in reading socket {fd}"
    asyncio.get_running_loop().call_exception_handler({"message": text, "exception": error})


_selectors: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, AnsweringSelector]
_selectors = weakref.WeakKeyDictionary()


def new_loop() -> asyncio.AbstractEventLoop:
    """Return an event loop that answers while it waits."""
    selector = AnsweringSelector()
    loop = asyncio.SelectorEventLoop(selector)
    _selectors[loop] = selector
    return loop


def run_answering(work: Coroutine[Any, Any, T]) -> T:
    """Run a program in such a loop: asyncio.run() otherwise."""
    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(work)


def read_while_waiting(loop: asyncio.AbstractEventLoop, fd: int, call: Read) -> None:
    """Have `call` read a socket, within the loop's wait if it is one of new_loop()."""
    selector = _selectors.get(loop)
    if selector is None:
        loop.add_reader(fd, call)
    else:
        selector.read(fd, call)


def stop_reading(loop: asyncio.AbstractEventLoop, fd: int) -> None:
    """Take back read_while_waiting()."""
    selector = _selectors.get(loop)
    if selector is None:
        loop.remove_reader(fd)
    else:
        selector.forget(fd)
