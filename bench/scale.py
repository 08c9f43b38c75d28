"""Scale: 10,000 Services with 10 endpoints each, beside CoreDNS where the machine has it.

Decides what is done to a server of that many names and how it is told: how soon it answers after
its first list, what it holds, how fast it is while objects change, how late a change is seen,
and what a reload and a relist under load cost. Who is started and asked how is servers.py's.

    python bench/scale.py serve SERVICES ENDPOINTS PODS    the API server, as a program
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

from bench import servers  # noqa: E402
from bench.servers import LOAD_CORE, SERVER_CORE, Load, Peer, percentile  # noqa: E402

SERVICES, ENDPOINTS, PODS = 10_000, 10, 50_000
RATES = (0, 100, 1000)  # objects that change a second
EVENTS = 300
SHARE = 0.5  # of what the slower one can: the load while latencies are read
LATE = 2.0  # seconds; a change that is not seen by then is lost
STARTS = 5
SMALL, HELP = "manifests, YAML, 1,000 Services", "kdns --help"
START, START_HELP = 0.4, 0.15  # seconds

READY, RSS, KEPT, EVENT_P50, EVENT_P99, PAUSE = 1.5, 150.0, 0.9, 0.0005, 0.003, 0.020


@dataclass
class Figures:
    """What was measured of one server, a value a round.

    ready    -- seconds from its first request to the API server to its first answer
    rss      -- megabytes then
    rates    -- objects that change a second -> answers a second
    p99      -- the same -> seconds of an answer at half load
    events   -- seconds from a change to the answer that shows it
    relist   -- seconds of the slowest answer while everything is listed anew
    lost_reload, lost_relist -- questions without an answer, of `asked`
    """

    ready: list[float] = field(default_factory=list)
    rss: list[float] = field(default_factory=list)
    rates: dict[int, list[float]] = field(default_factory=dict)
    p99: dict[int, list[float]] = field(default_factory=dict)
    events: list[float] = field(default_factory=list)
    reload: list[float] = field(default_factory=list)
    relist: list[float] = field(default_factory=list)
    lost_reload: int = 0
    lost_relist: int = 0
    asked: int = 0


@dataclass
class Results:
    """Everything. start -- source -> (seconds from exec to the first answer, megabytes)"""

    machine: str = ""
    command: str = ""
    when: str = ""
    peers: list[Peer] = field(default_factory=list)
    figures: dict[str, Figures] = field(default_factory=dict)
    start: dict[str, tuple[float, float]] = field(default_factory=dict)


# --- the API server -------------------------------------------------------------------------


class Api:
    """The API server as a program of its own, told what to do over its standard input."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._asking, self._answering = process.stdin, process.stdout
        self.url = self._answering.readline().decode().strip()

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def ask(self, *words: object) -> float:
        """Have something done: "first", "churn RATE", "move N", "sent", "relist"; return the
        number it answers, of the machine's monotonic clock but for churn."""
        self._asking.write(" ".join(map(str, words)).encode() + b"\n")
        self._asking.flush()
        return float(self._answering.readline())


@contextlib.contextmanager
def api_server(folder: Path, services: int, endpoints: int, pods: int) -> Iterator[Api]:
    with (folder / "api.log").open("wb") as log:
        process = subprocess.Popen(
            ["taskset", "-c", LOAD_CORE, sys.executable, str(Path(__file__)), "serve",
             str(services), str(endpoints), str(pods)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
        )  # fmt: skip
        try:
            api = Api(process)
            if not api.url:
                sys.exit(f"bench: no API server:\n{(folder / 'api.log').read_text()[-2000:]}")
            yield api
        finally:
            process.terminate()
            process.wait()


async def serve(services: int, endpoints: int, pods: int) -> None:
    """Serve lists and watches; lines of standard input say what happens to them."""
    from aiohttp import web
    from api_replay import ApiReplay, many_pods, many_services

    class Timed(ApiReplay):
        first = 0.0  # when the first request since the last "first" came

        async def _collection(self, request: web.Request) -> web.StreamResponse:
            self.first = self.first or time.monotonic()
            return await super()._collection(request)

    objects = list(many_services(services, endpoints))
    slices = [one for one in objects if one["kind"] == "EndpointSlice"]
    api = Timed()
    api.load([*objects, *many_pods(pods)])
    await api.start()
    print(api.url, flush=True)
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(lines), sys.stdin
    )
    moved, done = 0, 0
    churning: asyncio.Task[None] | None = None

    async def move(number: int) -> None:
        nonlocal moved
        moved += 1
        one = slices[number]
        first = {**one["endpoints"][0], "addresses": [moved_address(moved)]}
        await api.put({**one, "endpoints": [first, *one["endpoints"][1:]]})

    async def churn(rate: int) -> None:
        nonlocal done
        began, sent = time.monotonic(), 0
        while True:
            while sent < (time.monotonic() - began) * rate:
                sent += 1
                done += 1
                await move(done * 7 % len(slices))
            await asyncio.sleep(0.002)

    while line := await lines.readline():
        words = line.decode().split()
        answer = time.monotonic()
        if words[0] == "first":
            answer, api.first = api.first, 0.0
        elif words[0] == "churn":
            if churning is not None:
                churning.cancel()
                await asyncio.wait((churning,))
            rate = int(words[1])
            churning = asyncio.create_task(churn(rate)) if rate else None
            answer = done
        elif words[0] == "move":
            moved = int(words[2]) - 1
            await move(int(words[1]))
        elif words[0] == "sent":
            answer = api.sent_at
        elif words[0] == "relist":
            api.forget()
            await api.wake()
        print(answer, flush=True)
    await api.stop()


