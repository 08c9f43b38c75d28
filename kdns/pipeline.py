"""The one loop that moves a change along: source -> store -> snapshot -> zones.

A Pipeline belongs to one source and outlives reloads of the Corefile, so that a reload
lists nothing again. It implements source.sink.Sink: the source tells it of objects, and it
publishes a snapshot once per turn of the event loop, so a single change goes out at once and
a burst goes out as one.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kdns.errors import SourceError
from kdns.registry.objects import Key, Kind, Object
from kdns.registry.snapshot import Changes, Snapshot, everything
from kdns.registry.store import Store

log = logging.getLogger("kdns")

Publish = Callable[[Snapshot, Changes, float], Sequence[Any] | None]
Invalidate = Callable[[Sequence[Any] | None], None]

# Seconds before a failure that was over is said again: a server that comes and goes all the
# time gets a pair of lines in this time, not one for every try.
SAY_AGAIN = 60.0
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


class Pipeline:
    """The registry of one source and those who read it.

    invalidate -- told the deps of answers that are no longer true (None: all)
    clock      -- monotonic seconds
    words      -- how the operator is told of a source that fails
    """

    def __init__(
        self,
        store: Store,
        invalidate: Invalidate,
        clock: Callable[[], float] = time.monotonic,
        words: Words = DNS_WORDS,
    ) -> None:
        self._words = words
        self.store = store
        self.invalidate = invalidate
        self.snapshot = Snapshot()
        self.synced = asyncio.Event()
        self._clock = clock
        self._readers: list[Publish] = []
        self._scheduled = False
        self._heard: dict[str, float] = {}
        self._failing: set[str] = set()
        self._failing_since = 0.0
        self._said: dict[str, float] = {}  # failures, numbers left out -> when
        self._told = False  # that it fails, and not yet that it is over

    def subscribe(self, publish: Publish) -> None:
        """Add a reader; it gets all there is at once and every change from then on."""
        self._readers.append(publish)
        publish(self.snapshot, everything(self.snapshot), self._clock())

    def unsubscribe(self, publish: Publish) -> None:
        """Remove a reader, if it is one."""
        if publish in self._readers:
            self._readers.remove(publish)

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
        self.store.replace(kind, objects, keep)
        self._schedule()

    def apply(self, kind: Kind, event: str, obj: Object) -> None:
        """Take one watch event."""
        self.store.apply(kind, event, obj)
        self._schedule()

    def mark_synced(self, kind: Kind) -> None:
        """The kind has been listed once."""
        self.store.mark_synced(kind)
        self._schedule()

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
            asyncio.get_running_loop().call_soon(self.publish)

    def publish(self) -> None:
        """Compile what changed and forget the answers that it made wrong."""
        self._scheduled = False
        published = self.store.publish(int(time.time()))
        if published is None:
            return
        self.snapshot, changes = published
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
