"""*** Where a Service becomes nftables rules: Forwarding -> chains, rules and map elements. ***

Spells what table.py decided in the chains, sets, maps and words of kube-proxy's nftables mode
(reference 2.2), and as `nft list table` prints them, so that what is asked of the kernel can
be compared with what it holds. What the kernel has yet to be told is nftables.py's.
"""

from __future__ import annotations

import re
from base64 import b32encode
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from hashlib import sha256
from ipaddress import collapse_addresses, ip_address, ip_network
from typing import Final, NamedTuple, TypeAlias

from kdns.proxy.options import Detector, Family, Options
from kdns.proxy.table import Forwarding, Verdict
from kdns.registry.endpoints import Endpoint

TABLE: Final = "kube-proxy"
TABLE_COMMENT: Final = "rules for kube-proxy"
WORD: Final[Mapping[Family, str]] = {4: "ip", 6: "ip6"}

# A Service port with more endpoints than this chooses one by a look into an anonymous map, as
# kube-proxy always does; with fewer by rules tried one after the other. The kernel looks for a
# name for each anonymous map among all sets of the table: so loading takes quadratic time in
# their number. Cold load with nft 1.0.6, rules against maps: 2,000 Services of 4 endpoints 0.32
# and 0.53 s, of 8 0.54 and 0.61, of 16 0.94 and 0.78; 10,000 of 2 1.0 and 23 s. connect() takes
# 0.2 us more by 4 rules than by a map, 1.5 us by 8, 3 us by 32.
MOST_RULES: Final = 8

# What the name of a set begins with that remembers the clients of one endpoint.
AFFINITY: Final = "affinity-"

CLUSTER_IPS: Final = "cluster-ips"
NODE_PORT_IPS: Final = "nodeport-ips"
HAIRPIN: Final = "hairpin-connections"
SERVICE_IPS: Final = "service-ips"
NO_SERVICE: Final = "no-endpoint-services"
FIREWALL_IPS: Final = "firewall-ips"
NODE_PORTS: Final = "service-nodeports"
NO_NODE_PORT: Final = "no-endpoint-nodeports"
# The chain for what is a ClusterIP or might be one, and has not been translated.
UNALLOCATED: Final = "cluster-ips-check"

# The most octets of a comment (NFTNL_UDATA_COMMENT_MAXLEN, with its end), and of the part of a
# chain's name behind its first word (reference 2.2).
_COMMENT_MOST: Final = 120
_NAME_MOST: Final = 240
_AFFINITY_SIZE: Final = 65535  # clients remembered of each endpoint: the kernel's own default


class Chain(NamedTuple):
    """One chain.

    rules -- as the kernel prints them
    head  -- the lines before them: hook and priority, or a comment
    sets  -- sets that some of its rules name, with their seconds: a set that changes is made
             anew, and so must be the rules that name it
    """

    rules: tuple[str, ...]
    head: tuple[str, ...] = ()
    sets: tuple[tuple[str, int], ...] = ()


class Element(NamedTuple):
    """One element that a Service port asks for.

    place -- the set or map; tail -- what follows the key: comment and verdict
    """

    place: str
    key: str
    tail: str = ""


class Spelt(NamedTuple):
    """What one Service port asks for. affinity -- sets -> seconds"""

    chains: dict[str, Chain]
    affinity: dict[str, int]
    elements: list[Element]


# Definitions of sets and maps: name -> (kind, the lines of its definition).
Definition: TypeAlias = tuple[str, tuple[str, ...]]


# --- names ----------------------------------------------------------------------------------

# All that the API server lets through; a name from elsewhere must not become a rule.
_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_./-]*")
_PLAIN_TEXT: Final = re.compile(r"[A-Za-z0-9_./:-]*")


def chain_name(text: str) -> str:
    """Return the part of a chain's name that stands for `text` ("ns/service/tcp/port")."""
    ending = b32encode(sha256(text.encode()).digest()[:5]).decode()
    if not _PLAIN_NAME.fullmatch(text):
        text = re.sub(r"[^A-Za-z0-9_./-]", "_", text)
    name = f"{ending}-{text}"
    return name if len(name) <= _NAME_MOST else f"{name[: _NAME_MOST - 3]}..."


def _comment(text: str) -> str:
    if not _PLAIN_TEXT.fullmatch(text):
        text = re.sub(r"[^A-Za-z0-9_./:-]", "?", text)
    return f'comment "{text[:_COMMENT_MOST]}"'


# --- one Service port -----------------------------------------------------------------------


