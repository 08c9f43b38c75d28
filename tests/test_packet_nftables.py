"""Packets walked through nftables text: the recorded rules of kube-proxy, and small ones that
show one thing each. Where a walk is held against the kernel: test_packet_nftables_kernel.py;
against decisions and against iptables: test_spelling.py."""

from __future__ import annotations

import functools
from fractions import Fraction

import pytest
from forwarding import CLUSTER_CIDRS, cluster_table
from hypothesis import given, settings
from hypothesis import strategies as st
from packet_flows import (
    ADDRESSES,
    FLOWS,
    IPV6_FLOWS,
    NODE,
    OUTSIDE,
    PACKETS,
    POD,
    RULES,
    Result,
    check_ipv6,
    check_ways,
    result,
    tcp,
)

from kdns.errors import ConfigError
from kdns.proxy.nftables import NftablesRules, render_rules
from kdns.proxy.nftables_text import NftRuleset
from kdns.proxy.options import Detector, Options
from kdns.proxy.packet_nftables import (
    Host,
    Packet,
    parse_nftables,
    render_walk,
    walk_nftables,
)

RECORDED = RULES / "nftables.txt"
NODE1 = Host(ADDRESSES, {"0.0.0.0/0": "eth0"})


@functools.cache
def recorded() -> NftRuleset:
    return parse_nftables(RECORDED.read_text(), file="nftables")


@pytest.mark.parametrize(
    ("source", "destination", "port", "protocol", "expected"),
    [
        *FLOWS,
        # the same port of another protocol is not the Service: it is refused
        (POD, "10.96.20.9", 3868, "tcp", ("rejected", ("10.96.20.9:3868",), "kept")),
        (NODE, "10.96.20.9", 80, "tcp", ("rejected", ("10.96.20.9:80",), "kept")),
        # an address of no Service, within the ServiceCIDR and out of it
        (POD, "10.96.77.77", 80, "tcp", ("dropped", ("10.96.77.77:80",), "kept")),
        (NODE, "10.96.77.77", 80, "udp", ("dropped", ("10.96.77.77:80",), "kept")),
        (POD, "10.97.77.77", 80, "tcp", ("forwarded", ("10.97.77.77:80",), "kept")),
        # NodePorts are there on the primary address, and never on localhost
        (POD, "10.244.0.1", 30080, "tcp", ("delivered", ("10.244.0.1:30080",), "kept")),
        ("127.0.0.1", "127.0.0.1", 30080, "tcp", ("delivered", ("127.0.0.1:30080",), "kept")),
    ],
)
def test_flows_through_recorded_rules(
    source: str, destination: str, port: int, protocol: str, expected: Result
) -> None:
    packet = tcp(source, destination, port, protocol)
    assert result(walk_nftables(recorded(), packet, NODE1)) == expected


@pytest.mark.parametrize(
    ("source", "destination", "port", "verdict", "then"),
    [*IPV6_FLOWS, ("fd00:10:244::9", "fd00:10:96::a05", 80, "dropped", "kept")],
)
def test_ipv6_flows(source: str, destination: str, port: int, verdict: str, then: str) -> None:
    (one,) = walk_nftables(recorded(), tcp(source, destination, port), NODE1)
    check_ipv6(one, verdict, then)


def test_both_forms_of_our_text_fare_alike() -> None:
    """As printed (with reasons behind #), and as commands to nft."""
    options = Options(4, detector=Detector("cidr", CLUSTER_CIDRS[4]))
    rules = NftablesRules(options)
    rules.update(cluster_table(4), None)
    forms = [
        parse_nftables(render_rules(cluster_table(4), options)),
        parse_nftables(render_rules(cluster_table(4), options, explain=True)),
        parse_nftables(rules.partial()),
    ]
    for port in cluster_table(4):
        packet = tcp(OUTSIDE, port.cluster_ip, port.port, port.protocol)
        one, other, third = (
            [[*render_walk(way)] for way in walk_nftables(form, packet, NODE1)] for form in forms
        )
        assert one == other
        assert [way[-1] for way in one] == [way[-1] for way in third]


