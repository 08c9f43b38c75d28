"""`kdns check` of a running kdns, by its control socket: all agree, until somebody breaks it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from running_proxy import ROOT, Node, Unavailable
from running_up import Up, until
from test_check import CASES, HEALTHY

CHECK = (sys.executable, "-m", "kdns", "check")
UP_NODE = """
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec:
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: 8080}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: default}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec: {containers: [{name: c, image: example, ports: [{containerPort: 8080}]}]}
"""


def check_of(up: Up, *flags: str, prefix: tuple[str, ...] = ()) -> tuple[int, Any]:
    argv = [*prefix, *CHECK, "--control", up.facts["control"], "-o", "json", *flags]
    done = subprocess.run(
        argv, capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_a_running_kdns_that_is_well(tmp_path: Path) -> None:
    (tmp_path / "set-up.yaml").write_text(UP_NODE)
    with Up("-f", tmp_path) as up:
        code, told = check_of(up)
        assert (code, told["findings"]) == (0, [])
        assert {"registry", "gate", "dns"} <= {*told["checked"]}
        # The same by its API alone, and a server to ask.
        argv = [*CHECK, "--kubeconfig", up.facts["kubeconfig"], "--server", up.facts["dns"],
                "--no-kernel", "-o", "json"]  # fmt: skip
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
        told = json.loads(done.stdout)
        assert (done.returncode, told["findings"]) == (0, [])
        assert "dns" in told["checked"]


def test_the_api_alone_leads_to_its_dns_servers(tmp_path: Path) -> None:
    """They are the endpoints of Service kube-dns; a Pod among them is not reached from here."""
    (tmp_path / "set-up.yaml").write_text(UP_NODE + COREDNS)
    with Up("-f", tmp_path) as up:
        done = subprocess.run(
            [sys.executable, "-m", "kdns", "check", "--kubeconfig", str(up.facts["kubeconfig"]),
             "-o", "json", "--settle", "0"],
            capture_output=True, text=True, cwd=ROOT, timeout=60, check=False,
        )  # fmt: skip
    told = json.loads(done.stdout)
    assert (done.returncode, told["findings"]) == (0, []), told
    assert f"of 127.0.0.1:{up.dns_port}" in told["checked"]["dns"]
    assert any("does not reach" in one for one in told["notes"])
    assert not any("multicluster" in one for one in told["notes"])


COREDNS = """
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: other
  namespace: kube-system
  labels: {kubernetes.io/service-name: kube-dns}
addressType: IPv4
endpoints: [{addresses: [10.244.9.9], conditions: {ready: true}}]
ports: [{name: dns, port: 9953, protocol: UDP}]
"""


def test_a_corefile_that_answers_otherwise_is_found(tmp_path: Path) -> None:
    (tmp_path / "set-up.yaml").write_text(HEALTHY)
    (tmp_path / "Corefile").write_text(
        ".:0 {\n    bind 127.0.0.1\n    hosts {\n        192.0.2.9 web.default.svc.cluster.local\n"
        "        fallthrough\n    }\n    kubernetes cluster.local in-addr.arpa ip6.arpa\n}\n"
    )
    with Up("-f", tmp_path / "set-up.yaml", "--corefile", tmp_path / "Corefile") as up:
        code, told = check_of(up, "--settle", "0.1")
    found = [one for one in told["findings"] if one["part"] == "dns"]
    assert [one["id"] for one in found] == ["dns-answer-differs"], found
    assert "gives 192.0.2.9, while Service default/web has 10.96.0.50" in found[0]["text"]
    assert "the Corefile's `hosts` may answer first" in found[0]["cause"]
    assert code == 1


def test_a_kdns_that_is_not_there_is_said() -> None:
    done = subprocess.run(
        [*CHECK, "--control", "/nowhere/control.sock"], capture_output=True, text=True, check=False
    )
    assert done.returncode in (1, 2) and "/nowhere/control.sock" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def node() -> Iterator[Node]:
    try:
        with Node() as made:
            for name in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
                made.run("sysctl", "-qw", f"{name}=1")
            yield made
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.mark.root
def test_a_kdns_that_forwards_until_somebody_flushes_its_rules(node: Node, tmp_path: Path) -> None:
    (tmp_path / "set-up.yaml").write_text(UP_NODE)
    prefix = tuple(node.enter())
    with Up("-f", tmp_path, "--proxy-mode=iptables", prefix=prefix) as up:
        code, told = check_of(up, prefix=prefix)
        assert (code, told["findings"]) == (0, []), told["findings"]
        assert {*told["checked"]} == {"registry", "gate", "dns", "rules", "conntrack", "host"}
        for table in ("nat", "filter", "mangle"):
            node.run("iptables", "-t", table, "-F")
            node.run("iptables", "-t", table, "-X")
        code, told = check_of(up, "--settle", "0", prefix=prefix)
        found = [(one["id"], one["subject"]) for one in told["findings"]]
        assert (code, found) == (1, [("rules-gone", "IPv4 rules")])


@pytest.mark.root
def test_what_is_said_of_unknown_cluster_ips_is_looked_at(node: Node, tmp_path: Path) -> None:
    """The cluster's ServiceCIDRs are in the registry: which rules there must be is known."""
    (tmp_path / "set-up.yaml").write_text(UP_NODE)
    prefix = tuple(node.enter())
    with Up("-f", tmp_path, "--proxy-mode=nftables", prefix=prefix) as up:
        chain = "ip kube-proxy cluster-ips-check"
        assert "10.96.0.0/12" in node.run("nft", "list", "chain", *chain.split())
        code, told = check_of(up, prefix=prefix)
        assert (code, told["findings"]) == (0, []), told["findings"]
        rule = f"{chain} ip daddr 10.1.0.0/16 drop"
        node.run("nft", "insert", "rule", *rule.split())
        code, told = check_of(up, "--settle", "0", prefix=prefix)
        (one,) = told["findings"]
        assert (code, one["id"]) == (1, "frame-differs")
        assert "cluster-ips-check" in one["text"]


