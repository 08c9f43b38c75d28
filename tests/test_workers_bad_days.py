"""Workers on a bad day: one dies while it is counted, hangs in a reload, or cannot be started.

Real processes and sockets, as in test_workers.py.
"""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from running import RunningKdns, free_port
from test_workers import (
    PORTS,
    PROJECT,
    children_of,
    everywhere,
    requests,
    scraped,
    tcp,
    told,
    until_serving,
    write,
)

from kdns.errors import ConfigError
from kdns.metrics import Metrics, Samples
from kdns.server import workers

COUNTERS = ("_total", "_count", "_bucket", "_sum")
HOSTS = 250_000  # lines that take seconds to read


def fallen(before: dict[str, float], after: dict[str, float]) -> dict[str, tuple[float, float]]:
    """The counters that are less than they were, or not there any more."""
    return {
        key: (value, after.get(key, -1.0))
        for key, value in before.items()
        if key.partition("{")[0].endswith(COUNTERS) and after.get(key, -1.0) < value
    }


# --- counters -----------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_no_counter_falls_while_a_worker_dies_during_a_scrape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "COUNTING", 30.0)  # the scrape waits for the one that dies
    async with RunningKdns(conf=str(write(tmp_path))) as kdns:
        await everywhere(kdns)
        last = await scraped(kdns)
        assert sum(requests(last, worker) for worker in (0, 1)) == PORTS
        killed = kdns.app.worker_pids()[0]
        os.kill(killed, signal.SIGSTOP)
        scraping = asyncio.create_task(scraped(kdns))
        await asyncio.wait((scraping,), timeout=0.3)
        assert not scraping.done()
        os.kill(killed, signal.SIGKILL)
        found = await scraping
        async with asyncio.timeout(30):
            while True:  # until another one serves, and then once more
                assert fallen(last, found) == {}
                last, found = found, await scraped(kdns)
                if last["kdns_workers"] == 2 and killed not in kdns.app.worker_pids():
                    break
        assert fallen(last, found) == {}
        assert sum(requests(found, worker) for worker in (0, 1)) == PORTS, "nor counted twice"


def test_no_sum_falls_by_its_last_digit_when_a_worker_ends() -> None:
    """0.1 + 0.3 + 0.2 is less than 0.1 + 0.2 + 0.3, and less is a restart to Prometheus."""

    def seconds(value: float) -> Samples:
        return Samples("kdns_seconds", "", "histogram", (), (1.0,), {}, {(): ([1, 0], value)})

    def shown() -> float:
        (one,) = metrics.gathered([seconds(0.1)])
        return one.histograms[()][1]

    metrics = Metrics()
    keeping = workers.Workers(2, metrics, print)
    for number, value in enumerate((0.2, 0.3)):
        sitting = SimpleNamespace(number=number, gone=asyncio.Event(), samples=[seconds(value)])
        keeping._seats[number] = cast("workers.Worker", sitting)
    before = shown()
    keeping._seats[1].gone.set()
    assert shown() == before
    keeping._leave(keeping._seats[1])
    assert shown() == before


# --- one that hangs while it is to reload -------------------------------------------------


@pytest.mark.asyncio
async def test_one_that_is_stopped_before_a_reload_is_replaced_as_soon_as_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workers, "SILENT", 0.5)
    monkeypatch.setattr(workers, "LOOK", 0.05)
    async with RunningKdns(conf=str(write(tmp_path))) as kdns:
        hanging = kdns.app.worker_pids()[0]
        os.kill(hanging, signal.SIGSTOP)
        write(tmp_path, ttl=20)
        reloading = asyncio.create_task(kdns.app.reload())
        try:
            await until_serving(kdns, but=hanging)  # within 30 s; a start may take 60
            assert await reloading
        finally:
            if hanging in kdns.app.worker_pids():
                os.kill(hanging, signal.SIGKILL)
        assert await everywhere(kdns) == {told("10.96.0.50", 20)}
    assert f"worker 0 (process {hanging}) did not answer for" in caplog.text


