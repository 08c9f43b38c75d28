"""Real packets through real IPVS, and what becomes of it when somebody interferes.

What it does as every mode does is test_kernel_traffic.py's, in its parameter ipvs.

Few kernels that run tests have IPVS: .ci/ipvs_vm.py (`make test-ipvs`) runs this in a small
virtual machine. Elsewhere all but the error that says so is skipped.
"""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import pytest
from forwarding import exposed, snapshot_of
from ipvs_node import IpvsNode, node_or_skip
from netcluster import (
    BRIDGE_ADDRESS,
    CLUSTER_CIDR,
    IN_MACHINE,
    NODE_ADDRESS,
    NODE_NAME,
    PATIENCE,
    PODS,
    SILENCE,
    NetCluster,
    Reply,
    enough,
    pod,
)
from running_proxy import until
from traffic import (
    CLUSTER_IP,
    DROPPED,
    FAMILIES,
    PORT,
    REFUSED,
    WHERE,
    Fate,
    Served,
    at,
    backed,
    cluster_or_skip,
    fate_of,
    on,
    own_address,
    served,
    web,
)

from kdns.errors import ApplyError
from kdns.kernel.ipvs import IpvsDataplane
from kdns.kernel.ipvs_netlink import HeldReal, HeldVirtual, addresses_by_place, held_servers
from kdns.proxy.config import SCHEDULERS
from kdns.proxy.ipvs import At, IpvsSettings, host_view, render_rules
from kdns.proxy.options import Detector, Family, NodeView, Options
from kdns.proxy.table import TableCompiler
from kdns.registry.objects import Object
from kdns.registry.snapshot import Changes, Snapshot, everything

DEFAULTS = IpvsSettings()


class Site:
    """The cluster with IPVS in its node, as scenarios talk to them."""

    def __init__(self, cluster: NetCluster, node: IpvsNode) -> None:
        self.cluster = cluster
        self.node = node
        self.snapshot = Snapshot()
        self.compilers: dict[Family, TableCompiler] = {}
        self.options: dict[Family, Options] = {}

    def load(
        self,
        *objects: Object,
        settings: IpvsSettings = DEFAULTS,
        families: Iterable[Family] = (4,),
    ) -> None:
        """Start a proxy with these objects."""
        self.node.settings = settings
        self.snapshot = snapshot_of(*objects)
        self.compilers.clear()
        for family in families:
            self.options[family] = Options(family, detector=Detector("cidr", CLUSTER_CIDR[family]))
            node = NodeView(NODE_NAME, NODE_ADDRESS[family])
            compiler = self.compilers[family] = TableCompiler(family, node)
            compiler.update(self.snapshot, everything(self.snapshot))
            self.node.install(compiler.table, self.options[family])
        self.cluster.request("node", "forget")

    def change(self, *objects: Object) -> None:
        """These are the objects now."""
        before, self.snapshot = self.snapshot, snapshot_of(*objects)
        touched = everything(before).services | everything(self.snapshot).services
        for family, compiler in self.compilers.items():
            changed = compiler.update(self.snapshot, Changes(services=touched))
            self.node.follow(family, compiler.table, changed)

    def run(self, *argv: str) -> str:
        return self.cluster.run("node", *argv)

    def expect(
        self, origin: str, ip: str, port: int, fate: Fate, protocol: str = "tcp", source: str = ""
    ) -> list[Reply]:
        """Ask often enough to meet every endpoint; the kernel must do as `fate` says."""
        family: Family = 6 if ":" in ip else 4
        source = source or own_address(origin, family)
        times = enough(len(fate.endpoints)) if isinstance(fate, Served) else 1
        replies = self.cluster.ask(
            WHERE.get(origin, origin), ip, port, protocol, times=times, sources=[source],
            timeout=SILENCE if fate == DROPPED else PATIENCE,
        )  # fmt: skip
        who = f"{protocol} from {origin} ({source}) to {ip} port {port}"
        assert fate_of(replies) == fate, who
        node = {NODE_ADDRESS[family], BRIDGE_ADDRESS[family]}
        assert {r.peer_ip for r in replies if r.masqueraded} <= node, who
        return replies

    def held_schedulers(self) -> set[str]:
        return {one.scheduler for one in self.servers(4).values()}

    def weights(self, family: Family = 4) -> dict[str, int]:
        """Return real server -> weight behind web()'s ClusterIP."""
        return {
            str(real): state.weight
            for real, state in self.held(family)[CLUSTER_IP[family], PORT].items()
        }

    def held(self, family: Family = 4) -> dict[tuple[str, int], dict[object, HeldReal]]:
        return {
            (at.address, at.port): dict[object, HeldReal](one.reals.items())
            for at, one in self.servers(family).items()
        }

    def servers(self, family: Family) -> dict[At, HeldVirtual]:
        async def ask() -> dict[At, HeldVirtual]:
            return await asyncio.to_thread(held_servers, family)

        return self.node.call(ask())


