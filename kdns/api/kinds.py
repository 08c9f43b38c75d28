"""Which kinds of object the embedded API serves, and under which names and paths.

One row a resource; what an object of it must look like is schema.py's, what it may hold
validation.py's, how it is printed table.py's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

VERBS: Final = (
    "create", "delete", "deletecollection", "get", "list", "patch", "update", "watch",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Resource:
    """One row of `kubectl api-resources`.

    group        -- "" is core
    plural       -- the word in paths
    type         -- name of its type in schema.py
    subresources -- "status" and "scale", as far as it has them
    fields       -- paths that field selectors may name besides metadata.name and .namespace
    """

    group: str
    version: str
    kind: str
    plural: str
    namespaced: bool = True
    short_names: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    subresources: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()

    @property
    def api_version(self) -> str:
        """ "v1", "apps/v1"."""
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def singular(self) -> str:
        return self.kind.lower()

    @property
    def path(self) -> str:
        """Where all namespaces' objects are: /api/v1/services."""
        return f"/{'apis' if self.group else 'api'}/{self.api_version}/{self.plural}"

    @property
    def qualified(self) -> str:
        """The name in error messages: "services", "deployments.apps"."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    @property
    def type(self) -> str:
        """The name of its type in schema.py: "core/v1.Service", "apps/v1.Deployment"."""
        return f"{self.group or 'core'}/{self.version}.{self.kind}"


RESOURCES: Final = (
    Resource("", "v1", "Namespace", "namespaces", False, ("ns",), (), ("status",),
             ("status.phase",)),
    Resource("", "v1", "Node", "nodes", False, ("no",), (), ("status",),
             ("spec.unschedulable",)),
    Resource("", "v1", "Service", "services", True, ("svc",), ("all",), ("status",),
             ("spec.clusterIP", "spec.type")),
    Resource("", "v1", "Endpoints", "endpoints", True, ("ep",)),
    Resource("", "v1", "Pod", "pods", True, ("po",), ("all",), ("status",),
             ("spec.nodeName", "spec.restartPolicy", "spec.schedulerName",
              "spec.serviceAccountName", "spec.hostNetwork", "status.phase", "status.podIP",
              "status.nominatedNodeName")),
    Resource("", "v1", "Event", "events", True, ("ev",), (), (),
             ("involvedObject.kind", "involvedObject.namespace", "involvedObject.name",
              "involvedObject.uid", "involvedObject.apiVersion",
              "involvedObject.resourceVersion", "involvedObject.fieldPath", "reason",
              "reportingComponent", "source", "type")),
    Resource("", "v1", "ConfigMap", "configmaps", True, ("cm",)),
    Resource("", "v1", "Secret", "secrets", True, (), (), (), ("type",)),
    Resource("", "v1", "ServiceAccount", "serviceaccounts", True, ("sa",)),
    Resource("discovery.k8s.io", "v1", "EndpointSlice", "endpointslices"),
    Resource("apps", "v1", "Deployment", "deployments", True, ("deploy",), ("all",),
             ("status", "scale")),
    Resource("apps", "v1", "ReplicaSet", "replicasets", True, ("rs",), ("all",),
             ("status", "scale"), ("status.replicas",)),
    Resource("apps", "v1", "StatefulSet", "statefulsets", True, ("sts",), ("all",),
             ("status", "scale")),
    Resource("coordination.k8s.io", "v1", "Lease", "leases"),
    Resource("networking.k8s.io", "v1", "ServiceCIDR", "servicecidrs", False, (), (),
             ("status",)),
)  # fmt: skip

BY_PLURAL: Final[Mapping[tuple[str, str], Resource]] = {(r.group, r.plural): r for r in RESOURCES}
BY_KIND: Final[Mapping[tuple[str, str], Resource]] = {(r.api_version, r.kind): r for r in RESOURCES}
