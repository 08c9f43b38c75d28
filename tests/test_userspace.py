"""The userspace mode as far as it is pure: which endpoint is next, where doors are, what the
portal rules say."""

from __future__ import annotations

import itertools
from collections import Counter
from random import Random
from typing import Any

import pytest
from forwarding import cluster_table, endpoint, exposed, only, service, slice_of, table_of
from hypothesis import given
from hypothesis import strategies as st

from kdns.errors import ConfigError
from kdns.proxy.options import Detector, Family, Options
from kdns.proxy.table import decide
from kdns.proxy.userspace import (
    CHAINS,
    MAX_CLIENTS,
    NODE_PORT_CONTAINER,
    NODE_PORT_HOST,
    NON_LOCAL,
    PORTALS_CONTAINER,
    PORTALS_HOST,
    PORTS,
    Affinity,
    Balancer,
    Door,
    Place,
    PortalRules,
    admits,
    door_of,
    doors,
    jumps,
    loopback_places,
    origins,
    parse_portmap,
    preferred_ports,
    render_rules,
)
from kdns.registry.endpoints import Endpoint

FAMILIES: tuple[Family, ...] = (4, 6)
PODS = Detector("cidr", "10.244.0.0/16")
LOCAL: dict[str, Any] = {"externalTrafficPolicy": "Local"}


def endpoints(*numbers: int) -> list[Endpoint]:
    return [Endpoint(f"10.244.1.{number}", 8080) for number in numbers]


def balancer(*numbers: int, affinity: int = 0) -> Balancer:
    one = Balancer(Affinity(affinity), Random(1))
    one.replace(endpoints(*numbers))
    return one


def chosen(one: Balancer, client: str = "c", now: float = 0.0, tried: Any = ()) -> str:
    found = one.choose(client, now, tried)
    assert found is not None
    return found.ip.rpartition(".")[2]


# --- balancing --------------------------------------------------------------------------------


@pytest.mark.parametrize("count", (1, 2, 3, 7))
def test_each_endpoint_gets_its_turn(count: int) -> None:
    one = balancer(*range(count))
    rounds = [[chosen(one) for _ in range(count)] for _ in range(3)]
    assert sorted(rounds[0]) == sorted(map(str, range(count)))
    assert rounds[0] == rounds[1] == rounds[2]


def test_the_round_begins_anew_when_endpoints_change_and_only_then() -> None:
    one = balancer(1, 2, 3)
    first = chosen(one)
    one.replace(reversed(endpoints(1, 2, 3)))
    assert {first, chosen(one), chosen(one)} == {"1", "2", "3"}
    one.replace(endpoints(2, 3, 4))
    assert {chosen(one) for _ in range(3)} == {"2", "3", "4"}


def test_nodes_do_not_all_begin_with_the_same_endpoint() -> None:
    firsts = set()
    for seed in range(20):
        one = Balancer(Affinity(0), Random(seed))
        one.replace(endpoints(1, 2, 3))
        firsts.add(chosen(one))
    assert firsts == {"1", "2", "3"}


def test_nobody_is_chosen_where_nobody_is() -> None:
    assert balancer().choose("c", 0.0) is None


def test_another_endpoint_is_tried_as_long_as_there_is_one() -> None:
    one = balancer(1, 2, 3)
    tried: list[str] = []
    for _ in range(3):
        found = one.choose("c", 0.0, tried)
        assert str(found) not in tried
        tried.append(str(found))
    assert str(one.choose("c", 0.0, tried)) in tried, "then the round goes on"


def test_a_client_stays_until_it_was_silent_for_long() -> None:
    one = balancer(*range(9), affinity=60)
    first = chosen(one, now=0.0)
    # The time-out slides: each connection counts anew.
    assert [chosen(one, now=now) for now in (10.0, 69.0, 128.0)] == [first] * 3
    others = {chosen(one, client=f"c{n}", now=128.0) for n in range(7)}
    assert len(others) == 7, "others go round"
    assert chosen(one, now=188.0) != first


