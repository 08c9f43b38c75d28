"""Answers of the embedded API: objects in the form that was asked for, and refusals.

Decides bodies and headers; what is answered is http.py's, a watch's lines are watching.py's.
Reference kubectl 2.4, 3.1.
"""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

import msgspec
from aiohttp import web

from kdns.api import status
from kdns.api.kinds import Resource
from kdns.api.negotiate import JSON, Accepted, parse_accept
from kdns.api.objects import Listing, Result
from kdns.api.store import Obj, Stored
from kdns.api.table import render_table
from kdns.errors import ApiError

GZIP_FROM: Final = 128 << 10  # octets of an answer, as kube-apiserver
MAX_WARNINGS: Final = 4096  # characters of all warnings of an answer, as kube-apiserver
MAX_WARNING: Final = 256  # of one, where they are more than that
FORMS: Final = ("json", "yaml", "table", "metadata")

Dict: TypeAlias = dict[str, Any]


class Answers:
    """Objects as answers. clock -- what ages in a Table are counted to"""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock

    def one(self, request: web.BaseRequest, resource: Resource, stored: Stored) -> web.Response:
        accepted = parse_accept(request.headers.get("Accept", ""), FORMS)
        if accepted.form == "json":
            return bytes_response(request, stored.body)
        return self.shaped(request, resource, [stored], accepted, stored.revision, one=True)

    def written(
        self,
        request: web.BaseRequest,
        resource: Resource,
        result: Result,
        code: int = 200,
    ) -> web.Response:
        accepted = parse_accept(request.headers.get("Accept", ""), FORMS)
        revision = result.obj["metadata"].get("resourceVersion", "0")
        response = self.shaped(request, resource, [result.obj], accepted, int(revision), one=True)
        response.set_status(code)
        for text in bounded(dict.fromkeys(result.warnings)):
            warn(response, text)
        return response

    def shaped(
        self,
        request: web.BaseRequest,
        resource: Resource,
        items: Sequence[Stored | Obj],
        accepted: Accepted,
        revision: int,
        *,
        one: bool = False,
        meta: Dict | None = None,
    ) -> web.Response:
        list_meta = meta or {"resourceVersion": str(revision)}
        if accepted.form == "table":
            body = self.table(request, resource, items, list_meta)
            return bytes_response(request, msgspec.json.encode(body), accepted.content_type)
        objects = [item.obj if isinstance(item, Stored) else item for item in items]
        if accepted.form == "metadata":
            body = metadata_of(resource, objects, list_meta, one)
        elif one:
            body = objects[0]
        else:
            body = {"kind": f"{resource.kind}List", "apiVersion": resource.api_version,
                    "metadata": list_meta, "items": objects}  # fmt: skip
        if accepted.form == "yaml":
            import yaml  # only for those who ask for it

            text = yaml.safe_dump(body, sort_keys=True).encode()
            return bytes_response(request, text, accepted.content_type)
        return bytes_response(request, msgspec.json.encode(body), accepted.content_type)

    def table(
        self,
        request: web.BaseRequest,
        resource: Resource,
        items: Sequence[Stored | Obj],
        list_meta: Dict,
        headers: bool = True,
    ) -> Dict:
        include = request.query.get("includeObject", "") or "Metadata"
        if include not in ("Metadata", "Object", "None"):
            raise status.bad_request(f"includeObject: {include!r} must be Metadata, Object or None")
        return render_table(
            resource, items, now=self._clock(), include=include,  # type: ignore[arg-type]
            list_meta=list_meta, headers=headers,
        )  # fmt: skip


def scale_of(obj: Obj) -> Dict:
    """Return an object's Scale (autoscaling/v1)."""
    meta, spec = obj["metadata"], obj.get("spec") or {}
    kept = ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")
    labels = (spec.get("selector") or {}).get("matchLabels") or {}
    return {
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": {name: meta[name] for name in kept if name in meta},
        "spec": {"replicas": spec.get("replicas", 0)},
        "status": {
            "replicas": (obj.get("status") or {}).get("replicas", 0),
            "selector": ",".join(f"{k}={v}" for k, v in sorted(labels.items())),
        },
    }


