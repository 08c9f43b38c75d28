"""The registry held against itself: what its objects promise and do not keep.

Pure: a snapshot and what follows from it in, findings out. Which endpoints count is
registry/endpoints.py's word, who gets a destination that two claim proxy/table.py's.
"""

from __future__ import annotations

import ipaddress
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import cached_property
from itertools import pairwise
from typing import Final, TypeAlias

from kdns.explain.check_finding import Finding, count, few, finding
from kdns.proxy.options import Family
from kdns.proxy.table import ForwardingTable, conflicts
from kdns.registry.endpoints import canonical_address
from kdns.registry.objects import (
    PROXY_NAME_LABEL,
    EndpointSlice,
    Key,
    Node,
    Pod,
    Service,
    SliceEndpoint,
)
from kdns.registry.snapshot import Snapshot
from kdns.zone.records import external_target

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

# A Pod that has ended may have left its address to another.
ENDED: Final = ("Succeeded", "Failed")
# A label this like a wanted one is taken for a slip of the pen.
ALIKE: Final = 0.6
# Of a namespace with more different labels than this, nobody's are compared letter by letter:
# for each Service that takes 10 us a label.
MOST_LABELS: Final = 500
FAMILY_OF: Final[Mapping[str, Family]] = {"IPv4": 4, "IPv6": 6}


@dataclass
class Registry:
    """What is looked at.

    tables        -- the forwarding of `node`, by family
    cluster_cidrs -- where Pods have their addresses, as the proxy was told
    service_cidrs -- where Services have theirs, where that is known
    pods_known    -- Pods were asked for: that one is not there means something
    """

    snapshot: Snapshot
    tables: Mapping[Family, ForwardingTable] = field(default_factory=dict)
    node: str = ""
    cluster_cidrs: Sequence[str] = ()
    service_cidrs: Sequence[str] = ()
    pods_known: bool = True

    @cached_property
    def services(self) -> list[tuple[Key, Service]]:
        return [
            ((namespace, name), service)
            for namespace, names in sorted(self.snapshot.services.items())
            for name, service in sorted(names.items())
        ]

    @cached_property
    def pods(self) -> list[tuple[Key, Pod]]:
        """Return the Pods that have not ended."""
        return [
            ((namespace, name), pod)
            for namespace, names in sorted(self.snapshot.pods.items())
            for name, pod in sorted(names.items())
            if pod.status.phase not in ENDED
        ]

    @cached_property
    def labels(self) -> dict[str, dict[frozenset[tuple[str, str]], str]]:
        """Return the labels that Pods of a namespace have, each set once with one of its Pods:
        a thousand replicas are looked at as one."""
        found: defaultdict[str, dict[frozenset[tuple[str, str]], str]] = defaultdict(dict)
        for (namespace, name), pod in self.pods:
            labels = pod.metadata.labels or {}
            found[namespace].setdefault(frozenset(labels.items()), name)
        return dict(found)

    @cached_property
    def cluster_ips(self) -> dict[str, list[Key]]:
        """Return who has which ClusterIP."""
        found: defaultdict[str, list[Key]] = defaultdict(list)
        for key, service in self.services:
            for address in _cluster_ips(service):
                found[address].append(key)
        return dict(found)

    @cached_property
    def node_addresses(self) -> dict[str, str]:
        return {
            address: name
            for name, node in self.snapshot.nodes.items()
            for address in _addresses_of(node)
        }

    @cached_property
    def pod_addresses(self) -> dict[str, list[Key]]:
        """Return who has which address; Pods of a Node's own network are left out."""
        found: defaultdict[str, list[Key]] = defaultdict(list)
        for key, pod in self.pods:
            for address in _pod_ips(pod):
                if address not in self.node_addresses:
                    found[address].append(key)
        return dict(found)

    @cached_property
    def pod_networks(self) -> list[tuple[Network, str]]:
        """Return where Pods have their addresses, and who says so."""
        found = [(net, "--cluster-cidr") for net in _networks(self.cluster_cidrs)]
        for name, node in sorted(self.snapshot.nodes.items()):
            found += [(net, f"podCIDR of Node {name}") for net in _networks(_pod_cidrs(node))]
        return found

    def slices(self, key: Key) -> tuple[EndpointSlice, ...]:
        return self.snapshot.slices.get(key[0], {}).get(key[1], ())


