"""What `kdns check` can find: the list of all findings, and one of them as a value.

Decides how bad each is and where it belongs when it is told. Who finds it is for the modules
check_registry.py, check_dns.py, check_kernel.py and check_host.py; how it looks is
check_command.py's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, Literal, NamedTuple, TypeAlias

# error: somebody's request fails, or goes where it should not. warning: it will when something
# else happens, or an intention in the registry comes to nothing. note: good to know, no finding.
Severity: TypeAlias = Literal["error", "warning", "note"]
Part: TypeAlias = Literal["registry", "dns", "gate", "rules", "conntrack", "host"]

PARTS: Final[Mapping[Part, str]] = {
    "registry": "Registry",
    "dns": "DNS",
    "gate": "Gate and revisions",
    "rules": "Kernel rules",
    "conntrack": "Connection tracking",
    "host": "This node and its neighbours",
}
ORDER: Final[tuple[Severity, ...]] = ("error", "warning", "note")


class Kind(NamedTuple):
    """One sort of finding. passing -- it may be nothing but a change on its way: what is still
    there at a second look is told, the rest is not"""

    part: Part
    severity: Severity
    means: str
    passing: bool = False


KINDS: Final[Mapping[str, Kind]] = {
    # --- registry
    "registry-not-synced": Kind("registry", "error", "the registry was never listed whole"),
    "namespace-missing": Kind("registry", "error", "a Service in a namespace that is not there"),
    "service-without-endpoints": Kind("registry", "warning", "nothing stands behind a Service"),
    "service-none-ready": Kind(
        "registry", "error", "a Service has endpoints, and none is ready", True
    ),
    "service-only-terminating": Kind(
        "registry", "warning", "the last endpoints of a Service are about to go", True
    ),
    "selector-matches-nothing": Kind("registry", "warning", "a selector that fits no Pod"),
    "service-without-selector": Kind(
        "registry", "warning", "neither selector nor EndpointSlices: nothing can be behind it"
    ),
    "port-without-endpoints": Kind(
        "registry", "error", "a Service port that no EndpointSlice has, beside others that have"
    ),
    "slice-port-unknown": Kind(
        "registry", "warning", "an EndpointSlice with a port that its Service does not have"
    ),
    "slice-without-service": Kind(
        "registry", "warning", "EndpointSlices of a Service that is not there", True
    ),
    "endpoint-address-wrong": Kind(
        "registry", "error", "an endpoint's address is none, or of the other family"
    ),
    "endpoint-pod-gone": Kind("registry", "error", "an endpoint names a Pod that is gone", True),
    "endpoint-pod-differs": Kind(
        "registry", "error", "an endpoint has another address than its Pod", True
    ),
    "family-without-endpoints": Kind(
        "registry", "warning", "a Service has an address of a family in which nothing is behind it"
    ),
    "pod-address-shared": Kind("registry", "error", "two Pods with one address", True),
    "cluster-ip-claimed-twice": Kind("registry", "error", "two Services with one ClusterIP"),
    "node-port-claimed-twice": Kind("registry", "error", "two Service ports with one NodePort"),
    "external-ip-claimed-twice": Kind(
        "registry", "error", "two Service ports with one external or load balancer address"
    ),
    "external-ip-shadows": Kind(
        "registry", "error", "an external IP takes the traffic to an address of the cluster"
    ),
    "external-name-wrong": Kind("registry", "error", "an externalName that no resolver can use"),
    "service-in-pod-cidr": Kind("registry", "error", "Service and Pod addresses overlap"),
    "pod-in-service-cidr": Kind("registry", "error", "a Pod has an address of the Services"),
    "node-in-cidr": Kind("registry", "error", "a Node's address among those of Pods or Services"),
    "pod-cidrs-overlap": Kind("registry", "error", "two Nodes with overlapping Pod CIDRs"),
    "node-unknown": Kind("registry", "warning", "this node is not among the Nodes"),
    "no-local-endpoints": Kind(
        "registry", "warning", "traffic policy Local, and no endpoint on this node"
    ),
    "load-balancer-pending": Kind("registry", "note", "a load balancer without an address yet"),
    "left-to-another-proxy": Kind("registry", "note", "a Service that another proxy forwards"),
    # --- dns
    "dns-no-answer": Kind("dns", "error", "a DNS server does not answer"),
    "dns-not-a-cluster-dns": Kind("dns", "error", "a DNS server that knows no name of the cluster"),
    "dns-refused": Kind("dns", "error", "a cluster name is refused, or its look-up fails", True),
    "dns-name-missing": Kind("dns", "error", "a name of the registry that DNS does not know", True),
    "dns-answer-missing": Kind(
        "dns", "error", "DNS leaves out addresses that the registry has", True
    ),
    "dns-answer-extra": Kind(
        "dns", "error", "DNS gives addresses that the registry does not have", True
    ),
    "dns-answer-differs": Kind("dns", "error", "DNS gives other addresses for a name", True),
    "dns-port-differs": Kind("dns", "error", "an SRV record with other ports", True),
    "dns-servers-differ": Kind("dns", "error", "two DNS servers answer differently", True),
    "dns-answers-anything": Kind(
        "dns", "warning", "a cluster name that nobody has is answered nevertheless"
    ),
    "dns-not-asked": Kind("dns", "note", "there is no DNS server to ask"),
    # --- gate
    "gate-open": Kind("gate", "warning", "DNS does not wait for the kernel at present"),
    "gate-waiting": Kind("gate", "warning", "a name waits too long for its rules"),
    "published-unprogrammed": Kind(
        "gate", "error", "DNS shows a Service whose rules are not in the kernel", True
    ),
    "dns-behind": Kind("gate", "warning", "DNS shows an older registry", True),
    "kernel-behind": Kind("gate", "warning", "the kernel's rules are of an older registry", True),
    "server-not-synced": Kind("gate", "error", "the running kdns has not listed its registry"),
    "dns-path-broken": Kind("gate", "error", "packets to the node's own DNS server are tracked"),
    # --- rules
    "rules-gone": Kind("rules", "error", "none of the rules is in the kernel"),
    "jumps-missing": Kind("rules", "error", "the rules are there, but no packet gets to them"),
    "rules-missing": Kind("rules", "error", "rules of a Service are not in the kernel", True),
    "rules-differ": Kind("rules", "error", "rules of a Service are other ones", True),
    "rules-extra": Kind("rules", "warning", "rules of a Service that are not wanted", True),
    "frame-differs": Kind("rules", "error", "a chain that all Services share is changed", True),
    "iptables-both-variants": Kind(
        "rules", "error", "KUBE- chains in iptables-legacy and in iptables-nft"
    ),
    "other-mode-left": Kind("rules", "warning", "what another mode of kube-proxy left beside ours"),
    "kernel-not-seen": Kind("rules", "note", "the kernel's rules could not be read"),
    "mode-not-compared": Kind("rules", "note", "rules of this mode are not compared one by one"),
    # --- conntrack
    "stale-flow": Kind(
        "conntrack", "error", "UDP clients still go to an endpoint that is gone", True
    ),
    "conntrack-full": Kind("conntrack", "warning", "the table of connections is almost full"),
    # --- host
    "ip-forward-off": Kind("host", "error", "this node does not forward packets"),
    "route-localnet-off": Kind("host", "warning", "NodePorts do not answer on 127.0.0.1"),
    "bridge-nf-call-off": Kind("host", "warning", "packets between Pods of one bridge miss rules"),
    "node-port-ephemeral": Kind(
        "host", "warning", "a NodePort among the ports of outgoing connections"
    ),
    "service-in-host-network": Kind(
        "host", "error", "a ClusterIP among the addresses next to this node"
    ),
    "resolv-conf-loop": Kind("host", "error", "DNS forwards its questions to itself"),
    "resolv-conf-stub": Kind("host", "warning", "DNS forwards to the resolver of this host"),
    "forward-nowhere": Kind("host", "error", "DNS forwards to a resolv.conf without nameserver"),
}


class Finding(NamedTuple):
    """subject -- whom it is about ("Service default/web"): with the id, what tells it from others
    text    -- what was found; cause -- where it comes from; advice -- what to do"""

    id: str
    severity: Severity
    subject: str
    text: str
    cause: str
    advice: str

    @property
    def part(self) -> Part:
        return KINDS[self.id].part


def finding(id: str, subject: str, text: str, cause: str, advice: str) -> Finding:
    """Return a Finding as bad as its kind is."""
    return Finding(id, KINDS[id].severity, subject, text, cause, advice)


def in_order(found: Iterable[Finding]) -> list[Finding]:
    """Return the findings, each once, as they are told: the worst first, then by their part."""
    ids = [*KINDS]
    parts = [*PARTS]
    once = {(one.id, one.subject, one.text): one for one in found}
    return sorted(
        once.values(),
        key=lambda one: (
            parts.index(one.part), ORDER.index(one.severity), ids.index(one.id), one.subject,
        ),
    )  # fmt: skip


def few(words: Iterable[str], most: int = 3) -> str:
    """Return the first words of a list, and how many more there are."""
    those = [*words]
    more = f" and {len(those) - most} more" if len(those) > most else ""
    return ", ".join(those[:most]) + more


def count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
