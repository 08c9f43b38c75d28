"""What kdns' own lines look like, and that a bad stream harms nobody."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import logging
import os
from collections.abc import Iterator

import pytest

from kdns.logs import START, LineHandler, setup_logging, start_lines


@pytest.fixture(autouse=True)
def loggers_as_before() -> Iterator[None]:
    """Undo what setup_logging does to the process."""
    root, kdns, start = (logging.getLogger(name) for name in ("", "kdns", START))
    handlers, levels = root.handlers[:], (kdns.level, start.level)
    switches = (logging.logThreads, logging.logProcesses, logging.logMultiprocessing)
    asyncio_filters = logging.getLogger("asyncio").filters[:]
    yield
    logging.getLogger("asyncio").filters[:] = asyncio_filters
    root.handlers[:] = handlers
    kdns.setLevel(levels[0])
    start.setLevel(levels[1])
    logging.logThreads, logging.logProcesses, logging.logMultiprocessing = switches


@pytest.mark.parametrize(
    ("name", "level", "expected"),
    [
        ("kdns", logging.INFO, "[INFO] Reloading\n"),
        ("kdns.plugin/errors", logging.ERROR, "[ERROR] plugin/errors: Reloading\n"),
        ("kdns.plugin/reload", logging.WARNING, "[WARNING] plugin/reload: Reloading\n"),
        ("kdns.source", logging.INFO, "[INFO] source: Reloading\n"),
        ("asyncio", logging.CRITICAL, "[FATAL] asyncio: Reloading\n"),
        (START, logging.INFO, "Reloading\n"),
        ("kdns", logging.DEBUG, ""),
    ],
)
def test_a_line_says_its_level_and_who_speaks_as_coredns_does(
    name: str, level: int, expected: str
) -> None:
    stream = io.StringIO()
    setup_logging(stream)
    logging.getLogger(name).log(level, "%s", "Reloading")
    assert stream.getvalue() == expected


def test_quiet_leaves_out_the_first_lines_and_nothing_else() -> None:
    stream = io.StringIO()
    setup_logging(stream, quiet=True)
    for line in start_lines():
        logging.getLogger(START).info(line)
    logging.getLogger("kdns").info("serving")
    assert stream.getvalue() == "[INFO] serving\n"


def test_json_has_one_object_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDNS_LOG_FORMAT", "json")
    stream = io.StringIO()
    setup_logging(stream)
    logging.getLogger("kdns.plugin/errors").error('2 "tab\there"\nnext. A: timeout')
    try:
        raise ValueError("a bug")
    except ValueError:
        logging.getLogger("kdns").exception("that query got SERVFAIL")
    one, two = map(json.loads, stream.getvalue().splitlines())
    assert one["level"] == "error"
    assert one["logger"] == "plugin/errors"
    assert one["message"] == '2 "tab\there"\nnext. A: timeout'
    assert one["time"].endswith("Z")
    assert "trace" not in one
    assert "ValueError: a bug" in two["trace"]


def test_a_bug_is_logged_with_its_trace() -> None:
    stream = io.StringIO()
    setup_logging(stream)
    try:
        raise ValueError("a bug")
    except ValueError:
        logging.getLogger("kdns").exception("that query got SERVFAIL")
    assert stream.getvalue().startswith("[ERROR] that query got SERVFAIL\nTraceback ")


def test_calling_it_again_replaces_the_stream() -> None:
    first, second = io.StringIO(), io.StringIO()
    setup_logging(first)
    setup_logging(second)
    logging.getLogger("kdns").info("once")
    assert (first.getvalue(), second.getvalue()) == ("", "[INFO] once\n")


def test_a_reader_that_has_gone_ends_nothing() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        handler = setup_logging(stream)
        for _ in range(3):
            logging.getLogger("kdns").info("nobody reads this")
    assert handler.dropped == 3


def test_a_full_disk_ends_nothing() -> None:
    with open("/dev/full", "w") as stream:
        handler = setup_logging(stream)
        logging.getLogger("kdns").info("no space left")
        assert handler.dropped == 1
        handler.stream = io.StringIO()  # or closing the file would try to flush


def test_a_reader_that_stands_still_blocks_nothing_and_is_told_what_it_missed() -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as reader, os.fdopen(writing, "w") as stream:
        handler = setup_logging(stream)
        log = logging.getLogger("kdns")
        for _ in range(3000):  # a pipe holds 64 kB
            log.info("x" * 100)
        assert handler.dropped > 0
        lost = handler.dropped
        os.set_blocking(reading, False)
        reader.read()
        log.info("back again")
        lines = reader.read().decode().splitlines()
    assert lines[-2].startswith(f"[WARNING] {lost} log lines were lost")
    assert lines[-1] == "[INFO] back again"


def test_a_line_longer_than_a_pipe_takes_at_once_arrives_whole() -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as reader, os.fdopen(writing, "w") as stream:
        setup_logging(stream)
        logging.getLogger("kdns").error("y" * 20_000)
        os.set_blocking(reading, False)
        assert reader.read() == b"[ERROR] " + b"y" * 20_000 + b"\n"


def test_arguments_that_do_not_fit_are_said_and_not_raised() -> None:
    stream = io.StringIO()
    handler = setup_logging(stream)
    handler.emit(logging.makeLogRecord({"msg": "%d queries", "args": ("many",)}))
    assert stream.getvalue().startswith("[ERROR] a log line could not be formed")
    assert "'%d queries'" in stream.getvalue()


def test_a_closed_stream_counts() -> None:
    stream = io.StringIO()
    handler = LineHandler(stream)
    stream.close()
    handler.emit(logging.makeLogRecord({"msg": "late"}))
    assert handler.dropped == 1


def test_a_lack_of_file_descriptors_is_one_line_that_says_what_would_be_right() -> None:
    """asyncio reports each connection it cannot accept; it did so 16,592 times in 9 s."""
    stream = io.StringIO()
    setup_logging(stream)
    loop = asyncio.new_event_loop()
    try:
        for _ in range(100):
            loop.call_exception_handler(
                {
                    "message": "socket.accept() out of system resource",
                    "exception": OSError(errno.EMFILE, os.strerror(errno.EMFILE)),
                }
            )
            # its later tries for sockets that were closed in between
            loop.call_exception_handler(
                {
                    "message": "Exception in callback BaseSelectorEventLoop._start_serving()",
                    "exception": ValueError("Invalid file descriptor: -1"),
                }
            )
        loop.call_exception_handler({"message": "Exception in callback other()"})
    finally:
        loop.close()
    lack, other = stream.getvalue().splitlines()
    assert lack.startswith("[ERROR] new TCP, TLS and HTTP connections have to wait: all ")
    assert "LimitNOFILE" in lack
    assert other == "[ERROR] asyncio: Exception in callback other()"