def moved_address(number: int) -> str:
    """Return the address that a change brings: none that many_services() has."""
    return f"11.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"


# --- measuring ------------------------------------------------------------------------------


def missing() -> str:
    """Return why this part cannot run."""
    return ""


def measure(seconds: float, rounds: int, services: int = SERVICES) -> Results:
    """Measure everything; prints as it goes."""
    servers.needs()
    results = Results()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        load = _load(folder, services)
        with api_server(folder, services, ENDPOINTS, 0) as api:
            results.peers = [
                peer
                for peer in servers.peers(folder, api.port, 9, None)
                if peer.name in ("kdns", "CoreDNS")
            ]
            for _ in range(rounds):
                for peer in results.peers:
                    _round(results, peer, api, folder, load, seconds, services)
        _starts(results, folder, services)
    return results


def _load(folder: Path, services: int) -> Load:
    file = folder / "names"
    file.write_text(
        "".join(f"svc-{n}.bench-{n // 100}.svc.cluster.local A\n" for n in range(services))
    )
    return Load("names", f"{services:,} names", file)


def _last(services: int) -> str:
    return f"svc-{services - 1}.bench-{(services - 1) // 100}.svc.cluster.local"


def _round(
    results: Results, peer: Peer, api: Api, folder: Path, load: Load, seconds: float, services: int
) -> None:
    figures = results.figures.setdefault(peer.name, Figures())
    log = folder / f"{peer.name}.log"
    api.ask("first")
    with servers.started(peer.command, SERVER_CORE, log) as process:
        servers.wait_answering(peer.port, _last(services), process, log, pause=0.01)
        figures.ready.append(time.monotonic() - api.ask("first"))
        figures.rss.append(servers.memory(process.pid))
        print(f"{peer.name:8} ready {figures.ready[-1]:.2f} s, {figures.rss[-1]:.0f} MB",
              flush=True)  # fmt: skip
        for rate in RATES:
            api.ask("churn", rate)
            figures.rates.setdefault(rate, []).append(
                servers.dnsperf(peer.port, load, seconds).rate
            )
        offered = _offered(results)
        for rate in RATES:
            api.ask("churn", rate)
            with servers.Prober(peer.port, _names(services)) as prober:
                servers.dnsperf(peer.port, load, seconds, offered)
            figures.p99.setdefault(rate, []).append(percentile(prober.seconds, 0.99))
            print(
                f"{peer.name:8} {rate:5} changes/s: {figures.rates[rate][-1]:9,.0f} q/s, p99"
                f" {figures.p99[rate][-1] * 1e3:.2f} ms at {offered:,}/s",
                flush=True,
            )
        api.ask("churn", 0)
        figures.events += _events(peer, api, services)
        _reload(figures, peer, process, folder, load, seconds, offered, services)
        _relist(figures, peer, api, load, seconds, offered, services)


def _offered(results: Results) -> int:
    """Return what is offered to all while latencies are read."""
    slowest = min(figures.rates[0][0] for figures in results.figures.values() if figures.rates)
    return int(slowest * SHARE)


