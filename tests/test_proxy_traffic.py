"""Real packets through a node that `kdns proxy -f FOLDER` keeps: manifests change, users see it.

The process runs in the node of a cluster of network namespaces (netcluster.py). What a test
changes it changes in the folder; everything else happens by itself and is waited for. What
becomes of packets is held against decide() as well, which knows nothing of iptables. All of it
is done in each mode that the proxy has and traffic.TRAITS knows.

Each traffic rule by itself is test_kernel_traffic.py's; what the process does beside
forwarding is test_proxy_daemon.py's.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from forwarding import exposed, slice_of, snapshot_of
from netcluster import (
    CLUSTER_CIDR,
    IN_MACHINE,
    NODE_ADDRESS,
    NODE_NAME,
    OUTSIDE,
    PATIENCE,
    PODS,
    SILENCE,
    NetCluster,
    Reply,
    Unavailable,
    enough,
    pod,
)
from objects import external
from running_proxy import as_json, until
from traffic import (
    CLUSTER_IP,
    DROPPED,
    EXTERNAL_IP,
    FAMILIES,
    LB_IP,
    LB_NODE_PORT,
    LEAVING,
    NODE_PORT,
    PASSED,
    PORT,
    REFUSED,
    TRAITS,
    WHERE,
    Fate,
    Served,
    Traits,
    at,
    backed,
    cluster_or_skip,
    fate_of,
    frontends,
    is_tested_here,
    on,
    own_address,
    served,
    web,
)

from kdns.proxy.options import Family, NodeView
from kdns.proxy.table import Forwarding, FrontendKind, Origin, TableCompiler, decide
from kdns.registry.objects import Object
from kdns.registry.snapshot import everything

ROOT = Path(__file__).parents[1]
# Seconds a change may take; the folder is looked at each second.
SETTLE = 120.0 if IN_MACHINE else 30.0
CIDRS = f"--cluster-cidr={CLUSTER_CIDR[4]},{CLUSTER_CIDR[6]}"
NODE = {
    "kind": "Node",
    "metadata": {"name": NODE_NAME, "labels": {"topology.kubernetes.io/zone": "z-a"}},
    "status": {
        "addresses": [{"type": "InternalIP", "address": ip} for ip in NODE_ADDRESS.values()]
    },
}
VERSIONS = {"EndpointSlice": "discovery.k8s.io/v1"}
ORIGINS: tuple[Origin, ...] = ("pod", "node", "outside")


# What prints a mode's Services.
HOLDERS = {"iptables": "iptables-save", "userspace": "iptables-save", "ipvs": "ipset save",
           "nftables": "nft list ruleset"}  # fmt: skip


class Site:
    """A cluster, and the proxy of its node with the folder it reads."""

    # The hash of conntrack is the whole machine's.
    FLAGS = (f"--hostname-override={NODE_NAME}", "--conntrack-max-per-core=0", "--oom-score-adj=0")

    def __init__(self, cluster: NetCluster, folder: Path, mode: str) -> None:
        self.cluster = cluster
        self.mode = mode
        self.traits = TRAITS[mode]
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0
        (folder / "manifests").mkdir()

    # --- the proxy ----------------------------------------------------------------------

    def put(self, *objects: Object | dict[str, Any]) -> None:
        """Have these in the folder and nothing else, from one moment to the next."""
        items = [as_json(one) for one in (NODE, *objects)]
        for item in items:
            item["apiVersion"] = VERSIONS.get(item["kind"], "v1")
        draft = self.folder / "draft"
        draft.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
        draft.rename(self.folder / "manifests" / "all.json")

    def command(self, *flags: str) -> list[str]:
        """Return the command line of a proxy on the node. It dies with the tests."""
        on_node = [*self.cluster.enter("node"), "setpriv", "--pdeathsig", "KILL"]
        return [*on_node, sys.executable, "-m", "kdns", "proxy", *self.FLAGS,
                f"--proxy-mode={self.mode}", *flags]  # fmt: skip

    def start(self, *flags: str) -> None:
        """Start the proxy and wait for its first sync."""
        self.starts += 1
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                self.command("-f", str(self.folder / "manifests"), *(flags or (CIDRS,))),
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        until("the first sync", self.synced, SETTLE)

    @property
    def log_file(self) -> Path:
        return self.folder / f"{self.starts}.log"

    def synced(self) -> bool:
        assert self.process is not None
        said = self.log_file.read_text()
        assert self.process.poll() is None, said
        return "the rules of this node are up to date" in said

    def end(self, how: signal.Signals) -> int:
        """Send a signal; return the exit status."""
        assert self.process is not None
        self.process.send_signal(how)
        status = self.process.wait(SETTLE)
        self.process = None
        return status

    def finish(self, *flags: str) -> subprocess.CompletedProcess[str]:
        """Run a proxy to its end."""
        return subprocess.run(
            self.command(*flags), capture_output=True, text=True, check=False, timeout=2 * SETTLE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def held(self) -> str:
        """Return what the node holds of IPv4, where Services are in it."""
        return self.cluster.run("node", *HOLDERS[self.mode].split())

    # --- its clients --------------------------------------------------------------------

    def ask(
        self, origin: str, ip: str, port: int, fate: Fate, protocol: str = "tcp", source: str = ""
    ) -> list[Reply]:
        """Ask often enough to meet every endpoint of `fate`."""
        family: Family = 6 if ":" in ip else 4
        return self.cluster.ask(
            WHERE.get(origin, origin), ip, port, protocol,
            times=self.traits.enough(len(fate.endpoints)) if isinstance(fate, Served) else 1,
            sources=[source or own_address(origin, family)],
            timeout=SILENCE if fate == DROPPED else PATIENCE,
        )  # fmt: skip

    def expect(
        self, origin: str, ip: str, port: int, fate: Fate, protocol: str = "tcp", source: str = ""
    ) -> None:
        fate = self.traits.seen(fate)
        found = fate_of(self.ask(origin, ip, port, fate, protocol, source))
        assert found == fate, f"{protocol} from {origin} {source} to {ip} port {port}"

    def soon(
        self, origin: str, ip: str, port: int, fate: Fate, protocol: str = "tcp", source: str = ""
    ) -> None:
        """Wait until it is so."""
        fate = self.traits.seen(fate)
        found: list[Fate] = []

        def so() -> bool:
            found[:] = [fate_of(self.ask(origin, ip, port, fate, protocol, source))]
            return found == [fate]

        try:
            until(f"{protocol} from {origin} to {ip} port {port}: {fate}", so, SETTLE)
        except AssertionError as error:
            raise AssertionError(f"{error}, but {found}\n{self.log_file.read_text()}") from None

    @contextmanager
    def connecting(self, *places: tuple[str, str, int]) -> Iterator[list[Reply]]:
        """Open one connection after the other, to each of (namespace, ip, port) at once; yields
        what became of them so far."""
        replies: list[Reply] = []
        stop = threading.Event()

        def connect(place: tuple[str, str, int]) -> None:
            while not stop.wait(0.2 if IN_MACHINE else 0):  # which must do something else too
                replies.extend(self.cluster.ask(*place, times=5))

        with ThreadPoolExecutor(len(places)) as threads:
            try:
                running = [threads.submit(connect, place) for place in places]
                yield replies
            finally:
                stop.set()
        for one in running:
            one.result()


@pytest.fixture(scope="module")
def cluster() -> Iterator[NetCluster]:
    with cluster_or_skip() as made:
        try:
            made.run("node", "iptables", "-t", "nat", "-S")
        except Unavailable as error:
            pytest.skip(f"no iptables here: {error}")
        yield made


@pytest.fixture(params=[mode for mode in TRAITS if is_tested_here(mode)])
def site(cluster: NetCluster, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Site]:
    try:
        cluster.run("node", "nft", "flush", "ruleset")
    except Unavailable as error:
        if request.param == "nftables":
            pytest.skip(f"no nft here: {error}")
    for program in ("iptables-restore", "ip6tables-restore"):
        cluster.run("node", program, text="*mangle\nCOMMIT\n*filter\nCOMMIT\n*nat\nCOMMIT\n")
    if IN_MACHINE:
        forget_ipvs(cluster)
    cluster.request("node", "forget")
    # The proxy's to set where a mode needs it.
    cluster.request("node", "write", path="/proc/sys/net/ipv4/conf/all/route_localnet", text="0")
    made = Site(cluster, tmp_path, request.param)
    try:
        yield made
    finally:
        if made.process is not None:
            made.end(signal.SIGKILL)


def forget_ipvs(cluster: NetCluster) -> None:
    """Leave nothing of mode ipvs, once there are no rules any more."""
    cluster.run("node", "ipvsadm", "-C")
    cluster.run("node", "ipset", "destroy")
    with suppress(Unavailable):
        cluster.run("node", "ip", "link", "del", "kube-ipvs0")


def dual(name: str = "web", **spec: Any) -> Object:
    """web() with a ClusterIP, a load balancer's and an external address of each family."""
    settings: dict[str, Any] = {
        "ip": list(CLUSTER_IP.values()),
        "node_port": NODE_PORT,
        "vips": list(LB_IP.values()),
        "externalIPs": list(EXTERNAL_IP.values()),
        **spec,
    }
    return exposed(name, **settings)