def warn(response: web.StreamResponse, text: str) -> None:
    """Add a warning that kubectl shows (RFC 7234 5.5)."""
    if not response.prepared:
        # It may quote what a client has sent: what would end the header is not part of it.
        plain = "".join(one if one.isprintable() else "\ufffd" for one in text)
        quoted = plain.replace("\\", "\\\\").replace('"', '\\"')
        response.headers.add("Warning", f'299 - "{quoted}"')


def bounded(texts: Iterable[str]) -> Iterator[str]:
    """Yield warnings as long as headers may be long, as upstream: if all are too much, each is
    cut, and the last ones are left out."""
    told = list(texts)
    if sum(map(len, told)) > MAX_WARNINGS:
        told = [text[:MAX_WARNING] for text in told]
    room = MAX_WARNINGS
    for text in told:
        room -= len(text)
        if room < 0:
            return
        yield text


def metadata_of(resource: Resource, items: Sequence[Obj], list_meta: Dict, one: bool) -> Dict:
    partial = [
        {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1",
         "metadata": item["metadata"]}
        for item in items
    ]  # fmt: skip
    if one:
        return partial[0]
    return {"kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1",
            "metadata": list_meta, "items": partial}  # fmt: skip


def list_meta_of(listing: Listing) -> Dict:
    meta: Dict = {"resourceVersion": str(listing.revision)}
    if listing.more:
        meta["continue"] = listing.more
    if listing.remaining is not None:
        meta["remainingItemCount"] = listing.remaining
    return meta


def list_response(request: web.BaseRequest, resource: Resource, listing: Listing) -> web.Response:
    head = msgspec.json.encode(
        {"kind": f"{resource.kind}List", "apiVersion": resource.api_version,
         "metadata": list_meta_of(listing)}
    )  # fmt: skip
    bodies = b",".join(one.body for one in listing.items)
    return bytes_response(request, b'%s,"items":[%s]}' % (head[:-1], bodies))


def success(resource: Resource, obj: Obj) -> Dict:
    details = {"name": obj["metadata"]["name"], "kind": resource.plural,
               "uid": obj["metadata"]["uid"]}  # fmt: skip
    if resource.group:
        details["group"] = resource.group
    return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success",
            "details": details}  # fmt: skip


def json_response(body: Mapping[str, Any], code: int = 200) -> web.Response:
    return web.Response(status=code, body=msgspec.json.encode(body), content_type=JSON)


def bytes_response(request: web.BaseRequest, body: bytes, content_type: str = JSON) -> web.Response:
    headers = {"Content-Type": content_type, "Cache-Control": "no-cache, private"}
    if len(body) >= GZIP_FROM and "gzip" in request.headers.get("Accept-Encoding", ""):
        headers |= {"Content-Encoding": "gzip", "Vary": "Accept-Encoding"}
        body = gzip.compress(body, 1, mtime=0)
    return web.Response(body=body, headers=headers)


def refusal(error: ApiError) -> web.Response:
    response = json_response(status.status_of(error), error.code)
    seconds = error.details.get("retryAfterSeconds")
    if seconds:
        response.headers["Retry-After"] = str(seconds)
    return response


def too_large(limit: int) -> ApiError:
    return ApiError(413, "RequestEntityTooLarge", f"Request entity too large: limit is {limit}")


def not_allowed(method: str) -> ApiError:
    return ApiError(
        405, "MethodNotAllowed", "the server does not allow this method on the requested resource",
        {"causes": [{"reason": "MethodNotAllowed", "message": method}]},
    )  # fmt: skip


def no_path(plural: str = "") -> ApiError:
    """What is asked for is not there. plural -- a kind that clusters may have, and we do not"""
    text = "the server could not find the requested resource"
    if plural:
        text += f": kdns' embedded registry has no {plural}"
    return ApiError(404, "NotFound", text)


def busy() -> ApiError:
    """More than can be looked at; clients try again by themselves."""
    text = "too much is being written at once, please try again later"
    return ApiError(429, "TooManyRequests", text, {"retryAfterSeconds": 1})
