"""`kdns proxy` as its users see it: a process on a node, the rules of a real kernel, real packets.

Each test has a node of its own (running_proxy.py). What the rules mean to packets is
test_kernel_traffic.py's, when a sync happens is test_sync.py's, how a broken API server is
dealt with is test_kube_source.py's.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from api_replay import Json, golden
from forwarding import endpoint, exposed, service, slice_of
from iptables_text import Rules, differences, normalised, parse_saved, without_counters
from kubeadm import KUBEADM_PROXY
from running_proxy import NODE_IP, Api, Node, Proxy, Unavailable, as_json, listen, until

from kdns.proxy.iptables_rules import chain_hash

pytestmark = pytest.mark.root

ROUTE_LOCALNET = "/proc/sys/net/ipv4/conf/all/route_localnet"
RECORDED = Path(__file__).parent / "golden" / "rules"
CIDRS = "--cluster-cidr=10.244.0.0/16,fd00:10:244::/56"
ON_8080 = (("http", 8080, "TCP"),)
WEB = service("web")
WEB_5 = slice_of("web", endpoint("10.244.1.5"), ports=ON_8080)
WEB_6 = slice_of("web", endpoint("10.244.1.6"), ports=ON_8080)
SVC = f"KUBE-SVC-{chain_hash('default/web:httptcp')}"
# Somebody else's rules, in tables and chains that are ours too.
FOREIGN = """\
*mangle
:OTHER - [0:0]
-A PREROUTING -j OTHER
COMMIT
*filter
:CNI-FORWARD - [0:0]
-A FORWARD -m comment --comment "somebody else's" -j CNI-FORWARD
-A CNI-FORWARD -s 10.244.0.0/16 -j ACCEPT
COMMIT
*nat
:CNI-OUT - [0:0]
-A POSTROUTING -s 10.244.0.0/16 -j CNI-OUT
-A CNI-OUT -j MASQUERADE
COMMIT
"""
KUBECONFIG = """\
apiVersion: v1
kind: Config
clusters: [{{name: c, cluster: {{server: "{url}"}}}}]
contexts: [{{name: c, context: {{cluster: c, user: u}}}}]
current-context: c
users: [{{name: u, user: {{}}}}]
"""


def a_node_of(variant: str) -> Iterator[Node]:
    try:
        with Node(variant) as made:
            yield made
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def node() -> Iterator[Node]:
    yield from a_node_of("")


@pytest.fixture
def legacy_node() -> Iterator[Node]:
    """One whose rules are looked at with iptables-legacy."""
    yield from a_node_of("legacy")


def started(node: Node, api: Api, *flags: str, **more: Any) -> Proxy:
    """A proxy that has synced."""
    proxy = node.proxy("--master", api.url, CIDRS, *flags, **more)
    proxy.until_synced()
    return proxy


def a_node(zone: str = "z-a", **spec: Any) -> Json:
    labels = {"topology.kubernetes.io/zone": zone}
    addresses = [{"type": "InternalIP", "address": NODE_IP}]
    return {
        "kind": "Node",
        "metadata": {"name": "node1", "labels": labels},
        "spec": spec,
        "status": {"addresses": addresses},
    }


def recorded(family: int) -> Rules:
    name = "iptables" if family == 4 else "ip6tables"
    return normalised(without_counters(parse_saved((RECORDED / f"{name}.txt").read_text())))


def endpoints_of(rules: Rules, service_chain: str = SVC) -> list[str]:
    """The ip:port that a Service's chain leads to, in the order of the rules."""
    nat = rules.get("nat", {})
    found = []
    for rule in nat.get(service_chain, []):
        target = rule.split()[-1]
        if target.startswith("KUBE-SEP-"):
            found += [one.split()[-1] for one in nat[target] if "-j DNAT" in one]
    return found


def until_leads_to(node: Node, *places: str) -> None:
    """Wait until the Service `web` leads there."""
    until(f"web leads to {places}", lambda: endpoints_of(node.rules()) == list(places))


# --- coming up ------------------------------------------------------------------------------


