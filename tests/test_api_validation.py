"""What is refused, and in which words: those of Kubernetes 1.36."""

from __future__ import annotations

import base64
import copy
from collections.abc import Callable
from typing import Any

import pytest
from api_writes import (
    KINDS,
    Obj,
    changed,
    filled,
    make,
    pod_template,
    problems,
    service,
    warned,
    workload,
)
from hypothesis import given
from hypothesis import strategies as st

from kdns.api.validation import validate
from kdns.api.validation_fields import address, cidr, dns_label, qualified_name, subdomain

LABEL = (
    "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must"
    " start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for"
    " validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')"
)
SUBDOMAIN = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.',"
    " and must start and end with an alphanumeric character (e.g. 'example.com', regex used for"
    " validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')"
)
NAME_PART = (
    "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end"
    " with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for"
    " validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')"
)
LABEL_VALUE = (
    "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.',"
    " and must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or"
    " '12345', regex used for validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')"
)
RANGE = "must be between 1 and 65535, inclusive"
BAD_IP = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"
PORT = {"port": 80}


# --- names and metadata ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("Service", "my_svc", f'Invalid value: "my_svc": {LABEL}'),
        ("Service", "a.b", 'Invalid value: "a.b": must not contain dots'),
        ("Service", "a" * 64, f'Invalid value: "{"a" * 64}": must be no more than 63 characters'),
        ("Service", "1st", ""),  # KEP-5311, on by default since 1.36
        ("Namespace", "Blue", f'Invalid value: "Blue": {LABEL}'),
        ("StatefulSet", "a.b", 'Invalid value: "a.b": must not contain dots'),
        ("ConfigMap", "My", f'Invalid value: "My": {SUBDOMAIN}'),
        ("ConfigMap", "a.b", ""),
        ("ConfigMap", "kube-root-ca.crt", ""),
        ("Pod", "-a", f'Invalid value: "-a": {SUBDOMAIN}'),
        ("Node", "a" * 254, f'Invalid value: "{"a" * 254}": must be no more than 253 characters'),
    ],
)
def test_names(kind: str, name: str, message: str) -> None:
    parts: Obj = {}
    if kind == "Service":
        parts = {"spec": {"ports": [PORT]}}
    elif kind in ("StatefulSet", "Pod"):
        parts = workload(kind) if kind != "Pod" else {"spec": pod_template()["spec"]}
        parts = {"spec": parts["spec"]}
    found = problems(make(kind, name, **parts))
    assert found == ([f"metadata.name: {message}"] if message else [])


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        ({"labels": {"a/b/c": "x"}}, None),
        ({"labels": {"-a": "x"}}, [f'metadata.labels: Invalid value: "-a": {NAME_PART}']),
        ({"labels": {"a": "b c"}}, [f'metadata.labels: Invalid value: "b c": {LABEL_VALUE}']),
        (
            {"labels": {"a": "b" * 64}},
            [
                f'metadata.labels: Invalid value: "{"b" * 64}": must be no more than 63 bytes',
            ],
        ),
        (
            {"labels": {"Example.com/a": "b"}},
            [f'metadata.labels: Invalid value: "Example.com/a": prefix part {SUBDOMAIN}'],
        ),
        ({"annotations": {"Example.com/A": "anything { goes }"}}, []),
        (
            {"annotations": {"a": "x" * (256 * 1024)}},
            ["metadata.annotations: Too long: may not be more than 262144 bytes"],
        ),
        (
            {"finalizers": ["tidy"]},
            [
                'metadata.finalizers[0]: Invalid value: "tidy": name is neither a standard'
                " finalizer name nor is it fully qualified"
            ],
        ),
        ({"finalizers": ["example.com/tidy", "foregroundDeletion"]}, []),
        (
            {"ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": "p"}]},
            ["metadata.ownerReferences[0].uid: Required value: must not be empty"],
        ),
        ({"generateName": "web-"}, []),
    ],
)
def test_metadata(meta: Obj, expected: list[str] | None) -> None:
    found = problems(make("ConfigMap", metadata=meta))
    if expected is None:
        assert len(found) == 1
        assert (
            "with an optional DNS subdomain prefix and '/' (e.g. 'example.com/MyName')" in found[0]
        )
    else:
        assert found == expected


def test_only_one_owner_may_be_the_controller() -> None:
    owner = {"apiVersion": "apps/v1", "kind": "ReplicaSet", "uid": "1", "controller": True}
    owners = [{**owner, "name": "a"}, {**owner, "name": "b"}]
    (found,) = problems(make("ConfigMap", metadata={"ownerReferences": owners}))
    assert found.endswith(
        'Only one reference can have Controller set to true. Found "true" in references for'
        " ReplicaSet/a and ReplicaSet/b"
    )


