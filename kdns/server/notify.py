"""Sends NOTIFY to secondaries (RFC 1996): over UDP, again while nobody answers, and not for ever.

Decides when a NOTIFY is sent again, which datagram answers it, and how many are under way. Who is
told of what, and what is said of it in the log, is the `transfer` plugin's (plugin.Notify).
By call-back: no task per notice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Sequence

from kdns.dns import types as t
from kdns.dns.message import AA, OPCODE, QR, Message, parse_message, render_query
from kdns.errors import WireError, reason_of
from kdns.plugins.plugin import Notice, Notify

log = logging.getLogger("kdns")

# Seconds that an answer is waited for, each time that a NOTIFY is sent. RFC 1996 s3.6: at most
# five retransmissions, and it is reasonable to wait longer from one to the next.
PAUSES: Sequence[float] = (2.0, 4.0, 8.0, 16.0, 32.0, 60.0)
# Notices under way to one secondary, others wait. Each has its own, so that one which is down
# does not hold up what others are told; how many secondaries there are is up to the Corefile.
WINDOW = 32
# An answer repeats the question and is no longer than that, but for an OPT record.
MAX_ANSWER = 4096
# Datagrams read before others get their turn.
AT_ONCE = 2 * WINDOW

_NOTIFY = t.NOTIFY << 11

Done = Callable[[Notice, str], None]


class Notifier:
    """Carries out the Notify work of one site at a time."""

    def __init__(self) -> None:
        self._work: list[Notify] = []
        self._secondaries: dict[tuple[tuple[str, int], str], _Secondary] = {}
        self._later: set[asyncio.TimerHandle] = set()

    def begin(self, work: Sequence[Notify]) -> None:
        """Carry out the work of a site, and no longer that of the one before: its secondaries
        may not be those of the Corefile any more, and this one begins with telling all."""
        self.close()
        self._work = list(work)
        self.look()

    def look(self, after: float = 0.0) -> None:
        """Send what is due now; after -- seconds to wait before."""
        for item in self._work:
            try:
                notices = item.due()
            except Exception:
                log.exception("a bug in kdns in finding whom to notify; it goes on")
                continue
            if not notices:
                continue
            if after > 0:
                self._tell_later(after, notices, item.done)
            else:
                self._tell(notices, item.done)

    def close(self) -> None:
        """Give up what is under way."""
        for timer in self._later:
            timer.cancel()
        self._later.clear()
        for secondary in self._secondaries.values():
            secondary.close()
        self._secondaries.clear()
        self._work = []

    def _tell_later(self, after: float, notices: Sequence[Notice], done: Done) -> None:
        def tell() -> None:
            self._later.discard(timer)
            self._tell(notices, done)

        timer = asyncio.get_running_loop().call_later(after, tell)
        self._later.add(timer)

    def _tell(self, notices: Sequence[Notice], done: Done) -> None:
        for notice in notices:
            place = notice.to, notice.source
            secondary = self._secondaries.get(place)
            if secondary is None:
                secondary = self._secondaries[place] = _Secondary(*place)
            secondary.add(notice, done)


class _Flight:
    """One notice under way. why -- what went wrong when it was last sent"""

    __slots__ = ("done", "id", "notice", "timer", "tries", "why")

    def __init__(self, id: int, notice: Notice, done: Done) -> None:
        self.id = id
        self.notice = notice
        self.done = done
        self.tries = 0
        self.why = ""
        self.timer: asyncio.TimerHandle | None = None


class _Secondary:
    """One secondary: what it is to be told, by zone, and the socket while there is something.

    A zone is in one of _waiting and _under_way at most.
    """

    def __init__(self, to: tuple[str, int], source: str) -> None:
        self._to = to
        self._source = source
        self._loop = asyncio.get_running_loop()
        self._sock: socket.socket | None = None
        self._waiting: dict[bytes, tuple[Notice, Done]] = {}
        self._under_way: dict[int, _Flight] = {}  # by ID

    def add(self, notice: Notice, done: Done) -> None:
        """Tell it of a new serial, in place of an older one that it has not answered for."""
        for flight in self._under_way.values():
            if flight.notice.zone == notice.zone:
                if flight.notice.serial == notice.serial:
                    return  # two server blocks have the zone
                self._forget(flight)
                break
        self._waiting[notice.zone] = notice, done
        self._go_on()

    def close(self) -> None:
        for flight in list(self._under_way.values()):
            self._forget(flight)
        self._waiting.clear()
        self._close_socket()

    # --- sending ----------------------------------------------------------------------------

    def _go_on(self) -> None:
        """Send as much of what waits as may be under way."""
        while self._waiting and len(self._under_way) < WINDOW:
            notice, done = self._waiting.pop(next(iter(self._waiting)))
            number = _number()
            while number in self._under_way:
                number = _number()
            flight = self._under_way[number] = _Flight(number, notice, done)
            self._try(flight)
        if not self._under_way:
            self._close_socket()

    def _try(self, flight: _Flight) -> None:
        if flight.tries == len(PAUSES):
            self._end(flight, flight.why or f"no answer, and it was sent {flight.tries} times")
            return
        # One ID for all tries: a late answer counts, too.
        flight.why = self._send(
            render_query(flight.id, flight.notice.zone, t.SOA, flags=_NOTIFY | AA)
        )
        flight.timer = self._loop.call_later(PAUSES[flight.tries], self._try, flight)
        flight.tries += 1

    def _send(self, wire: bytes) -> str:
        """Send a datagram; return what went wrong. That may pass, as an address that the host
        does not have yet, so it is tried again like one that was lost."""
        try:
            sock = self._sock or self._open()
            try:
                sock.send(wire)
            except ConnectionRefusedError:
                # Of the datagram before, and this one has not left.
                sock.send(wire)
        except OSError as e:
            return reason_of(e)
        return ""

    def _open(self) -> socket.socket:
        """Open a connected socket: the kernel lets nobody's datagrams in but the secondary's
        (RFC 1996 s3.6: IP address and port match)."""
        family, _, _, _, place = _numeric(*self._to)
        sock = socket.socket(family, socket.SOCK_DGRAM)
        try:
            sock.setblocking(False)
            if self._source:
                try:
                    sock.bind(_numeric(self._source, 0)[4])
                except OSError as e:
                    raise OSError(f"cannot send from {self._source}: {reason_of(e)}") from e
            sock.connect(place)
            self._loop.add_reader(sock, self._read)
        except BaseException:
            sock.close()
            raise
        self._sock = sock
        return sock

    def _close_socket(self) -> None:
        if self._sock is not None:
            self._loop.remove_reader(self._sock)
            self._sock.close()
            self._sock = None

    # --- answers ----------------------------------------------------------------------------

    def _read(self) -> None:
        for _ in range(AT_ONCE):
            if self._sock is None:
                return
            try:
                wire = self._sock.recv(MAX_ANSWER)
            except ConnectionRefusedError:
                # RFC 1996 s3.6: ends it. It is said of the port, so for all that was sent there.
                for flight in list(self._under_way.values()):
                    self._end(flight, "connection refused: no name server listens there")
                return
            except OSError:
                return  # nothing more, or as if lost on the way
            with contextlib.suppress(WireError):
                self._take(parse_message(wire))

    def _take(self, message: Message) -> None:
        """End what a message answers. RFC 1996 s3.6: any answer does, whatever its rcode."""
        flight = self._under_way.get(message.id)
        if flight is None or not _answers(message, flight.notice):
            return
        rcode = message.rcode
        self._end(flight, "" if rcode == t.NOERROR else f"it answers {t.rcode_name(rcode)}")

    def _end(self, flight: _Flight, why: str) -> None:
        self._forget(flight)
        try:
            flight.done(flight.notice, why)
        except Exception:
            log.exception("a bug in kdns in what follows a NOTIFY; it goes on")
        self._go_on()

    def _forget(self, flight: _Flight) -> None:
        del self._under_way[flight.id]
        if flight.timer is not None:
            flight.timer.cancel()


def _number() -> int:
    return int.from_bytes(os.urandom(2), "big")


def _answers(message: Message, notice: Notice) -> bool:
    """True if a message with the right ID from the right place is the answer to a notice."""
    if not message.flags & QR or message.flags & OPCODE != _NOTIFY:
        return False
    if message.question is None:
        # Who does not understand a NOTIFY may send back no more than the header.
        return message.rcode != t.NOERROR
    name, qtype, qclass = message.question
    return (name.lower(), qtype, qclass) == (notice.zone, t.SOA, t.IN)


def _numeric(host: str, port: int) -> tuple[int, int, int, str, tuple[str, int]]:
    """Return family and socket address of an IP address. Raises OSError (no such interface)."""
    found = socket.getaddrinfo(
        host, port, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    )
    return found[0]  # type: ignore[return-value]
