"""Bad days of the API server, end to end: what clients are answered, what the operator reads.

A whole kdns (running.py) follows a scripted API server (api_replay.py) over real HTTP. What
the reflector asks for in each case is test_kube_source.py's; here it is the answers that count.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from api_replay import ApiReplay, Fault, Json
from running import RunningKdns, free_port
from upstream_server import UpstreamServer

from kdns.dns import types as t
from kdns.errors import ConfigError, Denied, Unreachable
from kdns.pipeline import SAY_AGAIN, Pipeline
from kdns.registry.snapshot import Changes, Snapshot
from kdns.registry.spec import KubeSpec
from kdns.registry.store import Store
from kdns.source import kube
from kdns.source.reflector import Timing

pytestmark = pytest.mark.asyncio

# Back-off in hundredths of a second; a watch settles at once.
FAST = Timing(
    first=0.01, most=0.05, settled=0.0, quiet=5.0, initial_quiet=0.2, connect=2.0, list=5.0
)
AGE = "kdns_source_last_event_age_seconds"
SKIPPED = "kdns_source_objects_skipped_total"


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kube, "Timing", lambda: FAST)


@pytest.fixture(autouse=True)
def said(caplog: pytest.LogCaptureFixture) -> Said:
    caplog.set_level(logging.INFO, "kdns")
    return Said(caplog)


class Said:
    """The lines of the log."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    def lines(self, *parts: str) -> list[str]:
        """Return the messages that hold all parts."""
        every = [r.getMessage() for r in self._caplog.records if r.name.startswith("kdns")]
        return [line for line in every if all(part in line for part in parts)]


def corefile(url: str, *, ready: str = "", more: str = "", upstream: int = 1) -> str:
    """kubeadm's Corefile, but with a cache for cluster names too, the harder case, and
    without fallthrough: what comes from outside may be as old as its TTL."""
    return f""".:0 {{
    bind 127.0.0.1
    errors
    ready 127.0.0.1:0 {ready}
    kubernetes cluster.local in-addr.arpa ip6.arpa {{
        endpoint {url}
        pods insecure
        startup_timeout 5s
        ttl 30
        {more}
    }}
    prometheus 127.0.0.1:0
    forward . 127.0.0.1:{upstream}
    cache 30
    loadbalance
}}
"""


def namespace(name: str = "default") -> Json:
    return {"kind": "Namespace", "metadata": {"name": name}}


def service(name: str, ip: str, ns: str = "default", **spec: Any) -> Json:
    body: Json = {"type": "ClusterIP", "clusterIP": ip, "clusterIPs": [ip], **spec}
    body.setdefault("ports", [{"name": "http", "port": 80, "protocol": "TCP"}])
    return {"kind": "Service", "metadata": {"name": name, "namespace": ns}, "spec": body}


def slice_of(owner: str, *addresses: str, ns: str = "default") -> Json:
    return {
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{owner}-1",
            "namespace": ns,
            "labels": {"kubernetes.io/service-name": owner},
        },
        "addressType": "IPv4",
        "endpoints": [{"addresses": [a], "conditions": {"ready": True}} for a in addresses],
        "ports": [{"name": "http", "port": 80, "protocol": "TCP"}],
    }


WEB = service("web", "10.96.0.50")


async def answer(kdns: RunningKdns, name: str, qtype: str = "A") -> str:
    """Return what a client sees, in a word: the rcode if there is no answer, or the rdata."""
    if "." not in name:
        name += ".default"
    if not name.endswith("."):
        name += ".svc.cluster.local."
    reply = await kdns.ask(name, qtype)
    found = [
        ".".join(map(str, rr.rdata)) if rr.type == t.A else t.type_name(rr.type)
        for rr in reply.answer
    ]
    if found or reply.rcode != t.NOERROR:
        return " ".join(sorted(found)) or t.rcode_name(reply.rcode)
    return "NODATA"


async def steadily(kdns: RunningKdns, name: str, qtype: str = "A") -> str:
    """Ask three times, so that cache and packet cache have their say; return the one answer."""
    (one,) = {await answer(kdns, name, qtype) for _ in range(3)}
    return one


