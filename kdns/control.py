"""The control socket: what a running kdns tells the other commands on the same machine.

HTTP/1.1 over a unix socket, JSON; only its owner may connect. Decides how the socket is made,
found and left, and how a stream of events is bounded. What is told is given by those who know
(app.py, agent.py, up.py, node.py) as Facts.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import socket
import stat
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec

from kdns import __version__
from kdns.errors import ConfigError, KdnsError, Problem

if TYPE_CHECKING:
    import http.client

    from aiohttp import web

    from kdns.pipeline import Pipeline
    from kdns.proxy.config import ProxyConfig
    from kdns.registry.snapshot import Snapshot
    from kdns.server.listen import Listener, Place
    from kdns.server.tap import QueryTap

log = logging.getLogger("kdns")

ENVIRONMENT: Final = "KDNS_CONTROL"
NODE_SOCKET: Final = "/run/kdns/control.sock"
EXTENSION: Final = "kdns"  # of a kubeconfig's context
MAX_PATH: Final = 107  # octets; unix(7), less the final zero
JSON: Final = "application/json"
NDJSON: Final = "application/x-ndjson"
QUERIES: Final = "/v1/queries"
# Bounds of what is held for a reader that does not read. 2,000 events have some 1 MB.
MAX_LINES: Final = 2000
MAX_LISTENERS: Final = 16
BATCH: Final = 200  # lines that are written at one go
SHUTDOWN: Final = 0.5  # seconds that open requests get at the end
CLIENT_TIMEOUT: Final = 10.0

Listen = Callable[[Callable[[str], None]], Callable[[], None]]


@dataclass(slots=True)
class Facts:
    """What is told. answers: route -> what makes its JSON, called for each request.

    listen -- calls its argument with each event's line until what it returns is called;
              None: there are no queries here
    """

    answers: dict[str, Callable[[], Any]] = field(default_factory=dict)
    listen: Listen | None = None

    def routes(self) -> list[str]:
        """Return the routes there are, sorted."""
        return sorted([*self.answers, *([QUERIES] if self.listen is not None else [])])


class DnsServer(Protocol):
    """What the socket tells of a DNS server: app.py's App."""

    conf: str | None
    text: str | None
    listeners: dict[Place, Listener]
    tap: QueryTap

    def gate_status(self) -> dict[str, Any] | None: ...

    def worker_pids(self) -> list[int]: ...


def facts_of(
    command: str,
    pipeline: Callable[[], Pipeline | None],
    *,
    app: DnsServer | None = None,
    node: str = "",
    mode: str = "none",
    cluster_cidr: str = "",
    objects: Callable[[], list[Any]] | None = None,
    config: Callable[[], ProxyConfig | None] = lambda: None,
) -> Facts:
    """Return what a running kdns tells, whichever halves it has.

    pipeline -- the registry, once there is one
    app      -- None: it serves no DNS
    objects  -- all of the registry as Kubernetes JSON, where more is held than is read
    config   -- what its rules are written with; None: it writes none
    """

    def status() -> dict[str, Any]:
        registry = pipeline()
        return {
            "version": __version__,
            "pid": os.getpid(),
            "command": command,
            "node": node,
            "mode": mode,
            "dns": [] if app is None else [*_dns_places(app)],
            "workers": [] if app is None else app.worker_pids(),
            "revision": {} if registry is None else registry.revisions(),
            "gate": None if app is None else app.gate_status(),
            "synced": registry is not None and registry.registry.synced,
            "cluster_cidr": cluster_cidr,
            "proxy": _rendered(config()),
        }

    def registry() -> dict[str, Any]:
        found = pipeline()
        revision = 0 if found is None else found.registry.revision
        if objects is not None:
            return {"revision": revision, "objects": objects()}
        held = [] if found is None else [*objects_in(found.registry)]
        return {"revision": revision, "objects": held}

    facts = Facts({"/v1/status": status, "/v1/registry": registry})
    if app is not None:
        facts.answers["/v1/corefile"] = lambda: _corefile(app)
        facts.listen = app.tap.listen
    return facts


