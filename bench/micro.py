"""What each step costs by itself: reading a question, looking a name up, writing an answer, taking
over an event, wording the rules of a Service, and whole questions without a socket.

Decides what is timed and how it is told. CPU of this process alone; the best of several rounds,
for whatever else the machine does only adds. Two figures of memory: `kept`, the blocks that one
outcome takes up (sys.getallocatedblocks, while many are held), and `peak`, the most octets that
were in use at a time while it was made (tracemalloc). bench/run.py writes them down.

    python bench/micro.py [--quick]
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import io
import itertools
import json
import random
import socket
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script's own folder is there, not the one above it

from bench import servers  # noqa: E402
from kdns.corefile import parse_corefile  # noqa: E402
from kdns.dns import types as t  # noqa: E402
from kdns.dns.message import (  # noqa: E402
    Edns,
    Reply,
    parse_query,
    render_query,
    render_reply,
)
from kdns.dns.name import labels_of, parse_name  # noqa: E402
from kdns.logs import setup_logging  # noqa: E402
from kdns.metrics import Metrics  # noqa: E402
from kdns.plugins.kubernetes import Kubernetes  # noqa: E402
from kdns.proxy import iptables_rules, nftables_rules  # noqa: E402
from kdns.proxy.options import NodeView, Options  # noqa: E402
from kdns.proxy.table import TableCompiler  # noqa: E402
from kdns.registry.decode import decode_event  # noqa: E402
from kdns.registry.snapshot import Changes, Snapshot, everything  # noqa: E402
from kdns.server.datagrams import ID_SIZE, QUERY_AT, REST_AT, SLOTS, Datagrams  # noqa: E402
from kdns.server.exchange import Exchange  # noqa: E402
from kdns.server.packetcache import PacketCache  # noqa: E402
from kdns.server.udp import UdpListener  # noqa: E402
from kdns.site import build_site  # noqa: E402
from kdns.zone.records import compile_service  # noqa: E402

SERVICES, ENDPOINTS = 1000, 10
ROUNDS, QUICK_ROUNDS = 9, 5
CALLS, QUICK_CALLS = 4096, 1024  # a round; whole questions: that many questions
HELD = 512  # outcomes that are held at once to count their blocks
TRACED = 64  # calls of which the peak is taken
YARDSTICK = "yardstick: adding up 100 numbers"  # what one machine's figures are another's by
CLIENT = ("10.244.1.1", 40000)


@dataclass
class Part:
    """One thing to time. prepare -- returns what the calls of one round are made with; the time
    it takes is not counted. each -- how many things one call does"""

    title: str
    call: Callable[[Any], Any]
    prepare: Callable[[int], Sequence[Any]]
    each: int = 1


@dataclass
class Figure:
    """What was measured of one part. ns -- of CPU, a value a round; kept, peak -- see above"""

    ns: list[float] = field(default_factory=list)
    kept: float = 0.0
    peak: int = 0

    @property
    def best(self) -> float:
        return min(self.ns)


@dataclass
class Figures:
    """All parts, by title."""

    parts: dict[str, Figure]
    when: str = ""
    machine: str = ""
    command: str = ""


# --- a cluster -----------------------------------------------------------------------------


def service_event(n: int) -> bytes:
    """Return a watch's line as an API server writes it."""
    return _line({
        "kind": "Service", "apiVersion": "v1",
        "metadata": _meta(f"svc-{n}", n, labels={"app": f"svc-{n}"}),
        "spec": {
            "ports": [{"name": "http", "protocol": "TCP", "port": 80, "targetPort": 8080},
                      {"name": "metrics", "protocol": "TCP", "port": 9090, "targetPort": 9090}],
            "selector": {"app": f"svc-{n}"}, "clusterIP": _cluster_ip(n),
            "clusterIPs": [_cluster_ip(n)], "type": "ClusterIP", "sessionAffinity": "None",
            "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack",
            "internalTrafficPolicy": "Cluster",
        },
        "status": {"loadBalancer": {}},
    })  # fmt: skip


