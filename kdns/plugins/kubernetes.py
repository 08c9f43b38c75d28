"""The `kubernetes` plugin: answers a cluster's names from the registry (reference section 1).

Decides zone, query type and rcode. Which name stands for what is zone/cluster.py's, what a
Service's records are is zone/records.py's, where objects come from is source/'s.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from struct import pack
from typing import Any, TypeAlias

from kdns.corefile import Directive, Option, Token
from kdns.dns import types as t
from kdns.dns.message import AA, FOREVER, RR, TC, Query, Reply
from kdns.dns.name import ROOT, is_subdomain, labels_of
from kdns.dns.reverse import IN_ADDR, IP6_ARPA, address_of
from kdns.plugins.kubernetes_latency import ProgrammingLatency
from kdns.plugins.kubernetes_why import Reasons, Why, no_transfer, not_synced, of_target
from kdns.plugins.plugin import Ask, Feed, Outcome, Plugin, Work
from kdns.plugins.setup import Setup
from kdns.registry.endpoints import address_key
from kdns.registry.objects import Key
from kdns.registry.selectors import BadSelector, parse_selector
from kdns.registry.snapshot import Changes, Snapshot
from kdns.registry.spec import KubeSpec, ManifestSpec
from kdns.zone import cluster as c
from kdns.zone.cluster import ClusterOptions, ClusterRecords, Found, join
from kdns.zone.records import SVC, Node, ServiceRecords, transfer_records

MAX_CNAMES = 10  # CoreDNS maxCnameChainLength
VERSION_TTL = 28800  # fixed by CoreDNS, not the `ttl` option (reference 1.8)
SCHEMA_VERSION = b"1.1.0"  # DNS spec 2.2
NS_DNS = b"\x02ns\x03dns"
HOSTMASTER = b"\x0ahostmaster"
REVERSE = (IN_ADDR, IP6_ARPA)
DEFAULT_TTL = 5
# Labels left of the zone that an answer for all names below may go by: in each number of them
# that there is, the packet cache looks for one.
FURTHEST = 6
# Three bookmarks, which an API server sends about every minute, have not come: what is
# answered may be out of date.
STALE = 180.0  # seconds

Dep = Hashable
Lookup: TypeAlias = Callable[[list[bytes]], Found]


class Kubernetes(Plugin):
    """Answers for its zones; passes everything else on."""

    word = "kubernetes"

    def __init__(
        self,
        zones: Sequence[bytes],
        options: ClusterOptions,
        source: KubeSpec | ManifestSpec,
        *,
        fallthrough: tuple[bytes, ...] | None = None,
        startup_timeout: float = 5.0,
        local_addresses: tuple[bytes, ...] = (),
        host_search: tuple[bytes, ...] = (),
        latency: ProgrammingLatency | None = None,
        multicluster: Sequence[bytes] = (),
    ) -> None:
        self.zones = frozenset(zones)
        # CoreDNS: zones below a multicluster zone are such, too.
        self._multicluster = frozenset(
            zone for zone in zones if any(is_subdomain(zone, m) for m in multicluster)
        )
        self.primary = primary_zone(zones)
        self.options = options
        self.source = source
        self.fallthrough = fallthrough
        self.startup_timeout = startup_timeout
        self.local_addresses = local_addresses
        self.host_search = host_search
        self.latency = latency
        # Seconds since the source was last heard of; app.py puts its pipeline's here.
        self.source_age: Callable[[], float | None] = lambda: None
        self.records = ClusterRecords(options)
        self._reasons = Reasons(self.records)
        self._explains = True
        self._tells_below: frozenset[bytes] = frozenset()
        self._kept: frozenset[bytes] = frozenset()  # zones of which a `cache` keeps answers
        self._lookups: dict[bytes, Lookup] = {
            zone: self.records.lookup_imported
            if zone in self._multicluster
            else self.records.lookup
            for zone in zones
        }
        # The zone a name is in is the longest that holds it.
        self._longest_first = sorted(self.zones, key=len, reverse=True)
        self._strict = options.strict
        # `namespaces` filters PTR answers, so these depend on the namespaces named.
        self._exposed = tuple((name.lower().encode(),) for name in sorted(options.namespaces))
        self._ttl = options.ttl
        self._reverse = frozenset(z for z in zones if z.endswith((IN_ADDR, IP6_ARPA)))
        self._soa: dict[bytes, RR] = {}  # of the serials of the last snapshot
        # zone -> (falls through whatever the name, zones below it that do)
        self._falls = {zone: _falls(zone, fallthrough) for zone in zones}

    @property
    def gate_state(self) -> Callable[[Key], str]:
        """What keeps a Service's rules from the kernel: "" nothing, "waiting": it is not shown
        until they are there, "open": it is shown all the same. app.py puts its gate's here."""
        return self._reasons.gate_state

    @gate_state.setter
    def gate_state(self, state: Callable[[Key], str]) -> None:
        self._reasons.gate_state = state

    # --- what app.py does for it --------------------------------------------------------

    def link(self, chain: Sequence[Plugin]) -> None:
        self._explains = all(plugin.explains for plugin in chain)
        self._kept = frozenset(
            zone for zone in self.zones if any(plugin.keeps(zone) for plugin in chain)
        )
        above = chain[: chain.index(self)]
        self._tells_below = frozenset(
            zone
            for zone in self.zones
            if self._is_uniform(zone) and not any(plugin.heeds(zone) for plugin in above)
        )

    def _is_uniform(self, zone: bytes) -> bool:
        """True if all names of a zone are looked up in the same way."""
        return not (
            zone in self._multicluster
            or self._falls[zone][1]
            or any(zone.endswith(one) or one.endswith(zone) for one in REVERSE)
            or any(other != zone and is_subdomain(other, zone) for other in self.zones)
        )

    def work(self) -> Sequence[Work]:
        return (Feed(self.source, self.publish, self.glance),)

    def publish(self, snapshot: Snapshot, changes: Changes, now: float) -> Sequence[Dep] | None:
        """Take over a snapshot; return the deps of answers that may be different now."""
        was_synced = self.records.synced
        deps = self.records.update(snapshot, changes)
        self._soa.clear()
        if self.latency is not None:
            self.latency.observe(snapshot, changes, self.gate_state)
        if snapshot.synced != was_synced:
            return None
        return deps

    def glance(self, snapshot: Snapshot, changes: Changes, now: float) -> Sequence[Dep]:
        """Take of a snapshot what /ready and the metrics tell, where other processes answer."""
        self.records.synced = snapshot.synced
        if self.latency is not None:
            self.latency.observe(snapshot, changes, self.gate_state)
        return ()

    def not_ready(self) -> str:
        return "" if self.records.synced else "waiting for the registry to be listed once"

    def stale(self) -> str:
        age = self.source_age()
        if age is None or age < STALE:
            return ""
        who = "API server" if isinstance(self.source, KubeSpec) else "manifests"
        return f"no word from the {who} for {age:.0f} s"

    def on_reply(self, query: Query, reply: Reply) -> Reply:
        # Only what was passed on comes back up this way: that one of our names is not there
        # is true until it comes, and whoever answered for it below does not know of that.
        if reply.keep and any(suffix in self.zones for suffix in _suffixes(query.key)):
            reply.keep = 0.0
        return reply

    # --- answering ----------------------------------------------------------------------

    def on_query(self, query: Query) -> Outcome:
        key = query.key
        for zone_key in self._longest_first:
            if not key.endswith(zone_key):
                continue
            end = len(key) - len(zone_key)
            labels: list[bytes] = []
            at = 0
            while at < end:
                begin = at + 1
                at = begin + key[at]
                labels.append(key[begin:at])
            if at == end:
                break
            # Else what looks like the zone begins within a label.
        else:
            return None
        zone = query.name[end:]  # in the case it was typed
        outcome = self._answer(query, zone, labels, self._lookups[zone_key])
        if (
            (query.edns is not None or zone_key in self._kept)
            and outcome.__class__ is Reply
            and self._explains
        ):
            self._explain(query, zone, labels, zone_key, outcome)
        return outcome

    def _answer(self, query: Query, zone: bytes, labels: list[bytes], lookup: Lookup) -> Outcome:
        qtype = query.qtype
        if qtype == t.AXFR or qtype == t.IXFR:
            return Reply(t.REFUSED, flags=0)
        if qtype == t.PTR:
            return self._pointer(query, zone, labels, lookup)
        if not labels:
            return self._apex(query, zone)
        if qtype == t.SOA and not self._strict:
            # CoreDNS answers NODATA for the SOA of any name (reference 1.2).
            return self._negative(zone, t.NOERROR, ())
        return self._forward_name(query, zone, labels, lookup)

    # --- why (RFC 8914) -----------------------------------------------------------------

    def _explain(
        self, query: Query, zone: bytes, labels: list[bytes], zone_key: bytes, reply: Reply
    ) -> None:
        """Say of a reply why it is what it is; where a `cache` keeps it, let that ask again
        each time: it gives the answer to those who want no reason too."""
        about = (
            query.key, query.qtype, zone, labels, zone_key in self._multicluster, reply.rcode,
            bool(reply.answer),
        )  # fmt: skip
        if zone_key in self._kept:
            reply.why = partial(self._why, *about)
        if query.edns is not None:
            reply.explain(*self._why(*about))

    def _why(
        self, key: bytes, qtype: int, zone: bytes, labels: list[bytes], imported: bool,
        rcode: int, has_answer: bool,
    ) -> Why:  # fmt: skip
        reasons = self._reasons
        if has_answer:
            return reasons.degraded(labels, imported)
        if rcode == t.SERVFAIL:
            return not_synced(), ()
        if rcode == t.REFUSED:
            return no_transfer(), ()
        if key.endswith(REVERSE):
            packed = _address(key)
            if packed is None:
                return None, ()
            return reasons.no_address(packed, qtype) if rcode == t.NXDOMAIN else (None, ())
        if qtype == t.SOA and not self._strict:
            return None, ()  # any name has an answer like this (CoreDNS)
        return reasons.nothing(labels, qtype, zone, rcode, imported)

    def _forward_name(
        self, query: Query, zone: bytes, labels: list[bytes], lookup: Lookup
    ) -> Outcome:
        qtype = query.qtype
        if len(labels) == 1 and labels[0] == b"dns-version":
            return self._dns_version(query, zone)
        if len(labels) == 2 and labels[0] == b"ns" and labels[1] == b"dns":
            return self._default_ns(query, zone)
        if query.key.endswith(REVERSE) and not (len(labels) == 1 and labels[0] in (SVC, c.POD)):
            return self._reverse_name(query, zone)
        found, deps = lookup(labels)
        if isinstance(found, Node):
            reply = self._of_node(query, zone, found, deps)
            reply.folds = query.name, len(query.name) - len(zone)
            return reply
        if isinstance(found, c.External):
            return self._external(query, zone, found.records, deps)
        if found is c.EMPTY and (qtype != t.TXT or self._strict):
            return self._negative(zone, t.NOERROR, deps)
        # TXT at a name without records is NXDOMAIN in CoreDNS (#5736, reference 1.2).
        outcome = self._missing(query, zone, deps)
        if found is c.MISSING and outcome.__class__ is Reply:
            outcome.below = self._below(query, zone, labels)
        return outcome

    def _below(self, query: Query, zone: bytes, labels: list[bytes]) -> int | None:
        """Return where in the name of a question one begins at and below which is nothing,
        for one reason."""
        if zone.lower() not in self._tells_below:
            return None
        count = self.records.missing_at(labels)
        if count and query.edns is not None and self._explains:
            count = max(count, self._reasons.reach(labels))
        if not 0 < count < len(labels) or count > FURTHEST:
            return None  # also if the name is the only one of its kind
        return len(query.name) - len(zone) - sum([1 + len(label) for label in labels[-count:]])

    def _of_node(self, query: Query, zone: bytes, node: Node, deps: tuple[Dep, ...]) -> Reply:
        qtype = query.qtype
        if qtype == t.A or qtype == t.AAAA:
            name = query.name
            answer = [rr.owned_by(name) for rr in node.addresses(qtype)]
            return self._positive(answer, [], deps, zone)
        if qtype == t.SRV:
            answer, extra = node.services(zone)
            return self._positive([rr.owned_by(query.name) for rr in answer], extra, deps, zone)
        return self._negative(zone, t.NOERROR, deps)

    def _positive(
        self, answer: list[RR], additional: list[RR], deps: tuple[Dep, ...], zone: bytes
    ) -> Reply:
        if not answer:
            return self._negative(zone, t.NOERROR, deps)
        reply = Reply(t.NOERROR, answer, None, list(additional), served_by="kubernetes")
        reply.deps = deps
        if self.records.synced:
            reply.keep = FOREVER
        return reply

    def _negative(self, zone: bytes, rcode: int, deps: tuple[Dep, ...]) -> Reply:
        reply = Reply(rcode, None, [self._soa_record(zone)], served_by="kubernetes")
        reply.deps = (c.SOA_DEP, *deps)
        if self.records.synced:
            reply.keep = FOREVER
        return reply

    def _missing(self, query: Query, zone: bytes, deps: tuple[Dep, ...]) -> Outcome:
        if not self.records.synced:
            # DESIGN 1.3 point 6: never deny what was not listed yet, never leak it upstream.
            return self._negative(zone, t.SERVFAIL, ())
        always, below = self._falls[zone.lower()]
        if always or (below and any(is_subdomain(query.key, z) for z in below)):
            return None
        reply = self._negative(zone, t.NXDOMAIN, deps)
        reply.folds = query.name, len(query.name) - len(zone)
        return reply

    def _soa_record(self, zone: bytes) -> RR:
        soa = self._soa.get(zone)
        if soa is None:
            # DNS names in any case: the cache is bounded so that 0x20 cannot fill memory.
            if len(self._soa) > 256:
                self._soa.clear()
            serial = self._serial(zone.lower())
            rdata = (
                NS_DNS + zone + HOSTMASTER + zone
                + pack("!LLLLL", serial & 0xFFFFFFFF, 7200, 1800, 86400, self._ttl)
            )  # fmt: skip
            soa = self._soa[zone] = RR(zone, t.SOA, min(self._ttl, 300), rdata)
        return soa

    def _serial(self, zone_key: bytes) -> int:
        records = self.records
        return records.imports_serial if zone_key in self._multicluster else records.serial

    def _apex(self, query: Query, zone: bytes) -> Outcome:
        qtype = query.qtype
        if qtype == t.SOA:
            reply = Reply(t.NOERROR, [self._soa_record(zone)], served_by="kubernetes")
            if self.records.synced:
                reply.keep = FOREVER
                reply.deps = (c.SOA_DEP,)
            return reply
        if qtype == t.NS and (query.name == query.key or self._strict):
            # An apex typed in mixed case gets NODATA from CoreDNS (reference 1.2).
            names, glue = self._ns_records(zone, self._ttl)
            if names:
                return Reply(t.NOERROR, names, None, glue, served_by="kubernetes")
        if qtype == t.TXT and not self._strict:
            return self._missing(query, zone, ())
        return self._negative(zone, t.NOERROR, ())

    def _dns_version(self, query: Query, zone: bytes) -> Outcome:
        if query.qtype == t.TXT:
            rdata = bytes((len(SCHEMA_VERSION),)) + SCHEMA_VERSION
            reply = Reply(
                t.NOERROR, [RR(query.name, t.TXT, VERSION_TTL, rdata)], served_by="kubernetes"
            )
            reply.keep = FOREVER
            return reply
        if self._strict:
            return self._negative(zone, t.NOERROR, ())
        return self._missing(query, zone, ())

    # --- the zone's own name server (reference 1.10) ------------------------------------

    def _server_names(self, zone: bytes) -> list[tuple[bytes, bytes]]:
        """Return (name, packed address) of this server as the cluster sees it."""
        out: list[tuple[bytes, bytes]] = []
        for records in self.records.services_of(self.local_addresses):
            if records.headless:
                out += [(join(i.target, zone), i.packed) for i in records.endpoints]
            else:
                owner = join((records.name, records.namespace, SVC), zone)
                out += [(owner, packed) for packed in records.addresses]
        if not out:
            out = [(NS_DNS + zone, packed) for packed in self.local_addresses]
        return list(dict.fromkeys(out))

    def _ns_records(self, zone: bytes, glue_ttl: int) -> tuple[list[RR], list[RR]]:
        servers = self._server_names(zone)
        names = list(dict.fromkeys(name for name, _ in servers))
        return (
            [RR(zone, t.NS, self._ttl, name) for name in names],
            [
                RR(name, t.A if len(packed) == 4 else t.AAAA, glue_ttl, packed)
                for name, packed in servers
            ],
        )

    def _default_ns(self, query: Query, zone: bytes) -> Outcome:
        qtype = query.qtype
        if qtype == t.TXT and not self._strict:
            return self._missing(query, zone, ())
        if qtype == t.A or qtype == t.AAAA:
            size = 4 if qtype == t.A else 16
            answer = [
                RR(query.name, qtype, self._ttl, packed)
                for _, packed in self._server_names(zone)
                if len(packed) == size
            ]
            reply = Reply(t.NOERROR, answer, served_by="kubernetes")
            if not answer:
                reply = self._negative(zone, t.NOERROR, ())
            # Which Services this server stands behind is in no dep.
            reply.keep = 0.0
            return reply
        return self._negative(zone, t.NOERROR, ())

    # --- ExternalName (reference 1.5) ---------------------------------------------------

    def _external(
        self, query: Query, zone: bytes, records: ServiceRecords, deps: tuple[Dep, ...]
    ) -> Outcome:
        target = records.cname
        assert target is not None
        if query.qtype == t.CNAME:
            answer = [RR(query.name, t.CNAME, self._ttl, target)]
            return self._positive(answer, [], deps, zone)
        if query.qtype != t.A and query.qtype != t.AAAA and not self._strict:
            return self._negative(zone, t.NOERROR, deps)
        return self._follow(query, zone, query.name, target, [], deps)

    def _follow(
        self,
        query: Query,
        zone: bytes,
        owner: bytes,
        target: bytes,
        chain: list[RR],
        deps: tuple[Dep, ...],
    ) -> Outcome:
        """Add owner -> target to the chain and go after the target."""
        zone_key = zone.lower()
        for _ in range(MAX_CNAMES + 1):
            link = RR(owner, t.CNAME, self._ttl, target)
            key = target.lower()
            if key == owner.lower() or any(
                r.rdata.lower() == key and r.name.lower() == owner.lower() for r in chain
            ):
                return self._negative(zone, t.NOERROR, deps)
            chain = [*chain, link]
            if not is_subdomain(key, zone_key):
                return self._ask_outside(query, chain, target, deps)
            labels = labels_of(key)[: -len(labels_of(zone_key)) or None]
            found, more = self.records.lookup(labels)
            deps = (*deps, *more)
            if isinstance(found, Node):
                answer = [rr.owned_by(target) for rr in self._of_type(found, query.qtype, zone)]
                if not answer and not self._strict:
                    return self._negative(zone, t.NOERROR, deps)
                return self._positive([*chain, *answer], [], deps, zone)
            if not isinstance(found, c.External):
                if self._strict:  # RFC 1034 s3.6.2: the CNAME itself is an answer
                    return self._positive(chain, [], deps, zone)
                return self._negative(zone, t.NOERROR, deps)
            owner, target = target, found.target
        return self._negative(zone, t.NOERROR, deps)

    def _of_type(self, node: Node, qtype: int, zone: bytes) -> list[RR]:
        if qtype == t.A or qtype == t.AAAA:
            return node.addresses(qtype)
        return node.services(zone)[0] if qtype == t.SRV else []

    def _ask_outside(
        self, query: Query, chain: list[RR], target: bytes, deps: tuple[Dep, ...]
    ) -> Outcome:
        def then(reply: Reply | None) -> Outcome:
            answer = reply.answer if reply is not None else []
            truncated = reply.flags & TC if reply is not None else 0
            # The target's rcode is lost: NOERROR with the CNAME alone (reference 1.5).
            outcome = Reply(
                t.NOERROR, [*chain, *answer], flags=AA | truncated, served_by="kubernetes"
            )
            outcome.deps = deps
            outcome.upstream = reply.upstream if reply is not None else ""
            if query.edns is not None and reply is not None and self._explains:
                outcome.ede = of_target(target, reply.rcode, bool(answer), reply.ede)
            return outcome

        return Ask(query.asking(target), then)

    # --- reverse names (reference 1.7) --------------------------------------------------

    def _pointer(self, query: Query, zone: bytes, labels: list[bytes], lookup: Lookup) -> Outcome:
        """Answer a PTR question, whichever of our zones it lies in: the whole name decides."""
        packed = _address(query.key)
        if packed is None:
            # Not the name of an address: does it exist as something else? `ns.dns` does not,
            # for PTR (CoreDNS).
            if not labels or (self._strict and labels == [b"ns", b"dns"]):
                return self._negative(zone, t.NOERROR, ())
            if labels == [b"ns", b"dns"]:
                return self._missing(query, zone, ())
            return self._forward_name(query, zone, labels, lookup)
        pointers = self.records.pointers(packed)
        deps = (address_key(packed), *self._exposed)
        if not pointers:
            return self._missing(query, zone, deps)
        answer = [
            RR(query.name, t.PTR, self._ttl, join(target, self.primary)) for target in pointers
        ]
        return self._positive(answer, [], deps, zone)

    def _reverse_name(self, query: Query, zone: bytes) -> Outcome:
        """Answer for other types than PTR, and for names that are no whole address."""
        packed = _address(query.key)
        deps: tuple[Dep, ...] = () if packed is None else (address_key(packed), *self._exposed)
        if not self._strict:
            return self._missing(query, zone, deps)
        if packed is not None:
            exists = bool(self.records.pointers(packed))
        else:
            exists = self.records.has_reverse_below(query.key)
        if exists:
            outcome: Outcome = self._negative(zone, t.NOERROR, deps)
        else:
            outcome = self._missing(query, zone, deps)
        if packed is None and isinstance(outcome, Reply):
            outcome.keep = 0.0  # what lies below it is in no dep
        return outcome

    # --- for other plugins --------------------------------------------------------------

    def autopath_search(self, client: str, key: bytes) -> list[bytes] | None:
        """Return the search list of the Pod at `client` for a question `key`, ending in the
        empty element; None if there is no such Pod or the name is not ours (1.13)."""
        zone = next((z for z in _suffixes(key) if z in self.zones), None)
        pod = self.records.pod_at(client)
        if zone is None or pod is None:
            return None
        namespace = pod.metadata.namespace.encode()
        svc = b"\x03svc" + zone
        return [
            bytes((len(namespace),)) + namespace + svc, svc, zone, *self.host_search, ROOT
        ]  # fmt: skip

    def transfer_records(self, zone: bytes) -> tuple[int, Iterator[RR]] | None:
        """Return (serial, all records of a zone with its SOA first and last), or None if the
        zone is not ours or not listed yet (reference 1.14)."""
        if zone not in self.zones or not self.records.synced:
            return None
        return self._serial(zone), self._transfer(zone)

    def _transfer(self, zone: bytes) -> Iterator[RR]:
        soa = self._soa_record(zone)
        yield soa
        names, glue = self._ns_records(zone, 0)
        yield from names
        yield from glue
        if zone not in self._reverse:
            imported = zone in self._multicluster
            for records in self.records.imports() if imported else self.records.services():
                yield from transfer_records(records, zone)
        yield soa


