"""kdns proxy beside kube-proxy: time to the last rule, time of a change, memory, cost of a VIP.

Each program runs alone in a fresh network namespace of its own, fed by the same API replay
server (tests/api_replay.py) there, and is judged from outside: a ClusterIP counts as
programmed when connect() to it reaches an endpoint, whatever the program says of itself. All
endpoint addresses are this namespace's own (`ip route add local`), so one listener stands for
all of them. kdns and kube-proxy (where it is on PATH) take turns; only ratios carry over.
bench/run.py writes the figures down. Needs root and iptables; nothing is left behind.

    python bench/proxy.py [--quick]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import errno
import json
import os
import platform
import re
import select
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

NODE, NODE_ADDRESS = "node1", "192.168.77.1"
POD_CIDR, VIP_CIDR = "10.244.0.0/16", "10.96.0.0/12"
ENDPOINT_PORT, VIP_PORT = 8080, 80
CLONE_NEWNET = 0x40000000
LINGER_RESET = struct.pack("ii", 1, 0)  # close with RST: no TIME_WAIT is left behind

CONNECTS = 2000
CHANGES = 20
# Between a change seen and the next one sent: shorter than kube-proxy's default min-sync.
PAUSE = 0.3
GIVE_UP = 180.0  # seconds for one full sync
GIVE_UP_CHANGE = 60.0  # and for one change
NFTABLES = "nftables"  # the mode; the others are variants of iptables
# The programs of one variant, by the names that everybody calls.
VARIANTS = {"nft": "nft", "legacy": "legacy", NFTABLES: "nft"}


@dataclass(frozen=True)
class Size:
    """How many Services with how many endpoints each.

    goal, nftables -- seconds for kdns's full sync, in the two modes
    """

    services: int
    endpoints: int
    goal: float
    nftables: float | None = None

    def __str__(self) -> str:
        return f"{self.services:,} x {self.endpoints}"

    @property
    def rules(self) -> int:
        """Rules a ClusterIP Service needs in chains of its own and in KUBE-SERVICES."""
        return self.services * (2 + 3 * self.endpoints)


SIZES = (Size(1000, 5, 1.0), Size(5000, 2, 1.5), Size(10000, 2, 6.0, 1.0))


@dataclass
class Sync:
    """One start of one program; seconds and MB.

    total   -- process start to the last VIP answering; None: not within GIVE_UP
    apply   -- what its own metrics say of the full syncs until then
    cpu     -- user and system, with the programs it ran
    rss, peak -- VmRSS, VmHWM once it is idle
    connect -- median microseconds of connect() through the last VIP in KUBE-SERVICES
    """

    total: float | None = None
    apply: float | None = None
    cpu: float = 0.0
    rss: float = 0.0
    peak: float = 0.0
    connect: float = 0.0
    rules: int = 0


@dataclass
class Figures:
    """Everything measured.

    syncs   -- size and variant -> program -> one Sync a round
    changes -- size -> program and setting -> seconds of each change
    """

    when: str = ""
    machine: str = ""
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    syncs: dict[str, dict[str, list[Sync]]] = field(default_factory=dict)
    changes: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)


# --- the namespace ------------------------------------------------------------------------


def _enter(file: IO[bytes]) -> None:
    """Move this thread to the network namespace of `file` (setns(2); os.setns is 3.12's)."""
    if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def namespace() -> Iterator[str]:
    """Make a network namespace and be in it; leave and delete it at the end.

    Sockets and programs of the body are in it. ClusterIPs are routed to a wire that leads
    nowhere, so that a VIP without rules is silent, as on a node.
    """
    name = f"kdns-bench-{os.getpid()}"
    with open("/proc/thread-self/ns/net", "rb") as home:
        ip("netns", "add", name)
        try:
            with open(f"/run/netns/{name}", "rb") as there:
                _enter(there)
            ip("link", "set", "lo", "up")
            ip("link", "add", "wire0", "type", "veth", "peer", "name", "wire1")
            ip("addr", "add", f"{NODE_ADDRESS}/24", "dev", "wire0")
            ip("link", "set", "wire0", "up")
            ip("link", "set", "wire1", "up")
            ip("route", "add", VIP_CIDR, "dev", "wire0")
            ip("route", "add", "local", POD_CIDR, "dev", "lo")
            yield name
        finally:
            _enter(home)
            ip("netns", "del", name)


@contextlib.contextmanager
def started(command: list[str], log: Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program and what it starts; end all of them at the end."""
    with log.open("wb") as err:
        options.setdefault("stdout", err)
        process = subprocess.Popen(command, stderr=err, cwd=ROOT, start_new_session=True, **options)
        try:
            yield process
        finally:
            process.terminate()
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
            finally:  # also where Ctrl-C ends the wait
                # A restore that is under way would keep the namespace alive.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextlib.contextmanager
def replay(size: Size, folder: Path) -> Iterator[tuple[str, Callable[[int], float]]]:
    """Serve the objects of `size`; yield (URL, change).

    change(n) moves an endpoint of Service n to an address it never had; it returns the
    monotonic time at which the API sent it.
    """
    command = [
        sys.executable, str(Path(__file__).resolve()), "--serve",
        str(size.services), str(size.endpoints),
    ]  # fmt: skip
    log = folder / "api.log"
    with started(command, log, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdin is not None and server.stdout is not None
        url = server.stdout.readline().decode().strip()
        if not url:
            sys.exit(f"bench: the API server did not start:\n{log.read_text()[-2000:]}")
        asking, answering = server.stdin, server.stdout

        def change(n: int) -> float:
            asking.write(b"%d\n" % n)
            asking.flush()
            return float(answering.readline())

        yield url, change


async def serve(services: int, endpoints: int) -> None:
    """The API server as a program of its own; its standard input says what to change."""
    from api_replay import ApiReplay, many_services

    objects = list(many_services(services, endpoints))
    slices = [o for o in objects if o["kind"] == "EndpointSlice"]
    addresses = [{"type": "InternalIP", "address": NODE_ADDRESS}]
    node = {"kind": "Node", "metadata": {"name": NODE}, "status": {"addresses": addresses}}
    api = ApiReplay()
    api.load([node, *objects])
    await api.start()
    print(api.url, flush=True)
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(lines), sys.stdin
    )
    moved = 0
    while line := await lines.readline():
        one = slices[int(line)]
        moved += 1
        first = {**one["endpoints"][0], "addresses": [moved_address(moved)]}
        sent = time.monotonic()
        await api.put({**one, "endpoints": [first, *one["endpoints"][1:]]})
        print(sent, flush=True)
    await api.stop()


def moved_address(number: int) -> str:
    """Return the address that the number-th change brings: above all that many_services has."""
    return f"10.244.{255 - (number >> 8)}.{number & 255}"


# --- probing ------------------------------------------------------------------------------


class Probe:
    """Connects through VIPs and sees which endpoint answered."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("", ENDPOINT_PORT), backlog=128)
        self.listener.setblocking(False)

    def reached(self, vip: str, patience: float) -> str:
        """Return the endpoint address that a connection to `vip` ended at; "" if it did not
        within `patience` seconds."""
        with socket.socket() as client:
            client.setblocking(False)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
            if client.connect_ex((vip, VIP_PORT)) not in (0, errno.EINPROGRESS):
                time.sleep(patience)  # refused or no route: not programmed yet
                return ""
            if not select.select([], [client], [], patience)[1]:
                return ""
            if client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                time.sleep(patience)
                return ""
            with self.listener.accept()[0] as server:
                return str(server.getsockname()[0])

    def cost(self, vip: str) -> float:
        """Return the median microseconds of connect() over CONNECTS connections."""
        took = []
        for _ in range(CONNECTS):
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
                began = time.perf_counter_ns()
                client.connect((vip, VIP_PORT))
                took.append(time.perf_counter_ns() - began)
                self.listener.accept()[0].close()
        return statistics.median(took) / 1000

    def close(self) -> None:
        self.listener.close()


def vip_of(n: int) -> str:
    """Return the ClusterIP of Service n, as many_services numbers them."""
    return f"10.{96 + (n >> 16)}.{n >> 8 & 255}.{n & 255}"


def cpu_seconds(pid: int) -> float:
    """Return user and system seconds of a process and of the ended programs it ran."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return sum(int(ticks) for ticks in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def memory(pid: int) -> tuple[float, float]:
    """Return (VmRSS, VmHWM) in MB."""
    text = Path(f"/proc/{pid}/status").read_text()
    rss, peak = (re.search(rf"{name}:\s+(\d+) kB", text) for name in ("VmRSS", "VmHWM"))
    return (int(rss[1]) / 1000 if rss else 0.0), (int(peak[1]) / 1000 if peak else 0.0)


def wait_idle(pid: int, seconds: float = 30.0) -> None:
    """Wait until a process spends no more than 2 % of a core."""
    ends = time.monotonic() + seconds
    spent = cpu_seconds(pid)
    while time.monotonic() < ends:
        time.sleep(0.5)
        before, spent = spent, cpu_seconds(pid)
        if spent - before <= 0.01:
            return


def full_sync_seconds() -> float | None:
    """Return what the program's metrics say full syncs took, both families together."""
    with contextlib.suppress(OSError):
        with urllib.request.urlopen("http://127.0.0.1:10249/metrics", timeout=10) as answer:
            text = answer.read().decode()
        # kube-proxy's nftables mode of 1.30 tells of full syncs and others together.
        for name in ("sync_full_proxy_rules", "sync_proxy_rules"):
            sums = re.findall(
                rf"^kubeproxy_{name}_duration_seconds_sum(?:{{.*}})? (\S+)$", text, re.M
            )
            if total := sum(map(float, sums)):
                return total
    return None


def nftables_services() -> int:
    """Return the number of addresses in the map of kube-proxy's table that leads to Services."""
    argv = ["nft", "list", "map", "ip", "kube-proxy", "service-ips"]
    text = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    return len(re.findall(r" : goto service-", text))


def kernel_rules(paths: str) -> tuple[int, str]:
    """Return (rules of Services in the nat table, VIP that is matched last)."""
    text = subprocess.run(
        [f"{paths}/iptables-save", "-t", "nat"], capture_output=True, text=True, check=True
    ).stdout
    of_services = re.findall(r"^-A KUBE-(?:SVC-|SEP-|SERVICES -d )", text, re.M)
    last = re.findall(r"^-A KUBE-SERVICES -d ([\d.]+)/32 ", text, re.M)
    return len(of_services), last[-1] if last else ""


# --- the programs -------------------------------------------------------------------------


def programs() -> dict[str, list[str]]:
    """Return name -> command of what this machine can run."""
    found = {"kdns": [sys.executable, "-m", "kdns", "proxy"]}
    peer = shutil.which("kube-proxy")
    if peer:
        found["kube-proxy"] = [peer]
    return found


def version_of(command: list[str]) -> str:
    where = ["-version"] if command[0] == sys.executable else ["--version"]
    out = subprocess.run(
        [*(command[:3] if command[0] == sys.executable else command), *where],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    return ((out.stdout or out.stderr).strip().splitlines() or ["?"])[0]


def arguments(folder: Path, url: str, mode: str, min_sync: str | None) -> list[str]:
    """Return the flags both programs get: kube-proxy's own."""
    kubeconfig = folder / "kubeconfig"
    kubeconfig.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "bench", "cluster": {"server": url}}],
                "users": [{"name": "bench", "user": {}}],
                "contexts": [{"name": "bench", "context": {"cluster": "bench", "user": "bench"}}],
                "current-context": "bench",
            }
        )
    )
    flags = {
        "kubeconfig": kubeconfig, "hostname-override": NODE, "cluster-cidr": POD_CIDR,
        "proxy-mode": mode, "kube-api-content-type": "application/json",
        "healthz-bind-address": "127.0.0.1:10256", "metrics-bind-address": "127.0.0.1:10249",
        # Not the namespace's to set.
        "conntrack-max-per-core": 0, "conntrack-min": 0,
        "conntrack-tcp-timeout-established": "0s", "conntrack-tcp-timeout-close-wait": "0s",
    }  # fmt: skip
    if mode == NFTABLES:
        flags["feature-gates"] = "NFTablesProxyMode=true"  # kube-proxy before 1.31
    if min_sync is not None:
        flags["iptables-min-sync-period"] = min_sync
    return [f"--{name}={value}" for name, value in flags.items()]


