"""The objects of the embedded API: kept in memory, made durable in SQLite, told to watchers.

Decides versions, order and durability: one writer, group commit; what was acknowledged
survives the death of the process; resourceVersion never goes back. What may be written is
objects.py's.

The way of a write, all of it on the event loop but the commit:

    write() --stage: expectations hold?--> accepted --one transaction--> committed --> told
                |no                          |   (writer thread)  |failed
             Conflicted                   queue: all that comes   507, and also for what was
             (once what it met            while a commit runs     built upon it; the state is
             is committed itself)         is the next commit      as before

Readers see what is committed, expectations what is accepted, so that of two writers of the
same version one wins. Subscribers are told before the writer gets its answer: who reads
after an acknowledged write finds it done.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sqlite3
import sys
import weakref
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal, TypeAlias

import msgspec

from kdns.api.status import expired
from kdns.errors import ApiError, ConfigError, Problem

log = logging.getLogger(__name__)

EventType: TypeAlias = Literal["ADDED", "MODIFIED", "DELETED"]
# Resource.qualified, namespace ("" for what has none), name.
Key: TypeAlias = tuple[str, str, str]
Obj: TypeAlias = dict[str, Any]
# SQLite's own words. In WAL mode a commit of NORMAL is in the kernel's hands, which survives
# kill -9 but not a power cut (the file stays whole, the last commits may be gone); FULL waits
# for the disk.
Synchronous: TypeAlias = Literal["NORMAL", "FULL"]

HELD: Final = 64 << 20  # octets of events that are held at most, or that a watch is behind
QUIET: Final = 1.0  # seconds without a write after which the file is tidied
UNTIDY: Final = 100  # writes from which on that is worth it
IDLE: Final = 10.0  # seconds without an event after which a watch says so
RETRY_AFTER: Final = 1  # seconds, told to who asks for a revision that is still to come

NO_LABELS: Final[Mapping[str, str]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Stored:
    """One version of one object.

    revision -- its resourceVersion
    labels   -- for selectors, so that a list need not parse what it leaves out
    body     -- the object as JSON, resourceVersion included
    """

    key: Key
    uid: str
    revision: int
    labels: Mapping[str, str]
    body: bytes

    @property
    def obj(self) -> Obj:
        """A fresh copy, the caller's to change."""
        decoded: Obj = msgspec.json.decode(self.body)
        return decoded


@dataclass(frozen=True, slots=True)
class Event:
    """One change. stored -- the new version; for DELETED the last one, with the revision of
    the deletion. before -- the version before, None for ADDED: a selector may have matched
    one and not the other."""

    type: EventType
    stored: Stored
    before: Stored | None


@dataclass(frozen=True, slots=True)
class Put:
    """A write. expected -- revision the object must still have; 0: it must not exist; None:
    whatever is there. obj -- without resourceVersion, the store gives it."""

    key: Key
    obj: Obj
    expected: int | None = None

    def holds(self, found: Stored | None) -> bool:
        if self.expected is None:
            return True
        return self.expected == (found.revision if found is not None else 0)

    def event(self, revision: int, before: Stored | None) -> Event:
        after = _version(self.key, revision, self.obj)
        return Event("ADDED" if before is None else "MODIFIED", after, before)


@dataclass(frozen=True, slots=True)
class Delete:
    """A removal; expected as in Put (never 0). What is not there cannot be removed: Conflicted."""

    key: Key
    expected: int | None = None

    def holds(self, found: Stored | None) -> bool:
        return found is not None and self.expected in (None, found.revision)

    def event(self, revision: int, before: Stored | None) -> Event:
        assert before is not None  # it holds
        return Event("DELETED", _version(self.key, revision, before.obj), before)


class Conflicted(Exception):
    """An expectation did not hold. found -- what is there, None if nothing."""

    def __init__(self, key: Key, found: Stored | None) -> None:
        self.key, self.found = key, found
        super().__init__(f"{key}: is not the version expected")


