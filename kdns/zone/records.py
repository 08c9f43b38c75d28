"""*** Where a Service becomes DNS records. ***

compile_service() is the one function that turns a Service and its EndpointSlices into what
can be asked of them; answers, transfers, PTR and dumps all read its result. compile_import()
does the same for a ServiceImport, whose endpoints are in several clusters. The default is
CoreDNS's reading of the Kubernetes DNS specification 1.1.0 (docs/DESIGN.md, reference 1.3
to 1.5); `strict` is the specification's own where the two differ (reference 1.17).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from struct import pack
from typing import NamedTuple, TypeAlias

from kdns.dns import types as t
from kdns.dns.message import RR
from kdns.dns.name import MAX_NAME, BadName, name_of, parse_name
from kdns.registry.endpoints import pack_address, published
from kdns.registry.objects import (
    SOURCE_CLUSTER_LABEL,
    EndpointSlice,
    Service,
    ServiceImport,
    ServicePort,
    SlicePort,
)

NO_PORT = -1  # stands for "no ports declared": there is an address but nothing for SRV
SVC = b"svc"
Ports: TypeAlias = tuple[tuple[bytes, bytes, int], ...]  # name, protocol, number
_NO_PORTS: Ports = ((b"", b"", NO_PORT),)
_SHARED = 1 << 10  # ports that many Services have in common


class Item(NamedTuple):
    """One address with one port.

    target -- labels left of the zone that an SRV record points to
    label  -- the endpoint's own name; empty for a ClusterIP
    cluster -- of a ServiceImport's endpoint: the id of the cluster it is in
    """

    packed: bytes
    port: int
    port_name: bytes
    protocol: bytes
    target: tuple[bytes, ...]
    label: bytes
    topology_zone: str = ""
    cluster: bytes = b""


class Node:
    """All records of one name, made from its items when first asked for.

    Owner names are filled in per query, because CoreDNS answers in the case it was asked.
    """

    __slots__ = ("_a", "_aaaa", "_srv", "_srv_zone", "items", "strict", "ttl")

    def __init__(self, items: tuple[Item, ...], ttl: int, strict: bool) -> None:
        self.items = items
        self.ttl = ttl
        self.strict = strict
        self._a: list[RR] | None = None
        self._aaaa: list[RR] | None = None
        self._srv: tuple[list[RR], list[RR]] | None = None
        self._srv_zone = b""

    def addresses(self, qtype: int) -> list[RR]:
        """Return the A or AAAA records, owner name empty. Equal addresses once."""
        found = self._a if qtype == t.A else self._aaaa
        if found is None:
            size = 4 if qtype == t.A else 16
            unique = dict.fromkeys(i.packed for i in self.items if len(i.packed) == size)
            found = [RR(b"", qtype, self.ttl, packed) for packed in unique]
            if qtype == t.A:
                self._a = found
            else:
                self._aaaa = found
        return found

    def services(self, zone: bytes) -> tuple[list[RR], list[RR]]:
        """Return (SRV records without owner name, their targets' addresses).

        zone -- the zone in the case the query typed it: targets take it over.
        """
        if self._srv is not None and zone == self._srv_zone:
            return self._srv
        items = self.items
        if self.strict:
            # DNS spec 2.3.2, 2.4.2: SRV records exist for named ports only.
            items = tuple(i for i in items if i.port_name or i.port == NO_PORT)
        weight = srv_weight(len(items))
        answers: dict[tuple[tuple[bytes, ...], int], RR] = {}
        extra: dict[tuple[tuple[bytes, ...], bytes], RR] = {}
        for item in items:
            if item.port == NO_PORT:
                continue
            target = name_of([*item.target])[:-1] + zone
            if len(target) > MAX_NAME:
                continue  # four labels of 63 octets, and a cluster's, are no name any more
            if (item.target, item.port) not in answers:
                rdata = pack("!HHH", 0, weight, item.port) + target
                answers[item.target, item.port] = RR(b"", t.SRV, self.ttl, rdata)
            if (item.target, item.packed) not in extra:
                rtype = t.A if len(item.packed) == 4 else t.AAAA
                extra[item.target, item.packed] = RR(target, rtype, self.ttl, item.packed)
        self._srv = (list(answers.values()), list(extra.values()))
        self._srv_zone = zone
        return self._srv


def srv_weight(n: int) -> int:
    """Return the weight each of `n` records gets: 100 shared out, at least 1 (reference 1.3)."""
    return max(1, int(100.0 / (100 * n) * 100)) if n else 1


class ServiceRecords:
    """What one Service is in the DNS.

    items     -- the Service's own addresses: ClusterIPs x ports, or its endpoints (headless)
    endpoints -- the endpoints x ports, also of a ClusterIP Service; made when they are first
                 asked for, for of most Services nobody asks for them
    slices    -- what these are made from
    key       -- (namespace, name)
    cname     -- the target of an ExternalName Service as a wire name, else None
    addresses -- packed ClusterIPs, for PTR
    """

    __slots__ = (
        "_endpoints",
        "_items",
        "_nodes",
        "_pod_names",
        "addresses",
        "cname",
        "deps",
        "headless",
        "key",
        "name",
        "namespace",
        "ports",
        "slices",
        "strict",
        "ttl",
    )

    def __init__(
        self,
        namespace: bytes,
        name: bytes,
        ttl: int,
        strict: bool,
        slices: Iterable[EndpointSlice] = (),
        pod_names: bool = False,
    ) -> None:
        self.namespace = namespace
        self.name = name
        self.key = (namespace, name)
        self.ttl = ttl
        self.strict = strict
        self.slices = tuple(slices)
        self.headless = False
        self.cname: bytes | None = None
        self.addresses: tuple[bytes, ...] = ()
        self.ports: Ports = ()
        self.deps: tuple[object, ...] = ()
        self._pod_names = pod_names
        self._endpoints: tuple[Item, ...] | None = None
        self._items: tuple[Item, ...] | None = None
        self._nodes: dict[tuple[bytes, ...], Node] | None = None

    def set_endpoints(self, endpoints: Iterable[Item]) -> None:
        """Have these in place of what the slices say."""
        self._endpoints = tuple(endpoints)

    def set_items(self, items: Iterable[Item]) -> None:
        """Have these in place of ClusterIPs x ports."""
        self._items = tuple(items)

    @property
    def endpoints(self) -> tuple[Item, ...]:
        if self._endpoints is None:
            self._endpoints = tuple(_endpoint_items(self, self.slices, self._pod_names))
        return self._endpoints

    @property
    def items(self) -> tuple[Item, ...]:
        if self.headless:
            return self.endpoints
        if self._items is None:
            self._items = tuple(self._own_items())
        return self._items

    def _own_items(self) -> Iterator[Item]:
        base = (self.name, self.namespace, SVC)
        for port_name, protocol, port in self.ports or _NO_PORTS:
            for packed in self.addresses:
                yield Item(packed, port, port_name, protocol, base, b"")

    def node(self, endpoint: bytes = b"", port: bytes = b"", protocol: bytes = b"") -> Node | None:
        """Return the node of an endpoint name, of `_port._protocol`, or of the Service itself.

        All lower-case; an empty port or protocol matches any. None: no such name.
        """
        key = (endpoint, port, protocol)
        nodes = self._nodes
        if nodes is None:
            nodes = self._nodes = {}
        node = nodes.get(key)
        if node is None:
            items = self.endpoints if endpoint else self.items
            if endpoint or port or protocol:
                items = tuple(
                    i
                    for i in items
                    if (not endpoint or i.label == endpoint)
                    and (not port or i.port_name == port)
                    and (not protocol or i.protocol == protocol)
                )
            if not items:
                return None
            node = nodes[key] = Node(items, self.ttl, self.strict)
        return node

    def has_port(self, port: bytes, protocol: bytes) -> bool:
        """True if there is such a port; empty matches any."""
        return any(
            (not port or name == port) and (not protocol or known == protocol)
            for name, known, _ in self.ports
        )

    def endpoint_in(self, cluster: bytes, endpoint: bytes) -> Node | None:
        """Return the node of a ServiceImport's endpoint; cluster empty: one of which it is
        not known where it is."""
        key = (cluster, endpoint)
        nodes = self._nodes
        if nodes is None:
            nodes = self._nodes = {}
        node = nodes.get(key)
        if node is None:
            items = tuple(i for i in self.endpoints if i.cluster == cluster and i.label == endpoint)
            if not items:
                return None
            node = nodes[key] = Node(items, self.ttl, self.strict)
        return node

    def has_cluster(self, cluster: bytes) -> bool:
        """True if endpoints of a ServiceImport are in this cluster."""
        return any(i.cluster == cluster for i in self.endpoints)

    def in_topology_zone(self, topology_zone: str, prefer: bool) -> Node:
        """Return the node of a zonal name (reference 1.13); it may have no items."""
        items = tuple(i for i in self.items if i.topology_zone == topology_zone)
        if not items and prefer:
            items = self.items
        return Node(items, self.ttl, self.strict)


def endpoint_label(hostname: str | None, pod: str, address: str, pod_names: bool) -> str:
    """Return the label of an endpoint under its Service (reference 1.4 EPNAME).

    DNS spec 2.4.1 leaves it to the server where there is no hostname.
    """
    if hostname:
        return hostname
    if pod_names and pod and len(pod) < 64:
        return pod
    if "." in address:
        return address.replace(".", "-")
    label = address.replace(":", "-")
    return label + "0" if label.endswith("-") else label


def compile_service(
    service: Service,
    slices: Iterable[EndpointSlice],
    *,
    ttl: int,
    pod_names: bool = False,
    strict: bool = False,
) -> ServiceRecords:
    """Return the records of a Service. Slices are those of the Service, in a fixed order."""
    meta, spec = service.metadata, service.spec
    namespace, name = meta.namespace.lower().encode(), meta.name.lower().encode()
    if spec.type == "ExternalName":
        records = ServiceRecords(namespace, name, ttl, strict)
        records.cname = external_target(spec.external_name)
        return records
    records = ServiceRecords(namespace, name, ttl, strict, slices, pod_names)
    cluster_ips = spec.cluster_ips or [spec.cluster_ip]
    if cluster_ips[0] == "None":
        cluster_ips = []
        records.headless = True
    _set_own(records, spec.ports, cluster_ips)
    return records


def compile_import(
    one: ServiceImport,
    slices: Iterable[EndpointSlice],
    *,
    ttl: int,
    pod_names: bool = False,
    strict: bool = False,
) -> ServiceRecords:
    """Return the records of a ServiceImport (reference 1.13, KEP-1645), for which each cluster
    of the set that exports the Service has slices of its own."""
    meta, spec = one.metadata, one.spec
    namespace, name = meta.namespace.lower().encode(), meta.name.lower().encode()
    records = ServiceRecords(namespace, name, ttl, strict)
    endpoints: list[Item] = []
    for part in slices:
        cluster = (part.metadata.labels or {}).get(SOURCE_CLUSTER_LABEL, "").lower().encode()
        endpoints += _endpoint_items(records, (part,), pod_names, cluster)
    records.set_endpoints(endpoints)
    records.headless = spec.type == "Headless"
    _set_own(records, spec.ports, spec.ips or ())
    if not records.ports and not strict:
        # CoreDNS: without ports there is no name. DNS spec 2.3.1 asks for its address all the
        # same.
        records.set_items(())
    return records


def _endpoint_items(
    records: ServiceRecords,
    slices: Iterable[EndpointSlice],
    pod_names: bool,
    cluster: bytes = b"",
) -> list[Item]:
    base: tuple[bytes, ...] = (records.name, records.namespace, SVC)
    if cluster:
        base = (cluster, *base)
    items: list[Item] = []
    spelt: Ports = ()
    spelt_of: object = None
    for endpoint, address, packed, ports in published(slices):
        if ports is not spelt_of:  # those of another slice
            spelt_of, spelt = ports, tuple(map(_slice_port, ports)) or _NO_PORTS
        ref = endpoint.target_ref
        label = endpoint_label(
            endpoint.hostname, ref.name if ref else "", address, pod_names
        ).lower().encode()  # fmt: skip
        target = (label, *base)
        zone = endpoint.topology_zone or ""
        for name, protocol, number in spelt:
            items.append(Item(packed, number, name, protocol, target, label, zone, cluster))
    return items


def _slice_port(port: SlicePort) -> tuple[bytes, bytes, int]:
    number = NO_PORT if port.port is None else port.port
    return _port(port.name or "", port.protocol or "TCP", number)


def _set_own(
    records: ServiceRecords, ports: Sequence[ServicePort] | None, ips: Iterable[str]
) -> None:
    """Fill in ports and addresses."""
    records.ports = _one(tuple([_port(p.name, p.protocol, p.port) for p in ports or ()]))
    if records.headless:
        return
    # None: not allocated yet, as if the Service were not there (reference 1.3).
    records.addresses = tuple([packed for ip in ips if (packed := pack_address(ip)) is not None])


# Of 10,000 Services with their ports most are alike.


@lru_cache(maxsize=_SHARED)
def _port(name: str, protocol: str, number: int) -> tuple[bytes, bytes, int]:
    return name.lower().encode(), protocol.lower().encode(), number


@lru_cache(maxsize=_SHARED)
def _one(ports: Ports) -> Ports:
    return ports


def external_target(text: str) -> bytes | None:
    """Return an externalName as a wire name; None for an address literal or no name at all
    (reference 1.5: NXDOMAIN for every type)."""
    if not text:
        return None
    try:
        ipaddress.ip_address(text)
        return None
    except ValueError:
        pass
    try:
        return parse_name(text if text.endswith(".") else text + ".")
    except BadName:
        return None


def transfer_records(records: ServiceRecords, zone: bytes) -> Iterator[RR]:
    """Yield what a zone transfer says of one Service or import (reference 1.14). `zone`: wire
    name."""
    ttl = records.ttl

    def named(*labels: bytes) -> bytes:
        return name_of([*labels, records.name, records.namespace, SVC])[:-1] + zone

    owner = named()
    if records.cname is not None:
        yield RR(owner, t.CNAME, ttl, records.cname)
        return
    if not records.headless:
        for packed in records.addresses:
            yield RR(owner, t.A if len(packed) == 4 else t.AAAA, ttl, packed)
        if not records.addresses:
            return
        for port_name, protocol, port in records.ports:
            rdata = pack("!HHH", 0, 100, port) + owner
            if not records.strict:
                yield RR(owner, t.SRV, ttl, rdata)
            if port_name:
                yield RR(named(b"_" + port_name, b"_" + protocol), t.SRV, ttl, rdata)
        return
    seen: set[tuple[tuple[bytes, ...], bytes]] = set()
    weight = srv_weight(len({(i.target, i.packed) for i in records.endpoints}))
    for item in records.endpoints:
        rtype = t.A if len(item.packed) == 4 else t.AAAA
        target = name_of([*item.target])[:-1] + zone
        if (item.target, item.packed) not in seen:
            seen.add((item.target, item.packed))
            yield RR(owner, rtype, ttl, item.packed)
            if len(target) <= MAX_NAME:
                yield RR(target, rtype, ttl, item.packed)
        if item.port_name and item.port != NO_PORT and len(target) <= MAX_NAME:
            rdata = pack("!HHH", 0, weight, item.port) + target
            yield RR(named(b"_" + item.port_name, b"_" + item.protocol), t.SRV, ttl, rdata)