def test_over_the_recorded_cluster_the_kernel_holds_the_recorded_rules(node: Node) -> None:
    proxy = started(node, node.api(*golden()))
    for family in (4, 6):
        assert differences(normalised(node.rules(family)), recorded(family)) == []

    health = proxy.healthz().json
    assert (health["healthy"], health["nodeEligible"]) == (True, True)
    assert all(one["lastUpdated"] > "2020" for one in health["status"].values())
    assert proxy.livez().status == 200
    assert node.get("/proxyMode", proxy.METRICS).body == "iptables"
    shown = node.get("/configz", proxy.METRICS).json["kubeproxy.config.k8s.io"]
    assert (shown["clusterCIDR"], shown["hostnameOverride"]) == (CIDRS.split("=")[1], "node1")


FAMILY = 'ip_family="IPv4"'
TRIGGERED = "endpoints.kubernetes.io/last-change-trigger-time"
# Reference 1.15: the names an operator's dashboards and alerts ask for.
SAMPLES = {
    f"sync_proxy_rules_duration_seconds_count{{{FAMILY}}}": (1, 9),
    f"sync_full_proxy_rules_duration_seconds_count{{{FAMILY}}}": (1, 9),
    f"sync_partial_proxy_rules_duration_seconds_count{{{FAMILY}}}": (1, 9),
    f"sync_proxy_rules_last_timestamp_seconds{{{FAMILY}}}": (1.7e9, 1e11),
    f"sync_proxy_rules_last_queued_timestamp_seconds{{{FAMILY}}}": (1.7e9, 1e11),
    f"network_programming_duration_seconds_count{{{FAMILY}}}": (1, 1),
    f"sync_proxy_rules_endpoint_changes_pending{{{FAMILY}}}": (0, 0),
    f"sync_proxy_rules_endpoint_changes_total{{{FAMILY}}}": (18, 18),
    f"sync_proxy_rules_service_changes_pending{{{FAMILY}}}": (0, 0),
    f"sync_proxy_rules_service_changes_total{{{FAMILY}}}": (25, 25),
    f"sync_proxy_rules_iptables_restore_failures_total{{{FAMILY}}}": (0, 0),
    f"sync_proxy_rules_iptables_partial_restore_failures_total{{{FAMILY}}}": (0, 0),
    f'sync_proxy_rules_iptables_total{{{FAMILY},table="nat"}}': (140, 160),
    f'sync_proxy_rules_iptables_total{{{FAMILY},table="filter"}}': (10, 15),
    f'sync_proxy_rules_iptables_last{{{FAMILY},table="nat"}}': (1, 60),
    f'sync_proxy_rules_no_local_endpoints_total{{{FAMILY},traffic_policy="internal"}}': (1, 1),
    f'sync_proxy_rules_no_local_endpoints_total{{{FAMILY},traffic_policy="external"}}': (1, 1),
    'proxy_healthz_total{code="200"}': (1, 1),
    'proxy_livez_total{code="200"}': (1, 1),
    f"conntrack_reconciler_sync_duration_seconds_count{{{FAMILY}}}": (1, 9),
    f"conntrack_reconciler_deleted_entries_total{{{FAMILY}}}": (0, 0),
}


def test_metrics_have_kube_proxys_names_and_tell_the_truth(node: Node) -> None:
    api = node.api(*golden(), service("added", ip="10.96.0.99"))
    proxy = started(node, api)
    proxy.healthz(), proxy.livez()
    added = as_json(slice_of("added", endpoint("10.244.1.99"), ports=ON_8080))
    added["metadata"]["annotations"] = {TRIGGERED: "2026-01-01T00:00:00Z"}
    api.put(added)

    def wrong() -> dict[str, float | None]:
        found = proxy.metrics()
        values = {name: found.get(f"kubeproxy_{name}") for name in SAMPLES}
        return {
            name: value
            for name, value in values.items()
            if value is None or not SAMPLES[name][0] <= value <= SAMPLES[name][1]
        }

    with contextlib.suppress(AssertionError):
        until("the change is counted", lambda: not wrong())
    assert wrong() == {}


def test_rules_wait_for_the_api_and_outlive_it(node: Node) -> None:
    api = node.api(WEB, WEB_5)
    api.stop()
    proxy = node.proxy("--master", api.url, CIDRS)
    proxy.until_said("no rule is written until the registry has been listed")
    assert proxy.livez().status == 200
    assert proxy.healthz().status == 200
    assert "KUBE-" not in node.saved()

    api.start()
    proxy.until_synced()
    before = node.saved()
    until_leads_to(node, "10.244.1.5:8080")

    api.stop()
    proxy.until_said("the rules stay as they are")
    assert (proxy.healthz().status, node.saved()) == (200, before)

    api.put(WEB_6)  # nobody is told
    api.start()
    until_leads_to(node, "10.244.1.6:8080")
    proxy.until_said("the registry is up to date again")


