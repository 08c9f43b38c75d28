"""How kdns' own lines look, and that a bad stream harms nobody.

The text form is CoreDNS's (reference 3.2): `[INFO] plugin/NAME: message`, no time stamp, for
what collects container logs adds one. Loggers: "kdns" for the program, children such as
"kdns.plugin/forward" or "kdns.source" name who speaks. START is for the lines a server
greets with; they carry no level, and -quiet leaves them out. QUERIES is for lines that are
JSON objects already (`kdns_log json`): they are written as they are in either form. What is
said is everybody else's business.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
import resource
import select
import sys
import time
from typing import TextIO

from kdns import __version__

START = "kdns.start"
QUERIES = "kdns.queries"
LEVELS = {
    logging.DEBUG: "DEBUG",
    logging.INFO: "INFO",
    logging.WARNING: "WARNING",
    logging.ERROR: "ERROR",
    logging.CRITICAL: "FATAL",
}
# A pipe that poll() calls writable takes this much without blocking (POSIX PIPE_BUF; Linux
# frees whole pages), so one line to a stuck reader never stops the answers.
ATOMIC = 4096
# How asyncio begins what it says, with a traceback, of each connection it cannot accept; it
# tries again a second later, as often as connections may wait.
NOT_ACCEPTED = "socket.accept() out of system resource"
# And what it says of each such try for a socket that was closed in between.
CLOSED_BEFORE = "Exception in callback BaseSelectorEventLoop._start_serving("
SAY_AGAIN = 60.0  # seconds until the same lack is said again


def start_lines() -> tuple[str, str]:
    """Return the two lines that name the program, as CoreDNS prints them."""
    return (
        f"kdns-{__version__}",
        f"{sys.platform}/{platform.machine()}, python{platform.python_version()}",
    )


def setup_logging(stream: TextIO, quiet: bool = False) -> LineHandler:
    """Send all log lines to `stream`; call it again to change stream or form.

    The environment variable KDNS_LOG_FORMAT=json asks for one JSON object a line.
    """
    handler = LineHandler(stream)
    as_json = os.environ.get("KDNS_LOG_FORMAT", "").lower() == "json"
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    root = logging.getLogger()
    for old in root.handlers[:]:
        if isinstance(old, LineHandler):
            root.removeHandler(old)
    root.addHandler(handler)
    asyncio_log = logging.getLogger("asyncio")
    for known in asyncio_log.filters[:]:
        if isinstance(known, NotAccepted):
            asyncio_log.removeFilter(known)
    asyncio_log.addFilter(NotAccepted())
    logging.getLogger("kdns").setLevel(logging.INFO)
    logging.getLogger(START).setLevel(logging.CRITICAL if quiet else logging.NOTSET)
    # Nothing prints these, and a query log asks for a record per query.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    if sys.version_info >= (3, 12):
        logging.logAsyncioTasks = False
    return handler


class NotAccepted(logging.Filter):
    """Has one line say, once in a while, that no connection can be accepted, and why; asyncio
    would write a traceback for each."""

    def __init__(self) -> None:
        super().__init__()
        self._quiet_until = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        """Reword such a record; return False if it has been said already."""
        error = record.exc_info[1] if record.exc_info else None
        said = str(record.msg)
        if not said.startswith(NOT_ACCEPTED):
            return not (said.startswith(CLOSED_BEFORE) and isinstance(error, ValueError))
        now = time.monotonic()
        if now < self._quiet_until:
            return False
        self._quiet_until = now + SAY_AGAIN
        why = "no resources left"
        if isinstance(error, OSError):
            why = error.strerror or str(error)
            if error.errno == errno.EMFILE:
                most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
                why = (
                    f"all {most} file descriptors of this process are in use; a higher limit "
                    "would be right: LimitNOFILE= of the systemd unit, or ulimit -n"
                )
        record.name, record.args, record.exc_info, record.exc_text = "kdns", None, None, None
        record.msg = f"new TCP, TLS and HTTP connections have to wait: {why}"
        return True


class LineHandler(logging.Handler):
    """Writes lines and never raises, blocks or gives up: what cannot be written is counted.

    dropped -- lines lost so far, because the reader was too slow, has gone, or the disk is
               full. The first line that gets through again says how many were.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.stream = stream
        self.dropped = 0
        self._told = 0
        self._poll: select.poll | None = None
        try:
            self._fd = stream.fileno()
        except (OSError, ValueError):  # a stream in memory
            return
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLOUT)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        try:
            line = self.format(record) + "\n"
        except (TypeError, ValueError) as e:
            # A record whose arguments do not fit its text is our bug; say it and live.
            line = f"[ERROR] a log line could not be formed ({e}): {record.msg!r}\n"
        if self.dropped > self._told:
            lost = self.dropped - self._told
            note = logging.makeLogRecord(
                {
                    "name": "kdns",
                    "levelno": logging.WARNING,
                    "msg": f"{lost} log lines were lost: the reader too slow or gone, or disk full",
                }
            )
            if not self._write(self.format(note) + "\n"):
                self.dropped += 1
                return
            self._told = self.dropped
        if not self._write(line):
            self.dropped += 1

    def _write(self, line: str) -> bool:
        """Return False if the line, or the end of it, was lost."""
        try:
            if self._poll is None:
                self.stream.write(line)
                return True
            rest = line.encode("utf-8", "backslashreplace")
            while rest:
                if not self._poll.poll(0):
                    return False
                rest = rest[os.write(self._fd, rest[:ATOMIC]) :]
        except (OSError, ValueError):
            return False
        return True


class TextFormatter(logging.Formatter):
    """`[LEVEL] who: message`; a traceback, if there is one, below it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        text = record.getMessage()
        if record.name not in (START, QUERIES):
            who = record.name.removeprefix("kdns").removeprefix(".")
            level = LEVELS.get(record.levelno, record.levelname)
            text = f"[{level}] {who}: {text}" if who else f"[{level}] {text}"
        if record.exc_info:
            text = f"{text}\n{self.formatException(record.exc_info)}"
        return text


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message and, after a bug, trace."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        if record.name == QUERIES:
            return record.getMessage()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": LEVELS.get(record.levelno, record.levelname).lower(),
            "logger": record.name.removeprefix("kdns.") if record.name != START else "kdns",
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
