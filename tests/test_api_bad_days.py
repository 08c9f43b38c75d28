"""The embedded API on bad days: what it gets is broken, huge, hostile, or too much of it."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import logging
import re
import resource
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from asking_api import SERVICES, TOKEN, Answer, Api, Obj, named, service
from running_api import Kubectl
from yarl import URL

import kdns
from kdns.api.kinds import BY_PLURAL
from kdns.api.objects import How
from kdns.api.store import HELD, Delete, ObjectStore, Put
from kdns.errors import ApiError, KdnsError

MAPS = "/api/v1/namespaces/default/configmaps"
PODS = "/api/v1/namespaces/default/pods"
MERGE = "application/merge-patch+json"
JSON_PATCH = "application/json-patch+json"
HEAD = f"Host: x\r\nAuthorization: Bearer {TOKEN}\r\nConnection: close\r\n"
SERVICE = BY_PLURAL["", "services"]
pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def api() -> AsyncIterator[Api]:
    async with Api(ObjectStore()) as api:
        yield api


async def raw(api: Api, request: bytes) -> tuple[int, bytes]:
    """Send octets as they are; return the code and the body of what comes back."""
    reader, writer = await asyncio.open_connection("127.0.0.1", api.server.port)
    writer.write(request)
    async with asyncio.timeout(10):
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"Content-Length: (\d+)", head)
        body = await reader.readexactly(int(length[1])) if length else await reader.read()
    writer.close()
    return int(head.split()[1]), body


async def get(api: Api, path: bytes, head: str = HEAD) -> tuple[int, bytes]:
    return await raw(api, b"GET %s HTTP/1.1\r\n%s\r\n" % (path, head.encode()))


# --- what is written about bodies ------------------------------------------------------------


async def test_what_a_client_misspells_cannot_end_the_header_it_is_warned_in(api: Api) -> None:
    made = await api.create({**service("web"), "a\r\nX-Evil: 1": 1, "b\u0000": 1})
    assert made.code == 201
    assert "X-Evil" not in made.headers
    assert made.headers.getall("Warning") == [
        '299 - "unknown field \\"a��X-Evil: 1\\""',
        '299 - "unknown field \\"b�\\""',
    ]


async def test_warnings_are_no_longer_than_clients_take(api: Api) -> None:
    odd = {f"{number:03}{'x' * 2000}": 1 for number in range(100)}
    warnings = (await api.create({**service("web"), **odd})).headers.getall("Warning")
    assert len(warnings) == 16
    assert all(len(one) < 300 for one in warnings)


async def test_a_value_of_a_wrong_type_is_told_once(api: Api) -> None:
    obj = service("web")
    obj["spec"]["ports"] = [{"port": "80"}]
    assert (await api.create(obj)).text == (
        'Service in version "v1" cannot be handled as a Service: json: cannot unmarshal string'
        " into Go struct field ServicePort.spec.ports.port of type int32"
    )


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (JSON_PATCH, rb'[{"op":"add","path":"/metadata/annotations","value":{"a":"\ud800"}}]'),
        (MERGE, rb'{"metadata":{"annotations":{"a":"\ud800"}}}'),
        ("application/apply-patch+yaml",
         rb'{"apiVersion":"v1","kind":"ConfigMap","metadata":{"annotations":{"a":"\ud800"}}}'),
    ],
)  # fmt: skip
async def test_half_a_character_in_a_patch_is_replaced(api: Api, kind: str, body: bytes) -> None:
    await api.create(named("m"), MAPS)
    done = await api.ask("PATCH", f"{MAPS}/m?fieldManager=me", body, kind=kind)
    assert (done.code, done.obj["metadata"]["annotations"]) == (200, {"a": "�"})


@pytest.mark.parametrize("seconds", [10**15, (1 << 63) - 1])
async def test_a_grace_longer_than_the_calendar(api: Api, seconds: int) -> None:
    pod = named("p", spec={"nodeName": "n", "containers": [{"name": "c", "image": "i"}]})
    assert (await api.create(pod, PODS)).code == 201
    gone = await api.ask("DELETE", f"{PODS}/p", {"gracePeriodSeconds": seconds})
    assert gone.code == 200
    assert gone.obj["metadata"]["deletionTimestamp"]


async def test_who_writes_is_kept_in_letters(api: Api) -> None:
    body = json.dumps(service("web")).encode()
    code, said = await raw(
        api,
        b"POST %s HTTP/1.1\r\n%sUser-Agent: cu\xff\xferl/8\r\nContent-Type: application/json"
        b"\r\nContent-Length: %d\r\n\r\n%s" % (SERVICES.encode(), HEAD.encode(), len(body), body),
    )  # fmt: skip
    assert code == 201
    assert json.loads(said)["metadata"]["managedFields"][0]["manager"] == "curl"


# --- bodies ----------------------------------------------------------------------------------


async def chunks(count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield b" " * 65536


async def test_a_body_without_a_length_is_read_no_further_than_one_with(api: Api) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(api.url + SERVICES, data=chunks(49)) as answer,
    ):
        assert (answer.status, (await answer.json())["reason"]) == (413, "RequestEntityTooLarge")


async def test_a_long_body_is_refused_by_its_length_alone(api: Api) -> None:
    code, _ = await raw(
        api,
        b"POST %s HTTP/1.1\r\n%sContent-Type: application/json\r\nContent-Length: 5000000\r\n"
        b"\r\n{" % (SERVICES.encode(), HEAD.encode()),
    )  # fmt: skip
    assert code == 413


async def test_a_client_that_asks_before_it_sends_is_told_to_go_on(api: Api) -> None:
    """As curl does with what is larger than 1 MiB; else it waits for a second."""
    body = json.dumps(service("web")).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", api.server.port)
    writer.write(
        b"POST %s HTTP/1.1\r\n%sContent-Type: application/json\r\nContent-Length: %d\r\n"
        b"Expect: 100-continue\r\n\r\n" % (SERVICES.encode(), HEAD.encode(), len(body))
    )
    async with asyncio.timeout(10):
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        assert (await reader.readline()).startswith(b"HTTP/1.1 201 ")
    writer.close()


async def zipped(api: Api, body: bytes, encoding: str = "gzip") -> Answer:
    return await api.ask("POST", SERVICES, body, headers={"Content-Encoding": encoding})


async def test_a_compressed_body_is_read(api: Api) -> None:
    body = gzip.compress(json.dumps(service("web")).encode())
    assert (await zipped(api, body)).obj["metadata"]["name"] == "web"


@pytest.mark.parametrize(
    ("body", "encoding", "code"),
    [
        (b"not gzip", "gzip", 400),
        (gzip.compress(b"{}" * 1000, mtime=0)[:-9], "gzip", 400),
        (b"{}", "br", 415),
        (b"{}", "zstd", 415),
        (gzip.compress(b"{}", mtime=0), "gzip, gzip", 415),
    ],
)
async def test_a_compressed_body_that_is_none(
    api: Api, body: bytes, encoding: str, code: int
) -> None:
    answer = await zipped(api, body, encoding)
    assert (answer.code, answer.obj["kind"]) == (code, "Status")


async def test_a_body_that_would_fill_the_memory_is_not_unpacked(api: Api) -> None:
    bomb = gzip.compress(gzip.compress(b" " * (1 << 29)))  # 2 kB; packed once, 500 kB
    bomb = gzip.decompress(bomb)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (await zipped(api, bomb)).code == 413
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 64 << 10  # kB


async def test_too_many_bodies_at_once_are_asked_to_come_again(api: Api) -> None:
    """Their memory is bounded however many clients there are."""
    held = []
    most = (3 << 20) - 1
    for _ in range(25):
        _, writer = await asyncio.open_connection("127.0.0.1", api.server.port)
        held.append(writer)
        writer.write(
            b"POST %s HTTP/1.1\r\n%sContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
            % (SERVICES.encode(), HEAD.encode(), most + 1, b" " * most)
        )  # the last octet never comes
    async with asyncio.timeout(10):
        for writer in held:
            await writer.drain()
        while (late := await api.ask("POST", SERVICES, b" " * (2 << 20))).code != 429:
            await asyncio.sleep(0.01)
    assert (late.reason, late.headers["Retry-After"]) == ("TooManyRequests", "1")
    for writer in held:
        writer.close()
    async with asyncio.timeout(10):
        while (await api.create(service("later"))).code != 201:
            await asyncio.sleep(0.01)


NINE = [b"a: &a [x,x,x,x,x,x,x,x,x]"] + [
    b"%c: &%c [%s]" % (98 + n, 98 + n, b",".join([b"*%c" % (97 + n)] * 9)) for n in range(9)
]
BOMBS: dict[str, tuple[str, bytes, int, str]] = {
    "a billion laughs": ("application/yaml", b"\n".join(NINE), 400, "its aliases expand"),
    "brackets in JSON": ("application/json", b"[" * 3_000_000, 400, "more than 100 deep"),
    "braces in JSON": ("application/json", b'{"a":' * 500_000, 400, "more than 100 deep"),
    "brackets in YAML": ("application/yaml", b"[" * 3_000_000, 400, "nested"),
    "dashes in YAML": ("application/yaml", b"- " * 100_000, 400, "nested"),
    "a number in YAML": ("application/yaml", b"a: " + b"1" * 2_000_000, 400, "limit"),
    "a number in JSON": ("application/json", b'{"a":%s}' % (b"1" * 2_000_000), 400, "limit"),
    "half of JSON": ("application/json", b'{"metadata": {"name": "web"', 400, "json parse error"),
    "a tag of Python's": ("application/yaml", b"a: !!python/object/apply:os.abort []", 400, "tag"),
    "two documents": ("application/yaml", b"a: 1\n---\nb: 2\n", 400, "document"),
    "a kind that is none": ("application/json", b'{"kind":"Gadget","apiVersion":"v1"}', 400,
                            "Gadget"),
    "a group that is none": ("application/json", b'{"kind":"Service","apiVersion":"x/v1"}', 400,
                             "does not match the expected API version"),
    "protobuf of nothing but lengths": (
        "application/vnd.kubernetes.protobuf", b"k8s\0" + b"\x0a\x02\x0a\x00" * 700_000, 400,
        "protobuf"),
    "protobuf that lies": (
        "application/vnd.kubernetes.protobuf", b"k8s\0\x0a\xff\xff\xff\xff\x07v1", 400, "protobuf"),
}  # fmt: skip


@pytest.mark.parametrize("what", BOMBS)
async def test_bodies_that_are_made_to_harm_are_refused(api: Api, what: str) -> None:
    kind, body, code, said = BOMBS[what]
    answer = await api.ask("POST", SERVICES, body, kind=kind)
    assert (answer.code, answer.obj["kind"]) == (code, "Status")
    assert said in answer.text
    assert len(answer.body) < 1000
    assert (await api.create(service("web"))).code == 201


# Octets of each: 200 kB to 1.4 MB, and a second and more to look at.
HUGE: dict[str, tuple[str, str, str, Any]] = {
    "a ConfigMap of many keys": (
        "POST", MAPS, "application/json",
        named("huge", data={f"k{n}": "v" for n in range(60_000)}),
    ),
    "a Service of many ports": (
        "POST", SERVICES, "application/json",
        named("huge", spec={"ports": [{"name": f"p{n}", "port": n} for n in range(1, 30_000)]}),
    ),
    "the same as YAML": (
        "POST", SERVICES, "application/yaml",
        "metadata: {name: huge}\nspec:\n  ports:\n"
        + "".join(f"  - name: p{n}\n    port: {n}\n" for n in range(1, 20_000)),
    ),
    "Endpoints of many addresses": (
        "POST", "/api/v1/namespaces/default/endpoints", "application/json",
        named("huge", subsets=[{
            "addresses": [{"ip": f"10.0.{n >> 8}.{n & 255}"} for n in range(40_000)],
            "ports": [{"port": 80}],
        }]),
    ),
    "an apply patch": (
        "PATCH", f"{MAPS}/huge?fieldManager=me", "application/apply-patch+yaml",
        {"apiVersion": "v1", "kind": "ConfigMap", "data": {f"k{n}": "v" for n in range(60_000)}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", HUGE)
async def test_while_a_huge_object_is_looked_at_others_are_answered(api: Api, what: str) -> None:
    method, path, kind, body = HUGE[what]
    sent = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    writing = asyncio.create_task(api.ask(method, path, sent, kind=kind))
    await asyncio.sleep(0)
    answered = 0
    while not writing.done():
        assert (await api.get("/version")).code == 200
        answered += 1
    assert (await writing).code == 201
    assert answered > 10  # on the loop it would be one or two


# --- paths, headers, selectors -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "code"),
    [
        (b"/api/v1/namespaces/default/services/web%2Fstatus", 404),
        (b"/api/v1/namespaces/default%2Fservices", 404),
        (b"/api/v1/namespaces/default/services/%2e%2e/configmaps", 404),
        (b"/api/v1/namespaces/default/services/../configmaps", 404),
        (b"/api/v1//namespaces", 404),
        (b"/api/v1/namespaces/default/services/a%00b", 404),
        (b"/api/v1/namespaces/default/services/" + b"x" * 60_000, 404),
        (b"/api/v1/namespaces/default/services/%ff%fe", 404),
        (b"/api/v1/namespaces/default/services/web%0d%0aX-Evil:%201", 404),
        (b"/api/v1/namespaces/default/services/;web", 404),
        (b"/%61pi/v1/namespaces", 200),
        (b"http://elsewhere/api/v1/namespaces", 200),
    ],
)
async def test_odd_paths(api: Api, path: bytes, code: int) -> None:
    await api.create(service("web"))
    found, body = await get(api, path)
    assert found == code
    assert json.loads(body)["kind"] == ("Status" if code == 404 else "NamespaceList")


@pytest.mark.parametrize(
    "path",
    [
        b"/healthz/../api/v1/namespaces", b"/version/../api/v1/secrets", b"/healthz/%2e%2e/api",
        b"/livez%2f..%2fapi", b"//healthz/..//api/v1/secrets", b"/healthz?/api/v1/secrets",
    ],
)  # fmt: skip
async def test_what_is_for_everybody_leads_nowhere_else(api: Api, path: bytes) -> None:
    _, body = await get(api, path, "Host: x\r\nConnection: close\r\n")
    assert body == b"ok" or json.loads(body)["code"] in (401, 404)


@pytest.mark.parametrize(
    "path",
    [b"/metrics", b"/debug/pprof/", b"/", b"/api", b"/apis", b"/openapi/v3", b"/logs", b"/versions",
     b"/healthzz", b"/stats/summary", b"/configz", b"/flagz", b"/statusz"],
)  # fmt: skip
async def test_without_the_token_there_is_nothing_but_health_and_version(
    api: Api, path: bytes
) -> None:
    assert (await get(api, path, "Host: x\r\nConnection: close\r\n"))[0] == 401


async def test_a_web_page_cannot_use_an_api_without_a_token() -> None:
    """A browser lets any page post to any host, without asking that host, if the body has no
    type; it says then whose page it is."""
    async with kdns.Cluster(dns=False) as cluster, aiohttp.ClientSession() as session:
        url = cluster.api_url + SERVICES
        async with session.post(url, json=service("web"), headers={"Origin": "null"}) as page:
            assert (page.status, (await page.json())["reason"]) == (403, "Forbidden")
        async with session.post(url, json=service("web")) as program:
            assert program.status == 201


class Rebound(aiohttp.abc.AbstractResolver):
    """Every name leads to this host, as the DNS server of an attacker says."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[aiohttp.abc.ResolveResult]:
        return [{"hostname": host, "host": "127.0.0.1", "port": port,
                 "family": socket.AF_INET, "proto": 0, "flags": 0}]  # fmt: skip

    async def close(self) -> None:
        pass


