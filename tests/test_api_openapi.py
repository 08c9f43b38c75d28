"""The OpenAPI documents (kdns/api/openapi.py): whole, true to the paths that are served, and with
the extensions that kubectl and generators of clients look for."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest

from kdns.api import openapi
from kdns.api.discovery import REVIEWS
from kdns.api.kinds import RESOURCES, Resource
from kdns.api.negotiate import parse_path
from kdns.api.openapi_words import WORDS
from kdns.api.schema import type_named
from kdns.api.strict import check_object, settle

PATHS = sorted(openapi.index()["paths"])
CORE = "io.k8s.api.core.v1."


def document(path: str) -> dict[str, Any]:
    found = openapi.document(path)
    assert found is not None
    return found


def path_of(resource: Resource) -> str:
    return resource.path.strip("/").rpartition("/")[0]


def schemas(path: str = "api/v1") -> dict[str, Any]:
    return dict(document(path)["components"]["schemas"])


def operations(path: str) -> Iterator[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """Yield URL, method, the operation and what stands beside it."""
    for url, item in document(path)["paths"].items():
        for method, operation in item.items():
            if method != "parameters":
                yield url, method, operation, item


def test_the_index_names_every_group_once() -> None:
    served = {path_of(r) for r in RESOURCES} | {f"apis/{group}/{v}" for group, v, *_ in REVIEWS}
    assert set(PATHS) == served
    for path, entry in openapi.index()["paths"].items():
        assert re.fullmatch(
            rf"/openapi/v3/{re.escape(path)}\?hash=[0-9A-F]{{64}}", entry["serverRelativeURL"]
        )


def test_addresses_are_the_same_in_every_process() -> None:
    """Clients keep documents by their addresses, over our restarts too."""
    code = "import json; from kdns.api import openapi; print(json.dumps(openapi.index()))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=50)
    assert json.loads(out.stdout) == openapi.index()


def test_costs_nothing_before_somebody_asks() -> None:
    code = (
        "from kdns.api import openapi; print(openapi._document.cache_info().currsize,"
        " openapi._words.cache_info().currsize)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=50)
    assert out.stdout.split() == [b"0", b"0"]


@pytest.mark.parametrize("path", ["", "api/v2", "apis/apps", "apis/example.com/v1", "v2"])
def test_there_is_no_other_document(path: str) -> None:
    assert openapi.document(path) is None


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "$ref" in value:
            assert set(value) == {"$ref"}, "beside a $ref nothing may stand"
            yield value["$ref"]
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from references(one)


@pytest.mark.parametrize("path", PATHS)
def test_documents_are_whole(path: str) -> None:
    found = document(path)
    json.dumps(found, allow_nan=False)
    known = {f"#/components/schemas/{name}" for name in schemas(path)}
    assert set(references(found)) <= known
    names = [operation["operationId"] for _, _, operation, _ in operations(path)]
    assert len(names) == len(set(names))
    for url, _, operation, item in operations(path):
        told = [p["name"] for p in item.get("parameters", []) if p["in"] == "path"]
        assert sorted(told) == sorted(re.findall(r"\{(\w+)\}", url))
        every = [p["name"] for p in [*item.get("parameters", []), *operation.get("parameters", [])]]
        assert len(every) == len(set(every))
        assert operation["responses"]


@pytest.mark.parametrize("path", PATHS)
def test_schemas_are_json_schemas(path: str) -> None:
    for schema in schemas(path).values():
        jsonschema.Draft4Validator.check_schema(schema)


@pytest.mark.parametrize("resource", RESOURCES, ids=lambda r: r.plural)
def test_what_is_told_of_a_kind_is_what_is_served(resource: Resource) -> None:
    path = path_of(resource)
    gvk = {"group": resource.group, "version": resource.version, "kind": resource.kind}
    named = [s for s in schemas(path).values()
             if gvk in s.get("x-kubernetes-group-version-kind", ())]  # fmt: skip
    assert len(named) == 1 and named[0]["description"]
    actions: dict[str, set[str]] = {}
    for url, method, operation, _ in operations(path):
        target = parse_path(url.replace("{namespace}", "ns").replace("{name}", "x"))
        assert target is not None
        if target.resource is not resource:
            continue
        what = target.subresource or ("one" if target.name else "many")
        if what == "many" and resource.namespaced and not target.namespace:
            what = "all"
        actions.setdefault(what, set()).add(operation["x-kubernetes-action"])
        assert (method == "patch") == ("application/merge-patch+json" in json.dumps(operation))
        if what in ("one", "many", "all", "status"):
            assert operation["x-kubernetes-group-version-kind"] == gvk
    update = {"get", "put", "patch"}
    expected = {"many": {"list", "post", "deletecollection"}, "one": update | {"delete"}}
    expected |= dict.fromkeys(resource.subresources, update)
    expected |= {"all": {"list"}} if resource.namespaced else {}
    expected |= {"eviction": {"post"}} if resource.kind == "Pod" else {}
    assert actions == expected


@pytest.mark.parametrize("path", PATHS)
def test_writes_say_that_the_server_checks_fields(path: str) -> None:
    """What kubectl looks for before it leaves validation and dry runs to the server."""
    wanted = {"fieldValidation", "dryRun", "fieldManager"}
    for _, method, operation, _ in operations(path):
        if method in ("post", "put", "patch"):
            names = {p["name"] for p in operation["parameters"] if p["in"] == "query"}
            assert names >= wanted | ({"force"} if method == "patch" else set())


def test_fields_say_what_they_are_and_how_they_merge() -> None:
    spec = schemas()[f"{CORE}ServiceSpec"]["properties"]
    ports = spec["ports"]
    assert ports["items"] == {
        "allOf": [{"$ref": f"#/components/schemas/{CORE}ServicePort"}],
        "default": {},
    }
    assert {key: value for key, value in ports.items() if key.startswith("x-")} == {
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["port", "protocol"],
        "x-kubernetes-patch-merge-key": "port",
        "x-kubernetes-patch-strategy": "merge",
    }
    assert spec["selector"]["x-kubernetes-map-type"] == "atomic"
    assert spec["healthCheckNodePort"]["format"] == "int32"
    assert spec["type"]["enum"] == ["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"]
    port = schemas()[f"{CORE}ServicePort"]
    assert port["required"] == ["port"]
    assert port["properties"]["targetPort"]["allOf"] == [
        {"$ref": "#/components/schemas/io.k8s.apimachinery.pkg.util.intstr.IntOrString"}
    ]
    assert schemas()[f"{CORE}ObjectReference"]["x-kubernetes-map-type"] == "atomic"
    volumes = schemas()[f"{CORE}PodSpec"]["properties"]["volumes"]
    assert volumes["x-kubernetes-patch-strategy"] == "merge,retainKeys"
    meta = schemas()["io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"]["properties"]
    assert meta["finalizers"]["x-kubernetes-list-type"] == "set"
    assert schemas()[f"{CORE}Secret"]["properties"]["data"]["additionalProperties"] == {
        "type": "string", "format": "byte",
    }  # fmt: skip


def test_words_are_about_types_and_fields_there_are() -> None:
    kind, said = "", set()
    for line in filter(None, WORDS.splitlines()):
        word, _, text = line.strip().partition(" ")
        if line[0] != " ":
            kind = word
        assert text.endswith("."), line
        place = (kind, word)
        assert place not in said, line
        said.add(place)
        assert word == kind or word in type_named(kind).fields, line


@pytest.mark.parametrize(
    "name",
    """core/v1.Service core/v1.ServiceSpec core/v1.ServicePort core/v1.ServiceStatus
    core/v1.Endpoints core/v1.EndpointSubset core/v1.EndpointAddress core/v1.EndpointPort
    discovery.k8s.io/v1.EndpointSlice discovery.k8s.io/v1.Endpoint
    discovery.k8s.io/v1.EndpointPort core/v1.Namespace core/v1.NamespaceSpec
    core/v1.NamespaceStatus core/v1.Pod""".split(),
)
def test_what_a_learner_explains_first_has_words_for_every_field(name: str) -> None:
    path = "apis/discovery.k8s.io/v1" if name.startswith("discovery") else "api/v1"
    upstream = f"io.k8s.api.{name.partition('.')[0].partition('/')[0]}.v1.{name.rpartition('.')[2]}"
    schema = schemas(path)[upstream]
    assert schema["description"]
    assert [
        field for field, made in schema["properties"].items() if "description" not in made
    ] == []


# Objects as clients send them, and what is wrong with them in the schema's eyes: "" -- nothing.
EXAMPLES: list[tuple[str, dict[str, Any], str]] = [
    ("core/v1.Service", {"spec": {"ports": [{"port": 80, "targetPort": "web"}]}}, ""),
    ("core/v1.Service", {"spec": {"ports": [{"port": "80"}]}}, "spec/ports/0/port"),
    ("core/v1.Service", {"spec": {"ports": [{}]}}, "spec/ports/0"),
    ("core/v1.Service", {"spec": {"type": "Nodeport"}}, "spec/type"),
    ("core/v1.Pod", {"spec": {"containers": [
        {"name": "c", "resources": {"limits": {"cpu": "1", "memory": 5}}}]}}, ""),
    ("core/v1.Pod", {"spec": {"containers": [
        {"name": "c", "resources": {"limits": {"cpu": True}}}]}},
     "spec/containers/0/resources/limits/cpu"),
    ("apps/v1.Deployment", {"spec": {"selector": {}, "template": {}, "replicas": 2}}, ""),
    ("apps/v1.Deployment", {"spec": {"selector": {}, "replicas": 2}}, "spec"),
    ("discovery.k8s.io/v1.EndpointSlice",
     {"addressType": "IPv4", "endpoints": [{"addresses": ["10.0.0.1"]}]}, ""),
    ("discovery.k8s.io/v1.EndpointSlice",
     {"addressType": "IPv5", "endpoints": []}, "addressType"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "obj", "wrong"), EXAMPLES)
def test_the_schema_tells_right_from_wrong(name: str, obj: dict[str, Any], wrong: str) -> None:
    assert wrong_at(name, obj) == wrong


@pytest.mark.parametrize("resource", RESOURCES, ids=lambda r: r.plural)
def test_what_the_server_settles_fits_the_schema(resource: Resource) -> None:
    """Every field that is not given is left out as the schema lets it; lists that it wants
    (containers, endpoints) only somebody who creates can know."""
    empty = settle(resource.type, check_object(resource.type, {}).obj)
    for needed in ("addressType", "endpoints"):
        if needed in type_named(resource.type).fields:
            empty[needed] = {"addressType": "IPv4", "endpoints": []}[needed]
    spec = empty.get("spec", {})
    if resource.kind == "Pod":
        spec["containers"] = []
    if resource.group == "apps":
        spec.setdefault("selector", {})
        spec["template"]["spec"]["containers"] = []
    assert wrong_at(resource.type, empty) == ""


def wrong_at(name: str, obj: dict[str, Any]) -> str:
    """Return where an object does not fit our schema of it; "" if it does."""
    group, _, kind = name.rpartition(".")
    path = "api/v1" if group == "core/v1" else f"apis/{group}"
    upstream = f"io.k8s.api.{group.partition('/')[0].partition('.')[0]}.v1.{kind}"
    whole = {
        "$ref": f"#/components/schemas/{upstream}",
        "components": {"schemas": schemas(path)},
    }
    errors = sorted(jsonschema.Draft4Validator(whole).iter_errors(obj), key=lambda e: str(e.path))
    return "/".join(map(str, errors[0].absolute_path)) if errors else ""
