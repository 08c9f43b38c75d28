"""NOTIFY (RFC 1996): which secondary hears of which serial, how often, and what is said of it.

A kdns on loopback with zone files, and real UDP sockets as secondaries. dnspython reads and
answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import dns.flags
import dns.message
import dns.opcode
import dns.rcode
import dns.rdatatype
import pytest
import pytest_asyncio
from running import RunningKdns, free_port
from support import build, make_setup

from kdns import app
from kdns.dns import types as t
from kdns.dns.message import RR
from kdns.dns.name import parse_name
from kdns.plugins.plugin import Notice, Notify, Plugin, WatchFile
from kdns.server import notify

NEVER = 3600.0
ZONE = "example.org."


class Secondary:
    """A UDP socket that a NOTIFY may come to."""

    def __init__(self, address: str = "127.0.0.1") -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.sock = socket.socket(family, socket.SOCK_DGRAM)
        self.sock.bind((address, 0))
        self.sock.setblocking(False)
        self.port: int = self.sock.getsockname()[1]
        self.to = f"[{address}]:{self.port}" if ":" in address else f"{address}:{self.port}"
        self.wire = b""
        self.sender: tuple[str, int] = ("", 0)

    async def heard(self) -> dns.message.Message:
        """Wait for a NOTIFY and return it."""
        async with asyncio.timeout(20):
            loop = asyncio.get_running_loop()
            self.wire, self.sender = await loop.sock_recvfrom(self.sock, 4096)
        return dns.message.from_wire(self.wire)

    def left(self) -> list[dns.message.Message]:
        """Return what has come and was not read."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                found.append(dns.message.from_wire(self.sock.recv(4096)))
        return found

    def answer(self, asked: dns.message.Message, rcode: int = dns.rcode.NOERROR) -> None:
        reply = dns.message.make_response(asked)
        reply.set_rcode(dns.rcode.Rcode.make(rcode))
        self.send(reply.to_wire())

    def send(self, wire: bytes) -> None:
        self.sock.sendto(wire, self.sender)

    async def accepts(self) -> dns.message.Message:
        """Wait for a NOTIFY, accept it and return it."""
        asked = await self.heard()
        self.answer(asked)
        return asked


@pytest_asyncio.fixture
async def secondary() -> AsyncIterator[Secondary]:
    one = Secondary()
    yield one
    one.sock.close()