@pytest.mark.asyncio
async def test_one_that_is_busy_with_a_reload_for_long_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It reads so long a file that it says no word for longer than one may be silent."""
    monkeypatch.setattr(workers, "SILENT", 0.5)
    monkeypatch.setattr(workers, "LOOK", 0.05)
    busy: list[float] = []
    look = workers.Worker.look

    def looked(worker: workers.Worker, now: float) -> None:
        if worker.pinged is not None and worker._orders:
            busy.append(now - worker.pinged)
        look(worker, now)

    monkeypatch.setattr(workers.Worker, "look", looked)
    lines = (f"10.{n >> 16}.{n >> 8 & 255}.{n & 255} h{n}.test\n" for n in range(HOSTS))
    (tmp_path / "hosts").write_text("".join(lines))
    async with RunningKdns(conf=str(write(tmp_path))) as kdns:
        pids = kdns.app.worker_pids()
        busy.clear()
        write(tmp_path, ttl=20, more=f"hosts {tmp_path}/hosts test")
        assert await kdns.app.reload()
        assert kdns.app.worker_pids() == pids, caplog.text
        assert await everywhere(kdns, "h7.test.") != {"NXDOMAIN"}
        assert max(busy) > 1.5 * workers.SILENT, "the file is not long enough for this test"


# --- one that cannot be started -----------------------------------------------------------


class Refusing:
    """Stands where processes are started, and does so only once the system has room."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
        self.error: OSError | None = None
        self.tried = 0
        self._code = code
        self._spawn = workers._spawn
        monkeypatch.setattr(workers, "_spawn", self)

    def __call__(self, link: socket.socket) -> subprocess.Popen[bytes]:
        if self.error is not None:
            self.tried += 1
            raise self.error
        return self._spawn(link)

    def begin(self) -> None:
        self.error = OSError(self._code, os.strerror(self._code))

    async def until_tried(self, times: int) -> None:
        wanted = self.tried + times
        async with asyncio.timeout(20):
            while self.tried < wanted:
                await asyncio.sleep(0.01)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("code", "right"),
    [
        (errno.EMFILE, "raise kdns's limit of open files"),
        (errno.ENFILE, "raise fs.file-max"),
        (errno.EAGAIN, "raise the limit of processes"),
        (errno.ENOMEM, "give kdns more memory"),
        (errno.EPERM, ""),
    ],
)
async def test_one_that_cannot_be_started_is_tried_again_until_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    code: int, right: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(workers, "PAUSES", (0.0, 0.05))
    caplog.set_level("INFO", "kdns")
    refusing = Refusing(monkeypatch, code)
    async with RunningKdns(conf=str(write(tmp_path))) as kdns:
        refusing.begin()
        killed = kdns.app.worker_pids()[0]
        os.kill(killed, signal.SIGKILL)
        await refusing.until_tried(2)
        held = len(os.listdir("/proc/self/fd"))
        await refusing.until_tried(5)
        assert len(os.listdir("/proc/self/fd")) <= held + 2, "each try takes some"
        refusing.error = None
        await until_serving(kdns, but=killed)
        assert await everywhere(kdns) == {told("10.96.0.50")}
        found = await scraped(kdns)
        assert min(requests(found, worker) for worker in (0, 1)) > 0
    said = [r.getMessage() for r in caplog.records if "cannot be started" in r.getMessage()]
    assert len(said) == 1, "once, however often it is tried"
    why = f"{os.strerror(code)}: {right}" if right else os.strerror(code)
    assert said[0].startswith(f"worker 0 cannot be started: {why}")
    assert said[0].endswith("; it is tried again, at least every 0.05 s")


@pytest.mark.asyncio
async def test_the_questions_of_one_that_cannot_be_started_are_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "PAUSES", (0.0, 3600.0))
    refusing = Refusing(monkeypatch, errno.EAGAIN)
    async with RunningKdns(conf=str(write(tmp_path))) as kdns:
        refusing.begin()
        os.kill(kdns.app.worker_pids()[0], signal.SIGKILL)
        await refusing.until_tried(1)
        assert await everywhere(kdns) == {told("10.96.0.50")}
        # And nobody waits for one that is not there when kdns stops.


@pytest.mark.asyncio
async def test_workers_that_cannot_be_started_at_all_are_a_mistake_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Refusing(monkeypatch, errno.EAGAIN).begin()
    with pytest.raises(ConfigError, match="worker 0 cannot be started: Resource temporarily"):
        async with RunningKdns(conf=str(write(tmp_path))):
            pass


def test_a_worker_comes_back_when_there_are_file_descriptors_again(tmp_path: Path) -> None:
    """The program has as many files open as it may at the moment when a worker dies."""
    port = free_port()
    conf = write(tmp_path, port=port)
    log = tmp_path / "log"
    with log.open("w") as out, subprocess.Popen(
        [sys.executable, "-m", "kdns", "-conf", str(conf)], cwd=PROJECT, stdout=out, stderr=out,
    ) as process:  # fmt: skip
        try:
            until(lambda: f".:{port} on 127.0.0.1" in log.read_text())
            pids = children_of(process.pid)
            limit, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
            there = {int(name) for name in os.listdir(f"/proc/{process.pid}/fd")}
            full = next(fd for fd in range(limit) if fd not in there)
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (full, hard))
            os.kill(pids[0], signal.SIGKILL)
            until(lambda: "worker 0 cannot be started: Too many open files" in log.read_text())
            assert children_of(process.pid) == pids[1:]
            assert asyncio.run(answered(port)), "the other one answers"
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (limit, hard))
            until(lambda: len(children_of(process.pid)) == 2)
            assert asyncio.run(answered(port))
            assert log.read_text().count("cannot be started") == 1
        finally:
            process.kill()


def until(there: Any) -> None:
    deadline = time.monotonic() + 30
    while not there():
        assert time.monotonic() < deadline, "not within 30 s"
        time.sleep(0.02)


async def answered(port: int) -> bool:
    replies = [await tcp(port) for _ in range(10)]
    return all(reply.answer for reply in replies)