def _names(services: int) -> list[str]:
    return [f"svc-{n}.bench-{n // 100}.svc.cluster.local" for n in range(0, services, 97)]


# No address comes twice, whoever is asked: it would be there already.
_moves = itertools.count(1_000_000)


def _events(peer: Peer, api: Api, services: int) -> list[float]:
    """Return how long each of many changes took from leaving the API server to being seen: an
    endpoint moves to an address that its name is asked for until it is there."""
    seen: list[float] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("127.0.0.1", peer.port))
        sock.settimeout(0.5)
        for n in range(EVENTS):
            number = next(_moves)
            service = n * 31 % services
            label = moved_address(number).replace(".", "-")
            name = f"{label}.svc-{service}.bench-{service // 100}.svc.cluster.local"
            began = api.ask("move", service, number)
            while (now := time.monotonic()) < began + LATE:
                if _answered(sock, servers.question(name, n)):
                    now = time.monotonic()
                    break
            seen.append(now - api.ask("sent"))
    print(f"{peer.name:8} a change is seen after {statistics.median(seen) * 1e3:.2f} ms, p99"
          f" {percentile(seen, 0.99) * 1e3:.2f}", flush=True)  # fmt: skip
    return seen


def _answered(sock: socket.socket, asked: bytes) -> bool:
    sock.send(asked)
    with contextlib.suppress(OSError):
        while (answer := sock.recv(4096))[:2] != asked[:2]:
            pass
        return answer[3] & 15 == 0 and answer[7] > 0
    return False


def _reload(
    figures: Figures,
    peer: Peer,
    process: subprocess.Popen[bytes],
    folder: Path,
    load: Load,
    seconds: float,
    offered: int,
    services: int,
) -> None:
    """Change the Corefile in the middle of a load."""
    conf = folder / f"{peer.name}.Corefile"
    before = conf.read_text()

    def change() -> None:
        conf.write_text(before.replace("ttl 30", "ttl 29"))
        process.send_signal(signal.SIGUSR1)

    lost, worst = _while_loaded(figures, peer, load, seconds, offered, services, change)
    conf.write_text(before)
    figures.lost_reload += lost
    figures.reload.append(worst)
    print(f"{peer.name:8} reload: {lost} lost, the slowest answer {worst * 1e3:.1f} ms", flush=True)


def _relist(
    figures: Figures, peer: Peer, api: Api, load: Load, seconds: float, offered: int, services: int
) -> None:
    """End all watches as too old in the middle of a load."""
    lost, worst = _while_loaded(
        figures, peer, load, seconds, offered, services, lambda: api.ask("relist")
    )
    figures.lost_relist += lost
    figures.relist.append(worst)
    print(f"{peer.name:8} relist: {lost} lost, the slowest answer {worst * 1e3:.1f} ms", flush=True)


def _while_loaded(
    figures: Figures, peer: Peer, load: Load, seconds: float, offered: int, services: int, act: Any
) -> tuple[int, float]:
    """Act in the middle of a load; return (questions lost, seconds of the slowest answer)."""
    timer = threading.Timer(seconds * 0.4, act)
    with servers.Prober(peer.port, _names(services)) as prober:
        timer.start()
        ran = servers.dnsperf(peer.port, load, seconds, offered)
        timer.join()
    figures.asked += ran.answered + ran.lost
    return ran.lost, max(prober.seconds, default=0.0)


# --- other sources --------------------------------------------------------------------------

PLAIN = """.:{port} {{
    bind 127.0.0.1
    kubernetes cluster.local in-addr.arpa ip6.arpa {{
        {source}
        pods {pods}
    }}
}}
"""


def _starts(results: Results, folder: Path, services: int) -> None:
    """Start kdns over other sources of as many names, its modules compiled, as an installation
    has them."""
    from api_replay import many_services

    before = os.environ.copy()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(folder / "pyc")
    try:
        _each_start(results, folder, services, many_services)
    finally:
        os.environ.clear()
        os.environ.update(before)


