"""The table of types (kdns/api/schema_table.py) is complete and hangs together: held against the
JSON schemas of Kubernetes 1.36 in the package kubernetes-validate."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import Any

import pytest

from kdns.api.discovery import REVIEWS
from kdns.api.kinds import RESOURCES
from kdns.api.schema import Field, Type, type_for, type_named, type_names

ALL = type_names()
# Of Go, not of OpenAPI: embedded in others, or read from a query.
NOT_PUBLISHED = {
    "core/v1.EphemeralContainerCommon", "core/v1.ProbeHandler", "core/v1.VolumeSource",
    "meta/v1.CreateOptions", "meta/v1.GetOptions", "meta/v1.ListOptions", "meta/v1.PatchOptions",
    "meta/v1.UpdateOptions",
}  # fmt: skip
PUBLISHED: dict[str, list[str]] = {}  # by group
for _name in ALL:
    if _name not in NOT_PUBLISHED:
        PUBLISHED.setdefault(_name.rpartition(".")[0], []).append(_name)


@cache
def upstream() -> dict[str, Any]:
    root = files("kubernetes_validate") / "kubernetes-json-schema"
    found = json.loads((root / "v1.36.0-local" / "_definitions.json").read_text())
    return dict(found["$defs"])


def upstream_name(name: str) -> str:
    group, _, rest = name.partition("/")
    if group == "meta":
        return f"io.k8s.apimachinery.pkg.apis.meta.{rest}"
    return f"io.k8s.api.{group.split('.')[0]}.{rest}"


UPSTREAM_SCALARS = {
    "io.k8s.apimachinery.pkg.apis.meta.v1.Time": "time",
    "io.k8s.apimachinery.pkg.apis.meta.v1.MicroTime": "microtime",
    "io.k8s.apimachinery.pkg.apis.meta.v1.FieldsV1": "fieldsv1",
    "io.k8s.apimachinery.pkg.api.resource.Quantity": "quantity",
    "io.k8s.apimachinery.pkg.util.intstr.IntOrString": "intorstring",
}


def upstream_type(schema: dict[str, Any]) -> str:
    """Return what one of our scalars, or upstream's name of a type, stands for a schema."""
    if "$ref" in schema:
        name: str = schema["$ref"].rpartition("/")[2]
        return UPSTREAM_SCALARS.get(name, name)
    kind = schema["type"]
    if isinstance(kind, list):
        kind = next(one for one in kind if one != "null")
    form: str = schema.get("format", "")
    words = {
        "array": "strings", "boolean": "bool", "integer": form,
        "string": "bytes" if form == "byte" else "string",
    }  # fmt: skip
    return words[kind]


def own_type(field: Field) -> str:
    return field.type if field.scalar else upstream_name(field.type)


@pytest.mark.parametrize("group", PUBLISHED)
def test_has_the_fields_of_upstream(group: str) -> None:
    for name in PUBLISHED[group]:
        theirs, ours = upstream()[upstream_name(name)], type_named(name)
        assert (name, set(ours.fields)) == (name, set(theirs.get("properties", {})))
        required = {field.name for field in ours.fields.values() if field.required}
        assert (name, required) == (name, set(theirs.get("required", [])))


def fields_of(group: str) -> Iterator[tuple[str, Field, dict[str, Any]]]:
    """Yield the place of each field of a group's types, the field, and upstream's schema."""
    for name in PUBLISHED[group]:
        theirs = upstream()[upstream_name(name)].get("properties", {})
        for field in type_named(name).fields.values():
            yield f"{name}.{field.name}", field, theirs[field.name]


@pytest.mark.parametrize("group", PUBLISHED)
def test_fields_have_the_types_of_upstream(group: str) -> None:
    for place, field, schema in fields_of(group):
        shape = "one"
        if "items" in schema:
            shape, schema = "list", schema["items"]
        elif "additionalProperties" in schema:
            shape, schema = "map", schema["additionalProperties"]
        assert (place, field.shape, own_type(field)) == (place, shape, upstream_type(schema))


