"""Carries questions to upstreams: whom to ask next, when to give up, who is healthy.

Decides what plugins/forward.py's Upstreams leave open at run time, as CoreDNS does
(reference 2.3). Which questions are forwarded is the plugin's; sockets, IDs and the matching of
answers are server/links.py's. By call-back: no task per question.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from time import monotonic

from kdns.dns import ede
from kdns.dns import types as t
from kdns.dns.ede import Ede
from kdns.dns.message import (
    AA,
    AD,
    CD,
    OPCODE,
    RA,
    RD,
    TC,
    Message,
    Query,
    Reply,
    failure,
    parse_message,
    render_query,
)
from kdns.dns.types import rcode_name
from kdns.errors import WireError
from kdns.metrics import Cell, Metrics
from kdns.plugins.forward import Upstream, Upstreams
from kdns.plugins.plugin import Forward
from kdns.server.links import Errand, Peer, StreamLink, UdpLink, random_numbers, reason

log = logging.getLogger("kdns").getChild("plugin/forward")

TOTAL = 5.0  # seconds after which no further try is begun, as CoreDNS
HEALTH_TIMEOUT = 1.0
DIAL_MIN, DIAL_MAX = 1.0, 30.0
# UDP sockets to one upstream. Each has a port of its own, so a forger has that many more to
# guess among, and a file descriptor costs more than it gives beyond.
UDP_SOCKETS = 8
# Connections to one upstream; further questions share them (RFC 7766 s6.2.1.1).
MAX_STREAMS = 64
# How often one question may meet a connection that the upstream has just closed.
MAX_RECONNECTS = 8
# How often the upstreams are gone through, as CoreDNS does; and the pause before each further
# time, where a Corefile wants more tries.
ROUNDS = 2
ROUND_PAUSE = 0.05
SWEEP = 5.0  # seconds between looks at idle connections
# A set of upstreams nobody asks (its Corefile is gone, perhaps) is closed after this.
UNUSED = 60.0
BUCKETS = tuple(0.00025 * 2**n for n in range(16))

Done = Callable[[Reply], None]

CLOSING = Ede(ede.NOT_READY, "kdns is shutting down")
UPSTREAMS_SHOWN = 3
# What an error text ends in -> info-code of RFC 8914, and how it is told.
CAUSES = (
    ("i/o timeout", ede.NO_REACHABLE_AUTHORITY, "timed out"),
    ("connection refused", ede.NETWORK_ERROR, "refused the connection"),
    ("unreachable", ede.NETWORK_ERROR, "is unreachable"),
    ("no route to host", ede.NETWORK_ERROR, "is unreachable"),
)


def cause_of(error: str) -> tuple[int, str]:
    """Return (info-code, words after the upstream's name) for the error of one try."""
    for end, code, words in CAUSES:
        if error.endswith(end):
            return code, words
    if error.startswith("bad message"):
        return ede.INVALID_DATA, "sent a bad message"
    return ede.NETWORK_ERROR, f"failed ({error.rpartition(': ')[2]})"


def _for(rules: Upstreams, query: Query, why: Ede) -> Ede | None:
    return why if query.edns is not None and rules.explains else None


# What of a query's flags an upstream gets to see.
_SENT = OPCODE | RD | AD | CD
# The header behind its flags of a question without EDNS.
_ONE_QUESTION = b"\0\1\0\0\0\0\0\0"
_KEPT = AA | TC | RA | AD


class UpstreamPool:
    """All upstreams of one kdns instance."""

    def __init__(self, metrics: Metrics) -> None:
        self._groups: dict[Upstreams, Group] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self._closed = False
        self.counters = Counters(metrics)
        self.numbers = random_numbers()

    def send(self, forward: Forward, done: Done) -> None:
        """Ask; call `done` exactly once, now or later. A failure is a Reply with `error`."""
        group = self._groups.get(forward.upstreams)
        if group is None:
            if self._closed:
                done(
                    failure(
                        t.SERVFAIL, CLOSING.text, _for(forward.upstreams, forward.query, CLOSING)
                    )
                )
                return
            group = self._open(forward.upstreams)
        group.ask(forward.query, done)

    def _open(self, upstreams: Upstreams) -> Group:
        loop = asyncio.get_running_loop()
        group = self._groups[upstreams] = Group(upstreams, self, loop)
        if self._sweeper is None:
            self._sweeper = loop.call_later(SWEEP, self._sweep, loop)
        return group

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        """Close what has been idle for too long."""
        now = loop.time()
        for upstreams, group in list(self._groups.items()):
            if group.busy or now - group.used < UNUSED:
                for server in group.servers:
                    server.sweep(now)
            else:
                del self._groups[upstreams]
                group.close()
        self._sweeper = loop.call_later(SWEEP, self._sweep, loop) if self._groups else None

    async def close(self) -> None:
        """Close all connections; questions under way get SERVFAIL."""
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        dialling: list[StreamLink] = []
        for group in self._groups.values():
            dialling += group.close()
        self._groups.clear()
        for link in dialling:
            await link.wait_closed()


class Counters:
    """CoreDNS's metrics of forward and of its proxies, and one of ours."""

    def __init__(self, metrics: Metrics) -> None:
        self.durations = metrics.histogram(
            "coredns_proxy_request_duration_seconds",
            "Seconds from asking an upstream to its answer.",
            ("proxy_name", "to", "rcode"),
            BUCKETS,
        )
        self.check_failures = metrics.counter(
            "coredns_proxy_healthcheck_failures_total",
            "Failed health checks of an upstream.",
            ("proxy_name", "to"),
        )
        self.conn_hits = metrics.counter(
            "coredns_proxy_conn_cache_hits_total",
            "Questions sent over a socket that was there already.",
            ("proxy_name", "to", "proto"),
        )
        self.conn_misses = metrics.counter(
            "coredns_proxy_conn_cache_misses_total",
            "Questions a new socket was opened for.",
            ("proxy_name", "to", "proto"),
        )
        self.broken = metrics.counter(
            "coredns_forward_healthcheck_broken_total",
            "Times all upstreams were down and one was asked at random.",
        ).labels()
        self.rejects = metrics.counter(
            "coredns_forward_max_concurrent_rejects_total",
            "Questions refused because too many were under way.",
        ).labels()
        self.ignored = metrics.counter(
            "kdns_forward_ignored_replies_total",
            "Datagrams and frames of an upstream that answer no question under way.",
            ("to",),
        )


class Group:
    """The upstreams of one `forward` and the questions under way to them.

    busy -- how many askers wait
    """

    def __init__(
        self, rules: Upstreams, pool: UpstreamPool, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.rules = rules
        self.loop = loop
        self.counters = pool.counters
        self.numbers = pool.numbers
        self._lone = 0
        self.flights: dict[tuple[bool, bytes], Flight] = {}
        self.busy = 0
        self.used = loop.time()
        self._robin = 0
        self.tls_error = ""
        context = (
            self._tls_context() if any(a.transport == "tls" for a in rules.addresses) else None
        )
        self.servers = [Server(address, context, self) for address in rules.addresses]
        self.attempts = (
            ROUNDS * len(self.servers) if rules.max_attempts is None else rules.max_attempts
        )

    def _tls_context(self) -> ssl.SSLContext | None:
        certificate, key, authority = self.rules.tls_files
        try:
            context = ssl.create_default_context(cafile=authority or None)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            if certificate:
                context.load_cert_chain(certificate, key)
        except (OSError, ValueError) as e:
            files = ", ".join(name for name in self.rules.tls_files if name)
            text = reason(e) if isinstance(e, OSError) else str(e)
            self.tls_error = f"tls: cannot use {files}: {text}"
            log.error("%s; the tls:// upstreams of this forward cannot be asked", self.tls_error)
            return None
        return context

    def ask(self, query: Query, done: Done) -> None:
        rules = self.rules
        if rules.max_concurrent and self.busy >= rules.max_concurrent:
            self.counters.rejects.add()
            text = f"concurrent queries exceeded maximum {rules.max_concurrent}"
            done(failure(t.REFUSED, text, _for(rules, query, Ede(ede.OTHER, text))))
            return
        self.used = now = monotonic()
        stream = rules.force_tcp or (query.proto != "udp" and not rules.prefer_udp)
        name, edns, question = query.name, query.edns, query.question
        flags = query.flags & _SENT
        if edns is None:
            body = flags.to_bytes(2, "big") + _ONE_QUESTION + question
        else:
            body = render_query(0, name, query.qtype, query.qclass, flags=flags, edns=edns)[2:]
        # Askers whose question differs in nothing but case share one query: it is also what
        # keeps a forger from having many chances at once (RFC 5452 s5).
        same = body if name == query.key else body[:10] + query.key + body[10 + len(name) :]
        if query.qtype == t.HINFO:
            # What the `loop` plugin asks with: coming back here it must not wait for itself.
            self._lone += 1
            same += self._lone.to_bytes(8, "big")
        key = (stream, same)
        self.busy += 1
        flight = self.flights.get(key)
        if flight is not None:
            flight.waiters.append(done)
            return
        flight = self.flights[key] = Flight(self, key, body, question, stream, query.limit, done)
        flight.explains = edns is not None and rules.explains
        flight.go(now=now)

    def order(self) -> list[Server]:
        """Return the upstreams in the order to ask them for one question."""
        servers = self.servers
        n = len(servers)
        if n == 1 or self.rules.policy == "sequential":
            return servers
        if self.rules.policy == "round_robin":
            self._robin = first = (self._robin + 1) % n
            return [servers[first], *servers[:first], *servers[first + 1 :]]
        left = servers.copy()
        return [left.pop(next(self.numbers) % len(left)) for _ in range(n)]

    def random_server(self) -> Server:
        return self.servers[next(self.numbers) % len(self.servers)]

    def close(self) -> list[StreamLink]:
        """Close everything; return the connections whose dial was broken off."""
        dialling: list[StreamLink] = []
        for server in self.servers:
            dialling += server.close()
        for flight in list(self.flights.values()):
            flight.give_up(CLOSING.text)
        return dialling


class Server:
    """One upstream: its health and its open links.

    fails -- failed health checks in a row
    down  -- there were too many of them
    """

    def __init__(self, address: Upstream, context: ssl.SSLContext | None, group: Group) -> None:
        rules, counters = group.rules, group.counters
        self.label = label = address.label
        self.secure = address.transport == "tls"
        self.fails = 0
        self.down = False
        self._rules = rules
        self._loop = group.loop
        self._numbers = group.numbers
        self._context = context if self.secure else None
        self._name = rules.server_name or address.server_name or address.host
        self._tls_error = group.tls_error if self.secure else ""
        ignored = counters.ignored.labels(label)
        self._peer = Peer(
            group.loop, address, rules.source_address, rules.read_timeout, group.numbers, ignored
        )
        self._probe_peer = Peer(
            group.loop, address, rules.source_address, HEALTH_TIMEOUT, group.numbers, ignored
        )
        self._udp: list[UdpLink | None] = [None] * min(UDP_SOCKETS, rules.max_idle or UDP_SOCKETS)
        self._streams: list[StreamLink] = []
        self._dial_average = DIAL_MAX / 2
        self._check: Check | None = None
        self._counters = counters
        self._durations: dict[int, Cell] = {}
        proto = "tcp-tls" if self.secure else "tcp"
        self._udp_hits = counters.conn_hits.labels("forward", label, "udp")
        self._udp_misses = counters.conn_misses.labels("forward", label, "udp")
        self._stream_hits = counters.conn_hits.labels("forward", label, proto)
        self._stream_misses = counters.conn_misses.labels("forward", label, proto)

    # --- questions ------------------------------------------------------------------------

    def ask(self, errand: Errand, stream: bool, now: float) -> str:
        """Send a question; return what went wrong at once, or an empty string."""
        if stream or self.secure:
            if not self._tls_error:
                self._stream_link(now).send(errand, now)
            return self._tls_error
        links = self._udp
        at = next(self._numbers) % len(links)
        link = links[at]
        if link is None or link.closed or link.worn(now, self._rules.expire):
            try:
                link = self._open_udp(at)
            except OSError as e:
                return f"dial udp {self.label}: {reason(e)}"
        else:
            self._udp_hits.value += 1
        try:
            link.send(errand, now)
        except OSError as e:
            # Often what became of an earlier datagram: whoever waits here need wait no longer.
            link.fail("write", e)
            return f"write udp {self.label}: write: {reason(e)}"
        return ""

    def observe(self, rcode: int, seconds: float) -> None:
        """Count an answer."""
        cell = self._durations.get(rcode)
        if cell is None:
            cell = self._counters.durations.labels("forward", self.label, rcode_name(rcode))
            self._durations[rcode] = cell
        cell.add(seconds)

    def _open_udp(self, at: int) -> UdpLink:
        """Put a new socket in place `at`. Raises OSError."""
        old = self._udp[at]
        if old is not None and not old.closed:
            old.retire()
        self._udp_misses.add()
        link = self._udp[at] = UdpLink(self._peer)
        return link

    def _stream_link(self, now: float) -> StreamLink:
        """Return an idle connection, a new one, or the one with the least to do."""
        streams = self._streams
        for link in list(streams):
            if link.closed:
                self._learn_dial_time(link)
                streams.remove(link)
            elif not link.load:
                streams.remove(link)
                if self._expired(link, now):
                    link.close()
                    continue
                # To the end: the one idle for longest is taken first, as CoreDNS does.
                streams.append(link)
                self._stream_hits.add()
                return link
        if len(streams) >= MAX_STREAMS:
            self._stream_hits.add()
            return min(streams, key=lambda link: link.load)
        self._stream_misses.add()
        link = StreamLink(self._peer, self._context, self._name, self._dial_timeout())
        streams.append(link)
        return link

    def _expired(self, link: StreamLink, now: float) -> bool:
        rules = self._rules
        return now - link.used > rules.expire or (
            rules.max_age > 0 and now - link.opened > rules.max_age
        )

    def _dial_timeout(self) -> float:
        """Return twice the usual time it takes to connect, within bounds. Never more than half
        of the time a question has in all, so that another upstream can be tried."""
        for link in self._streams:
            self._learn_dial_time(link)
        return min(max(2 * self._dial_average, DIAL_MIN), DIAL_MAX, TOTAL / 2)

    def _learn_dial_time(self, link: StreamLink) -> None:
        if link.dial_time is not None:
            self._dial_average += (link.dial_time - self._dial_average) / 4
            link.dial_time = None

    def sweep(self, now: float) -> None:
        """Close idle links: those over `expire`, and those above `max_idle`."""
        for at, udp in enumerate(self._udp):
            if udp is not None and not udp.closed and udp.worn(now, self._rules.expire):
                udp.retire()
                self._udp[at] = None
        idle = [link for link in self._streams if not link.load and not link.closed]
        keep = self._rules.max_idle or len(idle)
        for n, link in enumerate(reversed(idle)):
            if n >= keep or self._expired(link, now):
                link.close()
        self._streams = [link for link in self._streams if not link.closed]

    def close(self) -> list[StreamLink]:
        """Close all links; return the connections among them."""
        if self._check is not None:
            self._check.stop()
        links: list[UdpLink | StreamLink] = []
        for peer in (self._peer, self._probe_peer):
            peer.deadlines.close()
            links += peer.links
        for link in links:
            link.close()
        return [link for link in links if isinstance(link, StreamLink)]

    # --- health ---------------------------------------------------------------------------

    def check_health(self) -> None:
        """Begin to ask every `health_interval` until the upstream answers."""
        if self._rules.max_fails and self._check is None and not self._tls_error:
            self._check = Check(self, self._rules, self._loop)
            self._check.begin()

    def open_probe(self) -> UdpLink | StreamLink:
        """Return a link of its own for a health check. Raises OSError."""
        if self.secure or self._rules.force_tcp:
            return StreamLink(self._probe_peer, self._context, self._name, HEALTH_TIMEOUT)
        return UdpLink(self._probe_peer)

    def checked(self, healthy: bool) -> None:
        """Take the outcome of one health check."""
        if healthy:
            self.fails = 0
            self.down = False
            self._check = None
        else:
            self.fails += 1
            self.down = 0 < self._rules.max_fails < self.fails
            self._counters.check_failures.labels("forward", self.label).add()


class Check(Errand):
    """The health check of one upstream: asked over and over until any answer comes, whatever
    its rcode."""

    __slots__ = ("_loop", "_probe", "_rules", "_server", "_timer")

    def __init__(self, server: Server, rules: Upstreams, loop: asyncio.AbstractEventLoop) -> None:
        flags = RD if rules.health_recursion else 0
        self.body = render_query(0, rules.health_name, t.NS, flags=flags)[2:]
        self.question = self.body[10:]
        self._server = server
        self._rules = rules
        self._loop = loop
        self._probe: UdpLink | StreamLink | None = None
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        try:
            self._probe = self._server.open_probe()
            self._probe.send(self, self._loop.time())
        except OSError as e:
            self.failed(reason(e), False)

    def answered(self, wire: bytes) -> None:
        self._close_probe()
        self._server.checked(True)

    def failed(self, error: str, closed: bool) -> None:
        self._close_probe()
        self._server.checked(False)
        self._timer = self._loop.call_later(self._rules.health_interval, self.begin)

    def _close_probe(self) -> None:
        if self._probe is not None:
            self._probe.close()
            self._probe = None

    def stop(self) -> None:
        """End the checks; the probe under way is closed with the upstream's other links."""
        if self._timer is not None:
            self._timer.cancel()


class Flight(Errand):
    """One question at the upstreams, for everybody who asks it meanwhile."""

    __slots__ = (
        "_attempts", "_began", "_deadline", "_downs", "_failovers", "_failures", "_group", "_key",
        "_limit", "_next", "_order", "_pause", "_reconnects", "_server", "_stream",
        "_streaming", "explains", "waiters",
    )  # fmt: skip

    def __init__(
        self,
        group: Group,
        key: tuple[bool, bytes],
        body: bytes,
        question: bytes,
        stream: bool,
        limit: int,
        done: Done,
    ) -> None:
        self.body = body
        self.question = question
        self.waiters = [done]
        self._group = group
        self._key = key
        self._limit = limit
        self._stream = stream
        self._streaming = stream
        self._order = group.order()
        self._server = self._order[0]
        self._next = 0
        self._downs = 0
        self._attempts = 0
        self._failovers = 0
        self._reconnects = 0
        self._began = group.used
        self._deadline = group.used + TOTAL
        self._pause: asyncio.TimerHandle | None = None
        self._failures: dict[str, str] = {}  # upstream -> what became of it last
        self.explains = False

    # --- whom to ask ----------------------------------------------------------------------

    def go(self, error: str = "", now: float | None = None) -> None:
        """Ask the next upstream; `error` is what went wrong with the last one."""
        while True:
            if now is None:
                now = monotonic()
            server = self._choose(now)
            if server is None:
                self.give_up(error or "no healthy proxies")
                return
            self._server = server
            self._streaming = self._stream
            self._began = now
            error = server.ask(self, self._stream, now)
            if not error:
                return
            self._failures[server.label] = error
            now = None
            if not self._may_retry():
                self.give_up(error)
                return
            if self._must_pause():
                self._pause = self._group.loop.call_later(ROUND_PAUSE, self.go, error)
                return

    def _choose(self, now: float) -> Server | None:
        """Return the next upstream to ask; None when time, tries or hope are up."""
        group = self._group
        order = self._order
        if now >= self._deadline:
            return None
        while True:
            if self._next >= len(order):
                self._next = 0
                self._downs = 0
            server = order[self._next]
            self._next += 1
            if not server.down:
                return server
            self._downs += 1
            if self._downs < len(order):
                continue
            group.counters.broken.add()
            if group.rules.failfast:
                return None
            # Health checking must be what is broken: try one all the same.
            return group.random_server()

    def _ask_again(self) -> str:
        """Put the question to the same upstream once more."""
        self._began = now = monotonic()
        error = self._server.ask(self, self._streaming, now)
        if error:
            self._failures[self._server.label] = error
        return error

    def _may_retry(self) -> bool:
        """Count a failed try; return False if it was the last."""
        self._server.check_health()
        self._attempts += 1
        limit = self._group.attempts
        if limit and self._attempts >= limit:
            return False
        return self._downs < len(self._order)

    def _must_pause(self) -> bool:
        """True after a round, once there were more than most questions may have: upstreams that
        refuse at once would be asked as fast as they do."""
        upstreams = len(self._order)
        return self._next >= upstreams and self._attempts >= ROUNDS * upstreams

    # --- what came of it ------------------------------------------------------------------

    def failed(self, error: str, closed: bool) -> None:
        self._failures[self._server.label] = error
        if closed and self._reconnects < MAX_RECONNECTS and monotonic() < self._deadline:
            self._reconnects += 1
            error = self._ask_again()
            if not error:
                return
        if not self._may_retry():
            self.give_up(error)
        elif self._must_pause():
            self._pause = self._group.loop.call_later(ROUND_PAUSE, self.go, error)
        else:
            self.go(error)

    def answered(self, wire: bytes) -> None:
        try:
            message = parse_message(wire)
        except WireError as e:
            self.failed(f"bad message from {self._server.label}: {e}", False)
            return
        except Exception:
            log.exception("a bug in kdns while reading an answer of %s", self._server.label)
            self.failed("internal error", False)
            return
        server, seconds = self._server, monotonic() - self._began
        self._take(message, len(wire))
        server.observe(message.rcode, seconds)

    def _take(self, message: Message, size: int) -> None:
        """Pass the answer on, or ask again because of it."""
        group = self._group
        rcode = message.rcode
        datagram = self.link.__class__ is UdpLink
        if datagram and size > self._limit:
            # More than was asked for: as CoreDNS, let the asker come back over TCP.
            message.flags |= TC
            message.answer, message.authority, message.additional = [], [], []
        if message.flags & TC and group.rules.prefer_udp and not self._streaming:
            self._streaming = True
            error = self._ask_again()
            if error:
                self.failed(error, False)
            return
        # Over UDP server/links.py has looked at it already, but for one that is left out.
        question = message.question
        if question is None or not (datagram or self._is_mine(question)):
            # As CoreDNS.
            self._finish(failure(t.FORMERR))
            return
        if rcode in group.rules.failover:
            self._failovers += 1
            if self._failovers < len(self._order):
                self.go()
                return
        reply = Reply(
            rcode,
            message.answer,
            message.authority,
            message.additional,
            flags=message.flags & _KEPT,
            served_by="forward",
        )
        reply.edns = message.edns
        self._finish(reply)

    def _is_mine(self, question: tuple[bytes, int, int]) -> bool:
        name, qtype, qclass = question
        mine = self.question
        return (
            name.lower() == mine[:-4].lower()
            and qtype == mine[-4] << 8 | mine[-3]
            and qclass == mine[-2] << 8 | mine[-1]
        )

    def give_up(self, error: str) -> None:
        if self._pause is not None:
            self._pause.cancel()
        self._finish(failure(t.SERVFAIL, error, self._why(error) if self.explains else None))

    def _why(self, error: str) -> Ede:
        """Say which upstream failed how, after how many seconds in all."""
        group = self._group
        if error == CLOSING.text:
            return CLOSING
        causes = {server: cause_of(text) for server, text in self._failures.items()}
        seconds = group.loop.time() - self._deadline + TOTAL
        if not causes:
            healthy = "all upstreams are down by their health checks"
            return Ede(ede.NO_REACHABLE_AUTHORITY, healthy)
        # What happened last decides which kind of error it is.
        code = causes.get(self._server.label, next(iter(causes.values())))[0]
        told = ", ".join(
            f"{server} {words}" for server, (_, words) in list(causes.items())[:UPSTREAMS_SHOWN]
        )
        more = ", ..." if len(causes) > UPSTREAMS_SHOWN else ""
        return Ede(code, f"no answer after {seconds:.1f} s: {told}{more}")

    def _finish(self, reply: Reply) -> None:
        """Give every asker a reply of its own."""
        group = self._group
        if group.flights.pop(self._key, None) is not self:
            return
        waiters = self.waiters
        group.busy -= len(waiters)
        reply.upstream = self._server.label
        # Made before the first is passed on: who gets a reply may change it.
        replies = [reply] if len(waiters) == 1 else [*(reply.copy() for _ in waiters[1:]), reply]
        for done, one in zip(waiters, replies, strict=True):
            try:
                done(one)
            except Exception:
                log.exception("a bug in kdns while an upstream's answer was passed on")
