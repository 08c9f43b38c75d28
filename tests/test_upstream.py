"""Questions to upstreams over real sockets: transports, retries, health, forgery, bounds."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dns.edns
import dns.flags
import dns.message
import dns.rcode
import pytest
import pytest_asyncio
import trustme
from support import question
from upstream_server import (
    CLOSE,
    Answers,
    Asked,
    UpstreamServer,
    ZoneAnswers,
    records,
    reply_to,
    silence,
)

from kdns.dns import types as t
from kdns.dns.message import AA, AD, CD, RD, TC, Edns, Query, Reply
from kdns.dns.name import parse_name
from kdns.metrics import Metrics
from kdns.plugins.forward import Upstream, Upstreams
from kdns.plugins.plugin import Forward
from kdns.server import links, upstream
from kdns.server.upstream import UpstreamPool

pytestmark = pytest.mark.asyncio

LONG = 5.0
ONE = records("@ 300 IN A 192.0.2.1")


@pytest.fixture
def server() -> Iterator[UpstreamServer]:
    with UpstreamServer(ONE) as running:
        yield running


@pytest.fixture
def other() -> Iterator[UpstreamServer]:
    with UpstreamServer(records("@ 300 IN A 192.0.2.2")) as running:
        yield running


class Pool:
    """An UpstreamPool with its metrics."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.pool = UpstreamPool(self.metrics)

    def begin(self, upstreams: Upstreams, query: Query) -> asyncio.Future[Reply]:
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self.pool.send(Forward(upstreams, query), future.set_result)
        return future

    async def ask(self, upstreams: Upstreams, query: Query | None = None) -> Reply:
        query = query or question("www.example.com.")
        return await asyncio.wait_for(self.begin(upstreams, query), LONG)


@pytest_asyncio.fixture
async def pool() -> AsyncIterator[Pool]:
    made = Pool()
    yield made
    await made.pool.close()
    assert asyncio.all_tasks() == {asyncio.current_task()}, "a task was left behind"


def to(*targets: UpstreamServer | int, **rules: Any) -> Upstreams:
    """Upstreams at these servers or closed ports, asked in this order."""
    ports = [x if isinstance(x, int) else x.port for x in targets]
    rules = {"policy": "sequential", "max_fails": 0, "read_timeout": 2.0, **rules}
    return Upstreams(tuple(Upstream("127.0.0.1", port) for port in ports), **rules)


