"""DNS over TLS (RFC 7858) and over HTTPS (RFC 8484), with certificates made for the test."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import socket
import ssl
import tracemalloc
from pathlib import Path

import aiohttp
import pytest
import trustme
from running import RunningKdns

from kdns.dns import types as t
from kdns.dns.message import parse_message, render_query
from kdns.dns.name import parse_name
from kdns.errors import ConfigError
from kdns.server import http, tcp, tls

pytestmark = pytest.mark.asyncio
QUESTION = render_query(0, parse_name("web.default.svc.cluster.local."), t.A)
DNS = "application/dns-message"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[trustme.CA, Path]:
    folder = tmp_path_factory.mktemp("tls")
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(folder / "ca.pem"))
    server = ca.issue_cert("127.0.0.1")
    server.private_key_pem.write_to_path(str(folder / "key.pem"))
    server.cert_chain_pems[0].write_to_path(str(folder / "cert.pem"))
    (folder / "objects.yaml").write_text(
        "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: default}\n"
        "spec: {clusterIP: 10.96.0.50, ports: [{port: 80}]}\n"
    )
    return ca, folder


def corefile(scheme: str, folder: Path, auth: str = "") -> str:
    return f"""{scheme}://.:0 {{
        bind 127.0.0.1
        tls {folder}/cert.pem {folder}/key.pem {folder}/ca.pem {{
            client_auth {auth or "nocert"}
        }}
        kubernetes cluster.local {{
            manifests {folder}/objects.yaml
        }}
    }}"""


def trusting(ca: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    ca.configure_trust(context)
    return context


async def over_tls(port: int, context: ssl.SSLContext) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    try:
        writer.write(len(QUESTION).to_bytes(2, "big") + QUESTION)
        async with asyncio.timeout(5):
            size = int.from_bytes(await reader.readexactly(2), "big")
            return await reader.readexactly(size)
    finally:
        writer.close()


async def test_dns_over_tls(authority: tuple[trustme.CA, Path]) -> None:
    ca, folder = authority
    async with RunningKdns(corefile("tls", folder)) as kdns:
        answer = parse_message(await over_tls(kdns.app.port("tls"), trusting(ca)))
        assert answer.answer[0].rdata == bytes([10, 96, 0, 50])


async def test_many_questions_over_one_tls_connection(authority: tuple[trustme.CA, Path]) -> None:
    """More at once than one read takes (server/tcp.py READ), so that none gets lost between."""
    ca, folder = authority
    async with RunningKdns(corefile("tls", folder)) as kdns:
        port = kdns.app.port("tls")
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting(ca))
        framed = len(QUESTION).to_bytes(2, "big")
        writer.write(b"".join(framed + n.to_bytes(2, "big") + QUESTION[2:] for n in range(2000)))
        async with asyncio.timeout(10):
            for n in range(2000):
                size = int.from_bytes(await reader.readexactly(2), "big")
                reply = parse_message(await reader.readexactly(size))
                assert (reply.id, len(reply.answer)) == (n, 1)
        writer.close()


async def test_a_client_without_certificate_is_turned_away_where_one_is_required(
    authority: tuple[trustme.CA, Path],
) -> None:
    ca, folder = authority
    async with RunningKdns(corefile("tls", folder, "require_and_verify")) as kdns:
        port = kdns.app.port("tls")
        with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
            await over_tls(port, trusting(ca))
        context = trusting(ca)
        ca.issue_cert("client.test").configure_cert(context)
        assert parse_message(await over_tls(port, context)).answer


async def test_dns_over_https_by_get_and_post(authority: tuple[trustme.CA, Path]) -> None:
    ca, folder = authority
    async with (
        RunningKdns(corefile("https", folder)) as kdns,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trusting(ca))) as session,
    ):
        url = f"https://127.0.0.1:{kdns.app.port('https')}/dns-query"
        text = base64.urlsafe_b64encode(QUESTION).rstrip(b"=").decode()
        async with session.get(url, params={"dns": text}) as response:
            assert (response.status, response.content_type) == (200, DNS)
            assert response.headers["Cache-Control"] == "max-age=5"
            assert parse_message(await response.read()).answer
        async with session.post(url, data=QUESTION, headers={"Content-Type": DNS}) as response:
            assert parse_message(await response.read()).answer
        metric = "coredns_dns_https_responses_total"
        label = str(next(iter(kdns.app.listeners)))
        assert kdns.app.metrics.value(metric, label, "200") == 2


@pytest.mark.parametrize(
    ("method", "path", "body", "kind", "status"),
    [
        ("GET", "/dns-query", b"", "", 400),
        ("GET", "/dns-query?dns=!!!", b"", "", 400),
        ("GET", "/dns-query?dns=AAAA", b"", "", 400),
        ("POST", "/dns-query", QUESTION, "text/plain", 400),
        ("POST", "/dns-query", b"x" * 70000, DNS, 400),
        ("PUT", "/dns-query", QUESTION, DNS, 405),
        ("GET", "/other", b"", "", 404),
    ],
)
async def test_what_is_no_dns_over_https_gets_a_status_that_says_so(
    authority: tuple[trustme.CA, Path], method: str, path: str, body: bytes, kind: str, status: int
) -> None:
    ca, folder = authority
    async with (
        RunningKdns(corefile("https", folder)) as kdns,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trusting(ca))) as session,
    ):
        url = f"https://127.0.0.1:{kdns.app.port('https')}{path}"
        headers = {"Content-Type": kind} if kind else {}
        async with session.request(method, url, data=body or None, headers=headers) as response:
            assert response.status == status
            assert await response.text()


async def test_a_certificate_that_cannot_be_used_is_named(
    authority: tuple[trustme.CA, Path],
) -> None:
    _, folder = authority
    text = corefile("tls", folder).replace("cert.pem", "nosuch.pem")
    with pytest.raises(ConfigError, match=r"nosuch\.pem: cannot use certificate and key"):
        async with RunningKdns(text):
            pass


async def test_a_reload_takes_a_renewed_certificate(
    authority: tuple[trustme.CA, Path], tmp_path: Path
) -> None:
    _, folder = authority
    conf = tmp_path / "Corefile"
    text = corefile("tls", folder)
    conf.write_text(text)
    other = trustme.CA()
    renewed = other.issue_cert("127.0.0.1")
    renewed.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    renewed.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    async with RunningKdns(conf=str(conf)) as kdns:
        port = kdns.app.port("tls")
        with pytest.raises(ssl.SSLCertVerificationError):
            await over_tls(port, trusting(other))
        for name in ("key.pem", "cert.pem"):
            text = text.replace(f"{folder}/{name}", f"{tmp_path}/{name}")
        conf.write_text(text)
        assert await kdns.app.reload()
        assert parse_message(await over_tls(port, trusting(other))).answer


# --- bounds -------------------------------------------------------------------------------


async def closed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Wait until the server has closed a connection."""
    async with asyncio.timeout(10):
        with contextlib.suppress(ConnectionError):
            while await reader.read(4096):
                pass
    writer.close()


