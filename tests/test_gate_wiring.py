"""A server and its gate put together: which registry an agent gets, the start, reloads, bugs.

The kernel side is a function here; test_gate_traffic.py has a real one.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, ParamSpec

import pytest
from objects import endpoint, service, slice_of
from running import RunningKdns

import kdns
from kdns.app import App
from kdns.dns import types as t
from kdns.metrics import Metrics
from kdns.pipeline import Pipeline
from kdns.registry.gate import KernelChanges
from kdns.registry.objects import ENDPOINT_SLICE, NAMESPACE, SERVICE, Meta, Namespace
from kdns.registry.snapshot import Changes, Snapshot
from kdns.registry.spec import KubeSpec, ManifestSpec, Spec, joined

P = ParamSpec("P")


def in_loop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    @functools.wraps(test)
    def run(*arguments: P.args, **named: P.kwargs) -> None:
        asyncio.run(test(*arguments, **named))

    return run


AGENTS = KubeSpec(node="node1", only_forwarded=True)


class Kernel:
    """A kernel side that writes rules when it is told to."""

    def __init__(self, pipeline: Pipeline | None) -> None:
        assert pipeline is not None
        self.pipeline = pipeline
        self.revision = 0
        self.bug = False
        pipeline.attach(self.take, lambda: [{"service": "default/old", "seconds_left": 3.0}])

    def take(self, snapshot: Snapshot, changes: Changes, now: float) -> KernelChanges:
        if self.bug:
            raise ValueError("a bug")
        if not snapshot.synced:
            return {}
        self.revision = snapshot.revision
        return {4: changes.services}

    def write(self) -> None:
        self.pipeline.programmed(4, self.revision)

    def move(self, pipeline: Pipeline) -> None:
        self.pipeline.detach(self.take)
        pipeline.count_on(self.pipeline.registry.revision)
        self.pipeline = pipeline
        pipeline.attach(self.take)


class Running(RunningKdns):
    """A server whose source is the test."""

    def __init__(self, more: str = "", conf: Path | None = None, **options: Any) -> None:
        super().__init__()
        text = self.text(more)
        if conf is not None:
            conf.write_text(text)
        self.app = App(
            None if conf is None else str(conf), text=None if conf is not None else text,
            dns_port=0, guest=True, follow=self.feed, **{"forwarding": AGENTS, **options},
        )  # fmt: skip
        self.followed: list[Spec] = []

    async def __aenter__(self) -> Running:
        await super().__aenter__()
        return self

    @staticmethod
    def text(more: str = "") -> str:
        return (
            ".:0 {\n bind 127.0.0.1\n kubernetes cluster.local {\n  startup_timeout 60s\n"
            f"  {more}\n }}\n}}\n"
        )

    async def feed(self, spec: Spec, pipeline: Pipeline, metrics: Metrics) -> None:
        self.followed.append(spec)
        pipeline.replace(NAMESPACE, [Namespace(Meta(name="default"))])
        pipeline.replace(SERVICE, [service("web")])
        pipeline.replace(ENDPOINT_SLICE, [slice_of("web", endpoint("10.244.0.1"))])
        for kind in spec.kinds:
            pipeline.mark_synced(kind)
        await asyncio.Event().wait()

    @property
    def pipeline(self) -> Pipeline:
        found = self.app.registry_pipeline()
        assert found is not None
        return found

    def put(self, name: str, ip: str) -> None:
        self.pipeline.apply(SERVICE, "ADDED", service(name, ip=ip))
        self.pipeline.publish()

    async def says(self, name: str) -> str:
        reply = await self.ask(f"{name}.default.svc.cluster.local.")
        if not reply.answer:
            return t.rcode_name(reply.rcode)
        return ".".join(map(str, reply.answer[0].rdata))


@contextlib.asynccontextmanager
async def forwarding(conf: Path) -> AsyncIterator[tuple[Running, Kernel]]:
    """A server and its kernel side, whose first rules are written."""
    async with Running(conf=conf) as site:
        kernel = Kernel(site.pipeline)
        kernel.write()
        site.app.moved = kernel.move
        yield site, kernel


# --- which registry ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dns", "agents", "expected"),
    [
        (KubeSpec(), AGENTS, KubeSpec(node="node1", want_service_cidrs=True)),
        (KubeSpec(want_pods=True), AGENTS,
         KubeSpec(want_pods=True, node="node1", want_service_cidrs=True)),
        (KubeSpec(kubeconfig="/k"), KubeSpec(kubeconfig="/k", node="n"),
         KubeSpec(kubeconfig="/k", node="n", want_service_cidrs=True)),
        (ManifestSpec(("/a",)), ManifestSpec(("/a",)), ManifestSpec(("/a",))),
        (KubeSpec(label_selector="a=b"), AGENTS, "'labels' leaves out"),
        (KubeSpec(want_endpoints=False), AGENTS, "'noendpoints' leaves out"),
        (KubeSpec(endpoint="https://x"), AGENTS, "another API server"),
        (KubeSpec(kubeconfig="/k"), AGENTS, "another API server"),
        (ManifestSpec(("/a",)), AGENTS, "manifests"),
        (KubeSpec(), ManifestSpec(("/a",)), "manifests"),
    ],
)  # fmt: skip
def test_one_registry_is_enough_where_it_has_what_both_need(
    dns: Spec, agents: Spec, expected: Spec | str
) -> None:
    found = joined(dns, agents)
    if isinstance(expected, str):
        assert isinstance(found, str) and expected in found
    else:
        assert found == expected


@in_loop
async def test_the_node_is_watched_for_the_agent() -> None:
    async with Running() as site:
        assert site.followed == [KubeSpec(node="node1", want_service_cidrs=True)]
        assert site.pipeline.registry.synced


@in_loop
async def test_a_corefile_that_reads_less_is_served_without_a_gate_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "kdns"):
        async with Running("labels app=web") as site:
            assert site.app.registry_pipeline() is None
            assert site.app.gate_status() is None
            assert await site.says("web") == "10.96.0.50"
    assert "names do not wait for rules: 'labels' leaves out" in caplog.text


@in_loop
async def test_without_an_agent_there_is_no_gate() -> None:
    async with Running(forwarding=None) as site:
        assert site.app.registry_pipeline() is None
        assert site.followed == [KubeSpec()]


# --- in work ------------------------------------------------------------------------------------


@in_loop
async def test_names_wait_for_the_kernel_side_as_long_as_there_is_one() -> None:
    async with Running() as site:
        site.put("early", "10.96.0.51")
        assert await site.says("early") == "10.96.0.51"
        kernel = Kernel(site.pipeline)
        assert await site.says("early") == "10.96.0.51"  # what is shown stays
        kernel.write()
        site.put("next", "10.96.0.52")
        assert await site.says("next") == "NXDOMAIN"
        kernel.write()
        assert await site.says("next") == "10.96.0.52"
        site.put("third", "10.96.0.53")
        assert await site.says("third") == "NXDOMAIN"
        site.pipeline.detach(kernel.take)
        assert await site.says("third") == "10.96.0.53"
        site.put("fourth", "10.96.0.54")
        assert await site.says("fourth") == "10.96.0.54"


@in_loop
async def test_the_clock_opens_the_gate(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "kdns"):
        async with Running(gate_timeout=0.05) as site:
            kernel = Kernel(site.pipeline)
            kernel.write()
            site.put("next", "10.96.0.52")
            async with asyncio.timeout(10):
                await site.pipeline.settle()
            assert await site.says("next") == "10.96.0.52"
            assert site.app.metrics.value("kdns_gate_opened_total") == 1
            kernel.write()
    assert [r.getMessage() for r in caplog.records if "rules" in r.getMessage()] == [
        "plugin/kubernetes: the rules of IPv4 are not in the kernel after 0.05 s; names are"
        " published without: default/next",
        "plugin/kubernetes: rules are written again; names wait for theirs",
    ]


@in_loop
async def test_a_timeout_of_0_is_no_gate() -> None:
    async with Running(gate_timeout=0.0) as site:
        Kernel(site.pipeline)
        site.put("next", "10.96.0.52")
        assert await site.says("next") == "10.96.0.52"
        assert site.app.gate_status() is None


@in_loop
async def test_a_bug_in_the_kernel_side_does_not_stop_dns(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Running() as site:
        kernel = Kernel(site.pipeline)
        kernel.bug = True
        site.put("next", "10.96.0.52")
        assert await site.says("next") == "10.96.0.52"
    assert "please report it" in caplog.text


@in_loop
async def test_status_and_metrics() -> None:
    async with Running(gate_timeout=60.0) as site:
        kernel = Kernel(site.pipeline)
        kernel.write()
        first = site.pipeline.registry.revision
        site.put("next", "10.96.0.52")
        status = site.app.gate_status()
        assert status is not None
        assert status["draining"] == [{"service": "default/old", "seconds_left": 3.0}]
        assert [one["service"] for one in status["waiting"]] == ["default/next"]
        value = site.app.metrics.value
        assert {s: value("kdns_revision", s) for s in ("registry", "dns", "kernel_ipv4")} == {
            "registry": first + 1, "dns": first, "kernel_ipv4": first,
        }  # fmt: skip
        assert (value("kdns_gate_waiting"), value("kdns_draining")) == (1, 1)
        kernel.write()
        assert value("kdns_revision", "dns") == value("kdns_revision", "kernel_ipv4") == first + 1


# --- start and reload -----------------------------------------------------------------------------


@in_loop
async def test_at_the_start_dns_waits_for_the_first_rules() -> None:
    site = Running(gate_timeout=60.0, awaits_rules=True)

    async def agent() -> None:
        await site.app.wired.wait()
        kernel = Kernel(site.pipeline)
        while not kernel.revision:
            await asyncio.sleep(0)
        assert not site.app.listeners  # nobody is answered yet
        kernel.write()

    async with asyncio.TaskGroup() as group:
        group.create_task(agent())
        async with site:
            assert await site.says("web") == "10.96.0.50"


@in_loop
async def test_at_the_start_dns_does_not_wait_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    async with Running(gate_timeout=0.05, awaits_rules=True) as site:
        assert await site.says("web") == "10.96.0.50"
    assert "no rules were written in 0.05 s; names are published without" in caplog.text


@in_loop
async def test_a_reload_keeps_the_agents_registry(tmp_path: Path) -> None:
    conf = tmp_path / "Corefile"
    async with forwarding(conf) as (site, kernel):
        pipeline = site.pipeline
        conf.write_text(site.text("ttl 7"))
        assert await site.app.reload()
        assert site.app.registry_pipeline() is pipeline
        assert site.app.longest_ttl() == 7
        site.put("next", "10.96.0.52")
        assert await site.says("next") == "NXDOMAIN"
        kernel.write()
        assert await site.says("next") == "10.96.0.52"


@in_loop
async def test_a_reload_to_another_registry_leaves_the_agent_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    conf = tmp_path / "Corefile"
    async with forwarding(conf) as (site, kernel):
        conf.write_text(site.text("labels app=web"))
        assert await site.app.reload()
        assert "names do not wait for rules" in caplog.text
        assert site.pipeline.attached
        site.put("next", "10.96.0.52")  # goes on to be forwarded
        assert kernel.revision == site.pipeline.registry.revision
        assert await site.says("web") == "10.96.0.50"


@in_loop
async def test_a_reload_that_reads_more_takes_the_agent_along(tmp_path: Path) -> None:
    """Names go on to wait, at the new registry, for rules of its own revisions."""
    conf = tmp_path / "Corefile"
    async with forwarding(conf) as (site, kernel):
        before = site.pipeline
        for number in range(9):
            site.put(f"more-{number}", f"10.96.1.{number}")
        late = kernel.revision  # being written while the Corefile is reloaded
        conf.write_text(site.text("pods verified"))
        assert await site.app.reload()
        assert site.followed == [
            KubeSpec(want_pods=pods, node="node1", want_service_cidrs=True)
            for pods in (False, True)
        ]
        assert site.pipeline is kernel.pipeline is not before
        assert [one for one, _ in site.app.pipelines.values()] == [site.pipeline]
        assert not before.attached and site.pipeline.attached
        kernel.write()
        site.put("next", "10.96.0.52")
        kernel.pipeline.programmed(4, late)
        assert await site.says("next") == "NXDOMAIN"
        assert site.app.metrics.value("kdns_gate_waiting") == 1
        kernel.write()
        assert await site.says("next") == "10.96.0.52"


@in_loop
async def test_a_reload_that_fails_leaves_the_agent_where_it_is(tmp_path: Path) -> None:
    conf = tmp_path / "Corefile"
    async with forwarding(conf) as (site, kernel):
        before = site.pipeline
        with socket.create_server(("127.0.0.1", 0)) as taken:
            there = f"\nother.:{taken.getsockname()[1]} {{\n bind 127.0.0.1\n whoami\n}}\n"
            conf.write_text(site.text("pods verified") + there)
            assert not await site.app.reload()
        assert site.pipeline is kernel.pipeline is before
        assert len(site.app.pipelines) == 1
        site.put("next", "10.96.0.52")
        assert await site.says("next") == "NXDOMAIN"
        assert site.app.metrics.value("kdns_gate_waiting") == 1
        kernel.write()
        assert await site.says("next") == "10.96.0.52"
        conf.write_text(site.text("pods verified"))  # and can be taken along later
        assert await site.app.reload()
        assert site.pipeline is kernel.pipeline is not before


@in_loop
async def test_a_reload_back_to_what_an_agent_can_share(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    conf = tmp_path / "Corefile"
    async with Running("labels app=web", conf=conf) as site:
        assert site.app.registry_pipeline() is None
        moves: list[Pipeline] = []
        site.app.moved = moves.append
        caplog.clear()
        conf.write_text(site.text())
        assert await site.app.reload()
        assert moves == [site.pipeline]
        assert await site.says("web") == "10.96.0.50"  # at once: nobody is waited for yet
        assert "names do not wait" not in caplog.text
        conf.write_text(site.text("labels app=web"))
        assert await site.app.reload()
        assert moves == [site.pipeline]  # it stays there, and names do not wait
        assert "names do not wait for rules: 'labels' leaves out" in caplog.text
        conf.write_text(site.text("pods verified"))
        assert await site.app.reload()
        assert moves[1:] == [site.pipeline] and len(site.app.pipelines) == 1


# --- a cluster in the process ---------------------------------------------------------------------


@in_loop
async def test_settling_waits_for_the_gate() -> None:
    async with kdns.Cluster(gate_timeout=60.0) as cluster:
        assert cluster.app is not None
        kernel = Kernel(cluster.app.registry_pipeline())
        kernel.write()
        applied = asyncio.create_task(cluster.apply(
            {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
             "spec": {"clusterIP": "10.96.7.7", "ports": [{"port": 80}]}}
        ))  # fmt: skip
        while ("default", "web") not in {
            (ns, name) for ns, names in kernel.pipeline.registry.services.items() for name in names
        }:
            await asyncio.sleep(0)
        assert await cluster.resolve("web.default.svc.cluster.local.") == []
        kernel.write()
        await applied
        assert await cluster.resolve("web") == ["10.96.7.7"]


@in_loop
async def test_without_forwarding_what_is_acknowledged_is_in_dns() -> None:
    async with kdns.Cluster() as cluster:
        await cluster.apply(
            {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
             "spec": {"clusterIP": "10.96.7.7", "ports": [{"port": 80}],
                      "selector": {"app": "web"}}}, settle=False,
        )  # fmt: skip
        assert await cluster.resolve("web") == ["10.96.7.7"]