def test_a_quiet_cluster_is_no_trouble(node: Node) -> None:
    proxy = started(node, node.api(WEB, WEB_5))
    age = 'kdns_source_last_event_age_seconds{source="kubernetes"}'
    until("3.5 s of silence", lambda: proxy.metric(age) > 3.5)
    assert "silent" not in proxy.log


def test_no_rule_is_written_before_the_node_is_known_where_its_pod_cidr_matters(
    node: Node,
) -> None:
    api = node.api(WEB, WEB_5)
    proxy = node.proxy("--master", api.url, "--detect-local-mode=NodeCIDR")
    proxy.until_said("there is no Node 'node1' yet", "no rule is written")
    assert "KUBE-" not in node.saved()

    api.put(a_node(podCIDRs=["10.244.1.0/24"]))
    proxy.until_synced()
    assert any("! -s 10.244.1.0/24" in rule for rule in node.rules()["nat"][SVC])

    api.put(a_node(podCIDRs=["10.244.7.0/24"]))
    assert proxy.wait() == 1
    assert "kdns: the Pod CIDRs of Node node1 have changed" in proxy.log


# --- leaving, and coming back ---------------------------------------------------------------


def test_a_restart_harms_no_connection(node: Node) -> None:
    """SIGTERM leaves the rules, and the next start writes over them without a gap."""
    with node.server("10.244.1.5", 8080):
        api = node.api(WEB, WEB_5)
        first = started(node, api)
        before = node.saved()
        with node.connect("10.96.0.50", 80) as old, _connecting(node) as results:
            old.sendall(b"before")
            assert old.recv(10) == b"before"
            assert first.stop() == 0
            assert node.saved() == before
            while_down = len(results)
            until("a connection while no proxy runs", lambda: len(results) > while_down)

            api.put(service("other", ip="10.96.0.51"))
            second = started(node, api)
            assert "default/other:http has no endpoints" in node.saved()
            at_last = len(results)
            until("a connection afterwards", lambda: len(results) > at_last)
            old.sendall(b"after")
            assert old.recv(10) == b"after"
            assert second.alive
        assert set(results) == {"hello"}


@contextlib.contextmanager
def _connecting(node: Node) -> Iterator[list[str]]:
    """Connect to the Service web over and over; yields what became of it so far."""
    results: list[str] = []
    stop = threading.Event()

    def connect() -> None:
        while not stop.is_set():
            try:
                with node.connect("10.96.0.50", 80) as one:
                    # A reply each time: else the endpoint's queue of connections overflows.
                    one.sendall(b"hello")
                    results.append(one.recv(10).decode())
            except OSError as error:
                results.append(str(error))

    thread = threading.Thread(target=connect)
    thread.start()
    try:
        yield results
    finally:
        stop.set()
        thread.join()


def test_once_dry_run_init_only_and_cleanup(node: Node, tmp_path: Path) -> None:
    api = node.api(*golden())
    node.run("iptables-restore", text=FOREIGN)
    node.run("ip6tables-restore", text=FOREIGN.replace("10.244.0.0/16", "fd00::/8"))
    before = node.saved(), node.saved(6)

    node.run("sh", "-c", f"echo 0 >{ROUTE_LOCALNET}")
    for flag in ("--dry-run", "--init-only"):
        proxy = node.proxy("--master", api.url, CIDRS, flag)
        assert proxy.wait() == 0, proxy.log
        assert (node.saved(), node.saved(6)) == before
    # /proc/sys/net/ipv4/conf is the node's own.
    assert node.run("cat", ROUTE_LOCALNET) == "1\n"

    once = node.proxy("--master", api.url, CIDRS, "--once")
    assert once.wait() == 0, once.log
    written = node.saved(), node.saved(6)
    for family, text in zip((4, 6), written, strict=True):
        assert all(text.count(one) == 1 for one in ("-j OTHER", "-j CNI-FORWARD", "-j CNI-OUT"))
        found = [one for one in normalised(parse_saved(text))["nat"] if one.startswith("KUBE-SVC")]
        assert found == [one for one in recorded(family)["nat"] if one.startswith("KUBE-SVC")]

    cleaned = node.proxy("--cleanup")
    assert cleaned.wait() == 0, cleaned.log
    assert (node.saved(), node.saved(6)) == before


