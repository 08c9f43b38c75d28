"""TLS for what a listener accepts, bounded from then on: in number, time and memory.

Decides which handshake goes when all places are taken, and when memory is given back. What is
said over TLS is server/tcp.py's and server/http.py's.
"""

from __future__ import annotations

import asyncio
import ssl
from asyncio import sslproto
from collections.abc import Callable
from typing import Any, cast

from kdns.metrics import Cell
from kdns.runtime import give_back_memory

HANDSHAKE = 5.0  # seconds; a round trip or two and a millisecond of work are enough
CLOSE = 5.0  # that a peer has to agree to the end of TLS (close_notify)
RECORD = 4 << 10  # octets of TLS read at a time; questions are shorter
# TLS connections that are worth giving their memory back when most of them have gone, and the
# seconds until then.
MANY, SETTLE = 200, 5.0


class Handshakes:
    """TLS for what one listening socket accepts. A connection counts from then on: the oldest
    unfinished handshake goes when another comes and all places are taken.

    app   -- makes the protocol that talks over TLS; it calls end() when it is connected
    limit -- connections, those with a finished handshake (`taken`) among them. A tenth is let in
             beyond it, so that a handshake has time to finish where all are taken.
    """

    def __init__(
        self,
        context: ssl.SSLContext,
        app: Callable[[], asyncio.BaseProtocol],
        limit: int,
        taken: Callable[[], int],
        rejected: Cell | None = None,
    ) -> None:
        self.context = context
        self._app = app
        self._limit = limit
        self._taken = taken
        self._rejected = rejected
        self._under_way: dict[asyncio.BaseProtocol, asyncio.Transport] = {}
        self._open = self._most = 0
        self._settling: asyncio.TimerHandle | None = None

    def protocol(self) -> asyncio.BaseProtocol:
        """For loop.create_server, which is not to know of TLS: it would tell us of a connection
        when the handshake is over."""
        return _Tls(self, self._app())

    def begin(self, app: asyncio.BaseProtocol, transport: asyncio.Transport) -> None:
        """Count a connection just accepted."""
        places = max(self._limit - self._taken(), self._limit // 10, 1)
        while len(self._under_way) >= places:
            self._under_way.pop(next(iter(self._under_way))).abort()
            if self._rejected is not None:
                self._rejected.add()
        self._under_way[app] = transport
        self._open += 1
        self._most = max(self._most, self._open)

    def lost(self) -> None:
        """Count one connection less that takes memory."""
        self._open -= 1
        if self._settling is None and self._most >= MANY and self._open * 2 < self._most:
            loop = asyncio.get_running_loop()
            self._settling = loop.call_later(SETTLE, self._settle)

    def _settle(self) -> None:
        self._settling = None
        if self._open * 2 < self._most:
            self._most = self._open
            give_back_memory()

    def end(self, app: asyncio.BaseProtocol) -> None:
        """Count it no more: its handshake is finished, or the connection gone."""
        self._under_way.pop(app, None)

    def close(self) -> None:
        """Close all connections in a handshake at once."""
        if self._settling is not None:
            self._settling.cancel()
        for transport in self._under_way.values():
            transport.abort()
        self._under_way.clear()


class _Tls(sslproto.SSLProtocol):
    """asyncio's TLS, counted, with a small buffer."""

    # asyncio keeps 256 KiB for each connection, filled or not, and has no public way to ask for
    # less. In a class of our own it changes no other TLS of the process, and a Python that does
    # not look at it only takes more memory. The octets go from here to OpenSSL at once, so less
    # of it costs calls, and never what is in them.
    max_size = RECORD

    def __init__(self, handshakes: Handshakes, app: Any) -> None:
        waiter: Any = None
        limits: Any = {"ssl_handshake_timeout": HANDSHAKE, "ssl_shutdown_timeout": CLOSE}
        loop = asyncio.get_running_loop()
        super().__init__(loop, app, handshakes.context, waiter, server_side=True, **limits)
        self._handshakes = handshakes
        self._app = app
        self._accepted: asyncio.BaseTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._accepted = transport
        self._handshakes.begin(self._app, cast("asyncio.Transport", transport))
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._handshakes.end(self._app)
        super().connection_lost(exc)
        if exc is not None:
            # A failed handshake's error holds the frame it was raised in, which holds both.
            exc.__traceback__ = None
        forget(self._accepted)
        self._handshakes.lost()
        self._app = self._accepted = None


def forget(transport: Any) -> None:
    """Let go of the transport of a connection that is lost: asyncio's for plain TCP hold a
    method of their own. Without this only the garbage collector would end them, which looks at
    what is old seldom (kdns/runtime.py)."""
    if hasattr(transport, "_read_ready_cb"):
        transport._read_ready_cb = None
