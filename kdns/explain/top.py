"""What query events add up to: who asks what, what is wasted, who is slow.

Decides what is counted and what is advised; where events come from and how this is shown is
top_command.py's. Pure, and bounded however many different clients and names there are: each
table keeps the KEEP greatest of at most twice as many rows (Table), time is kept in slices.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

KEEP = 500  # rows of a table that survive when there is no room for more
SLICES = 6  # parts of the window that are forgotten one after the other
MAX_OPEN = 2000  # look-ups under way that are remembered
LOOKUP_TIME = 5.0  # seconds in which the candidates of one look-up come
MAX_NAMES = 32  # candidates of one look-up; resolv.conf takes 6, kubelet 32
# Milliseconds; each a quarter more than the one before: percentiles are right within 25 %.
BOUNDS = tuple(0.01 * 1.25**n for n in range(72))  # 0.01 ms to 76 s

NXDOMAIN, NOERROR = "NXDOMAIN", "NOERROR"
FAILURES = ("SERVFAIL", "REFUSED", "FORMERR", "NOTIMP", "DROPPED")

K = TypeVar("K")
R = TypeVar("R", bound="Row")
Event = Mapping[str, Any]


@dataclass(slots=True)
class Row:
    """What a table has of one key. weight -- by which the greatest are kept"""

    weight: float = 0

    def merge(self, other: Any) -> None:
        self.weight += other.weight


@dataclass(slots=True)
class Count(Row):
    """Questions, and how many of them were about names that are not there, or failed."""

    nxdomain: int = 0
    failed: int = 0

    def add(self, rcode: str) -> None:
        self.weight += 1
        self.nxdomain += rcode == NXDOMAIN
        self.failed += rcode in FAILURES

    def merge(self, other: Count) -> None:
        self.weight += other.weight
        self.nxdomain += other.nxdomain
        self.failed += other.failed


@dataclass(slots=True)
class Times(Row):
    """How long answers took."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    failed: int = 0
    longest: float = 0.0

    def add(self, milliseconds: float, failed: bool = False) -> None:
        self.weight += 1
        self.counts[bisect_left(BOUNDS, milliseconds)] += 1
        self.failed += failed
        self.longest = max(self.longest, milliseconds)

    def merge(self, other: Times) -> None:
        self.weight += other.weight
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        self.failed += other.failed
        self.longest = max(self.longest, other.longest)

    def at(self, share: float) -> float:
        """Return the milliseconds that this share of the answers took at most."""
        left = share * self.weight
        for bound, count in zip(BOUNDS, self.counts, strict=False):
            left -= count
            if left <= 0:
                return min(bound, self.longest)
        return self.longest


@dataclass(slots=True)
class Storm(Row):
    """The look-ups of one name by one client that went through the search list. weight is
    how many questions were wasted.

    firsts -- how often the first candidate was asked for, by type
    tried  -- candidates that were not there
    ended  -- the candidate that was, or ""
    """

    namespace: str = ""
    firsts: dict[str, int] = field(default_factory=dict)
    tried: dict[str, int] = field(default_factory=dict)
    ended: str = ""

    @property
    def lookups(self) -> int:
        """A and AAAA of one name are one look-up."""
        return max(self.firsts.values(), default=0)

    def merge(self, other: Storm) -> None:
        self.weight += other.weight
        self.namespace = self.namespace or other.namespace
        self.ended = other.ended or self.ended
        for mine, theirs in ((self.firsts, other.firsts), (self.tried, other.tried)):
            for key, count in theirs.items():
                if key in mine or len(mine) < MAX_NAMES:
                    mine[key] = mine.get(key, 0) + count


class Table(Generic[K, R]):
    """The rows of the greatest keys.

    Holds 2 * keep rows at most: then all but the greatest `keep` go. `floor` is the greatest
    weight that went: what a row that was away, and any key that is not there, may lack.
    """

    def __init__(self, make: Callable[[], R], keep: int = KEEP) -> None:
        self.rows: dict[K, R] = {}
        self.floor: float = 0
        self._make = make
        self._keep = keep

    def row(self, key: K) -> R:
        """Return the row of a key, made if there is none."""
        row = self.rows.get(key)
        if row is None:
            if len(self.rows) >= 2 * self._keep:
                self._shrink()
            row = self.rows[key] = self._make()
        return row

    def _shrink(self) -> None:
        ranked = sorted(self.rows.items(), key=lambda one: -one[1].weight)
        self.floor += ranked[self._keep][1].weight
        self.rows = dict(ranked[: self._keep])

    def merge(self, other: Table[K, R]) -> None:
        for key, row in other.rows.items():
            self.row(key).merge(row)
        self.floor += other.floor

    def greatest(self, count: int) -> list[tuple[K, R]]:
        return sorted(self.rows.items(), key=lambda one: -one[1].weight)[:count]