def test_what_a_dry_run_prints_can_be_loaded(node: Node) -> None:
    api = node.api(*golden())
    done = node.kdns("--master", api.url, CIDRS, "--dry-run")
    assert done.returncode == 0
    head, _, rest = done.stdout.partition("\n")
    text, _, text6 = rest.partition("# for ip6tables-restore --noflush\n")
    assert head == "# for iptables-restore --noflush"
    node.run("iptables-restore", "--noflush", text=text)
    node.run("ip6tables-restore", "--noflush", text=text6)
    for family in (4, 6):
        assert differences(normalised(node.rules(family)), recorded(family)) == []


def test_kubeadms_file_is_obeyed_and_a_change_of_it_ends_the_proxy(
    node: Node, tmp_path: Path
) -> None:
    api = node.api(WEB, WEB_5)
    (tmp_path / "kubeconfig").write_text(KUBECONFIG.format(url=api.url))
    file = tmp_path / "config.conf"
    # But for two lines: where the server is, and the table of flows is the whole machine's.
    text = KUBEADM_PROXY.replace("/var/lib/kube-proxy/kubeconfig.conf", f"{tmp_path}/kubeconfig")
    file.write_text(text.replace("maxPerCore: null", "maxPerCore: 0"))
    # As kubeadm's DaemonSet starts it.
    proxy = node.proxy(f"--config={file}", "--hostname-override=node1")
    proxy.until_synced()
    assert "warning" not in proxy.log.lower()
    assert any("! -s 10.244.0.0/16" in rule for rule in node.rules()["nat"][SVC])

    file.write_text(file.read_text().replace("masqueradeAll: false", "masqueradeAll: true"))
    assert proxy.wait() == 1
    assert f"kdns: {file}: the configuration has changed" in proxy.log
    until_leads_to(node, "10.244.1.5:8080")


def test_flags_become_a_file_that_means_the_same(node: Node, tmp_path: Path) -> None:
    api = node.api(WEB, WEB_5)
    (tmp_path / "kubeconfig").write_text(KUBECONFIG.format(url=api.url))
    flags = (
        f"--kubeconfig={tmp_path}/kubeconfig",
        "--masquerade-all",
        "--iptables-sync-period=7s",
        f"--metrics-bind-address={NODE_IP}:9099",
        "--healthz-bind-address=127.0.0.1:8099",
    )
    file = tmp_path / "written.conf"
    assert node.kdns(*flags, f"--write-config-to={file}").returncode == 0
    assert yaml.safe_load(file.read_text())["iptables"]["syncPeriod"] == "7s"

    proxy = node.proxy(f"--config={file}")
    proxy.until_synced()
    head = node.rules()["nat"][SVC][0]
    assert "! -s" not in head and head.endswith("-j KUBE-MARK-MASQ")
    assert node.get("/healthz", 8099).status == 200
    assert node.get("/healthz", 8099, NODE_IP).status == 0
    shown = node.get("/configz", 9099, NODE_IP).json["kubeproxy.config.k8s.io"]
    assert shown["iptables"]["syncPeriod"] == "7s"
    assert node.get("/metrics", proxy.METRICS).status == 0


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_it_leaves_at_once_while_it_waits_for_the_api(node: Node, name: str) -> None:
    proxy = node.proxy("--master", "http://127.0.0.1:1", CIDRS)
    proxy.until_said("no rule is written until")
    proxy.process.send_signal(signal.Signals[name])
    assert proxy.wait() == 0
    assert "Traceback" not in proxy.log


# --- somebody else --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (["iptables -t nat -F", "iptables -t nat -X"], "nat KUBE-MARK-MASQ: gone"),
        ([f"iptables -t nat -F {SVC}"], f"nat {SVC}: empty"),
        (["iptables -t nat -D PREROUTING 1"], "nat PREROUTING: no rule"),
        (["iptables -F KUBE-FORWARD"], "filter KUBE-FORWARD: empty"),
        (["iptables -t mangle -X KUBE-PROXY-CANARY"], "mangle KUBE-PROXY-CANARY: gone"),
    ],
    ids=["nat flushed", "a chain emptied", "a jump deleted", "filter", "canary"],
)
def test_rules_that_somebody_removed_are_back_within_the_sync_period(
    node: Node, harm: list[str], told: str
) -> None:
    proxy = started(node, node.api(WEB, WEB_5), "--iptables-sync-period=300ms")
    before = node.saved()
    for line in harm:
        node.run(*line.split())
    assert node.saved() != before
    until("the rules are back", lambda: node.saved() == before)
    proxy.until_said("changed by somebody else", told)


