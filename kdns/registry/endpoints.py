"""Which endpoints count, for DNS and for forwarding alike: decided here and nowhere else.

The three conditions of an endpoint (ready, serving, terminating) stay three; what a reader
wants is asked for by its own word: `published` is what DNS shows, `usable` what may be
forwarded to. Which traffic goes to which of those is proxy/table.py's.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from socket import AF_INET, inet_pton
from typing import Final, Literal, TypeAlias

from kdns.registry.objects import (
    HEADLESS_LABEL,
    PROXY_NAME_LABEL,
    EndpointSlice,
    Hint,
    Service,
    SliceEndpoint,
    SlicePort,
)

MAX_PORT: Final = 65535
# An address that tables are kept by. IPv4: the text, which objects hold already and which is
# written in one way only (decode.py sees to that); IPv6: its octets.
Address: TypeAlias = str | bytes
# addressType of the slices that are read for a family; FQDN slices are nobody's.
_ADDRESS_TYPES: Final = {4: "IPv4", 6: "IPv6"}
# Addresses whose canonical form is remembered: the largest Services change often, and each
# change reads all of their endpoints anew. About 250 bytes each.
_ADDRESSES_KNOWN: Final = 16384
# Characters; what is longer is no address, and not remembered. An address takes 45 at most, but
# for zeros before its numbers.
_LONGEST: Final = 64
_IPV4: Final = re.compile(r"\.".join(["(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"] * 4))
_ZEROS: Final = re.compile(r"\.".join(["0*([0-9]{1,3})"] * 4))


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One address and port that a Service port may be forwarded to.

    ip    -- in its canonical form
    local -- on this node
    ready, serving, terminating -- as KEP-752 reads them where nothing is said: true, true,
             false
    for_nodes, for_zones -- hints; empty: none
    """

    ip: str
    port: int
    local: bool = False
    ready: bool = True
    serving: bool = True
    terminating: bool = False
    for_nodes: tuple[str, ...] = ()
    for_zones: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"[{self.ip}]:{self.port}" if ":" in self.ip else f"{self.ip}:{self.port}"


@dataclass(frozen=True, slots=True)
class Usable:
    """The endpoints of one Service port, sorted by the traffic they are for.

    cluster, local, has_endpoints -- as in proxy.table.Forwarding
    """

    cluster: tuple[Endpoint, ...] = ()
    local: tuple[Endpoint, ...] = ()
    has_endpoints: bool = False


# --- DNS ------------------------------------------------------------------------------------


def is_published(endpoint: SliceEndpoint) -> bool:
    """True if DNS shows the endpoint: ready, or nothing said of it (KEP-752: nil is true).

    serving and terminating do not matter to DNS; publishNotReadyAddresses works because the
    EndpointSlice controller writes ready=true for such a Service (reference 1.4).
    """
    return endpoint.conditions.ready is not False


def published(
    slices: Iterable[EndpointSlice],
) -> Iterator[tuple[SliceEndpoint, str, bytes, tuple[SlicePort, ...]]]:
    """Yield (endpoint, address, packed address, ports of its slice) for all that DNS shows.

    An address of another family than its slice says, or none at all, is passed over.
    """
    for one in slices:
        if one.address_type == "FQDN":
            continue
        ports = tuple(one.ports or ())
        for endpoint in one.endpoints or ():
            if not is_published(endpoint):
                continue
            for address in endpoint.addresses:
                packed = pack_address(address)
                if packed is not None:
                    yield endpoint, address, packed, ports


def published_addresses(one: EndpointSlice) -> list[Address]:
    """Return the addresses of published((one,)), as often as they stand there."""
    if one.address_type == "FQDN":
        return []
    return [
        address if ":" not in address else pack_address(address) or address
        for endpoint in one.endpoints or ()
        if endpoint.conditions.ready is not False
        for address in endpoint.addresses
    ]


def address_key(packed: bytes) -> Address:
    """Return an address as published_addresses() has it."""
    return ".".join(map(str, packed)) if len(packed) == 4 else packed


def pack_address(text: str) -> bytes | None:
    """Return an address's octets; None if it is none."""
    try:  # most are IPv4's, and ipaddress takes nearly twenty times as long
        return inet_pton(AF_INET, text)
    except (OSError, ValueError):
        pass
    try:
        return ipaddress.ip_address(text).packed
    except ValueError:
        return None


# --- forwarding -----------------------------------------------------------------------------


def forwarded_address(service: Service, family: Literal[4, 6]) -> str:
    """Return the ClusterIP of the family; "" if the Service is not to be forwarded (reference
    1.1): it is another proxy's, an ExternalName, or has none.

    A headless Service has "None" there, which is no address.
    """
    spec = service.spec
    if spec.type == "ExternalName" or PROXY_NAME_LABEL in (service.metadata.labels or ()):
        return ""
    for text in spec.cluster_ips or (spec.cluster_ip,):
        found = canonical_address(text)
        if found is not None and found[0] == family:
            return found[1]
    return ""


def is_usable(endpoint: Endpoint) -> bool:
    """True if packets may be sent to the endpoint where there is none better.

    Serving and terminating: it still answers and is about to go (KEP-1669).
    """
    return endpoint.ready or (endpoint.serving and endpoint.terminating)


