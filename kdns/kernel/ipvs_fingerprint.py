"""What the kernel holds of mode ipvs, in a few octets: equal ones mean that nothing has changed.

So what was compared once, thing by thing, need not be compared again while they stay. Nothing is
understood here but where counters are; what is compared is ipvs.py's. The iptables rules have a
number of their own (generation.py). Acts in the network namespace of the thread that calls.
"""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Iterator
from hashlib import blake2b

from kdns.errors import ApplyError
from kdns.kernel import ipvs_netlink
from kdns.kernel.netlink import (
    IFA_ADDRESS,
    IFA_LOCAL,
    NETLINK_ROUTE,
    NLMSG_DONE,
    RTM_GETADDR,
    RTM_NEWADDR,
    Message,
    Netfilter,
    attribute,
    attributes,
    messages,
)
from kdns.proxy.ipvs import SETS, set_name
from kdns.proxy.options import Family

# linux/netfilter/ipset/ip_set.h
SUBSYSTEM, LIST = 6, 7
PROTOCOL, SET_NAME = 1, 2
VERSION = 6

_FAMILY = struct.Struct("=BBH")  # nfgenmsg
_ADDRESS = struct.Struct("=BBBBI")  # ifaddrmsg: family, prefix length, flags, scope, interface
# A real server's line in /proc/net/ip_vs, up to its connections.
_COUNTED = re.compile(rb"^(  -> \S+ +\S+ +\d+) .*$", re.MULTILINE)


def fingerprint(family: Family) -> bytes | None:
    """Return that of virtual servers, addresses and sets; None where some cannot be read."""
    digest = blake2b(digest_size=32)
    try:
        digest.update(without_counters(ipvs_netlink.read_table()))
        for part in (*_addresses(family), *_sets(family)):
            digest.update(part)
    except ApplyError:
        return None
    return digest.digest()


def without_counters(table: bytes) -> bytes:
    """Return /proc/net/ip_vs without the numbers of connections."""
    return _COUNTED.sub(rb"\1", table)


class _Routing(Netfilter):
    """A socket to the kernel's addresses."""

    protocol = NETLINK_ROUTE


def _addresses(family: Family) -> Iterator[bytes]:
    """Yield what is on kube-ipvs0 in the kernel's words, and the addresses of other interfaces.

    Those may have been given for so many seconds, which go by: of these no more than the address
    counts.
    """
    ours = ipvs_netlink.find_interface()
    others: list[bytes] = []
    number = socket.AF_INET if family == 4 else socket.AF_INET6
    question = _ADDRESS.pack(number, 0, 0, 0, 0)
    with _Routing("list the node's addresses") as link:
        for datagram, one in _told(link, RTM_GETADDR, question):
            if one.kind != RTM_NEWADDR:
                continue
            *_, index = _ADDRESS.unpack_from(datagram, one.start)
            if index == ours:
                yield datagram[one.start : one.end]
                continue
            values = attributes(datagram, one.start + _ADDRESS.size, one.end)
            start, end = values.get(IFA_LOCAL) or values.get(IFA_ADDRESS) or (0, 0)
            others.append(datagram[start:end])
    yield from sorted(others)


def _sets(family: Family) -> Iterator[bytes]:
    """Yield our sets in the kernel's words. Raises NetlinkError where one is missing."""
    with Netfilter("list the ipsets") as link:
        for name in SETS:
            named = attribute(SET_NAME, set_name(name, family).encode() + b"\0")
            question = _FAMILY.pack(socket.AF_UNSPEC, 0, 0) + attribute(PROTOCOL, bytes([VERSION]))
            for datagram, one in _told(link, SUBSYSTEM << 8 | LIST, question + named):
                yield datagram[one.start : one.end]


def _told(link: Netfilter, kind: int, question: bytes) -> Iterator[tuple[bytes, Message]]:
    """Yield the messages of a dump, each with its datagram."""
    for datagram in link.dump(kind, question):
        for one in messages(datagram):
            if one.kind == NLMSG_DONE:
                return
            yield datagram, one
