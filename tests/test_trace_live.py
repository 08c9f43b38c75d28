"""`kdns trace` against what runs: a `kdns up` through its control socket and through its API, its
DNS asked for real, and kernels that hold something else than the registry says."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from netcluster import forked
from running_up import PROJECT, Up, until
from trace_cluster import (
    NODES,
    WEB,
    Obj,
    endpoint,
    endpoint_slice,
    evidence_of,
    namespace,
    pod,
    service,
    traced,
    written,
)

from kdns import agent, cli
from kdns.control import ControlServer, Facts
from kdns.explain import trace_command
from kdns.explain.evidence import Evidence, KernelEvidence, Where, gather, of_kdns
from kdns.explain.trace_text import render
from kdns.proxy.config import Mode
from kdns.proxy.conntrack import Flow
from kdns.proxy.packet import Host
from kdns.server.client import Server

UDP_WEB = service("dns", ports=[{"name": "dns", "port": 53, "protocol": "UDP"}],
                  selector={"app": "web"})  # fmt: skip


assert trace_command  # imported here, so that the processes which are forked need not

HOST = "198.51.100.1"  # of a network namespace of its own


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    objects = [service("web"), pod("web-1"), service("gone", selector={"app": "gone"})]
    with Up("-f", written(tmp_path_factory.mktemp("up"), objects)) as running:
        until("web resolves", lambda: running.dig("web"))
        yield running


@pytest.fixture(scope="module")
def empty() -> Iterator[Up]:
    """A cluster that has no Service of ours, so its DNS server denies them."""
    with Up() as running:
        yield running


def kdns(*words: str, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "kdns", "trace", *words], cwd=PROJECT, text=True,
        capture_output=True, check=False, timeout=60,
        env={**os.environ, "KDNS_CONTROL": "", "KUBECONFIG": "/nowhere", **environment},
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout or done.stderr


def kdns_at(pid: int, *words: str, **environment: str) -> tuple[int, str]:
    """As kdns(), in the network namespace of a process, and without a Python's start."""

    def there() -> tuple[int, str]:
        os.environ.update({"KDNS_CONTROL": "", "KUBECONFIG": "/nowhere", **environment})
        with redirect_stdout(StringIO()) as out:
            code = cli.run(["trace", *words])
        return code, out.getvalue()

    return forked(pid, ("net",), there)


def test_a_running_kdns_is_found_and_asked(up: Up) -> None:
    code, out = kdns("web:80", "-o", "json", KUBECONFIG=str(up.facts["kubeconfig"]))
    found = json.loads(out)
    assert code == 0, out
    assert found["evidence"]["origin"] == "kdns"
    assert f"process {up.process.pid}" in found["evidence"]["told"]
    (tried,) = found["search"]["tried"]
    assert tried["real"]["records"] == tried["computed"]["records"]
    assert tried["real"]["plugin"] == f"127.0.0.1 port {up.dns_port}"
    (owner,) = found["objects"]
    assert owner["resource_version"].isdecimal()
    assert owner["age_seconds"] >= 0
    assert [one["pod"] for one in found["endpoints"]] == ["default/web-1"]
    # It has no proxy: what is computed is what one would do.
    assert [(one["id"], one["stops"]) for one in found["findings"]] == [("nothing-forwards", False)]
    assert found["end"]["text"].startswith("would arrive at 10.244.")
    assert "--proxy-mode iptables" in found["findings"][0]["advice"]


def test_the_api_is_enough(up: Up) -> None:
    """Neither kdns's socket nor root: what is computed is marked as such."""
    code, out = kdns("web:80", "--kubeconfig", str(up.facts["kubeconfig"]), "--no-kernel")
    assert code == 0, out
    assert "DNS and rules are computed" in " ".join(out.split())
    assert "rules      computed, mode iptables" in out
    assert "resourceVersion" in out
    assert " old)" in out


def test_what_breaks_while_it_runs_is_told(up: Up) -> None:
    environment = {"KUBECONFIG": str(up.facts["kubeconfig"])}
    code, out = kdns("gone:80", **environment)
    assert code == 1
    assert "no Pod in default has app=gone" in " ".join(out.split())
    code, out = kdns("nothing-like-it:80", **environment)
    assert code == 1
    assert "[no-such-service]" in out


def test_a_server_that_says_otherwise_stops_it(up: Up, empty: Up) -> None:
    server = f"127.0.0.1:{empty.dns_port}"
    kubeconfig = str(up.facts["kubeconfig"])
    code, out = kdns("web.default:80", "--kubeconfig", kubeconfig, "--server", server)
    assert code == 1
    told = " ".join(out.split())
    assert f"127.0.0.1 port {empty.dns_port} answers NXDOMAIN" in told
    assert "[dns-differs]" in told


