"""Faults of an API server, on purpose: for tests of the programs that talk to one."""

from __future__ import annotations

import asyncio
import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final

from aiohttp import web

from kdns.api import status
from kdns.api.http import ApiServer
from kdns.api.store import Delete, Key, ObjectStore, Put
from kdns.errors import ApiError

REASONS: Final = {
    400: "BadRequest", 401: "Unauthorized", 403: "Forbidden", 404: "NotFound", 409: "Conflict",
    410: "Expired", 429: "TooManyRequests", 500: "InternalError", 503: "ServiceUnavailable",
    504: "Timeout",
}  # fmt: skip
# Comes and goes in one write, so that the revision moves on and nobody sees why.
MOVE_ON: Final[Key] = ("revisions.kdns", "", "next")


class Fault:
    """Something that is broken until end(), or as long as a `with` lasts."""

    def __init__(self, end: Callable[[], None]) -> None:
        self._end: Callable[[], None] | None = end

    def end(self) -> None:
        """Have it well again; a second call does nothing."""
        end, self._end = self._end, None
        if end is not None:
            end()

    def __enter__(self) -> Fault:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()


@dataclass(eq=False, slots=True)
class _Rule:
    """What happens to requests. path -- part of their path; left -- how many, None: all"""

    path: str
    seconds: float = 0.0
    code: int = 0
    left: int | None = None

    def meets(self, request: web.BaseRequest) -> bool:
        if self.path not in request.path or self.left == 0:
            return False
        if self.left is not None:
            self.left -= 1
        return True


@dataclass(eq=False, slots=True)
class ApiFaults:
    """What is broken of one server; put in its place with `server.fault = faults.meet`."""

    server: ApiServer
    store: ObjectStore
    rules: list[_Rule] = field(default_factory=list)
    _expired: int = 0  # watches that go on from this revision or an older one get 410
    _open: weakref.WeakSet[asyncio.Transport] = field(default_factory=weakref.WeakSet)

    async def meet(self, request: web.BaseRequest) -> web.StreamResponse | None:
        """Return what a request gets instead of its answer, if it does."""
        if request.transport is not None:
            self._open.add(request.transport)
        for rule in list(self.rules):
            if not rule.meets(request):
                continue
            if rule.seconds:
                await asyncio.sleep(rule.seconds)
            if rule.code:
                reason = REASONS.get(rule.code, "InternalError")
                raise ApiError(rule.code, reason, f"a fault asked for: {rule.code}")
        return self._gone(request) if self._expired else None

    def _gone(self, request: web.BaseRequest) -> web.Response | None:
        query = request.query
        since = query.get("resourceVersion", "")
        if query.get("watch", "") not in ("1", "true") or not since.isdigit():
            return None
        if not 0 < int(since) <= self._expired:
            return None
        gone = status.expired(f"too old resource version: {since} ({self.store.revision})")
        # As kube-apiserver: the watch is opened and the first thing in it is the error.
        event = {"type": "ERROR", "object": status.status_of(gone)}
        # A line: there are clients that read nothing else.
        return web.Response(text=json.dumps(event) + "\n", content_type="application/json")

    # --- what can be asked for ------------------------------------------------------------

    def delay(self, seconds: float, path: str = "") -> Fault:
        return self._add(_Rule(path, seconds))

    def fail(self, code: int = 500, times: int | None = None, path: str = "") -> Fault:
        return self._add(_Rule(path, code=code, left=times))

    async def expire_watches(self) -> None:
        """End all watches; none can go on from where it was: 410, list again."""
        await self.store.write(Put(MOVE_ON, {"metadata": {}}, 0), Delete(MOVE_ON))
        self._expired = self.store.revision - 1
        self.server.drop_watches()

    def drop_connections(self) -> None:
        """Cut every connection there is, as a network that fails."""
        for transport in list(self._open):
            transport.abort()

    def reset(self) -> None:
        """Have everything well again."""
        self.rules.clear()
        self._expired = 0

    def _add(self, rule: _Rule) -> Fault:
        self.rules.append(rule)

        def end() -> None:
            if rule in self.rules:
                self.rules.remove(rule)

        return Fault(end)
