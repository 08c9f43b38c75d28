"""A cluster of network namespaces, for tests with real packets through real rules.

    client   pod-a   pod-b                    Pods of the node, 10.244.1.0/24
       |       |       |
       +----- node ----+                      the node under test; rules are loaded here
               |
    ---+-------+-------+-----------+--- lan   192.168.77.0/24
       |               |           |
     node2          outside    neighbour      another node (10.244.2.0/24), a client of the
                                              cluster's load balancers, somebody hostile

Everything is there in IPv4 and IPv6. The lan itself is the node's default gateway and
prohibits all it is asked to route: what no rule of the node catches comes back "unreachable",
so that a packet that was dropped can be told from one that nobody stopped. No namespace has a
way out of this drawing, and nothing has a name or a file on the machine: the namespaces live
as long as their process of netcluster_servers.py, and that as long as the tests'.

Runs where root is, or in an own user namespace. What is asked, and of which objects, is the
tests' own.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias, TypeVar, cast

T = TypeVar("T")
# "closed" or the name of an errno is for what nobody expects.
Outcome: TypeAlias = Literal["answered", "refused", "timeout", "unreachable"] | str

# The longest a request waits for its answer, in seconds. Where an answer is to come it is
# only spent when something is broken; where none is to come it is spent each time. An answer
# takes 0.2 ms here, and some more in the emulated machine of .ci/ipvs_vm.py.
IN_MACHINE = os.environ.get("KDNS_VM") == "1"
PATIENCE = 30.0 if IN_MACHINE else 5.0
SILENCE = 0.5 if IN_MACHINE else 0.15

CLUSTER_CIDR = {4: "10.244.0.0/16", 6: "fd00:10:244::/56"}
NODE_NAME = "node1"
NODE_ADDRESS = {4: "192.168.77.1", 6: "fd00:77::1"}
# The node's own side of its Pods' links.
BRIDGE_ADDRESS = {4: "10.244.1.1", 6: "fd00:10:244:1::1"}

# Where each namespace's endpoints and clients are: (IPv4, IPv6), first the one used by default.
PODS = {
    "client": [5, *range(50, 70)],
    "pod-a": [10, 11, 12, 13],
    "pod-b": [20, 21, 22, 23],
}
REMOTE_PODS = [10, 11, 12, 13]
LAN = {"node": 1, "node2": 2, "neighbour": 66, "outside": 200}
GATEWAY = 254
# More addresses of the outside host, for source ranges.
OUTSIDE = {4: ["203.0.113.9", "198.51.100.7", "198.51.100.8"], 6: ["2001:db8:113::9"]}

NAMES = ("lan", "node", "client", "pod-a", "pod-b", "node2", "outside", "neighbour")
ENDPOINT_PORTS = (8080, 8081, 5353)

# Set in every namespace before any link is made: an IPv6 address works at once instead of
# after a second of looking for its double, and no answer is held back for having been given
# often.
SYSCTLS = {
    "net/ipv6/conf/default/accept_dad": "0",
    "net/ipv6/conf/all/accept_dad": "0",
    "net/ipv6/conf/default/accept_ra": "0",
    "net/ipv4/icmp_ratelimit": "0",
    "net/ipv4/icmp_msgs_per_sec": "1000000",
    "net/ipv4/icmp_msgs_burst": "1000000",
    "net/ipv6/icmp/ratelimit": "0",
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
    "net/ipv4/conf/all/send_redirects": "0",
    "net/ipv4/conf/default/send_redirects": "0",
    "net/ipv4/conf/all/accept_redirects": "0",
}
# Not in every kernel, or only where the initial user namespace is.
OPTIONAL = {
    "net/ipv4/icmp_msgs_per_sec",
    "net/ipv4/icmp_msgs_burst",
    "net/bridge/bridge-nf-call-iptables",
}
ROUTER = {"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1"}
MORE = {
    # As the proxy sets it on a node (reference 1.9).
    "node": {**ROUTER, "net/ipv4/conf/all/route_localnet": "1"},
    # Its rules are for what it routes and not for what passes over it.
    "lan": {**ROUTER, "net/bridge/bridge-nf-call-iptables": "0"},
    # It sends to 127.0.0.1 of the node, as a hostile neighbour would.
    "neighbour": {"net/ipv4/conf/all/route_localnet": "1"},
}


def pod(number: int, family: int = 4, node: int = 1) -> str:
    """Return the address of a Pod of node 1 or 2."""
    return f"10.244.{node}.{number}" if family == 4 else f"fd00:10:244:{node}::{number}"


def lan(host: str, family: int = 4) -> str:
    number = GATEWAY if host == "lan" else LAN[host]
    return f"192.168.77.{number}" if family == 4 else f"fd00:77::{number}"


class Unavailable(Exception):
    """No such cluster can be made here: which step failed, and what it said."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What became of one request.

    who   -- the namespace that answered; "" if none
    at    -- "ip:port" of the endpoint, as it sees itself
    peer  -- "ip:port" of the client, as the endpoint sees it
    local -- "ip:port" of the client, as it sees itself
    """

    outcome: Outcome
    who: str = ""
    at: str = ""
    peer: str = ""
    local: str = ""

    @property
    def masqueraded(self) -> bool:
        return self.peer != self.local

    @property
    def peer_ip(self) -> str:
        return self.peer.rpartition(":")[0].strip("[]")


class NetCluster:
    """The namespaces, from `with` to its end. Raises Unavailable."""

    def __init__(self) -> None:
        self.lines: dict[str, socket.socket] = {}
        self.files: dict[str, Any] = {}
        self.turns = {name: threading.Lock() for name in NAMES}
        self.pids: dict[str, int] = {}
        self.process: subprocess.Popen[str] | None = None
        self.own_user = os.geteuid() != 0

    def __enter__(self) -> NetCluster:
        try:
            self._start()
            self._link()
            self._listen()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; with them go their namespaces and all that is in those."""
        for file in self.files.values():
            with contextlib.suppress(OSError):
                file.close()
        for line in self.lines.values():
            line.close()
        if self.process is not None:
            try:
                self.process.communicate(timeout=10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.communicate()
        self.files, self.lines, self.process = {}, {}, None

    # Requests to one namespace.

    def request(self, where: str, do: str, **arguments: Any) -> Any:
        """Have the process in namespace `where` do something; return what it returned.

        Threads that ask the same namespace wait for each other.
        Raises OSError if it failed, Unavailable if the process is gone.
        """
        file = self.files[where]
        try:
            with self.turns[where]:
                file.write(json.dumps({"do": do, **arguments}) + "\n")
                file.flush()
                line = file.readline()
        except OSError as error:
            raise Unavailable(self._last_words(where, str(error))) from error
        if not line:
            raise Unavailable(self._last_words(where, "it ended"))
        answer = json.loads(line)
        if "error" in answer:
            raise OSError(f"{do} in {where}: {answer['error']}")
        return answer["ok"]

    def ask(
        self,
        where: str,
        ip: str,
        port: int,
        protocol: str = "tcp",
        *,
        times: int = 1,
        sources: Iterable[str] = (),
        timeout: float = PATIENCE,
    ) -> list[Reply]:
        """Make `times` connections to ip:port from each of `sources` of namespace `where`
        (none: from what its routes choose); return what became of each, up to the first
        time-out."""
        bound = [[source, 0] for source in sources]
        found = self.request(
            where, "ask", protocol=protocol, to=[ip, port], times=times,
            sources=bound or None, timeout=timeout,
        )  # fmt: skip
        return [Reply(*one) for one in found]

    def open(
        self,
        where: str,
        ip: str,
        port: int,
        protocol: str = "tcp",
        source: tuple[str, int] | None = None,
    ) -> Connection:
        """Connect and stay connected (UDP: keep the socket, and with it the flow)."""
        number = self.request(
            where, "open", protocol=protocol, to=[ip, port],
            source=None if source is None else [*source], timeout=PATIENCE,
        )  # fmt: skip
        return Connection(self, where, number)

    def run(self, where: str, *argv: str, text: str = "") -> str:
        """Run a program there with `text` as its input; return its output.

        Raises Unavailable, with what the program said, if it fails.
        """
        status, output, complaint = self.request(where, "run", argv=[*argv], text=text)
        if status != 0:
            said = complaint.strip() or f"exit status {status}"
            raise Unavailable(f"`{' '.join(argv)}` in namespace {where} failed: {said}")
        return str(output)

    def enter(self, where: str) -> list[str]:
        """Return the command prefix that runs a program in that namespace, for a Popen of
        the test's own. Its /run is the cluster's."""
        pid = str(self.pids[where])
        user = ["-U", "--preserve-credentials"] if self.own_user else []
        return ["nsenter", "-t", pid, *user, "-m", "-n"]

    def call(self, where: str, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function of the program there, in a process of its own; return what it returns.

        What it changes in the test's memory is lost. Raises what the function raises.
        """
        kinds = ("user", "net") if self.own_user else ("net",)
        return forked(self.pids[where], kinds, function, *arguments)

    # How the cluster is made.

    def _start(self) -> None:
        inner = []
        for name in NAMES:
            ours, theirs = socket.socketpair()
            self.lines[name] = ours
            self.files[name] = ours.makefile("rw")
            inner.append(theirs)
        user = ["-U", "-r"] if self.own_user else []
        script = Path(__file__).with_name("netcluster_servers.py")
        ends = [f"{name}={end.fileno()}" for name, end in zip(NAMES, inner, strict=True)]
        try:
            self.process = subprocess.Popen(
                ["unshare", *user, "-m", "-n", sys.executable, "-I", str(script), *ends],
                pass_fds=[end.fileno() for end in inner],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                text=True,
            )  # fmt: skip
        except OSError as error:
            raise Unavailable(f"`unshare` did not start: {error}") from error
        finally:
            for end in inner:
                end.close()
        for name in NAMES:
            self.pids[name] = self.request(name, "pid")
        # The lock of iptables-legacy is a file there: not the machine's.
        self.run("lan", "mount", "-t", "tmpfs", "kdns-tests", "/run")

    def _last_words(self, where: str, instead: str) -> str:
        """Say why a namespace's process does not answer."""
        said = ""
        if self.process is not None:
            for line in self.lines.values():
                with contextlib.suppress(OSError):
                    line.shutdown(socket.SHUT_RDWR)
            with contextlib.suppress(subprocess.TimeoutExpired):
                said = (self.process.communicate(timeout=5)[1] or "").strip()
        how = "`unshare -Urmn`" if self.own_user else "`unshare -mn`"
        return f"namespace {where} of {how}: {said or instead}"

    def _link(self) -> None:
        for name in NAMES:
            for key, value in {**SYSCTLS, **MORE.get(name, {})}.items():
                try:
                    self.request(name, "write", path=f"/proc/sys/{key}", text=value)
                except OSError as error:
                    if key not in OPTIONAL:
                        raise Unavailable(f"sysctl {key}={value}: {error}") from error
        # 127.0.0.1 is somebody else at the neighbour's: the node.
        batches = {name: ["link set lo up"] if name != "neighbour" else [] for name in NAMES}
        self._lan(batches)
        self._pods(batches)
        # In this order: links are made by lan and node, with the other end put into place.
        for name in NAMES:
            self.run(name, "ip", "-batch", "-", text="\n".join(batches[name]) + "\n")
        # A prohibit route would do, as it does for IPv6, but Linux sends only one ICMP error a
        # second for it (net.ipv4.route.error_cost, which no namespace can change).
        self.run(
            "lan",
            "iptables",
            "-A",
            "FORWARD",
            "-j",
            "REJECT",
            "--reject-with",
            "icmp-admin-prohibited",
        )

    def _lan(self, batches: dict[str, list[str]]) -> None:
        lines = batches["lan"]
        lines += [
            "link add br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0",
            "link set br0 up",
            f"addr add {lan('lan')}/24 dev br0",
            f"addr add {lan('lan', 6)}/64 dev br0 nodad",
            "route add default dev br0",
            "route add prohibit ::/0",
        ]
        for host in LAN:
            lines += [
                f"link add {host} type veth peer name eth0 netns {self.pids[host]}",
                f"link set {host} master br0 up",
            ]
            batches[host] += [
                "link set eth0 up",
                f"addr add {lan(host)}/24 dev eth0",
                f"addr add {lan(host, 6)}/64 dev eth0 nodad",
            ]
        for family, sources in OUTSIDE.items():
            width, anywhere = (32, "0.0.0.0/0") if family == 4 else (128, "::/0")
            for source in sources:
                batches["outside"].append(f"addr add {source}/{width} dev eth0")
                for host in ("lan", "node", "node2", "neighbour"):
                    batches[host].append(f"route add {source}/{width} via {lan('outside', family)}")
            for host, gateway in {
                "node": "lan", "node2": "lan", "outside": "node", "neighbour": "node"
            }.items():  # fmt: skip
                batches[host].append(f"route add {anywhere} via {lan(gateway, family)}")
            # Each node knows the way to the other's Pods.
            for host, number in {"node": 2, "node2": 1}.items():
                way = lan("node2" if number == 2 else "node", family)
                net = f"10.244.{number}.0/24" if family == 4 else f"fd00:10:244:{number}::/64"
                for whose in (host, "lan"):
                    batches[whose].append(f"route add {net} via {way}")
            for one in REMOTE_PODS:
                batches["node2"].append(f"addr add {pod(one, family, 2)}/{width} dev lo")
        batches["neighbour"].append(f"route add 127.0.0.1/32 via {lan('node')}")

    def _pods(self, batches: dict[str, list[str]]) -> None:
        for name, numbers in PODS.items():
            link = f"v-{name}"
            batches["node"] += [
                f"link add {link} type veth peer name eth0 netns {self.pids[name]}",
                f"link set {link} up",
                f"addr add {BRIDGE_ADDRESS[4]}/32 dev {link}",
                f"addr add {BRIDGE_ADDRESS[6]}/128 dev {link} nodad",
            ]
            lines = batches[name]
            lines.append("link set eth0 up")
            for number in numbers:
                lines += [
                    f"addr add {pod(number)}/32 dev eth0",
                    f"addr add {pod(number, 6)}/128 dev eth0 nodad",
                ]
                batches["node"] += [
                    f"route add {pod(number)}/32 dev {link}",
                    f"route add {pod(number, 6)}/128 dev {link}",
                ]
            lines += [
                f"route add {BRIDGE_ADDRESS[4]}/32 dev eth0 src {pod(numbers[0])}",
                f"route add default via {BRIDGE_ADDRESS[4]} dev eth0 src {pod(numbers[0])}",
                f"route add {BRIDGE_ADDRESS[6]}/128 dev eth0",
                f"route add ::/0 via {BRIDGE_ADDRESS[6]} dev eth0 src {pod(numbers[0], 6)}",
            ]

    def _listen(self) -> None:
        places = [(name, 1, PODS[name]) for name in ("pod-a", "pod-b")]
        for name, node, numbers in [*places, ("node2", 2, REMOTE_PODS)]:
            for number in numbers:
                for family in (4, 6):
                    for port in ENDPOINT_PORTS:
                        for protocol in ("tcp", "udp", "sctp"):
                            self.request(
                                name, "listen", protocol=protocol,
                                ip=pod(number, family, node), port=port,
                            )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Connection:
    """A connection, or UDP flow, that stays."""

    cluster: NetCluster
    where: str
    number: int

    def again(self) -> Reply:
        """Ask through it once more."""
        return Reply(*self.cluster.request(self.where, "again", number=self.number))

    def close(self) -> None:
        self.cluster.request(self.where, "hang_up", number=self.number)


def forked(pid: int, kinds: Sequence[str], function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a process of its own, in the namespaces of another; return what it
    returns. Raises what the function raises."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with open(writer, "wb") as out:
            try:
                _move_to(pid, kinds)
                out.write(pickle.dumps((True, function(*arguments))))
            except BaseException as error:
                out.write(pickle.dumps((False, error)))
            finally:
                out.close()
                os._exit(0)
    os.close(writer)
    with open(reader, "rb") as answer:
        good, result = pickle.loads(answer.read())
    os.waitpid(child, 0)
    if not good:
        raise result
    return cast(T, result)


def _move_to(pid: int, kinds: Iterable[str]) -> None:
    """Move this process, of one thread, to namespaces of another."""
    libc = ctypes.CDLL(None, use_errno=True)
    for kind in kinds:
        with open(f"/proc/{pid}/ns/{kind}") as namespace:
            if libc.setns(namespace.fileno(), 0) != 0:
                code = ctypes.get_errno()
                raise OSError(code, f"setns to {namespace.name}: {os.strerror(code)}")


def enough(endpoints: int) -> int:
    """Return how many connections hit each of that many equally likely endpoints, but for one
    time in 10^15."""
    if endpoints < 2:
        return 4
    return math.ceil(math.log(endpoints * 1e15) / -math.log(1 - 1 / endpoints))
