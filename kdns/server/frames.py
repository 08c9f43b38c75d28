"""What the registry process and its workers tell each other, and how it travels.

Decides the messages and their frames: a length and msgpack, over a pair of connected sockets,
with file descriptors beside those that bring sockets along. Who says what when is workers.py's
and worker.py's (kdns/worker.py). Both ends are one program of one version, so nothing here is
negotiated.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeAlias

import msgspec

from kdns.metrics import Samples
from kdns.registry.mirror import Delta

MAX_FRAME: Final = 256 << 20  # octets; more is no frame of ours
MAX_FDS: Final = 253  # Linux takes no more at a time (SCM_MAX_FD)
BUFFER: Final = 4 << 20  # octets the kernel keeps for the reader
READ: Final = 256 << 10


class _Message(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Settings of all below."""


# --- to a worker --------------------------------------------------------------------------


class Sockets(_Message, frozen=True, tag="sockets"):
    """A place's sockets come beside this frame: those of UDP, then those that listen.

    replies_from -- for each UDP socket whether it answers from the address that was asked
    port         -- the one they have
    """

    scheme: str
    address: str
    place_port: int
    port: int
    replies_from: list[bool]
    streams: int


class Order(_Message, frozen=True, tag="order"):
    """Serve this Corefile. The sockets of its places have come before.

    conf, text, dns_port -- as App has them
    registries -- the numbers of the registries that its plugins read, in their order
    """

    number: int
    conf: str | None
    text: str
    dns_port: int
    registries: list[int]


class Change(_Message, frozen=True, tag="change"):
    """A registry has changed; number -- of this change, for Shown."""

    registry: int
    number: int
    delta: Delta


class Ping(_Message, frozen=True, tag="ping"):
    """Say Pong."""


class Count(_Message, frozen=True, tag="count"):
    """Say Counted."""

    number: int


class Watch(_Message, frozen=True, tag="watch"):
    """Show each question from now on (Questions), or no more."""

    on: bool


class End(_Message, frozen=True, tag="end"):
    """Stop serving and leave."""


# --- from a worker ------------------------------------------------------------------------


class Taken(_Message, frozen=True, tag="taken"):
    """An Order is carried out; error -- why it is not."""

    number: int
    error: str = ""


class Shown(_Message, frozen=True, tag="shown"):
    """DNS shows a Change."""

    registry: int
    number: int
    revision: int


class Pong(_Message, frozen=True, tag="pong"):
    pass


class Counted(_Message, frozen=True, tag="counted"):
    """All metrics."""

    number: int
    samples: list[Samples]


class Questions(_Message, frozen=True, tag="questions"):
    """Lines of the query tap."""

    lines: list[str]


Down: TypeAlias = Sockets | Order | Change | Ping | Count | Watch | End
Up: TypeAlias = Taken | Shown | Pong | Counted | Questions

_DOWN: Final[msgspec.msgpack.Decoder[Down]] = msgspec.msgpack.Decoder(Down)
_UP: Final[msgspec.msgpack.Decoder[Up]] = msgspec.msgpack.Decoder(Up)
_ENCODER: Final = msgspec.msgpack.Encoder()


def frame_of(message: Down | Up) -> bytes:
    """Return a message as it travels."""
    body = _ENCODER.encode(message)
    return len(body).to_bytes(4, "big") + body


def read_down(body: bytes | memoryview) -> Down:
    return _DOWN.decode(body)


def read_up(body: bytes | memoryview) -> Up:
    return _UP.decode(body)


class Link:
    """One end. Runs on the event loop; nothing here waits.

    take  -- gets each frame's body; `fds` of this Link holds what came beside
    ended -- called once, when the other end is gone or talks nonsense
    waiting -- octets that the other end has not read, without those still to be made
    """

    def __init__(
        self,
        sock: socket.socket,
        take: Callable[[memoryview], None],
        ended: Callable[[], None],
    ) -> None:
        self.fds: deque[int] = deque()
        self.waiting = 0
        self._sock = sock
        self._take = take
        self._ended = ended
        self._buffer = bytearray()
        self._queue: deque[tuple[memoryview, Sequence[int]] | Iterator[bytes]] = deque()
        self._writing = False
        self._loop = asyncio.get_running_loop()
        sock.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, BUFFER)
        self._loop.add_reader(sock.fileno(), self._read)

    @property
    def closed(self) -> bool:
        return self._sock.fileno() < 0

    def send(self, frame: bytes, fds: Sequence[int] = ()) -> None:
        """Send a frame after those before it; `fds` stay open until it has gone."""
        if self.closed:
            return
        self._queue.append((memoryview(frame), fds))
        self.waiting += len(frame)
        self._write()

    def send_each(self, frames: Iterator[bytes]) -> None:
        """Send frames that are made when there is room for them."""
        if not self.closed:
            self._queue.append(frames)
            self._write()

    def close(self) -> None:
        """Close this end, without a word to `ended`."""
        if self.closed:
            return
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        self._queue.clear()
        self.waiting = 0
        while self.fds:
            close_fd(self.fds.popleft())

    def _lost(self) -> None:
        if not self.closed:
            self.close()
            self._ended()

    # --- writing --------------------------------------------------------------------------

    def _write(self) -> None:
        if self._writing:
            return
        try:
            while self._queue:
                self._write_next()
        except BlockingIOError:
            self._writing = True
            self._loop.add_writer(self._sock.fileno(), self._write_on)
        except OSError:
            # Said by the reader's side, so that `ended` is not called while somebody sends.
            self._queue.clear()
            self._loop.call_soon(self._lost)

    def _write_on(self) -> None:
        self._writing = False
        self._loop.remove_writer(self._sock.fileno())
        self._write()

    def _write_next(self) -> None:
        first = self._queue[0]
        if isinstance(first, tuple):
            frame, fds = first
            sent = self._send_some(frame, fds)
            self.waiting -= sent
            if sent < len(frame):
                self._queue[0] = frame[sent:], ()
            else:
                self._queue.popleft()
            return
        made = next(first, None)
        if made is None:
            self._queue.popleft()
        else:
            self._queue.appendleft((memoryview(made), ()))
            self.waiting += len(made)

    def _send_some(self, frame: memoryview, fds: Sequence[int]) -> int:
        if not fds:
            return self._sock.send(frame)
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
        return self._sock.sendmsg([frame], [rights])

    # --- reading --------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            got, beside, _, _ = self._sock.recvmsg(
                READ, socket.CMSG_SPACE(MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC
            )
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._lost()
            return
        for level, kind, octets in beside:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                found = array.array("i")
                found.frombytes(octets[: len(octets) - len(octets) % found.itemsize])
                self.fds.extend(found)
        if not got:
            self._lost()
            return
        self._buffer += got
        self._take_frames()

    def _take_frames(self) -> None:
        at, buffer = 0, self._buffer
        while len(buffer) - at >= 4:
            size = int.from_bytes(buffer[at : at + 4], "big")
            if size > MAX_FRAME:
                self._lost()
                return
            if len(buffer) - at - 4 < size:
                break
            body = bytes(memoryview(buffer)[at + 4 : at + 4 + size])
            at += 4 + size
            try:
                self._take(memoryview(body))
            except msgspec.DecodeError:
                self._lost()
            if self.closed:
                return
        del buffer[:at]


def close_fd(fd: int) -> None:
    """Close what came and is not wanted."""
    with contextlib.suppress(OSError):
        socket.close(fd)
