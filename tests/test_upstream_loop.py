"""Upstreams in the loop of `kdns serve`, which reads their answers while it waits."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from support import question
from upstream_server import UpstreamServer, records, silence

from kdns.dns import types as t
from kdns.dns.message import Reply
from kdns.metrics import Metrics
from kdns.plugins.forward import Upstream, Upstreams
from kdns.plugins.plugin import Forward
from kdns.server.loop import run_answering
from kdns.server.upstream import UpstreamPool

BOUND = 5.0  # seconds that a test may take at most
ONE = records("@ 300 IN A 192.0.2.1")


def to(*servers: UpstreamServer, **rules: Any) -> Upstreams:
    addresses = tuple(Upstream("127.0.0.1", server.port) for server in servers)
    return Upstreams(addresses, policy="sequential", max_fails=0, **rules)


def with_pool(work: Callable[[UpstreamPool], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        pool = UpstreamPool(Metrics())
        async with asyncio.timeout(BOUND):
            await work(pool)
        await pool.close()

    run_answering(main())


def in_a_step() -> bool:
    """True if whoever asks was called by the loop's step, not within its wait."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_name != "run_forever":
        if frame.f_code.co_name == "_run":  # asyncio.Handle's
            return True
        frame = frame.f_back
    return False


def addresses(reply: Reply) -> list[str]:
    return [socket.inet_ntoa(rr.rdata) for rr in reply.answer if rr.type == t.A]


def test_an_answer_is_passed_on_without_a_step_of_the_loop() -> None:
    async def work(pool: UpstreamPool) -> None:
        steps: list[bool] = []
        for n in range(20):  # more than there are sockets
            answered: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()

            def done(reply: Reply, answered: asyncio.Future[Reply] = answered) -> None:
                steps.append(in_a_step())
                answered.set_result(reply)

            pool.send(Forward(upstreams, question(f"n{n}.example.com.")), done)
            assert addresses(await answered) == ["192.0.2.1"]
        assert steps == [False] * 20

    with UpstreamServer(ONE) as server:
        upstreams = to(server)
        with_pool(work)


def test_a_question_asked_because_of_an_answer_times_out_as_any_other() -> None:
    """Its timer is set while the loop waits for something else."""

    async def work(pool: UpstreamPool) -> None:
        answered: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()

        def ask_another(reply: Reply) -> None:
            pool.send(Forward(second, question("b.example.com.")), answered.set_result)

        pool.send(Forward(first, question("a.example.com.")), ask_another)
        assert addresses(await answered) == ["192.0.2.1"]

    with UpstreamServer(ONE) as server, UpstreamServer(silence) as silent:
        first, second = to(server), to(silent, server, read_timeout=0.05)
        with_pool(work)
