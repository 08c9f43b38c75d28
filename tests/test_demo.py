"""`make demo` and the files a newcomer tries first: examples/, zones/, Corefile.example."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdns.app import check_corefile

PROJECT = Path(__file__).resolve().parent.parent


def test_walkthrough_gets_every_answer_it_expects() -> None:
    done = subprocess.run(
        [sys.executable, "examples/walkthrough.py"], cwd=PROJECT, capture_output=True, text=True,
        timeout=50, check=False, env=os.environ | {"PYTHONPATH": str(PROJECT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("answers are the expected ones.\n")
    assert "Traceback" not in done.stdout + done.stderr


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
