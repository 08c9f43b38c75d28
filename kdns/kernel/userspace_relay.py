"""What the TCP and the UDP side of the userspace mode share: whom to ask for an endpoint, and what
is counted."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal, TypeAlias

from kdns.metrics import Cell, Metrics
from kdns.registry.endpoints import Endpoint

# (client, endpoints that failed) -> the endpoint to connect to; None: there is none, or the
# client may not.
Choose: TypeAlias = Callable[[str, Collection[str]], Endpoint | None]
# May this client connect?
Admit: TypeAlias = Callable[[str], bool]


class RelayCounts:
    """What is counted, of all listeners of a family and protocol."""

    def __init__(self, metrics: Metrics, family: str, protocol: Literal["tcp", "udp"]) -> None:
        label = ("ip_family", "protocol")
        self.accepted: Cell = metrics.counter(
            "kdns_userspace_connections_total", "Connections and flows of clients.", label
        ).labels(family, protocol)
        self.open: Cell = metrics.gauge(
            "kdns_userspace_connections", "Connections and flows that are open.", label
        ).labels(family, protocol)
        self.retried: Cell = metrics.counter(
            "kdns_userspace_dial_failures_total",
            "Attempts to reach an endpoint that failed; the next one was tried.",
            label,
        ).labels(family, protocol)
        self.failed: Cell = metrics.counter(
            "kdns_userspace_connections_refused_total",
            "Clients that no endpoint was found for, or that may not connect.",
            label,
        ).labels(family, protocol)
