"""EndpointSlices, and the older Endpoints, of Services that select Pods.

Decides when to look; what there should be is slices_plan.py's. Upstream's endpointslice and
endpoint controllers, in one: both read the same Pods.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kdns.api.controllers.events import Recorder
from kdns.api.controllers.index import (
    ENDPOINTS,
    NODES,
    PODS,
    SERVICES,
    SLICES,
    ZONE,
    Index,
    Pod,
    decode_pod,
    split,
)
from kdns.api.controllers.slices_plan import (
    ENDPOINTS_CONTROLLER,
    ENDPOINTS_MANAGED_BY,
    MANAGED_BY,
    OVER_CAPACITY,
    SLICE_CONTROLLER,
    TRIGGER_TIME,
    Plan,
    plan_slices,
    wanted_endpoints,
)
from kdns.api.controllers.writes import Writer, in_turns, terminating
from kdns.api.store import Event, Obj, Stored
from kdns.errors import ApiError

NAME = "endpointslice"


class Slices:
    """The controller. queue -- has a Service looked at"""

    def __init__(
        self, writer: Writer, index: Index, recorder: Recorder, queue: Callable[[str], None]
    ) -> None:
        self._writer = writer
        self._index = index
        self._recorder = recorder
        self._queue = queue
        self._triggers: dict[str, str] = {}  # Service: when the oldest change not yet told was

    # --- when -------------------------------------------------------------------------

    def seen(self, event: Event) -> None:
        """Queue the Services that an event is about. Called after the index knows it."""
        resource, namespace, name = event.stored.key
        if resource == PODS.qualified:
            self._pod_seen(event)
        elif resource == SERVICES.qualified:
            self._queue(f"{namespace}/{name}")
        elif resource == ENDPOINTS.qualified:
            # Ours changed by somebody else, or gone: seen() of our own write costs a compare.
            if self._index.has_selector(namespace, name):
                self._queue(f"{namespace}/{name}")
        elif resource == SLICES.qualified:
            self._slice_seen(event)
        elif resource == NODES.qualified:
            self._node_seen(event)

    def _pod_seen(self, event: Event) -> None:
        namespace = event.stored.key[1]
        before, after = event.before, event.stored
        old = decode_pod(before) if before is not None else None
        new = self._index.pods.get((namespace, event.stored.key[2]))
        if event.type == "MODIFIED" and old is not None and new is not None:
            same_labels = old.metadata.labels == new.metadata.labels
            if same_labels and _matters(old) == _matters(new):
                return
        names: set[str] = set()
        trigger = ""
        for pod, stored in ((old, before), (new, after)):
            if pod is not None and stored is not None and (pod.ips or event.type != "ADDED"):
                names.update(self._index.services_for(namespace, pod.metadata.labels))
                condition = pod.ready_condition
                trigger = condition.lastTransitionTime if condition is not None else trigger
        for name in names:
            self._note(f"{namespace}/{name}", trigger)
            self._queue(f"{namespace}/{name}")

    def _slice_seen(self, event: Event) -> None:
        stored = event.stored
        if stored.labels.get(MANAGED_BY) != SLICE_CONTROLLER and event.before is None:
            return
        for version in (event.before, stored):
            name = version.labels.get("kubernetes.io/service-name") if version is not None else None
            if name and self._index.has_selector(stored.key[1], name):
                self._queue(f"{stored.key[1]}/{name}")

    def _node_seen(self, event: Event) -> None:
        zones = {
            one.labels.get(ZONE, "") for one in (event.before, event.stored) if one is not None
        }
        if event.type == "MODIFIED" and len(zones) == 1:
            return
        for pod in self._index.pods_of_node(event.stored.key[2]):
            namespace = pod.metadata.namespace
            for name in self._index.services_for(namespace, pod.metadata.labels):
                self._queue(f"{namespace}/{name}")

    def _note(self, key: str, trigger: str) -> None:
        if trigger:
            self._triggers[key] = min(trigger, self._triggers.get(key, trigger))

    # --- what -------------------------------------------------------------------------

    async def reconcile(self, key: str) -> float | None:
        trigger = self._triggers.pop(key, "")
        namespace, name = split(key)
        stored = self._writer.objects.find(SERVICES, namespace, name)
        if stored is None:
            await self._clean(namespace, name)
            return None
        service = stored.obj
        spec = service["spec"]
        if spec.get("type") == "ExternalName" or not spec.get("selector"):
            return None
        if service["metadata"].get("deletionTimestamp"):
            return None
        pods = self._index.pods_of_service(namespace, spec["selector"])
        try:
            await self._write(namespace, service, pods, trigger)
        except ApiError as e:
            if terminating(e):
                return None
            if e.code not in (404, 409):
                self._recorder.warn(
                    service, "FailedToUpdateEndpointSlices",
                    f"Error updating Endpoint Slices for Service {namespace}/{name}: {e}",
                    "endpoint-slice-controller",
                )  # fmt: skip
            self._note(key, trigger)
            raise
        return None

    def slices_of(self, namespace: str, name: str) -> list[Stored]:
        """Return the slices of a Service that this controller manages."""
        find = self._writer.objects.find
        found = (
            find(SLICES, namespace, one)
            for one in sorted(self._index.slices.get((namespace, name), ()))
        )
        return [
            one
            for one in found
            if one is not None and one.labels.get(MANAGED_BY) == SLICE_CONTROLLER
        ]

    def zone_of(self, node: str) -> str | None:
        stored = self._writer.objects.find(NODES, "", node)
        return None if stored is None else stored.labels.get(ZONE, "")

    async def _write(self, namespace: str, service: Obj, pods: list[Pod], trigger: str) -> None:
        versions = self.slices_of(namespace, service["metadata"]["name"])
        found = [one.obj for one in versions]
        existing = [one for one in found if not one["metadata"].get("deletionTimestamp")]
        first = trigger or (service["metadata"]["creationTimestamp"] if not existing else "")
        plan = plan_slices(service, pods, existing, self.zone_of, first)
        by_name = {one.key[2]: one for one in versions}
        if existing:
            await self._carry_out(namespace, plan, by_name)
            await self._write_endpoints(namespace, service, pods, first)
        else:  # of a Service that is new: both in one commit
            await in_turns(
                (
                    self._carry_out(namespace, plan, by_name),
                    self._write_endpoints(namespace, service, pods, first),
                )
            )

    async def _carry_out(self, namespace: str, plan: Plan, versions: dict[str, Stored]) -> None:
        writer = self._writer
        for obj in plan.create:
            await writer.create(SLICES, namespace, obj)
        for obj in plan.update:
            await writer.change(SLICES, versions[obj["metadata"]["name"]], _becomes(obj))
        for obj in plan.delete:
            meta = obj["metadata"]
            await writer.delete(SLICES, namespace, meta["name"], meta["uid"])

    async def _write_endpoints(
        self, namespace: str, service: Obj, pods: list[Pod], trigger: str
    ) -> None:
        name = service["metadata"]["name"]
        wanted = wanted_endpoints(service, pods, trigger)
        stored = self._writer.objects.find(ENDPOINTS, namespace, name)
        if stored is None:
            await self._writer.create(ENDPOINTS, namespace, wanted)
            return
        found = stored.obj
        labels = wanted["metadata"]["labels"]
        same = found.get("subsets", []) == wanted.get("subsets", [])
        if same and (found["metadata"].get("labels") or {}) == labels:
            return

        def change(obj: Obj) -> None:
            meta = obj["metadata"]
            meta["labels"] = labels
            annotations = meta.setdefault("annotations", {})
            for one in (TRIGGER_TIME, OVER_CAPACITY):
                annotations.pop(one, None)
            annotations.update(wanted["metadata"].get("annotations", {}))
            if "subsets" in wanted:
                obj["subsets"] = wanted["subsets"]
            else:
                obj.pop("subsets", None)

        await self._writer.change(ENDPOINTS, stored, change)

    async def _clean(self, namespace: str, name: str) -> None:
        """A Service went: slices go with their owner (collector), Endpoints have none."""
        stored = self._writer.objects.find(ENDPOINTS, namespace, name)
        if stored is not None and stored.labels.get(ENDPOINTS_MANAGED_BY) == ENDPOINTS_CONTROLLER:
            await self._writer.delete(ENDPOINTS, namespace, name, stored.uid)


def _becomes(obj: Obj) -> Callable[[Obj], None]:
    def change(current: Obj) -> None:
        current.update(obj)

    return change


def _matters(pod: Pod) -> tuple[Any, ...]:
    """What of a Pod its endpoints are made of."""
    return (
        pod.metadata.uid, pod.metadata.deletionTimestamp is None, pod.ready, pod.ips,
        pod.status.phase, pod.spec.nodeName, pod.spec.hostname, pod.spec.subdomain,
    )  # fmt: skip