class Spelling:
    """The words of one family's rules, for given options."""

    def __init__(self, options: Options) -> None:
        self._ip = WORD[options.family]
        self._mark = f"meta mark set meta mark | 0x{options.mark:08x}"
        # None: Pods of this node are not told from others; "": all there are, are Pods.
        self._pod = None if options.detector is None else _matches(options.detector, self._ip)
        self._type = f"ipv{options.family}_addr"

    def spell(self, port: Forwarding) -> Spelt:
        """Return all that one Service port asks for."""
        words = _PortWords(port)
        affinity: dict[str, int] = {}
        chains = self._chains(port, words, affinity)
        return Spelt(chains, affinity, list(self._elements(port, words)))

    def _elements(self, port: Forwarding, words: _PortWords) -> Iterator[Element]:
        behind = f" . {port.protocol} . {port.port}"
        yield Element(CLUSTER_IPS, port.cluster_ip)
        if port.internal == "forward":
            yield Element(SERVICE_IPS, port.cluster_ip + behind, f" : goto {words.internal}")
        else:
            yield Element(NO_SERVICE, port.cluster_ip + behind, words.refusal(port.internal))
        for address in dict.fromkeys((*port.external_ips, *port.load_balancer_ips)):
            if port.has_endpoints:
                yield Element(SERVICE_IPS, address + behind, f" : goto {words.external}")
            if port.external != "forward":
                yield Element(NO_SERVICE, address + behind, words.refusal(port.external))
        if port.source_ranges:
            for address in port.load_balancer_ips:
                yield Element(FIREWALL_IPS, address + behind, f" : goto {words.firewall}")
        if port.node_port:
            key = f"{port.protocol} . {port.node_port}"
            if port.has_endpoints:
                yield Element(NODE_PORTS, key, f" : goto {words.external}")
            if port.external != "forward":
                yield Element(NO_NODE_PORT, key, words.refusal(port.external))
        for one in port.reachable:
            if one.local:  # only who is here can be its own client here
                yield Element(HAIRPIN, f"{one.ip} . {one.ip} . {port.protocol} . {one.port}")

    def _chains(
        self, port: Forwarding, words: _PortWords, affinity: dict[str, int]
    ) -> dict[str, Chain]:
        chains: dict[str, Chain] = {}
        uses_local = port.internal_local or port.external_local
        for name, members in (
            (words.cluster, port.cluster),
            (words.local, port.local if uses_local else ()),
        ):
            if not members:
                continue
            if port.affinity:
                chains[name] = self._sticky(port, words, members, chains, affinity)
            else:
                chains[name] = Chain(_balance(self._ip, port.protocol, members))
        if port.has_endpoints and port.externally_accessible:
            chains[words.external] = Chain(tuple(self._external(port, words)))
        if port.source_ranges and port.load_balancer_ips:
            chains[words.firewall] = Chain((self._firewall(port),))
        return chains

    def _sticky(
        self,
        port: Forwarding,
        words: _PortWords,
        members: tuple[Endpoint, ...],
        chains: dict[str, Chain],
        affinity: dict[str, int],
    ) -> Chain:
        """Return the chain that chooses among `members` for clients that stay with one; add
        the endpoints' own chains and sets."""
        known, targets, sets = [], [], []
        for one in members:
            ending = words.endpoint(one)
            chain, clients = f"endpoint-{ending}", f"{AFFINITY}{ending}"
            sets.append((clients, port.affinity))
            affinity[clients] = port.affinity
            chains[chain] = Chain(
                (
                    f"update @{clients} {{ {self._ip} saddr }}",
                    f"meta l4proto {port.protocol} dnat to {one}",
                ),
                sets=((clients, port.affinity),),
            )
            known.append(f"{self._ip} saddr @{clients} goto {chain}")
            targets.append(f"goto {chain}")
        return Chain((*known, *_choose(targets)), sets=tuple(sets))

    def _external(self, port: Forwarding, words: _PortWords) -> Iterator[str]:
        if not port.external_local:
            yield f'{self._mark} comment "masquerade"'
            yield f"goto {words.cluster}"
            return
        if self._pod is not None:
            yield f'{self._pod[0]}goto {words.cluster} comment "short-circuit pod traffic"'
        own = "fib saddr type local"
        yield f'{own} {self._mark} comment "masquerade local traffic"'
        yield f'{own} goto {words.cluster} comment "short-circuit local traffic"'
        if port.external == "forward":
            yield f"goto {words.local}"

    def _firewall(self, port: Forwarding) -> str:
        # The node may send with the address of the load balancer, which it owns.
        own = port.load_balancer_ips if port.node_in_ranges else ()
        allowed = [*map(_net, _collapsed((*port.source_ranges, *own)))]
        # nft makes a set of one what is in it.
        those = allowed[0] if len(allowed) == 1 else f"{{ {', '.join(allowed)} }}"
        return f"{self._ip} saddr != {those} drop"


