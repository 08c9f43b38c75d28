"""iptables rule text -> tables, chains and rules: what iptables-save prints and
iptables-restore takes.

Decides what a line does to the tables, and refuses what iptables would refuse. What a rule's
own words mean is rule.py's; what becomes of a packet is packet.py's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from kdns.errors import ConfigError, Problem
from kdns.proxy.matches import Address, Match, NotUnderstood, Ports
from kdns.proxy.rule import (
    ALL_ONES,
    BUILT_IN,
    FamilySeen,
    Jump,
    Rule,
    Unknown,
    Wrong,
    comment_of,
    parse_rule,
    quoted,
    words_of,
)

MAX_CHAIN_NAME = 28  # XT_EXTENSION_MAXNAMELEN without its NUL
# Chains below each other. nf_tables takes 16 (NFT_JUMP_STACK_SIZE), legacy more; this is for
# our own recursion.
MAX_DEPTH = 64


class Chain:
    """The rules of one chain in order. policy -- of a built-in chain, else ""."""

    __slots__ = ("_by_address", "_by_port", "_other", "name", "policy", "rules")

    def __init__(self, name: str, policy: str, rules: Sequence[Rule]) -> None:
        self.name = name
        self.policy = policy
        self.rules = tuple(rules)
        self._by_address: dict[int, list[int]] | None = None
        self._by_port: dict[int, list[int]] = {}
        self._other: list[int] = []

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Chain):
            return NotImplemented
        return (self.name, self.policy, self.rules) == (other.name, other.policy, other.rules)

    __hash__ = None  # type: ignore[assignment]

    def candidates(self, address: int, port: int) -> Sequence[int]:
        """Return the numbers of the rules that a packet to address:port may fit, from 0.

        A chain of 10,000 Services is passed by looking at a few of its rules.
        """
        if self._by_address is None:
            self._by_address = self._index()
        by_address, by_port = self._by_address.get(address), self._by_port.get(port)
        if by_address is None and by_port is None:
            return self._other
        return sorted([*(by_address or ()), *(by_port or ()), *self._other])

    def _index(self) -> dict[int, list[int]]:
        by_address: dict[int, list[int]] = {}
        for number, rule in enumerate(self.rules):
            address = next((m for m in rule.matches if _is_one_address(m)), None)
            port = next((m for m in rule.matches if _is_one_port(m)), None)
            if isinstance(address, Address):
                by_address.setdefault(address.network, []).append(number)
            elif isinstance(port, Ports):
                self._by_port.setdefault(port.ranges[0][0], []).append(number)
            else:
                self._other.append(number)
        return by_address


def _is_one_address(match: Match) -> bool:
    return (
        isinstance(match, Address)
        and not match.of_source
        and not match.negated
        and match.mask in (ALL_ONES, (1 << 128) - 1)
    )


def _is_one_port(match: Match) -> bool:
    return (
        isinstance(match, Ports)
        and match.of_destination
        and not match.of_source
        and not match.negated
        and len(match.ranges) == 1
        and match.ranges[0][0] == match.ranges[0][1]
    )


@dataclass(frozen=True, slots=True)
class Ruleset:
    """All tables of one family.

    family   -- 4 or 6; None if no rule shows it
    tables   -- table -> chain -> Chain
    problems -- what was not understood, where reading was told to go on (strict=False)
    """

    family: Literal[4, 6] | None
    tables: Mapping[str, Mapping[str, Chain]]
    problems: tuple[Problem, ...] = ()


def render_ruleset(ruleset: Ruleset) -> str:
    """Return the rules as text that parse_rules() and iptables-restore read again."""
    lines: list[str] = []
    for table, chains in ruleset.tables.items():
        lines.append(f"*{table}")
        lines += [f":{chain.name} {chain.policy or '-'} [0:0]" for chain in chains.values()]
        for chain in chains.values():
            lines += [f"-A {chain.name} {rule.text}".rstrip() for rule in chain.rules]
        lines.append("COMMIT")
    return "".join(f"{line}\n" for line in lines)


def parse_rules(
    text: str, *, file: str = "rules", onto: Ruleset | None = None, strict: bool = True
) -> Ruleset:
    """Read rules as iptables-save prints them or iptables-restore takes them.

    onto   -- what the kernel holds already, for a text that is given with --noflush
    strict -- False: a rule with a match or target that kdns does not know is kept, and noted
              in `problems`; for tables that other programs write in as well

    Raises ConfigError with every line that is wrong or not understood.
    """
    reader = _Reader(file, onto, strict)
    for number, line in enumerate(text.splitlines(), 1):
        reader.read(number, line.strip())
    return reader.finish()


class _Reader:
    """The tables while they are read."""

    def __init__(self, file: str, onto: Ruleset | None, strict: bool) -> None:
        self.file = file
        self.strict = strict
        self.noflush = onto is not None
        self.tables: dict[str, dict[str, _Chain]] = {}
        self.table = ""
        self.wrong: list[Problem] = []
        self.noted: list[Problem] = []
        self.family = FamilySeen()
        self.number = 0
        if onto is not None:
            self.family.version = onto.family
            self.noted += onto.problems
            for table, chains in onto.tables.items():
                self.tables[table] = {
                    c.name: _Chain(c.policy, list(c.rules)) for c in chains.values()
                }

    def read(self, number: int, line: str) -> None:
        """Take in one line, whose number counts from 1."""
        self.number = number
        if not line or line.startswith("#"):
            return
        try:
            if line[0] == "*":
                self._open(line[1:].strip())
            elif not self.table:
                raise Wrong(f"{line[:20]!r} outside of a table: write *filter or *nat above")
            elif line == "COMMIT":
                self._commit()
            elif line[0] == ":":
                self._chain_line(line[1:].split())
            else:
                self._command(words_of(line), line)
        except Wrong as error:
            self.wrong.append(Problem(self.file, number, str(error)))

    def finish(self) -> Ruleset:
        """Return what was read. Raises ConfigError."""
        if self.table:
            self.wrong.append(
                Problem(self.file, self.number, f"table {self.table} has no COMMIT at its end")
            )
        if self.wrong:
            raise ConfigError(self.wrong)
        tables = {
            table: {name: Chain(name, chain.policy, chain.rules) for name, chain in chains.items()}
            for table, chains in self.tables.items()
        }
        return Ruleset(self.family.version, tables, tuple(self.noted))

    def _open(self, table: str) -> None:
        if self.table:
            raise Wrong(f"table {self.table} is still open: write COMMIT first")
        if table not in BUILT_IN:
            raise Wrong(f"no table {table!r}: one of {', '.join(BUILT_IN)}")
        self.table = table
        if table not in self.tables or not self.noflush:
            self.tables[table] = {name: _Chain("ACCEPT", []) for name in BUILT_IN[table]}

    def _commit(self) -> None:
        """Check what the kernel checks when it takes the table over."""
        table, self.table = self.table, ""
        chains = self.tables[table]
        for chain in chains.values():
            for at, rule in enumerate(chain.rules):
                target = rule.target
                if isinstance(target, Jump) and target.chain not in chains:
                    text = (
                        f"no chain {target.chain} in table {table}, and no target known here:"
                        f" declare it with :{target.chain} - [0:0]"
                    )
                    self._note(rule.line, text)
                    chain.rules[at] = replace(
                        rule, matches=(*rule.matches, NotUnderstood(text)), target=None
                    )
        below = {name: _leads_to(chain) for name, chain in chains.items()}
        check_depth(f"table {table}", below)

    def _chain_line(self, words: Sequence[str]) -> None:
        if len(words) not in (2, 3):
            raise Wrong("a chain line is :NAME POLICY [packets:bytes], with - for no policy")
        name, policy = words[0], words[1]
        chains = self.tables[self.table]
        if name in BUILT_IN[self.table]:
            if policy in ("ACCEPT", "DROP"):
                chains[name].policy = policy
            elif policy != "-":
                raise Wrong(f"policy {policy!r} of {name}: ACCEPT or DROP")
        elif policy != "-":
            raise Wrong(f"{name} is not built in, so it has no policy: write - for {policy!r}")
        else:
            self._new(name)

    def _new(self, name: str) -> None:
        """Make a chain; one that is there already is emptied, as --noflush does."""
        if len(name) > MAX_CHAIN_NAME:
            raise Wrong(f"chain name {name} is longer than {MAX_CHAIN_NAME} characters")
        self.tables[self.table][name] = _Chain("", [])

    def _chain(self, name: str) -> _Chain:
        chain = self.tables[self.table].get(name)
        if chain is None:
            raise Wrong(f"no chain {name} in table {self.table}: declare it with :{name} - [0:0]")
        return chain

    def _command(self, words: list[str], line: str) -> None:
        if words[0].startswith("[") and len(words) > 1:
            del words[0]  # counters, of iptables-save -c
            line = line.split(maxsplit=1)[1]
        match words:
            case ["-A" | "--append", name, *spec]:
                text = line.split(maxsplit=2)[2] if spec else ""
                self._chain(name).rules.append(self._rule(spec, text))
            case ["-I" | "--insert", name, number, *spec] if number.isdecimal():
                self._insert(name, int(number), spec)
            case ["-I" | "--insert", name, *spec]:
                self._insert(name, 1, spec)
            case ["-D" | "--delete", name, number] if number.isdecimal():
                rules = self._chain(name).rules
                if not 1 <= int(number) <= len(rules):
                    raise Wrong(f"{name} has no rule {number}: it has {len(rules)}")
                del rules[int(number) - 1]
            case ["-D" | "--delete", name, *spec]:
                rules, rule = self._chain(name).rules, self._rule(spec)
                if rule not in rules:
                    raise Wrong(f"{name} has no such rule to delete")
                rules.remove(rule)
            case ["-N" | "--new-chain", name]:
                if name in self.tables[self.table]:
                    raise Wrong(f"chain {name} is there already")
                self._new(name)
            case ["-F" | "--flush", name]:
                self._chain(name).rules.clear()
            case ["-F" | "--flush"]:
                for chain in self.tables[self.table].values():
                    chain.rules.clear()
            case ["-X" | "--delete-chain", name]:
                self._delete(name)
            case ["-P" | "--policy", name, policy]:
                if name not in BUILT_IN[self.table]:
                    raise Wrong(f"{name} is not built in, so it has no policy")
                self._chain_line((name, policy))
            case _:
                raise Wrong(
                    f"{words[0]!r} is no command known here: one of -A, -I, -D, -N, -F, -X and -P,"
                    " with a chain"
                )

    def _insert(self, name: str, number: int, spec: list[str]) -> None:
        rules = self._chain(name).rules
        if not 1 <= number <= len(rules) + 1:
            raise Wrong(f"no place {number} in {name}: it has {len(rules)} rules")
        rules.insert(number - 1, self._rule(spec))

    def _delete(self, name: str) -> None:
        if name in BUILT_IN[self.table]:
            raise Wrong(f"{name} is built in and cannot be deleted")
        if self._chain(name).rules:
            raise Wrong(f"chain {name} still has rules: empty it first, with :{name} - [0:0]")
        for other, chain in self.tables[self.table].items():
            if any(isinstance(r.target, Jump) and r.target.chain == name for r in chain.rules):
                raise Wrong(f"{other} still jumps to chain {name}")
        del self.tables[self.table][name]

    def _rule(self, words: list[str], text: str = "") -> Rule:
        try:
            return parse_rule(words, self.table, self.family, self.number, text)
        except Unknown as error:
            self._note(self.number, str(error))
            matches = (*self._header(words), NotUnderstood(str(error)))
            return Rule(matches, None, comment_of(words), text or quoted(words), self.number)

    def _header(self, words: list[str]) -> tuple[Match, ...]:
        """Read what stands before a rule's first match: it says at least whom it concerns."""
        end = next((at for at, word in enumerate(words) if word in ("-m", "-j", "-g")), 0)
        try:
            return parse_rule(words[:end], self.table, self.family, self.number).matches
        except Unknown:
            return ()

    def _note(self, line: int, text: str) -> None:
        """Say what is not known here."""
        found = self.wrong if self.strict else self.noted
        found.append(Problem(self.file, line, text, warning=not self.strict))


