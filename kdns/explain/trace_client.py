"""Who asks: a Pod, a Node, an address, or some Pod that could be.

Decides where a request begins and on which node, from what `--from` says.
"""

from __future__ import annotations

import ipaddress
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
from kdns.registry.objects import Pod, key_of

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
    known = [f"{ns}/{one}" for ns, named in sorted(pods.items()) for one in named]
    hint = nearest(source, known) or ("; no Pod is known" if not known else "")
    if slash and namespace in evidence.snapshot.namespaces:
        hint += f" (--from {namespace}/ is some Pod of {namespace})"
    text = f"there is no Pod {source!r}{hint}" if slash else (
        f"{source!r} is neither NAMESPACE/POD nor an IP address{hint}"
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
    return Client("outside", "", "default", (address,))


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
