"""Answers that explain themselves (RFC 8914): which code and text stands in which answer, that it
costs nothing where nobody asked for it, and that it is never out of date."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dns.edns
import dns.message
import pytest
from explained import EDNS, asking, reason
from hypothesis import given, settings
from hypothesis import strategies as st
from objects import (
    endpoint,
    external,
    imported_slice,
    kubernetes,
    namespace,
    pod,
    service,
    service_import,
    slice_of,
    snapshot,
)
from support import FakeClock, Stub, a, answer, build, errors_of, make_setup, question, run

from kdns.dns import types as t
from kdns.dns.ede import Ede, render_ede
from kdns.dns.message import (
    FOREVER,
    TC,
    Edns,
    Query,
    Reply,
    parse_query,
    render_query,
    render_reply,
)
from kdns.dns.name import ROOT, parse_name
from kdns.plugins.chain import Chain, Pending, Router
from kdns.plugins.kubernetes import Kubernetes
from kdns.plugins.plugin import Outcome, Plugin
from kdns.registry.snapshot import Changes, everything
from kdns.server.packetcache import PacketCache
from kdns.zone.cluster import describe_dep
from kdns.zone.nearest import distance

NOT_READY = {"conditions": {"ready": False}}
WORLD = (
    namespace("prod"),
    namespace("staging"),
    service("web", ports=[("http", 80, "TCP"), ("metrics", 9090, "TCP")]),
    slice_of("web", endpoint("10.244.1.1", hostname="web-0"), endpoint("10.244.1.2", **NOT_READY)),
    service("frontend", selector={"app": "frontend"}),
    service("cart", ip="10.96.0.51"),
    slice_of("cart", *(endpoint(f"10.244.2.{n}", **NOT_READY) for n in range(3))),
    service("db", ip="None", ports=[("pg", 5432, "TCP")]),
    slice_of("db", *(endpoint(f"10.244.3.{n}", **NOT_READY) for n in range(3))),
    service("bare", ip="None", ports=[]),
    slice_of("bare", endpoint("10.244.4.1"), ports=()),
    service("six", ip="fd00::1"),
    service("new", ip=""),
    external("ext", "www.example.com"),
    external("literal", "192.0.2.1"),
    external("inside", "gone.default.svc.cluster.local"),
    service("orders", ns="prod"),
    service("only", ns="prod"),
    service("only", ns="staging"),
    pod("p", "10.244.1.9"),
)
SVC = "svc.cluster.local"


def why(plugins: list[Plugin] | Plugin, name: str, qtype: str = "A", **more: Any) -> str:
    """Return code and text of the extended error in an answer to a question with EDNS."""
    chain = plugins if isinstance(plugins, list) else [plugins]
    return reason(answer(chain, asking(name, qtype, **more)))


def cluster(text: str, *objects: Any) -> list[Plugin]:
    """Return the plugins of a Corefile, whose `kubernetes` has these objects."""
    plugins = build(text)
    publish(plugins, *objects)
    return plugins


def publish(plugins: list[Plugin], *objects: Any) -> None:
    now = snapshot(*objects)
    for plugin in plugins:
        if isinstance(plugin, Kubernetes):
            plugin.publish(now, everything(now), 0.0)


# --- names of the cluster -----------------------------------------------------------------

CASES = [
    # no such Service
    ("", f"wbe.default.{SVC}.", "A", "0 no Service wbe in namespace default; nearest: web"),
    ("", f"frontnd.default.{SVC}.", "A",
     "0 no Service frontnd in namespace default; nearest: frontend"),
    ("", f"web-v2.default.{SVC}.", "A", "0 no Service web-v2 in namespace default; nearest: web"),
    ("", f"orders.default.{SVC}.", "A",
     "0 no Service orders in namespace default; namespace prod has one"),
    ("", f"only.default.{SVC}.", "A",
     "0 no Service only in namespace default; namespaces prod, staging have one"),
    ("namespaces default prod", f"only.default.{SVC}.", "A",
     "0 no Service only in namespace default; namespace prod has one"),
    ("", f"zzz.default.{SVC}.", "A", "0 no Service zzz in namespace default"),
    ("", f"WBE.Default.{SVC}.", "A", "0 no Service wbe in namespace default; nearest: web"),
    ("", f"a\\.b.default.{SVC}.", "A", "0 no Service a\\.b in namespace default"),
    # no such namespace
    ("", f"web.defautl.{SVC}.", "A", "0 no namespace defautl; nearest: default"),
    ("", f"web.nowhere.{SVC}.", "A", "0 no namespace nowhere"),
    ("namespaces default", f"orders.pord.{SVC}.", "A", "0 no namespace pord"),
    ("", f"default.web.{SVC}.", "A",
     "0 no namespace web; did you mean web.default.svc.cluster.local"),
    ("", f"orders.{SVC}.", "A",
     "0 no namespace orders; did you mean orders.prod.svc.cluster.local"),
    ("", f"default.{SVC}.", "A",
     "0 default is a namespace; its Services are NAME.default.svc.cluster.local"),
    # names that lack a part
    ("", "web.default.cluster.local.", "A", "0 did you mean web.default.svc.cluster.local"),
    ("", "web.default.scv.cluster.local.", "A", "0 did you mean web.default.svc.cluster.local"),
    ("", "_http._tcp.web.default.cluster.local.", "SRV",
     "0 did you mean _http._tcp.web.default.svc.cluster.local"),
    ("", "orders.cluster.local.", "A", "0 did you mean orders.prod.svc.cluster.local"),
    ("", "www.example.com.cluster.local.", "A",
     "0 Services are NAME.NAMESPACE.svc.cluster.local"),
    ("", f"web.default.{SVC}.default.{SVC}.", "A",
     "0 a search list was added to a whole name; end names with a dot"),
    # endpoints
    ("", f"web.default.{SVC}.", "A", ""),
    ("", f"cart.default.{SVC}.", "A", "0 Service default/cart: 0 of 3 endpoints ready"),
    ("", f"cart.default.{SVC}.", "SRV", "0 Service default/cart: 0 of 3 endpoints ready"),
    ("", f"frontend.default.{SVC}.", "A",
     "0 Service default/frontend has no endpoints; does its selector match a Pod"),
    ("", f"orders.prod.{SVC}.", "A", "0 Service prod/orders has no endpoints"),
    ("", f"db.default.{SVC}.", "A", "0 Service default/db: 0 of 3 endpoints ready"),
    ("", f"_pg._tcp.db.default.{SVC}.", "SRV", "0 Service default/db: 0 of 3 endpoints ready"),
    ("ignore empty_service", f"cart.default.{SVC}.", "A",
     "0 Service default/cart: 0 of 3 endpoints ready"),
    ("noendpoints", f"cart.default.{SVC}.", "A", ""),
    ("noendpoints", f"db.default.{SVC}.", "A", "0 endpoints have no names here ('noendpoints')"),
    ("", f"web-1.web.default.{SVC}.", "A",
     "0 Service default/web has no ready endpoint web-1 (1 of 2 ready)"),
    ("", f"web-0.web.default.{SVC}.", "AAAA", "0 endpoint web-0 has no IPv6 address"),
    # ports
    ("", f"_htp._tcp.web.default.{SVC}.", "SRV",
     "0 Service default/web has no port _htp._tcp; it has _http._tcp, _metrics._tcp"),
    ("", f"_http._udp.web.default.{SVC}.", "SRV",
     "0 Service default/web has no port _http._udp; it has _http._tcp, _metrics._tcp"),
    ("", f"_http.web.default.{SVC}.", "SRV",
     "0 names of ports have two labels, _PORT._PROTOCOL; it has _http._tcp, _metrics._tcp"),
    ("", f"bare.default.{SVC}.", "SRV", "0 Service default/bare declares no ports"),
    ("", f"a.b.c.web.default.{SVC}.", "A", "0 no name that long belongs to Service default/web"),
    # families and types
    ("", f"web.default.{SVC}.", "AAAA", "0 Service default/web has IPv4 addresses only"),
    ("", f"six.default.{SVC}.", "A", "0 Service default/six has IPv6 addresses only"),
    ("", f"new.default.{SVC}.", "A", "0 Service default/new has no IP address yet"),
    ("", f"web.default.{SVC}.", "MX", ""),
    ("", f"nosuch.default.{SVC}.", "SOA", ""),
    # ExternalName
    ("", f"literal.default.{SVC}.", "A",
     "0 the externalName of Service default/literal is no DNS name"),
    ("", f"inside.default.{SVC}.", "A",
     "0 target gone.default.svc.cluster.local of Service default/inside: no Service gone in"
     " namespace default"),
    ("", f"ext.default.{SVC}.", "MX",
     "0 Service default/ext is an ExternalName: ask for A, AAAA or CNAME"),
    ("", f"a.ext.default.{SVC}.", "A",
     "0 Service default/ext is an ExternalName; no names lie below it"),
    # Pods
    ("", "10-244-1-9.default.pod.cluster.local.", "A",
     "21 names of Pods are off ('pods disabled')"),
    ("pods verified", "10-244-1-8.default.pod.cluster.local.", "A",
     "0 no Pod in namespace default has the address 10.244.1.8"),
    ("pods verified", "10-244-1-9.default.pod.cluster.local.", "AAAA",
     "0 10.244.1.9 is no IPv6 address"),
    ("pods insecure", "10-244-1.default.pod.cluster.local.", "A",
     "0 10-244-1 stands for no IP address"),
    # reverse names, transfer, names of the zone itself
    ("", "99.0.96.10.in-addr.arpa.", "PTR",
     "0 no Service and no endpoint has the address 10.96.0.99"),
    ("", "50.0.96.10.in-addr.arpa.", "A", "0 the name of an address has a PTR record or none"),
    ("", "cluster.local.", "AXFR", "18 transfer of this zone is not allowed here"),
    ("", "cluster.local.", "A", ""),
    ("", "dns-version.cluster.local.", "A", ""),
]  # fmt: skip


@pytest.mark.parametrize(("options", "name", "qtype", "expected"), CASES)
def test_reasons(options: str, name: str, qtype: str, expected: str) -> None:
    plugin = kubernetes(options, *WORLD)
    assert why(plugin, name, qtype) == expected
    assert len(expected) <= 202, "code, blank and 200 octets"


@pytest.mark.parametrize(("options", "name", "qtype", "expected"), CASES)
def test_without_edns_there_is_no_reason_and_the_answer_is_the_same(
    options: str, name: str, qtype: str, expected: str
) -> None:
    plugin = kubernetes(options, *WORLD)
    plain = answer([plugin], question(name, qtype))
    told = answer([plugin], asking(name, qtype))
    assert plain.ede is None and plain.why is None
    for part in ("rcode", "flags", "answer", "authority", "additional", "keep"):
        assert getattr(plain, part) == getattr(told, part), part


def test_what_was_not_listed_yet_is_not_ready() -> None:
    plugin = kubernetes("", *WORLD, synced=False)
    name = f"nosuch.default.{SVC}."
    assert why(plugin, name) == "14 Services and EndpointSlices have not been listed yet"


def test_reasons_of_a_cluster_set() -> None:
    plugin = kubernetes(
        "multicluster clusterset.local",
        service_import("shop", ips=("10.99.0.1",)),
        imported_slice("shop", "east", endpoint("10.1.0.1", **NOT_READY)),
        service("shops"),
        zones="cluster.local clusterset.local",
    )
    zone = "default.svc.clusterset.local."
    assert why(plugin, f"shpo.{zone}") == (
        "0 no ServiceImport shpo in namespace default; nearest: shop"
    )
    assert why(plugin, f"shop.{zone}") == "0 ServiceImport default/shop: 0 of 1 endpoints ready"
    assert why(plugin, f"shop.{zone}", "AAAA") == (
        "0 ServiceImport default/shop has IPv4 addresses only"
    )


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (Reply(t.NXDOMAIN), "0 ExternalName target www.example.com: NXDOMAIN"),
        (Reply(t.NOERROR), "0 ExternalName target www.example.com: no such record"),
        (Reply(t.NOERROR, [a("www.example.com.", "192.0.2.1")]), ""),
    ],
)
def test_the_target_of_an_external_name(target: Reply, expected: str) -> None:
    plugin = kubernetes("", *WORLD)
    below = Stub({("www.example.com.", "A"): target})
    assert why([plugin, below], f"ext.default.{SVC}.") == expected


def test_a_name_that_falls_through_has_the_reasons_of_who_answers() -> None:
    plugin = kubernetes("fallthrough", *WORLD)
    name = f"nosuch.default.{SVC}."
    assert why([plugin, Stub()], name) == ""
    found = Stub({(name, "A"): Reply(answer=[a(name, "192.0.2.1")])})
    assert why([plugin, found], name) == ""


# --- the gate -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "state", "expected"),
    [
        ("nosuch", "waiting",
         "14 Service default/nosuch is new: its rules are not in the kernel yet"),
        ("web", "open",
         "0 Service default/web is shown though its rules are not in the kernel yet"),
        ("web", "waiting", ""),
        ("web", "", ""),
    ],
)  # fmt: skip
def test_the_gate(name: str, state: str, expected: str) -> None:
    plugin = kubernetes("", *WORLD)
    plugin.gate_state = lambda key: state if key == ("default", name) else ""
    reply = answer([plugin], asking(f"{name}.default.{SVC}."))
    assert reason(reply) == expected
    # What is true only now is not repeated.
    assert reply.keep == (0.0 if expected else FOREVER)


# --- the nearest names --------------------------------------------------------------------

NAMES = st.lists(
    st.text("abx-", min_size=1, max_size=8).filter(lambda s: s.strip("-") == s), max_size=30
)


def near(plugin: Kubernetes, name: str) -> list[bytes]:
    return plugin.records.near_services(b"default", name.encode(), False)[0]


@settings(max_examples=150, deadline=None)
@given(st.lists(NAMES, max_size=5), st.lists(st.text("abx-", min_size=1, max_size=8), min_size=1))
def test_names_by_likeness_are_those_of_an_index_made_from_scratch(
    worlds: list[list[str]], asked: list[str]
) -> None:
    plugin = kubernetes("")
    before: set[str] = set()
    for names in worlds:
        there = set(names)
        now = snapshot(*(service(name) for name in there))
        changes = Changes(services=frozenset(("default", name) for name in there ^ before))
        plugin.publish(now, changes, 0.0)
        before = there
        scratch = kubernetes("", *(service(name) for name in there))
        for name in asked:
            assert near(plugin, name) == near(scratch, name)


def test_one_mistake_among_ten_thousand_names() -> None:
    words = "api web cart order billing search mail report".split()
    names = [f"{words[n % 8]}-{words[n // 8 % 8]}-{n}" for n in range(10_000)]
    plugin = kubernetes(
        "", *(service(name, ip=f"10.97.{n // 256}.{n % 256}") for n, name in enumerate(names))
    )
    tried = hits = 0
    for name in names[::499]:
        for at in range(0, len(name), 3):
            found = near(plugin, name[:at] + "q" + name[at:])
            assert name.encode() in found or len(found) == 3, "a letter too many is always found"
            for wrong in (name[:at] + name[at + 1 :], name[:at] + "q" + name[at + 1 :]):
                found = near(plugin, wrong)
                # Only some names are looked at: mostly one is near, and what is told is near.
                assert {distance(wrong.encode(), one, 2) for one in found} <= {1, 2}
                tried, hits = tried + 1, hits + bool(found)
    assert hits > 0.9 * tried, (hits, tried)


# --- in the message -----------------------------------------------------------------------


def test_the_option_as_others_read_it() -> None:
    plugin = kubernetes("", *WORLD)
    query = question(f"wbe.default.{SVC}.", edns=Edns(1232, True, options=[(10, b"12345678")]))
    message = dns.message.from_wire(render_reply(query, answer([plugin], query)))
    cookie, ede = message.options
    assert int(cookie.otype) == 10
    assert isinstance(ede, dns.edns.EDEOption)
    text = "no Service wbe in namespace default; nearest: web"
    assert (int(ede.code), ede.text) == (0, text)


@pytest.mark.parametrize(
    ("text", "octets"),
    [("", 0), ("x" * 200, 200), ("x" * 201, 200), ("é" * 150, 199), ("…" * 70, 198)],
)
def test_texts_are_bounded_and_whole_characters(text: str, octets: int) -> None:
    code, wire = render_ede(Ede(22, text))
    assert (code, wire[:2], len(wire) - 2) == (15, b"\0\x16", octets)
    wire[2:].decode()


@given(st.integers(1, 40), st.integers(1, 200), st.sampled_from([512, 600, 1232]))
def test_a_reason_never_costs_a_record(records: int, text: int, size: int) -> None:
    name = f"many.default.{SVC}."
    query = question(name, edns=Edns(size))
    reply = Reply(answer=[a(name, f"10.0.0.{n}") for n in range(records)])
    plain = dns.message.from_wire(render_reply(query, reply))
    reply.ede = Ede(0, "x" * text)
    wire = render_reply(query, reply)
    told = dns.message.from_wire(wire)
    assert len(wire) <= size
    assert (told.flags, told.answer) == (plain.flags, plain.answer)
    if told.flags & TC:
        assert told.options == ()


def test_an_upstreams_own_reason_is_passed_on_as_it_came() -> None:
    query = asking("www.example.com.")
    reply = Reply(t.SERVFAIL, flags=0)
    reply.edns = Edns(1232, options=[(15, b"\0\x06bogus"), (3, b"ns1")])
    message = dns.message.from_wire(render_reply(query, reply))
    assert [int(option.otype) for option in message.options] == [15, 3]


# --- other plugins ------------------------------------------------------------------------


def test_no_block_no_plugin_no_class() -> None:
    router = Router(
        {parse_name("b.test."): Chain([Stub()]), parse_name("a.test."): Chain([Stub()])}
    )

    def ask(query: Query) -> str:
        reply = router.resolve(query)
        assert isinstance(reply, Reply)
        return reason(reply)

    assert ask(asking("example.org.")) == (
        "20 no server block here is for this name, only for a.test., b.test."
    )
    assert ask(question("example.org.")) == ""
    assert ask(asking("version.bind.", "TXT", qclass="CH")) == ("21 only class IN is answered here")
    assert ask(question("x.a.test.", edns=Edns(1232, version=1))) == "", "BADVERS"
    assert why(build("log"), "a.test.") == (
        "20 no plugin of this server block answers for the name"
    )


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("block", "15 blocked by a rule of acl for example.org."),
        ("filter", "17 filtered by a rule of acl for example.org."),
        ("block net 10.0.0.0/8", "15 blocked by a rule of acl for example.org. for this client"),
        ("allow", ""),
    ],
)
def test_acl(rule: str, expected: str) -> None:
    plugins = [*build(f"acl example.org {{\n{rule}\n}}"), Stub()]
    query = asking("example.org.", client="10.0.0.1")
    reply = answer(plugins, query)
    assert reason(reply) == expected
    options = dns.message.from_wire(render_reply(query, reply)).options
    assert len(options) == (1 if expected else 0), "CoreDNS's own option is not there twice"


class Below(Plugin):
    """Answers as it is told."""

    def __init__(self, outcome: Callable[[], Outcome]) -> None:
        self.outcome = outcome

    def on_query(self, query: Query) -> Outcome:
        return self.outcome()


SOA = kubernetes("")._soa_record(parse_name("cluster.local."))


@pytest.mark.parametrize(
    ("reply", "age", "expected"),
    [
        (Reply(answer=[a("x.test.", "192.0.2.1", 30)]), 10, ""),
        (Reply(answer=[a("x.test.", "192.0.2.1", 30)]), 42,
         "3 expired 12 s ago; no newer answer is there yet"),
        (Reply(t.NXDOMAIN, authority=[SOA.with_ttl(30)]), 42,
         "19 expired 12 s ago; no newer answer is there yet"),
        (Reply(t.SERVFAIL, served_by="forward"), 1,
         "13 SERVFAIL of the upstream, kept from an earlier question"),
    ],
)  # fmt: skip
def test_cached_answers(reply: Reply, age: int, expected: str) -> None:
    clock = FakeClock()
    cx = make_setup(clock=clock)
    plugins = [*build("cache {\n serve_stale 1h\n}", cx), Below(reply.copy)]
    answer(plugins, question("x.test."))
    clock.now += age
    plugins[-1] = Below(lambda: None)
    assert why(plugins, "x.test.") == expected
    assert reason(answer(plugins, question("x.test."))) == ""


def test_a_cached_denial_is_explained_to_those_who_want_it() -> None:
    """One entry serves who asks with EDNS and who asks without; the reason is today's."""
    plugins = cluster("cache 30\nkubernetes cluster.local", service("other"))
    name = f"wbe.default.{SVC}."
    router = Router({ROOT: Chain(plugins)})
    first = router.resolve(question(name))
    assert isinstance(first, Reply) and first.served_by == "kubernetes" and first.ede is None
    publish(plugins, service("web"))
    second = router.resolve(asking(name))
    assert isinstance(second, Reply) and second.served_by == "cache"
    assert reason(second) == "0 no Service wbe in namespace default; nearest: web"
    assert ("names", b"default") in second.deps


