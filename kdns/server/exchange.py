"""Carries a question through the chain and, where the chain asks for it, to an upstream.

The one place where a Result that waits is waited for, by call-back and not by task: see
docs/DESIGN.md 1.3 point 1. A bug in a plugin ends here as SERVFAIL with its trace logged.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from kdns.dns import ede
from kdns.dns import types as t
from kdns.dns.ede import Ede
from kdns.dns.message import Query, Reply, failure, render_reply
from kdns.dns.name import render_name
from kdns.metrics import Metrics
from kdns.plugins.chain import Pending, Result, Router
from kdns.plugins.plugin import DROP, Drop, Forward

log = logging.getLogger("kdns")

# Questions of all clients that wait for an upstream at one time. Each holds under 4 kB.
MAX_WAITING = 10000
TOO_MANY = Ede(ede.OTHER, "too many questions wait for upstreams")
BUG = Ede(ede.OTHER, "internal error of kdns; its log tells more")

Done = Callable[[Reply | Drop], None]


class Upstreams(Protocol):
    """What carries out a Forward (server/upstream.py)."""

    def send(self, forward: Forward, done: Callable[[Reply], None]) -> None:
        """Ask; call `done` exactly once, now or later."""


class Exchange:
    """Answers questions of one listener with the server blocks behind it.

    router -- replaced as a whole on a reload; runs under way end with the old one
    """

    def __init__(self, router: Router, upstreams: Upstreams, metrics: Metrics) -> None:
        self.router = router
        self.upstreams = upstreams
        self.waiting = 0
        self._panics = metrics.counter(
            "coredns_panics_total", "A metrics that counts the number of panics."
        ).labels()
        self._rejected = metrics.counter(
            "kdns_waiting_rejected_total", "Questions refused since too many wait for upstreams."
        ).labels()

        self.stale = metrics.counter(
            "kdns_stale_questions_total",
            "Questions over UDP that were left, since their askers wait no longer.",
        ).labels()

    def answer(self, query: Query, done: Done) -> Result:
        """Return the Reply or DROP if it is known at once; else a Pending, and `done` is
        called later with the outcome."""
        try:
            result = self.router.resolve(query)
        except Exception:
            return self._panic(query)
        if isinstance(result, Pending):
            if self.waiting >= MAX_WAITING:
                self._rejected.add()
                return failure(t.SERVFAIL, TOO_MANY.text, self._why(query, TOO_MANY))
            self.waiting += 1

            def finish(outcome: Reply | Drop) -> None:
                self.waiting -= 1
                done(outcome)

            self._carry(query, result, finish)
        return result

    def background(self, call: Callable[[], Result]) -> None:
        """Run a refresh after the answer that asked for it has left."""

        def start() -> None:
            try:
                result = call()
            except Exception:
                self._panics.add()
                log.exception("a background refresh failed")
                return
            if isinstance(result, Pending):
                self._carry(None, result, lambda outcome: None)

        asyncio.get_running_loop().call_soon(start)

    def _carry(self, query: Query | None, pending: Pending, done: Done) -> None:
        timer: asyncio.TimerHandle | None = None
        expired = False
        said = False

        def expire() -> None:
            nonlocal expired
            expired = True
            assert pending.expire is not None
            self._go_on(query, pending.expire, done)

        def arrived(reply: Reply) -> None:
            nonlocal said
            said = True
            if timer is not None:
                timer.cancel()
            if expired:
                # The client has its answer; what is left is what resuming leaves behind.
                self._go_on(query, lambda: pending.resume(reply), lambda outcome: None)
            else:
                self._go_on(query, lambda: pending.resume(reply), done)
            for call in pending.sent:
                try:
                    call()
                except Exception:
                    self.panic("what follows an answer")

        if pending.timeout is not None and pending.expire is not None:
            timer = asyncio.get_running_loop().call_later(pending.timeout, expire)
        try:
            self.upstreams.send(pending.forward, arrived)
        except Exception:
            reply = self._panic(query)
            if not said:
                # Resumed, what was counted on the way down is settled on the way up.
                arrived(reply if isinstance(reply, Reply) else failure(t.SERVFAIL))

    def _go_on(self, query: Query | None, call: Callable[[], Result], done: Done) -> None:
        try:
            result = call()
        except Exception:
            result = self._panic(query)
        if isinstance(result, Pending):
            self._carry(query, result, done)
        else:
            done(result)

    def render_panic(self, query: Query) -> bytes:
        """Return the octets to send where a reply could not be rendered; called while its
        exception is handled."""
        self._panic(query)
        return render_reply(query, failure(t.SERVFAIL, ede=self._why(query, BUG)))

    def panic(self, asked: str) -> None:
        """Count and log a bug that was met while answering; called while it is handled."""
        self._panics.add()
        log.exception("a bug in kdns while answering %s; please report it", asked)

    def _panic(self, query: Query | None) -> Reply | Drop:
        asked = f"{render_name(query.name)} {t.type_name(query.qtype)}" if query else "a refresh"
        self.panic(asked)
        return failure(t.SERVFAIL, ede=self._why(query, BUG)) if query is not None else DROP

    def _why(self, query: Query, why: Ede) -> Ede | None:
        return why if query.edns is not None and self.router.explains else None
