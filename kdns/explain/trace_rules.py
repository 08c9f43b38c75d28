"""What a node does with the first packet of a connection: computed, or as its kernel holds it.

Decides which node's rules a client meets, and where it comes from in that node's eyes. What
becomes of packets is proxy/table.py's (decide) for every mode; for rules that can be walked,
the walk through them is what is told, and the two are held against each other.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, Literal, TypeAlias

from kdns import agent
from kdns.errors import ConfigError
from kdns.explain.evidence import Evidence
from kdns.proxy.conntrack import Flow
from kdns.proxy.options import Family, Options, Protocol
from kdns.proxy.packet import Host, Outcome, Packet, parse_rules, render_walk, walk
from kdns.proxy.packet_nftables import parse_nftables, walk_nftables
from kdns.proxy.table import Decision, Forwarding, ForwardingTable, Frontend, Origin, decide
from kdns.proxy.way import render_share
from kdns.registry.endpoints import Endpoint, canonical_address

ClientKind: TypeAlias = Literal["pod", "node", "outside"]
# Of a bridge or of veths: any name will do where no rule asks for one.
POD_INTERFACE: Final = "cni0"
OUTSIDE_INTERFACE: Final = "eth0"
# Modes whose rules can be walked; of the others it is told what the table decides.
WALKED: Final = ("iptables", "nftables")
MOST_FLOWS_TOLD: Final = 10


@dataclass(frozen=True, slots=True)
class Client:
    """Who asks.

    name    -- "namespace/name" of a Pod, a Node's name, or ""
    addresses -- of either family; assumed: made up, for an example must do
    node    -- that it runs on; "": not known
    """

    kind: ClientKind
    name: str
    namespace: str
    addresses: tuple[str, ...]
    node: str = ""
    assumed: bool = False

    def address(self, family: Family) -> str:
        """Return its address of a family; "" if it has none."""
        return next((a for a in self.addresses if (":" in a) == (family == 6)), "")


@dataclass(frozen=True, slots=True)
class Node:
    """One node's forwarding, of one family."""

    name: str
    table: ForwardingTable
    options: Options
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Way:
    """One way a packet may go. verdict -- as decide() has it; "local": to a program of the node
    itself, which has the address; "no rule": it goes on to the address it was sent to, which
    nobody has."""

    verdict: Literal["forward", "reject", "drop", "local", "no rule"]
    endpoint: str = ""
    chance: Fraction = Fraction(1)
    masquerade: bool = False
    by: str = ""


@dataclass(frozen=True, slots=True)
class Met:
    """The rules a packet meets.

    source -- "computed" or "kernel"; walked: rule by rule, else as the table decides
    chains -- those passed on the likeliest way, in short
    lines  -- every rule met on that way, or those of the Service
    ways   -- where it may end
    """

    source: Literal["computed", "kernel"]
    mode: str
    node: str
    walked: bool
    chains: tuple[str, ...]
    lines: tuple[str, ...]
    ways: tuple[Way, ...]

    @property
    def endpoints(self) -> dict[str, Fraction]:
        """Return endpoint -> chance."""
        found: dict[str, Fraction] = {}
        for way in self.ways:
            if way.verdict == "forward":
                found[way.endpoint] = found.get(way.endpoint, Fraction(0)) + way.chance
        return found

    @property
    def masquerade(self) -> bool:
        return any(way.masquerade for way in self.ways)


def node_for(evidence: Evidence, name: str, family: Family) -> Node:
    """Return a node's forwarding as the registry makes it."""
    kernel = evidence.kernel
    here = kernel.host.addresses if kernel is not None and name == evidence.node else ()
    mine = [one for one in here if (":" in one) == (family == 6)]
    table, options = agent.table_for(evidence.snapshot, evidence.config, family, name, mine)
    return Node(name, table, options, node_addresses(evidence, name))


def node_addresses(evidence: Evidence, name: str) -> tuple[str, ...]:
    """Return the addresses of a Node, or of the node whose kernel was read."""
    node = evidence.snapshot.nodes.get(name)
    found = [
        address[1]
        for one in (node.status.addresses if node is not None else None) or ()
        if one.type in ("InternalIP", "ExternalIP")
        and (address := canonical_address(one.address)) is not None
    ]
    if evidence.kernel is not None and name == evidence.node:
        found += [a for a in evidence.kernel.host.addresses if a not in found]
    return tuple(found)


