"""How controllers write: as upstream's components, and only what differs.

Decides nothing about objects; gives every controller the same few ways to change one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from kdns.api import status
from kdns.api.kinds import Resource
from kdns.api.objects import Deletion, How, Objects
from kdns.api.store import Conflicted, Obj, Put, Stored
from kdns.errors import ApiError

Change: TypeAlias = Callable[[Obj], None]
Propagation: TypeAlias = Literal["Background", "Foreground", "Orphan"]

# Who upstream's writes come from, as managedFields names them.
CONTROLLERS: Final = "kube-controller-manager"
KUBELET: Final = "kubelet"
APISERVER: Final = "kube-apiserver"
AT_ONCE: Final = 10  # writes begun together: they share a commit, and others get the loop


@dataclass(frozen=True, slots=True)
class Writer:
    """Writes for one component."""

    objects: Objects
    manager: str = CONTROLLERS

    async def create(self, resource: Resource, namespace: str, obj: Obj) -> Obj:
        """Raises ApiError."""
        return (await self.objects.create(resource, namespace, obj, self._how())).obj

    async def ensure(self, resource: Resource, namespace: str, obj: Obj) -> bool:
        """Create what is not there; True if it was not. Raises ApiError."""
        if self.objects.find(resource, namespace, obj["metadata"]["name"]) is not None:
            return False
        try:
            await self.create(resource, namespace, obj)
        except ApiError as e:
            if e.reason != "AlreadyExists":
                raise
            return False
        return True

    async def change(
        self, resource: Resource, stored: Stored, change: Change, subresource: str = ""
    ) -> Obj | None:
        """Change the version read; nothing is written, and None returned, if that changes
        nothing. Raises ApiError 409 if it is no longer the last."""
        old, new = stored.obj, stored.obj
        change(new)
        if new == old:
            return None
        result = await self.objects.replace(
            resource, stored.key[1], stored.key[2], new, self._how(), subresource
        )
        return result.obj

    async def put_status(self, resource: Resource, stored: Stored, wanted: Obj) -> bool:
        """Make `wanted` the status of the version read; False if it is that already."""

        def change(obj: Obj) -> None:
            obj["status"] = wanted

        return await self.change(resource, stored, change, "status") is not None

    async def delete(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        uid: str,
        propagation: Propagation = "Background",
        grace: int | None = None,
    ) -> bool:
        """Delete this very object; False if it is gone already. Raises ApiError."""
        deletion = Deletion(uid=uid, propagation=propagation, grace=grace)
        try:
            await self.objects.delete(resource, namespace, name, deletion)
        except ApiError as e:
            if e.code == 404 or "UID in precondition" in str(e):
                return False
            raise
        return True

    async def force(self, resource: Resource, stored: Stored, obj: Obj) -> None:
        """Write what no client may (a Pod's node, a loopback endpoint), past the kind's
        rules. Raises ApiError 409."""
        try:
            await self.objects.store.write(Put(stored.key, obj, stored.revision))
        except Conflicted:
            raise status.conflict(resource, stored.key[2], status.MODIFIED) from None

    def _how(self) -> How:
        return How(manager=self.manager, field_validation="Ignore")


async def in_turns(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Await some at a time: their writes share a commit, and others get the loop between."""
    batch: list[Coroutine[Any, Any, None]] = []
    failures: list[BaseException] = []

    async def flush() -> None:
        done = await asyncio.gather(*batch, return_exceptions=True)
        failures.extend(one for one in done if isinstance(one, BaseException))
        batch.clear()

    pending = list(works)
    try:
        while pending and not failures:
            batch.extend(pending[:AT_ONCE])
            del pending[:AT_ONCE]
            await flush()
    finally:
        for work in pending:
            work.close()
    if failures:
        raise failures[0]


def terminating(error: ApiError) -> bool:
    """True if a create was refused because the namespace is on its way out, or gone: nothing
    that a controller could do better."""
    return (error.code == 403 and "being terminated" in str(error)) or (
        error.code == 404 and error.details.get("kind") == "namespaces"
    )


def owner_reference(obj: Obj) -> Obj:
    """Return the ownerReference of what `obj` controls."""
    meta = obj["metadata"]
    return {
        "apiVersion": obj["apiVersion"],
        "kind": obj["kind"],
        "name": meta["name"],
        "uid": meta["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


def owned_by(owner: Obj) -> Change:
    """Return the change that makes `owner` the controller of an object."""

    def change(obj: Obj) -> None:
        obj["metadata"].setdefault("ownerReferences", []).append(owner_reference(owner))

    return change


def without_owners(uids: Container[str]) -> Change:
    """Return the change that takes owners from an object."""

    def change(obj: Obj) -> None:
        meta = obj["metadata"]
        left = [one for one in meta.get("ownerReferences", ()) if one["uid"] not in uids]
        if left:
            meta["ownerReferences"] = left
        else:
            meta.pop("ownerReferences", None)

    return change


def set_condition(
    conditions: list[Obj], new: Mapping[str, Any], now: str, *, updated: bool = False
) -> None:
    """Set a condition by its type, in place; lastTransitionTime moves with its status.

    updated -- the kind has lastUpdateTime as well
    """
    old = next((one for one in conditions if one["type"] == new["type"]), None)
    if old is not None and all(old.get(k) == v for k, v in new.items()):
        return
    moved = old is None or old["status"] != new["status"] or "lastTransitionTime" not in old
    entry = {
        **new,
        "lastTransitionTime": now if moved or old is None else old["lastTransitionTime"],
    }
    if updated:
        entry["lastUpdateTime"] = now
    if old is None:
        conditions.append(entry)
    else:
        conditions[conditions.index(old)] = entry


def condition_of(conditions: list[Obj], kind: str) -> Obj | None:
    return next((one for one in conditions if one["type"] == kind), None)
