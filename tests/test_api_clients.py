"""The embedded API as programs meet it: through the client libraries that people use."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from kdns.cluster import LocalCluster

PATIENCE = 20.0  # seconds
SERVICE: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "web"},
    "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]},
}
DEPLOYMENT: dict[str, Any] = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": "web"},
    "spec": {
        "replicas": 2,
        "selector": {"matchLabels": {"app": "web"}},
        "template": {
            "metadata": {"labels": {"app": "web"}},
            "spec": {"containers": [{"name": "web", "image": "web:1"}]},
        },
    },
}


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    # TLS and a token: what these libraries must be able to deal with.
    with LocalCluster(tls=True) as cluster:
        yield cluster


def wait_until(found: Callable[[], Any], what: str) -> Any:
    """Return what `found` returns once that is something."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if result := found():
            return result
        time.sleep(0.02)
    raise AssertionError(f"never: {what}")


# --- kubernetes ------------------------------------------------------------------------------


def core(cluster: LocalCluster) -> Any:
    from kubernetes import client, config

    return client.CoreV1Api(config.new_client_from_config(cluster.kubeconfig))


def test_kubernetes_client_makes_changes_and_deletes(cluster: LocalCluster) -> None:
    from kubernetes.client.exceptions import ApiException

    api = core(cluster)
    made = api.create_namespaced_service("default", SERVICE)
    assert made.spec.cluster_ip == cluster.resolve("web")[0]
    assert [s.metadata.name for s in api.list_namespaced_service("default").items] == [
        "kubernetes",
        "web",
    ]
    body = {"metadata": {"labels": {"tier": "front"}}}
    assert api.patch_namespaced_service("web", "default", body).metadata.labels == {"tier": "front"}
    made.metadata.labels = {"tier": "back"}
    with pytest.raises(ApiException) as late:  # of the version before the patch
        api.replace_namespaced_service("web", "default", made)
    assert late.value.status == 409
    assert api.delete_namespaced_service("web", "default").metadata.name == "web"
    with pytest.raises(ApiException) as gone:
        api.read_namespaced_service("web", "default")
    assert (gone.value.status, json.loads(gone.value.body)["reason"]) == (404, "NotFound")


def test_kubernetes_client_is_told_what_is_wrong(cluster: LocalCluster) -> None:
    from kubernetes.client.exceptions import ApiException

    wrong = {**SERVICE, "spec": {"ports": [{"port": 70000}]}}
    with pytest.raises(ApiException) as refused:
        core(cluster).create_namespaced_service("default", wrong)
    body = json.loads(refused.value.body)
    assert refused.value.status == 422
    assert body["details"]["causes"][0]["field"] == "spec.ports[0].port"
    assert "must be between 1 and 65535, inclusive" in body["message"]


def test_kubernetes_client_watches(cluster: LocalCluster) -> None:
    from kubernetes import watch

    api = core(cluster)
    since = api.list_namespaced_service("default").metadata.resource_version
    api.create_namespaced_service("default", SERVICE)
    api.delete_namespaced_service("web", "default")
    stream = watch.Watch().stream(
        api.list_namespaced_service, "default", resource_version=since, timeout_seconds=10
    )
    seen = [(event["type"], event["object"].metadata.name) for event in islice(stream, 2)]
    assert seen == [("ADDED", "web"), ("DELETED", "web")]


def test_kubernetes_informer_keeps_up_over_lost_watches(cluster: LocalCluster) -> None:
    from kubernetes.informer import SharedInformer

    api = core(cluster)
    seen: queue.Queue[str] = queue.Queue()
    informer = SharedInformer(api.list_namespaced_service, namespace="default")
    informer.add_event_handler("ADDED", lambda obj: seen.put(obj.metadata.name))
    informer.start()
    try:
        assert seen.get(timeout=PATIENCE) == "kubernetes"
        cluster.apply(SERVICE)
        assert seen.get(timeout=PATIENCE) == "web"
        cluster.expire_watches()
        later: dict[str, Any] = {**SERVICE, "metadata": {"name": "later"}}
        cluster.apply(later)
        wait_until(lambda: informer.cache.get_by_key("default/later"), "the cache has it")
        # It was in the new list; this one is in the new watch. Between the two, the informer
        # does not hear that it is to stop.
        later["metadata"] = {"name": "last"}
        cluster.apply(later)
        assert seen.get(timeout=PATIENCE) == "later"
        assert seen.get(timeout=PATIENCE) == "last"
    finally:
        informer.stop()


