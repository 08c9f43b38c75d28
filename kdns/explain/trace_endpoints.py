"""A Service port's endpoints, each with why it is in or out; and why there are none.

What counts is registry/endpoints.py's and proxy/table.py's: this only says in words which of
their reasons it was, and what stands behind it (labels, a Pod's condition, a port's name).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from kdns.explain.evidence import WORKLOADS, Evidence, Json
from kdns.explain.trace_findings import Finding
from kdns.proxy.options import Family, NodeView
from kdns.registry.endpoints import Endpoint, canonical_address, is_published, is_usable
from kdns.registry.objects import (
    HEADLESS_LABEL,
    PROXY_NAME_LABEL,
    SERVICE_NAME_LABEL,
    EndpointSlice,
    Key,
    Pod,
    Service,
    ServicePort,
    SliceEndpoint,
    key_of,
)

FAMILY_WORD: Final[Mapping[int, str]] = {4: "IPv4", 6: "IPv6"}
FEW: Final = 3  # so many are named, the rest is counted


@dataclass(frozen=True, slots=True)
class Seen:
    """One endpoint.

    port   -- 0: its slice has none of that name
    pod    -- "namespace/name"; ""
    chosen -- packets may be sent there
    why    -- why it is in or out
    chance -- of a packet to be sent there
    """

    address: str
    port: int
    pod: str = ""
    node: str = ""
    topology_zone: str = ""
    slice: str = ""
    ready: bool = True
    serving: bool = True
    terminating: bool = False
    chosen: bool = False
    why: str = ""
    chance: float = 0.0

    def __str__(self) -> str:
        address = f"[{self.address}]" if ":" in self.address else self.address
        return f"{address}:{self.port}" if self.port else address


def look_at_endpoints(
    evidence: Evidence,
    service: Service,
    port: ServicePort,
    family: Family,
    node: NodeView,
    chosen: Collection[Endpoint],
    local: bool,
) -> list[Seen]:
    """Return all endpoints of a Service port with their reasons.

    chosen -- those that packets are sent to; local -- the policy Local chose them
    """
    slices = slices_of(evidence, key_of(service))
    mine = [one for one in slices if one.address_type == FAMILY_WORD[family]]
    ready = {(e.ip, e.port) for e in chosen}
    found: dict[tuple[str, int], Seen] = {}
    for one in mine or slices:
        numbers = _numbers(one, port)
        for entry in one.endpoints or ():
            for number in numbers or [0]:
                seen = _seen(evidence, one, entry, number, node, ready, local, port)
                known = found.get((seen.address, number))
                if known is None or (seen.chosen and not known.chosen):
                    found[seen.address, number] = seen
    return sorted(found.values(), key=lambda one: (not one.chosen, str(one)))


def look_at_headless(evidence: Evidence, service: Service) -> list[Seen]:
    """Return the endpoints of a headless Service, as DNS shows them."""
    return [
        Seen(
            address, 0, pod_of(one, entry), entry.node_name or "", entry.topology_zone or "",
            one.metadata.name, is_published(entry), entry.conditions.serving is not False,
            entry.conditions.terminating is True, is_published(entry),
            "ready" if is_published(entry) else "not ready, so DNS does not show it",
        )
        for one in slices_of(evidence, key_of(service))
        for entry in one.endpoints or ()
        for address in entry.addresses
    ]  # fmt: skip


def slices_of(evidence: Evidence, key: Key) -> tuple[EndpointSlice, ...]:
    return evidence.snapshot.slices.get(key[0], {}).get(key[1], ())


def _numbers(one: EndpointSlice, port: ServicePort) -> list[int]:
    return [
        p.port
        for p in one.ports or ()
        if p.name == port.name and p.port and (p.protocol or "TCP") == port.protocol
    ]


def _seen(
    evidence: Evidence,
    one: EndpointSlice,
    entry: SliceEndpoint,
    number: int,
    node: NodeView,
    chosen: Collection[tuple[str, int]],
    local: bool,
    port: ServicePort,
) -> Seen:
    found = canonical_address(entry.addresses[0]) if entry.addresses else None
    address = found[1] if found else "".join(entry.addresses[:1])
    conditions = entry.conditions
    state = Endpoint(
        address,
        number,
        entry.node_name == node.name,
        conditions.ready is not False,
        conditions.serving is not False,
        conditions.terminating is True,
    )
    pod = pod_of(one, entry)
    seen = Seen(
        address, number, pod, entry.node_name or "", entry.topology_zone or "",
        one.metadata.name, state.ready, state.serving, state.terminating,
    )  # fmt: skip
    inside = (address, number) in chosen
    why = (
        _why_in(state) if inside else _why_out(evidence, one, entry, state, node, local, port, pod)
    )
    return replace(seen, chosen=inside, why=why)


def pod_of(one: EndpointSlice, entry: SliceEndpoint) -> str:
    """Return the Pod of an endpoint, "namespace/name"; "" where it says none."""
    target = entry.target_ref
    return f"{target.namespace or one.metadata.namespace}/{target.name}" if target else ""


def _why_in(state: Endpoint) -> str:
    if state.ready:
        return "ready"
    return "terminating, but it still serves and nothing ready is left"


def _why_out(
    evidence: Evidence,
    one: EndpointSlice,
    entry: SliceEndpoint,
    state: Endpoint,
    node: NodeView,
    local: bool,
    port: ServicePort,
    pod: str,
) -> str:
    """Say the first reason that keeps an endpoint out, in the order they are looked at."""
    labels = one.metadata.labels or {}
    if HEADLESS_LABEL in labels or PROXY_NAME_LABEL in labels:
        return f"its EndpointSlice {one.metadata.name} is labelled for another proxy"
    if not entry.addresses:
        return "it has no address"
    if not state.port:
        has = ", ".join(_port_words(one)) or "none"
        return f"its EndpointSlice has no port {port_word(port)}; it has {has}"
    if not is_usable(state):
        if state.terminating:
            return "terminating, and it serves no more"
        trouble = pod_trouble(evidence, pod)
        return f"not ready{trouble and ': ' + trouble}"
    if local and not state.local:
        where = f"on node {entry.node_name}" if entry.node_name else "on no node that is known"
        return f"{where}, and the traffic policy is Local"
    if not state.ready:
        return "terminating, and others are ready"
    hints = entry.hints
    zones = sorted({hint.name for hint in (hints.for_zones if hints else None) or ()})
    nodes = sorted({hint.name for hint in (hints.for_nodes if hints else None) or ()})
    if nodes and node.name not in nodes:
        return f"hinted for node {', '.join(nodes)}; this is {node.name}"
    if zones:
        return f"hinted for zone {', '.join(zones)}; this node is in {node.topology_zone}"
    return "another endpoint is preferred"


def port_word(port: ServicePort) -> str:
    return f"{port.name!r}/{port.protocol}" if port.name else f"without a name/{port.protocol}"


def _port_words(one: EndpointSlice) -> list[str]:
    return [f"{p.name or ''!r}:{p.port}/{p.protocol or 'TCP'}" for p in one.ports or ()]


# --- Pods --------------------------------------------------------------------------------------


def pod_trouble(evidence: Evidence, pod: str) -> str:
    """Return why a Pod is not ready, as far as it says so; "" if nothing is known."""
    namespace, _, name = pod.partition("/")
    one = evidence.json_of("Pod", (namespace, name)) if name else None
    status = one.get("status") if one is not None else None
    if not isinstance(status, Mapping):
        return ""
    for part in _maps(status.get("initContainerStatuses"), status.get("containerStatuses")):
        for state in ("waiting", "terminated"):
            found = (part.get("state") or {}).get(state) or {}
            if found.get("reason") and found["reason"] != "Completed":
                return f"container {part.get('name')} is {state}: {found['reason']}"
    for condition in _maps(status.get("conditions")):
        if condition.get("type") == "Ready" and condition.get("status") == "False":
            said = condition.get("message") or condition.get("reason") or ""
            if said:
                return str(said)
    phase = str(status.get("phase") or "")
    return "" if phase in ("", "Running") else f"its phase is {phase}"


def _maps(*lists: object) -> Iterator[Json]:
    for one in lists:
        if isinstance(one, Sequence) and not isinstance(one, str):
            yield from (item for item in one if isinstance(item, Mapping))


@dataclass(frozen=True, slots=True)
class DeclaredPort:
    """A containerPort."""

    name: str
    number: int
    protocol: str

    def __str__(self) -> str:
        return f"{self.number}/{self.protocol}{self.name and f' ({self.name})'}"


def declared_ports(spec: Json | None) -> list[DeclaredPort]:
    """Return the ports that a Pod's containers declare."""
    spec = spec or {}
    sidecars = [c for c in _maps(spec.get("initContainers")) if c.get("restartPolicy") == "Always"]
    return [
        DeclaredPort(
            str(port.get("name") or ""),
            int(port.get("containerPort") or 0),
            str(port.get("protocol") or "TCP"),
        )
        for container in (*_maps(spec.get("containers")), *sidecars)
        for port in _maps(container.get("ports"))
    ]


