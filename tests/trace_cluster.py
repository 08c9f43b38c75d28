"""Small clusters in words, for tests of `kdns trace`: objects as short as they can be said."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from kdns.explain.evidence import Evidence, Where, gather
from kdns.explain.trace import trace
from kdns.explain.trace_state import Request, Trace

Obj: TypeAlias = dict[str, Any]


def meta(name: str, ns: str = "default", **labels: str) -> Obj:
    return {"name": name, "namespace": ns, "labels": labels}


def node(name: str, ip: str, zone: str = "") -> Obj:
    labels = {"topology.kubernetes.io/zone": zone} if zone else {}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels},
        "status": {"addresses": [{"type": "InternalIP", "address": ip}]},
    }


def namespace(name: str) -> Obj:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}


def service(name: str, ns: str = "default", *, labels: Mapping[str, str] | None = None,
            ingress: Iterable[Obj] = (), **spec: Any) -> Obj:  # fmt: skip
    """port 80 to 8080 of the Pods labelled app=NAME, unless told otherwise."""
    spec.setdefault("ports", [{"name": "http", "port": 80, "targetPort": 8080}])
    if spec.get("type") != "ExternalName":
        spec.setdefault("selector", {"app": name})
    if spec["selector"] is None if "selector" in spec else False:
        del spec["selector"]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {**meta(name, ns), "labels": dict(labels or {})},
        "spec": spec,
        "status": {"loadBalancer": {"ingress": list(ingress)}},
    }


def pod(
    name: str,
    ns: str = "default",
    *,
    ip: str = "",
    on: str = "node1",
    ready: bool | None = None,
    port: int | None = 8080,
    port_name: str = "web",
    protocol: str = "TCP",
    waiting: str = "",
    labels: Mapping[str, str] | None = None,
    **spec: Any,
) -> Obj:
    """A Pod labelled app=web that declares port 8080."""
    ports = [{"name": port_name, "containerPort": port, "protocol": protocol}] if port else []
    container = {"name": "main", "image": "web:1", "ports": ports}
    status: Obj = {"podIP": ip} if ip else {}
    if ready is not None:
        status["conditions"] = [{"type": "Ready", "status": str(ready)}]
    if waiting:
        status["containerStatuses"] = [{"name": "main", "state": {"waiting": {"reason": waiting}}}]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": meta(name, ns, **dict({"app": "web"} if labels is None else labels)),
        "spec": {
            "nodeName": on,
            "containers": [container],
            **spec,
        },
        "status": status,
    }


def endpoint(ip: str, on: str = "node1", ready: bool = True, **more: Any) -> Obj:
    hints = more.pop("zones", None)
    found = {"addresses": [ip], "nodeName": on, "conditions": {"ready": ready, **more}}
    if hints:
        found["hints"] = {"forZones": [{"name": zone} for zone in hints]}
    return found


def endpoint_slice(
    owner: str,
    *endpoints: Obj,
    ns: str = "default",
    family: str = "IPv4",
    port_name: str = "http",
    port: int = 8080,
    protocol: str = "TCP",
    labelled: bool = True,
) -> Obj:
    labels = {"kubernetes.io/service-name": owner} if labelled else {}
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": meta(f"{owner}-abc12", ns, **labels),
        "addressType": family,
        "endpoints": list(endpoints),
        "ports": [{"name": port_name, "port": port, "protocol": protocol}],
    }


def deployment(name: str, replicas: int, ns: str = "default", port: int = 8080) -> Obj:
    labels = {"app": name}
    container = {"name": "main", "ports": [{"containerPort": port}]}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": meta(name, ns),
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": [container]}},
        },
    }


NODES = (node("node1", "192.0.2.11", "zone-a"), node("node2", "192.0.2.12", "zone-b"))
CLIENT = pod("client", ip="10.244.1.5", labels={"run": "client"}, port=None)
WEB = (service("web", clusterIP="10.96.0.80"), pod("web-1", ip="10.244.1.10"))


def written(folder: Path, objects: Iterable[Obj]) -> Path:
    """Write objects as one manifest; return its path."""
    path = folder / "cluster.json"
    items = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
    path.write_text(json.dumps(items), encoding="utf-8")
    return path


def evidence_of(folder: Path, objects: Iterable[Obj], corefile: str = "", **where: Any) -> Evidence:
    """Return what manifests of these objects say, with two nodes and a client beside them."""
    if corefile:
        (folder / "Corefile").write_text(corefile, encoding="utf-8")
        where["corefile"] = str(folder / "Corefile")
    path = written(folder, [*NODES, CLIENT, *objects])
    return gather(Where(manifests=(str(path),), **where))


def traced(evidence: Evidence, what: str, source: str = "default/client", **more: Any) -> Trace:
    """Trace "NAME:PORT"."""
    from kdns.explain.trace_command import parse_target

    name, port = parse_target(what)
    return trace(evidence, Request(name, port, source, **more))
