"""One process that answers, and several: queries a second, what they cost, and a worker killed.

On a machine of two cores the load generator (bench/load.c) has none of its own beside two
workers. So it is accounted for by giving each core one: a process that shares its core with a
generator, beside two workers that share two cores with two generators. With the second core all
there is comes twice, and the questions answered a second say what it is worth. The first setting
has server and generator on a core each, as the names part does. Each round runs all settings one
after the other.

    python bench/workers.py [--seconds N] [--rounds N]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import selectors
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import names, servers  # noqa: E402
from bench.servers import LOAD_CORE, SERVER_CORE, Load, Ran  # noqa: E402

SERVICES = 1000
LOADS = ("repeated", "search", "unseen")
# Of each generator. Many sockets, so that the kernel's shares are about even.
SOCKETS, OUTSTANDING = 32, 200
KILLS = 5
GOAL = 1.8
CLIENTS, EVERY = 32, 0.01  # who ask while a worker is killed, and how often each
APART = "1 process, the generator on the other core"
ONE = "1 process, its core shared with a generator"
TWO = "2 workers, each core shared with a generator"
# title -> workers, cores of the server, of each generator
SETTINGS = {
    APART: (1, SERVER_CORE, (LOAD_CORE,)),
    ONE: (1, SERVER_CORE, (SERVER_CORE,)),
    TWO: (2, f"{SERVER_CORE},{LOAD_CORE}", (SERVER_CORE, LOAD_CORE)),
}
COREFILE = """.:{port} {{
    bind 127.0.0.1
    workers {workers}
    ready 127.0.0.1:{ready}
    prometheus 127.0.0.1:{metrics}
    kubernetes cluster.local in-addr.arpa {{
        endpoint http://127.0.0.1:{api}
        pods insecure
        ttl 30
    }}
}}
"""


@dataclass
class Figures:
    """One setting with one load, a value a round. server, generator -- microseconds of processor
    time a query; busy -- cores that both had together"""

    rates: list[float] = field(default_factory=list)
    server: list[float] = field(default_factory=list)
    generator: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    lost: int = 0


@dataclass
class Kill:
    """A worker killed while CLIENTS ask. longest -- seconds of the slowest answer"""

    asked: int
    lost: int
    longest: float


@dataclass
class Results:
    """Everything measured."""

    loads: list[Load]
    generator: Path
    figures: dict[str, dict[str, Figures]] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)  # megabytes
    kills: list[Kill] = field(default_factory=list)
    machine: str = ""
    command: str = ""


def missing() -> str:
    """Return why it cannot be measured here; empty if it can."""
    for program, package in (("cc", "gcc"), ("taskset", "util-linux")):
        if shutil.which(program) is None:
            return f"needs {program} (Debian: apt-get install {package})"
    return "" if (os.cpu_count() or 1) > 1 else "needs two cores"


def measure(seconds: float, rounds: int) -> Results:
    """Measure everything; prints as it goes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loads = [one for one in names.make_loads(folder, SERVICES) if one.name in LOADS]
        api = servers.free_port()
        replay = [
            sys.executable, str(ROOT / "tests" / "api_replay.py"), "--port", str(api),
            "--services", str(SERVICES),
        ]  # fmt: skip
        generator = servers.built(folder, "load")
        assert generator is not None, missing()
        results = Results(loads, generator)
        with servers.started(replay, LOAD_CORE, folder / "api.log") as process:
            servers.wait_port(api, process, folder / "api.log")
            for _ in range(rounds):
                for title in SETTINGS:
                    _round(results, title, folder, api, seconds)
        return results


def _round(results: Results, title: str, folder: Path, api: int, seconds: float) -> None:
    workers, cores, load_cores = SETTINGS[title]
    port, log = servers.free_port(), folder / "kdns.log"
    conf = folder / "Corefile"
    conf.write_text(COREFILE.format(
        port=port, workers=workers, ready=servers.free_port(), metrics=servers.free_port(), api=api
    ))  # fmt: skip
    command = [sys.executable, "-m", "kdns", "serve", "-conf", str(conf)]
    with servers.started(command, cores, log) as process:
        servers.wait_answering(port, servers.FIRST, process, log)
        for load in results.loads:
            into = results.figures.setdefault(title, {}).setdefault(load.name, Figures())
            _ask(results.generator, into, port, process.pid, load, seconds, load_cores)
            print(f"{title:46} {load.name:9} {into.rates[-1]:9,.0f} q/s  server"
                  f" {into.server[-1]:5.1f} us/q, generator {into.generator[-1]:5.1f} us/q,"
                  f" {into.busy[-1]:.2f} cores busy", flush=True)  # fmt: skip
        results.memory[title] = servers.memory(process.pid)
        if workers > 1 and not results.kills:
            for _ in range(KILLS):
                results.kills.append(_kill_one(process.pid, port))
                print(f"{title:46} killed: {results.kills[-1]}", flush=True)


