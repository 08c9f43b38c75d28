"""What an object holds where its maker said nothing, and what a change of it keeps and drops."""

from __future__ import annotations

import base64
import copy
import json
import random
from pathlib import Path

import pytest
from api_writes import (
    Obj,
    changed,
    filled,
    make,
    pod_template,
    resource_of,
    service,
    workload,
    written,
)

from kdns.api.allocate import Allocator
from kdns.api.defaults import image_tag, quality_of, set_defaults
from kdns.api.validation import validate

GOLDEN = json.loads((Path(__file__).parent / "golden" / "cluster.json").read_text())["items"]
RECORDED = [obj for obj in GOLDEN if obj["kind"] == "Service"]


# --- Services -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({}, {"type": "ClusterIP", "sessionAffinity": "None", "internalTrafficPolicy": "Cluster"}),
        ({}, {"ports": [{"port": 80, "protocol": "TCP", "targetPort": 80}]}),
        (
            {"ports": [{"port": 53, "protocol": "UDP", "targetPort": "dns"}]},
            {"ports": [{"port": 53, "protocol": "UDP", "targetPort": "dns"}]},
        ),
        (
            {"sessionAffinity": "ClientIP"},
            {"sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 10800}}},
        ),
        (
            {"sessionAffinity": "None", "sessionAffinityConfig": {"clientIP": {}}},
            {"sessionAffinityConfig": None},
        ),
        ({}, {"externalTrafficPolicy": None, "allocateLoadBalancerNodePorts": None}),
        ({"type": "NodePort"}, {"externalTrafficPolicy": "Cluster"}),
        ({"externalIPs": ["192.0.2.1"]}, {"externalTrafficPolicy": "Cluster"}),
        (
            {"type": "LoadBalancer"},
            {"externalTrafficPolicy": "Cluster", "allocateLoadBalancerNodePorts": True},
        ),
        (
            {"type": "LoadBalancer", "allocateLoadBalancerNodePorts": False},
            {"allocateLoadBalancerNodePorts": False},
        ),
        ({"type": "ExternalName"}, {"internalTrafficPolicy": None, "clusterIPs": None}),
        ({"clusterIP": "None"}, {"clusterIPs": ["None"]}),
    ],
)
def test_a_service_is_filled_in(spec: Obj, expected: Obj) -> None:
    found = filled(service(**spec))["spec"]
    assert {key: found.get(key) for key in expected} == expected


