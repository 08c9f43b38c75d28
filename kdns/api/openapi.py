"""What the API says about itself in OpenAPI 3: for `kubectl explain`, for clients that ask
whether the server checks fields, for generators of other clients. Pure.

Made of schema.py (types), kinds.py (paths) and openapi_words.py (sentences) when somebody first
asks. Upstream's names and extensions throughout, so that tools made for a cluster read it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Final, TypeAlias

from kdns import __version__
from kdns.api import discovery
from kdns.api.kinds import RESOURCES, Resource
from kdns.api.openapi_words import WORDS
from kdns.api.schema import Field, Type, type_named

Obj: TypeAlias = dict[str, Any]

_META: Final = "io.k8s.apimachinery.pkg.apis.meta.v1."
_REF: Final = "#/components/schemas/"
_MEDIA: Final = ("application/json", "application/yaml")
_PATCH_MEDIA: Final = (
    "application/apply-patch+yaml", "application/json-patch+json",
    "application/merge-patch+json", "application/strategic-merge-patch+json",
)  # fmt: skip

# schema.py's scalars that are written in place, and those that have a name of their own.
_PLAIN: Final[Mapping[str, Obj]] = {
    "string": {"type": "string"},
    "int32": {"type": "integer", "format": "int32"},
    "int64": {"type": "integer", "format": "int64"},
    "bool": {"type": "boolean"},
    "bytes": {"type": "string", "format": "byte"},
    "strings": {"type": "array", "items": {"type": "string"}},
}
_NAMED: Final[Mapping[str, tuple[str, Obj]]] = {
    "time": (f"{_META}Time", {"type": "string", "format": "date-time"}),
    "microtime": (f"{_META}MicroTime", {"type": "string", "format": "date-time"}),
    "fieldsv1": (f"{_META}FieldsV1", {"type": "object"}),
    "quantity": (
        "io.k8s.apimachinery.pkg.api.resource.Quantity",
        {"oneOf": [{"type": "string"}, {"type": "number"}]},
    ),
    "intorstring": (
        "io.k8s.apimachinery.pkg.util.intstr.IntOrString",
        {"format": "int-or-string", "oneOf": [{"type": "integer"}, {"type": "string"}]},
    ),
}
_PATCH: Final = (f"{_META}Patch", {"type": "object", "description": "A patch, in its own form."})
# Of every object.
_TYPE_META: Final = {
    "apiVersion": "Group and version of the object's form.",
    "kind": "What kind of object it is.",
    "metadata": "The object's name, its labels, and what the server keeps about it.",
}


def index() -> Obj:
    """Return the body of /openapi/v3: where each group's document is. An address changes when
    its document does, so clients may keep what they got."""
    return {"paths": {path: {"serverRelativeURL": _address(path)} for path in _groups()}}


def document(path: str) -> Obj | None:
    """Return the document of "api/v1", "apis/apps/v1", ...; None if there is none. It is shared:
    not to be changed."""
    found = _groups().get(path)
    return None if found is None else _document(*found)


@cache
def _groups() -> Mapping[str, tuple[str, str]]:
    """The documents there are: path to (group, version)."""
    return {
        f"apis/{group}/{version}" if group else f"api/{version}": (group, version)
        for group, version in [("", "v1"), *discovery.groups()]
    }


@cache
def _address(path: str) -> str:
    text = json.dumps(document(path), sort_keys=True)
    return f"/openapi/v3/{path}?hash={hashlib.sha512(text.encode()).hexdigest()[:64].upper()}"


@cache
def _document(group: str, version: str) -> Obj:
    schemas: Obj = {}
    paths: Obj = {}
    for resource in RESOURCES:
        if (resource.group, resource.version) == (group, version):
            paths.update(_paths(resource))
            names = [resource.type, f"{resource.type}List"]
            if "scale" in resource.subresources:
                names.append("autoscaling/v1.Scale")
            if resource.kind == "Pod":
                names.append("policy/v1.Eviction")
            for name in names:
                _add_schema(name, schemas)
    for at, ver, kind, plural, _ in discovery.REVIEWS:
        if (at, ver) == (group, version):
            name = f"{at}/{ver}.{kind}"
            gvk = {"group": at, "version": ver, "kind": kind}
            path = f"/apis/{at}/{ver}/{plural}"
            paths[path] = {"post": _operation("post", f"create{_group_word(at, ver)}{kind}",
                                              gvk, name, name)}  # fmt: skip
            _add_schema(name, schemas)
    for name in ("meta/v1.DeleteOptions", "meta/v1.Status"):
        _add_schema(name, schemas)
    # A body of this form comes under every group and version: here it is of this one.
    schemas[_schema_name("meta/v1.DeleteOptions")]["x-kubernetes-group-version-kind"] = [
        {"group": group, "version": version, "kind": "DeleteOptions"}
    ]
    schemas[_PATCH[0]] = _PATCH[1]
    return {
        "openapi": "3.0.0",
        "info": {"title": "Kubernetes", "version": f"v{discovery.MAJOR}.{discovery.MINOR}.0"
                                                   f"+kdns-{__version__}"},
        "paths": dict(sorted(paths.items())),
        "components": {
            "schemas": dict(sorted(schemas.items())),
            "securitySchemes": {
                "BearerToken": {"type": "apiKey", "name": "authorization", "in": "header"}
            },
        },
        "security": [{"BearerToken": []}],
    }  # fmt: skip


# --- schemas ------------------------------------------------------------------------------


def _schema_name(name: str) -> str:
    """Upstream's name of a type: "core/v1.Service" is io.k8s.api.core.v1.Service."""
    group, _, rest = name.partition("/")
    if group == "meta":
        return f"io.k8s.apimachinery.pkg.apis.meta.{rest}"
    return f"io.k8s.api.{group.partition('.')[0]}.{rest}"


