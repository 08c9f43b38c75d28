"""One kind's list and watch as a state machine: what to ask next, what an answer means.

Does no I/O and reads no clock: source/kube.py carries out the Requests and Pauses that
next() gives, and hands back what happened together with the time; every on_ method returns
what the registry shall be told. The protocol is Kubernetes' ("API Concepts": efficient
detection of changes, retrieving large sets in chunks, streaming lists KEP-3157, watch
bookmarks KEP-956).

    WATCH_LIST --end of initial events--> WATCH      410: back to WATCH_LIST or LIST
        |  refused or ignored                        anything else: again from the last
        v                                            resourceVersion, with back-off
      LIST --last page--> WATCH
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

from kdns.errors import Denied, Expired, ObjectError, SourceError, Unreachable
from kdns.registry.decode import Event, broken_key, decode_event, decode_parts, decode_status
from kdns.registry.objects import Key, Kind, Object, key_of

PAGE = 500  # objects a page, as client-go (reference 1.16)
MAX_PAGES = 100_000  # 50 million objects: a server that never ends a list is broken
MAX_LINE = 16 << 20  # octets of a watch line; etcd takes objects of 1.5 MiB
MAX_RETRY_AFTER = 300.0  # seconds; a server that asks for more is asked again anyway


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds. The defaults are for production; tests shorten them.

    first, most   -- back-off: of the first failure and at most
    settled       -- a watch that lived so long ends the back-off
    watch         -- a watch is asked to end after a random time in this range
    margin        -- what is granted to the server to end it
    quiet         -- a watch without a byte for so long counts as half-open; bookmarks come
                     about every minute
    initial_quiet -- as `quiet` while the initial objects of a WatchList stream in: a server
                     that ignores sendInitialEvents never says where they end; well below
                     the 5 s that a start waits for the registry
    initial       -- all of that at most
    connect, list -- until a connection stands, until a page was read
    """

    first: float = 0.8
    most: float = 30.0
    settled: float = 10.0
    watch: tuple[int, int] = (290, 590)
    margin: float = 20.0
    quiet: float = 90.0
    initial_quiet: float = 3.0
    initial: float = 120.0
    connect: float = 10.0
    list: float = 60.0


@dataclass(frozen=True, slots=True)
class Request:
    """GET the kind's path with `params`.

    watch -- True: hand every chunk to on_chunk(); False: the whole body to on_page()
    total -- seconds for all of it; quiet: seconds without a byte
    """

    params: tuple[tuple[str, str], ...]
    watch: bool
    total: float
    quiet: float


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait before the next request."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Replace:
    """All objects there are; those in `keep` are there but broken."""

    objects: list[Object]
    keep: frozenset[Key]


@dataclass(frozen=True, slots=True)
class Apply:
    """One object was ADDED, MODIFIED or DELETED."""

    event: str
    obj: Object


@dataclass(frozen=True, slots=True)
class Skipped:
    """One object cannot be used."""

    error: ObjectError


@dataclass(frozen=True, slots=True)
class Failed:
    """A request failed; the next comes in `retry_in` seconds."""

    error: SourceError
    retry_in: float


Emit: TypeAlias = Replace | Apply | Skipped | Failed


class Phase(Enum):
    WATCH_LIST = 1
    LIST = 2
    WATCH = 3


@dataclass(slots=True)
class _Listing:
    """What has come of a list so far."""

    objects: dict[Key, Object] = field(default_factory=dict)
    keep: set[Key] = field(default_factory=set)
    following: str = ""
    pages: int = 0


