"""Stale flows, settings and addresses on the real kernel, in network namespaces of their own.

Real UDP and TCP sockets talk through DNAT rules; the flows that the kernel makes of it are
cleaned as after a sync. A client keeps its socket throughout, as a resolver does, so that
only the cleaning can lead it elsewhere.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import select
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TypeVar

import pytest

from kdns.kernel.conntrack import (
    Cleaned,
    FlowCleaner,
    delete_flows,
    dump_udp_flows,
)
from kdns.kernel.netlink import (
    NETLINK_NETFILTER,
    NLM_F_ACK,
    NLM_F_REQUEST,
    attribute,
    default_address,
    local_networks,
    message,
    nest,
    node_addresses,
)
from kdns.kernel.sysctl import ConntrackSettings, apply_conntrack, apply_route_localnet
from kdns.metrics import Metrics
from kdns.proxy.options import Family, Options
from kdns.proxy.table import Forwarding, ForwardingTable
from kdns.registry.endpoints import Endpoint

pytestmark = pytest.mark.root

CLONE_NEWNET = 0x40000000
CT_NEW, NLM_F_CREATE = 0x100, 0x400
WAIT = 5  # seconds: for what comes at once or not at all
DELETED = "kubeproxy_conntrack_reconciler_deleted_entries_total"
FAILED = "kdns_conntrack_failures_total"
KEY = ("default", "dns")
T = TypeVar("T")

if shutil.which("iptables-restore") is None or shutil.which("ip") is None:
    pytest.skip("needs iptables-restore and ip", allow_module_level=True)


class Namespace:
    """A network namespace without a name: of one thread, of what that starts, and of the
    sockets it opens. It goes with the last of them."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self.sockets: list[socket.socket] = []

    def enter(self) -> None:
        """Raises OSError where that is not allowed."""
        self.run(_unshare)
        self.shell("ip link set lo up")

    def run(self, function: Callable[..., T], *arguments: Any) -> T:
        return self._thread.submit(function, *arguments).result(timeout=50)

    def shell(self, command: str, text: str = "") -> str:
        done = self.run(
            lambda: subprocess.run(
                command,
                check=False,
                shell=True,
                input=text,
                text=True,
                capture_output=True,
                timeout=30,
            )
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def socket(self, address: str, port: int = 0, kind: int = socket.SOCK_DGRAM) -> socket.socket:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        made = self.run(socket.socket, family, kind)
        self.sockets.append(made)
        made.settimeout(WAIT)
        made.bind((address, port))
        return made

    def close(self) -> None:
        for one in self.sockets:
            one.close()
        self._thread.shutdown()


def _unshare() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET)")


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    made = Namespace()
    try:
        try:
            made.enter()
        except OSError as e:
            pytest.skip(f"no network namespace can be made: {e}")
        yield made
    finally:
        made.close()


class Net:
    """Addresses of one family: those of a client, endpoints and the node are local; VIPs and
    elsewhere are routed to a wire that nobody listens at."""

    def __init__(self, family: Family) -> None:
        self.family: Family = family
        self.iptables = "iptables-restore" if family == 4 else "ip6tables-restore"
        names = ("client", "a", "b", "node", "vip", "other_vip", "elsewhere")
        v4 = "10.1.0.1 10.244.1.5 10.244.2.7 192.0.2.1 10.96.0.10 10.96.0.11 198.51.100.1"
        v6 = "fd00:1::1 fd00:244::5 fd00:244::7 fd00:2::1 fd00:96::a fd00:96::b fd00:3::1"
        self.addresses = dict(zip(names, (v4 if family == 4 else v6).split(), strict=True))

    def __getattr__(self, name: str) -> str:
        return str(self.addresses[name])