async def until(condition: Callable[[], Awaitable[object] | object]) -> None:
    async with asyncio.timeout(4):
        while True:
            holds = condition()
            if isinstance(holds, Awaitable):
                holds = await holds
            if holds:
                return
            await asyncio.sleep(0.01)


async def until_answered(kdns: RunningKdns, name: str, wanted: str) -> None:
    """Wait for an answer; shorter than any cache keeps one, so that none gets away with it."""

    async def is_it() -> bool:
        return await answer(kdns, name) == wanted

    await until(is_it)


@contextlib.asynccontextmanager
async def cluster(
    *objects: Json, watch_list: str = "yes", ready: str = "", upstream: int = 1
) -> AsyncIterator[tuple[ApiReplay, RunningKdns]]:
    async with ApiReplay(watch_list=watch_list) as api:
        for obj in (namespace(), *objects):
            await api.put(obj)
        async with RunningKdns(corefile(api.url, ready=ready, upstream=upstream)) as kdns:
            yield api, kdns


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode()


async def readiness(kdns: RunningKdns) -> tuple[int, str]:
    return await asyncio.to_thread(get, kdns.app.http_port("/ready"), "/ready")


async def until_ready(kdns: RunningKdns) -> None:
    async def is_it() -> bool:
        return await readiness(kdns) == (200, "OK")

    await until(is_it)


async def age(kdns: RunningKdns) -> float:
    _, text = await asyncio.to_thread(get, kdns.app.http_port("/metrics"), "/metrics")
    (line,) = [x for x in text.splitlines() if x.startswith(AGE)]
    return float(line.split()[1])


def failures(kdns: RunningKdns) -> float:
    metrics = kdns.app.metrics
    return sum(
        metrics.value("kdns_source_errors_total", kind, reason)
        for kind in ("Service", "EndpointSlice", "Namespace")
        for reason in ("unreachable", "denied", "expired")
    )


# --- it goes and comes back -------------------------------------------------------------------


async def test_old_answers_stay_while_the_api_server_is_away(said: Said) -> None:
    async with cluster(WEB) as (api, kdns):
        assert await steadily(kdns, "web") == "10.96.0.50"
        assert await steadily(kdns, "gone") == "NXDOMAIN"

        await api.stop()
        await until(lambda: failures(kdns) >= 30)
        assert await steadily(kdns, "web") == "10.96.0.50"
        assert await steadily(kdns, "gone") == "NXDOMAIN", "what was listed may be denied"
        assert await steadily(kdns, "50.0.96.10.in-addr.arpa.", "PTR") == "PTR"
        assert await readiness(kdns) == (200, "OK"), "or all DNS would be taken away"
        (line,) = said.lines("unreachable")
        assert line.startswith(
            f"plugin/kubernetes: unreachable: 127.0.0.1:{api.port}: Connection refused;"
            " serving what is known, trying again in "
        )
        first = await age(kdns)
        await until(lambda: failures(kdns) >= 40)
        assert await age(kdns) > first >= 0

        await api.put(service("new", "10.96.0.51"))
        await api.start(port=api.port)
        await until_answered(kdns, "new", "10.96.0.51")
        assert await steadily(kdns, "web") == "10.96.0.50"
        await until(lambda: said.lines("the registry is up to date again"))
        assert len(said.lines("up to date again")) == len(said.lines("unreachable")) == 1


