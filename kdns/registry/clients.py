"""Which Pod has an address: who it is that asks.

Decides what an address proves. The registry names Pods where it holds them (`pods verified`)
and where they are endpoints of a Service; of other Pods it knows nothing. An address that
several have, or a Node has (host network), names none of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kdns.registry.objects import EndpointSlice, Pod
from kdns.registry.snapshot import Changes, Snapshot, everything

# What holds an address: ("pod", namespace, name) or ("slices", namespace, service).
_Holder = tuple[str, str, str]


class Clients:
    """Pods by address, kept up to date by key. publish() reads as a Feed's does."""

    def __init__(self) -> None:
        self._held: dict[_Holder, tuple[tuple[str, str], ...]] = {}  # -> (address, Pod)
        self._pods: dict[str, dict[str, int]] = {}  # address -> Pod -> by how many holders
        self._nodes: frozenset[str] = frozenset()

    def pod_at(self, address: str) -> str:
        """Return "namespace/name" of the one Pod that has an address, else ""."""
        pods = self._pods.get(address)
        if pods is None or len(pods) != 1 or address in self._nodes:
            return ""
        return next(iter(pods))

    def publish(self, snapshot: Snapshot, changes: Changes, now: float) -> tuple[()]:
        """Take over a snapshot; no answer depends on it."""
        if not self._held:
            changes = everything(snapshot)
        for namespace, name in changes.pods:
            pod = snapshot.pods.get(namespace, {}).get(name)
            self._put(("pod", namespace, name), () if pod is None else _of_pod(pod))
        for namespace, name in changes.services:
            slices = snapshot.slices.get(namespace, {}).get(name, ())
            self._put(("slices", namespace, name), _of_slices(slices))
        if changes.nodes:
            self._nodes = frozenset(
                one.address
                for node in snapshot.nodes.values()
                for one in node.status.addresses or ()
            )
        return ()

    def _put(self, holder: _Holder, found: Iterable[tuple[str, str]]) -> None:
        new = tuple(dict.fromkeys(found))
        for address, pod in self._held.pop(holder, ()):
            pods = self._pods[address]
            pods[pod] -= 1
            if not pods[pod]:
                del pods[pod]
                if not pods:
                    del self._pods[address]
        for address, pod in new:
            pods = self._pods.setdefault(address, {})
            pods[pod] = pods.get(pod, 0) + 1
        if new:
            self._held[holder] = new


def _of_pod(pod: Pod) -> Iterator[tuple[str, str]]:
    if pod.status.phase in ("Succeeded", "Failed"):
        return  # its address may be another's by now
    name = f"{pod.metadata.namespace}/{pod.metadata.name}"
    for address in dict.fromkeys(
        [pod.status.pod_ip, *(one.ip for one in pod.status.pod_ips or ())]
    ):
        if address:
            yield address, name


def _of_slices(slices: Iterable[EndpointSlice]) -> Iterator[tuple[str, str]]:
    for one in slices:
        for endpoint in one.endpoints or ():
            target = endpoint.target_ref
            if target is not None and target.kind == "Pod":
                name = f"{target.namespace or one.metadata.namespace}/{target.name}"
                for address in endpoint.addresses:
                    yield address, name
