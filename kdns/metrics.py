"""Metrics: plain numbers while serving, Prometheus families when scraped.

A Cell is one labelled number; adding to it costs an attribute access. Names and labels
are CoreDNS's (`coredns_*`, reference 3.1) so that dashboards carry over; our own are
`kdns_*`. Exposition is prometheus_client's work and happens only on a scrape.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

# What CoreDNS answers; prometheus_client's newest name for the same text is 1.0.0.
PLAIN_TEXT = "text/plain; version=0.0.4; charset=utf-8"


class Cell:
    """One sample of a counter or gauge."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0

    def add(self, value: float = 1, times: int = 1) -> None:
        """Add `value`, `times` times."""
        self.value += value * times

    def set(self, value: float) -> None:
        """For a gauge: replace the value."""
        self.value = value


class HistogramCell(Cell):
    """One labelled histogram."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float = 1, times: int = 1) -> None:
        """Observe `value`, `times` times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times


class Family:
    """All samples of one metric name."""

    def __init__(
        self,
        name: str,
        help: str,
        kind: str,
        labels: tuple[str, ...],
        buckets: Sequence[float],
    ) -> None:
        self.name, self.help, self.kind, self.label_names = name, help, kind, labels
        self.buckets = tuple(buckets)
        self.cells: dict[tuple[str, ...], Cell] = {}
        self.read: Callable[[], Iterable[tuple[tuple[str, ...], float]]] | None = None

    def labels(self, *values: str) -> Cell:
        """Return the cell of these label values, made at first use."""
        cell = self.cells.get(values)
        if cell is None:
            if len(values) != len(self.label_names):
                raise ValueError(f"{self.name} takes labels {self.label_names}, got {values}")
            cell = HistogramCell(self.buckets) if self.kind == "histogram" else Cell()
            self.cells[values] = cell
        return cell


class Metrics:
    """The metrics of one kdns instance; several may live in one process.

    `before_scrape` callbacks bring lazily kept numbers up to date (packet cache repeats).
    """

    def __init__(self) -> None:
        self.families: dict[str, Family] = {}
        self.before_scrape: list[Callable[[], None]] = []

    def _family(
        self, kind: str, name: str, help: str, labels: tuple[str, ...], buckets: Sequence[float]
    ) -> Family:
        family = self.families.get(name)
        if family is None:
            family = self.families[name] = Family(name, help, kind, labels, buckets)
        return family

    def counter(self, name: str, help: str, labels: tuple[str, ...] = ()) -> Family:
        """Return the counter family `name` (which ends in _total), made at first use."""
        return self._family("counter", name, help, labels, ())

    def gauge(self, name: str, help: str, labels: tuple[str, ...] = ()) -> Family:
        """Return the gauge family `name`; set `.read` to compute samples on scrape."""
        return self._family("gauge", name, help, labels, ())

    def histogram(
        self, name: str, help: str, labels: tuple[str, ...], buckets: Sequence[float]
    ) -> Family:
        """Return the histogram family `name` with upper bounds `buckets` (no +Inf)."""
        return self._family("histogram", name, help, labels, buckets)

    def value(self, name: str, *labels: str) -> float:
        """Return one counter's or gauge's value; 0.0 if nothing was counted (for tests)."""
        self.settle()
        family = self.families.get(name)
        if family is None:
            return 0.0
        if family.read is not None:
            return dict(family.read()).get(labels, 0.0)
        cell = family.cells.get(labels)
        return cell.value if cell is not None else 0.0

    def settle(self) -> None:
        """Bring lazily kept numbers up to date."""
        for callback in self.before_scrape:
            callback()

    def collect(self) -> Iterator[Metric]:
        """Yield prometheus_client families: the interface of a prometheus Collector."""
        from prometheus_client.metrics_core import (
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
        )

        self.settle()
        for family in list(self.families.values()):
            if family.kind == "histogram":
                histogram = HistogramMetricFamily(
                    family.name, family.help, labels=family.label_names
                )
                for values, cell in family.cells.items():
                    assert isinstance(cell, HistogramCell)
                    total, buckets = 0, []
                    for bound, count in zip(cell.bounds, cell.counts, strict=False):
                        total += count
                        buckets.append((format(bound, "g"), total))
                    total += cell.counts[-1]
                    buckets.append(("+Inf", total))
                    histogram.add_metric(values, buckets, cell.sum)
                if family.cells:
                    yield histogram
                continue
            make = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
            metric = make(family.name, family.help, labels=family.label_names)
            samples = (
                family.read()
                if family.read is not None
                else [(values, cell.value) for values, cell in family.cells.items()]
            )
            empty = True
            for values, value in samples:
                metric.add_metric(values, value)
                empty = False
            if not empty:
                yield metric

    def render(self, openmetrics: bool = False) -> tuple[bytes, str]:
        """Return (exposition, content type), with process and python families added."""
        from prometheus_client import CollectorRegistry
        from prometheus_client.platform_collector import PlatformCollector
        from prometheus_client.process_collector import ProcessCollector

        registry = CollectorRegistry()
        registry.register(self)
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        if openmetrics:
            from prometheus_client.openmetrics import exposition

            return (
                exposition.generate_latest(registry),  # type: ignore[no-untyped-call]
                exposition.CONTENT_TYPE_LATEST,
            )
        from prometheus_client import generate_latest

        return generate_latest(registry), PLAIN_TEXT
