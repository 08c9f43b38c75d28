"""Who may talk to the embedded API, and how a client learns of it: TLS, token, kubeconfig."""

from __future__ import annotations

import base64
import ipaddress
import os
import secrets
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from kdns.errors import ConfigError, Problem

LIFETIME = timedelta(days=365)
# Clocks of a machine and its containers differ; a certificate of the future is refused.
BACKDATE = timedelta(hours=1)
NAME = "kdns"


@dataclass(frozen=True, slots=True)
class Credentials:
    """What the server shows and asks for. PEM texts; all empty: plain HTTP, and anybody."""

    ca: bytes = b""
    certificate: bytes = b""
    key: bytes = b""
    token: str = ""

    @property
    def secure(self) -> bool:
        return bool(self.certificate)


def make_credentials(hosts: Sequence[str], now: datetime | None = None) -> Credentials:
    """Make a certificate for `hosts` (names and addresses) and a token.

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
            .not_valid_after(at + LIFETIME)
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

    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    return Credentials(
        built(f"{NAME}-ca", f"{NAME}-ca", ca_key, ca_key, True).public_bytes(pem),
        built(f"{NAME}-apiserver", f"{NAME}-ca", key, ca_key, False).public_bytes(pem),
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        make_token(),
    )


def _alternative(x509: Any, host: str) -> Any:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def make_token() -> str:
    """Return a bearer token nobody can guess."""
    return secrets.token_urlsafe(32)


def load_credentials(folder: Path, hosts: Sequence[str]) -> Credentials:
    """Return the credentials kept in a data folder, made at first use, so that a kubeconfig
    stays good over restarts. Raises ConfigError."""
    names = ("ca.crt", "server.crt", "server.key", "token")
    try:
        if all((folder / name).exists() for name in names):
            ca, certificate, key, token = ((folder / name).read_bytes() for name in names)
            return Credentials(ca, certificate, key, token.decode())
        made = make_credentials(hosts)
        for name, content in zip(
            names, (made.ca, made.certificate, made.key, made.token.encode()), strict=True
        ):
            write_private(folder / name, content)
        return made
    except OSError as e:
        raise ConfigError([Problem(str(folder), 0, f"cannot be used: {e.strerror}")]) from None


def server_context(credentials: Credentials, folder: Path) -> ssl.SSLContext | None:
    """Return the TLS context of a server; None for plain HTTP. folder -- for the moment that
    Python needs the key in a file"""
    if not credentials.secure:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    path = folder / f"chain-{os.getpid()}.pem"
    write_private(path, credentials.certificate + credentials.key)
    try:
        context.load_cert_chain(path)
    finally:
        path.unlink()
    return context


def write_private(path: Path, content: bytes) -> None:
    """Write a file that its owner alone may read, whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
    os.replace(part, path)


def kubeconfig(url: str, credentials: Credentials, namespace: str = "default") -> str:
    """Return the text of a kubeconfig that reaches the server."""
    cluster: dict[str, Any] = {"server": url}
    if credentials.secure:
        cluster["certificate-authority-data"] = base64.b64encode(credentials.ca).decode()
    user = {"token": credentials.token} if credentials.token else {}
    return yaml.safe_dump(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": NAME, "cluster": cluster}],
            "users": [{"name": NAME, "user": user}],
            "contexts": [
                {"name": NAME, "context": {"cluster": NAME, "user": NAME, "namespace": namespace}}
            ],
            "current-context": NAME,
        },
        sort_keys=False,
    )