def origin_of(client: Client, node: Node) -> Origin:
    """Return where a client comes from in a node's eyes."""
    if client.kind == "node" and client.node == node.name:
        return "node"
    detector = node.options.detector
    address = client.address(node.options.family)
    if detector is None or not address:
        return "outside"
    if detector.kind == "cidr":
        inside = ipaddress.ip_address(address) in ipaddress.ip_network(detector.value)
        return "pod" if inside else "outside"
    return "pod" if client.kind == "pod" and client.node in ("", node.name) else "outside"


def frontends_at(
    node: Node, address: str, port: int, protocol: Protocol
) -> list[tuple[Forwarding, Frontend]]:
    """Return the Service ports that claim a destination, the one that gets it first."""
    found = [
        (one, frontend)
        for one in node.table
        if one.protocol == protocol
        for frontend in one.frontends
        if frontend.port == port
        and (frontend.address == address or (not frontend.address and _answers(node, address)))
    ]
    return sorted(found, key=lambda pair: not pair[0].has_endpoints)


def _answers(node: Node, address: str) -> bool:
    """True if NodePorts of a node answer on an address."""
    chosen = node.options.node_port_addresses
    if chosen is not None:
        return address in chosen
    return address in node.addresses


def decided(node: Node, forwarding: Forwarding, frontend: Frontend, client: Client) -> Decision:
    """Return what the table decides, source ranges included."""
    address = client.address(node.options.family)
    origin = origin_of(client, node)
    found = decide(
        forwarding,
        frontend.kind,
        origin,
        masquerade_all=node.options.masquerade_all,
        detects=node.options.detector is not None,
    )
    outside = frontend.kind == "loadbalancer IP" and not in_ranges(address, forwarding)
    return Decision("drop") if outside and found.verdict == "forward" else found


def in_ranges(address: str, forwarding: Forwarding) -> bool:
    """True if loadBalancerSourceRanges let an address in."""
    if not forwarding.source_ranges or not address:
        return True
    ip = ipaddress.ip_address(address)
    return any(ip in ipaddress.ip_network(cidr) for cidr in forwarding.source_ranges)


# --- the rules ---------------------------------------------------------------------------------


def meet(
    evidence: Evidence,
    node: Node,
    client: Client,
    address: str,
    port: int,
    protocol: Protocol,
    claims: Sequence[tuple[Forwarding, Frontend]],
) -> tuple[Met, Met | None]:
    """Return (what the computed rules do, what the kernel's do or None if they are not known)."""
    packet = _packet(client, node, address, port, protocol)
    computed = _computed(evidence, node, client, claims, packet)
    kernel = evidence.kernel
    rules = kernel.rules.get(node.options.family) if kernel is not None else None
    if kernel is None or rules is None or node.name != evidence.node:
        return computed, None
    if kernel.mode not in WALKED:
        return computed, None
    try:
        return computed, _walked("kernel", kernel.mode, node.name, rules, packet, kernel.host)
    except (ConfigError, ValueError):
        return computed, None  # written by others, in words that are not known here


def listens(evidence: Evidence, address: str, port: int, protocol: Protocol) -> bool | None:
    """Return whether a program of the node whose kernel was read takes packets there; None: that
    is not known."""
    known = evidence.kernel.listening if evidence.kernel is not None else None
    if known is None:
        return None
    anywhere = "::" if ":" in address else "0.0.0.0"
    return not known.isdisjoint({(protocol, one, port) for one in (address, anywhere)})


def is_own_dns(evidence: Evidence, node: str, address: str, port: int) -> bool:
    """True if the running kdns says that it answers there itself, as the DNS server of its node."""
    status = evidence.status or {}
    place = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    return (
        status.get("command") == "node"
        and node in ("", evidence.node)
        and place in (status.get("dns") or ())
    )


def _packet(client: Client, node: Node, address: str, port: int, protocol: Protocol) -> Packet:
    origin = origin_of(client, node)
    interface = OUTSIDE_INTERFACE
    detector = node.options.detector
    if origin == "node":
        interface = ""
    elif client.kind == "pod" and client.node in ("", node.name):
        by_name = detector is not None and detector.kind != "cidr"
        interface = detector.value if by_name and detector is not None else POD_INTERFACE
    source = client.address(node.options.family)
    return Packet(source, address, port, protocol, 40000, interface)


