"""UDP: datagrams in, datagrams out, in one callback for as long as the socket has any.

Decides nothing about answers. A question seen before leaves from the packet cache inside
the socket callback; any other goes through server/exchange.py (docs/DESIGN.md 1.3 point 2).
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import struct
import time
from typing import Any

from kdns.dns.message import Query, Reply, parse_query, render_header_error, render_reply
from kdns.errors import WireError
from kdns.plugins.plugin import Drop
from kdns.server.exchange import Exchange
from kdns.server.packetcache import PacketCache

# A query larger than this is no query; CoreDNS reads 512.
MAX_QUERY = 2048
# How many datagrams are taken at one go before timers and other sockets get their turn.
BATCH = 256
RECEIVE_BUFFER = 4 << 20
# Answers from the chain leave in bursts of up to this many: each lone datagram would wake its
# receiver, which costs more than making the answer. 16 answers take about 0.2 ms.
BURST = 16
_PKTINFO = struct.Struct("=I4s4s")


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
        self._burst: list[tuple[bytes, Any]] | None = None  # a list while draining
        if reply_from:
            if sock.family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
            else:
                sock.setsockopt(socket.IPPROTO_IP, 8, 1)  # IP_PKTINFO
        sock.setblocking(False)
        self._loop.add_reader(sock.fileno(), self._drain_wildcard if reply_from else self._drain)

    def close(self) -> None:
        """Stop reading and close the socket."""
        if self.sock.fileno() >= 0:
            self._loop.remove_reader(self.sock.fileno())
            self.sock.close()

    def _drain(self) -> None:
        receive, send = self.sock.recvfrom, self.sock.sendto
        cache = self.cache
        began = time.monotonic()
        hits = 0
        spent = 0.0
        self._burst = []
        try:
            for _ in range(BATCH):
                try:
                    datagram, peer = receive(MAX_QUERY)
                except BlockingIOError:
                    break
                except OSError:
                    continue  # an ICMP error of an earlier reply: the next read is fresh
                entry = cache.young.entries.get(datagram[2:])
                if entry is not None and entry.plain:
                    entry.hits += 1
                    hits += 1
                    try:  # noqa: SIM105 (suppress() costs 0.3 us here)
                        send(datagram[:2] + entry.wire, peer)
                    except OSError:
                        pass  # as lost on the way; the client asks again
                    continue
                now = time.monotonic()
                self._slow(datagram, peer, now, None)
                spent += time.monotonic() - now
        finally:
            self._flush(self._burst)
            self._burst = None
        if hits:
            cache.repeats += hits
            cache.busy += time.monotonic() - began - spent

    def _drain_wildcard(self) -> None:
        receive = self.sock.recvmsg
        space = socket.CMSG_SPACE(20)
        for _ in range(BATCH):
            try:
                datagram, ancillary, _, peer = receive(MAX_QUERY, space)
            except BlockingIOError:
                return
            except OSError:
                continue
            self._slow(datagram, peer, time.monotonic(), _source(ancillary))

    def _slow(self, datagram: bytes, peer: Any, now: float, source: Any) -> None:
        cache = self.cache
        key = datagram[2:]
        entry = cache.young.entries.get(key) or cache.find(key)
        if entry is not None:
            wire = entry.wire if entry.plain else cache.repeat(entry, now)
            if wire is not None:
                entry.hits += 1
                self._send(datagram[:2] + wire, peer, source)
                elapsed = time.monotonic() - now
                cache.repeats += 1
                cache.busy += elapsed
                if entry.on_repeat is not None:
                    try:
                        for call in entry.on_repeat:
                            call(peer[:2], int.from_bytes(datagram[:2], "big"), elapsed)
                    except Exception:
                        self.exchange.panic("a repeated question")
                return
        try:
            query = parse_query(datagram, peer[:2], "udp", now)
        except WireError as e:
            if e.rcode is not None:
                self._send(render_header_error(datagram, e.rcode), peer, source)
            return

        def done(reply: Reply | Drop) -> None:
            if isinstance(reply, Reply):
                # What it was made from may have changed while it was waited for.
                reply.keep = 0.0
                self._finish(key, query, reply, peer, source)

        result = self.exchange.answer(query, done)
        if isinstance(result, Reply):
            self._finish(key, query, result, peer, source)

    def _finish(self, key: bytes, query: Query, reply: Reply, peer: Any, source: Any) -> None:
        try:
            wire = render_reply(query, reply)
        except Exception:
            wire = self.exchange.render_panic(query)
            reply.keep = 0.0
        self._send(wire, peer, source)
        if reply.keep > 0:
            self.cache.keep(key, wire[2:], reply, query.received)

    def _send(self, wire: bytes, peer: Any, source: Any) -> None:
        burst = self._burst
        if burst is not None:
            burst.append((wire, peer))
            if len(burst) >= BURST:
                self._flush(burst)
            return
        try:
            if source is None:
                self.sock.sendto(wire, peer)
            else:
                self.sock.sendmsg([wire], [source], 0, peer)
        except OSError:
            pass  # as lost on the way; the client asks again

    def _flush(self, burst: list[tuple[bytes, Any]]) -> None:
        send = self.sock.sendto
        for wire, peer in burst:
            try:  # noqa: SIM105 (suppress() costs 0.3 us here)
                send(wire, peer)
            except OSError:
                pass  # as lost on the way; the client asks again
        burst.clear()


def _source(ancillary: list[tuple[int, int, bytes]]) -> tuple[int, int, bytes] | None:
    """Return what makes the kernel send from the address the query came to."""
    for level, kind, value in ancillary:
        if level == socket.IPPROTO_IP and kind == 8:
            _, local, address = _PKTINFO.unpack(value[:12])
            # ipi_spec_dst is the address to send from; the interface is left to routing.
            return level, kind, _PKTINFO.pack(0, address if local == b"\0\0\0\0" else local, b"")
        if level == socket.IPPROTO_IPV6 and kind == socket.IPV6_PKTINFO:
            scoped = ipaddress.IPv6Address(value[:16]).is_link_local
            return level, kind, value if scoped else value[:16] + bytes(4)
    return None
