"""`kdns wait`: returns when a name resolves and connects, or says why not.

Decides which server is asked and which search list completes the name; the waiting itself is
wait.py's. Exit code 0: it is there; 1: it is not, in the time given; 2: wrong usage.
"""

from __future__ import annotations

import ipaddress
import time
from pathlib import Path
from typing import Any

import click

from kdns import flags
from kdns.control import ControlClient, NoControl, find_control
from kdns.dns.name import BadName
from kdns.explain.wait import Outcome, Target, parse_target, wait
from kdns.server.client import RESOLV_CONF, Server, candidates, first_nameserver, search_path

NAMESPACE = "default"  # of whom a name is completed as, unless told otherwise
STATUS = "/v1/status"
STATUS_TIMEOUT = 2.0


@click.command("wait")
@click.argument("what", metavar="NAME[:PORT]")
@click.option(
    "--timeout", type=flags.Duration(0, flags.DAY), default="30s", show_default=True,
    help="How long to wait. It is tried once at least.",
)  # fmt: skip
@click.option(
    "--udp", is_flag=True,
    help="PORT is one of UDP: that nothing refuses a datagram, and that the rules are written as"
    " far as a running kdns knows, is all that can be found out.",
)  # fmt: skip
@click.option(
    "--search", metavar="NS", multiple=True,
    help="Complete NAME as a Pod of this namespace does; or with this domain. May be repeated."
    "  [default: 'default'; /etc/resolv.conf's list where its server is asked]",
)  # fmt: skip
@click.option(
    "--server", metavar="A", default="",
    help="Whom to ask.  [default: the running kdns of the control socket, else the first"
    " nameserver of /etc/resolv.conf]",
)  # fmt: skip
@click.option(
    "--port", metavar="N", type=flags.Port(1, 65535), default=53, show_default=True,
    help="The server's port.",
)  # fmt: skip
@flags.control()
@click.option("-q", "--quiet", is_flag=True, help="Say nothing when it is there.")
def command(
    what: str, timeout: float, udp: bool, search: tuple[str, ...], server: str, port: int,
    control: str, quiet: bool,
) -> int:  # fmt: skip
    """Wait until NAME resolves, through the search list as in a Pod, and PORT takes a
    connection; else say why not, and leave with 1."""
    try:
        target = parse_target(what, udp)
    except ValueError as e:
        raise click.UsageError(str(e)) from None
    if udp and not target.port:
        raise click.UsageError("--udp needs a port: NAME:PORT")
    began = time.monotonic()
    status = _status_of(control)
    whom, path = _server(server, port, search, status())
    try:
        names = [] if _is_address(target.name) else candidates(target.name, path)
    except (BadName, UnicodeError) as e:
        raise click.UsageError(f"not a domain name: {e}") from None
    outcome = wait(
        target, whom, names, timeout, clock=time.monotonic, sleep=time.sleep, status=status
    )
    if outcome.is_there:
        if not quiet:
            click.echo(f"{_there(target, outcome)} ({time.monotonic() - began:.2f} s)")
        return 0
    click.echo(f"kdns: {_missing(target, outcome, whom, timeout)}", err=True)
    return 1


def _there(target: Target, outcome: Outcome) -> str:
    found = f"{outcome.name} is {', '.join(outcome.addresses)}"
    if not target.port:
        return found
    if target.udp and not outcome.connected:
        return f"{found}; nothing refuses datagrams to port {target.port}"
    return f"{found}; {outcome.connected} {'answers' if target.udp else 'connects'}"


def _missing(target: Target, outcome: Outcome, whom: Server, timeout: float) -> str:
    what = f"{target.name}:{target.port}" if target.port else target.name
    found = f"; {outcome.name} is {', '.join(outcome.addresses)}" if outcome.addresses else ""
    asked = f" (asked {whom})" if not outcome.addresses else ""
    why = "; ".join(outcome.why)
    return f"{what} is not there after {timeout:g} s{found}: {why}{asked}"


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


# --- whom to ask ----------------------------------------------------------------------------


def _status_of(control: str) -> Any:
    """Return what asks a running kdns for its status. One that was named must be there."""
    path = find_control(control)
    if path is None:
        return lambda: None
    client = ControlClient(path, STATUS_TIMEOUT)
    if control:
        client.get(STATUS)

    def status() -> dict[str, Any] | None:
        try:
            found = client.get(STATUS)
        except NoControl:
            return None
        return found if isinstance(found, dict) else None

    return status


def _server(
    address: str, port: int, search: tuple[str, ...], status: dict[str, Any] | None
) -> tuple[Server, tuple[str, ...]]:
    """Return whom to ask, and the search list."""
    if address:
        return Server(address, port), search_path(search or (NAMESPACE,))
    places = (status or {}).get("dns") or ()
    if places:
        host, _, number = str(places[0]).rpartition(":")
        return Server(host.strip("[]"), int(number)), search_path(search or (NAMESPACE,))
    return Server(first_nameserver(), port), search_path(search) or _search_list()


def _search_list(path: str = RESOLV_CONF) -> tuple[str, ...]:
    """Return the search list of resolv.conf; the last line that has one counts
    (resolv.conf(5))."""
    found: tuple[str, ...] = ()
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    for line in text.splitlines():
        words = line.split()
        if words and words[0] in ("search", "domain"):
            found = tuple(word.rstrip(".") for word in words[1:] if word != ".")
    return found