def test_foreign_rules_are_no_reason_to_write(node: Node) -> None:
    proxy = started(node, node.api(WEB, WEB_5), "--iptables-sync-period=100ms")
    node.run("iptables-restore", "--noflush", text=FOREIGN)
    before = node.saved()
    looks = 'kdns_proxy_verifications_total{ip_family="IPv4",result="same"}'
    seen = proxy.metric(looks)
    until("two more looks", lambda: proxy.metric(looks) >= seen + 2)
    assert proxy.metric(f"kubeproxy_sync_proxy_rules_duration_seconds_count{{{FAMILY}}}") == 1
    assert (node.saved(), "changed by" in proxy.log) == (before, False)


BROKEN_RESTORE = """\
#!/bin/sh
# While the file `{flag}` is there, the nat table's section ends in a rule that no kernel takes:
# the filter table is written, the nat table is not.
[ -e {flag} ] || exec {real} "$@"
awk '/^[*]/ {{ nat = $0 == "*nat" }}
     nat && /^COMMIT/ {{ print "-A KUBE-SERVICES -j KUBE-NOWHERE" }} {{ print }}' |
    {real} "$@"
"""


def test_a_write_that_fails_halfway_leaves_the_old_rules_and_is_made_good(node: Node) -> None:
    flag = node.folder / "broken"
    tool = node.folder / "bin" / "iptables-restore"
    tool.parent.mkdir()
    tool.write_text(BROKEN_RESTORE.format(flag=flag, real=shutil.which("iptables-restore")))
    tool.chmod(0o755)
    api = node.api(WEB, WEB_5)
    proxy = started(node, api, "--iptables-sync-period=300ms", path=str(tool.parent))
    nat = node.rules()["nat"]

    flag.touch()
    api.put(WEB_6)
    said = proxy.until_said("IPv4: sync failed, the rules before stay", "KUBE-NOWHERE")
    assert "next attempt in" in said and " iptables-restore: " in said
    assert node.rules()["nat"] == nat
    failures = f"kubeproxy_sync_proxy_rules_iptables_restore_failures_total{{{FAMILY}}}"
    assert proxy.metric(failures) >= 1
    assert proxy.metric(failures.replace("tables_restore", "tables_partial_restore")) == 1
    # Two sync periods later the node says that it does not keep up.
    until("it is unhealthy", lambda: proxy.healthz().status == 503)
    status = proxy.livez().json["status"]
    assert (status["IPv4"]["healthy"], status["IPv6"]["healthy"]) == (False, True)

    flag.unlink()
    until_leads_to(node, "10.244.1.6:8080")
    proxy.until_said("IPv4: rules written again")
    until("it is healthy", lambda: proxy.healthz().status == 200)


def test_a_held_lock_is_waited_for_told_and_counted(legacy_node: Node) -> None:
    node = legacy_node
    # What makes this a node of iptables-legacy.
    node.run("iptables-legacy", "-A", "FORWARD", "-j", "ACCEPT")
    api = node.api(WEB, WEB_5)
    with node.lock.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        proxy = node.proxy("--master", api.url, CIDRS)
        proxy.until_said("IPv4: sync failed", "lock")
        name = "kdns_proxy_iptables_lock_failures_total"
        assert proxy.metric(f"{name}{{{FAMILY}}}") >= 1
        assert "KUBE-SERVICES" not in node.saved()
    proxy.until_synced()
    assert endpoints_of(node.rules()) == ["10.244.1.5:8080"]


def test_rules_in_the_other_variant_are_named_in_log_and_health(legacy_node: Node) -> None:
    node = legacy_node
    node.run("iptables-legacy", "-t", "nat", "-N", "KUBE-SERVICES")
    node.run("iptables-legacy", "-t", "nat", "-A", "KUBE-SERVICES", "-j", "RETURN")
    # kubelet's mark says which variant this node uses.
    node.run("iptables-nft", "-t", "mangle", "-N", "KUBE-IPTABLES-HINT")
    proxy = started(node, node.api(WEB, WEB_5))
    said = proxy.until_said("rules in both variants", "legacy holds 1 rules, 1 of them in KUBE-")
    answer = proxy.healthz()
    assert (answer.status, said.partition("proxy: ")[2] in answer.body) == (200, True)