async def test_what_was_deleted_while_it_was_away_is_denied_when_it_is_back() -> None:
    objects = [WEB, service("old", "10.96.0.52"), service("moved", "10.96.0.53")]
    async with cluster(*objects) as (api, kdns):
        for name, ip in (("web", 50), ("old", 52), ("moved", 53)):
            assert await steadily(kdns, name) == f"10.96.0.{ip}"
        assert await steadily(kdns, "new") == "NXDOMAIN"
        assert await steadily(kdns, "52.0.96.10.in-addr.arpa.", "PTR") == "PTR"

        await api.stop()
        await api.delete(objects[1])
        await api.put(service("moved", "10.96.0.63"))
        await api.put(service("new", "10.96.0.54"))
        api.forget()  # so that it must list again, and cannot resume
        await api.start(port=api.port)

        await until_answered(kdns, "new", "10.96.0.54")
        assert await steadily(kdns, "new") == "10.96.0.54", "no old NXDOMAIN from any cache"
        assert await steadily(kdns, "old") == "NXDOMAIN"
        assert await steadily(kdns, "moved") == "10.96.0.63"
        assert await steadily(kdns, "web") == "10.96.0.50"
        assert await steadily(kdns, "53.0.96.10.in-addr.arpa.", "PTR") != "PTR"
        assert await steadily(kdns, "63.0.96.10.in-addr.arpa.", "PTR") == "PTR"


async def test_it_starts_without_an_api_server_and_is_ready_when_there_is_one(
    said: Said,
) -> None:
    async with ApiReplay() as api, UpstreamServer() as upstream:
        await api.put(namespace())
        await api.put(WEB)
        await api.stop()
        text = corefile(
            api.url, upstream=upstream.port, more="fallthrough in-addr.arpa ip6.arpa"
        ).replace("5s", "100ms")
        async with RunningKdns(text) as kdns:
            for name, qtype in [
                ("web", "A"), ("web", "AAAA"), ("_http._tcp.web.default", "SRV"), ("gone", "A"),
                ("50.0.96.10.in-addr.arpa.", "PTR"),
                ("1.0.0.127.in-addr.arpa.", "PTR"),
                ("1." + "0." * 31 + "ip6.arpa.", "PTR"),
            ]:  # fmt: skip
                assert await steadily(kdns, name, qtype) == "SERVFAIL", (name, qtype)
            assert await answer(kdns, "www.example.com.") in (
                "192.0.2.80 192.0.2.81", "CNAME 192.0.2.80 192.0.2.81", "192.0.2.80",
            )  # fmt: skip
            assert not [a.name for a in upstream.asked if "cluster.local" in a.name.lower()]
            assert await readiness(kdns) == (503, "kubernetes")
            assert await age(kdns) == -1, "it never had a word"
            assert said.lines("starting server with unsynced Kubernetes API")
            (line,) = said.lines("unreachable")
            assert "cluster names get SERVFAIL until it is listed" in line

            await api.start(port=api.port)
            await until_ready(kdns)
            assert await steadily(kdns, "web") == "10.96.0.50", "no old SERVFAIL from any cache"
            assert await steadily(kdns, "gone") == "NXDOMAIN", "no old SERVFAIL from any cache"
            assert await steadily(kdns, "50.0.96.10.in-addr.arpa.", "PTR") == "PTR"


# --- it refuses -------------------------------------------------------------------------------

