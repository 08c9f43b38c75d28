"""Whatever stands in a server block: an answer from the packet cache is the one the chain would
have given, to this client and now; and it is counted and logged as that one would have been."""

from __future__ import annotations

import ctypes
import logging
import socket
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from objects import endpoint, pod, service, slice_of, snapshot
from support import FakeClock, a, build, cname, make_setup

from kdns.dns import types as t
from kdns.dns.message import RA, RR, TC, Edns, Query, Reply, parse_message, render_query
from kdns.dns.name import ROOT, parse_name, render_name
from kdns.metrics import HistogramCell
from kdns.plugins.cache import Cache
from kdns.plugins.chain import Chain, Result, Router
from kdns.plugins.file import File
from kdns.plugins.hosts import Hosts
from kdns.plugins.kubernetes import Kubernetes
from kdns.plugins.plugin import Outcome, Plugin
from kdns.registry.snapshot import Changes, everything
from kdns.server.datagrams import ID_SIZE, QUERY_AT, REST_AT, Datagrams
from kdns.server.exchange import Exchange
from kdns.server.packetcache import PacketCache
from kdns.server.udp import UdpListener

SVC = "default.svc.cluster.local."
# One of each group at most may stand in a server block.
GROUPS: tuple[tuple[str, ...], ...] = (
    ("acl cluster.local {\nblock type AAAA net 10.0.0.2\n}",
     "acl {\nfilter type TXT\ndrop type MX\n}"),
    ("bufsize 512",),
    ("header {\nresponse set ra\nquery clear rd\n}",),
    ("minimal",),
    (f"rewrite name exact www.example. s0.{SVC}",
     "rewrite ttl suffix .local. 7",
     "rewrite edns0 local set 10 {client_ip}"),
    ("template IN A tpl. {\nanswer '{{ .Name }} 60 IN A 1.2.3.4'\n}",
     "template IN A tpl. {\nanswer '{{ .Name }} 60 IN A {{ .Remote }}'\n}",
     "template IN TXT tpl. {\nanswer '{{ .Name }} 60 IN TXT \"{{ .Message.Id }}\"'\n}"),
    ("hosts no-such-file {\n10.9.9.9 inline.example\nttl 60\nfallthrough\n}",),
    ("loadbalance",),
    ("cache 30", "cache 30 {\ndisable success cluster.local\n}", "cache 4 {\nkeepttl\n}"),
    ("any",),
    ("local",),
    ("chaos v1",),
    ("whoami",),
    ("kubernetes cluster.local in-addr.arpa {\npods verified\n}",
     "kubernetes cluster.local in-addr.arpa {\npods insecure\nfallthrough\nnamespaces default\n}",
     "kubernetes cluster.local in-addr.arpa {\nspec strict\nfallthrough svc.cluster.local\n}"),
    ("file db.cluster cluster.local",),
)  # fmt: skip
ZONE = """$ORIGIN cluster.local.
@ 3600 IN SOA ns hostmaster {serial} 7200 1800 86400 30
s1.default.svc 60 IN A 192.0.2.{serial}
new.default.svc 60 IN A 192.0.2.{serial}
"""
NAMES = (
    f"s0.{SVC}", f"S1.{SVC}", f"s1.{SVC}", f"h.{SVC}", f"new.{SVC}", f"nosuch.{SVC}", SVC,
    f"_http._tcp.s0.{SVC}", "cluster.local.", "ns.dns.cluster.local.",
    "10-244-0-7.default.pod.cluster.local.", "www.example.", "a.tpl.", "inline.example.",
    "hosted.example.", "localhost.", "version.bind.", "1.0.96.10.in-addr.arpa.",
    "7.0.244.10.in-addr.arpa.", "0.96.10.in-addr.arpa.",
)  # fmt: skip
TYPES = (t.A, t.AAAA, t.SRV, t.TXT, t.SOA, t.PTR, t.NS, t.ANY, t.MX)
EDNS = (None, Edns(512), Edns(1232, True), Edns(1232, options=[(10, b"12345678")]))
CLIENTS = (("10.0.0.1", 4000), ("10.0.0.2", 4001))

