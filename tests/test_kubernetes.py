"""The `kubernetes` plugin where the recordings do not reach: options, strict mode, sync."""

from __future__ import annotations

import msgspec
import pytest
from objects import endpoint, external, kubernetes, namespace, pod, service, slice_of, snapshot
from support import Stub, a, answer, build, directives, errors_of, make_setup, question

from kdns.dns import types as t
from kdns.dns.message import Reply
from kdns.dns.text import render_rr
from kdns.metrics import HistogramCell
from kdns.plugins.kubernetes import Kubernetes, setup
from kdns.plugins.plugin import Plugin
from kdns.registry.decode import TRIGGER_TIME
from kdns.registry.snapshot import everything

WEB = service("web", ports=[("http", 80, "TCP"), ("", 9090, "TCP")])
DB = service("db", ip="None", ports=[("pg", 5432, "TCP")])
DB_SLICE = slice_of(
    "db",
    endpoint("10.244.1.50", hostname="db-0", zone="z-a"),
    endpoint("10.244.2.50", hostname="db-1", zone="z-b"),
    {"addresses": ["10.244.2.51"], "conditions": {"ready": False, "serving": True}},
    ports=[("pg", 5432, "TCP")],
)


def ask(plugin: Plugin, name: str, qtype: str = "A") -> tuple[str, list[str]]:
    """(rcode or NODATA, answers without class) of one question."""
    reply = answer([plugin], question(name, qtype))
    lines = []
    for rr in reply.answer:
        words = render_rr(rr).split()
        lines.append(" ".join((words[0], words[1], *words[3:])))
    word = t.rcode_name(reply.rcode)
    return ("NODATA" if word == "NOERROR" and not lines else word), lines


@pytest.mark.parametrize(
    ("options", "name", "qtype", "rcode", "answers"),
    [
        ("namespaces prod", "web.default.svc.cluster.local.", "A", "NXDOMAIN", []),
        ("namespaces prod", "50.0.96.10.in-addr.arpa.", "PTR", "NXDOMAIN", []),
        ("namespace_labels env=prod", "web.default.svc.cluster.local.", "A", "NXDOMAIN", []),
        # namespace_labels does not filter PTR (reference 1.7)
        ("namespace_labels env=prod", "50.0.96.10.in-addr.arpa.", "PTR", "NOERROR",
         ["50.0.96.10.in-addr.arpa. 5 PTR web.default.svc.cluster.local."]),
        ("ignore empty_service", "web.default.svc.cluster.local.", "A", "NXDOMAIN", []),
        ("ignore empty_service", "db.default.svc.cluster.local.", "A", "NOERROR",
         ["db.default.svc.cluster.local. 5 A 10.244.1.50",
          "db.default.svc.cluster.local. 5 A 10.244.2.50"]),
        ("ttl 77", "web.default.svc.cluster.local.", "A", "NOERROR",
         ["web.default.svc.cluster.local. 77 A 10.96.0.50"]),
        ("zonal", "z-a.pin._zone.db.default.svc.cluster.local.", "A", "NOERROR",
         ["z-a.pin._zone.db.default.svc.cluster.local. 5 A 10.244.1.50"]),
        ("zonal", "z-x.pin._zone.db.default.svc.cluster.local.", "A", "NODATA", []),
        ("zonal", "z-x.prefer._zone.db.default.svc.cluster.local.", "A", "NOERROR",
         ["z-x.prefer._zone.db.default.svc.cluster.local. 5 A 10.244.1.50",
          "z-x.prefer._zone.db.default.svc.cluster.local. 5 A 10.244.2.50"]),
        ("zonal", "z-a.other._zone.db.default.svc.cluster.local.", "A", "NXDOMAIN", []),
        ("zonal", "z-a.pin._zone.web.default.svc.cluster.local.", "A", "NXDOMAIN", []),
        ("", "z-a.pin._zone.db.default.svc.cluster.local.", "A", "NXDOMAIN", []),
        ("pods insecure", "--ffff-102-304.default.pod.cluster.local.", "A", "NOERROR",
         ["--ffff-102-304.default.pod.cluster.local. 5 A 1.2.3.4"]),
    ],
)  # fmt: skip
def test_an_option_changes_the_answer(
    options: str, name: str, qtype: str, rcode: str, answers: list[str]
) -> None:
    plugin = kubernetes(options, WEB, DB, DB_SLICE)
    assert ask(plugin, name, qtype) == (rcode, answers)


