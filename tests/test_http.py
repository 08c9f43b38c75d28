"""The HTTP server of probes, metrics and DNS over HTTPS: whom it keeps, and for how long."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import resource
import socket
from collections.abc import AsyncIterator

import pytest

from kdns import logs
from kdns.plugins.plugin import HttpRoute
from kdns.server import http
from kdns.server.http import HttpServer

pytestmark = pytest.mark.asyncio
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.asynccontextmanager
async def serving(body: bytes = b"OK") -> AsyncIterator[HttpServer]:
    server = HttpServer("127.0.0.1:0")
    server.routes["/health"] = HttpRoute("", "/health", lambda _: (200, "text/plain", body))
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def connected(server: HttpServer) -> Streams:
    return await asyncio.open_connection("127.0.0.1", server.port)


async def ended(streams: Streams) -> bytes:
    """Return what still came until the server closed the connection."""
    came = b""
    async with asyncio.timeout(10):
        with contextlib.suppress(ConnectionError):
            while more := await streams[0].read(65536):
                came += more
    streams[1].close()
    return came


async def answered(streams: Streams) -> bool:
    streams[1].write(GET)
    try:
        async with asyncio.timeout(10):
            head = await streams[0].readuntil(b"\r\n\r\n")
            return b" 200 " in head and await streams[0].readexactly(2) == b"OK"
    except (ConnectionError, asyncio.IncompleteReadError):
        return False


@pytest.mark.parametrize("begin", [b"", GET[:20]])
async def test_a_connection_without_a_whole_request_is_closed(
    monkeypatch: pytest.MonkeyPatch, begin: bytes
) -> None:
    monkeypatch.setattr(http, "REQUEST", 0.05)
    async with serving() as server:
        streams = await connected(server)
        streams[1].write(begin)
        assert await ended(streams) == b""


async def test_half_a_second_request_does_not_keep_a_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http, "REQUEST", 0.05)
    async with serving() as server:
        streams = await connected(server)
        assert await answered(streams)
        streams[1].write(GET[:20])
        assert await ended(streams) == b""


async def test_a_connection_left_idle_after_its_answer_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http, "WRITE", 0.05)
    monkeypatch.setattr(http, "IDLE", 0.05)
    async with serving() as server:
        streams = await connected(server)
        assert await answered(streams)
        assert await ended(streams) == b""


async def test_who_does_not_read_the_answer_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "WRITE", 0.05)
    size = 64 << 20  # more than the kernel takes on both sides
    async with serving(b"x" * size) as server:
        streams = await connected(server)
        streams[1].write(GET)
        await streams[0].readuntil(b"\r\n\r\n")
        async with asyncio.timeout(10):
            while server._guests.here:
                await asyncio.sleep(0.01)
        assert len(await ended(streams)) < size


async def test_a_connection_with_requests_one_after_another_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serving() as server:
        streams = await connected(server)
        for _ in range(20):
            assert await answered(streams)
        streams[1].write(GET * 20)  # pipelined
        for _ in range(20):
            head = await streams[0].readuntil(b"\r\n\r\n")
            assert b" 200 " in head and await streams[0].readexactly(2) == b"OK"
        streams[1].close()


async def test_idle_connections_give_way_to_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_CONNECTIONS", 5)
    async with serving() as server:
        scraper = await connected(server)
        assert await answered(scraper)
        idle = [await connected(server) for _ in range(30)]
        probe = await connected(server)
        assert await answered(probe)
        for streams in idle[:26]:
            assert await ended(streams) == b""
        assert await answered(scraper), "it asked before: those that never did go first"
        for _, writer in (scraper, probe, *idle):
            writer.close()


async def test_connections_that_wait_for_an_answer_keep_their_places(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http, "MAX_CONNECTIONS", 3)
    monkeypatch.setattr(http, "REQUEST", 0.05)
    go = asyncio.Event()
    begun = 0

    async def before(_: str) -> None:
        nonlocal begun
        begun += 1
        await go.wait()

    async with serving() as server:
        server.before = before
        waiting = [await connected(server) for _ in range(3)]
        asked = [asyncio.ensure_future(answered(streams)) for streams in waiting]
        async with asyncio.timeout(10):
            while begun < 3:
                await asyncio.sleep(0.01)
        assert await ended(await connected(server)) == b""
        go.set()
        assert await asyncio.gather(*asked) == [True] * 3
        for _, writer in waiting:
            writer.close()


async def test_without_file_descriptors_one_line_says_so_and_clients_are_accepted_later() -> None:
    """As a process at its limit sees it: accept() fails, again and again."""
    text = io.StringIO()
    handler = logs.setup_logging(text)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        async with serving() as server:
            sock = socket.socket()
            sock.setblocking(False)
            resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
            async with asyncio.timeout(10):
                # The kernel accepts it, the process cannot.
                loop = asyncio.get_running_loop()
                await loop.sock_connect(sock, ("127.0.0.1", server.port))
                while "LimitNOFILE" not in text.getvalue():
                    await asyncio.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            streams = await asyncio.open_connection(sock=sock)
            assert await answered(streams)
            streams[1].close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        logging.getLogger().removeHandler(handler)
    assert text.getvalue().count("\n") == 1, text.getvalue()
    assert text.getvalue().startswith("[ERROR] new TCP, TLS and HTTP connections have to wait")
