"""Addresses and ports are given out once, in the way a cluster gives them out, and come back."""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Callable
from typing import Any

import pytest
from api_writes import Obj, changed, filled, make, resource_of, service, written
from hypothesis import given
from hypothesis import strategies as st

from kdns.api.allocate import Allocator, cluster_ips, health_check_port, node_ports_of
from kdns.api.kinds import BY_PLURAL
from kdns.api.pools import SLACK, Banded, Pool
from kdns.api.validation import validate
from kdns.errors import ApiError, ConfigError

DUAL = ("10.96.0.0/16", "fd00:10:96::/112")
SERVICES = BY_PLURAL["", "services"]


def allocator(*ranges: str, **options: Any) -> Allocator:
    options.setdefault("rng", random.Random(7))
    return Allocator(ranges or ("10.96.0.0/16",), **options)


def refusal(write: Callable[[], object]) -> str:
    with pytest.raises(ApiError) as e:
        write()
    return str(e.value)


# --- ClusterIPs ---------------------------------------


def test_a_service_gets_a_cluster_ip_of_the_range() -> None:
    found = written(allocator(), service())["spec"]
    assert ipaddress.ip_address(found["clusterIP"]) in ipaddress.ip_network("10.96.0.0/16")
    assert found["clusterIPs"] == [found["clusterIP"]]
    assert (found["ipFamilies"], found["ipFamilyPolicy"]) == (["IPv4"], "SingleStack")


@pytest.mark.parametrize(
    ("cidr", "static"),
    [
        ("10.96.0.0/24", ("10.96.0.1", "10.96.0.16")),
        ("10.96.0.0/20", ("10.96.0.1", "10.96.1.0")),
        ("10.96.0.0/12", ("10.96.0.1", "10.96.1.0")),
        ("fd00::/112", ("fd00::1", "fd00::100")),
    ],
)
def test_the_lower_band_is_for_addresses_asked_for_by_number(
    cidr: str, static: tuple[str, str]
) -> None:
    low, high = map(ipaddress.ip_address, static)
    pool = allocator(cidr, pod_ranges=("172.16.0.0/16",))
    for i in range(200):
        found = ipaddress.ip_address(written(pool, service(f"s{i}"))["spec"]["clusterIP"])
        assert int(found) > int(high)
    for address in static:
        asked = service("asked" + str(int(low)), clusterIP=address)
        assert written(pool, asked)["spec"]["clusterIP"] == address


def test_a_full_upper_band_goes_on_in_the_lower_one_and_then_says_so() -> None:
    pool = allocator("10.96.0.0/26")
    given = [written(pool, service(f"s{i}"))["spec"]["clusterIP"] for i in range(62)]
    assert len(set(given)) == 62
    assert {ipaddress.ip_address(a) for a in given} == set(
        ipaddress.ip_network("10.96.0.0/26").hosts()
    )
    assert all(int(a.rpartition(".")[2]) > 16 for a in given[:46])
    text = refusal(lambda: written(pool, service("more")))
    assert text == "Internal error occurred: failed to allocate a serviceIP: range is full"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            "1.2.3.4",
            'spec.clusterIPs: Invalid value: ["1.2.3.4"]: failed to allocate IP 1.2.3.4: the'
            " provided IP (1.2.3.4) is not in the valid range. The range of valid IPs is"
            " 10.96.0.0/16",
        ),
        (
            "10.96.0.0",
            'spec.clusterIPs: Invalid value: ["10.96.0.0"]: failed to allocate IP 10.96.0.0: the'
            " provided IP (10.96.0.0) is not in the valid range. The range of valid IPs is"
            " 10.96.0.0/16",
        ),
        (
            "10.96.0.5",
            'spec.clusterIPs: Invalid value: ["10.96.0.5"]: failed to allocate IP 10.96.0.5:'
            " provided IP is already allocated",
        ),
        (
            "fd00::1",
            'spec.clusterIPs[0]: Invalid value: ["fd00::1"]: IPv6 is not configured on this'
            " cluster",
        ),
    ],
)
def test_an_address_that_cannot_be_had_is_refused(address: str, message: str) -> None:
    pool = allocator()
    written(pool, service("first", clusterIP="10.96.0.5"))
    text = refusal(lambda: written(pool, service("second", clusterIP=address)))
    assert text == f'Service "second" is invalid: {message}'


