"""Manifests to the objects a cluster would make of them.

Decides what controllers and allocators decide in a cluster: which Pods a workload has, which
addresses Services and Pods get that no manifest gives, which EndpointSlices a selector makes.
All of it follows from the documents alone: the same documents always give the same objects,
and a new one moves no address but by a collision. Reading files and watching them is
source/manifests.py's.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import msgspec

from kdns.errors import ObjectError
from kdns.registry.decode import check, convert_plain, key_text_of, without_nulls
from kdns.registry.endpoints import pack_address
from kdns.registry.objects import (
    ENDPOINT_SLICE,
    NAMESPACE,
    NODE,
    POD,
    SERVICE,
    SERVICE_IMPORT,
    SERVICE_NAME_LABEL,
    ZONE_LABEL,
    Conditions,
    EndpointSlice,
    Key,
    Meta,
    Namespace,
    Node,
    Pod,
    PodIP,
    PodStatus,
    Service,
    ServiceImport,
    ServiceSpec,
    SliceEndpoint,
    SlicePort,
    TargetRef,
    key_of,
)
from kdns.registry.selectors import (
    BadSelector,
    Selector,
    parse_selector,
    requirement_of,
    selector_of,
)
from kdns.registry.spec import ManifestSpec

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

ALWAYS = ("default", "kube-node-lease", "kube-public", "kube-system")
NAME_LABEL = "kubernetes.io/metadata.name"  # the API server puts it on every Namespace
MANAGED_BY = "endpointslice.kubernetes.io/managed-by"
# Addresses a cluster gives these Services by convention (kubeadm): first and tenth.
WELL_KNOWN: Final[Mapping[Key, int]] = {
    ("default", "kubernetes"): 1,
    ("kube-system", "kube-dns"): 10,
}
# kube-apiserver --service-node-port-range.
NODE_PORTS = range(30000, 32768)
MAX_PODS = 5000  # of one workload: a slip of the finger must not fill the memory
MAX_SLICE = 100  # endpoints, as the EndpointSlice controller
MAX_PROBES = 1 << 16  # addresses tried before a CIDR counts as full
MAX_LIST_DEPTH = 4  # a List of Lists
MAX_LABEL = 63  # characters of a Pod's name that stand before its suffix fits a DNS label


@dataclass(frozen=True, slots=True)
class Document:
    """One parsed YAML or JSON document. where -- "FILE:LINE" it begins at."""

    where: str
    value: Any


@dataclass(slots=True)
class Compiled:
    """The objects, and what was wrong: (where, error)."""

    services: list[Service] = field(default_factory=list)
    slices: list[EndpointSlice] = field(default_factory=list)
    namespaces: list[Namespace] = field(default_factory=list)
    pods: list[Pod] = field(default_factory=list)
    imports: list[ServiceImport] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    errors: list[tuple[str, ObjectError]] = field(default_factory=list)


# --- what is read of a document -----------------------------------------------------------


class _Part(msgspec.Struct, frozen=True, rename="camel"):
    """Settings of all structs below."""


class Owner(_Part, frozen=True):
    kind: str = ""
    name: str = ""


class OwnedMeta(_Part, frozen=True):
    name: str = ""
    namespace: str = ""
    labels: dict[str, str] | None = None
    owner_references: list[Owner] | None = None


class ContainerPort(_Part, frozen=True):
    container_port: int = 0
    name: str = ""
    protocol: str = "TCP"


class Container(_Part, frozen=True):
    ports: list[ContainerPort] | None = None
    restart_policy: str = ""


class PodSpec(_Part, frozen=True):
    containers: list[Container] | None = None
    init_containers: list[Container] | None = None
    hostname: str = ""
    subdomain: str = ""
    node_name: str = ""


class PodCondition(_Part, frozen=True):
    type: str = ""
    status: str = ""


class FullPodStatus(_Part, frozen=True):
    phase: str = ""
    pod_ip: str = msgspec.field(default="", name="podIP")
    pod_ips: list[PodIP] | None = msgspec.field(default=None, name="podIPs")
    conditions: list[PodCondition] | None = None


class FullPod(_Part, frozen=True):
    metadata: OwnedMeta = OwnedMeta()
    spec: PodSpec = PodSpec()
    status: FullPodStatus = FullPodStatus()


class Expression(_Part, frozen=True):
    key: str = ""
    operator: str = ""
    values: list[str] = []


class LabelSelector(_Part, frozen=True):
    match_labels: dict[str, str] | None = None
    match_expressions: list[Expression] | None = None


class WorkloadSpec(_Part, frozen=True):
    replicas: int = 1
    service_name: str = ""
    # A ReplicationController's is a plain map of labels.
    selector: dict[str, Any] | None = None
    template: FullPod = FullPod()


class Workload(_Part, frozen=True):
    kind: str
    metadata: OwnedMeta
    spec: WorkloadSpec = WorkloadSpec()


class FamilyPolicy(_Part, frozen=True):
    ip_family_policy: str = ""


class Declared(_Part, frozen=True):
    """What Service leaves out of a Service's spec."""

    spec: FamilyPolicy = FamilyPolicy()


