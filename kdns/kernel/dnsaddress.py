"""The addresses of the node's own DNS server: given to the node, and taken away again.

Decides where they stand and which of those that stand there are ours. A dummy interface of
our own holds them where the kernel has that kind, as NodeLocal DNSCache does it; else the
loopback interface. What stands on the loopback carries our mark, for other addresses there are
somebody else's: after a kill, and for a clean-up by another process, the kernel alone knows
what was ours. All calls block, and act in the network namespace of the thread that calls.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Final, NamedTuple, Self

from kdns.kernel.netlink import (
    NETLINK_ROUTE,
    NLM_F_ACK,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    Netfilter,
    attribute,
    attributes,
    message,
    messages,
    nest,
)
from kdns.proxy.options import Family

INTERFACE: Final = "kdns0"
LOOPBACK: Final = "lo"
# The mark of what is ours on the loopback. The label is IPv4's and in every kernel, the
# protocol number is of both families, since 5.18; neither has another meaning to anybody.
LABEL: Final = b"lo:kdns"
PROTOCOL: Final = 107

# linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h, linux/netlink.h
NLM_F_EXCL, NLM_F_CREATE = 0x200, 0x400
RTM_NEWLINK, RTM_DELLINK, RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 16, 17, 20, 21, 22
IFF_UP = 0x1
IFLA_IFNAME, IFLA_LINKINFO, IFLA_INFO_KIND = 3, 18, 1
IFA_ADDRESS, IFA_LOCAL, IFA_LABEL, IFA_CACHEINFO, IFA_PROTO = 1, 2, 3, 6, 11
RT_SCOPE_HOST = 254
IFA_F_NODAD = 0x02  # nobody else on the link can have it: there is no link

_LINK = struct.Struct("=BBHiII")  # ifinfomsg: family, pad, type, index, flags, change
_ADDRESS = struct.Struct("=BBBBI")  # ifaddrmsg: family, prefix length, flags, scope, interface
_LIFETIMES = struct.Struct("=IIII")  # ifa_cacheinfo: preferred, valid, and two that are told
FOREVER: Final = 0xFFFFFFFF
_ERRNO = struct.Struct("=i")
_AF: Final[Mapping[int, int]] = {4: socket.AF_INET, 6: socket.AF_INET6}
NO_DUMMY: Final = (errno.EOPNOTSUPP, errno.ENOENT)


class _Routing(Netfilter):
    """A socket to the kernel's interfaces and addresses."""

    protocol = NETLINK_ROUTE
    remedies: Mapping[int, str] = {
        errno.EPERM: "run as root, or with the capability NET_ADMIN (a container:"
                     " securityContext.capabilities.add)",
        errno.EACCES: "IPv6 is switched off there (sysctl net.ipv6.conf.all.disable_ipv6)",
    }  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def ask(self, kind: int, flags: int, body: bytes) -> int:
        """Send one order; return its errno, 0 for done."""
        self._send(message(kind, flags | NLM_F_REQUEST | NLM_F_ACK, 1, body))
        while True:
            datagram = self._receive()
            for one in messages(datagram):
                if one.kind == NLMSG_ERROR:
                    return -int(_ERRNO.unpack_from(datagram, one.start)[0])

    def order(self, kind: int, flags: int, body: bytes, *fine: int) -> int:
        """Send one order; return its errno, which is 0 or one of `fine`. Raises NetlinkError."""
        code = self.ask(kind, flags, body)
        if code and code not in fine:
            raise self._refused(code)
        return code


class Held(NamedTuple):
    """An address that the node has. marked -- as ours"""

    interface: int
    address: str
    marked: bool


def take_addresses(wanted: Sequence[str]) -> str:
    """Have the node own these addresses; return the interface that holds them.

    One that is there already stays as it is. Raises NetlinkError.
    """
    name = INTERFACE if _make_interface() else LOOPBACK
    index = socket.if_nametoindex(name)
    with _Routing(f"set {name} up") as link:
        link.order(RTM_NEWLINK, 0, _LINK.pack(0, 0, 0, index, IFF_UP, IFF_UP))
    there = {one.address for one in held_addresses() if one.interface == index}
    for address in wanted:
        if canonical(address) in there:
            continue
        with _Routing(f"give the node the address {address} (on {name})") as link:
            flags = NLM_F_CREATE | NLM_F_EXCL
            link.order(RTM_NEWADDR, flags, _body(address, index, name), errno.EEXIST)
    return name