@pytest.fixture
def closed_port() -> int:
    """A port of 127.0.0.1 where nobody listens."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def addresses(reply: Reply) -> list[str]:
    return [socket.inet_ntoa(rr.rdata) for rr in reply.answer if rr.type == t.A]


async def arrived(server: UpstreamServer, count: int) -> list[Asked]:
    return await asyncio.to_thread(server.wait_asked, count)


async def until(condition: Callable[[], bool]) -> None:
    """Give the loop its turn until `condition` holds."""
    async with asyncio.timeout(LONG):
        while not condition():
            await asyncio.sleep(0.002)


# --- what comes back ----------------------------------------------------------------------


async def test_the_upstreams_records_and_flags_are_passed_on(pool: Pool) -> None:
    with UpstreamServer(ZoneAnswers()) as server:
        reply = await pool.ask(to(server))
        missing = await pool.ask(to(server), question("nosuch.example.com."))
        foreign = await pool.ask(to(server), question("www.example.org."))
        mail = await pool.ask(to(server), question("example.com.", "MX"))
    assert (reply.rcode, reply.flags, reply.served_by) == (t.NOERROR, AA, "forward")
    assert sorted(addresses(reply)) == ["192.0.2.80", "192.0.2.81"]
    assert [rr.ttl for rr in reply.answer] == [300, 300]
    assert missing.rcode == t.NXDOMAIN
    assert [(rr.type, rr.ttl) for rr in missing.authority] == [(t.SOA, 60)]
    assert (foreign.rcode, foreign.flags) == (t.REFUSED, 0)
    assert [rr.name for rr in mail.additional] == [parse_name("mail.example.com.")]


async def test_the_query_carries_what_the_client_asked_for(
    pool: Pool, server: UpstreamServer
) -> None:
    query = question(
        "WwW.Example.com.", "AAAA", rd=False, edns=Edns(1400, do=True, options=[(10, b"12345678")])
    )
    query.flags |= CD | AD
    await pool.ask(to(server), query)
    plain = question("example.com.")
    await pool.ask(to(server), plain)
    first, second = (asked.message for asked in server.asked)
    assert first.question[0].to_text() == "WwW.Example.com. IN AAAA"
    assert first.flags == dns.flags.CD | dns.flags.AD
    assert (first.payload, first.ednsflags) == (1400, dns.flags.DO)
    assert [(int(o.otype), o.to_wire()) for o in first.options] == [(10, b"12345678")]
    assert (second.flags, second.edns) == (dns.flags.RD, -1)
    assert plain.flags == RD, "the client's own query was changed"


async def test_the_upstreams_opt_is_handed_up(pool: Pool) -> None:
    def with_nsid(asked: Asked) -> list[bytes]:
        reply = reply_to(asked.message)
        reply.use_edns(
            0, 0, 1232, options=[dns.edns.GenericOption(dns.edns.OptionType.NSID, b"here")]
        )
        return [reply.to_wire()]

    with UpstreamServer(with_nsid) as server:
        reply = await pool.ask(to(server), question("a.", edns=Edns(1232)))
    assert reply.edns is not None
    assert list(reply.edns.options) == [(3, b"here")]


async def test_an_extended_rcode_of_the_upstream_is_kept(pool: Pool) -> None:
    def badcookie(asked: Asked) -> list[bytes]:
        reply = reply_to(asked.message)
        reply.use_edns(0)
        reply.set_rcode(dns.rcode.BADCOOKIE)
        return [reply.to_wire()]

    with UpstreamServer(badcookie) as server:
        assert (await pool.ask(to(server), question("a.", edns=Edns(1232)))).rcode == 23


# --- transports ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "client", "asked"),
    [
        ({}, "udp", ["udp"]),
        ({}, "tcp", ["tcp"]),
        ({}, "tls", ["tcp"]),
        ({}, "https", ["tcp"]),
        ({"force_tcp": True}, "udp", ["tcp"]),
        ({"prefer_udp": True}, "tcp", ["udp"]),
        ({"force_tcp": True, "prefer_udp": True}, "udp", ["tcp"]),
    ],
)
async def test_which_transport_is_used(
    pool: Pool, server: UpstreamServer, rules: dict[str, Any], client: str, asked: list[str]
) -> None:
    reply = await pool.ask(to(server, **rules), question("a.", proto=client))
    assert addresses(reply) == ["192.0.2.1"]
    assert [one.proto for one in server.asked] == asked


@pytest.mark.parametrize(
    ("rules", "client", "asked", "truncated"),
    [
        ({}, "udp", ["udp"], True),
        ({"prefer_udp": True}, "udp", ["udp", "tcp"], False),
        ({"prefer_udp": True}, "tcp", ["udp", "tcp"], False),
        ({}, "tcp", ["tcp"], False),
    ],
)
async def test_a_truncated_answer(
    pool: Pool, rules: dict[str, Any], client: str, asked: list[str], truncated: bool
) -> None:
    """Passed on to a client that can ask again over TCP; prefer_udp asks again by itself."""
    with UpstreamServer(ZoneAnswers()) as server:
        query = question("big.example.com.", "TXT", proto=client, edns=Edns(4096))
        reply = await pool.ask(to(server, **rules), query)
        assert [one.proto for one in server.asked] == asked
    assert bool(reply.flags & TC) is truncated
    assert len(reply.answer) == (0 if truncated else 30)


@pytest.mark.parametrize(
    ("edns", "rules", "asked", "got"),
    [
        (None, {}, ["udp"], (0, TC)),
        (Edns(1232), {}, ["udp"], (60, 0)),
        (None, {"prefer_udp": True}, ["udp", "tcp"], (60, 0)),
    ],
)
async def test_a_datagram_larger_than_was_asked_for_counts_as_truncated(
    pool: Pool, edns: Edns | None, rules: dict[str, Any], asked: list[str], got: tuple[int, int]
) -> None:
    many = records(*(f"@ 300 IN A 192.0.2.{n}" for n in range(60)))
    with UpstreamServer(many) as server:
        reply = await pool.ask(to(server, **rules), question("a.", edns=edns))
        assert [one.proto for one in server.asked] == asked
    assert (len(reply.answer), reply.flags) == got


async def test_one_connection_serves_questions_one_after_the_other(
    pool: Pool, server: UpstreamServer
) -> None:
    rules = to(server, force_tcp=True)
    for name in ("a.", "b.", "c."):
        await pool.ask(rules, question(name))
    assert (server.connections, len(server.asked)) == (1, 3)
    labels = ("forward", server.address, "tcp")
    assert pool.metrics.value("coredns_proxy_conn_cache_misses_total", *labels) == 1
    assert pool.metrics.value("coredns_proxy_conn_cache_hits_total", *labels) == 2


async def test_questions_at_the_same_time_share_connections_beyond_the_bound(
    pool: Pool, server: UpstreamServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream, "MAX_STREAMS", 2)
    server.hold()
    rules = to(server, force_tcp=True)
    waiting = [pool.begin(rules, question(f"n{n}.")) for n in range(7)]
    await arrived(server, 7)
    server.release()
    replies = await asyncio.gather(*waiting)
    assert [r.answer[0].name for r in replies] == [parse_name(f"n{n}.") for n in range(7)]
    assert server.connections == 2


async def test_a_connection_the_upstream_closed_while_idle_is_no_failure(
    pool: Pool, server: UpstreamServer
) -> None:
    rules = to(server, force_tcp=True, max_attempts=1)
    await pool.ask(rules, question("a."))
    server.close_connections()
    assert addresses(await pool.ask(rules, question("b."))) == ["192.0.2.1"]
    assert server.connections == 2


async def test_a_connection_closed_in_place_of_an_answer_is_asked_for_once_more(
    pool: Pool, server: UpstreamServer
) -> None:
    rules = to(server, force_tcp=True, max_attempts=1)
    await pool.ask(rules, question("a."))
    answers: list[Answers | None] = [CLOSE]
    server.behaviour = lambda asked: answers.pop() if answers else ONE(asked)
    assert addresses(await pool.ask(rules, question("b."))) == ["192.0.2.1"]


async def test_an_upstream_that_closes_every_connection_ends_in_servfail(
    pool: Pool, server: UpstreamServer
) -> None:
    server.behaviour = lambda asked: CLOSE
    reply = await pool.ask(to(server, force_tcp=True))
    assert (reply.rcode, len(server.asked)) == (t.SERVFAIL, 2)
    assert reply.error is not None and reply.error.endswith(": EOF")


async def test_an_expired_connection_is_not_used_again(pool: Pool, server: UpstreamServer) -> None:
    rules = to(server, force_tcp=True, expire=0.0)
    await pool.ask(rules, question("a."))
    await pool.ask(rules, question("b."))
    assert server.connections == 2


async def test_ipv6_upstream(pool: Pool) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this host has no IPv6")
    with UpstreamServer(ONE, host="::1") as server:
        rules = Upstreams((Upstream("::1", server.port),))
        assert addresses(await pool.ask(rules)) == ["192.0.2.1"]
        tcp = await pool.ask(replace(rules, force_tcp=True))
    assert addresses(tcp) == ["192.0.2.1"]
    to_label = f"[::1]:{server.port}"
    assert pool.metrics.value("coredns_proxy_conn_cache_misses_total", "forward", to_label, "udp")


async def test_source_address(pool: Pool, server: UpstreamServer) -> None:
    await pool.ask(to(server, source_address="127.0.0.2"))
    await pool.ask(to(server, source_address="127.0.0.3", force_tcp=True))
    assert [asked.client[0] for asked in server.asked] == ["127.0.0.2", "127.0.0.3"]


# --- DNS over TLS -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def dot(authority: trustme.CA) -> Iterator[UpstreamServer]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("dns.test", "127.0.0.1").configure_cert(context)
    with UpstreamServer(ONE, tls=context) as running:
        yield running


@pytest.mark.parametrize(
    ("global_name", "own_name"), [("dns.test", ""), ("", "dns.test"), ("", "")]
)
async def test_dns_over_tls(
    pool: Pool,
    dot: UpstreamServer,
    authority: trustme.CA,
    tmp_path: Path,
    global_name: str,
    own_name: str,
) -> None:
    """Without any name the certificate must be for the IP address."""
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    rules = Upstreams(
        (Upstream("127.0.0.1", dot.tls_port, "tls", own_name),),
        server_name=global_name,
        tls_files=("", "", str(tmp_path / "ca.pem")),
    )
    assert addresses(await pool.ask(rules)) == ["192.0.2.1"]
    assert addresses(await pool.ask(rules, question("b."))) == ["192.0.2.1"]
    assert [asked.proto for asked in dot.asked] == ["tls", "tls"]
    assert dot.connections == 1


@pytest.mark.parametrize(
    ("name", "trusted", "error"),
    [
        ("other.test", True, "certificate"),
        ("dns.test", False, "certificate"),
        ("", None, "tls: cannot use"),
    ],
)
async def test_an_upstream_that_is_not_who_it_shall_be_is_not_asked(
    pool: Pool,
    dot: UpstreamServer,
    authority: trustme.CA,
    tmp_path: Path,
    name: str,
    trusted: bool | None,
    error: str,
) -> None:
    """trusted None: the CA file is no certificate at all."""
    file = tmp_path / "ca.pem"
    if trusted is None:
        file.write_text("not a certificate")
    else:
        (authority if trusted else trustme.CA()).cert_pem.write_to_path(str(file))
    rules = Upstreams(
        (Upstream("127.0.0.1", dot.tls_port, "tls"),),
        server_name=name,
        tls_files=("", "", str(file)),
        max_fails=0,
    )
    reply = await pool.ask(rules)
    assert reply.rcode == t.SERVFAIL
    assert reply.error is not None and error in reply.error
    assert dot.asked == []


async def test_client_certificate_and_health_check_over_tls(
    pool: Pool, authority: trustme.CA, tmp_path: Path
) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(context)
    authority.issue_cert("dns.test").configure_cert(context)
    mine = authority.issue_cert("kdns.test")
    files = [str(tmp_path / name) for name in ("cert.pem", "key.pem", "ca.pem")]
    mine.cert_chain_pems[0].write_to_path(files[0])
    mine.private_key_pem.write_to_path(files[1])
    authority.cert_pem.write_to_path(files[2])
    with UpstreamServer(tls=context) as server:
        server.behaviour = lambda asked: None if asked.qtype == "A" else ONE(asked)
        rules = Upstreams(
            (Upstream("127.0.0.1", server.tls_port, "tls"),),
            server_name="dns.test",
            tls_files=(files[0], files[1], files[2]),
            read_timeout=0.05,
            max_attempts=1,
        )
        assert (await pool.ask(rules)).rcode == t.SERVFAIL
        question, check = await arrived(server, 2)
    assert (question.proto, question.qtype) == ("tls", "A")
    assert (check.proto, check.name, check.qtype) == ("tls", ".", "NS")


# --- several askers, several questions ----------------------------------------------------


async def test_the_same_question_in_flight_is_asked_once(
    pool: Pool, server: UpstreamServer
) -> None:
    server.hold()
    rules = to(server)
    waiting = [
        pool.begin(rules, question(name)) for name in ("a.example.", "A.Example.", "a.example.")
    ]
    waiting.append(pool.begin(rules, question("a.example.", "AAAA")))
    waiting.append(pool.begin(rules, question("a.example.", edns=Edns(1232, do=True))))
    waiting.append(pool.begin(rules, question("a.example.", rd=False)))
    waiting.append(pool.begin(rules, question("a.example.", proto="tcp")))
    await arrived(server, 5)
    server.release()
    replies = await asyncio.gather(*waiting)
    assert len(server.asked) == 5
    assert all(addresses(reply) == ["192.0.2.1"] for reply in replies)
    replies[0].answer.clear()
    assert addresses(replies[1]) == ["192.0.2.1"], "askers shared one list of records"


async def test_a_question_asked_again_later_is_asked_anew(
    pool: Pool, server: UpstreamServer
) -> None:
    rules = to(server)
    await pool.ask(rules)
    await pool.ask(rules)
    assert len(server.asked) == 2


async def test_more_than_max_concurrent_are_refused(pool: Pool, server: UpstreamServer) -> None:
    server.hold()
    rules = to(server, max_concurrent=2)
    waiting = [pool.begin(rules, question(name)) for name in ("a.", "a.")]
    refused = await pool.ask(rules, question("b."))
    assert (refused.rcode, refused.error) == (
        t.REFUSED,
        "concurrent queries exceeded maximum 2",
    )
    await arrived(server, 1)
    server.release()
    await asyncio.gather(*waiting)
    assert pool.metrics.value("coredns_forward_max_concurrent_rejects_total") == 1
    assert addresses(await pool.ask(rules, question("b."))) == ["192.0.2.1"]


# --- forgery ------------------------------------------------------------------------------


async def test_ids_and_ports_cannot_be_foreseen(
    pool: Pool, server: UpstreamServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "MAX_USES", 4)
    rules = to(server)
    for n in range(120):
        await pool.ask(rules, question(f"n{n}."))
    ids = {asked.wire[:2] for asked in server.asked}
    ports = {asked.client[1] for asked in server.asked}
    assert len(ids) > 110
    assert len(ports) >= 120 // 4
    await until(lambda: len(open_udp_ports()) <= upstream.UDP_SOCKETS + 1)


def open_udp_ports() -> list[str]:
    """This process's UDP sockets."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(fd))) as sock:
                if sock.type == socket.SOCK_DGRAM and sock.family == socket.AF_INET:
                    found.append(fd)
        except OSError:
            continue
    return found


