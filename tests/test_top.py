"""`kdns top`: what query events add up to, and the command over a socket, a file and a pipe."""

from __future__ import annotations

import io
import json
import os
import pty
import random
import select
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from running_up import PATIENCE, PROJECT, Up

from kdns.explain.top import BOUNDS, KEEP, MAX_OPEN, Count, Table, Times, Top, client_of
from kdns.explain.top_text import page

CLUSTER = ("default.svc.cluster.local", "svc.cluster.local", "cluster.local")


def event(name: str, rcode: str = "NOERROR", **more: Any) -> dict[str, Any]:
    return {
        "client": "10.244.1.5:40000", "name": f"{name}.", "type": "A", "rcode": rcode,
        "duration_ms": 0.2, **more,
    }  # fmt: skip


def lookup(
    base: str, *, found: int | None = None, search: Iterable[str] = CLUSTER,
    types: tuple[str, ...] = ("A", "AAAA"), **more: Any,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The questions of one look-up, as glibc puts them: A and AAAA of each candidate.

    found -- which candidate is there, counted from 0; the last one is the name as it is
    """
    names = [f"{base}.{domain}" for domain in search] + [base]
    for at, name in enumerate(names):
        rcode = "NOERROR" if at == found else "NXDOMAIN"
        for qtype in types:
            yield event(name, rcode, type=qtype, **more)
        if at == found:
            return


def counted(events: Iterable[dict[str, Any]], window: float = 0, step: float = 0.01) -> Any:
    top, now = Top(window), 1000.0
    for one in events:
        top.take(one, now)
        now += step
    return top.summary(now)


# --- what is counted --------------------------------------------------------------------------


def test_who_asks_what() -> None:
    events = [
        *[event("a", pod="shop/web-1")] * 3,
        *[event("b", "NXDOMAIN", pod="shop/web-1")] * 2,
        *[event("a", client="[fd00::7]:53")] * 4,
        event("a", "SERVFAIL"),
    ]
    found = counted(events, step=1.0)
    assert (found["queries"], found["seconds"], found["qps"]) == (10, 10.0, 1.0)
    assert found["rcodes"] == {"NOERROR": 7, "NXDOMAIN": 2, "SERVFAIL": 1}
    clients = [(c["client"], c["queries"], c["nxdomain"], c["failed"]) for c in found["clients"]]
    assert clients == [("shop/web-1", 5, 2, 0), ("fd00::7", 4, 0, 0), ("10.244.1.5", 1, 0, 1)]
    questions = [(q["client"], q["name"], q["qps"]) for q in found["questions"]]
    assert questions == [
        ("fd00::7", "a.", 0.4), ("shop/web-1", "a.", 0.3), ("shop/web-1", "b.", 0.2),
        ("10.244.1.5", "a.", 0.1),
    ]  # fmt: skip
    assert (found["names"][0]["name"], found["names"][0]["queries"]) == ("a.", 8)


@pytest.mark.parametrize(
    ("one", "who"),
    [
        ({"client": "10.1.1.1:53"}, "10.1.1.1"),
        ({"client": "[fe80::1%eth0]:53"}, "fe80::1%eth0"),
        ({"client": "10.1.1.1:53", "pod": "a/b"}, "a/b"),
        ({"client": "10.1.1.1:53", "pod": ""}, "10.1.1.1"),
        ({}, "?"),
    ],
)
def test_a_client_is_its_pod_where_known(one: dict[str, Any], who: str) -> None:
    assert client_of(one) == who


def test_latency_upstreams_and_hit_ratio() -> None:
    quick = [event("a", upstream="10.0.0.1:53", duration_ms=2.0)] * 8
    slow = [event("b", upstream="10.0.0.2:53", duration_ms=900.0)] * 1
    dead = [event("c", "SERVFAIL", upstream="10.0.0.2:53", duration_ms=6000.0)] * 1
    cached = [event("a", cache_age=3.0)] * 30
    own = [event("web", cache_age=1.0, object="Service default/web")] * 60
    found = counted([*quick, *slow, *dead, *cached, *own])
    assert found["cache"] == {"hits": 30, "forwarded": 10, "hit_ratio": 0.75}
    slowest = [(u["upstream"], u["queries"], u["failed"]) for u in found["upstreams"]]
    assert slowest == [("10.0.0.2:53", 2, 1), ("10.0.0.1:53", 8, 0)]
    assert found["upstreams"][0]["max"] == 6000.0
    assert found["latency_ms"]["p50"] == pytest.approx(0.2, rel=0.25)
    assert found["latency_ms"]["p99"] == pytest.approx(900, rel=0.25)


def test_percentiles_are_right_within_their_bounds() -> None:
    rng = random.Random(7)
    values = sorted(rng.lognormvariate(0, 2) for _ in range(5000))
    times = Times()
    for value in values:
        times.add(value)
    for share in (0.5, 0.9, 0.99):
        true = values[int(share * len(values)) - 1]
        assert true <= times.at(share) * 1.0001 <= true * 1.26
    assert times.at(1.0) == values[-1]
    assert max(BOUNDS) > 60_000  # slower than any upstream may be


def test_only_the_window_counts() -> None:
    top = Top(window=60)
    for second in range(600):
        top.take(event("old" if second < 500 else "new"), float(second))
    found = top.summary(600.0)
    assert {row["name"] for row in found["names"]} == {"new."}
    assert 50 <= found["seconds"] <= 60
    assert found["qps"] == pytest.approx(1.0, abs=0.05)


def test_lost_lines_are_told_and_strange_ones_passed_over() -> None:
    found = counted([{"lost": 7}, event("a"), {"level": "info"}, {"name": 5, "rcode": "NOERROR"}])
    assert (found["queries"], found["lost"], found["unread"]) == (1, 7, 2)


def test_nobody_asked() -> None:
    found = Top().summary(1000.0)
    assert (found["queries"], found["qps"], found["cache"]["hit_ratio"]) == (0, 0.0, None)


# --- search lists -----------------------------------------------------------------------------

NODE = (*CLUSTER, "corp.example", "lab.corp.example")

STORMS: dict[str, tuple[list[dict[str, Any]], list[tuple[str, int, int, str]]]] = {
    # (base, look-ups, wasted, advice)
    "a name outside, glibc": (
        [*lookup("api.example.com", found=3)] * 5,
        [("api.example.com", 5, 30, "write 'api.example.com.' with its final dot, or set"
          " dnsConfig ndots:2 for the Pod, and it is asked for as it is first")],
    ),
    "a name outside, with the node's domains": (
        [*lookup("api.example.com", found=5, search=NODE, types=("A",))] * 2,
        [("api.example.com", 2, 10, "write 'api.example.com.' with its final dot, or set"
          " dnsConfig ndots:2 for the Pod, and it is asked for as it is first")],
    ),
    "a name outside that is not there": (
        [*lookup("api.exmaple.com")],
        [("api.exmaple.com", 1, 8, "'api.exmaple.com' is nowhere: who asks for it? Its final dot"
          " would spare the search list")],
    ),
    "a Service of another namespace": (
        [*lookup("web.shop", found=1)] * 3,
        [("web.shop", 3, 6, "write 'web.shop.svc.cluster.local.' with its final dot: it is found"
          " at once")],
    ),
    "a full name without its final dot": (
        [*lookup("web.shop.svc.cluster.local", found=3)],
        [("web.shop.svc.cluster.local", 1, 6, "write 'web.shop.svc.cluster.local.' with its final"
          " dot, or set dnsConfig ndots:4 for the Pod, and it is asked for as it is first")],
    ),
    "a Service that is not there": (
        [*lookup("wbe")],
        [("wbe", 1, 8, "there is no Service 'wbe' in namespace default, and no such name"
          " elsewhere")],
    ),
    "musl asks for all at once, in any order": (
        [one for pair in zip(lookup("a.example.com", found=3, types=("A",)),
                             lookup("a.example.com", found=3, types=("AAAA",)), strict=True)
         for one in pair],
        [("a.example.com", 1, 6, "write 'a.example.com.' with its final dot, or set dnsConfig"
          " ndots:2 for the Pod, and it is asked for as it is first")],
    ),
    "two names that begin alike": (
        [*lookup("api.example.com", found=3, types=("A",)),
         *lookup("api.example.org", found=3, types=("A",))],
        [("api.example.com", 1, 3, ""), ("api.example.org", 1, 3, "")],
    ),
    "a short name first, then a longer one": (
        [*lookup("api", found=0, types=("A",)), *lookup("api.example.com", found=3, types=("A",))],
        [("api.example.com", 1, 3, "")],
    ),
    "a full name that is not there": (
        [event("wbe.shop.svc.cluster.local", "NXDOMAIN")] * 9, []),
    "a Service of one's own namespace": ([*lookup("web", found=0)] * 9, []),
    "a name with its final dot": ([event("api.example.com")] * 9, []),
    "a missing name outside, with its final dot": ([event("nix.example.com", "NXDOMAIN")] * 9, []),
    "reverse names": ([event("9.9.9.9.in-addr.arpa", "NXDOMAIN")] * 9, []),
}  # fmt: skip


@pytest.mark.parametrize("case", STORMS)
def test_what_search_lists_waste(case: str) -> None:
    events, expected = STORMS[case]
    found = counted(events, step=0.001)["storms"]
    assert [(s["name"], s["lookups"], s["wasted"]) for s in found] == [one[:3] for one in expected]
    for storm, (_, lookups, wasted, advice) in zip(found, expected, strict=True):
        assert storm["wasted_per_lookup"] == round(wasted / lookups, 1)
        assert storm["advice"] == (advice or storm["advice"])


def test_storms_are_told_apart_by_client() -> None:
    events = [
        one
        for pair in zip(
            lookup("api.example.com", found=3, pod="a/x"),
            lookup("api.example.com", found=3, pod="a/y"),
            strict=True,
        )
        for one in pair
    ]
    found = counted(events)["storms"]
    assert sorted((s["client"], s["lookups"], s["wasted"]) for s in found) == [
        ("a/x", 1, 6), ("a/y", 1, 6),
    ]  # fmt: skip


def test_the_domain_of_the_cluster_may_be_another() -> None:
    search = ("default.svc.k8s.corp", "svc.k8s.corp", "k8s.corp")
    top = Top(0, "k8s.corp.")
    for one in lookup("api.example.com", found=3, search=search):
        top.take(one, 1.0)
    (storm,) = top.summary(1.0)["storms"]
    assert (storm["name"], storm["wasted"]) == ("api.example.com", 6)


# --- bounds -----------------------------------------------------------------------------------


def test_a_flood_of_names_stays_within_bounds_and_keeps_the_greatest() -> None:
    top, heavy = Top(0), 0
    for number in range(20 * KEEP):
        name = f"x{number}.default.svc.cluster.local"
        top.take(event(name, "NXDOMAIN", client=f"10.{number >> 8}.{number & 255}.1:5"), 1.0)
        if number % 10 == 0:
            top.take(event("heavy", pod="a/heavy"), 1.0)
            heavy += 1
    (part,) = top._slices
    assert len(part.storms.rows) > 0
    for table in (part.clients, part.questions, part.names, part.storms):
        assert len(table.rows) <= 2 * KEEP
    assert len(top._searches._open) <= MAX_OPEN
    found = top.summary(1.0)
    first = found["clients"][0]
    assert (first["client"], first["queries"]) == ("a/heavy", heavy)
    assert found["uncounted"] >= 1


def test_a_table_says_what_it_may_lack() -> None:
    table: Table[int, Count] = Table(Count, keep=10)
    counts = {key: key % 7 + 1 for key in range(100)}
    for key, times in counts.items():
        for _ in range(times):
            table.row(key).add("NOERROR")
    for key, times in counts.items():
        held = table.rows[key].weight if key in table.rows else 0
        assert held <= times <= held + table.floor


# --- what it looks like -----------------------------------------------------------------------


@pytest.mark.parametrize("width", [30, 40, 60, 80, 120, 200])
@pytest.mark.parametrize("height", [8, 12, 24, 50])
def test_a_page_fits_its_terminal(width: int, height: int) -> None:
    events = [
        *lookup("a-rather-long-name.of-some-team.example.com", found=3),
        *lookup("another.example.com", found=3, pod="a-namespace/a-deployment-7d9f8c6b5-x2x4z"),
        *[event(f"n{n}.example.com", upstream=f"10.0.0.{n % 9}:53") for n in range(60)],
        event("bad", "SERVFAIL", upstream="10.0.0.1:53", duration_ms=4000),
    ]
    console = Console(width=width, height=height, record=True, file=io.StringIO())
    console.print(page(counted(events), "source", width, height))
    lines = console.export_text().splitlines()
    assert all(len(line) <= width for line in lines)
    assert "queries/s" in lines[0]
    # Advice is told in full, and so may take more lines where it is narrow.
    if width >= 120:
        assert len(lines) <= height


# --- the command ------------------------------------------------------------------------------


def kdns(*words: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kdns", "top", *words], input=text, cwd=PROJECT, text=True,
        capture_output=True, check=False, timeout=4 * PATIENCE,
        env={key: value for key, value in os.environ.items() if key not in ("KDNS_CONTROL",)}
        | {"KUBECONFIG": "/nowhere"},
    )  # fmt: skip


def log_lines() -> str:
    events = [*lookup("api.example.com", found=3)] * 4
    lines = []
    for number, one in enumerate(events):
        stamp = {"time": f"2025-10-09T08:53:{number % 60:02d}.250Z"}
        lines.append(f"[pod/kdns-abc/kdns] {json.dumps(stamp | one)}")
    return "\n".join(["[INFO] plugin/reload: x", "{broken", "[1, 2]", *lines, ""])


def test_lines_of_a_log_from_standard_input_as_json() -> None:
    done = kdns("-", "-o", "json", text=log_lines())
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert (found["queries"], found["seconds"]) == (32, 31.0)
    assert found["storms"][0]["wasted_per_lookup"] == 6.0


def test_a_file_as_text(tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_text(log_lines())
    done = kdns(str(file))
    assert (done.returncode, done.stderr) == (0, "")
    assert "who asks what" in done.stdout
    assert "write 'api.example.com.' with its final dot, or set dnsConfig ndots:2" in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "no running kdns is found: say --control PATH"),
        (("--control", "/nowhere/s"), "control socket /nowhere/s: is not there: is kdns running?"),
        (("/nowhere/log",), "/nowhere/log: cannot be read: No such file or directory"),
        (("/",), "/: is a folder"),
    ],
)
def test_what_cannot_be_read_is_told(words: tuple[str, ...], said: str) -> None:
    done = kdns(*words)
    assert done.returncode == 1
    assert done.stderr.startswith(f"kdns: {said}")


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, *argv: str, before: str = "exec") -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(PROJECT)
            os.environ.update(TERM="xterm", COLUMNS="80", LINES="24", KUBECONFIG="/no")
            program = shlex.join([sys.executable, "-m", "kdns", *argv])
            os.execv("/bin/sh", ["sh", "-c", f"{before} {program}"])
        self.seen = ""

    def until(self, text: str) -> None:
        end = time.monotonic() + 2 * PATIENCE
        while text not in self.seen:
            assert time.monotonic() < end, f"no {text!r} in {self.seen[-2000:]!r}"
            self._read()

    def _read(self) -> bool:
        if not select.select([self.fd], [], [], 0.2)[0]:
            return True
        try:
            octets = os.read(self.fd, 65536)
        except OSError:  # the other side has gone
            return False
        self.seen += octets.decode("utf-8", "replace")
        return bool(octets)

    def end(self, keys: bytes) -> int:
        os.write(self.fd, keys)
        while self._read():
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                break
        else:
            _, status = os.waitpid(self.pid, 0)
        os.close(self.fd)
        return os.waitstatus_to_exitcode(status)


@pytest.fixture(scope="module")
def up() -> Iterator[Up]:
    with tempfile.TemporaryDirectory(prefix="kdns-") as folder, Up("--data-dir", folder) as running:
        yield running


@pytest.mark.parametrize("key", [b"q", b"\x03"], ids=["q", "Ctrl-C"])
def test_the_live_view_of_a_running_kdns(up: Up, key: bytes) -> None:
    terminal = Terminal("top", "--control", str(up.facts["control"]), "--interval", "0.2")
    terminal.until("nobody has asked yet")
    end = time.monotonic() + 2 * PATIENCE
    while "kubernetes.default.svc" not in terminal.seen:
        assert time.monotonic() < end, terminal.seen[-3000:]
        up.dig("kubernetes")
        terminal._read()
    terminal.until("127.0.0.1")
    assert terminal.end(key) == 0
    assert "Traceback" not in terminal.seen
    assert "\x1b[?1049l" in terminal.seen, "the screen is as it was before"


def test_the_live_view_of_a_pipe_takes_keys_from_the_terminal(tmp_path: Path) -> None:
    """kubectl logs -f ds/kdns | kdns top -"""
    file = tmp_path / "log"
    file.write_text(log_lines())
    terminal = Terminal("top", "-", "--interval", "0.2", before=f"cat {file} - <&- |")
    terminal.until("api.example.com")
    terminal.until("each")
    assert terminal.end(b"q") == 0
    assert "Traceback" not in terminal.seen


def test_once_from_a_running_kdns(up: Up) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "kdns", "top", "--control", str(up.facts["control"]), "-o", "json",
         "--for", "1"],
        cwd=PROJECT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    while process.poll() is None:
        up.dig("nosuch.example.cluster")
    assert process.stdout is not None
    found = json.loads(process.stdout.read())
    process.stdout.close()
    assert process.returncode == 0
    assert found["storms"][0]["name"] == "nosuch.example.cluster"
    assert found["rcodes"]["NXDOMAIN"] > 0
    assert found["latency_ms"]["p50"] > 0
