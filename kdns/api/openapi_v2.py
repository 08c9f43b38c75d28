"""What the API says about itself in OpenAPI 2, as little as kubectl needs of it. Pure.

kubectl leaves the checking of fields to the server, but for a `kind: List` manifest (what
`kubectl get -o yaml` prints): there it asks OpenAPI 2 for the kinds of the items, in protobuf.
So the kinds are all there is here, and nothing about their fields: those are openapi.py's.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any, Final

from kdns import __version__
from kdns.api.kinds import RESOURCES, Resource

# kubectl asks for spec.v2@v1.0, but takes no media type with an @ for an answer.
MEDIA: Final = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf"
_GVK: Final = "x-kubernetes-group-version-kind"

# Field numbers of gnostic's openapi.v2 messages.
_SWAGGER, _INFO, _PATHS, _DEFINITIONS = 1, 2, 8, 9  # of Document
_TITLE, _VERSION = 1, 2  # of Info
_ENTRY = 1  # of Definitions
_NAME, _VALUE = 1, 2  # of NamedSchema and NamedAny
_EXTENSION = 31  # of Schema
_YAML = 2  # of Any


@cache
def document() -> dict[str, Any]:
    """Return it as JSON has it."""
    return {
        "swagger": "2.0",
        "info": {"title": "kdns", "version": __version__},
        "paths": {},
        "definitions": {_name(one): {_GVK: [_kind(one)]} for one in RESOURCES},
    }


@cache
def encoded() -> bytes:
    """Return it as protobuf."""
    text = document()
    info = _field(_TITLE, text["info"]["title"]) + _field(_VERSION, text["info"]["version"])
    definitions = b"".join(
        _field(_ENTRY, _field(_NAME, name) + _field(_VALUE, _schema(definition)))
        for name, definition in text["definitions"].items()
    )
    return b"".join(
        [
            _field(_SWAGGER, text["swagger"]),
            _field(_INFO, info),
            _field(_PATHS, b""),
            _field(_DEFINITIONS, definitions),
        ]
    )


def _name(resource: Resource) -> str:
    """Return upstream's name of a type."""
    group = resource.group.partition(".")[0] or "core"
    return f"io.k8s.api.{group}.{resource.version}.{resource.kind}"


def _kind(resource: Resource) -> dict[str, str]:
    return {"group": resource.group, "version": resource.version, "kind": resource.kind}


def _schema(definition: dict[str, Any]) -> bytes:
    return b"".join(
        # JSON is YAML.
        _field(_EXTENSION, _field(_NAME, name) + _field(_VALUE, _field(_YAML, json.dumps(value))))
        for name, value in definition.items()
    )


def _field(number: int, value: str | bytes) -> bytes:
    """Return a field whose value is a text or a message."""
    raw = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(raw)) + raw


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
