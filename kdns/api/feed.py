"""The registry's source that is the embedded API's own store: no HTTP in between.

Decides what of the store a reader of the registry gets. It is read by the same checks as a
watch of an API server, in the turn of the loop in which a write is committed: who reads DNS
after an acknowledged write finds it done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from kdns.api.kinds import BY_PLURAL
from kdns.api.objects import seen_as, selector_of
from kdns.api.store import Event, ObjectStore, Stored
from kdns.errors import ObjectError
from kdns.metrics import Metrics
from kdns.pipeline import Pipeline
from kdns.registry.decode import broken_key, decode_event, decode_page
from kdns.registry.objects import (
    ENDPOINT_SLICE,
    NAMESPACE,
    NODE,
    POD,
    SERVICE,
    SERVICE_CIDR,
    Kind,
)
from kdns.registry.spec import KubeSpec, ManifestSpec
from kdns.source import follow as elsewhere
from kdns.source.selectors import selectors_of
from kdns.source.sink import Tally

HEARD: Final = 30.0  # seconds; a source not heard of for three minutes counts as stale
RESOURCES: Final = {
    SERVICE: BY_PLURAL["", "services"],
    NAMESPACE: BY_PLURAL["", "namespaces"],
    POD: BY_PLURAL["", "pods"],
    NODE: BY_PLURAL["", "nodes"],
    ENDPOINT_SLICE: BY_PLURAL["discovery.k8s.io", "endpointslices"],
    SERVICE_CIDR: BY_PLURAL["networking.k8s.io", "servicecidrs"],
}


class StoreFeed:
    """Feeds every pipeline that asks for the embedded registry.

    frozen -- readers keep what they have, as with an API server that went silent
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._readers: list[_Reader] = []
        self.frozen = False

    async def follow(self, spec: KubeSpec | ManifestSpec, sink: Pipeline, metrics: Metrics) -> None:
        """Run the source of a spec for ever: ours where it names no other."""
        if isinstance(spec, ManifestSpec) or spec.endpoint or spec.kubeconfig:
            await elsewhere.follow(spec, sink, metrics)
            return
        reader = _Reader(self._store, spec, sink, Tally(metrics))
        end = self._store.subscribe(self._teller(reader))
        self._readers.append(reader)
        try:
            reader.list_all()
            while True:
                await asyncio.sleep(HEARD)
                if not self.frozen:
                    reader.heard()
        finally:
            end()
            self._readers.remove(reader)

    def freeze(self) -> None:
        """Tell readers nothing any more."""
        self.frozen = True

    def thaw(self) -> None:
        """Tell readers what came meanwhile, and everything from now on."""
        if self.frozen:
            self.frozen = False
            for reader in self._readers:
                reader.list_all()

    def _teller(self, reader: _Reader) -> Callable[[Sequence[Event]], None]:
        def tell(events: Sequence[Event]) -> None:
            if not self.frozen:
                reader.take(events)

        return tell


class _Reader:
    """One pipeline and what it wants to know."""

    def __init__(self, store: ObjectStore, spec: KubeSpec, sink: Pipeline, tally: Tally) -> None:
        self._store = store
        self._sink = sink
        self._tally = tally
        self._kinds = spec.kinds
        self._chosen: Mapping[Kind, Callable[[Stored], bool]] = {
            kind: _chosen(spec, kind) for kind in spec.kinds if kind in RESOURCES
        }
        self._kind_of = {RESOURCES[kind].qualified: kind for kind in self._chosen}

    def list_all(self) -> None:
        """Tell everything there is; kinds that the embedded API does not have are empty."""
        for kind in self._kinds:
            if kind in self._chosen:
                self._list(kind)
            self._sink.mark_synced(kind)
        self.heard()
        self._sink.publish()

    def heard(self) -> None:
        for kind in self._kinds:
            self._sink.heard(kind)

    def take(self, events: Sequence[Event]) -> None:
        """Tell what a commit changed, and have it published before its writer hears of it."""
        told = False
        for event in events:
            kind = self._kind_of.get(event.stored.key[0])
            if kind is None:
                continue
            seen = seen_as(event, self._chosen[kind])
            if seen is not None:
                self._apply(kind, seen, event.stored)
                told = True
        if told:
            self._sink.publish()

    def _list(self, kind: Kind) -> None:
        items = self._store.items(RESOURCES[kind].qualified)
        page = decode_page(kind, _list_body(filter(self._chosen[kind], items)))
        self._sink.replace(kind, page.objects, {broken_key(e) for e in page.errors})
        for error in page.errors:
            self._tally.skipped(error)

    def _apply(self, kind: Kind, seen: str, stored: Stored) -> None:
        event = decode_event(kind, b'{"type":"%s","object":%s}' % (seen.encode(), stored.body))
        if event.obj is not None:
            self._sink.apply(kind, event.type, event.obj)
        elif isinstance(event.error, ObjectError):
            self._tally.skipped(event.error)


def _chosen(spec: KubeSpec, kind: Kind) -> Callable[[Stored], bool]:
    selectors = dict(selectors_of(spec, kind))
    return selector_of(
        RESOURCES[kind], selectors.get("labelSelector", ""), selectors.get("fieldSelector", "")
    )


def _list_body(items: Iterable[Stored]) -> bytes:
    return b'{"metadata":{},"items":[%s]}' % b",".join(one.body for one in items)
