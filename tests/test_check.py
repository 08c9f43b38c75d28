"""`kdns check` on set-ups that are broken in one way each: it finds that, says why and what to
do, and says nothing of what is well.

Manifests here, and values where no manifest can say it; real DNS servers are in
test_check_dns.py, real rules in test_check_kernel.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from objects import endpoint, pod, service, slice_of, snapshot

from kdns.cli import run
from kdns.corefile import parse_corefile
from kdns.explain.check_command import Turn, turn
from kdns.explain.check_finding import KINDS, Finding, finding, in_order
from kdns.explain.check_gate import check_status
from kdns.explain.check_host import Host, Resolvers, check_host, check_resolvers
from kdns.explain.check_registry import Registry, check_registry
from kdns.explain.check_sight import read_resolvers, read_shown
from kdns.explain.evidence import Where, gather
from kdns.proxy.config import ProxyConfig
from kdns.proxy.options import NodeView
from kdns.proxy.table import TableCompiler
from kdns.registry.objects import Node, ServicePort
from kdns.registry.snapshot import everything

HEALTHY = """
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec:
  type: NodePort
  clusterIP: 10.96.0.50
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: 8080, nodePort: 30080}]
---
apiVersion: v1
kind: Service
metadata: {name: db, namespace: default}
spec:
  clusterIP: None
  selector: {app: db}
  ports: [{name: pg, port: 5432}]
---
apiVersion: v1
kind: Service
metadata: {name: outside, namespace: default}
spec: {type: ExternalName, externalName: www.example.org}
---
apiVersion: v1
kind: Pod
metadata: {name: web-1, namespace: default, labels: {app: web}}
spec:
  nodeName: node1
  containers: [{name: c, image: example, ports: [{name: http, containerPort: 8080}]}]
status: {podIP: 10.244.1.5, phase: Running}
---
apiVersion: v1
kind: Pod
metadata: {name: db-0, namespace: default, labels: {app: db}}
spec: {nodeName: node1, containers: [{name: c, image: example}]}
status: {podIP: 10.244.1.6, phase: Running}
---
apiVersion: v1
kind: Node
metadata: {name: node1}
spec: {podCIDRs: [10.244.1.0/24]}
status: {addresses: [{type: InternalIP, address: 192.168.77.1}]}
"""

OWN_SLICE = """
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: NAME, namespace: default, labels: {kubernetes.io/service-name: OWNER}}
addressType: IPv4
endpoints: [{addresses: [ADDRESS]}]
ports: [{name: http, port: 8080, protocol: TCP}]
"""


def own_slice(name: str, owner: str, address: str, **more: str) -> str:
    text = OWN_SLICE.replace("NAME", name).replace("OWNER", owner).replace("ADDRESS", address)
    for old, new in more.items():
        text = text.replace(old, new)
    return text


MANUAL = """
---
apiVersion: v1
kind: Service
metadata: {name: manual, namespace: default}
spec: {clusterIP: 10.96.0.60, ports: [{name: http, port: 80}]}
"""


def second_pod(name: str, address: str, **more: str) -> str:
    node = more.get("node", "node1")
    return f"""
---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {more.get("ns", "default")}, labels: {{app: {name}}}}}
spec: {{nodeName: {node}, containers: [{{name: c, image: example}}]}}
status: {{podIP: {address}, phase: Running}}
"""


def second_node(address: str, cidr: str) -> str:
    return f"""
