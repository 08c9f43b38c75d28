"""`make demo` and the files a newcomer tries first: examples/, zones/, Corefile.example."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdns import cli
from kdns.app import check_corefile

PROJECT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", ["Corefile.example", "examples/Corefile.demo"])
def test_corefiles_to_start_from_have_no_mistake(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(PROJECT)
    monkeypatch.setenv("KDNS_DEMO_PORT", "1053")
    monkeypatch.setenv("KDNS_DEMO_UPSTREAM", "1054")
    assert [str(p) for p in check_corefile(name)] == []


def objects() -> dict[tuple[str, str], Any]:
    return {
        (x["kind"], x["metadata"]["name"]): x
        for path in sorted((PROJECT / "examples").glob("*.yaml"))
        for x in yaml.safe_load_all(path.read_text())
    }


@pytest.mark.parametrize(
    ("name", "ports"),
    [
        ("myservice", [(8080, 80, None)]),
        ("cluster-ip", [(80, None, None)]),
        ("node-port", [(80, None, 30080)]),
        ("load-bal", [(80, None, 30088)]),
        ("external-ip", [(80, None, None)]),
        ("my-nginx", [(80, "http", None)]),
        ("kube-dns", [(53, None, None), (53, None, None), (9153, None, None)]),
        ("db", [(5432, None, None)]),
    ],
)
def test_examples_hold_the_services_of_the_study_notes(
    name: str, ports: list[tuple[int, Any, Any]]
) -> None:
    spec = objects()["Service", name]["spec"]
    found = [(p["port"], p.get("targetPort"), p.get("nodePort")) for p in spec["ports"]]
    assert found == ports


def test_examples_have_a_service_of_every_kind_for_the_proxy(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.run(["dump", "table", "-f", str(PROJECT / "examples")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " forward" in line]
    kinds = {line.split(" ", 1)[1].split("/")[0].rpartition(" ")[0] for line in lines}
    assert kinds == {"cluster IP", "external IP", "loadbalancer IP", "node port"}
    assert any(line.startswith("default/node-port node port *:30080/tcp") for line in lines)
    assert any(line.startswith("default/load-bal node port *:30088/tcp") for line in lines)
    assert not [line for line in lines if "google-svc" in line]  # ExternalName: only a name


def test_examples_have_one_node_so_that_rules_need_no_flag() -> None:
    nodes = [name for kind, name in objects() if kind == "Node"]
    assert nodes == ["node1"]


FOLLOW = [sys.executable, "examples/follow.py"]


def follow(rules: str, *words: str) -> tuple[int, str]:
    done = subprocess.run([*FOLLOW, *words], cwd=PROJECT, input=rules, capture_output=True,
                          text=True, timeout=50, check=False)  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def rules(capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.run(["rules", "-f", str(PROJECT / "examples")]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("packet", "end"),
    [
        (["203.0.113.7", "192.168.77.1:30080"], ":80 (50 %), masqueraded"),
        (["203.0.113.7", "198.51.100.88:80"], ":80 (50 %), masqueraded"),
        (["203.0.113.7", "198.51.100.10:80/tcp"], ":80 (50 %), masqueraded"),
        (["10.244.1.5", "10.96.0.10:53/udp"], ":53 (50 %), source kept"),
        (["--interface", "", "192.168.77.1", "10.96.0.10:53"], ":53 (50 %), masqueraded"),
        (["--node", "192.0.2.1", "203.0.113.7", "192.0.2.1:30088"], ":80 (50 %), masqueraded"),
    ],
)
def test_follow_says_where_a_packet_ends(rules: str, packet: list[str], end: str) -> None:
    code, said = follow(rules, *packet)
    assert code == 0, said
    ends = [line for line in said.splitlines() if line.startswith("=> ")]
    assert len(ends) == 2
    assert all(line.startswith("=> DNAT to 10.244.") and line.endswith(end) for line in ends)


def test_follow_leaves_alone_what_no_service_has(rules: str) -> None:
    code, said = follow(rules, "10.244.1.5", "192.0.2.200:443")
    assert (code, said.splitlines()[-1]) == (0, "=> to 192.0.2.200:443 (100 %), source kept")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["10.244.1.5", "10.96.0.10"], "'10.96.0.10' must be ADDRESS:PORT"),
        (["10.244.1.5", "10.96.0.10:dns"], "'10.96.0.10:dns' must be ADDRESS:PORT"),
        (["10.244.1.5", "10.96.0.10:53/dccp"], "'10.96.0.10:53/dccp' must be ADDRESS:PORT"),
        (["10.244.1.5", "[fd00::1]:53"], "of two families"),
        (["nobody", "10.96.0.10:53"], "nobody"),
    ],
)
def test_follow_says_what_is_wrong_with_a_packet(
    rules: str, words: list[str], complaint: str
) -> None:
    code, said = follow(rules, *words)
    assert code == 2
    assert complaint in said


def test_examples_select_pods_that_are_there() -> None:
    every = objects()
    labels = [
        x["spec"]["template"]["metadata"]["labels"]
        for (kind, _), x in every.items()
        if kind in ("Deployment", "StatefulSet")
    ]
    for (kind, name), x in every.items():
        if kind == "Service" and "selector" in x["spec"]:
            wanted = x["spec"]["selector"].items()
            assert any(wanted <= have.items() for have in labels), name
