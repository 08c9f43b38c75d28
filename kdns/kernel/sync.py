"""When the kernel is written: the loop between the forwarding table and one dataplane.

Decides when to sync, in part or in full, when to look whether somebody changed what was
written, and what follows a failure; one loop a family. What a sync does is the dataplane's.

A change after a quiet time is written at once. What comes while a sync runs is one next sync;
after a sync the loop rests as long as the sync took, so however fast changes come, at most
half of the time goes into writing them. After a failure the old rules stay and the next sync
is a full one (reference 1.10).
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from kdns.errors import ApplyError
from kdns.metrics import Cell, Metrics
from kdns.proxy.options import Family
from kdns.proxy.table import ForwardingTable
from kdns.registry.objects import Key

log = logging.getLogger("kdns.proxy")

FAMILY_LABEL: dict[Family, str] = {4: "IPv4", 6: "IPv6"}
BUCKETS = tuple(0.001 * 2**n for n in range(15))  # seconds, as kube-proxy's

OnSynced: TypeAlias = Callable[[ForwardingTable, frozenset[Key], bool], None]
OnFailed: TypeAlias = Callable[[Exception], None]


class Dataplane(Protocol):
    """One way to forward packets. One call at a time; each raises ApplyError."""

    async def sync(self, table: ForwardingTable, changed: Collection[Key], full: bool) -> None:
        """Bring the kernel to `table`, of which `changed` is new since the last call."""

    async def verify(self) -> bool:
        """Say whether the kernel still holds what was written; log what it does not."""

    async def cleanup(self) -> None:
        """Remove everything that was ever written."""


class Clock:
    """Time, and waiting; tests bring their own."""

    def monotonic(self) -> float:
        """Return seconds that only grow."""
        return time.monotonic()

    def unix(self) -> float:
        """Return seconds since 1970."""
        return time.time()

    async def wait(self, event: asyncio.Event, seconds: float) -> None:
        """Return when `event` is set or `seconds` (math.inf: never) have passed."""
        if seconds == math.inf:
            await event.wait()
            return
        with suppress(TimeoutError):
            await asyncio.wait_for(event.wait(), seconds)


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds, if not said otherwise. The defaults are kube-proxy's but for min_sync_period.

    sync_period -- between verifications, and from a failed full sync to the next
    min_sync_period -- from the end of a sync to the start of the next, at least
    full_after  -- a sync that comes so long after the last full one is full, but in a large
                   cluster
    large       -- endpoints in all; more are a large cluster
    busy        -- first wait after a lock was held by somebody else; doubles up to sync_period
    broken      -- changes come no earlier than so long after a failed full sync; doubles as well
    rest        -- the pause that equals the time of a sync is at most that
    rest_full   -- the same after a full sync, which is rare: it should not delay a first change
    """

    sync_period: float = 30.0
    min_sync_period: float = 0.0
    full_after: float = 3600.0
    large: int = 1000
    busy: float = 0.1
    broken: float = 1.0
    rest: float = 5.0
    rest_full: float = 0.5


