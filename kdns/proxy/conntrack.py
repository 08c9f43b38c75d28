"""Forwarding tables -> stale flows: which connections the kernel should forget.

The kernel translates a flow as its first packet was: a UDP client that never rests goes on
to a Pod that is gone. Decides, for flows handed to it, which ones are led elsewhere than the
table says (reference 1.11). Only UDP: a TCP connection learns of its end by itself, and
upstream refused to cut those, and SCTP, too. Reading and deleting flows is
kernel/conntrack.py's.

Traffic policies, topology and source ranges are not looked at, on purpose: a flow may finish
at any endpoint that serves, so that a Pod that is shutting down drains.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import NamedTuple, TypeAlias

from kdns.proxy.options import Options, Protocol
from kdns.proxy.table import Forwarding, ForwardingTable
from kdns.registry.objects import Key

# Where a packet goes, as tables spell it, and as packets do. Address "" is any that is local.
Destination: TypeAlias = tuple[str, int]
Packed: TypeAlias = tuple[bytes, int]


class Flow(NamedTuple):
    """One connection the kernel tracks. Addresses are packed: 4 or 16 bytes.

    source, destination -- of the first packet, as its sender wrote it
    reply_source, reply_port -- who answers: an endpoint after DNAT, else the destination
    handle -- names the flow to whoever deletes it; means nothing here
    """

    protocol: Protocol
    source: bytes
    source_port: int
    destination: bytes
    destination_port: int
    reply_source: bytes
    reply_port: int
    handle: bytes = b""

    def __str__(self) -> str:
        return (
            f"{self.protocol} {_spell(self.source, self.source_port)}"
            f" -> {_spell(self.destination, self.destination_port)}"
            f" answered by {_spell(self.reply_source, self.reply_port)}"
        )


class AddressSet:
    """Addresses and networks ("10.0.0.1", "127.0.0.0/8"), asked for packed addresses."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._single: set[bytes] = set()
        # (octets of an address, bits after the prefix, the prefix)
        self._networks: set[tuple[int, int, int]] = set()
        for text in texts:
            network = ip_network(text, strict=False)
            rest = network.max_prefixlen - network.prefixlen
            if rest:
                octets = network.max_prefixlen // 8
                self._networks.add((octets, rest, int(network.network_address) >> rest))
            else:
                self._single.add(network.network_address.packed)

    def __contains__(self, packed: object) -> bool:
        if not isinstance(packed, bytes):
            return False
        if packed in self._single:
            return True
        number = int.from_bytes(packed, "big")
        return any(
            octets == len(packed) and number >> rest == prefix
            for octets, rest, prefix in self._networks
        )


@dataclass(frozen=True, slots=True)
class StaleCheck:
    """Tells the stale flows among those to some frontends; all others are nobody's business.

    frontends  -- (address, port) -> the endpoints that may answer; None where nothing is
                  forwarded any more, so that only the address itself may
    node_ports -- the same for a port of any address of the node
    """

    frontends: Mapping[Packed, frozenset[Packed] | None]
    node_ports: Mapping[int, frozenset[Packed] | None]

    @property
    def ports(self) -> frozenset[int]:
        """The destination ports of the flows worth looking at."""
        return frozenset(port for _, port in self.frontends) | frozenset(self.node_ports)

    def stale(self, flows: Iterable[Flow], node: Collection[str]) -> Iterator[Flow]:
        """Yield the flows that are led elsewhere than they should be.

        node -- addresses and networks that node ports answer on: node_port_networks()
        """
        here = AddressSet(node)
        known: dict[bytes, bool] = {}  # few destinations, many flows
        for flow in flows:
            if flow.protocol != "udp":
                continue
            destination = (flow.destination, flow.destination_port)
            answers = (flow.reply_source, flow.reply_port)
            # A VIP's rule comes before the node ports' (reference 1.4).
            if destination in self.frontends:
                serving = self.frontends[destination]
            elif flow.destination_port in self.node_ports:
                if flow.destination not in known:
                    known[flow.destination] = flow.destination in here
                if not known[flow.destination]:
                    continue
                serving = self.node_ports[flow.destination_port]
            else:
                continue
            if answers not in serving if serving is not None else answers != destination:
                yield flow


