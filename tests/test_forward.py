"""`forward`: which questions it sends on, under which rules, and what it says of mistakes."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from support import Stub, a, answer, build, directives, errors_of, make_setup, question, run

from kdns.dns import types as t
from kdns.dns.message import AD, Reply
from kdns.dns.name import parse_name
from kdns.plugins import forward as forward_module
from kdns.plugins.chain import Pending, Result
from kdns.plugins.forward import Forward, Upstream, Upstreams, parse_resolv_conf
from kdns.plugins.plugin import Plugin, WatchFile
from kdns.plugins.setup import Setup


def forwards(text: str, cx: Setup | None = None) -> list[Forward]:
    cx = cx or make_setup()
    plugins = forward_module.setup(directives(text), cx)
    assert cx.problems.found == []
    assert all(isinstance(plugin, Forward) for plugin in plugins)
    return [plugin for plugin in plugins if isinstance(plugin, Forward)]


def rules_of(text: str) -> Upstreams:
    (plugin,) = forwards(text)
    assert plugin.upstreams is not None
    return plugin.upstreams


# --- whom ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("10.0.0.1", ("10.0.0.1", 53, "dns", "")),
        ("10.0.0.1:1053", ("10.0.0.1", 1053, "dns", "")),
        ("dns://10.0.0.1", ("10.0.0.1", 53, "dns", "")),
        ("dns://10.0.0.1:54", ("10.0.0.1", 54, "dns", "")),
        ("::1", ("::1", 53, "dns", "")),
        ("[::1]", ("::1", 53, "dns", "")),
        ("[::1]:1053", ("::1", 1053, "dns", "")),
        ("[fe80::1%eth0]:54", ("fe80::1%eth0", 54, "dns", "")),
        ("fe80::1%eth0", ("fe80::1%eth0", 53, "dns", "")),
        ("tls://9.9.9.9", ("9.9.9.9", 853, "tls", "")),
        ("tls://9.9.9.9:8853", ("9.9.9.9", 8853, "tls", "")),
        ("tls://9.9.9.9%dns.quad9.net", ("9.9.9.9", 853, "tls", "dns.quad9.net")),
        ("tls://9.9.9.9%dns.quad9.net:8853", ("9.9.9.9", 8853, "tls", "dns.quad9.net")),
        ("tls://[2620:fe::fe]:853", ("2620:fe::fe", 853, "tls", "")),
        ("tls://[2620:fe::fe%dns.quad9.net]:853", ("2620:fe::fe", 853, "tls", "dns.quad9.net")),
        ("tls://[2620:fe::fe]%dns.quad9.net", ("2620:fe::fe", 853, "tls", "dns.quad9.net")),
    ],
)
def test_ways_to_write_an_upstream(target: str, expected: tuple[str, int, str, str]) -> None:
    assert rules_of(f"forward . {target}").addresses == (Upstream(*expected),)


def test_the_label_is_host_and_port() -> None:
    rules = rules_of("forward . 10.0.0.1 tls://[::1]:54")
    assert [x.label for x in rules.addresses] == ["10.0.0.1:53", "[::1]:54"]


def test_the_same_upstream_twice_is_asked_once() -> None:
    rules = rules_of("forward . 10.0.0.1 10.0.0.2 10.0.0.1:53")
    assert [x.host for x in rules.addresses] == ["10.0.0.1", "10.0.0.2"]


@pytest.mark.parametrize(
    ("option", "field", "value"),
    [
        ("force_tcp", "force_tcp", True),
        ("prefer_udp", "prefer_udp", True),
        ("expire 20s", "expire", 20.0),
        ("max_age 1m", "max_age", 60.0),
        ("max_idle_conns 3", "max_idle", 3),
        ("read_timeout 500ms", "read_timeout", 0.5),
        ("max_fails 0", "max_fails", 0),
        ("max_connect_attempts 7", "max_attempts", 7),
        ("max_connect_attempts 0", "max_attempts", 0),
        ("policy round_robin", "policy", "round_robin"),
        ("policy sequential", "policy", "sequential"),
        ("health_check 5s", "health_interval", 5.0),
        ("health_check 5s no_rec", "health_recursion", False),
        ("health_check 5s domain Example.org", "health_name", parse_name("example.org.")),
        ("max_concurrent 1000", "max_concurrent", 1000),
        ("failover servfail REFUSED", "failover", {t.SERVFAIL, t.REFUSED}),
        ("failfast_all_unhealthy_upstreams", "failfast", True),
        ("source_address 10.0.0.9", "source_address", "10.0.0.9"),
    ],
)
def test_options(option: str, field: str, value: object) -> None:
    assert getattr(rules_of(f"forward . 10.0.0.1 {{\n {option}\n}}"), field) == value


def test_defaults_are_coredns_own() -> None:
    rules = rules_of("forward . 10.0.0.1")
    found = {
        name: getattr(rules, name)
        for name in ("policy", "expire", "read_timeout", "max_fails", "max_attempts",
                     "health_interval", "health_recursion", "max_concurrent", "max_idle")
    }  # fmt: skip
    assert found == {
        "policy": "random", "expire": 10.0, "read_timeout": 2.0, "max_fails": 2,
        "max_attempts": None, "health_interval": 0.5, "health_recursion": True,
        "max_concurrent": 0, "max_idle": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("args", "files"),
    [
        ("", ("", "", "")),
        ("/ca.pem", ("", "", "/ca.pem")),
        ("cert.pem key.pem", ("./cert.pem", "./key.pem", "")),
        ("/c /k /ca", ("/c", "/k", "/ca")),
    ],
)
def test_tls_files(args: str, files: tuple[str, str, str]) -> None:
    rules = rules_of(f"forward . tls://9.9.9.9 {{\n tls {args}\n tls_servername dns.quad9.net\n}}")
    assert (rules.tls_files, rules.server_name) == (files, "dns.quad9.net")


# --- mistakes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("forward", "'forward' needs 2 arguments"),
        ("forward .", "'forward' needs 2 arguments"),
        ("forward . notanip", 'not an IP address or file: "notanip"'),
        ("forward . dns.example.local", "kdns resolves no host names"),
        ("forward . tls://one.one.one.one", "kdns resolves no host names"),
        ("forward . https://9.9.9.9", "kdns does not forward over https"),
        ("forward . tsl://9.9.9.9", "did you mean 'tls'?"),
        ("forward . foo://9.9.9.9", "'foo' is not supported as a destination protocol"),
        ("forward . 10.0.0.1:0", "invalid port '0'"),
        ("forward . 10.0.0.1:99999", "invalid port '99999'"),
        ("forward . 10.0.0.1:dns", "invalid port 'dns'"),
        ("forward . 10.0.0.1%name", "warning: '%name' is ignored"),
        ("forward . " + "10.0.0.1 " * 16, "more than 15 TOs configured: 16"),
        ("forward . 10.0.0.1 {\n foo\n}", "unknown property 'foo'"),
        ("forward . 10.0.0.1 {\n force_tpc\n}", "did you mean 'force_tcp'?"),
        ("forward . 10.0.0.1 {\n force_tcp yes\n}", "unexpected 'yes' after 'force_tcp'"),
        ("forward . 10.0.0.1 {\n policy foo\n}", "unknown policy 'foo'"),
        ("forward . 10.0.0.1 {\n policy round-robin\n}", "did you mean 'round_robin'?"),
        ("forward . 10.0.0.1 {\n except\n}", "'except' needs an argument"),
        ("forward . 10.0.0.1 {\n expire 10\n}", "'10' is not a duration"),
        ("forward . 10.0.0.1 {\n max_age 5s\n}", "max_age (5s) must not be less than expire (10s)"),
        ("forward . 10.0.0.1 {\n read_timeout 0s\n}", "read_timeout must be positive: 0s"),
        ("forward . 10.0.0.1 {\n max_fails -1\n}", "max_fails must be in range"),
        ("forward . 10.0.0.1 {\n max_concurrent x\n}", "max_concurrent must be a number"),
        ("forward . 10.0.0.1 {\n health_check 0s\n}", "'max_fails 0' turns health checks off"),
        ("forward . 10.0.0.1 {\n health_check 1s norec\n}", "did you mean 'no_rec'?"),
        ("forward . 10.0.0.1 {\n health_check 1s domain\n}", "'domain' needs a domain name"),
        ("forward . 10.0.0.1 {\n health_check 1s domain a..b\n}", "invalid domain name"),
        ("forward . 10.0.0.1 {\n next FOO\n}", "FOO is not a valid rcode"),
        ("forward . 10.0.0.1 {\n next NXDOMIAN\n}", "did you mean 'nxdomain'?"),
        ("forward . 10.0.0.1 {\n failover NOERROR\n}", "NOERROR cannot be used in failover"),
        ("forward . 10.0.0.1 {\n source_address x\n}", "invalid IP address: x"),
        ("forward . 10.0.0.1 {\n resolver 10.0.0.2\n}", "it has no 'resolver'"),
        ("forward . 10.0.0.1 {\n doh_method GET\n}", "it has no 'doh_method'"),
        ("forward . tls://9.9.9.9 {\n tls a b c d\n}", "unexpected 'd' after 'tls'"),
        ("forward . 9.9.9.9 {\n tls_servername dns.quad9.net\n}", "go out in the clear"),
        ("forward . tls://9.9.9.9%a.b {\n tls_servername c.d\n}", "both forward ('c.d')"),
        ("forward a..b 10.0.0.1", "zone is not a valid domain name"),
    ],
)
def test_mistakes(text: str, said: str) -> None:
    (problem,) = errors_of(text)
    assert said in problem
    assert problem.startswith("Corefile:")


def test_all_mistakes_are_said_at_once() -> None:
    found = errors_of("forward . x y {\n foo\n policy z\n}\nforward . v")
    assert [problem.split(":")[1] for problem in found] == ["2", "3", "1", "1", "5"]


# --- which questions ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "forwarded"),
    [
        ("example.org.", True),
        ("www.EXAMPLE.org.", True),
        ("example.com.", False),
        ("xexample.org.", False),
        ("lab.example.org.", False),
        ("a.lab.example.org.", False),
        ("xlab.example.org.", True),
    ],
)
def test_from_and_except(name: str, forwarded: bool) -> None:
    plugins = build("forward example.org 10.0.0.1 {\n except lab.example.org\n}")
    assert isinstance(run(plugins, question(name)), Pending) is forwarded


def test_the_zone_itself_cannot_be_excluded() -> None:
    plugins = build("forward example.org 10.0.0.1 {\n except org\n}")
    assert isinstance(run(plugins, question("example.org.")), Pending)
    assert isinstance(run(plugins, question("a.example.org.")), Reply)


def test_a_cidr_stands_for_all_its_reverse_zones() -> None:
    plugins = build("forward 10.0.0.0/15 10.0.0.1")
    for name, forwarded in [("1.0.0.10", True), ("1.0.1.10", True), ("1.0.2.10", False)]:
        result = run(plugins, question(f"{name}.in-addr.arpa.", "PTR"))
        assert isinstance(result, Pending) is forwarded


def test_forwards_are_asked_in_the_order_of_the_corefile() -> None:
    plugins = build("forward lab.example.org 10.0.0.2\nforward . 10.0.0.1")

    def host(name: str) -> str:
        result = run(plugins, question(name))
        assert isinstance(result, Pending)
        return str(result.forward.upstreams.addresses[0].host)

    assert host("a.lab.example.org.") == "10.0.0.2"
    assert host("example.org.") == "10.0.0.1"


def test_a_loop_is_answered_with_servfail() -> None:
    plugins = build("forward . 10.0.0.1")
    assert isinstance(plugins[0], Forward)
    plugins[0].looping = "Loop detected"
    reply = answer(plugins, question("example.org."))
    assert (reply.rcode, reply.error) == (t.SERVFAIL, "Loop detected")


@pytest.mark.parametrize("cached", [False, True])
def test_behind_a_cache_the_ad_bit_is_asked_for(cached: bool) -> None:
    plugins = build(("cache\n" if cached else "") + "forward . 10.0.0.1")
    query = question("example.org.")
    result = run(plugins, query)
    assert isinstance(result, Pending)
    assert bool(result.forward.query.flags & AD) is cached
    assert not query.flags & AD


# --- next ---------------------------------------------------------------------------------


def first_reply(text: str, reply: Reply, last: Plugin | None = None) -> Result:
    plugins = build(text) + ([last] if last else [])
    result = run(plugins, question("example.org."))
    assert isinstance(result, Pending)
    return result.resume(reply)


TWO = "forward . 10.0.0.1 {\n %s\n}\nforward . 10.0.0.2"


@pytest.mark.parametrize(
    ("option", "reply", "goes_on"),
    [
        ("next NXDOMAIN", Reply(t.NXDOMAIN), True),
        ("next nxdomain servfail", Reply(t.SERVFAIL), True),
        ("next NXDOMAIN", Reply(t.SERVFAIL), False),
        ("next SERVFAIL", Reply(t.SERVFAIL, error="i/o timeout"), False),
        ("next NXDOMAIN", Reply(t.NOERROR), False),
        ("next_on_nodata", Reply(t.NOERROR), True),
        ("next_on_nodata", Reply(t.NOERROR, [a("example.org.", "192.0.2.1")]), False),
        ("next_on_nodata", Reply(t.NXDOMAIN), False),
    ],
)
def test_next(option: str, reply: Reply, goes_on: bool) -> None:
    result = first_reply(TWO % option, reply)
    if goes_on:
        assert isinstance(result, Pending)
        assert result.forward.upstreams.addresses[0].host == "10.0.0.2"
    else:
        assert result is reply


def test_next_leads_to_nothing_but_a_forward() -> None:
    reply = Reply(t.NXDOMAIN)
    stub = Stub()
    assert first_reply("forward . 10.0.0.1 {\n next NXDOMAIN\n}", reply, stub) is reply
    assert first_reply("forward . 10.0.0.1 {\n next NXDOMAIN\n}", reply) is reply
    assert stub.asked == []


# --- resolv.conf --------------------------------------------------------------------------

GAUGE = "kdns_forward_unusable_resolv_conf"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("nameserver 10.0.0.1\nnameserver 10.0.0.2\n", ["10.0.0.1:53", "10.0.0.2:53"]),
        ("search a b\n# nameserver 10.0.0.1\n; nameserver 10.0.0.2\n", []),
        ("nameserver\t::1   # mine\r\n  nameserver 10.0.0.3", ["[::1]:53", "10.0.0.3:53"]),
        ("nameserver fe80::1%eth0", ["[fe80::1%eth0]:53"]),
        ("nameserver\nnameserver x\nnameservers 10.0.0.1", []),
        ("\ufeff\0 \x80 nameserver", []),
        ("", []),
    ],
)
def test_nameservers_of_a_resolv_conf(content: str, expected: list[str]) -> None:
    assert [x.label for x in parse_resolv_conf(content.encode())] == expected


def loaded(
    text: str, content: bytes | None, error: str = "", facts: dict[str, Any] | None = None
) -> tuple[Forward, Setup]:
    cx = make_setup()
    for name, value in (facts or {}).items():
        setattr(cx.facts, name, value)
    (plugin,) = forwards(text, cx)
    (work,) = plugin.work()
    assert isinstance(work, WatchFile)
    assert (work.path, work.interval) == ("/etc/resolv.conf", 0)
    assert work.load(content, error) is True
    return plugin, cx


def test_a_resolv_conf_gives_the_upstreams() -> None:
    plugin, cx = loaded(
        "forward . 10.0.0.9 /etc/resolv.conf {\n force_tcp\n}",
        b"nameserver 10.0.0.1\nnameserver 10.0.0.9\n",
    )
    assert plugin.upstreams is not None
    assert [x.host for x in plugin.upstreams.addresses] == ["10.0.0.9", "10.0.0.1"]
    assert plugin.upstreams.force_tcp
    assert cx.metrics.value(GAUGE, "dns://:53", "/etc/resolv.conf") == 0


HERE = {"local_addresses": (bytes((192, 0, 2, 7)),), "port": 53}


@pytest.mark.parametrize(
    ("content", "error", "facts", "said"),
    [
        (None, "no such file", {}, "no such file"),
        (b"search cluster.local\n", "", {}, "no nameserver"),
        (b"nameserver 192.0.2.7\nnameserver 127.0.0.1\n", "", HERE, "this server itself"),
        (b"nameserver ::1\n", "", HERE, "this server itself"),
    ],
)
def test_a_useless_resolv_conf_degrades(
    content: bytes | None,
    error: str,
    facts: dict[str, Any],
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Said in the log, counted, and that forward answers SERVFAIL; nothing ends."""
    with caplog.at_level(logging.WARNING, "kdns"):
        plugin, cx = loaded("forward . /etc/resolv.conf", content, error, facts)
    assert said in caplog.text
    assert cx.metrics.value(GAUGE, "dns://:53", "/etc/resolv.conf") == 1
    reply = answer([plugin], question("example.org."))
    assert reply.rcode == t.SERVFAIL
    assert reply.error is not None
    assert said in reply.error and "/etc/resolv.conf" in reply.error


