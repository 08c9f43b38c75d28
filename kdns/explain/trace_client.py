"""Who asks: a Pod, a Node, an address, or some Pod that could be.

Decides where a request begins and on which node, from what `--from` says.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from typing import Final, Literal

from kdns.errors import ConfigError, Problem
from kdns.explain.evidence import Evidence
from kdns.explain.trace_rules import (
    Client,
    node_addresses,
)
from kdns.explain.trace_state import (
    nearest,
    pod_addresses,
)
from kdns.proxy.options import Family
from kdns.registry.endpoints import canonical_address
from kdns.registry.objects import Pod, SliceEndpoint, key_of

EXAMPLE_POD: Final = "10.244.255.254"
EXAMPLE_POD_6: Final = "fd00:10:244::fffe"


def client_of(evidence: Evidence, source: str) -> Client:
    """Return who asks. Raises ConfigError."""
    if not source:
        addresses = (_example(evidence, 4), _example(evidence, 6))
        return Client("pod", "", "default", addresses, evidence.node, assumed=True)
    address = canonical_address(source)
    if address is not None:
        return _client_at(evidence, address[1])
    namespace, slash, name = source.partition("/")
    pods = evidence.snapshot.pods
    pod = pods.get(namespace, {}).get(name)
    if slash and pod is not None:
        return _client_pod(evidence, pod)
    if slash and not name and namespace in evidence.snapshot.namespaces:
        addresses = (_example(evidence, 4), _example(evidence, 6))
        return Client("pod", "", namespace, addresses, evidence.node, assumed=True)
    if not slash and source in evidence.snapshot.nodes:
        return Client("node", source, "default", node_addresses(evidence, source), source)
    if slash and not pods and namespace in evidence.snapshot.namespaces:
        return _client_unknown(evidence, namespace, name)
    known = [f"{ns}/{one}" for ns, named in sorted(pods.items()) for one in named]
    hint = nearest(source, known) or ("; no Pod is known" if not known else "")
    if slash and namespace in evidence.snapshot.namespaces:
        hint += f" (--from {namespace}/ is some Pod of {namespace})"
    text = f"there is no Pod {source!r}{hint}" if slash else (
        f"{source!r} is neither NAMESPACE/POD nor a Node nor an IP address{hint}"
    )  # fmt: skip
    raise ConfigError([Problem("--from", 0, text)])


def _client_at(evidence: Evidence, address: str) -> Client:
    """Return who has an address: a Node before a Pod that shares it."""
    for name in evidence.snapshot.nodes:
        if address in node_addresses(evidence, name):
            return Client("node", name, "default", (address,), name)
    for pods in evidence.snapshot.pods.values():
        for pod in pods.values():
            if address in pod_addresses(pod):
                return _client_pod(evidence, pod)
    for name, endpoint in _pods_in_slices(evidence):
        if address in endpoint.addresses:
            return Client("pod", name, name.partition("/")[0], (address,), endpoint.node_name or "")
    if _is_pod_address(evidence, address):
        return Client("pod", "", "default", (address,), _node_by_cidr(evidence, address))
    return Client("outside", "", "default", (address,))


def _client_unknown(evidence: Evidence, namespace: str, name: str) -> Client:
    """Return a Pod of a registry that has no Pods (that of a proxy, or of `kdns node`): as far as
    EndpointSlices tell of it, else one that could be."""
    wanted = f"{namespace}/{name}"
    found = [one for pod, one in _pods_in_slices(evidence) if pod == wanted]
    addresses = tuple(dict.fromkeys(a for one in found for a in one.addresses))
    if addresses:
        return Client("pod", wanted, namespace, addresses, found[0].node_name or "")
    addresses = (_example(evidence, 4), _example(evidence, 6))
    return Client("pod", wanted, namespace, addresses, evidence.node, assumed=True)


def _pods_in_slices(evidence: Evidence) -> Iterator[tuple[str, SliceEndpoint]]:
    """Yield Pods as EndpointSlices name them, "namespace/name", each with its endpoint."""
    for owners in evidence.snapshot.slices.values():
        for slices in owners.values():
            for one in slices:
                for endpoint in one.endpoints or ():
                    target = endpoint.target_ref
                    if target is not None and target.kind == "Pod":
                        yield (
                            f"{target.namespace or one.metadata.namespace}/{target.name}",
                            endpoint,
                        )


def _is_pod_address(evidence: Evidence, address: str) -> bool:
    ranges = [*evidence.config.cluster_cidrs]
    for node in evidence.snapshot.nodes.values():
        ranges += node.spec.pod_cidrs or ()
    return any(_is_in(address, text) for text in ranges)


def _node_by_cidr(evidence: Evidence, address: str) -> str:
    """Return the Node that an address of Pods is of; "" where none says so."""
    for name, node in evidence.snapshot.nodes.items():
        if any(_is_in(address, text) for text in node.spec.pod_cidrs or ()):
            return name
    return ""


def _is_in(address: str, cidr: str) -> bool:
    try:
        return ipaddress.ip_address(address) in ipaddress.ip_network(cidr, strict=False)
    except ValueError:
        return False  # a Node's, which nobody checked


def _client_pod(evidence: Evidence, pod: Pod) -> Client:
    key = key_of(pod)
    spec = evidence.pod_spec(key) or {}
    node = str(spec.get("nodeName") or "") or _node_in_slices(evidence, pod)
    node = node or (evidence.node if len(evidence.snapshot.nodes) < 2 else "")
    addresses = pod_addresses(pod)
    on_host = spec.get("hostNetwork") is True
    kind: Literal["pod", "node"] = "node" if on_host and node else "pod"
    if on_host and node:
        addresses = node_addresses(evidence, node) or addresses
    return Client(kind, "/".join(key), key[0], addresses, node)


def _node_in_slices(evidence: Evidence, pod: Pod) -> str:
    """Return the node of a Pod as an EndpointSlice tells it."""
    namespace, name = key_of(pod)
    for slices in evidence.snapshot.slices.get(namespace, {}).values():
        for one in slices:
            for endpoint in one.endpoints or ():
                target = endpoint.target_ref
                if target is not None and target.name == name and endpoint.node_name:
                    return endpoint.node_name
    return ""


def _example(evidence: Evidence, family: Family) -> str:
    """Return an address that a Pod could have."""
    for text in evidence.config.cluster_cidrs:
        network = ipaddress.ip_network(text, strict=False)
        if network.version == family and network.num_addresses > 4:
            return str(network[-2] if family == 4 else network[0xFFFE])
    return EXAMPLE_POD if family == 4 else EXAMPLE_POD_6
