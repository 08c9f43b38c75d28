"""Manifests in place of a cluster: what a learner's YAML becomes, and files that change."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import os
import pathlib
import textwrap
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from typing import Any

import pytest

from kdns.errors import SourceError
from kdns.metrics import Metrics
from kdns.registry.manifests import Compiled, Document, Pool, compile_manifests
from kdns.registry.objects import EndpointSlice, Key, Kind, Service
from kdns.registry.snapshot import Snapshot
from kdns.registry.spec import ManifestSpec
from kdns.registry.store import Store
from kdns.source.manifests import ManifestSource, parse_documents

SPEC = ManifestSpec(())


def compiled(text: str, spec: ManifestSpec = SPEC) -> Compiled:
    body = textwrap.dedent(text).encode()
    return compile_manifests(parse_documents("m.yaml", body), spec)


def service(found: Compiled, name: str, namespace: str = "default") -> Service:
    (one,) = [
        s for s in found.services if (s.metadata.namespace, s.metadata.name) == (namespace, name)
    ]
    return one


def slices(found: Compiled, name: str) -> list[EndpointSlice]:
    label = "kubernetes.io/service-name"
    return [s for s in found.slices if (s.metadata.labels or {})[label] == name]


def addresses(found: Compiled, name: str) -> list[str]:
    return [a for s in slices(found, name) for e in s.endpoints or () for a in e.addresses]


WALK_THROUGH = """
    apiVersion: v1
    kind: Service
    metadata: {name: myservice}
    spec:
      selector: {run: mynginx}
      ports: [{port: 8080, targetPort: 80}]
    ---
    apiVersion: apps/v1
    kind: Deployment
    metadata: {name: my-nginx}
    spec:
      replicas: 2
      selector: {matchLabels: {run: mynginx}}
      template:
        metadata: {labels: {run: mynginx}}
        spec:
          containers: [{name: n, image: nginx, ports: [{containerPort: 80}]}]
    ---
    apiVersion: v1
    kind: Service
    metadata: {name: google-svc}
    spec: {type: ExternalName, externalName: google.com}
"""
DATABASE = """
    apiVersion: v1
    kind: Service
    metadata: {name: db, namespace: shop}
    spec:
      clusterIP: None
      selector: {app: db}
      ports: [{name: pg, port: 5432, targetPort: postgres}]
    ---
    apiVersion: apps/v1
    kind: StatefulSet
    metadata: {name: db, namespace: shop}
    spec:
      serviceName: db
      replicas: 3
      selector: {matchLabels: {app: db}}
      template:
        metadata: {labels: {app: db}}
        spec:
          containers: [{name: pg, ports: [{name: postgres, containerPort: 15432}]}]
