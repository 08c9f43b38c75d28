"""The registry's source that is a Kubernetes API server.

Carries out what the reflector of each kind asks for, over one HTTP connection a kind, and
tells a Sink. Where the server is and who we are to it comes from kubernetes.aio
(kubeconfig, in-cluster, exec plugins, OIDC), which is imported only if needed: it costs 0.35 s
and 50 MB. Its watch is not used (docs/DESIGN.md 1.3 point 4).
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import ipaddress
import os
import random
import ssl
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp

from kdns import __version__
from kdns.errors import Denied, Expired, SourceError, Unreachable
from kdns.metrics import Metrics
from kdns.registry.decode import PART
from kdns.registry.objects import (
    ENDPOINT_SLICE,
    NAMESPACE,
    NODE,
    POD,
    SERVICE,
    SERVICE_CIDR,
    SERVICE_IMPORT,
    Kind,
)
from kdns.registry.spec import KubeSpec
from kdns.source.reflector import (
    Apply,
    Emit,
    Failed,
    Pause,
    Reflector,
    Replace,
    Request,
    Skipped,
    Timing,
)
from kdns.source.selectors import selectors_of
from kdns.source.sink import Sink, Tally, log

PATHS: Final[dict[Kind, str]] = {
    SERVICE: "/api/v1/services",
    NAMESPACE: "/api/v1/namespaces",
    POD: "/api/v1/pods",
    ENDPOINT_SLICE: "/apis/discovery.k8s.io/v1/endpointslices",
    SERVICE_IMPORT: "/apis/multicluster.x-k8s.io/v1alpha1/serviceimports",
    NODE: "/api/v1/nodes",
    SERVICE_CIDR: "/apis/networking.k8s.io/v1/servicecidrs",
}
# Kinds that an API server may not have (before 1.33), or not show us: then there are none.
OPTIONAL: Final[frozenset[Kind]] = frozenset({SERVICE_CIDR})
MAX_LIST = 512 << 20  # octets of one list answer; 100,000 Pods are some 400 MiB
MAX_REFUSAL = 64 << 10  # octets read of an error's body
READ_BUFFER = 256 << 10
FEW = 8 << 10  # octets of a watch, some ten objects, that are taken in beside what else is done
FRESH = 60.0  # seconds after which tokens and certificates are read again before a request
LOAD = 60.0  # seconds an exec plugin may take

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)  # Go's DefBuckets


class KubeSource:
    """Follows an API server for ever. run() ends only by cancellation.

    timing, rng, clock -- for tests; clock gives monotonic seconds
    """

    def __init__(
        self,
        spec: KubeSpec,
        sink: Sink,
        metrics: Metrics,
        *,
        timing: Timing | None = None,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spec = spec
        self._sink = sink
        self._timing = timing or Timing()
        self._rng = rng or random.SystemRandom()
        self._clock = clock
        self._access = Access(spec, clock)
        self._tally = Tally(metrics)
        self._reading = asyncio.Lock()  # one kind's part a turn of the loop, answers in between
        self._listed: set[Kind] = set()
        self._without: set[Kind] = set()  # said once
        self._requests = metrics.counter(
            "coredns_kubernetes_rest_client_requests_total",
            "Number of HTTP requests, partitioned by status code, method, and host.",
            ("code", "method", "host"),
        )
        self._durations = metrics.histogram(
            "coredns_kubernetes_rest_client_request_duration_seconds",
            "Request latency in seconds. Broken down by verb and host.",
            ("verb", "host"),
            BUCKETS,
        )

    async def run(self) -> None:
        """List and watch all kinds of the spec."""
        async with asyncio.TaskGroup() as group:
            for kind in self._spec.kinds:
                group.create_task(self._follow(kind), name=f"watch {kind}")

    async def _follow(self, kind: Kind) -> None:
        reflector = Reflector(kind, self._rng, self._timing, selectors_of(self._spec, kind))
        async with Connection() as connection:
            while True:
                step = reflector.next()
                if isinstance(step, Pause):
                    await asyncio.sleep(step.seconds)
                else:
                    await self._exchange(kind, reflector, step, connection)

    async def _exchange(
        self, kind: Kind, reflector: Reflector, request: Request, connection: Connection
    ) -> None:
        """Make one request and tell the sink what comes of it."""
        began = self._clock()
        host = ""
        try:
            way = await self._access.get()
            host = way.host
            async with asyncio.timeout(request.total):
                async with asyncio.timeout(request.quiet):
                    response = await connection.get(way, PATHS[kind], request, self._timing.connect)
                async with response:
                    self._count(host, str(response.status), began)
                    await self._read(kind, reflector, request, response)
        except SourceError as e:
            self._tell(kind, reflector.on_failure(e, self._clock()))
        except aiohttp.ConnectionTimeoutError:
            self._count(host, "<error>", began)
            error = Unreachable(f"{host}: no connection in {self._timing.connect:g} s")
            self._tell(kind, reflector.on_failure(error, self._clock()))
        except TimeoutError:
            self._tell(kind, reflector.on_quiet(self._clock()))
        except (aiohttp.ClientError, OSError) as e:
            self._count(host, "<error>", began)
            if isinstance(e, (aiohttp.ClientSSLError, ssl.SSLError)):
                self._access.expire()
            error = Unreachable(f"{host}: {_say(e)}")
            self._tell(kind, reflector.on_failure(error, self._clock()))

    async def _read(
        self,
        kind: Kind,
        reflector: Reflector,
        request: Request,
        response: aiohttp.ClientResponse,
    ) -> None:
        if response.status != 200:
            body = await _read_body(response, MAX_REFUSAL)
            retry_after = _seconds(response.headers.get("Retry-After", ""))
            emits = reflector.on_refused(response.status, body, retry_after)
            if kind in OPTIONAL and response.status in (403, 404):
                self._go_without(kind, response.status)
            else:
                self._tell(kind, emits)
            return
        reflector.on_opened(self._clock())
        self._sink.heard(kind)  # not for a refusal: it tells nothing of the objects
        if not request.watch:
            body = await _read_body(response, MAX_LIST + 1)
            if len(body) > MAX_LIST:
                raise Unreachable(f"the list of {kind} is over {MAX_LIST} octets")
            self._sink.heard(kind)
            parts = reflector.reading(body)
            while True:
                async with self._reading:
                    for emits in parts:  # one of them
                        self._tell(kind, emits)
                        break
                    else:
                        return
                    await asyncio.sleep(0)
        chunks = response.content.iter_any()
        while True:
            # Anew for each: once the initial objects are in, silence may last longer.
            async with asyncio.timeout(reflector.quiet):
                chunk = await anext(chunks, b"")
            if not chunk:
                break
            self._sink.heard(kind)
            for at in range(0, len(chunk), PART):
                async with self._reading:
                    self._tell(kind, reflector.on_chunk(chunk[at : at + PART], self._clock()))
                    if len(chunk) > FEW:  # the next one may be there already
                        await asyncio.sleep(0)
                if reflector.leave:
                    return
        self._tell(kind, reflector.on_eof(self._clock()))

    def _go_without(self, kind: Kind, status: int) -> None:
        """Have none of a kind, until the next try; what was listed before stays."""
        sink = self._sink
        if kind not in self._listed and kind not in self._without:
            log.info("the API server shows no %s (%d): going on without", kind, status)
            self._without.add(kind)
            sink.replace(kind, ())
            sink.mark_synced(kind)
        sink.heard(kind)

    def _tell(self, kind: Kind, emits: Iterable[Emit]) -> None:
        sink = self._sink
        for emit in emits:
            match emit:
                case Apply(event, obj):
                    sink.apply(kind, event, obj)
                case Replace(objects, keep):
                    self._listed.add(kind)
                    sink.replace(kind, objects, keep)
                    sink.mark_synced(kind)
                case Skipped(error):
                    self._tally.skipped(error)
                case Failed(error, retry_in):
                    if isinstance(error, Denied):
                        self._access.expire()
                    self._tally.failed(kind, type(error).__name__.lower())
                    if isinstance(error, Expired) and not retry_in:
                        log.info("%s: %s; listing again", kind, error)
                    else:
                        sink.failed(kind, error, retry_in)

    def _count(self, host: str, code: str, began: float) -> None:
        self._requests.labels(code, "GET", host).add()
        self._durations.labels("GET", host).add(self._clock() - began)


def _say(error: Exception) -> str:
    """Return an error's text; aiohttp's own does not say that a connection was refused."""
    if isinstance(error, aiohttp.ClientConnectorError) and not isinstance(
        error, aiohttp.ClientSSLError
    ):
        number = error.os_error.errno
        if number is not None and number > 0:
            return os.strerror(number)
    return str(error) or type(error).__name__


async def _read_body(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """Return at most `limit` octets of the body."""
    parts: list[bytes] = []
    size = 0
    async for chunk in response.content.iter_any():
        parts.append(chunk)
        size += len(chunk)
        if size >= limit:
            break
    return b"".join(parts)[:limit]


def _seconds(text: str) -> float | None:
    """Return the seconds of a Retry-After header; a date in it is not worth reading."""
    try:
        seconds = float(text)
    except ValueError:
        return None
    return seconds if seconds >= 0 else None


# --- the way to the server ----------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Way:
    """Where the server is and what to show it.

    tls             -- None: plain HTTP, or the system's trust
    server_hostname -- the name the server's certificate is checked for, if not the host
    """

    url: str
    tls: ssl.SSLContext | None = None
    headers: dict[str, str] = field(default_factory=dict)
    proxy: str | None = None
    server_hostname: str | None = None

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc


class Connection:
    """The HTTP session of one kind, opened anew when the way has changed."""

    def __init__(self) -> None:
        self._way: Way | None = None
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Connection:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def get(
        self, way: Way, path: str, request: Request, connect: float
    ) -> aiohttp.ClientResponse:
        """Send the request and return the response, its body unread."""
        if self._session is None or way is not self._way:
            if self._session is not None:
                await self._session.close()
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ssl=way.tls if way.tls is not None else True),
                headers={"Accept": "application/json", "User-Agent": f"kdns/{__version__}"},
                read_bufsize=READ_BUFFER,
                # HTTP_PROXY without NO_PROXY must not capture a cluster's own traffic; where
                # a proxy is meant, way.proxy says so.
                trust_env=False,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
            self._way = way
        try:
            return await self._session.get(
                way.url + path,
                params=request.params,
                headers=way.headers,
                proxy=way.proxy,
                server_hostname=way.server_hostname,
                allow_redirects=False,  # a token goes to no other host
                # How long a watch may be silent changes while it is read: _read() sees to it.
                timeout=aiohttp.ClientTimeout(
                    total=None,
                    sock_connect=connect,
                    sock_read=None if request.watch else request.quiet,
                ),
            )
        except ValueError as e:  # a URL, header or proxy that aiohttp cannot use
            raise Unreachable(f"{way.host or way.url}: {e}") from e


class Access:
    """Keeps the way to the server fresh: tokens, certificates and kubeconfigs rotate.

    All of it is read again before a request if that was a minute ago or the server refused
    it; a token of an exec plugin lives as long as the plugin says.
    """

    def __init__(self, spec: KubeSpec, clock: Callable[[], float]) -> None:
        self._spec = spec
        self._clock = clock
        self._lock = asyncio.Lock()
        self._way: Way | None = None
        self._fresh_until = 0.0

    def expire(self) -> None:
        """What we showed was refused: read it again before the next request."""
        self._fresh_until = 0.0

    async def get(self) -> Way:
        """Return the way to the server. Raises Denied or Unreachable."""
        async with self._lock:
            if self._way is None or self._clock() >= self._fresh_until:
                self._way, fresh = await self._load()
                self._fresh_until = self._clock() + fresh
            return self._way

    async def _load(self) -> tuple[Way, float]:
        spec = self._spec
        try:
            async with asyncio.timeout(LOAD):
                if spec.kubeconfig:
                    return await _from_kubeconfig(spec)
                if spec.endpoint:
                    return await _from_endpoint(spec)
                return await _from_cluster(spec)
        except SourceError:
            raise
        except TimeoutError:
            raise Unreachable(f"no credentials in {LOAD:g} s; is an exec plugin stuck?") from None
        except Exception as e:
            # kubernetes.aio raises TypeError, KeyError and others for a kubeconfig that is
            # not as it should be, not only its ConfigException.
            where = spec.kubeconfig or spec.endpoint or "in-cluster configuration"
            raise Unreachable(f"{where}: {e or type(e).__name__}") from e


# How to name a source: in a Corefile, and with the proxy's flags.
_WAYS = (
    "'kubeconfig FILE' or 'endpoint URL', or use 'manifests PATH'",
    "--kubeconfig FILE or --master URL, or use --manifests PATH",
)


async def _from_endpoint(spec: KubeSpec) -> tuple[Way, float]:
    certificate, key, ca = spec.tls or ("", "", "")
    url = spec.endpoint.rstrip("/")
    if "://" not in url:
        url = f"{'https' if spec.tls else 'http'}://{url}"
    if urlsplit(url).scheme != "https":
        return Way(url), float("inf")

    def context() -> ssl.SSLContext:
        made = ssl.create_default_context(cafile=ca or None)
        if certificate:
            made.load_cert_chain(certificate, key or None)
        return made

    return Way(url, await asyncio.to_thread(context)), FRESH


async def _from_cluster(spec: KubeSpec) -> tuple[Way, float]:
    if not os.environ.get("KUBERNETES_SERVICE_HOST"):
        raise Unreachable(
            "not in a cluster (KUBERNETES_SERVICE_HOST is not set): name one with"
            f" {_WAYS[spec.only_forwarded]}"
        )
    config, client = await _kubernetes()
    configuration = client.Configuration()
    config.load_incluster_config(client_configuration=configuration)
    return await _way(configuration), FRESH


async def _from_kubeconfig(spec: KubeSpec) -> tuple[Way, float]:
    path = os.path.expanduser(spec.kubeconfig)
    if not os.path.isfile(path):
        raise Unreachable(f"kubeconfig {path} does not exist")
    config, client = await _kubernetes()
    configuration = client.Configuration()
    loader = await config.load_kube_config(
        config_file=path,
        context=spec.context or None,
        client_configuration=configuration,
        persist_config=False,
    )
    if "exec" in (user := _user_of(loader)) and not (
        configuration.api_key or configuration.cert_file
    ):
        # The library logs why and goes on without; the server would only say 401.
        raise Denied(f"exec plugin {user['exec']['command']!r} of {path} gave no credentials")
    way = await _way(configuration, environment_proxy(configuration.host, os.environ))
    return way, max(FRESH, _exec_lifetime(loader))


def _user_of(loader: Any) -> Any:
    return getattr(loader, "_user", None) or {}


def _exec_lifetime(loader: Any) -> float:
    """Return for how many seconds an exec plugin's token is good, less five minutes."""
    expiry = getattr(loader, "exec_plugin_expiry", None)
    return expiry.timestamp() - time.time() - 300 if expiry is not None else 0.0