def test_changes_are_read_onto_what_is_there() -> None:
    options = Options(4)
    rules = NftablesRules(options)
    rules.update(cluster_table(4), None)
    before = parse_nftables(rules.partial())
    rules.committed()
    key = ("prod", "api")
    rules.update(cluster_table(4), [key], without=[key])
    after = parse_nftables(rules.partial(), onto=before)
    packet = tcp(POD, "10.96.20.1", 8080)
    assert {one.dnat for one in walk_nftables(before, packet, NODE1)} == {True}
    assert {one.dnat for one in walk_nftables(after, packet, NODE1)} == {False}
    assert before.tables["ip", "kube-proxy"].chains.keys() > (
        after.tables["ip", "kube-proxy"].chains.keys()
    )


AFFINITY = "affinity-BOCFRJZS-prod/sticky/tcp/http__10.244.1.95/80"


@pytest.mark.parametrize(
    ("age", "endpoints"),
    [(None, 2), (0.0, 1), (599.9, 1), (600.0, 2)],
)
def test_affinity_lasts_600_seconds(age: float | None, endpoints: int) -> None:
    recent = {} if age is None else {(AFFINITY, POD): age}
    packet = tcp(POD, "10.96.20.5", 80)
    outcomes = walk_nftables(recorded(), packet, NODE1, recent=recent)
    assert len(outcomes) == endpoints
    # Used means young again, and the other set knows nothing of it.
    assert all(list(one.recent.values())[-1] == 0.0 for one in outcomes)
    for first in outcomes:
        (second,) = walk_nftables(recorded(), packet, NODE1, recent=first.recent)
        assert second.destination == first.destination


def test_what_a_listing_says_of_clients_is_remembered() -> None:
    text = RECORDED.read_text().replace(
        "flags dynamic,timeout\n\t\ttimeout 10m\n",
        "flags dynamic,timeout\n\t\ttimeout 10m\n"
        "\t\telements = { 10.244.1.5 expires 9m58s40ms, 10.244.1.6 expires 1s }\n",
        1,
    )
    found = parse_nftables(text)
    assert found.remembered() == pytest.approx(
        {(AFFINITY, "10.244.1.5"): 1.96, (AFFINITY, "10.244.1.6"): 599.0}
    )
    (one,) = walk_nftables(found, tcp(POD, "10.96.20.5", 80), NODE1)
    assert one.destination == "10.244.1.95"


@settings(deadline=None)
@given(PACKETS)
def test_probabilities_add_up_to_one(packet: Packet) -> None:
    check_ways(lambda every: walk_nftables(recorded(), packet, NODE1, every_rule=every))


# --- Small rules --------------------------------------------------------------------------------


def rules(lines: str, hook: str = "prerouting", more: str = "", kind: str = "filter") -> str:
    base = f"type {kind} hook {hook} priority 0; policy accept;"
    return f"table inet t {{\n{more}\n chain c {{\n {base}\n {lines}\n }}\n}}\n"


def arrives(text: str) -> bool:
    packet = Packet(OUTSIDE, NODE, 80, interface="eth0")
    (one,) = walk_nftables(parse_nftables(text), packet, NODE1)
    return one.verdict == "delivered"


