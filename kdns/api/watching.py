"""Watches of the embedded API: events as lines, for as long as somebody reads them.

Decides what a watch tells and when it ends. Which events there are is store.py's, how an
object looks answers.py's. Reference kubectl 2.4, 3.1; KEP-3157 for sendInitialEvents.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import Any, Final, TypeAlias

import msgspec
from aiohttp import HttpVersion11, web

from kdns.api import status
from kdns.api.answers import metadata_of, warn
from kdns.api.kinds import Resource
from kdns.api.negotiate import JSON, Accepted, Target, parse_accept, truth, whole
from kdns.api.objects import seen_as, selector_of
from kdns.api.store import Event, ObjectStore, Stored
from kdns.api.validation_service import ENDPOINTS_DEPRECATED
from kdns.errors import ApiError

# Of one write, so that others get their turn and a reader's buffer stays small.
MANY: Final = 500  # events
MUCH: Final = 256 << 10  # octets
WATCH_SECONDS: Final = (1800, 3600)  # how long a watch lasts that names no time-out
BOOKMARK_SECONDS: Final = 60.0
STUCK_SECONDS: Final = 60.0  # a watcher that takes nothing for so long is cut off
INITIAL_END: Final = "k8s.io/initial-events-end"  # KEP-3157

Dict: TypeAlias = dict[str, Any]


class Watches:
    """All open watches.

    table    -- makes a Table of one object
    patience -- seconds after which a watcher that takes nothing is cut off
    """

    def __init__(
        self, store: ObjectStore, table: Callable[..., Dict], patience: float = STUCK_SECONDS
    ) -> None:
        self._store = store
        self._table = table
        self._patience = patience
        self._open: set[asyncio.Task[Any]] = set()
        self._dropping: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._open)

    def drop(self) -> None:
        """Cut all of them, as a network that fails."""
        for task in list(self._open):
            self._dropping.add(task)
            task.cancel()

    async def serve(self, request: web.BaseRequest, target: Target) -> web.StreamResponse:
        query = request.query
        accepted = parse_accept(request.headers.get("Accept", ""), ("json", "table", "metadata"))
        fields = query.get("fieldSelector", "")
        if target.name:
            fields = f"metadata.name={target.name}" + (f",{fields}" if fields else "")
        chosen = selector_of(target.resource, query.get("labelSelector", ""), fields)
        initial = truth(query.get("sendInitialEvents", ""))
        if initial and query.get("resourceVersionMatch") != "NotOlderThan":
            raise bad_watch(
                "resourceVersionMatch",
                "Forbidden: sendInitialEvents requires setting resourceVersionMatch to"
                " NotOlderThan",
            )
        since = whole(query, "resourceVersion")
        stream = _Stream(
            self._table, request, target.resource, accepted,
            truth(query.get("allowWatchBookmarks", "")), self._patience,
        )  # fmt: skip
        seconds = whole(query, "timeoutSeconds") or random.uniform(*WATCH_SECONDS)
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            events = self._events(target, chosen, since, initial, stream)
            async with asyncio.timeout(seconds):
                await stream.open()
                async for lines in events:
                    await stream.send(lines)
        except TimeoutError:
            pass
        except ApiError as e:
            await stream.send([{"type": "ERROR", "object": status.status_of(e)}])
        except ConnectionError:
            return stream.response
        except asyncio.CancelledError:
            if task not in self._dropping:
                raise
            task.uncancel()
        finally:
            self._open.discard(task)
            self._dropping.discard(task)
        await stream.close()
        return stream.response

    async def _events(
        self,
        target: Target,
        chosen: Callable[[Stored], bool],
        since: int,
        initial: bool,
        stream: _Stream,
    ) -> AsyncIterator[Iterable[Dict | bytes]]:
        """Yield the lines of a watch, batch by batch, each to be read before the next: they are
        made as they are sent, for all together may be huge."""
        store, resource = self._store, target.resource
        from_start = since == 0 or initial
        there = []
        if from_start:
            # What is there comes first, as if it had just been made.
            items = store.items(resource.qualified, target.namespace)
            there = [one for one in items if chosen(one)]
            since = store.revision
        watch = store.watch(resource.qualified, since)
        yield (stream.line("ADDED", one) for one in there)
        del there
        if initial:
            yield [stream.bookmark(since, initial_end=True)]
        last_told = time.monotonic()
        async for batch in watch:
            yield self._lines(target, chosen, batch, stream)
            if stream.bookmarks and (now := time.monotonic()) - last_told >= BOOKMARK_SECONDS:
                last_told = now
                yield [stream.bookmark(store.revision)]

    @staticmethod
    def _lines(
        target: Target,
        chosen: Callable[[Stored], bool],
        batch: Sequence[Event],
        stream: _Stream,
    ) -> Iterator[Dict | bytes]:
        for event in batch:
            if target.namespace and event.stored.key[1] != target.namespace:
                continue
            kind = seen_as(event, chosen)
            if kind is not None:
                yield stream.line(kind, event.stored)


class _Stream:
    """One watch's answer: JSON lines in the form that was asked for."""

    def __init__(
        self,
        table: Callable[..., Dict],
        request: web.BaseRequest,
        resource: Resource,
        accepted: Accepted,
        bookmarks: bool,
        patience: float,
    ) -> None:
        self.bookmarks = bookmarks
        self.response = web.StreamResponse()
        self._table = table
        self._request = request
        self._resource = resource
        self._accepted = accepted
        self._patience = patience
        self._headers = True  # a Table's first rows tell its columns

    async def open(self) -> None:
        self.response.content_type = JSON
        self.response.headers["Cache-Control"] = "no-cache, private"
        if self._request.version >= HttpVersion11:
            self.response.enable_chunked_encoding()
        if self._resource.kind == "Endpoints":
            warn(self.response, ENDPOINTS_DEPRECATED)
        await self.response.prepare(self._request)

    async def send(self, lines: Iterable[Dict | bytes]) -> None:
        """Write lines; waits for a reader that is slow. Raises ConnectionError for one that
        takes nothing."""
        out = bytearray()
        count = 0
        for line in lines:
            out += line if isinstance(line, bytes) else msgspec.json.encode(line)
            out += b"\n"
            count += 1
            if count >= MANY or len(out) >= MUCH:
                await self._write(out)
                out.clear()
                count = 0
                await asyncio.sleep(0)  # others get their turn
        if out:
            await self._write(out)

    async def _write(self, out: bytearray) -> None:
        try:
            async with asyncio.timeout(self._patience):
                await self.response.write(bytes(out))
        except TimeoutError:
            raise ConnectionAbortedError("the watcher does not read") from None

    async def close(self) -> None:
        with contextlib.suppress(ConnectionError):
            await self.response.write_eof()

    def line(self, kind: str, stored: Stored) -> Dict | bytes:
        """Return one event."""
        if self._accepted.form == "json":
            return b'{"type":"%s","object":%s}' % (kind.encode(), stored.body)
        obj: Dict
        if self._accepted.form == "table":
            meta = {"resourceVersion": str(stored.revision)}
            obj = self._table(self._request, self._resource, [stored], meta, self._headers)
            self._headers = False
        else:
            obj = metadata_of(self._resource, [stored.obj], {}, True)
        return {"type": kind, "object": obj}

    def bookmark(self, revision: int, initial_end: bool = False) -> Dict:
        """Return the line that says: you have seen all up to `revision`."""
        meta: Dict = {"resourceVersion": str(revision), "creationTimestamp": None}
        if initial_end:
            meta["annotations"] = {INITIAL_END: "true"}
        obj: Dict = {
            "kind": self._resource.kind,
            "apiVersion": self._resource.api_version,
            "metadata": meta,
        }
        if self._accepted.form == "table":
            obj = {"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": meta,
                   "columnDefinitions": [], "rows": []}  # fmt: skip
            if initial_end:
                row = {"cells": [], "object": {"kind": "PartialObjectMetadata",
                       "apiVersion": "meta.k8s.io/v1", "metadata": meta}}  # fmt: skip
                obj["rows"] = [row]
        return {"type": "BOOKMARK", "object": obj}


def bad_watch(field: str, text: str) -> ApiError:
    return ApiError(
        422, "Invalid", f"ListOptions.meta.k8s.io \"\" is invalid: {field}: {text}",
        {"kind": "ListOptions", "group": "meta.k8s.io",
         "causes": [{"reason": "FieldValueForbidden", "message": text, "field": field}]},
    )  # fmt: skip