def test_addresses_and_ports_come_back_when_the_service_goes() -> None:
    pool = allocator(node_ports=range(30000, 30003))
    first = written(pool, service(clusterIP="10.96.0.5", type="NodePort"))
    pool.release(SERVICES, first)
    again = service("again", clusterIP="10.96.0.5", type="NodePort")
    again["spec"]["ports"][0]["nodePort"] = first["spec"]["ports"][0]["nodePort"]
    assert written(pool, again)["spec"]["clusterIP"] == "10.96.0.5"


def test_what_a_failed_write_took_comes_back() -> None:
    pool = allocator(node_ports=range(30000, 30001))
    new = filled(service(clusterIP="10.96.0.5", type="NodePort"))
    with pool.claim(SERVICES, new, None):
        pass  # the write failed: nobody says keep()
    assert written(pool, service(clusterIP="10.96.0.5", type="NodePort"))


def test_a_refused_claim_leaves_nothing_taken() -> None:
    pool = allocator(node_ports=range(30000, 30001))
    written(pool, service("holder", type="NodePort"))
    refusal(lambda: written(pool, service("loser", clusterIP="10.96.0.9", type="NodePort")))
    assert written(pool, service("winner", clusterIP="10.96.0.9"))


def test_objects_of_the_last_run_keep_what_they_have() -> None:
    first = allocator(node_ports=range(30000, 30003))
    stored = [
        written(first, service("a", clusterIP="10.96.0.7", type="NodePort")),
        written(first, service("b", type="LoadBalancer", externalTrafficPolicy="Local")),
    ]
    pod = make("Pod", "p", spec={}, status={"podIP": "10.244.0.1"})
    stored.append(pod)
    second = allocator(node_ports=range(30000, 30003), pod_ranges=("10.244.0.0/30",))
    second.load(stored)
    text = refusal(lambda: written(second, service("c", clusterIP="10.96.0.7")))
    assert text.endswith("provided IP is already allocated")
    text = refusal(lambda: written(second, service("c", type="NodePort")))
    assert text.endswith("failed to allocate a nodePort: range is full")
    assert second.give_pod_ip(make("Pod", "q")) == ["10.244.0.2"]


# --- families ---------------------------------------


@pytest.mark.parametrize(
    ("ranges", "spec", "families", "policy"),
    [
        (DUAL, {}, ["IPv4"], "SingleStack"),
        (DUAL[::-1], {}, ["IPv6"], "SingleStack"),
        (DUAL, {"ipFamilies": ["IPv6"]}, ["IPv6"], "SingleStack"),
        (DUAL, {"ipFamilyPolicy": "PreferDualStack"}, ["IPv4", "IPv6"], "PreferDualStack"),
        (DUAL, {"ipFamilyPolicy": "RequireDualStack"}, ["IPv4", "IPv6"], "RequireDualStack"),
        (
            DUAL,
            {"ipFamilyPolicy": "PreferDualStack", "ipFamilies": ["IPv6"]},
            ["IPv6", "IPv4"],
            "PreferDualStack",
        ),
        (DUAL, {"clusterIP": "fd00:10:96::5"}, ["IPv6"], "SingleStack"),
        (DUAL[:1], {"ipFamilyPolicy": "PreferDualStack"}, ["IPv4"], "PreferDualStack"),
    ],
)
def test_families_follow_policy_and_ranges(
    ranges: tuple[str, ...], spec: Obj, families: list[str], policy: str
) -> None:
    found = written(allocator(*ranges), service(**spec))["spec"]
    assert (found["ipFamilies"], found["ipFamilyPolicy"]) == (families, policy)
    told = ["IPv6" if ":" in text else "IPv4" for text in found["clusterIPs"]]
    assert told == families
    assert found["clusterIP"] == found["clusterIPs"][0]


