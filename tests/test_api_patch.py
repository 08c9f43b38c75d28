"""What a patch makes of an object: what kubectl sends, RFC 6902, RFC 7386, and what makes no
sense (kdns/api/patch.py)."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdns.api.patch import (
    MAX_DEPTH,
    MAX_OPERATIONS,
    UNPROCESSABLE,
    json_patch,
    merge_patch,
    strategic_merge,
)
from kdns.errors import ApiError

Obj: TypeAlias = dict[str, Any]

TYPES = {
    "Service": "core/v1.Service",
    "Pod": "core/v1.Pod",
    "Node": "core/v1.Node",
    "ConfigMap": "core/v1.ConfigMap",
    "ServiceAccount": "core/v1.ServiceAccount",
    "Deployment": "apps/v1.Deployment",
}


def whole(kind: str, fields: Obj) -> Obj:
    """An object of a kind, as `kubectl patch --local` reads it."""
    group = "apps/v1" if kind == "Deployment" else "v1"
    metadata = {"name": "web", **fields.get("metadata", {})}
    return {"apiVersion": group, "kind": kind, **fields, "metadata": metadata}


def ports(*numbers: int, **more: Any) -> list[Obj]:
    return [{"name": f"p{number}", "port": number, **more} for number in numbers]


def keys(name: str, *values: Any) -> list[Obj]:
    return [{name: value} for value in values]


def variables(**values: str) -> list[Obj]:
    return [{"name": name, "value": value} for name, value in values.items()]


POD_IP: Obj = {"fieldRef": {"fieldPath": "status.podIP"}}


def containers(*items: Obj, **more: Any) -> Obj:
    """A Deployment's spec."""
    return {"spec": {"template": {"spec": {"containers": list(items), **more}}}}


# --- Strategic merge patch -------------------------------------------------------------------

