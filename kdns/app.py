"""The program: starts what a Corefile asks for, keeps it going, reloads it, stops it.

Decides lifetimes and nothing else. One TaskGroup owns every task; a Running site is replaced
as a whole, after everything new has been opened.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import ssl
import time
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from kdns.control import facts_of, serving_control
from kdns.dns.message import Reply
from kdns.dns.name import BadName, parse_name
from kdns.dns.text import render_rr
from kdns.errors import ConfigError, Problem, reason_of
from kdns.logs import START, start_lines
from kdns.metrics import Metrics
from kdns.pipeline import Pipeline, gauge_draining, gauge_revisions, gauge_waiting
from kdns.plugins.plugin import (
    Drop,
    Every,
    Feed,
    HttpRoute,
    Notify,
    Probe,
    WatchFile,
    WatchFolder,
)
from kdns.registry.gate import DEFAULT_TIMEOUT, Gate
from kdns.registry.snapshot import dump_snapshot, everything
from kdns.registry.spec import Spec, joined
from kdns.registry.store import Store
from kdns.runtime import raise_file_limit, settle_memory, take_turns_often, usable_cores
from kdns.server import files
from kdns.server.exchange import Exchange
from kdns.server.files import Stamp
from kdns.server.http import HttpServer
from kdns.server.listen import Listener, Place
from kdns.server.loop import run_answering
from kdns.server.notify import Notifier
from kdns.server.tap import QueryTap
from kdns.server.upstream import UpstreamPool
from kdns.site import Site, build_site, corefile_text, places_of, read_corefile
from kdns.source.follow import Follow, follow, list_once

if TYPE_CHECKING:
    from kdns.server.workers import Workers
    from kdns.zone.cluster import ClusterRecords

log = logging.getLogger("kdns")
start = logging.getLogger(START)

RESOLV_CONF = "/etc/resolv.conf"
# Seconds that /health and /metrics give names a start: until these are answered, or so long,
# those who ask wait. Their library takes longer to load than all else.
NAMES_FIRST = 1.0
# Seconds by which a worker may look at a file later than its interval says.
LATE = 1.0
UNDER_WAY = 15.0  # seconds that a question waits for its upstreams, and some
# How many deps the registry's changes touch before the garbage collector is made to look at what
# is young. It counts what comes less what goes, so of objects that take others' places it sees
# none, however many; and then, when a reload makes new ones, all at once: at 10,000 Services
# 300,000 objects in 0.2 s, in which nobody was answered. So many deps are some 2,000 objects.
TURNOVER = 1_000
# What has outlived such a look is looked at again only after so many: all that the registry has
# renewed since the start may be among it, and takes 0.3 s.
LOOKS = 1_000
CLIENT_AUTH = {
    "verify_if_given": ssl.CERT_OPTIONAL,
    "require_and_verify": ssl.CERT_REQUIRED,
}


class App:
    """One kdns server. Several may live in one process.

    conf / text -- path of the Corefile, or its content
    dns_port    -- port of server blocks that name none
    follow      -- runs the registry's sources
    guest       -- the process is somebody else's: its memory and log are left as they are
    forwarding  -- where an agent in this process would have its registry from: it is to have it
                   from us, and names are to wait for its rules
    gate_timeout -- seconds they wait, at most; 0: they do not
    awaits_rules -- that agent comes while we start, so that no name is there before
    """

    def __init__(
        self,
        conf: str | None = None,
        *,
        text: str | None = None,
        dns_port: int = 53,
        follow: Follow = follow,
        guest: bool = False,
        forwarding: Spec | None = None,
        gate_timeout: float = DEFAULT_TIMEOUT,
        awaits_rules: bool = False,
    ) -> None:
        self._follow = follow
        self._forwarding = forwarding
        self._gate_timeout = gate_timeout
        self._awaits_rules = awaits_rules
        self._shared: Pipeline | None = None  # with the agent
        # What the agent shares once the site that is being opened serves.
        self._sharing: Pipeline | None = None
        self.moved: Callable[[Pipeline], None] = lambda pipeline: None  # told the agent's new one
        self.wired = asyncio.Event()
        self._guest = guest
        self.conf = conf
        self.text = text
        self.dns_port = dns_port
        self.metrics = Metrics()
        self.metrics.before_scrape.append(self._settle)
        self.listeners: dict[Place, Listener] = {}
        self.pipelines: dict[Spec, tuple[Pipeline, asyncio.Task[None]]] = {}
        self.site: Site | None = None
        self.tap = QueryTap(self.listeners.values, lambda: [p for p, _ in self.pipelines.values()])
        self._http: dict[str, HttpServer] = {}
        self._upstreams: UpstreamPool | None = None
        self._workers: Workers | None = None  # who answer, if it is not this process
        self._notifier: Notifier | None = None  # None in a worker, whose parent has one
        self._tasks: list[asyncio.Task[None]] = []
        # What old sites answered with and when it may go, the oldest first; who lets it go.
        self._leaving: deque[tuple[float, ClusterRecords]] = deque()
        self._leave: asyncio.Task[None] | None = None
        self._emptying: asyncio.Task[None] | None = None  # frees what packet caches forgot
        self._touched = 0  # deps, since the garbage collector looked
        self._follower: asyncio.Task[None] | None = None
        self._feeds: list[tuple[Pipeline, Any]] = []
        self._group: asyncio.TaskGroup | None = None
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._wanted = asyncio.Event()
        self._refused = ""
        self._reload_failed = self.metrics.counter(
            "coredns_reload_failed_total", "Counter of the number of failed reload attempts."
        ).labels()
        self._gauges()

    # --- running ----------------------------------------------------------------------

    async def run(self, started: Callable[[], None] | None = None) -> None:
        """Serve until stop(). Raises ConfigError if it cannot start."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                await self._serve(started)
        except ExceptionGroup as failed:
            for error in failed.exceptions:
                if isinstance(error, ConfigError):
                    raise error from None
            raise

    async def _serve(self, started: Callable[[], None] | None) -> None:
        assert self._group is not None
        self._upstreams = UpstreamPool(self.metrics)
        try:
            await self._switch(self._build())
            if not self._guest:
                settle_memory()
                gc.set_threshold(*gc.get_threshold()[:2], LOOKS)
                self._say_started()
            if started is not None:
                started()
            self._follower = self._group.create_task(self._follow_corefile())
            await self._stop.wait()
            await self._lameduck()
        finally:
            await self._close()

    def stop(self) -> None:
        """Begin to stop; a second call skips the lameduck time."""
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    def port(self, scheme: str = "dns") -> int:
        """Return the port of the first listener of a scheme (for port 0)."""
        return next(x.port for x in self.listeners.values() if x.place.scheme == scheme)

    def registry_pipeline(self) -> Pipeline | None:
        """Return the pipeline whose kernel side an agent can be, once `wired` is set: that of
        the first kubernetes plugin that reads what forwarding needs. None: none does."""
        return self._shared

    def any_pipeline(self) -> Pipeline | None:
        """Return the registry that /v1/status and /v1/registry tell of: the one that an agent
        shares, else the first one."""
        return self._shared or next((p for p, _ in self.pipelines.values()), None)

    def longest_ttl(self) -> float:
        """Return the seconds that somebody may remember a name of the registry, at most."""
        plugins = self.site.plugins() if self.site is not None else ()
        return max(
            (float(p.options.ttl) for p in plugins if p.word == "kubernetes"),  # type: ignore[attr-defined]
            default=0.0,
        )

    def gate_status(self) -> dict[str, Any] | None:
        """Return what /v1/status tells of the gate; None: there is none."""
        return None if self._shared is None else self._shared.gate_status()

    def http_port(self, path: str) -> int:
        """Return the port that serves a path such as /health."""
        return next(s.port for s in self._http.values() if path in s.routes)

    # --- building ---------------------------------------------------------------------

    def _build(self) -> Site:
        text = corefile_text(self.conf, self.text)
        corefile, problems = read_corefile(self.conf, text, self.dns_port, os.environ)
        site = build_site(corefile, problems, self.metrics, host_search())
        site.text = text
        for warning in site.warnings:
            log.warning("%s", warning)
        return site

    async def _switch(self, site: Site) -> None:
        """Make `site` the one that serves. What it needs is opened first: if that fails, the
        old site goes on as it was."""
        plugins = site.plugins()
        work = [item for plugin in plugins for item in plugin.work()]
        self._engage(site)
        stamps: dict[str, Stamp] = {}
        for item in work:
            if isinstance(item, (WatchFile, WatchFolder)):
                stamps.setdefault(item.path, files.stamp(item.path))
                self._load(item)
        http = await self._open_http(site)
        sources = [w.source for w in work if isinstance(w, Feed)]
        feeds = [(self._pipeline(w.source, sources), w) for w in work if isinstance(w, Feed)]
        if self._workers is not None and not self._guest:  # whose host asks in this process, too
            feeds = [(pipeline, Feed(w.source, w.glance)) for pipeline, w in feeds]
        opened = asyncio.Event()
        serving = asyncio.ensure_future(_serve_http(http, opened))
        new: dict[Place, Listener] = {}
        handed = False
        try:
            new = await self._open_listeners(site, feeds)
            await self._hand_over(site, new)
            handed = True
            opened.set()
            await serving
        except BaseException:
            serving.cancel()
            await asyncio.wait((serving,))
            if handed and self.site is not None:
                await self._hand_over(self.site, {})
            for listener in new.values():
                await listener.close()
            for server in http:
                await server.stop()
            for pipeline, feed in feeds:
                pipeline.unsubscribe(feed.publish)
            self._sharing = None
            self._end_unread_pipelines()
            raise
        old = [] if self.site is None else self.site.plugins()
        await self._retire(site, new, http, feeds)
        debug = any(plugin.word == "debug" for plugin in plugins)
        if not self._guest:
            log.setLevel(logging.DEBUG if debug else logging.INFO)
        self._start_work(site, stamps)
        for plugin in old:
            if plugin.word == "kubernetes":
                self._let_go(plugin.records)  # type: ignore[attr-defined]

    def _load(self, item: WatchFile | WatchFolder) -> None:
        try:
            files.load(item)
        except Exception:
            if self.site is not None:
                raise  # the old configuration is better than a new one without this file
            log.exception("a bug in kdns while reading %s; it is served without", item.path)

    async def _open_listeners(
        self, site: Site, feeds: list[tuple[Pipeline, Feed]]
    ) -> dict[Place, Listener]:
        assert self._upstreams is not None
        for pipeline, feed in feeds:
            await pipeline.join(feed.publish)
        for plugin in site.plugins():
            if plugin.word == "kubernetes":
                pipeline = self.pipelines[plugin.source][0]  # type: ignore[attr-defined]
                plugin.source_age = pipeline.age  # type: ignore[attr-defined]
                plugin.gate_state = pipeline.gate_state  # type: ignore[attr-defined]
        self.wired.set()
        await self._wait_synced(site, feeds)
        opened: dict[Place, Listener] = {}
        try:
            for place, router in site.routers.items():
                context = _tls_context(site, place)  # also where it is only checked
                if place in self.listeners:
                    continue
                exchange = Exchange(router, self._upstreams, self.metrics)
                listener = Listener(place, exchange, self.metrics)
                await self._open_listener(listener, context)
                opened[place] = listener
        except BaseException as e:
            for listener in opened.values():
                await listener.close()
            if not isinstance(e, OSError):
                raise
            raise ConfigError([Problem(str(place), 0, f"cannot listen: {reason_of(e)}")]) from e
        return opened

    async def _open_listener(self, listener: Listener, context: ssl.SSLContext | None) -> None:
        if self._workers is None:
            await listener.open(context)
        else:
            listener.bind_for(self._workers.count, context)

    def _end_unread_pipelines(self) -> None:
        wanted = {pipeline for pipeline, _ in self._feeds}
        for spec, (pipeline, task) in list(self.pipelines.items()):
            if pipeline not in wanted and pipeline is not self._shared:
                task.cancel()
                del self.pipelines[spec]

    async def _retire(
        self,
        site: Site,
        new: dict[Place, Listener],
        http: list[HttpServer],
        feeds: list[tuple[Pipeline, Feed]],
    ) -> None:
        """Point what stays to the new site and close what the old one alone had."""
        for task in self._tasks:
            task.cancel()
        self._tasks = []
        for place in [p for p in self.listeners if p not in site.routers]:
            await self.listeners.pop(place).close()
        self.listeners.update(new)
        for place, listener in self.listeners.items():
            listener.exchange.router = site.routers[place]
            tls: Any = site.tls_of(place)
            if listener.context is not None and tls is not None and place not in new:
                _load_certificates(listener.context, tls.cert, tls.key, tls.ca, tls.client_auth)
            for block in site.blocks:
                if place in places_of(block):
                    block.chain.spawn = listener.exchange.background
        self.tap.renew()
        # From here on a change of the registry reaches the new site; what it answered before,
        # on listeners opened just now, may be older than the last one.
        self.site = site
        self._invalidate(None)
        for pipeline, publish in self._feeds:
            pipeline.unsubscribe(publish)
        self._feeds = [(pipeline, feed.publish) for pipeline, feed in feeds]
        if self._sharing is not None:
            self._shared, self._sharing = self._sharing, None
            self.moved(self._shared)
        self._end_unread_pipelines()
        routes = _routes(site)
        for address in [a for a in self._http if a not in {r.address for r in routes}]:
            await self._http.pop(address).stop()
        for server in http:
            self._http[server.address] = server
        for server in self._http.values():
            server.routes = {r.path: r for r in routes if r.address == server.address}

    async def _open_http(self, site: Site) -> list[HttpServer]:
        opened: list[HttpServer] = []
        routes = _routes(site)
        for route in routes:
            known = {s.address for s in opened} | set(self._http)
            if route.address in known:
                continue
            server = HttpServer(route.address, _context(*route.tls) if route.tls else None)
            server.routes = {r.path: r for r in routes if r.address == route.address}
            server.before = self._before_http if self._workers is not None else None
            try:
                await server.bind()
            except OSError as e:
                for other in opened:
                    await other.stop()
                raise ConfigError(
                    [Problem(route.address, 0,
                             f"cannot listen for {route.path}: {e.strerror or e}")]
                ) from e  # fmt: skip
            opened.append(server)
        return opened

    # --- workers ----------------------------------------------------------------------

    def _engage(self, site: Site) -> None:
        """Start as many workers as a Corefile asks for, and have /ready ask for them. They
        need a moment, in which everything is opened. One is this process itself."""
        plugin = site.workers()
        wanted = 1 if plugin is None else plugin.count or usable_cores()
        if self.site is None:
            self._notifier = Notifier()
            if wanted > 1:
                from kdns.server.workers import Workers

                self._workers = Workers(wanted, self.metrics, self.tap.show)
                self._workers.start()
                self.tap.elsewhere = self._workers.watch
        elif wanted != (there := 1 if self._workers is None else self._workers.count):
            log.warning("workers: there are %d until the next start, not %d", there, wanted)
        if self._workers is not None and plugin is not None:
            plugin.why_not = self._workers.why_not
            for other in site.plugins():
                if other.word == "ready":
                    other.ask_also(plugin)  # type: ignore[attr-defined]

    async def _hand_over(self, site: Site, new: dict[Place, Listener]) -> None:
        """Have the workers serve a site."""
        if self._workers is None:
            return
        there = self.listeners | new
        await self._workers.take(
            self.conf,
            site.text,
            self.dns_port,
            [self.pipelines[spec][0] for spec in site.registries()],
            {place: there[place] for place in site.routers},
        )

    async def _before_http(self, path: str) -> None:
        if path == "/metrics" and self._workers is not None:
            await self._workers.count_all()

    def worker_pids(self) -> list[int]:
        """Return the processes that answer in this one's place."""
        return [] if self._workers is None else self._workers.pids()

    def _pipeline(self, spec: Spec, wanted: Collection[Spec]) -> Pipeline:
        """Return the pipeline of a source, started at first use and kept over reloads.
        wanted -- all sources of the site that is being opened"""
        found = self.pipelines.get(spec)
        if found is None:
            followed, gate = spec, None
            joint = self._join(spec, wanted)
            if joint is not None:
                followed = joint
                if self._gate_timeout:
                    awaits = self._awaits_rules and self.site is None
                    gate = Gate(self._gate_timeout, self.metrics, awaits)
            pipeline = Pipeline(Store(followed.kinds), self._invalidate, gate=gate)
            if joint is not None and self.site is None:
                self._shared = pipeline
            elif joint is not None:
                self._sharing = pipeline
            assert self._group is not None
            task = self._group.create_task(self._follow(followed, pipeline, self.metrics))
            found = self.pipelines[spec] = (pipeline, task)
        return found[0]

    def _join(self, spec: Spec, wanted: Collection[Spec]) -> Spec | None:
        """Return what to follow so that an agent may have it, too; None: it may not."""
        if self._forwarding is None:
            return None
        joint = joined(spec, self._forwarding)
        read = [self.pipelines[one][0] for one in wanted if one in self.pipelines]
        if self._sharing is not None or self._shared in read:
            joint = "forwarding has its registry by another 'kubernetes'"
        if isinstance(joint, str):
            log.warning("plugin/kubernetes: names do not wait for rules: %s", joint)
            return None
        return joint

    async def _wait_synced(self, site: Site, feeds: list[tuple[Pipeline, Feed]]) -> None:
        """Give the registry `startup_timeout` to be listed once (reference 1.11)."""
        waits = [p.startup_timeout for p in site.plugins() if p.word == "kubernetes"]  # type: ignore[attr-defined]
        waiting = [p for p, _ in feeds if not p.synced.is_set()]
        if not waiting:
            return
        began = time.monotonic()
        try:
            async with asyncio.timeout(max(waits, default=5.0)):
                for pipeline in waiting:
                    await pipeline.synced.wait()
        except TimeoutError:
            log.warning(
                "plugin/kubernetes: starting server with unsynced Kubernetes API after %.1f s:"
                " cluster names get SERVFAIL until it answers", time.monotonic() - began,
            )  # fmt: skip

    # --- what plugins want done -------------------------------------------------------

    def _start_work(self, site: Site, stamps: dict[str, Stamp]) -> None:
        notify: list[Notify] = []
        for block in site.blocks:
            for item in [w for plugin in block.plugins for w in plugin.work()]:
                if isinstance(item, (WatchFile, WatchFolder)):
                    reread = partial(self._reread, item.interval)
                    self._spawn(files.follow(item, reread, stamps.get(item.path)))
                elif isinstance(item, Every):
                    self._spawn(_every(item))
                elif isinstance(item, Probe) and self._workers is None:
                    self._spawn(_probe(self.listeners[places_of(block)[0]], item))
                elif isinstance(item, Notify):
                    notify.append(item)
        if self._notifier is not None:
            self._notifier.begin(notify)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        assert self._group is not None
        self._tasks.append(self._group.create_task(_contained(work)))

    def _let_go(self, records: ClusterRecords) -> None:
        """Free what an old site answered with, once no question is under way there. The next
        reload does not end this: what no task frees in steps goes all at once or never."""
        self._leaving.append((time.monotonic() + UNDER_WAY, records))
        if self._leave is None or self._leave.done():
            assert self._group is not None
            self._leave = self._group.create_task(_contained(self._dissolve()))

    async def _dissolve(self) -> None:
        while self._leaving:
            due, records = self._leaving.popleft()
            await asyncio.sleep(due - time.monotonic())
            for part in records.dissolve():
                self._note_turnover(part)
                await asyncio.sleep(0)

    async def _empty(self) -> None:
        """Free the answers that were forgotten, with others in between."""
        # Again where more was forgotten meanwhile.
        while gone := [
            cache
            for listener in self.listeners.values()
            for cache in listener.caches
            if cache.has_forgotten
        ]:
            for part in gone[0].let_go():
                self._note_turnover(part)
                await asyncio.sleep(0)

    def _reread(self, interval: float) -> None:
        """A file that is looked at so often, in seconds, was read anew."""
        self._invalidate(None)
        if self._notifier is not None:
            # A secondary asks as soon as it hears of a new serial. Workers look at the file by
            # themselves, and one that has not yet would tell it the old one.
            self._notifier.look(0.0 if self._workers is None else interval + LATE)

    def _invalidate(self, deps: Sequence[Any] | None) -> None:
        for listener in self.listeners.values():
            for cache in listener.caches:
                if deps is None:
                    cache.forget()
                else:
                    cache.drop(deps)
        if self.site is not None and (deps is None or deps):
            for plugin in self.site.plugins():
                if plugin.word == "cache":
                    plugin.invalidate(deps)  # type: ignore[attr-defined]
        if deps and self.site is not None:  # nothing goes at a start
            self._note_turnover(len(deps))
        if (
            deps is None
            and self._group is not None
            and (self._emptying is None or self._emptying.done())
        ):
            self._emptying = self._group.create_task(_contained(self._empty()))

    def _note_turnover(self, deps: int) -> None:
        """So many deps' objects went, and as many may have come in their place."""
        self._touched += deps
        if self._touched >= TURNOVER and not self._guest:
            self._touched = 0
            # In a turn of its own, for this one has compiled.
            asyncio.get_running_loop().call_soon(gc.collect, 1)

    def _settle(self) -> None:
        for listener in self.listeners.values():
            for cache in listener.caches:
                cache.settle()

    def _gauges(self) -> None:
        metrics = self.metrics
        metrics.gauge(
            "kdns_source_last_event_age_seconds",
            "Seconds since the registry's source was last heard of.", ("source",),
        ).read = lambda: [
            ((str(spec.kind),), -1.0 if (age := p.age()) is None else age)
            for spec, (p, _) in self.pipelines.items()
        ]  # fmt: skip
        gauge_revisions(metrics, self._revisions)
        if self._forwarding is not None:
            gauge_draining(metrics, lambda: self._shared.draining() if self._shared else [])
            gauge_waiting(metrics, lambda: self._shared.gate if self._shared else None)
        metrics.gauge(
            "coredns_reload_version_info", "Always 1; the hash of the Corefile served.",
            ("hash", "value"),
        ).read = lambda: (
            [(("sha512", self.site.corefile.digest), 1.0)]
            if self.site and any(p.word == "reload" for p in self.site.plugins())
            else []
        )  # fmt: skip
        metrics.gauge("kdns_packet_cache_entries", "Ready-made answers held.", ("server",)).read = (
            lambda: [
                ((str(x.place),), float(sum(map(len, x.caches)))) for x in self.listeners.values()
            ]
        )

    def _revisions(self) -> dict[str, int]:
        first = self._shared or next((pipeline for pipeline, _ in self.pipelines.values()), None)
        return {} if first is None else first.revisions()

    # --- reloading --------------------------------------------------------------------

    async def _follow_corefile(self) -> None:
        """Reload when the Corefile's meaning changed (plugin `reload`) or on a signal."""
        while True:
            wait = self._reload_interval()
            try:
                async with asyncio.timeout(wait):
                    await self._wanted.wait()
                forced = True
            except TimeoutError:
                forced = False
            self._wanted.clear()
            if wait is not None or forced:
                await self.reload(forced)

    def _reload_interval(self) -> float | None:
        if self.conf is None or self.site is None:
            return None
        for plugin in self.site.plugins():
            if plugin.word == "reload" and plugin.interval:  # type: ignore[attr-defined]
                return plugin.pause()  # type: ignore[attr-defined, no-any-return]
        return None

    def reload_soon(self) -> None:
        """For SIGUSR1 and SIGHUP; during a start, when that is over."""
        self._wanted.set()

    async def reload(self, forced: bool = False) -> bool:
        """Take over the Corefile if its meaning changed; return True if it was taken."""
        assert self.site is not None
        try:
            text = corefile_text(self.conf, self.text)
            corefile, problems = read_corefile(self.conf, text, self.dns_port, os.environ)
            if problems.errors:
                raise ConfigError(problems.found)
            if corefile.digest == self.site.corefile.digest and not forced:
                self._refused = ""
                return False
            if corefile.digest == self._refused and not forced:
                return False
            log.info("Reloading")
            site = build_site(corefile, problems, self.metrics, host_search())
            site.text = text
            await self._switch(site)
        except ConfigError as e:
            self._refuse(e)
            return False
        except Exception:
            log.exception("a bug in kdns while reloading; the old configuration stays")
            self._reload_failed.add()
            return False
        self._refused = ""
        log.info("plugin/reload: Running configuration SHA512 = %s", site.corefile.digest)
        log.info("Reloading complete")
        return True

    def _refuse(self, error: ConfigError) -> None:
        """Say what is wrong, once for each text, and keep the old configuration."""
        text = str(error)
        if text == self._refused:
            return
        self._refused = text
        self._reload_failed.add()
        for problem in error.problems:
            log.error("plugin/reload: %s", problem)
        log.error("plugin/reload: Corefile not taken over; the old configuration stays")

    # --- start and end ----------------------------------------------------------------

    def _say_started(self) -> None:
        assert self.site is not None
        for block in self.site.blocks:
            for key in block.keys:
                scheme = "" if key.scheme == "dns" else f"{key.scheme}://"
                for place in places_of(block):
                    if (place.scheme, place.port) != (key.scheme, key.port):
                        continue
                    port = self.listeners[place].port
                    on = f" on {place.address}" if place.address else ""
                    start.info("%s%s:%d%s", scheme, key.zone, port, on)
        for line in start_lines():
            start.info("%s", line)

    async def _lameduck(self) -> None:
        assert self.site is not None
        seconds = max(
            (p.lameduck for p in self.site.plugins() if p.word == "health"),  # type: ignore[attr-defined]
            default=0.0,
        )
        for plugin in self.site.plugins():
            if plugin.word == "ready":
                plugin.lameduck = True  # type: ignore[attr-defined]
        if seconds > 0:
            log.info("plugin/health: Going into lameduck mode for %gs", seconds)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._hurry.wait()

    async def _close(self) -> None:
        if self._follower is not None:
            # A reload under way opens and closes listeners too.
            self._follower.cancel()
            await asyncio.wait((self._follower,))
        if self._notifier is not None:
            self._notifier.close()
        if self._workers is not None:
            await self._workers.stop()
        for listener in self.listeners.values():
            await listener.close()
        for server in self._http.values():
            await server.stop()
        if self._upstreams is not None:
            await self._upstreams.close()
        followers = [task for _, task in self.pipelines.values()]
        for task in (*self._tasks, *followers, self._leave, self._emptying):
            if task is not None:
                task.cancel()


