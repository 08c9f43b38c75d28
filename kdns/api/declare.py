"""Manifests that declare what is to be there: applied in a good order, and pruned.

Decides which writes a set of documents comes down to. They are server-side applies of one
manager, so what others have set beside stays, and what the documents no longer say goes.
Reading files and looking at them again is whoever calls.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec

from kdns.api import status
from kdns.api.controllers.nodes import OURS
from kdns.api.kinds import BY_KIND, BY_PLURAL, RESOURCES, Resource
from kdns.api.objects import APPLY_PATCH, How, Objects, Result
from kdns.api.store import Key, Obj
from kdns.errors import ApiError, Problem

if TYPE_CHECKING:
    from kdns.registry.manifests import Document

MAX_LIST_DEPTH: Final = 4  # a List of Lists
AT_ONCE: Final = 50  # writes under way together: they share commits, and DNS gets its turn
NAMESPACE: Final = BY_PLURAL["", "namespaces"]
# What others lean on comes first; a Service before the Pods it selects, as on a cluster.
ORDER: Final[Mapping[str, int]] = {
    kind: rank
    for rank, kind in enumerate(
        "Namespace Node ServiceAccount Secret ConfigMap Service Endpoints EndpointSlice Pod"
        " ReplicaSet Deployment StatefulSet Lease ServiceCIDR Event".split()
    )
}


@dataclass(frozen=True, slots=True)
class Declared:
    """One object of a manifest. where -- "FILE:LINE" its document begins at"""

    where: str
    resource: Resource
    namespace: str
    name: str
    obj: Obj

    @property
    def key(self) -> Key:
        return self.resource.qualified, self.namespace, self.name

    def __str__(self) -> str:
        place = f"{self.namespace}/{self.name}" if self.namespace else self.name
        return f"{self.resource.kind} {place}"


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of one."""

    declared: Declared
    result: Result | None = None
    error: ApiError | None = None


def read_documents(
    documents: Iterable[Document], namespace: str = "default"
) -> tuple[list[Declared], list[Problem]]:
    """Return the objects that documents declare, Lists taken apart, and what is none.

    namespace -- of objects that name none. A problem that is a warning is about a kind that
                 is not served here
    """
    found: dict[Key, Declared] = {}
    problems: list[Problem] = []
    for document in documents:
        for value in _items(document.value, 0):
            one = _declared(document.where, value, namespace)
            if isinstance(one, Problem):
                problems.append(one)
            else:
                found[one.key] = one  # said twice, the last one counts
    return list(found.values()), problems


def problem_at(where: str, text: str, warning: bool = False) -> Problem:
    """Return a problem of what stands at "FILE:LINE"."""
    file, _, line = where.rpartition(":")
    if file and line.isdigit():
        return Problem(file, int(line), text, warning)
    return Problem(where, 0, text, warning)


def _items(value: Any, depth: int) -> Iterator[Any]:
    if (
        isinstance(value, dict)
        and str(value.get("kind") or "").endswith("List")
        and isinstance(value.get("items"), list)
        and depth < MAX_LIST_DEPTH
    ):
        for item in value["items"]:
            yield from _items(item, depth + 1)
    elif value is not None:
        yield value


def _declared(where: str, value: Any, namespace: str) -> Declared | Problem:
    if not isinstance(value, dict):
        return problem_at(where, "not a Kubernetes object: it must be a mapping")
    kind, version = value.get("kind"), value.get("apiVersion")
    if not (isinstance(kind, str) and kind and isinstance(version, str) and version):
        return problem_at(where, "not a Kubernetes object: apiVersion and kind must be set")
    resource = BY_KIND.get((version, kind))
    if resource is None:
        served = [r.api_version for r in RESOURCES if r.kind == kind]
        hint = f"; here it is {served[0]}" if served else ""
        text = f'no matches for kind "{kind}" in version "{version}"{hint}'
        return problem_at(where, text, warning=not served)
    meta = value.get("metadata")
    name = meta.get("name") if isinstance(meta, dict) else None
    if not isinstance(name, str) or not name:
        return problem_at(where, f"{kind}: metadata.name must be set")
    assert isinstance(meta, dict)
    space = meta.get("namespace") or namespace
    if not isinstance(space, str):
        return problem_at(where, f"{kind} {name}: metadata.namespace must be a string")
    return Declared(where, resource, space if resource.namespaced else "", name, value)


