"""Look-ups of this process answered as in a Pod: `socket.getaddrinfo` that knows a cluster.

Decides which name is asked for and what a program is told; the answers are the cluster's DNS
server's. Names it does not have go to the host's own resolver, as before.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from kdns.dns import types as t
from kdns.dns.message import RR, Reply
from kdns.dns.name import BadName, is_subdomain, parse_name, render_name
from kdns.dns.text import render_rdata
from kdns.server.client import candidates, search_path

# What a cluster's DNS server says at once; None where it must ask another server first.
Ask: TypeAlias = Callable[[bytes, int], Reply | None]
MAX_ALIASES: Final = 10
QTYPES: Final = {
    socket.AF_INET: (t.A,),
    socket.AF_INET6: (t.AAAA,),
    socket.AF_UNSPEC: (t.A, t.AAAA),
}


@dataclass(frozen=True, slots=True)
class Host:
    """A name that the cluster has. name -- in full; alias -- what it stands for, outside of
    the cluster ("": nothing)"""

    name: str
    addresses: tuple[str, ...]
    alias: str = ""


class Failing(Exception):
    """The cluster's DNS server fails to say whether there is such a name."""


class Lookup:
    """Finds hosts for one Pod.

    ask       -- the server
    zones     -- those of the cluster
    namespace -- the Pod's
    """

    def __init__(self, ask: Ask, zones: Sequence[bytes], namespace: str = "default") -> None:
        self._ask = ask
        self._zones = tuple(zones)
        self._search = search_path([namespace])

    def find(self, name: str, qtypes: Sequence[int]) -> Host | None:
        """Return the host; None where the cluster knows no such name. Raises Failing."""
        try:
            names = candidates(name, self._search)
        except (BadName, UnicodeError):
            return None
        known: Host | None = None
        failing = False
        for full in names:
            ours = self._is_ours(full)
            for qtype in qtypes:
                reply = self._ask(full, qtype)
                if reply is None:
                    continue
                if reply.rcode == t.NOERROR and reply.answer:
                    known = _merged(known, _host(full, qtype, reply.answer))
                elif ours and reply.rcode == t.NOERROR:
                    known = known or Host(render_name(full), ())
                elif ours and reply.rcode != t.NXDOMAIN:
                    failing = True
            if known is not None and (known.addresses or known.alias):
                return known
        if known is None and failing:
            raise Failing(name)
        if known is None and self._is_ours(parse_name(name.rstrip(".") + ".")):
            return Host(name, ())  # nobody else is to be asked
        return known

    def _is_ours(self, full: bytes) -> bool:
        return any(is_subdomain(full.lower(), zone) for zone in self._zones)


def _host(full: bytes, qtype: int, answer: Sequence[RR]) -> Host:
    addresses = tuple(render_rdata(qtype, rr.rdata) for rr in answer if rr.type == qtype)
    alias = ""
    if not addresses:
        target = full.lower()
        targets = {rr.name.lower(): rr.rdata for rr in answer if rr.type == t.CNAME}
        for _ in range(MAX_ALIASES):
            if target not in targets:
                break
            alias = render_name(targets[target])
            target = targets[target].lower()
    return Host(render_name(full), addresses, alias)


def _merged(one: Host | None, other: Host) -> Host:
    if one is None:
        return other
    return Host(one.name, one.addresses + other.addresses, one.alias or other.alias)


@contextmanager
def in_a_pod(lookup: Lookup) -> Iterator[None]:
    """Have the look-ups of this process made as in a Pod while the `with` lasts.

    What asks the C library itself (a socket's connect() with a name, libpq) is not reached.
    """
    real = {name: getattr(socket, name) for name in ("getaddrinfo", "gethostbyname",
                                                     "gethostbyname_ex")}  # fmt: skip

    def getaddrinfo(
        host: Any, port: Any, family: int = 0, type: int = 0, proto: int = 0, flags: int = 0
    ) -> list[Any]:
        name = _name_of(host)
        if name is None or flags & socket.AI_NUMERICHOST or family not in QTYPES:
            return real["getaddrinfo"](host, port, family, type, proto, flags)  # type: ignore[no-any-return]
        found = _find(lookup, name, QTYPES[socket.AddressFamily(family)])
        if found is None:
            return real["getaddrinfo"](host, port, family, type, proto, flags)  # type: ignore[no-any-return]
        if found.alias:
            return real["getaddrinfo"](  # type: ignore[no-any-return]
                found.alias.rstrip("."), port, family, type, proto, flags
            )
        out: list[Any] = []
        for address in found.addresses:
            out += real["getaddrinfo"](
                address, port, 0, type, proto,
                flags & ~socket.AI_ADDRCONFIG & ~socket.AI_CANONNAME | socket.AI_NUMERICHOST,
            )  # fmt: skip
        if flags & socket.AI_CANONNAME and out:
            kind = out[0]
            out[0] = (*kind[:3], found.name.rstrip("."), kind[4])
        return out

    def gethostbyname_ex(host: Any) -> tuple[str, list[str], list[str]]:
        name = _name_of(host)
        found = _find(lookup, name, (t.A,)) if name is not None else None
        if found is None:
            return real["gethostbyname_ex"](host)  # type: ignore[no-any-return]
        if found.alias:
            return real["gethostbyname_ex"](found.alias.rstrip("."))  # type: ignore[no-any-return]
        return found.name.rstrip("."), [], list(found.addresses)

    def gethostbyname(host: Any) -> str:
        return gethostbyname_ex(host)[2][0]

    ours = {f.__name__: f for f in (getaddrinfo, gethostbyname, gethostbyname_ex)}
    for name, function in ours.items():
        setattr(socket, name, function)
    try:
        yield
    finally:
        for name, function in real.items():
            setattr(socket, name, function)


def _find(lookup: Lookup, name: str, qtypes: Sequence[int]) -> Host | None:
    try:
        found = lookup.find(name, qtypes)
    except Failing:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution") from None
    if found is not None and not found.addresses and not found.alias:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return found


def _name_of(host: Any) -> str | None:
    """Return a host name that may be the cluster's; None for addresses, for what /etc/hosts of
    a Pod has, and for what is no name at all."""
    if isinstance(host, (bytes, bytearray)):
        try:
            host = bytes(host).decode("ascii")
        except UnicodeDecodeError:
            return None
    if not isinstance(host, str) or not host or ":" in host:
        return None
    plain = host.rstrip(".").lower()
    if (
        plain == "localhost"
        or plain.endswith(".localhost")
        or plain == socket.gethostname().lower()
    ):
        return None
    if plain.replace(".", "").isdigit():
        return None
    return host