def _ask(
    generator: Path, into: Figures, port: int, pid: int, load: Load, seconds: float,
    cores: Sequence[str],
) -> None:  # fmt: skip
    def ask(core: str) -> Ran:
        return servers.saturate(generator, port, load, seconds, core, SOCKETS, OUTSTANDING)

    before = servers.cpu_seconds(pid)
    with ThreadPoolExecutor(len(cores)) as pool:
        ran = list(pool.map(ask, cores))
    spent, asked = servers.cpu_seconds(pid) - before, sum(one.cpu for one in ran)
    answered = max(1, sum(one.answered for one in ran))
    into.rates.append(sum(one.rate for one in ran))
    into.lost += sum(one.lost for one in ran)
    into.server.append(spent / answered * 1e6)
    into.generator.append(asked / answered * 1e6)
    into.busy.append((spent + asked) / seconds)


# --- a worker killed ------------------------------------------------------------------------


def _kill_one(pid: int, port: int) -> Kill:
    """Ask from many sockets, each question once; kill a worker on the way."""
    workers = [child for child in servers.children(pid) if _is_worker(child)]
    asked: dict[socket.socket, dict[int, float]] = {}
    answers: list[float] = []
    with selectors.DefaultSelector() as ready, contextlib.ExitStack() as opened:
        for _ in range(CLIENTS):
            sock = opened.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sock.connect(("127.0.0.1", port))
            sock.setblocking(False)
            ready.register(sock, selectors.EVENT_READ)
            asked[sock] = {}
        began = time.monotonic()
        turn, killed = 0, False
        while (now := time.monotonic()) < began + 8:
            if now < began + 4 and now - began > turn * EVERY:
                turn += 1
                for sock, open_ in asked.items():
                    open_[turn] = time.monotonic()
                    sock.send(servers.question(servers.FIRST, turn))
            if not killed and now > began + 1:
                os.kill(workers[0], signal.SIGKILL)
                killed = True
            for key, _ in ready.select(EVERY / 4):
                sock = key.fileobj  # type: ignore[assignment]
                with contextlib.suppress(OSError):
                    while True:
                        number = int.from_bytes(sock.recv(4096)[:2], "big")
                        answers.append(time.monotonic() - asked[sock].pop(number))
            if now > began + 4 and not any(asked.values()):
                break
    lost = sum(map(len, asked.values()))
    return Kill(len(answers) + lost, lost, max(answers))


def _is_worker(pid: int) -> bool:
    return b"kdns.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()


# --- telling --------------------------------------------------------------------------------


def goals(results: Results) -> Iterator[tuple[str, str, str, str]]:
    """Yield (what, goal, measured, met or missed)."""
    for load in results.loads:
        one, two = (results.figures[title][load.name].rates for title in (ONE, TWO))
        ratios = [both / alone for alone, both in zip(one, two, strict=True)]
        middle = statistics.median(ratios)
        yield (f"two workers on two cores: {load.title.partition(':')[0]}",
               f"{GOAL}x one on one, a generator for each core",
               f"{middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
               "met" if middle >= GOAL else "missed")  # fmt: skip


def section(results: Results, when: str) -> list[str]:
    """Return the part of RESULTS.md."""
    lines = [
        "# Workers",
        "",
        f"{when}. {results.machine}. {results.command}.",
        "",
        f"kdns as one process and with `workers 2`; bench/load.c with {SOCKETS} sockets and"
        f" {OUTSTANDING} questions outstanding, once for each core that is shared. us/q: processor"
        " time of the server (all its processes) and of the generators for a query.",
        "",
        "| what | goal | measured | |",
        "| --- | --- | --- | --- |",
        *[f"| {' | '.join(row)} |" for row in goals(results)],
    ]
    for load in results.loads:
        lines += ["", f"**{load.title}**", "",
                  "| | queries/s | server us/q | load.c us/q | cores busy | lost |",
                  "| --- | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
        for title in SETTINGS:
            one = results.figures[title][load.name]
            lines.append(
                f"| {title} | {statistics.median(one.rates):,.0f} |"
                f" {statistics.median(one.server):.1f} | {statistics.median(one.generator):.1f} |"
                f" {statistics.median(one.busy):.2f} | {one.lost} |"
            )
    lines += ["", "Resident memory of all processes, after the runs: "
              + ", ".join(f"{title} {size:.0f} MB" for title, size in results.memory.items())
              + "."]  # fmt: skip
    if results.kills:
        slowest = sorted(kill.longest for kill in results.kills)
        lines += [
            "",
            f"A worker killed (SIGKILL) while {CLIENTS} clients ask every {EVERY * 1e3:g} ms, each"
            f" question once, {len(results.kills)} times: {sum(k.lost for k in results.kills)} of"
            f" {sum(k.asked for k in results.kills):,} questions without an answer; the slowest"
            f" answer after {slowest[len(slowest) // 2] * 1e3:.0f} ms (median;"
            f" {slowest[0] * 1e3:.0f} to {slowest[-1] * 1e3:.0f}).",
        ]
    return lines


def values(results: Results, when: str) -> dict[str, object]:
    """Return the part of results.json."""
    return {
        "workers": {
            "when": when,
            "machine": results.machine,
            "figures": {
                title: {load: asdict(one) for load, one in loads.items()}
                for title, loads in results.figures.items()
            },
            "memory": results.memory,
            "kills": [asdict(kill) for kill in results.kills],
        }
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    why_not = missing()
    if why_not:
        sys.exit(f"bench: it {why_not}")
    results = measure(args.seconds, args.rounds)
    print("\n".join(section(results, "now")))
    print(json.dumps(values(results, "now")))


if __name__ == "__main__":
    main()