@pytest.mark.parametrize(
    ("selector", "ranges", "families", "policy"),
    [
        ({"app": "web"}, DUAL[:1], ["IPv4"], "SingleStack"),
        ({"app": "web"}, DUAL, ["IPv4"], "SingleStack"),
        # Hand-written endpoints may be of any family, whatever the cluster has.
        (None, DUAL[:1], ["IPv4", "IPv6"], "RequireDualStack"),
        (None, DUAL, ["IPv4", "IPv6"], "RequireDualStack"),
    ],
)
def test_a_headless_service_has_families_but_no_address(
    selector: Obj | None, ranges: tuple[str, ...], families: list[str], policy: str
) -> None:
    spec = {"clusterIP": "None"} | ({"selector": selector} if selector else {})
    found = written(allocator(*ranges), service(**spec))["spec"]
    assert (found["clusterIP"], found["clusterIPs"]) == ("None", ["None"])
    assert (found["ipFamilies"], found["ipFamilyPolicy"]) == (families, policy)


def test_an_external_name_has_neither() -> None:
    new = service(type="ExternalName", externalName="example.com", ports=None)
    found = written(allocator(), new)["spec"]
    assert not {"clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"} & set(found)


@pytest.mark.parametrize(
    ("ranges", "spec", "message"),
    [
        (
            DUAL[:1],
            {"ipFamilyPolicy": "RequireDualStack"},
            'spec.ipFamilyPolicy: Invalid value: "RequireDualStack": this cluster is not'
            " configured for dual-stack services",
        ),
        (
            DUAL[:1],
            {"ipFamilies": ["IPv6"]},
            'spec.ipFamilies[0]: Invalid value: "IPv6": not configured on this cluster',
        ),
        (
            DUAL,
            {"ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv4", "IPv6"]},
            "spec.ipFamilyPolicy: Invalid value: \"SingleStack\": must be 'RequireDualStack' or"
            " 'PreferDualStack' when multiple IP families are specified",
        ),
    ],
)
def test_families_that_cannot_be_had_are_refused(
    ranges: tuple[str, ...], spec: Obj, message: str
) -> None:
    text = refusal(lambda: written(allocator(*ranges), service(**spec)))
    assert text == f'Service "web" is invalid: {message}'


def test_a_second_family_is_gained_and_given_up() -> None:
    pool = allocator(*DUAL)
    single = written(pool, service())
    dual = written(pool, changed(single, ipFamilyPolicy="RequireDualStack"), single)
    assert dual["spec"]["clusterIPs"][0] == single["spec"]["clusterIP"]
    assert dual["spec"]["ipFamilies"] == ["IPv4", "IPv6"]
    second = dual["spec"]["clusterIPs"][1]
    back = written(pool, changed(dual, ipFamilyPolicy="SingleStack"), dual)
    assert back["spec"]["clusterIPs"] == single["spec"]["clusterIPs"]
    assert back["spec"]["ipFamilies"] == ["IPv4"]
    assert written(pool, service("other", clusterIP=second))


def test_dropping_the_second_address_needs_the_policy() -> None:
    pool = allocator(*DUAL)
    dual = written(pool, service(ipFamilyPolicy="PreferDualStack"))
    smaller = changed(dual, clusterIPs=dual["spec"]["clusterIPs"][:1])
    text = refusal(lambda: written(pool, smaller, dual))
    assert "must be 'SingleStack' to release the secondary cluster IP" in text


# --- NodePorts ---------------------------------------


def node_ports(obj: Obj) -> list[int]:
    return [port.get("nodePort", 0) for port in obj["spec"]["ports"]]


