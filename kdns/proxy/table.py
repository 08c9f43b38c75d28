"""Service -> forwarding decision: what this node does with packets to each Service port.

The one place where it is decided which endpoints stand behind which frontend, whether they
are masqueraded, and what happens where there are none (reference 1.1, 1.5 to 1.7). Which
endpoints count at all is registry/endpoints.py's; how a dataplane says it (iptables.py and
its siblings) is theirs: they read this table and decide nothing.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, Literal, TypeAlias

from kdns.proxy.options import Family, NodeView, Protocol
from kdns.registry.endpoints import (
    MAX_PORT,
    Endpoint,
    canonical_address,
    endpoints_of_port,
    forwarded_address,
    is_usable,
    sort_usable,
)
from kdns.registry.objects import (
    EndpointSlice,
    Key,
    Service,
    ServicePort,
    ServiceSpec,
)
from kdns.registry.snapshot import Changes, Snapshot

# forward: to an endpoint; reject: refused at once, nobody could answer; drop: silence, for
# endpoints there are, but traffic policy Local leaves none on this node (reference 1.5).
Verdict: TypeAlias = Literal["forward", "reject", "drop"]
FrontendKind: TypeAlias = Literal["cluster IP", "external IP", "loadbalancer IP", "node port"]
# Where a packet comes from, as seen by the node: a Pod of it (as far as the detector tells),
# a process on the node itself, or anything else.
Origin: TypeAlias = Literal["pod", "node", "outside"]

# Kubernetes' word -> ours. A port of another protocol is not forwarded.
_PROTOCOLS: Final[Mapping[str, Protocol]] = {"TCP": "tcp", "UDP": "udp", "SCTP": "sctp"}
# Seconds of session affinity where the Service says none, and the most it may say: the API's.
_AFFINITY_DEFAULT: Final = 10800
_AFFINITY_MAX: Final = 86400
# Source ranges whose parsed form is remembered: some Services share long lists of them.
_RANGES_KNOWN: Final = 4096
_RANGE_LONGEST: Final = 128  # characters, with space around it


@dataclass(frozen=True, slots=True)
class Frontend:
    """One destination that clients use. address -- "" for a node port: any the node has."""

    kind: FrontendKind
    address: str
    port: int


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of a packet.

    endpoints  -- one of them gets it, each with the same chance; empty unless `forward`
    masquerade -- its source address becomes the node's. A packet that returns to its own
                  sender (hairpin: client and endpoint are one) is masqueraded always
    """

    verdict: Verdict
    endpoints: tuple[Endpoint, ...] = ()
    masquerade: bool = False