def check_registry(registry: Registry) -> Iterator[Finding]:
    """Yield what is wrong within the registry."""
    if not registry.snapshot.synced:
        yield finding(
            "registry-not-synced", "registry", "the registry has not been listed whole",
            "its source does not answer, or one kind of objects cannot be read",
            "see that the API server answers and that the ServiceAccount may list Services,"
            " EndpointSlices and Namespaces; what follows may be wrong until then",
        )  # fmt: skip
    for key, service in registry.services:
        yield from _check_service(registry, key, service)
    yield from _check_slices(registry)
    yield from _check_addresses(registry)
    yield from _check_claims(registry)
    yield from _check_networks(registry)
    yield from _check_node(registry)


# --- one Service ----------------------------------------------------------------------------


def _check_service(registry: Registry, key: Key, service: Service) -> Iterator[Finding]:
    subject = f"Service {_name(key)}"
    # A proxy's registry has no Namespaces: it forwards without.
    if registry.snapshot.namespaces and key[0] not in registry.snapshot.namespaces:
        yield finding(
            "namespace-missing", subject, f"there is no Namespace {key[0]}",
            "DNS answers NXDOMAIN for every name in a namespace that is not there",
            f"create it (kubectl create namespace {key[0]}), or delete what is left of it",
        )  # fmt: skip
    if service.spec.type == "ExternalName":
        yield from _check_external_name(subject, service)
        return
    other = (service.metadata.labels or {}).get(PROXY_NAME_LABEL)
    if other is not None:
        yield finding(
            "left-to-another-proxy", subject, f"is left to the proxy {other!r}",
            f"it carries the label {PROXY_NAME_LABEL}",
            "nothing, if that proxy runs here; else take the label away",
        )  # fmt: skip
    if service.spec.type == "LoadBalancer" and not service.status.load_balancer.ingress:
        yield finding(
            "load-balancer-pending", subject, "has no load balancer's address yet",
            "nobody has written status.loadBalancer",
            "see that a cloud controller or a load balancer's controller runs",
        )  # fmt: skip
    slices = registry.slices(key)
    endpoints = [endpoint for one in slices for endpoint in one.endpoints or ()]
    if not endpoints:
        yield from _check_nothing_behind(registry, key, service, subject)
        return
    ready = [one for one in endpoints if one.conditions.ready is not False]
    if not ready:
        yield _none_ready(key, subject, endpoints)
        return
    if service.spec.cluster_ip != "None":
        yield from _check_ports(subject, service, slices)
        yield from _check_families(subject, service, slices)


def _check_external_name(subject: str, service: Service) -> Iterator[Finding]:
    target = service.spec.external_name
    if canonical_address(target.rstrip(".")) is not None:
        yield finding(
            "external-name-wrong", subject, f"externalName {target} is an address",
            "DNS can only make a CNAME of it, and no resolver looks up a name like that",
            f"make it a Service without selector, with an EndpointSlice that has {target}",
        )  # fmt: skip
    elif external_target(target) is None:
        yield finding(
            "external-name-wrong", subject, f"externalName {target!r} is no domain name",
            "DNS cannot write it into an answer",
            "write labels of at most 63 characters with dots between, 253 in all",
        )  # fmt: skip


def _check_nothing_behind(
    registry: Registry, key: Key, service: Service, subject: str
) -> Iterator[Finding]:
    selector = service.spec.selector or {}
    where = f"kubectl -n {key[0]}"
    if not selector:
        yield finding(
            "service-without-selector", subject, "has no selector and no endpoints",
            "without a selector no controller makes EndpointSlices for it",
            f"give it a selector, or an EndpointSlice labelled kubernetes.io/service-name={key[1]}",
        )  # fmt: skip
        return
    words = ",".join(f"{label}={value}" for label, value in sorted(selector.items()))
    if registry.pods_known and not _is_met(selector, registry.labels.get(key[0], ())):
        yield finding(
            "selector-matches-nothing", subject, f"selector {words} fits no Pod in {key[0]}",
            _why_no_pod(registry, key, selector),
            f"compare with `{where} get pods --show-labels`; correct the selector or the labels",
        )  # fmt: skip
        return
    yield finding(
        "service-without-endpoints", subject, f"has no endpoint (selector {words})",
        "no Pod of the selector has an address, or the EndpointSlice controller does not run",
        f"see `{where} get pods -l {words}` and the events of those Pods",
    )  # fmt: skip


