"""The control socket of real processes: `kdns up` and `kdns serve`, asked with real dig."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from running import RunningKdns
from running_proxy import Node, Unavailable
from running_up import PATIENCE, PROJECT, Up, until

from kdns.control import ControlClient, control_in, find_control

MANIFEST = """\
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec: {selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web-1, namespace: default, labels: {app: web}}
spec: {containers: [{name: c, image: nginx}]}
"""
NOBODY = """\
---
apiVersion: v1
kind: Service
metadata: {name: nobody, namespace: default}
spec: {selector: {app: nobody}, ports: [{port: 80}]}
"""
DIG = shutil.which("dig")
needs_dig = pytest.mark.skipif(DIG is None, reason="dig is not installed (dnsutils)")


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    file = tmp_path_factory.mktemp("up") / "web.yaml"
    file.write_text(MANIFEST)
    with Up("-f", file) as running:
        yield running


def dig(up: Up, *words: str) -> str:
    assert DIG is not None
    return subprocess.run(
        [DIG, "@127.0.0.1", "-p", str(up.dns_port), "+tries=1", "+time=5", *words],
        capture_output=True, text=True, check=True, timeout=PATIENCE,
    ).stdout  # fmt: skip


def kdns(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kdns", *words],
        cwd=PROJECT, capture_output=True, text=True, check=False, timeout=4 * PATIENCE,
        env={**os.environ, "TERM": "dumb", **environment},
    )  # fmt: skip


def test_it_is_found_through_the_kubeconfig_and_is_its_owners_alone(up: Up) -> None:
    path = up.facts["control"]
    assert find_control("", {"KUBECONFIG": up.facts["kubeconfig"]}) == path
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    # kubectl understands the file, and keeps what it does not know when it writes it.
    up.kubectl("config", "set-context", "kdns", "--user=kdns")
    assert control_in(Path(up.facts["kubeconfig"]).read_text()) == path


def test_status_registry_and_corefile(up: Up) -> None:
    client = ControlClient(up.facts["control"])
    status = client.get("/v1/status")
    assert status["pid"] == up.facts["pid"]
    assert (status["command"], status["node"], status["mode"]) == ("up", "node1", "none")
    assert status["dns"] == [up.facts["dns"]]
    assert status["synced"] is True and status["gate"] is None
    assert status["revision"]["dns"] == status["revision"]["registry"] > 0
    registry = client.get("/v1/registry")
    found = {(one["kind"], one["metadata"]["name"]): one for one in registry["objects"]}
    web = found["Service", "web"]
    assert web["apiVersion"] == "v1"
    assert {"uid", "resourceVersion", "creationTimestamp"} <= set(web["metadata"])
    assert found["Pod", "web-1"]["status"]["podIP"].startswith("10.244.")
    assert ("EndpointSlice" in {kind for kind, _ in found}) and ("Node", "node1") in found
    assert "kubernetes cluster.local" in client.get("/v1/corefile")["text"]


@needs_dig
def test_queries_are_shown_while_somebody_listens_also_repeated_ones(up: Up) -> None:
    name = "web.default.svc.cluster.local"
    for _ in range(3):  # from now on the packet cache has it
        dig(up, name, "A")
    lines = ControlClient(up.facts["control"]).stream()
    events = map(json.loads, lines)
    # The stream is open when its first line is there.
    asker = subprocess.Popen(
        [sys.executable, "-c", LOOKUPS, str(up.dns_port), name], stdout=subprocess.DEVNULL
    )
    try:
        seen: list[dict[str, Any]] = [next(events) for _ in range(5)]
    finally:
        asker.terminate()
        asker.wait()
        lines.close()  # type: ignore[attr-defined]
    address = up.kubectl("get", "svc", "web", "-o", "jsonpath={.spec.clusterIP}")
    for event in seen:
        assert event["name"] == f"{name}."
        assert event["rcode"] == "NOERROR"
        assert event["answers"] == [f"A {address}"]
        assert event["object"] == "Service default/web"
        assert event["client"].startswith("127.0.0.1:")
        assert event["server"] == f"dns://127.0.0.1:{up.dns_port}"
    assert len({event["id"] for event in seen}) > 1
    assert {event["plugin"] for event in seen} <= {"kubernetes", "cache"}


REFUSING = ".:0 {\n bind 127.0.0.1\n template ANY ANY {\n rcode REFUSED\n}\n}\n"
LOOKUPS = """
import subprocess, sys
while True:
    subprocess.run(["dig", "@127.0.0.1", "-p", sys.argv[1], "+tries=1", sys.argv[2], "A"])
