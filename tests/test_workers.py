"""`workers N`: several processes answer, and nobody outside sees that they are several.

Real processes and sockets. The kernel hands a question to one of them by its source port, so
`everywhere` asks from so many that each of them was asked.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import dns.asyncquery
import dns.message
import pytest
import test_secure
import trustme
from running import RunningKdns, free_port
from test_app import get
from test_gate_wiring import Kernel, Running
from test_recordings import GOLDEN, corefile, counted_down, query_of, sections
from test_secure import QUESTION, authority, over_tls, trusting
from upstream_server import UpstreamServer

import kdns
from kdns.app import check_corefile
from kdns.control import facts_of
from kdns.dns import types as t
from kdns.dns.message import Edns, Message, parse_message, render_query
from kdns.dns.name import parse_name
from kdns.errors import ConfigError, KdnsError
from kdns.server import workers
from kdns.server.client import Server, ask

assert authority  # the fixture
PROJECT = Path(__file__).resolve().parent.parent
PORTS = 40  # source ports: that one of two workers gets none of them is one case in 2**39
WEB = "web.default.svc.cluster.local."

SERVICE = """
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: default}}
spec: {{clusterIP: {ip}, ports: [{{port: 80}}]}}
"""
BLOCK = """.:{port} {{
    bind 127.0.0.1
    workers {workers}
    ready 127.0.0.1:0
    prometheus 127.0.0.1:0
    {more}
    kubernetes cluster.local {{
        manifests {folder}/objects
        ttl {ttl}
    }}
}}
"""


def write(
    folder: Path, *, name: str = "web", ip: str = "10.96.0.50", workers: int | str = 2,
    ttl: int = 5, more: str = "", port: int = 0,
) -> Path:  # fmt: skip
    (folder / "objects").mkdir(exist_ok=True)
    (folder / "objects" / "web.yaml").write_text(SERVICE.format(name=name, ip=ip))
    conf = folder / "Corefile"
    conf.write_text(BLOCK.format(folder=folder, workers=workers, ttl=ttl, more=more, port=port))
    return conf


async def everywhere(kdns: RunningKdns, name: str = WEB, qtype: str = "A") -> set[str]:
    """What the name has, asked of all workers."""
    return {_told(await kdns.ask(name, qtype)) for _ in range(PORTS)}


def _told(reply: Message) -> str:
    if not reply.answer:
        return t.rcode_name(reply.rcode)
    return f"{reply.answer[0].rdata.hex()} {reply.answer[0].ttl}"


def told(ip: str, ttl: int = 5) -> str:
    return f"{socket.inet_aton(ip).hex()} {ttl}"


async def scraped(kdns: RunningKdns) -> dict[str, float]:
    """The metrics, by name and labels."""
    _, text = await asyncio.to_thread(get, kdns.app.http_port("/metrics"), "/metrics")
    rows = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {row[0]: float(row[1]) for row in rows}


def requests(found: dict[str, float], worker: int) -> float:
    return found[f'kdns_worker_requests_total{{worker="{worker}"}}']


async def until_serving(kdns: RunningKdns, but: int = 0) -> list[int]:
    """Wait until two workers serve that are not `but`."""
    async with asyncio.timeout(30):
        while True:
            pids = kdns.app.worker_pids()
            found = await scraped(kdns)
            if len(pids) == 2 and but not in pids and found["kdns_workers"] == 2:
                return pids
            await asyncio.sleep(0.02)


async def until_gone(*pids: int) -> None:
    async with asyncio.timeout(20):
        while any(_lives(pid) for pid in pids):
            await asyncio.sleep(0.02)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.asyncio
async def test_workers_answer_as_one_process_does() -> None:
    """All questions recorded from CoreDNS, over UDP and TCP."""
    rows = [json.loads(line) for line in (GOLDEN / "dns" / "kubeadm.jsonl").open()]
    differing = []
    async with UpstreamServer() as upstream:
        text = corefile("kubeadm", upstream.port).replace(".:0 {", ".:0 {\nworkers 2", 1)
        text = text.replace("\n}", "\nprometheus 127.0.0.1:0\n}", 1) if (
            "prometheus" not in text
        ) else re.sub(r"prometheus \S*", "prometheus 127.0.0.1:0", text)  # fmt: skip
        async with RunningKdns(text) as kdns:
            for row in rows:
                ask = dns.asyncquery.tcp if row["tcp"] else dns.asyncquery.udp
                reply = await ask(query_of(row), "127.0.0.1", port=kdns.port, timeout=5)
                got = sections(reply)
                if "TC" in got["flags"] and not got["answer"]:
                    continue  # each has a `cache` of its own, and this one asked just now
                if not counted_down(got, {key: row[key] for key in got}):
                    differing.append((row["q"], got, row))
            found = await scraped(kdns)
    assert not differing, f"{len(differing)} differ; the first: {differing[:3]}"
    asked = [requests(found, worker) for worker in (0, 1)]
    assert all(n > 100 for n in asked), asked
    assert sum(asked) >= len(rows)  # CNAMEs are followed by questions of their own


@pytest.mark.asyncio
@pytest.mark.parametrize("scheme", ["tls", "https"])
async def test_they_share_places_with_certificates(
    authority: tuple[trustme.CA, Path], scheme: str
) -> None:
    ca, folder = authority
    text = test_secure.corefile(scheme, folder).replace(
        "bind", "workers 2\nprometheus 127.0.0.1:0\nbind", 1
    )
    async with RunningKdns(text) as kdns:
        for _ in range(PORTS):
            if scheme == "tls":
                wire = await over_tls(kdns.app.port("tls"), trusting(ca))
            else:
                url = f"https://127.0.0.1:{kdns.app.port('https')}/dns-query"
                async with (
                    aiohttp.ClientSession() as session,
                    session.post(
                        url, data=QUESTION, ssl=trusting(ca),
                        headers={"Content-Type": test_secure.DNS},
                    ) as answer,
                ):  # fmt: skip
                    wire = await answer.read()
            assert _told(parse_message(wire)) == told("10.96.0.50")
        found = await scraped(kdns)
        assert min(requests(found, worker) for worker in (0, 1)) > 0


class Gated(Running):
    """A server with workers whose source and whose kernel side are the test."""

    @staticmethod
    def text(more: str = "") -> str:
        return Running.text(more).replace("bind", "workers 2\nbind")

    async def reasons(self, name: str) -> set[tuple[str, str]]:
        """rcode and reason, of all workers."""
        found = set()
        for _ in range(PORTS):
            reply = await self.ask(f"{name}.default.svc.cluster.local.", edns=Edns(1232))
            assert reply.edns is not None
            why = [value[2:].decode() for code, value in reply.edns.options if code == 15]
            found.add((t.rcode_name(reply.rcode), "; ".join(why)))
        return found


@pytest.mark.asyncio
async def test_names_wait_for_rules_in_all_workers() -> None:
    kdns = Gated(gate_timeout=3600.0)
    async with kdns:
        kernel = Kernel(kdns.app.registry_pipeline())
        kernel.write()
        kdns.put("new", "10.96.0.77")
        # In none of them before the rules are written, and all of them say why.
        waiting = "Service default/new is new: its rules are not in the kernel yet"
        elsewhere = kdns.pipeline.elsewhere
        assert elsewhere is not None
        await elsewhere.settle()
        assert await kdns.reasons("new") == {("NXDOMAIN", waiting)}
        killed = kdns.app.worker_pids()[0]
        os.kill(killed, signal.SIGKILL)
        async with asyncio.timeout(30):
            while killed in kdns.app.worker_pids() or len(kdns.app.worker_pids()) < 2:
                await asyncio.sleep(0.01)
        assert await kdns.reasons("new") == {("NXDOMAIN", waiting)}, "a replacement, too"
        kernel.write()
        await kdns.pipeline.settle()
        reasons = await kdns.reasons("new")
        assert {rcode for rcode, _ in reasons} == {"NOERROR"}
        assert not any("kernel" in why for _, why in reasons)


@pytest.mark.asyncio
async def test_a_change_is_answered_by_all_once_it_is_settled(tmp_path: Path) -> None:
    async with RunningKdns(conf=str(write(tmp_path))) as kdns:
        ((pipeline, _),) = kdns.app.pipelines.values()
        for number in range(51, 56):
            revision, ip = pipeline.snapshot.revision, f"10.96.0.{number}"
            write(tmp_path, ip=ip)
            async with asyncio.timeout(10):
                while pipeline.snapshot.revision == revision:
                    await asyncio.sleep(0.01)
            await pipeline.settle()
            assert await everywhere(kdns) == {told(ip)}
            assert pipeline.revisions()["dns"] == pipeline.snapshot.revision
            assert len(await everywhere(kdns, "cluster.local.", "SOA")) == 1, "one serial"
        write(tmp_path, name="other")
        async with asyncio.timeout(10):
            while await everywhere(kdns) != {"NXDOMAIN"}:
                await asyncio.sleep(0.01)
        found = await scraped(kdns)
        assert min(requests(found, worker) for worker in (0, 1)) > 0


@pytest.mark.asyncio
async def test_it_is_not_settled_while_one_of_them_is_behind(tmp_path: Path) -> None:
    async with RunningKdns(conf=str(write(tmp_path))) as kdns:
        ((pipeline, _),) = kdns.app.pipelines.values()
        before, slow = pipeline.snapshot.revision, kdns.app.worker_pids()[1]
        os.kill(slow, signal.SIGSTOP)
        try:
            write(tmp_path, ip="10.96.0.51")
            async with asyncio.timeout(10):
                while pipeline.snapshot.revision == before:
                    await asyncio.sleep(0.01)
            settling = asyncio.create_task(pipeline.settle())
            await asyncio.wait((settling,), timeout=0.2)
            assert not settling.done()
            assert pipeline.revisions()["dns"] == before < pipeline.revisions()["registry"]
        finally:
            os.kill(slow, signal.SIGCONT)
        async with asyncio.timeout(10):
            await settling
        assert pipeline.revisions()["dns"] == pipeline.revisions()["registry"]
        assert await everywhere(kdns) == {told("10.96.0.51")}


@pytest.mark.asyncio
async def test_metrics_are_those_of_all_and_do_not_fall_when_a_worker_ends(
    tmp_path: Path,
) -> None:
    async with RunningKdns(conf=str(write(tmp_path))) as kdns:
        await everywhere(kdns)
        label = 'family="1",proto="udp",server="dns://127.0.0.1:0",type="A",view="",zone="."'
        asked = f"coredns_dns_requests_total{{{label}}}"
        found = await scraped(kdns)
        assert found[asked] == PORTS
        assert sum(requests(found, worker) for worker in (0, 1)) == PORTS
        assert found["kdns_workers"] == 2
        build = [v for k, v in found.items() if k.startswith("coredns_build_info")]
        assert build == [1], "the same everywhere: not added up"
        counts = {k: v for k, v in found.items() if k.startswith("coredns_dns_request_size")}
        assert counts[next(k for k in counts if "_count" in k)] == PORTS

        killed = kdns.app.worker_pids()[0]
        os.kill(killed, signal.SIGKILL)
        await until_serving(kdns, but=killed)
        assert (await scraped(kdns))[asked] == PORTS
        await everywhere(kdns)
        found = await scraped(kdns)
        assert found[asked] == 2 * PORTS
        assert found['kdns_worker_restarts_total{worker="0"}'] == 1
        assert found['kdns_worker_restarts_total{worker="1"}'] == 0


@pytest.mark.asyncio
async def test_no_question_is_lost_to_a_client_that_asks_twice_when_a_worker_is_killed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each client keeps its socket, as resolvers do: its questions go to one worker."""
    async with RunningKdns(conf=str(write(tmp_path))) as kdns:
        ended, failed, asked = asyncio.Event(), [], 0

        async def client() -> None:
            nonlocal asked
            loop, wanted = asyncio.get_running_loop(), told("10.96.0.50")
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                sock.connect(("127.0.0.1", kdns.port))
                while not ended.is_set():
                    asked += 1
                    wire = render_query(random.getrandbits(16), parse_name(WEB), t.A)
                    try:
                        if _told(parse_message(await twice(loop, sock, wire))) != wanted:
                            failed.append("a wrong answer")
                    except (TimeoutError, OSError) as e:
                        failed.append(repr(e))
                    await asyncio.sleep(0.002)

        clients = [asyncio.create_task(client()) for _ in range(16)]
        killed: list[int] = []
        for number in (0, 1):
            before = asked
            async with asyncio.timeout(20):
                while asked < before + 200:
                    await asyncio.sleep(0.01)
            killed.append(kdns.app.worker_pids()[number])
            os.kill(killed[-1], signal.SIGKILL)
            await until_serving(kdns, but=killed[-1])
        ended.set()
        await asyncio.gather(*clients)
        assert not failed and asked > 400, (failed[:3], asked)
        said = [r.getMessage() for r in caplog.records if "another one takes its place" in r.msg]
        assert [text.partition(";")[0] for text in said] == [
            f"worker {number} (process {pid}) was ended by SIGKILL"
            for number, pid in enumerate(killed)
        ]


