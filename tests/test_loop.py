"""An event loop that answers while it waits: whatever else a program does goes on as with
asyncio's own, however many questions come."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kdns.server.loop import new_loop, read_while_waiting, run_answering, stop_reading

BOUND = 10.0  # seconds that a test may take at most


class Echo:
    """A socket that is read within the wait. `begins`: what to do for a datagram; answered from
    memory if that is nothing."""

    def __init__(self, begins: Callable[[bytes], object] | None = None) -> None:
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.bind(("127.0.0.1", 0))
        self.sock.setblocking(False)
        self.begins = begins
        self.read = 0
        self.reads = 0

    def __enter__(self) -> Echo:
        read_while_waiting(asyncio.get_running_loop(), self.sock.fileno(), self.take)
        return self

    def __exit__(self, *failed: object) -> None:
        stop_reading(asyncio.get_running_loop(), self.sock.fileno())
        self.sock.close()

    def take(self) -> bool:
        self.reads += 1
        datagram, peer = self.sock.recvfrom(100)
        self.read += 1
        if self.begins is not None:
            self.begins(datagram)
        self.sock.sendto(datagram, peer)
        return self.begins is None


class Asker:
    """Asks again as soon as it is answered, in a thread of its own: there is always something
    to be read."""

    def __init__(self, echo: Echo) -> None:
        self.port = echo.sock.getsockname()[1]
        self.end = threading.Event()
        self.answered = 0
        self.thread = threading.Thread(target=self._ask, daemon=True)

    def __enter__(self) -> Asker:
        self.thread.start()
        return self

    def __exit__(self, *failed: object) -> None:
        self.end.set()
        self.thread.join()

    def _ask(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect(("127.0.0.1", self.port))
            sock.settimeout(0.05)
            for _ in range(8):
                sock.send(b"x")
            while not self.end.is_set():
                with contextlib.suppress(TimeoutError):
                    sock.recv(100)
                    self.answered += 1
                    sock.send(b"x")


def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"hello")
    writer.close()


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(BOUND):
        while not what():
            await asyncio.sleep(0.001)


@pytest.fixture
def asker() -> Iterator[Any]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(BOUND)
        yield sock


def test_timers_threads_and_other_sockets_have_their_turn_under_load() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with Echo() as echo, Asker(echo) as asking:
            await until(lambda: asking.answered > 100)
            # a timer
            await asyncio.sleep(0.02)
            # another thread
            assert await asyncio.to_thread(lambda: 7) == 7
            from_thread = loop.create_future()
            threading.Thread(target=loop.call_soon_threadsafe,
                             args=(from_thread.set_result, 8)).start()  # fmt: skip
            assert await asyncio.wait_for(from_thread, BOUND) == 8
            # streams of asyncio's own
            server = await asyncio.start_server(greet, "127.0.0.1", 0)
            host, port = server.sockets[0].getsockname()
            reader, writer = await asyncio.open_connection(host, port)
            assert await asyncio.wait_for(reader.read(), BOUND) == b"hello"
            writer.close()
            server.close()
            # a child process
            child = await asyncio.create_subprocess_exec("true")
            assert await asyncio.wait_for(child.wait(), BOUND) == 0
            before = asking.answered
            await until(lambda: asking.answered > before)

    run_answering(main())


def test_what_a_question_begins_is_done_at_once_and_not_with_the_next_event(asker: Any) -> None:
    """With nothing else to do the loop would wait for ever."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        with Echo(lambda datagram: loop.call_soon(done.set_result, datagram)) as echo:
            asker.sendto(b"begin", echo.sock.getsockname())
            assert await asyncio.wait_for(done, BOUND) == b"begin"
        later = loop.create_future()
        with Echo(lambda datagram: loop.call_later(0.001, later.set_result, 1)) as echo:
            asker.sendto(b"later", echo.sock.getsockname())
            await later

    run_answering(main())