def misled_frontends(
    before: ForwardingTable, after: ForwardingTable, changed: Collection[Key] | None
) -> frozenset[Destination]:
    """Return the frontends whose flows may have become stale from `before` to `after`.

    changed -- Services whose forwarding may differ, others are not compared; None: return all
               frontends of both, for when nobody knows what the kernel did meanwhile
    """
    found: set[Destination] = set()
    for key in {*before.services, *after.services} if changed is None else changed:
        old = _udp_frontends(before.services.get(key, ()))
        new = _udp_frontends(after.services.get(key, ()))
        if changed is None or _misleads(old, new):
            found.update(old, new)
    return frozenset(found)


def compile_check(misled: Collection[Destination], table: ForwardingTable) -> StaleCheck:
    """Return how to tell the flows to the frontends `misled` that `table` leads elsewhere."""
    judged: dict[Destination, set[str] | None] = dict.fromkeys(misled)
    _add_answers(judged, table)
    frontends: dict[Packed, frozenset[Packed] | None] = {}
    node_ports: dict[int, frozenset[Packed] | None] = {}
    for (address, port), serving in judged.items():
        packed = None if serving is None else frozenset(map(_pack_endpoint, serving))
        if address:
            frontends[ip_address(address).packed, port] = packed
        else:
            node_ports[port] = packed
    return StaleCheck(frontends, node_ports)


def node_port_networks(options: Options, local: Collection[str]) -> tuple[str, ...]:
    """Return the addresses and networks that node ports answer on (reference 1.4).

    local -- all that the node has; only those chosen by the operator count, if he chose, and
             loopback only for IPv4 and where that is on
    """
    loopback = options.family == 4 and options.localhost_node_ports
    chosen = local if options.node_port_addresses is None else options.node_port_addresses
    return tuple(
        text for text in chosen if loopback or not ip_network(text, strict=False).is_loopback
    )


def _misleads(
    old: Mapping[Destination, frozenset[str]], new: Mapping[Destination, frozenset[str]]
) -> bool:
    """True if a flow made under `old` may be wrong under `new`.

    Wrong are flows to an endpoint or a frontend that is gone, and flows that nobody led
    anywhere: those from before there was a frontend, or an endpoint. More endpoints beside
    others mislead nobody.
    """
    return old.keys() != new.keys() or any(
        serving - new[frontend] or (new[frontend] and not serving)
        for frontend, serving in old.items()
    )


def _add_answers(judged: dict[Destination, set[str] | None], table: ForwardingTable) -> None:
    """Add who may answer at each frontend, whichever Services it now belongs to.

    Two Services may claim one external IP, and a VIP may be given from one to the next: what
    is gone for the one is served by the other. A VIP with the number of a judged node port
    may be an address of the node, and has its own endpoints.
    """
    node_ports = {port for address, port in judged if not address}
    for forwardings in table.services.values():
        for forwarding in forwardings:
            if forwarding.protocol != "udp":
                continue
            for frontend in _destinations(forwarding):
                if frontend in judged or frontend[1] in node_ports:
                    judged[frontend] = (judged.get(frontend) or set()) | _serving(forwarding)


def _udp_frontends(forwardings: Iterable[Forwarding]) -> dict[Destination, frozenset[str]]:
    """Return the UDP frontends of one Service, each with the endpoints that serve it."""
    found: dict[Destination, frozenset[str]] = {}
    for forwarding in forwardings:
        if forwarding.protocol == "udp":
            serving = _serving(forwarding)
            for frontend in _destinations(forwarding):
                found[frontend] = found.get(frontend, frozenset()) | serving
    return found


def _destinations(forwarding: Forwarding) -> Iterator[Destination]:
    for address in (
        forwarding.cluster_ip,
        *forwarding.external_ips,
        *forwarding.load_balancer_ips,
    ):
        yield address, forwarding.port
    if forwarding.node_port:
        yield "", forwarding.node_port


def _serving(forwarding: Forwarding) -> frozenset[str]:
    """Return "ip:port" of the endpoints a flow may stay at, whatever new flows are given."""
    return frozenset(map(str, forwarding.serving))


def _pack_endpoint(text: str) -> Packed:
    ip, _, port = text.rpartition(":")
    return ip_address(ip.strip("[]")).packed, int(port)


def _spell(packed: bytes, port: int) -> str:
    ip = ip_address(packed)
    return f"[{ip}]:{port}" if ip.version == 6 else f"{ip}:{port}"
