"""Below a name that is not there is nothing (RFC 8020): one kept answer serves all names there
that are of one length, as what search lists make of names of the outside. It is the chain's answer
all the same, counted alike, and gone once the name comes to be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import FakeClock, make_setup
from test_replay import CHANGE, CLIENTS, GROUPS, Server, World, check

from kdns.dns import types as t
from kdns.dns.message import Edns, render_query
from kdns.dns.name import ROOT, parse_name
from kdns.plugins.chain import Chain, Router
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
ASK = st.tuples(
    st.just("ask"),
    st.tuples(st.sampled_from(FRONTS), st.sampled_from(ENDS)).map("".join),
    st.sampled_from(TYPES), st.sampled_from((None, None, None, Edns(1232))), st.just(False),
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
BLOCK = st.tuples(
    st.sampled_from(("", *SINGULAR)),
    *(st.sampled_from(("", *group)) for group in GROUPS
      if not group[0].startswith(("kubernetes", "hosts", "template", "rewrite", "cache"))),
    st.sampled_from(ZONES),
    st.sampled_from(("spec strict", "namespaces default", "ttl 5")),
).map(lambda parts: tuple(part.replace("STRICT", parts[-1]) for part in parts[:-1]))  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(BLOCK, st.lists(ASK, min_size=2, max_size=6), st.lists(CHANGE, max_size=4))
def test_an_answer_for_all_names_below_is_the_chains_answer(
    block: tuple[str, ...], questions: list[tuple[Any, ...]], changes: list[tuple[Any, ...]]
) -> None:
    clock = FakeClock()
    steps = [*questions, *(step for one in changes for step in (one, *questions))]
    with mock.patch("kdns.server.udp.time", SimpleNamespace(monotonic=clock)):
        check(block, steps, clock, logs="")


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


@pytest.mark.parametrize("what", BLOCKS)
def test_new_names_are_answered_without_the_chain_where_none_differs(what: str) -> None:
    text, spared = BLOCKS[what]
    server, asked = server_of(text)
    for end in ("com.default.svc.cluster.local.", "com.svc.cluster.local.", "com.cluster.local."):
        asked.clear()
        for n in range(20):
            name = f"h{n:02}.Example.{end}"
            wire = ask(server, name)
            assert wire[3] & 15 == t.NXDOMAIN
            assert wire[12:].startswith(parse_name(name))
        assert len(asked) == (2 if spared else 20)


def test_a_service_that_comes_is_seen_below_its_name() -> None:
    world = World()
    server, asked = server_of(KUBEADM + "kubernetes cluster.local")
    for n in range(5):
        assert ask(server, f"_h{n}._tcp.new.default.svc.cluster.local.")[3] & 15 == t.NXDOMAIN
    assert len(asked) == 2
    from objects import service

    from kdns.registry.snapshot import Changes

    world.objects["service", "new"] = service("new", ip="10.96.0.9", ports=[("h7", 80, "TCP")])
    server.publish(world.snapshot(), Changes(services=frozenset({("default", "new")})))
    assert ask(server, "_h7._tcp.new.default.svc.cluster.local.")[3] & 15 == t.NOERROR


def test_another_server_block_may_be_for_names_below() -> None:
    server, asked = server_of("kubernetes cluster.local")
    inner = Chain(Server("whoami", World(), FakeClock(), True).plugins)
    chains = {ROOT: Chain(server.plugins), parse_name("b.com.cluster.local."): inner}
    exchange = Exchange(Router(chains), None, make_setup().metrics)  # type: ignore[arg-type]
    server.exchange = exchange
    for _ in range(5):
        assert ask(server, "a.com.cluster.local.")[3] & 15 == t.NXDOMAIN
    assert ask(server, "b.com.cluster.local.")[3] & 15 == t.NOERROR


def test_a_broken_name_is_not_below_anything() -> None:
    server, asked = server_of(KUBEADM + "kubernetes cluster.local")
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
