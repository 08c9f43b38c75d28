"""Sockets to one upstream: source ports, IDs, which answer belongs to which question, time-outs.

Decides nothing about which upstream is asked or what follows from a failure; that is
server/upstream.py. No task per question: answers come in socket callbacks, and a task lives
only while a TCP or TLS connection is being made.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import Iterator
from typing import Any

from kdns.metrics import Cell
from kdns.plugins.forward import Upstream
from kdns.server.loop import read_while_waiting, stop_reading

# Datagrams taken from one socket before timers and other sockets get their turn.
BATCH = 64
# Questions after which a UDP socket is given up for one on another port, and its longest life
# in seconds: an attacker who found out the port (RFC 5452 s9.2) has that long to use it.
MAX_USES = 512
PORT_LIFETIME = 30.0
MAX_DATAGRAM = 65535


def random_numbers() -> Iterator[int]:
    """Yield 16-bit numbers of the system's CSPRNG (RFC 5452 s9.2), drawn in bulk."""
    while True:
        yield from memoryview(os.urandom(8192)).cast("H")


class Errand:
    """One question on its way to one upstream.

    body     -- the message behind its ID
    question -- its question section
    """

    __slots__ = ("body", "due", "link", "qid", "question")

    body: bytes
    question: bytes
    link: UdpLink | StreamLink
    qid: int
    due: float

    def answered(self, wire: bytes) -> None:
        """Take the upstream's answer; its ID is right."""
        raise NotImplementedError

    def failed(self, error: str, closed: bool) -> None:
        """Take the failure. closed: a connection used before was closed by the upstream, which
        says nothing about its health."""
        raise NotImplementedError


class Deadlines:
    """Time-outs that are all equally long, so that one timer does for all: the first one out
    is the first one due."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._loop = loop
        self._seconds = seconds
        self._errands: dict[Errand, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, errand: Errand, now: float) -> None:
        errand.due = now + self._seconds
        self._errands[errand] = None
        if self._timer is None:
            self._timer = self._loop.call_at(errand.due, self._expire)

    def remove(self, errand: Errand) -> None:
        self._errands.pop(errand, None)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _expire(self) -> None:
        now = self._loop.time()
        # Whoever asks again at once, and is added, is not the next to be due: until it is known
        # who is, the timer that is just over stands for one.
        try:
            while self._errands:
                errand = next(iter(self._errands))
                if errand.due > now:
                    break
                del self._errands[errand]
                errand.link.expire(errand)
        finally:
            due = next((errand.due for errand in self._errands), None)
            self._timer = None if due is None else self._loop.call_at(due, self._expire)


class Peer:
    """What the links to one upstream share.

    label   -- host:port for metrics and errors
    source  -- address to send from, or empty
    ignored -- counts answers that fit no question
    links   -- all open ones
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        address: Upstream,
        source: str,
        read_timeout: float,
        numbers: Iterator[int],
        ignored: Cell,
    ) -> None:
        self.loop = loop
        self.label = address.label
        self.source = source
        self.numbers = numbers
        self.ignored = ignored
        self.deadlines = Deadlines(loop, read_timeout)
        self.links: set[UdpLink | StreamLink] = set()
        self._address = address

    def socket(self, kind: socket.SocketKind) -> tuple[socket.socket, Any]:
        """Return a new socket and the address to connect it to. Raises OSError."""
        family, _, _, _, address = socket.getaddrinfo(
            self._address.host,
            self._address.port,
            type=kind,
            flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
        )[0]
        sock = socket.socket(family, kind)
        try:
            sock.setblocking(False)
            if self.source:
                sock.bind((self.source, 0))
        except OSError:
            sock.close()
            raise
        return sock, address

    def number(self, taken: dict[int, Errand]) -> int:
        """Return an ID not in use on a link."""
        number = next(self.numbers)
        while number in taken:
            number = next(self.numbers)
        return number