def test_node_ports_come_from_the_upper_band_first() -> None:
    pool = allocator()
    ports = [{"port": n, "name": f"p{n}"} for n in range(1, 200)]
    found = node_ports(written(pool, service(type="NodePort", ports=ports)))
    assert len(set(found)) == len(found)
    assert min(found) >= 30086  # docs: the static band of 30000-32767 is 30000-30085
    assert max(found) <= 32767


def test_two_protocols_of_one_port_share_a_node_port() -> None:
    ports = [
        {"name": "tcp", "port": 53, "protocol": "TCP"},
        {"name": "udp", "port": 53, "protocol": "UDP", "nodePort": 30053},
        {"name": "web", "port": 80, "protocol": "TCP"},
    ]
    found = node_ports(written(allocator(), service(type="NodePort", ports=ports)))
    assert found[:2] == [30053, 30053]
    assert found[2] not in (0, 30053)


@pytest.mark.parametrize(
    ("port", "message"),
    [
        (80, "provided port is not in the valid range. The range of valid ports is 30000-32767"),
        (30080, "provided port is already allocated"),
    ],
)
def test_a_node_port_that_cannot_be_had_is_refused(port: int, message: str) -> None:
    pool = allocator()
    written(pool, service("first", type="NodePort", ports=[{"port": 80, "nodePort": 30080}]))
    asked = service("second", type="NodePort", ports=[{"port": 80, "nodePort": port}])
    text = refusal(lambda: written(pool, asked))
    assert text == (
        f'Service "second" is invalid: spec.ports[0].nodePort: Invalid value: {port}: {message}'
    )


def test_a_manifest_sent_again_keeps_its_ports_and_new_ones_are_added() -> None:
    pool = allocator()
    ports = [{"name": "a", "port": 80}, {"name": "b", "port": 81}]
    first = written(pool, service(type="NodePort", ports=ports))
    more = [*ports, {"name": "c", "port": 82}]
    second = written(pool, service(type="NodePort", ports=more), first)
    assert node_ports(second)[:2] == node_ports(first)
    assert second["spec"]["clusterIP"] == first["spec"]["clusterIP"]
    third = written(pool, service(type="NodePort", ports=more[1:]), second)
    freed = node_ports(first)[0]
    assert freed not in node_ports(third)
    assert written(pool, service("o", type="NodePort", ports=[{"port": 1, "nodePort": freed}]))


def test_types_come_and_go_with_what_they_need() -> None:
    pool = allocator(node_ports=range(30000, 30001))
    one = written(pool, service(selector={"a": "b"}))
    two = written(pool, changed(one, type="NodePort"), one)
    assert node_ports(two) == [30000]
    three = written(pool, changed(two, type="ClusterIP"), two)
    assert node_ports(three) == [0]
    assert "externalTrafficPolicy" not in three["spec"]
    four = written(pool, changed(three, type="ExternalName", externalName="example.com"), three)
    assert not {"clusterIP", "clusterIPs", "ipFamilies"} & set(four["spec"])
    held = one["spec"]["clusterIP"]
    assert written(pool, service("other", clusterIP=held, type="NodePort"))
    five = written(pool, changed(four, type="ClusterIP"), four)
    assert five["spec"]["clusterIP"] != held


def test_a_load_balancer_that_keeps_traffic_local_has_a_health_check_port() -> None:
    pool = allocator()
    one = written(pool, service(type="LoadBalancer", externalTrafficPolicy="Local"))
    port = one["spec"]["healthCheckNodePort"]
    assert 30086 <= port <= 32767
    again = written(pool, changed(one, healthCheckNodePort=None), one)
    assert again["spec"]["healthCheckNodePort"] == port
    two = written(pool, changed(again, externalTrafficPolicy="Cluster"), again)
    assert "healthCheckNodePort" not in two["spec"]
    assert written(pool, service("o", type="NodePort", ports=[{"port": 1, "nodePort": port}]))


def test_a_load_balancer_may_do_without_node_ports() -> None:
    found = written(allocator(), service(type="LoadBalancer", allocateLoadBalancerNodePorts=False))
    assert node_ports(found) == [0]


