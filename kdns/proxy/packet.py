"""Walks a packet through iptables rules and says what becomes of it, rule by rule.

Decides in which order the tables, chains and rules of a hook see a packet, and follows each of
the ways it may take where rules leave it to chance. Pure: nothing is asked of the kernel. The
order of hooks is way.py's; what a rule asks is matches.py's, what text means is rule.py's and
ruleset.py's. It is what `kdns trace` shows, and what the tests hold each rule text against.

The order is netfilter's (checked against Linux 6.18 in network namespaces). nat tables see
the first packet of a connection only, once for its destination and once for its source.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from fractions import Fraction

from kdns.proxy.matches import Assumed, Host, Memory, NotUnderstood, Recent
from kdns.proxy.rule import Jump
from kdns.proxy.ruleset import Chain, Ruleset, parse_rules
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
    render_walk,
)

__all__ = ["Host", "Outcome", "Packet", "Step", "parse_rules", "render_walk", "walk"]

# hook -> its tables in the order of their priorities (linux/netfilter_ipv4.h)
HOOKS: Mapping[str, tuple[str, ...]] = {
    "PREROUTING": ("raw", "mangle", "nat"),
    "INPUT": ("mangle", "filter", "security", "nat"),
    "FORWARD": ("mangle", "filter", "security"),
    "OUTPUT": ("raw", "mangle", "nat", "filter", "security"),
    "POSTROUTING": ("mangle", "nat"),
}


def walk(
    ruleset: Ruleset,
    packet: Packet,
    host: Host | None = None,
    *,
    recent: Memory | None = None,
    every_rule: bool = False,
) -> tuple[Outcome, ...]:
    """Return every way the packet may go; their probabilities add up to 1.

    host       -- the node with these rules; None: one that has the loopback addresses only
    recent     -- which list of `recent` matches remembers which client, and for how long
    every_rule -- steps also tell of the rules that did not fit

    The connection is the first to its destination: no entry of conntrack says otherwise. What
    is not in rules (reverse path filter, forwarding switched off) stops nothing here. Raises
    ValueError for a packet of another family than the rules, or with more than MAX_WAYS ways.
    """
    way = begin(packet, host, dict(recent or {}))
    if ruleset.family not in (None, way.flow.version):
        raise ValueError(f"an IPv{way.flow.version} packet, but rules of IPv{ruleset.family}")
    return lead(_Walker(ruleset, every_rule).hook, way, packet.interface)


class _Walker:
    """Rules, and how many ways through them were found."""

    def __init__(self, ruleset: Ruleset, every_rule: bool) -> None:
        self.ruleset = ruleset
        self.every_rule = every_rule
        self.ways = 1

    def hook(self, hook: str, way: Way, incoming: str, outgoing: str, nat: bool) -> Iterator[Way]:
        """Pass the tables of one hook; a way that has ended passes nothing."""
        if way.verdict:
            yield way
            return
        flow = replace(way.flow, interface=incoming, out_interface=outgoing)
        ways = [replace(way, flow=flow)]
        for table in HOOKS[hook]:
            chain = self.ruleset.tables.get(table, {}).get(hook)
            if chain is None or (table == "nat" and not nat):
                continue
            ways = [after for one in ways for after in self.built_in(table, chain, one)]
        yield from ways

    def built_in(self, table: str, chain: Chain, way: Way) -> Iterator[Way]:
        """Pass a built-in chain; at its end its policy decides."""
        if way.verdict or (table == "nat" and way.flow.state != "NEW"):
            yield way
            return
        for after, what in self.chain(table, chain, way):
            if what == "done" or chain.policy != "DROP":
                yield after
            else:
                yield ended(after, Step(table, chain.name, 0, None, "policy DROP"), "dropped")

    # --- Chains ----------------------------------------------------------------------------

    def chain(self, table: str, chain: Chain, way: Way) -> Iterator[tuple[Way, After]]:
        """Pass one chain: yield each way with "return" or "done"."""
        flow = way.flow
        numbers: Iterable[int] = range(len(chain.rules))
        if not self.every_rule:
            numbers = chain.candidates(flow.destination, flow.port)
        order = tuple(numbers)
        waiting = [(0, way)]
        while waiting:
            at, way = waiting.pop()
            while at < len(order):
                number = order[at]
                at += 1
                fits, way_past = self.ask(table, chain, number, way)
                if fits is None:
                    assert way_past is not None  # one of the two always is
                    way = way_past
                    continue
                ahead = [] if way_past is None else [way_past]
                for after, what in self.follow(table, chain, number, *fits):
                    if what == "next":
                        ahead.append(after)
                    else:
                        yield after, what
                self.ways += max(0, len(ahead) - 1)
                if self.ways > MAX_WAYS:
                    raise ValueError(f"more than {MAX_WAYS} ways through these rules")
                waiting += [(at, one) for one in ahead]
                break
            else:
                yield way, "return"

    def ask(
        self, table: str, chain: Chain, number: int, way: Way
    ) -> tuple[tuple[Way, Fraction] | None, Way | None]:
        """Ask a rule's matches; return (the way that fits and its chance, the way that does
        not). Both exist only where the rule leaves it to chance."""
        rule = chain.rules[number]
        before = way
        share = Fraction(1)
        for match in rule.matches:
            answer = match.holds(way.flow)
            if isinstance(match, Recent):
                # Asked means remembered, whether or not the rest of the rule fits.
                way = replace(way, flow=match.remember(way.flow))
            if answer is True:
                continue
            if answer is False:
                if isinstance(match, NotUnderstood):
                    effect = f"not understood, taken not to fit: {match.text}"
                elif self.every_rule:
                    effect = "does not fit"
                else:
                    return None, way
                return None, way.passed(
                    Step(table, chain.name, number + 1, rule, effect, matched=False)
                )
            if share == 1:
                before = way
            share *= answer
        if share == 1:
            return (way, share), None
        past = replace(before, chance=before.chance * (1 - share))
        if self.every_rule:
            past = past.passed(
                Step(table, chain.name, number + 1, rule, "does not fit", False, 1 - share)
            )
        if share == 0:
            return None, past
        return (replace(way, chance=way.chance * share), share), past

    def follow(
        self, table: str, chain: Chain, number: int, way: Way, share: Fraction
    ) -> Iterator[tuple[Way, After]]:
        """Do what a rule's target says."""
        rule = chain.rules[number]
        target = rule.target
        assumed = [m.text for m in rule.matches if isinstance(m, Assumed)]
        effect = "counted" if target is None else str(target)
        if assumed:
            effect += f" (assumed: {', '.join(assumed)})"
        step = Step(table, chain.name, number + 1, rule, effect, chance=share)
        if not isinstance(target, Jump):
            yield carry_out(way, target, step)
            return
        below = self.ruleset.tables[table][target.chain]
        for after, what in self.chain(table, below, way.passed(step)):
            if what == "return" and not target.goto:
                yield after, "next"
            else:
                yield after, what
