"""What a request body must be (kdns/api/strict.py): JSON and YAML, fields and their types, in the
words that clients of a cluster know."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdns.api.kinds import RESOURCES
from kdns.api.schema import type_named, type_names
from kdns.api.strict import (
    _go_names,
    canonical_quantity,
    check_object,
    parse_json,
    parse_yaml,
    settle,
)
from kdns.errors import ApiError

SERVICE, POD = "core/v1.Service", "core/v1.Pod"


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(ApiError) as caught:
        call()
    assert (caught.value.code, caught.value.reason) == (400, "BadRequest")
    return str(caught.value)


def container(**fields: Any) -> dict[str, Any]:
    return {"spec": {"containers": [{"name": "c", **fields}]}}


# --- unknown fields ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("type_name", "obj", "problems"),
    [
        (SERVICE, {"spec": {"ports": [{"port": 80}]}}, []),
        (SERVICE, {"spce": {}}, ['unknown field "spce"']),
        (SERVICE, {"spec": {"foo": 1}}, ['unknown field "spec.foo"']),
        (SERVICE, {"spec": {"Type": "NodePort"}}, ['unknown field "spec.Type"']),
        (SERVICE, {"spec": {"ports": [{"port": 1}, {"prot": 2}]}},
         ['unknown field "spec.ports[1].prot"']),
        (SERVICE, {"metadata": {"lables": {"a": "b"}}, "spec": {"a": {"b": {}}}},
         ['unknown field "metadata.lables"', 'unknown field "spec.a"']),
        (SERVICE, {"foo": None}, ['unknown field "foo"']),
        (SERVICE, {"spec": {"selector": {"any.name/at-all": "x"}}}, []),
        # fields of embedded structs stand one level up
        (POD, container(livenessProbe={"httpGet": {"port": 80}, "exec": {"command": ["a"]}}), []),
        (POD, container(livenessProbe={"handler": {"exec": {}}}),
         ['unknown field "spec.containers[0].livenessProbe.handler"']),
        (POD, {"spec": {"volumes": [{"name": "v", "configMap": {"name": "c"}}]}}, []),
        (POD, {"spec": {"volumes": [{"name": "v", "volumeSource": {}}]}},
         ['unknown field "spec.volumes[0].volumeSource"']),
    ],
)  # fmt: skip
def test_unknown_fields(type_name: str, obj: dict[str, Any], problems: list[str]) -> None:
    assert check_object(type_name, obj).problems == problems


def test_drops_what_is_unknown_and_what_is_null() -> None:
    given_ = {"spec": {"foo": 1, "type": None, "selector": {"a": "b"}, "ports": [{"x": 1}]}}
    before = json.dumps(given_)
    assert check_object(SERVICE, given_).obj == {"spec": {"selector": {"a": "b"}, "ports": [{}]}}
    assert json.dumps(given_) == before


def test_tells_of_a_hundred_and_no_more() -> None:
    checked = check_object(SERVICE, {f"f{i}": 1 for i in range(1000)})
    assert len(checked.problems) == 100 and checked.obj == {}


# --- wrong types ------------------------------------------------------------------------------

UNMARSHAL = "json: cannot unmarshal"


@pytest.mark.parametrize(
    ("type_name", "obj", "why"),
    [
        (SERVICE, {"spec": {"ports": [{"port": "80"}]}},
         "string into Go struct field ServicePort.spec.ports.port of type int32"),
        (SERVICE, {"spec": {"ports": [{"port": 80.5}]}},
         "number 80.5 into Go struct field ServicePort.spec.ports.port of type int32"),
        (SERVICE, {"spec": {"ports": [{"port": 1 << 31}]}},
         "number 2147483648 into Go struct field ServicePort.spec.ports.port of type int32"),
        (SERVICE, {"spec": {"ports": [{"port": True}]}},
         "bool into Go struct field ServicePort.spec.ports.port of type int32"),
        (SERVICE, {"spec": {"ports": [{"protocol": 6}]}},
         "number into Go struct field ServicePort.spec.ports.protocol of type v1.Protocol"),
        (SERVICE, {"spec": {"ports": {"port": 80}}},
         "object into Go struct field ServiceSpec.spec.ports of type []v1.ServicePort"),
        (SERVICE, {"spec": {"ports": [80]}},
         "number into Go struct field ServiceSpec.spec.ports of type v1.ServicePort"),
        (SERVICE, {"spec": {"type": ["NodePort"]}},
         "array into Go struct field ServiceSpec.spec.type of type v1.ServiceType"),
        (SERVICE, {"spec": {"ipFamilies": "IPv4"}},
         "string into Go struct field ServiceSpec.spec.ipFamilies of type []v1.IPFamily"),
        (SERVICE, {"spec": {"externalIPs": [1]}},
         "number into Go struct field ServiceSpec.spec.externalIPs of type string"),
        (SERVICE, {"spec": {"selector": {"a": True}}},
         "bool into Go struct field ServiceSpec.spec.selector of type string"),
        (SERVICE, {"spec": {"selector": "a"}},
         "string into Go struct field ServiceSpec.spec.selector of type map[string]string"),
        (SERVICE, {"spec": {"publishNotReadyAddresses": "yes"}},
         "string into Go struct field ServiceSpec.spec.publishNotReadyAddresses of type bool"),
        (SERVICE, {"spec": "x"}, "string into Go struct field Service.spec of type v1.ServiceSpec"),
        (SERVICE, {"metadata": []},
         "array into Go struct field Service.metadata of type v1.ObjectMeta"),
        (SERVICE, {"metadata": {"labels": {"a": 1}}},
         "number into Go struct field ObjectMeta.metadata.labels of type string"),
        (SERVICE, {"kind": 1}, "number into Go struct field Service.kind of type string"),
        (POD, container(env=[{"name": "a", "value": 1}]),
         "number into Go struct field EnvVar.spec.containers.env.value of type string"),
        (POD, container(livenessProbe={"httpGet": 1}),
         "number into Go struct field Probe.spec.containers.livenessProbe.httpGet"
         " of type v1.HTTPGetAction"),
        (POD, container(resources={"limits": []}),
         "array into Go struct field ResourceRequirements.spec.containers.resources.limits"
         " of type v1.ResourceList"),
        ("core/v1.ConfigMap", {"data": {"a": {}}},
         "object into Go struct field ConfigMap.data of type string"),
        ("core/v1.Secret", {"data": {"a": 5}},
         "number into Go struct field Secret.data of type []uint8"),
        ("apps/v1.Deployment", {"spec": {"replicas": "2"}},
         "string into Go struct field DeploymentSpec.spec.replicas of type int32"),
        ("discovery.k8s.io/v1.EndpointSlice", {"endpoints": [{"addresses": "10.0.0.1"}]},
         "string into Go struct field Endpoint.endpoints.addresses of type []string"),
    ],
)  # fmt: skip
def test_wrong_types(type_name: str, obj: dict[str, Any], why: str) -> None:
    group, _, kind = type_name.rpartition(".")
    version = group.removeprefix("core/")
    assert refused(lambda: check_object(type_name, obj)) == (
        f'{kind} in version "{version}" cannot be handled as a {kind}: {UNMARSHAL} {why}'
    )


def test_gos_names_are_of_fields_there_are() -> None:
    known = {
        f"{kind.kind}.{field.name}": field
        for kind in map(type_named, type_names())
        for field in kind.fields.values()
    }
    for place, name in _go_names().items():
        assert known[place].type == ("quantity" if name == "v1.ResourceList" else "string"), place


TIME = 'as "2006-01-02T15:04:05Z07:00"'
NO_QUANTITY = (
    "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'"
)


@pytest.mark.parametrize(
    ("type_name", "obj", "why"),
    [
        (SERVICE, {"spec": {"ports": [{"targetPort": 80.5}]}},
         f"{UNMARSHAL} number 80.5 into Go value of type int32"),
        (SERVICE, {"spec": {"ports": [{"targetPort": {}}]}},
         f"{UNMARSHAL} object into Go value of type int32"),
        ("core/v1.Secret", {"data": {"a": "not base64"}}, "illegal base64 data at input byte 3"),
        (POD, {"status": {"startTime": 5}}, f"{UNMARSHAL} number into Go value of type string"),
        (POD, {"status": {"startTime": "now"}},
         f'parsing time "now" {TIME}: cannot parse "now" as "2006"'),
        (POD, {"status": {"startTime": "2026-02-03"}},
         f'parsing time "2026-02-03" {TIME}: cannot parse "" as "T"'),
        (POD, {"status": {"startTime": "2026-02-03T04:05:06"}},
         f'parsing time "2026-02-03T04:05:06" {TIME}: cannot parse "" as "Z07:00"'),
        (POD, {"status": {"startTime": "2026-13-03T04:05:06Z"}},
         'parsing time "2026-13-03T04:05:06Z": month out of range'),
        (POD, {"status": {"startTime": "2026-02-30T04:05:06Z"}},
         'parsing time "2026-02-30T04:05:06Z": day out of range'),
        (POD, {"status": {"startTime": "2026-02-03T04:05:06Z "}},
         'parsing time "2026-02-03T04:05:06Z ": extra text: " "'),
        ("coordination.k8s.io/v1.Lease", {"spec": {"renewTime": "2026-02-03T04:05:06Z"}},
         'parsing time "2026-02-03T04:05:06Z" as "2006-01-02T15:04:05.000000Z07:00":'
         ' cannot parse "Z" as ".000000"'),
        (POD, container(resources={"limits": {"cpu": "1Zi"}}), NO_QUANTITY),
        (POD, container(resources={"limits": {"cpu": "1K"}}),
         "unable to parse quantity's suffix"),
        (POD, container(resources={"limits": {"cpu": True}}), NO_QUANTITY),
    ],
)  # fmt: skip
def test_texts_that_say_nothing(type_name: str, obj: dict[str, Any], why: str) -> None:
    assert refused(lambda: check_object(type_name, obj)).endswith(f": {why}")


# --- one form of each value -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("0.5", "500m"), ("1", "1"), ("1000", "1k"), ("1500", "1500"), ("0", "0"), ("0Mi", "0"),
        ("1024", "1024"), ("1024Ki", "1Mi"), ("1.5Gi", "1536Mi"), ("0.5Mi", "512Ki"),
        ("1023Ki", "1023Ki"), ("100m", "100m"), ("1000m", "1"), ("1000000u", "1"), ("1e3", "1e3"),
        ("12e6", "12e6"), ("1.2e3", "1200"), ("-5", "-5"), ("+5", "5"), ("-0.5Gi", "-512Mi"),
        ("0.1n", "1n"), ("1.5Ki", "1536"), ("1.3Ki", "1331200m"), ("007", "7"), (".5", "500m"),
    ],
)  # fmt: skip
def test_quantities(text: str, canonical: str) -> None:
    assert canonical_quantity(text) == canonical


@pytest.mark.parametrize("text", ["", "x", "1.2.3", "1 Mi", "1MiB", "--1", "1e", "1e9999", "٣"])
def test_no_quantities(text: str) -> None:
    with pytest.raises(ValueError, match="quantit"):
        canonical_quantity(text)


@given(st.integers(0, 10**12), st.sampled_from(["", "m", "k", "M", "Ki", "Mi", "Gi"]))
def test_canonical_quantities_stay_as_they_are(number: int, suffix: str) -> None:
    once = canonical_quantity(f"{number}{suffix}")
    assert canonical_quantity(once) == once


@pytest.mark.parametrize(
    ("type_name", "obj"),
    [
        # as given -> as kept
        (POD, ({"status": {"startTime": "2026-02-03T04:05:06.789+02:00"}},
               {"status": {"startTime": "2026-02-03T02:05:06Z"}})),
        ("coordination.k8s.io/v1.Lease",
         ({"spec": {"renewTime": "2026-02-03T04:05:06.000070-01:00"}},
          {"spec": {"renewTime": "2026-02-03T05:05:06.000070Z"}})),
        ("core/v1.Secret", ({"data": {"a": "aGFs\nbG8="}}, {"data": {"a": "aGFsbG8="}})),
        (POD, (container(resources={"limits": {"cpu": 0.5, "memory": 1024}}),
               container(resources={"limits": {"cpu": "500m", "memory": "1024"}}))),
        (SERVICE, ({"spec": {"externalIPs": [None]}}, {"spec": {"externalIPs": [""]}})),
        (SERVICE, ({"spec": {"selector": {"a": None}}}, {"spec": {"selector": {"a": ""}}})),
        (SERVICE, ({"spec": {"ports": [None]}}, {"spec": {"ports": [{}]}})),
        ("authentication.k8s.io/v1.SelfSubjectReview",
         ({"status": {"userInfo": {"extra": {"a": ["b"]}}}},) * 2),
    ],
)  # fmt: skip
def test_values_are_kept_in_one_form(
    type_name: str, obj: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    given_, kept = obj
    assert check_object(type_name, given_).obj == kept


@pytest.mark.parametrize(
    ("type_name", "obj", "settled"),
    [
        (SERVICE, {"metadata": {"name": "a", "labels": {}}, "spec": {
            "type": "", "externalIPs": [], "publishNotReadyAddresses": False,
            "ipFamilyPolicy": "", "allocateLoadBalancerNodePorts": False,
            "ports": [{"name": "", "port": 80, "nodePort": 0}]}},
         {"metadata": {"name": "a"}, "spec": {
             "ipFamilyPolicy": "", "allocateLoadBalancerNodePorts": False,
             "ports": [{"port": 80}]},
          "status": {"loadBalancer": {}}}),
        ("core/v1.Namespace", {}, {"metadata": {}, "spec": {}, "status": {}}),
        ("core/v1.ConfigMap", {"data": {"empty": ""}}, {"metadata": {}, "data": {"empty": ""}}),
        ("apps/v1.Deployment",
         {"spec": {"replicas": 0, "selector": {},
                   "template": {"spec": {"containers": [{"name": "c"}]}}}},
         {"metadata": {}, "status": {},
          "spec": {"replicas": 0, "selector": {}, "strategy": {}, "template": {
              "metadata": {}, "spec": {"containers": [{"name": "c", "resources": {}}]}}}}),
        (POD, container(env=[{"name": "E", "value": ""}],
                        securityContext={"runAsUser": 0, "capabilities": {}}),
         {"metadata": {}, "status": {}, "spec": {"containers": [
             {"name": "c", "env": [{"name": "E"}], "resources": {},
              "securityContext": {"runAsUser": 0, "capabilities": {}}}]}}),
        ("discovery.k8s.io/v1.EndpointSlice",
         {"addressType": "IPv4", "endpoints": [], "ports": []},
         {"metadata": {}, "addressType": "IPv4", "endpoints": [], "ports": []}),
    ],
)  # fmt: skip
def test_settles_as_go_writes_objects(
    type_name: str, obj: dict[str, Any], settled: dict[str, Any]
) -> None:
    assert settle(type_name, obj) == settled
    assert settle(type_name, settled) == settled


@pytest.mark.parametrize("resource", RESOURCES, ids=lambda r: r.plural)
def test_settled_objects_are_fit_for_their_type(resource: Any) -> None:
    empty = settle(resource.type, {"apiVersion": resource.api_version, "kind": resource.kind})
    checked = check_object(resource.type, empty)
    assert (checked.obj, checked.problems) == (empty, [])


# --- JSON -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "obj", "problems"),
    [
        ('{"a":1}', {"a": 1}, []),
        ('{"a":1,"a":2}', {"a": 2}, ['duplicate field "a"']),
        ('{"a":1,"a":2,"a":3}', {"a": 3}, ['duplicate field "a"']),
        ('{"spec":{"ports":[{"port":1},{"port":2,"port":3}],"type":"a","type":"b"}}',
         {"spec": {"ports": [{"port": 1}, {"port": 3}], "type": "b"}},
         ['duplicate field "spec.type"', 'duplicate field "spec.ports[1].port"']),
        ('{"a":"\\ud83d\\ude00","b":1,"b":2}', {"a": "\U0001f600", "b": 2},
         ['duplicate field "b"']),
        ('{"a":"\\ud83d"}', {"a": "\ufffd"}, []),
        ('{"a":1e3}', {"a": 1000.0}, []),
    ],
)  # fmt: skip
def test_json(text: str, obj: dict[str, Any], problems: list[str]) -> None:
    found, told = parse_json(text.encode())
    assert found == obj
    assert sorted(told) == sorted(problems)


def test_duplicate_fields_are_told_a_hundred_times_and_no_more() -> None:
    text = ",".join(f'"f{i}":1,"f{i}":2' for i in range(500))
    assert len(parse_json(f"{{{text}}}".encode())[1]) == 100


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "json parse error"),
        (b"{", "json parse error"),
        (b"{'a':1}", "json parse error"),
        (b'{"a":1}x', "json parse error"),
        (b'{"a":NaN}', "NaN is no JSON number"),
        (b'{"a":-Infinity}', "-Infinity is no JSON number"),
        (b'{"a":1e999}', "too large"),
        (b'{"a":' + b"9" * 100_000 + b"}", "json parse error"),
        (b'{"a":"\xff"}', "utf-8"),
        (b"[]", "an object was expected, not array"),
        (b"null", "an object was expected, not null"),
        (b"3", "an object was expected, not number"),
        (b'{"a":' * 101 + b"1" + b"}" * 101, "nested more than 100 deep"),
        (b"[" * 1_000_000, "nested more than 100 deep"),
        (b'{"a":' * 500_000, "nested more than 100 deep"),
        (b'{"a":[' + b"{}," * 250_000 + b"{}]}", "more than 200000 lists and maps"),
    ],
    ids=lambda value: value[:24] if isinstance(value, bytes) else None,
)
def test_refuses_json(body: bytes, why: str) -> None:
    assert why in refused(lambda: parse_json(body))


def test_a_text_full_of_braces_is_no_deep_object() -> None:
    text = "{[" * 300_000
    assert parse_json(json.dumps({"data": {"a": text}}).encode())[0]["data"]["a"] == text


# --- YAML -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "obj"),
    [
        ("a: 1\nb: [x, 'y']\nc: {d: null}", {"a": 1, "b": ["x", "y"], "c": {"d": None}}),
        ('{"a": 1}', {"a": 1}),
        ("{a: 1}", {"a": 1}),  # braces, and no JSON
        ("a: yes\nb: off\nc: 'yes'\nd: ~\ne:", {"a": True, "b": False, "c": "yes", "d": None,
                                                 "e": None}),
        ("a: 0x10\nb: 010\nc: 0b11\nd: 1_000\ne: -5\nf: 0o17",
         {"a": 16, "b": 8, "c": 3, "d": 1000, "e": -5, "f": 15}),
        ("a: 1.5\nb: 2.0\nc: 1e3\nd: '1.5'", {"a": 1.5, "b": 2, "c": 1000, "d": "1.5"}),
        ("a: 2026-01-02\nb: 12:30:45\nc: 1.2.3", {"a": "2026-01-02", "b": "12:30:45",
                                                   "c": "1.2.3"}),
        ("a: !!str 5\nb: ! 5", {"a": "5", "b": "5"}),
        ("1: a\ntrue: b\n1.5: c", {"1": "a", "true": "b", "1.5": "c"}),
        ("a: |\n  x\n  y\nb: >-\n  x\n  y", {"a": "x\ny\n", "b": "x y"}),
        ("a: &x {k: 1}\nb: *x\nc: {<<: *x, l: 2}\nd: {k: 3, <<: [*x]}",
         {"a": {"k": 1}, "b": {"k": 1}, "c": {"k": 1, "l": 2}, "d": {"k": 3}}),
        ("---\na: 1\n...\n", {"a": 1}),
        ("# nothing\na: 1", {"a": 1}),
    ],
)  # fmt: skip
def test_yaml(text: str, obj: dict[str, Any]) -> None:
    found = parse_yaml(text.encode())
    assert found == obj and json.dumps(found) == json.dumps(obj)


def test_aliases_share_nothing() -> None:
    found = parse_yaml(b"a: &x {k: [1]}\nb: *x")
    found["a"]["k"].append(2)
    assert found["b"] == {"k": [1]}


@pytest.mark.parametrize(
    ("text", "obj", "problems"),
    [
        ("a: 1\nb:\n  c: 1\n  c: 2\na: 3", {"a": 3, "b": {"c": 2}},
         ['yaml: unmarshal errors:\n  line 4: key "c" already set in map'
          '\n  line 5: key "a" already set in map']),
        ('{"a": 1, "a": 2}', {"a": 2}, ['duplicate field "a"']),
        ("{a: 1, a: 2}", {"a": 2},
         ['yaml: unmarshal errors:\n  line 1: key "a" already set in map']),
    ],
)  # fmt: skip
def test_keys_given_twice_in_yaml(text: str, obj: dict[str, Any], problems: list[str]) -> None:
    told: list[str] = []
    assert parse_yaml(text.encode(), told) == obj
    assert told == problems


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "an object was expected, not null"),
        ("just text", "an object was expected, not string"),
        ("- a", "an object was expected, not array"),
        ("a: [1", "did not find expected ',' or ']'"),
        ("a: 1\nb: [\n", "line"),
        ("a:\n\t- b", "line 2"),
        ("a: 1\n---\nb: 2", "more than one document"),
        ("a: !!python/object/apply:os.system ['true']", "the tag"),
        ("a: !!timestamp 2026-01-01", "the tag"),
        ("a: !mine 1", "the tag"),
        ("a: .nan", "no JSON number"),
        ("a: -.inf", "no JSON number"),
        ("a: 1e999", "too large"),
        ("a: 0x" + "f" * 100, "more than 64 bits"),
        ("a: *nobody", "*nobody"),
        ("a: &x [*x]", "*x has no &x that ends before it"),
        ("a: {<<: 5}", "no map"),
        ("? [a]\n: b", "a key is array"),
        ("? null\n: b", "a key is null"),
        (LAUGHS, "its aliases expand to more than 200000 nodes"),
        ("a: " + "[" * 1000, "nested more than 100 deep"),
        ("{a: " * 1000, "json parse error"),
        ("a:\n" + "- x\n" * 250_000, "more than 200000 nodes"),
        ("a: \x00", "parse error"),
        ('{"a": 1', "json parse error"),
    ],
    ids=lambda text: text[:24],
)
def test_refuses_yaml(text: str, why: str) -> None:
    assert why in refused(lambda: parse_yaml(text.encode()))


@settings(deadline=None)
@given(st.one_of(st.binary(max_size=200), st.text(max_size=100).map(str.encode)))
def test_random_bodies(body: bytes) -> None:
    """Anything is an object or a 400, and an object is one that JSON can say."""

    def first_of(body: bytes) -> Any:
        return parse_json(body)[0]

    for parse in (first_of, parse_yaml):
        try:
            obj = parse(body)
        except ApiError as e:
            assert e.code == 400
        else:
            assert json.loads(json.dumps(obj, allow_nan=False)) == obj


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner,
                                                                max_size=4),
    max_leaves=12,
)  # fmt: skip
WORDS = st.sampled_from(
    "metadata spec status labels ports port targetPort selector type clusterIP name data containers"
    " resources limits cpu startTime template managedFields fieldsV1 endpoints addresses".split()
)
OBJECTS = st.recursive(
    JSON,
    lambda inner: st.dictionaries(WORDS, inner, max_size=4) | st.lists(inner, max_size=2),
    max_leaves=12,
)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(RESOURCES), st.dictionaries(WORDS, OBJECTS, max_size=4))
def test_random_objects(resource: Any, obj: dict[str, Any]) -> None:
    """Any JSON is an object of its type or a 400; what was checked stays as it is."""
    try:
        checked = check_object(resource.type, obj)
    except ApiError as e:
        assert e.code == 400
        return
    again = check_object(resource.type, checked.obj)
    assert (again.obj, again.problems) == (checked.obj, [])
    settled = settle(resource.type, checked.obj)
    assert settle(resource.type, settled) == settled
    assert check_object(resource.type, settled).obj == settled
