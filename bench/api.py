"""The embedded API's part of `make bench`: `kdns up` as its users meet it.

Each figure is taken from outside, over HTTPS on loopback, with the data on disk: seconds from
exec to the ready line, memory, a create's answer (its commit included), 1,000 Services applied
by kubectl (where one is found), by requests and by `kdns up -f`, 10,000 Services as kubectl lists
them, and from the answer of a write to the first DNS answer that has it. And how long a test
suite waits for its first kdns.Cluster.

Modules are compiled before anything is measured, as pip does when it installs them.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import signal
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from kdns.dns import types as t
from kdns.dns.name import parse_name
from kdns.server.client import Server, ask

STARTS = 5
CREATES = 300
APPLIED = 1000
LISTED = 10_000
CHANGES = 200
AT_ONCE = 64  # requests under way while the 10,000 are made
PATIENCE = 60.0  # seconds for anything
SERVICES = "/api/v1/namespaces/default/services"
TABLE = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json"


@dataclass
class Figures:
    """Seconds and MB. creates, dns -- of each change; kubectl -- None where there is none;
    cold -- from the import of kdns to a Cluster in memory that is there; followed -- to ready
    with manifests"""

    start: list[float] = field(default_factory=list)
    start_mb: list[float] = field(default_factory=list)
    creates: list[float] = field(default_factory=list)
    cold: list[float] = field(default_factory=list)
    followed: float = 0.0
    kubectl: float | None = None
    kubectl_version: str = ""
    applied: float = 0.0
    made: float = 0.0
    table: list[float] = field(default_factory=list)
    kubectl_get: float | None = None
    dns: list[float] = field(default_factory=list)
    large_mb: float = 0.0
    machine: str = ""
    command: str = ""


@dataclass(frozen=True)
class Up:
    """A running `kdns up`. seconds -- from exec to its ready line"""

    process: subprocess.Popen[str]
    api: str
    dns: Server
    kubeconfig: str
    token: str
    seconds: float

    @property
    def mb(self) -> float:
        """Resident memory."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        return 0.0


COLD = """
import time
began = time.perf_counter()
import asyncio
import kdns

async def main():
    async with kdns.Cluster():
        print(time.perf_counter() - began)

asyncio.run(main())
"""


def compiled(folder: Path) -> dict[str, str]:
    """Return an environment in which modules are compiled once, and then found so."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPYCACHEPREFIX": str(folder / "compiled")}


@contextmanager
def running(folder: Path, *words: str, env: dict[str, str] | None = None) -> Iterator[Up]:
    """Run `kdns up` with its data in a folder."""
    command = [
        sys.executable, "-m", "kdns", "up", "--api-port", "0", "--dns-port", "0",
        "--proxy-mode", "none", "--data-dir", str(folder), "--output", "json", *words,
    ]  # fmt: skip
    began = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - began
        if not line:
            sys.exit(f"bench: kdns up ended with {process.wait(PATIENCE)}")
        told = json.loads(line)
        config = yaml.safe_load(Path(told["kubeconfig"]).read_text())
        host, _, port = told["dns"].rpartition(":")
        token = config["users"][0]["user"]["token"]
        yield Up(process, told["api"], Server(host, int(port)), told["kubeconfig"], token, seconds)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE)


def kubectl() -> str | None:
    """Return a kubectl: the environment's own, or the one in PATH."""
    return shutil.which("kubectl", path=str(Path(sys.executable).parent)) or shutil.which("kubectl")


def service(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {"selector": {"app": name}, "ports": [{"port": 80, "targetPort": 8080}]},
    }


def session(up: Up) -> aiohttp.ClientSession:
    config = yaml.safe_load(Path(up.kubeconfig).read_text())
    context = ssl.create_default_context(
        cadata=base64.b64decode(
            config["clusters"][0]["cluster"]["certificate-authority-data"]
        ).decode()
    )
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=context, limit=AT_ONCE),
        headers={"Authorization": f"Bearer {up.token}"},
    )


async def create(client: aiohttp.ClientSession, up: Up, name: str) -> str:
    """Create a Service; return its ClusterIP."""
    async with client.post(up.api + SERVICES, json=service(name)) as answer:
        made = await answer.json()
        if answer.status != 201:
            sys.exit(f"bench: {answer.status} {made.get('message')}")
        return str(made["spec"]["clusterIP"])


async def measure_creates(up: Up, figures: Figures) -> None:
    """One after the other, each waiting for its answer."""
    async with session(up) as client:
        await create(client, up, "warm")
        for number in range(CREATES):
            began = time.perf_counter()
            await create(client, up, f"create-{number}")
            figures.creates.append(time.perf_counter() - began)


async def measure_dns(up: Up, figures: Figures) -> None:
    """From a create's answer to the first DNS answer that has it; an answer that does not have
    it yet is asked for again at once."""
    async with session(up) as client:
        for number in range(CHANGES):
            name = parse_name(f"dns-{number}.default.svc.cluster.local.")
            await create(client, up, f"dns-{number}")
            began = time.perf_counter()
            while ask(up.dns, name, t.A, timeout=1.0, tries=1).message.rcode != t.NOERROR:
                if time.perf_counter() - began > PATIENCE:
                    sys.exit(f"bench: dns-{number} is never answered")
            figures.dns.append(time.perf_counter() - began)