def variant_folder(folder: Path, variant: str) -> Path | None:
    """Return a folder to put on PATH where `iptables` is that variant; None if it is not
    installed."""
    path = folder / variant
    path.mkdir(exist_ok=True)
    for program in ("iptables", "ip6tables"):
        for ending in ("", "-save", "-restore"):
            real = shutil.which(f"{program}-{VARIANTS[variant]}{ending}")
            if real is None:
                return None
            link = path / f"{program}{ending}"
            if not link.is_symlink():
                link.symlink_to(real)
    return path


@dataclass
class Running:
    """A program under measurement, in the namespace where the bench is too."""

    process: subprocess.Popen[bytes]
    probe: Probe
    change: Callable[[int], float]
    began: float


@contextlib.contextmanager
def running(
    command: list[str], size: Size, folder: Path, variant: Path, min_sync: str | None = None
) -> Iterator[Running]:
    log = folder / "proxy.log"
    path = f"{variant}:{os.environ.get('PATH', os.defpath)}"
    with namespace(), contextlib.closing(Probe()) as probe, replay(size, folder) as (url, change):
        mode = NFTABLES if variant.name == NFTABLES else "iptables"
        full = [*command, *arguments(folder, url, mode, min_sync)]
        began = time.monotonic()
        with started(full, log, env={**os.environ, "PATH": path}) as process:
            yield Running(process, probe, change, began)


