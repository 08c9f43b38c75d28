"""The image and the cluster manifests keep what the stock CoreDNS Deployment relies on.

STOCK is what kubeadm 1.36 installs, written down here by hand; `deploy/` may add to it, but
changes nothing of it except the image.
"""

from __future__ import annotations

import re
import shlex
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

import kdns

PROJECT = Path(__file__).resolve().parent.parent
DEPLOY = PROJECT / "deploy"


def load(path: Path) -> list[dict[str, Any]]:
    return [x for x in yaml.safe_load_all(path.read_text()) if x is not None]


OBJECTS = {
    (x["kind"], x["metadata"]["name"]): x
    for path in sorted(DEPLOY.glob("*.yaml"))
    for x in load(path)
    if "metadata" in x
}

STOCK_CONTAINER: dict[str, Any] = {
    "name": "coredns",
    "args": ["-conf", "/etc/coredns/Corefile"],
    "resources": {"limits": {"memory": "170Mi"}, "requests": {"cpu": "100m", "memory": "70Mi"}},
    "volumeMounts": [{"name": "config-volume", "mountPath": "/etc/coredns", "readOnly": True}],
    "ports": [
        {"name": "dns", "containerPort": 53, "protocol": "UDP"},
        {"name": "dns-tcp", "containerPort": 53, "protocol": "TCP"},
        {"name": "metrics", "containerPort": 9153, "protocol": "TCP"},
        {"name": "liveness-probe", "containerPort": 8080, "protocol": "TCP"},
        {"name": "readiness-probe", "containerPort": 8181, "protocol": "TCP"},
    ],
    "livenessProbe": {
        "httpGet": {"path": "/health", "port": "liveness-probe", "scheme": "HTTP"},
        "initialDelaySeconds": 60,
        "timeoutSeconds": 5,
        "successThreshold": 1,
        "failureThreshold": 5,
    },
    "readinessProbe": {
        "httpGet": {"path": "/ready", "port": "readiness-probe", "scheme": "HTTP"}
    },
    "securityContext": {
        "allowPrivilegeEscalation": False,
        "capabilities": {"add": ["NET_BIND_SERVICE"], "drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    },
}  # fmt: skip


def test_kustomize_knows_every_file() -> None:
    (kustomization,) = load(DEPLOY / "kustomization.yaml")
    files = {path.name for path in DEPLOY.glob("*.yaml")} - {"kustomization.yaml"}
    assert set(kustomization["resources"]) == files


def test_every_object_is_where_coredns_has_it() -> None:
    cluster_wide = ("ClusterRole", "ClusterRoleBinding")
    for (kind, name), x in OBJECTS.items():
        expected = None if kind in cluster_wide else "kube-system"
        assert x["metadata"].get("namespace") == expected, (kind, name)
    assert set(OBJECTS) == {
        ("ServiceAccount", "coredns"),
        ("ClusterRole", "system:coredns"),
        ("ClusterRoleBinding", "system:coredns"),
        ("ConfigMap", "coredns"),
        ("Deployment", "coredns"),
        ("Service", "kube-dns"),
    }


def test_container_differs_from_the_stock_one_by_its_image_alone() -> None:
    pod = OBJECTS["Deployment", "coredns"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container.pop("image") == "kdns"
    assert container.pop("imagePullPolicy") == "IfNotPresent"
    assert container == STOCK_CONTAINER


def test_pod_reads_the_configmap_and_the_nodes_resolv_conf() -> None:
    deployment = OBJECTS["Deployment", "coredns"]["spec"]
    pod = deployment["template"]["spec"]
    assert deployment["selector"]["matchLabels"] == {"k8s-app": "kube-dns"}
    assert deployment["template"]["metadata"]["labels"] == {"k8s-app": "kube-dns"}
    assert pod["dnsPolicy"] == "Default"
    assert pod["serviceAccountName"] == "coredns"
    assert pod["priorityClassName"] == "system-cluster-critical"
    assert pod["volumes"] == [
        {
            "name": "config-volume",
            "configMap": {"name": "coredns", "items": [{"key": "Corefile", "path": "Corefile"}]},
        }
    ]


def test_service_is_kube_dns() -> None:
    service = OBJECTS["Service", "kube-dns"]
    assert service["spec"] == {
        "clusterIP": "10.96.0.10",
        "selector": {"k8s-app": "kube-dns"},
        "ports": [
            {"name": "dns", "port": 53, "protocol": "UDP", "targetPort": 53},
            {"name": "dns-tcp", "port": 53, "protocol": "TCP", "targetPort": 53},
            {"name": "metrics", "port": 9153, "protocol": "TCP", "targetPort": 9153},
        ],
    }
    annotations = service["metadata"]["annotations"]
    assert annotations == {"prometheus.io/port": "9153", "prometheus.io/scrape": "true"}


def test_account_may_list_and_watch_what_the_registry_reads_and_no_more() -> None:
    rules = OBJECTS["ClusterRole", "system:coredns"]["rules"]
    assert {
        (group, resource, verb)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    } == {
        (group, resource, verb)
        for group, resource in [
            ("", "endpoints"),
            ("", "services"),
            ("", "pods"),
            ("", "namespaces"),
            ("discovery.k8s.io", "endpointslices"),
        ]
        for verb in ("list", "watch")
    }
    binding = OBJECTS["ClusterRoleBinding", "system:coredns"]
    assert binding["roleRef"]["name"] == "system:coredns"
    assert binding["subjects"] == [
        {"kind": "ServiceAccount", "name": "coredns", "namespace": "kube-system"}
    ]


def test_corefile_of_the_configmap_is_kubeadms_and_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdns.app import check_corefile

    text = OBJECTS["ConfigMap", "coredns"]["data"]["Corefile"]
    words = [line.split()[0] for line in text.splitlines() if re.match(r" {4}\w", line)]
    assert words == (
        "errors health ready kubernetes prometheus forward cache loop reload loadbalance".split()
    )
    path = tmp_path / "Corefile"
    path.write_text(text)
    assert [str(p) for p in check_corefile(str(path))] == []


# --- the image --------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's (INSTRUCTION, arguments), continued lines joined."""
    text = re.sub(r"^#.*\n", "", (PROJECT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    found = [line.split(maxsplit=1) for line in lines if line.strip()]
    return [(name, rest.strip()) for name, rest in found]


def last_stage() -> list[tuple[str, str]]:
    steps = instructions()
    start = max(i for i, (name, _) in enumerate(steps) if name == "FROM")
    return steps[start:]


def one(name: str) -> str:
    (rest,) = [rest for step, rest in last_stage() if step == name]
    return rest


def test_image_takes_corednss_arguments_as_they_are() -> None:
    assert one("ENTRYPOINT") == '["kdns"]'
    assert not [step for step, _ in last_stage() if step in ("CMD", "HEALTHCHECK")]


def test_image_does_not_run_as_root() -> None:
    user, _, group = one("USER").partition(":")
    assert int(user) > 0
    assert int(group) > 0


def test_image_exposes_the_ports_of_the_container() -> None:
    ports = {
        f"{p['containerPort']}/{p['protocol'].lower()}"
        for p in STOCK_CONTAINER["ports"]
    }  # fmt: skip
    assert set(one("EXPOSE").split()) == ports


def test_image_may_bind_port_53_without_root() -> None:
    build = [rest for step, rest in instructions() if step == "RUN"]
    (setcap,) = [rest for rest in build if "setcap " in rest and "apt-get" not in rest]
    assert setcap == "setcap cap_net_bind_service=+ep /opt/kdns/bin/python"
    # The capability is the interpreter's own: a link would give it to every Python there is.
    assert any("python -m venv --copies /opt/kdns" in rest for rest in build)


def test_what_the_image_copies_is_there_and_not_ignored() -> None:
    ignore = [
        line
        for line in (PROJECT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert ignore[0] == "*"
    wanted = [line.removeprefix("!").rstrip("/") for line in ignore if line.startswith("!")]
    sources = [
        source.rstrip("/")
        for step, rest in instructions()
        if step == "COPY" and "--from" not in rest
        for source in shlex.split(rest)[:-1]
    ]
    assert sorted(sources) == sorted(wanted)
    for source in sources:
        assert (PROJECT / source).exists(), source
        assert any(fnmatch(source, pattern) for pattern in wanted), source


def test_versions_are_one() -> None:
    (kustomization,) = load(DEPLOY / "kustomization.yaml")
    assert kustomization["images"] == [{"name": "kdns", "newTag": kdns.__version__}]
    assert f'image.version="{kdns.__version__}"' in one("LABEL")
    text = (PROJECT / "deploy/kustomization.yaml").read_text()
    assert set(re.findall(r"kdns:([\d.]+)", text)) == {kdns.__version__}
    assert f"kdns:{kdns.__version__}" in (PROJECT / "Dockerfile").read_text()
