"""The Nodes that an embedded cluster has, and their leases.

Decides names, addresses, labels and status of Nodes; which Pods they get is pods.py's. They
are objects only: nothing runs on them.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Final

from kdns.api.controllers.index import LEASES, NODES
from kdns.api.controllers.writes import KUBELET, Writer
from kdns.api.objects import now_text
from kdns.api.store import Obj, Put

VERSION: Final = "v1.36.2"
OURS: Final = "kdns.dev/node"  # annotation of Nodes that kdns made, and may take away
# RFC 5737 and RFC 2544: addresses that belong to nobody; the second where there are more
# Nodes than the first has.
NODE_RANGES: Final = ("192.0.2.0/24", "198.18.0.0/15")
LEASE_NAMESPACE: Final = "kube-node-lease"
MAX_PODS: Final = "65535"

# type, status, reason, message
CONDITIONS: Final = (
    ("MemoryPressure", "False", "KubeletHasSufficientMemory",
     "kubelet has sufficient memory available"),
    ("DiskPressure", "False", "KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
    ("PIDPressure", "False", "KubeletHasSufficientPID", "kubelet has sufficient PID available"),
    ("Ready", "True", "KubeletReady", "kubelet is posting ready status"),
)  # fmt: skip


def default_addresses(count: int) -> list[str]:
    for text in NODE_RANGES:
        network = ipaddress.ip_network(text)
        if count <= network.num_addresses - 2:
            return [str(network[number]) for number in range(1, count + 1)]
    raise ValueError(f"{count} nodes are more than there are addresses for")


def pod_cidrs(ranges: Sequence[str], nodes: int, number: int) -> list[str]:
    """Return the part of each pod range that the node of this number (from 0) would have."""
    found = []
    for text in ranges:
        network = ipaddress.ip_network(text)
        usual = 24 if network.version == 4 else 64
        needed = network.prefixlen + max(nodes - 1, 0).bit_length()
        length = min(max(usual, needed), network.max_prefixlen)
        size = 1 << (network.max_prefixlen - length)
        if number * size < network.num_addresses:
            found.append(str(ipaddress.ip_network((int(network[number * size]), length))))
    return found


def node_object(
    name: str, addresses: Sequence[str], cidrs: Sequence[str], zone: str, now: str
) -> Obj:
    labels = {
        "beta.kubernetes.io/arch": "amd64",
        "beta.kubernetes.io/os": "linux",
        "kubernetes.io/arch": "amd64",
        "kubernetes.io/hostname": name,
        "kubernetes.io/os": "linux",
    }
    if zone:
        # "eu-1a" is in the region "eu-1", as clouds name them; else the zone is all there is.
        region = zone[:-1] if len(zone) > 2 and zone[-2].isdigit() else zone
        labels["topology.kubernetes.io/zone"] = zone
        labels["topology.kubernetes.io/region"] = region
    spec: Obj = {"podCIDR": cidrs[0], "podCIDRs": list(cidrs)} if cidrs else {}
    resources = {"cpu": "8", "memory": "16Gi", "ephemeral-storage": "100Gi", "pods": MAX_PODS}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "labels": labels,
            "annotations": {OURS: "true", "node.alpha.kubernetes.io/ttl": "0"},
        },
        "spec": spec,
        "status": {
            "addresses": [
                *({"type": "InternalIP", "address": one} for one in addresses),
                {"type": "Hostname", "address": name},
            ],
            "allocatable": resources,
            "capacity": resources,
            "conditions": [
                {"type": kind, "status": status, "reason": reason, "message": message,
                 "lastHeartbeatTime": now, "lastTransitionTime": now}
                for kind, status, reason, message in CONDITIONS
            ],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": 0}},
            "nodeInfo": {
                "architecture": "amd64", "bootID": "", "containerRuntimeVersion": "none://kdns",
                "kernelVersion": "", "kubeProxyVersion": "", "kubeletVersion": VERSION,
                "machineID": "", "operatingSystem": "linux", "osImage": "kdns", "systemUUID": "",
            },
        },
    }  # fmt: skip


def lease_object(node: Obj, now: str) -> Obj:
    name = node["metadata"]["name"]
    owner = {"apiVersion": "v1", "kind": "Node", "name": name, "uid": node["metadata"]["uid"]}
    moment = now.replace("Z", ".000000Z")
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {"name": name, "namespace": LEASE_NAMESPACE, "ownerReferences": [owner]},
        "spec": {"holderIdentity": name, "leaseDurationSeconds": 40, "renewTime": moment},
    }


async def ensure_nodes(
    writer: Writer,
    count: int,
    addresses: Sequence[str],
    zones: Sequence[str],
    pod_ranges: Sequence[str],
    now: float,
) -> None:
    """Make node1 to nodeN where they are not there; take away those of an earlier start with
    more of them. Nodes that others made stay.

    addresses -- of the nodes, in order; else documentation addresses
    zones     -- dealt out in turn
    """
    objects, kubelet = writer.objects, Writer(writer.objects, KUBELET)
    spare = default_addresses(count)
    text = now_text(now)
    names = [f"node{number}" for number in range(1, count + 1)]
    for number, name in enumerate(names):
        if objects.find(NODES, "", name) is not None:
            continue
        own = addresses[number] if number < len(addresses) else spare[number]
        zone = zones[number % len(zones)] if zones else ""
        cidrs = pod_cidrs(pod_ranges, count, number)
        made = node_object(name, [own], cidrs, zone, text)
        created = await kubelet.create(NODES, "", made)
        # A create takes no status, and a Node without its conditions is no use to anybody.
        stored = objects.get(NODES, "", name)
        await objects.store.write(Put(stored.key, {**created, "status": made["status"]}))
        await kubelet.ensure(LEASES, LEASE_NAMESPACE, lease_object(created, text))
    for stored in objects.list(NODES).items:
        meta = stored.obj["metadata"]
        ours = (meta.get("annotations") or {}).get(OURS) == "true"
        if ours and meta["name"] not in names:
            await writer.delete(NODES, "", meta["name"], stored.uid)