async def twice(loop: asyncio.AbstractEventLoop, sock: socket.socket, wire: bytes) -> bytes:
    """The answer to a question that is put again after five seconds (resolv.conf(5)), once."""
    for last in (False, True):
        await loop.sock_sendall(sock, wire)
        try:
            async with asyncio.timeout(5):
                while (got := await loop.sock_recv(sock, 4096))[:2] != wire[:2]:
                    pass
                return got
        except TimeoutError:
            if last:
                raise
    raise AssertionError("not reached")


@pytest.mark.asyncio
async def test_one_that_ends_again_and_again_leaves_its_questions_to_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workers, "PAUSES", (0.0, 3600.0))
    async with RunningKdns(conf=str(write(tmp_path))) as kdns:
        first = kdns.app.worker_pids()[1]
        os.kill(first, signal.SIGKILL)
        pids = await until_serving(kdns, but=first)
        os.kill(pids[1], signal.SIGKILL)
        async with asyncio.timeout(10):
            while "another one takes its place in 3600 s" not in caplog.text:
                await asyncio.sleep(0.01)
        assert await everywhere(kdns) == {told("10.96.0.50")}
        assert len(kdns.app.worker_pids()) == 1
        status, text = await asyncio.to_thread(get, kdns.app.http_port("/ready"), "/ready")
        assert (status, text) == (503, "workers")
        # A place that a reload opens is the others', too.
        conf, other = tmp_path / "Corefile", free_port()
        conf.write_text(f"{conf.read_text()}.:{other} {{\nbind 127.0.0.1\nwhoami\n}}\n")
        assert await kdns.app.reload()
        for _ in range(PORTS):
            assert (await tcp(other)).additional
            wire = render_query(1, parse_name("x.test."), t.A)
            query = dns.message.from_wire(wire)
            assert (await dns.asyncquery.udp(query, "127.0.0.1", port=other, timeout=5)).additional


