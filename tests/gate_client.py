"""Clients that resolve and connect at once, and count what they are refused: for tests/ and
bench/.

    python gate_client.py SCENARIO --api http://127.0.0.1:PORT --dns PORT [--count N] ...

Runs in the network namespace of a `kdns up --proxy-mode ...`, in which every Pod address is the
namespace's own, so that one listener stands for all endpoints; an address that is dead answers
with a reset. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import json
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

PORT = 8080
LOOK = 0.005  # seconds between two questions for a name that is waited for
PROBE = 0.25  # and an attempt beside it, once it has taken that long
CONNECT = 2.0  # seconds that a connection may take
GIVE_UP = 60.0
PAUSE = 0.1  # between Services that come one by one
RESET = struct.pack("ii", 1, 0)


class Api:
    """Requests to the embedded API, a few at a time."""

    def __init__(self, url: str, links: int = 4) -> None:
        place = urlsplit(url)
        self._at = (place.hostname or "", place.port or 0)
        self._free: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter] | None]
        self._free = asyncio.Queue()
        for _ in range(links):
            self._free.put_nowait(None)

    async def ask(self, method: str, path: str, body: Any = None, kind: str = "json") -> Any:
        link = await self._free.get()
        if link is None:
            link = await asyncio.open_connection(*self._at)
        try:
            return await self._exchange(link, method, path, body, kind)
        finally:
            self._free.put_nowait(link)

    async def _exchange(self, link: Any, method: str, path: str, body: Any, kind: str) -> Any:
        reader, writer = link
        sent = b"" if body is None else json.dumps(body).encode()
        writer.write(
            f"{method} {path} HTTP/1.1\r\nHost: {self._at[0]}\r\n"
            f"Content-Type: application/{kind}\r\nContent-Length: {len(sent)}\r\n\r\n".encode()
            + sent
        )
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next(
            int(line.partition(":")[2])
            for line in head.splitlines()
            if line.lower().startswith("content-length:")
        )
        answer = json.loads(await reader.readexactly(length))
        if int(head.split()[1]) >= 300:
            raise RuntimeError(f"{method} {path}: {answer.get('message')}")
        return answer

    async def create(self, plural: str, obj: dict[str, Any], group: str = "api/v1") -> Any:
        return await self.ask("POST", f"/{group}/namespaces/default/{plural}", obj)

    async def delete(self, plural: str, name: str, group: str = "api/v1") -> Any:
        return await self.ask("DELETE", f"/{group}/namespaces/default/{plural}/{name}")

    async def merge(
        self, plural: str, name: str, change: dict[str, Any], group: str = "api/v1"
    ) -> Any:
        path = f"/{group}/namespaces/default/{plural}/{name}"
        return await self.ask("PATCH", path, change, "merge-patch+json")


class Dns(asyncio.DatagramProtocol):
    """A stub resolver that remembers nothing."""

    def __init__(self) -> None:
        self._waiting: dict[int, asyncio.Future[list[str] | None]] = {}
        self._next = 0
        self._transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        future = self._waiting.pop(int.from_bytes(data[:2], "big"), None)
        if future is not None and not future.done():
            future.set_result(_addresses(data))

    async def resolve(self, name: str) -> list[str] | None:
        """Return the A records of a name; None: there is no such name. Raises TimeoutError."""
        self._next = number = (self._next + 1) & 0xFFFF
        labels = b"".join(bytes((len(x),)) + x.encode() for x in name.strip(".").split("."))
        query = struct.pack("!HHHHHH", number, 0x0100, 1, 0, 0, 0) + labels + b"\0\0\1\0\1"
        future: asyncio.Future[list[str] | None] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        self._transport.sendto(query)
        async with asyncio.timeout(5):
            return await future


def _addresses(data: bytes) -> list[str] | None:
    rcode, answers = data[3] & 15, int.from_bytes(data[6:8], "big")
    if rcode:
        return None
    at = data.index(b"\0", 12) + 5
    found = []
    for _ in range(answers):
        at = at + 2 if data[at] >= 0xC0 else data.index(b"\0", at) + 1
        rtype, _, _, size = struct.unpack_from("!HHIH", data, at)
        if rtype == 1:
            found.append(str(ipaddress.ip_address(data[at + 10 : at + 14])))
        at += 10 + size
    return found


class Pods:
    """All endpoints at once. dead -- addresses that are no Pod's any more"""

    def __init__(self) -> None:
        self.dead: set[str] = set()
        self.served: dict[str, int] = {}

    def meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sock = writer.get_extra_info("socket")
        here = writer.get_extra_info("sockname")[0]
        if here in self.dead:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        else:
            self.served[here] = self.served.get(here, 0) + 1
            writer.write(here.encode() + b"\n")
        writer.close()


