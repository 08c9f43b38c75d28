"""A scriptable DNS server on loopback: the other end of `forward` in tests.

Runs in a thread with a loop of its own, so that it serves blocking tests and asyncio tests
alike. dnspython reads and writes its messages, independently of what is tested. `ZoneAnswers`
answers as the server did that the recordings of shared/golden/dns were made with.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset
import dns.zone

GOLDEN = Path(__file__).parent / "golden"


class Asked(NamedTuple):
    """One question that arrived. proto: "udp", "tcp" or "tls"; client: its (address, port)."""

    proto: str
    wire: bytes
    client: tuple[str, int]

    @property
    def message(self) -> dns.message.Message:
        return dns.message.from_wire(self.wire)

    @property
    def name(self) -> str:
        """The question name as it was typed."""
        return self.message.question[0].name.to_text()

    @property
    def qtype(self) -> str:
        return dns.rdatatype.to_text(self.message.question[0].rdtype)


class Close:
    """Close the connection in place of an answer."""


CLOSE = Close()
# Messages to send back, none at all, or the end of the connection.
Answers = Sequence[bytes] | Close | None
Behaviour = Callable[[Asked], Answers]


class ZoneAnswers:
    """Answers for one zone file, authoritatively: no RA, no OPT; REFUSED for other names; over
    UDP 512 octets whatever EDNS says, else an empty reply with TC."""

    def __init__(
        self, path: Path = GOLDEN / "example.com.zone", origin: str = "example.com."
    ) -> None:
        self.zone = dns.zone.from_file(str(path), origin=origin, relativize=False)
        assert self.zone.origin is not None
        self.origin = self.zone.origin

    def __call__(self, asked: Asked) -> list[bytes]:
        query = asked.message
        reply = reply_to(query)
        name, rdtype = query.question[0].name, query.question[0].rdtype
        if name.is_subdomain(self.origin):
            reply.flags |= dns.flags.AA
            self._fill(reply, name, rdtype)
        else:
            reply.set_rcode(dns.rcode.REFUSED)
        wire = reply.to_wire(want_shuffle=False)
        if asked.proto == "udp" and len(wire) > 512:
            for section in (reply.answer, reply.authority, reply.additional):
                section.clear()
            reply.flags |= dns.flags.TC
            wire = reply.to_wire(want_shuffle=False)
        return [wire]

    def _fill(
        self, reply: dns.message.Message, name: dns.name.Name, rdtype: dns.rdatatype.RdataType
    ) -> None:
        for _ in range(10):
            node = self.zone.get_node(name)
            if node is None:
                reply.set_rcode(dns.rcode.NXDOMAIN)
                break
            rrset = self.zone.get_rrset(name, rdtype)
            if rrset is not None:
                reply.answer.append(rrset)
                self._add_addresses(reply, rrset)
                return
            alias = self.zone.get_rrset(name, dns.rdatatype.CNAME)
            if alias is None:
                break
            reply.answer.append(alias)
            name = alias[0].target
        self._add_soa(reply)

    def _add_soa(self, reply: dns.message.Message) -> None:
        """RFC 2308 s3: a negative answer's SOA has the smaller of its TTL and its minimum."""
        soa = self.zone.get_rrset(self.origin, dns.rdatatype.SOA)
        assert soa is not None
        copy: dns.rrset.RRset = soa.copy()  # type: ignore[no-untyped-call]
        copy.ttl = min(soa.ttl, soa[0].minimum)
        reply.authority.append(copy)

    def _add_addresses(self, reply: dns.message.Message, rrset: dns.rrset.RRset) -> None:
        if rrset.rdtype != dns.rdatatype.MX:
            return
        for rdata in rrset:
            for rdtype in (dns.rdatatype.A, dns.rdatatype.AAAA):
                found = self.zone.get_rrset(rdata.exchange, rdtype)
                if found is not None:
                    reply.additional.append(found)


def reply_to(query: dns.message.Message, rcode: str = "NOERROR") -> dns.message.Message:
    """Return an empty reply: question and RD copied, nothing else, no OPT."""
    reply = dns.message.Message(id=query.id)
    reply.flags = dns.flags.QR | (query.flags & dns.flags.RD)
    reply.question = list(query.question)
    reply.set_rcode(dns.rcode.from_text(rcode))
    return reply


def records(*lines: str, rcode: str = "NOERROR", flags: str = "") -> Behaviour:
    """Answer every question with these records ("@" stands for the question name)."""

    def answer(asked: Asked) -> list[bytes]:
        reply = reply_to(asked.message, rcode)
        reply.flags |= dns.flags.from_text(flags)
        for line in lines:
            owner, ttl, rdclass, rdtype, rdata = line.split(None, 4)
            name = asked.name if owner == "@" else owner
            rrset = dns.rrset.from_text(name, int(ttl), rdclass, rdtype, rdata)
            reply.answer.append(rrset)
        return [reply.to_wire(want_shuffle=False)]

    return answer