class SubsetAddress(_Part, frozen=True):
    ip: str = ""
    hostname: str | None = None
    node_name: str | None = None
    target_ref: TargetRef | None = None


class Subset(_Part, frozen=True):
    addresses: list[SubsetAddress] | None = None
    not_ready_addresses: list[SubsetAddress] | None = None
    ports: list[SlicePort] | None = None


class Endpoints(_Part, frozen=True):
    metadata: Meta
    subsets: list[Subset] | None = None


# --- reading ------------------------------------------------------------------------------


class _Reading:
    """The documents sorted by kind. Of two objects with one name the later counts."""

    def __init__(self) -> None:
        self.services: dict[Key, tuple[str, Service, str]] = {}  # where, it, family policy
        self.slices: dict[Key, tuple[str, EndpointSlice]] = {}
        self.imports: dict[Key, tuple[str, ServiceImport]] = {}
        self.endpoints: dict[Key, tuple[str, Endpoints]] = {}
        self.namespaces: dict[Key, tuple[str, Namespace]] = {}
        self.pods: dict[Key, tuple[str, FullPod]] = {}
        self.workloads: dict[tuple[str, Key], tuple[str, Workload]] = {}
        self.nodes: dict[Key, tuple[str, Node]] = {}
        self.errors: list[tuple[str, ObjectError]] = []

    def read(self, where: str, value: Any, depth: int = 0) -> None:
        """Take in one document, the items of a List one by one."""
        if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
            error = ObjectError(
                "document", key_text_of(value), "kind", "is missing: not a Kubernetes object"
            )
            self.errors.append((where, error))
            return
        kind, version = value["kind"], value.get("apiVersion")
        items = value.get("items")
        if kind.endswith("List") and isinstance(items, list) and depth < MAX_LIST_DEPTH:
            for item in items:
                if isinstance(item, dict) and kind != "List":
                    # The items of a ServiceList carry no kind of their own.
                    item = {"kind": kind.removesuffix("List"), "apiVersion": version, **item}
                self.read(where, item, depth + 1)
            return
        group = version.rpartition("/")[0] if isinstance(version, str) else ""
        reader = _READERS.get((group, kind))
        if reader is None:
            return
        try:
            reader(self, where, without_nulls(value))
        except ObjectError as e:
            self.errors.append((where, e))
        except msgspec.ValidationError as e:
            text, _, path = str(e).partition(" - at `$")
            error = ObjectError(kind, key_text_of(value), path.strip("`."), text)
            self.errors.append((where, error))
        except RecursionError:
            self.errors.append(
                (where, ObjectError(kind, key_text_of(value), "", "nested too deep"))
            )

    def read_service(self, where: str, value: dict[str, Any]) -> None:
        service = convert_plain(SERVICE, _in_namespace(value))
        assert isinstance(service, Service)
        _check_source_ranges(service)
        policy = msgspec.convert(value, Declared).spec.ip_family_policy
        self._once(self.services, SERVICE, key_of(service), (where, service, policy))

    def read_slice(self, where: str, value: dict[str, Any]) -> None:
        one = convert_plain(ENDPOINT_SLICE, _in_namespace(value))
        assert isinstance(one, EndpointSlice)
        self._once(self.slices, ENDPOINT_SLICE, key_of(one), (where, one))

    def read_import(self, where: str, value: dict[str, Any]) -> None:
        one = convert_plain(SERVICE_IMPORT, _in_namespace(value))
        assert isinstance(one, ServiceImport)
        self._once(self.imports, SERVICE_IMPORT, key_of(one), (where, one))

    def read_endpoints(self, where: str, value: dict[str, Any]) -> None:
        one = msgspec.convert(_in_namespace(value), Endpoints)
        key = one.metadata.namespace, one.metadata.name
        _check_name("Endpoints", *key)
        self._once(self.endpoints, "Endpoints", key, (where, one))

    def read_namespace(self, where: str, value: dict[str, Any]) -> None:
        one = convert_plain(NAMESPACE, value)
        assert isinstance(one, Namespace)
        name = one.metadata.name
        labels = {**(one.metadata.labels or {}), NAME_LABEL: name}
        one = Namespace(msgspec.structs.replace(one.metadata, namespace="", labels=labels))
        self._once(self.namespaces, NAMESPACE, ("", name), (where, one))

    def read_pod(self, where: str, value: dict[str, Any]) -> None:
        value = _in_namespace(value)
        convert_plain(POD, value)  # for its checks
        pod = msgspec.convert(value, FullPod)
        self._once(self.pods, POD, (pod.metadata.namespace, pod.metadata.name), (where, pod))

    def read_workload(self, where: str, value: dict[str, Any]) -> None:
        workload = msgspec.convert(_in_namespace(value), Workload)
        meta = workload.metadata
        _check_name(workload.kind, meta.namespace, meta.name)
        if not 0 <= workload.spec.replicas <= MAX_PODS:
            raise ObjectError(
                workload.kind,
                f"{meta.namespace}/{meta.name}",
                "spec.replicas",
                f"{workload.spec.replicas} is not in 0 to {MAX_PODS}",
            )
        key = workload.kind, (meta.namespace, meta.name)
        self._once(self.workloads, workload.kind, key, (where, workload))

    def read_node(self, where: str, value: dict[str, Any]) -> None:
        node = convert_plain(NODE, value)
        assert isinstance(node, Node)
        node = msgspec.structs.replace(
            node, metadata=msgspec.structs.replace(node.metadata, namespace="")
        )
        self._once(self.nodes, NODE, key_of(node), (where, node))

    def _once(self, table: dict[Any, Any], kind: str, key: Any, entry: tuple[Any, ...]) -> None:
        earlier = table.get(key)
        if earlier is not None:
            namespace, name = key if isinstance(key[1], str) else key[1]
            text = f"given again at {entry[0]}, which counts"
            error = ObjectError(kind, f"{namespace}/{name}" if namespace else name, "", text)
            self.errors.append((earlier[0], error))
        table[key] = entry


