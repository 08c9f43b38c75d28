"""The one loop that moves a change along: source -> store -> snapshot -> rules -> zones.

A Pipeline belongs to one source and outlives reloads of the Corefile, so that a reload
lists nothing again. It implements source.sink.Sink: the source tells it of objects, and it
publishes a snapshot once per turn of the event loop, so a single change goes out at once and
a burst goes out as one. A full list is taken over in parts, one a turn, so that questions are
answered in between; what is published then is as after as many single changes.

Where a kernel side is attached, it gets each snapshot first, and with a gate the zones show
what of it the kernel has (registry/gate.py).
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from kdns.errors import SourceError
from kdns.metrics import Metrics
from kdns.registry.gate import Family, Gate, KernelChanges, Opened, Shown
from kdns.registry.mirror import State, no_state
from kdns.registry.objects import Key, Kind, Object
from kdns.registry.snapshot import Changes, Snapshot, everything, everything_in_parts
from kdns.registry.store import Store

log = logging.getLogger("kdns")

Publish = Callable[[Snapshot, Changes, float], Sequence[Any] | None]
Invalidate = Callable[[Sequence[Any] | None], None]
# Takes a snapshot, what changed and when; returns whose rules are others now, by family.
Kernel = Callable[[Snapshot, Changes, float], KernelChanges]
# What the kernel side keeps though the registry has it no more, for /v1/status.
Draining = Callable[[], list[dict[str, object]]]

# Seconds before a failure that was over is said again: a server that comes and goes all the
# time gets a pair of lines in this time, not one for every try.
SAY_AGAIN = 60.0
# What one turn of the loop takes over, by the work of a Service: a few milliseconds, for in 15 a
# UDP socket's buffer overflows at 20,000 questions a second.
TURN = 100
MOST_NAMED = 5  # Services in a line of the log
MAX_SAID = 100  # failures remembered as said; an API server has some ten ways to fail
_NUMBERS = re.compile(r"\d+(\.\d+)?")


@dataclass(frozen=True, slots=True)
class Words:
    """What goes on while the source fails: after it was listed once, and before."""

    prefix: str
    synced: str
    unsynced: str


DNS_WORDS = Words(
    "plugin/kubernetes: ",
    "serving what is known",
    "cluster names get SERVFAIL until it is listed",
)


class Elsewhere(Protocol):
    """Other processes that answer with what this one's pipeline shows (server/workers.py)."""

    def revision(self) -> int | None:
        """Return the revision that the last one of them shows; None: they all show the newest."""

    async def settle(self) -> None:
        """Wait until they all do."""