def _choose(targets: list[str]) -> Iterator[str]:
    """Yield the rules that take one of `targets`, each with the same chance."""
    if len(targets) > MOST_RULES:
        every = ", ".join(f"{number} : {target}" for number, target in enumerate(targets))
        yield f"numgen random mod {len(targets)} vmap {{ {every} }}"
        return
    # The first of 3 is taken one time in 3, the next one time in the 2 that are left, ...
    for left, target in zip(range(len(targets), 0, -1), targets, strict=True):
        yield f"numgen random mod {left} 0 {target}" if left > 1 else target


def _balance(ip: str, protocol: str, members: tuple[Endpoint, ...]) -> tuple[str, ...]:
    """Return the rules that translate to one of `members`, each with the same chance."""
    if len(members) > MOST_RULES:
        every = ", ".join(f"{i} : {one.ip} . {one.port}" for i, one in enumerate(members))
        choice = f"numgen random mod {len(members)} map {{ {every} }}"
        return (f"meta l4proto {protocol} dnat {ip} to {choice}",)
    return tuple(_choose([f"meta l4proto {protocol} dnat to {one}" for one in members]))


class _PortWords:
    """The names that one Service port goes by."""

    __slots__ = ("_name", "_text", "cluster", "external", "firewall", "internal", "local")

    def __init__(self, port: Forwarding) -> None:
        owner, _, name = port.name.partition(":")
        self._name = port.name
        self._text = f"{owner}/{port.protocol}/{name}"
        ending = chain_name(self._text)
        self.cluster = f"service-{ending}"
        self.local = f"local-{ending}"
        self.external = f"external-{ending}"
        self.firewall = f"firewall-{ending}"
        self.internal = self.local if port.internal_local else self.cluster

    def endpoint(self, one: Endpoint) -> str:
        return chain_name(f"{self._text}__{one.ip.replace(':', '.')}/{one.port}")

    def refusal(self, verdict: Verdict) -> str:
        target = "goto reject-chain" if verdict == "reject" else "drop"
        return f" {_comment(self._name)} : {target}"


# --- addresses ------------------------------------------------------------------------------


@lru_cache(maxsize=4096)  # some Services share long lists of them
def _collapsed(ranges: tuple[str, ...]) -> tuple[str, ...]:
    """Return the CIDRs without overlaps, which nft refuses, in order."""
    nets = [ip_network(one) for one in ranges]
    return tuple(map(str, collapse_addresses(nets)))  # type: ignore[type-var]


def _net(cidr: str) -> str:
    """Return a CIDR as the kernel prints it: a single address without its length."""
    network = ip_network(cidr, strict=False)
    return str(network.network_address if network.num_addresses == 1 else network)


def _matches(detector: Detector, ip: str) -> tuple[str, str | None]:
    """Return the match for Pods of this node and that for all others, each with a space behind;
    of the second None: there are none."""
    match detector.kind:
        case "cidr":
            if ip_network(detector.value, strict=False).prefixlen == 0:
                return "", None
            net = _net(detector.value)
            return f"{ip} saddr {net} ", f"{ip} saddr != {net} "
        case "interface":
            return f'iifname "{detector.value}" ', f'iifname != "{detector.value}" '
        case "prefix":
            return f'iifname "{detector.value}*" ', f'iifname != "{detector.value}*" '


# --- what does not depend on Services -------------------------------------------------------

# Base chain -> its line, and the rules in it.
_NEW: Final = "ct state new jump"
_BASE: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "filter-prerouting-pre-dnat": ("filter hook prerouting priority -110",
                                   (f"{_NEW} firewall-check",)),
    "filter-output-pre-dnat": ("filter hook output priority -110", (f"{_NEW} firewall-check",)),
    "filter-input": ("filter hook input priority 0",
                     (f"{_NEW} nodeport-endpoints-check", f"{_NEW} service-endpoints-check")),
    "filter-forward": ("filter hook forward priority 0",
                       (f"{_NEW} service-endpoints-check", f"{_NEW} cluster-ips-check")),
    "filter-output": ("filter hook output priority 0",
                      (f"{_NEW} service-endpoints-check", f"{_NEW} cluster-ips-check")),
    "nat-prerouting": ("nat hook prerouting priority -100", ("jump services",)),
    "nat-output": ("nat hook output priority -100", ("jump services",)),
    "nat-postrouting": ("nat hook postrouting priority 100", ("jump masquerading",)),
}  # fmt: skip