def _address(key: bytes) -> bytes | None:
    """Return the packed address a whole reverse name stands for, else None."""
    text = address_of(key)
    return None if text is None else c.parse_ip(text)


def _suffixes(key: bytes) -> Iterator[bytes]:
    at = 0
    while key[at]:
        yield key[at:]
        at += key[at] + 1
    yield ROOT


def _falls(zone: bytes, fallthrough: tuple[bytes, ...] | None) -> tuple[bool, list[bytes]]:
    if fallthrough is None:
        return False, []
    return (
        any(is_subdomain(zone, z) for z in fallthrough),
        [z for z in fallthrough if z != zone and is_subdomain(z, zone)],
    )


def primary_zone(zones: Sequence[bytes]) -> bytes:
    """Return the zone that PTR targets lie in: the first that is no reverse zone (1.7)."""
    return next((z for z in zones if not c.is_reverse_zone(z)), zones[0])


# --- setup ---------------------------------------------------------------------------------

_GONE = {
    "upstream": "ExternalName targets are resolved by this server itself; delete the line",
    "resyncperiod": "kdns never needs to list again on a timer; delete the line",
}


def setup(directives: Sequence[Directive], cx: Setup) -> list[Plugin]:
    """Build the plugin of a `kubernetes [ZONES...] { ... }` directive."""
    directive = cx.once(directives)
    zones = list(dict.fromkeys(cx.zones(directive.args)))
    if not zones:
        return []
    if all(c.is_reverse_zone(z) for z in zones):
        cx.problems.error(
            directive.word,
            "non-reverse zone name must be used: name the cluster's zone too, as in"
            " 'kubernetes cluster.local in-addr.arpa ip6.arpa'",
        )
        return []
    reader = _Reader(directive, cx)
    for option in directive.options or ():
        read = getattr(reader, "read_" + option.name, None)
        if option.name in _GONE:
            cx.problems.warn(option.word, f"'{option.name}' is gone: {_GONE[option.name]}")
        elif read is None:
            cx.unknown_option(option, _Reader.known())
        else:
            read(option)
    source = reader.source()
    if source is None:
        return []
    return [
        Kubernetes(
            zones,
            ClusterOptions(**reader.answers),
            source,
            fallthrough=reader.fallthrough,
            startup_timeout=reader.startup_timeout,
            local_addresses=cx.facts.local_addresses,
            host_search=cx.facts.host_search,
            latency=ProgrammingLatency(cx.metrics, cx.wall),
            multicluster=reader.multicluster(zones),
        )
    ]


