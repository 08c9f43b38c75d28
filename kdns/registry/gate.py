"""Programmed before published: how much of the registry DNS may show.

Decides what DNS shows of a Service while the kernel's rules for it are being written: what the
newest version has and what every version has that the kernel may hold until then. So names,
ports and endpoint addresses leave at once and come when they are programmed. What needs no rule
(Namespaces, Pods, headless and ExternalName Services) passes at once. No clock, no task: who
writes rules, and when, is told; pipeline.py does what is done about it.

A kernel side that fails holds nothing up for longer than `timeout`: then its family is open,
and everything is shown at once until a sync succeeds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import msgspec

from kdns.metrics import Metrics
from kdns.registry.endpoints import canonical_address, forwarded_address, is_published
from kdns.registry.objects import (
    EndpointSlice,
    Key,
    Service,
    ServicePort,
    SliceEndpoint,
    SlicePort,
)
from kdns.registry.snapshot import Changes, Snapshot, everything
from kdns.registry.store import Shelf

Family: TypeAlias = Literal[4, 6]
State: TypeAlias = Literal["", "waiting", "open"]
# What the kernel side answers: by family, the Services whose rules are others now.
KernelChanges: TypeAlias = Mapping[Family, Collection[Key]]
Shown: TypeAlias = tuple[Snapshot, Changes]

DEFAULT_TIMEOUT: Final = 2.0
MOST_TOLD: Final = 100  # Services named in status(), of each sort
BUCKETS: Final = tuple(0.001 * 2**n for n in range(14))  # seconds
_FAMILY_OF: Final[Mapping[str, Family]] = {"IPv4": 4, "IPv6": 6}

# One endpoint with one port: address, port's name, protocol, number. A slice without ports has
# _NO_PORT.
_Place: TypeAlias = tuple[str, str, str, "int | None"]
_NO_PORT: Final = SlicePort()


class Version(NamedTuple):
    """A Service as it stood at one revision."""

    service: Service | None
    slices: tuple[EndpointSlice, ...]


ABSENT: Final = Version(None, ())


class _Step(NamedTuple):
    revision: int
    version: Version
    at: float
    places: frozenset[_Place]


class _Line:
    """The versions of one Service that one family of the kernel may hold: the first is what it
    holds, the others are on their way.

    common -- endpoints that all of them have
    """

    __slots__ = ("common", "family", "steps")

    def __init__(self, family: Family, held: Version, revision: int, now: float) -> None:
        self.family = family
        self.steps: list[_Step] = []
        self.common: frozenset[_Place] = frozenset()
        self.add(held, revision, now)

    def add(self, version: Version, revision: int, now: float) -> None:
        places = frozenset(_places(version.slices, self.family))
        self.common = self.common & places if self.steps else places
        self.steps.append(_Step(revision, version, now, places))

    def take(self, revision: int) -> bool:
        """The kernel holds this revision; return whether that is the newest version."""
        first = max((i for i, s in enumerate(self.steps) if s.revision <= revision), default=0)
        if first:
            del self.steps[:first]
            self.common = frozenset.intersection(*[step.places for step in self.steps])
        return len(self.steps) == 1

    @property
    def missing(self) -> _Step:
        """The oldest version that the kernel does not hold."""
        return self.steps[1]

    @property
    def held(self) -> Service | None:
        return self.steps[0].version.service

    @property
    def services(self) -> Iterator[Service | None]:
        return (step.version.service for step in self.steps)

    @property
    def forwards(self) -> bool:
        """There are rules for the Service, whichever of the versions the kernel comes to."""
        return all(one is not None and forwarded_address(one, self.family) for one in self.services)


class Opened(NamedTuple):
    """What was not waited for any longer.

    families -- that failed to be written
    services -- shown now though their rules are not in the kernel
    alone    -- there is no kernel side yet
    """

    families: tuple[Family, ...]
    services: tuple[Key, ...]
    alone: bool
    shown: Shown


class Gate:
    """One registry's gate.

    timeout -- seconds that rules are waited for
    awaits  -- a kernel side will come: nothing is shown before it has written its first rules,
               or `timeout` after the registry was listed
    snapshot -- what DNS shows
    """

    def __init__(
        self,
        timeout: float = DEFAULT_TIMEOUT,
        metrics: Metrics | None = None,
        awaits: bool = False,
    ) -> None:
        self.timeout = timeout
        self.snapshot = Snapshot()
        self._registry = Snapshot()
        self._awaits = awaits
        self._held_since: float | None = None
        self._first: set[Family] = set()  # families whose first sync is still to come
        self._families: set[Family] = set()
        self._lines: dict[Key, dict[Family, _Line]] = {}
        self._hidden: dict[Key, float] = {}  # shown otherwise than the registry has it, since
        self._new: dict[Key, float] = {}  # never shown, and without slices when it came
        self._ahead: dict[Key, dict[Family, int]] = {}  # shown, and not programmed
        self._open: set[Family] = set()
        metrics = metrics or Metrics()
        self._opened = metrics.counter(
            "kdns_gate_opened_total",
            "Services shown by DNS though their rules were not in the kernel in time.",
        ).labels()
        self._waited = metrics.histogram(
            "kdns_gate_wait_seconds",
            "Seconds that DNS waited with a change for the kernel's rules.",
            (),
            BUCKETS,
        ).labels()

    # --- what happens -------------------------------------------------------------------
    # now -- monotonic seconds; unix -- Unix ones. What is returned is what DNS shows from then
    # on, and what that changes; None: nothing.

    def publish(
        self, snapshot: Snapshot, changes: Changes, kernel: KernelChanges, now: float, unix: int
    ) -> Shown | None:
        """Take a new revision, and which rules change with it."""
        before, self._registry = self._registry, snapshot
        self._note(before, changes.services, kernel, now)
        if not self._awaits:
            self._meet(changes.services, now)
            return self._show(changes, changes.services, now, None)
        if snapshot.synced and self._held_since is None:
            self._held_since = now
        return None

    def attach(self, kernel: KernelChanges, now: float) -> None:
        """A kernel side has come, to whom all rules of `kernel` are new. What DNS shows it goes
        on to show."""
        self._note(self._registry, (), kernel, now)

    def detach(self, now: float, unix: int) -> Shown | None:
        """There is no kernel side any more: everything is shown."""
        touched = self._hidden.keys() | self._ahead.keys()
        self._lines.clear()
        self._new.clear()
        self._ahead.clear()
        self._open.clear()
        self._families.clear()
        self._first.clear()
        if self._awaits:
            return self._release(now, unix)
        return self._show(Changes(), touched, now, unix) if touched else None

    def programmed(self, family: Family, revision: int, now: float, unix: int) -> Shown | None:
        """The kernel holds this revision's rules of a family."""
        self._open.discard(family)
        self._first.discard(family)
        touched = [k for k, of in self._ahead.items() if of.get(family, revision + 1) <= revision]
        for key in touched:
            _drop(self._ahead, key, family)
        for key, line in self._lines_of(family):
            if line.missing.revision <= revision:
                touched.append(key)
                if line.take(revision):
                    _drop(self._lines, key, family)
        if self._awaits:
            return None if self._first else self._release(now, unix)
        if not touched:
            return None
        since = {key: self._hidden[key] for key in touched if key in self._hidden}
        shown = self._show(Changes(), touched, now, unix)
        for key, began in since.items():
            if key not in self._hidden:
                self._waited.add(max(0.0, now - began))
        return shown

    def deadline(self) -> float | None:
        """Return when expire() is due, in monotonic seconds; None: nothing is waited for."""
        times = [line.missing.at for of in self._lines.values() for line in of.values()]
        times += self._new.values()
        if self._awaits and self._held_since is not None:
            times.append(self._held_since)
        return min(times) + self.timeout if times else None

    def expire(self, now: float, unix: int) -> Opened | None:
        """Show what was waited for long enough, and of a family that failed everything."""
        due = self.deadline()
        if due is None or due > now:
            return None
        late = {
            line.family
            for of in self._lines.values()
            for line in of.values()
            # At the start all waits for one bound: DNS opens, and is to know every name then.
            if self._awaits or line.missing.at + self.timeout <= now
        }
        hidden = set(self._hidden)
        touched = {key for key, since in self._new.items() if since + self.timeout <= now}
        for key in touched:
            del self._new[key]
        for family in late:
            self._open.add(family)
            for key, line in self._lines_of(family):
                _drop(self._lines, key, family)
                self._ahead.setdefault(key, {})[family] = line.steps[-1].revision
                touched.add(key)
        alone = self._awaits and not self._families
        if self._awaits:
            shown = self._release(now, unix)
        else:
            shown = self._show(Changes(), touched, now, unix)
        opened = sorted(
            key for key in (hidden or touched) - self._hidden.keys() if key in self._ahead
        )
        self._opened.add(len(opened))
        return Opened(tuple(sorted(late)), tuple(opened), alone, shown)

    # --- what is known of the kernel ------------------------------------------------------

    def _note(
        self, before: Snapshot, changed: Collection[Key], kernel: KernelChanges, now: float
    ) -> None:
        """Remember which rules are on their way."""
        for family, keys in kernel.items():
            first = family not in self._families
            if first:
                self._families.add(family)
                self._first.add(family)
            for key in keys:
                if family in self._open or (first and not self._awaits):
                    self._run_ahead(key, family)
                elif first or key in changed:
                    held = ABSENT if first else _version(before, key)
                    self._add(key, family, held, before.revision, now)

    def _meet(self, changed: Collection[Key], now: float) -> None:
        """Remember Services that have just come, and whose endpoints are about to: who writes
        slices writes one for each Service with a selector, if with nothing in it. Until then
        the rules would refuse everybody."""
        if not self._families or self._open:
            return
        for key in changed:
            service, slices = _version(self._registry, key)
            if service is None:
                self._new.pop(key, None)
            elif (
                not slices
                and service.spec.selector
                and _is_forwarded(service)
                and _version(self.snapshot, key).service is None
            ):
                self._new.setdefault(key, now)

    def _add(self, key: Key, family: Family, held: Version, revision: int, now: float) -> None:
        lines = self._lines.setdefault(key, {})
        line = lines.get(family)
        if line is None:
            line = lines[family] = _Line(family, held, revision, now)
        line.add(_version(self._registry, key), self._registry.revision, now)

    def _run_ahead(self, key: Key, family: Family) -> None:
        if family in self._open and key not in self._ahead:
            self._opened.add()
        self._ahead.setdefault(key, {})[family] = self._registry.revision

    def _lines_of(self, family: Family) -> list[tuple[Key, _Line]]:
        return [(key, of[family]) for key, of in self._lines.items() if family in of]

    # --- what DNS shows -------------------------------------------------------------------

    def _release(self, now: float, unix: int) -> Shown:
        """Show what was held back since the start."""
        self._awaits = False
        self._held_since = None
        # As if all of it had been shown but for what waits.
        self.snapshot = self._registry
        shown, _ = self._show(Changes(), [*self._lines], now, unix)
        return shown, everything(self._registry)

    def _show(
        self, changes: Changes, touched: Iterable[Key], now: float, unix: int | None
    ) -> Shown:
        """Bring what DNS shows up to date; `touched` are the Services that may be shown
        otherwise now. unix -- None: the registry has changed, and says when."""
        registry, before = self._registry, self.snapshot
        shown: dict[Key, Version] = {}
        for key in touched:
            newest = _version(registry, key)
            one = shown[key] = self._shown_of(key, newest)
            if one is newest:
                self._hidden.pop(key, None)
            else:
                self._hidden.setdefault(key, now)
        moved = any(_version(before, key) != one for key, one in shown.items())
        self.snapshot = replace(
            registry,
            services=self._overlaid(before.services, registry.services, shown, 0),
            slices=self._overlaid(before.slices, registry.slices, shown, 1),
            changed_at=self._changed_at(moved, changes, unix),
        )
        if not self._hidden and self.snapshot.changed_at == registry.changed_at:
            self.snapshot = registry
        return self.snapshot, replace(changes, services=frozenset(shown))

    def _shown_of(self, key: Key, newest: Version) -> Version:
        """Return what is to be shown of a Service."""
        lines = self._lines.get(key, {})
        if key in self._new:
            if not newest.slices or any(not one.steps[0].version.slices for one in lines.values()):
                return ABSENT
            del self._new[key]
        return interim(newest, lines, self._families - self._open)

    def _overlaid(self, before: Any, registry: Any, shown: Mapping[Key, Version], part: int) -> Any:
        """Return services or slices as DNS shows them. What is hidden costs; the rest is shared
        with the snapshot before, or with the registry's."""
        if not self._hidden:
            return registry
        shelf: Shelf[Any] = Shelf.over(before)
        for key, version in shown.items():
            if version[part]:
                shelf.put(key, version[part])
            else:
                shelf.remove(key)
        return shelf.publish()

    def _changed_at(self, moved: bool, changes: Changes, unix: int | None) -> int:
        """Return when what is shown changed: it may be later than the registry did."""
        before, registry = self.snapshot.changed_at, self._registry.changed_at
        if unix is not None:
            return max(before, registry, unix) if moved else before
        # A change that is hidden whole is none for DNS.
        others = bool(changes.pods or changes.synced or not self._hidden)
        return max(before, registry) if moved or others else before

    # --- what is told -----------------------------------------------------------------------

    def state(self, key: Key) -> State:
        """Return what is to be said of a Service: "waiting", it is not shown as the registry has
        it until its rules are written; "open", it is, and its rules are not in the kernel."""
        return "waiting" if key in self._hidden else "open" if key in self._ahead else ""

    def waiting(self) -> int:
        """Return how many Services DNS does not show yet as the registry has them."""
        return len(self._hidden)

    def held(self) -> frozenset[Key]:
        """Return those of whom state() has something to say."""
        return frozenset(self._hidden.keys() | self._ahead.keys())

    @property
    def is_open(self) -> bool:
        return bool(self._open)

    def quiet(self) -> bool:
        """True if nothing is waited for: DNS shows the registry."""
        return not (self._hidden or self._awaits)

    def waits(self) -> bool:
        """True if expire() may have something to do, some time."""
        return bool(self._lines or self._new) or (self._awaits and self._held_since is not None)

    def shown_revision(self) -> int:
        """Return the newest revision of which DNS shows everything."""
        if self._awaits:
            return self.snapshot.revision
        missing = [
            line.missing.revision - 1
            for key in self._hidden
            for line in self._lines.get(key, {}).values()
        ]
        return min(missing, default=self._registry.revision)

    def kernel_revisions(self) -> dict[Family, int]:
        """Return, by family, the newest revision of which the kernel has all rules."""
        found: dict[Family, int] = dict.fromkeys(sorted(self._families), self._registry.revision)
        for of in self._lines.values():
            for family, line in of.items():
                found[family] = min(found[family], line.missing.revision - 1)
        for held in self._ahead.values():
            for family, revision in held.items():
                found[family] = min(found[family], revision - 1)
        return found

    def status(self, now: float) -> dict[str, Any]:
        """Return what /v1/status tells of it."""
        return {
            "timeout": self.timeout,
            "open": self.is_open,
            "waiting": [
                {
                    "service": "/".join(key),
                    "revision": self._waits_for(key),
                    "seconds": round(max(0.0, now - since), 3),
                }
                for key, since in list(self._hidden.items())[:MOST_TOLD]
            ],
            "published_unprogrammed": ["/".join(key) for key in sorted(self._ahead)[:MOST_TOLD]],
        }

    def _waits_for(self, key: Key) -> int:
        lines = self._lines.get(key, {}).values()
        return max((line.steps[-1].revision for line in lines), default=self._registry.revision)


