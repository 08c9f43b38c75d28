"""Forwarding tables for tests, made the way the program makes them: objects go through the
registry's Store and one TableCompiler.

    table_of(service("web"), slice_of("web", endpoint("10.244.1.5", nodeName="node1")))
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
from objects import endpoint, service, slice_of

from kdns.proxy.options import Family, NodeView
from kdns.proxy.table import Forwarding, ForwardingTable, TableCompiler
from kdns.registry.decode import STRUCTS
from kdns.registry.objects import (
    ENDPOINT_SLICE,
    SERVICE,
    EndpointSlice,
    Ingress,
    Kind,
    LoadBalancerStatus,
    Object,
    Service,
    ServiceStatus,
)
from kdns.registry.snapshot import Snapshot, everything
from kdns.registry.store import Store

GOLDEN: Final = pathlib.Path(__file__).parent / "golden" / "cluster.json"
# node1 of golden/cluster.json, as the rules in shared/golden were recorded on it.
NODE1: Final = NodeView("node1", "192.168.77.1", "z-a")
# The rules were recorded with these: the detector's CIDR of each family.
CLUSTER_CIDRS: Final[Mapping[Family, str]] = {4: "10.244.0.0/16", 6: "fd00:10:244::/56"}
KINDS: Final[tuple[Kind, ...]] = (SERVICE, ENDPOINT_SLICE)

__all__ = [  # so that a test needs to import from here only
    "endpoint",
    "service",
    "slice_of",
]


def exposed(
    name: str = "web",
    *,
    node_port: int = 0,
    vips: Sequence[str] = (),
    ip_mode: str = "VIP",
    labels: Mapping[str, str] | None = None,
    **more: Any,
) -> Service:
    """A Service that is more than its ClusterIP.

    node_port -- of its first port; those of the others follow
    vips      -- IPs of its load balancer
    more      -- as objects.service() takes it: ns, ip, ports, and fields of the spec in
                 Kubernetes' words, as externalTrafficPolicy="Local"
    """
    default = "LoadBalancer" if vips else "NodePort" if node_port else "ClusterIP"
    one = service(name, **{"type": default, **more})
    ports = [
        msgspec.structs.replace(port, node_port=node_port + i if node_port else 0)
        for i, port in enumerate(one.spec.ports or ())
    ]
    return msgspec.structs.replace(
        one,
        metadata=msgspec.structs.replace(one.metadata, labels=dict(labels or {}) or None),
        spec=msgspec.structs.replace(one.spec, ports=ports),
        status=ServiceStatus(LoadBalancerStatus([Ingress(ip, ip_mode=ip_mode) for ip in vips])),
    )


def snapshot_of(*objects: Object) -> Snapshot:
    """The registry's snapshot of these Services and EndpointSlices (others are passed over)."""
    store = Store(KINDS)
    store.replace(SERVICE, [one for one in objects if isinstance(one, Service)])
    store.replace(ENDPOINT_SLICE, [one for one in objects if isinstance(one, EndpointSlice)])
    for kind in KINDS:
        store.mark_synced(kind)
    published = store.publish(1_700_000_000)
    assert published is not None
    return published[0]


def table_of(*objects: Object, node: NodeView = NODE1, family: Family = 4) -> ForwardingTable:
    """What `node` makes of these objects."""
    snapshot = snapshot_of(*objects)
    compiler = TableCompiler(family, node)
    compiler.update(snapshot, everything(snapshot))
    return compiler.table


def only(*objects: Object, node: NodeView = NODE1, family: Family = 4) -> Forwarding:
    """The one Service port that these objects make."""
    (one,) = table_of(*objects, node=node, family=family)
    return one


@functools.cache
def cluster_objects() -> tuple[Object, ...]:
    """The Services and EndpointSlices of golden/cluster.json."""
    items = json.loads(GOLDEN.read_text())["items"]
    return tuple(
        msgspec.convert(one, STRUCTS[one["kind"]]) for one in items if one["kind"] in KINDS
    )


def cluster_table(family: Family = 4) -> ForwardingTable:
    """What node1 makes of golden/cluster.json."""
    return table_of(*cluster_objects(), family=family)
