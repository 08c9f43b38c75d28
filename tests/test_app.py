"""Starting, reloading and stopping kdns, as its operator sees it."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import RunningKdns

from kdns.dns import types as t
from kdns.errors import ConfigError

SERVICE = """
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: default}}
spec: {{clusterIP: {ip}, ports: [{{port: 80}}]}}
"""
BLOCK = """.:0 {{
    bind 127.0.0.1
    {more}
    kubernetes cluster.local in-addr.arpa {{
        manifests {folder}/objects
    }}
}}
"""


def write(folder: Path, name: str = "web", ip: str = "10.96.0.50", more: str = "") -> Path:
    (folder / "objects").mkdir(exist_ok=True)
    (folder / "objects" / "web.yaml").write_text(SERVICE.format(name=name, ip=ip))
    conf = folder / "Corefile"
    conf.write_text(BLOCK.format(folder=folder, more=more))
    return conf


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode()


async def address(kdns: RunningKdns, name: str) -> str:
    reply = await kdns.ask(name)
    if not reply.answer:
        return t.rcode_name(reply.rcode)
    return ".".join(str(octet) for octet in reply.answer[0].rdata)


async def until(kdns: RunningKdns, name: str, wanted: str) -> None:
    async with asyncio.timeout(10):
        while await address(kdns, name) != wanted:
            await asyncio.sleep(0.02)


pytestmark = pytest.mark.asyncio


async def test_a_changed_manifest_changes_the_answer_without_a_restart(tmp_path: Path) -> None:
    conf = write(tmp_path)
    async with RunningKdns(conf=str(conf)) as kdns:
        name = "web.default.svc.cluster.local."
        assert await address(kdns, name) == "10.96.0.50"
        assert await address(kdns, name) == "10.96.0.50", "from the packet cache"
        assert await address(kdns, "new.default.svc.cluster.local.") == "NXDOMAIN"
        write(tmp_path, name="new", ip="10.96.0.51")
        await until(kdns, "new.default.svc.cluster.local.", "10.96.0.51")
        assert await address(kdns, name) == "NXDOMAIN"


async def test_a_reload_takes_a_good_corefile_and_keeps_the_old_for_a_bad_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    conf = write(tmp_path)
    metric = "coredns_reload_failed_total"
    async with RunningKdns(conf=str(conf)) as kdns:
        port, pipelines = kdns.port, list(kdns.app.pipelines.values())
        conf.write_text(conf.read_text().replace("in-addr.arpa {", "in-addr.arpa {\n ttl 77"))
        assert await kdns.app.reload()
        assert (await kdns.ask("web.default.svc.cluster.local.")).answer[0].ttl == 77
        assert kdns.port == port
        assert list(kdns.app.pipelines.values()) == pipelines, "nothing is listed again"
        good = conf.read_text()

        conf.write_text(good.replace("ttl 77", "ttl 99999\n tttl 5"))
        with caplog.at_level(logging.ERROR, "kdns"):
            assert not await kdns.app.reload()
            assert not await kdns.app.reload(), "the same mistake is not said twice"
        said = [r.getMessage() for r in caplog.records]
        assert any(f"{conf}:5: ttl must be in range [0, 3600]: 99999" in s for s in said), said
        assert any(f"{conf}:6: unknown property 'tttl'" in s for s in said), said
        assert sum("old configuration stays" in s for s in said) == 1
        assert kdns.app.metrics.value(metric) == 1
        assert (await kdns.ask("web.default.svc.cluster.local.")).answer[0].ttl == 77

        conf.write_text("# only a comment\n" + good)
        assert not await kdns.app.reload(), "comments and white space are no change"


async def test_no_question_is_lost_over_reloads(tmp_path: Path) -> None:
    conf = write(tmp_path)
    async with RunningKdns(conf=str(conf)) as kdns:
        for ttl in range(10, 20):
            text = BLOCK.format(folder=tmp_path, more=f"# {ttl}").replace(
                "in-addr.arpa {", f"in-addr.arpa {{\n ttl {ttl}"
            )
            conf.write_text(text)
            asked = [
                asyncio.ensure_future(kdns.ask("web.default.svc.cluster.local.")) for _ in range(20)
            ]
            assert await kdns.app.reload()
            assert all(reply.answer for reply in await asyncio.gather(*asked))


async def test_a_taken_port_is_said_with_its_address(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        text = write(tmp_path).read_text().replace(".:0", f".:{port}")
        with pytest.raises(ConfigError) as caught:
            async with RunningKdns(text):
                pass
        said = f"dns://127.0.0.1:{port}: cannot listen: Address already in use"
        assert said in str(caught.value)


async def test_health_ready_and_metrics(tmp_path: Path) -> None:
    more = "health 127.0.0.1:0\n ready 127.0.0.1:0 \n prometheus 127.0.0.1:0"
    async with RunningKdns(conf=str(write(tmp_path, more=more))) as kdns:
        app = kdns.app
        for _ in range(3):
            await kdns.ask("web.default.svc.cluster.local.")
        assert await asyncio.to_thread(get, app.http_port("/health"), "/health") == (200, "OK")
        assert await asyncio.to_thread(get, app.http_port("/ready"), "/ready") == (200, "OK")
        status, text = await asyncio.to_thread(get, app.http_port("/metrics"), "/metrics")
        assert status == 200
        lines = text.splitlines()
        wanted = (
            'coredns_dns_requests_total{family="1",proto="udp",server="dns://127.0.0.1:0",type="A",'
            'view="",zone="."} 3.0'
        )
        normal = [
            "{".join((h, ",".join(sorted(r.rstrip("}").split(","))) + "}")) if r else h
            for h, _, r in (line.rpartition(" ")[0].partition("{") for line in lines)
        ]
        assert any(
            n == wanted.rpartition(" ")[0] and line.endswith(" 3.0")
            for n, line in zip(normal, lines, strict=True)
        ), [line for line in lines if "requests_total" in line]
        assert "coredns_build_info" in text
        assert "kdns_source_last_event_age_seconds" in text
        assert "process_cpu_seconds_total" in text


async def test_without_an_api_cluster_names_are_servfail_and_others_still_forwarded(
    tmp_path: Path,
) -> None:
    from upstream_server import UpstreamServer

    async with UpstreamServer() as upstream:
        text = f""".:0 {{
            bind 127.0.0.1
            ready 127.0.0.1:0
            kubernetes cluster.local in-addr.arpa {{
                endpoint http://127.0.0.1:1
                startup_timeout 100ms
                fallthrough
            }}
            forward . 127.0.0.1:{upstream.port}
        }}"""
        async with RunningKdns(text) as kdns:
            assert await address(kdns, "web.default.svc.cluster.local.") == "SERVFAIL"
            assert await address(kdns, "www.example.com.") in ("192.0.2.80", "192.0.2.81")
            port = kdns.app.http_port("/ready")
            assert await asyncio.to_thread(get, port, "/ready") == (503, "kubernetes")


@pytest.fixture
def program(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """kdns as its own process, with half a second of lameduck."""
    conf = write(tmp_path, more="health 127.0.0.1:0 {\n lameduck 500ms\n }\n errors")
    process = subprocess.Popen(
        [sys.executable, "-m", "kdns", "-conf", str(conf)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ},
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout and process.stderr
        process.stdout.close()
        process.stderr.close()


async def test_sigterm_ends_it_with_zero_after_its_lameduck_time(
    program: subprocess.Popen[str],
) -> None:
    assert program.stdout is not None
    first = await asyncio.to_thread(program.stdout.readline)
    assert first.startswith(".:")
    assert (await asyncio.to_thread(program.stdout.readline)).startswith("kdns-")
    program.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(program.wait, 10) == 0
    assert "lameduck" in await asyncio.to_thread(program.stdout.read)


async def test_a_second_signal_does_not_wait(program: subprocess.Popen[str]) -> None:
    assert program.stdout is not None
    await asyncio.to_thread(program.stdout.readline)
    program.send_signal(signal.SIGINT)
    program.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(program.wait, 10) == 0


@pytest.mark.parametrize("command", ["serve", "up"])
async def test_a_signal_to_reload_does_not_end_a_start(tmp_path: Path, command: str) -> None:
    """A start waits for an API server that is away, so it may take seconds."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        conf = tmp_path / "Corefile"
        api = f"endpoint http://127.0.0.1:{silent.getsockname()[1]}"
        conf.write_text(f".:0 {{\n bind 127.0.0.1\n kubernetes cluster.local {{\n {api}\n }}\n}}\n")
        words = {
            "serve": ["serve", "-conf", str(conf)],
            "up": ["up", "--api-port=0", "--dns-port=0", f"--data-dir={tmp_path}"],
        }
        process = subprocess.Popen([sys.executable, "-m", "kdns", *words[command]])
        try:
            until_caught(process, signal.SIGTERM)
            process.send_signal(signal.SIGUSR1)
            if command == "serve":  # where it ends `kdns up`
                process.send_signal(signal.SIGHUP)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)
        finally:
            process.terminate()
        assert process.wait(30) == 0


def until_caught(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Wait until a process does something of its own at a signal."""
    end = time.monotonic() + 30
    status = Path(f"/proc/{process.pid}/status")
    while time.monotonic() < end:
        (caught,) = re.findall(r"^SigCgt:\t(\w+)$", status.read_text(), re.MULTILINE)
        if int(caught, 16) >> (number - 1) & 1:
            return
        time.sleep(0.01)
    raise AssertionError(f"it does not care for {number.name}")
