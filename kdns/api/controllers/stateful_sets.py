"""StatefulSets: Pods with names that stay.

Decides which Pod is made, replaced or deleted next, in order, and the status. Upstream:
stateful_set_control.go. Its ControllerRevisions are not served here: a revision is the name
that its template's hash gives it, and the template of the one before is remembered as long
as this process runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from kdns.api.controllers.events import Recorder
from kdns.api.controllers.index import ENDED, PODS, STATEFUL_SETS, Index, Pod, decode_pod, split
from kdns.api.controllers.workload_controller import Workloads
from kdns.api.controllers.workloads import (
    claim_pods,
    is_available,
    next_available,
    pod_from,
    template_hash,
)
from kdns.api.controllers.writes import Writer, in_turns, owned_by, terminating, without_owners
from kdns.api.store import Event, Obj
from kdns.errors import ApiError

NAME: Final = "statefulset"
COMPONENT: Final = "statefulset-controller"
REVISION_LABEL: Final = "controller-revision-hash"
POD_NAME_LABEL: Final = "statefulset.kubernetes.io/pod-name"
INDEX_LABEL: Final = "apps.kubernetes.io/pod-index"
MAX_REVISIONS: Final = 1000  # templates remembered


@dataclass(slots=True)
class Step:
    """What is to be done now. create -- ordinals, in order; delete -- Pods"""

    create: list[int] = field(default_factory=list)
    delete: list[Pod] = field(default_factory=list)


def start_of(sts: Obj) -> int:
    return int((sts["spec"].get("ordinals") or {}).get("start", 0))


def ordinal_of(sts: Obj, name: str) -> int | None:
    """Return the number of a Pod of this set, None for another's name."""
    base, _, number = name.rpartition("-")
    return int(number) if base == sts["metadata"]["name"] and number.isdigit() else None


def partition_of(sts: Obj) -> int | None:
    """Return the first ordinal that a rolling update touches, counted from the start; None
    where Pods are updated only when somebody deletes them."""
    strategy = sts["spec"].get("updateStrategy") or {}
    if strategy.get("type", "RollingUpdate") != "RollingUpdate":
        return None
    return int((strategy.get("rollingUpdate") or {}).get("partition", 0))


def revision_name(sts: Obj) -> str:
    return f"{sts['metadata']['name']}-{template_hash(sts['spec']['template'])}"


def healthy(pod: Pod) -> bool:
    return pod.status.phase == "Running" and pod.ready and not pod.terminating


def plan(sts: Obj, pods: Mapping[int, Pod], update: str, now: float) -> Step:
    """Return the next step. pods -- by ordinal; update -- name of the template's revision"""
    spec = sts["spec"]
    ordered = spec.get("podManagementPolicy", "OrderedReady") != "Parallel"
    min_ready = spec.get("minReadySeconds", 0)
    first = start_of(sts)
    wanted = range(first, first + spec.get("replicas", 1))
    step = Step()
    for ordinal in wanted:
        pod = pods.get(ordinal)
        if pod is None:
            step.create.append(ordinal)
        elif pod.status.phase in ENDED and not pod.terminating:
            step.delete.append(pod)
        elif not (ordered and not (healthy(pod) and is_available(pod, min_ready, now))):
            continue
        if ordered:
            return step
    surplus = [pods[ordinal] for ordinal in sorted(pods, reverse=True) if ordinal not in wanted]
    for pod in surplus:
        if not pod.terminating:
            step.delete.append(pod)
        if ordered:
            return step
    if step.create or step.delete:
        return step
    partition = partition_of(sts)
    if partition is None:
        return step
    for ordinal in reversed(wanted):
        if ordinal - first < partition:
            break
        pod = pods[ordinal]
        if pod.metadata.labels.get(REVISION_LABEL) != update and not pod.terminating:
            step.delete.append(pod)
            break
        if not (healthy(pod) and is_available(pod, min_ready, now)):
            break
    return step