class SyncLoop:
    """Keeps one family's dataplane at the newest table. run() is its one task.

    on_synced -- called after each success with the table now in the kernel, the Services it
                 differs by from the one before, and whether the sync was full
    on_failed -- called with what made a sync fail; the next attempt is planned by then

    For health (Unix seconds):
    last_queued -- when a change was last asked for; last_synced: when a sync last succeeded;
    waiting_since -- of the oldest change not yet in the kernel
    warnings    -- what an operator should know, whoever puts it there
    """

    def __init__(
        self,
        dataplane: Dataplane,
        family: Family,
        metrics: Metrics,
        timing: Timing = Timing(),
        on_synced: OnSynced | None = None,
        clock: Clock | None = None,
        on_failed: OnFailed | None = None,
    ) -> None:
        self.last_queued: float | None = None
        self.last_synced: float | None = None
        self.warnings: list[str] = []
        self._dataplane = dataplane
        self._label = FAMILY_LABEL[family]
        self._timing = timing
        self._on_synced = on_synced
        self._on_failed = on_failed
        self._clock = clock or Clock()
        self._tally = _Tally(metrics, self._label)
        self._table: ForwardingTable | None = None
        self._changed: set[Key] = set()
        # Unix; the oldest change that no sync has taken yet, and of those a sync is writing.
        self._waiting_since: float | None = None
        self._writing_since: float | None = None
        self._full = True
        self._full_at = -math.inf  # when a full sync last succeeded
        # Monotonic times of what comes next. due: a sync is wanted; not_before: and allowed.
        self._due = math.inf
        self._not_before = -math.inf
        self._verify_at = math.inf
        self._failures = 0  # in a row
        self._wake = asyncio.Event()
        self._closing = False
        self._running = False
        self._ended = asyncio.Event()

    # --- asked from outside -----------------------------------------------------------

    def request(
        self,
        table: ForwardingTable,
        changed: Collection[Key],
        *,
        full: bool = False,
        services: int = 0,
        endpoints: int = 0,
    ) -> None:
        """Ask for `table`, of which `changed` is new since the last request. Returns at once.

        Called in the event loop's thread, first when the registry is synced: nothing is
        written before. full -- remember nothing (the node's labels changed). services,
        endpoints -- how many changes of each there were, for the metrics.
        """
        now = self._clock.unix()
        self._table = table
        self._changed.update(changed)
        self._full = self._full or full
        self.last_queued = now
        if self._waiting_since is None:
            self._waiting_since = now
        self._tally.queued(now, services, endpoints)
        self._due = min(self._due, self._clock.monotonic())
        self._wake.set()

    @property
    def waiting_since(self) -> float | None:
        """Unix seconds of the oldest change that is not written, be it because syncs fail or
        because one never ends; None: the kernel holds all."""
        return self._writing_since or self._waiting_since

    async def close(self) -> None:
        """Let a write under way finish, and end run()."""
        self._closing = True
        self._wake.set()
        if self._running:
            await self._ended.wait()

    # --- the loop ---------------------------------------------------------------------

    async def run(self) -> None:
        """Sync and verify until close() or cancellation; no failure ends it."""
        self._running = True
        try:
            while not self._closing:
                sync_at = max(self._due, self._not_before)
                wait = min(sync_at, self._verify_at) - self._clock.monotonic()
                if wait > 0:
                    self._wake.clear()
                    await self._clock.wait(self._wake, wait)
                elif sync_at <= self._verify_at:
                    await self._sync()
                else:
                    await self._verify()
        finally:
            self._running = False
            self._ended.set()

    async def _sync(self) -> None:
        assert self._table is not None  # due only after a request
        table, changed = self._table, frozenset(self._changed)
        began = self._clock.monotonic()
        stale = began - self._full_at > self._timing.full_after
        full = self._full or (stale and table.endpoints <= self._timing.large)
        self._changed.clear()
        self._writing_since, self._waiting_since = self._waiting_since, None
        self._full = False
        self._due = math.inf
        self._tally.began()
        error = await self._attempt(self._dataplane.sync(table, changed, full))
        ended = self._clock.monotonic()
        since, self._writing_since = self._writing_since, None
        if error is None:
            self._succeeded(full, ended, ended - began)
            self._tally.succeeded(full, ended - began, self.last_synced or 0.0)
            self._tell(table, changed, full)
            return
        self._changed |= changed
        if since is not None:
            self._waiting_since = since
        self._tally.failed()
        self._failed(full, error, ended)

    def _succeeded(self, full: bool, now: float, seconds: float) -> None:
        timing = self._timing
        if self._failures:
            log.info("%s: rules written again", self._label)
        self._failures = 0
        self.last_synced = self._clock.unix()
        if full:
            self._full_at = now
        if full or self._verify_at == math.inf:
            self._verify_at = now + timing.sync_period
        rest = min(seconds, timing.rest_full if full else timing.rest)
        self._not_before = now + max(timing.min_sync_period, rest)

    def _failed(self, full: bool, error: Exception, now: float) -> None:
        """Plan the next attempt, a full one: when depends on what it was that failed.

        A lock may be free in a moment. A partial sync may have failed for what somebody else
        changed, which a full one does not mind: it comes at once. A full one that failed will
        fail again, unless a change takes away the reason.
        """
        timing = self._timing
        self._full = True
        back_off = 2.0 ** min(self._failures, 30)
        self._failures += 1
        if isinstance(error, ApplyError) and error.busy:
            retry = wait = min(timing.busy * back_off, timing.sync_period)
        elif not full:
            retry = wait = 0.0
        else:
            retry = timing.sync_period
            wait = min(timing.broken * back_off, timing.sync_period)
        wait = max(wait, timing.min_sync_period)
        self._not_before = now + wait
        self._due = min(self._due, now + retry)
        # A sync is due sooner or as soon; it starts the verification again.
        self._verify_at = math.inf
        log.error(
            "%s: sync failed, the rules before stay; next attempt in %.1f s at the latest: %s",
            self._label, max(retry, wait), error,
        )  # fmt: skip

    def _tell(self, table: ForwardingTable, changed: frozenset[Key], full: bool) -> None:
        if self._on_synced is None:
            return
        try:
            self._on_synced(table, changed, full)
        except Exception:
            log.exception("%s: what follows a sync failed, a bug", self._label)

    async def _verify(self) -> None:
        self._verify_at = self._clock.monotonic() + self._timing.sync_period
        found: list[bool] = []

        async def verify() -> None:
            found.append(await self._dataplane.verify())

        error = await self._attempt(verify())
        self._tally.verified("failed" if error else "same" if found[0] else "changed")
        if error is not None:
            # A lock, say: no sign that rules are gone (reference 1.10).
            log.warning("%s: rules could not be verified: %s", self._label, error)
        elif not found[0]:
            self._full = True
            self._due = min(self._due, self._clock.monotonic())
            if self._waiting_since is None:
                self._waiting_since = self._clock.unix()

    async def _attempt(self, work: Awaitable[None]) -> Exception | None:
        """Await `work`; return how it failed. A bug's trace is logged, and it is a failure."""
        try:
            await work
        except ApplyError as e:
            return e
        except Exception as e:
            log.exception("%s: a bug", self._label)
            return e
        return None


