"""Names: queries a second and CPU a query, beside every DNS server the machine has.

Decides what is asked and how it is told. Each round takes each figure of all servers one after
the other, so that ratios are of neighbours in time; who is asked and how is servers.py's.
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from bench import servers
from bench.servers import LOAD_CORE, SERVER_CORE, Load, Peer

OFFERED = 20_000  # queries a second at which the CPU a query is read
LATENCY_SHARE = 0.5  # of what the slower of kdns and CoreDNS can: the load while latency is read
SERVICES = 1000
LOOKUPS = 1000  # names whose search lists are asked again and again
OUTSIDE_NAMES = 1000
FLOOD = 10_000  # new names a second beside the repeated questions
DIRECT = 2000  # questions put to the upstream directly and through a server

# (what, of which load, which figure of kdns, against whom): at least or at most so much
GOALS: tuple[tuple[str, str, str, str, str, float], ...] = (
    ("throughput, repeated questions", "repeated", "rate", "CoreDNS", "at least", 8.0),
    ("throughput, repeated questions", "repeated", "rate", "echo", "at least", 0.8),
    ("the same, asked by dnsperf", "repeated", "dnsperf", "CoreDNS", "at least", 8.0),
    ("the same, asked by dnsperf", "repeated", "dnsperf", "echo", "at least", 0.8),
    (f"server CPU a query at {OFFERED:,}/s", "repeated", "cpu", "echo", "at most", 1.6),
    (f"server CPU a query at {OFFERED:,}/s", "repeated", "cpu", "CoreDNS", "at most", 0.5),
    ("questions never repeated", "unseen", "rate", "CoreDNS", "at least", 3.0),
    ("NXDOMAIN of search lists, repeated", "search", "rate", "CoreDNS", "at least", 8.0),
    ("NXDOMAIN of search lists, fresh", "fresh", "rate", "CoreDNS", "at least", 3.0),
    ("p99 of an answer at half load", "repeated", "p99", "CoreDNS", "at most", 1.0),
)


@dataclass
class Figures:
    """What was measured of one server with one load, a value a round.

    rates -- queries answered a second; busy -- share of the server's core meanwhile
    dnsperf, dnsperf_busy -- the same, asked by dnsperf
    cpu -- microseconds a query at OFFERED
    p99 -- seconds, of one client beside a load of LATENCY_SHARE
    """

    rates: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    dnsperf: list[float] = field(default_factory=list)
    dnsperf_busy: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    p50: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    lost: int = 0

    def of(self, what: str) -> list[float]:
        found: list[float] = self.rates if what == "rate" else getattr(self, what)
        return found


@dataclass
class Results:
    """All that was measured.

    overhead -- server -> seconds that a forwarded question takes more than one put to the
                upstream itself, the median
    flooded  -- server -> the rate of repeated questions beside FLOOD, as a share of that alone
    """

    peers: list[Peer]
    loads: list[Load]
    generator: Path | None
    figures: dict[str, dict[str, Figures]] = field(default_factory=dict)
    overhead: dict[str, list[float]] = field(default_factory=dict)
    direct: list[float] = field(default_factory=list)
    flooded: dict[str, list[float]] = field(default_factory=dict)

    def at(self, peer: str, load: str) -> Figures | None:
        return self.figures.get(peer, {}).get(load)


# --- what is asked --------------------------------------------------------------------------


def respelt(chosen: random.Random, name: str) -> str:
    bits = chosen.getrandbits(len(name))
    return "".join(c.upper() if bits >> i & 1 else c for i, c in enumerate(name))


def cluster_names(services: int) -> Iterator[str]:
    for n in range(services):
        yield f"svc-{n}.bench-{n // 100}.svc.cluster.local"


def make_loads(folder: Path, services: int) -> list[Load]:
    """Write the questions down."""
    chosen = random.Random(7)
    names = list(cluster_names(services))
    pool: list[str] = []
    for n, name in enumerate(names):
        space = name.partition(".")[2]
        pool += [name, f"_http._tcp.{name}"]
        pool += [f"10-244-{n >> 7 & 255}-{(n << 1 & 255) + i}.{name}" for i in range(2)]
        pool += [f"www-{n}-{i}.example.com.{space}" for i in range(6)]
    chosen.shuffle(pool)
    search = [f"bench-0.{ZONE}", ZONE, "cluster.local", f"bench-1.{ZONE}", f"bench-2.{ZONE}"]
    asked = {
        "repeated": (f"{name} A" for name in names),
        "unseen": (
            f"{respelt(chosen, pool[n // 2 % len(pool)])} {'A' if n % 2 else 'AAAA'}"
            for n in range(1_200_000)
        ),
        "search": (f"www-{n}.example.com.{domain} A" for n in range(LOOKUPS) for domain in search),
        "fresh": (
            f"h{n}-{chosen.getrandbits(32):08x}.example.com.{domain} A"
            for n in range(150_000)
            for domain in search
        ),
        "outside": (f"{name} A" for name in outside_names()),
    }
    titles = {
        "repeated": f"repeated questions, {services:,} names",
        "unseen": f"questions never repeated: {len(pool):,} names, A and AAAA in turn, letters of"
                  " another case each time (0x20)",
        "search": f"NXDOMAIN of search lists, repeated: {LOOKUPS:,} outside names under each of"
                  f" {len(search)} search domains",
        "fresh": "NXDOMAIN of search lists, fresh: a new name for each look-up, under each of"
                 f" {len(search)} search domains",
        "outside": f"names of the outside from the cache, {OUTSIDE_NAMES:,} names",
    }  # fmt: skip
    loads = []
    for name, lines in asked.items():
        file = folder / name
        file.write_text("\n".join(lines) + "\n")
        loads.append(Load(name, titles[name], file, "outside" if name == "outside" else "cluster"))
    return loads


ZONE = "svc.cluster.local"


def outside_names() -> Iterator[str]:
    for n in range(OUTSIDE_NAMES):
        yield f"host-{n}.example.com"


# --- measuring ------------------------------------------------------------------------------


def measure(seconds: float, rounds: int, services: int = SERVICES) -> Results:
    """Measure everything; prints as it goes."""
    servers.needs()
    with tempfile.TemporaryDirectory() as name:
        return _measure(Path(name), seconds, rounds, services)


def _measure(folder: Path, seconds: float, rounds: int, services: int) -> Results:
    loads = make_loads(folder, services)
    api, upstream = servers.free_port(), servers.free_port()
    api_command = [
        sys.executable, str(servers.ROOT / "tests" / "api_replay.py"), "--port", str(api),
        "--services", str(services),
    ]  # fmt: skip
    log = folder / "api.log"
    other = servers.outside(folder, upstream, outside_names())
    with (
        servers.started(api_command, LOAD_CORE, log) as replay,
        servers.started(other, LOAD_CORE, folder / "outside.log") as outside,
    ):
        servers.wait_port(api, replay, log)
        servers.wait_answering(upstream, "host-1.example.com", outside, folder / "outside.log")
        found = servers.peers(folder, api, upstream, zone_file(folder, api))
        results = Results(found, loads, servers.built(folder, "load"))
        for _ in range(rounds):
            _round(results, folder, seconds, upstream)
        return results


def zone_file(folder: Path, api: int) -> Path:
    """Write the cluster's zone as kdns has it: what NSD and Knot serve."""
    conf = folder / "zone.Corefile"
    conf.write_text(servers.KUBEADM.format(
        port=servers.free_port(), api=api, upstream=9, pods="insecure", health=servers.free_port(),
        ready=servers.free_port(), metrics=servers.free_port(),
    ))  # fmt: skip
    out = subprocess.run(
        [sys.executable, "-m", "kdns", "dump", "zone", "-conf", str(conf)],
        capture_output=True, text=True, check=True, cwd=servers.ROOT,
    ).stdout  # fmt: skip
    lines = [line for line in out.splitlines() if " IN " in line or "\tIN\t" in line]
    zone = [line for line in lines if "cluster.local." in line.split()[0]]
    soa = next(line for line in zone if line.split()[3] == "SOA")
    rest = dict.fromkeys(line for line in zone if line.split()[3] != "SOA")
    path = folder / "cluster.zone"
    ns = "cluster.local. 30 IN NS ns.dns.cluster.local.\n"
    path.write_text("\n".join([soa, ns, *rest]) + "\n")
    return path


