"""`kdns trace NAME[:PORT]`: follow one request from search list to kernel rule.

Decides what the command line means; the trace is trace.py's, its look trace_text.py's. Exit
code 0: the request arrives, or leaves the cluster; 1: it stops; 2: wrong usage.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace

import click

from kdns.explain.evidence import Where, gather
from kdns.explain.search import LIBCS
from kdns.explain.trace import trace
from kdns.explain.trace_state import Request
from kdns.explain.trace_text import as_json, render
from kdns.explain.where_flags import looks_at

WIDEST = 100


def parse_target(text: str) -> tuple[str, int | None]:
    """Return (name or address, port or None) of NAME[:PORT]. Raises click.UsageError."""
    name, port = text, ""
    if text.startswith("["):
        name, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise click.UsageError(f"'{text}' is not [ADDRESS]:PORT")
        port = rest[1:]
        given = bool(rest)
    elif text.count(":") == 1:
        name, _, port = text.partition(":")
        given = True
    else:
        given = False
    if not name:
        raise click.UsageError(f"'{text}' names nothing; write NAME:PORT, such as web:80")
    if not given:
        return name, None
    if not (port.isascii() and port.isdecimal()) or not 0 < int(port) <= 65535:
        raise click.UsageError(f"'{port}' is not a port; write a number from 1 to 65535")
    return name, int(port)


@click.command("trace")
@click.argument("what", metavar="NAME[:PORT]")
@click.option(
    "--from", "source", metavar="NS/POD|NODE|IP", default="",
    help="Who asks: a Pod, some Pod of a namespace (NS/), a Node, or an address.  [default: some"
    " Pod of 'default']",
)  # fmt: skip
@click.option("--udp", is_flag=True, help="PORT is one of UDP.")
@click.option(
    "--libc", type=click.Choice(LIBCS), default="glibc", show_default=True,
    help="Whose search list it is; where the other finds something else it is said.",
)  # fmt: skip
@looks_at
@click.option(
    "--server", metavar="A[:PORT]", default="",
    help="Ask this DNS server for real, too.  [default: a running kdns's own]",
)  # fmt: skip
@click.option("-v", "--verbose", is_flag=True, help="Every rule, endpoint and note.")
@click.option(
    "-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True,
    help="For people or for programs.",
)  # fmt: skip
def command(
    what: str,
    source: str,
    udp: bool,
    libc: str,
    where: Where,
    server: str,
    verbose: bool,
    output: str,
) -> int:
    """Follow one request: which names are tried and what answers them, which endpoints are in
    or out and why, which rules a packet meets; and where it ends, or why it stops and what to
    do. Exit code 0: it arrives; 1: it stops; 2: wrong usage."""
    name, port = parse_target(what)
    evidence = gather(replace(where, server=server))
    request = Request(name, port, source, "udp" if udp else "tcp", libc)  # type: ignore[arg-type]
    made = trace(evidence, request)
    if output == "json":
        click.echo(json.dumps(as_json(made), indent=2, ensure_ascii=False))
    else:
        width = min(WIDEST, shutil.get_terminal_size((80, 24)).columns)
        click.echo(
            render(made, width=width, details=verbose, colour=_wants_colour()),
            nl=False, color=_wants_colour(),
        )  # fmt: skip
    return 0 if made.outcome.arrives else 1


def _wants_colour() -> bool:
    """Colour on a terminal, unless NO_COLOR is set to anything (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")