async def by_name(cluster: kdns.Cluster, name: str, **options: Any) -> tuple[int, Any]:
    """Return status and body of a list of Services that is asked for under a name."""
    url = URL(cluster.api_url + SERVICES).with_host(name)
    connector = aiohttp.TCPConnector(resolver=Rebound(), **options)
    head = {"Authorization": f"Bearer {token_of(cluster)}"} if options else {}
    async with (
        aiohttp.ClientSession(connector=connector, headers=head) as session,
        session.get(url) as answer,
    ):
        return answer.status, await answer.json()


def token_of(cluster: kdns.Cluster) -> str:
    return str(cluster.kubeconfig_dict["users"][0]["user"]["token"])


async def test_a_page_whose_name_leads_here_reads_nothing_without_a_token() -> None:
    """DNS rebinding: the browser takes the API for the page's own server, and sends no Origin."""
    async with kdns.Cluster(dns=False, api_names=["Dev.Example"]) as cluster:
        for name in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "com"):
            status, said = await by_name(cluster, name)
            assert (status, said["kind"], said["reason"]) == (403, "Status", "Forbidden")
            assert f"Host '{name}:" in said["message"] and "--api-name" in said["message"]
        for name in ("localhost", "LocalHost", "x.localhost", "127.0.0.1", socket.gethostname(),
                     "dev.example", "kubernetes.default.svc"):  # fmt: skip
            status, said = await by_name(cluster, name)
            assert (status, said["kind"]) == (200, "ServiceList"), name
        # Whoever looks whether it is well needs no name of its own.
        async with (
            aiohttp.ClientSession(headers={"Host": "lb.example"}) as session,
            session.get(f"{cluster.api_url}/readyz") as answer,
        ):
            assert (answer.status, await answer.text()) == (200, "ok")