_READERS: Final[Mapping[tuple[str, str], Callable[[_Reading, str, dict[str, Any]], None]]] = {
    ("", "Service"): _Reading.read_service,
    ("", "Namespace"): _Reading.read_namespace,
    ("", "Pod"): _Reading.read_pod,
    ("", "Node"): _Reading.read_node,
    ("", "Endpoints"): _Reading.read_endpoints,
    ("", "ReplicationController"): _Reading.read_workload,
    ("discovery.k8s.io", "EndpointSlice"): _Reading.read_slice,
    ("multicluster.x-k8s.io", "ServiceImport"): _Reading.read_import,
    ("apps", "Deployment"): _Reading.read_workload,
    ("apps", "ReplicaSet"): _Reading.read_workload,
    ("apps", "StatefulSet"): _Reading.read_workload,
    ("apps", "DaemonSet"): _Reading.read_workload,
}


def _in_namespace(value: dict[str, Any]) -> dict[str, Any]:
    meta = value.get("metadata")
    if isinstance(meta, dict) and not meta.get("namespace"):
        return {**value, "metadata": {**meta, "namespace": "default"}}
    return value


def _check_source_ranges(service: Service) -> None:
    """Raise ObjectError for a range that is none: passed over, it would let everybody in."""
    for i, text in enumerate(service.spec.load_balancer_source_ranges or ()):
        base, slash, length = text.strip().partition("/")
        try:
            if not slash or not length.isdecimal():
                raise ValueError
            ipaddress.ip_network(f"{base}/{length}", strict=False)
        except ValueError:
            raise ObjectError(
                SERVICE,
                "/".join(key_of(service)),
                f"spec.loadBalancerSourceRanges[{i}]",
                f"{text[:64]!r} is not a CIDR, such as 192.0.2.0/24",
            ) from None