class Stage:
    """Clients, servers, rules and the cleaner, in one namespace."""

    def __init__(self, namespace: Namespace, net: Net) -> None:
        self.namespace, self.net = namespace, net
        bits, flag = (32, "") if net.family == 4 else (128, "nodad")
        for name in ("client", "a", "b", "node"):
            namespace.shell(f"ip addr add {getattr(net, name)}/{bits} dev lo {flag}")
        namespace.shell("ip link add out type veth peer name far")
        namespace.shell("ip link set out arp off up && ip link set far arp off up")
        for name in ("vip", "other_vip", "elsewhere"):
            namespace.shell(f"ip -{net.family} route add {getattr(net, name)}/{bits} dev out")
        self.servers: dict[socket.socket, str] = {}
        self.metrics = Metrics()
        self.cleaner = FlowCleaner(Options(net.family), self.metrics)
        self.table = ForwardingTable(net.family)

    def serve(self, address: str, port: int = 5353) -> None:
        self.servers[self.namespace.socket(address, port)] = f"{address} {port}"

    def client(self, address: str, port: int = 53) -> socket.socket:
        made = self.namespace.socket(self.net.client)
        made.connect((address, port))
        return made

    def ask(self, client: socket.socket) -> str:
        """Send a datagram; return "address port" of the server that got it and answered."""
        client.send(b"question")
        ready, _, _ = select.select(list(self.servers), [], [], WAIT)
        assert ready, "nobody got it"
        question, sender = ready[0].recvfrom(100)
        ready[0].sendto(question, sender)
        assert client.recv(100) == b"question"
        return self.servers[ready[0]]

    def is_heard(self, client: socket.socket) -> bool:
        """Send a datagram; return True if a server gets it. Loopback delivers within send()."""
        client.send(b"anybody")
        ready, _, _ = select.select(list(self.servers), [], [], 0)
        for one in ready:
            one.recv(100)
        return bool(ready)

    def sync(self, *forwardings: Forwarding, clean: bool = True) -> Cleaned | None:
        """Load rules for the Service ports, as a sync does, and clean what became stale."""
        text = self.namespace.shell(self.net.iptables, _rules(forwardings, self.net.family))
        assert text == ""
        self.table = ForwardingTable(
            self.net.family, self.table.revision + 1, {KEY: forwardings} if forwardings else {}
        )
        return self.clean() if clean else None

    def clean(self) -> Cleaned:
        cleaning = self.cleaner.clean(self.table, {KEY})
        cleaned: Cleaned = self.namespace.run(asyncio.run, cleaning)
        return cleaned

    def flows(self) -> dict[str, bytes]:
        """Text -> handle of all UDP flows. A flow made anew has another handle."""
        dump = self.namespace.run(dump_udp_flows, self.net.family)
        assert dump.complete
        return {str(flow): flow.handle for flow in dump.flows}

    def port(self, *endpoints: str, **more: Any) -> Forwarding:
        """The Service port of the VIP, forwarded to port 5353 of `endpoints`."""
        one = Forwarding(
            KEY,
            "default/dns:dns",
            "udp",
            self.net.vip,
            53,
            cluster=tuple(Endpoint(ip, 5353) for ip in endpoints),
            has_endpoints=bool(endpoints),
        )
        changed = replace(one, **more)
        return replace(changed, serving=changed.serving or changed.cluster)


def _rules(forwardings: tuple[Forwarding, ...], family: Family) -> str:
    """The least that forwards: all new flows of a Service port to its first endpoint."""
    nat, refuse = [], []
    for one in forwardings:
        match = [f"-d {one.cluster_ip} -p {one.protocol} --dport {one.port}"]
        if one.node_port:
            match.append(f"-m addrtype --dst-type LOCAL -p {one.protocol} --dport {one.node_port}")
        if one.cluster:
            nat += [f"-A OUTPUT {m} -j DNAT --to-destination {one.cluster[0]}" for m in match]
        else:
            refuse += [f"-A OUTPUT -m conntrack --ctstate NEW {m} -j REJECT" for m in match]
    return "\n".join(["*nat", *nat, "COMMIT", "*filter", *refuse, "COMMIT", ""])


@pytest.fixture(params=[4, 6], ids=["IPv4", "IPv6"])
def stage(request: pytest.FixtureRequest, namespace: Namespace) -> Stage:
    return Stage(namespace, Net(request.param))


@pytest.fixture
def answered(stage: Stage) -> socket.socket:
    """A client whose flow to the VIP leads to endpoint a."""
    stage.serve(stage.net.a)
    stage.serve(stage.net.b)
    stage.sync(stage.port(stage.net.a))
    client = stage.client(stage.net.vip)
    assert stage.ask(client) == f"{stage.net.a} 5353"
    return client


