"""What `kubectl get` shows of each kind (kdns/api/table.py)."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running_api import Kubectl, RunningApi

from kdns.api.answers import scale_of
from kdns.api.kinds import BY_KIND, BY_PLURAL, RESOURCES, Resource
from kdns.api.schema import SCALARS as SCHEMA_SCALARS
from kdns.api.schema import Field, type_named
from kdns.api.store import Stored
from kdns.api.table import SCALE, Include, human_duration, render_table

NOW = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC).timestamp()
MINUTE, HOUR, DAY, YEAR = 60, 3600, 86400, 365 * 86400
AGO_5M, AGO_3H = "2026-11-21T11:55:00Z", "2026-11-21T09:00:00Z"

Obj = dict[str, Any]


def made(kind: str, name: str = "web", created: str | None = AGO_5M, **rest: Any) -> Obj:
    """An object of a kind; `meta` is added to its metadata."""
    (resource,) = (one for one in RESOURCES if one.kind == kind)
    meta: Obj = {"name": name, "uid": f"uid-{name}"}
    if resource.namespaced:
        meta["namespace"] = "default"
    if created:
        meta["creationTimestamp"] = created
    meta |= rest.pop("meta", {})
    return {"kind": kind, "apiVersion": resource.api_version, "metadata": meta, **rest}


def resource_of(obj: Obj) -> Resource:
    return BY_KIND[obj["apiVersion"], obj["kind"]]


def table_of(*objects: Obj, include: Include = "Metadata", headers: bool = True) -> Obj:
    """The Table of some objects of a kind, as a client reads it."""
    table = render_table(
        resource_of(objects[0]), objects, now=NOW, include=include,
        list_meta={"resourceVersion": "7"}, headers=headers,
    )  # fmt: skip
    read: Obj = msgspec.json.decode(msgspec.json.encode(table))
    return read


def shown(obj: Obj) -> dict[str, Any]:
    """An object's row under kubectl's headings."""
    table = table_of(obj)
    heads = [column["name"].upper() for column in table["columnDefinitions"]]
    return dict(zip(heads, table["rows"][0]["cells"], strict=True))


def check(obj: Obj, **cells: Any) -> None:
    """Hold cells against what is expected; a heading's signs are left out of its keyword."""
    found = {"".join(c for c in head if c.isalpha()): cell for head, cell in shown(obj).items()}
    assert {head: found[head] for head in cells} == cells


# --- ages -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3600, "<invalid>"),
        (-2, "<invalid>"),
        (-1.9, "0s"),
        (0, "0s"),
        (5.9, "5s"),
        (119, "119s"),
        (120, "2m"),
        (123, "2m3s"),
        (9 * MINUTE + 59, "9m59s"),
        (10 * MINUTE + 59, "10m"),
        (179 * MINUTE, "179m"),
        (3 * HOUR, "3h"),
        (5 * HOUR + 59 * MINUTE, "5h59m"),
        (8 * HOUR + 59 * MINUTE, "8h"),
        (47 * HOUR, "47h"),
        (2 * DAY, "2d"),
        (3 * DAY + 4 * HOUR, "3d4h"),
        (8 * DAY + 4 * HOUR, "8d"),
        (729 * DAY, "729d"),
        (2 * YEAR, "2y"),
        (2 * YEAR + 35 * DAY, "2y35d"),
        (8 * YEAR + 35 * DAY, "8y"),
        (40 * YEAR, "40y"),
    ],
)
def test_a_duration_is_told_as_kubectl_tells_it(seconds: float, text: str) -> None:
    assert human_duration(seconds) == text


@given(st.integers(0, 20 * YEAR))
def test_a_duration_is_never_told_longer_than_it_is(seconds: int) -> None:
    units = {"s": 1, "m": MINUTE, "h": HOUR, "d": DAY, "y": YEAR}
    told, number = 0, ""
    for letter in human_duration(seconds):
        if letter.isdigit():
            number += letter
        else:
            told, number = told + int(number) * units[letter], ""
    assert seconds * 0.85 <= told <= seconds


@pytest.mark.parametrize(
    ("created", "age"),
    [
        (AGO_5M, "5m"),
        ("2026-11-21T11:59:58.750000Z", "1s"),
        ("2026-11-21T12:55:00+01:00", "5m"),
        ("2026-11-21T12:00:01Z", "0s"),
        ("2026-11-21T13:00:00Z", "<invalid>"),
        ("0001-01-01T00:00:00Z", "<unknown>"),
        (None, "<unknown>"),
    ],
)
def test_an_object_has_an_age(created: str | None, age: str) -> None:
    check(made("ConfigMap", created=created), AGE=age)


# --- Service ----------------------------------------------------------------------------------