def host_search() -> tuple[bytes, ...]:
    """Return the search list of this host's resolv.conf as wire names (for autopath)."""
    content, _ = files.read_file(RESOLV_CONF)
    found: list[bytes] = []
    for line in (content or b"").decode("utf-8", "replace").splitlines():
        words = line.split()
        if words and words[0] in ("search", "domain"):
            found = []
            for word in words[1:]:
                try:
                    found.append(parse_name(word if word.endswith(".") else word + ".").lower())
                except BadName:
                    continue
    return tuple(found)


def _routes(site: Site) -> list[HttpRoute]:
    """Return the site's HTTP routes; those of one path on one address are made into one that
    is only well if all of them are."""
    merged: dict[tuple[str, str], HttpRoute] = {}
    for plugin in site.plugins():
        for item in plugin.work():
            if not isinstance(item, HttpRoute):
                continue
            key = (item.address, item.path)
            first = merged.get(key)
            if first is None:
                merged[key] = item
            elif plugin.word == "ready":
                merged[key] = HttpRoute(
                    item.address, item.path, _all_of(first.handle, item.handle), item.tls
                )
    return list(merged.values())


_Handle = Callable[[dict[str, str]], tuple[int, str, bytes]]


def _all_of(first: _Handle, second: _Handle) -> _Handle:
    def handle(headers: dict[str, str]) -> tuple[int, str, bytes]:
        one, other = first(headers), second(headers)
        if one[0] != 200 and other[0] != 200:
            return one[0], one[1], one[2] + b"," + other[2]
        return other if one[0] == 200 else one

    return handle