"""


@pytest.mark.asyncio
async def test_while_nobody_listens_the_query_path_is_as_if_there_were_no_tap() -> None:
    """Router and packet cache before, during and after: what answers is the very same."""
    text = ".:0 {\n bind 127.0.0.1\n hosts {\n 10.0.0.1 a.example\n}\n}\n"
    async with RunningKdns(text) as kdns:
        (listener,) = kdns.app.listeners.values()
        assert kdns.app.site is not None
        router = kdns.app.site.routers[listener.place]
        (cache,) = listener.caches
        seen: list[dict[str, Any]] = []

        async def ask_thrice() -> bool:
            """Return whether the answer is now repeated with nothing else to be done."""
            for number in range(3):
                await kdns.ask("a.example.", qid=number + 1)
            (entry,) = cache.young.entries.values()
            assert entry.hits > 0
            return entry.on_repeat is None

        assert listener.exchange.router is router
        assert await ask_thrice()
        end = kdns.app.tap.listen(lambda line: seen.append(json.loads(line)))
        other = kdns.app.tap.listen(lambda line: None)
        assert not await ask_thrice()
        assert [(one["id"], one["answers"], one["plugin"]) for one in seen] == [
            (number, ["A 10.0.0.1"], "hosts") for number in (1, 2, 3)
        ]
        end()
        assert not await ask_thrice(), "the other one listens still"
        other()
        assert listener.exchange.router is router
        assert await ask_thrice()
        assert len(seen) == 3


def test_a_second_one_on_the_same_socket_is_refused(up: Up) -> None:
    done = kdns("up", "--api-port=0", "--dns-port=0", "--control", up.facts["control"])
    assert done.returncode == 2
    assert "another kdns listens there; name another with --control PATH" in done.stderr
    assert ControlClient(up.facts["control"]).get("/v1/status")["pid"] == up.facts["pid"]


def test_a_data_folder_with_a_path_too_long_for_a_socket(tmp_path: Path) -> None:
    folder = tmp_path / ("d" * 120)
    with Up("--data-dir", folder) as up:
        path = up.facts["control"]
        assert find_control("", {"KUBECONFIG": up.facts["kubeconfig"]}) == path
        assert ControlClient(path).get("/v1/status")["pid"] == up.facts["pid"]
    assert not os.path.exists(os.path.dirname(path))


def test_it_goes_with_the_process_and_a_killed_ones_is_taken_over(tmp_path: Path) -> None:
    flags = ("--data-dir", tmp_path / "d", "--control", f"/tmp/kdns-test-{os.getpid()}.sock")
    path = str(flags[-1])
    try:
        with Up(*flags) as up:
            up.kill()
        assert os.path.exists(path)
        with Up(*flags) as up:
            assert ControlClient(path).get("/v1/status")["pid"] == up.facts["pid"]
            assert up.terminate() == 0
        assert not os.path.exists(path)
    finally:
        Path(path).unlink(missing_ok=True)


# --- kdns serve -----------------------------------------------------------------------------


@needs_dig
def test_serve_tells_and_a_reload_keeps_its_listeners(tmp_path: Path) -> None:
    path = f"/tmp/kdns-serve-{os.getpid()}.sock"
    corefile = tmp_path / "Corefile"
    corefile.write_text(".:0 {\n bind 127.0.0.1\n whoami\n kdns_log json\n}\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "kdns", "-conf", str(corefile), "-control", path],
        cwd=PROJECT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        client = ControlClient(path)
        until("it serves", lambda: os.path.exists(path) and client.get("/v1/status")["dns"])
        (place,) = client.get("/v1/status")["dns"]
        assert client.get("/v1/corefile") == {
            "path": str(corefile), "text": corefile.read_text()
        }  # fmt: skip
        events = client.stream()
        port = place.rpartition(":")[2]
        asker = subprocess.Popen([sys.executable, "-c", LOOKUPS, port, "a.example"],
                                 stdout=subprocess.DEVNULL)  # fmt: skip
        try:
            assert json.loads(next(events))["plugin"] == "whoami"
            corefile.write_text(REFUSING)
            process.send_signal(signal.SIGUSR1)
            for line in events:
                if json.loads(line)["rcode"] == "REFUSED":
                    break
        finally:
            asker.terminate()
            asker.wait()
        process.terminate()
        said, _ = process.communicate(timeout=PATIENCE)
        logged = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
        assert {one["name"] for one in logged} == {"a.example."}
        assert not os.path.exists(path)
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
        Path(path).unlink(missing_ok=True)


# --- with forwarding, in a network namespace of its own ---------------------------------------


@pytest.mark.root
def test_with_forwarding_it_tells_of_the_gate_and_wait_says_who_refuses(tmp_path: Path) -> None:
    try:
        node = Node().__enter__()
    except Unavailable as e:
        pytest.skip(str(e))
    try:
        file = tmp_path / "web.yaml"
        file.write_text(MANIFEST + NOBODY)
        enter = tuple(node.enter("env", f"PYTHONPATH={PROJECT}"))
        with Up("-f", file, "--proxy-mode=iptables", prefix=enter) as up:
            status = ControlClient(up.facts["control"]).get("/v1/status")
            assert (status["mode"], status["cluster_cidr"]) == ("iptables", "10.244.0.0/16")
            assert status["gate"]["open"] is False and status["gate"]["waiting"] == []
            revision = status["revision"]
            assert revision["kernel_ipv4"] == revision["dns"] == revision["registry"] > 0

            done = subprocess.run(
                [*enter, f"KUBECONFIG={up.facts['kubeconfig']}", sys.executable, "-m", "kdns",
                 "wait", "nobody:80", "--timeout", "0"],
                cwd=PROJECT, capture_output=True, text=True, check=False, timeout=4 * PATIENCE,
            )  # fmt: skip
            assert done.returncode == 1
            assert "nobody.default.svc.cluster.local. is 10." in done.stderr
            assert "refuses the connection" in done.stderr
            assert "no ready endpoint" in done.stderr
    finally:
        node.close()
