"""Packets walked through rules: the recorded ones of kube-proxy, and small ones that show one
thing each. Where a walk is held against the kernel: test_packet_kernel.py."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packet_flows import (
    ADDRESSES,
    API,
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
from kdns.proxy.packet import Host, Packet, parse_rules, render_walk, walk
from kdns.proxy.rule import BUILT_IN
from kdns.proxy.ruleset import Ruleset, render_ruleset

NODE1 = Host(ADDRESSES)


@functools.cache
def recorded(name: str = "iptables") -> Ruleset:
    return parse_rules((RULES / f"{name}.txt").read_text(), file=name)


def rules(nat: str = "", filters: str = "", *, nat_chains: str = "", **more: str) -> Ruleset:
    """Rules as short as they can be said: `nat` and `filters` hold -A lines."""
    text = "*nat\n"
    text += "".join(f":{name} - [0:0]\n" for name in nat_chains.split())
    text += f"{nat}\nCOMMIT\n*filter\n{filters}\nCOMMIT\n"
    text += "".join(f"*{table}\n{lines}\nCOMMIT\n" for table, lines in more.items())
    return parse_rules(text)


@pytest.mark.parametrize(
    ("source", "destination", "port", "protocol", "expected"),
    [
        *FLOWS,
        # the same port of another protocol is not the Service
        (POD, "10.96.20.9", 3868, "tcp", ("forwarded", ("10.96.20.9:3868",), "kept")),
        # NodePorts are there on localhost, too
        ("127.0.0.1", "127.0.0.1", 30080, "tcp", ("forwarded", API, "masqueraded")),
    ],
)
def test_flows_through_recorded_rules(
    source: str, destination: str, port: int, protocol: str, expected: Result
) -> None:
    assert result(walk(recorded(), tcp(source, destination, port, protocol), NODE1)) == expected


@pytest.mark.parametrize(("source", "destination", "port", "verdict", "then"), IPV6_FLOWS)
def test_ipv6_flows(source: str, destination: str, port: int, verdict: str, then: str) -> None:
    (one,) = walk(recorded("ip6tables"), tcp(source, destination, port), NODE1)
    check_ipv6(one, verdict, then)


def test_hairpin_is_masqueraded_and_the_other_endpoint_is_not() -> None:
    outcomes = walk(recorded(), tcp("10.244.1.10", "10.96.10.1", 80), NODE1)
    assert {(o.destination, o.masqueraded, o.source) for o in outcomes} == {
        ("10.244.1.10", True, ""),
        ("10.244.2.10", False, "10.244.1.10"),
    }
    # The mark is gone again, so that a second pass does not masquerade twice.
    assert {one.mark for one in outcomes} == {0}


STICKY = ("KUBE-SEP-GJNANXHTJU5U575S", "KUBE-SEP-OWR7KXV7ZG5UFDUX")  # .1.95 and .2.95


@pytest.mark.parametrize(
    ("recent", "expected"),
    [
        ({}, ["10.244.1.95", "10.244.2.95"]),
        ({(STICKY[1], POD): 0.0}, ["10.244.2.95"]),
        ({(STICKY[1], POD): 600.0}, ["10.244.2.95"]),
        ({(STICKY[1], POD): 600.5}, ["10.244.1.95", "10.244.2.95"]),
        ({(STICKY[1], "10.244.1.6"): 1.0}, ["10.244.1.95", "10.244.2.95"]),
        ({(STICKY[0], POD): 700.0, (STICKY[1], POD): 9.0}, ["10.244.2.95"]),
    ],
)
def test_affinity_lasts_600_seconds(
    recent: Mapping[tuple[str, str], float], expected: list[str]
) -> None:
    outcomes = walk(recorded(), tcp(POD, "10.96.20.5", 80), NODE1, recent=recent)
    assert [one.destination for one in outcomes] == expected


def test_affinity_is_remembered_from_packet_to_packet() -> None:
    packet = tcp(POD, "10.96.20.5", 80)
    for first in walk(recorded(), packet, NODE1):
        (second,) = walk(recorded(), packet, NODE1, recent=first.recent)
        assert second.destination == first.destination


def test_a_stranger_does_not_reach_localhost_and_what_was_dnated_does() -> None:
    (stranger,) = walk(recorded(), Packet(OUTSIDE, "127.0.0.1", 9, interface="eth0"), NODE1)
    assert (stranger.verdict, stranger.decided and stranger.decided.chain) == (
        "dropped",
        "KUBE-FIREWALL",
    )
    (node,) = walk(recorded(), Packet("127.0.0.1", "127.0.0.1", 9), NODE1)
    assert node.verdict == "delivered"
    to_localhost = rules(
        "-A PREROUTING -d 192.0.2.1 -j DNAT --to-destination 127.0.0.1:80",
        "-A INPUT ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m conntrack"
        " ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP",
    )
    (dnated,) = walk(to_localhost, Packet(OUTSIDE, "192.0.2.1", 9, interface="eth0"), NODE1)
    assert (dnated.verdict, dnated.destination, dnated.port) == ("delivered", "127.0.0.1", 80)


def test_later_packets_of_a_connection_pass_no_nat_table() -> None:
    packet = Packet(POD, "10.96.10.1", 80, interface="veth1", state="ESTABLISHED")
    (one,) = walk(recorded(), packet, NODE1)
    assert not one.dnat and "nat" not in {step.table for step in one.steps}
    assert one.steps[-1].effect == "ACCEPT"
    # kube-proxy: INVALID packets would otherwise leave with the Pod's own address.
    packet = Packet(POD, "10.96.10.1", 80, interface="veth1", state="INVALID")
    (invalid,) = walk(recorded(), packet, NODE1)
    assert invalid.verdict == "dropped"


@given(PACKETS)
def test_probabilities_add_up_to_one(packet: Packet) -> None:
    check_ways(lambda every: walk(recorded(), packet, NODE1, every_rule=every))


@pytest.mark.parametrize("n", [1, 2, 3, 7, 50, 1000])
@pytest.mark.parametrize("digits", [10, 11])
def test_equal_chances_are_exact_however_they_were_rounded(n: int, digits: int) -> None:
    lines = [
        f"-A OUTPUT -m statistic --mode random --probability {1 / (n - i):.{digits}f}"
        f" -p tcp -j DNAT --to-destination 10.0.{i // 250}.{i % 250 + 1}:80"
        for i in range(n - 1)
    ]
    lines.append("-A OUTPUT -p tcp -j DNAT --to-destination 10.0.99.1:80")
    outcomes = walk(rules("\n".join(lines)), Packet(NODE, "10.96.0.1", 80), NODE1)
    assert [one.probability for one in outcomes] == [Fraction(1, n)] * n


# --- The order of things -----------------------------------------------------------------------


def every_hook() -> Ruleset:
    """A rule in each built-in chain that only counts."""
    return parse_rules(
        "".join(
            f"*{table}\n" + "".join(f"-A {chain} -p tcp\n" for chain in chains) + "COMMIT\n"
            for table, chains in BUILT_IN.items()
        )
    )


@pytest.mark.parametrize(
    ("packet", "expected"),
    [
        (
            Packet(OUTSIDE, POD, 80, interface="eth0"),
            "raw PREROUTING, mangle PREROUTING, nat PREROUTING, mangle FORWARD, filter FORWARD,"
            " security FORWARD, mangle POSTROUTING, nat POSTROUTING",
        ),
        (
            Packet(OUTSIDE, NODE, 80, interface="eth0"),
            "raw PREROUTING, mangle PREROUTING, nat PREROUTING, mangle INPUT, filter INPUT,"
            " security INPUT, nat INPUT",
        ),
        (
            Packet(NODE, POD, 80),
            "raw OUTPUT, mangle OUTPUT, nat OUTPUT, filter OUTPUT, security OUTPUT,"
            " mangle POSTROUTING, nat POSTROUTING",
        ),
        (
            Packet(NODE, NODE, 80),
            "raw OUTPUT, mangle OUTPUT, nat OUTPUT, filter OUTPUT, security OUTPUT,"
            " mangle POSTROUTING, nat POSTROUTING, raw PREROUTING, mangle PREROUTING,"
            " mangle INPUT, filter INPUT, security INPUT",
        ),
    ],
)
def test_hooks_and_tables_come_in_netfilters_order(packet: Packet, expected: str) -> None:
    (one,) = walk(every_hook(), packet, NODE1)
    assert ", ".join(f"{step.table} {step.chain}" for step in one.steps) == expected


CHAINS = """*filter
:INPUT DROP [0:0]
:A - [0:0]
:B - [0:0]
:C - [0:0]
-A INPUT -p tcp -j A
-A INPUT -p tcp -m comment --comment after-A
-A INPUT -p tcp -g C
-A INPUT -p tcp -j ACCEPT
-A A -p tcp -g B
-A A -p tcp -j DROP
-A B -p tcp -j C
-A B -p tcp -m comment --comment in-B
-A C -p tcp --dport 1 -j RETURN
-A C -p tcp --dport 2 -j ACCEPT
-A C -p tcp -m comment --comment in-C
COMMIT
"""


@pytest.mark.parametrize(
    ("port", "verdict", "chains"),
    [
        # RETURN leaves C only; goto comes back to the caller's caller, and from INPUT's own
        # goto to its policy.
        (1, "dropped", "INPUT1 A1 B1 C1 B2 INPUT2 INPUT3 C1 INPUT0"),
        (2, "delivered", "INPUT1 A1 B1 C2"),
        (3, "dropped", "INPUT1 A1 B1 C3 B2 INPUT2 INPUT3 C3 INPUT0"),
    ],
)
def test_jump_goto_return_and_policy(port: int, verdict: str, chains: str) -> None:
    (one,) = walk(parse_rules(CHAINS), Packet(OUTSIDE, NODE, port, interface="eth0"), NODE1)
    assert one.verdict == verdict
    assert " ".join(f"{step.chain}{step.number}" for step in one.steps) == chains


@pytest.mark.parametrize(
    ("rule", "fits"),
    [
        ("-s 8.8.8.0/24", True),
        ("! -s 8.8.8.0/24", False),
        ("-s 8.8.8.0/255.255.255.0", True),
        ("-d 192.168.77.1", True),
        ("-i eth0", True),
        ("-i eth+", True),
        ("-i +", True),
        ("! -i eth+", False),
        ("-i eth1", False),
        ("-p 6", True),
        ("-p all", True),
        ("! -p udp", True),
        ("-p icmp -m icmp --icmp-type 8", False),
        ("-p tcp --dport 80", True),
        ("-p tcp -m tcp --destination-port 70:80", True),
        ("-p tcp -m tcp --dport 81:", False),
        ("-p tcp -m tcp --dport :80", True),
        ("-p tcp -m tcp ! --dport 80", False),
        ("-p tcp -m tcp --sport 4000", True),
        ("-p tcp -m multiport --dports 22,79:81", True),
        ("-p tcp -m multiport ! --dports 22,79:81", False),
        ("-p tcp -m multiport --ports 4000", True),
        ("-p tcp -m multiport --sports 80", False),
        ("-p tcp -m tcp --syn", True),
        ("-p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN", False),
        ("-p tcp -m tcp --tcp-flags ALL NONE", False),
        ("-m addrtype --dst-type LOCAL", True),
        ("-m addrtype --src-type LOCAL", False),
        ("-m addrtype ! --src-type LOCAL --dst-type LOCAL", True),
        ("-m addrtype --dst-type MULTICAST", False),
        ("-m conntrack --ctstate NEW,RELATED", True),
        ("-m conntrack ! --ctstate NEW", False),
        ("-m conntrack --ctstate DNAT", False),
        ("-m state --state ESTABLISHED", False),
        ("-m mark --mark 0", True),
        ("-m mark ! --mark 0x4000/0x4000", True),
        ("-m limit --limit 5/min --limit-burst 3", True),
        ("-m nfacct --nfacct-name  x", True),
        ("-m recent --rcheck --name L", True),
        ("-m recent --rcheck --seconds 4 --reap --name L", False),
        ("-m recent ! --rcheck --seconds 4 --name L", True),
        ("-m recent --update --seconds 5 --name L --mask 255.255.255.255 --rsource", True),
        ("-m recent --rcheck --name M", False),
        ("-m recent --rcheck --name L --rdest", False),
        ("-m recent --set --name M", True),
        ("-m recent --remove --name M", False),
    ],
)
def test_matches(rule: str, fits: bool) -> None:
    packet = Packet(OUTSIDE, NODE, 80, source_port=4000, interface="eth0")
    (one,) = walk(
        rules(filters=f"-A INPUT {rule} -j DROP"), packet, NODE1, recent={("L", OUTSIDE): 5.0}
    )
    assert (one.verdict == "dropped") == fits


@pytest.mark.parametrize(
    ("route", "rule", "fits"),
    [
        ({}, "-o eth0", False),
        ({"0.0.0.0/0": "eth0"}, "-o eth0", True),
        ({"0.0.0.0/0": "eth0", "10.244.1.0/24": "cni0"}, "-o eth0", False),
        ({"0.0.0.0/0": "eth0", "10.244.1.0/24": "cni0"}, "-o cni+", True),
    ],
)
def test_interface_that_a_packet_leaves_by(route: dict[str, str], rule: str, fits: bool) -> None:
    host = Host([NODE], route)
    (one,) = walk(
        rules(filters=f"-A FORWARD {rule} -j DROP"), Packet(OUTSIDE, POD, 1, interface="x"), host
    )
    assert (one.verdict == "dropped") == fits


@pytest.mark.parametrize(
    ("target", "mark"),
    [
        ("--set-xmark 0x4000/0x4000", 0x4003),
        ("--set-xmark 0x4000/0x0", 0x4003),
        ("--or-mark 0x00004001", 0x4003),
        ("--xor-mark 0x1", 0x2),
        ("--and-mark 0x2", 0x2),
        ("--set-mark 0x8", 0x8),
        ("--set-mark 0x8/0x1", 0xA),
    ],
)
def test_marks(target: str, mark: int) -> None:
    lines = f"-A OUTPUT -j MARK --set-mark 3\n-A OUTPUT -j MARK {target}"
    (one,) = walk(rules(mangle=lines), Packet(NODE, POD, 1), NODE1)
    assert one.mark == mark


@pytest.mark.parametrize(
    ("nat", "packet", "expected"),
    [
        ("-A OUTPUT -j REDIRECT --to-ports 53", Packet(NODE, POD, 80), ("127.0.0.1", 53, NODE)),
        (
            "-A PREROUTING -p tcp -j REDIRECT",
            Packet(OUTSIDE, POD, 80, interface="eth0"),
            (NODE, 80, OUTSIDE),
        ),
        (
            "-A OUTPUT -j DNAT --to-destination :81",
            Packet(NODE, POD, 80),
            (POD, 81, NODE),
        ),
        (
            "-A POSTROUTING -j SNAT --to-source 192.0.2.9",
            Packet(OUTSIDE, POD, 80, interface="eth0"),
            (POD, 80, "192.0.2.9"),
        ),
        # The first rewrite is the only one.
        (
            "-A OUTPUT -j DNAT --to-destination 10.0.0.1\n-A OUTPUT -j REDIRECT",
            Packet(NODE, POD, 80),
            ("10.0.0.1", 80, NODE),
        ),
        ("-A OUTPUT -j ACCEPT\n-A OUTPUT -j REDIRECT", Packet(NODE, POD, 80), (POD, 80, NODE)),
    ],
)
def test_rewrites(nat: str, packet: Packet, expected: object) -> None:
    (one,) = walk(rules(nat), packet, NODE1)
    assert (one.destination, one.port, one.source) == expected


def test_untracked_packets_pass_no_nat_table() -> None:
    untracked = rules(
        "-A OUTPUT -j REDIRECT",
        "-A OUTPUT -m conntrack --ctstate UNTRACKED -j ACCEPT\n-A OUTPUT -j DROP",
        raw="-A OUTPUT -d 10.244.1.5 -j CT --notrack",
    )
    (one,) = walk(untracked, Packet(NODE, POD, 53, "udp"), NODE1)
    assert (one.verdict, one.dnat) == ("forwarded", False)


@pytest.mark.parametrize(
    ("rule", "answer"),
    [
        ("-j REJECT", "icmp-port-unreachable"),
        ("-j REJECT --reject-with icmp-host-prohibited", "icmp-host-prohibited"),
        ("-p tcp -j REJECT --reject-with tcp-reset", "tcp-reset"),
    ],
)
def test_answers_of_reject(rule: str, answer: str) -> None:
    (one,) = walk(rules(filters=f"-A OUTPUT {rule}"), Packet(NODE, POD, 53), NODE1)
    assert (one.verdict, one.answer) == ("rejected", answer)


# --- Text --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["iptables", "ip6tables"])
def test_what_is_rendered_reads_as_it_was(name: str) -> None:
    text = render_ruleset(recorded(name))
    assert parse_rules(text) == recorded(name)
    assert render_ruleset(parse_rules(text)) == text


@given(st.text(st.characters(codec="utf-8", exclude_categories=["C", "Zl", "Zp"]), max_size=40))
def test_comments_come_back_as_they_were(comment: str) -> None:
    escaped = comment.replace("\\", "\\\\").replace('"', '\\"')
    found = rules(f'-A OUTPUT -m comment --comment "{escaped}" -p tcp')
    assert found.tables["nat"]["OUTPUT"].rules[0].comment == comment
    assert parse_rules(render_ruleset(found)) == found
    (one,) = walk(found, Packet(NODE, POD, 80), NODE1)
    assert len(one.steps) == 1


@pytest.mark.parametrize(
    ("ours", "saved"),
    [
        (
            "-m comment --comment web -m tcp -p tcp -d 10.96.0.1 --dport 80 -j ACCEPT",
            '-d 10.96.0.1/32 -p tcp -m comment --comment "web" -m tcp --dport 80 -j ACCEPT',
        ),
        ("-j MARK --or-mark 0x00004000", "-j MARK --set-xmark 0x4000/0x4000"),
        ("-j MARK --xor-mark 0x00004000", "-j MARK --set-xmark 0x4000/0x0"),
        (
            "-m statistic --mode random --probability 0.3333333333 -j ACCEPT",
            "-m statistic --mode random --probability 0.33333333349 -j ACCEPT",
        ),
        (
            "-m recent --name L --rcheck --seconds 600 --reap -j ACCEPT",
            "-m recent --rcheck --seconds 600 --reap --name L --mask 255.255.255.255 --rsource"
            " -j ACCEPT",
        ),
        ("-p tcp --syn", "-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN"),
    ],
)
def test_rules_are_equal_however_they_are_written(ours: str, saved: str) -> None:
    assert rules(f"-A OUTPUT {ours}") == rules(f"-A OUTPUT {saved}")
    assert rules(f"-A OUTPUT {ours}") != rules("-A OUTPUT -p udp")


def test_restore_text_is_put_onto_what_is_there() -> None:
    old = rules("-A OUTPUT -j A\n-A A -j ACCEPT\n-A OUTPUT -j B\n-A B -j ACCEPT", nat_chains="A B")
    new = parse_rules(
        """*nat