@pytest.mark.parametrize(
    ("expression", "fits"),
    [
        ("ip saddr 8.8.8.0/24", True),
        ("ip saddr != 8.8.8.0/24", False),
        ("ip saddr 8.8.8.0-8.8.8.9", True),
        ("ip saddr { 1.1.1.1, 8.8.0.0/16 }", True),
        ("ip saddr {1.1.1.1,8.8.8.8}", True),
        ("ip saddr != { 1.1.1.1, 8.8.0.0/16 }", False),
        ("ip6 saddr ::/0", False),
        ("ip protocol tcp", True),
        ("meta l4proto { tcp, udp }", True),
        ("meta l4proto 6", True),
        ("meta nfproto ipv6", False),
        ("meta protocol ip", True),
        ("tcp dport 80", True),
        ("tcp dport 70-80", True),
        ("tcp dport { 22, 79-81 }", True),
        ("tcp dport < 80", False),
        ("tcp dport <= 80", True),
        ("tcp dport >= 81", False),
        ("udp dport 80", False),
        ("udp dport != 80", False),  # of another protocol: it has no such port
        ("th dport 80", True),
        ("th sport 0", True),
        ("iifname eth0", True),
        ('iifname "eth*"', True),
        ('meta iifname != { "eth1", "lo" }', True),
        ('oifname "eth0"', False),  # not known before the route is
        ("ct state new", True),
        ("ct state established,related", False),
        ("ct state { new, established }", True),
        ("ct state != new", False),
        ("ct state vmap { new : continue, invalid : drop } meta mark 0", True),
        ("ct status dnat", False),
        ("tcp flags syn / fin,syn,rst,ack", True),
        ("tcp flags & (fin | syn | rst | ack) == syn", True),
        ("tcp flags & (syn|ack) == 0x0", False),
        ("fib daddr type local", True),
        ("fib saddr type local", False),
        ("fib daddr type { local, multicast }", True),
        ("icmp type echo-request", False),
        ("meta mark 0x0", True),
        ("meta mark & 0x4000 != 0x0", False),
        ("ip saddr . tcp dport { 8.8.8.8 . 80, 1.1.1.1 . 1-9 }", True),
        ("ip daddr . meta l4proto . th dport { 8.8.8.8 . tcp . 80 }", False),
        ("limit rate 5/minute burst 5 packets", True),
        ("limit rate over 5/minute", False),
        ('log prefix "a b" level info counter packets 1 bytes 60', True),
    ],
)
def test_what_an_expression_asks_for(expression: str, fits: bool) -> None:
    assert arrives(rules(f"{expression} drop")) != fits


@pytest.mark.parametrize(
    ("lines", "mark"),
    [
        ("meta mark set 5", 5),
        ("meta mark set 0x5 meta mark set meta mark | 0x10", 0x15),
        ("meta mark set 0xff\n meta mark set meta mark & 0xf0 | 0x1", 0xF1),
        ("meta mark set 0xff\n meta mark set meta mark & 0xf0 ^ 0x30", 0xC0),
        ("meta mark set 0xff\n meta mark set meta mark xor 0x1 and 0x3", 0x2),
        ("udp dport 1 meta mark set 5", 0),
        ("meta mark set 4 udp dport 1 meta mark set 5", 4),
    ],
)
def test_marks(lines: str, mark: int) -> None:
    (one,) = walk_nftables(parse_nftables(rules(lines)), Packet(OUTSIDE, NODE, 1, interface="e"))
    assert one.mark == mark


@pytest.mark.parametrize(
    ("rule", "answer"),
    [
        ("reject", "icmp-port-unreachable"),
        ("reject with tcp reset", "tcp-reset"),
        ("reject with icmp type host-prohibited", "icmp-host-prohibited"),
        ("reject with icmp port-unreachable", "icmp-port-unreachable"),
        ("reject with icmpx admin-prohibited", "icmpx-admin-prohibited"),
    ],
)
def test_refusals_say_what_the_client_gets(rule: str, answer: str) -> None:
    text = rules(rule, "input")
    (one,) = walk_nftables(parse_nftables(text), Packet(OUTSIDE, NODE, 1, interface="e"), NODE1)
    assert (one.verdict, one.answer) == ("rejected", answer)


@pytest.mark.parametrize(
    ("rule", "place"),
    [
        ("dnat to 10.0.0.1:81", "10.0.0.1:81"),
        ("dnat ip to 10.0.0.1", "10.0.0.1:80"),
        ("dnat ip to 10.0.0.1:81 random,persistent", "10.0.0.1:81"),
        ("dnat ip addr . port to tcp dport map { 80 : 10.0.0.1 . 82 }", "10.0.0.1:82"),
        ("dnat ip to tcp dport map { 81 : 10.0.0.1 . 82 }\n dnat to 10.0.0.3", "10.0.0.3:80"),
        ("dnat ip to ip saddr map @m", "10.0.0.9:80"),
        ("dnat ip6 to fd00::1\n dnat to 10.0.0.3", "10.0.0.3:80"),  # of the other family
        ("redirect to :85", f"{NODE}:85"),
        ("dnat to 10.0.0.1\n dnat to 10.0.0.2", "10.0.0.1:80"),
    ],
)
def test_where_a_translation_leads(rule: str, place: str) -> None:
    more = " map m { type ipv4_addr : ipv4_addr; elements = { 8.8.8.8 : 10.0.0.9 } }"
    text = rules(rule, more=more, kind="nat")
    packet = Packet(OUTSIDE, "192.0.2.1", 80, interface="eth0")
    (one,) = walk_nftables(parse_nftables(text), packet, NODE1)
    assert f"{one.destination}:{one.port}" == place


