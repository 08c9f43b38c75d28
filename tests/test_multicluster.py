"""`multicluster` of the `kubernetes` plugin: the Services that a set of clusters shares."""

from __future__ import annotations

import asyncio
import json
import pathlib
from collections.abc import Iterable
from typing import Any

import pytest
from api_replay import ApiReplay, Fault, Json
from hypothesis import given, settings
from hypothesis import strategies as st
from objects import (
    endpoint,
    imported_slice,
    kubernetes,
    namespace,
    service,
    service_import,
    slice_of,
    snapshot,
)
from running import RunningKdns
from support import answer, directives, errors_of, make_setup, question

from kdns.dns import types as t
from kdns.dns.message import RR, Reply
from kdns.dns.name import parse_name
from kdns.dns.text import render_rr
from kdns.errors import ObjectError
from kdns.plugins.kubernetes import Kubernetes, setup
from kdns.registry.decode import convert, decode_status
from kdns.registry.objects import (
    ENDPOINT_SLICE,
    NAMESPACE,
    POD,
    SERVICE,
    SERVICE_IMPORT,
    EndpointSlice,
    Kind,
    Object,
    ServiceImport,
)
from kdns.registry.snapshot import dump_snapshot, everything
from kdns.registry.spec import KubeSpec
from kdns.registry.store import Store

ZONES = "cluster.local clusterset.local in-addr.arpa"


def imported(name: str, type: str, ips: list[str], *ports: tuple[str, int]) -> Json:
    return {
        "apiVersion": "multicluster.x-k8s.io/v1alpha1",
        "kind": "ServiceImport",
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {
            "type": type,
            "ips": ips,
            "ports": [{"name": n, "port": p, "protocol": "TCP"} for n, p in ports],
        },
    }


def slice_from(cluster: str, owner: str, port: int, *endpoints: Json) -> Json:
    labels = {"multicluster.kubernetes.io/service-name": owner}
    if cluster:
        labels["multicluster.kubernetes.io/source-cluster"] = cluster
    meta = {"name": f"{owner}-{cluster or 'x'}", "namespace": "shop", "labels": labels}
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": meta,
        "addressType": "IPv4",
        "ports": [{"name": "pg", "port": port, "protocol": "TCP"}],
        "endpoints": list(endpoints),
    }


def at(address: str, hostname: str, ready: bool = True) -> Json:
    return {"addresses": [address], "hostname": hostname, "conditions": {"ready": ready}}


WORLD: list[Json] = [
    {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}},
    imported("web", "ClusterSetIP", ["10.200.0.1", "fd00:200::1"], ("http", 80)),
    slice_from("east", "web", 8080, at("10.1.0.5", "web-a")),
    imported("db", "Headless", [], ("pg", 5432)),
    slice_from("east", "db", 5432, at("10.1.0.1", "db-0"), at("10.1.0.2", "db-1", ready=False)),
    slice_from("west", "db", 5432, at("10.2.0.1", "db-0")),
    slice_from("", "db", 5432, at("10.3.0.1", "lone")),
    imported("new", "ClusterSetIP", [], ("http", 80)),
    imported("bare", "ClusterSetIP", ["10.200.0.9"]),
    *[
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name, "namespace": "shop"},
            "spec": {"clusterIP": ip, "clusterIPs": [ip], "ports": [{"port": 80}]},
        }
        for name, ip in (("web", "10.96.0.50"), ("here", "10.96.0.51"))
    ],
]