def slice_event(n: int, ready: bool = True) -> bytes:
    owner = f"svc-{n}"
    return _line({
        "kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1",
        "metadata": _meta(f"{owner}-x7k2p", n, labels={
            "kubernetes.io/service-name": owner,
            "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
        }),
        "addressType": "IPv4",
        "endpoints": [
            {
                "addresses": [f"10.244.{n % 250}.{i + 2}"],
                "conditions": {"ready": ready, "serving": ready, "terminating": False},
                "targetRef": {"kind": "Pod", "namespace": f"bench-{n // 100}",
                              "name": f"{owner}-{i}", "uid": f"uid-{n}-{i}"},
                "nodeName": f"node-{i % 5}", "zone": f"zone-{i % 3}",
            }
            for i in range(ENDPOINTS)
        ],
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"},
                  {"name": "metrics", "port": 9090, "protocol": "TCP"}],
    })  # fmt: skip


def _meta(name: str, n: int, **more: Any) -> dict[str, Any]:
    return {
        "name": name, "namespace": f"bench-{n // 100}", "uid": f"uid-{name}",
        "resourceVersion": str(1000 + n), "creationTimestamp": "2026-01-01T00:00:00Z", **more,
    }  # fmt: skip


def _line(obj: dict[str, Any]) -> bytes:
    return json.dumps({"type": "MODIFIED", "object": obj}).encode()


def _cluster_ip(n: int) -> str:
    return f"10.96.{n // 250 + 1}.{n % 250 + 1}"


def cluster() -> Snapshot:
    """Return SERVICES Services, a hundred in a namespace, with their endpoints."""
    services: dict[str, dict[str, Any]] = {}
    slices: dict[str, dict[str, Any]] = {}
    spaces: dict[str, Any] = {}
    for n in range(SERVICES):
        space = f"bench-{n // 100}"
        if space not in spaces:
            named = {"metadata": {"name": space, "uid": space, "resourceVersion": "1"}}
            spaces[space] = _object("Namespace", _line(named))
        services.setdefault(space, {})[f"svc-{n}"] = _object("Service", service_event(n))
        slices.setdefault(space, {})[f"svc-{n}"] = (
            _object("EndpointSlice", slice_event(n)),
        )  # fmt: skip
    return Snapshot(
        revision=1, services=services, slices=slices, namespaces=spaces, synced=True,
        changed_at=1_700_000_000,
    )  # fmt: skip


def _object(kind: Any, line: bytes) -> Any:
    event = decode_event(kind, line)
    assert event.obj is not None, event.error
    return event.obj


# --- a server without a socket --------------------------------------------------------------


class Room(Datagrams):
    """Room whose datagrams come from a list, and whose answers go nowhere."""

    def __init__(self) -> None:
        super().__init__(socket.AF_INET)
        self.came: list[bytes] = []
        self.taken: list[int] = []

    def receive(self, fd: ctypes.c_int) -> int:
        taken, self.came = self.came[:SLOTS], self.came[SLOTS:]
        for slot, datagram in enumerate(taken):
            at = QUERY_AT[slot]
            self.queries[at : at + len(datagram)] = datagram
        self.taken = [len(datagram) for datagram in taken]
        return len(taken)

    def sizes(self, count: int) -> list[int]:
        return self.taken[:count]

    def first(self) -> bytes:
        return self.queries[ID_SIZE : self.taken[0]].tobytes()

    def send(self, fd: ctypes.c_int, first: int, end: int) -> None:
        pass

    def last(self) -> bytes:
        """Return the answer in the first slot."""
        at = REST_AT[0]
        rest = ctypes.string_at(self.vectors[at], self.vectors[at + 1])
        return self.queries[:ID_SIZE].tobytes() + rest


