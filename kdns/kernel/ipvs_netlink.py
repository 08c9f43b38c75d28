"""What IPVS and the interface kube-ipvs0 are told, in the kernel's own words (netlink).

Carries orders and reads what there is; what to order is ipvs.py's. Written for these few
messages instead of a dependency on pyroute2: hundreds of orders go in one system call, where
pyroute2 waits for the answer to each, and a start that does not use this mode pays nothing.
Virtual servers are read from /proc/net/ip_vs, all at once: netlink lists the real servers of
one virtual server at a time, and 10,000 questions are no way to look whether all is in place.
All calls block, and act in the network namespace of the thread that calls.
"""

from __future__ import annotations

import errno
import socket
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv6Address
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Self

from kdns.errors import ApplyError
from kdns.kernel import netlink
from kdns.kernel.netlink import (
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
    node_addresses,
)
from kdns.proxy.ipvs import INTERFACE, PERSISTENT, SOURCE_PORT, At, Real, Virtual
from kdns.proxy.options import Family, Protocol

CLOCK_MONOTONIC_COARSE = 6  # linux/time.h
# linux/genetlink.h, linux/netlink.h
NETLINK_GENERIC = 16
GENL_ID_CTRL, CTRL_CMD_GETFAMILY = 16, 3
CTRL_ATTR_FAMILY_ID, CTRL_ATTR_FAMILY_NAME = 1, 2
NLM_F_EXCL, NLM_F_CREATE = 0x200, 0x400
# linux/ip_vs.h
NEW_SERVICE, SET_SERVICE, DEL_SERVICE = 1, 2, 3
NEW_DEST, SET_DEST, DEL_DEST, GET_DEST = 5, 6, 7, 8
SET_CONFIG = 12
CMD_SERVICE, CMD_DEST, CMD_TIMEOUT_TCP, CMD_TIMEOUT_FIN, CMD_TIMEOUT_UDP = 1, 2, 4, 5, 6
SVC_AF, SVC_PROTOCOL, SVC_ADDR, SVC_PORT = 1, 2, 3, 4
SVC_SCHEDULER, SVC_FLAGS, SVC_TIMEOUT, SVC_NETMASK = 6, 7, 8, 9
DEST_ADDR, DEST_PORT, DEST_METHOD, DEST_WEIGHT, DEST_UPPER, DEST_LOWER, DEST_FAMILY = (
    1, 2, 3, 4, 5, 6, 11,
)  # fmt: skip
DEST_ACTIVE, DEST_INACTIVE = 7, 8
MASQUERADING = 0
# linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h
RTM_NEWLINK, RTM_DELLINK, RTM_NEWADDR, RTM_DELADDR = 16, 17, 20, 21
IFLA_IFNAME, IFLA_LINKINFO, IFLA_INFO_KIND = 3, 18, 1
IFA_ADDRESS, IFA_LOCAL, IFA_F_NODAD = 1, 2, 2
IFF_UP = 1

_NUMBERS: Mapping[Protocol, int] = {
    "tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP, "sctp": socket.IPPROTO_SCTP,
}  # fmt: skip
_PROTOCOLS: Mapping[str, Protocol] = {"TCP": "tcp", "UDP": "udp", "SCTP": "sctp"}
_AF: Mapping[Family, int] = {4: socket.AF_INET, 6: socket.AF_INET6}
_OURS = PERSISTENT | SOURCE_PORT  # the bits of a virtual server's flags that are ours to set

# Orders in one system call: the answers to them must find room in a socket's buffer.
BATCH = 100
# Every reader of /proc/net would see the namespace of the process; this thread may be elsewhere.
TABLE = Path("/proc/thread-self/net/ip_vs")
READINGS = 6  # of it, at most

_U16, _U32, _BE16 = struct.Struct("=H"), struct.Struct("=I"), struct.Struct(">H")
_I32 = struct.Struct("=i")
_GENERIC = struct.Struct("=BBH")  # command, version, reserved
_LINK = struct.Struct("=BBHiII")  # ifinfomsg: family, pad, type, index, flags, change
_ADDRESS = struct.Struct("=BBBBI")  # ifaddrmsg: family, prefix length, flags, scope, interface

Order = tuple[int, int, bytes]  # type, flags, body