# --- addresses in status ---------------------------------------


def test_a_load_balancer_address_is_the_same_when_asked_again_and_comes_back() -> None:
    pool = allocator(lb_ranges=("203.0.113.0/30",))
    one, two = (written(pool, service(name, type="LoadBalancer")) for name in ("one", "two"))
    first, second = pool.give_lb(one), pool.give_lb(two)
    assert {*first, *second} == {"203.0.113.1", "203.0.113.2"}
    assert pool.give_lb(one) == first
    three = written(pool, service("three", type="LoadBalancer"))
    assert pool.give_lb(three) == []
    written(pool, changed(one, type="ClusterIP"), one)
    assert pool.give_lb(three) == first
    pool.release(SERVICES, two)
    assert pool.give_lb(written(pool, service("four", type="LoadBalancer"))) == second


def test_a_load_balancer_address_can_be_asked_for() -> None:
    pool = allocator(*DUAL, lb_ranges=("203.0.113.0/24", "2001:db8:1::/64"))
    asked = service(
        type="LoadBalancer", loadBalancerIP="203.0.113.77", ipFamilyPolicy="PreferDualStack"
    )
    found = pool.give_lb(written(pool, asked))
    assert found[0] == "203.0.113.77"
    assert ipaddress.ip_address(found[1]) in ipaddress.ip_network("2001:db8:1::/64")


def test_pods_get_addresses_of_each_family_until_they_go() -> None:
    pool = allocator(*DUAL, pod_ranges=("10.244.0.0/30", "fd00:10:244::/64"))
    pods = [make("Pod", f"p{i}") for i in range(3)]
    given = [pool.give_pod_ip(pod) for pod in pods[:2]]
    assert {found[0] for found in given} == {"10.244.0.1", "10.244.0.2"}
    assert all(":" in found[1] for found in given)
    assert [":" in text for text in pool.give_pod_ip(pods[2])] == [True]
    pool.release(resource_of(pods[0]), pods[0])
    assert pool.give_pod_ip(pods[2])[0] == given[0][0]


def test_a_pod_address_written_by_hand_is_not_given_to_another() -> None:
    pool = allocator(pod_ranges=("10.244.0.0/30",))
    pod = make("Pod", "p", spec={})
    told = {**pod, "status": {"podIP": "10.244.0.1", "podIPs": [{"ip": "10.244.0.1"}]}}
    with pool.claim(resource_of(pod), told, pod) as claim:
        claim.keep()
    assert pool.give_pod_ip(make("Pod", "q")) == ["10.244.0.2"]
    assert pool.give_pod_ip(make("Pod", "r")) == []


# --- any order of writes ----------------------------------------------------------------

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c"]),
        st.sampled_from(["ClusterIP", "NodePort", "LoadBalancer", "ExternalName", "gone"]),
        st.sampled_from([{}, {"ipFamilyPolicy": "PreferDualStack"}, {"clusterIP": "10.96.0.5"}]),
        st.sampled_from(["Cluster", "Local"]),
        st.integers(1, 3),
        st.booleans(),
    ),
    max_size=25,
)