def pods_of(evidence: Evidence, service: Service) -> list[Pod]:
    """Return the Pods that a Service's selector matches."""
    selector = service.spec.selector
    if not selector:
        return []
    found = evidence.snapshot.pods.get(service.metadata.namespace, {}).values()
    return sorted(
        (pod for pod in found if _fits(selector, pod.metadata.labels)),
        key=lambda pod: pod.metadata.name,
    )


def _fits(selector: Mapping[str, str], labels: Mapping[str, str] | None) -> bool:
    labels = labels or {}
    return all(labels.get(key) == value for key, value in selector.items())


# --- why there are none ------------------------------------------------------------------------


def why_none(
    evidence: Evidence,
    service: Service,
    port: ServicePort | None,
    family: Family | None,
    seen: Sequence[Seen],
) -> Finding:
    """Return why nothing stands behind a Service port.

    family -- None: of a headless Service, whose records are of both
    """
    key = "/".join(key_of(service))
    slices = slices_of(evidence, key_of(service))
    entries = [e for one in slices for e in one.endpoints or ()]
    if not entries:
        return _why_no_endpoint(evidence, service)
    if family is not None and not any(
        one.address_type == FAMILY_WORD[family] and one.endpoints for one in slices
    ):
        others = sorted({one.address_type for one in slices if one.endpoints})
        return Finding(
            "endpoint-family-mismatch",
            f"Service {key} has a ClusterIP of {FAMILY_WORD[family]}, and its endpoints are"
            f" {', '.join(others)}",
            "give the Service the families its Pods have (spec.ipFamilies), or the Pods both",
        )
    if port is not None and seen and all(not one.port for one in seen):
        return _why_no_port(evidence, service, port, slices)
    total = len(seen) or len(entries)
    pods = [pod for one in seen if (pod := one.pod)] or [
        f"{e.target_ref.namespace or service.metadata.namespace}/{e.target_ref.name}"
        for e in entries
        if e.target_ref is not None and e.target_ref.kind == "Pod"
    ]
    troubles = {pod: trouble for pod in pods if (trouble := pod_trouble(evidence, pod))}
    if pods and (troubles or pods_of(evidence, service)):
        said = "; ".join(f"{pod.partition('/')[2]}: {why}" for pod, why in _few(troubles.items()))
        return Finding(
            "pods-not-ready",
            f"0 of {total} endpoints of Service {key} are ready{said and ': ' + said}",
            f"see why: kubectl -n {service.metadata.namespace} describe pod"
            f" {pods[0].partition('/')[2]}; until then spec.publishNotReadyAddresses would"
            " show them all the same",
        )
    return Finding(
        "no-ready-endpoints",
        f"0 of {total} endpoints of Service {key} are ready",
        f"look at what writes EndpointSlice {slices[0].metadata.name}: its endpoints'"
        " conditions.ready must be true",
    )


