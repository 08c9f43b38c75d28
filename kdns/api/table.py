"""How objects are printed: the rows and columns that `kubectl get` shows. Pure.

Decides columns, cells and ages, as kube-apiserver 1.36 does; kubectl only lays them out. What
is asked for and how it is sent is http.py's. Reference kubectl 3.2.

Of an object only what its cells need is decoded, into a struct of its kind, and its metadata
goes into the row as the bytes they are: 10,000 Services are a matter of 0.1 s and not of 0.5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, Final, Generic, Literal, TypeAlias, TypeVar

import msgspec

from kdns.api.kinds import Resource
from kdns.api.store import Obj, Stored

Include: TypeAlias = Literal["Metadata", "Object", "None"]
Cell: TypeAlias = str | int

VERSION: Final = "meta.k8s.io/v1"
NONE, UNKNOWN, UNSET, PENDING, INVALID = "<none>", "<unknown>", "<unset>", "<pending>", "<invalid>"
SHOWN: Final = 3  # entries of a list; the rest is counted
# The subresource; it is no kind of its own, but it is printed.
SCALE: Final = Resource("autoscaling", "v1", "Scale", "scales")


def render_table(
    resource: Resource,
    items: Iterable[Obj | Stored],
    *,
    now: float,
    include: Include,
    list_meta: Obj,
    headers: bool = True,
) -> Obj:
    """Return a meta.k8s.io/v1 Table of objects, to be encoded by msgspec.json (parts of it are
    JSON already: msgspec.Raw).

    now     -- Unix seconds, what ages are counted to
    include -- how much of its object each row carries
    headers -- False: the reader has been told the columns
    """
    form = _FORMS[resource.qualified]
    ages = Ages(now)
    return {
        "kind": "Table",
        "apiVersion": VERSION,
        "metadata": list_meta,
        "columnDefinitions": form.columns if headers else None,
        "rows": [_row(form, one, ages, include) for one in items],
    }


def _row(form: Form[Any], one: Obj | Stored, ages: Ages, include: Include) -> Obj:
    body = one.body if isinstance(one, Stored) else msgspec.json.encode(one)
    decoded = form.decoder.decode(body)
    meta = _META.decode(decoded.metadata)
    row: Obj = {"cells": form.cells(decoded, meta, ages)}
    if form.conditions is not None and (conditions := form.conditions(decoded)):
        row["conditions"] = conditions
    if include == "Metadata":
        row["object"] = {
            "kind": "PartialObjectMetadata", "apiVersion": VERSION, "metadata": decoded.metadata,
        }  # fmt: skip
    else:
        row["object"] = msgspec.Raw(body) if include == "Object" else None
    return row


# --- ages ---------------------------------------------------------------------------------------

MINUTE, HOUR, DAY, YEAR = 60, 3600, 86400, 365 * 86400


class Ages:
    """Tells how long ago something was, for all rows of a table."""

    def __init__(self, now: float) -> None:
        self._now = now
        self._known: dict[datetime, str] = {}  # what is made together has one age

    def since(self, moment: datetime | None) -> str:
        if moment is None or moment.year == 1:  # Go's zero time
            return UNKNOWN
        known = self._known.get(moment)
        if known is None:
            known = self._known[moment] = human_duration(self._now - moment.timestamp())
        return known


def human_duration(seconds: float) -> str:
    """Return a duration as kubectl writes it: two or three digits that matter, 5s, 2m3s, 3d4h."""
    whole = int(seconds)
    if whole < -1:
        return INVALID  # clocks may differ by a second or two
    if whole < 2 * MINUTE:
        return f"{max(whole, 0)}s"
    for limit, unit, part in _DURATIONS:
        if whole < limit:
            size, name = unit
            text = f"{whole // size}{name}"
            if part is not None:
                rest = whole % size // part[0]
                text += f"{rest}{part[1]}" if rest else ""
            return text
    return f"{whole // YEAR}y"


# Up to which duration it is told in what, and in what the rest.
_S, _M, _H, _D, _Y = (1, "s"), (MINUTE, "m"), (HOUR, "h"), (DAY, "d"), (YEAR, "y")
_DURATIONS: Final = (
    (10 * MINUTE, _M, _S),
    (3 * HOUR, _M, None),
    (8 * HOUR, _H, _M),
    (2 * DAY, _H, None),
    (8 * DAY, _D, _H),
    (2 * YEAR, _D, None),
    (8 * YEAR, _Y, _D),
)


# --- what is read of an object ------------------------------------------------------------------


class _Part(msgspec.Struct, frozen=True, rename="camel", gc=False):
    """Settings of all structs below."""


class _Meta(_Part, frozen=True):
    name: str = ""
    creation_timestamp: datetime | None = None
    deletion_timestamp: datetime | None = None
    labels: dict[str, str] = {}


class _Object(_Part, frozen=True):
    metadata: msgspec.Raw


class _Requirement(_Part, frozen=True):
    key: str = ""
    operator: str = ""
    values: list[str] = []


class _Selector(_Part, frozen=True):
    match_labels: dict[str, str] = {}
    match_expressions: list[_Requirement] = []


class _Condition(_Part, frozen=True):
    type: str = ""
    status: str = ""
    reason: str = ""


class _Address(_Part, frozen=True):
    """An address of a Pod, an Endpoints, a load balancer."""

    ip: str = ""
    hostname: str = ""


_META: Final = msgspec.json.Decoder(_Meta)


# --- words that several kinds use ---------------------------------------------------------------


def _shortened(shown: Sequence[str]) -> str:
    """Return the first entries of a list, and how many more there are."""
    text = ",".join(shown[:SHOWN])
    more = len(shown) - SHOWN
    return f"{text} + {more} more..." if more > 0 else text


def _labels_text(labels: Mapping[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items())) or NONE


_EXPRESSIONS: Final[Mapping[str, str]] = {
    "In": "{key} in ({values})",
    "NotIn": "{key} notin ({values})",
    "Exists": "{key}",
    "DoesNotExist": "!{key}",
}


def _selector_text(selector: _Selector | None, broken: str) -> str:
    """Return a LabelSelector as one types it after -l; `broken` if it is none."""
    if selector is None:
        return ""
    terms = [(key, f"{key}={value}") for key, value in selector.match_labels.items()]
    for one in selector.match_expressions:
        form = _EXPRESSIONS.get(one.operator)
        if form is None or ("{values}" in form) is not bool(one.values):
            return broken
        terms.append((one.key, form.format(key=one.key, values=",".join(sorted(one.values)))))
    return ",".join(text for _, text in sorted(terms, key=lambda term: term[0]))


# --- Service ------------------------------------------------------------------------------------


class _ServicePort(_Part, frozen=True):
    port: int = 0
    protocol: str = "TCP"
    node_port: int = 0


class _ServiceSpec(_Part, frozen=True):
    type: str = "ClusterIP"
    cluster_ip: str = msgspec.field(default="", name="clusterIP")
    cluster_ips: list[str] = msgspec.field(default_factory=list, name="clusterIPs")
    external_ips: list[str] = msgspec.field(default_factory=list, name="externalIPs")
    external_name: str = ""
    ports: list[_ServicePort] = []
    selector: dict[str, str] = {}


class _LoadBalancer(_Part, frozen=True):
    ingress: list[_Address] = []


class _ServiceStatus(_Part, frozen=True):
    load_balancer: _LoadBalancer = _LoadBalancer()


class _Service(_Object, frozen=True):
    spec: _ServiceSpec = _ServiceSpec()
    status: _ServiceStatus = _ServiceStatus()


def _service(one: _Service, meta: _Meta, ages: Ages) -> list[Cell]:
    spec = one.spec
    return [
        meta.name,
        spec.type,
        spec.cluster_ips[0] if spec.cluster_ips else spec.cluster_ip or NONE,
        _external(one),
        ",".join(map(_port_text, spec.ports)) or NONE,
        ages.since(meta.creation_timestamp),
        _labels_text(spec.selector),
    ]


def _external(one: _Service) -> str:
    spec = one.spec
    match spec.type:
        case "ExternalName":
            return spec.external_name
        case "ClusterIP" | "NodePort":
            return ",".join(spec.external_ips) or NONE
        case "LoadBalancer":
            given = {entry.ip or entry.hostname for entry in one.status.load_balancer.ingress}
            return ",".join([*sorted(given - {""}), *spec.external_ips]) or PENDING
    return UNKNOWN


def _port_text(port: _ServicePort) -> str:
    if port.node_port:
        return f"{port.port}:{port.node_port}/{port.protocol}"
    return f"{port.port}/{port.protocol}"


# --- Endpoints and EndpointSlice ----------------------------------------------------------------


class _Port(_Part, frozen=True):
    name: str | None = None
    port: int | None = None


class _Subset(_Part, frozen=True):
    addresses: list[_Address] = []
    ports: list[_Port] = []


class _Endpoints(_Object, frozen=True):
    subsets: list[_Subset] = []


class _Endpoint(_Part, frozen=True):
    addresses: list[str] = []


class _Slice(_Object, frozen=True):
    address_type: str = ""
    ports: list[_Port] = []
    endpoints: list[_Endpoint] = []


def _endpoints(one: _Endpoints, meta: _Meta, ages: Ages) -> list[Cell]:
    shown = []
    for subset in one.subsets:
        addresses = [address.ip for address in subset.addresses]
        if not subset.ports:  # of a headless Service
            shown += addresses
        for port in subset.ports:
            shown += [_host_port(address, port.port or 0) for address in addresses]
    text = _shortened(shown) if one.subsets else NONE
    return [meta.name, text, ages.since(meta.creation_timestamp)]


def _host_port(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _slice(one: _Slice, meta: _Meta, ages: Ages) -> list[Cell]:
    ports = [
        str(port.port) if port.port is not None else "*" if port.name is None else port.name
        for port in one.ports
    ]
    addresses = [address for endpoint in one.endpoints for address in endpoint.addresses]
    return [
        meta.name,
        one.address_type,
        _shortened(ports) or UNSET,
        _shortened(addresses) or UNSET,
        ages.since(meta.creation_timestamp),
    ]


# --- Pod ----------------------------------------------------------------------------------------


class _Container(_Part, frozen=True):
    name: str = ""
    image: str = ""
    restart_policy: str = ""


class _Gate(_Part, frozen=True):
    condition_type: str = ""


class _PodSpec(_Part, frozen=True):
    containers: list[_Container] = []
    init_containers: list[_Container] = []
    node_name: str = ""
    readiness_gates: list[_Gate] = []


class _Terminated(_Part, frozen=True):
    exit_code: int = 0
    signal: int = 0
    reason: str = ""
    finished_at: datetime | None = None

    @property
    def why(self) -> str:
        if self.reason:
            return self.reason
        return f"Signal:{self.signal}" if self.signal else f"ExitCode:{self.exit_code}"


class _Waiting(_Part, frozen=True):
    reason: str = ""


class _Running(_Part, frozen=True):
    pass


class _State(_Part, frozen=True):
    waiting: _Waiting | None = None
    running: _Running | None = None
    terminated: _Terminated | None = None


class _ContainerStatus(_Part, frozen=True):
    name: str = ""
    ready: bool = False
    started: bool | None = None
    restart_count: int = 0
    state: _State = _State()
    last_state: _State = _State()


class _PodStatus(_Part, frozen=True):
    phase: str = ""
    reason: str = ""
    conditions: list[_Condition] = []
    init_container_statuses: list[_ContainerStatus] = []
    container_statuses: list[_ContainerStatus] = []
    pod_ip: str = msgspec.field(default="", name="podIP")
    pod_ips: list[_Address] = msgspec.field(default_factory=list, name="podIPs")
    nominated_node_name: str = ""

    def holds(self, condition: str) -> bool:
        return any(one.type == condition and one.status == "True" for one in self.conditions)


class _Pod(_Object, frozen=True):
    spec: _PodSpec = _PodSpec()
    status: _PodStatus = _PodStatus()


class _Restarts:
    """Counts restarts, and knows when the last one was."""

    def __init__(self) -> None:
        self._count = 0
        self._last: datetime | None = None

    def add(self, one: _ContainerStatus) -> None:
        self._count += one.restart_count
        ended = one.last_state.terminated
        if ended is not None and ended.finished_at is not None:
            self._last = max(self._last or ended.finished_at, ended.finished_at)

    def text(self, ages: Ages) -> str:
        if not self._count or self._last is None:
            return str(self._count)
        return f"{self._count} ({ages.since(self._last)} ago)"


def _pod(one: _Pod, meta: _Meta, ages: Ages) -> list[Cell]:
    spec, status = one.spec, one.status
    sidecars = {init.name for init in spec.init_containers if init.restart_policy == "Always"}
    word = status.reason or status.phase
    if any(c.type == "PodScheduled" and c.reason == "SchedulingGated" for c in status.conditions):
        word = "SchedulingGated"

    all_inits, restarts = _Restarts(), _Restarts()
    ready, initializing = 0, ""
    for at, container in enumerate(status.init_container_statuses):
        sidecar = container.name in sidecars
        all_inits.add(container)
        if sidecar:
            restarts.add(container)
        ended = container.state.terminated
        if ended is not None and ended.exit_code == 0:
            continue
        if sidecar and container.started:
            ready += container.ready
            continue
        initializing = _init_word(container.state) or f"Init:{at}/{len(spec.init_containers)}"
        word = initializing
        break

    if initializing and not status.holds("Initialized"):
        restarts = all_inits
    else:
        running = False
        for container in reversed(status.container_statuses):
            restarts.add(container)
            state = container.state
            if state.waiting is not None and state.waiting.reason:
                word = state.waiting.reason
            elif state.terminated is not None:
                word = state.terminated.why
            elif container.ready and state.running is not None:
                running = True
                ready += 1
        if running and word == "Completed":
            word = "Running" if status.holds("Ready") else "NotReady"

    if meta.deletion_timestamp is not None:
        if status.reason == "NodeLost":
            word = "Unknown"
        elif status.phase not in _ENDS:
            word = "Terminating"
    return [
        meta.name,
        f"{ready}/{len(spec.containers) + len(sidecars)}",
        word,
        restarts.text(ages),
        ages.since(meta.creation_timestamp),
        (status.pod_ips[0].ip if status.pod_ips else status.pod_ip) or NONE,
        spec.node_name or NONE,
        status.nominated_node_name or NONE,
        _gates_text(spec, status),
    ]


def _init_word(state: _State) -> str:
    """Return what an init container that holds up its Pod is at; "": its turn, no more."""
    if state.terminated is not None:
        return f"Init:{state.terminated.why}"
    if state.waiting is not None and state.waiting.reason not in ("", "PodInitializing"):
        return f"Init:{state.waiting.reason}"
    return ""


def _gates_text(spec: _PodSpec, status: _PodStatus) -> str:
    if not spec.readiness_gates:
        return NONE
    # The first condition of a type counts.
    found = {one.type: one.status for one in reversed(status.conditions)}
    passed = sum(found.get(gate.condition_type) == "True" for gate in spec.readiness_gates)
    return f"{passed}/{len(spec.readiness_gates)}"


_ENDS: Final[Mapping[str, str]] = {
    "Succeeded": "The pod has completed successfully.",
    "Failed": "The pod failed.",
}


def _pod_conditions(one: _Pod) -> list[Obj]:
    """Return what tells a reader that a row is about something that is over."""
    phase = one.status.phase
    if phase not in _ENDS:
        return []
    return [{"type": "Completed", "status": "True", "reason": phase, "message": _ENDS[phase]}]


# --- Deployment, ReplicaSet, StatefulSet --------------------------------------------------------


class _Template(_Part, frozen=True):
    spec: _PodSpec = _PodSpec()

    @property
    def names(self) -> str:
        return ",".join(one.name for one in self.spec.containers)

    @property
    def images(self) -> str:
        return ",".join(one.image for one in self.spec.containers)


class _WorkloadSpec(_Part, frozen=True):
    replicas: int = 1
    selector: _Selector | None = None
    template: _Template = _Template()


class _WorkloadStatus(_Part, frozen=True):
    replicas: int = 0
    ready_replicas: int = 0
    updated_replicas: int = 0
    available_replicas: int = 0


class _Workload(_Object, frozen=True):
    spec: _WorkloadSpec = _WorkloadSpec()
    status: _WorkloadStatus = _WorkloadStatus()


def _deployment(one: _Workload, meta: _Meta, ages: Ages) -> list[Cell]:
    spec, status = one.spec, one.status
    return [
        meta.name,
        f"{status.ready_replicas}/{spec.replicas}",
        status.updated_replicas,
        status.available_replicas,
        ages.since(meta.creation_timestamp),
        spec.template.names,
        spec.template.images,
        _selector_text(spec.selector, INVALID),
    ]


def _replica_set(one: _Workload, meta: _Meta, ages: Ages) -> list[Cell]:
    spec, status = one.spec, one.status
    return [
        meta.name,
        spec.replicas,
        status.replicas,
        status.ready_replicas,
        ages.since(meta.creation_timestamp),
        spec.template.names,
        spec.template.images,
        _selector_text(spec.selector, "<error>") or NONE,
    ]


def _stateful_set(one: _Workload, meta: _Meta, ages: Ages) -> list[Cell]:
    spec = one.spec
    return [
        meta.name,
        f"{one.status.ready_replicas}/{spec.replicas}",
        ages.since(meta.creation_timestamp),
        spec.template.names,
        spec.template.images,
    ]


# --- Node ---------------------------------------------------------------------------------------


class _NodeAddress(_Part, frozen=True):
    type: str = ""
    address: str = ""


class _NodeInfo(_Part, frozen=True):
    kubelet_version: str = ""
    os_image: str = ""
    kernel_version: str = ""
    container_runtime_version: str = ""


class _NodeSpec(_Part, frozen=True):
    unschedulable: bool = False


class _NodeStatus(_Part, frozen=True):
    conditions: list[_Condition] = []
    addresses: list[_NodeAddress] = []
    node_info: _NodeInfo = _NodeInfo()

    def address(self, kind: str) -> str:
        return next((one.address for one in self.addresses if one.type == kind), NONE)


class _Node(_Object, frozen=True):
    spec: _NodeSpec = _NodeSpec()
    status: _NodeStatus = _NodeStatus()


ROLE_PREFIX, ROLE_LABEL = "node-role.kubernetes.io/", "kubernetes.io/role"


def _node(one: _Node, meta: _Meta, ages: Ages) -> list[Cell]:
    status, info = one.status, one.status.node_info
    ready = {c.type: c.status for c in status.conditions}.get("Ready")
    word = "Unknown" if ready is None else "Ready" if ready == "True" else "NotReady"
    if one.spec.unschedulable:
        word += ",SchedulingDisabled"
    roles = {key.removeprefix(ROLE_PREFIX) for key in meta.labels if key.startswith(ROLE_PREFIX)}
    roles.add(meta.labels.get(ROLE_LABEL, ""))
    return [
        meta.name,
        word,
        ",".join(sorted(roles - {""})) or NONE,
        ages.since(meta.creation_timestamp),
        info.kubelet_version,
        status.address("InternalIP"),
        status.address("ExternalIP"),
        info.os_image or UNKNOWN,
        info.kernel_version or UNKNOWN,
        info.container_runtime_version or UNKNOWN,
    ]


# --- Event --------------------------------------------------------------------------------------


class _Involved(_Part, frozen=True):
    kind: str = ""
    name: str = ""
    field_path: str = ""


class _Source(_Part, frozen=True):
    component: str = ""
    host: str = ""


class _Series(_Part, frozen=True):
    count: int = 0
    last_observed_time: datetime | None = None


class _Event(_Object, frozen=True):
    involved_object: _Involved = _Involved()
    type: str = ""
    reason: str = ""
    message: str = ""
    source: _Source = _Source()
    reporting_component: str = ""
    reporting_instance: str = ""
    first_timestamp: datetime | None = None
    last_timestamp: datetime | None = None
    event_time: datetime | None = None
    count: int = 0
    series: _Series | None = None


def _event(one: _Event, meta: _Meta, ages: Ages) -> list[Cell]:
    first = ages.since(one.first_timestamp or one.event_time)
    last = ages.since(one.last_timestamp) if one.last_timestamp else first
    count = one.count or 1  # one of its own says nothing
    if one.series is not None:
        last, count = ages.since(one.series.last_observed_time), one.series.count
    about = one.involved_object
    by = (one.source.component or one.reporting_component,
          one.source.host or one.reporting_instance)  # fmt: skip
    return [
        last,
        one.type,
        one.reason,
        about.kind.lower() + (f"/{about.name}" if about.name else ""),
        about.field_path,
        ", ".join(by) if by[1] else by[0],
        one.message.strip(),
        first,
        count,
        meta.name,
    ]


# --- kinds with little to tell ------------------------------------------------------------------


class _NamespaceStatus(_Part, frozen=True):
    phase: str = ""


class _Namespace(_Object, frozen=True):
    status: _NamespaceStatus = _NamespaceStatus()


class _ConfigMap(_Object, frozen=True):
    data: dict[str, msgspec.Raw] = {}
    binary_data: dict[str, msgspec.Raw] = {}


class _Secret(_Object, frozen=True):
    type: str = ""
    data: dict[str, msgspec.Raw] = {}


class _ServiceAccount(_Object, frozen=True):
    secrets: list[msgspec.Raw] = []


class _LeaseSpec(_Part, frozen=True):
    holder_identity: str = ""


class _Lease(_Object, frozen=True):
    spec: _LeaseSpec = _LeaseSpec()


class _ServiceCIDRSpec(_Part, frozen=True):
    cidrs: list[str] = []


class _ServiceCIDR(_Object, frozen=True):
    spec: _ServiceCIDRSpec = _ServiceCIDRSpec()


def _namespace(one: _Namespace, meta: _Meta, ages: Ages) -> list[Cell]:
    return [meta.name, one.status.phase, ages.since(meta.creation_timestamp)]


def _config_map(one: _ConfigMap, meta: _Meta, ages: Ages) -> list[Cell]:
    kept = len(one.data) + len(one.binary_data)
    return [meta.name, kept, ages.since(meta.creation_timestamp)]


def _secret(one: _Secret, meta: _Meta, ages: Ages) -> list[Cell]:
    return [meta.name, one.type, len(one.data), ages.since(meta.creation_timestamp)]


def _service_account(one: _ServiceAccount, meta: _Meta, ages: Ages) -> list[Cell]:
    return [meta.name, len(one.secrets), ages.since(meta.creation_timestamp)]


class _Replicas(_Part, frozen=True):
    replicas: int = 0


class _Scale(_Object, frozen=True):
    spec: _Replicas = _Replicas()
    status: _Replicas = _Replicas()


def _scale(one: _Scale, meta: _Meta, ages: Ages) -> list[Cell]:
    age = ages.since(meta.creation_timestamp)
    return [meta.name, one.spec.replicas, one.status.replicas, age]


def _lease(one: _Lease, meta: _Meta, ages: Ages) -> list[Cell]:
    return [meta.name, one.spec.holder_identity, ages.since(meta.creation_timestamp)]


def _service_cidr(one: _ServiceCIDR, meta: _Meta, ages: Ages) -> list[Cell]:
    return [meta.name, ",".join(one.spec.cidrs), ages.since(meta.creation_timestamp)]


# --- which kind is printed how ------------------------------------------------------------------

T = TypeVar("T", bound=_Object)


@dataclass(frozen=True, slots=True)
class Form(Generic[T]):
    """How the objects of a kind are printed.

    columns    -- columnDefinitions of its Table
    cells      -- returns an object's cells, one a column
    conditions -- returns the conditions of an object's row
    """

    columns: list[Obj]
    decoder: msgspec.json.Decoder[T]
    cells: Callable[[T, _Meta, Ages], list[Cell]]
    conditions: Callable[[T], list[Obj]] | None = None


def _column(name: str, text: str, kind: str = "string", format: str = "", wide: int = 0) -> Obj:
    """Return a column. wide -- 1: only `-o wide` shows it"""
    return {"name": name, "type": kind, "format": format, "description": text, "priority": wide}


_wide = partial(_column, wide=1)
_number = partial(_column, kind="integer")

_NAME: Final = _column("Name", "Name of the object, one of its kind in a namespace.", format="name")
_AGE: Final = _column("Age", "How long ago the object was made.")
_READY: Final = _column("Ready", "Pods that are ready, of those that are wanted.")
_CONTAINERS: Final = _wide("Containers", "Names of the containers of the Pod template.")
_IMAGES: Final = _wide("Images", "Images of the containers of the Pod template.")
_PODS: Final = _wide("Selector", "Labels of the Pods that belong to it.")

_FORMS: Final[Mapping[str, Form[Any]]] = {
    "services": Form(
        [
            _NAME,
            _column("Type", "Whom the Service is reachable for."),
            _column("Cluster-IP", "Address inside the cluster."),
            _column("External-IP", "Addresses, or the name, outside the cluster."),
            _column("Port(s)", "Ports, with node port and protocol."),
            _AGE,
            _wide("Selector", "Labels of the Pods behind the Service."),
        ],
        msgspec.json.Decoder(_Service),
        _service,
    ),
    "endpoints": Form(
        [_NAME, _column("Endpoints", "Addresses and ports that are ready."), _AGE],
        msgspec.json.Decoder(_Endpoints),
        _endpoints,
    ),
    "endpointslices.discovery.k8s.io": Form(
        [
            _NAME,
            _column("AddressType", "What the addresses are: IPv4, IPv6 or FQDN."),
            _column("Ports", "Ports that every endpoint has."),
            _column("Endpoints", "Addresses of the endpoints."),
            _AGE,
        ],
        msgspec.json.Decoder(_Slice),
        _slice,
    ),
    "pods": Form(
        [
            _NAME,
            _column("Ready", "Containers that are ready, of all there are."),
            _column("Status", "What the Pod is at."),
            _column("Restarts", "How often its containers were restarted, and when last."),
            _AGE,
            _wide("IP", "Address of the Pod."),
            _wide("Node", "Node the Pod is on."),
            _wide("Nominated Node", "Node that is being cleared for the Pod."),
            _wide("Readiness Gates", "Conditions of its own that hold, of those asked for."),
        ],
        msgspec.json.Decoder(_Pod),
        _pod,
        _pod_conditions,
    ),
    "nodes": Form(
        [
            _NAME,
            _column("Status", "Whether the node is ready, and takes Pods."),
            _column("Roles", "Roles its labels tell."),
            _AGE,
            _column("Version", "Version of the node's agent."),
            _wide("Internal-IP", "Address inside the cluster."),
            _wide("External-IP", "Address outside the cluster."),
            _wide("OS-Image", "Operating system."),
            _wide("Kernel-Version", "Version of its kernel."),
            _wide("Container-Runtime", "What runs its containers."),
        ],
        msgspec.json.Decoder(_Node),
        _node,
    ),
    "namespaces": Form(
        [_NAME, _column("Status", "Active, or Terminating while it is emptied."), _AGE],
        msgspec.json.Decoder(_Namespace),
        _namespace,
    ),
    "configmaps": Form(
        [_NAME, _column("Data", "How many entries it has."), _AGE],
        msgspec.json.Decoder(_ConfigMap),
        _config_map,
    ),
    "secrets": Form(
        [
            _NAME,
            _column("Type", "What its entries are for."),
            _column("Data", "How many entries it has."),
            _AGE,
        ],
        msgspec.json.Decoder(_Secret),
        _secret,
    ),
    "serviceaccounts": Form(
        [_NAME, _column("Secrets", "How many Secrets it names."), _AGE],
        msgspec.json.Decoder(_ServiceAccount),
        _service_account,
    ),
    "events": Form(
        [
            _column("Last Seen", "How long ago it happened last."),
            _column("Type", "Normal, or Warning."),
            _column("Reason", "What happened, in a word."),
            _column("Object", "What it happened to."),
            _wide("Subobject", "Which part of that."),
            _wide("Source", "Who noticed."),
            _column("Message", "What happened, in a sentence."),
            _wide("First Seen", "How long ago it happened first."),
            _wide("Count", "How often it happened."),
            _wide("Name", "Name of the event.", format="name"),
        ],
        msgspec.json.Decoder(_Event),
        _event,
    ),
    "deployments.apps": Form(
        [
            _NAME,
            _READY,
            _column("Up-to-date", "Pods of the newest template."),
            _column("Available", "Pods that have been ready long enough."),
            _AGE,
            _CONTAINERS,
            _IMAGES,
            _PODS,
        ],
        msgspec.json.Decoder(_Workload),
        _deployment,
    ),
    "replicasets.apps": Form(
        [
            _NAME,
            _number("Desired", "Pods that are wanted."),
            _number("Current", "Pods that there are."),
            _number("Ready", "Pods that are ready."),
            _AGE,
            _CONTAINERS,
            _IMAGES,
            _PODS,
        ],
        msgspec.json.Decoder(_Workload),
        _replica_set,
    ),
    "statefulsets.apps": Form(
        [_NAME, _READY, _AGE, _CONTAINERS, _IMAGES],
        msgspec.json.Decoder(_Workload),
        _stateful_set,
    ),
    SCALE.qualified: Form(
        [
            _column("Name", "Name of the object that is scaled."),
            _number("Desired", "Pods that are wanted."),
            _number("Available", "Pods that there are."),
            _AGE,
        ],
        msgspec.json.Decoder(_Scale),
        _scale,
    ),
    "leases.coordination.k8s.io": Form(
        [_NAME, _column("Holder", "Who holds it."), _AGE],
        msgspec.json.Decoder(_Lease),
        _lease,
    ),
    "servicecidrs.networking.k8s.io": Form(
        [_NAME, _column("CIDRs", "Ranges that Services get addresses from."), _AGE],
        msgspec.json.Decoder(_ServiceCIDR),
        _service_cidr,
    ),
}
