"""The nftables walker held against the kernel: a packet is sent through rules in a network
namespace, and the rules that the kernel counted must be those that one of the walks names. The
rules that are walked are those that the kernel prints, not those it was given."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest
from forwarding import CLUSTER_CIDRS, endpoint, exposed, slice_of, table_of
from packet_flows import NODE, RULES
from packet_lab import (
    NODE1,
    RECORDED_PACKETS,
    Lab,
    Rule,
    from_client,
    from_node,
    hold,
    lab_with,
    run,
)

from kdns.proxy.nftables import render_rules
from kdns.proxy.nftables_text import NftRuleset
from kdns.proxy.options import Detector, Options
from kdns.proxy.packet_nftables import Outcome, Packet, parse_nftables, walk_nftables

pytestmark = pytest.mark.root

COUNTED = re.compile(r"counter packets ([1-9]\d*) ")
# Where a rule begins to do something. A map decides by itself: what it leads to is counted.
EFFECT = re.compile(
    r"(?<!status )\b(?=(?:jump|goto|drop|accept|reject|return|dnat|masquerade|redirect"
    r"|meta mark set|update) ?)"
)
RULE = re.compile(r"^\t\t(?!type |policy|comment|flags|timeout|size|elements|\t|}).*$", re.M)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with lab_with("f", "nft") as one:
        yield one


def counting(text: str) -> str:
    """The same rules, each with a counter before what it does."""

    def with_counter(line: re.Match[str]) -> str:
        if " vmap {" in line[0]:
            return line[0]
        rule, quote, comment = line[0].partition(' comment "')
        return EFFECT.sub("counter ", rule, count=1) + quote + comment

    return RULE.sub(with_counter, text)


# Whatever else there is: which hooks a packet passes.
WATCH = (
    "table ip watch {\n"
    + "".join(
        f"\tchain {hook}{number} {{\n\t\ttype filter hook {hook} priority {priority};\n"
        "\t\tmeta l4proto udp counter\n\t}\n"
        for hook in ("prerouting", "input", "forward", "output", "postrouting")
        for number, priority in enumerate((-350, 350))
    )
    + "}\n"
)


class Nftables:
    """Rules for nft in a lab; those with a counter count."""

    def __init__(self, lab: Lab, text: str) -> None:
        self.lab, self.text = lab, text

    def load(self) -> None:
        self.lab.on_node("nft", "-f", "-", text=f"flush ruleset\n{self.text}{WATCH}")

    def walk(self, packet: Packet) -> tuple[Outcome, ...]:
        return walk_nftables(self._now(), packet, NODE1)

    def counts(self, rule: str) -> bool:
        return "counter" in rule

    def counted(self, packet: Packet) -> set[Rule]:
        return {
            (f"{table.family} {table.name}", chain.name, number)
            for table in self._now().tables.values()
            for chain in table.chains.values()
            for number, one in enumerate(chain.rules, 1)
            if COUNTED.search(one.rule.text)
        }

    def _now(self) -> NftRuleset:
        return parse_nftables(self.lab.on_node("nft", "list", "ruleset"))


def test_a_lab_sends_nothing_by_itself() -> None:
    """What is counted is what a test has sent: an IGMP report was once counted beside it."""
    count = "table inet watch {\nchain out { type filter hook output priority -400\ncounter\n}\n}\n"
    with lab_with("q", "nft") as one:
        places = [("ip", "netns", "exec", name, "nft") for name in (one.node, one.client)]
        for nft in places:
            run(*nft, "-f", "-", text=count)
        time.sleep(2.5)  # the reports of a new group come within 2 s (RFC 3376 8.11)
        for nft in places:
            assert "counter packets 0 " in run(*nft, "list", "ruleset")


def test_hooks_and_priorities_are_passed_as_the_kernel_does(lab: Lab) -> None:
    """Marks tell who was first: each chain adds a bit, and counts what it finds of the others."""
    chains = ""
    for hook, places in {
        # A chain of nat is asked at one place, whatever its priority says.
        "prerouting": ("filter -250", "filter -150", "nat 40", "nat -120", "filter 5", "filter 5"),
        "input": ("filter 0", "nat 70", "filter 90", "filter 110"),
        "forward": ("filter 0", "filter -1"),
        "output": ("filter -250", "route -150", "nat 30", "nat -180", "filter 0", "filter -50"),
        "postrouting": ("nat 20", "filter 90", "filter 110", "nat 300"),
    }.items():
        for number, place in enumerate(places):
            kind, priority = place.split()
            seen = "".join(
                f"\t\tmeta l4proto udp meta mark & {1 << n:#x} != 0 counter\n"
                for n in range(len(places))
            )
            chains += (
                f"\tchain {hook}-{number} {{\n\t\ttype {kind} hook {hook} priority {priority};\n"
                f"\t\tmeta l4proto udp meta mark & {1 << number:#x} == 0 counter"
                f" meta mark set meta mark | {1 << number:#x}\n"
                f"\t\tmeta l4proto udp ct state new counter\n"
                f"\t\tmeta l4proto udp ct state invalid counter\n{seen}\t}}\n"
            )
    hold(
        lab,
        Nftables(lab, f"table ip order {{\n{chains}}}\n"),
        [
            from_node(NODE, "10.244.3.3", 80),
            from_node(NODE, NODE, 80),
            from_client("10.9.0.2", NODE, 99),
            from_client("10.9.0.2", "10.244.3.3", 99),
        ],
    )


TRANSLATED = """
table ip first {
	chain pre {
		type nat hook prerouting priority -100;
		ip daddr 10.96.0.1 meta l4proto udp counter dnat to 192.168.77.1:5353
		ip daddr 10.96.0.9 meta l4proto udp counter redirect to :5353
		counter
	}
	chain out {
		type nat hook output priority -100;
		ip daddr 10.96.0.1 meta l4proto udp counter dnat to 192.168.77.1:5353
		ip daddr 10.96.0.9 meta l4proto udp counter redirect to :5353
	}
	chain post {
		type nat hook postrouting priority 100;
		ip daddr 10.244.0.0/16 meta l4proto udp counter snat to 10.244.0.1
	}
}
table inet second {
	set odd { type ipv4_addr . inet_service; flags interval;
		elements = { 10.244.7.0/24 . 1-99, 192.168.77.1 . 5353 } }
	chain pre {
		type nat hook prerouting priority -90;
		counter
		ip6 daddr ::1 counter
	}
	chain out {
		type nat hook output priority -90;
		counter
	}
	chain in {
		type filter hook input priority 0;
		meta l4proto != udp accept
		ct status dnat counter
		ct state new counter
		ct state { established, related } counter
		ct state established,related counter
		ip saddr . udp dport @odd counter
		ip daddr . udp dport @odd counter
		udp dport 5353 counter
		udp dport != 5353 counter
		udp dport { 1-100, 5353 } counter
		udp dport > 100 counter
		tcp dport 5353 counter
		meta nfproto ipv4 counter
		meta nfproto ipv6 counter
		iifname "lo" counter
		iifname "cl*" counter
		iifname != "clients" counter
		fib saddr type local counter
		fib daddr type local counter
		fib daddr type != local counter
		ip daddr != 10.0.0.0/8 counter
		meta mark 0 counter
	}
	chain through {
		type filter hook forward priority 0; policy drop;
		ip daddr . udp dport @odd counter accept
		oifname "pods" udp sport 4000 udp dport 100 counter accept
		ip daddr vmap { 10.244.8.8 : accept, 10.244.8.0-10.244.8.7 : drop, 10.244.8.9 : jump a }
		counter
	}
	chain a {
		meta mark set 0x5 counter
		meta mark & 0x4 == 0x4 counter goto b
		counter
	}
	chain b {
		meta mark 0x5 counter meta mark set meta mark & 0xfffffffb | 0x10 ^ 0x1
		meta mark 0x10 counter
		udp dport 7 counter accept
	}
}
"""


def test_translations_and_matches_are_as_the_kernel_has_them(lab: Lab) -> None:
    hold(
        lab,
        Nftables(lab, TRANSLATED),
        [
            from_node(NODE, "10.96.0.1", 53),
            from_node("127.0.0.1", "127.0.0.1", 53),
            from_node(NODE, "10.96.0.9", 53),
            from_client("10.9.0.2", "10.96.0.1", 53),
            from_client("10.9.0.2", "10.96.0.9", 53),
            from_client("10.9.0.2", NODE, 99),
            from_client("203.0.113.9", "10.244.7.3", 99),
            from_client("10.9.0.2", "10.244.7.3", 100),
            from_client("10.9.0.2", "10.244.3.3", 99),
            from_client("10.9.0.2", "10.244.8.5", 53),
            from_client("10.9.0.2", "10.244.8.8", 53),
            from_client("10.9.0.2", "10.244.8.9", 53),
            from_client("10.9.0.2", "10.244.8.9", 7),
        ],
    )


CHAINS = """
table ip chains {
	chain out {
		type filter hook output priority 0; policy drop;
		meta l4proto udp counter jump a
		meta l4proto udp counter
		meta l4proto udp counter goto c
		meta l4proto udp counter
	}
	chain a {
		meta l4proto udp counter goto b
		meta l4proto udp counter
	}
	chain b {
		meta l4proto udp counter jump c
		meta l4proto udp counter
	}
	chain c {
		ip daddr 10.244.7.7 counter return
		ip daddr 10.244.7.8 counter accept
		ip daddr 10.244.7.10 counter notrack
		meta l4proto udp counter
	}
}
"""


def test_chains_are_passed_as_the_kernel_does(lab: Lab) -> None:
    hold(lab, Nftables(lab, CHAINS), [from_node(NODE, f"10.244.7.{n}", 80) for n in (7, 8, 9, 10)])


def test_recorded_rules_are_passed_as_the_kernel_does(lab: Lab) -> None:
    # This kernel may lack SCTP, and UDP shows the same for TCP's rules.
    both = (RULES / "nftables.txt").read_text()
    rules = both[both.index("table ip kube-proxy") : both.index("table ip6 kube-proxy")]
    rules = re.sub(r"(?<=[ {\t])(?:tcp|sctp)(?= )", "udp", rules)
    hold(lab, Nftables(lab, counting(rules)), RECORDED_PACKETS)


OURS = table_of(
    exposed(
        node_port=30080,
        vips=["192.0.2.1"],
        ports=[("http", 80, "UDP")],
        externalTrafficPolicy="Local",
        loadBalancerSourceRanges=["203.0.113.0/24"],
    ),
    slice_of(
        "web",
        *(endpoint(f"10.244.1.{n}", nodeName="node1") for n in (10, 11)),
        *(endpoint(f"10.244.2.{n}", nodeName="node2") for n in range(10)),
        ports=(("http", 8080, "UDP"),),
    ),
    exposed(
        "sticky", ip="10.96.0.51", ports=[("http", 80, "UDP")], sessionAffinity="ClientIP",
        externalIPs=["198.51.100.1"],
    ),
    slice_of(
        "sticky",
        *(endpoint(f"10.244.2.{n}", nodeName="node2") for n in (20, 21, 22)),
        ports=(("http", 8080, "UDP"),),
    ),
)  # fmt: skip


def options(detector: bool = True, **more: object) -> Options:
    known = Detector("cidr", CLUSTER_CIDRS[4]) if detector else None
    return Options(4, detector=known, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("detector", [True, False])
def test_our_rules_are_passed_as_the_kernel_does(lab: Lab, detector: bool) -> None:
    rules = render_rules(OURS, options(detector), service_cidrs=("10.96.0.0/16",))
    hold(
        lab,
        Nftables(lab, counting(rules)),
        [
            from_client("10.244.1.10", "10.96.0.50", 80),
            from_client("10.9.0.2", "192.0.2.1", 80),
            from_client("203.0.113.9", "192.0.2.1", 80),
            from_client("10.9.0.2", NODE, 30080),
            from_client("10.9.0.2", "198.51.100.1", 80),
            from_client("10.9.0.2", "10.96.0.51", 81),
            from_client("10.9.0.2", "10.96.0.52", 80),
            from_node(NODE, "10.96.0.51", 80),
            from_node(NODE, "192.0.2.1", 80),
            from_node("127.0.0.1", "127.0.0.1", 30080),
        ],
    )


def test_what_the_kernel_remembers_of_a_client_is_read_from_what_it_prints(lab: Lab) -> None:
    lab.on_node("nft", "-f", "-", text=f"flush ruleset\n{render_rules(OURS, options())}")
    lab.on_node("conntrack", "-F")
    packet = from_client("10.9.0.2", "10.96.0.51", 80)
    before = parse_nftables(lab.on_node("nft", "list", "ruleset"))
    assert len(walk_nftables(before, packet, NODE1)) == 3
    assert not before.remembered()
    lab.send(packet)
    after, end = before, time.monotonic() + 3
    while not after.remembered() and time.monotonic() < end:
        after = parse_nftables(lab.on_node("nft", "list", "ruleset"))
    (((name, client), age),) = after.remembered().items()
    assert client == "10.9.0.2" and 0 <= age < 60
    (one,) = walk_nftables(after, packet, NODE1)
    assert name.endswith(f"__{one.destination}/{one.port}")
