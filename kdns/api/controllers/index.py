"""What the controllers know of the store without reading all of it at each event.

Holds of each object only what selects it: a Pod's labels, node and conditions, a Service's
selector, owners. Decides nothing; bodies are read from the store where more is needed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Final, TypeAlias, TypeVar

import msgspec

from kdns.api.kinds import BY_PLURAL
from kdns.api.store import Event, Key, Stored

PODS: Final = BY_PLURAL["", "pods"]
SERVICES: Final = BY_PLURAL["", "services"]
NODES: Final = BY_PLURAL["", "nodes"]
NAMESPACES: Final = BY_PLURAL["", "namespaces"]
ENDPOINTS: Final = BY_PLURAL["", "endpoints"]
EVENTS: Final = BY_PLURAL["", "events"]
CONFIG_MAPS: Final = BY_PLURAL["", "configmaps"]
SERVICE_ACCOUNTS: Final = BY_PLURAL["", "serviceaccounts"]
SLICES: Final = BY_PLURAL["discovery.k8s.io", "endpointslices"]
DEPLOYMENTS: Final = BY_PLURAL["apps", "deployments"]
REPLICA_SETS: Final = BY_PLURAL["apps", "replicasets"]
STATEFUL_SETS: Final = BY_PLURAL["apps", "statefulsets"]
SERVICE_CIDRS: Final = BY_PLURAL["networking.k8s.io", "servicecidrs"]
LEASES: Final = BY_PLURAL["coordination.k8s.io", "leases"]

SERVICE_NAME: Final = "kubernetes.io/service-name"
ZONE: Final = "topology.kubernetes.io/zone"
ENDED: Final = frozenset({"Succeeded", "Failed"})  # phases of a Pod that is over


class Owner(msgspec.Struct, frozen=True):
    """An ownerReference."""

    kind: str = ""
    name: str = ""
    uid: str = ""
    apiVersion: str = ""
    controller: bool = False
    blockOwnerDeletion: bool = False


class Meta(msgspec.Struct):
    name: str = ""
    namespace: str = ""
    uid: str = ""
    resourceVersion: str = ""
    creationTimestamp: str = ""
    deletionTimestamp: str | None = None
    deletionGracePeriodSeconds: int | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    ownerReferences: list[Owner] = []
    finalizers: list[str] = []

    @property
    def controller(self) -> Owner | None:
        return next((one for one in self.ownerReferences if one.controller), None)


class ContainerPort(msgspec.Struct):
    containerPort: int = 0
    name: str = ""
    protocol: str = "TCP"


class Container(msgspec.Struct):
    name: str = ""
    image: str = ""
    ports: list[ContainerPort] = []
    restartPolicy: str = ""


class Gate(msgspec.Struct):
    conditionType: str = ""


class PodSpec(msgspec.Struct):
    nodeName: str = ""
    hostname: str = ""
    subdomain: str = ""
    hostNetwork: bool = False
    containers: list[Container] = []
    initContainers: list[Container] = []
    readinessGates: list[Gate] = []
    nodeSelector: dict[str, str] = {}


class Condition(msgspec.Struct):
    type: str = ""
    status: str = ""
    lastTransitionTime: str = ""


class PodIP(msgspec.Struct):
    ip: str = ""


class PodStatus(msgspec.Struct):
    phase: str = ""
    podIP: str = ""
    podIPs: list[PodIP] = []
    conditions: list[Condition] = []


class Pod(msgspec.Struct):
    """What is kept of a Pod."""

    metadata: Meta
    spec: PodSpec = msgspec.field(default_factory=PodSpec)
    status: PodStatus = msgspec.field(default_factory=PodStatus)

    @property
    def ready_condition(self) -> Condition | None:
        return next((one for one in self.status.conditions if one.type == "Ready"), None)

    @property
    def ready(self) -> bool:
        found = self.ready_condition
        return found is not None and found.status == "True"

    @property
    def terminating(self) -> bool:
        return self.metadata.deletionTimestamp is not None

    @property
    def active(self) -> bool:
        """Neither over nor on its way out."""
        return self.status.phase not in ENDED and not self.terminating

    @property
    def ips(self) -> list[str]:
        ips = [one.ip for one in self.status.podIPs if one.ip]
        return ips or ([self.status.podIP] if self.status.podIP else [])


class _ServiceSpec(msgspec.Struct):
    selector: dict[str, str] | None = None


class _Service(msgspec.Struct):
    spec: _ServiceSpec = msgspec.field(default_factory=_ServiceSpec)


class _LabelSelector(msgspec.Struct):
    matchLabels: dict[str, str] | None = None


class _WorkloadSpec(msgspec.Struct):
    selector: _LabelSelector = msgspec.field(default_factory=_LabelSelector)


class _Workload(msgspec.Struct):
    spec: _WorkloadSpec = msgspec.field(default_factory=_WorkloadSpec)


class _Owned(msgspec.Struct):
    metadata: Meta


_POD: Final = msgspec.json.Decoder(Pod)
_SERVICE: Final = msgspec.json.Decoder(_Service)
_WORKLOAD: Final = msgspec.json.Decoder(_Workload)
_OWNED: Final = msgspec.json.Decoder(_Owned)

Name: TypeAlias = tuple[str, str]  # namespace, name
Label: TypeAlias = tuple[str, str]
_K = TypeVar("_K")
_V = TypeVar("_V")


def decode_pod(stored: Stored) -> Pod:
    return _POD.decode(stored.body)


def decode_meta(stored: Stored) -> Meta:
    return _OWNED.decode(stored.body).metadata


def split(key: str) -> tuple[str, str]:
    """Return namespace and name of a queue's key: "default/web", "node1"."""
    namespace, _, name = key.rpartition("/")
    return namespace, name


