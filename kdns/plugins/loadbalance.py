"""`loadbalance`: the order of records in an answer, another one for each asker.

Decides order only; no record comes or goes. In each section CNAMEs stand first, because some
stub resolvers want them before the addresses they lead to, then all else in its order, then
addresses, then MX. It stands above `cache`, so cached answers are put in order too.
"""

from __future__ import annotations

import ipaddress
import logging
import random
from collections.abc import Callable, Sequence
from typing import TypeAlias

from kdns.corefile import Directive, Option, Token, nearest
from kdns.dns import types as t
from kdns.dns.message import RR, Query, Reply
from kdns.dns.name import BadName, parse_name
from kdns.errors import KdnsError
from kdns.plugins.plugin import Plugin, WatchFile, Work
from kdns.plugins.setup import Setup

ROUND_ROBIN, WEIGHTED = "round_robin", "weighted"
POLICIES = (ROUND_ROBIN, WEIGHTED)
RELOAD = 30.0  # seconds between two looks at the weight file
MAX_WEIGHT = 255

TRANSFERS = frozenset((t.AXFR, t.IXFR))
ADDRESSES = frozenset((t.A, t.AAAA))
SHUFFLED = frozenset((t.A, t.AAAA, t.MX))
WEIGHED_TYPES = frozenset((t.A, t.AAAA, t.SRV))  # qtypes whose answers are weighed

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network
# lower-case owner name -> packed address -> weight
Weights: TypeAlias = dict[bytes, dict[bytes, int]]


def partition(records: Sequence[RR]) -> tuple[list[RR], list[RR], list[RR], list[RR]]:
    """Return (CNAME, other, address, MX) records, each in the order given."""
    cname: list[RR] = []
    rest: list[RR] = []
    address: list[RR] = []
    mx: list[RR] = []
    for rr in records:
        if rr.type in ADDRESSES:
            address.append(rr)
        elif rr.type == t.CNAME:
            cname.append(rr)
        elif rr.type == t.MX:
            mx.append(rr)
        else:
            rest.append(rr)
    return cname, rest, address, mx


class RoundRobin:
    """Every order of the addresses, and of the MX, is as likely as any other."""

    def __init__(self, rng: random.Random) -> None:
        self._random = rng.random

    def arrange(self, query: Query, reply: Reply) -> None:
        if len(reply.answer) > 1:
            reply.answer = self._section(reply.answer, reply)
        if len(reply.authority) > 1:
            reply.authority = self._section(reply.authority, reply)
        if len(reply.additional) > 1:
            reply.additional = self._section(reply.additional, reply)

    def _section(self, records: list[RR], reply: Reply) -> list[RR]:
        kind = records[0].type
        for rr in records:
            if rr.type != kind:
                break
        else:
            return self._shuffle(records, reply) if kind in SHUFFLED else records
        cname, rest, address, mx = partition(records)
        return cname + rest + self._shuffle(address, reply) + self._shuffle(mx, reply)

    def _shuffle(self, records: list[RR], reply: Reply) -> list[RR]:
        if len(records) < 2:
            return records
        reply.shuffled = True
        draw = self._random
        if len(records) == 2:
            return records if draw() < 0.5 else [records[1], records[0]]
        return sorted(records, key=lambda _: draw())


class Weighted:
    """One address goes to the top, as often as its weight says; the others keep their order,
    but for the one that stood there."""

    def __init__(self, rng: random.Random, log: logging.Logger, path: str, interval: float) -> None:
        self._random = rng
        self._log = log
        self._path = path
        self._interval = interval
        self._content: bytes | None = None
        self.weights: Weights = {}

    def arrange(self, query: Query, reply: Reply) -> None:
        if query.qtype in WEIGHED_TYPES:
            reply.answer = self._section(reply.answer, reply)
            reply.additional = self._section(reply.additional, reply)

    def _section(self, records: list[RR], reply: Reply) -> list[RR]:
        cname, rest, address, mx = partition(records)
        if not address:
            return records
        if len(address) > 1:
            # A repeat from the packet cache would not keep the proportions.
            reply.keep = 0.0
            top = self._draw(address)
            address[0], address[top] = address[top], address[0]
        return cname + rest + address + mx

    def _draw(self, address: Sequence[RR]) -> int:
        nothing: dict[bytes, int] = {}
        weights = [self.weights.get(rr.name.lower(), nothing).get(rr.rdata, 1) for rr in address]
        return self._random.choices(range(len(address)), weights)[0]

    def watch(self) -> WatchFile:
        return WatchFile(self._path, self._interval, self.load)

    def load(self, content: bytes | None, error: str) -> bool:
        """Take over a weight file; a bad or missing one leaves the weights as they are."""
        if content is None:
            again = f"; next try in {self._interval:g}s" if self._interval else ""
            self._log.warning("cannot read the weight file: %s%s", error, again)
            return False
        if content == self._content:
            return False
        self._content = content
        try:
            self.weights = parse_weights(content, self._path)
        except BadWeights as e:
            self._log.error("%s", e)
            return False
        self._log.info("weight file %s is in use", self._path)
        return True


Policy: TypeAlias = RoundRobin | Weighted


