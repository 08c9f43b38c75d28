"""What an object holds where its maker said nothing, and what a write may not decide.

set_defaults fills in what a version of an object leaves open, whether it is new or not. prepare
does what upstream's registry strategies do before validation: it looks at the version before,
keeps what was given out, drops what a change of type has made meaningless, gives a new object
its first status, and counts generations. What is then refused is validation.py's; addresses and
ports are allocate.py's.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, TypeAlias

from kdns.api.kinds import Resource
from kdns.api.quantity import parse_quantity

Obj: TypeAlias = dict[str, Any]

HEADLESS: Final = "None"
AFFINITY_SECONDS: Final = 10800
DEFAULT_MODE: Final = 0o644
TOLERATION_SECONDS: Final = 300
NAME_LABEL: Final = "kubernetes.io/metadata.name"
# Written by the Deployment controller itself: no change that it has to observe.
REVISION: Final = "deployment.kubernetes.io/revision"
WITH_NODE_PORTS: Final = frozenset({"NodePort", "LoadBalancer"})


def set_defaults(resource: Resource, obj: Obj) -> None:
    """Fill in, in place, what a version of an object leaves open."""
    fill = _DEFAULTS.get(resource.kind)
    if fill is not None:
        fill(obj)


def prepare(resource: Resource, new: Obj, old: Obj | None) -> None:
    """Make of what was asked for what its kind makes of it, in place; after set_defaults.

    old -- None: the object is new
    """
    ready = _PREPARE.get(resource.kind)
    if ready is not None:
        ready(new, old)
    observed = _OBSERVED.get(resource.kind)
    if observed is not None:
        _count_generation(new, old, observed)


# --- Service ------------------------------------------------------------------------------------


def _service(obj: Obj) -> None:
    spec = obj.setdefault("spec", {})
    kind = spec.get("type") or "ClusterIP"
    spec["type"] = kind
    _affinity(spec)
    for port in spec.get("ports") or ():
        if not port.get("protocol"):
            port["protocol"] = "TCP"
        if port.get("targetPort") in (None, 0, ""):
            port["targetPort"] = port.get("port", 0)
    if externally_accessible(spec) and not spec.get("externalTrafficPolicy"):
        spec["externalTrafficPolicy"] = "Cluster"
    if kind != "ExternalName" and spec.get("internalTrafficPolicy") is None:
        spec["internalTrafficPolicy"] = "Cluster"
    if kind == "LoadBalancer":
        if spec.get("allocateLoadBalancerNodePorts") is None:
            spec["allocateLoadBalancerNodePorts"] = True
        for one in ((obj.get("status") or {}).get("loadBalancer") or {}).get("ingress") or ():
            if one.get("ip") and one.get("ipMode") is None:
                one["ipMode"] = "VIP"


def _affinity(spec: dict[str, Any]) -> None:
    if not spec.get("sessionAffinity"):
        spec["sessionAffinity"] = "None"
    if spec["sessionAffinity"] == "None":
        spec.pop("sessionAffinityConfig", None)
    elif spec["sessionAffinity"] == "ClientIP":
        config = (spec.get("sessionAffinityConfig") or {}).get("clientIP") or {}
        if config.get("timeoutSeconds") is None:
            spec["sessionAffinityConfig"] = {"clientIP": {"timeoutSeconds": AFFINITY_SECONDS}}


def externally_accessible(spec: Mapping[str, Any]) -> bool:
    """Whether a Service can be reached at something else than its ClusterIP."""
    kind = spec.get("type")
    return kind in WITH_NODE_PORTS or (kind == "ClusterIP" and bool(spec.get("externalIPs")))


def _prepare_service(new: Obj, old: Obj | None) -> None:
    spec = new["spec"]
    if old is None:
        if spec.get("clusterIP") and not spec.get("clusterIPs"):
            spec["clusterIPs"] = [spec["clusterIP"]]
        new["status"] = {"loadBalancer": {}}
        return
    before = old.get("spec") or {}
    _keep_given(spec, before)
    _pair_cluster_ips(spec, before)
    _drop_meaningless(new, spec, before)


def _keep_given(spec: dict[str, Any], before: Mapping[str, Any]) -> None:
    """Keep what was given out and is not said again: the same manifest can be sent twice."""
    kind, kind_before = spec["type"], before.get("type")
    if kind != "ExternalName" and kind_before != "ExternalName":
        if not spec.get("clusterIP") and before.get("clusterIP"):
            spec["clusterIP"] = before["clusterIP"]
        if not spec.get("clusterIPs") and before.get("clusterIPs"):
            spec["clusterIPs"] = list(before["clusterIPs"])
    if kind in WITH_NODE_PORTS and kind_before in WITH_NODE_PORTS:
        held = {one.get("name") or "": one.get("nodePort") or 0 for one in before.get("ports", ())}
        used = {one.get("nodePort") for one in spec.get("ports") or ()} & set(held.values())
        for port in spec.get("ports") or ():
            given = held.get(port.get("name") or "", 0)
            if not port.get("nodePort") and given and given not in used:
                port["nodePort"] = given
                used.add(given)
    if (
        _needs_health_check(spec)
        and _needs_health_check(before)
        and not spec.get("healthCheckNodePort")
        and before.get("healthCheckNodePort")
    ):
        spec["healthCheckNodePort"] = before["healthCheckNodePort"]


def _pair_cluster_ips(spec: dict[str, Any], before: Mapping[str, Any]) -> None:
    """Follow with clusterIPs where only clusterIP was changed: clients know one or both."""
    one, one_before = spec.get("clusterIP") or "", before.get("clusterIP") or ""
    listed, listed_before = spec.get("clusterIPs") or [], before.get("clusterIPs") or []
    if listed_before and not listed and one == one_before:
        spec["clusterIPs"] = list(listed_before)
    if one != one_before and listed == listed_before:
        if one:
            spec["clusterIPs"] = [one]
        elif one_before:
            spec.pop("clusterIPs", None)


def _drop_meaningless(new: Obj, spec: dict[str, Any], before: Mapping[str, Any]) -> None:
    """Drop what the new type has no use for, and what its maker has not touched: what was
    touched is validation's to refuse."""
    kind, kind_before = spec["type"], before.get("type")

    def same(*keys: str) -> bool:
        return all((spec.get(key) or None) == (before.get(key) or None) for key in keys)

    def drop(*keys: str) -> None:
        for key in keys:
            spec.pop(key, None)

    if kind == "ExternalName" and kind_before != "ExternalName":
        if same("clusterIP", "clusterIPs"):
            drop("clusterIP", "clusterIPs")
        for key in ("ipFamilies", "ipFamilyPolicy"):
            if same(key):
                drop(key)
    if kind not in WITH_NODE_PORTS and kind_before in WITH_NODE_PORTS:
        ports = spec.get("ports") or ()
        held = {one.get("nodePort") or 0 for one in before.get("ports") or ()} | {0}
        if all((one.get("nodePort") or 0) in held for one in ports):
            for port in ports:
                port.pop("nodePort", None)
    checked, checked_before = _needs_health_check(spec), _needs_health_check(before)
    if checked_before and not checked and same("healthCheckNodePort"):
        drop("healthCheckNodePort")
    if kind_before == "LoadBalancer" and kind != "LoadBalancer":
        for key in ("allocateLoadBalancerNodePorts", "loadBalancerClass"):
            if spec.get(key) == before.get(key):
                drop(key)
    outside, outside_before = externally_accessible(spec), externally_accessible(before)
    if outside_before and not outside and same("externalTrafficPolicy"):
        drop("externalTrafficPolicy")
    if kind != "LoadBalancer" and (new.get("status") or {}).get("loadBalancer"):
        new["status"]["loadBalancer"] = {}


