"""`kdns trace` on broken set-ups: each with where it stops, the sentence and the advice.

And on healthy ones, where it must arrive; there, and wherever rules are met, its end is held
against the packet walker, and against what the table decides for the other modes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trace_cluster import (
    CLIENT,
    NODES,
    WEB,
    Obj,
    deployment,
    endpoint,
    endpoint_slice,
    evidence_of,
    namespace,
    pod,
    service,
    traced,
    written,
)

from kdns import cli
from kdns.errors import ConfigError
from kdns.explain.evidence import snapshot_of
from kdns.explain.search import LIBCS, Resolver, candidates, resolver_of
from kdns.explain.trace_findings import FINDINGS
from kdns.explain.trace_text import as_json, render

UDP = {"protocol": "udp"}
MUSL = {"libc": "musl"}


def corefile(*options: str) -> str:
    lines = "".join(f"        {line}\n" for line in options)
    return (
        ".:53 {\n    kubernetes cluster.local in-addr.arpa ip6.arpa {\n"
        f"{lines}    }}\n    forward . 192.0.2.53\n}}\n"
    )


@dataclass(frozen=True)
class Broken:
    """A set-up. text, advice -- what must be in the sentence and in the advice"""

    id: str
    what: str
    text: str
    advice: str
    objects: tuple[Obj, ...] = WEB
    source: str = "default/client"
    corefile: str = ""
    more: dict[str, Any] = field(default_factory=dict)
    where: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.id}: {self.what}"


def port(number: int, target: int | str | None = None, name: str = "http", **more: Any) -> Obj:
    found: Obj = {"name": name, "port": number, **more}
    return found if target is None else {**found, "targetPort": target}


WEB_POD = pod("web-1", ip="10.244.1.10")
DNS_PORTS = [port(53, 5353, "dns", protocol="UDP")]
LB: dict[str, Any] = {"type": "LoadBalancer", "clusterIP": "10.96.0.80"}
GIVEN = [{"ip": "203.0.113.80"}]

BROKEN = [
    # --- the name
    Broken("no-such-service", "wev:80", "no Service 'wev' in namespace default; did you mean 'web'",
           "correct the name"),
    Broken("no-such-service", "api.default:80", "its Services: web", "expose"),
    Broken("no-such-service", "api.default.svc.cluster.local:80", "no Service 'api'", "correct"),
    Broken("wrong-namespace", "db:5432", "namespace default has no Service 'db'; shop has",
           "write db.shop", (*WEB, service("db", "shop"))),
    Broken("wrong-namespace", "web.shop:80", "namespace shop has no Service 'web'; default has",
           "write web.default", (*WEB, namespace("shop"))),
    Broken("namespace-missing", "web.shopp:80", "no namespace 'shopp'; did you mean 'shop'",
           "write web.shop", (namespace("shop"), service("web", "shop"))),
    Broken("namespace-missing", "web.nowhere.svc:80", "no namespace 'nowhere'; default has",
           "write web.default"),
    Broken("namespace-not-exposed", "web.shop:80",
           "the Corefile answers for namespaces default only, not for shop",
           "add shop to 'namespaces'", (service("web", "shop"),),
           corefile=corefile("namespaces default")),
    Broken("no-such-endpoint", "db-7.db:5432", "no endpoint named 'db-7'; did you mean 'db-1'",
           "serviceName",
           (service("db", clusterIP="None", ports=[port(5432, 5432)]),
            pod("db-0", labels={"app": "db"}, hostname="db-0", subdomain="db"),
            pod("db-1", labels={"app": "db"}, hostname="db-1", subdomain="db"))),
    Broken("no-such-endpoint", "web-1.web.default.svc:80", "no endpoint named 'web-1'", "hostname"),
    Broken("empty-service-hidden", "web:80", "'ignore empty_service'", "take that line out",
           (service("web"),), corefile=corefile("ignore empty_service")),
    Broken("pod-names-off", "10-244-1-10.default.pod:8080", "names of Pods are not answered",
           "pods insecure", corefile=corefile()),
    Broken("external-name-loop", "a:80", "a.default.svc.cluster.local -> b.default.svc.cluster"
           ".local -> a.default.svc.cluster.local", "not in the loop",
           (service("a", type="ExternalName", externalName="b.default.svc.cluster.local"),
            service("b", type="ExternalName", externalName="a.default.svc.cluster.local"))),
    Broken("external-name-loop", "me:80", "leads back to itself", "host that is not in the loop",
           (service("me", type="ExternalName", externalName="me.default.svc.cluster.local"),)),
    Broken("external-name-is-address", "legacy:80", "externalName 198.51.100.7, an address",
           "without selector",
           (service("legacy", type="ExternalName", externalName="198.51.100.7"),)),
    Broken("external-name-nowhere", "alias:80", "gone.default.svc.cluster.local, which is no name",
           "correct spec.externalName",
           (service("alias", type="ExternalName",
                    externalName="gone.default.svc.cluster.local"),)),
    Broken("no-cluster-dns", "web:80", "its node's nameservers (dnsPolicy Default)",
           "dnsPolicy to ClusterFirst", (*WEB, pod("odd", labels={}, dnsPolicy="Default")),
           "default/odd"),
    Broken("no-cluster-dns", "web:80", "hostNetwork without dnsPolicy", "ClusterFirstWithHostNet",
           (*WEB, pod("odd", labels={}, hostNetwork=True)), "default/odd"),
    Broken("no-cluster-dns", "web:80", "asks 9.9.9.9 (dnsPolicy None)", "ClusterFirst",
           (*WEB, pod("odd", labels={}, dnsPolicy="None", dnsConfig={"nameservers": ["9.9.9.9"]})),
           "default/odd"),
    Broken("libc-differs", "web.default:80", "musl does not find web.default, glibc does",
           "write the full name, web.default.svc.cluster.local.",
           (*WEB, pod("low", labels={}, dnsConfig={"options": [{"name": "ndots", "value": "1"}]})),
           "default/low", more=MUSL),
    Broken("family-mismatch", "web:80", "has fd00:10:96::80, and the client only IPv4",
           "PreferDualStack",
           (service("web", clusterIP="fd00:10:96::80", ipFamilies=["IPv6"]),
            pod("web-1", ip="fd00:10:244::10"))),
    Broken("dns-failed", "web:80", "is answered REFUSED; no server block", "server block",
           corefile="example.org:53 {\n    whoami\n}\n"),
    Broken("name-not-answered", "10-244-9-9.default.pod:80", "no Pod has the address and namespace",
           "get pod", corefile=corefile("pods verified")),
    # --- the Service
    Broken("port-not-in-service", "web:81", "has no port 81; it has 80/TCP (http)", "add port 81"),
    Broken("port-is-target-port", "web:8080", "8080 is the Pods' port", "use web:80"),
    Broken("port-is-node-port", "web:30080", "30080 is the port of Service default/web on nodes",
           "use web:80", (service("web", type="NodePort", ports=[port(80, 8080, nodePort=30080)]),
                          WEB_POD)),
    Broken("udp-tcp-mismatch", "dns:53", "has port 53 for UDP only, and TCP is asked for", "--udp",
           (service("dns", ports=DNS_PORTS), pod("dns-1", labels={"app": "dns"}))),
    Broken("udp-tcp-mismatch", "web:80", "has port 80 for TCP only, and UDP is asked for",
           "use TCP", more=UDP),
    Broken("udp-tcp-mismatch", "192.0.2.11:30080", "NodePort 30080 of default/web:http is for TCP",
           "use TCP", (service("web", type="NodePort", ports=[port(80, 8080, nodePort=30080)]),
                       WEB_POD), more=UDP),
    Broken("headless-port", "web:80", "is headless, so nothing translates port 80 to 8080",
           "use web:8080", (service("web", clusterIP="None"), WEB_POD)),
    Broken("other-proxy", "web:80", "service-proxy-name=cilium", "take the label off",
           (service("web", labels={"service.kubernetes.io/service-proxy-name": "cilium"}),
            WEB_POD)),
    Broken("unknown-address", "10.96.0.99:80", "lies among the ClusterIPs, and no Service has it",
           "by its name"),
    Broken("unknown-address", "10.244.9.9:80", "no Pod is known to have it", "the Pod is gone"),
    Broken("not-a-node-port", "192.0.2.11:31000", "31000 is no NodePort; there are 30080/tcp",
           "a program of the node",
           (service("web", type="NodePort", ports=[port(80, 8080, nodePort=30080)]), WEB_POD)),
    Broken("claimed-twice", "zz:80", "is claimed by default/zz:http too; default/aa:http gets it",
           "another address",
           (service("aa", clusterIP="10.96.0.9", selector={"app": "web"}),
            service("zz", clusterIP="10.96.0.9", selector={"app": "web"}), WEB_POD)),
    # --- its endpoints
    Broken("selector-matches-nothing", "web:80",
           "no Pod in default has app=web; the nearest, web-1, has app=webb", "the same",
           (service("web"), pod("web-1", labels={"app": "webb", "run": "web"}))),
    Broken("selector-matches-nothing", "web:80",
           "has app=web,tier=front; the nearest, web-1, has tier=back", "labels of the Pods",
           (service("web", selector={"app": "web", "tier": "front"}),
            pod("web-1", labels={"app": "web", "tier": "back"}))),
    Broken("selector-matches-nothing", "web:80", "web-1, has run=web and no app", "the same",
           (service("web"), pod("web-1", labels={"run": "web"}))),
    Broken("selector-matches-nothing", "web:80", "no Pod in default has app=web", "start Pods",
           (service("web"),)),
    Broken("selector-matches-nothing", "web", "no Pod in default has app=web", "start Pods",
           (service("web", clusterIP="None"),)),
    Broken("pods-in-other-namespace", "web:80", "no Pod in default has app=web; Pod shop/web-1 has",
           "make it in shop", (service("web"), pod("web-1", "shop"))),
    Broken("scaled-to-zero", "web:80", "Deployment default/web has 0 replicas", "--replicas=1",
           (service("web"), deployment("web", 0))),
    Broken("no-endpoints", "web:80", "no endpoints, and no selector", "write an EndpointSlice",
           (service("web", selector=None),)),
    Broken("slice-without-label", "web:80", "EndpointSlice default/web-abc12 has no label",
           "kubectl -n default label endpointslice web-abc12",
           (service("web", selector=None),
            endpoint_slice("web", endpoint("10.244.1.10"), labelled=False))),
    Broken("endpoint-family-mismatch", "web:80", "a ClusterIP of IPv4, and its endpoints are IPv6",
           "ipFamilies",
           (service("web", selector=None),
            endpoint_slice("web", endpoint("fd00:10:244::10"), family="IPv6"))),
    Broken("target-port-mismatch", "web:80", "targetPort 'http' of Service default/web is the name"
           " of no TCP port of its Pods; they declare 8080/TCP (web)", "containerPort 'http'",
           (service("web", ports=[port(80, "http")]), WEB_POD)),
    Broken("port-name-mismatch", "web:80", "has a port 'http'/TCP; they have 'web':8080/TCP",
           "must be the same",
           (service("web", selector=None),
            endpoint_slice("web", endpoint("10.244.1.10"), port_name="web"))),
    Broken("port-name-mismatch", "web:80", "they have 'http':8080/UDP", "protocol",
           (service("web", selector=None),
            endpoint_slice("web", endpoint("10.244.1.10"), protocol="UDP"))),
    Broken("pods-not-ready", "web:80", "0 of 1 endpoints of Service default/web are ready: web-1:"
           " container main is waiting: CrashLoopBackOff", "describe pod web-1",
           (service("web"),
            pod("web-1", ip="10.244.1.10", ready=False, waiting="CrashLoopBackOff"))),
    Broken("pods-not-ready", "web", "0 of 1 endpoints", "publishNotReadyAddresses",
           (service("web", clusterIP="None"), pod("web-1", ready=False))),
    Broken("no-ready-endpoints", "web:80", "0 of 2 endpoints of Service default/web are ready",
           "EndpointSlice web-abc12",
           (service("web", selector=None),
            endpoint_slice("web", endpoint("10.244.1.10", ready=False),
                           endpoint("10.244.1.11", ready=False)))),
    Broken("no-ready-endpoints", "web:80", "0 of 1 endpoints", "conditions.ready",
           (service("web", selector=None),
            endpoint_slice("web", endpoint("10.244.1.10", ready=False, serving=False,
                                           terminating=True)))),
    # --- the rules
    Broken("policy-local-no-endpoint", "web:80", "internalTrafficPolicy is Local and node node1 has"
           " no ready endpoint", "internalTrafficPolicy to Cluster",
           (service("web", internalTrafficPolicy="Local"), pod("web-1", on="node2"))),
    Broken("policy-local-no-endpoint", "192.0.2.11:30080",
           "externalTrafficPolicy is Local and node node1 has no ready endpoint",
           "externalTrafficPolicy to Cluster",
           (service("web", type="NodePort", externalTrafficPolicy="Local",
                    ports=[port(80, 8080, nodePort=30080)]), pod("web-1", on="node2")),
           "198.51.100.9"),
    Broken("source-range", "203.0.113.80:80", "let in 198.51.100.0/24, and the client is"
           " 192.0.2.200: dropped", "add 192.0.2.200/32",
           (service("web", **LB, loadBalancerSourceRanges=["198.51.100.0/24"], ingress=GIVEN),
            WEB_POD), "192.0.2.200"),
    # --- the Pod
    Broken("port-not-declared", "web:80", "is sent to at port 8080/TCP, and its containers declare"
           " 80/TCP", "set targetPort to 80",
           (service("web"), pod("web-1", port=80, ip="10.244.1.10"))),
    Broken("port-not-declared", "10.244.1.10:9999", "port 9999/TCP", "targetPort to 8080"),
    Broken("udp-tcp-mismatch", "dns:53", "declares 5353/TCP (web), and is sent to as 5353/UDP",
           "protocol that the containers speak",
           (service("dns", ports=DNS_PORTS), pod("dns-1", labels={"app": "dns"}, port=5353)),
           more=UDP),
]  # fmt: skip


@pytest.mark.parametrize("case", BROKEN, ids=str)
def test_it_stops_where_it_must(case: Broken, tmp_path: Path) -> None:
    evidence = evidence_of(tmp_path, case.objects, case.corefile, **case.where)
    made = traced(evidence, case.what, case.source, **case.more)
    end = made.outcome
    assert (end.kind, end.finding) == ("stopped", case.id), render(made, width=200)
    assert case.text in end.text
    assert case.advice in end.advice
    told = " ".join(render(made, width=200).split())
    assert f"=> stops: {' '.join(end.text.split())} [{case.id}]" in told
    assert json.loads(json.dumps(as_json(made)))["end"]["finding"] == case.id


# --- healthy ones ------------------------------------------------------------------------------


TWO = (WEB_POD, pod("web-2", ip="10.244.2.20", on="node2"))
BOTH = {"10.244.1.10:8080": 0.5, "10.244.2.20:8080": 0.5}
NODE_PORT = service("web", type="NodePort", ports=[port(80, 8080, nodePort=30080)])
LOCAL = service("web", type="NodePort", externalTrafficPolicy="Local",
                ports=[port(80, 8080, nodePort=30080)])  # fmt: skip


@dataclass(frozen=True)
class Healthy:
    what: str
    expected: dict[str, float]
    masquerade: bool
    objects: tuple[Obj, ...] = (WEB[0], *TWO)
    source: str = "default/client"
    more: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.what} from {self.source}"


HEALTHY = [
    Healthy("web:80", BOTH, False),
    Healthy("web.default:80", BOTH, False),
    Healthy("web.default.svc.cluster.local.:80", BOTH, False),
    Healthy("10.96.0.80:80", BOTH, False),
    Healthy("10.96.0.80:80", BOTH, True, source="192.0.2.11"),
    Healthy("web:80", BOTH, False, source=""),
    Healthy("web.default.svc.cluster.local:80", BOTH, True, source="198.51.100.9"),
    Healthy("192.0.2.11:30080", BOTH, True, (NODE_PORT, *TWO), "198.51.100.9"),
    Healthy("192.0.2.12:30080", BOTH, True, (NODE_PORT, *TWO)),
    Healthy("192.0.2.11:30080", {"10.244.1.10:8080": 1.0}, False, (LOCAL, *TWO), "198.51.100.9"),
    Healthy("192.0.2.11:30080", BOTH, False, (LOCAL, *TWO)),
    Healthy("web:80", {"10.244.1.10:8080": 1.0}, False,
            (service("web", internalTrafficPolicy="Local"), *TWO)),
    Healthy("203.0.113.80:80", BOTH, True,
            (service("web", **LB, loadBalancerSourceRanges=["192.0.2.0/24"], ingress=GIVEN), *TWO),
            "192.0.2.200"),
    Healthy("web:80", {"10.244.1.10:8080": 1.0}, False,
            (service("web", selector=None),
             endpoint_slice("web", endpoint("10.244.1.10", zones=["zone-a"]),
                            endpoint("10.244.2.20", "node2", zones=["zone-b"])))),
    Healthy("web:80", {"10.244.1.10:8080": 1.0}, False,
            (service("web", selector=None),
             endpoint_slice("web", endpoint("10.244.1.10", ready=False, serving=True,
                                            terminating=True),
                            endpoint("10.244.2.20", ready=False)))),
    Healthy("dns:53", {"10.244.1.53:5353": 1.0}, False,
            (service("dns", ports=DNS_PORTS),
             pod("dns-1", ip="10.244.1.53", labels={"app": "dns"}, port=5353, protocol="UDP")),
            more=UDP),
    Healthy("web:80", {"10.244.1.10:8080": 1.0}, False,
            (service("web", ports=[port(80, "web")]), WEB_POD)),
    Healthy("web:80", {"[fd00:10:244::10]:8080": 1.0}, False,
            (service("web", ipFamilies=["IPv6"]), pod("web-1", ip="fd00:10:244::10")), ""),
]  # fmt: skip


@pytest.mark.parametrize("mode", ["iptables", "nftables", "ipvs", "userspace"])
@pytest.mark.parametrize("case", HEALTHY, ids=str)
def test_it_arrives_in_every_mode(case: Healthy, mode: str, tmp_path: Path) -> None:
    """iptables and nftables are walked rule by rule, the others as the table decides: all come
    to the same."""
    made = traced(evidence_of(tmp_path, case.objects, mode=mode), case.what, case.source,
                  **case.more)  # fmt: skip
    assert made.outcome.kind == "endpoint", render(made, width=200)
    assert dict(made.outcome.endpoints) == pytest.approx(case.expected)
    assert made.rules is not None
    assert made.rules.walked is (mode in ("iptables", "nftables"))
    assert made.rules.masquerade is case.masquerade
    assert sum(float(way.chance) for way in made.rules.ways) == pytest.approx(1)


@pytest.mark.parametrize("mode", ["iptables", "nftables"])
@pytest.mark.parametrize(
    "case", [c for c in BROKEN if c.id in ("policy-local-no-endpoint", "source-range",
             "no-ready-endpoints", "selector-matches-nothing") and ":" in c.what], ids=str
)  # fmt: skip
def test_where_a_trace_stops_a_walked_packet_does(case: Broken, mode: str, tmp_path: Path) -> None:
    made = traced(evidence_of(tmp_path, case.objects, mode=mode), case.what, case.source)
    assert made.outcome.finding == case.id
    assert made.rules is not None
    expected = "drop" if case.id in ("policy-local-no-endpoint", "source-range") else "reject"
    assert {way.verdict for way in made.rules.ways} == {expected}
    assert made.rules.endpoints == {}


def test_headless_leads_straight_to_pods(tmp_path: Path) -> None:
    made = traced(evidence_of(tmp_path, (service("web", clusterIP="None"), *TWO)), "web:8080")
    assert dict(made.outcome.endpoints) == BOTH
    assert made.rules is None
    assert made.place is not None
    assert made.place.kind == "headless"


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("docs:443", "leads out of the cluster to example.org"),
        ("www.example.org:443", "www.example.org. is no name of the cluster: 192.0.2.53:53"),
        ("192.0.2.99:80", "192.0.2.99 is not of this cluster"),
    ],
)
def test_it_may_leave_the_cluster(what: str, text: str, tmp_path: Path) -> None:
    objects = (*WEB, service("docs", type="ExternalName", externalName="example.org"))
    made = traced(evidence_of(tmp_path, objects, corefile("ttl 30")), what)
    assert made.outcome.kind == "outside"
    assert text in made.outcome.text
    assert made.outcome.arrives


# --- what is told besides ----------------------------------------------------------------------


NOTED = [
    ("ndots-outside-name", "web.default.svc.cluster.local:80", (), "default/client",
     "so 3 other names are asked for first, 6 questions"),
    ("ndots-outside-name", "www.example.org:443", (), "default/client", "fewer dots than ndots:5"),
    ("libc-differs", "web.default:80",
     (pod("low", labels={}, ip="10.244.1.7",
          dnsConfig={"options": [{"name": "ndots", "value": "1"}]}),), "default/low",
     "musl does not find web.default"),
    ("host-alias", "web:80",
     (pod("low", labels={}, hostAliases=[{"ip": "10.96.0.80", "hostnames": ["web"]}]),),
     "default/low", "say web is 10.96.0.80"),
    ("no-port-given", "two", (service("two", selector={"app": "web"},
                                      ports=[port(80, 8080), port(443, 8080, "tls")]),),
     "default/client", "80 is taken, of 80/TCP (http), 443/TCP (tls)"),
    ("claimed-twice", "198.51.100.10:80",
     (service("zz", externalIPs=["198.51.100.10"], selector={"app": "web"}),
      service("aa", externalIPs=["198.51.100.10"], selector={"app": "none"})), "default/client",
     "claimed by default/aa:http too; default/zz:http gets it"),
    ("no-load-balancer-address", "lb:80", (service("lb", type="LoadBalancer",
                                                   selector={"app": "web"}),),
     "default/client", "no load balancer has given Service default/lb an address"),
    ("hairpin", "web:80", (), "default/web-1", "the client is the endpoint 10.244.1.10:8080"),
    ("only-terminating", "old:80",
     (service("old", selector=None),
      endpoint_slice("old", endpoint("10.244.1.10", ready=False, serving=True,
                                     terminating=True))), "default/client", "about to go"),
]  # fmt: skip


@pytest.mark.parametrize(("id", "what", "more", "source", "text"), NOTED)
def test_it_is_told_besides(
    id: str, what: str, more: tuple[Obj, ...], source: str, text: str, tmp_path: Path
) -> None:
    made = traced(evidence_of(tmp_path, (*WEB, *more)), what, source)
    assert made.outcome.arrives, render(made, width=200)
    told = {one.id: one for one in made.findings}
    assert text in told[id].text
    assert not told[id].stops


REASONS = [
    (endpoint("10.244.1.10", ready=False), "not ready"),
    (endpoint("10.244.1.10", ready=False, serving=False, terminating=True),
     "terminating, and it serves no more"),
    (endpoint("10.244.1.10", ready=False, serving=True, terminating=True),
     "terminating, and others are ready"),
    ({"addresses": [], "conditions": {}}, "it has no address"),
]  # fmt: skip


@pytest.mark.parametrize(("one", "why"), REASONS)
def test_every_endpoint_says_why_it_is_out(one: Obj, why: str, tmp_path: Path) -> None:
    slices = endpoint_slice("web", one, endpoint("10.244.9.9"))
    made = traced(evidence_of(tmp_path, (service("web", selector=None), slices)), "web:80")
    by_address = {seen.address: seen for seen in made.endpoints}
    assert by_address["10.244.9.9"].chosen
    assert [s.why for a, s in by_address.items() if a != "10.244.9.9"] == [why]


def test_zones_and_policies_are_reasons(tmp_path: Path) -> None:
    zoned = endpoint_slice("web", endpoint("10.244.1.10", zones=["zone-a"]),
                           endpoint("10.244.2.20", "node2", zones=["zone-b"]))  # fmt: skip
    made = traced(evidence_of(tmp_path, (service("web", selector=None), zoned)), "web:80")
    assert {s.address: s.why for s in made.endpoints}["10.244.2.20"] == (
        "hinted for zone zone-b; this node is in zone-a"
    )
    local = (service("web", internalTrafficPolicy="Local"), *TWO)
    made = traced(evidence_of(tmp_path, local), "web:80")
    assert {s.address: s.why for s in made.endpoints}["10.244.2.20"] == (
        "on node node2, and the traffic policy is Local"
    )


# --- search lists ------------------------------------------------------------------------------


USUAL = resolver_of("default", "cluster.local", None)


@pytest.mark.parametrize(
    ("name", "resolver", "glibc", "musl"),
    [
        ("web", USUAL, "web.default.svc.cluster.local. web.svc.cluster.local. web.cluster.local."
         " web.", "web.default.svc.cluster.local. web.svc.cluster.local. web.cluster.local. web."),
        ("web.", USUAL, "web.", "web."),
        ("a.b.c.d.e.f", USUAL, "a.b.c.d.e.f. a.b.c.d.e.f.default.svc.cluster.local."
         " a.b.c.d.e.f.svc.cluster.local. a.b.c.d.e.f.cluster.local.", "a.b.c.d.e.f."),
        ("a.b", Resolver(("x.y",), 1), "a.b. a.b.x.y.", "a.b."),
        ("a", Resolver((), 1), "a.", "a."),
    ],
)  # fmt: skip
def test_candidates_are_those_of_each_libc(
    name: str, resolver: Resolver, glibc: str, musl: str
) -> None:
    assert " ".join(candidates(name, resolver, "glibc")) == glibc
    assert " ".join(candidates(name, resolver, "musl")) == musl


def test_musl_ends_at_a_name_without_records(tmp_path: Path) -> None:
    """svc.cluster.local is there and holds nothing: glibc goes on, musl does not."""
    search: dict[str, Any] = {"dnsPolicy": "None", "dnsConfig": {
        "nameservers": ["10.96.0.10"], "searches": ["cluster.local", "default.svc.cluster.local"],
        "options": [{"name": "ndots", "value": "5"}]}}  # fmt: skip
    objects = (
        service("svc", clusterIP="10.96.0.81", selector={"app": "web"}),
        service("kube-dns", "kube-system", clusterIP="10.96.0.10", selector={"app": "web"}),
        WEB_POD,
        pod("odd", labels={}, **search),
    )
    evidence = evidence_of(tmp_path, objects)
    found = traced(evidence, "svc:80", "default/odd")
    assert found.outcome.arrives, render(found)
    lost = traced(evidence, "svc:80", "default/odd", libc="musl")
    assert lost.outcome.finding == "libc-differs"
    assert "svc.cluster.local. is there without records" in lost.outcome.text


@given(
    st.lists(st.sampled_from(["a", "b", "web", "svc"]), min_size=1, max_size=7),
    st.integers(0, 7),
)
@settings(max_examples=60, deadline=None)
def test_both_libcs_try_nothing_the_other_never_would(labels: list[str], ndots: int) -> None:
    name = ".".join(labels)
    resolver = Resolver(("x.svc.cluster.local", "cluster.local"), ndots)
    glibc, musl = (candidates(name, resolver, libc) for libc in LIBCS)
    assert f"{name}." in glibc
    assert f"{name}." in musl
    assert set(musl) <= set(glibc)
    assert len(glibc) == len(set(glibc)) == 3


# --- the command -------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = cli.run(["trace", *argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_exit_codes_and_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(written(tmp_path, [*NODES, CLIENT, *WEB]))
    code, out, _ = run(capsys, "web:80", "--from", "default/client", "-f", path)
    assert code == 0
    assert out.splitlines()[0] == "web:80/tcp"
    assert out.splitlines()[-1] == "=> arrives at 10.244.1.10:8080"
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 80
    assert len(out.splitlines()) <= 24, "the usual case is one screen"
    code, out, _ = run(capsys, "web:81", "-f", path)
    assert code == 1
    assert "[port-not-in-service]" in out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["web:99999"], "'99999' is not a port"),
        (["web:http"], "'http' is not a port"),
        (["web:80", "--from", "default/clien"], "no Pod 'default/clien'; did you mean 'default/c"),
        (["web:80", "--from", "client"], "'client' is neither NAMESPACE/POD nor a Node nor an"),
        (["we..b:80"], "is not a domain name"),
        (["web:80", "--node", "node9"], "there is no Node 'node9'"),
        (["web:80", "--kubeconfig", "x"], "are two origins"),
        (["web:80", "--server", "1.2.3.4:x"], "is not ADDRESS or ADDRESS:PORT"),
        (["web:80", "--corefile", "/nowhere"], "/nowhere: cannot be read"),
        (["[fd00::1"], "is not [ADDRESS]:PORT"),
    ],
)
def test_wrong_usage_is_2(
    argv: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, *argv, "-f", str(written(tmp_path, [*NODES, CLIENT, *WEB])))
    assert code == 2
    assert said in err
    assert "Traceback" not in err


def test_a_pod_may_be_any_of_a_namespace(tmp_path: Path) -> None:
    objects = (*WEB, namespace("shop"), service("db", "shop"), pod("db", "shop"))
    made = traced(evidence_of(tmp_path, objects), "web:80", "shop/")
    assert made.outcome.finding == "wrong-namespace"
    assert made.client.namespace == "shop"


def test_colour_is_for_terminals(tmp_path: Path) -> None:
    made = traced(evidence_of(tmp_path, WEB), "web:80")
    plain, coloured = render(made), render(made, colour=True)
    assert "\x1b[32m" in coloured
    import click

    assert click.unstyle(coloured) == plain


def shape(value: Any) -> Any:
    """Return the names of all members, whatever they hold."""
    if isinstance(value, dict):
        return {key: shape(one) for key, one in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return None


def test_json_has_its_documented_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(written(tmp_path, [*NODES, CLIENT, *WEB]))
    code, out, _ = run(capsys, "web.default.svc.cluster.local:80", "--from", "default/client", "-f",
                       path, "-o", "json")  # fmt: skip
    assert code == 0
    answer: dict[str, Any] = {
        "rcode": None, "records": [], "ttl": None, "block": None, "plugin": None, "objects": [],
        "upstreams": [], "error": None,
    }  # fmt: skip
    tried = {"name": None, "state": None, "computed": {**answer, "objects": [None]}, "real": None}
    search = {"libc": None, "state": None, "ended": None, "tried": [tried]}
    found = shape(json.loads(out))
    for one in (found["search"], found["other_libc"]):
        one["tried"][0]["computed"]["objects"] = [None]
    assert found == {
        "shape": None,
        "request": {"name": None, "port": None, "protocol": None, "libc": None},
        "client": {"kind": None, "name": None, "namespace": None, "addresses": [None],
                   "node": None, "assumed": None},
        "evidence": {"origin": None, "told": None, "node": None, "kernel": None,
                     "no_kernel": None, "notes": []},
        "resolver": {"search": [None], "ndots": None, "policy": None, "cluster": None,
                     "nameservers": []},
        "search": search,
        "other_libc": search,
        "objects": [{"kind": None, "name": None, "resource_version": None, "age_seconds": None}],
        "frontend": {"kind": None, "address": None, "port": None, "protocol": None,
                     "port_name": None, "target_port": None, "policy": None,
                     "affinity_seconds": None, "source_ranges": [], "service": None},
        "endpoints": [{"address": None, "port": None, "pod": None, "node": None, "zone": None,
                       "slice": None, "ready": None, "serving": None, "terminating": None,
                       "chosen": None, "why": None, "chance": None}],
        "rules": {"source": None, "mode": None, "node": None, "walked": None, "chains": [None],
                  "lines": [None], "masquerade": None,
                  "ways": [{"verdict": None, "endpoint": None, "chance": None,
                            "masquerade": None, "by": None}]},
        "conntrack": {"flows": None, "told": []},
        "findings": [{"id": None, "stage": None, "stops": None, "text": None, "advice": None}],
        "end": {"kind": None, "arrives": None, "text": None, "finding": None, "advice": None,
                "endpoints": [{"endpoint": None, "chance": None}]},
    }  # fmt: skip


# --- other origins -----------------------------------------------------------------------------


def test_the_state_of_a_running_kdns_is_told(tmp_path: Path) -> None:
    """As its control socket says it, and a DNS server that nobody is: what asks and what is
    computed are told apart."""
    evidence = evidence_of(tmp_path, WEB)
    gate = {"timeout": 2.0, "open": True, "waiting": [],
            "published_unprogrammed": ["default/web"], "draining": []}  # fmt: skip
    made = traced(replace(evidence, status={"synced": True, "gate": gate}), "web:80")
    assert made.outcome.arrives
    assert [one.id for one in made.findings] == ["gate-open"]


def test_a_silent_dns_server_stops_it(tmp_path: Path) -> None:
    import socket

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    evidence = evidence_of(tmp_path, WEB, server=f"127.0.0.1:{port}")
    made = traced(evidence, "web:80")
    assert made.outcome.finding == "dns-no-answer"
    assert f"127.0.0.1 port {port}" in made.outcome.text


def test_a_broken_corefile_is_the_askers_fault(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Corefile"):
        traced(evidence_of(tmp_path, WEB, ".:53 {\n    nonsense\n}\n"), "web:80")


def test_what_only_a_real_cluster_can_be(tmp_path: Path) -> None:
    """A Service that no allocator has seen, and one that no controller has seen: manifests are
    made whole, an API server's objects are taken as they are."""
    evidence = evidence_of(tmp_path, ())
    objects = [*NODES, CLIENT, namespace("default"), service("raw"), *WEB]
    found = replace(evidence, snapshot=snapshot_of(objects)[0])
    made = traced(found, "raw:80")
    assert made.outcome.finding == "no-cluster-ip", render(made)
    assert "Service default/raw has no ClusterIP" in made.outcome.text
    made = traced(found, "web:80")
    assert made.outcome.finding == "endpoints-not-written", render(made)
    assert "Pods match the selector of Service default/web (web-1)" in made.outcome.text
    assert "kube-controller-manager" in made.outcome.advice