class UdpLink:
    """One connected UDP socket: the kernel drops what does not come from the upstream, and
    picks its port from its own CSPRNG. Shared by many questions, told apart by ID."""

    __slots__ = ("_peer", "_retired", "_sock", "closed", "opened", "used", "uses", "waiting")

    def __init__(self, peer: Peer) -> None:
        """Open the socket. Raises OSError."""
        sock, address = peer.socket(socket.SOCK_DGRAM)
        try:
            sock.connect(address)
        except OSError:
            sock.close()
            raise
        self._peer = peer
        self._sock = sock
        self._retired = False
        self.closed = False
        self.opened = self.used = peer.loop.time()
        self.uses = 0
        self.waiting: dict[int, Errand] = {}
        peer.links.add(self)
        read_while_waiting(peer.loop, sock.fileno(), self._read)

    def worn(self, now: float, expire: float) -> bool:
        """True if the next question shall go out on another port."""
        return (
            self.uses >= MAX_USES or now - self.used >= expire or now - self.opened >= PORT_LIFETIME
        )

    def send(self, errand: Errand, now: float) -> None:
        """Send the question. Raises OSError; then nothing was sent."""
        peer = self._peer
        qid = peer.number(self.waiting)
        self._sock.send(qid.to_bytes(2, "big") + errand.body)
        self.used = now
        self.uses += 1
        errand.link = self
        errand.qid = qid
        self.waiting[qid] = errand
        peer.deadlines.add(errand, now)

    def _read(self) -> bool:
        """Take what has come. An answer may lead to another question, whose time-out the loop
        must hear of: so it always goes on."""
        receive, waiting, peer = self._sock.recv, self.waiting, self._peer
        for _ in range(BATCH):
            try:
                wire = receive(MAX_DATAGRAM)
            except BlockingIOError:
                break
            except OSError as e:
                # ICMP: nobody listens there, or no way to it.
                self.fail("read", e)
                break
            errand = waiting.get(wire[0] << 8 | wire[1]) if len(wire) >= 12 else None
            if errand is None or not is_answer(wire, errand.question):
                # Late, or forged: only what answers the question ends the wait (RFC 5452 s4).
                peer.ignored.add()
                continue
            del waiting[errand.qid]
            peer.deadlines.remove(errand)
            errand.answered(wire)
            if not waiting:
                # Nothing more is expected; should there be anything, it is read in its turn.
                if self._retired:
                    self.close()
                break
        return False

    def expire(self, errand: Errand) -> None:
        """Give up waiting for one answer."""
        del self.waiting[errand.qid]
        error = self._describe("read", "i/o timeout")
        if self._retired and not self.waiting:
            self.close()
        errand.failed(error, False)

    def fail(self, verb: str, error: OSError) -> None:
        """Close, and fail every question that waits here."""
        text = self._describe(verb, f"{verb}: {reason(error)}")
        waiting = list(self.waiting.values())
        self.close()
        for errand in waiting:
            self._peer.deadlines.remove(errand)
        for errand in waiting:
            errand.failed(text, False)

    def retire(self) -> None:
        """Close as soon as no answer is waited for."""
        self._retired = True
        if not self.waiting:
            self.close()

    def close(self) -> None:
        """Close at once; what waits here is forgotten, and the caller's to fail."""
        if not self.closed:
            self.closed = True
            stop_reading(self._peer.loop, self._sock.fileno())
            self._sock.close()
            self._peer.links.discard(self)
            self.waiting.clear()

    def _describe(self, verb: str, what: str) -> str:
        return f"{verb} udp {_local(self._sock)}->{self._peer.label}: {what}"


