"""The command line of `kdns check`: flags in, a report out, exit code.

Decides how a report looks, for people and for programs, and what is told when it is looked at
again and again. What is found is check.py's.

Exit codes: 0 nothing found (notes do not count); 1 errors or warnings found, or it could not be
looked; 2 wrong usage.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from typing import Final

import click

from kdns.errors import ConfigError, KdnsError
from kdns.explain.check import SETTLE, Report, Wishes, check
from kdns.explain.check_finding import PARTS, Finding, count
from kdns.explain.check_sight import read_servers
from kdns.explain.evidence import Where
from kdns.explain.where_flags import looks_at
from kdns.flags import DAY, Duration

INTERVAL: Final = "5s"  # between two looks of --watch
MOST_ALIKE: Final = 10  # findings of one id that are printed; -o json has them all
COLOURS: Final = {"error": "red", "warning": "yellow", "note": "cyan"}
NEW, OVER = "new", "over"


@click.command()
@looks_at
@click.option(
    "--server", "servers", metavar="A[,B]", default="",
    help="DNS servers to ask, ADDRESS[:PORT].  [default: kdns's own, and the endpoints of Service"
    " kube-system/kube-dns]",
)  # fmt: skip
@click.option("--no-dns", is_flag=True, help="Ask no DNS server.")
@click.option(
    "--service-cidr",
    metavar="C",
    default="",
    help="Where Services have theirs; C,C for both families.",
)
@click.option(
    "--settle", type=Duration(0, 3600), default=f"{SETTLE:g}s", show_default=True,
    help="Look again after this time at what may be but a change on its way; 0: tell it at once.",
)  # fmt: skip
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text")
@click.option(
    "--watch", metavar="[DURATION]", type=Duration(0.1, DAY), is_flag=False, flag_value=INTERVAL,
    default=None, help="Go on looking, this often, and tell what is new and what is over.",
)  # fmt: skip
def command(
    where: Where,
    servers: str,
    no_dns: bool,
    service_cidr: str,
    settle: float,
    output: str,
    watch: float | None,
) -> int:
    """Hold registry, DNS answers and kernel rules against each other, and say what is wrong."""
    if no_dns and servers:
        raise click.UsageError("--server and --no-dns exclude each other")
    cidrs = tuple(one for one in service_cidr.replace(",", " ").split())
    wishes = Wishes(where, tuple(read_servers(servers)), cidrs, not no_dns)
    if watch is None:
        report = check(wishes, settle)
        _say(as_json(report) if output == "json" else as_text(report))
        return 1 if report.faults else 0
    return _watch(wishes, settle, watch, output)


# --- once -----------------------------------------------------------------------------------


def as_json(report: Report) -> str:
    return json.dumps(
        {
            "from": report.told,
            "checked": report.checked,
            "findings": [_object(one) for one in report.findings],
            "notes": report.notes,
            "count": counts(report.findings),
        },
        indent=2,
    )


def _object(one: Finding) -> dict[str, str]:
    return {**one._asdict(), "part": one.part}


def counts(findings: Iterable[Finding]) -> dict[str, int]:
    found = dict.fromkeys(COLOURS, 0)
    for one in findings:
        found[one.severity] += 1
    return found


def as_text(report: Report) -> str:
    return "\n".join(_lines(report))


def _lines(report: Report) -> Iterator[str]:
    yield f"from {report.told}"
    for part, told in report.checked.items():
        yield click.style(f"  {PARTS[part]}: {told}", dim=True)
    for note in report.notes:
        yield click.style(f"  not seen: {note}", dim=True)
    for part, those in groupby(report.findings, key=lambda one: one.part):
        yield ""
        yield click.style(PARTS[part], bold=True)
        for _, alike in groupby(those, key=lambda one: one.id):
            listed = [*alike]
            for one in listed[:MOST_ALIKE]:
                yield from _finding_lines(one)
            if len(listed) > MOST_ALIKE:
                yield f"  and {len(listed) - MOST_ALIKE} more of {listed[0].id} (-o json has all)"
    yield ""
    yield verdict(report.findings)


def _finding_lines(one: Finding) -> Iterator[str]:
    head = click.style(f"{one.severity}", fg=COLOURS[one.severity])
    yield f"  {head} {click.style(one.id, dim=True)}  {click.style(one.subject, bold=True)}"
    yield f"      {one.text}"
    yield f"      why: {one.cause}"
    yield f"      do:  {one.advice}"


def verdict(findings: Iterable[Finding]) -> str:
    """Return the last line."""
    found = counts(findings)
    told = [count(n, what) for what, n in found.items() if n]
    if not (found["error"] or found["warning"]):
        told.insert(0, "all agree")
    return ", ".join(told)


# --- again and again ------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """What a look finds that the one before did not, and the other way round."""

    new: tuple[Finding, ...]
    over: tuple[Finding, ...]


def turn(before: Iterable[Finding], after: Iterable[Finding]) -> Turn:
    """Compare two looks: a finding whose text alone has changed is the same."""
    old = {(one.id, one.subject): one for one in before}
    now = {(one.id, one.subject): one for one in after}
    return Turn(
        tuple(one for key, one in now.items() if key not in old),
        tuple(one for key, one in old.items() if key not in now),
    )


def _watch(wishes: Wishes, settle: float, seconds: float, output: str) -> int:
    """Look until interrupted. Somebody who does not answer is told, and asked again."""
    before: tuple[Finding, ...] = ()
    failing, first = "", True
    while True:
        try:
            report = check(wishes, settle)
        except ConfigError:
            raise
        except KdnsError as e:
            if str(e) != failing:
                failing = str(e)
                _tell(output, {"time": _time(), "failed": failing}, [f"{_time()} {failing}"])
            time.sleep(seconds)
            continue
        if failing:
            _tell(output, {"time": _time(), "failed": ""}, [f"{_time()} answers again"])
        failing = ""
        if first and output == "text":
            _say(as_text(report))
        else:
            _tell_turn(turn(before, report.findings), output)
        before, first = report.findings, False
        time.sleep(seconds)


def _tell_turn(found: Turn, output: str) -> None:
    for word, sign, those in ((NEW, "+", found.new), (OVER, "-", found.over)):
        for one in those:
            lines = [*_finding_lines(one)]
            lines = [f"{_time()} {sign} {word}:{lines[0][1:]}", *(lines[1:] if word == NEW else ())]
            _tell(output, {"time": _time(), "what": word, **_object(one)}, lines)


def _tell(output: str, event: dict[str, str], lines: Iterable[str]) -> None:
    """Write one event: a line of JSON, or some of text."""
    for line in [json.dumps(event)] if output == "json" else lines:
        _say(line)


def _say(text: str) -> None:
    """Write to standard output; in colour to a terminal, unless NO_COLOR is set."""
    click.echo(text, color=False if os.environ.get("NO_COLOR") else None)
    sys.stdout.flush()


def _time() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