def _few(items: Iterable[Any]) -> list[Any]:
    return list(items)[:FEW]


def _why_no_endpoint(evidence: Evidence, service: Service) -> Finding:
    key = "/".join(key_of(service))
    namespace = service.metadata.namespace
    selector = service.spec.selector or {}
    orphan = _orphan_slice(evidence, service)
    if orphan:
        return Finding(
            "slice-without-label",
            f"Service {key} has no endpoints: EndpointSlice {namespace}/{orphan} has no label"
            f" {SERVICE_NAME_LABEL}",
            f"label it: kubectl -n {namespace} label endpointslice {orphan}"
            f" {SERVICE_NAME_LABEL}={service.metadata.name}",
        )
    if not selector:
        return Finding(
            "no-endpoints",
            f"Service {key} has no endpoints, and no selector that would make them",
            "give it a selector, or write an EndpointSlice labelled"
            f" {SERVICE_NAME_LABEL}={service.metadata.name}",
        )
    pods = pods_of(evidence, service)
    if pods:
        names = ", ".join(pod.metadata.name for pod in _few(pods))
        waiting = [pod for pod in pods if not pod.status.pod_ip]
        if len(waiting) == len(pods):
            why = pod_trouble(evidence, f"{namespace}/{pods[0].metadata.name}")
            return Finding(
                "pods-not-ready",
                f"the Pods of Service {key} have no address yet ({names}){why and ': ' + why}",
                f"see why: kubectl -n {namespace} describe pod {pods[0].metadata.name}",
            )
        return Finding(
            "endpoints-not-written",
            f"Pods match the selector of Service {key} ({names}), but it has no EndpointSlice",
            "the EndpointSlice controller has not written it: is kube-controller-manager up?",
        )
    return _why_no_pod(evidence, service, selector)


