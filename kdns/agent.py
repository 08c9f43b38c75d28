"""The node agent: follows the registry and keeps the node's forwarding up to date.

Decides lifetimes and nothing else: what is forwarded is proxy/'s, how it reaches the kernel is
kernel/'s. Start does not wait for the API, nor for anything else: until the registry has been
listed once nothing is written, and what an earlier run wrote goes on. Leaving leaves the rules
in place, too, as kube-proxy does; `cleanup` removes them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TextIO

from kdns.control import Facts, facts_of, serving_control
from kdns.errors import ConfigError, KdnsError, Problem
from kdns.kernel import modes, sysctl
from kdns.kernel.conntrack import FlowCleaner
from kdns.kernel.destinations import used_places
from kdns.kernel.healthcheck import NodeHttp, ServiceHealthServers
from kdns.kernel.modes import Relaying, Way
from kdns.kernel.netlink import default_address, node_addresses
from kdns.kernel.programs import find_programs
from kdns.kernel.sync import SyncLoop, Timing
from kdns.logs import JsonFormatter, setup_logging
from kdns.metrics import Metrics
from kdns.pipeline import Pipeline, Words, gauge_draining, gauge_revisions
from kdns.proxy import config as settings
from kdns.proxy.config import LocalAddress, Mode, ProxyConfig, Read
from kdns.proxy.drain import LOOK, Drain, Place, Policy
from kdns.proxy.flags import Parsed, parse_flags, settle
from kdns.proxy.health import NodeHealth, Times, health_check_ports
from kdns.proxy.iptables import render_rules
from kdns.proxy.options import Family, NodeView, Options
from kdns.proxy.table import ForwardingTable, TableCompiler, conflicts, dump_table
from kdns.registry.decode import TRIGGER_TIME
from kdns.registry.gate import KernelChanges
from kdns.registry.objects import EndpointSlice, Key, Node
from kdns.registry.snapshot import Changes, Snapshot, everything, joined
from kdns.registry.spec import KubeSpec, ManifestSpec
from kdns.registry.store import Store
from kdns.runtime import collect_rarely, raise_file_limit, settle_memory, take_turns_often
from kdns.source.follow import Follow, follow, list_once

log = logging.getLogger("kdns.proxy")

FAMILIES: tuple[Family, ...] = (4, 6)
WORDS = Words(
    "", "the rules stay as they are", "no rule is written until the registry has been listed"
)
NET_ADMIN = 12  # linux/capability.h
CONFIG_LOOK = 2.0  # seconds between two looks at the configuration file
MOST_TRIGGERS = 100  # changes of a Service on their way that are timed, should syncs fail
REST_SHARE = 8.0  # a sync rests for this part of what names wait, at most
# Seconds that a new Service's rules wait for its slices, which come a moment after it: to write
# first that it has none would cost its name the time of a second sync.
BARE_WAIT = 0.02
MOST_CONFLICTS = 20  # told in the log; `kdns rules` tells them all
# Seconds, as kube-proxy's network_programming_duration_seconds: 0.25 to 60.
LATENCY_BUCKETS = (0.25, 0.5, *(float(n) for n in (*range(1, 60), *range(60, 301, 30))))
FAMILY_LABEL: Mapping[Family, str] = {4: "IPv4", 6: "IPv6"}


@dataclass(slots=True)
class _Side:
    """One family's part of the agent.

    options   -- those its rules are written with, for as long as it runs
    triggered -- Unix seconds of changes that are on their way to the kernel, by Service
    drain     -- the compiler's table with what is kept beside it: the kernel's
    unasked   -- Services whose rules are others, and that no sync was asked for yet; how many
                 Services and slices have changed since
    synced    -- the table that the kernel holds
    claims_changed -- a Service did, and with it perhaps who claims what
    conflicts -- what was told of claims
    """

    family: Family
    options: Options
    compiler: TableCompiler
    drain: Drain
    loop: SyncLoop
    cleaner: FlowCleaner
    triggered: dict[Key, deque[float]] = field(default_factory=dict)
    unasked: set[Key] = field(default_factory=set)
    services: int = 0
    endpoints: int = 0
    synced: ForwardingTable | None = None
    claims_changed: bool = True
    conflicts: frozenset[str] = frozenset()
    wake: asyncio.Event = field(default_factory=asyncio.Event)


class Agent:
    """One node's forwarding.

    node   -- this node's name
    spec   -- where the registry comes from
    once   -- leave after the first sync
    follow -- runs the registry's source
    relaying -- of the userspace mode
    pipeline -- somebody else's, whose kernel side this is; None: the agent follows its own
    drain  -- what ends the rules of a Service that is gone
    longest_ttl -- seconds that somebody may remember its name
    """

    def __init__(
        self,
        config: ProxyConfig,
        spec: KubeSpec | ManifestSpec,
        node: str,
        *,
        config_file: str = "",
        once: bool = False,
        follow: Follow = follow,
        relaying: Relaying | None = None,
        pipeline: Pipeline | None = None,
        drain: Policy = "none",
        longest_ttl: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._follow = follow
        self.pipeline = pipeline
        self._policy: Policy = drain
        self._longest_ttl = longest_ttl
        self._relaying = relaying or Relaying()
        self.config = config
        self.node = node
        self.metrics = Metrics()
        self.sides: dict[Family, _Side] = {}
        self._times: dict[Family, Times | None] = {}
        self.health = NodeHealth.of(config, self._times)
        self._spec = spec
        self._config_file = config_file
        self._once = once
        self._way = Way({}, {})
        self._looked: asyncio.Task[frozenset[Mode]] | None = None
        self._noted: asyncio.Task[None] | None = None
        self._places: frozenset[str] = frozenset()
        self._left: frozenset[Mode] = frozenset()  # other modes that left something
        self._local: tuple[LocalAddress, ...] = ()
        self._default: dict[Family, str] = {}  # the address of the default route
        self._snapshot = Snapshot()
        self._own: asyncio.Task[None] | None = None  # follows its own pipeline's source
        self._kept = asyncio.Event()  # what is kept may be other
        self._stop = asyncio.Event()
        self._why = ""  # if it is for a reason that the operator must hear of
        self._group: asyncio.TaskGroup | None = None
        self._http: NodeHttp | None = None
        self._checks: ServiceHealthServers | None = None
        self._table_synced = asyncio.Event()
        self._waits_for_node = False
        self._told_ready = False
        self._latency = {
            family: self.metrics.histogram(
                "kubeproxy_network_programming_duration_seconds",
                "Seconds from the change of an endpoint to the rule in the kernel.",
                ("ip_family",),
                LATENCY_BUCKETS,
            ).labels(label)
            for family, label in FAMILY_LABEL.items()
        }

    # --- running ----------------------------------------------------------------------

    async def run(self) -> None:
        """Forward until stop(). Raises KdnsError if it cannot start or must be started anew."""
        check_permission()
        await asyncio.to_thread(self._read_addresses)
        self._way = await modes.find_way(self.config, families_here(), self._default, self.metrics)
        for family, told in self._way.told.items():
            log.info("%s: the %s mode, %s", FAMILY_LABEL[family], self.config.mode, told)
        for warning in self._way.warnings:
            log.warning("%s", warning)
        self._times.update(dict.fromkeys(self._way.makers))
        self.health.notes = self._way.warnings
        if self._way.writes:
            apply_sysctls(self.config)
            if self.config.mode == "userspace":
                sysctl.apply_tw_reuse()
        self._http = NodeHttp(self.config, self.metrics, self.health)
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                try:
                    await self._forward(group)
                finally:
                    await self._end()
        except BaseExceptionGroup as failed:
            raise _first(failed) from None
        if self._why:
            raise KdnsError(self._why)

    async def _forward(self, group: asyncio.TaskGroup) -> None:
        assert self._http is not None
        await self._http.start()
        if self.pipeline is None:
            self.pipeline = pipeline = Pipeline(
                Store(self._spec.kinds), lambda deps: None, words=WORDS
            )
            self._own = group.create_task(self._follow(self._spec, pipeline, self.metrics))
        self._gauge_age()
        self._gauge_policies()
        gauge_revisions(self.metrics, lambda: self.pipeline.revisions() if self.pipeline else {})
        gauge_draining(self.metrics, self.draining)
        # While the registry is listed.
        self._looked = group.create_task(self._look(), name="look")
        self.pipeline.attach(self._take, self.draining)
        tasks = [
            group.create_task(self._watch_config()),
            group.create_task(self._http.run()),
            group.create_task(self._serve_checks()),
            group.create_task(self._end_drains()),
        ]
        try:
            await self._stop.wait()
        finally:
            self.pipeline.detach(self._take)
            self._end_own()
            for task in tasks:
                task.cancel()

    def _end_own(self) -> None:
        """Follow no registry of its own."""
        if self._own is not None:
            self._own.cancel()
            self._own = None

    def move(self, pipeline: Pipeline) -> None:
        """Be the kernel side of this pipeline from now on. The rules stay but for what is other
        in its registry; what that has not goes as if it had been deleted."""
        before, self.pipeline = self.pipeline, pipeline
        if before is None or before is pipeline or not before.detach(self._take):
            return
        self._end_own()
        pipeline.count_on(before.registry.revision)
        pipeline.attach(self._take, self.draining)

    async def _end(self) -> None:
        """Let writes under way finish; the rules stay."""
        for side in self.sides.values():
            await side.loop.close()
            side.wake.set()
        self._way.close()
        if self._checks is not None:
            await self._checks.stop()
        if self._http is not None:
            await self._http.stop()

    def stop(self, why: str = "") -> None:
        """Begin to leave. why -- what the operator must hear, if it is not their own wish"""
        self._why = self._why or why
        self._stop.set()
        for side in self.sides.values():
            side.wake.set()

    async def clean_up(self) -> None:
        """Remove what this run wrote, when it has ended. Raises ApplyError."""
        if self._way.writes:
            await modes.CLEANERS[self.config.mode](families_here())

    def facts(self) -> Facts:
        """Return what the control socket of an agent alone tells."""
        cidr = ",".join(self.config.cluster_cidrs)
        return facts_of(
            "proxy", lambda: self.pipeline, node=self.node, mode=self.config.mode,
            cluster_cidr=cidr, config=lambda: self.config,
        )  # fmt: skip

    def health_now(self) -> bool:
        """Say whether the node's rules are, or soon will be, what they must be."""
        return self.health.healthy(time.time())

    def _read_addresses(self) -> None:
        """Ask the kernel for the node's addresses; blocks."""
        try:
            for family in families_here():
                self._local += tuple((a.address, a.prefix) for a in node_addresses(family))
                self._default[family] = default_address(family)
        except KdnsError as e:
            log.warning("%s; NodePorts of chosen addresses, and load balancers' addresses that"
                        " are this node's, may be missed", e)  # fmt: skip

    def _gauge_policies(self) -> None:
        self.metrics.gauge(
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
            "Service ports of a Local traffic policy without a ready endpoint on this node.",
            ("ip_family", "traffic_policy"),
        ).read = lambda: [
            ((FAMILY_LABEL[side.family], policy), float(count))
            for side in self.sides.values()
            if side.synced is not None
            for policy, count in _without_local(side.synced).items()
        ]

    def _gauge_age(self) -> None:
        self.metrics.gauge(
            "kdns_source_last_event_age_seconds",
            "Seconds since the registry's source was last heard of.", ("source",),
        ).read = lambda: [
            ((str(self._spec.kind),),
             -1.0 if self.pipeline is None or (age := self.pipeline.age()) is None else age)
        ]  # fmt: skip

    async def _watch_config(self) -> None:
        """Leave when the configuration file has changed, so that whoever started us starts us
        with the new one (as kube-proxy)."""
        if not self._config_file:
            return
        path = Path(self._config_file)
        before = await asyncio.to_thread(_content, path)
        while True:
            await asyncio.sleep(CONFIG_LOOK)
            now = await asyncio.to_thread(_content, path)
            if now is not None and now != before:
                self.stop(f"{path}: the configuration has changed; leaving, to be started with"
                          " the new one")  # fmt: skip
                return

    # --- the registry changes ---------------------------------------------------------

    def _take(self, snapshot: Snapshot, changes: Changes, now: float) -> KernelChanges:
        """Take over a snapshot: ask every family for the rules it makes. Return, by family,
        whose rules are others now."""
        if not snapshot.synced:
            return {}
        before, self._snapshot = self._snapshot, snapshot
        node = snapshot.nodes.get(self.node)
        self.health.sync_node(node)
        if not self.sides:
            if not self._begin(node):
                return {}
            changes, before = everything(snapshot), Snapshot()
        elif changes.synced:  # of another registry than the one before
            changes = joined(everything(before), everything(snapshot))
        first = not before.synced
        services, slices = _count(before, snapshot, changes.services)
        found: dict[Family, Collection[Key]] = {}
        for side in self.sides.values():
            view = self._view(side.family, node)
            moved = view.topology_zone != side.compiler.node.topology_zone
            changed = side.compiler.update(snapshot, changes, view)
            changed = found[side.family] = side.drain.update(
                side.compiler.table, changed, changes.services, before, snapshot, view,
                time.monotonic(), self._keep_seconds(),
            )  # fmt: skip
            side.claims_changed |= services > 0
            if not first:
                self._note_triggers(side, before, snapshot, changed)
            if not (changed or first or moved or changes.service_cidrs):
                continue
            side.services += services
            side.endpoints += slices
            side.unasked.update(changed)
            if first or moved or changes.service_cidrs:
                self._ask(side, full=moved)
            elif self._names_wait() and all(_is_bare(snapshot, key) for key in side.unasked):
                asyncio.get_running_loop().call_later(BARE_WAIT, self._ask_late, side)
            else:
                self._ask(side)
        if node is not None and not first:
            self._check_options(node)
        if first:
            self._tell_first()
        self._kept.set()
        return found

    def _ask(self, side: _Side, full: bool = False) -> None:
        """Have what changed written."""
        side.loop.request(
            side.drain.table, side.unasked, full=full, services=side.services,
            endpoints=side.endpoints,
        )  # fmt: skip
        side.unasked.clear()
        side.services = side.endpoints = 0

    def _ask_late(self, side: _Side) -> None:
        """Have written what waited for its slices, if it still does."""
        if side.unasked and not self._stop.is_set():
            self._ask(side)

    def _names_wait(self) -> bool:
        return self.pipeline is not None and self.pipeline.gate is not None

    def _keep_seconds(self) -> float:
        """Return how long a Service that is gone may be remembered: as long as DNS says, from
        when it was shown last, which may be until the gate opens."""
        gate = self.pipeline.gate if self.pipeline is not None else None
        return self._longest_ttl() + (gate.timeout if gate is not None else 0.0)

    def _begin(self, node: Node | None) -> bool:
        """Make the sides, now that the registry is known. False: the Node must be known too."""
        if node is None and self.config.needs_node:
            if not self._waits_for_node:
                self._waits_for_node = True
                log.warning(
                    "there is no Node %r yet, and detectLocalMode or nodePortAddresses needs it:"
                    " no rule is written until it is there (--hostname-override names another)",
                    self.node,
                )
            return False
        assert self._group is not None
        self._noted = self._group.create_task(self._note_leftovers(), name="look")
        for family, make in self._way.makers.items():
            options = replace(
                settings.options_of(self.config, family, node, self._local),
                random_fully=family in self._way.random_fully,
                drop_invalid=not sysctl.is_tcp_liberal(),
            )
            dataplane = make(options, self.metrics)
            timing = Timing(
                sync_period=self.config.sync_period, min_sync_period=self.config.min_sync_period
            )
            gate = self.pipeline.gate if self.pipeline is not None else None
            if gate is not None:
                # Names wait for what comes while it rests.
                timing = replace(timing, rest=min(timing.rest, gate.timeout / REST_SHARE))
            loop = SyncLoop(
                dataplane,
                family,
                self.metrics,
                timing,
                lambda table, changed, full, f=family: self._synced(f, table, changed),  # type: ignore[misc]
                on_failed=self._sync_failed,
            )
            loop.warnings += self._way.warnings
            view = self._view(family, node)
            compiler = TableCompiler(family, view)
            side = _Side(
                family,
                options,
                compiler,
                Drain(compiler.table, view, self._policy),
                loop,
                FlowCleaner(options, self.metrics),
            )
            self.sides[family] = side
            self._times[family] = loop
            self._group.create_task(self._sync(loop), name=f"sync {FAMILY_LABEL[family]}")
            self._group.create_task(self._follow_syncs(side), name=f"flows {FAMILY_LABEL[family]}")
        return True

    async def _sync(self, loop: SyncLoop) -> None:
        assert self._noted is not None
        await asyncio.shield(self._noted)
        await loop.run()

    async def _look(self) -> frozenset[Mode]:
        """Return the modes that left something here in an earlier run."""
        if not self._way.writes:
            return frozenset()
        return await modes.find_leftovers(self.config.mode, families_here())

    async def _note_leftovers(self) -> None:
        """Know of it before our own rules are beside it. It stays until they are: nobody meets
        a gap."""
        assert self._looked is not None
        self._left = await self._looked

    async def _clean_after(self) -> None:
        """Remove the rest of it, now that our rules are there."""
        if self._left:
            log.info("removing what another mode left: %s", ", ".join(sorted(self._left)))
            mode = self.config.mode
            self._note(await modes.clean_after(mode, self._left, families_here()))
        self._leave_if_once()

    def _note(self, failures: Sequence[str]) -> None:
        for text in failures:
            log.warning("%s", text)
        self.health.notes = (*self.health.notes, *failures)

    def _view(self, family: Family, node: Node | None) -> NodeView:
        view = settings.node_view(self.config, family, self.node, node)
        # A Node that is not there, or has no address, leaves the kernel's word for it.
        return view if view.address else replace(view, address=self._default.get(family, ""))

    def _check_options(self, node: Node) -> None:
        """Leave if the Node now asks for other rules, for chains cannot be told from others by
        halves (as kube-proxy does when podCIDRs change)."""
        for family, side in self.sides.items():
            detector = settings.detector_of(self.config, family, node)
            if detector != side.options.detector:
                self.stop(f"the Pod CIDRs of Node {self.node} have changed; leaving, to be"
                          " started with the new ones")  # fmt: skip

    def _note_triggers(
        self, side: _Side, before: Snapshot, after: Snapshot, changed: Collection[Key]
    ) -> None:
        """Remember when the changes of endpoints were made, to tell how long they took."""
        for key in changed:
            old, new = _slices(before, key), _slices(after, key)
            for one in new:
                seconds = _trigger_time(one)
                if seconds is not None and one not in old:
                    side.triggered.setdefault(key, deque(maxlen=MOST_TRIGGERS)).append(seconds)

    def _tell_first(self) -> None:
        for side in self.sides.values():
            table = side.compiler.table
            log.info(
                "%s: %d Services and %d endpoints to forward to",
                FAMILY_LABEL[side.family], len(table.services), table.endpoints,
            )  # fmt: skip

    # --- what is kept beside the registry -----------------------------------------------

    async def _end_drains(self) -> None:
        """Take away the rules of Services that are gone, when nobody needs them any more."""
        while True:
            self._kept.clear()
            due = [at for side in self.sides.values() if (at := side.drain.deadline()) is not None]
            if not due:
                await self._kept.wait()
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, min(due) - time.monotonic())):
                    await self._kept.wait()
                    continue
            for side in self.sides.values():
                used = None
                if self._policy == "conntrack" and side.drain.places():
                    used = await self._used(side)
                changed = side.drain.expire(time.monotonic(), used)
                if changed:
                    side.loop.request(side.drain.table, changed)
            if self._policy == "conntrack":
                await asyncio.sleep(LOOK)

    async def _used(self, side: _Side) -> Collection[Place] | None:
        """Return what connections use of what is kept; None: nobody can say."""
        try:
            return await asyncio.to_thread(used_places, side.family, side.drain.places())
        except KdnsError as e:
            log.warning("%s; rules of Services that are gone stay for their TTL", e)
            self._policy = "ttl"
            for one in self.sides.values():
                one.drain.fall_back(time.monotonic() + self._keep_seconds())
            return None

    def draining(self) -> list[dict[str, object]]:
        """Return, for /v1/status, the Services that are forwarded though they are gone."""
        now = time.monotonic()
        kept: dict[Key, float | None] = {}
        for side in self.sides.values():
            kept |= side.drain.told(now)
        return [
            {"service": "/".join(key), "seconds_left": None if left is None else round(left, 1)}
            for key, left in sorted(kept.items())
        ]

    # --- the kernel has it --------------------------------------------------------------

    def _synced(self, family: Family, table: ForwardingTable, changed: frozenset[Key]) -> None:
        side = self.sides[family]
        now = time.time()
        for key in changed & side.triggered.keys():
            for seconds in side.triggered.pop(key):
                self._latency[family].add(max(0.0, now - seconds))
        side.synced = table
        if self.pipeline is not None:
            self.pipeline.programmed(family, table.revision)
        if self.config.mode != "userspace":  # there, flows are this process's own
            side.cleaner.note(table, changed)
        self._tell_places()
        side.wake.set()
        self._table_synced.set()
        if len([one for one in self.sides.values() if one.synced]) == len(self.sides):
            self._all_synced()

    def _tell_places(self) -> None:
        """Tell where Services listen, of those that are new there."""
        places = self._way.places()
        for place in places:
            if place not in self._places:
                log.info("%s", place)
        self._places = frozenset(places)

    def _sync_failed(self, error: Exception) -> None:
        if self._once:
            self.stop(str(error))

    def _all_synced(self) -> None:
        if self._told_ready:
            return
        self._told_ready = True
        assert self._group is not None
        self._group.create_task(self._clean_after(), name="clean")
        if not self._once:
            settle_memory()
            log.info("the rules of this node are up to date")

    def _leave_if_once(self) -> None:
        if self._once:
            self.stop()

    async def _serve_checks(self) -> None:
        """Answer on the health-check node ports of the Services that the kernel has."""
        while True:
            await self._table_synced.wait()
            self._table_synced.clear()
            if self._checks is None:
                self._checks = ServiceHealthServers(self.health_now, self._check_addresses())
            tables = [side.synced for side in self.sides.values() if side.synced is not None]
            await self._checks.update(health_check_ports(tables))

    def _check_addresses(self) -> list[str] | None:
        """Return where health-check node ports listen; None: on every address."""
        found: list[str] = []
        for side in self.sides.values():
            if side.options.node_port_addresses is None:
                return None
            found += side.options.node_port_addresses
        return found

    async def _follow_syncs(self, side: _Side) -> None:
        """Do after a sync what it need not wait for: remove stale flows (what failed is tried
        again with the next sync or after a sync period), tell of conflicts."""
        while not self._stop.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(self.config.sync_period):
                    await side.wake.wait()
            side.wake.clear()
            try:
                await side.cleaner.clean()
                if side.claims_changed and side.synced is not None:
                    side.claims_changed = False
                    found = await asyncio.to_thread(list, conflicts(side.synced))
                    self._tell_conflicts(side, found)
            except Exception:  # no reason to leave: forwarding goes on
                log.exception("%s: what follows a sync failed, a bug", FAMILY_LABEL[side.family])

    def _tell_conflicts(self, side: _Side, found: list[str]) -> None:
        """Tell of those that are new."""
        new = [text for text in found if text not in side.conflicts]
        for text in new[:MOST_CONFLICTS]:
            log.warning("%s", text)
        if len(new) > MOST_CONFLICTS:
            log.warning("and %d more like that", len(new) - MOST_CONFLICTS)
        side.conflicts = frozenset(found)