def test_a_client_reaches_the_new_endpoint_when_its_own_is_gone(
    stage: Stage, answered: socket.socket
) -> None:
    stage.sync(stage.port(stage.net.b), clean=False)
    assert stage.ask(answered) == f"{stage.net.a} 5353", "the trap: rules alone change nothing"
    assert stage.clean() == Cleaned(1, True)
    assert stage.ask(answered) == f"{stage.net.b} 5353"
    assert stage.metrics.value(DELETED, f"IPv{stage.net.family}") == 1


def test_more_stale_flows_than_are_held_at_a_time_all_go(
    stage: Stage, answered: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdns.kernel.conntrack.MOST_HELD", 2)
    clients = [answered, *(stage.client(stage.net.vip) for _ in range(4))]
    for client in clients:
        assert stage.ask(client) == f"{stage.net.a} 5353"
    assert stage.sync(stage.port(stage.net.b)) == Cleaned(5, True)
    for client in clients:
        assert stage.ask(client) == f"{stage.net.b} 5353"


def test_a_client_stays_with_an_endpoint_that_drains(stage: Stage, answered: socket.socket) -> None:
    net = stage.net
    both = (Endpoint(net.b, 5353), Endpoint(net.a, 5353, serving=True, terminating=True))
    assert stage.sync(stage.port(net.b, serving=both)) == Cleaned(0, True)
    assert stage.ask(answered) == f"{net.a} 5353"
    assert stage.sync(stage.port(net.b)) == Cleaned(1, True)
    assert stage.ask(answered) == f"{net.b} 5353"


def test_a_client_is_refused_when_the_service_is_scaled_to_zero(
    stage: Stage, answered: socket.socket
) -> None:
    assert stage.sync(stage.port()) == Cleaned(1, True)
    with pytest.raises(PermissionError):  # what a sender on the node itself is told
        answered.send(b"question")
    answered.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)  # and by ICMP, a second time
    assert stage.sync(stage.port(stage.net.b)) == Cleaned(0, True)
    assert stage.ask(answered) == f"{stage.net.b} 5353"


def test_a_deleted_service_leaves_no_flow(stage: Stage, answered: socket.socket) -> None:
    assert stage.sync() == Cleaned(1, True)
    assert stage.flows() == {}
    assert not stage.is_heard(answered)


@pytest.mark.parametrize("change", [{"port": 54}, {"cluster_ip": "other_vip"}])
def test_a_frontend_that_changed_leaves_no_flow(
    stage: Stage, answered: socket.socket, change: dict[str, Any]
) -> None:
    change = {k: getattr(stage.net, v) if isinstance(v, str) else v for k, v in change.items()}
    moved = stage.port(stage.net.a, **change)
    assert stage.sync(moved) == Cleaned(1, True)
    assert not stage.is_heard(answered)
    assert stage.ask(stage.client(moved.cluster_ip, moved.port)) == f"{stage.net.a} 5353"


def test_an_endpoints_port_that_changed_is_found(stage: Stage, answered: socket.socket) -> None:
    stage.serve(stage.net.a, 5454)
    moved = stage.port(cluster=(Endpoint(stage.net.a, 5454),), has_endpoints=True)
    assert stage.sync(moved) == Cleaned(1, True)
    assert stage.ask(answered) == f"{stage.net.a} 5454"


def test_a_client_that_sent_before_there_were_rules_reaches_the_service(stage: Stage) -> None:
    stage.serve(stage.net.a)
    stage.sync(stage.port(stage.net.a, cluster_ip=stage.net.elsewhere))  # conntrack is on
    early = stage.client(stage.net.vip)
    assert not stage.is_heard(early)
    stage.sync(stage.port(stage.net.a), clean=False)
    assert not stage.is_heard(early), "the trap: nobody translates a flow that is there"
    assert stage.clean() == Cleaned(1, True)
    assert stage.ask(early) == f"{stage.net.a} 5353"