@dataclass(slots=True)
class _Chain:
    """A chain while it is read."""

    policy: str
    rules: list[Rule]


def _leads_to(chain: _Chain) -> list[str]:
    found = (rule.target.chain for rule in chain.rules if isinstance(rule.target, Jump))
    return [*dict.fromkeys(found)]


def check_depth(where: str, below: Mapping[str, Sequence[str]]) -> None:
    """Refuse loops, and chains too deep below each other.

    below -- chain -> those that its rules lead to. Raises Wrong.
    """
    depth: dict[str, int] = {}  # how many chains lie below; -1 while they are looked at
    for start in below:
        way = [] if start in depth else [(start, list(below[start]))]
        while way:
            name, rest = way[-1]
            depth[name] = -1
            if rest:
                nearer = rest.pop()
                if depth.get(nearer) == -1:
                    names = [chain for chain, _ in way]
                    loop = [*names[names.index(nearer) :], nearer]
                    raise Wrong(f"chains of {where} form a loop: {' -> '.join(loop)}")
                if nearer not in depth:
                    way.append((nearer, list(below[nearer])))
                continue
            way.pop()
            depth[name] = 1 + max((depth[chain] for chain in below[name]), default=-1)
            if depth[name] > MAX_DEPTH:
                raise Wrong(f"more than {MAX_DEPTH} chains of {where} below {name}")