def _why_no_pod(registry: Registry, key: Key, selector: Mapping[str, str]) -> str:
    """Return the likeliest slip: another namespace, or a label spelt otherwise."""
    elsewhere = sorted(ns for ns, those in registry.labels.items() if _is_met(selector, those))
    if elsewhere:
        return f"such Pods are in {few(elsewhere)}: a selector sees its own namespace only"
    here = [(name, dict(labels)) for labels, name in registry.labels.get(key[0], {}).items()]
    if len(here) > MOST_LABELS:
        return "none of its Pods was made yet, it is scaled to 0, or a label is misspelt"
    best: tuple[float, str] = (ALIKE, "")
    for name, labels in here:
        for label, value in selector.items():
            for have, held in labels.items():
                alike = _likeness(label, have) if held == value else (
                    _likeness(value, held) if have == label else 0.0
                )  # fmt: skip
                if alike < 1:
                    told = f"Pod {name} has {have}={held}, not {label}={value}"
                    best = max(best, (alike, told))
    if best[1]:
        return best[1]
    for name, labels in here:
        lacking = [f"{k}={v}" for k, v in sorted(selector.items()) if labels.get(k) != v]
        if len(lacking) < len(selector):
            return f"Pod {name} fits but for {few(lacking)}"
    return "no Pod has these labels: none was made yet, or it is scaled to 0"


def _likeness(one: str, other: str) -> float:
    return SequenceMatcher(None, one, other).ratio()


def _is_met(selector: Mapping[str, str], those: Iterable[frozenset[tuple[str, str]]]) -> bool:
    """Say whether a selector fits one of these sets of labels."""
    wanted = selector.items()
    return any(wanted <= labels for labels in those)


def _none_ready(key: Key, subject: str, endpoints: Sequence[SliceEndpoint]) -> Finding:
    ending = [one for one in endpoints if one.conditions.terminating]
    usable = [one for one in ending if one.conditions.serving is not False]
    names = few(_endpoint_name(one) for one in endpoints)
    if usable:
        return finding(
            "service-only-terminating", subject,
            f"0 of {count(len(endpoints), 'endpoint')} ready, {len(usable)} about to go: {names}",
            "the Pods are being deleted before others are ready",
            "see that new Pods become ready: `kubectl rollout status`, and maxUnavailable",
        )  # fmt: skip
    return finding(
        "service-none-ready", subject, f"0 of {count(len(endpoints), 'endpoint')} ready: {names}",
        "the Pods' readiness probes fail, or they have only just started",
        f"see `kubectl -n {key[0]} describe pod` of one of them: its conditions and events",
    )  # fmt: skip


def _check_ports(
    subject: str, service: Service, slices: Sequence[EndpointSlice]
) -> Iterator[Finding]:
    there = {
        (port.name, port.protocol or "TCP")
        for one in slices
        for port in one.ports or ()
        if port.port
    }
    for port in service.spec.ports or ():
        if (port.name, port.protocol or "TCP") in there:
            continue
        target = port.target_port if port.target_port is not None else port.port
        named = isinstance(target, str) and not target.isdecimal()
        yield finding(
            "port-without-endpoints", f"{subject}, port {port.name or port.port}",
            f"no endpoint has port {port.name or port.port}/{port.protocol}: connections are"
            " refused",
            f"no container of its Pods has a port named {target!r}" if named
            else "its EndpointSlices carry other port names: "
                 f"{few(sorted(name or '(none)' for name, _ in there)) or 'none at all'}",
            f"name a port of the container {target!r}, or write its number as targetPort" if named
            else "let the ports of the EndpointSlices have the names of the Service's",
        )  # fmt: skip


