"""What tests with real packets share: one Service with every kind of frontend, who asks for it,
and what became of that.

The namespaces it all happens in are netcluster.py's.
"""

from __future__ import annotations

import atexit
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import pytest
from forwarding import endpoint, exposed, slice_of
from netcluster import (
    IN_MACHINE,
    NODE_ADDRESS,
    PODS,
    NetCluster,
    Reply,
    Unavailable,
    enough,
    lan,
    pod,
)

from kdns.proxy.options import Family
from kdns.registry.objects import EndpointSlice, Service

FAMILIES: tuple[Family, ...] = (4, 6)

# The frontends of the scenarios' Service, in both families.
CLUSTER_IP = {4: "10.96.0.80", 6: "fd00:10:96::80"}
LB_IP = {4: "192.0.2.60", 6: "2001:db8:2::60"}
EXTERNAL_IP = {4: "192.0.2.99", 6: "2001:db8:2::99"}
NODE_PORT = 30080
LB_NODE_PORT = 30088
PORT = 80
TARGET = 8080

WHERE = {"pod": "client", "node": "node", "localhost": "node", "outside": "outside"}


# --- What became of a request -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Served:
    """Some endpoint answered. endpoints -- "ip:port" -> it sees an address of the node in place
    of the client's"""

    endpoints: Mapping[str, bool]


# A port unreachable at once; silence; nobody felt responsible, and it left for the gateway.
REFUSED, DROPPED, PASSED = "refused", "dropped", "passed"
Fate: TypeAlias = Served | str
VERDICTS = {"refused": REFUSED, "timeout": DROPPED, "unreachable": PASSED}


def at(number: int, family: int = 4, node: int = 1, port: int = TARGET) -> str:
    """Return an endpoint as "ip:port"."""
    ip = pod(number, family, node)
    return f"[{ip}]:{port}" if family == 6 else f"{ip}:{port}"


def served(*endpoints: str, masquerade: bool) -> Served:
    return Served(dict.fromkeys(endpoints, masquerade))


def fate_of(replies: list[Reply]) -> Fate:
    """Return what became of equal requests."""
    outcomes = {reply.outcome for reply in replies}
    if outcomes != {"answered"}:
        return " or ".join(sorted(VERDICTS.get(outcome, outcome) for outcome in outcomes))
    found: dict[str, list[bool]] = {}
    for reply in replies:
        found.setdefault(reply.at, []).append(reply.masqueraded)
    # Where the node asks another node only the port tells: a masqueraded one is random and by
    # chance the client's own, one that is not is another where an earlier flow has it still.
    return Served({at: 2 * sum(masked) > len(masked) for at, masked in found.items()})


@contextmanager
def cluster_or_skip() -> Iterator[NetCluster]:
    """Make a cluster of namespaces; where that is not possible, the test is skipped. In the
    virtual machine, where it takes long, it is the same one each time: who uses it cleans up."""
    try:
        made = _lasting_cluster() if IN_MACHINE else NetCluster().__enter__()
    except Unavailable as error:
        pytest.skip(f"no network namespaces here: {error}")
    if IN_MACHINE:
        yield made
        return
    with made:
        yield made


@cache
def _lasting_cluster() -> NetCluster:
    made = NetCluster().__enter__()
    atexit.register(made.close)
    return made


def own_address(origin: str, family: Family) -> str:
    if origin == "localhost":
        return "127.0.0.1"
    where = WHERE.get(origin, origin)
    return pod(PODS[where][0], family) if where in PODS else lan(where, family)