def _tls_context(site: Site, place: Place) -> ssl.SSLContext | None:
    """Return the TLS context of a place; plain HTTP for https:// without `tls` (CoreDNS)."""
    if place.scheme not in ("tls", "https"):
        return None
    plugin: Any = site.tls_of(place)
    if plugin is None:
        return None
    context = _context(plugin.cert, plugin.key, plugin.ca, plugin.client_auth)
    if plugin.keylog:
        context.keylog_filename = plugin.keylog
    return context


def _context(cert: str, key: str, ca: str, client_auth: str = "nocert") -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    _load_certificates(context, cert, key, ca, client_auth)
    return context


def _load_certificates(
    context: ssl.SSLContext, cert: str, key: str, ca: str, client_auth: str
) -> None:
    """Read the files into a context; connections made from then on use them."""
    try:
        context.load_cert_chain(cert, key)
        if ca:
            context.load_verify_locations(ca)
        elif client_auth in CLIENT_AUTH:
            context.load_default_certs(ssl.Purpose.CLIENT_AUTH)
    except (OSError, ssl.SSLError) as e:
        raise ConfigError([Problem(cert, 0, f"cannot use certificate and key: {e}")]) from e
    context.verify_mode = CLIENT_AUTH.get(client_auth, ssl.CERT_NONE)


