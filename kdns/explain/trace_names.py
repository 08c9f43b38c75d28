"""The first half of a trace: from a name to an address, or why there is none.

Decides what a name that is not there was meant to be (a Service of another namespace, an
endpoint of a headless one, a name outside), and so what to do about it. What a name is answered
is search.py's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from kdns.dns.name import BadName, parse_name
from kdns.errors import ConfigError, Problem
from kdns.explain import search as s
from kdns.explain.search import Answer, Libc, NoAnswer, Resolver, Search, Tried
from kdns.explain.trace_endpoints import (
    look_at_headless,
    slices_of,
    why_none,
)
from kdns.explain.trace_findings import Finding
from kdns.explain.trace_state import (
    FAMILIES,
    MOST_NAMES,
    End,
    Place,
    Sight,
    is_headless,
    nearest,
    some,
)
from kdns.registry.endpoints import canonical_address, published
from kdns.registry.objects import Key, Service, key_of


class NameWay(Sight):
    """Finds the address of a name."""

    def resolve(self) -> str:
        """Return the address a name leads to; "" if it ends before."""
        trace, request = self.trace, self.request
        try:
            parse_name(request.name.rstrip(".") + ".")
        except (BadName, UnicodeError) as e:
            raise ConfigError([Problem(request.name, 0, f"is not a domain name: {e}")]) from None
        resolver = self._resolver()
        trace.resolver = resolver
        alias = resolver.hosts.get(request.name.lower().rstrip("."))
        if alias:
            trace.found(
                Finding(
                    "host-alias",
                    f"hostAliases of Pod {self.client.name} say {request.name} is {alias}; DNS is"
                    " not asked",
                    "take the name out of spec.hostAliases if DNS is to answer",
                    stops=False,
                )
            )
            return alias
        if not resolver.cluster and not self._asks_cluster(resolver):
            self._not_our_dns(resolver)
            return ""
        trace.search = self._search(request.libc, resolver)
        if trace.end or trace.stop:
            return ""
        # Computed against computed: what a server answers is not for two libcs to differ about.
        ours = trace.search
        if ours.tried[0].real is not None:
            ours = s.search(request.name, resolver, request.libc, self.names.ask)
        other: Libc = "musl" if request.libc == "glibc" else "glibc"
        trace.other = s.search(request.name, resolver, other, self.names.ask)
        self._compare_libcs(ours, trace.other)
        self._compare_real(trace.search)
        if trace.stop:
            return ""
        return self._told(trace.search)

    def _resolver(self) -> Resolver:
        spec = None
        if self.client.kind != "outside" and "/" in self.client.name:
            namespace, _, name = self.client.name.partition("/")
            spec = self.evidence.pod_spec((namespace, name))
        resolver = s.resolver_of(self.client.namespace, self.names.domain, spec)
        if self.client.kind == "pod" or "/" in self.client.name:
            return resolver
        # A node, or somebody outside: who asks our server, by full names.
        return Resolver((), 1, "none", True, (), {}, "not a Pod: names are asked for as they are")

    def _asks_cluster(self, resolver: Resolver) -> bool:
        """True if a nameserver that dnsConfig names is the cluster's own."""
        known = {server.address for server in self.evidence.ask}
        for name in ("kube-dns", "coredns", "kdns"):
            service = self.snapshot.services.get("kube-system", {}).get(name)
            if service is not None:
                known |= {service.spec.cluster_ip, *(service.spec.cluster_ips or ())}
        return any(address in known for address in resolver.nameservers)

    def _not_our_dns(self, resolver: Resolver) -> None:
        trace = self.trace
        whom = ", ".join(resolver.nameservers) or "its node's nameservers"
        meant = self._meant()
        if meant is None:
            trace.end = End("outside", f"the Pod asks {whom}; what they answer is not known here")
            return
        trace.found(
            Finding(
                "no-cluster-dns",
                f"Pod {self.client.name} asks {whom} ({resolver.why}), which do not know names of"
                " the cluster",
                "set dnsPolicy to ClusterFirstWithHostNet"
                if resolver.why.startswith("hostNetwork")
                else "set dnsPolicy to ClusterFirst",
            )
        )

    def _search(self, libc: Libc, resolver: Resolver) -> Search:
        real = None
        if self.evidence.ask:
            server = self.evidence.ask[0]

            def real(name: str) -> Answer:
                return s.ask_server(server, name)

        try:
            return s.search(self.request.name, resolver, libc, self.names.ask, real)
        except NoAnswer as e:
            self.trace.found(
                Finding(
                    "dns-no-answer",
                    str(e),
                    "start the DNS server, or let its port through; --server names another",
                )
            )
            return s.search(self.request.name, resolver, libc, self.names.ask)

    def _compare_libcs(self, ours: Search, other: Search) -> None:
        if ours.state == other.state and ours.ended.answer.name == other.ended.answer.name:
            return
        # A name of the cluster that an upstream is asked for is as good as not found.
        lost = ["nodata", "nxdomain", "failed", *(["unknown"] if self._meant() else [])]
        stops = other.state == "found" and ours.state in lost
        if not stops and not (ours.state == "found" and other.state in lost):
            return
        finds, not_finds = (other, ours) if stops else (ours, other)
        why = _why_no_search(not_finds, self.request.name)
        full = finds.ended.answer.name
        self.trace.found(
            Finding(
                "libc-differs",
                f"{not_finds.libc} does not find {self.request.name}, {finds.libc} does: {why}",
                f"write the full name, {full}, which both ask for as it is",
                stops=stops,
            )
        )

    def _compare_real(self, found: Search) -> None:
        """Hold the server's answer against the computed one."""
        differing = [one for one in found.tried if _differs(one)]
        if not differing or (real := differing[0].real) is None:
            return
        ended, computed = differing[0], differing[0].answer
        status = self.evidence.status or {}
        if status and not status.get("synced", True):
            self.trace.found(
                Finding(
                    "not-synced",
                    f"kdns answers {real.rcode} to {ended.answer.name}: it has not listed the"
                    " registry yet",
                    "see its log for why the API server cannot be listed",
                )
            )
            return
        key = self.key_in(computed)
        if key is not None and self._gate_waits(key):
            return
        self.trace.found(
            Finding(
                "dns-differs",
                f"{real.plugin} answers {_say(real)} to {real.name}, the registry says"
                f" {_say(computed)}" + (f" ({real.error})" if real.error else ""),
                "the server lags behind, or answers by another Corefile: kdns check tells more",
                stops=found.state != "found",
            )
        )

    def _gate_waits(self, key: Key) -> bool:
        """Note if kdns withholds a name, or shows it early."""
        name = "/".join(key)
        gate = (self.evidence.status or {}).get("gate") or {}
        for one in gate.get("waiting") or ():
            if isinstance(one, Mapping) and one.get("service") == name:
                self.trace.found(
                    Finding(
                        "gate-waiting",
                        f"kdns withholds Service {name} for {one.get('seconds', 0):.1f} s now:"
                        " its rules are not in the kernel yet",
                        f"it is shown after {gate.get('timeout', 2)} s at the latest; if it often"
                        " takes long, see kdns's log for why rules cannot be written",
                    )
                )
                return True
        if name in (gate.get("published_unprogrammed") or ()):
            self.trace.found(
                Finding(
                    "gate-open",
                    f"kdns shows Service {name}, though its rules are not in the kernel",
                    "see kdns's log for why rules cannot be written",
                    stops=False,
                )
            )
        return False

    def _told(self, found: Search) -> str:
        """Go on with what the search came to."""
        trace = self.trace
        ended = found.ended
        answer = ended.answer
        if found.state == "found":
            self._note_vain(found)
            trace.owners = tuple(self.owners_of(answer))
            key = self.key_in(answer)
            if key is not None:
                trace.service = self.service_at(key)
                self._gate_waits(key)
            addresses = (ended.real or answer).addresses
            if not addresses:
                self._outside(answer)
                return ""
            return self._choose(addresses)
        if found.state == "failed":
            said = (ended.real or answer).error
            trace.found(
                Finding(
                    "dns-failed",
                    f"{answer.name} is answered {(ended.real or answer).rcode}"
                    f"{said and ': ' + said}"
                    + ("" if answer.block else "; no server block of the Corefile is for it"),
                    f"see to {', '.join(answer.upstreams)}, whom the Corefile forwards it to"
                    if answer.upstreams
                    else "give the Corefile a server block and a plugin for that zone",
                )
            )
            return ""
        if found.state == "unknown":
            if self._diagnose(answer):
                return ""
            self._note_vain(found)
            asked = ", ".join(answer.upstreams)
            trace.end = End(
                "outside", f"{answer.name} is no name of the cluster: {asked} would be asked"
            )
            return ""
        if self._diagnose(answer):
            return ""
        trace.found(
            Finding(
                "name-not-answered",
                f"{answer.name} is answered {(ended.real or answer).rcode} without records",
                "nothing of that name is in the registry",
            )
        )
        return ""

    def _note_vain(self, found: Search) -> None:
        vain = [one for one in found.tried if one is not found.ended]
        plain = self.request.name.rstrip(".")
        ended = found.ended.answer
        asis = ended.name.rstrip(".").lower() == plain.lower()
        if asis and "." in plain and len(vain) >= 2 and found.state in ("found", "unknown"):
            self.trace.found(
                Finding(
                    "ndots-outside-name",
                    f"{plain} has fewer dots than ndots:"
                    f"{self.trace.resolver.ndots if self.trace.resolver else 5}, so {len(vain)}"
                    f" other names are asked for first, {2 * len(vain)} questions with AAAA",
                    f"write {plain}. with a final dot, or set ndots lower in dnsConfig",
                    stops=False,
                )
            )

    def _outside(self, answer: Answer) -> None:
        """The name stands for one outside: a CNAME, whose target an upstream knows."""
        trace = self.trace
        target = answer.aliases[-1] if answer.aliases else answer.name
        plain = target.rstrip(".")
        if canonical_address(plain) is not None:
            trace.found(
                Finding(
                    "external-name-is-address",
                    f"Service {self._service_name()} has externalName {plain}, an address: asked"
                    " for as a name, nobody has it",
                    "use a Service without selector and an EndpointSlice with that address",
                )
            )
            return
        trace.place = Place("outside", plain, self.request.port or 0, self.request.protocol)
        asked = ", ".join(answer.upstreams)
        trace.end = End(
            "outside",
            f"leads out of the cluster to {plain}"
            + (f", which {asked} would be asked for" if asked else ""),
        )

    def _service_name(self) -> str:
        return "/".join(key_of(self.trace.service)) if self.trace.service else "?"

    def _choose(self, addresses: Sequence[str]) -> str:
        """Return the address that is connected to: of the client's families, IPv4 first."""
        for family in FAMILIES:
            mine = self.client.address(family)
            found = [a for a in addresses if (":" in a) == (family == 6)]
            if mine and found:
                return found[0]
        has = " and ".join("IPv6" if ":" in a else "IPv4" for a in self.client.addresses)
        self.trace.found(
            Finding(
                "family-mismatch",
                f"{self.request.name} has {', '.join(addresses[:MOST_NAMES])}, and the client only"
                f" {has or 'no address'}",
                "give the Service both families: ipFamilyPolicy PreferDualStack",
            )
        )
        return ""

    # --- names that are not there -------------------------------------------------------

    def _meant(self) -> tuple[str, str, str] | None:
        """Return (endpoint, Service, namespace) that a name means in the cluster; None: it means
        none there."""
        plain = self.request.name.rstrip(".").lower()
        domain = self.names.domain.lower()
        for end in (f".svc.{domain}", ".svc"):
            if plain.endswith(end):
                labels = plain.removesuffix(end).split(".")
                return _split(labels, self.client.namespace)
        labels = plain.split(".")
        spaces = {name.lower() for name in self.snapshot.namespaces}
        here = {n.lower() for n in self.snapshot.services.get(self.client.namespace, {})}
        if len(labels) == 1:
            return "", labels[0], self.client.namespace
        if labels[-1] in spaces and len(labels) <= 3:
            return _split(labels, self.client.namespace)
        if len(labels) == 2 and labels[1] in here and not self._has(labels[0]):
            return labels[0], labels[1], self.client.namespace  # an endpoint of a Service here
        if len(labels) == 2 and self._has(labels[0]) and not _is_top_level(labels[1]):
            return "", labels[0], labels[1]
        return None

    def _has(self, name: str) -> list[str]:
        """Return the namespaces that have a Service of that name."""
        return sorted(
            space
            for space, services in self.snapshot.services.items()
            if any(one.lower() == name for one in services)
        )

    def _diagnose(self, answer: Answer) -> bool:
        """Say why a name of the cluster is not there. False: it means none of the cluster."""
        if self._diagnose_pod_name():
            return True
        meant = self._meant()
        if meant is None:
            return False
        endpoint, name, namespace = meant
        spaces = {one.lower(): one for one in self.snapshot.namespaces}
        if namespace not in spaces:
            others = self._has(name)
            hint = nearest(namespace, spaces) or ("" if not others else f"; {some(others)} has"
                                                   f" a Service {name}")  # fmt: skip
            self.trace.found(
                Finding(
                    "namespace-missing",
                    f"there is no namespace {namespace!r}{hint}",
                    f"write {name}.{others[0]}" if others
                    else f"kubectl create namespace {namespace}, or correct the name",
                )
            )  # fmt: skip
            return True
        space = spaces[namespace]
        service = self.service_at((space, name))
        if service is None:
            self._no_service(name, space)
            return True
        self.trace.service = service
        self._service_unanswered(service, endpoint, answer)
        return True

    def _diagnose_pod_name(self) -> bool:
        plain = self.request.name.rstrip(".").lower()
        domain = self.names.domain.lower()
        if not plain.endswith((f".pod.{domain}", ".pod")):
            return False
        off = [p for p in self.names.kubernetes if p.options.pods == "disabled"]
        self.trace.found(
            Finding(
                "pod-names-off" if off else "name-not-answered",
                f"{plain}: names of Pods are not answered, the Corefile's kubernetes has no"
                " 'pods insecure' or 'pods verified'"
                if off
                else f"no Pod has the address and namespace that {plain} says",
                "add 'pods insecure' to the Corefile, or use a Service"
                if off
                else "see the Pod's address: kubectl get pod -o wide",
            )
        )
        return True

    def _no_service(self, name: str, namespace: str) -> None:
        others = self._has(name)
        if others:
            self.trace.found(
                Finding(
                    "wrong-namespace",
                    f"namespace {namespace} has no Service {name!r}; {some(others)} has",
                    f"write {name}.{others[0]}",
                )
            )
            return
        here = sorted(self.snapshot.services.get(namespace, {}))
        hint = nearest(name, here)
        if not hint:
            has = some(here) if here else "none"
            hint = f"; its Services: {has}"
        self.trace.found(
            Finding(
                "no-such-service",
                f"there is no Service {name!r} in namespace {namespace}{hint}",
                f"correct the name, or kubectl -n {namespace} expose the Pods by that name",
            )
        )

    def _service_unanswered(self, service: Service, endpoint: str, answer: Answer) -> None:
        """Say why a name is not answered whose Service is there."""
        trace = self.trace
        key = "/".join(key_of(service))
        spec = service.spec
        options = [plugin.options for plugin in self.names.kubernetes]
        exposed = [
            one for one in options
            if not one.namespaces or service.metadata.namespace in one.namespaces
        ]  # fmt: skip
        if options and not exposed:
            trace.found(
                Finding(
                    "namespace-not-exposed",
                    f"the Corefile answers for namespaces"
                    f" {', '.join(sorted(options[0].namespaces))} only, not for"
                    f" {service.metadata.namespace}",
                    f"add {service.metadata.namespace} to 'namespaces' in its kubernetes block",
                )
            )
        elif spec.type == "ExternalName":
            self._bad_external_name(service)
        elif is_headless(service):
            self._headless_unanswered(service, endpoint)
        elif endpoint and not endpoint.startswith("_"):
            self._no_such_endpoint(service, endpoint)
        elif not any(canonical_address(ip) for ip in spec.cluster_ips or (spec.cluster_ip,)):
            trace.found(
                Finding(
                    "no-cluster-ip",
                    f"Service {key} has no ClusterIP",
                    "the API server gives one: was the Service applied to a cluster? For a"
                    " headless one write clusterIP: None",
                )
            )
        elif any(one.ignore_empty_service for one in options):
            cause = why_none(self.evidence, service, None, None, ())
            trace.found(
                Finding(
                    "empty-service-hidden",
                    f"the Corefile has 'ignore empty_service', and {cause.text}",
                    f"{cause.advice}; or take that line out of the Corefile",
                )
            )
        else:
            trace.found(
                Finding(
                    "name-not-answered",
                    f"Service {key} is there, but {answer.name} is answered"
                    f" {answer.rcode or 'by nobody'}",
                    f"ask for {service.metadata.name}.{service.metadata.namespace}.svc."
                    f"{self.names.domain}.",
                )
            )

    def _headless_unanswered(self, service: Service, endpoint: str) -> None:
        shown = list(published(slices_of(self.evidence, key_of(service))))
        if endpoint and shown:
            self._no_such_endpoint(service, endpoint)
            return
        self.trace.endpoints = look_at_headless(self.evidence, service)
        self.trace.found(why_none(self.evidence, service, None, None, self.trace.endpoints))

    def _no_such_endpoint(self, service: Service, endpoint: str) -> None:
        key = key_of(service)
        names = sorted(
            {
                entry.hostname or (entry.addresses[0].replace(".", "-").replace(":", "-")
                                   if entry.addresses else "")
                for one in slices_of(self.evidence, key)
                for entry in one.endpoints or ()
            }
        )  # fmt: skip
        self.trace.found(
            Finding(
                "no-such-endpoint",
                f"Service {'/'.join(key)} has no endpoint named {endpoint!r}"
                f"{nearest(endpoint, names)}; it has {some(names) if names else 'none'}",
                "an endpoint is named after its Pod where the Pod's hostname is set and its"
                f" subdomain is {key[1]!r}, as a StatefulSet with that serviceName does",
            )
        )

    def _bad_external_name(self, service: Service) -> None:
        key = "/".join(key_of(service))
        way, loops = self._external_way(service)
        if loops:
            self.trace.found(
                Finding(
                    "external-name-loop",
                    f"Service {key} leads back to itself: {' -> '.join(way)}",
                    "let one of these Services name a host that is not in the loop",
                )
            )
            return
        target = service.spec.external_name
        if canonical_address(target) is not None:
            self.trace.found(
                Finding(
                    "external-name-is-address",
                    f"Service {key} has externalName {target}, an address: asked for as a name,"
                    " nobody has it",
                    "use a Service without selector and an EndpointSlice with that address",
                )
            )
            return
        self.trace.found(
            Finding(
                "external-name-nowhere",
                f"Service {key} leads to {way[-1]}, which is no name of the cluster",
                f"correct spec.externalName: a full name, such as web.shop.svc.{self.names.domain}",
            )
        )

    def _external_way(self, service: Service) -> tuple[list[str], bool]:
        """Return the names that ExternalNames lead along, and whether they come round."""
        way = [self._full(key_of(service))]
        current: Service | None = service
        while current is not None and current.spec.type == "ExternalName":
            target = current.spec.external_name.rstrip(".").lower()
            if target in way:
                return [*way, target], True
            way.append(target)
            ending = f".svc.{self.names.domain}"
            if not target.endswith(ending):
                return way, False
            labels = target.removesuffix(ending).split(".")
            current = self.service_at((labels[-1], labels[0])) if len(labels) == 2 else None
        return way, False

    def _full(self, key: Key) -> str:
        return f"{key[1]}.{key[0]}.svc.{self.names.domain}".lower()


