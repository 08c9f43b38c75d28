"""The kernel's settings that forwarding needs: conntrack's size and time-outs, route_localnet.

Decides the values from what the operator asked for (reference 1.9, 3.3) and writes those that
differ. A setting that may not be written is no reason to stop: it is skipped, and told with
its path and reason. When and whether to do it at all is the caller's.
"""

from __future__ import annotations

import errno
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

log = logging.getLogger("kdns.sysctl")

# No more flows than this are asked for, however many cores there are: they take 256 octets of
# kernel memory each.
MOST_FLOWS = 1 << 20
FLOWS_PER_BUCKET = 4

CONNTRACK = "proc/sys/net/netfilter"
FLOWS = f"{CONNTRACK}/nf_conntrack_max"
TCP_BE_LIBERAL = f"{CONNTRACK}/nf_conntrack_tcp_be_liberal"
BUCKETS = "sys/module/nf_conntrack/parameters/hashsize"
TW_REUSE = "proc/sys/net/ipv4/tcp_tw_reuse"
ROUTE_LOCALNET = "proc/sys/net/ipv4/conf/all/route_localnet"


@dataclass(frozen=True, slots=True)
class ConntrackSettings:
    """What the operator asks of connection tracking; 0 leaves a setting as the node has it.

    max_per_core, min -- flows tracked at most, for each core and for all; max_per_core 0
                         leaves the size alone, whatever min is
    tcp_established, tcp_close_wait, udp, udp_stream -- time-outs in seconds
    tcp_be_liberal    -- do not call a TCP packet outside its window invalid; False leaves it
    """

    max_per_core: int = 32768
    min: int = 131072
    tcp_established: int = 86400
    tcp_close_wait: int = 3600
    tcp_be_liberal: bool = False
    udp: int = 0
    udp_stream: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one setting.

    path   -- its file
    found  -- its value before; None if it could not be read
    state  -- kept: it was right; written; refused, for `reason`
    """

    path: str
    wanted: int
    found: int | None
    state: Literal["kept", "written", "refused"]
    reason: str = ""

    def __str__(self) -> str:
        if self.state == "refused":
            return f"{self.path} is not set to {self.wanted}: {self.reason}"
        if self.state == "kept":
            return f"{self.path} is {self.found}"
        return f"{self.path} set to {self.wanted}, was {self.found}"


def flows_wanted(settings: ConntrackSettings, cores: int) -> int:
    """Return how many flows the kernel shall track; 0: leave it alone."""
    if settings.max_per_core <= 0:
        return 0
    return max(settings.min, min(settings.max_per_core * cores, MOST_FLOWS))


def apply_conntrack(
    settings: ConntrackSettings, cores: int | None = None, root: Path = Path("/")
) -> list[Outcome]:
    """Write the settings that differ; return what became of each one asked for.

    cores -- None: those this process may run on
    root  -- the folder that holds proc/sys and sys
    """
    done = []
    flows = flows_wanted(settings, cores or len(os.sched_getaffinity(0)))
    if flows:
        done.append(put(root, FLOWS, flows))
        # Otherwise long chains of flows share a bucket and each packet walks one.
        done.append(put(root, BUCKETS, flows // FLOWS_PER_BUCKET, at_least=True))
    for name, seconds in (
        ("nf_conntrack_tcp_timeout_established", settings.tcp_established),
        ("nf_conntrack_tcp_timeout_close_wait", settings.tcp_close_wait),
        ("nf_conntrack_udp_timeout", settings.udp),
        ("nf_conntrack_udp_timeout_stream", settings.udp_stream),
    ):
        if seconds > 0:
            done.append(put(root, f"{CONNTRACK}/{name}", seconds))
    if settings.tcp_be_liberal:
        done.append(put(root, TCP_BE_LIBERAL, 1))
    return done


def apply_route_localnet(root: Path = Path("/")) -> Outcome:
    """Let packets to 127.0.0.0/8 be sent on after DNAT, as node ports on localhost need it.

    Whoever turns this on guards against such packets from outside (CVE-2020-8558).
    """
    return put(root, ROUTE_LOCALNET, 1)


def apply_tw_reuse(root: Path = Path("/")) -> Outcome:
    """Let a port of a connection that has just ended be taken again: who relays connections
    has them all, and would run out of them at 500 new ones a second to one endpoint."""
    return put(root, TW_REUSE, 1)


def is_tcp_liberal(root: Path = Path("/")) -> bool:
    """Return True if TCP packets outside their window are not called invalid; False if unknown."""
    try:
        return _read(root / TCP_BE_LIBERAL) != 0
    except (OSError, ValueError):
        return False


def put(root: Path, name: str, wanted: int, at_least: bool = False) -> Outcome:
    """Write one setting if it differs; at_least: if it is smaller. Tell what was done."""
    outcome = _change(root / name, wanted, at_least)
    if outcome.state == "refused":
        log.warning("%s", outcome)
    elif outcome.state == "written":
        log.info("%s", outcome)
    return outcome


def _change(path: Path, wanted: int, at_least: bool) -> Outcome:
    found: int | None = None
    try:
        found = _read(path)
        if found == wanted or (at_least and found > wanted):
            return Outcome(str(path), wanted, found, "kept")
        path.write_text(f"{wanted}\n", encoding="ascii")
        # The kernel takes a value that is out of its range for the nearest one, silently.
        now = _read(path)
    except OSError as e:
        return Outcome(str(path), wanted, found, "refused", _reason(e))
    except ValueError:
        return Outcome(str(path), wanted, found, "refused", "it holds no number")
    if now != wanted and not (at_least and now > wanted):
        return Outcome(str(path), wanted, found, "refused", f"the kernel made it {now}")
    return Outcome(str(path), wanted, found, "written")


def _read(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))


def _reason(error: OSError) -> str:
    """Return why a setting cannot be read or written, and what it would take."""
    match error.errno:
        case errno.ENOENT:
            return "there is no such file: is the kernel module nf_conntrack loaded?"
        case errno.EROFS:
            return "it is mounted read-only: it takes a privileged container, or set it on the node"
        case errno.EACCES | errno.EPERM | errno.EOPNOTSUPP:
            return f"{os.strerror(error.errno)}: it takes root, outside of a network namespace"
        case _:
            return error.strerror or str(error)
