"""A stock kubectl drives the embedded API as it drives a cluster."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from running_api import Kubectl, all_kubectls, find_kubectl

from kdns.cluster import LocalCluster

Obj = dict[str, Any]
WAIT = "--timeout=20s"  # for what the controllers do; it takes milliseconds


@pytest.fixture(scope="module")
def admin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubectl]:
    """A kubectl in no namespace in particular, and the cluster it is for."""
    find_kubectl()
    with LocalCluster(nodes=2, tls=True) as cluster:
        text = Path(cluster.kubeconfig).read_text()
        yield Kubectl(tmp_path_factory.mktemp("kubectl"), text)


_names = itertools.count(1)


@pytest.fixture
def kubectl(admin: Kubectl) -> Kubectl:
    """A kubectl in a namespace of the test's own."""
    name = f"ns-{next(_names)}"
    assert admin("create", "namespace", name) == f"namespace/{name} created\n"
    return admin.inside(name)


def manifest(*objects: Obj) -> str:
    return yaml.safe_dump_all(objects)


def service(name: str = "web", *, labels: Obj | None = None, **spec: Any) -> Obj:
    ports = [{"name": "http", "port": 80, "targetPort": 8080}]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "labels": labels or {"app": name}},
        "spec": {"selector": {"app": name}, "ports": ports, **spec},
    }


def config_map(name: str, **data: str) -> Obj:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


def pod(name: str = "web", **spec: Any) -> Obj:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {"containers": [{"name": "web", "image": "nginx:1"}], **spec},
    }


def deployment(name: str = "web", replicas: int = 2) -> Obj:
    labels = {"app": name}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {"containers": [{"name": "web", "image": "nginx:1"}]},
            },
        },
    }


def rows(text: str) -> list[list[str]]:
    """The words of a table, headings first; they are set apart by two spaces or more."""
    return [re.split(r" {2,}", line.strip()) for line in text.splitlines()]


def read(kubectl: Kubectl, *words: str) -> Obj:
    """An object, or a List, as JSON."""
    found: Obj = json.loads(kubectl("get", *words, "-o", "json"))
    return found


def names(kubectl: Kubectl, *words: str) -> list[str]:
    return kubectl("get", *words, "-o", "name").split()


# --- apply --------------------------------------------------------------------------------------


def test_apply_makes_keeps_and_changes(kubectl: Kubectl) -> None:
    text = manifest(service(), config_map("settings", a="1"))
    made = kubectl("apply", "-f", "-", text=text)
    assert made == "service/web created\nconfigmap/settings created\n"
    again = kubectl("apply", "-f", "-", text=text)
    assert again == "service/web unchanged\nconfigmap/settings unchanged\n"
    text = manifest(service(), config_map("settings", b="2"))
    changed = kubectl("apply", "-f", "-", text=text)
    assert changed == "service/web unchanged\nconfigmap/settings configured\n"
    assert read(kubectl, "cm", "settings")["data"] == {"b": "2"}


def test_apply_merges_with_what_others_set(kubectl: Kubectl) -> None:
    kubectl("apply", "-f", "-", text=manifest(service()))
    kubectl("annotate", "service", "web", "note=mine")
    address = read(kubectl, "service", "web")["spec"]["clusterIP"]
    ports = [{"name": "http", "port": 80, "targetPort": 9090}, {"name": "dns", "port": 53}]
    kubectl("apply", "-f", "-", text=manifest(service(ports=ports)))
    found = read(kubectl, "service", "web")
    assert found["spec"]["clusterIP"] == address
    assert found["metadata"]["annotations"]["note"] == "mine"
    assert [(p["name"], p["port"], p["targetPort"]) for p in found["spec"]["ports"]] == [
        ("http", 80, 9090),
        ("dns", 53, 53),
    ]
    kubectl("apply", "-f", "-", text=manifest(service(ports=ports[1:])))
    assert [p["port"] for p in read(kubectl, "service", "web")["spec"]["ports"]] == [53]


