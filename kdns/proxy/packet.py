"""Walks a packet through iptables rules and says what becomes of it, rule by rule.

Decides in which order a node's hooks, tables, chains and rules see a packet, and follows each
of the ways it may take where rules leave it to chance. Pure: nothing is asked of the kernel.
What a rule asks is matches.py's, what text means is rule.py's and ruleset.py's. It is what
`kdns trace` shows, and what the tests hold each rule text against.

The order is netfilter's (checked against Linux 6.18 in network namespaces). nat tables see
the first packet of a connection only, once for its destination and once for its source.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Literal, TypeAlias, cast

from kdns.proxy.matches import (
    LO,
    Assumed,
    ConnectionState,
    Flow,
    Host,
    Memory,
    NotUnderstood,
    Recent,
    render_address,
    render_socket,
)
from kdns.proxy.options import Protocol
from kdns.proxy.rule import (
    PORT_UNREACHABLE,
    Final,
    Jump,
    Mark,
    Masquerade,
    Redirect,
    Reject,
    Rewrite,
    Rule,
    Untrack,
)
from kdns.proxy.ruleset import Chain, Ruleset, parse_rules

__all__ = ["Host", "Outcome", "Packet", "Step", "parse_rules", "render_walk", "walk"]

# hook -> its tables in the order of their priorities (linux/netfilter_ipv4.h)
HOOKS: Mapping[str, tuple[str, ...]] = {
    "PREROUTING": ("raw", "mangle", "nat"),
    "INPUT": ("mangle", "filter", "security", "nat"),
    "FORWARD": ("mangle", "filter", "security"),
    "OUTPUT": ("raw", "mangle", "nat", "filter", "security"),
    "POSTROUTING": ("mangle", "nat"),
}
# Ways of one packet. 5,000 endpoints are as many; more than this is a text made to tire us.
MAX_WAYS = 20_000

# delivered: to a process on the node; forwarded: it leaves the node.
Verdict: TypeAlias = Literal["delivered", "forwarded", "dropped", "rejected"]
# What follows a rule: the next one, the calling chain, or nothing more in this table.
_After: TypeAlias = Literal["next", "return", "done"]


@dataclass(frozen=True, slots=True)
class Packet:
    """A packet of a connection.

    source, destination -- addresses, of one family
    port, source_port   -- 0 to 65535
    interface           -- that it came in by; "": a process on the node sent it
    state               -- as conntrack sees it; NEW: the first of its connection

    Raises ValueError.
    """

    source: str
    destination: str
    port: int
    protocol: Protocol = "tcp"
    source_port: int = 0
    interface: str = ""
    state: ConnectionState = "NEW"

    def __post_init__(self) -> None:
        source = ipaddress.ip_address(self.source)
        if source.version != ipaddress.ip_address(self.destination).version:
            raise ValueError(f"{self.source} and {self.destination} are of two families")
        if not (0 <= self.port <= 65535 and 0 <= self.source_port <= 65535):
            raise ValueError("a port is a number from 0 to 65535")


@dataclass(frozen=True, slots=True)
class Step:
    """One rule that a packet met.

    number  -- of the rule in its chain, from 1; 0 for the policy of a built-in chain
    effect  -- what was done, or why nothing was
    matched -- False only where every rule was asked for, or the rule is not understood
    chance  -- that it came out like this, where the rule leaves it to chance
    """

    table: str
    chain: str
    number: int
    rule: Rule | None
    effect: str
    matched: bool = True
    chance: Fraction = Fraction(1)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One way a packet may go, and how likely it is.

    destination, port -- where it ends or was on its way to
    source            -- its source address then; "" if masqueraded: an address of the node,
                         which the kernel chooses
    answer            -- of `rejected`: the ICMP error sent back, or "tcp-reset"
    decided           -- the rule or policy that dropped or rejected it, else the one that
                         rewrote its destination; None: nothing kept it from its way
    recent            -- the lists of `recent` matches after it, for the next packet
    """

    probability: Fraction
    verdict: Verdict
    destination: str
    port: int
    source: str
    dnat: bool
    masqueraded: bool
    mark: int
    answer: str
    decided: Step | None
    steps: tuple[Step, ...]
    recent: Memory


