"""UDP: datagrams in, datagrams out, in one callback for as long as the socket has any.

Decides nothing about answers. A question seen before leaves from the packet cache inside
the socket callback; any other goes through server/exchange.py (docs/DESIGN.md 1.3 point 2).
"""

from __future__ import annotations

import asyncio
import ctypes
import socket
import time
from typing import Any

from kdns.dns.message import Query, Reply, parse_query, render_refusal, render_reply
from kdns.errors import WireError
from kdns.plugins.plugin import Drop
from kdns.server.datagrams import (
    QUERY_AT,
    REST_AT,
    REST_OF,
    SLOTS,
    came_at,
    room_for,
    want_arrivals,
    want_source,
)
from kdns.server.exchange import Exchange
from kdns.server.loop import read_while_waiting, stop_reading
from kdns.server.packetcache import Entry, PacketCache

# How often the room for datagrams is filled before timers and other sockets get their turn.
ROUNDS = 4
RECEIVE_BUFFER = 4 << 20
# Answers from the chain leave in bursts of up to this many: each lone datagram would wake its
# receiver, which costs more than making the answer. 16 answers take about 0.2 ms.
BURST = 16
# Seconds after which nobody waits for an answer any more: resolv.conf(5), Go and dig ask again,
# or give up, after five. A burst of questions that are dear (an answer of a thousand endpoints
# is made in 3 ms) can fill the socket's buffer with tens of seconds of work.
STALE = 5.0
# Every so many answers from a template it is seen whether it is always the same spelling.
LOOK_AT_SPELLING = 3


