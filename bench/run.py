"""`make bench`: queries a second and CPU a query, side by side on one core each.

The server is pinned to core 0, the load generator (Debian's dnsperf) to core 1; kdns, CoreDNS
(where `coredns` is on PATH) and a bare UDP echo in C (where there is a compiler) are measured
in one run, turn about, because machines differ and only ratios carry over. All of them listen
on loopback. Then the forwarding part, bench/proxy.py: kdns proxy beside kube-proxy; the userspace
mode's, bench/userspace.py; and the embedded API's, bench/api.py. Writes bench/RESULTS.md and
bench/results.json; what was not run keeps what stood there.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))  # a script's own folder is there, not the one above it

from bench import api, proxy, userspace  # noqa: E402

PARTS = ("names", "forwarding", "nftables", "userspace", "api")
SERVER_CORE, LOAD_CORE = "0", "1"
OFFERED = 20000  # queries a second at which the CPU a query is read
CLIENTS, OUTSTANDING = 8, 400

KUBEADM = """.:{port} {{
    bind 127.0.0.1
    errors
    health 127.0.0.1:{health} {{
        lameduck 1s
    }}
    ready 127.0.0.1:{ready}
    kubernetes cluster.local in-addr.arpa ip6.arpa {{
        endpoint http://127.0.0.1:{api}
        pods insecure
        fallthrough in-addr.arpa ip6.arpa
        ttl 30
    }}
    prometheus 127.0.0.1:{metrics}
    forward . 127.0.0.1:{upstream} {{
        max_concurrent 1000
    }}
    cache 30 {{
        disable success cluster.local
        disable denial cluster.local
    }}
    loop
    reload
    loadbalance
}}
"""


@dataclass
class Load:
    """One set of questions: a dnsperf data file."""

    name: str
    title: str
    file: Path


@dataclass
class Figures:
    """What was measured of one server with one load."""

    rates: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)  # microseconds a query at OFFERED
    lost: int = 0

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    def against(self, other: Figures) -> str:
        """Return the ratio of rates, round by round: "median (lowest to highest)"."""
        ratios = [mine / theirs for mine, theirs in zip(self.rates, other.rates, strict=True)]
        low, high = min(ratios), max(ratios)
        return f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})"

    @property
    def spread(self) -> float:
        return (max(self.rates) - min(self.rates)) / self.rate if self.rate else 0.0


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def started(command: list[str], core: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program pinned to a core; stop it at the end."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["taskset", "-c", core, *command], stdout=out, stderr=out, cwd=ROOT
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_answering(port: int, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the server answers a question with NOERROR (an echo answers anything)."""
    question = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00"
    for label in name.split("."):
        question += bytes((len(label),)) + label.encode()
    question += b"\x00\x00\x01\x00\x01"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(0.2)
        for _ in range(300):
            if process.poll() is not None:
                break
            with contextlib.suppress(OSError):
                sock.sendto(question, ("127.0.0.1", port))
                answer = sock.recv(512)
                if answer[:2] == question[:2] and answer[3] & 15 == 0:
                    return
                time.sleep(0.2)
    sys.exit(f"bench: {process.args!r} does not answer:\n{log.read_text()[-2000:]}")


