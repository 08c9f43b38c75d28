"""UDP and TCP as CoreDNS does them (reference 1.15), through real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import socket
import struct

import pytest
from running import RunningKdns

from kdns.dns import types as t
from kdns.dns.message import AA, RD, TC, Edns, parse_message, render_query
from kdns.dns.name import parse_name
from kdns.server import tcp

pytestmark = pytest.mark.asyncio

MANIFEST = """
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec: {clusterIP: 10.96.0.50, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: b, namespace: default}
spec: {clusterIP: None, ports: [{name: http, port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: b-1, namespace: default, labels: {kubernetes.io/service-name: b}}
addressType: IPv4
endpoints: [%s]
ports: [{name: http, port: 80, protocol: TCP}]
""".replace("%s", ", ".join(f"{{addresses: [10.244.0.{n}]}}" for n in range(1, 61)))
WEB = parse_name("web.default.svc.cluster.local.")
BIG = "b.default.svc.cluster.local."


@pytest.fixture
def corefile(tmp_path):  # type: ignore[no-untyped-def]
    (tmp_path / "objects.yaml").write_text(MANIFEST)
    return (
        ".:0 {\n bind 127.0.0.1 ::1\n"
        f" kubernetes cluster.local {{\n manifests {tmp_path}/objects.yaml\n }}\n}}\n"
    )


async def tcp_stream(kdns: RunningKdns) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", kdns.port)


def framed(wire: bytes) -> bytes:
    return len(wire).to_bytes(2, "big") + wire


async def read_frame(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(5):
        size = int.from_bytes(await reader.readexactly(2), "big")
        return await reader.readexactly(size)


async def test_sixty_addresses_are_cut_where_coredns_cuts_them(corefile: str) -> None:
    async with RunningKdns(corefile) as kdns:
        wire = await kdns.exchange(render_query(1, parse_name(BIG), t.A))
        message = parse_message(wire)
        # reference 1.15: 512 -> 29 RRs, TC, 509 octets; 1232 -> all, 1016; TCP -> 2625
        assert (len(message.answer), message.flags & TC, len(wire)) == (29, TC, 509)
        edns = Edns(1232)
        wire = await kdns.exchange(render_query(1, parse_name(BIG), t.A, edns=edns))
        message = parse_message(wire)
        assert (len(message.answer), message.flags & TC) == (60, 0)
        assert len(wire) == 1016, "with its OPT record"
        assert message.edns is not None and message.edns.size == 1232
        reader, writer = await tcp_stream(kdns)
        writer.write(framed(render_query(1, parse_name(BIG), t.A)))
        assert len(await read_frame(reader)) == 2625
        writer.close()


@pytest.mark.parametrize(
    ("wire", "answer"),
    [
        # qdcount 0 and 2, too many records in a query: FORMERR with the bare header
        (struct.pack("!6H", 7, RD, 0, 0, 0, 0), 1),
        (struct.pack("!6H", 7, RD, 2, 0, 0, 0) + WEB + b"\0\1\0\1" + WEB + b"\0\1\0\1", 1),
        (struct.pack("!6H", 7, RD, 1, 2, 0, 0) + WEB + b"\0\1\0\1", 1),
        (struct.pack("!6H", 7, RD, 1, 0, 0, 3) + WEB + b"\0\1\0\1", 1),
        # a question cut short, a label over 63 octets, a pointer to itself
        (struct.pack("!6H", 7, RD, 1, 0, 0, 0) + WEB[:9], 1),
        (struct.pack("!6H", 7, RD, 1, 0, 0, 0) + b"\x40" + b"a" * 64 + b"\0\0\1\0\1", 1),
        (struct.pack("!6H", 7, RD, 1, 0, 0, 0) + b"\xc0\x0c\0\1\0\1", 1),
        # other opcodes: NOTIMP
        (struct.pack("!6H", 7, 0x2800, 1, 0, 0, 0) + WEB + b"\0\1\0\1", 4),
    ],
)  # fmt: skip
async def test_a_malformed_query_gets_a_bare_header(
    corefile: str, wire: bytes, answer: int
) -> None:
    async with RunningKdns(corefile) as kdns:
        reply = await kdns.exchange(wire)
        assert len(reply) == 12
        assert reply[:2] == wire[:2]
        assert reply[3] & 15 == answer


ASKED = struct.pack("!6H", 7, RD, 1, 0, 0, 1) + WEB + b"\0\1\0\1"


def opt(*options: tuple[int, bytes], size: int = 1232) -> bytes:
    rdata = b"".join(struct.pack("!HH", code, len(data)) + data for code, data in options)
    return b"\0" + struct.pack("!HHIH", 41, size, 0, len(rdata)) + rdata


@pytest.mark.parametrize(
    "records",
    [
        # an OPT whose options run past its end, and one that is cut short itself
        b"\0\0\x29\4\xd0\0\0\0\0\0\4\0\3\0\x63",
        opt()[:-1],
        # LLQ, UL, EXPIRE, TCP-KEEPALIVE and an extended error that are too short
        *(opt((code, b"a")) for code in (1, 2, 9, 11, 15)),
        # a client subnet: too short, of no family, with more bits than there are
        *(opt((8, data)) for data in (b"\0\1", b"\0\3\0\0", b"\0\1\x21\0abcde")),
    ],
)
async def test_what_is_wrong_behind_the_question_gets_header_and_question(
    corefile: str, records: bytes
) -> None:
    """As CoreDNS 1.13.1 answers."""
    async with RunningKdns(corefile) as kdns:
        reply = await kdns.exchange(ASKED + records)
        assert reply == struct.pack("!6H", 7, 0x8101, 1, 0, 0, 0) + ASKED[12:]


@pytest.mark.parametrize(
    ("count", "records", "size"),
    [
        (1, b"", None),
        (2, opt(), 1232),
        (2, opt() + opt(size=1400), 1400),  # the last one
        (1, opt((8, b"\0\0\0\0"), (9, b""), (11, b""), (15, b"\0\0"), (2, b"1234")), 1232),
    ],
)
async def test_fewer_records_than_told_and_more_than_one_opt_are_answered(
    corefile: str, count: int, records: bytes, size: int | None
) -> None:
    """As CoreDNS 1.13.1 does."""
    async with RunningKdns(corefile) as kdns:
        wire = bytearray(ASKED + records)
        wire[11] = count
        reply = parse_message(await kdns.exchange(bytes(wire)))
        assert reply.rcode == t.NOERROR and reply.answer
        assert (reply.edns and reply.edns.size) == size


async def test_nothing_of_an_edns_that_is_not_known_comes_back(corefile: str) -> None:
    edns = Edns(1400, True, 3, [(10, b"12345678")])
    async with RunningKdns(corefile) as kdns:
        wire = await kdns.exchange(render_query(7, WEB, t.A, edns=edns))
        badvers = b"\0" + struct.pack("!HHIH", 41, 0, 1 << 24, 0)
        assert wire == struct.pack("!6H", 7, 0x8100, 1, 0, 0, 1) + ASKED[12:] + badvers
        reply = parse_message(await kdns.exchange(render_query(7, WEB, t.A, 3, edns=edns)))
        assert reply.rcode == t.REFUSED  # the class first


async def test_what_is_no_query_gets_nothing_and_harms_nothing(corefile: str) -> None:
    chosen = random.Random(3)
    async with RunningKdns(corefile) as kdns:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect(("127.0.0.1", kdns.port))
            good = render_query(9, WEB, t.A, edns=Edns(1232))
            for _ in range(2000):
                wire = bytearray(good)
                for _ in range(chosen.randrange(1, 6)):
                    wire[chosen.randrange(len(wire))] = chosen.randrange(256)
                sock.send(bytes(wire[: chosen.randrange(len(wire) + 1)]))
                await asyncio.sleep(0)
            sock.send(struct.pack("!6H", 7, 0x8000, 1, 0, 0, 0) + WEB + b"\0\1\0\1")
        message = await kdns.ask("web.default.svc.cluster.local.")
        assert message.answer and message.flags & AA
        assert kdns.app.metrics.value("coredns_panics_total") == 0


async def test_a_label_that_is_not_utf8_is_a_name_like_any_other(corefile: str) -> None:
    async with RunningKdns(corefile) as kdns:
        name = b"\x03\xff\x00\xfe" + parse_name("default.svc.cluster.local.")
        reply = parse_message(await kdns.exchange(render_query(1, name, t.A)))
        assert reply.rcode == t.NXDOMAIN
        assert reply.question is not None and reply.question[0] == name


async def test_edns_is_answered_as_asked(corefile: str) -> None:
    async with RunningKdns(corefile) as kdns:
        cookie, subnet = (10, b"12345678"), (8, b"\0\1\x18\0\x0a\0\0")
        edns = Edns(1400, True, 0, [cookie, subnet, (3, b"")])
        reply = await kdns.ask("web.default.svc.cluster.local.", edns=edns)
        assert reply.edns is not None
        assert (reply.edns.size, reply.edns.do, reply.edns.version) == (1400, True, 0)
        why = (15, b"\0\0Service default/web has no endpoints")  # RFC 8914
        assert list(reply.edns.options) == [cookie, (3, b""), why], "unknown ones are not echoed"
        reply = await kdns.ask("web.default.svc.cluster.local.", edns=Edns(1400, version=1))
        assert reply.rcode == t.BADVERS
        assert not reply.flags & AA
        assert not reply.answer


async def test_other_classes_are_refused(corefile: str) -> None:
    async with RunningKdns(corefile) as kdns:
        reply = parse_message(await kdns.exchange(render_query(1, WEB, t.A, 3)))
        assert (reply.rcode, reply.flags & AA) == (t.REFUSED, 0)


async def test_both_address_families_are_served(corefile: str) -> None:
    async with RunningKdns(corefile) as kdns:
        port = next(x.port for p, x in kdns.app.listeners.items() if p.address == "::1")
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.connect(("::1", port))
            await loop.sock_sendall(sock, render_query(1, WEB, t.A))
            async with asyncio.timeout(5):
                assert parse_message(await loop.sock_recv(sock, 512)).answer


async def test_the_reply_comes_from_the_address_that_was_asked(corefile: str) -> None:
    """127.0.0.2 is no configured address, so the wildcard socket takes the query; a connected
    client only sees replies from the address it asked."""
    async with RunningKdns(corefile.replace(" bind 127.0.0.1 ::1\n", "")) as kdns:
        for address in ("127.0.0.1", "127.0.0.2"):
            reply = parse_message(await kdns.exchange(render_query(1, WEB, t.A), address))
            assert reply.answer


async def test_many_questions_on_one_connection(corefile: str) -> None:
    async with RunningKdns(corefile) as kdns:
        reader, writer = await tcp_stream(kdns)
        count = 300
        writer.write(b"".join(framed(render_query(n, WEB, t.A)) for n in range(count)))
        ids = {parse_message(await read_frame(reader)).id for _ in range(count)}
        assert ids == set(range(count))
        # octet by octet is a question all the same
        for octet in framed(render_query(777, WEB, t.A)):
            writer.write(bytes((octet,)))
            await writer.drain()
        assert parse_message(await read_frame(reader)).id == 777
        # half-closed: what was asked is still answered
        writer.write(framed(render_query(778, WEB, t.A)))
        writer.write_eof()
        assert parse_message(await read_frame(reader)).id == 778
        assert await reader.read() == b""
        writer.close()


async def test_a_connection_that_has_ended_is_gone_without_the_garbage_collector(
    corefile: str,
) -> None:
    def transports() -> int:
        return sum(type(one).__name__ == "_SelectorSocketTransport" for one in gc.get_objects())

    loop = asyncio.get_running_loop()
    async with RunningKdns(corefile) as kdns:
        gc.collect()
        gc.disable()
        try:
            before = transports()
            for _ in range(20):
                with socket.create_connection(("127.0.0.1", kdns.port)) as sock:
                    sock.setblocking(False)
                    await loop.sock_sendall(sock, framed(render_query(7, WEB, t.A)))
                    assert await loop.sock_recv(sock, 512)
            async with asyncio.timeout(5):
                while transports() > before:
                    await asyncio.sleep(0.01)
        finally:
            gc.enable()


async def test_a_silent_connection_is_closed(
    corefile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp, "FIRST_QUERY", 0.05)
    async with RunningKdns(corefile) as kdns:
        reader, writer = await tcp_stream(kdns)
        writer.write(b"\x00")  # half a length is no question
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        writer.close()


async def test_a_reader_that_does_not_read_cannot_fill_memory(
    corefile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 kB of questions after another, answers never read: the server stops reading."""
    async with RunningKdns(corefile) as kdns:
        loop = asyncio.get_running_loop()
        flood = framed(render_query(1, parse_name(BIG), t.A)) * 1500
        with socket.socket() as sock:
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await loop.sock_connect(sock, ("127.0.0.1", kdns.port))
            sent = 0
            for _ in range(400):
                try:
                    sent += sock.send(flood)
                except BlockingIOError:
                    await asyncio.sleep(0.005)
                    if any(
                        c._blocked
                        for listener in kdns.app.listeners.values()
                        for _, server in listener._tcp
                        for c in server.connections
                    ):
                        break
            connections = [
                c
                for listener in kdns.app.listeners.values()
                for _, server in listener._tcp
                for c in server.connections
            ]
            assert connections[0]._blocked, "reading stops when nobody reads the answers"
            assert len(connections[0]._buffer) < 1 << 20
            assert connections[0]._transport is not None
            assert connections[0]._transport.get_write_buffer_size() < 1 << 20
        assert (await kdns.ask("web.default.svc.cluster.local.")).answer, "others are served"


async def test_connections_are_bounded(corefile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "MAX_CONNECTIONS", 3)
    async with RunningKdns(corefile) as kdns:
        streams = [await tcp_stream(kdns) for _ in range(3)]
        for reader, writer in streams:
            writer.write(framed(render_query(1, WEB, t.A)))
            assert await read_frame(reader)
        reader, writer = await tcp_stream(kdns)
        async with asyncio.timeout(5):
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
        assert kdns.app.metrics.value("kdns_tcp_connections_rejected_total") == 1
        for _, one in (*streams, (reader, writer)):
            one.close()
