"""What the node says of itself: healthy or not, and how many endpoints a Service has here.

Decides statuses and bodies (reference 3.2), from times and counts that it is given. Listening
and answering is kernel/healthcheck.py's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, NamedTuple, Protocol

from kdns.proxy.config import ProxyConfig
from kdns.proxy.options import Family
from kdns.proxy.table import Forwarding, ForwardingTable
from kdns.registry.objects import Key, Node

# The cluster autoscaler's mark on a Node that it is about to delete: load balancers must stop
# sending before the Node goes.
DELETION_TAINT = "ToBeDeletedByClusterAutoscaler"
# A change that waits longer than this many sync periods makes the node unhealthy.
PERIODS = 2
FAMILY_NAMES: Final[Mapping[Family, str]] = {4: "IPv4", 6: "IPv6"}
JSON = "application/json"
WEIGHT_HEADER = "X-Load-Balancing-Endpoint-Weight"
_NEVER = "0001-01-01T00:00:00Z"  # as Go writes a time that is not set


class Answer(NamedTuple):
    """One HTTP response."""

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """A Service's health-check node port. count -- its ready endpoints on this node"""

    namespace: str
    name: str
    count: int


class Times(Protocol):
    """What one family's sync loop knows, in Unix seconds.

    last_synced   -- when the kernel last took all there was; None: never
    waiting_since -- of the oldest change that the kernel does not hold; None: it holds all
    """

    @property
    def last_synced(self) -> float | None: ...

    @property
    def waiting_since(self) -> float | None: ...


class NodeHealth:
    """Says whether the node's rules keep up, and whether the Node is about to go.

    timeout -- seconds a change may wait
    times   -- by family; may be filled later: as long as a family has none, nothing waits
    notes   -- what an operator should know, such as two iptables variants in use; shown, but
               no reason to be unhealthy
    """

    def __init__(
        self, timeout: float, times: Mapping[Family, Times | None], notes: Sequence[str] = ()
    ) -> None:
        self.timeout = timeout
        self.times = times
        self.notes = notes
        self._eligible = True

    @classmethod
    def of(
        cls,
        config: ProxyConfig,
        times: Mapping[Family, Times | None],
        notes: Sequence[str] = (),
    ) -> NodeHealth:
        """Return a health with kube-proxy's patience: two sync periods."""
        return cls(PERIODS * config.sync_period, times, notes)

    def sync_node(self, node: Node | None) -> None:
        """Take over this node's Node. None, there is no such Node (yet), changes nothing."""
        if node is not None:
            self._eligible = is_eligible(node)

    @property
    def eligible(self) -> bool:
        """The Node is not about to be deleted."""
        return self._eligible

    def healthy(self, now: float, family: Family | None = None) -> bool:
        """Return True unless a change waits too long; whatever becomes of the Node."""
        asked = self.times.values() if family is None else (self.times[family],)
        oldest = [one.waiting_since for one in asked if one is not None]
        return all(since is None or now - since < self.timeout for since in oldest)

    def healthz(self, now: float) -> Answer:
        """Answer /healthz: may load balancers send to this node?"""
        well = self.healthy(now) and self._eligible
        return self._answer(now, well, {"nodeEligible": self._eligible})

    def livez(self, now: float) -> Answer:
        """Answer /livez: does the proxy work? A Node about to go is no reason to restart it."""
        return self._answer(now, self.healthy(now), {})

    def _answer(self, now: float, well: bool, more: Mapping[str, object]) -> Answer:
        synced = {
            family: None if one is None else one.last_synced for family, one in self.times.items()
        }
        updated = [when for when in synced.values() if when is not None]
        body: dict[str, object] = {
            # While well it is now: readers of old take this for a sign of life.
            "lastUpdated": _time(now if well else max(updated, default=None)),
            "currentTime": _time(now),
            **more,
            "healthy": self.healthy(now),
            "status": {
                FAMILY_NAMES[family]: {
                    "lastUpdated": _time(when),
                    "healthy": self.healthy(now, family),
                }
                for family, when in synced.items()
            },
        }
        if self.notes:
            body["notes"] = list(self.notes)
        return _json(200 if well else 503, body)


def is_eligible(node: Node) -> bool:
    """Return False for a Node that is being deleted, or will be by the autoscaler."""
    if node.metadata.deletion_timestamp is not None:
        return False
    return all(taint.key != DELETION_TAINT for taint in node.spec.taints or ())


def service_health(check: HealthCheck, proxy_healthy: bool) -> Answer:
    """Answer on a Service's health-check node port: does this node have endpoints of it?"""
    body = {
        "service": {"namespace": check.namespace, "name": check.name},
        "localEndpoints": check.count,
        "serviceProxyHealthy": proxy_healthy,
    }
    answer = _json(200 if check.count and proxy_healthy else 503, body)
    answer.headers[WEIGHT_HEADER] = str(check.count)
    return answer


def health_check_ports(tables: Sequence[ForwardingTable]) -> dict[int, HealthCheck]:
    """Return port -> check for all tables, one a family.

    Counted are distinct addresses of ready endpoints on this node, whichever the port, as
    upstream; an endpoint of two families is one, so the family with more of them counts. The
    terminating do not count: traffic still flows to them while no new one is asked for. Of two
    Services that claim one port, the first by name gets it.
    """
    out: dict[int, HealthCheck] = {}
    for table in tables:
        for key, forwardings in table.services.items():
            port = next((f.health_check_node_port for f in forwardings
                         if f.health_check_node_port), 0)  # fmt: skip
            if not port:
                continue
            check = HealthCheck(*key, _ready_here(forwardings))
            known = out.get(port)
            if known is None or _rank(check) < _rank(known):
                out[port] = check
    return out


def _rank(check: HealthCheck) -> tuple[Key, int]:
    return (check.namespace, check.name), -check.count


def _ready_here(forwardings: Iterable[Forwarding]) -> int:
    return len(
        {
            endpoint.ip
            for forwarding in forwardings
            for endpoint in forwarding.local
            if endpoint.ready  # where none is, the terminating stand in
        }
    )


def _json(status: int, body: Mapping[str, object]) -> Answer:
    text = json.dumps(body, separators=(",", ":"))
    headers = {"Content-Type": JSON, "X-Content-Type-Options": "nosniff"}
    return Answer(status, headers, text.encode())


def _time(seconds: float | None) -> str:
    if seconds is None:
        return _NEVER
    return (
        datetime.fromtimestamp(seconds, UTC)
        .isoformat(timespec="microseconds")
        .replace("+00:00", "Z")
    )
