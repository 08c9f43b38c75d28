"""What Deployments, ReplicaSets and StatefulSets share: hashes, selectors, Pods of a template.

Pure. Decides how a revision is named, which Pods belong to whom and what a Pod made from a
template looks like; when Pods are made and deleted is each workload's own. Upstream:
controller_utils.go, controller_ref_manager.go.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from kdns.api.controllers.index import Index, Pod
from kdns.api.controllers.pods import parse_time
from kdns.api.controllers.writes import owner_reference
from kdns.api.objects import NAME_LETTERS
from kdns.api.patch import copied
from kdns.api.store import Obj
from kdns.registry.selectors import Selector, requirement_of, selector_of

HASH_LABEL: Final = "pod-template-hash"
DELETION_COST: Final = "controller.kubernetes.io/pod-deletion-cost"
BURST: Final = 500  # Pods made or deleted in one go, as upstream

_PHASES: Final = {"Pending": 0, "": 0, "Unknown": 1, "Running": 2}


def template_hash(template: Obj, collisions: int = 0) -> str:
    """Return a name for a template: the same for the same content (FNV-1a of 32 bits, in
    letters that make no words). Not upstream's number, which is of Go's memory layout."""
    kept = copied(template)
    labels = (kept.get("metadata") or {}).get("labels")
    if labels:
        labels.pop(HASH_LABEL, None)
    text = msgspec.json.encode(kept, order="deterministic")
    if collisions:
        text += str(collisions).encode()
    number = 2166136261
    for octet in text:
        number = ((number ^ octet) * 16777619) & 0xFFFFFFFF
    return "".join(NAME_LETTERS[ord(digit) % len(NAME_LETTERS)] for digit in str(number))


def same_template(one: Obj, other: Obj) -> bool:
    """True if two templates differ in nothing but the label that names them."""

    def bare(template: Obj) -> Obj:
        meta = dict(template.get("metadata") or {})
        meta["labels"] = {k: v for k, v in (meta.get("labels") or {}).items() if k != HASH_LABEL}
        meta.pop("creationTimestamp", None)
        return {**template, "metadata": {k: v for k, v in meta.items() if v}}

    return bare(one) == bare(other)


def selector_from(label_selector: Obj) -> Selector:
    """Raises BadSelector."""
    expressions = [
        requirement_of(one["key"], one["operator"], one.get("values") or ())
        for one in label_selector.get("matchExpressions") or ()
    ]
    return selector_of(label_selector.get("matchLabels") or {}, expressions)


@dataclass(slots=True)
class Claimed:
    """Pods that a workload has, should take (orphans that match) and should let go."""

    own: list[Pod] = field(default_factory=list)
    adopt: list[Pod] = field(default_factory=list)
    release: list[Pod] = field(default_factory=list)


def claim_pods(index: Index, workload: Obj) -> Claimed:
    meta, selector = workload["metadata"], workload["spec"]["selector"]
    matches = selector_from(selector)
    claimed = Claimed()
    seen: set[str] = set()
    for pod in index.pods_in(meta["namespace"], selector.get("matchLabels")):
        if not matches.matches(pod.metadata.labels):
            continue
        owner = pod.metadata.controller
        seen.add(pod.metadata.name)
        if owner is not None and owner.uid == meta["uid"]:
            claimed.own.append(pod)
        elif owner is None and pod.active and not meta.get("deletionTimestamp"):
            claimed.adopt.append(pod)
    for _, namespace, name in index.dependents_of(meta["uid"]):
        found = index.pods.get((namespace, name))
        if found is not None and name not in seen:
            owner = found.metadata.controller
            if owner is not None and owner.uid == meta["uid"] and not found.terminating:
                claimed.release.append(found)
    return claimed


def pod_from(template: Obj, owner: Obj) -> Obj:
    """Return a Pod of a template, without a name."""
    meta = template.get("metadata") or {}
    made: Obj = {
        "namespace": owner["metadata"]["namespace"],
        "ownerReferences": [owner_reference(owner)],
    }
    for name in ("labels", "annotations", "finalizers"):
        if meta.get(name):
            made[name] = copied(meta[name])
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": made,
        "spec": copied(template.get("spec") or {}),
    }


def available_in(pod: Pod, min_ready: int, now: float) -> float | None:
    """Return the seconds until a Pod counts as available, 0: it does; None: it is not ready."""
    condition = pod.ready_condition
    if condition is None or condition.status != "True":
        return None
    if not min_ready:
        return 0.0
    return max(parse_time(condition.lastTransitionTime) + min_ready - now, 0.0)


def is_available(pod: Pod, min_ready: int, now: float) -> bool:
    return available_in(pod, min_ready, now) == 0.0


def next_available(pods: Iterable[Pod], min_ready: int, now: float) -> float | None:
    """Return the seconds until the next Pod becomes available by waiting alone."""
    waits = [left for pod in pods if (left := available_in(pod, min_ready, now))]
    return min(waits, default=None)


def deletion_order(pods: Sequence[Pod], crowd: Mapping[str, int]) -> list[Pod]:
    """Return Pods in the order in which a ReplicaSet gives them up.

    crowd -- Pods of the same workload on each node: doubled ones go first
    """

    def rank(pod: Pod) -> tuple[Any, ...]:
        condition = pod.ready_condition
        since = parse_time(condition.lastTransitionTime) if pod.ready and condition else 0.0
        try:
            cost = int(pod.metadata.annotations.get(DELETION_COST, "0"))
        except ValueError:
            cost = 0
        return (
            bool(pod.spec.nodeName),
            _PHASES.get(pod.status.phase, 1),
            pod.ready,
            cost,
            -crowd.get(pod.spec.nodeName, 0),
            -since,
            -parse_time(pod.metadata.creationTimestamp),
            pod.metadata.name,
        )

    return sorted(pods, key=rank)


def whole_or_part(value: Any, total: int, *, up: bool) -> int:
    """Return what an int-or-percentage means of `total`; the empty value means 0."""
    if isinstance(value, int):
        return value
    if not value:
        return 0
    part = int(str(value).rstrip("%")) * total
    return -(-part // 100) if up else part // 100