def ends(*places: tuple[int, int], owner: str = "web", protocol: str = "TCP") -> list[Object]:
    """EndpointSlices of both families. places -- (node, number) of each endpoint"""
    return [
        slice_of(
            owner, *(on(*place, family) for place in places), name=f"{owner}-{family}",
            ports=[("http", 8080, protocol)], family=f"IPv{family}",
        )
        for family in FAMILIES
    ]  # fmt: skip


# --- Changes arrive by themselves -------------------------------------------------------------


def test_walk_through_of_every_kind_of_service(site: Site) -> None:
    both = (at(10), at(10, node=2))
    kinds = ("cluster-ip", "node-port", "load-bal", "external-ip")
    ips = {name: f"10.96.1.{number}" for number, name in enumerate(kinds, 1)}
    site.put(external("google-svc", "google.com"))
    site.start()
    for ip in ips.values():
        site.expect("pod", ip, PORT, PASSED)
    slices = [one for name in kinds for one in ends((1, 10), (2, 10), owner=name)[:1]]
    site.put(
        exposed("cluster-ip", ip=ips["cluster-ip"]),
        exposed("node-port", ip=ips["node-port"], node_port=NODE_PORT),
        exposed("load-bal", ip=ips["load-bal"], node_port=LB_NODE_PORT, vips=[LB_IP[4]]),
        exposed("external-ip", ip=ips["external-ip"], externalIPs=[EXTERNAL_IP[4]]),
        external("google-svc", "google.com"),
        *slices,
    )
    site.soon("pod", ips["cluster-ip"], PORT, served(*both, masquerade=False))
    for ip in ips.values():
        site.expect("pod", ip, PORT, served(*both, masquerade=False))
        site.expect("node", ip, PORT, served(*both, masquerade=True))
    outer = [
        (NODE_ADDRESS[4], NODE_PORT),
        (NODE_ADDRESS[4], LB_NODE_PORT),
        (LB_IP[4], PORT),
        (EXTERNAL_IP[4], PORT),
    ]
    for origin, (ip, port) in product(("pod", "outside"), outer):
        site.expect(origin, ip, port, served(*both, masquerade=True))
    on_localhost = served(*both, masquerade=True) if site.traits.on_localhost else REFUSED
    site.expect("localhost", "127.0.0.1", NODE_PORT, on_localhost)
    hairpin = Served({both[0]: True, both[1]: False})
    site.expect("pod-a", ips["cluster-ip"], PORT, hairpin)
    held = site.held()
    assert ("default/node-port" if site.traits.names_services else ips["node-port"]) in held
    assert "google-svc" not in held

    site.put(exposed("cluster-ip", ip=ips["cluster-ip"]), *slices[:1])
    site.soon("outside", NODE_ADDRESS[4], NODE_PORT, REFUSED)
    site.expect("outside", LB_IP[4], PORT, PASSED)
    site.expect("pod", ips["cluster-ip"], PORT, served(*both, masquerade=False))