class ObjectStore:
    """All objects. Belongs to one event loop.

    path        -- SQLite file; "": in memory only
    history     -- events kept for watches that resume, of all resources together; fewer of
                   huge objects
    synchronous -- what "durable" means: NORMAL survives the death of the process, FULL also
                   that of the machine
    """

    def __init__(
        self, path: str = "", *, history: int = 10_000, synchronous: Synchronous = "NORMAL"
    ) -> None:
        self._file = _File(path, synchronous) if path else None
        # The writer: whatever touches the file happens in this one thread.
        self._thread = ThreadPoolExecutor(1, "kdns-store") if path else None
        self._opened = False
        self._revision = 0
        self._objects: dict[Key, Stored] = {}
        self._sorted: defaultdict[str, _Sorted] = defaultdict(_Sorted)
        self._history = _History(history)
        self._watches: defaultdict[str, weakref.WeakSet[Watch]] = defaultdict(weakref.WeakSet)
        self._subscribers: dict[object, Callable[[Sequence[Event]], None]] = {}
        # What is accepted and not yet committed: the last revision given out, the writes that
        # wait for the next commit, and for each object the write that was accepted last.
        self._given = 0
        self._queue: list[_Write] = []
        self._ahead: dict[Key, _Write] = {}
        self._committing = False
        self._refusing = False
        self._untidy = 0  # writes since the file was tidied
        self._wrote = 0.0  # when, by the loop's clock
        self._tidying: asyncio.TimerHandle | None = None

    async def open(self) -> None:
        """Load what the file holds. Raises ConfigError for a file of a newer schema, one that
        is no store, or one that another process has open."""
        if self._file is not None:
            loop = asyncio.get_running_loop()
            self._revision, loaded = await loop.run_in_executor(self._thread, self._file.open)
            for one in loaded:
                self._objects[one.key] = one
                self._sorted[one.key[0]].append(one)
            self._given = self._revision
            self._history.begin(self._revision)
        self._opened = True

    async def close(self) -> None:
        """Finish what is being written; watches end, later writes get a 503."""
        self._opened = False
        if self._ahead:
            await asyncio.wait({write.settled for write in self._ahead.values()})
        for watches in self._watches.values():
            for one in list(watches):
                one.end()
        if self._tidying is not None:
            self._tidying.cancel()
        thread, self._thread = self._thread, None
        if self._file is not None and thread is not None:
            await asyncio.get_running_loop().run_in_executor(thread, self._file.close)
            thread.shutdown()

    @property
    def durable(self) -> bool:
        """True if a write waits for a file."""
        return self._file is not None

    @property
    def revision(self) -> int:
        """The newest committed revision."""
        return self._revision

    def check_revision(self, wanted: int) -> None:
        """Raise ApiError 504 Timeout for a revision that is still to come."""
        if wanted > self._revision:
            raise _too_large(wanted, self._revision)

    def get(self, key: Key) -> Stored | None:
        """Return an object as last committed."""
        return self._objects.get(key)

    def items(self, resource: str, namespace: str = "") -> Sequence[Stored]:
        """Return a resource's objects ordered by namespace and name; "": of all namespaces."""
        found = self._sorted.get(resource)
        return found.select(resource, namespace) if found is not None else []

    async def write(self, *changes: Put | Delete) -> list[Stored]:
        """Make the changes, all or none; return the new versions (of a Delete the last one)
        once they are durable. Raises Conflicted; ApiError(507) if the disk does not take it.

        Each change has its own revision. Who stops waiting does not stop the write.
        """
        write = await self._accept(changes)
        if write.events:
            if self._file is None:
                self._publish([write])
            else:
                refusal = await asyncio.shield(write.settled)
                if refusal is not None:
                    raise refusal
        return [one.stored for one in write.events]

    def subscribe(self, tell: Callable[[Sequence[Event]], None]) -> Callable[[], None]:
        """Call `tell` with the events of each commit, in order; return what ends it."""
        token = object()
        self._subscribers[token] = tell

        def end() -> None:
            self._subscribers.pop(token, None)

        return end

    def watch(self, resource: str, since: int, *, limit: int = 10_000, idle: float = IDLE) -> Watch:
        """Yield the events of a resource after revision `since`, batch by batch, for ever; an
        empty batch says that nothing came for `idle` seconds (time for a bookmark: the reader
        has seen everything up to `revision`). Ends when the reader is `limit` events, or HELD
        octets, behind (it must list again), not counting what it asked for at the start.

        Events count from the call on, not from the first read, and the call itself raises:
        ApiError 410 Expired if events after `since` are no longer held, 504 Timeout if `since`
        is still to come. All watches of a resource get the same Event objects.
        """
        self.check_revision(since)
        held = self._history.after(resource, since)
        watch = Watch(held, limit, idle)
        if self._opened:
            self._watches[resource].add(watch)
        else:
            watch.end()
        return watch

    # Accepting: expectations are checked against what was accepted before.

    async def _accept(self, changes: Sequence[Put | Delete]) -> _Write:
        """Stage the changes and queue them. Raises Conflicted."""
        while True:
            if not self._opened:
                raise ApiError(503, "ServiceUnavailable", "the store is not open")
            try:
                return self._stage(changes)
            except Conflicted as refusal:
                met = self._ahead.get(refusal.key)
                if met is None:
                    raise
                # Nobody is refused for a version that may never be: wait for its commit. If
                # that failed, the expectation may hold after all.
                if await asyncio.shield(met.settled) is None:
                    raise

    def _stage(self, changes: Sequence[Put | Delete]) -> _Write:
        staged: dict[Key, Stored | None] = {}
        events: list[Event] = []
        for revision, change in enumerate(changes, self._given + 1):
            key = change.key
            found = staged[key] if key in staged else self._accepted(key)
            if not change.holds(found):
                raise Conflicted(key, found)
            event = change.event(revision, found)
            staged[key] = _left_by(event)
            events.append(event)
        # From here on nothing fails. A revision given out is never given again, also if its
        # commit fails.
        self._given += len(events)
        write = _Write(events, staged, asyncio.get_running_loop().create_future())
        if self._file is not None and events:
            self._enqueue(write)
        return write

    def _accepted(self, key: Key) -> Stored | None:
        ahead = self._ahead.get(key)
        return ahead.staged[key] if ahead is not None else self._objects.get(key)

    def _enqueue(self, write: _Write) -> None:
        self._queue.append(write)
        self._ahead.update(dict.fromkeys(write.staged, write))
        if not self._committing:
            self._committing = True
            # Soon and not now: what else is written in this turn of the loop comes along.
            asyncio.get_running_loop().call_soon(self._commit_queued)

    # Committing.

    # Callbacks and no task: a loop that ends cancels its tasks, and then nobody would learn
    # what became of the commit that runs.

    def _commit_queued(self) -> None:
        assert self._file is not None
        batch, self._queue = self._queue, []
        events = [event for write in batch for event in write.events]
        loop = asyncio.get_running_loop()
        running = loop.run_in_executor(self._thread, self._file.commit, events)
        running.add_done_callback(lambda done: self._committed(batch, done.exception()))

    def _committed(self, batch: Sequence[_Write], error: BaseException | None) -> None:
        if error is None:
            self._publish(batch)
        else:
            self._refuse(batch, error)
        self._committing = bool(self._queue)
        if self._queue:
            self._commit_queued()
        self._untidy += len(batch)
        loop = asyncio.get_running_loop()
        self._wrote = loop.time()
        if self._untidy >= UNTIDY and self._tidying is None:
            self._tidying = loop.call_later(QUIET, self._tidy)

    def _tidy(self) -> None:
        """Have the file put in order while nobody waits for it."""
        self._tidying = None
        if self._thread is None or self._file is None:
            return
        loop = asyncio.get_running_loop()
        if self._committing or loop.time() - self._wrote < QUIET:
            self._tidying = loop.call_later(QUIET, self._tidy)
        else:
            self._untidy = 0
            loop.run_in_executor(self._thread, self._file.tidy)

    def _refuse(self, batch: Iterable[_Write], error: BaseException) -> None:
        """Forget a batch whose commit failed, and what was built upon it; the rest of the
        queue stays."""
        if not self._refusing:  # once, and not for each try while the disk is full
            self._refusing = True
            unforeseen = None if isinstance(error, sqlite3.Error) else error
            log.error("%s; until that passes, writes are refused", _unwritten(error))
            if unforeseen is not None:
                log.error("that was not foreseen", exc_info=unforeseen)
        refused = list(batch)
        lost = {key for write in refused for key in write.staged}
        kept: list[_Write] = []
        for write in self._queue:
            if lost.isdisjoint(write.staged):
                kept.append(write)
            else:
                refused.append(write)
                lost.update(write.staged)
        self._queue = kept
        self._ahead = {key: write for write in kept for key in write.staged}
        for write in refused:
            write.settled.set_result(_unwritten(error))

    def _publish(self, batch: Iterable[_Write]) -> None:
        """Make a committed batch visible, tell it, acknowledge it."""
        if self._refusing:
            self._refusing = False
            log.info("the store can be written again")
        events = [event for write in batch for event in write.events]
        by_resource: defaultdict[str, list[Event]] = defaultdict(list)
        for event in events:
            self._install(event)
            self._history.add(event)
            by_resource[event.stored.key[0]].append(event)
        self._revision = events[-1].stored.revision
        for write in batch:
            for key in write.staged:
                if self._ahead.get(key) is write:
                    del self._ahead[key]
        for resource, told in by_resource.items():
            self._tell_watches(resource, tuple(told))
        self._tell_subscribers(events)
        for write in batch:
            write.settled.set_result(None)

    def _install(self, event: Event) -> None:
        one = event.stored
        if event.type == "DELETED":
            del self._objects[one.key]
            self._sorted[one.key[0]].remove(one.key)
        else:
            self._objects[one.key] = one
            self._sorted[one.key[0]].put(one)

    def _tell_watches(self, resource: str, events: Sequence[Event]) -> None:
        watches = self._watches.get(resource)
        if watches is None:
            return
        octets = sum(len(event.stored.body) for event in events)
        for watch in list(watches):
            watch.push(events, octets)
            if watch.ended:
                watches.discard(watch)

    def _tell_subscribers(self, events: Sequence[Event]) -> None:
        for tell in list(self._subscribers.values()):
            try:
                tell(events)
            except Exception:
                # The commit stands; the next subscriber and the writer are to hear of it.
                log.exception("a subscriber of the store failed")


