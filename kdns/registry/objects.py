"""Kubernetes objects, with only the fields that kdns reads (docs/DESIGN.md 1.3 point 4).

Unknown fields are skipped while decoding, so an object costs what it is read for.
Names are Kubernetes' own in camelCase on the wire, snake_case here.
"""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

import msgspec


class _Part(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True, gc=False):
    """Settings of all structs below. They hold no cycles, so the garbage collector need not
    walk them: at 10,000 Services it would, with every full collection.
    """


class Meta(_Part, frozen=True):
    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None
    deletion_timestamp: str | None = None


class ServicePort(_Part, frozen=True):
    port: int = 0
    name: str = ""
    protocol: str = "TCP"
    target_port: int | str | None = None
    node_port: int = 0
    app_protocol: str = ""


class ClientIPConfig(_Part, frozen=True):
    timeout_seconds: int | None = None


class SessionAffinityConfig(_Part, frozen=True):
    client_ip: ClientIPConfig | None = msgspec.field(default=None, name="clientIP")


class ServiceSpec(_Part, frozen=True):
    type: str = "ClusterIP"
    cluster_ip: str = msgspec.field(default="", name="clusterIP")
    cluster_ips: list[str] | None = msgspec.field(default=None, name="clusterIPs")
    external_name: str = ""
    ports: list[ServicePort] | None = None
    selector: dict[str, str] | None = None
    ip_families: list[str] | None = None
    publish_not_ready_addresses: bool = False
    external_ips: list[str] | None = msgspec.field(default=None, name="externalIPs")
    session_affinity: str = "None"  # or ClientIP
    session_affinity_config: SessionAffinityConfig | None = None
    internal_traffic_policy: str = "Cluster"  # or Local
    external_traffic_policy: str = "Cluster"
    health_check_node_port: int = 0
    load_balancer_source_ranges: list[str] | None = None


class Ingress(_Part, frozen=True):
    """A load balancer's entry. ip_mode -- VIP (also where nothing is said) or Proxy: the
    load balancer sends to the node itself, so the node must not take its address."""

    ip: str = ""
    hostname: str = ""
    ip_mode: str = "VIP"


class LoadBalancerStatus(_Part, frozen=True):
    ingress: list[Ingress] | None = None


class ServiceStatus(_Part, frozen=True):
    load_balancer: LoadBalancerStatus = LoadBalancerStatus()


class Service(_Part, frozen=True):
    metadata: Meta
    spec: ServiceSpec = ServiceSpec()
    status: ServiceStatus = ServiceStatus()


class Conditions(_Part, frozen=True):
    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class TargetRef(_Part, frozen=True):
    kind: str = ""
    name: str = ""
    namespace: str = ""


class Hint(_Part, frozen=True):
    """The name of a zone or of a node."""

    name: str = ""


class Hints(_Part, frozen=True):
    """Whose clients an endpoint is meant for (KEP-2433, KEP-3015)."""

    for_zones: list[Hint] | None = None
    for_nodes: list[Hint] | None = None


class SliceEndpoint(_Part, frozen=True):
    addresses: list[str] = []
    conditions: Conditions = Conditions()
    hostname: str | None = None
    node_name: str | None = None
    target_ref: TargetRef | None = None
    topology_zone: str | None = msgspec.field(default=None, name="zone")
    hints: Hints | None = None


class SlicePort(_Part, frozen=True):
    name: str | None = None
    port: int | None = None
    protocol: str | None = None


class EndpointSlice(_Part, frozen=True):
    metadata: Meta
    address_type: str = "IPv4"
    endpoints: list[SliceEndpoint] | None = None
    ports: list[SlicePort] | None = None


class Namespace(_Part, frozen=True):
    metadata: Meta


class PodIP(_Part, frozen=True):
    ip: str = ""


class PodStatus(_Part, frozen=True):
    phase: str = ""
    pod_ip: str = msgspec.field(default="", name="podIP")
    pod_ips: list[PodIP] | None = msgspec.field(default=None, name="podIPs")


class Pod(_Part, frozen=True):
    metadata: Meta
    status: PodStatus = PodStatus()


class Taint(_Part, frozen=True):
    key: str = ""


class NodeSpec(_Part, frozen=True):
    pod_cidrs: list[str] | None = msgspec.field(default=None, name="podCIDRs")
    taints: list[Taint] | None = None


class NodeAddress(_Part, frozen=True):
    type: str = ""  # InternalIP, ExternalIP, Hostname, ...
    address: str = ""


class NodeStatus(_Part, frozen=True):
    addresses: list[NodeAddress] | None = None


class Node(_Part, frozen=True):
    metadata: Meta
    spec: NodeSpec = NodeSpec()
    status: NodeStatus = NodeStatus()


class ServiceImportSpec(_Part, frozen=True):
    type: str = "ClusterSetIP"
    ips: list[str] | None = None
    ports: list[ServicePort] | None = None


class ServiceImport(_Part, frozen=True):
    """A Service that other clusters of the set export (KEP-1645)."""

    metadata: Meta
    spec: ServiceImportSpec = ServiceImportSpec()


class ServiceCIDRSpec(_Part, frozen=True):
    cidrs: list[str] | None = None


class ServiceCIDR(_Part, frozen=True):
    """Where ClusterIPs are taken from (KEP-1880)."""

    metadata: Meta
    spec: ServiceCIDRSpec = ServiceCIDRSpec()


SERVICE_NAME_LABEL = "kubernetes.io/service-name"  # KEP-752: slice -> service
# KEP-1645: slice -> ServiceImport, and the cluster its endpoints are in.
IMPORT_NAME_LABEL = "multicluster.kubernetes.io/service-name"
SOURCE_CLUSTER_LABEL = "multicluster.kubernetes.io/source-cluster"
# Service or slice -> who forwards in kube-proxy's place; whatever the value, we do not.
PROXY_NAME_LABEL = "service.kubernetes.io/service-proxy-name"
HEADLESS_LABEL = "service.kubernetes.io/headless"  # slice of a Service without ClusterIP
ZONE_LABEL = "topology.kubernetes.io/zone"  # of a Node

# Kinds the registry holds, by Kubernetes' own words.
Kind: TypeAlias = Literal[
    "Service", "EndpointSlice", "Namespace", "Pod", "ServiceImport", "Node", "ServiceCIDR"
]
Object: TypeAlias = Service | EndpointSlice | Namespace | Pod | ServiceImport | Node | ServiceCIDR
Key: TypeAlias = tuple[str, str]  # namespace ("" for what is in none), name

SERVICE: Final = "Service"
ENDPOINT_SLICE: Final = "EndpointSlice"
NAMESPACE: Final = "Namespace"
POD: Final = "Pod"
SERVICE_IMPORT: Final = "ServiceImport"
NODE: Final = "Node"
SERVICE_CIDR: Final = "ServiceCIDR"


def key_of(obj: Object) -> Key:
    return obj.metadata.namespace, obj.metadata.name
