"""Walks a packet through nftables rules and says what becomes of it, rule by rule.

Decides in which order the base chains of a hook, their chains and rules see a packet, and
follows each of the ways it may take where rules leave it to chance. Pure: nothing is asked of
the kernel. The order of hooks is way.py's; what a statement asks is nftables_statements.py's,
what text means is nftables_text.py's and nftables_words.py's. What comes of it is of the same
form as packet.walk's, so that whoever shows one can show the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, TypeAlias

from kdns.proxy.matches import Assumed, Flow, Host, Memory, Never, NotUnderstood
from kdns.proxy.nftables_statements import (
    TRANSLATIONS,
    Bits,
    Compare,
    Destination,
    Do,
    Led,
    Remember,
    RewriteMap,
    VerdictMap,
    look_up,
    remembered,
    values_of,
)
from kdns.proxy.nftables_text import (
    Base,
    NftChain,
    NftRuleset,
    NftTable,
    parse_nftables,
)
from kdns.proxy.rule import Jump, Mark, PassOn, Rewrite, Target, Untrack
from kdns.proxy.way import (
    MAX_WAYS,
    After,
    Outcome,
    Packet,
    Step,
    Way,
    begin,
    carry_out,
    ended,
    lead,
    marked,
    render_walk,
)

__all__ = ["Host", "Outcome", "Packet", "Step", "parse_nftables", "render_walk", "walk_nftables"]

# What a rule may have done: as elsewhere, or it translated, so that no other chain of nat is
# asked at that hook.
_After: TypeAlias = After | Literal["translated"]

# conntrack looks at a packet with this priority: what is hooked in before sees no connection.
_CONNTRACK = -200
# The kernel asks all nat chains at one place of a hook, wherever they say they are; their own
# priorities order them among themselves (nf_nat_core.c).
_NAT: Mapping[str, int] = {"PREROUTING": -100, "OUTPUT": -100, "INPUT": 100, "POSTROUTING": 100}
_FAMILY = {4: ("ip", "inet"), 6: ("ip6", "inet")}


def walk_nftables(
    ruleset: NftRuleset,
    packet: Packet,
    host: Host | None = None,
    *,
    recent: Memory | None = None,
    every_rule: bool = False,
) -> tuple[Outcome, ...]:
    """Return every way the packet may go; their probabilities add up to 1.

    host       -- the node with these rules; None: one that has the loopback addresses only
    recent     -- which set remembers which client, and for how long: (set, address) -> seconds
                  since. It comes on top of what the text says of its sets
    every_rule -- steps also tell of the rules that did not fit

    A step's table is "FAMILY NAME". What is said of packet.walk is true here too: the
    connection is the first to its destination, and what is not in rules stops nothing. Raises
    ValueError for a packet with more than MAX_WAYS ways.
    """
    way = begin(packet, host, {**ruleset.remembered(), **(recent or {})})
    walker = _Walker(ruleset, way.flow.version, every_rule)
    return lead(walker.hook, way, packet.interface)


def _order(base: Base) -> tuple[int, int]:
    if base.kind == "nat":
        return _NAT.get(base.hook, 0), base.priority
    return base.priority, 0


@dataclass(frozen=True, slots=True)
class _Doing:
    """A rule half way: the next statement, the way so far, and what was done."""

    at: int
    way: Way
    share: Fraction = Fraction(1)
    done: tuple[str, ...] = ()

    def told(self, effect: str) -> str:
        return ", ".join((*self.done, effect) if effect else self.done)


class _Walker:
    """Rules of one family, and how many ways through them were found."""

    def __init__(self, ruleset: NftRuleset, version: int, every_rule: bool) -> None:
        self.every_rule = every_rule
        self.ways = 1
        self.hooked: dict[str, list[tuple[NftTable, NftChain, Base]]] = {}
        for table in ruleset.tables.values():
            if table.family not in _FAMILY[version] or table.dormant:
                continue
            for chain in table.chains.values():
                if chain.base is not None:
                    self.hooked.setdefault(chain.base.hook, []).append((table, chain, chain.base))
        for those in self.hooked.values():
            # Of equal ones, whoever came last is asked first (nf_hook_entries_grow).
            those.reverse()
            those.sort(key=lambda one: _order(one[2]))

    # --- Hooks -----------------------------------------------------------------------------

    def hook(self, hook: str, way: Way, incoming: str, outgoing: str, nat: bool) -> Iterator[Way]:
        """Pass the base chains of one hook; a way that has ended passes nothing."""
        if way.verdict:
            yield way
            return
        flow = replace(way.flow, interface=incoming, out_interface=outgoing)
        ways = [(replace(way, flow=flow), False)]
        for table, chain, base in self.hooked.get(hook, ()):
            if base.kind == "nat" and not nat:
                continue
            # What comes back by lo has its connection already.
            unseen = base.priority < _CONNTRACK and hook in ("PREROUTING", "OUTPUT") and nat
            ways = [
                after
                for one, translated in ways
                for after in self.base_chain(table, chain, base, one, translated, unseen)
            ]
        yield from (one for one, _ in ways)

    def base_chain(
        self,
        table: NftTable,
        chain: NftChain,
        base: Base,
        way: Way,
        translated: bool,
        unseen: bool,
    ) -> Iterator[tuple[Way, bool]]:
        """Pass a base chain; at its end its policy decides.

        translated -- a chain of nat has said where to, at this hook
        """
        state = way.flow.state
        if way.verdict or (base.kind == "nat" and (translated or state != "NEW")):
            yield way, translated
            return
        if unseen and state != "UNTRACKED":
            way = replace(way, flow=replace(way.flow, state="INVALID"))
        for after, what in self.chain(table, chain, way):
            if unseen and after.flow.state == "INVALID":
                after = replace(after, flow=replace(after.flow, state=state))
            if what == "return" and base.drops:
                step = Step(_name(table), chain.name, 0, None, "policy DROP")
                after = ended(after, step, "dropped")
            yield after, translated or what == "translated"

    # --- Chains ----------------------------------------------------------------------------

    def chain(self, table: NftTable, chain: NftChain, way: Way) -> Iterator[tuple[Way, _After]]:
        """Pass one chain: yield each way with what ended it, "return" at its end."""
        waiting = [(0, way)]
        while waiting:
            at, way = waiting.pop()
            while at < len(chain.rules):
                ahead: list[Way] = []
                for after, what in self.rule(table, chain, at, way):
                    if what == "next":
                        ahead.append(after)
                    else:
                        yield after, what
                at += 1
                if len(ahead) != 1:
                    self.count(len(ahead))
                    waiting += [(at, one) for one in ahead]
                    break
                way = ahead[0]
            else:
                yield way, "return"

    def count(self, ahead: int) -> None:
        self.ways += max(0, ahead - 1)
        if self.ways > MAX_WAYS:
            raise ValueError(f"more than {MAX_WAYS} ways through these rules")

    def rule(
        self, table: NftTable, chain: NftChain, number: int, way: Way
    ) -> Iterator[tuple[Way, _After]]:
        """Pass one rule, statement by statement."""
        rule = chain.rules[number]
        waiting = [_Doing(0, way)]
        while waiting:
            doing = waiting.pop()
            if doing.at == len(rule.statements):
                # Whatever it did, it decided nothing.
                step = self.step(table, chain, number, doing, "" if doing.done else "counted")
                yield doing.way.passed(step), "next"
                continue
            statement = rule.statements[doing.at]
            on = replace(doing, at=doing.at + 1)
            flow = doing.way.flow
            match statement:
                case Compare() | Bits():
                    answer = statement.holds(flow, table.sets)
                    if answer is not True:
                        missing = 1 - Fraction(answer)
                        yield self.missed(table, chain, number, _chanced(doing, missing)), "next"
                    if answer:
                        waiting.append(_chanced(on, Fraction(answer)))
                case Never():
                    yield self.missed(table, chain, number, doing), "next"
                case NotUnderstood(text):
                    effect = doing.told(f"not understood, taken not to fit: {text}")
                    step = replace(self.step(table, chain, number, doing, effect), matched=False)
                    yield doing.way.passed(replace(step, effect=effect)), "next"
                case Assumed(text):
                    waiting.append(replace(on, done=(*on.done, f"assumed: {text}")))
                case Remember():
                    found = remembered(flow, statement, table.sets)
                    if found is None:
                        yield self.missed(table, chain, number, doing), "next"
                        continue
                    there = replace(doing.way, flow=found[0])
                    what = f"{found[1]} {_REMEMBERED[statement.action]} {statement.name}"
                    waiting.append(replace(on, way=there, done=(*on.done, what)))
                case Do(Mark() | PassOn() | Untrack() | None as target):
                    waiting.append(_done(on, target))
                case Do(target):
                    yield from self.perform(table, chain, number, doing, target)
                case VerdictMap() | RewriteMap():
                    for led, share in self.led(statement, flow, table).items():
                        one = _chanced(doing, share)
                        target = _target(statement, led)
                        if led is None:
                            yield self.missed(table, chain, number, one), "next"
                        elif isinstance(target, PassOn):
                            waiting.append(_chanced(on, share))
                        else:
                            yield from self.perform(table, chain, number, one, target)

    def led(
        self, statement: VerdictMap | RewriteMap, flow: Flow, table: NftTable
    ) -> Mapping[Led | None, Fraction]:
        """Return what a map leads to, each with its chance; None: to nothing."""
        found: dict[Led | None, Fraction] = {}
        for share, values in values_of(statement.key, flow):
            among = statement.among
            led = None if values is None else look_up(among, values, table.sets, flow.recent)
            found[led] = found.get(led, Fraction(0)) + share
        return found

    def perform(
        self, table: NftTable, chain: NftChain, number: int, doing: _Doing, target: Target
    ) -> Iterator[tuple[Way, _After]]:
        """Do what ends a rule."""
        way = doing.way
        if isinstance(target, Rewrite) and _is_foreign(target, way.flow):
            yield self.missed(table, chain, number, doing), "next"
            return
        step = self.step(table, chain, number, doing, str(target))
        if isinstance(target, Jump):
            below = table.chains[target.chain]
            for after, what in self.chain(table, below, way.passed(step)):
                yield after, "next" if what == "return" and not target.goto else what
            return
        after, what = carry_out(way, target, step)
        yield after, "translated" if isinstance(target, TRANSLATIONS) else what

    def missed(self, table: NftTable, chain: NftChain, number: int, doing: _Doing) -> Way:
        """Leave a rule that does not fit; what it did until there stays done."""
        if not (self.every_rule or doing.done):
            return doing.way
        step = self.step(table, chain, number, doing, "does not fit")
        return doing.way.passed(step if doing.done else replace(step, matched=False))

    def step(
        self, table: NftTable, chain: NftChain, number: int, doing: _Doing, effect: str
    ) -> Step:
        rule = chain.rules[number].rule
        return Step(
            _name(table), chain.name, number + 1, rule, doing.told(effect), chance=doing.share
        )


_REMEMBERED = {"update": "kept in", "add": "kept in", "delete": "taken out of"}


def _name(table: NftTable) -> str:
    return f"{table.family} {table.name}"


def _chanced(doing: _Doing, share: Fraction) -> _Doing:
    """Return the same, where it comes to that with this chance."""
    if share == 1:
        return doing
    way = replace(doing.way, chance=doing.way.chance * share)
    return replace(doing, way=way, share=doing.share * share)


def _done(doing: _Doing, target: Target) -> _Doing:
    """Do what decides nothing about the packet."""
    way = doing.way
    if isinstance(target, Mark):
        way = replace(way, flow=marked(way.flow, target))
    elif isinstance(target, Untrack):
        way = replace(way, flow=replace(way.flow, state="UNTRACKED"))
    return replace(doing, way=way, done=(*doing.done, str(target)))


def _target(statement: VerdictMap | RewriteMap, led: Led | None) -> Target:
    if isinstance(led, Destination) and isinstance(statement, RewriteMap):
        return Rewrite(statement.of_source, led.address, led.port)
    return None if isinstance(led, (bool, Destination)) else led


def _is_foreign(target: Rewrite, flow: Flow) -> bool:
    """Of the other family: in a table of both, the rule ends there."""
    return bool(target.address) and (":" in target.address) != (flow.version == 6)