"""


def test_an_unchanged_applications_manifests_get_addresses_and_endpoints() -> None:
    found = compiled(WALK_THROUGH)
    assert not found.errors
    spec = service(found, "myservice").spec
    assert ipaddress.ip_address(spec.cluster_ip) in ipaddress.ip_network("10.96.0.0/12")
    assert spec.cluster_ips == [spec.cluster_ip] and spec.ip_families == ["IPv4"]
    pods = [p.status.pod_ip for p in found.pods]
    assert len(set(pods)) == 2 and sorted(addresses(found, "myservice")) == sorted(pods)
    for ip in pods:
        assert ipaddress.ip_address(ip) in ipaddress.ip_network("10.244.0.0/16")
    (one,) = slices(found, "myservice")
    assert [(p.name, p.port, p.protocol) for p in one.ports or ()] == [("", 80, "TCP")]
    assert service(found, "google-svc").spec.cluster_ips is None
    assert {n.metadata.name for n in found.namespaces} >= {"default", "kube-system"}


def test_the_same_manifests_always_give_the_same_addresses_in_any_order() -> None:
    body = textwrap.dedent(WALK_THROUGH + "    ---" + DATABASE).encode()
    documents = parse_documents("m.yaml", body)
    once = compile_manifests(documents, SPEC)
    again = compile_manifests(reversed(documents), SPEC)
    assert once.services == again.services and once.pods == again.pods
    assert once.slices == again.slices
    # And one more Service moves none of them.
    other = Document("x", {"kind": "Service", "apiVersion": "v1", "metadata": {"name": "other"}})
    more = compile_manifests([*documents, other], SPEC)
    assert all(one in more.services for one in once.services)


def test_a_stateful_set_gives_its_pods_names_under_the_headless_service() -> None:
    found = compiled(DATABASE)
    assert service(found, "db", "shop").spec.cluster_ips == ["None"]
    (one,) = slices(found, "db")
    assert [e.hostname for e in one.endpoints or ()] == ["db-0", "db-1", "db-2"]
    assert [e.target_ref.name for e in one.endpoints or () if e.target_ref] == [
        "db-0",
        "db-1",
        "db-2",
    ]
    # A named targetPort is looked up in the containers.
    assert [(p.name, p.port) for p in one.ports or ()] == [("pg", 15432)]
    assert "shop" in {n.metadata.name for n in found.namespaces}


def test_conventional_addresses_are_kept_for_kube_dns_and_kubernetes() -> None:
    found = compiled(
        """
        {apiVersion: v1, kind: Service, metadata: {name: kube-dns, namespace: kube-system}}
        ---
        {apiVersion: v1, kind: Service, metadata: {name: kubernetes, namespace: default}}
        """
    )
    assert service(found, "kube-dns", "kube-system").spec.cluster_ip == "10.96.0.10"
    assert service(found, "kubernetes").spec.cluster_ip == "10.96.0.1"


def test_given_addresses_are_never_given_out_again() -> None:
    # A CIDR of 14 hosts: 12 are free beside the two conventional ones.
    documents = [
        Document(f"x:{n}", {"kind": "Service", "apiVersion": "v1", "metadata": {"name": f"s{n}"}})
        for n in range(12)
    ]
    given = {"kind": "Service", "apiVersion": "v1", "metadata": {"name": "given"}}
    documents.append(Document("x:99", {**given, "spec": {"clusterIP": "10.0.0.5"}}))
    found = compile_manifests(documents, ManifestSpec((), service_cidr="10.0.0.0/28"))
    ips = [s.spec.cluster_ip for s in found.services]
    assert len(set(ips)) == len(ips) == 12 and "10.0.0.5" in ips
    assert not {"10.0.0.0", "10.0.0.1", "10.0.0.10", "10.0.0.15"} & set(ips)
    # Eleven found a place; the twelfth is told.
    ((where, error),) = found.errors
    assert where.startswith("x:") and "no free address is left in 10.0.0.0/28" in str(error)


FAMILIES: list[tuple[str, list[str], list[int]]] = [
    ("{}", ["IPv4"], [4]),
    ("{ipFamilyPolicy: SingleStack}", ["IPv4"], [4]),
    ("{ipFamilyPolicy: PreferDualStack}", ["IPv4", "IPv6"], [4, 6]),
    ("{ipFamilyPolicy: RequireDualStack, ipFamilies: [IPv6]}", ["IPv6", "IPv4"], [6, 4]),
    ("{ipFamilies: [IPv6]}", ["IPv6"], [6]),
    ("{ipFamilies: [IPv6, IPv4]}", ["IPv6", "IPv4"], [6, 4]),
    ("{clusterIP: 'fd00:10:96::7'}", ["IPv6"], [6]),
    ("{clusterIPs: [10.96.0.7, 'fd00:10:96::7']}", ["IPv4", "IPv6"], [4, 6]),
]


@pytest.mark.parametrize(("spec", "families", "versions"), FAMILIES)
def test_ip_families_are_as_asked_for(spec: str, families: list[str], versions: list[int]) -> None:
    found = compiled(
        f"""
        kind: Service
        apiVersion: v1
        metadata: {{name: web}}
        spec: {spec[:-1]}{", " if len(spec) > 2 else ""}selector: {{app: web}}}}
        ---
        {{kind: Pod, apiVersion: v1, metadata: {{name: p, labels: {{app: web}}}}}}
        """
    )
    one = service(found, "web").spec
    assert one.ip_families == families
    assert [ipaddress.ip_address(ip).version for ip in one.cluster_ips or ()] == versions
    if "fd00" not in spec:
        for ip in one.cluster_ips or ():
            assert any(
                ipaddress.ip_address(ip) in ipaddress.ip_network(cidr)
                for cidr in ("10.96.0.0/12", "fd00:10:96::/112")
            )
    assert [s.address_type for s in slices(found, "web")] == families
    assert [ipaddress.ip_address(a).version for a in addresses(found, "web")] == versions


def test_a_cluster_of_ipv6_only() -> None:
    spec = ManifestSpec((), service_cidr="fd00:1::/112", pod_cidr="fd00:2::/64")
    found = compiled(WALK_THROUGH, spec)
    ip = ipaddress.ip_address(service(found, "myservice").spec.cluster_ip)
    assert ip in ipaddress.ip_network("fd00:1::/112")
    assert all(p.status.pod_ip.startswith("fd00:2:") for p in found.pods)


PODS = """
    kind: List
    apiVersion: v1
    items:
    - kind: Service
      apiVersion: v1
      metadata: {name: web, labels: {tier: front}}
      spec: {selector: {app: web}, ports: [{port: 80, targetPort: http}]}
    - kind: Node
      apiVersion: v1
      metadata: {name: n1, labels: {topology.kubernetes.io/zone: z-a}}
    - kind: Pod
      apiVersion: v1
      metadata: {name: a, labels: {app: web}}
      spec: {nodeName: n1, containers: [{ports: [{name: http, containerPort: 8080}]}]}
      status: {podIP: 10.9.9.9, phase: Running}
    - kind: Pod
      apiVersion: v1
      metadata: {name: b, labels: {app: web}}
      spec: {containers: [{ports: [{name: http, containerPort: 9090}]}]}
      status: {conditions: [{type: Ready, status: 'False'}]}
    - kind: Pod
      apiVersion: v1
      metadata: {name: done, labels: {app: web}}
      status: {phase: Succeeded, podIP: 10.9.9.8}
    - kind: Pod
      apiVersion: v1
      metadata: {name: other-ns, namespace: other, labels: {app: web}}