SHOP = "shop.svc.clusterset.local."
ANSWERS = [
    # a Service of the set, and one of this cluster by the same name
    (f"web.{SHOP}", "A", ["10.200.0.1"]),
    (f"web.{SHOP}", "AAAA", ["fd00:200::1"]),
    (f"WEB.{SHOP}", "A", ["10.200.0.1"]),
    ("web.shop.svc.cluster.local.", "A", ["10.96.0.50"]),
    (f"here.{SHOP}", "A", "NXDOMAIN"),
    ("db.shop.svc.cluster.local.", "A", "NXDOMAIN"),
    # ports
    (f"_http._tcp.web.{SHOP}", "SRV", [f"0 50 80 web.{SHOP}"]),
    (f"_http._udp.web.{SHOP}", "SRV", "NXDOMAIN"),
    (f"_pg._tcp.db.{SHOP}", "SRV",
     [f"0 33 5432 db-0.east.db.{SHOP}", f"0 33 5432 db-0.west.db.{SHOP}",
      f"0 33 5432 lone.db.{SHOP}"]),
    (f"pg._tcp.db.{SHOP}", "SRV", 3),
    (f"_pg.tcp.db.{SHOP}", "SRV", 3),
    # headless: all endpoints that are ready, wherever they are
    (f"db.{SHOP}", "A", ["10.1.0.1", "10.2.0.1", "10.3.0.1"]),
    # an endpoint is named with its cluster
    (f"db-0.east.db.{SHOP}", "A", ["10.1.0.1"]),
    (f"Db-0.WEST.db.{SHOP}", "A", ["10.2.0.1"]),
    (f"db-0.db.{SHOP}", "A", "NXDOMAIN"),
    (f"db-0.north.db.{SHOP}", "A", "NXDOMAIN"),
    (f"db-1.east.db.{SHOP}", "A", "NXDOMAIN"),
    (f"db-0\\.east.db.{SHOP}", "A", "NXDOMAIN"),
    (f"db-0.east.db.{SHOP}", "SRV", [f"0 100 5432 db-0.east.db.{SHOP}"]),
    (f"web-a.east.web.{SHOP}", "A", ["10.1.0.5"]),
    # but where it is not known
    (f"lone.db.{SHOP}", "A", ["10.3.0.1"]),
    (f"lone.east.db.{SHOP}", "A", "NXDOMAIN"),
    # without an address, without a port
    (f"new.{SHOP}", "A", "NODATA"),
    (f"_http._tcp.new.{SHOP}", "SRV", "NODATA"),
    (f"_x._tcp.new.{SHOP}", "SRV", "NXDOMAIN"),
    (f"bare.{SHOP}", "A", "NXDOMAIN"),
    # as in any zone of the cluster
    (f"web.{SHOP}", "TXT", "NODATA"),
    (f"new.{SHOP}", "TXT", "NXDOMAIN"),
    (SHOP, "A", "NODATA"),
    ("nosuch.svc.clusterset.local.", "A", "NXDOMAIN"),
    ("web.nosuch.svc.clusterset.local.", "A", "NXDOMAIN"),
    (f"a.b.c.web.{SHOP}", "A", "NXDOMAIN"),
    ("clusterset.local.", "A", "NODATA"),
    ("1-2-3-4.shop.pod.clusterset.local.", "A", ["1.2.3.4"]),
    ("dns-version.clusterset.local.", "TXT", ['"1.1.0"']),
    # addresses of the set have no name
    ("1.0.200.10.in-addr.arpa.", "PTR", "NXDOMAIN"),
    ("1.0.1.10.in-addr.arpa.", "PTR", "NXDOMAIN"),
    ("50.0.96.10.in-addr.arpa.", "PTR", ["web.shop.svc.cluster.local."]),
]  # fmt: skip
QUESTIONS = list(dict.fromkeys((name, qtype) for name, qtype, _ in ANSWERS))


def corefile(source: str) -> str:
    return f""".:0 {{
        bind 127.0.0.1
        kubernetes {ZONES} {{
            multicluster clusterset.local
            pods insecure
            {source}
        }}
    }}"""


def shown(rcode: int, records: Iterable[RR]) -> str | list[str]:
    lines = sorted(render_rr(rr).split(maxsplit=4)[4] for rr in records)
    return lines or ("NODATA" if rcode == t.NOERROR else t.rcode_name(rcode))


Shown = dict[tuple[str, str], str | list[str]]


async def _ask_all(source: str) -> Shown:
    found: Shown = {}
    async with RunningKdns(corefile(source)) as kdns:
        for name, qtype in QUESTIONS:
            reply = await kdns.ask(name, qtype)
            found[name, qtype] = shown(reply.flags & 15, reply.answer)
    return found


