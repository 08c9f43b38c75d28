"""Services that the cluster itself has, and the addresses of LoadBalancers.

Decides what `kubernetes`, `kube-dns` and the ServiceCIDR look like, and when a Service has its
external address; which address is allocate.py's. Upstream: the API server's endpoint reconciler
and the default ServiceCIDR's, the CoreDNS add-on, the service controller with its cloud.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from kdns.api.controllers.events import Recorder
from kdns.api.controllers.index import (
    ENDPOINTS,
    SERVICE_CIDRS,
    SERVICE_NAME,
    SERVICES,
    SLICES,
    split,
)
from kdns.api.controllers.mirror import SKIP
from kdns.api.controllers.slices_plan import MANAGED_BY, family_of
from kdns.api.controllers.writes import APISERVER, CONTROLLERS, Writer
from kdns.api.kinds import Resource
from kdns.api.objects import now_text
from kdns.api.store import Event, Obj, Put

NAME: Final = "service-lb"
CLUSTER: Final = "cluster-services"
COMPONENT: Final = "service-controller"
OUR_CLASS: Final = "kdns.dev/loadbalancer"  # spec.loadBalancerClass; none means us, too
NO_ADDRESS_RETRY: Final = 30.0

KUBERNETES: Final = ("default", "kubernetes")
KUBE_DNS: Final = ("kube-system", "kube-dns")
FIRST, TENTH = 1, 10  # of the service range
RANGES: Final = ("", "kubernetes")  # the ServiceCIDR that a cluster has from its start


# --- the cluster's own Services ---------------------------------------------------------------


def kubernetes_service(cluster_ip: str, port: int) -> Obj:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": "kubernetes",
            "namespace": "default",
            "labels": {"component": "apiserver", "provider": "kubernetes"},
        },
        "spec": {
            "clusterIP": cluster_ip,
            "ports": [{"name": "https", "port": 443, "protocol": "TCP", "targetPort": port}],
            "type": "ClusterIP",
        },
    }


def dns_service(cluster_ip: str, port: int, metrics: int) -> Obj:
    ports = [
        {"name": "dns", "port": 53, "protocol": "UDP", "targetPort": port},
        {"name": "dns-tcp", "port": 53, "protocol": "TCP", "targetPort": port},
    ]
    if metrics:
        ports.append({"name": "metrics", "port": 9153, "protocol": "TCP", "targetPort": metrics})
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": "kube-dns",
            "namespace": "kube-system",
            "labels": {
                "k8s-app": "kube-dns",
                "kubernetes.io/cluster-service": "true",
                "kubernetes.io/name": "CoreDNS",
            },
            "annotations": {"prometheus.io/port": "9153", "prometheus.io/scrape": "true"},
        },
        "spec": {"clusterIP": cluster_ip, "ports": ports, "type": "ClusterIP"},
    }


def service_cidr(cidrs: list[str]) -> Obj:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "ServiceCIDR",
        "metadata": {"name": RANGES[1]},
        "spec": {"cidrs": cidrs},
    }


def endpoint_objects(service: Obj, address: str) -> tuple[Obj, Obj]:
    """Return slice and Endpoints that send all ports of a Service to one address."""
    meta = service["metadata"]
    ports = [
        {"name": port["name"], "port": port["targetPort"], "protocol": port["protocol"]}
        for port in service["spec"]["ports"]
    ]
    name, namespace = meta["name"], meta["namespace"]
    piece: Obj = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": {SERVICE_NAME: name, MANAGED_BY: "kdns.dev"},
        },
        "addressType": family_of(address),
        "endpoints": [{"addresses": [address], "conditions": {"ready": True}}],
        "ports": ports,
    }
    endpoints: Obj = {
        "apiVersion": "v1",
        "kind": "Endpoints",
        "metadata": {"name": name, "namespace": namespace, "labels": {SKIP: "true"}},
        "subsets": [{"addresses": [{"ip": address}], "ports": ports}],
    }
    if (namespace, name) == KUBERNETES:
        del piece["metadata"]["labels"][MANAGED_BY]  # nobody manages it: upstream's has none
    return piece, endpoints


class Addresses(Protocol):
    """Where the servers are."""

    api_address: tuple[str, int]
    dns_address: tuple[str, int] | None
    dns_metrics_port: int


class ClusterServices:
    """The controller of `kubernetes`, and of `kube-dns` where there is a DNS server."""

    def __init__(
        self,
        writer: Writer,
        queue: Callable[[str], None],
        addresses: Addresses,
        clock: Callable[[], float],
    ) -> None:
        self._writer = Writer(writer.objects, APISERVER)
        self._queue = queue
        self._addresses = addresses
        self._clock = clock

    def seen(self, event: Event) -> None:
        resource, *name = event.stored.key
        parts = (SERVICES.qualified, SLICES.qualified, ENDPOINTS.qualified)
        ours = tuple(name) in (KUBERNETES, KUBE_DNS) and resource in parts
        if ours or event.stored.key == (SERVICE_CIDRS.qualified, *RANGES):
            self._queue("all")

    async def reconcile(self, _key: str) -> float | None:
        """Make what is missing, bring up to date what is there."""
        said = self._addresses
        address = self._writer.objects.allocator.service_address
        api, dns = said.api_address, said.dns_address
        await _ensure(self._writer, kubernetes_service(address(FIRST), api[1]), api[0])
        if dns is not None:
            wanted = dns_service(address(TENTH), dns[1], said.dns_metrics_port)
            await _ensure(self._writer, wanted, dns[0])
        await self._ensure_ranges()
        return None

    async def _ensure_ranges(self) -> None:
        """Say where addresses come from: not where they came from, should data of a cluster
        with other ranges have been found."""
        writer = self._writer
        wanted = service_cidr(writer.objects.allocator.service_cidrs)
        stored = writer.objects.find(SERVICE_CIDRS, *RANGES)
        if stored is None:
            await writer.create(SERVICE_CIDRS, "", wanted)
        elif stored.obj.get("spec") != wanted["spec"]:
            await writer.force(SERVICE_CIDRS, stored, {**stored.obj, "spec": wanted["spec"]})
        stored = writer.objects.find(SERVICE_CIDRS, *RANGES)
        if stored is not None and not (stored.obj.get("status") or {}).get("conditions"):
            ready = {
                "type": "Ready",
                "status": "True",
                "reason": "",
                "message": "Kubernetes Service CIDR is ready",
                "lastTransitionTime": now_text(self._clock()),
            }
            await writer.put_status(SERVICE_CIDRS, stored, {"conditions": [ready]})


async def _ensure(writer: Writer, wanted: Obj, address: str) -> None:
    namespace, name = wanted["metadata"]["namespace"], wanted["metadata"]["name"]
    stored = writer.objects.find(SERVICES, namespace, name)
    if stored is None:
        await writer.create(SERVICES, namespace, wanted)
    else:

        def change(obj: Obj) -> None:
            if obj["spec"].get("selector"):
                return  # somebody runs their own there
            numbers = {one["name"]: one["targetPort"] for one in wanted["spec"]["ports"]}
            for port in obj["spec"].get("ports") or ():
                if port.get("name") in numbers:
                    port["targetPort"] = numbers[port["name"]]

        await writer.change(SERVICES, stored, change)
        if stored.obj["spec"].get("selector"):
            return
    for resource, obj in zip((SLICES, ENDPOINTS), endpoint_objects(wanted, address), strict=True):
        held = writer.objects.find(resource, namespace, name)
        field = "endpoints" if resource is SLICES else "subsets"
        if held is None:
            made = await _create_unchecked(writer, resource, namespace, obj, field)
        elif held.obj.get(field) != obj[field] or held.obj.get("ports") != obj.get("ports"):
            made = {**held.obj, **{k: v for k, v in obj.items() if k != "metadata"}}
        else:
            continue
        # Not through objects.replace(): a loopback address is no endpoint that a client may
        # write (upstream's validation), and yet it is where this server listens.
        await writer.objects.store.write(Put((resource.qualified, namespace, name), made))


async def _create_unchecked(
    writer: Writer, resource: Resource, namespace: str, obj: Obj, field: str
) -> Obj:
    """Create an object without its addresses, and return it with them."""
    created = await writer.create(resource, namespace, {**obj, field: []})
    return {**created, field: obj[field]}


# --- LoadBalancers ----------------------------------------------------------------------------


def wants_balancer(service: Obj) -> bool:
    spec = service["spec"]
    if spec.get("type") != "LoadBalancer" or service["metadata"].get("deletionTimestamp"):
        return False
    return spec.get("loadBalancerClass") in (None, "", OUR_CLASS)


class Balancers:
    """The controller. queue -- has a Service looked at"""

    def __init__(self, writer: Writer, recorder: Recorder, queue: Callable[[str], None]) -> None:
        self._writer = Writer(writer.objects, CONTROLLERS)
        self._recorder = recorder
        self._queue = queue

    def seen(self, event: Event) -> None:
        resource, namespace, name = event.stored.key
        if resource != SERVICES.qualified or event.type == "DELETED":
            return
        versions = [one for one in (event.before, event.stored) if one is not None]
        if any(b'"LoadBalancer"' in one.body or b'"ingress"' in one.body for one in versions):
            self._queue(f"{namespace}/{name}")

    async def reconcile(self, key: str) -> float | None:
        namespace, name = split(key)
        stored = self._writer.objects.find(SERVICES, namespace, name)
        if stored is None:
            return None
        service = stored.obj
        status = service.get("status") or {}
        had = (status.get("loadBalancer") or {}).get("ingress") or []
        if not wants_balancer(service):
            if had and service["spec"].get("type") != "LoadBalancer":
                self._tell(service, "DeletingLoadBalancer", "Deleting load balancer")
                await self._writer.put_status(SERVICES, stored, {**status, "loadBalancer": {}})
                self._tell(service, "DeletedLoadBalancer", "Deleted load balancer")
            return None
        addresses = self._writer.objects.allocator.give_lb(service)
        if not addresses:
            self._recorder.warn(
                service, "SyncLoadBalancerFailed",
                "Error syncing load balancer: failed to ensure load balancer: no address is free",
                COMPONENT,
            )  # fmt: skip
            return NO_ADDRESS_RETRY
        wanted = [{"ip": address, "ipMode": "VIP"} for address in addresses]
        if had == wanted:
            return None
        self._tell(service, "EnsuringLoadBalancer", "Ensuring load balancer")
        status = {**status, "loadBalancer": {"ingress": wanted}}
        await self._writer.put_status(SERVICES, stored, status)
        self._tell(service, "EnsuredLoadBalancer", "Ensured load balancer")
        return None

    def _tell(self, service: Obj, reason: str, message: str) -> None:
        self._recorder.tell(service, reason, message, COMPONENT)