# --- one Service ----------------------------------------------------------------------------


def interim(
    newest: Version, lines: Mapping[Family, _Line], families: Collection[Family]
) -> Version:
    """Return what may be shown of a Service while rules are on their way; `newest` itself where
    that is all of it.

    families -- those that the kernel side writes rules for, without fail
    """
    if not lines or newest.service is None or not _is_forwarded(newest.service):
        return newest  # what goes, goes at once; what needs no rules waits for none
    service = _shown_service(newest.service, lines, families)
    if service is None:
        # Before, it was a Service without rules: that one goes on until then.
        base = next((line.held for line in lines.values() if None not in line.services), None)
        if base is None or _is_forwarded(base):
            return ABSENT
        service = base
    slices = _shown_slices(newest.slices, lines)
    same = service is newest.service and slices is newest.slices
    return newest if same else Version(service, slices)


def _shown_service(
    newest: Service, lines: Mapping[Family, _Line], families: Collection[Family]
) -> Service | None:
    """Return the Service with the addresses and ports that the kernel knows; None: with no
    address."""
    spec = newest.spec
    addresses: list[str] = []
    programmed = hidden = False
    for ip in spec.cluster_ips or [spec.cluster_ip]:
        found = canonical_address(ip)
        family = None if found is None else found[0]
        line = lines.get(family) if family is not None else None  # type: ignore[call-overload]
        if line is None:
            addresses.append(ip)
            programmed |= family in families
        elif line.forwards:
            # Another address than before: that one is forwarded until the new one is.
            addresses.append(forwarded_address(line.held, line.family))
            programmed = True
        else:
            hidden = True
    if hidden and not programmed:
        return None
    ports = _shown_ports(spec.ports or [], [line for line in lines.values() if line.forwards])
    shown = [canonical_address(ip) for ip in addresses]
    if not hidden and shown == [
        canonical_address(ip) for ip in spec.cluster_ips or [spec.cluster_ip]
    ]:
        addresses = spec.cluster_ips or [spec.cluster_ip]
        if ports == (spec.ports or []):
            return newest
    changed = msgspec.structs.replace(
        spec, cluster_ip=addresses[0], cluster_ips=addresses, ports=ports
    )
    return msgspec.structs.replace(newest, spec=changed)