def test_no_finalizer_is_added_to_what_is_going() -> None:
    old = make("ConfigMap", metadata={"deletionTimestamp": "2026-01-01T00:00:00Z"})
    new = copy.deepcopy(old)
    new["metadata"]["finalizers"] = ["example.com/late"]
    assert problems(new, old) == [
        "metadata.finalizers: Forbidden: no new finalizers can be added if the object is being"
        ' deleted, found new finalizers []string{"example.com/late"}'
    ]


# --- Services -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"ports": []}, ["spec.ports: Required value"]),
        ({"ports": [], "clusterIP": "None"}, []),
        ({"ports": [{"port": 0}]}, [f"spec.ports[0].port: Invalid value: 0: {RANGE}",
                                    f"spec.ports[0].targetPort: Invalid value: 0: {RANGE}"]),
        (
            {"ports": [{"port": 65536, "targetPort": 80}]},
            [f"spec.ports[0].port: Invalid value: 65536: {RANGE}"],
        ),
        (
            {"ports": [{"port": 80, "protocol": "HTTP"}]},
            [
                'spec.ports[0].protocol: Unsupported value: "HTTP": supported values: "SCTP",'
                ' "TCP", "UDP"'
            ],
        ),
        (
            {"ports": [{"port": 80}, {"port": 81}]},
            ["spec.ports[0].name: Required value", "spec.ports[1].name: Required value"],
        ),
        (
            {"ports": [{"name": "a", "port": 80}, {"name": "a", "port": 81}]},
            ['spec.ports[1].name: Duplicate value: "a"'],
        ),
        (
            {"ports": [{"name": "a", "port": 80}, {"name": "b", "port": 80}]},
            [
                'spec.ports[1]: Duplicate value: {"Name":"","Protocol":"TCP","AppProtocol":null,'
                '"Port":80,"TargetPort":0,"NodePort":0}'
            ],
        ),
        (
            {"ports": [{"name": "a", "port": 53}, {"name": "b", "port": 53, "protocol": "UDP"}]},
            [],
        ),
        (
            {"ports": [{"name": "My_Port", "port": 80}]},
            [f'spec.ports[0].name: Invalid value: "My_Port": {LABEL}'],
        ),
        (
            {"ports": [{"port": 80, "targetPort": "a-name-too-long-"}]},
            [
                'spec.ports[0].targetPort: Invalid value: "a-name-too-long-": must be no more than'
                " 15 characters",
                'spec.ports[0].targetPort: Invalid value: "a-name-too-long-": must not begin or'
                " end with a hyphen",
            ],
        ),
        (
            {"ports": [{"port": 80, "nodePort": 30080}]},
            ["spec.ports[0].nodePort: Forbidden: may not be used when `type` is 'ClusterIP'"],
        ),
        (
            {
                "type": "NodePort",
                "ports": [
                    {"name": "a", "port": 80, "nodePort": 30080},
                    {"name": "b", "port": 81, "nodePort": 30080},
                ],
            },
            ["spec.ports[1].nodePort: Duplicate value: 30080"],
        ),
        (
            {"type": "External"},
            [
                'spec.type: Unsupported value: "External": supported values: "ClusterIP",'
                ' "ExternalName", "LoadBalancer", "NodePort"'
            ],
        ),
        (
            {"type": "NodePort", "clusterIP": "None"},
            [
                'spec.clusterIPs[0]: Invalid value: "None": may not be set to \'None\' for NodePort'
                " services"
            ],
        ),
        (
            {"type": "LoadBalancer", "clusterIP": "None"},
            [
                'spec.clusterIPs[0]: Invalid value: "None": may not be set to \'None\' for'
                " LoadBalancer services"
            ],
        ),
        ({"type": "ExternalName", "ports": []}, ["spec.externalName: Required value"]),
        (
            {"type": "ExternalName", "externalName": "My Name"},
            [f'spec.externalName: Invalid value: "My Name": {SUBDOMAIN}'],
        ),
        ({"type": "ExternalName", "externalName": "example.com."}, []),
        (
            {"type": "ExternalName", "externalName": "a.b", "clusterIP": "10.96.0.5"},
            ["spec.clusterIPs: Forbidden: may not be set for ExternalName services"],
        ),
        (
            {"selector": {"app": "b c"}},
            [f'spec.selector: Invalid value: "b c": {LABEL_VALUE}'],
        ),
        (
            {"sessionAffinity": "Cookie"},
            [
                'spec.sessionAffinity: Unsupported value: "Cookie": supported values: "ClientIP",'
                ' "None"'
            ],
        ),
        (
            {
                "sessionAffinity": "ClientIP",
                "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 86401}},
            },
            [
                "spec.sessionAffinityConfig.clientIP.timeoutSeconds: Invalid value: 86401: must be"
                " greater than 0 and less than 86400"
            ],
        ),
        ({"externalIPs": ["one"]}, [f'spec.externalIPs[0]: Invalid value: "one": {BAD_IP}']),
        (
            {"externalIPs": ["127.0.0.1"]},
            [
                'spec.externalIPs[0]: Invalid value: "127.0.0.1": may not be in the loopback range'
                " (127.0.0.0/8, ::1/128)"
            ],
        ),
        (
            {"externalIPs": ["010.1.2.3"]},
            ['spec.externalIPs[0]: Invalid value: "010.1.2.3": must not have leading 0s'],
        ),
        (
            {"loadBalancerSourceRanges": ["10.0.0.0/8"]},
            [
                "spec.LoadBalancerSourceRanges: Forbidden: may only be used when `type` is"
                " 'LoadBalancer'"
            ],
        ),
        (
            {"type": "LoadBalancer", "loadBalancerSourceRanges": ["10.0.0.0"]},
            [
                'spec.LoadBalancerSourceRanges[0]: Invalid value: "10.0.0.0": must be a valid CIDR'
                " value, (e.g. 10.9.8.0/24 or 2001:db8::/64)"
            ],
        ),
        (
            {"type": "LoadBalancer", "loadBalancerSourceRanges": [" 10.0.0.1/8"]},
            [
                'spec.LoadBalancerSourceRanges[0]: Invalid value: "10.0.0.1/8": must not have bits'
                " set beyond the prefix length"
            ],
        ),
        (
            {"loadBalancerClass": "example.com/a"},
            ["spec.loadBalancerClass: Forbidden: may only be used when `type` is 'LoadBalancer'"],
        ),
        (
            {"allocateLoadBalancerNodePorts": True},
            [
                "spec.allocateLoadBalancerNodePorts: Forbidden: may only be used when `type` is"
                " 'LoadBalancer'"
            ],
        ),
        (
            {"externalTrafficPolicy": "Local"},
            [
                'spec.externalTrafficPolicy: Invalid value: "Local": may only be set for'
                " externally-accessible services"
            ],
        ),
        (
            {"type": "NodePort", "externalTrafficPolicy": "Near"},
            [
                'spec.externalTrafficPolicy: Unsupported value: "Near": supported values:'
                ' "Cluster", "Local"'
            ],
        ),
        (
            {"internalTrafficPolicy": "Near"},
            [
                'spec.internalTrafficPolicy: Unsupported value: "Near": supported values:'
                ' "Cluster", "Local"'
            ],
        ),
        (
            {"healthCheckNodePort": 30099},
            [
                "spec.healthCheckNodePort: Invalid value: 30099: may only be set when `type` is"
                " 'LoadBalancer' and `externalTrafficPolicy` is 'Local'"
            ],
        ),
        (
            {"trafficDistribution": "Near"},
            [
                'spec.trafficDistribution: Unsupported value: "Near": supported values:'
                ' "PreferClose", "PreferSameNode", "PreferSameZone"'
            ],
        ),
        ({"trafficDistribution": "PreferSameNode"}, []),
        (
            {"clusterIP": "10.96.0.5", "clusterIPs": ["10.96.0.6"]},
            [
                'spec.clusterIPs: Invalid value: ["10.96.0.6"]: first value must match `clusterIP`'
            ],
        ),
        (
            {"clusterIPs": ["10.96.0.6"]},
            [
                'spec.clusterIPs: Invalid value: ["10.96.0.6"]: must be empty when `clusterIP` is'
                " not specified"
            ],
        ),
        ({"clusterIP": "ten"}, [f'spec.clusterIPs[0]: Invalid value: "ten": {BAD_IP}']),
        (
            {"clusterIP": "None", "clusterIPs": ["None", "fd00::1"]},
            [
                'spec.clusterIPs: Invalid value: ["None","fd00::1"]: \'None\' must be the first and'
                " only value"
            ],
        ),
        (
            {"clusterIP": "10.96.0.5", "clusterIPs": ["10.96.0.5", "10.96.0.6"]},
            [
                'spec.clusterIPs: Invalid value: ["10.96.0.5","10.96.0.6"]: may specify no more'
                " than one IP for each IP family"
            ],
        ),
        (
            {"clusterIP": "10.96.0.5", "ipFamilies": ["IPv6"]},
            [
                'spec.clusterIPs[0]: Invalid value: "10.96.0.5": expected an IPv6 value as'
                " indicated by `ipFamilies[0]`"
            ],
        ),
        (
            {"ipFamilies": ["IPv5"]},
            ['spec.ipFamilies[0]: Unsupported value: "IPv5": supported values: "IPv4", "IPv6"'],
        ),
        (
            {"ipFamilies": ["IPv4", "IPv4"]},
            ['spec.ipFamilies[1]: Duplicate value: "IPv4"'],
        ),
        (
            {"ipFamilyPolicy": "Both"},
            [
                'spec.ipFamilyPolicy: Unsupported value: "Both": supported values:'
                ' "PreferDualStack", "RequireDualStack", "SingleStack"'
            ],
        ),
    ],
)  # fmt: skip
def test_a_service_is_refused(spec: Obj, expected: list[str]) -> None:
    assert problems(service(**spec)) == expected


