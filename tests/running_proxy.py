"""A node for tests: a network namespace in which `kdns proxy` runs as the process that it is.

    with Node() as node:
        api = node.api(service("web"), slice_of("web", endpoint("10.244.1.5")))
        proxy = node.proxy("--master", api.url)
        proxy.until_synced()
        api.put(...)

Requests and the API server run in threads of this process that have entered the namespace.
Everything that was started ends with the `with`, and should the tests be killed, with them.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import ctypes
import functools
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeVar

import msgspec
from api_replay import ApiReplay, Json
from iptables_text import Rules, parse_saved

from kdns.registry.objects import Object

T = TypeVar("T")

PATIENCE: Final = 30.0  # seconds that anything may take on a busy machine
LOOK: Final = 0.02  # between two looks at a state that is waited for
NODE_IP: Final = "192.168.77.1"
POD_NET: Final = "10.244.0.0/16"
ROOT: Final = Path(__file__).parents[1]
CLONE_NEWNET: Final = 0x40000000

PROGRAMS: Final = "unshare nsenter setpriv ip iptables ip6tables".split()

# A node's own network: a way out for every address, so that packets to a ClusterIP are made;
# the lock of iptables-legacy is its own.
SETUP: Final = f"""
mount -t tmpfs kdns-tests /run
ip -batch - <<EOF
link set lo up
link add eth0 type veth peer name cable
link set cable up
link set eth0 up
addr add {NODE_IP}/24 dev eth0
addr add fd00:77::1/64 dev eth0 nodad
route add default dev eth0
route add {POD_NET} dev eth0
EOF
echo ready
exec cat
"""


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


def as_json(one: Object | Json) -> Json:
    """Return an object as the API server has it."""
    if isinstance(one, dict):
        return one
    built: Json = msgspec.to_builtins(one)
    return {"kind": type(one).__name__, **built}


@functools.cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _enter(pid: int) -> None:
    """Move this thread to the network namespace of a process."""
    with open(f"/proc/{pid}/ns/net") as namespace:
        if _libc().setns(namespace.fileno(), CLONE_NEWNET) != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"setns: {os.strerror(code)}")


@dataclass(frozen=True)
class Answer:
    """One HTTP answer. status -- 0: nobody listens"""

    status: int
    headers: Mapping[str, str]
    body: str

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Unavailable(Exception):
    """Why there can be no such node here."""


class Node:
    """The namespace. variant -- which iptables programs look at it

    Entering raises Unavailable where no such node can be made.
    """

    def __init__(self, variant: str = "") -> None:
        self.variant = f"-{variant}" if variant else ""
        self._holder: subprocess.Popen[str] | None = None
        self._threads: concurrent.futures.ThreadPoolExecutor | None = None
        self._proxies: list[Proxy] = []
        self._apis: list[Api] = []
        self.folder = Path(tempfile.mkdtemp(prefix="kdns-node-"))

    def __enter__(self) -> Node:
        missing = [one for one in PROGRAMS if shutil.which(one) is None]
        if missing:
            self.close()
            raise Unavailable(f"needs {', '.join(missing)}")
        self._holder = subprocess.Popen(
            ["unshare", "-m", "-n", "sh", "-e", "-c", SETUP],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert self._holder.stdout is not None
        said = self._holder.stdout.readline()
        tool = f"iptables{self.variant}"
        if said != "ready\n":
            self.close()
            raise Unavailable(f"no network namespace can be made: {said.strip()}")
        if (tried := self.finish(tool, "-t", "nat", "-S")).returncode:
            self.close()
            raise Unavailable(f"{tool} does not work here: {tried.stderr.strip()}")
        self._threads = concurrent.futures.ThreadPoolExecutor(
            4, initializer=_enter, initargs=(self.pid,)
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop what was started; with the last process goes the namespace."""
        for proxy in self._proxies:
            proxy.kill()
            # pytest shows it where a test has failed.
            print(f"--- {' '.join(proxy.argv)}\n{proxy.log}")
        for api in self._apis:
            api.close()
        if self._threads is not None:
            self._threads.shutdown(wait=True)
        if self._holder is not None:
            assert self._holder.stdin is not None and self._holder.stdout is not None
            self._holder.stdin.close()
            self._holder.stdout.close()
            self._holder.wait()
        for path in sorted(self.folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        self.folder.rmdir()

    @property
    def pid(self) -> int:
        assert self._holder is not None
        return self._holder.pid

    @property
    def lock(self) -> Path:
        """The lock of iptables-legacy, as this process sees the node's file."""
        return Path(f"/proc/{self.pid}/root/run/xtables.lock")

    # --- programs -------------------------------------------------------------------------

    def enter(self, *argv: str) -> list[str]:
        """Return the command line that runs a program on the node. It dies with this process."""
        return ["nsenter", "-t", str(self.pid), "-m", "-n", f"--wd={self.folder}",
                "setpriv", "--pdeathsig", "KILL", *argv]  # fmt: skip

    def run(self, *argv: str, text: str = "", check: bool = True) -> str:
        """Run a program to its end; return its output."""
        done = self.finish(*argv, text=text)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(argv)}: {done.returncode}: {done.stderr}")
        return done.stdout

    def finish(
        self, *argv: str, text: str = "", env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.enter(*argv), input=text, capture_output=True, text=True, check=False,
            timeout=3 * PATIENCE, env={**os.environ, **(env or {})},
        )  # fmt: skip

    def saved(self, family: int = 4) -> str:
        """Return what iptables-save prints, without times and counters."""
        tool = "iptables" if family == 4 else "ip6tables"
        text = self.run(f"{tool}{self.variant}-save")
        return re.sub(r"(?m)^#.*\n| \[\d+:\d+\]$", "", text)

    def rules(self, family: int = 4) -> Rules:
        """Return the rules that the kernel holds: table -> chain -> rules."""
        return parse_saved(self.saved(family))

    def kdns(self, *flags: str) -> subprocess.CompletedProcess[str]:
        """Run `kdns proxy` to its end."""
        argv = (sys.executable, "-m", "kdns", "proxy", *Proxy.FLAGS, *flags)
        return self.finish(*argv, env={"PYTHONPATH": str(ROOT)})

    # --- network --------------------------------------------------------------------------

    def inside(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function in a thread that is on the node: sockets made there are the node's."""
        assert self._threads is not None
        return self._threads.submit(function, *arguments).result(3 * PATIENCE)

    def get(self, path: str, port: int, host: str = "127.0.0.1") -> Answer:
        """GET http://host:port/path."""
        return self.inside(_get, host, port, path)

    @contextmanager
    def server(self, ip: str, port: int, kind: int = socket.SOCK_STREAM) -> Iterator[str]:
        """Have an endpoint on the node that sends back whatever it is sent, over UDP with its
        IP in front; yields its IP."""
        self.run("ip", "addr", "add", f"{ip}/32", "dev", "lo")
        listener = self.inside(listen, ip, port, kind)
        thread = threading.Thread(target=_echo, args=(listener, kind), daemon=True)
        thread.start()
        try:
            yield ip
        finally:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # ends accept() and recvfrom()
            listener.close()
            thread.join(PATIENCE)

    def connect(self, ip: str, port: int, seconds: float = 2.0) -> socket.socket:
        """Open a TCP connection from the node. Raises OSError."""
        return self.inside(functools.partial(socket.create_connection, timeout=seconds), (ip, port))

    def udp(self, ip: str, port: int) -> socket.socket:
        def make() -> socket.socket:
            one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            one.settimeout(1.0)
            one.connect((ip, port))
            return one

        return self.inside(make)

    # --- the registry and the proxy ---------------------------------------------------------

    def api(self, *objects: Object | Json, port: int = 0) -> Api:
        """Start an API server on the node that has these objects."""
        self._apis.append(Api(self, objects, port))
        return self._apis[-1]

    def proxy(self, *flags: str, prefix: Sequence[str] = (), path: str = "") -> Proxy:
        """Start `kdns proxy`. prefix -- before the command; path -- folders before PATH"""
        self._proxies.append(Proxy(self, flags, prefix, path))
        return self._proxies[-1]


class Api:
    """An API server on the node, driven from the test."""

    def __init__(self, node: Node, objects: Sequence[Object | Json], port: int) -> None:
        self.replay = ApiReplay()
        self.replay.load([as_json(one) for one in objects])
        self._node = node
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self.port = port
        self.start()

    def _run(self) -> None:
        _enter(self._node.pid)
        self._loop.run_forever()
        self._loop.close()

    def _do(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen, on the port of before."""
        self._do(self.replay.start(port=self.port))
        self.port = self.replay.port

    def stop(self) -> None:
        """End all watches and close the port: nobody is there."""
        self._do(self.replay.stop())

    def put(self, *objects: Object | Json) -> None:
        """Add or change objects."""
        for one in objects:
            self._do(self.replay.put(as_json(one)))

    def delete(self, *objects: Object | Json) -> None:
        for one in objects:
            self._do(self.replay.delete(as_json(one)))

    def close(self) -> None:
        if self._thread.is_alive():
            with suppress(Exception):
                self.stop()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(PATIENCE)


class Proxy:
    """One `kdns proxy`, as a process."""

    # The hash of conntrack is the whole machine's: tests leave it alone.
    FLAGS = ("--conntrack-max-per-core=0", "--hostname-override=node1")
    METRICS, HEALTHZ = 10249, 10256

    def __init__(
        self, node: Node, flags: Sequence[str], prefix: Sequence[str] = (), path: str = ""
    ) -> None:
        self._node = node
        names = {flag.partition("=")[0] for flag in flags}
        # A flag beside --config is a warning each.
        own = [] if "--config" in names else [f for f in self.FLAGS if f.split("=")[0] not in names]
        self.argv = [*prefix, sys.executable, "-m", "kdns", "proxy", *own, *flags]
        self._log = node.folder / f"proxy-{len(node._proxies)}.log"
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        if path:
            env["PATH"] = f"{path}:{env['PATH']}"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                node.enter(*self.argv), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env
            )

    @property
    def log(self) -> str:
        """All that it has said, on stdout and stderr."""
        return self._log.read_text(errors="replace")

    def until_said(self, *parts: str) -> str:
        """Wait for a line with all these parts in it; return it."""

        def found() -> str:
            ended = self.process.poll() is not None
            lines = self.log.splitlines()
            line = next((one for one in lines if all(part in one for part in parts)), "")
            if ended and not line:
                raise AssertionError(f"it left with {self.process.returncode}: {self.log}")
            return line

        return until(f"a line of the log with {parts}", found)

    def until_synced(self) -> None:
        """Wait for the first sync of all families."""
        self.until_said("the rules of this node are up to date")

    def wait(self, seconds: float = PATIENCE) -> int:
        """Wait for its end; return the exit code."""
        return self.process.wait(seconds)

    def stop(self) -> int:
        """Send SIGTERM; return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def healthz(self) -> Answer:
        return self._node.get("/healthz", self.HEALTHZ)

    def livez(self) -> Answer:
        return self._node.get("/livez", self.HEALTHZ)

    def metrics(self) -> dict[str, float]:
        """Return all samples: 'name{label="value"}' -> value."""
        lines = self._node.get("/metrics", self.METRICS).body.splitlines()
        pairs = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in pairs}

    def metric(self, name: str) -> float:
        return self.metrics().get(name, 0.0)


def _get(host: str, port: int, path: str) -> Answer:
    connection = http.client.HTTPConnection(host, port, timeout=PATIENCE)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return Answer(response.status, dict(response.headers), response.read().decode())
    except ConnectionError as error:
        return Answer(0, {}, str(error))
    finally:
        connection.close()


def listen(ip: str, port: int, kind: int) -> socket.socket:
    """Open a socket there; with Node.inside, on the node."""
    one = socket.socket(socket.AF_INET, kind)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    one.bind((ip, port))
    if kind == socket.SOCK_STREAM:
        one.listen(128)
    return one


def _echo(listener: socket.socket, kind: int) -> None:
    with suppress(OSError):
        while True:
            if kind == socket.SOCK_DGRAM:
                data, peer = listener.recvfrom(2048)
                if not peer:
                    return
                listener.sendto(f"{listener.getsockname()[0]} ".encode() + data, peer)
            else:
                one, _ = listener.accept()
                threading.Thread(target=_echo_stream, args=(one,), daemon=True).start()


def _echo_stream(one: socket.socket) -> None:
    with one, suppress(OSError):
        while data := one.recv(2048):
            one.sendall(data)