def endpoints_of_port(
    slices: Iterable[EndpointSlice], name: str, protocol: str, family: Literal[4, 6], node: str
) -> tuple[Endpoint, ...]:
    """Return all endpoints of a Service port, in order of their "ip:port" text, each once.

    slices   -- of the Service; those of another family, of headless Services and of other
                proxies are passed over (reference 1.1)
    protocol -- in upper case, as objects have it
    node     -- the name of this node
    """
    found: dict[str, Endpoint] = {}
    for one in slices:
        if one.address_type != _ADDRESS_TYPES[family] or _is_for_others(one):
            continue
        numbers = _numbers(one.ports, name, protocol)
        if not numbers:
            continue
        for entry in one.endpoints or ():
            # Only the first address counts (reference 1.1).
            address = canonical_address(entry.addresses[0]) if entry.addresses else None
            if address is None or address[0] != family:
                continue
            for number in numbers:
                endpoint = _endpoint(entry, address[1], number, node)
                text = str(endpoint)
                twin = found.get(text)
                if twin is None or _rank(endpoint) > _rank(twin):
                    found[text] = endpoint
    return tuple([found[text] for text in sorted(found)])


def sort_usable(
    endpoints: tuple[Endpoint, ...], *, cluster: bool, local: bool, node: str, topology_zone: str
) -> Usable:
    """Return which of a Service port's endpoints are for which traffic (reference 1.6).

    cluster, local -- traffic of that policy can occur; a set nobody asks for stays empty
    node, topology_zone -- this node's name and zone; zone "": it has none
    """
    for_cluster: tuple[Endpoint, ...] = ()
    if cluster:
        ready = tuple([e for e in endpoints if e.ready])
        for_cluster = _near(ready, node, topology_zone) or _draining(endpoints)
    for_local: tuple[Endpoint, ...] = ()
    if local:
        # Hints never apply to these: the node was already chosen, by whoever sent here.
        here = tuple([e for e in endpoints if e.local])
        for_local = tuple([e for e in here if e.ready]) or _draining(here)
    # Where for_cluster was asked for and is empty, nothing is usable, here or elsewhere; where
    # it was not, every endpoint on any node tells.
    has_endpoints = bool(for_cluster) if cluster else any(map(is_usable, endpoints))
    return Usable(for_cluster, for_local, has_endpoints)


def _draining(endpoints: tuple[Endpoint, ...]) -> tuple[Endpoint, ...]:
    """Return what is left to send to once nothing is ready (KEP-1669)."""
    return tuple([e for e in endpoints if e.serving and e.terminating])


def _near(ready: tuple[Endpoint, ...], node: str, topology_zone: str) -> tuple[Endpoint, ...]:
    """Return those of the ready endpoints whose hints name this node, else its zone, else all.

    Hints count only where all endpoints have them: one without is a sign that they are being
    written or taken away (KEP-2433, KEP-3015).
    """
    if not ready or not (ready[0].for_nodes or ready[0].for_zones):
        return ready  # the usual case, told by one look
    if all(e.for_nodes for e in ready):
        chosen = tuple([e for e in ready if node in e.for_nodes])
        if chosen:
            return chosen
    if topology_zone and all(e.for_zones for e in ready):
        chosen = tuple([e for e in ready if topology_zone in e.for_zones])
        if chosen:
            return chosen
    return ready


def _is_for_others(one: EndpointSlice) -> bool:
    labels = one.metadata.labels or {}
    return HEADLESS_LABEL in labels or PROXY_NAME_LABEL in labels


def _numbers(ports: Iterable[SlicePort] | None, name: str, protocol: str) -> list[int]:
    """Return the numbers a slice has for the port of that name and protocol.

    No name at all (nil) is not the empty name; no number means "all ports", which a proxy
    cannot forward to; no protocol is TCP (reference 1.1).
    """
    return [
        port.port
        for port in ports or ()
        if port.name == name
        and port.port is not None
        and 0 < port.port <= MAX_PORT
        and (port.protocol or "TCP") == protocol
    ]


def _endpoint(entry: SliceEndpoint, ip: str, port: int, node: str) -> Endpoint:
    conditions, hints = entry.conditions, entry.hints
    return Endpoint(
        ip,
        port,
        entry.node_name == node,
        conditions.ready is not False,
        conditions.serving is not False,
        conditions.terminating is True,
        _names(hints.for_nodes) if hints else (),
        _names(hints.for_zones) if hints else (),
    )


def _names(hints: Iterable[Hint] | None) -> tuple[str, ...]:
    return tuple(sorted({hint.name for hint in hints or ()}))


def _rank(e: Endpoint) -> tuple[object, ...]:
    """Return what decides between two entries of one ip:port: the one not terminating, as in
    kube-proxy; where that is no difference, always the same, in whichever slice it stands."""
    return not e.terminating, e.ready, e.serving, e.local, e.for_nodes, e.for_zones


def canonical_address(text: str) -> tuple[int, str] | None:
    """Return (4 or 6, the address as it is always written); None if it is not an address.

    As kube-proxy reads them: leading zeros of IPv4 do not make a number octal, an IPv6
    address that stands for an IPv4 one is that, and one with a scope ("%eth0") is none.
    """
    if _IPV4.fullmatch(text):  # most are: this is as fast as remembering them, and needs less
        return 4, text
    return _canonical(text) if len(text) <= _LONGEST else None


@lru_cache(maxsize=_ADDRESSES_KNOWN)
def _canonical(text: str) -> tuple[int, str] | None:
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError:
        return _canonical_with_zeros(text)
    if address.scope_id is not None:
        return None
    mapped = address.ipv4_mapped
    return (4, str(mapped)) if mapped is not None else (6, str(address))


def _canonical_with_zeros(text: str) -> tuple[int, str] | None:
    """Read an IPv4 address with leading zeros: 010.096.0.1 is 10.96.0.1."""
    match = _ZEROS.fullmatch(text)
    numbers = [int(part) for part in match.groups()] if match else []
    return (4, ".".join(map(str, numbers))) if match and max(numbers) <= 255 else None
