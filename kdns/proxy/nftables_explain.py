"""Why each rule and element of the nftables mode is there, in a sentence each.

Says it of the rules that nftables_rules.py spelt, as `kdns rules --explain` prints it; decides
nothing, and nothing depends on it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from kdns.proxy.nftables_rules import (
    CLUSTER_IPS,
    FIREWALL_IPS,
    HAIRPIN,
    NO_NODE_PORT,
    NO_SERVICE,
    NODE_PORT_IPS,
    NODE_PORTS,
    SERVICE_IPS,
    Spelling,
)
from kdns.proxy.options import Options
from kdns.proxy.table import Forwarding, ForwardingTable

_FIXED: Final[Mapping[str, str]] = {
    "filter-prerouting-pre-dnat": "before translation: who may use a load balancer's address",
    "filter-output-pre-dnat": "the same for this node's own packets",
    "filter-input": "to this node and not translated: refuse what has no endpoints",
    "filter-forward": "through this node and not translated: refuse what has no endpoints",
    "filter-output": "from this node and not translated: refuse what has no endpoints",
    "nat-prerouting": "from outside or a Pod: translate what is for a Service",
    "nat-output": "from this node: translate what is for a Service",
    "nat-postrouting": "on the way out: masquerade what must come back here",
    "nodeport-endpoints-check": "to a node port without endpoints: refuse or drop",
    "service-endpoints-check": "to a Service address without endpoints: refuse or drop",
    "firewall-check": "to a load balancer's address with source ranges: check the client",
    "masquerading": "replace the source by the node's: marked, or an endpoint that asks itself",
    "cluster-ips-check": "a ClusterIP, but none of its ports, or no ClusterIP of any Service",
    "reject-chain": "say at once that nobody answers",
}
_SERVICES: Final = (
    ("set meta mark", "to a ClusterIP, and not from a Pod of this cluster: masquerade"),
    (SERVICE_IPS, "one look, however many Services: which chain is this address's"),
    (NODE_PORTS, "and for the node's own addresses: which chain is this node port's"),
)
_PLACES: Final[Mapping[str, str]] = {
    SERVICE_IPS: "its endpoints are chosen there",
    NODE_PORTS: "node port; its endpoints are chosen there",
    FIREWALL_IPS: "loadBalancerSourceRanges: the client is checked first",
    CLUSTER_IPS: "ClusterIP",
    HAIRPIN: "endpoint on this node that may ask itself: masquerade",
    NODE_PORT_IPS: "address of this node that node ports answer on",
}
_REFUSED: Final[Mapping[bool, str]] = {
    True: "no endpoints: refused at once",
    False: "traffic policy Local, and no endpoint on this node: dropped",
}
_CHANCE: Final = re.compile(r"numgen random mod (\d+)( 0)? ")


class Reasons:
    """The reasons for the rules and elements of one table."""

    def __init__(self, table: ForwardingTable, options: Options) -> None:
        self._chains: dict[str, Forwarding] = {}
        self._elements: dict[tuple[str, str, str], Forwarding] = {}
        spelling = Spelling(options)
        for port in table:
            spelt = spelling.spell(port)
            self._chains.update(dict.fromkeys(spelt.chains, port))
            for one in spelt.elements:
                self._elements.setdefault((one.place, one.key, one.tail), port)

    def element(self, place: str, key: str, tail: str) -> str:
        """Return whose an element of a set or map is, and why it is there."""
        port = self._elements.get((place, key, tail))
        if place in (NO_SERVICE, NO_NODE_PORT):
            why = _REFUSED["reject" in tail]
        else:
            why = _PLACES[place]
            address = key.split(" . ", maxsplit=1)[0]
            if port is not None and place == SERVICE_IPS:
                why = f"{_kind(port, address)}; {why}"
        return why if port is None else f"{_title(port)}: {why}"

    def rule(self, chain: str, rule: str) -> str:
        """Return whose a rule of a chain is, and why it is there."""
        port = self._chains.get(chain)
        if port is None:
            if chain == "services":
                return next(why for sign, why in _SERVICES if sign in rule)
            return _FIXED[chain]
        return f"{_title(port)}: {_purpose(chain, rule, port)}"


def _title(port: Forwarding) -> str:
    return f"{port.name} {port.port}/{port.protocol}"


def _kind(port: Forwarding, address: str) -> str:
    if address == port.cluster_ip:
        return "ClusterIP"
    return "external IP" if address in port.external_ips else "load balancer's IP"


def _purpose(chain: str, rule: str, port: Forwarding) -> str:
    if chain.startswith("firewall-"):
        return "only clients in loadBalancerSourceRanges pass"
    if chain.startswith("external-"):
        return _external_purpose(rule, port)
    if rule.startswith("update @"):
        return f"the client stays with this endpoint for {port.affinity} s"
    if chain.startswith("endpoint-"):
        return "to this endpoint"
    if " saddr @" in rule:
        return "a client of late goes where it went"
    chance = _CHANCE.search(rule)
    if chance is None:
        return "to this endpoint" if rule.count("numgen") == 0 else "to one of the endpoints"
    if chance[2]:
        return f"to this endpoint one time in {chance[1]}, of those that are left"
    return f"to one of {chance[1]} endpoints, each with the same chance"


def _external_purpose(rule: str, port: Forwarding) -> str:
    if "short-circuit pod" in rule:
        return "policy Local: Pods of this cluster are served by every endpoint all the same"
    if "masquerade local" in rule:
        return "policy Local: this node's own packets must come back here"
    if "short-circuit local" in rule:
        return "policy Local: this node itself is served by every endpoint"
    if "set meta mark" in rule:
        return "from outside: masquerade, the answer must come back here"
    if "goto local-" in rule:
        return "policy Local: from outside to endpoints of this node, and the address is kept"
    return "to one of the endpoints, on whichever node"
