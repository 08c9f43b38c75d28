"""`kdns node` as Pods and operators see it: a process on a node, real packets, a real kernel.

Each test has a run of its own, on a node in a cluster of network namespaces; what can be seen of
one that runs on is test_node_well.py's. What forwarding does is test_proxy_traffic.py's, what DNS
answers test_kubernetes.py's and others'; here it is about the two together: the way to DNS, the
start and the end.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import running_proxy
from forwarding import endpoint, service, slice_of
from netcluster import NODE_ADDRESS, NetCluster, lan, pod
from running_node import (
    ADDRESSES,
    BOTH_FAMILIES,
    COREFILE,
    LOCAL,
    ROOT,
    SETTLE,
    VIP,
    NodeSite,
    kube_dns,
    pod_dns,
    put_question,
)
from running_proxy import until
from traffic import cluster_or_skip

from kdns.control import ControlClient
from kdns.kernel.dnsaddress import INTERFACE

pytestmark = pytest.mark.root

WEB = (
    service("web", ip="10.96.0.80"),
    slice_of("web", endpoint(pod(10)), ports=(("http", 8080, "TCP"),)),
)
WEB_NAME, WEB_IP = "web.default.svc.cluster.local.", "10.96.0.80"


@pytest.fixture(scope="module")
def cluster() -> Iterator[NetCluster]:
    with cluster_or_skip() as made:
        yield made


@pytest.fixture
def site(cluster: NetCluster, tmp_path: Path) -> Iterator[NodeSite]:
    made = NodeSite(cluster, tmp_path)
    cluster.run("node", "nft", "flush", "ruleset")  # those of Services stay after an end
    cluster.run("node", "conntrack", "-F")
    made.put(*kube_dns(pod_dns(4), pod_dns(6)), *WEB)
    yield made
    made.close()
    assert made.rules() == ""
    assert made.addresses() == set()


# --- the way to DNS -------------------------------------------------------------------------


def test_without_those_rules_it_is_the_service_that_answers(site: NodeSite) -> None:
    """What the test above would see if NOTRACK did nothing."""
    site.corefile(bind=(LOCAL[4],))
    site.start("--cluster-dns=")
    assert site.ask("client", VIP[4], WEB_NAME, seconds=0.5) != WEB_IP
    assert site.flows(VIP[4]) != []


def test_a_firewall_that_knows_only_connections_lets_dns_pass(site: NodeSite) -> None:
    """Packets that are not tracked are neither new nor established to it."""
    run = site.cluster.run
    known = "-m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT".split()
    for chain in ("INPUT", "OUTPUT"):
        run("node", "iptables", "-A", chain, *known)
        run("node", "iptables", "-A", chain, "-p", "udp", "--dport", "53", "-j", "DROP")
        run("node", "iptables", "-A", chain, "-p", "udp", "--sport", "53", "-j", "DROP")
    try:
        site.start()
        for where in ("client", "node"):
            assert site.ask(where, VIP[4], WEB_NAME) == WEB_IP
    finally:
        for chain in ("INPUT", "OUTPUT"):
            run("node", "iptables", "-F", chain)


# --- it stays so ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_after_a_kill_the_next_start_takes_over_and_sigterm_leaves_nothing(
    site: NodeSite, mode: str
) -> None:
    site.start(f"--proxy-mode={mode}")
    before = site.rules()
    assert site.end(signal.SIGKILL) == -signal.SIGKILL
    assert (site.rules(), site.addresses()) == (before, {VIP[4], LOCAL[4]})
    site.start(f"--proxy-mode={mode}")
    assert site.rules() == before
    assert site.ask("client", VIP[4], WEB_NAME) == WEB_IP
    assert site.end() == 0
    assert (site.rules(), site.addresses()) == ("", set())


def test_a_start_in_another_mode_leaves_nothing_of_the_one_before(site: NodeSite) -> None:
    site.start("--proxy-mode=nftables")
    site.end(signal.SIGKILL)
    site.start("--proxy-mode=iptables")
    until("no table of ours", lambda: "table inet" not in site.rules(), SETTLE)
    site.end(signal.SIGKILL)
    site.start("--proxy-mode=nftables")
    until("no chains of ours", lambda: "KDNS-DNS-IN" not in site.rules(), SETTLE)
    assert site.ask("client", VIP[4], WEB_NAME) == WEB_IP


@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_cleanup_removes_what_a_killed_run_left_and_nothing_else(site: NodeSite, mode: str) -> None:
    run = site.cluster.run
    run("node", "iptables", "-t", "raw", "-A", "PREROUTING", "-d", "192.0.2.1", "-j", "ACCEPT")
    run("node", "ip", "addr", "add", "192.0.2.99/32", "dev", "lo")
    try:
        site.start(f"--proxy-mode={mode}", *BOTH_FAMILIES)
        site.end(signal.SIGKILL)
        assert site.rules()
        done = site.finish("--cleanup")
        assert (done.returncode, done.stderr) == (0, "")
        assert (site.rules(), site.addresses()) == ("", set())
        assert "KUBE-" not in run("node", "iptables-save")
        assert "-d 192.0.2.1/32 -j ACCEPT" in run("node", "iptables-save", "-t", "raw")
        assert "192.0.2.99" in run("node", "ip", "addr", "show", "dev", "lo")
        assert site.finish("--cleanup").returncode == 0  # nothing to do is no error
    finally:
        run("node", "iptables", "-t", "raw", "-F", "PREROUTING")
        run("node", "ip", "addr", "del", "192.0.2.99/32", "dev", "lo")


def test_an_address_on_the_loopback_that_was_there_before_is_left_there(site: NodeSite) -> None:
    run = site.cluster.run
    run("node", "ip", "addr", "add", f"{LOCAL[4]}/32", "dev", "lo")
    try:
        site.start()
        assert site.end() == 0
        assert site.addresses() == {LOCAL[4]}
    finally:
        run("node", "ip", "addr", "del", f"{LOCAL[4]}/32", "dev", "lo")


def test_the_addresses_have_an_interface_of_their_own_where_the_kernel_has_dummy(
    site: NodeSite,
) -> None:
    try:
        site.cluster.run("node", "ip", "link", "add", "probe", "type", "dummy")
    except Exception as error:
        pytest.skip(f"no dummy interfaces in this kernel, lo holds the addresses: {error}")
    site.cluster.run("node", "ip", "link", "del", "probe")
    site.start(*BOTH_FAMILIES)
    shown = site.cluster.run("node", "ip", "-o", "addr", "show", "dev", INTERFACE)
    assert all(address in shown for address in ADDRESSES)
    assert site.end() == 0
    assert INTERFACE not in site.cluster.run("node", "ip", "link")


# --- start and end --------------------------------------------------------------------------

ASKER = """
import sys, threading, time
from running_node import put_question
server, name, wanted = sys.argv[1:]
lost, asked, again, end = [], 0, 0, threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), end.set()), daemon=True).start()
print("asking", flush=True)
while not end.is_set():
    for tcp in (False, True):
        found = put_question(server, name, "A", tcp, 53, 3.0)
        asked += 1
        if tcp and found in ("ConnectionResetError", "ConnectionRefusedError", "EOFError"):
            again += 1
            found = put_question(server, name, "A", tcp, 53, 3.0)
        if found != wanted:
            lost.append((asked, tcp, found))
    time.sleep(0.01)
