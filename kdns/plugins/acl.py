"""`acl`: who may ask what: allow, block (REFUSED), filter (empty) or drop.

Decides by the address a query came from, its type and its name; the first rule that fits
decides, in the order of the Corefile. What no rule fits is allowed.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence

from kdns.corefile import Directive, Option, Token, nearest
from kdns.dns import ede
from kdns.dns import types as t
from kdns.dns.ede import Ede
from kdns.dns.message import FOREVER, Edns, Query, Reply
from kdns.dns.name import ancestors, render_name
from kdns.metrics import Cell, Family
from kdns.plugins.plugin import DROP, Outcome, Plugin
from kdns.plugins.setup import Setup

ALLOW, BLOCK, FILTER, DROP_IT = "allow", "block", "filter", "drop"
ACTIONS = (ALLOW, BLOCK, FILTER, DROP_IT)
SECTIONS = ("type", "net")
EVERY = "*"

# rcode and extended error (RFC 8914 s4.16, s4.18) of what is answered here
ANSWERS = {BLOCK: (t.REFUSED, ede.BLOCKED), FILTER: (t.NOERROR, ede.FILTERED)}
WORDS = {BLOCK: "blocked", FILTER: "filtered"}
MAX_UDP = 4096
SOMEBODY = (32, 0)  # stands for the client where no rule asks who it is

COUNTED = {
    BLOCK: ("coredns_acl_blocked_requests_total", "Queries refused by a rule."),
    FILTER: ("coredns_acl_filtered_requests_total", "Queries answered empty by a rule."),
    DROP_IT: ("coredns_acl_dropped_requests_total", "Queries dropped by a rule."),
}

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class NetworkSet:
    """Networks as sets of prefixes: one look-up for each prefix length in use, so at most 33
    for IPv4 and 129 for IPv6 however many networks there are."""

    __slots__ = ("_by_bits",)

    def __init__(self, networks: Iterable[Network]) -> None:
        found: dict[int, dict[int, set[int]]] = {32: {}, 128: {}}
        for network in networks:
            bits = network.max_prefixlen
            shift = bits - network.prefixlen
            prefix = int(network.network_address) >> shift
            found[bits].setdefault(shift, set()).add(prefix)
        # Shortest prefix first: it is the one most addresses fall under.
        self._by_bits = {
            bits: tuple((shift, frozenset(by_shift[shift])) for shift in sorted(by_shift)[::-1])
            for bits, by_shift in found.items()
        }

    def holds(self, bits: int, address: int) -> bool:
        """True if the address, a number of `bits` bits, is in one of the networks."""
        return any(address >> shift in prefixes for shift, prefixes in self._by_bits[bits])


class Policy:
    """One line. qtypes None: all types; networks None: all addresses."""

    __slots__ = ("action", "networks", "qtypes")

    def __init__(
        self, action: str, qtypes: frozenset[int] | None, networks: NetworkSet | None
    ) -> None:
        self.action = action
        self.qtypes = qtypes
        self.networks = networks


class Rule:
    """One directive: its zones with their text, and its policies in order."""

    __slots__ = ("policies", "zones")

    def __init__(self, zones: Iterable[bytes], policies: Sequence[Policy]) -> None:
        self.zones = {zone: render_name(zone) for zone in zones}
        self.policies = tuple(policies)

    def zone_of(self, names: Sequence[bytes]) -> str | None:
        """Return the longest zone that holds a name, given as its ancestors."""
        for name in names:
            zone = self.zones.get(name)
            if zone is not None:
                return zone
        return None

    def action(self, qtype: int, client: tuple[int, int] | None) -> str | None:
        """Return what to do for a client (bits, number), None if no policy fits. An address
        that cannot be read is blocked."""
        if client is None:
            return BLOCK
        for policy in self.policies:
            qtypes, networks = policy.qtypes, policy.networks
            if (qtypes is None or qtype in qtypes) and (
                networks is None or networks.holds(*client)
            ):
                return policy.action
        return None


def client_number(host: str) -> tuple[int, int] | None:
    """Return (bits, address as a number) of a client; an IPv4-mapped one counts as IPv4."""
    try:
        a, b, c, d = host.split(".")
        return 32, int(a) << 24 | int(b) << 16 | int(c) << 8 | int(d)
    except ValueError:
        pass
    try:
        address = ipaddress.IPv6Address(host)
    except ValueError:
        return None
    mapped = address.ipv4_mapped
    return (32, int(mapped)) if mapped is not None else (128, int(address))


class Acl(Plugin):
    """Rules that look at nothing but name and type, so that replies may be repeated."""

    word = "acl"

    def __init__(self, cx: Setup, rules: Sequence[Rule]) -> None:
        self._rules = tuple(rules)
        self._server = cx.facts.label
        self._explains = True
        self._log = cx.logger("acl")
        self._counted: dict[str, Family] = {
            action: cx.metrics.counter(name, text, ("server", "zone", "view"))
            for action, (name, text) in COUNTED.items()
        }
        self._allowed: Cell = cx.metrics.counter(
            "coredns_acl_allowed_requests_total",
            "Queries that no rule kept from going on.",
            ("server", "view"),
        ).labels(self._server, "")

    def link(self, chain: Sequence[Plugin]) -> None:
        self._explains = all(plugin.explains for plugin in chain)

    def on_query(self, query: Query) -> Outcome:
        names = ancestors(query.key)
        client = client_number(query.client[0]) if self.per_client else SOMEBODY
        if client is None:
            self._log.error("Blocking a query from an unreadable address: %s", query.client[0])
        for rule in self._rules:
            zone = rule.zone_of(names)
            if zone is None:
                continue
            action = rule.action(query.qtype, client)
            if action is None:
                continue
            if action == ALLOW:
                return None
            return self._turn_away(query, action, zone)
        return None

    def _turn_away(self, query: Query, action: str, zone: str) -> Outcome:
        cell = self._counted[action].labels(self._server, zone, "")
        if action == DROP_IT:
            cell.add()
            return DROP
        rcode, reason = ANSWERS[action]
        reply = Reply(rcode, flags=0, served_by="acl", keep=FOREVER)
        reply.edns = Edns(MAX_UDP, options=[(ede.OPTION, reason.to_bytes(2, "big"))])
        if query.edns is not None and self._explains:
            whom = " for this client" if self.per_client else ""
            reply.ede = Ede(reason, f"{WORDS[action]} by a rule of acl for {zone}{whom}")
        reply.count(cell)
        return reply

    def on_reply(self, query: Query, reply: Reply) -> Reply:
        # Only what was let through comes back up this way.
        reply.count(self._allowed)
        return reply


class AclByClient(Acl):
    """Rules some of which look at the client's address."""

    per_client = True


