"""*** Where a Service becomes DNAT rules: Forwarding -> iptables rules. ***

Spells what table.py decided (reference 1.2 to 1.9), in kube-proxy's chains and words, and as
iptables-save prints them, so that what is asked of the kernel can be compared with what it
holds. Which rules the kernel has yet to be told is iptables.py's.

nfacct counters, which kube-proxy adds where the kernel has them, are left out: the two rules
concerned are written plain, and NodePorts need no rule of their own for 127.0.0.0/8.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from hashlib import sha256
from ipaddress import ip_address, ip_network
from typing import Final, NamedTuple, TypeAlias

from kdns.proxy.options import Detector, Options
from kdns.proxy.table import Forwarding, Verdict

# table ("filter", "nat") -> chain -> its rules, without "-A CHAIN ".
RuleSet: TypeAlias = Mapping[str, Mapping[str, tuple[str, ...]]]

# How the names of chains begin that belong to one Service port; all in the nat table.
SERVICE_CHAINS: Final = ("KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-", "KUBE-FW-", "KUBE-SEP-")


class Shared(NamedTuple):
    """A chain in which every Service port may have rules."""

    table: str
    chain: str


NAT_SERVICES: Final = Shared("nat", "KUBE-SERVICES")
NAT_NODE_PORTS: Final = Shared("nat", "KUBE-NODEPORTS")
_SERVICES: Final = Shared("filter", "KUBE-SERVICES")
_EXTERNAL: Final = Shared("filter", "KUBE-EXTERNAL-SERVICES")
_NODE_PORTS: Final = Shared("filter", "KUBE-NODEPORTS")
_LB_FIREWALL: Final = Shared("filter", "KUBE-PROXY-FIREWALL")
SHARED: Final = (_SERVICES, _EXTERNAL, _NODE_PORTS, _LB_FIREWALL, NAT_SERVICES, NAT_NODE_PORTS)


class Spelt(NamedTuple):
    """What one Service port asks for.

    chains -- its own chains -> their "-A" lines
    shared -- its rules in the chains it shares with all others
    """

    chains: dict[str, str]
    shared: list[tuple[Shared, str]]


# Ten bits -> two characters of base32 (RFC 4648 section 6).
_LETTERS: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
_BASE32: Final = [high + low for high in _LETTERS for low in _LETTERS]


def chain_hash(text: str) -> str:
    """Return how the name of a chain ends that stands for `text` (reference 1.2).

    text -- Forwarding.name and protocol, and for KUBE-SEP "ip:port", without anything between
    """
    # Ten bytes are sixteen characters of base32, and no padding; b32encode takes twice as long.
    bits = int.from_bytes(sha256(text.encode()).digest()[:10], "big")
    return "".join([_BASE32[bits >> shift & 1023] for shift in range(70, -1, -10)])


@lru_cache(maxsize=1024)  # of endpoints behind one Service port; all have the same few
def probability(n: int) -> str:
    """Return 1/n as iptables-save prints it.

    The kernel keeps a multiple of 2^-31. kube-proxy writes ten decimals, and for some n (44 is
    the first) that lies nearer to another multiple than 1/n itself does; we follow it.
    """
    steps = int(round(1 / n, 10) * 2**31 + 0.5)
    return f"{steps / 2**31:.11f}"


# All that the API server lets through. The bound keeps every comment within the 255 bytes of
# the comment match: 63 + 63 + 63 and the two signs between.
_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_./:-]{1,191}")


def _comment_name(name: str) -> str:
    """Return `name` fit for a quoted comment: a name from elsewhere must not become a rule."""
    if _PLAIN_NAME.fullmatch(name):
        return name
    return re.sub(r"[^A-Za-z0-9_./:-]", "?", name)[:191]


def _comment(text: str) -> str:
    # iptables-save quotes what holds a space, "/" or ":", and every comment of ours does.
    return f'-m comment --comment "{text}"'


class Spelling:
    """The words of one family's rules, for given options."""

    def __init__(self, options: Options, large: bool) -> None:
        v4 = options.family == 4
        self._width = "/32" if v4 else "/128"
        self._mask = "255.255.255.255" if v4 else ":".join(["ffff"] * 8)
        self._reject = f"REJECT --reject-with {'icmp' if v4 else 'icmp6'}-port-unreachable"
        self._masquerade_all = options.masquerade_all
        self._large = large
        # None: Pods of this node are not told from others; or, of the second, all are Pods.
        self._pod = None if options.detector is None else _matches(options.detector)
        self._not_pod = None if self._pod is None else _negated(*self._pod)

    def spell(self, port: Forwarding) -> Spelt:
        """Return all rules of one Service port (reference 1.5)."""
        words = _PortWords(port)
        return Spelt(self._chains(port, words), list(self._shared(port, words)))

    def _shared(self, port: Forwarding, words: _PortWords) -> Iterator[tuple[Shared, str]]:
        """Yield its rules in the chains that all Service ports share."""
        internal, external = port.internal, port.external
        width, match = self._width, words.match
        to_cluster_ip = f"-d {port.cluster_ip}{width} "
        if internal == "forward":
            yield NAT_SERVICES, to_cluster_ip + match("cluster IP") + words.internal
        else:
            yield _SERVICES, to_cluster_ip + self._refusal(words, internal)
        firewall = words.firewall if port.source_ranges else ""
        for addresses, kind, target in (
            (port.external_ips, "external IP", words.external),
            (port.load_balancer_ips, "loadbalancer IP", firewall or words.external),
        ):
            for address in addresses:
                to_address = f"-d {address}{width} "
                if port.has_endpoints:
                    yield NAT_SERVICES, to_address + match(kind) + target
                    if target == firewall:
                        yield _LB_FIREWALL, to_address + words.not_accepted + "DROP"
                # Once, if it is both: of two equal rules the kernel would delete the first one.
                twice = kind == "loadbalancer IP" and address in port.external_ips
                if external != "forward" and not twice:
                    yield _EXTERNAL, to_address + self._refusal(words, external)
        yield from self._shared_node_ports(port, words)

    def _shared_node_ports(
        self, port: Forwarding, words: _PortWords
    ) -> Iterator[tuple[Shared, str]]:
        name, protocol = words.name, port.protocol
        if port.node_port:
            tail = f"-m {protocol} --dport {port.node_port} -j "
            if port.has_endpoints:
                yield NAT_NODE_PORTS, f"-p {protocol} {_comment(name)} {tail}{words.external}"
            if port.external != "forward":
                why, verdict = self._verdict(port.external)
                yield (
                    _EXTERNAL,
                    f"-p {protocol} {_comment(f'{name} {why}')} -m addrtype --dst-type LOCAL"
                    f" {tail}{verdict}",
                )
        if port.health_check_node_port:
            yield (
                _NODE_PORTS,
                f"-p tcp {_comment(f'{name} health check node port')}"
                f" -m tcp --dport {port.health_check_node_port} -j ACCEPT",
            )

    def _verdict(self, verdict: Verdict) -> tuple[str, str]:
        if verdict == "reject":
            return "has no endpoints", self._reject
        return "has no local endpoints", "DROP"

    def _refusal(self, words: _PortWords, verdict: Verdict) -> str:
        why, target = self._verdict(verdict)
        return words.match(why) + target

    def _chains(self, port: Forwarding, words: _PortWords) -> dict[str, str]:
        """Return the chains of its own."""
        chains: dict[str, list[str]] = {}
        head = self._head(port, words)
        if port.cluster:
            chains[words.cluster] = [] if port.internal_local else head
        if port.local:
            chains[words.local] = head if port.internal_local else []
        endpoints = self._endpoints(port, words)
        for chain, members in ((words.cluster, port.cluster), (words.local, port.local)):
            if members:
                chosen = [endpoints[str(member)] for member in members]
                chains[chain] += self._balance(port, words, chosen)
        if port.has_endpoints and port.externally_accessible:
            chains[words.external] = list(self._external(port, words))
            if port.load_balancer_ips and port.source_ranges:
                chains[words.firewall] = list(self._firewall(port, words))
        texts = {chain: append_lines(chain, rules) for chain, rules in chains.items()}
        for endpoint in endpoints.values():
            texts[endpoint.chain] = self._endpoint(port, words, endpoint)
        return texts

    def _head(self, port: Forwarding, words: _PortWords) -> list[str]:
        """What leads the chain behind the ClusterIP: who is masqueraded."""
        match = words.match("cluster IP") + "KUBE-MARK-MASQ"
        to_cluster_ip = f"-d {port.cluster_ip}{self._width} "
        if self._masquerade_all:
            return [to_cluster_ip + match]
        if self._not_pod is not None:
            source, interface = self._not_pod
            return [source + to_cluster_ip + interface + match]
        return []

    def _endpoints(self, port: Forwarding, words: _PortWords) -> dict[str, _EndpointWords]:
        """Return, by "ip:port", the endpoints that have a chain."""
        reachable = port.reachable
        names = map(str, reachable)
        return {
            name: _EndpointWords(
                f"KUBE-SEP-{chain_hash(words.hashed + name)}",
                name,
                endpoint.ip,
                "" if self._large else _comment(f"{words.name} -> {name}") + " ",
            )
            for name, endpoint in zip(names, reachable, strict=True)
        }

    def _balance(
        self, port: Forwarding, words: _PortWords, endpoints: list[_EndpointWords]
    ) -> Iterator[str]:
        """Yield the rules that choose one of the endpoints, each with the same chance."""
        if port.affinity:
            for one in endpoints:
                yield (
                    f"{one.comment}-m recent --rcheck --seconds {port.affinity} --reap"
                    f" --name {one.chain} --mask {self._mask} --rsource -j {one.chain}"
                )
        for left, one in zip(range(len(endpoints), 1, -1), endpoints, strict=False):
            yield (
                f"{one.comment}-m statistic --mode random --probability {probability(left)}"
                f" -j {one.chain}"
            )
        yield f"{endpoints[-1].comment}-j {endpoints[-1].chain}"

    def _endpoint(self, port: Forwarding, words: _PortWords, one: _EndpointWords) -> str:
        comment = "" if self._large else _comment(words.name) + " "
        recent = (
            f"-m recent --set --name {one.chain} --mask {self._mask} --rsource "
            if port.affinity
            else ""
        )
        # The first rule is for hairpin: the endpoint reaching itself.
        return (
            f"-A {one.chain} -s {one.ip}{self._width} {comment}-j KUBE-MARK-MASQ\n"
            f"-A {one.chain} -p {port.protocol} {comment}{recent}-m {port.protocol}"
            f" -j DNAT --to-destination {one.name}\n"
        )

    def _external(self, port: Forwarding, words: _PortWords) -> Iterator[str]:
        """Yield the rules for what comes from outside, and for its short circuits."""
        traffic = f"traffic for {words.name} external destinations"
        if not port.external_local:
            yield f"{_comment(f'masquerade {traffic}')} -j KUBE-MARK-MASQ"
            yield f"-j {words.cluster}"
            return
        if self._pod is not None:
            pod = "".join(self._pod)
            yield f"{pod}{_comment(f'pod {traffic}')} -j {words.cluster}"
        own = "-m addrtype --src-type LOCAL -j"
        yield f"{_comment(f'masquerade LOCAL {traffic}')} {own} KUBE-MARK-MASQ"
        yield f"{_comment(f'route LOCAL {traffic}')} {own} {words.cluster}"
        if port.external == "forward":
            yield f"-j {words.local}"

    def _firewall(self, port: Forwarding, words: _PortWords) -> Iterator[str]:
        accept = f"{_comment(f'{words.name} loadbalancer IP')} -j {words.external}"
        for cidr in port.source_ranges:
            yield f"{_source(cidr)}{accept}"
        if port.node_in_ranges:
            # The node may send with the address of the load balancer, which it owns.
            for address in port.load_balancer_ips:
                yield f"-s {address}{self._width} {accept}"
        yield _comment(f"other traffic to {words.name} will be dropped by KUBE-PROXY-FIREWALL")


