"""The gate with real packets: who resolves a name of `kdns up` may connect at once.

Everything runs in a network namespace of its own, with every Pod address a local one; the clients
are gate_client.py's, in that namespace. What fails is counted there, and has to be nothing.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from running_proxy import POD_NET, ROOT, Node, Unavailable
from running_up import PROJECT, Up, until

pytestmark = pytest.mark.root
CLIENT = Path(__file__).with_name("gate_client.py")
SECONDS = 120.0  # that a scenario may take on a busy machine
# Does as it is told by a file: fails, says that the lock is held, hangs until told otherwise.
WRAPPER = """#!/bin/sh
case "$(cat {told} 2>/dev/null)" in
fail) cat >/dev/null; echo "{name}: line 3 failed" >&2; exit 1 ;;
busy) cat >/dev/null; echo "Another app is currently holding the xtables lock." >&2; exit 4 ;;
hang) while [ -s {told} ]; do sleep 0.05; done ;;
esac
exec {real} "$@"
"""


@pytest.fixture
def node() -> Iterator[Node]:
    try:
        made = Node().__enter__()
    except Unavailable as e:
        pytest.skip(str(e))
    try:
        made.run("ip", "route", "replace", "local", POD_NET, "dev", "lo")
        yield made
    finally:
        made.close()


@contextmanager
def up(node: Node, mode: str, *flags: str, path: str = "") -> Iterator[Up]:
    if mode == "nftables" and node.finish("nft", "list", "tables").returncode:
        pytest.skip("needs nft")
    env = [f"PYTHONPATH={PROJECT}", *([f"PATH={path}"] if path else [])]
    with Up("--insecure", f"--proxy-mode={mode}", *flags,
            prefix=tuple(node.enter("env", *env))) as running:  # fmt: skip
        yield running


def play(node: Node, running: Up, scenario: str, *flags: object) -> Mapping[str, Any]:
    done = subprocess.run(
        node.enter(sys.executable, str(CLIENT), scenario, "--api", str(running.facts["api"]),
                   "--dns", str(running.dns_port), *map(str, flags)),
        capture_output=True, text=True, check=False, timeout=SECONDS, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stderr}\n{running.log}"
    print(done.stdout)
    found: Mapping[str, Any] = json.loads(done.stdout)
    return found


# --- what comes -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["iptables", "nftables", "userspace"])
def test_200_services_are_reached_as_soon_as_they_have_a_name(node: Node, mode: str) -> None:
    with up(node, mode, "--gate-timeout=1m") as running:
        found = play(node, running, "create", "--count", 200, "--at-once", 20)
    assert (found["count"], found["failed"]) == (200, 0), found["why"]


def test_without_the_gate_they_are_not(node: Node) -> None:
    """What the gate is for; and that the clients would notice."""
    with up(node, "iptables", "--gate-timeout=0") as running:
        found = play(node, running, "create", "--count", 10, "--at-once", 1)
    assert found["failed"] > 0


def test_500_services_in_a_second_have_rules_before_names(node: Node) -> None:
    """That they have names in 2 s is measured by bench/gate.py; here others use the machine."""
    with up(node, "iptables", "--gate-timeout=1m") as running:
        found = play(node, running, "burst", "--count", 500)
        assert "names are published without" not in running.log  # the gate did not open
    assert (found["count"], found["failed"]) == (500, 0), found["why"]


def test_after_a_reload_that_reads_more_they_are_still(node: Node, tmp_path: Path) -> None:
    corefile = tmp_path / "Corefile"
    text = ".:0 {\n bind 127.0.0.1\n kubernetes cluster.local {\n pods %s\n }\n}\n"
    corefile.write_text(text % "insecure")
    with up(node, "iptables", f"--corefile={corefile}", "--gate-timeout=1m") as running:
        corefile.write_text(text % "verified")
        running.process.send_signal(signal.SIGUSR1)
        until("the Corefile taken over", lambda: "Reloading complete" in running.log)
        found = play(node, running, "create", "--count", 50, "--at-once", 10)
        assert "names do not wait" not in running.log
    assert (found["count"], found["failed"]) == (50, 0), found["why"]


def test_rules_follow_the_registry_that_the_agent_has(node: Node) -> None:
    done = node.finish(sys.executable, str(Path(__file__).with_name("agent_moves.py")))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "before": ["s1", "s2"],
        "after": ["s2", "s3"],
        "later": ["s3"],
    }


# --- what changes ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["iptables", "nftables", "userspace"])
def test_endpoints_are_replaced_under_load(node: Node, mode: str) -> None:
    with up(node, mode, "--gate-timeout=1m") as running:
        found = play(node, running, "churn", "--count", 5, "--at-once", 100)
    for kind in ("cluster_ip", "headless"):
        assert found[kind]["failed"] == 0, found[kind]["why"]
        assert found[kind]["connections"] > 100
    assert found["endpoints"] >= 7  # new ones were met, too


def test_a_service_becomes_headless_and_another_name_under_load(node: Node) -> None:
    with up(node, "iptables", "--gate-timeout=1m") as running:
        found = play(node, running, "change", "--count", 2, "--at-once", 200)
    assert found["failed"] == 0, found["why"]
    assert found["connections"] > 100 and found["addresses"] >= 3


# --- what goes ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["iptables", "nftables", "userspace"])
def test_a_service_is_deleted_while_clients_connect(node: Node, mode: str) -> None:
    with up(node, mode) as running:
        found = play(node, running, "leave", "--at-once", 200)
    assert found["gone_at_once"]
    assert found["failed"] == 0, found["why"]
    assert found["remembered"]["failed"] == 0, found["remembered"]["why"]
    assert found["remembered"]["connections"] > 200


def test_without_drain_who_remembers_an_address_gets_nowhere(node: Node) -> None:
    with up(node, "iptables", "--drain=none") as running:
        found = play(node, running, "leave", "--at-once", 50)
    assert found["gone_at_once"]
    assert found["remembered"]["failed"] > 0


def test_rules_stay_as_long_as_a_connection_needs_them(node: Node) -> None:
    with up(node, "iptables", "--drain=conntrack") as running:
        found = play(node, running, "leave", "--at-once", 100)
        assert found["remembered"]["failed"] == 0, found["remembered"]["why"]
        assert "default/web" in node.saved()
        # Forgotten by the kernel, as closed connections are after two minutes.
        if shutil.which("conntrack") is None:
            pytest.skip("needs conntrack, to have the kernel forget")
        node.run("conntrack", "-F")
        until("the rules gone", lambda: "default/web" not in node.saved())


def test_rules_go_when_nobody_can_remember_the_name(node: Node, tmp_path: Path) -> None:
    corefile = tmp_path / "Corefile"
    corefile.write_text(".:0 {\n bind 127.0.0.1\n kubernetes cluster.local {\n ttl 1\n }\n}\n")
    with up(node, "iptables", f"--corefile={corefile}", "--gate-timeout=1s") as running:
        found = play(node, running, "leave", "--at-once", 20)
        assert found["failed"] == 0
        until("the rules gone", lambda: "default/web" not in node.saved())
        assert "default/kubernetes" in node.saved()


# --- bad days -------------------------------------------------------------------------------


class Programs:
    """iptables-restore and its like, which can be told to misbehave."""

    def __init__(self, folder: Path) -> None:
        self._told = folder / "told"
        self.folder = folder / "bin"
        self.folder.mkdir()
        for name in ("iptables-restore", "ip6tables-restore"):
            real = shutil.which(name)
            one = self.folder / name
            one.write_text(WRAPPER.format(told=self._told, name=name, real=real))
            one.chmod(0o755)

    def do(self, what: str) -> None:
        draft = self._told.with_suffix(".draft")
        draft.write_text(what)
        draft.rename(self._told)


@pytest.mark.parametrize("how", ["fail", "busy", "hang"])
def test_rules_that_cannot_be_written_do_not_stop_dns(node: Node, tmp_path: Path, how: str) -> None:
    programs = Programs(tmp_path)
    path = f"{programs.folder}:{node.finish('printenv', 'PATH').stdout.strip()}"
    with up(node, "iptables", "--gate-timeout=500ms", path=path) as running:
        api = Api(node, running)
        api.put("before", "10.96.1.1")
        until("a name with its rules", lambda: resolves(node, running, "before"))
        assert "10.96.1.1/32" in node.saved()
        programs.do(how)
        api.put("meanwhile", "10.96.1.2")
        until("a name all the same", lambda: resolves(node, running, "meanwhile"))
        assert "10.96.1.2/32" not in node.saved()
        until("a word on it", lambda: "names are published without: default/meanwhile"
              in running.log)  # fmt: skip
        # It is broken: nobody waits for it any more.
        api.put("at-once", "10.96.1.3")
        assert resolves(node, running, "at-once")
        programs.do("")
        until("the rules", lambda: "10.96.1.3/32" in node.saved(), 60)
        until("a word on that", lambda: "rules are written again; names wait" in running.log)
        api.put("after", "10.96.1.4")
        until("a name with its rules again", lambda: resolves(node, running, "after"))
        assert "10.96.1.4/32" in node.saved()
        assert running.log.count("are not in the kernel after 0.5 s") == 1


class Api:
    """The embedded API, reached in the namespace."""

    def __init__(self, node: Node, running: Up) -> None:
        self._node = node
        self._url = str(running.facts["api"])

    def put(self, name: str, ip: str) -> None:
        body = {"metadata": {"name": name}, "spec": {"clusterIP": ip, "ports": [{"port": 80}]}}
        self._node.inside(post, f"{self._url}/api/v1/namespaces/default/services", body)


def post(url: str, body: object) -> None:
    from urllib.request import Request, urlopen

    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=10) as answer:
        answer.read()


def resolves(node: Node, running: Up, name: str) -> bool:
    ask: Callable[[str], list[str]] = running.dig
    return bool(node.inside(ask, f"{name}.default.svc.cluster.local."))