---
apiVersion: v1
kind: Node
metadata: {{name: node2}}
spec: {{podCIDRs: [{cidr}]}}
status: {{addresses: [{{type: InternalIP, address: {address}}}]}}
"""


@dataclass(frozen=True)
class Case:
    """One set-up: the healthy one with some words changed, or more behind it.

    expect -- (finding id, subject, words of the text, words of the cause, words of the advice)
    """

    title: str
    expect: tuple[str, str, str, str, str]
    change: Mapping[str, str] = field(default_factory=dict)
    more: str = ""
    flags: tuple[str, ...] = ()
    besides: tuple[str, ...] = ()

    @property
    def manifests(self) -> str:
        text = HEALTHY
        for old, new in self.change.items():
            assert old in text, old
            text = text.replace(old, new)
        return text + self.more


CASES = [
    Case(
        "a label misspelt",
        ("selector-matches-nothing", "Service default/web", "selector app=web fits no Pod in"
         " default", "Pod web-1 has app=wbe, not app=web", "get pods --show-labels"),
        {"name: web-1, namespace: default, labels: {app: web}":
         "name: web-1, namespace: default, labels: {app: wbe}"},
    ),
    Case(
        "the Pods are in another namespace",
        ("selector-matches-nothing", "Service default/web", "fits no Pod in default",
         "such Pods are in shop: a selector sees its own namespace only",
         "correct the selector or the labels"),
        {"name: web-1, namespace: default": "name: web-1, namespace: shop"},
    ),
    Case(
        "one label too many",
        ("selector-matches-nothing", "Service default/web", "selector app=web,tier=front",
         "Pod web-1 fits but for tier=front", "get pods --show-labels"),
        {"selector: {app: web}": "selector: {app: web, tier: front}"},
    ),
    Case(
        "scaled to 0",
        ("selector-matches-nothing", "Service default/web", "selector app=shop",
         "none was made yet, or it is scaled to 0", "get pods --show-labels"),
        {"selector: {app: web}": "selector: {app: shop}"},
    ),
    Case(
        "no Pod is ready",
        ("service-none-ready", "Service default/web", "0 of 1 endpoint ready: 10.244.1.5 (Pod"
         " web-1)", "readiness probes fail", "describe pod"),
        {"status: {podIP: 10.244.1.5, phase: Running}":
         "status: {podIP: 10.244.1.5, phase: Running, conditions: [{type: Ready, status:"
         " 'False'}]}"},
    ),
    Case(
        "neither selector nor EndpointSlices",
        ("service-without-selector", "Service default/manual", "no selector and no endpoints",
         "no controller makes EndpointSlices", "labelled kubernetes.io/service-name=manual"),
        more=MANUAL,
    ),
    Case(
        "a targetPort that no container names",
        ("port-without-endpoints", "Service default/web, port http", "connections are refused",
         "no container of its Pods has a port named 'htpp'", "name a port of the container 'htpp'"),
        {"targetPort: 8080": "targetPort: htpp"},
    ),
    Case(
        "a slice's port has another name",
        ("port-without-endpoints", "Service default/manual, port http", "connections are refused",
         "other port names: web", "names of the Service's"),
        more=MANUAL + own_slice("m1", "manual", "10.9.9.9", **{"name: http": "name: web"}),
        besides=("slice-port-unknown",),
    ),
    Case(
        "a slice with one port more than its Service",
        ("slice-port-unknown", "EndpointSlice default/m1, port admin", "Service default/manual has"
         " no port admin/TCP", "joined with the Service's by name and protocol: http/TCP",
         "rename one of the two"),
        more=MANUAL + own_slice("m1", "manual", "10.9.9.9", **{"ports: [": "ports: [{name: admin,"
                                " port: 9000, protocol: TCP}, "}),
    ),
    Case(
        "EndpointSlices without a Service",
        ("slice-without-service", "Service default/manal", "1 EndpointSlice of it: m1",
         "label kubernetes.io/service-name is misspelt", "delete endpointslice m1"),
        more=own_slice("m1", "manal", "10.9.9.9"),
    ),
    Case(
        "an endpoint whose Pod is gone",
        ("endpoint-pod-gone", "EndpointSlice default/m1", "endpoint 10.244.1.9 (ready) is Pod"
         " default/web-7, which is not there", "connections to it time out",
         "kube-controller-manager"),
        more=MANUAL + own_slice("m1", "manual", "10.244.1.9", **{"]}]": "], targetRef: {kind: Pod,"
                                " name: web-7, namespace: default}}]"}),
    ),
    Case(
        "an endpoint with an address its Pod had before",
        ("endpoint-pod-differs", "EndpointSlice default/m1", "is Pod default/web-1, whose address"
         " is 10.244.1.5", "the Pod was made anew", "kube-controller-manager"),
        more=MANUAL + own_slice("m1", "manual", "10.244.1.9", **{"]}]": "], targetRef: {kind: Pod,"
                                " name: web-1, namespace: default}}]"}),
    ),
    Case(
        "an IPv6 address for Pods that have none",
        ("family-without-endpoints", "Service default/web", "no IPv6 endpoint",
         "clients that prefer it are refused", "take IPv6 out of spec.ipFamilies"),
        {"clusterIP: 10.96.0.50": "clusterIP: 10.96.0.50\n  clusterIPs: [10.96.0.50,"
         " 'fd00:10:96::50']\n  ipFamilies: [IPv4, IPv6]"},
    ),
    Case(
        "two Pods with one address",
        ("pod-address-shared", "address 10.244.1.5", "2 Pods: default/twin, default/web-1",
         "two nodes give addresses out of one range", "delete the younger Pod"),
        more=second_pod("twin", "10.244.1.5"),
    ),
    Case(
        "two Services with one ClusterIP",
        ("cluster-ip-claimed-twice", "ClusterIP 10.96.0.50", "default/manual, default/web",
         "allocator was restored", "without spec.clusterIP"),
        more=MANUAL.replace("10.96.0.60", "10.96.0.50") + own_slice("m1", "manual", "10.9.9.9"),
    ),
    Case(
        "two Services with one NodePort",
        ("node-port-claimed-twice", "NodePort 30080/tcp", "default/manual:http and default/web:http"
         "; default/manual:http gets it", "one nodePort to both", "take nodePort out"),
        more=MANUAL.replace("port: 80}", "port: 80, nodePort: 30080}").replace(
            "spec: {", "spec: {type: NodePort, ") + own_slice("m1", "manual", "10.9.9.9"),
    ),
    Case(
        "two Services with one external IP",
        ("external-ip-claimed-twice", "198.51.100.7:80/tcp", "default/manual:http and"
         " default/web:http", "one external or load balancer address", "another address"),
        {"type: NodePort": "type: NodePort\n  externalIPs: [198.51.100.7]"},
        MANUAL.replace("spec: {", "spec: {externalIPs: [198.51.100.7], ")
        + own_slice("m1", "manual", "10.9.9.9"),
    ),
    Case(
        "an external IP that is another Service's ClusterIP",
        ("external-ip-shadows", "Service default/manual", "10.96.0.50 is the ClusterIP of"
         " default/web", "CVE-2020-8554", "admission policy"),
        more=MANUAL.replace("spec: {", "spec: {externalIPs: [10.96.0.50], ").replace(
            "port: 80", "port: 81") + own_slice("m1", "manual", "10.9.9.9"),
    ),
    Case(
        "an externalName that is an address",
        ("external-name-wrong", "Service default/outside", "externalName 192.0.2.1 is an address",
         "only make a CNAME of it", "without selector, with an EndpointSlice that has 192.0.2.1"),
        {"www.example.org": "192.0.2.1"},
    ),
    Case(
        "Services inside the Pods' range",
        ("service-in-pod-cidr", "Pod range 10.96.0.0/16 (--cluster-cidr)", "10.96.0.50",
         "masquerading and routes go wrong", "not overlap"),
        flags=("--cluster-cidr", "10.96.0.0/16"),
    ),
    Case(
        "the Services' range overlaps a Node's Pods",
        ("service-in-pod-cidr", "Pod range 10.244.1.0/24 (podCIDR of Node node1)",
         "overlaps the Services' 10.244.0.0/15", "go wrong", "not overlap"),
        flags=("--service-cidr", "10.244.0.0/15"),
        besides=("pod-in-service-cidr",),
    ),
    Case(
        "a Pod with a Service's address",
        ("pod-in-service-cidr", "Pod default/stray", "10.96.0.50 is ClusterIP of default/web",
         "taken for packets to a Service", "CNI's range"),
        more=second_pod("stray", "10.96.0.50"),
    ),
    Case(
        "a Node in the Pods' range",
        ("node-in-cidr", "Node node2", "10.244.9.1 is in 10.244.0.0/16 (--cluster-cidr)",
         "not masqueraded", "no host network uses"),
        more=second_node("10.244.9.1", "10.244.2.0/24"), flags=("--node", "node1"),
    ),
    Case(
        "two Nodes with one Pod range",
        ("pod-cidrs-overlap", "Nodes node2 and node1", "10.244.1.0/24", "two Pods will have the"
         " same", "another podCIDR"),
        more=second_node("192.168.77.2", "10.244.0.0/23"), flags=("--node", "node1"),
    ),
    Case(
        "internalTrafficPolicy Local without an endpoint here",
        ("no-local-endpoints", "Service default/web:http", "no endpoint is on node2: packets are"
         " dropped", "do not run on every node", "DaemonSet"),
        {"type: NodePort": "type: NodePort\n  internalTrafficPolicy: Local"},
        second_node("192.168.77.2", "10.244.2.0/24"), ("--node", "node2"),
    ),
]  # fmt: skip

NOTES = [
    Case(
        "a load balancer that nobody has made",
        ("load-balancer-pending", "Service default/web", "no load balancer's address",
         "status.loadBalancer", "controller"),
        {"type: NodePort": "type: LoadBalancer"},
    ),
    Case(
        "a Service of another proxy",
        ("left-to-another-proxy", "Service default/web", "left to the proxy 'mesh'",
         "service.kubernetes.io/service-proxy-name", "nothing, if that proxy runs here"),
        {"metadata: {name: web, namespace: default}": "metadata: {name: web, namespace: default,"
         " labels: {service.kubernetes.io/service-proxy-name: mesh}}"},
    ),
]  # fmt: skip


def check_manifests(
    path: Path, text: str, capsys: pytest.CaptureFixture[str], *flags: str
) -> tuple[int, Any]:
    """Return the exit code and what -o json prints."""
    file = path / "set-up.yaml"
    file.write_text(text)
    code = run(["check", "-f", str(file), "-o", "json", *flags])
    out = capsys.readouterr()
    assert not out.err, out.err
    return code, json.loads(out.out)


def assert_found(case: Case, found: list[dict[str, str]]) -> None:
    id, subject, *words = case.expect
    of_id = [one for one in found if one["id"] == id]
    one = next((one for one in of_id if one["subject"] == subject), None)
    assert one is not None, found
    for name, part in zip(("text", "cause", "advice"), words, strict=True):
        assert part in one[name], one
    assert {one["id"] for one in found} == {id, *case.besides}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_a_broken_set_up_is_found(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, told = check_manifests(tmp_path, case.manifests, capsys, *case.flags)
    assert_found(case, told["findings"])
    assert code == 1


@pytest.mark.parametrize("case", NOTES, ids=lambda case: case.title)
def test_a_note_is_no_finding(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, told = check_manifests(tmp_path, case.manifests, capsys, *case.flags)
    assert_found(case, told["findings"])
    assert (code, told["count"]) == (0, {"error": 0, "warning": 0, "note": 1})


def test_a_healthy_set_up_has_no_finding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, told = check_manifests(tmp_path, HEALTHY, capsys, "--service-cidr", "10.96.0.0/12")
    assert (code, told["findings"], told["notes"]) == (0, [], [])
    assert told["checked"]["registry"] == "3 Services, 2 EndpointSlices, 2 Pods, 1 Node"


def test_pods_of_the_nodes_network_share_its_address(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = HEALTHY + second_pod("cni", "192.168.77.1") + second_pod("proxy", "192.168.77.1")
    assert check_manifests(tmp_path, text, capsys)[1]["findings"] == []


def test_nothing_is_said_of_one_node_where_there_are_several(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = HEALTHY.replace("type: NodePort", "type: NodePort\n  internalTrafficPolicy: Local")
    text = text.replace("name: node1}", "name: zone}") + second_node(
        "192.168.77.2", "10.244.2.0/24"
    )
    code, told = check_manifests(tmp_path, text, capsys)
    assert (code, told["findings"], told["notes"]) == (0, [], [])
    assert check_manifests(tmp_path, text, capsys, "--node", "node2")[0] == 1


def test_text_says_what_why_and_what_to_do_and_is_plain_where_no_terminal_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "set-up.yaml"
    file.write_text(CASES[0].manifests)
    assert run(["check", "-f", str(file)]) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.splitlines()[2:] == [
        "",
        "Registry",
        "  warning selector-matches-nothing  Service default/web",
        "      selector app=web fits no Pod in default",
        "      why: Pod web-1 has app=wbe, not app=web",
        "      do:  compare with `kubectl -n default get pods --show-labels`; correct the selector"
        " or the labels",
        "",
        "1 warning",
    ]


WRONG_USAGE = [
    (["--server", "10.0.0.1:dns"], "'10.0.0.1:dns' is not ADDRESS"),
    (["--server", "10.0.0.1", "--no-dns"], "exclude each other"),
    (["--watch", "soon"], "'soon' is not a duration; write it as 500ms, 30s or 1m30s"),
    (["--watch", "0"], "'0' is out of range; it must be 100ms to 86400s"),
    (["--mode", "ebpf"], "ebpf"),
    (["--node", "node9"], "there is no Node 'node9'; there is node1"),
    (["--control", "/nowhere"], "two origins"),
    (["--corefile", "/nowhere"], "cannot be read"),
]


@pytest.mark.parametrize(("flags", "said"), WRONG_USAGE, ids=lambda one: str(one)[:40])
def test_wrong_usage(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "set-up.yaml"
    file.write_text(HEALTHY)
    assert run(["check", "-f", str(file), *flags]) == 2
    assert said in capsys.readouterr().err


# --- what no manifest can say ---------------------------------------------------------------


def of_registry(*objects: Any, synced: bool = True, **more: Any) -> list[Finding]:
    return [*check_registry(Registry(snapshot(*objects, synced=synced), **more))]


def test_nothing_is_trusted_before_the_registry_was_listed() -> None:
    (one,) = of_registry(synced=False)
    assert (one.id, one.severity) == ("registry-not-synced", "error")


def test_a_service_left_in_a_namespace_that_is_gone() -> None:
    (one,) = of_registry(service("web", "gone"), slice_of("web", endpoint("10.1.1.1"), ns="gone"))
    assert (one.id, one.subject) == ("namespace-missing", "Service gone/web")
    assert "kubectl create namespace gone" in one.advice


def test_pods_of_the_selector_without_an_endpoint() -> None:
    labelled = pod("web-1", "")
    (one,) = of_registry(service("web", selector={"app": "web"}), labelled, pods_known=False)
    assert (one.id, one.severity) == ("service-without-endpoints", "warning")
    assert "kubectl -n default get pods -l app=web" in one.advice


def test_only_endpoints_that_are_about_to_go() -> None:
    going = endpoint("10.1.1.1", conditions={"ready": False, "serving": True, "terminating": True})
    (one,) = of_registry(service("web"), slice_of("web", going))
    assert (one.id, one.text) == (
        "service-only-terminating", "0 of 1 endpoint ready, 1 about to go: 10.1.1.1",
    )  # fmt: skip


def test_an_endpoint_of_the_other_family() -> None:
    (one,) = of_registry(service("web"), slice_of("web", endpoint("10.1.1.1"), endpoint("fd00::1")))
    assert (one.id, one.text) == (
        "endpoint-address-wrong", "endpoint fd00::1 is no IPv4 address",
    )  # fmt: skip


def test_a_host_whose_name_is_no_nodes() -> None:
    nodes = {"node1": msgspec.convert({"metadata": {"name": "node1"}}, Node)}
    (one,) = check_registry(Registry(replace(snapshot(), nodes=nodes), node="host7"))
    assert (one.id, one.text) == ("node-unknown", "is not among the Nodes: node1")


# --- a running kdns's own words -------------------------------------------------------------

WELL: dict[str, Any] = {
    "pid": 7,
    "synced": True,
    "revision": {"registry": 9, "dns": 9, "kernel_ipv4": 9, "kernel_ipv6": 9},
    "gate": {"timeout": 2.0, "open": False, "waiting": [], "published_unprogrammed": [],
             "draining": []},
}  # fmt: skip
STATUS: list[tuple[str, dict[str, Any], dict[str, Any], str, str]] = [
    ("not synced", {"synced": False}, {}, "server-not-synced", "has not listed its registry"),
    ("the gate is open", {}, {"open": True}, "gate-open", "not written within 2 s"),
    ("a name waits too long", {},
     {"waiting": [{"service": "default/web", "revision": 9, "seconds": 4.25}]},
     "gate-waiting", "1 Service not shown for 4.2 s: default/web"),
    ("shown without rules", {}, {"published_unprogrammed": ["default/web"]},
     "published-unprogrammed", "its rules are not in the kernel"),
    ("DNS is behind", {"revision": {"registry": 9, "dns": 7}}, {}, "dns-behind",
     "DNS shows revision 7, the registry is at 9"),
    ("the kernel is behind", {"revision": {"registry": 9, "dns": 9, "kernel_ipv6": 3}}, {},
     "kernel-behind", "the kernel has revision 3"),
    ("a node's DNS path", {"path": {"healthy": False, "addresses": ["169.254.20.10"],
                                    "problem": "iptables: not found in PATH"}}, {},
     "dns-path-broken", "iptables: not found in PATH"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "gate", "id", "text"), [s[1:] for s in STATUS],
                         ids=[s[0] for s in STATUS])  # fmt: skip
def test_what_kdns_says_of_itself(
    change: dict[str, Any], gate: dict[str, Any], id: str, text: str
) -> None:
    status = {**WELL, **change, "gate": {**WELL["gate"], **gate}}
    (one,) = check_status(status)
    assert one.id == id and text in one.text and one.advice


def test_kdns_that_is_well_and_one_without_a_gate() -> None:
    assert [*check_status(WELL)] == []
    assert [*check_status({**WELL, "gate": None})] == []
    waiting = {"waiting": [{"service": "default/new", "revision": 9, "seconds": 0.1}]}
    revision = {"registry": 9, "dns": 8, "kernel_ipv4": 8}
    status = {**WELL, "revision": revision, "gate": {**WELL["gate"], **waiting}}
    assert [*check_status(status)] == [], "a change on its way"


# --- this host ------------------------------------------------------------------------------

GOOD_SYSCTLS = {
    "net/ipv4/ip_local_port_range": "32768\t60999",
    "net/ipv4/ip_local_reserved_ports": "",
    "net/ipv4/ip_forward": "1",
    "net/ipv6/conf/all/forwarding": "1",
    "net/ipv4/conf/all/route_localnet": "1",
    "net/bridge/bridge-nf-call-iptables": "1",
    "net/netfilter/nf_conntrack_count": "100",
    "net/netfilter/nf_conntrack_max": "131072",
}
NETWORKS = {"192.168.77.0/24": "eth0", "0.0.0.0/0": "eth0", "10.96.0.50/32": "kube-ipvs0"}
HOSTS: list[tuple[str, dict[str, str], dict[str, str], str, str, str]] = [
    ("NodePorts among the ephemeral ports", {"net/ipv4/ip_local_port_range": "1024 65535"}, {},
     "node-port-ephemeral", "1024 to 65535 holds 1 NodePort: 30080 (default/web:http)",
     "net.ipv4.ip_local_reserved_ports=30000-32767"),
    ("forwarding off", {"net/ipv4/ip_forward": "0"}, {}, "ip-forward-off",
     "packets to Pods are not passed on", "sysctl -w net.ipv4.ip_forward=1"),
    ("route_localnet off", {"net/ipv4/conf/all/route_localnet": "0"}, {}, "route-localnet-off",
     "do not answer on 127.0.0.1", "--iptables-localhost-nodeports=false"),
    ("bridge-nf-call off", {"net/bridge/bridge-nf-call-iptables": "0"}, {}, "bridge-nf-call-off",
     "packets between Pods of one bridge", "net.bridge.bridge-nf-call-iptables=1"),
    ("the Services' range is a network of this host", {}, {"10.96.0.0/16": "eth1"},
     "service-in-host-network", "10.96.0.50 (default/web)", "--service-cluster-ip-range"),
    ("no room for connections", {"net/netfilter/nf_conntrack_count": "130000"}, {},
     "conntrack-full", "130000 of at most 131072", "nf_conntrack_max"),
]  # fmt: skip


def of_host(sysctls: Mapping[str, str], networks: Mapping[str, str]) -> list[Finding]:
    spec = {"name": "http", "port": 80, "nodePort": 30080, "protocol": "TCP"}
    web = service("web", type="NodePort")
    ports = [msgspec.convert(spec, ServicePort)]
    web = msgspec.structs.replace(web, spec=msgspec.structs.replace(web.spec, ports=ports))
    held = snapshot(web, slice_of("web", endpoint("10.244.1.5")))
    compiler = TableCompiler(4, NodeView("node1"))
    compiler.update(held, everything(held))
    host = Host({**GOOD_SYSCTLS, **sysctls}, {**NETWORKS, **networks}, bridges=True)
    return [*check_host(ProxyConfig(), {4: compiler.table}, host)]


@pytest.mark.parametrize(("sysctls", "networks", "id", "text", "advice"),
                         [h[1:] for h in HOSTS], ids=[h[0] for h in HOSTS])  # fmt: skip
def test_what_of_a_host_is_in_the_way(
    sysctls: dict[str, str], networks: dict[str, str], id: str, text: str, advice: str
) -> None:
    (one,) = of_host(sysctls, networks)
    assert one.id == id and text in one.text and advice in one.advice


def test_a_host_that_is_well() -> None:
    assert of_host({}, {}) == []
    wide = {"net/ipv4/ip_local_port_range": "1024 65535"}
    assert of_host({**wide, "net/ipv4/ip_local_reserved_ports": "8080,30000-32767"}, {}) == []


RESOLV = "/etc/resolv.conf"
RESOLVERS: list[tuple[str, str, str, str, str, str]] = [
    ("resolv.conf names the kube-dns Service", "forward . /etc/resolv.conf",
     "nameserver 10.96.0.10\n", "resolv-conf-loop",
     "/etc/resolv.conf names 10.96.0.10, which is this server's own", "name the real resolvers"),
    ("resolv.conf names loopback", "forward . /etc/resolv.conf", "nameserver 127.0.0.1\n",
     "resolv-conf-loop", "where this server listens: each question comes back", "resolvConf"),
    ("forward to itself", "forward . 10.96.0.10", "", "resolv-conf-loop", "it names 10.96.0.10",
     "name the real resolvers"),
    ("the stub of systemd-resolved", "forward . /etc/resolv.conf", "nameserver 127.0.0.53\n",
     "resolv-conf-stub", "the stub of systemd-resolved", "/run/systemd/resolve/resolv.conf"),
    ("a resolv.conf without nameserver", "forward . /etc/resolv.conf", "search lan\n",
     "forward-nowhere", "names no nameserver", "nameserver ADDRESS"),
]  # fmt: skip
GOOD_RESOLVERS = [
    ("forward . /etc/resolv.conf", "nameserver 192.0.2.53\nnameserver 2001:db8::53\n"),
    ("forward . tls://9.9.9.9", ""),
    ("forward . 127.0.0.1:5353", ""),
    ("bind 10.96.0.99\n forward . 127.0.0.1", ""),
]


def of_forward(lines: str, resolv_conf: str) -> list[Finding]:
    corefile, problems = parse_corefile(f".:53 {{\n {lines}\n}}\n")
    assert not problems.errors
    return [*check_resolvers(corefile, Resolvers({RESOLV: resolv_conf}, ["10.96.0.10"]))]


@pytest.mark.parametrize(("lines", "text", "id", "told", "advice"), [r[1:] for r in RESOLVERS],
                         ids=[r[0] for r in RESOLVERS])  # fmt: skip
def test_dns_that_asks_itself(lines: str, text: str, id: str, told: str, advice: str) -> None:
    (one,) = of_forward(lines, text)
    assert one.id == id and told in one.text and advice in one.advice
    assert one.subject == "Corefile:2, forward"


def test_a_node_that_asks_its_own_server(tmp_path: Path) -> None:
    """`kdns node` answers at an address beside the Service's: also that one leads back."""
    (tmp_path / "all.yaml").write_text(HEALTHY)
    lines = "bind 169.254.20.10\n kubernetes cluster.local\n forward . 169.254.20.10"
    evidence = replace(
        gather(Where(manifests=(str(tmp_path),))),
        corefile=("Corefile", f".:5353 {{\n {lines}\n}}\n"),
        status={"dns": ["10.96.0.10:53", "169.254.20.10:53"]},
    )
    shown = read_shown(evidence)
    assert shown.corefile is not None
    (one,) = check_resolvers(shown.corefile, read_resolvers(evidence, shown.corefile))
    assert (one.id, "it names 169.254.20.10" in one.text) == ("resolv-conf-loop", True)


