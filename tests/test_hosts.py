"""`hosts`: names and addresses of a hosts file and of the Corefile."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Stub, a, answer, build, errors_of, make_setup, question

from kdns.dns import types as t
from kdns.dns.message import AA, FOREVER, Reply
from kdns.dns.name import ROOT, render_name
from kdns.dns.reverse import reverse_name
from kdns.dns.text import render_rr
from kdns.plugins.hosts import MAX_REVERSE, Hosts, parse_hosts
from kdns.plugins.plugin import Plugin, WatchFile
from kdns.plugins.setup import Setup

FILE = b"""
# a comment
127.0.0.1\tlocalhost
::1 localhost ip6-localhost  # and another
192.0.2.10  Web.Example.ORG web  www
192.0.2.11  web.example.org
192.0.2.10  web.example.org
2001:db8::10 web.example.org
fe80::1%eth0 linklocal
::ffff:192.0.2.20 mapped
192.0.2.30 *.wild.example.org
192.0.2.31 own.wild.example.org
2001:db8::32 six.wild.example.org
"""


def hosts(text: str = "hosts", content: bytes | None = FILE, cx: Setup | None = None) -> Hosts:
    cx = cx or make_setup()
    plugin = build(text, cx)[0]
    assert not cx.problems.errors, cx.problems.errors
    assert isinstance(plugin, Hosts)
    if content is not None:
        assert watch_of(plugin).load(content, "")
    return plugin


def watch_of(plugin: Plugin) -> WatchFile:
    watch = plugin.work()[0]
    assert isinstance(watch, WatchFile)
    return watch


def ask(plugin: Plugin, name: str, qtype: str = "A") -> tuple[str, list[str]]:
    """Return (rcode, answer); "passed on" where the plugin below was asked."""
    stub = Stub()
    reply = answer([plugin, stub], question(name, qtype))
    if stub.asked:
        return "passed on", []
    assert not reply.authority
    return t.rcode_name(reply.rcode), [render_rr(rr) for rr in reply.answer]


V4 = "web.example.org. 3600 IN A 192.0.2.10", "web.example.org. 3600 IN A 192.0.2.11"
V6 = "web.example.org. 3600 IN AAAA 2001:db8::10"

QUESTIONS = [
    ("localhost.", "A", "NOERROR", ["localhost. 3600 IN A 127.0.0.1"]),
    ("localhost.", "AAAA", "NOERROR", ["localhost. 3600 IN AAAA ::1"]),
    ("web.example.org.", "A", "NOERROR", [*V4]),
    ("WEB.example.org.", "AAAA", "NOERROR", [V6]),
    ("www.", "A", "NOERROR", ["www. 3600 IN A 192.0.2.10"]),
    # another type of a known name: nothing, and no SOA to say so
    ("www.", "AAAA", "NOERROR", []),
    ("web.example.org.", "TXT", "NOERROR", []),
    ("web.example.org.", "ANY", "NOERROR", []),
    # an unknown name: no SOA to say NXDOMAIN with
    ("nothing.example.org.", "A", "SERVFAIL", []),
    ("nothing.example.org.", "TXT", "SERVFAIL", []),
    (".", "A", "SERVFAIL", []),
    ("linklocal.", "AAAA", "NOERROR", ["linklocal. 3600 IN AAAA fe80::1"]),
    ("mapped.", "A", "NOERROR", ["mapped. 3600 IN A 192.0.2.20"]),
    # wildcards stand for one label, each family by itself
    ("any.wild.example.org.", "A", "NOERROR", ["any.wild.example.org. 3600 IN A 192.0.2.30"]),
    ("own.wild.example.org.", "A", "NOERROR", ["own.wild.example.org. 3600 IN A 192.0.2.31"]),
    ("six.wild.example.org.", "A", "NOERROR", ["six.wild.example.org. 3600 IN A 192.0.2.30"]),
    ("*.wild.example.org.", "A", "NOERROR", ["*.wild.example.org. 3600 IN A 192.0.2.30"]),
    ("wild.example.org.", "A", "SERVFAIL", []),
    ("a.b.wild.example.org.", "A", "SERVFAIL", []),
    # reverse names; without an entry they are passed on, fallthrough or not
    ("11.2.0.192.in-addr.arpa.", "PTR", "NOERROR",
     ["11.2.0.192.in-addr.arpa. 3600 IN PTR web.example.org."]),
    ("10.2.0.192.in-addr.arpa.", "PTR", "NOERROR",
     ["10.2.0.192.in-addr.arpa. 3600 IN PTR web.example.org.",
      "10.2.0.192.in-addr.arpa. 3600 IN PTR web.",
      "10.2.0.192.in-addr.arpa. 3600 IN PTR www."]),
    ("30.2.0.192.in-addr.arpa.", "PTR", "passed on", []),
    ("99.2.0.192.in-addr.arpa.", "PTR", "passed on", []),
    ("web.example.org.", "PTR", "passed on", []),
]  # fmt: skip


@pytest.mark.parametrize(("name", "qtype", "rcode", "records"), QUESTIONS)
def test_the_file_answers(name: str, qtype: str, rcode: str, records: list[str]) -> None:
    assert ask(hosts(), name, qtype) == (rcode, records)


def test_an_ipv6_address_has_its_pointer() -> None:
    reply = hosts().on_query(question("1." + "0." * 31 + "ip6.arpa.", "PTR"))
    assert isinstance(reply, Reply)
    assert [rr.rdata for rr in reply.answer] == [b"\x09localhost\x00", b"\x0dip6-localhost\x00"]


def test_the_reply_is_authoritative_and_may_be_repeated() -> None:
    reply = hosts().on_query(question("localhost."))
    assert isinstance(reply, Reply)
    assert (reply.flags, reply.keep, reply.served_by) == (AA, FOREVER, "hosts")


FALLS = [
    ("fallthrough", "nothing.example.org.", "A", True),
    ("fallthrough", "nothing.example.org.", "TXT", True),
    ("fallthrough", "www.", "AAAA", False),
    ("fallthrough", "www.", "TXT", False),
    ("fallthrough example.org", "nothing.example.org.", "A", True),
    ("fallthrough example.org", "nothing.example.net.", "A", False),
    ("fallthrough\nfallthrough_unsupported", "www.", "TXT", True),
    ("fallthrough\nfallthrough_unsupported", "www.", "AAAA", False),
    ("fallthrough example.org\nfallthrough_unsupported", "www.", "TXT", False),
]


@pytest.mark.parametrize(("options", "name", "qtype", "passed"), FALLS)
def test_fallthrough(options: str, name: str, qtype: str, passed: bool) -> None:
    plugin = hosts(f"hosts {{\n{options}\n}}")
    assert (ask(plugin, name, qtype)[0] == "passed on") is passed


def test_only_names_in_the_zones_are_known_or_answered() -> None:
    plugin = hosts("hosts /f example.org")
    assert ask(plugin, "web.example.org.")[0] == "NOERROR"
    assert ask(plugin, "nothing.example.org.")[0] == "SERVFAIL"
    assert ask(plugin, "www.")[0] == "passed on"
    assert ask(plugin, "10.2.0.192.in-addr.arpa.", "PTR")[1] == [
        "10.2.0.192.in-addr.arpa. 3600 IN PTR web.example.org."
    ]


def test_without_zones_those_of_the_server_block_count() -> None:
    plugin = hosts(cx=make_setup(("example.org.",)))
    assert ask(plugin, "localhost.")[0] == "passed on"


def test_lines_in_the_corefile_come_on_top_of_the_file() -> None:
    plugin = hosts(
        "hosts /f {\n192.0.2.40 web.example.org inline\n2001:db8::41 inline\n192.0.2.10 www\n"
        "ttl 60\nfallthrough\n}"
    )
    assert ask(plugin, "web.example.org.")[1] == [
        "web.example.org. 60 IN A 192.0.2.10",
        "web.example.org. 60 IN A 192.0.2.11",
        "web.example.org. 60 IN A 192.0.2.40",
    ]
    assert ask(plugin, "inline.", "AAAA")[1] == ["inline. 60 IN AAAA 2001:db8::41"]
    assert ask(plugin, "www.")[1] == ["www. 60 IN A 192.0.2.10"]
    assert len(ask(plugin, "10.2.0.192.in-addr.arpa.", "PTR")[1]) == 3


def test_no_reverse() -> None:
    plugin = hosts("hosts {\nno_reverse\n192.0.2.40 inline\n}")
    assert ask(plugin, "11.2.0.192.in-addr.arpa.", "PTR")[0] == "passed on"
    assert ask(plugin, "40.2.0.192.in-addr.arpa.", "PTR")[0] == "passed on"


def test_a_hosts_file_without_a_name_below_answers_from_the_plugin_below() -> None:
    stub = Stub({("other.test.", "A"): Reply(answer=[a("other.test.", "192.0.2.9")])})
    plugins = [hosts("hosts {\nfallthrough\n}"), stub]
    assert answer(plugins, question("other.test.")).answer == [a("other.test.", "192.0.2.9")]


# --- the file changes ----------------------------------------------------------------------


def test_a_changed_file_is_taken_over_and_a_missing_one_changes_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cx = make_setup()
    cx.wall = lambda: 1700000000.5
    plugin = hosts("hosts /f {\n192.0.2.40 inline\n}", None, cx)
    watch = watch_of(plugin)
    assert (watch.path, watch.interval) == ("/f", 5)
    assert not watch.load(None, "/f: No such file or directory")
    assert "/f: No such file or directory" in caplog.text
    assert ask(plugin, "inline.")[0] == "NOERROR"
    assert cx.metrics.value("coredns_hosts_entries", "/f") == 2
    assert cx.metrics.value("coredns_hosts_reload_timestamp_seconds") == 0
    assert watch.load(b"192.0.2.1 one two\n", "")
    assert ask(plugin, "one.")[1] == ["one. 3600 IN A 192.0.2.1"]
    assert cx.metrics.value("coredns_hosts_entries", "/f") == 6
    assert cx.metrics.value("coredns_hosts_reload_timestamp_seconds") == 1700000000.5
    assert watch.load(b"192.0.2.2 two\n", "")
    assert ask(plugin, "one.")[0] == "SERVFAIL"
    assert not watch.load(None, "/f: Permission denied")
    assert ask(plugin, "two.")[1] == ["two. 3600 IN A 192.0.2.2"]


def test_the_default_file_and_relative_paths() -> None:
    assert watch_of(hosts("hosts")).path == "/etc/hosts"
    assert watch_of(hosts("hosts my.hosts {\nreload 0\n}")).path == "./my.hosts"
    assert watch_of(hosts("hosts my.hosts {\nreload 0\n}")).interval == 0
    assert watch_of(hosts("hosts {\nreload 1m\n}")).interval == 60


def test_lines_that_are_no_entries_are_left_out_and_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bad = b"192.0.2.1 good\n300.0.2.1 x\nname 192.0.2.1\n192.0.2.2\n192.0.2.3 a..b ok\n\xff \xff\n"
    bad += b"192.0.2.4 caf\xe9 fine\n010.0.0.1 octal\n"
    plugin = hosts("hosts /f", bad)
    assert "/f:2: '300.0.2.1' is not an address (7 such places are left out)" in caplog.text
    assert ask(plugin, "good.")[0] == ask(plugin, "ok.")[0] == ask(plugin, "fine.")[0] == "NOERROR"


def test_a_block_list_has_a_bounded_pointer_answer() -> None:
    lines = [f"0.0.0.0 ads{i}.example.com" for i in range(3 * MAX_REVERSE)]
    table = parse_hosts(lines, (ROOT,), True)
    assert table.entries == 6 * MAX_REVERSE
    assert len(table.v4) == 3 * MAX_REVERSE
    plugin = hosts(content="\n".join(lines).encode())
    assert len(ask(plugin, "0.0.0.0.in-addr.arpa.", "PTR")[1]) == MAX_REVERSE


SAID = [
    ("hosts {\nttl 0\n}", "ttl must be in range [1, 65535]: 0"),
    ("hosts {\nttl\n}", "'ttl' needs an argument"),
    ("hosts {\nttl soon\n}", "ttl must be a number"),
    ("hosts {\nreload -1s\n}", "'-1s' is not a duration"),
    ("hosts {\nreload\n}", "'reload' needs an argument"),
    ("hosts {\nno_reverse please\n}", "unexpected 'please'"),
    ("hosts {\nfalltrough\n}", "unknown property 'falltrough', did you mean 'fallthrough'?"),
    ("hosts {\n300.1.1.1 a\n}", "unknown property '300.1.1.1'"),
    ("hosts {\n192.0.2.1\n}", "no name behind 192.0.2.1; write ADDRESS NAME..."),
    ("hosts {\n192.0.2.1 a..b\n}", "'a..b' has an empty label"),
    ("hosts {\nfallthrough_unsupported\n}", "fallthrough_unsupported requires fallthrough"),
    ("hosts {\nfallthrough a..b\n}", "zone is not a valid domain name"),
    ("hosts f a.test {\n192.0.2.1 b.test\n}", "warning: b.test. never answers"),
    ("hosts\nhosts", "only be used once per Server Block"),
]


@pytest.mark.parametrize(("text", "said"), SAID)
def test_mistakes_are_said(text: str, said: str) -> None:
    assert any(said in line for line in errors_of(text)), errors_of(text)


NAMES = st.lists(st.sampled_from(["a", "b.c", "*.d", "A", "#x", "a..b", "", "e\\"]), max_size=4)
ADDRESSES = st.sampled_from(["192.0.2.1", "::1", "2001:db8::1", "x", "", "1.2.3", "::ffff:1.2.3.4"])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(ADDRESSES, NAMES), max_size=10))
def test_what_is_read_is_found_both_ways(found: list[tuple[str, list[str]]]) -> None:
    lines = [" ".join([address, *names]) for address, names in found]
    plugin = hosts(content="\n".join(lines).encode())
    table = parse_hosts(lines, (ROOT,), True)
    for packed, keys in table.names.items():
        for key in keys:
            assert packed in (table.v4 if len(packed) == 4 else table.v6)[key]
    for address, names in found:
        if address not in ("", "x", "1.2.3") and "a" in names[:1]:
            qtype = "A" if "." in address else "AAAA"
            assert ask(plugin, "a.", qtype)[1]
            mapped = address.removeprefix("::ffff:")
            reverse = render_name(reverse_name(mapped))
            reply = plugin.on_query(question(reverse, "PTR"))
            assert isinstance(reply, Reply)
            assert b"\x01a\x00" in [rr.rdata for rr in reply.answer]