class StreamLink(asyncio.Protocol):
    """One TCP or TLS connection; questions wait in it while it is being made.

    answers -- how many came; a connection that has answered may be closed by the upstream at
               any time without anything being wrong (RFC 7766 s6.2.4)
    """

    def __init__(
        self, peer: Peer, context: ssl.SSLContext | None, name: str, dial_timeout: float
    ) -> None:
        self._peer = peer
        self._context = context
        self._name = name
        self._proto = "tcp" if context is None else "tcp-tls"
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._queue: list[Errand] = []
        self.waiting: dict[int, Errand] = {}
        self.answers = 0
        self.closed = False
        self.opened = self.used = peer.loop.time()
        self.dial_time: float | None = None
        peer.links.add(self)
        self._task = peer.loop.create_task(self._dial(dial_timeout))

    @property
    def load(self) -> int:
        """How many questions are on it."""
        return len(self.waiting) + len(self._queue)

    def send(self, errand: Errand, now: float) -> None:
        """Send the question now, or once the connection stands."""
        errand.link = self
        self.used = now
        if self._transport is None:
            self._queue.append(errand)
        else:
            self._write(errand)

    def _write(self, errand: Errand) -> None:
        assert self._transport is not None
        errand.qid = qid = self._peer.number(self.waiting)
        self.waiting[qid] = errand
        self._peer.deadlines.add(errand, self._peer.loop.time())
        size = len(errand.body) + 2
        self._transport.write(b"%b%b%b" % (size.to_bytes(2, "big"), qid.to_bytes(2, "big"),
                                           errand.body))  # fmt: skip

    async def _dial(self, seconds: float) -> None:
        loop = self._peer.loop
        sock: socket.socket | None = None
        error = ""
        try:
            async with asyncio.timeout(seconds):
                sock, address = self._peer.socket(socket.SOCK_STREAM)
                await loop.sock_connect(sock, address)
                await loop.create_connection(
                    lambda: self,
                    sock=sock,
                    ssl=self._context,
                    server_hostname=self._name if self._context is not None else None,
                )
        except TimeoutError:
            error = "i/o timeout"
        except ssl.SSLCertVerificationError as e:
            error = f"tls: failed to verify certificate: {e.verify_message}"
        except OSError as e:
            error = f"connect: {reason(e)}"
        except ValueError as e:  # a server name that ssl does not take
            error = f"tls: {e}"
        finally:
            if self._transport is None and sock is not None:
                sock.close()
        self.dial_time = loop.time() - self.opened
        if error:
            self._fail(f"dial {self._proto} {self._peer.label}: {error}", False)

    # --- asyncio.Protocol -----------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        if self.closed:
            transport.abort()
            return
        queue, self._queue = self._queue, []
        for errand in queue:
            self._write(errand)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        while len(buffer) >= 2:
            size = buffer[0] << 8 | buffer[1]
            if len(buffer) < size + 2:
                return
            wire = bytes(buffer[2 : size + 2])
            del buffer[: size + 2]
            self._take(wire)
            if self.closed:
                return

    def _take(self, wire: bytes) -> None:
        errand = self.waiting.pop(wire[0] << 8 | wire[1], None) if len(wire) >= 12 else None
        if errand is None:
            self._peer.ignored.add()
            return
        self.answers += 1
        self._peer.deadlines.remove(errand)
        errand.answered(wire)

    def connection_lost(self, exc: Exception | None) -> None:
        what = reason(exc) if isinstance(exc, OSError) else "EOF"
        self._fail(self._describe(what), self.answers > 0)

    # --- ends -----------------------------------------------------------------------------

    def expire(self, errand: Errand) -> None:
        """Give up on the connection: one that lost an answer may lose them all."""
        del self.waiting[errand.qid]
        error = self._describe("i/o timeout")
        self._fail(error, True)
        errand.failed(error, False)

    def _fail(self, error: str, closed: bool) -> None:
        errands = [*self.waiting.values(), *self._queue]
        self.close()
        for errand in errands:
            self._peer.deadlines.remove(errand)
        for errand in errands:
            errand.failed(error, closed)

    def close(self) -> None:
        """Close at once; what waits here is forgotten, and the caller's to fail."""
        if self.closed:
            return
        self.closed = True
        self.waiting.clear()
        self._queue.clear()
        self._peer.links.discard(self)
        self._buffer.clear()
        if self._transport is not None:
            self._transport.abort()
        elif not self._task.done() and asyncio.current_task() is not self._task:
            self._task.cancel()

    async def wait_closed(self) -> None:
        """Wait for the end of a dial that was broken off."""
        await asyncio.gather(self._task, return_exceptions=True)

    def _describe(self, what: str) -> str:
        sock = self._transport.get_extra_info("socket") if self._transport else None
        return f"read {self._proto} {_local(sock)}->{self._peer.label}: {what}"


def is_answer(wire: bytes, question: bytes) -> bool:
    """True if `wire` (12 octets at least) is a response to `question`; a server may leave the
    question out of an error."""
    if not wire[2] & 0x80:
        return False
    if wire[4] or wire[5] != 1:
        return wire[4:6] == b"\0\0" and wire[3] & 15 != 0
    got = wire[12 : 12 + len(question)]
    return got == question or (
        # Names compare without regard to case (RFC 4343); type and class do not.
        got[-4:] == question[-4:] and got[:-4].lower() == question[:-4].lower()
    )


def reason(error: OSError) -> str:
    """Return "connection refused" and the like."""
    if isinstance(error, (ssl.SSLError, socket.gaierror)) or not error.errno:
        return (error.strerror or str(error)).lower()
    # asyncio puts a sentence of its own into strerror.
    return os.strerror(error.errno).lower()


def _local(sock: Any) -> str:
    try:
        host, port = sock.getsockname()[:2]
    except (OSError, AttributeError):
        return "?"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
