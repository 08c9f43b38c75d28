"""Objects whose owners are gone: the garbage collector.

Decides what a deletion takes with it (background), waits for (foreground) or lets go
(orphan), by metadata.ownerReferences. Upstream: garbagecollector.go.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from kdns.api.controllers.index import Index, Owner, decode_meta
from kdns.api.controllers.writes import Propagation, Writer, without_owners
from kdns.api.kinds import BY_KIND, RESOURCES, Resource
from kdns.api.objects import FOREGROUND, ORPHAN
from kdns.api.store import Event, Key, Obj, Stored

NAME: Final = "garbage-collector"
BY_QUALIFIED: Final = {resource.qualified: resource for resource in RESOURCES}


class Collector:
    """The controller; its keys are "resource namespace name"."""

    def __init__(self, writer: Writer, index: Index, queue: Callable[[str], None]) -> None:
        self._writer = writer
        self._objects = writer.objects
        self._index = index
        self._queue = queue

    # --- when -------------------------------------------------------------------------

    def seen(self, event: Event) -> None:
        stored = event.stored
        if event.type == "DELETED":
            for key in self._index.dependents_of(stored.uid):
                self._look(key)
            # Of one that is gone: owners that wait for it to go.
            if event.before is not None and b'"ownerReferences"' in event.before.body:
                for owner in decode_meta(event.before).ownerReferences:
                    self._look_at_owner(stored.key, owner)
            return
        if b"Deletion" in stored.body or b'"orphan"' in stored.body:
            finalizers = decode_meta(stored).finalizers
            if FOREGROUND in finalizers or ORPHAN in finalizers:
                self._look(stored.key)
        owners = self._index.owners.get(stored.key, ())
        if any(self._owner(stored.key, one) is not None and not self._lives(stored.key, one)
               for one in owners):  # fmt: skip
            self._look(stored.key)

    def _look(self, key: Key) -> None:
        self._queue(" ".join(key))

    def _look_at_owner(self, dependent: Key, owner: Owner) -> None:
        key = self._owner(dependent, owner)
        if key is not None:
            found = self._objects.store.get(key)
            if found is not None and b'"foregroundDeletion"' in found.body:
                self._look(key)

    def _owner(self, dependent: Key, owner: Owner) -> Key | None:
        """Return where an owner is; None for a kind that is not ours to know."""
        resource = BY_KIND.get((owner.apiVersion, owner.kind))
        if resource is None:
            return None
        return resource.qualified, dependent[1] if resource.namespaced else "", owner.name

    def _lives(self, dependent: Key, owner: Owner) -> bool:
        """True if an owner is there, or may be."""
        key = self._owner(dependent, owner)
        if key is None:
            return True
        found = self._objects.store.get(key)
        return found is not None and found.uid == owner.uid

    # --- what -------------------------------------------------------------------------

    async def reconcile(self, key: str) -> float | None:
        qualified, namespace, name = key.split(" ")
        resource = BY_QUALIFIED[qualified]
        stored = self._objects.find(resource, namespace, name)
        if stored is None:
            return None
        meta = decode_meta(stored)
        if meta.deletionTimestamp is not None:
            if ORPHAN in meta.finalizers:
                await self._orphan(resource, stored)
            elif FOREGROUND in meta.finalizers:
                await self._await_dependents(resource, stored)
            return None
        await self._collect(resource, stored, meta.ownerReferences)
        return None

    async def _collect(self, resource: Resource, stored: Stored, owners: list[Owner]) -> None:
        """Delete a dependent without owners; else take from it those that are gone."""
        gone = {one.uid for one in owners if not self._lives(stored.key, one)}
        waiting = {one.uid for one in owners if one.uid not in gone and self._waits(stored, one)}
        solid = [one for one in owners if one.uid not in gone | waiting]
        if not gone and not waiting:
            return
        if solid:
            await self._disown(resource, stored, gone | waiting)
            return
        foreground = bool(waiting) and bool(self._index.dependents_of(stored.uid))
        how: Propagation = "Foreground" if foreground else "Background"
        await self._writer.delete(resource, stored.key[1], stored.key[2], stored.uid, how)

    def _waits(self, dependent: Stored, owner: Owner) -> bool:
        """True if an owner is being deleted and waits for its dependents."""
        key = self._owner(dependent.key, owner)
        found = self._objects.store.get(key) if key is not None else None
        if found is None or b'"foregroundDeletion"' not in found.body:
            return False
        meta = decode_meta(found)
        return meta.deletionTimestamp is not None and FOREGROUND in meta.finalizers

    async def _disown(self, resource: Resource, stored: Stored, uids: set[str]) -> None:
        await self._writer.change(resource, stored, without_owners(uids))

    async def _orphan(self, resource: Resource, stored: Stored) -> None:
        for key in self._index.dependents_of(stored.uid):
            found = self._objects.store.get(key)
            if found is not None:
                await self._disown(BY_QUALIFIED[key[0]], found, {stored.uid})
        await self._unfinalize(resource, stored, ORPHAN)

    async def _await_dependents(self, resource: Resource, stored: Stored) -> None:
        """Delete the dependents; let the owner go once none is left that blocks it."""
        blocking = False
        for key in self._index.dependents_of(stored.uid):
            owners = self._index.owners.get(key, [])
            blocking |= any(one.uid == stored.uid and one.blockOwnerDeletion for one in owners)
            self._look(key)
        if not blocking:
            await self._unfinalize(resource, stored, FOREGROUND)

    async def _unfinalize(self, resource: Resource, stored: Stored, finalizer: str) -> None:
        current = self._objects.find(resource, stored.key[1], stored.key[2])
        if current is None or current.uid != stored.uid:
            return

        def change(obj: Obj) -> None:
            meta = obj["metadata"]
            meta["finalizers"] = [one for one in meta.get("finalizers", ()) if one != finalizer]
            if not meta["finalizers"]:
                del meta["finalizers"]

        await self._writer.change(resource, current, change)
