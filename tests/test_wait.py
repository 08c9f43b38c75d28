"""`kdns wait`: back when a name resolves and connects; else it says why not."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from running import RunningKdns, free_port
from running_up import PATIENCE, PROJECT, Up

from kdns.explain.wait import Target, attempt, parse_target, place, wait
from kdns.server.client import Server


def _record(name: str, qtype: str, address: str) -> str:
    answer = f'answer "{{{{ .Name }}}} 5 IN {qtype} {address}"' if address else "rcode NOERROR"
    return f"template IN {qtype} {name} {{\n {answer}\n}}\n"


def _rcode(name: str, rcode: str) -> str:
    return f"template ANY ANY {name} {{\n rcode {rcode}\n}}\n"


COREFILE = f""".:0 {{
bind 127.0.0.1
{_record("web.default.svc.cluster.local", "A", "127.0.0.1")}
{_record("web.default.svc.cluster.local", "AAAA", "")}
{_record("two.shop.svc.cluster.local", "A", "127.0.0.1")}
{_record("two.shop.svc.cluster.local", "AAAA", "::1")}
{_record("outside.example", "A", "127.0.0.1")}
{_rcode("broken.default.svc.cluster.local", "SERVFAIL")}
{_rcode("empty.default.svc.cluster.local", "NOERROR")}
{_rcode("", "NXDOMAIN")}
}}
"""


async def kdns_wait(*words: str, server: RunningKdns | None = None) -> tuple[int, str, str]:
    """Run the command; return exit code, what it printed, what it complained."""
    where = ("--server", "127.0.0.1", "--port", str(server.port)) if server else ()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "kdns", "wait", *words, *where, cwd=PROJECT,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "KUBECONFIG": "/nowhere"},
    )  # fmt: skip
    out, err = await asyncio.wait_for(process.communicate(), 4 * PATIENCE)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


@contextmanager
def listening(kind: socket.SocketKind = socket.SOCK_STREAM) -> Iterator[int]:
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            sock.listen()
        yield sock.getsockname()[1]


@pytest.mark.asyncio
async def test_a_name_that_resolves_and_connects() -> None:
    async with RunningKdns(COREFILE) as server:
        with listening() as port:
            code, out, err = await kdns_wait(f"web:{port}", server=server)
    assert (code, err) == (0, "")
    told = rf"web\.default\.svc\.cluster\.local\. is 127\.0\.0\.1; 127\.0\.0\.1:{port} connects"
    assert re.fullmatch(told + r" \(\d+\.\d\d s\)\n", out)


@pytest.mark.asyncio
async def test_of_several_addresses_one_that_connects_is_enough() -> None:
    async with RunningKdns(COREFILE) as server:
        with listening() as port:
            code, out, _ = await kdns_wait(f"two.shop:{port}", server=server)
    assert code == 0
    assert out.startswith("two.shop.svc.cluster.local. is 127.0.0.1, ::1; ")


# words -> (exit code, what is said of it)
SAID: dict[str, tuple[tuple[str, ...], int, str]] = {
    "it resolves, and that is all that was asked": (
        ("web",), 0, r"web\.default\.svc\.cluster\.local\. is 127\.0\.0\.1 \("),
    "a name elsewhere, found last": (
        ("outside.example",), 0, r"outside\.example\. is 127\.0\.0\.1"),
    "as of another namespace": (
        ("two", "--search", "shop"), 0, r"two\.shop\.svc\.cluster\.local\. is"),
    "quietly": (("web", "-q"), 0, r"$"),
    "an address needs no name": (("127.0.0.1",), 0, r"127\.0\.0\.1 is 127\.0\.0\.1"),
    "a name that is not there": (
        ("nosuch",), 1,
        r"kdns: nosuch is not there after 0 s: nosuch\.default\.svc\.cluster\.local\. does not"
        r" exist \(NXDOMAIN\), nor do 3 more of the search list \(asked 127\.0\.0\.1 port \d+\)"),
    "a name without an address": (
        ("empty",), 1, r"kdns: .*: empty\.default\.svc\.cluster\.local\. is there and has no"
                       r" address \(NOERROR without answers\)"),
    "a server that fails": (
        ("broken",), 1, r"kdns: .*: broken\.default\.svc\.cluster\.local\.: the server answers"
                        r" SERVFAIL"),
    "a port that nobody listens on": (
        ("web:{closed}",), 1,
        r"kdns: web:\d+ is not there after 0 s; web\.default\.svc\.cluster\.local\. is"
        r" 127\.0\.0\.1: 127\.0\.0\.1:\d+ refuses the connection: nobody listens there"),
    "a UDP port that nobody listens on": (
        ("web:{closed}", "--udp"), 1, r"kdns: .*127\.0\.0\.1:\d+ refuses the connection"),
    "a UDP port that somebody listens on": (
        ("web:{udp}", "--udp"), 0, r".* is 127\.0\.0\.1; nothing refuses datagrams to port \d+"),
    "no port": (("web:http",), 2, r"kdns: 'http' is not a port: NAME:PORT takes a number"),
    "UDP without a port": (("web", "--udp"), 2, r"kdns: --udp needs a port: NAME:PORT"),
    "no name": (("a..b",), 2, r"kdns: not a domain name: "),
    "no duration": (("web", "--timeout", "soon"), 2, r"kdns: .*'soon' is not a duration"),
    "no such socket": (
        ("web", "--control", "/nowhere/s"), 1, r"kdns: control socket /nowhere/s: is not there"),
}  # fmt: skip


@pytest.mark.asyncio
@pytest.mark.parametrize("case", SAID)
async def test_what_is_said(case: str) -> None:
    words, expected, said = SAID[case]
    with listening(socket.SOCK_DGRAM) as udp:
        filled = [word.format(closed=free_port(), udp=udp) for word in words]
        timeout = () if "--timeout" in words else ("--timeout", "0")
        async with RunningKdns(COREFILE) as server:
            code, out, err = await kdns_wait(*filled, *timeout, server=server)
    assert code == expected, err
    assert re.match(said, out if expected == 0 else err), (out, err)
    assert "Traceback" not in err


@pytest.mark.asyncio
async def test_a_server_that_does_not_answer() -> None:
    with listening(socket.SOCK_DGRAM) as deaf:
        code, _, err = await kdns_wait(
            "web", "--server", "127.0.0.1", "--port", str(deaf), "--timeout", "200ms"
        )
    assert code == 1
    assert re.search(r"no answer from 127\.0\.0\.1 port \d+ over udp: no answer within", err)


def test_it_waits_until_the_time_is_over_and_says_what_it_saw_last() -> None:
    now, slept = 100.0, []

    def sleep(seconds: float) -> None:
        nonlocal now
        slept.append(seconds)
        now += seconds

    closed = free_port()
    outcome = wait(
        Target("127.0.0.1", closed), Server("127.0.0.1", 1), [], 3.0,
        clock=lambda: now, sleep=sleep,
    )  # fmt: skip
    assert not outcome.is_there
    assert sum(slept) == pytest.approx(3.0)
    assert max(slept) <= 1.0 and slept[0] == 0.05
    assert outcome.why[0].startswith(f"127.0.0.1:{closed} refuses the connection")


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("web", Target("web")),
        ("web.default:80", Target("web.default", 80)),
        ("web.:443", Target("web.", 443)),
        ("10.0.0.1:53", Target("10.0.0.1", 53)),
        ("[fd00::1]:53", Target("fd00::1", 53)),
        ("[fd00::1]", Target("fd00::1")),
        ("fd00::1", Target("fd00::1")),
    ],
)
def test_name_and_port(text: str, target: Target) -> None:
    assert parse_target(text) == target


@pytest.mark.parametrize("text", ["web:", "web:0", "web:65536", "web:-1", "web:٣", ":80"])
def test_what_is_no_name_and_port(text: str) -> None:
    with pytest.raises(ValueError, match="NAME:PORT"):
        parse_target(text)


# --- what a running kdns knows ----------------------------------------------------------------

GATE = {"waiting": [{"service": "shop/web", "revision": 7, "seconds": 0.4}],
        "published_unprogrammed": ["shop/api"]}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        ("web.shop.svc.cluster.local.", {"mode": "iptables", "gate": GATE},
         "the rules of Service shop/web are being written"),
        ("api.shop.svc.cluster.local.", {"mode": "iptables", "gate": GATE},
         "the rules of Service shop/api are not in the kernel: the gate has opened"),
        ("db.shop.svc.cluster.local.", {"mode": "iptables", "gate": GATE}, None),
        ("web.shop.svc.cluster.local.", {"mode": "none", "gate": None},
         "kdns forwards nothing here (--proxy-mode none): ClusterIPs have names only"),
        ("example.com.", {"mode": "iptables", "gate": GATE}, None),
        ("web.shop.svc.cluster.local.", None, None),
    ],
)  # fmt: skip
def test_what_a_running_kdns_knows_of_the_rules(
    name: str, status: dict[str, Any] | None, said: str | None
) -> None:
    """Nobody listens at the address; the name's Service may say why."""
    from kdns.explain.wait import _unprogrammed

    assert _unprogrammed(name, status) == ([said] if said else [])


