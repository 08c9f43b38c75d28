"""`kdns up` as the process that it is, on free ports, for tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeVar

from kdns.dns import types as t
from kdns.dns.text import render_rdata
from kdns.server.client import NoAnswer, Server, ask, candidates, search_path

T = TypeVar("T")

PATIENCE: Final = 30.0  # seconds that anything may take on a busy machine
LOOK: Final = 0.02  # between two looks at a state that is waited for
PROJECT: Final = Path(__file__).resolve().parent.parent
KUBECTL: Final = Path(sys.executable).parent / "kubectl"


def until(what: str, check: Callable[[], T], seconds: float = PATIENCE) -> T:
    """Return what `check` returns as soon as that is true. Fails, naming `what`."""
    end = time.monotonic() + seconds
    while True:
        found = check()
        if found:
            return found
        if time.monotonic() > end:
            raise AssertionError(f"not in {seconds:g} s: {what}")
        time.sleep(LOOK)


class Up:
    """One run. `with Up("-f", path) as up:` waits for the ready line."""

    def __init__(self, *flags: object, stdin: str | None = None, prefix: tuple[str, ...] = ()):
        self._argv = [*prefix, sys.executable, "-m", "kdns", "up", "--api-port=0", "--dns-port=0",
                      "--output=json", *map(str, flags)]  # fmt: skip
        self._stdin = stdin
        self.facts: Mapping[str, Any] = {}
        self.log = ""

    def __enter__(self) -> Up:
        self.process = subprocess.Popen(
            self._argv, cwd=PROJECT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            stdin=subprocess.PIPE if self._stdin is not None else subprocess.DEVNULL,
        )  # fmt: skip
        if self._stdin is not None:
            assert self.process.stdin is not None
            self.process.stdin.write(self._stdin)
            self.process.stdin.close()
            self.process.stdin = None
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.kill()
            raise AssertionError(f"kdns up did not get ready: {self.log}")
        self.facts = json.loads(line)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                self.terminate()
        self.kill()
        print(f"--- {' '.join(self._argv)}\n{self.log}")  # pytest shows it of a failure

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log += line

    def kill(self) -> None:
        """End it as a power cut does."""
        self.process.kill()
        self.process.wait()
        self._reader.join(PATIENCE)
        assert self.process.stdout is not None and self.process.stderr is not None
        self.process.stdout.close()
        self.process.stderr.close()

    def terminate(self, number: int = signal.SIGTERM) -> int:
        """Ask it to end; return its exit code."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def kubectl(self, *args: str, text: str = "", check: bool = True) -> str:
        """Run a stock kubectl; return what it prints."""
        done = subprocess.run(
            [KUBECTL, *args], input=text, capture_output=True, text=True, check=False,
            timeout=2 * PATIENCE,
            env={**os.environ, "KUBECONFIG": str(self.facts["kubeconfig"])},
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"kubectl {' '.join(args)}: {done.stderr}")
        return done.stdout

    @property
    def dns_port(self) -> int:
        return int(str(self.facts["dns"]).rpartition(":")[2])

    def dig(self, name: str, namespace: str = "default") -> list[str]:
        """Ask over the network as a Pod does; return the addresses."""
        for full in candidates(name, search_path([namespace]))[:3]:
            try:
                message = ask(Server("127.0.0.1", self.dns_port), full, t.A).message
            except NoAnswer as e:
                raise AssertionError(str(e)) from None
            found = [render_rdata(rr.type, rr.rdata) for rr in message.answer if rr.type == t.A]
            if found:
                return sorted(found)
        return []
