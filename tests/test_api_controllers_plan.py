"""The controllers' decisions for themselves, their queue, and slices after any sequence of
events."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
from controlled import NOON, Clock, Obj, Place, pod, running, service, workload
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdns.api.controllers import deployments_plan as rollout
from kdns.api.controllers.index import Pod
from kdns.api.controllers.nodes import default_addresses, pod_cidrs
from kdns.api.controllers.runner import HOPELESS, Runner
from kdns.api.controllers.slices_plan import Plan, plan_slices, wanted_endpoints
from kdns.api.controllers.workloads import deletion_order, template_hash, whole_or_part
from kdns.api.store import Put
from kdns.errors import ApiError

# --- slices -----------------------------------------------------------------------------------


def running_pod(number: int, port: int = 8080, ready: bool = True) -> Pod:
    name = f"p{number}"
    made = pod(name, {"app": "web"}, nodeName="node1")
    made["metadata"] |= {"uid": name, "namespace": "default"}
    made["spec"]["containers"][0]["ports"] = [{"name": "http", "containerPort": port}]
    made["status"] = {
        "phase": "Running",
        "podIPs": [{"ip": f"10.244.{number // 250}.{number % 250 + 1}"}],
        "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
    }
    return msgspec.convert(made, Pod)


def web_service() -> Obj:
    made = service("default/web", {"app": "web"})
    made["spec"] |= {"ipFamilies": ["IPv4"], "clusterIP": "10.96.0.7"}
    made["spec"]["ports"] = [{"port": 80, "protocol": "TCP", "targetPort": "http"}]
    made["metadata"]["uid"] = "svc"
    return made


def carried_out(existing: list[Obj], plan: Plan) -> list[Obj]:
    """Return the slices after a plan."""
    gone = {one["metadata"]["name"] for one in plan.delete}
    changed = {one["metadata"]["name"]: one for one in plan.update}
    left = [
        changed.get(one["metadata"]["name"], one)
        for one in existing
        if one["metadata"]["name"] not in gone
    ]
    number = len(existing)
    for one in plan.create:
        number += 1
        while f"web-{number}" in {two["metadata"]["name"] for two in left}:
            number += 1
        one["metadata"]["name"] = f"web-{number}"
        left.append(one)
    return left


def sync(existing: list[Obj], pods: list[Pod]) -> tuple[list[Obj], Plan]:
    copies = msgspec.json.decode(msgspec.json.encode(existing))
    plan = plan_slices(web_service(), pods, copies, lambda _: "")
    return carried_out(copies, plan), plan


def members(slices: list[Obj]) -> dict[str, tuple[int, ...]]:
    """Return each Pod's ports; fails if a Pod stands twice."""
    found: dict[str, tuple[int, ...]] = {}
    for one in slices:
        for endpoint in one["endpoints"]:
            uid = endpoint["targetRef"]["uid"]
            assert uid not in found
            found[uid] = tuple(port["port"] for port in one["ports"])
    return found


def test_one_more_pod_changes_one_slice() -> None:
    slices, _ = sync([], [running_pod(n) for n in range(250)])
    assert sorted(len(one["endpoints"]) for one in slices) == [50, 100, 100]
    slices, plan = sync(slices, [running_pod(n) for n in range(251)])
    assert (len(plan.update), len(plan.create), len(plan.delete)) == (1, 0, 0)
    _, plan = sync(slices, [running_pod(n) for n in range(251)])
    assert (plan.update, plan.create, plan.delete) == ([], [], [])
    _, plan = sync(slices, [running_pod(n, ready=n != 7) for n in range(251)])
    assert (len(plan.update), len(plan.create), len(plan.delete)) == (1, 0, 0)


steps = st.lists(
    st.dictionaries(st.integers(0, 300), st.sampled_from([8080, 9090]), max_size=320), max_size=6
)


@given(steps)
@settings(max_examples=40, deadline=None)
def test_whatever_came_before_slices_hold_what_they_would_from_scratch(
    states: list[dict[int, int]],
) -> None:
    slices: list[Obj] = []
    for state in states:
        slices, _ = sync(slices, [running_pod(n, port) for n, port in sorted(state.items())])
        assert members(slices) == {f"p{n}": (port,) for n, port in state.items()}
        assert all(len(one["endpoints"]) <= 100 for one in slices)
        assert slices and all(one["endpoints"] for one in slices[1:])


