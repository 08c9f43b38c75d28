"""The registry as it stands at one revision, and what changed since the one before.

A Snapshot is never changed after it was published; the store shares unchanged parts
between snapshots, so making one costs what changed and not what there is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from kdns.registry.objects import (
    SOURCE_CLUSTER_LABEL,
    EndpointSlice,
    Namespace,
    Node,
    Pod,
    Service,
    ServiceCIDR,
    ServiceImport,
    ServicePort,
)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """services   -- namespace -> name -> Service
    slices     -- namespace -> service name -> slices of that service, by slice name
    namespaces -- name -> Namespace
    pods       -- namespace -> name -> Pod; empty unless pods were asked for
    synced     -- every watched kind has been listed once
    changed_at -- Unix seconds of the last change that bumps the SOA serial (reference 1.9);
                  0 before any
    heard_at   -- Unix seconds when the source was last heard of
    imports    -- namespace -> name -> ServiceImport; empty unless they were asked for
    import_slices -- as slices, of ServiceImports
    imports_changed_at -- as changed_at, for multicluster zones
    nodes      -- name -> Node; empty unless they were asked for
    service_cidrs -- name -> ServiceCIDR; as nodes
    """

    revision: int = 0
    services: Mapping[str, Mapping[str, Service]] = field(default_factory=dict)
    slices: Mapping[str, Mapping[str, tuple[EndpointSlice, ...]]] = field(default_factory=dict)
    namespaces: Mapping[str, Namespace] = field(default_factory=dict)
    pods: Mapping[str, Mapping[str, Pod]] = field(default_factory=dict)
    synced: bool = False
    changed_at: int = 0
    imports: Mapping[str, Mapping[str, ServiceImport]] = field(default_factory=dict)
    import_slices: Mapping[str, Mapping[str, tuple[EndpointSlice, ...]]] = field(
        default_factory=dict
    )
    imports_changed_at: int = 0
    nodes: Mapping[str, Node] = field(default_factory=dict)
    service_cidrs: Mapping[str, ServiceCIDR] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Changes:
    """Keys touched between two snapshots, also those that are gone.

    services -- (namespace, service name): the Service or one of its slices
    everything -- True for the first snapshot after a (re)sync: recompile all
    imports -- (namespace, name): the ServiceImport or one of its slices
    """

    services: frozenset[tuple[str, str]] = frozenset()
    namespaces: frozenset[str] = frozenset()
    pods: frozenset[tuple[str, str]] = frozenset()
    synced: bool = False
    imports: frozenset[tuple[str, str]] = frozenset()
    nodes: frozenset[str] = frozenset()
    service_cidrs: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(
            self.services
            or self.namespaces
            or self.pods
            or self.imports
            or self.nodes
            or self.service_cidrs
            or self.synced
        )


def everything(snapshot: Snapshot) -> Changes:
    """Return the Changes from nothing to `snapshot`."""
    return Changes(
        services=_keys(snapshot.services, snapshot.slices),
        namespaces=frozenset(snapshot.namespaces),
        pods=_keys(snapshot.pods),
        synced=snapshot.synced,
        imports=_keys(snapshot.imports, snapshot.import_slices),
        nodes=frozenset(snapshot.nodes),
        service_cidrs=frozenset(snapshot.service_cidrs),
    )


def joined(first: Changes, then: Changes) -> Changes:
    """Return the changes of two revisions as those of one."""
    return Changes(
        first.services | then.services,
        first.namespaces | then.namespaces,
        first.pods | then.pods,
        first.synced or then.synced,
        first.imports | then.imports,
        first.nodes | then.nodes,
        first.service_cidrs | then.service_cidrs,
    )


def everything_in_parts(snapshot: Snapshot, size: int) -> Iterator[Changes]:
    """Yield everything() in parts of some `size` objects, sixteen endpoints for one: whoever
    compiles what they name of `snapshot`, or of a later one, has compiled all in the end."""
    yield Changes(
        namespaces=frozenset(snapshot.namespaces),
        synced=snapshot.synced,
        nodes=frozenset(snapshot.nodes),
        service_cidrs=frozenset(snapshot.service_cidrs),
    )
    services = _portions((snapshot.services, snapshot.slices), size, snapshot.slices)
    yield from (Changes(services=part) for part in services)
    imports = _portions((snapshot.imports, snapshot.import_slices), size, snapshot.import_slices)
    yield from (Changes(imports=part) for part in imports)
    yield from (Changes(pods=part) for part in _portions((snapshot.pods,), size, {}))


def _portions(
    tables: Sequence[Mapping[str, Mapping[str, object]]],
    size: int,
    slices: Mapping[str, Mapping[str, tuple[EndpointSlice, ...]]],
) -> Iterator[frozenset[tuple[str, str]]]:
    part: list[tuple[str, str]] = []
    held = 0
    for namespace in dict.fromkeys(namespace for table in tables for namespace in table):
        weighed = slices.get(namespace, {})
        for name in dict.fromkeys(n for table in tables for n in table.get(namespace, ())):
            part.append((namespace, name))
            held += 16 + sum(len(one.endpoints or ()) for one in weighed.get(name, ()))
            if held >= 16 * size:
                yield frozenset(part)
                part, held = [], 0
    if part:
        yield frozenset(part)


def _keys(*tables: Mapping[str, Mapping[str, object]]) -> frozenset[tuple[str, str]]:
    return frozenset(
        (namespace, name)
        for table in tables
        for namespace, names in table.items()
        for name in names
    )


def dump_snapshot(snapshot: Snapshot) -> Iterator[str]:
    """Yield one line an object, sorted, as `kdns dump snapshot` prints them."""
    yield f"revision {snapshot.revision} synced {str(snapshot.synced).lower()}"
    for name in sorted(snapshot.namespaces):
        yield f"Namespace {name}"
    for name, node in sorted(snapshot.nodes.items()):
        ips = ",".join(x.address for x in node.status.addresses or () if x.type == "InternalIP")
        yield f"Node {name} {ips or '-'}"
    for name, one_cidr in sorted(snapshot.service_cidrs.items()):
        yield f"ServiceCIDR {name} {','.join(one_cidr.spec.cidrs or ()) or '-'}"
    for namespace, services in sorted(snapshot.services.items()):
        for name, service in sorted(services.items()):
            spec = service.spec
            ips = ",".join(spec.cluster_ips or [spec.cluster_ip]) or "-"
            target = f" {spec.external_name}" if spec.external_name else ""
            yield (
                f"Service {namespace}/{name} {spec.type} {ips} {_dump_ports(spec.ports)}{target}"
            )
    yield from _dump_slices(snapshot.slices, "")
    for namespace, imports in sorted(snapshot.imports.items()):
        for name, one in sorted(imports.items()):
            ips = ",".join(one.spec.ips or ()) or "-"
            yield (
                f"ServiceImport {namespace}/{name} {one.spec.type} {ips}"
                f" {_dump_ports(one.spec.ports)}"
            )
    yield from _dump_slices(snapshot.import_slices, "ServiceImport ")
    for namespace, pods in sorted(snapshot.pods.items()):
        for name, pod in sorted(pods.items()):
            yield f"Pod {namespace}/{name} {pod.status.pod_ip or '-'} {pod.status.phase or '-'}"


def _dump_ports(ports: Sequence[ServicePort] | None) -> str:
    return ",".join(f"{p.name}:{p.port}/{p.protocol}" for p in ports or ()) or "-"


def _dump_slices(
    table: Mapping[str, Mapping[str, tuple[EndpointSlice, ...]]], kind: str
) -> Iterator[str]:
    for namespace, owners in sorted(table.items()):
        for owner, slices in sorted(owners.items()):
            for one in slices:
                cluster = (one.metadata.labels or {}).get(SOURCE_CLUSTER_LABEL, "")
                for endpoint in one.endpoints or ():
                    ready = endpoint.conditions.ready is not False
                    yield (
                        f"EndpointSlice {namespace}/{one.metadata.name} of {kind}{owner}"
                        f"{' in ' + cluster if cluster and kind else ''}"
                        f" {','.join(endpoint.addresses)} {'ready' if ready else 'not-ready'}"
                        f"{' ' + endpoint.hostname if endpoint.hostname else ''}"
                    )
