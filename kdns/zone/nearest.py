"""Which existing names are nearest to one that does not exist: for hints in answers.

Decides by edit distance (an octet more, less, another one, or two swapped), and looks only at
names that stand beside the wanted one in the alphabet, read from the front or from the back: a
name with one mistake in it shares all that comes before the mistake, or all that comes behind
it, with what was meant. So the work is bounded, whatever the number of names: a flood of
random names must not cost more than answering it does. What the names are of is the caller's.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping

# Names looked at on each side, in each direction.
WINDOW = 4
# So many names or fewer are all looked at.
FEW = 12
# Single changes entered into the sorted lists; of more, the lists are sorted anew.
SINGLY = 64
LONGEST = 63  # octets a label may have
SHOWN = 3


class NameIndex:
    """The names of one mapping, sorted when they are first asked for. The mapping's owner says
    by changed() which names came or went."""

    __slots__ = ("_backward", "_changed", "_forward", "_names", "_sorted")

    def __init__(self, names: Mapping[bytes, object]) -> None:
        self._names = names
        self._forward: list[bytes] = []
        self._backward: list[bytes] = []
        self._changed: set[bytes] = set()
        self._sorted = False

    def changed(self, name: bytes) -> None:
        """Take note that a name came or went."""
        if self._sorted:
            self._changed.add(name)
            if len(self._changed) > SINGLY:
                self._sorted = False
                self._changed.clear()

    def nearest(self, wanted: bytes) -> list[bytes]:
        """Return up to three names, those nearest to `wanted` and within two steps of it, in
        order of the alphabet; if there are none, those that go on where it stops (web: web-v2),
        or the one that stops before it does (web-v2: web)."""
        if not 2 <= len(wanted) <= LONGEST:
            return []
        if self._changed or not self._sorted:
            self._sort()
        forward = self._forward
        at = bisect_left(forward, wanted)
        n = len(forward)
        found = _within_reach(wanted, forward) if n <= FEW else self._among_many(wanted, at)
        if found:
            return found
        longer = wanted + b"-"
        if at < n and forward[at].startswith(longer):
            return [name for name in forward[at : at + SHOWN] if name.startswith(longer)]
        shorter = wanted.rpartition(b"-")[0]
        return [shorter] if len(shorter) > 1 and shorter in self._names else []

    def _among_many(self, wanted: bytes, at: int) -> list[bytes]:
        """Return the nearest of those beside place `at` in the alphabet, or beside the place
        where the name read from its end stands."""
        forward, backward = self._forward, self._backward
        mirrored = wanted[::-1]
        back = bisect_left(backward, mirrored)
        # A name that differs in one place has half of the rest in common at one end at least;
        # and if any name has, so has one of the two that the wanted one stands between.
        half = (len(wanted) - 1) // 2
        if not (
            _one_begins(forward, at, wanted[:half]) or _one_begins(backward, back, mirrored[:half])
        ):
            return []
        names = set(forward[max(at - WINDOW, 0) : at + WINDOW])
        names.update([name[::-1] for name in backward[max(back - WINDOW, 0) : back + WINDOW]])
        # A letter too many is found wherever it is.
        less = [wanted[:i] + wanted[i + 1 :] for i in range(len(wanted))]
        names.update([name for name in less if name in self._names])
        return _within_reach(wanted, names)

    def _sort(self) -> None:
        if not self._sorted:
            self._forward = sorted(self._names)
            self._backward = sorted([name[::-1] for name in self._forward])
            self._sorted = True
            return
        for name in self._changed:
            for entries, entry in ((self._forward, name), (self._backward, name[::-1])):
                at = bisect_left(entries, entry)
                there = at < len(entries) and entries[at] == entry
                if name in self._names:
                    if not there:
                        entries.insert(at, entry)
                elif there:
                    del entries[at]
        self._changed.clear()


def _one_begins(entries: list[bytes], at: int, start: bytes) -> bool:
    """True if the entry before place `at` or the one there begins with `start`."""
    return (at > 0 and entries[at - 1].startswith(start)) or (
        at < len(entries) and entries[at].startswith(start)
    )


def _common(a: bytes, b: bytes) -> int:
    """Return how many octets both begin with."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


def _within_reach(wanted: bytes, names: Iterable[bytes]) -> list[bytes]:
    """Return the first three of those that are one step away; if there are none, and the name
    is not short, of those that are two."""
    size = len(wanted)
    # Octets of one that the other has not cost a step each.
    near = [
        name
        for name in names
        if -2 <= len(name) - size <= 2 and len(wanted.translate(None, name)) < 3
    ]
    found = [name for name in near if _is_one_step(wanted, name)]
    if not found and size > 4:
        found = [name for name in near if distance(wanted, name, 2) == 2]
    found.sort()
    return found[:SHOWN]


def _is_one_step(a: bytes, b: bytes) -> bool:
    n = _common(a, b)
    longer = len(a) - len(b)
    if longer == 0:
        return a[n + 1 :] == b[n + 1 :] or (
            a[n + 2 :] == b[n + 2 :] and a[n : n + 2] == b[n : n + 2][::-1]
        )
    if longer == 1:
        return a[n + 1 :] == b[n:]
    return longer == -1 and a[n:] == b[n + 1 :]


def distance(a: bytes, b: bytes, bound: int) -> int:
    """Return how many steps make `b` of `a`; bound + 1 if they are more than `bound`. An octet
    that was moved in a swap is not changed once more."""
    if a == b:
        return 0
    if bound == 0 or abs(len(a) - len(b)) > bound:
        return bound + 1
    if bound == 1:
        return 1 if _is_one_step(a, b) else 2
    n = _common(a, b)
    a, b = a[n:], b[n:]
    rest = bound - 1
    steps = min(distance(a[1:], b[1:], rest), distance(a[1:], b, rest), distance(a, b[1:], rest))
    if a[:2] == b[1::-1] and len(b) > 1:
        steps = min(steps, distance(a[2:], b[2:], rest))
    return 1 + min(steps, bound)
