"""Which groups, versions and resources there are: what kubectl asks before all else. Pure.

Both forms of it, the legacy lists and the aggregated one (KEP-3352), are made of kinds.py.
"""

from __future__ import annotations

import platform
from typing import Any, Final

from kdns import __version__
from kdns.api.kinds import RESOURCES, VERBS, Resource

# Clients compare their own version with this one; what is served is this release's.
MAJOR, MINOR = "1", "36"

# What can be asked though there are no objects of it: (group, version, kind, plural, namespaced).
REVIEWS: Final = (
    ("authorization.k8s.io", "v1", "SelfSubjectAccessReview", "selfsubjectaccessreviews", False),
    ("authorization.k8s.io", "v1", "SelfSubjectRulesReview", "selfsubjectrulesreviews", False),
    ("authentication.k8s.io", "v1", "SelfSubjectReview", "selfsubjectreviews", False),
)
# Subresource -> (group and version where it is another kind, kind, verbs).
SCALE: Final = ("autoscaling", "v1", "Scale", ("get", "patch", "update"))
STATUS_VERBS: Final = ("get", "patch", "update")


def version_answer() -> dict[str, str]:
    """Return the body of /version."""
    return {
        "major": MAJOR,
        "minor": MINOR,
        "gitVersion": f"v{MAJOR}.{MINOR}.0+kdns-{__version__}",
        "gitCommit": "",
        "gitTreeState": "clean",
        "buildDate": "1970-01-01T00:00:00Z",
        "goVersion": f"python{platform.python_version()}",
        "compiler": platform.python_implementation(),
        "platform": f"{platform.system().lower()}/{platform.machine()}",
    }


def groups() -> list[tuple[str, str]]:
    """Return (group, version) of all but the core group, in order."""
    found = [(r.group, r.version) for r in RESOURCES if r.group]
    return list(dict.fromkeys([*found, *((g, v) for g, v, *_ in REVIEWS)]))


def api_versions(host: str) -> dict[str, Any]:
    """Return the body of /api."""
    return {
        "kind": "APIVersions",
        "versions": ["v1"],
        "serverAddressByClientCIDRs": [{"clientCIDR": "0.0.0.0/0", "serverAddress": host}],
    }


def group_list() -> dict[str, Any]:
    """Return the body of /apis."""
    return {
        "kind": "APIGroupList",
        "apiVersion": "v1",
        "groups": [_group(group, version) for group, version in groups()],
    }


def group_answer(group: str) -> dict[str, Any] | None:
    """Return the body of /apis/GROUP; None if there is no such group."""
    found = next((version for name, version in groups() if name == group), None)
    if found is None:
        return None
    return {"kind": "APIGroup", "apiVersion": "v1", **_group(group, found)}


def _group(group: str, version: str) -> dict[str, Any]:
    one = {"groupVersion": f"{group}/{version}", "version": version}
    return {"name": group, "versions": [one], "preferredVersion": one}


def resource_list(group: str, version: str) -> dict[str, Any] | None:
    """Return the body of /api/v1 or /apis/GROUP/VERSION; None if there is no such thing."""
    rows: list[dict[str, Any]] = []
    for one in _served(group, version):
        rows += _rows(one)
    for name, at, kind, plural, namespaced in REVIEWS:
        if (name, at) == (group, version):
            rows.append(
                {"name": plural, "singularName": kind.lower(), "namespaced": namespaced,
                 "kind": kind, "verbs": ["create"]}
            )  # fmt: skip
    if not rows:
        return None
    return {
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": f"{group}/{version}" if group else version,
        "resources": rows,
    }


def _served(group: str, version: str) -> list[Resource]:
    """Return resources by name, the order in which `kubectl get all` shows them."""
    found = [one for one in RESOURCES if (one.group, one.version) == (group, version)]
    return sorted(found, key=lambda one: one.plural)


def _rows(one: Resource) -> list[dict[str, Any]]:
    row: dict[str, Any] = {
        "name": one.plural,
        "singularName": one.singular,
        "namespaced": one.namespaced,
        "kind": one.kind,
        "verbs": list(VERBS),
    }
    if one.short_names:
        row["shortNames"] = list(one.short_names)
    if one.categories:
        row["categories"] = list(one.categories)
    rows = [row]
    for sub in one.subresources:
        below: dict[str, Any] = {
            "name": f"{one.plural}/{sub}",
            "singularName": "",
            "namespaced": one.namespaced,
            "kind": one.kind,
            "verbs": list(STATUS_VERBS),
        }
        if sub == "scale":
            group, version, kind, verbs = SCALE
            below |= {"group": group, "version": version, "kind": kind, "verbs": list(verbs)}
        rows.append(below)
    return rows


def aggregated(core: bool, version: str) -> dict[str, Any]:
    """Return the aggregated discovery of /api (core) or of /apis. version -- v2 or v2beta1"""
    wanted = [("", "v1")] if core else groups()
    return {
        "kind": "APIGroupDiscoveryList",
        "apiVersion": f"apidiscovery.k8s.io/{version}",
        "metadata": {},
        "items": [
            {
                "metadata": {"name": group, "creationTimestamp": None} if group else {},
                "versions": [
                    {"version": at, "freshness": "Current", "resources": _entries(group, at)}
                ],
            }
            for group, at in wanted
        ],
    }


def _entries(group: str, version: str) -> list[dict[str, Any]]:
    entries = []
    for one in _served(group, version):
        entry: dict[str, Any] = {
            "resource": one.plural,
            "responseKind": {"group": group, "version": version, "kind": one.kind},
            "scope": "Namespaced" if one.namespaced else "Cluster",
            "singularResource": one.singular,
            "verbs": list(VERBS),
        }
        if one.short_names:
            entry["shortNames"] = list(one.short_names)
        if one.categories:
            entry["categories"] = list(one.categories)
        if one.subresources:
            entry["subresources"] = [_sub_entry(one, sub) for sub in one.subresources]
        entries.append(entry)
    for name, at, kind, plural, namespaced in REVIEWS:
        if (name, at) == (group, version):
            entries.append(
                {
                    "resource": plural,
                    "responseKind": {"group": group, "version": version, "kind": kind},
                    "scope": "Namespaced" if namespaced else "Cluster",
                    "singularResource": kind.lower(),
                    "verbs": ["create"],
                }
            )
    return entries


def _sub_entry(one: Resource, sub: str) -> dict[str, Any]:
    if sub == "scale":
        group, version, kind, verbs = SCALE
    else:
        group, version, kind, verbs = one.group, one.version, one.kind, STATUS_VERBS
    return {
        "subresource": sub,
        "responseKind": {"group": group, "version": version, "kind": kind},
        "verbs": list(verbs),
    }
