"""Waiting until a name resolves and connects; where it does not, why not.

Decides what counts as there: the first name of the search list that has addresses, and one of
them that takes a connection. Blocking; the clock and the sleep are given.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kdns.dns import types as t
from kdns.dns.message import Message
from kdns.dns.name import render_name
from kdns.server.client import NoAnswer, Server, ask

FIRST_PAUSE, LAST_PAUSE = 0.05, 1.0  # seconds between two tries; each is half as long again
ASK_TIMEOUT = 2.0
CONNECT_TIMEOUT = 2.0
MOST_REASONS = 3
UDP_LISTEN = 0.2  # seconds in which a refusal of a datagram would come back
EDE = 15  # the EDNS option of RFC 8914
FAMILIES = {t.A: socket.AF_INET, t.AAAA: socket.AF_INET6}


@dataclass(frozen=True, slots=True)
class Target:
    """What is waited for. port 0: only that it resolves."""

    name: str
    port: int = 0
    udp: bool = False


@dataclass(slots=True)
class Outcome:
    """How it ended. name -- the candidate that has addresses; why -- what stood in the way,
    seen last: one line a point, empty where nothing did"""

    name: str = ""
    addresses: list[str] = field(default_factory=list)
    connected: str = ""
    why: list[str] = field(default_factory=list)

    @property
    def is_there(self) -> bool:
        return not self.why


def parse_target(text: str, udp: bool = False) -> Target:
    """Return what NAME[:PORT] stands for; an IPv6 address with a port is in brackets. Raises
    ValueError."""
    name, colon, port = text.rpartition(":")
    if text.startswith("[") and text.endswith("]"):
        return Target(text[1:-1], 0, udp)
    if not colon or (":" in name and not name.startswith("[")):
        return Target(text, 0, udp)
    if not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError(f"'{port}' is not a port: NAME:PORT takes a number from 1 to 65535")
    if not name:
        raise ValueError(f"'{text}' has no name: NAME:PORT")
    return Target(name.strip("[]"), int(port), udp)


def wait(
    target: Target,
    server: Server,
    names: Sequence[bytes],
    timeout: float,
    *,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
    status: Callable[[], dict[str, Any] | None] = lambda: None,
) -> Outcome:
    """Try until it is there, at least once, and `timeout` seconds at most.

    names  -- the candidates of the search list; none: the target is an address
    status -- what a running kdns says of itself (/v1/status), or None
    """
    until = clock() + timeout
    pause = FIRST_PAUSE
    while True:
        outcome = attempt(target, server, names, lambda: max(0.05, until - clock()), status)
        left = until - clock()
        if outcome.is_there or left <= 0:
            return outcome
        sleep(min(pause, left))
        pause = min(pause * 1.5, LAST_PAUSE)


def attempt(
    target: Target,
    server: Server,
    names: Sequence[bytes],
    left: Callable[[], float],
    status: Callable[[], dict[str, Any] | None],
) -> Outcome:
    """Try once. left -- seconds that there still are"""
    outcome = Outcome()
    if names:
        _resolve(outcome, server, names, left)
    else:
        outcome.name, outcome.addresses = target.name, [target.name]
    if outcome.why or not target.port:
        return outcome
    if target.udp:
        _send(outcome, target.port)
        known = status()
        # Where nobody forwards, a datagram that is not refused says nothing of it.
        if outcome.why or (known or {}).get("mode") != "none":
            outcome.why += _unprogrammed(outcome.name, known)
        return outcome
    for address in outcome.addresses:
        why = _connect(address, target.port, min(CONNECT_TIMEOUT, left()))
        if not why:
            outcome.connected, outcome.why = place(address, target.port), []
            return outcome
        outcome.why.append(why)
    outcome.why += _unprogrammed(outcome.name, status())
    return outcome


def place(address: str, port: int) -> str:
    """Return ADDRESS:PORT as people write it."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


# --- names ----------------------------------------------------------------------------------


def _resolve(
    outcome: Outcome, server: Server, names: Sequence[bytes], left: Callable[[], float]
) -> None:
    """Find the first candidate with addresses, or say what was answered instead."""
    seen: list[tuple[bytes, Message]] = []
    for name in names:
        for qtype in FAMILIES:
            try:
                message = ask(
                    server, name, qtype, timeout=min(ASK_TIMEOUT, left()), tries=1
                ).message
            except NoAnswer as e:
                outcome.why = [str(e)]
                return
            seen.append((name, message))
            outcome.addresses += _addresses(message)
        if outcome.addresses:
            outcome.name = render_name(name)
            return
    outcome.why = _denied(seen)