def _check_name(kind: str, namespace: str, name: str) -> None:
    """Raise ObjectError without a usable name: those of Pods and slices come of it."""
    try:
        check(POD, Pod(Meta(name, namespace)))
    except ObjectError as e:
        raise ObjectError(kind, e.key, e.field, e.text) from None


# --- addresses ----------------------------------------------------------------------------


class Pool:
    """Gives addresses of one CIDR by name: the same name gets the same address, unless that
    one is taken; then the next free one."""

    def __init__(self, cidr: str) -> None:
        self.network: Network = ipaddress.ip_network(cidr, strict=False)
        self.taken: set[bytes] = set()  # packed: 100,000 endpoints are read fast
        self.reserved: dict[Key, Address] = {}
        size = self.network.num_addresses
        # Network and broadcast address are no hosts'; a tiny CIDR has neither.
        self._first = 1 if size > 2 else 0
        self._count = max(1, size - 2 if size > 2 else size)

    def reserve(self, key: Key, n: int) -> None:
        """Keep the n-th address for `key`, if there is one and it is free."""
        if n < self.network.num_addresses and self.network[n].packed not in self.taken:
            self.reserved[key] = self.network[n]
            self.taken.add(self.network[n].packed)

    def give(self, name: str) -> Address | None:
        """Return a free address for `name` and take it; None: the CIDR is full."""
        digest = hashlib.sha256(name.encode()).digest()
        start = int.from_bytes(digest[:16], "big") % self._count
        for probe in range(min(self._count, MAX_PROBES)):
            address = self.network[self._first + (start + probe) % self._count]
            if address.packed not in self.taken:
                self.taken.add(address.packed)
                return address
        return None


def _pools(cidr: str, cidr_v6: str) -> tuple[dict[int, Pool], int]:
    """Return the pools by IP version and the version that `cidr` has."""
    own = Pool(cidr)
    version: int = own.network.version
    return {6: Pool(cidr_v6), version: own}, version


def _take(pools: Mapping[int, Pool], ips: Iterable[str]) -> None:
    for ip in ips:
        packed = pack_address(ip)
        version = 4 if packed is not None and len(packed) == 4 else 6
        if packed is not None and version in pools:
            pools[version].taken.add(packed)


# --- compiling ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RunningPod:
    """A Pod with what a Service asks of it. addresses -- by IP version."""

    key: Key
    labels: Mapping[str, str]
    spec: PodSpec
    addresses: Mapping[int, str]
    phase: str = "Running"
    ready: bool = True

    def port(self, name: str, protocol: str) -> int | None:
        """Return the container port with this name."""
        # Init containers that stay (sidecars) have ports too.
        containers: list[Container] = [
            *(self.spec.containers or ()),
            *(c for c in self.spec.init_containers or () if c.restart_policy == "Always"),
        ]
        for container in containers:
            for port in container.ports or ():
                if port.name == name and port.protocol == protocol:
                    return port.container_port
        return None


