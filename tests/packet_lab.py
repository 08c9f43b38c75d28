"""A node and a client in network namespaces of their own, and single UDP packets between them:
what tests hold the packet walkers against.

Packets are UDP, for nothing follows the first one but, at times, an ICMP error."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Protocol, TypeAlias

import pytest
from packet_flows import NODE

from kdns.proxy.packet import Host, Outcome, Packet

# 10.9.0.1 is the address of the interface that clients come by. Nothing is sent that a test did
# not send: by itself a bridge joins 224.0.0.106 (RFC 4286) and reports it by IGMP, and IPv6
# solicits.
NODE1 = Host(["10.9.0.1", NODE, "10.244.0.1"], {"10.9.0.0/24": "clients", "0.0.0.0/0": "pods"})
SETUP = """
ip netns add {node}
ip netns add {client}
ip netns exec {node} sysctl -qw net.ipv6.conf.all.disable_ipv6=1
ip netns exec {client} sysctl -qw net.ipv6.conf.all.disable_ipv6=1
ip -n {node} link add clients type veth peer name eth0 netns {client}
ip -n {node} link add pods type bridge mcast_snooping 0
ip -n {node} link set pods arp off
ip -n {node} link set lo up
ip -n {node} link set clients up
ip -n {node} link set pods up
ip -n {node} address add 10.9.0.1/32 dev clients
ip -n {node} address add 192.168.77.1/24 dev pods
ip -n {node} address add 10.244.0.1/16 dev pods
ip -n {node} route add 10.9.0.0/24 dev clients
ip -n {node} route add default dev pods
ip netns exec {node} sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.all.route_localnet=1
ip netns exec {node} sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.clients.rp_filter=0
ip -n {client} link set eth0 up
ip -n {client} address add 10.9.0.2/24 dev eth0
ip -n {client} address add 203.0.113.9/32 dev eth0
ip -n {client} address add 10.244.1.10/32 dev eth0
ip -n {client} route add default via 10.9.0.1 dev eth0 onlink
"""
SOURCE_PORT = 4000
SEND = (
    "import socket, sys\n"
    "one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
    f"one.bind((sys.argv[1], {SOURCE_PORT}))\n"
    "try: one.sendto(b'x', (sys.argv[2], int(sys.argv[3])))\n"
    "except PermissionError: pass\n"  # dropped in OUTPUT
)


def run(*command: str, text: str | None = None) -> str:
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout


class Lab:
    """A node and a client in namespaces of their own."""

    def __init__(self, number: str) -> None:
        self.node, self.client = f"kdnsW{number}n", f"kdnsW{number}c"

    def set_up(self) -> None:
        for line in SETUP.format(node=self.node, client=self.client).strip().splitlines():
            run(*line.split())

    def tear_down(self) -> None:
        for name in (self.node, self.client):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)

    def on_node(self, *command: str, text: str | None = None) -> str:
        return run("ip", "netns", "exec", self.node, *command, text=text)

    def send(self, packet: Packet) -> None:
        where = self.client if packet.interface else self.node
        words = (packet.source, packet.destination, str(packet.port))
        run("ip", "netns", "exec", where, "python3", "-c", SEND, *words)


def from_client(source: str, destination: str, port: int) -> Packet:
    return Packet(source, destination, port, "udp", SOURCE_PORT, interface="clients")


def from_node(source: str, destination: str, port: int) -> Packet:
    return Packet(source, destination, port, "udp", SOURCE_PORT)


@contextlib.contextmanager
def lab_with(letter: str, *programs: str) -> Iterator[Lab]:
    """Give a Lab; skip without these programs. letter -- tells those of one process apart"""
    for program in (*programs, "ip", "conntrack"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    one = Lab(f"{os.getpid()}{letter}")
    try:
        one.set_up()
        yield one
    finally:
        one.tear_down()


Rule: TypeAlias = tuple[str, str, int]  # table, chain, number
PATIENCE = 3.0  # seconds: the client's softirq comes late


class Rules(Protocol):
    """Rules in a lab's kernel, however they are written."""

    def load(self) -> None:
        """Put them into the kernel; no rule has counted anything."""

    def walk(self, packet: Packet) -> tuple[Outcome, ...]:
        """Walk a packet through what the kernel prints."""

    def counts(self, rule: str) -> bool:
        """Tell whether a rule, as it is printed, counts its packets."""

    def counted(self, packet: Packet) -> set[Rule]:
        """Return the rules that have counted something since `load`."""


def hold(lab: Lab, rules: Rules, packets: Iterable[Packet]) -> None:
    """Send each packet through the rules: what counts it must be what one of its walks names."""
    for packet in packets:
        rules.load()
        lab.on_node("conntrack", "-F")
        ways = [
            {
                (step.table, step.chain, step.number)
                for step in one.steps
                if step.rule and step.number and rules.counts(step.rule.text)
            }
            for one in rules.walk(packet)
        ]
        assert all(ways), f"{packet}: nothing to see"
        lab.send(packet)
        found = _one_of(ways, partial(rules.counted, packet))
        differences = [(sorted(found - way), sorted(way - found)) for way in ways]
        assert found in ways, f"{packet}: counted, and walked: {differences}"


def _one_of(ways: Sequence[set[Rule]], counted: Callable[[], set[Rule]]) -> set[Rule]:
    """Return what was counted once that is one of the ways; or at last."""
    found, end = counted(), time.monotonic() + PATIENCE
    while found not in ways and time.monotonic() < end:
        found = counted()
    return found


# To and through the Services of kube-proxy's recorded rules.
RECORDED_PACKETS = [
    from_client("10.244.1.10", "10.96.10.1", 80),
    from_client("203.0.113.9", "10.96.10.1", 80),
    from_client("10.244.1.10", "10.96.0.1", 443),
    from_client("203.0.113.9", "192.0.2.61", 8080),
    from_client("10.9.0.2", "192.0.2.61", 8080),
    from_client("10.9.0.2", "192.0.2.62", 80),
    from_client("10.9.0.2", NODE, 30090),
    from_client("10.9.0.2", NODE, 32100),
    from_client("10.9.0.2", "10.96.20.8", 80),
    from_client("10.9.0.2", "10.96.10.5", 80),
    from_client("10.9.0.2", "10.96.10.5", 81),
    from_client("10.9.0.2", "10.96.99.9", 80),
    from_client("10.9.0.2", "10.96.20.5", 80),
    from_client("203.0.113.9", "8.8.4.4", 53),
    from_node(NODE, "10.96.20.1", 8080),
    from_node(NODE, "10.96.0.1", 443),
    from_node(NODE, "10.96.20.8", 80),
    from_node(NODE, "10.96.10.5", 81),
    from_node(NODE, "10.96.99.9", 80),
    from_node(NODE, NODE, 30080),
    from_node(NODE, NODE, 30090),
    from_node("127.0.0.1", "127.0.0.1", 30080),
]