def test_a_node_ports_flow_is_found_at_any_address_of_the_node(
    stage: Stage, answered: socket.socket
) -> None:
    stage.sync(stage.port(stage.net.a, node_port=30053))
    # Another address that is local, and one that only bears the same number.
    clients = [stage.client(address, 30053) for address in (stage.net.node, stage.net.client)]
    assert [stage.ask(client) for client in clients] == [f"{stage.net.a} 5353"] * 2
    assert not stage.is_heard(stage.client(stage.net.elsewhere, 30053))
    before = stage.flows()
    somewhere = stage.net.elsewhere if stage.net.family == 4 else f"[{stage.net.elsewhere}]"
    elsewhere = [text for text in before if f"-> {somewhere}:30053" in text]
    assert len(elsewhere) == 1
    assert stage.sync(stage.port(stage.net.b, node_port=30053)) == Cleaned(3, True)
    assert stage.flows() == {text: before[text] for text in elsewhere}
    assert [stage.ask(client) for client in clients] == [f"{stage.net.b} 5353"] * 2


def test_flows_of_others_are_untouched(stage: Stage, answered: socket.socket) -> None:
    """TCP through the same VIP, UDP to another, to the endpoint itself and to port 53 of
    somebody else."""
    net = stage.net
    tcp = stage.port(net.a, protocol="tcp")
    other = stage.port(net.a, cluster_ip=net.other_vip)
    listener = stage.namespace.socket(net.a, 5353, socket.SOCK_STREAM)
    listener.listen()
    stage.sync(stage.port(net.a), tcp, other)
    stream = stage.namespace.socket(net.client, 0, socket.SOCK_STREAM)
    stream.connect((net.vip, 53))
    accepted, _ = listener.accept()
    stage.ask(stage.client(net.other_vip))
    stage.ask(stage.client(net.a, 5353))
    stage.is_heard(stage.client(net.elsewhere))
    before = stage.flows()
    assert len(before) == 4

    assert stage.sync(stage.port(net.b), replace(tcp, cluster=()), other) == Cleaned(1, True)
    after = stage.flows()
    assert len(after) == 3
    assert after.items() <= before.items(), "the same flows and not new ones like them"
    stream.sendall(b"still here")
    with accepted:
        accepted.settimeout(WAIT)
        assert accepted.recv(100) == b"still here"


def test_a_restarted_proxy_cleans_what_the_one_before_left(
    stage: Stage, answered: socket.socket
) -> None:
    stage.sync(stage.port(stage.net.b), clean=False)
    stage.cleaner = FlowCleaner(Options(stage.net.family), stage.metrics)
    assert stage.clean() == Cleaned(1, True)
    assert stage.ask(answered) == f"{stage.net.b} 5353"


def test_more_ports_than_are_asked_for_one_by_one(stage: Stage) -> None:
    stage.serve(stage.net.a)
    stage.serve(stage.net.b)

    def ports(endpoint: str) -> list[Forwarding]:
        return [stage.port(endpoint, port=53 + n) for n in range(6)]

    stage.sync(*ports(stage.net.a))
    clients = [stage.client(stage.net.vip, 53 + n) for n in range(6)]
    assert {stage.ask(client) for client in clients} == {f"{stage.net.a} 5353"}
    assert stage.sync(*ports(stage.net.b)) == Cleaned(6, True)
    assert {stage.ask(client) for client in clients} == {f"{stage.net.b} 5353"}


@pytest.mark.parametrize("zone", ["--zone", "--zone-orig"])
def test_flows_in_a_zone_of_their_own(stage: Stage, zone: str) -> None:
    """Some network plugins part their flows; a deletion without the zone would not find them."""
    table = f"*raw\n-A OUTPUT -p udp -j CT {zone} 7\nCOMMIT\n"
    try:
        stage.namespace.shell(stage.net.iptables, table)
    except AssertionError as e:
        pytest.skip(f"the kernel has no CT target: {e}")
    stage.serve(stage.net.a)
    stage.sync(stage.port(stage.net.a, cluster_ip=stage.net.elsewhere))
    stage.is_heard(stage.client(stage.net.vip))
    assert len(stage.flows()) == 1
    assert stage.sync(stage.port(stage.net.a)) == Cleaned(1, True)
    assert stage.flows() == {}


def test_a_flow_made_anew_meanwhile_is_not_deleted(stage: Stage, answered: socket.socket) -> None:
    family = stage.net.family
    old = stage.namespace.run(dump_udp_flows, family).flows
    stage.sync(stage.port(stage.net.b))
    assert stage.ask(answered) == f"{stage.net.b} 5353"
    assert stage.namespace.run(delete_flows, family, old) == 0
    assert len(stage.flows()) == 1