def _add_schema(name: str, schemas: Obj) -> None:
    """Add a type, and those that its fields have."""
    known = _schema_name(name)
    if known in schemas:
        return
    kind = type_named(name)
    made: Obj = {"type": "object"}
    schemas[known] = made
    words = _type_words(kind)
    if words.get(""):
        made["description"] = words[""]
    made["properties"] = {
        one.name: _property(one, words.get(one.name, ""), schemas) for one in kind.fields.values()
    }
    required = [one.name for one in kind.fields.values() if one.required]
    if required:
        made["required"] = required
    if kind.atomic:
        made["x-kubernetes-map-type"] = "atomic"
    if _is_object(kind):
        group, _, version = kind.api_version.rpartition("/")
        made["x-kubernetes-group-version-kind"] = [
            {"group": "" if group == "meta" else group, "version": version, "kind": kind.kind}
        ]


def _is_object(kind: Type) -> bool:
    """Whether it stands alone, with apiVersion and kind."""
    return "kind" in kind.fields and not kind.fields["kind"].number


def _property(field: Field, said: str, schemas: Obj) -> Obj:
    values, text = _values_of(said)
    zero = _ZERO.get(field.type, {})
    if field.shape == "one":
        made = _value(field.type, schemas)
        if not field.pointer and (field.required or not field.scalar) and zero is not None:
            made["default"] = zero
    else:
        inner = _value(field.type, schemas)
        if zero is not None:
            inner["default"] = zero
        if field.shape == "list":
            made = {"type": "array", "items": inner, "x-kubernetes-list-type": field.list_type}
        else:
            made = {"type": "object", "additionalProperties": inner}
        if field.list_keys:
            made["x-kubernetes-list-map-keys"] = list(field.list_keys)
        if field.shape == "map" and field.atomic:
            made["x-kubernetes-map-type"] = "atomic"
    if field.merge_key not in ("", "-"):
        made["x-kubernetes-patch-merge-key"] = field.merge_key
    strategy = [
        word for word, on in (("merge", field.merge_key), ("retainKeys", field.retain_keys)) if on
    ]
    if strategy:
        made["x-kubernetes-patch-strategy"] = ",".join(strategy)
    if values:
        made["enum"] = values
    if text:
        made["description"] = text
    return made


# What is written where nothing is said; None: upstream says nothing of it either.
_ZERO: Final[Mapping[str, object]] = {
    "string": "", "int32": 0, "int64": 0, "bool": False,
    "bytes": None, "time": None, "microtime": None, "quantity": None, "intorstring": None,
    "strings": None, "fieldsv1": None,
}  # fmt: skip


