"""The walker held against the kernel: a packet is sent through rules in a network namespace,
and the rules that the kernel counted must be those that one of the walks names."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
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
)

from kdns.proxy.packet import Outcome, Packet, parse_rules, walk
from kdns.proxy.rule import BUILT_IN

pytestmark = pytest.mark.root

VARIANTS = ("iptables-nft", "iptables-legacy")


@pytest.fixture(scope="module", params=VARIANTS)
def lab(request: pytest.FixtureRequest) -> Iterator[tuple[Lab, str]]:
    with lab_with(str(VARIANTS.index(request.param)), f"{request.param}-restore") as one:
        yield one, request.param


class Iptables:
    """Rules for iptables-restore, in a lab whose program is named."""

    def __init__(self, lab: tuple[Lab, str], text: str) -> None:
        self.lab, self.program = lab
        self.text = text + "".join(f"*{t}\nCOMMIT\n" for t in BUILT_IN if f"*{t}\n" not in text)

    def load(self) -> None:
        self.lab.on_node(f"{self.program}-restore", text=self.text)

    def walk(self, packet: Packet) -> tuple[Outcome, ...]:
        return walk(parse_rules(self.lab.on_node(f"{self.program}-save")), packet, NODE1)

    def counts(self, rule: str) -> bool:
        return True

    def counted(self, packet: Packet) -> set[Rule]:
        # The ICMP error that answers it passes OUTPUT, where two jumps ask for nothing.
        answer = {("filter", "OUTPUT", 1)} if packet.interface else set()
        return counted(self.lab.on_node(f"{self.program}-save", "-c")) - answer


def counted(saved: str) -> set[Rule]:
    """Return the rules that counted a packet."""
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
        lab[0],
        Iptables(lab, ORDER),
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
    hold(lab[0], Iptables(lab, CHAINS), [from_node(NODE, f"10.244.7.{n}", 80) for n in (7, 8, 9)])


def test_recorded_rules_are_passed_as_the_kernel_does(lab: tuple[Lab, str]) -> None:
    # This kernel may lack nfacct's objects and SCTP, and UDP shows the same for TCP's rules.
    rules = re.sub(r"-m nfacct --nfacct-name\s+\S+ ", "", (RULES / "iptables.txt").read_text())
    rules = re.sub(r"-([pm]) (tcp|sctp)\b", r"-\1 udp", rules)
    hold(lab[0], Iptables(lab, rules), RECORDED_PACKETS)
