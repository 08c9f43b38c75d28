"""Namespaces: what each has from the start, and how one goes away with all it holds.

Decides the default Namespaces, the ServiceAccount and the root certificate in each, and the
order and conditions of a deletion. Upstream: the namespace, serviceaccount and
root-ca-certificate-publisher controllers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final

from kdns.api.controllers.index import CONFIG_MAPS, NAMESPACES, PODS, SERVICE_ACCOUNTS
from kdns.api.controllers.writes import Writer, in_turns, set_condition
from kdns.api.kinds import RESOURCES, Resource
from kdns.api.objects import now_text
from kdns.api.status import MODIFIED, conflict
from kdns.api.store import Conflicted, Delete, Event, Obj, Stored

NAME: Final = "namespace"
DEFAULT: Final = ("default", "kube-system", "kube-public", "kube-node-lease")
FINALIZER: Final = "kubernetes"
ROOT_CA: Final = "kube-root-ca.crt"
# Pods first, for what they use stands in the rest (KEP-5080).
EMPTIED: Final = (PODS, *(r for r in RESOURCES if r.namespaced and r is not PODS))
RETRY: Final = 5.0  # seconds until finalizers are asked again; events come sooner


def default_namespace(name: str) -> Obj:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}


def service_account(namespace: str) -> Obj:
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"name": "default", "namespace": namespace},
    }


def root_certificate(namespace: str, certificate: str) -> Obj:
    about = "Contains a CA bundle that can be used to verify the kube-apiserver when using internal"
    text = f"{about} endpoints such as the internal service IP or kubernetes.default.svc. No other"
    note = f"{text} usage is guaranteed across distributions of Kubernetes clusters."
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": ROOT_CA,
            "namespace": namespace,
            "annotations": {"kubernetes.io/description": note},
        },
        "data": {"ca.crt": certificate},
    }


def deletion_conditions(
    old: list[Obj], left: Mapping[str, int], finalizers: Mapping[str, int], now: str
) -> list[Obj]:
    """Return the conditions of a Namespace on its way out.

    left       -- objects that are still there, by resource; finalizers: by finalizer
    """
    remaining = ", ".join(f"{name} has {count} resource instances" for name, count in left.items())
    holding = ", ".join(
        f"{name} in {count} resource instances" for name, count in finalizers.items()
    )
    rows = (
        ("NamespaceDeletionDiscoveryFailure", "", "ResourcesDiscovered",
         "All resources successfully discovered"),
        ("NamespaceDeletionGroupVersionParsingFailure", "", "ParsedGroupVersions",
         "All legacy kube types successfully parsed"),
        ("NamespaceDeletionContentFailure", "", "ContentDeleted",
         "All content successfully deleted, may be waiting on finalization"),
        ("NamespaceContentRemaining", remaining,
         "SomeResourcesRemain" if left else "ContentRemoved",
         f"Some resources are remaining: {remaining}" if left
         else "All content successfully removed"),
        ("NamespaceFinalizersRemaining", holding,
         "SomeFinalizersRemain" if finalizers else "ContentHasNoFinalizers",
         f"Some content in the namespace has finalizers remaining: {holding}" if finalizers
         else "All content-preserving finalizers finished"),
    )  # fmt: skip
    conditions = [dict(one) for one in old]
    for kind, true, reason, message in rows:
        status = "True" if true else "False"
        new = {"type": kind, "status": status, "reason": reason, "message": message}
        set_condition(conditions, new, now)
    return conditions


class Namespaces:
    """The controller. root_ca -- PEM that clients in the cluster trust"""

    def __init__(
        self,
        writer: Writer,
        queue: Callable[[str], None],
        clock: Callable[[], float],
        root_ca: str,
    ) -> None:
        self._writer = writer
        self._objects = writer.objects
        self._queue = queue
        self._clock = clock
        self._root_ca = root_ca
        self._leaving: set[str] = set()

    async def bootstrap(self) -> None:
        for name in DEFAULT:
            await self._writer.ensure(NAMESPACES, "", default_namespace(name))
            await self._furnish(name)

    def seen(self, event: Event) -> None:
        resource, namespace, name = event.stored.key
        if resource == NAMESPACES.qualified:
            if event.type == "DELETED":
                self._leaving.discard(name)
            else:
                self._queue(name)
        elif namespace in self._leaving:
            if event.type == "DELETED":
                self._queue(namespace)  # finalizers have been heard
        elif event.type != "ADDED" and (
            (resource == SERVICE_ACCOUNTS.qualified and name == "default")
            or (resource == CONFIG_MAPS.qualified and name == ROOT_CA)
        ):
            self._queue(namespace)

    async def reconcile(self, name: str) -> float | None:
        stored = self._objects.find(NAMESPACES, "", name)
        if stored is None:
            return None
        if b'"deletionTimestamp"' in stored.body and stored.obj["metadata"].get(
            "deletionTimestamp"
        ):
            return await self._empty(stored)
        await self._furnish(name)
        return None

    async def _furnish(self, name: str) -> None:
        await self._writer.ensure(SERVICE_ACCOUNTS, name, service_account(name))
        wanted = root_certificate(name, self._root_ca)
        if await self._writer.ensure(CONFIG_MAPS, name, wanted):
            return
        stored = self._objects.get(CONFIG_MAPS, name, ROOT_CA)

        def change(obj: Obj) -> None:
            obj["data"] = wanted["data"]

        await self._writer.change(CONFIG_MAPS, stored, change)

    async def _empty(self, stored: Stored) -> float | None:
        """Delete all that is left, then the Namespace."""
        name = stored.key[2]
        self._leaving.add(name)
        for resource in EMPTIED:
            held = self._objects.list(resource, name).items
            await in_turns(self._delete(resource, one) for one in held)
            if resource is PODS and self._objects.list(PODS, name).items:
                break
        left: Counter[str] = Counter()
        finalizers: Counter[str] = Counter()
        for resource in EMPTIED:
            for one in self._objects.list(resource, name).items:
                left[resource.qualified] += 1
                finalizers.update(one.obj["metadata"].get("finalizers") or ())
        current = self._objects.find(NAMESPACES, "", name)
        if current is None:
            return None
        status = dict(current.obj.get("status") or {}, phase="Terminating")
        status["conditions"] = deletion_conditions(
            status.get("conditions") or [], left, finalizers, now_text(self._clock())
        )
        await self._writer.put_status(NAMESPACES, current, status)
        if left:
            return RETRY
        await self._finalize(name)
        return None

    async def _delete(self, resource: Resource, stored: Stored) -> None:
        await self._writer.delete(resource, stored.key[1], stored.key[2], stored.uid)

    async def _finalize(self, name: str) -> None:
        """What upstream's finalize subresource does: past the rule that an update leaves
        spec.finalizers as they are."""
        stored = self._objects.find(NAMESPACES, "", name)
        if stored is None:
            return
        obj = stored.obj
        spec = obj.setdefault("spec", {})
        left = [one for one in spec.get("finalizers") or () if one != FINALIZER]
        if left or obj["metadata"].get("finalizers"):
            if left != spec.get("finalizers"):
                spec["finalizers"] = left
                await self._writer.force(NAMESPACES, stored, obj)
            return
        try:
            await self._objects.store.write(Delete(stored.key, stored.revision))
        except Conflicted:
            raise conflict(NAMESPACES, name, MODIFIED) from None
