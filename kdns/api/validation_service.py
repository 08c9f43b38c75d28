"""What a Service, its Endpoints and its EndpointSlices may hold, in upstream's words.

Which ClusterIP or NodePort is free, in range and of a family that the cluster has is
allocate.py's; what follows from a change of type without a word is defaults.py's.
Reference: upstream's ValidateService, ValidateServiceUpdate, pkg/api/service/warnings.go.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

from kdns.api import validation_fields as f
from kdns.api.defaults import HEADLESS, WITH_NODE_PORTS, externally_accessible
from kdns.api.status import Cause

Obj: TypeAlias = dict[str, Any]
Spec: TypeAlias = Mapping[str, Any]
Causes: TypeAlias = list[Cause]

TYPES: Final = ("ClusterIP", "ExternalName", "LoadBalancer", "NodePort")
FAMILIES: Final = ("IPv4", "IPv6")
POLICIES: Final = ("PreferDualStack", "RequireDualStack", "SingleStack")
AFFINITIES: Final = ("ClientIP", "None")
TRAFFIC_POLICIES: Final = ("Cluster", "Local")
DISTRIBUTIONS: Final = ("PreferClose", "PreferSameNode", "PreferSameZone")
ADDRESS_TYPES: Final = ("FQDN", "IPv4", "IPv6")
LONGEST_AFFINITY = 86400
MAX_ENDPOINTS, MAX_PORTS, MAX_ADDRESSES = 1000, 100, 100
MAX_HINTS = 8
SOURCE_RANGES: Final = "service.beta.kubernetes.io/load-balancer-source-ranges"
HINTS, MODE = "service.kubernetes.io/topology-aware-hints", "service.kubernetes.io/topology-mode"
BALANCER_ONLY = "may only be used when `type` is 'LoadBalancer'"
EXTERNAL_NAME_HAS_NONE = "may not be set for ExternalName services"
FIXED = "may not change once set"


def service_addresses(new: Obj) -> Causes:
    """Check what upstream looks at before it gives out addresses: if something is wrong here, it
    says nothing of the rest."""
    return _cluster_ips(new.get("spec") or {})


def service(new: Obj, old: Obj | None) -> Causes:
    """Check a Service whose addresses make sense, without its metadata."""
    spec: Spec = new.get("spec") or {}
    out: Causes = []
    if old is not None:
        out += _changes(spec, old.get("spec") or {})
        if new.get("status") != old.get("status"):
            out += _balancer_status(new.get("status") or {}, spec)
    return out + _annotations(new) + _spec(new, spec)


def _annotations(new: Obj) -> Causes:
    held = (new.get("metadata") or {}).get("annotations") or {}
    if HINTS in held and MODE in held and held[HINTS] != held[MODE]:
        text = f"must match annotations[{HINTS}] when both are specified"
        return [f.invalid(f"metadata.annotations[{MODE}]", held[MODE], text)]
    return []


def _spec(new: Obj, spec: Spec) -> Causes:
    kind, ports = spec.get("type") or "", spec.get("ports") or ()
    headless = is_headless(spec)
    out: Causes = []
    if not ports and not headless and kind != "ExternalName":
        out.append(f.required("spec.ports"))
    if headless and kind in WITH_NODE_PORTS:
        text = f"may not be set to 'None' for {kind} services"
        out.append(f.invalid("spec.clusterIPs[0]", HEADLESS, text))
    if kind == "ExternalName":
        out += _external_name(spec)
    out += _ports(ports)
    if spec.get("selector"):
        out += f.label_map("spec.selector", spec["selector"])
    out += _affinity(spec)
    for i, text in enumerate(spec.get("externalIPs") or ()):
        at = f"spec.externalIPs[{i}]"
        out += f.each(at, text, f.address(text) or f.special_address(text))
    out += f.one_of("spec.type", kind, TYPES)
    out += _port_sets(kind, ports)
    out += _balancer(new, spec, kind)
    out += _traffic(spec, kind)
    return out


def is_headless(spec: Spec) -> bool:
    """Whether a Service asks for no ClusterIP at all."""
    return (spec.get("clusterIPs") or [spec.get("clusterIP")]) == [HEADLESS]


def _external_name(spec: Spec) -> Causes:
    out = [
        f.forbidden(f"spec.{key}", EXTERNAL_NAME_HAS_NONE)
        for key in ("clusterIPs", "ipFamilies", "ipFamilyPolicy")
        if spec.get(key)
    ]
    name = (spec.get("externalName") or "").removesuffix(".")
    if not name:
        out.append(f.required("spec.externalName"))
    else:
        out += f.each("spec.externalName", name, f.subdomain(name))
    return out


def _ports(ports: Sequence[Mapping[str, Any]]) -> Causes:
    out: Causes = []
    names: set[str] = set()
    for i, port in enumerate(ports):
        at = f"spec.ports[{i}]"
        name = port.get("name") or ""
        if name:
            out += f.each(f"{at}.name", name, f.dns_label(name))
            if name in names:
                out.append(f.duplicate(f"{at}.name", name))
            names.add(name)
        elif len(ports) > 1:
            out.append(f.required(f"{at}.name"))
        number = port.get("port") or 0
        out += f.each(f"{at}.port", number, f.port_number(number))
        out += f.one_of(f"{at}.protocol", port.get("protocol"), f.PROTOCOLS)
        out += f.port_or_name(f"{at}.targetPort", port.get("targetPort"))
        out += f.app_protocol(f"{at}.appProtocol", port.get("appProtocol"))
    return out


def _port_sets(kind: str, ports: Sequence[Mapping[str, Any]]) -> Causes:
    """Look at all ports together: no two may be the same."""
    out: Causes = []
    if kind == "ClusterIP":
        out += [
            f.forbidden(f"spec.ports[{i}].nodePort", "may not be used when `type` is 'ClusterIP'")
            for i, port in enumerate(ports)
            if port.get("nodePort")
        ]
    on_nodes: set[tuple[object, object]] = set()
    for i, port in enumerate(ports):
        key = port.get("protocol"), port.get("nodePort")
        if not port.get("nodePort"):
            continue
        if key in on_nodes:
            out.append(f.duplicate(f"spec.ports[{i}].nodePort", port["nodePort"]))
        on_nodes.add(key)
    seen: set[tuple[object, object]] = set()
    for i, port in enumerate(ports):
        key = port.get("protocol"), port.get("port")
        if key in seen:
            # So upstream prints its ServicePort, of which only two fields are filled in.
            shown = {
                "Name": "", "Protocol": key[0], "AppProtocol": None, "Port": key[1],
                "TargetPort": 0, "NodePort": 0,
            }  # fmt: skip
            out.append(f.duplicate(f"spec.ports[{i}]", shown))
        seen.add(key)
    return out


def _affinity(spec: Spec) -> Causes:
    said, config = spec.get("sessionAffinity"), spec.get("sessionAffinityConfig")
    out = f.one_of("spec.sessionAffinity", said, AFFINITIES)
    at = "spec.sessionAffinityConfig"
    if said == "None" and config is not None:
        out.append(f.forbidden(at, "must not be set when session affinity is None"))
    if said != "ClientIP":
        return out
    if config is None:
        return [*out, f.required(at, "when session affinity type is ClientIP")]
    if config.get("clientIP") is None:
        return [*out, f.required(f"{at}.clientIP", "when session affinity type is ClientIP")]
    seconds = config["clientIP"].get("timeoutSeconds")
    if seconds is None:
        return [
            *out,
            f.required(f"{at}.clientIP.timeoutSeconds", "when session affinity type is ClientIP"),
        ]
    if not 0 < seconds <= LONGEST_AFFINITY:
        text = f"must be greater than 0 and less than {LONGEST_AFFINITY}"
        out.append(f.invalid(f"{at}.clientIP.timeoutSeconds", seconds, text))
    return out


def _balancer(new: Obj, spec: Spec, kind: str) -> Causes:
    """Check what only LoadBalancers have."""
    out: Causes = []
    balancer = kind == "LoadBalancer"
    held = (new.get("metadata") or {}).get("annotations") or {}
    if spec.get("loadBalancerSourceRanges"):
        at = "spec.LoadBalancerSourceRanges"
        if not balancer:
            out.append(f.forbidden(at, BALANCER_ONLY))
        for i, text in enumerate(spec["loadBalancerSourceRanges"]):
            out += f.each(f"{at}[{i}]", text.strip(), f.cidr(text.strip()))
    elif SOURCE_RANGES in held:
        at = f"metadata.annotations[{SOURCE_RANGES}]"
        if not balancer:
            out.append(f.forbidden(at, BALANCER_ONLY))
        for text in filter(None, (held[SOURCE_RANGES] or "").strip().split(",")):
            out += f.each(at, text.strip(), f.cidr(text.strip()))
    if spec.get("allocateLoadBalancerNodePorts") is not None and not balancer:
        out.append(f.forbidden("spec.allocateLoadBalancerNodePorts", BALANCER_ONLY))
    name = spec.get("loadBalancerClass")
    if name is not None:
        at = "spec.loadBalancerClass"
        out += (
            f.each(at, name, f.qualified_name(name))
            if balancer
            else [f.forbidden(at, BALANCER_ONLY)]
        )
    return out


def _traffic(spec: Spec, kind: str) -> Causes:
    out: Causes = []
    at, policy = "spec.externalTrafficPolicy", spec.get("externalTrafficPolicy") or ""
    if externally_accessible(spec):
        out += f.one_of(at, policy, TRAFFIC_POLICIES)
    elif policy:
        out.append(f.invalid(at, policy, "may only be set for externally-accessible services"))
    port = spec.get("healthCheckNodePort") or 0
    if port:
        at = "spec.healthCheckNodePort"
        if kind == "LoadBalancer" and policy == "Local":
            out += f.each(at, port, f.port_number(port))
        else:
            text = (
                "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is"
                " 'Local'"
            )
            out.append(f.invalid(at, port, text))
    inside = spec.get("internalTrafficPolicy")
    if inside is not None or kind != "ExternalName":
        out += f.one_of("spec.internalTrafficPolicy", inside, TRAFFIC_POLICIES)
    distribution = spec.get("trafficDistribution")
    if distribution is not None and distribution not in DISTRIBUTIONS:
        out.append(f.unsupported("spec.trafficDistribution", distribution, DISTRIBUTIONS))
    return out


# --- addresses and families -------------------------------------------------------------------


def _cluster_ips(spec: Spec) -> Causes:
    """Check clusterIP, clusterIPs, ipFamilies and ipFamilyPolicy against each other."""
    if spec.get("type") == "ExternalName":
        return []
    at = "spec.clusterIPs"
    first, listed = spec.get("clusterIP") or "", spec.get("clusterIPs") or []
    families, policy = spec.get("ipFamilies") or [], spec.get("ipFamilyPolicy")
    out: Causes = []
    if first and not listed:
        out.append(f.required(at))
    elif first and listed[0] != first:
        out.append(f.invalid(at, listed, "first value must match `clusterIP`"))
    elif listed and not first:
        out.append(f.invalid(at, listed, "must be empty when `clusterIP` is not specified"))
    for i, family in enumerate(families):
        if family not in FAMILIES:
            out.append(f.unsupported(f"spec.ipFamilies[{i}]", family, FAMILIES))
        if family in families[:i]:
            out.append(f.duplicate(f"spec.ipFamilies[{i}]", family))
    if policy is not None:
        out += (
            [] if policy in POLICIES else [f.unsupported("spec.ipFamilyPolicy", policy, POLICIES)]
        )
    wrong: Causes = []
    for i, text in enumerate(listed):
        if i == 0 and text == HEADLESS:
            if len(listed) > 1:
                wrong.append(f.invalid(at, listed, "'None' must be the first and only value"))
            continue
        wrong += f.each(f"{at}[{i}]", text, f.address(text))
    out += wrong
    if len(listed) > 2:
        out.append(f.invalid(at, listed, "may only hold up to 2 values"))
    return out if wrong else out + _address_families(listed, families)


def _address_families(listed: Sequence[str], families: Sequence[str]) -> Causes:
    at = "spec.clusterIPs"
    out: Causes = []
    found = ["IPv6" if ":" in text else "IPv4" for text in listed]
    if len(listed) > 1 and len(set(found)) != len(found):
        out.append(f.invalid(at, listed, "may specify no more than one IP for each IP family"))
    if listed and listed[0] != HEADLESS:
        for i, (text, family, said) in enumerate(zip(listed, found, families, strict=False)):
            if family != said and said in FAMILIES:
                why = f"expected an {said} value as indicated by `ipFamilies[{i}]`"
                out.append(f.invalid(f"{at}[{i}]", text, why))
    return out


def _changes(spec: Spec, before: Spec) -> Causes:
    """Check what may not change, or not so."""
    out: Causes = []
    kind, kind_before = spec.get("type"), before.get("type")
    if kind != "ExternalName" and kind_before != "ExternalName":
        headless, was_headless = is_headless(spec), is_headless(before)
        if not (headless and was_headless):
            out += _address_changes(spec, before)
        if not headless and not was_headless:
            out += _family_changes(spec, before)
    if kind == kind_before == "LoadBalancer":
        name = spec.get("loadBalancerClass")
        if name != before.get("loadBalancerClass"):
            out.append(f.invalid("spec.loadBalancerClass", name, FIXED))
        both_local = (
            "Local" == spec.get("externalTrafficPolicy") == before.get("externalTrafficPolicy")
        )
        port, port_before = spec.get("healthCheckNodePort"), before.get("healthCheckNodePort")
        if both_local and (port or 0) != (port_before or 0):
            out.append(f.forbidden("spec.healthCheckNodePort", f.IMMUTABLE))
    return out


def _address_changes(spec: Spec, before: Spec) -> Causes:
    now, then = spec.get("clusterIPs") or [], before.get("clusterIPs") or []
    if len(now) == len(then):
        return [
            f.invalid(f"spec.clusterIPs[{i}]", now, FIXED)
            for i, (new, old) in enumerate(zip(now, then, strict=True))
            if new != old
        ]
    if then and not now:
        return [f.invalid("spec.clusterIPs[0]", now, "primary clusterIP can not be unset")]
    # Whether one may be added or dropped is decided where families are settled (allocate.py).
    if then and now[0] != then[0]:
        return [f.invalid("spec.clusterIPs[0]", now, FIXED)]
    return []


def _family_changes(spec: Spec, before: Spec) -> Causes:
    now, then = spec.get("ipFamilies") or [], before.get("ipFamilies") or []
    if not now or not then:
        return []
    pairs = zip(now, then, strict=True) if len(now) == len(then) else [(now[0], then[0])]
    return [f.invalid("spec.ipFamilies[0]", now, FIXED) for new, old in pairs if new != old]


def _balancer_status(status: Mapping[str, Any], spec: Spec) -> Causes:
    at = "status.loadBalancer.ingress"
    ingress = (status.get("loadBalancer") or {}).get("ingress") or ()
    if not ingress:
        return []
    out: Causes = []
    if spec.get("type") != "LoadBalancer":
        out.append(f.forbidden(at, 'may only be used when `spec.type` is "LoadBalancer"'))
    for i, one in enumerate(ingress):
        ip, name, mode = one.get("ip") or "", one.get("hostname") or "", one.get("ipMode")
        if ip:
            out += f.each(f"{at}[{i}].ip", ip, f.address(ip))
        elif mode is not None:
            out.append(
                f.forbidden(f"{at}[{i}].ipMode", "may not be specified when `ip` is not set")
            )
        if mode is not None:
            out += f.one_of(f"{at}[{i}].ipMode", mode, ("Proxy", "VIP"))
        if name:
            out += f.each(f"{at}[{i}].hostname", name, f.subdomain(name))
            if parses(name):
                text = "must be a DNS name, not an IP address"
                out.append(f.invalid(f"{at}[{i}].hostname", name, text))
    return out


def parses(text: str) -> bool:
    """Whether a text is an address."""
    return f.parse_sloppy(text) is not None


# --- Endpoints and EndpointSlices ---------------------------------------------------------------


def endpoints(new: Obj, old: Obj | None) -> Causes:
    """Check an Endpoints without its metadata."""
    if old is not None and new.get("subsets") == old.get("subsets"):
        return []
    out: Causes = []
    for i, subset in enumerate(new.get("subsets") or ()):
        at = f"subsets[{i}]"
        if not subset.get("addresses") and not subset.get("notReadyAddresses"):
            out.append(f.required(at, "must specify `addresses` or `notReadyAddresses`"))
        for key in ("addresses", "notReadyAddresses"):
            for j, one in enumerate(subset.get(key) or ()):
                out += _endpoint_address(f"{at}.{key}[{j}]", one)
        ports = subset.get("ports") or ()
        for j, port in enumerate(ports):
            out += _endpoint_port(f"{at}.ports[{j}]", port, len(ports) > 1)
    return out


def _endpoint_address(at: str, one: Mapping[str, Any]) -> Causes:
    ip = one.get("ip") or ""
    out = f.each(f"{at}.ip", ip, f.address(ip))
    if one.get("hostname"):
        out += f.each(f"{at}.hostname", one["hostname"], f.dns_label(one["hostname"]))
    if one.get("nodeName") is not None:
        out += f.each(f"{at}.nodeName", one["nodeName"], f.subdomain(one["nodeName"]))
    return out + f.each(f"{at}.ip", ip, f.special_address(ip))


def _endpoint_port(at: str, port: Mapping[str, Any], named: bool) -> Causes:
    out: Causes = []
    name, number = port.get("name") or "", port.get("port") or 0
    if name:
        out += f.each(f"{at}.name", name, f.dns_label(name))
    elif named:
        out.append(f.required(f"{at}.name"))
    out += f.each(f"{at}.port", number, f.port_number(number))
    out += f.one_of(f"{at}.protocol", port.get("protocol"), f.PROTOCOLS)
    return out + f.app_protocol(f"{at}.appProtocol", port.get("appProtocol"))


def endpoint_slice(new: Obj, old: Obj | None) -> Causes:
    """Check an EndpointSlice without its metadata."""
    kind = new.get("addressType") or ""
    out = f.one_of("addressType", kind, ADDRESS_TYPES)
    if old is None or (new.get("endpoints"), kind) != (old.get("endpoints"), old["addressType"]):
        out += _slice_endpoints(new.get("endpoints") or (), kind)
    out += _slice_ports(new.get("ports") or ())
    if old is not None:
        out += f.immutable("addressType", kind, old.get("addressType"))
    return out


def _slice_endpoints(listed: Sequence[Mapping[str, Any]], kind: str) -> Causes:
    if len(listed) > MAX_ENDPOINTS:
        return [f.too_many("endpoints", len(listed), MAX_ENDPOINTS)]
    out: Causes = []
    for i, one in enumerate(listed):
        at = f"endpoints[{i}]"
        addresses = one.get("addresses") or ()
        if not addresses:
            out.append(f.required(f"{at}.addresses", "must contain at least 1 address"))
        elif len(addresses) > MAX_ADDRESSES:
            out.append(f.too_many(f"{at}.addresses", len(addresses), MAX_ADDRESSES))
        for j, text in enumerate(addresses):
            problems = _slice_address(kind, text)
            if problems:
                out += f.each(f"{at}.addresses[{j}]", text, problems)
        if one.get("nodeName") is not None:
            out += f.each(f"{at}.nodeName", one["nodeName"], f.subdomain(one["nodeName"]))
        if one.get("deprecatedTopology"):
            out += f.label_map(f"{at}.deprecatedTopology", one["deprecatedTopology"])
        if one.get("hostname") is not None:
            out += f.each(f"{at}.hostname", one["hostname"], f.dns_label(one["hostname"]))
        out += _hints(f"{at}.hints", one.get("hints") or {})
    return out


def _slice_address(kind: str, text: str) -> Sequence[str]:
    if kind == "FQDN":
        return _full_name(text)
    if kind not in ("IPv4", "IPv6"):
        return ()
    problems = f.address(text)
    if problems:
        return problems
    if (":" in text) is not (kind == "IPv6"):
        return (f"must be an {kind} address",)
    return f.special_address(text)


def _full_name(text: str) -> Sequence[str]:
    name = text.removesuffix(".")
    problems = f.subdomain(name)
    if problems:
        return problems
    labels = name.split(".")
    if len(labels) < 2:
        return ("should be a domain with at least two segments separated by dots",)
    return [problem for label in labels for problem in f.dns_label(label)]


def _hints(at: str, hints: Mapping[str, Any]) -> Causes:
    out: Causes = []
    for key, check in (("forZones", f.label_value), ("forNodes", f.subdomain)):
        listed = hints.get(key) or ()
        if len(listed) > MAX_HINTS:
            out.append(f.too_many(f"{at}.{key}", len(listed), MAX_HINTS))
        seen: set[str] = set()
        for i, one in enumerate(listed):
            name = one.get("name") or ""
            if name in seen:
                out.append(f.duplicate(f"{at}.{key}[{i}].name", name))
            seen.add(name)
            out += f.each(f"{at}.{key}[{i}].name", name, check(name))
    return out


def _slice_ports(ports: Sequence[Mapping[str, Any]]) -> Causes:
    if len(ports) > MAX_PORTS:
        return [f.too_many("ports", len(ports), MAX_PORTS)]
    out: Causes = []
    names: set[str] = set()
    for i, port in enumerate(ports):
        name = port.get("name") or ""
        if name:
            out += f.each(f"ports[{i}].name", name, f.dns_label(name))
        if name in names:
            out.append(f.duplicate(f"ports[{i}].name", name))
        names.add(name)
        out += f.one_of(f"ports[{i}].protocol", port.get("protocol"), f.PROTOCOLS)
        out += f.app_protocol(f"ports[{i}].appProtocol", port.get("appProtocol"))
    return out


# --- warnings -----------------------------------------------------------------------------------

# Said of every request for Endpoints, reads as well.
ENDPOINTS_DEPRECATED: Final = (
    "v1 Endpoints is deprecated in v1.33+; use discovery.k8s.io/v1 EndpointSlice"
)


def endpoints_warnings(new: Obj, old: Obj | None) -> Iterator[str]:
    """Yield what the maker of an Endpoints is to be told."""
    yield ENDPOINTS_DEPRECATED
    for i, subset in enumerate(new.get("subsets") or ()):
        for key in ("addresses", "notReadyAddresses"):
            for j, one in enumerate(subset.get(key) or ()):
                yield from f.address_warnings(f"subsets[{i}].{key}[{j}].ip", one.get("ip") or "")


def service_warnings(new: Obj, old: Obj | None) -> Iterator[str]:
    """Yield what the maker of a Service is to be told."""
    spec: Spec = new.get("spec") or {}
    external = spec.get("externalIPs") or ()
    kind = spec.get("type")
    headless = kind == "ClusterIP" and spec.get("clusterIP") == HEADLESS
    if HINTS in ((new.get("metadata") or {}).get("annotations") or {}):
        yield f"annotation {HINTS} is deprecated, please use {MODE} instead"
    if kind != "ExternalName" and not headless:
        for i, text in enumerate(spec.get("clusterIPs") or ()):
            yield from f.address_warnings(f"spec.clusterIPs[{i}]", text)
    if headless:
        if spec.get("loadBalancerIP"):
            yield "spec.loadBalancerIP is ignored for headless services"
        if external:
            yield "spec.externalIPs is ignored for headless services"
        if spec.get("sessionAffinity") != "None":
            yield "spec.SessionAffinity is ignored for headless services"
    for i, text in enumerate(external):
        yield from f.address_warnings(f"spec.externalIPs[{i}]", text)
    if external and not headless and kind != "ExternalName":
        yield "spec.externalIPs is deprecated and may no longer be implemented in some clusters"
    if spec.get("loadBalancerIP"):
        yield from f.address_warnings("spec.loadBalancerIP", spec["loadBalancerIP"])
    for i, text in enumerate(spec.get("loadBalancerSourceRanges") or ()):
        yield from f.cidr_warnings(f"spec.loadBalancerSourceRanges[{i}]", text.strip())
    if external and kind == "ExternalName":
        yield 'spec.externalIPs is ignored when spec.type is "ExternalName"'
    if spec.get("externalName") and kind != "ExternalName":
        yield 'spec.externalName is ignored when spec.type is not "ExternalName"'
    if spec.get("trafficDistribution") == "PreferClose":
        yield 'spec.trafficDistribution: "PreferClose" is deprecated; use "PreferSameZone"'


def slice_warnings(new: Obj, old: Obj | None) -> Iterator[str]:
    """Yield what the maker of an EndpointSlice is to be told."""
    if new.get("addressType") == "FQDN" and old is None:
        yield "spec.addressType: FQDN endpoints are deprecated"
    if new.get("addressType") == "IPv6":
        for i, one in enumerate(new.get("endpoints") or ()):
            for j, text in enumerate(one.get("addresses") or ()):
                yield from f.address_warnings(f"endpoints[{i}].addresses[{j}]", text)