@pytest.fixture(scope="module")
def up() -> Iterator[Up]:
    with Up() as running:
        yield running


def waiting(up: Up, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "kdns", "wait", *words], cwd=PROJECT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "KUBECONFIG": str(up.facts["kubeconfig"])},
    )  # fmt: skip


def test_it_finds_kdns_up_by_the_kubeconfig_and_waits_for_a_service_to_come(up: Up) -> None:
    process = waiting(up, "late", "--timeout", "30s")
    up.kubectl("create", "service", "clusterip", "late", "--tcp=80")
    out, err = process.communicate(timeout=4 * PATIENCE)
    address = up.kubectl("get", "svc", "late", "-o", "jsonpath={.spec.clusterIP}")
    assert (process.returncode, err) == (0, "")
    assert out.startswith(f"late.default.svc.cluster.local. is {address} (")


def test_the_reason_of_the_server_is_told(up: Up) -> None:
    """Extended DNS Errors: kdns says what there is instead."""
    up.kubectl("create", "service", "clusterip", "checkout", "--tcp=80")
    process = waiting(up, "chekout", "--timeout", "0")
    _, err = process.communicate(timeout=4 * PATIENCE)
    assert process.returncode == 1
    assert "chekout.default.svc.cluster.local. does not exist (NXDOMAIN), nor do 3 more" in err
    assert "checkout" in err


def test_place_of_an_ipv6_address() -> None:
    assert place("fd00::1", 80) == "[fd00::1]:80"


def test_one_attempt_stops_at_the_first_candidate_with_addresses(tmp_path: Path) -> None:
    outcome = attempt(
        Target("127.0.0.1"), Server("127.0.0.1", 1), [], lambda: 1.0, lambda: None
    )  # fmt: skip
    assert outcome.is_there and outcome.addresses == ["127.0.0.1"]
