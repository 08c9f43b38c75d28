"""The registry kept by an API server over real HTTP: good days, and every kind of bad one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import pathlib
import ssl
import stat
import sys
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from typing import Any

import pytest
import trustme
from api_replay import ApiReplay, Fault, Json, golden

from kdns.errors import Denied, SourceError, Unreachable
from kdns.metrics import Metrics
from kdns.registry.objects import Key, Kind
from kdns.registry.snapshot import Snapshot
from kdns.registry.spec import KubeSpec
from kdns.registry.store import Store
from kdns.source.kube import KubeSource, environment_proxy
from kdns.source.reflector import Timing

pytestmark = pytest.mark.asyncio

# A watch settles at once, so that back-off does not grow where a test is not about it.
FAST = Timing(
    first=0.01, most=0.05, settled=0.0, quiet=5.0, initial_quiet=0.2, connect=2.0, list=5.0
)


class Registry:
    """A sink over a store; `until` waits for a state, never for a time."""

    def __init__(self, spec: KubeSpec) -> None:
        self.store = Store.of(spec)
        self.snapshot = Snapshot()
        self.failures: list[SourceError] = []
        self.retries: list[float] = []
        self.replaced: list[Kind] = []
        self.applied = 0
        self.heards = 0
        self._told = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    def replace(self, kind: Kind, objects: Iterable[Any], keep: Collection[Key] = ()) -> None:
        self.store.replace(kind, objects, keep)
        self.replaced.append(kind)
        self._publish()

    def apply(self, kind: Kind, event: str, obj: Any) -> None:
        self.store.apply(kind, event, obj)
        self.applied += 1
        self._publish()

    def mark_synced(self, kind: Kind) -> None:
        self.store.mark_synced(kind)
        self._publish()

    def heard(self, what: str) -> None:
        self.heards += 1
        self._wake()

    def failed(self, what: str, error: SourceError, retry_in: float) -> None:
        self.failures.append(error)
        self.retries.append(retry_in)
        self._wake()

    def _publish(self) -> None:
        out = self.store.publish(1)
        if out is not None:
            self.snapshot = out[0]
        self._wake()

    def _wake(self) -> None:
        task = asyncio.ensure_future(self._notify())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _notify(self) -> None:
        async with self._told:
            self._told.notify_all()

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(10), self._told:
            await self._told.wait_for(lambda: bool(condition()))

    def service(self, name: str, namespace: str = "default") -> Any:
        return self.snapshot.services.get(namespace, {}).get(name)


@contextlib.asynccontextmanager
async def following(
    spec: KubeSpec, timing: Timing = FAST, metrics: Metrics | None = None
) -> AsyncIterator[Registry]:
    registry = Registry(spec)
    source = KubeSource(spec, registry, metrics or Metrics(), timing=timing)
    task = asyncio.create_task(source.run())
    try:
        yield registry
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def service(name: str, *, port: int = 80, namespace: str = "default", **labels: str) -> Json:
    return {
        "kind": "Service",
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "spec": {"clusterIP": "10.96.0.9", "ports": [{"port": port, "protocol": "TCP"}]},
    }


def namespaces(snapshot: Snapshot) -> dict[str, list[str]]:
    return {ns: sorted(names) for ns, names in snapshot.services.items()}


# --- good days ----------------------------------------------------------------------------


@pytest.mark.parametrize("watch_list", ["yes", "refused", "ignored"])
async def test_the_recorded_cluster_is_listed_whatever_the_server_knows_of_watch_list(
    watch_list: str,
) -> None:
    async with ApiReplay(watch_list=watch_list) as api:
        api.load(golden())
        async with following(KubeSpec(api.url, want_pods=True)) as registry:
            await registry.until(lambda: registry.snapshot.synced)
            snapshot = registry.snapshot
            assert sum(map(len, snapshot.services.values())) == 29
            slices = [s for owners in snapshot.slices.values() for o in owners.values() for s in o]
            assert len(slices) == 24
            assert set(snapshot.namespaces) >= {"default", "prod", "kube-system"}
            assert sum(map(len, snapshot.pods.values())) == 2
            # And the watch goes on from there.
            await api.put(service("fresh"))
            await registry.until(lambda: registry.service("fresh"))
            await api.delete(service("fresh"))
            await registry.until(lambda: not registry.service("fresh"))
        if watch_list == "yes":
            assert not [a for a in api.asked if not a.watch]
        else:
            assert api.lists("services")[0].params == {"limit": "500", "resourceVersion": "0"}


async def test_only_what_is_wanted_is_watched_and_selectors_go_to_the_server() -> None:
    async with ApiReplay() as api:
        api.load(golden())
        await api.put(service("picked", app="web"))
        spec = KubeSpec(api.url, label_selector="app=web", want_endpoints=False)
        async with following(spec) as registry:
            await registry.until(lambda: registry.snapshot.synced)
            assert namespaces(registry.snapshot) == {"default": ["picked"]}
            assert {a.resource for a in api.asked} == {"services", "namespaces"}
            # Namespaces are never selected by the labels of Services.
            assert len(registry.snapshot.namespaces) == 6


async def test_pods_that_have_ended_are_not_asked_for() -> None:
    async with ApiReplay() as api:
        api.load(golden())
        pod = {"kind": "Pod", "metadata": {"name": "done", "namespace": "default"}}
        await api.put({**pod, "status": {"phase": "Succeeded", "podIP": "10.244.9.9"}})
        async with following(KubeSpec(api.url, want_pods=True)) as registry:
            await registry.until(lambda: registry.snapshot.synced)
            assert "done" not in registry.snapshot.pods.get("default", {})


async def test_a_proxy_asks_for_its_node_and_for_nothing_it_does_not_forward() -> None:
    async with ApiReplay() as api:
        api.load(golden())
        await api.put(
            {
                "kind": "Service",
                "metadata": {
                    "name": "meshed",
                    "namespace": "default",
                    "labels": {"service.kubernetes.io/service-proxy-name": "mesh"},
                },
                "spec": {"clusterIP": "10.96.7.7", "ports": [{"port": 80}]},
            }
        )
        async with following(KubeSpec(api.url, node="node1", only_forwarded=True)) as registry:
            await registry.until(lambda: registry.snapshot.synced)
            snapshot = registry.snapshot
            assert {a.resource for a in api.asked} == {
                "services", "endpointslices", "nodes", "servicecidrs",
            }  # fmt: skip
            assert list(snapshot.nodes) == ["node1"]
            labels = snapshot.nodes["node1"].metadata.labels
            assert labels == {"topology.kubernetes.io/zone": "z-a"}
            found = [s for names in snapshot.services.values() for s in names.values()]
            assert len(found) > 10
            assert [s.metadata.name for s in found if s.spec.cluster_ip == "None"] == []
            assert registry.service("meshed") is None


async def test_a_long_list_comes_in_pages() -> None:
    async with ApiReplay(watch_list="refused") as api:
        for n in range(1201):
            await api.put(service(f"s{n}"))
        # A first list may come whole from the server's cache; after an expiry it may not.
        api.fault("services", "watch", Fault(), Fault(lost=True))
        async with following(KubeSpec(api.url)) as registry:
            await registry.until(lambda: registry.replaced.count("Service") == 2)
            pages = [a.params.get("continue") is not None for a in api.lists("services")]
            assert pages == [False, False, True, True]
            assert len(registry.snapshot.services["default"]) == 1201


async def test_requests_are_counted_as_client_go_counts_them() -> None:
    metrics = Metrics()
    async with ApiReplay(watch_list="refused") as api:
        api.load(golden())
        async with following(KubeSpec(api.url), metrics=metrics) as registry:
            await registry.until(lambda: registry.snapshot.synced)
            await registry.until(lambda: api.open_watches == 3 or registry.heards)
        host = f"127.0.0.1:{api.port}"
        name = "coredns_kubernetes_rest_client_requests_total"
        assert metrics.value(name, "422", "GET", host) == 3
        assert metrics.value(name, "200", "GET", host) >= 3


# --- bad days -----------------------------------------------------------------------------


FAULTS: dict[str, tuple[str, list[Fault]]] = {
    "410 while watching, as status": (
        "watch",
        [Fault(end=True), Fault(410, {"kind": "Status", "code": 410, "reason": "Expired"})],
    ),
    "410 while watching, in the stream": ("watch", [Fault(lost=True)]),
    "410 when it first lists": ("watch", [Fault(410)]),
    "429 with Retry-After": ("watch", [Fault(429, headers={"Retry-After": "0.02"})] * 2),
    "500": ("watch", [Fault(500)] * 4),
    "503 with a body that is no JSON": ("watch", [Fault(503)]),
    "403": ("watch", [Fault(403)] * 3),
    "404": ("watch", [Fault(404)]),
    "a redirect to another host": (
        "watch",
        [Fault(307, headers={"Location": "http://192.0.2.1/"})],
    ),
    "cut in the middle of a line": ("watch", [Fault(raw=b'{"type":"ADDED","obj', cut=True)] * 3),
    "ended in the middle of a line": ("watch", [Fault(raw=b'{"type":"ADDED","obj', end=True)]),
    "a storm of EOFs": ("watch", [Fault(end=True)] * 10),
    "a storm of EOFs after some events": ("watch", [Fault(end=True, after=2)] * 6),
    "garbage in the stream": ("watch", [Fault(raw=b"\x00\xff<html>\n")] * 3),
    "an event of a type nobody knows": ("watch", [Fault(raw=b'{"type":"X","object":{}}\n')]),
    "an ERROR with code 500": (
        "watch",
        [Fault(raw=b'{"type":"ERROR","object":{"kind":"Status","code":500}}\n')],
    ),
    "a watch that hangs": ("watch", [Fault(hang=True)]),
}


@pytest.mark.parametrize("watch_list", ["yes", "refused"])
@pytest.mark.parametrize("name", FAULTS)
async def test_nothing_is_lost_through(name: str, watch_list: str) -> None:
    verb, faults = FAULTS[name]
    timing = Timing(
        first=0.01, most=0.03, settled=9.0, quiet=0.3, initial_quiet=0.2, connect=2.0, list=1.0
    )
    async with ApiReplay(watch_list=watch_list) as api:
        for n in range(5):
            await api.put(service(f"s{n}"))
        # The first watch of a server that refuses WatchList is only the refusal.
        first = [Fault()] if watch_list == "refused" else []
        api.fault("services", verb, *first, *faults)
        async with following(KubeSpec(api.url), timing) as registry:
            await registry.until(lambda: registry.service("s4") and registry.snapshot.synced)
            await api.delete(service("s0"))
            await api.put(service("s1", port=81))
            await api.put(service("late"))
            await registry.until(
                lambda: (
                    namespaces(registry.snapshot) == {"default": ["late", "s1", "s2", "s3", "s4"]}
                    and registry.service("s1").spec.ports[0].port == 81
                )
            )
            assert registry.snapshot.synced


LIST_FAULTS: dict[str, list[Fault]] = {
    "500": [Fault(500)] * 2,
    "429": [Fault(429, headers={"Retry-After": "0"})],
    "a list cut in the middle": [Fault(cut=True)] * 2,
    "a list that is HTML": [Fault(raw=b"<html>login</html>")],
    "a list that is a Status": [Fault(raw=b'{"kind":"Status","code":500}')],
    "a list without resourceVersion": [Fault(raw=b'{"metadata":{},"items":[]}')],
    "a list that hangs": [Fault(hang=True)],
}


@pytest.mark.parametrize("name", LIST_FAULTS)
async def test_the_list_comes_in_the_end_through(name: str) -> None:
    timing = Timing(first=0.01, most=0.03, settled=0.0, quiet=5.0, list=0.3)
    async with ApiReplay(watch_list="refused") as api:
        await api.put(service("web"))
        api.fault("services", "list", *LIST_FAULTS[name])
        async with following(KubeSpec(api.url), timing) as registry:
            await registry.until(lambda: registry.snapshot.synced)
            assert registry.service("web") and registry.failures


async def test_an_expired_page_starts_the_list_again() -> None:
    async with ApiReplay(watch_list="refused") as api:
        for n in range(700):
            await api.put(service(f"s{n}"))
        api.fault("services", "watch", Fault(), Fault(lost=True))
        # first whole list; then page 1, its second page expires, and so again; then whole
        api.fault("services", "list", Fault(), Fault(), Fault(410), Fault(), Fault(410))
        async with following(KubeSpec(api.url)) as registry:
            await registry.until(lambda: registry.replaced.count("Service") == 2)
            assert "limit" not in api.lists("services")[-1].params
            assert len(registry.snapshot.services["default"]) == 700


async def test_a_half_open_connection_is_noticed_by_its_silence() -> None:
    timing = Timing(first=0.01, most=0.03, settled=0.0, quiet=0.15, initial_quiet=0.15)
    async with ApiReplay(bookmarks=0.03) as api:
        await api.put(service("web"))
        async with following(KubeSpec(api.url, want_endpoints=False), timing) as registry:
            await registry.until(lambda: registry.snapshot.synced)
            api.silent = True
            await api.put(service("missed"))
            watches = len(api.watches("services"))
            await registry.until(lambda: len(api.watches("services")) > watches)
            assert api.watches("services")[-1].params["resourceVersion"].isdecimal()
            api.silent = False
            await registry.until(lambda: registry.service("missed"))
            # It went on from where it was; nothing was listed again.
            assert registry.replaced.count("Service") == 1 and not registry.failures


async def test_a_broken_object_is_skipped_said_once_and_the_rest_is_kept(
    caplog: pytest.LogCaptureFixture,
) -> None:
    metrics = Metrics()
    async with ApiReplay() as api:
        await api.put(service("good"))
        await api.put(service("turns-bad"))
        await api.put({**service("never-good"), "spec": {"ports": "80"}})
        async with following(KubeSpec(api.url), metrics=metrics) as registry:
            await registry.until(lambda: registry.snapshot.synced)
            assert namespaces(registry.snapshot) == {"default": ["good", "turns-bad"]}
            bad = service("turns-bad")
            await api.put({**bad, "spec": {**bad["spec"], "clusterIP": "10.96.0.999"}})
            await api.put(service("after"))
            await registry.until(lambda: registry.service("after"))
            # What was known of it stays, also through a new list.
            assert registry.service("turns-bad").spec.cluster_ip == "10.96.0.9"
            api.forget()
            await api.wake()
            await registry.until(lambda: registry.replaced.count("Service") == 2)
            assert registry.service("turns-bad").spec.cluster_ip == "10.96.0.9"
    said = [r.getMessage() for r in caplog.records]
    assert (
        said.count(
            "Service default/turns-bad: spec.clusterIP: '10.96.0.999' is not an IP address;"
            " skipped, the rest is kept"
        )
        == 1
    )
    assert any("default/never-good: spec.ports: Expected" in text for text in said)
    assert metrics.value("kdns_source_objects_skipped_total", "Service") == 4
    assert metrics.value("kdns_source_errors_total", "Service", "expired") == 1


async def test_an_api_server_that_vanishes_leaves_the_old_snapshot_and_is_found_again() -> None:
    api = ApiReplay()
    await api.put(service("web"))
    await api.start()
    port = api.port
    async with following(KubeSpec(api.url)) as registry:
        await registry.until(lambda: registry.snapshot.synced)
        await api.stop()
        await registry.until(lambda: len(registry.failures) > 4)
        assert registry.service("web") and registry.snapshot.synced
        assert str(registry.failures[-1]) == f"127.0.0.1:{port}: Connection refused"
        await api.put(service("meanwhile"))
        await api.start(port=port)
        await registry.until(lambda: registry.service("meanwhile"))
    await api.stop()


async def test_without_an_api_server_at_start_nothing_is_synced_and_the_pauses_grow() -> None:
    timing = Timing(first=0.01, most=0.08, settled=9.0)
    spec = KubeSpec("http://127.0.0.1:1", want_endpoints=False)
    async with following(spec, timing) as registry:
        await registry.until(lambda: len(registry.failures) >= 12)
        assert not registry.snapshot.synced
        assert all(isinstance(e, Unreachable) for e in registry.failures)
        assert 0.01 <= registry.retries[0] <= 0.02
        assert 0.04 <= registry.retries[-1] <= 0.08


# --- who we are ---------------------------------------------------------------------------


def write_kubeconfig(path: pathlib.Path, server: str, user: Json, **cluster: Any) -> str:
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [
            {"name": "good", "cluster": {"server": server, **cluster}},
            {"name": "nowhere", "cluster": {"server": "http://127.0.0.1:1"}},
        ],
        "users": [{"name": "me", "user": user}],
        "contexts": [
            {"name": "here", "context": {"cluster": "good", "user": "me"}},
            {"name": "there", "context": {"cluster": "nowhere", "user": "me"}},
        ],
    }
    path.write_text(json.dumps(config))
    return str(path)


async def test_a_token_that_was_rotated_is_read_again_after_401(tmp_path: pathlib.Path) -> None:
    token = tmp_path / "token"
    token.write_text("old")
    async with ApiReplay(token="old") as api:
        await api.put(service("web"))
        config = write_kubeconfig(tmp_path / "config", api.url, {"tokenFile": str(token)})
        async with following(KubeSpec(kubeconfig=config)) as registry:
            await registry.until(lambda: registry.snapshot.synced)
            api.token = "new"
            api.forget()
            await api.wake()
            await registry.until(lambda: registry.failures)
            assert isinstance(registry.failures[0], Denied)
            assert "401" in str(registry.failures[0])
            token.write_text("new")
            await api.put(service("after"))
            await registry.until(lambda: registry.service("after"))
            assert api.asked[-1].authorization == "Bearer new"


async def test_an_exec_plugin_gives_the_token(tmp_path: pathlib.Path) -> None:
    plugin = tmp_path / "plugin"
    answer = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "kind": "ExecCredential",
        "status": {"token": "from-plugin", "expirationTimestamp": "2999-01-01T00:00:00Z"},
    }
    plugin.write_text(f"#!{sys.executable}\nprint({json.dumps(answer)!r})\n")
    plugin.chmod(plugin.stat().st_mode | stat.S_IXUSR)
    user = {"exec": {"apiVersion": answer["apiVersion"], "command": str(plugin)}}
    async with ApiReplay(token="from-plugin") as api:
        config = write_kubeconfig(tmp_path / "config", api.url, user)
        async with following(KubeSpec(kubeconfig=config)) as registry:
            await registry.until(lambda: registry.snapshot.synced)


@pytest.mark.parametrize(
    ("user", "context", "says"),
    [
        ({"exec": {"apiVersion": "v1", "command": "/no/such/plugin"}}, "", "'/no/such/plugin'"),
        ({}, "missing", "missing"),
        ({}, "there", "127.0.0.1:1"),
        ({"tokenFile": "/no/such/token"}, "", "/no/such/token"),
    ],
    ids=["exec plugin missing", "no such context", "a context that is down", "no token file"],
)
async def test_a_kubeconfig_that_does_not_work_is_said(
    tmp_path: pathlib.Path, user: Json, context: str, says: str
) -> None:
    config = write_kubeconfig(tmp_path / "config", "http://127.0.0.1:1", user)
    async with following(KubeSpec(kubeconfig=config, context=context)) as registry:
        await registry.until(lambda: registry.failures)
        assert says in str(registry.failures[0])


async def test_a_kubeconfig_that_comes_later_is_picked_up(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "config"
    async with ApiReplay() as api, following(KubeSpec(kubeconfig=str(path))) as registry:
        await registry.until(lambda: registry.failures)
        assert f"kubeconfig {path} does not exist" in str(registry.failures[0])
        write_kubeconfig(path, api.url, {"token": "t"})
        await registry.until(lambda: registry.snapshot.synced)


@pytest.mark.parametrize("how", ["endpoint", "kubeconfig"])
async def test_tls_with_a_client_certificate(tmp_path: pathlib.Path, how: str) -> None:
    ca = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("127.0.0.1").configure_cert(server)
    ca.configure_trust(server)
    server.verify_mode = ssl.CERT_REQUIRED
    mine = ca.issue_cert("kdns.example")
    certificate, key, authority = (str(tmp_path / n) for n in ("cert", "key", "ca"))
    mine.cert_chain_pems[0].write_to_path(certificate)
    mine.private_key_pem.write_to_path(key)
    ca.cert_pem.write_to_path(authority)
    api = ApiReplay()
    await api.start(tls=server)
    url = f"https://127.0.0.1:{api.port}"
    if how == "endpoint":
        spec = KubeSpec(url, tls=(certificate, key, authority))
    else:
        user = {"client-certificate": certificate, "client-key": key}
        path = tmp_path / "config"
        options = {"certificate-authority": authority}
        spec = KubeSpec(kubeconfig=write_kubeconfig(path, url, user, **options))
    async with following(spec) as registry:
        await registry.until(lambda: registry.snapshot.synced)
    # Another CA: said, not trusted.
    trustme.CA().cert_pem.write_to_path(authority)
    async with following(spec) as registry:
        await registry.until(lambda: registry.failures)
        assert "certificate verify failed" in str(registry.failures[0])
    await api.stop()


async def test_in_a_cluster_the_service_account_is_used(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kubernetes.aio.config import incluster_config

    ca = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("127.0.0.1").configure_cert(server)
    ca.cert_pem.write_to_path(str(tmp_path / "ca.crt"))
    (tmp_path / "token").write_text("account\n")
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
    # An outside proxy must not get the cluster's own traffic.
    monkeypatch.setenv("HTTPS_PROXY", "http://192.0.2.1:3128")
    api = ApiReplay(token="account")
    await api.start(tls=server)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(api.port))
    async with following(KubeSpec()) as registry:
        await registry.until(lambda: registry.snapshot.synced)
    await api.stop()


async def test_outside_a_cluster_it_is_said_what_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    async with following(KubeSpec()) as registry:
        await registry.until(lambda: registry.failures)
        assert "'kubeconfig FILE' or 'endpoint URL'" in str(registry.failures[0])


PROXY = {"HTTPS_PROXY": "proxy:3128", "no_proxy": "10.0.0.0/8,.corp,example.com, 192.0.2.7"}


@pytest.mark.parametrize(
    ("url", "environ", "proxy"),
    [
        ("https://api.example.org:6443", PROXY, "http://proxy:3128"),
        ("https://10.1.2.3", PROXY, None),
        ("https://192.0.2.7", PROXY, None),
        ("https://192.0.2.8", PROXY, "http://proxy:3128"),
        ("https://k8s.corp", PROXY, None),
        ("https://a.example.com", PROXY, None),
        ("https://127.0.0.1:6443", PROXY, None),
        ("https://localhost:6443", PROXY, None),
        ("http://api.example.org", PROXY, None),
        ("https://api.example.org", {**PROXY, "no_proxy": "*"}, None),
        ("https://api.example.org", {}, None),
    ],
)
async def test_a_proxy_of_the_environment_is_used_as_kubectl_does(
    url: str, environ: dict[str, str], proxy: str | None
) -> None:
    assert environment_proxy(url, environ) == proxy