@dataclass(frozen=True, slots=True)
class Forwarding:
    """One Service port of one family.

    name           -- "namespace/service:port", without ":port" where the port has no name:
                      for comments and, with the protocol, for hashes (reference 1.1)
    node_port, health_check_node_port -- 0: none
    load_balancer_ips -- of ipMode VIP
    source_ranges  -- CIDRs that may use the load balancer's addresses; empty: everybody
    node_in_ranges -- this node's own address lies in one of them
    affinity       -- seconds a client stays with its endpoint; 0: it does not
    internal_local, external_local -- the traffic policy is Local; external_local only where
                      something but the ClusterIP leads here
    cluster        -- endpoints for traffic of policy Cluster, in order of "ip:port" text
    local          -- endpoints on this node, for traffic of policy Local and for the health
                      check; same order
    has_endpoints  -- an endpoint is usable, on whichever node (reference 1.6 point 5)
    serving        -- UDP only: all usable endpoints, also those that policies, hints and
                      draining leave out for new flows; a flow that is at one may finish there
    """

    key: Key
    name: str
    protocol: Protocol
    cluster_ip: str
    port: int
    node_port: int = 0
    external_ips: tuple[str, ...] = ()
    load_balancer_ips: tuple[str, ...] = ()
    source_ranges: tuple[str, ...] = ()
    node_in_ranges: bool = False
    affinity: int = 0
    internal_local: bool = False
    external_local: bool = False
    health_check_node_port: int = 0
    cluster: tuple[Endpoint, ...] = ()
    local: tuple[Endpoint, ...] = ()
    has_endpoints: bool = False
    serving: tuple[Endpoint, ...] = ()

    @property
    def externally_accessible(self) -> bool:
        """Something but the ClusterIP leads here."""
        return bool(self.node_port or self.external_ips or self.load_balancer_ips)

    @property
    def internal(self) -> Verdict:
        """What happens to traffic to the ClusterIP."""
        here = self.local if self.internal_local else self.has_endpoints
        return "forward" if here else "drop" if self.has_endpoints else "reject"

    @property
    def external(self) -> Verdict:
        """What happens to traffic from outside to any other frontend.

        Traffic from this node and its Pods may fare better: decide().
        """
        here = self.local if self.external_local else self.has_endpoints
        return "forward" if here else "drop" if self.has_endpoints else "reject"

    @property
    def reachable(self) -> tuple[Endpoint, ...]:
        """Every endpoint that some packet may be sent to, in order, each once."""
        if not (self.internal_local or self.external_local):
            return self.cluster
        known = set(self.cluster)
        more = [e for e in self.local if e not in known]
        return tuple(sorted((*self.cluster, *more), key=str)) if more else self.cluster

    @property
    def frontends(self) -> Iterator[Frontend]:
        """Yield the destinations: ClusterIP, external IPs, load balancer IPs, node port."""
        yield Frontend("cluster IP", self.cluster_ip, self.port)
        for ip in self.external_ips:
            yield Frontend("external IP", ip, self.port)
        for ip in self.load_balancer_ips:
            yield Frontend("loadbalancer IP", ip, self.port)
        if self.node_port:
            yield Frontend("node port", "", self.node_port)


@dataclass(frozen=True, slots=True)
class ForwardingTable:
    """All Service ports of one family at one registry revision.

    service_cidrs -- where the cluster takes ClusterIPs from, as far as it tells
    services -- by Service; a Service without a port to forward is not there. Never changed
                after it was published
    endpoints -- how many of all kinds there are in total (kube-proxy's measure of "large")
    """

    family: Family = 4
    revision: int = 0
    services: Mapping[Key, tuple[Forwarding, ...]] = field(default_factory=dict)
    endpoints: int = 0
    service_cidrs: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Forwarding]:
        """Yield every Forwarding, ordered by name and protocol."""
        every = [one for ports in self.services.values() for one in ports]
        every.sort(key=lambda one: (one.name, one.protocol))
        return iter(every)