def _orphan_slice(evidence: Evidence, service: Service) -> str:
    """Return an EndpointSlice that is the Service's by its name, but does not say so."""
    name = service.metadata.name
    for kind, namespace, one in sorted(evidence.raw):
        if kind != "EndpointSlice" or namespace != service.metadata.namespace:
            continue
        labels = (evidence.raw[kind, namespace, one].get("metadata") or {}).get("labels") or {}
        if SERVICE_NAME_LABEL not in labels and (one == name or one.startswith(f"{name}-")):
            return one
    return ""


def _why_no_pod(evidence: Evidence, service: Service, selector: Mapping[str, str]) -> Finding:
    key = "/".join(key_of(service))
    namespace = service.metadata.namespace
    wanted = _labels(selector)
    workload = _workload(evidence, namespace, selector)
    if workload is not None:
        kind, name = workload
        return Finding(
            "scaled-to-zero",
            f"Service {key} has no endpoints: {kind} {namespace}/{name} has 0 replicas",
            f"kubectl -n {namespace} scale {kind.lower()} {name} --replicas=1",
        )
    elsewhere = sorted(
        f"{space}/{pod.metadata.name}"
        for space, pods in evidence.snapshot.pods.items()
        for pod in pods.values()
        if space != namespace and _fits(selector, pod.metadata.labels)
    )
    if elsewhere:
        return Finding(
            "pods-in-other-namespace",
            f"no Pod in {namespace} has {wanted}; Pod {elsewhere[0]} has",
            f"a Service selects Pods of its own namespace: make it in"
            f" {elsewhere[0].partition('/')[0]}",
        )
    nearest, differs = _nearest_pod(evidence, namespace, selector)
    if nearest:
        return Finding(
            "selector-matches-nothing",
            f"no Pod in {namespace} has {wanted}; the nearest, {nearest}, {differs}",
            f"make the selector of Service {key} and the labels of the Pods the same",
        )
    if evidence.origin == "kdns" and not evidence.snapshot.pods:
        return Finding(
            "no-endpoints",
            f"Service {key} has no endpoints; whether Pods have {wanted} is not known here: this"
            " kdns holds no Pods",
            f"kubectl -n {namespace} get pods -l {wanted} --show-labels",
        )
    known = "" if evidence.snapshot.pods.get(namespace) else f" (no Pod in {namespace} is known)"
    return Finding(
        "selector-matches-nothing",
        f"no Pod in {namespace} has {wanted}{known}",
        f"start Pods with these labels, or correct the selector of Service {key}",
    )


def _labels(labels: Mapping[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items()))