class Watch(AsyncIterator[Sequence[Event]]):
    """The events of one resource for one reader, see ObjectStore.watch().

    One that nobody holds any more is forgotten; aclose() ends it earlier.
    """

    __slots__ = (
        "__weakref__", "_batches", "_behind", "_due", "_idle", "_limit", "_octets", "_quiet",
        "_timer", "_waiter", "ended",
    )  # fmt: skip

    def __init__(self, held: Sequence[Event], limit: int, idle: float) -> None:
        self._batches: list[Sequence[Event]] = [held] if held else []
        self._behind = 0  # events in _batches, without `held`
        self._octets = 0  # of these
        self._limit = limit
        self._idle = idle
        self._quiet = False  # `idle` seconds have passed since the last batch
        self._due = asyncio.get_running_loop().time() + idle
        self._timer: asyncio.TimerHandle | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.ended = False

    def push(self, events: Sequence[Event], octets: int) -> None:
        """Add a commit's events; too many, and the watch ends and lets go of all of them.
        octets -- of their objects"""
        # Huge ones wait for a reader that had nothing to read.
        late = bool(self._batches) and self._octets + octets > HELD
        self._behind += len(events)
        self._octets += octets
        if self._behind > self._limit or late:
            self._batches.clear()
            self.end()
        else:
            self._batches.append(events)
            self._wake()

    def end(self) -> None:
        """No more will come; what came is still read."""
        self.ended = True
        self._wake()

    async def aclose(self) -> None:
        self._batches.clear()
        self._stop_timer()
        self.end()

    def __aiter__(self) -> Watch:
        return self

    async def __anext__(self) -> Sequence[Event]:
        while not (self._batches or self.ended or self._quiet):
            await self._wait()
        if self.ended and not self._batches:
            self._stop_timer()
            raise StopAsyncIteration
        batches, self._batches = self._batches, []
        self._behind = self._octets = 0
        self._quiet = False
        self._due = asyncio.get_running_loop().time() + self._idle
        if len(batches) == 1:
            return batches[0]
        return tuple(event for batch in batches for event in batch)

    async def _wait(self) -> None:
        if self._waiter is not None:
            raise RuntimeError("a watch has one reader")
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        # One timer an idle period and not one a batch: with 1,000 watches the latter costs
        # as much as all the rest.
        if self._timer is None:
            self._timer = loop.call_at(self._due, _tick, weakref.ref(self))
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _when_due(self) -> None:
        self._timer = None
        if self._waiter is None:
            return  # the next wait sets it again
        loop = asyncio.get_running_loop()
        if loop.time() < self._due:
            self._timer = loop.call_at(self._due, _tick, weakref.ref(self))
        else:
            self._quiet = True
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _tick(watch: weakref.ref[Watch]) -> None:
    """Hold no watch just for its timer."""
    there = watch()
    if there is not None:
        there._when_due()