def _without_local(table: ForwardingTable) -> dict[str, int]:
    """Return, by traffic policy, how many Service ports have endpoints but none here."""
    return {
        "internal": sum(one.internal_local and one.internal == "drop" for one in table),
        "external": sum(one.external_local and one.external == "drop" for one in table),
    }


def _count(before: Snapshot, after: Snapshot, keys: Collection[Key]) -> tuple[int, int]:
    """Return how many Services, and how many Services' slices, are not what they were."""
    services = slices = 0
    for key in keys:
        services += _service(before, key) is not _service(after, key)
        slices += _slices(before, key) is not _slices(after, key)
    return services, slices


def _is_bare(snapshot: Snapshot, key: Key) -> bool:
    """True for a Service whose slices somebody is about to write."""
    service = snapshot.services.get(key[0], {}).get(key[1])
    return service is not None and bool(service.spec.selector) and not _slices(snapshot, key)


def _service(snapshot: Snapshot, key: Key) -> object:
    return snapshot.services.get(key[0], {}).get(key[1])


def _slices(snapshot: Snapshot, key: Key) -> tuple[EndpointSlice, ...]:
    return snapshot.slices.get(key[0], {}).get(key[1], ())


def _trigger_time(one: EndpointSlice) -> float | None:
    """Return the Unix seconds at which the change of a slice was set off, where it says so."""
    text = (one.metadata.annotations or {}).get(TRIGGER_TIME)
    if not text:
        return None
    from datetime import datetime

    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    except ValueError:
        return None


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None  # a ConfigMap volume that is just being replaced


