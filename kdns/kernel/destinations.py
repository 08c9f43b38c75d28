"""Which destinations the kernel's connections have: what decides that rules are still needed.

Reads the connection table whole, of every protocol, and keeps nothing of it but that. What is
asked for, and what becomes of it, is proxy/drain.py's. Blocks: for a thread.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Collection, Iterable
from typing import Final

from kdns.kernel.conntrack import (
    ADDRESS_FAMILY,
    CT_GET,
    CTA_IP_DST,
    CTA_PROTO_DST_PORT,
    CTA_PROTO_NUM,
    CTA_TUPLE_IP,
    CTA_TUPLE_ORIG,
    CTA_TUPLE_PROTO,
)
from kdns.kernel.netlink import NLMSG_DONE, Netfilter, attributes, messages
from kdns.proxy.drain import Place
from kdns.proxy.options import Family, Protocol

PROTOCOLS: Final[dict[int, Protocol]] = {6: "tcp", 17: "udp", 132: "sctp"}
_NFGEN: Final = struct.Struct("=BBH")  # struct nfgenmsg: family, version, resource
_ADDRESSES: Final = (CTA_IP_DST[4], CTA_IP_DST[16])


def used_places(family: Family, places: Collection[Place]) -> frozenset[Place]:
    """Return those of `places` that a connection was made to. Raises NetlinkError."""
    with Netfilter("list connections") as link:
        return find_used(link.dump(CT_GET, _NFGEN.pack(ADDRESS_FAMILY[family], 0, 0)), places)


def find_used(datagrams: Iterable[bytes], places: Collection[Place]) -> frozenset[Place]:
    """Return those of `places` that are an original destination in a dump."""
    wanted = {
        (ipaddress.ip_address(address).packed if address else b"", port, protocol): place
        for place in places
        for address, port, protocol in (place,)
    }
    found: set[Place] = set()
    for datagram in datagrams:
        for one in messages(datagram):
            if one.kind == NLMSG_DONE:
                return frozenset(found)
            there = _destination(datagram, one.start + _NFGEN.size, one.end)
            if there is not None:
                address, port, protocol = there
                # A NodePort is asked for at any address.
                for packed in (address, b""):
                    place = wanted.get((packed, port, protocol))
                    if place is not None:
                        found.add(place)
    return frozenset(found)


def _destination(octets: bytes, start: int, end: int) -> tuple[bytes, int, Protocol] | None:
    """Return address, port and protocol that a connection was made to; None: it has no ports."""
    found = attributes(octets, start, end)
    if CTA_TUPLE_ORIG not in found:
        return None
    parts = attributes(octets, *found[CTA_TUPLE_ORIG])
    if CTA_TUPLE_IP not in parts or CTA_TUPLE_PROTO not in parts:
        return None
    ips = attributes(octets, *parts[CTA_TUPLE_IP])
    proto = {
        number: int.from_bytes(octets[a:b], "big")
        for number, (a, b) in attributes(octets, *parts[CTA_TUPLE_PROTO]).items()
    }
    protocol = PROTOCOLS.get(proto.get(CTA_PROTO_NUM, 0))
    port = proto.get(CTA_PROTO_DST_PORT)
    place = next((ips[number] for number in _ADDRESSES if number in ips), None)
    if protocol is None or port is None or place is None:
        return None
    return octets[place[0] : place[1]], port, protocol