def compile_manifests(documents: Iterable[Document], spec: ManifestSpec) -> Compiled:
    """Return the objects a cluster would hold after `kubectl apply` of all documents."""
    reading = _Reading()
    for document in documents:
        reading.read(document.where, document.value)
    out = Compiled(errors=reading.errors)
    services = _with_addresses(reading, spec, out)
    pods = _pods(reading, spec, out)
    slices = [one for _, one in reading.slices.values()]
    having = {_service_key(one) for one in slices}
    slices += _mirrored(reading, having, out)
    labelled = _by_label(pods)
    zones = _zones(reading)
    for service in services:
        key = key_of(service)
        if key not in having and key not in reading.endpoints:
            slices += _selected(service, labelled, zones)
    wanted = parse_selector(spec.label_selector)
    out.services = [s for s in services if wanted.matches(s.metadata.labels or {})]
    out.slices = [s for s in slices if wanted.matches(s.metadata.labels or {})]
    out.pods = [_plain(p) for p in pods if wanted.matches(p.labels)]
    # `labels` is not for ServiceImports (CoreDNS), nor are addresses given to them: that is
    # done by another program in each cluster set.
    out.imports = [one for _, one in reading.imports.values()]
    out.nodes = [one for _, one in reading.nodes.values()]
    declared = {name: one for (_, name), (_, one) in reading.namespaces.items()}
    tables = (
        reading.services,
        reading.slices,
        reading.endpoints,
        reading.pods,
        reading.imports,
    )
    used = {key[0] for table in tables for key in table}
    used |= {key[0] for _, key in reading.workloads}
    for name in sorted({*ALWAYS, *used} - set(declared)):
        declared[name] = Namespace(Meta(name, labels={NAME_LABEL: name}))
    out.namespaces = list(declared.values())
    return out


# --- Services -----------------------------------------------------------------------------


def _with_addresses(reading: _Reading, spec: ManifestSpec, out: Compiled) -> list[Service]:
    """Return the Services with the cluster IPs they lack."""
    pools, default = _pools(spec.service_cidr, spec.service_cidr_v6)
    for _, service, _ in reading.services.values():
        _take(pools, _given_ips(service.spec))
    for key, n in WELL_KNOWN.items():
        for pool in pools.values():
            pool.reserve(key, n)
    services: list[Service] = []
    for key, (where, service, policy) in sorted(reading.services.items()):
        families = _families(service.spec, policy, default)
        try:
            services.append(_with_cluster_ips(key, service, families, pools))
        except ObjectError as e:
            out.errors.append((where, e))
    taken = {port.node_port for s in services for port in s.spec.ports or ()}
    taken |= {s.spec.health_check_node_port for s in services}
    return [_with_node_ports(service, taken) for service in services]


def _with_node_ports(service: Service, taken: set[int]) -> Service:
    """Return a NodePort or LoadBalancer Service with the ports on nodes it lacks."""
    spec = service.spec
    if spec.type not in ("NodePort", "LoadBalancer"):
        return service
    name = "/".join(key_of(service))
    ports = [
        port
        if port.node_port
        else msgspec.structs.replace(
            port, node_port=_give_port(f"{name}:{port.port}/{port.protocol}", taken)
        )
        for port in spec.ports or ()
    ]
    check_port = spec.health_check_node_port
    if spec.type == "LoadBalancer" and spec.external_traffic_policy == "Local" and not check_port:
        check_port = _give_port(f"{name} health check", taken)
    full = msgspec.structs.replace(spec, ports=ports, health_check_node_port=check_port)
    return msgspec.structs.replace(service, spec=full)


def _give_port(name: str, taken: set[int]) -> int:
    """Return a free port, the same one for the same name as long as it is free; 0 if there is
    none left."""
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    for i in range(len(NODE_PORTS)):
        port = NODE_PORTS[(start + i) % len(NODE_PORTS)]
        if port not in taken:
            taken.add(port)
            return port
    return 0


def _zones(reading: _Reading) -> dict[str, str]:
    """Return Node -> topology zone, of those that have one."""
    labels = {name: node.metadata.labels or {} for (_, name), (_, node) in reading.nodes.items()}
    return {name: of[ZONE_LABEL] for name, of in labels.items() if of.get(ZONE_LABEL)}


