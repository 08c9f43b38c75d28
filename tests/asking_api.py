"""The embedded API of one test, on loopback, and a client that says what it asks."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any

import aiohttp

from kdns.api.allocate import Allocator
from kdns.api.http import ApiServer
from kdns.api.kinds import BY_PLURAL
from kdns.api.objects import Objects
from kdns.api.store import ObjectStore
from kdns.metrics import Metrics

Obj = dict[str, Any]
SERVICES = "/api/v1/namespaces/default/services"
TOKEN = "letmein"


class Answer:
    """One answer, read whole."""

    def __init__(self, code: int, headers: Any, body: bytes) -> None:
        self.code, self.headers, self.body = code, headers, body

    @property
    def obj(self) -> Any:
        return json.loads(self.body)

    @property
    def reason(self) -> str:
        """The reason of a refusal."""
        return str(self.obj["reason"])

    @property
    def text(self) -> str:
        """The message of a refusal."""
        return str(self.obj["message"])

    @property
    def names(self) -> list[str]:
        return [item["metadata"]["name"] for item in self.obj["items"]]


class Api:
    """A server with its objects, and requests to it."""

    def __init__(self, store: ObjectStore, **options: Any) -> None:
        self.store = store
        self.objects = Objects(store, Allocator())
        self.server = ApiServer(self.objects, Metrics(), token=TOKEN, **options)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}"

    async def __aenter__(self) -> Api:
        await self.store.open()
        await self.objects.create(BY_PLURAL["", "namespaces"], "", named("default"))
        await self.server.start()
        self._session = aiohttp.ClientSession(headers={"Authorization": f"Bearer {TOKEN}"})
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._session.close()
        await self.server.stop()
        await self.store.close()

    async def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        kind: str = "application/json",
        headers: dict[str, str] | None = None,
    ) -> Answer:
        """Send one request; a body that is no bytes goes as JSON."""
        sent = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        said = {"Content-Type": kind} if sent is not None else {}
        async with self._session.request(
            method, self.url + path, data=sent, headers={**said, **(headers or {})}
        ) as answer:
            return Answer(answer.status, answer.headers, await answer.read())

    async def get(self, path: str, **headers: str) -> Answer:
        return await self.ask("GET", path, headers=headers)

    async def create(self, obj: Obj, path: str = SERVICES) -> Answer:
        return await self.ask("POST", path, obj)

    @asynccontextmanager
    async def watch(self, query: str, path: str = SERVICES, **headers: str) -> AsyncIterator[Lines]:
        """Open a watch."""
        url = f"{self.url}{path}?watch=true&{query}"
        timeout = aiohttp.ClientTimeout(total=None, sock_read=20)
        async with self._session.get(url, headers=headers, timeout=timeout) as answer:
            yield Lines(answer)


class Lines:
    """The events of a watch."""

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self.answer = answer

    async def next(self) -> tuple[str, Obj]:
        """Return the next event's type and object."""
        line = await self.answer.content.readline()
        if not line:
            raise EOFError("the watch has ended")
        event = json.loads(line)
        return event["type"], event["object"]

    async def seen(self, count: int) -> list[tuple[str, str]]:
        """Return the types and names of the next events."""
        found = []
        for _ in range(count):
            kind, obj = await self.next()
            found.append((kind, obj["metadata"]["name"]))
        return found

    async def ended(self) -> bool:
        return await self.answer.content.readline() == b""


def named(name: str, **members: Any) -> Obj:
    return {"metadata": {"name": name}, **members}


def service(name: str, *ports: int, labels: dict[str, str] | None = None, **spec: Any) -> Obj:
    """A Service as somebody writes it."""
    listed = [{"port": p, **({"name": f"p{p}"} if len(ports) > 1 else {})} for p in ports or (80,)]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, **({"labels": labels} if labels else {})},
        "spec": {"ports": listed, **spec},
    }