def _check_families(
    subject: str, service: Service, slices: Sequence[EndpointSlice]
) -> Iterator[Finding]:
    behind = {FAMILY_OF.get(one.address_type) for one in slices if one.endpoints}
    for address in _cluster_ips(service):
        family = 6 if ":" in address else 4
        if family not in behind:
            yield finding(
                "family-without-endpoints", subject,
                f"has the IPv{family} address {address}, and no IPv{family} endpoint",
                f"its Pods have no IPv{family} address; clients that prefer it are refused",
                f"give Pods IPv{family} addresses, or take IPv{family} out of spec.ipFamilies",
            )  # fmt: skip


# --- EndpointSlices -------------------------------------------------------------------------


def _check_slices(registry: Registry) -> Iterator[Finding]:
    for namespace, owners in sorted(registry.snapshot.slices.items()):
        for owner, slices in sorted(owners.items()):
            service = registry.snapshot.services.get(namespace, {}).get(owner)
            if service is None:
                names = few(one.metadata.name for one in slices)
                yield finding(
                    "slice-without-service", f"Service {namespace}/{owner}",
                    f"is not there, but {count(len(slices), 'EndpointSlice')} of it: {names}",
                    "the Service was deleted and somebody keeps its slices, or their label"
                    " kubernetes.io/service-name is misspelt",
                    f"delete them (kubectl -n {namespace} delete endpointslice"
                    f" {slices[0].metadata.name}), or correct the label",
                )  # fmt: skip
                continue
            for one in slices:
                yield from _check_slice(registry, (namespace, owner), service, one)


def _check_slice(
    registry: Registry, key: Key, service: Service, one: EndpointSlice
) -> Iterator[Finding]:
    subject = f"EndpointSlice {key[0]}/{one.metadata.name}"
    known = {(port.name, port.protocol or "TCP") for port in service.spec.ports or ()}
    for port in one.ports or ():
        if known and (port.name, port.protocol or "TCP") not in known:
            name = port.name or port.port
            yield finding(
                "slice-port-unknown", f"{subject}, port {name}",
                f"Service {_name(key)} has no port {name}/{port.protocol or 'TCP'}",
                "a slice's ports are joined with the Service's by name and protocol: "
                + few(sorted(f"{n or '(no name)'}/{p}" for n, p in known)),
                "rename one of the two; a Service port without a name needs the name ''"
                " in the slice",
            )  # fmt: skip
    family = FAMILY_OF.get(one.address_type)
    for endpoint in one.endpoints or () if family else ():
        for address in endpoint.addresses:
            read = canonical_address(address)
            if read is None or read[0] != family:
                yield finding(
                    "endpoint-address-wrong", subject,
                    f"endpoint {address} is no {one.address_type} address",
                    "such an endpoint is passed over",
                    f"write an {one.address_type} address, or another addressType",
                )  # fmt: skip
        if registry.pods_known:
            yield from _check_pod_of(registry, key, subject, endpoint)


def _check_pod_of(
    registry: Registry, key: Key, subject: str, endpoint: SliceEndpoint
) -> Iterator[Finding]:
    ref = endpoint.target_ref
    if ref is None or ref.kind != "Pod" or not registry.snapshot.pods:
        return
    where = (ref.namespace or key[0], ref.name)
    pod = registry.snapshot.pods.get(where[0], {}).get(where[1])
    state = "ready" if endpoint.conditions.ready is not False else "not ready"
    addresses = few(endpoint.addresses)
    if pod is None or pod.status.phase in ENDED:
        yield finding(
            "endpoint-pod-gone", subject,
            f"endpoint {addresses} ({state}) is Pod {_name(where)}, which "
            + ("is not there" if pod is None else f"has ended ({pod.status.phase})"),
            "nobody keeps this EndpointSlice up to date: connections to it time out",
            "see that kube-controller-manager runs; a slice of your own is yours to change",
        )  # fmt: skip
    elif (ips := _pod_ips(pod)) and not {*_canonical(endpoint.addresses)} & {*ips}:
        yield finding(
            "endpoint-pod-differs", subject,
            f"endpoint {addresses} is Pod {_name(where)}, whose address is {few(ips)}",
            "the Pod was made anew, and its EndpointSlice not brought up to date",
            "see that kube-controller-manager runs; a slice of your own is yours to change",
        )  # fmt: skip


