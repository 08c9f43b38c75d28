"""Which addresses and ports are given out, and to whom.

Decides a Service's families, ClusterIPs, NodePorts and health check port, LoadBalancer addresses
and the addresses of Pods: who gets which, and when they come back. What is taken is held in
memory only, and rebuilt from the objects at start (load). How a free one is found is pools.py's;
whether what was asked for makes sense is validation.py's; who writes the address of a LoadBalancer
or of a Pod into its status is the controllers'.

Reference: upstream's Service storage (allocateCreate, allocateUpdate), KEP-3070 (addresses asked
for by number come from the lower end of the range), KEP-3668 (the same for NodePorts).
"""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network
from types import TracebackType
from typing import Any, Final, TypeAlias

from kdns.api import status
from kdns.api.kinds import Resource
from kdns.api.pools import (
    FAMILIES,
    PORT_BAND,
    Addresses,
    Banded,
    Ledger,
    Network,
    band_of,
    family_of,
    parse_address,
)
from kdns.api.status import Cause
from kdns.errors import ApiError, ConfigError, Problem

Obj: TypeAlias = dict[str, Any]

HEADLESS: Final = "None"
OTHER: Final = {"IPv4": "IPv6", "IPv6": "IPv4"}
WITH_NODE_PORTS: Final = frozenset({"NodePort", "LoadBalancer"})
# "kubernetes" and kube-dns stand at the first and the tenth address of the first range.
SMALLEST_SERVICE_RANGE = 16


# --- one write's share ----------------------------------------------------------------------


class Claim:
    """What one write takes and gives up: given back at the end of the `with` unless it is kept."""

    __slots__ = ("_given_up", "_kept", "_undo")

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []
        self._given_up: list[Callable[[], None]] = []
        self._kept = False

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._kept:
            self.drop()

    def keep(self) -> None:
        """The write succeeded: what was taken stays taken, what was given up is free."""
        self._kept = True
        for release in self._given_up:
            release()

    def drop(self) -> None:
        """Give back what was taken."""
        for release in self._undo:
            release()
        self._undo.clear()

    def takes(self, undo: Callable[[], None]) -> None:
        self._undo.append(undo)

    def gives_up(self, release: Callable[[], None]) -> None:
        self._given_up.append(release)


