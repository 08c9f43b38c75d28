"""Runs a query down a server block's plugins and its reply up again; never awaits.

Decides nothing about names or records. The outcome is a value: a Reply, DROP, or a
Pending that says what to ask an upstream and how to go on with what came back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from kdns.dns import ede
from kdns.dns import types as t
from kdns.dns.ede import Ede
from kdns.dns.message import Query, Reply, failure
from kdns.dns.name import ROOT, ancestors, render_name
from kdns.plugins.plugin import DROP, Ask, Drop, Forward, Outcome, Plugin, Refresh

MAX_DEPTH = 10  # CoreDNS follows at most ten look-ups of its own for one question
TOO_DEEP = Ede(ede.OTHER, f"more than {MAX_DEPTH} look-ups for one question")
NO_PLUGIN = Ede(ede.NOT_AUTHORITATIVE, "no plugin of this server block answers for the name")
OTHER_CLASS = Ede(ede.NOT_SUPPORTED, "only class IN is answered here")
ZONES_SHOWN = 4


class Pending:
    """A run that waits for an upstream.

    resume  -- called with the upstream's Reply; returns the Result to go on with
    timeout -- seconds after which `expire()` is the Result; the resume still happens then,
               for what it leaves behind (a cache entry), and its Result is dropped
    sent    -- to be called once the Result has left, or has been given to a stream
    """

    __slots__ = ("expire", "forward", "resume", "sent", "timeout")

    def __init__(
        self,
        forward: Forward,
        resume: Callable[[Reply], Result],
        timeout: float | None = None,
        expire: Callable[[], Result] | None = None,
        sent: Sequence[Callable[[], None]] = (),
    ) -> None:
        self.forward = forward
        self.resume = resume
        self.timeout = timeout
        self.expire = expire
        self.sent = sent


Result: TypeAlias = Reply | Drop | Pending
Trail: TypeAlias = list[tuple[int, Query]]


def bind(result: Result, then: Callable[[Reply | Drop], Result]) -> Result:
    """Go on with `then` once `result` is final."""
    if isinstance(result, Pending):
        pending = result
        expire = pending.expire
        return Pending(
            pending.forward,
            lambda reply: bind(pending.resume(reply), then),
            pending.timeout,
            None if expire is None else lambda: bind(expire(), then),
            pending.sent,
        )
    return then(result)


class Chain:
    """The plugins of one server block in order of execution.

    resolve -- puts a question to the whole server (the Router this chain belongs to)
    spawn   -- runs a Result-giving call in the background
    """

    def __init__(self, plugins: Sequence[Plugin]) -> None:
        self.plugins = tuple(plugins)
        self.resolve: Callable[[Query], Result] = self.run
        self.spawn: Callable[[Callable[[], Result]], None] = lambda call: None
        self.per_client = any(p.per_client for p in self.plugins)
        self.explains = all(p.explains for p in self.plugins)
        downs = [
            (i, p.on_query)
            for i, p in enumerate(self.plugins)
            if type(p).on_query is not Plugin.on_query
        ]
        self._downs = [[d for d in downs if d[0] >= i] for i in range(len(self.plugins) + 2)]
        self._ups = [
            (i, p.on_reply)
            for i, p in reversed(list(enumerate(self.plugins)))
            if type(p).on_reply is not Plugin.on_reply
        ]
        # For each plugin: what stands above it, for a reply that nothing was changed for.
        self._above = [[up for n, up in self._ups if n < i] for i in range(len(self.plugins) + 1)]
        self._drops = [
            (i, p.on_drop)
            for i, p in reversed(list(enumerate(self.plugins)))
            if type(p).on_drop is not Plugin.on_drop
        ]
        self._sent = [p.on_sent for p in self.plugins if type(p).on_sent is not Plugin.on_sent]
        last = max((at for at, _ in (*downs, *self._ups, *self._drops)), default=-1)
        self._no_next = (
            f"plugin/{self.plugins[last].word}: no next plugin found" if last >= 0 else ""
        )
        # Nothing here answers or looks at answers (`bind`, `health`, ...): as an empty block.
        self.idle = not (downs or self._ups or self._drops)
        for plugin in self.plugins:
            plugin.link(self.plugins)

    def run(self, query: Query, start: int = 0) -> Result:
        """Put `query` to the plugins from number `start` on."""
        return self._down(query, start, start, None)

    def _down(self, query: Query, start: int, index: int, trail: Trail | None) -> Result:
        for at, on_query in self._downs[index]:
            outcome = on_query(query)
            if outcome is None:
                continue
            if outcome.__class__ is Reply and trail is None and not start:
                # What _up() does, for by far the most questions.
                if self.per_client:
                    outcome.keep = 0.0
                for on_reply in self._above[at]:
                    outcome = on_reply(query, outcome)
                return outcome
            if outcome.__class__ is Query:
                trail = [*(trail or ()), (at, query)]
                query = outcome
                continue
            return self._settle(query, start, at, trail, outcome)
        # CoreDNS plugin.NextOrFailure
        reply = failure(t.SERVFAIL, self._no_next)
        if query.edns is not None and self.explains:
            reply.ede = NO_PLUGIN
        return self._up(query, start, len(self.plugins), trail, reply)

    def _up(
        self, query: Query, start: int, below: int, trail: Trail | None, reply: Reply
    ) -> Result:
        if self.per_client:
            reply.keep = 0.0
        for at, on_reply in self._ups:
            if at < below:
                if at < start:
                    break
                while trail and trail[-1][0] > at:
                    query = trail[-1][1]
                    trail = trail[:-1]
                reply = on_reply(query, reply)
        return reply

    def _settle(
        self, query: Query, start: int, at: int, trail: Trail | None, outcome: Outcome
    ) -> Result:
        if isinstance(outcome, Reply):
            return self._up(query, start, at, trail, outcome)
        if outcome is None:
            return self._down(query, start, at + 1, trail)
        if isinstance(outcome, Query):
            return self._down(outcome, start, at + 1, [*(trail or ()), (at, query)])
        if isinstance(outcome, Forward):
            return self._forward(query, start, at, trail, outcome)
        if isinstance(outcome, Ask):
            return self._ask(query, start, at, trail, outcome)
        if isinstance(outcome, Refresh):
            self._refresh(at, outcome)
            return self._up(query, start, at, trail, outcome.reply)
        return self._drop(query, start, at, trail)

    def _drop(self, query: Query, start: int, below: int, trail: Trail | None) -> Drop:
        """Tell the plugins above number `below` that nothing will be answered."""
        for at, on_drop in self._drops:
            if start <= at < below:
                while trail and trail[-1][0] > at:
                    query = trail[-1][1]
                    trail = trail[:-1]
                on_drop(query)
        return DROP

    def _forward(
        self, query: Query, start: int, at: int, trail: Trail | None, forward: Forward
    ) -> Result:
        def resume(reply: Reply) -> Result:
            then = forward.then
            return self._settle(query, start, at, trail, then(reply) if then else reply)

        return Pending(forward, resume, sent=self._sent)

    def _ask(self, query: Query, start: int, at: int, trail: Trail | None, ask: Ask) -> Result:
        sub = ask.query.asking()
        sub.depth = query.depth + 1
        result: Result
        if sub.depth > MAX_DEPTH:
            result = failure(t.SERVFAIL, TOO_DEEP.text)
            if query.edns is not None and self.explains:
                result.ede = TOO_DEEP
        elif ask.below:
            result = self.run(sub, at + 1)
        else:
            result = self.resolve(sub)

        def then(reply: Reply | Drop) -> Result:
            if isinstance(reply, Drop):
                return self._drop(query, start, at, trail)
            if reply.lease is not None:
                # Whatever is made of it answers another question, and perhaps of several such.
                reply.lease = reply.folds = None
            return self._settle(query, start, at, trail, ask.then(reply))

        bound = bind(result, then)
        if ask.timeout is not None and isinstance(bound, Pending):
            return Pending(
                bound.forward,
                bound.resume,
                ask.timeout,
                lambda: self._settle(query, start, at, trail, ask.then(None)),
                bound.sent,
            )
        return bound

    def _refresh(self, at: int, refresh: Refresh) -> None:
        def call() -> Result:
            def keep(reply: Reply | Drop) -> Result:
                if isinstance(reply, Reply):
                    refresh.then(reply)
                return reply

            return bind(self.run(refresh.query.asking(), at + 1), keep)

        self.spawn(call)


class Router:
    """Chooses the server block of a listener for each question (reference 1.0).

    chains    -- zone (lower-case wire name) -> chain of its server block
    any_class -- True if a block here answers other classes than IN
    unmatched -- told of each question no block answers, and its reply (metrics)
    """

    def __init__(
        self,
        chains: Mapping[bytes, Chain],
        any_class: bool = False,
        unmatched: Callable[[Query, Reply], Reply] | None = None,
    ) -> None:
        self.chains = dict(chains)
        self.any_class = any_class
        self.unmatched = unmatched
        self._only = self.chains.get(ROOT) if len(self.chains) == 1 else None
        # Whoever is refused stands in no block, so one that explains nothing decides for all.
        self.explains = all(chain.explains for chain in self.chains.values())
        zones = sorted(render_name(z) for z, chain in self.chains.items() if not chain.idle)
        self._no_block = Ede(
            ede.NOT_AUTHORITATIVE,
            "no server block here is for this name"
            + (f", only for {', '.join(zones[:ZONES_SHOWN])}" if zones else "")
            + (", ..." if len(zones) > ZONES_SHOWN else ""),
        )
        for chain in self.chains.values():
            chain.resolve = self.resolve

    def route(self, query: Query) -> Chain | None:
        """Return the chain of the longest zone that holds the name; None: REFUSED.

        A DS question lives in the parent: the shortest matching block but the root one
        answers it (CoreDNS core/dnsserver ServeDNS).
        """
        if self._only is not None:
            return self._only
        chains = self.chains
        found: Chain | None = None
        for zone in ancestors(query.key):
            chain = chains.get(zone)
            if chain is None:
                continue
            if query.qtype != t.DS:
                return chain
            if found is None or zone != ROOT:
                found = chain
        return found

    def resolve(self, query: Query) -> Result:
        """Answer `query`, or say what to ask an upstream first."""
        edns = query.edns
        if query.qclass != t.IN and not self.any_class:
            return self._refuse(query, OTHER_CLASS)
        if edns is not None and edns.version:
            return failure(t.BADVERS)  # RFC 6891 s6.1.3; CoreDNS does not count it
        chain = self._only or self.route(query)
        if chain is None or chain.idle:
            return self._refuse(query, self._no_block)
        result = chain.run(query)
        if chain is not self._only and isinstance(result, Reply):
            result.below = None  # another block may be for names there
        return result

    def _refuse(self, query: Query, why: Ede) -> Reply:
        reply = failure(t.REFUSED, ede=why if query.edns is not None and self.explains else None)
        return reply if self.unmatched is None else self.unmatched(query, reply)