def _split(labels: Sequence[str], namespace: str) -> tuple[str, str, str]:
    """Return (endpoint, Service, namespace) of the labels left of ".svc"."""
    if len(labels) == 1:
        return "", labels[0], namespace
    return ".".join(labels[:-2]), labels[-2], labels[-1]


# What people write behind a dot, and no namespace is called.
_TOP_LEVEL: Final = frozenset(
    "com org net io dev local internal arpa lan home test example".split()
)


def _is_top_level(label: str) -> bool:
    return label in _TOP_LEVEL


def _differs(one: Tried) -> bool:
    """True if a server answers something else than is computed, as far as that is known."""
    computed, real = one.answer, one.real
    if real is None or computed.upstreams or computed.state == "unknown":
        return False
    return (real.state, sorted(real.addresses)) != (computed.state, sorted(computed.addresses))


def _say(answer: Answer) -> str:
    return ", ".join(answer.addresses) or answer.rcode or "nothing"


def _why_no_search(search: Search, name: str) -> str:
    """Say what ended a search that the other libc went on with."""
    if len(search.tried) == 1 and name.count(".") > 0 and search.libc == "musl":
        return "with as many dots as ndots it is asked for as it is, and no search is made"
    last = search.tried[-1]
    word = {"nodata": "is there without records", "failed": f"is answered {last.answer.rcode}"}
    said = word.get(last.state, "is not there")
    return f"{last.answer.name} {said}, and the search ends with it"