def test_the_older_object_holds_a_thousand_addresses_those_that_are_ready_first() -> None:
    pods = [running_pod(n, ready=n >= 100) for n in range(1200)]
    found = wanted_endpoints(web_service(), pods)
    assert found["metadata"]["annotations"]["endpoints.kubernetes.io/over-capacity"] == "truncated"
    (subset,) = found["subsets"]
    assert len(subset["addresses"]) == 1000 and "notReadyAddresses" not in subset


# --- rollouts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "total", "up", "expected"),
    [("25%", 4, True, 1), ("25%", 5, True, 2), ("25%", 5, False, 1), (3, 100, True, 3),
     ("100%", 7, False, 7), (None, 7, True, 0)],
)  # fmt: skip
def test_parts_of_a_whole(value: Any, total: int, up: bool, expected: int) -> None:
    assert whole_or_part(value, total, up=up) == expected


@pytest.mark.parametrize(
    ("surge", "unavailable", "expected"),
    [("25%", "25%", (3, 2)), (0, 0, (0, 1)), (1, "0%", (1, 0)), ("50%", 20, (5, 10))],
)
def test_bounds_of_ten(surge: Any, unavailable: Any, expected: tuple[int, int]) -> None:
    d = workload("Deployment", "web", 10)
    rolling = {"maxSurge": surge, "maxUnavailable": unavailable}
    d["spec"]["strategy"] = {"type": "RollingUpdate", "rollingUpdate": rolling}
    assert rollout.bounds(d) == expected


def replica_set(name: str, replicas: int, available: int, desired: int, most: int) -> Obj:
    annotations = {rollout.DESIRED: str(desired), rollout.MAX: str(most)}
    return {
        "metadata": {"name": name, "creationTimestamp": name, "annotations": annotations},
        "spec": {"replicas": replicas},
        "status": {"availableReplicas": available, "replicas": replicas},
    }


@pytest.mark.parametrize(
    ("replicas", "expected"),
    [
        # Of 10 with maxSurge 3 there are 13, 8 old and 5 new; now 20, so 25 in all.
        (20, {"old": 15, "new": 10}),
        (10, None),
        (5, {"old": 4, "new": 3}),
    ],
)
def test_resizing_during_a_rollout_is_in_proportion(
    replicas: int, expected: dict[str, int] | None
) -> None:
    d = workload("Deployment", "web", replicas)
    old, new = replica_set("old", 8, 8, 10, 13), replica_set("new", 5, 0, 10, 13)
    found = rollout.resized(d, new, [old])
    assert found == expected
    if found is not None:
        assert sum(found.values()) == replicas + rollout.bounds(d)[0]


def test_templates_that_differ_have_different_names() -> None:
    one = workload("Deployment", "web", 1)["spec"]["template"]
    other = workload("Deployment", "web", 1, "nginx:2")["spec"]["template"]
    labelled = msgspec.json.decode(msgspec.json.encode(one))
    labelled["metadata"]["labels"]["pod-template-hash"] = "x"
    assert template_hash(one) == template_hash(labelled)
    assert len({template_hash(one), template_hash(other), template_hash(one, 1)}) == 3


def test_which_pods_are_given_up_first() -> None:
    def made(name: str, *, since: str = "2026-01-01T00:00:00Z", **change: Any) -> Pod:
        one = running_pod(1)
        one.metadata.name = name
        one.metadata.creationTimestamp = since
        one.status.conditions[0].lastTransitionTime = since
        one.status.conditions[0].status = change.get("ready", "True")
        one.status.phase = change.get("phase", "Running")
        one.spec.nodeName = change.get("node", "node1")
        one.metadata.annotations = change.get("annotations", {})
        return one

    pods = [
        made("oldest"),
        made("newest", since="2026-02-01T00:00:00Z"),
        made("unready", ready="False"),
        made("pending", phase="Pending", ready="False"),
        made("unassigned", node="", phase="Pending", ready="False"),
        made("cheap", annotations={"controller.kubernetes.io/pod-deletion-cost": "-5"}),
        made("crowded", node="node2"),
    ]
    order = [one.metadata.name for one in deletion_order(pods, {"node1": 1, "node2": 3})]
    assert order == [
        "unassigned", "pending", "unready", "cheap", "crowded", "newest", "oldest",
    ]  # fmt: skip


# --- Nodes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "number", "expected"),
    [
        (1, 0, ["10.244.0.0/24", "fd00:244::/64"]),
        (3, 2, ["10.244.2.0/24", "fd00:244:0:2::/64"]),
        (1000, 999, ["10.244.249.192/26", "fd00:244:0:3e7::/64"]),
    ],
)
def test_parts_of_the_pod_range(nodes: int, number: int, expected: list[str]) -> None:
    assert pod_cidrs(["10.244.0.0/16", "fd00:244::/48"], nodes, number) == expected


