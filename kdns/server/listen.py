"""Sockets for one place to listen at: which are opened, how they are closed again.

A wildcard place gets one UDP socket for each address the host has now, which is the fast
way, and one for the wildcard address, which serves addresses that come later and replies
from the one that was asked.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from dataclasses import dataclass

from kdns.metrics import Metrics
from kdns.server.addresses import local_addresses
from kdns.server.exchange import Exchange
from kdns.server.http import DohServer
from kdns.server.packetcache import PacketCache
from kdns.server.tcp import TcpServer
from kdns.server.udp import RECEIVE_BUFFER, UdpListener

BACKLOG = 512
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


class Listener:
    """All sockets of one Place."""

    def __init__(self, place: Place, exchange: Exchange, metrics: Metrics) -> None:
        self.place = place
        self.exchange = exchange
        self.port = place.port
        self.caches: list[PacketCache] = []
        self._metrics = metrics
        self._udp: list[UdpListener] = []
        self._tcp: list[tuple[asyncio.Server, TcpServer]] = []
        self._doh: DohServer | None = None
        self.context: ssl.SSLContext | None = None

    async def open(self, context: ssl.SSLContext | None = None) -> None:
        """Open everything or nothing. Raises OSError."""
        self.context = context
        try:
            if self.place.scheme == "https":
                self._doh = DohServer(
                    self.place.address, self.place.port, context, self.exchange,
                    self._metrics, str(self.place),
                )  # fmt: skip
                await self._doh.start()
                self.port = self._doh.port
            elif self.place.scheme == "tls":
                await self._open_streams(self._hosts(), self.place.port, "tls", context)
            else:
                await self._open_dns()
        except BaseException:
            await self.close()
            raise

    def _hosts(self) -> list[str]:
        if self.place.address:
            return [self.place.address]
        return ["0.0.0.0", "::"] if _has_ipv6() else ["0.0.0.0"]

    async def _open_dns(self) -> None:
        for attempt in range(PORT_TRIES):
            try:
                await self._open_port(self.place.port)
                return
            except OSError:
                await self.close()
                if self.place.port or attempt == PORT_TRIES - 1:
                    raise

    async def _open_port(self, port: int) -> None:
        hosts = self._hosts()
        for host in hosts:
            wildcard = not self.place.address
            sock = _udp_socket(host, port, shared=wildcard)
            port = sock.getsockname()[1]
            cache = PacketCache()
            self.caches.append(cache)
            self._udp.append(UdpListener(sock, self.exchange, cache, reply_from=wildcard))
            if not wildcard:
                continue
            own = [a.address for a in local_addresses() if (":" in a.address) == (":" in host)]
            for address in own if len(own) <= MAX_OWN_SOCKETS else ():
                try:
                    one = _udp_socket(address, port, shared=True)
                except OSError:
                    continue  # gone again, or still tentative: the wildcard socket serves it
                self._udp.append(UdpListener(one, self.exchange, cache))
        await self._open_streams(hosts, port, "tcp", None)
        self.port = port

    async def _open_streams(
        self, hosts: list[str], port: int, proto: str, context: ssl.SSLContext | None
    ) -> None:
        loop = asyncio.get_running_loop()
        rejected = self._metrics.counter(
            "kdns_tcp_connections_rejected_total", "Connections over the limit of a listener."
        ).labels()
        for host in hosts:
            server = TcpServer(self.exchange, proto, rejected)
            listening = await loop.create_server(
                server.protocol, host, port, ssl=context, backlog=BACKLOG, reuse_address=True
            )
            port = listening.sockets[0].getsockname()[1]
            self._tcp.append((listening, server))
        self.port = port

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
        self._udp, self._tcp, self._doh, self.caches = [], [], None, []


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.bind(("::", 0))
        return True
    except OSError:
        return False


def _udp_socket(host: str, port: int, shared: bool) -> socket.socket:
    """Return a bound UDP socket. shared: sockets of other addresses have the same port."""
    info = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST)
    family, kind, proto, _, address = info[0]
    if shared and port and host in ("0.0.0.0", "::"):
        # SO_REUSEADDR lets UDP sockets of different addresses share the port, but would
        # also let a second server take it unnoticed: so first see that it is free.
        with socket.socket(family, kind, proto) as probe:
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(address)
    sock = socket.socket(family, kind, proto)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        sock.bind(address)
    except BaseException:
        sock.close()
        raise
    return sock