class Site:
    def __init__(self, api: Api, dns: Dns, pods: Pods) -> None:
        self.api, self.dns, self.pods = api, dns, pods
        self.clients: set[asyncio.Task[None]] = set()  # under way

    async def met(self) -> None:
        """Wait until the clients that have begun by now are done: on a busy machine they take
        as long as they like, and what they were told was true then."""
        if self.clients:
            await asyncio.wait(self.clients.copy())

    async def connects(self, address: str, seconds: float = CONNECT) -> str:
        """Return "" if an endpoint answers, or what happened instead."""
        try:
            async with asyncio.timeout(seconds):
                reader, writer = await asyncio.open_connection(address, PORT)
                try:
                    said = await reader.readline()
                finally:
                    sock = writer.get_extra_info("socket")
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                    writer.close()
                return "" if said else "closed"
        except OSError as e:
            return type(e).__name__

    async def reaches(self, address: str) -> str:
        """Return what became of the first connection, as soon as any gets through: one that was
        lost does not, however often its first packet is sent again."""
        first = asyncio.create_task(self.connects(address))
        await asyncio.wait((first,), timeout=PROBE)
        if first.done() and not first.result():
            return ""
        end = time.monotonic() + GIVE_UP
        while await self.connects(address, PROBE):
            if time.monotonic() > end:
                raise TimeoutError(f"{address} is not reached in {GIVE_UP:g} s")
            await asyncio.sleep(LOOK)
        if first.done():
            return first.result()
        first.cancel()
        return "lost"

    async def appears(self, name: str, look: float = LOOK) -> str:
        """Return a name's address as soon as it has one."""
        end = time.monotonic() + GIVE_UP
        while time.monotonic() < end:
            found = await self.dns.resolve(full(name))
            if found:
                return found[0]
            await asyncio.sleep(look)
        raise TimeoutError(f"{name} does not resolve in {GIVE_UP:g} s")

    async def deploy(self, replicas: int = 3) -> None:
        """Have Pods, ready."""
        for number in range(replicas):
            await self.api.create("pods", {
                "metadata": {"name": f"pod-{number}", "labels": {"app": "web"}},
                "spec": {"containers": [{"name": "c", "image": "x"}]},
            })  # fmt: skip
        end = time.monotonic() + GIVE_UP
        while time.monotonic() < end:
            listed = await self.api.ask("GET", "/api/v1/namespaces/default/pods")
            if all(ready(one) for one in listed["items"]):
                return
            await asyncio.sleep(0.02)
        raise TimeoutError("the Pods are not ready")


def ready(pod: Any) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True"
               for c in pod.get("status", {}).get("conditions", ()))  # fmt: skip


def full(name: str) -> str:
    return f"{name}.default.svc.cluster.local"


def service(name: str, **spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": name},
            "spec": {"selector": {"app": "web"}, "ports": [{"port": PORT}], **spec}}  # fmt: skip


def slice_of(name: str, numbers: list[int]) -> dict[str, Any]:
    return {
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": f"{name}-1", "labels": {"kubernetes.io/service-name": name}},
        "ports": [{"port": PORT}],
        "endpoints": [{"addresses": [f"10.244.9.{n}"], "conditions": {"ready": True}}
                      for n in numbers],
    }  # fmt: skip


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "p50": round(ordered[len(ordered) // 2], 1),
        "p99": round(ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)], 1),
        "max": round(ordered[-1], 1),
    }


# --- scenarios ------------------------------------------------------------------------------


async def create(site: Site, count: int, at_once: int) -> dict[str, Any]:
    """Services are created; each is resolved until it has a name, and connected to at once."""
    await site.deploy()
    turns = asyncio.Semaphore(at_once)
    failed: list[str] = []
    named: list[float] = []
    reached: list[float] = []

    async def one(number: int) -> None:
        name = f"s-{number}"
        async with turns:
            await site.api.create("services", service(name))
            began = time.monotonic()
            address = await site.appears(name)
            named.append((time.monotonic() - began) * 1000)
            why = await site.reaches(address)
            if why:
                failed.append(f"{name}: {why}")
            reached.append((time.monotonic() - began) * 1000)
            if at_once == 1:
                await asyncio.sleep(PAUSE)

    await asyncio.gather(*(one(number) for number in range(count)))
    return {"count": count, "failed": len(failed), "why": failed[:3],
            "named_ms": spread(named), "reachable_ms": spread(reached)}  # fmt: skip


async def burst(site: Site, count: int, at_once: int) -> dict[str, Any]:
    """All Services are created as fast as the API takes them; when have all a name?"""
    await site.deploy()
    began = time.monotonic()
    last: list[float] = []
    failed: list[str] = []
    late: list[float] = []

    async def one(number: int) -> None:
        name = f"s-{number}"
        await asyncio.sleep(number / count)  # all within a second
        await site.api.create("services", service(name))
        created = time.monotonic()
        last.append(created)
        address = await site.appears(name, 0.05)
        late.append((time.monotonic() - created) * 1000)
        why = await site.connects(address)
        if why:
            failed.append(f"{name}: {why}")

    await asyncio.gather(*(one(number) for number in range(count)))
    return {"count": count, "created_s": round(max(last) - began, 2), "failed": len(failed),
            "why": failed[:3], "named_ms": spread(late)}  # fmt: skip


