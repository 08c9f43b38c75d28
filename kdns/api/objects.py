"""The one way to objects of the embedded API: for HTTP, for controllers, for the library.

Decides what happens to an object on its way in: fields checked, defaults, addresses given,
validation, versions, deletion in two steps where finalizers ask for it. What each kind may
hold is validation.py's, what a patch says patch.py's and apply.py's, how it is kept store.py's.
Reference: kubectl 3.1, 3.2; upstream's registry strategies.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import random
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Literal, TypeAlias

from kdns.api import status
from kdns.api.allocate import Allocator
from kdns.api.apply import apply_object, track_update
from kdns.api.aside import LARGE, Aside
from kdns.api.defaults import prepare, set_defaults
from kdns.api.kinds import BY_PLURAL, Resource
from kdns.api.patch import copied, json_patch, merge_patch, strategic_merge
from kdns.api.store import Conflicted, Delete, Event, Key, Obj, ObjectStore, Put, Stored
from kdns.api.strict import check_object, parse_json, parse_yaml, settle
from kdns.api.validation import validate, warnings_about
from kdns.errors import ApiError
from kdns.registry.selectors import BadSelector, parse_selector

FieldValidation: TypeAlias = Literal["Strict", "Warn", "Ignore"]
Texts: TypeAlias = list[str]  # Objects has a method of that name

JSON_PATCH = "application/json-patch+json"
MERGE_PATCH = "application/merge-patch+json"
STRATEGIC_PATCH = "application/strategic-merge-patch+json"
APPLY_PATCH = "application/apply-patch+yaml"
PATCHES = (JSON_PATCH, MERGE_PATCH, STRATEGIC_PATCH, APPLY_PATCH)

# Tries to write a patch over what others write in between, as upstream.
ATTEMPTS = 5
# Letters and digits of generated names: none that look alike or make words (upstream).
NAME_LETTERS = "bcdfghjklmnpqrstvwxz2456789"
MAX_GENERATED_BASE = 58  # of 63, so that five letters fit
FOREGROUND, ORPHAN = "foregroundDeletion", "orphan"
NAMESPACE = BY_PLURAL["", "namespaces"]
# Namespaces that nobody may delete (upstream's NamespaceLifecycle).
IMMORTAL = frozenset({"default", "kube-system", "kube-public"})
# Kinds whose objects have no generation.
NO_GENERATION = frozenset(
    {"Event", "ConfigMap", "Secret", "ServiceAccount", "Endpoints", "Lease", "Namespace", "Node"}
    | {"Service"}
)
ENDED = frozenset({"Succeeded", "Failed"})  # phases of Pods that have nothing left to end
DEFAULT_GRACE = 30  # seconds
MAX_GRACE = 1 << 31  # seconds; later than that is later than the year 9999 for some
FINALIZE = "finalize"  # the subresource that spec.finalizers of a Namespace are written by


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a write. warnings -- for the Warning header"""

    obj: Obj
    warnings: tuple[str, ...] = ()
    created: bool = False


@dataclass(frozen=True, slots=True)
class Listing:
    """Some objects of a resource. more -- token of the rest, "" if that was all; remaining --
    how many those are, None where selectors leave it unknown"""

    items: Sequence[Stored]
    revision: int
    more: str = ""
    remaining: int | None = None


@dataclass(frozen=True, slots=True)
class How:
    """What a write's query parameters say.

    problems -- what is odd about how its body is written: keys given twice
    size     -- octets of the body: huge ones are looked at beside the event loop
    """

    manager: str = ""
    dry_run: bool = False
    field_validation: FieldValidation = "Warn"
    force: bool = False
    problems: tuple[str, ...] = ()
    size: int = 0


@dataclass(frozen=True, slots=True)
class Deletion:
    """What a DELETE's body says."""

    uid: str = ""
    resource_version: str = ""
    propagation: Literal["Background", "Foreground", "Orphan"] = "Background"
    grace: int | None = None
    dry_run: bool = False


def now_text(seconds: float) -> str:
    """Return Unix seconds as Kubernetes writes times."""
    return _second_text(int(seconds))


