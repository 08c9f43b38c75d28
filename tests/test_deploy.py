"""The image and the cluster manifests keep what the stock CoreDNS Deployment relies on, and
what kubeadm's kube-proxy DaemonSet does.

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
PROXY = DEPLOY / "proxy"
# Of deploy/proxy, what is not always applied: kubeadm has written the one, the other is a patch.
OPTIONAL = {"configmap.yaml", "kernel-settings.yaml"}


def load(path: Path) -> list[dict[str, Any]]:
    return [x for x in yaml.safe_load_all(path.read_text()) if x is not None]


def objects(folder: Path, *but: str) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (x["kind"], x["metadata"]["name"]): x
        for path in sorted(folder.glob("*.yaml"))
        if path.name not in but
        for x in load(path)
        if "metadata" in x
    }


OBJECTS = objects(DEPLOY)
PROXY_OBJECTS = objects(PROXY, "kernel-settings.yaml")

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


# --- the proxy --------------------------------------------------------------------------------


def proxy_pod() -> dict[str, Any]:
    found: dict[str, Any] = PROXY_OBJECTS["DaemonSet", "kdns-proxy"]["spec"]["template"]["spec"]
    return found


def proxy_container() -> dict[str, Any]:
    (container,) = proxy_pod()["containers"]
    found: dict[str, Any] = container
    return found


def test_dns_alone_and_the_proxy_alone_can_be_installed() -> None:
    (dns,) = load(DEPLOY / "kustomization.yaml")
    (proxy,) = load(PROXY / "kustomization.yaml")
    files = {path.name for path in PROXY.glob("*.yaml")} - {"kustomization.yaml"}
    assert set(proxy["resources"]) == files - OPTIONAL
    assert not [one for one in dns["resources"] if "proxy" in one]
    assert proxy["images"] == [{"name": "kdns", "newTag": kdns.__version__}]


def test_the_configmap_that_kubeadm_wrote_is_not_overwritten() -> None:
    (kustomization,) = load(PROXY / "kustomization.yaml")
    assert "configmap.yaml" not in kustomization["resources"]
    (volume,) = [v for v in proxy_pod()["volumes"] if "configMap" in v]
    assert volume["configMap"] == {"name": "kube-proxy"}
    assert ("ConfigMap", "kube-proxy") in PROXY_OBJECTS


def test_every_node_gets_a_proxy_whatever_its_state() -> None:
    spec = PROXY_OBJECTS["DaemonSet", "kdns-proxy"]["spec"]
    assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]
    assert spec["updateStrategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxUnavailable": "10%"},
    }
    pod = proxy_pod()
    assert pod["tolerations"] == [{"operator": "Exists"}]
    assert pod["priorityClassName"] == "system-node-critical"
    assert pod["nodeSelector"] == {"kubernetes.io/os": "linux"}


def test_the_proxy_sees_the_nodes_network_and_has_one_capability() -> None:
    pod = proxy_pod()
    assert pod["hostNetwork"] is True
    assert pod["dnsPolicy"] == "Default"
    assert proxy_container()["securityContext"] == {
        "runAsUser": 0,
        "allowPrivilegeEscalation": False,
        "capabilities": {"add": ["NET_ADMIN"], "drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }


def test_the_proxys_mounts_are_there() -> None:
    volumes = {volume["name"]: volume for volume in proxy_pod()["volumes"]}
    mounts = {m["mountPath"]: m for m in proxy_container()["volumeMounts"]}
    assert {m["name"] for m in mounts.values()} == set(volumes)
    assert volumes["xtables-lock"]["hostPath"] == {
        "path": "/run/xtables.lock",
        "type": "FileOrCreate",
    }
    assert "/run/xtables.lock" in mounts


def settled(command: list[str]) -> Any:
    """Return what the container's command line and the ConfigMap make the proxy do."""
    from kdns.proxy.config import parse_config
    from kdns.proxy.flags import parse_flags, settle

    parsed = parse_flags([word.replace("$(NODE_NAME)", "node1") for word in command])
    files = PROXY_OBJECTS["ConfigMap", "kube-proxy"]["data"]
    read = parse_config(files[Path(parsed.config_path).name], parsed.config_path)
    return settle(parsed, read)


def test_the_proxy_understands_its_command_line_and_configmap() -> None:
    program, *flags = proxy_container()["command"]
    assert program == "/usr/local/bin/kube-proxy"
    found = settled(flags)
    assert found.warnings == ()
    config = found.config
    assert config.hostname_override == "node1"
    assert config.mode == "iptables"
    assert config.cluster_cidrs
    files = PROXY_OBJECTS["ConfigMap", "kube-proxy"]["data"]
    (mount,) = [m for m in proxy_container()["volumeMounts"] if m["name"] == "kube-proxy"]
    assert config.client.kubeconfig == f"{mount['mountPath']}/kubeconfig.conf"
    assert "kubeconfig.conf" in files