@contextlib.asynccontextmanager
async def connecting(
    site: Site, rate: int, where: Callable[[], Awaitable[str | None]]
) -> AsyncIterator[dict[str, Any]]:
    """Have clients come at `rate` a second; each asks for an address and connects to it at once.

    where -- returns the address; None: no name, which is no failure
    """
    tally: dict[str, Any] = {"connections": 0, "unnamed": 0, "failed": 0, "why": []}
    clients = site.clients

    async def client() -> None:
        address = await where()
        if address is None:
            tally["unnamed"] += 1
            return
        why = await site.connects(address)
        tally["connections"] += 1
        if why:
            tally["failed"] += 1
            tally["why"] = [*tally["why"], f"{address}: {why}"][:3]

    async def arrive() -> None:
        due = time.monotonic()
        while True:
            due += 1 / rate
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            task = asyncio.create_task(client())
            clients.add(task)
            task.add_done_callback(clients.discard)

    arriving = asyncio.create_task(arrive())
    try:
        yield tally
    finally:
        arriving.cancel()
        await site.met()


def by_name(site: Site, name: str = "web") -> Callable[[], Awaitable[str | None]]:
    async def where() -> str | None:
        found = await site.dns.resolve(full(name))
        return found[time.monotonic_ns() // 1000 % len(found)] if found else None

    return where


async def churn(site: Site, count: int, at_once: int) -> dict[str, Any]:
    """Endpoints are replaced under load, and those that left are dead for who comes half a second
    later, for a Service with a ClusterIP and for a headless one."""
    alive = [1, 2, 3]
    group = "apis/discovery.k8s.io/v1"
    for name, more in (("web", {}), ("bare", {"clusterIP": "None"})):
        await site.api.create("endpointslices", slice_of(name, alive), group)
        await site.api.create("services", service(name, selector=None, **more))
        await site.appears(name)
    async with (
        connecting(site, at_once, by_name(site)) as cluster_ip,
        connecting(site, at_once, by_name(site, "bare")) as headless,
    ):
        for number in range(4, 4 + count):
            gone, alive = alive[0], [*alive[1:], number]
            for name in ("web", "bare"):
                change = {"endpoints": slice_of(name, alive)["endpoints"]}
                await site.api.merge("endpointslices", f"{name}-1", change, group)
            await asyncio.sleep(0.5)
            await site.met()
            site.pods.dead.add(f"10.244.9.{gone}")
    return {"cluster_ip": cluster_ip, "headless": headless, "endpoints": len(site.pods.served)}


async def leave(site: Site, count: int, at_once: int) -> dict[str, Any]:
    """A Service is deleted while clients resolve and connect; who looked it up a moment before
    still gets there."""
    await site.deploy()
    await site.api.create("services", service("web"))
    address = await site.appears("web")

    async def remembered() -> str | None:
        return address

    async with (
        connecting(site, at_once, by_name(site)) as tally,
        connecting(site, at_once, remembered) as old,
    ):
        await asyncio.sleep(1)
        await site.api.delete("services", "web")
        gone = await site.dns.resolve(full("web")) is None
        await asyncio.sleep(2)
    return {**tally, "gone_at_once": gone, "remembered": old}


async def change(site: Site, count: int, at_once: int) -> dict[str, Any]:
    """A Service becomes headless, another's name, and has a ClusterIP again, under load."""
    await site.deploy()
    await site.api.create("services", service("web"))
    await site.api.create("services", service("other"))
    await site.appears("web")
    await site.appears("other")
    kinds = [
        service("web", clusterIP="None"),
        {"metadata": {"name": "web"},
         "spec": {"type": "ExternalName", "externalName": full("other")}},
        service("web"),
    ]  # fmt: skip
    seen = set()
    async with connecting(site, at_once, by_name(site)) as tally:
        for _ in range(count):
            for kind in kinds:
                await asyncio.sleep(0.4)
                await site.api.delete("services", "web")
                await site.api.create("services", kind)
                seen.add(await site.appears("web"))
        await asyncio.sleep(0.4)
    return {**tally, "addresses": len(seen)}


SCENARIOS = {one.__name__: one for one in (create, burst, churn, leave, change)}


async def main(arguments: argparse.Namespace) -> None:
    pods = Pods()
    server = await asyncio.start_server(pods.meet, "0.0.0.0", PORT, backlog=1024)
    loop = asyncio.get_running_loop()
    _, dns = await loop.create_datagram_endpoint(Dns, remote_addr=("127.0.0.1", arguments.dns))
    site = Site(Api(arguments.api), dns, pods)
    found = await SCENARIOS[arguments.scenario](site, arguments.count, arguments.at_once)
    server.close()
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("--api", required=True)
    parser.add_argument("--dns", type=int, required=True)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=50)
    asyncio.run(main(parser.parse_args()))