class Server:
    """The kubeadm Corefile's server block behind a listener; `more`: lines added to the block."""

    def __init__(self, snapshot: Snapshot, more: str = "") -> None:
        text = servers.KUBEADM.format(
            port=0, api=9, upstream=9, pods="insecure", health=1, ready=2, metrics=3
        )
        head, _, rest = text.partition("\n")
        corefile, problems = parse_corefile(f"{head}\n{more}{rest}", environ={}, default_port=53)
        metrics = Metrics()
        site = build_site(corefile, problems, metrics)
        (self.block,) = site.blocks
        (router,) = site.routers.values()
        found = self.block.find("kubernetes")
        assert isinstance(found, Kubernetes)
        self.kubernetes = found
        found.publish(snapshot, everything(snapshot), 0.0)
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.bind(("127.0.0.1", 0))
        self.exchange = Exchange(router, None, metrics)  # type: ignore[arg-type]
        self.listener = UdpListener(self.sock, self.exchange, PacketCache())
        self.room = Room()
        self.listener._room = self.room

    def answer(self, datagrams: list[bytes]) -> None:
        """Have as many datagrams answered as there is room for."""
        self.room.came = datagrams
        self.listener._drain()

    def close(self) -> None:
        self.listener.close()


# --- what is asked --------------------------------------------------------------------------

_number = itertools.count()
_chosen = random.Random(7)


def _batches(questions: Iterator[bytes]) -> Callable[[int], Sequence[list[bytes]]]:
    def prepare(calls: int) -> list[list[bytes]]:
        return [list(itertools.islice(questions, SLOTS)) for _ in range(calls)]

    return prepare


def asked(names: Iterable[str], qtypes: Sequence[int] = (t.A,), edns: Edns | None = None,
          respell: bool = False) -> Iterator[bytes]:  # fmt: skip
    for name, qtype in zip(names, itertools.cycle(qtypes)):
        wire = parse_name(respelt(name) if respell else name)
        yield render_query(next(_number) & 0xFFFF, wire, qtype, edns=edns)


def respelt(name: str) -> str:
    bits = _chosen.getrandbits(len(name))
    return "".join(c.upper() if bits >> i & 1 else c for i, c in enumerate(name))


def services(count: int = SERVICES) -> Iterator[str]:
    """Yield the Services' names, round and round."""
    for n in itertools.cycle(range(count)):
        yield f"svc-{n}.bench-{n // 100}.svc.cluster.local."


def not_there() -> Iterator[str]:
    """Yield what search lists make of names of the outside, each of them once."""
    for n in itertools.count():
        yield (
            f"h{n}-{_chosen.getrandbits(32):08x}.example.com.bench-{n % 10}.svc.cluster.local."
        )  # fmt: skip


# --- the parts ------------------------------------------------------------------------------


def steps(snapshot: Snapshot, server: Server) -> Iterator[Part]:
    """Yield the steps of an answer and of an event, one by one."""
    name = "svc-7.bench-0.svc.cluster.local."
    plain = next(asked([name]))
    cookie = next(asked([name], edns=Edns(1232, options=[(10, b"12345678")])))
    numbers = list(range(100))
    yield Part(YARDSTICK, lambda _: sum([n + 1 for n in numbers]), _same(None))
    yield Part("parse a query", lambda wire: parse_query(wire, CLIENT, "udp", 0.0), _same(plain))
    yield Part("parse a query with EDNS and a cookie",
               lambda wire: parse_query(wire, CLIENT, "udp", 0.0), _same(cookie))  # fmt: skip
    records = server.kubernetes.records
    for what, wanted in (
        ("look a Service's name up", "svc-7.bench-0.svc."),
        ("look up a name that is not there", "h1.example.com.bench-0.svc."),
    ):
        yield Part(what, records.lookup, _same(labels_of(parse_name(wanted))))
    for what, query in (
        ("encode a reply, one address", plain),
        ("encode a reply, NXDOMAIN", next(asked(not_there()))),
        ("encode a reply, SRV of two ports", next(asked([name], [t.SRV]))),
    ):
        parsed = parse_query(query, CLIENT, "udp", 0.0)
        reply = server.kubernetes.on_query(parsed)
        assert isinstance(reply, Reply)
        yield Part(what, lambda pair: render_reply(*pair), _same((parsed, reply)))
    yield Part("decode the event of a Service", lambda line: decode_event("Service", line),
               lambda calls: [service_event(n % SERVICES) for n in range(calls)])  # fmt: skip
    yield Part(f"decode the event of a slice of {ENDPOINTS} endpoints",
               lambda line: decode_event("EndpointSlice", line),
               lambda calls: [slice_event(n % SERVICES) for n in range(calls)])  # fmt: skip
    service = snapshot.services["bench-0"]["svc-7"]
    slices = snapshot.slices["bench-0"]["svc-7"]
    of = f"a Service of 2 ports and {ENDPOINTS} endpoints"
    yield Part(f"compile {of}", lambda _: compile_service(service, slices, ttl=30), _same(None))
    yield Part(f"compile {of}, and each endpoint",
               lambda _: compile_service(service, slices, ttl=30).endpoints,
               _same(None))  # fmt: skip
    changes = Changes(services=frozenset([("bench-0", "svc-7")]))
    yield Part("take over a change of that Service (kubernetes)",
               lambda _: server.kubernetes.publish(snapshot, changes, 0.0),
               _same(None))  # fmt: skip
    yield from _rules(snapshot)


