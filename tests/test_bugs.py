"""A bug of our own costs one answer, or none, and never the server; a reload leaves nothing."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from running import RunningKdns
from test_app import get, write

from kdns.dns import types as t
from kdns.dns.message import RR, Edns, Message, Query, Reply, parse_message, render_query
from kdns.dns.name import parse_name
from kdns.plugins.file import File
from kdns.plugins.hosts import Hosts
from kdns.plugins.kubernetes import Kubernetes
from kdns.plugins.log import Format
from kdns.plugins.whoami import Whoami
from kdns.server.http import DNS_MESSAGE

pytestmark = pytest.mark.asyncio
PANICS = "coredns_panics_total"
BLOCK = ".:0 {{\n bind 127.0.0.1\n {more}\n whoami\n}}\n"


async def over_tcp(kdns: RunningKdns, *names: str) -> list[int | None]:
    """Return the rcodes of answers to questions of one connection each, None for a hang-up."""
    found: list[int | None] = []
    for name in names:
        reader, writer = await asyncio.open_connection("127.0.0.1", kdns.port)
        wire = render_query(1, parse_name(name), t.A)
        writer.write(len(wire).to_bytes(2, "big") + wire)
        try:
            async with asyncio.timeout(5):
                size = int.from_bytes(await reader.readexactly(2), "big")
                found.append(parse_message(await reader.readexactly(size)).rcode)
        except (asyncio.IncompleteReadError, ConnectionError):
            found.append(None)
        writer.close()
    return found


def broken_for(key: bytes, outcome: Any) -> Any:
    original = Whoami.on_query

    def on_query(self: Whoami, query: Query) -> Any:
        return outcome() if query.key == key else original(self, query)

    return on_query


def unrenderable() -> Reply:
    return Reply(answer=[RR(b"\x00", t.A, -1, b"1234")], served_by="whoami")


async def test_an_answer_that_cannot_be_rendered_is_servfail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Whoami, "on_query", broken_for(b"\x03bad\x00", unrenderable))
    async with RunningKdns(BLOCK.format(more="")) as kdns:
        assert (await kdns.ask("bad.")).rcode == t.SERVFAIL
        assert (await kdns.ask("good.")).rcode == t.NOERROR
        assert await over_tcp(kdns, "bad.", "good.") == [t.SERVFAIL, t.NOERROR]
        assert kdns.app.metrics.value(PANICS) == 2


async def over_https(kdns: RunningKdns, name: str) -> tuple[int, str, Message]:
    """Return (status, Cache-Control, answer) of a question put over HTTP (RFC 8484)."""
    url = f"http://127.0.0.1:{kdns.app.port('https')}/dns-query"
    wire = render_query(1, parse_name(name), t.A, edns=Edns(1232))
    async with (
        aiohttp.ClientSession() as session,
        session.post(url, data=wire, headers={"Content-Type": DNS_MESSAGE}) as response,
    ):
        assert response.content_type == DNS_MESSAGE, await response.text()
        kept = response.headers.get("Cache-Control", "")
        return response.status, kept, parse_message(await response.read())


async def test_over_https_too_an_answer_that_cannot_be_rendered_is_servfail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Whoami, "on_query", broken_for(b"\x03bad\x00", unrenderable))
    async with RunningKdns("https://.:0 {\n bind 127.0.0.1\n whoami\n}\n") as kdns:
        status, kept, answer = await over_https(kdns, "bad.")
        assert (status, answer.rcode) == (200, t.SERVFAIL)
        assert kept == "max-age=5", "as of any failure, not for the TTL of what failed"
        assert answer.edns is not None
        assert answer.edns.options[0][1][2:] == b"internal error of kdns; its log tells more"
        status, _, answer = await over_https(kdns, "good.")
        assert (status, answer.rcode) == (200, t.NOERROR)
        assert kdns.app.metrics.value(PANICS) == 1


async def test_a_transfer_that_breaks_off_ends_its_connection_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def batches() -> Iterator[list[RR]]:
        yield [RR(b"\x00", t.A, 1, b"1234")]
        raise KeyError("a bug")

    def transfer() -> Reply:
        reply = Reply(served_by="whoami")
        reply.stream = batches()
        return reply

    monkeypatch.setattr(Whoami, "on_query", broken_for(b"\x04zone\x00", transfer))
    async with RunningKdns(BLOCK.format(more="")) as kdns:
        await over_tcp(kdns, "zone.")
        assert await over_tcp(kdns, "good.") == [t.NOERROR]
        assert kdns.app.metrics.value(PANICS) == 1


async def test_a_bug_while_a_connection_has_its_turn_stops_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from kdns.server.tcp import Connection

    left = [1]
    original = Connection._ask

    def ask(self: Connection, wire: bytes) -> None:
        if left[0]:
            left[0] -= 1
            raise KeyError("a bug")
        original(self, wire)

    monkeypatch.setattr(Connection, "_ask", ask)
    async with RunningKdns(BLOCK.format(more="")) as kdns:
        assert await over_tcp(kdns, "a.", "b.") == [None, t.NOERROR]


async def test_a_line_that_cannot_be_logged_costs_no_repeated_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = write(tmp_path, more="log")
    async with RunningKdns(conf=str(conf)) as kdns:
        name = "web.default.svc.cluster.local."
        for _ in range(2):
            await kdns.ask(name)

        def fill(self: Format, *args: Any) -> str:
            raise KeyError("a bug")

        monkeypatch.setattr(Format, "fill", fill)
        assert (await kdns.ask(name)).rcode == t.NOERROR, "from the packet cache"
        assert (await kdns.ask("www." + name)).rcode == t.SERVFAIL, "from the chain"
        monkeypatch.undo()
        assert (await kdns.ask("www." + name)).rcode == t.NXDOMAIN
        assert kdns.app.metrics.value(PANICS) == 2


async def test_an_upstream_that_cannot_be_asked_for_a_bug_is_servfail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from kdns.server.upstream import Group

    def ask(self: Group, query: Query, done: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(Group, "ask", ask)
    text = ".:0 {\n bind 127.0.0.1\n prometheus 127.0.0.1:0\n forward . 127.0.0.1:9\n}\n"
    async with RunningKdns(text) as kdns:
        assert (await kdns.ask("www.example.")).rcode == t.SERVFAIL
        assert {x.exchange.waiting for x in kdns.app.listeners.values()} == {0}
        counted = kdns.app.metrics.families["coredns_dns_requests_total"].cells.values()
        assert sum(cell.value for cell in counted) == 1


@pytest.mark.parametrize("when", ["at start", "on a change"])
async def test_a_bug_in_reading_a_file_leaves_the_server(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("10.0.0.1 one.example\n")
    original = Hosts.load
    broken, called = [when == "at start"], asyncio.Event()

    def load(self: Hosts, content: bytes | None, error: str) -> bool:
        if broken[0]:
            called.set()
            raise KeyError("a bug")
        return original(self, content, error)

    monkeypatch.setattr(Hosts, "load", load)
    more = f"hosts {hosts} {{\n reload 20ms\n fallthrough\n }}"
    async with RunningKdns(BLOCK.format(more=more)) as kdns:
        broken[0] = True
        hosts.write_text("10.0.0.2 two.example\n")
        async with asyncio.timeout(5):
            await called.wait()
        reply = await kdns.ask("one.example.")
        assert reply.rcode == t.NOERROR
        assert bool(reply.answer) is (when == "on a change")
        broken[0] = False
        hosts.write_text("10.0.0.3 three.example\n")
        async with asyncio.timeout(5):
            while not (await kdns.ask("three.example.")).answer:
                await asyncio.sleep(0.01)


async def test_a_reload_that_meets_a_bug_keeps_the_old_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = write(tmp_path)
    name = "web.default.svc.cluster.local."
    async with RunningKdns(conf=str(conf)) as kdns:
        good = conf.read_text()
        mistakes: tuple[tuple[type, str, str], ...] = (
            (File, "_loader", good + "example.:0 {\n bind 127.0.0.1\n file nothing\n}\n"),
            (Kubernetes, "publish", good.replace("in-addr.arpa {", "in-addr.arpa {\n ttl 9")),
            (Kubernetes, "publish", good.replace("/objects", "/others")),
        )
        (tmp_path / "others").mkdir()

        def bug(*args: Any) -> None:
            raise KeyError("a bug")

        for bugs, (owner, method, text) in enumerate(mistakes, 1):
            conf.write_text(text)
            with monkeypatch.context() as patch:
                patch.setattr(owner, method, bug)
                assert not await kdns.app.reload()
            assert kdns.app.metrics.value("coredns_reload_failed_total") == bugs
            reply = await kdns.ask(name)
            assert reply.answer[0].ttl == 5
            ((pipeline, _),) = kdns.app.pipelines.values()
            assert len(pipeline._readers) == 1
        # and changes still come through
        write(tmp_path, ip="10.96.0.77")
        async with asyncio.timeout(10):
            while (await kdns.ask(name)).answer[0].rdata[-1] != 77:
                await asyncio.sleep(0.02)


async def test_a_bug_in_a_page_is_500_and_the_other_pages_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = write(tmp_path, more="ready 127.0.0.1:0\n health 127.0.0.1:0")
    async with RunningKdns(conf=str(conf)) as kdns:
        port = kdns.app.http_port("/ready")

        def not_ready(self: Kubernetes) -> str:
            raise KeyError("a bug")

        monkeypatch.setattr(Kubernetes, "not_ready", not_ready)
        assert (await asyncio.to_thread(get, port, "/ready"))[0] == 500
        assert (await asyncio.to_thread(get, port, "/health"))[0] == 200
        monkeypatch.undo()
        assert (await asyncio.to_thread(get, port, "/ready"))[0] == 200


async def test_a_change_of_a_file_while_the_server_starts_is_not_missed(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("10.0.0.1 one.example\n")
    original = RunningKdns(BLOCK.format(more=f"hosts {hosts} {{\n reload 20ms\n }}"))
    wait = original.app._wait_synced

    async def change(*args: Any) -> None:
        hosts.write_text("10.0.0.22 two.example\n")
        await wait(*args)

    original.app._wait_synced = change  # type: ignore[method-assign, assignment]
    async with original as kdns:
        async with asyncio.timeout(5):
            while not (await kdns.ask("two.example.")).answer:
                await asyncio.sleep(0.01)


async def test_fifty_reloads_leave_nothing_behind(tmp_path: Path) -> None:
    more = (
        (
            "prometheus 127.0.0.1:0\n health 127.0.0.1:0\n ready 127.0.0.1:0\n errors {\n"
            " consolidate 1s .*\n }\n log\n cache 30\n hosts {folder}/hosts {{\n reload 1s\n"
            " fallthrough\n }}\n forward . 127.0.0.1:9\n"
        )
        .replace("{folder}", str(tmp_path))
        .replace("{{", "{")
        .replace("}}", "}")
    )
    conf = write(tmp_path, more=more)
    good = conf.read_text()
    extra = "example.:{port} {{\n bind 127.0.0.2\n whoami\n}}\n"
    seen: list[tuple[int, ...]] = []
    async with RunningKdns(conf=str(conf)) as kdns:
        app = kdns.app
        for n in range(50):
            ttl = 5 + n % 20
            second = extra.format(port=0) if n % 2 else ""
            conf.write_text(good.replace("in-addr.arpa {", f"in-addr.arpa {{\n ttl {ttl}") + second)
            assert await app.reload()
            assert (await kdns.ask("web.default.svc.cluster.local.")).answer[0].ttl == ttl
            if n % 2:
                continue
            gc.collect()
            ((pipeline, _),) = app.pipelines.values()
            seen.append((
                len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd")), len(app._tasks),
                len(pipeline._readers), len(app._feeds), len(app.listeners), len(app._http),
                sum(isinstance(x, Kubernetes) for x in gc.get_objects()),
                sum(len(f.cells) for f in app.metrics.families.values()),
            ))  # fmt: skip
        assert set(seen[2:]) == {seen[2]}, seen
