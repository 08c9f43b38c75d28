"""List and watch as a state machine: which request comes next, after whatever happened."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdns.errors import Denied, Expired, Unreachable
from kdns.registry.objects import SERVICE
from kdns.source import reflector as r
from kdns.source.reflector import Apply, Failed, Pause, Reflector, Replace, Request, Skipped

GONE = json.dumps({"kind": "Status", "code": 410, "reason": "Expired"}).encode()


def start() -> Reflector:
    return Reflector(SERVICE, random.Random(1))


def obj(name: str, version: int = 5, **spec: Any) -> dict[str, Any]:
    meta = {"name": name, "namespace": "default", "resourceVersion": str(version)}
    return {"metadata": meta, "spec": spec}


def event(kind: str, value: Any) -> bytes:
    return json.dumps({"type": kind, "object": value}).encode() + b"\n"


def bookmark(version: int, end: bool = False) -> bytes:
    meta: dict[str, Any] = {"resourceVersion": str(version)}
    if end:
        meta["annotations"] = {"k8s.io/initial-events-end": "true"}
    return event("BOOKMARK", {"metadata": meta})


def page(*names: str, version: int = 9, following: str = "") -> bytes:
    meta = {"resourceVersion": str(version), "continue": following}
    return json.dumps({"metadata": meta, "items": [obj(n) for n in names]}).encode()


def ask(one: Reflector) -> dict[str, str]:
    """The parameters of the next request, pauses left out."""
    step = one.next()
    if isinstance(step, Pause):
        step = one.next()
    assert isinstance(step, Request)
    return dict(step.params)


def names(emit: object) -> list[str]:
    assert isinstance(emit, Replace)
    return [o.metadata.name for o in emit.objects]


def watching() -> Reflector:
    """A reflector that has listed by WatchList at version 20 and watches, opened at 0."""
    one = start()
    one.next()
    one.on_opened(0.0)
    one.on_chunk(event("ADDED", obj("web")) + bookmark(20, end=True), 0.0)
    return one


def listing() -> Reflector:
    """A reflector whose server refused WatchList."""
    one = start()
    one.next()
    assert one.on_refused(422, b"", None) == []
    return one


def test_it_streams_the_initial_objects_and_goes_on_watching_in_the_same_response() -> None:
    one = start()
    params = ask(one)
    assert 290 <= int(params.pop("timeoutSeconds")) <= 590
    assert params == {
        "watch": "true",
        "allowWatchBookmarks": "true",
        "sendInitialEvents": "true",
        "resourceVersionMatch": "NotOlderThan",
    }
    one.on_opened(0.0)
    assert one.on_chunk(event("ADDED", obj("a")) + event("ADDED", obj("b")), 0.1) == []
    # The server's cache may still be catching up: these belong to the initial state.
    assert one.on_chunk(event("MODIFIED", obj("c")) + event("DELETED", obj("b")), 0.2) == []
    (emit,) = one.on_chunk(bookmark(20, end=True), 0.3)
    assert names(emit) == ["a", "c"] and not one.leave
    (emit,) = one.on_chunk(event("ADDED", obj("d", 21)), 60.0)
    assert isinstance(emit, Apply) and emit.event == "ADDED"
    assert one.on_eof(300.0) == []
    assert ask(one)["resourceVersion"] == "21"


@pytest.mark.parametrize("status", [400, 404, 405, 406, 415, 422])
def test_a_server_that_refuses_watch_list_is_listed_by_pages_at_once(status: int) -> None:
    one = start()
    one.next()
    assert one.on_refused(status, b"", None) == []
    assert isinstance(step := one.next(), Request) and not step.watch
    assert dict(step.params) == {"limit": "500", "resourceVersion": "0"}
    one.on_opened(0.0)
    assert one.on_page(page("a", following="more")) == []
    assert ask(one) == {"limit": "500", "continue": "more"}
    (emit,) = one.on_page(page("b", version=30))
    assert names(emit) == ["a", "b"]
    params = ask(one)
    assert params["resourceVersion"] == "30" and "sendInitialEvents" not in params


@pytest.mark.parametrize("how", ["silence", "a plain bookmark", "too long", "an early end"])
def test_a_server_that_ignores_watch_list_is_listed_by_pages(how: str) -> None:
    one = start()
    one.next()
    one.on_opened(0.0)
    one.on_chunk(event("ADDED", obj("a")), 0.0)
    match how:
        case "silence":
            assert one.on_quiet(10.0) == []
        case "a plain bookmark":
            assert one.on_chunk(bookmark(7), 1.0) == [] and one.leave
        case "too long":
            assert one.on_chunk(event("MODIFIED", obj("a")), 121.0) == [] and one.leave
        case _:
            (emit,) = one.on_eof(1.0)
            assert isinstance(emit, Failed)
    assert "limit" in ask(one)


def test_a_server_that_fails_at_streaming_only_is_listed_by_pages() -> None:
    one = start()
    for _ in range(3):
        assert ask(one)["sendInitialEvents"] == "true"
        one.on_refused(500, b"", None)
    assert "limit" in ask(one)


@pytest.mark.parametrize(
    ("lines", "version"),
    [
        (b"", "20"),
        (event("MODIFIED", obj("web", 23)), "23"),
        (event("MODIFIED", obj("web", 23, ports="bad")), "23"),
        (event("DELETED", obj("web", 24)), "24"),
        (event("MODIFIED", obj("web", 23)) + bookmark(40), "40"),
    ],
)
def test_a_watch_goes_on_from_the_last_event_or_bookmark(lines: bytes, version: str) -> None:
    one = watching()
    one.on_chunk(lines, 60.0)
    assert one.on_quiet(200.0) == []
    assert ask(one)["resourceVersion"] == version


def test_a_bookmark_that_goes_back_means_another_history() -> None:
    one = watching()
    (emit,) = one.on_chunk(bookmark(3), 60.0)
    assert isinstance(emit, Failed) and isinstance(emit.error, Expired)
    assert one.leave and "sendInitialEvents" in ask(one)


@pytest.mark.parametrize("where", ["status", "stream"])
def test_410_lists_again_at_once_but_not_in_a_circle(where: str) -> None:
    one = watching()

    def gone() -> Failed:
        if where == "status":
            (emit,) = one.on_refused(410, GONE, None)
        else:
            (emit,) = one.on_chunk(event("ERROR", json.loads(GONE)), 1.0)
            assert one.leave
        assert isinstance(emit, Failed) and isinstance(emit.error, Expired)
        return emit

    assert gone().retry_in == 0
    delays = []
    for _ in range(5):
        assert "sendInitialEvents" in ask(one)
        one.on_opened(1.0)
        one.on_chunk(bookmark(20, end=True), 1.0)
        delays.append(gone().retry_in)
    assert all(later > 0.5 for later in delays) and delays[-1] > 5


def test_410_while_paging_starts_again_and_then_asks_for_all_in_one() -> None:
    one = listing()
    ask(one)
    one.on_page(page("a", following="x"))
    ask(one)
    one.on_refused(410, GONE, None)
    # Not from version 0 any more: that may be just as old.
    assert ask(one) == {"limit": "500"}
    one.on_page(page("a", following="y"))
    assert ask(one)["continue"] == "y"
    one.on_refused(410, GONE, None)
    assert ask(one) == {}
    (emit,) = one.on_page(page("a", "b"))
    assert names(emit) == ["a", "b"]


def test_a_list_that_never_ends_is_given_up() -> None:
    one = listing()
    ask(one)
    one.on_page(page("a", following="x"))
    ask(one)
    (emit,) = one.on_page(page("a", following="x"))
    assert isinstance(emit, Failed) and "never ends" in str(emit.error)
    assert "continue" not in ask(one)


def test_a_page_that_failed_is_asked_for_again_not_the_whole_list() -> None:
    one = listing()
    ask(one)
    one.on_page(page("a", following="x"))
    ask(one)
    one.on_failure(Unreachable("refused"), 0.0)
    assert ask(one)["continue"] == "x"


def test_back_off_grows_to_its_most_with_jitter_and_ends_with_a_settled_watch() -> None:
    one = watching()
    delays = []
    for _ in range(12):
        (emit,) = one.on_failure(Unreachable("refused"), 1.0)
        assert isinstance(emit, Failed)
        delays.append(emit.retry_in)
        assert isinstance(step := one.next(), Pause) and step.seconds == emit.retry_in
        one.next()
    assert 0.8 <= delays[0] <= 1.6
    assert all(15 <= d <= 30 for d in delays[6:]) and len(set(delays)) == 12
    one.on_opened(100.0)
    assert one.on_eof(111.0) == []
    assert isinstance(one.next(), Request)
    (emit,) = one.on_failure(Unreachable("refused"), 111.0)
    assert isinstance(emit, Failed) and emit.retry_in <= 1.6


def test_a_storm_of_short_watches_backs_off_even_if_each_brings_an_event() -> None:
    one = watching()
    for n in range(8):
        one.on_chunk(event("MODIFIED", obj("web", 30 + n)), 0.1)
        (emit,) = one.on_eof(0.2)
        ask(one)
        one.on_opened(0.0)
    assert isinstance(emit, Failed) and emit.retry_in >= 15
    assert "ended after 0.2 s" in str(emit.error)


@pytest.mark.parametrize(
    ("asked", "low", "high"), [(5.0, 5, 5.5), (0.0, 0.8, 0.88), (1e9, 300, 330)]
)
def test_retry_after_is_honoured_within_reason(asked: float, low: float, high: float) -> None:
    one = watching()
    (emit,) = one.on_refused(429, b"", asked)
    assert isinstance(emit, Failed) and low <= emit.retry_in <= high


@pytest.mark.parametrize("status", [401, 403])
def test_refused_credentials_are_denied_and_the_watch_resumes(status: int) -> None:
    one = watching()
    (emit,) = one.on_refused(status, b"", None)
    assert isinstance(emit, Failed) and isinstance(emit.error, Denied)
    assert ask(one)["resourceVersion"] == "20"


def test_a_watch_the_server_does_not_understand_lists_again() -> None:
    one = watching()
    one.on_refused(400, b"", None)
    assert "resourceVersion" not in ask(one)


def test_lines_may_come_in_any_pieces() -> None:
    stream = b"".join(event("ADDED", obj(f"s{n}", 21 + n)) for n in range(20))
    for size in (1, 7, 64, 1000, len(stream)):
        one = watching()
        found: list[object] = []
        for at in range(0, len(stream), size):
            found += one.on_chunk(stream[at : at + size], 1.0)
        assert [e.obj.metadata.name for e in found if isinstance(e, Apply)] == [
            f"s{n}" for n in range(20)
        ]


def test_half_a_line_at_the_end_is_brought_again() -> None:
    one = watching()
    whole = event("ADDED", obj("x", 21))
    assert one.on_chunk(whole[:30], 20.0) == [] and one.on_eof(20.0) == []
    assert ask(one)["resourceVersion"] == "20"
    one.on_opened(20.0)
    assert len(one.on_chunk(whole, 21.0)) == 1


def test_a_line_without_end_is_given_up() -> None:
    one = watching()
    emits: list[object] = []
    for _ in range(r.MAX_LINE // (1 << 20) + 1):
        assert not emits
        emits += one.on_chunk(b"x" * (1 << 20), 1.0)
    assert one.leave and "over 16777216 octets" in str(getattr(emits[0], "error", ""))


def test_a_broken_object_is_skipped_and_kept_in_mind() -> None:
    one = start()
    one.next()
    one.on_opened(0.0)
    emits = one.on_chunk(
        event("ADDED", obj("good"))
        + event("ADDED", obj("bad", clusterIP="x"))
        + bookmark(20, end=True),
        0.0,
    )
    assert isinstance(emits[0], Skipped) and isinstance(emits[1], Replace)
    assert names(emits[1]) == ["good"] and emits[1].keep == {("default", "bad")}


LINES = [
    bookmark(20, end=True),
    bookmark(5),
    event("ADDED", obj("a", 30)),
    event("ERROR", json.loads(GONE)),
    b"{}\n",
    b"\n",
]
PAGES = [page("a"), page("b", following="t"), b"", GONE]
steps = st.lists(
    st.one_of(
        st.tuples(st.just("chunk"), st.binary(max_size=30) | st.sampled_from(LINES)),
        st.tuples(st.just("page"), st.sampled_from(PAGES)),
        st.tuples(st.just("refused"), st.sampled_from([401, 410, 422, 429, 500])),
        st.tuples(st.sampled_from(["eof", "quiet", "failure"]), st.just(b"")),
    ),
    max_size=30,
)


@given(steps)
def test_whatever_happens_there_is_a_next_request_and_a_bound_on_the_pause(
    sequence: list[tuple[str, Any]],
) -> None:
    one = start()
    now = 0.0
    for what, value in sequence:
        step = one.next()
        if isinstance(step, Pause):
            assert 0 < step.seconds <= r.MAX_RETRY_AFTER * 1.1
            step = one.next()
        assert isinstance(step, Request)
        now += 1.0
        if what == "refused":
            one.on_refused(value, b"", None)
        elif what == "failure":
            one.on_failure(Unreachable("x"), now)
        elif what == "quiet":
            one.on_quiet(now)
        elif step.watch:
            one.on_opened(now)
            if what == "chunk":
                one.on_chunk(value, now)
            if not one.leave:
                one.on_eof(now)
        else:
            one.on_opened(now)
            one.on_page(value)
