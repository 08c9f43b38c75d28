"""The ipsets of a node, through the program ipset: reading them and changing many at once.

What shall be in them is proxy/ipvs.py's. The program and not netlink: it knows which revision
of each type a kernel has, and 10,000 members are one run of it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

from kdns.errors import ApplyError
from kdns.kernel.iptables import respelt
from kdns.kernel.programs import path_of, run_program, which
from kdns.proxy.ipvs import SETS, create_line, room_for, set_name
from kdns.proxy.options import Family

LEAST_VERSION = (6, 0)
TIMEOUT = 60.0
SPARE = "KUBE-SPARE"  # a set is filled under this name before it takes another's place

_VERSION = re.compile(r"v(\d+)\.(\d+)")
_LINE = re.compile(r"Error in line (\d+): ")
# For each name of a protocol the program reads /etc/protocols: half of its time.
_NUMBERS: Mapping[str, str] = {",tcp:": ",6:", ",udp:": ",17:", ",sctp:": ",132:"}
_PROTOCOL = re.compile("|".join(_NUMBERS))


@dataclass(slots=True)
class HeldSet:
    """A set in the kernel. room -- members it can hold; 0: as many as there can be"""

    kind: str
    room: int = 0
    members: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Ipset:
    """The program, run behind `prefix`."""

    prefix: tuple[str, ...] = ()

    async def restore(self, text: str) -> None:
        """Carry out the lines of `text`. Raises ApplyError with the one that was not taken."""
        if not text:
            return
        argv = (*self.prefix, path_of("ipset"), "restore", "-exist")
        told = _PROTOCOL.sub(_by_number, text)
        status, output, stderr = await run_program("ipset", argv, TIMEOUT, told)
        output.close()
        if status != 0:
            at = _LINE.search(stderr)
            lines = text.splitlines()
            line = lines[int(at[1]) - 1] if at and int(at[1]) <= len(lines) else ""
            said = " ".join(stderr.split()).removeprefix("ipset v").partition(": ")[2]
            raise ApplyError("ipset", f"{said or 'failed'}{line and f'; its input: {line}'}")

    async def held(self, family: Family) -> dict[str, HeldSet]:
        """Return our sets that there are, by their names in the kernel."""
        argv = (*self.prefix, path_of("ipset"), "save")
        status, output, stderr = await run_program("ipset", argv, TIMEOUT)
        with output:
            if status != 0:
                raise ApplyError("ipset", " ".join(stderr.split()) or "failed and said nothing")
            return await asyncio.to_thread(parse_sets, output, family)


async def find_ipset(prefix: Sequence[str] = ()) -> Ipset:
    """Return the program. Raises ApplyError where it is missing or too old."""
    if which("ipset") is None:
        raise ApplyError(
            "ipset", "not found in PATH: mode ipvs needs it; install the package ipset"
        )
    status, output, stderr = await run_program(
        "ipset", (*prefix, path_of("ipset"), "--version"), TIMEOUT
    )
    with output:
        text = output.read().decode("utf-8", "replace")
    found = _VERSION.search(text)
    if found is None:
        # It asks the kernel too, and says so where that has no ipsets.
        raise ApplyError("ipset", " ".join((stderr or text).split()) or f"left with {status}")
    if (int(found[1]), int(found[2])) < LEAST_VERSION:
        raise ApplyError("ipset", f"version {found[0]} is older than 6.0, the least that is needed")
    return Ipset(tuple(prefix))


def parse_sets(lines: BinaryIO | Iterable[bytes], family: Family) -> dict[str, HeldSet]:
    """Read what `ipset save` prints of our sets in `family`."""
    ours = {set_name(name, family) for name in SETS} | {set_name(SPARE, family)}
    found: dict[str, HeldSet] = {}
    for line in lines:
        words = line.decode("utf-8", "surrogateescape").split()
        if len(words) < 3 or words[1] not in ours:
            continue
        if words[0] == "create":
            room = int(words[words.index("maxelem") + 1]) if "maxelem" in words else 0
            found[words[1]] = HeldSet(words[2], room)
        elif words[0] == "add" and words[1] in found:
            text = respelt(words[2]) if family == 6 else words[2]
            found[words[1]].members.add(text)
    return found


@dataclass(slots=True)
class Plan:
    """What to tell ipset: first `before`, which adds; when nothing needs them, `after` takes
    away.

    notes -- what an operator should know
    room  -- set, named as for IPv4 -> members it can hold then
    """

    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    room: dict[str, int] = field(default_factory=dict)


def plan_sets(
    wanted: Mapping[str, Iterable[str]], held: Mapping[str, HeldSet], family: Family
) -> Plan:
    """Return what leads from the sets held to those wanted.

    A set too small for what is wanted, or of another type, is filled under another name and
    then takes its place at once: rules that look into it never meet an empty one.
    """
    plan = Plan()
    spare = set_name(SPARE, family)
    if spare in held:  # left by somebody who was stopped in between
        plan.before.append(f"destroy {spare}\n")
    for short, kind in SETS.items():
        name, members = set_name(short, family), set(wanted.get(short, ()))
        there = held.get(name)
        room = room_for(len(members))  # of a bitmap: one for each port
        plan.room[short] = room
        if there is None:
            plan.before.append(create_line(name, kind, family, room))
            plan.before += _lines("add", name, members)
            continue
        needed = max(len(members), len(there.members | members) if there.kind == kind else 0)
        if there.kind == kind and (not there.room or needed <= there.room):
            plan.room[short] = there.room or room
            plan.before += _lines("add", name, members - there.members)
            plan.after += _lines("del", name, there.members - members)
            continue
        if there.kind == kind:
            plan.notes.append(
                f"set {name} is full: it holds {there.room} members at most; now {room}"
            )
        else:
            plan.notes.append(f"set {name} was of type {there.kind}: now {kind}")
        plan.before.append(create_line(spare, kind, family, room))
        plan.before += _lines("add", spare, members)
        plan.before.append(f"swap {spare} {name}\n")
        plan.before.append(f"destroy {spare}\n")
    return plan


def _by_number(name: re.Match[str]) -> str:
    return _NUMBERS[name[0]]


def _lines(verb: str, name: str, members: Iterable[str]) -> Iterator[str]:
    return (f"{verb} {name} {text}\n" for text in sorted(members))