class _Tally:
    """kube-proxy's numbers about syncs (reference 1.15), and ours."""

    def __init__(self, metrics: Metrics, family: str) -> None:
        self._metrics, self._family = metrics, family
        self._all = self._histogram("sync_proxy_rules", "All syncs")
        self._by_kind = {
            True: self._histogram("sync_full_proxy_rules", "Full syncs"),
            False: self._histogram("sync_partial_proxy_rules", "Partial syncs"),
        }
        rules = "kubeproxy_sync_proxy_rules"
        self._last = self._gauge(f"{rules}_last_timestamp_seconds", "The last successful sync.")
        self._queued = self._gauge(
            f"{rules}_last_queued_timestamp_seconds", "When a sync was last asked for."
        )
        self._pending = {
            kind: self._gauge(f"{rules}_{kind}_changes_pending", "Changes not yet written.")
            for kind in ("service", "endpoint")
        }
        self._total = {
            kind: metrics.counter(
                f"{rules}_{kind}_changes_total", "Changes seen.", ("ip_family",)
            ).labels(family)
            for kind in ("service", "endpoint")
        }
        self._taken = dict.fromkeys(self._pending, 0.0)  # pending when the sync began
        self._verifications = metrics.counter(
            "kdns_proxy_verifications_total",
            "Looks at the rules in the kernel, by what was found: same, changed, or failed.",
            ("ip_family", "result"),
        )

    def _histogram(self, name: str, what: str) -> Cell:
        return self._metrics.histogram(
            f"kubeproxy_{name}_duration_seconds", f"{what}, in seconds.", ("ip_family",), BUCKETS
        ).labels(self._family)

    def _gauge(self, name: str, help: str) -> Cell:
        return self._metrics.gauge(name, help, ("ip_family",)).labels(self._family)

    def queued(self, now: float, services: int, endpoints: int) -> None:
        self._queued.set(now)
        for kind, count in (("service", services), ("endpoint", endpoints)):
            self._pending[kind].add(count)
            self._total[kind].add(count)

    def began(self) -> None:
        self._taken = {kind: cell.value for kind, cell in self._pending.items()}

    def succeeded(self, full: bool, seconds: float, now: float) -> None:
        self._all.add(seconds)
        self._by_kind[full].add(seconds)
        self._last.set(now)
        for kind, count in self._taken.items():
            self._pending[kind].add(-count)

    def failed(self) -> None:
        """What was taken stays pending."""
        self._taken.clear()

    def verified(self, result: str) -> None:
        self._verifications.labels(self._family, result).add()
