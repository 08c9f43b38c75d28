"""`kdns node`: all that a node of a cluster needs of us in one process: DNS and forwarding.

Decides what is started and ended in which order, and what one half does when the other one is
broken. What DNS serves is app.py's, what is forwarded agent.py's, the addresses and rules of
the way to this node's DNS server kernel/dnspath.py's.

Coming up, the addresses come first, then DNS, then the rules that lead packets past the rules
of the Service `kube-dns`: until DNS listens, that Service answers (other nodes do). Leaving, it
is the other way round. A kernel side that fails ends alone and is started again; DNS goes on.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from kdns.agent import (
    FAMILY_LABEL,
    Agent,
    check_permission,
    families_here,
    host_name,
    read_settings,
    start_log,
)
from kdns.app import App
from kdns.control import ControlServer, facts_of
from kdns.errors import ConfigError, KdnsError, Problem
from kdns.kernel import dnspath, modes
from kdns.kernel.dnspath import NO_VIP_MODES, DnsPath
from kdns.metrics import Metrics
from kdns.pipeline import Pipeline
from kdns.plugins.plugin import HttpRoute, Probe
from kdns.proxy import config as settings
from kdns.proxy.config import ProxyConfig
from kdns.proxy.drain import Policy
from kdns.proxy.flags import Parsed
from kdns.registry.spec import KubeSpec, ManifestSpec
from kdns.runtime import collect_rarely, raise_file_limit, take_turns_often
from kdns.server.http import HttpServer
from kdns.server.loop import run_answering
from kdns.site import build_site, places_of, read_corefile
from kdns.source.follow import follow

log = logging.getLogger("kdns.node")

RETRY: Final = 5.0  # seconds until a kernel side that ended is started again
LOOP_WINDOW: Final = 5.0  # seconds; `loop` counts for ten after its question first arrived
RESOLV_CONF: Final = "/etc/resolv.conf"
JSON: Final = "application/json"
# kubeadm's Corefile on the addresses of a node. What it serves over HTTP stands on localhost:
# the node's ports are everybody's. `loop` finds a resolv.conf that leads back to us.
COREFILE: Final = """\
.:53 {{
    bind {bind}
    errors
    health 127.0.0.1:9254 {{
        lameduck 5s
    }}
    ready 127.0.0.1:9255
    kubernetes cluster.local in-addr.arpa ip6.arpa {{
        pods insecure
        fallthrough in-addr.arpa ip6.arpa
        ttl 30
    }}
    prometheus :9253
    loop
    forward . {upstream} {{
        max_concurrent 1000
    }}
    cache 30 {{
        disable success cluster.local
        disable denial cluster.local
    }}
    loadbalance
}}
"""


@dataclass(frozen=True, slots=True)
class Wishes:
    """The command line.

    conf        -- path of the Corefile; "": COREFILE
    cluster_dns -- addresses that kubelet writes into the resolv.conf of Pods
    local_dns   -- more addresses, which only this node can reach
    health      -- where /healthz, /livez and /readyz of both halves are; "": nowhere
    control     -- path of the control socket; "": none
    gate_timeout -- seconds that DNS waits for the rules of a name at most; 0: not at all
    drain       -- when the rules of a name that is gone go
    proxy       -- kube-proxy's flags
    """

    conf: str = ""
    cluster_dns: tuple[str, ...] = ("10.96.0.10",)
    local_dns: tuple[str, ...] = ("169.254.20.10",)
    health: str = "127.0.0.1:9256"
    control: str = "/run/kdns/control.sock"
    gate_timeout: float = 2.0
    drain: Policy = "ttl"
    proxy: Parsed = field(default_factory=Parsed)


def addresses_for(wishes: Wishes, config: ProxyConfig) -> tuple[str, ...]:
    """Return the addresses that this node's DNS server is to have in the proxy's mode."""
    if config.mode in NO_VIP_MODES:
        return wishes.local_dns
    return (*wishes.local_dns, *wishes.cluster_dns)


def corefile_for(addresses: Sequence[str]) -> str:
    """Return the Corefile for a node that has none."""
    return COREFILE.format(bind=" ".join(addresses) or "127.0.0.1", upstream=RESOLV_CONF)


def leading_back(addresses: Sequence[str], resolv_conf: str = RESOLV_CONF) -> list[str]:
    """Return the nameservers of a resolv.conf that are ourselves."""
    try:
        lines = Path(resolv_conf).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    pairs = (line.split()[:2] for line in lines)
    return [words[1] for words in pairs
            if len(words) == 2 and words[0] == "nameserver" and words[1] in addresses]  # fmt: skip


class Node:
    """One run. Made within a loop."""

    def __init__(self, wishes: Wishes) -> None:
        self.wishes = wishes
        self.config = read_settings(wishes.proxy).config
        self.name = settings.node_name(self.config, host_name())
        addresses = addresses_for(wishes, self.config)
        self.app = App(
            wishes.conf or None,
            text=None if wishes.conf else corefile_for(addresses),
            follow=self._follow,
            # As a `kubernetes` of the Corefile that names no API server has it.
            forwarding=KubeSpec(node=self.name, only_forwarded=True),
            gate_timeout=wishes.gate_timeout,
            awaits_rules=True,
        )
        self.path = DnsPath(
            addresses, self.config.mode, self.app.metrics, self._look_for_loops_again
        )
        self.agent: Agent | None = None
        self.app.moved = self._move
        self.kernel_problem = "it has not started yet"
        self._stop = asyncio.Event()
        self._listening = asyncio.Event()
        self._listened = 0.0
        self._why = ""  # it leaves, if it does so on its own account
        self._http: HttpServer | None = None
        self._control: ControlServer | None = None

    # --- from start to end ----------------------------------------------------------------

    async def run(self) -> None:
        """Serve and forward until stop(). Raises KdnsError if DNS cannot start, or if all of it
        must be started anew."""
        self._warn()
        if self.wishes.conf:
            check_corefile(self.wishes.conf)  # a mistake there changes nothing on the node
        kernel: list[asyncio.Task[None]] = []
        dns: asyncio.Task[None] | None = None
        try:
            await self.path.open()
            await self._open_health()
            dns = asyncio.create_task(self.app.run(self._listening.set), name="dns")
            await self._open_control()
            await _first_of(self.app.wired, self._stop, dns)
            if self.app.wired.is_set():
                kernel.append(asyncio.create_task(self._forward(), name="forwarding"))
            await _first_of(self._listening, self._stop, dns)
            if self._listening.is_set():
                self._listened = time.monotonic()
                self._check_listeners()
                kernel.append(asyncio.create_task(self.path.keep(), name="dns path"))
            await _first_of(self._stop, dns)
        finally:
            await self._end(dns, kernel)
        await dns  # raises why it ended, if by itself
        if self._why:
            raise KdnsError(self._why)

    def stop(self) -> None:
        """Begin to leave; a second call skips the lameduck time."""
        if self._stop.is_set():
            self.app.stop()
        self._stop.set()

    def reload_soon(self) -> None:
        """Read the Corefile anew."""
        self.app.reload_soon()

    async def _end(self, dns: asyncio.Task[None] | None, kernel: list[asyncio.Task[None]]) -> None:
        """Leave so that nobody's question is lost: first our way past the Service's rules goes,
        so that they lead new questions to other nodes, then the server, then its addresses, last
        of all who writes the rules, which stay."""
        self._stop.set()
        self.path.leave()
        for task in kernel[1:]:
            task.cancel()
            await asyncio.wait((task,))
        await self.path.release_rules()
        if dns is not None:
            self.app.stop()
            await asyncio.wait((dns,))
        await self.path.release_addresses()
        if self.agent is not None:
            self.agent.stop()
        for task in kernel[:1]:
            await asyncio.wait((task,))
        if self._http is not None:
            await self._http.stop()
        if self._control is not None:
            await self._control.stop()

    def _warn(self) -> None:
        if self.config.mode in NO_VIP_MODES and self.wishes.cluster_dns:
            log.warning(
                "the %s mode answers for %s itself: it stays with the Service, and this node's"
                " own DNS server has %s alone; have kubelet write that into resolv.conf"
                " (clusterDNS), or use another mode", self.config.mode,
                ", ".join(self.wishes.cluster_dns), ", ".join(self.wishes.local_dns) or "nothing",
            )  # fmt: skip
        for one in leading_back(self.path.addresses):
            log.warning(
                "%s: nameserver %s is this server itself, questions for other names would go"
                " round in a circle; in a Pod, dnsPolicy must be Default", RESOLV_CONF, one,
            )  # fmt: skip

    def _check_listeners(self) -> None:
        """Say which of our addresses the Corefile does not listen at: packets come here."""
        places = [place for place in self.app.listeners if place.scheme == "dns"]
        at = {place.address for place in places if place.port == dnspath.PORT}
        missing = [one for one in self.path.addresses if one not in at] if "" not in at else []
        if missing:
            log.warning(
                "%s: no server block listens on port %d of %s, which this node has taken over:"
                " write `bind %s` there", self.wishes.conf or "Corefile", dnspath.PORT,
                ", ".join(missing), " ".join(self.path.addresses),
            )  # fmt: skip

    def _look_for_loops_again(self) -> None:
        """Put the question of the `loop` plugins again: when they put it, it may have gone by
        the rules of the Service to somebody else, and from now on it comes to us."""
        site = self.app.site
        if site is None:
            return
        late = time.monotonic() - self._listened > LOOP_WINDOW
        for block in site.blocks:
            probes = [item for plugin in block.plugins for item in plugin.work()
                      if isinstance(item, Probe)]  # fmt: skip
            if probes and (late or self.app.worker_pids()):  # it is the workers who put them
                self.app.reload_soon()  # a plugin made anew counts anew
                return
            for probe in probes:
                query = probe.query.asking()
                query.received = time.monotonic()
                self.app.listeners[places_of(block)[0]].exchange.answer(query, lambda reply: None)

    # --- the registry -----------------------------------------------------------------------

    async def _follow(
        self, spec: KubeSpec | ManifestSpec, sink: Pipeline, metrics: Metrics
    ) -> None:
        """Run the source of a spec of the Corefile: where it names no other, the proxy's. The
        API's ClusterIP leads nowhere before we have written rules."""
        source = self._source(spec)
        for kind in spec.kinds:
            if kind not in source.kinds:  # there are none of them in manifests
                sink.mark_synced(kind)
        await follow(source, sink, metrics)

    def _source(self, spec: KubeSpec | ManifestSpec) -> KubeSpec | ManifestSpec:
        if isinstance(spec, ManifestSpec) or spec.endpoint or spec.kubeconfig:
            return spec
        if self.wishes.proxy.manifests:
            return ManifestSpec(self.wishes.proxy.manifests, label_selector=spec.label_selector)
        kubeconfig = self.config.client.kubeconfig
        return replace(spec, endpoint=self.wishes.proxy.master, kubeconfig=kubeconfig)

    # --- forwarding -------------------------------------------------------------------------

    async def _forward(self) -> None:
        """Keep an agent running; why it ended is told once, and DNS does not hear of it."""
        told = ""
        while not self._stop.is_set():
            began, before = time.monotonic(), self._config_text()
            why = await self._run_agent()
            if self._stop.is_set():
                return
            long = time.monotonic() - began > RETRY
            wait = 0.0 if long or self._config_text() != before else RETRY
            if long or why != told:
                log.error("forwarding has ended: %s; DNS goes on; trying again in %g s", why, wait)
            told = self.kernel_problem = why
            with suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._stop.wait()

    def _config_text(self) -> str:
        """Return kube-proxy's configuration file as it is now; "" if there is none."""
        with suppress(OSError, UnicodeDecodeError):
            path = self.wishes.proxy.config_path
            return Path(path).read_text(encoding="utf-8") if path else ""
        return ""

    async def _run_agent(self) -> str:
        """Run an agent to its end; return why it ended."""
        try:
            # A change of it has ended the one before.
            config = read_settings(self.wishes.proxy).config
            if config.mode != self.config.mode:
                self._why = f"the mode is {config.mode} now; leaving, to be started with it"
                self.stop()
                return self._why
            self.config = config
            self.agent = self._make_agent()
            self.kernel_problem = ""
            await self.agent.run()
        except KdnsError as e:
            return str(e)
        except Exception as e:
            log.exception("a bug in kdns in the forwarding half; DNS goes on")
            return f"a bug in kdns: {type(e).__name__}: {e}"
        return "it was stopped"

    def _make_agent(self) -> Agent:
        return Agent(
            self.config,
            self._source(KubeSpec(node=self.name, only_forwarded=True)),
            self.name,
            config_file=self.wishes.proxy.config_path,
            pipeline=self.app.registry_pipeline(),
            drain=self.wishes.drain,
            longest_ttl=self.app.longest_ttl,
        )

    def _move(self, pipeline: Pipeline) -> None:
        """A reload has DNS read another registry, which is the agent's, too, from now on."""
        if self.agent is not None:
            self.agent.move(pipeline)

    def _registry(self) -> Pipeline | None:
        """Return the registry of the forwarding half, which is DNS's as well where it can be."""
        agent = self.agent.pipeline if self.agent is not None else None
        return agent or self.app.any_pipeline()

    async def _open_control(self) -> None:
        if not self.wishes.control:
            return
        cidrs = ",".join(self.config.cluster_cidrs)
        facts = facts_of(
            "node", self._registry, app=self.app, node=self.name, mode=self.config.mode,
            cluster_cidr=cidrs, config=lambda: self.config,
        )  # fmt: skip
        told = facts.answers["/v1/status"]
        facts.answers["/v1/status"] = lambda: {**told(), "path": self.path.status()}
        server = ControlServer(self.wishes.control, facts)
        try:
            await server.start()
        except ConfigError as e:  # no reason to leave the node without DNS
            for problem in e.problems:
                log.warning("no control socket: %s", problem)
            return
        self._control = server

    # --- health -----------------------------------------------------------------------------

    async def _open_health(self) -> None:
        address = self.wishes.health
        if not address:
            return
        server = HttpServer(address)
        routes = {
            "/healthz": lambda headers: _answer(self.status()),
            "/livez": lambda headers: _answer({"healthy": True}),  # the loop turns
            "/readyz": lambda headers: _answer(self._dns_status()),
        }
        server.routes = {path: HttpRoute(address, path, say) for path, say in routes.items()}
        try:
            await server.start()
        except OSError as e:
            text = f"cannot listen on {address}: {e.strerror or e}"
            raise ConfigError([Problem("--health-address", 0, text)]) from None
        self._http = server

    def status(self) -> dict[str, Any]:
        """Say how both halves and the way between them are."""
        parts = {
            "dns": self._dns_status(),
            "forwarding": self._kernel_status(),
            "path": self.path.status(),
        }
        healthy = all(part["healthy"] for part in parts.values())
        found = {"healthy": healthy, "node": self.name, "mode": self.config.mode, **parts}
        return {**found, "gate": self.app.gate_status()}

    def _dns_status(self) -> dict[str, Any]:
        site = self.app.site
        problem = ""
        if self._stop.is_set():
            problem = "it is ending"
        elif site is None or not self._listening.is_set():
            problem = "it does not listen yet"
        else:
            waits = [(p.word, why) for p in site.plugins() if (why := p.not_ready())]
            problem = "; ".join(f"{word}: {why}" for word, why in dict.fromkeys(waits))
        found: dict[str, Any] = {
            "healthy": not problem,
            "listening": sorted(str(place) for place in self.app.listeners),
        }
        return {**found, "problem": problem} if problem else found

    def _kernel_status(self) -> dict[str, Any]:
        agent = self.agent
        problem = self.kernel_problem
        synced: Mapping[str, bool] = {}
        if agent is not None and not problem:
            synced = {FAMILY_LABEL[f]: side.synced is not None for f, side in agent.sides.items()}
            if not agent.health_now():
                problem = "a change waits too long for the kernel; see the log"
            elif not synced:
                problem = "the registry has not been listed yet"
            elif not all(synced.values()):
                problem = "the first rules are being written"
        found: dict[str, Any] = {"healthy": not problem, "synced": synced}
        return {**found, "problem": problem} if problem else found