async def _ask_all_of_an_api() -> Shown:
    async with ApiReplay() as api:
        for obj in WORLD:
            await api.put(obj)
        return await _ask_all(f"endpoint {api.url}")


@pytest.fixture(scope="module", params=["manifests", "API server"])
def answers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shown:
    if request.param == "API server":
        return asyncio.run(_ask_all_of_an_api())
    file: pathlib.Path = tmp_path_factory.mktemp("world") / "world.json"
    file.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": WORLD}))
    return asyncio.run(_ask_all(f"manifests {file}"))


@pytest.mark.parametrize(("name", "qtype", "expected"), ANSWERS)
def test_a_cluster_set_is_asked(
    answers: Shown, name: str, qtype: str, expected: str | int | list[str]
) -> None:
    found = answers[name, qtype]
    assert (len(found) if isinstance(expected, int) else found) == expected


def test_a_change_at_the_api_server_is_answered() -> None:
    async def scenario() -> list[str | list[str]]:
        async with ApiReplay() as api:
            for obj in WORLD:
                await api.put(obj)
            async with RunningKdns(corefile(f"endpoint {api.url}")) as kdns:
                ((pipeline, _),) = kdns.app.pipelines.values()
                changed = asyncio.Event()
                pipeline.subscribe(lambda *_: changed.set())
                out = []
                for step in (
                    api.put(imported("web", "ClusterSetIP", ["10.200.0.2"], ("http", 80))),
                    api.delete(imported("web", "ClusterSetIP", [])),
                    api.put(slice_from("west", "db", 5432, at("10.2.0.7", "db-0"))),
                ):
                    changed.clear()
                    await step
                    async with asyncio.timeout(10):
                        await changed.wait()
                    for name in ("web", "db-0.west.db"):
                        reply = await kdns.ask(f"{name}.{SHOP}")
                        out.append(shown(reply.flags & 15, reply.answer))
                return out

    assert asyncio.run(scenario()) == [
        ["10.200.0.2"], ["10.2.0.1"],
        "NXDOMAIN", ["10.2.0.1"],
        "NXDOMAIN", ["10.2.0.7"],
    ]  # fmt: skip


def test_nothing_is_denied_until_the_imports_were_listed() -> None:
    async def scenario() -> list[int]:
        async with ApiReplay(watch_list="ignored") as api:
            api.load([WORLD[0]])
            hang = Fault(hang=True)
            api.fault("serviceimports", "watch", hang)
            source = f"endpoint {api.url}\nstartup_timeout 100ms"
            async with RunningKdns(corefile(source)) as kdns:
                names = (f"x.{SHOP}", "x.shop.svc.cluster.local.")
                return [(await kdns.ask(name)).flags & 15 for name in names]

    assert asyncio.run(scenario()) == [t.SERVFAIL, t.SERVFAIL]


# --- other options ------------------------------------------------------------------------

WEB = service_import("web", ips=("10.200.0.1",))
WEB_EAST = imported_slice("web", "east", endpoint("10.1.0.5", target_ref={"name": "web-xyz"}))
DB = service_import("db", ports=[("pg", 5432, "TCP")], type="Headless")
DB_EAST = imported_slice(
    "db", "east", endpoint("10.1.0.1", hostname="db-0", zone="z-a"), ports=[("pg", 5432, "TCP")]
)


def multicluster(options: str, *objects: Any, zones: str = ZONES) -> Kubernetes:
    return kubernetes(f"multicluster clusterset.local\n{options}", *objects, zones=zones)


def ask(plugin: Kubernetes, name: str, qtype: str = "A") -> str | list[str]:
    reply = answer([plugin], question(name, qtype))
    return shown(reply.rcode, reply.answer)


DEFAULT = "default.svc.clusterset.local."