def silence(asked: Asked) -> None:
    """Answer nothing."""


class UpstreamServer:
    """Serves UDP and TCP on one port of 127.0.0.1 (or `host`) while entered; with `tls` also
    DNS over TLS on `tls_port`.

    asked       -- what arrived, in order
    behaviour   -- may be replaced at any time
    connections -- how many were made so far; open: those that still are
    """

    def __init__(
        self,
        behaviour: Behaviour | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        udp: bool = True,
        tcp: bool = True,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.behaviour: Behaviour = behaviour or ZoneAnswers()
        self.host = host
        self.port = port
        self.tls_port = 0
        self.asked: list[Asked] = []
        self.connections = 0
        self._udp, self._tcp, self._tls = udp, tcp, tls
        self._held: list[Callable[[], None]] | None = None
        self._arrived = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._closing: list[Callable[[], None]] = []
        self.open: set[_Frames] = set()
        self._transport: Any = None

    @property
    def address(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def __enter__(self) -> UpstreamServer:
        self._thread.start()
        self._call(self._open())
        return self

    def __exit__(self, *exc: object) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    async def __aenter__(self) -> UpstreamServer:
        return self.__enter__()

    async def __aexit__(self, *exc: object) -> None:
        self.__exit__()

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(5)

    # --- for tests ------------------------------------------------------------------------

    def hold(self) -> None:
        """Keep answers back from now on."""
        self._held = []

    def release(self) -> None:
        """Send what was kept back, and no longer keep anything back."""

        def go() -> None:
            held, self._held = self._held or [], None
            for send in held:
                send()

        self._loop.call_soon_threadsafe(go)

    def wait_asked(self, count: int, timeout: float = 5.0) -> list[Asked]:
        """Wait until `count` questions have arrived; return all there are."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self.asked) >= count, timeout), self.asked
            return list(self.asked)

    def close_connections(self) -> None:
        """Close all TCP and TLS connections from this side and wait until that is done."""

        async def close() -> None:
            for connection in list(self.open):
                connection.transport.close()

        self._call(close())

    # --- sockets --------------------------------------------------------------------------

    async def _open(self) -> None:
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        for _ in range(20):
            try:
                await self._open_port(family)
                break
            except OSError:
                # The port is free for UDP but taken for TCP: try another.
                self._transport.close()
                if self.port:
                    raise
        if self._tls is not None:
            server = await self._loop.create_server(
                lambda: _Frames(self, "tls"), self.host, 0, ssl=self._tls
            )
            self._closing.append(server.close)
            self.tls_port = server.sockets[0].getsockname()[1]

    async def _open_port(self, family: socket.AddressFamily) -> None:
        self._transport, _ = await self._loop.create_datagram_endpoint(
            lambda: _Datagrams(self), (self.host, self.port), family=family
        )
        port = self._transport.get_extra_info("sockname")[1]
        if self._tcp:
            server = await self._loop.create_server(
                lambda: _Frames(self, "tcp"), self.host, port, family=family
            )
            self._closing.append(server.close)
        if not self._udp:
            self._transport.close()
        self.port = port

    async def _close(self) -> None:
        self._transport.close()
        for close in self._closing:
            close()
        for connection in list(self.open):
            connection.transport.abort()
        for _ in range(3):
            await asyncio.sleep(0)  # transports close their sockets in later turns

    def take(self, asked: Asked, send: Callable[[Answers], None]) -> None:
        with self._arrived:
            self.asked.append(asked)
            self._arrived.notify_all()
        if self._held is not None:
            self._held.append(lambda: send(self.behaviour(asked)))
        else:
            send(self.behaviour(asked))


class _Frames(asyncio.Protocol):
    """One TCP or TLS connection."""

    def __init__(self, server: UpstreamServer, proto: str) -> None:
        self._server = server
        self._proto = proto
        self._buffer = b""
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self._server.connections += 1
        self._server.open.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.open.discard(self)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while len(self._buffer) >= 2:
            end = 2 + int.from_bytes(self._buffer[:2], "big")
            if len(self._buffer) < end:
                return
            wire, self._buffer = self._buffer[2:end], self._buffer[end:]
            peer = self.transport.get_extra_info("peername")[:2]
            self._server.take(Asked(self._proto, wire, peer), self._send)

    def _send(self, answers: Answers) -> None:
        if isinstance(answers, Close):
            self.transport.close()
            return
        for wire in answers or ():
            self.transport.write(len(wire).to_bytes(2, "big") + wire)


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, server: UpstreamServer) -> None:
        self._server = server
        self._transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        def send(answers: Answers) -> None:
            if not isinstance(answers, Close):
                for wire in answers or ():
                    self._transport.sendto(wire, addr)

        self._server.take(Asked("udp", data, addr[:2]), send)
