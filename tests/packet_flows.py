"""What is asked of both packet walkers: a node, packets to it and through it, and where they end
by the rules that kube-proxy wrote for it (golden/rules), whatever text these are in.

Each walker's own flows, where iptables and nftables differ, stand in its test."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TypeAlias

from hypothesis import strategies as st

from kdns.proxy.packet import Outcome, Packet

RULES = pathlib.Path(__file__).parent / "golden" / "rules"
NODE = "192.168.77.1"
ADDRESSES = (NODE, "10.244.0.1", "fd00:77::1")  # of the node
POD = "10.244.1.5"  # of node1, as far as the CIDR tells
OUTSIDE = "8.8.8.8"
API = ("10.244.1.90:80", "10.244.2.90:80", "10.244.2.91:80")
LB = ("10.244.1.91:80", "10.244.2.92:80")
LB_LOCAL = ("10.244.1.92:80", "10.244.2.93:80")
REMOTE = ("10.244.2.94:80",)
# (verdict, where to with equal chances, what happens to the source)
Result: TypeAlias = tuple[str, tuple[str, ...], str]
Flow: TypeAlias = tuple[str, str, int, str, Result]


def tcp(source: str, destination: str, port: int, protocol: str = "tcp") -> Packet:
    """A packet: from the node itself if the source is one of its addresses."""
    local = source in (NODE, "127.0.0.1", "fd00:77::1", "::1")
    interface = "" if local else "veth1" if source.startswith("10.244.") else "eth0"
    return Packet(source, destination, port, protocol, interface=interface)  # type: ignore[arg-type]


def result(outcomes: Sequence[Outcome]) -> Result:
    (verdict,) = {one.verdict for one in outcomes}
    (masked,) = {one.masqueraded for one in outcomes}
    assert {one.probability for one in outcomes} == {Fraction(1, len(outcomes))}
    places = sorted(f"{one.destination}:{one.port}" for one in outcomes)
    return verdict, tuple(places), "masqueraded" if masked else "kept"


FLOWS: list[Flow] = [
    # ClusterIP
    (POD, "10.96.20.1", 8080, "tcp", ("forwarded", API, "kept")),
    (NODE, "10.96.20.1", 8080, "tcp", ("forwarded", API, "masqueraded")),
    (OUTSIDE, "10.96.20.1", 8080, "tcp", ("forwarded", API, "masqueraded")),
    (POD, "10.96.10.2", 53, "udp", ("forwarded", ("10.244.1.20:5353",), "kept")),
    (POD, "10.96.20.9", 3868, "sctp", ("forwarded", ("10.244.1.99:3868",), "kept")),
    # an endpoint that is the node itself: the API server
    (POD, "10.96.0.1", 443, "tcp", ("delivered", ("10.244.0.1:6443",), "kept")),
    (NODE, "10.96.0.1", 443, "tcp", ("delivered", ("10.244.0.1:6443",), "masqueraded")),
    # NodePort
    (OUTSIDE, NODE, 30080, "tcp", ("forwarded", API, "masqueraded")),
    (POD, NODE, 30080, "tcp", ("forwarded", API, "masqueraded")),
    (NODE, NODE, 30080, "tcp", ("forwarded", API, "masqueraded")),
    # load balancer, its source ranges
    ("203.0.113.9", "192.0.2.61", 8080, "tcp", ("forwarded", LB, "masqueraded")),
    ("198.51.100.7", "192.0.2.61", 8080, "tcp", ("forwarded", LB, "masqueraded")),
    ("198.51.100.8", "192.0.2.61", 8080, "tcp", ("dropped", ("192.0.2.61:8080",), "kept")),
    (NODE, "192.0.2.61", 8080, "tcp", ("dropped", ("192.0.2.61:8080",), "kept")),
    # ... which NodePorts do not have
    (OUTSIDE, NODE, 30088, "tcp", ("forwarded", LB, "masqueraded")),
    # externalTrafficPolicy Local: outside only to endpoints here, source kept
    (OUTSIDE, "192.0.2.62", 80, "tcp", ("forwarded", LB_LOCAL[:1], "kept")),
    (OUTSIDE, NODE, 30089, "tcp", ("forwarded", LB_LOCAL[:1], "kept")),
    (POD, NODE, 30089, "tcp", ("forwarded", LB_LOCAL, "kept")),
    (NODE, NODE, 30089, "tcp", ("forwarded", LB_LOCAL, "masqueraded")),
    # ... with endpoints elsewhere only
    (OUTSIDE, "192.0.2.63", 80, "tcp", ("dropped", ("192.0.2.63:80",), "kept")),
    (OUTSIDE, NODE, 30090, "tcp", ("dropped", (f"{NODE}:30090",), "kept")),
    (POD, NODE, 30090, "tcp", ("forwarded", REMOTE, "kept")),
    (NODE, "192.0.2.63", 80, "tcp", ("forwarded", REMOTE, "masqueraded")),
    # internalTrafficPolicy Local, with an endpoint here and without
    (POD, "10.96.20.7", 80, "tcp", ("forwarded", ("10.244.1.97:80",), "kept")),
    (POD, "10.96.20.8", 80, "tcp", ("dropped", ("10.96.20.8:80",), "kept")),
    (NODE, "10.96.20.8", 80, "tcp", ("dropped", ("10.96.20.8:80",), "kept")),
    # external IP; no endpoints; a health check node port; nobody's address
    (OUTSIDE, "192.0.2.60", 80, "tcp", ("forwarded", ("10.244.1.96:80",), "masqueraded")),
    (POD, "10.96.10.5", 80, "tcp", ("rejected", ("10.96.10.5:80",), "kept")),
    (NODE, "10.96.10.5", 80, "tcp", ("rejected", ("10.96.10.5:80",), "kept")),
    (OUTSIDE, NODE, 32100, "tcp", ("delivered", (f"{NODE}:32100",), "kept")),
    (POD, "1.1.1.1", 443, "tcp", ("forwarded", ("1.1.1.1:443",), "kept")),
]
# (source, destination, port, verdict, what happens to the source)
IPV6_FLOWS: list[tuple[str, str, int, str, str]] = [
    ("fd00:10:244::9", "fd00:10:96::a03", 443, "forwarded", "kept"),
    ("2001:db8::9", "fd00:10:96::a03", 443, "forwarded", "masqueraded"),
    ("fd00:77::1", "fd00:10:96::a03", 443, "forwarded", "masqueraded"),
    ("fd00:10:244::130", "fd00:10:96::a03", 443, "forwarded", "masqueraded"),  # hairpin
    ("fd00:10:244::9", "fd00:10:96::a04", 80, "rejected", "kept"),
]


def check_ipv6(one: Outcome, verdict: str, source: str) -> None:
    """Compare with one of IPV6_FLOWS: the Service has one endpoint."""
    assert (one.verdict, "masqueraded" if one.masqueraded else "kept") == (verdict, source)
    if verdict == "forwarded":
        assert (one.destination, one.port) == ("fd00:10:244::130", 8443)
    if verdict == "rejected":
        assert one.answer == "icmp6-port-unreachable"


# Any packet that the recorded rules may say something about.
PACKETS = st.builds(
    tcp,
    st.sampled_from([POD, NODE, OUTSIDE, "127.0.0.1", "203.0.113.9", "10.244.1.95"]),
    st.sampled_from(
        [NODE, "127.0.0.1", "192.0.2.60", "192.0.2.61", "192.0.2.62", "192.0.2.63", "1.1.1.1"]
        + [f"10.96.10.{n}" for n in range(1, 8)]
        + [f"10.96.20.{n}" for n in range(1, 13)]
    ),
    st.sampled_from([53, 80, 443, 3868, 8080, 9090, 30080, 30088, 30089, 30090, 32100]),
    st.sampled_from(["tcp", "udp", "sctp"]),
)


def check_ways(walked: Callable[[bool], Sequence[Outcome]]) -> None:
    """Look at all ways of one packet. walked -- walks it; True: past every rule"""
    outcomes = walked(False)
    assert sum(one.probability for one in outcomes) == 1
    # Looking at every rule, and not at those the index names, comes to the same.
    assert [[s for s in one.steps if s.matched] for one in walked(True)] == [
        [*one.steps] for one in outcomes
    ]