def test_a_client_whose_endpoint_is_gone_or_dead_moves_and_stays_there() -> None:
    one = balancer(1, 2, 3, affinity=60)
    first = chosen(one)
    one.replace(endpoints(*{1, 2, 3} - {int(first)}))
    second = chosen(one, now=1.0)
    assert second != first and chosen(one, now=2.0) == second
    third = chosen(one, now=3.0, tried=[f"10.244.1.{second}:8080"])
    assert third != second and chosen(one, now=4.0) == third


def test_doors_of_a_service_port_share_the_affinity() -> None:
    affinity = Affinity(60)
    inner, outer = Balancer(affinity, Random(1)), Balancer(affinity, Random(2))
    inner.replace(endpoints(1, 2, 3, 4))
    outer.replace(endpoints(1, 2, 3, 4, 5))
    assert all(
        chosen(inner, client) == chosen(outer, client) for client in map(str, range(20))
    )  # fmt: skip


def test_affinity_is_bounded_and_forgets_what_is_over() -> None:
    affinity = Affinity(60)
    for number in range(MAX_CLIENTS + 100):
        affinity.note(f"c{number}", "e", 0.0)
    assert len(affinity) == MAX_CLIENTS
    assert affinity.lookup("c0", 1.0) is None and affinity.lookup("c100", 1.0) == "e"
    for number in range(MAX_CLIENTS):
        affinity.note(f"d{number}", "e", 100.0)
    assert affinity.lookup("c200", 30.0) is None


@given(st.lists(st.sets(st.integers(1, 6)), max_size=6), st.integers(0, 2**32))
def test_every_turn_is_fair_whatever_lists_came_before(lists: list[set[int]], seed: int) -> None:
    one = Balancer(Affinity(0), Random(seed))
    for numbers in lists:
        one.replace(endpoints(*numbers))
        turns = Counter(str(one.choose("c", 0.0)) for _ in range(3 * len(numbers)))
        assert set(turns.values()) <= {3} and len(turns) == len(numbers)


# --- doors ------------------------------------------------------------------------------------

EVERYTHING: dict[str, Any] = {
    "node_port": 30080,
    "vips": ["192.0.2.60"],
    "externalIPs": ["192.0.2.99"],
}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, {("cluster", False)}),
        (EVERYTHING, {("cluster", False)}),
        ({"internalTrafficPolicy": "Local"}, {("local", False)}),
        ({**EVERYTHING, **LOCAL}, {("cluster", False), ("local", False)}),
        (
            {**EVERYTHING, "loadBalancerSourceRanges": ["10.0.0.0/8"]},
            {("cluster", False), ("cluster", True)},
        ),
        (
            {**EVERYTHING, **LOCAL, "loadBalancerSourceRanges": ["10.0.0.0/8"]},
            {("cluster", False), ("cluster", True), ("local", False), ("local", True)},
        ),
        ({"ports": [("s", 80, "SCTP")]}, set()),
    ],
)
def test_a_service_port_has_as_many_doors_as_it_has_decisions(
    more: dict[str, Any], expected: set[tuple[str, bool]]
) -> None:
    one = only(exposed("web", **more), slice_of("web", endpoint("10.244.1.5")))
    assert {(door.policy, door.ranged) for door in doors(one, Options())} == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("detector", (None, PODS))
def test_every_door_does_what_the_table_decides_for_all_that_are_led_there(
    family: Family, detector: Detector | None
) -> None:
    """Over the recorded cluster: nothing is decided a second time, nor lost."""
    options = Options(family, detector=detector)
    seen = 0
    for one in cluster_table(family):
        opened = doors(one, options)
        if one.protocol == "sctp":
            continue
        for frontend, origin in itertools.product(one.frontends, origins(options)):
            decision = decide(one, frontend.kind, origin, detects=detector is not None)
            behind = opened[door_of(one, frontend, origin, detector is not None)]
            assert (behind.verdict, behind.endpoints) == (decision.verdict, decision.endpoints)
            seen += 1
    assert seen > (50 if family == 4 else 3)