def test_scaled_to_zero_is_refused_and_back_again_is_served(site: Site) -> None:
    ports = [(name, 80, name.upper()) for name in ("tcp", "udp", "sctp")]
    service = dual(ports=ports)

    def behind(*numbers: int) -> list[Object]:
        return [
            slice_of(
                "web", *(on(1, number, family) for number in numbers), name=f"web-{family}",
                ports=[(name, 8080, protocol) for name, _, protocol in ports],
                family=f"IPv{family}",
            )
            for family in FAMILIES
        ]  # fmt: skip

    site.put(service, *behind(10, 20))
    site.start()
    for numbers in ((10, 20), (), (11,)):
        site.put(service, *behind(*numbers))
        for family, (protocol, _, _) in product(FAMILIES, ports):
            fate: Fate = served(*(at(n, family) for n in numbers), masquerade=False)
            if not numbers:
                fate = REFUSED
            if not site.traits.carries(protocol):
                fate = PASSED  # such Services are told of in the log
            site.soon("pod", CLUSTER_IP[family], PORT, fate, protocol)
            if not numbers:
                site.expect("outside", NODE_ADDRESS[family], NODE_PORT, REFUSED, "tcp")
                site.expect("outside", LB_IP[family], PORT, fate, protocol)


def test_udp_clients_follow_a_server_that_moves_and_learn_when_it_ends(site: Site) -> None:
    """Clients that never change their port, as DNS and syslog clients do: their flows are
    known to conntrack, and no rule is asked about them again."""
    service = dual(ports=[("http", 80, "UDP")])
    site.put(service, *ends((1, 10), protocol="UDP"))
    site.start()
    clients = [
        (
            family,
            site.cluster.open("client" if kind == "cluster IP" else "outside", ip, port, "udp"),
        )
        for family in FAMILIES
        for kind, ip, port in frontends(family)
    ]

    def moved(node: int, number: int) -> Callable[[], bool]:
        return lambda: all(one.again().at == at(number, f, node) for f, one in clients)

    assert moved(1, 10)()
    for place in ((2, 10), (1, 20)):
        site.put(service, *ends(place, protocol="UDP"))
        until("every client's flow moves on", moved(*place), SETTLE)
    site.put(service)
    until(
        "every client is refused",
        lambda: {one.again().outcome for _, one in clients} == {"refused"},
        SETTLE,
    )
    for _, one in clients:
        one.close()


