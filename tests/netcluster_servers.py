"""One process in each network namespace of netcluster.py: endpoint server and client in one.

Run as a script, it makes a namespace for each NAME=FD it is given and answers requests there,
one JSON object a line, until the other end of FD is closed. So a question to the kernel costs
what its packets cost and not the start of a process, and whatever happens to the tests, the
namespaces go with them. What to ask and what the answers mean is netcluster.py's and the
tests'. The first name gets the namespace the script was started in.

Endpoints answer each line or datagram with "who=NAME at=IP:PORT peer=IP:PORT": their name,
the address that was reached, and the client as they see it. Where the kernel has no SCTP
sockets, that much of SCTP is spoken here, over raw sockets: what rules and conntrack do with
SCTP does not depend on them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import itertools
import json
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

# linux/netlink.h, linux/netfilter/nfnetlink_conntrack.h
NETLINK_NETFILTER = 12
NLM_F_REQUEST, NLM_F_ACK = 1, 4
CT_DELETE = 1 << 8 | 2
CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1
SCTP = 132  # socket.IPPROTO_SCTP, which not every Python was built with
IPV6_RECVERR = 25  # linux/in6.h
# RFC 9260: chunk types, and the parameter in which a server tells a client what it likes.
INIT, INIT_ACK, STATE_COOKIE = 1, 2, 7
KINDS = {
    "tcp": (socket.SOCK_STREAM, socket.IPPROTO_TCP),
    "udp": (socket.SOCK_DGRAM, socket.IPPROTO_UDP),
    "sctp": (socket.SOCK_STREAM, SCTP),
}
NO_LINGER = struct.pack("ii", 1, 0)
# errno -> what a user would say. EACCES is how IPv6 says "administratively prohibited".
OUTCOMES = {
    errno.ECONNREFUSED: "refused",
    errno.EHOSTUNREACH: "unreachable",
    errno.ENETUNREACH: "unreachable",
    errno.EACCES: "unreachable",
}
# A question nobody answers in a user's lifetime must not hold the tests for ever either.
RUN_TIMEOUT = 30.0


def make_socket(protocol: str, ip: str) -> socket.socket:
    kind, number = KINDS[protocol]
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    return socket.socket(family, kind, number)


def has_sctp() -> bool:
    """True if this kernel has SCTP sockets."""
    try:
        socket.socket(socket.AF_INET, *KINDS["sctp"]).close()
    except OSError:
        return False
    return True


def text_of(address: Any) -> str:
    ip, port = address[0], address[1]
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


SCTP_SOCKETS = has_sctp()


# --- SCTP over raw sockets: INIT, and INIT ACK with the answer as its cookie ------------------


def crc32c(octets: bytes) -> int:
    crc = 0xFFFFFFFF
    for octet in octets:
        crc ^= octet
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def sctp_packet(ports: tuple[int, int], tag: int, kind: int, cookie: bytes = b"") -> bytes:
    """Return an INIT or INIT ACK. ports -- source, destination; tag -- the receiver's"""
    body = struct.pack("!IIHHI", 1, 65536, 1, 1, 1)  # our tag, window, streams, first TSN
    if cookie:
        padding = bytes(-len(cookie) % 4)
        body += struct.pack("!HH", STATE_COOKIE, 4 + len(cookie)) + cookie + padding
    chunk = struct.pack("!BBH", kind, 0, 4 + len(body)) + body
    head = struct.pack("!HHI", *ports, tag)
    return head + struct.pack("<I", crc32c(head + bytes(4) + chunk)) + chunk