# --- addresses and claims -------------------------------------------------------------------


def _check_addresses(registry: Registry) -> Iterator[Finding]:
    for address, pods in sorted(registry.pod_addresses.items()):
        if len(pods) > 1:
            yield finding(
                "pod-address-shared", f"address {address}",
                f"is of {count(len(pods), 'Pod')}: {few(map(_name, pods))}",
                "two nodes give addresses out of one range, or a Pod that is gone was not"
                " forgotten; which of them answers is chance",
                "see the podCIDRs of the Nodes and the CNI's address management, and delete"
                " the younger Pod",
            )  # fmt: skip
    for address, keys in sorted(registry.cluster_ips.items()):
        if len(keys) > 1:
            yield finding(
                "cluster-ip-claimed-twice", f"ClusterIP {address}",
                f"is of {few(map(_name, keys))}",
                "the manifests name it for both, or the API server's allocator was restored"
                " from an old backup",
                "delete one of the Services and create it without spec.clusterIP",
            )  # fmt: skip
    for key, service in registry.services:
        for address in _canonical(service.spec.external_ips or ()):
            owners = registry.cluster_ips.get(address, registry.pod_addresses.get(address))
            what = "ClusterIP" if address in registry.cluster_ips else "Pod address"
            if owners and owners != [key]:
                yield finding(
                    "external-ip-shadows", f"Service {_name(key)}",
                    f"its external IP {address} is the {what} of {few(map(_name, owners))}",
                    "whoever may write spec.externalIPs can take the traffic to any address"
                    " (CVE-2020-8554)",
                    "take it out of spec.externalIPs; forbid such values with an admission policy",
                )  # fmt: skip


def _check_claims(registry: Registry) -> Iterator[Finding]:
    told: set[str] = set()
    for table in registry.tables.values():
        for text in conflicts(table):
            place, _, rest = text.partition(" is claimed by ")
            host = place.rpartition("/")[0].rpartition(":")[0].strip("[]")
            if place in told or host in registry.cluster_ips:  # of ClusterIPs it was told
                continue
            told.add(place)
            if place.startswith("NodePort "):
                yield finding(
                    "node-port-claimed-twice", place, f"is claimed by {rest}",
                    "the manifests give one nodePort to both",
                    "take nodePort out of one of them, so that another is given",
                )  # fmt: skip
            else:
                yield finding(
                    "external-ip-claimed-twice", place, f"is claimed by {rest}",
                    "two Services have one external or load balancer address and port",
                    "give one of them another address or another port",
                )  # fmt: skip


# --- networks and nodes ---------------------------------------------------------------------


def _check_networks(registry: Registry) -> Iterator[Finding]:
    services = [ipaddress.ip_network(ip) for ip in registry.cluster_ips]
    given = _networks(registry.service_cidrs)
    for network, whose in registry.pod_networks:
        within = [str(one.network_address) for one in services if _overlap(one, network)]
        overlapping = [str(one) for one in given if _overlap(one, network)]
        if within or overlapping:
            told = (
                f"Services have addresses in it: {few(within)}" if within
                else f"overlaps the Services' {few(overlapping)}"
            )  # fmt: skip
            yield finding(
                "service-in-pod-cidr", f"Pod range {network} ({whose})", told,
                "a packet to such an address is taken for one to a Pod, or for one to a Service:"
                " masquerading and routes go wrong",
                "let --service-cluster-ip-range and --cluster-cidr not overlap; Services must"
                " then be made anew",
            )  # fmt: skip
    for address, pods in sorted(registry.pod_addresses.items()):
        inside = [one for one in given if ipaddress.ip_address(address) in one]
        if address in registry.cluster_ips or inside:
            what = f"ClusterIP of {few(map(_name, registry.cluster_ips.get(address, [])))}"
            yield finding(
                "pod-in-service-cidr", f"Pod {_name(pods[0])}",
                f"its address {address} is "
                + (what if address in registry.cluster_ips else f"in the Services' {inside[0]}"),
                "packets to this Pod are taken for packets to a Service",
                "let the CNI's range and --service-cluster-ip-range not overlap",
            )  # fmt: skip
    yield from _check_node_networks(registry, given)