def test_a_cache_forgets_an_alias_within_one_namespace() -> None:
    """Its answer has the namespace among its deps twice."""
    plugins = cluster(
        "cache 30\nkubernetes cluster.local",
        service("web"),
        external("alias", f"web.default.{SVC}"),
    )
    for served_by in ("kubernetes", "cache"):
        assert answer(plugins, question(f"alias.default.{SVC}.")).served_by == served_by
    plugins[0].invalidate([(b"default", b"web")])  # type: ignore[attr-defined]
    assert answer(plugins, question(f"alias.default.{SVC}.")).served_by == "kubernetes"


def test_autopath_gives_the_reason_for_the_clients_own_name() -> None:
    plugins = cluster(
        "autopath @kubernetes\nkubernetes cluster.local {\npods verified\n}",
        service("web"),
        pod("p", "10.244.1.9"),
    )
    below = Stub({("www.test.", "A"): Reply(answer=[a("www.test.", "192.0.2.1")])})
    for name, expected in (
        ("www.test", ""),
        ("wbe", "0 no Service wbe in namespace default; nearest: web"),
    ):
        query = asking(f"{name}.default.{SVC}.", client="10.244.1.9")
        assert reason(answer([*plugins, below], query)) == expected


def test_rewrite_gives_the_reason_of_the_answer() -> None:
    text = f"rewrite name shop.test. wbe.default.{SVC}.\nkubernetes cluster.local"
    plugins = cluster(text, service("web"))
    assert why(plugins, "shop.test.").endswith("nearest: web")