@given(STEPS, st.randoms(use_true_random=False))
def test_nothing_is_given_twice_and_nothing_is_lost(
    steps: list[tuple[str, str, Obj, str, int, bool]], rng: random.Random
) -> None:
    """Services come, change and go in any order, and some writes fail."""
    pool = allocator("10.96.0.0/28", "fd00:10:96::/124", node_ports=range(30000, 30008), rng=rng)
    held: dict[str, Obj] = {}
    for name, kind, more, policy, count, fails in steps:
        old = held.get(name)
        if kind == "gone":
            if old is not None:
                pool.release(SERVICES, held.pop(name))
            continue
        ports = [{"name": f"p{i}", "port": i} for i in range(1, count + 1)]
        spec: Obj = {"type": kind, "ports": ports, **more}
        if kind == "LoadBalancer":
            spec["externalTrafficPolicy"] = policy
        if kind == "ExternalName":
            spec = {"type": kind, "externalName": "example.com"}
        new = filled(service(name, **spec), old)
        if validate(SERVICES, new, old):
            continue
        try:
            with pool.claim(SERVICES, new, old) as claim:
                if not fails:
                    claim.keep()
                    held[name] = new
        except ApiError:
            pass
        addresses = [text for one in held.values() for text in cluster_ips(one)]
        numbers = [
            port
            for one in held.values()
            for port in {*node_ports_of(one), health_check_port(one)} - {0}
        ]
        assert len(set(addresses)) == len(addresses)
        assert len(set(numbers)) == len(numbers)
        assert sum(p._numbers.taken for p in pool._services.values()) == len(addresses)
        assert pool._ports.taken == len(numbers)
    for one in held.values():
        pool.release(SERVICES, one)
    assert pool._ports.taken == 0
    assert all(p._numbers.taken == 0 for p in pool._services.values())


# --- what an operator says ---------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"service_ranges": ("10.244.0.0/20",)},
            "10.244.0.0/16 overlaps 10.244.0.0/20 of --service-cluster-ip-range: use ranges that"
            " are apart",
        ),
        (
            {"service_ranges": ("10.96.0.0/16", "10.97.0.0/16")},
            "10.96.0.0/16 and 10.97.0.0/16 are both IPv4: the second must be IPv6",
        ),
        ({"service_ranges": ()}, "0 ranges: use one, or one of IPv4 and one of IPv6"),
        ({"service_ranges": ("10.96.0.0/30",)}, "10.96.0.0/30 is too small: use /28 or larger"),
        (
            {"service_ranges": ("10.96.0.1/12",)},
            "10.96.0.1/12 has bits set beyond the prefix length: use 10.96.0.0/12",
        ),
        ({"service_ranges": ("ten",)}, '"ten" is not a range of addresses: use one such as'),
        ({"pod_ranges": ("10.244.0.0/32",)}, "10.244.0.0/32 is too small: use /30 or larger"),
        ({"lb_ranges": ("10.100.0.0/24",)}, "10.100.0.0/24 overlaps 10.96.0.0/12 of"),
        ({"node_ports": range(10)}, "0-9 is not a range of ports: use one such as 30000-32767"),
    ],
)
def test_ranges_that_cannot_be_are_refused(options: Obj, message: str) -> None:
    with pytest.raises(ConfigError) as e:
        Allocator(**options)
    assert message in str(e.value)


# --- pools ---------------------------------------


@given(
    st.integers(1, 40),
    st.lists(st.tuples(st.sampled_from(["any", "take", "back"]), st.integers(0, 39)), max_size=200),
    st.randoms(use_true_random=False),
)
def test_a_pool_is_a_set_of_numbers(
    size: int, steps: list[tuple[str, int]], rng: random.Random
) -> None:
    pool, held = Pool(size), set[int]()
    for step, number in steps:
        number %= size
        if step == "any":
            found = pool.take_any(rng)
            assert (found is None) == (len(held) == size)
            if found is not None:
                assert found not in held
                held.add(found)
        elif step == "take":
            assert pool.take(number) == (number not in held)
            held.add(number)
        else:
            pool.give_back(number)
            held.discard(number)
        assert [n for n in range(size) if n in pool] == sorted(held)


def test_a_pool_remembers_no_more_than_what_is_taken() -> None:
    pool, rng = Pool(2**20), random.Random(7)
    for _ in range(20_000):
        number = pool.take_any(rng)
        assert number is not None
        pool.give_back(number)
    assert pool.taken == 0
    assert len(pool._at) + len(pool._place) <= 4 * SLACK


def test_all_numbers_of_a_huge_range_come_up() -> None:
    """Also the last ones: what is taken is spread over the range, not one after the other."""
    band, rng = Banded(0, 2**64, 256), random.Random(7)
    found = [band.take_any(rng) or 0 for _ in range(64)]
    assert min(found) > 256
    assert max(found) > 2**63