@pytest.fixture(scope="module")
def cluster() -> Iterator[NetCluster]:
    with cluster_or_skip() as made:
        yield made


@pytest.fixture(scope="module")
def site(cluster: NetCluster) -> Iterator[Site]:
    with node_or_skip(cluster) as node:
        yield Site(cluster, node)
        node.clear()


@pytest.fixture(params=FAMILIES, ids=["ipv4", "ipv6"])
def family(request: pytest.FixtureRequest) -> Family:
    one: Family = request.param
    return one


def test_a_kernel_without_ipvs_is_told_what_it_lacks_and_what_would_work(
    cluster: NetCluster,
) -> None:
    with IpvsNode(cluster) as node:
        try:
            node.probe("wlc")
        except ApplyError as error:
            assert "ip_vs, ip_vs_wlc" in str(error)
            assert "iptables, nftables and userspace" in str(error)
            assert not IN_MACHINE
        else:
            pytest.skip("this kernel has IPVS")
        node.clear()  # there is nothing, and that is no error


# --- Who is served, by whom, and under which address ------------------------------------------


def test_other_ports_of_a_vip_do_not_lead_to_the_node(site: Site, family: Family) -> None:
    """What listens on the node listens on the VIP too, since that is bound (#72236)."""
    site.load(web(family), backed(on(1, 10, family), family=family), families=[family])
    for origin in ("pod", "outside", "node"):
        site.expect(origin, CLUSTER_IP[family], 22, REFUSED)


def test_a_client_with_affinity_stays_until_its_last_flow_is_forgotten(site: Site) -> None:
    three = backed(on(1, 10), on(1, 11), on(1, 20), protocol="UDP")
    # Longer than the flows, or else IPVS looks again after a minute whether they are gone.
    affinity = {"clientIP": {"timeoutSeconds": 3}}
    service = web(protocol="UDP", sessionAffinity="ClientIP", sessionAffinityConfig=affinity)
    site.load(service, three, settings=IpvsSettings(udp_timeout=1))
    sources = [pod(number) for number in PODS["client"][1:]]

    def chosen() -> list[str]:
        replies = site.cluster.ask("client", CLUSTER_IP[4], PORT, "udp", sources=sources)
        return [reply.at for reply in replies]

    try:
        first = chosen()
        until("they are forgotten", lambda: not remembered(site, "UDP"), 150)
        # 20 clients, in turn at three endpoints: the next round begins with another.
        assert chosen() != first
    finally:
        site.run("ipvsadm", "--set", "900", "120", "300")


def remembered(site: Site, protocol: str) -> list[str]:
    """Return the connections and clients that IPVS remembers."""
    lines = site.run("cat", "/proc/net/ip_vs_conn").splitlines()
    return [line for line in lines if line.startswith(protocol)]


def test_every_scheduler(site: Site) -> None:
    for scheduler in SCHEDULERS:
        settings = IpvsSettings(scheduler)
        site.load(web(), backed(on(1, 10), on(2, 10)), settings=settings)
        (reply,) = site.cluster.ask("client", CLUSTER_IP[4], PORT)
        assert reply.outcome == "answered", scheduler
        (used,) = site.held_schedulers()
        assert used == scheduler


# --- Endpoints that leave ---------------------------------------------------------------------


def test_an_endpoint_leaves_when_its_last_connection_ends(site: Site) -> None:
    here, there = at(10), at(10, node=2)
    site.load(web(), backed(on(1, 10)))
    try:
        connection = site.cluster.open("client", CLUSTER_IP[4], PORT)
        site.change(web(), backed(on(2, 10)))
        assert site.weights() == {here: 0, there: 1}
        assert connection.again().at == here
        site.expect("pod", CLUSTER_IP[4], PORT, served(there, masquerade=False))
        assert site.node.verify(4)
        # A proxy that starts anew takes over who is about to leave.
        site.node.restart(4, site.options[4])
        assert site.weights() == {here: 0, there: 1}
        assert connection.again().at == here
        # IPVS forgets a connection that says nothing for so many seconds.
        site.run("ipvsadm", "--set", "1", "0", "0")
        assert connection.again().at == here
        # By the looks that a proxy takes again and again.
        until("it leaves", lambda: site.node.verify(4) and here not in site.weights(), 120)
        assert site.weights() == {there: 1}
        connection.close()
    finally:
        site.run("ipvsadm", "--set", "900", "120", "300")