# --- explain off --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "qtype"),
    [
        ("kubernetes cluster.local", f"nosuch.default.{SVC}.", "A"),
        ("kubernetes cluster.local\ncache", f"nosuch.default.{SVC}.", "A"),
        ("acl {\nblock\n}", "x.test.", "A"),
        ("log", "x.test.", "A"),
        ("forward . no-such-resolv.conf", "x.test.", "A"),
    ],
)
def test_explain_off(text: str, name: str, qtype: str) -> None:
    first = why(cluster(text, service("web")), name, qtype)
    second = why(cluster(f"{text}\nexplain off", service("web")), name, qtype)
    assert (bool(first), second) == (True, "")
    again = why(build(f"{text}\nexplain on"), name, qtype)
    assert again.split()[0] in (first.split()[0], "14")  # 14: nothing is listed in this one


def test_a_block_that_only_explains_refuses_as_an_empty_one() -> None:
    reply = Router({ROOT: Chain(build("explain on"))}).resolve(question("a.test."))
    assert isinstance(reply, Reply) and reply.rcode == t.REFUSED


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("explain", "'explain' needs an argument, found none"),
        ("explain of", "'explain' takes on or off, found 'of', did you mean 'off'?"),
        ("explain on off", "unexpected 'off' after 'explain'"),
        ("explain on\nexplain off", "only be used once"),
        ("explain on {\nloud\n}", "unknown property 'loud'"),
    ],
)
def test_mistakes_in_the_corefile(text: str, expected: str) -> None:
    assert expected in "\n".join(errors_of(text))


