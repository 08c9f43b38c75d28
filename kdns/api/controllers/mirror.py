"""EndpointSlices of hand-written Endpoints: readers of slices see those as well.

Decides which Endpoints are mirrored and what their slices hold. Upstream's
endpointslicemirroring controller.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, Final

from kdns.api.controllers.index import ENDPOINTS, SERVICE_NAME, SERVICES, SLICES, Index, split
from kdns.api.controllers.slices_plan import (
    ENDPOINTS_MANAGED_BY,
    LAST_APPLIED,
    MANAGED_BY,
    TRIGGER_TIME,
    family_of,
)
from kdns.api.controllers.writes import Writer, owner_reference, terminating
from kdns.api.store import Event, Obj, Stored
from kdns.errors import ApiError

NAME: Final = "endpointslicemirroring"
MIRROR: Final = "endpointslicemirroring-controller.k8s.io"
SKIP: Final = "endpointslice.kubernetes.io/skip-mirror"
LEADER: Final = "control-plane.alpha.kubernetes.io/leader"
MAX_PER_SUBSET: Final = 1000  # addresses that are mirrored
MAX_PER_SLICE: Final = 100


def is_mirrored(endpoints: Obj, service: Obj | None) -> bool:
    """True if a person wrote these Endpoints, for a Service that selects nothing."""
    if service is None or service["spec"].get("selector"):
        return False
    meta = endpoints["metadata"]
    labels, annotations = meta.get("labels") or {}, meta.get("annotations") or {}
    if labels.get(SKIP) == "true" or ENDPOINTS_MANAGED_BY in labels:
        return False
    return LEADER not in annotations and not meta.get("deletionTimestamp")


def mirrored(endpoints: Obj) -> list[Obj]:
    """Return the slices of an Endpoints object, each with generateName."""
    groups: defaultdict[tuple[str, str], list[Obj]] = defaultdict(list)
    ports_of: dict[str, list[Obj]] = {}
    for subset in endpoints.get("subsets") or ():
        ports = [_port(port) for port in subset.get("ports") or ()]
        same = repr(sorted(ports, key=repr))
        ports_of[same] = ports
        room = MAX_PER_SUBSET
        for word, ready in (("addresses", True), ("notReadyAddresses", False)):
            for address in (subset.get(word) or ())[:room]:
                groups[family_of(address["ip"]), same].append(_endpoint(address, ready))
                room -= 1
    return [
        _slice(endpoints, family, ports_of[same], found[first : first + MAX_PER_SLICE])
        for (family, same), found in groups.items()
        for first in range(0, len(found), MAX_PER_SLICE)
    ]


def _port(port: Obj) -> Obj:
    entry = {
        "name": port.get("name", ""),
        "port": port["port"],
        "protocol": port.get("protocol", "TCP"),
    }
    if port.get("appProtocol"):
        entry["appProtocol"] = port["appProtocol"]
    return entry


def _endpoint(address: Obj, ready: bool) -> Obj:
    endpoint: Obj = {"addresses": [address["ip"]], "conditions": {"ready": ready}}
    for name in ("hostname", "nodeName", "targetRef"):
        if address.get(name):
            endpoint[name] = address[name]
    return endpoint


def _slice(endpoints: Obj, family: str, ports: list[Obj], found: list[Obj]) -> Obj:
    meta = endpoints["metadata"]
    labels = {**(meta.get("labels") or {}), SERVICE_NAME: meta["name"], MANAGED_BY: MIRROR}
    annotations = {
        name: value
        for name, value in (meta.get("annotations") or {}).items()
        if name not in (TRIGGER_TIME, LAST_APPLIED)
    }
    made: Obj = {
        "generateName": f"{meta['name']}-",
        "namespace": meta["namespace"],
        "labels": labels,
        "ownerReferences": [owner_reference(endpoints)],
    }
    if annotations:
        made["annotations"] = annotations
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": made,
        "addressType": family,
        "endpoints": found,
        "ports": ports,
    }


class Mirror:
    """The controller. queue -- has Endpoints looked at"""

    def __init__(self, writer: Writer, index: Index, queue: Callable[[str], None]) -> None:
        self._writer = writer
        self._index = index
        self._queue = queue

    def seen(self, event: Event) -> None:
        resource, namespace, name = event.stored.key
        if resource in (ENDPOINTS.qualified, SERVICES.qualified):
            # Most Services select, and have nothing mirrored.
            selects = self._index.has_selector(namespace, name)
            if not selects or self._slices(namespace, name):
                self._queue(f"{namespace}/{name}")
        elif resource == SLICES.qualified:
            for version in (event.before, event.stored):
                if version is not None and version.labels.get(MANAGED_BY) == MIRROR:
                    self._queue(f"{namespace}/{version.labels.get(SERVICE_NAME, '')}")

    async def reconcile(self, key: str) -> float | None:
        namespace, name = split(key)
        find = self._writer.objects.find
        stored, service = find(ENDPOINTS, namespace, name), find(SERVICES, namespace, name)
        there = self._slices(namespace, name)
        wanted: list[Obj] = []
        if stored is not None:
            endpoints = stored.obj
            if is_mirrored(endpoints, service.obj if service is not None else None):
                wanted = mirrored(endpoints)
        try:
            await self._write(namespace, wanted, there)
        except ApiError as e:
            if not terminating(e):
                raise
        return None

    def _slices(self, namespace: str, name: str) -> list[Stored]:
        found = (
            self._writer.objects.find(SLICES, namespace, one)
            for one in sorted(self._index.slices.get((namespace, name), ()))
        )
        return [one for one in found if one is not None and one.labels.get(MANAGED_BY) == MIRROR]

    async def _write(self, namespace: str, wanted: list[Obj], there: list[Stored]) -> None:
        """Keep what is right, turn what is wrong into what is missing, drop the rest."""
        left = list(wanted)
        wrong: list[Stored] = []
        for stored in there:
            same = next((one for one in left if _same(stored.obj, one)), None)
            if same is not None:
                left.remove(same)
            else:
                wrong.append(stored)
        for one in left:
            fitting = next((s for s in wrong if s.obj["addressType"] == one["addressType"]), None)
            if fitting is None:
                await self._writer.create(SLICES, namespace, one)
            else:
                wrong.remove(fitting)
                await self._writer.change(SLICES, fitting, _into(one))
        for stored in wrong:
            await self._writer.delete(SLICES, namespace, stored.key[2], stored.uid)


def _content(one: Obj) -> tuple[Any, ...]:
    meta = one["metadata"]
    return (
        one["addressType"], one.get("endpoints") or [], one.get("ports") or [],
        meta.get("labels"), meta.get("annotations") or {}, meta.get("ownerReferences"),
    )  # fmt: skip


def _same(one: Obj, other: Obj) -> bool:
    return _content(one) == _content(other)


def _into(wanted: Obj) -> Callable[[Obj], None]:
    def change(obj: Obj) -> None:
        obj["endpoints"], obj["ports"] = wanted["endpoints"], wanted["ports"]
        for name in ("labels", "annotations", "ownerReferences"):
            if name in wanted["metadata"]:
                obj["metadata"][name] = wanted["metadata"][name]
            else:
                obj["metadata"].pop(name, None)

    return change
