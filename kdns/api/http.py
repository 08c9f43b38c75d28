"""The embedded API over HTTP: requests in, Kubernetes' answers out.

Carries out what negotiate.py read from a request, on objects.py. How answers look is
answers.py's, watches are watching.py's; who may ask is access.py's.
Reference kubectl 2.4, 3.1.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import ssl
import time
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, Final

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from kdns.api import discovery, openapi, openapi_v2, status
from kdns.api.access import is_for_us
from kdns.api.answers import (
    FORMS,
    Answers,
    Dict,
    busy,
    bytes_response,
    json_response,
    list_meta_of,
    list_response,
    no_path,
    not_allowed,
    refusal,
    scale_of,
    success,
    too_large,
    warn,
)
from kdns.api.kinds import RESOURCES
from kdns.api.negotiate import (
    JSON,
    JSON_TYPES,
    PROTOBUF,
    YAML_TYPES,
    Target,
    collection_of,
    deletion_of,
    how_of,
    limit_of,
    parse_accept,
    parse_path,
    truth,
    whole,
)
from kdns.api.objects import FINALIZE, JSON_PATCH, Deletion, How, Objects
from kdns.api.patch import json_patch, merge_patch
from kdns.api.protobuf import decode_protobuf
from kdns.api.store import Obj
from kdns.api.strict import check_object, parse_json, parse_yaml
from kdns.api.table import SCALE
from kdns.api.validation_service import ENDPOINTS_DEPRECATED
from kdns.api.watching import STUCK_SECONDS, Watches
from kdns.errors import ApiError
from kdns.metrics import Metrics

log = logging.getLogger("kdns.api")

MAX_BODY = 3 << 20  # octets, as kube-apiserver
MAX_HELD = 64 << 20  # octets of bodies that are looked at at the same time
MAX_FIELD = 128 << 10  # octets of a header, and of the path with its query: long selectors
MANY = 500  # objects whose Table is made in a thread, so that names are answered meanwhile
# What a document gets that is asked for by its hash: kubectl keeps it on disk.
FOR_EVER = "public, max-age=31536000, immutable"
SHUTDOWN = 0.2  # seconds open requests get; watches are ended first
OPEN = frozenset({"healthz", "livez", "readyz", "version"})  # for everybody
# Kinds whose deletion is answered with the object; others' with a Status (upstream).
TOLD_AT_LAST: Final = frozenset({"Pod", "Service", "ServiceAccount"})
# Of a Pod that is a name and an address only.
NO_CONTAINERS: Final = {
    "log": "logs", "exec": "exec", "attach": "attach", "portforward": "port-forward",
    "proxy": "a proxy", "ephemeralcontainers": "ephemeral containers",
}  # fmt: skip
PLURALS: Final = frozenset(one.plural for one in RESOURCES)
# What one may do, and who one is: everything, and the one user there is.
REVIEWS: Final[Mapping[tuple[str, str], Dict]] = {
    ("authorization.k8s.io", "selfsubjectaccessreviews"): {"allowed": True},
    ("authorization.k8s.io", "selfsubjectrulesreviews"): {
        "resourceRules": [{"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}],
        "nonResourceRules": [{"verbs": ["*"], "nonResourceURLs": ["*"]}],
        "incomplete": False,
    },
    ("authentication.k8s.io", "selfsubjectreviews"): {
        "userInfo": {"username": "kdns", "groups": ["system:masters"]}
    },
}


class ApiServer:
    """Serves `objects` on one address.

    token -- bearer token every request must carry; "": nobody is asked
    names -- in lower case, by which it is reached besides its addresses and localhost
    patience -- seconds after which a watcher that takes nothing is cut off
    fault -- for tests: called with each request; what it returns is sent instead
    """

    def __init__(
        self,
        objects: Objects,
        metrics: Metrics,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        context: ssl.SSLContext | None = None,
        token: str = "",
        names: Collection[str] = (),
        clock: Callable[[], float] = time.time,
        patience: float = STUCK_SECONDS,
    ) -> None:
        self.objects = objects
        self.host, self.port = host, port
        self.fault: Callable[[web.BaseRequest], Any] | None = None
        self.ready: Callable[[], bool] = lambda: True
        self._context = context
        self._token = token
        self._names = frozenset(names)
        self._answers = Answers(clock)
        self._watches = Watches(objects.store, self._answers.table, patience)
        self._held: dict[int, int] = {}  # octets of the body of each request under way
        self._runner: web.ServerRunner | None = None
        self._requests = metrics.counter(
            "apiserver_request_total", "Requests by verb, resource and HTTP code.",
            ("verb", "resource", "subresource", "code"),
        )  # fmt: skip

    async def start(self) -> None:
        """Listen; `port` is then the one that was got. Raises OSError."""
        server = web.Server(
            self._handle, max_field_size=MAX_FIELD, max_line_size=MAX_FIELD, access_log=None,
            auto_decompress=False, logger=_wire,
        )  # fmt: skip
        self._runner = web.ServerRunner(server, shutdown_timeout=SHUTDOWN)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self.host, self.port, ssl_context=self._context)
        try:
            await site.start()
        except BaseException:
            await self._runner.cleanup()
            raise
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """End all watches and stop listening."""
        self.drop_watches()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    @property
    def watches(self) -> int:
        """How many watches are open."""
        return len(self._watches)

    def drop_watches(self) -> None:
        """Cut the connections of all watches, as a network that fails."""
        self._watches.drop()

    # --- one request --------------------------------------------------------------------

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        label = ("", "")
        response: web.StreamResponse
        try:
            self._check_sender(request)
            if self.fault is not None:
                answer = self.fault(request)
                if asyncio.iscoroutine(answer):
                    answer = await answer
                if answer is not None:
                    return answer  # type: ignore[no-any-return]
            target = parse_path(request.rel_url.raw_path)
            if target is None:
                response = await self._other(request)
            else:
                label = (target.resource.plural, target.subresource)
                response = await self._object(request, target)
                if target.resource.kind == "Endpoints" and request.method == "GET":
                    warn(response, ENDPOINTS_DEPRECATED)
        except ApiError as e:
            response = refusal(e)
        except (asyncio.CancelledError, ConnectionError):
            raise
        except Exception:
            log.exception("a bug in kdns while serving %s %s", request.method, request.path)
            response = refusal(ApiError(500, "InternalError", "a bug in kdns; see its log"))
        finally:
            self._held.pop(id(request), None)
        self._requests.labels(request.method, *label, str(response.status)).add()
        return response

    def _check_sender(self, request: web.BaseRequest) -> None:
        if request.path.strip("/").partition("/")[0] in OPEN:
            return
        if not self._token:
            self._check_no_page(request)
            return
        said = request.headers.get("Authorization", "").encode(errors="surrogateescape")
        if not hmac.compare_digest(said, f"Bearer {self._token}".encode()):
            raise ApiError(401, "Unauthorized", "Unauthorized")

    def _check_no_page(self, request: web.BaseRequest) -> None:
        """Refuse what only a web page in somebody's browser sends."""
        if "Origin" in request.headers:
            # Any page that a browser shows may post to this host; programs do not say this.
            raise ApiError(403, "Forbidden", "web pages are heard with a token only")
        host = request.headers.get("Host", "")
        if not is_for_us(host, self._names):
            raise ApiError(
                403, "Forbidden",
                f"Host {host!r} is no name of this server, and without a token others are not"
                " heard: a web page may let its own name lead here. Use the address or localhost,"
                " or start kdns with --api-name for this name",
            )  # fmt: skip

    async def _body(self, request: web.BaseRequest) -> bytes:
        """Return a request's body. Raises ApiError: 413 for a long one, 429 if too much is
        being read already."""
        if (request.content_length or 0) > MAX_BODY:
            raise too_large(MAX_BODY)
        if request.headers.get("Expect", "").lower() == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0  # the answer has not begun
        parts: list[bytes] = []
        size = 0
        async for part in request.content.iter_chunked(1 << 16):
            size += len(part)
            if size > MAX_BODY:
                raise too_large(MAX_BODY)
            self._held[id(request)] = size
            if sum(self._held.values()) > MAX_HELD:
                raise busy()
            parts.append(part)
        return unpacked(b"".join(parts), request.headers.get("Content-Encoding", ""), MAX_BODY)

    async def _sent(self, request: web.BaseRequest) -> tuple[Obj, list[str], int]:
        """Return the object in a request's body, what is odd about how it is written, and how
        many octets it has."""
        body = await self._body(request)
        kind = request.content_type if "Content-Type" in request.headers else ""
        odd: list[str] = []
        aside, size = self.objects.aside, len(body)
        if kind == PROTOBUF:
            return await aside.run(size, decode_protobuf, body), odd, size
        if kind in JSON_TYPES:
            return *await aside.run(size, parse_json, body), size
        if kind in YAML_TYPES:
            return await aside.run(size, parse_yaml, body, odd), odd, size
        raise status.unsupported_media(
            "the body of the request was in an unknown format - accepted media types include:"
            f" {JSON}, {YAML_TYPES[0]}, {PROTOBUF}"
        )

    async def _write(self, request: web.BaseRequest) -> tuple[Obj, How]:
        """Return the object that is to be written, and how to write it."""
        obj, odd, size = await self._sent(request)
        how = how_of(request.query, request.headers.get("User-Agent", ""))
        return obj, replace(how, problems=tuple(odd), size=size)

    # --- objects ------------------------------------------------------------------------

    async def _object(self, request: web.BaseRequest, target: Target) -> web.StreamResponse:
        method = request.method
        if target.subresource and target.subresource not in target.resource.subresources:
            return await self._special(request, target)
        if target.subresource == "scale":
            return await self._scale(request, target)
        if not target.name:
            if method == "GET":
                return await self._get_many(request, target)
            if method == "POST":
                return await self._create(request, target)
            if method == "DELETE":
                return await self._delete_many(request, target)
        elif method == "GET":
            if truth(request.query.get("watch", "")):
                return await self._watches.serve(request, target)
            found = self.objects.get(target.resource, target.namespace, target.name)
            return self._answers.one(request, target.resource, found)
        elif method == "PUT":
            return await self._replace(request, target)
        elif method == "PATCH":
            return await self._patch(request, target)
        elif method == "DELETE" and not target.subresource:
            return await self._delete(request, target)
        raise not_allowed(method)

    async def _create(self, request: web.BaseRequest, target: Target) -> web.Response:
        if target.resource.namespaced and not target.namespace:
            raise not_allowed("POST")
        obj, how = await self._write(request)
        result = await self.objects.create(target.resource, target.namespace, obj, how)
        return self._answers.written(request, target.resource, result, 201)

    async def _replace(self, request: web.BaseRequest, target: Target) -> web.Response:
        obj, how = await self._write(request)
        result = await self.objects.replace(
            target.resource, target.namespace, target.name, obj, how, target.subresource
        )
        return self._answers.written(request, target.resource, result)

    async def _patch(self, request: web.BaseRequest, target: Target) -> web.Response:
        body = await self._body(request)
        how = how_of(request.query, request.headers.get("User-Agent", ""))
        result = await self.objects.patch(
            target.resource, target.namespace, target.name, request.content_type, body, how,
            target.subresource,
        )  # fmt: skip
        code = 201 if result.created else 200
        return self._answers.written(request, target.resource, result, code)

    async def _delete(self, request: web.BaseRequest, target: Target) -> web.Response:
        deletion = await self._deletion(request)
        result = await self.objects.delete(target.resource, target.namespace, target.name, deletion)
        left = self.objects.find(target.resource, target.namespace, target.name) is not None
        if left or target.resource.kind in TOLD_AT_LAST:
            return self._answers.written(request, target.resource, result)
        return json_response(success(target.resource, result.obj))

    async def _delete_many(self, request: web.BaseRequest, target: Target) -> web.Response:
        deletion = await self._deletion(request)
        listing = self.objects.list(
            target.resource, target.namespace,
            labels=request.query.get("labelSelector", ""),
            fields=request.query.get("fieldSelector", ""),
        )  # fmt: skip
        for one in listing.items:
            try:
                await self.objects.delete(target.resource, one.key[1], one.key[2], deletion)
            except ApiError as e:
                if e.code != 404:
                    raise
        return list_response(request, target.resource, listing)

    async def _deletion(self, request: web.BaseRequest) -> Deletion:
        options: Obj = {}
        if request.can_read_body:
            sent, *_ = await self._sent(request)
            options = check_object("meta/v1.DeleteOptions", sent).obj
        return deletion_of(options, request.query)

    async def _scale(self, request: web.BaseRequest, target: Target) -> web.Response:
        """The subresource that stands for spec.replicas of every kind that has it."""
        resource, objects = target.resource, self.objects
        current = objects.get(resource, target.namespace, target.name).obj
        if request.method == "GET":
            return self._scaled(request, current)
        how = how_of(request.query, request.headers.get("User-Agent", ""))
        if request.method == "PUT":
            wanted, *_ = await self._sent(request)
        elif request.method == "PATCH":
            body = await self._body(request)
            if request.content_type == JSON_PATCH:
                wanted = json_patch(scale_of(current), body)
            else:
                wanted = merge_patch(scale_of(current), parse_json(body)[0])
        else:
            raise not_allowed(request.method)
        wanted = check_object("autoscaling/v1.Scale", wanted).obj
        replicas = (wanted.get("spec") or {}).get("replicas", 0)
        if replicas < 0:
            cause = status.Cause(
                "FieldValueInvalid",
                f"Invalid value: {replicas!r}: must be greater than or equal to 0",
                "spec.replicas",
            )
            raise status.invalid(resource, target.name, [cause])
        version = (wanted.get("metadata") or {}).get("resourceVersion")
        change: Dict = {"spec": {"replicas": replicas}}
        if version:
            change["metadata"] = {"resourceVersion": version}
        result = await objects.patch(
            resource, target.namespace, target.name, "application/merge-patch+json",
            json.dumps(change).encode(), how,
        )  # fmt: skip
        return self._scaled(request, result.obj)

    def _scaled(self, request: web.BaseRequest, obj: Obj) -> web.Response:
        accepted = parse_accept(request.headers.get("Accept", ""), FORMS)
        revision = int(obj["metadata"]["resourceVersion"])
        return self._answers.shaped(request, SCALE, [scale_of(obj)], accepted, revision, one=True)

    async def _special(self, request: web.BaseRequest, target: Target) -> web.Response:
        """Subresources that are an action of their own."""
        resource, sub = target.resource, target.subresource
        if resource.plural == "pods" and sub in NO_CONTAINERS:
            self.objects.get(resource, target.namespace, target.name)
            raise ApiError(
                501, "NotImplemented",
                f"no {NO_CONTAINERS[sub]}: this is kdns' embedded registry, where a Pod is a name"
                " and an address, and runs no container",
            )  # fmt: skip
        if resource.plural == "pods" and sub == "eviction" and request.method == "POST":
            sent, *_ = await self._sent(request)
            eviction = check_object("policy/v1.Eviction", sent).obj
            deletion = deletion_of(eviction.get("deleteOptions") or {}, request.query)
            await self.objects.delete(resource, target.namespace, target.name, deletion)
            return json_response({"kind": "Status", "apiVersion": "v1", "metadata": {},
                                   "status": "Success"}, 201)  # fmt: skip
        if resource.plural == "serviceaccounts" and sub == "token":
            self.objects.get(resource, target.namespace, target.name)
            raise ApiError(
                501, "NotImplemented",
                "no tokens of ServiceAccounts: kdns' embedded registry knows one user; its token"
                " is in the kubeconfig",
            )  # fmt: skip
        if resource.plural == "namespaces" and sub == FINALIZE and request.method == "PUT":
            return await self._replace(request, target)
        # Of a namespace it may be the kind of what is in it.
        raise no_path(sub if resource.plural == "namespaces" and sub != FINALIZE else "")

    # --- answers ------------------------------------------------------------------------

    async def _get_many(self, request: web.BaseRequest, target: Target) -> web.StreamResponse:
        if truth(request.query.get("watch", "")):
            return await self._watches.serve(request, target)
        accepted = parse_accept(request.headers.get("Accept", ""), FORMS)
        self.objects.store.check_revision(whole(request.query, "resourceVersion"))
        listing = self.objects.list(
            target.resource, target.namespace,
            labels=request.query.get("labelSelector", ""),
            fields=request.query.get("fieldSelector", ""),
            limit=limit_of(request.query),
            more=request.query.get("continue", ""),
        )  # fmt: skip
        if accepted.form == "json":
            return list_response(request, target.resource, listing)
        meta = list_meta_of(listing)

        def shape() -> web.Response:
            return self._answers.shaped(
                request, target.resource, listing.items, accepted, listing.revision, meta=meta
            )

        slow = len(listing.items) > MANY or accepted.form == "yaml"
        return await asyncio.to_thread(shape) if slow else shape()

    # --- the rest -----------------------------------------------------------------------

    async def _other(self, request: web.BaseRequest) -> web.Response:
        path = request.path.rstrip("/") or "/"
        parts = path.strip("/").split("/")
        if parts[0] in ("healthz", "livez", "readyz"):
            return self._health(request, parts[0])
        if len(parts) == 4 and (parts[1], parts[3]) in REVIEWS and parts[2] == "v1":
            return await self._review(request, REVIEWS[parts[1], parts[3]])
        if plural := collection_of(parts):
            raise no_path("" if plural in PLURALS else plural)
        if request.method not in ("GET", "HEAD"):
            raise not_allowed(request.method)
        body: Dict | None = None
        if path == "/version":
            body = dict(discovery.version_answer())
        elif path in ("/api", "/apis"):
            accepted = parse_accept(request.headers.get("Accept", ""), ("json", "discovery"))
            if accepted.form == "discovery":
                whole_list = discovery.aggregated(path == "/api", accepted.version)
                return bytes_response(
                    request, msgspec.json.encode(whole_list), accepted.content_type
                )
            host = request.headers.get("Host", "")
            body = discovery.api_versions(host) if path == "/api" else discovery.group_list()
        elif path == "/api/v1":
            body = discovery.resource_list("", "v1")
        elif len(parts) == 2 and parts[0] == "apis":
            body = discovery.group_answer(parts[1])
        elif len(parts) == 3 and parts[0] == "apis":
            body = discovery.resource_list(parts[1], parts[2])
        elif path == "/openapi/v2":
            if "protobuf" in request.headers.get("Accept", ""):
                return bytes_response(request, openapi_v2.encoded(), openapi_v2.MEDIA)
            body = openapi_v2.document()
        elif path == "/openapi/v3":
            body = openapi.index()
        elif path.startswith("/openapi/v3/"):
            body = openapi.document(path.removeprefix("/openapi/v3/"))
            if body is not None and "hash" in request.query:
                response = bytes_response(request, msgspec.json.encode(body))
                response.headers["Cache-Control"] = FOR_EVER
                return response
        elif path == "/":
            body = {"paths": ["/api", "/apis", "/healthz", "/livez", "/openapi/v3", "/readyz",
                              "/version"]}  # fmt: skip
        if body is None:
            raise no_path()
        return bytes_response(request, msgspec.json.encode(body))

    def _health(self, request: web.BaseRequest, which: str) -> web.Response:
        well = which != "readyz" or self.ready()
        mark = "[+]" if well else "[-]"
        text = "ok" if well else "not ready"
        if "verbose" in request.query:
            text = f"{mark}store {'ok' if well else 'failed'}\n{which} check" + (
                " passed\n" if well else " failed\n"
            )
        return web.Response(status=200 if well else 500, text=text)

    async def _review(self, request: web.BaseRequest, answer: Dict) -> web.Response:
        """Answer a question that a client asks about itself."""
        if request.method != "POST":
            raise not_allowed(request.method)
        obj, *_ = await self._sent(request)
        obj.setdefault("metadata", {})
        return json_response({**obj, "status": answer}, 201)


def unpacked(body: bytes, encoding: str, limit: int) -> bytes:
    """Return a body as it was before it was compressed. Raises ApiError."""
    if encoding.lower() in ("", "identity"):
        return body
    if encoding.lower() not in ("gzip", "x-gzip"):
        raise status.unsupported_media(f"the body is encoded as {encoding!r}; gzip is known")
    reader = zlib.decompressobj(16 + zlib.MAX_WBITS)
    try:
        found = reader.decompress(body, limit + 1)
    except zlib.error as e:
        raise status.bad_request(f"the body is not gzip: {e}") from None
    if len(found) > limit:
        raise too_large(limit)
    if not reader.eof:
        raise status.bad_request("the body is not gzip: its end is missing")
    return found


def _worth_telling(record: logging.LogRecord) -> bool:
    """False for what is no HTTP, and for who hangs up: anybody can do that, on purpose or with
    a scanner, and a log full of traces helps nobody."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, (HttpProcessingError, ConnectionError))


_wire = logging.getLogger("kdns.api.wire")  # what aiohttp has to say
_wire.addFilter(_worth_telling)