def test_preferred_ports_are_stable_all_different_and_away_from_node_ports() -> None:
    door = Door("default/web:http", "tcp", "cluster")
    ports = list(preferred_ports(door, 4))
    assert sorted(ports) == list(PORTS)
    assert next(preferred_ports(door, 4)) == ports[0]
    assert next(preferred_ports(door._replace(policy="local"), 4)) != ports[0]
    assert min(PORTS) > 32767


@pytest.mark.parametrize(
    ("client", "expected"),
    [("10.1.2.3", True), ("192.0.2.1", False), ("192.0.2.60", True), ("203.0.113.9", False)],
)
def test_source_ranges_admit(client: str, expected: bool) -> None:
    """192.0.2.60 is the load balancer's own address, and the node lies in a range."""
    one = only(
        exposed("web", **EVERYTHING, loadBalancerSourceRanges=["10.0.0.0/8", "192.168.77.0/24"])
    )
    assert admits(one, client) is expected


# --- no root ----------------------------------------------------------------------------------


def test_each_service_has_an_address_of_its_own_on_loopback() -> None:
    ports = [("http", 8080, "TCP"), ("https", 443, "TCP"), ("dns", 53, "UDP")]
    table = table_of(service("web", ports=ports), service("other", ip="10.96.0.51", ports=ports))
    places = {
        (one.name, one.protocol): next(loopback_places(one, 4, 1024))
        for ports_of in table.services.values()
        for one in ports_of
    }
    assert len({place.address for place in places.values()}) == 2
    assert all(place.address.startswith("127.") for place in places.values())
    found = {name.rpartition(":")[2]: place.port for (name, _), place in places.items()}
    assert found == {"http": 8080, "https": 10443, "dns": 10053}
    again = next(iter(table.services[("default", "web")]))
    assert next(loopback_places(again, 4, 1024)) == places[again.name, again.protocol]
    assert next(loopback_places(again, 4, 0)).port == again.port


def test_without_root_ipv6_has_one_address_and_many_ports() -> None:
    one = only(service("web", ip="fd00:10:96::50"), family=6)
    places = list(itertools.islice(loopback_places(one, 6, 1024), 10))
    assert {place.address for place in places} == {"::1"} and len(set(places)) == 10


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("default/web:http=8080", {("default/web:http", "tcp"): Place("127.0.0.1", 8080)}),
        ("default/web=8080", {("default/web", "tcp"): Place("127.0.0.1", 8080)}),
        (
            "kube-system/kube-dns:dns/udp=127.0.0.1:5353, a/b=[::1]:80",
            {
                ("kube-system/kube-dns:dns", "udp"): Place("127.0.0.1", 5353),
                ("a/b", "tcp"): Place("::1", 80),
            },
        ),
        ("", {}),
    ],
)
def test_portmap_reads(text: str, expected: dict[Any, Place]) -> None:
    assert parse_portmap([text]) == expected


