"""Request bodies in protobuf (kdns/api/protobuf.py): what kubectl sends is read as what it means,
and whatever else is sent is refused with a 400."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdns.api.kinds import RESOURCES
from kdns.api.protobuf import decode_protobuf
from kdns.api.schema import Field, type_named
from kdns.api.strict import check_object
from kdns.errors import ApiError

# --- what kubectl 1.37.1 sent -----------------------------------------------------------------

RECORDED = {
    "create service clusterip web --tcp=80:8080 --tcp=443:https": (
        "azhzAAoNCgJ2MRIHU2VydmljZRKNAQofCgN3ZWISABoAIgAqADIAOABCAFoKCgNhcHASA3dlYhJmChsKBzgw"
        "LTgwODASA1RDUBhQIgcIABCQPxoAKAAKIgoJNDQzLWh0dHBzEgNUQ1AYuwMiCwgBEAAaBWh0dHBzKAASCgoD"
        "YXBwEgN3ZWIaACIJQ2x1c3RlcklQOgBCAFIAWgBgAGgAGgIKABoAIgA="
    ),
    "create service nodeport np --tcp=80 --node-port=30080": (
        "azhzAAoNCgJ2MRIHU2VydmljZRJhCh0KAm5wEgAaACIAKgAyADgAQgBaCQoDYXBwEgJucBI8ChcKAjgwEgNU"
        "Q1AYUCIGCAAQUBoAKIDrARIJCgNhcHASAm5wGgAiCE5vZGVQb3J0OgBCAFIAWgBgAGgAGgIKABoAIgA="
    ),
    "create service externalname ext --external-name=example.com": (
        "azhzAAoNCgJ2MRIHU2VydmljZRJaCh8KA2V4dBIAGgAiACoAMgA4AEIAWgoKA2FwcBIDZXh0EjMSCgoDYXBw"
        "EgNleHQaACIMRXh0ZXJuYWxOYW1lOgBCAFILZXhhbXBsZS5jb21aAGAAaAAaAgoAGgAiAA=="
    ),
    "create namespace shop": (
        "azhzAAoPCgJ2MRIJTmFtZXNwYWNlEhwKFAoEc2hvcBIAGgAiACoAMgA4AEIAEgAaAgoAGgAiAA=="
    ),
    "create deployment web --image=nginx:1 --replicas=0 --port=80": (
        "azhzAAoVCgdhcHBzL3YxEgpEZXBsb3ltZW50EroBCh8KA3dlYhIAGgAiACoAMgA4AEIAWgoKA2FwcBIDd2Vi"
        "EogBCAASDAoKCgNhcHASA3dlYhpuChwKABIAGgAiACoAMgA4AEIAWgoKA2FwcBIDd2ViEk4SMAoFbmdpbngS"
        "B25naW54OjEqADIKCgAQABhQIgAqAEIAagByAIABAIgBAJABAKIBABoAMgBCAEoAUgBYAGAAaACCAQCKAQCa"
        "AQDCAQAiAgoAKAA4ABoMCAAQABgAIAAoADgAGgAiAA=="
    ),
    "create configmap cm --from-literal=a=1 --from-literal=b=zwei": (
        "azhzAAoPCgJ2MRIJQ29uZmlnTWFwEicKEgoCY20SABoAIgAqADIAOABCABIGCgFhEgExEgkKAWISBHp3ZWkaACIA"
    ),
    "create secret generic s --from-literal=password=geheim": (
        "azhzAAoMCgJ2MRIGU2VjcmV0EikKEQoBcxIAGgAiACoAMgA4AEIAEhIKCHBhc3N3b3JkEgZnZWhlaW0aABoAIgA="
    ),
    "create sa builder": (
        "azhzAAoUCgJ2MRIOU2VydmljZUFjY291bnQSGQoXCgdidWlsZGVyEgAaACIAKgAyADgAQgAaACIA"
    ),
    "create service loadbalancer lb --tcp=80": (
        "azhzAAoNCgJ2MRIHU2VydmljZRJjCh0KAmxiEgAaACIAKgAyADgAQgBaCQoDYXBwEgJsYhI+ChUKAjgwEgNU"
        "Q1AYUCIGCAAQUBoAKAASCQoDYXBwEgJsYhoAIgxMb2FkQmFsYW5jZXI6AEIAUgBaAGAAaAAaAgoAGgAiAA=="
    ),
    "auth can-i get pods": (
        "azhzAAoyChdhdXRob3JpemF0aW9uLms4cy5pby92MRIXU2VsZlN1YmplY3RBY2Nlc3NSZXZpZXcSPAoQCgAS"
        "ABoAIgAqADIAOABCABIeChwKB2RlZmF1bHQSA2dldBoAIgAqBHBvZHMyADoAGggIABIAGgAgABoAIgA="
    ),
}
MEANT: dict[str, dict[str, Any]] = {
    "create service clusterip web --tcp=80:8080 --tcp=443:https": {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web", "labels": {"app": "web"}},
        "spec": {
            "ports": [
                {"name": "80-8080", "protocol": "TCP", "port": 80, "targetPort": 8080},
                {"name": "443-https", "protocol": "TCP", "port": 443, "targetPort": "https"},
            ],
            "selector": {"app": "web"},
            "type": "ClusterIP",
        },
        "status": {"loadBalancer": {}},
    },
    "create service nodeport np --tcp=80 --node-port=30080": {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "np", "labels": {"app": "np"}},
        "spec": {
            "ports": [
                {"name": "80", "protocol": "TCP", "port": 80, "targetPort": 80, "nodePort": 30080}
            ],
            "selector": {"app": "np"},
            "type": "NodePort",
        },
        "status": {"loadBalancer": {}},
    },
    "create service externalname ext --external-name=example.com": {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "ext", "labels": {"app": "ext"}},
        "spec": {"selector": {"app": "ext"}, "type": "ExternalName", "externalName": "example.com"},
        "status": {"loadBalancer": {}},
    },
    "create namespace shop": {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": "shop"},
        "spec": {},
        "status": {},
    },
    "create deployment web --image=nginx:1 --replicas=0 --port=80": {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "web", "labels": {"app": "web"}},
        "spec": {
            "replicas": 0,
            "selector": {"matchLabels": {"app": "web"}},
            "template": {
                "metadata": {"labels": {"app": "web"}},
                "spec": {
                    "containers": [
                        {
                            "name": "nginx",
                            "image": "nginx:1",
                            "ports": [{"containerPort": 80}],
                            "resources": {},
                        }
                    ]
                },
            },
            "strategy": {},
        },
        "status": {},
    },
    "create configmap cm --from-literal=a=1 --from-literal=b=zwei": {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "cm"},
        "data": {"a": "1", "b": "zwei"},
    },
    "create secret generic s --from-literal=password=geheim": {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "s"},
        "data": {"password": "Z2VoZWlt"},
    },
    "create sa builder": {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"name": "builder"},
    },
    "create service loadbalancer lb --tcp=80": {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "lb", "labels": {"app": "lb"}},
        "spec": {
            "ports": [{"name": "80", "protocol": "TCP", "port": 80, "targetPort": 80}],
            "selector": {"app": "lb"},
            "type": "LoadBalancer",
        },
        "status": {"loadBalancer": {}},
    },
    "auth can-i get pods": {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "metadata": {},
        "spec": {"resourceAttributes": {"namespace": "default", "verb": "get", "resource": "pods"}},
        "status": {"allowed": False},
    },
}


@pytest.mark.parametrize("command", RECORDED)
def test_reads_what_kubectl_sends(command: str) -> None:
    obj = decode_protobuf(base64.b64decode(RECORDED[command]))
    assert obj == MEANT[command]


# --- an encoder that knows the numbers by itself ----------------------------------------------


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def msg(*fields: tuple[int, int | str | bytes]) -> bytes:
    """Encode (number, value) pairs: numbers as varints, all else with its length."""
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            raw = value.encode() if isinstance(value, str) else value
            out += varint(number << 3 | 2) + varint(len(raw)) + raw
    return out


def body(raw: bytes, kind: str = "Service", api_version: str = "v1") -> bytes:
    return b"k8s\0" + msg((1, msg((1, api_version), (2, kind))), (2, raw))


def spec_of(raw: bytes, kind: str = "Service", api_version: str = "v1") -> Any:
    return decode_protobuf(body(msg((2, raw)), kind, api_version))["spec"]


def test_all_fields_of_a_service() -> None:
    meta = msg(
        (1, "web"), (2, "web-"), (3, "shop"), (5, "u-1"), (6, "17"), (7, 3),
        (8, msg((1, 1_700_000_000), (2, 0))), (10, 30), (11, msg((1, "app"), (2, "web"))),
        (12, msg((1, "note"), (2, ""))),
        (13, msg((1, "Deployment"), (3, "d"), (4, "u-0"), (5, "apps/v1"), (6, 1), (7, 0))),
        (14, "example.com/a"),
        (17, msg((1, "kubectl"), (2, "Update"), (3, "v1"), (6, "FieldsV1"),
                 (7, msg((1, '{"f:spec":{}}'))), (8, "status"))),
    )  # fmt: skip
    port = msg(
        (1, "http"), (2, "TCP"), (3, 80), (4, msg((1, 1), (2, 0), (3, "web"))), (5, 30080),
        (6, "kubernetes.io/h2c"),
    )  # fmt: skip
    spec = msg(
        (1, port), (2, msg((1, "app"), (2, "web"))), (3, "10.96.0.9"), (4, "LoadBalancer"),
        (5, "192.0.2.1"), (7, "ClientIP"), (8, "192.0.2.2"), (9, "192.0.2.0/24"), (10, "a.b"),
        (11, "Local"), (12, 31000), (13, 1), (14, msg((1, msg((1, 600))))), (17, "SingleStack"),
        (18, "10.96.0.9"), (19, "IPv4"), (20, 0), (21, "example.com/lb"), (22, "Cluster"),
        (23, "PreferSameZone"),
    )  # fmt: skip
    ingress = msg((1, "192.0.2.2"), (2, "lb.test"), (3, "VIP"),
                  (4, msg((1, 80), (2, "TCP"), (3, "none"))))  # fmt: skip
    condition = msg((1, "Ready"), (2, "True"), (3, 3), (4, msg((1, 1_700_000_000))), (5, "R"),
                    (6, "M"))  # fmt: skip
    status = msg((1, msg((1, ingress))), (2, condition))
    assert decode_protobuf(body(msg((1, meta), (2, spec), (3, status)))) == {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": "web", "generateName": "web-", "namespace": "shop", "uid": "u-1",
            "resourceVersion": "17", "generation": 3,
            "creationTimestamp": "2023-11-14T22:13:20Z", "deletionGracePeriodSeconds": 30,
            "labels": {"app": "web"}, "annotations": {"note": ""},
            "ownerReferences": [
                {"kind": "Deployment", "name": "d", "uid": "u-0", "apiVersion": "apps/v1",
                 "controller": True, "blockOwnerDeletion": False}
            ],
            "finalizers": ["example.com/a"],
            "managedFields": [
                {"manager": "kubectl", "operation": "Update", "apiVersion": "v1",
                 "fieldsType": "FieldsV1", "fieldsV1": {"f:spec": {}}, "subresource": "status"}
            ],
        },
        "spec": {
            "ports": [{"name": "http", "protocol": "TCP", "port": 80, "targetPort": "web",
                       "nodePort": 30080, "appProtocol": "kubernetes.io/h2c"}],
            "selector": {"app": "web"}, "clusterIP": "10.96.0.9", "type": "LoadBalancer",
            "externalIPs": ["192.0.2.1"], "sessionAffinity": "ClientIP",
            "loadBalancerIP": "192.0.2.2", "loadBalancerSourceRanges": ["192.0.2.0/24"],
            "externalName": "a.b", "externalTrafficPolicy": "Local",
            "healthCheckNodePort": 31000, "publishNotReadyAddresses": True,
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 600}},
            "ipFamilyPolicy": "SingleStack", "clusterIPs": ["10.96.0.9"], "ipFamilies": ["IPv4"],
            "allocateLoadBalancerNodePorts": False, "loadBalancerClass": "example.com/lb",
            "internalTrafficPolicy": "Cluster", "trafficDistribution": "PreferSameZone",
        },
        "status": {
            "loadBalancer": {"ingress": [
                {"ip": "192.0.2.2", "hostname": "lb.test", "ipMode": "VIP",
                 "ports": [{"port": 80, "protocol": "TCP", "error": "none"}]}]},
            "conditions": [{"type": "Ready", "status": "True", "observedGeneration": 3,
                            "lastTransitionTime": "2023-11-14T22:13:20Z", "reason": "R",
                            "message": "M"}],
        },
    }  # fmt: skip


def test_embedded_messages_of_a_pod_stand_one_level_up() -> None:
    probe = msg((1, msg((2, msg((1, "/ready"), (2, msg((1, 0), (2, 8080))))))), (2, 5), (7, 1))
    env = msg((1, "KEY"), (3, msg((4, msg((1, msg((1, "s"))), (2, "k"), (3, 0))))))
    limits = msg((1, "cpu"), (2, msg((1, "500m"))))
    container = msg((1, "c"), (7, env), (8, msg((1, limits))), (11, probe))
    volume = msg((1, "v"), (2, msg((19, msg((1, msg((1, "cm"))), (3, 420))))))
    security = msg((2, 0), (3, 0), (4, 5), (4, 6))
    pod = msg((1, volume), (2, container), (4, 0), (14, security), (25, -5))
    assert spec_of(pod, "Pod") == {
        "volumes": [{"name": "v", "configMap": {"name": "cm", "defaultMode": 420}}],
        "containers": [
            {"name": "c",
             "env": [{"name": "KEY", "valueFrom": {"secretKeyRef": {
                 "name": "s", "key": "k", "optional": False}}}],
             "resources": {"limits": {"cpu": "500m"}},
             "readinessProbe": {"httpGet": {"path": "/ready", "port": 8080},
                                "initialDelaySeconds": 5, "terminationGracePeriodSeconds": 1}}
        ],
        "terminationGracePeriodSeconds": 0,
        "securityContext": {"runAsUser": 0, "runAsNonRoot": False, "supplementalGroups": [5, 6]},
        "priority": -5,
    }  # fmt: skip


def test_endpointslice_lease_and_event() -> None:
    micro = msg((1, 1_700_000_000), (2, 250_000_999))
    endpoint = msg((1, "10.0.0.1"), (2, msg((1, 1), (2, 0))), (6, "n1"),
                   (8, msg((1, msg((1, "z"))), (2, msg((1, "n1"))))))  # fmt: skip
    raw = msg((2, endpoint), (3, msg((1, ""), (2, "UDP"), (3, 53))), (4, "IPv4"))
    found = decode_protobuf(body(raw, "EndpointSlice", "discovery.k8s.io/v1"))
    assert found["addressType"] == "IPv4"
    assert found["ports"] == [{"name": "", "protocol": "UDP", "port": 53}]
    assert found["endpoints"] == [
        {"addresses": ["10.0.0.1"], "conditions": {"ready": True, "serving": False},
         "nodeName": "n1", "hints": {"forZones": [{"name": "z"}], "forNodes": [{"name": "n1"}]}}
    ]  # fmt: skip
    lease = spec_of(msg((1, "me"), (2, 15), (4, micro)), "Lease", "coordination.k8s.io/v1")
    assert lease == {
        "holderIdentity": "me", "leaseDurationSeconds": 15,
        "renewTime": "2023-11-14T22:13:20.250000Z",
    }  # fmt: skip
    raw = msg((2, msg((1, "Pod"), (3, "p"))), (3, "Started"), (5, msg((1, "kubelet"))), (8, 2),
              (6, b""), (7, micro), (10, micro))  # fmt: skip
    event = decode_protobuf(body(raw, "Event"))
    assert event["involvedObject"] == {"kind": "Pod", "name": "p"}
    assert event["source"] == {"component": "kubelet"} and event["count"] == 2
    assert "firstTimestamp" not in event  # Go's zero time
    assert event["lastTimestamp"] == "2023-11-14T22:13:20Z"
    assert event["eventTime"] == "2023-11-14T22:13:20.250000Z"


@pytest.mark.parametrize(
    ("raw", "spec"),
    [
        # negative numbers take ten octets, as int32 and as int64
        (msg((12, -1)), {"healthCheckNodePort": -1}),
        (msg((12, 1 << 31)), {"healthCheckNodePort": -(1 << 31)}),
        (msg((12, -(1 << 31))), {"healthCheckNodePort": -(1 << 31)}),
        # empty values are left out, but for pointers
        (msg((3, ""), (12, 0), (13, 0)), {}),
        (msg((17, ""), (20, 0)), {"ipFamilyPolicy": "", "allocateLoadBalancerNodePorts": False}),
        (msg((14, b"")), {"sessionAffinityConfig": {}}),
        # the last one counts; messages that come in parts are put together
        (msg((3, "a"), (3, "b")), {"clusterIP": "b"}),
        (msg((3, "a"), (3, "")), {}),
        (msg((14, msg((1, b""))), (14, msg((1, msg((1, 5)))))),
         {"sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 5}}}),
        # fields nobody knows are skipped, whatever their wire type
        (msg((99, "x"), (98, 7)) + b"\x99\x06" + bytes(8) + b"\x9d\x06" + bytes(4) + msg((3, "a")),
         {"clusterIP": "a"}),
        (msg((536870911, 1)), {}),
        # keys and lengths in more octets than they need
        (b"\x9a\x80\x00\x81\x00a", {"clusterIP": "a"}),
        # map entries without key or value, or with what they have no use for
        (msg((2, b"")), {"selector": {"": ""}}),
        (msg((2, msg((2, "v"), (1, "k"), (3, "x")))), {"selector": {"k": "v"}}),
    ],
)  # fmt: skip
def test_reads_as_go_does(raw: bytes, spec: dict[str, Any]) -> None:
    assert spec_of(raw) == spec


def test_parts_of_an_object_are_put_together() -> None:
    raw = msg((2, msg((1, msg((3, 80))))), (2, msg((1, msg((3, 81))), (4, "NodePort"))))
    assert decode_protobuf(body(raw))["spec"] == {
        "ports": [{"port": 80}, {"port": 81}],
        "type": "NodePort",
    }


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (msg((1, 0), (2, 80)), 80),
        (msg((1, 0), (2, -1)), -1),
        (msg((1, 1), (2, 80), (3, "80")), "80"),
        (msg((3, "web")), None),  # a number, 0: as if not given
        (b"", None),
    ],
)
def test_numbers_or_strings(value: bytes, found: int | str | None) -> None:
    (port,) = spec_of(msg((1, msg((3, 80), (4, value)))))["ports"]
    assert port.get("targetPort") == found


@pytest.mark.parametrize("packed", [False, True])
def test_lists_of_numbers(packed: bool) -> None:
    numbers = [0, 7, -1, 1 << 40]
    raw = b"".join(map(varint, numbers))
    groups = msg((4, raw)) if packed else b"".join(msg((4, one)) for one in numbers)
    assert spec_of(msg((14, groups)), "Pod")["securityContext"] == {"supplementalGroups": numbers}


# --- what is refused --------------------------------------------------------------------------

SERVICE = base64.b64decode(next(iter(RECORDED.values())))


def refused(raw: bytes) -> str:
    with pytest.raises(ApiError) as caught:
        decode_protobuf(raw)
    assert (caught.value.code, caught.value.reason) == (400, "BadRequest")
    return str(caught.value)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "does not appear to be a protobuf message, expected prefix 6b 38 73 00"),
        (b"k8s", "does not appear to be a protobuf message"),
        (b'{"kind":"Service"}', "does not appear to be a protobuf message"),
        (b"k8s\0", 'no kind "" is registered for version ""'),
        (body(b"", "Widget"), 'no kind "Widget" is registered for version "v1"'),
        (body(b"", "Service", "v2"), 'no kind "Service" is registered for version "v2"'),
        (body(b"", "ServiceSpec"), 'no kind "ServiceSpec"'),
        (b"k8s\0" + msg((1, msg((1, "v1"), (2, "Service"))), (3, "gzip"), (2, b"")), "gzip"),
        (b"k8s\0" + msg((1, msg((1, "v1"), (2, "Service"))), (4, "application/json")),
         "application/json"),
        (b"k8s\0" + msg((1, msg((1, b"\xff"), (2, "Service")))), "not UTF-8"),
        (SERVICE[:-1], "a number does not end"),
        (SERVICE[:-9], "octets announced"),
        (body(b"\x12\xff\xff\xff\xff\x0f"), "octets announced"),
        (body(b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"), "octets announced"),
        (body(b"\x12\x05\x0a"), "octets announced"),
        (body(b"\x12"), "a number does not end"),
        (body(b"\x12" + b"\xff" * 11), "a number does not end"),
        (body(b"\x99\x06\x00"), "octets expected"),
        (body(b"\x9d\x06\x00"), "octets expected"),
        (body(b"\x02\x00"), "number 0"),
        (body(b"\x13\x14"), "wire type 3"),
        (body(b"\x16"), "wire type 6"),
        (body(b"\x17"), "wire type 7"),
        (body(msg((2, 1))), "spec has wire type 0, expected 2"),
        (body(msg((2, msg((12, "80"))))), "healthCheckNodePort has wire type 2, expected 0"),
        (body(msg((2, msg((13, b""))))), "publishNotReadyAddresses has wire type 2"),
        (body(msg((2, msg((2, 1))))), "selector has wire type 0"),
        (body(msg((2, msg((2, msg((1, 1))))))), "selector has wire type 0"),
        (body(msg((2, msg((3, b"\xc3("))))), "not UTF-8"),
        (body(msg((2, msg((1, msg((4, msg((1, "x"))))))))), "targetPort has wire type 2"),
        (body(msg((1, msg((8, msg((1, 1 << 62))))))), "none of years 1 to 9999"),
        (body(msg((1, msg((8, msg((1, 0), (2, -1))))))), "none of years 1 to 9999"),
        (body(msg((1, msg((17, msg((7, msg((1, "{"))))))))), "json parse error"),
        (body(msg((1, msg((17, msg((7, msg((1, "[" * 9999))))))))), "nested"),
    ],
)  # fmt: skip
def test_refuses_what_lies(raw: bytes, why: str) -> None:
    assert why in refused(raw)


def test_refuses_a_body_that_is_too_large() -> None:
    with pytest.raises(ApiError) as caught:
        decode_protobuf(body(msg((99, bytes(3 << 20)))))
    assert (caught.value.code, caught.value.reason) == (413, "RequestEntityTooLarge")


@pytest.mark.parametrize(
    "raw",
    [
        b"\x9a\x06\x00" * 1_000_000,  # fields nobody knows
        msg((2, b"\x0a\x00" * 1_000_000)),  # ports
        b"\x12\x00" * 1_000_000,  # parts of the spec
        msg((2, msg((2, b"\x1a\x00" * 1_000_000)))),  # inside of a map's entry
    ],
    ids=["unknown", "ports", "parts", "entry"],
)
def test_bounds_the_number_of_fields(raw: bytes) -> None:
    assert "more than 200000 fields" in refused(body(raw))


def test_bounds_packed_numbers() -> None:
    raw = msg((2, msg((14, msg((4, bytes(1_000_000)))))))
    assert "more than 200000 fields" in refused(body(raw, "Pod"))


def survives(raw: bytes) -> None:
    """Anything is an object or a 400, and an object is one that JSON can say."""
    try:
        obj = decode_protobuf(raw)
    except ApiError as e:
        assert e.code == 400
    else:
        assert json.loads(json.dumps(obj, allow_nan=False)) == obj


@pytest.mark.parametrize("number", [1, 2, 3, 99])
def test_messages_in_messages_are_followed_as_far_as_the_types_go(number: int) -> None:
    raw = b""
    for _ in range(1000):
        raw = msg((number, raw))
    for kind in ("Service", "Pod"):
        survives(body(raw, kind))


KINDS = [(r.kind, r.api_version) for r in RESOURCES]


@settings(deadline=None)
@given(st.binary(max_size=400), st.sampled_from(KINDS))
def test_random_bytes(raw: bytes, kind: tuple[str, str]) -> None:
    survives(b"k8s\0" + raw)
    survives(body(raw, *kind))


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(sorted(RECORDED)), st.data())
def test_damaged_bodies(command: str, data: st.DataObject) -> None:
    raw = bytearray(base64.b64decode(RECORDED[command]))
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, max(len(raw) - 1, 0)))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "drop"])):
            case "flip" if raw:
                raw[at] ^= 1 << data.draw(st.integers(0, 7))
            case "cut":
                del raw[at:]
            case "insert":
                raw[at:at] = data.draw(st.binary(min_size=1, max_size=12))
            case _:
                del raw[at : at + 3]
    survives(bytes(raw))


# --- there and back, for every kind -----------------------------------------------------------


def encode(type_name: str, obj: dict[str, Any]) -> bytes:
    """Encode an object by the table, as Go does."""
    out = b""
    for field in type_named(type_name).by_number.values():
        if field.inline:
            out += msg((field.number, encode(field.type, obj)))
            continue
        value = obj.get(field.name)
        if value is None:
            continue
        if field.shape == "map":
            for key, one in value.items():
                out += msg((field.number, msg((1, key), (2, encode_one(field, one)))))
        else:
            for one in value if field.shape == "list" else [value]:
                out += msg((field.number, encode_one(field, one)))
    return out


def encode_one(field: Field, value: Any) -> int | str | bytes:
    match field.type:
        case "string" | "int32" | "int64" | "bool":
            return value  # type: ignore[no-any-return]
        case "bytes":
            return base64.b64decode(value)
        case "quantity":
            return msg((1, value))
        case "intorstring":
            if isinstance(value, str):
                return msg((1, 1), (2, 0), (3, value))
            return msg((1, 0), (2, value), (3, ""))
        case "time":
            return msg((1, 1_700_000_000), (2, 0))
        case "microtime":
            return msg((1, 1_700_000_000), (2, 5000))
        case "fieldsv1":
            return msg((1, json.dumps(value)))
        case "strings":
            return msg(*((1, one) for one in value))
    return encode(field.type, value)


TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=5)
SCALAR_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "string": TEXT,
    "int32": st.integers(-(1 << 31), (1 << 31) - 1).filter(bool),
    "int64": st.integers(-(1 << 63), (1 << 63) - 1).filter(bool),
    "bool": st.just(True),
    "bytes": st.binary(min_size=1, max_size=5).map(lambda raw: base64.b64encode(raw).decode()),
    "time": st.just("2023-11-14T22:13:20Z"),
    "microtime": st.just("2023-11-14T22:13:20.000005Z"),
    "quantity": st.sampled_from(["1", "250m", "64Mi", "1e9"]),
    "intorstring": st.one_of(TEXT, st.integers(1, 65535)),
    "fieldsv1": st.just({"f:spec": {"f:type": {}}}),
    "strings": st.lists(TEXT, min_size=1, max_size=2),
}


def draw_object(type_name: str, data: st.DataObject, depth: int) -> dict[str, Any]:
    fields: Sequence[Field] = [f for f in type_named(type_name).fields.values() if f.number]
    if depth == 0:
        fields = [f for f in fields if f.scalar]
    chosen = data.draw(st.lists(st.sampled_from(fields), max_size=4, unique=True)) if fields else []
    found: dict[str, Any] = {}
    for field in chosen:

        def one(field: Field = field) -> Any:
            if field.scalar:
                return data.draw(SCALAR_VALUES[field.type])
            return draw_object(field.type, data, depth - 1)

        count = data.draw(st.integers(1, 2))
        if field.shape == "list":
            found[field.name] = [one() for _ in range(count)]
        elif field.shape == "map":
            found[field.name] = {data.draw(TEXT): one() for _ in range(count)}
        else:
            found[field.name] = one()
    return found


OBJECTS = [
    *((r.type, r.kind, r.api_version) for r in RESOURCES),
    ("autoscaling/v1.Scale", "Scale", "autoscaling/v1"),
    ("policy/v1.Eviction", "Eviction", "policy/v1"),
    ("meta/v1.DeleteOptions", "DeleteOptions", "v1"),
    ("authentication.k8s.io/v1.SelfSubjectReview", "SelfSubjectReview", "authentication.k8s.io/v1"),
]


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(OBJECTS), st.data())
def test_every_kind_there_and_back(kind: tuple[str, str, str], data: st.DataObject) -> None:
    type_name, word, api_version = kind
    obj = draw_object(type_name, data, 6)
    found = decode_protobuf(body(encode(type_name, obj), word, api_version))
    assert found == {"apiVersion": api_version, "kind": word, **obj}
    assert check_object(type_name, found).problems == []