@pytest.mark.parametrize(
    ("name", "qtype", "coredns", "strict"),
    [
        # DNS spec 2.3.2: SRV for named ports only.
        ("web.default.svc.cluster.local.", "SRV", 2, 1),
        # RFC 2308: NODATA, not NXDOMAIN, for another type at a name that exists.
        ("default.svc.cluster.local.", "TXT", "NXDOMAIN", "NODATA"),
        ("cluster.local.", "TXT", "NXDOMAIN", "NODATA"),
        ("dns-version.cluster.local.", "A", "NXDOMAIN", "NODATA"),
        # a name that does not exist does not exist for SOA either
        ("nosuch.default.svc.cluster.local.", "SOA", "NODATA", "NXDOMAIN"),
        # RFC 8020: empty non-terminals
        ("_tcp.web.default.svc.cluster.local.", "A", "NXDOMAIN", "NODATA"),
        ("_udp.web.default.svc.cluster.local.", "A", "NXDOMAIN", "NXDOMAIN"),
        ("0.96.10.in-addr.arpa.", "PTR", "NXDOMAIN", "NODATA"),
        ("7.96.10.in-addr.arpa.", "PTR", "NXDOMAIN", "NXDOMAIN"),
        # DNS spec 2.3.2: underscores belong to the name
        ("http.tcp.web.default.svc.cluster.local.", "SRV", 1, "NXDOMAIN"),
        # DNS spec 2.4.3: PTR for endpoints of headless Services, not of others
        ("9.1.244.10.in-addr.arpa.", "PTR", 1, "NXDOMAIN"),
        ("50.1.244.10.in-addr.arpa.", "PTR", 1, 1),
    ],
)  # fmt: skip
def test_strict_follows_the_specification_where_coredns_differs(
    name: str, qtype: str, coredns: int | str, strict: int | str
) -> None:
    objects = (WEB, slice_of("web", endpoint("10.244.1.9")), DB, DB_SLICE)
    for options, wanted in (("", coredns), ("spec strict", strict)):
        rcode, answers = ask(kubernetes(options, *objects), name, qtype)
        assert (len(answers) or rcode) == wanted, options


def test_strict_answers_any_type_at_an_external_name_with_its_cname() -> None:
    plugin = kubernetes("spec strict", external("out", "in.default.svc.cluster.local"))
    rcode, answers = ask(plugin, "out.default.svc.cluster.local.", "TXT")
    assert (rcode, len(answers)) == ("NOERROR", 1)


def test_a_missing_name_is_servfail_until_the_registry_was_listed() -> None:
    plugin = kubernetes("fallthrough", synced=False)
    below = Stub()
    for name in ("web.default.svc.cluster.local.", "1.0.96.10.in-addr.arpa."):
        reply = answer([plugin, below], question(name, "PTR"))
        assert t.rcode_name(reply.rcode) == "SERVFAIL"
        assert reply.keep == 0, "a SERVFAIL must not be repeated once the registry is there"
    assert not below.asked, "nothing of the cluster may leak to an upstream"
    assert ask(plugin, "cluster.local.", "A")[0] == "NODATA"
    assert plugin.not_ready()


def test_fallthrough_passes_on_what_would_be_nxdomain_and_nothing_else() -> None:
    plugin = kubernetes("fallthrough in-addr.arpa", WEB)
    below = Stub({("9.9.9.9.in-addr.arpa.", "PTR"): Reply(0, [a("x.", "192.0.2.1")])})
    assert answer([plugin, below], question("9.9.9.9.in-addr.arpa.", "PTR")).answer
    assert ask(plugin, "nosuch.default.svc.cluster.local.")[0] == "NXDOMAIN"
    assert ask(plugin, "web.default.svc.cluster.local.", "TXT")[0] == "NODATA"


def test_the_server_names_itself_by_the_service_it_stands_behind() -> None:
    dns = service("kube-dns", "kube-system", "10.96.0.10", ports=[("dns", 53, "UDP")])
    own = slice_of("kube-dns", endpoint("10.244.0.7"), ns="kube-system")
    local = (bytes([10, 244, 0, 7]),)
    plugin = kubernetes("", dns, own, namespace("kube-system"), local=local)
    reply = answer([plugin], question("cluster.local.", "NS"))
    assert [render_rr(r) for r in (*reply.answer, *reply.additional)] == [
        "cluster.local. 5 IN NS kube-dns.kube-system.svc.cluster.local.",
        "kube-dns.kube-system.svc.cluster.local. 5 IN A 10.96.0.10",
    ]
    assert ask(plugin, "ns.dns.cluster.local.")[1] == ["ns.dns.cluster.local. 5 A 10.96.0.10"]
    # CoreDNS: NODATA for an apex typed in mixed case (reference 1.2).
    assert ask(plugin, "Cluster.local.", "NS")[0] == "NODATA"


def test_a_server_without_a_service_names_its_own_addresses() -> None:
    plugin = kubernetes("", local=(bytes([192, 168, 77, 1]),))
    reply = answer([plugin], question("cluster.local.", "NS"))
    assert [render_rr(r) for r in (*reply.answer, *reply.additional)] == [
        "cluster.local. 5 IN NS ns.dns.cluster.local.",
        "ns.dns.cluster.local. 5 IN A 192.168.77.1",
    ]


