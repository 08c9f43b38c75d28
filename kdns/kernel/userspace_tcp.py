"""TCP of the userspace mode: accept, connect to an endpoint, carry octets both ways.

Decides when another endpoint is tried, when a side is read and when it waits for the other, and
how an end in one direction, or a failure, is passed on. Which endpoint is next is
proxy/userspace.py's.

Octets are read into one buffer that all connections share and sent on at once; what the other
side does not take is held, and its sender is not read until it is gone: at most COPY octets a
direction. A direction that fills the buffer is carried by splice() from then on, through a pipe
out of a small stock: a third of the time for a large transfer, while a pipe for each of a
thousand short requests would cost more than it saves.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import struct
from typing import Final

from kdns.kernel.userspace_poll import COPY, EXHAUSTED, PIPE, TICK, Pipe, Poller
from kdns.kernel.userspace_relay import Admit, Choose, RelayCounts

log = logging.getLogger("kdns.proxy")

BACKLOG: Final = 4096  # the kernel takes less where somaxconn says so
ACCEPTS: Final = 64  # taken at one go, before others get their turn
READS: Final = 4  # of one direction at one go
# Seconds a connect may take, by attempt; after the last the client is refused (reference 2.3).
DIAL_TIMEOUTS: Final = (0.25, 0.5, 1.0, 2.0)
# Closing with this sends RST: what the peer would have got of a dead endpoint.
RESET: Final = struct.pack("ii", 1, 0)
KEEPALIVE_IDLE: Final = 60  # seconds; a peer that is gone without a word is noticed

IN: Final = select.EPOLLIN
OUT: Final = select.EPOLLOUT
ERR: Final = select.EPOLLERR
HUP: Final = select.EPOLLHUP
SPLICE_FLAGS: Final = 1 | 2  # MOVE, NONBLOCK: of the pipe; sockets are non-blocking already


class TcpListener:
    """One listening socket. sock -- bound, listening, not blocking."""

    def __init__(
        self,
        sock: socket.socket,
        relays: TcpRelays,
        counts: RelayCounts,
        choose: Choose,
        admit: Admit | None,
    ) -> None:
        self.sock = sock
        self.counts = counts
        self.choose = choose
        self.admit = admit
        self._relays = relays
        self._fd = sock.fileno()
        relays.listeners.add(self)
        relays.poller.add(self._fd, IN, self._accept)

    def close(self) -> None:
        """Accept no more; what was accepted goes on."""
        self._relays.listeners.discard(self)
        self._relays.poller.leave(self.sock)

    def pause(self) -> None:
        self._relays.poller.pause(self._fd)

    def resume(self) -> None:
        self._relays.poller.resume(self._fd, IN)

    def _accept(self, event: int) -> None:
        relays = self._relays
        for _ in range(ACCEPTS):
            if not relays.poller.has_room():
                relays.pause()
                return
            try:
                client, address = self.sock.accept()
            except BlockingIOError:
                return
            except OSError as e:
                if e.errno in EXHAUSTED:
                    relays.poller.exhausted(e.strerror or str(e))
                    relays.pause()
                    return
                continue  # that client is gone again
            client.setblocking(False)
            self.counts.accepted.add()
            if self.admit is not None and not self.admit(address[0]):
                self.counts.failed.add()
                _reset(client)
                continue
            relays.begin(self, client, address[0])


class _Side:
    """One socket of a relay, and what is on its way to it.

    held  -- octets that are to be sent to it, once it takes more
    pipe  -- the same, where they come by splice()
    ended -- its peer sends no more; shut -- we send it no more
    mask  -- what epoll watches; None: nothing, not even its end
    full  -- reads in a row that filled the buffer
    """

    __slots__ = ("ended", "fd", "full", "held", "mask", "other", "pipe", "relay", "shut", "sock")

    def __init__(self, relay: _Relay, sock: socket.socket) -> None:
        self.relay = relay
        self.sock = sock
        self.fd = sock.fileno()
        self.other: _Side = self
        self.held: memoryview | None = None
        self.pipe: Pipe | None = None
        self.ended = False
        self.shut = False
        self.mask: int | None = 0
        self.full = 0

    def ready(self, event: int) -> None:
        """Do what the socket allows."""
        relay, mask = self.relay, self.mask or 0
        if relay.over:
            return
        try:
            if event & (ERR | HUP) and not event & mask:
                if event & ERR:
                    relay.abort()
                else:
                    # Both directions of this socket have ended, and the other side is slow to
                    # take what is in it: it says so for ever.
                    self.watch(None)
                return
            if mask & OUT and event & (OUT | ERR | HUP):
                self.flush()
            if not relay.over and mask & IN and event & (IN | ERR | HUP):
                self.read()
        except BlockingIOError:
            pass  # it seemed to be ready
        except OSError:
            relay.abort()

    def watch(self, mask: int | None) -> None:
        """Have epoll watch for `mask`; None: for nothing at all."""
        if mask == self.mask:
            return
        poller = self.relay.poller
        if mask is None:
            poller.pause(self.fd)
        elif self.mask is None:
            poller.resume(self.fd, mask)
        else:
            poller.change(self.fd, mask)
        self.mask = mask

    def read(self) -> None:
        """Take what there is and send it on. Raises OSError if either side fails."""
        other = self.other
        scratch = self.relay.poller.scratch
        for _ in range(READS):
            if self.full > READS and (pipe := other.take_pipe()) is not None:
                if self._splice(pipe):
                    continue
                if not pipe.held:  # others need it, too
                    other.let_go()
                return
            try:
                count = self.sock.recv_into(scratch)
            except BlockingIOError:
                return
            if not count:
                self._end()
                return
            try:
                sent = other.sock.send(scratch[:count])
            except BlockingIOError:
                sent = 0
            if sent < count:
                other.held = memoryview(bytes(scratch[sent:count]))
                self._wait_for(other)
                return
            if count < COPY:
                self.full = 0
                return
            self.full += 1

    def _splice(self, pipe: Pipe) -> bool:
        """Move what there is through an empty pipe; False: that is enough for now."""
        other = self.other
        try:
            count = os.splice(self.fd, pipe.writer, PIPE, flags=SPLICE_FLAGS)
        except BlockingIOError:
            return False
        if not count:
            self._end()
            return False
        pipe.held = count
        if not other.empty_pipe(pipe):
            self._wait_for(other)
            return False
        if count < COPY // 4:  # small again
            self.full = 0
            return False
        return True

    def empty_pipe(self, pipe: Pipe) -> bool:
        """Send what is in the pipe; False: the socket takes no more for now."""
        while pipe.held:
            try:
                pipe.held -= os.splice(pipe.reader, self.fd, pipe.held, flags=SPLICE_FLAGS)
            except BlockingIOError:
                return False
        return True

    def take_pipe(self) -> Pipe | None:
        """Return the pipe to this side, where there is one to be had."""
        if self.pipe is None:
            self.pipe = self.relay.poller.take_pipe()
        return self.pipe

    def let_go(self) -> None:
        """Give the pipe back."""
        if self.pipe is not None:
            self.relay.poller.give_pipe(self.pipe)
            self.pipe = None

    def _wait_for(self, other: _Side) -> None:
        """Read no more until the other side has taken what is held for it."""
        self.watch((self.mask or 0) & ~IN)
        other.watch((other.mask or 0) | OUT)

    def flush(self) -> None:
        """Send what is held; then go on reading from the other side."""
        if self.held is not None:
            sent = self.sock.send(self.held)
            if sent < len(self.held):
                self.held = self.held[sent:]
                return
            self.held = None
        if self.pipe is not None:
            if not self.empty_pipe(self.pipe):
                return
            self.let_go()
        self.watch((self.mask or 0) & ~OUT)
        if self.other.ended:
            self._shut()
        else:
            self.other.watch((self.other.mask or 0) | IN)

    def _end(self) -> None:
        """This side sends no more: pass it on, behind all that it has sent."""
        self.ended = True
        self.watch((self.mask or 0) & ~IN)
        other = self.other
        if other.held is None and (other.pipe is None or not other.pipe.held):
            other._shut()

    def _shut(self) -> None:
        self.shut = True
        if self.other.shut:
            self.relay.finish()
            return
        self.sock.shutdown(socket.SHUT_WR)


class _Relay:
    """One client's connection: first on its way to an endpoint, then between the two."""

    __slots__ = (
        "address",
        "attempt",
        "client",
        "due",
        "endpoint",
        "listener",
        "over",
        "poller",
        "relays",
        "server",
        "tried",
    )

    def __init__(
        self, relays: TcpRelays, listener: TcpListener, sock: socket.socket, address: str
    ) -> None:
        self.relays = relays
        self.poller = relays.poller
        self.listener = listener
        self.address = address
        self.client = _Side(self, sock)
        self.server: _Side | None = None
        self.over = False
        self.attempt = 0
        self.due = 0.0
        self.endpoint = ""
        self.tried: tuple[str, ...] = ()
        self.poller.add(self.client.fd, 0, self.client.ready)

    # --- reaching an endpoint ---------------------------------------------------------

    def dial(self) -> None:
        """Begin to connect to the next endpoint, until one lets us begin."""
        while True:
            chosen = None
            if self.attempt < len(DIAL_TIMEOUTS):
                chosen = self.listener.choose(self.address, self.tried)
            if chosen is None:
                self.listener.counts.failed.add()
                self.abort()
                return
            self.endpoint = str(chosen)
            family = socket.AF_INET6 if ":" in chosen.ip else socket.AF_INET
            try:
                sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            except OSError as e:
                if e.errno not in EXHAUSTED:
                    raise
                # Not the endpoint's fault: once more when others have ended.
                self.poller.exhausted(e.strerror or str(e))
                self.relays.pause()
                self.due = self.poller.time() + 2 * TICK
                self.relays.dialing[self] = None
                self.poller.tick()
                return
            status = sock.connect_ex((chosen.ip, chosen.port))
            if status in (0, errno.EINPROGRESS):
                break
            sock.close()
            self._note_failure()
        server = self.server = _Side(self, sock)
        server.other, self.client.other = self.client, server
        server.mask = OUT
        self.poller.add(server.fd, OUT, self._dialed)
        self.due = self.poller.time() + DIAL_TIMEOUTS[self.attempt]
        self.relays.dialing[self] = None
        self.poller.tick()

    def _note_failure(self) -> None:
        self.attempt += 1
        self.tried = (*self.tried, self.endpoint)
        self.listener.counts.retried.add()

    def give_up_dial(self) -> None:
        """The endpoint is dead, or too slow: try the next one."""
        del self.relays.dialing[self]
        if self.server is not None:
            self._note_failure()
            self.poller.leave(self.server.sock)
            self.server = None
        self.dial()

    def _dialed(self, event: int) -> None:
        server = self.server
        if server is None or self.over:
            return
        if server.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.give_up_dial()
            return
        del self.relays.dialing[self]
        server.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.poller.replace(server.fd, server.ready)
        server.watch(IN)
        self.client.watch(IN)
        self.client.ready(IN)  # most have asked by now

    # --- the end ----------------------------------------------------------------------

    def finish(self) -> None:
        """Both directions have ended."""
        self._leave(reset=False)

    def abort(self) -> None:
        """One side failed: the other learns of it by a reset, as without a proxy."""
        self._leave(reset=True)

    def _leave(self, reset: bool) -> None:
        if self.over:
            return
        self.over = True
        self.relays.dialing.pop(self, None)
        self.relays.relays.discard(self)
        self.listener.counts.open.add(-1)
        for side in (self.client, self.server):
            if side is not None:
                side.let_go()
                side.held = None
                if reset:
                    side.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                self.poller.leave(side.sock)


