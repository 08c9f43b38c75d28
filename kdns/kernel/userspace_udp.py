"""UDP of the userspace mode: a socket of its own to an endpoint for each client.

Decides when a flow begins, goes to another endpoint, and ends: when it is idle, when too many
others are not, when its endpoint is gone. Which endpoint is next is proxy/userspace.py's.
"""

from __future__ import annotations

import ipaddress
import select
import socket
import struct
from collections import OrderedDict
from collections.abc import Collection
from typing import Any, Final

from kdns.kernel.userspace_poll import COPY, EXHAUSTED, Poller
from kdns.kernel.userspace_relay import Admit, Choose, RelayCounts
from kdns.metrics import Cell, Metrics

IDLE: Final = 0.25  # seconds until a flow is over: kube-proxy's udpIdleTimeout
MAX_FLOWS: Final = 10_000  # of all Services; a client more ends the one that rests longest
BATCH: Final = 64  # datagrams of a socket before others get their turn
# The first datagram of a flow is kept until an endpoint has answered, to be sent to another one
# if the first is not there; if it is not larger than that.
KEPT: Final = 1500
TRIES: Final = 4  # endpoints of a flow that are not there, until it is given up
# Linux calls it 8; the socket module has no name for it.
IP_PKTINFO: Final = 8
_PKTINFO: Final = struct.Struct("=I4s4s")
_SPACE: Final = socket.CMSG_SPACE(20)

# A client's address, and what makes the kernel answer from the address it asked.
_Asked = tuple[Any, tuple[int, int, bytes] | None]


class UdpCounts(RelayCounts):
    """What is counted of UDP."""

    def __init__(self, metrics: Metrics, family: str) -> None:
        super().__init__(metrics, family, "udp")
        self.evicted: Cell = metrics.counter(
            "kdns_userspace_flows_evicted_total",
            "Flows that ended because others needed their place.",
            ("ip_family",),
        ).labels(family)


class UdpListener:
    """One socket that clients send to. sock -- bound, not blocking.

    wildcard -- it is bound to every address: answers leave from the one that was asked
    """

    def __init__(
        self,
        sock: socket.socket,
        flows: UdpFlows,
        counts: UdpCounts,
        choose: Choose,
        admit: Admit | None,
        wildcard: bool,
    ) -> None:
        self.sock = sock
        self.counts = counts
        self.choose = choose
        self.admit = admit
        self.flows: dict[Any, _Flow] = {}
        self._flows = flows
        self._wildcard = wildcard
        if wildcard:
            if sock.family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
            else:
                sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
        flows.poller.add(sock.fileno(), select.EPOLLIN, self._drain)

    def keep_only(self, endpoints: Collection[str]) -> None:
        """End the flows to others than these endpoints ("ip:port")."""
        for flow in [one for one in self.flows.values() if one.endpoint not in endpoints]:
            flow.end()

    def close(self) -> None:
        """End all flows, whose answers could not leave any more."""
        for flow in list(self.flows.values()):
            flow.end()
        self._flows.poller.leave(self.sock)

    def _drain(self, event: int) -> None:
        for _ in range(BATCH):
            source = None
            try:
                if self._wildcard:
                    datagram, ancillary, _, client = self.sock.recvmsg(COPY, _SPACE)
                else:
                    datagram, client = self.sock.recvfrom(COPY)
            except BlockingIOError:
                return
            except OSError:
                continue  # an ICMP error of an earlier answer: the next read is fresh
            flow = self.flows.get(client)
            if flow is None:
                if self._wildcard:
                    source = _asked_address(ancillary)
                flow = self._flows.begin(self, (client, source))
                if flow is None:
                    continue
            flow.send(datagram)


