"""Many objects at once: answers go on while lists are read, taken over and compiled.

What takes time is not measured here (bench/scale.py does): it is counted what one turn of the
loop takes over, and what is answered between the turns.
"""

from __future__ import annotations

import asyncio
import gc
import http.client
import json
import operator
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from api_replay import ApiReplay, Json, many_services
from hypothesis import given, settings
from hypothesis import strategies as st
from objects import endpoint, namespace, service, slice_of
from running import RunningKdns

from kdns import app
from kdns.app import TURNOVER
from kdns.errors import Unreachable
from kdns.pipeline import TURN, Pipeline
from kdns.plugins.kubernetes import Kubernetes
from kdns.plugins.plugin import HttpRoute
from kdns.registry.decode import PART, decode_page, decode_parts
from kdns.registry.manifests import compile_manifests
from kdns.registry.objects import ENDPOINT_SLICE, NAMESPACE, SERVICE, EndpointSlice, Kind, Object
from kdns.registry.snapshot import Changes, Snapshot, everything, everything_in_parts
from kdns.registry.spec import ManifestSpec
from kdns.registry.store import ENDPOINTS, Store
from kdns.server.http import HttpServer
from kdns.source import manifests
from kdns.zone.cluster import ClusterOptions, ClusterRecords

KINDS: tuple[Kind, ...] = (NAMESPACE, SERVICE, ENDPOINT_SLICE)
MANY = 10 * TURN


