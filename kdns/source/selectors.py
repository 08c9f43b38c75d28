"""Which objects of a kind a source asks for: the selectors of a spec.

Decides what an API server is not to send. What is done with what it sends is the registry's.
"""

from __future__ import annotations

from typing import Final

from kdns.registry.objects import (
    ENDPOINT_SLICE,
    HEADLESS_LABEL,
    IMPORT_NAME_LABEL,
    NAMESPACE,
    NODE,
    POD,
    PROXY_NAME_LABEL,
    SERVICE,
    SERVICE_CIDR,
    SERVICE_IMPORT,
    Kind,
)
from kdns.registry.spec import KubeSpec

# What forwarding passes over need not be sent to us (reference kube-proxy 1.1).
FORWARDED_LABELS: Final[dict[Kind, str]] = {
    SERVICE: f"!{PROXY_NAME_LABEL}",
    ENDPOINT_SLICE: f"!{PROXY_NAME_LABEL},!{HEADLESS_LABEL}",
}
NOT_HEADLESS: Final = "spec.clusterIP!=None"
# Pods that have ended have no name (reference 1.6).
LIVE_PODS: Final = "status.phase!=Succeeded,status.phase!=Failed,status.phase!=Unknown"


def selectors_of(spec: KubeSpec, kind: Kind) -> list[tuple[str, str]]:
    """Return the query parameters that choose the objects of a kind that `spec` wants."""
    selectors = []
    labels = []
    # CoreDNS: `labels` is not for ServiceImports, but for their slices.
    if kind not in (NAMESPACE, SERVICE_IMPORT, NODE, SERVICE_CIDR) and spec.label_selector:
        labels.append(spec.label_selector)
    if spec.only_forwarded and kind in FORWARDED_LABELS:
        labels.append(FORWARDED_LABELS[kind])
    if kind == ENDPOINT_SLICE and not spec.want_endpoints:
        labels.append(IMPORT_NAME_LABEL)  # only those that have it
    if labels:
        selectors.append(("labelSelector", ",".join(labels)))
    if kind == POD:
        selectors.append(("fieldSelector", LIVE_PODS))
    elif kind == NODE:
        selectors.append(("fieldSelector", f"metadata.name={spec.node}"))
    elif kind == SERVICE and spec.only_forwarded:
        selectors.append(("fieldSelector", NOT_HEADLESS))
    return selectors