@dataclass(slots=True, eq=False)
class _Write:
    """What one write() does.

    staged  -- what it leaves of each object
    settled -- None when committed, else what its writer is to be told
    """

    events: Sequence[Event]
    staged: Mapping[Key, Stored | None]
    settled: asyncio.Future[ApiError | None]


class _Sorted:
    """A resource's objects by namespace and name: two lists side by side, because a slice of
    10,000 costs microseconds, and an insertion moves 80 kB at most."""

    __slots__ = ("_keys", "_versions")

    def __init__(self) -> None:
        self._keys: list[Key] = []
        self._versions: list[Stored] = []

    def append(self, one: Stored) -> None:
        """Add what comes after all others."""
        self._keys.append(one.key)
        self._versions.append(one)

    def put(self, one: Stored) -> None:
        at = bisect_left(self._keys, one.key)
        if at < len(self._keys) and self._keys[at] == one.key:
            self._versions[at] = one
        else:
            self._keys.insert(at, one.key)
            self._versions.insert(at, one)

    def remove(self, key: Key) -> None:
        at = bisect_left(self._keys, key)
        del self._keys[at], self._versions[at]

    def select(self, resource: str, namespace: str) -> list[Stored]:
        if not namespace:
            return self._versions[:]
        first = bisect_left(self._keys, (resource, namespace, ""))
        after = bisect_left(self._keys, (resource, namespace + "\0", ""), first)
        return self._versions[first:after]


