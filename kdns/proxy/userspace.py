"""Forwarding table -> the userspace mode: local sockets, what leads packets to them, and which
endpoint is next.

Each Service port has one door or a few: local sockets that accept what the kernel redirects to
them (reference 2.3). What a door does is proxy/table.py's decision; doors differ only where that
decision does: by traffic policy, and by source ranges. Here they are named, given a preferred
port or, with no root, a loopback address, and spelled as portal rules. Which endpoint a new
connection gets is chosen here, too: round robin, with affinity. Sockets and time are kernel/'s.

Not kept in this mode, as it never was: the client's address, and SCTP.
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping
from ipaddress import ip_address, ip_network
from random import Random
from typing import Final, Literal, NamedTuple, TypeAlias

from kdns.errors import ConfigError, Problem
from kdns.proxy.iptables_rules import RuleSet, append_lines
from kdns.proxy.options import Family, Options, Protocol
from kdns.proxy.table import (
    Decision,
    Forwarding,
    ForwardingTable,
    Frontend,
    Origin,
    decide,
)
from kdns.registry.endpoints import MAX_PORT, Endpoint, canonical_address
from kdns.registry.objects import Key

PORTALS_CONTAINER: Final = "KUBE-PORTALS-CONTAINER"
PORTALS_HOST: Final = "KUBE-PORTALS-HOST"
NODE_PORT_CONTAINER: Final = "KUBE-NODEPORT-CONTAINER"
NODE_PORT_HOST: Final = "KUBE-NODEPORT-HOST"
NON_LOCAL: Final = "KUBE-NODEPORT-NON-LOCAL"
CHAINS: Final[Mapping[str, tuple[str, ...]]] = {
    "filter": (NON_LOCAL,),
    "nat": (PORTALS_CONTAINER, PORTALS_HOST, NODE_PORT_CONTAINER, NODE_PORT_HOST),
}

PROTOCOLS: Final[tuple[Protocol, ...]] = ("tcp", "udp")

# Where doors are put, from a hash of their name: so a restart finds them where flows that the
# kernel remembers lead to. Below are the node ports and, mostly, servers with a port of their
# own; up to 60999 Linux takes ports for what connects out, one at a time.
PORTS: Final = range(36000, 60000)
# The part of 127.0.0.0/8 that Services get without root. What others use lies below.
LOOPBACK: Final = (64, 128)
# Added to a port that only root may listen on: 53 becomes 10053.
UNPRIVILEGED: Final = 10_000

# Clients of one Service port whose endpoint is remembered; the one not heard of longest goes.
MAX_CLIENTS: Final = 65536
# Single rules that are deleted or inserted; beyond, a chain is written anew (see iptables.py).
MAX_DELETED: Final = 50
MAX_INSERTED: Final = 500

_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_./:-]{1,191}")


# --- doors ----------------------------------------------------------------------------------


class Door(NamedTuple):
    """The name of one local socket.

    name, protocol -- the Service port's
    policy -- which of its endpoints stand behind the door
    ranged -- clients must lie in the Service's source ranges
    """

    name: str
    protocol: Protocol
    policy: Literal["cluster", "local"]
    ranged: bool = False

    def __str__(self) -> str:
        ranged = ", source ranges" if self.ranged else ""
        return f"{self.name}/{self.protocol} ({self.policy}{ranged})"


def door_of(one: Forwarding, frontend: Frontend, origin: Origin, detects: bool) -> Door:
    """Return where a packet to `frontend` is led."""
    if frontend.kind == "cluster IP":
        policy_local = one.internal_local
    else:
        near = origin == "node" or (origin == "pod" and detects)
        policy_local = one.external_local and not near
    ranged = frontend.kind == "loadbalancer IP" and bool(one.source_ranges)
    return Door(one.name, one.protocol, "local" if policy_local else "cluster", ranged)


def origins(options: Options) -> tuple[Origin, ...]:
    """Return the origins that rules can tell apart."""
    return ("node", "outside") if options.detector is None else ("node", "pod", "outside")


def doors(one: Forwarding, options: Options) -> dict[Door, Decision]:
    """Return the doors of a Service port and what each does; none for a protocol that
    sockets of ours cannot carry."""
    if one.protocol not in PROTOCOLS:
        return {}
    detects = options.detector is not None
    found: dict[Door, Decision] = {}
    for frontend in one.frontends:
        for origin in origins(options):
            door = door_of(one, frontend, origin, detects)
            if door not in found:
                found[door] = decide(one, frontend.kind, origin, detects=detects)
    return found


def inner_door(one: Forwarding) -> tuple[Door, Decision]:
    """Return the one door there is without root: what the ClusterIP does for this node."""
    frontend = next(iter(one.frontends))
    door = door_of(one, frontend, "node", False)
    return door, decide(one, frontend.kind, "node", detects=False)


def admits(one: Forwarding, client: str) -> bool:
    """Say whether a client may use a ranged door of `one` (reference 1.5, FW chain)."""
    if one.node_in_ranges and client in one.load_balancer_ips:
        return True
    address = ip_address(client.partition("%")[0])
    return any(address in ip_network(text) for text in one.source_ranges)


def preferred_ports(door: Door, family: Family) -> Iterator[int]:
    """Yield every port of PORTS once, that of the door's name first."""
    digest = _digest(f"{door} IPv{family}")
    start = digest % len(PORTS)
    for step in range(len(PORTS)):
        yield PORTS[(start + step) % len(PORTS)]


