"""One kept answer for all spellings of a question (0x20), and for every client's cookie."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from objects import endpoint, external, kubernetes, service, slice_of

from kdns.dns import types as t
from kdns.dns.message import RR, Edns, Query, Reply, parse_query, render_query, render_reply
from kdns.dns.name import parse_name
from kdns.plugins.kubernetes import Kubernetes
from kdns.server.folding import Template, exact, fold, places_of_ttls, template_of

SVC = "default.svc.cluster.local."


def cluster() -> Kubernetes:
    return kubernetes(
        "pods insecure",
        service("web", ip="10.96.0.1"),
        service("h", ip="None"),
        slice_of("h", endpoint("10.244.0.7"), endpoint("10.244.0.8")),
        external("ext", "web.default.svc.cluster.local"),
    )


def respelt(name: str, seed: int) -> str:
    dice = random.Random(seed)
    return "".join(dice.choice((c.lower(), c.upper())) for c in name)


def question(name: str, qtype: int, cookie: bytes = b"", qid: int = 7) -> bytes:
    edns = Edns(1232, options=[(10, cookie)]) if cookie else None
    return render_query(qid, parse_name(name), qtype, edns=edns)


def answered(plugin: Kubernetes, datagram: bytes) -> tuple[Query, Reply, bytes]:
    query = parse_query(datagram, ("127.0.0.1", 5), "udp", 0.0)
    reply = plugin.on_query(query)
    assert isinstance(reply, Reply)
    return query, reply, render_reply(query, reply)


# name, type, how many answers
FOLDING = {
    "address": (f"web.{SVC}", t.A, 1),
    "no address of that family": (f"web.{SVC}", t.AAAA, 0),
    "headless": (f"h.{SVC}", t.A, 2),
    "ports, with targets and glue": (f"_http._tcp.h.{SVC}", t.SRV, 2),
    "no such Service": (f"nosuch.{SVC}", t.A, 0),
    "no such type": (f"web.{SVC}", t.MX, 0),
    "no such namespace": ("web.nosuch.svc.cluster.local.", t.A, 0),
}


@pytest.mark.parametrize("case", FOLDING)
@pytest.mark.parametrize("cookie", [b"", b"12345678"])
def test_an_answer_stands_for_every_spelling(case: str, cookie: bytes) -> None:
    name, qtype, answers = FOLDING[case]
    plugin = cluster()
    asked = question(respelt(name, 0), qtype, cookie)
    query, reply, wire = answered(plugin, asked)
    assert len(reply.answer) == answers
    template = template_of(asked, query, reply, wire)
    assert template is not None
    for seed in range(20):
        other = question(respelt(name, seed), qtype, cookie[::-1], qid=seed)
        assert fold(other) == fold(question(name, qtype, cookie))
        assert template.fill(other) == answered(plugin, other)[2]


# Whose spelling nobody vouches for, or that cannot be filled in.
NOT_FOLDING = {
    "another name's records (ExternalName)": (f"ext.{SVC}", t.A, None),
    "the apex, where CoreDNS looks at the letters": ("Cluster.Local.", t.NS, None),
    "an option that is echoed": (f"web.{SVC}", t.A, (3, b"")),
    "a cookie with the server's part": (f"web.{SVC}", t.A, (10, b"1234567890123456")),
    "a record pointed at: compressed, for it would not fit": (f"_http._tcp.h.{SVC}", t.SRV, None),
}


@pytest.mark.parametrize("case", NOT_FOLDING)
def test_other_answers_are_kept_for_one_spelling_only(case: str) -> None:
    name, qtype, option = NOT_FOLDING[case]
    plugin = cluster()
    if "compressed" in case:
        slices = slice_of("h", *(endpoint(f"10.244.1.{n}") for n in range(40)))
        plugin = kubernetes("pods insecure", service("h", ip="None"), slices)
    edns = Edns(1232, options=[option]) if option else None
    asked = render_query(7, parse_name(name), qtype, edns=edns)
    query, reply, wire = answered(plugin, asked)
    assert template_of(asked, query, reply, wire) is None


@given(st.binary(max_size=80), st.binary(max_size=80))
def test_only_spellings_of_one_question_share_a_key(one: bytes, other: bytes) -> None:
    """Whatever octets come: where the keys are the same and one is a question, so is the other,
    and they differ in letters of the name alone."""
    known = question(f"web.{SVC}", t.A)
    for stranger in (one, known[:14] + one, known[:-3] + one, other + known[12:]):
        if fold(stranger) == fold(known):
            assert len(stranger) == len(known)
            assert stranger[2:12] == known[2:12]
            assert stranger[12:].lower() == known[12:].lower()
            assert stranger[-5:] == known[-5:]


@pytest.mark.parametrize("rest", [b"trailing", b"\0\0\x01\0\x01\0\0\0\x05\0\x04\x7f\0\0\1"])
def test_a_cookie_that_is_not_the_end_of_the_question_comes_back_as_it_came(rest: bytes) -> None:
    plugin = cluster()
    asked = bytearray(question(f"web.{SVC}", t.A, b"12345678") + rest)
    if rest[0] == 0:
        asked[11] += 1  # one more record behind the OPT
    query, reply, wire = answered(plugin, bytes(asked))
    assert b"12345678" in wire
    assert template_of(bytes(asked), query, reply, wire) is None


def test_a_label_with_an_octet_0_is_no_end_of_a_name() -> None:
    name = b"\x05a\0\0\x01b\0"
    plugin = cluster()
    wire = render_query(7, b"\x03a\0b" + parse_name(SVC), t.A)
    query, reply, made = answered(plugin, wire)
    assert template_of(wire, query, reply, made) is None
    assert fold(render_query(1, name, t.A)) != fold(render_query(1, b"\x05A\0\0\x01b\0", t.A))[:-1]


def test_a_template_is_as_long_as_its_answer() -> None:
    template = Template(b"0123456789", [(0, slice(0, 2), 2), (4, slice(2, 5), 3)])
    assert template.size == len(template.fill(b"abcde")) == 10
    assert template.fill(b"abcde") == b"ab23cde789"


# --- TTLs that count down ----------------------------------------------------------------------

MANY = [RR(parse_name("www.example.org."), t.A, 30, bytes((192, 0, 2, n))) for n in range(90)]
NS = RR(parse_name("example.org."), t.NS, 30, parse_name("ns.example.org."))
AGED: dict[str, tuple[Reply, Edns | None]] = {
    "whole": (Reply(answer=MANY[:2], authority=[NS]), None),
    "with OPT, which has no TTL": (Reply(answer=MANY[:1]), Edns(1232, True)),
    "compressed": (Reply(answer=MANY, authority=[NS]), Edns(4096)),
    "cut": (Reply(answer=MANY), None),
    "of no record": (Reply(t.NXDOMAIN), None),
}


@pytest.mark.parametrize("case", AGED)
def test_all_ttls_of_an_answer_change_and_nothing_else(case: str) -> None:
    reply, edns = AGED[case]
    asked = render_query(7, parse_name("www.example.org."), t.A, edns=edns)
    query = parse_query(asked, ("127.0.0.1", 5), "udp", 0.0)
    wire = render_reply(query, reply)
    places = places_of_ttls(wire, 30)
    assert places is not None
    template = exact(wire, places)
    template.age(30)
    assert template.fill(asked) == wire
    for ttl in (29, 1, 30):
        template.age(ttl)
        for section in (reply.answer, reply.authority):
            section[:] = [rr.with_ttl(ttl) for rr in section]
        assert template.fill(asked) == render_reply(query, reply)


def test_an_answer_of_several_ttls_is_none_that_counts_down() -> None:
    query = parse_query(render_query(7, NS.name, t.A), ("127.0.0.1", 5), "udp", 0.0)
    wire = render_reply(query, Reply(answer=[NS], authority=[NS.with_ttl(29)]))
    assert places_of_ttls(wire, 30) is None