def _round(results: Results, folder: Path, seconds: float, upstream: int) -> None:
    """A machine's speed changes from one minute to the next: all servers run meanwhile; those
    that are not asked do next to nothing."""
    with contextlib.ExitStack() as stack:
        pids = {}
        for peer in results.peers:
            log = folder / f"{peer.name}.log"
            process = stack.enter_context(servers.started(peer.command, SERVER_CORE, log))
            first = servers.FIRST if "cluster" in peer.serves else "host-1.example.com"
            servers.wait_answering(peer.port, first, process, log)
            pids[peer] = process.pid
        for load in results.loads:
            _load(results, load, {p: pid for p, pid in pids.items() if load.asks in p.serves},
                  seconds)  # fmt: skip
        for peer in pids:
            if "outside" in peer.serves and peer.name != "echo":
                _forwarding(results, peer, upstream)


def _load(results: Results, load: Load, pids: dict[Peer, int], seconds: float) -> None:
    into = {
        peer: results.figures.setdefault(peer.name, {}).setdefault(load.name, Figures())
        for peer in pids
    }
    for peer, pid in pids.items():
        before = servers.cpu_seconds(pid)
        ran = servers.saturate(results.generator, peer.port, load, seconds)
        into[peer].rates.append(ran.rate)
        into[peer].busy.append((servers.cpu_seconds(pid) - before) / seconds)
        into[peer].lost += ran.lost
    for peer, pid in pids.items() if load.name == "repeated" else ():
        before = servers.cpu_seconds(pid)
        into[peer].dnsperf.append(servers.dnsperf(peer.port, load, seconds).rate)
        into[peer].dnsperf_busy.append((servers.cpu_seconds(pid) - before) / seconds)
    for peer, pid in pids.items():
        before = servers.cpu_seconds(pid)
        offered = servers.dnsperf(peer.port, load, seconds, OFFERED)
        into[peer].cpu.append((servers.cpu_seconds(pid) - before) / max(1, offered.answered) * 1e6)
        print(f"{peer.name:8} {load.name:9} {into[peer].rates[-1]:10,.0f} q/s"
              f" {into[peer].cpu[-1]:6.1f} us/q", flush=True)  # fmt: skip
    if load.name == "repeated":
        for peer in pids:
            _latency(results, peer, load, seconds, into[peer])
        for peer in pids:
            _flood(results, peer, seconds)