# --- bad objects, and many changes ----------------------------------------------------------


def _flap(node: Node, seconds: float, per_second: int) -> None:
    """Have one Service change its endpoint that often; check what that cost, and the end."""
    api = node.api(WEB, WEB_5)
    proxy = started(node, api)
    syncs = f"kubeproxy_sync_proxy_rules_duration_seconds_%s{{{FAMILY}}}"
    start, before = time.monotonic(), proxy.metrics()
    changes = round(seconds * per_second)
    for n in range(changes):
        time.sleep(max(0.0, start + n / per_second - time.monotonic()))  # the pace is the test
        api.put(WEB_6 if n % 2 else WEB_5)
    api.put(slice_of("web", endpoint("10.244.1.7"), ports=ON_8080))
    until_leads_to(node, "10.244.1.7:8080")
    after, passed = proxy.metrics(), time.monotonic() - start
    spent = after[syncs % "sum"] - before[syncs % "sum"]
    count = after[syncs % "count"] - before[syncs % "count"]
    # It rests after a sync as long as that took: at most half of the time goes into them.
    assert 1 <= count <= changes
    assert spent <= passed / 2 + 0.5
    seps = {chain for chain in node.rules()["nat"] if chain.startswith("KUBE-SEP-")}
    assert len(seps) == 1
    assert proxy.healthz().status == 200
    print(f"{changes} changes in {passed:.1f} s: {count:.0f} syncs of {spent:.2f} s")


def test_a_flapping_service_costs_bounded_work_and_ends_right(node: Node) -> None:
    _flap(node, 2.0, 100)


@pytest.mark.soak
@pytest.mark.timeout(120)
def test_a_service_that_flaps_for_a_minute(node: Node) -> None:
    _flap(node, 60.0, 100)


def test_odd_objects_harm_nobody_else(node: Node) -> None:
    long = "l" + "-0" * 31  # 63 characters, all that are legal in a name
    odd: list[Any] = [
        service(long, long, "10.96.0.60", ports=[("p-0123456789abc", 80, "TCP")]),
        slice_of(
            long, endpoint("10.244.1.60"), ns=long, name="slice.with-0.dots",
            ports=(("p-0123456789abc", 1, "TCP"),),
        ),
        # Two that claim one node port, and a third that comes later.
        exposed("claims-a", ip="10.96.0.61", node_port=30061),
        exposed("claims-b", ip="10.96.0.62", node_port=30061),
        slice_of("claims-b", endpoint("10.244.1.62"), ports=ON_8080),
        # Addresses of the wrong kind beside one that is right.
        service("mixed", ip="10.96.0.63"),
        slice_of("mixed", endpoint("fd00::63"), endpoint("10.244.1.63"), ports=ON_8080),
        slice_of("mixed", endpoint("10.244.1.999"), ports=ON_8080, name="nonsense"),
        # The same port twice, and ports that are missing.
        service("twice", ip="10.96.0.64", ports=[("a", 80, "TCP"), ("b", 80, "TCP")]),
        service("empty", ip="10.96.0.65", ports=[]),
        slice_of("empty", endpoint("10.244.1.65"), ports=((None, None, None),)),
        service("sctp", ip="10.96.0.66", ports=[("http", 80, "SCTP")]),
        slice_of("nobody", endpoint("10.244.1.66")),
    ]  # fmt: skip
    api = node.api(WEB, WEB_5, *odd)
    proxy = started(node, api)
    until_leads_to(node, "10.244.1.5:8080")
    rules = node.rules()

    def chain(name: str) -> str:
        return f"KUBE-SVC-{chain_hash(name + 'tcp')}"

    assert endpoints_of(rules, chain(f"{long}/{long}:p-0123456789abc")) == ["10.244.1.60:1"]
    assert endpoints_of(rules, chain("default/mixed:http")) == ["10.244.1.63:8080"]
    proxy.until_said("EndpointSlice default/nonsense", "'10.244.1.999' is not an IP address")
    proxy.until_said("NodePort 30061/tcp is claimed by default/claims-a:http and",
                     "default/claims-b:http gets it")  # fmt: skip

    api.put(exposed("claims-c", ip="10.96.0.67", node_port=30067, externalIPs=["10.96.0.63"]))
    proxy.until_said("10.96.0.63:80/tcp is claimed by", "default/claims-c:http")
    assert proxy.healthz().status == 200
    assert "bug" not in proxy.log


