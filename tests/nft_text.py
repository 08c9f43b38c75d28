"""nft text for tests: what a kernel would make of it.

Knows tables, sets, chains and what may not be taken away; what a rule means to a packet is the
business of tests/test_kernel_traffic.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from copy import deepcopy

from kdns.proxy.nftables_listing import Held, leads_to
from kdns.proxy.nftables_rules import AFFINITY, Chain


class Refused(Exception):
    """nft would fail: at which command, and why."""


_NAMED = re.compile(r"(?:goto|jump) (\S+)|@(\S+)")
_COMMAND = re.compile(r"(add|flush|delete) (table|chain|set|map|rule|element) (ip6?) kube-proxy")


class PretendNft:
    """The table of one family, as `nft -f -` changes it, each text as one transaction.

    It refuses what nft and the kernel refuse: to name what is not there, to make what is there
    and is another, to take away what is named or still has rules.
    """

    def __init__(self) -> None:
        self.held = Held()

    def apply(self, text: str) -> None:
        draft = deepcopy(self.held)
        for command in _commands(text):
            try:
                draft = _change(draft, command)
            except (KeyError, ValueError) as error:
                raise Refused(f"{command}: {error!r}") from None
        _check(draft)
        self.held = draft


def _commands(text: str) -> Iterator[str]:
    """Yield each command on one line."""
    lines = iter(text.splitlines())
    for line in lines:
        if line.endswith(" {"):
            parts = [line]
            while (part := next(lines)) != "}":
                parts.append(part)
            line = "\n".join([*parts, "}"])
        yield line


def _change(held: Held, command: str) -> Held:
    match = _COMMAND.match(command)
    if match is None:
        raise ValueError("not understood")
    verb, what, _ = match.groups()
    rest = command[match.end() :].strip()
    if what == "table":
        if verb == "delete":
            if not held.present:
                raise ValueError("no table")
            return Held()
        held.present = True
        return held
    if not held.present:
        raise ValueError("no table")
    name, _, rest = rest.partition(" ")
    body = [one.strip() for one in rest.strip("{} ").split("; ") if one.strip()]
    match verb, what:
        case "add", "chain":
            head = rest.strip("{} ")
            held.chains.setdefault(name, Chain((), (head,) if head else ()))
        case "flush", "chain":
            held.chains[name] = held.chains[name]._replace(rules=())
        case "delete", "chain":
            if held.chains[name].rules:
                raise ValueError("has rules")
            _check_unnamed(held, name)
            del held.chains[name]
        case "add", "rule":
            chain = held.chains[name]
            held.chains[name] = chain._replace(rules=(*chain.rules, rest))
        case "add", "set" | "map":
            definition = (what, tuple(one.rstrip(";") for one in body))
            if held.sets.setdefault(name, definition) != definition:
                raise ValueError("is there, and another")
            held.elements.setdefault(name, {})
        case "delete", "set" | "map":
            _check_unnamed(held, name)
            del held.sets[name], held.elements[name]
        case _, "element":
            _change_elements(held, verb, name, rest)
        case _:
            raise ValueError("not understood")
    return held


def _change_elements(held: Held, verb: str, name: str, rest: str) -> None:
    elements = dict(held.elements[name])
    for line in rest.strip("{}\n").split(",\n"):
        ends = [at for sign in (" comment ", " : ") if (at := line.find(sign)) >= 0]
        key = line[: min(ends, default=len(line))]
        tail = line[len(key) :]
        if verb == "delete":
            del elements[key]
        elif elements.setdefault(key, tail) != tail:
            raise ValueError(f"{key} is there, and another")
    held.elements[name] = elements


def _names(held: Held) -> Iterator[str]:
    for chain in held.chains.values():
        for rule in chain.rules:
            yield from (one[1] or one[2] for one in _NAMED.finditer(rule))
    for name, elements in held.elements.items():
        if not name.startswith(AFFINITY):
            for tail in elements.values():
                yield from (one for one in leads_to(tail) if one not in ("drop", "reject"))


def _check_unnamed(held: Held, name: str) -> None:
    if name in {one.rstrip(",") for one in _names(held)}:
        raise ValueError(f"{name} is in use")


def _check(held: Held) -> None:
    there = held.chains.keys() | held.sets.keys()
    for name in _names(held):
        if name.rstrip(",") not in there:
            raise Refused(f"no {name}")
