"""A Kubernetes API server for tests and benches: lists and watches, with faults on demand.

Holds objects as plain dicts and a history of what was done to them, so that a watch resumes
from any resourceVersion that was not compacted. `fault()` says what happens to one coming
request. Serves services, endpointslices, namespaces, pods, nodes and
serviceimports; read only over HTTP.

    python tests/api_replay.py --port 6443 [--objects FILE] [--services N]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import pathlib
import sys
import time
from bisect import bisect_right
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import msgspec
from aiohttp import web

from kdns.registry.selectors import Selector, parse_selector

Json = dict[str, Any]
GOLDEN = pathlib.Path(__file__).parent / "golden" / "cluster.json"

# resource -> (path of its group and version, apiVersion, kind)
RESOURCES: dict[str, tuple[str, str, str]] = {
    "services": ("/api/v1", "v1", "Service"),
    "namespaces": ("/api/v1", "v1", "Namespace"),
    "pods": ("/api/v1", "v1", "Pod"),
    "nodes": ("/api/v1", "v1", "Node"),
    "endpointslices": ("/apis/discovery.k8s.io/v1", "discovery.k8s.io/v1", "EndpointSlice"),
    "servicecidrs": ("/apis/networking.k8s.io/v1", "networking.k8s.io/v1", "ServiceCIDR"),
    "serviceimports": (
        "/apis/multicluster.x-k8s.io/v1alpha1",
        "multicluster.x-k8s.io/v1alpha1",
        "ServiceImport",
    ),
}
RESOURCE_OF = {kind: resource for resource, (_, _, kind) in RESOURCES.items()}
WRITE = 64 << 10  # octets of a watch written at one go, where no fault counts its events
END_OF_INITIAL = {"k8s.io/initial-events-end": "true"}


@dataclass
class Fault:
    """What happens to one request.

    status, body, headers -- answer this instead of 200
    raw       -- bytes sent into a watch after `after` events, or in place of a list
    cut       -- then close the connection in the middle
    end       -- then end the stream in order
    hang      -- then stay silent
    lost      -- the watch lost its place: an in-stream ERROR with code 410
    """

    status: int = 200
    body: Json | None = None
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes = b""
    after: int = 0
    cut: bool = False
    end: bool = False
    hang: bool = False
    lost: bool = False


@dataclass(frozen=True)
class Asked:
    """One request as it came in."""

    resource: str
    watch: bool
    params: dict[str, str]
    authorization: str = ""


class ApiReplay:
    """The server. `async with ApiReplay() as api:` listens on 127.0.0.1, a free port.

    watch_list -- "yes": sendInitialEvents is honoured; "refused": 422; "ignored": as a
                  server that never heard of it
    token      -- what "Authorization: Bearer" must hold; empty: anything
    bookmarks  -- seconds between bookmarks
    lacks      -- resources that it does not have: 404
    """

    def __init__(
        self,
        *,
        watch_list: str = "yes",
        token: str = "",
        bookmarks: float = 60.0,
        lacks: Collection[str] = (),
    ) -> None:
        self.lacks = lacks
        self.watch_list = watch_list
        self.token = token
        self.bookmarks = bookmarks
        self.version = 100
        self.oldest = 0  # watches from before this version get 410
        self.asked: list[Asked] = []
        self.open_watches = 0
        self.port = 0
        self.sent_at = 0.0  # when events of a watch last went out; of the monotonic clock
        self.silent = False  # watches that are open or come now never get another byte
        self._objects: dict[str, dict[tuple[str, str], Json]] = {r: {} for r in RESOURCES}
        self._history: dict[str, list[tuple[int, str, Json]]] = {r: [] for r in RESOURCES}
        self._faults: dict[tuple[str, str], list[Fault]] = {}
        self._lists: dict[str, tuple[str, list[Json]]] = {}  # continue token -> rest
        self._changed = asyncio.Condition()
        self._stopping = False
        self._runner: web.AppRunner | None = None

    # --- content ----------------------------------------------------------------------

    def load(self, objects: list[Json]) -> None:
        """Take over objects before the server starts; each keeps the version it has."""
        for obj in objects:
            resource = RESOURCE_OF.get(obj.get("kind", ""))
            if resource is None:
                continue
            version = int(obj["metadata"].get("resourceVersion", 0))
            self.version = max(self.version, version)
            self._objects[resource][_key(obj)] = obj

    async def put(self, obj: Json) -> None:
        """Add or change an object."""
        await self._write(obj, "")

    async def delete(self, obj: Json) -> None:
        await self._write(obj, "DELETED")

    async def _write(self, obj: Json, event: str) -> None:
        resource = RESOURCE_OF[obj["kind"]]
        held = self._objects[resource]
        self.version += 1
        meta = {**obj["metadata"], "resourceVersion": str(self.version)}
        obj = {"apiVersion": RESOURCES[resource][1], **obj, "metadata": meta}
        if event == "DELETED":
            held.pop(_key(obj))
        else:
            event = "MODIFIED" if _key(obj) in held else "ADDED"
            held[_key(obj)] = obj
        self._history[resource].append((self.version, event, obj))
        await self.wake()

    def forget(self) -> None:
        """Compact: what happened until now can no longer be watched."""
        self.version += 1
        self.oldest = self.version
        for history in self._history.values():
            history.clear()
        self._lists.clear()

    async def wake(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def fault(self, resource: str, verb: str, *faults: Fault) -> None:
        """Have the next requests for `resource` ("list" or "watch") meet these faults."""
        self._faults.setdefault((resource, verb), []).extend(faults)

    def watches(self, resource: str) -> list[Asked]:
        return [a for a in self.asked if a.watch and a.resource == resource]

    def lists(self, resource: str) -> list[Asked]:
        return [a for a in self.asked if not a.watch and a.resource == resource]

    # --- serving ----------------------------------------------------------------------

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> ApiReplay:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    async def start(self, host: str = "127.0.0.1", port: int = 0, tls: Any = None) -> None:
        app = web.Application()
        for resource, (prefix, _, _) in RESOURCES.items():
            if resource in self.lacks:
                continue
            app.router.add_get(f"{prefix}/{resource}", self._collection)
            app.router.add_get(f"{prefix}/namespaces/{{namespace}}/{resource}", self._collection)
            app.router.add_get(f"{prefix}/{resource}/{{name}}", self._one)
        app.router.add_get("/version", _version)
        self._stopping = False
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port, ssl_context=tls)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """End all watches and stop listening; start() with the same port goes on."""
        self._stopping = True
        await self.wake()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _one(self, request: web.Request) -> web.StreamResponse:
        """Answer a GET of one object without a namespace: kube-proxy asks so for its Node."""
        resource, name = request.path.split("/")[-2:]
        found = self._objects[resource].get(("", name))
        if found is None:
            return _refuse(404, "NotFound", f"{resource} {name!r} not found")
        _, api_version, kind = RESOURCES[resource]
        return web.json_response({"apiVersion": api_version, "kind": kind, **found})

    async def _collection(self, request: web.Request) -> web.StreamResponse:
        resource = request.path.rpartition("/")[2]
        params = dict(request.query)
        watch = params.get("watch") in ("true", "1")
        authorization = request.headers.get("Authorization", "")
        self.asked.append(Asked(resource, watch, params, authorization))
        waiting = self._faults.get((resource, "watch" if watch else "list"))
        fault = waiting.pop(0) if waiting else Fault()
        if fault.status != 200:
            body = fault.body or _status(fault.status, "Faulty", "a fault was asked for")
            return web.json_response(body, status=fault.status, headers=fault.headers)
        if self.token and authorization.lower() != f"bearer {self.token}".lower():
            return _refuse(401, "Unauthorized", "Unauthorized")
        wanted = _Wanted(request, params)
        if watch:
            return await self._watch(request, resource, wanted, params, fault)
        return await self._list(request, resource, wanted, params, fault)

    async def _list(
        self, request: web.Request, resource: str, wanted: _Wanted, params: Json, fault: Fault
    ) -> web.StreamResponse:
        if fault.hang:
            await self._until_stopped()
        if fault.raw or fault.cut:
            response = web.StreamResponse(headers={"Content-Type": "application/json"})
            await response.prepare(request)
            await response.write(fault.raw or b'{"kind":')
            if fault.cut and request.transport is not None:
                request.transport.abort()
            return response
        token = params.get("continue", "")
        if token:
            if token not in self._lists:
                return _refuse(410, "Expired", "The provided continue parameter is too old")
            version, items = self._lists.pop(token)
        else:
            version = str(self.version)
            items = [o for o in self._objects[resource].values() if wanted.has(o)]
        limit = int(params.get("limit", 0)) or len(items)
        # Served from the watch cache a list is whole, whatever the limit.
        if params.get("resourceVersion") == "0":
            limit = len(items)
        meta = {"resourceVersion": version}
        if items[limit:]:
            token = f"{resource}-{version}-{len(items) - limit}"
            self._lists[token] = (version, items[limit:])
            meta["continue"] = token
        _, api_version, kind = RESOURCES[resource]
        body = msgspec.json.encode(
            {
                "kind": f"{kind}List",
                "apiVersion": api_version,
                "metadata": meta,
                "items": [{k: v for k, v in o.items() if k not in ("kind", "apiVersion")}
                          for o in items[:limit]],
            }
        )  # fmt: skip
        return web.Response(body=body, content_type="application/json")

    async def _watch(
        self, request: web.Request, resource: str, wanted: _Wanted, params: Json, fault: Fault
    ) -> web.StreamResponse:
        initial = params.get("sendInitialEvents") == "true"
        if initial and self.watch_list == "refused":
            return _refuse(422, "Invalid", "sendInitialEvents: Forbidden: is forbidden for watch")
        asked = params.get("resourceVersion", "")
        start = int(asked) if asked.isdecimal() else 0
        if start and start < self.oldest:
            return _refuse(410, "Expired", f"too old resource version: {start} ({self.oldest})")
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        self.open_watches += 1
        try:
            stream = self._events(resource, wanted, start, initial and self.watch_list == "yes")
            await self._stream(request, response, resource, stream, params, fault)
        except ConnectionError:
            pass  # the client left
        finally:
            self.open_watches -= 1
        return response

    def _events(
        self, resource: str, wanted: _Wanted, start: int, mark_end: bool
    ) -> Iterator[Json | None]:
        """Yield watch events; None where there is none for now."""
        position = start
        if not start:
            position = self.version
            for obj in list(self._objects[resource].values()):
                if wanted.has(obj):
                    yield {"type": "ADDED", "object": obj}
            if mark_end:
                yield self._bookmark(resource, END_OF_INITIAL)
        while True:
            if position < self.oldest:
                yield _lost(position, self.oldest)
                return
            history = self._history[resource]
            for version, event, obj in history[bisect_right(history, position, key=_version_of) :]:
                position = version
                if wanted.has(obj):
                    yield {"type": event, "object": obj}
            yield None

    async def _stream(
        self,
        request: web.Request,
        response: web.StreamResponse,
        resource: str,
        stream: Iterator[Json | None],
        params: Json,
        fault: Fault,
    ) -> None:
        loop = asyncio.get_running_loop()
        ends = loop.time() + float(params.get("timeoutSeconds", 3600))
        bookmark = loop.time() + self.bookmarks
        sent = 0
        while not self._stopping:
            if fault != Fault() and sent >= fault.after:
                await response.write(fault.raw)
                if fault.lost:
                    await response.write(_line(_lost(0, self.version)))
                if fault.cut and request.transport is not None:
                    request.transport.abort()
                if fault.hang:
                    await self._until_stopped()
                if fault.cut or fault.end or fault.lost or fault.hang:
                    return
                fault = Fault()
            if self.silent:
                await self._until_stopped()
                return
            event = next(stream, _END)
            if event is _END or loop.time() >= ends:
                return
            if event is not None:
                sent += 1
                held = _line(event)
                while fault == Fault() and len(held) < WRITE:
                    event = next(stream, _END)
                    if event is None or event is _END:
                        break
                    held += _line(event)
                self.sent_at = time.monotonic()
                await response.write(held)
                if event is _END:
                    return
                if event is not None:
                    continue
            async with self._changed:
                try:
                    async with asyncio.timeout(max(0.001, min(ends, bookmark) - loop.time())):
                        await self._changed.wait()
                except TimeoutError:
                    pass
            if loop.time() >= bookmark and params.get("allowWatchBookmarks") == "true":
                bookmark = loop.time() + self.bookmarks
                await response.write(_line(self._bookmark(resource, {})))

    async def _until_stopped(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._stopping)

    def _bookmark(self, resource: str, annotations: dict[str, str]) -> Json:
        _, api_version, kind = RESOURCES[resource]
        meta: Json = {"resourceVersion": str(self.version)}
        if annotations:
            meta["annotations"] = annotations
        return {
            "type": "BOOKMARK",
            "object": {"kind": kind, "apiVersion": api_version, "metadata": meta},
        }


_END: Json = {}


class _Wanted:
    """Which objects a request selects."""

    def __init__(self, request: web.Request, params: dict[str, str]) -> None:
        self.namespace = request.match_info.get("namespace")
        self.labels: Selector = parse_selector(params.get("labelSelector", ""))
        self.fields = [
            term.replace("!=", "=!").split("=", 1)
            for term in params.get("fieldSelector", "").split(",")
            if term
        ]

    def has(self, obj: Json) -> bool:
        meta = obj["metadata"]
        if self.namespace is not None and meta.get("namespace") != self.namespace:
            return False
        if not self.labels.matches(meta.get("labels") or {}):
            return False
        for path, value in self.fields:
            found: Any = obj
            for part in path.split("."):
                found = found.get(part, "") if isinstance(found, dict) else ""
            if (found == value.lstrip("!")) is value.startswith("!"):
                return False
        return True


def _version_of(entry: tuple[int, str, Json]) -> int:
    return entry[0]


def _key(obj: Json) -> tuple[str, str]:
    return obj["metadata"].get("namespace", ""), obj["metadata"]["name"]


def _line(event: Json) -> bytes:
    return msgspec.json.encode(event) + b"\n"


def _status(code: int, reason: str, message: str) -> Json:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "code": code,
        "reason": reason,
        "message": message,
    }


def _refuse(code: int, reason: str, message: str) -> web.Response:
    return web.json_response(_status(code, reason, message), status=code)


def _lost(version: int, oldest: int) -> Json:
    message = f"too old resource version: {version} ({oldest})"
    return {"type": "ERROR", "object": _status(410, "Expired", message)}


async def _version(request: web.Request) -> web.Response:
    return web.json_response({"major": "1", "minor": "34", "gitVersion": "v1.34.0"})


def golden() -> list[Json]:
    """Return the objects of the recorded cluster."""
    return list(json.loads(GOLDEN.read_text())["items"])


def many_pods(count: int) -> Iterator[Json]:
    """Yield `count` Pods, five hundred a namespace, with the addresses of the first endpoints of
    many_services()."""
    for n in range(count):
        namespace, ip = f"bench-{n // 500}", f"10.{244 + (n >> 16)}.{n >> 8 & 255}.{n & 255}"
        yield {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": f"svc-{n // 5}-{n % 5}-abcde",
                "namespace": namespace,
                "labels": {"app": f"svc-{n // 5}", "pod-template-hash": "5d8f7c6b9"},
            },
            "spec": {"nodeName": f"node-{n % 500}", "containers": [{"name": "web"}]},
            "status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}]},
        }


def many_services(count: int, endpoints: int = 2) -> Iterator[Json]:
    """Yield `count` Services over namespaces of a hundred, each with a slice of `endpoints`.

    Addresses are unique up to 65,536 endpoints, all in 10.244.0.0/16 and port 8080; Services
    have the ClusterIPs from 10.96.0.0 on, port 80.
    """
    for n in range(count):
        namespace, name = f"bench-{n // 100}", f"svc-{n}"
        if n % 100 == 0:
            yield {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}
        meta = {"name": name, "namespace": namespace}
        ip = f"10.{96 + (n >> 16)}.{n >> 8 & 255}.{n & 255}"
        yield {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": meta,
            "spec": {
                "type": "ClusterIP",
                "clusterIP": ip,
                "clusterIPs": [ip],
                "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080}],
                "selector": {"app": name},
            },
        }
        yield {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": f"{name}-1",
                "namespace": namespace,
                "labels": {"kubernetes.io/service-name": name},
            },
            "addressType": "IPv4",
            "endpoints": [
                {
                    "addresses": [f"10.{244 + (k >> 16)}.{k >> 8 & 255}.{k & 255}"],
                    "conditions": {"ready": True, "serving": True, "terminating": False},
                }
                for k in range(n * endpoints, (n + 1) * endpoints)
            ],
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        }


async def _serve(options: argparse.Namespace) -> None:
    api = ApiReplay(watch_list=options.watch_list)
    if options.objects:
        api.load(json.loads(pathlib.Path(options.objects).read_text())["items"])
    api.load(list(many_services(options.services)))
    await api.start(port=options.port)
    print(api.url, flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        await api.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description="Serve list and watch of recorded objects.")
    parser.add_argument("--objects", metavar="FILE", help="a JSON List; see golden/cluster.json")
    parser.add_argument("--services", type=int, default=0, help="Services to make up")
    parser.add_argument("--port", type=int, default=0, help="0: a free one; it is printed")
    parser.add_argument("--watch-list", choices=("yes", "refused", "ignored"), default="yes")
    try:
        asyncio.run(_serve(parser.parse_args()))
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