def _given_ips(spec: ServiceSpec) -> list[str]:
    ips = spec.cluster_ips or [spec.cluster_ip]
    return [ip for ip in ips if ip and ip != "None"]


def _families(spec: ServiceSpec, policy: str, default: int) -> list[int]:
    """Return the IP versions of a Service, first the one that comes first in clusterIPs."""
    families: list[int] = [6 if f == "IPv6" else 4 for f in spec.ip_families or ()]
    families += [ipaddress.ip_address(ip).version for ip in _given_ips(spec)]
    families = list(dict.fromkeys(families)) or [default]
    if policy in ("PreferDualStack", "RequireDualStack") and len(families) == 1:
        families.append(6 if families[0] == 4 else 4)
    return families


def _with_cluster_ips(
    key: Key, service: Service, families: Sequence[int], pools: Mapping[int, Pool]
) -> Service:
    spec = service.spec
    named = ["IPv6" if f == 6 else "IPv4" for f in families]
    if spec.type == "ExternalName":
        return service
    if "None" in (spec.cluster_ip, *(spec.cluster_ips or ())):
        ips = ["None"]
    else:
        given: dict[int, str] = {ipaddress.ip_address(ip).version: ip for ip in _given_ips(spec)}
        ips = [given.get(f) or _cluster_ip(key, f, pools) for f in families]
    full = msgspec.structs.replace(spec, cluster_ip=ips[0], cluster_ips=ips, ip_families=named)
    return msgspec.structs.replace(service, spec=full)


def _cluster_ip(key: Key, family: int, pools: Mapping[int, Pool]) -> str:
    pool = pools.get(family)
    if pool is None:
        why = f"there is no service CIDR for IPv{family}"
        raise ObjectError(SERVICE, "/".join(key), "spec.ipFamilies", why)
    address = pool.reserved.get(key) or pool.give("/".join(key))
    if address is None:
        why = f"no free address is left in {pool.network}"
        raise ObjectError(SERVICE, "/".join(key), "spec.clusterIP", why)
    return str(address)


# --- Pods ---------------------------------------------------------------------------------


def _pods(reading: _Reading, spec: ManifestSpec, out: Compiled) -> list[RunningPod]:
    """Return all Pods that run: those declared and those of workloads, by name."""
    pools, _ = _pools(spec.pod_cidr, spec.pod_cidr_v6)
    wanted: dict[Key, tuple[str, FullPod]] = {
        key: (where, pod)
        for key, (where, pod) in reading.pods.items()
        if pod.status.phase not in ("Succeeded", "Failed", "Unknown")
    }
    owned: dict[str, list[FullPod]] = {}
    for (namespace, _), (_, pod) in reading.pods.items():
        if pod.metadata.owner_references:
            owned.setdefault(namespace, []).append(pod)
    for where, workload in reading.workloads.values():
        try:
            if not _has_its_pods(workload, reading, owned):
                for name, pod in _pods_of(workload, len(reading.nodes)):
                    wanted.setdefault((workload.metadata.namespace, name), (where, pod))
        except BadSelector as e:
            key = f"{workload.metadata.namespace}/{workload.metadata.name}"
            out.errors.append((where, ObjectError(workload.kind, key, "spec.selector", str(e))))
    for _, pod in wanted.values():
        _take(pools, _pod_ips(pod.status))
    for _, one in reading.slices.values():
        if one.address_type != "FQDN":
            for endpoint in one.endpoints or ():
                _take(pools, endpoint.addresses)
    return [_running(key, pod, pools) for key, (_, pod) in sorted(wanted.items(), key=_in_order)]


def _in_order(entry: tuple[Key, object]) -> tuple[str, list[tuple[int, str]]]:
    """Sort web-2 before web-10."""
    namespace, name = entry[0]
    return namespace, [(int(p), "") if p.isdecimal() else (-1, p) for p in name.split("-")]