def test_the_proxy_finds_the_api_without_a_proxy() -> None:
    """A ClusterIP, as every Pod is given for the API, leads nowhere before rules are written."""
    kubeconfig = yaml.safe_load(PROXY_OBJECTS["ConfigMap", "kube-proxy"]["data"]["kubeconfig.conf"])
    (cluster,) = kubeconfig["clusters"]
    assert re.fullmatch(r"https://192\.0\.2\.\d+:6443", cluster["cluster"]["server"])
    (user,) = kubeconfig["users"]
    assert user["user"] == {"tokenFile": "/var/run/secrets/kubernetes.io/serviceaccount/token"}
    (context,) = kubeconfig["contexts"]
    assert kubeconfig["current-context"] == context["name"]
    assert context["context"]["cluster"] == cluster["name"]
    assert context["context"]["user"] == user["name"]


def test_the_proxys_probes_ask_for_what_it_serves() -> None:
    container = proxy_container()
    (port,) = container["ports"]
    assert settled(container["command"][1:]).config.healthz_bind_address == (
        f"0.0.0.0:{port['containerPort']}"
    )
    assert container["livenessProbe"]["httpGet"]["path"] == "/livez"
    assert container["readinessProbe"]["httpGet"]["path"] == "/healthz"
    for probe in ("livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["port"] == port["name"]


def test_the_proxys_account_may_read_what_forwarding_needs_and_no_more() -> None:
    rules = PROXY_OBJECTS["ClusterRole", "kdns-proxy"]["rules"]
    assert {
        (group, resource, verb)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    } == {
        ("", "services", "list"),
        ("", "services", "watch"),
        ("", "nodes", "get"),
        ("", "nodes", "list"),
        ("", "nodes", "watch"),
        ("discovery.k8s.io", "endpointslices", "list"),
        ("discovery.k8s.io", "endpointslices", "watch"),
        ("networking.k8s.io", "servicecidrs", "list"),
        ("networking.k8s.io", "servicecidrs", "watch"),
    }
    binding = PROXY_OBJECTS["ClusterRoleBinding", "kdns-proxy"]
    assert binding["roleRef"]["name"] == "kdns-proxy"
    account = {"kind": "ServiceAccount", "name": "kdns-proxy", "namespace": "kube-system"}
    assert binding["subjects"] == [account]
    assert ("ServiceAccount", "kdns-proxy") in PROXY_OBJECTS
    assert proxy_pod()["serviceAccountName"] == "kdns-proxy"


def test_kernel_settings_patch_adds_an_init_container_and_nothing_else() -> None:
    from kdns.proxy.flags import parse_flags

    (patch,) = load(PROXY / "kernel-settings.yaml")
    daemonset = PROXY_OBJECTS["DaemonSet", "kdns-proxy"]
    assert patch["kind"] == "DaemonSet"
    assert patch["metadata"].items() <= daemonset["metadata"].items()
    spec = patch["spec"]["template"]["spec"]
    assert set(spec) == {"initContainers"}
    (init,) = spec["initContainers"]
    assert init["image"] == proxy_container()["image"]
    assert init["command"][0] == proxy_container()["command"][0]
    assert parse_flags(init["command"][1:]).init_only
    assert init["volumeMounts"][0] in proxy_container()["volumeMounts"]
    # As the comment in kustomization.yaml has it.
    text = (PROXY / "kustomization.yaml").read_text()
    added = re.sub(r"^# (patches:|  - path: )", r"\1", text, flags=re.MULTILINE)
    assert yaml.safe_load(added)["patches"] == [{"path": "kernel-settings.yaml"}]


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


def test_image_has_iptables_of_both_variants_and_nft() -> None:
    (install,) = [r for step, r in last_stage() if step == "RUN" and "apt-get install" in r]
    # Debian's package iptables holds iptables-nft, iptables-legacy and ip6tables of both.
    assert {"iptables", "nftables"} <= set(install.split())


def test_image_is_kube_proxy_where_kubeadms_daemonset_calls_it() -> None:
    runs = [rest for step, rest in last_stage() if step == "RUN"]
    assert "ln -s /opt/kdns/bin/kube-proxy /usr/local/bin/kube-proxy" in runs
    (made,) = [r for step, r in instructions() if step == "RUN" and "kdns proxy" in r]
    # With NET_ADMIN alone the kernel refuses a file that asks for NET_BIND_SERVICE: the proxy's
    # interpreter is made before that is set on the other, and setcap does not name it.
    assert "cp /opt/kdns/bin/python /opt/kdns/bin/python-plain" in made
    assert 'exec /opt/kdns/bin/python-plain -P -m kdns proxy "$@"' in made
    assert not [r for _, r in instructions() if "setcap" in r and "python-plain" in r]


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
    for folder in (DEPLOY, PROXY):
        (one_of_two,) = load(folder / "kustomization.yaml")
        assert one_of_two["images"] == kustomization["images"]
    for path in (DEPLOY / "kustomization.yaml", PROJECT / "docs/PROXY.md"):
        assert set(re.findall(r"kdns:([\d.]+)", path.read_text())) == {kdns.__version__}
    assert f"kdns:{kdns.__version__}" in (PROJECT / "Dockerfile").read_text()