def _needs_health_check(spec: Mapping[str, Any]) -> bool:
    return spec.get("type") == "LoadBalancer" and spec.get("externalTrafficPolicy") == "Local"


# --- small kinds --------------------------------------------------------------------------------


def _namespace(obj: Obj) -> None:
    meta = obj["metadata"]
    if meta.get("name"):
        meta["labels"] = {**(meta.get("labels") or {}), NAME_LABEL: meta["name"]}


def _prepare_namespace(new: Obj, old: Obj | None) -> None:
    spec = new.setdefault("spec", {})
    if old is not None:
        # An empty list is how the last controller lets go of a namespace; saying nothing is not.
        held = (old.get("spec") or {}).get("finalizers")
        if held and spec.get("finalizers") is None:
            spec["finalizers"] = list(held)
        return
    if "kubernetes" not in (spec.get("finalizers") or ()):
        spec["finalizers"] = [*(spec.get("finalizers") or ()), "kubernetes"]
    new["status"] = {"phase": "Active"}


def _secret(obj: Obj) -> None:
    if not obj.get("type"):
        obj["type"] = "Opaque"
    said = obj.pop("stringData", None)
    if said:
        data = dict(obj.get("data") or {})
        for key, text in said.items():
            data[key] = base64.b64encode(text.encode()).decode()
        obj["data"] = data