def service(**spec: Any) -> Obj:
    ingress = spec.pop("ingress", [])
    return made("Service", spec=spec, status={"loadBalancer": {"ingress": ingress}})


HTTP = {"name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080}
DNS = {"name": "dns", "port": 53, "protocol": "UDP"}


@pytest.mark.parametrize(
    ("spec", "cells"),
    [
        (
            {"type": "ClusterIP", "clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10", "fd::a"],
             "ports": [HTTP, DNS], "selector": {"tier": "front", "app": "web"}},
            {"TYPE": "ClusterIP", "CLUSTERIP": "10.96.0.10", "EXTERNALIP": "<none>",
             "PORTS": "80/TCP,53/UDP", "SELECTOR": "app=web,tier=front"},
        ),
        (
            {"type": "ClusterIP", "clusterIP": "None", "clusterIPs": ["None"]},
            {"CLUSTERIP": "None", "PORTS": "<none>", "SELECTOR": "<none>"},
        ),
        (
            {"type": "ClusterIP", "clusterIPs": ["10.96.0.1"],
             "externalIPs": ["1.2.3.4", "1.2.3.5"]},
            {"EXTERNALIP": "1.2.3.4,1.2.3.5"},
        ),
        (
            {"type": "NodePort", "clusterIPs": ["10.96.0.1"],
             "ports": [HTTP | {"nodePort": 30080}]},
            {"TYPE": "NodePort", "EXTERNALIP": "<none>", "PORTS": "80:30080/TCP"},
        ),
        (
            {"type": "LoadBalancer", "clusterIPs": ["10.96.0.1"]},
            {"EXTERNALIP": "<pending>"},
        ),
        (
            {"type": "LoadBalancer", "ingress": [{"ip": "203.0.113.9"}, {"hostname": "lb.example"},
                                                 {"ip": "203.0.113.10", "hostname": "other"}]},
            {"EXTERNALIP": "203.0.113.10,203.0.113.9,lb.example"},
        ),
        (
            {"type": "LoadBalancer", "ingress": [{"ip": "203.0.113.9"}],
             "externalIPs": ["1.2.3.4"]},
            {"EXTERNALIP": "203.0.113.9,1.2.3.4"},
        ),
        (
            {"type": "LoadBalancer", "externalIPs": ["1.2.3.4"]},
            {"EXTERNALIP": "1.2.3.4"},
        ),
        (
            {"type": "ExternalName", "externalName": "db.example.org"},
            {"CLUSTERIP": "<none>", "EXTERNALIP": "db.example.org", "PORTS": "<none>"},
        ),
    ],
)  # fmt: skip
def test_a_service(spec: Obj, cells: Obj) -> None:
    check(service(**spec), NAME="web", AGE="5m", **cells)


# --- endpoints --------------------------------------------------------------------------------


def ips(*addresses: str) -> list[Obj]:
    return [{"ip": address} for address in addresses]


@pytest.mark.parametrize(
    ("subsets", "text"),
    [
        ([], "<none>"),
        ([{"addresses": ips("10.0.0.1"), "ports": [{"port": 80}]}], "10.0.0.1:80"),
        ([{"addresses": ips("fd00::1"), "ports": [{"port": 80}]}], "[fd00::1]:80"),
        ([{"addresses": ips("10.0.0.1", "10.0.0.2")}], "10.0.0.1,10.0.0.2"),
        ([{"notReadyAddresses": ips("10.0.0.1"), "ports": [{"port": 80}]}], ""),
        (
            [{"addresses": ips("10.0.0.1", "10.0.0.2"), "ports": [{"port": 80}, {"port": 443}]}],
            "10.0.0.1:80,10.0.0.2:80,10.0.0.1:443 + 1 more...",
        ),
        (
            [{"addresses": ips("10.0.0.1", "10.0.0.2"), "ports": [{"port": 80}]},
             {"addresses": ips("10.0.0.3", "10.0.0.4", "10.0.0.5"), "ports": [{"port": 81}]}],
            "10.0.0.1:80,10.0.0.2:80,10.0.0.3:81 + 2 more...",
        ),
    ],
)  # fmt: skip
def test_endpoints(subsets: list[Obj], text: str) -> None:
    check(made("Endpoints", subsets=subsets), NAME="web", ENDPOINTS=text, AGE="5m")