def revision_for(sts: Obj, ordinal: int, current: str, update: str) -> str:
    """Return the revision of which a missing Pod is made anew."""
    partition = partition_of(sts)
    if partition is None:
        return update
    rolling = (sts["spec"].get("updateStrategy") or {}).get("rollingUpdate")
    held = (sts.get("status") or {}).get("currentReplicas", 0)
    limit = partition if rolling else held
    return current if ordinal - start_of(sts) < limit else update


def stateful_pod(sts: Obj, template: Obj, ordinal: int, revision: str) -> Obj:
    pod = pod_from(template, sts)
    name = f"{sts['metadata']['name']}-{ordinal}"
    meta, spec = pod["metadata"], pod["spec"]
    meta["name"] = name
    meta["generateName"] = f"{sts['metadata']['name']}-"
    labels = meta.setdefault("labels", {})
    labels[REVISION_LABEL] = revision
    labels[POD_NAME_LABEL] = name
    labels[INDEX_LABEL] = str(ordinal)
    spec["hostname"] = name
    if sts["spec"].get("serviceName"):
        spec["subdomain"] = sts["spec"]["serviceName"]
    claims = [one["metadata"]["name"] for one in sts["spec"].get("volumeClaimTemplates") or ()]
    if claims:
        others = [one for one in spec.get("volumes") or () if one["name"] not in claims]
        spec["volumes"] = [
            *({"name": one, "persistentVolumeClaim": {"claimName": f"{one}-{name}"}}
              for one in claims),
            *others,
        ]  # fmt: skip
    return pod


def wanted_status(sts: Obj, pods: Sequence[Pod], current: str, update: str, now: float) -> Obj:
    spec = sts["spec"]
    live = [pod for pod in pods if not pod.terminating]
    ready = [pod for pod in pods if pod.status.phase == "Running" and pod.ready]
    available = sum(is_available(pod, spec.get("minReadySeconds", 0), now) for pod in ready)

    def at(revision: str) -> int:
        return sum(pod.metadata.labels.get(REVISION_LABEL) == revision for pod in live)

    updated, of_current = at(update), at(current)
    done = len(pods) == updated == len(ready) and updated == spec.get("replicas", 1)
    if partition_of(sts) is not None and done:
        current, of_current = update, updated
    counts = {
        "currentReplicas": of_current,
        "readyReplicas": len(ready),
        "updatedReplicas": updated,
    }
    return {
        "observedGeneration": sts["metadata"].get("generation", 0),
        "replicas": len(pods),
        "availableReplicas": available,
        "collisionCount": 0,
        "currentRevision": current,
        "updateRevision": update,
        **{name: number for name, number in counts.items() if number},
        **({"conditions": kept} if (kept := (sts.get("status") or {}).get("conditions")) else {}),
    }


