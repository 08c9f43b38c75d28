"""The node's HTTP listeners: its health, its metrics, and each Service's health-check port.

Decides when listeners open and close and what happens where an address is taken. What is
answered is proxy/health.py's and the metrics' own; which Services have a port is the
forwarding table's.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from kdns.errors import ConfigError, Problem
from kdns.metrics import PLAIN_TEXT, Metrics
from kdns.plugins.plugin import HttpRoute
from kdns.proxy.config import ProxyConfig, render_config
from kdns.proxy.health import Answer, HealthCheck, NodeHealth, service_health
from kdns.proxy.settings import render_listen
from kdns.server.http import HttpServer, split_address

log = logging.getLogger("kdns.proxy")

RETRY = 5.0  # seconds between tries to listen where an address is taken, as kube-proxy
CONFIGZ_KEY = "kubeproxy.config.k8s.io"
TEXT = "text/plain; charset=utf-8"
# Called with what failed: a Service's check and why. kube-proxy: Event
# FailedToStartServiceHealthcheck.
Failed = Callable[[int, HealthCheck, str], None]


def _everywhere(address: str) -> str:
    """Return ":port" for an unspecified address: Go listens on every family for either."""
    host, port = split_address(address)
    return f":{port}" if host in ("0.0.0.0", "::") else address


def _reason(error: OSError) -> str:
    # asyncio's own text repeats the address, as a tuple.
    number = error.errno or 0
    return f"{os.strerror(number)} ({errno.errorcode[number]})" if number > 0 else str(error)


# --- one port for each Service that asks for it -------------------------------------------


class _Port:
    """The listeners of one port, one for each address."""

    def __init__(self, check: HealthCheck, servers: list[HttpServer]) -> None:
        self.check = check
        self.servers = servers

    async def close(self) -> None:
        for server in self.servers:
            await server.stop()


class ServiceHealthServers:
    """Answers on the health-check node ports of the Services in the table.

    healthy   -- says whether the proxy itself is (NodeHealth.healthy)
    addresses -- of the node, to listen on; None: on every one (Options.node_port_addresses of
                 both families)
    failed    -- told what could not be opened, once until it is opened or gone
    update() and stop() have one caller, which awaits each before the next.
    """

    def __init__(
        self,
        healthy: Callable[[], bool],
        addresses: Sequence[str] | None = None,
        failed: Failed | None = None,
    ) -> None:
        self.addresses = addresses
        self._healthy = healthy
        self._failed = failed
        self._ports: dict[int, _Port] = {}
        self._told: dict[int, HealthCheck] = {}

    @property
    def open_ports(self) -> tuple[int, ...]:
        """The ports that are listened on, in order."""
        return tuple(sorted(self._ports))

    async def update(self, wanted: Mapping[int, HealthCheck]) -> None:
        """Close the ports that are gone, open the new ones, and take over all counts.

        A port that cannot be opened is tried again at the next call.
        """
        for number in [n for n in self._ports if n not in wanted]:
            await self._ports.pop(number).close()
        self._told = {n: check for n, check in self._told.items() if n in wanted}
        for number, check in sorted(wanted.items()):
            port = self._ports.get(number)
            if port is not None:
                port.check = check
                continue
            try:
                self._ports[number] = await self._open(number, check)
                self._told.pop(number, None)
            except OSError as e:
                self._tell(number, check, _reason(e))

    async def stop(self) -> None:
        """Close all ports."""
        await self.update({})

    async def _open(self, number: int, check: HealthCheck) -> _Port:
        port = _Port(check, [])
        try:
            for address in [""] if self.addresses is None else self.addresses:
                server = HttpServer(render_listen(address, number))
                server.fallback = partial(self._answer, port)
                await server.start()
                port.servers.append(server)
        except BaseException:
            await port.close()
            raise
        return port

    def _answer(self, port: _Port, path: str) -> Answer:
        return service_health(port.check, self._healthy())

    def _tell(self, number: int, check: HealthCheck, why: str) -> None:
        told = self._told.get(number)
        if told is not None and (told.namespace, told.name) == (check.namespace, check.name):
            return
        self._told[number] = check
        log.error(
            "Service %s/%s: cannot listen on health-check node port %d: %s",
            check.namespace, check.name, number, why,
        )  # fmt: skip
        if self._failed is not None:
            self._failed(number, check, why)


# --- the node's own -----------------------------------------------------------------------


class NodeHttp:
    """/healthz and /livez on one address; /metrics, /metrics/slis, /proxyMode, /configz and
    /healthz on another; an address of "" is not served.

    clock -- Unix seconds
    retry -- seconds between tries to listen
    Call start(), then run() in a task of yours, and stop() after that task has ended.
    """

    def __init__(
        self,
        config: ProxyConfig,
        metrics: Metrics,
        health: NodeHealth,
        clock: Callable[[], float] = time.time,
        retry: float = RETRY,
    ) -> None:
        self._config = config
        self._retry = retry
        self._metrics = metrics
        self._health = health
        self._clock = clock
        self._hard_fail = config.bind_address_hard_fail
        self._healthz_codes = metrics.counter(
            "kubeproxy_proxy_healthz_total", "Answers to /healthz by HTTP status.", ("code",)
        )
        self._livez_codes = metrics.counter(
            "kubeproxy_proxy_livez_total", "Answers to /livez by HTTP status.", ("code",)
        )
        self.healthz = self._server(config.healthz_bind_address, self._health_routes())
        self.metrics = self._server(config.metrics_bind_address, self._metrics_routes())
        self._closed = [s for s in (self.healthz, self.metrics) if s is not None]
        self._open: list[HttpServer] = []

    async def start(self) -> None:
        """Try each address once. Raises ConfigError if one is taken and bindAddressHardFail
        is set; else run() tries again."""
        problems = [f"cannot listen on {server.address}: {why}" for server, why in
                    await self._try()]  # fmt: skip
        if problems and self._hard_fail:
            await self.stop()
            raise ConfigError([Problem("bindAddressHardFail", 0, text) for text in problems])
        for text in problems:
            log.error("%s; trying again every %g s", text, self._retry)

    async def run(self) -> None:
        """Try again what start() could not open; returns when all is open."""
        while self._closed:
            await asyncio.sleep(self._retry)
            await self._try()

    async def stop(self) -> None:
        """Close what is open."""
        self._closed.clear()
        while self._open:
            await self._open.pop().stop()

    async def _try(self) -> list[tuple[HttpServer, str]]:
        """Open what is closed; return what could not be opened, and why."""
        failed = []
        for server in list(self._closed):
            try:
                await server.start()
            except OSError as e:
                failed.append((server, _reason(e)))
                continue
            self._closed.remove(server)
            self._open.append(server)
            log.info("listening on %s for %s", server.address or "*", ", ".join(server.routes))
        return failed

    @staticmethod
    def _server(address: str, routes: list[HttpRoute]) -> HttpServer | None:
        if not address:
            return None
        server = HttpServer(_everywhere(address))
        server.routes = {route.path: route for route in routes}
        return server

    def _health_routes(self) -> list[HttpRoute]:
        address = self._config.healthz_bind_address
        return [
            HttpRoute(address, "/healthz", self._healthz),
            HttpRoute(address, "/livez", self._livez),
        ]

    def _metrics_routes(self) -> list[HttpRoute]:
        address = self._config.metrics_bind_address
        mode = self._config.mode.encode()
        configz = json.dumps({CONFIGZ_KEY: render_config(self._config)}, indent=2).encode()
        return [
            HttpRoute(address, "/healthz", lambda headers: (200, TEXT, b"ok")),
            HttpRoute(address, "/metrics", self._scrape),
            HttpRoute(address, "/metrics/slis", self._slis),
            HttpRoute(address, "/proxyMode", lambda headers: (200, TEXT, mode)),
            HttpRoute(address, "/configz", lambda headers: (200, "application/json", configz)),
        ]

    def _healthz(self, headers: dict[str, str]) -> tuple[int, str, bytes]:
        answer = self._health.healthz(self._clock())
        self._healthz_codes.labels(str(answer.status)).add()
        return answer.status, answer.headers["Content-Type"], answer.body

    def _livez(self, headers: dict[str, str]) -> tuple[int, str, bytes]:
        answer = self._health.livez(self._clock())
        self._livez_codes.labels(str(answer.status)).add()
        return answer.status, answer.headers["Content-Type"], answer.body

    def _scrape(self, headers: dict[str, str]) -> tuple[int, str, bytes]:
        accept = [value for name, value in headers.items() if name.lower() == "accept"]
        body, kind = self._metrics.render(any("application/openmetrics-text" in a for a in accept))
        return 200, kind, body

    def _slis(self, headers: dict[str, str]) -> tuple[int, str, bytes]:
        """The checks as gauges, in the names of Kubernetes' components (KEP-3466)."""
        now = self._clock()
        checks = (
            ("ping", "healthz", True),
            ("proxy", "healthz", self._health.healthz(now).status == 200),
            ("proxy", "livez", self._health.livez(now).status == 200),
        )
        lines = [
            "# HELP kubernetes_healthcheck 1 for a check that passes, 0 for one that does not.",
            "# TYPE kubernetes_healthcheck gauge",
            *(
                f'kubernetes_healthcheck{{name="{name}",type="{kind}"}} {int(passed)}'
                for name, kind, passed in checks
            ),
        ]
        return 200, PLAIN_TEXT, ("\n".join(lines) + "\n").encode()
