"""Rules that outlive their name: forwarding for clients that still remember an address.

A name leaves DNS at once; whoever looked it up a moment ago connects a moment later. So what
the registry has no more (a Service that was deleted, a port, a ClusterIP that was changed) is
forwarded as it last was, until nobody needs it. Decides what is kept, for how long, and what
ends it before its time; kube-proxy keeps nothing, and neither does `kdns proxy` by itself. No
clock, no kernel: times, and which destinations connections use, are arguments.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal, TypeAlias

from kdns.proxy.options import NodeView, Protocol
from kdns.proxy.table import Forwarding, ForwardingTable, compile_service
from kdns.registry.objects import EndpointSlice, Key, Service
from kdns.registry.snapshot import Snapshot

# ttl: for as long as somebody may remember the name. conntrack: until no connection uses them.
Policy: TypeAlias = Literal["ttl", "conntrack", "none"]
# Address ("" for a NodePort: any), port, protocol.
Place: TypeAlias = tuple[str, int, Protocol]

LOOK: Final = 1.0  # seconds between two looks at connections, and before the first
LONGEST: Final = 3600.0  # seconds that connections may keep anything


@dataclass(slots=True)
class _Drained:
    """What is kept of one Service port.

    forwarding -- as it is now; service, slices -- what it is made of
    claimed    -- destinations that others have taken over
    """

    forwarding: Forwarding
    service: Service
    slices: dict[str, EndpointSlice]
    since: float
    until: float
    claimed: set[Place] = field(default_factory=set)

    @property
    def place(self) -> Place:
        return _place(self.forwarding)


class Drain:
    """The table of one family with what is kept beside what lives.

    table -- for the kernel
    """

    def __init__(self, table: ForwardingTable, node: NodeView, policy: Policy = "none") -> None:
        self.table = table
        self.policy = policy
        self._node = node
        self._live = table
        self._kept: dict[Key, list[_Drained]] = {}

    def update(
        self,
        live: ForwardingTable,
        changed: Collection[Key],
        touched: Collection[Key],
        before: Snapshot,
        after: Snapshot,
        node: NodeView,
        now: float,
        seconds: float,
    ) -> Collection[Key]:
        """Take over what lives now; return the Services whose forwarding is now another.

        changed -- Services that differ in `live`; touched -- those whose objects do
        before, after -- the registry then and now; seconds -- policy ttl's
        """
        old, self._live = self._live, live
        affected = set(changed)
        if self.policy != "none":
            until = now + (LONGEST if self.policy == "conntrack" else max(0.0, seconds))
            for key in changed:
                self._keep(key, old.services.get(key, ()), before, now, until)
        moved, self._node = node != self._node, node
        for key in [key for key in self._kept if moved or key in touched]:
            self._recompile(key, after)
            affected.add(key)
        affected |= self._yield(changed)
        return self._assemble(affected)

    def expire(self, now: float, used: Collection[Place] | None = None) -> Collection[Key]:
        """End what is over; return the Services whose forwarding is now another.

        used -- destinations of connections, of those in places(); None: not looked at
        """
        affected = set()
        for key, kept in list(self._kept.items()):
            left = [one for one in kept if not _is_over(one, now, used)]
            if len(left) < len(kept):
                affected.add(key)
                self._set(key, left)
        return self._assemble(affected)

    def fall_back(self, until: float) -> None:
        """Connections cannot be looked at: keep by time from now on, and what is kept until
        then."""
        self.policy = "ttl"
        for kept in self._kept.values():
            for one in kept:
                one.until = min(one.until, until)

    def deadline(self) -> float | None:
        """Return when expire() is due; None: nothing is kept. Policy conntrack: when connections
        are to be looked at first; then each LOOK."""
        times = [one.until for kept in self._kept.values() for one in kept]
        if self.policy == "conntrack":
            times = [one.since + LOOK for kept in self._kept.values() for one in kept]
        return min(times, default=None)

    def places(self) -> frozenset[Place]:
        """Return the destinations that are kept."""
        return frozenset(
            place for kept in self._kept.values() for one in kept for place in _places(one)
        )

    def told(self, now: float) -> dict[Key, float | None]:
        """Return the seconds for which something of a Service is kept; None: until connections
        need it no more."""
        return {
            key: None
            if self.policy == "conntrack"
            else max(0.0, max(one.until for one in kept) - now)
            for key, kept in self._kept.items()
        }

    # --- what is kept -----------------------------------------------------------------------

    def _keep(
        self, key: Key, old: Iterable[Forwarding], before: Snapshot, now: float, until: float
    ) -> None:
        """Keep what a Service had and has no more."""
        namespace, name = key
        service = before.services.get(namespace, {}).get(name)
        live = {_place(one) for one in self._live.services.get(key, ())}
        gone = [one for one in old if one.has_endpoints and _place(one) not in live]
        if service is None or not gone or until <= now:
            return
        slices = {one.metadata.name: one for one in before.slices.get(namespace, {}).get(name, ())}
        for one in gone:
            # Nobody is to send clients here any more.
            one = replace(one, health_check_node_port=0)
            drained = _Drained(one, service, slices, now, until)
            if one.external_ips or one.load_balancer_ips:
                # Unlike other destinations, they may be somebody else's all along.
                every = (port for ports in self._live.services.values() for port in ports)
                drained.claimed |= {place for port in every for place in _frontends(port)}
            self._kept.setdefault(key, []).append(drained)

    def _recompile(self, key: Key, after: Snapshot) -> None:
        """Have what is kept follow its endpoints: those that slices name no more leave; slices
        that went with their Service stay as they were."""
        namespace, name = key
        alive = name in after.services.get(namespace, {})
        now = {one.metadata.name: one for one in after.slices.get(namespace, {}).get(name, ())}
        left = []
        for one in self._kept[key]:
            known = {name: each for name, each in now.items() if alive or name in one.slices}
            one.slices = {**one.slices, **known}
            made, _ = compile_service(
                one.service, one.slices.values(), self._live.family, self._node
            )
            same = [port for port in made if _place(port) == one.place]
            if same and same[0].has_endpoints:
                one.forwarding = replace(same[0], health_check_node_port=0)
                left.append(one)
        self._set(key, left)

    def _yield(self, changed: Collection[Key]) -> set[Key]:
        """Give up what live Services claim; return whose it was."""
        if not self._kept:
            return set()
        claims = {
            place
            for key in changed
            for one in self._live.services.get(key, ())
            for place in _frontends(one)
        }
        affected = set()
        for key, kept in list(self._kept.items()):
            for one in kept:
                if claims.intersection(_places(one)):
                    one.claimed |= claims
                    affected.add(key)
            self._set(key, [one for one in kept if one.place not in one.claimed])
        return affected

    def _set(self, key: Key, kept: list[_Drained]) -> None:
        if kept:
            self._kept[key] = kept
        else:
            del self._kept[key]

    # --- the table --------------------------------------------------------------------------

    def _assemble(self, affected: Iterable[Key]) -> Collection[Key]:
        before, live = self.table, self._live
        services: Mapping[Key, tuple[Forwarding, ...]] = live.services
        if self._kept:
            services = {**services, **{key: self._ports(key) for key in self._kept}}
        self.table = replace(live, services=services) if self._kept else live
        return tuple(
            key for key in affected if services.get(key, ()) != before.services.get(key, ())
        )

    def _ports(self, key: Key) -> tuple[Forwarding, ...]:
        ports = {(one.name, one.protocol): one for one in self._live.services.get(key, ())}
        for one in self._kept[key]:
            kept = _without(one.forwarding, one.claimed)
            if (kept.name, kept.protocol) in ports:
                # Chains have their names from it: the live one's are its own.
                kept = replace(kept, name=_renamed(kept))
            ports[kept.name, kept.protocol] = kept
        return tuple([ports[order] for order in sorted(ports)])


def _is_over(one: _Drained, now: float, used: Collection[Place] | None) -> bool:
    if one.until <= now:
        return True
    return used is not None and one.since + LOOK <= now and not any(p in used for p in _places(one))


def _place(one: Forwarding) -> Place:
    return one.cluster_ip, one.port, one.protocol


def _frontends(one: Forwarding) -> Iterator[Place]:
    return ((place.address, place.port, one.protocol) for place in one.frontends)


def _places(one: _Drained) -> Iterator[Place]:
    return (place for place in _frontends(one.forwarding) if place not in one.claimed)


def _without(one: Forwarding, claimed: Collection[Place]) -> Forwarding:
    """Return it without the destinations that others have."""
    if not claimed:
        return one

    def free(ips: tuple[str, ...]) -> tuple[str, ...]:
        return tuple([ip for ip in ips if (ip, one.port, one.protocol) not in claimed])

    taken = ("", one.node_port, one.protocol) in claimed
    return replace(
        one,
        node_port=0 if taken else one.node_port,
        external_ips=free(one.external_ips),
        load_balancer_ips=free(one.load_balancer_ips),
    )


def _renamed(one: Forwarding) -> str:
    """Return a name that no live port has, in the letters that names are made of."""
    address = one.cluster_ip.replace(".", "-").replace(":", "-")
    return f"{one.name}{'-' if ':' in one.name else ':'}draining-{address}-{one.port}"
