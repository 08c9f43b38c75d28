"""The cluster's names as an unchanged program in a pod sees them: glibc, nslookup and dig with
a pod's resolv.conf, in a network namespace of their own, kdns at kube-dns' address and port 53.

Needs root and `ip` (iproute2). Everything is seen twice: as a client that is no known Pod, and
as a Pod, for which autopath finishes the search path on the server's side.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
POD = "10.244.7.7"
PLAIN, AUTOPATH = "10.96.0.10", "10.96.0.11"  # asked by nobody known, and by the Pod

COREFILE = """.:53 {{
    errors
    log . "{{remote}} asked {{name}} {{type}}"
    autopath @kubernetes
    kubernetes cluster.local in-addr.arpa ip6.arpa {{
        manifests {project}/examples {folder}/pod.yaml
        pods verified
        fallthrough in-addr.arpa ip6.arpa
        ttl 30
    }}
    forward . 127.0.0.1:5300
    cache 30
    loop
    loadbalance
}}
www.example.com:5300 {{
    bind 127.0.0.1
    hosts {{
        192.0.2.80 www.example.com
    }}
}}
.:5300 {{
    bind 127.0.0.1
    template ANY ANY {{
        rcode NXDOMAIN
    }}
}}
"""
THE_POD = f"""
apiVersion: v1
kind: Pod
metadata: {{name: client, namespace: default}}
status: {{phase: Running, podIP: {POD}}}
"""
RESOLV_CONF = """search default.svc.cluster.local svc.cluster.local cluster.local
nameserver {server}
options ndots:5
"""

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(shutil.which("ip") is None, reason="needs `ip` (iproute2)"),
]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)


class Pod:
    """A network namespace with a pod's resolv.conf, kdns serving in it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.settings = Path("/etc/netns") / name  # ip-netns(8) puts these over /etc
        self.log = folder / "log"

    def use(self, server: str) -> None:
        (self.settings / "resolv.conf").write_text(RESOLV_CONF.format(server=server))

    def run(self, *command: str) -> str:
        """Run a program in the pod; return what it printed on stdout, or how it failed."""
        if shutil.which(command[0]) is None:
            pytest.skip(f"needs {command[0]}")
        done = run("ip", "netns", "exec", self.name, *command)
        return done.stdout or f"exit code {done.returncode} {done.stderr}".strip()

    def asked(self, *command: str) -> list[str]:
        """Run a program; return the questions that it put as the Pod, in order."""
        before = len(self.log.read_text())
        self.run(*command)
        lines = self.log.read_text()[before:].splitlines()
        return [x.partition(" asked ")[2] for x in lines if f"{POD} asked" in x]


@pytest.fixture(scope="module")
def pod(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pod]:
    folder = tmp_path_factory.mktemp("pod")
    pod = Pod(f"kdns-test-{os.getpid()}", folder)
    made = run("ip", "netns", "add", pod.name)
    if made.returncode:
        pytest.skip(f"cannot make a network namespace: {made.stderr.strip()}")
    no_folder = not pod.settings.parent.exists()
    try:
        pod.settings.mkdir(parents=True)
        pod.use(PLAIN)
        for words in [
            "link set lo up",
            f"address add {PLAIN}/32 dev lo",
            f"address add {AUTOPATH}/32 dev lo",
            f"address add {POD}/32 dev lo",
            # What asks this server asks from the Pod's address.
            f"route replace local {AUTOPATH} dev lo src {POD} table local",
        ]:
            done = run("ip", "-n", pod.name, *words.split())
            assert done.returncode == 0, done.stderr
        (folder / "pod.yaml").write_text(THE_POD)
        (folder / "Corefile").write_text(COREFILE.format(project=PROJECT, folder=folder))
        command = ["ip", "netns", "exec", pod.name, sys.executable, "-m", "kdns", "serve"]
        with (
            pod.log.open("w") as log,
            subprocess.Popen(
                [*command, "-conf", str(folder / "Corefile")], cwd=PROJECT, stdout=log,
                stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(PROJECT)},
            ) as process,
        ):  # fmt: skip
            try:
                _wait_started(pod, process)
                yield pod
            finally:
                process.terminate()
                process.wait(10)
    finally:
        run("ip", "netns", "delete", pod.name)
        shutil.rmtree(pod.settings, ignore_errors=True)
        if no_folder:
            with contextlib.suppress(OSError):  # another worker's is still there
                pod.settings.parent.rmdir()


def _wait_started(pod: Pod, process: subprocess.Popen[str]) -> None:
    query = [sys.executable, "-m", "kdns", "query", "myservice.default.svc.cluster.local."]
    for _ in range(20):
        if process.poll() is not None:
            assert process.stderr is not None
            pytest.fail(f"kdns ended: {process.stderr.read()}")
        done = run("ip", "netns", "exec", pod.name, *query, "--server", PLAIN, "--short")
        if done.returncode == 0:
            return
    pytest.fail("kdns does not answer")


