"""The cluster's zones: which name stands for what (reference 1.1), kept up to date by key.

Decides whether a name exists and which ServiceRecords stand behind it; what those hold is
zone/records.py's. One ClusterRecords serves all zones of a `kubernetes` directive, forward
and reverse. It is changed only by update(), between queries.
"""

from __future__ import annotations

import ipaddress
from bisect import bisect_left, insort
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from kdns.dns.name import name_of
from kdns.dns.reverse import IN_ADDR, IP6_ARPA, reverse_name
from kdns.registry.endpoints import Address, address_key, is_published, published_addresses
from kdns.registry.objects import EndpointSlice, Namespace, Pod, ServiceSpec
from kdns.registry.selectors import Selector
from kdns.registry.snapshot import Changes, Snapshot
from kdns.zone.nearest import NameIndex
from kdns.zone.records import (
    SVC,
    Item,
    Node,
    ServiceRecords,
    compile_import,
    compile_service,
)

POD = b"pod"
DNS = b"dns"  # ns.dns is the zone's own name server
SOA_DEP = "soa"  # every answer with the zone's SOA in it depends on the serial
# What hints in answers depend on besides: which namespaces there are; ("names", namespace):
# which Services it has, ("imports", namespace): which ServiceImports; ("named", name): which
# namespaces have a Service of that name.
NAMESPACES_DEP = ("namespaces",)
# Namespaces with a Service of the same name that are looked at for a hint.
PLACES = 8
STEP = 500  # entries that are let go at one go
Dep: TypeAlias = Hashable
ServiceKey: TypeAlias = tuple[bytes, bytes]  # namespace, name: lower case


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """The options of the `kubernetes` directive that shape answers (reference 1.12).

    pods               -- "disabled", "insecure" or "verified"
    namespaces         -- names exposed; empty: all
    namespace_selector -- label selector namespaces must match, or None
    strict             -- DNS specification 1.1.0 and RFCs instead of CoreDNS's habits (1.17)
    imports            -- ServiceImports are wanted, for multicluster zones
    """

    ttl: int = 5
    pods: str = "disabled"
    endpoint_pod_names: bool = False
    endpoints: bool = True
    ignore_empty_service: bool = False
    namespaces: frozenset[str] = frozenset()
    namespace_selector: Selector | None = None
    zonal: bool = False
    strict: bool = False
    imports: bool = False


class Missing:
    """The name does not exist: NXDOMAIN, or fallthrough."""


class Empty:
    """The name exists and holds nothing: an empty non-terminal."""


MISSING = Missing()
EMPTY = Empty()


class External:
    """An ExternalName Service; target is a wire name."""

    __slots__ = ("records", "target")

    def __init__(self, records: ServiceRecords, target: bytes) -> None:
        self.records = records
        self.target = target


# deps: what the finding depends on, for the packet cache.
Found: TypeAlias = tuple[Missing | Empty | Node | External, tuple[Dep, ...]]


