"""Text of nftables -> tables, chains, sets and maps: as `nft list ruleset` prints it, and as
`nft -f` takes it from kdns.

Decides what a block or a command does to the tables, and refuses what nft would refuse. What a
rule's own words mean is nftables_words.py's; what becomes of a packet is packet_nftables.py's;
what of our own table differs from what is wanted is nftables_listing.py's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, TypeAlias

from kdns.errors import ConfigError, Problem
from kdns.proxy.matches import Memory, NotUnderstood
from kdns.proxy.nftables_statements import (
    FIELDS,
    Do,
    Led,
    NamedSet,
    Statement,
    VerdictMap,
    names_in,
)
from kdns.proxy.nftables_words import (
    Words,
    elements_of,
    read_destination,
    read_known,
    read_verdict,
    seconds_of,
)
from kdns.proxy.rule import Jump, Rule, Unknown, Wrong
from kdns.proxy.ruleset import check_depth

FAMILIES: Final = ("ip", "ip6", "inet", "arp", "bridge", "netdev")
# Names of priorities (nft(8)).
PRIORITIES: Final[Mapping[str, int]] = {
    "raw": -300, "mangle": -150, "dstnat": -100, "filter": 0, "security": 50, "srcnat": 100,
}  # fmt: skip
HOOKS: Final = ("prerouting", "input", "forward", "output", "postrouting")

Place: TypeAlias = tuple[str, str]  # family and name of a table


@dataclass(frozen=True, slots=True)
class Base:
    """Where a chain is hooked in. hook -- in capitals; kind -- filter, nat or route"""

    kind: str
    hook: str
    priority: int
    drops: bool = False  # its policy


@dataclass(frozen=True, slots=True)
class NftRule:
    """One rule. rule -- for people; its target is that of the last statement"""

    statements: tuple[Statement, ...]
    rule: Rule


@dataclass(slots=True)
class NftChain:
    name: str
    base: Base | None = None
    rules: list[NftRule] = field(default_factory=list)


@dataclass(slots=True)
class NftTable:
    family: str
    name: str
    chains: dict[str, NftChain] = field(default_factory=dict)
    sets: dict[str, NamedSet] = field(default_factory=dict)
    dormant: bool = False

    def copy(self) -> NftTable:
        return replace(
            self,
            chains={n: replace(c, rules=[*c.rules]) for n, c in self.chains.items()},
            sets={n: one.copy() for n, one in self.sets.items()},
        )


@dataclass(frozen=True, slots=True)
class NftRuleset:
    """All tables, in the order in which the kernel has them.

    problems -- what was not understood, where reading was told to go on (strict=False)
    """

    tables: Mapping[Place, NftTable]
    problems: tuple[Problem, ...] = ()

    def remembered(self) -> Memory:
        """Return what rules have put into sets: (set, key) -> seconds since."""
        return {
            (one.name, key): age
            for table in self.tables.values()
            for one in table.sets.values()
            for key, age in one.clients.items()
        }


def parse_nftables(
    text: str, *, file: str = "rules", onto: NftRuleset | None = None, strict: bool = True
) -> NftRuleset:
    """Read what `nft list ruleset` prints, or what `nft -f` takes.

    onto   -- what the kernel holds already, for a text that changes it
    strict -- False: a rule with something that kdns does not know is kept, and noted in
              `problems`; for tables that other programs write as well

    Raises ConfigError with all that is wrong or not understood.
    """
    return _Reader(text, file, onto, strict).read()


# --- Words --------------------------------------------------------------------------------------

# A comma ends a word only before space: `new,established` is one. What follows # is for people.
_TOKEN: Final = re.compile(
    r'"[^"\n]*"|\#[^\n]*|[\n;{}]|(?:[^\s{};,"#\\]|,(?![\s}])|\\(?!\n))+|,|\\\n|"'
)
_END: Final = ("\n", ";")


class _Reader:
    """The tables while they are read."""

    def __init__(self, text: str, file: str, onto: NftRuleset | None, strict: bool) -> None:
        self.tokens = [one for one in _TOKEN.findall(text) if one[0] != "#" and one != "\\\n"]
        self.at = 0
        self.line = 1
        self.file = file
        self.strict = strict
        self.wrong: list[Problem] = []
        self.noted: list[Problem] = list(onto.problems) if onto else []
        held = onto.tables if onto else {}
        self.tables: dict[Place, NftTable] = {at: one.copy() for at, one in held.items()}

    def read(self) -> NftRuleset:
        while self.more():
            if self.tokens[self.at] == "}":
                self.wrong.append(Problem(self.file, self.line, "a } without its {"))
                self.at += 1
            else:
                self.guarded(self.command)
        for table in self.tables.values():
            self.check(table)
        if self.wrong:
            raise ConfigError(self.wrong)
        return NftRuleset(self.tables, tuple(self.noted))

    def guarded(self, read: Callable[[], None]) -> None:
        """Read one thing; what is wrong with it is noted, and what follows it is gone on with."""
        line = self.line
        try:
            read()
        except Wrong as error:
            if isinstance(error, Unknown) and not self.strict:
                self.noted.append(Problem(self.file, line, f"not understood: {error}", True))
            else:
                self.wrong.append(Problem(self.file, line, str(error)))
            self.pass_rest()

    def pass_rest(self) -> None:
        """Pass what is left of a line, with its blocks."""
        depth = 0
        while self.at < len(self.tokens):
            token = self.tokens[self.at]
            if not depth and (token in _END or token == "}"):
                return
            depth += (token == "{") - (token == "}")
            self.line += token == "\n"
            self.at += 1

    # --- tokens ---------------------------------------------------------------------------

    def more(self) -> bool:
        """Pass empty lines; say whether anything is left."""
        while self.at < len(self.tokens) and self.tokens[self.at] in _END:
            self.line += self.tokens[self.at] == "\n"
            self.at += 1
        return self.at < len(self.tokens)

    def line_words(self) -> Words:
        """Return the words up to the end of the line, or to a brace that opens a block."""
        words: list[str] = []
        while self.at < len(self.tokens) and self.tokens[self.at] not in (*_END, "{", "}"):
            words.append(self.tokens[self.at])
            self.at += 1
        return Words(words)

    def rule_words(self) -> list[str]:
        """Return the words of a rule: braces in it are of sets, whatever lines they span."""
        words: list[str] = []
        depth = 0
        while self.at < len(self.tokens):
            token = self.tokens[self.at]
            if not depth and (token in _END or token == "}"):
                break
            depth += (token == "{") - (token == "}")
            self.line += token == "\n"
            self.at += 1
            if token == "\n":
                continue
            if depth and "," in token and token != "," and token[0] != '"':
                words += [one for one in re.split(r"(,)", token) if one]
            else:
                words.append(token)
        if depth:
            raise Wrong("a { without its }")
        return words

    def block(self) -> Iterator[Words]:
        """Yield what each line of a block begins with; whoever takes it reads on from there."""
        self.opened()
        while True:
            if not self.more():
                raise Wrong("a { without its }")
            if self.tokens[self.at] == "}":
                self.at += 1
                return
            yield self.line_words()

    def opened(self) -> None:
        if self.at >= len(self.tokens) or self.tokens[self.at] != "{":
            raise Wrong("a { is missing")
        self.at += 1

    # --- commands -------------------------------------------------------------------------

    def command(self) -> None:
        start = self.at
        words = self.line_words()
        verb = words.peek()
        if verb == "table":
            self.table(words)
            return
        words.take("a command")
        what = words.take("what to do it to")
        if (verb, what) == ("flush", "ruleset"):
            family = words.peek()
            self.tables = {at: one for at, one in self.tables.items() if family not in ("", at[0])}
            return
        if verb not in ("add", "create", "insert", "flush", "delete", "destroy"):
            raise Wrong(f"{verb!r} is no command known here: table, add, flush or delete")
        if what == "table":
            self.change_table(verb, words)
            return
        table = self.table_of(words)
        if what == "rule":
            self.at = start  # its braces are of sets
            self.change_rule(verb, table, self.rule_words())
            return
        name = words.take(f"the name of a {what}")
        match what:
            case "chain":
                self.change_chain(verb, table, name)
            case "set" | "map":
                self.change_set(verb, what, table, name)
            case "element":
                self.change_elements(verb, self.set_of(table, name))
            case _:
                raise Unknown(f"{verb} {what}")

    def place(self, words: Words) -> Place:
        family = words.take() if words.peek() in FAMILIES else "ip"
        return family, words.take("the name of a table")

    def table_of(self, words: Words) -> NftTable:
        place = self.place(words)
        if place not in self.tables:
            raise Wrong(f"no table {' '.join(place)}")
        return self.tables[place]

    def set_of(self, table: NftTable, name: str) -> NamedSet:
        if name not in table.sets:
            raise Wrong(f"no set or map {name} in table {table.family} {table.name}")
        return table.sets[name]

    def change_table(self, verb: str, words: Words) -> None:
        if verb in ("add", "create"):
            self.table(words, new=True)
            return
        place = self.place(words)
        if verb == "flush":
            for chain in self.tables[place].chains.values() if place in self.tables else ():
                chain.rules.clear()
        elif self.tables.pop(place, None) is None and verb == "delete":
            raise Wrong(f"no table {' '.join(place)}")

    def change_rule(self, verb: str, table: NftTable, every: list[str]) -> None:
        words = Words(every)
        words.at = 2
        self.place(words)
        name = words.take("a chain")
        if name not in table.chains:
            raise Wrong(f"no chain {name} in table {table.family} {table.name}")
        if verb not in ("add", "insert") or words.peek() in ("handle", "position", "index"):
            raise Unknown(f"{verb} rule by its number")
        rule = self.rule_of(every[words.at :], self.line)
        rules = table.chains[name].rules
        rules.insert(0 if verb == "insert" else len(rules), rule)

    def change_chain(self, verb: str, table: NftTable, name: str) -> None:
        if verb in ("add", "create"):
            chain = table.chains.setdefault(name, NftChain(name))
            if self.at < len(self.tokens) and self.tokens[self.at] == "{":
                self.chain_body(chain)
        elif verb == "flush" and name in table.chains:
            table.chains[name].rules.clear()
        elif verb == "flush" or (table.chains.pop(name, None) is None and verb == "delete"):
            raise Wrong(f"no chain {name} in table {table.family} {table.name}")

    def change_set(self, verb: str, what: str, table: NftTable, name: str) -> None:
        if verb in ("add", "create"):
            self.set_body(what, table, name)
        elif verb == "flush":
            one = self.set_of(table, name)
            table.sets[name] = NamedSet(name, one.datatypes, one.leads, one.timeout)
        elif table.sets.pop(name, None) is None and verb == "delete":
            raise Wrong(f"no {what} {name} in table {table.family} {table.name}")

    def change_elements(self, verb: str, into: NamedSet) -> None:
        words = Words(self.rule_words())
        if verb in ("add", "create"):
            self.fill(into, words)
            return
        words.expect("{")
        for parts, _, _ in elements_of(words, into.datatypes, None):
            if parts is None:
                into.members.other = None
            elif not into.members.remove(parts) and verb == "delete":
                raise Wrong(f"no such element in {into.name} to delete")

    # --- blocks ---------------------------------------------------------------------------

    def table(self, words: Words, new: bool = False) -> None:
        words.skip("table")
        place = self.place(words)
        table = self.tables.setdefault(place, NftTable(*place))
        if new and (self.at >= len(self.tokens) or self.tokens[self.at] != "{"):
            return
        for line in self.block():
            self.guarded(lambda line=line: self.part(table, line))  # type: ignore[misc]

    def part(self, table: NftTable, line: Words) -> None:
        """Read what stands in a table."""
        match line.take():
            case "comment":
                return
            case "flags":
                table.dormant = "dormant" in line.rest().split(",")
            case "chain":
                name = line.take("the name of a chain")
                self.chain_body(table.chains.setdefault(name, NftChain(name)))
            case "set" | "map" as what:
                self.set_body(what, table, line.take("the name of a set"))
            case other:
                raise Unknown(f"{other} of table {table.family} {table.name}")

    def chain_body(self, chain: NftChain) -> None:
        self.opened()
        while self.more() and self.tokens[self.at] != "}":
            self.guarded(lambda: self.chain_line(chain))
        if self.at >= len(self.tokens):
            raise Wrong(f"chain {chain.name} does not end: a }} is missing")
        self.at += 1

    def chain_line(self, chain: NftChain) -> None:
        first = self.tokens[self.at]
        if first in ("type", "policy", "comment", "flags"):
            words = self.line_words()
            words.take()
            if first == "type":
                chain.base = _base_of(words)
            elif first == "policy" and chain.base is not None:
                chain.base = replace(chain.base, drops=words.take("a policy") == "drop")
            return
        line = self.line
        chain.rules.append(self.rule_of(self.rule_words(), line))

    def rule_of(self, words: list[str], line: int) -> NftRule:
        statements, comment, unknown = read_known(words)
        if unknown is not None:
            self.note(line, f"not understood: {unknown}")
        last = statements[-1] if statements else None
        text = " ".join(words).replace(" ,", ",")
        target = last.target if isinstance(last, Do) else None
        return NftRule(statements, Rule((), target, comment, text, line))

    def set_body(self, what: str, table: NftTable, name: str) -> None:
        into = table.sets.setdefault(name, NamedSet(name))
        self.opened()
        while self.more() and self.tokens[self.at] != "}":
            self.guarded(lambda: self.set_line(what, into))
        self.at += 1

    def set_line(self, what: str, into: NamedSet) -> None:
        words = Words(self.rule_words())
        match words.take():
            case "type" | "typeof" as how:
                into.datatypes, into.leads = _types(words, what, how == "typeof")
            case "timeout":
                into.timeout = seconds_of(words.take("a time"))
            case "elements":
                words.expect("=")
                self.fill(into, words)

    def fill(self, into: NamedSet, words: Words) -> None:
        """Take elements into a set."""
        if not into.datatypes:
            return  # noted: neither is what looks into it understood
        words.expect("{")
        for parts, led, expires in elements_of(words, into.datatypes, _LED[into.leads]):
            if parts is None:
                into.members.other = led
            elif expires is None or not into.timeout:
                into.members.add(parts, led)
            else:
                values = tuple(part for part in parts if isinstance(part, (int, str)))
                into.clients[into.spell(values)] = max(0.0, into.timeout - expires)

    # --- what the kernel would refuse -----------------------------------------------------

    def check(self, table: NftTable) -> None:
        """Refuse what names something that is not there, and chains that form a loop."""
        below: dict[str, list[str]] = {}
        where = f"table {table.family} {table.name}"
        for chain in table.chains.values():
            named: list[str] = []
            for at, one in enumerate(chain.rules):
                missing = self.missing(table, one, named)
                if missing:
                    self.note(one.rule.line, f"no {missing} in {where}")
                    unknown = NotUnderstood(f"no {missing}")
                    chain.rules[at] = replace(one, statements=(unknown,))
            below[chain.name] = [*dict.fromkeys(name for name in named if name in table.chains)]
        try:
            check_depth(where, below)
        except Wrong as error:
            self.wrong.append(Problem(self.file, 0, str(error)))

    def missing(self, table: NftTable, rule: NftRule, named: list[str]) -> str:
        """Return what a rule names that is not there; `named` gets the chains it leads to."""
        for statement in rule.statements:
            for name in names_in(statement):
                if name not in table.sets or not table.sets[name].datatypes:
                    return f"set {name}"
            for name in _chains_of(table, statement):
                named.append(name)
                if name not in table.chains:
                    return f"chain {name}"
        return ""

    def note(self, line: int, text: str) -> None:
        found = self.wrong if self.strict else self.noted
        found.append(Problem(self.file, line, text, not self.strict))


_LED: Final[Mapping[str, Callable[[Words], Led] | None]] = {
    "": None, "verdict": read_verdict, "destination": read_destination,
}  # fmt: skip
_DATATYPES: Final = {datatype for datatype, _ in FIELDS.values()}


def _types(words: Words, what: str, typeof: bool) -> tuple[tuple[str, ...], str]:
    """Read "ipv4_addr . inet_service : verdict", or the same told by fields of packets."""
    key, _, led = " ".join(words.words[words.at :]).partition(" : ")
    found = []
    for one in key.split(" . "):
        datatype = FIELDS[one][0] if typeof and one in FIELDS else one
        if datatype not in _DATATYPES:
            raise Unknown(f"elements of type {one}")
        found.append(datatype)
    if what == "set":
        return tuple(found), ""
    if led == "verdict":
        return tuple(found), "verdict"
    if led.split(" . ")[0] in ("ipv4_addr", "ipv6_addr", "ip daddr", "ip6 daddr"):
        return tuple(found), "destination"
    raise Unknown(f"a map to {led}")


def _chains_of(table: NftTable, statement: Statement) -> Iterable[str]:
    """Yield the chains that a statement may lead to."""
    if isinstance(statement, Do):
        led: list[Led | None] = [statement.target]
    elif isinstance(statement, VerdictMap):
        among = statement.among
        members = table.sets[among].members if isinstance(among, str) else among
        led = [*members.exact.values(), *members.rest.values(), members.other]
    else:
        return
    yield from dict.fromkeys(one.chain for one in led if isinstance(one, Jump))


def _base_of(words: Words) -> Base | None:
    """Read "type nat hook prerouting priority dstnat + 5"; None: no hook that is followed."""
    kind = words.take("a type")
    words.expect("hook")
    hook = words.take("a hook")
    while words and words.peek() != "priority":
        words.take()  # device "eth0"
    words.expect("priority")
    text = words.take("a priority") + words.rest().replace(" ", "")
    found = re.fullmatch(r"([a-z]+|-?\d+)([+-]\d+)?", text)
    if found is None or (found[1].isalpha() and found[1] not in PRIORITIES):
        raise Wrong(f"priority {text!r}: a number, or one of {', '.join(PRIORITIES)}")
    priority = PRIORITIES[found[1]] if found[1].isalpha() else int(found[1])
    if hook not in HOOKS:
        raise Unknown(f"hook {hook}: what it does to packets is not told")
    return Base(kind, hook.upper(), priority + int(found[2] or 0))