@pytest.mark.asyncio
async def test_one_that_was_given_time_gets_sockets_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "PAUSES", (0.01,))
    async with RunningKdns(conf=str(write(tmp_path))) as kdns:
        os.kill(killed := kdns.app.worker_pids()[0], signal.SIGKILL)
        await until_serving(kdns, but=killed)
        before = await scraped(kdns)
        assert await everywhere(kdns) == {told("10.96.0.50")}
        for _ in range(3):
            assert (await tcp(kdns.port)).answer
        after = await scraped(kdns)
        assert all(requests(after, n) > requests(before, n) for n in (0, 1))


@pytest.mark.asyncio
async def test_one_that_hangs_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workers, "SILENT", 0.5)
    monkeypatch.setattr(workers, "LOOK", 0.05)
    async with RunningKdns(conf=str(write(tmp_path))) as kdns:
        hanging = kdns.app.worker_pids()[0]
        os.kill(hanging, signal.SIGSTOP)
        await until_serving(kdns, but=hanging)
        assert await everywhere(kdns) == {told("10.96.0.50")}
    assert f"worker 0 (process {hanging}) did not answer for" in caplog.text


async def tcp(port: int, name: str = WEB) -> Message:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    wire = render_query(7, parse_name(name), t.A)
    writer.write(len(wire).to_bytes(2, "big") + wire)
    size = int.from_bytes(await reader.readexactly(2), "big")
    reply = parse_message(await reader.readexactly(size))
    writer.close()
    await writer.wait_closed()
    return reply


