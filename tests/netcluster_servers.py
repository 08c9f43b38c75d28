"""One process in each network namespace of netcluster.py: endpoint server and client in one.

Run as a script, it makes a namespace for each NAME=FD it is given and answers requests there,
one JSON object a line, until the other end of FD is closed. So a question to the kernel costs
what its packets cost and not the start of a process, and whatever happens to the tests, the
namespaces go with them. What to ask and what the answers mean is netcluster.py's and the
tests'. The first name gets the namespace the script was started in.

Endpoints answer each line or datagram with "who=NAME at=IP:PORT peer=IP:PORT": their name,
the address that was reached, and the client as they see it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
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
KINDS = {
    "tcp": (socket.SOCK_STREAM, socket.IPPROTO_TCP),
    "udp": (socket.SOCK_DGRAM, socket.IPPROTO_UDP),
    "sctp": (socket.SOCK_STREAM, SCTP),
}
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


def text_of(address: Any) -> str:
    ip, port = address[0], address[1]
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


class Servers:
    """Endpoint servers of one namespace, in a thread of their own: a Pod may ask itself."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.selector = selectors.DefaultSelector()
        self.lock = threading.Lock()
        self.listening: dict[tuple[str, str, int], socket.socket] = {}
        self.thread: threading.Thread | None = None

    def listen(self, protocol: str, ip: str, port: int) -> None:
        sock = make_socket(protocol, ip)
        if protocol != "udp":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((ip, port))
        sock.setblocking(False)
        if protocol != "udp":
            sock.listen(1024)
        take = self.datagram if protocol == "udp" else self.accept
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
    """Requests from one namespace to wherever, one after the other."""

    def __init__(self) -> None:
        self.kept: dict[int, socket.socket] = {}
        self.last = 0

    def connect(
        self, protocol: str, to: list[Any], source: list[Any] | None, timeout: float
    ) -> socket.socket:
        sock = make_socket(protocol, to[0])
        try:
            sock.settimeout(timeout)
            if source is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind((source[0], source[1]))
            sock.connect((to[0], to[1]))
        except OSError:
            sock.close()
            raise
        return sock

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
