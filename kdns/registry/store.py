"""The registry's one writer: takes what a source says and publishes snapshots of it.

Decides what is a true change (an object equal in the fields we read is dropped) and which
changes bump the SOA serial (reference 1.9). Whoever is compiled from a snapshot is told
the keys that changed. A snapshot shares all namespaces that did not change with the one
before it, so publishing costs what changed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Generic, TypeVar

from kdns.registry.endpoints import published
from kdns.registry.objects import (
    IMPORT_NAME_LABEL,
    SERVICE_NAME_LABEL,
    SOURCE_CLUSTER_LABEL,
    EndpointSlice,
    Key,
    Kind,
    Meta,
    Namespace,
    Node,
    Object,
    Pod,
    Service,
    ServiceCIDR,
    ServiceImport,
    key_of,
)
from kdns.registry.snapshot import Changes, Snapshot
from kdns.registry.spec import KubeSpec, ManifestSpec

T = TypeVar("T")

# Objects looked at, and endpoints compiled, in the time that one Service takes.
GLANCES = 32
ENDPOINTS = 16


class Shelf(Generic[T]):
    """namespace -> name -> T, copied on the first write after it was published."""

    def __init__(self) -> None:
        self._spaces: dict[str, dict[str, T]] = {}
        self._shared = False  # the outer dict belongs to a snapshot too
        self._own: set[str] = set()  # namespaces whose dict belongs to no snapshot

    @classmethod
    def over(cls, published: Mapping[str, Mapping[str, T]]) -> Shelf[T]:
        """Return a shelf that begins with what one has published, and leaves that as it is."""
        shelf: Shelf[T] = cls()
        shelf._spaces = published  # type: ignore[assignment]  # copied before it is written
        shelf._shared = True
        return shelf

    def get(self, key: Key) -> T | None:
        space = self._spaces.get(key[0])
        return None if space is None else space.get(key[1])

    def put(self, key: Key, value: T) -> None:
        self._writable(key[0])[key[1]] = value

    def remove(self, key: Key) -> None:
        """Remove a key; one that is not there is no fault."""
        if self.get(key) is None:
            return
        space = self._writable(key[0])
        del space[key[1]]
        if not space:
            del self._spaces[key[0]]
            self._own.discard(key[0])

    def _writable(self, namespace: str) -> dict[str, T]:
        if self._shared:
            self._spaces = dict(self._spaces)
            self._shared = False
        if namespace not in self._own:
            self._spaces[namespace] = dict(self._spaces.get(namespace, {}))
            self._own.add(namespace)
        return self._spaces[namespace]

    def publish(self) -> Mapping[str, Mapping[str, T]]:
        """Return the content as it stands; it will not change any more."""
        self._shared = True
        self._own.clear()
        return self._spaces


class Slices:
    """EndpointSlices under the object that one of their labels names."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._members: dict[Key, dict[str, EndpointSlice]] = {}  # owner -> slice name -> slice
        self._shelf: Shelf[tuple[EndpointSlice, ...]] = Shelf()
        self.changed: set[Key] = set()  # owners

    def owner(self, one: EndpointSlice | None) -> Key | None:
        """Return the object a slice belongs to; None if it names none."""
        if one is None:
            return None
        name = (one.metadata.labels or {}).get(self._label)
        return (one.metadata.namespace, name) if name else None

    def move(self, old: EndpointSlice | None, new: EndpointSlice | None) -> None:
        """Put `new` in the place of `old`, two versions of one slice."""
        before, after = self.owner(old), self.owner(new)
        if old is not None and before is not None and before != after:
            members = self._members[before]
            del members[old.metadata.name]
            if not members:
                del self._members[before]
            self.changed.add(before)
        if new is not None and after is not None:
            self._members.setdefault(after, {})[new.metadata.name] = new
            self.changed.add(after)

    def publish(self) -> Mapping[str, Mapping[str, tuple[EndpointSlice, ...]]]:
        for key in self.changed:
            members = self._members.get(key)
            if members:
                self._shelf.put(key, tuple(members[name] for name in sorted(members)))
            else:
                self._shelf.remove(key)
        self.changed.clear()
        return self._shelf.publish()


