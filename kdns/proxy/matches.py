"""What iptables rules ask of a packet: each match as a value that answers for itself.

Decides whether a packet, as it is seen at one place on its way, fits one condition of a rule
(iptables-extensions(8)). Which rules are asked, and in which order, is packet.py's; reading
them from text is ruleset.py's.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Literal, Protocol, TypeAlias

# Which lists of the `recent` match remember which client: (list, address) -> seconds since.
Memory: TypeAlias = Mapping[tuple[str, str], float]
# True, False, or the chance that it is true.
Answer: TypeAlias = bool | Fraction
ConnectionState: TypeAlias = Literal["NEW", "ESTABLISHED", "RELATED", "INVALID", "UNTRACKED"]

LOOPBACK = {4: (0x7F000000, 0xFF000000), 6: (1, (1 << 128) - 1)}  # 127.0.0.0/8, ::1
MULTICAST = {4: (0xE0000000, 0xF0000000), 6: (0xFF << 120, 0xFF << 120)}  # RFC 5771, RFC 4291
LO = "lo"


class Host:
    """The node whose rules are walked.

    addresses -- its own, of either family; 127.0.0.0/8 and ::1 always are among them
    routes    -- CIDR -> interface that packets there leave by, the longest prefix first served.
                 Only `-o` asks for it; where nothing is said, it fits no name
    """

    __slots__ = ("_local", "_routes", "addresses")

    def __init__(
        self, addresses: Iterable[str] = (), routes: Mapping[str, str] | None = None
    ) -> None:
        self.addresses = tuple(addresses)
        parsed = [ipaddress.ip_address(a) for a in self.addresses]
        self._local = frozenset((a.version, int(a)) for a in parsed)
        networks = [(ipaddress.ip_network(c), name) for c, name in (routes or {}).items()]
        networks.sort(key=lambda pair: -pair[0].prefixlen)
        self._routes = tuple(
            (n.version, int(n.network_address), int(n.netmask), name) for n, name in networks
        )

    def is_local(self, version: int, address: int) -> bool:
        """True if packets to the address stay on the node."""
        network, mask = LOOPBACK[version]
        return address & mask == network or (version, address) in self._local

    def way_out(self, version: int, address: int) -> str:
        """Return the interface for packets to the address; "" if nobody said."""
        if self.is_local(version, address):
            return LO
        for family, network, mask, name in self._routes:
            if family == version and address & mask == network:
                return name
        return ""

    def first_address(self, version: int) -> str:
        """Return the node's first address of a family; "" if it has none."""
        return next((a for a in self.addresses if (":" in a) == (version == 6)), "")


@dataclass(frozen=True, slots=True)
class Flow:
    """A packet as rules see it at one place.

    version               -- 4 or 6
    source, destination   -- addresses as numbers
    interface, out_interface -- "" where the hook has none
    dnat, snat            -- conntrack's status: the destination, the source was rewritten
    """

    host: Host
    version: int
    source: int
    destination: int
    protocol: str
    source_port: int
    port: int
    interface: str = ""
    out_interface: str = ""
    state: ConnectionState = "NEW"
    dnat: bool = False
    snat: bool = False
    mark: int = 0
    recent: Memory = field(default_factory=dict)


class Match(Protocol):
    """One condition of a rule."""

    def holds(self, flow: Flow) -> Answer:
        """Say whether the packet fits."""
        ...


@dataclass(frozen=True, slots=True)
class Address:
    """`-s`, `-d`."""

    of_source: bool
    network: int
    mask: int
    negated: bool

    def holds(self, flow: Flow) -> bool:
        address = flow.source if self.of_source else flow.destination
        return (address & self.mask == self.network) != self.negated


@dataclass(frozen=True, slots=True)
class Interface:
    """`-i`, `-o`; prefix: the name was written with a `+`."""

    incoming: bool
    name: str
    prefix: bool
    negated: bool

    def holds(self, flow: Flow) -> bool:
        seen = flow.interface if self.incoming else flow.out_interface
        return (seen.startswith(self.name) if self.prefix else seen == self.name) != self.negated


@dataclass(frozen=True, slots=True)
class ProtocolIs:
    """`-p`."""

    name: str
    negated: bool

    def holds(self, flow: Flow) -> bool:
        return (flow.protocol == self.name) != self.negated