@pytest.mark.parametrize(("lines", "text"), GOOD_RESOLVERS)
def test_dns_that_asks_others(lines: str, text: str) -> None:
    assert of_forward(lines, text) == []


# --- the list -------------------------------------------------------------------------------


def test_watch_tells_what_is_new_and_what_is_over() -> None:
    a = finding("dns-no-answer", "DNS server a", "does not answer (1 of 1)", "", "")
    b = finding("dns-no-answer", "DNS server b", "does not answer (1 of 1)", "", "")
    again = a._replace(text="does not answer (2 of 2)")
    assert turn([], [a]) == Turn((a,), ())
    assert turn([a], [again]) == Turn((), ()), "a text with other figures is nothing new"
    assert turn([a], [b]) == Turn((b,), (a,))


def test_findings_are_told_once_and_the_worst_first() -> None:
    note = finding("load-balancer-pending", "Service a/b", "", "", "")
    warning = finding("slice-without-service", "Service a/c", "", "", "")
    error = finding("namespace-missing", "Service a/d", "", "", "")
    host = finding("ip-forward-off", "sysctl", "", "", "")
    assert in_order([host, note, warning, error, error]) == [error, warning, note, host]


def test_the_documentation_lists_all_findings() -> None:
    text = (Path(__file__).parents[1] / "docs" / "CHECK.md").read_text()
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (\w+) \| (.+?) \|", text, re.MULTILINE)
    assert rows == [(id, kind.severity, kind.means) for id, kind in KINDS.items()]
