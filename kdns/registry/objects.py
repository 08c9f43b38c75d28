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


class Service(_Part, frozen=True):
    metadata: Meta
    spec: ServiceSpec = ServiceSpec()


class Conditions(_Part, frozen=True):
    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class TargetRef(_Part, frozen=True):
    kind: str = ""
    name: str = ""
    namespace: str = ""


class SliceEndpoint(_Part, frozen=True):
    addresses: list[str] = []
    conditions: Conditions = Conditions()
    hostname: str | None = None
    node_name: str | None = None
    target_ref: TargetRef | None = None
    topology_zone: str | None = msgspec.field(default=None, name="zone")


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


class ServiceImportSpec(_Part, frozen=True):
    type: str = "ClusterSetIP"
    ips: list[str] | None = None
    ports: list[ServicePort] | None = None


class ServiceImport(_Part, frozen=True):
    """A Service that other clusters of the set export (KEP-1645)."""

    metadata: Meta
    spec: ServiceImportSpec = ServiceImportSpec()


SERVICE_NAME_LABEL = "kubernetes.io/service-name"  # KEP-752: slice -> service
# KEP-1645: slice -> ServiceImport, and the cluster its endpoints are in.
IMPORT_NAME_LABEL = "multicluster.kubernetes.io/service-name"
SOURCE_CLUSTER_LABEL = "multicluster.kubernetes.io/source-cluster"

# Kinds the registry holds, by Kubernetes' own words.
Kind: TypeAlias = Literal["Service", "EndpointSlice", "Namespace", "Pod", "ServiceImport"]
Object: TypeAlias = Service | EndpointSlice | Namespace | Pod | ServiceImport
Key: TypeAlias = tuple[str, str]  # namespace ("" for a Namespace), name

SERVICE: Final = "Service"
ENDPOINT_SLICE: Final = "EndpointSlice"
NAMESPACE: Final = "Namespace"
POD: Final = "Pod"
SERVICE_IMPORT: Final = "ServiceImport"


def key_of(obj: Object) -> Key:
    return obj.metadata.namespace, obj.metadata.name
