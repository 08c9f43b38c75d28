"""`autopath`: one query in place of a walk through the search path."""

from __future__ import annotations

import logging

import pytest
from support import Stub, a, answer, build, errors_of, make_setup, question

from kdns.dns import types as t
from kdns.dns.message import Query, Reply, failure
from kdns.dns.name import ROOT, parse_name, render_name
from kdns.dns.text import parse_rr, render_rr
from kdns.plugins.autopath import MAX_SEARCH, parse_search
from kdns.plugins.plugin import Plugin, WatchFile
from kdns.plugins.setup import Setup

POD = "10.244.1.7"
SEARCH = ["ns1.svc.cluster.local.", "svc.cluster.local.", "cluster.local.", "corp.example."]


class Cluster(Stub):
    """Stands for the `kubernetes` plugin: answers from a table and knows one Pod."""

    word = "kubernetes"

    def autopath_search(self, client: str, key: bytes) -> list[bytes] | None:
        return [*map(parse_name, SEARCH), ROOT] if client == POD else None


def cluster() -> Cluster:
    return Cluster(
        {
            ("www.corp.example.", "A"): Reply(0, [a("www.corp.example.", "10.0.0.9", 60)]),
            ("web.ns1.svc.cluster.local.", "A"): Reply(
                0, [a("web.ns1.svc.cluster.local.", "10.96.0.1", 5)]
            ),
            ("empty.svc.cluster.local.", "A"): Reply(0, []),
            ("example.org.", "A"): Reply(
                0, [parse_rr("example.org. 9 CNAME e.org."), a("e.org.", "10.0.0.3", 8)]
            ),
            ("ns1.svc.cluster.local.", "A"): Reply(0, []),
        }
    )


def chain(text: str, below: Plugin, cx: Setup | None = None) -> list[Plugin]:
    cx = cx or make_setup()
    plugins = build(text, cx)
    assert cx.problems.found == []
    return [*plugins, below]


def asked(stub: Stub) -> list[str]:
    return [render_name(q.name) for q in stub.asked]


@pytest.mark.parametrize(
    ("name", "questions", "rcode", "answers"),
    [
        # the first element finds it: no CNAME
        ("web.ns1.svc.cluster.local.", ["web.ns1.svc.cluster.local."], 0,
         ["web.ns1.svc.cluster.local. 5 IN A 10.96.0.1"]),
        # a later one does; the question keeps its case
        ("wwW.ns1.svc.cluster.local.",
         ["wwW.ns1.svc.cluster.local.", "wwW.svc.cluster.local.", "wwW.cluster.local.",
          "wwW.corp.example."], 0,
         ["wwW.ns1.svc.cluster.local. 60 IN CNAME www.corp.example.",
          "www.corp.example. 60 IN A 10.0.0.9"]),
        # the name by itself, without a search path
        ("example.org.ns1.svc.cluster.local.",
         ["example.org." + s for s in SEARCH] + ["example.org."], 0,
         ["example.org.ns1.svc.cluster.local. 9 IN CNAME example.org.",
          "example.org. 9 IN CNAME e.org.", "e.org. 8 IN A 10.0.0.3"]),
        # NODATA wins too
        ("empty.ns1.svc.cluster.local.",
         ["empty.ns1.svc.cluster.local.", "empty.svc.cluster.local."], 0, []),
        # nowhere: the first reply, and the client goes on by itself
        ("gone.ns1.svc.cluster.local.", ["gone." + s for s in SEARCH] + ["gone."], t.NXDOMAIN, []),
        # another element's suffix, and the first element itself, are not completed
        ("www.svc.cluster.local.", ["www.svc.cluster.local."], t.NXDOMAIN, []),
        ("www.ns2.svc.cluster.local.", ["www.ns2.svc.cluster.local."], t.NXDOMAIN, []),
        ("ns1.svc.cluster.local.", ["ns1.svc.cluster.local."], 0, []),
    ],
)  # fmt: skip
def test_a_pods_search_path_is_walked_for_it(
    name: str, questions: list[str], rcode: int, answers: list[str]
) -> None:
    below = cluster()
    reply = answer(chain("autopath @kubernetes", below), question(name, client=POD))
    assert asked(below) == questions
    assert reply.rcode == rcode
    assert [render_rr(rr) for rr in reply.answer] == answers


def test_clients_that_are_no_pods_are_left_alone() -> None:
    below = cluster()
    answer(chain("autopath @kubernetes", below), question("www.ns1.svc.cluster.local."))
    assert asked(below) == ["www.ns1.svc.cluster.local."]


def test_only_the_given_zones_are_completed() -> None:
    below = cluster()
    plugins = chain("autopath example.org @kubernetes", below)
    answer(plugins, question("www.ns1.svc.cluster.local.", client=POD))
    assert asked(below) == ["www.ns1.svc.cluster.local."]


def test_an_error_ends_the_walk() -> None:
    below = cluster()
    below.table[("www.svc.cluster.local.", "A")] = failure(t.SERVFAIL, "no upstream")
    reply = answer(
        chain("autopath @kubernetes", below), question("www.ns1.svc.cluster.local.", client=POD)
    )
    assert (reply.rcode, reply.error) == (t.SERVFAIL, "no upstream")
    assert len(below.asked) == 2