def test_before_the_resolv_conf_was_read_it_is_servfail() -> None:
    (plugin,) = forwards("forward . /etc/resolv.conf")
    assert answer([plugin], question("example.org.")).rcode == t.SERVFAIL


@pytest.mark.parametrize(
    ("facts", "hosts"),
    [
        (HERE, ["10.0.0.1"]),
        ({**HERE, "port": 1053}, ["127.0.0.1", "192.0.2.7", "10.0.0.1"]),
        ({"port": 53}, ["127.0.0.1", "192.0.2.7", "10.0.0.1"]),
    ],
)
def test_nameservers_that_are_this_server_are_left_out(
    facts: dict[str, Any], hosts: list[str]
) -> None:
    """On another port, or bound to given addresses, they are somebody else."""
    content = b"nameserver 127.0.0.1\nnameserver 192.0.2.7\nnameserver 10.0.0.1\n"
    plugin, _ = loaded("forward . /etc/resolv.conf", content, facts=facts)
    assert plugin.upstreams is not None
    assert [x.host for x in plugin.upstreams.addresses] == hosts


def test_no_more_than_fifteen_nameservers() -> None:
    content = "".join(f"nameserver 10.0.0.{n}\n" for n in range(1, 40)).encode()
    plugin, _ = loaded("forward . /etc/resolv.conf", content)
    assert plugin.upstreams is not None
    assert len(plugin.upstreams.addresses) == 15