class _Orders(Netfilter):
    """A socket that is told many things at once."""

    def __enter__(self) -> Self:
        return self

    def order(self, orders: Iterable[Order]) -> Iterator[int]:
        """Send all, and yield the errno of each in turn; 0 for done.

        The kernel does them one after the other and tells of each that failed; that the last of
        a batch is done it is asked to tell, too: then so are those before.
        """
        waiting = iter(orders)
        while batch := list(islice(waiting, BATCH)):
            last = len(batch) - 1
            self._send(
                b"".join(
                    message(
                        kind,
                        flags | (NLM_F_REQUEST if number < last else NLM_F_REQUEST | NLM_F_ACK),
                        number,
                        body,
                    )
                    for number, (kind, flags, body) in enumerate(batch)
                )
            )
            codes = [0] * len(batch)
            done = False
            while not done:
                datagram = self._receive()
                for one in messages(datagram):
                    if one.kind == NLMSG_ERROR:
                        codes[one.sequence] = -int(_I32.unpack_from(datagram, one.start)[0])
                        done |= one.sequence == last
            yield from codes


class _Routing(_Orders):
    """A socket to the kernel's interfaces and addresses."""

    protocol = netlink.NETLINK_ROUTE
    remedies: Mapping[int, str] = {
        errno.EPERM: "it takes the capability CAP_NET_ADMIN",
        errno.EOPNOTSUPP: "it takes the kernel module dummy",
    }


class Ipvs(_Orders):
    """A socket to the kernel's IPVS. Raises NetlinkError where there is none. A context manager."""

    protocol = NETLINK_GENERIC
    remedies: Mapping[int, str] = {
        errno.EPERM: "it takes the capability CAP_NET_ADMIN",
        errno.ENOENT: "it takes the kernel module ip_vs",
    }

    def __init__(self, purpose: str = "tell IPVS") -> None:
        super().__init__(purpose)
        try:
            self._kind = self._find()
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def _find(self) -> int:
        name = attribute(CTRL_ATTR_FAMILY_NAME, b"IPVS\0")
        body = _GENERIC.pack(CTRL_CMD_GETFAMILY, 1, 0) + name
        # To ask for it by name makes the kernel load the module, where it can.
        self._send(message(GENL_ID_CTRL, NLM_F_REQUEST | NLM_F_ACK, 0, body))
        found = 0
        while True:
            datagram = self._receive()
            for one in messages(datagram):
                if one.kind == GENL_ID_CTRL:
                    values = attributes(datagram, one.start + _GENERIC.size, one.end)
                    start, _ = values.get(CTRL_ATTR_FAMILY_ID, (0, 0))
                    found = int(_U16.unpack_from(datagram, start)[0]) if start else 0
                elif one.kind == NLMSG_ERROR:
                    code = -int(_I32.unpack_from(datagram, one.start)[0])
                    if code or not found:
                        raise self._refused(code or errno.ENOENT)
                    return found
                elif one.kind == NLMSG_DONE:
                    raise self._refused(errno.ENOENT)

    def tell_all(self, commands: Iterable[tuple[int, bytes]]) -> list[int]:
        """Carry out commands (number, attributes); return the errno of each."""
        return list(
            self.order((self._kind, 0, _GENERIC.pack(one, 1, 0) + body) for one, body in commands)
        )

    def reals(self, at: At) -> dict[Real, HeldReal]:
        """Return the real servers of one virtual server; none if it is not there."""
        found: dict[Real, HeldReal] = {}
        question = _GENERIC.pack(GET_DEST, 1, 0) + server_key(at)
        for datagram in self.dump(self._kind, question):
            for one in messages(datagram):
                if one.kind == NLMSG_DONE:
                    return found
                outer = attributes(datagram, one.start + _GENERIC.size, one.end)
                start, end = outer.get(CMD_DEST, (0, 0))
                values = attributes(datagram, start, end)
                if DEST_ADDR in values and DEST_PORT in values:
                    packed = datagram[values[DEST_ADDR][0] :][: len(_packed(at.address))]
                    (port,) = _BE16.unpack_from(datagram, values[DEST_PORT][0])
                    weight, active, inactive = (
                        int(_U32.unpack_from(datagram, values[number][0])[0])
                        if number in values else 0
                        for number in (DEST_WEIGHT, DEST_ACTIVE, DEST_INACTIVE)
                    )  # fmt: skip
                    found[Real(_spelt(packed), port)] = HeldReal(weight, active + inactive)
        return found


# --- virtual and real servers -----------------------------------------------------------------


def _packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