def _dns_places(app: DnsServer) -> Iterator[str]:
    """Yield where plain DNS is asked on this machine: ADDRESS:PORT."""
    for listener in app.listeners.values():
        if listener.place.scheme == "dns":
            host = listener.place.address or "127.0.0.1"
            yield f"[{host}]:{listener.port}" if ":" in host else f"{host}:{listener.port}"


def _rendered(config: ProxyConfig | None) -> dict[str, object] | None:
    if config is None:
        return None
    from kdns.proxy.config import render_config

    return render_config(config)


def _corefile(app: DnsServer) -> dict[str, str]:
    """Return the Corefile, as its file is now."""
    if app.conf is None:
        return {"path": "", "text": app.text or ""}
    try:
        text = Path(app.conf).read_text(encoding="utf-8", errors="replace")
    except OSError as e:
        return {"path": app.conf, "text": "", "error": e.strerror or str(e)}
    return {"path": app.conf, "text": text}


# Which of a Snapshot's tables hold what.
_TABLES: Final = (
    ("namespaces", 1, "v1", "Namespace"),
    ("nodes", 1, "v1", "Node"),
    ("services", 2, "v1", "Service"),
    ("slices", 3, "discovery.k8s.io/v1", "EndpointSlice"),
    ("pods", 2, "v1", "Pod"),
    ("imports", 2, "multicluster.x-k8s.io/v1alpha1", "ServiceImport"),
    ("import_slices", 3, "discovery.k8s.io/v1", "EndpointSlice"),
    ("service_cidrs", 1, "networking.k8s.io/v1", "ServiceCIDR"),
)


def objects_in(snapshot: Snapshot) -> Iterator[dict[str, Any]]:
    """Yield the objects of a registry as Kubernetes JSON, with the fields that kdns reads; what
    has its default is left out."""
    seen: set[tuple[str, str, str]] = set()
    for table, depth, version, kind in _TABLES:
        for one in _leaves(getattr(snapshot, table), depth):
            key = (kind, one.metadata.namespace, one.metadata.name)
            if key not in seen:  # a slice may be an import's and a Service's
                seen.add(key)
                yield {"apiVersion": version, "kind": kind, **msgspec.to_builtins(one)}


def _leaves(table: Any, depth: int) -> Iterator[Any]:
    if depth == 0:
        yield table
        return
    for part in table.values() if isinstance(table, Mapping) else table:
        yield from _leaves(part, depth - 1)


class Lines:
    """Events on their way to one reader: bounded; what is lost is counted and told."""

    def __init__(self, limit: int = MAX_LINES) -> None:
        self._limit = limit
        self._lines: deque[str] = deque()
        self._lost = 0
        self._some = asyncio.Event()

    def put(self, line: str) -> None:
        """Add a line; the reader being too slow, it is lost."""
        if len(self._lines) >= self._limit:
            self._lost += 1
            return
        self._lines.append(line)
        self._some.set()

    async def take(self) -> bytes:
        """Return the next lines, once there are any. That some were lost stands where they
        were lost: after those that came before."""
        await self._some.wait()
        taken = [self._lines.popleft() for _ in range(min(BATCH, len(self._lines)))]
        if not self._lines:
            self._some.clear()
            if self._lost:
                taken.append(f'{{"lost":{self._lost}}}')
                self._lost = 0
        return "".join(f"{line}\n" for line in taken).encode("utf-8", "replace")


