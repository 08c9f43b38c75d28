"""Forwarding -> IPVS: virtual servers, the members of the ipsets, and the addresses to bind.

Spells what table.py decided in the third way (reference 2.1): each frontend is a virtual server
and each endpoint behind it a real one; what is masqueraded or refused says a constant number
of iptables rules by looking into ipsets. Bringing the kernel there is kernel/ipvs.py's.

Where IPVS cannot follow the decision: a virtual server has the same endpoints for whoever asks,
so with external policy Local this node and its Pods get the local ones too; with internal
policy Local and none of them here, a client is refused at once and not left without an answer.
Each virtual server remembers its own clients, so affinity is not shared by a port's frontends.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from kdns.proxy.iptables_rules import RuleSet
from kdns.proxy.options import Detector, Family, Options, Protocol
from kdns.proxy.table import Forwarding, ForwardingTable
from kdns.registry.endpoints import Endpoint
from kdns.registry.objects import Key

INTERFACE: Final = "kube-ipvs0"
# Bits of a virtual server's flags (linux/ip_vs.h).
PERSISTENT: Final = 0x01
SOURCE_PORT: Final = 0x10  # mh hashes the client's port as well, as kube-proxy asks

# --- ipsets -----------------------------------------------------------------------------------

MAX_NAME: Final = 31  # IPSET_MAXNAMELEN without its NUL
LEAST_ROOM: Final = 65536  # members a set can hold, if not said otherwise: ipset's own default

# Name of the IPv4 set -> type. The last one is ours: where external policy Local leaves nothing
# on this node, kube-proxy sends outside clients to other nodes' endpoints, and their answers
# are lost.
SETS: Final[Mapping[str, str]] = {
    "KUBE-LOOP-BACK": "hash:ip,port,ip",
    "KUBE-CLUSTER-IP": "hash:ip,port",
    "KUBE-EXTERNAL-IP": "hash:ip,port",
    "KUBE-EXTERNAL-IP-LOCAL": "hash:ip,port",
    "KUBE-LOAD-BALANCER": "hash:ip,port",
    "KUBE-LOAD-BALANCER-LOCAL": "hash:ip,port",
    "KUBE-LOAD-BALANCER-FW": "hash:ip,port",
    "KUBE-LOAD-BALANCER-SOURCE-IP": "hash:ip,port,ip",
    "KUBE-LOAD-BALANCER-SOURCE-CIDR": "hash:ip,port,net",
    "KUBE-NODE-PORT-TCP": "bitmap:port",
    "KUBE-NODE-PORT-LOCAL-TCP": "bitmap:port",
    "KUBE-NODE-PORT-UDP": "bitmap:port",
    "KUBE-NODE-PORT-LOCAL-UDP": "bitmap:port",
    "KUBE-NODE-PORT-SCTP-HASH": "hash:ip,port",
    "KUBE-NODE-PORT-LOCAL-SCTP-HASH": "hash:ip,port",
    "KUBE-HEALTH-CHECK-NODE-PORT": "bitmap:port",
    "KUBE-IPVS-IPS": "hash:ip",
    "KUBE-NO-LOCAL-ENDPOINTS": "hash:ip,port",
}


def set_name(name: str, family: Family) -> str:
    """Return what the set is called in `family`: KUBE-CLUSTER-IP, KUBE-6-CLUSTER-IP."""
    return name if family == 4 else f"KUBE-6-{name.removeprefix('KUBE-')}"[:MAX_NAME]


def create_line(name: str, kind: str, family: Family, room: int = LEAST_ROOM) -> str:
    """Return the line of `ipset restore` that makes a set which holds `room` members."""
    if kind == "bitmap:port":
        return f"create {name} bitmap:port range 0-65535\n"
    inet = "inet" if family == 4 else "inet6"
    return f"create {name} {kind} family {inet} hashsize 1024 maxelem {room}\n"


def room_for(members: int) -> int:
    """Return the size of a set that is to hold so many members: the next power of two."""
    return max(LEAST_ROOM, 1 << (members - 1).bit_length()) if members else LEAST_ROOM


# --- what is wanted ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class IpvsSettings:
    """What an operator says about this mode. Time-outs are seconds, 0 leaves the kernel's.

    exclude_cidrs -- virtual servers of others, at addresses in there, stay
    """

    scheduler: str = "rr"
    exclude_cidrs: tuple[str, ...] = ()
    strict_arp: bool = False
    tcp_timeout: float = 0.0
    tcp_fin_timeout: float = 0.0
    udp_timeout: float = 0.0


@dataclass(frozen=True, slots=True)
class Host:
    """This node's addresses, of one family, that are not on kube-ipvs0.

    addresses  -- all of them: what is here already is not bound once more
    node_ports -- those that node ports answer on
    """

    addresses: frozenset[str] = frozenset()
    node_ports: tuple[str, ...] = ()


class At(NamedTuple):
    """What a virtual server is known by."""

    protocol: Protocol
    address: str
    port: int

    def __str__(self) -> str:
        return f"{_place(self.address, self.port)}/{self.protocol}"


class Real(NamedTuple):
    """A real server, of weight 1."""

    address: str
    port: int

    def __str__(self) -> str:
        return _place(self.address, self.port)


class Virtual(NamedTuple):
    """A virtual server. persistence -- seconds a client stays with its endpoint; 0: it does not"""

    scheduler: str
    persistence: int
    reals: tuple[Real, ...]

    @property
    def flags(self) -> int:
        own = SOURCE_PORT if self.scheduler == "mh" else 0
        return own | (PERSISTENT if self.persistence else 0)


class Member(NamedTuple):
    """One member of a set, named as for IPv4; text as `ipset save` prints it."""

    set: str
    text: str


class _Claim(NamedTuple):
    """Who asks for a virtual server. Of two the lesser gets it: table.conflicts()."""

    without_endpoints: bool
    name: str
    protocol: str
    number: int


class _Piece(NamedTuple):
    """All that one Service asks for."""

    servers: tuple[tuple[At, _Claim, Virtual], ...]
    addresses: tuple[str, ...]
    members: tuple[Member, ...]


@dataclass(slots=True)
class Touched:
    """What may have changed, to be looked up in IpvsRules."""

    servers: set[At] = field(default_factory=set)
    addresses: set[str] = field(default_factory=set)
    members: set[Member] = field(default_factory=set)

    def clear(self) -> None:
        for one in (self.servers, self.addresses, self.members):
            one.clear()


class IpvsRules:
    """What one family's IPVS shall hold. Does no I/O.

    servers   -- virtual servers wanted
    addresses -- address -> how many frontends need it on kube-ipvs0
    members   -- set, named as for IPv4 -> member -> how many ask for it
    touched   -- what updates may have changed since it was last cleared
    """

    def __init__(self, options: Options, settings: IpvsSettings = IpvsSettings()) -> None:
        self.options = options
        self.settings = settings
        self.host = Host()
        self.servers: dict[At, Virtual] = {}
        self.addresses: dict[str, int] = {}
        self.members: dict[str, dict[str, int]] = {name: {} for name in SETS}
        self.touched = Touched()
        self._claims: dict[At, dict[_Claim, Virtual]] = {}
        self._pieces: dict[Key, _Piece] = {}

    def update(
        self, table: ForwardingTable, changed: Collection[Key] | None, host: Host | None = None
    ) -> None:
        """Take over the Services in `changed`; None: all of them.

        host -- this node's addresses, where they have changed since
        """
        if host is not None and host != self.host:
            self.host, changed = host, None
        if changed is None:
            changed = table.services.keys() | self._pieces.keys()
        for key in changed:
            old = self._pieces.pop(key, None)
            ports = table.services.get(key, ())
            new = self._spell(ports) if ports else None
            if new is not None:
                self._pieces[key] = new
            if old != new:
                self._replace(old, new)

    def _replace(self, old: _Piece | None, new: _Piece | None) -> None:
        # First what comes: what stays is then never gone in between.
        for piece, step in ((new, 1), (old, -1)):
            if piece is None:
                continue
            for address in piece.addresses:
                _count(self.addresses, address, step)
                self.touched.addresses.add(address)
            for member in piece.members:
                _count(self.members[member.set], member.text, step)
                self.touched.members.add(member)
        # A claim's text is the same before and after: the old ones first.
        for piece in (old, new):
            for at, claim, virtual in piece.servers if piece is not None else ():
                self.touched.servers.add(at)
                claims = self._claims.setdefault(at, {})
                if piece is old:
                    claims.pop(claim, None)
                else:
                    claims[claim] = virtual
        for piece in (old, new):
            for at, _, _ in piece.servers if piece is not None else ():
                self._choose(at)

    def _choose(self, at: At) -> None:
        claims = self._claims.get(at)
        if claims:
            self.servers[at] = claims[min(claims)]
        else:
            self._claims.pop(at, None)
            self.servers.pop(at, None)

    def _spell(self, ports: Iterable[Forwarding]) -> _Piece:
        servers: list[tuple[At, _Claim, Virtual]] = []
        addresses: dict[str, None] = {}
        members: dict[Member, None] = {}
        for one in ports:
            for number, (address, port, reals) in enumerate(self._frontends(one)):
                virtual = Virtual(self.settings.scheduler, one.affinity, reals)
                claim = _Claim(not one.has_endpoints, one.name, one.protocol, number)
                servers.append((At(one.protocol, address, port), claim, virtual))
            for address in (one.cluster_ip, *one.external_ips, *one.load_balancer_ips):
                # What another interface has is the host's: its own ports must stay reachable.
                if address not in self.host.addresses:
                    addresses[address] = None
                    members[Member("KUBE-IPVS-IPS", address)] = None
            members.update(dict.fromkeys(members_of(one, self.host.node_ports)))
        return _Piece(tuple(servers), tuple(addresses), tuple(members))

    def _frontends(self, one: Forwarding) -> Iterator[tuple[str, int, tuple[Real, ...]]]:
        """Yield address, port and real servers of each virtual server, each once."""
        internal = one.local if one.internal_local else one.cluster
        yield one.cluster_ip, one.port, _reals(internal)
        # Without local endpoints, those elsewhere are for this node and its Pods; the rest of
        # the world is dropped by KUBE-NO-LOCAL-ENDPOINTS.
        external = _reals((one.external_local and one.local) or one.cluster)
        for address in dict.fromkeys((*one.external_ips, *one.load_balancer_ips)):
            yield address, one.port, external
        if one.node_port:
            for address in self.host.node_ports:
                yield address, one.node_port, external

    def owners(self) -> Mapping[At, str]:
        """Return the name of the Service port that each virtual server belongs to."""
        return {at: min(claims).name for at, claims in self._claims.items()}


def compile_ipvs(
    table: ForwardingTable,
    options: Options,
    settings: IpvsSettings = IpvsSettings(),
    host: Host = Host(),
) -> IpvsRules:
    """Return all that a table asks for."""
    rules = IpvsRules(options, settings)
    rules.update(table, None, host)
    return rules


def _count(counts: dict[str, int], one: str, step: int) -> None:
    left = counts.get(one, 0) + step
    if left > 0:
        counts[one] = left
    else:
        counts.pop(one, None)


def _reals(endpoints: Iterable[Endpoint]) -> tuple[Real, ...]:
    return tuple([Real(one.ip, one.port) for one in endpoints])


def _place(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def members_of(one: Forwarding, node_ports: Iterable[str] = ()) -> Iterator[Member]:
    """Yield what one Service port puts into the sets, but for KUBE-IPVS-IPS."""
    protocol = one.protocol

    def entry(address: str, port: int = one.port) -> str:
        return f"{address},{protocol}:{port}"

    yield Member("KUBE-CLUSTER-IP", entry(one.cluster_ip))
    # A Pod that reaches itself can only be one of this node.
    for endpoint in one.reachable:
        if endpoint.local:
            text = f"{entry(endpoint.ip, endpoint.port)},{endpoint.ip}"
            yield Member("KUBE-LOOP-BACK", text)
    local = "-LOCAL" if one.external_local else ""
    unserved = one.external_local and not one.local and one.has_endpoints
    for address in one.external_ips:
        yield Member(f"KUBE-EXTERNAL-IP{local}", entry(address))
    for address in one.load_balancer_ips:
        yield Member("KUBE-LOAD-BALANCER", entry(address))
        if local:
            yield Member("KUBE-LOAD-BALANCER-LOCAL", entry(address))
        if one.source_ranges:
            yield Member("KUBE-LOAD-BALANCER-FW", entry(address))
        for cidr in one.source_ranges:
            text = f"{entry(address)},{_short(cidr)}"
            yield Member("KUBE-LOAD-BALANCER-SOURCE-CIDR", text)
        if one.node_in_ranges:
            yield Member("KUBE-LOAD-BALANCER-SOURCE-IP", f"{entry(address)},{address}")
    if unserved:
        for address in (*one.external_ips, *one.load_balancer_ips):
            yield Member("KUBE-NO-LOCAL-ENDPOINTS", entry(address))
    if one.node_port:
        yield from _node_port_members(one, local, node_ports)
        if unserved:
            for address in node_ports:
                yield Member("KUBE-NO-LOCAL-ENDPOINTS", entry(address, one.node_port))
    if one.health_check_node_port:
        yield Member("KUBE-HEALTH-CHECK-NODE-PORT", str(one.health_check_node_port))


def _node_port_members(one: Forwarding, local: str, addresses: Iterable[str]) -> Iterator[Member]:
    names = ["", local] if local else [""]
    for which in names:
        if one.protocol == "sctp":
            for address in addresses:
                text = f"{address},sctp:{one.node_port}"
                yield Member(f"KUBE-NODE-PORT{which}-SCTP-HASH", text)
        else:
            yield Member(f"KUBE-NODE-PORT{which}-{one.protocol.upper()}", str(one.node_port))


def _short(cidr: str) -> str:
    """Return a CIDR as ipset prints it: one address has no length behind it."""
    network = ipaddress.ip_network(cidr, strict=False)
    return str(network.network_address) if network.prefixlen == network.max_prefixlen else cidr


def is_excluded(address: str, cidrs: Iterable[str]) -> bool:
    """Say whether a virtual server of somebody else at `address` is to stay."""
    ip = ipaddress.ip_address(address)
    return any(ip in ipaddress.ip_network(cidr) for cidr in cidrs)


def host_view(addresses: Iterable[str], options: Options) -> Host:
    """Return this node's addresses as this mode uses them. addresses -- on all interfaces but
    kube-ipvs0.

    127.0.0.1 has no node ports here: IPVS cannot masquerade what stays on the loopback. Nor
    have addresses that are good on one link only.
    """
    known = frozenset(addresses)
    fitting = [one for one in known if not _is_passing(one)]
    if options.node_port_addresses is not None:
        fitting = [one for one in fitting if one in options.node_port_addresses]
    return Host(known, tuple(sorted(fitting)))


def _is_passing(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    return ip.is_loopback or (ip.version == 6 and ip.is_link_local)


# --- iptables ---------------------------------------------------------------------------------

# Protocol -> how the names of its sets end, and what of a packet they are asked for.
_NODE_PORTS: Final = (
    ("tcp", "TCP", "dst"),
    ("udp", "UDP", "dst"),
    ("sctp", "SCTP-HASH", "dst,dst"),
)
_SERVED: Final = (
    "KUBE-LOAD-BALANCER",
    "KUBE-CLUSTER-IP",
    "KUBE-EXTERNAL-IP",
    "KUBE-EXTERNAL-IP-LOCAL",
)
_NEW: Final = "-m conntrack --ctstate NEW "


def _comment(text: str) -> str:
    return f'-m comment --comment "{text}" '


def constant_chains(options: Options) -> dict[str, dict[str, tuple[str, ...]]]:
    """Return our iptables chains, which are the same whatever Services there are, as
    iptables-save prints them: table -> chain -> rules."""
    mark = f"0x{options.mark:x}"
    randomly = " --random-fully" if options.random_fully else ""
    source, interface = _not_pod(options.detector)

    def match(name: str, directions: str) -> str:
        return f"-m set --match-set {set_name(name, options.family)} {directions} "

    cluster = _comment("Kubernetes service cluster ip + port for masquerade purpose")
    if options.masquerade_all:
        masqueraded = (f"{cluster}{match('KUBE-CLUSTER-IP', 'dst,dst')}-j KUBE-MARK-MASQ",)
    elif source or interface:
        masqueraded = (
            f"{source}{interface}{cluster}{match('KUBE-CLUSTER-IP', 'dst,dst')}-j KUBE-MARK-MASQ",
        )
    else:
        # The node's own: the kernel gives them the VIP, which is bound here, as their source.
        masqueraded = (f"{cluster}{match('KUBE-CLUSTER-IP', 'src,dst')}-j KUBE-MARK-MASQ",)
    external = _comment("Kubernetes service external ip + port for masquerade and filter purpose")
    balancer = _comment("Kubernetes service lb portal")
    kept = _comment("Kubernetes service load balancer ip + port with externalTrafficPolicy=local")
    own = "-m addrtype --src-type LOCAL -j KUBE-MARK-MASQ"
    hairpin = _comment("Kubernetes endpoints dst ip:port, source ip for solving hairpin purpose")
    localhost = ("-s 127.0.0.0/8 -j RETURN",) if options.family == 4 else ()
    nat = {
        "KUBE-SERVICES": (
            *localhost,
            f"{balancer}{match('KUBE-LOAD-BALANCER', 'dst,dst')}-j KUBE-LOAD-BALANCER",
            *masqueraded,
            f"{external}{match('KUBE-EXTERNAL-IP', 'dst,dst')}-j KUBE-MARK-MASQ",
            f"{match('KUBE-EXTERNAL-IP-LOCAL', 'dst,dst')}{own}",
            "-m addrtype --dst-type LOCAL -j KUBE-NODE-PORT",
        ),
        "KUBE-LOAD-BALANCER": (
            own,
            f"{kept}{match('KUBE-LOAD-BALANCER-LOCAL', 'dst,dst')}-j RETURN",
            "-j KUBE-MARK-MASQ",
        ),
        "KUBE-NODE-PORT": tuple(
            rule
            for protocol, ending, directions in _NODE_PORTS
            for rule in _node_port_rules(options.family, protocol, ending, directions)
        ),
        "KUBE-MARK-MASQ": (f"-j MARK --set-xmark {mark}/{mark}",),
        "KUBE-POSTROUTING": (
            f"{hairpin}{match('KUBE-LOOP-BACK', 'dst,dst,src')}-j MASQUERADE",
            f"-m mark ! --mark {mark}/{mark} -j RETURN",
            f"-j MARK --set-xmark {mark}/0x0",
            f"{_comment('kubernetes service traffic requiring SNAT')}-j MASQUERADE{randomly}",
        ),
    }
    return {"filter": _filters(options, mark, source, interface), "nat": nat}


def _node_port_rules(
    family: Family, protocol: str, ending: str, directions: str
) -> tuple[str, str, str]:
    local = set_name(f"KUBE-NODE-PORT-LOCAL-{ending}", family)
    every = set_name(f"KUBE-NODE-PORT-{ending}", family)
    what = f"Kubernetes nodeport {protocol.upper()} port"
    with_local = _comment(f"{what} with externalTrafficPolicy=local")
    to_local = f"-p {protocol} {with_local}-m set --match-set {local} {directions} "
    return (
        f"{to_local}-m addrtype --src-type LOCAL -j KUBE-MARK-MASQ",
        f"{to_local}-j RETURN",
        f"-p {protocol} {_comment(f'{what} for masquerade purpose')}"
        f"-m set --match-set {every} {directions} -j KUBE-MARK-MASQ",
    )


def _filters(
    options: Options, mark: str, source: str, interface: str
) -> dict[str, tuple[str, ...]]:
    def match(name: str, directions: str = "dst,dst") -> str:
        return f"-m set --match-set {set_name(name, options.family)} {directions} "

    unreachable = f"icmp{'' if options.family == 4 else '6'}-port-unreachable"
    refuse = f"{_NEW}{match('KUBE-IPVS-IPS', 'dst')}-j REJECT --reject-with {unreachable}"
    invalid = ("-m conntrack --ctstate INVALID -j DROP",) if options.drop_invalid else ()
    health = _comment("Kubernetes health check node port")
    ranges = _comment("Kubernetes service load balancer ip + port for load balancer with"
                      " sourceRange")  # fmt: skip
    unserved = _comment("no local endpoints for this node port, external or load balancer IP")
    return {
        "KUBE-FORWARD": (
            *invalid,
            f"{_comment('kubernetes forwarding rules')}-m mark --mark {mark}/{mark} -j ACCEPT",
            f"{_comment('kubernetes forwarding conntrack rule')}"
            "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        ),
        "KUBE-NODE-PORT": (f"{health}{match('KUBE-HEALTH-CHECK-NODE-PORT', 'dst')}-j ACCEPT",),
        "KUBE-PROXY-FIREWALL": (
            f"{ranges}{match('KUBE-LOAD-BALANCER-FW')}-j KUBE-SOURCE-RANGES-FIREWALL",
            f"{source}{interface}{_NEW}{unserved}{match('KUBE-NO-LOCAL-ENDPOINTS')}-j DROP",
        ),
        "KUBE-SOURCE-RANGES-FIREWALL": (
            f"{match('KUBE-LOAD-BALANCER-SOURCE-CIDR', 'dst,dst,src')}-j RETURN",
            f"{match('KUBE-LOAD-BALANCER-SOURCE-IP', 'dst,dst,src')}-j RETURN",
            "-j DROP",
        ),
        # A VIP that is bound here would lead to whatever listens on the node (#72236).
        "KUBE-IPVS-FILTER": (
            *(f"{match(name)}-j RETURN" for name in _SERVED),
            f"{match('KUBE-HEALTH-CHECK-NODE-PORT', 'dst')}-j RETURN",
            refuse,
        ),
        # What IPVS took has its endpoint as destination by now.
        "KUBE-IPVS-OUT-FILTER": (refuse,),
    }


def _not_pod(detector: Detector | None) -> tuple[str, str]:
    """Return the matches for what is not a Pod of this node: source, interface. Empty: Pods are
    not told from others."""
    match detector:
        case Detector("cidr", value):
            network = ipaddress.ip_network(value, strict=False)
            return (f"! -s {network} ", "") if network.prefixlen else ("", "")
        case Detector("interface", value):
            return "", f"! -i {value} "
        case Detector("prefix", value):
            return "", f"! -i {value}+ "
        case _:
            return "", ""


_PORTALS: Final = f"{_comment('kubernetes service portals')}-j KUBE-SERVICES"
_FIREWALL: Final = f"{_comment('kube-proxy firewall rules')}-j KUBE-PROXY-FIREWALL"
_ACCESS: Final = _comment("kubernetes ipvs access filter")
# Rules in the built-in chains that lead to ours, in the order in which a fresh node has them.
JUMPS: Final[RuleSet] = {
    "filter": {
        "INPUT": (
            f"{_ACCESS}-j KUBE-IPVS-FILTER",
            _FIREWALL,
            f"{_comment('kubernetes health check rules')}-j KUBE-NODE-PORT",
        ),
        "FORWARD": (
            _FIREWALL,
            f"{_comment('kubernetes forwarding rules')}-j KUBE-FORWARD",
        ),
        "OUTPUT": (f"{_ACCESS}-j KUBE-IPVS-OUT-FILTER",),
    },
    "nat": {
        "PREROUTING": (_PORTALS,),
        "OUTPUT": (_PORTALS,),
        "POSTROUTING": (f"{_comment('kubernetes postrouting rules')}-j KUBE-POSTROUTING",),
    },
}


# --- printing ---------------------------------------------------------------------------------

_SERVICE_OPTION: Final[Mapping[Protocol, str]] = {
    "tcp": "-t", "udp": "-u", "sctp": "--sctp-service",
}  # fmt: skip


def render_servers(rules: IpvsRules, owners: Mapping[At, str] | None = None) -> str:
    """Return the virtual servers as `ipvsadm --save -n` prints them."""
    lines = []
    for at, virtual in sorted(rules.servers.items()):
        if owners is not None:
            lines.append(f"# {owners[at]}: {_why(virtual)}\n")
        place = f"{_SERVICE_OPTION[at.protocol]} {_place(at.address, at.port)}"
        persistence = f" -p {virtual.persistence}" if virtual.persistence else ""
        if persistence and rules.options.family == 6:
            persistence += " -M 128"
        flags = " -b mh-port" if virtual.flags & SOURCE_PORT else ""
        lines.append(f"-A {place} -s {virtual.scheduler}{persistence}{flags}\n")
        lines += [f"-a {place} -r {real} -m -w 1\n" for real in virtual.reals]
    return "".join(lines)


def _why(virtual: Virtual) -> str:
    many = len(virtual.reals)
    if not many:
        return "no endpoint that may be used: a client is refused"
    text = f"{many} endpoint{'s' if many > 1 else ''}, chosen by {virtual.scheduler}"
    if virtual.persistence:
        text += f", a client stays with its endpoint for {virtual.persistence} s"
    return text


def render_sets(rules: IpvsRules, explain: bool = False) -> str:
    """Return the sets as `ipset save` prints them, which `ipset restore` takes."""
    family = rules.options.family
    lines = []
    for name, kind in SETS.items():
        members = rules.members[name]
        if explain:
            lines.append(f"# {_PURPOSE[name]}\n")
        lines.append(create_line(set_name(name, family), kind, family, room_for(len(members))))
    for name, members in rules.members.items():
        lines += [f"add {set_name(name, family)} {text}\n" for text in sorted(members)]
    return "".join(lines)


_PURPOSE: Final[Mapping[str, str]] = {
    "KUBE-LOOP-BACK": "endpoints here: one that reaches itself is masqueraded",
    "KUBE-CLUSTER-IP": "ClusterIPs: masqueraded unless a Pod of this node asks",
    "KUBE-EXTERNAL-IP": "external IPs: masqueraded",
    "KUBE-EXTERNAL-IP-LOCAL": "external IPs of policy Local: the client's address stays",
    "KUBE-LOAD-BALANCER": "load balancers' IPs: masqueraded",
    "KUBE-LOAD-BALANCER-LOCAL": "but for those of policy Local",
    "KUBE-LOAD-BALANCER-FW": "load balancers' IPs that only some may use",
    "KUBE-LOAD-BALANCER-SOURCE-IP": "this node, which may",
    "KUBE-LOAD-BALANCER-SOURCE-CIDR": "and the sources that may",
    "KUBE-NODE-PORT-TCP": "node ports: masqueraded",
    "KUBE-NODE-PORT-LOCAL-TCP": "but for those of policy Local",
    "KUBE-NODE-PORT-UDP": "node ports: masqueraded",
    "KUBE-NODE-PORT-LOCAL-UDP": "but for those of policy Local",
    "KUBE-NODE-PORT-SCTP-HASH": "node ports: masqueraded",
    "KUBE-NODE-PORT-LOCAL-SCTP-HASH": "but for those of policy Local",
    "KUBE-HEALTH-CHECK-NODE-PORT": "where load balancers ask for the node's health: accepted",
    "KUBE-IPVS-IPS": f"addresses on {INTERFACE}: ports that are no Service's are refused",
    "KUBE-NO-LOCAL-ENDPOINTS": "policy Local with no endpoint here: dropped if from outside",
}


def render_chains(options: Options) -> str:
    """Return the iptables rules, with the jumps, as one text for iptables-restore."""
    wanted = constant_chains(options)
    lines = []
    for table, builtin in JUMPS.items():
        chains = dict(sorted(wanted[table].items()))
        lines.append(f"*{table}\n")
        lines += [f":{chain} - [0:0]\n" for chain in chains]
        for chain, rules in {**builtin, **chains}.items():
            lines += [f"-A {chain} {rule}\n" for rule in rules]
        lines.append("COMMIT\n")
    return "".join(lines)


def render_rules(
    table: ForwardingTable,
    options: Options,
    scheduler: str = "rr",
    explain: bool = False,
    host: Host | None = None,
) -> str:
    """Return what `kdns rules --mode ipvs` prints: the virtual servers, the sets, the rules.

    host -- None: not known; a node port's virtual servers are then printed for the addresses
            of `options`, or else for 0.0.0.0, in place of each of the node's
    """
    notes = ""
    if host is None:
        anywhere = "0.0.0.0" if options.family == 4 else "::"
        addresses = options.node_port_addresses
        host = Host(frozenset(), (anywhere,) if addresses is None else tuple(addresses))
        if addresses is None and any(one.node_port for one in table):
            notes = f"# {anywhere} stands for each address of the node\n"
    rules = compile_ipvs(table, options, IpvsSettings(scheduler), host)
    return (
        f"# ipvsadm --restore\n{notes}{render_servers(rules, rules.owners() if explain else None)}"
        f"\n# ipset restore\n{render_sets(rules, explain)}"
        f"\n# {'iptables' if options.family == 4 else 'ip6tables'}-restore --noflush\n"
        f"{render_chains(options)}"
    )