def test_of_many_numbers_each_has_its_chance() -> None:
    text = rules(
        "numgen random mod 3 0 meta mark set 1 return\n"
        "numgen random mod 4 < 3 meta mark set 2 return\n"
        "numgen inc mod 2 vmap { 0 : goto a, 1 : continue } meta mark set 3",
        more=" chain a { meta mark set 4\n }",
    )
    found = walk_nftables(parse_nftables(text), Packet(OUTSIDE, NODE, 1, interface="e"), NODE1)
    assert {one.mark: one.probability for one in found} == {
        1: Fraction(1, 3),
        2: Fraction(1, 2),
        3: Fraction(1, 12),
        4: Fraction(1, 12),
    }


def test_chains_behind_a_policy_and_tables_that_sleep() -> None:
    drops = rules("counter").replace("policy accept", "policy drop")
    assert not arrives(drops)
    assert arrives(drops.replace("{\n", "{\n flags dormant\n", 1))
    assert arrives(rules("goto a\n drop", more=" chain a {\n return\n }"))
    assert not arrives(rules("jump a\n drop", more=" chain a {\n return\n }"))
    (one,) = walk_nftables(parse_nftables(drops), Packet(OUTSIDE, NODE, 1, interface="e"), NODE1)
    assert one.decided is not None
    assert (one.decided.table, one.decided.chain, one.decided.number) == ("inet t", "c", 0)


# --- What is not understood ---------------------------------------------------------------------

STRANGE = [
    'socket cgroupv2 level 1 "x" drop',
    "ct mark 5 drop",
    "ip saddr @nosuch drop",
    "jump nosuch",
    "jhash ip saddr mod 2 vmap { 0 : drop }",
    "queue to 1",
    "tproxy to :1",
    "ip dscp cs1 drop",
    "fib saddr . iif oif missing drop",
    "fib daddr type blackhole drop",
    "tcp dport http drop",
    "ct status assured drop",
    'xt match "comment" drop',
    "dnat to 10.0.0.1-10.0.0.9",
    "meta mark set ct mark",
    "jump { drop; }",
]


@pytest.mark.parametrize("rule", STRANGE)
def test_what_is_not_understood_is_told_and_never_guessed(rule: str) -> None:
    text = rules(f"ip saddr 8.8.8.8 {rule}\n meta mark set 7")
    with pytest.raises(ConfigError) as refused:
        parse_nftables(text)
    (problem,) = refused.value.problems
    assert problem.line == 5
    found = parse_nftables(text, strict=False)
    (noted,) = found.problems
    assert noted.warning and noted.line == 5
    (hit,) = walk_nftables(found, Packet(OUTSIDE, NODE, 80, interface="e"), NODE1)
    assert hit.mark == 7  # what follows is read
    told = [step for step in hit.steps if "not understood, taken not to fit" in step.effect]
    assert [step.matched for step in told] == [False]
    # Whom it does not concern, does not meet it; a set or chain that is missing is met always.
    (other,) = walk_nftables(found, Packet("1.1.1.1", NODE, 80, interface="e"), NODE1)
    concerned = "nosuch" in rule
    assert ("not understood" in " ".join(step.effect for step in other.steps)) == concerned


