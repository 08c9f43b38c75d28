"""HTTP: health, readiness, metrics, and DNS over HTTPS (RFC 8484), on aiohttp.

Decides addresses and lifetimes. What is said under a path is its plugin's HttpRoute; what is
answered to a DoH question is the chain's. aiohttp takes as long to import as half of a start:
a server may have its address before, and who connects waits in the backlog until it serves.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import errno
import importlib
import logging
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from kdns.dns import types as t
from kdns.dns.message import Query, Reply, parse_query, render_refusal, render_reply
from kdns.errors import WireError
from kdns.metrics import Cell, Metrics
from kdns.plugins.plugin import Drop, HttpRoute
from kdns.server.exchange import Exchange
from kdns.server.tls import CLOSE, Handshakes, forget

if TYPE_CHECKING:
    from aiohttp import web

log = logging.getLogger("kdns")

DNS_MESSAGE = "application/dns-message"  # RFC 8484 s6
MAX_DOH = 65535
# Bounds of max-age, seconds, as CoreDNS: the lower one is for failures and referrals.
MIN_FRESH, MAX_FRESH = 5, 3600
SHUTDOWN = 0.5  # seconds that open requests get when the server stops
BACKLOG = 128  # connections that wait, also those of before it serves
# Connections of one address. Probes and scrapes need a handful; clients of DNS over HTTPS keep
# theirs open.
MAX_CONNECTIONS = 100
MAX_DOH_CONNECTIONS = 500
# Seconds, as CoreDNS: until a request has come, from its first octet or the connection's
# begin; until its answer is read; from then to the next request.
REQUEST, WRITE, IDLE = 5.0, 10.0, 120.0
LINGER = 1.0  # that the rest of a request nobody wants may still come, so that its answer is read


def split_address(address: str) -> tuple[str, int]:
    """Return (host, port) of "host:port", ":port" or "[::1]:port"; host "" is every address."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


class Guests:
    """The connections of one server, for all its sockets: who comes, and who has to go.

    make -- aiohttp's protocol for a connection, set before the first one comes
    """

    def __init__(
        self, limit: int, context: ssl.SSLContext | None = None, rejected: Cell | None = None
    ) -> None:
        self.make: Callable[[], Any]
        self.here: dict[Any, Guest] = {}  # by aiohttp's protocol, which requests name
        self._limit = limit
        self._rejected = rejected
        self.handshakes: Handshakes | None = None
        if context is not None:
            self.handshakes = Handshakes(
                context, lambda: Guest(self), limit, lambda: len(self.here), rejected
            )

    def protocol(self) -> asyncio.BaseProtocol:
        """For loop.create_server."""
        return Guest(self) if self.handshakes is None else self.handshakes.protocol()

    def admit(self, guest: Guest) -> bool:
        """Return False if all places are taken by connections whose requests are being answered.
        Else the one goes that has been idle longest; those that never asked go first, so that a
        flood of them does not end those in use."""
        if self.handshakes is not None:
            self.handshakes.end(guest)
        if len(self.here) >= self._limit:
            if self._rejected is not None:
                self._rejected.add()
            idle = [g for g in self.here.values() if g.phase != ANSWERING]
            if not idle:
                return False
            min(idle, key=lambda g: (g.asked, g.since)).abort()
        self.here[guest.inner] = guest
        return True

    def leave(self, guest: Guest) -> None:
        self.here.pop(guest.inner, None)

    def close(self) -> None:
        """Close all connections at once."""
        if self.handshakes is not None:
            self.handshakes.close()
        for guest in list(self.here.values()):
            guest.abort()


READING, ANSWERING, WRITING, WAITING = range(4)


class Guest(asyncio.Protocol):
    """One connection: aiohttp's protocol (`inner`), and a limit to the time of each phase.

    phase -- since `since`; asked -- whether it has ever had an answer
    """

    def __init__(self, guests: Guests) -> None:
        self.inner: Any = None  # from the end of the handshake on, for it takes memory
        self.phase = READING
        self.asked = False
        self._guests = guests
        self._loop = asyncio.get_running_loop()
        self.since = self._loop.time()
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None

    def enter(self, phase: int) -> None:
        """Begin a phase."""
        self.phase = phase
        self.since = self._loop.time()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        # To answer has no limit here: what a request waits for has its own.
        if phase != ANSWERING and self._transport is not None:
            allowed = {READING: REQUEST, WRITING: WRITE, WAITING: IDLE}[phase]
            self._timer = self._loop.call_later(allowed, self._expire)

    def _expire(self) -> None:
        transport = self._transport
        if transport is None:
            return
        if self.phase == WRITING and not transport.get_write_buffer_size():
            self.enter(WAITING)
        elif self.phase == WRITING:
            self.abort()
        else:
            transport.close()
            self._timer = self._loop.call_later(CLOSE, self.abort)

    def abort(self) -> None:
        """Close the connection at once: whoever has to go gets no say in it."""
        self._guests.leave(self)  # its place is free
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio.Protocol -----------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self.inner = self._guests.make()
        if not self._guests.admit(self):
            transport.abort()
            return
        if hasattr(transport, "set_read_buffer_limits"):  # TLS, which reads on while we do not
            transport.set_read_buffer_limits(high=MAX_DOH)
        self.enter(READING)
        self.inner.connection_made(transport)

    def data_received(self, octets: bytes) -> None:
        if self._transport is None or self.inner not in self._guests.here:
            return
        unread = self._transport.get_write_buffer_size()
        if self.phase == WAITING or (self.phase == WRITING and not unread):
            self.enter(READING)
        self.inner.data_received(octets)

    def eof_received(self) -> bool | None:
        return bool(self.inner.eof_received())

    def pause_writing(self) -> None:
        self.inner.pause_writing()

    def resume_writing(self) -> None:
        self.inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._guests.leave(self)
        forget(self._transport)
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()
        self.inner.connection_lost(exc)


