"""The gate by itself: what DNS shows while rules are on their way, step by step.

A step here is a revision of the registry, or the word of the kernel side that it holds one. What
is shown is read from the snapshot as DNS compiles it: addresses, ports and endpoints.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from objects import endpoint, external, service, slice_of

from kdns.metrics import Metrics
from kdns.proxy.drain import Drain, Policy
from kdns.proxy.options import Family, NodeView
from kdns.proxy.table import ForwardingTable, TableCompiler
from kdns.registry.endpoints import published
from kdns.registry.gate import Gate, Opened
from kdns.registry.objects import (
    ENDPOINT_SLICE,
    NAMESPACE,
    SERVICE,
    EndpointSlice,
    Key,
    Kind,
    Service,
    key_of,
)
from kdns.registry.snapshot import Changes, Snapshot, everything
from kdns.registry.store import Store
from kdns.zone.cluster import ClusterOptions, ClusterRecords

KINDS: tuple[Kind, ...] = (SERVICE, ENDPOINT_SLICE, NAMESPACE)
WEB: Key = ("default", "web")
NODE = NodeView("node1", "192.0.2.1")


class Kernel:
    """A kernel side without a kernel: a table a family, and what of it is written."""

    def __init__(self, policy: Policy = "none", families: Sequence[Family] = (4,)) -> None:
        self.compilers: dict[Family, TableCompiler] = {f: TableCompiler(f, NODE) for f in families}
        self.drains: dict[Family, Drain] = {
            f: Drain(c.table, NODE, policy) for f, c in self.compilers.items()
        }
        # As written, and as asked for.
        self.written: dict[Family, ForwardingTable] = {
            f: c.table for f, c in self.compilers.items()
        }
        self.known = Snapshot()

    def take(self, after: Snapshot, changes: Changes, now: float) -> dict[Family, Collection[Key]]:
        found: dict[Family, Collection[Key]] = {}
        for family, compiler in self.compilers.items():
            changed = compiler.update(after, changes)
            found[family] = self.drains[family].update(
                compiler.table, changed, changes.services, self.known, after, NODE, now, 30.0
            )
        self.known = after
        return found


class Site:
    """A registry, a gate and a kernel side, driven by hand."""

    def __init__(
        self,
        policy: Policy = "none",
        families: Sequence[Family] = (4,),
        *,
        timeout: float = 2.0,
        awaits: bool = False,
    ) -> None:
        self.now = 100.0
        self.metrics = Metrics()
        self.store = Store(KINDS)
        for kind in KINDS:
            self.store.mark_synced(kind)
        self.gate = Gate(timeout, self.metrics, awaits)
        self.kernel = Kernel(policy, families)
        self.registry = Snapshot()
        self.records = ClusterRecords(ClusterOptions())
        if not awaits:
            self.gate.attach(self.kernel.take(self.registry, Changes(), self.now), self.now)
            self.commit()
            for family in families:
                self.written(family)

    def commit(self) -> None:
        """Publish what the store holds."""
        found = self.store.publish(int(self.now))
        if found is None:
            return
        self.registry, changes = found
        kernel = self.kernel.take(self.registry, changes, self.now)
        self.show(self.gate.publish(self.registry, changes, kernel, self.now, int(self.now)))

    def show(self, shown: tuple[Snapshot, Changes] | None) -> None:
        if shown is not None:
            self.records.update(*shown)

    def put(self, *objects: Service | EndpointSlice, commit: bool = True) -> None:
        for one in objects:
            kind: Any = SERVICE if isinstance(one, Service) else ENDPOINT_SLICE
            self.store.apply(kind, "MODIFIED", one)
        if commit:
            self.commit()

    def delete(self, *objects: Service | EndpointSlice) -> None:
        for one in objects:
            kind: Any = SERVICE if isinstance(one, Service) else ENDPOINT_SLICE
            self.store.apply(kind, "DELETED", one)
        self.commit()

    def start(self, family: Family = 4) -> ForwardingTable:
        """Begin to write what there is; finish() it."""
        return self.kernel.drains[family].table

    def finish(self, table: ForwardingTable) -> None:
        family = table.family
        self.kernel.written[family] = table
        self.show(self.gate.programmed(family, table.revision, self.now, int(self.now)))

    def written(self, *families: Family) -> None:
        """The kernel holds everything."""
        for family in families or tuple(self.kernel.compilers):
            self.finish(self.start(family))

    def later(self, seconds: float) -> Opened | None:
        self.now += seconds
        opened = self.gate.expire(self.now, int(self.now))
        if opened is not None:
            self.show(opened.shown)
        return opened

    def synced(self) -> bool:
        """Whether DNS takes what it knows for all there is."""
        return self.records.synced

    def shown(self, key: Key = WEB) -> tuple[list[str], list[int], list[str]] | None:
        """Return ClusterIPs, ports and endpoints as DNS shows them; None: no such name."""
        return told(self.gate.snapshot, key)


def told(snapshot: Snapshot, key: Key) -> tuple[list[str], list[int], list[str]] | None:
    one = snapshot.services.get(key[0], {}).get(key[1])
    if one is None:
        return None
    spec = one.spec
    if spec.type == "ExternalName":
        return [spec.external_name], [], []
    return (
        list(spec.cluster_ips or [spec.cluster_ip]),
        [p.port for p in spec.ports or ()],
        sorted(endpoints_of(snapshot, key)),
    )


def endpoints_of(snapshot: Snapshot, key: Key) -> set[str]:
    slices = snapshot.slices.get(key[0], {}).get(key[1], ())
    return {
        f"[{address}]:{port.port}" if ":" in address else f"{address}:{port.port}"
        for _, address, _, ports in published(slices)
        for port in ports
    }


def ends(*numbers: int, port: int = 8080, family: str = "IPv4") -> EndpointSlice:
    base = "10.244.0." if family == "IPv4" else "fd00::"
    return slice_of(
        "web", *(endpoint(f"{base}{n}") for n in numbers), ports=[("http", port, "TCP")],
        name=f"web-{family.lower()}", family=family,
    )  # fmt: skip


def at(*numbers: int, port: int = 8080) -> list[str]:
    return sorted(f"10.244.0.{n}:{port}" for n in numbers)


IP, OTHER, V6 = "10.96.0.50", "10.96.0.60", "fd00:10:96::50"
WEB1 = service("web")


# --- what comes waits -----------------------------------------------------------------------


def test_a_new_service_has_no_name_before_it_has_rules() -> None:
    site = Site()
    site.put(WEB1, ends(1, 2))
    assert site.shown() is None
    assert site.gate.state(WEB) == "waiting"
    site.written()
    assert site.shown() == ([IP], [80], at(1, 2))
    assert site.gate.state(WEB) == ""
    assert site.gate.snapshot is site.registry


def test_a_table_that_is_older_than_the_service_does_not_count() -> None:
    site = Site()
    site.put(service("other", ip="10.96.0.9"))
    being_written = site.start()
    site.put(WEB1, ends(1))
    site.finish(being_written)
    assert site.shown(("default", "other")) is not None
    assert site.shown() is None
    site.written()
    assert site.shown() == ([IP], [80], at(1))


def test_what_needs_no_rules_passes_at_once() -> None:
    site = Site()
    site.put(service("web", ip="None"), ends(1, 2), external("far", "example.org"))
    assert site.shown() == (["None"], [80], at(1, 2))
    assert site.shown(("default", "far")) == (["example.org"], [], [])


def test_a_service_of_another_proxy_passes_at_once() -> None:
    site = Site()
    one = service("web")
    meta = msgspec.structs.replace(
        one.metadata, labels={"service.kubernetes.io/service-proxy-name": "other"}
    )
    site.put(msgspec.structs.replace(one, metadata=meta), ends(1))
    assert site.shown() == ([IP], [80], at(1))


@pytest.mark.parametrize(
    ("what", "before", "after", "meanwhile", "then"),
    [
        ("an endpoint comes", [WEB1, ends(1)], [ends(1, 2)],
         ([IP], [80], at(1)), ([IP], [80], at(1, 2))),
        ("an endpoint goes", [WEB1, ends(1, 2)], [ends(1)],
         ([IP], [80], at(1)), ([IP], [80], at(1))),
        ("endpoints are replaced", [WEB1, ends(1, 2)], [ends(2, 3)],
         ([IP], [80], at(2)), ([IP], [80], at(2, 3))),
        ("the endpoints' port changes", [WEB1, ends(1)], [ends(1, port=9090)],
         ([IP], [80], []), ([IP], [80], at(1, port=9090))),
        ("a port comes", [WEB1, ends(1)],
         [service("web", ports=[("http", 80, "TCP"), ("more", 81, "TCP")])],
         ([IP], [80], at(1)), ([IP], [80, 81], at(1))),
        ("a port goes", [service("web", ports=[("http", 80, "TCP"), ("more", 81, "TCP")]), ends(1)],
         [WEB1], ([IP], [80], at(1)), ([IP], [80], at(1))),
        ("a port's number changes", [WEB1, ends(1)], [service("web", ports=[("http", 90, "TCP")])],
         ([IP], [80], at(1)), ([IP], [90], at(1))),
        ("the ClusterIP changes", [WEB1, ends(1)], [service("web", ip=OTHER)],
         ([IP], [80], at(1)), ([OTHER], [80], at(1))),
        ("it becomes headless", [WEB1, ends(1)], [service("web", ip="None"), ends(1, 2)],
         (["None"], [80], at(1, 2)), (["None"], [80], at(1, 2))),
        ("it becomes an ExternalName", [WEB1, ends(1)], [external("web", "example.org")],
         (["example.org"], [], []), (["example.org"], [], [])),
        ("an ExternalName becomes a ClusterIP", [external("web", "example.org"), ends(1)], [WEB1],
         (["example.org"], [], []), ([IP], [80], at(1))),
        ("headless becomes a ClusterIP",
         [service("web", ip="None"), ends(1, 2)], [WEB1, ends(2, 3)],
         (["None"], [80], at(2)), ([IP], [80], at(2, 3))),
    ],
)  # fmt: skip
@pytest.mark.parametrize("policy", ["none", "ttl"])
def test_what_leaves_leaves_at_once_and_what_comes_waits(
    what: str, before: list[Any], after: list[Any], meanwhile: Any, then: Any, policy: Policy
) -> None:
    site = Site(policy)
    site.put(*before)
    site.written()
    site.put(*after)
    assert site.shown() == meanwhile, what
    site.written()
    assert site.shown() == then, what
    assert site.gate.quiet()


def test_a_deleted_service_is_gone_at_once_and_comes_again_with_its_rules() -> None:
    site = Site()
    site.put(WEB1, ends(1))
    site.written()
    site.delete(WEB1)
    assert site.shown() is None
    # The kernel may be about to take the rules away: the name waits until that is over.
    site.put(WEB1)
    assert site.shown() is None
    site.written()
    assert site.shown() == ([IP], [80], at(1))


def test_changes_that_do_not_end_hold_nothing_back_for_ever() -> None:
    site = Site()
    site.put(WEB1, ends(1))
    site.written()
    for number in range(2, 30):
        being_written = site.start()
        site.put(ends(1, number))
        site.finish(being_written)
        assert site.shown() == ([IP], [80], at(1))
        being_written = site.start()
        site.put(ends(1, number, 200))
        site.finish(being_written)
        assert site.shown() == ([IP], [80], at(1, number))


# --- endpoints that are on their way ---------------------------------------------------------


def with_selector(name: str = "web") -> Service:
    return service(name, selector={"app": name})


def test_a_new_service_with_a_selector_waits_for_its_endpoints_too() -> None:
    site = Site()
    site.put(with_selector())
    site.written()
    assert site.shown() is None  # whoever connected now would be refused
    site.put(ends(1))
    assert site.shown() is None
    site.written()
    assert site.shown() == ([IP], [80], at(1))


def test_a_service_without_endpoints_has_a_name_as_soon_as_that_is_known() -> None:
    site = Site()
    site.put(with_selector())
    site.written()
    site.put(ends())
    assert site.shown() == ([IP], [80], [])


def test_nobody_writes_slices() -> None:
    site = Site()
    site.put(with_selector())
    site.written()
    opened = site.later(2.0)
    assert opened is not None and opened.families == () and not opened.alone
    assert site.shown() == ([IP], [80], [])
    assert site.metrics.value("kdns_gate_opened_total") == 0


# --- families ---------------------------------------------------------------------------------


def test_each_family_comes_with_its_own_rules() -> None:
    site = Site(families=(4, 6))
    site.put(service("web", ip=[IP, V6]), ends(1), ends(7, family="IPv6"))
    assert site.shown() is None
    site.written(6)
    assert site.shown() == ([V6], [80], ["[fd00::7]:8080"])
    site.written(4)
    assert site.shown() == ([IP, V6], [80], [*at(1), "[fd00::7]:8080"])


def test_an_address_of_a_family_without_rules_waits_for_the_other() -> None:
    site = Site(families=(4,))
    site.put(service("web", ip=[IP, V6]), ends(1))
    assert site.shown() is None
    site.written()
    assert site.shown() == ([IP, V6], [80], at(1))


# --- a kernel side that fails -------------------------------------------------------------------


def test_after_the_timeout_dns_publishes_anyway_and_goes_on_to() -> None:
    site = Site()
    site.put(WEB1, ends(1))
    assert site.later(1.9) is None
    assert site.shown() is None
    opened = site.later(0.1)
    assert opened is not None
    assert (opened.families, opened.services, opened.alone) == ((4,), (WEB,), False)
    assert site.shown() == ([IP], [80], at(1))
    assert site.gate.state(WEB) == "open"
    status = site.gate.status(site.now)
    assert (status["open"], status["published_unprogrammed"]) == (True, ["default/web"])
    # Nothing waits any more, and nothing is waited for.
    site.put(service("next", ip=OTHER))
    assert site.shown(("default", "next")) == ([OTHER], [80], [])
    assert site.metrics.value("kdns_gate_opened_total") == 2
    assert site.gate.deadline() is None
    # Until a sync succeeds.
    site.written()
    assert (site.gate.state(WEB), site.gate.is_open) == ("", False)
    site.put(service("third", ip="10.96.0.70"))
    assert site.shown(("default", "third")) is None


def test_what_was_shown_once_is_not_hidden_when_an_old_table_is_written() -> None:
    site = Site()
    site.put(service("first", ip=OTHER))
    being_written = site.start()
    site.later(2.0)
    site.put(WEB1, ends(1))
    site.finish(being_written)
    assert site.shown() == ([IP], [80], at(1))
    assert site.gate.state(WEB) == "open"
    site.written()
    assert site.gate.state(WEB) == ""


def test_one_family_that_fails_does_not_hold_up_the_other() -> None:
    site = Site(families=(4, 6))
    site.put(service("web", ip=[IP, V6]), ends(1))
    site.written(4)
    assert site.shown() == ([IP], [80], at(1))
    opened = site.later(2.0)
    assert opened is not None and opened.families == (6,)
    assert site.shown() == ([IP, V6], [80], at(1))
    site.put(service("next", ip=[OTHER, "fd00:10:96::60"]))
    assert site.shown(("default", "next")) is None  # of IPv4 there is no reason not to wait
    site.written(4)
    assert site.shown(("default", "next")) == ([OTHER, "fd00:10:96::60"], [80], [])


def test_without_a_kernel_side_nothing_waits() -> None:
    site = Site()
    site.put(WEB1, ends(1))
    assert site.shown() is None
    site.show(site.gate.detach(site.now, int(site.now)))
    assert site.shown() == ([IP], [80], at(1))
    assert site.gate.snapshot is site.registry
    alone = Gate()
    found = alone.publish(site.registry, everything(site.registry), {}, 1.0, 1)
    assert found is not None and found[0] is site.registry


def test_a_kernel_side_that_comes_later_takes_nothing_away() -> None:
    site = Site(awaits=False, families=())
    site.put(WEB1, ends(1))
    assert site.shown() == ([IP], [80], at(1))
    site.kernel = Kernel()
    site.gate.attach(site.kernel.take(site.registry, everything(site.registry), 1.0), 1.0)
    assert site.shown() == ([IP], [80], at(1))
    assert site.gate.state(WEB) == "open"  # shown, and not programmed
    site.put(ends(1, 2))
    assert site.shown() == ([IP], [80], at(1))
    site.written()
    assert site.shown() == ([IP], [80], at(1, 2))
    assert site.gate.state(WEB) == ""


# --- the start ----------------------------------------------------------------------------------


def test_at_the_start_nothing_is_known_before_the_first_rules() -> None:
    site = Site(awaits=True, families=(4, 6))
    site.put(WEB1, ends(1))
    assert not site.synced()
    assert not site.gate.quiet()
    site.written(4)
    site.put(service("next", ip=OTHER))
    assert not site.synced()
    site.written(6)
    assert site.synced()
    assert site.shown() == ([IP], [80], at(1))
    assert site.shown(("default", "next")) is None
    site.written()
    assert site.shown(("default", "next")) is not None


def test_at_the_start_a_kernel_side_that_does_not_come_is_not_waited_for_long() -> None:
    site = Site(awaits=True, families=())
    site.put(WEB1, ends(1))
    opened = site.later(2.0)
    assert opened is not None and opened.alone
    assert site.shown() == ([IP], [80], at(1))


def test_at_the_start_rules_that_are_not_written_are_not_waited_for_long() -> None:
    site = Site(awaits=True)
    site.put(WEB1, ends(1))
    opened = site.later(2.0)
    assert opened is not None and opened.families == (4,) and opened.services == (WEB,)
    assert site.synced()
    assert site.shown() == ([IP], [80], at(1))
    assert site.gate.state(WEB) == "open"


def test_at_the_start_a_kernel_side_that_comes_late_and_fails_is_waited_for_no_longer() -> None:
    """DNS opens at the bound, and then it knows every name: none is denied for a moment."""
    site = Site(awaits=True, families=())
    site.put(WEB1, ends(1))
    site.now += 0.5
    site.kernel = Kernel()
    site.gate.attach(site.kernel.take(site.registry, everything(site.registry), site.now), site.now)
    opened = site.later(1.5)
    assert opened is not None and opened.families == (4,) and opened.services == (WEB,)
    assert site.shown() == ([IP], [80], at(1))
    assert site.gate.state(WEB) == "open"


# --- what is told of it ---------------------------------------------------------------------------


def test_the_serial_is_that_of_what_is_shown() -> None:
    site = Site()
    site.put(WEB1, ends(1))
    site.written()
    before = site.gate.snapshot.changed_at
    site.now += 60
    site.put(service("next", ip=OTHER))
    assert site.records.serial == before  # nobody sees a difference
    site.now += 1
    site.written()
    assert site.records.serial == int(site.now)  # and here they do
    site.now += 5
    site.put(service("far", ip="None"))
    assert site.records.serial == int(site.now)


def test_revisions_say_how_far_each_stage_is() -> None:
    site = Site(families=(4, 6))
    site.put(WEB1, ends(1))
    site.written()
    newest = site.registry.revision
    assert site.gate.shown_revision() == newest
    site.put(service("next", ip=OTHER))  # of IPv4 alone
    assert site.gate.shown_revision() == newest
    assert site.gate.kernel_revisions() == {4: newest, 6: newest + 1}
    site.put(service("far", ip="None"))
    assert site.gate.kernel_revisions() == {4: newest, 6: newest + 2}
    site.written()
    assert site.gate.shown_revision() == newest + 2
    assert site.gate.kernel_revisions() == {4: newest + 2, 6: newest + 2}


def test_status_says_who_waits_since_when() -> None:
    site = Site()
    site.put(WEB1, ends(1))
    site.now += 0.25
    assert site.gate.status(site.now) == {
        "timeout": 2.0, "open": False, "published_unprogrammed": [],
        "waiting": [{"service": "default/web", "revision": site.registry.revision,
                     "seconds": 0.25}],
    }  # fmt: skip
    assert site.gate.waiting() == 1


def test_it_costs_what_changes_and_not_what_waits() -> None:
    """Counted, not timed: only what was touched is compiled anew for DNS."""
    site = Site()
    site.put(*(service(f"old-{n}", ip=f"10.97.{n // 250}.{n % 250}") for n in range(1000)))
    site.written()
    for number in range(300):
        site.store.apply(SERVICE, "ADDED", service(f"new-{number}", ip=f"10.98.0.{number % 250}"))
        found = site.store.publish(int(site.now))
        assert found is not None
        site.registry = found[0]
        kernel = site.kernel.take(*found, site.now)
        shown = site.gate.publish(*found, kernel, site.now, int(site.now))
        assert shown is not None and shown[1].services == {("default", f"new-{number}")}
        assert shown[0].namespaces is site.registry.namespaces
    assert len(site.gate.snapshot.services["default"]) == 1000
    site.written()
    assert site.gate.snapshot is site.registry


# --- whatever happens, in whatever order -----------------------------------------------------

NAMES = ("a", "b")
IPS = ("10.96.0.1", "10.96.0.2", "10.96.0.3")
services = st.builds(
    lambda name, ip, number, ports: service(
        name, ip=ip if ip == "None" else ip[:-1] + str(int(ip[-1]) + 3 * NAMES.index(name)),
        ports=[(f"p{n}", number + n, "TCP") for n in ports],
    ),
    st.sampled_from(NAMES), st.sampled_from((*IPS, "None")), st.sampled_from((80, 90)),
    st.sets(st.integers(0, 2), min_size=1),
)  # fmt: skip
externals = st.builds(external, st.sampled_from(NAMES), st.just("example.org"))
slices = st.builds(
    lambda owner, numbers, ports, which, shift: slice_of(
        owner, *(endpoint(f"10.244.0.{n}") for n in sorted(numbers)),
        ports=[(f"p{n}", 8000 + shift + n, "TCP") for n in sorted(ports)],
        name=f"{owner}-{which}",
    ),
    st.sampled_from(NAMES), st.sets(st.integers(1, 5)), st.sets(st.integers(0, 2), min_size=1),
    st.integers(1, 2), st.sampled_from((0, 100)),
)  # fmt: skip
events = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.one_of(services, externals, slices)),
        st.tuples(st.just("delete"), st.one_of(services, slices)),
        st.tuples(st.just("start"), st.none()),
        st.tuples(st.just("finish"), st.none()),
    ),
    max_size=40,
)


def holds(site: Site) -> None:
    """Whatever DNS names, the kernel has rules for."""
    table = site.kernel.written[4]
    view = site.gate.snapshot
    for names in view.services.values():
        for one in names.values():
            if one.spec.type == "ExternalName" or one.spec.cluster_ip == "None":
                continue
            key = key_of(one)
            rules = table.services.get(key, ())
            frontends = {(r.cluster_ip, r.port) for r in rules}
            for port in one.spec.ports or ():
                assert (one.spec.cluster_ip, port.port) in frontends, (key, port)
            assert one.spec.cluster_ip in {r.cluster_ip for r in rules} or not one.spec.ports
            known = {str(e) for r in rules for e in r.cluster}
            # Endpoint ports that no port of the Service leads to have no rules anywhere.
            led_to = {p.name for p in one.spec.ports or ()}
            shown = {
                f"{address}:{port.port}"
                for _, address, _, ports in published(view.slices.get(key[0], {}).get(key[1], ()))
                for port in ports
                if port.name in led_to
            }
            assert shown <= known, key


@given(events, st.sampled_from(["none", "ttl"]))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_dns_never_names_what_no_rule_knows(steps: list[tuple[str, Any]], policy: Policy) -> None:
    site = Site(policy)
    being_written: ForwardingTable | None = None
    for do, what in steps:
        if do == "put":
            site.put(what)
        elif do == "delete":
            site.delete(what)
        elif do == "start" and being_written is None:
            being_written = site.start()
        elif do == "finish" and being_written is not None:
            site.finish(being_written)
            being_written = None
        holds(site)
    if being_written is not None:
        site.finish(being_written)
        holds(site)
    site.written()
    holds(site)
    assert site.gate.quiet()
    for part in ("services", "slices"):
        assert getattr(site.gate.snapshot, part) == getattr(site.registry, part)
    scratch = ClusterRecords(ClusterOptions())
    scratch.update(site.registry, everything(site.registry))
    assert dump(site.records) == dump(scratch)


def dump(records: ClusterRecords) -> list[tuple[bytes, bytes, object, object]]:
    return sorted(
        (one.namespace, one.name, sorted(one.items, key=repr), sorted(one.endpoints, key=repr))
        for one in records.services()
    )