def _addresses(message: Message) -> list[str]:
    return [
        str(ipaddress.ip_address(rr.rdata))
        for rr in message.answer
        if rr.type in FAMILIES and len(rr.rdata) in (4, 16)
    ]


def _denied(seen: Sequence[tuple[bytes, Message]]) -> list[str]:
    """Return what stands in the way: a server's failure, else that a name is there and has no
    address, else that none is there."""

    def rank(message: Message) -> int:
        return 2 if message.rcode == t.NXDOMAIN else 1 if message.rcode == t.NOERROR else 0

    least = min(rank(message) for _, message in seen)
    chosen = [(name, message) for name, message in seen if rank(message) == least]
    name, message = next((one for one in chosen if _reasons(one[1])), chosen[0])
    shown = render_name(name)
    if least == 2:
        text = f"{shown} does not exist (NXDOMAIN)"
        others = len({one for one, _ in chosen}) - 1
        if others:
            text += f", nor {'do' if others > 1 else 'does'} {others} more of the search list"
    elif least == 1:
        text = f"{shown} is there and has no address (NOERROR without answers)"
    else:
        text = f"{shown}: the server answers {t.rcode_name(message.rcode)}"
    # What the server says of the other candidates may be what helps: the nearest names.
    reasons = [*_reasons(message), *(one for _, other in seen for one in _reasons(other))]
    return [text, *list(dict.fromkeys(reasons))[:MOST_REASONS]]


def _reasons(message: Message) -> list[str]:
    """Return the texts of Extended DNS Errors (RFC 8914)."""
    options = message.edns.options if message.edns is not None else ()
    return [
        text
        for code, octets in options
        if code == EDE and (text := octets[2:].decode("utf-8", "replace").rstrip("\0"))
    ]


# --- connections ----------------------------------------------------------------------------


def _connect(address: str, port: int, timeout: float) -> str:
    """Return why no connection comes about; "" if one does."""
    try:
        with socket.create_connection((address, port), timeout=timeout):
            return ""
    except OSError as e:
        return f"{place(address, port)} {_refusal(e, timeout)}"


def _send(outcome: Outcome, port: int) -> None:
    """Send an empty datagram to each address: that nobody takes it is told by the network at
    times, that somebody does never."""
    for address in outcome.addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.settimeout(UDP_LISTEN)
            try:
                sock.connect((address, port))
                sock.send(b"")
                sock.recv(1)
                outcome.connected = place(address, port)
            except TimeoutError:
                pass  # nobody refuses it
            except OSError as e:
                outcome.why.append(f"{place(address, port)} {_refusal(e, UDP_LISTEN)}")
                continue
            outcome.why = []
            return


_REFUSALS = {
    errno.ECONNREFUSED: "refuses the connection: nobody listens there, or the Service has no"
                        " ready endpoint",
    errno.EHOSTUNREACH: "cannot be reached (no route to host)",
    errno.ENETUNREACH: "cannot be reached (no route to its network)",
    errno.ECONNRESET: "ends the connection at once",
}  # fmt: skip


def _refusal(error: OSError, timeout: float) -> str:
    if isinstance(error, TimeoutError):
        return f"does not answer within {timeout:.2g} s: packets to it are lost"
    return _REFUSALS.get(error.errno or 0) or f"fails: {os.strerror(error.errno or 0)}"


def _unprogrammed(name: str, status: dict[str, Any] | None) -> list[str]:
    """Return what a running kdns knows of the rules that should forward there."""
    if not status:
        return []
    if status.get("mode") == "none":
        return ["kdns forwards nothing here (--proxy-mode none): ClusterIPs have names only"]
    labels = name.split(".")
    if len(labels) < 3 or labels[2] != "svc":
        return []
    key = f"{labels[1]}/{labels[0]}"
    gate = status.get("gate") or {}
    for one in gate.get("waiting") or ():
        if one.get("service") == key:
            return [f"the rules of Service {key} are being written"]
    if key in (gate.get("published_unprogrammed") or ()):
        return [f"the rules of Service {key} are not in the kernel: the gate has opened"]
    return []