def _pod_ips(status: FullPodStatus) -> list[str]:
    ips = [status.pod_ip, *(one.ip for one in status.pod_ips or ())]
    return [ip for ip in dict.fromkeys(ips) if ip]


def _running(key: Key, pod: FullPod, pools: Mapping[int, Pool]) -> RunningPod:
    addresses: dict[int, str] = {}
    for ip in _pod_ips(pod.status):
        addresses.setdefault(ipaddress.ip_address(ip).version, ip)
    if not addresses:
        for version, pool in sorted(pools.items()):
            given = pool.give("/".join(key))
            if given is not None:
                addresses[version] = str(given)
    ready = all(c.status != "False" for c in pod.status.conditions or () if c.type == "Ready")
    return RunningPod(
        key,
        pod.metadata.labels or {},
        pod.spec,
        addresses,
        pod.status.phase or "Running",
        ready,
    )


def _has_its_pods(
    workload: Workload, reading: _Reading, owned: Mapping[str, Sequence[FullPod]]
) -> bool:
    """True if the documents hold what a controller has already made of the workload, as
    `kubectl get all -o yaml` prints it."""
    meta = workload.metadata
    for owner in meta.owner_references or ():
        if (owner.kind, (meta.namespace, owner.name)) in reading.workloads:
            return True
    selector = _selector(workload)
    return any(selector.matches(pod.metadata.labels or {}) for pod in owned.get(meta.namespace, ()))


def _selector(workload: Workload) -> Selector:
    """Return which Pods are the workload's. Raises BadSelector."""
    found = workload.spec.selector
    if not found:
        return selector_of(workload.spec.template.metadata.labels)
    if workload.kind == "ReplicationController":
        return selector_of({k: str(v) for k, v in found.items()})
    try:
        one = msgspec.convert(found, LabelSelector)
    except msgspec.ValidationError as e:
        raise BadSelector(str(e)) from None
    return selector_of(
        one.match_labels,
        [requirement_of(e.key, e.operator, e.values) for e in one.match_expressions or ()],
    )


def _pods_of(workload: Workload, nodes: int) -> Iterator[tuple[str, FullPod]]:
    """Yield (name, Pod) of each replica."""
    meta, spec = workload.metadata, workload.spec
    template = spec.template
    if workload.kind == "StatefulSet":
        for i in range(spec.replicas):
            name = f"{meta.name}-{i}"
            # The controller sets both: it is what makes db-0.db.NS.svc a name.
            pod_spec = msgspec.structs.replace(
                template.spec, hostname=name, subdomain=spec.service_name
            )
            yield name, FullPod(template.metadata, pod_spec)
        return
    count = spec.replicas if workload.kind != "DaemonSet" else max(1, nodes)
    mark = hashlib.sha256(f"{workload.kind}/{meta.namespace}/{meta.name}".encode()).hexdigest()
    for i in range(count):
        yield (
            f"{meta.name[: MAX_LABEL - 16]}-{mark[:8]}-{i}",
            FullPod(template.metadata, template.spec),
        )


def _plain(pod: RunningPod) -> Pod:
    namespace, name = pod.key
    ips = [PodIP(ip) for ip in pod.addresses.values()]
    status = PodStatus(pod.phase, ips[0].ip if ips else "", ips or None)
    return Pod(Meta(name, namespace, labels=dict(pod.labels) or None), status)


# --- EndpointSlices -----------------------------------------------------------------------


def _service_key(one: EndpointSlice) -> Key:
    meta = one.metadata
    return meta.namespace, (meta.labels or {}).get(SERVICE_NAME_LABEL, "")


# namespace, label, value -> the Pods that have it
Labelled: TypeAlias = Mapping[tuple[str, str, str], Sequence[RunningPod]]


def _by_label(pods: Iterable[RunningPod]) -> Labelled:
    found: dict[tuple[str, str, str], list[RunningPod]] = {}
    for pod in pods:
        for label, value in pod.labels.items():
            found.setdefault((pod.key[0], label, value), []).append(pod)
    return found