def test_node_ports_may_be_for_some_addresses_only(tmp_path: Path) -> None:
    evidence = evidence_of(tmp_path, (NODE_PORT, *TWO))
    config = replace(evidence.config, node_port_addresses=("198.51.100.0/24",))
    made = traced(replace(evidence, config=config), "192.0.2.11:30080", "203.0.113.1")
    assert made.outcome.finding == "node-port-not-on-address"
    assert "node node1 has NodePorts on none" in made.outcome.text
    assert "nodePortAddresses" in made.outcome.advice


# Findings that are not in the tables above, but in a test of their own, here or in
# test_trace_live.py and test_node_well.py.
ALONE = {"no-cluster-ip", "endpoints-not-written", "node-port-not-on-address", "gate-open",
         "gate-waiting", "not-synced", "dns-differs", "dns-no-answer", "rules-missing",
         "rules-differ", "dropped-by-other-rule", "stale-flow", "nobody-listens",
         "nothing-forwards"}  # fmt: skip


def test_every_finding_has_a_case() -> None:
    assert {one.id for one in BROKEN} | {one[0] for one in NOTED} | ALONE == set(FINDINGS)


# --- the documentation -------------------------------------------------------------------------


def test_every_finding_is_documented() -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "TRACE.md").read_text("utf-8")
    for id, (stage, means) in FINDINGS.items():
        assert f"| `{id}` | {stage} | {means} |" in page
    table = page.partition("## Findings")[2].splitlines()
    listed = {line.split("`")[1] for line in table if line.startswith("| `")}
    assert listed == set(FINDINGS)


def test_the_examples_in_the_documentation_are_real(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Path(__file__).resolve().parent.parent
    monkeypatch.chdir(project)
    monkeypatch.setenv("COLUMNS", "80")
    blocks = (project / "docs" / "TRACE.md").read_text("utf-8").split("```console\n")[1:]
    assert len(blocks) >= 4
    for block in blocks:
        command, _, expected = block.partition("```")[0].partition("\n")
        _, out, _ = run(capsys, *command.removeprefix("$ kdns trace ").split())
        assert out == expected, command
