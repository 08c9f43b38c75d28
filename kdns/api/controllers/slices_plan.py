"""Which EndpointSlices and Endpoints a Service with a selector has: pure functions.

Decides endpoints, their conditions and ports, and how they are spread over slices; what is
there and what is written is slices.py's. Upstream: endpointslice/reconciler.go,
endpoints/repacking; KEP-752 (slices), KEP-1672 (terminating), KEP-3015 (trafficDistribution).
"""

from __future__ import annotations

import ipaddress
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from kdns.api.controllers.index import ENDED, SERVICE_NAME, Pod
from kdns.api.controllers.writes import owner_reference
from kdns.api.store import Obj

MANAGED_BY: Final = "endpointslice.kubernetes.io/managed-by"
SLICE_CONTROLLER: Final = "endpointslice-controller.k8s.io"
HEADLESS: Final = "service.kubernetes.io/headless"
ENDPOINTS_MANAGED_BY: Final = "endpoints.kubernetes.io/managed-by"
ENDPOINTS_CONTROLLER: Final = "endpoint-controller"
TRIGGER_TIME: Final = "endpoints.kubernetes.io/last-change-trigger-time"
OVER_CAPACITY: Final = "endpoints.kubernetes.io/over-capacity"
RESERVED_LABELS: Final = frozenset({SERVICE_NAME, MANAGED_BY, HEADLESS, ENDPOINTS_MANAGED_BY})
LAST_APPLIED: Final = "kubectl.kubernetes.io/last-applied-configuration"

MAX_PER_SLICE: Final = 100  # endpoints; upstream's --max-endpoints-per-slice
MAX_ADDRESSES: Final = 1000  # of an Endpoints object

# A node's zone ("": none), or None for a node that does not exist.
ZoneOf: TypeAlias = Callable[[str], str | None]


@dataclass(slots=True)
class Plan:
    """What is to be written. Slices to update have the names of slices that are there."""

    create: list[Obj] = field(default_factory=list)
    update: list[Obj] = field(default_factory=list)
    delete: list[Obj] = field(default_factory=list)


# --- endpoints of Pods ------------------------------------------------------------------------


def takes_part(pod: Pod, *, terminating: bool = True) -> bool:
    """True if a Pod has an endpoint at all."""
    if pod.status.phase in ENDED or not pod.ips:
        return False
    return terminating or not pod.terminating


def family_of(address: str) -> str:
    return "IPv6" if ":" in address else "IPv4"


def families_of(service: Obj) -> list[str]:
    """Return the address types a Service's endpoints come in."""
    spec = service["spec"]
    if spec.get("ipFamilies"):
        return list(spec["ipFamilies"])
    address = spec.get("clusterIP") or ""
    return ["IPv4"] if address in ("", "None") else [family_of(address)]


def is_headless(service: Obj) -> bool:
    """True for a Service without an address of its own, as upstream's !IsServiceIPSet."""
    return service["spec"].get("clusterIP") in ("None", "", None)


def hostname_of(pod: Pod, service: Obj) -> str:
    """Return the name a headless Service's DNS gives this Pod, "" for none."""
    if pod.spec.hostname and pod.spec.subdomain == service["metadata"]["name"]:
        return pod.spec.hostname
    return ""


def endpoint_of(pod: Pod, service: Obj, family: str, zone: str | None) -> Obj | None:
    """Return the endpoint of one Pod; None if it has no address of the family."""
    addresses = [ip for ip in pod.ips if family_of(ip) == family]
    if not addresses:
        return None
    serving, terminating = pod.ready, pod.terminating
    ready = bool(service["spec"].get("publishNotReadyAddresses")) or (serving and not terminating)
    endpoint: Obj = {
        "addresses": addresses,
        "conditions": {"ready": ready, "serving": serving, "terminating": terminating},
    }
    hostname = hostname_of(pod, service)
    if hostname:
        endpoint["hostname"] = hostname
    if pod.spec.nodeName:
        endpoint["nodeName"] = pod.spec.nodeName
    endpoint["targetRef"] = _reference(pod)
    if zone:
        endpoint["zone"] = zone
    hints = _hints(service, endpoint) if ready else {}
    if hints:
        endpoint["hints"] = hints
    return endpoint