def slice_of(*addresses: str, ports: list[Obj] | None = None) -> Obj:
    return made(
        "EndpointSlice", addressType="IPv4", ports=ports or [],
        endpoints=[{"addresses": [address]} for address in addresses],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("obj", "ports", "endpoints"),
    [
        (slice_of(), "<unset>", "<unset>"),
        (slice_of("10.0.0.1", ports=[{"name": "", "port": 80}]), "80", "10.0.0.1"),
        (slice_of(ports=[{"name": "http"}, {"port": 0}, {}]), "http,0,*", "<unset>"),
        (
            slice_of(*(f"10.0.0.{n}" for n in range(1, 6)), ports=[{"port": n} for n in range(4)]),
            "0,1,2 + 1 more...",
            "10.0.0.1,10.0.0.2,10.0.0.3 + 2 more...",
        ),
    ],
)
def test_an_endpoint_slice(obj: Obj, ports: str, endpoints: str) -> None:
    check(obj, ADDRESSTYPE="IPv4", PORTS=ports, ENDPOINTS=endpoints, AGE="5m")


# --- Pod --------------------------------------------------------------------------------------

RUNNING = {"running": {"startedAt": AGO_5M}}
READY = {"name": "c", "ready": True, "restartCount": 0, "state": RUNNING}
GONE = {"deletionTimestamp": AGO_5M}


def waiting(reason: str) -> Obj:
    return {"waiting": {"reason": reason}}


def ended(code: int = 0, at: str = AGO_5M, **rest: Any) -> Obj:
    return {"terminated": {"exitCode": code, "finishedAt": at, **rest}}


def container(state: Obj, *, name: str = "c", **rest: Any) -> Obj:
    return {"name": name, "ready": False, "restartCount": 0, "state": state, **rest}


def pod(
    *statuses: Obj,
    phase: str = "Running",
    inits: list[Obj] | None = None,
    sidecars: tuple[str, ...] = (),
    containers: int = 1,
    meta: Obj | None = None,
    spec: Obj | None = None,
    **status: Any,
) -> Obj:
    names = dict.fromkeys([*(one["name"] for one in inits or []), *sidecars])
    return made(
        "Pod",
        meta=meta or {},
        spec={
            "containers": [{"name": f"c{n}", "image": "web:1"} for n in range(containers)],
            "initContainers": [
                {"name": name} | ({"restartPolicy": "Always"} if name in sidecars else {})
                for name in names
            ],
            **(spec or {}),
        },
        status={
            "phase": phase,
            "containerStatuses": list(statuses),
            "initContainerStatuses": inits or [],
            **status,
        },
    )


@pytest.mark.parametrize(
    ("obj", "ready", "status"),
    [
        (pod(READY), "1/1", "Running"),
        (pod(READY, container(RUNNING), containers=2), "1/2", "Running"),
        (pod(phase="Pending"), "0/1", "Pending"),
        (pod(container(waiting("ContainerCreating")), phase="Pending"), "0/1", "ContainerCreating"),
        (pod(container(waiting("CrashLoopBackOff"))), "0/1", "CrashLoopBackOff"),
        (pod(container(ended(0, reason="Completed")), phase="Succeeded"), "0/1", "Completed"),
        (pod(container(ended(1, reason="Error")), phase="Failed"), "0/1", "Error"),
        (pod(container(ended(3)), phase="Failed"), "0/1", "ExitCode:3"),
        (pod(container(ended(0, signal=9)), phase="Failed"), "0/1", "Signal:9"),
        (pod(phase="Failed", reason="Evicted"), "0/1", "Evicted"),
        (
            pod(phase="Pending", conditions=[
                {"type": "PodScheduled", "status": "False", "reason": "SchedulingGated"}]),
            "0/1", "SchedulingGated",
        ),
        # One container is done, the other goes on.
        (
            pod(container(ended(reason="Completed")), READY, containers=2,
                conditions=[{"type": "Ready", "status": "True"}]),
            "1/2", "Running",
        ),
        (pod(container(ended(reason="Completed")), READY, containers=2), "1/2", "NotReady"),
        # Being deleted.
        (pod(READY, meta=GONE), "1/1", "Terminating"),
        (pod(READY, meta=GONE, reason="NodeLost"), "1/1", "Unknown"),
        (pod(container(ended(reason="Completed")), phase="Succeeded", meta=GONE),
         "0/1", "Completed"),
        # Init containers, and among them those that stay.
        (pod(phase="Pending", inits=[container(RUNNING, name="a"), container({}, name="b")]),
         "0/1", "Init:0/2"),
        (pod(phase="Pending", inits=[container(ended(), name="a"), container({}, name="b")]),
         "0/1", "Init:1/2"),
        (pod(phase="Pending", inits=[container(waiting("ErrImagePull"), name="a")]),
         "0/1", "Init:ErrImagePull"),
        (pod(phase="Pending", inits=[container(waiting("PodInitializing"), name="a")]),
         "0/1", "Init:0/1"),
        (pod(phase="Pending", inits=[container(ended(2, reason="Error"), name="a")]),
         "0/1", "Init:Error"),
        (pod(phase="Pending", inits=[container(ended(2), name="a")]), "0/1", "Init:ExitCode:2"),
        (pod(phase="Pending", inits=[container(ended(2, signal=15), name="a")]),
         "0/1", "Init:Signal:15"),
        (pod(READY, inits=[container(ended(), name="a")]), "1/1", "Running"),
        (
            pod(READY, sidecars=("proxy",),
                inits=[container(RUNNING, name="proxy", ready=True, started=True)]),
            "2/2", "Running",
        ),
        (
            pod(READY, sidecars=("proxy",),
                inits=[container(RUNNING, name="proxy", ready=False, started=True)]),
            "1/2", "Running",
        ),
        (pod(phase="Pending", sidecars=("proxy",), inits=[container(RUNNING, name="proxy")]),
         "0/2", "Init:0/1"),
    ],
)  # fmt: skip
def test_a_pods_state(obj: Obj, ready: str, status: str) -> None:
    check(obj, NAME="web", READY=ready, STATUS=status, AGE="5m")


