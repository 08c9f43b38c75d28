"""Who may talk to the embedded API, and how a client learns of it: TLS, token, kubeconfig."""

from __future__ import annotations

import base64
import contextlib
import errno
import ipaddress
import json
import os
import re
import secrets
import ssl
import stat
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from kdns.errors import ConfigError, Problem

LIFETIME = timedelta(days=365)
# The authority outlives its certificates: who trusts it trusts the next one, too.
CA_LIFETIME = timedelta(days=3650)
RENEW = timedelta(days=7)  # before its end a certificate is replaced
# Clocks of a machine and its containers differ; a certificate of the future is refused.
BACKDATE = timedelta(hours=1)
NAME = "kdns"
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = re.compile(rf"{_LABEL}(\.{_LABEL})*")


@dataclass(frozen=True, slots=True)
class Credentials:
    """What the server shows and asks for. PEM texts; all empty: plain HTTP, and anybody.

    ca_key -- signs the next certificate; only kept, never used by the server
    """

    ca: bytes = b""
    certificate: bytes = b""
    key: bytes = b""
    token: str = ""
    ca_key: bytes = b""

    @property
    def secure(self) -> bool:
        return bool(self.certificate)


def is_host(text: str) -> bool:
    """Tell whether a text is an IP address or a host name (RFC 1123 s2.1), in ASCII."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return len(text) < 254 and _HOST.fullmatch(text) is not None
    return True


def is_for_us(host: str, names: Collection[str]) -> bool:
    """Tell whether a Host header can be of somebody who means this server: an address, localhost
    or a name below it (RFC 6761 s6.3), or one of `names`; "": whoever sends none is no browser.

    Anybody may let a name of his own lead to this host (DNS rebinding): to a browser his page is
    then one of this server, and it lets the page read all that the server answers.
    """
    name, colon, port = host.rpartition(":")
    if not colon or not port.isdecimal():
        name = host
    name = name.strip("[]").rstrip(".").lower()
    if name in ("", "localhost", *names) or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def make_credentials(
    hosts: Sequence[str], now: datetime | None = None, before: Credentials = Credentials()
) -> Credentials:
    """Make a certificate for `hosts` (names and addresses) and a token.

    before -- whose token is kept, and whose authority, if it can still sign
    Raises ConfigError where the package cryptography is not installed.
    """
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
    except ImportError:
        raise ConfigError(
            [Problem("kdns up", 0, "TLS needs the package cryptography: pip install"
                                   " 'kdns[tls]', or start with --insecure (plain HTTP)")]
        ) from None  # fmt: skip
    at = now or datetime.now(UTC)

    def built(subject: str, issuer: str, key: Any, signer: Any, ca: bool) -> Any:
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(at - BACKDATE)
            .not_valid_after(at + (CA_LIFETIME if ca else LIFETIME))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()),
                critical=False,
            )
        )
        if ca:
            usage = x509.KeyUsage(
                digital_signature=True, key_cert_sign=True, crl_sign=True,
                content_commitment=False, key_encipherment=False, data_encipherment=False,
                key_agreement=False, encipher_only=False, decipher_only=False,
            )  # fmt: skip
            builder = builder.add_extension(usage, critical=True)
        else:
            alternatives = x509.SubjectAlternativeName([_alternative(x509, h) for h in hosts])
            builder = builder.add_extension(alternatives, critical=False)
            builder = builder.add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
            )
        return builder.sign(signer, hashes.SHA256())

    pem = serialization.Encoding.PEM

    def private(key: Any) -> bytes:
        text: bytes = key.private_bytes(
            pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return text

    key, ca, ca_key = ec.generate_private_key(ec.SECP256R1()), b"", None
    with contextlib.suppress(ValueError, TypeError):  # what is no key, or no certificate
        found = x509.load_pem_x509_certificate(before.ca)
        signer = serialization.load_pem_private_key(before.ca_key, None)
        if found.not_valid_after_utc > at + LIFETIME and signer.public_key() == found.public_key():
            ca, ca_key = before.ca, signer
    if ca_key is None:
        ca_key = ec.generate_private_key(ec.SECP256R1())
        ca = built(f"{NAME}-ca", f"{NAME}-ca", ca_key, ca_key, True).public_bytes(pem)
    certificate = built(f"{NAME}-apiserver", f"{NAME}-ca", key, ca_key, False).public_bytes(pem)
    return Credentials(ca, certificate, private(key), before.token or make_token(), private(ca_key))


def _alternative(x509: Any, host: str) -> Any:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def make_token() -> str:
    """Return a bearer token nobody can guess."""
    return secrets.token_urlsafe(32)


# What a data folder keeps.
FILES = {
    "ca.crt": "ca", "ca.key": "ca_key", "server.crt": "certificate", "server.key": "key",
}  # fmt: skip
TOKEN_FILE = "token"


def load_credentials(
    folder: Path, hosts: Sequence[str], now: datetime | None = None
) -> Credentials:
    """Return the credentials kept in a data folder, made at first use, so that a kubeconfig
    stays good over restarts. A certificate that has ended, or is not for `hosts`, is replaced;
    token and authority stay. Raises ConfigError."""
    at = now or datetime.now(UTC)
    try:
        kept = {member: _read_private(folder / name) for name, member in FILES.items()}
        token = _read_private(folder / TOKEN_FILE).decode(errors="replace").strip()
        found = replace(Credentials(**kept), token=token)  # type: ignore[arg-type]
        if token and _covers(found, folder, hosts, at):
            return found
        made = make_credentials(hosts, at, found)
        for name, member in FILES.items():
            write_private(folder / name, getattr(made, member))
        write_private(folder / TOKEN_FILE, made.token.encode())
        return made
    except OSError as e:
        where = e.filename or folder
        raise ConfigError([Problem(str(where), 0, f"cannot be used: {e.strerror}")]) from None


def _read_private(path: Path) -> bytes:
    """Return what is in a file that we wrote, b"" if there is none. Raises OSError, and
    ConfigError for a file that somebody else has put there: he would know what is in it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return b""
    except OSError as e:
        if e.errno == errno.ELOOP:
            raise ConfigError([Problem(str(path), 0, "is a link; a file is needed")]) from None
        raise
    with os.fdopen(fd, "rb") as file:
        found = os.fstat(fd)
        ours = {"0", str(os.geteuid()), os.environ.get("SUDO_UID")}
        if str(found.st_uid) not in ours or not stat.S_ISREG(found.st_mode):
            text = "is another user's, who knows what is in it: use another data folder"
            raise ConfigError([Problem(str(path), 0, text)])
        if stat.S_IMODE(found.st_mode) & 0o077:
            with contextlib.suppress(PermissionError):
                os.fchmod(fd, 0o600)
        return file.read()