class Allocator:
    """All that is given out, in one process.

    service_ranges -- one, or one of each family: the first is of the family that a Service gets
    pod_ranges     -- likewise
    lb_ranges      -- of LoadBalancer addresses, any number
    Raises ConfigError.
    """

    def __init__(
        self,
        service_ranges: Sequence[str] = ("10.96.0.0/12",),
        *,
        node_ports: range = range(30000, 32768),
        pod_ranges: Sequence[str] = ("10.244.0.0/16",),
        lb_ranges: Sequence[str] = ("203.0.113.0/24",),
        rng: random.Random | None = None,
    ) -> None:
        services, pods, balancers = _parse_ranges(service_ranges, pod_ranges, lb_ranges)
        _check_node_ports(node_ports)
        self.service_networks = services
        self.pod_networks = pods
        self._rng = rng or random.Random()
        self._services = {
            FAMILIES[network.version]: Addresses(network, banded=True) for network in services
        }
        self._primary = FAMILIES[services[0].version]
        self._ports = Banded(node_ports.start, len(node_ports), band_of(len(node_ports), PORT_BAND))
        self._port_range = f"{node_ports.start}-{node_ports.stop - 1}"
        self._balancers = Ledger([Addresses(network) for network in balancers], self._rng)
        self._pods = Ledger([Addresses(network) for network in pods], self._rng)
        self._pod_families = tuple(FAMILIES[network.version] for network in pods)

    # --- what is given to objects in their status -------------------------------------------

    def give_lb(self, service: Obj) -> list[str]:
        """Return addresses for a LoadBalancer Service, one of each of its families, as far as
        the ranges have them; spec.loadBalancerIP if it is free. The same when asked again; they
        come back when the Service goes or is of another type."""
        spec = service.get("spec") or {}
        families = spec.get("ipFamilies") or [self._primary]
        wanted = spec.get("loadBalancerIP") or ""
        return list(self._balancers.give(_owner(service), families, wanted))

    def give_pod_ip(self, pod: Obj) -> list[str]:
        """Return a Pod's addresses, that of the first range first; none when that is full. The
        same when asked again; they come back when the Pod goes."""
        return list(self._pods.give(_owner(pod), self._pod_families))

    def service_address(self, number: int) -> str:
        """Return the n-th address of the first service range: 1 is "kubernetes"', 10 kube-dns'."""
        return str(self.service_networks[0][number])

    @property
    def service_cidrs(self) -> list[str]:
        """The ranges that Services get addresses from."""
        return [str(network) for network in self.service_networks]

    # --- the life of objects ------------------------------------------------------------------

    def load(self, objects: Iterable[Obj]) -> None:
        """Take what objects already have. What no range covers is theirs all the same."""
        for obj in objects:
            kind = obj.get("kind")
            if kind == "Service":
                self._load_service(obj)
            elif kind == "Pod":
                self._pods.note(_owner(obj), pod_addresses(obj))

    def claim(self, resource: Resource, new: Obj, old: Obj | None) -> Claim:
        """Take what a new version of an object needs and has not, and write it into it.

        Raises ApiError with upstream's words; then nothing is taken.
        """
        claim = Claim()
        if resource.kind == "Service":
            try:
                self._claim_service(claim, resource, new, old)
            except ApiError:
                claim.drop()
                raise
        elif resource.kind == "Pod" and old is not None:
            self._pods.note(_owner(new), pod_addresses(new))
        return claim

    def release(self, resource: Resource, old: Obj) -> None:
        """Make free what an object had that is no more."""
        if resource.kind == "Service":
            for address in cluster_ips(old):
                self._free_address(address)
            for port in (*node_ports_of(old), health_check_port(old)):
                self._ports.give_back(port)
            self._balancers.release(_owner(old))
        elif resource.kind == "Pod":
            self._pods.release(_owner(old))

    def _load_service(self, service: Obj) -> None:
        for text in cluster_ips(service):
            address = parse_address(text)
            pool = self._services.get(family_of(text))
            if address is not None and pool is not None and pool.covers(address):
                pool.take(address)
        for port in (*node_ports_of(service), health_check_port(service)):
            if self._ports.covers(port):
                self._ports.take(port)
        self._balancers.note(_owner(service), balancer_addresses(service))

    def _free_address(self, text: str) -> None:
        address = parse_address(text)
        pool = self._services.get(family_of(text))
        if address is not None and pool is not None:
            pool.give_back(address)

    # --- a Service -----------------------------------------------------------------------------

    def _claim_service(self, claim: Claim, resource: Resource, new: Obj, old: Obj | None) -> None:
        asked = Asked(resource, new, old)
        if not asked.external_name and not asked.unchanged_preference:
            self._settle_families(asked)
        self._claim_addresses(claim, asked)
        self._claim_ports(claim, asked)
        self._claim_health_check(claim, asked)
        owner = _owner(new)
        self._balancers.note(owner, balancer_addresses(new))
        if asked.old_type == "LoadBalancer" and asked.type != "LoadBalancer":
            claim.gives_up(lambda: self._balancers.release(owner))

    def _settle_families(self, asked: Asked) -> None:
        """Decide ipFamilyPolicy and ipFamilies of a Service that has a ClusterIP or is headless."""
        spec = asked.spec
        if not spec.get("ipFamilyPolicy"):
            spec["ipFamilyPolicy"] = asked.default_policy()
        problems = asked.reduce() + self._infer_families(asked)
        if problems:
            raise asked.invalid(problems)
        families = list(spec.get("ipFamilies") or ())
        single = spec["ipFamilyPolicy"] == "SingleStack"
        if asked.headless and not spec.get("selector"):
            # Its endpoints are written by hand and may be of either family, here or not.
            families = families or [self._primary]
            if not single and len(families) == 1:
                families.append(OTHER[families[0]])
            spec["ipFamilies"] = families
            return
        problems = self._missing_families(asked, families)
        if problems:
            raise asked.invalid(problems)
        families = families or [self._primary]
        if not single and len(families) == 1 and len(self._services) == 2:
            families.append(OTHER[families[0]])
        spec["ipFamilies"] = families

    def _infer_families(self, asked: Asked) -> list[Cause]:
        """Add the families of addresses that were asked for."""
        addresses = asked.spec.get("clusterIPs") or []
        families = list(asked.spec.get("ipFamilies") or ())
        problems = []
        for i, text in enumerate(addresses):
            if text == HEADLESS:
                break
            if i < len(families):
                continue
            family = family_of(text)
            if family in self._services:
                families.append(family)
            else:
                problems.append(
                    status.Cause(
                        "FieldValueInvalid",
                        f"Invalid value: {_listed(addresses)}: {family} is not configured on this"
                        " cluster",
                        f"spec.clusterIPs[{i}]",
                    )
                )
        if families:
            asked.spec["ipFamilies"] = families
        return problems

    def _missing_families(self, asked: Asked, families: Sequence[str]) -> list[Cause]:
        problems = []
        if asked.spec["ipFamilyPolicy"] == "RequireDualStack" and len(self._services) < 2:
            problems.append(
                asked.policy_problem("this cluster is not configured for dual-stack services")
            )
        for i, family in enumerate(families):
            if family not in self._services:
                problems.append(
                    status.Cause(
                        "FieldValueInvalid",
                        f'Invalid value: "{family}": not configured on this cluster',
                        f"spec.ipFamilies[{i}]",
                    )
                )
        return problems

    def _claim_addresses(self, claim: Claim, asked: Asked) -> None:
        spec = asked.spec
        had = set(cluster_ips(asked.old)) if asked.old is not None else set()
        has: list[str] = []
        if not asked.external_name and not asked.headless:
            given = list(spec.get("clusterIPs") or ())
            for i, family in enumerate(spec.get("ipFamilies") or ()):
                text = given[i] if i < len(given) else ""
                has.append(text if text in had else self._claim_address(claim, asked, family, text))
            if has:
                spec["clusterIPs"], spec["clusterIP"] = has, has[0]
        for text in had.difference(has):
            claim.gives_up(lambda gone=text: self._free_address(gone))  # type: ignore[misc]

    def _claim_address(self, claim: Claim, asked: Asked, family: str, text: str) -> str:
        pool = self._services[family]
        if not text:
            found = pool.take_any(self._rng)
            if found is None:
                raise internal_error("failed to allocate a serviceIP: range is full")
            claim.takes(lambda: self._free_address(found))
            return found
        address = parse_address(text)
        if address is None or not pool.covers(address):
            raise asked.address_problem(
                text,
                f"the provided IP ({text}) is not in the valid range. The range of valid IPs is"
                f" {pool.network}",
            )
        if not pool.take(address):
            raise asked.address_problem(text, "provided IP is already allocated")
        claim.takes(lambda: self._free_address(text))
        return text

    def _claim_ports(self, claim: Claim, asked: Asked) -> None:
        had = set(node_ports_of(asked.old)) if asked.old_type in WITH_NODE_PORTS else set()
        if asked.type in WITH_NODE_PORTS:
            if asked.old_type in WITH_NODE_PORTS:
                self._renew_ports(claim, asked, had)
            else:
                self._first_ports(claim, asked)
        for port in had.difference(node_ports_of(asked.new)):
            claim.gives_up(lambda gone=port: self._ports.give_back(gone))  # type: ignore[misc]

    def _first_ports(self, claim: Claim, asked: Asked) -> None:
        """Ports of one number but of two protocols share a NodePort."""
        ports = asked.ports
        asked_for: dict[int, int] = {}
        for one in ports:
            if one.get("nodePort"):
                asked_for.setdefault(one["port"], one["nodePort"])
        shared: dict[int, int] = {}
        for i, one in enumerate(ports):
            number, wanted = one["port"], one.get("nodePort") or 0
            if not wanted and not asked.allocates:
                continue
            if number not in shared:
                wanted = asked_for.get(number, 0)
                one["nodePort"] = shared[number] = self._claim_port(claim, asked, i, wanted)
            elif not wanted:
                one["nodePort"] = shared[number]
            elif wanted != shared[number]:
                self._claim_port(claim, asked, i, wanted)

    def _renew_ports(self, claim: Claim, asked: Asked, had: set[int]) -> None:
        taken: set[int] = set()
        for i, one in enumerate(asked.ports):
            wanted = one.get("nodePort") or 0
            if not wanted and not asked.allocates:
                continue
            if not wanted or (wanted not in had and wanted not in taken):
                one["nodePort"] = self._claim_port(claim, asked, i, wanted)
                taken.add(one["nodePort"])

    def _claim_port(self, claim: Claim, asked: Asked, i: int, wanted: int) -> int:
        if not wanted:
            found = self._ports.take_any(self._rng)
            if found is None:
                raise internal_error("failed to allocate a nodePort: range is full")
        else:
            problem = self._take_port(wanted)
            if problem:
                text = f"Invalid value: {wanted}: {problem}"
                field = f"spec.ports[{i}].nodePort"
                raise asked.invalid([Cause("FieldValueInvalid", text, field)])
            found = wanted
        claim.takes(lambda: self._ports.give_back(found))
        return found

    def _take_port(self, port: int) -> str:
        """Take a port; return why not."""
        if not self._ports.covers(port):
            return (
                "provided port is not in the valid range. The range of valid ports is"
                f" {self._port_range}"
            )
        return "" if self._ports.take(port) else "provided port is already allocated"

    def _claim_health_check(self, claim: Claim, asked: Asked) -> None:
        had = health_check_port(asked.old) if asked.old is not None else 0
        if not needs_health_check(asked.new):
            if had:
                claim.gives_up(lambda: self._ports.give_back(had))
            return
        wanted = asked.spec.get("healthCheckNodePort") or 0
        if wanted and wanted == had:
            return
        if wanted:
            problem = self._take_port(wanted)
            if problem:
                raise internal_error(
                    f"failed to allocate requested HealthCheck NodePort {wanted}: {problem}"
                )
        else:
            found = self._ports.take_any(self._rng)
            if found is None:
                raise internal_error("failed to allocate a HealthCheck NodePort 0: range is full")
            asked.spec["healthCheckNodePort"] = wanted = found
        port: int = wanted
        claim.takes(lambda: self._ports.give_back(port))