def test_many_nodes_have_addresses_of_their_own() -> None:
    assert len(set(default_addresses(1000))) == 1000
    with pytest.raises(ValueError, match="more than"):
        default_addresses(200_000)


# --- the queue --------------------------------------------------------------------------------


class Looker:
    """A controller that notes what it looked at, and does what it is told."""

    def __init__(self, act: Callable[[str], Awaitable[float | None]] | None = None) -> None:
        self.clock = Clock()
        self.looked: list[str] = []
        self.act = act
        self.runner = Runner(self.clock)
        self.runner.register("c", self.reconcile)

    async def reconcile(self, key: str) -> float | None:
        self.looked.append(key)
        return await self.act(key) if self.act is not None else None

    async def __aenter__(self) -> Looker:
        self.runner.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.runner.stop()


@pytest.mark.asyncio
async def test_a_key_that_is_queued_often_is_looked_at_once() -> None:
    async with Looker() as looker:
        for key in ("a", "b", "a", "a"):
            looker.runner.queue("c", key)
        await looker.runner.settle()
        assert looker.looked == ["a", "b"]


@pytest.mark.asyncio
async def test_a_key_that_changes_while_it_is_looked_at_is_looked_at_again() -> None:
    at_once: list[int] = []
    most: list[int] = []

    async def act(key: str) -> None:
        at_once.append(1)
        most.append(len(at_once))
        if len(most) == 1:
            looker.runner.queue("c", key)
            await asyncio.sleep(0)
        at_once.pop()

    async with Looker(act) as looker:
        looker.runner.queue("c", "a")
        await looker.runner.settle()
        assert looker.looked == ["a", "a"] and max(most) == 1


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "error", [ApiError(409, "Conflict", "was changed"), ValueError("a bug of ours")]
)
async def test_what_fails_is_tried_again_and_the_rest_goes_on(error: Exception) -> None:
    async def act(key: str) -> None:
        if key == "bad" and looker.looked.count("bad") < 3:
            raise error

    async with Looker(act) as looker:
        looker.runner.queue("c", "bad")
        looker.runner.queue("c", "good")
        await looker.runner.settle()
        assert looker.looked.count("bad") == 3 and looker.looked.count("good") == 1


@pytest.mark.asyncio
async def test_what_never_succeeds_is_not_waited_for() -> None:
    async def act(_: str) -> None:
        raise ValueError("always")

    async with Looker(act) as looker:
        looker.runner.queue("c", "bad")
        await looker.runner.settle()
        assert len(looker.looked) == HOPELESS


@pytest.mark.asyncio
async def test_later_is_when_the_clock_says_so() -> None:
    async def act(_: str) -> float | None:
        return 10.0 if len(looker.looked) < 3 else None

    async with Looker(act) as looker:
        looker.runner.queue("c", "a")
        for seconds, count in ((0, 1), (9, 1), (1, 2), (10, 3), (100, 3)):
            looker.clock.now += seconds
            await looker.runner.settle()
            assert len(looker.looked) == count
        assert looker.clock.now == NOON + 120


# --- any sequence of events -------------------------------------------------------------------

NAMES = ("a", "b", "c")
APPS = ("x", "y")
names, apps = st.sampled_from(NAMES), st.sampled_from(APPS)
operations = st.one_of(
    st.tuples(st.just("pod"), names, apps),
    st.tuples(st.just("service"), names, apps),
    st.tuples(st.just("headless"), names, apps),
    st.tuples(st.just("replicas"), apps, st.integers(0, 3)),
    st.tuples(st.just("delete pod"), names, st.booleans()),
    st.tuples(st.just("delete service"), names, st.none()),
    st.tuples(st.just("relabel"), names, apps),
    st.tuples(st.just("reselect"), names, apps),
    st.tuples(st.just("ready"), names, st.booleans()),
    st.tuples(st.just("tolerate"), names, st.booleans()),
    st.tuples(st.just("settle"), st.none(), st.integers(0, 3)),
)


