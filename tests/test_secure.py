"""DNS over TLS (RFC 7858) and over HTTPS (RFC 8484), with certificates made for the test."""

from __future__ import annotations

import asyncio
import base64
import ssl
from pathlib import Path

import aiohttp
import pytest
import trustme
from running import RunningKdns

from kdns.dns import types as t
from kdns.dns.message import parse_message, render_query
from kdns.dns.name import parse_name
from kdns.errors import ConfigError

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