print(asked, again, lost)
"""


def test_no_question_is_lost_while_it_ends_and_starts_again(site: NodeSite) -> None:
    """What it leaves to the Service, and takes back from it: another node's server answers
    meanwhile. A Pod asks over UDP and TCP all the while. A TCP connection that is open just when
    the way changes is reset, as by any server that ends, and made again at once."""
    changes = 6
    site.serve_elsewhere("node2", pod_dns(), f"hosts {{\n {WEB_IP} {WEB_NAME}\n}}")
    site.start()
    asker = site.spawn("client", sys.executable, "-c", ASKER, VIP[4], WEB_NAME, WEB_IP)
    assert asker.stdout is not None
    assert asker.stdout.readline() == b"asking\n"
    for _ in range(changes // 2):
        assert site.end() == 0
        assert site.ask("client", VIP[4], WEB_NAME) == WEB_IP  # the other one
        site.start()
    said = asker.communicate(b"")[0].decode()
    asked, again, lost = said.split(" ", 2)
    assert lost == "[]\n"
    assert int(asked) > 100
    assert int(again) <= changes


def test_in_its_lameduck_time_it_is_not_ready_and_answers_on(site: NodeSite) -> None:
    site.serve_elsewhere("node2", pod_dns(), f"hosts {{\n {WEB_IP} {WEB_NAME}\n}}")
    text = site.corefile().read_text()
    site.corefile(text.replace("errors", "errors\n    health 127.0.0.1:9254 {\n lameduck 30s\n }"))
    site.start()
    assert site.health("/readyz")[0] == 200
    assert site.process is not None
    site.process.send_signal(signal.SIGTERM)
    site.until_said("Going into lameduck mode")
    assert site.health("/readyz") == (
        503,
        {"healthy": False, "listening": [f"dns://{a}:53" for a in (VIP[4], LOCAL[4])],
         "problem": "it is ending"},
    )  # fmt: skip
    assert site.health("/livez")[0] == 200
    assert site.rules() == ""  # new questions go by the Service
    for server in (VIP[4], LOCAL[4]):
        assert site.ask("client", server, WEB_NAME) == WEB_IP
    assert site.end() == 0  # a second signal is for those who cannot wait
    # Forwarding outlives it, as with kube-proxy.
    assert {r.who for r in site.cluster.ask("client", WEB_IP, 80)} == {"pod-a"}


def test_without_a_corefile_it_serves_kubeadms_and_forwards_other_names(
    site: NodeSite, tmp_path: Path
) -> None:
    resolv = tmp_path / "resolv.conf"
    resolv.write_text(f"nameserver {lan('outside')}\n")
    site.serve_elsewhere("outside", lan("outside"), "hosts {\n 192.0.2.5 www.example.org\n}", 53)
    site.cluster.run("node", "mount", "--bind", str(resolv), "/etc/resolv.conf")
    try:
        site.launch()
        site.until_well()
        assert site.ask("client", VIP[4], "www.example.org.") == "192.0.2.5"
        assert site.ask("client", LOCAL[4], WEB_NAME) == WEB_IP
        # Others that reach the node by its own address have no resolver there.
        for where, address in (("outside", NODE_ADDRESS[4]), ("client", "10.244.1.1")):
            found = site.ask(where, address, WEB_NAME, seconds=0.5)
            assert found in ("ConnectionRefusedError", "timeout")
        assert site.process is not None
        site.process.send_signal(signal.SIGTERM)
        site.until_said("Going into lameduck mode for 5s")
        assert site.end() == 0
    finally:
        site.cluster.run("node", "umount", "/etc/resolv.conf")


def test_a_resolv_conf_that_leads_back_is_told_of_and_loops_nothing(
    site: NodeSite, tmp_path: Path
) -> None:
    """As where the Pod has dnsPolicy ClusterFirst."""
    resolv = tmp_path / "resolv.conf"
    resolv.write_text(f"search default.svc.cluster.local\nnameserver {VIP[4]}\n")
    site.cluster.run("node", "mount", "--bind", str(resolv), "/etc/resolv.conf")
    try:
        site.launch()
        site.until_said(f"nameserver {VIP[4]} is this server itself")
        site.until_said('detected for zone ".": a question forwarded by this server')
        assert site.ask("client", VIP[4], "www.example.org.") == "SERVFAIL"
        assert site.ask("client", VIP[4], WEB_NAME) == WEB_IP
    finally:
        assert site.process is not None
        site.process.send_signal(signal.SIGTERM)
        site.end()
        site.cluster.run("node", "umount", "/etc/resolv.conf")


def test_a_corefile_that_does_not_listen_there_is_told_of(site: NodeSite) -> None:
    site.corefile(bind=(LOCAL[4],))
    site.start()
    site.until_said(f"no server block listens on port 53 of {VIP[4]}, which this node has taken")


def test_the_corefile_is_taken_over_while_it_runs(site: NodeSite) -> None:
    site.start()
    assert site.ask("client", VIP[4], "new.example.org.") != "192.0.2.7"
    text = site.corefile().read_text()
    site.corefile(
        text.replace("errors", "errors\n    hosts {\n 192.0.2.7 new.example.org\n fallthrough\n }")
    )
    assert site.process is not None
    site.process.send_signal(signal.SIGUSR1)
    site.until_said("Reloading complete")
    assert site.ask("client", VIP[4], "new.example.org.") == "192.0.2.7"


CONFIG = """\
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: {mode}
clusterCIDR: {cidr}
oomScoreAdj: 0
conntrack: {{maxPerCore: 0}}
"""


def test_another_configuration_begins_forwarding_anew_and_dns_goes_on(
    site: NodeSite, tmp_path: Path
) -> None:
    path = tmp_path / "config.conf"
    path.write_text(CONFIG.format(mode="iptables", cidr="10.244.0.0/16"))
    site.start("--config", str(path))
    path.write_text(CONFIG.format(mode="iptables", cidr="10.245.0.0/16"))
    site.until_said("the configuration has changed")
    assert site.ask("client", VIP[4], WEB_NAME) == WEB_IP
    site.until_well()
    assert "! -s 10.245.0.0/16" in site.cluster.run("node", "iptables-save", "-t", "nat")
    # What is wrong with a new one is told; the rules stay.
    path.write_text(CONFIG.format(mode="iptables", cidr="10.245.0.0/33"))
    site.until_said(f"{path}:4: clusterCIDR")
    assert site.health()[0] == 503
    assert site.ask("client", VIP[4], WEB_NAME) == WEB_IP
    assert {r.who for r in site.cluster.ask("client", WEB_IP, 80)} == {"pod-a"}
    # Another mode has other programs, and perhaps other addresses: all of it begins anew.
    path.write_text(CONFIG.format(mode="nftables", cidr="10.244.0.0/16"))
    assert site.process is not None
    assert site.process.wait(SETTLE) == 1
    assert "the mode is nftables now; leaving, to be started with it" in site.said
    site.process = None
    assert (site.rules(), site.addresses()) == ("", set())


# --- one registry for both halves -------------------------------------------------------------


def test_a_name_of_the_api_leads_somewhere_as_soon_as_it_is_there(tmp_path: Path) -> None:
    """The Corefile's `kubernetes` reads the API that kube-proxy's flags name; of each new
    Service the rules are in the kernel before the name is in DNS."""
    corefile = tmp_path / "Corefile"
    corefile.write_text(COREFILE.format(bind=f"{VIP[4]} {LOCAL[4]}", upstream="192.0.2.53"))
    with contextlib.ExitStack() as ends:
        try:
            node = ends.enter_context(running_proxy.Node())
        except running_proxy.Unavailable as error:
            pytest.skip(str(error))
        ends.enter_context(node.server("10.244.1.5", 8080))
        api = node.api({"kind": "Namespace", "metadata": {"name": "default"}})
        process = subprocess.Popen(
            node.enter(
                sys.executable, "-m", "kdns", "node", *NodeSite.FLAGS, "-conf", str(corefile),
                "--master", api.url, f"--control={tmp_path / 'control.sock'}",
            ),
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        ends.callback(process.wait)
        ends.callback(process.terminate)
        until("it is well", lambda: node.get("/healthz", 9256).status == 200, SETTLE)
        for number in range(30):
            name = f"new{number}"
            ip = f"10.96.1.{number}"
            # The endpoint first: a Service that has none yet refuses, which is no lie.
            api.put(
                slice_of(name, endpoint("10.244.1.5"), ports=(("http", 8080, "TCP"),)),
                service(name, ip=ip),
            )
            ask = (VIP[4], f"{name}.default.svc.cluster.local.", "A", False, 53, 5.0)
            until(f"{name} is there", lambda: node.inside(put_question, *ask) == ip, SETTLE)  # noqa: B023
            node.connect(ip, 80).close()  # refused or lost: it fails

        status = ControlClient(str(tmp_path / "control.sock")).get("/v1/status")
        assert (status["command"], status["node"], status["mode"]) == ("node", "node1", "iptables")
        assert (status["synced"], status["gate"]["waiting"]) == (True, [])
        assert set(status["dns"]) == {f"{VIP[4]}:53", f"{LOCAL[4]}:53"}


# --- bad days -------------------------------------------------------------------------------

WITHOUT_IPTABLES = (
    "unshare", "-m", "sh", "-e", "-c",
    'for one in $(for tool in iptables-nft iptables-legacy; do readlink -f $(which $tool); done);'
    ' do mount --bind /dev/null $one; done; exec "$@"',
    "sh",
)  # fmt: skip


def test_without_iptables_dns_goes_on_and_health_says_so(site: NodeSite) -> None:
    site.launch("-conf", str(site.folder / "Corefile"), prefix=WITHOUT_IPTABLES)
    site.until_said("forwarding has ended: iptables: not found in PATH")
    site.until_said("DNS packets are tracked, DNS goes on all the same: iptables: not found")
    for where in ("client", "node"):
        assert site.ask(where, VIP[4], WEB_NAME) == WEB_IP
    status, health = site.health()
    assert (status, health["healthy"], health["dns"]["healthy"]) == (503, False, True)
    assert "install the package iptables" in health["forwarding"]["problem"]
    assert "install the package iptables" in health["path"]["problem"]
    assert (site.health("/readyz")[0], site.health("/livez")[0]) == (200, 200)
    path = ControlClient(str(site.folder / "control.sock")).get("/v1/status")["path"]
    assert path == health["path"]  # what `kdns check` goes by
    assert site.end() == 0


def test_a_program_that_fails_for_a_while_is_tried_again(site: NodeSite, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.touch()
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for tool in ("iptables-restore", "ip6tables-restore"):
        wrapper = bin_dir / tool
        wrapper.write_text(
            f'#!/bin/sh\n[ -e {broken} ] && {{ echo "{tool}: line 1 failed" >&2; exit 4; }}\n'
            f'exec /usr/sbin/{tool} "$@"\n'
        )
        wrapper.chmod(0o755)
    site.launch("-conf", str(site.folder / "Corefile"), path=str(bin_dir))
    site.until_said("DNS packets are tracked")
    assert site.ask("client", VIP[4], WEB_NAME) == WEB_IP
    assert site.health()[0] == 503
    broken.unlink()
    site.until_well()
    assert site.ask("client", VIP[4], WEB_NAME) == WEB_IP
    assert site.flows() == [] or "UNREPLIED" not in "".join(site.flows())


def test_a_program_that_hangs_holds_up_neither_dns_nor_its_end(
    site: NodeSite, tmp_path: Path
) -> None:
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for tool in ("iptables-restore", "ip6tables-restore"):
        (bin_dir / tool).write_text("#!/bin/sh\nexec sleep 1000\n")
        (bin_dir / tool).chmod(0o755)
    site.launch("-conf", str(site.folder / "Corefile"), path=str(bin_dir))
    site.until_said(f".:53 on {VIP[4]}")
    assert site.ask("client", VIP[4], WEB_NAME) == WEB_IP
    assert site.health("/readyz")[0] == 200
    status, health = site.health()
    assert (status, health["forwarding"]["healthy"]) == (503, False)
    assert site.process is not None
    site.process.send_signal(signal.SIGTERM)
    until("the addresses are gone", lambda: site.addresses() == set(), SETTLE)
    assert site.rules() == ""
    site.process.kill()  # as kubelet does: a write under way may take its time


def test_without_permission_it_says_what_it_takes_and_leaves(site: NodeSite) -> None:
    drop = ("setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin")
    done = site.finish("-conf", str(site.folder / "Corefile"), prefix=drop)
    assert done.returncode == 1
    assert "NET_ADMIN" in done.stderr
    assert re.search(
        r"cannot (make the interface|give the node the address|set lo up)", done.stderr
    )
    assert "Traceback" not in done.stderr + done.stdout


def test_a_port_53_that_is_taken_ends_it_and_the_addresses_go_back(site: NodeSite) -> None:
    """As by a NodeLocal DNSCache that is still there: it is everywhere."""
    holder = site.spawn("node", sys.executable, "-c", HOLD)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    done = site.finish("-conf", str(site.folder / "Corefile"))
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert re.search(r"dns://1\S+:53: cannot listen: Address already in use", done.stderr)
    assert (site.rules(), site.addresses()) == ("", set())


HOLD = """
import socket, sys
one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
one.bind(("0.0.0.0", 53))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_wrong_corefile_is_told_of_and_nothing_stays(site: NodeSite) -> None:
    path = site.corefile(".:53 {\n    bind 10.96.0.10\n    nosuchplugin\n}\n")
    done = site.finish("-conf", str(path))
    assert done.returncode == 2
    assert f"{path}:3: " in done.stderr
    assert (site.rules(), site.addresses()) == ("", set())
    assert "the addresses of this node's DNS server" not in done.stdout  # nor for a moment
    assert "proxy:" not in done.stdout  # no sysctl, no port, no rule


def test_in_the_ipvs_mode_the_clusters_address_stays_with_the_service(site: NodeSite) -> None:
    """There is no ipvs in every kernel: then forwarding ends, and this is so all the same."""
    site.corefile(bind=(LOCAL[4],))
    site.launch("-conf", str(site.folder / "Corefile"), "--proxy-mode=ipvs")
    site.until_said(f"the ipvs mode answers for {VIP[4]} itself")
    site.until_said("is not tracked")
    assert site.ask("client", LOCAL[4], WEB_NAME) == WEB_IP
    assert site.addresses() - {VIP[4]} == {LOCAL[4]}
    assert VIP[4] not in site.rules()
