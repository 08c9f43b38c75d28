"""The userspace mode beside iptables' DNAT and a direct connection: new connections a second,
throughput, latency.

Everything runs in a network namespace of its own, on two cores: what forwards in userspace has
one, both ends of all connections (bench/tcp.c) share the other. An endpoint is asked directly;
through a ClusterIP that iptables translates; through the same ClusterIP and the process behind
its portal; and, as without root, through a loopback address of the process. Needs root, iptables
and a C compiler; nothing is left behind. bench/run.py writes the figures down.

    python bench/userspace.py
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from kdns.kernel.programs import find_programs
from kdns.kernel.userspace import Rootless, UserspaceDataplane
from kdns.proxy.iptables import render_rules
from kdns.proxy.options import Family, Options
from kdns.proxy.table import Forwarding, ForwardingTable
from kdns.registry.endpoints import Endpoint
from kdns.runtime import raise_file_limit

FAMILIES: tuple[Family, ...] = (4,)
PROXY_CORE, ENDS_CORE = "0", "1"
NODE, VIP, POD = "192.168.77.1", "10.96.0.80", "10.244.1.10"
CONNECTIONS = 20_000
AT_ONCE = 64
PINGS = 10_000
MIBS = 4096
ROUNDS = 3
GOAL_CONNECTIONS, GOAL_GB = 5000, 1.0
TICKS = os.sysconf("SC_CLK_TCK")
PATHS = {
    "direct": "directly to the endpoint",
    "iptables": "ClusterIP, iptables DNAT",
    "portal": "ClusterIP, userspace behind its portal",
    "rootless": "loopback address, userspace without root",
}


@dataclass
class Way:
    """One way to the endpoint, by round. rate -- new connections a second; connect_cpu --
    seconds of the process for each; ping50, ping99 -- seconds there and back; gb -- GB/s;
    gb_cpu -- GB for a second of the process's core, 0: there is none"""

    rate: list[float] = field(default_factory=list)
    connect_cpu: list[float] = field(default_factory=list)
    ping50: list[float] = field(default_factory=list)
    ping99: list[float] = field(default_factory=list)
    gb: list[float] = field(default_factory=list)
    gb_cpu: list[float] = field(default_factory=list)


@dataclass
class Figures:
    """paths -- by name of PATHS"""

    paths: dict[str, Way] = field(default_factory=dict)
    machine: str = ""
    command: str = ""


def missing() -> str:
    """Return why this cannot be measured here; "": it can."""
    if os.geteuid() != 0:
        return "needs root"
    for program in ("ip", "iptables", "cc", "taskset"):
        if shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None:
            return f"needs {program}"
    return "needs two cores" if (os.cpu_count() or 1) < 2 else ""


def table_of(port: int) -> ForwardingTable:
    """One Service with the endpoint."""
    key = ("default", "web")
    one = Forwarding(
        key, "default/web:http", "tcp", VIP, 80,
        cluster=(Endpoint(POD, port),), has_endpoints=True,
    )  # fmt: skip
    return ForwardingTable(4, 1, {key: (one,)}, 1)


# --- the process that forwards ----------------------------------------------------------------


async def forward(how: str, port: int) -> None:
    """Forward until killed; print where to connect."""
    raise_file_limit()
    table = table_of(port)
    if how == "rootless":
        plane = UserspaceDataplane(None, Options(), rootless=Rootless())
    else:
        programs = (await find_programs(FAMILIES)).programs[4]
        plane = UserspaceDataplane(programs, Options(), address=NODE)
    await plane.sync(table, table.services.keys(), True)
    (mapping,) = plane.mappings()
    assert mapping.place is not None
    print(*(mapping.place if how == "rootless" else (VIP, 80)), flush=True)
    await asyncio.Event().wait()


# --- measuring --------------------------------------------------------------------------------


