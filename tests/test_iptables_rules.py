"""The rules of the iptables mode: as kube-proxy has them, as the kernel prints them, and the
same whichever way the kernel came to them."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forwarding import CLUSTER_CIDRS, NODE1, cluster_table, exposed, table_of
from hypothesis import given
from hypothesis import strategies as st
from iptables_text import (
    BUILT_IN,
    PretendKernel,
    Refused,
    Rules,
    differences,
    normalised,
    parse_saved,
    target_of,
    without_counters,
    written,
)
from objects import endpoint, service, slice_of

from kdns.proxy import iptables
from kdns.proxy.iptables import SERVICE_CHAINS, IptablesRules, jumps, render_rules
from kdns.proxy.iptables_rules import chain_hash, probability
from kdns.proxy.options import Detector, Family, Options
from kdns.proxy.table import Forwarding, ForwardingTable
from kdns.registry.endpoints import Endpoint
from kdns.registry.objects import Key

RECORDED = Path(__file__).parent / "golden" / "rules"
TOOLS: Mapping[Family, str] = {4: "iptables", 6: "ip6tables"}
FAMILIES: tuple[Family, ...] = (4, 6)

# Where our rules differ from the recorded ones, and why (reference 1.4 and 1.5).
NFACCT = "nfacct counters are left out: they need kernel objects that only kube-proxy makes"
COUNTED = "-m nfacct --nfacct-name  localhost_nps_accepted_pkts"
INVALID = "-m conntrack --ctstate INVALID"
INTENDED: Mapping[Family, Mapping[tuple[str, str, str], str]] = {
    4: {
        ("filter", "KUBE-FORWARD", f"+ {INVALID} -j DROP"): NFACCT,
        (
            "filter",
            "KUBE-FORWARD",
            f"- {INVALID} -m nfacct --nfacct-name  ct_state_invalid_dropped_pkts -j DROP",
        ): NFACCT,
        **{
            (
                "nat",
                "KUBE-NODEPORTS",
                f'- -d 127.0.0.0/8 -p tcp -m comment --comment "prod/{name}:http"'
                f" -m tcp --dport {port} {COUNTED} -j KUBE-EXT-{ending}",
            ): NFACCT
            for name, port, ending in (
                ("api", 30080, "CHDJO776PRA6J5EO"),
                ("lb-local", 30089, "HFU2QWB77T5FEH5H"),
                ("lb-local-remote", 30090, "OLWUWGEB5FWYNRS2"),
                ("lb", 30088, "H4MYTEY4PKS3INNS"),
            )
        },
    },
    6: {
        ("filter", "KUBE-FORWARD", f"+ {INVALID} -j DROP"): NFACCT,
        (
            "filter",
            "KUBE-FORWARD",
            f"- {INVALID} -m nfacct --nfacct-name  ct_state_invalid_dropped_pkts -j DROP",
        ): NFACCT,
    },
}


def options(family: Family = 4, **more: Any) -> Options:
    """As the rules were recorded."""
    detector = Detector("cidr", CLUSTER_CIDRS[family])
    return Options(**{"family": family, "detector": detector, **more})


def recorded(family: Family) -> Rules:
    return parse_saved((RECORDED / f"{TOOLS[family]}.txt").read_text())


def rules_of(table: ForwardingTable, with_options: Options | None = None) -> IptablesRules:
    rules = IptablesRules(with_options or options(table.family))
    rules.update(table, None)
    return rules


def ours(table: ForwardingTable, with_options: Options | None = None) -> Rules:
    """The rules of our own chains, by table and chain."""
    return {
        name: {chain: list(lines) for chain, lines in chains.items()}
        for name, chains in rules_of(table, with_options).wanted().items()
    }


# --- A kernel, where there is one -----------------------------------------------------------


class Namespace:
    """A network namespace of its own, and one variant of iptables in it."""

    _numbers = itertools.count()

    def __init__(self, variant: str) -> None:
        self.variant = variant
        self.name = f"kdns-rules-{os.getpid()}-{next(self._numbers)}"
        subprocess.run(["ip", "netns", "add", self.name], check=True)

    def close(self) -> None:
        subprocess.run(["ip", "netns", "del", self.name], check=True)

    def run(
        self, family: Family, verb: str, *words: str, text: str = ""
    ) -> subprocess.CompletedProcess[str]:
        program = f"{TOOLS[family]}-{self.variant}{verb and '-'}{verb}"
        command = ["ip", "netns", "exec", self.name, program, *words]
        return subprocess.run(command, input=text, capture_output=True, text=True, check=False)

    def restore(self, text: str, family: Family = 4, noflush: bool = True) -> None:
        words = ["-w", "5", *(["--noflush"] if noflush else [])]
        done = self.run(family, "restore", *words, text=text)
        if done.returncode:
            raise Refused(done.stderr)

    def saved(self, family: Family = 4) -> Rules:
        done = self.run(family, "save")
        assert not done.returncode, done.stderr
        return parse_saved(done.stdout)


@pytest.fixture(params=["nft", "legacy"])
def namespace(request: pytest.FixtureRequest) -> Iterator[Callable[[], Namespace]]:
    """Makes namespaces for one variant of iptables."""
    variant = request.param
    missing = [
        program
        for tool in TOOLS.values()
        for program in (f"{tool}-{variant}-restore", f"{tool}-{variant}-save")
        if shutil.which(program) is None
    ]
    if missing or shutil.which("ip") is None:
        pytest.skip(f"needs {', '.join(missing) or 'ip'}")
    made: list[Namespace] = []

    def make() -> Namespace:
        made.append(Namespace(variant))
        return made[-1]

    try:
        try:
            first = make()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"cannot make a network namespace: {error}")
        tried = first.run(4, "", "-t", "nat", "-L")
        if tried.returncode:
            pytest.skip(f"iptables-{variant} does not work here: {tried.stderr.strip()}")
        yield make
    finally:
        for one in made:
            one.close()


# --- The same as kube-proxy -----------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rules_are_those_recorded_from_kube_proxy(family: Family) -> None:
    text = render_rules(cluster_table(family), options(family))
    found = differences(normalised(parse_saved(text)), normalised(recorded(family)))
    assert set(found) == set(INTENDED[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_without_its_counters_nothing_differs_from_kube_proxy(family: Family) -> None:
    text = render_rules(cluster_table(family), options(family))
    theirs = normalised(without_counters(recorded(family)))
    assert differences(normalised(parse_saved(text)), theirs) == []


@pytest.mark.root
@pytest.mark.parametrize("noflush", [True, False], ids=["noflush", "flush"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_kernel_given_the_rules_prints_what_was_recorded(
    namespace: Callable[[], Namespace], family: Family, noflush: bool
) -> None:
    text = render_rules(cluster_table(family), options(family))
    node = namespace()
    node.restore(text, family, noflush)
    saved = node.saved(family)
    assert set(differences(normalised(saved), normalised(recorded(family)))) == set(
        INTENDED[family]
    )


VECTORS = [
    ("ns1/svc1:p80" + "tcp", "XPGD46QRK7WJZT7O"),
    ("ns1/svc1:p80" + "tcp" + "10.180.0.1:80", "SXIVWICOYRO3J4NJ"),
    ("ns1/svc1:p80" + "tcp" + "[fd00:10::1]:80", "RT5VHSJR44ZNF7G5"),
    ("ns1/svc1" + "tcp", "AQI2S6QIMU7PVVRP"),
    ("default/kubernetes:https" + "tcp", "NPX46M4PTMTKRN6Y"),
    ("kube-system/kube-dns:dns" + "udp", "TCOU7JCQXEZGVUNU"),
    ("kube-system/kube-dns:dns-tcp" + "tcp", "ERIFXISQEP7F7OF4"),
]


@pytest.mark.parametrize(("text", "ending"), VECTORS)
def test_chain_names_are_those_of_other_clusters(text: str, ending: str) -> None:
    assert chain_hash(text) == ending


def test_chain_names_of_a_service_are_made_of_name_protocol_and_endpoint() -> None:
    table = table_of(
        exposed("svc1", ns="ns1", ports=[("p80", 80, "TCP")], externalIPs=["192.0.2.1"]),
        slice_of("svc1", endpoint("10.180.0.1"), ns="ns1", ports=[("p80", 80, "TCP")]),
    )
    names = {chain for chain in ours(table)["nat"] if chain.startswith(SERVICE_CHAINS)}
    assert names == {
        "KUBE-SVC-XPGD46QRK7WJZT7O",
        "KUBE-EXT-XPGD46QRK7WJZT7O",
        "KUBE-SEP-SXIVWICOYRO3J4NJ",
    }


def many(services: int, endpoints: int, load_balancer: bool) -> ForwardingTable:
    """`services` Services of `endpoints` endpoints each, as TestNumberIptablesRules has them."""
    more: dict[str, Any] = {}
    objects: list[Any] = []
    for i in range(services):
        if load_balancer:
            more = {
                "node_port": 30000 + i,
                "vips": [f"192.0.2.{i + 1}"],
                "externalIPs": [f"198.51.100.{i + 1}"],
                "loadBalancerSourceRanges": ["203.0.113.0/24"],
            }
        members = [endpoint(f"10.244.{i}.{e + 1}") for e in range(endpoints)]
        objects += [exposed(f"s{i}", ip=f"10.96.0.{i + 1}", **more), slice_of(f"s{i}", *members)]
    return table_of(*objects)


# Services, endpoints of each, load balancers -> rules of filter and nat (reference 1.13). Of
# kube-proxy's nat rules for load balancers one each is left out: it only counts (NFACCT).
COUNTS = [
    ((0, 0, False), (4, 5)),
    ((1, 0, False), (5, 5)),
    ((1, 1, False), (4, 10)),
    ((1, 2, False), (4, 13)),
    ((1, 10, False), (4, 37)),
    ((10, 0, False), (14, 5)),
    ((10, 10, False), (4, 325)),
    ((1, 0, True), (8, 5)),
    ((1, 1, True), (5, 18 - 1)),
    ((10, 0, True), (44, 5)),
    ((10, 10, True), (14, 405 - 10)),
]


@pytest.mark.parametrize(("cluster", "counts"), COUNTS)
def test_there_are_as_many_rules_as_kube_proxy_has(
    cluster: tuple[int, int, bool], counts: tuple[int, int]
) -> None:
    table = many(*cluster)
    assert rules_of(table).counts() == {"filter": counts[0], "nat": counts[1]}
    # and that is how many there are
    for name, chains in ours(table).items():
        assert sum(map(len, chains.values())) == rules_of(table).counts()[name]


# --- Single Services ------------------------------------------------------------------------


def of_service(rules: Rules, table: str, *chains: str) -> list[str]:
    """The rules of chains that begin so, each as "CHAIN rule", hashes left out."""
    found = []
    for chain, lines in sorted(rules[table].items()):
        if chain.startswith(chains):
            found += [f"{_bare(chain)}: {_bare(line)}" for line in lines]
    return found


def _bare(text: str) -> str:
    """Without the endings of chain names, and with short comments."""
    words = [
        word[:8].rstrip("-") if word.startswith(SERVICE_CHAINS) else word for word in text.split()
    ]
    return " ".join(words).replace("-m comment --comment ", "")


REMOTE = {"nodeName": "node2"}
LOCAL = {"nodeName": "node1"}
JUMP = '"kubernetes service nodeports; NOTE: this must be the last rule in this chain"'
TO_NODE_PORTS = f"KUBE-SERVICES: {JUMP} -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS"


def test_cluster_ip_with_one_endpoint() -> None:
    rules = ours(table_of(service("web"), slice_of("web", endpoint("10.244.1.5"))))
    to_vip = '-d 10.96.0.50/32 -p tcp "default/web:http cluster IP" -m tcp --dport 80'
    assert of_service(rules, "nat", "KUBE-S") == [
        'KUBE-SEP: -s 10.244.1.5/32 "default/web:http" -j KUBE-MARK-MASQ',
        'KUBE-SEP: -p tcp "default/web:http" -m tcp -j DNAT --to-destination 10.244.1.5:80',
        f"KUBE-SERVICES: {to_vip} -j KUBE-SVC",
        TO_NODE_PORTS,
        f"KUBE-SVC: ! -s 10.244.0.0/16 {to_vip} -j KUBE-MARK-MASQ",
        'KUBE-SVC: "default/web:http -> 10.244.1.5:80" -j KUBE-SEP',
    ]


def test_load_balancer_of_policy_local_with_a_remote_endpoint_only() -> None:
    rules = ours(
        table_of(
            exposed(
                node_port=30080,
                vips=["192.0.2.1"],
                externalIPs=["192.0.2.2"],
                externalTrafficPolicy="Local",
                healthCheckNodePort=32000,
            ),
            slice_of("web", endpoint("10.244.2.5", **REMOTE)),
        )
    )
    # Pods and the node are served from other nodes all the same, ...
    traffic = "traffic for default/web:http external destinations"
    own = "-m addrtype --src-type LOCAL -j"
    assert of_service(rules, "nat", "KUBE-EXT") == [
        f'KUBE-EXT: -s 10.244.0.0/16 "pod {traffic}" -j KUBE-SVC',
        f'KUBE-EXT: "masquerade LOCAL {traffic}" {own} KUBE-MARK-MASQ',
        f'KUBE-EXT: "route LOCAL {traffic}" {own} KUBE-SVC',
    ]
    assert of_service(rules, "nat", "KUBE-NODEPORTS") == [
        'KUBE-NODEPORTS: -p tcp "default/web:http" -m tcp --dport 30080 -j KUBE-EXT'
    ]
    # ... all others are met with silence.
    none = '"default/web:http has no local endpoints"'
    assert of_service(rules, "filter", "KUBE-EXTERNAL") == [
        f"KUBE-EXTERNAL-SERVICES: -d 192.0.2.2/32 -p tcp {none} -m tcp --dport 80 -j DROP",
        f"KUBE-EXTERNAL-SERVICES: -d 192.0.2.1/32 -p tcp {none} -m tcp --dport 80 -j DROP",
        f"KUBE-EXTERNAL-SERVICES: -p tcp {none} -m addrtype --dst-type LOCAL"
        " -m tcp --dport 30080 -j DROP",
    ]
    assert of_service(rules, "filter", "KUBE-NODEPORTS") == [
        'KUBE-NODEPORTS: -p tcp "default/web:http health check node port"'
        " -m tcp --dport 32000 -j ACCEPT"
    ]


def test_plain_node_port() -> None:
    rules = ours(
        table_of(exposed(node_port=30080), slice_of("web", endpoint("10.244.1.5", **LOCAL)))
    )
    assert of_service(rules, "nat", "KUBE-EXT", "KUBE-NODEPORTS") == [
        'KUBE-EXT: "masquerade traffic for default/web:http external destinations"'
        " -j KUBE-MARK-MASQ",
        "KUBE-EXT: -j KUBE-SVC",
        'KUBE-NODEPORTS: -p tcp "default/web:http" -m tcp --dport 30080 -j KUBE-EXT',
    ]
    assert of_service(rules, "filter", "KUBE-EXTERNAL", "KUBE-SERVICES") == []


def test_external_ip_with_two_endpoints() -> None:
    rules = ours(
        table_of(
            service("web", externalIPs=["192.0.2.2"]),
            slice_of("web", endpoint("10.244.1.5"), endpoint("10.244.2.5")),
        )
    )
    assert of_service(rules, "nat", "KUBE-SERVICES")[1] == (
        'KUBE-SERVICES: -d 192.0.2.2/32 -p tcp "default/web:http external IP"'
        " -m tcp --dport 80 -j KUBE-EXT"
    )
    assert of_service(rules, "nat", "KUBE-SVC")[1:] == [
        'KUBE-SVC: "default/web:http -> 10.244.1.5:80"'
        " -m statistic --mode random --probability 0.50000000000 -j KUBE-SEP",
        'KUBE-SVC: "default/web:http -> 10.244.2.5:80" -j KUBE-SEP',
    ]


def test_load_balancer_with_source_ranges_and_affinity() -> None:
    one = exposed(
        vips=["192.0.2.1"],
        # the second holds this node
        loadBalancerSourceRanges=["203.0.113.0/28", "192.168.77.0/24"],
        sessionAffinity="ClientIP",
    )
    rules = ours(table_of(one, slice_of("web", endpoint("10.244.1.5"))))
    accept = '"default/web:http loadbalancer IP" -j KUBE-EXT'
    assert of_service(rules, "nat", "KUBE-FW") == [
        f"KUBE-FW: -s 203.0.113.0/28 {accept}",
        f"KUBE-FW: -s 192.168.77.0/24 {accept}",
        f"KUBE-FW: -s 192.0.2.1/32 {accept}",
        'KUBE-FW: "other traffic to default/web:http will be dropped by KUBE-PROXY-FIREWALL"',
    ]
    assert of_service(rules, "nat", "KUBE-SERVICES")[1] == (
        'KUBE-SERVICES: -d 192.0.2.1/32 -p tcp "default/web:http loadbalancer IP"'
        " -m tcp --dport 80 -j KUBE-FW"
    )
    firewall = f"KUBE-FW-{chain_hash('default/web:httptcp')}"
    assert rules["filter"]["KUBE-PROXY-FIREWALL"] == [
        "-d 192.0.2.1/32 -p tcp -m comment --comment"
        f' "default/web:http traffic not accepted by {firewall}" -m tcp --dport 80 -j DROP'
    ]
    end = "--name KUBE-SEP --mask 255.255.255.255 --rsource"
    assert of_service(rules, "nat", "KUBE-SVC")[1:] == [
        'KUBE-SVC: "default/web:http -> 10.244.1.5:80"'
        f" -m recent --rcheck --seconds 10800 --reap {end} -j KUBE-SEP",
        'KUBE-SVC: "default/web:http -> 10.244.1.5:80" -j KUBE-SEP',
    ]
    assert of_service(rules, "nat", "KUBE-SEP")[1] == (
        f'KUBE-SEP: -p tcp "default/web:http" -m recent --set {end}'
        " -m tcp -j DNAT --to-destination 10.244.1.5:80"
    )


def test_internal_policy_local_with_a_node_port() -> None:
    rules = ours(
        table_of(
            exposed(node_port=30080, internalTrafficPolicy="Local"),
            slice_of("web", endpoint("10.244.1.5", **LOCAL), endpoint("10.244.2.5", **REMOTE)),
        )
    )
    to_vip = '-d 10.96.0.50/32 -p tcp "default/web:http cluster IP" -m tcp --dport 80'
    assert of_service(rules, "nat", "KUBE-EXT", "KUBE-SVC", "KUBE-SVL") == [
        'KUBE-EXT: "masquerade traffic for default/web:http external destinations"'
        " -j KUBE-MARK-MASQ",
        "KUBE-EXT: -j KUBE-SVC",
        'KUBE-SVC: "default/web:http -> 10.244.1.5:80"'
        " -m statistic --mode random --probability 0.50000000000 -j KUBE-SEP",
        'KUBE-SVC: "default/web:http -> 10.244.2.5:80" -j KUBE-SEP',
        f"KUBE-SVL: ! -s 10.244.0.0/16 {to_vip} -j KUBE-MARK-MASQ",
        'KUBE-SVL: "default/web:http -> 10.244.1.5:80" -j KUBE-SEP',
    ]


def test_cluster_ip_without_endpoints_is_refused_and_has_no_chains() -> None:
    rules = ours(table_of(service("web")))
    assert rules["filter"]["KUBE-SERVICES"] == [
        '-d 10.96.0.50/32 -p tcp -m comment --comment "default/web:http has no endpoints"'
        " -m tcp --dport 80 -j REJECT --reject-with icmp-port-unreachable"
    ]
    assert not [chain for chain in rules["nat"] if chain.startswith(SERVICE_CHAINS)]


# --- Options --------------------------------------------------------------------------------


def head(**more: Any) -> list[str]:
    """How the chain behind a ClusterIP begins."""
    table = table_of(service("web"), slice_of("web", endpoint("10.244.1.5")))
    return of_service(ours(table, options(**more)), "nat", "KUBE-SVC")[:-1]


CLUSTER_IP = '-p tcp "default/web:http cluster IP" -m tcp --dport 80 -j KUBE-MARK-MASQ'
HEADS: list[tuple[dict[str, Any], str]] = [
    ({}, f"! -s 10.244.0.0/16 -d 10.96.0.50/32 {CLUSTER_IP}"),
    ({"detector": None}, ""),
    ({"detector": None, "masquerade_all": True}, f"-d 10.96.0.50/32 {CLUSTER_IP}"),
    ({"masquerade_all": True}, f"-d 10.96.0.50/32 {CLUSTER_IP}"),
    ({"detector": Detector("interface", "cbr0")}, f"-d 10.96.0.50/32 ! -i cbr0 {CLUSTER_IP}"),
    ({"detector": Detector("prefix", "veth")}, f"-d 10.96.0.50/32 ! -i veth+ {CLUSTER_IP}"),
    ({"detector": Detector("cidr", "0.0.0.0/0")}, ""),  # all are Pods
    (
        {"detector": Detector("cidr", "10.244.7.9/16")},
        f"! -s 10.244.0.0/16 -d 10.96.0.50/32 {CLUSTER_IP}",
    ),
]


@pytest.mark.parametrize(("more", "rule"), HEADS)
def test_who_is_masqueraded_on_the_way_to_a_cluster_ip(more: dict[str, Any], rule: str) -> None:
    assert head(**more) == ([f"KUBE-SVC: {rule}"] if rule else [])


SHORT_CIRCUITS: list[tuple[Detector | None, list[str]]] = [
    (Detector("cidr", "10.244.0.0/16"), ["-s 10.244.0.0/16"]),
    (Detector("interface", "cbr0"), ["-i cbr0"]),
    (Detector("prefix", "veth"), ["-i veth+"]),
    (None, []),
]


@pytest.mark.parametrize(("detector", "match"), SHORT_CIRCUITS)
def test_pods_reach_all_endpoints_though_policy_is_local(
    detector: Detector | None, match: list[str]
) -> None:
    table = table_of(
        exposed(node_port=30080, externalTrafficPolicy="Local"),
        slice_of("web", endpoint("10.244.1.5", **LOCAL), endpoint("10.244.2.5", **REMOTE)),
    )
    rules = ours(table, options(detector=detector))
    pods = [line for line in of_service(rules, "nat", "KUBE-EXT") if '"pod traffic' in line]
    traffic = '"pod traffic for default/web:http external destinations"'
    assert pods == [f"KUBE-EXT: {one} {traffic} -j KUBE-SVC" for one in match]
    assert of_service(rules, "nat", "KUBE-EXT")[-1] == "KUBE-EXT: -j KUBE-SVL"


LOCALLY = "-m addrtype --dst-type LOCAL -j KUBE-NODEPORTS"
LAST: list[tuple[dict[str, Any], list[str]]] = [
    ({}, [f"{JUMP} {LOCALLY}"]),
    ({"localhost_node_ports": False}, [f"! -d 127.0.0.0/8 {JUMP} {LOCALLY}"]),
    ({"family": 6}, [f"! -d ::1/128 {JUMP} {LOCALLY}"]),
    (
        {"node_port_addresses": ("192.168.77.1", "127.0.0.1")},
        [
            f"-d 192.168.77.1/32 {JUMP} -j KUBE-NODEPORTS",
            f"-d 127.0.0.1/32 {JUMP} -j KUBE-NODEPORTS",
        ],
    ),
    (
        {"node_port_addresses": ("192.168.77.1", "127.0.0.1"), "localhost_node_ports": False},
        [f"-d 192.168.77.1/32 {JUMP} -j KUBE-NODEPORTS"],
    ),
    (
        {"family": 6, "node_port_addresses": ("fd00:77::1", "::1")},
        [f"-d fd00:77::1/128 {JUMP} -j KUBE-NODEPORTS"],
    ),
    ({"node_port_addresses": ()}, []),
]


@pytest.mark.parametrize(("more", "last"), LAST)
def test_addresses_that_node_ports_answer_on(more: dict[str, Any], last: list[str]) -> None:
    rules = ours(ForwardingTable(more.get("family", 4)), options(**more))
    assert of_service(rules, "nat", "KUBE-SERVICES") == [f"KUBE-SERVICES: {one}" for one in last]


def test_fixed_rules_follow_the_options() -> None:
    assert ours(ForwardingTable(), options(masquerade_bit=15, random_fully=False)) == {
        "filter": {
            "KUBE-EXTERNAL-SERVICES": [],
            "KUBE-FIREWALL": [
                "! -s 127.0.0.0/8 -d 127.0.0.0/8"
                ' -m comment --comment "block incoming localnet connections"'
                " -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP"
            ],
            "KUBE-FORWARD": [
                "-m conntrack --ctstate INVALID -j DROP",
                '-m comment --comment "kubernetes forwarding rules"'
                " -m mark --mark 0x8000/0x8000 -j ACCEPT",
                '-m comment --comment "kubernetes forwarding conntrack rule"'
                " -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
            ],
            "KUBE-NODEPORTS": [],
            "KUBE-PROXY-FIREWALL": [],
            "KUBE-SERVICES": [],
        },
        "nat": {
            "KUBE-MARK-MASQ": ["-j MARK --set-xmark 0x8000/0x8000"],
            "KUBE-NODEPORTS": [],
            "KUBE-POSTROUTING": [
                "-m mark ! --mark 0x8000/0x8000 -j RETURN",
                "-j MARK --set-xmark 0x8000/0x0",
                '-m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE',
            ],
            "KUBE-SERVICES": [
                f"-m comment --comment {JUMP} -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS"
            ],
        },
    }
    assert len(ours(ForwardingTable(), options(drop_invalid=False))["filter"]["KUBE-FORWARD"]) == 2


@pytest.mark.parametrize(
    "more", [{"family": 6}, {"localhost_node_ports": False}], ids=["IPv6", "localhost off"]
)
def test_kubelets_chain_is_left_alone_where_there_are_no_localhost_node_ports(
    more: dict[str, Any],
) -> None:
    rules = rules_of(ForwardingTable(more.get("family", 4)), options(**more))
    assert "KUBE-FIREWALL" not in rules.full()


def test_jumps_are_in_the_order_of_a_fresh_node() -> None:
    for family in FAMILIES:
        theirs = recorded(family)
        for table, chains in jumps(options(family)).items():
            for chain, rules in chains.items():
                assert list(rules) == theirs[table][chain]


def test_a_name_from_elsewhere_cannot_become_a_rule() -> None:
    # The API server lets no such name through; a file might.
    bad = 'default/x" -j ACCEPT\n-A INPUT -j ACCEPT\n:y'
    port = Forwarding(("default", "x"), bad, "tcp", "10.96.0.1", 80)
    text = render_rules(ForwardingTable(4, 1, {port.key: (port,)}), options())
    assert "-A INPUT -j ACCEPT" not in text
    (rule,) = parse_saved(text)["filter"]["KUBE-SERVICES"]
    assert '"default/x??-j?ACCEPT?-A?INPUT?-j?ACCEPT?:y has no endpoints"' in rule


def test_the_longest_legal_names_fit_into_comments() -> None:
    # 255 bytes are what the comment match takes; iptables refuses more.
    name = f"{'n' * 63}/{'s' * 63}:{'p' * 63}"
    ip = "fd00:1111:2222:3333:4444:5555:6666:7777"
    port = Forwarding(
        ("n" * 63, "s" * 63), name, "sctp", ip, 65535, 32767, (), (ip,), ("fd00::/8",),
        external_local=True, has_endpoints=True, local=(Endpoint(ip, 65535),),
        cluster=(Endpoint(ip, 65535), Endpoint(ip, 65534)),
    )  # fmt: skip
    rules = parse_saved(render_rules(ForwardingTable(6, 1, {port.key: (port,)}), options(6)))
    comments = [
        line.split('"')[1]
        for chains in rules.values()
        for lines in chains.values()
        for line in lines
        if '"' in line
    ]
    assert max(map(len, comments)) <= 255


# --- As the kernel prints them --------------------------------------------------------------


def rich_table(family: Family, endpoints: int = 2) -> ForwardingTable:
    """A Service of every shape."""
    v4 = family == 4
    pod = "10.244.{}.{}" if v4 else "fd00:10:244:{}::{}"
    vip = "192.0.2.{}" if v4 else "2001:db8::{}"
    ranges = ["203.0.113.9/24", "198.51.100.7/32"] if v4 else ["2001:db8:1::7/48", "fd00::1/128"]
    shapes: list[dict[str, Any]] = [
        {},
        {"sessionAffinity": "ClientIP"},
        {"internalTrafficPolicy": "Local"},
        {"node_port": 30080, "vips": [vip.format(1)], "externalIPs": [vip.format(2)]},
        {"node_port": 30081, "externalTrafficPolicy": "Local", "healthCheckNodePort": 32000,
         "vips": [vip.format(3)]},
        {"vips": [vip.format(4)], "loadBalancerSourceRanges": ranges},
        {"ports": [("http", 80, "UDP")]},
        {"ports": [("http", 80, "SCTP")]},
        {"ports": [("", 80, "TCP")]},
    ]  # fmt: skip
    objects: list[Any] = []
    for i, shape in enumerate(shapes):
        name, more = f"s{i}", {"family": "IPv4" if v4 else "IPv6"}
        ip = f"10.96.0.{i + 1}" if v4 else f"fd00:10:96::{i + 1}"
        members = [
            endpoint(pod.format(e % 2 + 1, e + 1), nodeName=f"node{e % 2 + 1}")
            for e in range(endpoints)
        ]
        ports = shape.get("ports", [("http", 80, "TCP")])
        objects += [exposed(name, ip=ip, **shape), slice_of(name, *members, ports=ports, **more)]
    objects += [
        exposed("empty", ip="10.96.1.1" if v4 else "fd00:10:96::1:1", node_port=30082),
        exposed(
            "elsewhere",
            ip="10.96.1.2" if v4 else "fd00:10:96::1:2",
            vips=[vip.format(5)],
            node_port=30083,
            externalTrafficPolicy="Local",
        ),
        slice_of(
            "elsewhere",
            endpoint(pod.format(2, 77), nodeName="node2"),
            family="IPv4" if v4 else "IPv6",
        ),
    ]
    node = NODE1 if v4 else replace(NODE1, address="2001:db8:1::1")
    return table_of(*objects, family=family, node=node)


# All options, each at a value that is not its default.
PRINTED: list[dict[str, Any]] = [
    {},
    {"masquerade_bit": 31, "masquerade_all": True, "detector": None},
    {"masquerade_bit": 0, "detector": Detector("interface", "cbr0"), "random_fully": False},
    {"detector": Detector("prefix", "veth"), "localhost_node_ports": False},
    {"drop_invalid": False, "detector": "everybody"},
    {"node_port_addresses": "some"},
    {"node_port_addresses": ()},
]
SOME: Mapping[Family, tuple[str, ...]] = {
    4: ("192.168.77.1", "127.0.0.1"),
    6: ("fd00:77::1", "::1"),
}


def printed(family: Family, more: dict[str, Any]) -> Options:
    given = {"family": family, **more}
    if given.get("node_port_addresses") == "some":
        given["node_port_addresses"] = SOME[family]
    if given.get("detector") == "everybody":
        given["detector"] = Detector("cidr", "0.0.0.0/0" if family == 4 else "::/0")
    return options(**given)


@pytest.mark.root
@pytest.mark.parametrize("family", FAMILIES)
def test_rules_are_written_as_iptables_save_prints_them(
    namespace: Callable[[], Namespace], family: Family
) -> None:
    node = namespace()
    for more in PRINTED:
        text = render_rules(rich_table(family), printed(family, more))
        node.restore(text, family, noflush=False)
        assert differences(written(parse_saved(text)), written(node.saved(family))) == [], more


@pytest.mark.root
def test_chances_and_rules_without_comments_are_as_iptables_save_prints_them(
    namespace: Callable[[], Namespace],
) -> None:
    table = rich_table(4, endpoints=200)  # all chances from 1/200 to 1/2
    assert table.endpoints > iptables.LARGE
    node = namespace()
    node.restore(render_rules(table, options()))
    saved = node.saved()
    assert differences(written(parse_saved(render_rules(table, options()))), written(saved)) == []


@pytest.mark.root
def test_chances_are_those_that_a_kernel_has_from_kube_proxy(
    namespace: Callable[[], Namespace],
) -> None:
    # kube-proxy writes ten decimals.
    rules = [f"-A T -m statistic --mode random --probability {1 / n:.10f}\n" for n in range(2, 301)]
    node = namespace()
    node.restore(f"*filter\n:T - [0:0]\n{''.join(rules)}COMMIT\n")
    assert node.saved()["filter"]["T"] == [
        f"-m statistic --mode random --probability {probability(n)}" for n in range(2, 301)
    ]


def test_comments_of_endpoints_vanish_with_more_than_1000_of_them() -> None:
    small, large = many(10, 100, False), many(11, 91, False)
    assert (small.endpoints, large.endpoints) == (1000, 1001)
    rules = rules_of(small)
    kernel = PretendKernel()
    kernel.restore(rules.full())
    rules.committed()
    assert '"default/s1:http -> 10.244.1.1:80"' in str(kernel.saved())
    # Only one Service is said to have changed, but all are written anew.
    rules.update(large, [("default", "s10")])
    kernel.restore(rules.partial())
    assert "->" not in str(kernel.saved())
    assert kernel.saved() == whole(large)


# --- Whichever way the kernel came to them --------------------------------------------------


def whole(table: ForwardingTable) -> Rules:
    kernel = PretendKernel()
    kernel.restore(rules_of(table).full())
    return kernel.saved()


IPS = [f"10.244.1.{i}" for i in range(1, 4)]


def forwarding(
    key: Key,
    protocol: Any,
    members: list[str],
    local: list[str],
    shape: dict[str, Any],
) -> Forwarding:
    """One Service port as table.py would have it."""
    here = tuple(Endpoint(ip, 80, local=True) for ip in sorted(local))
    every = tuple(sorted({*here, *(Endpoint(ip, 80, ip in local) for ip in members)}, key=str))
    number = key[1].encode()[-1] * 3 + len(protocol)
    one = Forwarding(
        key, f"{key[0]}/{key[1]}:p", protocol, f"10.96.0.{number % 250}", 80,
        cluster=every, has_endpoints=bool(every), **shape,
    )  # fmt: skip
    uses_local = one.internal_local or (one.external_local and one.externally_accessible)
    uses_cluster = not one.internal_local or one.externally_accessible
    return replace(one, local=here if uses_local else (), cluster=every if uses_cluster else ())


SHAPES = st.fixed_dictionaries(
    {},
    optional={
        "node_port": st.sampled_from([30080, 30081]),
        "external_ips": st.sampled_from([("192.0.2.1",), ("192.0.2.1", "192.0.2.2")]),
        "load_balancer_ips": st.sampled_from([("192.0.2.3",), ("192.0.2.1",)]),
        "source_ranges": st.just(("203.0.113.0/24",)),
        "node_in_ranges": st.booleans(),
        "affinity": st.just(600),
        "internal_local": st.booleans(),
        "external_local": st.booleans(),
        "health_check_node_port": st.just(32000),
    },
)
PORTS = st.tuples(
    st.lists(st.sampled_from(IPS), unique=True),
    st.lists(st.sampled_from(IPS[:2]), unique=True, max_size=2),
    SHAPES,
)
KEYS: list[Key] = [("a", f"s{i}") for i in range(4)] + [("b", "s0"), ("b", "t")]
# A Service: what each of its protocols has; an empty one is none.
SERVICES = st.dictionaries(st.sampled_from(["tcp", "udp"]), PORTS)
# What is in the table at one time, and what changes from one to the next.
CHANGES = st.dictionaries(st.sampled_from(KEYS), SERVICES, min_size=1)


def changed(table: ForwardingTable, change: dict[Key, Any], large: bool = False) -> ForwardingTable:
    services = dict(table.services)
    for key, ports in change.items():
        services.pop(key, None)
        made = tuple(forwarding(key, protocol, *port) for protocol, port in sorted(ports.items()))
        if made:
            services[key] = made
    return ForwardingTable(4, table.revision + 1, services, 2000 if large else 20)


@given(st.lists(st.tuples(CHANGES, st.booleans(), st.sampled_from([0, 1, 99])), max_size=6))
def test_changes_lead_to_the_rules_that_a_new_start_would_have(steps: list[Any]) -> None:
    table, rules, kernel = ForwardingTable(), IptablesRules(options()), PretendKernel()
    before = iptables.MAX_DELETED, iptables.MAX_INSERTED
    try:
        for change, applied, few in steps:
            # both ways to change a shared chain
            iptables.MAX_DELETED = iptables.MAX_INSERTED = few  # type: ignore[misc]
            table = changed(table, change)
            rules.update(table, list(change))
            if applied:  # else it failed, and is asked for with the next
                kernel.restore(rules.partial())
                rules.committed()
                assert rules.partial() == ""
                assert kernel.saved() == whole(table)
    finally:
        iptables.MAX_DELETED, iptables.MAX_INSERTED = before  # type: ignore[misc]
    assert rules.full() == _with_gone(rules_of(table).full(), rules.full())
    assert rules.counts() == rules_of(table).counts()
    assert rules.wanted() == rules_of(table).wanted()


def test_an_external_ip_that_is_no_longer_a_load_balancers_too() -> None:
    """Of two equal rules the kernel deletes the first, be it the one of the other address."""
    key, kernel = ("a", "s1"), PretendKernel()
    shape: dict[str, Any] = {"external_ips": ("192.0.2.1", "192.0.2.2")}
    both = {**shape, "load_balancer_ips": ("192.0.2.1",)}
    table = changed(ForwardingTable(), {key: {"tcp": ([], [], both)}})
    rules = rules_of(table)
    kernel.restore(rules.full())
    rules.committed()
    table = changed(table, {key: {"tcp": ([], [], shape)}})
    rules.update(table, [key])
    kernel.restore(rules.partial())
    assert kernel.saved() == whole(table)


def _with_gone(fresh: str, text: str) -> str:
    """`fresh`, and the lines that delete in `text`."""
    gone = [line.split()[1] for line in text.splitlines() if line.startswith("-X ")]
    lines = fresh.splitlines(keepends=True)
    last = max(i for i, line in enumerate(lines) if line.startswith(":")) + 1
    lines[last:last] = [f":{chain} - [0:0]\n" for chain in gone]
    lines[-1:-1] = [f"-X {chain}\n" for chain in gone]
    return "".join(lines)


def live(rules: Rules) -> set[str]:
    """The nat chains that a packet may come to."""
    found, waiting = set[str](), ["KUBE-SERVICES"]
    while waiting:
        chain = waiting.pop()
        if chain not in found and chain in rules["nat"]:
            found.add(chain)
            waiting += map(target_of, rules["nat"][chain])
    return found


@given(CHANGES, CHANGES, st.integers(1, 4))
def test_a_start_in_chunks_over_older_rules_never_empties_what_is_in_use(
    old: dict[Key, Any], new: dict[Key, Any], services: int
) -> None:
    kernel = PretendKernel()
    kernel.restore(rules_of(changed(ForwardingTable(), old)).full())
    stale = [chain for chain in kernel.saved()["nat"] if chain.startswith(SERVICE_CHAINS)]
    table = changed(ForwardingTable(), new, large=True)
    rules = rules_of(table)
    for text in rules.chunks(services, stale):
        kernel.restore(text)  # which refuses a jump to what is not there
        saved = kernel.saved()
        for chain in live(saved):
            assert saved["nat"][chain] or not chain.startswith(SERVICE_CHAINS), chain
    rules.committed()
    empty = PretendKernel()
    empty.restore(rules_of(table).full())
    assert kernel.saved() == empty.saved()


def test_chunks_name_the_services_once_and_jump_to_them_last() -> None:
    rules = rules_of(many(10, 2, True))
    texts = list(rules.chunks(3))
    assert len(texts) == 5
    assert ["*filter" in text for text in texts] == [True, False, False, False, True]
    assert [":KUBE-SERVICES " in text for text in texts] == [False] * 4 + [True]
    chains = [line for line in "".join(texts).splitlines() if line.startswith(":")]
    assert sorted(chains) == sorted(
        line for line in rules.full().splitlines() if line.startswith(":")
    )
    assert list(rules.chunks(10)) == [rules.full()]


def test_stale_chains_of_others_are_not_ours_to_delete() -> None:
    text = rules_of(ForwardingTable()).full(["KUBE-SVC-OLD", "CNI-MASQ", "KUBE-MARK-DROP"])
    assert [line for line in text.splitlines() if line.startswith("-X")] == ["-X KUBE-SVC-OLD"]


def test_one_changed_endpoint_writes_its_service_and_nothing_else() -> None:
    def table(ip: str) -> ForwardingTable:
        return table_of(
            service("web"),
            slice_of("web", endpoint(ip)),
            service("other", ip="10.96.0.51"),
            slice_of("other", endpoint("10.244.1.9")),
        )

    rules = rules_of(table("10.244.1.5"))
    rules.committed()
    rules.update(table("10.244.1.6"), [("default", "web")])
    text = rules.partial()
    old, new = (f"KUBE-SEP-{chain_hash(f'default/web:httptcp10.244.1.{n}:80')}" for n in (5, 6))
    chain = f"KUBE-SVC-{chain_hash('default/web:httptcp')}"
    assert [line for line in text.splitlines() if not line.startswith("-A")] == [
        "*nat",
        *(f":{one} - [0:0]" for one in (new, chain)),
        f":{old} - [0:0]",
        f"-X {old}",
        "COMMIT",
    ]
    # Changed back before the kernel heard of it: nothing to do.
    rules.update(table("10.244.1.5"), [("default", "web")])
    assert rules.partial() == ""


def test_a_rule_that_somebody_removed_is_noticed_and_put_back() -> None:
    table = changed(ForwardingTable(), {("a", "s1"): {"tcp": ([IPS[0]], [], {})}})
    rules, kernel = rules_of(table), PretendKernel()
    kernel.restore(rules.full())
    rules.committed()
    del kernel.rules["nat"]["KUBE-SERVICES"][0]
    rules.update(ForwardingTable(), [("a", "s1")])
    with pytest.raises(Refused, match="-D KUBE-SERVICES"):
        kernel.restore(rules.partial())
    kernel.restore(rules.full())
    assert kernel.saved() == whole(ForwardingTable())


@pytest.mark.root
def test_changes_in_a_kernel_lead_to_the_rules_that_a_new_start_would_have(
    namespace: Callable[[], Namespace],
) -> None:
    dice = random.Random(7)

    def some_service() -> dict[str, Any]:
        shape: dict[str, Any] = {
            "node_port": dice.choice([0, 30080, 30081]),
            "external_ips": dice.choice([(), ("192.0.2.1",), ("192.0.2.1", "192.0.2.2")]),
            "load_balancer_ips": dice.choice([(), ("192.0.2.3",)]),
            "source_ranges": dice.choice([(), ("203.0.113.0/24",)]),
            "affinity": dice.choice([0, 600]),
            "internal_local": dice.random() < 0.3,
            "external_local": dice.random() < 0.3,
        }
        members, local = dice.sample(IPS, dice.randint(0, 3)), dice.sample(IPS, dice.randint(0, 1))
        return dict.fromkeys(
            dice.sample(["tcp", "udp"], dice.randint(0, 2)), (members, local, shape)
        )

    node, table, rules = namespace(), ForwardingTable(), IptablesRules(options())
    for step in range(25):
        change = {key: some_service() for key in dice.sample(KEYS, dice.randint(1, 3))}
        table = changed(table, change)
        rules.update(table, list(change))
        if text := rules.partial():
            node.restore(text)
        rules.committed()
        if step % 5 == 4:
            fresh = namespace()
            fresh.restore(rules_of(table).full())
            assert differences(written(node.saved()), written(fresh.saved())) == []
            ours_now = written({**{t: {} for t in BUILT_IN}, **ours(table)})
            assert differences(ours_now, written(node.saved())) == []


@pytest.mark.root
def test_a_kernel_with_older_rules_takes_chunks_in_one_go(
    namespace: Callable[[], Namespace],
) -> None:
    node = namespace()
    node.restore(rules_of(many(12, 3, True)).full())
    stale = [chain for chain in node.saved()["nat"] if chain.startswith(SERVICE_CHAINS)]
    table = many(9, 2, True)
    # Several transactions in one input, as iptables-restore takes them.
    node.restore("".join(rules_of(table).chunks(4, stale)))
    assert differences(written(node.saved()), written(ours(table))) == []