BALANCER = {"type": "LoadBalancer", "clusterIP": "10.96.0.5"}


@pytest.mark.parametrize(
    ("before", "change", "expected"),
    [
        (
            {"clusterIP": "10.96.0.5"},
            {"clusterIP": "10.96.0.6"},
            ['spec.clusterIPs[0]: Invalid value: ["10.96.0.6"]: may not change once set'],
        ),
        (
            {"clusterIP": "10.96.0.5"},
            {"clusterIP": "None"},
            ['spec.clusterIPs[0]: Invalid value: ["None"]: may not change once set'],
        ),
        (
            {"clusterIP": "10.96.0.5", "ipFamilies": ["IPv4"]},
            {"ipFamilies": ["IPv6"], "clusterIP": None, "clusterIPs": None},
            [
                'spec.clusterIPs[0]: Invalid value: "10.96.0.5": expected an IPv6 value as'
                " indicated by `ipFamilies[0]`"
            ],
        ),
        ({"clusterIP": "10.96.0.5"}, {"type": "NodePort"}, []),
        ({"clusterIP": "10.96.0.5"}, {"type": "ExternalName", "externalName": "a.b"}, []),
        (
            {"clusterIP": "10.96.0.5"},
            {"type": "ExternalName", "externalName": "a.b", "clusterIP": "10.96.0.6"},
            ["spec.clusterIPs: Forbidden: may not be set for ExternalName services"],
        ),
        (
            {**BALANCER, "loadBalancerClass": "example.com/a"},
            {"loadBalancerClass": "example.com/b"},
            [
                'spec.loadBalancerClass: Invalid value: "example.com/b": may not change once set'
            ],
        ),
        (
            {**BALANCER, "externalTrafficPolicy": "Local", "healthCheckNodePort": 30099},
            {"healthCheckNodePort": 30100},
            ["spec.healthCheckNodePort: Forbidden: field is immutable"],
        ),
        (
            {"clusterIP": "10.96.0.5", "type": "NodePort", "ports": [{**PORT, "nodePort": 30080}]},
            {"type": "ClusterIP", "ports": [{"port": 80, "nodePort": 30081}]},
            ["spec.ports[0].nodePort: Forbidden: may not be used when `type` is 'ClusterIP'"],
        ),
    ],
)  # fmt: skip
def test_a_change_of_a_service_is_refused(before: Obj, change: Obj, expected: list[str]) -> None:
    old = filled(service(**before))
    assert problems(changed(old, **change), old) == expected


