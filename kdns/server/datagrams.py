"""Many datagrams a system call: Linux's recvmmsg and sendmmsg, through ctypes.

Decides how room for datagrams is laid out in memory and nothing about what is in them. A slot
holds one datagram that came, whom it came from, and where the answer is that leaves to the same
peer (and, where a socket is bound to the wildcard address, from the address that was asked).
An answer is not copied: the kernel takes its ID from the query and the rest from the octets of
the answer where they are.

Why not the socket module: a call a datagram each way is a quarter of what an answer from memory
costs (bench/RESULTS.md, repeated questions).
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import ipaddress
import socket
import struct
import weakref
from collections.abc import Callable
from typing import Any, Final

SLOTS: Final = 64
# Octets of a slot. A query larger than this is no query (CoreDNS reads 512 octets).
QUERY_ROOM: Final = 2048
# Where in `queries` each slot's query begins.
QUERY_AT: Final = tuple(range(0, SLOTS * QUERY_ROOM, QUERY_ROOM))
# Where in `vectors` each slot has the address of its answer's rest, behind which is its size.
REST_AT: Final = tuple(range(2, SLOTS * 4, 4))
ID_SIZE: Final = 2
# linux/sockios.h: when the datagram came that was read last, as struct timespec.
SIOCGSTAMPNS: Final = 0x8907
_TIMESPEC: Final = struct.Struct("@ll")
# IP_PKTINFO, which the socket module names from Python 3.14 on.
IP_PKTINFO: Final = getattr(socket, "IP_PKTINFO", 8)

Ancillary = tuple[int, int, bytes]


class _Vector(ctypes.Structure):  # struct iovec
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


class _Header(ctypes.Structure):  # struct msghdr
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_size", ctypes.c_uint),
        ("vectors", ctypes.c_void_p),
        ("vector_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_size", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Message(ctypes.Structure):  # struct mmsghdr
    _fields_ = (("header", _Header), ("size", ctypes.c_uint))


# Not CDLL: neither call ever blocks, so giving up the interpreter's lock would be for nothing.
_libc = ctypes.PyDLL(None, use_errno=True)
# Without argtypes and given objects of C's types, a call takes half the time: nothing is converted.
_recvmmsg = _libc.recvmmsg
_sendmmsg = _libc.sendmmsg
_NUMBERS: Final = tuple(ctypes.c_uint(number) for number in range(SLOTS + 1))
_MOST: Final = _NUMBERS[SLOTS]
_NO_WAIT: Final = ctypes.c_int(socket.MSG_DONTWAIT)
_NO_FLAGS: Final = ctypes.c_int(0)
_NO_TIMEOUT: Final = ctypes.c_void_p(None)

_WORDS: Final = ctypes.sizeof(_Message) // 4
_SIZE_WORD: Final = _Message.size.offset // 4
# sockaddr_in and sockaddr_in6: family, port, address (behind the flow label), scope
_PEER4: Final = struct.Struct("=H2s4s")
_PEER6: Final = struct.Struct("=H2sI16sI")
_SOCKADDR: Final[dict[int, int]] = {socket.AF_INET: 16, socket.AF_INET6: 28}
# struct in_pktinfo: index, local address, address in the header; in6_pktinfo: address, index
_PKTINFO4: Final = struct.Struct("=I4s4s")
_PKTINFO6: Final = struct.Struct("=16sI")
_CMSG: Final = ctypes.sizeof(ctypes.c_size_t) + 8  # struct cmsghdr: size, level, kind
_CONTROL: Final[dict[int, int]] = {
    socket.AF_INET: socket.CMSG_SPACE(_PKTINFO4.size),
    socket.AF_INET6: socket.CMSG_SPACE(_PKTINFO6.size),
}


class _Rests(dict[int, Callable[[memoryview, int], tuple[bytes]]]):
    """Size of a query -> what reads all of it behind the ID, given `queries` and where it
    begins there."""

    def __missing__(self, size: int) -> Callable[[memoryview, int], tuple[bytes]]:
        made = self[size] = struct.Struct(f"{ID_SIZE}x{max(0, size - ID_SIZE)}s").unpack_from
        return made


REST_OF: Final = _Rests()


def _address_reader() -> Callable[[bytes], int]:
    """Return what says where in memory octets are. CPython keeps them in the object, behind a
    header of one size; where that is not so, it is asked for each time."""

    def ask(octets: bytes) -> int:
        return ctypes.cast(ctypes.c_char_p(octets), ctypes.c_void_p).value or 0

    samples = [bytes(range(size)) for size in (3, 40, 200)]
    headers = {ask(sample) - id(sample) for sample in samples}
    if len(headers) > 1:
        return ask
    (header,) = headers
    return lambda octets: id(octets) + header


address_of: Final = _address_reader()


class Datagrams:
    """Room for SLOTS datagrams and for where their answers are. Sockets of one family may share
    it, one at a time.

    queries -- octets that came: slot i from QUERY_AT[i] on
    vectors -- at REST_AT[i] address_of() an answer's octets behind the ID, which must not go
               away before they are sent, and behind it how many these are
    sourced -- answers leave from the address that was asked (want_source() on each socket)
    """

    def __init__(self, family: int, sourced: bool = False) -> None:
        self._family = family
        self._sourced = sourced
        self._name_room = _SOCKADDR[family]
        self._control_room = _CONTROL[family]
        self._names = bytearray(SLOTS * self._name_room)
        self._controls = bytearray(SLOTS * self._control_room)
        self._queries = bytearray(SLOTS * QUERY_ROOM)
        self.queries = memoryview(self._queries)
        self._into = (_Vector * SLOTS)()
        self._outof = (_Vector * (2 * SLOTS))()
        self._in = (_Message * SLOTS)()
        self._out = (_Message * SLOTS)()
        self._lay_out()
        self._in_at = ctypes.addressof(self._in)
        # Where each slot's header is that leaves.
        size, out = ctypes.sizeof(_Message), ctypes.addressof(self._out)
        self._leaves = [ctypes.c_void_p(out + slot * size) for slot in range(SLOTS)]
        self._comes = ctypes.c_void_p(self._in_at)
        self._came = memoryview(self._in).cast("B").cast("I")
        self.vectors = memoryview(self._outof).cast("B").cast("P")
        self._held: list[bytes] = []
        self._sources = memoryview(self._controls).cast("I")
        self._everywhere = memoryview(bytes(4 * SLOTS)).cast("I")
        # The kernel writes into a header what it got; this is what it must find again.
        self._fresh = bytes(memoryview(self._in).cast("B"))

    def _lay_out(self) -> None:
        names, controls = _address(self._names), _address(self._controls)
        queries = _address(self._queries)
        for i in range(SLOTS):
            self._into[i] = _Vector(queries + i * QUERY_ROOM, QUERY_ROOM)
            self._outof[2 * i] = _Vector(queries + i * QUERY_ROOM, ID_SIZE)
            ways = ((self._in, self._into[i], 1), (self._out, self._outof[2 * i], 2))
            for messages, vector, count in ways:
                header = messages[i].header
                header.name = names + i * self._name_room
                header.name_size = self._name_room
                header.vectors = ctypes.addressof(vector)
                header.vector_count = count
                if self._sourced:
                    header.control = controls + i * self._control_room
                    header.control_size = self._control_room

    def receive(self, fd: ctypes.c_int) -> int:
        """Take what has come; return how many datagrams it is, SLOTS at most."""
        if self._held:
            self._held.clear()
        if self._sourced:
            ctypes.memmove(self._in_at, self._fresh, len(self._fresh))
        count: int = _recvmmsg(fd, self._comes, _MOST, _NO_WAIT, _NO_TIMEOUT)
        if count <= 0:
            return 0
        if self._sourced:
            self._turn_round(count)
        return count

    def sizes(self, count: int) -> list[int]:
        """Return how many octets each of the first `count` slots' datagrams has."""
        return self._came[_SIZE_WORD : _WORDS * count : _WORDS].tolist()

    def first(self) -> bytes:
        """Return the first slot's datagram behind the ID."""
        return REST_OF[self._came[_SIZE_WORD]](self.queries, 0)[0]

    def _turn_round(self, count: int) -> None:
        """Make of where datagrams came to where their answers leave from."""
        controls, room = self._controls, self._control_room
        if self._family == socket.AF_INET:
            # ipi_spec_dst is the address to send from already; the interface is left to routing.
            interfaces = slice(_CMSG // 4, count * room // 4, room // 4)
            self._sources[interfaces] = self._everywhere[:count]
            return
        for at in range(_CMSG, count * room, room):
            # Only a link-local address needs its interface.
            if controls[at] != 0xFE or controls[at + 1] & 0xC0 != 0x80:
                controls[at + 16 : at + 20] = b"\0\0\0\0"

    def put(self, slot: int, wire: bytes) -> None:
        """Have a slot answered; wire -- all of the answer, with the query's ID"""
        at = REST_AT[slot]
        self.vectors[at] = address_of(wire) + ID_SIZE
        self.vectors[at + 1] = len(wire) - ID_SIZE
        self._held.append(wire)

    def peer(self, slot: int) -> Any:
        """Return whom a slot's datagram came from, as the socket module writes it."""
        at = slot * self._name_room
        if self._family == socket.AF_INET:
            _, port, address = _PEER4.unpack_from(self._names, at)
            return socket.inet_ntoa(address), int.from_bytes(port, "big")
        _, port, flow, address, scope = _PEER6.unpack_from(self._names, at)
        text = socket.inet_ntop(socket.AF_INET6, address)
        if scope and ipaddress.IPv6Address(address).is_link_local:
            text = f"{text}%{_interface(scope)}"
        return text, int.from_bytes(port, "big"), socket.ntohl(flow), scope

    def source(self, slot: int) -> Ancillary | None:
        """Return what makes sendmsg() send from the address that was asked."""
        if not self._sourced:
            return None
        at = slot * self._control_room + _CMSG
        if self._family == socket.AF_INET:
            return socket.IPPROTO_IP, IP_PKTINFO, bytes(self._controls[at : at + _PKTINFO4.size])
        data = bytes(self._controls[at : at + _PKTINFO6.size])
        return socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, data

    def send(self, fd: ctypes.c_int, first: int, end: int) -> None:
        """Send the answers of slots `first` to `end`, which is not one of them. What cannot be
        sent is as lost on the way: the client asks again."""
        while first < end:
            sent = _sendmmsg(fd, self._leaves[first], _NUMBERS[end - first], _NO_FLAGS)
            if sent > 0:
                first += sent
            elif ctypes.get_errno() != errno.EINTR:
                first += 1  # this one is refused; the next may not be


def want_source(sock: socket.socket) -> None:
    """Have the kernel tell which address each datagram was sent to."""
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)


def want_arrivals(sock: socket.socket) -> None:
    """Have the kernel note from now on when datagrams come."""
    came_at(sock)


def came_at(sock: socket.socket) -> float | None:
    """Return when the datagram came that was read last, in Unix seconds; None: not known."""
    try:
        seconds, more = _TIMESPEC.unpack(fcntl.ioctl(sock, SIOCGSTAMPNS, bytes(_TIMESPEC.size)))
    except OSError:  # none was read since the kernel was asked to
        return None
    return float(seconds + more / 1e9)


_Rooms = dict[tuple[int, bool], Datagrams]
_shared: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Rooms] = weakref.WeakKeyDictionary()


def room_for(loop: asyncio.AbstractEventLoop, sock: socket.socket, sourced: bool) -> Datagrams:
    """Return the room that the sockets of a family share in one event loop: they are read one
    after the other, and nothing stays in it in between."""
    rooms = _shared.setdefault(loop, {})
    key = (sock.family, sourced)
    found = rooms.get(key)
    if found is None:
        found = rooms[key] = Datagrams(*key)
    return found


def _address(buffer: bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _interface(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:
        return str(index)