def restarted(count: int, at: str | None = None, state: Obj = RUNNING, **rest: Any) -> Obj:
    if at:
        rest["lastState"] = ended(1, at)
    return container(state, restartCount=count, **rest)


@pytest.mark.parametrize(
    ("obj", "restarts"),
    [
        (pod(READY), "0"),
        (pod(restarted(3)), "3"),
        (pod(restarted(3, AGO_5M)), "3 (5m ago)"),
        (pod(restarted(1, AGO_3H), restarted(2, AGO_5M), containers=2), "3 (5m ago)"),
        (pod(restarted(1, AGO_5M), restarted(2, AGO_3H), containers=2), "3 (5m ago)"),
        # Those of init containers count while they run, and those of sidecars always.
        (pod(restarted(1), inits=[restarted(4, AGO_5M, ended(), name="a")]), "1"),
        (pod(phase="Pending", inits=[restarted(4, AGO_5M, name="a")]), "4 (5m ago)"),
        (
            pod(restarted(1), sidecars=("a",),
                inits=[restarted(4, AGO_5M, name="a", started=True)]),
            "5 (5m ago)",
        ),
    ],
)  # fmt: skip
def test_a_pods_restarts(obj: Obj, restarts: str) -> None:
    check(obj, RESTARTS=restarts)


def test_where_a_pod_is() -> None:
    check(pod(READY), IP="<none>", NODE="<none>", NOMINATEDNODE="<none>", READINESSGATES="<none>")
    gates = [{"conditionType": name} for name in ("a.example/ok", "b.example/ok", "c.example/ok")]
    conditions = [
        {"type": "a.example/ok", "status": "True"},
        {"type": "b.example/ok", "status": "False"},
        {"type": "b.example/ok", "status": "True"},
    ]
    obj = pod(
        READY, spec={"nodeName": "node-1", "readinessGates": gates}, conditions=conditions,
        podIP="10.244.0.7", podIPs=ips("10.244.0.7", "fd00::7"), nominatedNodeName="node-2",
    )  # fmt: skip
    check(obj, IP="10.244.0.7", NODE="node-1", NOMINATEDNODE="node-2", READINESSGATES="1/3")


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_the_row_of_a_pod_that_is_over_says_so(phase: str) -> None:
    (row,) = table_of(pod(phase=phase))["rows"]
    (condition,) = row["conditions"]
    assert (condition["type"], condition["status"]) == ("Completed", "True")
    assert condition["reason"] == phase
    assert "conditions" not in table_of(pod(READY))["rows"][0]


# --- workloads --------------------------------------------------------------------------------


def workload(
    kind: str, status: Obj | None = None, *, replicas: int = 3, selector: Obj | None = None
) -> Obj:
    containers = [{"name": "web", "image": "nginx:1"}, {"name": "log", "image": "fluent:2"}]
    return made(
        kind,
        spec={
            "replicas": replicas,
            "selector": selector or {"matchLabels": {"app": "web"}},
            "template": {"spec": {"containers": containers}},
        },
        status=status or {},
    )


TEMPLATE = {"CONTAINERS": "web,log", "IMAGES": "nginx:1,fluent:2"}
NUMBERS = {"replicas": 3, "readyReplicas": 2, "updatedReplicas": 1, "availableReplicas": 2}


def test_workloads() -> None:
    check(workload("Deployment", NUMBERS), NAME="web", READY="2/3", UPTODATE=1, AVAILABLE=2,
          AGE="5m", SELECTOR="app=web", **TEMPLATE)  # fmt: skip
    check(workload("ReplicaSet", NUMBERS), NAME="web", DESIRED=3, CURRENT=3, READY=2, AGE="5m",
          SELECTOR="app=web", **TEMPLATE)  # fmt: skip
    check(workload("StatefulSet", NUMBERS), NAME="web", READY="2/3", AGE="5m", **TEMPLATE)