def _endpoints(obj: Obj) -> None:
    for subset in obj.get("subsets") or ():
        for port in subset.get("ports") or ():
            if not port.get("protocol"):
                port["protocol"] = "TCP"


def _slice(obj: Obj) -> None:
    for port in obj.get("ports") or ():
        port.setdefault("name", "")
        if not port.get("protocol"):
            port["protocol"] = "TCP"


def _node(obj: Obj) -> None:
    status = obj.get("status")
    if status and status.get("capacity") and not status.get("allocatable"):
        status["allocatable"] = dict(status["capacity"])


_NODE_INFO = (
    "architecture", "bootID", "containerRuntimeVersion", "kernelVersion", "kubeProxyVersion",
    "kubeletVersion", "machineID", "operatingSystem", "osImage", "systemUUID",
)  # fmt: skip


def _prepare_node(new: Obj, old: Obj | None) -> None:
    if old is None:
        status = new.setdefault("status", {})
        status.setdefault("daemonEndpoints", {"kubeletEndpoint": {"Port": 0}})
        info = status.setdefault("nodeInfo", {})
        for name in _NODE_INFO:
            info.setdefault(name, "")


# --- Pods ---------------------------------------------------------------------------------------


def _pod(obj: Obj) -> None:
    spec = obj.setdefault("spec", {})
    for container in containers_of(spec, ephemeral=False):
        limits = (container.get("resources") or {}).get("limits")
        if limits:
            requests = container["resources"].setdefault("requests", {})
            for name, amount in limits.items():
                requests.setdefault(name, amount)
    _pod_spec(spec)
    if spec.get("enableServiceLinks") is None:
        spec["enableServiceLinks"] = True
    if spec.get("hostNetwork"):
        for container in containers_of(spec, ephemeral=False):
            for port in container.get("ports") or ():
                if not port.get("hostPort"):
                    port["hostPort"] = port.get("containerPort", 0)


def containers_of(spec: Mapping[str, Any], *, ephemeral: bool = True) -> Iterator[dict[str, Any]]:
    """Yield all containers of a Pod."""
    kinds = ("initContainers", "containers", "ephemeralContainers")
    for key in kinds if ephemeral else kinds[:2]:
        yield from spec.get(key) or ()


def _pod_spec(spec: dict[str, Any]) -> None:
    """Fill in what Pods and templates of Pods have in common."""
    for key, value in (
        ("dnsPolicy", "ClusterFirst"),
        ("restartPolicy", "Always"),
        ("schedulerName", "default-scheduler"),
    ):
        if not spec.get(key):
            spec[key] = value
    if spec.get("securityContext") is None:
        spec["securityContext"] = {}
    if spec.get("terminationGracePeriodSeconds") is None:
        spec["terminationGracePeriodSeconds"] = 30
    # The older name of the same field.
    account = spec.get("serviceAccountName") or spec.get("serviceAccount")
    if account:
        spec["serviceAccountName"] = spec["serviceAccount"] = account
    for volume in spec.get("volumes") or ():
        _volume(volume)
    for container in containers_of(spec):
        _container(container)


def _container(container: dict[str, Any]) -> None:
    if not container.get("imagePullPolicy"):
        latest = image_tag(container.get("image") or "") == "latest"
        container["imagePullPolicy"] = "Always" if latest else "IfNotPresent"
    if not container.get("terminationMessagePath"):
        container["terminationMessagePath"] = "/dev/termination-log"
    if not container.get("terminationMessagePolicy"):
        container["terminationMessagePolicy"] = "File"
    if container.get("resources") is None:
        container["resources"] = {}
    for port in container.get("ports") or ():
        if not port.get("protocol"):
            port["protocol"] = "TCP"
    for env in container.get("env") or ():
        field = (env.get("valueFrom") or {}).get("fieldRef")
        if field and not field.get("apiVersion"):
            field["apiVersion"] = "v1"
    for key in ("livenessProbe", "readinessProbe", "startupProbe"):
        if container.get(key):
            _probe(container[key])
    for hook in (container.get("lifecycle") or {}).values():
        if isinstance(hook, dict) and hook.get("httpGet"):
            _http_get(hook["httpGet"])