FAILING = """\
#!/bin/sh
if test -e {flag}; then echo "{name}: no memory" >&2; exit 1; fi
exec {real} "$@"
"""


@pytest.mark.root
def test_a_kdns_that_cannot_write_its_rules(node: Node, tmp_path: Path) -> None:
    """DNS goes on after the gate's time-out, and check says what clients will meet."""
    manifests, flag = tmp_path / "manifests", tmp_path / "fail"
    manifests.mkdir()
    (manifests / "set-up.yaml").write_text(UP_NODE)
    for name in ("iptables-restore", "ip6tables-restore"):
        wrapper = tmp_path / name
        real = shutil.which(name, path="/usr/sbin:/sbin:/usr/bin:/bin")
        wrapper.write_text(FAILING.format(flag=flag, name=name, real=real))
        wrapper.chmod(0o755)
    prefix = tuple(node.enter())
    path = f"PATH={tmp_path}:{os.environ['PATH']}"
    flags = ("-f", manifests, "--proxy-mode=iptables", "--gate-timeout=200ms")
    with Up(*flags, prefix=(*prefix, "env", path)) as up:
        flag.touch()
        late = UP_NODE.replace("name: web", "name: late").replace("app: web", "app: late")
        (manifests / "late.yaml").write_text(late)

        def found() -> dict[str, dict[str, str]]:
            told = check_of(up, "--settle", "0", prefix=prefix)[1]["findings"]
            by_id = {one["id"]: one for one in told}
            return by_id if {"gate-open", "rules-missing"} <= {*by_id} else {}

        ids = until("what check says of it", found, 40)
        assert "rules were not written within 0.2 s" in ids["gate-open"]["text"]
        assert ids["published-unprogrammed"]["subject"] == "Service default/late"
        assert ids["rules-missing"]["subject"] == "Service default/late:http, IPv4"
        assert {*ids} <= {"gate-open", "published-unprogrammed", "rules-missing", "kernel-behind"}


def test_watch_tells_what_is_new_and_what_is_over(tmp_path: Path) -> None:
    file = tmp_path / "set-up.yaml"
    file.write_text(HEALTHY)
    argv = [*CHECK, "-f", str(file), "--watch", "0.1", "-o", "json"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        events: list[dict[str, str]] = []
        reading = threading.Thread(
            target=lambda lines: events.extend(map(json.loads, lines)), args=(process.stdout,)
        )
        reading.start()
        file.write_text(CASES[0].manifests)
        until("a new finding", lambda: events)
        file.write_text(HEALTHY)
        until("that it is over", lambda: len(events) > 1)
        process.terminate()
        reading.join()
    told = [(one["what"], one["id"], one["subject"]) for one in events]
    finding = ("selector-matches-nothing", "Service default/web")
    assert told == [("new", *finding), ("over", *finding)]