async def _probe(listener: Listener, probe: Probe) -> None:
    """Put the `loop` plugin's question to a listener's own chain until it was answered."""
    deadline = time.monotonic() + probe.seconds
    while not probe.done() and time.monotonic() < deadline:
        answered = asyncio.Event()

        def done(reply: Reply | Drop, answered: asyncio.Event = answered) -> None:
            answered.set()

        query = probe.query.asking()
        query.received = time.monotonic()
        if isinstance(listener.exchange.answer(query, done), (Reply, Drop)):
            answered.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(probe.interval):
                await answered.wait()
            return


async def _serve_http(servers: Sequence[HttpServer], names: asyncio.Event) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(NAMES_FIRST):
            await names.wait()
    for server in servers:
        await server.serve()


async def _every(item: Every) -> None:
    while True:
        await asyncio.sleep(item.interval)
        try:
            item.tick(time.monotonic())
        except Exception:
            log.exception("a bug in kdns in a task that comes again and again; it goes on")


async def _contained(work: Coroutine[Any, Any, None]) -> None:
    """A bug in one background task must not end the server."""
    try:
        await work
    except asyncio.CancelledError:
        raise
    except Exception:
        log.exception("a bug in kdns in a background task; the server goes on")


# --- entry points of the command line -------------------------------------------------------


