"""`make bench`: everything that is measured, beside what else the machine has for it.

Names (bench/names.py): kdns, CoreDNS, NSD, Knot DNS, Unbound and a bare UDP echo in C, where they
are on PATH; several processes that answer (bench/workers.py); 10,000 Services under change
(bench/scale.py): beside CoreDNS; forwarding (bench/proxy.py): beside kube-proxy; the userspace
mode's (bench/userspace.py); the gate's (bench/gate.py); the embedded API's (bench/api.py); single
steps, such as reading a question, without a socket (bench/micro.py). Only ratios within one run
carry over from machine to machine. Writes bench/RESULTS.md, bench/results.json and
bench/results.svg; what was not run keeps what stood there.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))  # a script's own folder is there, not the one above it

from bench import api, gate, micro, names, proxy, scale, userspace, workers  # noqa: E402

PARTS = ("names", "workers", "scale", "forwarding", "nftables", "userspace", "api", "gate", "micro")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5, help="length of one dnsperf run")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--only", choices=PARTS, help="run one part")
    parser.add_argument(
        "--compare", metavar="BASE", default="",
        help="names and micro: print the change since results.json of this commit or file; write"
        " nothing",
    )  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true", help="forwarding: one round, no 10,000; micro: fewer calls"
    )
    args = parser.parse_args()
    if args.compare:
        compare(args)
        return
    if args.only in (None, "names"):
        run_names(args)
    if args.only in (None, "workers"):
        run_workers(args)
    if args.only in (None, "scale"):
        run_scale(args)
    if args.only in (None, "forwarding"):
        run_forwarding(args)
    if args.only == "nftables":  # of the forwarding part what is in that mode
        run_forwarding(args, "nftables")
    if args.only in (None, "userspace"):
        run_userspace()
    if args.only in (None, "api"):
        run_api()
    if args.only in (None, "gate"):
        run_gate()
    if args.only in (None, "micro"):
        run_micro(args.quick)


def compare(args: argparse.Namespace) -> None:
    """Print what changed since an earlier run: names, and quickly the single steps."""
    base = json.loads(committed(args.compare))
    if args.only in (None, "names"):
        print("\n".join(names.compare(base, names.measure(args.seconds, args.rounds))))
    if args.only in (None, "names", "micro"):
        print("\n".join(micro.compare(base, micro.measure(quick=True))))


def run_workers(args: argparse.Namespace) -> None:
    why_not = workers.missing()
    if why_not:
        print(f"bench: the part on workers is left out: it {why_not}", flush=True)
        return
    results = workers.measure(args.seconds, args.rounds)
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    results.machine, results.command = machine(), command_line()
    write_part(workers.section(results, now), workers.values(results, now))


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


def run_gate() -> None:
    why_not = gate.missing()
    if why_not:
        print(f"bench: the part on the gate is left out: it {why_not}", flush=True)
        return
    figures = gate.measure()
    figures.when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    figures.machine, figures.command = machine(), command_line()
    write_part(gate.section(figures), gate.values(figures))


def run_micro(quick: bool) -> None:
    figures = micro.measure(quick)
    figures.when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    figures.machine, figures.command = machine(), command_line()
    write_part(micro.section(figures), micro.values(figures))


def run_forwarding(args: argparse.Namespace, only: str = "") -> None:
    why_not = proxy.missing()
    if why_not:
        print(f"bench: the forwarding part is left out: it {why_not}", flush=True)
        return
    figures = proxy.measure(args.quick, only=only)
    figures.machine, figures.command = machine(), command_line()
    title = f"forwarding, {only} mode" if only else "forwarding"
    write_part(proxy.section(figures, title), {only or "forwarding": asdict(figures)})


def run_scale(args: argparse.Namespace) -> None:
    results = scale.measure(args.seconds, args.rounds)
    results.when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    results.machine, results.command = machine(), command_line()
    write_part(scale.section(results), scale.values(results))


def run_names(args: argparse.Namespace) -> None:
    results = names.measure(args.seconds, args.rounds)
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    write_part(
        names.section(results, now, machine(), command_line()),
        names.values(results, now, cpu_model()),
    )
    (HERE / "results.svg").write_text(names.chart(results))


def committed(base: str) -> str:
    """Return bench/results.json as it is in a commit, or of a file."""
    if Path(base).is_file():
        return Path(base).read_text()
    shown = subprocess.run(
        ["git", "show", f"{base}:bench/results.json"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    if shown.returncode:
        sys.exit(f"bench: no results of {base}: {shown.stderr.strip()}")
    return shown.stdout


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
