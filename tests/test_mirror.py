"""The registry as another process has it (registry/mirror.py): the same, after any changes."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from test_store import (
    KINDS,
    endpoint_slice,
    filled,
    import_slice,
    imported,
    namespace,
    pod,
    service,
)

from kdns.registry.mirror import Delta, Mirror, delta_of, whole_of
from kdns.registry.objects import (
    NODE,
    SERVICE_CIDR,
    Kind,
    Meta,
    Node,
    NodeSpec,
    Object,
    ServiceCIDR,
    ServiceCIDRSpec,
)
from kdns.registry.snapshot import Changes, Snapshot, everything
from kdns.registry.store import Store

ALL: tuple[Kind, ...] = (*KINDS, NODE, SERVICE_CIDR)


def node(name: str = "n", zone: str = "a") -> Node:
    return Node(Meta(name, labels={"zone": zone}), NodeSpec([f"10.244.{len(zone)}.0/24"]))


def cidr(name: str = "c", text: str = "10.96.0.0/12") -> ServiceCIDR:
    return ServiceCIDR(Meta(name), ServiceCIDRSpec([text]))


def carried(delta: Delta) -> Delta:
    """A Delta after its way to another process."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(delta), type=Delta)


NAMES = st.sampled_from(["web", "api", "db"])
SPACES = st.sampled_from(["default", "prod"])
OBJECTS: st.SearchStrategy[Object] = st.one_of(
    st.builds(service, NAMES, SPACES, port=st.integers(80, 82)),
    st.builds(
        endpoint_slice, st.sampled_from(["s1", "s2"]), SPACES, of=st.one_of(st.none(), NAMES),
        ready=st.booleans(), port=st.integers(80, 81),
    ),
    st.builds(namespace, SPACES, a=st.sampled_from(["1", "2"])),
    st.builds(pod, NAMES, SPACES, st.sampled_from(["10.244.0.1", "10.244.0.2"])),
    st.builds(imported, NAMES, SPACES, port=st.integers(80, 81)),
    st.builds(import_slice, st.sampled_from(["i1", "i2"]), SPACES, of=NAMES),
    st.builds(node, NAMES, st.sampled_from(["a", "bb"])),
    st.builds(cidr, NAMES, st.sampled_from(["10.96.0.0/12", "10.112.0.0/16"])),
)  # fmt: skip
STEPS = st.one_of(
    st.tuples(st.just("apply"), st.sampled_from(["ADDED", "DELETED"]), OBJECTS),
    st.tuples(st.just("list"), st.sampled_from(ALL), st.lists(OBJECTS, max_size=4)),
    st.tuples(st.just("synced"), st.sampled_from(ALL), st.none()),
    st.tuples(st.just("all synced"), st.none(), st.none()),
    st.tuples(st.just("publish"), st.none(), st.none()),
    st.tuples(st.just("begin"), st.integers(1, 3), st.none()),
)


def carry_out(store: Store, step: tuple[Any, Any, Any]) -> None:
    what, one, other = step
    if what == "apply":
        store.apply(type(other).__name__, one, other)  # type: ignore[arg-type]
    elif what == "list":
        store.replace(one, [obj for obj in other if type(obj).__name__ == one])
    else:
        for kind in ALL if what == "all synced" else (one,):
            store.mark_synced(kind)


@settings(max_examples=300, deadline=None)
@given(st.lists(STEPS, max_size=30))
def test_a_mirror_has_what_the_store_published_after_any_events(steps: list[Any]) -> None:
    """One that was there from the start, and those that begin in between, at any size of the
    pieces they are given."""
    store, now = Store(ALL), 100
    last = Snapshot()
    mirrors = [Mirror()]
    for step in [*steps, ("publish", None, None)]:
        if step[0] == "begin":
            late = Mirror()
            *pieces, end = [carried(one) for one in whole_of(last, piece=step[1])]
            assert [late.take(one) for one in pieces] == [None] * len(pieces)
            assert late.take(end) == (last, everything(last))
            mirrors.append(late)
        elif step[0] != "publish":
            carry_out(store, step)
        else:
            now += 1
            published = store.publish(now)
            if published is None:
                continue
            last = published[0]
            delta = carried(delta_of(*published))
            for mirror in mirrors:
                assert mirror.take(delta) == published


def test_what_a_mirror_has_published_does_not_change_any_more() -> None:
    store = filled(service(), endpoint_slice(), namespace())
    mirror = Mirror()
    found = [mirror.take(one) for one in whole_of(_snapshot(store))][-1]
    assert found is not None
    before = found[0]
    store.replace("Service", [])
    published = store.publish(200)
    assert published is not None
    after = mirror.take(delta_of(*published))
    assert after is not None and after[0].services == {}
    assert before.services["default"]["web"] == service()
    assert after[0].slices is not before.slices or after[0].slices == before.slices


def test_what_the_gate_says_of_a_service_goes_along_and_is_forgotten_again() -> None:
    store = filled(service(), service("api"))
    snapshot = _snapshot(store)
    web, api, hidden = ("default", "web"), ("default", "api"), ("default", "hidden")
    said = {web: "open", hidden: "waiting"}
    mirror = Mirror()
    for one in whole_of(snapshot, lambda key: said.get(key, ""), said):
        mirror.take(carried(one))
    assert [mirror.state(key) for key in (web, api, hidden)] == ["open", "", "waiting"]
    mirror.take(carried(delta_of(snapshot, Changes(frozenset([web, hidden])))))
    assert [mirror.state(key) for key in (web, api, hidden)] == ["", "", ""]


def _snapshot(store: Store) -> Snapshot:
    """What a store holds that was published already."""
    return store._last
