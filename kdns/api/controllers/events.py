"""Events: what happened to objects, for people who ask `kubectl describe` and `get events`.

Decides what repeats are (one Event that counts) and how many are kept for how long. What is
worth an Event is each controller's to say. Upstream: client-go's recorder and correlator; the
API server's --event-ttl.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from kdns.api.controllers.index import EVENTS
from kdns.api.controllers.writes import CONTROLLERS, Writer, terminating
from kdns.api.objects import now_text
from kdns.api.store import Event as Change
from kdns.api.store import Key, Obj
from kdns.errors import ApiError

NAME: Final = "event"
SWEEP: Final = "event-sweep"

TTL: Final = 3600.0  # seconds after its last write
MOST: Final = 5000  # Events kept in all; the oldest go first
REMEMBERED: Final = 4096  # what a repeat is recognised by, as client-go's cache
MOST_WAITING: Final = 2000  # not yet written: a storm of Events must not eat the memory
AT_A_TIME: Final = 10  # writes before others have their turn
PAUSE: Final = 60.0  # seconds between looks at what is too old


@dataclass(frozen=True, slots=True)
class Report:
    """One thing that happened."""

    involved: tuple[str, str, str, str, str, str]  # apiVersion kind namespace name uid version
    type: str
    reason: str
    message: str
    component: str
    host: str = ""

    @property
    def identity(self) -> tuple[object, ...]:
        return (self.involved[:5], self.type, self.reason, self.message, self.component)


class Recorder:
    """Takes reports at once and writes them when there is time.

    clock -- Unix seconds; queue -- has a key of NAME looked at
    """

    def __init__(
        self, writer: Writer, clock: Callable[[], float], queue: Callable[[str], None]
    ) -> None:
        self._writer = Writer(writer.objects, CONTROLLERS)
        self._clock = clock
        self._queue = queue
        self._waiting: deque[Report] = deque()
        self._known: OrderedDict[tuple[object, ...], tuple[str, str]] = OrderedDict()
        self._ages: OrderedDict[Key, float] = OrderedDict()
        self._serial = 0

    def tell(self, obj: Obj, reason: str, message: str, component: str, *, host: str = "") -> None:
        """Report something usual."""
        self._take(obj, "Normal", reason, message, component, host)

    def warn(self, obj: Obj, reason: str, message: str, component: str) -> None:
        """Report something that somebody should look at."""
        self._take(obj, "Warning", reason, message, component, "")

    def _take(
        self, obj: Obj, type_: str, reason: str, message: str, component: str, host: str
    ) -> None:
        if len(self._waiting) >= MOST_WAITING:
            return
        meta = obj["metadata"]
        involved = (
            obj["apiVersion"], obj["kind"], meta.get("namespace", ""), meta["name"],
            meta.get("uid", ""), meta.get("resourceVersion", ""),
        )  # fmt: skip
        self._waiting.append(Report(involved, type_, reason, message, component, host))
        self._queue("write")

    # --- writing ----------------------------------------------------------------------

    async def reconcile(self, _key: str) -> float | None:
        """Write what waits, some at a time: others want the loop, too."""
        for _ in range(min(len(self._waiting), AT_A_TIME)):
            try:
                await self._write(self._waiting.popleft())
            except ApiError as e:
                if e.code == 507 or not (terminating(e) or e.code in (403, 404, 409)):
                    raise  # this one is lost, as upstream's; the rest is tried again
        if self._waiting:
            self._queue("write")
        return None

    async def _write(self, report: Report) -> None:
        now = now_text(self._clock())
        known = self._known.get(report.identity)
        stored = self._writer.objects.find(EVENTS, *known) if known is not None else None
        if stored is not None:

            def change(obj: Obj) -> None:
                obj["count"] = obj.get("count", 1) + 1
                obj["lastTimestamp"] = now

            await self._writer.change(EVENTS, stored, change)
            self._known.move_to_end(report.identity)
            return
        api_version, kind, namespace, name, uid, version = report.involved
        where = namespace or "default"
        obj = self._event(report, where, now)
        obj["involvedObject"] = {
            key: value
            for key, value in (
                ("apiVersion", api_version), ("kind", kind), ("namespace", namespace),
                ("name", name), ("uid", uid), ("resourceVersion", version),
            )
            if value
        }  # fmt: skip
        await self._writer.create(EVENTS, where, obj)
        self._known[report.identity] = (where, obj["metadata"]["name"])
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)

    def _event(self, report: Report, namespace: str, now: str) -> Obj:
        self._serial += 1
        # As client-go: the object's name and the time in nanoseconds; unique all the same
        # when a clock stands still.
        tail = f"{int(self._clock() * 1e9) + self._serial:x}"
        source = {"component": report.component}
        if report.host:
            source["host"] = report.host
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{report.involved[3]}.{tail}", "namespace": namespace},
            "reason": report.reason,
            "message": report.message,
            "source": source,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
            "type": report.type,
            "reportingComponent": report.component,
            "reportingInstance": report.host,
        }

    # --- age --------------------------------------------------------------------------

    def seen(self, event: Change) -> None:
        """Note when each Event was last written, whoever wrote it."""
        key = event.stored.key
        if key[0] != EVENTS.qualified:
            return
        self._ages.pop(key, None)
        if event.type != "DELETED":
            self._ages[key] = self._clock()
            if len(self._ages) > MOST + MOST // 50:
                self._queue("sweep")

    async def sweep(self, _key: str) -> float | None:
        """Drop what is too old, and the oldest of too many."""
        limit = self._clock() - TTL
        for _ in range(AT_A_TIME):
            if not self._ages:
                return PAUSE
            key, written = next(iter(self._ages.items()))
            if written > limit and len(self._ages) <= MOST:
                return PAUSE
            stored = self._writer.objects.find(EVENTS, key[1], key[2])
            self._ages.pop(key, None)
            if stored is not None:
                await self._writer.delete(EVENTS, key[1], key[2], stored.uid)
        return 0.0
