"""Sockets for one place to listen at: which are opened, how they are closed again.

A wildcard place gets one UDP socket for each address the host has now, which is the fast
way, and one for the wildcard address, which serves addresses that come later and replies
from the one that was asked.

Where workers serve (server/workers.py), a place has a set of sockets for each of them; all sets
have the same port, and the kernel shares the questions out among them (SO_REUSEPORT).
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from dataclasses import dataclass, field

from kdns.metrics import Metrics
from kdns.server.addresses import local_addresses
from kdns.server.exchange import Exchange
from kdns.server.http import DohServer
from kdns.server.packetcache import PacketCache
from kdns.server.tcp import TcpServer
from kdns.server.udp import RECEIVE_BUFFER, UdpListener

BACKLOG = 512
# Of them so many are accepted in one step of the loop: each has a place and, over TLS, memory
# before the oldest can go, and others wait meanwhile.
ACCEPTED = 64
# How many free ports are tried where port 0 was asked for and TCP has not the one UDP got.
PORT_TRIES = 20
# One UDP socket an address costs a file descriptor; hosts with more addresses (nodes with
# kube-ipvs0) are served through the wildcard socket alone.
MAX_OWN_SOCKETS = 64


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where to listen. address "" is every address; port 0 any free one."""

    scheme: str
    address: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{self.scheme}://{host}:{self.port}"


@dataclass(slots=True)
class Sockets:
    """The bound sockets of one place, or of one worker there.

    udp -- and whether a socket answers from the address that was asked
    """

    port: int
    udp: list[tuple[socket.socket, bool]] = field(default_factory=list)
    tcp: list[socket.socket] = field(default_factory=list)
    closed: bool = False

    def every(self) -> list[socket.socket]:
        """Return those of UDP, then those that listen."""
        return [*(sock for sock, _ in self.udp), *self.tcp]

    def close(self) -> None:
        self.closed = True
        for sock in self.every():
            sock.close()


class Listener:
    """All sockets of one Place.

    shared -- with bind_for(): each worker's
    """

    def __init__(self, place: Place, exchange: Exchange, metrics: Metrics) -> None:
        self.place = place
        self.exchange = exchange
        self.port = place.port
        self.caches: list[PacketCache] = []
        self.shared: list[Sockets] = []
        self._metrics = metrics
        self._udp: list[UdpListener] = []
        self._tcp: list[tuple[asyncio.Server, TcpServer]] = []
        self._doh: DohServer | None = None
        self.context: ssl.SSLContext | None = None

    async def open(
        self, context: ssl.SSLContext | None = None, bound: Sockets | None = None
    ) -> None:
        """Open everything or nothing; bound -- the sockets, if there are some already. Raises
        OSError."""
        self.context = context
        try:
            if self.place.scheme == "https":
                await self._open_doh(context, bound)
                return
            bound = bound or _bind(self.place)
            self.port = bound.port
            cache = PacketCache()
            for number, (sock, replies_from) in enumerate(bound.udp):
                if replies_from or not number:
                    cache = PacketCache()  # one for a family of addresses
                    self.caches.append(cache)
                self._udp.append(UdpListener(sock, self.exchange, cache, replies_from))
            await self._open_streams(bound.tcp, context)
        except BaseException:
            if bound is not None:
                bound.close()
            await self.close()
            raise

    def bind_for(self, count: int, context: ssl.SSLContext | None) -> None:
        """Bind `count` sets of sockets and serve nothing. Raises OSError."""
        self.context = context
        self.shared = bind_shared(self.place, count)
        self.port = self.shared[0].port

    def bind_again(self, number: int) -> None:
        """Bind anew one set of `shared` that was closed. Raises OSError."""
        self.shared[number] = _bind(Place(*_parts(self.place, self.port)), shared=True)

    async def _open_doh(self, context: ssl.SSLContext | None, bound: Sockets | None) -> None:
        self._doh = DohServer(
            self.place.address, self.place.port, context, self.exchange,
            self._metrics, str(self.place),
        )  # fmt: skip
        await self._doh.start(() if bound is None else bound.tcp)
        self.port = self._doh.port

    async def _open_streams(
        self, listening: list[socket.socket], context: ssl.SSLContext | None
    ) -> None:
        loop = asyncio.get_running_loop()
        proto = "tcp" if self.place.scheme == "dns" else "tls"
        rejected = self._metrics.counter(
            "kdns_tcp_connections_rejected_total", "Connections over the limit of a listener."
        ).labels()
        for sock in listening:
            server = TcpServer(self.exchange, proto, rejected, context)
            opened = await loop.create_server(server.protocol, sock=sock, backlog=ACCEPTED)
            sock.listen(BACKLOG)
            self._tcp.append((opened, server))

    async def close(self) -> None:
        """Close all sockets and connections."""
        for udp in self._udp:
            udp.close()
        for listening, server in self._tcp:
            listening.close()
            server.close()
        if self._doh is not None:
            await self._doh.stop()
        for cache in self.caches:
            cache.settle()
        for bound in self.shared:
            bound.close()
        self._udp, self._tcp, self._doh, self.caches, self.shared = [], [], None, [], []


