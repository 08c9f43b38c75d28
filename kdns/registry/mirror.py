"""The registry carried to another process: what changed as one value, and snapshots made of it.

Decides what of a snapshot travels: each changed key with what stands there now, and the numbers
that belong to the revision. A Mirror that was told everything once and each change since makes
the very snapshots that the store made: same content, same serials, same keys changed. How the
values travel is server/frames.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

import msgspec

from kdns.registry.objects import (
    EndpointSlice,
    Key,
    Namespace,
    Node,
    Pod,
    Service,
    ServiceCIDR,
    ServiceImport,
)
from kdns.registry.snapshot import Changes, Snapshot, everything
from kdns.registry.store import Shelf

T = TypeVar("T")
# Of Kubernetes' keys (registry/gate.py): what keeps a Service's rules from the kernel.
State = Callable[[Key], str]
PIECE = 500  # keys of a Delta when all there is must go: some 250 kB


def no_state(key: Key) -> str:
    """There is no gate."""
    return ""


class Delta(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One revision, or a piece of it.

    more     -- the revision has further pieces
    resynced -- Changes.synced
    services -- namespace, name, the Service or None, its slices, its state at the gate
    imports  -- namespace, name, the ServiceImport or None, its slices
    others   -- name (and namespace), the object or None
    """

    revision: int = 0
    more: bool = False
    synced: bool = False
    resynced: bool = False
    changed_at: int = 0
    imports_changed_at: int = 0
    services: list[tuple[str, str, Service | None, tuple[EndpointSlice, ...], str]] = []
    namespaces: list[tuple[str, Namespace | None]] = []
    pods: list[tuple[str, str, Pod | None]] = []
    imports: list[tuple[str, str, ServiceImport | None, tuple[EndpointSlice, ...]]] = []
    nodes: list[tuple[str, Node | None]] = []
    service_cidrs: list[tuple[str, ServiceCIDR | None]] = []


def delta_of(snapshot: Snapshot, changes: Changes, state: State = no_state) -> Delta:
    """Return what to tell a Mirror that has all that was before `changes`."""
    return Delta(
        snapshot.revision,
        False,
        snapshot.synced,
        changes.synced,
        snapshot.changed_at,
        snapshot.imports_changed_at,
        [
            (*key, _at(snapshot.services, key), _at(snapshot.slices, key) or (), state(key))
            for key in changes.services
        ],
        [(name, snapshot.namespaces.get(name)) for name in changes.namespaces],
        [(*key, _at(snapshot.pods, key)) for key in changes.pods],
        [
            (*key, _at(snapshot.imports, key), _at(snapshot.import_slices, key) or ())
            for key in changes.imports
        ],
        [(name, snapshot.nodes.get(name)) for name in changes.nodes],
        [(name, snapshot.service_cidrs.get(name)) for name in changes.service_cidrs],
    )


def whole_of(
    snapshot: Snapshot,
    state: State = no_state,
    held: Collection[Key] = (),
    piece: int = PIECE,
) -> Iterator[Delta]:
    """Yield what to tell a Mirror that has nothing, in pieces that are made when asked for.

    held -- Services that the gate has a word on; some are in no snapshot yet
    """
    everywhere = everything(snapshot)
    services = everywhere.services.union(held)
    parts = [
        *(Changes(services=some) for some in _some(services, piece)),
        *(Changes(namespaces=some) for some in _some(everywhere.namespaces, piece)),
        *(Changes(pods=some) for some in _some(everywhere.pods, piece)),
        *(Changes(imports=some) for some in _some(everywhere.imports, piece)),
        *(Changes(nodes=some) for some in _some(everywhere.nodes, piece)),
        *(Changes(service_cidrs=some) for some in _some(everywhere.service_cidrs, piece)),
    ]
    for part in parts:
        yield msgspec.structs.replace(delta_of(snapshot, part, state), more=True)
    yield delta_of(snapshot, Changes(synced=everywhere.synced))


def _some(keys: Collection[T], size: int) -> Iterator[frozenset[T]]:
    rest = iter(keys)
    while some := frozenset(islice(rest, size)):
        yield some


def _at(table: Mapping[str, Mapping[str, T]], key: Key) -> T | None:
    return table.get(key[0], {}).get(key[1])


class Mirror:
    """Makes snapshots of Deltas. One writer; begins with nothing."""

    def __init__(self) -> None:
        self._services: Shelf[Service] = Shelf()
        self._slices: Shelf[tuple[EndpointSlice, ...]] = Shelf()
        self._pods: Shelf[Pod] = Shelf()
        self._imports: Shelf[ServiceImport] = Shelf()
        self._import_slices: Shelf[tuple[EndpointSlice, ...]] = Shelf()
        # What has no namespace stands under "".
        self._namespaces: Shelf[Namespace] = Shelf()
        self._nodes: Shelf[Node] = Shelf()
        self._service_cidrs: Shelf[ServiceCIDR] = Shelf()
        self._states: dict[Key, str] = {}
        self._pieces: list[Delta] = []

    def state(self, key: Key) -> str:
        """Return what Gate.state() said of a Service."""
        return self._states.get(key, "")

    def take(self, delta: Delta) -> tuple[Snapshot, Changes] | None:
        """Return the revision and what changed; None while pieces of it are missing."""
        for namespace, name, service, slices, state in delta.services:
            key = namespace, name
            _put(self._services, key, service)
            _put(self._slices, key, slices or None)
            if state:
                self._states[key] = state
            else:
                self._states.pop(key, None)
        for namespace, name, one, slices in delta.imports:
            _put(self._imports, (namespace, name), one)
            _put(self._import_slices, (namespace, name), slices or None)
        for namespace, name, pod in delta.pods:
            _put(self._pods, (namespace, name), pod)
        _put_all(self._namespaces, delta.namespaces)
        _put_all(self._nodes, delta.nodes)
        _put_all(self._service_cidrs, delta.service_cidrs)
        self._pieces.append(delta)
        if delta.more:
            return None
        pieces, self._pieces = self._pieces, []
        return self._publish(delta), _changes(pieces)

    def _publish(self, last: Delta) -> Snapshot:
        return Snapshot(
            revision=last.revision,
            services=self._services.publish(),
            slices=self._slices.publish(),
            namespaces=self._namespaces.publish().get("", {}),
            pods=self._pods.publish(),
            synced=last.synced,
            changed_at=last.changed_at,
            imports=self._imports.publish(),
            import_slices=self._import_slices.publish(),
            imports_changed_at=last.imports_changed_at,
            nodes=self._nodes.publish().get("", {}),
            service_cidrs=self._service_cidrs.publish().get("", {}),
        )


def _put(shelf: Shelf[Any], key: Key, value: object | None) -> None:
    if value is None:
        shelf.remove(key)
    else:
        shelf.put(key, value)


def _put_all(shelf: Shelf[Any], rows: Sequence[tuple[str, object | None]]) -> None:
    for name, value in rows:
        _put(shelf, ("", name), value)


def _changes(pieces: Sequence[Delta]) -> Changes:
    return Changes(
        services=frozenset((row[0], row[1]) for one in pieces for row in one.services),
        namespaces=frozenset(row[0] for one in pieces for row in one.namespaces),
        pods=frozenset((row[0], row[1]) for one in pieces for row in one.pods),
        synced=any(one.resynced for one in pieces),
        imports=frozenset((row[0], row[1]) for one in pieces for row in one.imports),
        nodes=frozenset(row[0] for one in pieces for row in one.nodes),
        service_cidrs=frozenset(row[0] for one in pieces for row in one.service_cidrs),
    )