def serve(
    conf: str | None,
    *,
    text: str | None = None,
    dns_port: int = 53,
    pidfile: str | None = None,
    control: str = "",
) -> int:
    """Run the DNS server until a signal; return the exit code (0, or 2 for configuration).

    control -- path of the control socket; empty: none
    """
    import sys

    if pidfile:
        try:
            with open(pidfile, "w") as f:
                f.write(f"{os.getpid()}\n")
        except OSError as e:
            print(f"kdns: cannot write {pidfile}: {e.strerror}", file=sys.stderr)
            return 2

    raise_file_limit()
    take_turns_often()  # what is read and compiled beside the loop must not hold up answers

    async def main() -> None:
        app = App(conf, text=text, dns_port=dns_port)
        loop = asyncio.get_running_loop()

        # From the first on: what a signal does that nobody has asked for is to end the process,
        # and a start waits for an API server that is away.
        for number in (signal.SIGUSR1, signal.SIGHUP):
            loop.add_signal_handler(number, app.reload_soon)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, app.stop)
        async with serving_control(control, lambda: facts_of("serve", app.any_pipeline, app=app)):
            await app.run()

    try:
        run_answering(main())
    except ConfigError as e:
        for problem in e.problems:
            print(problem, file=sys.stderr)
        return 2
    finally:
        if pidfile:
            with contextlib.suppress(OSError):
                os.unlink(pidfile)
    return 0