@pytest.mark.parametrize(
    ("options", "name", "expected"),
    [
        ("ignore empty_service", f"web.{DEFAULT}", ["10.200.0.1"]),
        ("ignore empty_service", f"alone.{DEFAULT}", "NXDOMAIN"),
        ("", f"alone.{DEFAULT}", ["10.200.0.3"]),
        ("noendpoints", f"db.{DEFAULT}", ["10.1.0.1"]),
        ("", f"10-1-0-5.east.web.{DEFAULT}", ["10.1.0.5"]),
        ("namespaces prod", f"web.{DEFAULT}", "NXDOMAIN"),
        ("namespace_labels env=prod", f"web.{DEFAULT}", "NXDOMAIN"),
        ("zonal", f"z-a.pin._zone.db.{DEFAULT}", "NXDOMAIN"),
        ("zonal", f"db-0.east.db.{DEFAULT}", ["10.1.0.1"]),
        ("spec strict", f"_tcp.web.{DEFAULT}", "NODATA"),
        ("spec strict", f"east.web.{DEFAULT}", "NODATA"),
        ("", f"east.web.{DEFAULT}", "NXDOMAIN"),
        ("spec strict", f"west.web.{DEFAULT}", "NXDOMAIN"),
        ("spec strict", f"bare.{DEFAULT}", ["10.200.0.4"]),
        ("spec strict", f"http._tcp.web.{DEFAULT}", "NXDOMAIN"),
    ],
)
def test_an_option_of_kubernetes_holds_for_the_set_too(
    options: str, name: str, expected: str | list[str]
) -> None:
    alone = service_import("alone", ips=("10.200.0.3",))
    bare = service_import("bare", ips=("10.200.0.4",), ports=())
    plugin = multicluster(options, WEB, WEB_EAST, DB, DB_EAST, alone, bare)
    assert ask(plugin, name) == expected


def test_zones_below_a_multicluster_zone_are_such_too() -> None:
    plugin = multicluster("", WEB, zones="clusterset.local eu.clusterset.local cluster.local")
    assert ask(plugin, "web.default.svc.eu.clusterset.local.") == ["10.200.0.1"]
    assert ask(plugin, "web.default.svc.cluster.local.") == "NXDOMAIN"


def test_without_the_option_imports_are_not_in_any_zone() -> None:
    plugin = kubernetes("", WEB, WEB_EAST, DB, DB_EAST)
    assert ask(plugin, "web.default.svc.cluster.local.") == "NXDOMAIN"


def test_an_endpoint_whose_name_does_not_fit_has_an_address_and_no_more() -> None:
    long = "x" * 63
    one = service_import(long, long, type="Headless")
    part = imported_slice(long, long, endpoint("10.1.0.1", hostname=long), ns=long)
    plugin = multicluster("", one, part, namespace(long))
    name = f"{long}.{long}.svc.clusterset.local."
    assert ask(plugin, name) == ["10.1.0.1"]
    assert ask(plugin, f"_http._tcp.{name}", "SRV") == "NODATA"
    found = plugin.transfer_records(parse_name("clusterset.local."))
    assert found is not None
    assert [rr.type for rr in found[1]] == [t.SOA, t.A, t.SOA]


def test_a_transfer_of_a_multicluster_zone_holds_what_it_answers() -> None:
    west = imported_slice("db", "west", endpoint("10.2.0.1", hostname="db-0"),
                          ports=[("pg", 5432, "TCP")])  # fmt: skip
    here = service("here"), slice_of("here", endpoint("10.244.0.1"))
    plugin = multicluster("", WEB, WEB_EAST, DB, DB_EAST, west, *here)
    found = plugin.transfer_records(parse_name("clusterset.local."))
    assert found is not None
    serial, records = found
    lines = [render_rr(r) for r in records]
    assert serial == 1700000001 and " 1700000001 " in lines[0] and lines[0] == lines[-1]
    assert lines[1:-1] == [
        f"db.{DEFAULT} 5 IN A 10.1.0.1",
        f"db-0.east.db.{DEFAULT} 5 IN A 10.1.0.1",
        f"_pg._tcp.db.{DEFAULT} 5 IN SRV 0 50 5432 db-0.east.db.{DEFAULT}",
        f"db.{DEFAULT} 5 IN A 10.2.0.1",
        f"db-0.west.db.{DEFAULT} 5 IN A 10.2.0.1",
        f"_pg._tcp.db.{DEFAULT} 5 IN SRV 0 50 5432 db-0.west.db.{DEFAULT}",
        f"web.{DEFAULT} 5 IN A 10.200.0.1",
        f"web.{DEFAULT} 5 IN SRV 0 100 80 web.{DEFAULT}",
        f"_http._tcp.web.{DEFAULT} 5 IN SRV 0 100 80 web.{DEFAULT}",
    ]
    own = plugin.transfer_records(parse_name("cluster.local."))
    assert own is not None and own[0] == 1700000000
    assert not any("web" in render_rr(rr) for rr in own[1])