# kind, what there is, patch, what there is then
STRATEGIC: dict[str, tuple[str, Obj, Obj, Obj]] = {
    "kubectl apply: another targetPort": (
        "Service",
        {"spec": {"ports": ports(80, 443, targetPort=1)}},
        {"spec": {"$setElementOrder/ports": keys("port", 80, 443),
                  "ports": [{"port": 443, "targetPort": 2}]}},
        {"spec": {"ports": [{"name": "p80", "port": 80, "targetPort": 1},
                            {"name": "p443", "port": 443, "targetPort": 2}]}},
    ),
    "kubectl apply: a port less": (
        "Service",
        {"spec": {"ports": ports(80, 443)}},
        {"spec": {"$setElementOrder/ports": keys("port", 80),
                  "ports": [{"$patch": "delete", "port": 443}]}},
        {"spec": {"ports": ports(80)}},
    ),
    "kubectl apply: a port more, at the beginning": (
        "Service",
        {"spec": {"ports": ports(80, 443)}},
        {"spec": {"$setElementOrder/ports": keys("port", 8080, 80, 443),
                  "ports": [{"name": "p8080", "port": 8080}]}},
        {"spec": {"ports": ports(8080, 80, 443)}},
    ),
    "kubectl apply: ports in another order": (
        "Service",
        {"spec": {"ports": ports(80, 443, 53)}},
        {"spec": {"$setElementOrder/ports": keys("port", 53, 80, 443)}},
        {"spec": {"ports": ports(53, 80, 443)}},
    ),
    "kubectl apply: another number of the same port": (
        "Service",
        {"spec": {"ports": [{"name": "http", "port": 80, "nodePort": 30080}]}},
        {"spec": {"$setElementOrder/ports": keys("port", 81),
                  "ports": [{"name": "http", "port": 81}, {"$patch": "delete", "port": 80}]}},
        {"spec": {"ports": [{"name": "http", "port": 81}]}},
    ),
    "kubectl apply: a nodePort that somebody else gave stays": (
        "Service",
        {"spec": {"ports": [{"port": 80, "nodePort": 30080, "targetPort": 1}]}},
        {"spec": {"$setElementOrder/ports": keys("port", 80),
                  "ports": [{"port": 80, "targetPort": 2}]}},
        {"spec": {"ports": [{"port": 80, "nodePort": 30080, "targetPort": 2}]}},
    ),
    "two ports of one number: the patch finds the first": (
        "Service",
        {"spec": {"ports": [{"name": "udp", "port": 53, "protocol": "UDP"},
                            {"name": "tcp", "port": 53, "protocol": "TCP"}]}},
        {"spec": {"ports": [{"port": 53, "targetPort": 5353}]}},
        {"spec": {"ports": [{"name": "udp", "port": 53, "protocol": "UDP", "targetPort": 5353},
                            {"name": "tcp", "port": 53, "protocol": "TCP"}]}},
    ),
    "kubectl patch: a port more stands before what is there": (
        "Service",
        {"spec": {"ports": ports(80)}},
        {"spec": {"ports": [{"name": "p443", "port": 443}]}},
        {"spec": {"ports": ports(443, 80)}},
    ),
    "kubectl set selector": (
        "Service",
        {"spec": {"selector": {"app": "web", "old": "x"}}},
        {"spec": {"selector": {"app": "api", "old": None}}},
        {"spec": {"selector": {"app": "api"}}},
    ),
    "a map as a whole": (
        "Service",
        {"spec": {"selector": {"app": "web", "old": "x"}}},
        {"spec": {"selector": {"$patch": "replace", "app": "api"}}},
        {"spec": {"selector": {"app": "api"}}},
    ),
    "a map emptied": (
        "Service",
        {"spec": {"type": "ClusterIP", "selector": {"app": "web"}}},
        {"spec": {"selector": {"$patch": "delete"}}},
        {"spec": {"type": "ClusterIP", "selector": {}}},
    ),
    "a list as a whole": (
        "Service",
        {"spec": {"ports": ports(80, 443)}},
        {"spec": {"ports": [*ports(53), {"$patch": "replace"}]}},
        {"spec": {"ports": ports(53)}},
    ),
    "a list that is never merged": (
        "Service",
        {"spec": {"externalIPs": ["192.0.2.1", "192.0.2.2"]}},
        {"spec": {"externalIPs": ["192.0.2.3"]}},
        {"spec": {"externalIPs": ["192.0.2.3"]}},
    ),
    "null for what is not there": (
        "Service",
        {"spec": {"type": "ClusterIP"}},
        {"spec": {"externalName": None, "selector": {"app": None}}},
        {"spec": {"type": "ClusterIP", "selector": {}}},
    ),
    "kubectl annotate": (
        "Service",
        {"metadata": {"annotations": {"a": "1"}}},
        {"metadata": {"annotations": {"b": "2"}}},
        {"metadata": {"annotations": {"a": "1", "b": "2"}}},
    ),
    "finalizers: one more": (
        "ConfigMap",
        {"metadata": {"finalizers": ["a/x"]}},
        {"metadata": {"$setElementOrder/finalizers": ["a/x", "b/y"], "finalizers": ["b/y"]}},
        {"metadata": {"finalizers": ["a/x", "b/y"]}},
    ),
    "finalizers: one less": (
        "ConfigMap",
        {"metadata": {"finalizers": ["a/x", "b/y", "c/z"]}},
        {"metadata": {"$deleteFromPrimitiveList/finalizers": ["b/y"],
                      "$setElementOrder/finalizers": ["a/x", "c/z"]}},
        {"metadata": {"finalizers": ["a/x", "c/z"]}},
    ),
    "finalizers: without an order": (
        "ConfigMap",
        {"metadata": {"finalizers": ["a/x", "b/y"]}},
        {"metadata": {"finalizers": ["c/z", "a/x"]}},
        {"metadata": {"finalizers": ["c/z", "a/x", "b/y"]}},
    ),
    "finalizers: none": (
        "ConfigMap",
        {"metadata": {"finalizers": ["a/x"], "labels": {"a": "b"}}},
        {"metadata": {"finalizers": None}},
        {"metadata": {"labels": {"a": "b"}}},
    ),
    "owner references: by uid": (
        "ConfigMap",
        {"metadata": {"ownerReferences": [
            {"apiVersion": "v1", "kind": "Pod", "name": "a", "uid": "1"},
            {"apiVersion": "v1", "kind": "Pod", "name": "b", "uid": "2"}]}},
        {"metadata": {"ownerReferences": [{"$patch": "delete", "uid": "1"},
                                          {"uid": "2", "controller": True}]}},
        {"metadata": {"ownerReferences": [
            {"apiVersion": "v1", "kind": "Pod", "name": "b", "uid": "2", "controller": True}]}},
    ),
    "kubectl set image": (
        "Deployment",
        containers({"name": "a", "image": "a:1"}, {"name": "b", "image": "b:1"}),
        {"spec": {"template": {"spec": {"$setElementOrder/containers": keys("name", "a", "b"),
                                        "containers": [{"name": "b", "image": "b:2"}]}}}},
        containers({"name": "a", "image": "a:1"}, {"name": "b", "image": "b:2"}),
    ),
    "kubectl set env": (
        "Deployment",
        containers({"name": "a", "env": variables(X="1", Y="2")}),
        {"spec": {"template": {"spec": {
            "$setElementOrder/containers": keys("name", "a"),
            "containers": [{"name": "a", "$setElementOrder/env": keys("name", "X", "Z"),
                            "env": [{"name": "Z", "value": "3"},
                                    {"$patch": "delete", "name": "Y"}]}]}}}},
        containers({"name": "a", "env": variables(X="1", Z="3")}),
    ),
    "an env var from elsewhere": (
        "Deployment",
        containers({"name": "a", "env": variables(X="1")}),
        containers({"name": "a", "env": [{"name": "X", "value": None, "valueFrom": POD_IP}]}),
        containers({"name": "a", "env": [{"name": "X", "valueFrom": POD_IP}]}),
    ),
    "arguments are replaced": (
        "Deployment",
        containers({"name": "a", "args": ["-v", "-x"], "image": "i"}),
        containers({"name": "a", "args": ["-v"]}),
        containers({"name": "a", "args": ["-v"], "image": "i"}),
    ),
    "container ports and mounts: by number and by path": (
        "Deployment",
        containers({"name": "a", "ports": keys("containerPort", 80, 81),
                    "volumeMounts": [{"name": "v", "mountPath": "/a"}]}),
        containers({"name": "a", "ports": [{"containerPort": 81, "name": "x"}],
                    "volumeMounts": [{"name": "v", "mountPath": "/b"}]}),
        containers({"name": "a",
                    "ports": [{"containerPort": 80}, {"containerPort": 81, "name": "x"}],
                    "volumeMounts": [{"name": "v", "mountPath": "/b"},
                                     {"name": "v", "mountPath": "/a"}]}),
    ),
    "a volume of another kind": (
        "Deployment",
        containers({"name": "a"}, volumes=[{"name": "v", "configMap": {"name": "c"}},
                                           {"name": "w", "emptyDir": {}}]),
        {"spec": {"template": {"spec": {
            "$setElementOrder/volumes": keys("name", "v", "w"),
            "volumes": [{"$retainKeys": ["name", "secret"], "configMap": None,
                         "name": "v", "secret": {"secretName": "s"}}]}}}},
        containers({"name": "a"}, volumes=[{"name": "v", "secret": {"secretName": "s"}},
                                           {"name": "w", "emptyDir": {}}]),
    ),
    "tolerations are replaced": (
        "Pod",
        {"spec": {"tolerations": [{"key": "a"}, {"key": "b"}]}},
        {"spec": {"tolerations": [{"key": "c", "operator": "Exists"}]}},
        {"spec": {"tolerations": [{"key": "c", "operator": "Exists"}]}},
    ),
    "conditions: by type": (
        "Pod",
        {"status": {"conditions": [{"type": "Ready", "status": "False", "reason": "x"}]}},
        {"status": {"conditions": [{"type": "Ready", "status": "True", "reason": None},
                                   {"type": "Initialized", "status": "True"}]}},
        {"status": {"conditions": [{"type": "Ready", "status": "True"},
                                   {"type": "Initialized", "status": "True"}]}},
    ),
    "host aliases: by address": (
        "Pod",
        {"spec": {"hostAliases": [{"ip": "192.0.2.1", "hostnames": ["a"]}]}},
        {"spec": {"hostAliases": [{"ip": "192.0.2.1", "hostnames": ["b"]}]}},
        {"spec": {"hostAliases": [{"ip": "192.0.2.1", "hostnames": ["b"]}]}},
    ),
    "kubectl cordon": (
        "Node", {"spec": {"podCIDR": "10.0.0.0/24"}}, {"spec": {"unschedulable": True}},
        {"spec": {"podCIDR": "10.0.0.0/24", "unschedulable": True}},
    ),
    "kubectl taint": (
        "Node",
        {"spec": {"taints": [{"key": "a", "effect": "NoSchedule"}]}},
        {"spec": {"taints": [{"key": "b", "effect": "NoExecute"}]}},
        {"spec": {"taints": [{"key": "b", "effect": "NoExecute"}]}},
    ),
    "kubectl scale, kubectl rollout pause": (
        "Deployment", {"spec": {"replicas": 1, "paused": True}},
        {"spec": {"replicas": 3, "paused": None}}, {"spec": {"replicas": 3}},
    ),
    "another strategy": (
        "Deployment",
        {"spec": {"strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}}}},
        {"spec": {"strategy": {"$retainKeys": ["type"], "type": "Recreate"}}},
        {"spec": {"strategy": {"type": "Recreate"}}},
    ),
    "another strategy, as kubectl apply asks for it": (
        "Deployment",
        {"spec": {"strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}}}},
        {"spec": {"strategy": {"$retainKeys": ["type"], "rollingUpdate": None,
                               "type": "Recreate"}}},
        {"spec": {"strategy": {"type": "Recreate"}}},
    ),
    "kubectl rollout restart": (
        "Deployment",
        containers({"name": "a"}),
        {"spec": {"template": {"metadata": {"annotations": {"restartedAt": "now"}}}}},
        {"spec": {"template": {"metadata": {"annotations": {"restartedAt": "now"}},
                               "spec": {"containers": [{"name": "a"}]}}}},
    ),
    "image pull secrets of a service account are replaced, its secrets merged": (
        "ServiceAccount",
        {"imagePullSecrets": keys("name", "a"), "secrets": keys("name", "a")},
        {"imagePullSecrets": keys("name", "b"), "secrets": keys("name", "b")},
        {"imagePullSecrets": keys("name", "b"), "secrets": keys("name", "b", "a")},
    ),
    "image pull secrets of a pod are merged": (
        "Pod",
        {"spec": {"imagePullSecrets": keys("name", "a")}},
        {"spec": {"imagePullSecrets": keys("name", "b")}},
        {"spec": {"imagePullSecrets": keys("name", "b", "a")}},
    ),
    "an item that is not there is not deleted": (
        "Service",
        {"spec": {"ports": ports(80)}},
        {"spec": {"ports": [{"$patch": "delete", "port": 81}]}},
        {"spec": {"ports": ports(80)}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STRATEGIC)
def test_strategic_merge_patch(name: str) -> None:
    kind, there, patch, wanted = STRATEGIC[name]
    obj, sent = whole(kind, there), copy.deepcopy(patch)
    assert strategic_merge(TYPES[kind], obj, sent) == whole(kind, wanted)
    assert (obj, sent) == (whole(kind, there), patch), "an argument was changed"


def settled(value: Any) -> Any:
    """A value without what Go leaves out or adds when it is empty."""
    if isinstance(value, dict):
        found = {key: settled(item) for key, item in value.items()}
        return {key: item for key, item in found.items() if item not in (None, {}, [], "")}
    return [settled(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", STRATEGIC)
def test_kubectl_itself_patches_the_same_way(name: str, tmp_path: Path) -> None:
    beside = Path(sys.executable).parent
    kubectl = shutil.which("kubectl", path=str(beside)) or shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("no kubectl: neither beside the interpreter nor on PATH")
    kind, there, patch, wanted = STRATEGIC[name]
    file = tmp_path / "object.json"
    file.write_text(json.dumps(whole(kind, there)))
    done = subprocess.run(
        [kubectl, "patch", "--local", "-f", str(file), "--type=strategic",
         "-p", json.dumps(patch), "-o", "json"],
        capture_output=True, text=True, check=True, timeout=60, env={"HOME": str(tmp_path)},
    )  # fmt: skip
    assert settled(json.loads(done.stdout)) == settled(whole(kind, wanted))


NONSENSE: dict[str, tuple[Obj, str]] = {
    "unknown directive for a map": (
        {"spec": {"selector": {"$patch": "merge", "a": "b"}}},
        'unknown patch type: merge in map: {"a": "b"}',
    ),
    "unknown directive for an item": (
        {"spec": {"ports": [{"$patch": "zap", "port": 80}]}},
        'unknown patch type: zap in map: {"$patch": "zap", "port": 80}',
    ),
    "merging lists by name": (
        {"spec": {"ports": [{"$patch": "merge", "port": 80}]}},
        "merging lists cannot yet be specified in the patch",
    ),
    "an item without its key": (
        {"spec": {"ports": [{"name": "http"}]}},
        'map: {"name": "http"} does not contain declared merge key: port',
    ),
    "items out of the order asked for": (
        {"spec": {"ports": keys("port", 80, 443),
                  "$setElementOrder/ports": keys("port", 443, 80)}},
        "The order in patch list:\n",
    ),
    "an order of something that is no list": (
        {"spec": {"$setElementOrder/ports": {"port": 80}}},
        "invalid patch format of setElementOrder list",
    ),
    "keys to retain that are no list": (
        {"spec": {"$retainKeys": "type"}}, "invalid patch format of retainKeys",
    ),
    "keys that are not retained": (
        {"spec": {"$retainKeys": ["type"], "externalName": "x"}},
        "invalid patch format of retainKeys",
    ),
    "deletions that are no list": (
        {"metadata": {"$deleteFromPrimitiveList/finalizers": "a"}},
        "invalid patch format of primitive list",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NONSENSE)
def test_patches_that_make_no_sense(name: str) -> None:
    patch, message = NONSENSE[name]
    there = {
        "metadata": {"finalizers": ["a"]},
        "spec": {"ports": ports(80), "selector": {"a": "b"}},
    }
    with pytest.raises(ApiError) as refused:
        strategic_merge("core/v1.Service", whole("Service", there), patch)
    assert (refused.value.code, refused.value.reason) == (400, "BadRequest")
    assert str(refused.value).startswith(message)


# --- Merge patch -----------------------------------------------------------------------------

# The examples of RFC 7386, appendix A, as far as both sides are objects.
MERGES: tuple[tuple[Obj, Obj, Obj], ...] = (
    ({"a": "b"}, {"a": "c"}, {"a": "c"}),
    ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
    ({"a": "b"}, {"a": None}, {}),
    ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
    ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
    ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
    ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
    ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
    ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
    ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
)


@pytest.mark.parametrize(("there", "patch", "wanted"), MERGES)
def test_merge_patch(there: Obj, patch: Obj, wanted: Obj) -> None:
    before = copy.deepcopy((there, patch))
    assert merge_patch(there, patch) == wanted
    assert (there, patch) == before, "an argument was changed"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["", "a", "b"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "b", "c", "$patch"]), inner, max_size=3)
    ),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.sampled_from(["a", "b", "c"]), JSON, max_size=4)


@given(OBJECTS, OBJECTS)
def test_a_merge_patch_says_the_same_twice(there: Obj, patch: Obj) -> None:
    once = merge_patch(there, patch)
    assert merge_patch(once, patch) == once
    assert all(key not in once for key, value in patch.items() if value is None)


# --- JSON patch ------------------------------------------------------------------------------

THERE: Obj = {"metadata": {"labels": {"app": "web", "a/b": "c"}}, "spec": {"ips": ["1", "2"]}}

DONE: dict[str, tuple[list[Obj], Obj]] = {
    "add a label": (
        [{"op": "add", "path": "/metadata/labels/x", "value": "y"}],
        {"metadata": {"labels": {"app": "web", "a/b": "c", "x": "y"}}, "spec": {"ips": ["1", "2"]}},
    ),
    "a slash in a name": (
        [{"op": "replace", "path": "/metadata/labels/a~1b", "value": "d"}],
        {"metadata": {"labels": {"app": "web", "a/b": "d"}}, "spec": {"ips": ["1", "2"]}},
    ),
    "insert and append": (
        [{"op": "add", "path": "/spec/ips/0", "value": "0"},
         {"op": "add", "path": "/spec/ips/-", "value": "3"}],
        {**THERE, "spec": {"ips": ["0", "1", "2", "3"]}},
    ),
    "remove": ([{"op": "remove", "path": "/spec/ips/0"}], {**THERE, "spec": {"ips": ["2"]}}),
    "move": (
        [{"op": "move", "from": "/spec/ips/1", "path": "/spec/ips/0"}],
        {**THERE, "spec": {"ips": ["2", "1"]}},
    ),
    "copy": (
        [{"op": "copy", "from": "/spec/ips/1", "path": "/spec/last"}],
        {**THERE, "spec": {"ips": ["1", "2"], "last": "2"}},
    ),
    "test, then replace": (
        [{"op": "test", "path": "/metadata/labels/app", "value": "web"},
         {"op": "replace", "path": "/spec", "value": {}}],
        {**THERE, "spec": {}},
    ),
    "test that something is not there": (
        [{"op": "test", "path": "/metadata/annotations", "value": None}], THERE,
    ),
    "nothing": ([], THERE),
}  # fmt: skip


@pytest.mark.parametrize("name", DONE)
def test_json_patch(name: str) -> None:
    operations, wanted = DONE[name]
    before = copy.deepcopy(THERE)
    assert json_patch(THERE, json.dumps(operations).encode()) == wanted
    assert before == THERE, "the object was changed"


NOT_DONE: dict[str, Obj] = {
    "a test that fails": {"op": "test", "path": "/metadata/labels/app", "value": "api"},
    "a test of something that is not there": {"op": "test", "path": "/x/y", "value": "1"},
    "null for something that is there": {"op": "test", "path": "/spec", "value": None},
    "true for 1": {"op": "test", "path": "/one", "value": True},
    "remove what is not there": {"op": "remove", "path": "/metadata/labels/x"},
    "replace what is not there": {"op": "replace", "path": "/metadata/labels/x", "value": "y"},
    "add below what is not there": {"op": "add", "path": "/metadata/annotations/x", "value": "y"},
    "beyond the end of a list": {"op": "add", "path": "/spec/ips/3", "value": "y"},
    "a path without a slash": {"op": "add", "path": "spec", "value": {}},
    "no path": {"op": "add", "value": {}},
    "no op": {"path": "/spec", "value": {}},
    "an unknown op": {"op": "merge", "path": "/spec", "value": {}},
    "an op that is no word": {"op": ["add"], "path": "/spec", "value": {}},
    "copy from nowhere": {"op": "copy", "path": "/spec"},
    "move into itself": {"op": "move", "from": "/spec", "path": "/spec/ips/0"},
    "no object is left": {"op": "replace", "path": "", "value": []},
}


@pytest.mark.parametrize("name", NOT_DONE)
def test_json_patches_that_do_not_apply(name: str) -> None:
    with pytest.raises(ApiError) as refused:
        json_patch({**THERE, "one": 1}, json.dumps([NOT_DONE[name]]).encode())
    assert (refused.value.code, refused.value.reason) == (422, "Invalid")
    assert (
        str(refused.value)
        == UNPROCESSABLE
        == ("the server rejected our request due to an error in our request")
    )


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"{}", b"null", b'"add"', b"[1]", b"[[]]", b"\xff", b"[NaN]", b"[" * 100_000],
    ids=range(10),
)
def test_bodies_that_are_no_json_patch(body: bytes) -> None:
    with pytest.raises(ApiError) as refused:
        json_patch(THERE, body)
    assert (refused.value.code, refused.value.reason) == (400, "BadRequest")
    assert str(refused.value).startswith("error decoding patch: ")


def test_a_json_patch_may_have_10_000_operations() -> None:
    one = {"op": "add", "path": "/metadata/labels/x", "value": "y"}
    patched = json_patch(THERE, json.dumps([one] * MAX_OPERATIONS).encode())
    assert patched["metadata"]["labels"]["x"] == "y"
    with pytest.raises(ApiError) as refused:
        json_patch(THERE, json.dumps([one] * 10_001).encode())
    assert (refused.value.code, refused.value.reason) == (413, "RequestEntityTooLarge")
    assert str(refused.value) == (
        "The allowed maximum operations in a JSON patch is 10000, got 10001"
    )


def test_copies_do_not_fill_the_memory() -> None:
    """Each copies all that is there: 40 would be 2**40 times the object."""
    operations = [{"op": "copy", "from": "/spec", "path": f"/spec/{n}"} for n in range(40)]
    with pytest.raises(ApiError) as refused:
        json_patch(THERE, json.dumps(operations).encode())
    assert refused.value.code == 422


def test_patches_cannot_nest_without_end() -> None:
    deep: Obj = {}
    for _ in range(MAX_DEPTH + 1):
        deep = {"a": deep}
    add = json.dumps([{"op": "add", "path": "/a", "value": deep}]).encode()
    patches: list[Callable[[], Obj]] = [
        lambda: merge_patch({}, deep),
        lambda: strategic_merge("core/v1.ConfigMap", {}, {"data": deep}),
        lambda: json_patch({}, add),
    ]
    for patch in patches:
        with pytest.raises(ApiError) as refused:
            patch()
        assert refused.value.code == 400


@given(
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "op": st.sampled_from(["add", "remove", "replace", "move", "copy", "test", "x", 1]),
                "path": st.sampled_from(["", "/", "/a", "/a/0", "/a/-", "/b/a", "/~2", "a", 1]),
                "from": st.sampled_from(["", "/a", "/b", "/b/c", None]),
                "value": JSON,
            },
        ),
        max_size=6,
    ),
    OBJECTS,
)
def test_any_json_patch_is_done_or_refused(operations: list[Obj], there: Obj) -> None:
    before = copy.deepcopy(there)
    try:
        assert isinstance(json_patch(there, json.dumps(operations).encode()), dict)
    except ApiError as refused:
        assert refused.code in (400, 422)
    assert there == before
