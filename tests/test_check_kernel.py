"""`kdns check` on a node: a network namespace with rules that `kdns proxy` wrote and somebody
then broke, of a real kernel, in both variants of iptables and in nftables.

A node is made once for each of those; every test begins with the rules as they were written.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import pytest
from api_replay import Json
from forwarding import endpoint, exposed, service, slice_of, table_of
from running_proxy import NODE_IP, ROOT, Api, Node, Unavailable

from kdns.explain.check import Wishes, check
from kdns.explain.check_command import as_json
from kdns.explain.check_kernel import HeldIpvs, Seen, check_flows, check_kernel, modes_in
from kdns.explain.evidence import Where
from kdns.kernel.ipvs_netlink import HeldReal, HeldVirtual
from kdns.proxy.conntrack import Flow
from kdns.proxy.iptables_rules import chain_hash
from kdns.proxy.ipvs import At, Real
from kdns.proxy.options import Options
from kdns.proxy.table import ForwardingTable

CIDRS = "10.244.0.0/16,fd00:10:244::/56"
KUBECONFIG = """\
apiVersion: v1
kind: Config
clusters: [{{name: c, cluster: {{server: "{url}"}}}}]
contexts: [{{name: c, context: {{cluster: c, user: u}}}}]
current-context: c
users: [{{name: u, user: {{}}}}]
"""
NODE1: Json = {
    "kind": "Node", "metadata": {"name": "node1"}, "spec": {},
    "status": {"addresses": [{"type": "InternalIP", "address": NODE_IP}]},
}  # fmt: skip
DEFAULT: Json = {"kind": "Namespace", "metadata": {"name": "default"}}
ON_8080 = (("http", 8080, "TCP"),)
WEB = exposed("web", node_port=30080, ip="10.96.0.50")
WEB_5 = slice_of("web", endpoint("10.244.1.5"), ports=ON_8080)
WEB_6 = slice_of("web", endpoint("10.244.1.6"), ports=ON_8080)
QUIET = service("quiet", ip="10.96.0.51")
QUIET_7 = slice_of("quiet", endpoint("10.244.1.7"))
NAMES = service("names", ip="10.96.0.53", ports=[("dns", 53, "UDP")])
NAMES_8 = slice_of("names", endpoint("10.244.1.8"), ports=(("dns", 5353, "UDP"),))
OBJECTS = (DEFAULT, NODE1, WEB, WEB_5, QUIET, QUIET_7, NAMES, NAMES_8)
LATER = service("later", ip="10.96.0.99")
LATER_9 = slice_of("later", endpoint("10.244.1.9"))

WEB_SVC = f"KUBE-SVC-{chain_hash('default/web:httptcp')}"
WEB_SEP = f"KUBE-SEP-{chain_hash('default/web:httptcp10.244.1.5:8080')}"
QUIET_SVC = f"KUBE-SVC-{chain_hash('default/quiet:httptcp')}"


class Site:
    """One node whose rules were written once. kind -- nft, legacy (of iptables), or nftables"""

    def __init__(self, node: Node, kind: str) -> None:
        self.node, self.kind = node, kind
        self.mode = "nftables" if kind == "nftables" else "iptables"
        for name in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
            node.run("sysctl", "-qw", f"{name}=1")
        if kind != "nftables":
            for tool in (self.tool(4), self.tool(6)):
                # kubelet's mark says which variant this node uses.
                node.run(tool, "-t", "mangle", "-N", "KUBE-KUBELET-CANARY")
        self.api: Api = node.api(*OBJECTS)
        self.kubeconfig = node.folder / "kubeconfig"
        self.kubeconfig.write_text(KUBECONFIG.format(url=self.api.url))
        flags = ("--master", self.api.url, f"--cluster-cidr={CIDRS}", f"--proxy-mode={self.mode}")
        proxy = node.proxy(*flags)
        proxy.until_synced()
        proxy.kill()  # its rules stay, and nobody puts right what is broken
        self.written = self.save()

    def tool(self, family: int = 4) -> str:
        return f"{'iptables' if family == 4 else 'ip6tables'}-{self.kind}"

    def save(self) -> tuple[str, ...]:
        if self.kind == "nftables":
            return (self.node.run("nft", "-s", "list", "ruleset"),)
        return tuple(self.node.run(f"{self.tool(family)}-save") for family in (4, 6))

    def restore(self) -> None:
        """Begin anew."""
        self.node.run("iptables-legacy", "-t", "nat", "-F", check=False)
        self.node.run("iptables-legacy", "-t", "nat", "-X", check=False)
        self.node.run("nft", "flush", "ruleset")
        if self.kind == "nftables":
            self.node.run("nft", "-f", "-", text=self.written[0])
        else:
            for family, text in zip((4, 6), self.written, strict=True):
                self.node.run(f"{self.tool(family)}-restore", text=text)
        self.api.put(*OBJECTS, LATER, LATER_9)
        self.api.delete(LATER, LATER_9)

    def iptables(self, *argv: str) -> None:
        self.node.run(self.tool(), *argv)

    def nft(self, *argv: str) -> None:
        self.node.run("nft", *argv)

    def element(self, place: str, start: str) -> str:
        """Return the line of a map that begins so, as `nft` takes it."""
        text = self.node.run("nft", "list", "map", "ip", "kube-proxy", place)
        lines = (line.strip().removeprefix("elements = {").strip() for line in text.splitlines())
        return next(line for line in lines if line.startswith(start)).rstrip("}, ")

    def chain(self, start: str, part: str) -> str:
        """Return the name of a chain."""
        text = self.node.run("nft", "list", "table", "ip", "kube-proxy")
        names = (line.split()[1] for line in text.splitlines() if line.startswith("\tchain "))
        return next(name for name in names if name.startswith(start) and part in name)

    def check(self, mode: str = "") -> tuple[int, Any]:
        """Return what `kdns check` finds on the node, and its exit code; in a thread that is
        there, which takes half the time of a process."""
        where = Where(kubeconfig=str(self.kubeconfig), node="node1", mode=cast("Any", mode))
        report = self.node.inside(check, Wishes(where, may_ask=False), 0.0)
        return int(report.faults > 0), json.loads(as_json(report))

    def check_by_process(self, *origin: str) -> tuple[int, Any]:
        """Run `kdns check` as the process that it is. origin -- flags; none: the API server"""
        given = origin or ("--kubeconfig", str(self.kubeconfig), "--no-dns", "--node", "node1")
        done = self.node.finish(
            sys.executable, "-m", "kdns", "check", "--settle", "0", "-o", "json", *given,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout)


def a_site(kind: str) -> Iterator[Site]:
    try:
        with Node("" if kind == "nftables" else kind) as node:
            yield Site(node, kind)
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["nft", "legacy"])
def iptables_site(request: pytest.FixtureRequest) -> Iterator[Site]:
    yield from a_site(request.param)


@pytest.fixture(scope="module")
def nftables_site() -> Iterator[Site]:
    yield from a_site("nftables")


@dataclass(frozen=True)
class Case:
    """What somebody does, and what is found then.

    expect -- (id, subject, words of the text, of the cause, of the advice)
    """

    title: str
    do: Callable[[Site], object]
    expect: tuple[str, str, str, str, str]
    besides: tuple[str, ...] = ()


def flush_built_in(site: Site) -> None:
    site.iptables("-t", "nat", "-F", "PREROUTING")
    site.iptables("-F", "FORWARD")


def flush_nat(site: Site) -> None:
    site.iptables("-t", "nat", "-F")
    site.iptables("-t", "nat", "-X")


def other_variant(site: Site) -> None:
    tool = "iptables-legacy" if site.kind == "nft" else "iptables-nft"
    site.node.run(tool, "-t", "nat", "-N", "KUBE-SERVICES")
    site.node.run(tool, "-t", "nat", "-A", "KUBE-SERVICES", "-d", "10.96.0.50", "-j", "RETURN")


AGAIN = "kdns puts it right at its next look"
RESTORED = "kdns writes them again within a minute"
IPTABLES = [
    Case(
        "a Service's chain emptied",
        lambda site: site.iptables("-t", "nat", "-F", WEB_SVC),
        ("rules-missing", "Service default/web:http, IPv4", f"chain {WEB_SVC} is empty",
         "somebody took them away", AGAIN),
    ),
    Case(
        "an endpoint turned elsewhere",
        lambda site: site.iptables("-t", "nat", "-R", WEB_SEP, "2", "-p", "tcp", "-j", "DNAT",
                                   "--to-destination", "10.9.9.9:8080"),
        ("rules-differ", "Service default/web:http, IPv4",
         "leads to 10.9.9.9:8080, not to 10.244.1.5:8080", "somebody changed them", AGAIN),
    ),
    Case(
        "the rule of a ClusterIP deleted",
        lambda site: site.iptables("-t", "nat", "-D", "KUBE-SERVICES", "-d", "10.96.0.51/32",
                                   "-p", "tcp", "-m", "comment", "--comment",
                                   "default/quiet:http cluster IP", "-m", "tcp", "--dport", "80",
                                   "-j", QUIET_SVC),
        ("rules-missing", "Service default/quiet:http, IPv4", "no rule in nat KUBE-SERVICES",
         "somebody took them away", "see the proxy's log and its /healthz"),
    ),
    Case(
        "a rule of somebody else among ours",
        lambda site: site.iptables("-t", "nat", "-I", "KUBE-SERVICES", "-s", "10.0.0.9/32",
                                   "-j", "RETURN"),
        ("frame-differs", "IPv4 rules", "nat KUBE-SERVICES also has -s 10.0.0.9/32 -j RETURN",
         "a chain that is kdns's alone", AGAIN),
    ),
    Case(
        "masquerading taken away",
        lambda site: site.iptables("-t", "nat", "-F", "KUBE-POSTROUTING"),
        ("frame-differs", "IPv4 rules", "nat KUBE-POSTROUTING has 0 rules, not 3",
         "another program", AGAIN),
    ),
    Case(
        "a firewall that flushes the built-in chains",
        flush_built_in,
        ("jumps-missing", "IPv4 rules",
         "no jump to KUBE- chains from filter FORWARD, nat PREROUTING",
         "a firewall's reload", "kdns puts the jumps back"),
    ),
    Case(
        "a table flushed by somebody else",
        flush_nat,
        ("rules-gone", "IPv4 rules", "no chain KUBE-SERVICES in table nat: no Service is reached",
         "a restart of firewalld", RESTORED),
    ),
    Case(
        "the mark that tells of a flush is gone",
        lambda site: site.iptables("-t", "mangle", "-X", "KUBE-PROXY-CANARY"),
        ("frame-differs", "IPv4 rules", "mangle KUBE-PROXY-CANARY is gone: the table was flushed",
         "another program", AGAIN),
    ),
    Case(
        "a Service without rules",
        lambda site: site.api.put(LATER, LATER_9),
        ("rules-missing", "Service default/later:http, IPv4", "is gone",
         "the proxy has not written them yet", "see the proxy's log"),
    ),
    Case(
        "rules of a Service that is gone",
        lambda site: site.api.delete(QUIET, QUIET_7),
        ("rules-extra", "Service default/quiet:http, IPv4", f"chain {QUIET_SVC}",
         "it was deleted, and its rules stay", "see the proxy's log"),
    ),
    Case(
        "rules of an older registry",
        lambda site: site.api.put(WEB_6),
        ("rules-differ", "Service default/web:http, IPv4",
         f"chain {WEB_SVC} leads to 10.244.1.5:8080, not to 10.244.1.6:8080",
         "rules of an older registry", AGAIN),
    ),
    Case(
        "chains that the ipvs mode left",
        lambda site: site.iptables("-t", "nat", "-N", "KUBE-LOAD-BALANCER"),
        ("other-mode-left", "mode ipvs", "beside the iptables mode's rules",
         "a proxy of that mode ran here", "kube-proxy --cleanup"),
    ),
    Case(
        "the table that the nftables mode left",
        lambda site: site.nft("add", "table", "ip", "kube-proxy"),
        ("other-mode-left", "mode nftables", "table kube-proxy beside the iptables mode's rules",
         "a proxy of that mode ran here", "kube-proxy --cleanup"),
    ),
    Case(
        "KUBE- chains in the other variant",
        other_variant,
        ("iptables-both-variants", "iptables", "in iptables-legacy and ",
         "run with different variants; every packet meets both sets", "update-alternatives"),
    ),
]  # fmt: skip


WEB_IP = "10.96.0.50 . tcp . 80"
NFTABLES = [
    Case(
        "a Service's chain emptied",
        lambda site: site.nft("flush", "chain", "ip", "kube-proxy",
                              site.chain("service-", "default/web/")),
        ("rules-missing", "Service default/web:http, IPv4", "is empty", "somebody took them away",
         AGAIN),
    ),
    Case(
        "an endpoint turned elsewhere",
        lambda site: site.node.run(
            "nft", "-f", "-", text=f"flush chain ip kube-proxy {site.chain('service-', '/web/')}\n"
            f"add rule ip kube-proxy {site.chain('service-', '/web/')} meta l4proto tcp dnat to"
            " 10.9.9.9:8080\n"),
        ("rules-differ", "Service default/web:http, IPv4",
         "leads to 10.9.9.9:8080, not to 10.244.1.5:8080", "somebody changed them", AGAIN),
    ),
    Case(
        "a ClusterIP taken out of the map",
        lambda site: site.nft("delete", "element", "ip", "kube-proxy", "service-ips",
                              f"{{ {site.element('service-ips', WEB_IP)} }}"),
        ("rules-missing", "Service default/web:http, IPv4", f"service-ips has no {WEB_IP}",
         "somebody took them away", "see the proxy's log"),
    ),
    Case(
        "a rule of somebody else among ours",
        lambda site: site.nft("insert", "rule", "ip", "kube-proxy", "services", "ip", "saddr",
                              "10.0.0.9", "return"),
        ("frame-differs", "IPv4 rules", "chain services", "a chain that is kdns's alone", AGAIN),
    ),
    Case(
        "a foreign flush of everything",
        lambda site: site.nft("flush", "ruleset"),
        ("rules-gone", "IPv4 rules", "no table ip kube-proxy: no Service is reached",
         "nft flush ruleset", RESTORED),
    ),
    Case(
        "a Service without rules",
        lambda site: site.api.put(LATER, LATER_9),
        ("rules-missing", "Service default/later:http, IPv4", "is gone",
         "the proxy has not written them yet", "see the proxy's log"),
    ),
    Case(
        "rules of a Service that is gone",
        lambda site: site.api.delete(QUIET, QUIET_7),
        ("rules-extra", "Service default/quiet:http, IPv4", "chain service-",
         "it was deleted, and its rules stay", "see the proxy's log"),
    ),
    Case(
        "chains that the iptables mode left",
        lambda site: site.node.run("iptables-nft", "-t", "nat", "-N", WEB_SVC),
        ("other-mode-left", "mode iptables", "KUBE-SVC-", "a proxy of that mode ran here",
         "kdns removes what it finds when it starts"),
    ),
]  # fmt: skip


def assert_found(site: Site, case: Case) -> None:
    site.restore()
    case.do(site)
    code, told = site.check(site.mode)
    id, subject, *words = case.expect
    found = told["findings"]
    one = next((one for one in found if (one["id"], one["subject"]) == (id, subject)), None)
    assert one is not None, (found, told["notes"])
    for name, part in zip(("text", "cause", "advice"), words, strict=True):
        assert part in one[name], one
    assert {one["id"] for one in found} == {id, *case.besides}, found
    assert code == 1


@pytest.mark.root
@pytest.mark.parametrize("case", IPTABLES, ids=lambda case: case.title)
def test_iptables_rules_that_somebody_broke(iptables_site: Site, case: Case) -> None:
    assert_found(iptables_site, case)


@pytest.mark.root
@pytest.mark.parametrize("case", NFTABLES, ids=lambda case: case.title)
def test_nftables_rules_that_somebody_broke(nftables_site: Site, case: Case) -> None:
    assert_found(nftables_site, case)


def assert_well(site: Site) -> None:
    site.restore()
    code, told = site.check()
    assert (code, told["findings"]) == (0, []), told["findings"]
    assert told["checked"]["rules"].startswith(f"mode {site.mode}: ")
    assert {*told["checked"]} == {"registry", "rules", "conntrack", "host"}
    assert site.check_by_process() == (code, told)


@pytest.mark.root
def test_a_node_that_is_well(iptables_site: Site) -> None:
    assert_well(iptables_site)


@pytest.mark.root
def test_a_node_of_nftables_that_is_well(nftables_site: Site) -> None:
    assert_well(nftables_site)


@pytest.mark.root
def test_a_host_without_rules_is_no_node(iptables_site: Site) -> None:
    site = iptables_site
    site.restore()
    for tool in (site.tool(4), site.tool(6)):
        for table in ("nat", "filter", "mangle"):
            site.node.run(tool, "-t", table, "-F")
            site.node.run(tool, "-t", table, "-X")
    code, told = site.check()
    assert (code, told["findings"]) == (0, [])
    assert "holds no rules for Services" in " ".join(told["notes"])


@pytest.mark.root
def test_a_client_whose_endpoint_is_gone(iptables_site: Site) -> None:
    """It never rests: the kernel leads it to a Pod that is no endpoint any more."""
    site = iptables_site
    site.restore()
    with site.node.server("10.244.1.8", 5353, socket.SOCK_DGRAM):
        client = site.node.udp("10.96.0.53", 53)
        with client:
            client.send(b"?")
            assert client.recv(99) == b"10.244.1.8 ?"
            assert site.check()[1]["findings"] == []
            site.api.put(slice_of("names", endpoint("10.244.1.18"), ports=(("dns", 5353, "UDP"),)))
            _, told = site.check()
    stale = [one for one in told["findings"] if one["id"] == "stale-flow"]
    assert [(one["subject"], one["text"]) for one in stale] == [
        ("Service default/names:dns, 10.96.0.53:53/udp",
         f"1 flow from {NODE_IP} to 10.244.1.8:5353, no endpoint of it"),
    ]  # fmt: skip
    assert "conntrack -D -p udp --orig-dst 10.96.0.53 --dport 53" in stale[0]["advice"]


SYSCTLS = [
    ("net.ipv4.ip_forward", "0", "1", "ip-forward-off"),
    ("net.ipv4.conf.all.route_localnet", "0", "1", "route-localnet-off"),
    ("net.ipv4.ip_local_port_range", "20000 60999", "32768 60999", "node-port-ephemeral"),
]


@pytest.mark.root
@pytest.mark.parametrize(("name", "bad", "good", "id"), SYSCTLS)
def test_settings_of_the_node(iptables_site: Site, name: str, bad: str, good: str, id: str) -> None:
    site = iptables_site
    site.restore()
    site.node.run("sysctl", "-qw", f"{name}={bad}")
    code, told = site.check()
    site.node.run("sysctl", "-qw", f"{name}={good}")
    assert (code, [one["id"] for one in told["findings"]]) == (1, [id])


@pytest.mark.root
def test_services_inside_a_network_of_the_node(iptables_site: Site) -> None:
    site = iptables_site
    site.restore()
    site.node.run("ip", "addr", "add", "10.96.0.1/16", "dev", "eth0")
    code, told = site.check_by_process()
    site.node.run("ip", "addr", "del", "10.96.0.1/16", "dev", "eth0")
    (one,) = told["findings"]
    assert (code, one["id"], one["subject"]) == (
        1, "service-in-host-network", "network 10.96.0.0/16 on eth0",
    )  # fmt: skip


@pytest.mark.root
def test_a_proxy_that_runs_tells_of_itself(iptables_site: Site) -> None:
    site = iptables_site
    site.restore()
    path = str(site.node.folder / "control.sock")
    proxy = site.node.proxy(
        "--master", site.api.url, f"--cluster-cidr={CIDRS}", "--control", path
    )  # fmt: skip
    proxy.until_synced()
    code, told = site.check_by_process("--control", path)
    proxy.stop()
    assert (code, [one["id"] for one in told["findings"]]) == (0, ["dns-not-asked"])
    assert {*told["checked"]} == {"registry", "gate", "rules", "conntrack", "host"}


SETTINGS = {
    "iptables": ("--iptables-masquerade-bit=20", "--iptables-localhost-nodeports=false"),
    "nftables": (),
}


@pytest.mark.root
@pytest.mark.parametrize("mode", SETTINGS)
def test_a_proxy_with_settings_of_its_own_is_held_against_those(
    mode: str, nftables_site: Site
) -> None:
    """Also one whose node the API server does not know."""
    site = nftables_site
    site.node.run("nft", "flush", "ruleset")
    path = str(site.node.folder / "control.sock")
    proxy = site.node.proxy(
        "--master", site.api.url, f"--proxy-mode={mode}", "--control", path, "--masquerade-all",
        "--detect-local-mode=InterfaceNamePrefix", "--pod-interface-name-prefix=veth",
        f"--nodeport-addresses={NODE_IP}/24", "--hostname-override=nowhere", *SETTINGS[mode],
    )  # fmt: skip
    proxy.until_synced()
    code, told = site.check_by_process("--control", path, "--no-dns")
    proxy.stop()
    assert (code, told["findings"]) == (0, []), told["findings"]
    assert told["checked"]["rules"].startswith(f"mode {mode}")


# --- by values ------------------------------------------------------------------------------


def test_a_mode_that_is_not_compared_is_a_note() -> None:
    seen = Seen("userspace", {"nft": {4: "*nat\n:KUBE-PORTALS-HOST - [0:0]\nCOMMIT\n"}})
    assert modes_in(seen) == {"userspace"}
    found = [*check_kernel({4: (ForwardingTable(), Options())}, seen)]
    assert [(one.id, one.severity) for one in found] == [("mode-not-compared", "note")]


IPVS_WEB = service("web", ip="10.96.0.50")
SERVER = At("tcp", "10.96.0.50", 80)
CHAINS: dict[Any, Any] = {"nft": {4: "*nat\n:KUBE-SERVICES - [0:0]\nCOMMIT\n"}}
IPVS = [
    ({SERVER: ["10.244.1.5"]}, ["10.96.0.50"], None),
    ({SERVER: ["10.244.1.9"]}, ["10.96.0.50"],
     ("rules-differ", "virtual server 10.96.0.50:80/tcp sends to 10.244.1.9:80, not to"
      " 10.244.1.5:80")),
    ({SERVER: ["10.244.1.5"]}, [], ("rules-missing", "kube-ipvs0 has no 10.96.0.50")),
    ({SERVER: ["10.244.1.5"], SERVER._replace(port=81): []}, ["10.96.0.50"],
     ("rules-extra", "virtual server 10.96.0.50:81/tcp")),
    ({SERVER._replace(port=81): []}, ["10.96.0.50"],
     ("rules-missing", "no virtual server 10.96.0.50:80/tcp")),
    ({}, ["10.96.0.50"], ("rules-gone", "no virtual server: no Service is reached")),
]  # fmt: skip


@pytest.mark.parametrize(("servers", "bound", "expect"), IPVS)
def test_virtual_servers(
    servers: dict[At, list[str]], bound: list[str], expect: tuple[str, str] | None
) -> None:
    """This machine has no IPVS: what it would hold is given as values."""
    table = table_of(IPVS_WEB, slice_of("web", endpoint("10.244.1.5")))
    held = {
        at: HeldVirtual("rr", 0, {Real(ip, 80): HeldReal(1, 0) for ip in reals})
        for at, reals in servers.items()
    }
    seen = Seen("ipvs", CHAINS, written=True, ipvs={4: HeldIpvs(held, bound, ["192.168.77.1"])})
    found = [(one.id, one.text) for one in check_kernel({4: (table, Options())}, seen)]
    if expect is None:
        assert found == []
    else:
        assert any(id == expect[0] and expect[1] in text for id, text in found), found


def test_no_rules_and_nobody_who_says_that_there_were_some() -> None:
    found = [*check_kernel({4: (ForwardingTable(), Options())}, Seen("iptables"))]
    assert [(one.id, one.severity) for one in found] == [("kernel-not-seen", "note")]


def flow(destination: str, answered: str, protocol: str = "udp") -> Flow:
    def pack(text: str) -> tuple[bytes, int]:
        ip, port = text.split(":")
        return socket.inet_aton(ip), int(port)

    return Flow(protocol, socket.inet_aton("10.244.1.3"), 4000, *pack(destination), *pack(answered))  # type: ignore[arg-type]


def test_flows_of_a_service_that_is_gone_and_flows_of_others() -> None:
    flows = [
        flow("10.96.9.9:53", "10.244.1.8:53"),  # a Service's, that is gone
        flow("10.96.9.9:53", "10.244.1.8:53", "tcp"),  # TCP learns of its end by itself
        flow("192.0.2.1:53", "192.0.2.1:53"),  # not translated
        flow("192.168.77.1:5000", "10.244.1.8:5000"),  # a hostPort of this node
        flow("192.0.2.2:53", "172.17.0.2:53"),  # a container's, no Pod's
    ]
    (one,) = check_flows(ForwardingTable(), flows, ["192.168.77.1"], ["10.244.0.0/16"])
    assert (one.id, one.subject) == ("stale-flow", "10.96.9.9:53/udp")
    assert "no Service has this address any more" in one.text
