"""Why each rule of the iptables mode is there, in a sentence each.

Says it of the rules that iptables_rules.py spelt, as `kdns rules --explain` prints it; decides
nothing, and nothing depends on it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from kdns.proxy.iptables_rules import Spelling
from kdns.proxy.options import Options
from kdns.proxy.table import Forwarding, ForwardingTable

# What a rule is for that is there whatever the Services: by chain and a sign in the rule; the
# first that fits.
_FIXED: Final = (
    ("", "-j KUBE-PROXY-FIREWALL", "new connections: who may use a load balancer's address"),
    ("", "-j KUBE-EXTERNAL-SERVICES", "refuse what comes from outside for a Service without"
     " endpoints"),
    ("", "-j KUBE-FORWARD", "let what was translated pass a firewall that forwards nothing"),
    ("", "-j KUBE-FIREWALL", "keep others from this node's loopback addresses"),
    ("", "health check service ports", "health-check node ports are answered by this node"),
    ("", "-j KUBE-NODEPORTS", "the node's own addresses come last: is it a node port?"),
    ("", "-j KUBE-SERVICES", "is it for a Service?"),
    ("", "-j KUBE-POSTROUTING", "on the way out: does the answer have to come back here?"),
    ("KUBE-FIREWALL", "", "route_localnet lets node ports answer on 127.0.0.1, and nobody else in"),
    ("KUBE-FORWARD", "--ctstate INVALID", "packets that conntrack cannot place would break"
     " connections"),
    ("KUBE-FORWARD", "--mark", "marked for masquerading, so translated: it may pass"),
    ("KUBE-FORWARD", "", "the rest of such a connection may pass, too"),
    ("KUBE-MARK-MASQ", "", "the mark that asks for masquerading"),
    ("KUBE-POSTROUTING", "-j RETURN", "not marked: the source stays"),
    ("KUBE-POSTROUTING", "-j MARK", "take the mark off, it has done its work"),
    ("KUBE-POSTROUTING", "-j MASQUERADE", "replace the source by the node's address"),
)  # fmt: skip
_CHANCE: Final = re.compile(r"--probability (\d\.\d+)")


class Reasons:
    """The reasons for the rules of one table.

    large -- a cluster so large that rules are spelt without comments
    """

    def __init__(self, table: ForwardingTable, options: Options, large: bool) -> None:
        self._chains: dict[str, Forwarding] = {}
        self._shared: dict[tuple[str, str, str], Forwarding] = {}
        spelling = Spelling(options, large)
        for port in table:
            spelt = spelling.spell(port)
            self._chains.update(dict.fromkeys(spelt.chains, port))
            for (name, chain), rule in spelt.shared:
                self._shared.setdefault((name, chain, rule), port)

    def rule(self, table: str, chain: str, rule: str) -> str:
        """Return whose a rule of a chain is, and why it is there. rule -- without "-A CHAIN " """
        port = self._chains.get(chain)
        if port is not None:
            return f"{_title(port)}: {_purpose(chain, rule, port)}"
        port = self._shared.get((table, chain, rule))
        if port is not None:
            return f"{_title(port)}: {_entrance(table, chain, rule, port)}"
        return next(why for where, sign, why in _FIXED if where in ("", chain) and sign in rule)


_REFUSALS: Final[Mapping[str, str]] = {
    "-j REJECT": "no endpoints: refused at once",
    "-j DROP": "dropped",
}


def _title(port: Forwarding) -> str:
    return f"{port.name} {port.port}/{port.protocol}"


def _entrance(table: str, chain: str, rule: str, port: Forwarding) -> str:
    """Say what a rule is for that stands among those of other Services."""
    if chain == "KUBE-PROXY-FIREWALL":
        return "not from loadBalancerSourceRanges, nor let in by KUBE-FW: dropped"
    place = _place(rule, port)
    if table == "filter" and chain == "KUBE-NODEPORTS":
        return "its health check is answered by this node"
    for sign, why in _REFUSALS.items():
        if sign in rule:
            local = " (policy Local, and none on this node)" if sign == "-j DROP" else ""
            return f"{place}; {why}{local}"
    if "-j KUBE-FW-" in rule:
        return f"{place}; loadBalancerSourceRanges are checked first"
    if "-j KUBE-EXT-" in rule:
        return f"{place}; goes on as what comes from outside"
    if "-j KUBE-MARK-MASQ" in rule:
        return f"{place}; masquerade, the answer must come back here"
    return f"{place}; its endpoints are chosen there"


def _place(rule: str, port: Forwarding) -> str:
    found = re.search(r"-d (\S+?)(?:/\d+)? ", f"{rule} ")
    if found is None:
        return f"node port {port.node_port}"
    address = found[1]
    if address == port.cluster_ip:
        return "ClusterIP"
    return "external IP" if address in port.external_ips else "load balancer's IP"


def _purpose(chain: str, rule: str, port: Forwarding) -> str:
    """Say what a rule of a Service port's own chains is for."""
    if chain.startswith("KUBE-FW-"):
        return _firewall_purpose(rule)
    if chain.startswith("KUBE-EXT-"):
        return _external_purpose(rule)
    if chain.startswith("KUBE-SEP-"):
        if "-j KUBE-MARK-MASQ" in rule:
            return "an endpoint that asks itself: masquerade"
        if "-j DNAT" in rule and "--set" in rule:
            return f"to this endpoint, and the client stays with it for {port.affinity} s"
        return "to this endpoint"
    if "-j KUBE-MARK-MASQ" in rule:
        return "to a ClusterIP, and not from a Pod of this cluster: masquerade"
    if "--rcheck" in rule:
        return f"a client of the last {port.affinity} s goes where it went"
    chance = _CHANCE.search(rule)
    if chance is not None:
        return f"to this endpoint {round(float(chance[1]) * 100)} times in 100, of what is left"
    return "to this endpoint what is left"


def _firewall_purpose(rule: str) -> str:
    if "will be dropped" in rule:
        return "nobody else: what comes to here is dropped by KUBE-PROXY-FIREWALL"
    if " -s " in f" {rule}":
        return "a client in loadBalancerSourceRanges is let in"
    return "the load balancer's own address is let in"


def _external_purpose(rule: str) -> str:
    if "pod traffic for" in rule:
        return "policy Local: Pods of this cluster are served by every endpoint all the same"
    if "masquerade LOCAL traffic" in rule:
        return "policy Local: this node's own packets must come back here"
    if "route LOCAL traffic" in rule:
        return "policy Local: this node itself is served by every endpoint"
    if "-j KUBE-MARK-MASQ" in rule:
        return "from outside: masquerade, the answer must come back here"
    if "-j KUBE-SVL-" in rule:
        return "policy Local: from outside to endpoints of this node, and the address is kept"
    return "to one of the endpoints, on whichever node"