def _each_start(results: Results, folder: Path, services: int, many_services: Any) -> None:
    import yaml

    thousand = folder / "objects.yaml"
    some = [one for one in many_services(1000, 0) if one["kind"] == "Service"]
    thousand.write_text(yaml.dump_all(some, Dumper=yaml.CSafeDumper))
    source = f"manifests {thousand}"
    _start(folder, source, "insecure", _last(1000))  # compiles
    tries = [_start(folder, source, "insecure", _last(1000)) for _ in range(STARTS)]
    results.start[SMALL] = statistics.median(t for t, _ in tries), tries[-1][1]
    helps = [_help() for _ in range(STARTS + 1)][1:]
    results.start[HELP] = statistics.median(helps), 0.0
    with api_server(folder, services, ENDPOINTS, PODS) as api:
        source = f"endpoint http://127.0.0.1:{api.port}"
        title = f"API server, {PODS:,} Pods besides (pods verified)"
        results.start[title] = _start(folder, source, "verified", _last(services))
    objects = list(many_services(services, ENDPOINTS))
    path = folder / "objects.json"
    path.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))
    results.start["manifests, JSON"] = _start(
        folder, f"manifests {path}", "insecure", _last(services)
    )
    data = [f"--data-dir={folder / 'data'}"]
    results.start["the embedded registry, filled from that file (kdns up -f)"] = _start_up(
        folder, [*data, "-f", str(path)], _last(services)
    )
    results.start["the embedded registry, from its own folder"] = _start_up(
        folder, data, _last(services)
    )


def _help() -> float:
    began = time.monotonic()
    subprocess.run(
        ["taskset", "-c", SERVER_CORE, sys.executable, "-m", "kdns", "--help"],
        stdout=subprocess.DEVNULL, check=True, cwd=HERE.parent,
    )  # fmt: skip
    return time.monotonic() - began


def _start(folder: Path, source: str, pods: str, name: str) -> tuple[float, float]:
    port = servers.free_port()
    conf, log = folder / "start.Corefile", folder / "start.log"
    conf.write_text(PLAIN.format(port=port, source=source, pods=pods))
    command = [sys.executable, "-m", "kdns", "serve", "-conf", str(conf)]
    return _first_answer(command, port, name, log)


def _start_up(folder: Path, flags: list[str], name: str) -> tuple[float, float]:
    port = servers.free_port()
    command = [sys.executable, "-m", "kdns", "up", "--api-port=0", f"--dns-port={port}",
               "--insecure", *flags]  # fmt: skip
    return _first_answer(command, port, name, folder / "up.log")


def _first_answer(command: list[str], port: int, name: str, log: Path) -> tuple[float, float]:
    began = time.monotonic()
    with servers.started(command, SERVER_CORE, log) as process:
        servers.wait_answering(port, name, process, log, pause=0.005)
        took, held = time.monotonic() - began, servers.memory(process.pid)
    print(f"{' '.join(command[2:5])}: {took:.2f} s, {held:.0f} MB", flush=True)
    return took, held


# --- telling --------------------------------------------------------------------------------


def goals(results: Results) -> Iterator[tuple[str, str, str, str]]:
    """Yield (what, goal, measured, met or missed)."""
    mine, theirs = results.figures["kdns"], results.figures.get("CoreDNS")
    size = f"{SERVICES:,} x {ENDPOINTS}"
    ready, rss = statistics.median(mine.ready), statistics.median(mine.rss)
    yield f"{size}: ready after the list", f"{READY:g} s", f"{ready:.2f} s", _met(ready <= READY)
    yield f"{size}: RSS of one worker", f"{RSS:g} MB", f"{rss:.0f} MB", _met(rss <= RSS)
    if theirs is not None:
        for what, unit, own, other in (
            ("ready after the list", "s", ready, statistics.median(theirs.ready)),
            ("RSS of one worker", "MB", rss, statistics.median(theirs.rss)),
        ):
            yield (f"{size}: {what}", f"below CoreDNS's {other:.{2 if unit == 's' else 0}f} {unit}",
                   f"{own:.{2 if unit == 's' else 0}f} {unit}", _met(own < other))  # fmt: skip
    kept = statistics.median(a / b for a, b in zip(mine.rates[100], mine.rates[0], strict=True))
    yield ("throughput while 100 objects a second change", f"{KEPT:g}x that at rest",
           f"{kept:.2f}", _met(kept >= KEPT))  # fmt: skip
    p50, p99 = percentile(mine.events, 0.5), percentile(mine.events, 0.99)
    yield ("event sent -> changed answer, p50", f"under {EVENT_P50 * 1e3:g} ms",
           f"{p50 * 1e3:.2f} ms", _met(p50 < EVENT_P50))  # fmt: skip
    yield ("event sent -> changed answer, p99", f"under {EVENT_P99 * 1e3:g} ms",
           f"{p99 * 1e3:.2f} ms", _met(p99 < EVENT_P99))  # fmt: skip
    pause = max(mine.relist)
    yield ("slowest answer during a full relist", f"under {PAUSE * 1e3:g} ms",
           f"{pause * 1e3:.1f} ms", _met(pause < PAUSE))  # fmt: skip
    for title, most in ((SMALL, START), (HELP, START_HELP)):
        took = results.start[title][0]
        yield f"start: {title}", f"{most * 1e3:.0f} ms", f"{took * 1e3:.0f} ms", _met(took <= most)
    yield ("questions lost in reloads under load", "none", str(mine.lost_reload),
           _met(not mine.lost_reload))  # fmt: skip