class Bench:
    """A namespace with the endpoint in it."""

    def __init__(self, folder: Path, namespace: str) -> None:
        self.tool = str(folder / "tcp")
        source = Path(__file__).with_name("tcp.c")
        subprocess.run(["cc", "-O2", "-o", self.tool, str(source)], check=True)
        self.prefix = ["ip", "netns", "exec", namespace]

    def run(self, *argv: str, text: str | None = None) -> str:
        done = subprocess.run(
            [*self.prefix, *argv], input=text, capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"bench: {' '.join(argv)}: {done.stderr}")
        return done.stdout

    @contextlib.contextmanager
    def running(self, core: str, *argv: str) -> Iterator[tuple[int, list[str]]]:
        """Run a program on a core; give its pid and the words of its first line."""
        process = subprocess.Popen(
            [*self.prefix, "taskset", "-c", core, *argv], stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None
            yield process.pid, process.stdout.readline().split()
        finally:
            process.kill()
            process.wait()

    def ask(self, *words: str) -> tuple[float, float, float]:
        """Run the other end; return seconds, p50 and p99 in seconds."""
        line = self.run("taskset", "-c", ENDS_CORE, self.tool, *words).split()
        if line[1] != "0":
            sys.exit(f"bench: tcp {' '.join(words)}: {line[1]} failed")
        return float(line[0]), float(line[2]) / 1e6, float(line[3]) / 1e6

    def measure(self, to: tuple[str, str], pid: int | None, figures: Way) -> None:
        """One round. pid -- of the process that forwards"""
        self.ask("connect", *to, "500", "8")  # warm
        before = cpu(pid)
        seconds, _, _ = self.ask("connect", *to, str(CONNECTIONS), str(AT_ONCE))
        figures.rate.append(CONNECTIONS / seconds)
        figures.connect_cpu.append((cpu(pid) - before) / CONNECTIONS)
        _, p50, p99 = self.ask("ping", *to, str(PINGS))
        figures.ping50.append(p50)
        figures.ping99.append(p99)
        before = cpu(pid)
        seconds, _, _ = self.ask("pump", *to, str(MIBS))
        octets = MIBS * (1 << 20) / 1e9
        figures.gb.append(octets / seconds)
        spent = cpu(pid) - before
        figures.gb_cpu.append(octets / spent if spent else 0.0)


def cpu(pid: int | None) -> float:
    """Return the seconds of processor time of a process; 0 if there is none."""
    if pid is None:
        return 0.0
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / TICKS


@contextlib.contextmanager
def bench() -> Iterator[Bench]:
    namespace = f"kdns-bench-u{os.getpid()}"
    subprocess.run(["ip", "netns", "add", namespace], check=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            made = Bench(Path(folder), namespace)
            made.run("ip", "-batch", "-", text=(
                f"link set lo up\naddr add {NODE}/32 dev lo\naddr add {POD}/32 dev lo\n"
                f"route add 10.96.0.0/12 dev lo src {NODE}\n"
            ))  # fmt: skip
            # As a proxy's node should have it: of what ends at the client's wish the proxy keeps
            # TIME_WAIT, and there are 28,000 ports to one endpoint.
            made.run("sysctl", "-q", "-w", "net.ipv4.tcp_tw_reuse=1")
            yield made
    finally:
        subprocess.run(["ip", "netns", "del", namespace], check=True)


def measure() -> Figures:
    """Take all figures: the paths take turns."""
    figures = Figures({name: Way() for name in PATHS})
    here = str(Path(__file__))
    with bench() as one, one.running(ENDS_CORE, one.tool, "serve") as (_, (port,)):
        for _ in range(ROUNDS):
            one.measure((POD, port), None, figures.paths["direct"])
            one.run("iptables-restore", text=render_rules(table_of(int(port)), Options()))
            one.measure((VIP, "80"), None, figures.paths["iptables"])
            one.run("iptables-restore", text="*nat\nCOMMIT\n*filter\nCOMMIT\n")
            for how in ("portal", "rootless"):
                argv = (sys.executable, here, "--forward", how, port)
                with one.running(PROXY_CORE, *argv) as (pid, (address, there)):
                    one.measure((address, there), pid, figures.paths[how])
                one.run("iptables-restore", text="*nat\nCOMMIT\n*filter\nCOMMIT\n")
    return figures


def section(figures: Figures) -> list[str]:
    """Return the part of RESULTS.md."""
    now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    median = statistics.median

    def us(values: list[float]) -> str:
        return f"{median(values) * 1e6:.0f} µs"

    def row(name: str) -> str:
        one = figures.paths[name]
        process = any(one.gb_cpu)
        cells = [
            PATHS[name],
            f"{median(one.rate):,.0f}",
            us(one.connect_cpu) if process else "-",
            f"{us(one.ping50)} / {us(one.ping99)}",
            f"{median(one.gb):.2f}",
            f"{median(one.gb_cpu):.2f}" if process else "-",
        ]
        return f"| {' | '.join(cells)} |"

    return [
        "# Measured: the userspace mode",
        "",
        f"{now} on {figures.machine}. Command: {figures.command}. Goals: {GOAL_CONNECTIONS:,} new"
        f" connections a second and {GOAL_GB:g} GB/s with one core. The process that forwards has"
        f" a core; both ends of all connections (bench/tcp.c) share the other, so the rates are"
        f" theirs, too. A new connection: connect, one octet there and back, close, {AT_ONCE} at a"
        f" time; throughput: {MIBS} MiB on one connection; median of {ROUNDS} rounds;"
        " net.ipv4.tcp_tw_reuse is 1.",
        "",
        "| path | new connections/s | CPU of the process each | round trip p50 / p99 | GB/s |"
        " GB for a CPU second |",
        "| --- | --- | --- | --- | --- | --- |",
        *[row(name) for name in PATHS],
    ]


def values(figures: Figures) -> dict[str, object]:
    """Return the part of results.json."""
    return {"userspace": asdict(figures)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--forward", nargs=2, metavar=("HOW", "PORT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.forward:
        asyncio.run(forward(args.forward[0], int(args.forward[1])))
        return
    if why_not := missing():
        sys.exit(f"bench: userspace: {why_not}")
    figures = measure()
    figures.machine = f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}"
    figures.command = "python bench/userspace.py"
    print("\n".join(section(figures)))


if __name__ == "__main__":
    main()
