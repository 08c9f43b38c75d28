"""What the API server sends, taken apart: good objects kept, broken ones named, no crash."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdns.errors import Denied, Expired, KdnsError, ObjectError, Unreachable
from kdns.registry import decode as decoding
from kdns.registry import endpoints
from kdns.registry.decode import STRUCTS, decode_event, decode_page, decode_status
from kdns.registry.objects import (
    ENDPOINT_SLICE,
    NAMESPACE,
    POD,
    SERVICE,
    EndpointSlice,
    Kind,
    Service,
)

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden" / "cluster.json").read_text())
META = {"name": "web", "namespace": "default", "resourceVersion": "7"}


def page(*items: Any, **meta: str) -> bytes:
    return json.dumps({"metadata": {"resourceVersion": "9", **meta}, "items": items}).encode()


def line(event: str, obj: Any) -> bytes:
    return json.dumps({"type": event, "object": obj}).encode()


@pytest.mark.parametrize("kind", STRUCTS)
def test_the_recorded_objects_are_all_good(kind: Kind) -> None:
    items = [item for item in GOLDEN["items"] if item["kind"] == kind]
    found = decode_page(kind, page(*items))
    assert len(found.objects) == len(items) and not found.errors
    for item, obj in zip(items, found.objects, strict=True):
        assert obj.metadata.name == item["metadata"]["name"]
        assert decode_event(kind, line("ADDED", item)).obj == obj


def test_a_page_says_where_it_ends_and_what_follows() -> None:
    found = decode_page(SERVICE, page(**{"continue": "token"}))
    assert (found.resource_version, found.following, found.objects) == ("9", "token", [])
    # Go writes an empty list as null.
    assert decode_page(SERVICE, b'{"metadata":{"resourceVersion":"1"},"items":null}').objects == []


BROKEN: list[tuple[Kind, Any, str, str]] = [
    (SERVICE, {"metadata": META, "spec": {"ports": [{"port": "80"}]}}, "spec.ports[0].port", "int"),
    (
        SERVICE,
        {"metadata": META, "spec": {"ports": [{"port": 70000}]}},
        "spec.ports[0].port",
        "70000",
    ),
    (SERVICE, {"metadata": META, "spec": {"ports": [{"port": -1}]}}, "spec.ports[0].port", "-1"),
    (SERVICE, {"metadata": META, "spec": {"clusterIP": "10.0.0"}}, "spec.clusterIP", "'10.0.0'"),
    (SERVICE, {"metadata": META, "spec": {"clusterIPs": ["::1%e"]}}, "spec.clusterIPs[0]", "::1%e"),
    (SERVICE, {"metadata": META, "spec": []}, "spec", "object"),
    (
        SERVICE,
        {"metadata": META, "spec": {"ports": [{"port": 1, "name": "a.b"}]}},
        "spec.ports[0].name",
        "not a DNS label",
    ),
    (SERVICE, {"metadata": {**META, "name": "x" * 64}}, "metadata.name", "not a DNS label"),
    (SERVICE, {"metadata": {**META, "name": ""}}, "metadata.name", "is empty"),
    (SERVICE, {"metadata": {"name": "web"}}, "metadata.namespace", "is empty"),
    (SERVICE, {"spec": {}}, "", "metadata"),
    (NAMESPACE, {"metadata": {"name": "a.b"}}, "metadata.name", "not a DNS label"),
    (NAMESPACE, {"metadata": {"name": "a", "labels": {"x": 1}}}, "metadata.labels", "str"),
    (ENDPOINT_SLICE, {"metadata": META, "addressType": "IPX"}, "addressType", "'IPX'"),
    (
        ENDPOINT_SLICE,
        {"metadata": META, "endpoints": [{"addresses": ["10.0.0.1", "10.0.0.256"]}]},
        "endpoints[0].addresses",
        "'10.0.0.256'",
    ),
    (
        ENDPOINT_SLICE,
        {"metadata": META, "endpoints": [{"addresses": [], "hostname": "a b"}]},
        "endpoints[0].hostname",
        "not a DNS label",
    ),
    (ENDPOINT_SLICE, {"metadata": META, "ports": [{"port": 1 << 40}]}, "ports[0].port", "not in 1"),
    (POD, {"metadata": META, "status": {"podIP": "x"}}, "status.podIP", "'x'"),
    (POD, {"metadata": {**META, "name": "p" * 254}}, "metadata.name", "longer than 253"),
]


@pytest.mark.parametrize(("kind", "value", "field", "says"), BROKEN)
def test_a_broken_object_is_named_and_the_rest_is_kept(
    kind: Kind, value: Any, field: str, says: str
) -> None:
    good: dict[str, Any] = {"metadata": {"name": "good", "namespace": "default"}}
    found = decode_page(kind, page(good, value, good))
    assert [o.metadata.name for o in found.objects] == ["good", "good"]
    (error,) = found.errors
    assert error.kind == kind and error.field.startswith(field) and says in str(error)
    event = decode_event(kind, line("MODIFIED", value))
    assert event.obj is None and str(event.error) == str(error)
    # The watch goes on after it.
    version = value.get("metadata", {}).get("resourceVersion", "")
    assert event.resource_version in (version, "")


def test_a_null_is_as_good_as_nothing() -> None:
    value = {
        "metadata": {**META, "labels": None, "uid": None},
        "spec": {
            "externalName": None,
            "clusterIP": "10.96.0.1",
            "ports": [{"port": 80, "name": None}],
        },
    }
    (obj,) = decode_page(SERVICE, page(value)).objects
    assert isinstance(obj, Service) and obj.spec.ports is not None
    assert (obj.spec.external_name, obj.spec.ports[0].name) == ("", "")


def test_annotations_nobody_reads_are_let_go() -> None:
    trigger = "endpoints.kubernetes.io/last-change-trigger-time"
    value = {"metadata": {**META, "annotations": {trigger: "t", "last-applied": "x" * 1000}}}
    (obj,) = decode_page(SERVICE, page(value)).objects
    assert obj.metadata.annotations == {trigger: "t"}


def test_a_deletion_needs_no_more_than_a_name() -> None:
    event = decode_event(SERVICE, line("DELETED", {"metadata": META, "spec": "gone"}))
    assert event.obj is not None and event.obj.metadata.name == "web"
    assert event.resource_version == "7"


def test_bookmarks_tell_the_version_and_the_end_of_the_initial_events() -> None:
    plain = {"kind": "Service", "metadata": {"resourceVersion": "12"}}
    event = decode_event(SERVICE, line("BOOKMARK", plain))
    assert (event.type, event.resource_version, event.end_of_initial) == ("BOOKMARK", "12", False)
    ended = {
        "metadata": {"resourceVersion": "12", "annotations": {"k8s.io/initial-events-end": "true"}}
    }
    assert decode_event(SERVICE, line("BOOKMARK", ended)).end_of_initial


@pytest.mark.parametrize(
    ("status", "error", "says"),
    [
        ({"code": 410, "reason": "Expired", "message": "too old"}, Expired, "too old"),
        ({"code": 410, "reason": "Gone"}, Expired, "410 Gone"),
        ({"code": 401, "reason": "Unauthorized"}, Denied, "credentials"),
        ({"code": 403, "message": "cannot list"}, Denied, "cannot list; the account needs"),
        ({"code": 500, "message": "x" * 5000}, Unreachable, "500: xxx"),
        ({"code": "500"}, Unreachable, "500"),
    ],
)
def test_an_error_in_the_stream_is_told_by_its_kind(
    status: dict[str, Any], error: type[KdnsError], says: str
) -> None:
    event = decode_event(SERVICE, line("ERROR", {"kind": "Status", **status}))
    assert type(event.error) is error and says in str(event.error)
    assert len(str(event.error)) < 700


def test_retry_after_is_read_from_header_or_body() -> None:
    busy = b'{"code":429,"details":{"retryAfterSeconds":3}}'
    for body, header, wanted in ((busy, None, 3), (busy, 7.0, 7), (b"busy", None, None)):
        error = decode_status(body, 429, header)
        assert isinstance(error, Unreachable) and error.retry_after == wanted


NOT_A_LIST = [b"", b"<html>", b"[1]", b"null", b'{"items":[]}', b'{"items":3}', b"[" * 200_000]


@pytest.mark.parametrize("body", NOT_A_LIST, ids=range(len(NOT_A_LIST)))
def test_an_answer_that_is_no_list_is_the_servers_fault(body: bytes) -> None:
    with pytest.raises(Unreachable, match="is not a list"):
        decode_page(SERVICE, body)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff", b'{"type":1,"object":{}}', b'{"type":"ODD","object":{}}']
)
def test_a_line_that_is_no_event_is_the_servers_fault(body: bytes) -> None:
    with pytest.raises(Unreachable):
        decode_event(SERVICE, body)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                "metadata name namespace spec status ports port addresses endpoints clusterIP type"
                " object items resourceVersion labels addressType podIP code".split()
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@given(
    json_values, st.sampled_from(list(STRUCTS)), st.sampled_from(["ADDED", "DELETED", "ERROR", "X"])
)
def test_no_json_whatever_breaks_the_decoder(value: Any, kind: Kind, event: str) -> None:
    text = msgspec.json.encode(value)
    for body in (text, b'{"metadata":{"resourceVersion":"1"},"items":[' + text + b"]}"):
        try:
            found = decode_page(kind, body)
        except Unreachable:
            continue
        assert all(isinstance(e, ObjectError) for e in found.errors)
    try:
        decode_event(kind, b'{"type":"' + event.encode() + b'","object":' + text + b"}")
    except Unreachable:
        assert event == "X"


@given(st.binary(max_size=200), st.sampled_from(list(STRUCTS)))
def test_no_bytes_whatever_break_the_decoder(body: bytes, kind: Kind) -> None:
    for decode in (decode_page, decode_event):
        with pytest.raises(Unreachable):
            decode(kind, body)
    assert decode_status(body, 500)


@pytest.mark.parametrize("text", ["1" * 999, ":" * 999, "::" + "0" * 999, "0" * 999 + "1.2.3.4"])
def test_text_of_any_length_fills_no_memory_where_an_address_is_meant(text: str) -> None:
    """It comes with every event; up to 16,384 of them are remembered."""
    before = decoding._is_ipv6.cache_info().currsize, endpoints._canonical.cache_info().currsize
    assert not decoding.is_address(text)
    assert endpoints.canonical_address(text) is None
    after = decoding._is_ipv6.cache_info().currsize, endpoints._canonical.cache_info().currsize
    assert before == after


def test_addresses_with_zeros_of_old_are_read_as_kube_proxy_reads_them() -> None:
    spec = {"clusterIP": "010.096.000.001", "clusterIPs": ["010.096.000.001", "fd00::1"]}
    one = decoding.convert(SERVICE, {"metadata": META, "spec": spec})
    assert isinstance(one, Service)
    assert (one.spec.cluster_ip, one.spec.cluster_ips) == ("10.96.0.1", ["10.96.0.1", "fd00::1"])
    ends = {"addressType": "IPv4", "endpoints": [{"addresses": ["010.244.1.08"]}]}
    two = decoding.convert(ENDPOINT_SLICE, {"metadata": META, **ends})
    assert isinstance(two, EndpointSlice) and two.endpoints
    assert two.endpoints[0].addresses == ["10.244.1.8"]