def check_corefile(path: str, dns_port: int = 53) -> list[Problem]:
    """Return everything wrong with a Corefile, grammar and options, errors and warnings."""
    try:
        corefile, problems = read_corefile(path, None, dns_port, os.environ)
        site = build_site(corefile, problems, Metrics())
    except ConfigError as e:
        return list(e.problems)
    return site.warnings


def dump(stage: str, conf: str | None, manifests: Sequence[str] = ()) -> Iterator[str]:
    """Yield the lines of `kdns dump snapshot|zone` for a Corefile's first source, or for
    manifest files. Raises ConfigError."""
    if manifests:
        paths = " ".join(f'"{os.path.abspath(m)}"' for m in manifests)
        text = f".:0 {{\n kubernetes cluster.local {{\n manifests {paths}\n }}\n}}\n"
        corefile, problems = read_corefile(None, text, 0, os.environ)
    else:
        corefile, problems = read_corefile(conf, None, 53, os.environ)
    site = build_site(corefile, problems, Metrics())
    plugin: Any = next((p for p in site.plugins() if p.word == "kubernetes"), None)
    if plugin is None:
        raise ConfigError([Problem(conf or "", 0, "no kubernetes plugin, so nothing to dump")])
    pipeline = asyncio.run(list_once(plugin.source))
    if stage == "snapshot":
        yield from dump_snapshot(pipeline.snapshot)
        return
    plugin.publish(pipeline.snapshot, everything(pipeline.snapshot), 0.0)
    for zone in sorted(plugin.zones):
        _, records = plugin.transfer_records(zone)
        for record in records:
            yield render_rr(record)