async def perform(place: Place, operation: tuple[str, Any, Any]) -> None:
    what, name, value = operation
    match what:
        case "pod":
            await place.create(pod(name, {"app": value}))
        case "service":
            await place.create(service(name, {"app": value}))
        case "headless":
            await place.create(service(name, {"app": value}, clusterIP="None"))
        case "replicas":
            if place.find("Deployment", name) is None:
                await place.create(workload("Deployment", name, value))
            else:
                await place.patch("Deployment", name, {"spec": {"replicas": value}})
        case "delete pod":
            await place.delete("Pod", name, grace=0 if value else None)
        case "delete service":
            await place.delete("Service", name)
        case "relabel":
            await place.patch("Pod", name, {"metadata": {"labels": {"app": value}}})
        case "reselect":
            await place.patch("Service", name, {"spec": {"selector": {"app": value}}})
        case "ready":
            text = str(value).lower()
            await place.patch("Pod", name, {"metadata": {"annotations": {"kdns.dev/ready": text}}})
        case "tolerate":
            await place.patch("Service", name, {"spec": {"publishNotReadyAddresses": value}})
        case "settle":
            await place.settle(value)


def expected_endpoints(place: Place, one: Obj) -> dict[str, tuple[str, str]]:
    """What a Service's slices must say, read off the Pods: address and conditions."""
    selector, spec = one["spec"]["selector"], one["spec"]
    found = {}
    for each in place.all("Pod"):
        labels, status = each["metadata"].get("labels", {}), each["status"]
        if selector.items() <= labels.items() and status.get("podIP"):
            serving = any(
                c["type"] == "Ready" and c["status"] == "True" for c in status["conditions"]
            )
            ending = "deletionTimestamp" in each["metadata"]
            ready = spec.get("publishNotReadyAddresses") or (serving and not ending)
            letters = "r" * bool(ready) + "s" * serving + "t" * ending
            found[each["metadata"]["name"]] = (status["podIP"], letters)
    return found


async def check(place: Place) -> None:
    for one in place.all("Service"):
        name = one["metadata"]["name"]
        if name == "kubernetes":
            continue
        slices = place.slices(name)
        addresses = {
            e["targetRef"]["name"]: e["addresses"][0] for s in slices for e in s["endpoints"]
        }
        conditions = place.endpoints(name)
        wanted = expected_endpoints(place, one)
        assert {key: (addresses[key], conditions[key]) for key in conditions} == wanted
        uid = one["metadata"]["uid"]
        assert slices and all(s["metadata"]["ownerReferences"][0]["uid"] == uid for s in slices)
        subsets = place.get("Endpoints", name).get("subsets", [])
        ready = {a["targetRef"]["name"] for s in subsets for a in s.get("addresses", ())}
        assert ready == {key for key, (_, letters) in wanted.items() if "r" in letters}, (
            "the older object"
        )
    services = set(place.names("Service"))
    assert {s["metadata"]["labels"]["kubernetes.io/service-name"] for s in
            place.all("EndpointSlice")} <= services  # fmt: skip
    for one in place.all("Deployment"):
        app = one["metadata"]["name"]
        own = [p for p in place.all("Pod") if "ownerReferences" in p["metadata"]
               and p["metadata"]["name"].startswith(f"{app}-")
               and "deletionTimestamp" not in p["metadata"]]  # fmt: skip
        assert len(own) == one["spec"]["replicas"]


@given(st.lists(operations, max_size=25))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_after_any_sequence_of_changes_slices_are_what_the_pods_say(
    sequence: list[tuple[str, Any, Any]],
) -> None:
    async def play() -> None:
        async with running(nodes=2, pod_ready_delay=1, pod_termination_delay=2) as place:
            for operation in sequence:
                try:
                    await perform(place, operation)
                except ApiError as e:
                    assert e.code in (404, 409), e
            await place.settle()
            await check(place)
            await place.settle(5)
            await check(place)

    asyncio.run(play())


@pytest.mark.asyncio
async def test_an_object_that_nobody_can_read_stops_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with running() as place:
        odd = {"metadata": {"name": "odd", "namespace": "default", "ownerReferences": 7}, "spec": 7}
        await place.store.write(Put(("pods", "default", "odd"), odd))
        await place.create(service("web", {"app": "web"}), pod("one", {"app": "web"}))
        await place.settle()
        assert place.endpoints("web") == {"one": "rs"}
    assert "odd" in caplog.text


@pytest.mark.asyncio
async def test_fields_that_are_null_are_as_if_not_there() -> None:
    async with running() as place:
        made = pod("one", {"app": "web"})
        made["metadata"] |= {"annotations": None, "ownerReferences": None, "finalizers": None}
        made["spec"] |= {"nodeSelector": None, "initContainers": None, "readinessGates": None}
        await place.create(made, service("web", {"app": "web"}))
        await place.settle()
        assert place.endpoints("web") == {"one": "rs"}
