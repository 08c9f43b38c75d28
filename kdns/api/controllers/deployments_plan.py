"""How a Deployment's ReplicaSets change: pure functions.

Decides revisions, how many replicas each ReplicaSet is to have now, and the status; what is
written is deployments.py's. Upstream: deployment/sync.go, rolling.go, recreate.go,
progress.go, util/deployment_util.go.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from kdns.api.controllers.pods import parse_time
from kdns.api.controllers.workloads import (
    HASH_LABEL,
    same_template,
    template_hash,
    whole_or_part,
)
from kdns.api.controllers.writes import condition_of, owner_reference, set_condition
from kdns.api.patch import copied
from kdns.api.store import Obj

REVISION: Final = "deployment.kubernetes.io/revision"
HISTORY: Final = "deployment.kubernetes.io/revision-history"
DESIRED: Final = "deployment.kubernetes.io/desired-replicas"
MAX: Final = "deployment.kubernetes.io/max-replicas"
# A Deployment's annotations that its ReplicaSets do not inherit.
OWN_ANNOTATIONS: Final = frozenset(
    {"kubectl.kubernetes.io/last-applied-configuration", REVISION, HISTORY, DESIRED, MAX}
)
NO_DEADLINE: Final = 2**31 - 1


def replicas_of(obj: Obj) -> int:
    return int(obj["spec"].get("replicas", 1))


def is_rolling(d: Obj) -> bool:
    return bool((d["spec"].get("strategy") or {}).get("type", "RollingUpdate") == "RollingUpdate")


def bounds(d: Obj) -> tuple[int, int]:
    """Return (maxSurge, maxUnavailable) as numbers; never both 0."""
    if not is_rolling(d):
        return 0, 0
    rolling = (d["spec"].get("strategy") or {}).get("rollingUpdate") or {}
    total = replicas_of(d)
    surge = whole_or_part(rolling.get("maxSurge", "25%"), total, up=True)
    unavailable = whole_or_part(rolling.get("maxUnavailable", "25%"), total, up=False)
    if not surge and not unavailable:
        unavailable = 1
    return surge, min(unavailable, total)


def by_age(sets: Sequence[Obj]) -> list[Obj]:
    return sorted(
        sets, key=lambda rs: (rs["metadata"]["creationTimestamp"], rs["metadata"]["name"])
    )


def revision_of(obj: Obj) -> int:
    text = (obj["metadata"].get("annotations") or {}).get(REVISION, "")
    return int(text) if text.isdigit() else 0


def split_sets(d: Obj, sets: Sequence[Obj]) -> tuple[Obj | None, list[Obj]]:
    """Return the ReplicaSet of the present template, the oldest if there are several, and
    the others by age."""
    template = d["spec"]["template"]
    ordered = by_age(sets)
    new = next((rs for rs in ordered if same_template(rs["spec"]["template"], template)), None)
    return new, [rs for rs in ordered if rs is not new]


def new_set(d: Obj, revision: int, replicas: int, collisions: int) -> Obj:
    """Return the ReplicaSet of the present template."""
    spec = d["spec"]
    named = template_hash(spec["template"], collisions)
    template = copied(spec["template"])
    labels = template.setdefault("metadata", {}).setdefault("labels", {})
    labels[HASH_LABEL] = named
    selector = copied(spec["selector"])
    selector.setdefault("matchLabels", {})[HASH_LABEL] = named
    made: Obj = {
        "apiVersion": "apps/v1",
        "kind": "ReplicaSet",
        "metadata": {
            "name": f"{d['metadata']['name']}-{named}",
            "namespace": d["metadata"]["namespace"],
            "labels": dict(labels),
            "annotations": {},
            "ownerReferences": [owner_reference(d)],
        },
        "spec": {"replicas": replicas, "selector": selector, "template": template},
    }
    if spec.get("minReadySeconds"):
        made["spec"]["minReadySeconds"] = spec["minReadySeconds"]
    annotate_new(d, made, revision)
    return made


def annotate_new(d: Obj, rs: Obj, revision: int) -> None:
    """Give the present ReplicaSet its revision and its Deployment's annotations, in place."""
    annotations = rs["metadata"].setdefault("annotations", {})
    for name, value in (d["metadata"].get("annotations") or {}).items():
        if name not in OWN_ANNOTATIONS:
            annotations[name] = value
    before = annotations.get(REVISION, "")
    if int(before or 0) < revision:
        annotations[REVISION] = str(revision)
        if before:
            past = [one for one in annotations.get(HISTORY, "").split(",") if one]
            annotations[HISTORY] = ",".join([*past, before])
    annotations.setdefault(DESIRED, str(replicas_of(d)))
    annotations.setdefault(MAX, str(replicas_of(d) + bounds(d)[0]))
    if d["spec"].get("minReadySeconds") != rs["spec"].get("minReadySeconds"):
        rs["spec"]["minReadySeconds"] = d["spec"].get("minReadySeconds", 0)