def _check_node_networks(registry: Registry, given: Sequence[Network]) -> Iterator[Finding]:
    ranges = [*registry.pod_networks, *((one, "Services") for one in given)]
    for address, name in sorted(registry.node_addresses.items()):
        ip = ipaddress.ip_address(address)
        whose = next((f"{net} ({who})" for net, who in ranges if ip in net), "")
        owner = registry.cluster_ips.get(address)
        if whose or owner:
            yield finding(
                "node-in-cidr", f"Node {name}",
                f"its address {address} is "
                + (f"the ClusterIP of {_name(owner[0])}" if owner else f"in {whose}"),
                "what comes from this node is taken for a Pod's, and is not masqueraded",
                "choose ranges for Pods and Services that no host network uses",
            )  # fmt: skip
    by_start = sorted(
        (
            (net.version, int(net.network_address), int(net.broadcast_address), str(net), name)
            for name, node in registry.snapshot.nodes.items()
            for net in _networks(_pod_cidrs(node))
        )
    )
    for one, other in pairwise(by_start):
        if one[0] == other[0] and other[1] <= one[2]:
            yield finding(
                "pod-cidrs-overlap", f"Nodes {one[4]} and {other[4]}",
                f"podCIDR {one[3]} overlaps {other[3]}",
                "both give their Pods addresses out of one range: two Pods will have the same",
                "give one Node another podCIDR; it must be deleted and join anew",
            )  # fmt: skip


def _check_node(registry: Registry) -> Iterator[Finding]:
    nodes = registry.snapshot.nodes
    if not registry.node or not nodes:
        return
    if registry.node not in nodes:
        yield finding(
            "node-unknown", f"node {registry.node}",
            f"is not among the Nodes: {few(sorted(nodes))}",
            "the host's name is not the Node's: no endpoint counts as local, and it has no zone",
            "say --node NAME; for the proxy --hostname-override",
        )  # fmt: skip
        return
    told: set[str] = set()
    for table in registry.tables.values():
        for one in table:
            if one.internal_local and one.internal == "drop" and one.name not in told:
                told.add(one.name)
                yield finding(
                    "no-local-endpoints", f"Service {one.name}",
                    f"internalTrafficPolicy is Local and no endpoint is on {registry.node}:"
                    " packets are dropped",
                    "its Pods do not run on every node that has clients",
                    "run it as a DaemonSet, or set internalTrafficPolicy to Cluster",
                )  # fmt: skip


# --- reading --------------------------------------------------------------------------------


def _name(key: Key) -> str:
    return "/".join(key)


def _endpoint_name(endpoint: SliceEndpoint) -> str:
    where = few(endpoint.addresses)
    ref = endpoint.target_ref
    return f"{where} (Pod {ref.name})" if ref is not None and ref.kind == "Pod" else where


def _canonical(texts: Iterable[str]) -> list[str]:
    return [read[1] for text in texts if (read := canonical_address(text)) is not None]


def _cluster_ips(service: Service) -> list[str]:
    spec = service.spec
    if spec.type == "ExternalName":
        return []
    return _canonical(dict.fromkeys([*(spec.cluster_ips or ()), spec.cluster_ip]))


def _pod_ips(pod: Pod) -> list[str]:
    status = pod.status
    return _canonical(dict.fromkeys([*(one.ip for one in status.pod_ips or ()), status.pod_ip]))


def _addresses_of(node: Node) -> list[str]:
    of_node = node.status.addresses or ()
    return _canonical(one.address for one in of_node if one.type in ("InternalIP", "ExternalIP"))


def _pod_cidrs(node: Node) -> Sequence[str]:
    return node.spec.pod_cidrs or ()


def _networks(texts: Iterable[str]) -> list[Network]:
    found = []
    for text in texts:
        try:
            found.append(ipaddress.ip_network(text, strict=False))
        except ValueError:
            continue  # who reads it says so
    return found


def _overlap(one: Network, other: Network) -> bool:
    # Of two families they never do, and ipaddress would raise.
    return one.version == other.version and one.overlaps(other)