class _Reader:
    """Reads the options; one method an option."""

    def __init__(self, directive: Directive, cx: Setup) -> None:
        self.directive = directive
        self.cx = cx
        self.answers: dict[str, Any] = {"ttl": DEFAULT_TTL}
        self.api: dict[str, Any] = {}
        self.manifests: dict[str, Any] = {}
        self.fallthrough: tuple[bytes, ...] | None = None
        self.startup_timeout = 5.0
        self.imported: list[Token] = []  # multicluster zones
        self.seen: dict[str, Option] = {}

    @classmethod
    def known(cls) -> list[str]:
        return [name[5:] for name in dir(cls) if name.startswith("read_")]

    def source(self) -> KubeSpec | ManifestSpec | None:
        """Return where objects come from; report options that contradict each other."""
        cx, seen = self.cx, self.seen
        if "namespaces" in seen and "namespace_labels" in seen:
            cx.problems.error(
                seen["namespace_labels"].word,
                "namespaces and namespace_labels cannot both be set",
            )
        if "zonal" in seen and "noendpoints" in seen:
            cx.problems.error(
                seen["zonal"].word, "zonal requires the endpoints; remove noendpoints"
            )
        if not self.manifests.get("paths"):
            for name in ("service_cidr", "pod_cidr"):
                if name in seen:
                    cx.problems.error(seen[name].word, f"'{name}' needs 'manifests PATH...'")
            return KubeSpec(
                **self.api,
                want_endpoints=self.answers.get("endpoints", True),
                want_pods=self.answers.get("pods") == "verified",
                want_imports=bool(self.imported),
            )
        for name in ("endpoint", "tls", "kubeconfig"):
            if name in seen:
                cx.problems.error(
                    seen[name].word,
                    f"'{name}' names an API server, 'manifests' replaces one; keep one of them",
                )
        return ManifestSpec(**self.manifests)

    def read_ttl(self, option: Option) -> None:
        if self.cx.arg_count(option, 1, 1):
            self.answers["ttl"] = self.cx.integer(option.args[0], 0, 3600, "ttl")

    def read_pods(self, option: Option) -> None:
        if not self.cx.arg_count(option, 1, 1):
            return
        mode = option.args[0].text
        if mode not in ("disabled", "verified", "insecure"):
            self.cx.problems.error(
                option.args[0],
                f"wrong value for pods: {mode}, must be one of: disabled, verified, insecure",
            )
            return
        self.answers["pods"] = mode

    def read_endpoint_pod_names(self, option: Option) -> None:
        if self.cx.no_args(option):
            self.answers["endpoint_pod_names"] = True

    def read_noendpoints(self, option: Option) -> None:
        self.seen["noendpoints"] = option
        if self.cx.no_args(option):
            self.answers["endpoints"] = False

    def read_ignore(self, option: Option) -> None:
        if not self.cx.arg_count(option, 1, 1):
            return
        if option.args[0].text != "empty_service":
            self.cx.problems.error(
                option.args[0],
                f"unable to parse ignore value: '{option.args[0]}'; use 'ignore empty_service'",
            )
            return
        self.answers["ignore_empty_service"] = True

    def read_namespaces(self, option: Option) -> None:
        self.seen["namespaces"] = option
        if self.cx.arg_count(option, 1):
            old = self.answers.get("namespaces", frozenset())
            self.answers["namespaces"] = old | {a.text for a in option.args}

    def read_namespace_labels(self, option: Option) -> None:
        self.seen["namespace_labels"] = option
        if not self.cx.arg_count(option, 1):
            return
        try:
            self.answers["namespace_selector"] = parse_selector(
                " ".join(a.text for a in option.args)
            )
        except BadSelector as e:
            self.cx.problems.error(option.args[0], f"unable to parse namespace_labels: {e}")

    def read_labels(self, option: Option) -> None:
        if not self.cx.arg_count(option, 1):
            return
        text = " ".join(a.text for a in option.args)
        try:
            parse_selector(text)
        except BadSelector as e:
            self.cx.problems.error(option.args[0], f"unable to parse labels: {e}")
            return
        self.api["label_selector"] = text
        self.manifests["label_selector"] = text

    def read_fallthrough(self, option: Option) -> None:
        self.fallthrough = self.cx.zones(option.args) if option.args else (ROOT,)

    def read_zonal(self, option: Option) -> None:
        self.seen["zonal"] = option
        if self.cx.no_args(option):
            self.answers["zonal"] = True

    def read_spec(self, option: Option) -> None:
        """`spec strict`: the DNS specification 1.1.0 where CoreDNS differs from it."""
        if not self.cx.arg_count(option, 1, 1):
            return
        if option.args[0].text not in ("strict", "coredns"):
            self.cx.problems.error(
                option.args[0], f"'spec' takes strict or coredns, found '{option.args[0]}'"
            )
            return
        self.answers["strict"] = option.args[0].text == "strict"

    def read_startup_timeout(self, option: Option) -> None:
        if self.cx.arg_count(option, 1, 1):
            self.startup_timeout = self.cx.duration(option.args[0])

    def read_endpoint(self, option: Option) -> None:
        self.seen["endpoint"] = option
        if not self.cx.arg_count(option, 1):
            return
        if len(option.args) > 1:
            self.cx.problems.warn(
                option.args[1], f"only the first endpoint, '{option.args[0]}', is used"
            )
        self.api["endpoint"] = option.args[0].text

    def read_tls(self, option: Option) -> None:
        self.seen["tls"] = option
        if self.cx.arg_count(option, 3, 3):
            cert, key, ca = (self.cx.path(a.text) for a in option.args)
            self.api["tls"] = (cert, key, ca)

    def read_kubeconfig(self, option: Option) -> None:
        self.seen["kubeconfig"] = option
        if self.cx.arg_count(option, 1, 2):
            self.api["kubeconfig"] = self.cx.path(option.args[0].text)
            if len(option.args) == 2:
                self.api["context"] = option.args[1].text

    def read_apiserver_qps(self, option: Option) -> None:
        self._unneeded(option)

    def read_apiserver_burst(self, option: Option) -> None:
        self._unneeded(option)

    def read_apiserver_max_inflight(self, option: Option) -> None:
        self._unneeded(option)

    def _unneeded(self, option: Option) -> None:
        """kdns makes one list and one watch request a kind; there is no rate to limit."""
        if self.cx.arg_count(option, 1, 1):
            try:
                if float(option.args[0].text) < 0:
                    raise ValueError
            except ValueError:
                self.cx.problems.error(
                    option.args[0], f"invalid {option.name} '{option.args[0]}': must be >= 0"
                )

    def read_multicluster(self, option: Option) -> None:
        """`multicluster ZONE...`: there the Services are those that the cluster set shares."""
        if self.cx.arg_count(option, 1):
            self.imported += option.args
            self.answers["imports"] = True

    def multicluster(self, served: Sequence[bytes]) -> list[bytes]:
        """Return the multicluster zones; report those that are not served."""
        zones: list[bytes] = []
        for token in self.imported:
            for zone in self.cx.zone(token):
                zones.append(zone)
                if zone not in served:
                    self.cx.problems.error(
                        token,
                        f"multicluster zone '{token}' is not served; name it on the line of"
                        f" '{self.directive.name}' too",
                    )
        return zones

    def read_manifests(self, option: Option) -> None:
        """`manifests PATH...`: files or folders in place of a cluster."""
        if self.cx.arg_count(option, 1):
            old = self.manifests.get("paths", ())
            self.manifests["paths"] = (*old, *[self.cx.path(a.text) for a in option.args])

    def read_service_cidr(self, option: Option) -> None:
        self._cidr(option)

    def read_pod_cidr(self, option: Option) -> None:
        self._cidr(option)

    def _cidr(self, option: Option) -> None:
        self.seen[option.name] = option
        if not self.cx.arg_count(option, 1, 1):
            return
        try:
            ipaddress.ip_network(option.args[0].text)
        except ValueError as e:
            self.cx.problems.error(option.args[0], f"'{option.name}' takes a CIDR: {e}")
            return
        self.manifests[option.name] = option.args[0].text