REFUSALS: dict[str, tuple[list[Fault], str]] = {
    "401": ([Fault(401)] * 5, "denied: 401 Faulty: a fault was asked for; the credentials"),
    "403": ([Fault(403)] * 5, "denied: 403 Faulty: a fault was asked for; the account needs"),
    "410 as status": ([Fault(410)], "Service: 410 Faulty: a fault was asked for; listing again"),
    "410 in the stream": ([Fault(lost=True)], "too old resource version"),
    "410 again and again": ([Fault(410)] * 4, "expired: 410 Faulty"),
    "429": ([Fault(429, headers={"Retry-After": "0.02"})] * 3, "unreachable: 429 Faulty"),
    "500": ([Fault(500)] * 5, "unreachable: 500 Faulty"),
    "cut in the middle of a line": ([Fault(raw=b'{"type": "ADD', cut=True)], "unreachable: 127."),
    "half a line, then the end": ([Fault(raw=b'{"type": "ADD', end=True)], ""),
    "what is no JSON": ([Fault(raw=b"<html>502</html>\n")] * 2, "is not an event"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
async def test_answers_outlive_a_refusal(case: str, said: Said) -> None:
    faults, line = REFUSALS[case]
    async with ApiReplay() as api:
        # The first watch ends after the two initial events and one change.
        api.fault("services", "watch", Fault(after=3, end=True), *faults)
        await api.put(namespace())
        await api.put(WEB)
        async with RunningKdns(corefile(api.url)) as kdns:
            assert await steadily(kdns, "web") == "10.96.0.50"
            assert await steadily(kdns, "last") == "NXDOMAIN"
            await api.put(service("more", "10.96.0.51"))
            while len(api.watches("services")) < 2 + len(faults):
                assert await answer(kdns, "web") == "10.96.0.50"
                await asyncio.sleep(0.01)
            await api.put(service("last", "10.96.0.52"))
            await until_answered(kdns, "last", "10.96.0.52")
            assert await steadily(kdns, "web") == "10.96.0.50"
            assert await steadily(kdns, "more") == "10.96.0.51"
            if line:
                assert len(said.lines(line)) == 1, said.lines()
            if said.lines("serving what is known"):
                await until(lambda: said.lines("up to date again"))


async def test_a_token_that_is_refused_at_first_is_tried_again(said: Said) -> None:
    async with ApiReplay(token="secret") as api:
        await api.put(namespace())
        await api.put(WEB)
        async with RunningKdns(corefile(api.url).replace("5s", "100ms")) as kdns:
            assert await steadily(kdns, "web") == "SERVFAIL"
            assert await readiness(kdns) == (503, "kubernetes")
            assert len(said.lines("denied: 401 Unauthorized")) == 1
            assert not said.lines("up to date again"), "a refusal is no sign of life"
            assert await age(kdns) == -1
            api.token = ""
            await until_ready(kdns)
            assert await steadily(kdns, "web") == "10.96.0.50"


async def test_a_long_list_that_expires_between_its_pages_is_had_in_the_end() -> None:
    many = [service(f"s{n}", f"10.96.{n >> 8}.{n & 255}") for n in range(1, 1101)]
    async with cluster(*many, watch_list="refused") as (api, kdns):
        assert await steadily(kdns, "s1100") == "10.96.4.76"
        await api.stop()
        await api.delete(many[0])
        await api.put(service("new", "10.96.200.1"))
        api.forget()
        api.fault("services", "list", Fault(), Fault(410), Fault(), Fault(410))
        await api.start(port=api.port)
        await until_answered(kdns, "new", "10.96.200.1")
        assert await steadily(kdns, "s1") == "NXDOMAIN"
        assert await steadily(kdns, "s1100") == "10.96.4.76"


# --- it hangs ---------------------------------------------------------------------------------


async def test_a_connection_that_went_dead_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = Timing(first=0.01, most=0.05, settled=0.0, quiet=0.2, initial_quiet=0.2)
    monkeypatch.setattr(kube, "Timing", lambda: quiet)
    async with cluster(WEB) as (api, kdns):
        api.silent = True
        await api.put(service("new", "10.96.0.51"))
        before = len(api.asked)
        await until(lambda: len(api.asked) >= before + 6)
        assert await steadily(kdns, "web") == "10.96.0.50"
        assert await steadily(kdns, "new") == "NXDOMAIN"
        api.silent = False
        await until_answered(kdns, "new", "10.96.0.51")


async def test_an_api_server_that_accepts_and_says_nothing(
    monkeypatch: pytest.MonkeyPatch, said: Said
) -> None:
    short = Timing(first=0.01, most=0.05, settled=0.0, quiet=0.2, initial_quiet=0.2, list=0.2)
    monkeypatch.setattr(kube, "Timing", lambda: short)

    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(mute, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()[:2]
        text = corefile(f"http://{host}:{port}").replace("5s", "100ms")
        async with RunningKdns(text) as kdns:
            await until(lambda: failures(kdns) >= 9)
            assert await steadily(kdns, "web") == "SERVFAIL"
            assert len(said.lines("unreachable: no answer to list Service")) == 1
            assert len(said.lines("unreachable")) == 3, "one a kind, not one a try"
            assert await readiness(kdns) == (503, "kubernetes")


# --- what it sends is not what it should be ----------------------------------------------------

BROKEN: dict[str, tuple[Json, str]] = {
    "no address": (service("bad", "not-an-ip"), "spec.clusterIP: 'not-an-ip' is not an IP addr"),
    "dots in a name": (service("bad.name", "10.96.0.9"), "metadata.name: 'bad.name' is not a DNS"),
    "a long name": (service("b" * 64, "10.96.0.9"), "is not a DNS label"),
    "a port out of range": (
        service("bad", "10.96.0.9", ports=[{"port": 70000}]),
        "spec.ports[0].port: 70000 is not in 1 to 65535",
    ),
    "a word for a port": (
        service("bad", "10.96.0.9", ports=[{"port": "http"}]),
        "spec.ports[0].port: Expected `int`, got `str`",
    ),
    "ports that are no list": (service("bad", "10.96.0.9", ports="80"), "spec.ports: Expected"),
    "a spec that is no object": (
        {"kind": "Service", "metadata": {"name": "bad", "namespace": "default"}, "spec": [1]},
        "spec: Expected",
    ),
    "an endpoint that is no address": (slice_of("web", "10.244.0.1", "::zz"), "'::zz' is not an"),
    "a slice of no known family": (
        {**slice_of("web", "10.244.0.1"), "addressType": "IPX"},
        "addressType: 'IPX' is not one of",
    ),
}  # fmt: skip


@pytest.mark.parametrize("when", ["listed", "watched"])
@pytest.mark.parametrize("case", BROKEN)
async def test_an_object_the_api_should_never_have_sent(case: str, when: str, said: Said) -> None:
    broken, line = BROKEN[case]
    kind = broken["kind"]
    async with cluster(WEB, *[broken] * (when == "listed")) as (api, kdns):
        if when == "watched":
            await api.put(broken)
        await api.put(broken)
        await api.put(service("after", "10.96.0.51"))
        await api.put(slice_of("after", "10.244.0.7"))
        await until_answered(kdns, "after", "10.96.0.51")
        await until(lambda: kdns.app.metrics.value(SKIPPED, kind) == 2)
        assert await steadily(kdns, "web") == "10.96.0.50", "the rest is kept"
        (said_once,) = said.lines(line)
        assert said_once.startswith(f"{kind} {'default/'}") and "skipped" in said_once
        assert not said.lines("bug")


async def test_a_service_that_breaks_keeps_its_last_good_answer_until_it_is_deleted() -> None:
    async with cluster(WEB) as (api, kdns):
        assert await steadily(kdns, "web") == "10.96.0.50"
        await api.put(service("web", "not-an-ip"))
        await api.put(service("after", "10.96.0.51"))
        await until_answered(kdns, "after", "10.96.0.51")
        assert await steadily(kdns, "web") == "10.96.0.50"
        await api.delete(service("web", "not-an-ip"))
        await until_answered(kdns, "web", "NXDOMAIN")


@pytest.mark.parametrize(
    "target",
    ["", "a..b", "x" * 64 + ".example.com", "a." * 130, "caf\u00e9.example", "\u0000", "."],
)
async def test_an_external_name_that_is_no_name(target: str) -> None:
    odd = service("odd", "", type="ExternalName", externalName=target, clusterIPs=[], ports=[])
    async with cluster(WEB, odd) as (_, kdns):
        assert await steadily(kdns, "web") == "10.96.0.50"
        for qtype in ("A", "CNAME", "SRV"):
            reply = await kdns.ask("odd.default.svc.cluster.local.", qtype)
            assert reply.rcode in (t.NOERROR, t.NXDOMAIN, t.SERVFAIL), (target, qtype)
        assert kdns.app.metrics.value("coredns_panics_total") == 0


# --- the cluster changes ----------------------------------------------------------------------


async def test_a_service_that_changes_its_type() -> None:
    async with cluster(WEB, slice_of("web", "10.244.0.1", "10.244.0.2")) as (api, kdns):
        headless = service("web", "None")
        elsewhere = service(
            "web", "", type="ExternalName", externalName="other.default.svc.cluster.local",
            clusterIPs=[], ports=[],
        )  # fmt: skip
        await api.put(service("other", "10.96.0.99"))
        await until_answered(kdns, "other", "10.96.0.99")
        for _ in range(2):
            assert await steadily(kdns, "web") == "10.96.0.50"
            assert await steadily(kdns, "10-244-0-1.web.default") == "10.244.0.1"
            assert await steadily(kdns, "50.0.96.10.in-addr.arpa.", "PTR") == "PTR"
            await api.put(headless)
            await until_answered(kdns, "web", "10.244.0.1 10.244.0.2")
            assert await steadily(kdns, "web") == "10.244.0.1 10.244.0.2"
            assert await steadily(kdns, "10-244-0-1.web.default") == "10.244.0.1"
            assert await steadily(kdns, "50.0.96.10.in-addr.arpa.", "PTR") != "PTR"
            await api.put(elsewhere)
            await until_answered(kdns, "web", "10.96.0.99 CNAME")
            assert await steadily(kdns, "web") == "10.96.0.99 CNAME"
            assert await steadily(kdns, "web", "CNAME") == "CNAME"
            await api.put(WEB)
            await until_answered(kdns, "web", "10.96.0.50")
            assert await steadily(kdns, "web", "CNAME") == "NODATA"


async def test_an_external_name_that_leads_somewhere_else_now() -> None:
    outside = service(
        "web", "", type="ExternalName", externalName="www.example.com", clusterIPs=[], ports=[]
    )
    async with (
        UpstreamServer() as upstream,
        cluster(outside, upstream=upstream.port) as (api, kdns),
    ):
        assert "CNAME" in await steadily(kdns, "web")
        await api.put(WEB)
        await until_answered(kdns, "web", "10.96.0.50")
        await api.put(outside)
        async with asyncio.timeout(3):
            while "CNAME" not in await answer(kdns, "web"):
                await asyncio.sleep(0.01)


async def test_endpoints_of_a_headless_service_come_and_go() -> None:
    async with cluster(service("db", "None"), slice_of("db", "10.244.0.1")) as (api, kdns):
        assert await steadily(kdns, "db") == "10.244.0.1"
        await api.put(slice_of("db", "10.244.0.1", "10.244.0.2"))
        await until_answered(kdns, "db", "10.244.0.1 10.244.0.2")
        assert await steadily(kdns, "10-244-0-2.db.default") == "10.244.0.2"
        await api.put(slice_of("db", "10.244.0.2"))
        await until_answered(kdns, "db", "10.244.0.2")
        assert await steadily(kdns, "10-244-0-1.db.default") == "NXDOMAIN"
        await api.delete(slice_of("db"))
        await until_answered(kdns, "db", "NXDOMAIN")
        await api.put(slice_of("db", "10.244.0.3"))
        await until_answered(kdns, "db", "10.244.0.3")
        assert await steadily(kdns, "db") == "10.244.0.3", "no old NXDOMAIN from any cache"


async def test_a_namespace_that_is_deleted_takes_its_names_along() -> None:
    objects = [namespace("shop"), service("cart", "10.96.0.60", "shop")]
    async with cluster(WEB, *objects) as (api, kdns):
        assert await steadily(kdns, "cart.shop") == "10.96.0.60"
        assert await steadily(kdns, "shop.svc.cluster.local.") == "NODATA"
        assert await steadily(kdns, "gone.shop") == "NXDOMAIN"
        # The namespace goes first, its Services some time after it, as in a real cluster.
        await api.delete(objects[0])
        await until_answered(kdns, "shop.svc.cluster.local.", "NXDOMAIN")
        assert await steadily(kdns, "cart.shop") == "NXDOMAIN"
        await api.delete(objects[1])
        await api.put(service("after", "10.96.0.61"))
        await until_answered(kdns, "after", "10.96.0.61")
        await api.put(objects[0])
        await until_answered(kdns, "shop.svc.cluster.local.", "NODATA")
        assert await steadily(kdns, "cart.shop") == "NXDOMAIN"
        await api.put(objects[1])
        await until_answered(kdns, "cart.shop", "10.96.0.60")
        assert await steadily(kdns, "cart.shop") == "10.96.0.60"
        assert await steadily(kdns, "web") == "10.96.0.50"


# --- ready ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "after"),
    [
        ("", (200, "OK")),
        ("{\n monitor until-ready\n }", (200, "OK")),
        ("{\n monitor continuously\n }", (503, "kubernetes")),
    ],
)
async def test_ready_tells_of_old_knowledge_only_where_it_is_asked_to(
    option: str, after: tuple[int, str], monkeypatch: pytest.MonkeyPatch, said: Said
) -> None:
    async with cluster(WEB, ready=option) as (api, kdns):
        assert await readiness(kdns) == (200, "OK")
        ((pipeline, _),) = kdns.app.pipelines.values()
        await api.stop()
        await until(lambda: said.lines("unreachable"))
        now = pipeline._clock()
        monkeypatch.setattr(pipeline, "_clock", lambda: now + 170)
        assert await readiness(kdns) == (200, "OK")
        monkeypatch.setattr(pipeline, "_clock", lambda: now + 190)
        assert await readiness(kdns) == after
        assert await steadily(kdns, "web") == "10.96.0.50"
        assert bool(said.lines("no word from the API server for 19")) == (after[0] == 503)
        await api.start(port=api.port)
        await until(lambda: said.lines("up to date again"))
        assert await readiness(kdns) == (200, "OK")


async def test_ready_knows_the_age_after_a_reload_too(tmp_path: Path) -> None:
    conf = tmp_path / "Corefile"
    async with ApiReplay() as api:
        await api.put(namespace())
        conf.write_text(corefile(api.url))
        async with RunningKdns(conf=str(conf)) as kdns:
            conf.write_text(corefile(api.url, ready="{\n monitor continuously\n }"))
            assert await kdns.app.reload()
            assert await readiness(kdns) == (200, "OK")
            ((pipeline, _),) = kdns.app.pipelines.values()
            pipeline._heard["Namespace"] -= 1000
            assert await readiness(kdns) == (503, "kubernetes")


# --- how it is said ---------------------------------------------------------------------------


def pipeline_at(clock: list[float]) -> Pipeline:
    return Pipeline(Store(("Service", "Namespace")), lambda deps: None, lambda: clock[0])


async def test_each_outage_is_said_once_however_many_kinds_and_ways(said: Said) -> None:
    clock = [1000.0]
    pipeline = pipeline_at(clock)
    for _ in range(20):
        clock[0] += 30
        for kind in ("Service", "Namespace"):
            pipeline.failed(kind, Unreachable("api: Connection refused"), 1.0)
            pipeline.failed(kind, Unreachable(f"api: no connection in {clock[0]} s"), 1.0)
    assert len(said.lines("unreachable")) == 2
    pipeline.heard("Service")
    assert not said.lines("again;") and not said.lines("up to date again")
    pipeline.heard("Namespace")
    assert len(said.lines("up to date again")) == 1
    pipeline.failed("Service", Unreachable("api: Connection refused"), 1.0)
    assert len(said.lines("Connection refused")) == 2, "another outage"


async def test_a_server_that_comes_and_goes_does_not_fill_the_log(said: Said) -> None:
    clock = [1000.0]
    pipeline = pipeline_at(clock)
    for _ in range(600):
        clock[0] += 1
        pipeline.failed("Service", Unreachable(f"watch ended after {clock[0]} s"), 1.0)
        pipeline.heard("Service")
    assert len(said.lines("watch ended")) == 600 / SAY_AGAIN
    assert len(said.lines("up to date again")) == 600 / SAY_AGAIN


async def test_one_kind_that_is_forbidden_makes_all_of_it_old(said: Said) -> None:
    clock = [1000.0]
    pipeline = pipeline_at(clock)
    assert pipeline.age() is None
    for kind in ("Service", "Namespace"):
        pipeline.heard(kind)
    for _ in range(10):
        clock[0] += 60
        pipeline.failed("Namespace", Denied("403"), 30.0)
        pipeline.heard("Service")
    assert pipeline.age() == 600
    assert len(said.lines("denied: 403")) == 1 and not said.lines("up to date again")


# --- bugs of our own --------------------------------------------------------------------------


async def test_a_bug_in_the_source_costs_a_listing_and_not_the_server(
    monkeypatch: pytest.MonkeyPatch, said: Said, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kdns.source.follow.RESTART", 0.01)
    async with cluster(WEB) as (api, kdns):
        assert await steadily(kdns, "web") == "10.96.0.50"
        original, left = kube.KubeSource._tell, [3]

        def tell(self: kube.KubeSource, *args: Any) -> None:
            if left[0]:
                left[0] -= 1
                raise KeyError("a bug")
            original(self, *args)

        monkeypatch.setattr(kube.KubeSource, "_tell", tell)
        await api.put(service("new", "10.96.0.51"))
        await until_answered(kdns, "new", "10.96.0.51")
        assert not left[0]
        assert await steadily(kdns, "web") == "10.96.0.50"
        traced = [r for r in caplog.records if r.exc_info and "starts again" in r.getMessage()]
        assert 1 <= len(traced) <= 3
        assert kdns.app.pipelines and api.open_watches


async def test_a_bug_in_a_plugin_that_takes_a_change_leaves_the_others_with_it(
    said: Said,
) -> None:
    pipeline = pipeline_at([1000.0])
    forgotten: list[Any] = []
    pipeline.invalidate = forgotten.append
    seen: list[int] = []

    def broken(snapshot: Snapshot, changes: Changes, now: float) -> None:
        if snapshot.revision:
            raise KeyError("a bug")

    def sound(snapshot: Snapshot, changes: Changes, now: float) -> tuple[()]:
        seen.append(snapshot.revision)
        return ()

    pipeline.subscribe(broken)
    pipeline.subscribe(sound)
    pipeline.mark_synced("Service")
    pipeline.mark_synced("Namespace")
    async with asyncio.timeout(5):
        await pipeline.synced.wait()
    assert seen == [0, 1]
    assert forgotten == [None], "no answer is trusted that may be wrong now"
    assert len(said.lines("a bug in kdns while taking over a change")) == 1


def watching() -> list[str]:
    names = [task.get_name() for task in asyncio.all_tasks()]
    return [name for name in names if name.startswith("watch ")]


async def test_a_reload_that_fails_leaves_nothing_running(tmp_path: Path) -> None:
    conf = tmp_path / "Corefile"
    async with ApiReplay() as api, ApiReplay() as other:
        for one in (api, other):
            await one.put(namespace())
            await one.put(WEB)
        conf.write_text(corefile(api.url))
        async with RunningKdns(conf=str(conf)) as kdns:
            blocks = (
                f"example.org:{other.port} {{\n bind 127.0.0.1\n whoami\n}}\n",
                "tls://example.org:0 {\n bind 127.0.0.1\n tls no.crt no.key\n whoami\n}\n",
            )
            for block in blocks:
                conf.write_text(corefile(other.url) + block)
                with contextlib.suppress(ConfigError):
                    assert not await kdns.app.reload()
                assert len(kdns.app.pipelines) == 1
                ((spec, _),) = kdns.app.pipelines.items()
                assert isinstance(spec, KubeSpec) and spec.endpoint == api.url
                await until(lambda: len(watching()) == 3)
                ((pipeline, _),) = kdns.app.pipelines.values()
                assert len(pipeline._readers) == 1
            assert await steadily(kdns, "web") == "10.96.0.50"


async def test_a_server_that_forwards_to_itself_says_so_at_once() -> None:
    port = free_port()
    text = f""".:{port} {{
        bind 127.0.0.1
        loop
        forward . 127.0.0.1:{port}
    }}"""
    async with RunningKdns(text) as kdns:
        async with asyncio.timeout(1.5):  # less than one time-out of an upstream question
            while kdns.app.metrics.value("kdns_loop_detected", f"dns://127.0.0.1:{port}", ".") != 1:
                await asyncio.sleep(0.01)
        assert (await kdns.ask("www.example.com.")).rcode == t.SERVFAIL