def test_a_workload_that_has_not_begun() -> None:
    check(workload("Deployment", replicas=0), READY="0/0", UPTODATE=0, AVAILABLE=0)
    check(workload("ReplicaSet"), DESIRED=3, CURRENT=0, READY=0)
    check(workload("StatefulSet"), READY="0/3")


def expression(key: str, operator: str, *values: str) -> Obj:
    return {"key": key, "operator": operator} | ({"values": list(values)} if values else {})


@pytest.mark.parametrize(
    ("selector", "deployment", "replica_set"),
    [
        ({"matchLabels": {"b": "2", "a": "1"}}, "a=1,b=2", "a=1,b=2"),
        (
            {"matchLabels": {"d": "1"}, "matchExpressions": [
                expression("c", "In", "y", "x"), expression("b", "NotIn", "z"),
                expression("a", "Exists"), expression("e", "DoesNotExist")]},
            "a,b notin (z),c in (x,y),d=1,!e", "a,b notin (z),c in (x,y),d=1,!e",
        ),
        ({"matchLabels": {}}, "", "<none>"),
        ({"matchExpressions": [expression("a", "Perhaps", "b")]}, "<invalid>", "<error>"),
        ({"matchExpressions": [expression("a", "In")]}, "<invalid>", "<error>"),
    ],
)  # fmt: skip
def test_a_workloads_selector(selector: Obj, deployment: str, replica_set: str) -> None:
    check(workload("Deployment", selector=selector), SELECTOR=deployment)
    check(workload("ReplicaSet", selector=selector), SELECTOR=replica_set)


# --- Node -------------------------------------------------------------------------------------


def node(ready: str = "True", **rest: Any) -> Obj:
    labels = rest.pop("labels", {})
    conditions = [{"type": "MemoryPressure", "status": "False"}]
    if ready:
        conditions.append({"type": "Ready", "status": ready})
    status = {"conditions": conditions, **rest.pop("status", {})}
    return made("Node", "node-1", meta={"labels": labels}, status=status, **rest)


@pytest.mark.parametrize(
    ("obj", "cells"),
    [
        (node(), {"STATUS": "Ready", "ROLES": "<none>", "VERSION": "", "INTERNALIP": "<none>",
                  "EXTERNALIP": "<none>", "OSIMAGE": "<unknown>", "KERNELVERSION": "<unknown>",
                  "CONTAINERRUNTIME": "<unknown>"}),
        (node("False"), {"STATUS": "NotReady"}),
        (node("Unknown"), {"STATUS": "NotReady"}),
        (node(""), {"STATUS": "Unknown"}),
        (node(spec={"unschedulable": True}), {"STATUS": "Ready,SchedulingDisabled"}),
        (
            node(labels={"node-role.kubernetes.io/worker": "", "kubernetes.io/role": "edge",
                         "node-role.kubernetes.io/control-plane": "", "a": "b"}),
            {"ROLES": "control-plane,edge,worker"},
        ),
        (
            node(status={
                "addresses": [{"type": "Hostname", "address": "node-1"},
                              {"type": "ExternalIP", "address": "203.0.113.1"},
                              {"type": "InternalIP", "address": "192.168.0.1"},
                              {"type": "InternalIP", "address": "fd00::1"}],
                "nodeInfo": {"kubeletVersion": "v1.36.2", "osImage": "Debian GNU/Linux 12",
                             "kernelVersion": "6.1.0", "containerRuntimeVersion": "containerd://2.1"},
            }),
            {"VERSION": "v1.36.2", "INTERNALIP": "192.168.0.1", "EXTERNALIP": "203.0.113.1",
             "OSIMAGE": "Debian GNU/Linux 12", "KERNELVERSION": "6.1.0",
             "CONTAINERRUNTIME": "containerd://2.1"},
        ),
    ],
)  # fmt: skip
def test_a_node(obj: Obj, cells: Obj) -> None:
    check(obj, NAME="node-1", AGE="5m", **cells)


# --- Event ------------------------------------------------------------------------------------


def event(**rest: Any) -> Obj:
    about = {"kind": "Pod", "name": "web-1", "fieldPath": "spec.containers{c}"}
    return made("Event", "web-1.17", involvedObject=rest.pop("involvedObject", about), **rest)