class ControlServer:
    """One socket. start() and stop()."""

    def __init__(self, path: str, facts: Facts) -> None:
        self.path = os.path.abspath(path)
        self.facts = facts
        self._runner: web.ServerRunner | None = None
        self._inode: tuple[int, int] | None = None
        self._streams: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Listen. Raises ConfigError where that cannot be."""
        from aiohttp import web

        sock = open_socket(self.path)
        found = os.stat(self.path)
        self._inode = found.st_dev, found.st_ino
        server = web.Server(self._handle, handler_cancellation=True)
        runner = web.ServerRunner(server, shutdown_timeout=SHUTDOWN)
        try:
            await runner.setup()
            await web.SockSite(runner, sock).start()
        except BaseException:
            sock.close()
            await runner.cleanup()
            self._unlink()
            raise
        self._runner = runner

    async def stop(self) -> None:
        """Close the socket and its connections; the file is removed if it is ours still."""
        if self._runner is None:
            return
        runner, self._runner = self._runner, None
        self._unlink()
        for task in self._streams:
            task.cancel()
        await runner.cleanup()

    def _unlink(self) -> None:
        with contextlib.suppress(OSError):
            found = os.stat(self.path)
            if (found.st_dev, found.st_ino) == self._inode:
                os.unlink(self.path)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        from aiohttp import web

        if request.method not in ("GET", "HEAD"):
            return _told(405, "only GET")
        if request.path == QUERIES and self.facts.listen is not None:
            return await self._stream(request, self.facts.listen)
        answer = self.facts.answers.get(request.path)
        if answer is None:
            known = ", ".join(self.facts.routes())
            return _told(404, f"there is no {request.path} here; there is {known}")
        try:
            body = msgspec.json.encode(answer())
        except Exception as e:
            log.exception("a bug in kdns while answering %s of the control socket", request.path)
            return _told(500, f"a bug in kdns, see its log: {type(e).__name__}: {e}")
        return web.Response(body=body + b"\n", content_type=JSON)

    async def _stream(self, request: web.BaseRequest, listen: Listen) -> web.StreamResponse:
        from aiohttp import web

        if len(self._streams) >= MAX_LISTENERS:
            return _told(503, f"{MAX_LISTENERS} others listen already")
        response = web.StreamResponse(headers={"Content-Type": NDJSON})
        lines = Lines()
        task = asyncio.current_task()
        assert task is not None
        self._streams.add(task)
        end = listen(lines.put)
        try:
            await response.prepare(request)
            while True:
                await response.write(await lines.take())  # waits for a reader that is slow
        except ConnectionError:
            return response  # the reader has gone
        finally:
            end()
            self._streams.discard(task)


@contextlib.asynccontextmanager
async def serving_control(path: str, facts: Callable[[], Facts]) -> AsyncIterator[None]:
    """Serve the socket while the `with` lasts; path empty: serve none. Raises ConfigError."""
    if not path:
        yield
        return
    server = ControlServer(path, facts())
    await server.start()
    try:
        yield
    finally:
        await server.stop()


def _told(status: int, text: str) -> web.Response:
    from aiohttp import web

    body = json.dumps({"error": text}).encode() + b"\n"
    return web.Response(status=status, body=body, content_type=JSON)


# --- the file -----------------------------------------------------------------------------


def open_socket(path: str) -> socket.socket:
    """Return a bound socket that its owner alone may connect to. What an earlier run left is
    replaced, what is alive is not. Raises ConfigError."""
    size = len(os.fsencode(path))
    if size > MAX_PATH:
        raise _wrong(
            path, f"has {size} octets, and a unix socket's path has {MAX_PATH} at most:"
                  " name a shorter one with --control PATH"
        )  # fmt: skip
    try:
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        _clear(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.bind(path)
            # Nobody gets in between: connecting is refused until listen() is called.
            os.chmod(path, 0o600)
        except BaseException:
            sock.close()
            raise
    except OSError as e:
        raise _wrong(path, f"cannot be made: {e.strerror or e}") from None
    sock.setblocking(False)
    return sock


def _clear(path: str) -> None:
    """Remove the socket of a run that is over."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise _wrong(path, "is there and is no socket; name another with --control PATH")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except TimeoutError:
            pass  # somebody is there, and busy
        except OSError as e:
            if e.errno != errno.EAGAIN:
                raise
    raise _wrong(path, "another kdns listens there; name another with --control PATH")


