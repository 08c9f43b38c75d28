"""How long a change of endpoints takes until DNS shows it: the DNS programming latency SLI.

The EndpointSlice controller writes into an annotation when the change happened that made it
write the slice (kubernetes/community sig-scalability SLO "DNS programming latency"); kdns
counts the seconds from then until its zone holds the slice. Names and labels are CoreDNS's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import datetime

from kdns.metrics import Metrics
from kdns.registry.decode import TRIGGER_TIME
from kdns.registry.snapshot import Changes, Snapshot

BUCKETS = tuple(0.001 * 2**n for n in range(20))


class ProgrammingLatency:
    """Observes each trigger time once. wall gives Unix seconds."""

    def __init__(self, metrics: Metrics, wall: Callable[[], float]) -> None:
        self._wall = wall
        self._seconds = metrics.histogram(
            "coredns_kubernetes_dns_programming_duration_seconds",
            "Seconds from a change of endpoints until DNS answers with it.",
            ("service_kind",),
            BUCKETS,
        )
        # Service key -> the trigger times its slices had
        self._seen: dict[tuple[str, str], frozenset[str]] = {}
        self._started = False

    def observe(self, snapshot: Snapshot, changes: Changes) -> None:
        """Count what a published snapshot brought. The first synced one is only noted: when
        its changes happened says nothing of how fast they came here."""
        now = self._wall()
        for key in changes.services:
            slices = snapshot.slices.get(key[0], {}).get(key[1], ())
            notes = (one.metadata.annotations or {} for one in slices)
            times = frozenset(n[TRIGGER_TIME] for n in notes if TRIGGER_TIME in n)
            fresh = times - self._seen.pop(key, frozenset())
            if times:
                self._seen[key] = times
            service = snapshot.services.get(key[0], {}).get(key[1])
            if service is None or not self._started:
                continue
            headless = (service.spec.cluster_ips or [service.spec.cluster_ip])[0] == "None"
            cell = self._seconds.labels("headless_with_selector" if headless else "cluster_ip")
            for text in fresh:
                # Anybody may write an annotation: what is no time is passed over.
                with contextlib.suppress(ValueError):
                    moment = datetime.fromisoformat(text).timestamp()
                    cell.add(max(0.0, now - moment))
        self._started = self._started or snapshot.synced