async def test_with_tls_and_a_token_any_name_is_heard_and_the_certificate_has_those_given() -> None:
    async with kdns.Cluster(dns=False, tls=True, api_names=["dev.example"]) as cluster:
        authority = base64.b64decode(
            cluster.kubeconfig_dict["clusters"][0]["cluster"]["certificate-authority-data"]
        )
        trusting = ssl.create_default_context(cadata=authority.decode())
        assert (await by_name(cluster, "dev.example", ssl=trusting))[0] == 200
        assert (await by_name(cluster, "other.example", ssl=False))[0] == 200
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await by_name(cluster, "other.example", ssl=trusting)


async def test_kubectl_is_heard_without_a_token(tmp_path: Path) -> None:
    async with kdns.Cluster(dns=False) as cluster:
        kubectl = Kubectl(tmp_path, cluster.kubeconfig_text)
        place = f"localhost:{URL(cluster.api_url).port}"
        for flags in ((), (f"--server=http://{place}",)):
            said = await asyncio.to_thread(kubectl, *flags, "get", "services", "-o", "name")
            assert said == "service/kubernetes\n"


async def test_a_name_that_is_none_is_told() -> None:
    for name in ("a b", "", "http://x", "x:80", "-x", "ü.example"):
        with pytest.raises(KdnsError, match=r"is neither a host name, such as"):
            await kdns.Cluster(dns=False, api_names=[name]).start()