@pytest.mark.parametrize("obj", RECORDED, ids=lambda obj: obj["metadata"]["name"])
def test_a_service_becomes_what_a_cluster_made_of_it(obj: Obj) -> None:
    """Take from a recorded Service what a cluster filled in: it is filled in the same way."""
    spec = copy.deepcopy(obj["spec"])
    for key, value in (
        ("type", "ClusterIP"), ("sessionAffinity", "None"), ("internalTrafficPolicy", "Cluster"),
        ("externalTrafficPolicy", "Cluster"), ("allocateLoadBalancerNodePorts", True),
    ):  # fmt: skip
        if spec.get(key) == value:
            del spec[key]
    if spec.get("ipFamilyPolicy") == "SingleStack":
        del spec["ipFamilyPolicy"], spec["ipFamilies"]
    if len(spec.get("clusterIPs", ())) == 1:
        del spec["clusterIPs"]
    for port in spec.get("ports", ()):
        if port["protocol"] == "TCP":
            del port["protocol"]
        if port["targetPort"] == port["port"]:
            del port["targetPort"]
    allocator = Allocator(("10.96.0.0/16", "fd00:10:96::/112"), rng=random.Random(7))
    meta = {key: obj["metadata"][key] for key in ("name", "namespace")}
    made = {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": spec}
    assert written(allocator, made)["spec"] == obj["spec"]


@pytest.mark.parametrize("obj", GOLDEN, ids=lambda obj: f"{obj['kind']}-{obj['metadata']['name']}")
def test_what_a_cluster_holds_is_valid_here(obj: Obj) -> None:
    new = copy.deepcopy(obj)
    set_defaults(resource_of(new), new)
    assert validate(resource_of(new), new, None) == []
    assert validate(resource_of(new), new, copy.deepcopy(new)) == []
    if obj["kind"] != "Pod":  # Pods were trimmed when they were recorded
        assert new == obj


@pytest.mark.parametrize(
    ("before", "change", "expected"),
    [
        # The same manifest sent again keeps what was given out.
        ({"clusterIP": "10.96.0.5"}, {"clusterIP": None, "clusterIPs": None}, ("10.96.0.5", 1)),
        # Old clients know clusterIP only.
        ({"clusterIP": "10.96.0.5"}, {"clusterIPs": None}, ("10.96.0.5", 1)),
        ({"clusterIP": "10.96.0.5"}, {"clusterIP": "10.96.0.6"}, ("10.96.0.6", 1)),
        ({"clusterIP": "10.96.0.5"}, {"type": "ExternalName"}, (None, 0)),
        # What was changed with the type is left for validation to refuse.
        (
            {"clusterIP": "10.96.0.5"},
            {"type": "ExternalName", "clusterIP": "10.96.0.6"},
            ("10.96.0.6", 1),
        ),
    ],
)
def test_cluster_ips_follow_a_change(
    before: Obj, change: Obj, expected: tuple[str | None, int]
) -> None:
    old = filled(service(**before))
    found = filled(changed(old, **change), old)["spec"]
    address, count = expected
    assert (found.get("clusterIP"), len(found.get("clusterIPs") or ())) == (address, count)


@pytest.mark.parametrize(
    ("before", "change", "dropped"),
    [
        (
            {"type": "NodePort", "ports": [{"port": 80, "nodePort": 30080}]},
            {"type": "ClusterIP"},
            {"nodePort", "externalTrafficPolicy"},
        ),
        (
            {"type": "NodePort", "ports": [{"port": 80, "nodePort": 30080}]},
            {"type": "ClusterIP", "ports": [{"port": 80, "nodePort": 30081}]},
            {"externalTrafficPolicy"},
        ),
        (
            {"type": "LoadBalancer", "loadBalancerClass": "example.com/a"},
            {"type": "NodePort"},
            {"loadBalancerClass", "allocateLoadBalancerNodePorts"},
        ),
        (
            {"type": "LoadBalancer", "loadBalancerClass": "example.com/a"},
            {"type": "NodePort", "loadBalancerClass": "example.com/b"},
            {"allocateLoadBalancerNodePorts"},
        ),
        (
            {
                "type": "LoadBalancer",
                "externalTrafficPolicy": "Local",
                "healthCheckNodePort": 30099,
            },
            {"externalTrafficPolicy": "Cluster"},
            {"healthCheckNodePort"},
        ),
    ],
)
def test_a_new_type_drops_what_it_has_no_use_for(
    before: Obj, change: Obj, dropped: set[str]
) -> None:
    old = filled(service(**before))
    asked = changed(old, **change)
    found = filled(asked, old)

    def keys(obj: Obj) -> set[str]:
        return {*obj["spec"], *obj["spec"]["ports"][0]}

    assert keys(asked) - keys(found) == dropped


def test_a_load_balancers_address_goes_with_its_type() -> None:
    old = filled(service(type="LoadBalancer"))
    old["status"] = {"loadBalancer": {"ingress": [{"ip": "203.0.113.1", "ipMode": "VIP"}]}}
    assert filled(changed(old, type="LoadBalancer"), old)["status"] == old["status"]
    assert filled(changed(old, type="ClusterIP"), old)["status"] == {"loadBalancer": {}}


# --- other kinds -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "tag", "policy"),
    [
        ("nginx", "latest", "Always"),
        ("nginx:latest", "latest", "Always"),
        ("nginx:1.29", "1.29", "IfNotPresent"),
        ("localhost:5000/nginx", "latest", "Always"),
        ("localhost:5000/nginx:1", "1", "IfNotPresent"),
        ("nginx@sha256:" + "0" * 64, "", "IfNotPresent"),
        ("nginx:1@sha256:" + "0" * 64, "1", "IfNotPresent"),
    ],
)
def test_an_image_without_a_tag_is_the_latest(image: str, tag: str, policy: str) -> None:
    assert image_tag(image) == tag
    spec = {"containers": [{"name": "web", "image": image}]}
    container = filled(make("Pod", spec=spec))["spec"]["containers"][0]
    assert container["imagePullPolicy"] == policy


