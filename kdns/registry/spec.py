"""Where a registry comes from, as plain values: what a directive says, what a source obeys.

No I/O here, so that plugins/ can build them; source/ carries them out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, TypeAlias

from kdns.registry.objects import (
    ENDPOINT_SLICE,
    NAMESPACE,
    NODE,
    POD,
    SERVICE,
    SERVICE_CIDR,
    SERVICE_IMPORT,
    Kind,
)


@dataclass(frozen=True, slots=True)
class KubeSpec:
    """A Kubernetes API server.

    endpoint       -- URL; empty: as `kubeconfig` says, or the cluster this process runs in
    tls            -- (certificate file, key file, CA file) for `endpoint`; empty ones unused
    kubeconfig     -- file; context: which of its contexts, empty: the current one
    label_selector -- for Services, EndpointSlices and Pods (reference 1.12 `labels`)
    node           -- watch the Node of this name, and no other; empty: none
    only_forwarded -- leave out what kube-proxy does: headless Services and those of another
                      proxy, with their slices, and Namespaces
    want_service_cidrs -- as whoever forwards does anyway
    """

    kind: ClassVar[str] = "kubernetes"  # the `source` label of metrics
    endpoint: str = ""
    tls: tuple[str, str, str] | None = None
    kubeconfig: str = ""
    context: str = ""
    label_selector: str = ""
    want_endpoints: bool = True
    want_pods: bool = False
    want_imports: bool = False
    node: str = ""
    only_forwarded: bool = False
    want_service_cidrs: bool = False

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What is watched (reference 1.11: synced once each was listed)."""
        kinds: tuple[Kind, ...] = (SERVICE,) if self.only_forwarded else (SERVICE, NAMESPACE)
        if self.want_endpoints or self.want_imports:
            kinds += (ENDPOINT_SLICE,)
        if self.want_pods:
            kinds += (POD,)
        if self.node:
            kinds += (NODE,)
        if self.only_forwarded or self.want_service_cidrs:
            kinds += (SERVICE_CIDR,)
        return (*kinds, SERVICE_IMPORT) if self.want_imports else kinds


@dataclass(frozen=True, slots=True)
class ManifestSpec:
    """Files and folders of manifests, in place of a cluster.

    service_cidr, pod_cidr -- where addresses come from that no manifest gives. Their family
                              is the one Services have that ask for none; the `_v6` ones
                              serve those that ask for IPv6 too
    interval               -- seconds between two looks at the files
    label_selector         -- as in KubeSpec
    """

    kind: ClassVar[str] = "manifests"
    paths: tuple[str, ...]
    service_cidr: str = "10.96.0.0/12"
    pod_cidr: str = "10.244.0.0/16"
    service_cidr_v6: str = "fd00:10:96::/112"
    pod_cidr_v6: str = "fd00:10:244::/56"
    interval: float = 1.0
    label_selector: str = ""

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return (SERVICE, NAMESPACE, ENDPOINT_SLICE, POD, SERVICE_IMPORT, NODE)


Spec: TypeAlias = KubeSpec | ManifestSpec


def joined(dns: Spec, forwarding: Spec) -> Spec | str:
    """Return the spec that serves DNS and forwarding alike, so that one registry is enough for
    both; or why there is none."""
    if dns == forwarding:
        return dns
    if isinstance(dns, ManifestSpec) or isinstance(forwarding, ManifestSpec):
        return "it reads manifests that forwarding does not"
    if dns.label_selector:
        return "'labels' leaves out Services that are to be forwarded"
    if not dns.want_endpoints:
        return "'noendpoints' leaves out what Services are forwarded to"
    mine, other = (
        (one.endpoint, one.tls, one.kubeconfig, one.context) for one in (dns, forwarding)
    )
    if mine != other:
        return "it names another API server than forwarding has"
    return replace(dns, node=forwarding.node, want_service_cidrs=True)
