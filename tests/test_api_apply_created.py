"""Who owns what of a new object, whatever is in it.

A create is recorded in one walk of its own (apply.py). A client that writes `managedFields:
[{}]` asks for the long way, in which owners that there were are compared; there were none.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdns.api.apply import Obj, track_update
from kdns.api.kinds import RESOURCES, Resource
from kdns.api.schema import Field, type_named

NOW = "2026-01-02T03:04:05Z"
# Empty ones among them: what says nothing is owned by nobody.
SCALARS: dict[str, st.SearchStrategy[Any]] = {
    "int32": st.sampled_from([0, 1, 80]),
    "int64": st.sampled_from([0, 1]),
    "bool": st.booleans(),
    "intorstring": st.sampled_from([0, 80, "http", ""]),
    "quantity": st.sampled_from(["0", "1", "500m"]),
    "time": st.just(NOW),
    "microtime": st.just(NOW),
    "bytes": st.sampled_from(["", "YQ=="]),
    "any": st.sampled_from([None, {}, {"a": 1}]),
    "fieldsv1": st.just({}),
    "strings": st.lists(st.sampled_from(["a", "b"]), max_size=2),
}
WORDS = st.sampled_from(["", "a", "b", "TCP"])
DEEPEST = 6


def values(one: Field, depth: int) -> st.SearchStrategy[Any]:
    inner = SCALARS.get(one.type, WORDS) if one.scalar else messages(one.type, depth + 1)
    if one.shape == "list":
        return st.lists(inner, max_size=3)
    if one.shape == "map":
        return st.dictionaries(st.sampled_from(["a", "b.c/d", "z"]), inner, max_size=2)
    return inner


def messages(name: str, depth: int = 0) -> st.SearchStrategy[Obj]:
    """Objects of a type, a few of its fields given."""
    fields = [
        one
        for one in type_named(name).fields.values()
        if one.name != "managedFields" and (one.scalar or depth < DEEPEST)
    ]
    if not fields:
        return st.just({})

    def filled(chosen: list[Field]) -> st.SearchStrategy[Obj]:
        return st.fixed_dictionaries({one.name: values(one, depth) for one in chosen})

    return st.lists(st.sampled_from(fields), max_size=5, unique_by=lambda one: one.name).flatmap(
        filled
    )


@pytest.mark.parametrize("resource", RESOURCES, ids=lambda one: one.plural)
@settings(
    max_examples=25, deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
@given(data=st.data())
def test_a_create_owns_what_it_says(resource: Resource, data: st.DataObject) -> None:
    obj = data.draw(messages(resource.type))
    obj |= {"apiVersion": resource.api_version, "kind": resource.kind}
    for part in ("metadata", "spec"):  # those that all else hangs on, more often than chance has it
        if part in type_named(resource.type).fields:
            inner = type_named(resource.type).fields[part]
            obj[part] = data.draw(messages(inner.type, 1))
    before = json.dumps(obj)

    def recorded(said: list[Obj] | None) -> str:
        metadata = obj["metadata"] if said is None else {**obj["metadata"], "managedFields": said}
        made = track_update(
            resource.type, None, {**obj, "metadata": metadata}, "someone",
            now=NOW, api_version=resource.api_version,
        )  # fmt: skip
        return json.dumps(made)  # in the same order

    assert recorded(None) == recorded([{}])
    assert json.dumps(obj) == before