class TcpRelays:
    """All TCP connections through this process."""

    def __init__(self, poller: Poller) -> None:
        self.poller = poller
        self.listeners: set[TcpListener] = set()
        self.relays: set[_Relay] = set()
        # Those on their way to an endpoint.
        self.dialing: dict[_Relay, None] = {}
        self._paused: set[TcpListener] = set()
        poller.on_tick.append(self._tick)
        poller.on_room.append(self._resume)

    def begin(self, listener: TcpListener, client: socket.socket, address: str) -> None:
        """Carry a client's connection."""
        relay = _Relay(self, listener, client, address)
        self.relays.add(relay)
        listener.counts.open.add()
        relay.dial()

    def _tick(self, now: float) -> None:
        for relay in [one for one in self.dialing if one.due <= now]:
            relay.give_up_dial()
        if self.dialing:
            self.poller.tick()

    def pause(self) -> None:
        """Accept nothing, on any listener: clients wait in the kernel."""
        for listener in self.listeners - self._paused:
            listener.pause()
        self._paused |= self.listeners

    def _resume(self) -> None:
        paused, self._paused = self._paused & self.listeners, set()
        for listener in paused:
            listener.resume()

    def close(self) -> None:
        """End everything at once."""
        for listener in list(self.listeners):
            listener.close()
        for relay in list(self.relays):
            relay.abort()


def listen_tcp(family: socket.AddressFamily, address: str, port: int) -> socket.socket:
    """Return a bound socket that does not listen yet. Raises OSError."""
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        # What is accepted inherits these.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE)
        sock.bind((address, port))
    except OSError:
        sock.close()
        raise
    return sock


def _reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    sock.close()
