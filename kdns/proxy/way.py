"""One packet on its way through a node: the hooks it passes, and what became of it.

Decides in which order netfilter's hooks see a packet (checked against Linux 6.18 in network
namespaces), what a rewrite does to it, and how a walk is told to people. Which rules a hook
holds, and in which order they are asked, is packet.py's for iptables and packet_nftables.py's
for nftables. Pure: nothing is asked of the kernel.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Literal, TypeAlias, cast

from kdns.proxy.matches import (
    LO,
    ConnectionState,
    Flow,
    Host,
    Memory,
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
    Target,
    Untrack,
)

# Ways of one packet. 5,000 endpoints are as many; more than this is a text made to tire us.
MAX_WAYS = 20_000

# delivered: to a process on the node; forwarded: it leaves the node.
Verdict: TypeAlias = Literal["delivered", "forwarded", "dropped", "rejected"]
# What follows a rule: the next one, the calling chain, or nothing more in this table.
After: TypeAlias = Literal["next", "return", "done"]


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
class Way:
    """An outcome in the making. steps -- the last one, and those before it in the same form."""

    flow: Flow
    chance: Fraction = Fraction(1)
    verdict: Literal["", "dropped", "rejected"] = ""
    answer: str = ""
    masqueraded: bool = False
    decided: Step | None = None
    steps: tuple[Step, object] | None = field(default=None, compare=False)

    def passed(self, step: Step) -> Way:
        return replace(self, steps=(step, self.steps))


# (hook, way, interface it came in by, that it leaves by, nat is asked) -> the ways on from there
Hook: TypeAlias = Callable[[str, Way, str, str, bool], Iterator[Way]]


def begin(packet: Packet, host: Host | None, recent: Memory) -> Way:
    """Return the way of a packet before its first hook."""
    source, destination = map(ipaddress.ip_address, (packet.source, packet.destination))
    return Way(
        Flow(
            host=host or Host(),
            version=source.version,
            source=int(source),
            destination=int(destination),
            protocol=packet.protocol,
            source_port=packet.source_port,
            port=packet.port,
            state=packet.state,
            recent=recent,
        )
    )


def lead(hook: Hook, way: Way, interface: str) -> tuple[Outcome, ...]:
    """Lead a packet through its hooks; return every way it may go.

    interface -- that it came in by; "": a process on the node sent it
    """
    ways = _from_outside(hook, way, interface) if interface else _from_node(hook, way)
    return tuple(map(_outcome, ways))


def _from_outside(hook: Hook, way: Way, interface: str) -> Iterator[Way]:
    """A packet that came in by an interface."""
    for arrived in hook("PREROUTING", way, interface, "", True):
        if stays(arrived.flow):
            yield from hook("INPUT", arrived, interface, "", True)
            continue
        out = _way_out(arrived.flow)
        for passed in hook("FORWARD", arrived, interface, out, True):
            yield from hook("POSTROUTING", passed, "", out, True)


def _from_node(hook: Hook, way: Way) -> Iterator[Way]:
    """A packet that a process on the node sent."""
    for sent in hook("OUTPUT", way, "", _way_out(way.flow), True):
        for left in hook("POSTROUTING", sent, "", _way_out(sent.flow), True):
            if not stays(left.flow):
                yield left
                continue
            # It comes back by lo, with its mark and its conntrack entry: nat was asked
            # for the destination in OUTPUT and for the source in POSTROUTING, once each.
            for looped in hook("PREROUTING", left, LO, "", False):
                yield from hook("INPUT", looped, LO, "", False)


def _outcome(way: Way) -> Outcome:
    flow = way.flow
    steps: list[Step] = []
    rest = way.steps
    while rest is not None:
        step, rest = cast("tuple[Step, tuple[Step, object] | None]", rest)
        steps.append(step)
    return Outcome(
        probability=way.chance,
        verdict=way.verdict or ("delivered" if stays(flow) else "forwarded"),
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


def stays(flow: Flow) -> bool:
    return flow.host.is_local(flow.version, flow.destination)


def _way_out(flow: Flow) -> str:
    return flow.host.way_out(flow.version, flow.destination)


def ended(way: Way, step: Step, verdict: Literal["dropped", "rejected"]) -> Way:
    return replace(way.passed(step), verdict=verdict, decided=step)


def carry_out(way: Way, target: Target, step: Step) -> tuple[Way, After]:
    """Do what a rule says that leads to no other chain; step -- the same, for people."""
    flow = way.flow
    match target:
        case Final("ACCEPT"):
            return way.passed(step), "done"
        case Final("RETURN"):
            return way.passed(step), "return"
        case Final("DROP"):
            return ended(way, step, "dropped"), "done"
        case Reject(answer):
            answer = answer or PORT_UNREACHABLE[flow.version]
            return replace(ended(way, step, "rejected"), answer=answer), "done"
        case Mark():
            return replace(way, flow=marked(flow, target)).passed(step), "next"
        case Masquerade():
            # conntrack notes nothing where the source was that address already.
            kept = render_address(flow.version, flow.source)
            flow = replace(flow, snat=flow.host.first_address(flow.version) != kept)
            return replace(way, flow=flow, masqueraded=True).passed(step), "done"
        case Rewrite() | Redirect():
            way = replace(way, flow=_rewritten(flow, target))
            if way.flow.dnat:
                way = replace(way, decided=step)
            return way.passed(step), "done"
        case Untrack():
            return replace(way, flow=replace(flow, state="UNTRACKED")).passed(step), "next"
        case _:
            return way.passed(step), "next"


def marked(flow: Flow, target: Mark) -> Flow:
    """Return the packet with its new mark."""
    return replace(flow, mark=(flow.mark & ~target.mask) ^ target.value)


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


# Where what a rule asks for ends and what it does begins: iptables, nftables (whose tables have
# a family before their name).
_TARGET = re.compile(r"(?:^|\s)-[jg]\s")
_VERDICT = re.compile(
    r"(?:^|\s)(?:meta mark set|jump|goto|[ds]nat|masquerade|redirect|reject|drop|accept|return"
    r"|update|add|delete|(?<=map) \{)(?=\s|$)"
)


def _render_step(step: Step) -> str:
    where = f"{step.table} {step.chain}"
    if step.rule is None:
        return f"{where}: {step.effect}"
    # A rule without a comment is known by what it asks for.
    does = _VERDICT if " " in step.table else _TARGET
    name = step.rule.comment or does.split(step.rule.text, maxsplit=1)[0]
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