def _selected(
    service: Service, pods: Labelled, zones: Mapping[str, str]
) -> Iterator[EndpointSlice]:
    """Yield the slices of a Service's selector; none without a selector."""
    spec = service.spec
    if not spec.selector or spec.type == "ExternalName":
        return
    selector = selector_of(spec.selector)
    namespace = service.metadata.namespace
    fewest = min((pods.get((namespace, *pair), ()) for pair in spec.selector.items()), key=len)
    chosen = [pod for pod in fewest if selector.matches(pod.labels)]
    for family in spec.ip_families or ():
        version = 6 if family == "IPv6" else 4
        # Pods may call different ports by one name: each set of ports is a slice of its own.
        groups: dict[tuple[SlicePort, ...], list[SliceEndpoint]] = {}
        for pod in chosen:
            address = pod.addresses.get(version)
            if address is not None:
                endpoint = _endpoint(service, pod, address, zones)
                groups.setdefault(_ports(service, pod), []).append(endpoint)
        n = 0
        for ports, endpoints in groups.items():
            for at in range(0, len(endpoints), MAX_SLICE):
                n += 1
                yield _slice(service.metadata, family, n, endpoints[at : at + MAX_SLICE], ports)


def _endpoint(
    service: Service, pod: RunningPod, address: str, zones: Mapping[str, str]
) -> SliceEndpoint:
    namespace, name = pod.key
    named = pod.spec.hostname and pod.spec.subdomain == service.metadata.name
    ready = pod.ready or service.spec.publish_not_ready_addresses
    return SliceEndpoint(
        [address],
        Conditions(ready, pod.ready, False),
        pod.spec.hostname if named else None,
        pod.spec.node_name or None,
        TargetRef("Pod", name, namespace),
        zones.get(pod.spec.node_name),
    )


def _ports(service: Service, pod: RunningPod) -> tuple[SlicePort, ...]:
    """Return the ports of a Service at one Pod; a name the Pod does not know is left out."""
    out: list[SlicePort] = []
    for port in service.spec.ports or ():
        target = port.target_port
        number = pod.port(target, port.protocol) if isinstance(target, str) else target or port.port
        if number is not None:
            out.append(SlicePort(port.name, number, port.protocol))
    return tuple(out)


def _slice(
    owner: Meta,
    family: str,
    n: int,
    endpoints: list[SliceEndpoint],
    ports: Sequence[SlicePort],
    manager: str = "endpointslice-controller.k8s.io",
) -> EndpointSlice:
    # The controllers copy a Service's labels to its slices.
    labels = {**(owner.labels or {}), SERVICE_NAME_LABEL: owner.name, MANAGED_BY: manager}
    name = f"{owner.name}-{family.lower()}-{n}"
    return EndpointSlice(Meta(name, owner.namespace, labels=labels), family, endpoints, list(ports))


def _mirrored(reading: _Reading, having: set[Key], out: Compiled) -> Iterator[EndpointSlice]:
    """Yield the slices of Endpoints objects, which the mirroring controller makes."""
    for key, (where, endpoints) in sorted(reading.endpoints.items()):
        if key in having:
            continue
        n = 0
        for subset in endpoints.subsets or ():
            for family in ("IPv4", "IPv6"):
                found = [
                    SliceEndpoint(
                        [address.ip],
                        Conditions(ready, ready, False),
                        address.hostname,
                        address.node_name,
                        address.target_ref,
                    )
                    for ready, addresses in (
                        (True, subset.addresses),
                        (False, subset.not_ready_addresses),
                    )
                    for address in addresses or ()
                    if (":" in address.ip) is (family == "IPv6")
                ]
                if not found:
                    continue
                n += 1
                one = _slice(
                    endpoints.metadata,
                    family,
                    n,
                    found,
                    subset.ports or (),
                    "endpointslicemirroring-controller.k8s.io",
                )
                try:
                    check(ENDPOINT_SLICE, one)
                except ObjectError as e:
                    error = ObjectError("Endpoints", "/".join(key), e.field, e.text)
                    out.errors.append((where, error))
                else:
                    yield one