ASK = st.tuples(
    st.just("ask"), st.sampled_from(NAMES), st.sampled_from(TYPES), st.sampled_from(EDNS),
    st.booleans(),
)  # fmt: skip
CHANGE = st.tuples(
    st.sampled_from(("service", "slice", "pod", "namespace", "hosts", "file", "wait", "reload")),
    st.sampled_from(("s0", "s1", "h", "new")),
    st.integers(0, 3),
)
BLOCK = st.tuples(*(st.sampled_from(("", *group)) for group in GROUPS))


# --- names of the outside -----------------------------------------------------------------

OUTSIDE = (
    "one.outside.", "two.outside.", "Alias.outside.", "brief.outside.", "big.outside.",
    "no.outside.", "nodata.outside.", "broken.outside.", "moody.outside.",
)  # fmt: skip
OUTSIDE_GROUPS: tuple[tuple[str, ...], ...] = (
    ("loadbalance",),
    ("minimal",),
    ("explain off",),
    ("header {\nresponse set ra\n}",),
    ("rewrite ttl suffix outside. 3-20", "rewrite name exact www.outside. one.outside.",
     "rewrite edns0 local set 10 {client_ip}"),
)  # fmt: skip
CACHES = (
    "cache 30", "cache", "cache 4 {\nkeepttl\n}", "cache 30 {\nprefetch 2 3s 40%\n}",
    "cache 30 {\nprefetch 12 1m 90%\nkeepttl\n}", "cache 30 {\nserve_stale 1h\n}",
    "cache 30 {\nserve_stale 1h verify\nprefetch 3 1m 20%\n}",
    "cache 30 {\nserve_stale 40s\nserve_stale_policy prefer_positive\n}",
    "cache 30 {\nservfail 0\ndenial 100 3\n}",
)  # fmt: skip
JSON = "kdns_log json {\nfields client id name rcode flags plugin cache_age ede size\n}"
OUTSIDE_ASK = st.tuples(
    st.just("ask"), st.sampled_from((*OUTSIDE, "www.outside.")), st.sampled_from((t.A, t.AAAA)),
    st.sampled_from(EDNS), st.just(False),
)  # fmt: skip
LATER = st.one_of(
    *[st.tuples(st.just("later"), st.just(""), st.sampled_from((0.1, 0.4, 1.0, 2.7, 9.3, 28.0)))]
    * 3,
    st.sampled_from((("hosts", "", 1), ("reload", "", 0), ("evict", "", 0))),
)


SOA = b"\2ns\7outside\0\4root\7outside\0" + b"%20d"  # the numbers at its end, anyhow


