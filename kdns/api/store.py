"""The objects of the embedded API: kept in memory, made durable in SQLite, told to watchers.

Decides versions, order and durability: one writer, group commit; what was acknowledged
survives the death of the process; resourceVersion never goes back. What may be written is
objects.py's.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

EventType: TypeAlias = Literal["ADDED", "MODIFIED", "DELETED"]
# Resource.qualified, namespace ("" for what has none), name.
Key: TypeAlias = tuple[str, str, str]
Obj: TypeAlias = dict[str, Any]


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
        raise NotImplementedError


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


@dataclass(frozen=True, slots=True)
class Delete:
    """A removal; expected as in Put (never 0)."""

    key: Key
    expected: int | None = None


class Conflicted(Exception):
    """An expectation did not hold. found -- what is there, None if nothing."""

    def __init__(self, key: Key, found: Stored | None) -> None:
        self.key, self.found = key, found
        super().__init__(f"{key}: is not the version expected")


class ObjectStore:
    """All objects. Belongs to one event loop.

    path     -- SQLite file; "": in memory only
    history  -- events kept for watches that resume
    """

    def __init__(self, path: str = "", *, history: int = 10_000) -> None:
        raise NotImplementedError

    async def open(self) -> None:
        """Load what the file holds. Raises ConfigError for a file of a newer schema, or that
        is no store."""
        raise NotImplementedError

    async def close(self) -> None:
        """Finish what is being written."""
        raise NotImplementedError

    @property
    def revision(self) -> int:
        """The newest committed revision."""
        raise NotImplementedError

    def get(self, key: Key) -> Stored | None:
        """Return an object as last committed."""
        raise NotImplementedError

    def items(self, resource: str, namespace: str = "") -> Sequence[Stored]:
        """Return a resource's objects ordered by namespace and name; "": of all namespaces."""
        raise NotImplementedError

    async def write(self, *changes: Put | Delete) -> list[Stored]:
        """Make the changes, all or none; return the new versions (of a Delete the last one)
        once they are durable. Raises Conflicted; ApiError(507) if the disk does not take it."""
        raise NotImplementedError

    def subscribe(self, tell: Callable[[Sequence[Event]], None]) -> Callable[[], None]:
        """Call `tell` with the events of each commit, in order; return what ends it."""
        raise NotImplementedError

    def watch(
        self, resource: str, since: int, *, limit: int = 10_000
    ) -> AsyncIterator[Sequence[Event]]:
        """Yield the events of a resource after revision `since`, batch by batch, for ever; an
        empty batch says that nothing came for a while (time for a bookmark). Raises ApiError
        410 Expired if events after `since` are no longer held, and ends when the reader is
        `limit` events behind (it must list again)."""
        raise NotImplementedError