def missing_addresses(wanted: Iterable[str]) -> list[str]:
    """Return those that no interface of ours holds any more. Raises NetlinkError."""
    ours = (_index(INTERFACE), _index(LOOPBACK))
    there = {one.address for one in held_addresses() if one.interface in ours}
    return [address for address in wanted if canonical(address) not in there]


def give_back_addresses() -> list[str]:
    """Take away what we gave the node, in this run or another; return it. What is not there is
    no error. Raises NetlinkError."""
    found = held_addresses()
    gone: list[str] = []
    index = _index(INTERFACE)
    if index:
        with _Routing(f"remove the interface {INTERFACE}") as link:
            body = _LINK.pack(0, 0, 0, index, 0, 0)
            link.order(RTM_DELLINK, 0, body, errno.ENODEV)
        gone += [one.address for one in found
                 if one.interface == index and not one.address.startswith("fe80:")]  # fmt: skip
    loopback = _index(LOOPBACK)
    for one in found:
        if one.interface == loopback and one.marked:
            with _Routing(f"take the address {one.address} from {LOOPBACK}") as link:
                body = _body(one.address, loopback, LOOPBACK)
                link.order(RTM_DELADDR, 0, body, errno.EADDRNOTAVAIL, errno.ENODEV)
            gone.append(one.address)
    return gone


def held_addresses() -> list[Held]:
    """Return all addresses of the node. Raises NetlinkError."""
    families: tuple[Family, ...] = (4, 6) if Path("/proc/net/if_inet6").exists() else (4,)
    return [one for family in families for one in _list(family)]


def canonical(address: str) -> str:
    """Return an address as it is written by all of us: equal texts, equal addresses."""
    return str(ip_address(address))


def _list(family: Family) -> list[Held]:
    found: list[Held] = []
    question = bytes((_AF[family],)) + bytes(_ADDRESS.size - 1)
    with _Routing("list the node's addresses") as link:
        for datagram in link.dump(RTM_GETADDR, question):
            for one in messages(datagram):
                if one.kind == NLMSG_DONE:
                    return found
                if one.kind == RTM_NEWADDR and one.end - one.start >= _ADDRESS.size:
                    found += _read(datagram, one.start, one.end)
    return found


def _read(datagram: bytes, start: int, end: int) -> list[Held]:
    interface = _ADDRESS.unpack_from(datagram, start)[4]
    places = attributes(datagram, start + _ADDRESS.size, end)
    values = {number: datagram[a:b] for number, (a, b) in places.items()}
    packed = values.get(IFA_LOCAL) or values.get(IFA_ADDRESS) or b""
    if len(packed) not in (4, 16):
        return []
    marked = (
        values.get(IFA_LABEL, b"").rstrip(b"\0") == LABEL
        or values.get(IFA_PROTO) == bytes((PROTOCOL,))
    )  # fmt: skip
    return [Held(interface, str(ip_address(packed)), marked)]


def _body(address: str, index: int, name: str) -> bytes:
    """Return an address as the kernel is told it: one that no connection of the node's own
    programs begins from (IPv4: of this host alone; IPv6: not preferred)."""
    one = ip_address(address)
    flags, scope = (IFA_F_NODAD, 0) if one.version == 6 else (0, RT_SCOPE_HOST)
    head = _ADDRESS.pack(_AF[one.version], one.max_prefixlen, flags, scope, index)
    body = head + attribute(IFA_LOCAL, one.packed) + attribute(IFA_ADDRESS, one.packed)
    if one.version == 6:
        body += attribute(IFA_CACHEINFO, _LIFETIMES.pack(0, FOREVER, 0, 0))
    if name == LOOPBACK:
        body += attribute(IFA_PROTO, bytes((PROTOCOL,)))
        if one.version == 4:
            body += attribute(IFA_LABEL, LABEL + b"\0")
    return body


def _make_interface() -> bool:
    """Make our interface, if it is not there; False where the kernel has no such kind."""
    if _index(INTERFACE):
        return True
    kind = nest(IFLA_LINKINFO, attribute(IFLA_INFO_KIND, b"dummy"))
    name = attribute(IFLA_IFNAME, INTERFACE.encode() + b"\0")
    body = _LINK.pack(0, 0, 0, 0, IFF_UP, IFF_UP) + name + kind
    with _Routing(f"make the interface {INTERFACE}") as link:
        flags = NLM_F_CREATE | NLM_F_EXCL
        return link.order(RTM_NEWLINK, flags, body, errno.EEXIST, *NO_DUMMY) not in NO_DUMMY


def _index(name: str) -> int:
    """Return an interface's number; 0 if there is none."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0