class ClusterRecords:
    """Everything a `kubernetes` directive can answer, compiled from the registry."""

    def __init__(self, options: ClusterOptions) -> None:
        self.options = options
        self.synced = False
        self.serial = 0
        self.imports_serial = 0
        self.revision = 0
        self._namespaces: dict[bytes, bool] = {}  # lower-case name -> exposed
        self._services: dict[bytes, dict[bytes, ServiceRecords]] = {}
        self._imports: dict[bytes, dict[bytes, ServiceRecords]] = {}
        # Address -> the Service that has it, as a ClusterIP or as an endpoint, or those: nearly
        # every address is one Service's.
        self._by_address: dict[Address, ServiceKey | tuple[ServiceKey, ...]] = {}
        self._pods: dict[str, dict[tuple[str, str], Pod]] = {}
        self._pod_ip: dict[tuple[str, str], str] = {}
        self._suffixes: dict[bytes, int] = {}  # strict only: reverse empty non-terminals
        # For hints. Sorted namespaces that have a Service of a name, and names by likeness.
        self._places: dict[bytes, list[bytes]] = {}
        self._near_namespaces = NameIndex(self._namespaces)
        self._near_services: dict[bytes, NameIndex] = {}
        self._near_imports: dict[bytes, NameIndex] = {}
        self._snapshot = Snapshot()
        self._ready: dict[tuple[bytes, bytes, bool], tuple[int, int]] = {}

    # --- compiling --------------------------------------------------------------------

    def update(self, snapshot: Snapshot, changes: Changes) -> list[Dep]:
        """Take over a snapshot, recompiling only what changed; return the deps of answers
        that may be different now. Incremental equals from scratch (property test)."""
        deps: list[Dep] = []
        if snapshot.synced != self.synced:
            self.synced = snapshot.synced
        serials = snapshot.changed_at, snapshot.imports_changed_at
        if serials != (self.serial, self.imports_serial):
            self.serial, self.imports_serial = serials
            deps.append(SOA_DEP)
        self.revision = snapshot.revision
        self._snapshot = snapshot
        for name in changes.namespaces:
            deps += self._update_namespace(name, snapshot.namespaces.get(name))
        for namespace, name in changes.services:
            deps += self._update_service(snapshot, namespace, name)
        if self.options.imports:
            for namespace, name in changes.imports:
                deps += self._update_import(snapshot, namespace, name)
        if self.options.pods == "verified":
            for key in changes.pods:
                deps += self._update_pod(key, snapshot.pods.get(key[0], {}).get(key[1]))
        return deps

    def _update_namespace(self, name: str, namespace: Namespace | None) -> tuple[Dep, ...]:
        key = name.lower().encode()
        before = self._namespaces.get(key)
        if namespace is None:
            self._namespaces.pop(key, None)
        else:
            self._namespaces[key] = self._is_exposed(name, namespace)
        if self._namespaces.get(key) == before:
            return ((key,),)
        self._near_namespaces.changed(key)
        return (key,), NAMESPACES_DEP

    def _is_exposed(self, name: str, namespace: Namespace) -> bool:
        options = self.options
        if options.namespaces and name not in options.namespaces:
            return False
        selector = options.namespace_selector
        return selector is None or selector.matches(namespace.metadata.labels or {})

    def _update_service(self, snapshot: Snapshot, namespace: str, name: str) -> list[Dep]:
        ns_key, key = namespace.lower().encode(), name.lower().encode()
        self._ready.pop((ns_key, key, False), None)
        old = self._services.get(ns_key, {}).get(key)
        pair: ServiceKey = old.key if old is not None else (ns_key, key)
        deps: list[Dep] = [pair]
        service = snapshot.services.get(namespace, {}).get(name)
        new = None
        if service is not None:
            options = self.options
            slices = snapshot.slices.get(namespace, {}).get(name, ()) if options.endpoints else ()
            new = compile_service(
                service,
                slices,
                ttl=options.ttl,
                pod_names=options.endpoint_pod_names,
                strict=options.strict,
            )
            new.key = pair
            new.deps = old.deps if old is not None else (pair, (ns_key,))
        deps += self._reindex(pair, old, new)
        if new is not None:
            self._services.setdefault(ns_key, {})[key] = new
        elif old is not None:
            del self._services[ns_key][key]
            if not self._services[ns_key]:
                del self._services[ns_key]
        if (old is None) != (new is None):
            self._place(ns_key, key, there=new is not None)
            _note(self._near_services, self._services, ns_key, key)
            deps += (("names", ns_key), ("named", key))
        return deps

    def _place(self, namespace: bytes, name: bytes, there: bool) -> None:
        """Note that a namespace has, or has no more, a Service of this name."""
        places = self._places.setdefault(name, [])
        if there:
            insort(places, namespace)
        else:
            del places[bisect_left(places, namespace)]
            if not places:
                del self._places[name]

    def _update_import(self, snapshot: Snapshot, namespace: str, name: str) -> tuple[Dep, ...]:
        ns_key, key = namespace.lower().encode(), name.lower().encode()
        dep: Dep = ("import", ns_key, key)
        self._ready.pop((ns_key, key, True), None)
        was_there = key in self._imports.get(ns_key, {})
        one = snapshot.imports.get(namespace, {}).get(name)
        if one is not None:
            options = self.options
            records = compile_import(
                one,
                snapshot.import_slices.get(namespace, {}).get(name, ()),
                ttl=options.ttl,
                pod_names=options.endpoint_pod_names,
                strict=options.strict,
            )
            records.deps = (dep, (ns_key,))
            self._imports.setdefault(ns_key, {})[key] = records
        elif was_there:
            del self._imports[ns_key][key]
            if not self._imports[ns_key]:
                del self._imports[ns_key]
        if was_there == (one is not None):
            return (dep,)
        _note(self._near_imports, self._imports, ns_key, key)
        return dep, ("imports", ns_key)

    def _reindex(
        self, key: ServiceKey, old: ServiceRecords | None, new: ServiceRecords | None
    ) -> set[Address]:
        """Enter the addresses of a Service's new version and remove those of its old one;
        return the addresses whose PTR answers may be different now.

        The slices that both have are passed over: one of a thousand endpoints costs what
        changed.
        """
        before = () if old is None else self._slices_in_reverse(old)
        after = () if new is None else self._slices_in_reverse(new)
        kept = {id(one) for one in before} & {id(one) for one in after}
        gone = set(map(address_key, old.addresses)) if old is not None else set()
        come = set(map(address_key, new.addresses)) if new is not None else set()
        for one in before:
            if id(one) not in kept:
                gone.update(published_addresses(one))
        for one in after:
            if id(one) not in kept:
                come.update(published_addresses(one))
        touched = gone | come
        gone -= come
        if gone:
            for one in after:
                if id(one) in kept:
                    gone.difference_update(published_addresses(one))
        for address in gone:
            self._unlist(address, key)
        listed = self._by_address
        for address in come:
            # The usual case by one look: nobody has it, or this Service had it before.
            if self.options.strict or listed.setdefault(address, key) is not key:
                self._list(address, key)
        return touched

    def _slices_in_reverse(self, records: ServiceRecords) -> tuple[EndpointSlice, ...]:
        """Return the slices whose addresses have a PTR record to this Service.

        DNS spec 2.3.3/2.4.3: PTR for ClusterIPs and for endpoints of headless Services;
        CoreDNS also answers for endpoints of ClusterIP Services.
        """
        return () if self.options.strict and not records.headless else records.slices

    def _list(self, address: Address, key: ServiceKey) -> None:
        holders = self._holders(address)
        if key in holders:
            return
        self._by_address[address] = (*holders, key) if holders else key
        if self.options.strict:
            self._count_suffixes(address, 1)

    def _unlist(self, address: Address, key: ServiceKey) -> None:
        holders = self._holders(address)
        if key not in holders:
            return
        left = tuple(one for one in holders if one != key)
        if not left:
            del self._by_address[address]
        else:
            self._by_address[address] = left if len(left) > 1 else left[0]
        if self.options.strict:
            self._count_suffixes(address, -1)

    def _holders(self, address: Address) -> tuple[ServiceKey, ...]:
        """Return the Services that an address is listed for, in no order."""
        found = self._by_address.get(address)
        if found is None:
            return ()
        return (found,) if isinstance(found[0], bytes) else found

    def _count_suffixes(self, address: Address, step: int) -> None:
        name = reverse_name(str(ipaddress.ip_address(address)))
        at = name[0] + 1
        while at < len(name) - 1:
            suffix = name[at:]
            count = self._suffixes.get(suffix, 0) + step
            if count:
                self._suffixes[suffix] = count
            else:
                self._suffixes.pop(suffix, None)
            at += name[at] + 1

    def _update_pod(self, key: tuple[str, str], pod: Pod | None) -> list[Dep]:
        deps: list[Dep] = []
        old = self._pod_ip.pop(key, None)
        if old is not None:
            holders = self._pods[old]
            holders.pop(key, None)
            if not holders:
                del self._pods[old]
            deps.append(("pod", old))
        # Only the primary podIP is indexed, as CoreDNS does (reference 1.6).
        ip = pod.status.pod_ip if pod is not None else ""
        if pod is not None and ip:
            self._pods.setdefault(ip, {})[key] = pod
            self._pod_ip[key] = ip
            deps.append(("pod", ip))
        return deps

    def dissolve(self) -> Iterator[int]:
        """Let go of everything, in parts: at once it would take longer than answers may wait.
        Nobody may ask any more. Yield how many entries each part had."""
        tables: list[dict[Any, Any]] = [self._by_address]
        for table in [*tables, *self._services.values(), *self._imports.values()]:
            while table:
                part = min(STEP, len(table))
                for _ in range(part):
                    table.popitem()
                yield part

    # --- looking up -------------------------------------------------------------------

    def lookup(self, labels: list[bytes]) -> Found:
        """Return what the lower-case labels left of a forward zone stand for (1.1)."""
        n = len(labels)
        if n == 0:
            return EMPTY, ()
        kind = labels[-1]
        if kind != SVC and kind != POD:
            if self.options.strict and kind == DNS and n == 1:
                return EMPTY, ()  # RFC 8020: ns.dns exists below it
            return MISSING, ()
        if n == 1:
            return EMPTY, ()
        namespace = labels[-2]
        ns_dep: Dep = (namespace,)
        if not self._namespaces.get(namespace):
            return MISSING, (ns_dep,)
        if n > 5 and not self.options.zonal:
            return MISSING, ()
        if kind == POD:
            return self._lookup_pod(labels, namespace, ns_dep)
        if n == 2:
            return EMPTY, (ns_dep,)
        name = labels[-3]
        records = self._services.get(namespace, {}).get(name)
        if records is None:
            return MISSING, ((namespace, name), ns_dep)
        return self._lookup_service(labels, n, records)

    def missing_at(self, labels: list[bytes]) -> int:
        """Return how many labels, from the right, go to show that a name that lookup() found
        missing is not there: no name of as many labels is there that ends in these. 0 if that
        is not known. One comes to be only with one of the deps that lookup() returned."""
        n = len(labels)
        kind = labels[-1]
        if kind != SVC and kind != POD:
            return 0 if kind == DNS else 1
        if n > 1 and not self._namespaces.get(labels[-2]):
            return 2
        if n > 5 and not self.options.zonal:
            return 2
        if kind == SVC and n > 2:
            return 0 if labels[-3] in self._services.get(labels[-2], {}) else 3
        return 0

    def _lookup_service(self, labels: list[bytes], n: int, records: ServiceRecords) -> Found:
        deps = records.deps
        if (
            self.options.ignore_empty_service
            and records.cname is None
            and not records.headless
            and not records.endpoints
        ):
            return MISSING, deps
        if n == 3:
            if records.cname is not None:
                return External(records, records.cname), deps
            return records.node() or MISSING, deps
        if n == 4:
            if records.cname is None and labels[0]:
                node = records.node(endpoint=labels[0])
                if node is not None:
                    return node, deps
                if self.options.strict and self._has_protocol(records, labels[0]):
                    return EMPTY, deps
            return MISSING, deps
        if n == 5:
            if records.cname is not None:
                return MISSING, deps
            port, protocol = labels[0], labels[1]
            if self.options.strict and not (port[:1] == b"_" and protocol[:1] == b"_"):
                return MISSING, deps
            return (
                records.node(port=port.removeprefix(b"_"), protocol=protocol.removeprefix(b"_"))
                or MISSING
            ), deps
        return self._lookup_zonal(labels, records)

    def _lookup_zonal(self, labels: list[bytes], records: ServiceRecords) -> Found:
        # TOPOZONE.pin|prefer._zone.SVC.NS.svc; the value of a zone label may hold dots.
        verb = labels[-5]
        if labels[-4] != b"_zone" or verb not in (b"pin", b"prefer") or not records.headless:
            return MISSING, records.deps
        value = b".".join(labels[:-5]).decode("utf-8", "replace")
        node = records.in_topology_zone(value, verb == b"prefer")
        return (node if node.items else EMPTY), records.deps

    def lookup_imported(self, labels: list[bytes]) -> Found:
        """As lookup, for the labels left of a multicluster zone (1.1, 1.13): Services are
        those imported, and an endpoint is named with its cluster."""
        n = len(labels)
        if n < 3 or labels[-1] != SVC:
            return self.lookup(labels)
        namespace, name = labels[-2], labels[-3]
        if not self._namespaces.get(namespace):
            return MISSING, ((namespace,),)
        records = self._imports.get(namespace, {}).get(name)
        if records is None:
            return MISSING, (("import", namespace, name), (namespace,))
        deps = records.deps
        if n > 5 or (
            self.options.ignore_empty_service and not records.headless and not records.endpoints
        ):
            return MISSING, deps
        if n == 3:
            return self._own_node(records, b"", b""), deps
        if n == 4:
            # Without its cluster an endpoint is found only if its slice names none.
            node = records.endpoint_in(b"", labels[0])
            if node is not None:
                return node, deps
            below = self._has_protocol(records, labels[0]) or records.has_cluster(labels[0])
            return (EMPTY if below and self.options.strict else MISSING), deps
        first, second = labels[0], labels[1]
        marks = (first[:1] == b"_") + (second[:1] == b"_")
        if not marks:
            return records.endpoint_in(second, first) or MISSING, deps
        if self.options.strict and marks < 2:
            return MISSING, deps
        return self._own_node(records, first.removeprefix(b"_"), second.removeprefix(b"_")), deps

    def _own_node(
        self, records: ServiceRecords, port: bytes, protocol: bytes
    ) -> Node | Empty | Missing:
        """Return the node of a ServiceImport or of one of its ports."""
        node = records.node(port=port, protocol=protocol)
        if node is not None:
            return node
        # No address was given to it yet: the name is there, without records.
        waiting = not records.headless and not records.addresses
        return EMPTY if waiting and records.has_port(port, protocol) else MISSING

    def _has_protocol(self, records: ServiceRecords, label: bytes) -> bool:
        """True if `_tcp.SVC` is an empty non-terminal (strict only)."""
        if label[:1] != b"_":
            return False
        return any(i.protocol == label[1:] and i.port_name for i in records.items)

    def _lookup_pod(self, labels: list[bytes], namespace: bytes, ns_dep: Dep) -> Found:
        mode = self.options.pods
        if mode == "disabled":
            return MISSING, (ns_dep,)
        if len(labels) == 2:
            return EMPTY, (ns_dep,)
        if len(labels) > 5:
            return MISSING, (ns_dep,)
        label = labels[-3].decode("ascii", "replace")
        if label.count("-") == 3 and "--" not in label:
            ip = label.replace("-", ".")
        else:
            ip = label.replace("-", ":")
        if mode == "verified":
            deps: tuple[Dep, ...] = (("pod", ip), ns_dep)
            wanted = namespace.decode("ascii", "replace")
            holders = self._pods.get(ip, ())
            if not any(key[0].lower() == wanted for key in holders):
                return MISSING, deps
        else:
            deps = (ns_dep,)
        packed = parse_ip(ip)
        if packed is None:
            return MISSING, deps
        item = Item(packed, 0, b"", b"", (labels[-3], namespace, POD), b"")
        return Node((item,), self.options.ttl, False), deps

    def pointers(self, packed: bytes) -> list[tuple[bytes, ...]]:
        """Return the names an address has, as labels left of the primary zone: the Service
        whose ClusterIP it is (one), else every published endpoint with it (1.7)."""
        # `namespaces` filters PTR too, `namespace_labels` does not (reference 1.7).
        filtered = bool(self.options.namespaces)
        out: list[tuple[bytes, ...]] = []
        for namespace, name in sorted(self._holders(address_key(packed))):
            if filtered and not self._namespaces.get(namespace):
                continue
            records = self._services[namespace][name]
            if packed in records.addresses:
                return [(name, namespace, SVC)]
            labels = dict.fromkeys(i.label for i in records.endpoints if i.packed == packed)
            out += [(label, name, namespace, SVC) for label in labels]
        return out

    def has_reverse_below(self, key: bytes) -> bool:
        """True if a partial reverse name has names below it (strict only, RFC 8020)."""
        return key in self._suffixes

    def pod_at(self, ip: str) -> Pod | None:
        """Return a verified Pod with this address (autopath)."""
        holders = self._pods.get(ip)
        return next(iter(holders.values())) if holders else None

    def services(self) -> Iterator[ServiceRecords]:
        """Yield the Services that are exposed, sorted by name (reference 1.14)."""
        return self._exposed(self._services)

    def imports(self) -> Iterator[ServiceRecords]:
        """As services(), of those imported."""
        return self._exposed(self._imports)

    def _exposed(
        self, table: Mapping[bytes, Mapping[bytes, ServiceRecords]]
    ) -> Iterator[ServiceRecords]:
        found = [
            records
            for namespace, services in table.items()
            if self._namespaces.get(namespace)
            for records in services.values()
        ]
        yield from sorted(found, key=lambda r: (r.name, r.namespace))

    # --- for hints --------------------------------------------------------------------

    def is_exposed(self, namespace: bytes) -> bool:
        """True if the namespace is there and may be shown."""
        return bool(self._namespaces.get(namespace))

    def service(self, namespace: bytes, name: bytes, imported: bool) -> ServiceRecords | None:
        """Return a Service, or a ServiceImport, of an exposed namespace."""
        if not self._namespaces.get(namespace):
            return None
        return (self._imports if imported else self._services).get(namespace, {}).get(name)

    def near_namespaces(self, name: bytes) -> tuple[list[bytes], tuple[Dep, ...]]:
        """Return the exposed namespaces whose names are nearest to `name`, and the deps."""
        found = self._near_namespaces.nearest(name)
        return [one for one in found if self._namespaces.get(one)], (NAMESPACES_DEP,)

    def near_services(
        self, namespace: bytes, name: bytes, imported: bool
    ) -> tuple[list[bytes], tuple[Dep, ...]]:
        """Return the names of a namespace's Services nearest to `name`, and the deps."""
        table = self._imports if imported else self._services
        deps: tuple[Dep, ...] = (("imports" if imported else "names", namespace),)
        names = table.get(namespace)
        if names is None:
            return [], deps
        indexes = self._near_imports if imported else self._near_services
        index = indexes.get(namespace)
        if index is None:
            index = indexes[namespace] = NameIndex(names)
        return index.nearest(name), deps

    def places_of(self, name: bytes) -> tuple[list[bytes], tuple[Dep, ...]]:
        """Return the exposed namespaces that have a Service of this name, in order and as far
        as a hint needs them, and the deps."""
        places = self._places.get(name)
        if places is None:
            return [], (("named", name),)
        seen = places[:PLACES]
        deps = (("named", name), *[(one,) for one in seen])
        return [one for one in seen if self._namespaces.get(one)], deps

    def readiness(self, records: ServiceRecords, imported: bool) -> tuple[int, int] | None:
        """Return (endpoints that are ready, all endpoints); None if endpoints are not
        followed. A Pod with an address of either family counts once."""
        if not self.options.endpoints:
            return None
        key = (records.namespace, records.name, imported)
        found = self._ready.get(key)
        if found is None:
            namespace, name = records.namespace.decode(), records.name.decode()
            table = self._snapshot.import_slices if imported else self._snapshot.slices
            found = count_ready(table.get(namespace, {}).get(name, ()))
            self._ready[key] = found
        return found

    def spec_of(self, records: ServiceRecords) -> ServiceSpec | None:
        """Return the Service's spec."""
        namespace, name = records.namespace.decode(), records.name.decode()
        service = self._snapshot.services.get(namespace, {}).get(name)
        return None if service is None else service.spec

    def services_of(self, addresses: Iterable[bytes]) -> list[ServiceRecords]:
        """Return the Services that have one of these addresses as an endpoint: the Service
        this very server stands behind (reference 1.10)."""
        out: dict[tuple[bytes, bytes], ServiceRecords] = {}
        for packed in addresses:
            for namespace, name in self._holders(address_key(packed)):
                records = self._services[namespace][name]
                if packed not in records.addresses:
                    out[namespace, name] = records
        return [out[key] for key in sorted(out)]