def test_a_change_takes_its_steps_before_questions_are_answered(
    asker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a change of the cluster that has come waits for as many questions as it takes steps,
    and these are answered as things were."""
    monkeypatch.setattr("kdns.server.loop.FIRST", BOUND)

    async def main() -> None:
        with Echo() as echo:
            await asyncio.sleep(0.001)
            asker.sendto(b"x", echo.sock.getsockname())
            for _ in range(5):
                await asyncio.sleep(0)
            assert echo.read == 0
            await asyncio.sleep(0.001)
            assert echo.read == 1

    run_answering(main())


def test_a_program_that_never_waits_keeps_nobody_waiting(asker: Any) -> None:
    async def main() -> None:
        with Echo() as echo:
            asker.sendto(b"x", echo.sock.getsockname())
            async with asyncio.timeout(BOUND):
                while not echo.read:
                    await asyncio.sleep(0)

    run_answering(main())


def test_many_questions_are_one_step_of_the_loop() -> None:
    """What it is for: the loop does not go round for each datagram."""

    async def main() -> None:
        steps = 0
        loop = asyncio.get_running_loop()
        once = loop._run_once  # type: ignore[attr-defined]

        def counted() -> None:
            nonlocal steps
            steps += 1
            once()

        with Echo() as echo, Asker(echo):
            await until(lambda: echo.read > 10)
            loop._run_once = counted  # type: ignore[attr-defined]
            before = echo.read
            await asyncio.sleep(0.2)
            assert steps < 10 < echo.read - before

    run_answering(main())


def test_a_bug_in_reading_is_logged_and_the_next_datagram_answered(
    asker: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(datagram: bytes) -> None:
        if datagram == b"bad":
            raise ValueError("a bug")

    async def main() -> None:
        with Echo(fail) as echo, caplog.at_level(logging.ERROR):
            asker.connect(echo.sock.getsockname())
            asker.send(b"bad")
            asker.send(b"good")
            assert await asyncio.to_thread(asker.recv, 100) == b"good"
        assert "a bug in kdns in reading socket" in caplog.text
        assert "ValueError: a bug" in caplog.text

    run_answering(main())


def test_a_socket_that_is_given_back_is_read_no_more(asker: Any) -> None:
    async def main() -> None:
        with Echo() as echo:
            address = echo.sock.getsockname()
            asker.sendto(b"1", address)
            await until(lambda: echo.read == 1)
            stop_reading(asyncio.get_running_loop(), echo.sock.fileno())
            asker.sendto(b"2", address)
            await asyncio.sleep(0.02)
            assert echo.read == 1
            read_while_waiting(asyncio.get_running_loop(), echo.sock.fileno(), echo.take)
            await until(lambda: echo.read == 2)

    run_answering(main())


@pytest.mark.parametrize("whose", ["ours", "asyncio's"])
def test_a_read_may_close_a_neighbour_and_another_open_one_of_its_number(
    asker: Any, whose: str
) -> None:
    """So it is where an upstream refuses: each question under way there fails, and is asked from
    a new socket. What came for the old one is not the new one's."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        told: list[str] = []
        socks = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(3)]
        number = socks[1].fileno()

        def close() -> bool:
            socks[0].recv(100)
            stop_reading(loop, number)
            socks[1].close()
            told.append("closed")
            return False

        def open_another() -> bool:
            socks[2].recv(100)
            assert told == ["closed"]
            socks[1] = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            assert socks[1].fileno() == number
            if whose == "ours":
                read_while_waiting(loop, number, lambda: True)
            else:
                loop.add_reader(number, told.append, "what came for another")
            return False

        for sock, call in zip(socks, (close, lambda: True, open_another), strict=True):
            sock.bind(("127.0.0.1", 0))
            sock.setblocking(False)
            read_while_waiting(loop, sock.fileno(), call)
        for sock in socks:
            asker.sendto(b"x", sock.getsockname())  # all come in one look
        with Echo() as echo:
            asker.sendto(b"still there", echo.sock.getsockname())
            await until(lambda: echo.read == 1)
        assert told == ["closed"]
        for sock in socks:
            stop_reading(loop, sock.fileno())
            loop.remove_reader(sock.fileno())
            sock.close()

    run_answering(main())


def test_in_a_loop_of_somebody_elses_sockets_are_read_all_the_same(asker: Any) -> None:
    async def main() -> None:
        with Echo() as echo:
            asker.connect(echo.sock.getsockname())
            asker.send(b"x")
            assert await asyncio.to_thread(asker.recv, 100) == b"x"

    asyncio.run(main())


def test_a_wait_ends_in_time() -> None:
    """As asyncio's selectors: never before what was asked for, and at once for nothing."""
    loop = new_loop()
    selector = loop._selector  # type: ignore[attr-defined]
    began = time.monotonic()
    assert selector.select(0.02) == []
    assert time.monotonic() - began >= 0.02
    assert selector.select(0) == selector.select(-1) == []
    loop.close()