def test_a_load_balancers_status_needs_its_type() -> None:
    old = filled(service(clusterIP="10.96.0.5"))
    new = {**old, "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.1"}]}}}
    found = [f"{one.field}: {one.message}" for one in validate(KINDS["Service"], new, old)]
    assert found == [
        "status.loadBalancer.ingress: Forbidden: may only be used when `spec.type` is"
        ' "LoadBalancer"'
    ]


@pytest.mark.parametrize(
    ("obj", "expected"),
    [
        (service(), []),
        (
            service(externalIPs=["192.0.2.1"]),
            ["spec.externalIPs is deprecated and may no longer be implemented in some clusters"],
        ),
        (
            service(clusterIP="None", externalIPs=["192.0.2.1"], sessionAffinity="ClientIP"),
            [
                "spec.externalIPs is ignored for headless services",
                "spec.SessionAffinity is ignored for headless services",
            ],
        ),
        (
            service(type="ExternalName", externalName="a.b", externalIPs=["192.0.2.1"]),
            ['spec.externalIPs is ignored when spec.type is "ExternalName"'],
        ),
        (
            service(externalName="a.b"),
            ['spec.externalName is ignored when spec.type is not "ExternalName"'],
        ),
        (
            service(type="LoadBalancer", loadBalancerIP="010.0.0.1"),
            [
                'spec.loadBalancerIP: non-standard IP address "010.0.0.1" is invalid: use'
                ' "10.0.0.1"'
            ],
        ),
        (
            service(clusterIP="FD00:0::5"),
            [
                'spec.clusterIPs[0]: IPv6 address "FD00:0::5" should be in RFC 5952 canonical'
                ' format ("fd00::5")'
            ],
        ),
        (
            service(trafficDistribution="PreferClose"),
            ['spec.trafficDistribution: "PreferClose" is deprecated; use "PreferSameZone"'],
        ),
        (
            make("Endpoints"),
            ["v1 Endpoints is deprecated in v1.33+; use discovery.k8s.io/v1 EndpointSlice"],
        ),
        (
            make("Pod", "a.b", spec=pod_template()["spec"]),
            [
                "metadata.name: this is used in the Pod's hostname, which can result in surprising"
                " behavior; a DNS label is recommended: [must not contain dots]"
            ],
        ),
        (
            make("EndpointSlice", addressType="FQDN", endpoints=[]),
            ["spec.addressType: FQDN endpoints are deprecated"],
        ),
    ],
)  # fmt: skip
def test_warnings(obj: Obj, expected: list[str]) -> None:
    assert warned(obj) == expected