class Asked:
    """A Service as somebody wants it, beside what it was."""

    __slots__ = ("new", "old", "old_type", "ports", "resource", "spec", "type")

    def __init__(self, resource: Resource, new: Obj, old: Obj | None) -> None:
        self.resource = resource
        self.new = new
        self.old = old
        self.spec: dict[str, Any] = new.setdefault("spec", {})
        self.ports: list[dict[str, Any]] = self.spec.get("ports") or []
        self.type = self.spec.get("type") or ""
        self.old_type = (old.get("spec") or {}).get("type") or "" if old is not None else ""

    @property
    def external_name(self) -> bool:
        return self.type == "ExternalName"

    @property
    def headless(self) -> bool:
        addresses = self.spec.get("clusterIPs") or [self.spec.get("clusterIP")]
        return bool(addresses[0] == HEADLESS)

    @property
    def allocates(self) -> bool:
        """Whether ports without a NodePort get one."""
        return self.type == "NodePort" or self.spec.get("allocateLoadBalancerNodePorts", True)

    @property
    def unchanged_preference(self) -> bool:
        """True for PreferDualStack before and now with the same addresses: it neither gains nor
        loses one because the cluster's ranges have changed."""
        if self.old is None or self.type != self.old_type:
            return False
        before = self.old.get("spec") or {}
        return (
            self.spec.get("ipFamilyPolicy") == "PreferDualStack"
            and before.get("ipFamilyPolicy", "PreferDualStack") == "PreferDualStack"
            and same_list(self.spec, before, "clusterIPs")
            and same_list(self.spec, before, "ipFamilies")
        )

    def default_policy(self) -> str:
        before = (self.old or {}).get("spec") or {}
        if before.get("ipFamilyPolicy"):
            return str(before["ipFamilyPolicy"])
        if self.spec.get("clusterIP") == HEADLESS and not self.spec.get("selector"):
            return "RequireDualStack"
        return "SingleStack"

    def reduce(self) -> list[Cause]:
        """Drop the second family where the policy says so; return what speaks against it."""
        spec, problems = self.spec, []
        single = spec["ipFamilyPolicy"] == "SingleStack"
        if self.old is not None:
            before = self.old.get("spec") or {}
            for key, what in (("clusterIPs", "cluster IP"), ("ipFamilies", "IP family")):
                now, then = spec.get(key) or [], before.get(key) or []
                if single:
                    if now == then and len(now) > 1:
                        spec[key] = now[:1]
                elif 0 < len(now) < len(then):
                    problems.append(
                        self.policy_problem(
                            f"must be 'SingleStack' to release the secondary {what}"
                        )
                    )
        if single:
            for key, what in (("clusterIPs", "cluster IPs"), ("ipFamilies", "IP families")):
                if len(spec.get(key) or ()) == 2:
                    problems.append(
                        self.policy_problem(
                            "must be 'RequireDualStack' or 'PreferDualStack' when multiple"
                            f" {what} are specified"
                        )
                    )
        return problems

    def policy_problem(self, text: str) -> Cause:
        value = self.spec.get("ipFamilyPolicy")
        return Cause(
            "FieldValueInvalid", f'Invalid value: "{value}": {text}', "spec.ipFamilyPolicy"
        )

    def address_problem(self, address: str, text: str) -> ApiError:
        value = _listed(self.spec.get("clusterIPs") or [])
        message = f"Invalid value: {value}: failed to allocate IP {address}: {text}"
        return self.invalid([Cause("FieldValueInvalid", message, "spec.clusterIPs")])

    def invalid(self, causes: Sequence[Cause]) -> ApiError:
        name = (self.new.get("metadata") or {}).get("name") or ""
        return status.invalid(self.resource, name, causes)