def _met(met: bool) -> str:
    return "met" if met else "missed"


def section(results: Results) -> list[str]:
    """Return the part's lines for RESULTS.md."""
    rounds = len(results.figures["kdns"].ready)
    names = list(results.figures)
    rows: list[tuple[str, list[str]]] = []
    every = results.figures.values()
    rows.append(("ready after the first list request", [_seconds(f.ready) for f in every]))
    rows.append(("RSS then", [f"{statistics.median(f.rss):.0f} MB" for f in every]))
    for rate in RATES:
        what = f"{rate:,} changes/s" if rate else "at rest"
        rows.append((f"queries/s, {what}", [_kept(f, rate) for f in every]))
    for rate in RATES:
        what = f"{rate:,} changes/s" if rate else "at rest"
        rows.append((f"p99 of an answer at half load, {what}",
                     [_seconds(f.p99[rate]) for f in every]))  # fmt: skip
    rows.append(("a change is seen after, p50 / p99",
                 [f"{_one(percentile(f.events, 0.5))} / {_one(percentile(f.events, 0.99))}"
                  for f in every]))  # fmt: skip
    rows.append(("reload under load: lost, slowest answer",
                 [f"{f.lost_reload}, {_one(max(f.reload))}" for f in every]))  # fmt: skip
    rows.append(("relist under load: lost, slowest answer",
                 [f"{f.lost_relist}, {_one(max(f.relist))}" for f in every]))  # fmt: skip
    return [
        "# Scale",
        "",
        f"{results.when} on {results.machine}. Command: {results.command}. {SERVICES:,} Services"
        f" with {ENDPOINTS} endpoints each from one API replay server (on the load's core), kubeadm"
        f" Corefile, server on one core; {rounds} rounds. A change is an endpoint that moves to"
        " another address; it counts from when the API server sends it until an answer shows it,"
        " the endpoint's new name asked for again and again by one client.",
        "",
        *[f"- {peer.name}: {peer.version}" for peer in results.peers if peer.version],
        "",
        "## Goals of scale",
        "",
        "| what | goal | measured | |",
        "| --- | --- | --- | --- |",
        *[f"| {' | '.join(row)} |" for row in goals(results)],
        "",
        "## Side by side",
        "",
        f"| | {' | '.join(names)} |",
        f"| --- |{' --- |' * len(names)}",
        *[f"| {what} | {' | '.join(cells)} |" for what, cells in rows],
        "",
        "## Starts of kdns over other sources",
        "",
        "| source | from exec to the first answer | RSS then |",
        "| --- | --- | --- |",
        *[f"| {title} | {took:.2f} s | {f'{held:.0f} MB' if held else '-'} |"
          for title, (took, held) in results.start.items()],
        "",
    ]  # fmt: skip


def _one(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds < 0.1 else f"{seconds:.2f} s"


def _seconds(values: list[float]) -> str:
    return _one(statistics.median(values))


def _kept(figures: Figures, rate: int) -> str:
    value = statistics.median(figures.rates[rate])
    if not rate:
        return f"{value:,.0f}"
    ratios = [a / b for a, b in zip(figures.rates[rate], figures.rates[0], strict=True)]
    return f"{value:,.0f} ({statistics.median(ratios):.2f} of that at rest)"


def values(results: Results) -> dict[str, object]:
    """Return the part's values for results.json."""
    return {
        "scale": {
            "when": results.when,
            "machine": results.machine,
            "figures": {name: vars(figures) for name, figures in results.figures.items()},
            "start": results.start,
            "goals": [list(row) for row in goals(results)],
        }
    }


if __name__ == "__main__" and sys.argv[1:2] == ["serve"]:
    asyncio.run(serve(*map(int, sys.argv[2:5])))