# --- endpoints ------------------------------------------------------------------------


def subset(**parts: Any) -> Obj:
    return make(
        "Endpoints", subsets=[{"addresses": [{"ip": "192.0.2.1"}], "ports": [PORT], **parts}]
    )


@pytest.mark.parametrize(
    ("obj", "expected"),
    [
        (subset(), []),
        (
            subset(addresses=[]),
            ["subsets[0]: Required value: must specify `addresses` or `notReadyAddresses`"],
        ),
        (
            subset(addresses=[{"ip": "169.254.1.1"}]),
            [
                'subsets[0].addresses[0].ip: Invalid value: "169.254.1.1": may not be in the'
                " link-local range (169.254.0.0/16, fe80::/10)"
            ],
        ),
        (
            subset(addresses=[{"ip": "224.0.0.1"}]),
            [
                'subsets[0].addresses[0].ip: Invalid value: "224.0.0.1": may not be in the'
                " link-local multicast range (224.0.0.0/24, ff02::/10)"
            ],
        ),
        (
            subset(addresses=[{"ip": "::"}]),
            [
                'subsets[0].addresses[0].ip: Invalid value: "::": may not be unspecified (::)',
            ],
        ),
        (
            subset(ports=[PORT, {"name": "a", "port": 81}]),
            ["subsets[0].ports[0].name: Required value"],
        ),
        (make("EndpointSlice"), ["addressType: Required value"]),
        (
            make("EndpointSlice", addressType="IP"),
            [
                'addressType: Unsupported value: "IP": supported values: "FQDN", "IPv4", "IPv6"'
            ],
        ),
        (
            make("EndpointSlice", addressType="IPv4", endpoints=[{"addresses": []}]),
            ["endpoints[0].addresses: Required value: must contain at least 1 address"],
        ),
        (
            make("EndpointSlice", addressType="IPv4", endpoints=[{"addresses": ["fd00::1"]}]),
            ['endpoints[0].addresses[0]: Invalid value: "fd00::1": must be an IPv4 address'],
        ),
        (
            make("EndpointSlice", addressType="IPv6", endpoints=[{"addresses": ["::1"]}]),
            [
                'endpoints[0].addresses[0]: Invalid value: "::1": may not be in the loopback range'
                " (127.0.0.0/8, ::1/128)"
            ],
        ),
        (
            make(
                "EndpointSlice",
                addressType="IPv4",
                endpoints=[{"addresses": ["192.0.2.1"], "hostname": "A"}],
            ),
            [f'endpoints[0].hostname: Invalid value: "A": {LABEL}'],
        ),
        (
            make("EndpointSlice", addressType="IPv4", ports=[{"port": 1}] * 101),
            ["ports: Too many: 101: must have at most 100 items"],
        ),
        (
            make(
                "EndpointSlice",
                addressType="IPv4",
                endpoints=[{"addresses": ["192.0.2.1"]}] * 1001,
            ),
            ["endpoints: Too many: 1001: must have at most 1000 items"],
        ),
        (
            make("EndpointSlice", addressType="IPv4", ports=[{"port": 1}, {"port": 2}]),
            ['ports[1].name: Duplicate value: ""'],
        ),
    ],
)  # fmt: skip
def test_endpoints_are_refused(obj: Obj, expected: list[str]) -> None:
    assert problems(obj) == expected


def test_a_slices_address_type_does_not_change() -> None:
    old = filled(make("EndpointSlice", addressType="IPv4", endpoints=[]))
    new = {**old, "addressType": "IPv6"}
    assert problems(new, old) == ['addressType: Invalid value: "IPv6": field is immutable']


# --- Pods -----------------------------------------------------------------------------


def pod(container: Obj | None = None, **spec: Any) -> Obj:
    one = {"name": "web", "image": "nginx", **(container or {})}
    return make("Pod", spec={"containers": [one], **spec})


