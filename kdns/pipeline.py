"""The one loop that moves a change along: source -> store -> snapshot -> zones.

A Pipeline belongs to one source and outlives reloads of the Corefile, so that a reload
lists nothing again. It implements source.sink.Sink: the source tells it of objects, and it
publishes a snapshot once per turn of the event loop, so a single change goes out at once and
a burst goes out as one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from kdns.errors import SourceError
from kdns.registry.objects import Key, Kind, Object
from kdns.registry.snapshot import Changes, Snapshot, everything
from kdns.registry.store import Store

log = logging.getLogger("kdns")

Publish = Callable[[Snapshot, Changes, float], Sequence[Any] | None]
Invalidate = Callable[[Sequence[Any] | None], None]


class Pipeline:
    """The registry of one source and those who read it.

    invalidate -- told the deps of answers that are no longer true (None: all)
    """

    def __init__(self, store: Store, invalidate: Invalidate) -> None:
        self.store = store
        self.invalidate = invalidate
        self.snapshot = Snapshot()
        self.heard_at = 0.0
        self.synced = asyncio.Event()
        self._readers: list[Publish] = []
        self._scheduled = False
        self._failure = ""

    def subscribe(self, publish: Publish) -> None:
        """Add a reader; it gets all there is at once and every change from then on."""
        self._readers.append(publish)
        publish(self.snapshot, everything(self.snapshot), time.monotonic())

    def unsubscribe(self, publish: Publish) -> None:
        """Remove a reader."""
        self._readers.remove(publish)

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

    def heard(self) -> None:
        """The source is alive."""
        self.heard_at = time.time()
        if self._failure:
            self._failure = ""
            log.info("plugin/kubernetes: the API server answers again")

    def failed(self, error: SourceError, retry_in: float) -> None:
        """Say it once per kind of failure; the source goes on trying."""
        text = str(error)
        if text != self._failure:
            self._failure = text
            log.warning(
                "plugin/kubernetes: %s: %s; serving what is known, trying again in %.1f s",
                type(error).__name__.lower(), text, retry_in,
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
        now = time.monotonic()
        deps: list[Any] = []
        everything_changed = False
        for reader in self._readers:
            touched = reader(self.snapshot, changes, now)
            if touched is None:
                everything_changed = True
            else:
                deps += touched
        self.invalidate(None if everything_changed else deps)
        if self.snapshot.synced:
            self.synced.set()