def _value(name: str, schemas: Obj) -> Obj:
    if name in _PLAIN:
        return dict(_PLAIN[name])
    if name in _NAMED:
        known, made = _NAMED[name]
        schemas.setdefault(known, made)
    else:
        known = _schema_name(name)
        _add_schema(name, schemas)
    # Beside a $ref nothing else may stand.
    return {"allOf": [{"$ref": _REF + known}]}


@cache
def _words() -> Mapping[str, Mapping[str, str]]:
    found: dict[str, dict[str, str]] = {}
    of_type: dict[str, str] = {}
    for line in filter(None, WORDS.splitlines()):
        name, _, text = line.strip().partition(" ")
        if line[0] != " ":
            of_type = found[name] = {}
            name = ""
        of_type[name] = text
    return found


def _type_words(kind: Type) -> Mapping[str, str]:
    """Return the sentences about a type (under "") and its fields."""
    own = dict(_words().get(kind.name, {}))
    if _is_object(kind):
        own = {**_TYPE_META, **own}
        if kind.kind.endswith("List"):
            own |= {
                "": f"A list of {kind.kind.removesuffix('List')} objects.",
                "items": "The objects.",
                "metadata": "The version of the list, and how to go on with it.",
            }
    return own


def _values_of(said: str) -> tuple[list[str], str]:
    """Cut "{A|B} text" into the values and the text."""
    if not said.startswith("{"):
        return [], said
    values, _, text = said[1:].partition("} ")
    return values.split("|"), text


# --- paths --------------------------------------------------------------------------------


def _query(name: str, kind: str, text: str) -> Obj:
    return {
        "name": name, "in": "query", "description": text,
        "schema": {"type": kind, "uniqueItems": True},
    }  # fmt: skip


def _in_path(name: str, text: str) -> Obj:
    return {
        "name": name, "in": "path", "required": True, "description": text,
        "schema": {"type": "string", "uniqueItems": True},
    }  # fmt: skip


_PRETTY: Final = _query("pretty", "string", "Whether the answer is broken into lines.")
_NAME: Final = _in_path("name", "The object's name.")
_NAMESPACE: Final = _in_path("namespace", "The namespace the object is in.")
_WRITE: Final = (
    _query("dryRun", "string", "All: say what would happen and change nothing."),
    _query("fieldManager", "string", "Who writes: the owner of the fields in managedFields."),
    _query("fieldValidation", "string",
           "Strict: unknown and repeated fields are refused. Warn: they are told in a warning."
           " Ignore: they are dropped in silence."),
)  # fmt: skip
_FORCE: Final = _query("force", "boolean", "Whether an apply takes fields from their owners.")
_DELETE: Final = (
    _WRITE[0],
    _query("gracePeriodSeconds", "integer", "Seconds the object may live on; 0 is at once."),
    _query("propagationPolicy", "string",
           "Background, Foreground or Orphan: what becomes of what belongs to the object."),
)  # fmt: skip
_LIST: Final = (
    _query("allowWatchBookmarks", "boolean", "Whether a watch may send bookmarks."),
    _query("continue", "string", "The token of the page before."),
    _query("fieldSelector", "string", "Which objects, by fields."),
    _query("labelSelector", "string", "Which objects, by labels."),
    _query("limit", "integer", "The most objects in one answer."),
    _query("resourceVersion", "string", "The version to start from."),
    _query("resourceVersionMatch", "string", "How resourceVersion is meant."),
    _query("sendInitialEvents", "boolean", "Whether a watch starts with what is there."),
    _query("timeoutSeconds", "integer", "Seconds after which the answer ends."),
    _query("watch", "boolean", "Whether changes follow as they happen."),
)
# Upstream's action -> verb of the operation's name, parameters, codes of success.
_METHODS: Final[Mapping[str, tuple[str, tuple[Obj, ...], tuple[int, ...]]]] = {
    "get": ("read", (), (200,)),
    "list": ("list", _LIST, (200,)),
    "post": ("create", _WRITE, (200, 201, 202)),
    "put": ("replace", _WRITE, (200, 201)),
    "patch": ("patch", (*_WRITE, _FORCE), (200, 201)),
    "delete": ("delete", _DELETE, (200, 202)),
    "deletecollection": ("delete", (*_DELETE, *_LIST[1:9]), (200,)),
}
_STATUS: Final = "meta/v1.Status"
_OPTIONS: Final = "meta/v1.DeleteOptions"


