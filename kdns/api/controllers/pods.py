"""What a scheduler and a kubelet would do, for Pods that run nothing.

Decides a Pod's node, addresses, conditions and end; the addresses are allocate.py's. A Pod is
a name, an address and a readiness here: no image is pulled, no container runs, and nothing
claims that one does beyond the status that clients wait for.

Annotations that people may set: kdns.dev/ready: "false" keeps a Pod unready,
kdns.dev/unmanaged: "true" leaves its node and its status to whoever made it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, Final

from kdns.api.controllers.events import Recorder
from kdns.api.controllers.index import ENDED, NODES, PODS, Index, Pod, chosen, decode_pod, split
from kdns.api.controllers.writes import KUBELET, Writer, condition_of, set_condition
from kdns.api.objects import now_text
from kdns.api.store import Event, Obj, Stored

NAME: Final = "pod"
READY: Final = "kdns.dev/ready"
UNMANAGED: Final = "kdns.dev/unmanaged"
SCHEDULER: Final = "default-scheduler"

NO_ADDRESS_RETRY: Final = 5.0  # seconds until a full range is asked again
# The order in which a kubelet's conditions stand.
CONDITIONS: Final = (
    "PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled",
)  # fmt: skip


def parse_time(text: str) -> float:
    """Return the Unix seconds of a Kubernetes time."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


# --- pure decisions ---------------------------------------------------------------------------


def choose_node(pod: Obj, nodes: Sequence[Obj], load: Callable[[str], int]) -> tuple[str, str]:
    """Return the node for a Pod, that with the least Pods; else "" and why there is none."""
    selector = pod["spec"].get("nodeSelector") or {}
    why: Counter[str] = Counter()
    fitting = []
    for node in nodes:
        if node["spec"].get("unschedulable"):
            why["node(s) were unschedulable"] += 1
        elif not node_ready(node):
            why["node(s) were not ready"] += 1
        elif not chosen(selector, node["metadata"].get("labels") or {}):
            why["node(s) didn't match Pod's node affinity/selector"] += 1
        else:
            fitting.append(node["metadata"]["name"])
    if fitting:
        return min(fitting, key=lambda name: (load(name), name)), ""
    if not nodes:
        return "", "no nodes available to schedule pods"
    told = ", ".join(f"{count} {text}" for text, count in sorted(why.items()))
    return "", f"0/{len(nodes)} nodes are available: {told}."


def node_ready(node: Obj) -> bool:
    ready = condition_of((node.get("status") or {}).get("conditions") or [], "Ready")
    return ready is not None and ready["status"] == "True"


def node_addresses(node: Obj) -> list[str]:
    listed = (node.get("status") or {}).get("addresses") or []
    return [one["address"] for one in listed if one["type"] == "InternalIP"]


def wanted_status(pod: Obj, node: Obj, ips: Sequence[str], running: bool, now: str) -> Obj:
    """Return the status of a Pod on a node.

    running -- its containers count as ready
    """
    status: Obj = dict(pod.get("status") or {})
    status["phase"] = "Running"
    status.update(_observed(pod))
    status.setdefault("startTime", now)
    hosts = node_addresses(node)
    if hosts:
        status["hostIP"], status["hostIPs"] = hosts[0], [{"ip": one} for one in hosts]
    status["podIP"], status["podIPs"] = ips[0], [{"ip": one} for one in ips]
    ready = running and (pod["metadata"].get("annotations") or {}).get(READY) != "false"
    started = status["startTime"]
    containers = pod["spec"].get("containers") or []
    status["containerStatuses"] = [_container(one, ready, started) for one in containers]
    before = pod["spec"].get("initContainers") or []
    if before:
        status["initContainerStatuses"] = [_init_container(one, started) for one in before]
    status["conditions"] = _conditions(pod, node, ready, now)
    return status


def _observed(pod: Obj) -> Obj:
    """Which version of the spec a status is of (KEP-5067)."""
    generation = pod["metadata"].get("generation")
    return {"observedGeneration": generation} if generation else {}


def _container(container: Obj, ready: bool, started: str) -> Obj:
    return {
        "name": container["name"],
        "image": container.get("image", ""),
        "imageID": "",
        "ready": ready,
        "restartCount": 0,
        "started": True,
        "state": {"running": {"startedAt": started}},
    }


def _init_container(container: Obj, started: str) -> Obj:
    if container.get("restartPolicy") == "Always":
        return _container(container, True, started)
    ended = {"exitCode": 0, "reason": "Completed", "startedAt": started, "finishedAt": started}
    return {
        "name": container["name"],
        "image": container.get("image", ""),
        "imageID": "",
        "ready": True,
        "restartCount": 0,
        "started": False,
        "state": {"terminated": ended},
    }