def _reference(pod: Pod) -> Obj:
    meta = pod.metadata
    return {"kind": "Pod", "namespace": meta.namespace, "name": meta.name, "uid": meta.uid}


def _hints(service: Obj, endpoint: Obj) -> Obj:
    """KEP-3015: the words are promises about where traffic stays while it can."""
    wish = service["spec"].get("trafficDistribution")
    hints: Obj = {}
    if wish in ("PreferClose", "PreferSameZone", "PreferSameNode") and endpoint.get("zone"):
        hints["forZones"] = [{"name": endpoint["zone"]}]
    if wish == "PreferSameNode" and endpoint.get("nodeName"):
        hints["forNodes"] = [{"name": endpoint["nodeName"]}]
    return hints


def target_port(pod: Pod, port: Obj) -> int | None:
    """Return the number a Service port has in a Pod; None if no container names it."""
    target = port.get("targetPort", port["port"])
    if isinstance(target, int):
        return target or int(port["port"])
    protocol = port.get("protocol", "TCP")
    # Of the init containers those that go on beside the others (sidecars).
    sidecars = [one for one in pod.spec.initContainers if one.restartPolicy == "Always"]
    for container in (*pod.spec.containers, *sidecars):
        for offered in container.ports:
            if offered.name == target and offered.protocol == protocol:
                return offered.containerPort
    return None


def ports_of(pod: Pod, service: Obj) -> list[Obj]:
    """Return the ports of a slice this Pod belongs in."""
    found = []
    for port in service["spec"].get("ports") or ():
        number = target_port(pod, port)
        if number is None:
            continue
        entry = {
            "name": port.get("name", ""),
            "port": number,
            "protocol": port.get("protocol", "TCP"),
        }
        if port.get("appProtocol"):
            entry["appProtocol"] = port["appProtocol"]
        found.append(entry)
    return found


def _port_map(ports: Iterable[Mapping[str, Any]] | None) -> tuple[Any, ...]:
    """The identity of a list of ports, whatever their order."""
    return tuple(
        sorted(
            (
                p.get("name", ""),
                p.get("protocol", "TCP"),
                p.get("port", 0),
                p.get("appProtocol", ""),
            )
            for p in ports or ()
        )
    )


# --- slices -----------------------------------------------------------------------------------


def slice_labels(service: Obj, managed_by: str = SLICE_CONTROLLER) -> dict[str, str]:
    labels = service["metadata"].get("labels") or {}
    kept = {name: value for name, value in labels.items() if name not in RESERVED_LABELS}
    if is_headless(service):
        kept[HEADLESS] = ""
    kept[SERVICE_NAME] = service["metadata"]["name"]
    kept[MANAGED_BY] = managed_by
    return kept


def plan_slices(
    service: Obj,
    pods: Sequence[Pod],
    existing: Sequence[Obj],
    zone_of: ZoneOf,
    trigger: str = "",
) -> Plan:
    """Return what makes the slices of a Service what its Pods say.

    existing -- its slices that this controller manages
    trigger  -- when what led to this happened (annotation for whoever measures latency)
    """
    plan = Plan()
    families = families_of(service)
    owner, labels = owner_reference(service), slice_labels(service)

    def fresh(family: str, ports: list[Obj], endpoints: list[Obj]) -> Obj:
        meta: Obj = {
            "generateName": f"{service['metadata']['name']}-",
            "namespace": service["metadata"]["namespace"],
            "labels": dict(labels),
            "ownerReferences": [owner],
        }
        if trigger:
            meta["annotations"] = {TRIGGER_TIME: trigger}
        return {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": meta,
            "addressType": family,
            "endpoints": endpoints,
            "ports": ports,
        }

    usable = []
    for one in existing:
        # One of an earlier Service of this name goes with that one.
        if one["addressType"] in families and owner in one["metadata"].get("ownerReferences", ()):
            usable.append(one)
        else:
            plan.delete.append(one)
    for family in families:
        wanted = _wanted(service, pods, family, zone_of)
        held = [one for one in usable if one["addressType"] == family]
        part = _plan_family(family, wanted, held, fresh)
        plan.create += part.create
        plan.delete += part.delete
        plan.update += part.update
        changed = {one["metadata"]["name"] for one in (*part.update, *part.delete)}
        for one in held:
            if one["metadata"]["name"] not in changed and _labels_differ(one, labels):
                plan.update.append(one)
    for one in plan.update:
        _relabel(one, labels, trigger)
    return plan