class _Flow:
    """One client of one listener, and its socket to an endpoint."""

    __slots__ = (
        "answered", "asked", "endpoint", "first", "flows", "listener", "sock", "tried", "used"
    )  # fmt: skip

    def __init__(self, flows: UdpFlows, listener: UdpListener, asked: _Asked) -> None:
        self.flows = flows
        self.listener = listener
        self.asked = asked
        self.endpoint = ""
        self.tried: tuple[str, ...] = ()
        self.sock: socket.socket | None = None
        self.first: bytes | None = None
        self.answered = False
        self.used = 0.0

    def dial(self) -> bool:
        """Take the next endpoint; False if there is none, or none that can be sent to.

        Raises OSError where descriptors are out.
        """
        while len(self.tried) < TRIES:
            chosen = self.listener.choose(self.asked[0][0], self.tried)
            if chosen is None or str(chosen) in self.tried:
                break
            self.endpoint = str(chosen)
            family = socket.AF_INET6 if ":" in chosen.ip else socket.AF_INET
            sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            try:
                sock.connect((chosen.ip, chosen.port))
            except OSError:
                sock.close()
                self._note_failure()
                continue
            self.sock = sock
            self.flows.poller.add(sock.fileno(), select.EPOLLIN, self._answer)
            return True
        self.listener.counts.failed.add()
        return False

    def _note_failure(self) -> None:
        self.tried = (*self.tried, self.endpoint)
        self.listener.counts.retried.add()

    def send(self, datagram: bytes) -> None:
        """Send on what the client sent."""
        if not self.answered:
            self.first = datagram if self.first is None and len(datagram) <= KEPT else self.first
        self.flows.touch(self)
        assert self.sock is not None
        try:
            self.sock.send(datagram)
        except BlockingIOError:
            pass  # as lost on the way
        except OSError:
            self._refused(datagram)

    def _answer(self, event: int) -> None:
        listener = self.listener
        client, source = self.asked
        self.flows.touch(self)
        for _ in range(BATCH):
            if self.sock is None:
                return
            try:
                datagram = self.sock.recv(COPY)
            except BlockingIOError:
                return
            except OSError:
                self._refused(self.first)
                return
            self.answered, self.first = True, None
            try:
                if source is None:
                    listener.sock.sendto(datagram, client)
                else:
                    listener.sock.sendmsg([datagram], [source], 0, client)
            except OSError:
                pass  # as lost on the way; the client asks again

    def _refused(self, again: bytes | None) -> None:
        """Nobody is at the endpoint (ICMP): the client goes to another one, with what it has
        sent last, or first. One that has answered before may only be restarting: the flow ends,
        and what the client sends next begins another."""
        if self.answered:
            self.end()
            return
        self._note_failure()
        self._hang_up()
        try:
            found = self.dial()
        except OSError:
            found = False
        if not found or self.sock is None:
            self.end()
            return
        if again is not None:
            try:
                self.sock.send(again)
            except OSError:
                self.end()

    def _hang_up(self) -> None:
        if self.sock is not None:
            self.flows.poller.leave(self.sock)
            self.sock = None

    def end(self) -> None:
        self._hang_up()
        self.flows.forget(self)


class UdpFlows:
    """All flows through this process. idle -- seconds until one is over"""

    def __init__(self, poller: Poller, idle: float = IDLE, most: int = MAX_FLOWS) -> None:
        self.poller = poller
        self._idle = idle
        self._most = most
        # The one that rests longest first.
        self._flows: OrderedDict[_Flow, None] = OrderedDict()
        poller.on_tick.append(self._tick)

    def __len__(self) -> int:
        return len(self._flows)

    def begin(self, listener: UdpListener, asked: _Asked) -> _Flow | None:
        """Begin a flow of a client; None where nobody answers it."""
        client = asked[0]
        listener.counts.accepted.add()
        if listener.admit is not None and not listener.admit(client[0]):
            listener.counts.failed.add()
            return None
        if len(self._flows) >= self._most or (self._flows and not self.poller.has_room()):
            self._evict()
        flow = _Flow(self, listener, asked)
        for _ in range(2):
            try:
                if not flow.dial():
                    return None
                break
            except OSError as e:
                if e.errno not in EXHAUSTED or not self._flows:
                    listener.counts.failed.add()
                    return None
                self._evict()
        else:
            return None
        listener.flows[client] = flow
        self._flows[flow] = None
        self.touch(flow)
        listener.counts.open.add()
        self.poller.tick()
        return flow

    def _evict(self) -> None:
        oldest = next(iter(self._flows))
        oldest.listener.counts.evicted.add()
        oldest.end()

    def touch(self, flow: _Flow) -> None:
        """Note that a flow is not idle."""
        flow.used = self.poller.time()
        if flow in self._flows:
            self._flows.move_to_end(flow)

    def forget(self, flow: _Flow) -> None:
        if flow in self._flows:
            del self._flows[flow]
            flow.listener.flows.pop(flow.asked[0], None)
            flow.listener.counts.open.add(-1)

    def _tick(self, now: float) -> None:
        before = now - self._idle
        while self._flows:
            oldest = next(iter(self._flows))
            if oldest.used > before:
                self.poller.tick()
                return
            oldest.end()

    def close(self) -> None:
        """End everything at once."""
        for flow in list(self._flows):
            flow.end()


def bind_udp(family: socket.AddressFamily, address: str, port: int) -> socket.socket:
    """Return a bound socket. Raises OSError."""
    sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address, port))
    except OSError:
        sock.close()
        raise
    return sock


def _asked_address(ancillary: list[tuple[int, int, bytes]]) -> tuple[int, int, bytes] | None:
    """Return what makes the kernel send from the address that was asked."""
    for level, kind, value in ancillary:
        if level == socket.IPPROTO_IP and kind == IP_PKTINFO:
            _, local, address = _PKTINFO.unpack(value[:12])
            # ipi_spec_dst is the address to send from; the interface is left to routing.
            return level, kind, _PKTINFO.pack(0, local if any(local) else address, bytes(4))
        if level == socket.IPPROTO_IPV6 and kind == socket.IPV6_PKTINFO:
            scoped = ipaddress.IPv6Address(value[:16]).is_link_local
            return level, kind, value if scoped else value[:16] + bytes(4)
    return None