class StatefulSets(Workloads):
    """The controller. queue -- has a StatefulSet looked at"""

    def __init__(
        self,
        writer: Writer,
        index: Index,
        recorder: Recorder,
        queue: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        super().__init__(writer, index, recorder, queue, clock)
        self._templates: dict[tuple[str, str], Obj] = {}  # uid, revision

    def seen(self, event: Event) -> None:
        resource, namespace, name = event.stored.key
        if resource == STATEFUL_SETS.qualified:
            for version in (event.before, event.stored):
                if version is not None:
                    self._remember(version.obj)
            if event.type != "DELETED":
                self._queue(f"{namespace}/{name}")
        elif resource == PODS.qualified:
            pods = [self._index.pods.get((namespace, name))]
            if event.before is not None:
                pods.append(decode_pod(event.before))
            for pod in pods:
                owner = pod.metadata.controller if pod is not None else None
                if owner is not None and owner.kind == "StatefulSet":
                    self._queue(f"{namespace}/{owner.name}")
                elif pod is not None and owner is None:
                    base = name.rpartition("-")[0]  # an orphan is adopted by its name
                    if base and self._objects.find(STATEFUL_SETS, namespace, base) is not None:
                        self._queue(f"{namespace}/{base}")

    def _remember(self, sts: Obj) -> str:
        revision = revision_name(sts)
        key = (sts["metadata"]["uid"], revision)
        self._templates.pop(key, None)
        self._templates[key] = sts["spec"]["template"]
        while len(self._templates) > MAX_REVISIONS:
            del self._templates[next(iter(self._templates))]
        return revision

    async def reconcile(self, key: str) -> float | None:
        namespace, name = split(key)
        stored = self._objects.find(STATEFUL_SETS, namespace, name)
        if stored is None:
            return None
        sts = stored.obj
        update = self._remember(sts)
        current = (sts.get("status") or {}).get("currentRevision") or update
        await self._claim(sts)
        if not sts["metadata"].get("deletionTimestamp"):
            try:
                await self._carry_out(sts, plan(sts, self._pods(sts), update, self._clock()),
                                      current, update)  # fmt: skip
            except ApiError as e:
                if not terminating(e):
                    raise
        latest = self._objects.find(STATEFUL_SETS, namespace, name)
        if latest is None or latest.uid != stored.uid:
            return None
        now = self._clock()
        pods = list(self._pods(sts).values())
        status = wanted_status(
            sts | {"status": latest.obj.get("status") or {}}, pods, current, update, now
        )
        await self._writer.put_status(STATEFUL_SETS, latest, status)
        return next_available(pods, sts["spec"].get("minReadySeconds", 0), now)

    def _pods(self, sts: Obj) -> dict[int, Pod]:
        found: dict[int, Pod] = {}
        for pod in claim_pods(self._index, sts).own:
            ordinal = ordinal_of(sts, pod.metadata.name)
            if ordinal is not None:
                found[ordinal] = pod
        return found

    async def _claim(self, sts: Obj) -> None:
        claimed = claim_pods(self._index, sts)
        for pod in claimed.adopt:
            if ordinal_of(sts, pod.metadata.name) is not None:
                stored = self._objects.find(PODS, pod.metadata.namespace, pod.metadata.name)
                if stored is not None:
                    await self._writer.change(PODS, stored, owned_by(sts))
        for pod in claimed.release:
            stored = self._objects.find(PODS, pod.metadata.namespace, pod.metadata.name)
            if stored is not None:
                await self._writer.change(PODS, stored, without_owners({sts["metadata"]["uid"]}))

    async def _carry_out(self, sts: Obj, step: Step, current: str, update: str) -> None:
        uid = sts["metadata"]["uid"]

        async def create(ordinal: int) -> None:
            revision = revision_for(sts, ordinal, current, update)
            template = self._templates.get((uid, revision))
            if template is None:  # of before a restart
                revision, template = update, sts["spec"]["template"]
            await self._create(sts, stateful_pod(sts, template, ordinal, revision))

        await in_turns(create(ordinal) for ordinal in step.create)
        await in_turns(self._delete(sts, pod) for pod in step.delete)

    async def _create(self, sts: Obj, pod: Obj) -> None:
        name, own = pod["metadata"]["name"], sts["metadata"]["name"]
        try:
            await self._writer.create(PODS, sts["metadata"]["namespace"], pod)
        except ApiError as e:
            if not terminating(e):
                text = f"create Pod {name} in StatefulSet {own} failed error: {e}"
                self._recorder.warn(sts, "FailedCreate", text, COMPONENT)
            raise
        text = f"create Pod {name} in StatefulSet {own} successful"
        self._recorder.tell(sts, "SuccessfulCreate", text, COMPONENT)

    async def _delete(self, sts: Obj, pod: Pod) -> None:
        meta = pod.metadata
        if await self._writer.delete(PODS, meta.namespace, meta.name, meta.uid):
            own = sts["metadata"]["name"]
            text = f"delete Pod {meta.name} in StatefulSet {own} successful"
            self._recorder.tell(sts, "SuccessfulDelete", text, COMPONENT)