def _latency(results: Results, peer: Peer, load: Load, seconds: float, into: Figures) -> None:
    """Ask as one client beside a load that is the same for all: half of what the slower of kdns
    and CoreDNS can."""
    slowest = min(
        figures.dnsperf[0]
        for name in ("kdns", "CoreDNS")
        if (figures := results.at(name, load.name)) is not None and figures.dnsperf
    )
    with servers.Prober(peer.port, list(cluster_names(100))) as prober:
        servers.dnsperf(peer.port, load, seconds, int(slowest * LATENCY_SHARE))
    into.p50.append(servers.percentile(prober.seconds, 0.5))
    into.p99.append(servers.percentile(prober.seconds, 0.99))


def _flood(results: Results, peer: Peer, seconds: float) -> None:
    """Ask what is known while others ask for names that nobody has."""
    if peer.name not in ("kdns", "CoreDNS"):
        return
    loads = {load.name: load for load in results.loads}
    alone = results.figures[peer.name]["repeated"].dnsperf[-1]
    with ThreadPoolExecutor(1) as pool:
        flood = pool.submit(servers.dnsperf, peer.port, loads["fresh"], seconds + 1, FLOOD)
        time.sleep(0.5)
        beside = servers.dnsperf(peer.port, loads["repeated"], seconds).rate
        flood.result()
    results.flooded.setdefault(peer.name, []).append(beside / alone)


def _forwarding(results: Results, peer: Peer, upstream: int) -> None:
    """Put questions that nobody has cached, in turn to the upstream and through the server."""
    taken: dict[int, list[float]] = {upstream: [], peer.port: []}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(0.5)
        for n in range(DIRECT):
            for port, seconds in taken.items():
                sock.connect(("127.0.0.1", port))
                fresh = f"new-{time.monotonic_ns()}.example.com"  # NXDOMAIN, as good as any
                seconds.append(servers.once(sock, servers.question(fresh, n)))
    direct = statistics.median(taken[upstream])
    results.direct.append(direct)
    results.overhead.setdefault(peer.name, []).append(statistics.median(taken[peer.port]) - direct)