@pytest.mark.parametrize(
    ("status", "id", "text"),
    [
        ({"synced": False}, "not-synced", "has not listed the registry yet"),
        ({"synced": True, "gate": {"timeout": 2.0, "waiting": [
            {"service": "default/web", "revision": 7, "seconds": 0.25}]}},
         "gate-waiting", "withholds Service default/web for 0.2 s now"),
        ({"synced": True}, "dns-differs", "the registry says 10.96.0.80"),
    ],
)  # fmt: skip
def test_why_a_name_is_withheld(
    status: dict[str, Any], id: str, text: str, tmp_path: Path, empty: Up
) -> None:
    evidence = replace(
        evidence_of(tmp_path, WEB), status=status, ask=(Server("127.0.0.1", empty.dns_port),)
    )
    made = traced(evidence, "web.default.svc.cluster.local.:80")
    assert made.outcome.finding == id, render(made)
    assert text in made.outcome.text


def test_nobody_to_look_at_is_wrong_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kdns.control.NODE_SOCKET", str(tmp_path / "no.sock"))
    for name in ("KUBECONFIG", "KDNS_CONTROL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.run(["trace", "web:80"]) == 2
    assert "nothing says what to look at" in capsys.readouterr().err
    code, out = kdns("web:80", "--control", str(tmp_path / "none.sock"))
    assert code != 0
    assert "none.sock" in out
    code, out = kdns("web:80", "--kubeconfig", str(tmp_path / "none"))
    assert code != 0
    assert "none" in out


# --- kernels -----------------------------------------------------------------------------------


def holding(evidence: Evidence, other: Evidence, mode: Mode, extra: str = "") -> Evidence:
    """Return evidence whose kernel holds what another registry makes."""
    text, _ = agent.rules_text(other.snapshot, other.config, 4, "node1")
    host = Host(["192.0.2.11"])
    return replace(evidence, kernel=KernelEvidence(mode, {4: text + extra}, host), no_kernel="")


@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_a_kernel_that_is_up_to_date_is_believed(mode: Mode, tmp_path: Path) -> None:
    evidence = evidence_of(tmp_path, WEB, mode=mode)
    made = traced(holding(evidence, evidence, mode), "web:80")
    assert made.outcome.kind == "endpoint"
    assert made.kernel is not None
    assert made.kernel.ways == (made.rules and made.rules.ways)
    assert made.findings == []


OLD = (
    service("web", clusterIP="10.96.0.80", selector=None),
    endpoint_slice("web", endpoint("10.244.7.7")),
)
MORE = (
    service("web", clusterIP="10.96.0.80", selector=None),
    endpoint_slice("web", endpoint("10.244.1.10"), endpoint("10.244.7.7")),
)
REFUSED = (service("web", clusterIP="10.96.0.80", selector={"app": "none"}),)
NFT_DROP = """
table inet firewall {
    chain forward {
        type filter hook forward priority 0; policy drop;
    }
}
"""


def _forwarding_nothing(evidence: Evidence) -> Evidence:
    """Return evidence of a host whose firewall forwards nothing, and does not ask ours first."""
    assert evidence.kernel is not None
    lines = evidence.kernel.rules[4].replace("*filter\n", "*filter\n:FORWARD DROP [0:0]\n", 1)
    kept = [line for line in lines.splitlines() if "-j KUBE-FORWARD" not in line]
    rules = "".join(f"{line}\n" for line in kept if line != ":FORWARD ACCEPT [0:0]")
    return replace(evidence, kernel=replace(evidence.kernel, rules={4: rules}))


@pytest.mark.parametrize(
    ("objects", "mode", "extra", "id", "text", "stops"),
    [
        ((), "iptables", "", "rules-missing", "do not lead on from 10.96.0.80", True),
        (OLD, "iptables", "", "rules-differ", "leads to 10.244.7.7:8080 too and does not", True),
        (MORE, "iptables", "", "rules-differ", "leads to 10.244.7.7:8080 too", False),
        (REFUSED, "iptables", "", "rules-differ", "has it refused", True),
        (WEB, "iptables", "DROP", "dropped-by-other-rule", "filter FORWARD", True),
        (OLD, "nftables", "", "rules-differ", "leads to 10.244.7.7:8080 too and does not", True),
        (WEB, "nftables", NFT_DROP, "dropped-by-other-rule", "inet firewall", True),
    ],
)
def test_a_kernel_that_leads_elsewhere(
    objects: tuple[Obj, ...], mode: Mode, extra: str, id: str, text: str, stops: bool,
    tmp_path: Path,
) -> None:  # fmt: skip
    evidence = evidence_of(tmp_path, WEB, mode=mode)
    (tmp_path / "old").mkdir()
    held = holding(evidence, evidence_of(tmp_path / "old", objects, mode=mode), mode, extra)
    if extra == "DROP":
        held = _forwarding_nothing(holding(evidence, evidence, mode))
    made = traced(held, "web:80")
    found = {one.id: one for one in made.findings}
    assert id in found, render(made, width=200)
    assert text in found[id].text
    assert found[id].stops is stops
    assert (made.outcome.finding == id) is stops


def test_flows_to_what_is_gone_are_told(tmp_path: Path) -> None:
    evidence = evidence_of(tmp_path, WEB)
    held = holding(evidence, evidence, "iptables")
    assert held.kernel is not None

    def flow(client: str, at: str) -> Flow:
        source, to, back = (ip_address(x).packed for x in (client, "10.96.0.80", at))
        return Flow("tcp", source, 40000, to, 80, back, 8080)

    flows = [flow("10.244.1.5", "10.244.1.10"), flow("10.244.1.5", "10.244.9.9"),
             flow("10.244.1.6", "10.244.1.10")]  # fmt: skip
    made = traced(replace(held, kernel=replace(held.kernel, flows=flows)), "web:80")
    assert made.flow_count == 3
    assert (made.flows[0].endpoint, made.flows[0].stale) == ("10.244.9.9:8080", True)
    assert [one.id for one in made.findings] == ["stale-flow"]
    assert "3 live flows" in render(made)


@pytest.mark.root
@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_the_rules_and_flows_of_a_real_kernel(mode: Mode, tmp_path: Path) -> None:
    """`kdns up` forwards in a network namespace of its own; the trace is made there."""
    objects = [service("web"), pod("web-1"), UDP_WEB]
    prepare = f"ip link set lo up && ip addr add {HOST}/32 dev lo && ip route add default dev lo"
    alone = ("unshare", "-n", "sh", "-c", f'{prepare} && exec "$@"', "x")
    path = written(tmp_path, objects)
    with Up("-f", path, f"--proxy-mode={mode}", prefix=alone) as up:
        pid = up.process.pid
        there = ("nsenter", "-t", str(pid), "-n")
        environment = {"KUBECONFIG": str(up.facts["kubeconfig"])}

        def in_kernel(*what: str) -> dict[str, Any] | None:
            _, out = kdns_at(pid, *what, "-o", "json", **environment)
            found: dict[str, Any] = json.loads(out)
            rules = found["rules"] or {"source": "", "ways": ()}
            leads = {one["verdict"] for one in rules["ways"]} == {"forward"}
            return found if rules["source"] == "kernel" and leads else None

        found = until("its rules are in the kernel", lambda: in_kernel("web:80"))
        assert found is not None
        assert found["rules"]["mode"] == mode
        assert [one["verdict"] for one in found["rules"]["ways"]] == ["forward"]
        assert found["end"]["arrives"], found["end"]
        udp = until("those of UDP, too", lambda: in_kernel("dns:53", "--udp"))
        assert udp is not None
        address = udp["frontend"]["address"]
        send = (
            "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM);"
            f" s.sendto(b'x', ({address!r}, 53))"
        )
        subprocess.run([*there, sys.executable, "-c", send], check=True, timeout=20)
        _, out = kdns_at(pid, "dns:53", "--udp", "-o", "json", **environment)
        tracked = json.loads(out)["conntrack"]
        assert tracked["flows"] == 1, out
        assert not tracked["told"][0]["stale"]
        # With the API alone, rules count only on a host that is one of the cluster's Nodes.
        by_api = ("web:80", "-o", "json", "--kubeconfig", environment["KUBECONFIG"])
        found = json.loads(kdns_at(pid, *by_api)[1])
        assert found["rules"]["source"] == "kernel", found["evidence"]
        subprocess.run([*there, "ip", "addr", "del", f"{HOST}/32", "dev", "lo"], check=True)
        found = json.loads(kdns_at(pid, *by_api)[1])
        assert found["rules"]["source"] == "computed"
        assert "not the node in question" in found["evidence"]["no_kernel"]
        code, out = kdns("web:80", "-v", **environment)
        assert code == 0
        assert "another network namespace" in " ".join(out.split())


def test_no_kernel_is_read_for_manifests(tmp_path: Path) -> None:
    found = gather(Where(manifests=(str(written(tmp_path, [*NODES, *WEB])),)))
    assert found.kernel is None
    assert "manifests are on no node" in found.no_kernel


def test_a_proxy_alone_tells_of_no_names(tmp_path: Path) -> None:
    """`kdns proxy --control`: its registry and mode count, and names are answered as usual."""
    objects = [
        *NODES,
        namespace("default"),
        service("web", clusterIP="10.96.0.80"),
        endpoint_slice("web", endpoint("10.244.1.10")),
    ]
    status = {"pid": os.getpid(), "command": "proxy", "mode": "nftables", "synced": True,
              "dns": [], "node": "node1"}  # fmt: skip
    registry = {"revision": 3, "objects": objects}
    path = str(tmp_path / "control.sock")
    facts = Facts({"/v1/status": lambda: status, "/v1/registry": lambda: registry})

    async def gathered() -> Evidence:
        server = ControlServer(path, facts)
        await server.start()
        try:
            return await asyncio.to_thread(of_kdns, Where(use_kernel=False), path)
        finally:
            await server.stop()

    evidence = asyncio.run(gathered())
    assert (evidence.origin, evidence.snapshot.revision, evidence.node) == ("kdns", 3, "node1")
    assert evidence.notes == ("kdns tells of no Corefile, so kubeadm's is taken",)
    made = traced(evidence, "web:80", "")
    assert made.rules is not None
    assert (made.rules.mode, made.outcome.kind) == ("nftables", "endpoint")