:A - [0:0]
:C - [0:0]
:OUTPUT ACCEPT [0:0]
-D OUTPUT 2
-I OUTPUT 1 -j C
-I OUTPUT -m comment --comment "first" -j C
-D OUTPUT -j A
[5:300] -A OUTPUT -j A
-A A -j RETURN
-F B
-X B
COMMIT
""",
        onto=old,
    )
    assert new == rules(
        "-A OUTPUT -m comment --comment first -j C\n-A OUTPUT -j C\n-A OUTPUT -j A\n-A A -j RETURN",
        nat_chains="A C",
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("-A OUTPUT -p tcp --dprot 80 -j ACCEPT", "--dprot is not known here: did you mean"),
        ("-A OUTPUT -m sett --match-set x src", "match sett is not known here: "),
        ("-A OUTPUT -m set --match-set x src", "match set is not known here: "),
        ("-A OUTPUT -j TPROXY", "no chain TPROXY in table nat, and no target known here"),
        ("-A OUTPUT -g NOWHERE", "no chain NOWHERE in table nat"),
        ("-A NOWHERE -j ACCEPT", "no chain NOWHERE in table nat: declare it with :NOWHERE - [0:0]"),
        ("-A OUTPUT -d 10.0.0.300", "'10.0.0.300' is no address"),
        ("-A OUTPUT -d example.com", "'example.com' is no address"),
        ("-A OUTPUT -d 10.0.0.1\n-A OUTPUT -s fd00::1", "fd00::1 is IPv6 among IPv4 rules"),
        ("-A OUTPUT -p tpc", "protocol tpc is not known here: did you mean tcp?"),
        ("-A OUTPUT -m tcp --dport 80", "match tcp needs the protocol: write -p tcp"),
        ("-A OUTPUT ! -p tcp -m tcp --dport 80", "write -p tcp"),
        ("-A OUTPUT -p tcp --dport 70000", "port '70000': write a number from 0 to 65535"),
        ("-A OUTPUT -p tcp --dport 90:80", "the first is higher than the last"),
        ("-A OUTPUT -p tcp --dport 80,81", "write -m multiport --dports"),
        ("-A OUTPUT -p tcp --dport", "--dport wants 1 argument"),
        ("-A OUTPUT -p tcp ! -j ACCEPT", "! before -j"),
        ("-A OUTPUT -p tcp !", "! at the end"),
        ("-A OUTPUT -p tcp -p udp", "-p twice"),
        ("-A OUTPUT -j ACCEPT -j DROP", "a second target DROP"),
        ("-A OUTPUT -m conntrack", "match conntrack wants one of --ctstate"),
        ("-A OUTPUT -m conntrack --ctstate NWE", "state NWE is not known here: did you mean NEW?"),
        ("-A OUTPUT -m recent --name L", "match recent wants one of --set"),
        ("-A OUTPUT -m recent --rcheck --hitcount 3", "option --hitcount is not known here"),
        ("-A OUTPUT -m recent --rcheck ! --seconds 3", "--seconds cannot be negated"),
        ("-A OUTPUT -m statistic --mode random", "match statistic wants --mode random"),
        ("-A OUTPUT -m statistic --mode random --probability 1.5", "write a number from 0 to 1"),
        ("-A OUTPUT -m mark --mark 0x1ffffffff", "write a number from 0 to 4294967295"),
        ("-A OUTPUT -j MARK", "MARK wants one of --set-xmark"),
        ("-A OUTPUT -j DNAT", "DNAT wants --to-destination ADDRESS:PORT"),
        ("-A OUTPUT -j DNAT --to-destination 10.0.0.1-10.0.0.9", "range '10.0.0.1-10.0.0.9'"),
        ("-A OUTPUT -j REJECT", "REJECT belongs into table filter, not nat"),
        ("-A OUTPUT -m comment --comment \"open -j ACCEPT", "a quoted word does not end"),
        ("-D OUTPUT -j ACCEPT", "OUTPUT has no such rule to delete"),
        ("-D OUTPUT 1", "OUTPUT has no rule 1: it has 0"),
        ("-I OUTPUT 2 -j ACCEPT", "no place 2 in OUTPUT: it has 0 rules"),
        ("-X OUTPUT", "OUTPUT is built in"),
        (":A - [0:0]\n-A A -j ACCEPT\n-X A", "chain A still has rules"),
        (":A - [0:0]\n-A OUTPUT -j A\n-X A", "OUTPUT still jumps to chain A"),
        (":A - [0:0]\n:B - [0:0]\n-A A -j B\n-A B -g A", "form a loop: A -> B -> A"),
        (":A ACCEPT [0:0]", "A is not built in, so it has no policy"),
        (":OUTPUT QUEUE [0:0]", "policy 'QUEUE' of OUTPUT: ACCEPT or DROP"),
        (":" + "A" * 29 + " - [0:0]", "is longer than 28 characters"),
        ("-Z", "'-Z' is no command known here"),
        ("*filter", "table nat is still open"),
    ],
)  # fmt: skip
def test_wrong_text_is_refused_and_says_what_would_be_right(line: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_rules(f"*nat\n{line}\nCOMMIT\n", file="save.txt")
    assert said in str(error.value) and str(error.value).startswith("save.txt:")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("-A OUTPUT -j ACCEPT", "rules:1: '-A OUTPUT -j ACCEPT' outside of a table"),
        ("*nat\n", "rules:1: table nat has no COMMIT at its end"),
        ("*nta\nCOMMIT\n", "rules:1: no table 'nta': one of raw, mangle, nat"),
        ("*nat\n-A OUTPUT -m foo\n-A OUTPUT -j A\nCOMMIT\n", "rules:2: match foo"),
    ],
)
def test_wrong_tables_are_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_rules(text)
    assert str(error.value).startswith(said)


def test_chains_too_deep_are_refused() -> None:
    chains = [f"C{n}" for n in range(200)]
    lines = [f"-A C{n} -j C{n + 1}" for n in range(199)]
    with pytest.raises(ConfigError, match="more than 64 chains"):
        rules("\n".join(lines), nat_chains=" ".join(chains))


def test_too_many_ways_are_refused() -> None:
    half = "-A OUTPUT -m statistic --mode random --probability 0.5 -j MARK --or-mark 1\n"
    with pytest.raises(ValueError, match="more than 20000 ways"):
        walk(rules(half * 20), Packet(NODE, POD, 80), NODE1)


def test_foreign_rules_are_noted_where_reading_goes_on() -> None:
    found = parse_rules(
        "*filter\n:INPUT ACCEPT [0:0]\n"
        "-A INPUT -s 192.0.2.0/24 -m set --match-set bad src -j DROP\n"
        "-A INPUT -j TPROXIED\n"
        "-A INPUT -j DROP\nCOMMIT\n",
        strict=False,
    )
    assert [(p.line, p.warning) for p in found.problems] == [(3, True), (4, True)]
    (other,) = walk(found, Packet(OUTSIDE, NODE, 80, interface="eth0"), NODE1)
    assert [(s.number, s.matched) for s in other.steps] == [(2, False), (3, True)]
    (hit,) = walk(found, Packet("192.0.2.7", NODE, 80, interface="eth0"), NODE1)
    assert [(s.number, s.matched) for s in hit.steps] == [(1, False), (2, False), (3, True)]
    assert "not understood, taken not to fit: match set" in next(render_walk(hit))


def test_a_packet_of_another_family_is_refused() -> None:
    with pytest.raises(ValueError, match="an IPv6 packet, but rules of IPv4"):
        walk(recorded(), Packet("fd00::1", "fd00::2", 80), NODE1)
    with pytest.raises(ValueError, match="of two families"):
        Packet("10.0.0.1", "fd00::2", 80)
    with pytest.raises(ValueError, match="from 0 to 65535"):
        Packet("10.0.0.1", "10.0.0.2", 65536)


# --- For people --------------------------------------------------------------------------------


def told(packet: Packet, ruleset: Ruleset | None = None) -> list[list[str]]:
    return [[*render_walk(one)] for one in walk(ruleset or recorded(), packet, NODE1)]


def test_a_walk_is_told_rule_by_rule() -> None:
    local, remote = told(tcp(POD, "10.96.10.1", 80))
    assert local == [
        "nat PREROUTING rule 1: kubernetes service portals -> KUBE-SERVICES",
        "nat KUBE-SERVICES rule 17: default/web:http cluster IP -> KUBE-SVC-CDGGSHYLG3RE2FKL",
        "nat KUBE-SVC-CDGGSHYLG3RE2FKL rule 2: default/web:http -> 10.244.1.10:8080 (50 %)"
        " -> KUBE-SEP-GWQABTP5GBYXHJY5",
        "nat KUBE-SEP-GWQABTP5GBYXHJY5 rule 2: default/web:http: DNAT to 10.244.1.10:8080",
        "filter FORWARD rule 1: kubernetes load balancer firewall -> KUBE-PROXY-FIREWALL",
        "filter FORWARD rule 2: kubernetes forwarding rules -> KUBE-FORWARD",
        "filter FORWARD rule 3: kubernetes service portals -> KUBE-SERVICES",
        "filter FORWARD rule 4: kubernetes externally-visible service portals"
        " -> KUBE-EXTERNAL-SERVICES",
        "nat POSTROUTING rule 1: kubernetes postrouting rules -> KUBE-POSTROUTING",
        "nat KUBE-POSTROUTING rule 1: -m mark ! --mark 0x4000/0x4000: RETURN",
        "=> DNAT to 10.244.1.10:8080 (50 %), source kept",
    ]
    assert remote[-1] == "=> DNAT to 10.244.2.10:8080 (50 %), source kept"


@pytest.mark.parametrize(
    ("packet", "end"),
    [
        (
            tcp(OUTSIDE, "192.0.2.61", 8080),
            "=> dropped on its way to 192.0.2.61:8080 (100 %) by filter KUBE-PROXY-FIREWALL rule 1",
        ),
        (
            tcp(POD, "10.96.10.5", 80),
            "=> rejected with icmp-port-unreachable on its way to 10.96.10.5:80 (100 %)"
            " by filter KUBE-SERVICES rule 2",
        ),
        (tcp(OUTSIDE, NODE, 22), f"=> to {NODE}:22, a process of this node (100 %), source kept"),
        (tcp(NODE, "10.96.20.1", 8080), "=> DNAT to 10.244.1.90:80 (33.3 %), masqueraded"),
    ],
)
def test_the_last_line_says_where_it_ends(packet: Packet, end: str) -> None:
    assert told(packet)[0][-1] == end


def test_every_rule_is_told_of_where_that_is_asked_for() -> None:
    (one,) = walk(recorded(), tcp(POD, "10.96.20.8", 80), NODE1, every_rule=True)
    lines = [*render_walk(one)]
    assert "nat KUBE-SERVICES rule 1: prod/sctp:assoc cluster IP: does not fit" in lines
    assert lines[-1].startswith("=> dropped")


def test_policies_and_assumptions_are_told_of() -> None:
    found = parse_rules(
        "*filter\n:INPUT DROP [0:0]\n-A INPUT -m limit --limit 5/min -j LOG\nCOMMIT\n"
    )
    assert told(Packet(OUTSIDE, NODE, 80, interface="eth0"), found) == [
        [
            "filter INPUT rule 1: -m limit --limit 5/min: LOG (assumed: not more than 5/min fit)",
            "filter INPUT: policy DROP",
            f"=> dropped on its way to {NODE}:80 (100 %) by filter INPUT",
        ]
    ]