def _paths(resource: Resource) -> Iterator[tuple[str, Obj]]:
    base = resource.path.rpartition("/")[0]
    space = "/namespaces/{namespace}" if resource.namespaced else ""
    within = "Namespaced" if resource.namespaced else ""
    many, outer = f"{base}{space}/{resource.plural}", [_NAMESPACE] if space else []
    gvk = {"group": resource.group, "version": resource.version, "kind": resource.kind}
    kind, whole = resource.type, f"{resource.type}List"
    word = _group_word(resource.group, resource.version)

    def operations(tail: str, of: Mapping[str, str], told: Obj, *actions: str) -> Obj:
        made: Obj = {}
        for action in actions:
            verb = _METHODS[action][0]
            collection = "Collection" if action == "deletecollection" else ""
            name = f"{verb}{word}{collection}{within}{resource.kind}{tail}"
            method = {"list": "get", "deletecollection": "delete"}.get(action, action)
            sent = _OPTIONS if method == "delete" else of["sent"]
            answer = of.get(action, of["sent"])
            made[method] = _operation(action, name, told, sent, answer)
        return made

    body = {"sent": kind, "list": whole, "deletecollection": _STATUS, "delete": _STATUS}
    yield (
        many,
        {
            **operations("", body, gvk, "list", "post", "deletecollection"),
            "parameters": [*outer, _PRETTY],
        },
    )
    one = f"{many}/{{name}}"
    inner = [_NAME, *outer, _PRETTY]
    yield one, {**operations("", body, gvk, "get", "put", "patch", "delete"), "parameters": inner}
    if "status" in resource.subresources:
        yield f"{one}/status", {
            **operations("Status", body, gvk, "get", "put", "patch"), "parameters": inner,
        }  # fmt: skip
    if "scale" in resource.subresources:
        scale = {"group": "autoscaling", "version": "v1", "kind": "Scale"}
        of = {"sent": "autoscaling/v1.Scale"}
        yield f"{one}/scale", {
            **operations("Scale", of, scale, "get", "put", "patch"), "parameters": inner,
        }  # fmt: skip
    if resource.kind == "Pod":
        eviction = {"group": "policy", "version": "v1", "kind": "Eviction"}
        of = {"sent": "policy/v1.Eviction"}
        yield f"{one}/eviction", {
            **operations("Eviction", of, eviction, "post"), "parameters": inner,
        }  # fmt: skip
    if space:
        name = f"list{word}{resource.kind}ForAllNamespaces"
        yield f"{base}/{resource.plural}", {
            "get": _operation("list", name, gvk, kind, whole), "parameters": [_PRETTY],
        }  # fmt: skip


def _group_word(group: str, version: str) -> str:
    """ "CoreV1", "AppsV1": the group in an operation's name."""
    return (group or "core").partition(".")[0].capitalize() + version.capitalize()


def _operation(action: str, name: str, gvk: Obj, sent: str, answer: str) -> Obj:
    """action -- upstream's word; sent -- type of the body; answer -- type of the answer"""
    _, params, codes = _METHODS[action]
    reply = {media: {"schema": {"$ref": _REF + _schema_name(answer)}} for media in _MEDIA}
    made: Obj = {
        "operationId": name,
        "tags": [f"{(gvk['group'] or 'core').partition('.')[0]}_{gvk['version']}"],
        "responses": {str(code): {"description": "OK", "content": reply} for code in codes}
        | {"401": {"description": "Unauthorized"}},
        "x-kubernetes-action": action,
        "x-kubernetes-group-version-kind": gvk,
    }
    if params:
        made["parameters"] = list(params)
    if action == "patch":
        patch = {"schema": {"$ref": _REF + _PATCH[0]}}
        made["requestBody"] = {"required": True, "content": dict.fromkeys(_PATCH_MEDIA, patch)}
    elif action not in ("get", "list"):
        made["requestBody"] = {
            "content": {"*/*": {"schema": {"$ref": _REF + _schema_name(sent)}}},
            "required": action in ("post", "put"),
        }
    return made