def _conditions(pod: Obj, node: Obj, ready: bool, now: str) -> list[Obj]:
    conditions: list[Obj] = [dict(one) for one in (pod.get("status") or {}).get("conditions") or ()]
    names = " ".join(one["name"] for one in pod["spec"].get("containers") or ())
    unready = {
        "reason": "ContainersNotReady",
        "message": f"containers with unready status: [{names}]",
    }
    why = {} if ready else unready
    waits = _gates(pod, conditions) if ready else {}
    wanted: dict[str, Obj] = {
        "PodReadyToStartContainers": {"status": "True"},
        "Initialized": {"status": "True"},
        # A node that is lost takes its Pods out of Services (node lifecycle).
        "Ready": {"status": _bool(ready and not waits and node_ready(node)), **why, **waits},
        "ContainersReady": {"status": _bool(ready), **why},
        "PodScheduled": {"status": "True"},
    }
    seen = _observed(pod)
    for kind in CONDITIONS:
        set_condition(conditions, {"type": kind, **seen, **wanted[kind]}, now)
    for one in conditions:
        if one["type"] in wanted and one["status"] == "True":
            one.pop("reason", None)
            one.pop("message", None)
    place = {kind: at for at, kind in enumerate(CONDITIONS)}
    return sorted(conditions, key=lambda one: place.get(one["type"], -1))


def _gates(pod: Obj, conditions: list[Obj]) -> Obj:
    """Return reason and message where a readiness gate is closed."""
    told = []
    for gate in pod["spec"].get("readinessGates") or ():
        kind = gate["conditionType"]
        found = condition_of(conditions, kind)
        if found is None:
            told.append(f'corresponding condition of pod readiness gate "{kind}" does not exist.')
        elif found["status"] != "True":
            told.append(
                f'the status of pod readiness gate "{kind}" is not "True", but {found["status"]}'
            )
    return {"reason": "ReadinessGatesNotReady", "message": ", ".join(told)} if told else {}


def _bool(value: bool) -> str:
    return "True" if value else "False"


# --- the controller ---------------------------------------------------------------------------