async def measure_large(up: Up, figures: Figures) -> None:
    """Make what is missing to LISTED Services, AT_ONCE at a time; list them as kubectl does."""
    async with session(up) as client:
        async with client.get(up.api + SERVICES) as answer:
            there = len((await answer.json())["items"])
        names = iter(range(LISTED - there))

        async def worker() -> None:
            for number in names:
                await create(client, up, f"many-{number}")

        began = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(AT_ONCE)))
        figures.made = (time.perf_counter() - began) / (LISTED - there)
        for _ in range(5):
            began = time.perf_counter()
            async with client.get(up.api + SERVICES, headers={"Accept": TABLE}) as answer:
                body = await answer.read()
            figures.table.append(time.perf_counter() - began)
            assert len(json.loads(body)["rows"]) == LISTED
    figures.large_mb = up.mb


async def apply_all(up: Up) -> float:
    """Apply APPLIED Services by server-side apply, one after the other; return seconds."""
    async with session(up) as client:
        began = time.perf_counter()
        for number in range(APPLIED):
            url = f"{up.api}{SERVICES}/applied-{number}?fieldManager=bench"
            body = json.dumps(service(f"applied-{number}"))
            kind = {"Content-Type": "application/apply-patch+yaml"}
            async with client.patch(url, data=body, headers=kind) as answer:
                assert answer.status == 201, await answer.text()
        return time.perf_counter() - began


def kubectl_seconds(up: Up, program: str, *words: str) -> float:
    began = time.perf_counter()
    done = subprocess.run(
        [program, *words], env=os.environ | {"KUBECONFIG": up.kubeconfig},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"bench: kubectl {' '.join(words)}: {done.stderr}")
    return time.perf_counter() - began


def measure() -> Figures:
    """Take all figures."""
    figures = Figures()
    program = kubectl()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        env = compiled(folder)
        manifest = folder / "many.yaml"
        with running(folder / "first", env=env):
            pass  # compiles
        for number in range(STARTS):
            with running(folder / f"start-{number}", env=env) as up:
                figures.start.append(up.seconds)
                figures.start_mb.append(up.mb)
            words = [sys.executable, "-c", COLD]
            figures.cold.append(float(subprocess.check_output(words, env=env)))
        manifest.write_text(yaml.safe_dump_all([service(f"followed-{n}") for n in range(APPLIED)]))
        with running(folder / "followed", "-f", str(manifest), env=env) as up:
            figures.followed = up.seconds
        with running(folder / "large", env=env) as up:
            asyncio.run(measure_creates(up, figures))
            if program:
                manifest.write_text(
                    yaml.safe_dump_all([service(f"kubectl-{n}") for n in range(APPLIED)])
                )
                figures.kubectl = kubectl_seconds(up, program, "apply", "-f", str(manifest))
                words = [program, "version", "--client", "-o", "json"]
                told = json.loads(subprocess.check_output(words, text=True))
                figures.kubectl_version = told["clientVersion"]["gitVersion"]
            figures.applied = asyncio.run(apply_all(up))
            asyncio.run(measure_large(up, figures))
            if program:
                figures.kubectl_get = kubectl_seconds(up, program, "get", "services")
            asyncio.run(measure_dns(up, figures))
    return figures


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def section(figures: Figures) -> list[str]:
    """Return the part of RESULTS.md."""
    now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())

    def ms(value: float) -> str:
        return f"{value * 1000:.1f} ms"

    creates, dns = figures.creates, figures.dns
    rows = [
        ("`kdns up`, exec to ready", "1 s",
         f"{statistics.median(figures.start):.2f} s ({min(figures.start):.2f} to"
         f" {max(figures.start):.2f})"),
        ("memory when ready", "120 MB", f"{statistics.median(figures.start_mb):.0f} MB"),
        ("`kdns.Cluster()` in memory, `import kdns` included", "0.3 s",
         f"{statistics.median(figures.cold):.2f} s ({min(figures.cold):.2f} to"
         f" {max(figures.cold):.2f})"),
        (f"`kdns up -f` of {APPLIED:,} Services, exec to ready", "5 s",
         f"{figures.followed:.2f} s"),
        ("a create, its commit included", "p50 3 ms",
         f"p50 {ms(percentile(creates, 0.5))}, p99 {ms(percentile(creates, 0.99))}"),
        (f"{APPLIED:,} Services by server-side apply, one after the other", "5 s",
         f"{figures.applied:.2f} s"),
        (f"{LISTED:,} Services, {AT_ONCE} creates at a time", "-", f"{ms(figures.made)} each"),
        (f"list of {LISTED:,} Services as a Table", "1 s",
         f"{statistics.median(figures.table):.2f} s"),
        ("create answered -> DNS answers it, at that size", "p99 10 ms",
         f"p50 {ms(percentile(dns, 0.5))}, p99 {ms(percentile(dns, 0.99))}"),
        (f"memory with {LISTED:,} Services", "-", f"{figures.large_mb:.0f} MB"),
    ]  # fmt: skip
    if figures.kubectl is not None and figures.kubectl_get is not None:
        rows[6:6] = [(f"`kubectl apply -f` of {APPLIED:,} Services", "5 s",
                      f"{figures.kubectl:.2f} s")]  # fmt: skip
        rows[9:9] = [(f"`kubectl get services` of {LISTED:,}", "-",
                      f"{figures.kubectl_get:.2f} s")]  # fmt: skip
    return [
        "# Measured: the embedded API",
        "",
        f"{now} on {figures.machine}. Command: {figures.command}. One `kdns up` with TLS, token"
        f" and its data on disk; clients on the same two cores; kubectl"
        f" {figures.kubectl_version or 'not found'}.",
        "",
        "| what | goal | measured |",
        "| --- | --- | --- |",
        *[f"| {what} | {goal} | {found} |" for what, goal, found in rows],
    ]


def values(figures: Figures) -> dict[str, object]:
    """Return the part of results.json."""
    return {"api": asdict(figures)}