class TableCompiler:
    """Compiles snapshots to tables of one family, anew only what changed.

    Incremental equals from-scratch after any sequence of changes.
    """

    def __init__(self, family: Family, node: NodeView) -> None:
        self.table = ForwardingTable(family)
        self.node = node
        self._counts: dict[Key, int] = {}  # Service -> what it adds to table.endpoints
        self._total = 0

    def update(
        self, snapshot: Snapshot, changes: Changes, node: NodeView | None = None
    ) -> Collection[Key]:
        """Take over `changes`; return the Services whose forwarding is now another.

        node -- this node, where it has changed since (its zone or its address)
        """
        keys: Iterable[Key] = changes.services
        if node is not None and node != self.node:
            keys = {*keys, *self._touched(node)}
            self.node = node
        changed = {
            key: ports for key in keys if (ports := self._compile(snapshot, key)) is not None
        }
        services = self.table.services
        if changed:
            services = self._merged(changed)
        cidrs = self.table.service_cidrs
        if changes.service_cidrs:
            cidrs = _service_cidrs(snapshot, self.table.family)
        self.table = ForwardingTable(
            self.table.family, snapshot.revision, services, self._total, cidrs
        )
        return tuple(changed)

    def _touched(self, node: NodeView) -> Iterator[Key]:
        """Yield the Services that may fare otherwise once this node is `node`."""
        old = self.node
        for key, ports in self.table.services.items():
            if (
                node.name != old.name
                or (node.address != old.address and any(p.source_ranges for p in ports))
                or (
                    node.topology_zone != old.topology_zone
                    # Where any ready endpoint has no hint, zones play no part; where all have
                    # one, so have those that were chosen.
                    and any(e.for_zones for p in ports for e in p.cluster)
                )
            ):
                yield key

    def _compile(self, snapshot: Snapshot, key: Key) -> tuple[Forwarding, ...] | None:
        """Compile one Service anew; return None if its forwarding is what it was."""
        namespace, name = key
        service = snapshot.services.get(namespace, {}).get(name)
        ports: tuple[Forwarding, ...] = ()
        endpoints = 0
        if service is not None:
            slices = snapshot.slices.get(namespace, {}).get(name, ())
            ports, endpoints = compile_service(service, slices, self.table.family, self.node)
        self._total += endpoints - self._counts.pop(key, 0)
        if endpoints:
            self._counts[key] = endpoints
        return ports if ports != self.table.services.get(key, ()) else None

    def _merged(
        self, changed: Mapping[Key, tuple[Forwarding, ...]]
    ) -> Mapping[Key, tuple[Forwarding, ...]]:
        """Return the services of the next table.

        They are copied: a plain copy of memory (0.1 ms for 10,000), and whoever still reads
        the table before this one does so in peace.
        """
        services = {**self.table.services, **changed}
        for key in [key for key, ports in changed.items() if not ports]:
            del services[key]
        return services


def _service_cidrs(snapshot: Snapshot, family: Family) -> tuple[str, ...]:
    """Return the ranges of the family, in order."""
    found = {
        str(net)
        for one in snapshot.service_cidrs.values()
        for text in one.spec.cidrs or ()
        if (net := _range(text)) and net.version == family
    }
    return tuple(sorted(found))


# --- one Service ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Shared:
    """What all ports of a Service have in common; words as in Forwarding.

    policy_local -- externalTrafficPolicy is Local, whether or not anything leads here
    """

    key: Key
    cluster_ip: str
    external_ips: tuple[str, ...]
    load_balancer_ips: tuple[str, ...]
    source_ranges: tuple[str, ...]
    node_in_ranges: bool
    affinity: int
    internal_local: bool
    policy_local: bool
    health_check_node_port: int


def compile_service(
    service: Service, slices: Iterable[EndpointSlice], family: Family, node: NodeView
) -> tuple[tuple[Forwarding, ...], int]:
    """Return what a Service's ports are for this node, ordered by name and protocol, and how
    many endpoints of all kinds they have.

    No ports where it is not this proxy's to forward (reference 1.1): without a ClusterIP of
    the family, ExternalName, or labelled for another proxy.
    """
    shared = _shared(service, family, node)
    if shared is None:
        return (), 0
    # Of two ports of one name and protocol, which the API refuses, the last one counts, as in
    # kube-proxy.
    compiled: dict[tuple[str, str], tuple[Forwarding, int]] = {}
    for port in service.spec.ports or ():
        protocol = _PROTOCOLS.get(port.protocol or "TCP")
        if protocol is None or not 0 < port.port <= MAX_PORT:
            continue
        endpoints = endpoints_of_port(slices, port.name, protocol.upper(), family, node.name)
        one = _forwarding(shared, port, protocol, endpoints, node)
        compiled[one.name, protocol] = one, len(endpoints)
    ports = tuple([compiled[order][0] for order in sorted(compiled)])
    return ports, sum([count for _, count in compiled.values()])