def _shown_ports(ports: Sequence[ServicePort], lines: Sequence[_Line]) -> list[ServicePort]:
    shown = []
    for port in ports:
        kept: ServicePort | None = port
        for line in lines:
            twins = [_port_like(port, one) for one in line.services]
            if None in twins:
                kept = None
                break
            if twins[0] is not None and twins[0].port != port.port:
                kept = twins[0]  # another number: as with addresses
        if kept is not None:
            shown.append(kept)
    return shown


def _port_like(port: ServicePort, service: Service | None) -> ServicePort | None:
    if service is None:
        return None
    same = [
        p for p in service.spec.ports or () if (p.name, p.protocol) == (port.name, port.protocol)
    ]
    return same[-1] if same else None


def _shown_slices(
    slices: tuple[EndpointSlice, ...], lines: Mapping[Family, _Line]
) -> tuple[EndpointSlice, ...]:
    """Return the slices without the endpoints that the kernel does not know, or only for a
    while."""
    shown: list[EndpointSlice] = []
    for one in slices:
        family = _FAMILY_OF.get(one.address_type)
        line = lines.get(family) if family is not None else None
        if line is None or line.common.issuperset(_places((one,), line.family)):
            shown.append(one)
        else:
            shown += _masked(one, line.common)
    return slices if len(shown) == len(slices) and all(map(_is, shown, slices)) else tuple(shown)


