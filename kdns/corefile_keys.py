"""Server-block keys: `[scheme://]zone[:port]` to zones, ports and schemes (reference 2.5).

Decides what a key serves and which two keys cannot be served at once. CoreDNS takes nearly
every mistake in a key for the name of a zone; here it is said.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from kdns.corefile_tokens import Problems, Token, nearest
from kdns.dns.name import BadName, parse_name, render_name
from kdns.dns.reverse import reverse_zones

# Schemes with the port that a key without one stands for; None: -dns.port.
SCHEMES: dict[str, int | None] = {"dns": None, "tls": 853, "https": 443}
SCHEMES_NOT_HERE = frozenset(("grpc", "quic", "https3", "unix"))
MAX_PORT = 65535

_NETWORK = re.compile(r"\[?([0-9.]+|[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*)\]?/(\d+)")


@dataclass(frozen=True, slots=True)
class Key:
    """One server-block key: `[scheme://]zone[:port]`; zone is lower-case text with a final
    dot (a CIDR has been turned into its reverse zones)."""

    scheme: str
    zone: str
    port: int
    token: Token

    def __str__(self) -> str:
        return f"{self.scheme}://{self.zone}:{self.port}"


def parse_key(token: Token, default_port: int, problems: Problems) -> list[Key]:
    """Return the keys a word stands for: several for a CIDR, none if it is wrong."""
    scheme, mark, rest = token.text.rpartition("://")
    scheme = scheme.lower() if mark else "dns"
    if scheme not in SCHEMES:
        have = " and ".join(f"{s}://" for s in SCHEMES)
        if scheme in SCHEMES_NOT_HERE:
            problems.error(token, f"kdns does not have CoreDNS's {scheme}://; it has {have}")
        else:
            near = nearest(scheme, SCHEMES) or f"; there are {have}"
            problems.error(token, f"unknown scheme '{scheme}'{near}")
        return []
    split = _split_port(rest, token, problems)
    if split is None:
        return []
    host, port = split
    if port is None:
        port = SCHEMES[scheme]
    if port is None:
        port = default_port
    return [Key(scheme, zone, port, token) for zone in _zones(host, token, problems)]


def _split_port(text: str, token: Token, problems: Problems) -> tuple[str, int | None] | None:
    if _is_address(text):
        return text, None
    host, colon, digits = text.rpartition(":")
    if not colon or _NETWORK.fullmatch(text) is not None:
        return text, None
    if not digits:
        problems.error(
            token,
            f'expecting data after last colon: "{token}"; write a port or leave the colon out',
        )
        return None
    if not (digits.isascii() and digits.isdecimal()):
        problems.error(token, f"'{digits}' in '{token}' is not a port; write a number")
        return None
    if len(digits) > 5 or int(digits) > MAX_PORT:
        problems.error(token, f"address {digits}: invalid port; the highest is {MAX_PORT}")
        return None
    return host, int(digits)


def _is_address(text: str) -> bool:
    try:
        ip_address(text.strip("[]"))
    except ValueError:
        return False
    return True


def _zones(host: str, token: Token, problems: Problems) -> list[str]:
    """Return the zones of a key without scheme and port; an empty one is the root."""
    reverse = reverse_zones(host)
    if reverse is not None:
        return [render_name(zone) for zone in reverse]
    network = _NETWORK.fullmatch(host)
    if network is not None:
        problems.error(
            token,
            f"'{host}' is not a network in CIDR notation; write all octets and a prefix length"
            " that fits, as in 10.96.0.0/16 or fd00:10::/48",
        )
        return []
    if any(char.isspace() or char in "{}" for char in host):
        right = "braces are words of their own" if {*"{}"} & {*host} else "each key is one word"
        problems.error(token, f"zone is not a valid domain name: '{host}'; {right}")
        return []
    try:
        zone = render_name(parse_name(host if host.endswith(".") else f"{host}.").lower())
    except BadName as e:
        problems.error(token, f"zone is not a valid domain name: {e}")
        return []
    _warn_unusual(host, zone, token, problems)
    return [zone]


def _warn_unusual(host: str, zone: str, token: Token, problems: Problems) -> None:
    """Say what is a zone by the grammar and hardly meant as one."""
    if _is_address(host):
        address = host.strip("[]")
        problems.warn(
            token,
            f"the address '{host}' is taken for the name of a zone; to listen on it write"
            f" 'bind {address}' in the block, to serve its reverse zone"
            f" {address}/{128 if ':' in host else 32} as key",
        )
    elif zone.startswith("*."):
        problems.warn(
            token, f"'{host}' serves only names below a label '*'; write {zone[2:]} for all names"
        )
    elif not host.isascii():
        try:
            right = f"; write {host.encode('idna').decode()}"
        except UnicodeError:
            right = ""
        problems.warn(token, f"no query carries the letters of '{host}'{right}")


class Listeners:
    """What the server blocks read so far serve, to find the keys that clash.

    An address is a word of `bind`; no address at all means every one.
    """

    def __init__(self) -> None:
        self._zones: dict[str, list[tuple[frozenset[str], Key]]] = {}
        self._ports: dict[int, dict[str, list[tuple[frozenset[str], Key]]]] = {}

    def add(self, keys: Sequence[Key], addresses: frozenset[str], problems: Problems) -> None:
        """Take a block's keys; report one that is served already, and a port that would
        have to speak two protocols."""
        told: set[Token] = set()
        for key in keys:
            same = self._zones.setdefault(str(key), [])
            other = _clash(same, addresses)
            same.append((addresses, key))
            schemes = self._ports.setdefault(key.port, {})
            foreign = None
            if key.port:
                others = (taken for s, taken in schemes.items() if s != key.scheme)
                foreign = next((found for t in others if (found := _clash(t, addresses))), None)
            schemes.setdefault(key.scheme, []).append((addresses, key))
            if key.token in told or not (other or foreign):
                continue
            told.add(key.token)
            if other is not None:
                problems.error(
                    key.token,
                    f"cannot serve {key} - it is already defined in"
                    f" {other.token.file}:{other.token.line}; give it another zone or port, or"
                    " bind each to addresses of its own",
                )
            elif foreign is not None:
                problems.error(
                    key.token,
                    f"cannot serve {key} - port {key.port} speaks {foreign.scheme} in"
                    f" {foreign.token.file}:{foreign.token.line}; give it a port of its own",
                )


def _clash(taken: list[tuple[frozenset[str], Key]], addresses: frozenset[str]) -> Key | None:
    for others, key in taken:
        if not others or not addresses or others & addresses:
            return key
    return None