@pytest.mark.parametrize(
    "text",
    ["web=80", "default/web", "default/web=", "default/web=0", "default/web=65536",
     "default/web=x", "default/web=localhost:80", "/web=80", "a/b=1,a/b=2", "a/b=80²"],
)  # fmt: skip
def test_portmap_says_what_would_be_right(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--portmap: .*(is not NAMESPACE/|is given twice)"):
        parse_portmap([text])


# --- rules ------------------------------------------------------------------------------------

COMMENT = '-m comment --comment "default/web:http" -m tcp'


PLAIN = Options()


def rules_of(*objects: Any, options: Options = PLAIN, address: str = "192.168.77.1") -> Any:
    table = table_of(*objects, family=options.family)
    ports = {
        door: 40000 + number
        for number, door in enumerate(d for one in table for d in doors(one, options))
    }
    rules = PortalRules(options, address)
    rules.update(table, None, ports)
    return rules.wanted()


def test_portals_of_a_service_with_every_frontend() -> None:
    """Reference 2.3, in iptables-save's spelling."""
    wanted = rules_of(exposed("web", **EVERYTHING), slice_of("web", endpoint("10.244.1.5")))
    vips = [("192.0.2.60", 80), ("192.0.2.99", 80), ("10.96.0.50", 80)]
    assert set(wanted["nat"][PORTALS_CONTAINER]) == {
        f"-d {ip}/32 -p tcp {COMMENT} --dport {port} -j REDIRECT --to-ports 40000"
        for ip, port in vips
    }
    assert set(wanted["nat"][PORTALS_HOST]) == {
        f"-d {ip}/32 -p tcp {COMMENT} --dport {port} -j DNAT --to-destination 192.168.77.1:40000"
        for ip, port in vips
    }
    assert wanted["nat"][NODE_PORT_CONTAINER] == (
        f"-p tcp {COMMENT} --dport 30080 -j REDIRECT --to-ports 40000",
    )
    assert wanted["nat"][NODE_PORT_HOST] == (
        f"-p tcp {COMMENT} --dport 30080 -j DNAT --to-destination 192.168.77.1:40000",
    )
    assert wanted["filter"][NON_LOCAL] == (
        "-m conntrack ! --ctstate NEW -j RETURN",
        f"-p tcp {COMMENT} --dport 40000 -m conntrack --ctstate DNAT -j ACCEPT",
        "-m conntrack --ctstate DNAT -j RETURN",
        f"-p tcp {COMMENT} --dport 40000 -j REJECT --reject-with icmp-port-unreachable",
    )


@pytest.mark.parametrize(
    ("detector", "pods"),
    [
        (Detector("cidr", "10.244.0.0/16"), "-s 10.244.0.0/16 -d 192.0.2.99/32"),
        (Detector("interface", "cni0"), "-d 192.0.2.99/32 -i cni0"),
        (Detector("prefix", "veth"), "-d 192.0.2.99/32 -i veth+"),
    ],
)
def test_policy_local_spares_pods_and_the_node_the_way_out(detector: Detector, pods: str) -> None:
    wanted = rules_of(
        exposed("web", externalIPs=["192.0.2.99"], **LOCAL),
        slice_of("web", endpoint("10.244.1.5", nodeName="node1")),
        options=Options(detector=detector),
    )
    cluster, local = 40000, 40001
    match = f"-p tcp {COMMENT} --dport 80 -j"
    found = [rule for rule in wanted["nat"][PORTALS_CONTAINER] if "192.0.2.99" in rule]
    assert found == [
        f"{pods} {match} REDIRECT --to-ports {cluster}",
        f"-d 192.0.2.99/32 {match} REDIRECT --to-ports {local}",
    ]
    (own,) = [rule for rule in wanted["nat"][PORTALS_HOST] if "192.0.2.99" in rule]
    assert own.endswith(f"--to-destination 192.168.77.1:{cluster}")


def test_ipv6_portals() -> None:
    wanted = rules_of(service("web", ip="fd00:10:96::50"), options=Options(6), address="fd00:77::1")
    (rule,) = wanted["nat"][PORTALS_HOST]
    assert rule.startswith("-d fd00:10:96::50/128 -p tcp")
    assert rule.endswith("-j DNAT --to-destination [fd00:77::1]:40000")
    assert wanted["filter"][NON_LOCAL][-1].endswith("icmp6-port-unreachable")


def test_a_node_without_an_address_leads_its_processes_to_loopback() -> None:
    (rule,) = rules_of(service("web"), address="")["nat"][PORTALS_HOST]
    assert rule.endswith("-j REDIRECT --to-ports 40000")


def test_the_first_with_an_endpoint_gets_what_two_claim() -> None:
    claims: dict[str, Any] = {"externalIPs": ["192.0.2.99"]}
    objects = [exposed("a", ip="10.96.0.1", **claims), exposed("b", ip="10.96.0.2", **claims)]
    for backed, winner in (((), "a"), (("b",), "b"), (("a", "b"), "a")):
        slices = [slice_of(name, endpoint("10.244.1.5")) for name in backed]
        wanted = rules_of(*objects, *slices)
        (rule,) = [rule for rule in wanted["nat"][PORTALS_CONTAINER] if "192.0.2.99" in rule]
        assert f"default/{winner}:http" in rule


def test_a_name_cannot_become_a_rule() -> None:
    evil = 'x" -j ACCEPT\n-A INPUT -j ACCEPT #'
    wanted = rules_of(service("web", ports=[(evil, 80, "TCP")]))
    for rule in (rule for chains in wanted.values() for rules in chains.values() for rule in rules):
        assert rule.count('"') in (0, 2) and "\n" not in rule and "INPUT -j" not in rule


def test_jumps_say_what_the_old_proxy_said() -> None:
    leading = jumps(Options())
    assert leading["nat"]["PREROUTING"] == (
        '-m comment --comment "handle ClusterIPs; NOTE: this must be before the NodePort rules"'
        " -j KUBE-PORTALS-CONTAINER",
        "! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -m comment --comment"
        ' "handle service NodePorts; NOTE: this must be the last rule in the chain"'
        " -j KUBE-NODEPORT-CONTAINER",
    )
    assert leading["filter"]["INPUT"] == (
        '-m comment --comment "Ensure that non-local NodePort traffic can flow"'
        " -j KUBE-NODEPORT-NON-LOCAL",
    )


def test_rendered_rules_are_whole_and_the_same_each_time() -> None:
    options = Options(detector=PODS)
    text = render_rules(cluster_table(), options, "192.168.77.1")
    assert text == render_rules(cluster_table(), options, "192.168.77.1")
    for chains in CHAINS.values():
        for chain in chains:
            assert f":{chain} - [0:0]\n" in text and f"-j {chain}\n" in text
    ports = [line.split()[-1] for line in text.splitlines() if "--to-ports" in line]
    assert all(int(port) in PORTS for port in ports)


NAMES = [f"s{n}" for n in range(6)]


@given(
    st.lists(
        st.dictionaries(st.sampled_from(NAMES), st.sampled_from(("in", "out", "empty"))),
        min_size=1,
        max_size=5,
    )
)
def test_incremental_equals_from_scratch(states: list[dict[str, str]]) -> None:
    """Partial texts, applied one after the other, lead where a full one does."""
    options = Options(detector=PODS)
    rules, held = PortalRules(options, "192.168.77.1"), dict[str, list[str]]()
    known: set[Any] = set()
    for state in states:
        objects: list[Any] = []
        for name, kind in state.items():
            more = EVERYTHING if kind == "out" else {}
            objects.append(exposed(name, ip=f"10.96.0.{1 + NAMES.index(name)}", **more))
            if kind != "empty":
                objects.append(slice_of(name, endpoint("10.244.1.5")))
        table = table_of(*objects)
        ports = {
            door: 40000 + 10 * NAMES.index(one.key[1]) + number
            for one in table
            for number, door in enumerate(doors(one, options))
        }
        rules.update(table, known | table.services.keys(), ports)
        known = set(table.services)
        apply(rules.partial(), held)
        rules.committed()
        fresh = PortalRules(options, "192.168.77.1")
        fresh.update(table, None, ports)
        wanted = {name: list(lines) for chains in fresh.wanted().values()
                  for name, lines in chains.items()}  # fmt: skip
        assert held == wanted
        assert rules.partial() == ""


def apply(text: str, held: dict[str, list[str]]) -> None:
    """Do what iptables-restore --noflush does."""
    for line in text.splitlines():
        if line.startswith(":"):
            held[line[1:].split()[0]] = []
        elif line.startswith("-A "):
            _, chain, rule = line.split(" ", 2)
            held[chain].append(rule)
        elif line.startswith("-D "):
            _, chain, rule = line.split(" ", 2)
            held[chain].remove(rule)
        elif line.startswith("-I "):
            _, chain, number, rule = line.split(" ", 3)
            held[chain].insert(int(number) - 1, rule)