class _EndpointWords(NamedTuple):
    """comment -- of the rules that choose it; with a space behind, or empty."""

    chain: str
    name: str
    ip: str
    comment: str


class _PortWords:
    """The names that one Service port goes by."""

    __slots__ = (
        "_before",
        "_behind",
        "cluster",
        "external",
        "firewall",
        "hashed",
        "internal",
        "local",
        "name",
        "not_accepted",
    )

    def __init__(self, port: Forwarding) -> None:
        self.name = _comment_name(port.name)
        self.hashed = port.name + port.protocol
        ending = chain_hash(self.hashed)
        self.cluster = f"KUBE-SVC-{ending}"
        self.local = f"KUBE-SVL-{ending}"
        self.external = f"KUBE-EXT-{ending}"
        self.firewall = f"KUBE-FW-{ending}"
        self.internal = self.local if port.internal_local else self.cluster
        self._before = f'-p {port.protocol} -m comment --comment "{self.name} '
        self._behind = f'" -m {port.protocol} --dport {port.port} -j '
        self.not_accepted = self.match(f"traffic not accepted by {self.firewall}")

    def match(self, what: str) -> str:
        """Return the match for its port, with `what` in the comment, up to the target."""
        return self._before + what + self._behind


def append_lines(chain: str, rules: Iterable[str]) -> str:
    """Return the lines of a restore text that fill `chain`."""
    return "".join([f"-A {chain} {rule}\n" for rule in rules])