def _shared(service: Service, family: Family, node: NodeView) -> _Shared | None:
    """Read the Service but for its ports; None if it is not to be forwarded."""
    cluster_ip = forwarded_address(service, family)
    if not cluster_ip:
        return None
    spec, meta = service.spec, service.metadata
    # Where the mode is Proxy the load balancer must see the packet first (KEP-1860); an entry
    # with nothing but a hostname has no address to match.
    ingress = [i.ip for i in service.status.load_balancer.ingress or () if i.ip_mode == "VIP"]
    ranges = _source_ranges(spec.load_balancer_source_ranges or (), family)
    policy_local = spec.external_traffic_policy == "Local"
    checked = (
        spec.type == "LoadBalancer" and policy_local and spec.health_check_node_port <= MAX_PORT
    )
    return _Shared(
        (meta.namespace, meta.name),
        cluster_ip,
        _addresses(spec.external_ips or (), family),
        _addresses(ingress, family),
        ranges,
        _lies_in(node.address, ranges),
        _affinity(spec),
        spec.internal_traffic_policy == "Local",
        policy_local,
        max(spec.health_check_node_port, 0) if checked else 0,
    )


def _forwarding(
    shared: _Shared,
    port: ServicePort,
    protocol: Protocol,
    endpoints: tuple[Endpoint, ...],
    node: NodeView,
) -> Forwarding:
    node_port = port.node_port if 0 < port.node_port <= MAX_PORT else 0
    accessible = bool(node_port or shared.external_ips or shared.load_balancer_ips)
    external_local = shared.policy_local and accessible
    usable = sort_usable(
        endpoints,
        cluster=accessible or not shared.internal_local,
        # A load balancer asks after the node's health before it has an address.
        local=shared.internal_local or external_local or shared.health_check_node_port > 0,
        node=node.name,
        topology_zone=node.topology_zone,
    )
    owner = f"{shared.key[0]}/{shared.key[1]}"
    return Forwarding(
        shared.key,
        f"{owner}:{port.name}" if port.name else owner,
        protocol,
        shared.cluster_ip,
        port.port,
        node_port,
        shared.external_ips,
        shared.load_balancer_ips,
        shared.source_ranges,
        shared.node_in_ranges,
        shared.affinity,
        shared.internal_local,
        external_local,
        shared.health_check_node_port,
        usable.cluster,
        usable.local,
        usable.has_endpoints,
        tuple([e for e in endpoints if is_usable(e)]) if protocol == "udp" else (),
    )


def _addresses(texts: Iterable[str], family: Family) -> tuple[str, ...]:
    """Return the addresses of the family, as they are always written, each once."""
    found = [canonical_address(text) for text in texts]
    return tuple({one[1]: None for one in found if one is not None and one[0] == family})


def _affinity(spec: ServiceSpec) -> int:
    if spec.session_affinity != "ClientIP":
        return 0
    config = spec.session_affinity_config
    seconds = config.client_ip.timeout_seconds if config and config.client_ip else None
    return seconds if seconds and 0 < seconds <= _AFFINITY_MAX else _AFFINITY_DEFAULT


def _source_ranges(texts: Iterable[str], family: Family) -> tuple[str, ...]:
    """Return the CIDRs of the family; none, so that nothing is filtered, where one of them is
    every address there is (reference 1.1)."""
    # Whoever writes them: text of any length is not remembered.
    fitting = [text.strip() for text in texts if len(text) <= _RANGE_LONGEST]
    nets = [net for text in fitting if (net := _range(text)) and net.version == family]
    if any(net.prefixlen == 0 for net in nets):
        return ()
    return tuple(dict.fromkeys(map(str, nets)))


def _lies_in(address: str, ranges: tuple[str, ...]) -> bool:
    if not address or not ranges:
        return False
    found = canonical_address(address)
    if found is None:
        return False
    ip = ipaddress.ip_address(found[1])
    return any(ip in net for text in ranges if (net := _range(text)))