def next_revision(old: Sequence[Obj]) -> int:
    return max((revision_of(rs) for rs in old), default=0) + 1


# --- how many ---------------------------------------------------------------------------------


def first_replicas(d: Obj, new: Obj | None, old: Sequence[Obj]) -> int:
    """Return how many replicas the present ReplicaSet may have now, when it grows."""
    have = replicas_of(new) if new is not None else 0
    if not is_rolling(d):
        return replicas_of(d)
    total = have + sum(map(replicas_of, old))
    limit = replicas_of(d) + bounds(d)[0]
    if total >= limit:
        return have
    return have + min(limit - total, replicas_of(d) - have)


def resized(d: Obj, new: Obj | None, old: Sequence[Obj]) -> dict[str, int] | None:
    """Return the replicas after spec.replicas was changed, by name of the ReplicaSet; None if
    it was not. During a rollout all grow or shrink in proportion."""
    everything = [*([new] if new is not None else []), *old]
    active = [rs for rs in everything if replicas_of(rs) > 0]
    total = replicas_of(d)
    if not any(_desired(rs) not in (None, total) for rs in active):
        return None
    return scaled(d, new, old)


def scaled(d: Obj, new: Obj | None, old: Sequence[Obj]) -> dict[str, int]:
    everything = [*([new] if new is not None else []), *old]
    active = [rs for rs in everything if replicas_of(rs) > 0]
    total = replicas_of(d)
    if len(active) <= 1:
        latest = active[0] if active else (new or (old[-1] if old else None))
        return {} if latest is None else {latest["metadata"]["name"]: total}
    if new is not None and _saturated(d, new):
        return {rs["metadata"]["name"]: 0 for rs in old if replicas_of(rs)}
    if not is_rolling(d):
        return {}
    return _proportional(d, active)


def _desired(rs: Obj) -> int | None:
    text = (rs["metadata"].get("annotations") or {}).get(DESIRED, "")
    return int(text) if text.isdigit() else None


def _saturated(d: Obj, rs: Obj) -> bool:
    total = replicas_of(d)
    available = (rs.get("status") or {}).get("availableReplicas", 0)
    return replicas_of(rs) == total and _desired(rs) == total and available == total


def _proportional(d: Obj, active: Sequence[Obj]) -> dict[str, int]:
    held = sum(map(replicas_of, active))
    total = replicas_of(d)
    allowed = total + bounds(d)[0] if total else 0
    to_add = allowed - held
    # The largest take most: newer first when growing, older first when shrinking.
    aged = by_age(active)
    if to_add > 0:
        aged.reverse()
    ordered = sorted(aged, key=replicas_of, reverse=True)
    wanted: dict[str, int] = {}
    added = 0
    for rs in ordered:
        part = 0
        if to_add:
            part = _share(d, rs, to_add, added)
            added += part
        wanted[rs["metadata"]["name"]] = max(replicas_of(rs) + part, 0)
    if ordered and to_add != added:
        first = ordered[0]["metadata"]["name"]
        wanted[first] = max(wanted[first] + to_add - added, 0)
    return wanted


def _share(d: Obj, rs: Obj, to_add: int, added: int) -> int:
    have = replicas_of(rs)
    before = (rs["metadata"].get("annotations") or {}).get(MAX, "")
    basis = int(before) if before.isdigit() and int(before) else replicas_of(d)
    target = replicas_of(d) + bounds(d)[0]
    share = round(have * target / basis) - have if basis else 0
    left = to_add - added
    return min(share, left) if to_add > 0 else max(share, left)


