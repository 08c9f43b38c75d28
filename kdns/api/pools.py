"""Numbers, ports and addresses that can be taken and given back.

Decides how a free one is found, and how much is remembered of a range: as much as is taken of
it. Who takes what, and for which object, is allocate.py's.
Reference: KEP-3070 and KEP-3668 (bands), upstream's ipallocator and portallocator.
"""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final, TypeAlias

Network: TypeAlias = IPv4Network | IPv6Network
Address: TypeAlias = IPv4Address | IPv6Address

FAMILIES: Final = {4: "IPv4", 6: "IPv6"}
# Bands for what is asked for by number: (least, part of the range, most).
ADDRESS_BAND: Final = (16, 16, 256)
PORT_BAND: Final = (16, 32, 128)
# Swaps remembered by a pool beyond those that its taken numbers need, before it is tidied.
SLACK = 1024


def parse_address(text: str) -> Address | None:
    """Return an address; None for text that is none."""
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def family_of(text: str) -> str:
    """Return the family of an address written as text."""
    return "IPv6" if ":" in text else "IPv4"


class Pool:
    """Numbers 0 to size-1, any of which is taken at random in constant time, also from the last.

    A shuffled row of all numbers of which only the places that differ from the unshuffled row
    are kept: taken numbers stand in front, so memory goes with what is taken, not with the range.
    """

    __slots__ = ("_at", "_place", "size", "taken")

    def __init__(self, size: int) -> None:
        self.size = size
        self.taken = 0
        self._at: dict[int, int] = {}  # place -> number, where they differ
        self._place: dict[int, int] = {}  # number -> place, where they differ

    def __contains__(self, number: int) -> bool:
        return 0 <= number < self.size and self._place.get(number, number) < self.taken

    def take_any(self, rng: random.Random) -> int | None:
        """Take a free number; None if there is none."""
        if self.taken == self.size:
            return None
        place = self.taken + int(rng.random() * (self.size - self.taken))
        number = self._at.get(place, place)
        self._swap(place, self.taken)
        self.taken += 1
        return number

    def take(self, number: int) -> bool:
        """Take this number; False if it is taken."""
        place = self._place.get(number, number)
        if place < self.taken:
            return False
        self._swap(place, self.taken)
        self.taken += 1
        return True

    def give_back(self, number: int) -> None:
        """Make a number free; nothing happens if it is."""
        if number not in self:
            return
        self.taken -= 1
        self._swap(self._place.get(number, number), self.taken)
        if len(self._at) > 4 * self.taken + SLACK:
            self._tidy()

    def _swap(self, one: int, other: int) -> None:
        if one == other:
            return
        here, there = self._at.get(one, one), self._at.get(other, other)
        self._put(one, there)
        self._put(other, here)

    def _put(self, place: int, number: int) -> None:
        if place == number:
            self._at.pop(place, None)
            self._place.pop(number, None)
        else:
            self._at[place] = number
            self._place[number] = place

    def _tidy(self) -> None:
        """Forget the order of the free numbers."""
        held = [self._at.get(place, place) for place in range(self.taken)]
        self._at.clear()
        self._place.clear()
        self.taken = 0
        for number in held:
            self.take(number)


class Banded:
    """Consecutive numbers from `first`, of which the lower band is for those asked for by number:
    others are taken from the rest until that is full."""

    __slots__ = ("_lower", "_split", "_upper", "first", "last")

    def __init__(self, first: int, size: int, band: int) -> None:
        self.first, self.last = first, first + size - 1
        self._split = first + min(band, size)
        self._lower = Pool(self._split - first)
        self._upper = Pool(size - self._lower.size)

    @property
    def taken(self) -> int:
        return self._lower.taken + self._upper.taken

    def __contains__(self, number: int) -> bool:
        pool, start = self._pool_of(number)
        return number - start in pool

    def covers(self, number: int) -> bool:
        return self.first <= number <= self.last

    def take_any(self, rng: random.Random) -> int | None:
        for pool, start in ((self._upper, self._split), (self._lower, self.first)):
            found = pool.take_any(rng)
            if found is not None:
                return start + found
        return None

    def take(self, number: int) -> bool:
        """Take a number that the range covers; False if it is taken."""
        pool, start = self._pool_of(number)
        return pool.take(number - start)

    def give_back(self, number: int) -> None:
        if self.covers(number):
            pool, start = self._pool_of(number)
            pool.give_back(number - start)

    def _pool_of(self, number: int) -> tuple[Pool, int]:
        if number < self._split:
            return self._lower, self.first
        return self._upper, self._split


