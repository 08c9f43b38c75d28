"""The second half of a trace: from an address to an endpoint, or where a packet ends.

Decides whose an address is, which of its ports is meant, and which reason keeps a packet from
arriving where more than one could. Which endpoints count is trace_endpoints.py's to say, what
rules do trace_rules.py's.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from kdns.explain.evidence import Evidence
from kdns.explain.trace_endpoints import (
    Seen,
    check_declared,
    declared_ports,
    look_at_endpoints,
    look_at_headless,
    slices_of,
    why_none,
)
from kdns.explain.trace_findings import Finding
from kdns.explain.trace_rules import (
    Met,
    Node,
    decided,
    frontends_at,
    in_ranges,
    is_own_dns,
    listens,
    meet,
    node_addresses,
    node_for,
    origin_of,
    tracked,
)
from kdns.explain.trace_state import (
    End,
    Place,
    Sight,
    is_headless,
    pod_addresses,
    some,
)
from kdns.proxy import config as settings
from kdns.proxy.options import Family, NodeView
from kdns.proxy.table import Forwarding, Frontend
from kdns.registry.endpoints import canonical_address
from kdns.registry.objects import PROXY_NAME_LABEL, Service, ServicePort, key_of


class PacketWay(Sight):
    """Follows the first packet to an address."""

    def connect(self, address: str) -> None:
        """Go on with an address: a Service's, a node's, a Pod's, or nobody's here."""
        trace = self.trace
        family: Family = 6 if ":" in address else 4
        if not self.client.address(family):
            has = ", ".join(self.client.addresses) or "none"
            trace.found(
                Finding(
                    "family-mismatch",
                    f"{address} is an IPv{family} address, and the client has {has}",
                    "give the Service the family of its clients (spec.ipFamilies)",
                )
            )
            return
        node = self._node(address, family)
        service = trace.service or self._owner_of(node, address)
        trace.service = service
        if service is not None and not trace.owners:
            trace.owners = (self.owner_at("Service", key_of(service)),)
        if service is not None and is_headless(service):
            self._headless(service, address, family)
        elif service is not None:
            self._service_address(service, node, address)
        elif self._node_with(address):
            self._node_port(node, address)
        else:
            self._direct(address, family)

    def _node(self, address: str, family: Family) -> Node:
        """Return the node whose rules count: the client's; for a node's own address asked from
        elsewhere, that node's."""
        name = self.client.node or self.evidence.node
        other = self._node_with(address)
        if other and (self.client.kind == "outside" or other != self.client.node):
            name = other
        return node_for(self.evidence, name, family)

    def _node_with(self, address: str) -> str:
        """Return the Node that has an address; ""."""
        known = sorted({*self.snapshot.nodes, self.evidence.node} - {""})
        return next((n for n in known if address in node_addresses(self.evidence, n)), "")

    def _owner_of(self, node: Node, address: str) -> Service | None:
        """Return a Service that has an address: one with the port asked for, else any."""
        found: list[Service] = []
        for services in self.snapshot.services.values():
            for service in services.values():
                if address in _addresses_of(service):
                    found.append(service)
        if not found:
            return None
        port = self.request.port
        winners = frontends_at(node, address, port, self.request.protocol) if port else []
        if winners:
            return self.service_at(winners[0][0].key)
        found.sort(
            key=lambda one: (not any(p.port == port for p in one.spec.ports or ()), key_of(one))
        )
        return found[0]

    def _port_of(self, service: Service) -> ServicePort | None:
        """Return the Service port that is asked for; note what is wrong if there is none."""
        ports = service.spec.ports or []
        protocol = self.request.protocol.upper()
        key = "/".join(key_of(service))
        has = some([_port_text(p) for p in ports]) or "none"
        number = self.request.port
        if number is None:
            fitting = [p for p in ports if p.protocol == protocol] or ports
            if not fitting:
                self.trace.found(
                    Finding("port-not-in-service", f"Service {key} has no ports", "give it one")
                )
                return None
            if fitting[0].protocol != protocol:
                self._other_protocol(service, fitting[0])
                return None
            if len(ports) > 1:
                self.trace.found(
                    Finding(
                        "no-port-given",
                        f"no port is named: {fitting[0].port} is taken, of {has}",
                        f"write {self.request.name}:PORT",
                        stops=False,
                    )
                )
            return fitting[0]
        same = [p for p in ports if p.port == number]
        for port in same:
            if port.protocol == protocol:
                return port
        if same:
            self._other_protocol(service, same[0])
            return None
        self._no_such_port(service, number, has)
        return None

    def _other_protocol(self, service: Service, port: ServicePort) -> None:
        key = "/".join(key_of(service))
        flag = "--udp" if port.protocol == "UDP" else "no --udp"
        self.trace.found(
            Finding(
                "udp-tcp-mismatch",
                f"Service {key} has port {port.port} for {port.protocol} only, and"
                f" {self.request.protocol.upper()} is asked for",
                f"use {port.protocol} (kdns trace: {flag}), or give the Service a second port with"
                " the other protocol",
            )
        )

    def _no_such_port(self, service: Service, number: int, has: str) -> None:
        key = "/".join(key_of(service))
        for port in service.spec.ports or ():
            if port.node_port == number:
                self.trace.found(
                    Finding(
                        "port-is-node-port",
                        f"{number} is the port of Service {key} on nodes; its own is {port.port}",
                        f"use {self.request.name}:{port.port}, or a node's address with {number}",
                    )
                )
                return
            if number in self._targets(service, port):
                self.trace.found(
                    Finding(
                        "port-is-target-port",
                        f"{number} is the Pods' port behind Service {key}; its own is {port.port}",
                        f"use {self.request.name}:{port.port}, or set port: {number}",
                    )
                )
                return
        self.trace.found(
            Finding(
                "port-not-in-service",
                f"Service {key} has no port {number}; it has {has}",
                f"use one of these, or add port {number} to the Service",
            )
        )

    def _targets(self, service: Service, port: ServicePort) -> set[int]:
        if isinstance(port.target_port, int):
            return {port.target_port}
        return {
            p.port or 0
            for one in slices_of(self.evidence, key_of(service))
            for p in one.ports or ()
            if p.name == port.name
        }

    # --- a Service's address ------------------------------------------------------------

    def _service_address(self, service: Service, node: Node, address: str) -> None:
        trace = self.trace
        key = "/".join(key_of(service))
        if PROXY_NAME_LABEL in (service.metadata.labels or {}):
            trace.found(
                Finding(
                    "other-proxy",
                    f"Service {key} is labelled {PROXY_NAME_LABEL}="
                    f"{(service.metadata.labels or {})[PROXY_NAME_LABEL]}: kdns and kube-proxy"
                    " leave it to that proxy",
                    "see that proxy, or take the label off",
                )
            )
            return
        port = self._port_of(service)
        if port is None:
            return
        claims = frontends_at(node, address, port.port, self.request.protocol)
        mine = [c for c in claims if c[0].key == key_of(service)]
        if not mine:
            self._no_frontend(service, node, address, port)
            return
        if len(claims) > 1:
            winner = claims[0][0]
            others = some([one.name for one, _ in claims if one is not winner])
            trace.found(
                Finding(
                    "claimed-twice",
                    f"{address}:{port.port} is claimed by {others} too; {winner.name} gets it",
                    "give one of these Services another address or port",
                    stops=winner.key != key_of(service),
                )
            )
        self._forward(service, port, node, address, port.port, claims)

    def _no_frontend(self, service: Service, node: Node, address: str, port: ServicePort) -> None:
        """An address of a Service that is no frontend: a load balancer that forwards itself."""
        key = "/".join(key_of(service))
        self.trace.place = Place(
            "outside", address, port.port, self.request.protocol, port.name, _target(port)
        )
        self.trace.end = End(
            "outside",
            f"{address} is the load balancer's own of Service {key} (ipMode Proxy): the packet"
            " leaves the node for it",
        )

    def _node_port(self, node: Node, address: str) -> None:
        """A node's address: a NodePort, or a program there."""
        trace, number = self.trace, self.request.port
        protocol = self.request.protocol
        known = [
            (one, frontend)
            for one in node.table
            for frontend in one.frontends
            if frontend.kind == "node port" and (number is None or frontend.port == number)
        ]
        same = [pair for pair in known if pair[0].protocol == protocol]
        claims = frontends_at(node, address, number, protocol) if number else []
        trace.place = Place("Node", address, number or 0, protocol)
        if claims:
            service = self.service_at(claims[0][0].key)
            assert service is not None
            trace.service = service
            trace.owners = (self.owner_at("Service", key_of(service)),)
            port = next(p for p in service.spec.ports or () if p.node_port == number)
            self._forward(service, port, node, address, number or 0, claims)
        elif same:
            chosen = ", ".join(node.options.node_port_addresses or ()) or "none"
            trace.found(
                Finding(
                    "node-port-not-on-address",
                    f"NodePort {number} of {same[0][0].name} does not answer on {address}: node"
                    f" {node.name} has NodePorts on {chosen}",
                    "use one of these addresses, or change nodePortAddresses (--nodeport-addresses)"
                    " of the proxy",
                )
            )
        elif known:
            self._other_protocol_node_port(known[0][0], number)
        elif number and self._listens_on(node, address, number):
            pass
        else:
            ports = sorted(
                {f"{one.node_port}/{one.protocol} ({one.name})" for one in node.table
                 if one.node_port}
            )  # fmt: skip
            trace.found(
                Finding(
                    "not-a-node-port",
                    f"{address} is node {self._node_with(address)}, and {number or 'no port'} is no"
                    f" NodePort; there are {some(ports) if ports else 'none'}",
                    "a program of the node itself may listen there: that is not looked at",
                )
            )

    def _listens_on(self, node: Node, address: str, port: int) -> bool:
        """Tell of a program of the node itself, if one is known to listen there."""
        dns = is_own_dns(self.evidence, node.name, address, port)
        here = node.name == self.evidence.node
        if not dns and not (here and listens(self.evidence, address, port, self.request.protocol)):
            return False
        what = "'s own DNS server" if dns else " itself: a program there listens"
        self.trace.end = End("process", f"arrives at node {node.name}{what}, {address}:{port}")
        return True

    def _other_protocol_node_port(self, one: Forwarding, number: int | None) -> None:
        self.trace.found(
            Finding(
                "udp-tcp-mismatch",
                f"NodePort {number} of {one.name} is for {one.protocol.upper()} only, and"
                f" {self.request.protocol.upper()} is asked for",
                f"use {one.protocol.upper()}",
            )
        )

    def _forward(
        self,
        service: Service,
        port: ServicePort,
        node: Node,
        address: str,
        number: int,
        claims: Sequence[tuple[Forwarding, Frontend]],
    ) -> None:
        """Let rules lead the packet on."""
        trace = self.trace
        forwarding, frontend = next(c for c in claims if c[0].key == key_of(service))
        local = (
            forwarding.internal_local
            if frontend.kind == "cluster IP"
            else forwarding.external_local and origin_of(self.client, node) == "outside"
        )
        policy = "Local" if (
            forwarding.internal_local if frontend.kind == "cluster IP"
            else forwarding.external_local
        ) else "Cluster"  # fmt: skip
        trace.place = Place(
            frontend.kind, address, number, self.request.protocol, port.name, _target(port),
            policy, forwarding.affinity,
            forwarding.source_ranges if frontend.kind == "loadbalancer IP" else (),
        )  # fmt: skip
        decision = decided(node, forwarding, frontend, self.client)
        usable = decision.endpoints or (
            forwarding.local if local else forwarding.cluster
        )  # what stands behind it, where somebody else than this client is let in
        family = node.options.family
        view = _view(self.evidence, node)
        trace.endpoints = look_at_endpoints(
            self.evidence, service, port, family, view, usable, local
        )
        trace.rules, trace.kernel = meet(
            self.evidence, node, self.client, address, number, self.request.protocol, claims
        )
        if claims[0][0] is not forwarding or self._stays(node, address, number):
            return
        self._say_who_forwards()
        self._why_stopped(service, port, node, forwarding, frontend, decision.verdict)
        met = trace.kernel or trace.rules
        self._hold_kernel(trace.rules, trace.kernel)
        self._give_chances(met)
        self._flows(address, number, forwarding)
        if trace.stop is None:
            chosen = [one for one in trace.endpoints if one.chance]
            self._warn(service, chosen)
            trace.found(check_declared(self.evidence, chosen, port.protocol))

    def _say_who_forwards(self) -> None:
        """Say that nobody does, as far as the running kdns can tell."""
        status = self.evidence.status or {}
        if status.get("mode") == "none" and self.evidence.kernel is None:
            self.trace.found(
                Finding(
                    "nothing-forwards",
                    f"kdns {status.get('command', '')} writes no rules (its mode is none): nobody"
                    " forwards to ClusterIPs, unless another proxy does",
                    "start it as root with --proxy-mode iptables"
                    if status.get("command") == "up"
                    else "run `kdns proxy` or kube-proxy on the node",
                    stops=False,
                )
            )

    def _stays(self, node: Node, address: str, port: int) -> bool:
        """Tell of a packet that no rule leads on, because the node has the address itself; False
        if it is led on. `kdns node`, and NodeLocal DNSCache, take the Service's DNS address."""
        trace, protocol = self.trace, self.request.protocol
        # What leads on is told by the kernel; where that is not seen, by who answers there.
        dns = is_own_dns(self.evidence, node.name, address, port)
        seen = trace.kernel
        if seen is None and not dns:
            return False
        if seen is not None and {way.verdict for way in seen.ways} != {"local"}:
            return False
        where = f"node {node.name}" if node.name else "the node"
        if seen is not None and listens(self.evidence, address, port, protocol) is False:
            trace.found(
                Finding(
                    "nobody-listens",
                    f"{where} has the address {address} itself, and no program listens there on"
                    f" port {port}/{protocol}",
                    "start that program again (was it `kdns node`? `kdns node --cleanup` gives"
                    " the address back to the Service's rules)",
                )
            )
        else:
            trace.rules = None if seen is None else trace.rules
            trace.end = End(
                "process",
                f"arrives at {where}'s own DNS server, {address}: the rules of the Service are not"
                " met" if dns else
                f"arrives at a program of {where} itself, which has the address {address}",
            )  # fmt: skip
        return True

    def _why_stopped(
        self,
        service: Service,
        port: ServicePort,
        node: Node,
        forwarding: Forwarding,
        frontend: Frontend,
        verdict: str,
    ) -> None:
        trace = self.trace
        if verdict == "forward":
            return
        family = node.options.family
        if not forwarding.has_endpoints:
            trace.found(why_none(self.evidence, service, port, family, trace.endpoints))
            return
        source = self.client.address(family)
        if frontend.kind == "loadbalancer IP" and not in_ranges(source, forwarding):
            trace.found(
                Finding(
                    "source-range",
                    f"loadBalancerSourceRanges of Service {'/'.join(key_of(service))} let in"
                    f" {some(forwarding.source_ranges)}, and the client is {source}: dropped",
                    f"add {source}/{32 if family == 4 else 128} to spec.loadBalancerSourceRanges",
                )
            )
            return
        kind = "internal" if frontend.kind == "cluster IP" else "external"
        where = sorted({one.node or "a node not known" for one in trace.endpoints if one.ready})
        trace.found(
            Finding(
                "policy-local-no-endpoint",
                f"{kind}TrafficPolicy is Local and node {node.name or '(not known)'} has no ready"
                f" endpoint of Service {'/'.join(key_of(service))}; they are on {some(where)}:"
                " dropped",
                f"set {kind}TrafficPolicy to Cluster, or run a Pod on every node that is asked",
            )
        )

    def _hold_kernel(self, computed: Met | None, kernel: Met | None) -> None:
        """Say where the kernel leads elsewhere than the registry says."""
        if computed is None or kernel is None or self.trace.stop is not None:
            return
        refused = next((w for w in kernel.ways if w.verdict in ("drop", "reject")), None)
        if refused is not None:
            ours = any(word in refused.by for word in ("KUBE-", "kube-proxy", "kubernetes"))
            verb = "dropped" if refused.verdict == "drop" else "refused"
            self.trace.found(
                Finding(
                    "rules-differ" if ours else "dropped-by-other-rule",
                    f"the kernel's rule {refused.by} has it {verb}",
                    "the proxy has not written the newest registry: see its log"
                    if ours
                    else "let that rule, or the chain's policy, pass what comes from Pods",
                )
            )
        elif any(way.verdict == "no rule" for way in kernel.ways):
            self.trace.found(
                Finding(
                    "rules-missing",
                    f"the kernel's {kernel.mode} rules do not lead on from"
                    f" {self.trace.place.address if self.trace.place else ''}",
                    "is a proxy running here (kdns proxy, kube-proxy)? See its log",
                )
            )
        elif kernel.endpoints.keys() != computed.endpoints.keys():
            only = sorted(kernel.endpoints.keys() - computed.endpoints.keys())
            missing = sorted(computed.endpoints.keys() - kernel.endpoints.keys())
            said = [f"leads to {some(only)} too"] if only else []
            said += [f"does not lead to {some(missing)}"] if missing else []
            self.trace.found(
                Finding(
                    "rules-differ",
                    f"the kernel {' and '.join(said)}, unlike the registry",
                    "the proxy has not written the newest registry: see its log",
                    stops=not (kernel.endpoints.keys() & computed.endpoints.keys()),
                )
            )

    def _give_chances(self, met: Met | None) -> None:
        if met is None:
            return
        chances = met.endpoints
        self.trace.endpoints = [
            _chance(one, float(chances.pop(str(one), 0))) for one in self.trace.endpoints
        ]
        for place, share in chances.items():
            address, _, port = place.rpartition(":")
            self.trace.endpoints.append(
                Seen(
                    address.strip("[]"), int(port), chosen=True, chance=float(share),
                    why="in the kernel's rules, and not in the registry",
                )
            )  # fmt: skip

    def _flows(self, address: str, number: int, forwarding: Forwarding) -> None:
        trace, kernel = self.trace, self.evidence.kernel
        if kernel is None:
            return
        if kernel.no_flows:
            trace.notes.append(f"conntrack cannot be read: {kernel.no_flows}")
            return
        known = {str(e): True for e in (*forwarding.reachable, *forwarding.serving)}
        trace.flows, trace.flow_count = tracked(
            kernel.flows, address, number, self.request.protocol, known
        )
        stale = [one for one in trace.flows if one.stale]
        if stale:
            trace.found(
                Finding(
                    "stale-flow",
                    f"conntrack leads {stale[0].count} flows of {stale[0].client} to"
                    f" {stale[0].endpoint}, which is no endpoint any more",
                    f"conntrack -D -p {self.request.protocol} -d {address} --dport {number}",
                    stops=False,
                )
            )

    def _warn(self, service: Service, chosen: Sequence[Seen]) -> None:
        trace = self.trace
        if chosen and all(not one.ready for one in chosen):
            trace.found(
                Finding(
                    "only-terminating",
                    f"only endpoints that are about to go are left of Service"
                    f" {'/'.join(key_of(service))}",
                    "see why no new Pod becomes ready",
                    stops=False,
                )
            )
        if service.spec.type == "LoadBalancer" and not service.status.load_balancer.ingress:
            trace.found(
                Finding(
                    "no-load-balancer-address",
                    f"no load balancer has given Service {'/'.join(key_of(service))} an address:"
                    " from outside it is reached by its NodePort only",
                    "see its events (kubectl describe service): is there a load balancer"
                    " controller?",
                    stops=False,
                )
            )
        own = [one for one in chosen if one.address in self.client.addresses]
        if own:
            trace.found(
                Finding(
                    "hairpin",
                    f"the client is the endpoint {own[0]} itself: that packet is masqueraded",
                    "a bridge needs hairpin mode for it, which most CNI plugins set",
                    stops=False,
                )
            )

    # --- without rules ------------------------------------------------------------------

    def _headless(self, service: Service, address: str, family: Family) -> None:
        """Straight to a Pod: the port is the Pod's own."""
        trace = self.trace
        key = "/".join(key_of(service))
        ports = service.spec.ports or []
        number = self.request.port
        protocol = self.request.protocol.upper()
        if number is None:
            number = next(iter(sorted(self._targets(service, ports[0]))), ports[0].port) if (
                ports
            ) else 0  # fmt: skip
        mine = next((p for p in ports if p.port == number), None)
        trace.place = Place(
            "headless", address, number, self.request.protocol, mine.name if mine else "",
            _target(mine) if mine else "",
        )  # fmt: skip
        numbers = {
            (p.port, p.protocol or "TCP")
            for one in slices_of(self.evidence, key_of(service))
            for p in one.ports or ()
        }
        asked = self._answered_addresses() or (address,)
        trace.endpoints = [
            _chance(
                _at_port(one, number), 1 / len(asked) if one.chosen and one.address in asked else 0
            )
            for one in look_at_headless(self.evidence, service)
            if (":" in one.address) == (family == 6)
        ]
        if numbers and (number, protocol) not in numbers:
            if any(n == number for n, _ in numbers):
                if mine is not None:
                    self._other_protocol(service, mine)
                return
            targets = self._targets(service, mine) if mine is not None else set()
            if targets:
                trace.found(
                    Finding(
                        "headless-port",
                        f"Service {key} is headless, so nothing translates port {number} to"
                        f" {_numbers_text(targets)}: the Pods are asked at {number} itself",
                        f"use {self.request.name}:{_numbers_text(targets)}, or give the Service a"
                        " ClusterIP",
                    )
                )
                return
        chosen = [one for one in trace.endpoints if one.chance]
        trace.found(check_declared(self.evidence, chosen, protocol))

    def _answered_addresses(self) -> tuple[str, ...]:
        if self.trace.search is None:
            return ()
        ended = self.trace.search.ended
        family = ":" in (self.trace.place.address if self.trace.place else "")
        return tuple(a for a in (ended.real or ended.answer).addresses if (":" in a) == family)

    def _direct(self, address: str, family: Family) -> None:
        """An address that is no Service's: a Pod's, or not of this cluster."""
        trace = self.trace
        number = self.request.port or 0
        for pods in self.snapshot.pods.values():
            for pod in pods.values():
                if address in pod_addresses(pod):
                    trace.place = Place("Pod", address, number, self.request.protocol)
                    name = "/".join(key_of(pod))
                    declared = declared_ports(self.evidence.pod_spec(key_of(pod)))
                    if not number and declared:
                        number = declared[0].number
                    seen = Seen(address, number, name, chosen=True, why="its own address")
                    trace.endpoints = [_chance(seen, 1.0)]
                    if number:
                        trace.found(
                            check_declared(
                                self.evidence, trace.endpoints, self.request.protocol.upper()
                            )
                        )
                    return
        if self._in_service_range(address):
            trace.found(
                Finding(
                    "unknown-address",
                    f"{address} lies among the ClusterIPs, and no Service has it",
                    "ask for the Service by its name: it may have been made anew with another"
                    " address",
                )
            )
            return
        trace.place = Place("outside", address, number, self.request.protocol)
        if any(self._in_pod_range(address)):
            trace.found(
                Finding(
                    "unknown-address",
                    f"{address} is an address for Pods, and no Pod is known to have it",
                    "the Pod is gone, or Pods cannot be read: ask for a Service by name",
                )
            )
            return
        trace.end = End("outside", f"{address} is not of this cluster: the packet leaves it")

    def _in_service_range(self, address: str) -> bool:
        """True if ClusterIPs lie around an address: the range itself is in no object."""
        ip = ipaddress.ip_address(address)
        for services in self.snapshot.services.values():
            for one in services.values():
                for text in one.spec.cluster_ips or (one.spec.cluster_ip,):
                    found = canonical_address(text)
                    if found is None or (found[0] == 6) != (":" in address):
                        continue
                    length = 16 if found[0] == 4 else 112
                    if ip in ipaddress.ip_network(f"{found[1]}/{length}", strict=False):
                        return True
        return False

    def _in_pod_range(self, address: str) -> Iterator[str]:
        ip = ipaddress.ip_address(address)
        for text in self.evidence.config.cluster_cidrs:
            if ip in ipaddress.ip_network(text, strict=False):
                yield text


def _view(evidence: Evidence, node: Node) -> NodeView:
    known = evidence.snapshot.nodes.get(node.name)
    return settings.node_view(evidence.config, node.options.family, node.name, known)


def _addresses_of(service: Service) -> set[str]:
    """Return all addresses that lead to a Service."""
    spec = service.spec
    texts = [*(spec.cluster_ips or (spec.cluster_ip,)), *(spec.external_ips or ())]
    texts += [one.ip for one in service.status.load_balancer.ingress or ()]
    return {found[1] for text in texts if (found := canonical_address(text)) is not None}


def _port_text(port: ServicePort) -> str:
    return f"{port.port}/{port.protocol}{port.name and f' ({port.name})'}"


def _target(port: ServicePort) -> str:
    return str(port.target_port or port.port)


def _numbers_text(numbers: Iterable[int]) -> str:
    return " or ".join(map(str, sorted(numbers)))


def _chance(seen: Seen, chance: float) -> Seen:
    return replace(seen, chance=chance)


def _at_port(seen: Seen, port: int) -> Seen:
    return replace(seen, port=port)