@pytest.mark.asyncio
async def test_connections_are_shared_out_too(tmp_path: Path) -> None:
    async with RunningKdns(conf=str(write(tmp_path))) as kdns:
        for _ in range(PORTS):
            assert _told(await tcp(kdns.port)) == told("10.96.0.50")
        found = await scraped(kdns)
        assert min(requests(found, worker) for worker in (0, 1)) > 0


@pytest.mark.asyncio
async def test_every_address_of_the_host_is_served_by_all(tmp_path: Path) -> None:
    conf = write(tmp_path)
    conf.write_text(conf.read_text().replace("bind 127.0.0.1\n", "\n", 1))
    async with RunningKdns(conf=str(conf)) as kdns:
        addresses = ["127.0.0.1", "127.0.0.9"]  # one with a socket of its own, one without
        for address in [address for address in addresses for _ in range(PORTS)]:
            assert _told(await kdns.ask(WEB, address=address)) == told("10.96.0.50")
        found = await scraped(kdns)
        assert min(requests(found, worker) for worker in (0, 1)) > 0


@pytest.mark.asyncio
async def test_a_reload_reaches_all_and_loses_no_question(tmp_path: Path) -> None:
    conf = write(tmp_path)
    async with RunningKdns(conf=str(conf)) as kdns:
        pids, port = kdns.app.worker_pids(), kdns.port
        for ttl in (20, 30, 40):
            write(tmp_path, ttl=ttl)
            reloading = asyncio.create_task(kdns.app.reload())
            while not reloading.done():
                assert (await kdns.ask(WEB)).answer
            assert await reloading
            assert await everywhere(kdns) == {told("10.96.0.50", ttl)}
        good = conf.read_text()
        conf.write_text(good.replace("ttl 40", "ttl forty"))
        assert not await kdns.app.reload()
        assert await everywhere(kdns) == {told("10.96.0.50", 40)}
        assert (kdns.app.worker_pids(), kdns.port) == (pids, port)


