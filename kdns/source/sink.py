"""What a source tells the rest of the program, and what every source counts.

A source reports to one Sink (pipeline.py is the one that serves): objects as they come, that
it was heard of, and failures, which the sink says to the operator. Objects that cannot be
used are said here, once each.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from typing import Any, Protocol

from kdns.errors import ObjectError, SourceError
from kdns.metrics import Metrics
from kdns.registry.objects import Key, Kind

log = logging.getLogger("kdns.plugin/kubernetes")

MAX_SAID = 1000  # objects complained of by name; more of them are only counted


class Sink(Protocol):
    """Whom a source reports to. All calls come from the event loop's thread."""

    def replace(self, kind: Kind, objects: Iterable[Any], keep: Collection[Key] = ()) -> None:
        """Take a full list; objects in `keep` are there but broken: hold what is known."""

    def apply(self, kind: Kind, event: str, obj: Any) -> None:
        """Take one watch event: ADDED, MODIFIED or DELETED."""

    def mark_synced(self, kind: Kind) -> None:
        """All objects of a kind have been listed once."""

    def heard(self, what: str) -> None:
        """What is known of `what`, a Kind or "manifests", is up to date at this moment."""

    def failed(self, what: str, error: SourceError, retry_in: float) -> None:
        """`what` could not be reached or read; the next try is in `retry_in` seconds."""


class Tally:
    """Counts a source's failures and broken objects, and says the latter once each."""

    def __init__(self, metrics: Metrics) -> None:
        self._errors = metrics.counter(
            "kdns_source_errors_total",
            "Failures to list or watch, by kind of object and reason.",
            ("kind", "reason"),
        )
        self._skipped = metrics.counter(
            "kdns_source_objects_skipped_total",
            "Objects that could not be used and were skipped.",
            ("kind",),
        )
        self._said: set[str] = set()

    def failed(self, kind: str, reason: str) -> None:
        self._errors.labels(kind, reason).add()

    def skipped(self, error: ObjectError, where: str = "") -> None:
        """Note an object that cannot be used. where -- "FILE:LINE", if it came from one."""
        self._skipped.labels(error.kind).add()
        text = f"{where}: {error}" if where else str(error)
        if text not in self._said and len(self._said) < MAX_SAID:
            self._said.add(text)
            log.warning("%s; skipped, the rest is kept", text)
