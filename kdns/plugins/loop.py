"""`loop`: finds out whether questions that are forwarded come back to this server.

At start it asks for a random name below the block's first zone and counts how often that name
is asked for. CoreDNS ends the process at the third time; here the `forward` it went through
answers SERVFAIL from then on, names that need no upstream are served as before, and one line
says what to do (issue 2: degrade, not exit).
"""

from __future__ import annotations

from collections.abc import Sequence

from kdns.corefile import Directive
from kdns.dns import types as t
from kdns.dns.message import Query, failure, make_query
from kdns.dns.name import MAX_NAME, is_subdomain, labels_of, name_of, parse_name, render_name
from kdns.plugins.forward import Forward
from kdns.plugins.plugin import Outcome, Plugin, Probe, Work
from kdns.plugins.setup import Setup

MAX_SEEN = 2  # as CoreDNS: seen more often than this, it is a loop
PROBE_SECONDS = 30.0
PROBE_INTERVAL = 1.0
# Seconds after its first arrival for which the name is counted. A loop shows in milliseconds,
# and after the 2 s of one lost answer at the latest; later on, whoever has seen the name pass
# by could stop our forwarding with it.
WINDOW = 10.0


class Loop(Plugin):
    """looping -- True once a loop has been seen; it stays so until the next start or reload,
    for what is wrong is outside of this server."""

    word = "loop"

    def __init__(self, zone: str, name: bytes, cx: Setup) -> None:
        self.looping = False
        self._zone = zone
        self._name = name
        self._seen = 0
        self._until = 0.0
        self._forwards: list[Forward] = []
        self._clock = cx.clock
        self._log = cx.logger("loop")
        self._probe = Probe(
            make_query(name, t.HINFO, id=cx.random.getrandbits(16)),
            PROBE_SECONDS,
            PROBE_INTERVAL,
            self._is_done,
        )
        self._detected = cx.metrics.gauge(
            "kdns_loop_detected",
            "1 where forwarded queries come back to this server, and forward is off therefore.",
            ("server", "zone"),
        ).labels(cx.facts.label, zone)

    def link(self, chain: Sequence[Plugin]) -> None:
        self._forwards = [
            p
            for p in chain
            if isinstance(p, Forward) and any(is_subdomain(self._name, z) for z in p.zones)
        ]
        self._detected.set(self.looping)

    def work(self) -> Sequence[Work]:
        return (self._probe,)

    def _is_done(self) -> bool:
        # Sent once more, it would be counted once more: enough that it has arrived.
        return self._seen > 0

    def on_query(self, query: Query) -> Outcome:
        if query.qtype != t.HINFO or query.key != self._name:
            return None
        now = self._clock()
        if not self._seen:
            self._until = now + WINDOW
        if now <= self._until:
            self._seen += 1
            if self._seen > MAX_SEEN and not self.looping:
                self._stop(query)
        return failure(t.SERVFAIL) if self.looping else None

    def _stop(self, query: Query) -> None:
        self.looping = True
        self._detected.set(1)
        text = f'loop detected for zone "{self._zone}": what is forwarded comes back to this server'
        for forward in self._forwards:
            forward.looping = text
        self._log.error(
            'Loop (from %s) detected for zone "%s": a question forwarded by this server block came'
            " back to it, so its forward answers SERVFAIL from now on. Make forward name servers"
            " that do not ask this one (often 127.0.0.53 in a resolv.conf), then reload or"
            ' restart. Query: "HINFO %s"',
            query.client[0],
            self._zone,
            render_name(self._name),
        )


def setup(directives: list[Directive], cx: Setup) -> list[Plugin]:
    """`loop`"""
    directive = cx.once(directives)
    cx.no_args(directive)
    for option in directive.options or ():
        cx.unknown_option(option, ())
    zone = cx.facts.zones[0]
    labels = [str(cx.random.getrandbits(62)).encode() for _ in range(2)]
    name = name_of(labels + labels_of(parse_name(zone).lower()))
    if len(name) > MAX_NAME:
        cx.problems.warn(
            directive.word, f"'loop' looks for nothing: no name fits below the zone {zone}"
        )
        return []
    return [Loop(zone, name, cx)]