def test_a_pod_is_filled_in() -> None:
    field = {"fieldPath": "metadata.name"}
    container = {
        "name": "web",
        "image": "nginx:1",
        "ports": [{"containerPort": 80}],
        "readinessProbe": {"httpGet": {"port": 80}},
        "env": [{"name": "A", "valueFrom": {"fieldRef": field}}],
    }
    volumes = [{"name": "a"}, {"name": "b", "configMap": {"name": "c"}}]
    pod = filled(make("Pod", spec={"containers": [container], "volumes": volumes}))
    assert pod["spec"] == {
        "containers": [
            {
                **container,
                "ports": [{"containerPort": 80, "protocol": "TCP"}],
                "readinessProbe": {
                    "httpGet": {"port": 80, "path": "/", "scheme": "HTTP"},
                    "timeoutSeconds": 1,
                    "periodSeconds": 10,
                    "successThreshold": 1,
                    "failureThreshold": 3,
                },
                "env": [
                    {
                        "name": "A",
                        "valueFrom": {
                            "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.name"}
                        },
                    }
                ],
                "imagePullPolicy": "IfNotPresent",
                "resources": {},
                "terminationMessagePath": "/dev/termination-log",
                "terminationMessagePolicy": "File",
            }
        ],
        "volumes": [
            {"name": "a", "emptyDir": {}},
            {"name": "b", "configMap": {"name": "c", "defaultMode": 420}},
        ],
        "dnsPolicy": "ClusterFirst",
        "enableServiceLinks": True,
        "preemptionPolicy": "PreemptLowerPriority",
        "priority": 0,
        "restartPolicy": "Always",
        "schedulerName": "default-scheduler",
        "securityContext": {},
        "serviceAccount": "default",
        "serviceAccountName": "default",
        "terminationGracePeriodSeconds": 30,
        "tolerations": [
            {"effect": "NoExecute", "key": key, "operator": "Exists", "tolerationSeconds": 300}
            for key in ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
        ],
    }
    assert pod["status"] == {"phase": "Pending", "qosClass": "BestEffort"}
    assert pod["metadata"]["generation"] == 1


@pytest.mark.parametrize(
    ("resources", "quality"),
    [
        ({}, "BestEffort"),
        ({"requests": {"cpu": "100m"}}, "Burstable"),
        ({"limits": {"cpu": "1"}}, "Burstable"),
        ({"limits": {"cpu": "1", "memory": "1Gi"}}, "Guaranteed"),
        (
            {"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "1000m"}},
            "Guaranteed",
        ),
        ({"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "500m"}}, "Burstable"),
    ],
)
def test_a_pods_quality_of_service(resources: Obj, quality: str) -> None:
    assert quality_of({"containers": [{"name": "web", "resources": resources}]}) == quality


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            "Deployment",
            {
                "replicas": 1,
                "strategy": {
                    "type": "RollingUpdate",
                    "rollingUpdate": {"maxUnavailable": "25%", "maxSurge": "25%"},
                },
                "revisionHistoryLimit": 10,
                "progressDeadlineSeconds": 600,
            },
        ),
        ("ReplicaSet", {"replicas": 1}),
        (
            "StatefulSet",
            {
                "replicas": 1,
                "podManagementPolicy": "OrderedReady",
                "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"partition": 0}},
                "revisionHistoryLimit": 10,
                "persistentVolumeClaimRetentionPolicy": {
                    "whenDeleted": "Retain",
                    "whenScaled": "Retain",
                },
            },
        ),
    ],
)
def test_a_workload_is_filled_in(kind: str, expected: Obj) -> None:
    found = filled(workload(kind))["spec"]
    assert {k: v for k, v in found.items() if k not in ("selector", "template")} == expected
    inner = found["template"]["spec"]
    assert inner["dnsPolicy"] == "ClusterFirst"
    # These are a Pod's own, and no template's.
    assert not {"enableServiceLinks", "serviceAccountName", "tolerations"} & set(inner)


