"""The registry: what counts as a change, what a snapshot holds, when the serial moves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdns.registry.objects import (
    ENDPOINT_SLICE,
    IMPORT_NAME_LABEL,
    NAMESPACE,
    POD,
    SERVICE,
    SERVICE_IMPORT,
    SERVICE_NAME_LABEL,
    SOURCE_CLUSTER_LABEL,
    Conditions,
    EndpointSlice,
    Ingress,
    Key,
    Kind,
    LoadBalancerStatus,
    Meta,
    Namespace,
    Node,
    Object,
    Pod,
    PodStatus,
    Service,
    ServiceImport,
    ServiceImportSpec,
    ServicePort,
    ServiceSpec,
    ServiceStatus,
    SliceEndpoint,
    SlicePort,
    TargetRef,
    key_of,
)
from kdns.registry.selectors import BadSelector, parse_selector, requirement_of, selector_of
from kdns.registry.snapshot import Changes, Snapshot
from kdns.registry.store import Store

KINDS: tuple[Kind, ...] = (SERVICE, ENDPOINT_SLICE, NAMESPACE, POD, SERVICE_IMPORT)


def service(
    name: str = "web",
    namespace: str = "default",
    *,
    ip: str = "10.96.0.7",
    port: int = 80,
    external_name: str = "",
    version: str = "1",
) -> Service:
    return Service(
        Meta(name, namespace, resource_version=version),
        ServiceSpec(
            cluster_ip=ip,
            cluster_ips=[ip],
            ports=[ServicePort(port, "http")],
            external_name=external_name,
        ),
    )


def endpoint_slice(
    name: str = "web-1",
    namespace: str = "default",
    *,
    of: str | None = "web",
    addresses: tuple[str, ...] = ("10.244.0.1",),
    ready: bool | None = True,
    hostname: str | None = None,
    pod: str = "",
    port: int = 80,
    version: str = "1",
    address_type: str = "IPv4",
) -> EndpointSlice:
    return EndpointSlice(
        Meta(
            name,
            namespace,
            labels={SERVICE_NAME_LABEL: of} if of else None,
            resource_version=version,
        ),
        address_type,
        endpoints=[
            SliceEndpoint([a], Conditions(ready), hostname, target_ref=TargetRef("Pod", pod))
            for a in addresses
        ],
        ports=[SlicePort("http", port, "TCP")],
    )


def imported(
    name: str = "web", namespace: str = "default", *, ip: str = "10.200.0.1", port: int = 80
) -> ServiceImport:
    return ServiceImport(
        Meta(name, namespace), ServiceImportSpec(ips=[ip], ports=[ServicePort(port, "http")])
    )


def import_slice(
    name: str = "web-east",
    namespace: str = "default",
    *,
    of: str = "web",
    cluster: str = "east",
    **more: Any,
) -> EndpointSlice:
    one = endpoint_slice(name, namespace, of=None, **more)
    labels = {IMPORT_NAME_LABEL: of, SOURCE_CLUSTER_LABEL: cluster}
    return msgspec.structs.replace(
        one, metadata=msgspec.structs.replace(one.metadata, labels=labels)
    )


def namespace(name: str = "default", **labels: str) -> Namespace:
    return Namespace(Meta(name, labels=labels or None))


def pod(name: str = "p", namespace: str = "default", ip: str = "10.244.0.1") -> Pod:
    return Pod(Meta(name, namespace), PodStatus("Running", ip))


def filled(*objects: Object) -> Store:
    """A synced store whose content was published at second 100."""
    store = Store(KINDS)
    for kind in KINDS:
        store.replace(kind, [o for o in objects if type(o).__name__ == kind])
        store.mark_synced(kind)
    store.publish(100)
    return store


def publish(store: Store, now: int = 200) -> tuple[Snapshot, Changes]:
    out = store.publish(now)
    assert out is not None
    return out


def test_the_first_snapshot_holds_what_was_listed_and_says_it_is_synced() -> None:
    store = Store((SERVICE, NAMESPACE))
    assert store.publish(1) is None
    store.replace(SERVICE, [service()])
    store.mark_synced(SERVICE)
    snapshot, changes = publish(store, 100)
    assert not snapshot.synced and not changes.synced
    assert changes.services == {("default", "web")}
    store.replace(NAMESPACE, [namespace()])
    store.mark_synced(NAMESPACE)
    snapshot, changes = publish(store, 101)
    assert snapshot.synced and changes.synced
    assert snapshot.services == {"default": {"web": service()}}
    assert snapshot.namespaces == {"default": namespace()}
    assert (snapshot.revision, snapshot.changed_at) == (2, 100)
    assert store.publish(102) is None


def test_a_cluster_without_a_single_object_becomes_synced_too() -> None:
    store = Store((SERVICE,))
    store.replace(SERVICE, [])
    store.mark_synced(SERVICE)
    snapshot, changes = publish(store)
    assert snapshot.synced and changes.synced and snapshot.changed_at == 0
    assert store.synced


@pytest.mark.parametrize(
    "again",
    [service(version="9"), service(version="1")],
    ids=["new resourceVersion", "the very same"],
)
def test_an_event_that_changes_nothing_we_read_is_dropped(again: Service) -> None:
    store = filled(service())
    store.apply(SERVICE, "MODIFIED", again)
    store.replace(SERVICE, [again])
    assert store.publish(200) is None


def test_a_full_list_emits_only_true_differences() -> None:
    store = filled(service("a"), service("b"), service("c"))
    store.replace(SERVICE, [service("a", version="2"), service("b", port=81), service("d")])
    snapshot, changes = publish(store)
    assert changes.services == {("default", "b"), ("default", "c"), ("default", "d")}
    assert set(snapshot.services["default"]) == {"a", "b", "d"}


def test_an_object_that_was_listed_broken_keeps_its_last_good_version() -> None:
    store = filled(service("a"), service("b"))
    store.replace(SERVICE, [service("a")], keep=[("default", "b"), ("default", "never-seen")])
    assert store.publish(200) is None


def test_slices_stand_under_their_service_by_slice_name_and_move_with_the_label() -> None:
    store = filled(endpoint_slice("web-2"), endpoint_slice("web-1"), endpoint_slice("x", of=None))
    store.apply(ENDPOINT_SLICE, "ADDED", endpoint_slice("web-0", addresses=("10.244.0.9",)))
    snapshot, changes = publish(store)
    assert changes.services == {("default", "web")}
    assert [s.metadata.name for s in snapshot.slices["default"]["web"]] == [
        "web-0",
        "web-1",
        "web-2",
    ]
    store.apply(ENDPOINT_SLICE, "MODIFIED", endpoint_slice("web-0", of="api"))
    snapshot, changes = publish(store)
    assert changes.services == {("default", "web"), ("default", "api")}
    assert [s.metadata.name for s in snapshot.slices["default"]["api"]] == ["web-0"]
    for name in ("web-1", "web-2"):
        store.apply(ENDPOINT_SLICE, "DELETED", endpoint_slice(name))
    snapshot, _ = publish(store)
    assert set(snapshot.slices["default"]) == {"api"}


def test_slices_of_imports_stand_under_their_import_and_not_under_a_service() -> None:
    store = filled(imported(), import_slice("b"), import_slice("a", cluster="west"))
    store.apply(ENDPOINT_SLICE, "ADDED", import_slice("c", of="api"))
    snapshot, changes = publish(store)
    assert changes.imports == {("default", "api")} and not changes.services
    assert snapshot.slices == {} and snapshot.imports == {"default": {"web": imported()}}
    assert [s.metadata.name for s in snapshot.import_slices["default"]["web"]] == ["a", "b"]
    both = endpoint_slice("a", of="web-abc")
    labels = {**(both.metadata.labels or {}), IMPORT_NAME_LABEL: "web"}
    meta = msgspec.structs.replace(both.metadata, labels=labels)
    both = msgspec.structs.replace(both, metadata=meta)
    store.apply(ENDPOINT_SLICE, "MODIFIED", both)
    snapshot, changes = publish(store)
    assert changes.imports == {("default", "web")}
    assert changes.services == {("default", "web-abc")}
    assert snapshot.slices["default"]["web-abc"] == (both,)
    store.apply(SERVICE_IMPORT, "DELETED", imported())
    for name in ("a", "b", "c"):
        store.apply(ENDPOINT_SLICE, "DELETED", import_slice(name))
    snapshot, changes = publish(store)
    assert changes.imports == {("default", "web"), ("default", "api")}
    assert (snapshot.imports, snapshot.import_slices, snapshot.slices) == ({}, {}, {})


def test_a_pod_that_is_being_deleted_keeps_its_record_until_it_is_gone() -> None:
    store = filled(pod())
    leaving = Pod(Meta("p", "default", deletion_timestamp="2026-01-01T00:00:00Z"), PodStatus())
    store.apply(POD, "MODIFIED", leaving)
    store.replace(POD, [leaving])
    assert store.publish(200) is None
    store.apply(POD, "DELETED", leaving)
    assert publish(store)[0].pods == {}


def test_a_node_is_told_of_by_name_and_leaves_the_serial_alone() -> None:
    store = filled(service())
    node = Node(Meta("node1", labels={"topology.kubernetes.io/zone": "a"}))
    store.apply("Node", "ADDED", node)
    snapshot, changes = publish(store)
    assert dict(snapshot.nodes) == {"node1": node} and set(changes.nodes) == {"node1"}
    assert snapshot.changed_at == 100
    # A kubelet reports every few seconds; nothing we read of it has changed.
    again = msgspec.structs.replace(node, metadata=Meta("node1", "", "", "9", node.metadata.labels))
    store.apply("Node", "MODIFIED", again)
    assert store.publish(201) is None
    store.apply("Node", "DELETED", node)
    snapshot, changes = publish(store)
    assert not snapshot.nodes and set(changes.nodes) == {"node1"}


def test_a_load_balancers_address_is_news_though_the_spec_stays() -> None:
    store = filled(service())
    status = ServiceStatus(LoadBalancerStatus([Ingress("192.0.2.1")]))
    store.apply(SERVICE, "MODIFIED", msgspec.structs.replace(service(), status=status))
    snapshot, changes = publish(store)
    assert set(changes.services) == {("default", "web")}
    assert snapshot.services["default"]["web"].status == status
    assert snapshot.changed_at == 100  # no record says it


def test_a_published_snapshot_never_changes_and_shares_what_did_not() -> None:
    store = filled(service("a", "one"), service("b", "two"))
    store.apply(SERVICE, "MODIFIED", service("a", "one", port=1))
    first, _ = publish(store)
    kept = {ns: dict(services) for ns, services in first.services.items()}
    store.apply(SERVICE, "MODIFIED", service("a", "one", port=2))
    store.apply(SERVICE, "ADDED", service("c", "three"))
    second, _ = publish(store)
    store.apply(SERVICE, "DELETED", service("a", "one"))
    third, _ = publish(store)
    assert first.services == kept
    assert second.services["two"] is first.services["two"] is third.services["two"]
    assert set(third.services) == {"two", "three"}


# What moves the SOA serial: reference 1.9, 1.19 (#8338).
SERIAL: list[tuple[str, Object | None, Object | None, bool]] = [
    ("Service added", None, service(), True),
    ("Service deleted", service(), None, True),
    ("port changed", service(), service(port=81), True),
    ("externalName changed", service(), service(external_name="a.example"), True),
    ("clusterIP changed", service(), service(ip="10.96.0.8"), False),
    ("slice added", None, endpoint_slice(), True),
    ("slice deleted", endpoint_slice(), None, True),
    ("address changed", endpoint_slice(), endpoint_slice(addresses=("10.244.0.2",)), True),
    ("address added", endpoint_slice(), endpoint_slice(addresses=("10.244.0.1", "::1")), True),
    ("hostname changed", endpoint_slice(), endpoint_slice(hostname="db-0"), True),
    ("endpoint port changed", endpoint_slice(), endpoint_slice(port=81), True),
    ("endpoint becomes unready", endpoint_slice(), endpoint_slice(ready=False), True),
    ("ready instead of unknown", endpoint_slice(), endpoint_slice(ready=None), False),
    ("another pod behind it", endpoint_slice(), endpoint_slice(pod="x"), False),
    (
        "a name that DNS does not show changed",
        endpoint_slice(addresses=("a.example",), address_type="FQDN"),
        endpoint_slice(addresses=("b.example",), address_type="FQDN"),
        False,
    ),
    ("Pod added", None, pod(), True),
    ("Pod deleted", pod(), None, True),
    ("Pod address changed", pod(), pod(ip="10.244.0.2"), True),
    ("Pod phase changed", pod(), Pod(Meta("p", "default"), PodStatus("", "10.244.0.1")), False),
    ("Namespace added", None, namespace(), False),
    ("Namespace labelled", namespace(), namespace(env="prod"), False),
    ("Namespace deleted", namespace(), None, False),
]


@pytest.mark.parametrize(
    ("old", "new", "moves"), [row[1:] for row in SERIAL], ids=[row[0] for row in SERIAL]
)
def test_the_serial_moves_for(old: Object | None, new: Object | None, moves: bool) -> None:
    store = filled(*([old] if old else []))
    before = 100 if old is not None and not isinstance(old, Namespace) else 0
    obj = new or old
    assert obj is not None
    kind: Kind = next(k for k in KINDS if k == type(obj).__name__)
    store.apply(kind, "MODIFIED" if new else "DELETED", obj)
    snapshot, _ = publish(store, 200)
    assert snapshot.changed_at == (200 if moves else before)


IMPORTS_SERIAL: list[tuple[str, Object | None, Object | None, bool]] = [
    ("ServiceImport added", None, imported(), True),
    ("ServiceImport deleted", imported(), None, True),
    ("port changed", imported(), imported(port=81), True),
    ("address changed", imported(), imported(ip="10.200.0.2"), True),
    ("its slice added", None, import_slice(), True),
    ("its slice deleted", import_slice(), None, True),
    ("endpoint changed", import_slice(), import_slice(addresses=("10.244.0.2",)), True),
    ("another pod behind it", import_slice(), import_slice(pod="x"), False),
    ("moved to another cluster", import_slice(), import_slice(cluster="west"), True),
    ("moved to another import", import_slice(), import_slice(of="api"), True),
    ("a slice is an import's no more", import_slice(), endpoint_slice("web-east"), True),
    ("another slice added", None, endpoint_slice(), False),
    ("Service added", None, service(), False),
    ("Namespace added", None, namespace(), False),
]


@pytest.mark.parametrize(
    ("old", "new", "moves"), [row[1:] for row in IMPORTS_SERIAL], ids=[r[0] for r in IMPORTS_SERIAL]
)
def test_the_serial_of_multicluster_zones_moves_for(
    old: Object | None, new: Object | None, moves: bool
) -> None:
    store = filled(*([old] if old else []))
    before = 100 if old is not None else 0
    obj = new or old
    assert obj is not None
    kind: Kind = next(k for k in KINDS if k == type(obj).__name__)
    store.apply(kind, "MODIFIED" if new else "DELETED", obj)
    snapshot, _ = publish(store, 200)
    assert snapshot.imports_changed_at == (200 if moves else before)
    if kind == SERVICE_IMPORT:
        assert snapshot.changed_at == 0, "it is not in the cluster's own zone"


# --- any order of events ------------------------------------------------------------------

names = st.sampled_from(["a", "b", "c"])
spaces = st.sampled_from(["one", "two"])
some_object = st.one_of(
    st.builds(service, names, spaces, port=st.integers(80, 82)),
    st.builds(
        endpoint_slice,
        names,
        spaces,
        of=st.sampled_from(["a", "b", None]),
        hostname=st.sampled_from([None, "h"]),
    ),
    st.builds(namespace, spaces, env=st.sampled_from(["x", "y"])),
    st.builds(pod, names, spaces, st.sampled_from(["10.0.0.1", "10.0.0.2"])),
    st.builds(imported, names, spaces, port=st.integers(80, 82)),
    st.builds(
        import_slice,
        names,
        spaces,
        of=st.sampled_from(["a", "b"]),
        cluster=st.sampled_from(["east", "west"]),
    ),
)
steps = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["ADDED", "MODIFIED", "DELETED"]), some_object),
        st.tuples(st.sampled_from(KINDS), st.lists(some_object, max_size=5)),
        st.tuples(st.just("publish"), st.none()),
    ),
    max_size=40,
)


def _content(snapshot: Snapshot) -> tuple[object, ...]:
    return (
        snapshot.services,
        snapshot.slices,
        snapshot.namespaces,
        snapshot.pods,
        snapshot.imports,
        snapshot.import_slices,
    )


def _differences(a: Snapshot, b: Snapshot) -> tuple[set[Key], set[str], set[Key], set[Key]]:
    def differ(
        x: Mapping[str, Mapping[str, object]], y: Mapping[str, Mapping[str, object]]
    ) -> set[Key]:
        return {
            (ns, name)
            for ns in {*x, *y}
            for name in {*x.get(ns, {}), *y.get(ns, {})}
            if x.get(ns, {}).get(name) != y.get(ns, {}).get(name)
        }

    return (
        differ(a.services, b.services) | differ(a.slices, b.slices),
        {n for n in {*a.namespaces, *b.namespaces} if a.namespaces.get(n) != b.namespaces.get(n)},
        differ(a.pods, b.pods),
        differ(a.imports, b.imports) | differ(a.import_slices, b.import_slices),
    )


@given(steps)
def test_any_sequence_of_events_gives_what_a_fresh_list_gives(
    sequence: list[tuple[str, object]],
) -> None:
    store = Store(KINDS)
    held: dict[Kind, dict[Key, Object]] = {kind: {} for kind in KINDS}
    last = Snapshot()
    for word, value in [*sequence, ("publish", None)]:
        if word == "publish":
            out = store.publish(1)
            fresh = Store(KINDS)
            for kind in KINDS:
                fresh.replace(kind, held[kind].values())
            wanted = fresh.publish(1)
            assert _content(out[0] if out else last) == _content(
                wanted[0] if wanted else Snapshot()
            )
            if out is not None:
                services, namespaces, pods, imports = _differences(last, out[0])
                assert services <= out[1].services
                assert namespaces <= out[1].namespaces
                assert pods <= out[1].pods
                assert imports <= out[1].imports
                last = out[0]
        elif isinstance(value, list):
            kind = next(k for k in KINDS if k == word)
            objects = [o for o in value if type(o).__name__ == kind]
            held[kind] = {key_of(o): o for o in objects}
            store.replace(kind, objects)
        else:
            assert isinstance(value, (Service, EndpointSlice, Namespace, Pod, ServiceImport))
            kind = next(k for k in KINDS if k == type(value).__name__)
            store.apply(kind, word, value)
            if word == "DELETED":
                held[kind].pop(key_of(value), None)
            else:
                held[kind][key_of(value)] = value


# --- label selectors ----------------------------------------------------------------------

SELECTORS = [
    ("", {}, True),
    ("app=web", {"app": "web"}, True),
    ("app==web", {"app": "api"}, False),
    ("app=web", {}, False),
    ("app!=web", {}, True),
    ("app!=web", {"app": "web"}, False),
    ("app in (web, api)", {"app": "api"}, True),
    ("app notin (web,api)", {"app": "db"}, True),
    ("app notin (web)", {}, True),
    ("app", {"app": ""}, True),
    ("!app", {"app": ""}, False),
    ("!app", {}, True),
    ("app=", {"app": ""}, True),
    (" app = web , tier in (a) ,!x", {"app": "web", "tier": "a"}, True),
    ("example.com/app=web", {"example.com/app": "web"}, True),
]


@pytest.mark.parametrize(("text", "labels", "matches"), SELECTORS)
def test_a_label_selector_matches(text: str, labels: dict[str, str], matches: bool) -> None:
    selector = parse_selector(text)
    assert selector.matches(labels) is matches


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a in (b", "expected ')'"),
        ("a in b", "expected '('"),
        ("a in (b c)", "expected ',' or ')'"),
        ("=b", "not a label key"),
        ("a b", "'b' after 'a' is not an operator"),
        ("a=b c", "expected ',' before 'c'"),
        ("a,", "nothing after the last ','"),
        ("a > 1", "not supported"),
        ("!", "expected a key"),
        ("-a=b", "'-a' is not a label key"),
        ("UP/a=b", "prefix"),
        ("a=" + "x" * 64, "not a label value"),
    ],
)
def test_a_selector_that_is_none_says_why(text: str, says: str) -> None:
    with pytest.raises(BadSelector, match=says.replace("(", r"\(").replace(")", r"\)")):
        parse_selector(text)


def test_a_workloads_selector_has_labels_and_expressions() -> None:
    selector = selector_of(
        {"app": "web"}, [requirement_of("tier", "In", ["a"]), requirement_of("x", "Exists", [])]
    )
    assert selector.matches({"app": "web", "tier": "a", "x": ""})
    assert not selector.matches({"app": "web", "tier": "a"})
    with pytest.raises(BadSelector, match="needs values"):
        requirement_of("tier", "NotIn", [])
    with pytest.raises(BadSelector, match="'Near' is not one of"):
        requirement_of("tier", "Near", ["a"])
