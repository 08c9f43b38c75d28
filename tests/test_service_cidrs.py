"""ServiceCIDRs: an API server tells where ClusterIPs come from, and the nftables mode drops what
goes to one that no Service has; and servers that do not tell stop nothing."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from api_replay import ApiReplay, Fault, Json
from forwarding import NODE1, service
from nft_text import PretendNft
from running_proxy import Node, Unavailable, until
from test_kube_source import following

from kdns.errors import ObjectError
from kdns.proxy.nftables import NftablesRules, render_rules
from kdns.proxy.nftables_rules import UNALLOCATED
from kdns.proxy.options import Family, Options
from kdns.proxy.packet_nftables import Packet, parse_nftables, walk_nftables
from kdns.proxy.table import TableCompiler
from kdns.registry.decode import convert
from kdns.registry.objects import SERVICE, SERVICE_CIDR, ServiceCIDR
from kdns.registry.snapshot import dump_snapshot
from kdns.registry.spec import KubeSpec, joined
from kdns.registry.store import Store

RANGE = "10.96.0.0/16"


def ranges(*cidrs: str, name: str = "kubernetes") -> Json:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "ServiceCIDR",
        "metadata": {"name": name},
        "spec": {"cidrs": list(cidrs)},
    }


def read(obj: Json) -> ServiceCIDR:
    found = convert(SERVICE_CIDR, obj)
    assert isinstance(found, ServiceCIDR)
    return found


# --- the registry -------------------------------------------------------------------------------


def proxy_spec(api: ApiReplay, **more: Any) -> KubeSpec:
    return KubeSpec(endpoint=api.url, only_forwarded=True, **more)


@pytest.mark.asyncio
async def test_ranges_of_the_api_server_are_followed() -> None:
    api = ApiReplay()
    api.load([ranges(RANGE)])
    async with api, following(proxy_spec(api)) as registry:
        await registry.until(lambda: registry.snapshot.synced)
        assert "ServiceCIDR kubernetes 10.96.0.0/16" in dump_snapshot(registry.snapshot)
        await api.put(ranges("10.97.0.0/16", name="more"))
        await registry.until(lambda: len(registry.snapshot.service_cidrs) == 2)
        await api.delete(ranges("10.97.0.0/16", name="more"))
        await registry.until(lambda: len(registry.snapshot.service_cidrs) == 1)
        assert registry.snapshot.changed_at == 0  # names are the same: no new serial


@pytest.mark.asyncio
@pytest.mark.parametrize("watch_list", ["yes", "ignored"])
async def test_a_server_that_does_not_know_of_them_stops_nothing(watch_list: str) -> None:
    api = ApiReplay(lacks=["servicecidrs"], watch_list=watch_list)
    async with api, following(proxy_spec(api)) as registry:
        await registry.until(lambda: registry.snapshot.synced)
        assert not registry.snapshot.service_cidrs
        assert not registry.failures


@pytest.mark.asyncio
async def test_a_server_that_does_not_show_them_stops_nothing_and_may_do_so_later() -> None:
    api = ApiReplay()
    api.load([ranges(RANGE)])
    api.fault("servicecidrs", "watch", *[Fault(status=403)] * 3)
    api.fault("servicecidrs", "list", *[Fault(status=403)] * 3)
    async with api, following(proxy_spec(api)) as registry:
        await registry.until(lambda: registry.snapshot.synced)
        await registry.until(lambda: registry.snapshot.service_cidrs)
        assert not registry.failures


def test_dns_and_forwarding_read_them_together_and_dns_alone_does_not() -> None:
    assert SERVICE_CIDR not in KubeSpec().kinds
    both = joined(KubeSpec(), KubeSpec(node="n", only_forwarded=True))
    assert isinstance(both, KubeSpec) and SERVICE_CIDR in both.kinds


@pytest.mark.parametrize("cidr", ["", "10.0.0.0/33", "x", "10.0.0.0/8; flush ruleset"])
def test_what_is_no_range_is_refused_by_name(cidr: str) -> None:
    with pytest.raises(ObjectError, match=r"ServiceCIDR kubernetes: spec.cidrs\[0\]"):
        convert(SERVICE_CIDR, ranges(cidr))


# --- the rules ----------------------------------------------------------------------------------


class Cluster:
    """Objects, compiled for a node as they change."""

    def __init__(self, family: Family = 4) -> None:
        self.store = Store((SERVICE, SERVICE_CIDR))
        self.compiler = TableCompiler(family, NODE1)
        for kind in (SERVICE, SERVICE_CIDR):
            self.store.mark_synced(kind)

    def put(self, obj: Json, event: str = "MODIFIED") -> set[Any]:
        self.store.apply(SERVICE_CIDR, event, read(obj))
        published = self.store.publish(1)
        assert published is not None
        return set(self.compiler.update(*published))


@pytest.mark.parametrize(
    ("family", "expected"), [(4, ("10.96.0.0/16", "10.98.0.0/24")), (6, ("fd00:10:96::/112",))]
)
def test_each_family_has_its_ranges(family: Family, expected: tuple[str, ...]) -> None:
    cluster = Cluster(family)
    cluster.put(ranges("10.96.0.0/16", "fd00:10:96::/112"))
    assert cluster.put(ranges("10.98.0.0/24", name="more")) == set()
    assert cluster.compiler.table.service_cidrs == expected


def test_the_rules_follow_the_ranges_and_nothing_else_is_written() -> None:
    cluster, kernel, rules = Cluster(), PretendNft(), NftablesRules(Options(4))

    def drops() -> list[str]:
        rules.update(cluster.compiler.table, ())
        text = rules.partial()
        kernel.apply(text)
        rules.committed()
        names = {line.split()[4] for line in text.splitlines() if not line.startswith("add table")}
        assert names <= {UNALLOCATED}
        return [one.split()[2] for one in kernel.held.chains[UNALLOCATED].rules if "drop" in one]

    kernel.apply(rules.full(kernel.held))
    rules.committed()
    assert drops() == []
    cluster.put(ranges(RANGE))
    assert drops() == [RANGE]
    cluster.put(ranges("10.96.128.0/17", "fd00::/112", name="within"))
    assert drops() == [RANGE]  # one in another is no second rule
    cluster.put(ranges("10.98.0.0/24", name="more"))
    assert drops() == [RANGE, "10.98.0.0/24"]
    cluster.put(ranges(RANGE), "DELETED")
    assert drops() == ["10.96.128.0/17", "10.98.0.0/24"]


def test_a_restart_finds_them_as_they_are() -> None:
    cluster = Cluster()
    cluster.put(ranges(RANGE))
    kernel, rules = PretendNft(), NftablesRules(Options(4))
    rules.update(cluster.compiler.table, None)
    kernel.apply(rules.full(kernel.held))
    again = NftablesRules(Options(4))
    again.update(cluster.compiler.table, None)
    assert again.full(kernel.held) == ""


@pytest.mark.parametrize(("interface", "source"), [("eth0", "203.0.113.9"), ("", "192.168.77.1")])
@pytest.mark.parametrize(
    ("destination", "verdict"), [("10.96.0.77", "dropped"), ("10.97.0.77", "forwarded")]
)
def test_an_address_of_no_service_is_dropped_in_the_range_only(
    interface: str, source: str, destination: str, verdict: str
) -> None:
    cluster = Cluster()
    cluster.put(ranges(RANGE))
    found = parse_nftables(render_rules(cluster.compiler.table, Options(4)))
    (one,) = walk_nftables(found, Packet(source, destination, 80, interface=interface))
    assert one.verdict == verdict


# --- a real node --------------------------------------------------------------------------------


@pytest.fixture
def node() -> Iterator[Node]:
    if shutil.which("nft") is None:
        pytest.skip("needs nft")
    try:
        with Node() as made:
            yield made
    except Unavailable as error:
        pytest.skip(str(error))


def sent(node: Node, ip: str) -> bool:
    """Whether a packet to the address leaves the node: what is dropped on its way out, the
    sender is told of."""
    with node.udp(ip, 80) as one:
        try:
            one.send(b"x")
        except PermissionError:
            return False
    return True


@pytest.mark.root
def test_a_node_drops_what_goes_to_addresses_of_no_service_and_refuses_unknown_ports(
    node: Node,
) -> None:
    api = node.api(service("web", ip="10.96.0.50"), ranges(RANGE))
    proxy = node.proxy("--master", api.url, "--proxy-mode=nftables")
    proxy.until_synced()
    assert not sent(node, "10.96.0.77") and not sent(node, "10.96.255.1")
    assert sent(node, "10.97.0.77")
    for port in (80, 81):  # of no endpoint, of no port
        with pytest.raises(ConnectionRefusedError):
            node.connect("10.96.0.50", port)
    with pytest.raises(OSError) as dropped:
        node.connect("10.96.0.77", 80, seconds=0.3)
    assert isinstance(dropped.value, TimeoutError) or dropped.value.errno == errno.EPERM
    api.put(ranges("10.97.0.0/16", name="more"))
    until("the new range is dropped", lambda: not sent(node, "10.97.0.77"))
    api.delete(ranges(RANGE))
    until("the old range is not", lambda: sent(node, "10.96.0.77"))
    assert proxy.stop() == 0
