"""deploy/node: one DaemonSet in the place of CoreDNS, kube-proxy and NodeLocal DNSCache.

What Kubernetes' own schemas say of it, and that its parts agree: command line, ConfigMap,
ports, probes, rights and the Service.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

import kdns
from kdns.agent import read_settings
from kdns.node import Wishes, addresses_for
from kdns.proxy.flags import parse_flags

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
NODE = DEPLOY / "node"


def load(path: Path) -> list[dict[str, Any]]:
    return [x for x in yaml.safe_load_all(path.read_text()) if x is not None]


OBJECTS = {
    (x["kind"], x["metadata"]["name"]): x
    for path in sorted(NODE.glob("*.yaml"))
    if path.name != "kustomization.yaml"
    for x in load(path)
}
SPEC = OBJECTS["DaemonSet", "kdns-node"]["spec"]
POD = SPEC["template"]["spec"]
(CONTAINER,) = POD["containers"]
DATA = OBJECTS["ConfigMap", "kdns-node"]["data"]
PORTS = {port["name"]: port for port in CONTAINER["ports"]}


@pytest.mark.parametrize("name", sorted(OBJECTS), ids="-".join)
def test_kubernetes_takes_every_object(name: tuple[str, str]) -> None:
    kubernetes_validate.validate(OBJECTS[name], kubernetes_validate.latest_version(), strict=True)


def test_kustomize_knows_every_file() -> None:
    (kustomization,) = load(NODE / "kustomization.yaml")
    files = {path.name for path in NODE.glob("*.yaml")} - {"kustomization.yaml"}
    assert set(kustomization["resources"]) == files
    assert kustomization["images"] == [{"name": "kdns", "newTag": kdns.__version__}]


def test_all_of_it_is_in_kube_system() -> None:
    for (kind, name), x in OBJECTS.items():
        wide = kind in ("ClusterRole", "ClusterRoleBinding")
        assert x["metadata"].get("namespace") == (None if wide else "kube-system"), (kind, name)


def test_every_node_gets_one_with_the_nodes_network_and_resolv_conf() -> None:
    labels = SPEC["template"]["metadata"]["labels"]
    assert SPEC["selector"]["matchLabels"].items() <= labels.items()
    assert POD["tolerations"] == [{"operator": "Exists"}]
    assert POD["nodeSelector"] == {"kubernetes.io/os": "linux"}
    assert POD["priorityClassName"] == "system-node-critical"
    assert (POD["hostNetwork"], POD["dnsPolicy"]) == (True, "Default")
    assert SPEC["updateStrategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxUnavailable": "10%"},
    }


def test_it_has_two_capabilities_and_no_file_to_write() -> None:
    assert CONTAINER["securityContext"] == {
        "runAsUser": 0,
        "allowPrivilegeEscalation": False,
        "capabilities": {"add": ["NET_ADMIN", "NET_BIND_SERVICE"], "drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }


def wishes() -> Wishes:
    """What the container's command line says, read as `kdns node` reads it."""
    from kdns.node_command import command, split_flags

    args = [word.replace("$(NODE_NAME)", "node1") for word in CONTAINER["args"]]
    ours, rest = split_flags(args)
    with command.make_context("node", ours + rest) as ctx:
        flags = ctx.params
    return Wishes(
        conf=flags["conf"],
        cluster_dns=tuple(flags["cluster_dns"]),
        local_dns=tuple(flags["local_dns"]),
        health=flags["health_address"],
        control=flags["control"],
        proxy=parse_flags(rest),
    )


def test_its_command_is_the_interpreter_of_the_image_that_asks_for_no_capability() -> None:
    assert CONTAINER["command"] == ["/opt/kdns/bin/python-plain", "-P", "-m", "kdns", "node"]
    assert "/opt/kdns/bin/python-plain" in (DEPLOY.parent / "Dockerfile").read_text()


def test_it_understands_its_command_line_and_configuration(tmp_path: Path) -> None:
    found = wishes()
    mounts = {m["name"]: m["mountPath"] for m in CONTAINER["volumeMounts"]}
    for path in (found.conf, found.proxy.config_path):
        folder, _, file = path.rpartition("/")
        assert folder == mounts["config"]
        assert file in DATA
    assert found.control.rpartition("/")[0] == mounts["run"]

    written = tmp_path / "config.conf"
    written.write_text(DATA["config.conf"])
    config = read_settings(parse_flags([f"--config={written}", "--hostname-override=node1"])).config
    assert config.hostname_override == "node1"
    assert config.cluster_cidrs
    assert config.client.kubeconfig == f"{mounts['config']}/kubeconfig.conf"
    assert addresses_for(found, config) == ("169.254.20.10", "10.96.0.10")