@dataclass(frozen=True, slots=True)
class _Way:
    """An outcome in the making. steps -- the last one, and those before it in the same form."""

    flow: Flow
    chance: Fraction = Fraction(1)
    verdict: Literal["", "dropped", "rejected"] = ""
    answer: str = ""
    masqueraded: bool = False
    decided: Step | None = None
    steps: tuple[Step, object] | None = field(default=None, compare=False)

    def passed(self, step: Step) -> _Way:
        return replace(self, steps=(step, self.steps))


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
    source, destination = map(ipaddress.ip_address, (packet.source, packet.destination))
    if ruleset.family not in (None, source.version):
        raise ValueError(f"an IPv{source.version} packet, but rules of IPv{ruleset.family}")
    flow = Flow(
        host=host or Host(),
        version=source.version,
        source=int(source),
        destination=int(destination),
        protocol=packet.protocol,
        source_port=packet.source_port,
        port=packet.port,
        state=packet.state,
        recent=dict(recent or {}),
    )
    walker = _Walker(ruleset, every_rule)
    route = walker.from_outside if packet.interface else walker.from_node
    return tuple(_outcome(way) for way in route(_Way(flow), packet.interface))


def _outcome(way: _Way) -> Outcome:
    flow = way.flow
    steps: list[Step] = []
    rest = way.steps
    while rest is not None:
        step, rest = cast("tuple[Step, tuple[Step, object] | None]", rest)
        steps.append(step)
    return Outcome(
        probability=way.chance,
        verdict=way.verdict or ("delivered" if _stays(flow) else "forwarded"),
        destination=render_address(flow.version, flow.destination),
        port=flow.port,
        source="" if way.masqueraded else render_address(flow.version, flow.source),
        dnat=flow.dnat,
        masqueraded=way.masqueraded,
        mark=flow.mark,
        answer=way.answer,
        decided=way.decided,
        steps=tuple(reversed(steps)),
        recent=flow.recent,
    )


class _Walker:
    """Rules, and how many ways through them were found."""

    def __init__(self, ruleset: Ruleset, every_rule: bool) -> None:
        self.ruleset = ruleset
        self.every_rule = every_rule
        self.ways = 1

    # --- Hooks -----------------------------------------------------------------------------

    def from_outside(self, way: _Way, interface: str) -> Iterator[_Way]:
        """A packet that came in by an interface."""
        for arrived in self.hook("PREROUTING", way, incoming=interface):
            if _stays(arrived.flow):
                yield from self.hook("INPUT", arrived, incoming=interface)
                continue
            out = _way_out(arrived.flow)
            for passed in self.hook("FORWARD", arrived, incoming=interface, outgoing=out):
                yield from self.hook("POSTROUTING", passed, outgoing=out)

    def from_node(self, way: _Way, interface: str) -> Iterator[_Way]:
        """A packet that a process on the node sent."""
        for sent in self.hook("OUTPUT", way, outgoing=_way_out(way.flow)):
            for left in self.hook("POSTROUTING", sent, outgoing=_way_out(sent.flow)):
                if not _stays(left.flow):
                    yield left
                    continue
                # It comes back by lo, with its mark and its conntrack entry: nat was asked
                # for the destination in OUTPUT and for the source in POSTROUTING, once each.
                for looped in self.hook("PREROUTING", left, incoming=LO, nat=False):
                    yield from self.hook("INPUT", looped, incoming=LO, nat=False)

    def hook(
        self, hook: str, way: _Way, *, incoming: str = "", outgoing: str = "", nat: bool = True
    ) -> Iterator[_Way]:
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

    def built_in(self, table: str, chain: Chain, way: _Way) -> Iterator[_Way]:
        """Pass a built-in chain; at its end its policy decides."""
        if way.verdict or (table == "nat" and way.flow.state != "NEW"):
            yield way
            return
        for after, what in self.chain(table, chain, way):
            if what == "done" or chain.policy != "DROP":
                yield after
            else:
                yield _ended(after, Step(table, chain.name, 0, None, "policy DROP"), "dropped")

    # --- Chains ----------------------------------------------------------------------------

    def chain(self, table: str, chain: Chain, way: _Way) -> Iterator[tuple[_Way, _After]]:
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
        self, table: str, chain: Chain, number: int, way: _Way
    ) -> tuple[tuple[_Way, Fraction] | None, _Way | None]:
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
        self, table: str, chain: Chain, number: int, way: _Way, share: Fraction
    ) -> Iterator[tuple[_Way, _After]]:
        """Do what a rule's target says."""
        rule = chain.rules[number]
        target = rule.target
        assumed = [m.text for m in rule.matches if isinstance(m, Assumed)]
        effect = "counted" if target is None else str(target)
        if assumed:
            effect += f" (assumed: {', '.join(assumed)})"
        step = Step(table, chain.name, number + 1, rule, effect, chance=share)
        flow = way.flow
        match target:
            case Jump(name, goto):
                below = self.ruleset.tables[table][name]
                for after, what in self.chain(table, below, way.passed(step)):
                    if what == "return" and not goto:
                        yield after, "next"
                    else:
                        yield after, what
            case Final("ACCEPT"):
                yield way.passed(step), "done"
            case Final("RETURN"):
                yield way.passed(step), "return"
            case Final("DROP"):
                yield _ended(way, step, "dropped"), "done"
            case Reject(answer):
                answer = answer or PORT_UNREACHABLE[flow.version]
                yield replace(_ended(way, step, "rejected"), answer=answer), "done"
            case Mark(value, mask):
                mark = (flow.mark & ~mask) ^ value
                yield replace(way, flow=replace(flow, mark=mark)).passed(step), "next"
            case Masquerade():
                # conntrack notes nothing where the source was that address already.
                kept = render_address(flow.version, flow.source)
                flow = replace(flow, snat=flow.host.first_address(flow.version) != kept)
                yield replace(way, flow=flow, masqueraded=True).passed(step), "done"
            case Rewrite() | Redirect():
                way = replace(way, flow=_rewritten(flow, target))
                if way.flow.dnat:
                    way = replace(way, decided=step)
                yield way.passed(step), "done"
            case Untrack():
                yield replace(way, flow=replace(flow, state="UNTRACKED")).passed(step), "next"
            case _:
                yield way.passed(step), "next"


