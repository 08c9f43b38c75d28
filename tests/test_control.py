"""The control socket: what it tells, how it is found, and what a bad day does to it."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from kdns.control import (
    MAX_LINES,
    MAX_PATH,
    QUERIES,
    ControlClient,
    ControlServer,
    Facts,
    Lines,
    NoControl,
    control_in,
    find_control,
)
from kdns.errors import ConfigError


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path: pytest's own may be longer than a socket's may be."""
    with tempfile.TemporaryDirectory(prefix="kdns-") as name:
        yield Path(name)


class Source:
    """Events that a test makes."""

    def __init__(self) -> None:
        self.takers: list[Callable[[str], None]] = []
        self.changed = asyncio.Event()

    def listen(self, take: Callable[[str], None]) -> Callable[[], None]:
        self.takers.append(take)
        self.changed.set()

        def end() -> None:
            self.takers.remove(take)
            self.changed.set()

        return end

    def say(self, line: str) -> None:
        for take in self.takers:
            take(line)

    async def until(self, count: int) -> None:
        while len(self.takers) != count:
            self.changed.clear()
            await asyncio.wait_for(self.changed.wait(), 10)


@asynccontextmanager
async def served(path: Path, facts: Facts) -> Any:
    server = ControlServer(str(path), facts)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def get(path: Path, route: str) -> Any:
    return await asyncio.to_thread(ControlClient(str(path)).get, route)


@pytest.mark.asyncio
async def test_it_tells_facts_and_only_its_owner_may_ask(folder: Path) -> None:
    path = folder / "new" / "control.sock"
    count = iter(range(100))
    facts = Facts({"/v1/status": lambda: {"pid": os.getpid(), "n": next(count)}})
    async with served(path, facts):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert await get(path, "/v1/status") == {"pid": os.getpid(), "n": 0}
        assert await get(path, "/v1/status") == {"pid": os.getpid(), "n": 1}
    assert not path.exists()


@pytest.mark.asyncio
async def test_what_it_does_not_tell_is_told(folder: Path) -> None:
    path = folder / "s"
    facts = Facts({"/v1/status": dict, "/v1/bad": lambda: 1 / 0})
    async with served(path, facts):
        with pytest.raises(NoControl, match=r"there is no /v1/rules here; there is .*/v1/status"):
            await get(path, "/v1/rules")
        with pytest.raises(NoControl, match=r"there is no /v1/queries here"):
            await get(path, QUERIES)
        with pytest.raises(NoControl, match="a bug in kdns, see its log: ZeroDivisionError"):
            await get(path, "/v1/bad")
        assert await get(path, "/v1/status") == {}


@pytest.mark.asyncio
async def test_events_come_as_lines_and_nobody_listens_before_or_after(folder: Path) -> None:
    path, source = folder / "s", Source()
    async with served(path, Facts(listen=source.listen)):
        assert source.takers == []
        lines = ControlClient(str(path)).stream()
        first = asyncio.create_task(asyncio.to_thread(next, lines))
        await source.until(1)
        source.say('{"name":"a."}')
        source.say('{"name":"b."}')
        assert await first == '{"name":"a."}\n'
        assert await asyncio.to_thread(next, lines) == '{"name":"b."}\n'
        await asyncio.to_thread(lines.close)  # type: ignore[attr-defined]
        await source.until(0)


@pytest.mark.asyncio
async def test_a_stream_ends_with_the_server(folder: Path) -> None:
    path, source = folder / "s", Source()
    async with served(path, Facts(listen=source.listen)) as server:
        rest = asyncio.create_task(asyncio.to_thread(list, ControlClient(str(path)).stream()))
        await source.until(1)
        await server.stop()
        assert await asyncio.wait_for(rest, 10) == []
        assert source.takers == []


@pytest.mark.asyncio
async def test_a_reader_that_does_not_read_loses_lines_and_is_told_how_many(folder: Path) -> None:
    path, source = folder / "s", Source()
    text = json.dumps({"name": "x" * 2000})
    sent = 4 * MAX_LINES
    async with served(path, Facts(listen=source.listen)):
        reader, writer = await asyncio.open_unix_connection(str(path), limit=1 << 20)
        writer.write(b"GET /v1/queries HTTP/1.0\r\n\r\n")
        await source.until(1)
        for number in range(sent):
            source.say(text)
            if number % 100 == 0:
                await asyncio.sleep(0)  # the server's turn
        source.say('{"name":"kept?"}')
        await reader.readuntil(b"\r\n\r\n")
        got = lost = 0
        while not lost:
            event = json.loads(await asyncio.wait_for(reader.readline(), 10))
            lost += event.get("lost", 0)
            got += "name" in event
        assert lost > 0
        assert got + lost == sent + 1
        source.say('{"name":"after"}')
        assert json.loads(await asyncio.wait_for(reader.readline(), 10)) == {"name": "after"}
        writer.close()
        await source.until(0)