async def apply_all(
    objects: Objects, declared: Sequence[Declared], manager: str, *, force: bool = True
) -> list[Applied]:
    """Apply objects, namespaces that are missing made first; return what became of each, in
    the order they were given."""
    await _make_namespaces(objects, declared, manager)
    how = How(manager=manager, force=force)
    done: dict[Key, Applied] = {}
    waiting = sorted(declared, key=_rank)
    while waiting:
        first = _rank(waiting[0])
        batch = [one for one in waiting[:AT_ONCE] if _rank(one) == first]
        del waiting[: len(batch)]
        for applied in await asyncio.gather(*(_apply(objects, one, how) for one in batch)):
            done[applied.declared.key] = applied
    return [done[one.key] for one in declared]


def _rank(one: Declared) -> tuple[int, bool]:
    """Addresses that a manifest names are taken before any is given out."""
    spec = one.obj.get("spec")
    named = isinstance(spec, dict) and bool(spec.get("clusterIP") or spec.get("clusterIPs"))
    return ORDER.get(one.resource.kind, len(ORDER)), not named


async def _apply(objects: Objects, one: Declared, how: How) -> Applied:
    try:
        body = msgspec.json.encode(_for_our_nodes(objects, one, _appliable(one)))
        result = await objects.patch(one.resource, one.namespace, one.name, APPLY_PATCH, body, how)
    except ApiError as e:
        return Applied(one, None, e)
    except (TypeError, ValueError, RecursionError) as e:  # keys or values JSON does not know
        return Applied(one, None, status.bad_request(f"cannot be written as JSON: {e}"))
    return Applied(one, result)


def _appliable(one: Declared) -> Obj:
    """Return the object without what only a server says: a manifest may be the output of
    `kubectl get -o yaml`."""
    meta = {k: v for k, v in one.obj["metadata"].items() if k not in _SERVERS_OWN}
    if one.resource.namespaced:
        meta["namespace"] = one.namespace
    return {**one.obj, "metadata": meta}


def _for_our_nodes(objects: Objects, one: Declared, obj: Obj) -> Obj:
    """Leave out the Pod ranges of a Node that kdns itself made: they were given at its start
    and cannot change, and manifests of a real cluster's Nodes say others."""
    if one.resource.kind != "Node" or not isinstance(obj.get("spec"), dict):
        return obj
    found = objects.find(one.resource, "", one.name)
    if found is None or OURS.encode() not in found.body:
        return obj
    spec = {k: v for k, v in obj["spec"].items() if k not in ("podCIDR", "podCIDRs")}
    return {**obj, "spec": spec}


_SERVERS_OWN = frozenset(
    {"managedFields", "resourceVersion", "uid", "creationTimestamp", "generation", "selfLink"}
)


async def _make_namespaces(objects: Objects, declared: Sequence[Declared], manager: str) -> None:
    wanted = dict.fromkeys(one.namespace for one in declared if one.namespace)
    declares = {one.name for one in declared if one.resource is NAMESPACE}
    for name in wanted:
        if name in declares or objects.find(NAMESPACE, "", name) is not None:
            continue
        try:
            await objects.create(NAMESPACE, "", {"metadata": {"name": name}}, How(manager=manager))
        except ApiError as e:
            if e.code == 507:
                raise
            # A name that is none: its objects say so too.


async def prune(objects: Objects, keep: Iterable[Key], manager: str) -> list[Key]:
    """Delete what `manager` has applied once and declares no more; return their keys."""
    kept = set(keep)
    gone: list[Key] = []
    mark = b'"manager":"%s"' % manager.encode()
    for resource in sorted(RESOURCES, key=lambda r: -ORDER.get(r.kind, len(ORDER))):
        for stored in objects.store.items(resource.qualified):
            if stored.key in kept or mark not in stored.body:
                continue
            meta = stored.obj["metadata"]
            if meta.get("deletionTimestamp") or not _applied_by(meta, manager):
                continue
            try:
                await objects.delete(resource, stored.key[1], stored.key[2])
            except ApiError as e:
                if e.code != 404:
                    raise
            gone.append(stored.key)
    return gone


def _applied_by(meta: Mapping[str, Any], manager: str) -> bool:
    return any(
        entry.get("manager") == manager and entry.get("operation") == "Apply"
        for entry in meta.get("managedFields") or ()
    )