def wait_programmed(run: Running, size: Size, log: Path) -> bool:
    """Wait until the first, the middle and the last Service answer; False: GIVE_UP was over."""
    for n in (0, size.services // 2, size.services - 1):
        while not run.probe.reached(vip_of(n), 0.01):
            if run.process.poll() is not None:
                sys.exit(f"bench: {run.process.args!r} ended:\n{log.read_text()[-2000:]}")
            if time.monotonic() - run.began > GIVE_UP:
                return False
    return True


def measure_sync(run: Running, size: Size, folder: Path, variant: Path) -> Sync:
    """Measure one start, from nothing to idle."""
    if not wait_programmed(run, size, folder / "proxy.log"):
        return Sync(cpu=cpu_seconds(run.process.pid))
    result = Sync(total=time.monotonic() - run.began)
    wait_idle(run.process.pid)
    result.cpu = cpu_seconds(run.process.pid)
    result.apply = full_sync_seconds()
    result.rss, result.peak = memory(run.process.pid)
    if variant.name == NFTABLES:
        (result.rules, due), last = (nftables_services(), size.services), vip_of(size.services - 1)
    else:
        (result.rules, last), due = kernel_rules(str(variant)), size.rules
    if result.rules != due:
        sys.exit(f"bench: {result.rules:,} rules where {due:,} are due: not comparable")
    result.connect = run.probe.cost(last)
    return result


def measure_changes(run: Running, size: Size, folder: Path, count: int) -> list[float]:
    """Move an endpoint `count` times; return seconds from API to packets that follow, of those
    changes that were followed within GIVE_UP_CHANGE."""
    if not wait_programmed(run, size, folder / "proxy.log"):
        return []
    wait_idle(run.process.pid)
    took: list[float] = []
    for number in range(1, count + 1):
        n = number * 97 % size.services
        sent = run.change(n)
        awaited = moved_address(number)
        while run.probe.reached(vip_of(n), 0.01) != awaited:
            if time.monotonic() - sent > GIVE_UP_CHANGE:
                return took
            time.sleep(0.001)
        took.append(time.monotonic() - sent)
        time.sleep(PAUSE)
    return took


# --- the whole ----------------------------------------------------------------------------


def missing() -> str:
    """Return why this bench cannot run here; "" if it can."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    for program in ("ip", "iptables-nft-restore"):
        if shutil.which(program) is None:
            return f"needs {program} (Debian: apt-get install iproute2 iptables)"
    return ""


def measure(quick: bool, rounds: int = 3, only: str = "") -> Figures:
    """Run everything, or (only) one variant; minutes, of which kube-proxy at 10,000 Services is
    the most."""
    figures = Figures(
        when=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        versions={name: version_of(command) for name, command in programs().items()},
    )
    figures.versions["iptables"] = version_of(["iptables-nft"])
    with tempfile.TemporaryDirectory() as name, stopped_by_signals():
        folder = Path(name)
        for plan in plans(quick, rounds):
            if only in ("", plan.variant):
                measure_plan(plan, folder, figures)
        measure_all_changes(quick, folder, figures, only)
    return figures


@dataclass(frozen=True)
class Plan:
    """Which program is started how, and how often."""

    size: Size
    variant: str
    program: str
    round: int


def plans(quick: bool, rounds: int) -> Iterator[Plan]:
    """Yield the starts in their order; the programs take turns within a round."""
    for size in SIZES[: 2 if quick else 3]:
        for number in range(1 if quick else rounds):
            for program in programs():
                # Over a minute each: once.
                if size.services >= 10000 and program == "kube-proxy" and number:
                    continue
                yield Plan(size, "nft", program, number)
    if not quick:
        for size in SIZES[1:]:
            for program in programs():
                yield Plan(size, "legacy", program, 0)
    for size in SIZES[1 : 2 if quick else 3]:
        for number in range(1 if quick else rounds):
            for program in programs():
                if program == "kube-proxy" and number:
                    continue
                yield Plan(size, NFTABLES, program, number)


def measure_plan(plan: Plan, folder: Path, figures: Figures) -> None:
    variant = variant_folder(folder, plan.variant)
    if variant is None:
        note = f"iptables-{plan.variant} is not installed"
        if note not in figures.skipped:
            figures.skipped.append(note)
        return
    with running(programs()[plan.program], plan.size, folder, variant) as run:
        result = measure_sync(run, plan.size, folder, variant)
    by_program = figures.syncs.setdefault(f"{plan.size}, {plan.variant}", {})
    by_program.setdefault(plan.program, []).append(result)
    total = "-" if result.total is None else f"{result.total:.2f}"
    apply = "-" if result.apply is None else f"{result.apply:.2f}"
    print(f"{plan.program:10} {plan.size!s:>10} {plan.variant:8} total {total:>6} s,"
          f" apply {apply:>6} s, CPU {result.cpu:6.2f} s, {result.rss:4.0f} MB"
          f" (peak {result.peak:4.0f}), connect {result.connect:5.0f} us", flush=True)  # fmt: skip


def measure_all_changes(quick: bool, folder: Path, figures: Figures, only: str) -> None:
    # kube-proxy waits a second between syncs unless told otherwise.
    settings = {"kdns": (None,), "kube-proxy": (None, "0s")}
    for what, size in (
        ("nft", SIZES[0] if quick else SIZES[1]),
        (NFTABLES, SIZES[0 if quick else 2]),
    ):
        variant = variant_folder(folder, what)
        if variant is None or only not in ("", what):
            continue
        for program, command in programs().items():
            for min_sync in settings[program] if what != NFTABLES else (None,):
                with running(command, size, folder, variant, min_sync) as run:
                    took = measure_changes(run, size, folder, 5 if quick else CHANGES)
                name = program if min_sync is None else f"{program}, min-sync 0"
                figures.changes.setdefault(f"{size}, {what}", {})[name] = took
                print(f"{name:22} {size!s:>9} {what:8} change {milliseconds(took)} ms", flush=True)


def milliseconds(took: list[float]) -> str:
    """Return "median (lowest to highest)"."""
    if not took:
        return f"over {1000 * GIVE_UP_CHANGE:,.0f}"
    low, middle, high = (1000 * f(took) for f in (min, statistics.median, max))
    return f"{middle:.0f} ({low:.0f} to {high:.0f})"


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Have SIGTERM unwind as Ctrl-C does, so that nothing stays behind."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# --- what is written down -----------------------------------------------------------------

PEER = "kube-proxy"


def ratio(mine: list[float], theirs: list[float]) -> str:
    """Return mine : theirs, round by round: "median (lowest to highest)".

    Where the other ran less often, its last round stands for the missing ones.
    """
    if not mine or not theirs:
        return "-"
    ratios = [one / theirs[min(i, len(theirs) - 1)] for i, one in enumerate(mine)]
    if len(ratios) == 1:
        return f"{ratios[0]:.2f}"
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def column(runs: list[Sync], name: str) -> list[float]:
    """Return one figure of all runs that have it."""
    return [float(value) for run in runs if (value := getattr(run, name)) is not None]


def render_figure(runs: list[Sync], peer: list[Sync], name: str, digits: int) -> str:
    """Return "median, ratio" of one figure."""
    mine = column(runs, name)
    if not mine:
        return f"over {GIVE_UP:.0f}"
    text = f"{statistics.median(mine):.{digits}f}"
    return text if runs is peer or not peer else f"{text}, {ratio(mine, column(peer, name))}"


def section(figures: Figures, title: str = "forwarding") -> list[str]:
    """Return the lines for RESULTS.md."""
    lines = [
        f"# Measured: {title}",
        "",
        f"{figures.when} on {figures.machine}. Command: {figures.command}."
        " Each program alone in a fresh network namespace, over the same API replay server,"
        " turn about; judged by connect() through ClusterIPs. After the comma: kdns divided by"
        " kube-proxy within a round, lowest and highest in brackets.",
        "",
        *[f"- {name}: {text}" for name, text in figures.versions.items()],
        *[f"- left out: {note}" for note in figures.skipped],
        "",
        "## Full sync",
        "",
        "Start: from the process starting to the last Service answering. Sync: what the"
        " program's own kubeproxy_sync_full_proxy_rules_duration_seconds says, both families."
        " connect(): median of new connections through the ClusterIP matched last.",
        "",
        "nft, legacy: the iptables mode by that variant; nftables: that mode.",
        "",
        "| Services x endpoints, mode | program (runs) | start s | sync s | goal s | CPU s |"
        " RSS MB | peak MB | connect() µs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    goals = {str(size): size for size in SIZES}
    for what, by_program in figures.syncs.items():
        peer = by_program.get(PEER, [])
        for program, runs in by_program.items():
            size, _, variant = what.rpartition(", ")
            due = goals[size].nftables if variant == NFTABLES else goals[size].goal
            goal = f"{due:.1f}" if due and program == "kdns" else "-"
            cells = [
                render_figure(runs, peer, name, digits)
                for name, digits in (
                    ("total", 2), ("apply", 2), ("cpu", 2), ("rss", 0), ("peak", 0),
                    ("connect", 0),
                )
            ]  # fmt: skip
            cells.insert(2, goal)
            lines.append(f"| {what} | {program} ({len(runs)}) | {' | '.join(cells)} |")
    lines += [
        "",
        "## One endpoint changing",
        "",
        "From the API sending it to the first connection that arrives at the new address;"
        f" a change every {PAUSE} s after the one before was seen, kube-proxy also with"
        " --iptables-min-sync-period=0s.",
        "",
        "| Services x endpoints, mode | program (changes) | p50 ms (lowest to highest) |"
        " kdns of it |",
        "| --- | --- | --- | --- |",
    ]
    for what, by_setting in figures.changes.items():
        mine = by_setting.get("kdns")
        for name, took in by_setting.items():
            of = "-"
            if mine and took is not mine:
                middle = statistics.median(took) if took else GIVE_UP_CHANGE
                of = f"{'' if took else 'under '}{statistics.median(mine) / middle:.2g}"
            lines.append(f"| {what} | {name} ({len(took)}) | {milliseconds(took)} | {of} |")
    return [*lines, ""]


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        asyncio.run(serve(int(sys.argv[2]), int(sys.argv[3])))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round, no 10,000 Services")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    why_not = missing()
    if why_not:
        sys.exit(f"bench: {why_not}")
    try:
        figures = measure(options.quick, options.rounds)
    except KeyboardInterrupt:
        sys.exit(130)
    figures.machine = platform.platform()
    figures.command = f"`{' '.join(['python', 'bench/proxy.py', *sys.argv[1:]])}`"
    print("\n".join(section(figures)))


if __name__ == "__main__":
    main()