def sctp_chunk(packet: bytes, family: int) -> tuple[int, int, int, int, bytes] | None:
    """Return source port, destination port, receiver's tag, type and cookie of a packet as a raw
    socket gives it; None if the checksum is wrong, as a rewrite of ports could make it."""
    if family == socket.AF_INET:
        packet = packet[(packet[0] & 15) * 4 :]
    head, (found,) = packet[:8], struct.unpack_from("<I", packet, 8)
    if found != crc32c(head + bytes(4) + packet[12:]):
        return None
    source, destination, tag = struct.unpack("!HHI", head)
    cookie = b""
    if len(packet) > 36:
        (length,) = struct.unpack_from("!H", packet, 34)
        cookie = packet[36 : 32 + length]
    return source, destination, tag, packet[12], cookie


class RawSctp(socket.socket):
    """A client's SCTP socket, as far as Clients uses one."""

    def __init__(self, family: int) -> None:
        super().__init__(family, socket.SOCK_RAW, SCTP)
        self.port = 0
        self.cookie = b""

    def bind(self, address: Any) -> None:
        super().bind((address[0], 0))
        self.port = address[1]

    def connect(self, address: Any) -> None:
        # From now on ICMP errors are ours, and nobody's packets but the server's.
        super().connect((address[0], 0))
        with contextlib.suppress(PermissionError):  # as in Clients.say
            super().send(sctp_packet((self.port, address[1]), 0, INIT))
        while True:
            chunk = sctp_chunk(super().recv(2048), self.family)
            if chunk is not None and chunk[:4] == (address[1], self.port, 1, INIT_ACK):
                self.cookie = chunk[4]
                return

    def send(self, data: Any, flags: int = 0) -> int:
        return len(data)

    def recv(self, size: int, flags: int = 0) -> bytes:
        return self.cookie

    def getsockname(self) -> Any:
        return super().getsockname()[0], self.port