def _computed(
    evidence: Evidence,
    node: Node,
    client: Client,
    claims: Sequence[tuple[Forwarding, Frontend]],
    packet: Packet,
) -> Met:
    """Return what becomes of the packet by rules that are written for these Services only: of
    10,000 others none would fit, and to spell them takes seconds."""
    mode = evidence.config.mode
    services = {one.key: node.table.services[one.key] for one, _ in claims}
    table = ForwardingTable(node.table.family, node.table.revision, services, node.table.endpoints)
    if mode in WALKED:
        text = agent.spell(evidence.config, table, node.options)
        return _walked("computed", mode, node.name, text, packet, Host(node.addresses))
    if not claims:
        return Met("computed", mode, node.name, False, (), (), (Way("no rule"),))
    forwarding, frontend = claims[0]
    found = decided(node, forwarding, frontend, client)
    source = client.address(node.options.family)
    share = Fraction(1, len(found.endpoints) or 1)
    ways = tuple(
        Way("forward", str(e), share, found.masquerade or e.ip == source) for e in found.endpoints
    ) or (Way(found.verdict),)
    title = f"{forwarding.name} {forwarding.port}/{forwarding.protocol}"
    text = agent.spell(evidence.config, table, node.options, explain=True)
    lines = tuple(line.strip() for line in text.splitlines() if title in line)
    return Met("computed", mode, node.name, False, (), lines, ways)


def _walked(
    source: Literal["computed", "kernel"],
    mode: str,
    node: str,
    text: str,
    packet: Packet,
    host: Host,
) -> Met:
    outcomes = sorted(_outcomes(mode, text, packet, host), key=lambda one: -one.probability)
    likeliest = outcomes[0]
    return Met(
        source,
        mode,
        node,
        True,
        tuple(_chains(likeliest)),
        tuple(render_walk(likeliest)),
        tuple(_way(one) for one in outcomes),
    )


def _outcomes(mode: str, text: str, packet: Packet, host: Host) -> tuple[Outcome, ...]:
    """Walk a packet through rules as text, of ours or as the kernel lists them."""
    if mode == "nftables":
        return walk_nftables(parse_nftables(text, strict=False), packet, host)
    return walk(parse_rules(text, strict=False), packet, host)


def _way(outcome: Outcome) -> Way:
    place = str(Endpoint(outcome.destination, outcome.port))
    step = outcome.decided
    by = f"{step.table} {step.chain}" if step is not None else ""
    if step is not None and step.rule is not None:
        by += f": {step.rule.comment or step.rule.text}"
    share = outcome.probability
    if outcome.verdict == "dropped":
        return Way("drop", place, share, by=by)
    if outcome.verdict == "rejected":
        return Way("reject", place, share, by=by)
    if not outcome.dnat:
        verdict: Literal["local", "no rule"] = (
            "local" if outcome.verdict == "delivered" else "no rule"
        )
        return Way(verdict, place, share, outcome.masqueraded)
    return Way("forward", place, share, outcome.masqueraded)


# How the chains of a Service port are called, in both modes.
_OF_SERVICES: Final = (
    "KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-", "KUBE-FW-", "KUBE-SEP-",
    "service-", "local-", "external-", "firewall-", "endpoint-", "affinity-",
)  # fmt: skip


def _chains(outcome: Outcome) -> Iterator[str]:
    """Yield the chains of Services that a packet passes, in short, with the chance to get into
    each where it is left to chance."""
    last, chance = "", Fraction(1)
    for step in outcome.steps:
        if not step.matched or step.rule is None:
            continue
        if step.chain != last and step.chain.startswith(_OF_SERVICES):
            last = step.chain
            yield f"{last} ({render_share(chance)})" if chance != 1 else last
        chance = step.chance


# --- conntrack ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tracked:
    """A live flow to the destination. stale -- its endpoint is none any more"""

    client: str
    endpoint: str
    count: int
    stale: bool


def tracked(
    flows: Sequence[Flow],
    address: str,
    port: int,
    protocol: Protocol,
    endpoints: Mapping[str, object],
) -> tuple[list[Tracked], int]:
    """Return the flows that conntrack holds to a destination, those of one client to one
    endpoint as one, and how many there are in all."""
    packed = ipaddress.ip_address(address).packed
    found: dict[tuple[str, str], int] = {}
    for flow in flows:
        if (flow.protocol, flow.destination, flow.destination_port) != (protocol, packed, port):
            continue
        client = str(ipaddress.ip_address(flow.source))
        endpoint = str(Endpoint(str(ipaddress.ip_address(flow.reply_source)), flow.reply_port))
        found[client, endpoint] = found.get((client, endpoint), 0) + 1
    told = [
        Tracked(client, endpoint, count, endpoint not in endpoints)
        for (client, endpoint), count in sorted(found.items())
    ]
    told.sort(key=lambda one: not one.stale)
    return told[:MOST_FLOWS_TOLD], sum(found.values())
