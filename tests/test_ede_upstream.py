"""What an answer says where no upstream gave one (RFC 8914): which failed how, after how long."""

from __future__ import annotations

import asyncio

import pytest
from explained import asking, reason, without_times
from test_upstream import Pool, arrived, closed_port, pool, to
from upstream_server import CLOSE, UpstreamServer, silence

from kdns.dns import types as t
from kdns.dns.message import Reply
from kdns.plugins.forward import Upstream, Upstreams
from kdns.server.upstream import cause_of

__all__ = ["closed_port", "pool"]
pytestmark = pytest.mark.asyncio


def told(reply: Reply) -> str:
    """Return the reason of a reply, with the seconds made N.N."""
    return without_times(reason(reply))


async def test_an_upstream_that_says_nothing(pool: Pool) -> None:
    with UpstreamServer(silence) as server:
        upstreams = to(server, read_timeout=0.05, max_attempts=1)
        reply = await pool.ask(upstreams, asking())
        plain = await pool.ask(upstreams)
    assert reply.rcode == t.SERVFAIL
    assert told(reply) == f"22 no answer after N.N s: 127.0.0.1:{server.port} timed out"
    assert plain.ede is None, "nobody asked why"


async def test_two_upstreams_that_fail_in_their_own_ways(pool: Pool, closed_port: int) -> None:
    with UpstreamServer(silence) as server:
        upstreams = to(server, closed_port, read_timeout=0.05, max_attempts=2)
        reply = await pool.ask(upstreams, asking())
    assert told(reply) == (
        f"23 no answer after N.N s: 127.0.0.1:{server.port} timed out,"
        f" 127.0.0.1:{closed_port} refused the connection"
    )


async def test_an_upstream_without_a_way_to_it(pool: Pool) -> None:
    """Connecting over UDP to the broadcast address is refused by the kernel at once."""
    upstreams = Upstreams((Upstream("255.255.255.255", 53),), max_attempts=1)
    reply = await pool.ask(upstreams, asking())
    assert told(reply).startswith("23 no answer after N.N s: 255.255.255.255:53 ")


async def test_tcp_connections_that_end_or_are_refused(pool: Pool, closed_port: int) -> None:
    with UpstreamServer(lambda asked: CLOSE) as server:
        upstreams = to(server, force_tcp=True, max_attempts=1)
        ended = await pool.ask(upstreams, asking())
    assert told(ended).startswith(f"23 no answer after N.N s: 127.0.0.1:{server.port} failed (")
    upstreams = to(closed_port, force_tcp=True, max_attempts=1)
    refused = await pool.ask(upstreams, asking())
    assert told(refused) == (
        f"23 no answer after N.N s: 127.0.0.1:{closed_port} refused the connection"
    )


async def test_more_questions_than_may_be_under_way(pool: Pool) -> None:
    with UpstreamServer(silence) as server:
        upstreams = to(server, max_concurrent=1)
        first = pool.begin(upstreams, asking("a.example.com."))
        await arrived(server, 1)
        second = await pool.ask(upstreams, asking("b.example.com."))
        assert second.rcode == t.REFUSED
        assert told(second) == "0 concurrent queries exceeded maximum 1"
        await pool.pool.close()
        assert told(await asyncio.wait_for(first, 5)) == "14 kdns is shutting down"
    third = await pool.ask(upstreams, asking("c.example.com."))
    assert told(third) == "14 kdns is shutting down"


async def test_an_upstream_that_answers_is_not_explained(pool: Pool) -> None:
    def refused(asked: object) -> list[bytes]:
        import dns.message
        import dns.rcode

        reply = dns.message.make_response(asked.message)  # type: ignore[attr-defined]
        reply.set_rcode(dns.rcode.REFUSED)
        return [reply.to_wire()]

    with UpstreamServer(refused) as server:
        reply = await pool.ask(to(server), asking())
    assert (reply.rcode, reply.ede) == (t.REFUSED, None)


async def test_explain_off_is_heard(pool: Pool, closed_port: int) -> None:
    upstreams = to(closed_port, max_attempts=1, explains=False)
    reply = await pool.ask(upstreams, asking())
    assert (reply.rcode, reply.ede) == (t.SERVFAIL, None)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("read udp 10.0.0.2:40000->10.0.0.1:53: i/o timeout", (22, "timed out")),
        ("read udp 10.0.0.2:4->10.0.0.1:53: read: connection refused",
         (23, "refused the connection")),
        ("dial tcp 10.0.0.1:53: connect: network is unreachable", (23, "is unreachable")),
        ("dial tcp 10.0.0.1:53: connect: no route to host", (23, "is unreachable")),
        ("bad message from 10.0.0.1:53: record cut short", (24, "sent a bad message")),
        ("tls: cannot use ca.crt: no such file or directory",
         (23, "failed (no such file or directory)")),
    ],
)  # fmt: skip
async def test_words_for_errors(error: str, expected: tuple[int, str]) -> None:
    assert cause_of(error) == expected
