"""Netlink: questions to the kernel, and the node's addresses.

Carries messages; what the ones about flows mean is conntrack.py's. For the few that are needed
pyroute2 would cost a start 0.1 s and 10 MB. All calls block, and act in the network namespace
of the thread that calls.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import NamedTuple

from kdns.errors import ApplyError
from kdns.proxy.options import Family

# linux/netlink.h
NETLINK_ROUTE, NETLINK_NETFILTER = 0, 12
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

    protocol = NETLINK_NETFILTER
    remedies: Mapping[int, str] = REMEDIES

    def __init__(self, purpose: str) -> None:
        self.purpose = purpose
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, self.protocol)
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
        return NetlinkError(self.purpose, code, self.remedies.get(code, ""))


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

# linux/rtnetlink.h, linux/if_addr.h
RTM_NEWADDR, RTM_GETADDR, RTM_NEWROUTE, RTM_GETROUTE = 20, 22, 24, 26
RTN_UNICAST, RTN_LOCAL = 1, 2
RT_SCOPE_UNIVERSE = 0
RT_TABLE_MAIN = 254
IFA_F_TEMPORARY, IFA_F_DADFAILED, IFA_F_DEPRECATED, IFA_F_TENTATIVE = 0x01, 0x08, 0x20, 0x40
# IPv6: passing (RFC 8981), another host's, for old connections only, or not yet there.
NOT_FOR_OTHERS = IFA_F_TEMPORARY | IFA_F_DADFAILED | IFA_F_DEPRECATED | IFA_F_TENTATIVE
IFA_ADDRESS, IFA_LOCAL = 1, 2
RTA_DST, RTA_OIF, RTA_PRIORITY, RTA_PREFSRC, RTA_MULTIPATH = 1, 4, 6, 7, 9
_NUMBER: Mapping[Family, int] = {4: socket.AF_INET, 6: socket.AF_INET6}

_ADDRESS = struct.Struct("=BBBBI")  # ifaddrmsg: family, prefix length, flags, scope, interface
# rtmsg: family, lengths of destination and source, TOS, table, protocol, scope, type, flags
_ROUTE = struct.Struct("=BBBBBBBBI")
_U32 = struct.Struct("=I")
_NEXT_HOP = struct.Struct("=HBBI")  # rtnexthop: length, flags, weight, interface


class _Routing(Netfilter):
    """A socket to the kernel's addresses and routes."""

    protocol = NETLINK_ROUTE
    remedies: Mapping[int, str] = {}


class NodeAddress(NamedTuple):
    """One address of the node. universal -- reachable from elsewhere: neither of the link nor
    of the host only, and not a passing one (RFC 8981)."""

    interface: str
    address: str
    prefix: int
    universal: bool


class _Route(NamedTuple):
    """table -- RT_TABLE_, 252 for numbers above 255; kind -- RTN_; destination, source,
    interface -- "" or 0 where it has none."""

    table: int
    kind: int
    destination: str
    length: int
    source: str
    interface: int
    priority: int


def node_addresses(family: Family) -> tuple[NodeAddress, ...]:
    """Return the addresses of all interfaces, in the kernel's order. Raises NetlinkError."""
    found = []
    names: dict[int, str] = {}  # thousands of addresses may be on one interface
    asked = _listed("list the node's addresses", family, RTM_GETADDR, RTM_NEWADDR, _ADDRESS)
    for (_, prefix, flags, scope, index), values in asked:
        # The address itself; IFA_ADDRESS is the other end of a point-to-point link.
        address = _text(values.get(IFA_LOCAL) or values.get(IFA_ADDRESS))
        if address:
            universal = scope == RT_SCOPE_UNIVERSE and not (family == 6 and flags & NOT_FOR_OTHERS)
            if index not in names:
                names[index] = _interface(index)
            found.append(NodeAddress(names[index], address, prefix, universal))
    return tuple(found)


def local_networks(family: Family) -> tuple[str, ...]:
    """Return what `-m addrtype --dst-type LOCAL` matches: the destinations of local routes, as
    CIDRs ("127.0.0.0/8"). Raises NetlinkError."""
    routes = _routes("list the node's local routes", family)
    return tuple(
        sorted(
            f"{route.destination}/{route.length}"
            for route in routes
            if route.kind == RTN_LOCAL and route.destination
        )
    )


def default_address(family: Family) -> str:
    """Return the node's address on the interface of its default route; "" if there is none.

    Of several default routes the one with the lowest metric counts; its own preferred source,
    if it names one, before the interface's first universal address. Raises NetlinkError.
    """
    defaults = [
        route
        for route in _routes("list the node's routes", family)
        # Other tables are for some packets only, such as those of a Pod with its own interface.
        if route.table == RT_TABLE_MAIN
        and route.length == 0
        and route.interface
        and route.kind == RTN_UNICAST
    ]
    if not defaults:
        return ""
    best = min(defaults, key=lambda route: route.priority)
    if best.source:
        return best.source
    interface = _interface(best.interface)
    return next(
        (
            one.address
            for one in node_addresses(family)
            if one.interface == interface and one.universal
        ),
        "",
    )


def _routes(purpose: str, family: Family) -> Iterator[_Route]:
    """Yield the routes of all tables."""
    for head, values in _listed(purpose, family, RTM_GETROUTE, RTM_NEWROUTE, _ROUTE):
        yield _Route(
            head[4],
            head[7],
            _text(values.get(RTA_DST)),
            head[1],
            _text(values.get(RTA_PREFSRC)),
            _number(values.get(RTA_OIF)) or _first_hop(values.get(RTA_MULTIPATH)),
            _number(values.get(RTA_PRIORITY)),
        )


def _listed(
    purpose: str, family: Family, question: int, answer: int, shape: struct.Struct
) -> Iterator[tuple[tuple[int, ...], dict[int, bytes]]]:
    """Yield the head, as `shape` has it, and the attributes of all that the kernel lists."""
    body = _NUMBER[family].to_bytes(1, "little") + bytes(shape.size - 1)
    with _Routing(purpose) as link:
        for datagram in link.dump(question, body):
            for one in messages(datagram):
                if one.kind == NLMSG_DONE:
                    return
                if one.kind != answer or one.end - one.start < shape.size:
                    continue
                head = shape.unpack_from(datagram, one.start)
                if head[0] == _NUMBER[family]:
                    found = attributes(datagram, one.start + shape.size, one.end)
                    yield head, {number: datagram[a:b] for number, (a, b) in found.items()}


def _text(octets: bytes | None) -> str:
    """Return an address as it is written; "" if it is none."""
    match len(octets or b""):
        case 4:
            return socket.inet_ntop(socket.AF_INET, octets or b"")
        case 16:
            return socket.inet_ntop(socket.AF_INET6, octets or b"")
    return ""


def _number(octets: bytes | None) -> int:
    return int(_U32.unpack(octets)[0]) if octets and len(octets) == _U32.size else 0


def _first_hop(octets: bytes | None) -> int:
    """Return the interface of the first of several next hops; 0 if there is none."""
    return int(_NEXT_HOP.unpack_from(octets)[3]) if octets and len(octets) >= 8 else 0


def _interface(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:  # gone meanwhile
        return f"if{index}"