class Store:
    """Holds the objects of one source. Not thread-safe: one writer.

    kinds -- what must have been listed once before the registry counts as synced
    """

    def __init__(self, kinds: Iterable[Kind]) -> None:
        self._waiting: set[Kind] = set(kinds)
        self._objects: dict[Kind, dict[Key, Object]] = {}
        self._services: Shelf[Service] = Shelf()
        self._slices = Slices(SERVICE_NAME_LABEL)
        self._pods: Shelf[Pod] = Shelf()
        self._namespaces: Shelf[Namespace] = Shelf()
        self._imports: Shelf[ServiceImport] = Shelf()
        self._nodes: Shelf[Node] = Shelf()
        self._service_cidrs: Shelf[ServiceCIDR] = Shelf()
        self._import_slices = Slices(IMPORT_NAME_LABEL)
        self._changed_services: set[Key] = set()
        self._changed_namespaces: set[str] = set()
        self._changed_pods: set[Key] = set()
        self._changed_imports: set[Key] = set()
        self._changed_nodes: set[str] = set()
        self._changed_service_cidrs: set[str] = set()
        self._bump = False
        self._bump_imports = False
        self._synced_told = False
        self._last = Snapshot()

    @classmethod
    def of(cls, spec: KubeSpec | ManifestSpec) -> Store:
        """Return the empty store for what a source of this spec tells of."""
        return cls(spec.kinds)

    @property
    def synced(self) -> bool:
        """True once every kind waited for was listed; it stays true."""
        return not self._waiting

    def replace(
        self, kind: Kind, objects: Iterable[Object], keep: Collection[Key] = frozenset()
    ) -> None:
        """Take a full list. What is not in it is gone, apart from the keys in `keep`: those
        were listed but broken, and their last good version stays."""
        for _ in self.replacing(kind, objects, keep):
            pass

    def replacing(
        self, kind: Kind, objects: Iterable[Object], keep: Collection[Key] = frozenset()
    ) -> Iterator[int]:
        """As replace(), step by step: each yields the work that it and what is compiled from it
        takes, by a Service's. Between any two the store may be published: it stands as if as
        many watch events had come. Nothing else may be told of the kind until the end."""
        fresh: dict[Key, Object] = {}
        for at, obj in enumerate(objects, 1):
            fresh[key_of(obj)] = obj
            if at % GLANCES == 0:
                yield 1
        # From here on each goes with its step: all at once take longer than answers may wait.
        objects = ()
        for at, key in enumerate(list(self._objects.get(kind, ())), 1):
            if key not in fresh and key not in keep:
                self._remove(kind, key)
                yield 1
            elif at % GLANCES == 0:
                yield 1
        while fresh:
            key, obj = fresh.popitem()
            self._put(kind, key, obj)
            yield work_of(obj)

    def apply(self, kind: Kind, event: str, obj: Object) -> None:
        """Take one watch event: ADDED, MODIFIED or DELETED."""
        if event == "DELETED":
            self._remove(kind, key_of(obj))
        else:
            self._put(kind, key_of(obj), obj)

    def mark_synced(self, kind: Kind) -> None:
        """Note that all objects of a kind have been listed once."""
        self._waiting.discard(kind)

    def count_on(self, revision: int) -> Snapshot:
        """Return what was published last as a revision after this one; those to come follow."""
        self._last = replace(self._last, revision=max(self._last.revision, revision) + 1)
        return self._last

    def publish(self, now: int) -> tuple[Snapshot, Changes] | None:
        """Return what stands now and what changed since the last call, None if nothing did.

        now -- Unix seconds, the SOA serial if one is due
        """
        resynced = self.synced and not self._synced_told
        changes = Changes(
            frozenset(self._changed_services | self._slices.changed),
            frozenset(self._changed_namespaces),
            frozenset(self._changed_pods),
            resynced,
            frozenset(self._changed_imports | self._import_slices.changed),
            frozenset(self._changed_nodes),
            frozenset(self._changed_service_cidrs),
        )
        if not changes:
            return None
        last = self._last
        self._last = Snapshot(
            revision=last.revision + 1,
            services=self._services.publish(),
            slices=self._slices.publish(),
            namespaces=self._namespaces.publish().get("", {}),
            pods=self._pods.publish(),
            synced=self.synced,
            changed_at=now if self._bump else last.changed_at,
            imports=self._imports.publish(),
            import_slices=self._import_slices.publish(),
            imports_changed_at=now if self._bump_imports else last.imports_changed_at,
            nodes=self._nodes.publish().get("", {}),
            service_cidrs=self._service_cidrs.publish().get("", {}),
        )
        self._changed_services.clear()
        self._changed_namespaces.clear()
        self._changed_pods.clear()
        self._changed_imports.clear()
        self._changed_nodes.clear()
        self._changed_service_cidrs.clear()
        self._bump = self._bump_imports = False
        self._synced_told = self.synced
        return self._last, changes

    # --- one object -------------------------------------------------------------------

    def _put(self, kind: Kind, key: Key, obj: Object) -> None:
        objects = self._objects.setdefault(kind, {})
        old = objects.get(key)
        if old is not None and same(old, obj):
            return
        if isinstance(obj, Pod) and obj.metadata.deletion_timestamp:
            return  # its record stays as it was until DELETED (reference 1.6)
        objects[key] = obj
        self._note_bump(old, obj)
        match obj:
            case Service():
                self._services.put(key, obj)
                self._changed_services.add(key)
            case EndpointSlice():
                before = old if isinstance(old, EndpointSlice) else None
                self._slices.move(before, obj)
                self._import_slices.move(before, obj)
            case ServiceImport():
                self._imports.put(key, obj)
                self._changed_imports.add(key)
            case Namespace():
                self._namespaces.put(key, obj)
                self._changed_namespaces.add(key[1])
            case Pod():
                self._pods.put(key, obj)
                self._changed_pods.add(key)
            case Node():
                self._nodes.put(key, obj)
                self._changed_nodes.add(key[1])
            case ServiceCIDR():
                self._service_cidrs.put(key, obj)
                self._changed_service_cidrs.add(key[1])

    def _remove(self, kind: Kind, key: Key) -> None:
        old = self._objects.get(kind, {}).pop(key, None)
        if old is None:
            return
        self._note_bump(old, None)
        match old:
            case Service():
                self._services.remove(key)
                self._changed_services.add(key)
            case EndpointSlice():
                self._slices.move(old, None)
                self._import_slices.move(old, None)
            case ServiceImport():
                self._imports.remove(key)
                self._changed_imports.add(key)
            case Namespace():
                self._namespaces.remove(key)
                self._changed_namespaces.add(key[1])
            case Pod():
                self._pods.remove(key)
                self._changed_pods.add(key)
            case Node():
                self._nodes.remove(key)
                self._changed_nodes.add(key[1])
            case ServiceCIDR():
                self._service_cidrs.remove(key)
                self._changed_service_cidrs.add(key[1])

    def _note_bump(self, old: Object | None, new: Object | None) -> None:
        self._bump = self._bump or bumps_serial(old, new)
        self._bump_imports = self._bump_imports or bumps_imports_serial(old, new)


