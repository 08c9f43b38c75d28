"""DNS servers side by side: how each is started with the same names, and how one is asked.

kdns and CoreDNS list the same API replay server; NSD and Knot DNS, where the machine has them,
load a zone file of the same records; Unbound forwards; the echo of bench/echo.c says what the
socket can do. Everything listens on loopback. Servers are pinned to one core and whoever asks
to the other.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SERVER_CORE, LOAD_CORE = "0", "1"
CLIENTS, OUTSTANDING = 8, 400
FIRST = "svc-1.bench-0.svc.cluster.local"

KUBEADM = """.:{port} {{
    bind 127.0.0.1
    errors
    health 127.0.0.1:{health} {{
        lameduck 1s
    }}
    ready 127.0.0.1:{ready}
    kubernetes cluster.local in-addr.arpa ip6.arpa {{
        endpoint http://127.0.0.1:{api}
        pods {pods}
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
NSD = """server:
    ip-address: 127.0.0.1@{port}
    server-count: 1
    username: ""
    chroot: ""
    zonesdir: "{folder}"
    database: ""
    pidfile: ""
    xfrdfile: ""
    zonelistfile: "{folder}/nsd.list"
    reuseport: no
    rrl-ratelimit: 0
remote-control:
    control-enable: no
zone:
    name: cluster.local
    zonefile: {zone}
"""
KNOT = """server:
    listen: 127.0.0.1@{port}
    rundir: {folder}
    udp-workers: 1
    tcp-workers: 1
    background-workers: 1
database:
    storage: {folder}/knot
zone:
  - domain: cluster.local
    file: {zone}
"""
UNBOUND = """server:
    interface: 127.0.0.1@{port}
    num-threads: 1
    username: ""
    chroot: ""
    directory: "{folder}"
    pidfile: ""
    use-syslog: no
    do-not-query-localhost: no
    module-config: "iterator"
    msg-cache-size: 64m
    rrset-cache-size: 64m
    cache-min-ttl: 30
forward-zone:
    name: "."
    forward-addr: 127.0.0.1@{upstream}
remote-control:
    control-enable: no
"""
OUTSIDE = """.:{port} {{
    bind 127.0.0.1
    file {folder}/example.zone example.com
}}
"""


@dataclass(eq=False)
class Peer:
    """One server. serves -- "cluster" names, "outside" ones, or both; the echo answers all"""

    name: str
    command: list[str]
    port: int
    serves: frozenset[str]
    version: str


@dataclass
class Load:
    """One set of questions: a file for dnsperf and bench/load.c. asks -- "cluster" or "outside"
    names"""

    name: str
    title: str
    file: Path
    asks: str = "cluster"


def needs() -> None:
    """Leave with what is missing."""
    for program in ("dnsperf", "taskset"):
        if shutil.which(program) is None:
            sys.exit(f"bench: needs {program} (Debian: apt-get install dnsperf util-linux)")
    if (os.cpu_count() or 1) < 2:
        sys.exit("bench: needs two cores, one for the server and one for dnsperf")


def free_port() -> int:
    """Return a port of loopback that neither UDP nor TCP has in use."""
    while True:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, socket.socket() as stream:
            sock.bind(("127.0.0.1", 0))
            port = int(sock.getsockname()[1])
            with contextlib.suppress(OSError):
                stream.bind(("127.0.0.1", port))
                return port


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


def question(name: str, qid: int = 0x1234) -> bytes:
    """Return a query for A records."""
    wire = qid.to_bytes(2, "big") + b"\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00"
    for label in name.split("."):
        wire += bytes((len(label),)) + label.encode()
    return wire + b"\x00\x00\x01\x00\x01"


def wait_answering(
    port: int, name: str, process: subprocess.Popen[bytes], log: Path, pause: float = 0.1
) -> None:
    """Wait until the server answers a question with NOERROR (an echo answers anything)."""
    asked = question(name)
    until = time.monotonic() + 120
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        # Connected, it hears at once that nobody listens yet.
        sock.connect(("127.0.0.1", port))
        sock.settimeout(0.2)
        while time.monotonic() < until and process.poll() is None:
            with contextlib.suppress(OSError):
                sock.send(asked)
                answer = sock.recv(512)
                if answer[:2] == asked[:2] and answer[3] & 15 == 0:
                    return
            time.sleep(pause)
    sys.exit(f"bench: {process.args!r} does not answer:\n{log.read_text()[-2000:]}")


def wait_port(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(300):
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return
        if process.poll() is not None:
            break
        time.sleep(0.1)
    sys.exit(f"bench: the API server did not start:\n{log.read_text()[-2000:]}")


def cpu_seconds(pid: int) -> float:
    """Return user+system seconds of a process and its children that are there."""
    spent = 0.0
    for one in (pid, *children(pid)):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{one}/stat").read_text().rsplit(")", 1)[1].split()
            spent += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return spent


def memory(pid: int) -> float:
    """Return the resident megabytes of a process and its children that are there."""
    total = 0.0
    for one in (pid, *children(pid)):
        with contextlib.suppress(OSError):
            found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{one}/status").read_text())
            total += int(found[1]) / 1024 if found else 0.0
    return total


def children(pid: int) -> list[int]:
    """Return the processes that a process has started, and theirs."""
    parents: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(status.read_text().rsplit(")", 1)[1].split()[1])
            parents.setdefault(parent, []).append(int(status.parent.name))
    found, left = [], [pid]
    while left:
        below = parents.get(left.pop(), [])
        found += below
        left += below
    return found


@dataclass
class Ran:
    """One run of a load generator. rate -- answered a second; cpu -- seconds of processor time
    of the generator, where it is known"""

    rate: float
    answered: int
    lost: int
    cpu: float = 0.0


def saturate(
    generator: Path | None,
    port: int,
    load: Load,
    seconds: float,
    core: str = LOAD_CORE,
    clients: int = CLIENTS,
    outstanding: int = OUTSTANDING,
) -> Ran:
    """Ask as fast as answers come: by bench/load.c where it could be built, for dnsperf takes
    longer for a question than a good server for its answer."""
    if generator is None:
        return dnsperf(port, load, seconds)
    out = subprocess.run(
        ["taskset", "-c", core, str(generator), str(port), str(load.file), str(clients),
         str(outstanding), str(seconds)],
        capture_output=True, text=True, timeout=seconds + 60, check=True,
    ).stdout  # fmt: skip
    took, answered, lost, cpu = out.split()
    return Ran(int(answered) / float(took), int(answered), int(lost), float(cpu))


def dnsperf(port: int, load: Load, seconds: float, rate: int | None = None) -> Ran:
    """Ask as fast as answers come, or `rate` times a second."""
    command = [
        "taskset", "-c", LOAD_CORE, "dnsperf", "-s", "127.0.0.1", "-p", str(port),
        "-d", str(load.file), "-l", str(seconds), "-c", str(CLIENTS), "-q", str(OUTSTANDING),
    ]  # fmt: skip
    if rate is not None:
        command += ["-Q", str(rate)]
    out = subprocess.run(
        command, capture_output=True, text=True, timeout=seconds + 60, check=False
    ).stdout
    return read_dnsperf(out)


def read_dnsperf(out: str) -> Ran:
    """Return what dnsperf printed."""
    found = re.search(r"Queries per second:\s+([\d.]+)", out)
    answered = re.search(r"Queries completed:\s+(\d+)", out)
    lost = re.search(r"Queries lost:\s+(\d+)", out)
    if found is None or answered is None or lost is None:
        sys.exit(f"bench: dnsperf printed no rate:\n{out}")
    return Ran(float(found[1]), int(answered[1]), int(lost[1]))


class Prober:
    """One client with one question under way at a time, every two milliseconds: what an answer
    takes while others ask, too. Seconds of each answer in `seconds`; an answer that does not
    come within 0.5 s counts as 0.5 s."""

    def __init__(self, port: int, names: Sequence[str]) -> None:
        self.seconds: list[float] = []
        self._port = port
        self._names = names
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Prober:
        self._thread.start()
        return self

    def __exit__(self, *failed: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        os.sched_setaffinity(threading.get_native_id(), {int(LOAD_CORE)})
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect(("127.0.0.1", self._port))
            sock.settimeout(0.5)
            for n in range(1_000_000):
                if self._end.wait(0.002):
                    return
                self.seconds.append(
                    once(sock, question(self._names[n % len(self._names)], n & 0xFFFF))
                )


def once(sock: socket.socket, asked: bytes) -> float:
    """Return the seconds that an answer takes; 0.5 where none came."""
    began = time.perf_counter()
    sock.send(asked)
    with contextlib.suppress(OSError):
        while sock.recv(4096)[:2] != asked[:2]:
            pass
        return time.perf_counter() - began
    return 0.5


def percentile(values: Iterable[float], share: float) -> float:
    """Return the value below which `share` of all lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


# --- who is there ---------------------------------------------------------------------------


def peers(
    folder: Path, api: int, upstream: int, zone: Path | None, pods: str = "insecure"
) -> list[Peer]:
    """Return every server this machine has. zone -- the records of the cluster as a file"""
    found = [
        _served(
            folder, "kdns", [sys.executable, "-m", "kdns", "serve", "-conf"], api, upstream, pods
        )
    ]
    coredns = shutil.which("coredns")
    if coredns:
        found.append(_served(folder, "CoreDNS", [coredns, "-conf"], api, upstream, pods))
    echo = built(folder, "echo")
    if echo is not None:
        port = free_port()
        found.append(
            Peer("echo", [str(echo), str(port)], port, frozenset(("cluster", "outside")), "")
        )
    if zone is not None:
        found += _authorities(folder, zone)
    unbound = shutil.which("unbound")
    if unbound:
        port = free_port()
        conf = _write(
            folder / "unbound.conf", UNBOUND.format(port=port, folder=folder, upstream=upstream)
        )
        command = [unbound, "-d", "-c", str(conf)]
        found.append(Peer("Unbound", command, port, frozenset(("outside",)),
                          _version([unbound, "-V"])))  # fmt: skip
    return found


def _served(
    folder: Path, name: str, command: list[str], api: int, upstream: int, pods: str
) -> Peer:
    port = free_port()
    text = KUBEADM.format(
        port=port, api=api, upstream=upstream, pods=pods, health=free_port(), ready=free_port(),
        metrics=free_port(),
    )  # fmt: skip
    conf = _write(folder / f"{name}.Corefile", text)
    both = frozenset(("cluster", "outside"))
    return Peer(name, [*command, str(conf)], port, both, _version([*command[:-1], "-version"]))


def _authorities(folder: Path, zone: Path) -> Iterator[Peer]:
    cluster = frozenset(("cluster",))
    nsd, knot = shutil.which("nsd"), shutil.which("knotd")
    if nsd:
        port = free_port()
        conf = _write(folder / "nsd.conf", NSD.format(port=port, folder=folder, zone=zone))
        yield Peer("NSD", [nsd, "-d", "-c", str(conf)], port, cluster, _version([nsd, "-v"]))
    if knot:
        port = free_port()
        (folder / "knot").mkdir(exist_ok=True)
        conf = _write(folder / "knot.conf", KNOT.format(port=port, folder=folder, zone=zone))
        yield Peer("Knot", [knot, "-c", str(conf)], port, cluster, _version([knot, "-V"]))


def outside(folder: Path, port: int, names: Iterable[str]) -> list[str]:
    """Return the command of a server for names outside of the cluster."""
    records = [f"{name}. 300 IN A 192.0.2.{n % 250 + 1}\n" for n, name in enumerate(names)]
    soa = "example.com. 300 IN SOA ns.example.com. root.example.com. 1 3600 600 86400 30\n"
    _write(
        folder / "example.zone", soa + "example.com. 300 IN NS ns.example.com.\n" + "".join(records)
    )
    conf = _write(folder / "outside.Corefile", OUTSIDE.format(port=port, folder=folder))
    return [sys.executable, "-m", "kdns", "serve", "-conf", str(conf)]


def built(folder: Path, name: str) -> Path | None:
    """Return a program of bench/NAME.c; None where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    out = folder / f"{name}.program"
    subprocess.run([compiler, "-O2", "-o", str(out), str(HERE / f"{name}.c")], check=True)
    return out


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def _version(command: list[str]) -> str:
    out = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    lines = (out.stdout or out.stderr).strip().splitlines()
    return lines[0] if lines else "?"