def test_a_service_with_5000_endpoints(node: Node) -> None:
    addresses = [f"10.244.{n >> 8}.{n & 255}" for n in range(5000)]
    slices = [
        slice_of("web", *map(endpoint, addresses[at : at + 100]), ports=ON_8080, name=f"web-{at}")
        for at in range(0, 5000, 100)
    ]
    api = node.api(WEB, *slices)
    started(node, api)
    leads_to = endpoints_of(node.rules())
    assert leads_to == sorted(f"{one}:8080" for one in addresses)

    api.delete(slices[7])
    until("4,900 are left", lambda: len(endpoints_of(node.rules())) == 4900)


def test_endpoints_follow_the_zone_of_the_node(node: Node) -> None:
    def in_zone(ip: str, zone: str) -> dict[str, Any]:
        return endpoint(ip, zone=zone, hints={"forZones": [{"name": zone}]})

    hinted = slice_of(
        "web", in_zone("10.244.1.5", "z-a"), in_zone("10.244.1.6", "z-b"), ports=ON_8080
    )
    api = node.api(WEB, hinted, a_node("z-a"))
    started(node, api)
    until_leads_to(node, "10.244.1.5:8080")
    api.put(a_node("z-b"))
    until_leads_to(node, "10.244.1.6:8080")
    api.put(a_node("z-c"))
    until_leads_to(node, "10.244.1.5:8080", "10.244.1.6:8080")


def test_a_udp_client_moves_on_when_its_endpoint_goes(node: Node) -> None:
    dns = service("dns", ip="10.96.0.53", ports=[("dns", 53, "UDP")])

    def at(ip: str) -> Any:
        return slice_of("dns", endpoint(ip), ports=(("dns", 5353, "UDP"),))

    def ask(text: bytes) -> bytes:
        client.sendall(text)
        return client.recv(99)

    udp = socket.SOCK_DGRAM
    with node.server("10.244.1.5", 5353, udp), node.server("10.244.1.6", 5353, udp):
        api = node.api(dns, at("10.244.1.5"))
        proxy = started(node, api)
        with node.udp("10.96.0.53", 53) as client:
            assert ask(b"one") == b"10.244.1.5 one"
            api.put(at("10.244.1.6"))
            # The endpoint of before still answers, and the client's port is the same.
            until("another answers", lambda: ask(b"two") == b"10.244.1.6 two")
    assert proxy.metric(f"kubeproxy_conntrack_reconciler_deleted_entries_total{{{FAMILY}}}") == 1


# --- health ---------------------------------------------------------------------------------


