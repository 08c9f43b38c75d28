"""The controllers of the embedded cluster: what makes a Service's slices, a Deployment's Pods.

Decides which controllers there are and what they start with; each has its own module, and
runner.py calls them. They write through objects.py as any client does, and hear of changes
from the store in the turn of the loop in which these are committed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

from kdns.api.controllers import (
    collector,
    deployments,
    events,
    mirror,
    namespaces,
    pods,
    replica_sets,
    services,
    slices,
    stateful_sets,
)
from kdns.api.controllers.index import Index
from kdns.api.controllers.nodes import ensure_nodes
from kdns.api.controllers.runner import Runner
from kdns.api.controllers.writes import Writer
from kdns.api.kinds import RESOURCES
from kdns.api.objects import Objects
from kdns.api.store import Event

log = logging.getLogger(__name__)

# What names and traffic hang on; Events and status can wait for it.
URGENT: Final = frozenset({slices.NAME, mirror.NAME, pods.NAME, services.NAME})

__all__ = ["ControllerOptions", "Controllers"]


@dataclass(slots=True)
class ControllerOptions:
    """What the cluster is like.

    nodes                 -- how many Nodes there are: node1, node2, ...
    node_addresses        -- theirs, in order; documentation addresses where these end
    zones                 -- topology zones, dealt out to the Nodes in turn
    pod_ready_delay       -- seconds from a Pod's start until it is ready
    pod_termination_delay -- seconds that a deleted Pod is still there, terminating (its grace
                             at most)
    api_address           -- where the API listens: the endpoint of `kubernetes`
    dns_address           -- where DNS listens: the endpoint of `kube-dns`; None: there is none
    dns_metrics_port      -- likewise; 0: there is none
    root_ca               -- PEM of the API's certificate authority
    pod_ranges            -- for the Nodes' podCIDRs; default: the allocator's
    """

    nodes: int = 1
    node_addresses: Sequence[str] = ()
    zones: Sequence[str] = ()
    pod_ready_delay: float = 0.0
    pod_termination_delay: float = 0.0
    api_address: tuple[str, int] = ("127.0.0.1", 6443)
    dns_address: tuple[str, int] | None = None
    dns_metrics_port: int = 0
    root_ca: str = ""
    pod_ranges: Sequence[str] = ()


class Controller(Protocol):
    """What looks at things. seen() is told every event, after the index knows it."""

    def seen(self, event: Event) -> None: ...

    async def reconcile(self, key: str) -> float | None: ...


class Controllers:
    """All controllers on one store. start() and stop() once, from the store's event loop.

    clock -- Unix seconds; what is due later is due by it, so a test may move it
    """

    def __init__(
        self,
        objects: Objects,
        options: ControllerOptions | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.options = options or ControllerOptions()
        self._objects = objects
        self._clock = clock
        self._runner = Runner(clock)
        self._index = Index()
        self._writer = Writer(objects)
        self._end: Callable[[], None] | None = None
        self._told: list[Controller] = []
        self._cluster = services.ClusterServices(
            self._writer, self._queue_of(services.CLUSTER), self.options, clock
        )
        self._namespaces = self._build()

    def _build(self) -> namespaces.Namespaces:
        writer, index, clock, options = self._writer, self._index, self._clock, self.options
        recorder = events.Recorder(writer, clock, self._queue_of(events.NAME))
        self._runner.register(events.SWEEP, recorder.sweep)

        def add(name: str, controller: Controller) -> None:
            self._told.append(controller)
            self._runner.register(name, controller.reconcile, urgent=name in URGENT)

        queue = self._queue_of
        add(collector.NAME, collector.Collector(writer, index, queue(collector.NAME)))
        add(
            slices.NAME, slices.Slices(writer, index, recorder, queue(slices.NAME)),
        )  # fmt: skip
        add(mirror.NAME, mirror.Mirror(writer, index, queue(mirror.NAME)))
        add(
            pods.NAME,
            pods.Pods(
                writer, index, recorder, queue(pods.NAME), clock,
                ready_delay=options.pod_ready_delay,
                termination_delay=options.pod_termination_delay,
            ),
        )  # fmt: skip
        for name, made in (
            (replica_sets.NAME, replica_sets.ReplicaSets),
            (deployments.NAME, deployments.Deployments),
            (stateful_sets.NAME, stateful_sets.StatefulSets),
        ):
            add(name, made(writer, index, recorder, queue(name), clock))
        add(services.NAME, services.Balancers(writer, recorder, queue(services.NAME)))
        spaces = namespaces.Namespaces(writer, queue(namespaces.NAME), clock, options.root_ca)
        add(namespaces.NAME, spaces)
        add(services.CLUSTER, self._cluster)
        add(events.NAME, recorder)
        return spaces

    def _queue_of(self, name: str) -> Callable[[str], None]:
        return partial(self._runner.queue, name)

    # --- life -------------------------------------------------------------------------

    async def start(self) -> None:
        """Make what a cluster has from the start, where it is not there; look at everything.
        Returns before the controllers have done what there is to do: see settle()."""
        self._end = self._objects.store.subscribe(self._tell)
        self._load()
        await self._namespaces.bootstrap()
        await self.advertise()
        options = self.options
        ranges = options.pod_ranges or [str(one) for one in self._objects.allocator.pod_networks]
        await ensure_nodes(
            self._writer, options.nodes, options.node_addresses, options.zones, ranges,
            self._clock(),
        )  # fmt: skip
        self._runner.start()
        self._runner.queue(events.SWEEP, "sweep")

    async def advertise(self) -> None:
        """Say in `kubernetes` and `kube-dns` where the servers of `options` listen; again after
        those have changed."""
        await self._cluster.reconcile("all")

    async def stop(self) -> None:
        """End; what is half done is taken up at the next start."""
        if self._end is not None:
            self._end()
            self._end = None
        await self._runner.stop()

    async def settle(self) -> None:
        """Wait until no controller has anything to do now."""
        await self._runner.settle()

    # --- events -----------------------------------------------------------------------

    def _load(self) -> None:
        """What the store holds is news to everybody. The index first, all of it: a controller
        that asks for an owner is to find it."""
        store = self._objects.store
        held = [
            Event("ADDED", one, None) for resource in RESOURCES
            for one in store.items(resource.qualified)
        ]  # fmt: skip
        self._index.load(held)
        for event in held:
            self._tell_controllers(event)

    def _tell(self, told: Sequence[Event]) -> None:
        for event in told:
            try:
                self._index.apply(event)
            except Exception:
                # What cannot be read is not to hide the events after it.
                log.exception("index: %s", event.stored.key)
            self._tell_controllers(event)

    def _tell_controllers(self, event: Event) -> None:
        for controller in self._told:
            try:
                controller.seen(event)
            except Exception:
                # Nor is one controller's trouble the others'.
                log.exception("%s: %s", type(controller).__name__, event.stored.key)