def _masked(one: EndpointSlice, known: frozenset[_Place]) -> Iterator[EndpointSlice]:
    """Yield a slice's endpoints with the ports that are known of them, each set of ports in a
    slice of its own."""
    every = tuple(one.ports or (_NO_PORT,))
    parts: dict[tuple[SlicePort, ...], list[SliceEndpoint]] = {}
    for endpoint in one.endpoints or ():
        for address in endpoint.addresses:
            ports = tuple(p for p in every if _place(address, p) in known)
            if ports:
                alone = msgspec.structs.replace(endpoint, addresses=[address])
                parts.setdefault(ports, []).append(alone)
    for ports, endpoints in parts.items():
        yield msgspec.structs.replace(
            one, endpoints=endpoints, ports=list(ports) if one.ports else one.ports
        )


def _places(slices: Iterable[EndpointSlice], family: Family) -> Iterator[_Place]:
    """Yield the endpoints that DNS shows; text that is no address may be among them."""
    for one in slices:
        if _FAMILY_OF.get(one.address_type) != family:
            continue
        ports = one.ports or (_NO_PORT,)
        for endpoint in one.endpoints or ():
            if is_published(endpoint):
                for address in endpoint.addresses:
                    for port in ports:
                        yield _place(address, port)


def _place(address: str, port: SlicePort) -> _Place:
    return address, port.name or "", port.protocol or "TCP", port.port


def _is_forwarded(service: Service) -> bool:
    return bool(forwarded_address(service, 4) or forwarded_address(service, 6))


def _is(a: object, b: object) -> bool:
    return a is b


def _version(snapshot: Snapshot, key: Key) -> Version:
    namespace, name = key
    return Version(
        snapshot.services.get(namespace, {}).get(name),
        snapshot.slices.get(namespace, {}).get(name, ()),
    )


def _drop(table: dict[Key, dict[Family, Any]], key: Key, family: Family) -> None:
    """Remove an entry, and its key with the last one."""
    del table[key][family]
    if not table[key]:
        del table[key]