@pytest.mark.asyncio
async def test_a_reload_opens_and_closes_places_and_registries_of_all(tmp_path: Path) -> None:
    conf, other = write(tmp_path), free_port()
    good = conf.read_text()
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "web.yaml").write_text(SERVICE.format(name="web", ip="10.97.0.1"))
    more = f"kubernetes cluster.local {{\nmanifests {tmp_path}/more\n}}"
    added = f".:{other} {{\nbind 127.0.0.1\n{more}\n}}\n"
    async with RunningKdns(conf=str(conf)) as kdns:
        conf.write_text(good + added)
        assert await kdns.app.reload()
        assert _told(await tcp(other)) == told("10.97.0.1")
        assert await everywhere(kdns) == {told("10.96.0.50")}
        killed = kdns.app.worker_pids()[0]
        os.kill(killed, signal.SIGKILL)
        await until_serving(kdns, but=killed)
        for _ in range(10):
            assert _told(await tcp(other)) == told("10.97.0.1"), "what a replacement serves"
        conf.write_text(good)
        assert await kdns.app.reload()
        with pytest.raises(ConnectionRefusedError):
            await tcp(other)
        conf.write_text(good + added)
        assert await kdns.app.reload()
        for _ in range(10):
            assert _told(await tcp(other)) == told("10.97.0.1"), "and once more"
        assert len(kdns.app.worker_pids()) == 2