def forge(change: Callable[[dns.message.Message], None]) -> Callable[[Asked], list[bytes]]:
    def answer(asked: Asked) -> list[bytes]:
        forged = dns.message.from_wire(records("@ 300 IN A 203.0.113.66")(asked)[0])  # type: ignore[index]
        change(forged)
        return [forged.to_wire(), *ONE(asked)]  # type: ignore[misc]

    return answer


def other_id(message: dns.message.Message) -> None:
    message.id ^= 1


def other_name(message: dns.message.Message) -> None:
    message.question[0].name = dns.name.from_text("evil.example.")


def other_type(message: dns.message.Message) -> None:
    message.question[0].rdtype = dns.rdatatype.AAAA


def other_class(message: dns.message.Message) -> None:
    message.question[0].rdclass = dns.rdataclass.CH


def no_question(message: dns.message.Message) -> None:
    message.question = []


def no_response(message: dns.message.Message) -> None:
    message.flags &= ~dns.flags.QR


@pytest.mark.parametrize(
    "change", [other_id, other_name, other_type, other_class, no_question, no_response]
)
async def test_a_datagram_that_does_not_fit_the_question_is_ignored(
    pool: Pool, server: UpstreamServer, change: Callable[[dns.message.Message], None]
) -> None:
    server.behaviour = forge(change)
    assert addresses(await pool.ask(to(server))) == ["192.0.2.1"]
    assert pool.metrics.value("kdns_forward_ignored_replies_total", server.address) == 1


