"""Metrics: plain numbers while serving, Prometheus families when scraped.

A Cell is one labelled number; adding to it costs an attribute access. Names and labels
are CoreDNS's (`coredns_*`, reference 3.1) so that dashboards carry over; our own are
`kdns_*`. Exposition is prometheus_client's work and happens only on a scrape.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import msgspec

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


class Samples(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A family at one moment, as it goes from process to process (server/workers.py).

    numbers    -- label values: value, of a counter or gauge
    histograms -- label values: how many in each bucket, and the sum
    """

    name: str
    help: str
    kind: str
    labels: tuple[str, ...]
    buckets: tuple[float, ...]
    numbers: dict[tuple[str, ...], float]
    histograms: dict[tuple[str, ...], tuple[list[int], float]]


class Metrics:
    """The metrics of one kdns instance; several may live in one process.

    `before_scrape` callbacks bring lazily kept numbers up to date (packet cache repeats).
    `gathered` makes of its own samples those that are shown: with other processes' put in.
    """

    def __init__(self) -> None:
        self.families: dict[str, Family] = {}
        self.before_scrape: list[Callable[[], None]] = []
        self.gathered: Callable[[list[Samples]], list[Samples]] = lambda own: own

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

    def samples(self) -> list[Samples]:
        """Return all there is, at this moment."""
        self.settle()
        return [_samples(family) for family in list(self.families.values())]

    def collect(self) -> Iterator[Metric]:
        """Yield prometheus_client families: the interface of a prometheus Collector."""
        from prometheus_client.metrics_core import (
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
        )

        for one in self.gathered(self.samples()):
            if one.kind == "histogram":
                histogram = HistogramMetricFamily(one.name, one.help, labels=one.labels)
                for values, (counts, sum_) in one.histograms.items():
                    totals = [*accumulate(counts)]
                    bounds = [*(format(bound, "g") for bound in one.buckets), "+Inf"]
                    histogram.add_metric(values, [*zip(bounds, totals, strict=True)], sum_)
                if one.histograms:
                    yield histogram
                continue
            make = CounterMetricFamily if one.kind == "counter" else GaugeMetricFamily
            metric = make(one.name, one.help, labels=one.labels)
            for values, value in one.numbers.items():
                metric.add_metric(values, value)
            if one.numbers:
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


def _samples(family: Family) -> Samples:
    numbers: dict[tuple[str, ...], float] = {}
    histograms: dict[tuple[str, ...], tuple[list[int], float]] = {}
    if family.read is not None:
        numbers = dict(family.read())
    else:
        for values, cell in family.cells.items():
            if isinstance(cell, HistogramCell):
                histograms[values] = [*cell.counts], cell.sum
            else:
                numbers[values] = cell.value
    return Samples(
        family.name, family.help, family.kind, family.label_names, family.buckets,
        numbers, histograms,
    )  # fmt: skip