class _Server:
    """One listening address; a subclass answers requests."""

    def __init__(
        self,
        host: str,
        port: int,
        context: ssl.SSLContext | None,
        limit: int,
        rejected: Cell | None = None,
    ) -> None:
        self.port = port
        self._host = host
        self._bound: list[socket.socket] = []  # and not served yet
        self._guests = Guests(limit, context, rejected)
        self._listening: list[asyncio.Server] = []
        self._runner: web.ServerRunner | None = None

    async def start(self, bound: Sequence[socket.socket] = ()) -> None:
        """Listen; `port` is then the one that was got. bound -- the sockets, if there are some
        already. Raises OSError."""
        if bound:
            self._bound = [*bound]
            self.port = bound[0].getsockname()[1]
        else:
            await self.bind()
        await self.serve()

    async def bind(self) -> None:
        """Take the address; `port` is then the one that was got. Raises OSError."""
        self._bound = await _bind(self._host, self.port)
        self.port = self._bound[0].getsockname()[1]

    async def serve(self) -> None:
        """Answer those who come to the address taken before."""
        # In a thread: it must not hold up the answers to names.
        await asyncio.to_thread(importlib.import_module, "aiohttp.web")
        from aiohttp import web

        server = web.Server(self._attend, lingering_time=LINGER)
        self._guests.make = server
        self._runner = web.ServerRunner(server, shutdown_timeout=SHUTDOWN)
        await self._runner.setup()
        loop = asyncio.get_running_loop()
        while self._bound:
            # aiohttp's own way (web.SockSite) has neither a limit nor a time-out.
            self._listening.append(
                await loop.create_server(
                    self._guests.protocol, sock=self._bound[0], backlog=BACKLOG
                )
            )
            self._bound.pop(0)  # asyncio's from here on

    async def stop(self) -> None:
        """Close the listener and its connections."""
        for sock in self._bound:
            sock.close()
        for listening in self._listening:
            listening.close()
        self._bound, self._listening = [], []
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        self._guests.close()

    async def _attend(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer a request, and have the connection's times go by it."""
        guest = self._guests.here.get(request.protocol)
        if guest is None:
            return await self._handle(request)
        guest.enter(ANSWERING)
        try:
            return await self._handle(request)
        finally:
            guest.asked = True
            guest.enter(WRITING)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        raise NotImplementedError


async def _bind(host: str, port: int) -> list[socket.socket]:
    """Return listening sockets of a host, "" for every address: one for each family that the
    machine has. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    bound: list[socket.socket] = []
    try:
        for family, kind, proto, _, address in dict.fromkeys(found):
            try:
                sock = socket.socket(family, kind, proto)
            except OSError as e:
                if e.errno == errno.EAFNOSUPPORT and (host == "" or len(found) > 1):
                    continue
                raise
            bound.append(sock)
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                sock.bind(address)
            except OSError as e:
                # IPv6 that is switched off: the family is there, its addresses are not.
                if e.errno != errno.EADDRNOTAVAIL or family != socket.AF_INET6 or host:
                    raise
                bound.pop().close()
                continue
            sock.listen(BACKLOG)
        if not bound:
            raise OSError(errno.EADDRNOTAVAIL, "no address of that name can be listened at")
    except BaseException:
        for sock in bound:
            sock.close()
        raise
    return bound


class HttpServer(_Server):
    """One address with any number of paths; paths may be replaced while it runs.

    fallback -- answers any path that has no route: returns (status, headers, body)
    before   -- is waited for before the route of a path answers
    """

    def __init__(self, address: str, context: ssl.SSLContext | None = None) -> None:
        super().__init__(*split_address(address), context, MAX_CONNECTIONS)
        self.address = address
        self.routes: dict[str, HttpRoute] = {}
        self.fallback: Callable[[str], tuple[int, dict[str, str], bytes]] | None = None
        self.before: Callable[[str], Awaitable[None]] | None = None

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        from aiohttp import web

        route = self.routes.get(request.path)
        if route is None and self.fallback is None:
            known = ", ".join(sorted(self.routes))
            return web.Response(status=404, text=f"not found; there is {known}\n")
        if request.method not in ("GET", "HEAD"):
            return web.Response(status=405, text="only GET\n")
        if route is not None:
            if self.before is not None:
                await self.before(request.path)
            status, content_type, body = route.handle(dict(request.headers))
            headers = {"Content-Type": content_type}
        else:
            assert self.fallback is not None
            status, headers, body = self.fallback(request.path)
        return web.Response(status=status, body=body, headers=headers)


class DohServer(_Server):
    """DNS over HTTPS on one address. Path /dns-query, as CoreDNS."""

    def __init__(
        self,
        host: str,
        port: int,
        context: ssl.SSLContext | None,
        exchange: Exchange,
        metrics: Metrics,
        label: str,
    ) -> None:
        rejected = metrics.counter(
            "kdns_tcp_connections_rejected_total", "Connections over the limit of a listener."
        ).labels()
        super().__init__(host, port, context, MAX_DOH_CONNECTIONS, rejected)
        self.exchange = exchange
        self._count = metrics.counter(
            "coredns_dns_https_responses_total",
            "Counter of DoH responses per server and http status code.",
            ("server", "status"),
        )
        self._label = label

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        response = await self._answer(request)
        self._count.labels(self._label, str(response.status)).add()
        return response

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        from aiohttp import web

        if request.path != "/dns-query":
            return web.Response(status=404, text="not found; ask under /dns-query\n")
        try:
            async with asyncio.timeout(REQUEST):
                wire = await self._read(request)
        except TimeoutError:
            late = web.Response(status=408, text=f"the question took over {REQUEST:g} s to come\n")
            late.force_close()
            return late
        except ValueError as e:
            return web.Response(status=400, text=f"{e}\n")
        if wire is None:
            return web.Response(status=405, text="only GET with ?dns= and POST\n")
        peer = request.transport.get_extra_info("peername") if request.transport else None
        client = (str(peer[0]), int(peer[1])) if peer else ("", 0)
        try:
            query = parse_query(wire, client, "https", time.monotonic())
        except WireError as e:
            if e.rcode is None:
                return web.Response(status=400, text=f"{e}\n")
            return web.Response(body=render_refusal(wire, e), content_type=DNS_MESSAGE)
        future: asyncio.Future[Reply | Drop] = asyncio.get_running_loop().create_future()

        def done(reply: Reply | Drop) -> None:
            if not future.done():
                future.set_result(reply)

        result = self.exchange.answer(query, done)
        outcome = result if isinstance(result, (Reply, Drop)) else await future
        if isinstance(outcome, Drop):
            return web.Response(status=500, text="no answer\n")
        wire, fresh = self._render(query, outcome)
        return web.Response(
            body=wire,
            content_type=DNS_MESSAGE,
            headers={"Cache-Control": f"max-age={fresh}"},
        )

    def _render(self, query: Query, reply: Reply) -> tuple[bytes, int]:
        """Return a reply's octets and its freshness; SERVFAIL if it cannot be rendered: the
        failure is that of DNS, not of HTTP (RFC 8484 s4.2.1)."""
        try:
            return render_reply(query, reply), freshness(reply)
        except Exception:
            return self.exchange.render_panic(query), MIN_FRESH

    async def _read(self, request: web.BaseRequest) -> bytes | None:
        """Return the DNS message of a request; raises ValueError where it has none."""
        if request.method == "GET":
            text = request.query.get("dns", "")
            if not text or len(text) > MAX_DOH:
                raise ValueError("no 'dns' parameter")
            if len(request.query.getall("dns")) > 1:
                raise ValueError("more than one 'dns' parameter")
            try:
                return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
            except (binascii.Error, ValueError):
                raise ValueError("'dns' is not base64url") from None
        if request.method == "POST":
            if request.content_type != DNS_MESSAGE:
                raise ValueError(f"content type must be {DNS_MESSAGE}")
            body = await request.content.read(MAX_DOH + 1)
            while len(body) <= MAX_DOH and not request.content.at_eof():
                body += await request.content.read(MAX_DOH + 1 - len(body))
            if len(body) > MAX_DOH:
                raise ValueError("longer than a DNS message")
            return body
        return None


def freshness(reply: Reply) -> int:
    """Return how many seconds a reply may be kept (RFC 8484 s5.1): its lowest TTL, as CoreDNS
    reckons it; short for what is no answer and no denial."""
    negative = any(rr.type == t.SOA for rr in reply.authority)
    if reply.rcode == t.NXDOMAIN:
        usable = not reply.answer
    else:
        referral = any(rr.type == t.NS for rr in reply.authority)
        usable = reply.rcode == t.NOERROR and bool(reply.answer or negative or not referral)
    ttls = [rr.ttl for rr in (*reply.answer, *reply.authority, *reply.additional)]
    return min(MAX_FRESH, *ttls) if usable and ttls else MIN_FRESH