class Servers:
    """Endpoint servers of one namespace, in a thread of their own: a Pod may ask itself."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.selector = selectors.DefaultSelector()
        self.lock = threading.Lock()
        self.listening: dict[tuple[str, str, int], socket.socket] = {}
        self.thread: threading.Thread | None = None

    def listen(self, protocol: str, ip: str, port: int) -> None:
        take: Callable[[socket.socket], None]
        if protocol == "sctp" and not SCTP_SOCKETS:
            family = socket.AF_INET6 if ":" in ip else socket.AF_INET
            sock = socket.socket(family, socket.SOCK_RAW, SCTP)
            sock.bind((ip, 0))
            take = functools.partial(self.init, port)
        else:
            sock = make_socket(protocol, ip)
            if protocol != "udp":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((ip, port))
            if protocol != "udp":
                sock.listen(1024)
            take = self.datagram if protocol == "udp" else self.accept
        sock.setblocking(False)
        with self.lock:
            self.listening[protocol, ip, port] = sock
            self.selector.register(sock, selectors.EVENT_READ, take)
        if self.thread is None:
            self.thread = threading.Thread(target=self.run, daemon=True)
            self.thread.start()

    def close(self, protocol: str, ip: str, port: int) -> None:
        with self.lock:
            sock = self.listening.pop((protocol, ip, port))
            self.selector.unregister(sock)
            sock.close()

    def run(self) -> None:
        while True:
            for key, _ in self.selector.select():
                with self.lock, contextlib.suppress(OSError):
                    key.data(key.fileobj)

    def reply(self, at: Any, peer: Any) -> bytes:
        return f"who={self.name} at={text_of(at)} peer={text_of(peer)}\n".encode()

    def datagram(self, sock: socket.socket) -> None:
        _, peer = sock.recvfrom(2048)
        sock.sendto(self.reply(sock.getsockname(), peer), peer)

    def init(self, port: int, sock: socket.socket) -> None:
        """Answer INIT to a port. A raw socket is given the packets of all ports."""
        packet, peer = sock.recvfrom(2048)
        chunk = sctp_chunk(packet, sock.family)
        if chunk is None or chunk[1] != port or chunk[3] != INIT:
            return
        answer = self.reply((sock.getsockname()[0], port), (peer[0], chunk[0]))
        sock.sendto(sctp_packet((port, chunk[0]), 1, INIT_ACK, answer), (peer[0], 0))

    def accept(self, sock: socket.socket) -> None:
        connection, _ = sock.accept()
        connection.setblocking(False)
        self.selector.register(connection, selectors.EVENT_READ, self.stream)

    def stream(self, connection: socket.socket) -> None:
        try:
            if connection.recv(2048):
                connection.send(self.reply(connection.getsockname(), connection.getpeername()))
                return
        except OSError:
            pass
        self.selector.unregister(connection)
        connection.close()


class Clients:
    """Requests from one namespace to wherever, one after the other.

    No port comes again while conntrack may know it: a flow from before the rules would then
    decide, or two of one port at one endpoint, by two frontends, and the kernel changes the
    second one's port, masquerading or not.
    """

    def __init__(self) -> None:
        self.ports = itertools.cycle(range(32768, 61000))
        self.kept: dict[int, socket.socket] = {}
        self.last = 0

    def connect(
        self, protocol: str, to: list[Any], source: list[Any] | None, timeout: float
    ) -> socket.socket:
        if protocol == "sctp" and not SCTP_SOCKETS:
            sock: socket.socket = RawSctp(socket.AF_INET6 if ":" in to[0] else socket.AF_INET)
        else:
            sock = make_socket(protocol, to[0])
        try:
            sock.settimeout(timeout)
            if protocol == "tcp" and sock.family == socket.AF_INET6:
                learn_at_once(sock)
            ip, port = source or ("", 0)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.bind(sock, ip, port)
            sock.connect((to[0], to[1]))
        except OSError:
            sock.close()
            raise
        return sock

    def bind(self, sock: socket.socket, ip: str, port: int) -> None:
        """Bind to `port`; 0: to the next that nobody has, where a proxy has flows of its own."""
        while True:
            try:
                sock.bind((ip, port or next(self.ports)))
                return
            except OSError as error:
                if port or error.errno != errno.EADDRINUSE:
                    raise

    def say(self, sock: socket.socket) -> list[str]:
        # A rule of the node's own that drops or rejects fails the sending already; which of
        # the two it was, the answer tells.
        with contextlib.suppress(PermissionError):
            sock.send(b"?\n")
        words = dict(word.split("=", 1) for word in sock.recv(2048).decode().split())
        if not words:
            return ["closed", "", "", "", ""]
        return ["answered", words["who"], words["at"], words["peer"], text_of(sock.getsockname())]

    def ask(
        self,
        protocol: str,
        to: list[Any],
        times: int = 1,
        sources: list[list[Any]] | None = None,
        timeout: float = 0.3,
    ) -> list[list[str]]:
        """Make `times` connections from each source; return what became of each.

        Ends with the first that nobody answers: the others would wait as long.
        """
        found = []
        origins: list[list[Any] | None] = [*sources] if sources else [None]
        for source in origins:
            for _ in range(times):
                try:
                    with self.connect(protocol, to, source, timeout) as sock:
                        found.append(self.say(sock))
                        if protocol == "tcp":  # its end is a RST: no TIME_WAIT holds the port
                            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
                except OSError as error:
                    found.append(failure(error))
                    if found[-1][0] == "timeout":
                        return found
        return found

    def open(
        self,
        protocol: str,
        to: list[Any],
        source: list[Any] | None = None,
        timeout: float = 0.3,
    ) -> int:
        """Connect and stay connected; return the number of the connection."""
        self.last += 1
        self.kept[self.last] = self.connect(protocol, to, source, timeout)
        return self.last

    def again(self, number: int) -> list[str]:
        """Ask once more through a connection that is open."""
        try:
            return self.say(self.kept[number])
        except OSError as error:
            return failure(error)

    def hang_up(self, number: int) -> None:
        self.kept.pop(number).close()


def learn_at_once(sock: socket.socket) -> None:
    """Have a TCP client over IPv6 told of an ICMP error as soon as it is there.

    Where client and rules are in one kernel the whole way there and back is gone within
    connect(), in the softirq at the end of its sending: from the node itself, from a Pod over
    its veth, and here from everybody. The error then finds the socket in use by connect() and
    TCP only makes a note of it (it counts TcpExtLockDroppedIcmps), so that a client learns of
    it when the SYN is sent again, 1 s later. That is so for whichever proxy: with the very
    rules recorded from kube-proxy 1.36.2 it takes the same 1.02 s, and over IPv4 too if
    connect() blocks. Only an IPv4 client that waits in poll(), as with a time-out, is woken at
    once, because IPv4 queues each such error to the socket and IPv6 those of IPV6_RECVERR.
    Over a wire that takes longer than connect() (measured: two tun devices and a process
    between them) nothing of that is seen: all are refused in 0.2 ms, no error dropped.
    """
    sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVERR, 1)


def failure(error: OSError) -> list[str]:
    if isinstance(error, TimeoutError):
        return ["timeout", "", "", "", ""]
    outcome = OUTCOMES.get(error.errno or 0) or errno.errorcode.get(error.errno or 0, str(error))
    return [outcome, "", "", "", ""]


def run(argv: list[str], text: str = "") -> list[Any]:
    """Run a program in this namespace; return its exit status, output and error output."""
    try:
        done = subprocess.run(
            argv, check=False, input=text, capture_output=True, text=True, timeout=RUN_TIMEOUT
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return [127, "", str(error)]
    return [done.returncode, done.stdout, done.stderr]


def forget() -> None:
    """Have conntrack forget every flow that passed this namespace.

    Otherwise a client's port that is used again may still belong to a flow from other rules.
    """
    header = struct.pack("=IHHII", 20, CT_DELETE, NLM_F_REQUEST | NLM_F_ACK, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as sock:
        sock.bind((0, 0))
        # Without a flow to delete, all of both families are meant.
        sock.send(header + bytes(4))
        code = -struct.unpack_from("=i", sock.recv(4096), 16)[0]
    if code:
        raise OSError(code, os.strerror(code))


def read(path: str) -> str:
    """Read a file of /proc, which shows each namespace its own."""
    with open(path) as file:
        return file.read()


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def serve(name: str, control: socket.socket) -> None:
    """Answer requests {"do": NAME, ...} with {"ok": RESULT} or {"error": TEXT} until the end."""
    servers, clients = Servers(name), Clients()
    verbs: dict[str, Callable[..., Any]] = {
        "pid": os.getpid, "run": run, "forget": forget, "read": read, "write": write,
        "listen": servers.listen, "close": servers.close,
        "ask": clients.ask, "open": clients.open, "again": clients.again,
        "hang_up": clients.hang_up,
    }  # fmt: skip
    with control, control.makefile("rw") as lines:
        for line in lines:
            request = json.loads(line)
            try:
                answer: dict[str, Any] = {"ok": verbs[request.pop("do")](**request)}
            except OSError as error:
                answer = {"error": str(error), "outcome": failure(error)[0]}
            lines.write(json.dumps(answer) + "\n")
            lines.flush()


def main(arguments: list[str]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    wanted = [argument.split("=") for argument in arguments]
    (own, own_fd), others = wanted[0], wanted[1:]
    children = []
    for name, fd in others:
        child = os.fork()
        if child == 0:
            # Nobody is left behind if the parent is killed.
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if libc.unshare(CLONE_NEWNET) != 0:
                sys.exit(f"unshare(CLONE_NEWNET): {os.strerror(ctypes.get_errno())}")
            serve(name, socket.socket(fileno=int(fd)))
            return
        children.append(child)
    # The children hold their own; a copy here would keep a dead child's line open.
    for _, fd in others:
        os.close(int(fd))
    serve(own, socket.socket(fileno=int(own_fd)))
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(sys.argv[1:])
