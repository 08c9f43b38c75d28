"""Below a name that is not there is nothing (RFC 8020): one kept answer serves all names there
that are of one length and of as many labels, as what search lists make of names of the outside. It
is the chain's answer all the same, reason (RFC 8914) and all, counted alike, and gone once the name
comes to be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from objects import service
from support import FakeClock, build, make_setup
from test_replay import CHANGE, CLIENTS, GROUPS, Server, World, check

from kdns.dns import types as t
from kdns.dns.message import Edns, render_query
from kdns.dns.name import ROOT, parse_name
from kdns.plugins.chain import Chain, Router
from kdns.registry.snapshot import Changes
from kdns.server.exchange import Exchange

ENDS = (
    "com.default.svc.cluster.local.", "new.default.svc.cluster.local.", "com.svc.cluster.local.",
    "s0.default.svc.cluster.local.", "h.default.svc.cluster.local.", "com.cluster.local.",
    "default.svc.cluster.local.", "new.pod.cluster.local.", "default.pod.cluster.local.",
    "dns.cluster.local.", "dns-version.cluster.local.", "svc.cluster.local.", "cluster.local.",
    "com.96.10.in-addr.arpa.", "1.0.96.10.in-addr.arpa.",
)  # fmt: skip
FRONTS = ("", "a.", "b.", "ns.", "_h._t.", "w.new.", "w.svc.", "a.b.c.", "a.b.d.", "_http._tcp.",
          "10-244-0-7.", "w.w.w.w.w.", "w.w.w.w.new.", "dns-version.")  # fmt: skip
TYPES = (t.A, t.AAAA, t.SRV, t.SOA, t.TXT, t.PTR, t.ANY)
EDNS = (None, Edns(1232), Edns(1232, True), Edns(1232, options=[(10, b"12345678")]))
ASK = st.tuples(
    st.just("ask"),
    st.tuples(st.sampled_from(FRONTS), st.sampled_from(ENDS)).map("".join),
    st.sampled_from(TYPES), st.sampled_from((None, *EDNS)), st.just(False),
)  # fmt: skip
# Plugins that treat one of the names in another way than its neighbours.
SINGULAR = (
    "hosts no-such-file {\n10.9.9.9 a.com.default.svc.cluster.local\nfallthrough\n}",
    "hosts no-such-file {\n10.9.9.9 b.com.cluster.local\nfallthrough\n}",
    "template IN A {\nmatch ^b\\.com\\.\nanswer '{{ .Name }} 60 IN A 1.2.3.4'\nfallthrough\n}",
    "rewrite name exact b.com.cluster.local. s0.default.svc.cluster.local.",
    "acl b.com.default.svc.cluster.local {\nblock\n}",
    "cache 30 com.default.svc.cluster.local",
)
ZONES = (
    "kubernetes cluster.local in-addr.arpa {\nSTRICT\n}",
    "kubernetes cluster.local com.cluster.local com.default.svc.cluster.local {\nSTRICT\n}",
    "kubernetes cluster.local {\nSTRICT\npods insecure\nfallthrough a.com.svc.cluster.local\n}",
    "kubernetes . {\nSTRICT\npods verified\n}",
)
# What heeds no name: with these alone one answer serves many.
UNIFORM = (
    "errors",
    "cache 30 {\ndisable success cluster.local .\ndisable denial .\n}",
)
OTHERS = tuple(part for group in GROUPS for part in group
               if not part.startswith(("kubernetes", "hosts", "template", "cache")))  # fmt: skip


def each_once(parts: list[str]) -> tuple[str, ...]:
    """Return the parts but those of a plugin that stands there already."""
    found: dict[str, str] = {}
    for part in parts:
        found.setdefault(part.partition(" ")[0], part)
    return tuple(found.values())


BLOCK = st.tuples(
    st.sampled_from(("", "", *SINGULAR)),
    st.sampled_from(("", "", *OTHERS)),
    st.sampled_from(("", *UNIFORM)),
    st.sampled_from(ZONES),
    st.sampled_from(("spec strict", "namespaces default", "ttl 5")),
).map(lambda parts: each_once([part.replace("STRICT", parts[-1]) for part in parts[:-1]]))


@settings(max_examples=300, deadline=None)
@given(BLOCK, st.lists(ASK, min_size=2, max_size=6), st.lists(CHANGE, max_size=4))
def test_an_answer_for_all_names_below_is_the_chains_answer(
    block: tuple[str, ...], questions: list[tuple[Any, ...]], changes: list[tuple[Any, ...]]
) -> None:
    clock = FakeClock()
    steps = [*questions, *(step for one in changes for step in (one, *questions))]
    with mock.patch("kdns.server.udp.time", SimpleNamespace(monotonic=clock)):
        check(block, steps, clock, logs="")


NEW = "new.default.svc.cluster.local."
# What an answer for all below would be wrong for: two names of one length, and what happens
# before each of them.
CASES: dict[str, tuple[tuple[str, ...], list[tuple[Any, ...]]]] = {
    "the zone's own name server": (
        (ZONES[0],), [("zz.dns.cluster.local.",), ("ns.dns.cluster.local.",)],
    ),
    "a Service that comes where only names too long were asked for": (
        (ZONES[0],), [(f"wwww.www.w.{NEW}",), ("service", "new", 2), (f"_http._tcp.{NEW}",)],
    ),
    "a Service that comes": (
        (ZONES[0],), [(f"_http._abc.{NEW}",), ("service", "new", 2), (f"_http._tcp.{NEW}",)],
    ),
    "a Service with a port only, in a namespace that comes": (
        (ZONES[0],),
        [("namespace", "", 0), (f"_http._abc.s0.{NEW[4:]}",), ("namespace", "", 1),
         (f"_http._tcp.s0.{NEW[4:]}",)],
    ),
    "a name that falls through": (
        (ZONES[2],), [("b.com.svc.cluster.local.",), ("a.com.svc.cluster.local.",)],
    ),
    "another zone below": (
        (ZONES[1],), [("namespace", "", 0), (f"w.aaa.{NEW[4:]}",), (f"w.com.{NEW[4:]}",)],
    ),
    "a zone of a cache's own": (
        (SINGULAR[5], ZONES[0]),
        [("namespace", "", 0), (f"w.aaa.{NEW[4:]}",), (f"w.com.{NEW[4:]}",)],
    ),
    "a name in hosts": (
        (SINGULAR[1], ZONES[0]), [("a.com.cluster.local.",), ("b.com.cluster.local.",)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_like_its_neighbours(case: str) -> None:
    block, given = CASES[case]
    steps = [
        step if len(step) > 1 else ("ask", *step, t.A, edns, False)
        for edns in (None, Edns(1232))
        for step in given
    ]
    clock = FakeClock()
    block = tuple(part.replace("STRICT", "ttl 5") for part in block)
    with mock.patch("kdns.server.udp.time", SimpleNamespace(monotonic=clock)):
        check(block, steps, clock, logs="")


def test_metrics_of_several_zones_are_of_names() -> None:
    for zones, heeds in (((".",), False), (("cluster.local.", "com.cluster.local."), True)):
        (plugin,) = build("prometheus", make_setup(zones))
        assert plugin.heeds(parse_name("cluster.local.")) is heeds


KUBEADM = "errors\nloadbalance\ncache 30 {\ndisable success cluster.local\ndisable denial\n}\n"
BLOCKS = {
    "as kubeadm has it": (KUBEADM + "kubernetes cluster.local", True),
    "with a cache that keeps the zone": ("cache 30\nkubernetes cluster.local", False),
    "with a name of its own in hosts": (SINGULAR[0] + "\nkubernetes cluster.local", False),
    "with a log": ("log\nkubernetes cluster.local", False),
}


def server_of(text: str) -> tuple[Server, list[bytes]]:
    """Return a server and the names that its chain was asked for."""
    server = Server(f"{text}\nprometheus", World(), FakeClock(), True)
    asked: list[bytes] = []
    answer = server.exchange.answer

    def noting(query: Any, done: Any) -> Any:
        asked.append(query.key)
        return answer(query, done)

    server.exchange.answer = noting  # type: ignore[method-assign]
    return server, asked


def ask(server: Server, name: str, edns: Edns | None = None) -> bytes:
    wire = server.ask(render_query(7, parse_name(name), t.A, edns=edns), CLIENTS[0])
    assert wire is not None
    return wire


@pytest.mark.parametrize("edns", ["without", "with", "with a cookie"])
@pytest.mark.parametrize("what", BLOCKS)
def test_new_names_are_answered_without_the_chain_where_none_differs(what: str, edns: str) -> None:
    text, spared = BLOCKS[what]
    server, asked = server_of(text)
    for end in ("com.default.svc.cluster.local.", "com.svc.cluster.local.", "com.cluster.local.",
                "a.long.name.com.default.svc.cluster.local."):  # fmt: skip
        asked.clear()
        for n in range(20):
            name = f"h{n:02}.Example.{end}"
            cookie = b"cookie%02d" % n
            options = [(10, cookie)] if "cookie" in edns else []
            wire = ask(server, name, None if edns == "without" else Edns(1232, options=options))
            assert wire[3] & 15 == t.NXDOMAIN
            assert wire[12:].startswith(parse_name(name))
            assert (cookie in wire) is ("cookie" in edns)
            assert (b"Services are" in wire or b"no " in wire) is (edns != "without")
        assert len(asked) == (2 if spared else 20)


def test_a_name_of_more_labels_and_the_same_length_is_looked_up() -> None:
    """`a.b.c.d` is as long as `ab0.c.d`; what is true of one need not be of the other."""
    server, asked = server_of(KUBEADM + "kubernetes cluster.local")
    for n in range(4):
        ask(server, f"ab{n}.c.d.com.default.svc.cluster.local.")
    assert len(asked) == 2
    ask(server, "a.b.c.d.com.default.svc.cluster.local.")
    assert len(asked) == 3


def test_a_service_that_comes_is_seen_below_its_name() -> None:
    world = World()
    server, asked = server_of(KUBEADM + "kubernetes cluster.local")
    for n in range(5):
        assert ask(server, f"_h{n}._tcp.new.default.svc.cluster.local.")[3] & 15 == t.NXDOMAIN
    assert len(asked) == 2
    world.objects["service", "new"] = service("new", ip="10.96.0.9", ports=[("h7", 80, "TCP")])
    server.publish(world.snapshot(), Changes(services=frozenset({("default", "new")})))
    assert ask(server, "_h7._tcp.new.default.svc.cluster.local.")[3] & 15 == t.NOERROR


def test_another_server_block_may_be_for_names_below() -> None:
    server, _ = server_of("kubernetes cluster.local")
    inner = Chain(Server("whoami", World(), FakeClock(), True).plugins)
    chains = {ROOT: Chain(server.plugins), parse_name("b.com.cluster.local."): inner}
    exchange = Exchange(Router(chains), None, make_setup().metrics)  # type: ignore[arg-type]
    server.exchange = exchange
    for _ in range(5):
        assert ask(server, "a.com.cluster.local.")[3] & 15 == t.NXDOMAIN
    assert ask(server, "b.com.cluster.local.")[3] & 15 == t.NOERROR


def test_a_broken_name_is_not_below_anything() -> None:
    server, _ = server_of(KUBEADM + "kubernetes cluster.local")
    for n in range(4):
        ask(server, f"abcd{n}.com.cluster.local.")
    good = render_query(7, parse_name("abcd9.com.cluster.local."), t.A)
    assert server.ask(good, CLIENTS[0]) is not None
    for bad, rcode in (
        (good.replace(b"\x05abcd9", b"\xc0abcd9"), t.FORMERR),
        (good.replace(b"\x05abcd9", b"\x45abcd9"), t.FORMERR),
        (good[:-1], t.FORMERR),
    ):
        wire = server.ask(bad, CLIENTS[0])
        assert wire is not None and wire[3] & 15 == rcode