def test_kubernetes_client_scales_a_deployment(cluster: LocalCluster) -> None:
    from kubernetes import client

    api = core(cluster)
    apps = client.AppsV1Api(api.api_client)
    apps.create_namespaced_deployment("default", DEPLOYMENT)
    api.create_namespaced_service("default", SERVICE)
    wait_until(lambda: len(cluster.endpoints("web")) == 2, "two endpoints")
    apps.patch_namespaced_deployment_scale("web", "default", {"spec": {"replicas": 3}})
    wait_until(
        lambda: apps.read_namespaced_deployment("web", "default").status.ready_replicas == 3,
        "three ready replicas",
    )
    assert len(api.list_namespaced_pod("default", label_selector="app=web").items) == 3
    assert len(cluster.endpoints("web")) == 3


@pytest.mark.asyncio
async def test_kubernetes_aio_client(cluster: LocalCluster) -> None:
    from kubernetes.aio import client, config, watch

    settings = client.Configuration()
    await config.load_kube_config(cluster.kubeconfig, client_configuration=settings)
    async with client.ApiClient(settings) as connection:
        api = client.CoreV1Api(connection)
        made = await api.create_namespaced_service("default", SERVICE)
        since = made.metadata.resource_version
        body = {"metadata": {"annotations": {"a": "b"}}}
        await api.patch_namespaced_service("web", "default", body)
        async with watch.Watch().stream(
            api.list_namespaced_service, "default", resource_version=since, timeout_seconds=10
        ) as stream:
            async for event in stream:
                assert event["type"] == "MODIFIED"
                assert event["object"].metadata.annotations == {"a": "b"}
                break


def test_dynamic_client_applies_on_the_servers_side(cluster: LocalCluster) -> None:
    from kubernetes import config, dynamic
    from kubernetes.dynamic.exceptions import ConflictError

    client = dynamic.DynamicClient(config.new_client_from_config(cluster.kubeconfig))
    services = client.resources.get(api_version="v1", kind="Service")
    services.server_side_apply(SERVICE, namespace="default", field_manager="one")
    other = {**SERVICE, "spec": {**SERVICE["spec"], "selector": {"app": "other"}}}
    with pytest.raises(ConflictError):
        services.server_side_apply(other, namespace="default", field_manager="two")
    done = services.server_side_apply(
        other, namespace="default", field_manager="two", force_conflicts=True
    )
    assert done.spec.selector.app == "other"
    managers = {entry.manager for entry in done.metadata.managedFields}
    assert {"one", "two"} <= managers


# --- lightkube, kr8s ---------------------------------------------------------------------------


def test_lightkube(cluster: LocalCluster) -> None:
    from lightkube import Client, KubeConfig
    from lightkube.core.exceptions import ApiError
    from lightkube.models.core_v1 import ServicePort, ServiceSpec
    from lightkube.models.meta_v1 import ObjectMeta
    from lightkube.resources.apps_v1 import Deployment
    from lightkube.resources.core_v1 import Pod, Service

    client: Any = Client(
        KubeConfig.from_file(cluster.kubeconfig), namespace="default", field_manager="lightkube"
    )
    spec = ServiceSpec(ports=[ServicePort(port=80)], selector={"app": "web"})
    made = client.create(Service(metadata=ObjectMeta(name="web"), spec=spec))
    assert made.spec.clusterIP
    client.apply(Deployment.from_dict(DEPLOYMENT))
    client.wait(Deployment, "web", for_conditions=["Available"])
    pods = list(client.list(Pod, labels={"app": "web"}))
    assert sorted(f"{pod.status.podIP}:80" for pod in pods) == cluster.endpoints("web")
    client.patch(Service, "web", {"metadata": {"labels": {"a": "b"}}})
    changed = next(
        obj
        for _, obj in client.watch(Service, fields={"metadata.name": "web"}, server_timeout=10)
        if obj.metadata.labels
    )
    assert changed.metadata.labels == {"a": "b"}
    client.delete(Service, "web")
    with pytest.raises(ApiError):
        client.get(Service, "web")


