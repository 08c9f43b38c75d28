"""Floods, and what they cost in memory: kdns in a process of its own, its RSS before and after.

The stock Deployment kills what takes more than 170 Mi. Floods that stay short of that with
room to spare are the aim; how fast they are answered is the bench's subject. The long
versions run with -m soak.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import selectors
import socket
import string
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kdns.dns import types as t
from kdns.dns.message import parse_message, render_query
from kdns.dns.name import parse_name

PROJECT = Path(__file__).resolve().parent.parent
LIMIT = 170 << 10  # KiB: resources.limits.memory of the stock Deployment
WINDOW = 100  # questions under way at a time, so that none is lost on the way

COREFILE = """.:0 {{
    bind 127.0.0.1
    errors
    health 127.0.0.1:0
    ready 127.0.0.1:0
    kubernetes cluster.local in-addr.arpa ip6.arpa {{
        {source}
        pods insecure
        fallthrough in-addr.arpa ip6.arpa
        ttl 30
    }}
    prometheus 127.0.0.1:0
    forward . 127.0.0.1:{upstream} {{
        max_concurrent 1000
    }}
    cache 30 {{
        disable success cluster.local
        disable denial cluster.local
    }}
    reload
    loadbalance
}}
"""
# One Service, and one with enough addresses for an answer of 64 kB.
OBJECTS = """
apiVersion: v1
kind: Service
metadata: {{name: web, namespace: default}}
spec: {{clusterIP: 10.96.0.50, ports: [{{name: http, port: 80}}]}}
---
apiVersion: v1
kind: Service
metadata: {{name: big, namespace: default}}
spec: {{clusterIP: None, ports: [{{name: http, port: 80}}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: big-1, namespace: default, labels: {{kubernetes.io/service-name: big}}}}
addressType: IPv4
endpoints: [{endpoints}]
ports: [{{name: http, port: 80, protocol: TCP}}]
"""
WEB = parse_name("web.default.svc.cluster.local.")
BIG = parse_name("big.default.svc.cluster.local.")


@dataclass
class Process:
    """A kdns of its own."""

    pid: int
    port: int

    def memory(self, field: str = "VmRSS") -> int:
        """Return KiB: VmRSS now, VmHWM at most so far."""
        text = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE)
        assert found is not None
        return int(found[1])


@contextlib.contextmanager
def running(*command: object) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=PROJECT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def kdns(folder: Path, source: str = "", upstream: int = 1) -> Iterator[Process]:
    if not source:
        endpoints = (f"{{addresses: [10.244.{n >> 8}.{n & 255}]}}" for n in range(1, 2501))
        (folder / "objects.yaml").write_text(OBJECTS.format(endpoints=", ".join(endpoints)))
        source = f"manifests {folder}/objects.yaml"
    conf = folder / "Corefile"
    conf.write_text(COREFILE.format(source=source, upstream=upstream))
    with running("-m", "kdns", "serve", "-conf", conf) as process:
        assert process.stdout is not None
        found = re.match(r"\.:(\d+) on 127\.0\.0\.1", process.stdout.readline())
        assert found is not None, "it did not start"
        yield Process(process.pid, int(found[1]))
        assert process.poll() is None, "it is still there"


def ask(port: int, questions: Iterator[tuple[bytes, int]], timeout: float = 10) -> dict[int, int]:
    """Ask over UDP, some at a time, each until it is answered; return how often each rcode
    came."""
    rcodes: dict[int, int] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("127.0.0.1", port))
        sock.settimeout(timeout)
        waiting: set[int] = set()
        qid = 0
        for name, qtype in questions:
            qid = qid + 1 & 0xFFFF
            sock.send(render_query(qid, name, qtype))
            waiting.add(qid)
            if len(waiting) >= WINDOW:
                _receive(sock, waiting, rcodes)
        while waiting:
            _receive(sock, waiting, rcodes)
    return rcodes


def _receive(sock: socket.socket, waiting: set[int], rcodes: dict[int, int]) -> None:
    wire = sock.recv(65535)
    waiting.remove(wire[0] << 8 | wire[1])
    rcodes[wire[3] & 15] = rcodes.get(wire[3] & 15, 0) + 1


def random_names(count: int, suffix: str) -> Iterator[tuple[bytes, int]]:
    rng = random.Random(4711)
    tail = parse_name(suffix)
    for _ in range(count):
        label = "".join(rng.choices(string.ascii_lowercase, k=40)).encode()
        yield bytes((len(label),)) + label + tail, t.A


def framed(wire: bytes) -> bytes:
    return struct.pack("!H", len(wire)) + wire


def web_is_answered(process: Process) -> bool:
    """Ask over UDP and TCP."""
    wire = render_query(7, WEB, t.A)
    length = b""
    for _ in range(100):
        with socket.create_connection(("127.0.0.1", process.port), 5) as sock:
            sock.sendall(framed(wire))
            with contextlib.suppress(ConnectionResetError):
                length = sock.recv(2, socket.MSG_WAITALL)
            if length:
                over_tcp = parse_message(
                    sock.recv(struct.unpack("!H", length)[0], socket.MSG_WAITALL)
                )
                break
        time.sleep(0.05)  # the server has not yet heard that all others have left
    assert length, "a new connection is closed unanswered"
    return ask(process.port, iter([(WEB, t.A)])) == {t.NOERROR: 1} and len(over_tcp.answer) == 1


@contextlib.contextmanager
def many_connections(port: int, count: int) -> Iterator[list[socket.socket]]:
    sockets: list[socket.socket] = []
    try:
        for _ in range(count):
            sock = socket.create_connection(("127.0.0.1", port), 10)
            sock.setblocking(False)
            sockets.append(sock)
        yield sockets
    finally:
        for sock in sockets:
            sock.close()


def push(sockets: list[socket.socket], content: bytes, rounds: int) -> int:
    """Write `content` to all of them, over and over, for as long as they take it; return the
    octets taken."""
    taken = 0
    with selectors.DefaultSelector() as selector:
        left = {sock: memoryview(content * rounds) for sock in sockets}
        for sock in sockets:
            selector.register(sock, selectors.EVENT_WRITE)
        while selector.get_map():
            ready = selector.select(1.0)
            if not ready:
                break  # nobody takes more
            for key, _ in ready:
                one = key.fileobj
                assert isinstance(one, socket.socket)
                try:
                    sent = one.send(left[one][: 1 << 16])
                except BlockingIOError:
                    continue
                except OSError:
                    selector.unregister(one)  # it was shown the door
                    continue
                taken += sent
                left[one] = left[one][sent:]
                if not left[one]:
                    selector.unregister(one)
    return taken


# --- a cluster of ordinary size -----------------------------------------------------------------


def test_a_thousand_services_stay_within_the_stock_memory_limit(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    with running("tests/api_replay.py", "--services", 1000) as api:
        assert api.stdout is not None
        url = api.stdout.readline().strip()
        config = tmp_path / "kubeconfig"  # as in a cluster, this loads the kubernetes package
        config.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "c",
                    "clusters": [{"name": "k", "cluster": {"server": url}}],
                    "users": [{"name": "u", "user": {}}],
                    "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
                }
            )
        )
        with kdns(tmp_path, f"kubeconfig {config}") as process:
            started = process.memory()
            names = [f"svc-{n}.bench-{n // 100}.svc.cluster.local." for n in range(1000)]
            for _ in range(3):
                for qtype in (t.A, t.AAAA, t.SRV):
                    found = ask(process.port, ((parse_name(n), qtype) for n in names))
                    assert found == {t.NOERROR: 1000}
            found = ask(process.port, random_names(5000, "bench-1.svc.cluster.local."))
            assert found == {t.NXDOMAIN: 5000}
            record_property("KiB at start", started)
            record_property("KiB under load", process.memory())
            record_property("KiB at most", process.memory("VmHWM"))
            print(f"RSS at start {started >> 10} Mi, under load {process.memory() >> 10} Mi,"
                  f" at most {process.memory('VmHWM') >> 10} Mi")  # fmt: skip
            assert process.memory("VmHWM") < LIMIT


# --- floods of questions ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "count", [20_000, pytest.param(200_000, marks=(pytest.mark.soak, pytest.mark.timeout(600)))]
)
@pytest.mark.parametrize("suffix", ["default.svc.cluster.local.", "example.org."])
def test_names_that_never_come_again_fill_no_memory(
    suffix: str, count: int, tmp_path: Path
) -> None:
    other = tmp_path / "outside"
    other.mkdir()
    conf = other / "Corefile"
    conf.write_text(
        ".:0 {\n bind 127.0.0.1\n template ANY ANY {\n rcode NXDOMAIN\n"
        ' authority ". 60 IN SOA ns. host. 1 60 60 60 60"\n }\n}\n'
    )
    with running("-m", "kdns", "serve", "-conf", conf) as outside:
        assert outside.stdout is not None
        port = int(outside.stdout.readline().split()[0].partition(":")[2])
        with kdns(tmp_path, upstream=port) as process:
            ask(process.port, random_names(2000, "warm.up.svc.cluster.local."))
            before = process.memory()
            assert ask(process.port, random_names(count, suffix)) == {t.NXDOMAIN: count}
            grown = process.memory() - before
            print(f"{count} names: RSS {before >> 10} Mi + {grown >> 10} Mi")
            # The negative cache holds 9,984 replies (cache), the packet cache hashes (65,536).
            assert grown < 40 << 10
            assert web_is_answered(process)


def test_questions_for_an_upstream_that_is_silent_are_bounded(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        with kdns(tmp_path, upstream=silent.getsockname()[1]) as process:
            before = process.memory()
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.connect(("127.0.0.1", process.port))
                for n, (name, qtype) in enumerate(random_names(20_000, "example.org.")):
                    sock.send(render_query(n & 0xFFFF, name, qtype))
                    if n % WINDOW == 0:  # so that the flood is read and not lost on the way
                        assert ask(process.port, iter([(WEB, t.A)])) == {t.NOERROR: 1}
            grown = process.memory() - before
            print(f"RSS {before >> 10} Mi + {grown >> 10} Mi")
            assert grown < 40 << 10  # max_concurrent 1000
            assert web_is_answered(process)


# --- floods over TCP ----------------------------------------------------------------------------


def test_idle_connections_are_bounded_and_cheap(tmp_path: Path) -> None:
    with kdns(tmp_path) as process:
        before = process.memory()
        with many_connections(process.port, 1500) as sockets:
            assert ask(process.port, iter([(WEB, t.A)])) == {t.NOERROR: 1}
            grown = process.memory() - before
            closed = 0
            for _ in range(100):
                closed = sum(_is_closed(sock) for sock in sockets)
                if closed >= 500:
                    break
                # While it takes and turns away the rest, UDP is answered.
                assert ask(process.port, iter([(WEB, t.A)])) == {t.NOERROR: 1}
        print(f"RSS {before >> 10} Mi + {grown >> 10} Mi, {closed} turned away")
        assert closed >= 500, "a listener takes 1,000"
        assert grown < 20 << 10
        assert web_is_answered(process)


def test_a_low_limit_of_open_files_is_raised_as_far_as_allowed(tmp_path: Path) -> None:
    conf = tmp_path / "Corefile"
    conf.write_text(".:0 {\n bind 127.0.0.1\n whoami\n}\n")
    command = 'ulimit -Sn 256; ulimit -Hn 3000; exec "$@"'
    with subprocess.Popen(
        ["sh", "-c", command, "sh", sys.executable, "-m", "kdns", "serve", "-conf", str(conf)],
        cwd=PROJECT, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stdout.readline().startswith(".:")
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        process.terminate()
    assert re.search(r"^Max open files +3000 +3000 ", limits, re.MULTILINE), limits


def _is_closed(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


HEADER = struct.pack("!6H", 1, 0, 1, 0, 0, 0)
FLOODS = {
    "zeros": framed(bytes(65535)),
    "ones": framed(b"\xff" * 65535),
    "a question and 64 kB behind it": framed(
        HEADER + WEB + b"\0\1\0\1" + bytes(65535 - 12 - len(WEB) - 4)
    ),
    "a question counted 65,535 times": framed(
        struct.pack("!6H", 1, 0, 65535, 0, 0, 0) + (WEB + b"\0\1\0\1") * 1800
    ),
    "pointers to pointers": framed(HEADER + b"\xc0\x0c" * 32700),
}


@pytest.mark.parametrize("case", FLOODS)
def test_64_kb_messages_over_tcp(case: str, tmp_path: Path) -> None:
    with kdns(tmp_path) as process:
        before = process.memory()
        with many_connections(process.port, 20) as sockets:
            taken = push(sockets, FLOODS[case], 8)
            grown = process.memory() - before
        print(f"{taken >> 20} MiB taken, RSS {before >> 10} Mi + {grown >> 10} Mi")
        assert taken
        assert grown < 20 << 10
        assert web_is_answered(process)


def test_messages_that_never_end(tmp_path: Path) -> None:
    """A thousand connections send 64 kB but for the last octet."""
    with kdns(tmp_path) as process:
        before = process.memory()
        with many_connections(process.port, 900) as sockets:
            push(sockets, framed(bytes(65535))[:-1], 1)
            assert ask(process.port, iter([(WEB, t.A)])) == {t.NOERROR: 1}
            grown = process.memory("VmHWM") - before
        print(f"RSS {before >> 10} Mi + {grown >> 10} Mi at most")
        assert grown < 40 << 10
        assert web_is_answered(process)


def test_readers_that_never_read(tmp_path: Path) -> None:
    """Hundreds of connections ask for large answers and leave them where they are."""
    with kdns(tmp_path) as process:
        before = process.memory()
        with many_connections(process.port, 600) as sockets:
            for sock in sockets:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            push(sockets, framed(render_query(1, BIG, t.A)), 500)
            assert ask(process.port, iter([(WEB, t.A)])) == {t.NOERROR: 1}
            grown = process.memory("VmHWM") - before
        print(f"RSS {before >> 10} Mi + {grown >> 10} Mi at most")
        assert grown < 40 << 10
        assert web_is_answered(process)
