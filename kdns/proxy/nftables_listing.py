"""What `nft list table` prints, read, and held against what is wanted.

Knows the words of nft, of any version; what they should say is nftables_rules.py's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from kdns.proxy.nftables_rules import AFFINITY, TABLE, Chain, Definition


@dataclass(slots=True)
class Held:
    """One table.

    present  -- it is there
    sets     -- sets and maps -> kind and definition
    elements -- of each of those -> key -> what follows it. Those of affinity sets, which the
                kernel fills by itself, are left out
    """

    present: bool = False
    sets: dict[str, Definition] = field(default_factory=dict)
    elements: dict[str, Mapping[str, str]] = field(default_factory=dict)
    chains: dict[str, Chain] = field(default_factory=dict)


# --- reading --------------------------------------------------------------------------------


def parse_table(lines: Iterable[str], family_word: str) -> Held:
    """Read what `nft list table` or `list ruleset` prints, keeping our table of that family."""
    held = Held()
    ours = f"table {family_word} {TABLE} {{"
    stripped = (line.strip() for line in lines)
    for line in stripped:
        if line == ours:
            held.present = True
            _read_table(stripped, held)
    return held


def _read_table(lines: Iterator[str], held: Held) -> None:
    for line in lines:
        if line == "}":
            return
        if not line.endswith("{"):
            continue
        kind, _, name = line[:-1].strip().partition(" ")
        if kind == "chain":
            held.chains[name] = _read_chain(lines)
        elif kind in ("set", "map"):
            definition, elements = _read_set(lines, skip=name.startswith(AFFINITY))
            held.sets[name] = (kind, definition)
            held.elements[name] = elements
        else:
            _skip(lines)


def _skip(lines: Iterator[str]) -> None:
    depth = 1
    for line in lines:
        depth += line.endswith("{") - (line == "}")
        if not depth:
            return


def _read_chain(lines: Iterator[str]) -> Chain:
    head: list[str] = []
    rules: list[str] = []
    for line in lines:
        if line == "}":
            break
        if not rules and line.startswith(("type ", "comment ")):
            head.append(line)
        elif line:
            rules.append(respelt(line))
    return Chain(tuple(rules), tuple(head))


def _read_set(lines: Iterator[str], skip: bool) -> tuple[tuple[str, ...], dict[str, str]]:
    definition: list[str] = []
    elements: dict[str, str] = {}
    for line in lines:
        if line == "}":
            break
        if line.startswith("elements = {"):
            text = line.removeprefix("elements = {")
            for part in _until_brace(text, lines):
                if not skip:
                    elements.update(map(_element, _split(part)))
        elif line:
            definition.append(line)
    return tuple(definition), elements


def _until_brace(text: str, lines: Iterator[str]) -> Iterator[str]:
    while not text.endswith("}"):
        yield text
        text = next(lines, "}")
    yield text[:-1]


def _split(part: str) -> Iterator[str]:
    for one in part.split(", "):
        if text := one.strip().rstrip(","):
            yield text


def _element(text: str) -> tuple[str, str]:
    """Split at the comment or the verdict, whichever comes first."""
    ends = [at for sign in (" comment ", " : ") if (at := text.find(sign)) >= 0]
    end = min(ends, default=len(text))
    return respelt(text[:end]), text[end:]


# Without /etc/protocols nft prints numbers.
_NUMBERS: Final = {"6": "tcp", "17": "udp", "132": "sctp"}
_PROTOCOL: Final = re.compile(r"(^|l4proto | \. )(6|17|132)(?= |$)(?! drop)")
_DOTTED: Final = re.compile(r"::(?:ffff:)?(?:[0-9]{1,3}\.){3}[0-9]{1,3}")
_NUMERIC: Final = re.compile(r"(^|l4proto | \. )(?:6|17|132) ")
_SET: Final = re.compile(r"saddr != (\{ (.*) \}) drop")


def respelt(text: str) -> str:
    """Return a rule or a key in our own words, where versions of nft and libraries differ."""
    if _NUMERIC.search(text):
        text = _PROTOCOL.sub(lambda m: m[1] + _NUMBERS[m[2]], text, count=1)
    if "::" in text and "." in text:
        # What begins with 80 bits of 0 the C library prints with a dotted end.
        text = _DOTTED.sub(_undotted, text)
    if (ranges := _SET.search(text)) is not None:
        return f"{text[: ranges.start(1)]}{_sorted(ranges[2])}{text[ranges.end(1) :]}"
    return text


def _undotted(match: re.Match[str]) -> str:
    head, _, dotted = match[0].rpartition(":")
    number = int(IPv4Address(dotted)) | (0xFFFF << 32 if "ffff" in head else 0)
    return str(IPv6Address(number))


def _sorted(ranges: str) -> str:
    """Return an anonymous set in a fixed order; one of one element is that."""
    those = sorted(ranges.split(", "))
    return those[0] if len(those) == 1 else f"{{ {', '.join(those)} }}"


# --- comparing ------------------------------------------------------------------------------

_HOOK: Final = re.compile(
    r"type (\w+) hook (\w+) (?:device \S+ )?priority (-?\w+)(?: ([+-]) (\d+))?; policy (\w+);"
)
_PRIORITIES: Final = {
    "raw": -300, "mangle": -150, "dstnat": -100, "filter": 0, "security": 50, "srcnat": 100,
}  # fmt: skip


def hook_of(chain: Chain) -> tuple[str, str, int, str] | None:
    """Return type, hook, priority and policy of a base chain; None if it is none."""
    for line in chain.head:
        if (found := _HOOK.match(line)) is not None:
            kind, hook, name, sign, more, policy = found.groups()
            base = _PRIORITIES[name] if name in _PRIORITIES else int(name)
            return kind, hook, base + int(f"{sign or '+'}{more or 0}"), policy
    return None


def same_set(found: Definition, wanted: Definition) -> bool:
    """Say whether a set does what another does; a version may print more of it."""
    essential = [line for line in wanted[1] if line.startswith(("type ", "timeout "))]
    return found[0] == wanted[0] and all(line in found[1] for line in essential)


def same_chain(found: Chain, wanted: Chain, exact: bool) -> bool:
    """Say whether a chain has the rules wanted. exact -- word by word; else where they lead"""
    if exact:
        return found.rules == wanted.rules or found.rules == tuple(map(respelt, wanted.rules))
    return len(found.rules) == len(wanted.rules) and all(
        leads_to(one) == leads_to(other)
        for one, other in zip(found.rules, wanted.rules, strict=True)
    )


_LEADS: Final = re.compile(r"(?:goto|jump|@|dnat(?: ip6?)? to) ?(\S+)|\b(drop|reject|masquerade)\b")


def leads_to(rule: str) -> tuple[str, ...]:
    """Return the chains, sets, endpoints and verdicts that a rule names."""
    return tuple(one[1] or one[2] for one in _LEADS.finditer(rule))


def is_built_alike(held: Held, wanted: Held) -> bool:
    """Say whether the fixed sets and the base chains there are of the kind wanted: those cannot
    be changed, only made anew."""
    return all(
        same_set(held.sets[name], one)
        for name, one in wanted.sets.items()
        if name in held.sets and not name.startswith(AFFINITY)
    ) and all(
        hook_of(held.chains[name]) == hook_of(one)
        for name, one in wanted.chains.items()
        if name in held.chains
    )


def find_differences(held: Held, wanted: Held, exact: bool = True) -> Iterator[str]:
    """Yield what is not as wanted, a line for each chain, set or element."""
    if not held.present:
        yield "the table is gone"
        return
    if not is_built_alike(held, wanted):
        yield "a base chain or a set is of another kind"
    for name in wanted.sets:
        if name not in held.sets:
            yield f"set {name}: gone"
        elif not same_set(held.sets[name], wanted.sets[name]):
            yield f"set {name}: is another"
    for name in held.sets.keys() - wanted.sets.keys():
        yield f"set {name}: not wanted"
    for name, elements in wanted.elements.items():
        yield from _differing(name, held.elements.get(name, {}), elements)
    for name, chain in wanted.chains.items():
        if name not in held.chains:
            yield f"chain {name}: gone"
        elif not same_chain(held.chains[name], chain, exact):
            yield f"chain {name}: has other rules"
    for name, chain in held.chains.items():
        # An empty one is on its way out.
        if name not in wanted.chains and (chain.rules or chain.head):
            yield f"chain {name}: not wanted"


def _differing(name: str, found: Mapping[str, str], wanted: Mapping[str, str]) -> Iterator[str]:
    if found == wanted:
        return
    for key, tail in wanted.items():
        if key not in found:
            yield f"{name}: no {key}"
        elif found[key] != tail:
            yield f"{name}: {key} is another"
    for key in found.keys() - wanted.keys():
        yield f"{name}: {key} not wanted"
