"""The registry as it stands at one revision, and what changed since the one before.

A Snapshot is never changed after it was published; the store shares unchanged parts
between snapshots, so making one costs what changed and not what there is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from kdns.registry.objects import EndpointSlice, Namespace, Pod, Service


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
    """

    revision: int = 0
    services: Mapping[str, Mapping[str, Service]] = field(default_factory=dict)
    slices: Mapping[str, Mapping[str, tuple[EndpointSlice, ...]]] = field(default_factory=dict)
    namespaces: Mapping[str, Namespace] = field(default_factory=dict)
    pods: Mapping[str, Mapping[str, Pod]] = field(default_factory=dict)
    synced: bool = False
    changed_at: int = 0


@dataclass(frozen=True, slots=True)
class Changes:
    """Keys touched between two snapshots, also those that are gone.

    services -- (namespace, service name): the Service or one of its slices
    everything -- True for the first snapshot after a (re)sync: recompile all
    """

    services: frozenset[tuple[str, str]] = frozenset()
    namespaces: frozenset[str] = frozenset()
    pods: frozenset[tuple[str, str]] = frozenset()
    synced: bool = False

    def __bool__(self) -> bool:
        return bool(self.services or self.namespaces or self.pods or self.synced)


def everything(snapshot: Snapshot) -> Changes:
    """Return the Changes from nothing to `snapshot`."""
    return Changes(
        services=frozenset(
            (namespace, name)
            for table in (snapshot.services, snapshot.slices)
            for namespace, names in table.items()
            for name in names
        ),
        namespaces=frozenset(snapshot.namespaces),
        pods=frozenset(
            (namespace, name) for namespace, names in snapshot.pods.items() for name in names
        ),
        synced=snapshot.synced,
    )


def dump_snapshot(snapshot: Snapshot) -> Iterator[str]:
    """Yield one line an object, sorted, as `kdns dump snapshot` prints them."""
    yield f"revision {snapshot.revision} synced {str(snapshot.synced).lower()}"
    for name in sorted(snapshot.namespaces):
        yield f"Namespace {name}"
    for namespace, services in sorted(snapshot.services.items()):
        for name, service in sorted(services.items()):
            spec = service.spec
            ips = ",".join(spec.cluster_ips or [spec.cluster_ip]) or "-"
            ports = ",".join(f"{p.name}:{p.port}/{p.protocol}" for p in spec.ports or ()) or "-"
            target = f" {spec.external_name}" if spec.external_name else ""
            yield f"Service {namespace}/{name} {spec.type} {ips} {ports}{target}"
    for namespace, owners in sorted(snapshot.slices.items()):
        for owner, slices in sorted(owners.items()):
            for one in slices:
                for endpoint in one.endpoints or ():
                    ready = endpoint.conditions.ready is not False
                    yield (
                        f"EndpointSlice {namespace}/{one.metadata.name} of {owner}"
                        f" {','.join(endpoint.addresses)} {'ready' if ready else 'not-ready'}"
                        f"{' ' + endpoint.hostname if endpoint.hostname else ''}"
                    )
    for namespace, pods in sorted(snapshot.pods.items()):
        for name, pod in sorted(pods.items()):
            yield f"Pod {namespace}/{name} {pod.status.pod_ip or '-'} {pod.status.phase or '-'}"