async def test_a_datagram_from_another_address_is_ignored(
    pool: Pool, server: UpstreamServer
) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:

        def answer(asked: Asked) -> Answers:
            forged = records("@ 300 IN A 203.0.113.66")(asked)
            assert isinstance(forged, list)
            stranger.sendto(forged[0], asked.client)
            return ONE(asked)

        server.behaviour = answer
        assert addresses(await pool.ask(to(server))) == ["192.0.2.1"]


async def test_an_answer_that_repeats_the_question_in_another_case_is_taken(
    pool: Pool, server: UpstreamServer
) -> None:
    def lower(asked: Asked) -> list[bytes]:
        return [ONE(asked)[0].replace(b"WWW", b"www")]  # type: ignore[index]

    server.behaviour = lower
    assert addresses(await pool.ask(to(server), question("WWW.example."))) == ["192.0.2.1"]


async def test_a_late_answer_is_ignored(
    pool: Pool, server: UpstreamServer, other: UpstreamServer
) -> None:
    server.hold()
    reply = await pool.ask(to(server, other, read_timeout=0.05))
    assert addresses(reply) == ["192.0.2.2"]
    server.release()
    labels = ("kdns_forward_ignored_replies_total", server.address)
    await until(lambda: pool.metrics.value(*labels) == 1)