@lru_cache(maxsize=_RANGES_KNOWN)
def _range(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    """Read a CIDR; None if it is not one. A bare address is none: it has no prefix length."""
    base, slash, length = text.partition("/")
    address = canonical_address(base)
    # A netmask in dotted form is not a length, though ipaddress would take it.
    if not slash or address is None or not (length.isascii() and length.isdigit()):
        return None
    try:
        return ipaddress.ip_network(f"{address[1]}/{length}", strict=False)
    except ValueError:
        return None


# --- one packet -----------------------------------------------------------------------------


def decide(
    forwarding: Forwarding,
    kind: FrontendKind,
    origin: Origin,
    *,
    masquerade_all: bool = False,
    detects: bool = True,
) -> Decision:
    """Return what becomes of a packet to a frontend of `forwarding` (reference 1.7).

    detects -- there is a Detector. Without one nobody is known to be a Pod of this node.
    Source ranges are not looked at: whoever asks knows whether the client lies in one.
    """
    if kind == "cluster IP":
        # To leave the node with a Pod's source is right for a Pod of this node only: the
        # answer must come back here to be translated.
        masquerade = masquerade_all or (detects and origin != "pod")
        chosen = forwarding.local if forwarding.internal_local else forwarding.cluster
        return _decision(forwarding.internal, chosen, masquerade)
    if not forwarding.external_local:
        return _decision(forwarding.external, forwarding.cluster, True)
    # Policy Local is for clients outside, whose address is to be kept. This node and its Pods
    # are spared the way out to the load balancer and back: the short circuit.
    if origin == "node" or (origin == "pod" and detects):
        verdict: Verdict = "forward" if forwarding.has_endpoints else "reject"
        return _decision(verdict, forwarding.cluster, origin == "node")
    return _decision(forwarding.external, forwarding.local, False)


def _decision(verdict: Verdict, endpoints: tuple[Endpoint, ...], masquerade: bool) -> Decision:
    return Decision(verdict, endpoints, masquerade) if verdict == "forward" else Decision(verdict)


# --- what is claimed twice ------------------------------------------------------------------


def conflicts(table: ForwardingTable) -> Iterator[str]:
    """Yield a text for each destination that more than one Service port claims, in the order
    of the table.

    The API server keeps Services from that, but for externalIPs, load balancer IPs and what
    comes from files. As with kube-proxy, whose rules are tried one after the other, the first
    that has an endpoint gets it, and if none has, the first; only that kube-proxy's order is
    another with each start, and ours is that of the names.
    """
    claims: dict[tuple[str, int, Protocol], list[Forwarding]] = {}
    for one in table:
        places = dict.fromkeys((place.address, place.port) for place in one.frontends)
        for address, port in places:
            claims.setdefault((address, port, one.protocol), []).append(one)
    for (address, port, protocol), claimants in claims.items():
        if len(claimants) > 1:
            names = " and ".join(one.name for one in claimants)
            winner = next((one for one in claimants if one.has_endpoints), claimants[0])
            yield f"{_place(address, port)}/{protocol} is claimed by {names}; {winner.name} gets it"


def _place(address: str, port: int) -> str:
    if not address:
        return f"NodePort {port}"
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


# --- printing -------------------------------------------------------------------------------


def dump_table(table: ForwardingTable) -> Iterator[str]:
    """Yield the table as `kdns dump table` prints it: a line a frontend, and one below it for
    each endpoint."""
    for one in table:
        for frontend in one.frontends:
            kind = frontend.kind
            verdict = one.internal if kind == "cluster IP" else one.external
            policy = one.internal_local if kind == "cluster IP" else one.external_local
            place = _place(frontend.address or "*", frontend.port)
            notes = [
                *(["policy Local"] if policy else []),
                *([f"affinity {one.affinity} s"] if one.affinity else []),
                *(
                    [f"only from {', '.join(one.source_ranges)}"]
                    if one.source_ranges and kind == "loadbalancer IP"
                    else []
                ),
            ]
            yield f"{one.name} {kind} {place}/{one.protocol} {' '.join([verdict, *notes])}"
        for endpoint in one.reachable:
            state = "" if endpoint.ready else " terminating"
            yield f"    {endpoint}{' here' if endpoint.local else ''}{state}"
