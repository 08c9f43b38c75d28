"""What nftables rules ask of a packet and do with it: each statement as a value.

Decides whether a packet, as it is seen at one place on its way, fits an expression (nft(8)),
and what a set or map holds for it. Reading statements from text is nftables_text.py's; in
which order they are asked, and what becomes of the packet, is packet_nftables.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Final, Generic, Literal, TypeAlias, TypeVar

from kdns.proxy.matches import (
    MULTICAST,
    Answer,
    Assumed,
    Flow,
    Memory,
    Never,
    NotUnderstood,
    render_address,
)
from kdns.proxy.rule import Redirect, Rewrite, Target

T = TypeVar("T")
# Addresses, protocols, ports, marks and flags are numbers; interfaces are known by name.
Value: TypeAlias = int | str

PROTOCOLS: Final[Mapping[str, int]] = {
    "icmp": 1, "igmp": 2, "tcp": 6, "udp": 17, "dccp": 33, "gre": 47, "esp": 50, "ah": 51,
    "icmpv6": 58, "ipv6-icmp": 58, "ospf": 89, "comp": 108, "sctp": 132, "udplite": 136,
}  # fmt: skip
# Bits, as the kernel has them (nf_conntrack_common.h, tcp.h).
STATES: Final[Mapping[str, int]] = {
    "invalid": 1, "established": 2, "related": 4, "new": 8, "untracked": 64,
}  # fmt: skip
STATUS: Final[Mapping[str, int]] = {"snat": 0x10, "dnat": 0x20}
TCP_FLAGS: Final[Mapping[str, int]] = {
    "fin": 1, "syn": 2, "rst": 4, "psh": 8, "ack": 16, "urg": 32, "ecn": 64, "cwr": 128,
}  # fmt: skip
ADDRESS_TYPES: Final[Mapping[str, int]] = {"local": 2, "multicast": 5}
NF_PROTO: Final[Mapping[str, int]] = {"ipv4": 2, "ipv6": 10}
ETHER_TYPES: Final[Mapping[str, int]] = {"ip": 0x0800, "ip6": 0x86DD, "arp": 0x0806}


# --- What a packet has --------------------------------------------------------------------------


def _port(of_source: bool, *protocols: str) -> Callable[[Flow], int | None]:
    """A port, where the packet is of one of these protocols."""

    def read(flow: Flow) -> int | None:
        if flow.protocol not in protocols:
            return None
        return flow.source_port if of_source else flow.port

    return read


def _address(of_source: bool, version: int) -> Callable[[Flow], int | None]:
    def read(flow: Flow) -> int | None:
        if flow.version != version:
            return None
        return flow.source if of_source else flow.destination

    return read


def _address_type(of_source: bool) -> Callable[[Flow], int]:
    def read(flow: Flow) -> int:
        address = flow.source if of_source else flow.destination
        if flow.host.is_local(flow.version, address):
            return ADDRESS_TYPES["local"]
        network, mask = MULTICAST[flow.version]
        return ADDRESS_TYPES["multicast"] if address & mask == network else 0

    return read


def _status(flow: Flow) -> int:
    return (STATUS["dnat"] if flow.dnat else 0) | (STATUS["snat"] if flow.snat else 0)


def _tcp_flags(flow: Flow) -> int | None:
    """A first packet is a SYN, every other an ACK."""
    if flow.protocol != "tcp":
        return None
    return TCP_FLAGS["syn" if flow.state == "NEW" else "ack"]


def _absent(flow: Flow) -> None:
    """What no TCP, UDP or SCTP packet has."""


_Read: TypeAlias = Callable[[Flow], Value | None]
# Words -> the type of what they stand for, and how it is read off a packet; None: the packet
# has no such thing, and the rule ends there.
FIELDS: Final[Mapping[str, tuple[str, _Read]]] = {
    "ip saddr": ("ipv4_addr", _address(True, 4)),
    "ip daddr": ("ipv4_addr", _address(False, 4)),
    "ip6 saddr": ("ipv6_addr", _address(True, 6)),
    "ip6 daddr": ("ipv6_addr", _address(False, 6)),
    "ip protocol": ("inet_proto", lambda f: PROTOCOLS[f.protocol] if f.version == 4 else None),
    "ip6 nexthdr": ("inet_proto", lambda f: PROTOCOLS[f.protocol] if f.version == 6 else None),
    "meta l4proto": ("inet_proto", lambda f: PROTOCOLS[f.protocol]),
    "meta nfproto": ("nf_proto", lambda f: NF_PROTO[f"ipv{f.version}"]),
    "meta protocol": ("ether_type", lambda f: ETHER_TYPES["ip" if f.version == 4 else "ip6"]),
    "meta mark": ("mark", lambda f: f.mark),
    "iifname": ("ifname", lambda f: f.interface),
    "oifname": ("ifname", lambda f: f.out_interface),
    "iif": ("ifname", lambda f: f.interface),
    "oif": ("ifname", lambda f: f.out_interface),
    "th sport": ("inet_service", _port(True, "tcp", "udp", "sctp")),
    "th dport": ("inet_service", _port(False, "tcp", "udp", "sctp")),
    "tcp sport": ("inet_service", _port(True, "tcp")),
    "tcp dport": ("inet_service", _port(False, "tcp")),
    "udp sport": ("inet_service", _port(True, "udp")),
    "udp dport": ("inet_service", _port(False, "udp")),
    "sctp sport": ("inet_service", _port(True, "sctp")),
    "sctp dport": ("inet_service", _port(False, "sctp")),
    "ct state": ("ct_state", lambda f: STATES[f.state.lower()]),
    "ct status": ("ct_status", _status),
    "tcp flags": ("tcp_flag", _tcp_flags),
    "fib saddr type": ("fib_addrtype", _address_type(True)),
    "fib daddr type": ("fib_addrtype", _address_type(False)),
    "icmp type": ("other", _absent),
    "icmp code": ("other", _absent),
    "icmpv6 type": ("other", _absent),
    "icmpv6 code": ("other", _absent),
}


@dataclass(frozen=True, slots=True)
class Field:
    """One thing a packet has. text -- a word of FIELDS"""

    text: str

    @property
    def datatype(self) -> str:
        return FIELDS[self.text][0]

    def of(self, flow: Flow) -> Value | None:
        return FIELDS[self.text][1](flow)


@dataclass(frozen=True, slots=True)
class MarkBits:
    """The mark without `mask`, xor `value`."""

    value: int
    mask: int
    datatype: str = "mark"

    def of(self, flow: Flow) -> int:
        return (flow.mark & ~self.mask) ^ self.value


@dataclass(frozen=True, slots=True)
class Numgen:
    """A number from `offset` on, each of `modulus` with the same chance: `inc` counts, but
    where it stands a packet cannot know."""

    modulus: int
    offset: int = 0
    datatype: str = "integer"


Key: TypeAlias = tuple[Field | MarkBits | Numgen, ...]


def values_of(key: Key, flow: Flow) -> Iterator[tuple[Fraction, tuple[Value, ...] | None]]:
    """Yield what a key may be, with its chance; None: the packet has no such thing."""
    if isinstance(key[0], Numgen):  # always alone
        share = Fraction(1, key[0].modulus)
        for number in range(key[0].modulus):
            yield share, (number + key[0].offset,)
        return
    found: list[Value] = []
    for one in key:
        value = None if isinstance(one, Numgen) else one.of(flow)
        if value is None:
            yield Fraction(1), None
            return
        found.append(value)
    yield Fraction(1), tuple(found)


# --- Sets and maps ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from low to high, both included."""

    low: int
    high: int