def internal_error(text: str) -> ApiError:
    """What upstream says when nothing is left: it is not the object's fault."""
    return ApiError(
        500, "InternalError", f"Internal error occurred: {text}", {"causes": [{"message": text}]}
    )


# --- what objects hold ----------------------------------------------------------------------


def _owner(obj: Obj) -> str:
    meta: Mapping[str, Any] = obj.get("metadata") or {}
    return str(meta.get("uid") or f"{meta.get('namespace', '')}/{meta.get('name', '')}")


def cluster_ips(service: Obj | None) -> list[str]:
    """Return a Service's ClusterIPs; none for a headless one."""
    spec: Mapping[str, Any] = (service or {}).get("spec") or {}
    if spec.get("type") == "ExternalName":
        return []
    listed = spec.get("clusterIPs") or [spec.get("clusterIP") or ""]
    return [text for text in listed if text and text != HEADLESS]


def node_ports_of(service: Obj | None) -> list[int]:
    """Return the NodePorts of a Service."""
    spec: Mapping[str, Any] = (service or {}).get("spec") or {}
    return [one["nodePort"] for one in spec.get("ports") or () if one.get("nodePort")]


def health_check_port(service: Obj | None) -> int:
    """Return the health check port of a Service; 0 if it has none."""
    if service is None or not needs_health_check(service):
        return 0
    return int(service["spec"].get("healthCheckNodePort") or 0)