def _workload(
    evidence: Evidence, namespace: str, selector: Mapping[str, str]
) -> tuple[str, str] | None:
    """Return a workload without replicas whose Pods would match."""
    for (kind, space, name), one in sorted(evidence.raw.items()):
        spec = one.get("spec") if kind in WORKLOADS and space == namespace else None
        if not isinstance(spec, Mapping) or spec.get("replicas") != 0:
            continue
        labels = ((spec.get("template") or {}).get("metadata") or {}).get("labels")
        if _fits(selector, labels):
            return kind, name
    return None


def _nearest_pod(
    evidence: Evidence, namespace: str, selector: Mapping[str, str]
) -> tuple[str, str]:
    """Return the Pod whose labels come nearest, and in what they differ; "" if none does."""
    best: tuple[int, int, str, str] = (0, 0, "", "")
    for name, pod in sorted(evidence.snapshot.pods.get(namespace, {}).items()):
        labels = pod.metadata.labels or {}
        same = sum(labels.get(key) == value for key, value in selector.items())
        keys = sum(key in labels for key in selector)
        near = sum(_is_near(value, labels) for value in selector.values())
        score = (same, keys + near)
        if score > best[:2]:
            best = (*score, name, _differs(selector, labels))
    return best[2], best[3]


def _is_near(value: str, labels: Mapping[str, str]) -> bool:
    """True if the value stands under another key."""
    return value in labels.values()


def _differs(selector: Mapping[str, str], labels: Mapping[str, str]) -> str:
    said = []
    for key, value in sorted(selector.items()):
        if labels.get(key) == value:
            continue
        if key in labels:
            said.append(f"has {key}={labels[key]}")
            continue
        other = next((k for k, v in sorted(labels.items()) if v == value), "")
        said.append(f"has {other}={value} and no {key}" if other else f"has no {key}")
    return ", ".join(said)


def _why_no_port(
    evidence: Evidence, service: Service, port: ServicePort, slices: Sequence[EndpointSlice]
) -> Finding:
    key = "/".join(key_of(service))
    if isinstance(port.target_port, str):
        declared = {
            str(p)
            for pod in pods_of(evidence, service)
            for p in declared_ports(evidence.pod_spec(key_of(pod)))
        }
        has = ", ".join(sorted(declared)) or "none"
        return Finding(
            "target-port-mismatch",
            f"targetPort {port.target_port!r} of Service {key} is the name of no {port.protocol}"
            f" port of its Pods; they declare {has}",
            f"name a containerPort {port.target_port!r}, or write its number as targetPort",
        )
    has = ", ".join(sorted({word for one in slices for word in _port_words(one)})) or "none"
    return Finding(
        "port-name-mismatch",
        f"no EndpointSlice of Service {key} has a port {port_word(port)}; they have {has}",
        "the name and protocol of a port must be the same in Service and EndpointSlice",
    )


def check_declared(evidence: Evidence, chosen: Sequence[Seen], protocol: str) -> Finding | None:
    """Return what is wrong if the Pods declare ports, and none of them the one sent to."""
    wrong: list[tuple[Seen, list[DeclaredPort]]] = []
    for one in chosen:
        namespace, _, name = one.pod.partition("/")
        declared = declared_ports(evidence.pod_spec((namespace, name))) if name else []
        if declared and (one.port, protocol) not in {(p.number, p.protocol) for p in declared}:
            wrong.append((one, declared))
    if not wrong:
        return None
    one, declared = wrong[0]
    has = ", ".join(sorted(map(str, declared)))
    if any(p.number == one.port for p in declared):
        return Finding(
            "udp-tcp-mismatch",
            f"Pod {one.pod} declares {has}, and is sent to as {one.port}/{protocol}",
            "give the Service's port the protocol that the containers speak",
            stops=len(wrong) == len(chosen),
        )
    return Finding(
        "port-not-declared",
        f"Pod {one.pod} is sent to at port {one.port}/{protocol}, and its containers declare"
        f" {has}: most likely nobody listens",
        f"set targetPort to {declared[0].number}, or declare the port if the program does listen"
        " there",
        stops=len(wrong) == len(chosen),
    )