class Outside(Plugin):
    """In the place of `forward`. Each answer is another one, so that it shows when it was
    fetched."""

    word = "outside"

    def __init__(self) -> None:
        self.asked = 0

    def on_query(self, query: Query) -> Outcome:
        name = query.name
        if not query.key.endswith(b"\7outside\0"):
            return None
        self.asked += 1
        first = query.key[1 : query.key[0] + 1].decode()
        if first == "moody":  # what is there may be gone, and the server, too
            first = ("one", "broken", "no", "two", "broken")[self.asked % 5]
        reply = Reply(flags=RA, served_by="forward")
        if first in ("no", "nodata") or query.qtype != t.A:
            reply.rcode = t.NXDOMAIN if first == "no" else t.NOERROR
            reply.authority = [RR(parse_name("outside."), t.SOA, 12, SOA % self.asked)]
        elif first == "broken":
            return Reply(t.SERVFAIL, flags=RA)
        elif first == "alias":
            reply.answer = [cname(render_name(name), "Else.outside.", 50),
                            a("Else.outside.", f"192.0.2.{self.asked % 250}", 9)]  # fmt: skip
        else:
            ttl = 2 if first == "brief" else 40
            count = {"two": 2, "big": 90}.get(first, 1)
            reply.answer = [
                RR(name, t.A, ttl, bytes((192, self.asked // 250, self.asked % 250, n)))
                for n in range(count)
            ]
            reply.authority = [RR(parse_name("outside."), t.NS, 3000, parse_name("ns.outside."))]
        return reply


class World:
    """What changes: the registry, a hosts file, a zone file."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], Any] = {
            ("service", "s0"): service("s0", ip="10.96.0.1"),
            ("service", "h"): service("h", ip="None"),
            ("slice", "h"): slice_of("h", endpoint("10.244.0.7"), endpoint("10.244.0.8")),
        }
        self.has_namespace = True
        self.hosts = b"10.8.8.8 hosted.example"
        self.serial = 1
        self.changed_at = 1700000000

    def snapshot(self) -> Any:
        found = snapshot(*self.objects.values(), changed_at=self.changed_at)
        if not self.has_namespace:
            found.namespaces.clear()  # type: ignore[attr-defined]
        return found


class Room(Datagrams):
    """Room into which questions come, and whose answers a server without a socket has sent."""

    def __init__(self, server: Server) -> None:
        super().__init__(socket.AF_INET)
        self.server = server
        self.came: list[bytes] = []
        self.size = 0

    def receive(self, fd: ctypes.c_int) -> int:
        if not self.came:
            return 0
        wire = self.came.pop(0)
        self.size = len(wire)
        self.queries[: self.size] = wire
        return 1

    def sizes(self, count: int) -> list[int]:
        return [self.size]

    def first(self) -> bytes:
        return self.queries[ID_SIZE : self.size].tobytes()

    def peer(self, slot: int) -> tuple[str, int]:
        return self.server.client

    def send(self, fd: ctypes.c_int, first: int, end: int) -> None:
        for slot in range(first, end):
            at = REST_AT[slot]
            rest = ctypes.string_at(self.vectors[at], self.vectors[at + 1])
            qid = self.queries[QUERY_AT[slot] :][:ID_SIZE].tobytes()
            self.server.sent.append(qid + rest)


class Server(UdpListener):
    """A UDP listener and its server block, without a socket; `cached` False: without a packet
    cache either."""

    def __init__(self, text: str, world: World, clock: FakeClock, cached: bool) -> None:
        self.cx = make_setup(clock=clock)
        self.clock = clock
        self.text = text
        self.lines = 0
        self.cx.log.handlers.clear()
        self.cached = cached
        self.cache = PacketCache()
        self.cx.metrics.before_scrape.append(self.cache.settle)
        self._room = self.room = Room(self)
        self._fd = ctypes.c_int(0)
        self._made = None
        self.client = CLIENTS[0]
        self.sent: list[bytes] = []
        self.load(world)

    def load(self, world: World) -> None:
        """Start, or reload: new plugins, old metrics."""
        self.plugins = [*build(self.text, self.cx), Outside()]
        assert not self.cx.problems.errors, self.cx.problems.found
        for plugin in self.plugins:
            if isinstance(plugin, Kubernetes):
                now = world.snapshot()
                plugin.publish(now, everything(now), 0.0)
        self.read_files(world)
        chain = Chain(self.plugins)
        self.spawned: list[Callable[[], Result]] = []
        chain.spawn = self.spawned.append
        router = Router({ROOT: chain}, any_class=True)
        self.exchange = Exchange(router, None, self.cx.metrics)  # type: ignore[arg-type]
        self.cache.clear()

    def read_files(self, world: World) -> None:
        for plugin in self.plugins:
            if isinstance(plugin, Hosts):
                plugin.load(world.hosts, "")
            elif isinstance(plugin, File):
                content = ZONE.format(serial=world.serial).encode()
                plugin.work()[0].load(content, "")  # type: ignore[union-attr, arg-type]

    def change_files(self, world: World) -> None:
        self.read_files(world)
        self.forget(None)

    def publish(self, now: Any, changes: Changes) -> None:
        deps: list[Any] | None = []
        for plugin in self.plugins:
            if isinstance(plugin, Kubernetes):
                touched = plugin.publish(now, changes, 0.0)
                deps = None if touched is None or deps is None else [*deps, *touched]
        self.forget(deps)

    def evict(self) -> None:
        """Make room in the caches for others."""
        for plugin in self.plugins:
            if isinstance(plugin, Cache):
                for store in (plugin._success, plugin._denial):
                    for key in list(store.items):
                        store.remove(key)

    def forget(self, deps: list[Any] | None) -> None:
        """As App does it."""
        if deps is None:
            self.cache.clear()
        else:
            self.cache.drop(deps)
        for plugin in self.plugins:
            if isinstance(plugin, Cache):
                plugin.invalidate(deps)

    def _send(self, wire: bytes, peer: Any, source: Any) -> None:
        self.sent.append(wire)

    def ask(self, wire: bytes, client: tuple[str, int]) -> bytes | None:
        if not self.cached:
            self.cache = PacketCache()
        self.sent.clear()
        self.client = client
        self.room.came.append(wire)
        self._drain()
        assert len(self.sent) < 2
        while self.spawned:
            self.spawned.pop()()
        return self.sent[0] if self.sent else None

    def counts(self) -> dict[str, dict[tuple[str, ...], Any]]:
        self.cx.metrics.settle()
        return {
            family.name: {
                labels: (cell.counts, cell.sum) if isinstance(cell, HistogramCell) else cell.value
                for labels, cell in family.cells.items()
            }
            for family in self.cx.metrics.families.values()
            if "duration" not in family.name and family.kind != "gauge"
        }


def comparable(wire: bytes | None) -> Any:
    """Return an answer with the order of its records left out."""
    if wire is None:
        return None
    message = parse_message(wire)
    edns = message.edns
    return (
        message.id, message.flags, message.rcode, message.question,
        *(
            # Which of shuffled records are left out is a matter of chance.
            len(s) if message.flags & TC else Counter(s)
            for s in (message.answer, message.authority, message.additional)
        ),
        None if edns is None else (edns.size, edns.do, edns.version, list(edns.options)),
    )  # fmt: skip


class Whole(logging.Logger):
    """A logger that is its own children."""

    def getChild(self, suffix: str) -> Whole:
        return self


class Counting(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def change(world: World, servers: list[Server], kind: str, name: str, number: int) -> None:
    clock = servers[0].clock
    changes = Changes(services=frozenset({("default", name)}))
    if kind == "wait":
        clock.now += (0.0, 0.4, 1.0, 31.0)[number]
        return
    if kind == "evict":
        for server in servers:
            server.evict()
        return
    if kind == "later":
        clock.now += number
        return
    if kind == "reload":
        for server in servers:
            server.load(world)
        return
    if kind in ("hosts", "file"):
        world.hosts = b"10.8.8.%d hosted.example www.example" % number
        world.serial += 1
        for server in servers:
            server.change_files(world)
        return
    world.changed_at += number % 2  # two changes may fall into one second
    if kind == "namespace":
        world.has_namespace = number > 0
        changes = Changes(namespaces=frozenset({"default"}))
    elif kind == "pod":
        changes = Changes(pods=frozenset({("default", name)}))
        world.objects[kind, name] = pod(name, f"10.244.0.{number + 6}")
    elif number == 0:
        world.objects.pop((kind, name), None)
    elif kind == "service":
        world.objects[kind, name] = service(name, ip=f"10.96.0.{number}" if name != "h" else "None")
    else:
        world.objects[kind, name] = slice_of(name, endpoint(f"10.244.0.{number + 6}"))
    now = world.snapshot()
    for server in servers:
        server.publish(now, changes)


def spelt(name: str, turn: int) -> str:
    """Return the name in other letters, as resolvers do that draw 0x20."""
    if turn <= 0:
        return name
    return "".join(c.upper() if at * turn % 3 else c.lower() for at, c in enumerate(name, 1))


def check(
    block: tuple[str, ...], steps: list[tuple[Any, ...]], clock: FakeClock, logs: str = "log"
) -> None:
    text, world = "\n".join((*(part for part in block if part), "prometheus", logs)), World()
    fast, slow = Server(text, world, clock, True), Server(text, world, clock, False)
    asked = 0
    lines = {}
    for server in (fast, slow):
        lines[server] = Counting()
        server.cx.log = Whole("test") if logs == JSON else logging.Logger("test")
        server.cx.log.addHandler(lines[server])
        server.load(world)
    for step in steps:
        if step[0] != "ask":
            change(world, [fast, slow], *step)
            continue
        _, name, qtype, edns, chaos = step
        qclass = t.CH if chaos and qtype == t.TXT else t.IN
        # Three times each from two clients: the first two make it kept. Then in other letters.
        for turn in range(10):
            client = CLIENTS[turn % 2]
            wire = render_query(
                1000 + asked, parse_name(spelt(name, turn - 5)), qtype, qclass, edns=edns,
                flags=0x0110 if turn == 5 else 0x0100,
            )  # fmt: skip
            got, wanted = fast.ask(wire, client), slow.ask(wire, client)
            asked += 1
            if "loadbalance" in block:
                assert comparable(got) == comparable(wanted), (name, qtype, client)
            else:
                assert got == wanted, (name, qtype, client)
            if not any(part.startswith("cache") for part in block) and turn == 4 and logs:
                fresh = Server(text, world, clock, False)
                assert comparable(got) == comparable(fresh.ask(wire, client)), (name, qtype)
    requests = fast.counts()["coredns_dns_requests_total"]
    assert sum(requests.values()) == asked
    assert fast.counts() == slow.counts()
    assert len(lines[fast].lines) == (asked if logs else 0)
    assert sorted(lines[fast].lines) == sorted(lines[slow].lines)


@settings(max_examples=300, deadline=None)
@given(BLOCK, st.lists(ASK, min_size=1, max_size=5), st.lists(CHANGE, max_size=5))
def test_a_kept_answer_is_the_chains_answer_whatever_stands_in_the_block(
    block: tuple[str, ...], questions: list[tuple[Any, ...]], changes: list[tuple[Any, ...]]
) -> None:
    clock = FakeClock()
    steps = [*questions, *(step for one in changes for step in (one, *questions))]
    with mock.patch("kdns.server.udp.time", SimpleNamespace(monotonic=clock)):
        check(block, steps, clock)


@settings(max_examples=400, deadline=None)
@given(
    st.tuples(*(st.sampled_from(("", *group)) for group in OUTSIDE_GROUPS)),
    st.sampled_from(CACHES), st.lists(OUTSIDE_ASK, min_size=1, max_size=3),
    st.lists(LATER, min_size=1, max_size=6), st.sampled_from(("log", "", JSON)),
)  # fmt: skip
def test_a_cached_name_of_the_outside_counts_down_as_in_the_chain(
    block: tuple[str, ...],
    cache: str,
    questions: list[tuple[Any, ...]],
    later: list[tuple[Any, ...]],
    logs: str,
) -> None:
    clock = FakeClock()
    if "prefer_positive" in cache or any(part.startswith("rewrite ttl") for part in block):
        # These are repeated for the rest of the second, come what may.
        later = [one for one in later if one[0] != "evict"]
    steps = [*questions, *(step for one in later for step in (one, *questions))]
    with mock.patch("kdns.server.udp.time", SimpleNamespace(monotonic=clock)):
        check((*block, cache), steps, clock, logs)


KUBERNETES = "kubernetes cluster.local in-addr.arpa"
# What was wrong once: (what stands in the block, what happens).
CASES: dict[str, tuple[str, list[tuple[Any, ...]]]] = {
    "a client that may not ask": (GROUPS[0][0], [("ask", f"s0.{SVC}", t.AAAA, None, False)]),
    "a template that shows the client": (GROUPS[5][1], [("ask", "a.tpl.", t.A, None, False)]),
    "misses of a cache that keeps nothing": (
        "cache 30 {\ndisable success cluster.local\n}\n" + KUBERNETES,
        [("ask", f"s0.{SVC}", t.A, None, False)],
    ),
    "who am I": ("whoami", [("ask", "a.tpl.", t.A, None, False)]),
    "a Service in place of a record that stood in for it": (
        KUBERNETES + " {\nfallthrough\n}\nfile db.cluster cluster.local",
        [
            ("ask", f"new.{SVC}", t.A, None, False),
            ("service", "new", 2),
            ("ask", f"new.{SVC}", t.A, None, False),
        ],
    ),
    "PTR of a namespace that is gone": (
        KUBERNETES + " {\nnamespaces default\n}",
        [
            ("ask", "1.0.96.10.in-addr.arpa.", t.PTR, None, False),
            ("namespace", "", 0),
            ("ask", "1.0.96.10.in-addr.arpa.", t.PTR, None, False),
        ],
    ),
    "a TTL that the server block changes once it is low": (
        "cache 30\nrewrite ttl suffix outside. 10-20\n" + KUBERNETES,
        [
            step
            for _ in range(4)
            for step in (("ask", "one.outside.", t.A, None, False), ("later", "", 7.2))
        ],
    ),
    "what lies below a part of a reverse name": (
        KUBERNETES + " {\nspec strict\n}",
        [
            ("ask", "0.96.10.in-addr.arpa.", t.A, None, False),
            ("service", "s0", 0),
            ("ask", "0.96.10.in-addr.arpa.", t.A, None, False),
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_kept_answer_must_not_outlive(case: str) -> None:
    text, steps = CASES[case]
    clock = FakeClock()
    with mock.patch("kdns.server.udp.time", SimpleNamespace(monotonic=clock)):
        check((KUBERNETES, text) if KUBERNETES not in text else (text,), steps, clock)