def work_of(obj: Object) -> int:
    """Return what it takes to take over an object, by what a Service takes."""
    if isinstance(obj, EndpointSlice) and obj.endpoints:
        return 1 + len(obj.endpoints) // ENDPOINTS
    return 1


def same(a: Object, b: Object) -> bool:
    """True if two versions of an object are equal in all that is read of it.

    The resourceVersion is not: it changes with every write of a field we do not know.
    """
    if a.metadata.resource_version == b.metadata.resource_version and a.metadata == b.metadata:
        return a == b
    if not _same_meta(a.metadata, b.metadata):
        return False
    match a, b:
        case Service(), Service():
            return a.spec == b.spec and a.status == b.status
        case ServiceImport(), ServiceImport():
            return a.spec == b.spec
        case EndpointSlice(), EndpointSlice():
            return (
                a.address_type == b.address_type
                and a.endpoints == b.endpoints
                and a.ports == b.ports
            )
        case Pod(), Pod():
            return a.status == b.status
        case Namespace(), Namespace():
            return True
        case Node(), Node():
            return a.spec == b.spec and a.status == b.status
        case ServiceCIDR(), ServiceCIDR():
            return a.spec == b.spec
    return False


def _same_meta(a: Meta, b: Meta) -> bool:
    return (
        a.uid == b.uid
        and a.labels == b.labels
        and a.annotations == b.annotations
        and a.deletion_timestamp == b.deletion_timestamp
    )


def bumps_serial(old: Object | None, new: Object | None) -> bool:
    """Decide whether a new, changed or deleted object changes the SOA serial (reference 1.9,
    1.19).

    Namespaces, Nodes and ServiceCIDRs never do, nor does a clusterIP that changes by update.
    """
    if isinstance(new or old, (Namespace, Node, ServiceCIDR, ServiceImport)):
        return False
    match old, new:
        case Service(), Service():
            return old.spec.external_name != new.spec.external_name or [
                (p.name, p.port, p.protocol) for p in old.spec.ports or ()
            ] != [(p.name, p.port, p.protocol) for p in new.spec.ports or ()]
        case EndpointSlice(), EndpointSlice():
            return _endpoints_shown(old) != _endpoints_shown(new)
        case Pod(), Pod():
            return old.status.pod_ip != new.status.pod_ip
    return True


def bumps_imports_serial(old: Object | None, new: Object | None) -> bool:
    """Decide the same for multicluster zones.

    CoreDNS passes over ServiceImports that come or go, and over their addresses: secondaries
    would never hear of them.
    """
    match old, new:
        case ServiceImport(), ServiceImport():
            return old.spec != new.spec
        case (ServiceImport(), _) | (_, ServiceImport()):
            return True
        case EndpointSlice(), EndpointSlice():
            before, after = _imported_from(old), _imported_from(new)
            return before != after or (after is not None and bumps_serial(old, new))
        case (EndpointSlice() as one, None) | (None, EndpointSlice() as one):
            return _imported_from(one) is not None
    return False


def _imported_from(one: EndpointSlice) -> tuple[str, str] | None:
    """Return (ServiceImport, cluster) of a slice; None if it is no import's."""
    labels = one.metadata.labels or {}
    name = labels.get(IMPORT_NAME_LABEL)
    return (name, labels.get(SOURCE_CLUSTER_LABEL, "")) if name else None


def _endpoints_shown(one: EndpointSlice) -> object:
    return (
        [(address, endpoint.hostname or "") for endpoint, address, _, _ in published((one,))],
        [(p.name or "", p.port, p.protocol or "") for p in one.ports or ()],
    )