class UdpListener:
    """One socket. `reply_from` True: it is bound to the wildcard address and sends each reply
    from the address that was asked."""

    def __init__(
        self,
        sock: socket.socket,
        exchange: Exchange,
        cache: PacketCache,
        reply_from: bool = False,
    ) -> None:
        self.sock = sock
        self.exchange = exchange
        self.cache = cache
        self.address: tuple[str, int] = sock.getsockname()[:2]
        self._loop = asyncio.get_running_loop()
        self._room = room_for(self._loop, sock, reply_from)
        self._fd = ctypes.c_int(sock.fileno())
        # The slot whose datagram is being answered, and whether its answer is there.
        self._slot = 0
        self._filled = False
        # What keep() is to be told once the answer has left.
        self._made: tuple[bytes, Query, bytes, Reply, float] | None = None
        # Since when there was more than fitted into the room, each time it was looked; 0: not.
        self._full_since = 0.0
        if reply_from:
            want_source(sock)
        want_arrivals(sock)
        sock.setblocking(False)
        read_while_waiting(self._loop, sock.fileno(), self._drain)

    def close(self) -> None:
        """Answer what has come, stop reading and close the socket."""
        if self.sock.fileno() >= 0:
            self._drain()
            stop_reading(self._loop, self.sock.fileno())
            self.sock.close()

    def _drain(self) -> bool:
        """Answer what has come; return whether all of it was answered from memory, so that
        nothing has begun."""
        room = self._room
        count = room.receive(self._fd)
        if count == 1:
            return self._answer_one()
        done = True
        for more in range(ROUNDS - 1, -1, -1):
            full = count == SLOTS
            if not full:
                self._full_since = 0.0
            if full and self._is_stale():
                self.exchange.stale.add(count)
            elif count and not self._answer(room.sizes(count)):
                done = False
            if not full or not more:
                break
            count = room.receive(self._fd)
        return done

    def _is_stale(self) -> bool:
        """Return whether those in the full room came too long ago."""
        now = time.monotonic()
        if not self._full_since:
            self._full_since = now
        if now - self._full_since < STALE:
            return False
        came = came_at(self.sock)
        return came is not None and time.time() - came > STALE

    def _answer_one(self) -> bool:
        """As _answer(), for one datagram: unless much is asked it comes alone, and the fewer
        steps are taken the less of them is new to the processor's caches."""
        room, cache = self._room, self.cache
        began = time.monotonic()
        entry = cache.young.entries.get(room.first())
        if entry is None or not entry.plain:
            return self._answer(room.sizes(1))
        entry.hits += 1
        vectors, to = room.vectors, REST_AT[0]
        vectors[to] = entry.place
        vectors[to + 1] = entry.rest
        room.send(self._fd, 0, 1)
        cache.repeats += 1
        cache.busy += time.monotonic() - began
        return True

    def _answer(self, sizes: list[int]) -> bool:
        """Answer the datagrams in the room; those that wait for somebody else leave later.
        Return whether the packet cache had all answers."""
        room, cache = self._room, self.cache
        queries, vectors = room.queries, room.vectors
        fd = self._fd
        began = time.monotonic()
        spent = 0.0
        misses = 0
        first = 0  # of those filled and not yet sent
        young, find_other = cache.young.entries.get, cache.find_other
        # Kept to the end, for what was sent lies in them.
        entries = [
            young(REST_OF[size](queries, at)[0])
            for size, at in zip(sizes, QUERY_AT)  # noqa: B905 - there are more slots than sizes
        ]
        for entry, to in zip(entries, REST_AT):  # noqa: B905
            if entry is not None and entry.plain:
                entry.hits += 1
                vectors[to] = entry.place
                vectors[to + 1] = entry.rest
                continue
            slot = to >> 2
            at = QUERY_AT[slot]
            datagram = queries[at : at + sizes[slot]].tobytes()
            if self._made is not None:
                self._keep_made()
            if entry is None:
                entry = find_other(datagram)
            if (
                entry is not None
                and (template := entry.template) is not None
                and entry.until > began
                and entry.lease.held
            ):
                wire = template.fill(datagram)
                room.put(slot, wire)
                entry.hits += 1
                if not entry.hits % LOOK_AT_SPELLING:
                    cache.note_spelling(entry, datagram, wire)
                continue
            now = time.monotonic()
            self._slot, self._filled = slot, False
            self._slow(datagram, now, entry)
            misses += 1
            spent += time.monotonic() - now
            if not self._filled:
                room.send(fd, first, slot)
                first = slot + 1
            elif slot - first >= BURST:
                room.send(fd, first, slot + 1)
                first = slot + 1
        room.send(fd, first, len(sizes))
        if self._made is not None:
            self._keep_made()
        if misses < len(sizes):
            cache.repeats += len(sizes) - misses
            cache.busy += time.monotonic() - began - spent
        return not misses

    def _slow(self, datagram: bytes, now: float, entry: Entry | None) -> None:
        """Answer what does not leave from memory as it is. entry -- the one held, if any"""
        cache = self.cache
        peer = self._room.peer(self._slot)
        source = self._room.source(self._slot)
        if entry is not None:
            wire = cache.repeat(entry, datagram, now)
            if wire is not None:
                self._repeat(entry, wire, datagram, peer, now)
                return
        try:
            query = parse_query(datagram, peer[:2], "udp", now)
        except WireError as e:
            if e.rcode is not None:
                self._fill(render_refusal(datagram, e))
            return

        def done(reply: Reply | Drop) -> None:
            if isinstance(reply, Reply):
                # What it was made from may have changed while it was waited for.
                reply.keep = 0.0
                self._send(self._render(query, reply), peer, source)

        result = self.exchange.answer(query, done)
        if isinstance(result, Reply):
            wire = self._render(query, result)
            self._fill(wire)
            if result.keep > 0:
                self._made = datagram, query, wire, result, now

    def _keep_made(self) -> None:
        """Remember the answer made last: who asked alone does not wait for this."""
        made, self._made = self._made, None
        if made is not None:
            self.cache.keep(*made)

    def _repeat(self, entry: Entry, wire: bytes, datagram: bytes, peer: Any, now: float) -> None:
        entry.hits += 1
        self._fill(wire)
        elapsed = time.monotonic() - now
        self.cache.repeats += 1
        self.cache.busy += elapsed
        if entry.on_repeat is not None:
            try:
                for call in entry.on_repeat:
                    call(peer[:2], int.from_bytes(datagram[:2], "big"), elapsed)
            except Exception:
                self.exchange.panic("a repeated question")

    def _render(self, query: Query, reply: Reply) -> bytes:
        try:
            return render_reply(query, reply)
        except Exception:
            reply.keep = 0.0
            return self.exchange.render_panic(query)

    def _fill(self, wire: bytes) -> None:
        """Answer the slot in hand; it leaves with its neighbours."""
        self._room.put(self._slot, wire)
        self._filled = True

    def _send(self, wire: bytes, peer: Any, source: Any) -> None:
        try:
            if source is None:
                self.sock.sendto(wire, peer)
            else:
                self.sock.sendmsg([wire], [source], 0, peer)
        except OSError:
            pass  # as lost on the way; the client asks again
