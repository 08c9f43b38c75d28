"""Netlink: questions to the kernel, and the node's addresses.

Carries messages; what the ones about flows mean is conntrack.py's. Addresses and routes are
asked for rarely, so pyroute2 does it, imported only then (0.3 s, 20 MB). All calls block, and
act in the network namespace of the thread that calls.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, NamedTuple

from kdns.errors import ApplyError
from kdns.proxy.options import Family

# linux/netlink.h
NETLINK_NETFILTER = 12
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP_INTR, NLM_F_DUMP = 0x1, 0x4, 0x10, 0x300
NESTED = 0x8000  # NLA_F_NESTED
TYPE = 0x3FFF  # the bits of an attribute's type that are its number

# The kernel answers at once; a socket that says nothing for so many seconds never will.
PATIENCE = 10.0
LARGEST = 1 << 16  # octets; the kernel's datagrams of a dump have at most half of that

_MESSAGE = struct.Struct("=IHHII")  # length, type, flags, sequence number, port ID
_HEAD = struct.Struct("=HH")  # an attribute's length, with these four octets, and type
_ERRNO = struct.Struct("=i")

# errno -> what it takes to be allowed.
REMEDIES = {
    errno.EPERM: "it takes the capability CAP_NET_ADMIN",
    errno.EINVAL: "it takes the kernel module nf_conntrack_netlink",
    errno.EOPNOTSUPP: "it takes the kernel module nf_conntrack_netlink",
    errno.EPROTONOSUPPORT: "it takes the kernel modules nfnetlink and nf_conntrack_netlink",
}


class NetlinkError(ApplyError):
    """The kernel refused; the text says what was asked, why not, and what it would take.

    code -- the errno
    """

    def __init__(self, purpose: str, code: int, remedy: str = "") -> None:
        self.code = code
        text = f"cannot {purpose}: {os.strerror(code)}{remedy and '; ' + remedy}"
        super().__init__("netlink", text)


class Message(NamedTuple):
    """One message of a datagram: its body is datagram[start:end]."""

    kind: int
    flags: int
    sequence: int
    start: int
    end: int


class Netfilter:
    """A socket to the kernel's netfilter; `purpose` is told in errors. A context manager."""

    def __init__(self, purpose: str) -> None:
        self.purpose = purpose
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
            self._socket.bind((0, 0))
        except OSError as e:
            raise self._refused(e.errno or 0) from None
        self._socket.settimeout(PATIENCE)

    def __enter__(self) -> Netfilter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()

    def dump(self, kind: int, body: bytes) -> Iterator[bytes]:
        """Yield the datagrams of a dump. The reader stops at NLMSG_DONE. Raises NetlinkError."""
        self._send(message(kind, NLM_F_REQUEST | NLM_F_DUMP, 0, body))
        while True:
            datagram = self._receive()
            code = _error_in(datagram)
            if code:
                raise self._refused(code)
            yield datagram

    def tell(self, kind: int, bodies: Iterable[bytes]) -> list[int]:
        """Send one message a body, all at once; return the errno of each, 0 for done."""
        sent = [
            message(kind, NLM_F_REQUEST | NLM_F_ACK, number, body)
            for number, body in enumerate(bodies)
        ]
        self._send(b"".join(sent))
        answers: dict[int, int] = {}
        while len(answers) < len(sent):
            datagram = self._receive()
            for one in messages(datagram):
                if one.kind == NLMSG_ERROR:
                    answers[one.sequence] = -_ERRNO.unpack_from(datagram, one.start)[0]
        return [answers[number] for number in range(len(sent))]

    def _send(self, octets: bytes) -> None:
        try:
            self._socket.send(octets)
        except OSError as e:
            raise self._refused(e.errno or 0) from None

    def _receive(self) -> bytes:
        try:
            return self._socket.recv(LARGEST)
        except TimeoutError:
            raise self._refused(errno.ETIMEDOUT) from None
        except OSError as e:
            raise self._refused(e.errno or 0) from None

    def _refused(self, code: int) -> NetlinkError:
        return NetlinkError(self.purpose, code, REMEDIES.get(code, ""))