@dataclass(frozen=True, slots=True)
class Prefix:
    """Names that begin so."""

    text: str


Part: TypeAlias = int | str | Range | Prefix


def _covers(part: Part, value: Value) -> bool:
    if isinstance(part, Range):
        return isinstance(value, int) and part.low <= value <= part.high
    if isinstance(part, Prefix):
        return isinstance(value, str) and value.startswith(part.text)
    return part == value


class Members(Generic[T]):
    """What a set or map holds: for a set True, for a map what the key leads to."""

    __slots__ = ("exact", "other", "rest")

    def __init__(self) -> None:
        self.exact: dict[tuple[Part, ...], T] = {}
        self.rest: dict[tuple[Part, ...], T] = {}
        self.other: T | None = None  # of "*"

    def add(self, parts: tuple[Part, ...], value: T) -> None:
        plain = all(isinstance(part, (int, str)) for part in parts)
        (self.exact if plain else self.rest)[parts] = value

    def remove(self, parts: tuple[Part, ...]) -> bool:
        """Return whether it was there."""
        for held in (self.exact, self.rest):
            if parts in held:
                del held[parts]
                return True
        return False

    def find(self, values: tuple[Value, ...]) -> T | None:
        found = self.exact.get(values)
        if found is not None:
            return found
        for parts, value in self.rest.items():
            if all(map(_covers, parts, values)):
                return value
        return self.other

    def copy(self) -> Members[T]:
        other: Members[T] = Members()
        other.exact, other.rest, other.other = {**self.exact}, {**self.rest}, self.other
        return other


@dataclass(frozen=True, slots=True)
class Destination:
    """What a map of `dnat to` leads to. port 0: stays as it is"""

    address: str
    port: int


# What maps lead to: a verdict (None: `continue`, the next statement), or where to.
Led: TypeAlias = "Target | Destination | bool"