def _answer(status: Mapping[str, Any]) -> tuple[int, str, bytes]:
    body = json.dumps(status, indent=2) + "\n"
    return 200 if status["healthy"] else 503, JSON, body.encode()


async def _first_of(*ends: asyncio.Event | asyncio.Task[None]) -> None:
    """Wait for the first of several things."""
    waits = [
        asyncio.create_task(one.wait()) if isinstance(one, asyncio.Event) else one for one in ends
    ]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait, one in zip(waits, ends, strict=True):
            if isinstance(one, asyncio.Event):
                wait.cancel()


# --- the command line -----------------------------------------------------------------------


def check_corefile(path: str) -> None:
    """Raise ConfigError for all that is wrong with a Corefile."""
    corefile, problems = read_corefile(path, None, dnspath.PORT, os.environ)
    build_site(corefile, problems, Metrics())


def command(wishes: Wishes) -> int:
    """Run until a signal comes; return the exit code. Raises KdnsError."""
    collect_rarely()
    start_log(read_settings(wishes.proxy), sys.stdout, log)
    if wishes.proxy.cleanup:
        check_permission()
        asyncio.run(_clean_up())
        log.info("addresses and rules of ours are gone")
        return 0
    raise_file_limit()
    take_turns_often()
    run_answering(_run(wishes))
    return 0


async def _run(wishes: Wishes) -> None:
    node = Node(wishes)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, node.stop)
    for number in (signal.SIGUSR1, signal.SIGHUP):
        loop.add_signal_handler(number, node.reload_soon)
    await node.run()


async def _clean_up() -> None:
    """Remove what any run wrote. Raises KdnsError, at the end, for what could not be."""
    failures = [*await dnspath.clean_up(), *await modes.clean_all(families_here())]
    for text in failures[1:]:
        log.error("%s", text)
    if failures:
        raise KdnsError(failures[0])