def test_policies_and_source_ranges_take_effect_while_it_runs(site: Site) -> None:
    here, there = at(10), at(10, node=2)
    within = OUTSIDE[4][0]
    both = [backed(on(1, 10), on(2, 10))]
    site.put(web(), *both)
    site.start()
    site.expect("outside", LB_IP[4], PORT, served(here, there, masquerade=True))

    site.put(web(externalTrafficPolicy="Local"), *both)
    site.soon("outside", LB_IP[4], PORT, served(here, masquerade=False))
    inside = (here,) if site.traits.local_for_all else (here, there)
    site.expect("pod", LB_IP[4], PORT, served(*inside, masquerade=False))

    site.put(web(externalTrafficPolicy="Local"), backed(on(2, 10)))
    site.soon("outside", LB_IP[4], PORT, DROPPED)
    site.expect("outside", NODE_ADDRESS[4], NODE_PORT, DROPPED)
    site.expect("pod", LB_IP[4], PORT, served(there, masquerade=False))

    site.put(web(internalTrafficPolicy="Local"), *both)
    site.soon("pod", CLUSTER_IP[4], PORT, served(here, masquerade=False))
    site.expect("outside", LB_IP[4], PORT, served(here, there, masquerade=True))

    site.put(web(loadBalancerSourceRanges=["203.0.113.0/24"]), *both)
    site.soon("outside", LB_IP[4], PORT, site.traits.out_of_ranges)
    open_to = served(here, there, masquerade=True)
    site.expect("outside", LB_IP[4], PORT, open_to, source=within)
    site.expect("outside", EXTERNAL_IP[4], PORT, open_to)


# --- What goes on while it is restarted -------------------------------------------------------


