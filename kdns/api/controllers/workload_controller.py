"""What the controllers of Deployments, ReplicaSets and StatefulSets are made with."""

from __future__ import annotations

from collections.abc import Callable

from kdns.api.controllers.events import Recorder
from kdns.api.controllers.index import Index
from kdns.api.controllers.writes import Writer


class Workloads:
    """A controller of one kind of workload. queue -- has one looked at; clock -- Unix seconds"""

    def __init__(
        self,
        writer: Writer,
        index: Index,
        recorder: Recorder,
        queue: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        self._writer = writer
        self._objects = writer.objects
        self._index = index
        self._recorder = recorder
        self._queue = queue
        self._clock = clock