@pytest.fixture
def address(pod: Pod) -> str:
    """The ClusterIP of myservice, by its whole name."""
    name = "myservice.default.svc.cluster.local."
    command = (sys.executable, "-m", "kdns", "query", name, "--server", PLAIN, "--short")
    found = pod.run(*command).strip()
    assert re.fullmatch(r"10\.\d+\.\d+\.\d+", found), found
    return found


both = pytest.mark.parametrize("server", [PLAIN, AUTOPATH], ids=["plain", "autopath"])


@both
@pytest.mark.parametrize(
    "name", ["myservice", "myservice.default", "myservice.default.svc.cluster.local"]
)
def test_getent_hosts(name: str, server: str, pod: Pod, address: str) -> None:
    pod.use(server)
    assert pod.run("getent", "hosts", name).split()[:2] == [
        address, "myservice.default.svc.cluster.local"
    ]  # fmt: skip


@both
def test_getent_ahosts(server: str, pod: Pod, address: str) -> None:
    pod.use(server)
    lines = [line.split()[:2] for line in pod.run("getent", "ahosts", "myservice").splitlines()]
    assert lines == [[address, "STREAM"], [address, "DGRAM"], [address, "RAW"]]
    headless = pod.run("getent", "ahostsv4", "db.shop").splitlines()
    found = {line.split()[0] for line in headless}
    assert len(found) == 3 and all(x.startswith("10.244.") for x in found), headless


@both
def test_getent_finds_the_name_of_an_address(server: str, pod: Pod) -> None:
    pod.use(server)
    assert pod.run("getent", "hosts", PLAIN).split() == [
        PLAIN, "kube-dns.kube-system.svc.cluster.local"
    ]  # fmt: skip


@both
@pytest.mark.parametrize("name", ["nosuchservice", "myservice.shop", "nosuch.example.com"])
def test_what_does_not_exist_is_not_found(name: str, server: str, pod: Pod) -> None:
    pod.use(server)
    assert pod.run("getent", "ahosts", name).startswith("exit code 2")


@both
def test_nslookup(server: str, pod: Pod) -> None:
    pod.use(server)
    for name in ("kube-dns.kube-system.svc.cluster.local", "kube-dns.kube-system"):
        output = pod.run("nslookup", name)
        assert f"Address:\t{server}#53" in output
        assert "Name:\tkube-dns.kube-system.svc.cluster.local\nAddress: 10.96.0.10" in output


@both
@pytest.mark.parametrize("name", ["myservice", "myservice.default"])
def test_dig_with_the_search_path(name: str, server: str, pod: Pod, address: str) -> None:
    pod.use(server)
    assert pod.run("dig", "+search", "+short", name).split()[-1] == address


@both
def test_a_name_outside(server: str, pod: Pod) -> None:
    pod.use(server)
    lines = pod.run("getent", "ahosts", "www.example.com").splitlines()
    assert {line.split()[0] for line in lines} == {"192.0.2.80"}


@both
def test_python_in_the_pod(server: str, pod: Pod, address: str) -> None:
    pod.use(server)
    code = "import socket; print(socket.gethostbyname('my-nginx'), socket.getfqdn('myservice'))"
    found = pod.run(sys.executable, "-c", code).split()
    assert found[0].startswith("10.") and found[0] != address


def test_autopath_answers_a_name_outside_in_one_query(pod: Pod) -> None:
    pod.use(AUTOPATH)
    asked = pod.asked("getent", "ahostsv4", "www.example.com")
    assert asked == ["www.example.com.default.svc.cluster.local. A"]
    output = pod.run(
        "dig", "-b", POD, f"@{PLAIN}", "www.example.com.default.svc.cluster.local", "+noall",
        "+answer", "+comments",
    )  # fmt: skip
    assert "status: NOERROR" in output and "ANSWER: 2" in output
    records = [line.split() for line in output.splitlines() if line and line[0] != ";"]
    assert [(r[0], r[3], r[4]) for r in records] == [
        ("www.example.com.default.svc.cluster.local.", "CNAME", "www.example.com."),
        ("www.example.com.", "A", "192.0.2.80"),
    ]


def test_autopath_answers_a_name_of_another_namespace_in_one_query(pod: Pod) -> None:
    pod.use(AUTOPATH)
    asked = pod.asked("getent", "ahostsv4", "kube-dns.kube-system")
    assert asked == ["kube-dns.kube-system.default.svc.cluster.local. A"]


def test_without_autopath_the_client_walks_the_search_path(pod: Pod) -> None:
    output = pod.run(
        "dig", "-b", PLAIN, f"@{PLAIN}", "www.example.com.default.svc.cluster.local", "+noall",
        "+comments",
    )  # fmt: skip
    assert "status: NXDOMAIN" in output
