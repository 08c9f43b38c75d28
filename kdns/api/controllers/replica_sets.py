"""ReplicaSets: as many Pods of a template as are asked for.

Decides which Pods are made, taken over, let go and deleted, and the status. Upstream:
replica_set.go.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Final

from kdns.api.controllers.index import PODS, REPLICA_SETS, Pod, decode_pod, split
from kdns.api.controllers.workload_controller import Workloads
from kdns.api.controllers.workloads import (
    BURST,
    claim_pods,
    deletion_order,
    is_available,
    next_available,
    pod_from,
)
from kdns.api.controllers.writes import (
    condition_of,
    in_turns,
    owned_by,
    set_condition,
    terminating,
    without_owners,
)
from kdns.api.objects import now_text
from kdns.api.store import Event, Obj
from kdns.errors import ApiError

NAME: Final = "replicaset"
COMPONENT: Final = "replicaset-controller"


def wanted_status(rs: Obj, pods: list[Pod], ending: int, failure: str, now: float) -> Obj:
    """Return the status of a ReplicaSet that has these active Pods.

    ending -- Pods on their way out; failure: why Pods could not be made or deleted, if so
    """
    spec = rs["spec"]
    labels = (spec.get("template") or {}).get("metadata", {}).get("labels") or {}
    min_ready = spec.get("minReadySeconds", 0)
    full = sum(all(p.metadata.labels.get(k) == v for k, v in labels.items()) for p in pods)
    counts = {
        "replicas": len(pods),
        "fullyLabeledReplicas": full,
        "readyReplicas": sum(pod.ready for pod in pods),
        "availableReplicas": sum(is_available(pod, min_ready, now) for pod in pods),
    }
    status: Obj = {k: v for k, v in counts.items() if v or k == "replicas"}
    status["terminatingReplicas"] = ending
    status["observedGeneration"] = rs["metadata"].get("generation", 0)
    conditions = [
        dict(one)
        for one in (rs.get("status") or {}).get("conditions") or ()
        if one["type"] != "ReplicaFailure"
    ]
    if failure:
        old = condition_of((rs.get("status") or {}).get("conditions") or [], "ReplicaFailure")
        if old is not None:
            conditions.append(dict(old))
        new = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate",
               "message": failure}  # fmt: skip
        set_condition(conditions, new, now_text(now))
    if conditions:
        status["conditions"] = conditions
    return status


class ReplicaSets(Workloads):
    """The controller. queue -- has a ReplicaSet looked at"""

    def seen(self, event: Event) -> None:
        resource, namespace, name = event.stored.key
        if resource == REPLICA_SETS.qualified:
            if event.type != "DELETED":
                self._queue(f"{namespace}/{name}")
            return
        if resource != PODS.qualified:
            return
        pods = [self._index.pods.get((namespace, name))]
        if event.before is not None and b'"ReplicaSet"' in event.before.body:
            pods.append(decode_pod(event.before))
        for pod in pods:
            owner = pod.metadata.controller if pod is not None else None
            if owner is not None and owner.kind == "ReplicaSet":
                self._queue(f"{namespace}/{owner.name}")
            elif pod is not None and owner is None:
                for one in self._index.replica_sets_for(namespace, pod.metadata.labels):
                    self._queue(f"{namespace}/{one}")

    async def reconcile(self, key: str) -> float | None:
        namespace, name = split(key)
        stored = self._objects.find(REPLICA_SETS, namespace, name)
        if stored is None:
            return None
        rs = stored.obj
        claimed = claim_pods(self._index, rs)
        for pod in claimed.adopt:
            await self._change(pod, owned_by(rs))
        for pod in claimed.release:
            await self._change(pod, without_owners({rs["metadata"]["uid"]}))
        active = [pod for pod in (*claimed.own, *claimed.adopt) if pod.active]
        failure = ""
        if not rs["metadata"].get("deletionTimestamp"):
            failure = await self._scale(rs, active)
        claimed = claim_pods(self._index, rs)  # what is there now
        active = [pod for pod in claimed.own if pod.active]
        ending = sum(pod.terminating for pod in claimed.own)
        now = self._clock()
        latest = self._objects.find(REPLICA_SETS, namespace, name)
        if latest is None or latest.uid != stored.uid:
            return None
        await self._writer.put_status(
            REPLICA_SETS, latest, wanted_status(rs | {"status": latest.obj.get("status")}, active,
                                                ending, failure, now),
        )  # fmt: skip
        if failure:
            raise ApiError(409, "Conflict", failure)
        return next_available(active, rs["spec"].get("minReadySeconds", 0), now)

    async def _scale(self, rs: Obj, active: list[Pod]) -> str:
        """Make or delete Pods; return why that failed, "" if it did not."""
        replicas = rs["spec"].get("replicas", 1)
        missing = replicas - len(active)
        try:
            if missing > 0:
                await in_turns(self._create(rs) for _ in range(min(missing, BURST)))
            elif missing < 0:
                crowd = Counter(pod.spec.nodeName for pod in active)
                surplus = deletion_order(active, crowd)[: min(-missing, BURST)]
                await in_turns(self._delete(rs, pod) for pod in surplus)
        except ApiError as e:
            if terminating(e):
                return ""
            return str(e)
        if abs(missing) > BURST:
            self._queue(f"{rs['metadata']['namespace']}/{rs['metadata']['name']}")
        return ""

    async def _create(self, rs: Obj) -> None:
        pod = pod_from(rs["spec"]["template"], rs)
        pod["metadata"]["generateName"] = f"{rs['metadata']['name']}-"
        try:
            made = await self._writer.create(PODS, rs["metadata"]["namespace"], pod)
        except ApiError as e:
            if not terminating(e):
                self._recorder.warn(rs, "FailedCreate", f"Error creating: {e}", COMPONENT)
            raise
        text = f"Created pod: {made['metadata']['name']}"
        self._recorder.tell(rs, "SuccessfulCreate", text, COMPONENT)

    async def _delete(self, rs: Obj, pod: Pod) -> None:
        meta = pod.metadata
        if await self._writer.delete(PODS, meta.namespace, meta.name, meta.uid):
            self._recorder.tell(rs, "SuccessfulDelete", f"Deleted pod: {meta.name}", COMPONENT)

    async def _change(self, pod: Pod, change: Callable[[Obj], None]) -> None:
        stored = self._objects.find(PODS, pod.metadata.namespace, pod.metadata.name)
        if stored is not None and stored.uid == pod.metadata.uid:
            await self._writer.change(PODS, stored, change)