class Pods:
    """The controller.

    ready_delay       -- seconds from a Pod's start until it is ready
    termination_delay -- seconds from a Pod's deletion until it is gone, its grace at most
    """

    def __init__(
        self,
        writer: Writer,
        index: Index,
        recorder: Recorder,
        queue: Callable[[str], None],
        clock: Callable[[], float],
        *,
        ready_delay: float = 0.0,
        termination_delay: float = 0.0,
    ) -> None:
        self._objects = writer.objects
        self._writer = Writer(writer.objects, KUBELET)
        self._index = index
        self._recorder = recorder
        self._queue = queue
        self._clock = clock
        self._ready_delay = ready_delay
        self._termination_delay = termination_delay
        # Clock readings of this run, finer than the seconds in objects: uid -> when.
        self._started: dict[str, float] = {}
        self._ending: dict[str, float] = {}
        self._assumed: Counter[str] = Counter()  # Pods that are being bound
        self._decoded: dict[str, tuple[int, Obj]] = {}  # Nodes by uid, with their revision
        self._gone: set[str] = set()  # nodes that were deleted

    def seen(self, event: Event) -> None:
        resource, namespace, name = event.stored.key
        if resource == PODS.qualified:
            if event.type == "DELETED":
                self._started.pop(event.stored.uid, None)
                self._ending.pop(event.stored.uid, None)
            else:
                self._queue(f"{namespace}/{name}")
        elif resource == NODES.qualified:
            self._node_seen(event)

    def _node_seen(self, event: Event) -> None:
        name = event.stored.key[2]
        if event.type == "DELETED":
            self._gone.add(name)
        else:
            self._gone.discard(name)
        for pod in self._index.pods_of_node(name):
            self._queue(f"{pod.metadata.namespace}/{pod.metadata.name}")
        for pod in self._index.pods_of_node(""):
            self._queue(f"{pod.metadata.namespace}/{pod.metadata.name}")

    async def reconcile(self, key: str) -> float | None:
        namespace, name = split(key)
        stored = self._objects.find(PODS, namespace, name)
        if stored is None:
            return None
        pod = decode_pod(stored)
        if pod.spec.nodeName in self._gone and pod.spec.nodeName:
            await self._writer.delete(PODS, namespace, name, stored.uid, grace=0)
            return None
        if pod.terminating:
            return await self._end(stored, pod)
        if pod.status.phase in ENDED or pod.metadata.annotations.get(UNMANAGED) == "true":
            return None
        if not pod.spec.nodeName:
            bound = await self._schedule(stored)
            if bound is None:
                return None
            stored = bound
        return await self._run(stored)

    # --- the scheduler's part -----------------------------------------------------------

    async def _schedule(self, stored: Stored) -> Stored | None:
        """Give a Pod its node; return its new version, None if it has to wait."""
        pod = stored.obj
        spec = pod["spec"]
        if spec.get("schedulerName", SCHEDULER) != SCHEDULER:
            return None
        now = now_text(self._clock())
        if spec.get("schedulingGates"):
            text = "Scheduling is blocked due to non-empty scheduling gates"
            await self._unscheduled(stored, "SchedulingGated", text, now)
            return None
        name, why = choose_node(pod, self._nodes(), self._load)
        if not name:
            if await self._unscheduled(stored, "Unschedulable", why, now):
                self._recorder.warn(pod, "FailedScheduling", why, SCHEDULER)
            return None
        self._assumed[name] += 1
        try:
            spec["nodeName"] = name
            status = pod.setdefault("status", {})
            status.setdefault("phase", "Pending")
            conditions = status.setdefault("conditions", [])
            conditions[:] = [one for one in conditions if one["type"] != "PodScheduled"]
            set_condition(conditions, {"type": "PodScheduled", "status": "True"}, now)
            # No client may change a Pod's node; upstream's binding writes past that rule.
            await self._writer.force(PODS, stored, pod)
        finally:
            self._assumed[name] -= 1
        meta = pod["metadata"]
        text = f"Successfully assigned {meta['namespace']}/{meta['name']} to {name}"
        self._recorder.tell(pod, "Scheduled", text, SCHEDULER)
        return self._objects.find(PODS, *stored.key[1:])

    def _nodes(self) -> list[Obj]:
        """Return all Nodes; decoded once, for a thousand Pods may come at a time."""
        held = self._objects.list(NODES).items
        known = self._decoded
        self._decoded = {
            one.uid: found if (found := known.get(one.uid, (0, {})))[0] == one.revision
            else (one.revision, one.obj)
            for one in held
        }  # fmt: skip
        return [obj for _, obj in self._decoded.values()]

    def _load(self, node: str) -> int:
        return self._index.count_on(node) + self._assumed[node]

    async def _unscheduled(self, stored: Stored, reason: str, text: str, now: str) -> bool:
        status = dict(stored.obj.get("status") or {})
        status.setdefault("phase", "Pending")
        conditions = [dict(one) for one in status.get("conditions") or ()]
        new = {"type": "PodScheduled", "status": "False", "reason": reason, "message": text}
        set_condition(conditions, new, now)
        status["conditions"] = conditions
        return await self._writer.put_status(PODS, stored, status)

    # --- the kubelet's part -------------------------------------------------------------

    async def _run(self, stored: Stored) -> float | None:
        pod = stored.obj
        node = self._objects.find(NODES, "", pod["spec"]["nodeName"])
        if node is None:
            return None  # the event of the node brings us back
        host = node.obj
        ips = self._addresses(pod, host)
        if not ips:
            text = "Failed to create pod sandbox: no address is left in the pod range"
            self._recorder.warn(pod, "FailedCreatePodSandBox", text, KUBELET)
            return NO_ADDRESS_RETRY
        left = self._until_ready(pod)
        wanted = wanted_status(pod, host, ips, left <= 0, now_text(self._clock()))
        await self._writer.put_status(PODS, stored, wanted)
        return left if left > 0 else None

    def _addresses(self, pod: Obj, node: Obj) -> list[str]:
        if pod["spec"].get("hostNetwork"):
            return node_addresses(node)
        status = pod.get("status") or {}
        listed = [one["ip"] for one in status.get("podIPs") or () if one.get("ip")]
        return listed or self._objects.allocator.give_pod_ip(pod)

    def _until_ready(self, pod: Obj) -> float:
        """Return the seconds until the containers count as ready, 0 or less: now."""
        if not self._ready_delay:
            return 0.0
        said = (pod.get("status") or {}).get("startTime")
        uid = pod["metadata"]["uid"]
        now = self._clock()
        started = self._started.setdefault(uid, parse_time(said) if said else now)
        return started + self._ready_delay - now

    async def _end(self, stored: Stored, pod: Pod) -> float | None:
        """Say that a Pod has ended, when it is time."""
        meta: Any = pod.metadata
        if not meta.deletionGracePeriodSeconds:
            return None  # finalizers hold it
        now = self._clock()
        delay = min(self._termination_delay, float(meta.deletionGracePeriodSeconds))
        left = self._ending.setdefault(stored.uid, now) + delay - now
        if left > 0:
            return left
        await self._writer.delete(PODS, meta.namespace, meta.name, stored.uid, grace=0)
        return None