# --- telling --------------------------------------------------------------------------------


def ratio(mine: list[float], theirs: list[float]) -> str:
    """Return mine by theirs, round by round: "median (lowest to highest)"."""
    ratios = [m / t for m, t in zip(mine, theirs, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def goals(results: Results) -> Iterator[tuple[str, str, str, str]]:
    """Yield (what, goal, measured, met or missed)."""
    for what, load, figure, peer, bound, value in GOALS:
        mine, theirs = results.at("kdns", load), results.at(peer, load)
        goal = f"{bound} {value:g}x {peer}"
        if mine is None or theirs is None or not theirs.of(figure):
            yield what, goal, f"no {peer} here", "-"
            continue
        pairs = zip(mine.of(figure), theirs.of(figure), strict=True)
        middle = statistics.median([m / t for m, t in pairs])
        met = middle >= value if bound == "at least" else middle <= value
        measured = ratio(mine.of(figure), theirs.of(figure))
        limit = results.at("echo", load)
        if not met and figure in ("rate", "dnsperf") and peer != "echo" and limit is not None:
            measured += f"; the echo: {ratio(limit.of(figure), theirs.of(figure))}"
        yield what, goal, measured, "met" if met else "missed"
    if "kdns" in results.overhead:
        middle = statistics.median(results.overhead["kdns"]) * 1e6
        yield ("forwarding, p50 over asking the upstream directly", "under 150 µs",
               f"{middle:.0f} µs", "met" if middle < 150 else "missed")  # fmt: skip
    if "kdns" in results.flooded:
        middle = statistics.median(results.flooded["kdns"])
        others = results.flooded.get("CoreDNS")
        beside = f" (CoreDNS {statistics.median(others):.2f}x)" if others else ""
        yield (f"known names beside {FLOOD:,} new ones a second", "at least 0.7x of alone",
               f"{middle:.2f}x{beside}", "met" if middle >= 0.7 else "missed")  # fmt: skip
    cached = results.at("kdns", "outside")
    if cached is not None:
        middle = statistics.median(cached.rates)
        yield ("cached names of the outside, one core", "at least 20,000/s", f"{middle:,.0f}/s",
               "met" if middle >= 20_000 else "missed")  # fmt: skip


def section(results: Results, when: str, machine: str, command: str) -> list[str]:
    """Return the part's lines for RESULTS.md."""
    rounds = max(len(f.rates) for by in results.figures.values() for f in by.values())
    lines = [
        "# Measured",
        "",
        f"{when} on {machine}. Command: {command}. Server on one core, whoever asks on the other;"
        f" kubeadm Corefile over {SERVICES:,} Services, metrics on; {rounds} rounds. Queries a"
        f" second: {servers.CLIENTS} clients, {servers.OUTSTANDING} questions outstanding, by"
        " bench/load.c (recvmmsg/sendmmsg), which one core suffices for to keep any of these"
        " servers busy; dnsperf, which takes longer for a question than the echo for its answer,"
        " beside it, and for offered rates. Ratios are taken within a round; the median, lowest"
        " and highest in brackets: read them, for absolute figures differ by machine.",
        "",
        *[f"- {peer.name}: {peer.version}" for peer in results.peers if peer.version],
        "- echo: bench/echo.c, a bare UDP echo (recvmmsg/sendmmsg): the limit of the socket",
        "",
        "![queries a second](results.svg)",
        "",
        "## Goals",
        "",
        "| what | goal | measured | |",
        "| --- | --- | --- | --- |",
        *[f"| {' | '.join(row)} |" for row in goals(results)],
        "",
    ]
    for load in results.loads:
        lines += _table(results, load)
    if results.overhead:
        lines += _forwarding_table(results)
    return lines


def _table(results: Results, load: Load) -> list[str]:
    lines = [
        f"## {load.title}", "",
        f"| server | queries/s | of echo | of CoreDNS | CPU µs/query at {OFFERED:,}/s |"
        " p50 / p99 at half load |",
        "| --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for name, by_load in results.figures.items():
        figures = by_load.get(load.name)
        if figures is None:
            continue
        ratios = _ratios(results, load, figures, "rate")
        rate = statistics.median(figures.rates)
        spread = (max(figures.rates) - min(figures.rates)) / rate * 50 if rate else 0.0
        latency = "-"
        if figures.p99:
            p50, p99 = statistics.median(figures.p50), statistics.median(figures.p99)
            latency = f"{p50 * 1e6:.0f} / {p99 * 1e6:.0f} µs"
        lines.append(
            f"| {name} | {rate:,.0f} (±{spread:.0f} %) | {ratios[0]} | {ratios[1]} |"
            f" {statistics.median(figures.cpu):.1f} | {latency} |"
        )
    lines.append("")
    if load.name == "repeated":
        lines += _dnsperf_table(results, load)
    return lines


def _ratios(results: Results, load: Load, figures: Figures, what: str) -> list[str]:
    """Return a server's ratios to the echo and to CoreDNS."""
    return [
        ratio(figures.of(what), other.of(what))
        if (other := results.at(peer, load.name)) is not None
        else "-"
        for peer in ("echo", "CoreDNS")
    ]


def _dnsperf_table(results: Results, load: Load) -> list[str]:
    """Return the same questions asked by dnsperf, and how busy that kept each server."""
    lines = [
        "| asked by dnsperf | queries/s | of echo | of CoreDNS | server's core busy |"
        " with bench/load.c |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, by_load in results.figures.items():
        figures = by_load.get(load.name)
        if figures is None:
            continue
        ratios = _ratios(results, load, figures, "dnsperf")
        busy, most = (statistics.median(of) for of in (figures.dnsperf_busy, figures.busy))
        lines.append(
            f"| {name} | {statistics.median(figures.dnsperf):,.0f} | {ratios[0]} | {ratios[1]} |"
            f" {busy:.0%} | {most:.0%} |"
        )
    return [*lines, ""]


def _forwarding_table(results: Results) -> list[str]:
    direct = statistics.median(results.direct) * 1e6
    return [
        "## Forwarding: a question nobody has cached, p50 over asking the upstream directly", "",
        f"The upstream itself takes {direct:.0f} µs.", "",
        "| server | µs more |", "| --- | --- |",
        *[f"| {name} | {statistics.median(more) * 1e6:.0f} |"
          for name, more in results.overhead.items()],
        "",
    ]  # fmt: skip


def values(results: Results, when: str, machine: str) -> dict[str, object]:
    """Return the part's values for results.json."""
    return {
        "when": when,
        "machine": machine,
        "versions": {peer.name: peer.version for peer in results.peers if peer.version},
        "results": {
            name: {load: vars(figures) for load, figures in by_load.items()}
            for name, by_load in results.figures.items()
        },
        "overhead": results.overhead,
        "flooded": results.flooded,
        "goals": [list(row) for row in goals(results)],
    }


def chart(results: Results) -> str:
    """Return an SVG: a group of bars for each load, a bar for each server."""
    from bench.chart import bars

    groups = []
    for load in results.loads:
        named = [
            (name, statistics.median(by_load[load.name].rates))
            for name, by_load in results.figures.items()
            if load.name in by_load
        ]
        groups.append((load.title.partition(":")[0].partition(",")[0], named))
    return bars("queries a second, one core", groups)


def compare(base: dict[str, object], results: Results) -> list[str]:
    """Return a line a load: this run beside an earlier results.json, as ratios to the echo of
    the same run, for machines differ."""
    held = base.get("results")
    assert isinstance(held, dict), json.dumps(base)[:200]
    lines = ["| load | then, of echo | now, of echo | change |", "| --- | --- | --- | --- |"]
    for load in results.loads:
        mine, echo = results.at("kdns", load.name), results.at("echo", load.name)
        was, limit = held.get("kdns", {}).get(load.name), held.get("echo", {}).get(load.name)
        if mine is None or echo is None or not was or not limit:
            continue
        then = statistics.median(was["rates"]) / statistics.median(limit["rates"])
        now = statistics.median(mine.rates) / statistics.median(echo.rates)
        lines.append(f"| {load.name} | {then:.3f} | {now:.3f} | {(now / then - 1) * 100:+.0f} % |")
    return lines