def rolled(d: Obj, new: Obj, old: Sequence[Obj]) -> dict[str, int]:
    """Return the next step of a rolling update: replicas by name, {}: nothing to do now."""
    total, have = replicas_of(d), replicas_of(new)
    step = total if have > total else first_replicas(d, new, old)
    if have != total and step != have:
        return {new["metadata"]["name"]: step}
    return _shrunk(d, new, old)


def _shrunk(d: Obj, new: Obj, old: Sequence[Obj]) -> dict[str, int]:
    olds = [rs for rs in old if replicas_of(rs) > 0]
    everything = [*olds, new]
    least = replicas_of(d) - bounds(d)[1]
    new_missing = replicas_of(new) - _available(new)
    room = sum(map(replicas_of, everything)) - least - new_missing
    if not olds or room <= 0:
        return {}
    wanted = {rs["metadata"]["name"]: replicas_of(rs) for rs in olds}
    # What does not work anyway goes first.
    for rs in olds:
        name = rs["metadata"]["name"]
        broken = min(room, replicas_of(rs) - _available(rs))
        if broken > 0:
            wanted[name] -= broken
            room -= broken
    spare = sum(map(_available, everything)) - least
    for rs in olds:
        name = rs["metadata"]["name"]
        less = min(wanted[name], max(spare, 0))
        wanted[name] -= less
        spare -= less
    return {
        name: n for rs in olds if (n := wanted[name := rs["metadata"]["name"]]) != replicas_of(rs)
    }


def _available(rs: Obj) -> int:
    return int((rs.get("status") or {}).get("availableReplicas", 0))


def expired_sets(d: Obj, old: Sequence[Obj]) -> list[Obj]:
    """Return the ReplicaSets that are more than the history is to hold."""
    limit = d["spec"].get("revisionHistoryLimit", 10)
    alive = [rs for rs in old if not rs["metadata"].get("deletionTimestamp")]
    surplus = len(alive) - limit
    if surplus <= 0:
        return []
    ordered = sorted(alive, key=lambda rs: (revision_of(rs), rs["metadata"]["creationTimestamp"]))
    found = []
    for rs in ordered[:surplus]:
        status, meta = rs.get("status") or {}, rs["metadata"]
        observed = status.get("observedGeneration", 0) >= meta.get("generation", 0)
        if not status.get("replicas") and not replicas_of(rs) and observed:
            found.append(rs)
    return found


# --- status -----------------------------------------------------------------------------------


def wanted_status(d: Obj, new: Obj | None, old: Sequence[Obj], now: float, text: str) -> Obj:
    """Return the status, conditions included. now: Unix seconds, text: the same as text."""
    before = d.get("status") or {}
    everything = [*([new] if new is not None else []), *old]

    def total(name: str) -> int:
        return sum((rs.get("status") or {}).get(name, 0) for rs in everything)

    available = total("availableReplicas")
    updated = (new.get("status") or {}).get("replicas", 0) if new is not None else 0
    counts = {
        "observedGeneration": d["metadata"].get("generation", 0),
        "replicas": total("replicas"),
        "updatedReplicas": updated,
        "readyReplicas": total("readyReplicas"),
        "availableReplicas": available,
        "unavailableReplicas": max(sum(map(replicas_of, everything)) - available, 0),
    }
    status: Obj = {name: number for name, number in counts.items() if number}
    status["terminatingReplicas"] = total("terminatingReplicas")
    if before.get("collisionCount"):
        status["collisionCount"] = before["collisionCount"]
    conditions = [dict(one) for one in before.get("conditions") or ()]
    enough = available >= replicas_of(d) - bounds(d)[1]
    set_deployment_condition(
        conditions, "Available", "True" if enough else "False",
        "MinimumReplicasAvailable" if enough else "MinimumReplicasUnavailable",
        "Deployment has minimum availability." if enough
        else "Deployment does not have minimum availability.", text,
    )  # fmt: skip
    _set_failure(conditions, everything, text)
    if deadline_of(d) is None:
        conditions = [one for one in conditions if one["type"] != "Progressing"]
    status["conditions"] = conditions
    return status