def test_the_flows_are_those_pyroute2_reads(stage: Stage, answered: socket.socket) -> None:
    stage.is_heard(stage.client(stage.net.elsewhere, 99))

    def read() -> set[tuple[str, str, int, str, int]]:
        from pyroute2 import NFCTSocket

        tag, number = ("V4", socket.AF_INET) if stage.net.family == 4 else ("V6", socket.AF_INET6)
        found = set()
        with NFCTSocket(nfgen_family=number) as link:
            for one in link.dump():
                there, back = one.get_attr("CTA_TUPLE_ORIG"), one.get_attr("CTA_TUPLE_REPLY")
                ips, answers = there.get_attr("CTA_TUPLE_IP"), back.get_attr("CTA_TUPLE_IP")
                ports = there.get_attr("CTA_TUPLE_PROTO"), back.get_attr("CTA_TUPLE_PROTO")
                if ports[0].get_attr("CTA_PROTO_NUM") == 17:
                    found.add(
                        (
                            ips.get_attr(f"CTA_IP_{tag}_SRC"),
                            ips.get_attr(f"CTA_IP_{tag}_DST"),
                            ports[0].get_attr("CTA_PROTO_DST_PORT"),
                            answers.get_attr(f"CTA_IP_{tag}_SRC"),
                            ports[1].get_attr("CTA_PROTO_SRC_PORT"),
                        )
                    )
        return found

    def text(packed: bytes) -> str:
        return str(ip_address(packed))

    ours = {
        (
            text(flow.source),
            text(flow.destination),
            flow.destination_port,
            text(flow.reply_source),
            flow.reply_port,
        )
        for flow in stage.namespace.run(dump_udp_flows, stage.net.family).flows
    }
    assert ours == stage.namespace.run(read)
    assert len(ours) == 2


# --- what is not allowed -----------------------------------------------------------------------

# Cleans twice for the same reason, then once more, and prints what was said and counted.
WITHOUT_RIGHTS = f"""
import asyncio, json, logging
from kdns.kernel.conntrack import FlowCleaner
from kdns.metrics import Metrics
from kdns.proxy.options import Options
from kdns.proxy.table import Forwarding, ForwardingTable

said, metrics = [], Metrics()
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("kdns").addHandler(handler)
cleaner = FlowCleaner(Options(4), metrics)
one = Forwarding({KEY!r}, "default/dns", "udp", "10.96.0.10", 53)
tables = [ForwardingTable(4, 1, {{{KEY!r}: (one,)}}), ForwardingTable(4, 2), ForwardingTable(4, 3)]
results = [list(asyncio.run(cleaner.clean(table, {{{KEY!r}}}))) for table in tables]
print(json.dumps([results, said, metrics.value("{FAILED}", "IPv4")]))
"""


def test_without_cap_net_admin_it_is_said_once_and_the_proxy_goes_on(
    namespace: Namespace,
) -> None:
    if shutil.which("setpriv") is None:
        pytest.skip("needs setpriv")
    without = "setpriv --bounding-set -net_admin --inh-caps -net_admin"
    printed = namespace.shell(f"{without} {sys.executable} -", WITHOUT_RIGHTS)
    results, said, failures = json.loads(printed)
    assert results == [[0, False]] * 3, "what is owed is tried again, without a change, too"
    assert failures == 3
    assert said == [
        "IPv4: netlink: cannot list UDP flows: Operation not permitted; it takes the capability"
        " CAP_NET_ADMIN; UDP clients may go on to endpoints that are gone"
    ]