# --- the Corefile -------------------------------------------------------------------------


def setup(directives: list[Directive], cx: Setup) -> list[Plugin]:
    """`acl [ZONES...] { allow|block|filter|drop [type QTYPE...] [net SOURCE...] }`, any
    number of times"""
    rules = []
    for directive in directives:
        policies = [p for option in directive.options or () if (p := _policy(option, cx))]
        if not directive.options:
            cx.problems.warn(directive.word, "'acl' without a rule allows everything")
        rules.append(Rule(cx.zones(directive.args), policies))
    by_client = any(p.networks is not None for rule in rules for p in rule.policies)
    return [(AclByClient if by_client else Acl)(cx, rules)]


def _policy(option: Option, cx: Setup) -> Policy | None:
    action = option.name.lower()
    if action not in ACTIONS:
        cx.problems.error(
            option.word,
            f"unexpected token '{option.name}'; expect 'allow', 'block', 'filter' or 'drop'"
            + nearest(action, ACTIONS),
        )
        return None
    sections = _sections(option, cx)
    qtypes: frozenset[int] | None = None
    networks: NetworkSet | None = None
    types, nets = sections.get("type", ()), sections.get("net", ())
    if types and not any(token.text == EVERY for token in types):
        qtypes = frozenset(n for token in types if (n := _qtype(token, cx)) is not None)
    if nets and not any(token.text == EVERY for token in nets):
        networks = NetworkSet(net for token in nets if (net := _network(token, cx)) is not None)
    return Policy(action, qtypes, networks)


def _sections(option: Option, cx: Setup) -> dict[str, list[Token]]:
    """Return the words after `type` and after `net`; a section may come several times."""
    found: dict[str, list[Token]] = {}
    current: list[Token] | None = None
    opened: Token | None = None
    for token in option.args:
        if token.text.lower() in SECTIONS:
            _not_empty(opened, current, cx)
            opened, current = token, found.setdefault(token.text.lower(), [])
        elif current is None:
            cx.problems.error(
                token,
                f"unexpected token '{token}'; expect 'type' or 'net'"
                + nearest(token.text, SECTIONS),
            )
            return found
        else:
            current.append(token)
    _not_empty(opened, current, cx)
    return found


def _not_empty(opened: Token | None, words: list[Token] | None, cx: Setup) -> None:
    if opened is not None and not words:
        cx.problems.error(opened, f"'{opened}' needs at least one word behind it, or '*' for all")


def _qtype(token: Token, cx: Setup) -> int | None:
    number = t.type_number(token.text)
    if number is None:
        cx.problems.error(
            token,
            f"unexpected token '{token}'; expect legal QTYPE"
            + nearest(token.text, [name.lower() for name in t.TYPES]),
        )
    return number


def _network(token: Token, cx: Setup) -> Network | None:
    try:
        return ipaddress.ip_network(token.text, strict=False)
    except ValueError:
        cx.problems.error(
            token, f"illegal CIDR notation '{token}'; write it as 192.168.0.0/16 or 192.0.2.1"
        )
        return None