@pytest.mark.asyncio
async def test_their_number_stays_until_the_next_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with RunningKdns(conf=str(write(tmp_path))) as kdns:
        pids = kdns.app.worker_pids()
        write(tmp_path, workers=3)
        assert await kdns.app.reload()
        assert kdns.app.worker_pids() == pids
        assert "workers: there are 2 until the next start, not 3" in caplog.text
        assert await everywhere(kdns) == {told("10.96.0.50")}


@pytest.mark.asyncio
async def test_the_query_tap_shows_the_questions_of_all(tmp_path: Path) -> None:
    async with RunningKdns(conf=str(write(tmp_path))) as kdns:
        await everywhere(kdns)
        lines: list[str] = []
        end = kdns.app.tap.listen(lines.append)
        await scraped(kdns)  # what was said before it has reached the workers
        await everywhere(kdns)
        await scraped(kdns)
        assert [json.loads(line)["name"] for line in lines] == [WEB] * PORTS
        killed = kdns.app.worker_pids()[0]
        os.kill(killed, signal.SIGKILL)
        await until_serving(kdns, but=killed)
        lines.clear()
        await everywhere(kdns)
        await scraped(kdns)
        assert len(lines) == PORTS, "those of a replacement, too"
        end()
        await scraped(kdns)
        lines.clear()
        await everywhere(kdns)
        await scraped(kdns)
        assert lines == []


@pytest.mark.asyncio
async def test_a_cluster_is_settled_when_all_of_them_are(tmp_path: Path) -> None:
    conf = tmp_path / "Corefile"
    conf.write_text(".:0 {\nbind 127.0.0.1\nworkers 2\nkubernetes cluster.local\n}\n")
    async with kdns.Cluster({"web": 80}, corefile=str(conf)) as cluster:
        for number in range(5):
            name = f"new-{number}.default.svc.cluster.local."
            assert await asked_of(cluster.dns, name) == {t.NXDOMAIN}
            await cluster.apply(SERVICE.format(name=f"new-{number}", ip=f"10.96.3.{number}"))
            assert await asked_of(cluster.dns, name) == {t.NOERROR}
            assert await cluster.resolve(f"new-{number}") == [f"10.96.3.{number}"], "in-process"
        with pytest.raises(KdnsError, match="has 'workers'"):
            cluster.dns_servfail()


async def asked_of(server: tuple[str, int], name: str) -> set[int]:
    """The rcodes, of all workers."""
    replies = [
        await asyncio.to_thread(ask, Server(*server), parse_name(name), t.A) for _ in range(PORTS)
    ]
    return {reply.message.rcode for reply in replies}


@pytest.mark.asyncio
async def test_the_control_socket_tells_who_they_are(tmp_path: Path) -> None:
    async with RunningKdns(conf=str(write(tmp_path))) as kdns:
        facts = facts_of("serve", kdns.app.any_pipeline, app=kdns.app)
        assert facts.answers["/v1/status"]()["workers"] == kdns.app.worker_pids()