@pytest.mark.parametrize(
    ("obj", "cells"),
    [
        (
            event(type="Normal", reason="Started", message=" Started container c\n", count=4,
                  firstTimestamp=AGO_3H, lastTimestamp=AGO_5M,
                  source={"component": "kubelet", "host": "node-1"}),
            {"LASTSEEN": "5m", "TYPE": "Normal", "REASON": "Started", "OBJECT": "pod/web-1",
             "SUBOBJECT": "spec.containers{c}", "SOURCE": "kubelet, node-1",
             "MESSAGE": "Started container c", "FIRSTSEEN": "3h", "COUNT": 4, "NAME": "web-1.17"},
        ),
        (event(firstTimestamp=AGO_3H), {"LASTSEEN": "3h", "FIRSTSEEN": "3h", "COUNT": 1}),
        (event(), {"LASTSEEN": "<unknown>", "FIRSTSEEN": "<unknown>", "SOURCE": ""}),
        # As events.k8s.io has them.
        (
            event(eventTime="2026-11-21T11:55:00.000000Z", reportingComponent="scheduler",
                  reportingInstance="scheduler-0"),
            {"LASTSEEN": "5m", "FIRSTSEEN": "5m", "COUNT": 1, "SOURCE": "scheduler, scheduler-0"},
        ),
        (
            event(eventTime="2026-11-21T09:00:00.000000Z",
                  series={"count": 9, "lastObservedTime": "2026-11-21T11:55:00.000000Z"}),
            {"LASTSEEN": "5m", "FIRSTSEEN": "3h", "COUNT": 9},
        ),
        (event(involvedObject={"kind": "Node"}), {"OBJECT": "node", "SUBOBJECT": ""}),
    ],
)  # fmt: skip
def test_an_event(obj: Obj, cells: Obj) -> None:
    check(obj, **cells)


# --- the rest ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("obj", "cells"),
    [
        (made("Namespace", status={"phase": "Active"}), {"STATUS": "Active"}),
        (made("ConfigMap"), {"DATA": 0}),
        (made("ConfigMap", data={"a": "1", "b": "2"}, binaryData={"c": "AA=="}), {"DATA": 3}),
        (made("Secret", type="Opaque", data={"a": "MQ=="}), {"TYPE": "Opaque", "DATA": 1}),
        (made("ServiceAccount"), {"SECRETS": 0}),
        (made("ServiceAccount", secrets=[{"name": "a"}, {"name": "b"}]), {"SECRETS": 2}),
        (made("Lease", spec={"holderIdentity": "node-1"}), {"HOLDER": "node-1"}),
        (made("Lease"), {"HOLDER": ""}),
        (
            made("ServiceCIDR", spec={"cidrs": ["10.0.0.0/24", "fd00::/112"]}),
            {"CIDRS": "10.0.0.0/24,fd00::/112"},
        ),
    ],
)
def test_small_kinds(obj: Obj, cells: Obj) -> None:
    check(obj, NAME="web", AGE="5m", **cells)


# --- the Table itself -------------------------------------------------------------------------


@pytest.mark.parametrize("resource", RESOURCES, ids=lambda one: one.plural)
def test_every_kind_has_a_table_even_of_an_object_with_nothing_in_it(resource: Resource) -> None:
    table = table_of(made(resource.kind, created=None))
    columns, (row,) = table["columnDefinitions"], table["rows"]
    assert len(columns) == len(row["cells"])
    assert [c["name"] for c in columns if c["format"] == "name"] == ["Name"]
    for column, cell in zip(columns, row["cells"], strict=True):
        assert column["type"] in ("string", "integer")
        assert column["description"].endswith(".")
        assert isinstance(cell, (str, int))
    # What is not wide is what kubectl shows without -o wide: some of it, but not all.
    assert any(column["priority"] == 0 for column in columns)


SCALARS: dict[str, list[Any]] = {
    "bool": [True, False],
    "int32": [0, 1, -1, 2**31 - 1],
    "int64": [0, 1, -1, 2**63 - 1],
    "intorstring": [80, "http"],
    "time": [AGO_5M, "2027-01-01T00:00:00Z"],
    "microtime": ["2026-11-21T11:55:00.000001Z"],
    "fieldsv1": [{"f:spec": {}}],
    "bytes": ["", "AA=="],
    "quantity": ["200m", "1Gi"],
    "strings": [["a", "b"]],
}


def anything(random: Random, type_name: str, depth: int = 0) -> Any:
    """A value of a type of the schema: any of its fields, or none."""
    if type_name in SCHEMA_SCALARS:
        return random.choice(SCALARS.get(type_name, ["", "a", "Ready", "Succeeded", "é\n"]))
    return {
        name: anything_in(random, field, depth)
        for name, field in type_named(type_name).fields.items()
        if random.random() < 0.6**depth
    }


def anything_in(random: Random, field: Field, depth: int) -> Any:
    def one() -> Any:
        return anything(random, field.type, depth + 1)

    if field.shape == "one":
        return one()
    count = random.choice([0, 1, 2, 5])
    if field.shape == "list":
        return [one() for _ in range(count)]
    return {f"key{n}": one() for n in range(count)}