async def test_a_token_of_odd_octets_is_a_wrong_token(api: Api) -> None:
    for token in (b"\xff\xfe", b"\xc3\x28", "ümläut".encode(), b"x" * 60_000):
        head = b"Host: x\r\nConnection: close\r\nAuthorization: Bearer " + token
        request = b"GET %s HTTP/1.1\r\n%s\r\n\r\n" % (SERVICES.encode(), head)
        assert (await raw(api, request))[0] == 401


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("limit=-1", 200),
        ("limit=1e3", 400),
        ("limit=99999999999999999999", 400),
        ("watch=1&timeoutSeconds=-5", 400),
        ("resourceVersion=abc", 400),
        ("resourceVersion=-1", 400),
        ("watch=1&resourceVersion=abc", 400),
        ("continue=" + "x" * 3000, 400),
        ("continue=bnVsbA", 400),  # null
        ("continue=WyJhIl0", 400),  # ["a"]
        ("labelSelector=" + "a,b!=c," * 14_000 + "d", 200),  # 100 kB
        ("labelSelector=a+in+(" + "b," * 50_000 + "c)", 200),
        ("labelSelector=" + "(" * 100_000, 400),
    ],
)
async def test_odd_queries(api: Api, query: str, code: int) -> None:
    await api.create(service("web"))
    answer = await api.get(f"{SERVICES}?{query}")
    assert (answer.code, answer.obj["kind"]) == (code, "ServiceList" if code == 200 else "Status")