class _History:
    """The newest events, `size` and HELD octets at most, for watches that resume.

    A resource's watches need its own events only: one that changes often costs the others
    their past, but a watch is refused only if events of its own resource are gone.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._begun = 0
        self._order: deque[str] = deque()  # the resource of each event held
        self._events: defaultdict[str, deque[Event]] = defaultdict(deque)
        self._dropped: dict[str, int] = {}  # revision of the newest event no longer held
        self._octets = 0

    def begin(self, revision: int) -> None:
        """Nothing is known of what happened up to `revision`."""
        self._begun = revision

    def add(self, event: Event) -> None:
        resource = event.stored.key[0]
        self._order.append(resource)
        self._events[resource].append(event)
        self._octets += len(event.stored.body)
        while len(self._order) > self._size or self._octets > HELD:
            oldest = self._order.popleft()
            gone = self._events[oldest].popleft().stored
            self._octets -= len(gone.body)
            self._dropped[oldest] = gone.revision

    def after(self, resource: str, since: int) -> Sequence[Event]:
        """Raises ApiError 410 if some of them are gone."""
        floor = self._dropped.get(resource, self._begun)
        if since < floor:
            raise expired(f"too old resource version: {since} ({floor})")
        found: list[Event] = []
        for event in reversed(self._events.get(resource, ())):
            if event.stored.revision <= since:
                break
            found.append(event)
        found.reverse()
        return found


# "kdns" in the file's header says that it is ours, user_version how it is laid out.
_APPLICATION: Final = int.from_bytes(b"kdns", "big")
_SCHEMA: Final = 1
# A commit is one statement: Python's lock is let go of once for all of it. With a statement
# an object, and transactions around them, each would wait for the lock anew, up to 5 ms
# while the event loop is busy. So the newest revision, which outlives the objects, is a row
# among them, and a deletion a row without a body.
_TABLES: Final = (
    """CREATE TABLE objects (
        resource TEXT NOT NULL, namespace TEXT NOT NULL, name TEXT NOT NULL,
        revision INTEGER NOT NULL, body BLOB,
        PRIMARY KEY (resource, namespace, name))""",
    """CREATE TRIGGER deleted AFTER UPDATE ON objects WHEN new.body IS NULL
        BEGIN DELETE FROM objects WHERE rowid = new.rowid; END""",
    "INSERT INTO objects VALUES ('', '', '', 0, x'')",
)
_WRITE: Final = """INSERT INTO objects VALUES {rows} ON CONFLICT DO UPDATE
    SET revision = excluded.revision, body = excluded.body"""
# Pages of the log (4 KiB each) after which a commit moves them to their place, and waits for
# the disk: ten milliseconds and more, so it is left to tidy() where that gets a chance.
_LOG: Final = 8000
# Rows a statement at most: 5 variables each, of 32,766 (SQLite limits, 9).
_ROWS: Final = 4096
_COUNTER: Final = "SELECT revision FROM objects WHERE resource = ''"
_LOAD: Final = """SELECT resource, namespace, name, revision, body FROM objects
    WHERE resource != '' ORDER BY resource, namespace, name"""

_Row: TypeAlias = tuple[str, str, str, int, bytes | None]


class _File:
    """The SQLite file: called in the writer thread only."""

    def __init__(self, path: str, synchronous: Synchronous) -> None:
        self._path = path
        self._synchronous = synchronous
        self._db: sqlite3.Connection | None = None

    def open(self) -> tuple[int, list[Stored]]:
        """Return the newest revision and all objects in order. Raises ConfigError."""
        try:
            self._create_private()
            # timeout 0: who holds the file holds it until it ends.
            db = sqlite3.connect(os.path.abspath(self._path), timeout=0, isolation_level=None)
            try:
                self._prepare(db)
                loaded = self._load(db)
            except BaseException:
                db.close()
                raise
        except (sqlite3.Error, OSError) as error:
            raise self._problem(_unopened(error)) from error
        self._db = db
        return loaded

    def _create_private(self) -> None:
        """Make the file if there is none: it will hold Secrets, so it is its owner's only."""
        # A file that is there is not even opened: to close it would drop the locks that a
        # store in this process holds on it (fcntl(2), advisory record locking).
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))

    def _prepare(self, db: sqlite3.Connection) -> None:
        """Check that the file is ours before a byte of it changes; take it for us alone."""
        # Also spares the -shm file. The lock goes with the process, however that ends.
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        application = _one(db, "PRAGMA application_id")
        version = _one(db, "PRAGMA user_version")
        empty = not (application or version or _one(db, "SELECT count(*) FROM sqlite_master"))
        if not empty:
            self._check(application, version)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(f"PRAGMA synchronous = {self._synchronous}")
        db.execute(f"PRAGMA wal_autocheckpoint = {_LOG}")
        db.execute("BEGIN IMMEDIATE")  # fails at once where nothing may be written
        if empty:
            for statement in _TABLES:
                db.execute(statement)
            db.execute(f"PRAGMA application_id = {_APPLICATION}")
            db.execute(f"PRAGMA user_version = {_SCHEMA}")
        db.execute("COMMIT")

    def _check(self, application: int, version: int) -> None:
        if application != _APPLICATION:
            raise self._problem("an SQLite file of another program, not a store of kdns")
        if version > _SCHEMA:
            raise self._problem(
                f"written by a newer kdns (schema {version}; this one knows {_SCHEMA}): "
                "use that kdns, or another file"
            )
        if version < _SCHEMA:  # there has been none before the first
            raise self._problem(f"damaged: there is no schema {version}")

    def _load(self, db: sqlite3.Connection) -> tuple[int, list[Stored]]:
        revision = _one(db, _COUNTER)
        loaded: list[Stored] = []
        for resource, namespace, name, version, body in db.execute(_LOAD):
            try:
                head = _HEAD.decode(body)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                where = f"{resource} {namespace}/{name}"
                raise self._problem(f"damaged: {where} is not an object: {error}") from error
            # The same few words in thousands of keys.
            key = (sys.intern(resource), sys.intern(namespace), name)
            labels = head.metadata.labels or NO_LABELS
            loaded.append(Stored(key, head.metadata.uid, version, labels, body))
        return revision, loaded

    def commit(self, events: Sequence[Event]) -> None:
        """Make the events durable, all or none. Raises sqlite3.Error."""
        assert self._db is not None
        rows = _rows(events)
        if len(rows) <= _ROWS:
            self._write(rows)
            return
        try:
            self._db.execute("BEGIN IMMEDIATE")
            for first in range(0, len(rows), _ROWS):
                self._write(rows[first : first + _ROWS])
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # SQLite itself rolls back after some errors
                self._db.execute("ROLLBACK")
            raise

    def _write(self, rows: list[_Row]) -> None:
        assert self._db is not None
        # As many rows as the next power of two, so that a dozen statements are all there
        # are to compile; to say the last row again changes nothing.
        count = 1 << (len(rows) - 1).bit_length()
        padded = rows + rows[-1:] * (count - len(rows))
        statement = _WRITE.format(rows=",".join(["(?,?,?,?,?)"] * count))
        self._db.execute(statement, [value for row in padded for value in row])

    def tidy(self) -> None:
        """Move what the log holds to its place. If that fails, the log still holds it."""
        if self._db is not None:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def _problem(self, text: str) -> ConfigError:
        return ConfigError([Problem(self._path, 0, text)])