def _stays(flow: Flow) -> bool:
    return flow.host.is_local(flow.version, flow.destination)


def _way_out(flow: Flow) -> str:
    return flow.host.way_out(flow.version, flow.destination)


def _ended(way: _Way, step: Step, verdict: Literal["dropped", "rejected"]) -> _Way:
    return replace(way.passed(step), verdict=verdict, decided=step)


def _rewritten(flow: Flow, target: Rewrite | Redirect) -> Flow:
    """Return the packet with its new source or destination."""
    if isinstance(target, Redirect):
        # To the address of the interface it came in by; what the node itself sends, to
        # loopback (nf_nat_redirect.c).
        address = flow.host.first_address(flow.version) if flow.interface else ""
        address = address or render_address(flow.version, 0x7F000001 if flow.version == 4 else 1)
    else:
        address = target.address
    # A rewrite to what is there already is none for conntrack.
    number = int(ipaddress.ip_address(address)) if address else 0
    if isinstance(target, Rewrite) and target.of_source:
        new = number or flow.source, target.port or flow.source_port
        snat = new != (flow.source, flow.source_port)
        return replace(flow, source=new[0], source_port=new[1], snat=snat)
    new = number or flow.destination, target.port or flow.port
    dnat = new != (flow.destination, flow.port)
    return replace(flow, destination=new[0], port=new[1], dnat=dnat)


# --- For people --------------------------------------------------------------------------------


def render_walk(outcome: Outcome) -> Iterator[str]:
    """Yield a line for each step of one way, and a last one that says where it ends."""
    for step in outcome.steps:
        yield _render_step(step)
    yield f"=> {_end(outcome)}"


_TARGET = re.compile(r"(?:^|\s)-[jg]\s")


def _render_step(step: Step) -> str:
    where = f"{step.table} {step.chain}"
    if step.rule is None:
        return f"{where}: {step.effect}"
    # A rule without a comment is known by what it asks for.
    name = step.rule.comment or _TARGET.split(step.rule.text, maxsplit=1)[0]
    chance = "" if step.chance == 1 else f" ({render_share(step.chance)})"
    asked = f"{name}{chance}".strip()
    arrow = step.matched and isinstance(step.rule.target, Jump)
    between = "" if not asked else " " if arrow else ": "
    return f"{where} rule {step.number}: {asked}{between}{step.effect}"


def _end(outcome: Outcome) -> str:
    share = render_share(outcome.probability)
    where = render_socket(outcome.destination, outcome.port)
    if outcome.verdict in ("dropped", "rejected"):
        with_answer = f" with {outcome.answer}" if outcome.answer else ""
        step = outcome.decided
        by = f" by {step.table} {step.chain}" if step else ""
        by += f" rule {step.number}" if step and step.number else ""
        return f"{outcome.verdict}{with_answer} on its way to {where} ({share}){by}"
    verb = "DNAT to" if outcome.dnat else "to"
    place = ", a process of this node" if outcome.verdict == "delivered" else ""
    source = "masqueraded" if outcome.masqueraded else "source kept"
    return f"{verb} {where}{place} ({share}), {source}"


def render_share(share: Fraction) -> str:
    """Return a probability as "33.3 %"."""
    return f"{float(share) * 100:.3g} %"