@pytest.mark.parametrize(
    ("reply", "wins"),
    [
        (failure(t.SERVFAIL), False),
        (failure(t.REFUSED), False),
        (Reply(t.SERVFAIL, flags=0, served_by="forward"), True),
        (Reply(t.REFUSED, flags=0, served_by="acl"), True),
    ],
)
def test_a_plugin_that_ends_a_query_without_a_reply_does_not_end_the_walk(
    reply: Reply, wins: bool
) -> None:
    below = cluster()
    below.table[("www.svc.cluster.local.", "A")] = reply
    query = question("www.ns1.svc.cluster.local.", client=POD)
    seen = answer(chain("autopath @kubernetes", below), query)
    assert (seen.rcode == reply.rcode) is wins
    assert len(below.asked) == (2 if wins else 4)


def test_successes_are_counted() -> None:
    cx = make_setup()
    plugins = chain("autopath @kubernetes", cluster(), cx)
    for name in ("www", "web", "gone"):
        answer(plugins, question(f"{name}.ns1.svc.cluster.local.", client=POD))
    answer(plugins, question("example.org.", client=POD))
    assert cx.metrics.value("coredns_autopath_success_total", "dns://:53") == 2


def test_replies_are_never_repeated_to_other_clients() -> None:
    assert build("autopath @kubernetes")[0].per_client


def test_plugins_above_see_one_query_and_one_reply() -> None:
    class Above(Plugin):
        seen: list[tuple[bytes, bytes]]

        def on_reply(self, query: Query, reply: Reply) -> Reply:
            self.seen.append((query.name, reply.answer[0].name))
            return reply

    above = Above()
    above.seen = []
    name = "www.ns1.svc.cluster.local."
    plugins = [above, *chain("autopath @kubernetes", cluster())]
    answer(plugins, question(name, client=POD))
    assert above.seen == [(parse_name(name), parse_name(name))]


# --- resolv.conf --------------------------------------------------------------------------


def load(plugins: list[Plugin], content: bytes | None, error: str = "") -> WatchFile:
    (work,) = plugins[0].work()
    assert isinstance(work, WatchFile)
    work.load(content, error)
    return work


def test_a_search_path_from_a_file() -> None:
    below = Stub({("www.b.example.", "A"): Reply(0, [a("www.b.example.", "10.0.0.1")])})
    plugins = chain("autopath my-resolv.conf", below)
    work = load(plugins, b"nameserver 10.0.0.53\nsearch a.example B.example. c.example\n")
    assert (work.path, work.interval) == ("./my-resolv.conf", 0)
    reply = answer(plugins, question("www.a.example."))
    assert asked(below) == ["www.a.example.", "www.b.example."]
    assert render_rr(reply.answer[0]) == "www.a.example. 300 IN CNAME www.b.example."


@pytest.mark.parametrize(
    ("content", "search"),
    [
        ("search a b\n", ["a", "b"]),
        ("search a b\nsearch c\n", ["c"]),
        ("domain a\n", ["a"]),
        ("# search a\n; search b\noptions ndots:5\n", []),
        ("search a\ndomain\n", []),
    ],
)
def test_the_last_search_line_counts(content: str, search: list[str]) -> None:
    assert parse_search(content) == search


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "failed to read ./r.conf: No such file"),
        (b"nameserver 10.0.0.1\n", "./r.conf has no 'search' line"),
        (b"search a..b\n", "has an empty label"),
    ],
)
def test_a_file_without_a_search_path_completes_nothing_and_says_so(
    content: bytes | None, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    below = Stub()
    plugins = chain("autopath r.conf", below)
    load(plugins, content, "No such file")
    answer(plugins, question("www.a.example."))
    assert asked(below) == ["www.a.example."]
    assert said in caplog.text


def test_a_long_search_path_and_long_names_are_bounded() -> None:
    below = Stub()
    plugins = chain("autopath r.conf", below)
    elements = ["a", *("x" * 60 + f".{n}" for n in range(100))]
    load(plugins, b"search " + " ".join(elements).encode())
    answer(plugins, question("www.a."))
    assert len(below.asked) == MAX_SEARCH
    below.asked.clear()
    answer(plugins, question(".".join(["y" * 50] * 4) + ".a."))  # x... would make it over 255
    assert len(below.asked) == 1


# --- mistakes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("autopath", "no resolv-conf specified"),
        ("autopath @kuberntes", "plugin 'kuberntes' is not known; write '@kubernetes'"),
        ("autopath @file", "plugin 'file' has no search paths; write '@kubernetes'"),
        ("autopath @kubernetes {\n ttl 5\n}", "unknown property 'ttl'"),
        ("autopath @kubernetes\nautopath r.conf", "can only be used once per Server Block"),
    ],
)
def test_mistakes_are_said(text: str, reason: str) -> None:
    (problem,) = errors_of(text)
    assert problem.startswith("Corefile:") and reason in problem


def test_without_a_kubernetes_plugin_nothing_is_completed_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    below = Stub()
    with caplog.at_level(logging.WARNING):
        answer(chain("autopath @kubernetes", below), question("www.a.", client=POD))
    assert asked(below) == ["www.a."]
    assert "no 'kubernetes' in this server block" in caplog.text