# --- Modes ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Traits:
    """In what one of kube-proxy's modes differs from the others, for clients (reference 2).

    unknown_port   -- what becomes of a packet to a port of a ClusterIP that is none of the
                      Service
    refuses_node   -- the node itself is refused at once where an address that it does not have
                      has no endpoints, as everybody else is
    on_localhost   -- node ports answer on 127.0.0.1
    passes_checks  -- lets health checks past a firewall that comes after it
    guards_localhost -- opens 127.0.0.0/8 for routing, and so guards it against others
    keeps_source   -- an endpoint may see the client's own address; not where a process of the
                      node is in between, which is seen instead
    carries_sctp   -- not where that process is, for it never did
    out_of_ranges  -- what becomes of a TCP client outside the source ranges; the process sees
                      it once it has accepted it
    flows_follow   -- a UDP flow leaves an endpoint that is gone by itself: no kernel remembers
                      where it went
    flows_linger   -- until the kernel is told, a UDP flow goes on at an endpoint that is gone;
                      else it may know by itself, as IPVS does from Linux 5.9 on
    in_turn        -- endpoints are taken in turn, not by chance
    local_for_all  -- external policy Local gives Pods and the node itself the endpoints here as
                      well: a virtual server has the same ones whoever asks
    none_inside    -- what becomes of a client where internal policy Local finds none here: a
                      virtual server without endpoints has one answer
    ranges_bind_node -- so they do where they are asked before a packet is forwarded; on what
                      the node itself sends IPVS is first
    shared_memory  -- affinity is the Service port's; else each frontend has its own
    memory_ends    -- with its time-out; else only once the kernel has forgotten each of the
                      client's connections too, and it looks once a minute
    outlives_service -- connections go on when their Service is deleted; else its address leaves
                      the node, and with it all that comes to it
    outlives_proxy -- connections go on when the process ends, and new ones are led on; else they
                      go through the process: they end with it, and new ones are refused until
                      it is back
    memory_outlives_proxy -- so does affinity: the kernel remembers it
    names_services -- the rules say whose they are; IPVS and ipsets have no place for it
    """

    unknown_port: Fate = PASSED
    refuses_node: bool = False
    on_localhost: bool = True
    passes_checks: bool = True
    guards_localhost: bool = True
    keeps_source: bool = True
    carries_sctp: bool = True
    out_of_ranges: Fate = DROPPED
    flows_follow: bool = False
    flows_linger: bool = True
    in_turn: bool = False
    local_for_all: bool = False
    none_inside: Fate = DROPPED
    ranges_bind_node: bool = True
    shared_memory: bool = True
    memory_ends: bool = True
    outlives_service: bool = True
    outlives_proxy: bool = True
    memory_outlives_proxy: bool = True
    names_services: bool = True

    def seen(self, fate: Fate) -> Fate:
        """Return what an endpoint sees of a client that it would serve with the client's own
        address, where that can be kept."""
        if self.keeps_source or not isinstance(fate, Served):
            return fate
        return served(*fate.endpoints, masquerade=True)

    def carries(self, protocol: str) -> bool:
        return self.carries_sctp or protocol != "sctp"

    def enough(self, endpoints: int) -> int:
        """Return how many connections hit each of so many endpoints."""
        return 2 * endpoints if self.in_turn else enough(endpoints)

    @property
    def node_beside(self) -> Fate:
        """What the node gets at such an address."""
        return REFUSED if self.refuses_node else PASSED


TRAITS: Mapping[str, Traits] = {
    "iptables": Traits(),
    "nftables": Traits(
        unknown_port=REFUSED,
        refuses_node=True,
        on_localhost=False,
        passes_checks=False,
        guards_localhost=False,
    ),
    "userspace": Traits(
        refuses_node=True,
        passes_checks=False,
        guards_localhost=False,
        keeps_source=False,
        carries_sctp=False,
        out_of_ranges="ECONNRESET",
        flows_follow=True,
        outlives_proxy=False,
        memory_outlives_proxy=False,
    ),
    "ipvs": Traits(
        unknown_port=REFUSED,
        refuses_node=True,
        on_localhost=False,
        guards_localhost=False,
        flows_linger=False,
        in_turn=True,
        local_for_all=True,
        none_inside=REFUSED,
        ranges_bind_node=False,
        shared_memory=False,
        memory_ends=False,
        outlives_service=False,
        names_services=False,
    ),
}


def is_tested_here(mode: str) -> bool:
    """Mode ipvs, which few kernels have, is tested in the virtual machine of `make test-ipvs`
    and only there; as emulated as that is, nothing else is."""
    return (mode == "ipvs") == IN_MACHINE


# --- Objects ----------------------------------------------------------------------------------


def web(family: Family = 4, *, protocol: str = "TCP", **more: Any) -> Service:
    """A Service with every kind of frontend."""
    settings: dict[str, Any] = {
        "node_port": NODE_PORT,
        "vips": [LB_IP[family]],
        "externalIPs": [EXTERNAL_IP[family]],
        "ports": [("http", PORT, protocol)],
        **more,
    }
    return exposed("web", ip=CLUSTER_IP[family], **settings)


def backed(
    *endpoints: dict[str, Any], family: Family = 4, owner: str = "web", protocol: str = "TCP"
) -> EndpointSlice:
    kind = "IPv6" if family == 6 else "IPv4"
    ports = [("http", TARGET, protocol)]
    return slice_of(owner, *endpoints, ports=ports, family=kind)


def on(
    node: int, number: int, family: Family = 4, conditions: Mapping[str, bool] | None = None
) -> dict[str, Any]:
    """An endpoint on node 1 (ours) or 2; conditions -- ready, serving, terminating."""
    more: dict[str, Any] = {"conditions": dict(conditions)} if conditions else {}
    return endpoint(pod(number, family, node), nodeName=f"node{node}", **more)


def frontends(family: Family, *, cluster_ip: bool = True) -> list[tuple[str, str, int]]:
    """(kind, address, port) of web()'s frontends."""
    inner = [("cluster IP", CLUSTER_IP[family], PORT)] if cluster_ip else []
    return [
        *inner,
        ("node port", NODE_ADDRESS[family], NODE_PORT),
        ("loadbalancer IP", LB_IP[family], PORT),
        ("external IP", EXTERNAL_IP[family], PORT),
    ]


def place(family: Family, kind: str) -> tuple[str, int]:
    """Return address and port of one of web()'s frontends."""
    return next((ip, port) for name, ip, port in frontends(family) if name == kind)


# Conditions of an endpoint.
READY = {"ready": True, "serving": True, "terminating": False}
LEAVING = {"ready": False, "serving": True, "terminating": True}
GONE = {"ready": False, "serving": False, "terminating": True}