class Slice:
    """The events of a part of the window."""

    def __init__(self, began: float) -> None:
        self.began = began
        self.total = Count()
        self.lost = 0
        self.times = Times()
        self.cached = 0
        self.forwarded = 0
        self.rcodes: Table[str, Row] = Table(Row, 64)
        self.clients: Table[str, Count] = Table(Count)
        self.questions: Table[tuple[str, str], Count] = Table(Count)  # (client, name)
        self.names: Table[tuple[str, str], Count] = Table(Count)  # (name, type)
        self.upstreams: Table[str, Times] = Table(Times, 50)
        self.storms: Table[tuple[str, str], Storm] = Table(Storm)  # (client, base name)

    def merge(self, other: Slice) -> None:
        self.total.merge(other.total)
        self.lost += other.lost
        self.times.merge(other.times)
        self.cached += other.cached
        self.forwarded += other.forwarded
        self.rcodes.merge(other.rcodes)
        self.clients.merge(other.clients)
        self.questions.merge(other.questions)
        self.names.merge(other.names)
        self.upstreams.merge(other.upstreams)
        self.storms.merge(other.storms)


class Top:
    """All that was asked within the last `window` seconds; 0: ever.

    domain -- the cluster's, "cluster.local"
    """

    def __init__(self, window: float = 60.0, domain: str = "cluster.local") -> None:
        self.window = window
        self._slices: deque[Slice] = deque()
        self._searches = Searches(domain)
        self.unread = 0  # lines that were no events

    def take(self, event: Event, now: float) -> None:
        """Count one event that came at `now` (any seconds that go on)."""
        part = self._slice(now)
        if "lost" in event and "name" not in event:
            part.lost += _number(event["lost"])
            return
        name, rcode = event.get("name"), event.get("rcode")
        if not isinstance(name, str) or not isinstance(rcode, str):
            self.unread += 1
            return
        qtype = str(event.get("type", ""))
        client = client_of(event)
        part.total.add(rcode)
        part.rcodes.row(rcode).weight += 1
        part.clients.row(client).add(rcode)
        part.questions.row((client, name)).add(rcode)
        part.names.row((name, qtype)).add(rcode)
        milliseconds = _number(event.get("duration_ms"))
        if "duration_ms" in event:
            part.times.add(milliseconds)
        upstream = event.get("upstream")
        if isinstance(upstream, str):
            part.forwarded += 1
            part.upstreams.row(upstream).add(milliseconds, rcode in FAILURES)
        elif "cache_age" in event and "object" not in event:
            part.cached += 1
        found = self._searches.take(client, name, rcode, now)
        if found is not None:
            base, namespace, first = found
            storm = part.storms.row((client, base))
            storm.namespace = storm.namespace or namespace
            if first:
                storm.firsts[qtype] = storm.firsts.get(qtype, 0) + 1
            if rcode == NXDOMAIN:
                storm.weight += 1
                if name in storm.tried or len(storm.tried) < MAX_NAMES:
                    storm.tried[name] = storm.tried.get(name, 0) + 1
            elif rcode == NOERROR:
                storm.ended = name

    def _slice(self, now: float) -> Slice:
        slices = self._slices
        if not slices:
            slices.append(Slice(now))
        elif self.window and now - slices[-1].began >= self.window / SLICES:
            slices.append(Slice(now))
            while now - slices[0].began > self.window:
                slices.popleft()
        return slices[-1]

    def summary(self, now: float, rows: int = 10) -> dict[str, Any]:
        """Return what is to be shown, with `rows` rows a table: the JSON of `-o json`."""
        slices = [one for one in self._slices if not self.window or now - one.began <= self.window]
        whole = Slice(slices[0].began if slices else now)
        for part in slices:
            whole.merge(part)
        seconds = max(now - whole.began, 1.0)
        asked = whole.total
        reusable = whole.cached + whole.forwarded
        return {
            "seconds": round(seconds, 1),
            "queries": int(asked.weight),
            "qps": _rate(asked.weight, seconds),
            "lost": whole.lost,
            "unread": self.unread,
            "rcodes": {key: int(row.weight) for key, row in whole.rcodes.greatest(rows)},
            "latency_ms": _latency(whole.times),
            "cache": {
                "hits": whole.cached,
                "forwarded": whole.forwarded,
                "hit_ratio": round(whole.cached / reusable, 4) if reusable else None,
            },
            "clients": [
                {"client": client, **_count(row, seconds)}
                for client, row in whole.clients.greatest(rows)
            ],
            "questions": [
                {"client": client, "name": name, **_count(row, seconds)}
                for (client, name), row in whole.questions.greatest(rows)
            ],
            "names": [
                {"name": name, "type": qtype, **_count(row, seconds)}
                for (name, qtype), row in whole.names.greatest(rows)
            ],
            "upstreams": [
                {"upstream": upstream, "queries": int(row.weight), "failed": row.failed,
                 **_latency(row)}
                for upstream, row in _slowest(whole.upstreams, rows)
            ],
            "storms": [
                _storm(client, base, row)
                for (client, base), row in whole.storms.greatest(rows)
                # One candidate alone is a name that is not there, and no look-up.
                if row.weight and (row.ended or len(row.tried) > 1)
            ],
            "uncounted": int(max(whole.clients.floor, whole.questions.floor, whole.names.floor)),
        }  # fmt: skip


