"""The embedded registry read without HTTP: what is acknowledged, DNS and forwarding know."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from kdns.api.feed import StoreFeed
from kdns.api.store import Delete, Obj, ObjectStore, Put
from kdns.metrics import Metrics
from kdns.pipeline import Pipeline
from kdns.registry.spec import KubeSpec, ManifestSpec
from kdns.registry.store import Store

Change = Callable[[ObjectStore], Coroutine[Any, Any, Any]]


def put(resource: str, name: str, namespace: str = "default", **obj: Any) -> Put:
    meta = {"name": name, "uid": f"uid-{name}"} | ({"namespace": namespace} if namespace else {})
    return Put((resource, namespace, name), {"metadata": meta | obj.pop("metadata", {}), **obj})


def service(name: str, **spec: Any) -> Put:
    return put("services", name, spec={"clusterIP": "10.96.0.7", **spec})


SLICES = "endpointslices.discovery.k8s.io"


def piece(name: str, service: str, address: str) -> Put:
    labels = {"kubernetes.io/service-name": service}
    return put(SLICES, name, metadata={"labels": labels}, addressType="IPv4",
               endpoints=[{"addresses": [address]}])  # fmt: skip


@asynccontextmanager
async def reading(
    store: ObjectStore, spec: KubeSpec | None = None
) -> AsyncIterator[tuple[Pipeline, StoreFeed]]:
    spec = spec or KubeSpec()
    feed = StoreFeed(store)
    pipeline = Pipeline(Store(spec.kinds), lambda deps: None)
    task = asyncio.create_task(feed.follow(spec, pipeline, Metrics()))
    await pipeline.synced.wait()
    try:
        yield pipeline, feed
    finally:
        task.cancel()
        await asyncio.wait((task,))


@pytest_asyncio.fixture(params=["memory", "file"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[ObjectStore]:
    one = ObjectStore(str(tmp_path / "objects.db") if request.param == "file" else "")
    await one.open()
    yield one
    await one.close()


def names(pipeline: Pipeline) -> list[str]:
    return sorted(n for space in pipeline.snapshot.services.values() for n in space)


@pytest.mark.asyncio
async def test_what_is_there_is_listed_and_all_kinds_are_synced(store: ObjectStore) -> None:
    await store.write(service("web"), piece("web-a", "web", "10.244.0.5"),
                      put("namespaces", "default", ""))  # fmt: skip
    async with reading(store) as (pipeline, _):
        assert pipeline.snapshot.synced
        assert names(pipeline) == ["web"]
        assert list(pipeline.snapshot.namespaces) == ["default"]
        (one,) = pipeline.snapshot.slices["default"]["web"]
        assert one.endpoints is not None
        assert one.endpoints[0].addresses == ["10.244.0.5"]
        assert pipeline.age() is not None


@pytest.mark.asyncio
async def test_an_acknowledged_write_has_been_published(store: ObjectStore) -> None:
    async with reading(store) as (pipeline, _):
        await store.write(service("web"))
        assert names(pipeline) == ["web"]
        await store.write(service("web", clusterIP="10.96.0.8"))
        assert pipeline.snapshot.services["default"]["web"].spec.cluster_ip == "10.96.0.8"
        await store.write(service("other"), Delete(("services", "default", "web")))
        assert names(pipeline) == ["other"]


@pytest.mark.asyncio
async def test_events_are_filtered_as_a_watch_with_selectors_is(store: ObjectStore) -> None:
    """An object that is no longer chosen goes; one that comes to be chosen comes."""
    async with reading(store, KubeSpec(label_selector="tier=web")) as (pipeline, _):
        await store.write(service("a"))
        assert names(pipeline) == []
        chosen = put("services", "a", metadata={"labels": {"tier": "web"}}, spec={})
        await store.write(chosen)
        assert names(pipeline) == ["a"]
        await store.write(service("a"))
        assert names(pipeline) == []


@pytest.mark.asyncio
async def test_forwarding_gets_its_node_and_no_headless_services(store: ObjectStore) -> None:
    spec = KubeSpec(node="node-2", only_forwarded=True)
    await store.write(service("web"), service("headless", clusterIP="None"),
                      put("nodes", "node-1", ""), put("nodes", "node-2", ""))  # fmt: skip
    async with reading(store, spec) as (pipeline, _):
        assert names(pipeline) == ["web"]
        assert list(pipeline.snapshot.nodes) == ["node-2"]


@pytest.mark.asyncio
async def test_pods_that_are_over_are_left_out(store: ObjectStore) -> None:
    def pod(phase: str) -> Put:
        return put("pods", "p", status={"phase": phase, "podIP": "10.244.0.9"})

    async with reading(store, KubeSpec(want_pods=True)) as (pipeline, _):
        await store.write(pod("Running"))
        assert list(pipeline.snapshot.pods["default"]) == ["p"]
        await store.write(pod("Succeeded"))
        assert not pipeline.snapshot.pods.get("default")


@pytest.mark.asyncio
async def test_kinds_that_the_api_lacks_are_empty_and_synced(store: ObjectStore) -> None:
    async with reading(store, KubeSpec(want_imports=True)) as (pipeline, _):
        assert pipeline.snapshot.synced
        assert not pipeline.snapshot.imports


@pytest.mark.asyncio
async def test_an_object_that_dns_cannot_use_is_skipped_and_the_rest_kept(
    store: ObjectStore, caplog: pytest.LogCaptureFixture
) -> None:
    bad: Obj = {"clusterIP": "not an address"}
    await store.write(service("good"), put("services", "bad", spec=bad))
    async with reading(store) as (pipeline, _):
        assert names(pipeline) == ["good"]
        await store.write(put("services", "worse", spec=bad), service("better"))
        assert names(pipeline) == ["better", "good"]
    assert "Service default/worse: spec.clusterIP: 'not an address' is not an IP" in caplog.text


@pytest.mark.asyncio
async def test_a_frozen_feed_tells_nothing_and_afterwards_everything(store: ObjectStore) -> None:
    await store.write(service("old"))
    async with reading(store) as (pipeline, feed):
        feed.freeze()
        await store.write(service("new"), Delete(("services", "default", "old")))
        assert names(pipeline) == ["old"]
        feed.thaw()
        assert names(pipeline) == ["new"]
        await store.write(service("newer"))
        assert names(pipeline) == ["new", "newer"]


@pytest.mark.asyncio
async def test_a_reader_that_left_is_told_nothing(store: ObjectStore) -> None:
    async with reading(store) as (pipeline, feed):
        pass
    await store.write(service("web"))
    feed.freeze()
    feed.thaw()
    assert names(pipeline) == []


@pytest.mark.asyncio
async def test_a_spec_that_names_another_source_gets_that(
    store: ObjectStore, tmp_path: Path
) -> None:
    (tmp_path / "web.yaml").write_text(
        "{apiVersion: v1, kind: Service, metadata: {name: from-a-file}, spec: {clusterIP: None}}"
    )
    await store.write(service("embedded"))
    spec = ManifestSpec((str(tmp_path),))
    pipeline = Pipeline(Store(spec.kinds), lambda deps: None)
    task = asyncio.create_task(StoreFeed(store).follow(spec, pipeline, Metrics()))
    await pipeline.synced.wait()
    task.cancel()
    assert names(pipeline) == ["from-a-file"]