def _labels_differ(one: Obj, labels: Mapping[str, str]) -> bool:
    return (one["metadata"].get("labels") or {}) != labels


def _relabel(one: Obj, labels: Mapping[str, str], trigger: str) -> None:
    one["metadata"]["labels"] = dict(labels)
    annotations = one["metadata"].setdefault("annotations", {})
    if trigger:
        annotations[TRIGGER_TIME] = trigger
    else:
        annotations.pop(TRIGGER_TIME, None)
    if not annotations:
        del one["metadata"]["annotations"]


def _wanted(
    service: Obj, pods: Sequence[Pod], family: str, zone_of: ZoneOf
) -> dict[tuple[Any, ...], tuple[list[Obj], dict[str, Obj]]]:
    """Return for each port map its ports, and the endpoints by their Pod's uid."""
    groups: dict[tuple[Any, ...], tuple[list[Obj], dict[str, Obj]]] = {}
    tolerant = bool(service["spec"].get("publishNotReadyAddresses"))
    for pod in pods:
        if not takes_part(pod):
            continue
        zone: str | None = ""
        if pod.spec.nodeName:
            zone = zone_of(pod.spec.nodeName)
            if zone is None and not tolerant:
                continue  # a Pod of a node that is gone; the node's event brings us back
        endpoint = endpoint_of(pod, service, family, zone)
        if endpoint is None:
            continue
        ports = ports_of(pod, service)
        group = groups.setdefault(_port_map(ports), (ports, {}))
        group[1][pod.metadata.uid] = endpoint
    return groups


def _plan_family(
    family: str,
    wanted: Mapping[tuple[Any, ...], tuple[list[Obj], dict[str, Obj]]],
    existing: Sequence[Obj],
    fresh: Callable[[str, list[Obj], list[Obj]], Obj],
) -> Plan:
    plan = Plan()
    held: defaultdict[tuple[Any, ...], list[Obj]] = defaultdict(list)
    for one in existing:
        held[_port_map(one.get("ports"))].append(one)
    for ports_key, slices in held.items():
        if ports_key not in wanted:
            plan.delete += slices
    for ports_key, (ports, endpoints) in wanted.items():
        _plan_ports(plan, family, ports, endpoints, held.get(ports_key, []), fresh)
    if not plan.create and len(plan.delete) == len(existing):
        # A Service without endpoints has one slice without any, so that readers can tell
        # "none" from "not known yet".
        placeholder = next(
            (one for one in plan.delete if not one.get("endpoints") and not one.get("ports")), None
        )
        if placeholder is not None:
            plan.delete.remove(placeholder)
        else:
            plan.create.append(fresh(family, [], []))
    while plan.create and plan.delete:
        # One write in the place of two, and readers never see a Service without slices.
        new, old = plan.create.pop(), plan.delete.pop()
        old["endpoints"], old["ports"] = new["endpoints"], new["ports"]
        plan.update.append(old)
    return plan


def _plan_ports(
    plan: Plan,
    family: str,
    ports: list[Obj],
    endpoints: Mapping[str, Obj],
    existing: Sequence[Obj],
    fresh: Callable[[str, list[Obj], list[Obj]], Obj],
) -> None:
    """Spread the endpoints of one port map so that few slices change."""
    left = dict(endpoints)
    changed: list[Obj] = []
    kept: list[Obj] = []
    for one in existing:
        before = one.get("endpoints") or []
        after = []
        for endpoint in before:
            new = left.pop((endpoint.get("targetRef") or {}).get("uid", ""), None)
            if new is not None:
                after.append(new)
        if not after:
            plan.delete.append(one)
        elif after != before or len(after) > MAX_PER_SLICE:
            one["endpoints"] = after
            changed.append(one)
        else:
            kept.append(one)
    rest = list(left.values())
    # Into slices that change anyway, the fullest first; into one more only if it takes all
    # that is left; the remainder into new ones.
    for one in sorted(changed, key=lambda one: -len(one["endpoints"])):
        room = max(MAX_PER_SLICE - len(one["endpoints"]), 0)
        one["endpoints"] = one["endpoints"] + rest[:room]
        rest = rest[room:]
    if rest and len(rest) < MAX_PER_SLICE:
        fitting = [one for one in kept if len(one["endpoints"]) + len(rest) <= MAX_PER_SLICE]
        if fitting:
            one = max(fitting, key=lambda one: len(one["endpoints"]))
            one["endpoints"] = one["endpoints"] + rest
            changed.append(one)
            rest = []
    plan.update += changed
    for first in range(0, len(rest), MAX_PER_SLICE):
        plan.create.append(fresh(family, ports, rest[first : first + MAX_PER_SLICE]))