# --- never out of date --------------------------------------------------------------------

EVENT_NAMES = ("web", "wbe", "web-v2", "api", "apj")
NAMESPACES = ("default", "prod", "prot")
EVENT = st.tuples(
    st.sampled_from(("service", "headless", "external", "slice", "gone", "namespace", "no slice")),
    st.sampled_from(NAMESPACES),
    st.sampled_from(EVENT_NAMES),
    st.integers(0, 3),
)
QUESTIONS = [
    *(f"{name}.{ns}.{SVC}." for name in EVENT_NAMES for ns in NAMESPACES),
    *(f"{name}.{ns}.cluster.local." for name in ("web", "api") for ns in NAMESPACES),
    f"_http._tcp.web.default.{SVC}.", f"x.web.default.{SVC}.", f"a.b.c.web.default.{SVC}.",
    "web.cluster.local.", f"web.{SVC}.", f"prod.web.{SVC}.", f"web.prdo.{SVC}.",
    f"prod.{SVC}.", "10-0-0-1.prod.pod.cluster.local.", "1.0.96.10.in-addr.arpa.",
]  # fmt: skip
OPTIONS = ("", "ignore empty_service", "spec strict", "namespaces default prod", "noendpoints")


class Clients:
    """A listener's way from octets to octets, with everything that keeps answers."""

    def __init__(self, text: str) -> None:
        self.plugins = build(text)
        self.router = Router({ROOT: Chain(self.plugins)})
        self.cache = PacketCache()

    def publish(self, now: Any, changes: Changes) -> None:
        for plugin in self.plugins:
            if isinstance(plugin, Kubernetes):
                deps = plugin.publish(now, changes, 0.0)
        for plugin in self.plugins:
            if plugin.word == "cache":
                plugin.invalidate(deps)  # type: ignore[attr-defined]
        if deps is None:
            self.cache.clear()
        else:
            self.cache.drop(deps)

    def ask(self, name: str, qtype: int, edns: Edns | None) -> bytes:
        wire = render_query(7, parse_name(name), qtype, edns=edns)
        entry = self.cache.young.entries.get(wire[2:]) or self.cache.find_other(wire)
        kept = self.cache.repeat(entry, wire, 0.0) if entry is not None else None
        if kept is not None:
            return kept
        query = parse_query(wire, ("127.0.0.1", 5), "udp", 0.0)
        reply = self.router.resolve(query)
        assert isinstance(reply, Reply)
        out = render_reply(query, reply)
        if reply.keep > 0:
            self.cache.keep(wire, query, out, reply, 0.0)
        return out