async def asked(scheme: str, port: int, ca: trustme.CA) -> bool:
    if scheme == "tls":
        return bool(parse_message(await over_tls(port, trusting(ca))).answer)
    connector = aiohttp.TCPConnector(ssl=trusting(ca))
    async with aiohttp.ClientSession(connector=connector) as session:
        url, kind = f"https://127.0.0.1:{port}/dns-query", {"Content-Type": DNS}
        async with session.post(url, data=QUESTION, headers=kind) as response:
            return bool(parse_message(await response.read()).answer)


@pytest.mark.parametrize("scheme", ["tls", "https"])
async def test_a_handshake_that_is_never_finished_is_ended(
    authority: tuple[trustme.CA, Path], monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    monkeypatch.setattr(tls, "HANDSHAKE", 0.1)
    async with RunningKdns(corefile(scheme, authority[1])) as kdns:
        reader, writer = await asyncio.open_connection("127.0.0.1", kdns.app.port(scheme))
        writer.write(b"\x16\x03\x01\x02\x00\x01")
        await closed(reader, writer)


@pytest.mark.parametrize("scheme", ["tls", "https"])
async def test_the_oldest_unfinished_handshake_gives_way(
    authority: tuple[trustme.CA, Path], monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    ca, folder = authority
    monkeypatch.setattr(tcp, "MAX_CONNECTIONS", 3)
    monkeypatch.setattr(http, "MAX_DOH_CONNECTIONS", 3)
    async with RunningKdns(corefile(scheme, folder)) as kdns:
        port = kdns.app.port(scheme)
        half = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        assert await asked(scheme, port, ca)
        await closed(*half[0])
        assert kdns.app.metrics.value("kdns_tcp_connections_rejected_total") == 1
        assert not half[1][0].at_eof() and not half[2][0].at_eof()
        for _, writer in half:
            writer.close()


@pytest.mark.parametrize("scheme", ["tls", "https"])
async def test_a_tls_connection_takes_little_memory(
    authority: tuple[trustme.CA, Path], scheme: str
) -> None:
    async with RunningKdns(corefile(scheme, authority[1])) as kdns:
        port, count = kdns.app.port(scheme), 20
        assert await asked(scheme, port, authority[0])
        tracemalloc.start()
        try:
            half = [await asyncio.open_connection("127.0.0.1", port) for _ in range(count)]
            await asyncio.sleep(0)
            assert await asked(scheme, port, authority[0])  # the others are accepted before
            assert tracemalloc.get_traced_memory()[0] < count * (100 << 10)
        finally:
            tracemalloc.stop()
        for _, writer in half:
            writer.close()


@pytest.mark.parametrize("scheme", ["tls", "https"])
@pytest.mark.parametrize("how", ["finished", "garbage", "half", "silent"])
async def test_tls_that_has_ended_is_gone_without_the_garbage_collector(
    authority: tuple[trustme.CA, Path], monkeypatch: pytest.MonkeyPatch, scheme: str, how: str
) -> None:
    ca, folder = authority
    if how == "silent":
        monkeypatch.setattr(tls, "HANDSHAKE", 0.05)

    def left() -> int:
        names = ("_Tls", "_SelectorSocketTransport")
        return sum(
            type(one).__name__ in names
            and getattr(one, "_server_side", None) is not False  # the test's own side
            for one in gc.get_objects()
        )

    async with RunningKdns(corefile(scheme, folder)) as kdns:
        port = kdns.app.port(scheme)
        assert await asked(scheme, port, ca)
        gc.collect()
        gc.disable()
        try:
            before = left()
            for _ in range(5):
                if how == "finished":
                    await asyncio.to_thread(_shake_hands, port, trusting(ca))
                else:
                    await asyncio.to_thread(_say, port, how)
            async with asyncio.timeout(5):
                while left() > before:
                    await asyncio.sleep(0.05)
        finally:
            gc.enable()


def _shake_hands(port: int, context: ssl.SSLContext) -> None:
    with (
        socket.create_connection(("127.0.0.1", port), 5) as sock,
        context.wrap_socket(sock, server_hostname="127.0.0.1"),
    ):
        pass


def _say(port: int, how: str) -> None:
    with socket.create_connection(("127.0.0.1", port), 5) as sock:
        if how == "half":
            sock.send(b"\x16\x03\x01\x02\x00\x01")
            return
        if how == "garbage":
            sock.send(b"GET / HTTP/1.0\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while sock.recv(100):
                pass


async def test_a_client_of_dns_over_https_that_asks_nothing_is_let_go(
    authority: tuple[trustme.CA, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ca, folder = authority
    monkeypatch.setattr(http, "REQUEST", 0.1)
    monkeypatch.setattr(http, "LINGER", 0.1)
    async with RunningKdns(corefile("https", folder)) as kdns:
        port = kdns.app.port("https")
        streams = await asyncio.open_connection("127.0.0.1", port, ssl=trusting(ca))
        await closed(*streams)
        # a body that never comes
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting(ca))
        writer.write(
            b"POST /dns-query HTTP/1.1\r\nHost: x\r\nContent-Length: 40\r\n"
            b"Content-Type: application/dns-message\r\n\r\nabc"
        )
        async with asyncio.timeout(10):
            assert b" 408 " in await reader.readline()
        await closed(reader, writer)


async def test_connections_of_dns_over_https_are_bounded(
    authority: tuple[trustme.CA, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ca, folder = authority
    monkeypatch.setattr(http, "MAX_DOH_CONNECTIONS", 3)
    async with RunningKdns(corefile("https", folder)) as kdns:
        port, context = kdns.app.port("https"), trusting(ca)
        idle = [await asyncio.open_connection("127.0.0.1", port, ssl=context) for _ in range(6)]
        for streams in idle[:3]:
            await closed(*streams)
        assert await asked("https", port, ca)
        await closed(*idle[3])
        for _, writer in idle:
            writer.close()


async def test_a_zone_and_a_big_answer_come_whole_over_tls(
    authority: tuple[trustme.CA, Path],
) -> None:
    """Many records of TLS, in both directions more than one buffer holds."""
    _, folder = authority
    count = 20_000
    (folder / "zone").write_text(
        "$ORIGIN example.org.\n@ 60 IN SOA ns mail 1 60 60 60 60\n"
        "@ 60 IN NS ns\nns 60 IN A 10.0.0.1\n"
        + "".join(f"n{n} 60 IN A 10.1.{n >> 8}.{n & 255}\n" for n in range(count))
        + "".join(f"big 60 IN A 10.2.{n >> 8}.{n & 255}\n" for n in range(3000))
    )
    text = corefile("tls", folder).rstrip().removesuffix("}")
    text += f"\nfile {folder}/zone example.org\ntransfer example.org {{\n to *\n}}\n}}"
    async with RunningKdns(text) as kdns:
        port = kdns.app.port("tls")
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=trusting(authority[0])
        )

        async def frame() -> bytes:
            size = int.from_bytes(await reader.readexactly(2), "big")
            return await reader.readexactly(size)

        async with asyncio.timeout(12):
            big = render_query(1, parse_name("big.example.org."), t.A)
            writer.write((len(big).to_bytes(2, "big") + big) * 40)
            for _ in range(40):
                assert len(parse_message(await frame()).answer) == 3000
            question = render_query(2, parse_name("example.org."), t.AXFR)
            writer.write(len(question).to_bytes(2, "big") + question)
            records, ends = 0, 0
            while ends < 2:
                answer = parse_message(await frame()).answer
                records += len(answer)
                ends += sum(rr.type == t.SOA for rr in answer)
        assert records == count + 3000 + 4
        writer.close()


@pytest.mark.parametrize("scheme", ["tls", "https"])
async def test_memory_is_given_back_when_most_connections_have_gone(
    authority: tuple[trustme.CA, Path], monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    given = asyncio.Event()
    monkeypatch.setattr(tls, "MANY", 5)
    monkeypatch.setattr(tls, "SETTLE", 0.01)
    monkeypatch.setattr(tls, "give_back_memory", given.set)
    async with RunningKdns(corefile(scheme, authority[1])) as kdns:
        port = kdns.app.port(scheme)
        half = [await asyncio.open_connection("127.0.0.1", port) for _ in range(5)]
        assert await asked(scheme, port, authority[0])
        assert not given.is_set()
        for _, writer in half:
            writer.close()
        async with asyncio.timeout(10):
            await given.wait()