def deadline_of(d: Obj) -> int | None:
    seconds = d["spec"].get("progressDeadlineSeconds", 600)
    return None if seconds is None or seconds >= NO_DEADLINE else int(seconds)


def _set_failure(conditions: list[Obj], sets: Sequence[Obj], text: str) -> None:
    for rs in sets:
        found = condition_of((rs.get("status") or {}).get("conditions") or [], "ReplicaFailure")
        if found is not None:
            set_deployment_condition(
                conditions, "ReplicaFailure", found["status"], found.get("reason", ""),
                found.get("message", ""), text,
            )  # fmt: skip
            return
    conditions[:] = [one for one in conditions if one["type"] != "ReplicaFailure"]


def set_deployment_condition(
    conditions: list[Obj], kind: str, status: str, reason: str, message: str, text: str
) -> None:
    """Set a condition unless status and reason are as before: those decide, not the words."""
    old = condition_of(conditions, kind)
    if old is not None and old["status"] == status and old.get("reason") == reason:
        return
    new = {"type": kind, "status": status, "reason": reason, "message": message}
    set_condition(conditions, new, text, updated=True)


def set_progress(d: Obj, status: Obj, new: Obj | None, now: float, text: str) -> float | None:
    """Bring the Progressing condition up to date, in `status`; return the seconds until the
    deadline has to be looked at again."""
    deadline = deadline_of(d)
    if deadline is None:
        return None
    conditions = status["conditions"]
    current = condition_of(conditions, "Progressing")
    if d["spec"].get("paused"):
        return None
    done = current is not None and current.get("reason") == "NewReplicaSetAvailable"
    counts_equal = status.get("replicas", 0) == status.get("updatedReplicas", 0)
    if done and counts_equal:
        return None
    meta = d["metadata"]
    what = (
        f'ReplicaSet "{new["metadata"]["name"]}"' if new is not None
        else f'Deployment "{meta["name"]}"'
    )  # fmt: skip
    if complete(d, status):
        set_deployment_condition(
            conditions, "Progressing", "True", "NewReplicaSetAvailable",
            f"{what} has successfully progressed.", text,
        )  # fmt: skip
        return None
    if progressed(d.get("status") or {}, status):
        _set_moving(conditions, f"{what} is progressing.", text)
    elif current is not None and _timed_out(current, deadline, now):
        set_deployment_condition(
            conditions, "Progressing", "False", "ProgressDeadlineExceeded",
            f"{what} has timed out progressing.", text,
        )  # fmt: skip
        return None
    current = condition_of(conditions, "Progressing")
    if current is None or current.get("reason") == "ProgressDeadlineExceeded":
        return None
    return max(parse_time(current["lastUpdateTime"]) + deadline - now, 0.0) + 1.0


def _set_moving(conditions: list[Obj], message: str, text: str) -> None:
    """lastUpdateTime moves with each step: the deadline counts from the last one."""
    old = condition_of(conditions, "Progressing")
    entry: Obj = {
        "type": "Progressing", "status": "True", "reason": "ReplicaSetUpdated",
        "message": message, "lastUpdateTime": text, "lastTransitionTime": text,
    }  # fmt: skip
    if old is not None and old["status"] == "True":
        entry["lastTransitionTime"] = old["lastTransitionTime"]
    conditions[:] = [one for one in conditions if one["type"] != "Progressing"]
    conditions.append(entry)


def _timed_out(condition: Obj, deadline: int, now: float) -> bool:
    if condition.get("reason") == "ProgressDeadlineExceeded":
        return True
    if condition.get("reason") == "NewReplicaSetAvailable":
        return False
    return now > parse_time(condition["lastUpdateTime"]) + deadline


def complete(d: Obj, status: Obj) -> bool:
    total = replicas_of(d)
    numbers = (status.get(n, 0) for n in ("updatedReplicas", "replicas", "availableReplicas"))
    return all(number == total for number in numbers)


def progressed(before: Any, after: Obj) -> bool:
    def old(name: str) -> int:
        return int(before.get(name, 0))

    def stale(status: Any) -> int:
        return int(status.get("replicas", 0)) - int(status.get("updatedReplicas", 0))

    grown = ("updatedReplicas", "readyReplicas", "availableReplicas")
    return any(after.get(n, 0) > old(n) for n in grown) or stale(after) < stale(before)