async def test_an_error_without_question_and_a_wrong_question_over_tcp_are_formerr(
    pool: Pool, server: UpstreamServer
) -> None:
    server.behaviour = lambda asked: [asked.wire[:2] + b"\x80\x01" + bytes(8)]
    reply = await pool.ask(to(server))
    assert (reply.rcode, reply.error) == (t.FORMERR, None)

    def another(asked: Asked) -> list[bytes]:
        answer = dns.message.from_wire(ONE(asked)[0])  # type: ignore[index]
        other_name(answer)
        return [answer.to_wire()]

    server.behaviour = another
    reply = await pool.ask(to(server, force_tcp=True))
    assert (reply.rcode, reply.answer) == (t.FORMERR, [])


# --- failures -----------------------------------------------------------------------------


async def test_a_closed_port_is_noticed_at_once(
    pool: Pool, server: UpstreamServer, closed_port: int
) -> None:
    began = time.monotonic()
    for name in ("a.", "b.", "c."):
        reply = await pool.ask(to(closed_port, server, read_timeout=LONG), question(name))
        assert addresses(reply) == ["192.0.2.1"]
    assert time.monotonic() - began < LONG, "waited for the time-out"


@pytest.mark.parametrize("tcp", [False, True])
async def test_all_upstreams_dead_is_servfail_with_the_reason(
    pool: Pool, closed_port: int, tcp: bool
) -> None:
    reply = await pool.ask(to(closed_port, force_tcp=tcp))
    assert (reply.rcode, reply.flags) == (t.SERVFAIL, 0)
    assert reply.error is not None
    assert "connection refused" in reply.error
    assert f"127.0.0.1:{closed_port}" in reply.error