def test_neither_a_crash_nor_a_restart_nor_an_end_harms_a_connection(site: Site) -> None:
    """But where they go through the process: those end with it, which the client learns at
    once, and are refused until it is back."""
    lasting = site.traits.outlives_proxy
    site.put(dual(), *ends((1, 10), (2, 10)))
    site.start()
    connections = [
        site.cluster.open(where, ip, port)
        for where in ("client", "node", "outside")
        for family in FAMILIES
        for _, ip, port in frontends(family)
    ]
    before = [one.again() for one in connections]
    assert {reply.outcome for reply in before} == {"answered"}
    places = [("pod-b", CLUSTER_IP[4], PORT), ("neighbour", NODE_ADDRESS[6], NODE_PORT)]
    with site.connecting(*places) as replies:
        assert site.end(signal.SIGKILL) == -signal.SIGKILL
        while_down = len(replies)
        # Nobody sees this happen.
        site.put(dual(), *ends((2, 11)))
        until("connections while no proxy runs", lambda: len(replies) > while_down + 20)
        site.start()
        site.soon("pod", CLUSTER_IP[4], PORT, served(at(11, node=2), masquerade=False))
        site.soon("outside", LB_IP[6], PORT, served(at(11, 6, node=2), masquerade=True))
        new = [site.cluster.open(where, CLUSTER_IP[4], PORT) for where in ("client", "node")]
        assert {one.again().outcome for one in new} == {"answered"}
        assert site.end(signal.SIGTERM) == 0
        at_last = len(replies)
        until("connections after its end", lambda: len(replies) > at_last + 20)
    afterwards = [one.again() for one in connections]
    if lasting:
        assert {reply.outcome for reply in replies} == {"answered"}
        # The endpoints left their Service, but not those who were at them.
        with_old = [(reply.at, reply.peer) for reply in before]
        assert [(reply.at, reply.peer) for reply in afterwards] == with_old
        assert {one.again().outcome for one in new} == {"answered"}
    else:
        ended = {"closed", "ECONNRESET"}
        assert {reply.outcome for reply in replies} <= {"answered", "refused", *ended}
        assert {reply.outcome for reply in (*afterwards, *(one.again() for one in new))} <= ended
    for one in (*connections, *new):
        one.close()
    for family in FAMILIES:
        fate = served(at(11, family, node=2), masquerade=True)
        for _, ip, port in frontends(family):
            site.expect("outside", ip, port, fate if lasting else REFUSED)


def test_clients_with_affinity_stay_where_they_are_over_changes_and_restarts(site: Site) -> None:
    service = web(sessionAffinity="ClientIP")
    some = [on(1, number) for number in (10, 11, 20)]
    other = exposed("other", ip="10.96.0.90"), backed(on(1, 12), owner="other")
    sources = [pod(number) for number in PODS["client"][1:]]

    def chosen() -> list[str]:
        replies = site.cluster.ask("client", CLUSTER_IP[4], PORT, sources=sources)
        return [reply.at for reply in replies]

    site.put(service, backed(*some))
    site.start()
    first = chosen()
    # 20 clients at one of three endpoints: one time in 10^9.
    assert len(set(first)) > 1
    site.put(service, backed(*some, on(2, 10)), *other)
    site.soon("pod", "10.96.0.90", PORT, served(at(12), masquerade=False))
    assert chosen() == first
    site.end(signal.SIGTERM)
    site.start()
    # A process that remembers by itself has forgotten: it takes four endpoints in turn now.
    again = chosen()
    assert (again == first) == site.traits.memory_outlives_proxy
    assert chosen() == again


def test_draining_endpoint_keeps_its_connections_and_gets_no_new_ones(site: Site) -> None:
    site.put(web(), backed(on(1, 10), on(1, 20)))
    site.start()
    opened = [site.cluster.open("client", CLUSTER_IP[4], PORT) for _ in range(enough(2))]
    before = [one.again() for one in opened]
    assert {reply.at for reply in before} == {at(10), at(20)}
    site.put(web(), backed(on(1, 10, conditions=LEAVING), on(1, 20)))
    site.soon("pod", CLUSTER_IP[4], PORT, served(at(20), masquerade=False))
    assert [one.again() for one in opened] == before
    # The last one that leaves serves on, as long as there is no other.
    site.put(web(), backed(on(1, 10, conditions=LEAVING)))
    site.soon("pod", CLUSTER_IP[4], PORT, served(at(10), masquerade=False))
    for one in opened:
        one.close()