def needs_health_check(service: Obj) -> bool:
    """Whether nodes tell a load balancer if they have endpoints of it."""
    spec = service.get("spec") or {}
    return spec.get("type") == "LoadBalancer" and spec.get("externalTrafficPolicy") == "Local"


def balancer_addresses(service: Obj) -> list[str]:
    """Return the addresses that a load balancer has given to a Service."""
    balancer = (service.get("status") or {}).get("loadBalancer") or {}
    return [one["ip"] for one in balancer.get("ingress") or () if one.get("ip")]


def pod_addresses(pod: Obj) -> list[str]:
    """Return a Pod's addresses; none of one in its node's network."""
    if (pod.get("spec") or {}).get("hostNetwork"):
        return []
    found = pod.get("status") or {}
    listed = [one.get("ip") for one in found.get("podIPs") or ()] or [found.get("podIP")]
    return [text for text in listed if text]


def same_list(one: Mapping[str, Any], other: Mapping[str, Any], key: str) -> bool:
    """Whether two objects have the same list; none is as good as an empty one."""
    return (one.get(key) or []) == (other.get(key) or [])


def _listed(values: Iterable[str]) -> str:
    return "[" + ",".join(f'"{text}"' for text in values) + "]"


# --- what an operator says ----------------------------------------------------------------------