def test_an_endpoint_without_connections_leaves_at_once(site: Site, family: Family) -> None:
    site.load(
        web(family), backed(on(1, 10, family), on(2, 10, family), family=family), families=[family]
    )
    site.change(web(family), backed(on(2, 10, family), family=family))
    assert site.weights(family) == {at(10, family, node=2): 1}


def test_an_endpoint_that_comes_back_gets_connections_again(site: Site) -> None:
    here, there = at(10), at(10, node=2)
    site.load(web(), backed(on(1, 10)))
    connection = site.cluster.open("client", CLUSTER_IP[4], PORT)
    site.change(web(), backed(on(2, 10)))
    assert site.weights()[here] == 0
    site.change(web(), backed(on(1, 10), on(2, 10)))
    assert site.weights() == {here: 1, there: 1}
    site.expect("pod", CLUSTER_IP[4], PORT, served(here, there, masquerade=False))
    assert connection.again().at == here
    connection.close()


def test_udp_endpoints_leave_at_once(site: Site) -> None:
    site.load(web(protocol="UDP"), backed(on(1, 10), protocol="UDP"))
    flow = site.cluster.open("client", CLUSTER_IP[4], PORT, "udp")
    assert flow.again().at == at(10)
    site.change(web(protocol="UDP"), backed(on(2, 10), protocol="UDP"))
    assert site.weights() == {at(10, node=2): 1}
    flow.close()


# --- Somebody interferes ----------------------------------------------------------------------

WEB = f"{CLUSTER_IP[4]}:{PORT}"
INTERFERENCES = {
    "an address is gone": [f"ip addr del {CLUSTER_IP[4]}/32 dev kube-ipvs0"],
    "the interface is gone": ["ip link del kube-ipvs0"],
    "virtual servers are gone": ["ipvsadm -C"],
    "a real server is gone": [f"ipvsadm -d -t {WEB} -r {at(10)}"],
    "settings are others": [
        f"ipvsadm -e -t {WEB} -r {at(10)} -m -w 0",
        f"ipvsadm -E -t {WEB} -s lc",
    ],
    "a strange virtual server": ["ipvsadm -A -t 192.0.2.250:99 -s rr"],
    "members are others": [
        f"ipset del KUBE-CLUSTER-IP {CLUSTER_IP[4]},tcp:{PORT}",
        "ipset add KUBE-CLUSTER-IP 192.0.2.250,tcp:99",
    ],
    "rules are gone": [
        "iptables -t nat -F KUBE-POSTROUTING",
        "iptables -t nat -F PREROUTING",
        "iptables -F KUBE-IPVS-FILTER",
    ],
}


@pytest.mark.parametrize("what", INTERFERENCES)
def test_what_somebody_changes_is_noticed_and_healed(site: Site, what: str) -> None:
    site.load(web(), backed(on(1, 10)))
    before = comparable(site.node.held(4))
    for line in INTERFERENCES[what]:
        site.run(*line.split())
    assert not site.node.verify(4)
    site.node.sync_fully()
    assert site.node.verify(4)
    assert comparable(site.node.held(4)) == before
    site.expect("pod", CLUSTER_IP[4], PORT, served(at(10), masquerade=False))


def comparable(held: str) -> list[str]:
    """Return all that is said, without counters and what is random."""
    kept = [
        line.split(" initval")[0]
        for line in held.splitlines()
        if line.startswith(("-A", "add KUBE", "create KUBE", "TCP", "UDP"))
    ]
    reals = [line.split()[1:4] for line in held.splitlines() if line.startswith("  ->")]
    return sorted([*kept, *map(" ".join, reals)])