def message(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    """Return one netlink message. Its length is a multiple of 4, as attributes are."""
    return _MESSAGE.pack(_MESSAGE.size + len(body), kind, flags, sequence, 0) + body


def messages(datagram: bytes) -> Iterator[Message]:
    """Yield the messages of a datagram, as far as they are whole."""
    start, size = 0, len(datagram)
    while start + _MESSAGE.size <= size:
        length, kind, flags, sequence, _ = _MESSAGE.unpack_from(datagram, start)
        if not _MESSAGE.size <= length <= size - start:
            return
        yield Message(kind, flags, sequence, start + _MESSAGE.size, start + length)
        start += (length + 3) & ~3


def attribute(number: int, value: bytes) -> bytes:
    """Return one attribute, padded to a multiple of 4."""
    return _HEAD.pack(_HEAD.size + len(value), number) + value + bytes(-len(value) % 4)


def nest(number: int, *attributes: bytes) -> bytes:
    """Return an attribute that holds others."""
    return attribute(number | NESTED, b"".join(attributes))


def attributes(octets: bytes, start: int, end: int) -> dict[int, tuple[int, int]]:
    """Return number -> (start, end) of the attributes' values, as far as they are whole."""
    found: dict[int, tuple[int, int]] = {}
    while start + _HEAD.size <= end:
        length, number = _HEAD.unpack_from(octets, start)
        if not _HEAD.size <= length <= end - start:
            break
        found[number & TYPE] = (start + _HEAD.size, start + length)
        start += (length + 3) & ~3
    return found


def _error_in(datagram: bytes) -> int:
    """Return the errno with which the kernel refuses a dump; 0 if it does not."""
    for one in messages(datagram):
        if one.kind == NLMSG_ERROR:
            return -int(_ERRNO.unpack_from(datagram, one.start)[0])
        break  # it comes first or not at all
    return 0


# --- the node's addresses ----------------------------------------------------------------------

RTN_LOCAL, IFA_F_TENTATIVE, IFA_F_TEMPORARY = 2, 0x40, 0x01
RT_SCOPE_UNIVERSE = 0


class NodeAddress(NamedTuple):
    """One address of the node. universal -- reachable from elsewhere: neither of the link nor
    of the host only, and not a passing one (RFC 8981)."""

    interface: str
    address: str
    prefix: int
    universal: bool


def node_addresses(family: Family) -> tuple[NodeAddress, ...]:
    """Return the addresses of all interfaces, in the kernel's order. Raises NetlinkError."""
    found = []
    for one in _routing("list the node's addresses", "get_addr", family):
        # The address itself; IFA_ADDRESS is the other end of a point-to-point link.
        address = one.get("local") or one.get("address")
        if address:
            passing = (one.get("flags") or 0) & (IFA_F_TENTATIVE | IFA_F_TEMPORARY)
            universal = one["scope"] == RT_SCOPE_UNIVERSE and not (family == 6 and passing)
            name = _interface(one["index"])
            found.append(NodeAddress(name, str(address), one["prefixlen"], universal))
    return tuple(found)


def local_networks(family: Family) -> tuple[str, ...]:
    """Return what `-m addrtype --dst-type LOCAL` matches: the destinations of local routes, as
    CIDRs ("127.0.0.0/8"). Raises NetlinkError."""
    routes = _routing("list the node's local routes", "get_routes", family, type=RTN_LOCAL)
    return tuple(
        sorted(f"{route.get('dst')}/{route['dst_len']}" for route in routes if route.get("dst"))
    )


def default_address(family: Family) -> str:
    """Return the node's address on the interface of its default route; "" if there is none.

    Of several default routes the one with the lowest metric counts; its own preferred source,
    if it names one, before the interface's first universal address. Raises NetlinkError.
    """
    defaults = [
        route
        for route in _routing("list the node's routes", "get_routes", family)
        if route["dst_len"] == 0 and route.get("oif") and route["type"] == 1
    ]
    if not defaults:
        return ""
    best = min(defaults, key=lambda route: route.get("priority") or 0)
    if best.get("prefsrc"):
        return str(best.get("prefsrc"))
    interface = _interface(best.get("oif"))
    return next(
        (
            one.address
            for one in node_addresses(family)
            if one.interface == interface and one.universal
        ),
        "",
    )


def _routing(purpose: str, method: str, family: Family, **match: int) -> list[Any]:
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError as Refused

    try:
        with IPRoute() as link:
            number = socket.AF_INET if family == 4 else socket.AF_INET6
            return list(getattr(link, method)(family=number, **match))
    except Refused as e:
        raise NetlinkError(purpose, e.code) from None
    except OSError as e:
        raise NetlinkError(purpose, e.errno or 0) from None


def _interface(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:  # gone meanwhile
        return f"if{index}"