SERVICE_FLAG, POD_FLAG, LB_FLAG = "--service-cluster-ip-range", "--pod-cidr", "--lb-range"


def _parse_ranges(
    services: Sequence[str], pods: Sequence[str], balancers: Sequence[str]
) -> tuple[tuple[Network, ...], tuple[Network, ...], tuple[Network, ...]]:
    problems: list[Problem] = []
    found = {
        flag: tuple(_parse_network(flag, text, problems) for text in texts)
        for flag, texts in ((SERVICE_FLAG, services), (POD_FLAG, pods), (LB_FLAG, balancers))
    }
    networks = {flag: tuple(n for n in listed if n) for flag, listed in found.items()}
    for flag in (SERVICE_FLAG, POD_FLAG):
        _check_families(flag, len(found[flag]), networks[flag], problems)
    for network in networks[SERVICE_FLAG]:
        if network.num_addresses < SMALLEST_SERVICE_RANGE:
            least = f"/{network.max_prefixlen - 4}"
            text = (
                f"{network} is too small: use {least} or larger, {SMALLEST_SERVICE_RANGE} addresses"
            )
            problems.append(Problem(SERVICE_FLAG, 0, text))
    for network in (*networks[POD_FLAG], *networks[LB_FLAG]):
        if network.num_addresses < 4:
            flag = POD_FLAG if network in networks[POD_FLAG] else LB_FLAG
            text = f"{network} is too small: use /{network.max_prefixlen - 2} or larger"
            problems.append(Problem(flag, 0, text))
    _check_overlaps(networks, problems)
    if problems:
        raise ConfigError(problems)
    return networks[SERVICE_FLAG], networks[POD_FLAG], networks[LB_FLAG]


def _parse_network(flag: str, text: str, problems: list[Problem]) -> Network | None:
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        pass
    try:
        meant = ipaddress.ip_network(text, strict=False)
        why = f"{text} has bits set beyond the prefix length: use {meant}"
    except ValueError:
        why = f'"{text}" is not a range of addresses: use one such as 10.96.0.0/12'
    problems.append(Problem(flag, 0, why))
    return None


def _check_families(
    flag: str, count: int, networks: Sequence[Network], problems: list[Problem]
) -> None:
    if not 1 <= count <= 2:
        text = f"{count} ranges: use one, or one of IPv4 and one of IPv6"
        problems.append(Problem(flag, 0, text))
    elif len(networks) == 2 and networks[0].version == networks[1].version:
        family, other = FAMILIES[networks[0].version], OTHER[FAMILIES[networks[0].version]]
        text = f"{networks[0]} and {networks[1]} are both {family}: the second must be {other}"
        problems.append(Problem(flag, 0, text))


def _check_overlaps(networks: Mapping[str, Sequence[Network]], problems: list[Problem]) -> None:
    listed = [(flag, network) for flag, found in networks.items() for network in found]
    for i, (flag, network) in enumerate(listed):
        for other_flag, other in listed[:i]:
            if _overlap(network, other):
                text = f"{network} overlaps {other} of {other_flag}: use ranges that are apart"
                problems.append(Problem(flag, 0, text))


def _overlap(one: Network, other: Network) -> bool:
    if isinstance(one, IPv4Network):
        return isinstance(other, IPv4Network) and one.overlaps(other)
    return isinstance(other, IPv6Network) and one.overlaps(other)


def _check_node_ports(ports: range) -> None:
    if ports.step != 1 or not ports or ports.start < 1 or ports.stop > 65536:
        said = f"{ports.start}-{ports.stop - 1}"
        text = f"{said} is not a range of ports: use one such as 30000-32767"
        raise ConfigError([Problem("--service-node-port-range", 0, text)])