class Pipeline:
    """The registry of one source and those who read it.

    invalidate -- told the deps of answers that are no longer true (None: all)
    clock      -- monotonic seconds
    words      -- how the operator is told of a source that fails
    gate       -- what holds names back until the attached kernel side has their rules

    registry   -- the newest snapshot
    snapshot   -- what DNS shows; the same without a gate
    states     -- what is to be said of a Service where another process has the gate
    elsewhere  -- who else shows it
    """

    def __init__(
        self,
        store: Store,
        invalidate: Invalidate,
        clock: Callable[[], float] = time.monotonic,
        words: Words = DNS_WORDS,
        gate: Gate | None = None,
    ) -> None:
        self._words = words
        self.gate = gate
        self._kernel: Kernel | None = None
        self._draining: Draining = list
        self._expiry: asyncio.TimerHandle | None = None
        self._programmed: dict[Family, int] = {}
        self._settled = asyncio.Event()
        self.states: State = no_state
        self.elsewhere: Elsewhere | None = None
        self.registry = Snapshot()
        self.store = store
        self.invalidate = invalidate
        self.snapshot = Snapshot()
        self.synced = asyncio.Event()
        self._clock = clock
        self._readers: list[Publish] = []
        self._scheduled = False
        self._waiting: deque[Iterator[int]] = deque()  # what was told and is not in the store yet
        self._left = TURN  # until something is published
        self._heard: dict[str, float] = {}
        self._failing: set[str] = set()
        self._failing_since = 0.0
        self._said: dict[str, float] = {}  # failures, numbers left out -> when
        self._told = False  # that it fails, and not yet that it is over

    def subscribe(self, publish: Publish) -> None:
        """Add a reader; it gets all there is at once and every change from then on."""
        self._readers.append(publish)
        publish(self.snapshot, everything(self.snapshot), self._clock())

    async def join(self, publish: Publish) -> None:
        """As subscribe(), with answers in between: a reload compiles all there is anew. Changes
        that come meanwhile reach the reader as any other."""
        self._readers.append(publish)
        for part in everything_in_parts(self.snapshot, TURN):
            publish(self.snapshot, part, self._clock())
            await asyncio.sleep(0)

    def unsubscribe(self, publish: Publish) -> None:
        """Remove a reader, if it is one."""
        if publish in self._readers:
            self._readers.remove(publish)

    # --- the kernel side ------------------------------------------------------------------

    def attach(self, kernel: Kernel, draining: Draining = list) -> None:
        """Make `kernel` the one that writes rules. It gets all there is at once, then every
        change before DNS does; with programmed() it says how far the rules are."""
        self._kernel, self._draining = kernel, draining
        changed = self._tell_kernel(everything(self.registry))
        if self.gate is not None:
            self.gate.attach(changed, self._clock())
            self._plan_expiry()

    def count_on(self, revision: int) -> None:
        """Have all revisions from now on be after this one, of another pipeline: then nobody
        takes rules of that one's, which are being written yet, for rules of this one's."""
        self.take_over(self.store.count_on(revision), Changes())

    def detach(self, kernel: Kernel) -> bool:
        """That one has ended, or moved; nobody waits for it any more. Return whether it was
        attached."""
        if self._kernel != kernel:
            return False
        self._kernel, self._draining = None, list
        self._programmed.clear()
        if self.gate is not None:
            self._take(self.gate.detach(self._clock(), int(time.time())))
        return True

    @property
    def attached(self) -> bool:
        return self._kernel is not None

    def programmed(self, family: Family, revision: int) -> None:
        """The kernel holds the rules of this revision."""
        self._programmed[family] = max(revision, self._programmed.get(family, 0))
        if self.gate is None or self._kernel is None:
            return
        was_open = self.gate.is_open
        shown = self.gate.programmed(family, revision, self._clock(), int(time.time()))
        if was_open and not self.gate.is_open:
            log.info("%srules are written again; names wait for theirs", self._words.prefix)
        self._take(shown)

    async def settle(self) -> None:
        """Wait until DNS shows the registry: as long as the gate may wait, at most."""
        while self._waiting:
            await asyncio.sleep(0)
        while self.gate is not None and not self.gate.quiet():
            self._settled.clear()
            await self._settled.wait()
        if self.elsewhere is not None:
            await self.elsewhere.settle()

    def revisions(self) -> dict[str, int]:
        """Return how far each stage is: "registry", "dns", "kernel_ipv4", "kernel_ipv6"."""
        newest = self.registry.revision
        found = {"registry": newest, "dns": newest}
        kernel: Mapping[Family, int] = self._programmed
        if self.gate is not None:
            found["dns"] = self.gate.shown_revision()
            kernel = self.gate.kernel_revisions()
        shown = None if self.elsewhere is None else self.elsewhere.revision()
        if shown is not None:
            found["dns"] = min(found["dns"], shown)
        return found | {f"kernel_ipv{family}": at for family, at in kernel.items()}

    def gate_status(self) -> dict[str, Any] | None:
        """Return what /v1/status tells of the gate; None: there is none."""
        if self.gate is None:
            return None
        return {**self.gate.status(self._clock()), "draining": self.draining()}

    def gate_state(self, key: Key) -> str:
        """Return what keeps a Service's rules from the kernel (registry/gate.py)."""
        return self.states(key) if self.gate is None else self.gate.state(key)

    def draining(self) -> list[dict[str, object]]:
        """Return what the kernel side keeps of Services that are gone."""
        return self._draining()

    def _tell_kernel(self, changes: Changes) -> KernelChanges:
        if self._kernel is None:
            return {}
        try:
            return self._kernel(self.registry, changes, self._clock())
        except Exception:
            log.exception("a bug in kdns while rules take over a change; please report it")
            return {}

    def _plan_expiry(self) -> None:
        """Look again when the gate has waited for long enough."""
        if self._expiry is not None or self.gate is None or not self.gate.waits():
            return
        due = self.gate.deadline()
        if due is not None:
            wait = max(0.0, due - self._clock())
            self._expiry = asyncio.get_running_loop().call_later(wait, self._expire)

    def _expire(self) -> None:
        self._expiry = None
        assert self.gate is not None
        opened = self.gate.expire(self._clock(), int(time.time()))
        if opened is not None:
            self._say_opened(opened, self.gate.timeout)
            self._take(opened.shown)
        self._plan_expiry()

    def _say_opened(self, opened: Opened, timeout: float) -> None:
        if opened.alone:
            log.warning(
                "%sno rules were written in %g s; names are published without",
                self._words.prefix, timeout,
            )  # fmt: skip
        if not opened.families:
            return
        named = [f"{namespace}/{name}" for namespace, name in opened.services]
        more = f" and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
        what = f": {', '.join(named[:MOST_NAMED])}{more}" if named else ""
        log.warning(
            "%sthe rules of %s are not in the kernel after %g s; names are published without%s",
            self._words.prefix, " and ".join(f"IPv{one}" for one in opened.families), timeout, what,
        )  # fmt: skip

    def age(self) -> float | None:
        """Return the seconds since the source was last heard of, of the kind it was heard of
        the longest ago; None before the first word."""
        if not self._heard:
            return None
        return max(0.0, self._clock() - min(self._heard.values()))

    # --- source.sink.Sink -----------------------------------------------------------------

    def replace(
        self, kind: Kind, objects: Iterable[Object], keep: Collection[Key] = frozenset()
    ) -> None:
        """Take a full list of one kind."""
        self._take_in(self.store.replacing(kind, objects, keep))

    def apply(self, kind: Kind, event: str, obj: Object) -> None:
        """Take one watch event."""
        if self._waiting:
            self._take_in(_once(partial(self.store.apply, kind, event, obj)))
            return
        self.store.apply(kind, event, obj)
        self._schedule()

    def mark_synced(self, kind: Kind) -> None:
        """The kind has been listed once."""
        self._take_in(_once(partial(self.store.mark_synced, kind)))

    def _take_in(self, steps: Iterator[int]) -> None:
        self._waiting.append(steps)
        self._work()
        self._schedule()

    def _work(self) -> None:
        """Bring what was told into the store, as far as this turn may, in its order."""
        waiting = self._waiting
        while waiting and self._left > 0:
            spent = next(waiting[0], None)
            if spent is None:
                waiting.popleft()
            else:
                self._left -= spent

    def heard(self, what: str) -> None:
        """The source is alive. That all of it is well again is said once."""
        self._heard[what] = self._clock()
        if self._failing:
            self._failing.discard(what)
            if not self._failing and self._told:
                self._told = False
                log.info("%sthe registry is up to date again", self._words.prefix)

    def failed(self, what: str, error: SourceError, retry_in: float) -> None:
        """Say it once per way to fail, not once per kind and try; the source goes on."""
        now = self._clock()
        if not self._failing:
            self._failing_since = now
        self._failing.add(what)
        text = str(error)
        key = _NUMBERS.sub("0", text)
        said = self._said.get(key)
        if said is not None and (said >= self._failing_since or now - said < SAY_AGAIN):
            return
        if len(self._said) >= MAX_SAID:
            self._said.clear()
        self._said[key] = now
        self._told = True
        log.warning(
            "%s%s: %s; %s, trying again in %.1f s",
            self._words.prefix, type(error).__name__.lower(), text,
            self._words.synced if self.snapshot.synced else self._words.unsynced, retry_in,
        )  # fmt: skip

    # --- publishing -----------------------------------------------------------------------

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._turn)

    def publish(self) -> None:
        """Take all that was told along: to the rules, and then to DNS."""
        for steps in self._waiting:
            for _ in steps:
                pass
        self._waiting.clear()
        self._turn()

    def _turn(self) -> None:
        self._scheduled = False
        self._work()
        self._left = TURN
        if self._waiting:
            self._schedule()
        published = self.store.publish(int(time.time()))
        if published is not None:
            self.take_over(*published)

    def take_over(self, snapshot: Snapshot, changes: Changes) -> None:
        """Take a revision that the store, or another process's, has published."""
        self.registry = snapshot
        kernel = self._tell_kernel(changes)
        if self.gate is None:
            self._take((snapshot, changes))
            return
        now = self._clock()
        self._take(self.gate.publish(self.registry, changes, kernel, now, int(time.time())))
        self._plan_expiry()

    def _take(self, shown: Shown | None) -> None:
        """Compile what changed for DNS and forget the answers that it made wrong."""
        if shown is not None:
            self._show(*shown)
        if self.gate is None or self.gate.quiet():
            self._settled.set()

    def _show(self, snapshot: Snapshot, changes: Changes) -> None:
        self.snapshot = snapshot
        now = self._clock()
        deps: list[Any] = []
        everything_changed = False
        for reader in self._readers:
            try:
                touched = reader(self.snapshot, changes, now)
            except Exception:
                # What this reader made of the change is unknown; the others, and those who
                # wait for the registry, must get it all the same.
                log.exception("a bug in kdns while taking over a change; please report it")
                touched = None
            if touched is None:
                everything_changed = True
            else:
                deps += touched
        self.invalidate(None if everything_changed else deps)
        if self.snapshot.synced:
            self.synced.set()


def _once(act: Callable[[], None]) -> Iterator[int]:
    act()
    yield 1


def gauge_revisions(metrics: Metrics, revisions: Callable[[], Mapping[str, int]]) -> None:
    """Have the revision of each stage among the metrics."""
    metrics.gauge(
        "kdns_revision", "The registry's revision that a stage has in full.", ("stage",)
    ).read = lambda: [((stage,), float(at)) for stage, at in revisions().items()]


def gauge_waiting(metrics: Metrics, gate: Callable[[], Gate | None]) -> None:
    """Have the number of Services that a gate holds back among the metrics."""
    metrics.gauge(
        "kdns_gate_waiting", "Services that DNS does not show yet as the registry has them."
    ).read = lambda: [] if (one := gate()) is None else [((), float(one.waiting()))]


def gauge_draining(metrics: Metrics, draining: Draining) -> None:
    """Have the number of Services that are forwarded though they are gone among the metrics."""
    metrics.gauge(
        "kdns_draining", "Services that are gone, and whose rules stay for those who remember them."
    ).read = lambda: [((), float(len(draining())))]