def _note(
    indexes: dict[bytes, NameIndex],
    table: Mapping[bytes, Mapping[bytes, ServiceRecords]],
    namespace: bytes,
    name: bytes,
) -> None:
    """Let the index of a namespace's names know that one came or went."""
    index = indexes.get(namespace)
    if index is None:
        return
    if namespace in table:
        index.changed(name)
    else:
        del indexes[namespace]


def count_ready(slices: Iterable[EndpointSlice]) -> tuple[int, int]:
    """Return (ready, all) of the family that has more endpoints."""
    counts: dict[str, tuple[int, int]] = {}
    for one in slices:
        endpoints = one.endpoints or ()
        ready, total = counts.get(one.address_type, (0, 0))
        counts[one.address_type] = (
            ready + sum(map(is_published, endpoints)),
            total + len(endpoints),
        )
    return max(counts.values(), key=lambda pair: (pair[1], pair[0]), default=(0, 0))


def describe_dep(dep: Dep) -> str:
    """Return which object a dep stands for, as people write it ("Service default/web"); empty
    where it stands for none (the SOA's serial, the set of names in a namespace)."""
    if isinstance(dep, bytes) or (isinstance(dep, str) and dep != SOA_DEP):
        return f"address {ipaddress.ip_address(dep)}"
    if not isinstance(dep, tuple):
        return ""
    kind, *rest = dep
    if kind == "pod":
        return f"Pod {rest[0]}"
    names = "/".join(part.decode("utf-8", "replace") for part in dep if isinstance(part, bytes))
    if kind == "import":
        return f"ServiceImport {names}"
    if isinstance(kind, bytes):
        return f"{'Service' if rest else 'Namespace'} {names}"
    return ""


def parse_ip(text: str) -> bytes | None:
    """Return the packed address as Go's net.ParseIP reads it: no scope, and an IPv4-mapped
    address is IPv4; None if it is not an address."""
    if "%" in text:
        return None
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped.packed
    return address.packed


def is_reverse_zone(zone: bytes) -> bool:
    """True for a zone below in-addr.arpa or ip6.arpa. The bare zones themselves are not
    recognised, as in CoreDNS (reference 1.7): listed first, one becomes the primary zone."""
    return zone not in (IN_ADDR, IP6_ARPA) and zone.endswith((IN_ADDR, IP6_ARPA))


def join(labels: Iterable[bytes], zone: bytes) -> bytes:
    """Return the wire name of `labels` under `zone`."""
    return name_of([*labels])[:-1] + zone
