"""Why the `kubernetes` plugin's answer is what it is, in one sentence (RFC 8914).

Decides which extended error goes with a negative or degraded answer, and its text; the answer
itself was made by plugins/kubernetes.py, and is not changed by this. Names that stand near and
the counts are zone/cluster.py's. Every sentence comes with the deps it was made from, so that
it is never repeated once it is no longer true.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from ipaddress import ip_address
from typing import TypeAlias

from kdns.dns import ede
from kdns.dns import types as t
from kdns.dns.ede import Ede
from kdns.dns.name import ROOT, is_subdomain, labels_of, name_of, render_name
from kdns.registry.objects import Key
from kdns.zone.cluster import POD, ClusterRecords, parse_ip
from kdns.zone.records import SVC, ServiceRecords

Deps: TypeAlias = tuple[Hashable, ...]
# An error and what it was made from; None: it is true only now.
Why: TypeAlias = tuple[Ede | None, Deps | None]
NOTHING: Why = (None, ())
NO_ENDPOINTS = "endpoints have no names here ('noendpoints')"
OWN_NAMES = ([b"dns-version"], [b"ns", b"dns"])  # names of the zone itself
SHOWN = 4  # ports, names or namespaces in one sentence
PLAIN = b"abcdefghijklmnopqrstuvwxyz0123456789-_"  # most labels; written as they are
FAMILIES = {t.A: (4, "IPv4"), t.AAAA: (16, "IPv6")}


def no_gate(key: Key) -> str:
    """What stands for a gate where there is none: nothing waits."""
    return ""


class Reasons:
    """What a `kubernetes` plugin has to say of its answers.

    gate_state -- what keeps a Service's rules from the kernel: "", "waiting" or "open"
    """

    def __init__(self, records: ClusterRecords) -> None:
        self.records = records
        self.gate_state: Callable[[Key], str] = no_gate

    # --- answers that hold something ----------------------------------------------------

    def degraded(self, labels: Sequence[bytes], imported: bool) -> Why:
        """Why an answer is not as good as it looks; the labels are those left of the zone."""
        n = len(labels)
        if n < 3 or labels[-1] != SVC:
            return NOTHING
        records = self.records.service(labels[-2], labels[-3], imported)
        if records is None or records.cname is not None:
            return NOTHING
        if not imported and self._gate(records.namespace, records.name) == "open":
            return Ede(
                ede.OTHER,
                f"{_service(records)} is shown though its rules are not in the kernel yet",
            ), None
        if records.endpoints:
            return NOTHING
        text = self._unready(records, imported)
        return (Ede(ede.OTHER, text), ()) if text else NOTHING

    # --- answers that hold nothing ------------------------------------------------------

    def no_address(self, packed: bytes, qtype: int) -> Why:
        """Why the name of an address has no such record."""
        if qtype != t.PTR:
            return _other("the name of an address has a PTR record or none")
        who = "no Service and no endpoint" if self.records.options.endpoints else "no Service"
        return _other(f"{who} has the address {_address(packed)}")

    def nothing(
        self, labels: Sequence[bytes], qtype: int, zone: bytes, rcode: int, imported: bool
    ) -> Why:
        """Why there is no record of this type; the labels are those left of the zone."""
        n = len(labels)
        if n == 0:
            return NOTHING
        kind = labels[-1]
        if kind != SVC and kind != POD:
            own = labels in OWN_NAMES or rcode != t.NXDOMAIN
            return NOTHING if own else self._not_below_svc(labels, zone)
        if n == 1:
            return NOTHING
        if n > 4 and SVC in labels[2:-1]:
            return _other("a search list was added to a whole name; end names with a dot")
        namespace = labels[-2]
        if not self.records.is_exposed(namespace):
            return self._no_namespace(labels, namespace, zone, imported)
        if kind == POD:
            why, deps = self._no_pod(labels, namespace, qtype, rcode)
            # A name that long is not there whatever the namespace: the answer has no deps.
            return why, (*(deps or ()), (namespace,)) if n > 5 else deps
        if n == 2:
            return _other(
                f"{_text(namespace)} is a namespace; its Services are"
                f" NAME.{_under((namespace, SVC), zone)}"
            )
        name = labels[-3]
        records = self.records.service(namespace, name, imported)
        if records is None:
            why, deps = self._no_service(namespace, name, imported)
        else:
            why, deps = self._nothing_of(records, labels, qtype, zone, rcode, imported)
        if n > 5 and deps is not None:
            # A name that long is not there whatever the Service: the answer has no deps.
            deps += ((namespace, name), (namespace,))
        return why, deps

    def reach(self, labels: Sequence[bytes]) -> int:
        """Return how many labels, from the right, nothing() goes by for a name that is not there
        and of which missing_at() tells: it says the same of all names of as many labels that end
        alike, until one of the deps changes that it gave for one of them."""
        n = len(labels)
        if labels[-1] != SVC and labels[-1] != POD:
            return self._reach_not_below_svc(labels)
        if n < 3:
            return n
        by_search_list = 0
        if n > 4:
            inner = [*labels[2:-1]]
            if SVC in inner:
                return 2 + inner[::-1].index(SVC)
            by_search_list = n - 2
        namespace = labels[-2]
        if not self.records.is_exposed(namespace):
            # The other way round, unless no Service has the namespace's name.
            turned = labels[-1] == SVC and len(self.records.places_of(namespace)[1]) > 1
            own = 3 if turned else 2
        else:
            own = 2 if labels[-1] == POD else 3
        return max(own, by_search_list)

    def _reach_not_below_svc(self, labels: Sequence[bytes]) -> int:
        """As reach(): whether the last label but one, or two, is a Service's is not looked at
        unless the one behind it is a namespace's."""
        records = self.records
        n = reached = len(labels)
        for cut in (2, 3):
            if n < cut:
                break
            if records.service(labels[1 - cut], labels[-cut], False) is not None:
                return n  # the whole name is in the hint
            reached = cut if records.is_exposed(labels[1 - cut]) else cut - 1
        return reached

    def _not_below_svc(self, labels: Sequence[bytes], zone: bytes) -> Why:
        """A name that lacks `svc`, often one that a search list made."""
        records = self.records
        deps: list[Hashable] = []
        if len(labels) == 1:
            places, more = records.places_of(labels[0])
            if places:
                meant = (labels[0], places[0], SVC)
                return _meant(meant, zone, more)
            return _other(f"Services are NAME.NAMESPACE.{_under((SVC,), zone)}", more)
        for cut in (2, 3):
            if len(labels) < cut:
                break
            name, namespace = labels[-cut], labels[1 - cut]
            deps += [(namespace, name), (namespace,)]
            if records.service(namespace, name, False) is not None:
                return _meant((*labels[:-cut], name, namespace, SVC), zone, tuple(deps))
        return _other(f"Services are NAME.NAMESPACE.{_under((SVC,), zone)}", tuple(deps))

    def _no_namespace(
        self, labels: Sequence[bytes], namespace: bytes, zone: bytes, imported: bool
    ) -> Why:
        records = self.records
        text = f"no namespace {_text(namespace)}"
        near, deps = records.near_namespaces(namespace)
        if labels[-1] == SVC and not imported:
            places, more = records.places_of(namespace)
            deps += more
            if len(labels) > 2 and len(more) > 1:  # the other way round?
                name = labels[-3]
                deps += (name, namespace), (name,)
                if records.service(name, namespace, False) is not None:
                    text += f"; did you mean {_under((namespace, name, SVC), zone)}"
                    return _other(text, deps)
            if places and not near:
                text += f"; did you mean {_under((namespace, places[0], SVC), zone)}"
                return _other(text, deps)
        return _other(text + _nearest(near), deps)

    def _no_service(self, namespace: bytes, name: bytes, imported: bool) -> Why:
        records = self.records
        if imported:
            near, deps = records.near_services(namespace, name, True)
            return _other(
                f"no ServiceImport {_text(name)} in namespace {_text(namespace)}{_nearest(near)}",
                deps,
            )
        if self._gate(namespace, name) == "waiting":
            return Ede(
                ede.NOT_READY,
                f"Service {_text(namespace)}/{_text(name)} is new: its rules are not in the kernel"
                " yet",
            ), None
        near, deps = records.near_services(namespace, name, False)
        places, more = records.places_of(name)
        text = f"no Service {_text(name)} in namespace {_text(namespace)}"
        if near:
            text += _nearest(near)
        if places:
            one = len(places) == 1
            text += "; namespace" if one else "; namespaces"
            text += f" {_list(places)} {'has' if one else 'have'} one"
        return Ede(ede.OTHER, text), deps + more

    def _no_pod(self, labels: Sequence[bytes], namespace: bytes, qtype: int, rcode: int) -> Why:
        if self.records.options.pods == "disabled":
            return Ede(ede.NOT_SUPPORTED, "names of Pods are off ('pods disabled')"), ()
        if len(labels) == 2:
            return NOTHING
        if len(labels) > 5:
            return _other("no name that long belongs to a Pod")
        label = labels[-3].decode("ascii", "replace")
        dotted = label.count("-") == 3 and "--" not in label
        packed = parse_ip(label.replace("-", "." if dotted else ":"))
        if packed is None:
            return _other(f"{_text(labels[-3])} stands for no IP address")
        if rcode == t.NXDOMAIN:
            return _other(
                f"no Pod in namespace {_text(namespace)} has the address {_address(packed)}"
            )
        family = FAMILIES.get(qtype)
        if family is not None and len(packed) != family[0]:
            return _other(f"{_address(packed)} is no {family[1]} address")
        return NOTHING

    # --- a Service that is there --------------------------------------------------------

    def _nothing_of(
        self,
        records: ServiceRecords,
        labels: Sequence[bytes],
        qtype: int,
        zone: bytes,
        rcode: int,
        imported: bool,
    ) -> Why:
        n = len(labels)
        if records.cname is not None:
            return self._nothing_of_external(records, n, qtype, zone)
        if not records.headless and not records.addresses:
            spec = None if imported else self.records.spec_of(records)
            if spec is not None and spec.type == "ExternalName":
                return _other(f"the externalName of {_service(records)} is no DNS name")
            return _other(f"{_service(records, imported)} has no IP address yet")
        if n == 3:
            return self._nothing_of_itself(records, qtype, imported)
        if n == 5 and not (imported and labels[0][:1] != b"_" and labels[1][:1] != b"_"):
            port, protocol = labels[0].removeprefix(b"_"), labels[1].removeprefix(b"_")
            if not records.has_port(port, protocol):
                return _other(
                    f"{_service(records, imported)} has no port _{_text(port)}._{_text(protocol)}"
                    + _ports(records)
                )
            return self._nothing_of_itself(records, qtype, imported)
        if n > 5 and labels[-4] == b"_zone" and self.records.options.zonal:
            return _other(f"{_service(records)} has no ready endpoint in that zone")
        if n > 5:
            return _other(f"no name that long belongs to {_service(records, imported)}")
        label = labels[0]
        if n == 4 and label[:1] == b"_":
            return _other(
                f"names of ports have two labels, _PORT._PROTOCOL{_ports(records)}"
                if records.ports
                else f"{_service(records, imported)} declares no ports"
            )
        if rcode == t.NOERROR:
            if qtype in FAMILIES:
                return _other(f"endpoint {_text(label)} has no {FAMILIES[qtype][1]} address")
            return NOTHING
        counted = self.records.readiness(records, imported)
        if counted is None:
            return _other(NO_ENDPOINTS)
        text = f"{_service(records, imported)} has no ready endpoint {_text(label)}"
        return _other(f"{text} ({counted[0]} of {counted[1]} ready)")

    def _nothing_of_itself(self, records: ServiceRecords, qtype: int, imported: bool) -> Why:
        if records.headless or self.records.options.ignore_empty_service:
            unready = self._unready(records, imported)
            if unready:
                return _other(unready)
        family = FAMILIES.get(qtype)
        if family is not None:
            size = family[0]
            if records.items and size not in [len(item.packed) for item in records.items]:
                other = "IPv4" if size == 16 else "IPv6"
                return _other(f"{_service(records, imported)} has {other} addresses only")
        elif qtype == t.SRV and not records.ports:
            return _other(f"{_service(records, imported)} declares no ports")
        return NOTHING

    def _nothing_of_external(self, records: ServiceRecords, n: int, qtype: int, zone: bytes) -> Why:
        if n > 3:
            return _other(f"{_service(records)} is an ExternalName; no names lie below it")
        if qtype not in FAMILIES:
            return _other(f"{_service(records)} is an ExternalName: ask for A, AAAA or CNAME")
        assert records.cname is not None
        target = records.cname.lower()
        text = f"target {render_name(target)[:-1]} of {_service(records)}"
        zone = zone.lower()
        if not is_subdomain(target, zone):
            return NOTHING
        labels = labels_of(target)[: -len(labels_of(zone)) or None]
        deps: Deps = ()
        if len(labels) > 2 and labels[-1] == SVC:
            namespace, name = labels[-2], labels[-3]
            deps = (namespace, name), (namespace,)
            found = self.records.service(namespace, name, False)
            if found is None:
                text += f": no Service {_text(name)} in namespace {_text(namespace)}"
                return _other(text, deps)
            unready = self._unready(found, False)
            if unready and found.headless:
                return _other(f"{text}: {unready}", deps)
        return _other(f"{text} leads to no {FAMILIES[qtype][1]} address", deps)

    def _unready(self, records: ServiceRecords, imported: bool) -> str:
        """Return what is wrong with a Service of which no endpoint is ready, else nothing."""
        if records.endpoints:
            return ""
        counted = self.records.readiness(records, imported)
        if counted is None:
            return NO_ENDPOINTS if records.headless else ""
        ready, total = counted
        if total:
            return f"{_service(records, imported)}: {ready} of {total} endpoints ready"
        text = f"{_service(records, imported)} has no endpoints"
        spec = None if imported else self.records.spec_of(records)
        return f"{text}; does its selector match a Pod" if spec and spec.selector else text

    def _gate(self, namespace: bytes, name: bytes) -> str:
        if self.gate_state is no_gate:
            return ""
        key = namespace.decode("utf-8", "replace"), name.decode("utf-8", "replace")
        return self.gate_state(key)