async def test_a_page_of_another_list_goes_on_where_its_name_would_be(api: Api) -> None:
    for name in ("a", "b", "c"):
        await api.create(named(name), MAPS)
        await api.create(service(name))
    token = (await api.get(f"{MAPS}?limit=2")).obj["metadata"]["continue"]
    assert (await api.get(f"{SERVICES}?continue={token}")).names == ["c"]


@pytest.mark.parametrize(
    "octets",
    [b"\x16\x03\x01\x02\x00\x01\x00", b"GET / HTTP/9.9\r\n\r\n", b"\0" * 100 + b"\r\n\r\n",
     b"GET /" + b"x" * 200_000, b"POST / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding:"
     b" chunked\r\n\r\n0\r\n\r\n"],
)  # fmt: skip
async def test_what_is_no_http_is_refused_and_fills_no_log(
    api: Api, octets: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    assert (await raw(api, octets + b"\r\n\r\n"))[0] == 400
    assert not [one for one in caplog.records if one.levelno >= logging.ERROR]


async def test_a_client_of_http_1_0_may_watch(api: Api) -> None:
    await api.create(service("web"))
    code, body = await raw(
        api, f"GET {SERVICES}?watch=1&timeoutSeconds=1 HTTP/1.0\r\n{HEAD}\r\n".encode()
    )
    assert (code, json.loads(body)["object"]["metadata"]["name"]) == (200, "web")


# --- many, and slow ones -------------------------------------------------------------------------


async def test_connections_that_never_say_what_they_want_keep_nobody_out(api: Api) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4200
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"needs {wanted} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    idle: list[asyncio.StreamWriter] = []
    try:
        for number in range(2000):
            _, one = await asyncio.open_connection("127.0.0.1", api.server.port)
            if number % 2:  # half of them begin a request, and take their time
                one.write(b"GET /api HTTP/1.1\r\nX: ")
            idle.append(one)
        assert (await api.create(service("web"))).code == 201
        for one in idle[1::2]:
            one.write(b"x")
        assert (await api.get(f"{SERVICES}/web")).code == 200
    finally:
        for one in idle:
            one.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_what_a_watch_begins_with_is_not_all_in_memory_at_once() -> None:
    async with Api(ObjectStore(), patience=0.5) as api:
        key = ("configmaps", "default", "")
        filler = "x" * 1_000_000
        for number in range(100):
            obj = {"metadata": {"name": f"c{number}", "uid": "u"}, "data": {"x": filler}}
            await api.store.write(Put((*key[:2], f"c{number}"), obj))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with socket.create_connection(("127.0.0.1", api.server.port)) as stuck:
            stuck.sendall(f"GET {MAPS}?watch=1 HTTP/1.1\r\n{HEAD}\r\n".encode())
            async with asyncio.timeout(10):
                while not api.server.watches:
                    await asyncio.sleep(0.01)
                assert (await api.create(service("web"))).code == 201
                while api.server.watches:  # it takes nothing, and is cut off
                    await asyncio.sleep(0.01)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10  # kB


async def test_the_past_of_huge_objects_is_bounded() -> None:
    """A watcher that never reads, and who resumes, hold no more than that."""
    store = ObjectStore()
    await store.open()
    stuck = store.watch("configmaps", 0)
    filler = "x" * (1 << 20)
    key = ("configmaps", "default", "huge")
    for _ in range((HELD >> 20) + 2):
        await store.write(Put(key, {"metadata": {"name": "huge"}, "data": {"x": filler}}))
    assert stuck.ended
    assert [batch async for batch in stuck] == []
    with pytest.raises(ApiError) as refused:
        store.watch("configmaps", 1)
    assert refused.value.code == 410
    await store.write(Delete(key))
    assert store.watch("configmaps", store.revision - 1) is not None
    await store.close()


async def test_a_hundred_writers_of_one_annotation_lose_no_count(api: Api) -> None:
    await api.create(service("web"))

    async def count_one() -> None:
        while True:
            obj = (await api.get(f"{SERVICES}/web")).obj
            notes = obj["metadata"].setdefault("annotations", {})
            notes["count"] = str(int(notes.get("count", "0")) + 1)
            done = await api.ask("PUT", f"{SERVICES}/web", obj)
            if done.code == 200:
                return
            assert (done.code, done.reason) == (409, "Conflict")

    await asyncio.gather(*(count_one() for _ in range(100)))
    obj = (await api.get(f"{SERVICES}/web")).obj
    assert obj["metadata"]["annotations"]["count"] == "100"


async def test_two_who_apply_the_same_new_object_both_succeed(tmp_path: Path) -> None:
    async with Api(ObjectStore(str(tmp_path / "objects.db"))) as api:
        body = {"apiVersion": "v1", "kind": "ConfigMap"}

        async def apply(who: str) -> Answer:
            return await api.ask(
                "PATCH", f"{MAPS}/m?fieldManager={who}", {**body, "data": {who: "x"}},
                kind="application/apply-patch+yaml",
            )  # fmt: skip

        done = await asyncio.gather(*map(apply, "abcd"))
        assert sorted(one.code for one in done) == [200, 200, 200, 201]
        assert (await api.get(f"{MAPS}/m")).obj["data"] == dict.fromkeys("abcd", "x")


# --- addresses ---------------------------------------------------------------------------------


def node_port(name: str, **spec: Any) -> Obj:
    return service(name, type="NodePort", **spec)


async def test_a_write_that_is_only_tried_or_fails_takes_no_address(api: Api) -> None:
    """All 254 addresses and 2768 ports are there afterwards: these would take 2 each time."""
    for _ in range(50):
        tried = await api.ask("POST", f"{SERVICES}?dryRun=All", node_port("web"))
        assert tried.code == 201
        spec = tried.obj["spec"]
        bad = node_port("web", clusterIP=spec["clusterIP"])
        bad["spec"]["ports"] = [{"port": 80, "nodePort": 80}]
        assert (await api.create(bad)).code == 422
    fixed = node_port("fixed", clusterIP=spec["clusterIP"])
    fixed["spec"]["ports"][0]["nodePort"] = spec["ports"][0]["nodePort"]
    assert (await api.create(fixed)).code == 201
    # A change that is only tried, or fails, neither takes nor gives back.
    url = f"{SERVICES}/fixed"
    for query, change, code in (
        ("?dryRun=All", {"spec": {"type": "ClusterIP", "ports": [{"port": 80}]}}, 200),
        ("", {"spec": {"type": "ClusterIP", "ports": [{"port": 0}]}}, 422),
        ("", {"spec": {"ports": [{"port": 80, "nodePort": 1}]}}, 422),
    ):
        assert (await api.ask("PATCH", url + query, change, kind=MERGE)).code == code
        thief = node_port("thief")
        thief["spec"]["ports"][0]["nodePort"] = spec["ports"][0]["nodePort"]
        assert (await api.create(thief)).code == 422
    assert (await api.ask("DELETE", url)).code == 200
    assert (await api.create({**fixed, "metadata": {"name": "next"}})).code == 201


async def test_who_stops_waiting_leaves_addresses_as_the_store_has_them(tmp_path: Path) -> None:
    """An object that was written keeps its address, one that was deleted gives it back."""
    async with Api(ObjectStore(str(tmp_path / "objects.db"))) as api:
        mine = service("mine", clusterIP="10.96.0.77")

        async def impatient(work: Any) -> None:
            task = asyncio.create_task(work)
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        async with asyncio.timeout(10):
            await impatient(api.objects.create(SERVICE, "default", mine))
            while api.objects.find(SERVICE, "default", "mine") is None:
                await asyncio.sleep(0.001)
            other = {**mine, "metadata": {"name": "other"}}
            with pytest.raises(ApiError) as refused:
                await api.objects.create(SERVICE, "default", other)
            assert "provided IP is already allocated" in str(refused.value)
            await impatient(api.objects.delete(SERVICE, "default", "mine"))
            while api.objects.find(SERVICE, "default", "mine") is not None:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0)
            made = await api.objects.create(SERVICE, "default", other, How())
        assert made.obj["spec"]["clusterIP"] == "10.96.0.77"


