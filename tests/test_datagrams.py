"""Datagrams in batches: whoever asks, over whichever family and address, gets the answer to the
question asked, from the address that was asked."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from support import a, make_setup

from kdns.dns import types as t
from kdns.dns.message import Query, Reply, parse_message, render_query
from kdns.dns.name import ROOT, parse_name
from kdns.plugins.chain import Chain, Router
from kdns.plugins.plugin import DROP, Outcome, Plugin
from kdns.server import udp
from kdns.server.datagrams import QUERY_AT, SLOTS, Datagrams, room_for
from kdns.server.exchange import Exchange
from kdns.server.packetcache import PacketCache
from kdns.server.udp import RECEIVE_BUFFER, ROUNDS, UdpListener

FAMILIES = {"127.0.0.1": socket.AF_INET, "::1": socket.AF_INET6}


class Numbers(Plugin):
    """NUMBER.: an A record 10.0.x.y of that number; big.: an answer larger than a query may be;
    drop.: nothing; dear.: REFUSED, after 2 ms of work."""

    word = "numbers"

    def on_query(self, query: Query) -> Outcome:
        label = query.key[1 : 1 + query.key[0]].decode()
        if label == "drop":
            return DROP
        if label == "dear":
            time.sleep(0.002)
            return Reply(t.REFUSED)
        if label == "big":
            records = [a("big.", f"10.1.{n // 256}.{n % 256}") for n in range(300)]
            return Reply(t.NOERROR, records, served_by="numbers")
        number = int(label)
        reply = Reply(t.NOERROR, [a(f"{number}.", f"10.0.{number // 256}.{number % 256}")])
        reply.keep = float("inf") if number % 2 else 0.0
        return reply


@asynccontextmanager
async def listening(host: str, wildcard: bool = False) -> AsyncIterator[int]:
    family = FAMILIES[host]
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.bind(("" if wildcard else host, 0))
    exchange = Exchange(Router({ROOT: Chain([Numbers()])}), None, make_setup().metrics)  # type: ignore[arg-type]
    listener = UdpListener(sock, exchange, PacketCache(), reply_from=wildcard)
    try:
        yield listener.address[1]
    finally:
        listener.close()


def client(host: str, server: str, port: int) -> socket.socket:
    sock = socket.socket(FAMILIES[host if host in FAMILIES else server], socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    sock.bind((host, 0))
    sock.connect((server, port))  # only datagrams from that very address arrive
    sock.setblocking(False)
    return sock


async def read(sock: socket.socket) -> bytes:
    async with asyncio.timeout(5):
        return await asyncio.get_running_loop().sock_recv(sock, 65535)


def asked(number: int | str, qid: int) -> bytes:
    return render_query(qid, parse_name(f"{number}."), t.A)


@pytest.mark.parametrize("host", FAMILIES)
@pytest.mark.parametrize("wildcard", [False, True])
@pytest.mark.asyncio
async def test_every_asker_gets_the_answer_to_its_own_question(host: str, wildcard: bool) -> None:
    """More questions than a batch holds, from many askers, some seen before and some not, some
    never answered: all are sent before the server's loop gets a turn."""
    async with listening(host, wildcard) as port:
        askers = [client(host, host, port) for _ in range(7)]
        wanted: dict[int, list[tuple[int, int]]] = {n: [] for n in range(7)}
        for turn in range(3 * SLOTS):
            who, number = turn % 7, turn % 11
            askers[who].send(asked(number, turn))
            wanted[who].append((turn, number))
            if turn % 5 == 0:
                askers[who].send(asked("drop", 9999))
        for who, questions in wanted.items():
            got = {}
            for _ in questions:
                message = parse_message(await read(askers[who]))
                assert message.question is not None
                got[message.id] = (message.question[0], message.answer[0].rdata)
            for qid, number in questions:
                assert got[qid] == (parse_name(f"{number}."), bytes((10, 0, 0, number)))
        for sock in askers:
            sock.close()


@pytest.mark.asyncio
async def test_more_questions_than_are_read_in_one_turn_are_all_answered() -> None:
    async with listening("127.0.0.1") as port:
        asker = client("127.0.0.1", "127.0.0.1", port)
        count = (2 * ROUNDS + 1) * SLOTS
        for qid in range(count):
            asker.send(asked(qid % 7, qid))
        assert sorted([parse_message(await read(asker)).id for _ in range(count)]) == list(
            range(count)
        )
        asker.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("host", FAMILIES)
