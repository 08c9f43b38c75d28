"""What a trace may find: every finding's id, where on the way it is met, and what it means.

The ids are stable: programs read them from `kdns trace -o json`, docs/TRACE.md lists them.
When one is given, and what its text says of the case at hand, is for those that look.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

# Where on its way a request is, in order.
Stage: TypeAlias = Literal["name", "service", "endpoints", "rules", "pod"]

# id -> (where, what it means)
FINDINGS: Final[Mapping[str, tuple[Stage, str]]] = {
    # the name
    "no-such-service": ("name", "no Service of that name is in the namespace, nor in another"),
    "wrong-namespace": ("name", "another namespace has the Service, not the client's"),
    "namespace-missing": ("name", "the namespace that the name says does not exist"),
    "namespace-not-exposed": ("name", "the Corefile leaves the namespace out"),
    "no-such-endpoint": ("name", "the Service is there, no endpoint of that name"),
    "no-cluster-ip": ("name", "the Service has no ClusterIP, and is not headless either"),
    "empty-service-hidden": ("name", "the Corefile hides Services without endpoints"),
    "pod-names-off": ("name", "names of Pods (1-2-3-4.NS.pod) are not answered by this Corefile"),
    "name-not-answered": ("name", "the object is there, the server does not answer for it"),
    "external-name-loop": ("name", "ExternalNames lead back to themselves"),
    "external-name-is-address": ("name", "an ExternalName is an address, and no name has it"),
    "external-name-nowhere": ("name", "an ExternalName leads to a name of the cluster that is not"),
    "no-cluster-dns": ("name", "the Pod does not ask the cluster's DNS server"),
    "ndots-outside-name": ("name", "names of the search list are asked for in vain first"),
    "libc-differs": ("name", "glibc and musl do not come to the same answer"),
    "host-alias": ("name", "the Pod's hostAliases answer before DNS does"),
    "not-synced": ("name", "kdns has not listed the registry yet"),
    "gate-waiting": ("name", "kdns withholds the name until its rules are in the kernel"),
    "gate-open": ("name", "kdns shows the name, though its rules are not in the kernel"),
    "dns-no-answer": ("name", "the DNS server does not answer"),
    "dns-failed": ("name", "the DNS server answers SERVFAIL, REFUSED or the like"),
    "dns-differs": ("name", "the DNS server answers something else than the registry says"),
    "family-mismatch": ("name", "the client has no address of a family that the name has"),
    # the Service
    "unknown-address": ("service", "the address is no Service's, Pod's or Node's"),
    "no-port-given": ("service", "no port was named; one was taken"),
    "port-not-in-service": ("service", "the Service has no such port"),
    "port-is-target-port": ("service", "that is the Pods' port, not the Service's"),
    "port-is-node-port": ("service", "that is the port on nodes, not the Service's own"),
    "udp-tcp-mismatch": ("service", "the port is there for the other protocol"),
    "headless-port": (
        "service",
        "a headless Service has no proxy: the Pods' own port counts",
    ),
    "not-a-node-port": ("service", "no Service has that port on nodes"),
    "node-port-not-on-address": ("service", "NodePorts do not answer on that address"),
    "other-proxy": ("service", "the Service is labelled for another proxy"),
    "no-load-balancer-address": ("service", "no load balancer has given the Service an address"),
    "claimed-twice": ("service", "two Services claim the address and port"),
    # its endpoints
    "selector-matches-nothing": ("endpoints", "no Pod has the labels that the selector asks for"),
    "pods-in-other-namespace": ("endpoints", "Pods that fit are in another namespace"),
    "scaled-to-zero": ("endpoints", "the workload that fits has no replicas"),
    "no-endpoints": ("endpoints", "there is no endpoint, and no selector that would make one"),
    "endpoints-not-written": ("endpoints", "Pods fit, but no EndpointSlice has them"),
    "slice-without-label": ("endpoints", "an EndpointSlice does not say whose it is"),
    "endpoint-family-mismatch": ("endpoints", "the endpoints are of the other IP family"),
    "target-port-mismatch": ("endpoints", "no Pod has the port that targetPort names"),
    "port-name-mismatch": ("endpoints", "EndpointSlices call the port by another name"),
    "pods-not-ready": ("endpoints", "Pods fit, and none of them is ready"),
    "no-ready-endpoints": ("endpoints", "there are endpoints, and none of them is ready"),
    "only-terminating": ("endpoints", "only endpoints that are about to go are left"),
    # the rules
    "policy-local-no-endpoint": ("rules", "the policy is Local and the node has no endpoint"),
    "source-range": ("rules", "loadBalancerSourceRanges do not let the client in"),
    "rules-missing": ("rules", "the kernel has no rule for this"),
    "rules-differ": ("rules", "the kernel leads elsewhere than the registry says"),
    "dropped-by-other-rule": ("rules", "a rule that is not the proxy's drops or refuses it"),
    "nothing-forwards": ("rules", "the kdns that runs writes no rules: its mode is none"),
    "nobody-listens": ("rules", "the node has the address itself, and no program listens there"),
    "hairpin": ("rules", "the client is one of the endpoints"),
    "stale-flow": ("rules", "conntrack leads flows to an endpoint that is gone"),
    # the Pod
    "port-not-declared": ("pod", "the Pod declares ports, and not this one"),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding. stops -- the request ends there; advice -- what to do about it."""

    id: str
    text: str
    advice: str = ""
    stops: bool = True

    @property
    def stage(self) -> Stage:
        return FINDINGS[self.id][0]

    def __post_init__(self) -> None:
        assert self.id in FINDINGS, self.id