SWITCHES = [("iptables", "nftables"), ("nftables", "iptables"), ("iptables", "userspace"),
            ("userspace", "nftables")]  # fmt: skip
IPVS_SWITCHES = [("iptables", "ipvs"), ("ipvs", "iptables")]


@pytest.mark.parametrize(("old", "new"), IPVS_SWITCHES if IN_MACHINE else SWITCHES, ids=str)
def test_another_mode_takes_over_and_leaves_nothing_of_the_old_one(
    cluster: NetCluster, tmp_path: Path, old: str, new: str
) -> None:
    site = Site(cluster, tmp_path, old)
    cluster.run("node", "nft", "flush", "ruleset")
    cluster.request("node", "forget")
    try:
        site.put(dual(), *ends((1, 10), (2, 10)))
        site.start()
        connection = cluster.open("outside", LB_IP[4], PORT)
        before = connection.again()
        assert site.end(signal.SIGTERM) == 0
        site.mode, site.traits = new, TRAITS[new]
        with site.connecting(("pod-b", CLUSTER_IP[4], PORT)) as replies:
            site.start()
            until("the old mode's rules are gone", lambda: not left_of(site, old), SETTLE)
            taken_over = len(replies)
            until("connections by the new ones", lambda: len(replies) > taken_over + 20, SETTLE)
        if old != "userspace":  # there they went through the process that ended
            assert {reply.outcome for reply in replies} == {"answered"}
        if old not in ("userspace", "ipvs"):  # or are IPVS's own
            again = connection.again()
            assert (again.at, again.peer) == (before.at, before.peer)
        connection.close()
        fate = served(at(10, node=1), at(10, node=2), masquerade=True)
        site.expect("outside", NODE_ADDRESS[4], NODE_PORT, fate)
        assert site.end(signal.SIGTERM) == 0
        assert site.finish("--cleanup").returncode == 0
        assert not any(left_of(site, mode) for mode in TRAITS)
        assert "KUBE-" not in cluster.run("node", "iptables-save")
        expect_nothing_forwarded(site)
    finally:
        if site.process is not None:
            site.end(signal.SIGKILL)


# What only one mode has.
SIGNS = {"iptables": ":KUBE-SVC-", "userspace": ":KUBE-PORTALS-", "nftables": "kube-proxy {",
         "ipvs": "KUBE-IPVS-"}  # fmt: skip


def rules_of(site: Site, mode: str) -> str:
    """Return what the kernel has in the way in which a mode writes rules."""
    argv = ("nft", "list", "ruleset") if mode == "nftables" else ("iptables-save",)
    return site.cluster.run("node", *argv)


def left_of(site: Site, mode: str) -> bool:
    """Whether a mode's rules are on the node."""
    held = rules_of(site, mode)
    if mode == "ipvs" and IN_MACHINE:
        held += site.cluster.run("node", "ipset", "save")
        if "kube-ipvs0" in site.cluster.run("node", "ip", "link"):
            return True
    return SIGNS[mode] in held


def test_cleanup_ends_forwarding(site: Site) -> None:
    site.put(dual(), *ends((1, 10)))
    site.start()
    site.expect("outside", NODE_ADDRESS[4], NODE_PORT, served(at(10), masquerade=True))
    assert site.end(signal.SIGTERM) == 0
    done = site.finish("--cleanup")
    assert done.returncode == 0, done.stderr
    expect_nothing_forwarded(site)


def expect_nothing_forwarded(site: Site) -> None:
    for family in FAMILIES:
        for kind, ip, port in frontends(family):
            fate = REFUSED if kind == "node port" else PASSED
            site.expect("pod", ip, port, fate)
            site.expect("outside", ip, port, fate)


# --- Others write rules, too ------------------------------------------------------------------