def fixed_chains(options: Options, service_cidrs: tuple[str, ...] = ()) -> dict[str, Chain]:
    """Return the chains that are the same whatever Services there are.

    service_cidrs -- those of the family, where they are known
    """
    chains = {
        name: Chain(rules, (f"type {line}; policy accept;",))
        for name, (line, rules) in _BASE.items()
    }
    ip, mark = WORD[options.family], f"0x{options.mark:08x}"
    loopback = f"{ip} daddr != {'127.0.0.0/8' if options.family == 4 else '::1'} "
    if options.node_port_addresses is None:
        to_node, from_anywhere = loopback, f"fib daddr type local {loopback}"
    else:
        to_node = from_anywhere = f"{ip} daddr @{NODE_PORT_IPS} "
    port = "meta l4proto . th dport vmap"
    place = f"{ip} daddr . {port}"
    chains["nodeport-endpoints-check"] = Chain((f"{to_node}{port} @{NO_NODE_PORT}",))
    chains["service-endpoints-check"] = Chain((f"{place} @{NO_SERVICE}",))
    chains["firewall-check"] = Chain((f"{place} @{FIREWALL_IPS}",))
    chains["services"] = Chain(
        (
            *_cluster_ip_masquerade(options),
            f"{place} @{SERVICE_IPS}",
            f"{from_anywhere}{port} @{NODE_PORTS}",
        )
    )
    chains["masquerading"] = Chain(
        (
            # Unmarked, lest it is masqueraded twice.
            f"meta mark & {mark} != 0x00000000 meta mark set meta mark ^ {mark}"
            " masquerade fully-random",
            f"ct status dnat {ip} saddr . {ip} daddr . meta l4proto . th dport @{HAIRPIN}"
            " masquerade fully-random",
        )
    )
    unallocated = [
        f'{ip} daddr {_net(cidr)} drop comment "Drop traffic to unallocated ClusterIPs"'
        for cidr in _collapsed(service_cidrs)
    ]
    chains[UNALLOCATED] = Chain(
        (
            f'{ip} daddr @{CLUSTER_IPS} reject comment "Reject traffic to invalid ports of'
            ' ClusterIPs"',
            *unallocated,
        )
    )
    chains["reject-chain"] = Chain(
        ("reject",), ('comment "helper for @no-endpoint-services / @no-endpoint-nodeports"',)
    )
    return chains


def _cluster_ip_masquerade(options: Options) -> Iterator[str]:
    ip = WORD[options.family]
    head, mark = f"{ip} daddr @{CLUSTER_IPS}", f"meta mark set meta mark | 0x{options.mark:08x}"
    if options.masquerade_all:
        yield f'{head} {mark} comment "masquerade clusterIP traffic"'
    elif options.detector is not None:
        others = _matches(options.detector, ip)[1]
        if others is not None:
            text = "masquerade clusterIP traffic from outside cluster"
            yield f'{head} {others}{mark} comment "{text}"'


def fixed_sets(options: Options) -> dict[str, Definition]:
    """Return the sets and maps that are there whatever Services there are."""
    address = f"ipv{options.family}_addr"
    place, port = f"{address} . inet_proto . inet_service", "inet_proto . inet_service"
    every: dict[str, tuple[str, str, str]] = {
        HAIRPIN: ("set", f"{address} . {place}", "service hairpin connections"),
        CLUSTER_IPS: ("set", address, "Active ClusterIPs"),
        NODE_PORT_IPS: ("set", address, "IPs that accept NodePort traffic"),
        NO_SERVICE: ("map", f"{place} : verdict",
                     "vmap to drop or reject packets to services with no endpoints"),
        NO_NODE_PORT: ("map", f"{port} : verdict",
                       "vmap to drop or reject packets to service nodeports with no endpoints"),
        FIREWALL_IPS: ("map", f"{place} : verdict",
                       "destinations that are subject to LoadBalancerSourceRanges"),
        SERVICE_IPS: ("map", f"{place} : verdict",
                      "ClusterIP, ExternalIP and LoadBalancer IP traffic"),
        NODE_PORTS: ("map", f"{port} : verdict", "NodePort traffic"),
    }  # fmt: skip
    if options.node_port_addresses is None:
        del every[NODE_PORT_IPS]
    return {
        name: (kind, (f"type {type_}", f'comment "{comment}"'))
        for name, (kind, type_, comment) in every.items()
    }


def affinity_set(family: Family, seconds: int) -> Definition:
    """Return the definition of the set of one endpoint's clients."""
    return "set", (
        f"type ipv{family}_addr",
        f"size {_AFFINITY_SIZE}",
        "flags dynamic,timeout",
        f"timeout {duration(seconds)}",
    )


def duration(seconds: int) -> str:
    """Return seconds as nft prints them: 10800 -> "3h"."""
    days, rest = divmod(seconds, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    parts = ((days, "d"), (hours, "h"), (minutes, "m"), (rest, "s"))
    return "".join([f"{count}{unit}" for count, unit in parts if count])


def node_port_elements(options: Options) -> Iterable[str]:
    """Yield the node's own addresses that NodePorts answer on: never those of loopback."""
    for address in options.node_port_addresses or ():
        if not ip_address(address).is_loopback:
            yield address