class _Metadata(msgspec.Struct):
    uid: str = ""
    labels: dict[str, str] | None = None


class _Head(msgspec.Struct):
    """What Stored keeps beside the body."""

    metadata: _Metadata


_HEAD: Final = msgspec.json.Decoder(_Head)


def _version(key: Key, revision: int, obj: Obj) -> Stored:
    metadata = obj.get("metadata") or {}
    numbered = {**obj, "metadata": {**metadata, "resourceVersion": str(revision)}}
    labels = metadata.get("labels")
    return Stored(
        key,
        metadata.get("uid", ""),
        revision,
        dict(labels) if labels else NO_LABELS,
        msgspec.json.encode(numbered),
    )


def _rows(events: Sequence[Event]) -> list[_Row]:
    """What is to be written for some events: of several versions of an object only the last
    can be read again, and what came and went leaves nothing. The last row is the counter's."""
    first: dict[Key, Event] = {}
    last: dict[Key, Event] = {}
    for event in events:
        first.setdefault(event.stored.key, event)
        last[event.stored.key] = event
    rows: list[_Row] = []
    for key, event in last.items():
        if event.type != "DELETED":
            rows.append((*key, event.stored.revision, event.stored.body))
        elif first[key].before is not None:
            rows.append((*key, event.stored.revision, None))
    rows.append(("", "", "", events[-1].stored.revision, b""))
    return rows


