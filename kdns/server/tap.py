"""Shows each question and its answer to those who listen, and costs nothing while nobody does.

Decides when questions are shown; what is shown of them is plugins/kdns_log.py's. While there
is a listener, a router of each place where questions arrive stands in front of the real one,
and the packet caches hold only answers that are shown again when they are repeated; when the
last one has gone, all is as it was.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

from kdns.dns.message import Query, Reply
from kdns.pipeline import Pipeline
from kdns.plugins.chain import Result, Router, bind
from kdns.plugins.kdns_log import EventForm, show
from kdns.plugins.plugin import Drop
from kdns.registry.clients import Clients
from kdns.server.listen import Listener

log = logging.getLogger("kdns")

Take = Callable[[str], None]


class QueryTap:
    """The questions of one server.

    listeners -- where questions arrive, now
    pipelines -- the registries that know whose an address is, now
    """

    def __init__(
        self,
        listeners: Callable[[], Iterable[Listener]],
        pipelines: Callable[[], Iterable[Pipeline]],
    ) -> None:
        self._listeners = listeners
        self._pipelines = pipelines
        self._takers: list[Take] = []
        self._clients = Clients()
        self._followed: list[Pipeline] = []
        # Has other processes show their questions here, with show(), or no more.
        self.elsewhere: Callable[[bool], None] = lambda on: None

    def listen(self, take: Take) -> Callable[[], None]:
        """Call `take` with the line of each question from now on; call what is returned to
        end that."""
        self._takers = [*self._takers, take]
        if len(self._takers) == 1:
            self.renew()
            self.elsewhere(True)

        def end() -> None:
            if take in self._takers:
                self._takers = [one for one in self._takers if one is not take]
                if not self._takers:
                    self._close()

        return end

    def renew(self) -> None:
        """Stand where questions arrive now: called at the first listener, and when a reload
        has put new routers there."""
        if not self._takers:
            return
        for pipeline in self._pipelines():
            if pipeline not in self._followed:
                self._followed.append(pipeline)
                pipeline.subscribe(self._clients.publish)
        for listener in self._listeners():
            router = listener.exchange.router
            if not isinstance(router, _Tapped):
                listener.exchange.router = _Tapped(router, self._form(listener), self._write)
                _forget(listener)

    def show(self, line: str) -> None:
        """Pass on what another process shows."""
        self._write(line)

    def _close(self) -> None:
        self.elsewhere(False)
        for pipeline in self._followed:
            pipeline.unsubscribe(self._clients.publish)
        self._followed = []
        self._clients = Clients()
        for listener in self._listeners():
            router = listener.exchange.router
            if isinstance(router, _Tapped):
                listener.exchange.router = router.below
                _forget(listener)

    def _form(self, listener: Listener) -> EventForm:
        return EventForm(_label(listener), time.time, time.monotonic, self._clients.pod_at)

    def _write(self, line: str) -> None:
        for take in self._takers:
            take(line)


class _Tapped(Router):
    """A Router that shows what the one below it answers to questions from outside. Questions
    that a plugin puts to the whole server go to the one below, and are not shown."""

    def __init__(self, below: Router, form: EventForm, write: Take) -> None:
        self.below = below
        self._form = form
        self._write = write

    def resolve(self, query: Query) -> Result:
        """Answer `query`, or say what to ask an upstream first."""

        def then(outcome: Reply | Drop) -> Result:
            reply = None if isinstance(outcome, Drop) else outcome
            try:
                show(query, reply, self._form, time.monotonic() - query.received, self._write)
            except Exception:
                log.exception("a bug in kdns while showing a question; it is answered")
            return outcome

        return bind(self.below.resolve(query), then)


def _label(listener: Listener) -> str:
    place = listener.place
    return str(type(place)(place.scheme, place.address, listener.port))


def _forget(listener: Listener) -> None:
    for cache in listener.caches:
        cache.clear()
