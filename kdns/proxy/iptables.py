"""Forwarding table -> what iptables-restore must be told.

Holds the rules wanted, knows in what they differ from those the kernel was last given, and
says so as restore texts: all of it, all in chunks, or the difference. Order is fixed, so that
equal tables give equal text. What the rules say is iptables_rules.py's; running iptables is
kernel/'s.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Final, NamedTuple, TypeAlias

from kdns.proxy.iptables_explain import Reasons
from kdns.proxy.iptables_rules import (
    NAT_SERVICES,
    SERVICE_CHAINS,
    SHARED,
    RuleSet,
    Shared,
    Spelling,
    append_lines,
    fixed_chains,
    jumps,
    node_port_jumps,
)
from kdns.proxy.options import Options
from kdns.proxy.table import Forwarding, ForwardingTable
from kdns.registry.objects import Key

__all__ = [
    "LARGE",
    "SERVICE_CHAINS",
    "Entry",
    "IptablesRules",
    "RuleSet",
    "fixed_chains",
    "jumps",
    "render_entry",
    "render_rules",
]

# With more endpoints than this, rules of endpoints carry no comments (reference 1.5): at this
# size the text matters more than who reads it. kube-proxy's figure.
LARGE: Final = 1000

# A shared chain in which more rules go or come than this is written anew; below that they are
# deleted and inserted singly. Measured with 10,000 rules in it: one change takes iptables-nft
# 0.11 s this way and 1 s the other, a deletion 8 ms (100 of them cost as much as the whole), an
# insertion under 1 ms. iptables-legacy is faster singly however many there are.
MAX_DELETED: Final = 50
MAX_INSERTED: Final = 500

# What else a full text shall do: table -> lines that declare chains, and lines that add rules
# which may jump to any chain of ours.
Entry: TypeAlias = Mapping[str, tuple[str, str]]

# name, protocol, how manieth of that Service port, rule without "-A CHAIN ": sorts as the chain.
_Rule: TypeAlias = tuple[str, str, int, str]


class _Holding(NamedTuple):
    """What is remembered of one Service: the names of its chains and its shared rules."""

    chains: tuple[str, ...]
    rules: tuple[tuple[Shared, _Rule], ...]


_NOTHING: Final = _Holding((), ())
_NO_ENTRY: Final[Entry] = {}


class _SharedChain:
    """The wanted rules of one shared chain, and how they differ from what the kernel has."""

    __slots__ = ("gone", "name", "new", "rules", "tail")

    def __init__(self, name: str, tail: tuple[str, ...]) -> None:
        self.name = name
        self.tail = tail  # rules that stay last and never change
        self.rules: list[_Rule] = []
        self.gone: set[_Rule] = set()
        self.new: set[_Rule] = set()

    def add(self, rule: _Rule) -> None:
        insort(self.rules, rule)
        if rule in self.gone:
            self.gone.remove(rule)
        else:
            self.new.add(rule)

    def remove(self, rule: _Rule) -> None:
        del self.rules[bisect_left(self.rules, rule)]
        if rule in self.new:
            self.new.remove(rule)
        else:
            self.gone.add(rule)

    def settle(self) -> None:
        self.gone.clear()
        self.new.clear()

    def whole(self) -> str:
        """Return all its "-A" lines."""
        return append_lines(self.name, [*(rule[3] for rule in self.rules), *self.tail])

    def few(self) -> bool:
        """True if single rules are the shorter way to what is wanted."""
        return len(self.gone) <= MAX_DELETED and len(self.new) <= MAX_INSERTED

    def single(self) -> str:
        """Return the lines that lead from what the kernel has to what is wanted.

        A rule that is gone is named by its text, not its number: if somebody changed the chain
        the transaction fails, rather than take away a wrong rule. Inserted in ascending order,
        each finds all that comes before it in place, so its final place is its number.
        """
        gone = [f"-D {self.name} {rule[3]}\n" for rule in sorted(self.gone)]
        new = [
            f"-I {self.name} {bisect_left(self.rules, rule) + 1} {rule[3]}\n"
            for rule in sorted(self.new)
        ]
        return "".join(gone + new)


class IptablesRules:
    """The rules of one family: those wanted, and those the kernel was last given.

    Does no I/O. Whoever gives a text to the kernel says so with committed(), before the next
    update(); what failed to be applied is simply asked for again, as partial() or, to be sure,
    as full().
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._fixed = fixed_chains(options)
        tails = {NAT_SERVICES: node_port_jumps(options)}
        self._shared = {one: _SharedChain(one.chain, tails.get(one, ())) for one in SHARED}
        self._holdings: dict[Key, _Holding] = {}
        self._chains: dict[str, str] = {}  # of Services, all in nat -> "-A" lines
        self._changed: dict[str, str | None] = {}  # chain -> its lines in the kernel; None: none
        self._chain_rules = 0
        self._large: bool | None = None
        self._committed = False

    def update(
        self,
        table: ForwardingTable,
        changed: Collection[Key] | None,
        without: Collection[Key] = (),
    ) -> None:
        """Render the Services in `changed` anew; None: all of them.

        without -- Services that get no rules
        """
        large = table.endpoints > LARGE
        if changed is None or large != self._large:  # the switch changes every comment
            changed = table.services.keys() | self._holdings.keys()
        self._large = large
        spelling = Spelling(self._options, large)
        for key in sorted(changed):
            ports = () if key in without else table.services.get(key, ())
            self._replace(key, ports, spelling)

    def owner(self, line: str) -> Key | None:
        """Return the Service that a line of a restore text was written for; None: for none."""
        _, chain, rule = (*line.split(" ", 2), "", "")[:3]
        number, _, inserted = rule.partition(" ")
        texts = (rule, inserted if number.isdecimal() else rule)
        for key, holding in self._holdings.items():
            if chain in holding.chains:
                return key
            if any(one.chain == chain and text[3] in texts for one, text in holding.rules):
                return key
        return None

    def _replace(self, key: Key, ports: Iterable[Forwarding], spelling: Spelling) -> None:
        chains: dict[str, str] = {}
        rules: list[tuple[Shared, _Rule]] = []
        for port in ports:
            spelt = spelling.spell(port)
            chains.update(spelt.chains)
            rules += [
                (shared, (port.name, port.protocol, number, rule))
                for number, (shared, rule) in enumerate(spelt.shared)
            ]
        old = self._holdings.get(key, _NOTHING)
        for chain in old.chains:
            if chain not in chains:
                self._set_chain(chain, None)
        for chain, text in chains.items():
            self._set_chain(chain, text)
        new = _Holding(tuple(chains), tuple(rules))
        self._set_rules(old, new)
        if ports:
            self._holdings[key] = new
        else:
            self._holdings.pop(key, None)

    def _set_chain(self, chain: str, text: str | None) -> None:
        old = self._chains.get(chain)
        if text == old:
            return
        if text is None:
            del self._chains[chain]
        else:
            self._chains[chain] = text
        self._chain_rules += (text or "").count("\n") - (old or "").count("\n")
        # Changed back before the kernel heard of it: no change.
        if self._changed.setdefault(chain, old) == text:
            del self._changed[chain]

    def _set_rules(self, old: _Holding, new: _Holding) -> None:
        if old.rules == new.rules:
            return
        kept = set(old.rules).intersection(new.rules)
        for shared, rule in old.rules:
            if (shared, rule) not in kept:
                self._shared[shared].remove(rule)
        for shared, rule in new.rules:
            if (shared, rule) not in kept:
                self._shared[shared].add(rule)

    def full(
        self,
        stale: Iterable[str] = (),
        entry: Entry = _NO_ENTRY,
        stay: Collection[str] = (),
    ) -> str:
        """Return the restore text (--noflush) that puts all chains as they must be.

        stale -- per-service chains of the nat table that the kernel holds besides ours; those
                 we do not want are removed
        entry -- what else to do in the same transactions
        stay  -- chains that cannot be removed: they are emptied
        """
        filters, nat = _Section("filter"), _Section("nat")
        self._write_fixed(filters, nat)
        self._write_services(nat, sorted(self._holdings))
        self._write_shared(filters, nat)
        self._drop(nat, stale, stay)
        return _text(filters, nat, entry)

    def chunks(
        self,
        services: int,
        stale: Iterable[str] = (),
        entry: Entry = _NO_ENTRY,
        stay: Collection[str] = (),
    ) -> Iterator[str]:
        """Yield the same as full() in several texts, the chains of `services` Services each.

        Nothing jumps to them until the last text writes the shared chains: so each text may
        be its own transaction (reference 5.2: iptables-nft is super-linear in one). Nor is
        anything in the way where the kernel holds older rules: the chains of one Service are
        exchanged in one transaction, and what old rules may still jump to goes in the last.
        The first text comes before, the last after all others; those between have no chain in
        common and come in any order, even at once.
        """
        keys = sorted(self._holdings)
        if len(keys) <= services:
            yield self.full(stale, entry, stay)
            return
        for start in range(0, len(keys), services):
            filters, nat = _Section("filter"), _Section("nat")
            if not start:  # the others jump to KUBE-MARK-MASQ
                self._write_fixed(filters, nat)
            self._write_services(nat, keys[start : start + services])
            text = _text(filters, nat)
            if text:  # not if no Service of the chunk has an endpoint
                yield text
        filters, nat = _Section("filter"), _Section("nat")
        self._write_shared(filters, nat)
        self._drop(nat, stale, stay)
        yield _text(filters, nat, entry)

    def partial(self) -> str:
        """Return the restore text of what differs from what was last committed; "" if nothing
        does.

        As long as nothing was committed, that is everything.
        """
        if not self._committed:
            return self.full()
        filters, nat = _Section("filter"), _Section("nat")
        for chain in sorted(self._changed):
            if (lines := self._chains.get(chain)) is not None:
                nat.chain(chain, lines)
        for (table, _), shared in self._shared.items():
            section = nat if table == "nat" else filters
            if not shared.few():
                section.chain(shared.name, shared.whole())
            elif shared.gone or shared.new:
                section.lines(shared.single())
        self._drop(nat, ())
        return _text(filters, nat)

    def committed(self) -> None:
        """Note that the kernel now holds what is wanted."""
        self._committed = True
        self._changed.clear()
        for shared in self._shared.values():
            shared.settle()

    def wanted(self) -> RuleSet:
        """Return all rules of our chains, for comparison with what the kernel holds."""
        rules = {table: dict(chains) for table, chains in self._fixed.items()}
        for (table, chain), shared in self._shared.items():
            rules[table][chain] = (*(rule[3] for rule in shared.rules), *shared.tail)
        for chain, text in self._chains.items():
            cut = len(chain) + 4  # "-A CHAIN "
            rules["nat"][chain] = tuple(line[cut:] for line in text.splitlines())
        return rules

    @property
    def service_chains(self) -> Collection[str]:
        """The names of the per-service chains wanted."""
        return self._chains.keys()

    def counts(self) -> Mapping[str, int]:
        """Return the number of rules wanted in each table."""
        counts = {table: sum(map(len, chains.values())) for table, chains in self._fixed.items()}
        for (table, _), shared in self._shared.items():
            counts[table] += len(shared.rules) + len(shared.tail)
        counts["nat"] += self._chain_rules
        return counts

    def _write_fixed(self, filters: _Section, nat: _Section) -> None:
        for section, table in ((filters, "filter"), (nat, "nat")):
            for chain, rules in self._fixed[table].items():
                section.chain(chain, append_lines(chain, rules))

    def _write_services(self, nat: _Section, keys: Iterable[Key]) -> None:
        for key in keys:
            for chain in self._holdings[key].chains:
                nat.chain(chain, self._chains[chain])

    def _write_shared(self, filters: _Section, nat: _Section) -> None:
        for (table, chain), shared in self._shared.items():
            (nat if table == "nat" else filters).chain(chain, shared.whole())

    def _drop(self, nat: _Section, stale: Iterable[str], stay: Collection[str] = ()) -> None:
        """Drop what nothing jumps to any more: `stale`, and what was wanted until now."""
        gone = {chain for chain in stale if chain.startswith(SERVICE_CHAINS)}
        gone.update(self._changed)
        for chain in sorted(gone.difference(self._chains)):
            if chain in stay:
                nat.chain(chain, "")
            else:
                nat.drop(chain)