@dataclass(slots=True)
class NamedSet:
    """A set or map of a table.

    datatypes -- of the parts of its keys; empty: not known, and so are its elements
    leads     -- a map: to a "verdict", or a "destination"; a set: ""
    timeout   -- seconds that what rules put into it stays; 0: for ever
    clients   -- what rules put into it, as the text had it: key -> seconds since
    """

    name: str
    datatypes: tuple[str, ...] = ()
    leads: str = ""
    timeout: float = 0.0
    members: Members[Led] = field(default_factory=Members)
    clients: dict[str, float] = field(default_factory=dict)

    def find(self, values: tuple[Value, ...], recent: Memory) -> Led | None:
        """Return what the key leads to; True where it is a member of a set."""
        found = self.members.find(values)
        if found is not None or not recent:
            return found
        age = recent.get((self.name, self.spell(values)))
        return True if age is not None and (not self.timeout or age < self.timeout) else None

    def spell(self, values: tuple[Value, ...]) -> str:
        """Return a key as text: what a Memory knows it by."""
        return " . ".join(map(_spell, self.datatypes, values))

    def copy(self) -> NamedSet:
        return replace(self, members=self.members.copy(), clients={**self.clients})


_NUMBERED: Final = {number: name for name, number in PROTOCOLS.items()}


def _spell(datatype: str, value: Value) -> str:
    if isinstance(value, int):
        if datatype in ("ipv4_addr", "ipv6_addr"):
            return render_address(4 if datatype == "ipv4_addr" else 6, value)
        if datatype == "inet_proto":
            return _NUMBERED.get(value, str(value))
    return str(value)


# A set by its name, or one that stands in the rule itself.
Among: TypeAlias = "str | Members[Led]"
Sets: TypeAlias = Mapping[str, NamedSet]


def look_up(among: Among, values: tuple[Value, ...], sets: Sets, recent: Memory) -> Led | None:
    """Return what a key leads to; None: it is no member."""
    if isinstance(among, str):
        return sets[among].find(values, recent)
    return among.find(values)


# --- Statements ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Compare:
    """The key is a member of a set, or equal to the one value of it."""

    key: Key
    among: Among
    negated: bool = False

    def holds(self, flow: Flow, sets: Sets) -> Answer:
        share = Fraction(0)
        for chance, values in values_of(self.key, flow):
            if values is None:
                return False
            if (look_up(self.among, values, sets, flow.recent) is not None) != self.negated:
                share += chance
        return bool(share) if share.denominator == 1 else share


@dataclass(frozen=True, slots=True)
class Bits:
    """Of the bits in `mask` any is set; with a `value`, those of the value and no others."""

    of: Field
    mask: int
    value: int | None = None
    negated: bool = False

    def holds(self, flow: Flow, sets: Sets) -> bool:
        seen = self.of.of(flow)
        if not isinstance(seen, int):
            return False
        found = bool(seen & self.mask) if self.value is None else seen & self.mask == self.value
        return found != self.negated


@dataclass(frozen=True, slots=True)
class VerdictMap:
    """`vmap`: what the key leads to is done."""

    key: Key
    among: Among


@dataclass(frozen=True, slots=True)
class RewriteMap:
    """`dnat to ... map`, `snat to ... map`."""

    of_source: bool
    key: Key
    among: Among


@dataclass(frozen=True, slots=True)
class Remember:
    """`update`, `add`, `delete @set { key }`."""

    action: Literal["update", "add", "delete"]
    name: str
    key: Key


@dataclass(frozen=True, slots=True)
class Do:
    """A verdict, a translation, or what changes the packet's mark."""

    target: Target


Statement: TypeAlias = (
    Compare | Bits | VerdictMap | RewriteMap | Remember | Do | Assumed | Never | NotUnderstood
)


def remembered(flow: Flow, what: Remember, sets: Sets) -> tuple[Flow, str] | None:
    """Return the packet with what the sets hold afterwards, and the key that is meant; None:
    the packet has no such key."""
    ((_, values),) = values_of(what.key, flow)
    if values is None:
        return None
    text = sets[what.name].spell(values)
    place = what.name, text
    if what.action == "delete":
        rest = {key: age for key, age in flow.recent.items() if key != place}
        return replace(flow, recent=rest), text
    there = sets[what.name].find(values, flow.recent)
    if what.action == "add" and there is not None:
        return flow, text  # as old as it was
    return replace(flow, recent={**flow.recent, place: 0.0}), text


def names_in(statement: Statement) -> Iterator[str]:
    """Yield the sets that a statement names."""
    if isinstance(statement, (Compare, VerdictMap, RewriteMap)):
        if isinstance(statement.among, str):
            yield statement.among
    elif isinstance(statement, Remember):
        yield statement.name


TRANSLATIONS: Final = (Rewrite, Redirect)
