"""What this node does with packets to a Service: who gets them, with which source address,
and what happens where nobody can (reference 1.1, 1.5 to 1.7)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec
import pytest
from forwarding import (
    KINDS,
    NODE1,
    cluster_table,
    endpoint,
    exposed,
    only,
    service,
    slice_of,
    table_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from kdns.proxy.options import Family, NodeView
from kdns.proxy.table import (
    Decision,
    Frontend,
    FrontendKind,
    Origin,
    TableCompiler,
    conflicts,
    decide,
)
from kdns.registry.endpoints import Endpoint
from kdns.registry.objects import (
    ENDPOINT_SLICE,
    SERVICE,
    ClientIPConfig,
    EndpointSlice,
    Ingress,
    LoadBalancerStatus,
    Service,
    ServiceStatus,
    SessionAffinityConfig,
)
from kdns.registry.snapshot import Changes, Snapshot, everything
from kdns.registry.store import Store

HERE, THERE = "10.244.1.5", "10.244.2.7"


def here(ip: str = HERE, conditions: Mapping[str, bool] | None = None) -> dict[str, Any]:
    """An endpoint on this node; ready, unless said otherwise."""
    return endpoint(ip, nodeName="node1") | ({"conditions": conditions} if conditions else {})


def there(ip: str = THERE, conditions: Mapping[str, bool] | None = None) -> dict[str, Any]:
    return here(ip, conditions) | {"nodeName": "node2"}


def ips(endpoints: Sequence[Endpoint]) -> list[str]:
    return [one.ip for one in endpoints]


def spec(one: Service, **fields: Any) -> Service:
    return msgspec.structs.replace(one, spec=msgspec.structs.replace(one.spec, **fields))


def meta(one: Any, **labels: str) -> Any:
    fresh = {**(one.metadata.labels or {}), **{k.replace("__", "/"): v for k, v in labels.items()}}
    return msgspec.structs.replace(
        one, metadata=msgspec.structs.replace(one.metadata, labels=fresh)
    )


# --- the 30 flows in 4 configurations (reference 1.7) -----------------------------------------

# (from, to) -> what becomes of it where both policies are Cluster, where the external one is
# Local, and where the internal one is. "+" is masqueraded.
FLOWS: Final = {
    ("pod", "cluster IP"): ("all", "all", "local"),
    ("pod", "node port"): ("all +", "all", "all +"),
    ("pod", "loadbalancer IP"): ("all +", "all", "all +"),
    ("node", "cluster IP"): ("all +", "all +", "local +"),
    ("node", "node port"): ("all +", "all +", "all +"),
    ("node", "loadbalancer IP"): ("all +", "all +", "all +"),
    ("127.0.0.1", "node port"): ("all +", "all +", "all +"),
    ("outside", "cluster IP"): ("all +", "all +", "local +"),
    ("outside", "node port"): ("all +", "local", "all +"),
    ("outside", "loadbalancer IP"): ("all +", "local", "all +"),
}
WITHOUT_DETECTOR: Final = {
    ("pod", "node port"): ("all +", "local", "all +"),
    ("pod", "loadbalancer IP"): ("all +", "local", "all +"),
}
# What is otherwise than in FLOWS.
CONFIGURATIONS: Final[dict[tuple[bool, bool], dict[tuple[str, str], tuple[str, str, str]]]] = {
    # (there is a detector, masqueradeAll)
    (True, False): {},
    (True, True): {("pod", "cluster IP"): ("all +", "all +", "local +")},
    (False, False): {
        **WITHOUT_DETECTOR,
        ("node", "cluster IP"): ("all", "all", "local"),
        ("outside", "cluster IP"): ("all", "all", "local"),
    },
    (False, True): {
        **WITHOUT_DETECTOR,
        ("pod", "cluster IP"): ("all +", "all +", "local +"),
    },
}
POLICIES: Final[tuple[dict[str, Any], ...]] = (
    {},
    {"externalTrafficPolicy": "Local"},
    {"internalTrafficPolicy": "Local"},
)


def flows() -> Iterator[Any]:
    for (detects, masquerade_all), others in CONFIGURATIONS.items():
        for (source, target), usual in FLOWS.items():
            expected = others.get((source, target), usual)
            for policy, want in zip(POLICIES, expected, strict=True):
                name = f"{source} to {target} {policy} detects={detects} all={masquerade_all}"
                yield pytest.param(source, target, policy, detects, masquerade_all, want, id=name)


def test_there_are_30_flows_in_4_configurations() -> None:
    assert len(list(flows())) == 30 * 4


@pytest.mark.parametrize(
    ("source", "target", "policy", "detects", "masquerade_all", "want"), list(flows())
)
def test_who_gets_a_packet_and_with_which_source(
    source: str,
    target: FrontendKind,
    policy: dict[str, Any],
    detects: bool,
    masquerade_all: bool,
    want: str,
) -> None:
    web = only(
        exposed(node_port=30080, vips=["192.0.2.61"], **policy), slice_of("web", here(), there())
    )
    origins: dict[str, Origin] = {"127.0.0.1": "node", "pod": "pod", "node": "node"}
    decision = decide(
        web,
        target,
        origins.get(source, "outside"),
        masquerade_all=masquerade_all,
        detects=detects,
    )
    who, _, masquerade = want.partition(" ")
    assert decision.verdict == "forward"
    assert ips(decision.endpoints) == {"all": [HERE, THERE], "local": [HERE]}[who]
    assert decision.masquerade == (masquerade == "+")


# --- ready, serving, terminating ---------------------------------------------------------------

READY = {"ready": True, "serving": True, "terminating": False}
DRAINING = {"ready": False, "serving": True, "terminating": True}
GONE = {"ready": False, "serving": False, "terminating": True}
STARTING = {"ready": False, "serving": False, "terminating": False}
# Serving without being ready and without terminating is not ready: nothing is forwarded to it.
ODD = {"ready": False, "serving": True, "terminating": False}


@pytest.mark.parametrize(
    ("on_this_node", "on_others", "cluster", "local"),
    [
        # endpoints here, elsewhere; what a client outside gets under Cluster, under Local
        ([READY, DRAINING], [READY, DRAINING], ["1.1", "2.1"], ["1.1"]),
        ([DRAINING], [READY], ["2.1"], ["1.1"]),
        ([DRAINING, GONE], [DRAINING, GONE], ["1.1", "2.1"], ["1.1"]),
        ([STARTING], [READY], ["2.1"], "drop"),
        ([ODD], [READY], ["2.1"], "drop"),
        ([], [READY], ["2.1"], "drop"),
        ([], [DRAINING], ["2.1"], "drop"),
        ([GONE], [DRAINING], ["2.1"], "drop"),
        ([GONE], [GONE], "reject", "reject"),
        ([STARTING], [STARTING], "reject", "reject"),
        ([ODD], [ODD], "reject", "reject"),
        ([], [], "reject", "reject"),
        ([{}], [{}], ["1.1", "2.1"], ["1.1"]),  # nothing said: ready, KEP-752
        ([{"terminating": True}], [], ["1.1"], ["1.1"]),
        ([{"ready": False, "terminating": True}], [READY], ["2.1"], ["1.1"]),  # serving
    ],
)
def test_terminating_endpoints_serve_when_nothing_else_does(
    on_this_node: list[dict[str, bool]],
    on_others: list[dict[str, bool]],
    cluster: list[str] | str,
    local: list[str] | str,
) -> None:
    entries = [
        {**make(f"10.244.{net}.{i}"), "conditions": conditions}
        for net, make, group in ((1, here, on_this_node), (2, there, on_others))
        for i, conditions in enumerate(group, 1)
    ]
    for policy, want in (("Cluster", cluster), ("Local", local)):
        one = only(
            exposed(node_port=30080, externalTrafficPolicy=policy, internalTrafficPolicy=policy),
            slice_of("web", *entries),
        )
        targets: tuple[FrontendKind, ...] = ("node port", "cluster IP")
        for target in targets:
            found = decide(one, target, "outside")
            if isinstance(want, str):
                assert found == Decision(want)  # type: ignore[arg-type]
            else:
                assert found.verdict == "forward"
                assert ips(found.endpoints) == [f"10.244.{ip}" for ip in want]
        # A Pod of this node is served from anywhere, whatever the external policy.
        near = decide(one, "node port", "pod")
        assert near.verdict == ("reject" if cluster == "reject" else "forward")


def test_a_service_without_slices_is_refused_at_once() -> None:
    one = only(exposed(node_port=30080, externalTrafficPolicy="Local"))
    assert (one.internal, one.external) == ("reject", "reject")
    assert decide(one, "node port", "pod") == decide(one, "cluster IP", "outside")


def test_internal_policy_local_alone_tells_dropped_from_refused_by_any_node() -> None:
    service_ = service("web", internalTrafficPolicy="Local")
    remote = only(service_, slice_of("web", there()))
    assert (remote.internal, remote.cluster, remote.local) == ("drop", (), ())
    assert remote.has_endpoints and not remote.reachable
    assert only(service_, slice_of("web", there(conditions=GONE))).internal == "reject"


# --- topology hints ----------------------------------------------------------------------------


def hinted(
    ip: str, *, zones: Sequence[str] = (), nodes: Sequence[str] = (), **more: Any
) -> dict[str, Any]:
    return endpoint(
        ip,
        hints={
            "forZones": [{"name": zone} for zone in zones],
            "forNodes": [{"name": node} for node in nodes],
        },
        **more,
    )


NOT_READY = {"conditions": {"ready": False}}


@pytest.mark.parametrize(
    ("entries", "want"),
    [
        ([hinted("10.0.0.1", zones=["z-a"]), hinted("10.0.0.2", zones=["z-b"])], [1]),
        ([hinted("10.0.0.1", zones=["z-a", "z-b"]), hinted("10.0.0.2", zones=["z-b"])], [1]),
        # a single ready endpoint without hint: hints are not taken
        ([hinted("10.0.0.1", zones=["z-a"]), endpoint("10.0.0.2")], [1, 2]),
        ([endpoint("10.0.0.1"), hinted("10.0.0.2", zones=["z-b"])], [1, 2]),
        # ... one that is not ready does not matter, with a hint or without
        ([hinted("10.0.0.1", zones=["z-a"]), endpoint("10.0.0.2", **NOT_READY)], [1]),
        ([hinted("10.0.0.1", zones=["z-b"]), hinted("10.0.0.2", zones=["z-a"]) | NOT_READY], [1]),
        # nobody is meant for this zone: all
        ([hinted("10.0.0.1", zones=["z-b"]), hinted("10.0.0.2", zones=["z-c"])], [1, 2]),
        # the node goes before the zone
        (
            [
                hinted("10.0.0.1", zones=["z-a"], nodes=["node1"]),
                hinted("10.0.0.2", zones=["z-a"], nodes=["node2"]),
            ],
            [1],
        ),
        ([hinted("10.0.0.1", nodes=["node1"]), hinted("10.0.0.2", nodes=["node2"])], [1]),
        ([hinted("10.0.0.1", nodes=["node3"]), hinted("10.0.0.2", nodes=["node2"])], [1, 2]),
        # nobody is meant for this node: the zone decides
        (
            [
                hinted("10.0.0.1", zones=["z-a"], nodes=["node3"]),
                hinted("10.0.0.2", zones=["z-b"], nodes=["node2"]),
            ],
            [1],
        ),
        # not all have node hints: the zone decides
        (
            [
                hinted("10.0.0.1", zones=["z-b"], nodes=["node1"]),
                hinted("10.0.0.2", zones=["z-a"]),
            ],
            [2],
        ),
        # nothing ready: those that still serve, whatever their hints
        (
            [
                hinted("10.0.0.1", zones=["z-a"], conditions=DRAINING),
                hinted("10.0.0.2", zones=["z-b"], conditions=DRAINING),
            ],
            [1, 2],
        ),
    ],
)
def test_hints_keep_traffic_near(entries: list[dict[str, Any]], want: list[int]) -> None:
    assert ips(only(service("web"), slice_of("web", *entries)).cluster) == [
        f"10.0.0.{n}" for n in want
    ]


def test_a_node_without_zone_takes_no_zone_hints() -> None:
    entries = [hinted("10.0.0.1", zones=[""]), hinted("10.0.0.2", zones=["z-b"])]
    one = only(service("web"), slice_of("web", *entries), node=NodeView("node1"))
    assert ips(one.cluster) == ["10.0.0.1", "10.0.0.2"]


def test_hints_do_not_thin_out_policy_local_and_both_sets_are_reachable() -> None:
    entries = [
        hinted("10.0.0.1", zones=["z-b"], nodeName="node1"),
        hinted("10.0.0.2", zones=["z-a"], nodeName="node2"),
        hinted("10.0.0.3", zones=["z-b"], nodeName="node1"),
        hinted("10.0.0.4", zones=["z-b"], nodeName="node2"),
    ]
    one = only(exposed(node_port=30080, externalTrafficPolicy="Local"), slice_of("web", *entries))
    assert (ips(one.cluster), ips(one.local)) == (["10.0.0.2"], ["10.0.0.1", "10.0.0.3"])
    assert ips(one.reachable) == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]  # not set after set


# --- which endpoints a port has ----------------------------------------------------------------


def test_slices_of_a_service_are_merged_in_text_order_of_their_endpoints() -> None:
    one = only(
        service("web"),
        slice_of("web", endpoint("10.0.0.10"), endpoint("10.0.0.9"), name="a"),
        slice_of("web", endpoint("10.0.0.1"), name="b", ports=[("http", 8080, "TCP")]),
    )
    assert [str(e) for e in one.cluster] == ["10.0.0.10:80", "10.0.0.1:8080", "10.0.0.9:80"]


@pytest.mark.parametrize(
    ("ports", "want"),
    [
        ([("http", 8080, "TCP")], ["10.0.0.1:8080"]),
        ([("http", 8080, None)], ["10.0.0.1:8080"]),  # nothing said is TCP
        ([("http", 8080, "UDP")], []),
        ([("https", 8080, "TCP")], []),
        ([("", 8080, "TCP")], []),
        ([(None, 8080, "TCP")], []),
        ([("http", None, "TCP")], []),
        ([("http", 0, "TCP")], []),
        ([], []),
        ([("http", 1, "TCP"), ("http", 2, "TCP")], ["10.0.0.1:1", "10.0.0.1:2"]),
    ],
)
def test_a_port_is_found_by_name_and_protocol(ports: list[Any], want: list[str]) -> None:
    one = only(service("web"), slice_of("web", endpoint("10.0.0.1"), ports=ports))
    assert [str(e) for e in one.cluster] == want


def test_a_port_without_name_is_not_one_whose_name_is_not_there() -> None:
    unnamed = service("web", ports=[("", 80, "TCP")])
    assert only(unnamed, slice_of("web", endpoint("10.0.0.1"), ports=[("", 8, "TCP")])).cluster
    assert not only(
        unnamed, slice_of("web", endpoint("10.0.0.1"), ports=[(None, 8, "TCP")])
    ).cluster
    assert only(unnamed).name == "default/web"


@pytest.mark.parametrize(
    ("first", "second", "ready"),
    [
        (READY, DRAINING, True),
        (READY, GONE, True),
        (STARTING, DRAINING, False),  # kube-proxy: whatever does not terminate
        (READY, STARTING, True),
        ({"ready": True, "terminating": True}, STARTING, False),
    ],
)
def test_an_endpoint_in_two_slices_is_one(
    first: dict[str, bool], second: dict[str, bool], ready: bool
) -> None:
    for a, b in ((first, second), (second, first)):
        table = table_of(
            service("web"),
            slice_of("web", here(conditions=a), name="a"),
            slice_of("web", here(conditions=b), name="b"),
        )
        (one,) = table
        assert ips(one.cluster) == ([HERE] if ready else [])
        assert table.endpoints == 1


@pytest.mark.parametrize("label", ["headless", "service-proxy-name"])
def test_slices_that_are_not_for_this_proxy_are_passed_over(label: str) -> None:
    foreign = meta(
        slice_of("web", endpoint("10.0.0.2"), name="b"), **{f"service.kubernetes.io__{label}": ""}
    )
    one = only(service("web"), slice_of("web", endpoint("10.0.0.1"), name="a"), foreign)
    assert ips(one.cluster) == ["10.0.0.1"]


def test_only_the_first_address_of_an_endpoint_counts() -> None:
    two = {"addresses": ["10.0.0.2", "10.0.0.1"], "conditions": {}}
    none: dict[str, Any] = {"addresses": [], "conditions": {}}
    assert ips(only(service("web"), slice_of("web", two, none)).cluster) == ["10.0.0.2"]


def test_an_ipv6_address_in_an_ipv4_slice_is_passed_over_and_the_rest_kept() -> None:
    mixed = slice_of("web", endpoint("fd00::1"), endpoint("10.0.0.1"), endpoint("nonsense"))
    both = service("web", ip=["10.96.0.1", "fd00:96::1"])
    assert ips(only(both, mixed).cluster) == ["10.0.0.1"]
    assert only(both, mixed, family=6).internal == "reject"


def test_slices_of_names_have_no_endpoints() -> None:
    assert not only(service("web"), slice_of("web", endpoint("example.com"), family="FQDN")).cluster


def test_5000_endpoints_of_one_service_are_all_there() -> None:
    slices = [
        slice_of("web", *[endpoint(f"10.0.{net}.{i}") for i in range(100)], name=f"web-{net}")
        for net in range(50)
    ]
    table = table_of(service("web"), *slices)
    (one,) = table
    assert len(one.reachable) == len(set(one.reachable)) == table.endpoints == 5000
    assert list(map(str, one.cluster)) == sorted(map(str, one.cluster))


# --- which Services, and what of them ----------------------------------------------------------


@pytest.mark.parametrize(
    ("skipped", "why"),
    [
        (service("web", ip="None"), "headless"),
        (service("web", ip=""), "no ClusterIP yet"),
        (service("web", type="ExternalName"), "an alias"),
        (meta(service("web"), **{"service.kubernetes.io__service-proxy-name": ""}), "not ours"),
        (service("web", ip="fd00::1"), "IPv6 only"),
        (service("web", ip="10.96.0"), "no address"),
        (spec(service("web"), ports=None), "no ports"),
        (service("web", ports=[("http", 0, "TCP")]), "port 0"),
        (service("web", ports=[("http", 70000, "TCP")]), "port too large"),
        (service("web", ports=[("http", 80, "DCCP")]), "unknown protocol"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_services_that_are_not_forwarded(skipped: Service, why: str) -> None:
    table = table_of(skipped, slice_of("web", endpoint("10.0.0.1")))
    assert (dict(table.services), table.endpoints) == ({}, 0), why


def test_each_family_has_its_own_addresses_only() -> None:
    dual = exposed(
        ip=["10.96.0.1", "FD00:96:0::1"],
        vips=["192.0.2.1", "2001:db8::1", ""],
        externalIPs=["198.51.100.1", "2001:DB8:0::2", "nonsense", "198.51.100.001"],
        loadBalancerSourceRanges=["203.0.113.0/24", " 2001:db8:f::/48 ", "nonsense"],
    )
    slices = (
        slice_of("web", endpoint("10.0.0.1"), name="a"),
        slice_of("web", endpoint("FD00:0::1"), name="b", family="IPv6"),
    )
    four, six = only(dual, *slices), only(dual, *slices, family=6)
    assert [(f.kind, f.address) for f in four.frontends] == [
        ("cluster IP", "10.96.0.1"),
        ("external IP", "198.51.100.1"),
        ("loadbalancer IP", "192.0.2.1"),
    ]
    assert (four.source_ranges, ips(four.cluster)) == (("203.0.113.0/24",), ["10.0.0.1"])
    assert [(f.kind, f.address) for f in six.frontends] == [
        ("cluster IP", "fd00:96::1"),
        ("external IP", "2001:db8::2"),
        ("loadbalancer IP", "2001:db8::1"),
    ]
    assert (six.source_ranges, list(map(str, six.cluster))) == (
        ("2001:db8:f::/48",),
        ["[fd00::1]:80"],
    )


def test_frontends_of_a_service_with_all_kinds() -> None:
    one = only(exposed(node_port=30080, vips=["192.0.2.1"], externalIPs=["198.51.100.1"]))
    assert list(one.frontends) == [
        Frontend("cluster IP", "10.96.0.50", 80),
        Frontend("external IP", "198.51.100.1", 80),
        Frontend("loadbalancer IP", "192.0.2.1", 80),
        Frontend("node port", "", 30080),
    ]


def test_without_clusterips_the_one_clusterip_counts() -> None:
    old = spec(service("web", ip="10.96.0.1"), cluster_ips=None)
    assert only(old).cluster_ip == "10.96.0.1"
    assert not table_of(old, family=6).services


def test_a_load_balancer_that_wants_to_see_packets_first_does() -> None:
    proxied = exposed(node_port=30080, vips=["192.0.2.1"], ip_mode="Proxy")
    assert only(proxied).load_balancer_ips == ()
    named = msgspec.structs.replace(
        proxied, status=ServiceStatus(LoadBalancerStatus([Ingress(hostname="lb.example.com")]))
    )
    assert only(named).load_balancer_ips == ()


def test_addresses_are_printed_one_way() -> None:
    one = only(
        service("web", ip="010.096.0.01"),
        slice_of("web", endpoint("10.0.0.001"), endpoint("::ffff:10.0.0.2"), endpoint("1.2.3")),
    )
    assert (one.cluster_ip, ips(one.cluster)) == ("10.96.0.1", ["10.0.0.1", "10.0.0.2"])


@pytest.mark.parametrize(
    ("fields", "want"),
    [
        ({}, 0),
        ({"session_affinity": "ClientIP"}, 10800),
        ({"session_affinity": "ClientIP", "session_affinity_config": 600}, 600),
        ({"session_affinity": "ClientIP", "session_affinity_config": None}, 10800),
        ({"session_affinity": "ClientIP", "session_affinity_config": 0}, 10800),
        ({"session_affinity": "ClientIP", "session_affinity_config": 99999999}, 10800),
        ({"session_affinity": "None", "session_affinity_config": 600}, 0),
        ({"session_affinity": "Cookie"}, 0),
    ],
)
def test_session_affinity_lasts_as_long_as_said(fields: dict[str, Any], want: int) -> None:
    if "session_affinity_config" in fields:
        seconds = fields["session_affinity_config"]
        fields = fields | {
            "session_affinity_config": SessionAffinityConfig(ClientIPConfig(seconds))
        }
    assert only(spec(service("web"), **fields)).affinity == want


@pytest.mark.parametrize(
    ("ranges", "want", "holds_node"),
    [
        ([], (), False),
        (["203.0.113.0/24"], ("203.0.113.0/24",), False),
        ([" 203.0.113.7/24\t"], ("203.0.113.0/24",), False),  # host bits are no part of it
        (["203.0.113.0/24", "203.0.113.9/24"], ("203.0.113.0/24",), False),
        (["203.0.113.0/24", "0.0.0.0/0"], (), False),  # everybody is meant
        (["203.0.113.0/24", "::/0"], ("203.0.113.0/24",), False),  # everybody of IPv6
        (["203.0.113.0/24", "192.168.0.0/16"], ("203.0.113.0/24", "192.168.0.0/16"), True),
        (["203.0.113.0", "1.2.3.0/33", "x", "1.2.3.0/", "10.0.0.0/255.0.0.0"], (), False),
        (["010.0.0.0/8"], ("10.0.0.0/8",), False),
    ],
)
def test_source_ranges(ranges: list[str], want: tuple[str, ...], holds_node: bool) -> None:
    one = only(exposed(vips=["192.0.2.1"], loadBalancerSourceRanges=ranges))
    assert (one.source_ranges, one.node_in_ranges) == (want, holds_node)


def test_a_node_whose_address_is_not_known_lies_in_no_range() -> None:
    lb = exposed(vips=["192.0.2.1"], loadBalancerSourceRanges=["128.0.0.0/1"])
    assert only(lb).node_in_ranges
    assert not only(lb, node=NodeView("node1")).node_in_ranges


@pytest.mark.parametrize("policy", ["Cluster", "", "local", "LOCAL", "Nearest"])
def test_any_policy_but_local_is_cluster(policy: str) -> None:
    one = only(exposed(node_port=30080, externalTrafficPolicy=policy, internalTrafficPolicy=policy))
    assert not one.external_local and not one.internal_local


def test_the_external_policy_means_nothing_where_nothing_leads_in() -> None:
    one = only(service("web", externalTrafficPolicy="Local"), slice_of("web", here(), there()))
    assert (one.external_local, one.local, ips(one.cluster)) == (False, (), [HERE, THERE])


@pytest.mark.parametrize(
    ("kind", "policy", "want"),
    [
        ("LoadBalancer", "Local", 32100),
        ("LoadBalancer", "Cluster", 0),
        ("NodePort", "Local", 0),
        ("ClusterIP", "Local", 0),
    ],
)
def test_only_load_balancers_of_policy_local_are_health_checked(
    kind: str, policy: str, want: int
) -> None:
    one = only(exposed(type=kind, externalTrafficPolicy=policy, healthCheckNodePort=32100))
    assert one.health_check_node_port == want


def test_health_is_told_before_the_load_balancer_has_an_address() -> None:
    waiting = exposed(type="LoadBalancer", externalTrafficPolicy="Local", healthCheckNodePort=32100)
    one = only(waiting, slice_of("web", here(), there()))
    assert not one.externally_accessible and ips(one.local) == [HERE]
    assert ips(one.reachable) == [HERE, THERE]


def test_sctp_is_forwarded_as_tcp_is() -> None:
    one = only(
        service("assoc", ports=[("m3ua", 2905, "SCTP")]),
        slice_of("assoc", endpoint("10.0.0.1"), ports=[("m3ua", 2905, "SCTP")]),
    )
    assert (one.protocol, one.name, one.internal) == ("sctp", "default/assoc:m3ua", "forward")


def test_one_port_number_of_two_protocols_is_two_forwardings() -> None:
    ports = [("dns", 53, "UDP"), ("dns", 53, "TCP")]
    table = table_of(
        service("dns", ports=ports), slice_of("dns", endpoint("10.0.0.1"), ports=ports)
    )
    assert [(one.name, one.protocol) for one in table] == [
        ("default/dns:dns", "tcp"),
        ("default/dns:dns", "udp"),
    ]
    assert table.endpoints == 2


def test_the_table_is_in_order_of_names_not_of_services() -> None:
    table = table_of(
        service("web"),
        service("web-b"),
        service("web", ns="a"),
        service("w", ports=[("", 1, "TCP")]),
    )
    names = [one.name for one in table]
    assert names == ["a/web:http", "default/w", "default/web-b:http", "default/web:http"]


def test_all_endpoints_count_for_the_size_of_a_cluster_also_those_not_ready() -> None:
    table = table_of(
        service("web"),
        slice_of("web", here(conditions=READY), there(conditions=STARTING)),
        slice_of("orphan", here()),
    )
    assert table.endpoints == 2


# --- claimed twice -----------------------------------------------------------------------------


def test_two_ports_of_one_name_the_last_counts() -> None:
    table = table_of(service("web", ports=[("", 80, "TCP"), ("", 81, "TCP")]))
    assert [(one.name, one.port) for one in table] == [("default/web", 81)]


def test_two_services_on_one_node_port_are_both_kept_and_told() -> None:
    table = table_of(
        exposed("y", ns="b", ip="10.96.0.2", node_port=30080),
        exposed("x", ns="a", ip="10.96.0.1", node_port=30080),
        exposed("z", ip="10.96.0.3", node_port=30080, ports=[("http", 80, "UDP")]),
    )
    assert len(list(table)) == 3
    assert list(conflicts(table)) == [
        "NodePort 30080/tcp is claimed by a/x:http and b/y:http; a/x:http gets it"
    ]


def test_of_two_claimants_the_first_with_endpoints_gets_the_packets() -> None:
    claimed = [
        exposed("x", ip="10.96.0.1", externalIPs=["2001:db8::1", "192.0.2.1"]),
        exposed("y", ip="10.96.0.2", externalIPs=["192.0.2.1"]),
    ]
    text = (
        "192.0.2.1:80/tcp is claimed by default/x:http and default/y:http; default/{}:http gets it"
    )
    serving = slice_of("y", endpoint("10.0.0.1"))
    assert list(conflicts(table_of(*claimed))) == [text.format("x")]
    assert list(conflicts(table_of(*claimed, serving))) == [text.format("y")]


def test_overlapping_ports_of_one_service_are_told() -> None:
    table = table_of(
        service("web", ip="fd00::1", ports=[("a", 80, "TCP"), ("b", 80, "TCP")]), family=6
    )
    assert list(conflicts(table)) == [
        "[fd00::1]:80/tcp is claimed by default/web:a and default/web:b; default/web:a gets it"
    ]


def test_one_address_named_twice_by_one_port_is_no_conflict() -> None:
    twice = exposed(vips=["192.0.2.1"], externalIPs=["192.0.2.1"])
    assert not list(conflicts(table_of(twice)))


# --- the recorded cluster ----------------------------------------------------------------------


def test_the_recorded_cluster_has_the_verdicts_that_kube_proxy_wrote() -> None:
    odd = {one.name: (one.internal, one.external) for one in cluster_table()}
    usual = ("forward", "forward")
    # shared/golden/rules: the REJECT and DROP rules of the filter table, and no others.
    assert {name: verdicts for name, verdicts in odd.items() if verdicts != usual} == {
        "default/noeps:http": ("reject", "reject"),
        "default/notready:http": ("reject", "reject"),
        "prod/itp-local-remote:http": ("drop", "forward"),
        "prod/lb-local-remote:http": ("forward", "drop"),
    }
    assert {one.name for one in cluster_table(6)} == {"default/dual:https", "default/v6only:http"}


# --- incremental -------------------------------------------------------------------------------


class Registry:
    """A Store with the compiler behind it, and the same compiled from nothing."""

    def __init__(self, family: Family = 4) -> None:
        self.store = Store(KINDS)
        self.snapshot = Snapshot()
        self.compiler = TableCompiler(family, NODE1)
        for kind in KINDS:
            self.store.mark_synced(kind)

    def put(self, *objects: Service | EndpointSlice, event: str = "MODIFIED") -> None:
        for one in objects:
            self.store.apply(SERVICE if isinstance(one, Service) else ENDPOINT_SLICE, event, one)

    def publish(self, node: NodeView | None = None) -> set[tuple[str, str]]:
        """Compile what changed; return the Services told to be otherwise."""
        self.snapshot, changes = self.store.publish(1) or (self.snapshot, Changes())
        snapshot = self.snapshot
        before, content = self.compiler.table, dict(self.compiler.table.services)
        told = self.compiler.update(snapshot, changes, node)
        after = self.compiler.table
        scratch = TableCompiler(after.family, self.compiler.node)
        scratch.update(snapshot, everything(snapshot))
        assert after == scratch.table
        assert before.services == content, "a published table was changed"
        assert len(told) == len(set(told))
        assert set(told) == {
            key
            for key in {*before.services, *after.services}
            if before.services.get(key) != after.services.get(key)
        }
        return set(told)


WEB = ("default", "web")


def test_a_change_that_forwarding_does_not_see_is_not_told() -> None:
    registry = Registry()
    registry.put(service("web"), slice_of("web", here()))
    assert registry.publish() == {WEB}
    services = registry.compiler.table.services
    registry.put(meta(service("web"), tier="front"))
    assert registry.publish() == set()
    registry.put(slice_of("web", here(), there(conditions=STARTING)))
    assert registry.publish() == set()
    assert registry.compiler.table.services is services
    assert registry.compiler.table.revision == 3
    assert registry.compiler.table.endpoints == 2


def test_a_service_that_goes_is_told_and_one_that_never_was_is_not() -> None:
    registry = Registry()
    registry.put(service("web"), slice_of("web", here()), slice_of("orphan", here()))
    assert registry.publish() == {WEB}
    registry.put(service("web"), event="DELETED")
    registry.put(slice_of("orphan", here()), event="DELETED")
    assert registry.publish() == {WEB}
    assert registry.compiler.table.services == {} and registry.compiler.table.endpoints == 0


def test_ports_in_another_order_are_the_same_ports() -> None:
    registry = Registry()
    registry.put(service("web", ports=[("a", 1, "TCP"), ("b", 2, "TCP")]))
    registry.publish()
    registry.put(service("web", ports=[("b", 2, "TCP"), ("a", 1, "TCP")]))
    assert registry.publish() == set()


@pytest.mark.parametrize(
    ("node", "told"),
    [
        (NODE1, set()),
        (NodeView("node1", "192.168.77.1", "z-b"), {"zonal"}),
        (NodeView("node1", "192.168.99.1", "z-a"), {"lb"}),
        (NodeView("node2", "192.168.77.1", "z-a"), {"local"}),
    ],
)
def test_a_node_that_changes_touches_what_depends_on_it(node: NodeView, told: set[str]) -> None:
    registry = Registry()
    registry.put(
        service("plain"),
        slice_of("plain", endpoint("10.0.0.1")),
        service("zonal"),
        slice_of("zonal", hinted("10.0.0.1", zones=["z-a"]), hinted("10.0.0.2", zones=["z-b"])),
        exposed("lb", vips=["192.0.2.1"], loadBalancerSourceRanges=["192.168.77.0/24"]),
        service("local", internalTrafficPolicy="Local"),
        slice_of("local", here()),
    )
    registry.publish()
    assert {name for _, name in registry.publish(node)} == told
    assert registry.compiler.node == node


@st.composite
def services(draw: st.DrawFn) -> Service:
    policies = st.sampled_from(["Cluster", "Local"])
    return exposed(
        draw(st.sampled_from(["a", "b", "c"])),
        ip=draw(st.sampled_from([["10.96.0.1", "fd00::1"], ["10.96.0.2"], ["None"], ["fd00::2"]])),
        node_port=draw(st.sampled_from([0, 30080])),
        vips=draw(st.sampled_from([(), ("192.0.2.1",), ("2001:db8::1",)])),
        ports=draw(
            st.sampled_from(
                [
                    [("http", 80, "TCP")],
                    [("http", 80, "TCP"), ("dns", 53, "UDP")],
                    [("dns", 53, "UDP"), ("http", 80, "TCP")],
                    [],
                ]
            )
        ),
        externalTrafficPolicy=draw(policies),
        internalTrafficPolicy=draw(policies),
        loadBalancerSourceRanges=draw(st.sampled_from([[], ["192.168.77.0/24"], ["0.0.0.0/0"]])),
        sessionAffinity=draw(st.sampled_from(["None", "ClientIP"])),
        labels=draw(st.sampled_from([{}, {"service.kubernetes.io/service-proxy-name": "other"}])),
    )


@st.composite
def slices(draw: st.DrawFn) -> EndpointSlice:
    family = draw(st.sampled_from(["IPv4", "IPv4", "IPv6"]))
    addresses = {"IPv4": ["10.0.0.1", "10.0.0.2", "10.0.0.3", "fd00::9"], "IPv6": ["fd00::1"]}
    entries = draw(
        st.lists(
            st.builds(
                lambda ip, zones, nodes, node, conditions: hinted(
                    ip, zones=zones, nodes=nodes, nodeName=node, conditions=conditions
                ),
                st.sampled_from(addresses[family]),
                st.sampled_from([[], ["z-a"], ["z-b"]]),
                st.sampled_from([[], [], ["node1"], ["node2"]]),
                st.sampled_from(["node1", "node2"]),
                st.sampled_from([READY, READY, DRAINING, STARTING]),
            ),
            max_size=4,
        )
    )
    return slice_of(
        draw(st.sampled_from(["a", "b", "c"])),  # a slice may move to another Service
        *entries,
        name=draw(st.sampled_from(["s1", "s2", "s3", "s4"])),
        family=family,
        ports=draw(st.sampled_from([[("http", 8080, "TCP")], [("dns", 53, "UDP")], []])),
    )


NODES = [
    NodeView("node1", address, zone)
    for address in ("192.168.77.1", "")
    for zone in ("z-a", "z-b", "")
]
STEPS = st.one_of(
    st.tuples(
        st.sampled_from(["MODIFIED", "MODIFIED", "DELETED"]), st.one_of(services(), slices())
    ),
    st.tuples(st.just("publish"), st.one_of(st.none(), st.sampled_from(NODES))),
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([4, 6]), st.lists(STEPS, max_size=25))
def test_incremental_equals_from_scratch(family: Family, steps: list[tuple[str, Any]]) -> None:
    registry = Registry(family)
    for event, value in steps:
        if event == "publish":
            registry.publish(value)
        else:
            registry.put(value, event=event)
    registry.publish()


@settings(max_examples=60, deadline=None)
@given(st.lists(services(), max_size=3), st.lists(slices(), max_size=4), st.sampled_from([4, 6]))
def test_the_order_of_objects_does_not_matter(
    some: list[Service], more: list[EndpointSlice], family: Family
) -> None:
    objects: list[Service | EndpointSlice] = [*some, *more]
    unique = list({(type(o), o.metadata.name): o for o in objects}.values())
    assert table_of(*unique, family=family) == table_of(*reversed(unique), family=family)


@settings(max_examples=100, deadline=None)
@given(services(), st.lists(slices(), max_size=3))
def test_reachable_is_what_decisions_can_choose(one: Service, some: list[EndpointSlice]) -> None:
    origins: tuple[Origin, ...] = ("pod", "node", "outside")
    for forwarding in table_of(one, *some):
        chosen: set[Endpoint] = set()
        for frontend in forwarding.frontends:
            for origin in origins:
                found = decide(forwarding, frontend.kind, origin)
                assert bool(found.endpoints) == (found.verdict == "forward")
                chosen |= set(found.endpoints)
        assert chosen == set(forwarding.reachable)
        assert list(map(str, forwarding.reachable)) == sorted(map(str, chosen))