class Reflector:
    """The state of one kind's list and watch.

    selectors -- labelSelector, fieldSelector parameters of every request
    rng       -- where jitter comes from
    """

    def __init__(
        self,
        kind: Kind,
        rng: random.Random,
        timing: Timing = Timing(),
        selectors: Iterable[tuple[str, str]] = (),
    ) -> None:
        self.kind = kind
        self._rng = rng
        self._timing = timing
        self._selectors = tuple(selectors)
        self._phase = Phase.WATCH_LIST
        self._streaming = True  # the server takes sendInitialEvents, as far as we know
        self._whole = False  # list without pages: their continue token expired before
        self._listed = False  # a first list may come from the server's cache (version 0)
        self._version = ""
        self._listing = _Listing()
        self._failures = 0  # in a row, without a settled watch between them
        self._delay = 0.0
        self._opened: float | None = None
        self._parts: list[bytes] = []  # the line that has not ended yet
        self._held = 0
        self.leave = False  # nothing more is wanted of this response: close it

    # --- what to do -------------------------------------------------------------------

    def next(self) -> Request | Pause:
        """Return the next step. Every Request is followed by on_opened and then on_page, or
        on_chunk and one of on_eof, on_quiet, on_failure; or at once by one of the latter or
        on_refused."""
        if self._delay > 0:
            seconds, self._delay = self._delay, 0.0
            return Pause(seconds)
        self._opened = None
        self._parts, self._held = [], 0
        self.leave = False
        timing = self._timing
        if self._phase is Phase.LIST:
            return Request(self._list_params(), False, timing.list, timing.list)
        seconds = self._rng.randint(*timing.watch)
        params: tuple[tuple[str, str], ...] = (
            ("watch", "true"),
            ("allowWatchBookmarks", "true"),
            ("timeoutSeconds", str(seconds)),
        )
        if self._phase is Phase.WATCH:
            params += (("resourceVersion", self._version),)
        else:
            self._listing = _Listing()
            params += (("sendInitialEvents", "true"), ("resourceVersionMatch", "NotOlderThan"))
        return Request(params + self._selectors, True, seconds + timing.margin, self.quiet)

    @property
    def quiet(self) -> float:
        """Seconds that a watch may be without a byte as things are."""
        timing = self._timing
        return timing.quiet if self._phase is Phase.WATCH else timing.initial_quiet

    def _list_params(self) -> tuple[tuple[str, str], ...]:
        params: tuple[tuple[str, str], ...] = ()
        if not self._whole:
            params += (("limit", str(PAGE)),)
        if self._listing.following:
            params += (("continue", self._listing.following),)
        elif not self._listed:
            params += (("resourceVersion", "0"),)
        return params + self._selectors

    # --- what happened ----------------------------------------------------------------

    def on_opened(self, now: float) -> None:
        """The server began to answer with 200."""
        self._opened = now

    def on_page(self, body: bytes) -> list[Emit]:
        """A list request was answered in full."""
        return [emit for emits in self.reading(body) for emit in emits]

    def reading(self, body: bytes) -> Iterator[list[Emit]]:
        """As on_page(), in parts: a long page takes longer than answers may wait."""
        listing = self._listing
        try:
            for page in decode_parts(self.kind, body):
                listing.keep.update(broken_key(error) for error in page.errors)
                listing.objects.update((key_of(obj), obj) for obj in page.objects)
                yield [Skipped(error) for error in page.errors]
            if not page.resource_version:
                raise Unreachable(f"the list of {self.kind} has no resourceVersion")
            listing.pages += 1
            if listing.pages > MAX_PAGES or (
                page.following and page.following == listing.following
            ):
                raise Unreachable(f"the list of {self.kind} never ends")
        except SourceError as e:
            yield self._list_again(e)
            return
        listing.following = page.following
        if not page.following:
            self._version = page.resource_version
            yield [self._end_of_list()]

    def on_chunk(self, chunk: bytes, now: float) -> list[Emit]:
        """Bytes of a watch came in. Look at `leave` afterwards."""
        self._settle(now)
        end = chunk.rfind(b"\n")
        if end < 0:
            self._parts.append(chunk)
            self._held += len(chunk)
            if self._held > MAX_LINE:
                return self._list_again(
                    Unreachable(f"a line of watch {self.kind} is over {MAX_LINE} octets")
                )
            return []
        lines = b"".join((*self._parts, chunk[:end])).split(b"\n")
        self._parts = [chunk[end + 1 :]]
        self._held = len(chunk) - end - 1
        out: list[Emit] = []
        for line in lines:
            if line and not self.leave:
                self._on_line(line, now, out)
        return out

    def on_eof(self, now: float) -> list[Emit]:
        """The server ended the stream in order; half a line at its end is let go, for the
        next watch brings it again."""
        self._settle(now)
        return self._on_end(now, "ended")

    def on_quiet(self, now: float) -> list[Emit]:
        """Nothing came for the request's `quiet` seconds, or it is over its `total`."""
        self._settle(now)
        if self._phase is Phase.WATCH_LIST:
            return self._stop_streaming()
        return self._on_end(now, "was silent")

    def on_failure(self, error: SourceError, now: float) -> list[Emit]:
        """The connection could not be made, or broke."""
        self._settle(now)
        return self._fail(error)

    def on_refused(self, status: int, body: bytes, retry_after: float | None) -> list[Emit]:
        """The server answered with another status than 200."""
        error = decode_status(body, status, retry_after)
        if isinstance(error, Expired):
            return self._on_expired(error)
        # A 4xx that another request may not meet: the parameters are at fault.
        if 400 <= status < 500 and status != 429 and not isinstance(error, Denied):
            if self._phase is Phase.WATCH_LIST:
                return self._stop_streaming()
            return self._list_again(error)
        if self._phase is Phase.WATCH_LIST and status >= 500 and self._failures >= 2:
            self._streaming = False  # perhaps it is the streaming that it fails at
            return self._list_again(error)
        return self._fail(error)

    # --- one line ---------------------------------------------------------------------

    def _on_line(self, line: bytes, now: float, out: list[Emit]) -> None:
        try:
            event = decode_event(self.kind, line)
        except Unreachable as e:
            out += self._list_again(e)
            return
        if event.type == "ERROR":
            assert isinstance(event.error, SourceError)
            out += (
                self._on_expired(event.error)
                if isinstance(event.error, Expired)
                else self._fail(event.error)
            )
            return
        if event.type == "BOOKMARK" and self._went_back(event.resource_version):
            # A control plane restored from a backup: a watch from our version would be
            # silent until the new history has grown past it.
            out += self._on_expired(
                Expired(
                    f"resourceVersion of {self.kind} went back from {self._version}"
                    f" to {event.resource_version}"
                )
            )
            return
        if isinstance(event.error, ObjectError):
            out.append(Skipped(event.error))
        if self._phase is Phase.WATCH:
            if event.obj is not None:
                out.append(Apply(event.type, event.obj))
        else:
            self._on_initial(event, now, out)
        if event.resource_version and not self.leave:
            self._version = event.resource_version

    def _on_initial(self, event: Event, now: float, out: list[Emit]) -> None:
        listing = self._listing
        if event.type == "BOOKMARK":
            if event.end_of_initial:
                out.append(self._end_of_list())
            else:  # a server that knows sendInitialEvents sends none before the end
                out += self._stop_streaming()
        elif event.obj is None:
            assert isinstance(event.error, ObjectError)
            listing.keep.add(broken_key(event.error))
        elif event.type == "DELETED":
            listing.objects.pop(key_of(event.obj), None)
        else:
            listing.objects[key_of(event.obj)] = event.obj
        if (
            self._phase is Phase.WATCH_LIST
            and self._opened is not None
            and now - self._opened > self._timing.initial
        ):
            out += self._stop_streaming()

    def _went_back(self, version: str) -> bool:
        return (
            self._phase is Phase.WATCH
            and version.isdecimal()
            and self._version.isdecimal()
            and int(version[:40]) < int(self._version[:40])
        )

    # --- transitions ------------------------------------------------------------------

    def _end_of_list(self) -> Replace:
        listing, self._listing = self._listing, _Listing()
        self._phase = Phase.WATCH
        self._listed = True
        self._whole = False
        return Replace(list(listing.objects.values()), frozenset(listing.keep))

    def _stop_streaming(self) -> list[Emit]:
        """The server does not do WatchList: list by pages from now on, at once."""
        self._streaming = False
        self._start_list()
        return []

    def _start_list(self) -> None:
        self.leave = True
        self._listing = _Listing()
        self._version = ""
        self._phase = Phase.WATCH_LIST if self._streaming else Phase.LIST

    def _list_again(self, error: SourceError) -> list[Emit]:
        """What was heard cannot be relied on: list anew, after a pause."""
        self._start_list()
        return self._fail(error)

    def _on_expired(self, error: SourceError) -> list[Emit]:
        if self._phase is Phase.LIST:
            # The continue token is too old; the second time the list comes in one piece.
            self._whole = self._listing.pages > 0 and self._failures > 0
        first = self._failures == 0
        self._listed = True  # version 0 may be as old as what has just expired
        self._start_list()
        out = self._fail(error)
        if first:  # a lost place is no outage: go on at once, but not in a circle
            self._delay = 0.0
            return [Failed(error, 0.0)]
        return out

    def _on_end(self, now: float, how: str) -> list[Emit]:
        if self._phase is Phase.WATCH_LIST:
            self._streaming = False
            return self._list_again(
                Unreachable(f"watch {self.kind} {how} before all objects had been sent")
            )
        if self._phase is Phase.WATCH and self._is_settled(now):
            return []
        if self._opened is None or self._phase is Phase.LIST:
            text = f"no answer to {'list' if self._phase is Phase.LIST else 'watch'} {self.kind}"
        else:
            text = f"watch {self.kind} {how} after {now - self._opened:.1f} s"
        return self._fail(Unreachable(text))

    def _settle(self, now: float) -> None:
        if self._failures and self._phase is Phase.WATCH and self._is_settled(now):
            self._failures = 0

    def _is_settled(self, now: float) -> bool:
        return self._opened is not None and now - self._opened >= self._timing.settled

    def _fail(self, error: SourceError) -> list[Emit]:
        self.leave = True
        # Jitter so that the nodes of a cluster do not come back all at once.
        ceiling = min(self._timing.most, self._timing.first * 2 ** min(self._failures + 1, 30))
        self._delay = ceiling * self._rng.uniform(0.5, 1.0)
        retry_after = error.retry_after if isinstance(error, Unreachable) else None
        if retry_after is not None:
            asked = max(self._timing.first, min(retry_after, MAX_RETRY_AFTER))
            self._delay = asked * self._rng.uniform(1.0, 1.1)
        self._failures += 1
        return [Failed(error, self._delay)]