def test_what_could_not_be_cleaned_is_cleaned_later(
    stage: Stage, answered: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An endpoint that came and went while the kernel could not be asked."""
    monkeypatch.setattr("kdns.kernel.netlink.Netfilter.protocol", 999)  # no such protocol
    assert stage.sync(stage.port(stage.net.b)) == Cleaned(0, False)
    monkeypatch.undo()
    assert stage.clean() == Cleaned(1, True)
    assert stage.clean() == Cleaned(0, True)
    assert stage.metrics.value(FAILED, f"IPv{stage.net.family}") == 1
    assert stage.ask(answered) == f"{stage.net.b} 5353"


def test_an_endpoint_that_came_and_went_between_two_cleanings(
    stage: Stage, answered: socket.socket
) -> None:
    """Both tables cleaned for are the same, and yet b, which is gone, has a flow."""
    net = stage.net
    for endpoint in (net.b, net.a):
        passing = stage.client(net.vip)
        stage.sync(stage.port(endpoint), clean=False)
        stage.cleaner.note(stage.table, {KEY})
        assert stage.ask(passing) == f"{endpoint} 5353"
    assert stage.clean() == Cleaned(1, True)
    assert len(stage.flows()) == 2
    assert stage.ask(answered) == f"{net.a} 5353"


# --- settings ----------------------------------------------------------------------------------


def test_settings_of_a_namespace_are_written_and_the_nodes_are_refused(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    """The number of flows belongs to the whole node, the time-outs to each namespace."""
    stage.sync()  # loads conntrack
    settings = ConntrackSettings(1024, 1024, 4000, 61, True, 33, 133)
    outside = _conntrack_settings()
    with caplog.at_level(logging.INFO, "kdns.sysctl"):
        outcomes = stage.namespace.run(apply_conntrack, settings, 1)
    assert {Path(o.path).name: o.state for o in outcomes} == {
        "nf_conntrack_max": "refused",
        "hashsize": "kept",  # larger already
        "nf_conntrack_tcp_timeout_established": "written",
        "nf_conntrack_tcp_timeout_close_wait": "written",
        "nf_conntrack_udp_timeout": "written",
        "nf_conntrack_udp_timeout_stream": "written",
        "nf_conntrack_tcp_be_liberal": "written",
    }
    inside = stage.namespace.run(_conntrack_settings)
    assert inside["nf_conntrack_udp_timeout"] == "33"
    assert inside["nf_conntrack_tcp_be_liberal"] == "1"
    assert _conntrack_settings() == outside
    assert (
        "/proc/sys/net/netfilter/nf_conntrack_max is not set to 1024: Permission denied:"
        " it takes root, outside of a network namespace"
    ) in caplog.messages
    again = stage.namespace.run(apply_conntrack, settings, 1)
    assert {o.state for o in again} == {"refused", "kept"}


def _conntrack_settings() -> dict[str, str]:
    folder = Path("/proc/sys/net/netfilter")
    return {
        path.name: path.read_text(encoding="ascii").strip()
        for path in folder.glob("nf_conntrack_*")
        if path.name != "nf_conntrack_count" and os.access(path, os.R_OK)
    }


def test_route_localnet_of_a_namespace(namespace: Namespace) -> None:
    assert namespace.run(apply_route_localnet).state == "written"
    assert namespace.run(apply_route_localnet).state == "kept"
    assert namespace.shell("cat /proc/sys/net/ipv4/conf/all/route_localnet") == "1\n"


# --- addresses ---------------------------------------------------------------------------------


@pytest.fixture
def node(namespace: Namespace) -> Namespace:
    """A node with two interfaces, and a default route out of the second."""
    for command in (
        "ip link add eth0 type veth peer name far0",
        "ip link add eth1 type veth peer name far1",
        "ip addr add 192.168.77.1/24 dev eth0",
        "ip addr add 172.18.0.5/16 dev eth1",
        "ip addr add 172.18.0.6/16 dev eth1",
        "ip addr add fd00:18::5/64 dev eth1 nodad",
        "ip addr add fd00:18::9/128 dev eth1 nodad preferred_lft 0",  # listed first
        *(f"ip link set {name} up" for name in ("eth0", "eth1", "far0", "far1")),
    ):
        namespace.shell(command)
    return namespace


def test_the_nodes_addresses(node: Namespace) -> None:
    v4 = node.run(node_addresses, 4)
    assert {(a.interface, a.address, a.prefix, a.universal) for a in v4} == {
        ("lo", "127.0.0.1", 8, False),
        ("eth0", "192.168.77.1", 24, True),
        ("eth1", "172.18.0.5", 16, True),
        ("eth1", "172.18.0.6", 16, True),
    }
    v6 = {a.address: a for a in node.run(node_addresses, 6)}
    assert v6["fd00:18::5"][0::2] == ("eth1", 64)
    assert v6["fd00:18::5"].universal
    assert not v6["fd00:18::9"].universal
    assert not v6["::1"].universal
    assert all(not a.universal for a in v6.values() if a.address.startswith("fe80"))


def test_local_is_what_addrtype_local_matches(node: Namespace) -> None:
    node.shell("ip route add local 198.18.0.0/24 dev lo")
    assert set(node.run(local_networks, 4)) >= {
        "127.0.0.0/8",
        "192.168.77.1/32",
        "172.18.0.5/32",
        "198.18.0.0/24",
    }
    assert {"::1/128", "fd00:18::5/128"} <= set(node.run(local_networks, 6))


@pytest.mark.parametrize(
    ("family", "routes", "expected"),
    [
        (4, [], ""),
        (6, [], ""),
        (4, ["default via 172.18.0.1"], "172.18.0.5"),
        (4, ["default via 172.18.0.1 src 172.18.0.6"], "172.18.0.6"),
        (
            4,
            ["default via 172.18.0.1 metric 100", "default via 192.168.77.2 metric 50"],
            "192.168.77.1",
        ),
        # As in clouds: a table for the Pods of another interface.
        (4, ["default via 192.168.77.2 table 2", "default via 172.18.0.1 metric 9"], "172.18.0.5"),
        (4, ["default via 192.168.77.2 table 2000"], ""),
        (4, ["default nexthop via 172.18.0.1 nexthop via 192.168.77.2"], "172.18.0.5"),
        (4, ["unreachable default"], ""),
        (6, ["default via fd00:18::1"], "fd00:18::5"),
        (6, ["default via fe80::1 dev eth0", "default via fd00:18::1 metric 10"], "fd00:18::5"),
    ],
)
def test_the_address_of_the_default_route(
    node: Namespace, family: Family, routes: list[str], expected: str
) -> None:
    for route in routes:
        kind = "unreachable " if route.startswith("unreachable ") else ""
        node.shell(f"ip -{family} route add {kind}{route.removeprefix('unreachable ')}")
    assert node.run(default_address, family) == expected


# --- speed -------------------------------------------------------------------------------------


@pytest.mark.bench
def test_speed_of_reading_and_deleting(namespace: Namespace) -> None:
    """Prints seconds for 100,000 flows; pyroute2's reading beside."""

    def measure() -> dict[str, float]:
        from pyroute2 import NFCTSocket

        _fill(100_000)
        seconds = {}
        start = time.perf_counter()
        with NFCTSocket() as link:
            assert sum(1 for _ in link.dump()) == 100_000
        seconds["pyroute2 reads all"] = time.perf_counter() - start
        for what, ports, expected in (
            ("reads all", None, 100_000),
            ("reads one port of all", {53}, 100_000),
            ("reads a port without flows", {54}, 0),
        ):
            start = time.perf_counter()
            flows = dump_udp_flows(4, ports).flows
            seconds[what] = time.perf_counter() - start
            assert len(flows) == expected
        flows = dump_udp_flows(4).flows
        start = time.perf_counter()
        assert delete_flows(4, flows) == 100_000
        seconds["deletes all"] = time.perf_counter() - start
        return seconds

    for what, seconds in namespace.run(measure).items():
        print(f"{what}: {seconds:.2f} s")


def _fill(count: int) -> None:
    """Make `count` flows to 10.96.0.10:53 that 10.244.0.5:53 answers."""

    def tuple_of(source: bytes, destination: bytes, ports: bytes) -> bytes:
        return nest(1, attribute(1, source), attribute(2, destination)) + nest(
            2, attribute(1, b"\x11"), attribute(2, ports[:2]), attribute(3, ports[2:])
        )

    vip, endpoint = ip_address("10.96.0.10").packed, ip_address("10.244.0.5").packed
    bodies = []
    for number in range(count):
        client, port = struct.pack(">I", 0x0A010000 + number), b"\x9c\x40"
        there = tuple_of(client, vip, port + b"\0\x35")
        back = tuple_of(endpoint, client, b"\0\x35" + port)
        bodies.append(
            b"\2\0\0\0"
            + nest(1, there)
            + nest(2, back)
            + attribute(3, struct.pack(">I", 8))  # confirmed
            + attribute(7, struct.pack(">I", 600))
        )
    flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as link:
        for body in bodies:
            link.send(message(CT_NEW, flags, 0, body))
            answer = link.recv(4096)
            assert answer[16:20] == bytes(4)
