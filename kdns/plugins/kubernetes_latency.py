"""How long a change of endpoints takes until DNS shows it: the DNS programming latency SLI.

The EndpointSlice controller writes into an annotation when the change happened that made it
write the slice (kubernetes/community sig-scalability SLO "DNS programming latency"); kdns
counts the seconds from then until its zone shows the slice: where names wait for their rules
(registry/gate.py), until they have them. Names and labels are CoreDNS's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import datetime

from kdns.metrics import Metrics
from kdns.registry.decode import TRIGGER_TIME
from kdns.registry.objects import Key, Service
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
        self._seen: dict[Key, frozenset[str]] = {}
        self._started = False

    def observe(
        self,
        snapshot: Snapshot,
        changes: Changes,
        gate_state: Callable[[Key], str] = lambda key: "",
    ) -> None:
        """Count what a published snapshot brought. The first synced one is only noted: when
        its changes happened says nothing of how fast they came here.

        gate_state -- "waiting" for a Service that is not shown yet as it is: when it is, it is
                      among the changes once more
        """
        now = self._wall()
        for key in changes.services:
            if gate_state(key) == "waiting":
                continue
            slices = snapshot.slices.get(key[0], {}).get(key[1], ())
            notes = (one.metadata.annotations or {} for one in slices)
            times = frozenset(n[TRIGGER_TIME] for n in notes if TRIGGER_TIME in n)
            fresh = times - self._seen.pop(key, frozenset())
            if times:
                self._seen[key] = times
            service = snapshot.services.get(key[0], {}).get(key[1])
            kind = "" if service is None else service_kind(service)
            if not (kind and fresh and self._started):
                continue
            cell = self._seconds.labels(kind)
            for text in fresh:
                # Anybody may write an annotation: what is no time is passed over.
                with contextlib.suppress(ValueError):
                    moment = datetime.fromisoformat(text).timestamp()
                    cell.add(max(0.0, now - moment))
        self._started = self._started or snapshot.synced


def service_kind(service: Service) -> str:
    """Return CoreDNS's label for a Service; empty for one that has no endpoints to show."""
    spec = service.spec
    if spec.type == "ExternalName":
        return ""
    if (spec.cluster_ips or [spec.cluster_ip])[0] != "None":
        return "cluster_ip"
    return "headless_with_selector" if spec.selector else "headless_without_selector"