@pytest.mark.parametrize(("max_attempts", "asked"), [(None, [2, 2]), (1, [1, 0]), (3, [2, 1])])
async def test_silent_upstreams_are_tried_in_turn(
    pool: Pool,
    server: UpstreamServer,
    other: UpstreamServer,
    max_attempts: int | None,
    asked: list[int],
) -> None:
    server.behaviour = other.behaviour = silence
    reply = await pool.ask(to(server, other, read_timeout=0.05, max_attempts=max_attempts))
    assert reply.rcode == t.SERVFAIL
    assert reply.error is not None and reply.error.endswith(": i/o timeout")
    assert [len(server.asked), len(other.asked)] == asked


@pytest.mark.parametrize("max_attempts", [0, 5000])
async def test_many_attempts_end_with_the_time(
    pool: Pool, closed_port: int, monkeypatch: pytest.MonkeyPatch, max_attempts: int
) -> None:
    monkeypatch.setattr(upstream, "TOTAL", 0.3)
    monkeypatch.setattr(upstream, "ROUND_PAUSE", 0.02)
    reply = await pool.ask(to(closed_port, max_attempts=max_attempts))
    assert reply.rcode == t.SERVFAIL
    label = ("forward", f"127.0.0.1:{closed_port}", "udp")
    tries = pool.metrics.value("coredns_proxy_conn_cache_misses_total", *label)
    assert 2 <= tries <= 20, "it must neither give up at once nor spin"