def test_the_search_list_of_a_verified_pod() -> None:
    plugin = kubernetes("pods verified", pod("client", "10.244.1.7", "prod"), namespace("prod"))
    key = question("web.prod.svc.cluster.local.").key
    assert plugin.autopath_search("10.244.1.7", key) == [
        b"\x04prod\x03svc\x07cluster\x05local\x00",
        b"\x03svc\x07cluster\x05local\x00",
        b"\x07cluster\x05local\x00",
        b"\x00",
    ]
    assert plugin.autopath_search("10.244.1.8", key) is None


def test_a_zone_transfer_holds_every_service_between_two_soas() -> None:
    plugin = kubernetes("", WEB, DB, DB_SLICE, external("out", "example.com"))
    zone = question("cluster.local.").key
    found = plugin.transfer_records(zone)
    assert found is not None
    serial, records = found
    lines = [render_rr(r) for r in records]
    assert serial == 1700000000
    assert lines[0] == lines[-1] and " SOA " in lines[0]
    assert lines[1:-1] == [
        "db.default.svc.cluster.local. 5 IN A 10.244.1.50",
        "db-0.db.default.svc.cluster.local. 5 IN A 10.244.1.50",
        "_pg._tcp.db.default.svc.cluster.local. 5 IN SRV 0 50 5432 db-0.db.default.svc.cluster.local.",  # noqa: E501
        "db.default.svc.cluster.local. 5 IN A 10.244.2.50",
        "db-1.db.default.svc.cluster.local. 5 IN A 10.244.2.50",
        "_pg._tcp.db.default.svc.cluster.local. 5 IN SRV 0 50 5432 db-1.db.default.svc.cluster.local.",  # noqa: E501
        "out.default.svc.cluster.local. 5 IN CNAME example.com.",
        "web.default.svc.cluster.local. 5 IN A 10.96.0.50",
        "web.default.svc.cluster.local. 5 IN SRV 0 100 80 web.default.svc.cluster.local.",
        "_http._tcp.web.default.svc.cluster.local. 5 IN SRV 0 100 80 web.default.svc.cluster.local.",  # noqa: E501
        "web.default.svc.cluster.local. 5 IN SRV 0 100 9090 web.default.svc.cluster.local.",
    ]


def test_the_time_from_a_change_of_endpoints_to_its_answer_is_counted_once() -> None:
    cx = make_setup()
    cx.wall = lambda: 1763712000.0  # 2025-11-21T08:00:00Z
    (plugin,) = setup(directives("kubernetes cluster.local"), cx)
    assert isinstance(plugin, Kubernetes)

    def publish(trigger: str) -> None:
        one = slice_of("db", endpoint("10.244.1.50"))
        meta = msgspec.structs.replace(one.metadata, annotations={TRIGGER_TIME: trigger})
        db = service("db", ip="None", selector={"app": "db"})
        found = snapshot(db, msgspec.structs.replace(one, metadata=meta))
        plugin.publish(found, everything(found), 0.0)

    publish("2025-11-21T07:00:00Z")  # listed at start: says nothing of the speed
    family = cx.metrics.families["coredns_kubernetes_dns_programming_duration_seconds"]
    assert not family.cells
    for trigger in ("2025-11-21T07:59:58Z", "2025-11-21T07:59:58Z", "yesterday"):
        publish(trigger)
    cell = family.labels("headless_with_selector")
    assert isinstance(cell, HistogramCell)
    assert (sum(cell.counts), cell.sum) == (1, 2.0)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ("ttl 4000", "ttl must be in range [0, 3600]: 4000"),
        ("ttl x", "ttl must be a number, found 'x'"),
        (
            "pods veryfied",
            "wrong value for pods: veryfied, must be one of: disabled, verified, insecure",
        ),
        ("fallthru", "unknown property 'fallthru', did you mean 'fallthrough'?"),
        (
            "namespaces a\nnamespace_labels b=c",
            "namespaces and namespace_labels cannot both be set",
        ),
        ("zonal\nnoendpoints", "zonal requires the endpoints; remove noendpoints"),
        ("ignore x", "unable to parse ignore value: 'x'; use 'ignore empty_service'"),
        ("labels a in (", "unable to parse labels"),
        ("manifests m\nkubeconfig k", "'kubeconfig' names an API server, 'manifests' replaces one"),
        ("upstream 1.2.3.4", "warning: 'upstream' is gone"),
        ("resyncperiod 5m", "warning: 'resyncperiod' is gone"),
    ],
)
def test_a_mistake_is_named_with_its_line(options: str, error: str) -> None:
    found = errors_of(f"kubernetes cluster.local {{\n{options}\n}}")
    assert any(error in line and line.startswith("Corefile:") for line in found), found


def test_only_reverse_zones_are_refused() -> None:
    assert "non-reverse zone name must be used" in errors_of("kubernetes 10.0.0.0/8")[0]


def test_a_cidr_becomes_reverse_zones() -> None:
    cx = make_setup()
    (plugin,) = build("kubernetes cluster.local 10.96.0.0/15", cx)
    assert len(plugin.zones) == 3  # type: ignore[attr-defined]