# At the hooks and priorities that each mode has rules at.
OTHERS = """\
table ip somebody {
	chain forward {
		type filter hook forward priority filter; policy accept;
		ip saddr 192.0.2.1 drop
	}

	chain prerouting {
		type nat hook prerouting priority dstnat; policy accept;
		tcp dport 9 redirect to :10
	}

	chain output {
		type nat hook output priority -100; policy accept;
		tcp dport 9 redirect to :10
	}

	chain postrouting {
		type nat hook postrouting priority srcnat; policy accept;
		ip saddr 192.0.2.1 masquerade
	}
}
table inet guard {
	chain input {
		type filter hook input priority filter; policy accept;
		ip saddr 192.0.2.1 drop
	}
}
"""


needs_nft = pytest.mark.skipif(shutil.which("nft") is None, reason="no nft here")


@needs_nft
def test_a_table_of_others_at_the_same_hooks_is_in_nobodys_way_and_stays(site: Site) -> None:
    def theirs() -> str:
        tables = ("ip", "somebody"), ("inet", "guard")
        return "".join(site.cluster.run("node", "nft", "list", "table", *one) for one in tables)

    site.cluster.run("node", "nft", "-f", "-", text=OTHERS)
    before = theirs()
    site.put(web(), backed(on(1, 10)))
    site.start()
    for kind, ip, port in frontends(4):
        site.expect("pod", ip, port, served(at(10), masquerade=kind != "cluster IP"))
        site.expect("outside", ip, port, served(at(10), masquerade=True))
    site.put(web(), backed(on(1, 20)))
    site.soon("outside", LB_IP[4], PORT, served(at(20), masquerade=True))
    assert theirs() == before
    assert site.end(signal.SIGTERM) == 0
    assert site.finish("--cleanup").returncode == 0
    assert theirs() == before


@needs_nft
def test_rules_that_another_program_flushed_are_back_by_themselves(site: Site) -> None:
    period = {"syncPeriod": "300ms"}
    config = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
        "mode": site.mode, "hostnameOverride": NODE_NAME, "oomScoreAdj": 0,
        "clusterCIDR": ",".join(CLUSTER_CIDR.values()), "conntrack": {"maxPerCore": 0},
        "iptables": period, "nftables": period, "ipvs": period,
    }  # fmt: skip
    file = site.folder / "config.json"
    file.write_text(json.dumps(config))
    site.put(web(), backed(on(1, 10)))
    site.start(f"--config={file}")
    site.expect("outside", LB_IP[4], PORT, served(at(10), masquerade=True))
    for _ in range(2):
        assert SIGNS[site.mode] in rules_of(site, site.mode)
        site.cluster.run("node", "nft", "flush", "ruleset")
        until("it is told", lambda: "changed by somebody else" in site.log_file.read_text(), SETTLE)
        until("they are back", lambda: SIGNS[site.mode] in rules_of(site, site.mode), SETTLE)
        site.soon("outside", LB_IP[4], PORT, served(at(10), masquerade=True))


# --- decide() and the kernel ------------------------------------------------------------------

# Where the endpoints of a Service are -> (node, number, leaving) of each.
SPREAD: Mapping[str, list[tuple[int, int, bool]]] = {
    "both": [(1, 10, False), (2, 10, False)],
    "here": [(1, 10, False), (1, 20, False)],
    "there": [(2, 10, False)],
    "leaving": [(1, 10, True), (2, 10, False)],
    "nobody": [],
}
# Flags -> how decide() is told of them.
SETTINGS: Mapping[tuple[str, ...], dict[str, bool]] = {
    (CIDRS,): {},
    (CIDRS, "--masquerade-all"): {"masquerade_all": True},
    ("--detect-local-mode=ClusterCIDR",): {"detects": False},
}


