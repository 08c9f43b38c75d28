"""A kdns in this very process, listening on loopback, for tests that use real sockets."""

from __future__ import annotations

import asyncio
import random
import socket
from types import TracebackType

from kdns.app import App
from kdns.dns.message import Edns, Message, parse_message, render_query
from kdns.dns.name import parse_name
from kdns.dns.types import TYPES


def free_port() -> int:
    """Return a port of 127.0.0.1 that is free over UDP and TCP; below those the kernel hands
    out by itself, so that no other test is given it before kdns listens."""
    for port in random.sample(range(20000, 32000), 200):
        with socket.socket() as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            try:
                tcp.bind(("127.0.0.1", port))
                udp.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise AssertionError("no free port on 127.0.0.1")


class RunningKdns:
    """`async with RunningKdns(corefile_text) as kdns:` — use port 0 and `bind 127.0.0.1`."""

    def __init__(self, text: str | None = None, conf: str | None = None) -> None:
        self.app = App(conf, text=text, dns_port=0)
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> RunningKdns:
        started = asyncio.Event()
        self._task = asyncio.ensure_future(self.app.run(started.set))
        waiting = asyncio.ensure_future(started.wait())
        await asyncio.wait((self._task, waiting), return_when=asyncio.FIRST_COMPLETED)
        if not started.is_set():
            waiting.cancel()
            await self._task
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._task is not None
        self.app.stop()
        await self._task

    @property
    def port(self) -> int:
        return self.app.port()

    async def ask(
        self,
        name: str,
        qtype: str = "A",
        *,
        edns: Edns | None = None,
        qid: int = 4711,
        address: str = "127.0.0.1",
    ) -> Message:
        """Put one question over UDP and return the parsed answer."""
        wire = render_query(qid, parse_name(name), TYPES[qtype], edns=edns)
        return parse_message(await self.exchange(wire, address))

    async def exchange(self, wire: bytes, address: str = "127.0.0.1", timeout: float = 5) -> bytes:
        """Send octets over UDP and return the octets that come back. Raises TimeoutError."""
        loop = asyncio.get_running_loop()
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.connect((address, self.port))
            await loop.sock_sendall(sock, wire)
            async with asyncio.timeout(timeout):
                return await loop.sock_recv(sock, 65535)
