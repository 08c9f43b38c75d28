"""What the API says when it refuses: Kubernetes' Status objects, in its words.

Decides code, reason and wording of each refusal (reference kubectl 3.2); who refuses, and
when, is everybody else's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kdns.api.kinds import Resource
from kdns.errors import ApiError


@dataclass(frozen=True, slots=True)
class Cause:
    """One thing wrong with one field. reason -- FieldValueRequired, FieldValueInvalid,
    FieldValueForbidden, FieldValueDuplicate, FieldValueNotSupported, FieldValueNotFound,
    FieldValueTooLong, FieldValueTooMany; message -- with the words that go with it, as
    `Invalid value: "x": must be ...`; field -- "spec.ports[0].port"
    """

    reason: str
    message: str
    field: str


def not_found(resource: Resource, name: str) -> ApiError:
    return _about(404, "NotFound", f'{resource.qualified} "{name}" not found', resource, name)


def already_exists(resource: Resource, name: str) -> ApiError:
    text = f'{resource.qualified} "{name}" already exists'
    return _about(409, "AlreadyExists", text, resource, name)


def conflict(resource: Resource, name: str, why: str) -> ApiError:
    """A write that starts from an old version, or a precondition that does not hold."""
    text = f'Operation cannot be fulfilled on {resource.qualified} "{name}": {why}'
    return _about(409, "Conflict", text, resource, name)


MODIFIED = (
    "the object has been modified; please apply your changes to the latest version and try again"
)


def invalid(resource: Resource | None, name: str, causes: Sequence[Cause]) -> ApiError:
    """An object that may not be as it is: 422 with all causes. None: a patch, of no kind."""
    told = [f"{one.field}: {one.message}" for one in causes]
    text = told[0] if len(told) == 1 else f"[{', '.join(told)}]"
    kind = group = ""
    if resource is not None:
        kind, group = resource.kind, resource.group
    error = ApiError(
        422, "Invalid", f'{f"{kind}.{group}" if group else kind} "{name}" is invalid: {text}'
    )
    error.details = {"name": name, "kind": kind} if name else {}
    if group:
        error.details["group"] = group
    error.details["causes"] = [
        {"reason": one.reason, "message": one.message, "field": one.field} for one in causes
    ]
    return error


def bad_request(text: str) -> ApiError:
    return ApiError(400, "BadRequest", text)


def expired(text: str) -> ApiError:
    return ApiError(410, "Expired", text)


def unsupported_media(text: str) -> ApiError:
    return ApiError(415, "UnsupportedMediaType", text)


def forbidden(resource: Resource, name: str, why: str) -> ApiError:
    text = f'{resource.qualified} "{name}" is forbidden: {why}'
    return _about(403, "Forbidden", text, resource, name)


def _about(code: int, reason: str, text: str, resource: Resource, name: str) -> ApiError:
    details: dict[str, Any] = {"name": name, "kind": resource.plural}
    if resource.group:
        details["group"] = resource.group
    return ApiError(code, reason, text, details)


def status_of(error: ApiError) -> dict[str, Any]:
    """Return the body of a refusal."""
    body: dict[str, Any] = {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": str(error),
        **({"reason": error.reason} if error.reason else {}),
        "code": error.code,
    }
    if error.details:
        body["details"] = error.details
    return body