def _rules(snapshot: Snapshot) -> Iterator[Part]:
    """Yield what the forwarding of that Service costs: its table, and both languages."""
    compiler = TableCompiler(4, NodeView("node-1", "10.0.0.1", "zone-1"))
    compiler.update(snapshot, everything(snapshot))
    changes = Changes(services=frozenset([("bench-0", "svc-7")]))
    ports = compiler.table.services["bench-0", "svc-7"]
    spellings = (
        ("iptables", iptables_rules.Spelling(Options(), large=False).spell),
        ("iptables, over 1,000 endpoints", iptables_rules.Spelling(Options(), large=True).spell),
        ("nftables", nftables_rules.Spelling(Options()).spell),
    )
    yield Part("compile its forwarding", lambda _: compiler.update(snapshot, changes),
               _same(None))  # fmt: skip
    for language, spell in spellings:
        yield Part(f"render its rules, {language}", _speller(spell), _same(ports))


def _speller(spell: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda ports: [spell(port) for port in ports]


def whole(server: Server, logging: Server, cached: Server) -> Iterator[Part]:
    """Yield whole questions, from octets to octets through the kubeadm Corefile's chain."""

    def part(title: str, questions: Iterator[bytes], of: Server = server) -> Part:
        return Part(title, of.answer, _batches(questions), SLOTS)

    yield part("whole: fresh NXDOMAIN of a search list", asked(not_there()))
    yield part("whole: the same with EDNS, and why (EDE)", asked(not_there(), edns=Edns(1232)))
    yield part("whole: one line of the log for each, too", asked(not_there()), logging)
    every = "svc-{}.bench-0.svc.cluster.local."
    # All is forgotten before a name comes again: so each question is the first of its kind.
    batches = itertools.count()

    def forgetting(datagrams: list[bytes]) -> None:
        if next(batches) % (SERVICES // SLOTS) == 0:
            server.listener.cache = PacketCache()
        server.answer(datagrams)

    for title, edns in (("", None), (", with EDNS", Edns(1232))):
        first = asked(services(), (t.A, t.AAAA), edns=edns)
        yield Part(f"whole: A and AAAA, each asked for the first time{title}", forgetting,
                   _batches(first), SLOTS)  # fmt: skip
    for _ in range(3):
        cached.answer(list(itertools.islice(asked(every.format(n) for n in range(SLOTS)), SLOTS)))
    yield part("whole: packet cache, the very same octets",
               asked(every.format(n) for n in itertools.cycle(range(SLOTS))), cached)  # fmt: skip
    yield part("whole: packet cache, letters of another case (template)",
               asked((every.format(n) for n in itertools.cycle(range(SLOTS))), respell=True),
               cached)  # fmt: skip


def _same(value: Any) -> Callable[[int], Sequence[Any]]:
    return lambda calls: [value] * calls


# --- measuring ------------------------------------------------------------------------------


def measure(quick: bool = False) -> Figures:
    """Measure everything."""
    return asyncio.run(_measure(quick))


async def _measure(quick: bool) -> Figures:
    snapshot = cluster()
    with _silent():
        made = [Server(snapshot), Server(snapshot, "    log\n"), Server(snapshot)]
        try:
            parts = [*steps(snapshot, made[0]), *whole(*made)]
            gc.collect()
            gc.freeze()
            return Figures({part.title: _figure(part, quick) for part in parts})
        finally:
            gc.unfreeze()
            for server in made:
                server.close()


@contextmanager
def _silent() -> Iterator[None]:
    """Let log lines be made and go nowhere."""
    setup_logging(io.StringIO())
    try:
        yield
    finally:
        setup_logging(sys.stdout)


def _figure(part: Part, quick: bool) -> Figure:
    figure = Figure()
    calls = max(1, (QUICK_CALLS if quick else CALLS) // part.each)
    part.call(part.prepare(1)[0])
    for _ in range(QUICK_ROUNDS if quick else ROUNDS):
        arguments = part.prepare(calls)
        call = part.call
        began = time.process_time()
        for argument in arguments:
            call(argument)
        spent = time.process_time() - began
        figure.ns.append(spent / calls / part.each * 1e9)
    figure.kept = _kept(part)
    figure.peak = _peak(part)
    return figure


def _kept(part: Part) -> float:
    """Return the blocks of memory an outcome takes up, or leaves behind in the server."""
    calls = max(1, HELD // part.each)
    arguments = part.prepare(calls)
    held: list[Any] = [None] * calls
    gc.collect()
    before = sys.getallocatedblocks()
    for n, argument in enumerate(arguments):
        held[n] = part.call(argument)
    return (sys.getallocatedblocks() - before) / calls / part.each


def _peak(part: Part) -> int:
    """Return the most octets in use during a call, over those before; of a batch, all of it."""
    peaks = []
    arguments = part.prepare(max(1, TRACED // part.each))
    tracemalloc.start()
    try:
        for argument in arguments:
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            part.call(argument)
            peaks.append(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
    return int(statistics.median(peaks))


# --- telling --------------------------------------------------------------------------------


def section(figures: Figures) -> list[str]:
    """Return the part's lines for RESULTS.md."""
    return [
        "# Measured: step by step",
        "",
        f"{figures.when} on {figures.machine}. Command: {figures.command}. CPU of the process,"
        " the best of the rounds and by how much their median is over it; calls of Python included,"
        " sockets not. kept: blocks of memory that one outcome takes up (sys.getallocatedblocks,"
        f" {HELD} of them held); peak: octets in use at most while it is made (tracemalloc;"
        f" for whole questions, of a batch of {SLOTS}). {SERVICES:,} Services of 2 ports and"
        f" {ENDPOINTS} endpoints.",
        "",
        "| what | ns | spread | kept | peak |",
        "| --- | --- | --- | --- | --- |",
        *[
            f"| {title} | {one.best:,.0f} | +{_spread(one) * 100:.0f} % | {max(one.kept, 0):.1f}"
            f" | {one.peak:,} |"
            for title, one in figures.parts.items()
        ],
        "",
    ]


def _spread(one: Figure) -> float:
    return statistics.median(one.ns) / one.best - 1 if one.best else 0.0


def values(figures: Figures) -> dict[str, object]:
    """Return the part's values for results.json."""
    return {"micro": asdict(figures)}


def compare(base: dict[str, object], figures: Figures) -> list[str]:
    """Return a line a part: this run beside an earlier results.json, as ratios to the yardstick
    of the same run, for machines differ."""
    held = base.get("micro")
    if not isinstance(held, dict):
        return ["step by step: there are no earlier figures to compare with"]
    then = {title: Figure(**one) for title, one in held["parts"].items()}
    lines = ["| what | then, of the yardstick | now | change | kept |",
             "| --- | --- | --- | --- | --- |"]  # fmt: skip
    for title, one in figures.parts.items():
        was = then.get(title)
        if was is None or title == YARDSTICK:
            continue
        before = was.best / then[YARDSTICK].best
        now = one.best / figures.parts[YARDSTICK].best
        lines.append(
            f"| {title} | {before:.2f} | {now:.2f} | {(now / before - 1) * 100:+.0f} % |"
            f" {was.kept:.1f} -> {one.kept:.1f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds of fewer calls")
    figures = measure(parser.parse_args().quick)
    print("\n".join(section(figures)))


if __name__ == "__main__":
    main()