"""


def test_ports_on_nodes_are_given_where_the_manifest_leaves_them_out() -> None:
    text = """
        kind: Service
        apiVersion: v1
        metadata: {name: np}
        spec: {type: NodePort, ports: [{name: a, port: 80, nodePort: 30080}, {name: b, port: 81}]}
        ---
        kind: Service
        apiVersion: v1
        metadata: {name: lb}
        spec: {type: LoadBalancer, externalTrafficPolicy: Local, ports: [{port: 80}]}
        ---
        kind: Service
        apiVersion: v1
        metadata: {name: plain}
        spec: {ports: [{port: 80}]}
    """
    found = compiled(text)
    spec = {name: service(found, name).spec for name in ("np", "lb", "plain")}
    ports = {name: [p.node_port for p in one.ports or ()] for name, one in spec.items()}
    assert ports["np"][0] == 30080 and ports["plain"] == [0]
    given = [ports["np"][1], ports["lb"][0], spec["lb"].health_check_node_port]
    assert len({*given, 30080}) == 4 and all(30000 <= port <= 32767 for port in given)
    assert spec["np"].health_check_node_port == 0
    assert compiled(text).services == found.services  # and the same ones the next time


def test_a_node_is_taken_as_it_is_and_its_zone_is_that_of_its_pods() -> None:
    found = compiled("""
        apiVersion: v1
        kind: Node
        metadata: {name: n1, labels: {topology.kubernetes.io/zone: z-a}}
        status: {addresses: [{type: InternalIP, address: 192.0.2.1}]}
        ---
        apiVersion: v1
        kind: Pod
        metadata: {name: p, labels: {app: web}}
        spec: {nodeName: n1}
        ---
        apiVersion: v1
        kind: Service
        metadata: {name: web}
        spec: {selector: {app: web}, ports: [{port: 80}]}
    """)
    (node,) = found.nodes
    assert node.metadata.name == "n1" and node.status.addresses is not None
    (endpoint,) = [e for one in slices(found, "web") for e in one.endpoints or ()]
    assert (endpoint.node_name, endpoint.topology_zone) == ("n1", "z-a")


def test_pods_are_taken_as_they_are() -> None:
    found = compiled(PODS)
    assert not found.errors
    # Two Pods that call different ports `http`: two slices.
    first, second = slices(found, "web")
    assert [p.port for p in first.ports or ()] == [8080]
    assert [p.port for p in second.ports or ()] == [9090]
    assert first.endpoints and second.endpoints
    (a,), (b,) = first.endpoints, second.endpoints
    assert (a.addresses, a.node_name, a.topology_zone) == (["10.9.9.9"], "n1", "z-a")
    assert a.conditions.ready is True and b.conditions.ready is False
    assert (first.metadata.labels or {})["tier"] == "front"
    assert "done" not in {p.metadata.name for p in found.pods}


def test_publish_not_ready_addresses_makes_them_ready() -> None:
    text = PODS.replace(
        "selector: {app: web},", "selector: {app: web}, publishNotReadyAddresses: true,"
    )
    endpoints = [e for s in slices(compiled(text), "web") for e in s.endpoints or ()]
    assert [e.conditions.ready for e in endpoints] == [True, True]


def test_what_a_dump_of_a_cluster_holds_is_not_made_twice() -> None:
    found = compiled(
        WALK_THROUGH
        + """
    ---
    apiVersion: apps/v1
    kind: ReplicaSet
    metadata: {name: my-nginx-abc, ownerReferences: [{kind: Deployment, name: my-nginx}]}
    spec:
      replicas: 2
      selector: {matchLabels: {run: mynginx}}
      template: {metadata: {labels: {run: mynginx}}}
    ---
    apiVersion: v1
    kind: Pod
    metadata:
      name: my-nginx-abc-x
      labels: {run: mynginx}
      ownerReferences: [{kind: ReplicaSet, name: my-nginx-abc}]
    status: {podIP: 10.244.1.7}
    """
    )
    assert addresses(found, "myservice") == ["10.244.1.7"]


def test_given_slices_and_endpoints_are_used_as_they_are() -> None:
    found = compiled(
        WALK_THROUGH
        + """
    ---
    apiVersion: discovery.k8s.io/v1
    kind: EndpointSlice
    metadata: {name: mine, labels: {kubernetes.io/service-name: myservice}}
    addressType: IPv4
    endpoints: [{addresses: [192.0.2.1]}]
    ---
    apiVersion: v1
    kind: Endpoints
    metadata: {name: outside}
    subsets:
    - addresses: [{ip: 192.0.2.9, hostname: h}, {ip: '2001:db8::9'}]
      notReadyAddresses: [{ip: 192.0.2.8}]
      ports: [{name: x, port: 99}]
    """
    )
    assert addresses(found, "myservice") == ["192.0.2.1"]
    assert addresses(found, "outside") == ["192.0.2.9", "192.0.2.8", "2001:db8::9"]
    endpoints = slices(found, "outside")[0].endpoints
    assert endpoints
    first = endpoints[0]
    assert (first.hostname, first.conditions.ready) == ("h", True)
    assert not found.errors


def test_other_workloads_and_their_selectors() -> None:
    found = compiled(
        """
        {apiVersion: v1, kind: Service, metadata: {name: all}, spec: {selector: {app: x}}}
        ---
        apiVersion: apps/v1
        kind: DaemonSet
        metadata: {name: agent}
        spec: {template: {metadata: {labels: {app: x}}}}
        ---
        {apiVersion: v1, kind: Node, metadata: {name: n1}}
        ---
        {apiVersion: v1, kind: Node, metadata: {name: n2}}
        ---
        apiVersion: v1
        kind: ReplicationController
        metadata: {name: old}
        spec: {replicas: 1, selector: {app: x}, template: {metadata: {labels: {app: x}}}}
        ---
        apiVersion: apps/v1
        kind: ReplicaSet
        metadata: {name: rs}
        spec:
          selector: {matchExpressions: [{key: app, operator: In, values: [x]}]}
          template: {metadata: {labels: {app: x}}}
        ---
        {apiVersion: batch/v1, kind: CronJob, metadata: {name: ignored}}
        ---
        {apiVersion: serving.knative.dev/v1, kind: Service, metadata: {name: not-a-service}}
        """
    )
    assert not found.errors and len(addresses(found, "all")) == 2 + 1 + 1
    assert {p.metadata.name.rsplit("-", 2)[0] for p in found.pods} == {"agent", "old", "rs"}


def test_labels_select_as_the_api_server_would() -> None:
    found = compiled(PODS, ManifestSpec((), label_selector="tier=front"))
    assert [s.metadata.name for s in found.services] == ["web"]
    # The controller copies the Service's labels to its slices; the Pods have them not.
    assert len(found.slices) == 2 and not found.pods
    assert not compiled(PODS, ManifestSpec((), label_selector="tier=back")).services


WRONG: list[tuple[str, str]] = [
    ("kind: Service\nmetadata: {}", ": metadata.name: is empty"),
    ("kind: Service\nmetadata: {name: x}\nspec: {ports: [{port: http}]}", "spec.ports[0].port"),
    ("kind: Service\nmetadata: {name: a.b}", "'a.b' is not a DNS label"),
    ("kind: Service\nmetadata: {name: x}\nspec: {clusterIP: 10.96.0.300}", "not an IP address"),
    ("kind: Service\nmetadata: {name: x, labels: {version: 1.10}}", "Expected `str`, got `float`"),
    (
        "kind: Service\nmetadata: {name: x}\nspec: {loadBalancerSourceRanges: [192.0.2.1]}",
        "spec.loadBalancerSourceRanges[0]: '192.0.2.1' is not a CIDR",
    ),
    ("metadata: {name: x}", "kind: is missing: not a Kubernetes object"),
    ("kind: ServiceList\nitems: [3]", "not a Kubernetes object"),
    (
        "kind: Endpoints\nmetadata: {name: x}\nsubsets: [{addresses: [{ip: x}]}]",
        "Endpoints default/x",
    ),
    ("kind: Pod\nmetadata: {name: x}\nstatus: {podIP: x}", "status.podIP"),
]
WRONG_WORKLOADS: list[tuple[str, str]] = [
    ("metadata: {name: x}\nspec: {replicas: 1000000}", "1000000 is not in 0 to 5000"),
    ("metadata: {name: x}\nspec: {replicas: two}", "spec.replicas"),
    ("metadata: {}", "metadata.name: is empty"),
    (
        "metadata: {name: x}\nspec: {selector: {matchExpressions: [{key: a, operator: Near}]}}",
        "operator 'Near' is not one of",
    ),
    ("metadata: {name: x}\nspec: {selector: {matchLabels: [a]}}", "spec.selector"),
]


@pytest.mark.parametrize(
    ("text", "says"),
    [(f"apiVersion: v1\n{text}", says) for text, says in WRONG]
    + [(f"apiVersion: apps/v1\nkind: Deployment\n{text}", says) for text, says in WRONG_WORKLOADS],
)
def test_a_wrong_object_is_told_with_its_line_and_the_rest_is_kept(text: str, says: str) -> None:
    good = "kind: Service\napiVersion: v1\nmetadata: {name: good}\n"
    body = f"{good}---\n{text}\n".encode()
    found = compile_manifests(parse_documents("dir/f.yaml", body), SPEC)
    ((where, error),) = found.errors
    assert where == "dir/f.yaml:5" and says in str(error)
    assert [s.metadata.name for s in found.services] == ["good"]


def test_of_two_with_one_name_the_later_counts_and_that_is_told() -> None:
    text = "kind: Service\napiVersion: v1\nmetadata: {name: x}\nspec: {clusterIP: 10.96.0.%d}\n"
    body = (text % 7 + "---\n" + text % 8).encode()
    found = compile_manifests(parse_documents("f.yaml", body), SPEC)
    assert service(found, "x").spec.cluster_ip == "10.96.0.8"
    ((where, error),) = found.errors
    assert where == "f.yaml:1" and "given again at f.yaml:6" in str(error)


def test_a_pool_of_one_address() -> None:
    pool = Pool("192.0.2.1/32")
    assert str(pool.give("a")) == "192.0.2.1" and pool.give("b") is None


# --- reading YAML -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("f.yaml", "a: 1\n\tb: 2\n", "f.yaml:2: not YAML"),
        ("f.yaml", "a: [1\nb: 2\n", "f.yaml:2: not YAML"),
        ("f.yaml", "a: &x [*x]\n", "'*x' has no '&x' that ends before"),
        ("f.yaml", "[" * 100_000, "f.yaml:1: nested over 100 deep"),
        ("f.yaml", "a: !!python/object:os.system x\n", "f.yaml:1: not YAML"),
        ("f.yaml", "name: {{ .Release.Name }}\n", "f.yaml:1: not YAML"),
        ("f.json", '{\n"a": 1,\n}', "f.json:3: not JSON"),
        ("f.json", "[" * 100_000, "f.json: not JSON"),
    ],
)
def test_a_file_that_cannot_be_read_says_where(name: str, text: str, says: str) -> None:
    with pytest.raises(ValueError, match=name) as found:
        parse_documents(name, text.encode())
    assert says in str(found.value)


def test_aliases_that_grow_without_bound_are_refused() -> None:
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    with pytest.raises(ValueError, match="expand to over"):
        parse_documents("f.yaml", "\n".join(lines).encode())
    (document,) = parse_documents("f.yaml", b"a: &x {k: v}\nb: *x\n")
    assert document.value["b"] == {"k": "v"}


def test_dates_stay_text_and_empty_documents_do_not_count() -> None:
    (document,) = parse_documents("f.yaml", b"---\n---\nd: 2024-01-01\n---\n# nothing\n")
    assert document.value == {"d": "2024-01-01"} and document.where == "f.yaml:3"


# --- files that change --------------------------------------------------------------------


class Registry:
    """A sink over a store that wakes whoever waits."""

    def __init__(self, spec: ManifestSpec) -> None:
        self.store = Store.of(spec)
        self.snapshot = Snapshot()
        self.failures: list[str] = []
        self.looks = 0
        self._told = asyncio.Event()

    def replace(self, kind: Kind, objects: Iterable[Any], keep: Collection[Key] = ()) -> None:
        self.store.replace(kind, objects, keep)
        self._publish()

    def apply(self, kind: Kind, event: str, obj: Any) -> None:
        raise AssertionError("manifests come whole")

    def mark_synced(self, kind: Kind) -> None:
        self.store.mark_synced(kind)
        self._publish()

    def heard(self, what: str) -> None:
        self.looks += 1
        self._told.set()

    def failed(self, what: str, error: SourceError, retry_in: float) -> None:
        self.failures.append(str(error))
        self.looks += 1
        self._told.set()

    def _publish(self) -> None:
        out = self.store.publish(1)
        if out is not None:
            self.snapshot = out[0]
        self._told.set()

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                self._told.clear()
                await self._told.wait()

    async def another_look(self) -> None:
        # Two: one may have begun before the file was written.
        wanted = self.looks + 2
        await self.until(lambda: self.looks >= wanted)

    def names(self) -> list[str]:
        return sorted(self.snapshot.services.get("default", {}))


@contextlib.asynccontextmanager
async def following(
    *paths: pathlib.Path, metrics: Metrics | None = None
) -> AsyncIterator[Registry]:
    spec = ManifestSpec(tuple(map(str, paths)), interval=0.01)
    registry = Registry(spec)
    task = asyncio.create_task(ManifestSource(spec, registry, metrics or Metrics()).run())
    try:
        yield registry
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def one_service(name: str) -> str:
    return json.dumps({"kind": "Service", "apiVersion": "v1", "metadata": {"name": name}})


@pytest.mark.asyncio
async def test_files_and_folders_are_followed(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    (folder / ".git").mkdir()
    file = tmp_path / "single"  # given by name, it needs no suffix
    file.write_text(one_service("single"))
    (folder / "a.yaml").write_text(one_service("a"))
    (folder / "below" / "b.json").write_text(one_service("b"))
    (folder / "below" / "notes.txt").write_text("not: [yaml")
    (folder / ".git" / "c.yaml").write_text(one_service("hidden"))
    async with following(file, folder) as registry:
        await registry.until(lambda: registry.snapshot.synced)
        assert registry.names() == ["a", "b", "single"]
        (folder / "below" / "d.yml").write_text(one_service("d"))
        await registry.until(lambda: registry.names() == ["a", "b", "d", "single"])
        os.unlink(folder / "a.yaml")
        await registry.until(lambda: registry.names() == ["b", "d", "single"])
        # Replaced as editors and ConfigMap volumes do it: another file of the same size.
        (tmp_path / "new").write_text(one_service("e"))
        os.replace(tmp_path / "new", folder / "below" / "d.yml")
        await registry.until(lambda: registry.names() == ["b", "e", "single"])
        assert not registry.failures


@pytest.mark.asyncio
async def test_a_file_that_breaks_keeps_its_last_good_objects_and_is_told_once(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Metrics()
    file = tmp_path / "a.yaml"
    file.write_text(one_service("good"))
    async with following(tmp_path, metrics=metrics) as registry:
        await registry.until(lambda: registry.snapshot.synced)
        file.write_text("kind: Service\nmetadata: [\n")
        await registry.until(
            lambda: metrics.value("kdns_source_errors_total", "manifests", "broken")
        )
        await registry.another_look()
        assert registry.names() == ["good"]
        file.write_text(one_service("mended"))
        await registry.until(lambda: registry.names() == ["mended"])
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 1
    assert said[0].startswith(f"{file}:3: not YAML") and said[0].endswith("good objects stay")


@pytest.mark.asyncio
async def test_a_missing_path_is_told_and_nothing_is_denied_until_it_is_there(
    tmp_path: pathlib.Path,
) -> None:
    (tmp_path / "a.yaml").write_text(one_service("a"))
    later = tmp_path / "later"
    async with following(tmp_path / "a.yaml", later) as registry:
        await registry.until(lambda: registry.failures)
        assert registry.failures[0] == f"manifests: {later} does not exist"
        await registry.another_look()
        assert registry.names() == ["a"] and not registry.snapshot.synced
        later.mkdir()
        await registry.until(lambda: registry.snapshot.synced)
        (later / "b.yaml").write_text(one_service("b"))
        await registry.until(lambda: registry.names() == ["a", "b"])
        # A volume that goes away for a while takes nothing with it.
        os.rename(later, tmp_path / "away")
        failures = len(registry.failures)
        await registry.until(lambda: len(registry.failures) > failures)
        assert registry.names() == ["a", "b"]
