"""Who gets at the embedded API: certificates that last, and files that are nobody else's."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from asking_api import named

from kdns.api.access import (
    LIFETIME,
    RENEW,
    Credentials,
    is_for_us,
    load_credentials,
    make_credentials,
    server_context,
    write_private,
)
from kdns.api.allocate import Allocator
from kdns.api.http import ApiServer
from kdns.api.kinds import BY_PLURAL
from kdns.api.objects import Objects
from kdns.api.store import ObjectStore
from kdns.errors import ConfigError
from kdns.metrics import Metrics

HOSTS = ("127.0.0.1", "::1", "localhost")
NOW = datetime.now(UTC)


def believed(credentials: Credentials, ca: bytes, folder: Path, host: str) -> bool:
    """True if a client that trusts `ca` believes the server by a name. Over loopback."""

    async def try_it() -> bool:
        store = ObjectStore()
        await store.open()
        objects = Objects(store, Allocator())
        await objects.create(BY_PLURAL["", "namespaces"], "", named("default"))
        server = ApiServer(objects, Metrics(), context=server_context(credentials, folder))
        await server.start()
        try:
            trusting = ssl.create_default_context(cadata=ca.decode())
            _, writer = await asyncio.open_connection(
                "127.0.0.1", server.port, ssl=trusting, server_hostname=host
            )
            writer.close()
            return True
        except ssl.SSLCertVerificationError:
            return False
        finally:
            await server.stop()
            await store.close()

    return asyncio.run(try_it())


def test_credentials_stay_over_restarts(tmp_path: Path) -> None:
    first = load_credentials(tmp_path, HOSTS)
    assert load_credentials(tmp_path, HOSTS) == first
    assert load_credentials(tmp_path, HOSTS[:1]) == first  # it covers those too
    assert believed(first, first.ca, tmp_path, "127.0.0.1")


def test_another_address_gets_a_certificate_that_old_kubeconfigs_believe(tmp_path: Path) -> None:
    first = load_credentials(tmp_path, HOSTS)
    assert not believed(first, first.ca, tmp_path, "192.0.2.7")
    moved = load_credentials(tmp_path, (*HOSTS, "192.0.2.7"))
    assert (moved.ca, moved.token) == (first.ca, first.token)
    assert believed(moved, first.ca, tmp_path, "192.0.2.7")
    assert load_credentials(tmp_path, (*HOSTS, "192.0.2.7")) == moved


@pytest.mark.parametrize("left", [RENEW - timedelta(hours=1), timedelta(0), -timedelta(days=90)])
def test_a_certificate_that_ends_is_replaced(tmp_path: Path, left: timedelta) -> None:
    first = load_credentials(tmp_path, HOSTS, NOW - LIFETIME + left)
    again = load_credentials(tmp_path, HOSTS, NOW)
    assert again.certificate != first.certificate
    assert (again.ca, again.token) == (first.ca, first.token)
    assert believed(again, first.ca, tmp_path, "localhost")


def test_an_authority_that_ends_before_the_certificate_is_replaced(tmp_path: Path) -> None:
    first = load_credentials(tmp_path, HOSTS, NOW - timedelta(days=3650) + timedelta(days=30))
    again = load_credentials(tmp_path, HOSTS, NOW)
    assert again.ca != first.ca
    assert again.token == first.token
    assert believed(again, again.ca, tmp_path, "localhost")


BROKEN: dict[str, Callable[[Path], object]] = {
    "no key of the authority": lambda folder: (folder / "ca.key").unlink(),
    "another authority": lambda folder: (folder / "ca.crt").write_bytes(make_credentials([]).ca),
    "no certificate": lambda folder: (folder / "server.crt").unlink(),
    "half a certificate": lambda folder: (folder / "server.crt").write_bytes(
        (folder / "server.crt").read_bytes()[:200]
    ),
    "another key": lambda folder: (folder / "server.key").write_bytes(make_credentials([]).key),
    "nonsense": lambda folder: [(folder / name).write_bytes(b"\xff\0") for name in
                                ("ca.crt", "ca.key", "server.crt", "server.key")],
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_damaged_is_made_anew_and_the_token_stays(tmp_path: Path, what: str) -> None:
    first = load_credentials(tmp_path, HOSTS)
    BROKEN[what](tmp_path)
    again = load_credentials(tmp_path, HOSTS)
    assert again.token == first.token
    assert believed(again, again.ca, tmp_path, "localhost")
    assert load_credentials(tmp_path, HOSTS) == again


def test_all_that_is_kept_is_its_owners_alone(tmp_path: Path) -> None:
    first = load_credentials(tmp_path, HOSTS)
    kept = {path.name: path for path in tmp_path.iterdir()}
    assert set(kept) == {"ca.crt", "ca.key", "server.crt", "server.key", "token"}
    for path in kept.values():
        assert path.stat().st_mode & 0o777 == 0o600
        path.chmod(0o644)  # as a copy or an old backup would leave it
    assert load_credentials(tmp_path, HOSTS) == first
    assert {path.stat().st_mode & 0o777 for path in kept.values()} == {0o600}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a file away")
@pytest.mark.parametrize("name", ["token", "server.key", "ca.key"])
def test_what_another_user_has_put_there_is_not_trusted(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder such as /tmp/kdns somebody may have been first: he would know the token."""
    monkeypatch.delenv("SUDO_UID", raising=False)
    load_credentials(tmp_path, HOSTS)
    os.chown(tmp_path / name, 12345, -1)
    with pytest.raises(ConfigError, match=f"{name}: is another user's"):
        load_credentials(tmp_path, HOSTS)
    monkeypatch.setenv("SUDO_UID", "12345")  # `sudo kdns up` in one's own folder
    load_credentials(tmp_path, HOSTS)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "known").write_text("a token that somebody knows")
    data = tmp_path / "data"
    data.mkdir()
    (data / "token").symlink_to(tmp_path / "known")
    with pytest.raises(ConfigError, match="token: is a link"):
        load_credentials(data, HOSTS)