@pytest.mark.parametrize("group", PUBLISHED)
def test_fields_merge_as_upstream(group: str) -> None:
    for place, field, schema in fields_of(group):
        strategy = set(filter(None, schema.get("x-kubernetes-patch-strategy", "").split(",")))
        key = schema.get("x-kubernetes-patch-merge-key", "-" if "merge" in strategy else "")
        assert (place, field.merge_key, field.retain_keys) == (
            place, key, "retainKeys" in strategy,
        )  # fmt: skip
        listed = schema.get("x-kubernetes-list-type", "atomic")
        keys = tuple(schema.get("x-kubernetes-list-map-keys", ()))
        assert (place, field.list_type, field.list_keys) == (place, listed, keys)
        if field.shape == "map":
            atomic = schema.get("x-kubernetes-map-type") == "atomic"
            assert (place, field.atomic) == (place, atomic)
    for name in PUBLISHED[group]:
        atomic = upstream()[upstream_name(name)].get("x-kubernetes-map-type") == "atomic"
        assert (name, type_named(name).atomic) == (name, atomic)


def test_types_of_fields_exist() -> None:
    for kind in map(type_named, ALL):
        assert kind.fields, kind.name
        for field in [*kind.fields.values(), *kind.by_number.values()]:
            assert field.scalar or type_named(field.type).fields, (kind.name, field.name)
            # strict.py and protobuf.py rely on it: no map has messages in it
            assert field.scalar or field.shape != "map", (kind.name, field.name)


def test_protobuf_numbers_are_given_once() -> None:
    """A number given twice would hide a field: each type has as many as it has fields."""
    for kind in map(type_named, ALL):
        embedded = [f for f in kind.by_number.values() if f.inline]
        within = sum(len(type_named(f.type).fields) for f in embedded)
        numbered = [f for f in kind.fields.values() if f.number]
        assert len(kind.by_number) == len(numbered) - within + len(embedded), kind.name


def test_no_type_contains_itself() -> None:
    """What reads objects by their types goes no deeper than the types do."""

    def depth(kind: Type, above: tuple[str, ...]) -> int:
        assert kind.name not in above
        inner = {f.type for f in kind.fields.values() if not f.scalar}
        return 1 + max((depth(type_named(t), (*above, kind.name)) for t in inner), default=0)

    assert max(depth(type_named(r.type), ()) for r in RESOURCES) < 20


@pytest.mark.parametrize("resource", RESOURCES, ids=lambda r: r.plural)
def test_each_kind_and_its_list(resource: Any) -> None:
    kind = type_for(resource.api_version, resource.kind)
    assert (kind.name, kind.kind, kind.api_version) == (
        resource.type, resource.kind, resource.api_version,
    )  # fmt: skip
    assert kind.fields["metadata"].type == "meta/v1.ObjectMeta"
    many = type_for(resource.api_version, f"{resource.kind}List")
    assert many.fields["items"].type == resource.type
    assert ("status" in kind.fields) >= ("status" in resource.subresources)


@pytest.mark.parametrize(
    ("api_version", "kind", "name"),
    [
        *((f"{group}/{version}", kind, f"{group}/{version}.{kind}")
          for group, version, kind, *_ in REVIEWS),
        ("autoscaling/v1", "Scale", "autoscaling/v1.Scale"),
        ("policy/v1", "Eviction", "policy/v1.Eviction"),
        ("v1", "DeleteOptions", "meta/v1.DeleteOptions"),
        ("apps/v1", "DeleteOptions", "meta/v1.DeleteOptions"),
        ("policy/v1", "DeleteOptions", "meta/v1.DeleteOptions"),
        ("v1", "Status", "meta/v1.Status"),
    ],
)  # fmt: skip
def test_other_bodies_have_a_type(api_version: str, kind: str, name: str) -> None:
    assert type_for(api_version, kind).name == name


@pytest.mark.parametrize(
    ("api_version", "kind"),
    [
        ("v1", "ServiceSpec"),  # no object of its own
        ("v1", "ObjectReference"),  # has apiVersion and kind, of another object
        ("v2", "Service"),
        ("", ""),
        ("apps/v1", "Service"),
        ("example.com/v1", "Widget"),
    ],
)
def test_what_is_no_object_has_none(api_version: str, kind: str) -> None:
    with pytest.raises(KeyError):
        type_for(api_version, kind)