class LoadBalance(Plugin):
    word = "loadbalance"

    def __init__(self, policy: Policy, preferred: Sequence[Network] = ()) -> None:
        self._arrange: Callable[[Query, Reply], None] = policy.arrange
        self._preferred = tuple(preferred)
        self._watches = (policy.watch(),) if isinstance(policy, Weighted) else ()

    def heeds(self, zone: bytes) -> bool:
        return bool(self._watches)  # weights are of names

    def on_reply(self, query: Query, reply: Reply) -> Reply:
        if len(reply.answer) < 2 and len(reply.additional) < 2 and len(reply.authority) < 2:
            return reply
        if reply.rcode or query.qtype in TRANSFERS:
            return reply
        self._arrange(query, reply)
        if self._preferred:
            reply.answer = self._prefer(reply.answer)
            reply.additional = self._prefer(reply.additional)
        return reply

    def _prefer(self, records: list[RR]) -> list[RR]:
        """Put addresses of the first preferred network first, and so on. All else that is
        neither CNAME nor MX goes to the end here, as in CoreDNS."""
        cname, rest, address, mx = partition(records)
        return cname + sorted(address, key=self._rank) + mx + rest

    def _rank(self, rr: RR) -> int:
        address = ipaddress.ip_address(rr.rdata)
        for rank, network in enumerate(self._preferred):
            if address in network:
                return rank
        return len(self._preferred)

    def work(self) -> Sequence[Work]:
        return self._watches


# --- the weight file ----------------------------------------------------------------------


class BadWeights(KdnsError):
    """A weight file that cannot be used; the message says where and why."""


def parse_weights(content: bytes, path: str) -> Weights:
    """Return the weights of a file: a name on a line by itself, then a line for each of its
    addresses, `ADDRESS WEIGHT`. Raises BadWeights."""
    weights: Weights = {}
    current: dict[bytes, int] | None = None
    for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            if len(words) == 1:
                current = weights.setdefault(_domain(words[0]), {})
            elif len(words) == 2:
                address, weight = _address(words[0]), _weight(words[1])
                if current is None:
                    raise BadWeights("a domain name must stand before the first address")
                current.setdefault(address, weight)
            else:
                raise BadWeights(f"'{line.strip()}' must be a domain name or ADDRESS WEIGHT")
        except BadWeights as e:
            raise BadWeights(f"{path}:{number}: {e}") from None
    return weights


def _domain(word: str) -> bytes:
    try:
        ipaddress.ip_address(word)
    except ValueError:
        pass
    else:
        raise BadWeights(f"'{word}' is no domain name; is its weight missing?")
    try:
        return parse_name(word).lower()
    except BadName as e:
        raise BadWeights(str(e)) from None


def _address(word: str) -> bytes:
    try:
        return ipaddress.ip_address(word).packed
    except ValueError:
        raise BadWeights(f"'{word}' is no IP address") from None


def _weight(word: str) -> int:
    if word.isascii() and word.isdecimal() and 1 <= int(word) <= MAX_WEIGHT:
        return int(word)
    raise BadWeights(f"weight must be in range [1, {MAX_WEIGHT}]: {word}")


# --- the Corefile -------------------------------------------------------------------------


def setup(directives: list[Directive], cx: Setup) -> list[Plugin]:
    """`loadbalance [round_robin | weighted FILE] { reload DURATION; prefer CIDR... }`"""
    directive = cx.once(directives)
    path = _policy_file(directive, cx)
    interval = RELOAD
    preferred: list[Network] = []
    for option in directive.options or ():
        match option.name:
            case "reload":
                if cx.arg_count(option, 1, 1):
                    interval = cx.duration(option.args[0])
                if path is None:
                    cx.problems.error(
                        option.word, "'reload' belongs to the weighted policy: weighted FILE"
                    )
            case "prefer":
                preferred += _networks(option, cx)
            case _:
                cx.unknown_option(option, ("reload", "prefer"))
    policy: Policy = RoundRobin(cx.random)
    if path is not None:
        policy = Weighted(cx.random, cx.logger("loadbalance"), path, interval)
    return [LoadBalance(policy, preferred)]


def _policy_file(directive: Directive, cx: Setup) -> str | None:
    """Return the weight file of the weighted policy, None for the other one."""
    if not directive.args:
        return None
    policy = directive.args[0]
    if policy.text == WEIGHTED:
        if len(directive.args) < 2:
            cx.problems.error(policy, "missing weight file: write weighted FILE")
            return ""
        cx.arg_count(directive, 2, 2)
        return cx.path(directive.args[1].text)
    if policy.text != ROUND_ROBIN:
        cx.problems.error(
            policy,
            f"unknown policy: {policy}"
            + (nearest(policy.text, POLICIES) or f" (known: {', '.join(POLICIES)})"),
        )
        return None
    cx.arg_count(directive, 1, 1)
    return None


def _networks(option: Option, cx: Setup) -> list[Network]:
    if not cx.arg_count(option, 1):
        return []
    return [network for token in option.args if (network := _network(token, cx)) is not None]


def _network(token: Token, cx: Setup) -> Network | None:
    try:
        if "/" not in token.text:
            raise ValueError
        return ipaddress.ip_network(token.text, strict=False)
    except ValueError:
        cx.problems.error(token, f"invalid CIDR '{token}'; write it as 10.9.20.0/24")
        return None
