"""Deployments: a rollout of ReplicaSets, step by step.

Decides when to look and what to write; numbers and conditions are deployments_plan.py's.
Upstream: deployment_controller.go.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from kdns.api.controllers import deployments_plan as plan
from kdns.api.controllers.index import DEPLOYMENTS, PODS, REPLICA_SETS, decode_meta, split
from kdns.api.controllers.workload_controller import Workloads
from kdns.api.controllers.workloads import same_template, selector_from
from kdns.api.controllers.writes import condition_of, owned_by, terminating, without_owners
from kdns.api.objects import now_text
from kdns.api.store import Event, Obj, Stored
from kdns.errors import ApiError

NAME: Final = "deployment"
COMPONENT: Final = "deployment-controller"
_SETS: Final = REPLICA_SETS.qualified


class Deployments(Workloads):
    """The controller. queue -- has a Deployment looked at"""

    def seen(self, event: Event) -> None:
        resource, namespace, name = event.stored.key
        if resource == DEPLOYMENTS.qualified:
            if event.type != "DELETED":
                self._queue(f"{namespace}/{name}")
        elif resource == REPLICA_SETS.qualified:
            for version in (event.before, event.stored):
                owner = decode_meta(version).controller if version is not None else None
                if owner is not None and owner.kind == "Deployment":
                    self._queue(f"{namespace}/{owner.name}")
                elif version is not None and owner is None:
                    for one in self._objects.list(DEPLOYMENTS, namespace).items:
                        self._queue(f"{namespace}/{one.key[2]}")
        elif resource == PODS.qualified and event.type == "DELETED":
            # Recreate waits for the last old Pod.
            owner = decode_meta(event.stored).controller
            if owner is not None and owner.kind == "ReplicaSet":
                held = self._objects.find(REPLICA_SETS, namespace, owner.name)
                above = decode_meta(held).controller if held is not None else None
                if above is not None and above.kind == "Deployment":
                    self._queue(f"{namespace}/{above.name}")

    async def reconcile(self, key: str) -> float | None:
        namespace, name = split(key)
        stored = self._objects.find(DEPLOYMENTS, namespace, name)
        if stored is None:
            return None
        d = stored.obj
        if not any((d["spec"].get("selector") or {}).values()):
            self._recorder.warn(
                d, "SelectingAll",
                "This deployment is selecting all pods. A non-empty selector is required.",
                COMPONENT,
            )  # fmt: skip
            return None
        sets = await self._claim(d)
        new, old = plan.split_sets(d, sets)
        if not d["metadata"].get("deletionTimestamp"):
            try:
                await self._sync(d, new, old)
            except ApiError as e:
                if not terminating(e):
                    raise
        return await self._put_status(key, stored.uid)

    async def _sync(self, d: Obj, new: Obj | None, old: list[Obj]) -> None:
        """Take the next step."""
        if d["spec"].get("paused"):
            sizes = plan.scaled(d, new, old) if new is not None or old else {}
            if new is not None:
                await self._keep_annotations(d, new, old)
            await self._resize_all(d, new, old, sizes)
            return
        sizes = plan.resized(d, new, old) or {}
        if sizes:
            await self._resize_all(d, new, old, sizes)
            return
        if plan.is_rolling(d):
            current = await self._current(d, new, old)
            if current is None:
                return
            steps = plan.rolled(d, current, old)
            await self._resize_all(d, current, old, steps)
        else:
            current = await self._recreate(d, new, old)
            if current is None:
                return
        await self._clean_up(d, current, old)

    async def _recreate(self, d: Obj, new: Obj | None, old: list[Obj]) -> Obj | None:
        """All old Pods go before the first new one comes."""
        await self._resize_all(
            d, new, old, {rs["metadata"]["name"]: 0 for rs in old if plan.replicas_of(rs)}
        )
        for rs in old:
            for _, namespace, name in self._index.dependents_of(rs["metadata"]["uid"]):
                pod = self._index.pods.get((namespace, name))
                if pod is not None and pod.status.phase not in ("Succeeded", "Failed"):
                    return None
        current = await self._current(d, new, old)
        if current is not None:
            wanted = {current["metadata"]["name"]: plan.replicas_of(d)}
            await self._resize_all(d, current, old, wanted)
        return current

    # --- ReplicaSets ----------------------------------------------------------------------

    async def _claim(self, d: Obj) -> list[Obj]:
        """Return the Deployment's ReplicaSets; take orphans that match, let go what does not."""
        namespace, uid = d["metadata"]["namespace"], d["metadata"]["uid"]
        matches = selector_from(d["spec"]["selector"])
        found = []
        for stored in self._sets(namespace, uid, self._index.stray_sets.get(namespace, ())):
            owner = decode_meta(stored).controller
            fits = matches.matches(stored.labels)
            if owner is not None and owner.uid == uid:
                if fits:
                    found.append(stored.obj)
                else:
                    await self._writer.change(REPLICA_SETS, stored, without_owners({uid}))
            elif owner is None and fits and not d["metadata"].get("deletionTimestamp"):
                adopted = await self._writer.change(REPLICA_SETS, stored, owned_by(d))
                found.append(adopted or stored.obj)
        return found

    def _sets(self, namespace: str, uid: str, others: Iterable[str] = ()) -> list[Stored]:
        """Return the ReplicaSets that an owner has, and those of other names."""
        names = {key[2] for key in self._index.dependents_of(uid) if key[0] == _SETS}
        found = (self._objects.find(REPLICA_SETS, namespace, name) for name in
                 sorted(names.union(others)))  # fmt: skip
        return [one for one in found if one is not None]

    async def _current(self, d: Obj, new: Obj | None, old: list[Obj]) -> Obj | None:
        """Return the ReplicaSet of the present template, made or annotated as need be."""
        if new is not None:
            return await self._keep_annotations(d, new, old)
        revision = plan.next_revision(old)
        replicas = plan.first_replicas(d, None, old)
        status = d.get("status") or {}
        collisions = status.get("collisionCount", 0)
        made = plan.new_set(d, revision, replicas, collisions)
        namespace = made["metadata"]["namespace"]
        try:
            new = await self._writer.create(REPLICA_SETS, namespace, made)
        except ApiError as e:
            if e.reason != "AlreadyExists":
                if not terminating(e):
                    text = f'Failed to create new replica set "{made["metadata"]["name"]}": {e}'
                    self._recorder.warn(d, "ReplicaSetCreateError", text, COMPONENT)
                raise
            await self._count_collision(d, made)
            raise
        if replicas:
            text = f"Scaled up replica set {new['metadata']['name']} from 0 to {replicas}"
            self._recorder.tell(d, "ScalingReplicaSet", text, COMPONENT)
        await self._set_revision(d, new)
        await self._note_new(d, new)
        return new

    async def _count_collision(self, d: Obj, made: Obj) -> None:
        """Another ReplicaSet has the name: the next try hashes differently."""
        meta = made["metadata"]
        held = self._objects.find(REPLICA_SETS, meta["namespace"], meta["name"])
        if held is None:
            return
        owner = decode_meta(held).controller
        ours = owner is not None and owner.uid == d["metadata"]["uid"]
        if ours and same_template(held.obj["spec"]["template"], d["spec"]["template"]):
            return  # the next look finds it
        stored = self._objects.get(DEPLOYMENTS, meta["namespace"], d["metadata"]["name"])
        status = dict(stored.obj.get("status") or {})
        status["collisionCount"] = status.get("collisionCount", 0) + 1
        await self._writer.put_status(DEPLOYMENTS, stored, status)

    async def _keep_annotations(self, d: Obj, new: Obj, old: list[Obj]) -> Obj:
        stored = self._stored(new)
        if stored is None:
            return new

        def change(obj: Obj) -> None:
            plan.annotate_new(d, obj, plan.next_revision(old))

        changed = await self._writer.change(REPLICA_SETS, stored, change)
        await self._set_revision(d, changed or new)
        return changed or new

    async def _set_revision(self, d: Obj, new: Obj) -> None:
        """A Deployment says which revision it is at."""
        revision = (new["metadata"].get("annotations") or {}).get(plan.REVISION, "")
        meta = d["metadata"]
        stored = self._objects.find(DEPLOYMENTS, meta["namespace"], meta["name"])
        if stored is None or stored.uid != meta["uid"]:
            return

        def change(obj: Obj) -> None:
            obj["metadata"].setdefault("annotations", {})[plan.REVISION] = revision

        if revision:
            await self._writer.change(DEPLOYMENTS, stored, change)

    async def _note_new(self, d: Obj, new: Obj) -> None:
        """The deadline counts from here."""
        meta = d["metadata"]
        stored = self._objects.find(DEPLOYMENTS, meta["namespace"], meta["name"])
        if stored is None or plan.deadline_of(d) is None:
            return
        status = stored.obj.get("status") or {}
        conditions = [dict(one) for one in status.get("conditions") or ()]
        name, text = new["metadata"]["name"], now_text(self._clock())
        plan.set_deployment_condition(
            conditions, "Progressing", "True", "NewReplicaSetCreated",
            f'Created new replica set "{name}"', text,
        )  # fmt: skip
        await self._writer.put_status(DEPLOYMENTS, stored, {**status, "conditions": conditions})

    async def _resize_all(
        self, d: Obj, new: Obj | None, old: list[Obj], sizes: dict[str, int]
    ) -> None:
        for rs in [*([new] if new is not None else []), *old]:
            size = sizes.get(rs["metadata"]["name"])
            if size is not None:
                await self._resize(d, rs, size)

    async def _resize(self, d: Obj, rs: Obj, size: int) -> None:
        stored = self._stored(rs)
        if stored is None:
            return
        before = plan.replicas_of(stored.obj)

        def change(obj: Obj) -> None:
            obj["spec"]["replicas"] = size
            annotations = obj["metadata"].setdefault("annotations", {})
            annotations[plan.DESIRED] = str(plan.replicas_of(d))
            annotations[plan.MAX] = str(plan.replicas_of(d) + plan.bounds(d)[0])

        await self._writer.change(REPLICA_SETS, stored, change)
        if before != size:
            word = "up" if size > before else "down"
            name = rs["metadata"]["name"]
            text = f"Scaled {word} replica set {name} from {before} to {size}"
            self._recorder.tell(d, "ScalingReplicaSet", text, COMPONENT)

    async def _clean_up(self, d: Obj, new: Obj, old: list[Obj]) -> None:
        held = self._objects.find(DEPLOYMENTS, d["metadata"]["namespace"], d["metadata"]["name"])
        if held is None or not plan.complete(d, held.obj.get("status") or {}):
            return
        for rs in plan.expired_sets(d, old):
            meta = rs["metadata"]
            await self._writer.delete(REPLICA_SETS, meta["namespace"], meta["name"], meta["uid"])

    def _stored(self, rs: Obj) -> Stored | None:
        meta = rs["metadata"]
        found = self._objects.find(REPLICA_SETS, meta["namespace"], meta["name"])
        return found if found is not None and found.uid == meta["uid"] else None

    # --- status ---------------------------------------------------------------------------

    async def _put_status(self, key: str, uid: str) -> float | None:
        namespace, name = split(key)
        stored = self._objects.find(DEPLOYMENTS, namespace, name)
        if stored is None or stored.uid != uid:
            return None
        d = stored.obj
        sets = [
            one.obj for one in self._sets(namespace, uid)
            if (owner := decode_meta(one).controller) is not None and owner.uid == uid
        ]  # fmt: skip
        new, old = plan.split_sets(d, sets)
        now = self._clock()
        text = now_text(now)
        status = plan.wanted_status(d, new, old, now, text)
        self._set_paused(d, status, text)
        again = plan.set_progress(d, status, new, now, text)
        await self._writer.put_status(DEPLOYMENTS, stored, status)
        return again

    def _set_paused(self, d: Obj, status: Obj, text: str) -> None:
        if plan.deadline_of(d) is None:
            return
        conditions = status["conditions"]
        current = condition_of(conditions, "Progressing")
        if current is not None and current.get("reason") == "ProgressDeadlineExceeded":
            return
        paused = current is not None and current.get("reason") == "DeploymentPaused"
        if d["spec"].get("paused") and not paused:
            plan.set_deployment_condition(
                conditions, "Progressing", "Unknown", "DeploymentPaused",
                "Deployment is paused", text,
            )  # fmt: skip
        elif not d["spec"].get("paused") and paused:
            plan.set_deployment_condition(
                conditions, "Progressing", "Unknown", "DeploymentResumed",
                "Deployment is resumed", text,
            )  # fmt: skip