@pytest.mark.asyncio
async def test_the_lines_held_for_a_reader_are_bounded() -> None:
    lines = Lines(limit=3)
    for n in range(10):
        lines.put(str(n))
    assert await lines.take() == b'0\n1\n2\n{"lost":7}\n'
    lines.put("11")
    assert await lines.take() == b"11\n"


# --- the file -------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_what_a_killed_run_left_is_replaced(folder: Path) -> None:
    path = folder / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with served(path, Facts({"/v1/status": lambda: "new"})):
        assert await get(path, "/v1/status") == "new"


@pytest.mark.asyncio
async def test_a_live_one_is_not(folder: Path) -> None:
    path = folder / "s"
    async with served(path, Facts({"/v1/status": lambda: "first"})):
        with pytest.raises(ConfigError, match=f"{path}: another kdns listens there"):
            await ControlServer(str(path), Facts()).start()
        assert await get(path, "/v1/status") == "first"


@pytest.mark.asyncio
async def test_the_file_of_another_run_stays(folder: Path) -> None:
    path = folder / "s"
    async with served(path, Facts()):
        path.unlink()
        other = ControlServer(str(path), Facts({"/v1/status": lambda: "other"}))
        await other.start()
    assert await get(path, "/v1/status") == "other"
    await other.stop()


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("x" * (MAX_PATH + 1), f"octets, and a unix socket's path has {MAX_PATH} at most"),
        ("file", "is there and is no socket"),
        ("file/s", "cannot be made: "),
    ],
)
async def test_a_path_that_cannot_be_is_told(folder: Path, name: str, wrong: str) -> None:
    (folder / "file").write_text("precious")
    with pytest.raises(ConfigError, match=wrong):
        await ControlServer(str(folder / name), Facts()).start()
    assert (folder / "file").read_text() == "precious"


def test_a_path_of_just_the_longest_is_served(folder: Path) -> None:
    path = folder / ("x" * (MAX_PATH - len(str(folder)) - 1))
    assert len(str(path)) == MAX_PATH

    async def main() -> Any:
        async with served(path, Facts({"/v1/status": lambda: 1})):
            return await get(path, "/v1/status")

    assert asyncio.run(main()) == 1


# --- clients --------------------------------------------------------------------------------


def test_a_socket_that_is_not_there_is_told(folder: Path) -> None:
    with pytest.raises(NoControl, match="is not there: is kdns running"):
        ControlClient(str(folder / "s")).get("/v1/status")


def test_a_socket_of_a_run_that_has_ended_is_told(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(folder / "s"))
    with pytest.raises(NoControl, match="nobody listens there: kdns has ended"):
        ControlClient(str(folder / "s")).get("/v1/status")


@pytest.mark.parametrize(
    ("answer", "wrong"),
    [
        (b"hello\r\n", "what answers there is not kdns"),
        (b"", "what answers there is not kdns|Connection reset"),
        (b"HTTP/1.0 200 OK\r\n\r\n{", "/v1/status"),
    ],
)
def test_another_program_at_the_socket_is_told(folder: Path, answer: bytes, wrong: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "s"))
        listener.listen()

        def serve() -> None:
            with listener.accept()[0] as one:
                one.recv(4096)
                one.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(NoControl, match=wrong):
            ControlClient(str(folder / "s"), timeout=5).get("/v1/status")
        thread.join(10)


KUBECONFIG = """\
apiVersion: v1
kind: Config
current-context: {current}
contexts:
- name: other
  context: {{cluster: other, user: other}}
- name: kdns
  context:
    cluster: kdns
    user: kdns
    extensions:
    - name: context_info
      extension: {{provider: minikube}}
    - name: kdns
      extension: {{control: {path}}}
"""


def test_it_is_found_by_flag_environment_and_kubeconfig(folder: Path) -> None:
    here = folder / "here.sock"
    here.touch()
    config = folder / "config"
    config.write_text(KUBECONFIG.format(current="kdns", path=here))
    broken = folder / "broken"
    broken.write_text("kdns: [")
    env = {"KUBECONFIG": f"{folder / 'none'}:{broken}:{config}"}
    assert find_control("", env) == str(here)
    assert find_control("/flag", {**env, "KDNS_CONTROL": "/env"}) == "/flag"
    assert find_control("", {**env, "KDNS_CONTROL": "/env"}) == "/env"
    (folder / ".kube").mkdir()
    (folder / ".kube" / "config").write_text(config.read_text())
    assert find_control("", {"HOME": str(folder)}) == str(here)


@pytest.mark.parametrize(
    "text",
    [
        KUBECONFIG.format(current="other", path="/x"),
        KUBECONFIG.format(current="gone", path="/x"),
        "kdns",
        "[]",
        "kdns: [",
        "current-context: kdns\ncontexts: 7",
        "",
    ],
)
def test_a_kubeconfig_without_one_is_passed_over(text: str) -> None:
    assert control_in(text) == ""
