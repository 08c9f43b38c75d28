"""From a Service's creation to the first connection: one process, and two that know of each other
nothing.

New Services are created in a network namespace; a client asks for each name until it is there and
connects at once (tests/gate_client.py). Measured are `kdns up` with names that wait for their
rules, the same without the gate, and names by `kdns up` beside forwarding by kube-proxy (where it
is on PATH) with its default settings. bench/run.py writes the figures down. Needs root; nothing
is left behind.

    python bench/gate.py [--count N]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.proxy import (  # noqa: E402
    arguments,
    missing,
    namespace,
    programs,
    started,
    stopped_by_signals,
    version_of,
)

__all__ = ["measure", "missing", "section", "values"]

CLIENT = ROOT / "tests" / "gate_client.py"
COUNT, FEW, BURST = 1000, 40, 500
AT_ONCE = 20
READY = 30.0
SETTLED = 2.0  # after kube-proxy's first sync, so that a change meets no pause of that


@dataclass
class Run:
    """One program or pair, with one scenario. found -- what the client printed"""

    title: str
    scenario: str
    found: dict[str, Any]


@dataclass
class Figures:
    """Everything measured."""

    when: str = ""
    machine: str = ""
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)


@contextlib.contextmanager
def kdns_up(folder: Path, *flags: str) -> Iterator[dict[str, Any]]:
    """Run `kdns up`; yield its ready line."""
    ready = folder / "ready"
    command = [sys.executable, "-m", "kdns", "up", "--insecure", "--api-port=0", "--dns-port=0",
               f"--ready-file={ready}", "--output=json", *flags]  # fmt: skip
    log = folder / "up.log"
    with started(command, log, stdout=subprocess.DEVNULL) as process:
        end = time.monotonic() + READY
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > end:
                sys.exit(f"bench: kdns up is not ready:\n{log.read_text()[-2000:]}")
            time.sleep(0.02)
        yield json.loads(ready.read_text())


def play(facts: dict[str, Any], scenario: str, **flags: int) -> dict[str, Any]:
    more = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    port = facts["dns"].rpartition(":")[2]
    done = subprocess.run(
        [sys.executable, str(CLIENT), scenario, "--api", facts["api"], "--dns", port, *more],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"bench: the client failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(count: int = COUNT) -> Figures:
    """Run everything; a few minutes."""
    peer = programs().get("kube-proxy")
    figures = Figures(versions={"kdns": version_of(programs()["kdns"])})
    if peer:
        figures.versions["kube-proxy"] = version_of(peer)
    figures.versions["iptables"] = version_of(["iptables"])

    def note(title: str, scenario: str, found: dict[str, Any]) -> None:
        figures.runs.append(Run(title, scenario, found))
        print(f"{title}: {scenario}: {json.dumps(found)}", flush=True)

    with tempfile.TemporaryDirectory() as name, stopped_by_signals():
        folder = Path(name)
        for mode in ("iptables", "nftables"):
            for title, gate, many in (
                (f"kdns up, {mode}", "2s", count),
                (f"the same without the gate, {mode}", "0", FEW),
            ):
                with (
                    namespace(),
                    kdns_up(folder, f"--proxy-mode={mode}", f"--gate-timeout={gate}") as facts,
                ):
                    if many == count:
                        note(title, "one by one", play(facts, "create", count=FEW, at_once=1))
                with (
                    namespace(),
                    kdns_up(folder, f"--proxy-mode={mode}", f"--gate-timeout={gate}") as facts,
                ):
                    at_once = AT_ONCE if many == count else 1
                    found = play(facts, "create", count=many, at_once=at_once)
                    note(title, f"{at_once} at once" if at_once > 1 else "one by one", found)
            with namespace(), kdns_up(folder, f"--proxy-mode={mode}") as facts:
                note(f"kdns up, {mode}", "burst", play(facts, "burst", count=BURST))
            if peer:
                title = f"names by kdns up, forwarding by kube-proxy, {mode}"
                with namespace(), kdns_up(folder) as facts:
                    argv = [*peer, *arguments(folder, facts["api"], mode, None)]
                    with started(argv, folder / "peer.log"):
                        time.sleep(SETTLED)
                        note(title, "one by one", play(facts, "create", count=FEW, at_once=1))
    return figures


def section(figures: Figures) -> list[str]:
    """Return the part of RESULTS.md."""
    lines = [
        "# Measured: from a Service's creation to the first connection",
        "",
        f"{figures.when} on {figures.machine}. Command: {figures.command}. A Service with three"
        " ready endpoints is created, its name asked for each 5 ms until it is there, and then"
        " connected to at once. Milliseconds from the API's answer, median and 99th percentile."
        f" `{AT_ONCE} at once`: so many are always being created; one by one: with 100 ms between."
        " Whoever's first connection is lost tries another after 250 ms.",
        "",
        *[f"- {name}: {text}" for name, text in figures.versions.items()],
        "",
        "| | Services | first connection failed | has a name after ms | reachable after ms |",
        "| --- | --- | --- | --- | --- |",
    ]
    for run in figures.runs:
        found = run.found
        if run.scenario == "burst":
            continue
        cells = [
            f"{run.title}, {run.scenario}", f"{found['count']:,}", f"{found['failed']:,}",
            _spread(found["named_ms"]), _spread(found["reachable_ms"]),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for run in figures.runs:
        if run.scenario == "burst":
            found = run.found
            lines.append(
                f"- {run.title}: {found['count']} Services asked for within a second (the API took"
                f" {found['created_s']} s for them): {found['failed']} connections lost or"
                f" refused; names after {_spread(found['named_ms'])} ms, the last after"
                f" {found['named_ms']['max']:.0f} ms."
            )
    return lines


def _spread(values: dict[str, float]) -> str:
    return f"{values['p50']:.0f} / {values['p99']:.0f}"


def values(figures: Figures) -> dict[str, object]:
    return {"gate": asdict(figures)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=COUNT)
    reason = missing()
    if reason:
        sys.exit(f"bench: it {reason}")
    print("\n".join(section(measure(parser.parse_args().count))))