def test_blocks_that_are_not_understood_are_passed_over_and_told() -> None:
    text = """table inet t {
	flowtable f {
		hook ingress priority 0
		devices = { eth0 }
	}
	ct helper ftp {
		type "ftp" protocol tcp
	}
	set odd {
		type ether_addr
		elements = { 00:00:00:00:00:01 }
	}
	chain in {
		type filter hook ingress device "eth0" priority 0; policy drop;
		drop
	}
	chain c {
		type filter hook input priority filter - 5; policy accept;
		ether saddr @odd drop
		tcp dport 80 drop
	}
}
table netdev n {
	chain c {
		type filter hook ingress device "lo" priority 0; policy accept;
	}
}
"""
    found = parse_nftables(text, strict=False)
    said = [str(problem.text) for problem in found.problems]
    assert sorted({problem.line for problem in found.problems}) == [2, 6, 10, 14, 19, 25]
    assert any("flowtable" in one for one in said) and any("hook ingress" in one for one in said)
    (one,) = walk_nftables(found, Packet(OUTSIDE, NODE, 80, interface="eth0"), NODE1)
    assert one.verdict == "dropped" and one.decided is not None and one.decided.number == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("table ip t {", "a { without its }"),
        ("table ip t {\n}\n}", "a } without its {"),
        ("hello", "ends where what to do it to"),
        ("make table ip t", "'make' is no command"),
        ("add chain ip t c", "no table ip t"),
        ("add table ip t\nadd rule ip t c drop", "no chain c in table ip t"),
        ("add table ip t\nadd element ip t s { 1 }", "no set or map s"),
        ("add table ip t\ndelete chain ip t c", "no chain c"),
        (rules("drop").replace("priority 0", "priority early"), "priority 'early'"),
        (rules("jump a", more=" chain a { jump b\n }\n chain b { goto a\n }"),
         "chains of table inet t form a loop: "),
        (rules("ip saddr 10.0.0.0/33 drop"), "'10.0.0.0/33' is no CIDR"),
        (rules("ip saddr fd00::1 drop"), "fd00::1 is IPv6, where IPv4 should be"),
    ],
)  # fmt: skip
def test_what_nft_would_refuse_is_refused_with_its_line(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_nftables(text, file="rules.nft")
    assert says in str(refused.value) and "rules.nft" in str(refused.value)


@settings(deadline=None)
@given(st.text(st.sampled_from('{}";#,\n\\ \tabc@:.10/-!=') | st.characters(), max_size=80))
def test_any_text_is_read_or_refused(text: str) -> None:
    for strict in (True, False):
        try:
            found = parse_nftables(f"table ip t {{\n chain c {{\n {text}\n", strict=strict)
        except ConfigError:
            continue
        assert found.tables


@settings(deadline=None)
@given(st.data())
def test_any_damage_to_a_listing_is_read_or_refused(data: st.DataObject) -> None:
    text = RECORDED.read_text()
    at = data.draw(st.integers(0, len(text)))
    length = data.draw(st.integers(0, 200))
    broken = text[:at] + data.draw(st.text('{};", \n', max_size=3)) + text[at + length :]
    try:
        found = parse_nftables(broken, strict=False)
    except ConfigError:
        return
    walk_nftables(found, tcp(POD, "10.96.20.1", 8080), NODE1)


def test_more_ways_than_anybody_can_follow_are_refused() -> None:
    half = "numgen random mod 2 0 meta mark set meta mark | 1\n"
    with pytest.raises(ValueError, match="ways through these rules"):
        walk_nftables(
            parse_nftables(rules(half * 20)), Packet(OUTSIDE, NODE, 80, interface="e"), NODE1
        )


# --- For people ---------------------------------------------------------------------------------


def test_a_walk_is_told_line_by_line() -> None:
    (one,) = walk_nftables(recorded(), tcp(OUTSIDE, "10.96.10.2", 53, "udp"), NODE1)
    chain = "service-KY6CHJCF-default/unnamed/udp/"
    assert [*render_walk(one)] == [
        "ip kube-proxy filter-prerouting-pre-dnat rule 1: ct state new -> firewall-check",
        "ip kube-proxy nat-prerouting rule 1: -> services",
        "ip kube-proxy services rule 1: masquerade clusterIP traffic from outside cluster:"
        " mark 0x4000 set",
        "ip kube-proxy services rule 2: ip daddr . meta l4proto . th dport vmap @service-ips:"
        f" go to {chain}",
        f"ip kube-proxy {chain} rule 1: meta l4proto udp: DNAT to 10.244.1.20:5353",
        "ip kube-proxy filter-forward rule 1: ct state new -> service-endpoints-check",
        "ip kube-proxy filter-forward rule 2: ct state new -> cluster-ips-check",
        "ip kube-proxy nat-postrouting rule 1: -> masquerading",
        "ip kube-proxy masquerading rule 1: meta mark & 0x00004000 != 0x00000000:"
        " mark 0x4000 flipped, MASQUERADE",
        "=> DNAT to 10.244.1.20:5353 (100 %), masqueraded",
    ]
