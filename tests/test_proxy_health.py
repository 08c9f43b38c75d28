"""What a node says of itself over HTTP: its health, its metrics, and its Services' endpoints."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
from aiohttp import ClientConnectionError, ClientSession
from prometheus_client.parser import text_string_to_metric_families
from running import free_port

from kdns.errors import ConfigError
from kdns.kernel.healthcheck import NodeHttp, ServiceHealthServers
from kdns.metrics import Metrics
from kdns.proxy.config import ProxyConfig, render_config
from kdns.proxy.health import (
    HealthCheck,
    NodeHealth,
    health_check_ports,
    is_eligible,
    service_health,
)
from kdns.proxy.options import Family
from kdns.proxy.table import Forwarding, ForwardingTable
from kdns.registry.endpoints import Endpoint
from kdns.registry.objects import Meta, Node, NodeSpec, Taint

NOW = 1_800_000_000.5
TIME = "2027-01-15T08:00:00.500000Z"
LOOPBACK = ["127.0.0.1"]


class Told:
    """What a sync loop would tell of itself."""

    def __init__(self) -> None:
        self.last_synced: float | None = None
        self.waiting_since: float | None = None

    def queued(self, now: float) -> None:
        self.waiting_since = now if self.waiting_since is None else self.waiting_since

    def updated(self, now: float) -> None:
        self.last_synced, self.waiting_since = now, None


def health_of(timeout: float = 60) -> tuple[NodeHealth, dict[Family, Told]]:
    told: dict[Family, Told] = {4: Told(), 6: Told()}
    return NodeHealth(timeout, told), told


class Got(NamedTuple):
    status: int
    headers: Any
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)


async def get(port: int, path: str = "/", **how: Any) -> Got:
    async with (
        ClientSession() as session,
        session.get(f"http://127.0.0.1:{port}{path}", **how) as response,
    ):
        return Got(response.status, response.headers, await response.text())


@contextmanager
def taken() -> Iterator[tuple[int, socket.socket]]:
    """Yield a port of 127.0.0.1 that somebody else listens on."""
    with socket.socket() as sock:
        port = free_port()
        sock.bind(("127.0.0.1", port))
        sock.listen()
        yield port, sock


# --- the proxy's health -------------------------------------------------------------------


def test_a_healthy_node() -> None:
    health, told = health_of()
    told[4].updated(NOW - 100)
    answer = health.healthz(NOW)
    assert answer.status == 200
    assert json.loads(answer.body) == {
        "lastUpdated": TIME,  # well: as of now
        "currentTime": TIME,
        "nodeEligible": True,
        "healthy": True,
        "status": {
            "IPv4": {"lastUpdated": "2027-01-15T07:58:20.500000Z", "healthy": True},
            "IPv6": {"lastUpdated": "0001-01-01T00:00:00Z", "healthy": True},
        },
    }
    assert answer.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize(
    ("events", "at", "healthy"),
    [
        ([], 0, True),  # starting
        ([], 10_000, True),  # nothing to do for hours
        ([("queued", 4, 0)], 59, True),
        ([("queued", 4, 0)], 60, False),
        ([("queued", 4, 0), ("queued", 4, 50)], 61, False),  # the oldest counts
        ([("queued", 4, 0), ("updated", 4, 30)], 1000, True),
        ([("queued", 4, 0), ("updated", 6, 30)], 61, False),  # one family is enough
        ([("queued", 4, 0), ("updated", 4, 1), ("queued", 4, 50)], 109, True),
        ([("queued", 4, 0), ("updated", 4, 1), ("queued", 4, 50)], 110, False),
        ([("queued", 6, 0), ("updated", 6, 90)], 91, True),  # it recovers
    ],
)
def test_a_change_that_waits_longer_than_two_sync_periods_is_ill_health(
    events: list[tuple[str, Family, float]], at: float, healthy: bool
) -> None:
    health, told = health_of()
    for what, family, seconds in events:
        getattr(told[family], what)(NOW + seconds)
    assert health.healthy(NOW + at) is healthy
    for answer in (health.healthz(NOW + at), health.livez(NOW + at)):
        assert answer.status == (200 if healthy else 503)
        assert json.loads(answer.body)["healthy"] is healthy


def test_an_ill_family_is_named_and_the_last_success_is_told() -> None:
    health, told = health_of()
    told[4].updated(NOW - 300)
    told[6].updated(NOW - 200)
    told[4].queued(NOW - 100)
    body = json.loads(health.healthz(NOW).body)
    assert body["status"]["IPv4"]["healthy"] is False
    assert body["status"]["IPv6"]["healthy"] is True
    assert body["lastUpdated"] == "2027-01-15T07:56:40.500000Z"


@pytest.mark.parametrize(
    ("node", "eligible"),
    [
        (Node(Meta(name="n")), True),
        (Node(Meta(name="n"), NodeSpec(taints=[Taint("node.kubernetes.io/not-ready")])), True),
        (Node(Meta(name="n"), NodeSpec(taints=[Taint("ToBeDeletedByClusterAutoscaler")])), False),
        (Node(Meta(name="n", deletion_timestamp="2027-01-01T00:00:00Z")), False),
    ],
)
def test_a_node_about_to_go_gets_no_more_traffic_but_the_proxy_lives(
    node: Node, eligible: bool
) -> None:
    assert is_eligible(node) is eligible
    health, _ = health_of()
    health.sync_node(node)
    answer = health.healthz(NOW)
    assert answer.status == (200 if eligible else 503)
    assert json.loads(answer.body)["nodeEligible"] is eligible
    assert json.loads(answer.body)["healthy"] is True
    alive = health.livez(NOW)
    assert alive.status == 200
    assert "nodeEligible" not in json.loads(alive.body)
    health.sync_node(Node(Meta(name="n")))
    assert health.healthz(NOW).status == 200


def test_a_node_that_nobody_has_seen_is_eligible() -> None:
    health, _ = health_of()
    health.sync_node(None)
    assert health.eligible


def test_notes_are_shown_and_make_nobody_ill() -> None:
    health, _ = health_of()
    health.notes = ("rules of iptables-legacy and iptables-nft are in use together",)
    answer = health.healthz(NOW)
    assert answer.status == 200
    assert json.loads(answer.body)["notes"] == list(health.notes)


# --- health-check node ports --------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "healthy", "status"), [(2, True, 200), (0, True, 503), (2, False, 503)]
)
def test_a_services_answer(count: int, healthy: bool, status: int) -> None:
    answer = service_health(HealthCheck("ns", "web", count), healthy)
    assert answer.status == status
    assert answer.headers["X-Load-Balancing-Endpoint-Weight"] == str(count)
    assert json.loads(answer.body) == {
        "service": {"namespace": "ns", "name": "web"},
        "localEndpoints": count,
        "serviceProxyHealthy": healthy,
    }


def endpoint(ip: str, port: int = 80) -> Endpoint:
    return Endpoint(ip, port, local=True)


def table(*forwardings: Forwarding, family: Family = 4) -> ForwardingTable:
    services: dict[tuple[str, str], tuple[Forwarding, ...]] = {}
    for one in forwardings:
        services[one.key] = (*services.get(one.key, ()), one)
    return ForwardingTable(family, services=services)


def forwarding(
    name: str, port: int, *local: Endpoint, health_check_node_port: int = 30100
) -> Forwarding:
    return Forwarding(
        ("ns", name), f"ns/{name}:{port}", "tcp", "10.0.0.1", port,
        health_check_node_port=health_check_node_port, local=local,
    )  # fmt: skip


GOING = Endpoint("10.1.0.9", 80, local=True, ready=False, serving=True, terminating=True)


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        ([], {}),
        ([table(forwarding("web", 80, health_check_node_port=0))], {}),
        ([table(forwarding("web", 80))], {30100: HealthCheck("ns", "web", 0)}),
        # Two ports of a Service, the same Pods: each counts once.
        (
            [
                table(
                    forwarding("web", 80, endpoint("10.1.0.1"), endpoint("10.1.0.2")),
                    forwarding("web", 443, endpoint("10.1.0.1", 443)),
                )
            ],
            {30100: HealthCheck("ns", "web", 2)},
        ),
        # The terminating still get traffic, but no one should send more.
        ([table(forwarding("web", 80, GOING))], {30100: HealthCheck("ns", "web", 0)}),
        # A Pod with addresses of both families is one endpoint.
        (
            [
                table(forwarding("web", 80, endpoint("10.1.0.1"))),
                table(forwarding("web", 80, endpoint("fd00::1"), endpoint("fd00::2")), family=6),
            ],
            {30100: HealthCheck("ns", "web", 2)},
        ),
        # Two Services claim one port.
        (
            [table(forwarding("b", 80, endpoint("10.1.0.1")), forwarding("a", 80))],
            {30100: HealthCheck("ns", "a", 0)},
        ),
    ],
)
def test_which_ports_there_are_and_what_each_one_counts(
    tables: list[ForwardingTable], expected: dict[int, HealthCheck]
) -> None:
    assert health_check_ports(tables) == expected


@asynccontextmanager
async def serving(**how: Any) -> AsyncIterator[ServiceHealthServers]:
    servers = ServiceHealthServers(**{"healthy": lambda: True, "addresses": LOOPBACK, **how})
    try:
        yield servers
    finally:
        await servers.stop()


@pytest.mark.asyncio
async def test_ports_open_answer_any_path_and_close_as_services_change() -> None:
    first, second = free_port(), free_port()
    async with serving() as servers:
        await servers.update({first: HealthCheck("ns", "web", 1)})
        for path in ("/", "/healthz", "/any/path?x=1"):
            got = await get(first, path)
            assert (got.status, got.json["localEndpoints"]) == (200, 1)
            assert got.headers["X-Load-Balancing-Endpoint-Weight"] == "1"
            assert got.headers["Content-Type"] == "application/json"
        await servers.update(
            {first: HealthCheck("ns", "web", 0), second: HealthCheck("ns", "api", 5)}
        )
        assert servers.open_ports == tuple(sorted((first, second)))
        assert (await get(first)).status == 503
        assert (await get(second)).json["service"] == {"namespace": "ns", "name": "api"}
        await servers.update({second: HealthCheck("ns", "api", 5)})
        with pytest.raises(ClientConnectionError):
            await get(first)
        assert (await get(second)).status == 200
    with pytest.raises(ClientConnectionError):
        await get(second)


@pytest.mark.asyncio
async def test_a_port_is_handed_from_one_service_to_another() -> None:
    port = free_port()
    async with serving() as servers:
        await servers.update({port: HealthCheck("ns", "old", 1)})
        await servers.update({port: HealthCheck("ns", "new", 0)})
        assert (await get(port)).json["service"]["name"] == "new"


@pytest.mark.asyncio
async def test_an_ill_proxy_takes_its_services_with_it() -> None:
    port = free_port()
    health, told = health_of()
    async with serving(healthy=lambda: health.healthy(NOW)) as servers:
        await servers.update({port: HealthCheck("ns", "web", 3)})
        told[4].queued(NOW - 100)
        got = await get(port)
        assert (got.status, got.json["serviceProxyHealthy"]) == (503, False)
        # Load balancers take away the traffic by the Node, not by the Service.
        told[4].updated(NOW)
        health.sync_node(Node(Meta(deletion_timestamp="x")))
        assert (await get(port)).status == 200


@pytest.mark.asyncio
async def test_the_node_port_addresses_are_listened_on_and_no_others() -> None:
    port = free_port()
    async with serving(addresses=["127.0.0.2", "127.0.0.3"]) as servers:
        await servers.update({port: HealthCheck("ns", "web", 1)})
        with pytest.raises(ClientConnectionError):
            await get(port)
        async with ClientSession() as session:
            for host in ("127.0.0.2", "127.0.0.3"):
                async with session.get(f"http://{host}:{port}/") as response:
                    assert response.status == 200


@pytest.mark.asyncio
async def test_without_node_port_addresses_every_address_is_listened_on() -> None:
    port = free_port()
    async with serving(addresses=None) as servers:
        await servers.update({port: HealthCheck("ns", "web", 1)})
        assert (await get(port)).status == 200


@pytest.mark.asyncio
async def test_a_port_that_is_taken_is_told_once_and_tried_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    told: list[tuple[int, HealthCheck, str]] = []
    check = HealthCheck("ns", "web", 1)
    async with serving(failed=lambda *what: told.append(what)) as servers:
        with taken() as (port, _):
            await servers.update({port: check})
            await servers.update({port: replace(check, count=2)})
            assert servers.open_ports == ()
        assert told == [(port, check, "Address already in use (EADDRINUSE)")]
        assert [one.getMessage() for one in caplog.records if one.levelname == "ERROR"] == [
            f"Service ns/web: cannot listen on health-check node port {port}:"
            " Address already in use (EADDRINUSE)"
        ]
        await servers.update({port: check})
        assert (await get(port)).status == 200


@pytest.mark.asyncio
async def test_a_port_taken_on_one_address_is_opened_on_none() -> None:
    with taken() as (port, _):
        async with serving(addresses=["127.0.0.2", "127.0.0.1"]) as servers:
            await servers.update({port: HealthCheck("ns", "web", 1)})
            assert servers.open_ports == ()
            with socket.socket() as sock:
                sock.bind(("127.0.0.2", port))  # not held by a half-opened server


# --- the node's own listeners -------------------------------------------------------------


def config(healthz: int, metrics: int, **more: Any) -> ProxyConfig:
    return replace(
        ProxyConfig(),
        healthz_bind_address=f"127.0.0.1:{healthz}" if healthz else "",
        metrics_bind_address=f"127.0.0.1:{metrics}" if metrics else "",
        **more,
    )


@asynccontextmanager
async def node_http(
    said: ProxyConfig, health: NodeHealth | None = None, retry: float = 5
) -> AsyncIterator[tuple[NodeHttp, Metrics]]:
    metrics = Metrics()
    http = NodeHttp(said, metrics, health or health_of()[0], lambda: NOW, retry)
    await http.start()
    try:
        yield http, metrics
    finally:
        await http.stop()


@pytest.mark.asyncio
async def test_healthz_and_livez_of_the_node() -> None:
    port = free_port()
    health, _ = health_of()
    async with node_http(config(port, 0), health) as (_, metrics):
        assert (await get(port, "/healthz")).json["nodeEligible"] is True
        assert (await get(port, "/livez")).json["currentTime"] == TIME
        assert (await get(port, "/")).status == 404
        health.sync_node(Node(Meta(deletion_timestamp="x")))
        assert (await get(port, "/healthz")).status == 503
        assert (await get(port, "/livez")).status == 200
        assert metrics.value("kubeproxy_proxy_healthz_total", "200") == 1
        assert metrics.value("kubeproxy_proxy_healthz_total", "503") == 1
        assert metrics.value("kubeproxy_proxy_livez_total", "200") == 2


@pytest.mark.asyncio
async def test_metrics_mode_and_configuration() -> None:
    port = free_port()
    said = config(0, port, cluster_cidrs=("10.244.0.0/16",))
    health, told = health_of()
    async with node_http(said, health) as (_, metrics):
        metrics.counter("kubeproxy_x_total", "X.").labels().add(3)
        told[4].queued(NOW - 100)
        assert (await get(port, "/healthz")).text == "ok"
        assert (await get(port, "/proxyMode")).text == "iptables"
        assert (await get(port, "/configz")).json == {
            "kubeproxy.config.k8s.io": json.loads(json.dumps(render_config(said)))
        }
        got = await get(port, "/metrics")
        assert got.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert "kubeproxy_x_total 3.0" in got.text
        got = await get(port, "/metrics", headers={"Accept": "application/openmetrics-text"})
        assert got.text.endswith("# EOF\n")
        slis = {
            (sample.labels["name"], sample.labels["type"]): sample.value
            for family in text_string_to_metric_families((await get(port, "/metrics/slis")).text)
            for sample in family.samples
        }
        assert slis == {("ping", "healthz"): 1, ("proxy", "healthz"): 0, ("proxy", "livez"): 0}


@pytest.mark.parametrize("address", ["0.0.0.0", "[::]"])
@pytest.mark.asyncio
async def test_an_unspecified_address_is_every_address(address: str) -> None:
    """As in Go: kubelets and load balancers ask over either family."""
    port = free_port()
    said = replace(config(0, 0), healthz_bind_address=f"{address}:{port}")
    async with node_http(said):
        assert (await get(port, "/healthz")).status == 200


@pytest.mark.asyncio
async def test_a_taken_address_ends_the_start_where_that_is_asked_for() -> None:
    free = free_port()
    with taken() as (port, _):
        with pytest.raises(ConfigError) as caught:
            async with node_http(config(free, port, bind_address_hard_fail=True)):
                pass
        assert str(caught.value) == (
            f"bindAddressHardFail: cannot listen on 127.0.0.1:{port}:"
            " Address already in use (EADDRINUSE)"
        )
        with pytest.raises(ClientConnectionError):
            await get(free, "/healthz")


@pytest.mark.asyncio
async def test_a_taken_address_is_tried_again_in_the_background(
    caplog: pytest.LogCaptureFixture,
) -> None:
    free = free_port()
    with taken() as (port, held):
        async with node_http(config(free, port), retry=0.01) as (http, _):
            assert (await get(free, "/healthz")).status == 200
            assert f"cannot listen on 127.0.0.1:{port}" in caplog.text
            trying = asyncio.ensure_future(http.run())
            held.close()
            async with asyncio.timeout(10):
                await trying
            assert (await get(port, "/proxyMode")).text == "iptables"


@pytest.mark.asyncio
async def test_nothing_is_served_where_nothing_is_asked_for() -> None:
    async with node_http(config(0, 0)) as (http, _):
        assert (http.healthz, http.metrics) == (None, None)
        await http.run()  # has nothing to do


def test_the_node_is_ill_after_two_sync_periods() -> None:
    said = replace(ProxyConfig(), iptables=replace(ProxyConfig().iptables, sync_period=5.0))
    told = Told()
    health = NodeHealth.of(said, {4: told})
    told.queued(NOW)
    assert health.healthy(NOW + 9.9)
    assert not health.healthy(NOW + 10)