class _Section:
    """One table's part of a restore text, in the order that iptables-restore needs.

    Chains first, because rules jump to them; deletions last, once nothing jumps there: a chain
    to delete is emptied by its own chain line, so that it lets go of those it jumps to.
    """

    __slots__ = ("_chains", "_dropped", "_lines", "table")

    def __init__(self, table: str) -> None:
        self.table = table
        self._chains: list[str] = []
        self._lines: list[str] = []
        self._dropped: list[str] = []

    def chain(self, name: str, lines: str) -> None:
        """Write the chain anew: a chain line empties it."""
        self._chains.append(f":{name} - [0:0]\n")
        self._lines.append(lines)

    def lines(self, lines: str) -> None:
        """Change rules of a chain that is there."""
        self._lines.append(lines)

    def drop(self, name: str) -> None:
        self._chains.append(f":{name} - [0:0]\n")
        self._dropped.append(f"-X {name}\n")

    def pieces(self, entry: tuple[str, str] = ("", "")) -> Iterator[str]:
        """Yield what its text consists of, with `entry` in it; nothing if it says nothing."""
        declared, added = entry
        if self._chains or self._lines or declared or added:
            yield f"*{self.table}\n"
            yield declared
            yield from self._chains
            yield from self._lines
            yield from self._dropped
            yield f"{added}COMMIT\n"


