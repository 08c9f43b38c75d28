"""Runs a registry's source, whichever kind its spec names, for as long as anybody wants it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeAlias

from kdns.errors import ConfigError, Problem, SourceError
from kdns.metrics import Metrics
from kdns.pipeline import Pipeline
from kdns.registry.snapshot import Changes, Snapshot
from kdns.registry.spec import KubeSpec, ManifestSpec
from kdns.registry.store import Store
from kdns.source.sink import Sink

if TYPE_CHECKING:
    from kdns.source.kube import KubeSource
    from kdns.source.manifests import ManifestSource

log = logging.getLogger("kdns")

# What runs a registry's source: follow() below, or the embedded registry's own.
Follow: TypeAlias = Callable[
    [KubeSpec | ManifestSpec, Pipeline, Metrics], Coroutine[Any, Any, None]
]

RESTART = 1.0  # seconds: a bug met at once again must not take the processor
LISTING = 30.0  # seconds that listing once may take


async def follow(spec: KubeSpec | ManifestSpec, sink: Sink, metrics: Metrics) -> None:
    """Run the source for ever: a bug in it costs a listing anew, not the program."""
    while True:
        try:
            await _source(spec, sink, metrics).run()
        except Exception:
            log.exception(
                "a bug in kdns in the registry's source; what is known is kept, the"
                " source starts again in %g s; please report it", RESTART,
            )  # fmt: skip
        await asyncio.sleep(RESTART)


def _source(
    spec: KubeSpec | ManifestSpec, sink: Sink, metrics: Metrics
) -> KubeSource | ManifestSource:
    if isinstance(spec, ManifestSpec):
        from kdns.source.manifests import ManifestSource

        return ManifestSource(spec, sink, metrics)
    from kdns.source.kube import KubeSource

    return KubeSource(spec, sink, metrics)


class _Listing(Pipeline):
    """A pipeline that remembers why its source fails.

    ended -- it is synced; or it will not be, for a file does not come by waiting
    """

    why = ""

    def __init__(self, spec: KubeSpec | ManifestSpec) -> None:
        super().__init__(Store(spec.kinds), lambda deps: None)
        self._final = isinstance(spec, ManifestSpec)
        self.ended = asyncio.Event()

    def take_over(self, snapshot: Snapshot, changes: Changes) -> None:
        super().take_over(snapshot, changes)
        if self.snapshot.synced:
            self.ended.set()

    def failed(self, what: str, error: SourceError, retry_in: float) -> None:
        self.why = str(error)
        if self._final:
            self.ended.set()


async def list_once(spec: KubeSpec | ManifestSpec) -> Pipeline:
    """Return a pipeline whose snapshot holds what the source has. Raises ConfigError if it
    cannot be had, or not in LISTING seconds."""
    pipeline, metrics = _Listing(spec), Metrics()
    task = asyncio.ensure_future(follow(spec, pipeline, metrics))
    try:
        async with asyncio.timeout(LISTING):
            await pipeline.ended.wait()
    except TimeoutError:
        pipeline.why = f"not listed in {LISTING:g} s{pipeline.why and f': {pipeline.why}'}"
    finally:
        task.cancel()
    if metrics.value("kdns_source_errors_total", "manifests", "broken"):
        # Half of what was meant would be taken for all of it.
        pipeline.why = "a file is broken, as said above"
    elif pipeline.snapshot.synced:
        return pipeline
    what = "manifests" if isinstance(spec, ManifestSpec) else "registry"
    raise ConfigError([Problem(what, 0, pipeline.why.removeprefix("manifests: "))])