def client_of(event: Event) -> str:
    """Return who asked: the Pod where it is known, else the address."""
    pod = event.get("pod")
    if isinstance(pod, str) and pod:
        return pod
    host, _, _ = str(event.get("client", "?")).rpartition(":")
    return host.strip("[]") or "?"


def _number(value: object) -> Any:
    return value if isinstance(value, (int, float)) else 0


def _rate(count: float, seconds: float) -> float:
    return round(count / seconds, 2)


def _count(row: Count, seconds: float) -> dict[str, Any]:
    return {
        "queries": int(row.weight),
        "qps": _rate(row.weight, seconds),
        "nxdomain": row.nxdomain,
        "failed": row.failed,
    }


def _latency(times: Times) -> dict[str, float]:
    return {
        "p50": round(times.at(0.5), 3),
        "p90": round(times.at(0.9), 3),
        "p99": round(times.at(0.99), 3),
        "max": round(times.longest, 3),
    }


def _slowest(table: Table[str, Times], rows: int) -> Iterable[tuple[str, Times]]:
    return sorted(table.rows.items(), key=lambda one: -one[1].at(0.9))[:rows]


# --- search lists ---------------------------------------------------------------------------


@dataclass(slots=True)
class _Open:
    """A look-up under way. stage -- of the candidate seen last: 1 the namespace's, 2 svc's, 3
    the cluster domain's, 4 others of the node's search list"""

    namespace: str
    stage: int
    seen: float


class Searches:
    """Tells which questions are candidates of one look-up.

    A Pod's search list is NAMESPACE.svc.DOMAIN, svc.DOMAIN, DOMAIN and what its node has; the
    name as it is comes last where it has fewer dots than ndots (5). So a name below svc.DOMAIN
    that is not there begins a look-up, and what comes after it are its candidates.
    """

    def __init__(self, domain: str) -> None:
        self._domain = domain.rstrip(".").lower().split(".")
        self._open: OrderedDict[tuple[str, str], _Open] = OrderedDict()

    def take(self, client: str, name: str, rcode: str, now: float) -> tuple[str, str, bool] | None:
        """Return (base name, namespace, it is the first candidate) of a question that went
        through the search list, else None."""
        labels = name.rstrip(".").lower().split(".")
        for size in range(len(labels), 0, -1):
            base = ".".join(labels[:size])
            found = self._open.get((client, base))
            if found is None or now - found.seen > LOOKUP_TIME:
                continue
            stage = self._stage(labels[size:], found, rcode)
            if stage:
                found.stage, found.seen = stage, now
                return base, found.namespace, stage == 1
        if rcode != NXDOMAIN:
            return None
        tail = ["svc", *self._domain]
        if len(labels) < len(tail) + 2 or labels[-len(tail) :] != tail:
            return None
        base, namespace = ".".join(labels[: -len(tail) - 1]), labels[-len(tail) - 1]
        self._remember((client, base), _Open(namespace, 1, now))
        return base, namespace, True

    def _stage(self, rest: Sequence[str], found: _Open, rcode: str) -> int:
        """Return which candidate of an open look-up has this behind the base; 0: none."""
        domain = self._domain
        if list(rest) == [found.namespace, "svc", *domain]:
            return 1
        if list(rest) == ["svc", *domain]:
            return 2
        if list(rest) == domain:
            return 3
        if not rest:
            return 5
        # The node's own search domains are known only by where they stand.
        inside = list(rest[-len(domain) :]) == domain
        return 4 if found.stage in (3, 4) and not inside and rcode == NXDOMAIN else 0

    def _remember(self, key: tuple[str, str], value: _Open) -> None:
        self._open.pop(key, None)
        self._open[key] = value
        if len(self._open) > MAX_OPEN:
            self._open.popitem(last=False)


def _storm(client: str, base: str, row: Storm) -> dict[str, Any]:
    lookups = max(row.lookups, 1)
    return {
        "client": client,
        "name": base,
        "lookups": lookups,
        "wasted": int(row.weight),
        "wasted_per_lookup": round(row.weight / lookups, 1),
        "candidates": sorted(row.tried, key=lambda one: -row.tried[one])[:6],
        "found": row.ended or None,
        "advice": advice(base, row.namespace, row.ended),
    }


def advice(base: str, namespace: str, ended: str) -> str:
    """Return what would spare the wasted questions of a look-up."""
    dots = base.count(".")
    if ended.rstrip(".") == base and dots:
        return (
            f"write '{base}.' with its final dot, or set dnsConfig ndots:{dots} for the Pod,"
            " and it is asked for as it is first"
        )
    if ended.rstrip(".") == base:
        return f"write '{base}.' with its final dot"
    if ended:
        return f"write '{ended}' with its final dot: it is found at once"
    if dots:
        return f"'{base}' is nowhere: who asks for it? Its final dot would spare the search list"
    return f"there is no Service '{base}' in namespace {namespace}, and no such name elsewhere"
