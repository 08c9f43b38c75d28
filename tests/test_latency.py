"""How long a change takes until DNS shows it, by kind of Service, also where a gate holds it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from objects import endpoint, external, service, slice_of, snapshot
from support import directives, make_setup
from test_gate import WEB, Site

from kdns.metrics import HistogramCell, Metrics
from kdns.plugins.kubernetes import Kubernetes, setup
from kdns.registry.decode import TRIGGER_TIME
from kdns.registry.objects import EndpointSlice, Service
from kdns.registry.snapshot import Snapshot, everything

START = datetime(2025, 11, 21, 8, 0, 0, tzinfo=UTC).timestamp()


def seconds(metrics: Metrics) -> dict[str, list[float]]:
    """Return [how many, all seconds] by kind of Service."""
    family = metrics.families["coredns_kubernetes_dns_programming_duration_seconds"]
    found = {}
    for (kind,), cell in family.cells.items():
        assert isinstance(cell, HistogramCell)
        found[kind] = [sum(cell.counts), round(cell.sum, 6)]
    return found


def plugin_at(clock: list[float]) -> tuple[Kubernetes, Metrics]:
    cx = make_setup()
    cx.wall = lambda: clock[0]
    (plugin,) = setup(directives("kubernetes cluster.local"), cx)
    assert isinstance(plugin, Kubernetes)
    return plugin, cx.metrics


def triggered(one: EndpointSlice, moment: float) -> EndpointSlice:
    text = datetime.fromtimestamp(moment, UTC).isoformat().replace("+00:00", "Z")
    meta = msgspec.structs.replace(one.metadata, annotations={TRIGGER_TIME: text})
    return msgspec.structs.replace(one, metadata=meta)


@pytest.mark.parametrize(
    ("one", "kind"),
    [
        (service("web", selector={"app": "web"}), "cluster_ip"),
        (service("web"), "cluster_ip"),
        (service("web", ip=["fd00::5", "10.96.0.5"], selector={"app": "web"}), "cluster_ip"),
        (service("web", type="NodePort", selector={"app": "web"}), "cluster_ip"),
        (service("web", type="LoadBalancer", selector={"app": "web"}), "cluster_ip"),
        (service("web", ip="None", selector={"app": "web"}), "headless_with_selector"),
        (service("web", ip="None"), "headless_without_selector"),
        (external("web", "example.com"), None),
    ],
)
def test_each_kind_of_service_is_counted_under_coredns_label(
    one: Service, kind: str | None
) -> None:
    clock = [START]
    plugin, metrics = plugin_at(clock)

    def publish(*objects: Any) -> Snapshot:
        found = snapshot(*objects)
        plugin.publish(found, everything(found), 0.0)
        return found

    publish(one)
    publish(one, triggered(slice_of("web", endpoint("10.244.1.5")), START - 0.25))
    assert seconds(metrics) == ({kind: [1, 0.25]} if kind else {})


class Gated(Site):
    """A registry and a gate, with the plugin that makes answers of what the gate shows."""

    def __init__(self, **options: Any) -> None:
        self.clock = [START]
        self.plugin, self.counted = plugin_at(self.clock)
        super().__init__(**options)
        self.plugin.gate_state = self.gate.state

    def show(self, shown: Any) -> None:
        super().show(shown)
        if shown is not None:
            after, changes = shown
            self.plugin.publish(after, changes, self.now)


def test_behind_a_gate_it_is_counted_when_dns_really_shows_it() -> None:
    site = Gated()
    site.put(service("web", selector={"app": "web"}))
    site.written()
    before = slice_of("web", endpoint("10.244.1.5"))
    site.put(before)
    site.written()
    changed_at = START - 0.1
    site.put(triggered(slice_of("web", endpoint("10.244.1.5"), endpoint("10.244.1.6")), changed_at))
    assert site.gate.state(WEB) == "waiting"
    assert seconds(site.counted) == {}, "its rules are not in the kernel yet"
    site.clock[0] = START + 0.4
    site.written()
    assert site.gate.state(WEB) == ""
    assert seconds(site.counted) == {"cluster_ip": [1, 0.5]}
    site.written()
    assert seconds(site.counted) == {"cluster_ip": [1, 0.5]}


def test_a_gate_that_opens_counts_from_the_change_to_the_opening() -> None:
    site = Gated(timeout=2.0)
    site.put(service("web", selector={"app": "web"}))
    site.written()
    site.put(triggered(slice_of("web", endpoint("10.244.1.5")), START))
    site.clock[0] = START + 2.0
    site.now += 2.0
    opened = site.gate.expire(site.now, int(site.now))
    assert opened is not None
    site.show(opened.shown)
    assert seconds(site.counted) == {"cluster_ip": [1, 2.0]}


def test_a_headless_service_waits_for_no_rules() -> None:
    site = Gated()
    site.put(service("db", ip="None", selector={"app": "db"}))
    site.put(triggered(slice_of("db", endpoint("10.244.1.5")), START - 0.05))
    assert seconds(site.counted) == {"headless_with_selector": [1, 0.05]}
