"""The walker held against the kernel: a packet is sent through rules in a network namespace,
and the rules that the kernel counted must be those that one of the walks names."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import time
from collections.abc import Iterator

import pytest
from packet_lab import NODE, NODE1, Lab, from_client, from_node

from kdns.proxy.packet import Packet, parse_rules, walk
from kdns.proxy.rule import BUILT_IN

pytestmark = pytest.mark.root

RECORDED = pathlib.Path(__file__).parent / "golden" / "rules" / "iptables.txt"
VARIANTS = ("iptables-nft", "iptables-legacy")


@pytest.fixture(scope="module", params=VARIANTS)
def lab(request: pytest.FixtureRequest) -> Iterator[tuple[Lab, str]]:
    for program in (f"{request.param}-restore", "ip", "conntrack"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    one = Lab(f"{os.getpid()}{VARIANTS.index(request.param)}")
    try:
        one.set_up()
        yield one, request.param
    finally:
        one.tear_down()


def counted(saved: str) -> set[tuple[str, str, int]]:
    """(table, chain, number) of the rules that counted a packet."""
    found, table, numbers = set(), "", dict[str, int]()
    for line in saved.splitlines():
        if line.startswith("*"):
            table, numbers = line[1:], {}
        rule = re.match(r"\[(\d+):\d+\] -A (\S+)", line)
        if rule:
            numbers[rule[2]] = numbers.get(rule[2], 0) + 1
            if rule[1] != "0":
                found.add((table, rule[2], numbers[rule[2]]))
    return found


def hold(lab: tuple[Lab, str], rules: str, packets: list[Packet]) -> None:
    """Send each packet through the rules, and compare."""
    node, program = lab
    rules += "".join(f"*{t}\nCOMMIT\n" for t in BUILT_IN if f"*{t}\n" not in rules)
    for packet in packets:
        node.on_node(f"{program}-restore", text=rules)
        node.on_node("conntrack", "-F")
        walks = walk(parse_rules(node.on_node(f"{program}-save")), packet, NODE1)
        ways = [{(s.table, s.chain, s.number) for s in one.steps if s.number} for one in walks]
        node.send(packet)
        # The ICMP error that answers it passes OUTPUT, where two jumps ask for nothing.
        answer = {("filter", "OUTPUT", 1)} if packet.interface else set()
        found: set[tuple[str, str, int]] = set()
        end = time.monotonic() + 3
        while found not in ways and time.monotonic() < end:  # the client's softirq comes late
            found = counted(node.on_node(f"{program}-save", "-c")) - answer
        assert found in ways, packet


# In each hook of each table a rule that counts; then what else is asked.
MORE = {
    "mangle": """-A OUTPUT -p udp -d 10.96.0.0/24 -j MARK --set-mark 5
-A PREROUTING -p udp -i lo -m conntrack --ctstate NEW,DNAT
-A PREROUTING -p udp -i lo -m conntrack --ctstate ESTABLISHED
""",
    "nat": """-A OUTPUT -p udp -d 10.96.0.1 -j DNAT --to-destination 192.168.77.1:5353
-A OUTPUT -p udp -d 10.96.0.9 -j REDIRECT --to-ports 5353
-A PREROUTING -p udp -d 10.96.0.1 -j DNAT --to-destination 192.168.77.1:5353
-A PREROUTING -p udp -d 10.96.0.9 -j REDIRECT --to-ports 5353
-A POSTROUTING -p udp -m mark --mark 5 -j MASQUERADE
""",
    "filter": """-A INPUT -p udp -m mark --mark 5
-A INPUT -p udp -m conntrack --ctstate DNAT
-A INPUT -p udp -m conntrack --ctstate SNAT
-A INPUT -p udp -m conntrack --ctstate NEW
-A INPUT -p udp -d 192.168.77.1 --dport 5353
-A INPUT -p udp -d 127.0.0.1 --dport 5353
-A INPUT -p udp -i lo
-A INPUT -p udp -m addrtype --src-type LOCAL
-A INPUT -p udp -m addrtype --dst-type LOCAL
-A FORWARD -p udp -i clients -m addrtype ! --dst-type LOCAL
""",
}
ORDER = "".join(
    f"*{table}\n" + "".join(f"-A {hook} -p udp\n" for hook in hooks) + MORE.get(table, "COMMIT\n")
    + ("COMMIT\n" if table in MORE else "")
    for table, hooks in BUILT_IN.items()
)  # fmt: skip


def test_hooks_and_tables_are_passed_as_the_kernel_does(lab: tuple[Lab, str]) -> None:
    hold(
        lab,
        ORDER,
        [
            from_node(NODE, "10.244.3.3", 80),
            from_node(NODE, NODE, 80),
            from_node("127.0.0.1", "127.0.0.1", 80),
            from_node(NODE, "10.96.0.1", 53),
            from_node(NODE, "10.96.0.9", 53),
            from_client("10.9.0.2", "10.96.0.1", 53),
            from_client("10.9.0.2", "10.96.0.9", 53),
            from_client("10.9.0.2", NODE, 99),
            from_client("10.9.0.2", "10.244.3.3", 99),
        ],
    )


CHAINS = """*filter
:OUTPUT DROP [0:0]
:A - [0:0]
:B - [0:0]
:C - [0:0]
-A OUTPUT -p udp -j A
-A OUTPUT -p udp
-A OUTPUT -p udp -g C
-A OUTPUT -p udp
-A A -p udp -g B
-A A -p udp
-A B -p udp -j C
-A B -p udp
-A C -p udp -d 10.244.7.7 -j RETURN
-A C -p udp -d 10.244.7.8 -j ACCEPT
-A C -p udp
COMMIT
"""


def test_chains_are_passed_as_the_kernel_does(lab: tuple[Lab, str]) -> None:
    hold(lab, CHAINS, [from_node(NODE, f"10.244.7.{n}", 80) for n in (7, 8, 9)])


def test_recorded_rules_are_passed_as_the_kernel_does(lab: tuple[Lab, str]) -> None:
    # This kernel may lack nfacct's objects and SCTP, and UDP shows the same for TCP's rules.
    rules = re.sub(r"-m nfacct --nfacct-name\s+\S+ ", "", RECORDED.read_text())
    rules = re.sub(r"-([pm]) (tcp|sctp)\b", r"-\1 udp", rules)
    hold(
        lab,
        rules,
        [
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
            from_client("10.9.0.2", "10.96.20.5", 80),
            from_client("203.0.113.9", "8.8.4.4", 53),
            from_node(NODE, "10.96.20.1", 8080),
            from_node(NODE, "10.96.0.1", 443),
            from_node(NODE, "10.96.20.8", 80),
            from_node(NODE, NODE, 30080),
            from_node(NODE, NODE, 30090),
            from_node("127.0.0.1", "127.0.0.1", 30080),
        ],
    )