def test_a_private_file_is_new_and_replaces_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    # A name with our process id could be foreseen.
    (tmp_path / f".ready.{os.getpid()}").symlink_to(victim)
    (tmp_path / "ready").symlink_to(victim)
    write_private(tmp_path / "ready", b"new")
    assert victim.read_text() == "precious"
    assert not (tmp_path / "ready").is_symlink()
    assert (tmp_path / "ready").read_bytes() == b"new"
    assert (tmp_path / "ready").stat().st_mode & 0o777 == 0o600


def test_a_private_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "ready").mkdir()
    with pytest.raises(OSError):
        write_private(tmp_path / "ready", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["ready"]


@pytest.mark.parametrize(
    ("version", "taken"),
    [
        (ssl.TLSVersion.TLSv1, False),
        (ssl.TLSVersion.TLSv1_1, False),
        (ssl.TLSVersion.TLSv1_2, True),
        (ssl.TLSVersion.TLSv1_3, True),
    ],
)
def test_tls_is_not_older_than_1_2(tmp_path: Path, version: ssl.TLSVersion, taken: bool) -> None:
    """Also where the machine's OpenSSL would take older ones."""
    credentials = make_credentials(HOSTS)
    context = server_context(credentials, tmp_path)
    assert context is not None
    context.set_ciphers("ALL:@SECLEVEL=0")
    client = ssl.create_default_context(cadata=credentials.ca.decode())
    client.set_ciphers("ALL:@SECLEVEL=0")
    client.check_hostname = False
    with pytest.warns(DeprecationWarning) if version < ssl.TLSVersion.TLSv1_2 else nullcontext():
        client.minimum_version = client.maximum_version = version
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking = client.wrap_bio(to_client, to_server)
    answering = context.wrap_bio(to_server, to_client, server_side=True)
    try:
        for side in (asking, answering, asking, answering, asking):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
        spoken = asking.version()
    except ssl.SSLError:
        spoken = None
    assert (spoken is not None) is taken


@pytest.mark.parametrize(
    ("host", "heard"),
    [
        ("", True),  # HTTP/1.0; a browser always says it
        ("127.0.0.1", True),
        ("127.0.0.1:6443", True),
        ("192.0.2.1:6443", True),
        ("[::1]", True),
        ("[::1]:6443", True),
        ("[fd00::1]:80", True),
        ("localhost:6443", True),
        ("LOCALHOST.", True),
        ("a.b.localhost:1", True),
        ("vm", True),
        ("VM:6443", True),
        ("dev.example.:6443", True),
        ("evil.example", False),
        ("evil.example:6443", False),
        ("xlocalhost", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example:80", False),
        ("x.dev.example", False),
        ("dev.example:x", False),
        (":6443", True),
        ("[evil.example]:80", False),
        ("127.0.0.1@evil.example", False),
    ],
)
def test_whom_a_host_header_means(host: str, heard: bool) -> None:
    assert is_for_us(host, frozenset({"vm", "dev.example"})) == heard