@dataclass(frozen=True, slots=True)
class Ports:
    """`--sport`, `--dport`, and multiport's `--ports`, which means either side."""

    ranges: tuple[tuple[int, int], ...]
    of_source: bool
    of_destination: bool
    negated: bool

    def holds(self, flow: Flow) -> bool:
        found = any(
            (self.of_destination and low <= flow.port <= high)
            or (self.of_source and low <= flow.source_port <= high)
            for low, high in self.ranges
        )
        return found != self.negated


@dataclass(frozen=True, slots=True)
class TcpFlags:
    """`--tcp-flags`, `--syn`. A first packet is a SYN, every other an ACK."""

    looked_at: frozenset[str]
    wanted: frozenset[str]
    negated: bool

    def holds(self, flow: Flow) -> bool:
        flags = {"SYN"} if flow.state == "NEW" else {"ACK"}
        return (flags & self.looked_at == self.wanted) != self.negated


@dataclass(frozen=True, slots=True)
class AddressType:
    """addrtype: the address is one of the node's (LOCAL), or MULTICAST."""

    of_source: bool
    kinds: frozenset[str]
    negated: bool

    def holds(self, flow: Flow) -> bool:
        address = flow.source if self.of_source else flow.destination
        network, mask = MULTICAST[flow.version]
        found = ("LOCAL" in self.kinds and flow.host.is_local(flow.version, address)) or (
            "MULTICAST" in self.kinds and address & mask == network
        )
        return found != self.negated


@dataclass(frozen=True, slots=True)
class State:
    """conntrack's `--ctstate`: the state, or the DNAT and SNAT status beside it."""

    states: frozenset[str]
    negated: bool

    def holds(self, flow: Flow) -> bool:
        found = (
            flow.state in self.states
            or (flow.dnat and "DNAT" in self.states)
            or (flow.snat and "SNAT" in self.states)
        )
        return found != self.negated


@dataclass(frozen=True, slots=True)
class MarkIs:
    """`--mark`."""

    value: int
    mask: int
    negated: bool

    def holds(self, flow: Flow) -> bool:
        return (flow.mark & self.mask == self.value) != self.negated


@dataclass(frozen=True, slots=True)
class Chance:
    """statistic: true for this share of all packets."""

    share: Fraction

    def holds(self, flow: Flow) -> Fraction:
        return self.share


@dataclass(frozen=True, slots=True)
class Recent:
    """recent: whether a list remembers the address, and what it remembers afterwards.

    seconds -- older memories do not count; 0: however old
    mask    -- what of the address is remembered
    """

    name: str
    action: Literal["set", "rcheck", "update", "remove"]
    seconds: int
    mask: int
    of_source: bool
    negated: bool

    def _key(self, flow: Flow) -> tuple[str, str]:
        address = (flow.source if self.of_source else flow.destination) & self.mask
        return self.name, render_address(flow.version, address)

    def _found(self, flow: Flow) -> bool:
        if self.action == "set":
            return True
        age = flow.recent.get(self._key(flow))
        return age is not None and (
            self.action == "remove" or not self.seconds or age <= self.seconds
        )

    def holds(self, flow: Flow) -> bool:
        return self._found(flow) != self.negated

    def remember(self, flow: Flow) -> Flow:
        """Return the packet with the lists as they are once this match was asked."""
        if self.action == "rcheck" or not self._found(flow):
            return flow
        key = self._key(flow)
        rest = {k: age for k, age in flow.recent.items() if k != key}
        return replace(flow, recent=rest if self.action == "remove" else {**rest, key: 0.0})


@dataclass(frozen=True, slots=True)
class Assumed:
    """Something true that a packet alone cannot show: `text` says what was assumed."""

    text: str

    def holds(self, flow: Flow) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class Counter:
    """nfacct: counts, and is always true."""

    name: str

    def holds(self, flow: Flow) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class Never:
    """Asks for what no TCP, UDP or SCTP packet has, such as an ICMP type."""

    text: str

    def holds(self, flow: Flow) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class NotUnderstood:
    """A match or target that kdns does not know, where reading was told to go on. It is taken
    not to fit; a walk that meets it says so."""

    text: str

    def holds(self, flow: Flow) -> bool:
        return False


def render_address(version: int, address: int) -> str:
    """Return an address in its usual text form."""
    if version == 4:
        return str(ipaddress.IPv4Address(address))
    return str(ipaddress.IPv6Address(address))


def render_socket(address: str, port: int) -> str:
    """Return "address:port", an IPv6 address in brackets."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
