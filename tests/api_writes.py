"""Writes to the embedded API without a store: what becomes of an object, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

from kdns.api.allocate import Allocator
from kdns.api.defaults import prepare, set_defaults
from kdns.api.kinds import RESOURCES, Resource
from kdns.api.validation import validate, warnings_about

Obj = dict[str, Any]

KINDS = {resource.kind: resource for resource in RESOURCES}


def resource_of(obj: Obj) -> Resource:
    return KINDS[obj["kind"]]


def make(kind: str, name: str = "web", **parts: Any) -> Obj:
    """Return an object as its maker sends it."""
    resource = KINDS[kind]
    meta: Obj = {"name": name, **({"namespace": "default"} if resource.namespaced else {})}
    meta |= parts.pop("metadata", {})
    return {"apiVersion": resource.api_version, "kind": kind, "metadata": meta, **parts}


def service(name: str = "web", /, **spec: Any) -> Obj:
    """Return a Service with one port, unless told otherwise."""
    return make("Service", name, spec={"ports": [{"port": 80}], **spec})


def pod_template(**spec: Any) -> Obj:
    containers = [{"name": "web", "image": "nginx"}]
    return {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": containers, **spec}}


def workload(kind: str, **spec: Any) -> Obj:
    selector = {"matchLabels": {"app": "web"}}
    return make(kind, spec={"selector": selector, "template": pod_template(), **spec})


def filled(obj: Obj, old: Obj | None = None) -> Obj:
    """Return an object as it is after defaults."""
    new = copy.deepcopy(obj)
    if old is not None:
        for part in ("status",):
            if part in old:
                new[part] = copy.deepcopy(old[part])
    set_defaults(resource_of(new), new)
    prepare(resource_of(new), new, old)
    return new


def problems(obj: Obj, old: Obj | None = None) -> list[str]:
    """Return what is refused, as "field: message"."""
    new = filled(obj, old)
    return [f"{one.field}: {one.message}" for one in validate(resource_of(new), new, old)]


def warned(obj: Obj, old: Obj | None = None) -> list[str]:
    new = filled(obj, old)
    return warnings_about(resource_of(new), new, old)


def written(allocator: Allocator, obj: Obj, old: Obj | None = None) -> Obj:
    """Return an object as it is stored. Raises ApiError, AssertionError if it is refused."""
    new = filled(obj, old)
    refused = validate(resource_of(new), new, old)
    assert not refused, refused
    with allocator.claim(resource_of(new), new, old) as claim:
        claim.keep()
    return new


def changed(old: Obj, **spec: Any) -> Obj:
    """Return an object as a merge patch of its spec leaves it; None takes a field away."""
    new = copy.deepcopy(old)
    for key, value in spec.items():
        if value is None:
            new["spec"].pop(key, None)
        else:
            new["spec"][key] = value
    return new