# --- without root ---------------------------------------------------------------------------


class Place(NamedTuple):
    """A local address to listen on."""

    address: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port}"


# "namespace/service:port" and protocol -> where to listen.
PortMap: TypeAlias = Mapping[tuple[str, Protocol], Place]


def loopback_places(
    one: Forwarding, family: Family, lowest: int, tries: int = 16
) -> Iterator[Place]:
    """Yield where a Service port may listen with no root, the preferred place first.

    Each Service has an address of its own, and its ports are its own; IPv6 has one loopback
    address, and ports by hash. The same Service is at the same place on every machine, unless
    somebody else is there.

    lowest -- the first port that needs no privilege
    """
    if family == 6:
        door, _ = inner_door(one)
        for port in preferred_ports(door, 6):
            yield Place("::1", port)
        return
    port = one.port if one.port >= lowest else one.port + UNPRIVILEGED
    first, end = LOOPBACK
    for attempt in range(tries):
        digest = _digest(f"{'/'.join(one.key)} {attempt}")
        second = first + digest % (end - first)
        third, fourth = (digest >> 16) % 256, 1 + (digest >> 32) % 254
        yield Place(f"127.{second}.{third}.{fourth}", port)


def parse_portmap(texts: Iterable[str]) -> dict[tuple[str, Protocol], Place]:
    """Read `--portmap`: NAMESPACE/SERVICE[:PORT][/udp]=[ADDRESS:]LOCALPORT, several of them or
    one with commas. Raises ConfigError.

    A port with a name is asked for by it, or by Service alone where it has none.
    """
    found: dict[tuple[str, Protocol], Place] = {}
    for part in (part.strip() for text in texts for part in text.split(",")):
        if not part:
            continue
        name, _, local = part.partition("=")
        service, protocol = _service_and_protocol(name.strip())
        place = _place(local.strip())
        if place is None or service.count("/") != 1 or not all(service.split("/")):
            raise ConfigError([Problem(
                "--portmap", 0,
                f"{part!r} is not NAMESPACE/SERVICE[:PORT][/udp]=[ADDRESS:]PORT, as in"
                " default/web:http=8080 or kube-system/kube-dns:dns/udp=127.0.0.1:5353",
            )])  # fmt: skip
        if (service, protocol) in found:
            raise ConfigError([Problem("--portmap", 0, f"{service}/{protocol} is given twice")])
        found[service, protocol] = place
    return found