def test_each_zone_has_its_own_serial_in_whatever_case_it_is_asked() -> None:
    plugin = multicluster("", WEB)
    for zone, serial in (("ClusterSet.local.", "1700000001"), ("Cluster.local.", "1700000000")):
        (soa,) = answer([plugin], question(zone, "SOA")).answer
        assert render_rr(soa).split()[6] == serial
        (soa,) = answer([plugin], question(f"nosuch.{zone}")).authority
        assert render_rr(soa).split()[6] == serial


def test_the_dump_shows_imports_with_their_slices() -> None:
    lines = list(dump_snapshot(snapshot(WEB, WEB_EAST, DB, DB_EAST)))
    assert lines[2:] == [
        "ServiceImport default/db Headless - pg:5432/TCP",
        "ServiceImport default/web ClusterSetIP 10.200.0.1 http:80/TCP",
        "EndpointSlice default/db-east of ServiceImport db in east 10.1.0.1 ready db-0",
        "EndpointSlice default/web-east of ServiceImport web in east 10.1.0.5 ready",
    ]


# --- what is asked of the API server --------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ("", (SERVICE, NAMESPACE, ENDPOINT_SLICE)),
        ("multicluster cluster.local", (SERVICE, NAMESPACE, ENDPOINT_SLICE, SERVICE_IMPORT)),
        ("multicluster cluster.local\nnoendpoints",
         (SERVICE, NAMESPACE, ENDPOINT_SLICE, SERVICE_IMPORT)),
        ("multicluster cluster.local\npods verified",
         (SERVICE, NAMESPACE, ENDPOINT_SLICE, POD, SERVICE_IMPORT)),
    ],
)  # fmt: skip
def test_imports_are_watched_only_if_the_option_is_used(
    options: str, kinds: tuple[Kind, ...]
) -> None:
    (plugin,) = setup(directives(f"kubernetes cluster.local {{\n{options}\n}}"), make_setup())
    assert isinstance(plugin, Kubernetes) and isinstance(plugin.source, KubeSpec)
    assert plugin.source.kinds == kinds


@pytest.mark.parametrize(
    ("options", "slices"),
    [
        ("", None),
        ("labels env=prod", "env=prod"),
        ("noendpoints", "multicluster.kubernetes.io/service-name"),
        ("labels env=prod\nnoendpoints", "env=prod,multicluster.kubernetes.io/service-name"),
    ],
)
def test_labels_select_the_slices_of_imports_and_not_the_imports(
    options: str, slices: str | None
) -> None:
    async def scenario() -> list[str | None]:
        async with ApiReplay() as api:
            api.load([WORLD[0]])
            async with RunningKdns(corefile(f"endpoint {api.url}\n{options}")):
                return [
                    api.watches(resource)[0].params.get("labelSelector")
                    for resource in ("endpointslices", "serviceimports")
                ]

    assert asyncio.run(scenario()) == [slices, None]


def test_a_server_without_the_crd_is_named_as_such() -> None:
    error = decode_status(b"404 page not found", 404)
    assert "404" in str(error) and "CRD of ServiceImport v1alpha1" in str(error)


@pytest.mark.parametrize(
    ("kind", "change", "field"),
    [
        (SERVICE_IMPORT, {"metadata": {"name": "a.b", "namespace": "x"}}, "metadata.name"),
        (SERVICE_IMPORT, {"spec": {"ips": ["10.0.0.1", "nine"]}}, "spec.ips[1]"),
        (SERVICE_IMPORT, {"spec": {"ports": [{"port": 70000}]}}, "spec.ports[0].port"),
        (SERVICE_IMPORT, {"spec": {"ports": [{"port": 1, "name": "a.b"}]}}, "spec.ports[0].name"),
        (
            ENDPOINT_SLICE,
            {"metadata": {"name": "a", "namespace": "x", "labels": {
                "multicluster.kubernetes.io/source-cluster": "x" * 64}}},
            "metadata.labels[multicluster.kubernetes.io/source-cluster]",
        ),
    ],
)  # fmt: skip
def test_an_object_dns_cannot_carry_is_named(kind: Kind, change: Json, field: str) -> None:
    with pytest.raises(ObjectError) as caught:
        convert(kind, {"metadata": {"name": "a", "namespace": "x"}, **change})
    assert caught.value.field == field