def band_of(size: int, rule: tuple[int, int, int]) -> int:
    """Return how many numbers of a range are kept for those asked for by number."""
    least, part, most = rule
    return 0 if size <= least else min(max(least, size // part), most)


class Addresses:
    """The addresses of one range that may be given out: the first (the network's own) and IPv4's
    last (broadcast) are not."""

    __slots__ = ("_numbers", "_version", "family", "network")

    def __init__(self, network: Network, *, banded: bool = False) -> None:
        self.network = network
        self.family = FAMILIES[network.version]
        self._version = IPv4Address if network.version == 4 else IPv6Address
        size = network.num_addresses - (2 if network.version == 4 else 1)
        band = band_of(network.num_addresses, ADDRESS_BAND) if banded else 0
        self._numbers = Banded(int(network.network_address) + 1, size, band)

    def covers(self, address: Address) -> bool:
        return address.version == self.network.version and self._numbers.covers(int(address))

    def take(self, address: Address) -> bool:
        return self._numbers.take(int(address))

    def take_any(self, rng: random.Random) -> str | None:
        found = self._numbers.take_any(rng)
        return None if found is None else str(self._version(found))

    def give_back(self, address: Address) -> None:
        if self.covers(address):
            self._numbers.give_back(int(address))


class Ledger:
    """Addresses that are given to an object for as long as it lives: the same when asked again."""

    def __init__(self, ranges: Sequence[Addresses], rng: random.Random) -> None:
        self._ranges = ranges
        self._rng = rng
        self._held: dict[str, tuple[str, ...]] = {}

    def held(self, owner: str) -> tuple[str, ...]:
        return self._held.get(owner, ())

    def give(self, owner: str, families: Sequence[str], wanted: str = "") -> tuple[str, ...]:
        """Return an address of each family, as far as there is one left; `wanted` if it is free."""
        held = self._held.get(owner, ())
        out = []
        for family in families:
            found = next((a for a in held if family_of(a) == family), None)
            if found is None and wanted and family_of(wanted) == family and self._take(wanted):
                found = wanted
            out.append(found or self._take_any(family))
        given = tuple(filter(None, out))
        self._release(set(held).difference(given))
        self._keep(owner, given)
        return given

    def note(self, owner: str, addresses: Iterable[str]) -> None:
        """Remember addresses that an object has got from elsewhere."""
        held = self._held.get(owner, ())
        new = tuple(a for a in addresses if a not in held and self._take(a))
        self._keep(owner, (*held, *new))

    def release(self, owner: str) -> None:
        self._release(self._held.pop(owner, ()))

    def _keep(self, owner: str, addresses: tuple[str, ...]) -> None:
        if addresses:
            self._held[owner] = addresses

    def _take(self, text: str) -> bool:
        address = parse_address(text)
        if address is None:
            return False
        return any(r.covers(address) and r.take(address) for r in self._ranges)

    def _take_any(self, family: str) -> str | None:
        tried = (r.take_any(self._rng) for r in self._ranges if r.family == family)
        return next(filter(None, tried), None)

    def _release(self, addresses: Iterable[str]) -> None:
        for text in addresses:
            address = parse_address(text)
            for one in self._ranges if address is not None else ():
                one.give_back(address)  # type: ignore[arg-type]