@pytest.mark.asyncio
@pytest.mark.parametrize("count", [1, ""])
async def test_one_worker_is_this_process_itself(tmp_path: Path, count: int | str) -> None:
    conf = write(tmp_path, workers=count)
    if not count:
        conf.write_text(re.sub("workers.*", "", conf.read_text()))
    async with RunningKdns(conf=str(conf)) as kdns:
        assert kdns.app.worker_pids() == []
        assert await everywhere(kdns) == {told("10.96.0.50")}
        assert not any("worker" in name for name in await scraped(kdns))


@pytest.mark.asyncio
async def test_a_port_that_another_server_with_workers_has_is_taken(tmp_path: Path) -> None:
    async with RunningKdns(conf=str(write(tmp_path))) as kdns:
        (tmp_path / "b").mkdir()
        for count in (1, 2):
            conf = write(tmp_path / "b", port=kdns.port, workers=count)
            with pytest.raises(ConfigError, match="cannot listen: Address already in use"):
                async with RunningKdns(conf=str(conf)):
                    pass
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as another:  # that would share it
        another.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        another.bind(("127.0.0.1", 0))
        conf = write(tmp_path, port=another.getsockname()[1])
        with pytest.raises(ConfigError, match="cannot listen: Address already in use"):
            async with RunningKdns(conf=str(conf)):
                pass


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("workers", "'workers' needs an argument"),
        ("workers 0", "workers must be in range [1, 64]: 0"),
        ("workers 65", "workers must be in range [1, 64]: 65"),
        ("workers many", "'workers' takes a number or auto, found 'many'"),
        ("workers 2 3", "unexpected '3' after 'workers'"),
        ("workers 2 {\n x\n}", "unknown property 'x'"),
        ("workers 2\nworkers 2", "can only be used once per Server Block"),
        ("workers 2\n}\n.:54 {\nworkers 2", "written once; the first is in line 2"),
        ("workers auto", ""),
    ],
)
def test_mistakes_are_told(tmp_path: Path, lines: str, said: str) -> None:
    path = tmp_path / "Corefile"
    path.write_text(f".:53 {{\n{lines}\n}}\n")
    found = [str(problem) for problem in check_corefile(str(path))]
    assert any(said in text for text in found) if said else found == []


# --- as a program -------------------------------------------------------------------------


@pytest.fixture
def program(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int, list[int]]]:
    """kdns with two workers, as an operator starts it, its port and its workers."""
    port = free_port()
    conf = write(tmp_path, port=port)
    with subprocess.Popen(
        [sys.executable, "-m", "kdns", "-conf", str(conf)], cwd=PROJECT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith(f".:{port} on 127.0.0.1")
            yield process, port, children_of(process.pid)
        finally:
            process.kill()


def children_of(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def wait_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while any(_lives(pid) for pid in pids):
        assert time.monotonic() < deadline, "they live on"
        time.sleep(0.02)


def test_workers_end_with_a_parent_that_is_killed(
    program: tuple[subprocess.Popen[str], int, list[int]],
) -> None:
    process, _, pids = program
    assert len(pids) == 2
    process.kill()
    process.wait()
    wait_gone(pids)


def test_a_signal_to_all_processes_ends_them_in_order(
    program: tuple[subprocess.Popen[str], int, list[int]],
) -> None:
    """As systemd sends it; that the parent decides when workers end is seen by the log, which
    says nothing of workers that ended."""
    process, port, pids = program
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGHUP)
    answers = [asyncio.run(tcp(port)) for _ in range(10)]
    assert all(reply.answer for reply in answers)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")
    assert "worker" not in out
    wait_gone(pids)


def test_a_worker_that_cannot_serve_is_told_and_exit_2(tmp_path: Path) -> None:
    """Its library is broken, say: it ends before it has served."""
    conf = write(tmp_path, port=free_port())
    code = (
        "import sys; from kdns.server import workers; sys.executable = '/bin/false';"
        "from kdns.app import serve; sys.exit(serve(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(conf)], cwd=PROJECT, text=True, capture_output=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert re.fullmatch(r"workers: worker [01] ended with code 1\n", done.stderr), done.stderr