# --- mistakes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("multicluster", "'multicluster' needs an argument"),
        ("multicluster other.local", "multicluster zone 'other.local' is not served; name it on"),
        ("multicluster a..b", "zone is not a valid domain name"),
    ],
)
def test_a_mistake_is_named(line: str, says: str) -> None:
    (error,) = errors_of(f"kubernetes cluster.local {{\n{line}\n}}")
    assert error.startswith("Corefile:2") and says in error


# --- any order of events ------------------------------------------------------------------

ASKED = [
    (f"{name}.{DEFAULT}", qtype)
    for name in ("a", "b", "h.east.a", "h.west.b", "h.a", "_http._tcp.a", "_http._tcp.b")
    for qtype in ("A", "SRV")
] + [(DEFAULT, "A"), ("clusterset.local.", "SOA"), ("a.default.svc.cluster.local.", "A")]
OBJECT: st.SearchStrategy[Object] = st.one_of(
    st.builds(
        service_import,
        st.sampled_from(["a", "b"]),
        ips=st.sampled_from([(), ("10.200.0.1",), ("10.200.0.2",)]),
        type=st.sampled_from(["ClusterSetIP", "Headless"]),
    ),
    st.builds(
        imported_slice,
        st.sampled_from(["a", "b"]),
        st.sampled_from(["east", "west", ""]),
        st.builds(endpoint, st.sampled_from(["10.1.0.1", "10.1.0.2"]), hostname=st.just("h")),
    ),
    st.builds(service, st.sampled_from(["a", "b"]), ip=st.sampled_from(["10.96.0.1", "None"])),
    st.just(namespace("default")),
)


def _kind(obj: Object) -> Kind:
    if isinstance(obj, ServiceImport):
        return SERVICE_IMPORT
    if isinstance(obj, EndpointSlice):
        return ENDPOINT_SLICE
    return NAMESPACE if not obj.metadata.namespace else SERVICE


def _unfed() -> Kubernetes:
    text = f"kubernetes {ZONES} {{\nmulticluster clusterset.local\n}}"
    (plugin,) = setup(directives(text), make_setup())
    assert isinstance(plugin, Kubernetes)
    return plugin


def _replies(plugin: Kubernetes) -> dict[tuple[str, str], Reply]:
    return {asked: answer([plugin], question(*asked)) for asked in ASKED}


def _content(reply: Reply) -> tuple[object, ...]:
    return reply.rcode, reply.answer, reply.authority, reply.additional


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["ADDED", "ADDED", "DELETED"]), OBJECT), max_size=15))
def test_after_any_events_answers_are_those_of_a_fresh_start_and_kept_ones_still_hold(
    events: list[tuple[str, Object]],
) -> None:
    store = Store(())
    plugin, kept = _unfed(), dict[tuple[str, str], Reply]()
    for second, (event, obj) in enumerate([("ADDED", namespace("default")), *events]):
        store.apply(_kind(obj), event, obj)
        published = store.publish(1700000000 + second // 4)  # several changes a second
        if published is None:
            continue
        revision, _ = published
        deps = plugin.publish(*published, 0.0)
        kept = {
            asked: reply
            for asked, reply in kept.items()
            if deps is not None and not set(deps) & set(reply.deps)
        }
        fresh = _unfed()
        fresh.publish(revision, everything(revision), 0.0)
        wanted = _replies(fresh)
        for asked, reply in _replies(plugin).items():
            assert _content(reply) == _content(wanted[asked]), "a fresh start answers otherwise"
            assert _content(kept.setdefault(asked, reply)) == _content(reply), "deps are missing"