def _family(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _key(at: At) -> bytes:
    return b"".join(
        (
            attribute(SVC_AF, _U16.pack(_family(at.address))),
            attribute(SVC_PROTOCOL, _U16.pack(_NUMBERS[at.protocol])),
            attribute(SVC_ADDR, _packed(at.address)),
            attribute(SVC_PORT, _BE16.pack(at.port)),
        )
    )


@lru_cache(maxsize=8)
def _dest_parts(af: int, weight: int) -> tuple[bytes, bytes, bytes]:
    """Return what stands before a real server's address, before its port, and behind it: of
    10,000 of them nothing else differs."""
    width = 16 if af == socket.AF_INET6 else 4
    whole = nest(
        CMD_DEST,
        attribute(DEST_ADDR, bytes(width)),
        attribute(DEST_PORT, bytes(2)),
        attribute(DEST_METHOD, _U32.pack(MASQUERADING)),
        attribute(DEST_WEIGHT, _U32.pack(weight)),
        attribute(DEST_UPPER, _U32.pack(0)),
        attribute(DEST_LOWER, _U32.pack(0)),
        attribute(DEST_FAMILY, _U16.pack(af)),
    )
    head = len(attribute(0, b""))  # the nest's and the address's
    address, port = 2 * head, 2 * head + width + head
    return whole[:address], whole[address + width : port], whole[port + 2 :]


def _dest(real: Real, weight: int) -> bytes:
    before, between, behind = _dest_parts(_family(real.address), weight)
    return b"".join((before, _packed(real.address), between, _BE16.pack(real.port), behind))


def server_settings(at: At, virtual: Virtual) -> bytes:
    """Return the attributes of NEW_SERVICE and SET_SERVICE."""
    mask = 128 if ":" in at.address else 0xFFFFFFFF
    return nest(
        CMD_SERVICE,
        _key(at),
        attribute(SVC_SCHEDULER, virtual.scheduler.encode() + b"\0"),
        attribute(SVC_FLAGS, _U32.pack(virtual.flags) + _U32.pack(_OURS)),
        attribute(SVC_TIMEOUT, _U32.pack(virtual.persistence)),
        attribute(SVC_NETMASK, _U32.pack(mask)),
    )


@lru_cache(maxsize=4)  # all real servers of one virtual server are told in a row
def server_key(at: At) -> bytes:
    """Return the attributes of DEL_SERVICE."""
    return nest(CMD_SERVICE, _key(at))


def real_server(at: At, real: Real, weight: int = 1) -> bytes:
    """Return the attributes of NEW_DEST, SET_DEST and DEL_DEST."""
    return server_key(at) + _dest(real, weight)


def timeouts(tcp: int, fin: int, udp: int) -> bytes:
    """Return the attributes of SET_CONFIG: seconds; the kernel keeps what is 0."""
    return b"".join(
        attribute(number, _U32.pack(seconds))
        for number, seconds in ((CMD_TIMEOUT_TCP, tcp), (CMD_TIMEOUT_FIN, fin),
                                (CMD_TIMEOUT_UDP, udp))
    )  # fmt: skip


class HeldReal(NamedTuple):
    """A real server in the kernel. flows -- its connections, active and inactive"""

    weight: int
    flows: int


@dataclass(slots=True)
class HeldVirtual:
    """A virtual server in the kernel."""

    scheduler: str
    persistence: int
    reals: dict[Real, HeldReal]


def held_servers(family: Family) -> dict[At, HeldVirtual]:
    """Return what IPVS holds. Raises ApplyError where there is no IPVS.

    The kernel prints a page at a time, and goes on at the line it had come to: what comes and
    goes meanwhile, in whichever namespace, makes it leave some out. So two readings must agree.
    """
    held = _read_servers()
    for _ in range(READINGS - 1):
        before, held = held, _read_servers()
        if before.keys() == held.keys() and all(
            one.reals.keys() == held[at].reals.keys() for at, one in before.items()
        ):
            break
    return {at: one for at, one in held.items() if (":" in at.address) == (family == 6)}


def read_table() -> bytes:
    """Return what IPVS holds as the kernel prints it. Raises ApplyError."""
    try:
        return TABLE.read_bytes()
    except OSError as error:
        raise ApplyError(
            "ipvs", f"cannot read {TABLE}: {error.strerror}; it takes the kernel module ip_vs"
        ) from None


def _read_servers() -> dict[At, HeldVirtual]:
    return parse_table(read_table().decode("ascii"), ticks_per_second())


def ticks_per_second() -> int:
    """Return the kernel's HZ: its coarse clock goes by ticks."""
    return round(1 / time.clock_getres(CLOCK_MONOTONIC_COARSE))


def parse_table(text: str, hz: int) -> dict[At, HeldVirtual]:
    """Read /proc/net/ip_vs, but for what is known by a packet's mark instead of an address.

    hz -- ticks in a second: time-outs are printed in these
    """
    found: dict[At, HeldVirtual] = {}
    virtual: HeldVirtual | None = None
    for line in text.splitlines()[3:]:
        words = line.split()
        if not words:
            continue
        if words[0] == "->":
            if virtual is not None:
                real = Real(*_read_place(words[1]))
                virtual.reals[real] = HeldReal(int(words[3]), int(words[4]) + int(words[5]))
            continue
        virtual = None
        protocol = _PROTOCOLS.get(words[0])
        if protocol is not None:
            at = At(protocol, *_read_place(words[1]))
            ticks = int(words[words.index("persistent") + 1]) if "persistent" in words else 0
            virtual = found[at] = HeldVirtual(words[2], ticks // hz, {})
    return found


def _read_place(text: str) -> tuple[str, int]:
    """Read "0A600001:0050" and "[fd00:0010:0000:...:0001]:0050"."""
    address, _, port = text.rpartition(":")
    if address.startswith("["):
        packed = socket.inet_pton(socket.AF_INET6, address[1:-1])
        return canonical(packed), int(port, 16)
    return socket.inet_ntop(socket.AF_INET, bytes.fromhex(address)), int(port, 16)


def _spelt(packed: bytes) -> str:
    return canonical(packed) if len(packed) == 16 else socket.inet_ntop(socket.AF_INET, packed)


def canonical(packed: bytes) -> str:
    """Return an IPv6 address as Python's ipaddress writes it; glibc writes some as ::1.2.3.4."""
    text = socket.inet_ntop(socket.AF_INET6, packed)
    return str(IPv6Address(packed)) if "." in text else text


# --- the interface with the VIPs --------------------------------------------------------------


def find_interface() -> int:
    """Return the number of kube-ipvs0; 0 if there is none."""
    try:
        return socket.if_nametoindex(INTERFACE)
    except OSError:
        return 0


def make_interface(name: str = INTERFACE) -> None:
    """Make the dummy interface. Raises NetlinkError."""
    kind = nest(IFLA_LINKINFO, attribute(IFLA_INFO_KIND, b"dummy"))
    body = _LINK.pack(0, 0, 0, 0, IFF_UP, IFF_UP) + attribute(
        IFLA_IFNAME, name.encode() + b"\0"
    ) + kind  # fmt: skip
    with _Routing(f"make the interface {name}") as link:
        (code,) = link.order([(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body)])
        if code and code != errno.EEXIST:
            raise link._refused(code)


def remove_interface(name: str = INTERFACE) -> None:
    """Remove the interface, if it is there. Raises NetlinkError."""
    body = _LINK.pack(0, 0, 0, 0, 0, 0) + attribute(IFLA_IFNAME, name.encode() + b"\0")
    with _Routing(f"remove the interface {name}") as link:
        (code,) = link.order([(RTM_DELLINK, 0, body)])
        if code and code != errno.ENODEV:
            raise link._refused(code)


def change_addresses(family: Family, index: int, new: Iterable[str], gone: Iterable[str]) -> None:
    """Bind addresses to an interface and take others away. Raises NetlinkError."""
    width = 32 if family == 4 else 128

    def body(address: str) -> bytes:
        packed = _packed(address)
        head = _ADDRESS.pack(_AF[family], width, IFA_F_NODAD if family == 6 else 0, 0, index)
        return head + attribute(IFA_LOCAL, packed) + attribute(IFA_ADDRESS, packed)

    with _Routing(f"bind addresses to {INTERFACE}") as link:
        flags = NLM_F_CREATE | NLM_F_EXCL
        for code in link.order((RTM_NEWADDR, flags, body(address)) for address in new):
            if code and code != errno.EEXIST:
                raise link._refused(code)
        for code in link.order((RTM_DELADDR, 0, body(address)) for address in gone):
            if code and code not in (errno.EADDRNOTAVAIL, errno.ENODEV):
                raise link._refused(code)


def addresses_by_place(family: Family) -> tuple[set[str], set[str]]:
    """Return the addresses on kube-ipvs0, and those on other interfaces. Raises NetlinkError."""
    ours: set[str] = set()
    others: set[str] = set()
    for one in node_addresses(family):
        address = one.address
        if "." in address and family == 6:
            address = canonical(_packed(address))
        if one.interface != INTERFACE:
            others.add(address)
        # The interface has an address of its own, good on the link, as every one has.
        elif one.universal or not address.startswith("fe80:"):
            ours.add(address)
    return ours, others