@pytest.mark.parametrize(
    ("obj", "expected"),
    [
        (pod(), []),
        (make("Pod", spec={}), ["spec.containers: Required value"]),
        (pod({"image": ""}), ["spec.containers[0].image: Required value"]),
        (pod({"name": ""}), ["spec.containers[0].name: Required value"]),
        (
            pod(initContainers=[{"name": "web", "image": "a"}]),
            ['spec.initContainers[0].name: Duplicate value: "web"'],
        ),
        (
            pod({"ports": [{"containerPort": 0}]}),
            ["spec.containers[0].ports[0].containerPort: Required value"],
        ),
        (
            pod({"ports": [{"containerPort": 70000}]}),
            [f"spec.containers[0].ports[0].containerPort: Invalid value: 70000: {RANGE}"],
        ),
        (
            pod({"ports": [{"containerPort": 80, "name": "HTTP"}]}),
            [
                'spec.containers[0].ports[0].name: Invalid value: "HTTP": must contain only'
                " alpha-numeric characters (a-z, 0-9), and hyphens (-)",
                'spec.containers[0].ports[0].name: Invalid value: "HTTP": must contain at least'
                " one letter (a-z)",
            ],
        ),
        (
            pod(restartPolicy="Sometimes"),
            [
                'spec.restartPolicy: Unsupported value: "Sometimes": supported values: "Always",'
                ' "Never", "OnFailure"'
            ],
        ),
        (
            pod(dnsPolicy="None"),
            ["spec.dnsConfig: Required value: must provide `dnsConfig` when `dnsPolicy` is None"],
        ),
        (pod(hostname="A"), [f'spec.hostname: Invalid value: "A": {LABEL}']),
        (
            pod({"volumeMounts": [{"name": "data", "mountPath": "/data"}]}),
            ['spec.containers[0].volumeMounts[0].name: Not found: "data"'],
        ),
        (
            pod({"resources": {"requests": {"cpu": "2"}, "limits": {"cpu": "1500m"}}}),
            [
                'spec.containers[0].resources.requests: Invalid value: "2": must be less than or'
                " equal to cpu limit of 1500m"
            ],
        ),
        (
            pod({"readinessProbe": {}}),
            ["spec.containers[0].readinessProbe: Required value: must specify a handler type"],
        ),
        (
            pod({"livenessProbe": {"tcpSocket": {"port": 80}, "successThreshold": 2}}),
            ["spec.containers[0].livenessProbe.successThreshold: Invalid value: 2: must be 1"],
        ),
        (
            pod(terminationGracePeriodSeconds=-1),
            [
                "spec.terminationGracePeriodSeconds: Invalid value: -1: must be greater than or"
                " equal to 0"
            ],
        ),
        (
            pod({"env": [{"name": "A=B"}]}),
            [
                'spec.containers[0].env[0].name: Invalid value: "A=B": a valid environment'
                " variable name must consist only of printable ASCII characters other than '='"
            ],
        ),
    ],
)  # fmt: skip
def test_a_pod_is_refused(obj: Obj, expected: list[str]) -> None:
    assert problems(obj) == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda spec: spec["containers"][0].update(image="nginx:2"), None),
        (lambda spec: spec.update(activeDeadlineSeconds=60), None),
        (lambda spec: spec["tolerations"].append({"operator": "Exists"}), None),
        (
            lambda spec: spec["tolerations"].clear(),
            None,  # the two that every Pod has come again
        ),
        (
            lambda spec: spec["containers"].append({"name": "more", "image": "a"}),
            "spec.containers: Forbidden: pod updates may not add or remove containers",
        ),
        (
            lambda spec: spec.update(nodeName="node2"),
            "spec: Forbidden: pod updates may not change fields other than"
            " `spec.containers[*].image`,`spec.initContainers[*].image`,"
            "`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing"
            " tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was"
            ' previously negative)\n- spec.nodeName: "node1"\n+ spec.nodeName: "node2"',
        ),
    ],
)
def test_little_of_a_pod_may_change(change: Callable[[Obj], None], expected: str | None) -> None:
    old = filled(pod(nodeName="node1"))
    new = copy.deepcopy(old)
    change(new["spec"])
    assert problems(new, old) == ([expected] if expected else [])


# --- workloads ------------------------------------------------------------------------

MISMATCH = "`selector` does not match template `labels`"


@pytest.mark.parametrize("kind", ["Deployment", "ReplicaSet", "StatefulSet"])
def test_a_selector_must_match_the_template(kind: str) -> None:
    other = workload(kind, selector={"matchLabels": {"app": "db"}})
    expected = f'spec.template.metadata.labels: Invalid value: {{"app":"web"}}: {MISMATCH}'
    assert problems(other) == [expected]
    without = workload(kind)
    del without["spec"]["selector"]
    assert problems(without) == ["spec.selector: Required value", expected]


