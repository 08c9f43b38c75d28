"""Services that have no rules because the kernel, or its program, refuses one of theirs.

Decides who is left out, so that all others have their rules, and when they are tried again. It may
be a match that this kernel lacks, and what one Service asks for must not keep the others' rules
away. Writing is the dataplane's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from kdns.errors import ApplyError
from kdns.proxy.table import ForwardingTable
from kdns.registry.objects import Key

log = logging.getLogger("kdns.proxy")

# So many a sync are searched for, each at the price of a write, and more in all are no fault of
# theirs.
MOST_AT_ONCE = 16
MOST_REFUSED = 256
# Seconds until one is tried again, and until it is if it has changed.
REFUSED_FOR = 300.0
REFUSED_REST = 10.0
MOST_TOLD = 5  # differences named in one log line


@dataclass(slots=True)
class _Refusal:
    """A Service that is left out. Monotonic seconds: rest -- not before; due -- tried again."""

    rest: float
    due: float


class Refusals(Collection[Key]):
    """The Services left out of one family. clock -- monotonic seconds; family -- for the log"""

    def __init__(self, family: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._family = family
        self._clock = clock
        self._held: dict[Key, _Refusal] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._held

    def __iter__(self) -> Iterator[Key]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    @property
    def due(self) -> bool:
        """It is time for another try."""
        return any(refusal.due <= self._clock() for refusal in self._held.values())

    def take_back(self, table: ForwardingTable, changed: Collection[Key]) -> list[Key]:
        """Take back, and return, the Services whose time has come."""
        now, back = self._clock(), []
        for key, refusal in self._held.items():
            if key in changed:
                refusal.due = min(refusal.due, refusal.rest)
            if now >= refusal.due or key not in table.services:
                back.append(key)
        for key in back:
            del self._held[key]
        return back

    async def write_accepted(
        self,
        write: Callable[[], Awaitable[None]],
        owner: Callable[[str], Key | None],
        failed: Callable[[ApplyError], None],
        spell_without: Callable[[Key], Awaitable[None]],
    ) -> None:
        """Write all, but for Services with a rule that is refused. Raises what is no single
        Service's fault.

        write         -- writes everything; raises ApplyError
        owner         -- whose the line is that was refused
        failed        -- is told of a failure that does not end this
        spell_without -- has a Service, left out now, asked for no more
        """
        suspect: Key | None = None
        for _ in range(2 * MOST_AT_ONCE):
            try:
                await write()
                return
            except ApplyError as e:
                key = owner(e.line) if e.line and not e.busy else None
                if key is None or len(self._held) >= MOST_REFUSED:
                    raise
                failed(e)
                # Once may be due to another program that changed our rules meanwhile.
                if key == suspect:
                    now = self._clock()
                    self._held[key] = _Refusal(now + REFUSED_REST, now + REFUSED_FOR)
                    log.error(
                        "%s: Service %s is left out, it has no rules: one of them is refused: %s",
                        self._family, "/".join(key), e,
                    )  # fmt: skip
                    await spell_without(key)
                suspect = key
        await write()


def tell_changed(what: str, found: Sequence[str]) -> None:
    """Log what somebody else changed. what -- which kind of thing"""
    more = f" and {len(found) - MOST_TOLD} more" if len(found) > MOST_TOLD else ""
    log.warning("%s changed by somebody else: %s%s", what, "; ".join(found[:MOST_TOLD]), more)