class Reader:
    """Notes what each publishing names, and how often the loop went round before it."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Changes]] = []
        self.rounds = 0

    def __call__(self, snapshot: Snapshot, changes: Changes, now: float) -> tuple[()]:
        self.seen.append((self.rounds, changes))
        return ()

    async def count_rounds(self) -> None:
        while True:
            self.rounds += 1
            await asyncio.sleep(0)


@asynccontextmanager
async def reading() -> AsyncIterator[tuple[Pipeline, Reader]]:
    pipeline, reader = Pipeline(Store(KINDS), lambda deps: None), Reader()
    pipeline.subscribe(reader)
    reader.seen.clear()
    rounds = asyncio.ensure_future(reader.count_rounds())
    try:
        yield pipeline, reader
    finally:
        rounds.cancel()


def services(count: int, subnet: int = 96) -> list[Object]:
    return [service(f"web-{n}", ip=f"10.{subnet}.{n >> 8}.{n & 255}") for n in range(count)]


def names(snapshot: Snapshot) -> set[str]:
    return set(snapshot.services.get("default", {}))


# --- the registry ---------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_long_list_is_taken_over_in_parts_with_the_loop_free_in_between() -> None:
    async with reading() as (pipeline, reader):
        pipeline.replace(NAMESPACE, [namespace("default")])
        pipeline.replace(SERVICE, services(MANY))
        pipeline.replace(ENDPOINT_SLICE, [])
        for kind in KINDS:
            pipeline.mark_synced(kind)
        await pipeline.synced.wait()
        assert max(len(changes.services) for _, changes in reader.seen) <= TURN
        rounds = [at for at, _ in reader.seen]
        assert rounds == sorted(set(rounds)), "the loop went round between any two"
        assert len(reader.seen) >= MANY // TURN
        assert names(pipeline.snapshot) == {f"web-{n}" for n in range(MANY)}
        assert not any(changes.synced for _, changes in reader.seen[:-1]), "only the last"


@pytest.mark.asyncio
async def test_large_services_count_for_more() -> None:
    size = 10 * ENDPOINTS
    large = [
        slice_of(f"web-{n}", *(endpoint(f"10.{n}.0.{k}") for k in range(size))) for n in range(MANY)
    ]
    async with reading() as (pipeline, reader):
        pipeline.replace(ENDPOINT_SLICE, large)
        for kind in KINDS:
            pipeline.mark_synced(kind)
        await pipeline.synced.wait()
        assert max(len(changes.services) for _, changes in reader.seen) <= TURN // 10 + 1


@pytest.mark.asyncio
async def test_the_same_list_once_more_changes_nothing() -> None:
    async with reading() as (pipeline, reader):
        pipeline.replace(SERVICE, services(MANY))
        pipeline.publish()
        reader.seen.clear()
        pipeline.replace(SERVICE, services(MANY))
        await pipeline.settle()
        assert not reader.seen


@pytest.mark.asyncio
async def test_what_comes_after_a_list_counts_after_it() -> None:
    listed = services(MANY)
    async with reading() as (pipeline, _):
        pipeline.replace(SERVICE, listed)
        pipeline.apply(SERVICE, "DELETED", listed[0])
        pipeline.apply(SERVICE, "MODIFIED", service("web-1", ip="10.97.0.1"))
        pipeline.apply(SERVICE, "DELETED", listed[-1])
        pipeline.apply(SERVICE, "ADDED", service("new", ip="10.97.0.2"))
        await pipeline.settle()
        pipeline.publish()
        held = pipeline.snapshot.services["default"]
        assert held.keys() == {f"web-{n}" for n in range(1, MANY - 1)} | {"new"}
        assert held["web-1"].spec.cluster_ip == "10.97.0.1"


@pytest.mark.asyncio
async def test_publishing_at_once_leaves_nothing_over() -> None:
    async with reading() as (pipeline, _):
        pipeline.replace(SERVICE, services(MANY))
        pipeline.publish()
        assert len(names(pipeline.snapshot)) == MANY


@pytest.mark.asyncio
async def test_names_that_are_listed_no_more_go_and_broken_ones_stay() -> None:
    async with reading() as (pipeline, _):
        pipeline.replace(SERVICE, services(MANY))
        pipeline.replace(SERVICE, services(3), keep={("default", "web-7")})
        await pipeline.settle()
        pipeline.publish()
        assert names(pipeline.snapshot) == {"web-0", "web-1", "web-2", "web-7"}


SOME = st.lists(st.integers(0, 12), unique=True, max_size=12)
STEP = st.one_of(
    st.tuples(st.just("list"), SOME, st.integers(96, 98)),
    st.tuples(st.sampled_from(["ADDED", "MODIFIED", "DELETED"]), st.integers(0, 12), st.just(99)),
)


@settings(deadline=None, max_examples=40)
@given(st.lists(STEP, max_size=8))
def test_in_parts_it_is_what_it_is_at_once(steps: list[Any]) -> None:
    async def both() -> None:
        pipeline, at_once = Pipeline(Store(KINDS), lambda deps: None), Store(KINDS)
        for what, which, subnet in steps:
            if what == "list":
                # Long, so that it is not taken over in one turn.
                objects = [*services(TURN + 50, 95)[20:], *(services(13, subnet)[n] for n in which)]
                pipeline.replace(SERVICE, objects)
                at_once.replace(SERVICE, objects)
            else:
                pipeline.apply(SERVICE, what, services(13, subnet)[which])
                at_once.apply(SERVICE, what, services(13, subnet)[which])
            await asyncio.sleep(0)
        await pipeline.settle()
        pipeline.publish()
        published = at_once.publish(0)
        expected = Snapshot() if published is None else published[0]
        assert pipeline.snapshot.services == expected.services

    asyncio.run(both())


def test_parts_of_everything_are_all_of_it() -> None:
    store = Store(KINDS)
    large = [slice_of("web-7", *(endpoint(f"10.1.{k >> 8}.{k & 255}") for k in range(999)))]
    store.replace(SERVICE, services(50))
    store.replace(ENDPOINT_SLICE, [*large, slice_of("gone", endpoint("10.1.9.9"))])
    store.replace(NAMESPACE, [namespace("default")])
    for kind in KINDS:
        store.mark_synced(kind)
    published = store.publish(1)
    assert published is not None
    snapshot, whole = published[0], everything(published[0])
    parts = list(everything_in_parts(snapshot, 10))
    assert frozenset().union(*(part.services for part in parts)) == whole.services
    assert frozenset().union(*(part.namespaces for part in parts)) == whole.namespaces
    assert max(len(part.services) for part in parts) <= 10
    assert parts[0].synced and not parts[0].services
    (with_large,) = [part for part in parts if ("default", "web-7") in part.services]
    assert len(with_large.services) < 10, "a large one fills its part"


def test_records_let_go_step_by_step() -> None:
    store, records = Store(KINDS), ClusterRecords(ClusterOptions())
    store.replace(NAMESPACE, [namespace("default")])
    store.replace(SERVICE, services(MANY))
    published = store.publish(1)
    assert published is not None
    records.update(*published)
    assert sum(1 for _ in records.dissolve()) >= 4
    assert not list(records.services()) and not pointers(records, "10.96.0.1")


@pytest.mark.asyncio
async def test_who_joins_in_the_middle_of_changes_has_them_all() -> None:
    pipeline = Pipeline(Store(KINDS), lambda deps: None)
    pipeline.replace(NAMESPACE, [namespace("default")])
    pipeline.replace(SERVICE, services(MANY))
    pipeline.publish()
    records = ClusterRecords(ClusterOptions())
    joining = asyncio.ensure_future(pipeline.join(lambda s, c, now: records.update(s, c)))
    for n in range(0, MANY, 7):  # a few in each turn of the joining
        pipeline.apply(SERVICE, "DELETED", services(MANY)[n])
        pipeline.apply(SERVICE, "MODIFIED", service(f"web-{n + 1}", ip="10.99.0.1"))
        await asyncio.sleep(0)
    await joining
    pipeline.publish()
    from_scratch = ClusterRecords(ClusterOptions())
    from_scratch.update(pipeline.snapshot, everything(pipeline.snapshot))
    assert told(records) == told(from_scratch)


def told(records: ClusterRecords) -> list[tuple[Any, ...]]:
    return [(r.name, r.addresses, r.endpoints) for r in records.services()]


# --- addresses ------------------------------------------------------------------------------


def pointers(records: ClusterRecords, address: str) -> list[bytes]:
    packed = bytes(map(int, address.split(".")))
    return [b".".join(labels) for labels in records.pointers(packed)]


@pytest.mark.parametrize("strict", [False, True])
def test_an_address_in_two_slices_keeps_the_name_that_stays(strict: bool) -> None:
    """A Pod that moves between slices is in both for a moment."""
    first = slice_of("db", endpoint("10.1.0.1", hostname="a"), endpoint("10.1.0.2"), name="db-1")
    second = slice_of("db", endpoint("10.1.0.1", hostname="b"), name="db-2")
    store, records = Store(KINDS), ClusterRecords(ClusterOptions(strict=strict))

    def publish() -> Sequence[Any]:
        published = store.publish(1)
        assert published is not None
        return records.update(*published)

    store.replace(SERVICE, [service("db", ip="None")])
    store.replace(NAMESPACE, [namespace("default")])
    store.replace(ENDPOINT_SLICE, [first, second])
    publish()
    assert pointers(records, "10.1.0.1") == [b"a.db.default.svc", b"b.db.default.svc"]
    store.apply(ENDPOINT_SLICE, "DELETED", first)
    assert "10.1.0.1" in publish(), "answers about it are forgotten"
    assert pointers(records, "10.1.0.1") == [b"b.db.default.svc"]
    assert pointers(records, "10.1.0.2") == []
    store.apply(ENDPOINT_SLICE, "DELETED", second)
    publish()
    assert pointers(records, "10.1.0.1") == []
    assert not records.has_reverse_below(b"\x0210\x07in-addr\x04arpa\x00")


def test_two_services_have_one_address() -> None:
    store, records = Store(KINDS), ClusterRecords(ClusterOptions())
    store.replace(NAMESPACE, [namespace("default")])
    store.replace(
        SERVICE, [service("a", ip="None"), service("b", ip="None"), service("c", ip="10.1.0.1")]
    )
    shared = [slice_of(owner, endpoint("10.1.0.1"), name=f"{owner}-1") for owner in ("a", "b")]
    store.replace(ENDPOINT_SLICE, shared)
    for gone, expected in (
        (None, [b"c.default.svc"]),  # a ClusterIP comes before endpoints
        ("c", [b"10-1-0-1.a.default.svc", b"10-1-0-1.b.default.svc"]),
        ("a", [b"10-1-0-1.b.default.svc"]),
        ("b", []),
    ):
        if gone is not None:
            store.apply(SERVICE, "DELETED", service(gone, ip="None"))
        published = store.publish(1)
        assert published is not None
        records.update(*published)
        assert pointers(records, "10.1.0.1") == expected


# --- reading --------------------------------------------------------------------------------


PAD = "x" * 40


def page_of(count: int, *more: str) -> bytes:
    items = [
        json.dumps(
            {
                "metadata": {"name": f"web-{n}", "namespace": "default", "labels": {"pad": PAD}},
                "spec": {"clusterIP": f"10.96.{n >> 8}.{n & 255}"},
            }
        )
        for n in range(count)
    ]
    text = '{"metadata":{"resourceVersion":"7","continue":"more"},"items":[%s]}'
    return (text % ",".join([*items, *more])).encode()


BROKEN = '{"metadata":{"name":"bad","namespace":"default"},"spec":{"clusterIP":7}}'


@pytest.mark.parametrize("more", [(), (BROKEN,)])
@pytest.mark.parametrize("count", [0, 1, 5000])
def test_a_long_page_is_read_in_parts(count: int, more: tuple[str, ...]) -> None:
    body = page_of(count, *more)
    whole, parts = decode_page(SERVICE, body), list(decode_parts(SERVICE, body))
    assert [obj for part in parts for obj in part.objects] == whole.objects
    assert [str(e) for part in parts for e in part.errors] == [str(e) for e in whole.errors]
    assert (parts[-1].resource_version, parts[-1].following) == ("7", "more")
    assert len(parts) >= len(body) // (2 * PART)


@pytest.mark.parametrize("body", [b"[" * 3 * PART, b" " * 3 * PART, page_of(5000)[:-9]])
def test_a_long_page_that_is_none_is_refused(body: bytes) -> None:
    with pytest.raises(Unreachable):
        list(decode_parts(SERVICE, body))


SPEC = ManifestSpec(("f.json",))
YAML = [
    "a: 1\n---\n- b\n- {c: [d, null, ~], 'e': 1.5}\n",
    "a: &x {b: 1}\nc: 2\n",
    "a: *x\n",
    "? [a]\n: b\n",
    "a: !!str 1\nb: !!int '7'\nc: 2026-01-01\nd: !!binary aGk=\n",
    "a: 1\na: 2\n",
    "<<: {a: 1}\nb: 2\n",
    "a: [&x 1, 2]\nb: yes\nc: 0x1f\n1: d\n",
    "---\n---\n",
    "a:\n- b:\n  - c:\n    - d\n",
    "text: |\n  ---\n  {{{{\n",
    "a\r\nb",
    "a: [" + "[" * 30 + "]" * 30 + "]\n",
    "- " * 40 + "x\n",
    "- " * 150 + "x\n",
    "[" * 150 + "]" * 150 + "\n",
    "".join("\n" + " " * n + "a:" for n in range(150)),
]


@pytest.mark.parametrize("text", YAML)
def test_a_glance_reads_yaml_as_a_close_look_does(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read() -> object:
        try:
            return manifests.parse_documents("f.yaml", text.encode())
        except ValueError as e:
            return str(e)

    quickly = read()
    monkeypatch.setattr(manifests, "_is_flat", lambda content: False)
    assert read() == quickly


@pytest.mark.parametrize(
    "text",
    [
        '{"kind":"List","items":[%s]}',
        '{"kind":"ServiceList","apiVersion":"v1","items":[%s]}',
        '{"apiVersion":"v1","items":[%s],"kind":"List","metadata":{}}',
        '{"kind":"List","items":[%s],"items":[{"kind":"A"},7,null]}',
    ],
)
def test_a_long_json_list_says_what_a_short_one_does(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = [o for o in many_services(20, 2) if o["kind"] != "Namespace"]
    content = (text % ",".join(map(json.dumps, objects))).encode()

    def read() -> list[str]:
        found = compile_manifests(manifests.parse_documents("f.json", content), SPEC)
        return [str(one) for one in (*found.services, *found.slices, *found.errors)]

    at_one_go = read()
    monkeypatch.setattr(manifests, "MUCH", 10)
    assert read() == at_one_go


def test_a_long_json_file_that_is_broken_is_said_with_its_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(manifests, "MUCH", 10)
    with pytest.raises(ValueError, match=r"f\.json:3: not JSON"):
        manifests.parse_documents("f.json", b'{"kind":"List",\n"items":[\n{]}')


TOKENS = ["a", "b: ", "- ", "? ", ": ", "\n", " ", "  ", "{", "[", "]", "}", ",", "\n---\n", "'"]


@settings(deadline=None)
@given(st.lists(st.sampled_from(TOKENS), max_size=60).map("".join))
def test_whatever_looks_flat_is(text: str) -> None:
    content = text.encode()
    if manifests._is_flat(content):
        # Raises ValueError for what is nested too deep; other faults are the reader's to find.
        try:
            manifests._check_shape("f.yaml", content)
        except manifests._BadShape as e:
            pytest.fail(str(e))
        except yaml.YAMLError:
            pass


# --- a whole server -------------------------------------------------------------------------

BLOCK = """.:0 {{
    bind 127.0.0.1
    kubernetes cluster.local in-addr.arpa ip6.arpa {{
        {source}
        ttl {ttl}
    }}
}}
"""
FIRST = "svc-1.bench-0.svc.cluster.local."


async def answers_until(kdns: RunningKdns, done: asyncio.Future[Any]) -> int:
    """Ask until something else is done; return how many answers came."""
    count = 0
    while not done.done():
        assert (await kdns.ask(FIRST)).answer
        count += 1
    return count


@pytest.mark.asyncio
async def test_a_reload_over_many_services_answers_in_between(tmp_path: Path) -> None:
    objects = tmp_path / "objects.json"
    objects.write_text(json.dumps({"kind": "List", "items": list(many_services(2000, 2))}))
    conf = tmp_path / "Corefile"
    conf.write_text(BLOCK.format(source=f"manifests {objects}", ttl=10))
    async with RunningKdns(conf=str(conf)) as kdns:
        for ttl in (11, 12, 13):
            conf.write_text(BLOCK.format(source=f"manifests {objects}", ttl=ttl))
            reload = asyncio.ensure_future(kdns.app.reload())
            answered = await answers_until(kdns, reload)
            assert reload.result(), "it was taken"
            # A question takes some turns of the loop, the reload as many as it has parts.
            assert answered >= 3
            assert (await kdns.ask(FIRST)).answer[0].ttl == ttl
            last = await kdns.ask("svc-1999.bench-19.svc.cluster.local.")
            assert last.answer[0].ttl == ttl


@pytest.mark.asyncio
async def test_after_lasting_change_a_reload_stops_for_no_pile_of_young_objects() -> None:
    """Each object takes another's place, so to the garbage collector's count none comes."""

    def moved(obj: Json, number: int) -> Json:
        first = {**obj["endpoints"][0], "addresses": [f"11.0.{number >> 8}.{number & 255}"]}
        return {**obj, "endpoints": [first, *obj["endpoints"][1:]]}

    gc.collect()
    async with ApiReplay() as api:
        objects = list(many_services(100, 50))
        api.load(objects)
        slices = [one for one in objects if one["kind"] == "EndpointSlice"]
        async with RunningKdns(BLOCK.format(source=f"endpoint {api.url}", ttl=10)) as kdns:
            pipeline = kdns.app.any_pipeline()
            assert pipeline is not None
            touched, looks = 0, list[int]()
            gc.callbacks.append(lambda phase, seen: looks.append(seen["generation"]))
            try:
                while touched < 2 * TURNOVER:  # each slice's addresses, and it
                    for one in slices:
                        touched += len(one["endpoints"])
                        await api.put(moved(one, touched % 65536))
                    last = f"11.0.{touched % 65536 >> 8}.{touched & 255}"
                    await until(partial(has_endpoint, pipeline, last))
            finally:
                gc.callbacks.pop()
            assert 1 in looks


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.001)


def has_endpoint(pipeline: Pipeline, address: str) -> bool:
    return any(
        endpoint.addresses[0] == address
        for space in pipeline.snapshot.slices.values()
        for ones in space.values()
        for one in ones
        for endpoint in one.endpoints or ()
    )


@pytest.mark.asyncio
async def test_what_a_site_answered_with_is_let_go_also_if_the_next_reload_comes_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "UNDER_WAY", 0.2)
    objects = tmp_path / "objects.json"
    objects.write_text(json.dumps({"kind": "List", "items": list(many_services(200, 2))}))
    conf = tmp_path / "Corefile"
    conf.write_text(BLOCK.format(source=f"manifests {objects}", ttl=10))
    async with RunningKdns(conf=str(conf)) as kdns:
        left: list[ClusterRecords] = []
        for ttl in (11, 12, 13):
            assert kdns.app.site is not None
            left += [p.records for p in kdns.app.site.plugins() if isinstance(p, Kubernetes)]
            assert (await kdns.ask(FIRST)).answer and (await kdns.ask(FIRST)).answer
            (cache,) = kdns.app.listeners[next(iter(kdns.app.listeners))].caches
            entries = cache.young.entries
            assert entries
            conf.write_text(BLOCK.format(source=f"manifests {objects}", ttl=ttl))
            assert await kdns.app.reload()
            assert (await kdns.ask(FIRST)).answer[0].ttl == ttl
            await until(partial(operator.not_, entries))
        await until(lambda: not any(pointers(records, "10.96.0.1") for records in left))
        assert len(left) == 3
        assert (await kdns.ask(FIRST)).answer


@pytest.mark.asyncio
async def test_a_relist_of_many_changed_services_answers_in_between() -> None:
    def moved(obj: Json) -> Json:
        ip = obj["spec"]["clusterIP"].replace("10.96", "10.97")
        return {**obj, "spec": {**obj["spec"], "clusterIP": ip, "clusterIPs": [ip]}}

    async with ApiReplay() as api:
        objects = list(many_services(2000, 2))
        api.load(objects)
        async with RunningKdns(BLOCK.format(source=f"endpoint {api.url}", ttl=10)) as kdns:
            pipeline = kdns.app.any_pipeline()
            assert pipeline is not None
            reader = Reader()
            pipeline.subscribe(reader)
            reader.seen.clear()
            # All else while nobody watches: the watches are too old, and list again.
            api.load([moved(o) if o["kind"] == "Service" else o for o in objects])
            api.forget()
            await api.wake()
            all_there = asyncio.ensure_future(until_moved(pipeline, 2000))
            answered = await answers_until(kdns, all_there)
            assert answered >= 3
            assert max(len(changes.services) for _, changes in reader.seen) <= TURN
            reply = await kdns.ask(FIRST)
            assert reply.answer[0].rdata == bytes((10, 97, 0, 1))


async def until_moved(pipeline: Pipeline, count: int) -> None:
    while (
        sum(
            one.spec.cluster_ip.startswith("10.97")
            for space in pipeline.snapshot.services.values()
            for one in space.values()
        )
        < count
    ):
        await asyncio.sleep(0.01)


@pytest.mark.asyncio
async def test_who_asks_for_health_while_names_come_first_waits_and_is_answered() -> None:
    server = HttpServer("127.0.0.1:0")
    server.routes = {"/health": HttpRoute("127.0.0.1:0", "/health", lambda h: (200, "text", b"OK"))}
    await server.bind()
    try:

        def get() -> bytes:
            asked = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
            asked.request("GET", "/health")
            return asked.getresponse().read()

        waiting = asyncio.ensure_future(asyncio.to_thread(get))
        await asyncio.sleep(0)
        assert not waiting.done()
        await server.serve()
        assert await waiting == b"OK"
    finally:
        await server.stop()


@pytest.mark.asyncio
async def test_an_address_taken_before_and_not_served_is_given_back() -> None:
    first = HttpServer("127.0.0.1:0")
    await first.bind()
    second = HttpServer(f"127.0.0.1:{first.port}")
    with pytest.raises(OSError, match="Address already in use"):
        await second.bind()
    await first.stop()
    await second.bind()
    await second.stop()


def test_a_slice_of_ten_is_no_more_than_a_service() -> None:
    """What TURN counts by: bench/scale.py's objects go at one each."""
    ten = slice_of("web", *(endpoint(f"10.1.0.{n}") for n in range(10)))
    assert isinstance(ten, EndpointSlice)
    store = Store(KINDS)
    assert sum(store.replacing(ENDPOINT_SLICE, [ten])) == 1