@pytest.mark.parametrize("resource", RESOURCES, ids=lambda one: one.plural)
@settings(max_examples=30)
@given(seed=st.integers(0, 2**32))
def test_whatever_the_schema_lets_in_can_be_shown(resource: Resource, seed: int) -> None:
    obj = anything(Random(seed), resource.type)
    obj |= {"kind": resource.kind, "apiVersion": resource.api_version}
    obj.setdefault("metadata", {})
    (row,) = table_of(obj)["rows"]
    assert all(isinstance(cell, (str, int)) for cell in row["cells"])


@pytest.mark.parametrize(
    ("include", "carried"),
    [
        ("None", None),
        ("Object", "whole"),
        ("Metadata", "metadata"),
    ],
)
def test_a_row_carries_as_much_of_its_object_as_was_asked_for(
    include: Include, carried: str | None
) -> None:
    obj = service(type="ClusterIP")
    expected = {
        None: None,
        "whole": obj,
        "metadata": {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1",
                     "metadata": obj["metadata"]},
    }[carried]  # fmt: skip
    table = table_of(obj, include=include)
    assert table["rows"][0]["object"] == expected
    assert (table["kind"], table["apiVersion"]) == ("Table", "meta.k8s.io/v1")
    assert table["metadata"] == {"resourceVersion": "7"}


def test_a_scale() -> None:
    scale = scale_of(workload("Deployment", NUMBERS | {"replicas": 2}))
    table = render_table(SCALE, [scale], now=NOW, include="None", list_meta={})
    assert [column["name"] for column in table["columnDefinitions"]] == [
        "Name", "Desired", "Available", "Age",
    ]  # fmt: skip
    assert table["rows"][0]["cells"] == ["web", 3, 2, "5m"]


def test_a_watch_tells_the_columns_once() -> None:
    table = table_of(service(), headers=False)
    assert table["columnDefinitions"] is None
    assert table["rows"][0]["cells"][0] == "web"


def test_objects_as_the_store_keeps_them_give_the_same_table() -> None:
    obj = service(type="ClusterIP", clusterIPs=["10.96.0.10"], ports=[HTTP])
    resource = BY_PLURAL["", "services"]
    stored = Stored(("services", "default", "web"), "uid-web", 3, {}, msgspec.json.encode(obj))
    includes: tuple[Include, ...] = ("None", "Object", "Metadata")
    for include in includes:
        table = render_table(resource, [stored], now=NOW, include=include, list_meta={})
        again = render_table(resource, [obj], now=NOW, include=include, list_meta={})
        assert msgspec.json.encode(table) == msgspec.json.encode(again)


def test_no_objects_no_rows() -> None:
    resource = BY_PLURAL["", "services"]
    table = render_table(resource, [], now=NOW, include="Metadata", list_meta={})
    assert table["rows"] == []
    assert len(table["columnDefinitions"]) == 7


# --- as kubectl prints it ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def api() -> Iterator[RunningApi]:
    running = RunningApi(clock=lambda: NOW)
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def kubectl(api: RunningApi, tmp_path_factory: pytest.TempPathFactory) -> Kubectl:
    folder: Path = tmp_path_factory.mktemp("kubectl")
    return Kubectl(folder, api.kubeconfig)


def lines(text: str) -> list[str]:
    """What was printed, with one space where columns are set apart."""
    return [" ".join(line.split()) for line in text.splitlines()]


def named(obj: Obj, name: str) -> Obj:
    return {**obj, "metadata": {**obj["metadata"], "name": name}}


PRINTED = [
    (
        "service",
        [
            service(type="NodePort", clusterIPs=["10.96.0.10"], selector={"app": "web"},
                    ports=[HTTP | {"nodePort": 30080}, DNS]),
            named(service(type="LoadBalancer", clusterIPs=["10.96.0.11"], ports=[HTTP]), "lb"),
            named(service(type="ExternalName", externalName="db.example.org"), "db"),
        ],
        [
            "NAME TYPE CLUSTER-IP EXTERNAL-IP PORT(S) AGE SELECTOR",
            "db ExternalName <none> db.example.org <none> 5m <none>",
            "lb LoadBalancer 10.96.0.11 <pending> 80/TCP 5m <none>",
            "web NodePort 10.96.0.10 <none> 80:30080/TCP,53/UDP 5m app=web",
        ],
        1,
    ),
    (
        "pod",
        [
            pod(READY, spec={"nodeName": "node-1"}, podIP="10.244.0.7", podIPs=ips("10.244.0.7")),
            named(pod(restarted(3, AGO_5M, waiting("CrashLoopBackOff"))), "bad"),
            named(pod(READY, meta=GONE | {"finalizers": ["a/b"]}), "going"),
        ],
        [
            "NAME READY STATUS RESTARTS AGE IP NODE NOMINATED NODE READINESS GATES",
            "bad 0/1 CrashLoopBackOff 3 (5m ago) 5m <none> <none> <none> <none>",
            "going 1/1 Terminating 0 5m <none> <none> <none> <none>",
            "web 1/1 Running 0 5m 10.244.0.7 node-1 <none> <none>",
        ],
        4,
    ),
    (
        "deployment",
        [workload("Deployment", NUMBERS)],
        [
            "NAME READY UP-TO-DATE AVAILABLE AGE CONTAINERS IMAGES SELECTOR",
            "web 2/3 1 2 5m web,log nginx:1,fluent:2 app=web",
        ],
        3,
    ),
    (
        "replicaset",
        [workload("ReplicaSet", NUMBERS)],
        [
            "NAME DESIRED CURRENT READY AGE CONTAINERS IMAGES SELECTOR",
            "web 3 3 2 5m web,log nginx:1,fluent:2 app=web",
        ],
        3,
    ),
    (
        "endpointslice",
        [slice_of("10.0.0.1", "10.0.0.2", ports=[{"name": "http", "port": 8080}])],
        ["NAME ADDRESSTYPE PORTS ENDPOINTS AGE", "web IPv4 8080 10.0.0.1,10.0.0.2 5m"],
        0,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "objects", "wide", "extra"), PRINTED, ids=[p[0] for p in PRINTED])
