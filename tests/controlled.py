"""A cluster without a network for tests: store, objects and controllers, and a clock to move."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from kdns.api.allocate import Allocator
from kdns.api.controllers import ControllerOptions, Controllers
from kdns.api.kinds import BY_KIND, RESOURCES, Resource
from kdns.api.objects import MERGE_PATCH, Deletion, How, Objects
from kdns.api.store import ObjectStore

Obj = dict[str, Any]
NOON = 1_900_000_000.0
OF = {resource.kind: resource for resource in RESOURCES}
HOW = How(manager="test")


@dataclass(slots=True)
class Clock:
    now: float = NOON

    def __call__(self) -> float:
        return self.now


@dataclass(slots=True)
class Place:
    """What tests say and ask. Names are "web" (in default) or "prod/web"."""

    store: ObjectStore
    objects: Objects
    controllers: Controllers
    clock: Clock

    async def create(self, *manifests: Obj) -> None:
        for one in manifests:
            resource = BY_KIND[one["apiVersion"], one["kind"]]
            namespace = one["metadata"].get("namespace", "default") if resource.namespaced else ""
            await self.objects.create(resource, namespace, json.loads(json.dumps(one)), HOW)

    async def patch(self, kind: str, name: str, change: Obj, subresource: str = "") -> None:
        resource, namespace, name = _where(kind, name)
        body = json.dumps(change).encode()
        await self.objects.patch(resource, namespace, name, MERGE_PATCH, body, HOW, subresource)

    async def delete(self, kind: str, name: str, **options: Any) -> None:
        resource, namespace, name = _where(kind, name)
        await self.objects.delete(resource, namespace, name, Deletion(**options))

    async def settle(self, seconds: float = 0.0) -> None:
        """Let `seconds` pass, and the controllers do what there is to do."""
        await self.controllers.settle()
        self.clock.now += seconds
        await self.controllers.settle()

    def get(self, kind: str, name: str) -> Obj:
        return self.objects.get(*_where(kind, name)).obj

    def find(self, kind: str, name: str) -> Obj | None:
        found = self.objects.find(*_where(kind, name))
        return found.obj if found is not None else None

    def all(self, kind: str, namespace: str = "default", labels: str = "") -> list[Obj]:
        namespace = namespace if OF[kind].namespaced else ""
        return [one.obj for one in self.objects.list(OF[kind], namespace, labels=labels).items]

    def names(self, kind: str, namespace: str = "default", labels: str = "") -> list[str]:
        return [one["metadata"]["name"] for one in self.all(kind, namespace, labels)]

    def slices(self, service: str, namespace: str = "default") -> list[Obj]:
        return self.all("EndpointSlice", namespace, f"kubernetes.io/service-name={service}")

    def endpoints(self, service: str, namespace: str = "default") -> dict[str, str]:
        """Return the Pods (or addresses) in a Service's slices and the letters of their
        conditions: r(eady), s(erving), t(erminating)."""
        return {
            one.get("targetRef", {}).get("name", one["addresses"][0]): "".join(
                word[0]
                for word in ("ready", "serving", "terminating")
                if one["conditions"].get(word)
            )
            for piece in self.slices(service, namespace)
            for one in piece["endpoints"]
        }

    def events(self, name: str, namespace: str = "default") -> list[str]:
        """Return what was told about an object: "Reason: message xCOUNT"."""
        return [
            f"{one['reason']}: {one['message']}" + (f" x{n}" if (n := one["count"]) > 1 else "")
            for one in self.all("Event", namespace)
            if one["involvedObject"]["name"] == name
        ]


def _where(kind: str, name: str) -> tuple[Resource, str, str]:
    resource = OF[kind]
    namespace, _, name = name.rpartition("/")
    return resource, (namespace or "default") if resource.namespaced else "", name


@asynccontextmanager
async def running(
    path: str = "", clock: Clock | None = None, **options: Any
) -> AsyncIterator[Place]:
    """A cluster; the same data again with the same path."""
    clock = clock or Clock()
    store = ObjectStore(path)
    await store.open()
    ranges = options.pop("ranges", {})
    allocator = Allocator(rng=random.Random(1), **ranges)
    allocator.load(one.obj for resource in RESOURCES for one in store.items(resource.qualified))
    objects = Objects(store, allocator, clock=clock, rng=random.Random(2))
    controllers = Controllers(objects, ControllerOptions(**options), clock=clock)
    await controllers.start()
    try:
        await controllers.settle()
        yield Place(store, objects, controllers, clock)
    finally:
        await controllers.stop()
        await store.close()


# --- manifests --------------------------------------------------------------------------------


def meta(name: str, labels: Mapping[str, str] | None = None, **more: Any) -> Obj:
    namespace, _, name = name.rpartition("/")
    made: Obj = {"name": name, **more}
    if namespace:
        made["namespace"] = namespace
    if labels:
        made["labels"] = dict(labels)
    return made


def service(name: str, selector: Mapping[str, str] | None = None, **spec: Any) -> Obj:
    spec.setdefault("ports", [{"port": 80, "protocol": "TCP", "targetPort": 8080}])
    if selector:
        spec["selector"] = dict(selector)
    return {"apiVersion": "v1", "kind": "Service", "metadata": meta(name), "spec": spec}


def containers(ports: Iterable[tuple[str, int]] = (), image: str = "nginx") -> list[Obj]:
    listed = [{"name": name, "containerPort": number} for name, number in ports]
    return [{"name": "c", "image": image, **({"ports": listed} if listed else {})}]


def pod(name: str, labels: Mapping[str, str] | None = None, **spec: Any) -> Obj:
    annotations = spec.pop("annotations", None)
    spec.setdefault("containers", containers())
    more = {"annotations": annotations} if annotations else {}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta(name, labels, **more), "spec": spec}


def workload(kind: str, name: str, replicas: int, image: str = "nginx", **spec: Any) -> Obj:
    """A Deployment, ReplicaSet or StatefulSet whose Pods have the label app=NAME."""
    labels = {"app": name.rpartition("/")[2]}
    template = {"metadata": {"labels": labels}, "spec": {"containers": containers(image=image)}}
    return {
        "apiVersion": "apps/v1",
        "kind": kind,
        "metadata": meta(name),
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "template": spec.pop("template", template),
            **({"serviceName": name.rpartition("/")[2]} if kind == "StatefulSet" else {}),
            **spec,
        },
    }


def image(value: str) -> Obj:
    """The change that `kubectl set image` makes."""
    return {"spec": {"template": {"spec": {"containers": containers(image=value)}}}}