async def test_a_silent_connection_that_many_share_ends_for_all_with_the_time(
    pool: Pool, server: UpstreamServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that waited for too long closes it, and the others ask again: not for ever."""
    monkeypatch.setattr(upstream, "TOTAL", 0.3)
    monkeypatch.setattr(upstream, "MAX_STREAMS", 1)
    server.behaviour = silence
    rules = to(server, force_tcp=True, read_timeout=0.1, max_attempts=0)
    asking = []
    for number in range(20):
        asking.append(pool.begin(rules, question(f"name-{number}.")))
        await asyncio.sleep(0.01)
    replies = await asyncio.wait_for(asyncio.gather(*asking), 4 * LONG)
    assert {reply.rcode for reply in replies} == {t.SERVFAIL}
    times = Counter(asked.name for asked in server.asked)
    # Begun within 0.3 s, and 0.1 s may pass from one to the next.
    assert max(times.values()) <= 5


async def test_who_asks_again_does_not_put_off_the_others_time() -> None:
    loop = asyncio.get_running_loop()
    deadlines = links.Deadlines(loop, 0.2)
    order: list[str] = []
    done = asyncio.Event()

    class Waiting(links.Errand):
        name = ""

    class Link:
        def expire(self, errand: Waiting) -> None:
            order.append(errand.name)
            if errand.name == "again":
                done.set()
            elif errand.name == "first":
                errand.name = "again"
                deadlines.add(errand, begin + 0.2)

    begin = loop.time()
    for name, at in (("first", 0.0), ("second", 0.1)):
        errand = Waiting()
        errand.name, errand.link = name, Link()  # type: ignore[assignment]
        deadlines.add(errand, begin + at)
    loop.call_at(begin + 0.35, order.append, "0.35 s")
    await asyncio.wait_for(done.wait(), LONG)
    assert order == ["first", "second", "0.35 s", "again"]


@pytest.mark.parametrize(
    ("rcodes", "answer", "asked"),
    [
        (["SERVFAIL", "NOERROR"], "192.0.2.9", [1, 1]),
        (["NOERROR", "NOERROR"], "192.0.2.9", [1, 0]),
        (["REFUSED", "NOERROR"], None, [1, 0]),
        (["SERVFAIL", "SERVFAIL"], None, [1, 1]),
    ],
)
async def test_failover(
    pool: Pool,
    server: UpstreamServer,
    other: UpstreamServer,
    rcodes: list[str],
    answer: str | None,
    asked: list[int],
) -> None:
    for one, rcode in zip((server, other), rcodes, strict=True):
        lines = ("@ 300 IN A 192.0.2.9",) if rcode == "NOERROR" else ()
        one.behaviour = records(*lines, rcode=rcode)
    reply = await pool.ask(to(server, other, failover=frozenset({t.SERVFAIL})))
    assert addresses(reply) == ([answer] if answer else [])
    assert reply.error is None
    assert [len(server.asked), len(other.asked)] == asked


async def test_octets_that_are_no_message_make_it_try_the_next(
    pool: Pool, server: UpstreamServer, other: UpstreamServer
) -> None:
    server.behaviour = lambda asked: [asked.wire[:2] + b"\x80\0\0\1\0\5" + asked.wire[8:]]
    assert addresses(await pool.ask(to(server, other))) == ["192.0.2.2"]


async def test_whatever_an_upstream_sends_each_question_gets_one_reply(
    pool: Pool, server: UpstreamServer
) -> None:
    dice = random.Random(7)
    genuine = ZoneAnswers()

    def garble(asked: Asked) -> list[bytes]:
        wire = bytearray(genuine(asked)[0])
        for _ in range(dice.randrange(1, 6)):
            wire[dice.randrange(2, len(wire))] = dice.randrange(256)
        return [bytes(wire[: dice.randrange(2, len(wire) + 1)])]

    server.behaviour = garble
    rules = to(server, read_timeout=0.2, max_attempts=1)
    tcp = replace(rules, force_tcp=True)
    kinds = ("A", "MX", "TXT", "SOA", "AAAA")
    waiting = [
        pool.begin(upstreams, question(f"{'MWwb'[n % 4]}ww.example.com.", kind, edns=Edns(500 + n)))
        for n in range(60)
        for kind in kinds
        for upstreams in (rules, tcp)
    ]
    replies = await asyncio.wait_for(asyncio.gather(*waiting), 10)
    assert all(isinstance(reply, Reply) for reply in replies)


# --- which upstream -----------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["random", "round_robin", "sequential"])
async def test_policy(
    pool: Pool, server: UpstreamServer, other: UpstreamServer, policy: str
) -> None:
    rules = to(server, other, policy=policy)
    for n in range(40):
        await pool.ask(rules, question(f"n{n}."))
    counts = (len(server.asked), len(other.asked))
    if policy == "random":
        assert min(counts) > 3
    else:
        assert counts == ((20, 20) if policy == "round_robin" else (40, 0))


async def go_down(pool: Pool, rules: Upstreams, *servers: UpstreamServer) -> None:
    """Ask silent upstreams until their health checks have failed often enough."""
    for server in servers:
        server.behaviour = silence
    await pool.ask(rules)
    failures = "coredns_proxy_healthcheck_failures_total"
    for server in servers:
        await until(lambda s=server: pool.metrics.value(failures, "forward", s.address) > 2)  # type: ignore[misc]
        server.asked.clear()


HEALTH = {"max_fails": 2, "health_interval": 0.01, "read_timeout": 0.05}


async def test_an_upstream_that_is_down_is_passed_over_until_it_answers_a_health_check(
    pool: Pool, server: UpstreamServer, other: UpstreamServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream, "HEALTH_TIMEOUT", 0.05)
    rules = to(server, other, **HEALTH)
    await go_down(pool, rules, server)
    for n in range(5):
        assert addresses(await pool.ask(rules, question(f"n{n}."))) == ["192.0.2.2"]
    checks = await arrived(server, 1)
    assert {(a.name, a.qtype, a.message.flags) for a in checks} == {(".", "NS", dns.flags.RD)}
    server.behaviour = records(rcode="REFUSED")  # any rcode is a sign of life
    group = next(iter(pool.pool._groups.values()))
    await until(lambda: not group.servers[0].down)
    server.behaviour = ONE
    assert addresses(await pool.ask(rules, question("up."))) == ["192.0.2.1"]


@pytest.mark.parametrize(
    ("rules", "proto", "name", "flags"),
    [
        ({"force_tcp": True}, "tcp", ".", dns.flags.RD),
        ({"health_recursion": False}, "udp", ".", dns.flags.Flag(0)),
        ({"health_name": parse_name("example.org.")}, "udp", "example.org.", dns.flags.RD),
    ],
)
async def test_how_health_is_checked(
    pool: Pool,
    server: UpstreamServer,
    rules: dict[str, Any],
    proto: str,
    name: str,
    flags: dns.flags.Flag,
) -> None:
    server.behaviour = lambda asked: None if asked.qtype == "A" else ONE(asked)
    upstreams = to(server, **{**HEALTH, **rules}, max_attempts=1)
    await pool.ask(upstreams)
    check = (await arrived(server, 2))[1]
    assert (check.proto, check.name, check.qtype) == (proto, name, "NS")
    assert check.message.flags == flags


async def test_all_down_one_is_asked_all_the_same(
    pool: Pool, server: UpstreamServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream, "HEALTH_TIMEOUT", 0.05)
    rules = to(server, **HEALTH)
    await go_down(pool, rules, server)
    server.behaviour = lambda asked: None if asked.qtype == "NS" else ONE(asked)
    assert addresses(await pool.ask(rules)) == ["192.0.2.1"]
    assert pool.metrics.value("coredns_forward_healthcheck_broken_total") == 1


async def test_failfast_all_down_nobody_is_asked(
    pool: Pool, server: UpstreamServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream, "HEALTH_TIMEOUT", 0.05)
    rules = to(server, **HEALTH, failfast=True)
    await go_down(pool, rules, server)
    reply = await pool.ask(rules)
    assert (reply.rcode, reply.error) == (t.SERVFAIL, "no healthy proxies")
    assert all(asked.qtype == "NS" for asked in server.asked)


async def test_with_max_fails_0_nobody_is_checked(pool: Pool, closed_port: int) -> None:
    await pool.ask(to(closed_port, max_fails=0))
    assert pool.metrics.value(
        "coredns_proxy_healthcheck_failures_total", "forward", f"127.0.0.1:{closed_port}"
    ) == 0  # fmt: skip


async def test_durations_are_counted_by_upstream_and_rcode(
    pool: Pool, server: UpstreamServer
) -> None:
    await pool.ask(to(server))
    server.behaviour = records(rcode="NXDOMAIN")
    await pool.ask(to(server))
    text = pool.metrics.render()[0].decode()
    for rcode in ("NOERROR", "NXDOMAIN"):
        assert (
            f'coredns_proxy_request_duration_seconds_count{{proxy_name="forward",'
            f'rcode="{rcode}",to="{server.address}"}} 1.0' in text
        )


# --- ends ---------------------------------------------------------------------------------


async def test_closing_answers_those_who_wait_and_leaves_nothing_open(
    server: UpstreamServer, closed_port: int
) -> None:
    server.behaviour = silence
    before = len(os.listdir("/proc/self/fd"))
    made = Pool()
    udp, tcp = to(server, max_fails=2), to(server, force_tcp=True)
    dead = to(closed_port, max_fails=2, health_interval=60.0)
    waiting = [made.begin(udp, question("a.")), made.begin(tcp, question("a."))]
    await made.ask(dead)
    await arrived(server, 2)
    waiting.append(made.begin(tcp, question("dialling.")))
    await made.pool.close()
    replies = await asyncio.gather(*waiting)
    assert {(r.rcode, r.error) for r in replies} == {(t.SERVFAIL, "kdns is shutting down")}
    assert (await made.ask(udp)).rcode == t.SERVFAIL
    assert asyncio.all_tasks() == {asyncio.current_task()}
    server.close_connections()
    await until(lambda: len(os.listdir("/proc/self/fd")) <= before)


async def test_upstreams_of_an_old_corefile_are_closed_after_a_while(
    pool: Pool, server: UpstreamServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream, "SWEEP", 0.01)
    monkeypatch.setattr(upstream, "UNUSED", 0.02)
    before = len(open_udp_ports())
    await pool.ask(to(server))
    await until(lambda: len(open_udp_ports()) == before and not pool.pool._groups)
    assert addresses(await pool.ask(to(server))) == ["192.0.2.1"]


async def test_idle_connections_above_the_bound_are_closed(
    pool: Pool, server: UpstreamServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream, "SWEEP", 0.01)
    server.hold()
    rules = to(server, force_tcp=True, max_idle=1)
    waiting = [pool.begin(rules, question(f"n{n}.")) for n in range(4)]
    await arrived(server, 4)
    server.release()
    await asyncio.gather(*waiting)
    group = next(iter(pool.pool._groups.values()))
    await until(lambda: len(group.servers[0]._streams) == 1)


async def test_a_reader_of_an_answer_that_fails_does_not_harm_the_others(
    pool: Pool, server: UpstreamServer
) -> None:
    server.hold()
    rules = to(server)

    def broken(reply: Reply) -> None:
        raise RuntimeError("a bug")

    pool.pool.send(Forward(rules, question("a.")), broken)
    waiting = pool.begin(rules, question("a."))
    await arrived(server, 1)
    server.release()
    assert addresses(await asyncio.wait_for(waiting, LONG)) == ["192.0.2.1"]