def test_kubectl_get(
    api: RunningApi, kubectl: Kubectl, kind: str, objects: list[Obj], wide: list[str], extra: int
) -> None:
    for obj in objects:
        api.put(obj)
    assert lines(kubectl("get", kind, "-o", "wide")) == wide
    narrow = lines(kubectl("get", kind))
    assert [line.split()[0] for line in narrow] == [line.split()[0] for line in wide]
    for short, long in zip(narrow[1:], wide[1:], strict=True):
        assert short.split() == long.split()[: len(long.split()) - extra]
    (first, *_) = sorted(obj["metadata"]["name"] for obj in objects)
    assert lines(kubectl("get", kind, first)) == narrow[:2]


def test_kubectl_get_events_and_nodes(api: RunningApi, kubectl: Kubectl) -> None:
    obj = event(
        type="Warning", reason="BackOff", message="Back-off restarting", count=4,
        firstTimestamp=AGO_3H, lastTimestamp=AGO_5M, source={"component": "kubelet"},
    )  # fmt: skip
    api.put(obj)
    assert lines(kubectl("get", "events")) == [
        "LAST SEEN TYPE REASON OBJECT MESSAGE",
        "5m Warning BackOff pod/web-1 Back-off restarting",
    ]
    assert lines(kubectl("get", "events", "-o", "wide")) == [
        "LAST SEEN TYPE REASON OBJECT SUBOBJECT SOURCE MESSAGE FIRST SEEN COUNT NAME",
        "5m Warning BackOff pod/web-1 spec.containers{c} kubelet Back-off restarting 3h 4 web-1.17",
    ]
    api.put(node(labels={"node-role.kubernetes.io/worker": ""}, spec={"unschedulable": True},
                 status={"nodeInfo": {"kubeletVersion": "v1.36.2"}}))  # fmt: skip
    assert lines(kubectl("get", "nodes")) == [
        "NAME STATUS ROLES AGE VERSION",
        "node-1 Ready,SchedulingDisabled worker 5m v1.36.2",
    ]


def test_kubectl_decorates_a_table(api: RunningApi, kubectl: Kubectl) -> None:
    labelled = {"namespace": "shop", "labels": {"app": "web"}}
    api.put(made("ConfigMap", "settings", data={"a": "1"}, meta=labelled))
    assert lines(kubectl("get", "cm", "-A", "--show-labels")) == [
        "NAMESPACE NAME DATA AGE LABELS",
        "shop settings 1 5m app=web",
    ]
    assert lines(kubectl("get", "cm", "-n", "shop", "-L", "app", "--no-headers")) == [
        "settings 1 5m web"
    ]
    assert lines(kubectl("get", "cm", "-n", "empty")) == []


def test_kubectl_watches_a_table(api: RunningApi, kubectl: Kubectl) -> None:
    api.put(made("Lease", "leader", meta={"namespace": "watched"}))
    words = kubectl.command(["get", "lease", "-n", "watched", "-w"])
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, text=True, env=kubectl.environment
    ) as process:
        assert process.stdout is not None
        try:
            read = process.stdout.readline
            assert [read().split(), read().split()] == [["NAME", "HOLDER", "AGE"], ["leader", "5m"]]
            for holder in ("node-1", "node-2"):
                held = made("Lease", "leader", meta={"namespace": "watched"})
                api.put(held | {"spec": {"holderIdentity": holder}})
                assert read().split() == ["leader", holder, "5m"]
        finally:
            process.kill()