@pytest.mark.parametrize("wildcard", [False, True])
async def test_what_nobody_waits_for_any_more_holds_up_nobody(
    host: str, wildcard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A burst of dear questions: as many as can be answered while their askers wait are."""
    monkeypatch.setattr(udp, "STALE", 0.3)
    count = 1000  # 2 s of work
    async with listening(host, wildcard) as port:
        asker, late = (client(host, host, port) for _ in range(2))
        for qid in range(count):
            asker.send(asked("dear", qid))
        await asyncio.sleep(0)  # the first of them are answered
        late.send(asked(7, 1))
        assert parse_message(await read(late)).id == 1
        answered = 0
        with contextlib.suppress(BlockingIOError):
            while asker.recv(512):
                answered += 1
        assert SLOTS < answered < count - SLOTS
        for sock in (asker, late):
            sock.close()


@pytest.mark.asyncio
async def test_a_large_answer_leaves_with_the_others() -> None:
    async with listening("127.0.0.1") as port:
        asker = client("127.0.0.1", "127.0.0.1", port)
        from kdns.dns.message import Edns

        asker.send(asked(1, 1))
        asker.send(render_query(2, parse_name("big."), t.A, edns=Edns(8192)))
        asker.send(asked(3, 3))
        answers = {
            message.id: message for _ in range(3) if (message := parse_message(await read(asker)))
        }
        assert sorted(answers) == [1, 2, 3]
        assert len(answers[2].answer) == 300
        assert QUERY_AT[1] < 300 * 16
        asker.close()


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.5", "127.3.2.1"])
@pytest.mark.asyncio
async def test_a_wildcard_socket_answers_from_the_address_that_was_asked(address: str) -> None:
    async with listening("127.0.0.1", wildcard=True) as port:
        asker = client("127.0.0.1", address, port)
        for qid in (1, 2, 3):  # the chain's answers, then one from memory
            asker.send(asked(7, qid))
            assert parse_message(await read(asker)).id == qid
        asker.close()


@pytest.mark.asyncio
async def test_what_came_before_the_end_is_answered() -> None:
    """A reload or an end closes the socket: what lies in its queue would be lost."""
    asker = None
    async with listening("127.0.0.1") as port:
        asker = client("127.0.0.1", "127.0.0.1", port)
        for qid in range(10):
            asker.send(asked(qid, qid))  # the loop gets no turn
    got = [parse_message(await read(asker)).id for _ in range(10)]
    assert sorted(got) == list(range(10))
    asker.close()


@pytest.mark.asyncio
async def test_an_asker_that_has_gone_costs_the_others_nothing() -> None:
    """Its port answers with an ICMP error, which the socket reports on a later call."""
    async with listening("127.0.0.1") as port:
        for _ in range(3):
            gone = client("127.0.0.1", "127.0.0.1", port)
            gone.send(asked(1, 1))
            gone.close()
        asker = client("127.0.0.1", "127.0.0.1", port)
        for qid in range(20):
            asker.send(asked(qid % 4, qid))
        assert sorted([parse_message(await read(asker)).id for _ in range(20)]) == list(range(20))
        asker.close()


@pytest.mark.asyncio
async def test_sockets_of_a_family_share_their_room_and_event_loops_do_not() -> None:
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        assert room_for(loop, one, False) is room_for(loop, one, False)
        assert room_for(loop, one, True) is not room_for(loop, one, False)
        other = asyncio.new_event_loop()
        assert room_for(other, one, False) is not room_for(loop, one, False)
        other.close()


def test_where_a_datagram_came_from_is_told_as_the_socket_module_does() -> None:
    for host, family in FAMILIES.items():
        room = Datagrams(family)
        with socket.socket(family, socket.SOCK_DGRAM) as server:
            server.bind((host, 0))
            with socket.socket(family, socket.SOCK_DGRAM) as asker:
                asker.bind((host, 0))
                asker.sendto(b"x", server.getsockname())
                asker.sendto(b"yy", server.getsockname())
                fd = ctypes.c_int(server.fileno())
                assert room.receive(fd) == 2
                assert room.sizes(2) == [1, 2]
                assert room.peer(0) == room.peer(1) == asker.getsockname()
                assert room.receive(fd) == 0