def every_service() -> list[Object]:
    """A Service for each two policies and spread of endpoints, with all frontends in both
    families; its protocol is one of three in turn."""
    objects: list[Object] = []
    policies = ("Cluster", "Local")
    for n, (inner, outer, spread) in enumerate(product(policies, policies, SPREAD), 1):
        name, protocol = f"web-{n}", ("TCP", "UDP", "SCTP")[n % 3]
        service = dual(
            name, ip=[f"10.96.2.{n}", f"fd00:10:96::2:{n}"], node_port=30100 + n,
            vips=[f"192.0.2.{100 + n}", f"2001:db8:2::1:{n}"],
            externalIPs=[f"192.0.2.{200 + n}", f"2001:db8:2::2:{n}"],
            ports=[("http", 80, protocol)],
            internalTrafficPolicy=inner, externalTrafficPolicy=outer,
        )  # fmt: skip
        objects.append(service)
        for family in FAMILIES:
            behind = [
                on(node, number, family, LEAVING if leaving else None)
                for node, number, leaving in SPREAD[spread]
            ]
            objects.append(
                slice_of(
                    name, *behind, name=f"{name}-{family}", ports=[("http", 8080, protocol)],
                    family=f"IPv{family}",
                )
            )  # fmt: skip
    return objects


def decided(
    forwarding: Forwarding, kind: FrontendKind, origin: Origin, traits: Traits, **settings: bool
) -> Fate | None:
    """Return what decide() says, in a client's terms and as far as the mode can follow it; None
    if a client could not tell."""
    if not traits.carries(forwarding.protocol):  # on the node it is another's to answer
        return None if kind == "node port" else PASSED
    decision = decide(forwarding, kind, origin, **settings)
    if decision.verdict == "drop":
        return traits.none_inside if kind == "cluster IP" else DROPPED
    if decision.verdict == "reject":
        # The one exception (reference 1.3), of iptables: OUTPUT does not lead to
        # KUBE-EXTERNAL-SERVICES, so what the node itself sends to an address outside it leaves,
        # and is nobody's here.
        outside = origin == "node" and kind in ("external IP", "loadbalancer IP")
        return traits.node_beside if outside else REFUSED
    chosen = decision.endpoints
    if traits.local_for_all and kind != "cluster IP" and forwarding.external_local:
        chosen = forwarding.local or chosen
    far = any(not endpoint.local for endpoint in chosen)
    if origin == "outside" and far and not decision.masquerade and traits.keeps_source:
        return None  # the other node would answer it directly, from an address it did not ask
    return traits.seen(served(*map(str, chosen), masquerade=decision.masquerade))


@pytest.mark.parametrize("flags", SETTINGS, ids=["detector", "masquerade-all", "no-detector"])
def test_packets_go_where_decide_says(site: Site, flags: tuple[str, ...]) -> None:
    objects = every_service()
    site.put(*objects)
    site.start(*flags)
    snapshot = snapshot_of(*objects)
    # What the other flags change is the same in both.
    families = FAMILIES if flags == (CIDRS,) else FAMILIES[:1]
    wrong: list[str] = []
    asked = dict.fromkeys(ORIGINS, 0)

    def compare(origin: Origin) -> None:
        for family in families:
            node = NodeView(NODE_NAME, NODE_ADDRESS[family], "z-a")
            compiler = TableCompiler(family, node)
            compiler.update(snapshot, everything(snapshot))
            for one in compiler.table:
                for place in one.frontends:
                    fate = decided(one, place.kind, origin, site.traits, **SETTINGS[flags])
                    if fate is None:
                        continue
                    ip = place.address or NODE_ADDRESS[family]
                    found = fate_of(site.ask(origin, ip, place.port, fate, one.protocol))
                    asked[origin] += 1
                    if found != fate:
                        wrong.append(f"{one.name} {origin} -> {place}: {found}, decide {fate}")

    # Each origin is another namespace, and most of the time is spent where nobody answers. But
    # whose turn it is where endpoints are taken in turn depends on who else asks: two that ask
    # in step may each meet one endpoint alone.
    in_turn = site.mode in ("ipvs", "userspace")
    with ThreadPoolExecutor(1 if in_turn else len(ORIGINS)) as threads:
        list(threads.map(compare, ORIGINS))
    assert not wrong, "\n".join(wrong)
    # Of one Service in three no node port is asked where SCTP is not carried.
    ports = 20 * 4 - (0 if site.traits.carries_sctp else 7)
    assert asked["pod"] == asked["node"] == ports * len(families)
    # Without a detector, six ClusterIPs with endpoints on the other node are not asked.
    detects = SETTINGS[flags].get("detects", True) or not site.traits.keeps_source
    unasked = 0 if detects else 6
    assert asked["outside"] == (ports - unasked) * len(families)