def test_a_load_balancer_hears_whether_the_node_has_endpoints(node: Node) -> None:
    lb = exposed("web", node_port=30088, vips=["192.0.2.88"], externalTrafficPolicy="Local",
                 healthCheckNodePort=32088)  # fmt: skip

    def on(name: str) -> Any:
        one = endpoint("10.244.1.5", nodeName=name)
        return slice_of("web", one, ports=ON_8080)

    api = node.api(lb, on("node1"), a_node())
    proxy = started(node, api)
    until("the port answers", lambda: node.get("/", 32088, NODE_IP).status)
    answer = node.get("/healthz", 32088, NODE_IP)
    assert (answer.status, answer.headers["X-Load-Balancing-Endpoint-Weight"]) == (200, "1")
    assert answer.json == {
        "service": {"namespace": "default", "name": "web"},
        "localEndpoints": 1,
        "serviceProxyHealthy": True,
    }

    api.put(on("node2"))
    until("503", lambda: node.get("/", 32088, NODE_IP).status == 503)
    assert node.get("/", 32088).headers["X-Load-Balancing-Endpoint-Weight"] == "0"

    api.put(a_node(taints=[{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]))
    until("not eligible", lambda: proxy.healthz().status == 503)
    assert (proxy.healthz().json["nodeEligible"], proxy.livez().status) == (False, 200)

    api.delete(lb)
    until("the port is closed", lambda: node.get("/", 32088).status == 0)


def test_a_taken_address_is_waited_for(node: Node) -> None:
    holder = node.inside(listen, "127.0.0.1", 10249, socket.SOCK_STREAM)
    proxy = started(node, node.api(WEB, WEB_5))
    proxy.until_said("cannot listen on 127.0.0.1:10249: Address already in use", "trying again")
    until_leads_to(node, "10.244.1.5:8080")
    holder.close()
    until("/metrics answers", lambda: node.get("/metrics", 10249).status == 200)


def test_a_taken_address_ends_the_start_where_it_is_told_to(node: Node) -> None:
    with node.inside(listen, "127.0.0.1", 10249, socket.SOCK_STREAM):
        proxy = node.proxy("--master", "http://127.0.0.1:1", CIDRS, "--bind-address-hard-fail")
        assert proxy.wait() != 0
    assert proxy.log.splitlines()[-1].startswith("kdns: ")
    assert "cannot listen on 127.0.0.1:10249: Address already in use" in proxy.log.splitlines()[-1]
    assert "Traceback" not in proxy.log
    assert "KUBE-" not in node.saved()


# --- a node that is not made for it ---------------------------------------------------------

CAPABILITIES = ["setpriv", "--inh-caps=-all", "--bounding-set"]
NO_PROGRAMS = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs x /usr/sbin && exec "$@"', "sh"]


@pytest.mark.parametrize("flag", ["--once", "--cleanup", "--iptables-sync-period=30s"])
@pytest.mark.parametrize(
    ("prefix", "told"),
    [
        ([*CAPABILITIES, "-all"], "NET_ADMIN"),
        (NO_PROGRAMS, "install the package iptables"),
    ],
    ids=["no permission", "no programs"],
)
def test_what_the_node_lacks_is_said_in_one_line(
    node: Node, prefix: list[str], told: str, flag: str
) -> None:
    proxy = node.proxy("--master", "http://127.0.0.1:1", CIDRS, flag, prefix=prefix)
    assert proxy.wait() == 1, proxy.log
    last = proxy.log.splitlines()[-1]
    assert last.startswith("kdns: ") and told in last
    assert "Traceback" not in proxy.log


NO_NAT = """\
#!/bin/sh
case "$*" in *--version) exec {real} "$@";; esac
echo "can't initialize ip6tables table \\`nat': Table does not exist" >&2
exit 3
"""


def test_a_kernel_without_ipv6_nat_has_ipv4_all_the_same(node: Node) -> None:
    """Such a node must not look as if its rules did not keep up: load balancers would leave it."""
    (node.folder / "bin").mkdir()
    for name in ("ip6tables", "ip6tables-restore"):
        tool = node.folder / "bin" / name
        tool.write_text(NO_NAT.format(real=shutil.which(name)))
        tool.chmod(0o755)
    proxy = started(node, node.api(WEB, WEB_5), path=str(node.folder / "bin"))
    proxy.until_said("no Service is forwarded to over IPv6, this kernel cannot", "not exist")
    until_leads_to(node, "10.244.1.5:8080")
    answer = proxy.healthz()
    assert (answer.status, list(answer.json["status"])) == (200, ["IPv4"])
    assert "forwarded to over IPv6" in str(answer.json["notes"])
    assert "ERROR" not in proxy.log


def test_the_capability_net_admin_is_enough(node: Node) -> None:
    """As deploy/ grants it: nothing else of root."""
    proxy = started(node, node.api(WEB, WEB_5), prefix=[*CAPABILITIES, "-all,+net_admin"])
    until_leads_to(node, "10.244.1.5:8080")
    assert "ERROR" not in proxy.log


def test_manifests_are_followed_without_a_cluster(node: Node, tmp_path: Path) -> None:
    def write(replicas: int) -> None:
        pods = "".join(
            f"---\n{{apiVersion: v1, kind: Pod, metadata: {{name: web-{n}, labels: {{app: web}}}},"
            f" spec: {{containers: [{{name: c, image: i}}]}}}}\n"
            for n in range(replicas)
        )
        text = ("{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {selector:"
                " {app: web}, ports: [{name: http, port: 80, targetPort: 8080}]}}\n")  # fmt: skip
        (tmp_path / "all.yaml").write_text(text + pods)

    write(1)
    proxy = node.proxy("-f", str(tmp_path), CIDRS)
    proxy.until_synced()
    assert len(endpoints_of(node.rules())) == 1
    write(3)
    until("three endpoints", lambda: len(endpoints_of(node.rules())) == 3)
    (tmp_path / "all.yaml").write_text("kind: [\n")
    proxy.until_said("all.yaml")
    assert len(endpoints_of(node.rules())) == 3
    assert proxy.healthz().status == 200
