"""What a cluster does by itself: Pods, slices, rollouts, deletions, seen as users see them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from controlled import Clock, Obj, containers, image, meta, pod, running, service, workload

from kdns.errors import ApiError

pytestmark = pytest.mark.asyncio

WEB = {"app": "web"}


def conditions(obj: Obj) -> dict[str, str]:
    return {one["type"]: f"{one['status']} {one.get('reason', '')}".strip()
            for one in obj["status"].get("conditions", ())}  # fmt: skip


# --- from the start ---------------------------------------------------------------------------


async def test_a_new_cluster_has_what_every_cluster_has() -> None:
    async with running(nodes=2, root_ca="PEM", dns_address=("127.0.0.1", 5353)) as place:
        assert place.names("Namespace") == [
            "default", "kube-node-lease", "kube-public", "kube-system",
        ]  # fmt: skip
        assert place.names("Node") == ["node1", "node2"]
        assert conditions(place.get("Node", "node1"))["Ready"] == "True KubeletReady"
        assert place.names("Lease", "kube-node-lease") == ["node1", "node2"]
        assert place.names("ServiceAccount", "kube-public") == ["default"]
        found = place.get("ConfigMap", "kube-public/kube-root-ca.crt")
        assert found["data"] == {"ca.crt": "PEM"}
        assert place.get("Service", "kubernetes")["spec"]["clusterIP"] == "10.96.0.1"
        assert place.endpoints("kubernetes") == {"127.0.0.1": "r"}
        dns = place.get("Service", "kube-system/kube-dns")
        assert dns["spec"]["clusterIP"] == "10.96.0.10"
        (piece,) = place.slices("kube-dns", "kube-system")
        assert [(p["name"], p["port"], p["protocol"]) for p in piece["ports"]] == [
            ("dns", 5353, "UDP"), ("dns-tcp", 5353, "TCP"),
        ]  # fmt: skip


async def test_a_cluster_says_where_its_addresses_come_from() -> None:
    async with running() as place:
        (name,) = place.names("ServiceCIDR")
        ranges = place.get("ServiceCIDR", name)
        assert (name, ranges["spec"]) == ("kubernetes", {"cidrs": ["10.96.0.0/12"]})
        assert conditions(ranges)["Ready"] == "True"
        await place.delete("ServiceCIDR", name)
        await place.settle()
        assert place.find("ServiceCIDR", name) is not None


async def test_servers_that_move_are_found_at_their_new_address() -> None:
    async with running(api_address=("127.0.0.1", 1)) as place:
        place.controllers.options.api_address = ("192.0.2.9", 7443)
        await place.controllers.advertise()
        await place.settle()
        (piece,) = place.slices("kubernetes")
        assert piece["endpoints"][0]["addresses"] == ["192.0.2.9"]
        assert piece["ports"][0]["port"] == 7443
        assert place.get("Service", "kubernetes")["spec"]["ports"][0]["targetPort"] == 7443


@pytest.mark.parametrize("kind", ["Service", "EndpointSlice", "Endpoints"])
async def test_what_a_cluster_needs_comes_back(kind: str) -> None:
    async with running(dns_address=("127.0.0.1", 5353)) as place:
        for name in ("kubernetes", "kube-system/kube-dns"):
            await place.delete(kind, name)
            await place.settle()
            assert place.find(kind, name) is not None
        assert place.endpoints("kubernetes") == {"127.0.0.1": "r"}
        assert place.get("Service", "kubernetes")["spec"]["clusterIP"] == "10.96.0.1"


@pytest.mark.parametrize(
    ("options", "node", "field", "expected"),
    [
        ({}, "node1", "address", "192.0.2.1"),
        ({"node_addresses": ["10.0.0.5"]}, "node1", "address", "10.0.0.5"),
        ({"zones": ["a", "b"]}, "node3", "topology.kubernetes.io/zone", "a"),
        ({"zones": ["eu-1a"]}, "node1", "topology.kubernetes.io/region", "eu-1"),
    ],
)
async def test_nodes_are_as_asked_for(
    options: dict[str, Any], node: str, field: str, expected: str
) -> None:
    async with running(nodes=3, **options) as place:
        found = place.get("Node", node)
        if field == "address":
            assert found["status"]["addresses"][0]["address"] == expected
        else:
            assert found["metadata"]["labels"][field] == expected


# --- Pods -------------------------------------------------------------------------------------


async def test_a_pod_runs_on_a_node_with_an_address() -> None:
    async with running() as place:
        await place.create(pod("one", containers=containers()))
        await place.settle()
        found = place.get("Pod", "one")
        assert found["spec"]["nodeName"] == "node1"
        status = found["status"]
        assert status["phase"] == "Running" and status["hostIP"] == "192.0.2.1"
        assert status["podIP"].startswith("10.244.")
        assert status["podIPs"] == [{"ip": status["podIP"]}]
        assert conditions(found) == dict.fromkeys(
            ("PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady",
             "PodScheduled"), "True",
        )  # fmt: skip
        assert status["containerStatuses"][0]["ready"] is True
        assert "Scheduled: Successfully assigned default/one to node1" in place.events("one")


async def test_pods_are_spread_over_nodes() -> None:
    async with running(nodes=3) as place:
        await place.create(workload("Deployment", "web", 9))
        await place.settle()
        on = [one["spec"]["nodeName"] for one in place.all("Pod")]
        assert sorted(on) == ["node1"] * 3 + ["node2"] * 3 + ["node3"] * 3


async def test_a_pod_waits_for_a_node_that_fits() -> None:
    async with running(nodes=1) as place:
        await place.create(pod("one", nodeSelector={"disk": "ssd"}))
        await place.settle()
        found = place.get("Pod", "one")
        assert "nodeName" not in found["spec"]
        assert conditions(found)["PodScheduled"] == "False Unschedulable"
        assert place.events("one") == [
            "FailedScheduling: 0/1 nodes are available: 1 node(s) didn't match Pod's node"
            " affinity/selector."
        ]
        await place.patch("Node", "node1", {"metadata": {"labels": {"disk": "ssd"}}})
        await place.settle()
        assert conditions(place.get("Pod", "one"))["Ready"] == "True"


async def test_pods_are_ready_after_the_delay() -> None:
    async with running(pod_ready_delay=10) as place:
        await place.create(service("web", WEB), pod("one", WEB))
        await place.settle()
        assert conditions(place.get("Pod", "one"))["Ready"] == "False ContainersNotReady"
        assert place.endpoints("web") == {"one": ""}
        await place.settle(9)
        assert place.endpoints("web") == {"one": ""}
        await place.settle(1)
        assert conditions(place.get("Pod", "one"))["Ready"] == "True"
        assert place.endpoints("web") == {"one": "rs"}


async def test_an_annotation_keeps_a_pod_unready() -> None:
    async with running() as place:
        await place.create(service("web", WEB), pod("one", WEB))
        await place.settle()
        for value, expected in (("false", ""), (None, "rs")):
            change = {"metadata": {"annotations": {"kdns.dev/ready": value}}}
            await place.patch("Pod", "one", change)
            await place.settle()
            assert place.endpoints("web") == {"one": expected}


async def test_readiness_gates_are_waited_for() -> None:
    async with running() as place:
        await place.create(pod("one", readinessGates=[{"conditionType": "lb/ready"}]))
        await place.settle()
        found = place.get("Pod", "one")
        assert conditions(found)["Ready"] == "False ReadinessGatesNotReady"
        assert conditions(found)["ContainersReady"] == "True"
        gate = {"type": "lb/ready", "status": "True"}
        held = found["status"]["conditions"]
        await place.patch("Pod", "one", {"status": {"conditions": [*held, gate]}}, "status")
        await place.settle()
        assert conditions(place.get("Pod", "one"))["Ready"] == "True"


async def test_an_unmanaged_pod_keeps_the_status_its_maker_wrote() -> None:
    async with running() as place:
        await place.create(
            service("web", WEB),
            pod("one", WEB, annotations={"kdns.dev/unmanaged": "true"}),
        )
        status = {
            "phase": "Running",
            "podIP": "192.0.2.77",
            "podIPs": [{"ip": "192.0.2.77"}],
            "conditions": [{"type": "Ready", "status": "True"}],
        }
        await place.patch("Pod", "one", {"status": status}, "status")
        await place.settle()
        assert place.get("Pod", "one")["status"]["podIP"] == "192.0.2.77"
        assert place.slices("web")[0]["endpoints"][0]["addresses"] == ["192.0.2.77"]


async def test_a_pod_of_its_nodes_network_has_the_nodes_address() -> None:
    async with running() as place:
        await place.create(pod("one", hostNetwork=True))
        await place.settle()
        assert place.get("Pod", "one")["status"]["podIP"] == "192.0.2.1"


async def test_a_deleted_pod_is_seen_terminating_for_the_delay() -> None:
    async with running(pod_termination_delay=5) as place:
        await place.create(service("web", WEB), pod("one", WEB))
        await place.settle()
        await place.delete("Pod", "one")
        await place.settle()
        assert place.endpoints("web") == {"one": "st"}
        await place.settle(5)
        assert place.find("Pod", "one") is None
        assert place.endpoints("web") == {}


async def test_pods_of_a_deleted_node_come_up_elsewhere() -> None:
    async with running(nodes=2) as place:
        await place.create(workload("Deployment", "web", 4))
        await place.settle()
        await place.delete("Node", "node2")
        await place.settle()
        assert [one["spec"]["nodeName"] for one in place.all("Pod")] == ["node1"] * 4


async def test_pods_of_an_unready_node_leave_services() -> None:
    async with running() as place:
        await place.create(service("web", WEB), pod("one", WEB))
        await place.settle()
        status = place.get("Node", "node1")["status"]
        for value, expected in (("Unknown", ""), ("True", "rs")):
            changed = [
                one | {"status": value} if one["type"] == "Ready" else one
                for one in status["conditions"]
            ]
            await place.patch("Node", "node1", {"status": {"conditions": changed}}, "status")
            await place.settle()
            assert place.endpoints("web") == {"one": expected}


async def test_a_full_pod_range_is_said_and_used_again() -> None:
    async with running(ranges={"pod_ranges": ("10.9.0.0/30",)}) as place:
        await place.create(pod("one"), pod("two"), pod("three"), pod("four"))
        await place.settle()
        left = [p for p in place.all("Pod") if p["status"]["phase"] == "Pending"]
        assert left
        name = left[0]["metadata"]["name"]
        assert any("FailedCreatePodSandBox" in one for one in place.events(name))
        running_pod = next(p for p in place.all("Pod") if p["status"]["phase"] == "Running")
        await place.delete("Pod", running_pod["metadata"]["name"])
        await place.settle(10)
        assert len([p for p in place.all("Pod") if p["status"]["phase"] == "Running"]) == (
            4 - len(left)
        )


# --- slices -----------------------------------------------------------------------------------


async def test_a_service_finds_its_pods() -> None:
    async with running(nodes=2, zones=["a", "b"]) as place:
        await place.create(workload("Deployment", "web", 2), service("web", WEB))
        await place.settle()
        (piece,) = place.slices("web")
        assert piece["metadata"]["name"].startswith("web-")
        assert piece["metadata"]["labels"] == {
            "kubernetes.io/service-name": "web",
            "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
        }
        owner = piece["metadata"]["ownerReferences"][0]
        assert (owner["kind"], owner["name"], owner["controller"]) == ("Service", "web", True)
        assert piece["addressType"] == "IPv4"
        assert piece["ports"] == [{"name": "", "port": 8080, "protocol": "TCP"}]
        pods = {one["metadata"]["name"]: one for one in place.all("Pod")}
        for endpoint in piece["endpoints"]:
            found = pods[endpoint["targetRef"]["name"]]
            assert endpoint["addresses"] == [found["status"]["podIP"]]
            assert endpoint["targetRef"]["uid"] == found["metadata"]["uid"]
            assert endpoint["nodeName"] == found["spec"]["nodeName"]
        assert {one["zone"] for one in piece["endpoints"]} == {"a", "b"}
        older = place.get("Endpoints", "web")
        assert older["metadata"]["labels"] == {
            "endpoints.kubernetes.io/managed-by": "endpoint-controller"
        }
        assert {a["ip"] for s in older["subsets"] for a in s["addresses"]} == {
            one["status"]["podIP"] for one in pods.values()
        }
        assert older["subsets"][0]["ports"] == [{"port": 8080, "protocol": "TCP"}]


async def test_a_service_without_pods_has_an_empty_slice() -> None:
    async with running() as place:
        await place.create(service("web", WEB), service("bare"))
        await place.settle()
        (piece,) = place.slices("web")
        assert (piece["endpoints"], piece["ports"]) == ([], [])
        await place.create(pod("one", WEB))
        await place.settle()
        (later,) = place.slices("web")
        assert later["metadata"]["uid"] == piece["metadata"]["uid"]
        assert place.endpoints("web") == {"one": "rs"}
        assert place.slices("bare") == [] and place.find("Endpoints", "bare") is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"spec": {"selector": {"app": "other"}}}, {}),
        ({"spec": {"publishNotReadyAddresses": True}}, {"late": "r", "one": "rs"}),
        ({"metadata": {"labels": {"team": "x"}}}, {"late": "", "one": "rs"}),
    ],
)
async def test_slices_follow_the_service(change: Obj, expected: dict[str, str]) -> None:
    async with running() as place:
        late = pod("late", WEB, annotations={"kdns.dev/ready": "false"})
        await place.create(service("web", WEB), pod("one", WEB), late)
        await place.settle()
        assert place.endpoints("web") == {"late": "", "one": "rs"}
        await place.patch("Service", "web", change)
        await place.settle()
        assert place.endpoints("web") == expected
        labels = place.slices("web")[0]["metadata"]["labels"]
        assert labels.get("team") == change.get("metadata", {}).get("labels", {}).get("team")


async def test_named_ports_may_differ_from_pod_to_pod() -> None:
    async with running() as place:
        ports = [{"name": "web", "port": 80, "protocol": "TCP", "targetPort": "http"}]
        await place.create(
            service("web", WEB, ports=ports),
            pod("old", WEB, containers=containers([("http", 8080)])),
            pod("new", WEB, containers=containers([("http", 9090)])),
            pod("none", WEB, containers=containers([("admin", 1)])),
        )
        await place.settle()
        found = {
            tuple(port["port"] for port in piece["ports"]): [
                one["targetRef"]["name"] for one in piece["endpoints"]
            ]
            for piece in place.slices("web")
        }
        assert found == {(8080,): ["old"], (9090,): ["new"], (): ["none"]}
        subsets = place.get("Endpoints", "web")["subsets"]
        assert [(s["ports"][0]["port"], len(s["addresses"])) for s in subsets] == [
            (8080, 1), (9090, 1),
        ]  # fmt: skip


async def test_a_headless_service_names_its_pods() -> None:
    async with running() as place:
        await place.create(
            service("db", {"app": "db"}, clusterIP="None"), workload("StatefulSet", "db", 2)
        )
        await place.settle()
        (piece,) = place.slices("db")
        assert piece["metadata"]["labels"]["service.kubernetes.io/headless"] == ""
        assert [one["hostname"] for one in piece["endpoints"]] == ["db-0", "db-1"]


@pytest.mark.parametrize(
    ("distribution", "hints"),
    [
        ("PreferClose", {"forZones": [{"name": "a"}]}),
        ("PreferSameNode", {"forZones": [{"name": "a"}], "forNodes": [{"name": "node1"}]}),
    ],
)
async def test_traffic_distribution_gives_hints(distribution: str, hints: Obj) -> None:
    async with running(zones=["a"]) as place:
        late = pod("late", WEB, annotations={"kdns.dev/ready": "false"})
        await place.create(
            service("web", WEB, trafficDistribution=distribution), pod("one", WEB), late
        )
        await place.settle()
        found = {
            e["targetRef"]["name"]: e.get("hints") for e in place.slices("web")[0]["endpoints"]
        }
        assert found == {"one": hints, "late": None}


async def test_both_families_have_slices_of_their_own() -> None:
    ranges = {
        "service_ranges": ("10.96.0.0/16", "fd00:96::/112"),
        "pod_ranges": ("10.244.0.0/16", "fd00:244::/64"),
    }
    async with running(ranges=ranges) as place:
        await place.create(service("web", WEB, ipFamilyPolicy="RequireDualStack"), pod("one", WEB))
        await place.settle()
        found = {
            one["addressType"]: one["endpoints"][0]["addresses"] for one in place.slices("web")
        }
        ips = [one["ip"] for one in place.get("Pod", "one")["status"]["podIPs"]]
        assert found == {"IPv4": [ips[0]], "IPv6": [ips[1]]}


async def test_more_than_a_hundred_endpoints_are_spread_over_slices() -> None:
    async with running() as place:
        await place.create(workload("ReplicaSet", "web", 230), service("web", WEB))
        await place.settle()
        assert all(len(one["endpoints"]) <= 100 for one in place.slices("web"))
        assert len(place.endpoints("web")) == 230
        await place.patch("ReplicaSet", "web", {"spec": {"replicas": 3}})
        await place.settle()
        assert len(place.endpoints("web")) == 3


async def test_what_somebody_changes_in_a_slice_is_put_right() -> None:
    async with running() as place:
        await place.create(service("web", WEB), pod("one", WEB))
        await place.settle()
        name = place.slices("web")[0]["metadata"]["name"]
        await place.patch("EndpointSlice", name, {"endpoints": []})
        await place.settle()
        assert place.endpoints("web") == {"one": "rs"}
        await place.delete("EndpointSlice", name)
        await place.delete("Endpoints", "web")
        await place.settle()
        assert place.endpoints("web") == {"one": "rs"}
        assert place.get("Endpoints", "web")["subsets"]


async def test_slices_go_with_their_service() -> None:
    async with running() as place:
        await place.create(service("web", WEB), pod("one", WEB))
        await place.settle()
        await place.delete("Service", "web")
        await place.settle()
        assert place.slices("web") == [] and place.find("Endpoints", "web") is None


async def test_a_service_made_anew_at_once_has_slices_of_its_own() -> None:
    async with running() as place:
        await place.create(service("web", WEB), pod("one", WEB))
        await place.settle()
        await place.delete("Service", "web")
        await place.create(service("web", WEB))
        await place.settle()
        (piece,) = place.slices("web")
        uid = place.get("Service", "web")["metadata"]["uid"]
        assert piece["metadata"]["ownerReferences"][0]["uid"] == uid
        assert place.endpoints("web") == {"one": "rs"}


# --- hand-written Endpoints -------------------------------------------------------------------


def hand_written(name: str, *ips: str, labels: dict[str, str] | None = None) -> Obj:
    return {
        "apiVersion": "v1",
        "kind": "Endpoints",
        "metadata": meta(name, labels),
        "subsets": [
            {"addresses": [{"ip": ip} for ip in ips], "ports": [{"port": 5432, "name": "pg"}]}
        ],
    }


async def test_hand_written_endpoints_are_mirrored() -> None:
    async with running() as place:
        await place.create(service("db"), hand_written("db", "192.0.2.50", "2001:db8::5"))
        await place.settle()
        found = {one["addressType"]: one for one in place.slices("db")}
        assert set(found) == {"IPv4", "IPv6"}
        labels = found["IPv4"]["metadata"]["labels"]
        assert labels["endpointslice.kubernetes.io/managed-by"] == (
            "endpointslicemirroring-controller.k8s.io"
        )
        assert found["IPv4"]["ports"] == [{"name": "pg", "port": 5432, "protocol": "TCP"}]
        change = hand_written("db", "192.0.2.51")["subsets"]
        await place.patch("Endpoints", "db", {"subsets": change})
        await place.settle()
        assert place.endpoints("db") == {"192.0.2.51": "r"}
        await place.delete("Endpoints", "db")
        await place.settle()
        assert place.slices("db") == []


@pytest.mark.parametrize(
    "made",
    [
        [hand_written("db", "192.0.2.50")],  # no Service
        [service("db", {"app": "db"}), hand_written("x", "192.0.2.50")],
        [service("db"), hand_written("db", "192.0.2.50",
                                     labels={"endpointslice.kubernetes.io/skip-mirror": "true"})],
    ],
)  # fmt: skip
async def test_what_is_not_mirrored(made: list[Obj]) -> None:
    async with running() as place:
        await place.create(*made)
        await place.settle()
        mirrored = "endpointslice.kubernetes.io/managed-by=endpointslicemirroring-controller.k8s.io"
        assert place.names("EndpointSlice", labels=mirrored) == []


# --- Deployments ------------------------------------------------------------------------------


async def test_a_deployment_brings_up_its_pods() -> None:
    async with running() as place:
        await place.create(workload("Deployment", "web", 3))
        await place.settle()
        (rs,) = place.all("ReplicaSet")
        named = rs["metadata"]["labels"]["pod-template-hash"]
        assert rs["metadata"]["name"] == f"web-{named}"
        assert rs["metadata"]["annotations"]["deployment.kubernetes.io/revision"] == "1"
        assert all(name.startswith(f"web-{named}-") for name in place.names("Pod"))
        found = place.get("Deployment", "web")
        status = found["status"]
        assert {k: status[k] for k in ("replicas", "updatedReplicas", "availableReplicas")} == {
            "replicas": 3, "updatedReplicas": 3, "availableReplicas": 3,
        }  # fmt: skip
        assert "unavailableReplicas" not in status and status["observedGeneration"] == 1
        assert conditions(found) == {
            "Available": "True MinimumReplicasAvailable",
            "Progressing": "True NewReplicaSetAvailable",
        }
        assert found["metadata"]["annotations"]["deployment.kubernetes.io/revision"] == "1"
        assert place.events("web") == [
            f"ScalingReplicaSet: Scaled up replica set web-{named} from 0 to 3"
        ]
        assert len(place.events(f"web-{named}")) == 3


@pytest.mark.parametrize("replicas", [0, 1, 5, 40])
async def test_a_deployment_is_scaled(replicas: int) -> None:
    async with running() as place:
        await place.create(workload("Deployment", "web", 3))
        await place.settle()
        await place.patch("Deployment", "web", {"spec": {"replicas": replicas}})
        await place.settle()
        assert len(place.names("Pod")) == replicas
        assert place.get("Deployment", "web")["status"].get("availableReplicas", 0) == replicas


async def test_a_rollout_never_has_too_few_or_too_many_pods() -> None:
    async with running(pod_ready_delay=1) as place:
        await place.create(workload("Deployment", "web", 4))
        await place.settle(1)
        await place.patch("Deployment", "web", image("nginx:2"))
        seen = []
        for _ in range(20):
            pods = place.all("Pod")
            ready = sum(conditions(one).get("Ready") == "True" for one in pods)
            seen.append((len(pods), ready))
            await place.settle(1)
        assert max(total for total, _ in seen) <= 5
        assert min(ready for _, ready in seen) >= 3
        images = {one["spec"]["containers"][0]["image"] for one in place.all("Pod")}
        assert images == {"nginx:2"} and len(place.names("Pod")) == 4
        assert conditions(place.get("Deployment", "web"))["Progressing"] == (
            "True NewReplicaSetAvailable"
        )
        assert [one["spec"]["replicas"] for one in place.all("ReplicaSet")].count(0) == 1


async def test_a_rollout_that_gets_stuck_is_said_and_undone() -> None:
    async with running() as place:
        await place.create(workload("Deployment", "web", 2, progressDeadlineSeconds=60))
        await place.settle()
        broken = image("nginx:2")
        broken["spec"]["template"]["metadata"] = {"annotations": {"kdns.dev/ready": "false"}}
        await place.patch("Deployment", "web", broken)
        await place.settle()
        found = place.get("Deployment", "web")
        assert conditions(found)["Progressing"] == "True ReplicaSetUpdated"
        assert conditions(found)["Available"] == "True MinimumReplicasAvailable"
        await place.settle(62)
        assert conditions(place.get("Deployment", "web"))["Progressing"] == (
            "False ProgressDeadlineExceeded"
        )
        # kubectl rollout undo: the template of the revision before.
        undo = image("nginx")
        undo["spec"]["template"]["metadata"] = {"annotations": None}
        await place.patch("Deployment", "web", undo)
        await place.settle()
        found = place.get("Deployment", "web")
        assert conditions(found)["Progressing"] == "True NewReplicaSetAvailable"
        assert found["metadata"]["annotations"]["deployment.kubernetes.io/revision"] == "3"
        (live,) = [one for one in place.all("ReplicaSet") if one["spec"]["replicas"]]
        annotations = live["metadata"]["annotations"]
        assert annotations["deployment.kubernetes.io/revision-history"] == "1"


async def test_recreate_ends_all_old_pods_first() -> None:
    async with running(pod_termination_delay=5) as place:
        await place.create(workload("Deployment", "web", 2, strategy={"type": "Recreate"}))
        await place.settle()
        await place.patch("Deployment", "web", image("nginx:2"))
        await place.settle()
        pods = place.all("Pod")
        assert [one["spec"]["containers"][0]["image"] for one in pods] == ["nginx", "nginx"]
        await place.settle(5)
        pods = place.all("Pod")
        assert [one["spec"]["containers"][0]["image"] for one in pods] == ["nginx:2", "nginx:2"]


async def test_a_paused_deployment_scales_and_does_not_roll() -> None:
    async with running() as place:
        await place.create(workload("Deployment", "web", 2))
        await place.settle()
        await place.patch("Deployment", "web", {"spec": {"paused": True}})
        await place.patch("Deployment", "web", image("nginx:2"))
        await place.patch("Deployment", "web", {"spec": {"replicas": 3}})
        await place.settle()
        assert [p["spec"]["containers"][0]["image"] for p in place.all("Pod")] == ["nginx"] * 3
        assert conditions(place.get("Deployment", "web"))["Progressing"] == (
            "Unknown DeploymentPaused"
        )
        await place.patch("Deployment", "web", {"spec": {"paused": None}})
        await place.settle()
        assert [p["spec"]["containers"][0]["image"] for p in place.all("Pod")] == ["nginx:2"] * 3
        assert conditions(place.get("Deployment", "web"))["Progressing"] == (
            "True NewReplicaSetAvailable"
        )


async def test_only_so_many_old_revisions_are_kept() -> None:
    async with running() as place:
        await place.create(workload("Deployment", "web", 1, revisionHistoryLimit=2))
        for number in range(5):
            await place.settle()
            await place.patch("Deployment", "web", image(f"nginx:{number}"))
        await place.settle()
        assert len(place.names("ReplicaSet")) == 3
        assert place.get("Deployment", "web")["metadata"]["annotations"][
            "deployment.kubernetes.io/revision"
        ] == "6"  # fmt: skip


async def test_a_pod_that_is_deleted_is_replaced() -> None:
    async with running() as place:
        await place.create(workload("Deployment", "web", 2), service("web", WEB))
        await place.settle()
        first, *_ = place.names("Pod")
        await place.delete("Pod", first)
        await place.settle()
        assert first not in place.names("Pod") and len(place.names("Pod")) == 2
        assert sorted(place.endpoints("web")) == place.names("Pod")


async def test_minimum_ready_seconds_delay_availability() -> None:
    async with running() as place:
        await place.create(workload("Deployment", "web", 1, minReadySeconds=30))
        await place.settle()
        found = place.get("Deployment", "web")
        assert found["status"]["readyReplicas"] == 1
        assert found["status"].get("availableReplicas", 0) == 0
        await place.settle(30)
        assert place.get("Deployment", "web")["status"]["availableReplicas"] == 1


async def test_a_replica_set_adopts_and_releases_by_labels() -> None:
    async with running() as place:
        await place.create(pod("stray", WEB), workload("ReplicaSet", "web", 2))
        await place.settle()
        assert len(place.names("Pod")) == 2
        owner = place.get("Pod", "stray")["metadata"]["ownerReferences"][0]
        assert (owner["kind"], owner["name"]) == ("ReplicaSet", "web")
        await place.patch("Pod", "stray", {"metadata": {"labels": {"app": "debug"}}})
        await place.settle()
        assert "ownerReferences" not in place.get("Pod", "stray")["metadata"]
        assert len(place.names("Pod")) == 3


async def test_unready_pods_go_first() -> None:
    async with running() as place:
        await place.create(workload("ReplicaSet", "web", 3))
        await place.settle()
        second = place.names("Pod")[1]
        await place.patch("Pod", second, {"metadata": {"annotations": {"kdns.dev/ready": "false"}}})
        await place.settle()
        await place.patch("ReplicaSet", "web", {"spec": {"replicas": 2}})
        await place.settle()
        assert second not in place.names("Pod")


# --- StatefulSets -----------------------------------------------------------------------------


async def test_a_stateful_set_starts_its_pods_in_order() -> None:
    async with running(pod_ready_delay=1) as place:
        await place.create(workload("StatefulSet", "db", 3))
        for count in (1, 2, 3):
            await place.settle()
            assert place.names("Pod") == [f"db-{number}" for number in range(count)]
            place.clock.now += 1
        await place.settle()
        found = place.get("Pod", "db-1")
        assert (found["spec"]["hostname"], found["spec"]["subdomain"]) == ("db-1", "db")
        labels = found["metadata"]["labels"]
        assert labels["statefulset.kubernetes.io/pod-name"] == "db-1"
        assert labels["apps.kubernetes.io/pod-index"] == "1"
        status = place.get("StatefulSet", "db")["status"]
        assert status["currentRevision"] == status["updateRevision"]
        assert labels["controller-revision-hash"] == status["updateRevision"]
        assert status["readyReplicas"] == status["availableReplicas"] == 3
        assert "SuccessfulCreate: create Pod db-0 in StatefulSet db successful" in (
            place.events("db")
        )


async def test_a_parallel_stateful_set_starts_all_at_once() -> None:
    async with running(pod_ready_delay=1) as place:
        await place.create(
            workload("StatefulSet", "db", 3, podManagementPolicy="Parallel", ordinals={"start": 5})
        )
        await place.settle()
        assert place.names("Pod") == ["db-5", "db-6", "db-7"]


async def test_a_stateful_set_shrinks_from_the_end() -> None:
    async with running(pod_termination_delay=1) as place:
        await place.create(workload("StatefulSet", "db", 4))
        await place.settle()
        await place.patch("StatefulSet", "db", {"spec": {"replicas": 2}})
        seen = []
        for _ in range(4):
            await place.settle()
            seen.append(place.names("Pod")[-1])
            place.clock.now += 1
        assert seen == ["db-3", "db-2", "db-1", "db-1"]


async def test_a_stateful_set_is_updated_from_the_end_down_to_the_partition() -> None:
    async with running() as place:
        rolling = {"type": "RollingUpdate", "rollingUpdate": {"partition": 2}}
        await place.create(workload("StatefulSet", "db", 4, updateStrategy=rolling))
        await place.settle()
        await place.patch("StatefulSet", "db", image("nginx:2"))
        await place.settle()

        def images() -> list[str]:
            return [one["spec"]["containers"][0]["image"] for one in place.all("Pod")]

        assert images() == ["nginx", "nginx", "nginx:2", "nginx:2"]
        status = place.get("StatefulSet", "db")["status"]
        assert (status["currentReplicas"], status["updatedReplicas"]) == (2, 2)
        assert status["currentRevision"] != status["updateRevision"]
        await place.delete("Pod", "db-0")  # below the partition: as it was
        await place.settle()
        assert images() == ["nginx", "nginx", "nginx:2", "nginx:2"]
        await place.patch(
            "StatefulSet", "db", {"spec": {"updateStrategy": {"rollingUpdate": {"partition": 0}}}}
        )
        await place.settle()
        assert images() == ["nginx:2"] * 4
        status = place.get("StatefulSet", "db")["status"]
        assert status["currentRevision"] == status["updateRevision"]
        assert status["currentReplicas"] == 4


async def test_on_delete_leaves_updates_to_people() -> None:
    async with running() as place:
        await place.create(workload("StatefulSet", "db", 2, updateStrategy={"type": "OnDelete"}))
        await place.settle()
        await place.patch("StatefulSet", "db", image("nginx:2"))
        await place.settle()
        await place.delete("Pod", "db-0")
        await place.settle()
        images = [one["spec"]["containers"][0]["image"] for one in place.all("Pod")]
        assert images == ["nginx:2", "nginx"]


# --- deletion ---------------------------------------------------------------------------------


async def test_a_deleted_deployment_takes_everything_with_it() -> None:
    async with running() as place:
        await place.create(workload("Deployment", "web", 3))
        await place.settle()
        await place.delete("Deployment", "web")
        await place.settle()
        assert place.names("ReplicaSet") == [] and place.names("Pod") == []


async def test_foreground_deletion_waits_for_what_it_owns() -> None:
    async with running(pod_termination_delay=5) as place:
        await place.create(workload("Deployment", "web", 2))
        await place.settle()
        await place.delete("Deployment", "web", propagation="Foreground")
        await place.settle()
        assert place.get("Deployment", "web")["metadata"]["deletionTimestamp"]
        assert len(place.names("Pod")) == 2
        await place.settle(5)
        assert place.names("Pod") == [] and place.names("ReplicaSet") == []
        assert place.find("Deployment", "web") is None


async def test_orphans_stay() -> None:
    async with running() as place:
        await place.create(workload("Deployment", "web", 2))
        await place.settle()
        await place.delete("Deployment", "web", propagation="Orphan")
        await place.settle()
        assert place.find("Deployment", "web") is None
        (rs,) = place.all("ReplicaSet")
        assert "ownerReferences" not in rs["metadata"]
        assert len(place.names("Pod")) == 2


async def test_an_object_of_an_owner_that_never_was_is_collected() -> None:
    async with running() as place:
        gone = {"apiVersion": "v1", "kind": "ConfigMap", "name": "x", "uid": "no-such-uid"}
        strange = {"apiVersion": "example.com/v1", "kind": "Thing", "name": "x", "uid": "u"}
        for name, owner in (("dangling", gone), ("unknown", strange)):
            await place.create({"apiVersion": "v1", "kind": "ConfigMap",
                                "metadata": meta(name, ownerReferences=[owner])})  # fmt: skip
        await place.settle()
        assert place.find("ConfigMap", "dangling") is None
        assert place.find("ConfigMap", "unknown") is not None


@pytest.mark.parametrize("delay", [0, 5])
async def test_a_namespace_goes_with_all_it_holds(delay: int) -> None:
    async with running(pod_termination_delay=delay) as place:
        await place.create(
            {"apiVersion": "v1", "kind": "Namespace", "metadata": meta("prod")},
            workload("Deployment", "prod/web", 3),
            service("prod/web", WEB),
        )
        await place.settle()
        assert place.names("ServiceAccount", "prod") == ["default"]
        assert place.endpoints("web", "prod")
        await place.delete("Namespace", "prod")
        if delay:
            await place.settle()
            assert place.get("Namespace", "prod")["status"]["phase"] == "Terminating"
            assert len(place.names("Pod", "prod")) == 3
        await place.settle(delay)
        assert place.find("Namespace", "prod") is None
        assert [key for kind in ("Pod", "Service", "EndpointSlice", "ConfigMap", "Event")
                for key in place.names(kind, "prod")] == []  # fmt: skip


async def test_a_namespace_waits_for_finalizers() -> None:
    async with running() as place:
        await place.create(
            {"apiVersion": "v1", "kind": "Namespace", "metadata": meta("prod")},
            {"apiVersion": "v1", "kind": "ConfigMap",
             "metadata": meta("prod/held", finalizers=["example.com/wait"])},
        )  # fmt: skip
        await place.settle()
        await place.delete("Namespace", "prod")
        await place.settle()
        found = place.get("Namespace", "prod")
        assert found["status"]["phase"] == "Terminating"
        told = {one["type"]: one["message"] for one in found["status"]["conditions"]}
        assert told["NamespaceContentRemaining"] == (
            "Some resources are remaining: configmaps has 1 resource instances"
        )
        assert told["NamespaceFinalizersRemaining"] == (
            "Some content in the namespace has finalizers remaining: example.com/wait in 1"
            " resource instances"
        )
        with pytest.raises(ApiError, match="being terminated"):
            await place.create(service("prod/late"))
        await place.patch("ConfigMap", "prod/held", {"metadata": {"finalizers": None}})
        await place.settle()
        assert place.find("Namespace", "prod") is None


# --- load balancers ---------------------------------------------------------------------------


async def test_a_load_balancer_gets_an_address_and_gives_it_back() -> None:
    async with running() as place:
        await place.create(service("web", WEB, type="LoadBalancer"))
        await place.settle()
        (ingress,) = place.get("Service", "web")["status"]["loadBalancer"]["ingress"]
        assert ingress["ip"].startswith("203.0.113.") and ingress["ipMode"] == "VIP"
        assert place.events("web") == [
            "EnsuringLoadBalancer: Ensuring load balancer",
            "EnsuredLoadBalancer: Ensured load balancer",
        ]
        await place.patch("Service", "web", {"spec": {"type": "ClusterIP"}})
        await place.settle()
        assert place.get("Service", "web")["status"]["loadBalancer"] == {}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"loadBalancerIP": "203.0.113.9"}, ["203.0.113.9"]),
        ({"loadBalancerClass": "example.com/other"}, []),
    ],
)
async def test_which_load_balancers_are_ours(spec: Obj, expected: list[str]) -> None:
    async with running() as place:
        await place.create(service("web", WEB, type="LoadBalancer", **spec))
        await place.settle()
        found = place.get("Service", "web").get("status", {}).get("loadBalancer", {})
        assert [one["ip"] for one in found.get("ingress", ())] == expected


# --- Events -----------------------------------------------------------------------------------


async def test_what_happens_again_is_counted() -> None:
    async with running(ranges={"pod_ranges": ("10.9.0.0/30",)}) as place:
        await place.create(*(pod(f"p{n}") for n in range(4)))
        await place.settle()
        left = next(p for p in place.all("Pod") if p["status"]["phase"] == "Pending")
        await place.settle(5)
        await place.settle(5)
        told = place.events(left["metadata"]["name"])
        (full,) = [one for one in told if one.startswith("FailedCreatePodSandBox")]
        assert int(full.rpartition(" x")[2]) >= 3


async def test_events_are_forgotten_after_an_hour() -> None:
    async with running() as place:
        await place.create(pod("one"))
        await place.settle()
        assert place.events("one")
        await place.settle(3700)
        assert place.events("one") == []


# --- restart ----------------------------------------------------------------------------------


async def test_after_a_restart_everything_is_as_it_was(tmp_path: Path) -> None:
    path, clock = str(tmp_path / "store.db"), Clock()
    kinds = ("Namespace", "Node", "Service", "EndpointSlice", "Endpoints", "Pod", "ReplicaSet",
             "Deployment", "StatefulSet", "ConfigMap", "ServiceAccount", "Lease")  # fmt: skip

    def state(place: Any) -> dict[str, list[Obj]]:
        found = {kind: place.all(kind, "") for kind in kinds}
        for kind in ("Service", "EndpointSlice", "Pod"):
            assert found[kind]
        return found

    async with running(path, clock) as place:
        await place.create(
            workload("Deployment", "web", 3), service("web", WEB), workload("StatefulSet", "db", 2)
        )
        await place.settle()
        before = state(place)
    async with running(path, clock) as place:
        assert state(place) == before


async def test_what_happened_while_nobody_looked_is_made_up_for(tmp_path: Path) -> None:
    path, clock = str(tmp_path / "store.db"), Clock()
    async with running(path, clock) as place:
        await place.create(workload("Deployment", "web", 2), service("web", WEB))
        await place.settle()
        await place.controllers.stop()
        await place.patch("Deployment", "web", {"spec": {"replicas": 4}})
        await place.delete("Pod", place.names("Pod")[0], grace=0)
    async with running(path, clock) as place:
        await place.settle()
        assert len(place.names("Pod")) == 4 and len(place.endpoints("web")) == 4


async def test_nodes_that_are_no_longer_asked_for_go(tmp_path: Path) -> None:
    path, clock = str(tmp_path / "store.db"), Clock()
    async with running(path, clock, nodes=3) as place:
        await place.create(workload("Deployment", "web", 3))
        await place.settle()
    async with running(path, clock, nodes=1) as place:
        await place.settle()
        assert place.names("Node") == ["node1"]
        assert {one["spec"]["nodeName"] for one in place.all("Pod")} == {"node1"}