def not_synced() -> Ede:
    """What is said before the registry was listed."""
    return Ede(ede.NOT_READY, "Services and EndpointSlices have not been listed yet")


def no_transfer() -> Ede:
    """What is said to AXFR where no `transfer` plugin took it."""
    return Ede(ede.PROHIBITED, "transfer of this zone is not allowed here")


def of_target(target: bytes, rcode: int, has_records: bool, cause: Ede | None) -> Ede | None:
    """Say what is wrong with an ExternalName's target outside of the zone, whose answer had
    this rcode and cause."""
    if cause is None and has_records and rcode == t.NOERROR:
        return None
    text = f"ExternalName target {render_name(target)[:-1]}: "
    if cause is not None:
        return Ede(cause.code, text + (cause.text or t.rcode_name(rcode)))
    return Ede(ede.OTHER, text + (t.rcode_name(rcode) if rcode else "no such record"))


# --- words ---------------------------------------------------------------------------------


def _other(text: str, deps: Deps = ()) -> Why:
    return Ede(ede.OTHER, text), deps


def _meant(labels: Sequence[bytes], zone: bytes, deps: Deps) -> Why:
    return _other(f"did you mean {_under(labels, zone)}", deps)


def _text(label: bytes) -> str:
    """Return a label as people write it."""
    if not label.translate(None, PLAIN):
        return label.decode()
    return render_name(bytes((len(label),)) + label + ROOT)[:-1]


def _under(labels: Sequence[bytes], zone: bytes) -> str:
    return render_name(name_of([*labels])[:-1] + zone.lower())[:-1]


def _service(records: ServiceRecords, imported: bool = False) -> str:
    kind = "ServiceImport" if imported else "Service"
    return f"{kind} {records.namespace.decode()}/{records.name.decode()}"


def _list(names: Sequence[bytes]) -> str:
    shown = [_text(name) for name in names[:SHOWN]]
    return ", ".join(shown) + (", ..." if len(names) > SHOWN else "")


def _nearest(names: Sequence[bytes]) -> str:
    return f"; nearest: {_list(names)}" if names else ""


def _ports(records: ServiceRecords) -> str:
    """Return the names of a Service's ports, as they are asked for."""
    named = [b"_" + name + b"._" + protocol for name, protocol, _ in records.ports if name]
    if not named:
        return "; none of its ports has a name"
    shown = ", ".join(one.decode() for one in named[:SHOWN])
    return f"; it has {shown}" + (", ..." if len(named) > SHOWN else "")


def _address(packed: bytes) -> str:
    return str(ip_address(packed))