def told(wire: bytes) -> Any:
    message = dns.message.from_wire(wire)
    return message.rcode(), message.answer, [option.to_text() for option in message.options]


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(OPTIONS),
    st.sampled_from(("", "cache 30")),
    st.lists(EVENT, min_size=1, max_size=8),
    st.lists(
        st.tuples(st.sampled_from(QUESTIONS), st.sampled_from((t.A, t.AAAA, t.SRV, t.PTR))),
        min_size=1, max_size=12,
    ),
)  # fmt: skip
def test_reasons_are_those_of_now_whatever_happened_before(
    options: str, cache: str, events: list[tuple[Any, ...]], questions: list[tuple[str, int]]
) -> None:
    check_history(options, cache, events, questions)


# Labels as long as each other, so that names made of them are often told one reason for all; some
# stand for a Service, a namespace, or both.
ALIKE = ("svc", "web", "api", "prd", "com")
ALIKE_EVENT = st.tuples(
    st.sampled_from(("service", "service", "external", "gone", "namespace", "namespace")),
    st.sampled_from(("prd", "dev", "web")),
    st.sampled_from(("web", "api", "com", "prd")),
    st.integers(0, 3),
)
ENDS = ("svc", "prd.svc", "dev.svc", "web.svc", "com.svc", "api.prd.svc", "prd", "web", "com",
        "api.prd", "svc.com.prd.svc", "pod", "prd.pod")  # fmt: skip