class Index:
    """Kept up to date by apply(), which is called with every event."""

    def __init__(self) -> None:
        self.pods: dict[Name, Pod] = {}
        self._pods_by_label: defaultdict[tuple[str, Label], set[str]] = defaultdict(set)
        self._pods_of_node: defaultdict[str, set[Name]] = defaultdict(set)
        self._pods_of: defaultdict[str, set[str]] = defaultdict(set)  # namespace: names
        self._selectors: dict[Name, Mapping[str, str]] = {}
        self._services_by_label: defaultdict[tuple[str, Label], set[str]] = defaultdict(set)
        self._set_labels: dict[Name, Label | None] = {}  # ReplicaSet: a label it asks for
        self._sets_by_label: defaultdict[tuple[str, Label | None], set[str]] = defaultdict(set)
        self.stray_sets: defaultdict[str, set[str]] = defaultdict(set)  # without a controller
        self.slices: defaultdict[Name, set[str]] = defaultdict(set)  # Service: names
        self.dependents: defaultdict[str, set[Key]] = defaultdict(set)  # uid of the owner
        self.owners: dict[Key, list[Owner]] = {}

    def load(self, events: Iterable[Event]) -> None:
        for event in events:
            self.apply(event)

    def apply(self, event: Event) -> None:
        new = None if event.type == "DELETED" else event.stored
        key = event.stored.key
        self._own(key, new)
        if key[0] == PODS.qualified:
            self._pod(key[1:], new)
        elif key[0] == SERVICES.qualified:
            self._service(key[1:], new)
        elif key[0] == SLICES.qualified:
            self._slice(key, event.before, new)

        elif key[0] == REPLICA_SETS.qualified:
            self._replica_set(key, new)

    # --- asking -----------------------------------------------------------------------

    def pods_of_service(self, namespace: str, selector: Mapping[str, str]) -> list[Pod]:
        """Return the Pods that labels choose, by name."""
        sets = [self._pods_by_label.get((namespace, item), set()) for item in selector.items()]
        if not sets:
            return []
        names = min(sets, key=len)
        found = (self.pods[namespace, name] for name in sorted(names))
        return [pod for pod in found if chosen(selector, pod.metadata.labels)]

    def pods_in(self, namespace: str, hint: Mapping[str, str] | None = None) -> list[Pod]:
        """Return the Pods of a namespace by name; those with all labels of `hint`."""
        if hint:
            return self.pods_of_service(namespace, hint)
        return [self.pods[namespace, name] for name in sorted(self._pods_of.get(namespace, ()))]

    def pods_of_node(self, node: str) -> list[Pod]:
        """Return the Pods of a node; of "" those that have none yet."""
        return [self.pods[name] for name in sorted(self._pods_of_node.get(node, ()))]

    def count_on(self, node: str) -> int:
        return len(self._pods_of_node.get(node, ()))

    def services_for(self, namespace: str, labels: Mapping[str, str]) -> list[str]:
        """Return the names of the Services that choose a Pod with these labels."""
        found = []
        for item in labels.items():
            for name in self._services_by_label.get((namespace, item), ()):
                if chosen(self._selectors[namespace, name], labels):
                    found.append(name)
        return found

    def has_selector(self, namespace: str, name: str) -> bool:
        return (namespace, name) in self._selectors

    def replica_sets_for(self, namespace: str, labels: Mapping[str, str]) -> list[str]:
        """Return the names of ReplicaSets that may choose a Pod with these labels."""
        found = set(self._sets_by_label.get((namespace, None), ()))
        for item in labels.items():
            found |= self._sets_by_label.get((namespace, item), set())
        return sorted(found)

    def dependents_of(self, uid: str) -> list[Key]:
        return sorted(self.dependents.get(uid, ()))

    # --- keeping ----------------------------------------------------------------------

    def _pod(self, name: Name, new: Stored | None) -> None:
        old = self.pods.pop(name, None)
        if old is not None and new is not None and old.metadata.labels == new.labels:
            pod = self.pods[name] = decode_pod(new)
            if pod.spec.nodeName != old.spec.nodeName:
                self._on_node(name, old.spec.nodeName, pod.spec.nodeName)
            return
        if old is not None:
            for item in old.metadata.labels.items():
                _drop(self._pods_by_label, (name[0], item), name[1])
            _drop(self._pods_of, name[0], name[1])
            self._on_node(name, old.spec.nodeName, None)
        if new is not None:
            pod = self.pods[name] = decode_pod(new)
            for item in pod.metadata.labels.items():
                self._pods_by_label[name[0], item].add(name[1])
            self._pods_of[name[0]].add(name[1])
            self._on_node(name, None, pod.spec.nodeName)

    def _on_node(self, name: Name, old: str | None, new: str | None) -> None:
        if old is not None:
            _drop(self._pods_of_node, old, name)
        if new is not None:
            self._pods_of_node[new].add(name)

    def _service(self, name: Name, new: Stored | None) -> None:
        old = self._selectors.pop(name, None)
        if old:
            _drop(self._services_by_label, (name[0], min(old.items())), name[1])
        if new is not None:
            selector = _SERVICE.decode(new.body).spec.selector
            if selector:
                # One label is enough to find it by: a Pod that lacks it is not chosen.
                self._selectors[name] = selector
                self._services_by_label[name[0], min(selector.items())].add(name[1])

    def _replica_set(self, key: Key, new: Stored | None) -> None:
        name = key[1:]
        if name in self._set_labels:
            _drop(self._sets_by_label, (name[0], self._set_labels.pop(name)), name[1])
        _drop(self.stray_sets, name[0], name[1])
        if new is not None:
            labels = _WORKLOAD.decode(new.body).spec.selector.matchLabels
            label = self._set_labels[name] = min(labels.items()) if labels else None
            self._sets_by_label[name[0], label].add(name[1])
            if not any(owner.controller for owner in self.owners.get(key, ())):
                self.stray_sets[name[0]].add(name[1])

    def _slice(self, key: Key, before: Stored | None, new: Stored | None) -> None:
        old = before.labels.get(SERVICE_NAME) if before is not None else None
        now = new.labels.get(SERVICE_NAME) if new is not None else None
        if old is not None and old != now:
            _drop(self.slices, (key[1], old), key[2])
        if now is not None:
            self.slices[key[1], now].add(key[2])

    def _own(self, key: Key, new: Stored | None) -> None:
        for owner in self.owners.pop(key, ()):
            _drop(self.dependents, owner.uid, key)
        if new is not None and b'"ownerReferences"' in new.body:
            owners = decode_meta(new).ownerReferences
            if owners:
                self.owners[key] = owners
                for owner in owners:
                    self.dependents[owner.uid].add(key)


def chosen(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    return all(labels.get(name) == value for name, value in selector.items())


def _drop(sets: defaultdict[_K, set[_V]], key: _K, value: _V) -> None:
    held = sets.get(key)
    if held is not None:
        held.discard(value)
        if not held:
            del sets[key]