def _source(cidr: str) -> str:
    """Return the match of a source CIDR as iptables-save prints it."""
    network = ip_network(cidr, strict=False)
    return f"-s {network} " if network.prefixlen else ""  # everybody: nothing is printed


def _matches(detector: Detector) -> tuple[str, str]:
    """Return the match for Pods of this node: what goes before "-d", and what behind it."""
    match detector.kind:
        case "cidr":
            return _source(detector.value), ""
        case "interface":
            return "", f"-i {detector.value} "
        case "prefix":
            return "", f"-i {detector.value}+ "


def _negated(before: str, behind: str) -> tuple[str, str] | None:
    """Return the match for all others; None if there are none (the kernel refuses
    "! -s 0.0.0.0/0")."""
    if not before and not behind:
        return None
    return before and f"! {before}", behind and f"! {behind}"


# --- What does not depend on Services -------------------------------------------------------


def fixed_chains(options: Options) -> dict[str, dict[str, tuple[str, ...]]]:
    """Return the chains that are the same whatever Services there are (reference 1.4)."""
    mark = f"0x{options.mark:x}"
    invalid = ("-m conntrack --ctstate INVALID -j DROP",) if options.drop_invalid else ()
    randomly = " --random-fully" if options.random_fully else ""
    filters = {
        "KUBE-FORWARD": (
            *invalid,
            f"{_comment('kubernetes forwarding rules')} -m mark --mark {mark}/{mark} -j ACCEPT",
            f"{_comment('kubernetes forwarding conntrack rule')}"
            " -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        ),
    }
    if _guards_localnet(options):
        filters["KUBE-FIREWALL"] = (
            f"! -s 127.0.0.0/8 -d 127.0.0.0/8 {_comment('block incoming localnet connections')}"
            " -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP",
        )
    nat = {
        "KUBE-POSTROUTING": (
            f"-m mark ! --mark {mark}/{mark} -j RETURN",
            f"-j MARK --set-xmark {mark}/0x0",  # unmarked, lest it is masqueraded twice
            f"{_comment('kubernetes service traffic requiring SNAT')} -j MASQUERADE{randomly}",
        ),
        "KUBE-MARK-MASQ": (f"-j MARK --set-xmark {mark}/{mark}",),
    }
    return {"filter": filters, "nat": nat}


def _guards_localnet(options: Options) -> bool:
    """True if 127.0.0.0/8 must be guarded from outside, as route_localnet opens it
    (reference 1.9, CVE-2020-8558)."""
    return options.family == 4 and options.localhost_node_ports


def node_port_jumps(options: Options) -> tuple[str, ...]:
    """Return the last rules of nat KUBE-SERVICES: which addresses have node ports."""
    comment = _comment(
        "kubernetes service nodeports; NOTE: this must be the last rule in this chain"
    )
    to_node_ports = "-j KUBE-NODEPORTS"
    if options.node_port_addresses is None:
        local = f"{comment} -m addrtype --dst-type LOCAL {to_node_ports}"
        if options.family == 6:
            return (f"! -d ::1/128 {local}",)
        return (local if options.localhost_node_ports else f"! -d 127.0.0.0/8 {local}",)
    width = "/32" if options.family == 4 else "/128"
    return tuple(
        f"-d {address}{width} {comment} {to_node_ports}"
        for address in dict.fromkeys(options.node_port_addresses)
        if _guards_localnet(options) or not ip_address(address).is_loopback
    )


_NEW: Final = "-m conntrack --ctstate NEW "
_EXTERNAL_JUMP: Final = (
    f"{_NEW}{_comment('kubernetes externally-visible service portals')} -j KUBE-EXTERNAL-SERVICES"
)
_PORTALS: Final = f"{_comment('kubernetes service portals')} -j KUBE-SERVICES"
_LB_JUMP: Final = f"{_NEW}{_comment('kubernetes load balancer firewall')} -j KUBE-PROXY-FIREWALL"
_JUMPS: Final[RuleSet] = {
    "filter": {
        "INPUT": (
            "-j KUBE-FIREWALL",
            _LB_JUMP,
            f"{_comment('kubernetes health check service ports')} -j KUBE-NODEPORTS",
            _EXTERNAL_JUMP,
        ),
        "FORWARD": (
            _LB_JUMP,
            f"{_comment('kubernetes forwarding rules')} -j KUBE-FORWARD",
            f"{_NEW}{_PORTALS}",
            _EXTERNAL_JUMP,
        ),
        "OUTPUT": ("-j KUBE-FIREWALL", _LB_JUMP, f"{_NEW}{_PORTALS}"),
    },
    # nat is asked for the first packet of a connection only: no need for ctstate.
    "nat": {
        "PREROUTING": (_PORTALS,),
        "OUTPUT": (_PORTALS,),
        "POSTROUTING": (f"{_comment('kubernetes postrouting rules')} -j KUBE-POSTROUTING",),
    },
}


def jumps(options: Options) -> RuleSet:
    """Return the rules in the built-in chains that lead to ours, in the order in which a fresh
    node ends up with them (reference 1.3).

    KUBE-FIREWALL is kubelet's too: the jump there is made whatever the options, as kube-proxy
    does, so the chain must be there, but only with localhost node ports do we write it.
    """
    return _JUMPS