# Names of as many labels that end alike.
ALIKE_NAMES = st.tuples(st.sampled_from(ENDS), st.integers(1, 4)).flatmap(
    lambda kind: st.lists(
        st.lists(st.sampled_from(ALIKE), min_size=kind[1], max_size=kind[1]).map(
            lambda front: ".".join((*front, kind[0], "cluster.local."))
        ),
        min_size=2, max_size=8, unique=True,
    )
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from((*OPTIONS, "pods insecure", "pods verified", "zonal")),
    st.lists(ALIKE_EVENT, min_size=1, max_size=6),
    st.lists(ALIKE_NAMES, min_size=1, max_size=4),
    st.sampled_from((t.A, t.A, t.TXT)),
)
def test_names_that_are_told_one_reason_have_that_reason(
    options: str, events: list[tuple[Any, ...]], names: list[list[str]], qtype: int
) -> None:
    check_history(options, "", events, [(name, qtype) for group in names for name in group])


# Names of as many labels that end alike, and yet are told other reasons; what happened before.
UNLIKE: dict[str, tuple[list[tuple[str, str, str]], list[str]]] = {
    "a search list added to one of them": (
        [], ["aaa.api.web.com.prd.svc", "aaa.api.svc.com.prd.svc", "svc.api.aaa.com.prd.svc"],
    ),
    "the other way round": (
        [("namespace", "prd", ""), ("service", "prd", "com"), ("gone", "prd", "com"),
         ("service", "prd", "com"), ("namespace", "web", ""), ("service", "web", "com")],
        ["aaa.abc.com.svc", "aaa.web.com.svc", "aaa.prd.com.svc"],
    ),
    "without svc": (
        [("namespace", "prd", ""), ("service", "prd", "web")],
        ["aaa.api.prd.com", "aaa.web.prd.com", "aaa.api.prd", "aaa.web.prd"],
    ),
    "without svc, in a namespace that comes": (
        [("service", "prd", "web"), ("namespace", "prd", "")],
        ["aaa.api.prd.com", "aaa.web.prd.com"],
    ),
    "in a namespace that comes and goes": (
        [("namespace", "prd", ""), ("namespace", "prd", "")],
        ["a.b.c.d.prd.pod", "a.b.c.e.prd.pod", "a.b.c.d.prd.svc", "a.b.c.e.prd.svc"],
    ),
    "a Service that comes and goes": (
        [("namespace", "prd", ""), ("service", "prd", "web"), ("gone", "prd", "web")],
        [f"{front}.{end}.prd.svc" for end in ("api", "web")
         for front in ("a.b.c", "a.b.d", "_h._tcp", "_w._tcp", "aaaaa", "bbbbb")],
    ),
    "a Service of the namespace's name that comes": (
        [("namespace", "web", ""), ("service", "web", "com"), ("gone", "web", "com")],
        ["aaa.api.com.svc", "aaa.web.com.svc", "api.com.svc", "web.com.svc"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNLIKE)
def test_names_that_end_alike_and_have_reasons_of_their_own(case: str) -> None:
    events, names = UNLIKE[case]
    for options in ("", "pods insecure", "zonal"):
        check_history(
            options, "", [("gone", "default", "api", 0), *((*event, 0) for event in events)],
            [(f"{name}.cluster.local.", t.A) for name in (*names, *names[::-1])],
        )  # fmt: skip


@pytest.mark.parametrize("cache", ["", "cache 30"])
@pytest.mark.parametrize(
    ("question", "events"),
    [
        ("a nearer name comes and goes",
         [("service", "default", "web"), ("gone", "default", "web")]),
        ("another namespace has one",
         [("service", "prod", "wbe"), ("namespace", "prod", ""), ("namespace", "prot", ""),
          ("service", "prot", "wbe"), ("gone", "prod", "wbe")]),
        ("a namespace with one is hidden and shown",
         [("namespace", "prod", ""), ("service", "prod", "wbe"), ("namespace", "prod", ""),
          ("namespace", "prod", "")]),
        ("a nearer namespace comes", [("namespace", "prod", ""), ("namespace", "prot", "")]),
        ("the other way round",
         [("service", "prod", "web"), ("namespace", "prod", ""), ("gone", "prod", "web")]),
        ("endpoints come and go",
         [("service", "default", "wbe"), ("slice", "default", "wbe", 1),
          ("slice", "default", "wbe", 2), ("slice", "default", "wbe", 3),
          ("no slice", "default", "wbe"), ("gone", "default", "wbe")]),
    ],
)  # fmt: skip
def test_what_a_reason_must_not_outlive(
    question: str, events: list[tuple[Any, ...]], cache: str
) -> None:
    asked = [
        f"wbe.default.{SVC}.", f"wbe.prdo.{SVC}.", f"wbe.{SVC}.", f"a.b.c.wbe.default.{SVC}.",
        f"prod.web.{SVC}.", "wbe.default.cluster.local.", "wbe.prod.cluster.local.",
        "wbe.cluster.local.",
    ]  # fmt: skip
    check_history("", cache, [(*one, 0)[:4] for one in events], [(name, t.A) for name in asked])


def check_history(
    options: str, cache: str, events: list[tuple[Any, ...]], questions: list[tuple[str, int]]
) -> None:
    """Hold every answer after each event against that of a server started then."""
    text = f"kubernetes cluster.local in-addr.arpa {{\n{options}\n}}"
    clients = Clients(f"{text}\n{cache}")
    world: dict[tuple[str, str, str], Any] = {}
    there = {"default"}
    now = snapshot()
    clients.publish(now, everything(now))
    for kind, ns, name, number in events:
        changes = Changes(services=frozenset({(ns, name)}))
        key = ("service", ns, name)
        if kind == "namespace":
            there.symmetric_difference_update({ns})
            changes = Changes(namespaces=frozenset({ns}))
        elif kind == "gone":
            world.pop(key, None)
        elif kind == "service":
            world[key] = service(name, ns=ns, ip=f"10.96.0.{number + 1}")
        elif kind == "headless":
            world[key] = service(name, ns=ns, ip="None")
        elif kind == "external":
            world[key] = external(name, f"{EVENT_NAMES[number]}.{ns}.{SVC}", ns=ns)
        elif kind == "slice":
            found = [endpoint(f"10.1.0.{n}", conditions={"ready": n == 2}) for n in range(number)]
            world["slice", ns, name] = slice_of(name, *found, ns=ns)
        else:
            world.pop(("slice", ns, name), None)
        now = snapshot(*world.values())
        now.namespaces.clear()  # type: ignore[attr-defined]
        now.namespaces.update({one: namespace(one) for one in there})  # type: ignore[attr-defined]
        clients.publish(now, changes)
        fresh = Clients(text)
        fresh.publish(now, everything(now))
        for asked, qtype in questions:
            for edns in (None, EDNS, EDNS, EDNS):
                fresh.cache = PacketCache()
                got, wanted = (told(one.ask(asked, qtype, edns)) for one in (clients, fresh))
                if not cache:  # which shows another TTL
                    assert got == wanted, (asked, qtype, events)
                else:
                    assert (got[0], got[2]) == (wanted[0], wanted[2]), (asked, qtype, events)


# --- words of deps ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dep", "text"),
    [
        ((b"default", b"web"), "Service default/web"),
        ((b"default",), "Namespace default"),
        (("import", b"default", b"shop"), "ServiceImport default/shop"),
        (("pod", "10.1.2.3"), "Pod 10.1.2.3"),
        (bytes((10, 96, 0, 1)), "address 10.96.0.1"),
        ("soa", ""),
        (("names", b"default"), ""),
        (("namespaces",), ""),
    ],
)
def test_what_a_dep_stands_for(dep: Any, text: str) -> None:
    assert describe_dep(dep) == text


def test_questions_that_wait_for_an_upstream_stay_as_they_are() -> None:
    assert isinstance(run(build("forward . 192.0.2.1"), asking("a.test.")), Pending)