def cpu_seconds(pid: int) -> float:
    """Return user+system seconds of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def dnsperf(port: int, load: Load, seconds: float, rate: int | None = None) -> tuple[float, int]:
    """Return (queries answered a second, queries lost)."""
    command = [
        "taskset", "-c", LOAD_CORE, "dnsperf", "-s", "127.0.0.1", "-p", str(port),
        "-d", str(load.file), "-l", str(seconds), "-c", str(CLIENTS), "-q", str(OUTSTANDING),
    ]  # fmt: skip
    if rate is not None:
        command += ["-Q", str(rate)]
    out = subprocess.run(
        command, capture_output=True, text=True, timeout=seconds + 60, check=False
    ).stdout
    found = re.search(r"Queries per second:\s+([\d.]+)", out)
    lost = re.search(r"Queries lost:\s+(\d+)", out)
    if found is None:
        sys.exit(f"bench: dnsperf printed no rate:\n{out}")
    return float(found[1]), int(lost[1]) if lost else 0


def measure(port: int, pid: int, load: Load, seconds: float, into: Figures) -> None:
    rate, lost = dnsperf(port, load, seconds)
    into.rates.append(rate)
    into.lost += lost
    before, began = cpu_seconds(pid), time.monotonic()
    offered, _ = dnsperf(port, load, seconds, OFFERED)
    spent = cpu_seconds(pid) - before
    into.cpu.append(spent / (offered * (time.monotonic() - began)) * 1e6)


def make_loads(folder: Path, services: int, questions: int) -> list[Load]:
    """The repeated questions are the A records of all Services. Questions never seen before
    are ten names a Service (itself, a port, its endpoints, and six that a search path of
    outside names makes of it) whose letters change case each time, so that no two datagrams
    are the same: what resolvers with 0x20 send."""
    chosen = random.Random(7)
    repeated = folder / "repeated"
    pool: list[str] = []
    with repeated.open("w") as f:
        for n in range(services):
            namespace = f"bench-{n // 100}.svc.cluster.local"
            name = f"svc-{n}.{namespace}"
            f.write(f"{name} A\n")
            pool += [name, f"_http._tcp.{name}"]
            pool += [f"10-{244 + (n >> 15)}-{n >> 7 & 255}-{(n << 1 & 255) + i}.{name}"
                     for i in range(2)]  # fmt: skip
            pool += [f"www-{n}-{i}.example.com.{namespace}" for i in range(6)]
    chosen.shuffle(pool)
    unseen = folder / "unseen"
    with unseen.open("w") as f:
        for _ in range(questions // len(pool) + 1):
            for name in pool:
                bits = chosen.getrandbits(len(name))
                f.write(
                    "".join(c.upper() if bits >> i & 1 else c for i, c in enumerate(name)) + " A\n"
                )
    return [
        Load("repeated", f"repeated questions, {services:,} names", repeated),
        Load("unseen", f"questions never seen before, {len(pool):,} names", unseen),
    ]


def build_echo(folder: Path) -> Path | None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    out = folder / "echo"
    subprocess.run([compiler, "-O2", "-o", str(out), str(HERE / "echo.c")], check=True)
    return out


def commands(folder: Path, api: int, upstream: int) -> dict[str, tuple[list[str], int]]:
    """Return name -> (command, port) of every server this machine has."""
    found: dict[str, tuple[list[str], int]] = {}
    servers = {"kdns": [sys.executable, "-m", "kdns", "serve", "-conf"]}
    coredns = shutil.which("coredns")
    if coredns:
        servers["coredns"] = [coredns, "-conf"]
    for name, command in servers.items():
        port = free_port()
        conf = folder / f"{name}.Corefile"
        conf.write_text(
            KUBEADM.format(
                port=port, api=api, upstream=upstream, health=free_port(), ready=free_port(),
                metrics=free_port(),
            )
        )  # fmt: skip
        found[name] = ([*command, str(conf)], port)
    echo = build_echo(folder)
    if echo is not None:
        port = free_port()
        found["echo"] = ([str(echo), str(port)], port)
    return found


def version_of(command: list[str]) -> str:
    if command[0] == sys.executable:
        command = [sys.executable, "-m", "kdns"]
    out = subprocess.run(
        [command[0], *command[1:3], "-version"], capture_output=True, text=True, check=False
    )
    return (out.stdout or out.stderr).strip().splitlines()[0] if out.stdout or out.stderr else "?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5, help="length of one dnsperf run")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--services", type=int, default=1000)
    parser.add_argument("--only", choices=PARTS, help="run one part")
    parser.add_argument("--quick", action="store_true", help="forwarding: one round, no 10,000")
    args = parser.parse_args()
    if args.only in (None, "names"):
        run_names(args)
    if args.only in (None, "forwarding"):
        run_forwarding(args)
    if args.only == "nftables":  # of the forwarding part what is in that mode
        run_forwarding(args, "nftables")
    if args.only in (None, "userspace"):
        run_userspace()
    if args.only in (None, "api"):
        run_api()


def run_userspace() -> None:
    why_not = userspace.missing()
    if why_not:
        print(f"bench: the userspace part is left out: it {why_not}", flush=True)
        return
    figures = userspace.measure()
    figures.machine, figures.command = machine(), command_line()
    write_part(userspace.section(figures), userspace.values(figures))


def run_api() -> None:
    figures = api.measure()
    figures.machine, figures.command = machine(), command_line()
    write_part(api.section(figures), api.values(figures))


def run_forwarding(args: argparse.Namespace, only: str = "") -> None:
    why_not = proxy.missing()
    if why_not:
        print(f"bench: the forwarding part is left out: it {why_not}", flush=True)
        return
    figures = proxy.measure(args.quick, only=only)
    figures.machine, figures.command = machine(), command_line()
    title = f"forwarding, {only} mode" if only else "forwarding"
    write_part(proxy.section(figures, title), {only or "forwarding": asdict(figures)})


def run_names(args: argparse.Namespace) -> None:
    for program in ("dnsperf", "taskset"):
        if shutil.which(program) is None:
            sys.exit(f"bench: needs {program} (Debian: apt-get install dnsperf util-linux)")
    if (os.cpu_count() or 1) < 2:
        sys.exit("bench: needs two cores, one for the server and one for dnsperf")
    with tempfile.TemporaryDirectory() as name:
        run(Path(name), args)


def run(folder: Path, args: argparse.Namespace) -> None:
    loads = make_loads(folder, args.services, questions=600_000)
    replay, upstream = free_port(), free_port()
    api_command = [
        sys.executable, str(ROOT / "tests" / "api_replay.py"), "--port", str(replay),
        "--services", str(args.services),
    ]  # fmt: skip
    results: dict[str, dict[str, Figures]] = {}
    with started(api_command, LOAD_CORE, folder / "api.log") as server:
        wait_port(replay, server, folder / "api.log")
        servers = commands(folder, replay, upstream)
        for _ in range(args.rounds):
            for name, (command, port) in servers.items():
                log = folder / f"{name}.log"
                with started(command, SERVER_CORE, log) as process:
                    wait_answering(port, "svc-1.bench-0.svc.cluster.local", process, log)
                    for load in loads:
                        figures = results.setdefault(name, {}).setdefault(load.name, Figures())
                        measure(port, process.pid, load, args.seconds, figures)
                        print(f"{name:8} {load.name:9} {figures.rates[-1]:10,.0f} q/s"
                              f" {figures.cpu[-1]:6.1f} us/q", flush=True)  # fmt: skip
    write_results(results, servers, loads)


def wait_port(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(100):
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return
        if process.poll() is not None:
            break
        time.sleep(0.1)
    sys.exit(f"bench: the API server did not start:\n{log.read_text()[-2000:]}")


def write_results(
    results: dict[str, dict[str, Figures]],
    servers: dict[str, tuple[list[str], int]],
    loads: list[Load],
) -> None:
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    versions = {name: version_of(command) for name, (command, _) in servers.items()
                if name != "echo"}  # fmt: skip
    rounds = max(len(f.rates) for by_load in results.values() for f in by_load.values())
    lines = [
        "# Measured",
        "",
        f"{now} on {machine()}. Command: {command_line()}."
        " Server on one core, dnsperf on the other; kubeadm Corefile, metrics on; median of"
        f" {rounds} rounds. Ratios are taken within a round, lowest and highest in brackets:"
        " read them, for absolute figures differ by machine.",
        "",
        *[f"- {name}: {text}" for name, text in versions.items()],
        "- echo: bench/echo.c, a bare UDP echo (recvmmsg/sendmmsg): the limit of the socket",
        "",
    ]
    for load in loads:
        lines += [f"## {load.title}", "",
                  f"| server | queries/s | of echo | of CoreDNS | CPU µs/query at {OFFERED:,}/s |",
                  "| --- | --- | --- | --- | --- |"]  # fmt: skip
        for name, by_load in results.items():
            figures = by_load[load.name]
            ratios = [
                figures.against(results[peer][load.name]) if peer in results else "-"
                for peer in ("echo", "coredns")
            ]
            lines.append(
                f"| {name} | {figures.rate:,.0f} (±{figures.spread * 50:.0f} %) | {ratios[0]} |"
                f" {ratios[1]} | {statistics.median(figures.cpu):.1f} |"
            )
        lines.append("")
    write_part(
        lines,
        {
            "when": now,
            "machine": cpu_model(),
            "versions": versions,
            "results": {
                name: {k: vars(v) for k, v in by_load.items()} for name, by_load in results.items()
            },
        },
    )


def write_part(lines: list[str], values: dict[str, object]) -> None:
    """Put one part into both files; lines -- its text, from its "# " heading on."""
    text, data = HERE / "RESULTS.md", HERE / "results.json"
    parts: dict[str, str] = {}
    if text.exists():
        for part in re.split(r"^(?=# )", text.read_text(), flags=re.M):
            parts[part.partition("\n")[0]] = part.strip()
    parts[lines[0]] = "\n".join(lines).strip()
    text.write_text("\n\n".join(part for part in parts.values() if part) + "\n")
    held = json.loads(data.read_text()) if data.exists() else {}
    data.write_text(json.dumps({**held, **values}, indent=1) + "\n")
    print("\n".join(lines))


def command_line() -> str:
    words = " ".join(["python", "bench/run.py", *sys.argv[1:]])
    return f"`{words}`" if sys.argv[1:] else f"`{words}` (make bench)"


def machine() -> str:
    return (
        f"{cpu_model()}, {os.cpu_count()} cores, {platform.platform()},"
        f" Python {platform.python_version()}"
    )


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