_PROBE = {"timeoutSeconds": 1, "periodSeconds": 10, "successThreshold": 1, "failureThreshold": 3}


def _probe(probe: dict[str, Any]) -> None:
    for key, value in _PROBE.items():
        if not probe.get(key):
            probe[key] = value
    if probe.get("httpGet"):
        _http_get(probe["httpGet"])
    if probe.get("grpc"):
        probe["grpc"].setdefault("service", "")


def _http_get(action: dict[str, Any]) -> None:
    if not action.get("path"):
        action["path"] = "/"
    if not action.get("scheme"):
        action["scheme"] = "HTTP"


def _volume(volume: dict[str, Any]) -> None:
    if not any(value is not None for key, value in volume.items() if key != "name"):
        volume["emptyDir"] = {}
    for key in ("secret", "configMap", "downwardAPI", "projected"):
        source = volume.get(key)
        if source is not None and source.get("defaultMode") is None:
            source["defaultMode"] = DEFAULT_MODE
    if volume.get("hostPath") is not None:
        volume["hostPath"].setdefault("type", "")
    _field_items(volume.get("downwardAPI"))
    for source in (volume.get("projected") or {}).get("sources") or ():
        _field_items(source.get("downwardAPI"))
        if source.get("serviceAccountToken") is not None:
            source["serviceAccountToken"].setdefault("expirationSeconds", 3600)


def _field_items(source: Mapping[str, Any] | None) -> None:
    for item in (source or {}).get("items") or ():
        if item.get("fieldRef") and not item["fieldRef"].get("apiVersion"):
            item["fieldRef"]["apiVersion"] = "v1"


def image_tag(image: str) -> str:
    """Return the tag of an image: "latest" where neither a tag nor a digest is named."""
    name, _, digest = image.partition("@")
    tag = name.rpartition("/")[2].partition(":")[2]
    return tag or ("" if digest else "latest")


def _prepare_pod(new: Obj, old: Obj | None) -> None:
    """What upstream's strategy and its admission plugins do that are always on: ServiceAccount,
    Priority, DefaultTolerationSeconds."""
    spec = new["spec"]
    before = (old or {}).get("spec") or {}
    _tolerate(spec)
    if old is not None:
        for key in ("priority", "preemptionPolicy"):
            if spec.get(key) is None and before.get(key) is not None:
                spec[key] = before[key]
        return
    if not spec.get("serviceAccountName"):
        spec["serviceAccountName"] = spec["serviceAccount"] = "default"
    if spec.get("priority") is None:
        spec["priority"] = 0
    if spec.get("preemptionPolicy") is None:
        spec["preemptionPolicy"] = "PreemptLowerPriority"
    new["status"] = {"phase": "Pending", "qosClass": quality_of(spec)}


def _tolerate(spec: dict[str, Any]) -> None:
    """A Pod stays for a while on a node that is away, unless it says for how long."""
    held = list(spec.get("tolerations") or ())
    for key in ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"):
        if any(
            one.get("key") in (None, "", key) and one.get("effect") in (None, "", "NoExecute")
            for one in held
        ):
            continue
        held.append(
            {
                "effect": "NoExecute",
                "key": key,
                "operator": "Exists",
                "tolerationSeconds": TOLERATION_SECONDS,
            }
        )
    spec["tolerations"] = held


def quality_of(spec: Mapping[str, Any]) -> str:
    """Return a Pod's class of service: how its containers' requests stand to their limits."""
    asked = bounded = False
    guaranteed = True
    for container in containers_of(spec, ephemeral=False):
        resources = container.get("resources") or {}
        requests, limits = resources.get("requests") or {}, resources.get("limits") or {}
        for name in ("cpu", "memory"):
            request, limit = _amount(requests.get(name)), _amount(limits.get(name))
            asked |= bool(request)
            bounded |= bool(limit)
            guaranteed &= bool(limit) and request in (0, limit)
    if not asked and not bounded:
        return "BestEffort"
    return "Guaranteed" if guaranteed else "Burstable"


def _amount(text: object) -> float:
    found = parse_quantity(text)
    return float(found) if found is not None else 0.0


# --- workloads ----------------------------------------------------------------------------------


def _template(spec: dict[str, Any]) -> None:
    template = spec.get("template")
    if isinstance(template, dict):
        template.setdefault("metadata", {})
        _pod_spec(template.setdefault("spec", {}))


def _replica_set(obj: Obj) -> None:
    spec = obj.setdefault("spec", {})
    if spec.get("replicas") is None:
        spec["replicas"] = 1
    _template(spec)