def test_apply_of_a_folder_and_of_a_list(kubectl: Kubectl, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(manifest(service("a"), service("b")))
    items = [config_map("c"), config_map("d")]
    (tmp_path / "b.json").write_text(
        json.dumps({"apiVersion": "v1", "kind": "List", "items": items})
    )
    assert kubectl("apply", "-f", str(tmp_path)).splitlines() == [
        "service/a created", "service/b created", "configmap/c created", "configmap/d created",
    ]  # fmt: skip
    assert names(kubectl, "-f", str(tmp_path)) == [
        "service/a", "service/b", "configmap/c", "configmap/d",
    ]  # fmt: skip


def test_a_dry_run_changes_nothing(kubectl: Kubectl) -> None:
    text = manifest(service())
    assert kubectl("apply", "--dry-run=server", "-f", "-", text=text) == (
        "service/web created (server dry run)\n"
    )
    would_be = yaml.safe_load(
        kubectl("create", "--dry-run=server", "-o", "yaml", "-f", "-", text=text)
    )
    assert would_be["spec"]["type"] == "ClusterIP"
    assert names(kubectl, "services") == []


@pytest.mark.parametrize("how", [(), ("--server-side",)], ids=["client-side", "server-side"])
def test_a_field_that_is_misspelt_is_told(kubectl: Kubectl, how: tuple[str, ...]) -> None:
    text = manifest(service(selektor={"app": "web"}))
    complaint = kubectl.refused("apply", *how, "-f", "-", text=text)
    assert 'unknown field "spec.selektor"' in complaint or ".spec.selektor" in complaint
    if not how:
        done = kubectl.run("apply", "--validate=warn", "-f", "-", text=text)
        assert done.returncode == 0
        assert 'Warning: unknown field "spec.selektor"' in done.stderr


def test_server_side_apply_and_its_conflicts(kubectl: Kubectl) -> None:
    words = ("apply", "--server-side", "-f", "-")
    one = manifest(config_map("settings", a="1"))
    two = manifest(config_map("settings", a="2"))
    assert kubectl(*words, text=one) == "configmap/settings serverside-applied\n"
    assert kubectl(*words, text=one) == "configmap/settings serverside-applied\n"
    other = (*words, "--field-manager=other")
    complaint = kubectl.refused(*other, text=two)
    assert 'Apply failed with 1 conflict: conflict with "kubectl": .data.a' in complaint
    kubectl(*other, "--force-conflicts", text=two)
    found = json.loads(
        kubectl("get", "cm", "settings", "--show-managed-fields", "-o", "json")
    )  # fmt: skip
    assert found["data"] == {"a": "2"}
    owners = {
        entry["manager"]: entry["fieldsV1"] for entry in found["metadata"]["managedFields"]
        if entry["operation"] == "Apply"
    }  # fmt: skip
    assert owners["other"] == {"f:data": {"f:a": {}}}
    assert "f:a" not in owners.get("kubectl", {}).get("f:data", {})
    # What its only owner no longer names is gone.
    kubectl(*other, text=manifest(config_map("settings", b="3")))
    assert read(kubectl, "cm", "settings")["data"] == {"b": "3"}


def test_from_client_side_to_server_side_apply(kubectl: Kubectl) -> None:
    kubectl("apply", "-f", "-", text=manifest(service()))
    ports = [{"name": "http", "port": 80, "targetPort": 9090}]
    kubectl("apply", "--server-side", "-f", "-", text=manifest(service(ports=ports)))
    assert read(kubectl, "service", "web")["spec"]["ports"][0]["targetPort"] == 9090


def test_diff_tells_and_does_not_do(kubectl: Kubectl) -> None:
    new = kubectl.run("diff", "-f", "-", text=manifest(service()))
    assert new.returncode == 1
    assert "+  type: ClusterIP" in new.stdout
    kubectl("apply", "-f", "-", text=manifest(service()))
    assert kubectl("diff", "-f", "-", text=manifest(service())) == ""
    changed = manifest(service(selector={"app": "other"}))
    for how in ((), ("--server-side", "--force-conflicts")):
        done = kubectl.run("diff", *how, "-f", "-", text=changed)
        assert done.returncode == 1, done.stderr
        assert "-    app: web" in done.stdout
        assert "+    app: other" in done.stdout
    assert read(kubectl, "service", "web")["spec"]["selector"] == {"app": "web"}


# --- get ----------------------------------------------------------------------------------------


def test_the_forms_of_get(kubectl: Kubectl) -> None:
    kubectl("apply", "-f", "-", text=manifest(service(type="NodePort")))
    found = read(kubectl, "service", "web")
    address, node_port = found["spec"]["clusterIP"], found["spec"]["ports"][0]["nodePort"]
    assert 30000 <= node_port <= 32767
    head, row = rows(kubectl("get", "svc", "-o", "wide"))
    assert head == ["NAME", "TYPE", "CLUSTER-IP", "EXTERNAL-IP", "PORT(S)", "AGE", "SELECTOR"]
    assert row[:5] == ["web", "NodePort", address, "<none>", f"80:{node_port}/TCP"]
    assert row[6] == "app=web"
    assert yaml.safe_load(kubectl("get", "svc", "web", "-o", "yaml")) == found
    path = "{.items[*].spec.ports[0].targetPort}"
    assert kubectl("get", "svc", "-o", f"jsonpath={path}") == "8080"
    assert kubectl("get", "svc", "-o", "name") == "service/web\n"
    columns = "custom-columns=WHO:.metadata.name,WHERE:.spec.clusterIP"
    assert rows(kubectl("get", "svc", "-o", columns)) == [["WHO", "WHERE"], ["web", address]]
    template = "{{range .items}}{{.spec.type}}{{end}}"
    assert kubectl("get", "svc", "-o", f"go-template={template}") == "NodePort"


def test_get_chooses_and_sorts(kubectl: Kubectl, admin: Kubectl) -> None:
    kubectl("apply", "-f", "-", text=manifest(
        service("b", labels={"tier": "front"}), service("c", labels={"tier": "back"}),
        service("a", labels={"tier": "back", "old": "yes"}, clusterIP="None"),
    ))  # fmt: skip
    assert names(kubectl, "svc") == ["service/a", "service/b", "service/c"]
    for selector, found in {
        "tier=back": "ac", "tier!=back": "b", "tier in (front,middle)": "b", "old": "a",
        "!old": "bc", "tier=back,!old": "c",
    }.items():  # fmt: skip
        assert names(kubectl, "svc", "-l", selector) == [f"service/{name}" for name in found]
    assert names(kubectl, "svc", "--field-selector", "spec.clusterIP=None") == ["service/a"]
    assert names(kubectl, "svc", "--field-selector", "metadata.name!=a") == [
        "service/b", "service/c",
    ]  # fmt: skip
    assert "field label not supported" in kubectl.refused(
        "get", "svc", "--field-selector", "spec.colour=red"
    )
    by_tier = kubectl("get", "svc", "--sort-by={.metadata.labels.tier}", "--no-headers")
    assert by_tier.split()[-6] == "b"
    everywhere = rows(admin("get", "svc", "-A", "-l", "tier"))
    assert everywhere[0][:2] == ["NAMESPACE", "NAME"]
    assert [kubectl.namespace, "a"] in [row[:2] for row in everywhere]
    paged = kubectl("get", "svc", "--chunk-size=1", "--no-headers")
    assert [line.split()[0] for line in paged.splitlines()] == ["a", "b", "c"]


def test_get_of_what_is_not_there(kubectl: Kubectl) -> None:
    assert kubectl.refused("get", "svc", "web") == (
        'Error from server (NotFound): services "web" not found\n'
    )
    assert "the server doesn't have a resource type" in kubectl.refused("get", "widgets")
    done = kubectl.run("get", "svc")
    assert done.stderr == f"No resources found in {kubectl.namespace} namespace.\n"
    assert kubectl("get", "svc", "web", "--ignore-not-found") == ""


@contextlib.contextmanager
def watching(kubectl: Kubectl, *words: str) -> Iterator[Callable[[], str]]:
    """A `kubectl get -w` that runs meanwhile; gives what reads its next line."""
    with subprocess.Popen(
        kubectl.command(words), stdout=subprocess.PIPE, text=True, env=kubectl.environment
    ) as process:
        assert process.stdout is not None
        stream = process.stdout
        try:
            yield lambda: stream.readline().rstrip("\n")
        finally:
            process.kill()


def test_get_goes_on_watching(kubectl: Kubectl) -> None:
    kubectl("create", "secret", "generic", "key", "--from-literal=a=1")
    path = "jsonpath={.data}{'\\n'}"
    with (
        watching(kubectl, "get", "secrets", "-w", "--output-watch-events") as line,
        watching(kubectl, "get", "secret", "key", "-w", "-o", path) as data,
    ):
        assert line().split() == ["EVENT", "NAME", "TYPE", "DATA", "AGE"]
        assert line().split()[:4] == ["ADDED", "key", "Opaque", "1"]
        assert data() == '{"a":"MQ=="}'
        kubectl("patch", "secret", "key", "-p", '{"data":{"b":"Mg=="}}')
        assert line().split()[:4] == ["MODIFIED", "key", "Opaque", "2"]
        assert data() == '{"a":"MQ==","b":"Mg=="}'
        kubectl("delete", "secret", "key")
        assert line().split()[:4] == ["DELETED", "key", "Opaque", "2"]
        kubectl("create", "secret", "generic", "later")
        assert line().split()[:4] == ["ADDED", "later", "Opaque", "0"]


def test_a_watch_ends_when_it_was_asked_to(kubectl: Kubectl) -> None:
    kubectl("create", "secret", "generic", "key")
    done = kubectl.run("get", "secrets", "-w", "--request-timeout=1s")
    assert [row[:3] for row in rows(done.stdout)] == [
        ["NAME", "TYPE", "DATA"],
        ["key", "Opaque", "0"],
    ]


def test_get_all(kubectl: Kubectl) -> None:
    kubectl("create", "deployment", "web", "--image=nginx", "--port=80")
    kubectl("expose", "deployment", "web")
    kubectl("rollout", "status", "deployment/web", WAIT)
    found = [name.partition("/")[0] for name in names(kubectl, "all")]
    assert found == ["pod", "service", "deployment.apps", "replicaset.apps"]


# --- describe -----------------------------------------------------------------------------------


def described(text: str) -> dict[str, str]:
    """The fields that `kubectl describe` shows at the first level."""
    found = (re.match(r"([A-Z][^:]*):\s*(.*)$", line) for line in text.splitlines())
    return {match[1]: match[2] for match in found if match}


def test_describe_a_service_with_its_endpoints(kubectl: Kubectl) -> None:
    kubectl("apply", "-f", "-", text=manifest(deployment(), service()))
    kubectl("rollout", "status", "deployment/web", WAIT)
    kubectl("wait", "endpointslice", "-l", "kubernetes.io/service-name=web", WAIT,
            "--for=jsonpath={.endpoints[1].conditions.ready}=true")  # fmt: skip
    found = described(kubectl("describe", "service", "web"))
    spec = read(kubectl, "service", "web")["spec"]
    assert found["Name"] == "web"
    assert found["Selector"] == "app=web"
    assert found["Type"] == "ClusterIP"
    assert found["IP"] == spec["clusterIP"]
    assert found["Port"].split() == ["http", "80/TCP"]
    assert found["TargetPort"] == "8080/TCP"
    pods = read(kubectl, "pods")["items"]
    addresses = {f"{one['status']['podIP']}:8080" for one in pods}
    assert set(found["Endpoints"].split(",")) == addresses
    assert found["Session Affinity"] == "None"


def test_describe_a_pod_a_node_and_a_namespace(kubectl: Kubectl, admin: Kubectl) -> None:
    kubectl("run", "web", "--image=nginx:1", "--port=80", "--labels=app=web")
    kubectl("wait", "pod/web", "--for=condition=Ready", WAIT)
    text = kubectl("describe", "pod", "web")
    found = described(text)
    assert found["Status"] == "Running"
    assert found["Labels"] == "app=web"
    assert found["IP"] == read(kubectl, "pod", "web")["status"]["podIP"]
    assert re.search(r"Image: +nginx:1", text)
    assert re.search(r"Ready +True", text)
    node = found["Node"].partition("/")[0]
    text = admin("describe", "node", node)
    assert described(text)["Name"] == node
    assert re.search(r"Ready +True", text)
    assert re.search(rf"{kubectl.namespace} +web ", text)
    assert described(admin("describe", "namespace", kubectl.namespace))["Status"] == "Active"


def test_describe_a_deployment(kubectl: Kubectl) -> None:
    kubectl("create", "deployment", "web", "--image=nginx:1", "--replicas=2")
    kubectl("rollout", "status", "deployment/web", WAIT)
    text = kubectl("describe", "deployment", "web")
    found = described(text)
    assert found["Replicas"] == (
        "2 desired | 2 updated | 2 total | 2 available | 0 unavailable"
    )  # fmt: skip
    assert found["StrategyType"] == "RollingUpdate"
    assert re.search(r"Available +True +MinimumReplicasAvailable", text)
    assert re.search(r"NewReplicaSet: +web-\w+ \(2/2 replicas created\)", text)
    assert re.search(r"ScalingReplicaSet .* Scaled up replica set web-\w+ from 0 to 2", text)


def test_describe_other_kinds(kubectl: Kubectl) -> None:
    kubectl("create", "configmap", "settings", "--from-literal=colour=red")
    assert "colour:\n----\nred" in kubectl("describe", "configmap", "settings")
    kubectl("create", "secret", "generic", "key", "--from-literal=password=12345")
    text = kubectl("describe", "secret", "key")
    assert "password:  5 bytes" in text
    assert "12345" not in text
    kubectl("create", "serviceaccount", "robot")
    assert described(kubectl("describe", "sa", "robot"))["Name"] == "robot"


# --- label, annotate, patch, edit ---------------------------------------------------------------


def test_label_and_annotate(kubectl: Kubectl) -> None:
    kubectl("apply", "-f", "-", text=manifest(service("a"), service("b")))
    assert kubectl("label", "svc", "a", "tier=front") == "service/a labeled\n"
    complaint = kubectl.refused("label", "svc", "a", "tier=back")
    assert "'tier' already has a value (front), and --overwrite is false" in complaint
    kubectl("label", "--overwrite", "svc", "--all", "tier=back")
    assert set(kubectl("label", "svc", "a", "--list").split()) == {"app=a", "tier=back"}
    assert kubectl("label", "svc", "-l", "app=a", "tier-") == "service/a unlabeled\n"
    assert names(kubectl, "svc", "-l", "tier") == ["service/b"]
    assert kubectl("annotate", "svc", "a", "note=one two") == "service/a annotated\n"
    assert read(kubectl, "svc", "a")["metadata"]["annotations"]["note"] == "one two"
    kubectl("annotate", "svc", "a", "note-")
    assert "note" not in read(kubectl, "svc", "a")["metadata"]["annotations"]


PATCHES = [
    ("strategic", {"spec": {"ports": [{"port": 53, "name": "dns"}]}}, [53, 80]),
    ("merge", {"spec": {"ports": [{"port": 53, "name": "dns"}]}}, [53]),
    (
        "json",
        [
            {"op": "test", "path": "/spec/ports/0/port", "value": 80},
            {"op": "add", "path": "/spec/ports/-", "value": {"port": 53, "name": "dns"}},
        ],
        [53, 80],
    ),
]


@pytest.mark.parametrize(("kind", "patch", "ports"), PATCHES, ids=[one[0] for one in PATCHES])
def test_patch_in_three_ways(kubectl: Kubectl, kind: str, patch: Any, ports: list[int]) -> None:
    kubectl("apply", "-f", "-", text=manifest(service()))
    words = ("patch", "service", "web", f"--type={kind}", "-p", json.dumps(patch))
    assert kubectl(*words) == "service/web patched\n"
    found = read(kubectl, "service", "web")["spec"]["ports"]
    assert sorted(port["port"] for port in found) == ports


def test_patches_that_do_not_fit(kubectl: Kubectl) -> None:
    kubectl("apply", "-f", "-", text=manifest(service()))
    words = ("patch", "service", "web", "--type=json", "-p")
    test = [{"op": "test", "path": "/spec/type", "value": "NodePort"}]
    complaint = kubectl.refused(*words, json.dumps(test))
    assert complaint.startswith("The request is invalid")
    assert "<class" not in complaint
    assert kubectl("patch", "service", "web", "-p", "{}") == "service/web patched (no change)\n"
    complaint = kubectl.refused("patch", "svc", "web", "-p", '{"spec":{"clusterIP":"10.96.9.9"}}')
    assert complaint.startswith('The Service "web" is invalid: spec.clusterIPs[0]: Invalid value')
    assert "may not change once set" in complaint


def test_patch_of_a_status(kubectl: Kubectl) -> None:
    # Another class than ours: nobody else says which address it has.
    balanced = service(type="LoadBalancer", loadBalancerClass="example.org/lb")
    kubectl("apply", "-f", "-", text=manifest(balanced))
    assert rows(kubectl("get", "svc", "web"))[1][3] == "<pending>"
    entry = {"status": {"loadBalancer": {"ingress": [{"hostname": "lb.example.org"}]}}}
    kubectl("patch", "svc", "web", "--subresource=status", "--type=merge", "-p", json.dumps(entry))
    (_, row) = rows(kubectl("get", "svc", "web"))
    assert row[3] == "lb.example.org"


def test_edit(kubectl: Kubectl) -> None:
    kubectl("apply", "-f", "-", text=manifest(service()))
    edited = kubectl("edit", "service", "web", KUBE_EDITOR="sed -i s/8080/9090/")
    assert edited == "service/web edited\n"
    assert read(kubectl, "service", "web")["spec"]["ports"][0]["targetPort"] == 9090
    same = kubectl.run("edit", "service", "web", KUBE_EDITOR="true")
    assert "Edit cancelled, no changes made." in same.stdout + same.stderr


def test_replace(kubectl: Kubectl) -> None:
    kubectl("create", "-f", "-", text=manifest(service()))
    old = read(kubectl, "service", "web")
    new = json.loads(json.dumps(old))
    new["spec"]["selector"] = {"app": "other"}
    words = ("replace", "-f", "-")
    assert kubectl(*words, text=json.dumps(new)) == "service/web replaced\n"
    complaint = kubectl.refused(*words, text=json.dumps(old))
    assert "the object has been modified; please apply your changes to the latest" in complaint
    forced = kubectl("replace", "--force", "-f", "-", text=manifest(service()))
    assert "service/web replaced" in forced
    assert read(kubectl, "service", "web")["metadata"]["uid"] != old["metadata"]["uid"]
    assert "NotFound" in kubectl.refused(*words, text=manifest(service("other")))


def test_set(kubectl: Kubectl) -> None:
    kubectl("apply", "-f", "-", text=manifest(deployment(), service()))
    assert kubectl("set", "image", "deployment/web", "web=nginx:2") == (
        "deployment.apps/web image updated\n"
    )
    kubectl("set", "env", "deployment/web", "COLOUR=red")
    kubectl("set", "resources", "deployment/web", "--limits=cpu=200m,memory=64Mi")
    (container,) = read(kubectl, "deployment", "web")["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "nginx:2"
    assert container["env"] == [{"name": "COLOUR", "value": "red"}]
    assert container["resources"]["limits"] == {"cpu": "200m", "memory": "64Mi"}
    kubectl("set", "selector", "service", "web", "app=other")
    assert read(kubectl, "service", "web")["spec"]["selector"] == {"app": "other"}
    kubectl("set", "serviceaccount", "deployment", "web", "robot")
    spec = read(kubectl, "deployment", "web")["spec"]["template"]["spec"]
    assert spec["serviceAccountName"] == "robot"


# --- create, run, expose ------------------------------------------------------------------------


def test_create_services_of_every_type(kubectl: Kubectl) -> None:
    for words in (
        "clusterip a --tcp=80:8080 --tcp=443:8443",
        "clusterip b --clusterip=None",
        "nodeport c --tcp=80:8080 --node-port=31234",
        "loadbalancer d --tcp=80",
        "externalname e --external-name=db.example.org",
    ):
        made = kubectl("create", "service", *words.split())
        assert made == f"service/{words.split()[1]} created\n"
    found = {row[0]: row[1:5] for row in rows(kubectl("get", "svc"))[1:]}
    assert [found["a"][0], found["a"][2], found["a"][3]] == [
        "ClusterIP",
        "<none>",
        "80/TCP,443/TCP",
    ]
    assert found["b"] == ["ClusterIP", "None", "<none>", "<none>"]
    assert [found["c"][0], found["c"][3]] == ["NodePort", "80:31234/TCP"]
    assert found["d"][0] == "LoadBalancer"
    assert re.fullmatch(r"80:3\d{4}/TCP", found["d"][3])
    assert found["e"] == ["ExternalName", "<none>", "db.example.org", "<none>"]
    complaint = kubectl.refused("create", "service", "clusterip", "a", "--tcp=80")
    assert complaint.endswith('services "a" already exists\n')
    taken = kubectl.refused("create", "service", "nodeport", "f", "--tcp=80", "--node-port=31234")
    assert "provided port is already allocated" in taken
    low = kubectl.refused("create", "service", "nodeport", "f", "--tcp=80", "--node-port=80")
    assert "provided port is not in the valid range" in low


def test_create_other_kinds(kubectl: Kubectl, tmp_path: Path) -> None:
    (tmp_path / "motd").write_bytes(b"hello\n")
    (tmp_path / "raw").write_bytes(b"\xff\x00")
    kubectl("create", "configmap", "settings", "--from-literal=a=1", f"--from-file={tmp_path}")
    found = read(kubectl, "configmap", "settings")
    assert found["data"] == {"a": "1", "motd": "hello\n"}
    assert found["binaryData"] == {"raw": base64.b64encode(b"\xff\x00").decode()}
    kubectl("create", "secret", "generic", "key", "--from-literal=password=12345")
    found = read(kubectl, "secret", "key")
    assert base64.b64decode(found["data"]["password"]) == b"12345"
    assert found["type"] == "Opaque"
    assert kubectl("create", "serviceaccount", "robot") == "serviceaccount/robot created\n"
    made = kubectl("create", "deployment", "web", "--image=nginx", "--replicas=3")
    assert made == "deployment.apps/web created\n"
    assert read(kubectl, "deployment", "web")["spec"]["replicas"] == 3


def test_run_and_expose(kubectl: Kubectl) -> None:
    made = kubectl("run", "web", "--image=nginx", "--port=80", "--expose")
    assert set(made.splitlines()) == {"service/web created", "pod/web created"}
    kubectl("wait", "pod/web", "--for=condition=Ready", WAIT)
    kubectl("expose", "pod", "web", "--name=other", "--port=8080", "--target-port=80")
    kubectl("create", "deployment", "app", "--image=nginx", "--port=5000")
    assert kubectl("expose", "deployment", "app", "--type=NodePort") == "service/app exposed\n"
    found = read(kubectl, "service", "app")["spec"]
    assert found["type"] == "NodePort"
    assert found["selector"] == {"app": "app"}
    assert found["ports"][0]["port"] == 5000
    assert read(kubectl, "service", "other")["spec"]["selector"] == {"run": "web"}


def test_what_a_service_may_not_be(kubectl: Kubectl) -> None:
    text = manifest(service("Web", ports=[{"port": 0}, {"port": 80}]))
    complaint = kubectl.refused("create", "-f", "-", text=text)
    assert complaint.startswith('The Service "Web" is invalid:')
    assert "metadata.name: Invalid value" in complaint
    assert "spec.ports[0].name: Required value" in complaint
    assert "spec.ports[0].port: Invalid value: 0: must be between 1 and 65535" in complaint


def test_nothing_is_made_in_a_namespace_that_is_not_there(admin: Kubectl) -> None:
    complaint = admin.refused("-n", "nowhere", "create", "configmap", "a")
    assert 'namespaces "nowhere" not found' in complaint


# --- scale, rollout, wait -----------------------------------------------------------------------


def test_scale(kubectl: Kubectl) -> None:
    kubectl("apply", "-f", "-", text=manifest(deployment()))
    kubectl("rollout", "status", "deployment/web", WAIT)
    assert kubectl("scale", "deployment/web", "--replicas=4") == "deployment.apps/web scaled\n"
    kubectl("wait", "deployment/web", "--for=jsonpath={.status.readyReplicas}=4", WAIT)
    assert len(names(kubectl, "pods", "-l", "app=web")) == 4
    complaint = kubectl.refused("scale", "deploy/web", "--current-replicas=9", "--replicas=1")
    assert "Expected replicas to be 9, was 4" in complaint
    by_scale = kubectl("get", "deployment", "web", "--subresource=scale")
    assert [row[:3] for row in rows(by_scale)] == [
        ["NAME", "DESIRED", "AVAILABLE"],
        ["web", "4", "4"],
    ]
    (replica_set,) = names(kubectl, "rs")
    assert kubectl("get", replica_set, "-o", "jsonpath={.spec.replicas}") == "4"
    kubectl("scale", "deployment/web", "--replicas=0")
    kubectl("wait", "pods", "-l", "app=web", "--for=delete", WAIT)
    assert names(kubectl, "pods") == []


def test_a_rollout_and_back(kubectl: Kubectl) -> None:
    kubectl("apply", "-f", "-", text=manifest(deployment()))
    done = kubectl("rollout", "status", "deployment/web", WAIT)
    assert done.endswith('deployment "web" successfully rolled out\n')
    kubectl("set", "image", "deployment/web", "web=nginx:2")
    kubectl("annotate", "deployment/web", "kubernetes.io/change-cause=second")
    kubectl("rollout", "status", "deployment/web", WAIT)
    history = rows(kubectl("rollout", "history", "deployment/web"))
    assert [row[0] for row in history[2:] if row[0].isdigit()] == ["1", "2"]
    assert "nginx:2" in kubectl("rollout", "history", "deployment/web", "--revision=2")
    images = "jsonpath={.items[*].spec.containers[*].image}"
    assert kubectl("get", "pods", "-o", images) == "nginx:2 nginx:2"
    assert kubectl("rollout", "undo", "deployment/web") == "deployment.apps/web rolled back\n"
    kubectl("rollout", "status", "deployment/web", WAIT)
    assert kubectl("get", "pods", "-o", images) == "nginx:1 nginx:1"
    before = set(names(kubectl, "pods"))
    assert kubectl("rollout", "restart", "deployment/web") == "deployment.apps/web restarted\n"
    kubectl("rollout", "status", "deployment/web", WAIT)
    assert before.isdisjoint(names(kubectl, "pods"))
    assert kubectl("rollout", "pause", "deployment/web") == "deployment.apps/web paused\n"
    assert kubectl("rollout", "resume", "deployment/web") == "deployment.apps/web resumed\n"


def test_a_stateful_set(kubectl: Kubectl) -> None:
    obj = deployment()
    obj["kind"] = "StatefulSet"
    obj["spec"]["serviceName"] = "web"
    kubectl("apply", "-f", "-", text=manifest(service(clusterIP="None"), obj))
    kubectl("rollout", "status", "statefulset/web", WAIT)
    assert names(kubectl, "pods") == ["pod/web-0", "pod/web-1"]
    kubectl("scale", "statefulset/web", "--replicas=1")
    kubectl("wait", "pod/web-1", "--for=delete", WAIT)
    assert rows(kubectl("get", "sts"))[1][:2] == ["web", "1/1"]


def test_wait(kubectl: Kubectl) -> None:
    kubectl("apply", "-f", "-", text=manifest(deployment()))
    met = kubectl("wait", "deployment/web", "--for=condition=Available", WAIT)
    assert met == "deployment.apps/web condition met\n"
    kubectl("wait", "pods", "-l", "app=web", "--for=condition=Ready", WAIT)
    kubectl("wait", "deployment/web", "--for=jsonpath={.status.replicas}=2", WAIT)
    never = kubectl.refused("wait", "deployment/web", "--for=condition=Failed", "--timeout=1s")
    assert "timed out waiting for the condition on deployments/web" in never
    kubectl("create", "configmap", "settings")
    kubectl("wait", "configmap/settings", "--for=create", WAIT)
    with subprocess.Popen(
        kubectl.command(["wait", "configmap/settings", "--for=delete", WAIT]),
        stdout=subprocess.PIPE, text=True, env=kubectl.environment,
    ) as process:  # fmt: skip
        kubectl("delete", "configmap", "settings")
        out, _ = process.communicate(timeout=25)
        assert process.returncode == 0
        assert out in ("configmap/settings condition met\n", "")  # "": it was gone before


# --- delete -------------------------------------------------------------------------------------


def test_delete(kubectl: Kubectl) -> None:
    kubectl("apply", "-f", "-", text=manifest(*(service(name) for name in "abcdef")))
    kubectl("label", "svc", "b", "c", "go=now")
    deleted = kubectl("delete", "service", "a")
    assert deleted.startswith('service "a" deleted')
    kubectl("delete", "svc", "-l", "go=now")
    assert names(kubectl, "svc") == ["service/d", "service/e", "service/f"]
    kubectl("delete", "-f", "-", text=manifest(service("d")))
    kubectl("delete", "svc", "e", "--dry-run=server")
    assert names(kubectl, "svc") == ["service/e", "service/f"]
    kubectl("delete", "svc", "--all")
    assert names(kubectl, "svc") == []
    assert "NotFound" in kubectl.refused("delete", "svc", "a")
    assert kubectl("delete", "svc", "a", "--ignore-not-found") == ""


def test_delete_a_pod_with_and_without_grace(kubectl: Kubectl) -> None:
    kubectl("apply", "-f", "-", text=manifest(pod("a"), pod("b"), pod("c")))
    kubectl("wait", "pods", "--all", "--for=condition=Ready", WAIT)
    kubectl("delete", "pod", "a", "--grace-period=0", "--force")
    kubectl("delete", "pod", "b", "--now")
    kubectl("delete", "pod", "c")
    assert names(kubectl, "pods") == []


@pytest.mark.parametrize("cascade", ["background", "foreground", "orphan"])
def test_delete_and_what_belongs_to_it(kubectl: Kubectl, cascade: str) -> None:
    kubectl("apply", "-f", "-", text=manifest(deployment()))
    kubectl("rollout", "status", "deployment/web", WAIT)
    kubectl("delete", "deployment", "web", f"--cascade={cascade}")
    assert names(kubectl, "deployments") == []
    if cascade == "orphan":
        assert len(names(kubectl, "rs")) == 1
        assert len(names(kubectl, "pods")) == 2
    else:
        kubectl("wait", "pods", "-l", "app=web", "--for=delete", WAIT)
        assert names(kubectl, "rs,pods") == []


def test_a_finalizer_holds_an_object(kubectl: Kubectl) -> None:
    obj = config_map("kept")
    obj["metadata"]["finalizers"] = ["example.org/hold"]
    kubectl("create", "-f", "-", text=manifest(obj))
    kubectl("delete", "cm", "kept", "--wait=false")
    assert read(kubectl, "cm", "kept")["metadata"]["deletionTimestamp"]
    kubectl("patch", "cm", "kept", "--type=merge", "-p", '{"metadata":{"finalizers":null}}')
    assert names(kubectl, "cm", "-l", "!kdns") == names(kubectl, "cm")
    assert "configmap/kept" not in names(kubectl, "cm")


def test_delete_a_namespace_with_all_that_is_in_it(kubectl: Kubectl, admin: Kubectl) -> None:
    kubectl("apply", "-f", "-", text=manifest(deployment(), service(), config_map("settings")))
    kubectl("rollout", "status", "deployment/web", WAIT)
    deleted = admin("delete", "namespace", kubectl.namespace)
    assert deleted.startswith(f'namespace "{kubectl.namespace}" deleted')
    for kinds in ("svc,pods,cm,ep,endpointslices,secrets,sa", "deploy,rs,sts,events,leases"):
        assert names(kubectl, kinds) == []
    assert "NotFound" in admin.refused("get", "namespace", kubectl.namespace)


@pytest.mark.parametrize("name", ["default", "kube-system", "kube-public"])
def test_namespaces_of_the_cluster_itself_stay(admin: Kubectl, name: str) -> None:
    assert admin.refused("delete", "namespace", name, "--dry-run=server") == (
        f'Error from server (Forbidden): namespaces "{name}" is forbidden: this namespace may not'
        " be deleted\n"
    )


# --- what the server says of itself -------------------------------------------------------------


def test_explain(admin: Kubectl) -> None:
    text = admin("explain", "service.spec.ports")
    assert re.search(r"KIND: +Service", text)
    assert re.search(r"FIELD: ports <\[\]ServicePort>", text)
    assert re.search(r"targetPort\s+<", text)
    assert "clusterIP" in admin("explain", "service", "--recursive")
    for kind in ("pods", "deployments.spec.template", "endpointslices", "nodes.status", "leases"):
        assert "FIELDS:" in admin("explain", kind)
    assert "does not exist" in admin.refused("explain", "service.spec.colour")


def test_what_resources_and_versions_there_are(admin: Kubectl) -> None:
    found = {row[0]: row for row in rows(admin("api-resources"))[1:]}
    assert found["services"][1:] == ["svc", "v1", "true", "Service"]
    assert found["namespaces"][1:] == ["ns", "v1", "false", "Namespace"]
    assert found["deployments"][1:] == ["deploy", "apps/v1", "true", "Deployment"]
    assert found["endpointslices"][1:] == ["discovery.k8s.io/v1", "true", "EndpointSlice"]
    verbs = admin("api-resources", "--verbs=list,watch,create", "--namespaced=false", "-o", "name")
    assert set(verbs.split()) >= {"namespaces", "nodes"}
    assert {"v1", "apps/v1", "discovery.k8s.io/v1"} <= set(admin("api-versions").split())


@pytest.mark.parametrize("path", all_kubectls())
def test_any_kubectl_that_is_here(kubectl: Kubectl, path: str) -> None:
    other = kubectl.other(path)
    assert other("apply", "-f", "-", text=manifest(service())) == "service/web created\n"
    again = manifest(service(selector={"app": "other"}))
    assert other("apply", "-f", "-", text=again) == "service/web configured\n"
    other("apply", "--server-side", "--force-conflicts", "-f", "-", text=manifest(service()))
    other("create", "service", "clusterip", "other", "--tcp=80")
    assert [row[0] for row in rows(other("get", "svc"))] == ["NAME", "other", "web"]
    assert described(other("describe", "svc", "web"))["Selector"] == "app=web"
    assert other("delete", "svc", "--all").count("deleted") == 2


def test_versions_and_health(admin: Kubectl) -> None:
    found = json.loads(admin("version", "-o", "json"))
    assert found["serverVersion"]["major"] == "1"
    assert re.match(r"v1\.\d+\.\d+", found["serverVersion"]["gitVersion"])
    assert "Kubernetes control plane" in admin("cluster-info")
    for path in ("/healthz", "/livez", "/readyz"):
        assert admin("get", "--raw", path) == "ok"
    assert "check passed" in admin("get", "--raw", "/readyz?verbose")


def test_auth(kubectl: Kubectl) -> None:
    assert kubectl("auth", "can-i", "create", "services") == "yes\n"
    assert kubectl("auth", "can-i", "--list")
    assert "kdns" in kubectl("auth", "whoami")


def test_events(kubectl: Kubectl) -> None:
    kubectl("create", "deployment", "web", "--image=nginx")
    kubectl("rollout", "status", "deployment/web", WAIT)
    head, *found = rows(kubectl("events", "--for=deployment/web"))
    assert head == ["LAST SEEN", "TYPE", "REASON", "OBJECT", "MESSAGE"]
    assert found[0][1:4] == ["Normal", "ScalingReplicaSet", "Deployment/web"]
    by_kind = kubectl("get", "events", "--field-selector", "involvedObject.kind=Deployment")
    assert rows(by_kind)[1][1:4] == ["Normal", "ScalingReplicaSet", "deployment/web"]
    assert kubectl("events", "--types=Warning") == ""


def test_what_is_there_from_the_start(admin: Kubectl) -> None:
    assert set(names(admin, "namespaces")) >= {
        "namespace/default", "namespace/kube-node-lease", "namespace/kube-public",
        "namespace/kube-system",
    }  # fmt: skip
    kubernetes = read(admin, "service", "kubernetes", "-n", "default")["spec"]
    assert kubernetes["clusterIP"] == "10.96.0.1"
    assert [port["port"] for port in kubernetes["ports"]] == [443]
    dns = read(admin, "service", "kube-dns", "-n", "kube-system")["spec"]
    assert {(port["port"], port["protocol"]) for port in dns["ports"]} >= {
        (53, "UDP"), (53, "TCP"),
    }  # fmt: skip
    assert rows(admin("get", "nodes"))[1][1] == "Ready"


# --- nodes --------------------------------------------------------------------------------------


def test_cordon_taint_and_drain(kubectl: Kubectl, admin: Kubectl) -> None:
    kubectl("run", "web", "--image=nginx")
    kubectl("wait", "pod/web", "--for=condition=Ready", WAIT)
    node = read(kubectl, "pod", "web")["spec"]["nodeName"]
    try:
        assert admin("cordon", node) == f"node/{node} cordoned\n"
        assert rows(admin("get", "node", node))[1][1] == "Ready,SchedulingDisabled"
        selector = ("--pod-selector=run=web", "--force", "--ignore-daemonsets")
        admin("drain", node, *selector, "--timeout=20s")
        assert names(kubectl, "pods") == []
        admin("taint", "node", node, "example.org/no=way:NoSchedule")
        assert read(admin, "node", node)["spec"]["taints"][-1]["key"] == "example.org/no"
        admin("taint", "node", node, "example.org/no-")
    finally:
        admin("uncordon", node)
    assert rows(admin("get", "node", node))[1][1] == "Ready"


# --- what there is not --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ("logs", "web"),
        ("logs", "-f", "web", "--pod-running-timeout=1s"),
        ("exec", "web", "--", "ls"),
        ("attach", "web"),
        ("port-forward", "pod/web", "0:80"),
        ("cp", "web:/etc/hosts", "hosts"),
    ],
    ids=lambda words: words[0] + ("-f" if "-f" in words else ""),
)
def test_a_pod_runs_no_container(kubectl: Kubectl, words: tuple[str, ...]) -> None:
    kubectl("run", "web", "--image=nginx")
    kubectl("wait", "pod/web", "--for=condition=Ready", WAIT)
    if words[0] == "port-forward":
        # It listens first and asks the server when somebody comes.
        words = ("port-forward", "pod/web", f"{free_port()}:80")
        with subprocess.Popen(
            kubectl.command(words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=kubectl.environment,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            assert process.stderr is not None
            try:
                forwarding = process.stdout.readline()
                if match := re.match(r"Forwarding from 127.0.0.1:(\d+)", forwarding):
                    with contextlib.suppress(OSError):
                        socket.create_connection(("127.0.0.1", int(match[1])), 5).close()
                complaint = process.stderr.readline()
            finally:
                process.kill()
    else:
        complaint = kubectl.refused(*words)
    assert "kdns" in complaint
    assert "runs no container" in complaint


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def test_there_are_no_metrics(kubectl: Kubectl) -> None:
    assert "Metrics API not available" in kubectl.refused("top", "pods")
    assert "Metrics API not available" in kubectl.refused("top", "nodes")


def test_where_service_addresses_come_from(admin: Kubectl) -> None:
    head, row = admin("get", "servicecidr").splitlines()
    assert head.split() == ["NAME", "CIDRS", "AGE"]
    assert row.split()[:2] == ["kubernetes", "10.96.0.0/12"]
    assert admin.refused("patch", "servicecidr", "kubernetes", "--type=merge", "-p",
                         '{"spec":{"cidrs":["10.97.0.0/16"]}}') == (
        'The ServiceCIDR "kubernetes" is invalid: spec.cidrs[0]: Invalid value: "10.97.0.0/16":'
        " field is immutable\n"
    )  # fmt: skip