def test_a_full_set_is_told_and_healed(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site.load(web(), backed(on(1, 10)))
    small = "create SMALL hash:ip,port family inet hashsize 64 maxelem 4\n"
    others = "".join(f"add SMALL 192.0.2.{i},tcp:1\n" for i in range(4))
    site.cluster.run(
        "node", "ipset", "restore", text=f"{small}{others}swap SMALL KUBE-CLUSTER-IP\n"
    )
    site.run("ipset", "destroy", "SMALL")
    assert not site.node.verify(4)
    site.node.sync_fully()
    assert "KUBE-CLUSTER-IP is full" in caplog.text
    assert site.node.verify(4)
    site.expect("node", CLUSTER_IP[4], PORT, served(at(10), masquerade=True))


@pytest.mark.skipif(not IN_MACHINE, reason="takes a module from the kernel")
def test_ipvs_unloaded_while_running_is_told_and_healed_when_it_is_back(site: Site) -> None:
    site.load(web(), backed(on(1, 10)))
    site.run("ipvsadm", "-C")
    with open("/proc/modules") as file:
        loaded = [line.split()[0] for line in file if line.startswith("ip_vs")]
    subprocess.run(["mount", "-t", "tmpfs", "nothing", "/lib/modules"], check=True)
    try:
        subprocess.run(["rmmod", *sorted(loaded, key="ip_vs".__eq__)], check=True)
        assert not site.node.verify(4)
        with pytest.raises(ApplyError, match=r"module ip_vs; the modes iptables, nftables and"):
            site.node.sync_fully()
        with pytest.raises(ApplyError, match=r"lacks what mode ipvs needs: ip_vs, ip_vs_wlc"):
            site.node.probe("wlc")
    finally:
        subprocess.run(["umount", "/lib/modules"], check=True)
    site.node.sync_fully()
    assert site.node.verify(4)
    site.expect("pod", CLUSTER_IP[4], PORT, served(at(10), masquerade=False))


def test_virtual_servers_of_others_stay_where_they_are_excluded(site: Site) -> None:
    theirs = "203.0.113.77:80"
    site.load(web(), settings=IpvsSettings(exclude_cidrs=("203.0.113.0/24",)))
    site.run("ipvsadm", "-A", "-t", theirs, "-s", "rr")
    try:
        assert site.node.verify(4)
        site.node.sync_fully()
        site.node.forget(4)
        assert ("203.0.113.77", 80) in site.held()
    finally:
        site.run("ipvsadm", "-D", "-t", theirs)
        site.load()


def test_an_address_that_the_node_has_is_not_bound_again(site: Site) -> None:
    site.load(web(externalIPs=[NODE_ADDRESS[4]]), backed(on(1, 10)))
    assert NODE_ADDRESS[4] not in site.run("ip", "addr", "show", "kube-ipvs0")
    site.expect("outside", NODE_ADDRESS[4], PORT, served(at(10), masquerade=True))


def test_strict_arp_and_the_kernels_settings(site: Site) -> None:
    site.load(web(), settings=IpvsSettings(strict_arp=True, tcp_timeout=900, udp_timeout=30))
    for name, value in {
        "net.ipv4.vs.conntrack": "1",
        "net.ipv4.vs.expire_nodest_conn": "1",
        "net.ipv4.vs.expire_quiescent_template": "1",
        "net.ipv4.conf.all.arp_ignore": "1",
        "net.ipv4.conf.all.arp_announce": "2",
    }.items():
        assert site.run("cat", f"/proc/sys/{name.replace('.', '/')}").strip() == value, name
    assert "900 120 30" in site.run("ipvsadm", "-L", "--timeout")


# --- What is printed --------------------------------------------------------------------------


def test_what_kdns_rules_prints_is_what_a_proxy_programs(site: Site, family: Family) -> None:
    """Each part loaded by the program that its heading names."""
    ends = [on(1, 10, family), on(1, 11, family), on(2, 10, family)]
    affinity = {"clientIP": {"timeoutSeconds": 600}}
    objects: list[Object] = [
        web(family, sessionAffinity="ClientIP", sessionAffinityConfig=affinity,
            loadBalancerSourceRanges=["203.0.113.0/24", "2001:db8:113::/64"]),
        exposed("dns", ip={4: "10.96.0.10", 6: "fd00:10:96::a"}[family], node_port=30053,
                ports=[("http", 53, "UDP")], externalTrafficPolicy="Local"),
        exposed("nobody", ip={4: "10.96.0.11", 6: "fd00:10:96::b"}[family]),
        backed(*ends, family=family),
        backed(*ends, family=family, owner="dns", protocol="UDP"),
    ]  # fmt: skip
    site.node.clear()  # also of the other family
    site.load(*objects, families=[family])
    programmed = comparable(site.node.held(family))
    options = replace(site.options[family], node_port_addresses=node_ports_on(site, family))
    printed = render_rules(site.compilers[family].table, options)
    site.node.clear()
    for part in printed.split("\n\n"):
        heading, _, text = part.partition("\n")
        site.cluster.run("node", *heading.removeprefix("# ").split(), text=f"{text}\n")
    try:
        assert comparable(site.node.held(family)) == programmed
    finally:
        site.run("ipvsadm", "--clear")
        site.load(families=[family])  # what is there of the text is taken over


def node_ports_on(site: Site, family: Family) -> tuple[str, ...]:
    """Return the addresses that node ports answer on, without kube-ipvs0's."""
    return site.node.call(asyncio.to_thread(lambda: host_view(
        addresses_by_place(family)[1], site.options[family]).node_ports))  # fmt: skip


# --- Looking again ----------------------------------------------------------------------------


def test_nothing_is_read_thing_by_thing_while_nothing_changes(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And connections that come and go are no change."""
    site.load(web(), backed(on(1, 10), on(2, 10)))
    assert site.node.verify(4)

    def read(*_: object) -> None:
        raise AssertionError("it is read again")

    with monkeypatch.context() as patched:
        for name in ("_server_differences", "_set_differences", "_chain_differences"):
            patched.setattr(IpvsDataplane, name, read)
        site.expect("pod", CLUSTER_IP[4], PORT, served(at(10), at(10, node=2), masquerade=False))
        site.cluster.run("node", "ip", "addr", "add", "192.0.2.123/32", "dev", "lo", "valid_lft",
                         "1000", "preferred_lft", "1000")  # fmt: skip
        site.cluster.run("node", "ip", "addr", "del", "192.0.2.123/32", "dev", "lo")
        for _ in range(2):
            assert site.node.verify(4)
    site.run("ipvsadm", "-e", "-t", WEB, "-r", at(10), "-m", "-w", "7")
    assert not site.node.verify(4)
    site.node.sync_fully()
    assert site.node.verify(4)


# --- Leaving ----------------------------------------------------------------------------------


def test_a_clean_up_leaves_nothing_and_takes_nothing_of_others(site: Site) -> None:
    both = exposed("two", ip="10.96.0.7", clusterIPs=["10.96.0.7", "fd00:10:96::7"])
    site.load(web(), both, backed(on(1, 10)), families=FAMILIES)
    site.run("iptables", "-A", "INPUT", "-p", "tcp", "--dport", "999", "-j", "DROP")
    site.run("ipset", "create", "THEIRS", "hash:ip")
    site.node.clear()
    for family in FAMILIES:
        held = site.node.held(family)
        assert "KUBE-" not in held
        assert "kube-ipvs0" not in held
        assert site.held(family) == {}
    assert "999" in site.node.held(4)
    assert "THEIRS" in site.node.held(4)
    site.run("ipset", "destroy", "THEIRS")
    site.node.clear()  # once more: nothing to do is no error


# --- Size -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "services", [200, pytest.param(10_000, marks=[pytest.mark.bench, pytest.mark.timeout(600)])]
)
def test_many_services(site: Site, services: int) -> None:
    objects: list[Object] = []
    for number in range(services):
        name, ip = f"s{number}", f"10.97.{number >> 8}.{number & 255}"
        objects.append(exposed(name, ip=ip, ports=[("http", PORT, "TCP")]))
        objects.append(backed(on(1, 10), on(2, 10), owner=name))
    site.load()
    site.snapshot = snapshot_of(*objects)
    compiler = site.compilers[4]
    changed = compiler.update(site.snapshot, everything(site.snapshot))
    times = [timed(lambda: site.node.follow(4, compiler.table, changed))]
    assert len(site.held()) == services
    times.append(timed(site.node.sync_fully))
    times.append(timed(lambda: site.node.verify(4)))
    last = services - 1
    ip = f"10.97.{last >> 8}.{last & 255}"
    site.expect("pod", ip, PORT, served(at(10), at(10, node=2), masquerade=False))
    snapshot = snapshot_of(*objects[:-2])
    gone = compiler.update(snapshot, Changes(services=frozenset({("default", f"s{last}")})))
    times.append(timed(lambda: site.node.follow(4, compiler.table, gone)))
    assert len(site.held()) == services - 1
    times.append(timed(site.node.clear))
    words = ("loaded", "once more in full", "verified", "one gone", "cleaned up")
    told = ", ".join(f"{word} {one:.2f} s" for word, one in zip(words, times, strict=True))
    print(f"\nipvs, {services} Services of two endpoints: {told}")


def timed(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began