# --- binding ------------------------------------------------------------------------------


def bind_shared(place: Place, count: int) -> list[Sockets]:
    """Return `count` sets of sockets of a place, all of one port. Raises OSError."""
    first = _bind(place, shared=True, probe=True)
    sets = [first]
    try:
        for _ in range(1, count):
            sets.append(_bind(Place(*_parts(place, first.port)), shared=True))
    except BaseException:
        for one in sets:
            one.close()
        raise
    return sets


def _parts(place: Place, port: int) -> tuple[str, str, int]:
    return place.scheme, place.address, port


def _bind(place: Place, shared: bool = False, probe: bool = False) -> Sockets:
    """Return one set of sockets of a place.

    shared -- other sets have the same port; probe -- nobody may have it yet
    """
    for attempt in range(PORT_TRIES):
        bound = Sockets(place.port)
        try:
            _bind_into(bound, place, shared, probe)
            return bound
        except OSError:
            bound.close()
            if place.port or attempt == PORT_TRIES - 1:
                raise
    raise AssertionError("not reached")


def _bind_into(bound: Sockets, place: Place, shared: bool, probe: bool) -> None:
    hosts = _hosts(place)
    if place.scheme == "dns":
        for host in hosts:
            _bind_udp(bound, host, not place.address, shared, probe)
    for host in hosts:
        sock = _tcp_socket(host, bound.port, shared, probe)
        bound.tcp.append(sock)
        bound.port = sock.getsockname()[1]


def _bind_udp(bound: Sockets, host: str, wildcard: bool, shared: bool, probe: bool) -> None:
    sock = _udp_socket(host, bound.port, wildcard, shared, probe or not shared)
    bound.udp.append((sock, wildcard))
    bound.port = sock.getsockname()[1]
    if not wildcard:
        return
    own = [a.address for a in local_addresses() if (":" in a.address) == (":" in host)]
    for address in own if len(own) <= MAX_OWN_SOCKETS else ():
        try:
            one = _udp_socket(address, bound.port, True, shared, False)
        except OSError:
            continue  # gone again, or still tentative: the wildcard socket serves it
        bound.udp.append((one, False))


def _hosts(place: Place) -> list[str]:
    if place.address:
        return [place.address]
    return ["0.0.0.0", "::"] if _has_ipv6() else ["0.0.0.0"]


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.bind(("::", 0))
        return True
    except OSError:
        return False


def _udp_socket(host: str, port: int, wildcard: bool, shared: bool, probe: bool) -> socket.socket:
    """Return a bound UDP socket.

    wildcard -- sockets of other addresses have the same port; shared -- also of this address
    probe    -- nobody else may have it: the ways in which we share it would let a second server
                take it unnoticed
    """
    info = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST)
    family, kind, proto, _, address = info[0]
    if probe and port and (shared or (wildcard and host in ("0.0.0.0", "::"))):
        with socket.socket(family, kind, proto) as other:
            _only_ipv6(other)
            other.bind(address)
    sock = socket.socket(family, kind, proto)
    try:
        _only_ipv6(sock)
        if wildcard:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        sock.bind(address)
    except BaseException:
        sock.close()
        raise
    return sock


def _tcp_socket(host: str, port: int, shared: bool, probe: bool) -> socket.socket:
    """Return a bound TCP socket that does not listen yet; as above."""
    info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    family, kind, proto, _, address = info[0]
    if shared and probe and port:
        with socket.socket(family, kind, proto) as other:
            _only_ipv6(other)
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(address)
    sock = socket.socket(family, kind, proto)
    try:
        _only_ipv6(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)
    except BaseException:
        sock.close()
        raise
    return sock


def _only_ipv6(sock: socket.socket) -> None:
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