def _service_and_protocol(name: str) -> tuple[str, Protocol]:
    for protocol in PROTOCOLS:
        if name.endswith(f"/{protocol}"):
            return name.removesuffix(f"/{protocol}"), protocol
    return name, "tcp"


def _place(text: str) -> Place | None:
    """Read "[ADDRESS:]PORT"; None if it is not that."""
    host, _, port = text.rpartition(":")
    address = canonical_address(host.strip("[]")) if host else (4, "127.0.0.1")
    number = int(port) if port.isascii() and port.isdigit() and len(port) < 6 else 0
    return Place(address[1], number) if address and 0 < number <= MAX_PORT else None


# --- choosing an endpoint -------------------------------------------------------------------


class Affinity:
    """Which endpoint the clients of one Service port are at. Time is monotonic seconds.

    seconds -- a client stays so long after it was last heard of; 0: not at all
    """

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds
        # client -> (endpoint as "ip:port", until); the one not heard of longest first
        self._clients: OrderedDict[str, tuple[str, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._clients)

    def lookup(self, client: str, now: float) -> str | None:
        found = self._clients.get(client)
        return found[0] if found is not None and now < found[1] else None

    def note(self, client: str, endpoint: str, now: float) -> None:
        clients = self._clients
        clients[client] = endpoint, now + self.seconds
        clients.move_to_end(client)
        while len(clients) > MAX_CLIENTS:
            clients.popitem(last=False)
        for _ in range(2):  # so that what is over goes as fast as new clients come
            oldest = next(iter(clients))
            if now < clients[oldest][1]:
                break
            del clients[oldest]


class Balancer:
    """Round robin over the endpoints behind one door (reference 2.3).

    affinity -- shared by the doors of one Service port
    rng      -- shuffles the list when it changes, so that nodes do not all begin with one
    """

    def __init__(self, affinity: Affinity, rng: Random) -> None:
        self.affinity = affinity
        self._rng = rng
        self._endpoints: list[Endpoint] = []
        self._by_name: dict[str, Endpoint] = {}
        self._index = 0

    @property
    def endpoints(self) -> Collection[str]:
        """The endpoints as "ip:port"."""
        return self._by_name.keys()

    def replace(self, endpoints: Iterable[Endpoint]) -> None:
        """Take over a list of endpoints; the round begins anew if there are others in it."""
        by_name = {str(one): one for one in endpoints}
        if by_name.keys() == self._by_name.keys():
            return
        self._by_name = by_name
        self._endpoints = list(by_name.values())
        self._rng.shuffle(self._endpoints)
        self._index = 0

    def choose(self, client: str, now: float, tried: Collection[str] = ()) -> Endpoint | None:
        """Return the endpoint for a new connection of `client`; None if there is none.

        tried -- endpoints ("ip:port") that this connection could not reach: another one is
                 taken as long as there is one, and the client's affinity moves there
        """
        endpoints = self._endpoints
        if not endpoints:
            return None
        sticky = self.affinity.seconds > 0
        if sticky and not tried:
            name = self.affinity.lookup(client, now)
            at = self._by_name.get(name) if name is not None else None
            if at is not None:
                self.affinity.note(client, str(at), now)
                return at
        chosen = self._next()
        if tried:
            for _ in range(len(endpoints) - 1):
                if str(chosen) not in tried:
                    break
                chosen = self._next()
        if sticky:
            self.affinity.note(client, str(chosen), now)
        return chosen

    def _next(self) -> Endpoint:
        chosen = self._endpoints[self._index]
        self._index = (self._index + 1) % len(self._endpoints)
        return chosen


# --- rules ----------------------------------------------------------------------------------

# table, chain
_Chain: TypeAlias = tuple[str, str]
# What a frontend is claimed by: address ("": the node's), port, protocol.
_Claimed: TypeAlias = tuple[str, int, Protocol]


class _Claim(NamedTuple):
    """The rules of one Service port for one frontend, or of its doors."""

    empty: bool  # no endpoint: who has one comes first
    name: str
    rules: tuple[tuple[_Chain, int, str], ...]  # chain, section of it, rule


class PortalRules:
    """The portal rules of one family: those wanted, and those the kernel was last given.

    Does no I/O. address -- the node's, to which its own processes are led; "" : to loopback.
    Whoever gives a text to the kernel says so with committed().
    """

    def __init__(self, options: Options, address: str = "") -> None:
        self._options = options
        self._spelling = _Spelling(options, address)
        self._claims: dict[Key, dict[_Claimed, _Claim]] = {}
        self._of_doors: dict[Key, tuple[tuple[_Chain, int, str, str], ...]] = {}
        self._wanted: RuleSet | None = None
        self._committed: RuleSet | None = None

    def update(
        self,
        table: ForwardingTable,
        changed: Collection[Key] | None,
        ports: Mapping[Door, int],
    ) -> None:
        """Spell the Services in `changed` (None: all) anew; a door without a port gets no rule."""
        keys = table.services.keys() | self._claims.keys() if changed is None else changed
        for key in keys:
            claims: dict[_Claimed, _Claim] = {}
            of_doors: list[tuple[_Chain, int, str, str]] = []
            for one in table.services.get(key, ()):
                claims.update(self._spelling.claims(one, ports))
                of_doors += self._spelling.of_doors(one, ports)
            if claims != self._claims.get(key, {}) or tuple(of_doors) != self._of_doors.get(key):
                self._wanted = None
            if claims:
                self._claims[key], self._of_doors[key] = claims, tuple(of_doors)
            else:
                self._claims.pop(key, None)
                self._of_doors.pop(key, None)

    def wanted(self) -> RuleSet:
        """Return all rules of our chains as iptables-save prints them."""
        if self._wanted is None:
            self._wanted = self._compile()
        return self._wanted

    def _compile(self) -> RuleSet:
        # Of two Service ports that claim one frontend, the first with an endpoint gets it, as
        # in every mode (table.conflicts()).
        winners: dict[_Claimed, _Claim] = {}
        for claims in self._claims.values():
            for place, claim in claims.items():
                other = winners.get(place)
                if other is None or claim[:2] < other[:2]:
                    winners[place] = claim
        lines: dict[_Chain, list[tuple[int, str, _Claimed, int, str]]] = {}
        for place, claim in winners.items():
            for number, (chain, part, rule) in enumerate(claim.rules):
                lines.setdefault(chain, []).append((part, claim.name, place, number, rule))
        nowhere: _Claimed = ("", 0, "tcp")
        for of_doors in self._of_doors.values():
            for chain, part, name, rule in of_doors:
                lines.setdefault(chain, []).append((part, name, nowhere, 0, rule))
        for part, rule in _FIXED_NON_LOCAL:
            lines.setdefault(("filter", NON_LOCAL), []).append((part, "", nowhere, 0, rule))
        return {
            table: {
                chain: tuple(line[-1] for line in sorted(lines.get((table, chain), ())))
                for chain in chains
            }
            for table, chains in CHAINS.items()
        }

    def full(self, jumps: Mapping[str, str] | None = None) -> str:
        """Return the restore text (--noflush) that puts all chains as they must be.

        jumps -- lines to add behind, by table
        """
        return render_tables(self.wanted(), jumps or {})

    def partial(self) -> str:
        """Return the restore text of what differs from what was committed; "": nothing."""
        old, new = self._committed, self.wanted()
        if old is None:
            return self.full()
        texts = []
        for table, chains in new.items():
            declared, lines = "", ""
            for chain, rules in chains.items():
                whole, text = _difference(chain, old[table][chain], rules)
                declared += f":{chain} - [0:0]\n" if whole else ""
                lines += text
            if declared or lines:
                texts.append(f"*{table}\n{declared}{lines}COMMIT\n")
        return "".join(texts)

    def committed(self) -> None:
        """Note that the kernel now holds what is wanted."""
        self._committed = self.wanted()

    def counts(self) -> Mapping[str, int]:
        """Return the number of rules wanted in each table."""
        return {table: sum(map(len, chains.values())) for table, chains in self.wanted().items()}


def _difference(chain: str, old: tuple[str, ...], new: tuple[str, ...]) -> tuple[bool, str]:
    """Return (whether it is to be flushed first, the lines that lead from `old` to `new`)."""
    if old == new:
        return False, ""
    before, after = set(old), set(new)
    gone = [rule for rule in old if rule not in after]
    come = [(at, rule) for at, rule in enumerate(new, 1) if rule not in before]
    kept = [rule for rule in old if rule in after] == [rule for rule in new if rule in before]
    if not kept or len(gone) > MAX_DELETED or len(come) > MAX_INSERTED:
        return True, append_lines(chain, new)
    # By text, not number: if somebody changed the chain this fails and takes away nothing wrong.
    lines = [f"-D {chain} {rule}\n" for rule in gone]
    lines += [f"-I {chain} {at} {rule}\n" for at, rule in come]
    return False, "".join(lines)


def render_tables(rules: RuleSet, more: Mapping[str, str]) -> str:
    """Return a restore text that writes these chains anew, and then the lines of `more`."""
    texts = []
    for table, chains in rules.items():
        declared = "".join(f":{chain} - [0:0]\n" for chain in chains)
        lines = "".join(append_lines(chain, chains[chain]) for chain in chains)
        texts.append(f"*{table}\n{declared}{lines}{more.get(table, '')}COMMIT\n")
    return "".join(texts)


# Sections of KUBE-NODEPORT-NON-LOCAL. Its rules are for the first packet of a connection; what
# came through a portal may pass a host's firewall if it came for a node port, and nothing may
# come to a door directly: it would go around policies and source ranges.
_EARLY, _ACCEPTED, _PORTAL, _DIRECT = range(4)
_FIXED_NON_LOCAL: Final = (
    (_EARLY, "-m conntrack ! --ctstate NEW -j RETURN"),
    (_PORTAL, "-m conntrack --ctstate DNAT -j RETURN"),
)


class _Spelling:
    """The words of the portal rules of one family (reference 2.3)."""

    def __init__(self, options: Options, address: str) -> None:
        self._options = options
        v4 = options.family == 4
        self._width = "/32" if v4 else "/128"
        self._reject = f"-j REJECT --reject-with {'icmp' if v4 else 'icmp6'}-port-unreachable"
        self._host = f"[{address}]" if ":" in address else address
        self._pod = ("", "") if options.detector is None else _pod_match(options)

    def claims(
        self, one: Forwarding, ports: Mapping[Door, int]
    ) -> Iterator[tuple[_Claimed, _Claim]]:
        """Yield, by frontend, the rules that lead to the doors."""
        if one.protocol not in PROTOCOLS:
            return
        for frontend in one.frontends:
            rules = tuple(self._portal(one, frontend, ports))
            claimed = (frontend.address, frontend.port, one.protocol)
            if rules:
                yield claimed, _Claim(not one.has_endpoints, one.name, rules)

    def _portal(
        self, one: Forwarding, frontend: Frontend, ports: Mapping[Door, int]
    ) -> Iterator[tuple[_Chain, int, str]]:
        detects = self._options.detector is not None
        found = {
            origin: ports.get(door_of(one, frontend, origin, detects))
            for origin in origins(self._options)
        }
        # No VIP: the chains of node ports, whose addresses are said where one jumps to them.
        to = f"-d {frontend.address}{self._width} " if frontend.address else ""
        chains = (
            (PORTALS_CONTAINER, PORTALS_HOST)
            if frontend.address
            else (NODE_PORT_CONTAINER, NODE_PORT_HOST)
        )
        match = (
            f"-p {one.protocol} {_comment(one.name)} -m {one.protocol} --dport {frontend.port} -j"
        )
        outside, pod, node = found["outside"], found.get("pod"), found["node"]
        if pod is not None and pod != outside:
            source, interface = self._pod
            yield ("nat", chains[0]), 0, f"{source}{to}{interface}{match} {_redirect(pod)}"
        if outside is not None:
            yield ("nat", chains[0]), 0, f"{to}{match} {_redirect(outside)}"
        if node is not None:
            yield ("nat", chains[1]), 0, f"{to}{match} {self._to_node(node)}"

    def _to_node(self, port: int) -> str:
        return f"DNAT --to-destination {self._host}:{port}" if self._host else _redirect(port)

    def of_doors(
        self, one: Forwarding, ports: Mapping[Door, int]
    ) -> Iterator[tuple[_Chain, int, str, str]]:
        """Yield (chain, section, name, rule) of what the filter table says of each door."""
        chain = ("filter", NON_LOCAL)
        detects = self._options.detector is not None
        from_outside = {
            door_of(one, frontend, origin, detects)
            for frontend in one.frontends
            if frontend.kind == "node port"
            for origin in origins(self._options)
        }
        for door in doors(one, self._options):
            port = ports.get(door)
            if port is None:
                continue
            match = f"-p {one.protocol} {_comment(one.name)} -m {one.protocol} --dport {port}"
            name = f"{one.name} {one.protocol}"
            if door in from_outside:
                rule = f"{match} -m conntrack --ctstate DNAT -j ACCEPT"
                yield chain, _ACCEPTED, name, rule
            yield chain, _DIRECT, name, f"{match} {self._reject}"


def _redirect(port: int) -> str:
    return f"REDIRECT --to-ports {port}"


def _pod_match(options: Options) -> tuple[str, str]:
    """Return the match for Pods of this node: what goes before "-d", and what behind it."""
    assert options.detector is not None
    kind, value = options.detector.kind, options.detector.value
    if kind == "cidr":
        network = ip_network(value, strict=False)
        return (f"-s {network} " if network.prefixlen else ""), ""
    return "", f"-i {value}{'+' if kind == 'prefix' else ''} "


def _comment(text: str) -> str:
    """Return the match that says `text`; a name from elsewhere must not become a rule."""
    if not _PLAIN_NAME.fullmatch(text):
        text = re.sub(r"[^A-Za-z0-9_./:-]", "?", text)[:191]
    return f'-m comment --comment "{text}"'


def jumps(options: Options) -> RuleSet:
    """Return the rules that lead from the built-in chains to ours.

    Those of PORTALS go first in their chain, those of NODEPORT last.
    """
    # Not a VIP's name but our own words.
    portals = '-m comment --comment "handle ClusterIPs; NOTE: this must be before the NodePort'
    node_ports = (
        '-m comment --comment "handle service NodePorts; NOTE: this must be the last rule in the'
        ' chain"'
    )
    non_local = '-m comment --comment "Ensure that non-local NodePort traffic can flow"'
    return {
        "filter": {"INPUT": (f"{non_local} -j {NON_LOCAL}",)},
        "nat": {
            "PREROUTING": (
                f'{portals} rules" -j {PORTALS_CONTAINER}',
                *_to_node_ports(options, node_ports, NODE_PORT_CONTAINER, loopback=False),
            ),
            "OUTPUT": (
                f'{portals} rules" -j {PORTALS_HOST}',
                *_to_node_ports(
                    options, node_ports, NODE_PORT_HOST,
                    loopback=options.family == 4 and options.localhost_node_ports,
                ),
            ),
        },
    }  # fmt: skip


def _to_node_ports(
    options: Options, comment: str, chain: str, *, loopback: bool
) -> tuple[str, ...]:
    """loopback -- node ports answer there, too: for what the node itself asks, never for what
    comes from elsewhere (CVE-2020-8558)"""
    if options.node_port_addresses is None:
        but = "" if loopback else f"! -d {'127.0.0.0/8' if options.family == 4 else '::1/128'} "
        return (f"{but}-m addrtype --dst-type LOCAL {comment} -j {chain}",)
    width = "/32" if options.family == 4 else "/128"
    return tuple(
        f"-d {address}{width} {comment} -j {chain}"
        for address in dict.fromkeys(options.node_port_addresses)
        if loopback or not ip_address(address).is_loopback
    )


def jump_lines(wanted: RuleSet, missing: Collection[tuple[str, str, str]]) -> dict[str, str]:
    """Return the lines that add the jumps in `missing` (table, chain, rule), by table."""
    lines: dict[str, str] = {}
    for table, chains in wanted.items():
        for chain, rules in chains.items():
            for rule in rules:
                if (table, chain, rule) in missing:
                    last = NODE_PORT_CONTAINER in rule or NODE_PORT_HOST in rule
                    how = f"-A {chain}" if last else f"-I {chain}"
                    lines[table] = lines.get(table, "") + f"{how} {rule}\n"
    return lines


def render_rules(
    table: ForwardingTable, options: Options, address: str = "", explain: bool = False
) -> str:
    """Return the rules of `table` as one restore text, every door at its preferred port.

    Loads into an empty namespace with or without --noflush. address -- the node's; explain --
    above each rule a comment says whose it is and what it is for
    """
    ports: dict[Door, int] = {}
    taken: set[int] = set()
    for one in table:
        for door in doors(one, options):
            port = next((p for p in preferred_ports(door, options.family) if p not in taken), 0)
            if port:
                ports[door] = port
                taken.add(port)
    rules = PortalRules(options, address)
    rules.update(table, None, ports)
    leading = jumps(options)
    every = {(t, c, rule) for t, chains in leading.items() for c in chains for rule in chains[c]}
    text = rules.full(jump_lines(leading, every))
    return _explained(text) if explain else text


# What a rule is for: by chain and a sign in the rule; the first that fits.
_REASONS: Final = (
    (PORTALS_CONTAINER, "", "from a Pod or outside: to this process's socket for it"),
    (PORTALS_HOST, "", "from this node itself: to this process's socket for it"),
    (NODE_PORT_CONTAINER, "", "node port, from a Pod or outside: to this process's socket for it"),
    (NODE_PORT_HOST, "", "node port, from this node itself: to this process's socket for it"),
    (NON_LOCAL, "-j ACCEPT", "it came for a node port: a host's firewall lets it pass"),
    (NON_LOCAL, "-j REJECT", "nobody comes to the socket directly: that would go around policies"
     " and source ranges"),
    (NON_LOCAL, "! --ctstate NEW", "only first packets are looked at"),
    (NON_LOCAL, "--ctstate DNAT", "what was led to a socket goes on to it"),
    ("", PORTALS_CONTAINER, "is it for a Service?"),
    ("", PORTALS_HOST, "from this node: is it for a Service?"),
    ("", NODE_PORT_CONTAINER, "to this node: is it for a node port?"),
    ("", NODE_PORT_HOST, "from this node to itself: is it for a node port?"),
    ("", NON_LOCAL, "to this node: what of it is for our sockets"),
)  # fmt: skip


def _explained(text: str) -> str:
    lines = []
    for line in text.splitlines():
        words = line.split(" ", 2)
        if words[0] in ("-A", "-I"):
            chain, rule = words[1:]
            reason = next(why for at, sign, why in _REASONS if at in ("", chain) and sign in rule)
            name = re.search(r'--comment "([^" ]+/[^" ]+)"', rule)
            lines.append(f"# {name[1]}: {reason}" if name else f"# {reason}")
        lines.append(line)
    return "\n".join([*lines, ""])


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
