"""What a request asks for: its path, its query, and the form of the answer. Pure.

Reference kubectl 3.1. Refusals are ApiErrors; carrying the request out is http.py's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias
from urllib.parse import unquote

from kdns.api import status
from kdns.api.kinds import BY_PLURAL, Resource
from kdns.api.objects import Deletion, How
from kdns.api.store import Obj
from kdns.errors import ApiError

JSON: Final = "application/json"
YAML: Final = "application/yaml"
PROTOBUF: Final = "application/vnd.kubernetes.protobuf"
JSON_TYPES: Final = ("", JSON, "text/json")
YAML_TYPES: Final = (YAML, "application/x-yaml", "text/yaml", "text/x-yaml")

Form: TypeAlias = Literal["json", "yaml", "table", "metadata", "discovery"]


@dataclass(frozen=True, slots=True)
class Accepted:
    """The form of an answer. content_type -- what to say it is; version -- of a Table or of
    aggregated discovery"""

    form: Form
    content_type: str = JSON
    version: str = "v1"


def parse_accept(header: str, forms: tuple[Form, ...] = ("json", "yaml")) -> Accepted:
    """Return the first form a client names that is among `forms`; protobuf is passed over, for
    every client that asks for it takes JSON as well. Raises ApiError 406."""
    for part in (header or JSON).split(","):
        words = [word.strip() for word in part.split(";")]
        media = words[0].lower()
        params = dict(word.partition("=")[::2] for word in words[1:])
        wanted = params.get("as", "")
        version = params.get("v", "v1")
        if media == JSON and wanted == "Table" and "table" in forms:
            if version in ("v1", "v1beta1"):
                return Accepted("table", f"{JSON};as=Table;v={version};g=meta.k8s.io", version)
        elif media == JSON and wanted.startswith("PartialObjectMetadata") and "metadata" in forms:
            return Accepted("metadata", f"{JSON};as={wanted};v={version};g=meta.k8s.io", version)
        elif media == JSON and wanted == "APIGroupDiscoveryList" and "discovery" in forms:
            if version in ("v2", "v2beta1"):
                kind = f"{JSON};g=apidiscovery.k8s.io;v={version};as=APIGroupDiscoveryList"
                return Accepted("discovery", kind, version)
        elif wanted:
            continue
        elif media in (JSON, "*/*", "application/*"):
            return Accepted("json")
        elif media in YAML_TYPES and "yaml" in forms:
            return Accepted("yaml", YAML)
    raise ApiError(
        406, "NotAcceptable",
        f"only the following media types are accepted: {JSON}, {YAML}",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Target:
    """What a path names. name -- "": the collection; namespace -- "": all, or none"""

    resource: Resource
    namespace: str = ""
    name: str = ""
    subresource: str = ""


def parse_path(path: str) -> Target | None:
    """Return what a path under /api/v1 or /apis/GROUP/VERSION names; None if there is no such
    thing. path -- as it was sent: "%2F" is part of a name, and no name has one"""
    parts = [unquote(part) for part in path.strip("/").split("/")]
    if any("/" in part for part in parts):
        return None
    if parts[0] == "api" and len(parts) > 2 and parts[1] == "v1":
        group, version, rest = "", "v1", parts[2:]
    elif parts[0] == "apis" and len(parts) > 3:
        group, version, rest = parts[1], parts[2], parts[3:]
    else:
        return None
    namespace = ""
    if rest[0] == "namespaces" and len(rest) > 2 and (group, rest[2]) in BY_PLURAL:
        namespace, rest = rest[1], rest[2:]
    resource = BY_PLURAL.get((group, rest[0]))
    if resource is None or resource.version != version or len(rest) > 3 or "" in rest:
        return None
    if namespace and not resource.namespaced:
        return None
    name = rest[1] if len(rest) > 1 else ""
    if name and resource.namespaced and not namespace:
        return None
    return Target(resource, namespace, name, rest[2] if len(rest) > 2 else "")


def collection_of(parts: Sequence[str]) -> str:
    """Return the plural that the parts of a path under /api/VERSION or /apis/GROUP/VERSION
    name, of whatever kind; "" for no such path."""
    head = {"api": 2, "apis": 3}.get(parts[0], len(parts))
    rest = parts[head:]
    if rest[:1] == ["namespaces"] and len(rest) > 2:
        rest = rest[2:]
    plural = rest[0] if rest else ""
    return plural if plural.isascii() and plural.isalpha() else ""


def how_of(query: Mapping[str, str], user_agent: str) -> How:
    """Return what the query of a write says. Raises ApiError 400."""
    dry_run = query.get("dryRun", "")
    if dry_run not in ("", "All"):
        raise status.bad_request(f"Invalid value: {dry_run!r}: dryRun must be All")
    validation = query.get("fieldValidation", "") or "Warn"
    if validation not in ("Strict", "Warn", "Ignore"):
        raise status.bad_request(
            f"Invalid value: {validation!r}: fieldValidation must be Ignore, Warn or Strict"
        )
    manager = query.get("fieldManager") or user_agent.partition("/")[0]
    printable = "".join(filter(str.isprintable, manager))[:128]
    return How(
        printable or "unknown",
        dry_run == "All",
        validation,  # type: ignore[arg-type]
        truth(query.get("force", "")),
    )


def deletion_of(options: Obj, query: Mapping[str, str]) -> Deletion:
    """Return what a DeleteOptions and the query of a deletion say. Raises ApiError 400."""
    wanted = options.get("preconditions") or {}
    propagation = query.get("propagationPolicy") or options.get("propagationPolicy")
    if options.get("orphanDependents"):
        propagation = "Orphan"
    if propagation not in (None, "Background", "Foreground", "Orphan"):
        raise status.bad_request(
            f"propagationPolicy: {propagation!r} must be Background, Foreground or Orphan"
        )
    grace = options.get("gracePeriodSeconds")
    if "gracePeriodSeconds" in query:
        grace = whole(query, "gracePeriodSeconds")
    dry_run = options.get("dryRun") or [one for one in (query.get("dryRun"),) if one]
    if dry_run not in ([], ["All"]):
        raise status.bad_request(f"Invalid value: {dry_run[0]!r}: dryRun must be All")
    return Deletion(
        wanted.get("uid") or "",
        wanted.get("resourceVersion") or "",
        propagation or "Background",  # type: ignore[arg-type]
        grace,
        bool(dry_run),
    )


def truth(text: str) -> bool:
    """Read a switch of a query: "1" and "true" are on."""
    return text.lower() in ("1", "true", "t")


def limit_of(query: Mapping[str, str]) -> int:
    """Return how many objects a list may have; 0: any number, which a negative number means,
    too, as upstream. Raises ApiError 400."""
    text = query.get("limit", "")
    return 0 if text[:1] == "-" and text[1:].isdigit() else whole(query, "limit")


def whole(query: Mapping[str, str], name: str) -> int:
    """Return a number of the query, 0 without one. Raises ApiError 400."""
    text = query.get(name, "")
    if not text:
        return 0
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise status.bad_request(f"{name}: {text!r} is not a whole number")
    return int(text)