async def _kubernetes() -> tuple[Any, Any]:
    """Import kubernetes.aio's config and client, without holding up the answers."""
    return (
        await asyncio.to_thread(importlib.import_module, "kubernetes.aio.config"),
        await asyncio.to_thread(importlib.import_module, "kubernetes.aio.client"),
    )


async def _way(configuration: Any, proxy: str | None = None) -> Way:
    rest = importlib.import_module("kubernetes.aio.client.rest")
    made = await asyncio.to_thread(rest.RESTClientObject, configuration)
    headers = {}
    token = (await configuration.auth_settings()).get("BearerToken")
    if token and token["value"]:
        headers["Authorization"] = token["value"].strip()
    return Way(
        configuration.host.rstrip("/"),
        made.ssl_context,
        headers,
        configuration.proxy or proxy,
        configuration.tls_server_name or None,
    )


def environment_proxy(url: str, environ: Any) -> str | None:
    """Return the proxy the environment names for `url`, as kubectl finds it: never for
    loopback, and NO_PROXY may hold domains, addresses and CIDRs."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    lower = {k.lower(): v for k, v in environ.items() if k.lower().endswith("_proxy")}
    proxy = lower.get(f"{parts.scheme}_proxy")
    if not proxy or host == "localhost":
        return None
    address: ipaddress.IPv4Address | ipaddress.IPv6Address | None
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        address = None
    if address is not None and address.is_loopback:
        return None
    for rule in lower.get("no_proxy", "").split(","):
        rule = rule.strip()
        if rule == "*":
            return None
        if address is not None:
            with contextlib.suppress(ValueError):
                if address in ipaddress.ip_network(rule, strict=False):
                    return None
        elif rule and (host == rule.lstrip(".") or host.endswith("." + rule.lstrip("."))):
            return None
    return proxy if "://" in proxy else f"http://{proxy}"