@pytest_asyncio.fixture
async def other() -> AsyncIterator[Secondary]:
    one = Secondary()
    yield one
    one.sock.close()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set the seconds that kdns waits for answers."""

    def be(*seconds: float) -> None:
        monkeypatch.setattr(notify, "PAUSES", seconds)

    be(NEVER)
    return be


@pytest.fixture(autouse=True)
def everything_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "kdns")


def write(folder: Path, serial: int, name: str = "db.example.org", more: str = "") -> Path:
    """Write a zone file as an editor does: at once."""
    path = folder / name
    new = folder / "new"
    new.write_text(
        f"$TTL 300\n@ SOA ns admin {serial} 7200 1800 86400 60\n@ NS ns\nns A 192.0.2.53\n{more}"
    )
    new.rename(path)
    return path


def corefile(folder: Path, transfer: str, more: str = "") -> str:
    return f"""{ZONE}:0 {{
    bind 127.0.0.1
    debug
    file {folder}/db.example.org {{
        reload 20ms
    }}
    transfer {{
        {transfer}
    }}
    {more}
}}
"""


async def said(caplog: pytest.LogCaptureFixture, pattern: str) -> str:
    """Wait until a line of the log has this; return it."""
    async with asyncio.timeout(20):
        while True:
            for record in caplog.records:
                if re.search(pattern, record.getMessage()):
                    return record.getMessage()
            await asyncio.sleep(0.005)


def accepted(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "was accepted by" in r.getMessage()]


# --- what is sent ---------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_secondary_hears_of_a_zone_at_start_and_of_each_new_serial(
    tmp_path: Path, secondary: Secondary, caplog: pytest.LogCaptureFixture,
    pauses: Callable[..., None],
) -> None:  # fmt: skip
    write(tmp_path, 1)
    async with RunningKdns(corefile(tmp_path, f"to {secondary.to}")) as kdns:
        for serial in (1, 2, 7):
            if serial > 1:
                write(tmp_path, serial)
            asked = await secondary.heard()
            assert asked.opcode() == dns.opcode.NOTIFY
            assert dns.flags.to_text(asked.flags & 0x87F0) == "AA"
            assert asked.rcode() == dns.rcode.NOERROR
            assert [q.to_text() for q in asked.question] == ["example.org. IN SOA"]
            assert [asked.answer, asked.authority, asked.additional] == [[], [], []]
            assert asked.edns == -1
            assert secondary.sender[0] == "127.0.0.1"
            # Who hears of it asks at once, and gets the new one.
            soa = (await kdns.ask(ZONE, "SOA")).answer[0]
            assert int.from_bytes(soa.rdata[-20:-16], "big") == serial
            secondary.answer(asked)
            line = await said(caplog, f"SOA serial {serial} was accepted")
            assert line == (
                f"NOTIFY for zone {ZONE} with SOA serial {serial} was accepted by {secondary.to}"
            )
    assert secondary.left() == []


@pytest.mark.asyncio
async def test_a_file_that_changes_but_for_its_serial_is_not_told_of(
    tmp_path: Path, secondary: Secondary, caplog: pytest.LogCaptureFixture,
    pauses: Callable[..., None],
) -> None:  # fmt: skip
    write(tmp_path, 1)
    async with RunningKdns(corefile(tmp_path, f"to {secondary.to}")):
        await secondary.accepts()
        write(tmp_path, 1, more="www A 192.0.2.1\n")
        await said(caplog, "its SOA serial is still 1")
        write(tmp_path, 2)
        await secondary.accepts()
        await said(caplog, "serial 2 was accepted")
    assert len(accepted(caplog)) == 2
    assert secondary.left() == []


@pytest.mark.asyncio
async def test_a_zone_whose_first_file_is_broken_is_told_of_when_it_is_right(
    tmp_path: Path, secondary: Secondary, caplog: pytest.LogCaptureFixture,
    pauses: Callable[..., None],
) -> None:  # fmt: skip
    write(tmp_path, 1, more="www A nowhere\n")
    async with RunningKdns(corefile(tmp_path, f"to {secondary.to}")):
        await said(caplog, "not served")
        write(tmp_path, 1)
        await secondary.accepts()
        await said(caplog, "serial 1 was accepted")
    assert secondary.left() == []


@pytest.mark.asyncio
async def test_everyone_may_transfer_but_only_who_is_named_is_notified(
    tmp_path: Path, secondary: Secondary, other: Secondary, pauses: Callable[..., None]
) -> None:
    write(tmp_path, 1)
    async with RunningKdns(corefile(tmp_path, f"to *\nto {secondary.to} {other.to}")):
        await secondary.accepts()
        await other.accepts()


@pytest.mark.asyncio
async def test_it_comes_from_the_source(
    tmp_path: Path, secondary: Secondary, pauses: Callable[..., None]
) -> None:
    write(tmp_path, 1)
    async with RunningKdns(corefile(tmp_path, f"source 127.0.0.2\nto {secondary.to}")):
        await secondary.accepts()
        assert secondary.sender[0] == "127.0.0.2"


@pytest.mark.asyncio
async def test_each_ip_version_has_its_source(
    tmp_path: Path, secondary: Secondary, pauses: Callable[..., None]
) -> None:
    try:
        six = Secondary("::1")
    except OSError as e:
        pytest.skip(f"no IPv6 here: {e}")
    write(tmp_path, 1)
    transfer = f"to {secondary.to} {six.to}\nsource ::1\nsource 127.0.0.3"
    with contextlib.closing(six.sock):
        async with RunningKdns(corefile(tmp_path, transfer)):
            await secondary.accepts()
            assert secondary.sender[0] == "127.0.0.3"
            await six.accepts()
            assert six.sender[0] == "::1"


@pytest.mark.asyncio
async def test_zones_of_auto_are_told_of_when_they_come_and_when_they_change(
    tmp_path: Path, secondary: Secondary, caplog: pytest.LogCaptureFixture,
    pauses: Callable[..., None],
) -> None:  # fmt: skip
    write(tmp_path, 1, "db.a.test")
    text = f""".:0 {{
        bind 127.0.0.1
        debug
        auto test {{
            directory {tmp_path}
            reload 20ms
        }}
        transfer {{
            to {secondary.to}
        }}
    }}"""
    async with RunningKdns(text):
        assert str((await secondary.accepts()).question[0].name) == "a.test."
        write(tmp_path, 5, "db.b.test")
        assert str((await secondary.accepts()).question[0].name) == "b.test."
        write(tmp_path, 2, "db.a.test")
        assert str((await secondary.accepts()).question[0].name) == "a.test."
        (tmp_path / "db.b.test").unlink()
        await said(caplog, r"zone b\.test\. is gone")
        write(tmp_path, 5, "db.b.test")
        assert str((await secondary.accepts()).question[0].name) == "b.test."
    assert secondary.left() == []


# --- what comes back, or does not -----------------------------------------------------------


@pytest.mark.asyncio
async def test_unanswered_it_is_sent_again_then_given_up_and_that_is_said(
    tmp_path: Path, secondary: Secondary, caplog: pytest.LogCaptureFixture,
    pauses: Callable[..., None],
) -> None:  # fmt: skip
    pauses(0.02, 0.03, 0.04)
    write(tmp_path, 3)
    async with RunningKdns(corefile(tmp_path, f"to {secondary.to}")):
        line = await said(caplog, "not accepted")
        heard = secondary.left()
    assert line == (
        f"NOTIFY for zone {ZONE} with SOA serial 3 was not accepted by {secondary.to}:"
        " no answer, and it was sent 3 times"
    )
    assert len(heard) == 3
    assert len({asked.id for asked in heard}) == 1  # a late answer counts


def test_it_is_not_sent_more_often_than_the_rfc_has_it() -> None:
    """RFC 1996 s3.6: five retransmissions, further and further apart."""
    assert len(notify.PAUSES) == 1 + 5
    assert sorted(notify.PAUSES) == list(notify.PAUSES)


@pytest.mark.asyncio
async def test_a_late_answer_ends_it(
    tmp_path: Path, secondary: Secondary, caplog: pytest.LogCaptureFixture,
    pauses: Callable[..., None],
) -> None:  # fmt: skip
    pauses(0.02, NEVER)
    write(tmp_path, 1)
    async with RunningKdns(corefile(tmp_path, f"to {secondary.to}")):
        first = await secondary.heard()
        await secondary.heard()
        secondary.answer(first)
        await said(caplog, "serial 1 was accepted")


@pytest.mark.parametrize("rcode", ["REFUSED", "NOTAUTH", "SERVFAIL", "NOTIMP"])
@pytest.mark.asyncio
async def test_who_does_not_accept_it_is_named_in_the_log(
    tmp_path: Path, secondary: Secondary, caplog: pytest.LogCaptureFixture,
    pauses: Callable[..., None], rcode: str,
) -> None:  # fmt: skip
    write(tmp_path, 3)
    async with RunningKdns(corefile(tmp_path, f"to {secondary.to}")):
        secondary.answer(await secondary.heard(), dns.rcode.from_text(rcode))
        line = await said(caplog, "not accepted")
    assert line == (
        f"NOTIFY for zone {ZONE} with SOA serial 3 was not accepted by {secondary.to}:"
        f" it answers {rcode}"
    )
    assert secondary.left() == []  # RFC 1996 s3.6: an answer ends it


@pytest.mark.asyncio
async def test_who_answers_an_error_with_no_more_than_a_header_has_answered(
    tmp_path: Path, secondary: Secondary, caplog: pytest.LogCaptureFixture,
    pauses: Callable[..., None],
) -> None:  # fmt: skip
    write(tmp_path, 3)
    async with RunningKdns(corefile(tmp_path, f"to {secondary.to}")):
        asked = await secondary.heard()
        secondary.send(secondary.wire[:2] + b"\xa0\x04" + bytes(8))
        await said(caplog, "it answers NOTIMP")
        assert asked.id == int.from_bytes(secondary.wire[:2], "big")


@pytest.mark.asyncio
async def test_that_nobody_listens_there_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, pauses: Callable[..., None]
) -> None:
    write(tmp_path, 3)
    port = free_port()
    async with RunningKdns(corefile(tmp_path, f"to 127.0.0.1:{port}")):
        line = await said(caplog, "not accepted")
        assert line.endswith(f"127.0.0.1:{port}: connection refused: no name server listens there")
        write(tmp_path, 4)
        await said(caplog, "serial 4 was not accepted")


@pytest.mark.asyncio
async def test_that_the_source_is_not_of_this_host_is_said(
    tmp_path: Path, secondary: Secondary, caplog: pytest.LogCaptureFixture,
    pauses: Callable[..., None],
) -> None:  # fmt: skip
    pauses(0.01, 0.01)
    write(tmp_path, 3)
    async with RunningKdns(corefile(tmp_path, f"source 192.0.2.77\nto {secondary.to}")):
        line = await said(caplog, "not accepted")
    assert line.endswith("cannot send from 192.0.2.77: Cannot assign requested address")
    assert secondary.left() == []


def _with_another_id(wire: bytes) -> bytes:
    return (int.from_bytes(wire[:2], "big") ^ 1).to_bytes(2, "big") + wire[2:]


# What is no answer, made of one that is.
FALSE: dict[str, Callable[[bytes], bytes]] = {
    "another ID": _with_another_id,
    "another zone": lambda wire: wire.replace(b"\7example", b"\7elpmaxe"),
    "another type": lambda wire: wire[:-3] + b"\1" + wire[-2:],
    "another opcode": lambda wire: wire[:2] + bytes([wire[2] & 0x87]) + wire[3:],
    "no reply": lambda wire: wire[:2] + bytes([wire[2] & 0x7F]) + wire[3:],
    "no question": lambda wire: wire[:4] + bytes(8),
    "cut short": lambda wire: wire[:-1],
    "no message": lambda wire: b"\0",
    "nothing": lambda wire: b"",
}


@pytest.mark.parametrize("kind", FALSE)
@pytest.mark.asyncio
async def test_what_is_no_answer_to_it_is_ignored(
    tmp_path: Path, secondary: Secondary, caplog: pytest.LogCaptureFixture,
    pauses: Callable[..., None], kind: str,
) -> None:  # fmt: skip
    pauses(0.02, NEVER)
    write(tmp_path, 1)
    async with RunningKdns(corefile(tmp_path, f"to {secondary.to}")):
        asked = await secondary.heard()
        secondary.send(FALSE[kind](dns.message.make_response(asked).to_wire()))
        again = await secondary.heard()  # it was not taken for the answer
        assert accepted(caplog) == []
        secondary.answer(again)
        await said(caplog, "serial 1 was accepted")
    assert "a bug in kdns" not in caplog.text


@pytest.mark.asyncio
async def test_an_answer_from_somebody_else_is_ignored(
    tmp_path: Path, secondary: Secondary, other: Secondary, caplog: pytest.LogCaptureFixture,
    pauses: Callable[..., None],
) -> None:  # fmt: skip
    pauses(0.02, NEVER)
    write(tmp_path, 1)
    async with RunningKdns(corefile(tmp_path, f"to {secondary.to}")):
        asked = await secondary.heard()
        other.sender = secondary.sender
        other.answer(asked)
        again = await secondary.heard()
        assert accepted(caplog) == []
        secondary.answer(again)
        await said(caplog, f"was accepted by {secondary.to}")


# --- bounds ---------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_new_serial_takes_the_place_of_one_not_answered_for(
    tmp_path: Path, secondary: Secondary, caplog: pytest.LogCaptureFixture,
    pauses: Callable[..., None],
) -> None:  # fmt: skip
    write(tmp_path, 1)
    async with RunningKdns(corefile(tmp_path, f"to {secondary.to}")):
        first = await secondary.heard()
        write(tmp_path, 2)
        second = await secondary.heard()
        secondary.answer(first)  # if it is late, the secondary may not have seen the new serial
        secondary.answer(second)
        await said(caplog, "serial 2 was accepted")
    assert first.id != second.id
    assert len(accepted(caplog)) == 1
    assert "not accepted" not in caplog.text


@pytest.mark.asyncio
async def test_one_secondary_is_sent_so_many_at_a_time_and_another_does_not_wait_for_it(
    tmp_path: Path, secondary: Secondary, other: Secondary, caplog: pytest.LogCaptureFixture,
    pauses: Callable[..., None],
) -> None:  # fmt: skip
    zones = notify.WINDOW + 10
    for number in range(zones):
        write(tmp_path, 1, f"db.z{number}.test")
    text = f""".:0 {{
        bind 127.0.0.1
        debug
        auto test {{
            directory {tmp_path}
            reload 0
        }}
        transfer {{
            to {secondary.to} {other.to}
        }}
    }}"""
    async with RunningKdns(text):
        told = {str((await other.accepts()).question[0].name) for _ in range(zones)}
        assert len(told) == zones
        heard = [await secondary.heard() for _ in range(notify.WINDOW)]
        assert secondary.left() == []
        for asked in heard:
            secondary.answer(asked)
        heard += [await secondary.accepts() for _ in range(10)]
        assert {str(asked.question[0].name) for asked in heard} == told


@pytest.mark.asyncio
async def test_two_server_blocks_with_one_zone_tell_a_secondary_once(
    tmp_path: Path, secondary: Secondary, caplog: pytest.LogCaptureFixture,
    pauses: Callable[..., None],
) -> None:  # fmt: skip
    write(tmp_path, 1)
    block = corefile(tmp_path, f"to {secondary.to}")
    ports = free_port(), free_port()
    text = "".join(block.replace(":0 {", f":{port} {{") for port in ports)
    async with RunningKdns(text):
        await secondary.accepts()
        await said(caplog, "was accepted")
    assert secondary.left() == []


# --- reload and end -------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_after_a_reload_of_the_corefile_its_secondaries_hear_and_no_others(
    tmp_path: Path, secondary: Secondary, other: Secondary, pauses: Callable[..., None]
) -> None:
    pauses(*[0.01] * 1000)
    write(tmp_path, 1)
    conf = tmp_path / "Corefile"
    conf.write_text(corefile(tmp_path, f"to {secondary.to}"))
    async with RunningKdns(conf=str(conf)) as kdns:
        await secondary.heard()
        await secondary.heard()
        conf.write_text(corefile(tmp_path, f"to {other.to}"))
        assert await kdns.app.reload()
        await other.heard()
        secondary.left()
        for _ in range(5):
            await other.heard()
        assert secondary.left() == []
        first = await other.heard()
        write(tmp_path, 2)
        while (await other.heard()).id == first.id:
            pass
        assert secondary.left() == []


@pytest.mark.asyncio
async def test_a_corefile_that_is_refused_ends_nothing(
    tmp_path: Path, secondary: Secondary, caplog: pytest.LogCaptureFixture,
    pauses: Callable[..., None],
) -> None:  # fmt: skip
    pauses(*[0.01] * 1000)
    write(tmp_path, 1)
    conf = tmp_path / "Corefile"
    conf.write_text(corefile(tmp_path, f"to {secondary.to}"))
    async with RunningKdns(conf=str(conf)) as kdns:
        await secondary.heard()
        conf.write_text(corefile(tmp_path, "to nowhere"))
        assert not await kdns.app.reload()
        secondary.left()
        await secondary.accepts()
        await said(caplog, "serial 1 was accepted")


@pytest.mark.asyncio
async def test_once_stopped_it_tells_nobody(
    tmp_path: Path, secondary: Secondary, other: Secondary, pauses: Callable[..., None]
) -> None:
    pauses(*[0.01] * 1000)
    write(tmp_path, 1)
    async with RunningKdns(corefile(tmp_path, f"to {secondary.to}")):
        await secondary.heard()
    secondary.left()
    async with RunningKdns(corefile(tmp_path, f"to {other.to}")):
        for _ in range(5):
            await other.heard()
    assert secondary.left() == []


@pytest.mark.asyncio
async def test_of_many_workers_none_tells_and_all_have_the_serial_that_is_told(
    tmp_path: Path, secondary: Secondary, caplog: pytest.LogCaptureFixture,
    pauses: Callable[..., None], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(app, "LATE", 0.5)
    write(tmp_path, 1)
    async with RunningKdns(corefile(tmp_path, f"to {secondary.to}", "workers 2")) as kdns:
        for serial in (1, 2):
            if serial > 1:
                write(tmp_path, serial)
            asked = await secondary.heard()
            for _ in range(20):  # source ports, so that both are asked
                soa = (await kdns.ask(ZONE, "SOA")).answer[0]
                assert int.from_bytes(soa.rdata[-20:-16], "big") == serial
            secondary.answer(asked)
            await said(caplog, f"serial {serial} was accepted")
    assert secondary.left() == []


# --- whom, without sockets ------------------------------------------------------------------

DB = b"$TTL 300\n@ SOA ns admin 1 7200 1800 86400 60\n@ NS ns\nns A 192.0.2.53\n"


def due(text: str, *more: Plugin) -> list[Notice]:
    """Return whom a server block of example.org and example.net would tell at start."""
    plugins = [*build(text, make_setup((ZONE, "example.net."))), *more]
    for plugin in plugins:
        plugin.link(plugins)
        for item in plugin.work():
            if isinstance(item, WatchFile):
                assert item.load(DB, "")
    return [n for p in plugins for w in p.work() if isinstance(w, Notify) for n in w.due()]


A, B = "192.0.2.1", "2001:db8::1"
TOLD = [
    # transfer directives -> address, port and source for example.org
    ("transfer {\nto *\n}", []),
    (f"transfer {{\nto {A}\n}}", [(A, 53, "")]),
    (f"transfer {{\nto * {A}\n}}", [(A, 53, "")]),
    (f"transfer {{\nto {A} {A}:53 {A}:54\n}}", [(A, 53, ""), (A, 54, "")]),
    (f"transfer {{\nto [{B}]:5300 {B}\n}}", [(B, 5300, ""), (B, 53, "")]),
    (f"transfer {{\nto {A} {B}\nsource {A}\n}}", [(A, 53, A), (B, 53, "")]),
    (f"transfer example.net {{\nto {A}\n}}", []),
    (f"transfer {{\nto {A}\n}}\ntransfer . {{\nto {B}\n}}", [(A, 53, "")]),
    (f"transfer . {{\nto {B}\n}}", [(B, 53, "")]),
    (f"transfer sub.example.org {{\nto {A}\n}}", []),
]


@pytest.mark.parametrize(("text", "expected"), TOLD)
def test_who_is_told_of_a_zone(text: str, expected: list[tuple[str, int, str]]) -> None:
    found = due(f"{text}\nfile db example.org")
    assert [(*notice.to, notice.source) for notice in found] == expected
    assert all(n.zone == parse_name(ZONE) and n.serial == 1 for n in found)


class ClusterZone(Plugin):
    """As `kubernetes`: a zone that can be transferred, with a serial that moves all the time."""

    word = "cluster"

    def transfer_records(self, zone: bytes) -> tuple[int, Iterator[RR]]:
        return 0, iter((RR(zone, t.SOA, 5, zone + zone + bytes(20)),))


def test_zones_of_the_cluster_are_not_told_of() -> None:
    assert due(f"transfer {{\nto {A}\n}}", ClusterZone()) == []
    manifests = "kubernetes cluster.local {\nmanifests /nowhere\n}"
    assert due(f"transfer cluster.local {{\nto {A}\n}}\n{manifests}") == []
