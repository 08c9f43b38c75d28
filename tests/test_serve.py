"""The process `kdns -conf FILE`: what it prints, how it ends, and where its log may go."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
from running import free_port

import kdns
from kdns.dns import types as t
from kdns.dns.name import parse_name
from kdns.server.client import Exchange, NoAnswer, Server, ask

PROJECT = Path(__file__).resolve().parent.parent
NAME = parse_name("web.example.test.")


@pytest.fixture
def corefile(tmp_path: Path) -> Path:
    path = tmp_path / "Corefile"
    path.write_text(". {\n    bind 127.0.0.1\n    log\n    whoami\n}\n")
    return path


@contextmanager
def started(*args: object, stdout: int | IO[str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-m", "kdns", *map(str, args)], cwd=PROJECT, text=True,
        stdout=stdout, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def wait_answer(port: int, process: subprocess.Popen[str]) -> Exchange:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and process.poll() is None:
        try:
            return ask(Server("127.0.0.1", port), NAME, t.A, timeout=0.5, tries=1)
        except NoAnswer:
            time.sleep(0.05)
    process.kill()
    raise AssertionError(f"kdns does not answer: {process.communicate()[1]}")


def test_the_stock_arguments_serve_until_sigterm(corefile: Path) -> None:
    port = free_port()
    with started("-conf", corefile, "-dns.port", port, stdout=subprocess.PIPE) as process:
        assert wait_answer(port, process).message.rcode == t.NOERROR
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")
    # It answers as soon as it can, which may be before it has said so.
    asked = [line for line in out.splitlines() if line.startswith("[INFO] 127.0.0.1:")]
    lines = [line for line in out.splitlines() if line not in asked]
    assert lines[0].startswith(f".:{port}")
    assert lines[1] == f"kdns-{kdns.__version__}"
    assert re.match(r"linux/\w+, ", lines[2])
    assert re.match(r'\[INFO\] 127\.0\.0\.1:\d+ - \d+ "A IN web\.example\.test\. udp ', asked[0])


def test_quiet_prints_no_first_lines(corefile: Path) -> None:
    port = free_port()
    with started("-conf", corefile, "-p", port, "-quiet", stdout=subprocess.PIPE) as process:
        wait_answer(port, process)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=20)
    assert out.startswith("[INFO] 127.0.0.1:")


def test_a_full_disk_for_its_log_does_not_stop_it(corefile: Path) -> None:
    port = free_port()
    with (
        open("/dev/full", "w") as full,
        started("-conf", corefile, "-dns.port", port, stdout=full) as process,
    ):
        for _ in range(3):
            assert wait_answer(port, process).message.rcode == t.NOERROR
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")


def test_a_log_that_nobody_reads_does_not_stop_it(corefile: Path) -> None:
    port = free_port()
    reading, writing = os.pipe()
    with (
        os.fdopen(writing, "w") as pipe,
        started("-conf", corefile, "-dns.port", port, stdout=pipe) as process,
    ):
        wait_answer(port, process)
        os.close(reading)
        for _ in range(3):
            assert wait_answer(port, process).message.rcode == t.NOERROR
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")


def test_mistakes_in_a_corefile_are_a_line_each_and_exit_2(tmp_path: Path) -> None:
    path = tmp_path / "Corefile"
    path.write_text(". {\n    cahe 30\n    forwad . 192.0.2.1\n}\n")
    with started("-conf", path, "-p", free_port(), stdout=subprocess.PIPE) as process:
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (2, "")
    assert [line.partition(":")[2][:2] for line in err.replace(str(path), "").splitlines()] == [
        "2:",
        "3:",
    ]
    assert "cache" in err
    assert "forward" in err


def test_a_port_that_is_taken_is_one_line_and_exit_2(corefile: Path) -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)), socket.socket(type=socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", port))
        with started("-conf", corefile, "-p", port, stdout=subprocess.PIPE) as process:
            out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (2, "")
    assert err.count("\n") == 1
    assert "Address already in use" in err
    assert str(port) in err


def test_a_corefile_that_is_not_there_is_one_line_and_exit_2(tmp_path: Path) -> None:
    with started("-conf", tmp_path / "nosuch", stdout=subprocess.PIPE) as process:
        _, err = process.communicate(timeout=20)
    assert process.returncode == 2
    assert err.count("\n") == 1
    assert "nosuch: No such file or directory" in err


def test_the_pidfile_is_there_while_it_serves(corefile: Path, tmp_path: Path) -> None:
    port, pidfile = free_port(), tmp_path / "pid"
    with started(
        "-conf", corefile, "-p", port, "-pidfile", pidfile, stdout=subprocess.PIPE
    ) as process:
        wait_answer(port, process)
        assert pidfile.read_text() == f"{process.pid}\n"
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    assert not pidfile.exists()