@pytest.mark.filterwarnings("ignore:Kubernetes version")  # it knows 1.35 at most
@pytest.mark.asyncio
async def test_kr8s(cluster: LocalCluster) -> None:
    import kr8s
    from kr8s.asyncio.objects import Deployment, Pod, Service

    api = await kr8s.asyncio.api(kubeconfig=cluster.kubeconfig)
    web = await Deployment(DEPLOYMENT, api=api)
    await web.create()
    await web.wait("condition=Available", timeout=PATIENCE)
    service = await Service(SERVICE, api=api)
    await service.create()
    assert await service.exists()
    pods = [pod async for pod in Pod.list(label_selector="app=web", api=api)]
    assert len(pods) == 2
    await web.scale(1)
    await service.patch({"metadata": {"labels": {"a": "b"}}})
    assert service.labels["a"] == "b"
    await service.delete()
    assert not await service.exists()


# --- kopf ---------------------------------------------------------------------------------------


OPERATOR = """\
    import kopf

    @kopf.on.create("v1", "services", labels={"watched": "yes"})
    def made(name, patch, logger, **_):
        patch.metadata.annotations["example.com/made"] = name
        logger.info("made a Service")

    @kopf.on.update("v1", "services", field="spec.ports", labels={"watched": "yes"})
    def changed(new, patch, **_):
        patch.metadata.annotations["example.com/port"] = str(new[0]["port"])

    @kopf.on.delete("v1", "services", labels={"watched": "yes"})
    def gone(name, **_):
        open(f"gone-{name}", "w").close()
"""


@contextlib.contextmanager
def operator(cluster: LocalCluster, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Run OPERATOR."""
    (folder / "handlers.py").write_text(textwrap.dedent(OPERATOR))
    process = subprocess.Popen(
        [sys.executable, "-m", "kopf", "run", "-n", "default", "--standalone", "handlers.py"],
        cwd=folder, env={"KUBECONFIG": cluster.kubeconfig, "PATH": "", "HOME": str(folder)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    reader = threading.Thread(target=process.stdout.read)  # so that it never waits for us
    reader.start()
    try:
        yield process
    finally:
        process.terminate()
        process.wait(PATIENCE)
        reader.join()


def test_an_operator_of_kopf(cluster: LocalCluster, tmp_path: Path) -> None:
    """Its finalizer, its patches and its watch."""

    def annotation(name: str) -> Any:
        return cluster.get("svc", "web")["metadata"].get("annotations", {}).get(name)

    labelled: dict[str, Any] = {
        **SERVICE,
        "metadata": {"name": "web", "labels": {"watched": "yes"}},
    }
    with operator(cluster, tmp_path) as running:
        cluster.apply(labelled)
        wait_until(lambda: annotation("example.com/made") == "web", "it hears of a Service")
        labelled["spec"] = {**SERVICE["spec"], "ports": [{"port": 81}]}
        cluster.apply(labelled)
        wait_until(lambda: annotation("example.com/port") == "81", "it hears of a change")
        cluster.delete("svc", "web")
        wait_until((tmp_path / "gone-web").exists, "it hears of the deletion")
        wait_until(lambda: not cluster.list("svc", labels="watched"), "the Service goes")
        assert running.poll() is None


# --- what is sent -------------------------------------------------------------------------------


def test_what_it_sends_is_what_the_schemas_of_kubernetes_allow(cluster: LocalCluster) -> None:
    import kubernetes_validate

    pod = DEPLOYMENT["spec"]["template"]["spec"]
    others = [
        {"kind": "ConfigMap", "apiVersion": "v1", "metadata": {"name": "c"}, "data": {"a": "b"}},
        {"kind": "Secret", "apiVersion": "v1", "metadata": {"name": "s"}, "stringData": {"a": "b"}},
        {"kind": "Pod", "apiVersion": "v1", "metadata": {"name": "p"}, "spec": pod},
        {
            "kind": "StatefulSet",
            "apiVersion": "apps/v1",
            "metadata": {"name": "db"},
            "spec": {**DEPLOYMENT["spec"], "serviceName": "web"},
        },
    ]
    cluster.apply([SERVICE, DEPLOYMENT, *others])
    kinds = ("ns no svc ep po ev cm secret sa endpointslices deploy rs sts lease").split()
    objects = [obj for kind in kinds for obj in cluster.list(kind, "")]
    assert {obj["kind"] for obj in objects} >= {
        "Namespace", "Node", "Service", "Endpoints", "Pod", "Event", "ConfigMap", "Secret",
        "ServiceAccount", "EndpointSlice", "Deployment", "ReplicaSet", "StatefulSet",
    }  # fmt: skip
    release = kubernetes_validate.latest_version()
    for obj in objects:
        kubernetes_validate.validate(obj, release, strict=True)
