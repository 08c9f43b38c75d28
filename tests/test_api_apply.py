"""Who owns which field: kubectl apply --server-side, metadata.managedFields (kdns/api/apply.py).

What is expected here is what a kube-apiserver answers: reference kubectl 2.5, KEP-555.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any, TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdns.api.apply import apply_object, parse_fields, render_fields, track_update
from kdns.errors import ApiError

Obj: TypeAlias = dict[str, Any]

EARLY, LATE = "2026-01-01T10:00:00Z", "2026-01-01T11:00:00Z"
LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
PORT_80 = 'k:{"port":80,"protocol":"TCP"}'
PORT_443 = 'k:{"port":443,"protocol":"TCP"}'


def an_object(kind: str, **fields: Any) -> Obj:
    version = {"Deployment": "apps/v1", "EndpointSlice": "discovery.k8s.io/v1"}.get(kind, "v1")
    metadata = {"name": "web", "namespace": "default", **fields.pop("metadata", {})}
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **fields}


def service(*, labels: Obj | None = None, annotations: Obj | None = None, **spec: Any) -> Obj:
    metadata = {
        key: value
        for key, value in (("labels", labels), ("annotations", annotations))
        if value is not None
    }
    return an_object("Service", metadata=metadata, **({"spec": spec} if spec else {}))


def config_map(**data: str) -> Obj:
    return an_object("ConfigMap", data=data)


def type_of(obj: Obj) -> str:
    group = obj["apiVersion"] if "/" in obj["apiVersion"] else "core/v1"
    return f"{group}.{obj['kind']}"


def applied(
    current: Obj | None,
    wanted: Obj,
    manager: str = "kubectl",
    *,
    force: bool = False,
    now: str = EARLY,
    subresource: str = "",
) -> Obj:
    return apply_object(
        type_of(wanted), current, wanted, manager,
        force=force, now=now, api_version=wanted["apiVersion"], subresource=subresource,
    )  # fmt: skip


def written(
    before: Obj | None,
    after: Obj,
    manager: str = "kubectl-edit",
    *,
    now: str = EARLY,
    subresource: str = "",
) -> Obj:
    """A create, update or patch; managedFields as the client got them."""
    return track_update(
        type_of(after), before, after, manager,
        now=now, api_version=after["apiVersion"], subresource=subresource,
    )  # fmt: skip


def entries(obj: Obj) -> list[Obj]:
    found: list[Obj] = obj["metadata"].get("managedFields", [])
    return found


def owned(obj: Obj, manager: str, operation: str = "", subresource: str = "") -> list[str]:
    """The paths that a manager owns, sorted: ["spec", "spec.ports.k:{...}"]."""
    return sorted(
        path
        for entry in entries(obj)
        if entry["manager"] == manager
        and operation in ("", entry["operation"])
        and entry.get("subresource", "") == subresource
        for path in paths_in(entry["fieldsV1"])
    )


def paths_in(fields: Obj, prefix: str = "") -> Iterator[str]:
    """Read FieldsV1 the plain way: a leaf or a "." is a field that is owned."""
    for step, below in fields.items():
        here = f"{prefix}.{step.removeprefix('f:')}".removeprefix(".")
        if step == ".":
            yield prefix
        elif below:
            yield from paths_in(below, here)
        else:
            yield here


def changed(obj: Obj, **fields: Any) -> Obj:
    """A copy of an object as a client changes it: spec and data by key, None removes."""
    new = copy.deepcopy(obj)
    inside = new.setdefault("spec" if new["kind"] != "ConfigMap" else "data", {})
    for key, value in fields.items():
        if value is None:
            inside.pop(key, None)
        else:
            inside[key] = value
    return new


# --- What a write records --------------------------------------------------------------------

WEB = service(
    labels={"app": "web"},
    type="ClusterIP",
    selector={"app": "web"},
    ports=[{"name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080}],
)

# object, and what creating it and applying it records
RECORDED: dict[str, tuple[Obj, Obj, Obj]] = {
    "a Service": (
        WEB,
        {
            "f:metadata": {"f:labels": {".": {}, "f:app": {}}},
            "f:spec": {
                "f:ports": {".": {}, PORT_80: {
                    ".": {}, "f:name": {}, "f:port": {}, "f:protocol": {}, "f:targetPort": {}}},
                "f:selector": {},
                "f:type": {},
            },
        },
        {
            "f:metadata": {"f:labels": {"f:app": {}}},
            "f:spec": {
                "f:ports": {PORT_80: {
                    ".": {}, "f:name": {}, "f:port": {}, "f:protocol": {}, "f:targetPort": {}}},
                "f:selector": {},
                "f:type": {},
            },
        },
    ),
    "a port without a protocol": (
        service(ports=[{"port": 80}]),
        {"f:spec": {"f:ports": {".": {}, PORT_80: {".": {}, "f:port": {}, "f:targetPort": {}}}}},
        {"f:spec": {"f:ports": {PORT_80: {".": {}, "f:port": {}}}}},
    ),
    "ports, by number and protocol": (
        service(ports=[{"port": 443}, {"port": 80, "protocol": "UDP"}, {"port": 80}]),
        {"f:spec": {"f:ports": {
            ".": {},
            PORT_80: {".": {}, "f:port": {}, "f:targetPort": {}},
            'k:{"port":80,"protocol":"UDP"}': {
                ".": {}, "f:port": {}, "f:protocol": {}, "f:targetPort": {}},
            PORT_443: {".": {}, "f:port": {}, "f:targetPort": {}},
        }}},
        {"f:spec": {"f:ports": {
            PORT_80: {".": {}, "f:port": {}},
            'k:{"port":80,"protocol":"UDP"}': {".": {}, "f:port": {}, "f:protocol": {}},
            PORT_443: {".": {}, "f:port": {}},
        }}},
    ),
    "a ConfigMap": (
        config_map(b="2", a="1"),
        {"f:data": {".": {}, "f:a": {}, "f:b": {}}},
        {"f:data": {"f:a": {}, "f:b": {}}},
    ),
    "finalizers and owner references": (
        an_object("ConfigMap", metadata={
            "finalizers": ["b/y", "a/x"],
            "ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": "u"}]}),
        {"f:metadata": {
            "f:finalizers": {".": {}, 'v:"a/x"': {}, 'v:"b/y"': {}},
            "f:ownerReferences": {".": {}, 'k:{"uid":"u"}': {}}}},
        {"f:metadata": {
            "f:finalizers": {'v:"a/x"': {}, 'v:"b/y"': {}},
            "f:ownerReferences": {'k:{"uid":"u"}': {}}}},
    ),
    "a Deployment: selectors as a whole, containers by name, env too": (
        an_object("Deployment", spec={
            "replicas": 0,
            "selector": {"matchLabels": {"app": "web"}},
            "template": {"spec": {"containers": [
                {"name": "c", "args": ["-v"], "env": [{"name": "E", "value": "1"}],
                 "resources": {"limits": {"cpu": "1"}}}]}}}),
        {"f:spec": {
            "f:replicas": {},
            "f:selector": {},
            "f:template": {"f:spec": {"f:containers": {'k:{"name":"c"}': {
                ".": {}, "f:args": {},
                "f:env": {".": {}, 'k:{"name":"E"}': {".": {}, "f:name": {}, "f:value": {}}},
                "f:name": {},
                "f:resources": {".": {}, "f:limits": {".": {}, "f:cpu": {}}}}}}}}},
        {"f:spec": {
            "f:replicas": {},
            "f:selector": {},
            "f:template": {"f:spec": {"f:containers": {'k:{"name":"c"}': {
                ".": {}, "f:args": {},
                "f:env": {'k:{"name":"E"}': {".": {}, "f:name": {}, "f:value": {}}},
                "f:name": {}, "f:resources": {"f:limits": {"f:cpu": {}}}}}}}}},
    ),
    "an EndpointSlice: its lists as a whole": (
        an_object("EndpointSlice", addressType="IPv4", ports=[{"port": 80}],
                  endpoints=[{"addresses": ["192.0.2.1"]}]),
        {"f:addressType": {}, "f:endpoints": {}, "f:ports": {}},
        {"f:addressType": {}, "f:endpoints": {}, "f:ports": {}},
    ),
    "empty values, as kubectl create --dry-run prints them": (
        an_object("ConfigMap", metadata={"labels": {}, "annotations": {}}, data={}),
        {},
        {"f:data": {}, "f:metadata": {"f:annotations": {}, "f:labels": {}}},
    ),
    "nothing": (an_object("ConfigMap"), {}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDED)
def test_creating_records_what_is_there(name: str) -> None:
    obj, fields, _ = RECORDED[name]
    told = entries(written(None, obj, "kubectl-create"))
    wanted = {
        "manager": "kubectl-create",
        "operation": "Update",
        "apiVersion": obj["apiVersion"],
        "time": EARLY,
        "fieldsType": "FieldsV1",
        "fieldsV1": fields,
    }
    assert json.dumps(told) == json.dumps([wanted] if fields else [])  # in the same order


@pytest.mark.parametrize("name", RECORDED)
def test_applying_records_what_is_applied(name: str) -> None:
    obj, _, fields = RECORDED[name]
    told = entries(applied(None, obj, "flux"))
    wanted = {
        "manager": "flux",
        "operation": "Apply",
        "apiVersion": obj["apiVersion"],
        "time": EARLY,
        "fieldsType": "FieldsV1",
        "fieldsV1": fields,
    }
    assert json.dumps(told) == json.dumps([wanted] if fields else [])


@pytest.mark.parametrize("name", RECORDED)
def test_nothing_but_managed_fields_comes_of_a_create(name: str) -> None:
    obj, _, _ = RECORDED[name]
    before = copy.deepcopy(obj)
    for made in (written(None, obj), applied(None, obj)):
        made["metadata"].pop("managedFields", None)
        assert made == before == obj


def test_what_the_api_gives_belongs_to_nobody() -> None:
    given_by_api = {
        "uid": "1", "resourceVersion": "7", "generation": 2, "selfLink": "/x",
        "creationTimestamp": EARLY,
    }  # fmt: skip
    obj = an_object("ConfigMap", metadata={**given_by_api, "generateName": "we"})
    assert owned(written(None, obj), "kubectl-edit") == ["metadata.generateName"]


def test_status_belongs_to_who_writes_the_status() -> None:
    ingress = {"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}]}}
    made = written(None, {**WEB, "status": ingress}, "kubectl-create")
    assert not [path for path in owned(made, "kubectl-create") if path.startswith("status")]
    made = written(None, WEB, "kubectl-create")
    with_status = written(made, {**made, "status": ingress}, "lb", subresource="status")
    assert owned(with_status, "lb", subresource="status") == ["status.loadBalancer.ingress"]
    assert [entry.get("subresource") for entry in entries(with_status)] == [None, "status"]
    stolen = changed(with_status, type="NodePort")
    assert written(with_status, stolen, "lb", subresource="status") == {
        **stolen, "metadata": with_status["metadata"],
    }  # fmt: skip


def test_applying_to_the_status() -> None:
    made = written(None, WEB)
    status = {"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}]}}
    wanted = {**service(type="NodePort"), "status": status}
    got = applied(made, wanted, "lb", subresource="status")
    assert (got["spec"], got["status"]) == (WEB["spec"], status)
    assert owned(got, "lb", subresource="status") == ["status.loadBalancer.ingress"]
    got = applied(made, wanted, "lb", force=True)
    assert "status" not in got
    assert owned(got, "lb") == ["spec.type"]


# --- Updates ---------------------------------------------------------------------------------


def test_who_changes_a_field_owns_it() -> None:
    made = written(None, config_map(a="1", b="1"), "creator")
    got = written(made, changed(made, b="2", c="1"), "editor", now=LATE)
    assert owned(got, "creator") == ["data", "data.a"]
    assert owned(got, "editor") == ["data.b", "data.c"]
    assert [entry["time"] for entry in entries(got)] == [EARLY, LATE]


def test_what_is_removed_belongs_to_nobody() -> None:
    made = written(None, config_map(a="1", b="1"), "creator")
    got = written(made, changed(made, a=None), "editor", now=LATE)
    assert owned(got, "creator") == ["data", "data.b"]
    assert owned(got, "editor") == []
    got = written(got, an_object("ConfigMap"), "editor")
    assert "managedFields" not in got["metadata"]


def test_one_manager_has_one_entry_however_often_it_writes() -> None:
    obj = written(None, config_map(a="1"), "editor")
    for key in "bcd":
        obj = written(obj, changed(obj, **{key: "1"}), "editor", now=LATE)
    assert len(entries(obj)) == 1
    assert owned(obj, "editor") == ["data", "data.a", "data.b", "data.c", "data.d"]
    assert entries(obj)[0]["time"] == LATE


def test_an_update_that_changes_nothing_changes_no_owner_and_no_time() -> None:
    made = written(None, WEB, "creator")
    assert written(made, copy.deepcopy(made), "editor", now=LATE) == made
    again = copy.deepcopy(made)
    again["spec"]["ports"].reverse()
    again["spec"]["externalIPs"] = []  # Go leaves it out
    assert entries(written(made, again, "creator", now=LATE)) == entries(made)


def test_an_item_that_changes_in_part() -> None:
    made = written(
        None, service(ports=[{"name": "a", "port": 80}, {"name": "b", "port": 443}]), "a"
    )
    new = changed(made, ports=[{"name": "a", "port": 80, "targetPort": 1}, {"port": 53}])
    got = written(made, new, "b")
    port_53 = 'spec.ports.k:{"port":53,"protocol":"TCP"}'
    assert owned(got, "b") == sorted(
        [port_53, f"{port_53}.port", f"{port_53}.targetPort", f"spec.ports.{PORT_80}.targetPort"]
    )
    assert not [path for path in owned(got, "a") if "443" in path]


def test_eleven_updaters_are_too_many() -> None:
    obj = written(None, config_map(), "nobody")
    for number in range(12):
        now = f"2026-01-01T10:00:{number:02}Z"
        obj = written(obj if number else None, changed(obj, **{f"k{number:02}": "1"}),
                      f"m{number:02}", now=now)  # fmt: skip
    names = [entry["manager"] for entry in entries(obj)]
    assert names == ["ancient-changes", *(f"m{number:02}" for number in range(3, 12))]
    assert owned(obj, "ancient-changes") == ["data", "data.k00", "data.k01", "data.k02"]
    assert entries(obj)[0]["time"] == "2026-01-01T10:00:02Z"
    assert entries(obj)[0]["operation"] == "Update"


def test_appliers_are_never_too_many() -> None:
    obj: Obj | None = None
    for number in range(15):
        obj = applied(obj, config_map(**{f"k{number}": "1"}), f"m{number}")
    assert obj is not None
    assert len(entries(obj)) == 15


@pytest.mark.parametrize("nothing", [[], [{}]], ids=str)
def test_a_client_can_forget_all_owners(nothing: list[Obj]) -> None:
    made = written(None, config_map(a="1"), "creator")
    reset = copy.deepcopy(made)
    reset["metadata"]["managedFields"] = nothing
    got = written(made, changed(reset, a="2"), "editor")
    assert "managedFields" not in got["metadata"]
    got = written(got, changed(got, a="3"), "editor")
    assert "managedFields" not in got["metadata"], "nobody asked for owners since"


def test_a_client_can_write_the_owners_itself() -> None:
    made = written(None, config_map(a="1"), "creator")
    renamed = copy.deepcopy(made)
    renamed["metadata"]["managedFields"][0].update(manager="flux", operation="Apply")
    assert entries(written(made, renamed, "migrator")) == renamed["metadata"]["managedFields"]
    through_status = written(made, renamed, "migrator", subresource="status")
    assert entries(through_status) == entries(made)


ENTRY = entries(written(None, config_map(a="1"), "creator"))[0]


@pytest.mark.parametrize(
    "nonsense",
    [
        "x",
        ["x"],
        [{**ENTRY, "operation": "Patch"}],
        [{**ENTRY, "fieldsType": "FieldsV2"}],
        [{**ENTRY, "apiVersion": ""}],
        [{**ENTRY, "fieldsV1": {"a": {}}}],
        [{**ENTRY, "fieldsV1": {"k:{": {}}}],
        [{**ENTRY, "fieldsV1": {"k:1": {}}}],
        [{**ENTRY, "fieldsV1": {"i:x": {}}}],
        [{**ENTRY, "fieldsV1": {"f:a": 1}}],
        [{**ENTRY, "fieldsV1": []}],
        [{**ENTRY, "fieldsV1": {"v:" + "[" * 100_000: {}}}],
    ],
    ids=range(12),
)
def test_owners_that_cannot_be_read_are_not_taken(nonsense: Any) -> None:
    made = written(None, config_map(a="1"), "creator")
    new = copy.deepcopy(made)
    new["metadata"]["managedFields"] = nonsense
    assert entries(written(made, new)) == entries(made)


def test_clients_without_a_name() -> None:
    assert entries(written(None, config_map(a="1"), ""))[0]["manager"] == "unknown"


# --- Apply -----------------------------------------------------------------------------------


def test_apply_keeps_what_others_said() -> None:
    made = written(None, WEB, "creator")
    got = applied(made, service(sessionAffinity="ClientIP", labels={"tier": "front"}))
    assert got["spec"] == {**WEB["spec"], "sessionAffinity": "ClientIP"}
    assert got["metadata"]["labels"] == {"app": "web", "tier": "front"}
    assert owned(got, "kubectl") == ["metadata.labels.tier", "spec.sessionAffinity"]
    assert owned(got, "creator") == owned(made, "creator")
    assert [entry["operation"] for entry in entries(got)] == ["Apply", "Update"]


def test_applying_again_changes_nothing() -> None:
    made = applied(None, WEB)
    with_defaults = changed(made, clusterIP="10.96.0.1", sessionAffinity="None")
    assert applied(with_defaults, WEB, now=LATE) == with_defaults


def test_what_is_no_longer_applied_goes() -> None:
    made = applied(None, service(labels={"a": "1", "b": "1"}, type="NodePort", selector={"a": "b"}))
    got = applied(made, service(labels={"a": "1"}, selector={"a": "c"}), now=LATE)
    assert got["metadata"]["labels"] == {"a": "1"}
    assert got["spec"] == {"selector": {"a": "c"}}
    assert entries(got)[0]["time"] == LATE


def test_an_item_that_is_no_longer_applied_goes_with_its_defaults() -> None:
    made = applied(None, service(ports=[{"port": 80}, {"port": 443}]))
    for port in made["spec"]["ports"]:
        port.update(protocol="TCP", targetPort=port["port"])
    got = applied(made, service(ports=[{"port": 443}]))
    assert got["spec"]["ports"] == [{"port": 443, "protocol": "TCP", "targetPort": 443}]


def test_what_others_own_of_an_item_stays() -> None:
    made = applied(None, service(ports=[{"port": 80}, {"port": 443}]))
    made = written(
        made, changed(made, ports=[{"port": 80, "nodePort": 30080}, {"port": 443}]), "np"
    )
    got = applied(made, service(ports=[{"port": 443}]))
    assert [port["port"] for port in got["spec"]["ports"]] == [443]
    assert owned(got, "np") == []


def test_what_two_apply_stays_until_both_let_go() -> None:
    both = service(labels={"app": "web"})
    got = applied(applied(None, both, "a"), both, "b", now=LATE)
    assert owned(got, "a") == owned(got, "b") == ["metadata.labels.app"]
    got = applied(got, service(), "a")
    assert got["metadata"]["labels"] == {"app": "web"}
    assert [entry["manager"] for entry in entries(got)] == ["b"]
    got = applied(got, service(), "b")
    assert "labels" not in got["metadata"]
    assert entries(got) == []


def test_a_first_apply_that_changes_no_value_has_no_time() -> None:
    """So it is upstream (kubernetes#127938)."""
    got = applied(written(None, WEB), WEB, "b", now=LATE)
    assert "time" not in entries(got)[0]
    got = applied(got, {**WEB, "metadata": {**WEB["metadata"], "labels": {"app": "web", "x": "y"}}},
                  "b", now=LATE)  # fmt: skip
    assert entries(got)[0]["time"] == LATE


def test_what_an_updater_changed_is_the_updaters() -> None:
    made = applied(None, config_map(a="1"))
    edited = written(made, changed(made, a="2"))
    assert entries(edited)[0]["manager"] == "kubectl-edit"
    got = applied(edited, config_map(b="1"))  # kubectl does not own a any more
    assert got["data"] == {"a": "2", "b": "1"}


ORDERS = [
    # there, applied, then
    ([80, 443], [443, 80], [443, 80]),
    ([80, 443], [53], [80, 443, 53]),
    ([80, 443, 53], [53, 80], [443, 53, 80]),
    ([1, 2, 3, 4], [4, 5, 2], [1, 3, 4, 5, 2]),
    ([1, 2, 3], [3, 9], [1, 2, 3, 9]),
    ([], [2, 1], [2, 1]),
    ([2, 1], [], [2, 1]),
]


@pytest.mark.parametrize(("there", "wanted", "then"), ORDERS, ids=str)
def test_the_order_of_ports(there: list[int], wanted: list[int], then: list[int]) -> None:
    """Those applied in their order; those of others near where they were."""
    made = written(None, service(ports=[{"port": port} for port in there]))
    got = applied(made, service(ports=[{"port": port} for port in wanted]), force=True)
    assert [port["port"] for port in got["spec"]["ports"]] == then


def test_lists_that_are_owned_as_a_whole_are_replaced() -> None:
    made = applied(None, service(externalIPs=["192.0.2.1"]), "a")
    got = applied(made, service(externalIPs=["192.0.2.2"]), "b", force=True)
    assert got["spec"]["externalIPs"] == ["192.0.2.2"]
    assert owned(got, "a") == []


def test_an_object_that_nobody_tracked() -> None:
    got = applied(config_map(a="1", b="1"), config_map(a="1"), now=LATE)
    assert owned(got, "before-first-apply", "Update") == ["data", "data.a", "data.b"]
    with pytest.raises(ApiError, match=r'"before-first-apply" using v1: \.data\.b'):
        applied(config_map(a="1", b="1"), config_map(b="2"))


def test_a_manifest_without_a_creation_time_does_not_clear_it() -> None:
    made = an_object("ConfigMap", metadata={"creationTimestamp": EARLY, "uid": "1"})
    wanted = an_object("ConfigMap", metadata={"creationTimestamp": None, "labels": {"a": "b"}})
    got = applied(made, wanted)["metadata"]
    assert (got["creationTimestamp"], got["uid"]) == (EARLY, "1")


# --- Conflicts -------------------------------------------------------------------------------


def deployed() -> Obj:
    made = written(None, an_object("Deployment", spec={"replicas": 1}), "kubectl-client-side-apply")
    containers = [{"name": "c", "image": "i:1", "args": ["-v"]}]
    wanted = an_object(
        "Deployment",
        metadata={"labels": {"app": "web"}, "finalizers": ["a/x"]},
        spec={"template": {"spec": {"containers": containers}}},
    )
    made = applied(made, wanted, "flux")
    status = {**made, "status": {"replicas": 1}}
    return written(made, status, "kubelet", subresource="status")


def deployment(replicas: int | None = None, image: str = "", label: str = "") -> Obj:
    metadata: Obj = {"labels": {"app": label}} if label else {}
    spec: Obj = {} if replicas is None else {"replicas": replicas}
    if image:
        spec["template"] = {"spec": {"containers": [{"name": "c", "image": image}]}}
    return an_object("Deployment", metadata=metadata, spec=spec)


IMAGE = '.spec.template.spec.containers[name="c"].image'

# what is applied, the message, (manager, field) of each cause
CONFLICTS: dict[str, tuple[Obj, str, list[tuple[str, str]]]] = {
    "one field of an updater": (
        deployment(replicas=3),
        "Apply failed with 1 conflict: conflict with "
        '"kubectl-client-side-apply" using apps/v1: .spec.replicas',
        [('"kubectl-client-side-apply" using apps/v1', ".spec.replicas")],
    ),
    "one field of an applier": (
        deployment(image="i:2"),
        f'Apply failed with 1 conflict: conflict with "flux": {IMAGE}',
        [('"flux"', IMAGE)],
    ),
    "two fields of one": (
        deployment(image="i:2", label="api"),
        'Apply failed with 2 conflicts: conflicts with "flux":\n'
        f"- .metadata.labels.app\n- {IMAGE}",
        [('"flux"', ".metadata.labels.app"), ('"flux"', IMAGE)],
    ),
    "fields of two": (
        deployment(replicas=3, image="i:2", label="api"),
        'Apply failed with 3 conflicts: conflicts with "flux":\n'
        f"- .metadata.labels.app\n- {IMAGE}\n"
        'conflicts with "kubectl-client-side-apply" using apps/v1:\n- .spec.replicas',
        [('"flux"', ".metadata.labels.app"), ('"flux"', IMAGE),
         ('"kubectl-client-side-apply" using apps/v1', ".spec.replicas")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFLICTS)
def test_conflicts(name: str) -> None:
    wanted, message, causes = CONFLICTS[name]
    with pytest.raises(ApiError) as refused:
        applied(deployed(), wanted, "argo")
    assert (refused.value.code, refused.value.reason) == (409, "Conflict")
    assert str(refused.value) == message
    assert refused.value.details == {
        "causes": [
            {"reason": "FieldManagerConflict", "message": f"conflict with {who}", "field": field}
            for who, field in causes
        ]
    }


def test_conflicts_with_what_was_written_through_a_subresource() -> None:
    with pytest.raises(ApiError) as refused:
        applied(deployed(), an_object("Deployment", status={"replicas": 2}), "argo",
                subresource="status")  # fmt: skip
    assert str(refused.value) == (
        "Apply failed with 1 conflict: conflict with "
        '"kubelet" with subresource "status" using apps/v1: .status.replicas'
    )


@pytest.mark.parametrize("name", CONFLICTS)
def test_force_takes_what_is_applied_and_nothing_else(name: str) -> None:
    wanted, _, causes = CONFLICTS[name]
    before = deployed()
    got = applied(before, wanted, "argo", force=True)
    assert holds(got, wanted)
    left = {path for who in ("flux", "kubectl-client-side-apply") for path in owned(before, who)}
    kept = {path for who in ("flux", "kubectl-client-side-apply") for path in owned(got, who)}
    assert len(left - kept) == len(causes)
    assert not kept - left


def test_the_same_value_is_no_conflict() -> None:
    got = applied(deployed(), deployment(replicas=1, image="i:1", label="web"), "argo")
    assert "spec.replicas" in owned(got, "argo")
    assert "spec.replicas" in owned(got, "kubectl-client-side-apply")


def test_own_fields_are_no_conflict() -> None:
    got = applied(deployed(), deployment(image="i:2"), "flux")
    assert got["spec"]["template"]["spec"]["containers"] == [{"name": "c", "image": "i:2"}]
    assert "labels" not in got["metadata"]
    assert "finalizers" not in got["metadata"]


def test_a_refused_apply_changes_nothing() -> None:
    before, wanted = deployed(), deployment(replicas=3)
    there = copy.deepcopy((before, wanted))
    with pytest.raises(ApiError):
        applied(before, wanted, "argo")
    assert (before, wanted) == there


# --- What cannot be applied ------------------------------------------------------------------

TYPED = "failed to create typed patch object (default/web; /v1, Kind=Service): "
REFUSED: dict[str, tuple[Obj, int, str]] = {
    "a port twice": (
        service(ports=[{"port": 80}, {"port": 80, "protocol": "TCP"}]), 500,
        f'{TYPED}.spec.ports: duplicate entries for key [port=80,protocol="TCP"]',
    ),
    "a finalizer twice": (
        an_object("Service", metadata={"finalizers": ["a/x", "a/x"]}), 500,
        f'{TYPED}.metadata.finalizers: duplicate entries for key [="a/x"]',
    ),
    "two things wrong": (
        service(ports=[{"port": 80}, {"port": 80}, {"port": 53}, {"port": 53}]), 500,
        f'{TYPED}errors:\n  .spec.ports: duplicate entries for key [port=80,protocol="TCP"]\n'
        '  .spec.ports: duplicate entries for key [port=53,protocol="TCP"]',
    ),
    "an unknown field": (
        service(topologyKeys=["x"]), 500,
        f"{TYPED}.spec.topologyKeys: field not declared in schema",
    ),
    "an unknown field of an item": (
        service(ports=[{"port": 80, "x": 1}]), 500,
        f'{TYPED}.spec.ports[port=80,protocol="TCP"].x: field not declared in schema',
    ),
    "an item that is none": (
        service(ports=[80]), 500,
        f"{TYPED}.spec.ports: element 0: associative list with keys may not have non-map elements",
    ),
    "null in a list": (
        service(ports=[None]), 500,
        f"{TYPED}.spec.ports: element 0: associative list with keys may not have a null element",
    ),
    "a map that is none": (service(sessionAffinityConfig=1), 500,
                           f"{TYPED}.spec.sessionAffinityConfig: expected map, got 1"),
    "owners": (
        an_object("Service", metadata={"managedFields": [ENTRY]}), 400,
        "metadata.managedFields must be nil",
    ),
    "another version": (
        {**service(type="NodePort"), "apiVersion": "v2"}, 400,
        "invalid object type: /v2, Kind=Service",
    ),
    "another kind": (
        {**service(), "kind": "Pod"}, 400, "invalid object type: /v1, Kind=Pod",
    ),
    "metadata that is none": ({**service(), "metadata": []}, 400, "metadata must be a map"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_applied(name: str) -> None:
    obj, code, message = REFUSED[name]
    with pytest.raises(ApiError) as refused:
        apply_object("core/v1.Service", None, obj, "kubectl",
                     force=True, now=EARLY, api_version="v1")  # fmt: skip
    assert (refused.value.code, str(refused.value)) == (code, message)


def test_a_port_that_stands_twice_in_the_object_can_be_edited() -> None:
    """As they may have come by an update; an apply makes one of them."""
    made = written(None, service(ports=[{"name": "a", "port": 80}, {"name": "b", "port": 80}]))
    assert owned(made, "kubectl-edit") == ["spec.ports", f"spec.ports.{PORT_80}"]
    got = applied(made, service(ports=[{"name": "c", "port": 80}]), force=True)
    assert got["spec"]["ports"] == [{"name": "c", "port": 80}]


# --- From kubectl apply to kubectl apply --server-side ---------------------------------------


def client_side(obj: Obj, **more: Any) -> Obj:
    """An object as `kubectl apply` leaves it."""
    made = copy.deepcopy(obj)
    text = json.dumps(obj, separators=(",", ":"), sort_keys=True) + "\n"
    made["metadata"].setdefault("annotations", {})[LAST_APPLIED] = text
    made = written(None, made, "kubectl-client-side-apply")
    return written(made, changed(made, **more), "somebody") if more else made


def test_kubectl_does_not_conflict_with_its_former_self() -> None:
    made = client_side(config_map(a="1"))
    got = applied(made, config_map(a="2"), "kubectl", now=LATE)
    assert got["data"] == {"a": "2"}
    assert owned(got, "kubectl") == ["data.a"]
    assert json.loads(got["metadata"]["annotations"][LAST_APPLIED])["data"] == {"a": "2"}


def test_others_do_conflict_with_kubectls_former_self() -> None:
    with pytest.raises(ApiError, match=r'"kubectl-client-side-apply" using v1: \.data\.a'):
        applied(client_side(config_map(a="1")), config_map(a="2"), "flux")


def test_kubectl_conflicts_with_who_changed_the_field_since() -> None:
    made = client_side(config_map(a="1", b="1"), a="9")
    with pytest.raises(ApiError) as refused:
        applied(made, config_map(a="2", b="2"), "kubectl")
    assert str(refused.value) == (
        'Apply failed with 1 conflict: conflict with "somebody" using v1: .data.a'
    )


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"apiVersion":"v2"}', "[" * 9999], ids=range(6)
)
def test_a_last_applied_configuration_that_says_nothing(text: str) -> None:
    made = config_map(a="1")
    made["metadata"]["annotations"] = {LAST_APPLIED: text}
    with pytest.raises(ApiError, match="Apply failed with 1 conflict"):
        applied(written(None, made), config_map(a="2"), "kubectl")


def test_the_last_applied_configuration_is_written_as_go_writes_it() -> None:
    got = applied(client_side(config_map(a="1")), config_map(a="<é&>"), "kubectl")
    assert got["metadata"]["annotations"][LAST_APPLIED] == (
        '{"apiVersion":"v1","data":{"a":"\\u003cé\\u0026\\u003e"},"kind":"ConfigMap",'
        '"metadata":{"name":"web","namespace":"default"}}\n'
    )


def test_a_last_applied_configuration_that_has_no_room_goes() -> None:
    got = applied(client_side(config_map(a="1")), config_map(a="x" * (256 << 10)), "kubectl")
    assert LAST_APPLIED not in got["metadata"]["annotations"]


# --- Whatever is written ---------------------------------------------------------------------

KEY_DEFAULTS = {"protocol": "TCP"}
WORDS = st.sampled_from(["a", "b", "c"])
LABELS = st.dictionaries(WORDS, WORDS, min_size=1, max_size=3)


def lists_of(items: st.SearchStrategy[Obj], *keys: str) -> st.SearchStrategy[list[Obj]]:
    """Lists whose items have keys of their own."""

    def key_of(item: Obj) -> tuple[object, ...]:
        return tuple(item.get(key, KEY_DEFAULTS.get(key)) for key in keys)

    return st.lists(items, min_size=1, max_size=3, unique_by=key_of)


# What Go writes though nobody gave it (targetPort, resources) is always given here.
PORTS = lists_of(
    st.fixed_dictionaries(
        {"port": st.sampled_from([53, 80, 443]), "targetPort": st.sampled_from([1, "http"])},
        optional={"protocol": st.sampled_from(["TCP", "UDP"]), "name": WORDS},
    ),
    "port",
    "protocol",
)
CONTAINERS = lists_of(
    st.fixed_dictionaries(
        {"name": WORDS, "resources": st.fixed_dictionaries({"limits": LABELS})},
        optional={
            "image": WORDS,
            "args": st.lists(WORDS, min_size=1, max_size=2),
            "env": lists_of(st.fixed_dictionaries({"name": WORDS, "value": WORDS}), "name"),
        },
    ),
    "name",
)
METADATA = st.fixed_dictionaries(
    {},
    optional={
        "labels": LABELS,
        "finalizers": st.lists(WORDS, unique=True, min_size=1, max_size=3),
    },
)
SERVICES = st.builds(
    lambda metadata, spec: an_object("Service", metadata=metadata, spec=spec),
    METADATA,
    st.fixed_dictionaries(
        {"type": WORDS},
        optional={
            "ports": PORTS,
            "selector": LABELS,
            "externalIPs": st.lists(WORDS, min_size=1, max_size=2),
        },
    ),
)  # fmt: skip
DEPLOYMENTS = st.builds(
    lambda metadata, replicas, containers: an_object(
        "Deployment", metadata=metadata,
        spec={"replicas": replicas, "template": {"spec": {"containers": containers}}},
    ),
    METADATA, st.integers(0, 2), CONTAINERS,
)  # fmt: skip
MANAGERS = st.sampled_from(["a", "b", "c"])
KINDS = st.sampled_from([SERVICES, DEPLOYMENTS])
# Writes of one object, one after the other: (applies?, manager, what)
HISTORIES = KINDS.flatmap(
    lambda kind: st.lists(st.tuples(st.booleans(), MANAGERS, kind), min_size=1, max_size=5)
)


def lived(history: list[tuple[bool, str, Obj]]) -> Obj:
    obj: Obj | None = None
    for applies, manager, wanted in history:
        if applies:
            obj = applied(obj, wanted, manager, force=True)
        else:
            obj = written(obj, copy.deepcopy(wanted), manager)
    assert obj is not None
    return obj


def holds(there: Any, wanted: Any) -> bool:
    """Whether everything wanted is there: maps in part, items by name, port or value."""
    if isinstance(wanted, dict):
        return isinstance(there, dict) and all(
            key in there and holds(there[key], value) for key, value in wanted.items()
        )
    if isinstance(wanted, list) and wanted and isinstance(wanted[0], dict):
        return all(any(holds(one, item) for one in there) for item in wanted)
    if isinstance(wanted, list):
        return set(wanted) <= set(there)
    return bool(there == wanted)


# Who owns a map or a list as such still does when others have emptied it, and Go leaves it out.
CAN_BE_EMPTIED = {f"f:{name}" for name in (
    "labels", "finalizers", "ports", "containers", "env", "limits",
)}  # fmt: skip


def missing(there: Any, fields: Obj, path: str = "") -> Iterator[str]:
    """Yield what FieldsV1 names and the object has not."""
    for step, below in fields.items():
        if step == ".":
            continue
        found: list[Any] = []
        if step.startswith("f:"):
            found = [there[step[2:]]] if isinstance(there, dict) and step[2:] in there else []
        elif isinstance(there, list) and step.startswith("v:"):
            found = [item for item in there if item == json.loads(step[2:])]
        elif isinstance(there, list):
            keys = json.loads(step[2:])
            found = [i for i in there if {k: i.get(k, KEY_DEFAULTS.get(k)) for k in keys} == keys]
        if not found and not below and step in CAN_BE_EMPTIED:
            continue
        if len(found) != 1:
            yield f"{path}/{step}"
        else:
            yield from missing(found[0], below, f"{path}/{step}")


@given(HISTORIES, st.data())
def test_a_forced_apply_gets_what_it_wants_and_a_second_changes_nothing(
    history: list[tuple[bool, str, Obj]], data: st.DataObject
) -> None:
    before = lived(history)
    kind = SERVICES if before["kind"] == "Service" else DEPLOYMENTS
    wanted, manager = data.draw(kind), data.draw(MANAGERS)
    there = copy.deepcopy((before, wanted))
    once = applied(before, wanted, manager, force=True)
    assert (before, wanted) == there, "an argument was changed"
    assert holds(once, wanted)
    assert applied(once, wanted, manager, now=LATE) == once


@given(HISTORIES)
def test_an_apply_leaves_no_owner_of_what_is_not_there(
    history: list[tuple[bool, str, Obj]],
) -> None:
    *before, (_, manager, wanted) = history
    obj = lived([*before, (True, manager, wanted)])
    assert [list(missing(obj, entry["fieldsV1"])) for entry in entries(obj)] == [
        [] for _ in entries(obj)
    ]


@given(HISTORIES)
def test_owners_can_be_read_back(history: list[tuple[bool, str, Obj]]) -> None:
    for entry in entries(lived(history)):
        assert (
            render_fields(parse_fields(json.loads(json.dumps(entry["fieldsV1"]))))
            == (entry["fieldsV1"])
        )


STEPS = st.one_of(
    st.text(max_size=5).map(lambda name: f"f:{name}"),
    st.integers(0, 9).map(lambda place: f"i:{place}"),
    st.one_of(st.booleans(), st.integers(), st.text(max_size=3)).map(
        lambda value: f"v:{json.dumps(value, separators=(',', ':'), ensure_ascii=False)}"
    ),
    st.dictionaries(st.text(max_size=2), st.integers(), min_size=1, max_size=2).map(
        lambda key: (
            "k:" + json.dumps(key, separators=(",", ":"), sort_keys=True, ensure_ascii=False)
        )
    ),
)


@given(st.frozensets(st.lists(STEPS, min_size=1, max_size=4).map(tuple), max_size=8))
def test_any_set_of_fields_can_be_written_and_read(paths: frozenset[tuple[str, ...]]) -> None:
    text = json.dumps(render_fields(paths))
    assert parse_fields(json.loads(text)) == paths


@given(HISTORIES)
def test_every_manager_stands_once_and_appliers_first(
    history: list[tuple[bool, str, Obj]],
) -> None:
    obj = lived(history)
    who = [(entry["operation"], entry["manager"]) for entry in entries(obj)]
    assert len(set(who)) == len(who)
    assert [operation for operation, _ in who] == sorted(operation for operation, _ in who)
    assert all(entry["fieldsV1"] for entry in entries(obj))