def _text(filters: _Section, nat: _Section, entry: Entry = _NO_ENTRY) -> str:
    """Return the text of all sections, and of `entry` in them."""
    sections = {section.table: section for section in (filters, nat)}
    # One join, as the whole may be 10 MB.
    pieces = [render_entry({t: lines for t, lines in entry.items() if t not in sections})]
    for table, section in sections.items():
        pieces.extend(section.pieces(entry.get(table, ("", ""))))
    return "".join(pieces)


def render_entry(entry: Entry) -> str:
    """Return `entry` as a restore text of its own."""
    return "".join(
        [f"*{table}\n{declared}{added}COMMIT\n" for table, (declared, added) in entry.items()]
    )


def render_rules(table: ForwardingTable, options: Options, explain: bool = False) -> str:
    """Return all rules with their jumps as one text for `iptables-restore`, as `kdns rules`
    prints it.

    explain -- above each rule a comment says whose it is and what it is for
    """
    rules = IptablesRules(options)
    rules.update(table, None)
    wanted = rules.wanted()
    reasons = Reasons(table, options, table.endpoints > LARGE) if explain else None
    texts = []
    for name, builtin in jumps(options).items():
        chains = dict(sorted(wanted[name].items()))
        if name == "filter":
            chains.setdefault("KUBE-FIREWALL", ())
        texts.append(f"*{name}\n")
        texts += [f":{chain} - [0:0]\n" for chain in chains]
        for chain, lines in {**builtin, **chains}.items():
            if reasons is None:
                texts.append(append_lines(chain, lines))
                continue
            for line in lines:
                texts.append(f"# {reasons.rule(name, chain, line)}\n-A {chain} {line}\n")
        texts.append("COMMIT\n")
    return "".join(texts)