def _left_by(event: Event) -> Stored | None:
    return None if event.type == "DELETED" else event.stored


def _one(db: sqlite3.Connection, query: str) -> int:
    row = db.execute(query).fetchone()
    if row is None:
        raise sqlite3.DatabaseError(f"damaged: nothing answers {query!r}")
    return int(row[0])


def _too_large(since: int, current: int) -> ApiError:
    """As upstream, whose clients look for the cause and try again."""
    text = f"Too large resource version: {since}, current: {current}"
    cause = {"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}
    details: dict[str, object] = {"causes": [cause], "retryAfterSeconds": RETRY_AFTER}
    return ApiError(504, "Timeout", f"Timeout: {text}", details)


# What SQLite's primary error codes mean for who operates us.
_NOT_TAKEN: Final = frozenset(
    {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN}
)
_UNOPENED: Final[Mapping[int, str]] = {
    sqlite3.SQLITE_BUSY: "another process has it open: end that one, or use another file",
    sqlite3.SQLITE_NOTADB: "not a store of kdns, nor any SQLite file",
    sqlite3.SQLITE_CORRUPT: "damaged: restore it, or use another file",
    sqlite3.SQLITE_READONLY: "cannot be written: a store needs a file and folder of its own",
    sqlite3.SQLITE_FULL: "cannot be written: no space is left on the disk",
}


def _code(error: BaseException) -> int:
    """SQLite's primary code; the extended one stands in the higher octets."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def _unwritten(error: BaseException) -> ApiError:
    text = f"the store cannot be written: {error}"
    if _code(error) in _NOT_TAKEN:
        return ApiError(507, "InsufficientStorage", text)
    return ApiError(500, "InternalError", text)


def _unopened(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"cannot be opened: {error.strerror}"
    return _UNOPENED.get(_code(error), f"cannot be opened: {error}")