def _covers(found: Credentials, folder: Path, hosts: Sequence[str], at: datetime) -> bool:
    """True if a client that trusts the authority would believe the server, by any of the names,
    for some time to come: tried out, without a network."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        context = server_context(found, folder)
        if context is None:
            return False
        trusting = ssl.create_default_context(cadata=found.ca.decode())
        trusting.check_hostname = False  # there are several
        client = trusting.wrap_bio(to_client, to_server)
        server = context.wrap_bio(to_server, to_client, server_side=True)
        for side in (client, server, client, server, client):  # TLS 1.2 needs them all
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
        shown: Any = client.getpeercert() or {}
    except (ssl.SSLError, ValueError):  # the latter: what is no text
        return False
    until = datetime.fromtimestamp(ssl.cert_time_to_seconds(shown["notAfter"]), UTC)
    return until > at + RENEW and {_plain(host) for host in hosts} <= {
        _plain(value) for _, value in shown.get("subjectAltName", ())
    }


def _plain(host: str) -> str:
    """Return an address as it is written shortest, and a name as it is."""
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(host))
    return host


def server_context(credentials: Credentials, folder: Path) -> ssl.SSLContext | None:
    """Return the TLS context of a server; None for plain HTTP. folder -- for the moment that
    Python needs the key in a file"""
    if not credentials.secure:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    path = folder / f"chain-{os.getpid()}.pem"
    write_private(path, credentials.certificate + credentials.key)
    try:
        context.load_cert_chain(path)
    finally:
        path.unlink()
    return context


def write_private(path: Path, content: bytes) -> None:
    """Write a file that its owner alone may read, whole or not at all."""
    # A name nobody can foresee, and no file that is there: the folder may be /tmp.
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def kubeconfig(
    url: str, credentials: Credentials, namespace: str = "default", control: str = ""
) -> str:
    """Return the text of a kubeconfig that reaches the server.

    control -- path of the control socket (control.py), for our own commands to find
    """
    cluster, user = [f"server: {_quoted(url)}"], []
    if credentials.secure:
        ca = base64.b64encode(credentials.ca).decode()
        cluster.append(f"certificate-authority-data: {ca}")
    if credentials.token:
        user.append(f"token: {_quoted(credentials.token)}")
    context = [f"cluster: {NAME}", f"user: {NAME}", f"namespace: {_quoted(namespace)}"]
    if control:
        context += ["extensions:", f"- name: {NAME}", "  extension:",
                    f"    control: {_quoted(control)}"]  # fmt: skip
    lines = ["apiVersion: v1", "kind: Config", f"current-context: {NAME}"]
    for word, fields in (("cluster", cluster), ("user", user), ("context", context)):
        lines += [f"{word}s:", f"- name: {NAME}", f"  {word}:{'' if fields else ' {}'}"]
        lines += [f"    {field}" for field in fields]
    return "\n".join((*lines, ""))


def _quoted(text: str) -> str:
    """A JSON text is a YAML text; a YAML writer would cost a start more than all of this."""
    return json.dumps(text)