@pytest.mark.parametrize(
    ("selector", "matches"),
    [
        ({"matchExpressions": [{"key": "app", "operator": "In", "values": ["web"]}]}, True),
        ({"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["web"]}]}, False),
        ({"matchExpressions": [{"key": "app", "operator": "Exists"}]}, True),
        ({"matchExpressions": [{"key": "db", "operator": "DoesNotExist"}]}, True),
        ({"matchExpressions": [{"key": "db", "operator": "NotIn", "values": ["x"]}]}, True),
    ],
)
def test_selectors_with_expressions(selector: Obj, matches: bool) -> None:
    assert (problems(workload("Deployment", selector=selector)) == []) is matches


@pytest.mark.parametrize(
    ("obj", "expected"),
    [
        (
            workload("Deployment", replicas=-1),
            ["spec.replicas: Invalid value: -1: must be greater than or equal to 0"],
        ),
        (
            workload("Deployment", selector={}),
            ["spec.selector: Invalid value: {}: empty selector is invalid for deployment"],
        ),
        (
            workload("Deployment", strategy={"type": "Recreate", "rollingUpdate": {"maxSurge": 1}}),
            [
                "spec.strategy.rollingUpdate: Forbidden: may not be specified when strategy `type`"
                " is 'Recreate'"
            ],
        ),
        (
            workload(
                "Deployment", strategy={"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 0}}
            ),
            [
                "spec.strategy.rollingUpdate.maxUnavailable: Invalid value: 0: may not be 0 when"
                " `maxSurge` is 0"
            ],
        ),
        (
            workload("Deployment", progressDeadlineSeconds=10, minReadySeconds=10),
            [
                "spec.progressDeadlineSeconds: Invalid value: 10: must be greater than"
                " minReadySeconds"
            ],
        ),
        (
            workload("Deployment", template=pod_template(restartPolicy="Never")),
            [
                'spec.template.spec.restartPolicy: Unsupported value: "Never": supported values:'
                ' "Always"'
            ],
        ),
        (
            workload("StatefulSet", podManagementPolicy="All"),
            [
                'spec.podManagementPolicy: Invalid value: "All": must be \'OrderedReady\' or'
                " 'Parallel'"
            ],
        ),
    ],
)  # fmt: skip
def test_a_workload_is_refused(obj: Obj, expected: list[str]) -> None:
    assert problems(obj) == expected


def test_a_selector_does_not_change() -> None:
    old = filled(workload("Deployment"))
    labels = {"app": "db"}
    template = pod_template() | {"metadata": {"labels": labels}}
    new = changed(old, selector={"matchLabels": labels}, template=template)
    assert problems(new, old) == [
        'spec.selector: Invalid value: {"matchLabels":{"app":"db"}}: field is immutable'
    ]


def test_little_of_a_stateful_set_may_change() -> None:
    old = filled(workload("StatefulSet", serviceName="web"))
    assert problems(changed(old, replicas=3, minReadySeconds=5), old) == []
    assert problems(changed(old, serviceName="other"), old) == [
        "spec: Forbidden: updates to statefulset spec for fields other than 'replicas', 'ordinals',"
        " 'template', 'updateStrategy', 'revisionHistoryLimit',"
        " 'persistentVolumeClaimRetentionPolicy' and 'minReadySeconds' are forbidden"
    ]


# --- small kinds ----------------------------------------------------------------------


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    ("obj", "expected"),
    [
        (make("ConfigMap", data={"a.b": "x"}, binaryData={"c": "eA=="}), []),
        (
            make("ConfigMap", data={"a": "x"}, binaryData={"a": "eA=="}),
            ['data[a]: Invalid value: "a": duplicate of key present in binaryData'],
        ),
        (
            make("ConfigMap", data={"..": "x"}),
            ["data[..]: Invalid value: \"..\": must not be '..'"],
        ),
        (
            make("ConfigMap", data={"a": "x" * (1024 * 1024 + 1)}),
            ["[]: Too long: may not be more than 1048576 bytes"],
        ),
        (
            make("Secret", type="kubernetes.io/tls"),
            ["data[tls.crt]: Required value", "data[tls.key]: Required value"],
        ),
        (
            make("Secret", type="kubernetes.io/basic-auth"),
            ["data[username]: Required value", "data[password]: Required value"],
        ),
        (make("Secret", type="kubernetes.io/basic-auth", stringData={"username": ""}), []),
        (
            make("Secret", type="kubernetes.io/service-account-token"),
            ["metadata.annotations[kubernetes.io/service-account.name]: Required value"],
        ),
        (
            make("Secret", type="kubernetes.io/dockercfg", data={".dockercfg": b64("{}")}),
            [],
        ),
        (
            make("Node", spec={"taints": [{"key": "a", "effect": "Never"}]}),
            [
                'spec.taints[0].effect: Unsupported value: "Never": supported values: "NoSchedule",'
                ' "PreferNoSchedule", "NoExecute"'
            ],
        ),
        (
            make("Lease", spec={"leaseDurationSeconds": 0}),
            ["spec.leaseDurationSeconds: Invalid value: 0: must be greater than 0"],
        ),
        (
            make("ServiceCIDR", spec={"cidrs": []}),
            ["spec.cidrs: Required value: at least one CIDR required"],
        ),
        (
            make("ServiceCIDR", spec={"cidrs": ["10.0.0.1/24"]}),
            [
                'spec.cidrs[0]: Invalid value: "10.0.0.1/24": must not have bits set beyond the'
                " prefix length"
            ],
        ),
        (
            make("ServiceCIDR", spec={"cidrs": ["10.0.0.0/24", "10.1.0.0/24"]}),
            [
                'spec.cidrs: Invalid value: ["10.0.0.0/24","10.1.0.0/24"]: may specify no more'
                " than one IP for each IP family, i.e 192.168.0.0/24 and 2001:db8::/64"
            ],
        ),
        (make("ServiceCIDR", spec={"cidrs": ["10.0.0.0/24", "fd00::/112"]}), []),
        (
            make("Event", involvedObject={"kind": "Pod", "namespace": "other"}),
            ['involvedObject.namespace: Invalid value: "other": does not match event.namespace'],
        ),
        (make("Event", involvedObject={"kind": "Node", "name": "n"}), []),
        (make("ServiceAccount"), []),
        (
            make("Namespace", spec={"finalizers": ["mine"]}),
            [
                'spec.finalizers: Invalid value: "mine": name is neither a standard finalizer name'
                " nor is it fully qualified"
            ],
        ),
    ],
)  # fmt: skip
def test_a_small_kind_is_refused(obj: Obj, expected: list[str]) -> None:
    assert problems(obj) == expected


def test_what_calls_itself_immutable_does_not_change() -> None:
    old = make("ConfigMap", data={"a": "b"}, immutable=True)
    frozen = "field is immutable when `immutable` is set"
    new = make("ConfigMap", data={"a": "c"}, immutable=False)
    assert problems(new, old) == [f"immutable: Forbidden: {frozen}", f"data: Forbidden: {frozen}"]


def test_a_secrets_type_does_not_change() -> None:
    old = filled(make("Secret"))
    new = filled(make("Secret", type="example.com/mine"))
    assert problems(new, old) == ['type: Invalid value: "example.com/mine": field is immutable']


def test_a_nodes_pod_range_is_given_once() -> None:
    old = filled(make("Node", spec={"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24"]}))
    new = changed(old, podCIDR="10.244.2.0/24", podCIDRs=["10.244.2.0/24"])
    assert problems(new, old) == [
        'spec.podCIDRs: Forbidden: node updates may not change podCIDR except from "" to valid'
    ]


# --- anything at all ------------------------------------------------------------------

TEXT = st.text(max_size=80) | st.text("ab-._/A0 ", max_size=80)


@given(TEXT)
def test_any_text_is_judged(text: str) -> None:
    for check in (subdomain, dns_label, qualified_name, address, cidr):
        assert all(isinstance(problem, str) for problem in check(text))
    if not dns_label(text):
        assert not subdomain(text)


JSON = st.recursive(
    st.none() | st.integers(-1, 70000) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "type": TEXT | st.sampled_from(["ClusterIP", "NodePort", "LoadBalancer"]),
            "clusterIP": TEXT,
            "clusterIPs": st.lists(TEXT, max_size=3),
            "ipFamilies": st.lists(TEXT, max_size=3),
            "ipFamilyPolicy": TEXT,
            "externalIPs": st.lists(TEXT, max_size=3),
            "externalName": TEXT,
            "sessionAffinity": TEXT,
            "selector": st.dictionaries(TEXT, TEXT, max_size=3),
            "loadBalancerSourceRanges": st.lists(TEXT, max_size=3),
            "ports": st.lists(
                st.fixed_dictionaries(
                    {},
                    optional={
                        "name": TEXT,
                        "port": st.integers(-1, 70000),
                        "protocol": TEXT,
                        "targetPort": TEXT | st.integers(-1, 70000),
                        "nodePort": st.integers(-1, 70000),
                        "appProtocol": TEXT,
                    },
                ),
                max_size=4,
            ),
        },
    )
)
def test_any_well_typed_service_is_judged(spec: Obj) -> None:
    """No combination makes the validation fail instead of the object."""
    obj = make("Service", spec=spec)
    old = filled(service(clusterIP="10.96.0.5"))
    for found in (problems(obj), problems(obj, old), warned(obj)):
        assert all(isinstance(text, str) for text in found)