# --- the older Endpoints object ---------------------------------------------------------------


def wanted_endpoints(service: Obj, pods: Sequence[Pod], trigger: str = "") -> Obj:
    """Return the Endpoints object of a Service, its subsets in canonical form."""
    meta = service["metadata"]
    labels = {k: v for k, v in (meta.get("labels") or {}).items() if k not in RESERVED_LABELS}
    if is_headless(service):
        labels[HEADLESS] = ""
    labels[ENDPOINTS_MANAGED_BY] = ENDPOINTS_CONTROLLER
    annotations: dict[str, str] = {}
    if trigger:
        annotations[TRIGGER_TIME] = trigger
    subsets, cut = _truncate(_subsets(service, pods))
    if cut:
        annotations[OVER_CAPACITY] = "truncated"
    wanted: Obj = {
        "apiVersion": "v1",
        "kind": "Endpoints",
        "metadata": {"name": meta["name"], "namespace": meta["namespace"], "labels": labels},
    }
    if annotations:
        wanted["metadata"]["annotations"] = annotations
    if subsets:
        wanted["subsets"] = subsets
    return wanted


def _subsets(service: Obj, pods: Sequence[Pod]) -> list[Obj]:
    """Group addresses by the ports they have, as RepackSubsets."""
    tolerant = bool(service["spec"].get("publishNotReadyAddresses"))
    family = families_of(service)[0]
    has_ports = bool(service["spec"].get("ports"))
    groups: defaultdict[tuple[Any, ...], tuple[list[Obj], list[tuple[Obj, bool]]]]
    groups = defaultdict(lambda: ([], []))
    for pod in pods:
        if not takes_part(pod, terminating=tolerant):
            continue
        ip = next((ip for ip in pod.ips if family_of(ip) == family), None)
        if ip is None:
            continue
        address: Obj = {"ip": ip}
        hostname = hostname_of(pod, service)
        if hostname:
            address["hostname"] = hostname
        if pod.spec.nodeName:
            address["nodeName"] = pod.spec.nodeName
        address["targetRef"] = _reference(pod)
        ports = [_named(port) for port in ports_of(pod, service)]
        if not ports and has_ports:
            continue
        group = groups[_port_map(ports)]
        group[0][:] = sorted(ports, key=lambda p: (p["port"], p["protocol"], p.get("name", "")))
        group[1].append((address, tolerant or pod.ready))
    return [_subset(*groups[key]) for key in sorted(groups)]


def _named(port: Obj) -> Obj:
    """An Endpoints port leaves an empty name out, where a slice's says it."""
    return {name: value for name, value in port.items() if value != ""}


def _subset(ports: list[Obj], addresses: Sequence[tuple[Obj, bool]]) -> Obj:
    subset: Obj = {}
    for word, ready in (("addresses", True), ("notReadyAddresses", False)):
        found = sorted((a for a, is_ready in addresses if is_ready is ready), key=_by_address)
        if found:
            subset[word] = found
    if ports:
        subset["ports"] = ports
    return subset


def _by_address(address: Obj) -> tuple[int, str]:
    return int(ipaddress.ip_address(address["ip"])), address["targetRef"]["uid"]


def _truncate(subsets: list[Obj]) -> tuple[list[Obj], bool]:
    """Keep 1,000 addresses, those that are ready first; True if that left some out."""
    total = sum(len(s.get(w, ())) for s in subsets for w in ("addresses", "notReadyAddresses"))
    if total <= MAX_ADDRESSES:
        return subsets, False
    room = MAX_ADDRESSES
    for word in ("addresses", "notReadyAddresses"):
        for subset in subsets:
            found = subset.get(word, [])[:room]
            room -= len(found)
            if found:
                subset[word] = found
            else:
                subset.pop(word, None)
    return [s for s in subsets if s.get("addresses") or s.get("notReadyAddresses")], True