@lru_cache(16)  # asked for several times a write
def _second_text(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Objects:
    """All objects, behind the rules of their kinds.

    clock -- Unix seconds; rng -- for generated names; new_uid -- for tests
    """

    def __init__(
        self,
        store: ObjectStore,
        allocator: Allocator,
        *,
        clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
        new_uid: Callable[[], str] = lambda: str(uuid.uuid4()),
    ) -> None:
        self.store = store
        self.allocator = allocator
        self._clock = clock
        self._rng = rng or random.SystemRandom()
        self._new_uid = new_uid
        self.aside = Aside()

    # --- reading ----------------------------------------------------------------------

    def get(self, resource: Resource, namespace: str, name: str) -> Stored:
        """Return an object. Raises ApiError 404."""
        found = self.store.get(_key(resource, namespace, name))
        if found is None:
            raise status.not_found(resource, name)
        return found

    def find(self, resource: Resource, namespace: str, name: str) -> Stored | None:
        """Return an object, or None."""
        return self.store.get(_key(resource, namespace, name))

    def list(
        self,
        resource: Resource,
        namespace: str = "",
        *,
        labels: str = "",
        fields: str = "",
        limit: int = 0,
        more: str = "",
    ) -> Listing:
        """Return objects that two selectors choose. Raises ApiError 400.

        limit -- 0: all; more -- the token of the list before
        """
        chosen = selector_of(resource, labels, fields)
        items: Sequence[Stored] = self.store.items(resource.qualified, namespace)
        if more:
            after = _parse_more(more)
            items = [one for one in items if one.key[1:] > after]
        if labels or fields:
            items = [one for one in items if chosen(one)]
        revision = self.store.revision
        if not limit or len(items) <= limit:
            return Listing(items, revision)
        page = items[:limit]
        remaining = None if labels or fields else len(items) - limit
        return Listing(page, revision, _render_more(page[-1].key), remaining)

    # --- writing ----------------------------------------------------------------------

    async def create(
        self, resource: Resource, namespace: str, obj: Obj, how: How = How()
    ) -> Result:
        """Make an object. Raises ApiError."""
        obj, warnings = await self.aside.run(how.size, self._checked, resource, obj, how)
        meta = self._meta(resource, namespace, obj)
        if not meta.get("name"):
            base = meta.get("generateName")
            if not base:
                raise status.invalid(
                    resource, "",
                    [status.Cause("FieldValueRequired",
                                  "Required value: name or generateName is required",
                                  "metadata.name")],
                )  # fmt: skip
            tail = "".join(self._rng.choice(NAME_LETTERS) for _ in range(5))
            meta["name"] = f"{base[:MAX_GENERATED_BASE]}{tail}"
        if meta.get("resourceVersion"):
            raise status.bad_request("resourceVersion should not be set on objects to be created")
        return await self._make(resource, namespace, obj, how, warnings)

    async def replace(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        obj: Obj,
        how: How = How(),
        subresource: str = "",
    ) -> Result:
        """Put an object in the place of what is there. Raises ApiError; 409 if it says of
        which version it is, and that is no longer the last."""
        obj, warnings = await self.aside.run(how.size, self._checked, resource, obj, how)
        meta = self._meta(resource, namespace, obj)
        if meta.get("name", name) != name:
            raise status.bad_request(
                f"the name of the object ({meta['name']}) does not match the name on the URL"
                f" ({name})"
            )
        meta["name"] = name
        version = str(meta.get("resourceVersion") or "")

        def change(current: Obj) -> Obj:
            found = current["metadata"]
            if version and version != found["resourceVersion"]:
                raise status.conflict(resource, name, status.MODIFIED)
            if meta.get("uid") and meta["uid"] != found["uid"]:
                raise status.conflict(
                    resource, name,
                    f"Precondition failed: UID in precondition: {meta['uid']}, UID in object"
                    f" meta: {found['uid']}",
                )  # fmt: skip
            fresh: Obj = copied(obj)
            return fresh

        return await self._update(resource, namespace, name, change, how, subresource, warnings)

    async def patch(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        content_type: str,
        body: bytes,
        how: How = How(),
        subresource: str = "",
    ) -> Result:
        """Change an object as a patch says; an apply patch makes what is not there.
        Raises ApiError."""
        how = replace(how, size=len(body))
        if content_type == APPLY_PATCH:
            told: Texts = []
            applied = await self.aside.run(how.size, parse_yaml, body, told)
            how = replace(how, problems=tuple(told))
            return await self._apply(resource, namespace, name, applied, how, subresource)
        patch: Any = None
        twice: Texts = []
        if content_type in (MERGE_PATCH, STRATEGIC_PATCH):
            patch, twice = await self.aside.run(how.size, parse_json, body)
        elif content_type != JSON_PATCH:
            raise status.unsupported_media(
                "the body of the request was in an unknown format - accepted media types"
                f" include: {', '.join(PATCHES)}"
            )
        warnings: Texts = []

        def change(current: Obj) -> Obj:
            if content_type == JSON_PATCH:
                changed = json_patch(current, body)
            elif content_type == MERGE_PATCH:
                changed = merge_patch(current, patch)
            else:
                changed = strategic_merge(resource.type, current, patch)
            checked, told = self._patched(resource, changed, how, body, twice)
            warnings[:] = told
            meta = checked.get("metadata") or {}
            found = current["metadata"]
            if meta.get("resourceVersion", found["resourceVersion"]) != found["resourceVersion"]:
                raise status.conflict(resource, name, status.MODIFIED)
            if meta.get("name") != name or meta.get("uid", found["uid"]) != found["uid"]:
                raise status.bad_request("a patch cannot change metadata.name or metadata.uid")
            return checked

        return await self._update(resource, namespace, name, change, how, subresource, warnings)

    async def _apply(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        applied: Obj,
        how: How,
        subresource: str,
    ) -> Result:
        if not how.manager:
            raise status.bad_request("fieldManager is required for apply patch")
        checked = await self.aside.run(how.size, check_object, resource.type, applied)
        if checked.problems:
            raise _undeclared(resource, namespace, name, checked.problems)
        applied, warnings = await self.aside.run(how.size, self._checked, resource, applied, how)
        meta = self._meta(resource, namespace, applied)
        if meta.setdefault("name", name) != name:
            raise status.bad_request(
                f"the name of the object ({meta['name']}) does not match the name on the URL"
                f" ({name})"
            )
        if meta.get("managedFields"):
            raise status.bad_request("metadata.managedFields must be nil")
        now = now_text(self._clock())

        def merged(current: Obj | None) -> Obj:
            return apply_object(
                resource.type, current, applied, how.manager,
                force=how.force, now=now, api_version=resource.api_version,
                subresource=subresource,
            )  # fmt: skip

        if self.find(resource, namespace, name) is None:
            if subresource:
                raise status.not_found(resource, name)
            made = await self.aside.run(how.size, merged, None)
            try:
                return await self._make(resource, namespace, made, how, warnings, applied=True)
            except ApiError as e:
                if e.reason != "AlreadyExists":
                    raise
                # Somebody else has made it meanwhile: then this is a change.
        return await self._update(
            resource, namespace, name, merged, how, subresource, warnings, applied=True
        )

    async def _make(
        self,
        resource: Resource,
        namespace: str,
        obj: Obj,
        how: How,
        warnings: Texts,
        *,
        applied: bool = False,
    ) -> Result:
        """Write an object that must be new. applied -- it has its managedFields"""
        name = obj["metadata"]["name"]
        key = _key(resource, namespace, name)
        self._check_namespace(resource, namespace)
        obj, told = await self.aside.run(how.size, self._begun, resource, obj, how, applied)
        warnings += told
        if how.size >= LARGE:  # others had their turn meanwhile
            self._check_namespace(resource, namespace)
        if self.store.get(key) is not None:
            raise status.already_exists(resource, name)
        try:
            kept = await self._to_its_end(self._claimed(resource, None, obj, Put(key, obj, 0), how))
        except Conflicted:
            raise status.already_exists(resource, name) from None
        return Result(kept, tuple(warnings), True)

    async def _update(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        change: Callable[[Obj], Obj],
        how: How,
        subresource: str,
        warnings: Texts,
        *,
        applied: bool = False,
    ) -> Result:
        """Write what `change` makes of the current version, over what others write meanwhile:
        it is asked again, and may refuse what has come in between.

        applied -- `change` has seen to managedFields
        """
        key = _key(resource, namespace, name)
        for _ in range(ATTEMPTS):
            held = self.store.get(key)
            if held is None:
                raise status.not_found(resource, name)
            old, new, told = await self.aside.run(
                max(how.size, len(held.body)),
                self._changed, resource, held, change, how, subresource, applied,
            )  # fmt: skip
            what = Delete(key, held.revision) if _may_go(new) else Put(key, new, held.revision)
            try:
                kept = await self._to_its_end(self._claimed(resource, old, new, what, how))
            except Conflicted:
                continue
            return Result(kept, (*warnings, *told))
        raise status.conflict(resource, name, status.MODIFIED)

    async def delete(
        self, resource: Resource, namespace: str, name: str, deletion: Deletion = Deletion()
    ) -> Result:
        """Remove an object, or mark it where finalizers must be heard first. Raises ApiError."""
        key = _key(resource, namespace, name)
        if resource is NAMESPACE and name in IMMORTAL:
            raise status.forbidden(resource, name, "this namespace may not be deleted")
        for _ in range(ATTEMPTS):
            held = self.get(resource, namespace, name)
            old = held.obj
            meta = old["metadata"]
            if deletion.uid and deletion.uid != meta["uid"]:
                raise status.conflict(
                    resource, name,
                    f"Precondition failed: UID in precondition: {deletion.uid}, UID in object"
                    f" meta: {meta['uid']}",
                )  # fmt: skip
            if deletion.resource_version and deletion.resource_version != meta["resourceVersion"]:
                raise status.conflict(
                    resource, name,
                    "Precondition failed: ResourceVersion in precondition:"
                    f" {deletion.resource_version}, ResourceVersion in object meta:"
                    f" {meta['resourceVersion']}",
                )  # fmt: skip
            new = self._marked(resource, old, deletion)
            if deletion.dry_run:
                return Result(old)
            gone = _may_go(new)
            if not gone and _same(old, new):
                return Result(old)
            what = Delete(key, held.revision) if gone else Put(key, new, held.revision)
            try:
                marked = await self._to_its_end(self._removed(resource, old, what))
            except Conflicted:
                continue
            return Result(old if gone else marked)
        raise status.conflict(resource, name, status.MODIFIED)

    # --- parts of a write ---------------------------------------------------------------

    async def _to_its_end(self, work: Coroutine[Any, Any, Obj]) -> Obj:
        """Do what writes and books addresses; who stops waiting stops neither, for the store
        does not stop: an address is taken by what is kept."""
        if not self.store.durable:  # done without a pause
            return await work
        return await asyncio.shield(asyncio.ensure_future(work))

    async def _claimed(
        self, resource: Resource, old: Obj | None, new: Obj, what: Put | Delete, how: How
    ) -> Obj:
        """Give out what a new version needs, and write it. Raises Conflicted."""
        with self.allocator.claim(resource, new, old) as claim:
            if old is not None and _same(old, new):
                return old
            if how.dry_run:
                return new
            (stored,) = await self.store.write(what)
            claim.keep()
        if isinstance(what, Put):
            return stored.obj
        if old is not None:
            self.allocator.release(resource, old)
        self.allocator.release(resource, new)
        return new

    async def _removed(self, resource: Resource, old: Obj, what: Put | Delete) -> Obj:
        """Write a deletion, or that there is to be one. Raises Conflicted."""
        (stored,) = await self.store.write(what)
        if isinstance(what, Delete):
            self.allocator.release(resource, old)
        return stored.obj

    def _checked(self, resource: Resource, obj: Obj, how: How) -> tuple[Obj, Texts]:
        """Return the object without fields that its kind does not have, and what to warn of."""
        kind, version = obj.get("kind") or resource.kind, obj.get("apiVersion")
        if version not in (None, "", resource.api_version):
            raise status.bad_request(
                f"the API version in the data ({version}) does not match the expected API version"
                f" ({resource.api_version})"
            )
        if kind != resource.kind:
            raise _unfit(resource, kind, f"the data is a {kind}")
        try:
            checked = check_object(resource.type, obj)
        except ApiError as e:
            raise _unfit(resource, kind, _why(e)) from None
        problems = [*how.problems, *checked.problems]
        if problems and how.field_validation == "Strict":
            raise _unfit(resource, kind, f"strict decoding error: {', '.join(problems)}")
        out = checked.obj
        out["kind"], out["apiVersion"] = resource.kind, resource.api_version
        return out, problems if how.field_validation == "Warn" else []

    def _patched(
        self, resource: Resource, obj: Obj, how: How, patch: bytes, problems: Texts
    ) -> tuple[Obj, Texts]:
        """The same for what a patch made; a patch that is not fit is a wrong value of its own."""
        try:
            return self._checked(resource, obj, replace(how, problems=tuple(problems)))
        except ApiError as e:
            why = _why(e)
            text = json.dumps(patch.decode(errors="replace"), ensure_ascii=False)
            cause = status.Cause("FieldValueInvalid", f"Invalid value: {text}: {why}", "patch")
            raise status.invalid(None, "", [cause]) from None

    def _meta(self, resource: Resource, namespace: str, obj: Obj) -> dict[str, Any]:
        meta: dict[str, Any] = obj.setdefault("metadata", {})
        said = meta.get("namespace") or ""
        if resource.namespaced:
            if said not in ("", namespace):
                raise status.bad_request(
                    "the namespace of the provided object does not match the namespace sent on"
                    f" the request: {said} is not {namespace}"
                )
            meta["namespace"] = namespace
        else:
            meta.pop("namespace", None)
        return meta

    def _check_namespace(self, resource: Resource, namespace: str) -> None:
        if not resource.namespaced:
            return
        held = self.find(NAMESPACE, "", namespace)
        if held is None:
            raise status.not_found(NAMESPACE, namespace)
        if held.obj["metadata"].get("deletionTimestamp"):
            raise status.forbidden(
                resource, "",
                f"unable to create new content in namespace {namespace} because it is being"
                " terminated",
            )  # fmt: skip

    def _begun(self, resource: Resource, obj: Obj, how: How, applied: bool) -> tuple[Obj, Texts]:
        """Return a new object as it is to be kept, but for what is given out, and what to warn
        of. Raises ApiError. applied -- it has its managedFields"""
        self._begin(resource, obj)
        obj = settle(resource.type, obj)
        set_defaults(resource, obj)
        if not applied:
            # What a manager wrote, and not what the kind makes of it, nor what is given out.
            obj = self._tracked(resource, None, obj, how)
        prepare(resource, obj, None)
        # Before anything is given out: what is wrong with the rest is the same all the same.
        _refuse(resource, obj["metadata"]["name"], validate(resource, obj, None))
        return obj, warnings_about(resource, obj, None)

    def _changed(
        self,
        resource: Resource,
        held: Stored,
        change: Callable[[Obj], Obj],
        how: How,
        subresource: str,
        applied: bool,
    ) -> tuple[Obj, Obj, Texts]:
        """Return an object as it was, as it is to be kept, and what to warn of. Raises
        ApiError."""
        old = held.obj
        new = self._carry(resource, old, change(old), subresource)
        new = settle(resource.type, new)
        set_defaults(resource, new)
        if not applied:
            new = self._tracked(resource, old, new, how, subresource)
        if not subresource:
            prepare(resource, new, old)
        _refuse(resource, held.key[2], validate(resource, new, old))
        return old, new, warnings_about(resource, new, old)

    def _begin(self, resource: Resource, obj: Obj) -> None:
        """Give a new object what only the server gives."""
        meta = obj["metadata"]
        for name in ("deletionTimestamp", "deletionGracePeriodSeconds", "selfLink", "generation"):
            meta.pop(name, None)
        meta["uid"] = self._new_uid()
        meta["creationTimestamp"] = now_text(self._clock())
        if resource.kind not in NO_GENERATION:
            meta["generation"] = 1
        # A node brings its status along: what it is cannot be known otherwise.
        if "status" in resource.subresources and resource.kind != "Node":
            obj.pop("status", None)

    def _carry(self, resource: Resource, old: Obj, new: Obj, subresource: str) -> Obj:
        """Return the new version with what this write may not change taken from the old."""
        if subresource:
            kept: Obj = copied(old)
            part = "spec" if subresource == FINALIZE else subresource
            if part in new or part in old:
                kept[part] = new.get(part, {})
            if "managedFields" in new.get("metadata", {}):
                kept["metadata"]["managedFields"] = new["metadata"]["managedFields"]
            return kept
        meta, before = new["metadata"], old["metadata"]
        for name in (
            "uid", "creationTimestamp", "resourceVersion", "generation", "deletionTimestamp",
            "deletionGracePeriodSeconds", "generateName", "selfLink",
        ):  # fmt: skip
            if name in before:
                meta[name] = before[name]
            elif name != "generateName":
                meta.pop(name, None)
        if "status" in resource.subresources:
            if "status" in old:
                new["status"] = copied(old["status"])
            else:
                new.pop("status", None)
        if "generation" in meta and new.get("spec") != old.get("spec"):
            meta["generation"] = before.get("generation", 0) + 1
        return new

    def _tracked(
        self, resource: Resource, old: Obj | None, new: Obj, how: How, subresource: str = ""
    ) -> Obj:
        return track_update(
            resource.type, old, new, how.manager or "unknown", now=now_text(self._clock()),
            api_version=resource.api_version, subresource=subresource,
        )  # fmt: skip

    def _marked(self, resource: Resource, old: Obj, deletion: Deletion) -> Obj:
        """Return the object as one that is to go."""
        new: Obj = copied(old)
        meta = new["metadata"]
        finalizers = [f for f in meta.get("finalizers", ()) if f not in (FOREGROUND, ORPHAN)]
        if deletion.propagation == "Foreground":
            finalizers.append(FOREGROUND)
        elif deletion.propagation == "Orphan":
            finalizers.append(ORPHAN)
        if finalizers:
            meta["finalizers"] = finalizers
        else:
            meta.pop("finalizers", None)
        grace = _grace(resource, old, deletion)
        if "deletionTimestamp" not in meta:
            meta["deletionTimestamp"] = now_text(self._clock() + grace)
            meta["deletionGracePeriodSeconds"] = grace
            if "generation" in meta:
                meta["generation"] += 1
        elif grace < meta.get("deletionGracePeriodSeconds", 0):  # it only ever gets shorter
            meta["deletionTimestamp"] = now_text(self._clock() + grace)
            meta["deletionGracePeriodSeconds"] = grace
        if resource is NAMESPACE:
            new.setdefault("status", {})["phase"] = "Terminating"
        return new


def _unfit(resource: Resource, kind: str, why: str) -> ApiError:
    """A body that is no object of the kind it is sent for."""
    return status.bad_request(
        f'{kind} in version "{resource.version}" cannot be handled as a {resource.kind}: {why}'
    )


def _why(error: ApiError) -> str:
    """Return why an object is not fit for its kind, without of which kind it is."""
    return str(error).partition(" cannot be handled as a ")[2].partition(": ")[2] or str(error)


def _undeclared(resource: Resource, namespace: str, name: str, problems: Sequence[str]) -> ApiError:
    """An apply patch with fields that the kind does not have; upstream gives no reason."""
    told = [
        text.replace('unknown field "', ".", 1).removesuffix('"') + ": field not declared in schema"
        for text in problems
    ]
    whose = f"{namespace}/{name}" if resource.namespaced else f"/{name}"
    what = f"{resource.group}/{resource.version}, Kind={resource.kind}"
    return ApiError(
        500, "", f"failed to create typed patch object ({whose}; {what}): {', '.join(told)}"
    )


# --- small decisions --------------------------------------------------------------------------


def _key(resource: Resource, namespace: str, name: str) -> Key:
    return resource.qualified, namespace if resource.namespaced else "", name


def _refuse(resource: Resource, name: str, causes: Sequence[status.Cause]) -> None:
    if causes:
        raise status.invalid(resource, name, causes)


def _grace(resource: Resource, obj: Obj, deletion: Deletion) -> int:
    """Return how many seconds pass until an object that is deleted may go: of a Pod on a node
    as many as it or the deletion says, else none."""
    spec = obj.get("spec") or {}
    if resource.kind != "Pod" or not spec.get("nodeName"):
        return 0
    if (obj.get("status") or {}).get("phase") in ENDED:
        return 0
    if deletion.grace is not None:
        return min(max(deletion.grace, 0), MAX_GRACE)
    return min(int(spec.get("terminationGracePeriodSeconds", DEFAULT_GRACE)), MAX_GRACE)


def _may_go(obj: Obj) -> bool:
    """True for an object that is to be deleted, and of which nobody must be told any more."""
    meta = obj["metadata"]
    if not meta.get("deletionTimestamp") or meta.get("finalizers"):
        return False
    if meta.get("deletionGracePeriodSeconds"):  # its node says when it has ended
        return False
    return not (obj.get("kind") == "Namespace" and (obj.get("spec") or {}).get("finalizers"))


def _same(old: Obj, new: Obj) -> bool:
    """True if a write changes nothing but who wrote it when."""

    def without(obj: Obj) -> Obj:
        meta = {
            k: v
            for k, v in obj["metadata"].items()
            if k not in ("resourceVersion", "managedFields")
        }
        return {**obj, "metadata": meta}

    def owners(obj: Obj) -> list[dict[str, Any]]:
        entries = obj["metadata"].get("managedFields") or []
        return [{k: v for k, v in entry.items() if k != "time"} for entry in entries]

    return without(old) == without(new) and owners(old) == owners(new)


# --- selectors and pages ------------------------------------------------------------------------


def selector_of(resource: Resource, labels: str, fields: str) -> Callable[[Stored], bool]:
    """Return what tells whether an object is chosen. Raises ApiError 400."""
    try:
        by_label = parse_selector(labels)
    except BadSelector as e:
        raise status.bad_request(f"unable to parse requirement: {e}") from None
    by_field = _parse_fields(resource, fields)

    def chosen(one: Stored) -> bool:
        if labels and not by_label.matches(one.labels):
            return False
        if not by_field:
            return True
        obj: Obj | None = None
        for path, value, wanted in by_field:
            if path == "metadata.name":
                found = one.key[2]
            elif path == "metadata.namespace":
                found = one.key[1]
            else:
                obj = one.obj if obj is None else obj
                found = field_value(obj, path)
            if (found == value) is not wanted:
                return False
        return True

    return chosen


def seen_as(event: Event, chosen: Callable[[Stored], bool]) -> str | None:
    """Return what a watch with a selector tells of an event; None: nothing."""
    before = event.before is not None and chosen(event.before)
    if event.type == "DELETED":
        return "DELETED" if before else None
    after = chosen(event.stored)
    if after:
        return "MODIFIED" if before else "ADDED"
    return "DELETED" if before else None


def _parse_fields(resource: Resource, text: str) -> list[tuple[str, str, bool]]:
    known = ("metadata.name", *(("metadata.namespace",) if resource.namespaced else ()))
    out = []
    for term in filter(None, (part.strip() for part in text.split(","))):
        sign = next((one for one in ("!=", "==", "=") if one in term), "")
        path, found, value = term.partition(sign or "=")
        if not found:
            raise status.bad_request(f"invalid selector: '{text}'; can't understand '{term}'")
        if path not in (*known, *resource.fields):
            raise status.bad_request(f'field label not supported: "{path}"')
        out.append((path, value, sign != "!="))
    return out


def field_value(obj: Obj, path: str) -> str:
    """Return the text that a field selector compares: "" where there is nothing."""
    if path == "source":  # of an Event: its component
        path = "source.component"
    value: Any = obj
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def _render_more(key: Key) -> str:
    return base64.urlsafe_b64encode(json.dumps(key[1:]).encode()).decode().rstrip("=")


def _parse_more(text: str) -> tuple[str, str]:
    try:
        namespace, name = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
        if isinstance(namespace, str) and isinstance(name, str):
            return namespace, name
    except (ValueError, binascii.Error, TypeError):
        pass
    raise status.bad_request("continue key is not valid: this server gave no such key")
