"""`kdns top`: a live view of who asks what, from a running kdns or from lines of its log.

Decides where events come from, when the view is drawn and how it ends; what is counted is
top.py's, what it looks like top_text.py's.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click
import msgspec

from kdns.control import ENVIRONMENT, ControlClient, NoControl, find_control
from kdns.errors import KdnsError
from kdns.explain.top import Top
from kdns.flags import DAY, Duration, control

if TYPE_CHECKING:
    from rich.console import Console

STDIN = "-"
HELD = 10_000  # lines read and not yet counted
ROWS = 100  # that a page may show
PLAIN_WIDTH = 120  # of a page that goes to no terminal
DRAIN = 0.2  # seconds between two looks at what was read, while nothing is drawn
CTRL_C = "\x03"


@click.command("top")
@click.argument("file", metavar="[FILE]", default="")
@control()
@click.option(
    "--window", type=Duration(1, DAY), default="60s", show_default=True,
    help="The time that counts; a file counts whole.",
)  # fmt: skip
@click.option(
    "--interval", type=Duration(0.2, 60), default="1s", show_default=True,
    help="The time between two pages.",
)  # fmt: skip
@click.option("--once", is_flag=True, help="Print one page and leave; so do pipes and '-o json'.")
@click.option(
    "--for", "seconds", type=Duration(0.1, DAY),
    help="With --once, how long to listen.  [default: 5s; a file and standard input: to the end]",
)  # fmt: skip
@click.option("--rows", metavar="N", type=click.IntRange(1, ROWS), default=10, show_default=True,
              help="Rows a table in what is printed.")  # fmt: skip
@click.option(
    "--cluster-domain", "domain", metavar="D", default="cluster.local", show_default=True,
    help="Where search lists of Pods point to.",
)  # fmt: skip
@click.option(
    "-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True
)
def command(
    file: str, control: str, window: float, interval: float, once: bool, seconds: float | None,
    rows: int, domain: str, output: str,
) -> int:  # fmt: skip
    """Watch who asks what: clients and names, rcodes, what search lists waste, slow upstreams,
    latency.

    Reads the control socket of a running kdns; or FILE ('-' is standard input) with the lines
    that 'kdns_log json' writes: kubectl logs -n kube-system -f ds/kdns | kdns top -

    q or Ctrl-C ends it.
    """
    from rich.console import Console

    printed = once or output == "json" or not sys.stdout.isatty()
    if file:
        source, lines = _of_file(file)
    else:
        source, lines = _of_socket(control)
        seconds = seconds or 5.0
    whole = printed or file not in ("", STDIN)
    reader = _Reader(lines, Top(0 if whole else window, domain))
    reader.start()
    if not printed:
        console = Console()
        _watch(reader, console, f"{source}  q: quit", interval, keep=bool(file))
        _fail(reader)
        if reader.ended and not file:
            raise KdnsError(f"the kdns of {source} has ended")
        return 0
    with contextlib.suppress(KeyboardInterrupt):
        reader.count_for(seconds)
    _fail(reader)
    summary = reader.top.summary(reader.now(), rows)
    if output == "json":
        click.echo(json.dumps(summary))
    else:
        from kdns.explain.top_text import page

        console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
        console.print(page(summary, source, console.width, None))
    return 0


def _fail(reader: _Reader) -> None:
    if reader.error is not None:
        raise reader.error


# --- where events come from -----------------------------------------------------------------


def _of_socket(control: str) -> tuple[str, Iterable[str]]:
    path = find_control(control)
    if path is None:
        raise KdnsError(
            "no running kdns is found: say --control PATH (or set"
            f" {ENVIRONMENT}), or give its log: kubectl logs -f ds/kdns | kdns top -"
        )
    client = ControlClient(path)
    client.get("/v1/status")  # says at once what is wrong
    return path, client.stream()


def _of_file(file: str) -> tuple[str, Iterable[str]]:
    if file == STDIN:
        return "standard input", sys.stdin
    path = Path(file)
    if path.is_dir():
        raise KdnsError(f"{file}: is a folder; a file with lines of 'kdns_log json' is needed")
    try:
        return file, _closing(path.open(encoding="utf-8", errors="replace"))
    except OSError as e:
        raise KdnsError(f"{file}: cannot be read: {e.strerror}") from None


def _closing(opened: IO[str]) -> Iterator[str]:
    with opened:
        yield from opened


class _Reader(threading.Thread):
    """Reads lines while the view is drawn. Time is that of the events, which may have been
    logged long ago or on a host with another clock.

    error -- why there are no more, if that is not their end
    """

    def __init__(self, lines: Iterable[str], top: Top) -> None:
        super().__init__(daemon=True, name="kdns top")
        self._lines = lines
        self.top = top
        self._held: queue.Queue[str | None] = queue.Queue(HELD)
        self.error: KdnsError | None = None
        self.ended = False
        self._last = 0.0  # the newest event's time, Unix seconds
        self._heard = time.monotonic()

    def run(self) -> None:
        try:
            for line in self._lines:
                self._held.put(line)
        except NoControl as e:
            self.error = e
        except (OSError, ValueError) as e:
            self.error = KdnsError(f"cannot be read any further: {e}")
        self._held.put(None)

    def now(self) -> float:
        """Return the time as the events have it."""
        if self.ended or not self._last:
            return self._last or time.time()
        return self._last + time.monotonic() - self._heard

    def count(self, wait: float = 0.0) -> None:
        """Count what has been read; wait so long for the first line."""
        with contextlib.suppress(queue.Empty):
            line = self._held.get(timeout=wait) if wait else self._held.get_nowait()
            for _ in range(HELD):
                if line is None:
                    self.ended = True
                    return
                self._take(line)
                line = self._held.get_nowait()

    def count_for(self, seconds: float | None) -> None:
        """Count for so long; None: until the lines end."""
        until = None if seconds is None else time.monotonic() + seconds
        while not self.ended and (until is None or time.monotonic() < until):
            self.count(DRAIN if until is None else min(DRAIN, max(until - time.monotonic(), 0.01)))

    def _take(self, line: str) -> None:
        at = line.find("{")  # kubectl logs --prefix and others write something before it
        if at < 0:
            return
        try:
            event = msgspec.json.decode(line[at:].encode())
        except ValueError:
            return  # a line that is not the query log's
        if not isinstance(event, dict):
            return
        moment = _unix(event.get("time"))
        if moment > self._last:
            self._last, self._heard = moment, time.monotonic()
        self.top.take(event, moment or self.now())


def _unix(text: object) -> float:
    if isinstance(text, str):
        with contextlib.suppress(ValueError):
            return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    return 0.0


# --- the live view --------------------------------------------------------------------------


def _watch(reader: _Reader, console: Console, source: str, interval: float, keep: bool) -> None:
    """Draw until q, Ctrl-C or an error. keep -- also when there is nothing more to come"""
    from rich.live import Live

    from kdns.explain.top_text import page

    def drawn() -> Any:
        summary = reader.top.summary(reader.now(), ROWS)
        return page(summary, source, console.width, console.height)

    with (
        contextlib.suppress(KeyboardInterrupt),
        _keys() as pressed,
        Live(drawn(), console=console, screen=True, auto_refresh=False) as live,
    ):
        while reader.error is None and (keep or not reader.ended):
            if pressed(interval) in ("q", "Q", CTRL_C, "\x04"):
                return
            reader.count()
            live.update(drawn(), refresh=True)


def _no_key(seconds: float) -> str:
    time.sleep(seconds)
    return ""


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Give a function that waits for a key so many seconds, "" if none comes. The keyboard is
    the terminal, whatever standard input is."""
    try:
        import termios
        import tty

        fd = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
        before = termios.tcgetattr(fd)
    except (ImportError, OSError):
        yield _no_key
        return

    # Ctrl-C comes as a key, too: an exception in the midst of drawing might be lost.
    heard, said = os.pipe()
    os.set_blocking(said, False)

    def interrupted(number: int, frame: object) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(said, CTRL_C.encode())

    def pressed(seconds: float) -> str:
        ready, _, _ = select.select([fd, heard], [], [], seconds)
        return os.read(ready[0], 1).decode("ascii", "replace") if ready else ""

    handler = signal.signal(signal.SIGINT, interrupted)
    try:
        tty.setcbreak(fd)
        yield pressed
    finally:
        signal.signal(signal.SIGINT, handler)
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
        for one in (fd, heard, said):
            os.close(one)