# --- what is not served --------------------------------------------------------------------------


async def test_a_namespace_is_let_go_by_who_finalizes_it(api: Api) -> None:
    """As `kubectl replace --raw /api/v1/namespaces/x/finalize` is told to everywhere."""
    space = "/api/v1/namespaces"
    await api.create(named("stuck"), space)
    assert (await api.ask("DELETE", f"{space}/stuck")).obj["status"]["phase"] == "Terminating"
    obj = (await api.get(f"{space}/stuck")).obj
    obj["spec"]["finalizers"] = []
    wrong = {**obj, "metadata": {"name": "other"}}
    assert (await api.ask("PUT", f"{space}/stuck/finalize", wrong)).code == 400
    assert (await api.ask("PUT", f"{space}/stuck/finalize", obj)).code == 200
    assert (await api.get(f"{space}/stuck")).code == 404


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("/apis/apps/v1/namespaces/default/controllerrevisions", "controllerrevisions"),
        ("/apis/apps/v1/daemonsets", "daemonsets"),
        ("/api/v1/namespaces/default/replicationcontrollers", "replicationcontrollers"),
        ("/api/v1/persistentvolumes/x", "persistentvolumes"),
    ],
)
async def test_kinds_of_a_cluster_that_are_not_here_are_named(
    api: Api, method: str, path: str, what: str
) -> None:
    answer = await api.ask(method, path, {} if method == "POST" else None)
    assert (answer.code, answer.reason) == (404, "NotFound")
    assert answer.text == (
        f"the server could not find the requested resource: kdns' embedded registry has no {what}"
    )


async def test_tokens_of_service_accounts_are_not_made(api: Api) -> None:
    path = "/api/v1/namespaces/default/serviceaccounts"
    await api.create(named("robot"), path)
    answer = await api.ask("POST", f"{path}/robot/token", {"spec": {}})
    assert (answer.code, answer.reason) == (501, "NotImplemented")
    assert "the kubeconfig" in answer.text
