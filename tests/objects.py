"""Kubernetes objects for tests, as short as they can be said."""

from __future__ import annotations

from typing import Any

import msgspec
from support import directives, make_setup

from kdns.plugins.kubernetes import Kubernetes, setup
from kdns.registry.objects import EndpointSlice, Namespace, Pod, Service, ServiceImport
from kdns.registry.snapshot import Snapshot, everything


def service(
    name: str, ns: str = "default", ip: str | list[str] = "10.96.0.50", **spec: Any
) -> Service:
    ips = [ip] if isinstance(ip, str) else ip
    ports = [
        {"name": n, "port": p, "protocol": proto}
        for n, p, proto in spec.pop("ports", [("http", 80, "TCP")])
    ]
    body = {"clusterIP": ips[0], "clusterIPs": ips, "ports": ports, "type": "ClusterIP", **spec}
    return msgspec.convert({"metadata": {"name": name, "namespace": ns}, "spec": body}, Service)


def external(name: str, target: str, ns: str = "default") -> Service:
    body = {"type": "ExternalName", "externalName": target}
    return msgspec.convert({"metadata": {"name": name, "namespace": ns}, "spec": body}, Service)


def endpoint(address: str, **more: Any) -> dict[str, Any]:
    return {"addresses": [address], "conditions": {"ready": True}, **more}


def slice_of(
    owner: str,
    *endpoints: dict[str, Any],
    ns: str = "default",
    ports: Any = (("http", 80, "TCP"),),
    name: str = "",
    family: str = "IPv4",
) -> EndpointSlice:
    meta = {
        "name": name or f"{owner}-1",
        "namespace": ns,
        "labels": {"kubernetes.io/service-name": owner},
    }
    body = {
        "metadata": meta,
        "addressType": family,
        "endpoints": list(endpoints),
        "ports": [{"name": n, "port": p, "protocol": proto} for n, p, proto in ports],
    }
    return msgspec.convert(body, EndpointSlice)


def service_import(
    name: str,
    ns: str = "default",
    ips: tuple[str, ...] = (),
    ports: Any = (("http", 80, "TCP"),),
    type: str = "ClusterSetIP",
) -> ServiceImport:
    spec = {
        "type": type,
        "ips": list(ips),
        "ports": [{"name": n, "port": p, "protocol": proto} for n, p, proto in ports],
    }
    return msgspec.convert(
        {"metadata": {"name": name, "namespace": ns}, "spec": spec}, ServiceImport
    )


def imported_slice(
    owner: str, cluster: str, *endpoints: dict[str, Any], **more: Any
) -> EndpointSlice:
    one = slice_of(owner, *endpoints, name=f"{owner}-{cluster or 'unknown'}", **more)
    labels = {"multicluster.kubernetes.io/service-name": owner}
    if cluster:
        labels["multicluster.kubernetes.io/source-cluster"] = cluster
    meta = msgspec.structs.replace(one.metadata, labels=labels)
    return msgspec.structs.replace(one, metadata=meta)


def namespace(name: str, **labels: str) -> Namespace:
    return msgspec.convert({"metadata": {"name": name, "labels": labels}}, Namespace)


def pod(name: str, ip: str, ns: str = "default") -> Pod:
    return msgspec.convert(
        {"metadata": {"name": name, "namespace": ns}, "status": {"podIP": ip, "phase": "Running"}},
        Pod,
    )


def snapshot(
    *objects: Any, synced: bool = True, revision: int = 1, changed_at: int = 1700000000
) -> Snapshot:
    services: dict[str, dict[str, Service]] = {}
    slices: dict[str, dict[str, tuple[EndpointSlice, ...]]] = {}
    namespaces = {"default": namespace("default")}
    pods: dict[str, dict[str, Pod]] = {}
    imports: dict[str, dict[str, ServiceImport]] = {}
    import_slices: dict[str, dict[str, tuple[EndpointSlice, ...]]] = {}
    for one in objects:
        meta = one.metadata
        if isinstance(one, Service):
            services.setdefault(meta.namespace, {})[meta.name] = one
        elif isinstance(one, EndpointSlice):
            for label, table in (
                ("kubernetes.io/service-name", slices),
                ("multicluster.kubernetes.io/service-name", import_slices),
            ):
                owner = (meta.labels or {}).get(label)
                if owner is not None:
                    owners = table.setdefault(meta.namespace, {})
                    owners[owner] = (*owners.get(owner, ()), one)
        elif isinstance(one, ServiceImport):
            imports.setdefault(meta.namespace, {})[meta.name] = one
        elif isinstance(one, Namespace):
            namespaces[meta.name] = one
        else:
            pods.setdefault(meta.namespace, {})[meta.name] = one
    return Snapshot(
        revision, services, slices, namespaces, pods, synced, changed_at,
        imports, import_slices, changed_at + 1 if imports else 0,
    )  # fmt: skip


def kubernetes(options: str, *objects: Any, zones: str = "cluster.local in-addr.arpa ip6.arpa",
               synced: bool = True, local: tuple[bytes, ...] = ()) -> Kubernetes:  # fmt: skip
    """The plugin as a Corefile with these options makes it, over these objects."""
    cx = make_setup()
    cx.facts.local_addresses = local
    (plugin,) = setup(directives(f"kubernetes {zones} {{\n{options}\n}}"), cx)
    assert isinstance(plugin, Kubernetes) and not cx.problems.errors, cx.problems.found
    found = snapshot(*objects, synced=synced)
    plugin.publish(found, everything(found), 0.0)
    return plugin