def _deployment(obj: Obj) -> None:
    _replica_set(obj)
    spec = obj["spec"]
    strategy = spec.get("strategy") or {}
    spec["strategy"] = strategy
    if not strategy.get("type"):
        strategy["type"] = "RollingUpdate"
    if strategy["type"] == "RollingUpdate":
        rolling = strategy.get("rollingUpdate") or {}
        strategy["rollingUpdate"] = rolling
        for key in ("maxUnavailable", "maxSurge"):
            if rolling.get(key) is None:
                rolling[key] = "25%"
    if spec.get("revisionHistoryLimit") is None:
        spec["revisionHistoryLimit"] = 10
    if spec.get("progressDeadlineSeconds") is None:
        spec["progressDeadlineSeconds"] = 600


def _stateful_set(obj: Obj) -> None:
    _replica_set(obj)
    spec = obj["spec"]
    if not spec.get("podManagementPolicy"):
        spec["podManagementPolicy"] = "OrderedReady"
    strategy = spec.get("updateStrategy") or {}
    spec["updateStrategy"] = strategy
    if not strategy.get("type"):
        strategy["type"] = "RollingUpdate"
    if strategy["type"] == "RollingUpdate":
        rolling = strategy.get("rollingUpdate") or {}
        strategy["rollingUpdate"] = rolling
        if rolling.get("partition") is None:
            rolling["partition"] = 0
    claims = spec.get("persistentVolumeClaimRetentionPolicy") or {}
    spec["persistentVolumeClaimRetentionPolicy"] = claims
    for key in ("whenDeleted", "whenScaled"):
        if not claims.get(key):
            claims[key] = "Retain"
    if spec.get("revisionHistoryLimit") is None:
        spec["revisionHistoryLimit"] = 10
    for claim in spec.get("volumeClaimTemplates") or ():
        claim.setdefault("apiVersion", "v1")
        claim.setdefault("kind", "PersistentVolumeClaim")
        claim.setdefault("metadata", {})
        claim.setdefault("spec", {}).setdefault("volumeMode", "Filesystem")
        status = claim.setdefault("status", {})
        if not status.get("phase"):
            status["phase"] = "Pending"


def _first_status(status: dict[str, int]) -> Callable[[Obj, Obj | None], None]:
    def prepared(new: Obj, old: Obj | None) -> None:
        if old is None:
            new["status"] = dict(status)

    return prepared


# --- generations --------------------------------------------------------------------------------


def _count_generation(new: Obj, old: Obj | None, observed: Callable[[Obj], object]) -> None:
    """Count the versions of what controllers act on."""
    meta = new["metadata"]
    if old is None:
        meta["generation"] = 1
        return
    before = int(old["metadata"].get("generation") or 0)
    changed = observed(new) != observed(old)
    if before or changed:
        meta["generation"] = before + changed
    else:
        meta.pop("generation", None)


def _spec(obj: Obj) -> object:
    return obj.get("spec")


def _spec_and_annotations(obj: Obj) -> object:
    held = obj["metadata"].get("annotations") or {}
    return obj.get("spec"), {key: text for key, text in held.items() if key != REVISION}


def _all_but_metadata(obj: Obj) -> object:
    return {key: value for key, value in obj.items() if key != "metadata"}


_OBSERVED: Final[Mapping[str, Callable[[Obj], object]]] = {
    "Deployment": _spec_and_annotations,
    "ReplicaSet": _spec,
    "StatefulSet": _spec,
    "Pod": _spec,
    "EndpointSlice": _all_but_metadata,
}

_DEFAULTS: Final[Mapping[str, Callable[[Obj], None]]] = {
    "Service": _service,
    "Namespace": _namespace,
    "Secret": _secret,
    "Endpoints": _endpoints,
    "EndpointSlice": _slice,
    "Node": _node,
    "Pod": _pod,
    "Deployment": _deployment,
    "ReplicaSet": _replica_set,
    "StatefulSet": _stateful_set,
}

_PREPARE: Final[Mapping[str, Callable[[Obj, Obj | None], None]]] = {
    "Service": _prepare_service,
    "Namespace": _prepare_namespace,
    "Node": _prepare_node,
    "Pod": _prepare_pod,
    "Deployment": _first_status({}),
    "ReplicaSet": _first_status({"replicas": 0}),
    "StatefulSet": _first_status({"availableReplicas": 0, "replicas": 0}),
}