def _wrong(path: str, text: str) -> ConfigError:
    return ConfigError([Problem(path, 0, text)])


def fits(path: str) -> bool:
    """True if a socket may have this path."""
    return len(os.fsencode(os.path.abspath(path))) <= MAX_PATH


# --- clients ------------------------------------------------------------------------------


class NoControl(KdnsError):
    """The control socket does not answer; the text says which and why."""


class ControlClient:
    """Asks a running kdns. Blocking."""

    def __init__(self, path: str, timeout: float = CLIENT_TIMEOUT) -> None:
        self.path = path
        self._timeout = timeout

    def get(self, route: str) -> Any:
        """Return the JSON of a route such as /v1/status. Raises NoControl."""
        with self._asked(route) as response:
            return msgspec.json.decode(response.read())

    def stream(self, route: str = QUERIES) -> Iterator[str]:
        """Yield lines as they come, until the other side ends. Raises NoControl."""
        with self._asked(route) as response:
            while line := response.readline():
                yield line.decode("utf-8", "replace")

    @contextlib.contextmanager
    def _asked(self, route: str) -> Iterator[http.client.HTTPResponse]:
        from http.client import HTTPConnection, HTTPException, IncompleteRead

        connection = HTTPConnection("localhost")
        sock = connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(self._timeout)
            sock.connect(self.path)
            connection.request("GET", route)
            response = connection.getresponse()
            if response.status != 200:
                raise NoControl(f"{self.path}: {_error_in(response.read())}")
            if route == QUERIES:
                sock.settimeout(None)  # the next question may be long in coming
            yield response
        except IncompleteRead:
            return  # of a stream: it has ended
        except HTTPException as e:  # some are OSErrors as well
            why = f"what answers there is not kdns ({type(e).__name__})"
            raise NoControl(f"control socket {self.path}: {why}") from None
        except OSError as e:
            raise NoControl(f"control socket {self.path}: {_unreachable(e)}") from None
        except ValueError as e:
            raise NoControl(f"control socket {self.path}: {route}: {e}") from None
        finally:
            connection.close()


def _error_in(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return "what answers there is not kdns"


def _unreachable(error: OSError) -> str:
    match error:
        case FileNotFoundError():
            return "is not there: is kdns running?"
        case ConnectionRefusedError():
            return "nobody listens there: kdns has ended"
        case PermissionError():
            return "may be used by its owner alone: run this as the user kdns runs as, or root"
        case TimeoutError():
            return "kdns does not answer in time"
        case _:
            return error.strerror or str(error)


def find_control(explicit: str | None = "", environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the control socket to use: `explicit` (--control), else $KDNS_CONTROL, else the
    one that `kdns up` wrote into the current context of the kubeconfig, else that of the
    node's own kdns; None: none is there."""
    named = explicit or environ.get(ENVIRONMENT, "")
    if named:
        return named
    written = _in_kubeconfig(environ)
    for path in (written, NODE_SOCKET):
        if path and os.path.exists(path):
            return path
    return None


def _in_kubeconfig(environ: Mapping[str, str]) -> str:
    """Return what the current context's extension says, of the first file that has one."""
    listed = environ.get("KUBECONFIG") or os.path.join(
        environ.get("HOME") or os.path.expanduser("~"), ".kube", "config"
    )
    for path in filter(None, listed.split(os.pathsep)):
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if EXTENSION not in text:
            continue  # YAML is slow to import and to read
        found = control_in(text)
        if found:
            return found
    return ""


def control_in(text: str) -> str:
    """Return the control socket in the text of a kubeconfig: of its current context."""
    import yaml

    try:
        config = yaml.safe_load(text)
        current = config.get("current-context")
        context = next(one for one in config["contexts"] if one["name"] == current)["context"]
        extensions = context.get("extensions") or ()
        found = next(one for one in extensions if one["name"] == EXTENSION)["extension"]
        return str(found.get("control") or "")
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, StopIteration):
        return ""