def test_its_corefile_is_well_and_listens_at_the_addresses_of_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdns.app import check_corefile
    from kdns.metrics import Metrics
    from kdns.site import build_site, places_of, read_corefile

    path = tmp_path / "Corefile"
    path.write_text(DATA["Corefile"])
    environ = {"NODE_IP": "192.0.2.7"}
    monkeypatch.setenv("NODE_IP", environ["NODE_IP"])
    assert [str(p) for p in check_corefile(str(path))] == []
    corefile, problems = read_corefile(str(path), None, 53, environ)
    site = build_site(corefile, problems, Metrics())
    pods, nodes = ({(p.address, p.port) for p in places_of(block)} for block in site.blocks)
    found = wishes()
    assert pods == {(one, 53) for one in (*found.local_dns, *found.cluster_dns)}
    assert nodes == {("192.0.2.7", PORTS["dns"]["containerPort"])}
    # The same answers at both: kubeadm's plugins.
    for block in site.blocks:
        words = {plugin.word for plugin in block.plugins}
        assert words >= set("errors kubernetes forward cache loadbalance".split())
    assert {"health", "ready", "loop", "reload"} <= {p.word for p in site.blocks[0].plugins}


def test_what_it_serves_over_http_is_not_for_everybody() -> None:
    for line in DATA["Corefile"].splitlines():
        if line.split()[:1] in (["health"], ["ready"]):
            assert line.split()[1].startswith("127.0.0.1:"), line
    for probe in ("livenessProbe", "readinessProbe"):
        ask = CONTAINER[probe]["httpGet"]
        assert f"{ask['host']}:{ask['port']}" == wishes().health
    assert CONTAINER["livenessProbe"]["httpGet"]["path"] == "/livez"
    assert CONTAINER["readinessProbe"]["httpGet"]["path"] == "/readyz"


def test_no_port_of_the_node_is_asked_for_twice() -> None:
    text = f"{DATA['Corefile']} {wishes().health}"
    ports = re.findall(r"(?:127\.0\.0\.1|prometheus )?:(\d{4,5})\b", text)
    assert len(ports) == len(set(ports))
    assert not set(ports) & {"10249", "10256"}  # the forwarding half's


def test_the_service_leads_by_the_names_of_ports_to_these_pods_and_to_corednss() -> None:
    service = OBJECTS["Service", "kube-dns"]["spec"]
    (stock,) = load(DEPLOY / "service.yaml")
    (coredns,) = load(DEPLOY / "deployment.yaml")
    pods = coredns["spec"]["template"]
    theirs = {p["name"]: p for p in pods["spec"]["containers"][0]["ports"]}
    assert service["clusterIP"] == stock["spec"]["clusterIP"] == wishes().cluster_dns[0]
    assert service["selector"].items() <= SPEC["template"]["metadata"]["labels"].items()
    assert service["selector"].items() <= pods["metadata"]["labels"].items()
    for port, stock_port in zip(service["ports"], stock["spec"]["ports"], strict=True):
        assert {**port, "targetPort": stock_port["targetPort"]} == stock_port
        for ports in (PORTS, theirs):
            assert ports[port["targetPort"]]["protocol"] == port["protocol"]


def test_its_pods_are_not_taken_for_corednss_deployments() -> None:
    """A controller adopts Pods without an owner that its selector has; the DaemonSet's own."""
    assert "k8s-app" not in SPEC["selector"]["matchLabels"]


def test_its_account_may_read_what_both_halves_need_and_no_more() -> None:
    assert {
        (group, resource, verb)
        for rule in OBJECTS["ClusterRole", "kdns-node"]["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    } == {
        ("", "nodes", "get"),
        *(
            (group, resource, verb)
            for group, resource in [
                ("", "services"),
                ("", "namespaces"),
                ("", "nodes"),
                ("discovery.k8s.io", "endpointslices"),
                ("networking.k8s.io", "servicecidrs"),
            ]
            for verb in ("list", "watch")
        ),
    }
    binding = OBJECTS["ClusterRoleBinding", "kdns-node"]
    assert binding["roleRef"]["name"] == "kdns-node"
    account = {"kind": "ServiceAccount", "name": "kdns-node", "namespace": "kube-system"}
    assert binding["subjects"] == [account]
    assert POD["serviceAccountName"] == "kdns-node"


def test_it_finds_the_api_without_a_proxy() -> None:
    (cluster,) = yaml.safe_load(DATA["kubeconfig.conf"])["clusters"]
    assert re.fullmatch(r"https://192\.0\.2\.\d+:6443", cluster["cluster"]["server"])


def test_the_comments_on_going_over_name_what_is_there() -> None:
    text = (NODE / "kustomization.yaml").read_text()
    for name in ("kube-proxy", "node-local-dns", "coredns", "kdns-node"):
        assert re.search(rf"(daemonset|deployment) {name}\b", text), name