def _first(failed: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the first error of a group that is not itself one."""
    error: BaseException = failed
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def families_here() -> tuple[Family, ...]:
    """Return the IP families that this kernel has."""
    return FAMILIES if os.path.exists("/proc/net/if_inet6") else (4,)


def may_write(status: Path = Path("/proc/self/status")) -> bool:
    """Whether this process may write rules. status -- the kernel's word on a process"""
    for line in status.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == "CapEff":
            return bool(int(value, 16) >> NET_ADMIN & 1)
    return True


def check_permission(status: Path = Path("/proc/self/status")) -> None:
    """Raise KdnsError unless this process may write rules: else it would try for ever."""
    if not may_write(status):
        raise KdnsError(
            "no permission to write rules: run as root, or with the capability NET_ADMIN (a"
            " container: securityContext.capabilities.add); --proxy-mode=userspace needs neither"
        )


def host_name() -> str:
    """Return the host's name, which a Node has unless it is told otherwise."""
    return socket.gethostname()


def apply_sysctls(config: ProxyConfig) -> None:
    """Set what the kernel must have for forwarding; what it refuses is logged and left."""
    conntrack = config.conntrack
    sysctl.apply_conntrack(
        sysctl.ConntrackSettings(
            conntrack.max_per_core,
            conntrack.min,
            round(conntrack.tcp_established_timeout),
            round(conntrack.tcp_close_wait_timeout),
            conntrack.tcp_be_liberal,
            round(conntrack.udp_timeout),
            round(conntrack.udp_stream_timeout),
        )
    )
    if settings.serves_localhost(config):
        sysctl.apply_route_localnet()
    try:
        Path("/proc/self/oom_score_adj").write_text(f"{config.oom_score_adj}\n", encoding="ascii")
    except OSError as e:
        log.info("oom_score_adj is not set to %d: %s", config.oom_score_adj, e.strerror)


# --- without a kernel -----------------------------------------------------------------------


def list_registry(spec: KubeSpec | ManifestSpec) -> Snapshot:
    """Return what the source has, listed once. Raises ConfigError."""
    return asyncio.run(list_once(spec)).snapshot


def node_in(snapshot: Snapshot, name: str) -> str:
    """Return the name of the node to make rules for. Raises ConfigError.

    name -- as asked for; "": the only one there is, or this host
    """
    nodes = sorted(snapshot.nodes)
    if not name and len(nodes) > 1:
        raise ConfigError([Problem("--node", 0, f"say which of {', '.join(nodes)}")])
    if name and nodes and name not in nodes:
        text = f"there is no Node {name!r}; there is {', '.join(nodes)}"
        raise ConfigError([Problem("--node", 0, text)])
    return name or (nodes[0] if nodes else host_name().lower())


def table_for(
    snapshot: Snapshot,
    config: ProxyConfig,
    family: Family,
    node: str,
    addresses: Iterable[str] = (),
) -> tuple[ForwardingTable, Options]:
    """Return the table of one family for a node, and what its rules are written with.

    addresses -- of the node's interfaces; where they are not known, those of its Node must do
    """
    known = snapshot.nodes.get(node)
    compiler = TableCompiler(family, settings.node_view(config, family, node, known))
    compiler.update(snapshot, everything(snapshot))
    told = addresses or [
        one.address
        for one in (known.status.addresses if known else None) or ()
        if one.type in ("InternalIP", "ExternalIP")
    ]
    local: tuple[LocalAddress, ...] = tuple((one, 32 if family == 4 else 128) for one in told)
    return compiler.table, settings.options_of(config, family, known, local)


def rules_text(
    snapshot: Snapshot, config: ProxyConfig, family: Family, node: str, explain: bool = False
) -> tuple[str, list[str]]:
    """Return a node's rules as one text, and what an operator should know about them.

    explain -- with each rule, whose it is and what it is for
    """
    table, options = table_for(snapshot, config, family, node)
    return spell(config, table, options, explain), list(conflicts(table))


def spell(
    config: ProxyConfig, table: ForwardingTable, options: Options, explain: bool = False
) -> str:
    """Return what the mode that is wanted makes of a table."""
    match config.mode:
        case "nftables":
            from kdns.proxy import nftables

            return nftables.render_rules(table, options, explain)
        case "ipvs":
            from kdns.proxy import ipvs

            return ipvs.render_rules(table, options, config.ipvs.scheduler, explain)
        case "userspace":
            from kdns.proxy import userspace

            return userspace.render_rules(table, options, explain=explain)
        case _:
            return render_rules(table, options, explain)


# Programs that take what a mode prints, by family; ipvs says so itself for each part.
PROGRAMS: Mapping[Mode, Mapping[Family, str]] = {
    "iptables": {4: "iptables-restore --noflush", 6: "ip6tables-restore --noflush"},
    "userspace": {4: "iptables-restore --noflush", 6: "ip6tables-restore --noflush"},
    "nftables": {4: "nft -f -", 6: "nft -f -"},
    "ipvs": {4: "IPv4", 6: "IPv6"},
}


# --- entry points of the command line --------------------------------------------------------


def read_settings(parsed: Parsed) -> Read:
    """Return what flags and configuration file come to. Raises ConfigError."""
    read = None
    if parsed.config_path:
        try:
            text = Path(parsed.config_path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            why = getattr(e, "strerror", None) or str(e)
            raise ConfigError([Problem(parsed.config_path, 0, f"cannot be read: {why}")]) from None
        read = settings.parse_config(text, parsed.config_path)
    return settle(parsed, read)


def start_log(settled: Read, stream: TextIO, log: logging.Logger = log) -> None:
    """Log to `stream` in the format that is wanted, what is to be known of the flags first."""
    handler = setup_logging(stream)
    if settled.config.logging.format == "json":
        handler.setFormatter(JsonFormatter())
    for warning in settled.warnings:
        log.warning("%s", replace(warning, warning=False))  # the line says so itself


def command(parsed: Parsed) -> int:
    """Do what `kdns proxy` was told to; return the exit code. Raises KdnsError."""
    settled = read_settings(parsed)
    config = settled.config
    relaying = _relaying(parsed, config)
    start_log(settled, sys.stderr if parsed.dry_run else sys.stdout)
    if parsed.write_config_to:
        try:
            Path(parsed.write_config_to).write_text(settings.render_yaml(config), encoding="utf-8")
        except OSError as e:
            raise KdnsError(f"{parsed.write_config_to}: cannot be written: {e.strerror}") from None
        log.info("wrote the configuration to %s", parsed.write_config_to)
        return 0
    if parsed.cleanup:
        check_permission()
        asyncio.run(_clean_up())
        log.info("our rules are gone")
        return 0
    node = settings.node_name(config, host_name())
    spec: KubeSpec | ManifestSpec
    if parsed.manifests:
        spec = ManifestSpec(parsed.manifests)
    else:
        spec = KubeSpec(
            parsed.master, kubeconfig=config.client.kubeconfig, node=node, only_forwarded=True
        )
    if parsed.dry_run:
        _print_rules(spec, config, node if not parsed.manifests else config.hostname_override)
        return 0
    if parsed.init_only:
        apply_sysctls(config)
        return 0
    _run(
        lambda: Agent(
            config, spec, node, config_file=parsed.config_path, once=parsed.once,
            relaying=relaying,
        ),
        parsed.control,
    )  # fmt: skip
    return 0


def _relaying(parsed: Parsed, config: ProxyConfig) -> Relaying:
    """Return what is said of the userspace mode. Raises ConfigError."""
    if parsed.once and config.mode == "userspace":
        text = "is not for the userspace mode: connections go through this process"
        raise ConfigError([Problem("--once", 0, text)])
    if not parsed.portmap:
        return Relaying(None, parsed.udp_idle)
    from kdns.proxy.userspace import parse_portmap

    portmap = parse_portmap(parsed.portmap)
    if config.mode != "userspace":
        text = f"is for --proxy-mode=userspace, and the mode is {config.mode}"
        raise ConfigError([Problem("--portmap", 0, text)])
    return Relaying(portmap, parsed.udp_idle)


async def _clean_up() -> None:
    """Remove what any mode wrote, as far as there are programs for it. Raises KdnsError."""
    failures = await modes.clean_all(families_here())
    for text in failures[1:]:
        log.error("%s", text)
    if failures:
        raise KdnsError(failures[0])
    await find_programs(families_here())  # one that is missing may have left rules


def _run(make: Callable[[], Agent], control: str) -> None:
    """Run an agent until it ends or a signal comes. control -- path of the control socket"""

    async def main() -> None:
        agent = make()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, agent.stop)
        async with serving_control(control, agent.facts):
            await agent.run()

    raise_file_limit()
    collect_rarely()
    take_turns_often()
    asyncio.run(main())


def _print_rules(spec: KubeSpec | ManifestSpec, config: ProxyConfig, node: str) -> None:
    snapshot = list_registry(spec)
    name = node_in(snapshot, node)
    for family in FAMILIES:
        text, notes = rules_text(snapshot, config, family, name)
        for note in notes:
            log.warning("%s", note)
        print(f"# for {PROGRAMS[config.mode][family]}")
        print(text, end="")


def rules_of(
    flags: Sequence[str], manifests: Sequence[str], family: Family, explain: bool = False
) -> tuple[str, list[str]]:
    """Return the rules that `kdns proxy` with these flags would write for manifests, and what
    an operator should know about them. Raises ConfigError."""
    config = settle(parse_flags(flags), None).config
    snapshot = list_registry(ManifestSpec(tuple(manifests)))
    node = node_in(snapshot, config.hostname_override)
    return rules_text(snapshot, config, family, node, explain)


def dump(stage: str, manifests: Sequence[str], node: str, cluster_cidr: str) -> Iterator[str]:
    """Yield the lines of `kdns dump table|rules` for manifests. Raises ConfigError."""
    config = settle(parse_flags([f"--cluster-cidr={cluster_cidr}"]), None).config
    snapshot = list_registry(ManifestSpec(tuple(manifests)))
    name = node_in(snapshot, node)
    for family in FAMILIES:
        yield f"# {FAMILY_LABEL[family]} on node {name}"
        table, options = table_for(snapshot, config, family, name)
        if stage == "table":
            yield from dump_table(table)
        else:
            yield from render_rules(table, options).splitlines()
