"""Long work beside the event loop: names are answered while a huge object is looked at.

Decides what is long, and that only one such piece of work runs at a time: more of them would
share one lock, and make everybody else wait for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# Octets of an object from which on it is looked at aside: up to here that takes some 20 ms.
LARGE: Final = 16 << 10


class Aside:
    """A place for work without side effects on what the event loop's own code looks at."""

    def __init__(self) -> None:
        self._turn = asyncio.Semaphore(1)

    async def run(
        self, size: int, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Call the function: here and now for what is small, else in a thread. size -- octets
        of what it looks at"""
        if size < LARGE:
            return function(*args, **kwargs)
        async with self._turn:
            return await asyncio.to_thread(function, *args, **kwargs)
