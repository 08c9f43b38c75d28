"""DNS over TCP and TLS (RFC 7766, RFC 7858): frames in, frames out, bounded in every way.

Decides when a connection has had enough: too slow to ask, too slow to read, idle; and whose
question is next: connections take turns, one question each, for a bounded time, so that a
flood over TCP leaves UDP and its fellows their share. Answers come from server/exchange.py in
any order, as RFC 7766 s7 allows.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Iterator
from typing import Any

from kdns.dns.message import RR, Query, Reply, parse_query, render_refusal, render_reply
from kdns.errors import WireError
from kdns.metrics import Cell
from kdns.plugins.plugin import Drop
from kdns.server.exchange import Exchange
from kdns.server.tls import Handshakes, forget

FIRST_QUERY = 3.0  # seconds, as CoreDNS (reference 1.15)
IDLE = 10.0
# Connections of one listener, over TLS also those that are still in the handshake. With the
# buffers below that is at most some 70 MB of own memory under attack, and under 10 MB in ordinary
# use. Over TLS a handshake takes most, some 60 KB, and a connection 25 KB more than over TCP:
# measured were 82 MB in 2,000 half handshakes, 65 MB in a thousand connections with half
# questions or answers unread, and 30 MB in 900 ordinary ones.
MAX_CONNECTIONS = 1000
# Questions of one connection under way at a time; more are read when some are answered.
MAX_PIPELINED = 64
WRITE_HIGH = 16 << 10  # octets unsent, beyond the kernel's, before questions wait
MAX_BLOCKED = 200  # connections that may leave their answers unread at a time
READ = 16 << 10  # octets read at a time; more than so many wait in the kernel
# Octets of unfinished messages of all connections. A question has some 50 octets and is
# finished at once; only an attack comes near.
MAX_HELD = 16 << 20
TURN = 0.005  # seconds of answering over TCP before UDP and timers get their turn


class TcpServer:
    """What all connections of one listening socket share."""

    def __init__(
        self,
        exchange: Exchange,
        proto: str,
        rejected: Cell,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self.exchange = exchange
        self.proto = proto
        self.connections: set[Connection] = set()
        # What one read of any connection goes into; a view, for TLS fills it slice by slice.
        self.scratch = memoryview(bytearray(READ))
        self.held = 0
        self.blocked = 0
        self._rejected = rejected
        self._turns: deque[Connection] = deque()
        self._scheduled = False
        self._loop = asyncio.get_running_loop()
        self._handshakes: Handshakes | None = None
        if context is not None:
            self._handshakes = Handshakes(
                context, lambda: Connection(self), MAX_CONNECTIONS,
                lambda: len(self.connections), rejected,
            )  # fmt: skip

    def protocol(self) -> asyncio.BaseProtocol:
        """For loop.create_server."""
        return Connection(self) if self._handshakes is None else self._handshakes.protocol()

    def admit(self, connection: Connection) -> bool:
        """Return False if the listener has all the connections it can take."""
        if self._handshakes is not None:
            self._handshakes.end(connection)
        if len(self.connections) >= MAX_CONNECTIONS:
            self._rejected.add()
            return False
        self.connections.add(connection)
        return True

    def queue(self, connection: Connection) -> None:
        """Give the connection a turn, after those that wait already."""
        self._turns.append(connection)
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._take_turns)

    def _take_turns(self) -> None:
        until = self._loop.time() + TURN
        turns = self._turns
        while turns and self._loop.time() < until:
            connection = turns.popleft()
            try:
                connection.take_turn()
            except Exception:
                # Turns must go on, or no connection of this listener is ever answered again.
                self.exchange.panic("a question over TCP")
                connection.abort()
        self._scheduled = bool(turns)
        if turns:
            self._loop.call_soon(self._take_turns)

    def close(self) -> None:
        """Close all connections at once."""
        if self._handshakes is not None:
            self._handshakes.close()
        for connection in list(self.connections):
            connection.abort()


class Connection(asyncio.BufferedProtocol):
    """One client. A BufferedProtocol, for it alone can say how much is read at a time."""

    def __init__(self, server: TcpServer) -> None:
        self._server = server
        self._buffer = bytearray()
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._pending = 0
        self._blocked = False  # the peer does not read what we write
        self._queued = False
        self._streams: deque[tuple[Query, Reply, Iterator[list[RR]]]] = deque()
        self._last = 0.0
        self._eof = False
        self._peer: tuple[str, int] = ("", 0)

    # --- asyncio.BufferedProtocol ---------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        if not self._server.admit(self):
            transport.abort()
            return
        self._peer = transport.get_extra_info("peername")[:2]
        transport.set_write_buffer_limits(high=WRITE_HIGH)
        if hasattr(transport, "set_read_buffer_limits"):  # TLS, which reads on while we do not
            transport.set_read_buffer_limits(high=READ)
        self._last = self._loop.time()
        self._timer = self._loop.call_later(FIRST_QUERY, self._check_idle, FIRST_QUERY)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._server.scratch  # emptied by buffer_updated before any other read

    def buffer_updated(self, nbytes: int) -> None:
        server = self._server
        self._buffer += server.scratch[:nbytes]
        server.held += nbytes
        if server.held > MAX_HELD and len(self._buffer) > READ:
            self.abort()
        else:
            self._go_on()

    def eof_received(self) -> bool:
        self._eof = True
        self._close_if_done()
        # Answers to what was asked still go out; TLS has no half-closed connections.
        return self._server.proto == "tcp"

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        forget(self._transport)
        self._transport = None
        self._server.held -= len(self._buffer)
        self._server.blocked -= self._blocked
        self._blocked = False
        self._buffer.clear()
        self._streams.clear()
        if self._timer is not None:
            self._timer.cancel()

    def pause_writing(self) -> None:
        self._blocked = True
        self._server.blocked += 1
        if self._server.blocked > MAX_BLOCKED:
            self.abort()
        else:
            self._update_reading()

    def resume_writing(self) -> None:
        self._blocked = False
        self._server.blocked -= 1
        self._last = self._loop.time()
        self._write_streams()
        self._go_on()

    # --- questions ------------------------------------------------------------------------

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def take_turn(self) -> None:
        """Answer one question, if it still may be."""
        self._queued = False
        if self._transport is None or self._transport.is_closing():
            return
        size = self._message()
        if size and self._may_ask():
            wire = bytes(self._buffer[2:size])
            del self._buffer[:size]
            self._server.held -= size
            self._ask(wire)
        self._go_on()

    def _message(self) -> int:
        """Return the octets of the first message and its length, 0 if it has not all come."""
        buffer = self._buffer
        if len(buffer) < 2:
            return 0
        size = (buffer[0] << 8 | buffer[1]) + 2
        return size if len(buffer) >= size else 0

    def _may_ask(self) -> bool:
        return not self._blocked and self._pending < MAX_PIPELINED

    def _go_on(self) -> None:
        """Take a turn for the next question, read on, or close: whatever there is to do."""
        if not self._queued and self._may_ask() and self._message():
            self._queued = True
            self._server.queue(self)
        self._update_reading()
        self._close_if_done()

    def _ask(self, wire: bytes) -> None:
        now = self._loop.time()
        self._last = now
        try:
            query = parse_query(wire, self._peer, self._server.proto, now)
        except WireError as e:
            if e.rcode is None:
                self.abort()
            else:
                self._write(render_refusal(wire, e))
            return
        self._pending += 1

        def done(reply: Reply | Drop) -> None:
            self._pending -= 1
            self._last = self._loop.time()
            if self._transport is None:
                return
            self._answer(query, reply)
            self._go_on()

        result = self._server.exchange.answer(query, done)
        if isinstance(result, (Reply, Drop)):
            self._pending -= 1
            self._answer(query, result)

    # --- answers --------------------------------------------------------------------------

    def _answer(self, query: Query, outcome: Reply | Drop) -> None:
        if isinstance(outcome, Reply):
            try:
                wire = render_reply(query, outcome)
            except Exception:
                wire = self._server.exchange.render_panic(query)
            self._write(wire)
            if outcome.stream is not None:
                self._streams.append((query, outcome, iter(outcome.stream)))
                self._write_streams()

    def _write(self, wire: bytes) -> None:
        if self._transport is not None:
            self._transport.write(len(wire).to_bytes(2, "big") + wire)

    def _write_streams(self) -> None:
        """Write zone transfers for as long as the peer reads (RFC 5936 s2.2: many messages)."""
        while self._streams and not self._blocked and self._transport is not None:
            query, first, batches = self._streams[0]
            try:
                batch = next(batches, None)
                if batch is None:
                    self._streams.popleft()
                    continue
                more = Reply(first.rcode, batch, flags=first.flags)
                more.edns = first.edns
                wire = render_reply(query, more)
            except Exception:
                # Half a zone must not look like a whole one.
                self._server.exchange.panic("a zone transfer")
                self.abort()
                return
            self._write(wire)
        self._close_if_done()

    def _update_reading(self) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if not self._may_ask() or (len(self._buffer) > READ and self._message()):
            transport.pause_reading()
        else:
            transport.resume_reading()

    def _close_if_done(self) -> None:
        if (
            self._eof
            and not self._pending
            and not self._streams
            and not self._message()
            and self._transport is not None
        ):
            self._transport.close()

    def _check_idle(self, allowed: float) -> None:
        """Close a connection that asked nothing, or read nothing, for `allowed` seconds."""
        left = self._last + allowed - self._loop.time()
        if left > 0 or (self._pending and not self._blocked):
            self._timer = self._loop.call_later(max(left, 0.5), self._check_idle, IDLE)
        elif self._transport is not None:
            self._transport.abort() if self._blocked else self._transport.close()
            self._timer = self._loop.call_later(1.0, self.abort)