def test_recreate_has_no_rolling_update() -> None:
    strategy = filled(workload("Deployment", strategy={"type": "Recreate"}))["spec"]["strategy"]
    assert strategy == {"type": "Recreate"}


def test_a_namespace_is_filled_in() -> None:
    found = filled(make("Namespace", "blue"))
    assert found["metadata"]["labels"] == {"kubernetes.io/metadata.name": "blue"}
    assert found["spec"] == {"finalizers": ["kubernetes"]}
    assert found["status"] == {"phase": "Active"}
    # A replace that says nothing of finalizers does not let go of the namespace; [] does.
    assert filled(make("Namespace", "blue"), found)["spec"] == {"finalizers": ["kubernetes"]}
    gone = make("Namespace", "blue", spec={"finalizers": []})
    assert filled(gone, found)["spec"] == {"finalizers": []}


def test_a_secrets_text_becomes_base64() -> None:
    said = make("Secret", data={"a": "eA==", "b": "eA=="}, stringData={"b": "hélló"})
    found = filled(said)
    assert "stringData" not in found
    assert found["type"] == "Opaque"
    assert found["data"] == {"a": "eA==", "b": base64.b64encode("hélló".encode()).decode()}


def test_ports_of_endpoints_are_tcp() -> None:
    subset = {"addresses": [{"ip": "10.0.0.1"}], "ports": [{"port": 80}]}
    assert filled(make("Endpoints", subsets=[subset]))["subsets"][0]["ports"] == [
        {"port": 80, "protocol": "TCP"}
    ]
    found = filled(make("EndpointSlice", addressType="IPv4", endpoints=[], ports=[{"port": 80}]))
    assert found["ports"] == [{"name": "", "port": 80, "protocol": "TCP"}]


# --- generations -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "generation"),
    [
        (lambda obj: None, 1),
        (lambda obj: obj["spec"].pop("replicas"), 1),  # the default comes again
        (lambda obj: obj["spec"].update(replicas=3), 2),
        (lambda obj: obj["metadata"].update(labels={"a": "b"}), 1),
        (lambda obj: obj["metadata"].update(annotations={"a": "b"}), 2),
        (
            lambda obj: obj["metadata"].update(
                annotations={"deployment.kubernetes.io/revision": "1"}
            ),
            1,
        ),
    ],
)
def test_a_deployments_generation_counts_what_its_controller_acts_on(
    change: object, generation: int
) -> None:
    old = filled(workload("Deployment"))
    new = copy.deepcopy(old)
    assert callable(change)
    change(new)
    assert filled(new, old)["metadata"]["generation"] == generation


def test_a_slices_generation_counts_all_but_metadata() -> None:
    old = filled(make("EndpointSlice", addressType="IPv4", endpoints=[]))
    new = copy.deepcopy(old)
    new["metadata"]["labels"] = {"a": "b"}
    assert filled(new, old)["metadata"]["generation"] == 1
    new["endpoints"] = [{"addresses": ["10.0.0.1"]}]
    assert filled(new, old)["metadata"]["generation"] == 2


@pytest.mark.parametrize(
    "obj",
    [
        service(type="LoadBalancer", sessionAffinity="ClientIP"),
        make("Pod", spec=pod_template()["spec"]),
        workload("Deployment"),
        workload("StatefulSet"),
        make("Namespace", "blue"),
        make("Secret", stringData={"a": "b"}),
        make("EndpointSlice", addressType="IPv4", ports=[{"port": 1}]),
    ],
    ids=lambda obj: obj["kind"],
)
def test_what_is_filled_in_stays_as_it_is(obj: Obj) -> None:
    once = filled(obj)
    assert filled(once, once) == once
