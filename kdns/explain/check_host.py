"""This node and its neighbours: settings, ports and resolvers that break what is right in itself.

Pure: values read of the host in, findings out (check_sight.py reads them).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from kdns.corefile import Corefile, Directive, ServerBlock
from kdns.explain.check_finding import Finding, count, few, finding
from kdns.proxy.config import ProxyConfig, serves_localhost
from kdns.proxy.options import Family
from kdns.proxy.table import ForwardingTable

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Tables: TypeAlias = Mapping[Family, ForwardingTable]

PORT_RANGE: Final = "net/ipv4/ip_local_port_range"
RESERVED: Final = "net/ipv4/ip_local_reserved_ports"
FORWARD: Final[Mapping[Family, str]] = {
    4: "net/ipv4/ip_forward", 6: "net/ipv6/conf/all/forwarding",
}  # fmt: skip
ROUTE_LOCALNET: Final = "net/ipv4/conf/all/route_localnet"
BRIDGE: Final[Mapping[Family, str]] = {
    4: "net/bridge/bridge-nf-call-iptables", 6: "net/bridge/bridge-nf-call-ip6tables",
}  # fmt: skip
FLOWS: Final = "net/netfilter/nf_conntrack_count"
MOST_FLOWS: Final = "net/netfilter/nf_conntrack_max"
SYSCTLS: Final = (
    PORT_RANGE, RESERVED, *FORWARD.values(), ROUTE_LOCALNET, *BRIDGE.values(), FLOWS, MOST_FLOWS,
)  # fmt: skip
ALMOST_FULL: Final = 0.9  # of the table of connections

# systemd-resolved's, which every distribution with it has in /etc/resolv.conf.
STUBS: Final = ("127.0.0.53", "127.0.0.54")
REAL_RESOLV_CONF: Final = "/run/systemd/resolve/resolv.conf"
DNS_PORT: Final = 53


@dataclass
class Host:
    """What was read of the host.

    sysctls  -- path below /proc/sys -> its text; one that is not there is left out
    networks -- CIDR -> interface: networks that are reached without a gateway
    bridges  -- there is a bridge with interfaces in it
    """

    sysctls: Mapping[str, str] = field(default_factory=dict)
    networks: Mapping[str, str] = field(default_factory=dict)
    bridges: bool = False


def check_host(config: ProxyConfig, tables: Tables, host: Host) -> Iterator[Finding]:
    """Yield what of this host is in the way of the forwarding there should be."""
    yield from _check_switches(config, tables, host)
    yield from _check_node_ports(tables, host.sysctls)
    yield from _check_networks(tables, host.networks)
    held, most = (_number(host.sysctls, path) for path in (FLOWS, MOST_FLOWS))
    if held is not None and most and held >= ALMOST_FULL * most:
        yield finding(
            "conntrack-full", "conntrack", f"{held} of at most {most} connections are followed",
            "more connections than the kernel was told to expect; when it is full, new ones are"
            " dropped",
            "raise net.netfilter.nf_conntrack_max (--conntrack-min, --conntrack-max-per-core)",
        )  # fmt: skip


def _check_switches(config: ProxyConfig, tables: Tables, host: Host) -> Iterator[Finding]:
    for family, table in sorted(tables.items()):
        if not table.services:
            continue
        if host.sysctls.get(FORWARD[family]) == "0":
            yield _switch(
                "ip-forward-off", FORWARD[family], "0",
                f"packets to Pods are not passed on (IPv{family}): what rules translate is lost",
                "nobody turned it on, or a hardening profile turned it off",
            )  # fmt: skip
        if host.bridges and host.sysctls.get(BRIDGE[family]) == "0":
            yield _switch(
                "bridge-nf-call-off", BRIDGE[family], "0",
                "packets between Pods of one bridge miss the rules: answers come from the Pod's"
                " address and not the ClusterIP's",
                "the module br_netfilter was loaded with it off, or a profile turned it off",
            )  # fmt: skip
    here = tables.get(4)
    node_ports = here is not None and any(one.node_port for one in here)
    if serves_localhost(config) and node_ports and host.sysctls.get(ROUTE_LOCALNET) == "0":
        yield _switch(
            "route-localnet-off", ROUTE_LOCALNET, "0",
            "NodePorts do not answer on 127.0.0.1, though they are to",
            "the proxy may not write it (a container without privileges), or somebody turned it"
            " back",
            " or start the proxy with --iptables-localhost-nodeports=false",
        )  # fmt: skip


def _switch(id: str, path: str, value: str, text: str, cause: str, instead: str = "") -> Finding:
    name = path.replace("/", ".")
    return finding(
        id, f"sysctl {name}", f"is {value}: {text}", cause,
        f"sysctl -w {name}=1, and keep it in /etc/sysctl.d{instead and f';{instead}'}",
    )  # fmt: skip


def _check_node_ports(tables: Tables, sysctls: Mapping[str, str]) -> Iterator[Finding]:
    words = sysctls.get(PORT_RANGE, "").split()
    if len(words) != 2 or not all(word.isdecimal() for word in words):
        return
    low, high = map(int, words)
    kept = _ports(sysctls.get(RESERVED, ""))
    users: dict[int, str] = {}
    for table in tables.values():
        for one in table:
            for port in (one.node_port, one.health_check_node_port):
                if low <= port <= high and not any(a <= port <= b for a, b in kept):
                    users.setdefault(port, one.name)
    if users:
        told = few(f"{port} ({name})" for port, name in sorted(users.items()))
        yield finding(
            "node-port-ephemeral", f"sysctl {PORT_RANGE.replace('/', '.')}",
            f"{low} to {high} holds {count(len(users), 'NodePort')}: {told}",
            "the kernel gives these ports to outgoing connections; the answers to such a"
            " connection are then taken for requests to the Service",
            "move the range (sysctl -w net.ipv4.ip_local_port_range='32768 60999') or reserve the"
            " NodePorts (net.ipv4.ip_local_reserved_ports=30000-32767)",
        )  # fmt: skip


def _ports(text: str) -> list[tuple[int, int]]:
    """Read "8080,30000-32767"."""
    found = []
    for word in text.replace(",", " ").split():
        low, _, high = word.partition("-")
        if low.isdecimal() and (not high or high.isdecimal()):
            found.append((int(low), int(high or low)))
    return found


def _check_networks(tables: Tables, networks: Mapping[str, str]) -> Iterator[Finding]:
    read = []
    for cidr, interface in sorted(networks.items()):
        network = ipaddress.ip_network(cidr, strict=False)
        # A default route is next to nothing; a route to one address is to that one.
        if 0 < network.prefixlen < network.max_prefixlen:
            read.append((network, interface))
    met: dict[str, list[str]] = {}
    for table in tables.values():
        for one in table:
            ip = ipaddress.ip_address(one.cluster_ip)
            for network, interface in read:
                if ip in network:
                    words = met.setdefault(f"{network} on {interface}", [])
                    if (word := f"{one.cluster_ip} ({'/'.join(one.key)})") not in words:
                        words.append(word)
    for place, words in met.items():
        yield finding(
            "service-in-host-network", f"network {place}",
            f"ClusterIPs are addresses of it: {few(words)}",
            "the range of the Services overlaps a network this node is in: hosts of it with such"
            " an address cannot be reached from here",
            "choose another --service-cluster-ip-range, and make the Services anew",
        )  # fmt: skip


def _number(sysctls: Mapping[str, str], path: str) -> int | None:
    text = sysctls.get(path, "")
    return int(text) if text.isdecimal() else None


# --- resolvers ------------------------------------------------------------------------------


@dataclass
class Resolvers:
    """What DNS forwards to, as far as it is known here.

    files -- resolv.conf path -> its text, of the host DNS runs on; one that is elsewhere, or
             cannot be read, is left out
    own   -- addresses at which this DNS is reached: the kube-dns Service's, the server's own
    """

    files: Mapping[str, str] = field(default_factory=dict)
    own: Collection[str] = ()


def check_resolvers(corefile: Corefile, resolvers: Resolvers) -> Iterator[Finding]:
    """Yield where `forward` leads back to the server it stands in."""
    for block in corefile.blocks:
        for directive in block.directives:
            if directive.name == "forward":
                yield from _check_forward(block, directive, resolvers)


def _check_forward(
    block: ServerBlock, directive: Directive, resolvers: Resolvers
) -> Iterator[Finding]:
    where = f"{directive.word.file}:{directive.word.line}, forward"
    for token in directive.args[1:]:
        if token.text in resolvers.files:
            names = nameservers(resolvers.files[token.text])
            if not names:
                yield finding(
                    "forward-nowhere", where, f"{token.text} names no nameserver",
                    "nobody has written this host's resolv.conf, or DNS sees another file than"
                    " you do",
                    "write `nameserver ADDRESS` into it, or addresses in place of the file",
                )  # fmt: skip
            for name in names:
                told = f"{token.text} names {name}"
                yield from _check_upstream(block, where, told, name, DNS_PORT, resolvers)
        else:
            place = _place(token.text)
            if place is not None:
                yield from _check_upstream(
                    block, where, f"it names {token.text}", *place, resolvers
                )


def _check_upstream(
    block: ServerBlock, where: str, told: str, address: str, port: int, resolvers: Resolvers
) -> Iterator[Finding]:
    ip = _address(address)
    if ip is None:
        return
    listens = {key.port for key in block.keys}
    bound = [a.text for d in block.directives if d.name == "bind" for a in d.args]
    own = {str(one) for text in resolvers.own if (one := _address(text)) is not None}
    everywhere = not bound or "0.0.0.0" in bound or "::" in bound
    local = ip.is_loopback and address not in STUBS and (everywhere or address in bound)
    if str(ip) in own or (port in listens and (local or str(ip) in bound)):
        whose = "this server's own" if str(ip) in own else "where this server listens"
        yield finding(
            "resolv-conf-loop", where, f"{told}, which is {whose}: each question comes back",
            "kubelet was given a resolv.conf that already points to the cluster's DNS, or a local"
            " resolver asks it",
            f"name the real resolvers: `forward . 192.0.2.53`, or a file that has them"
            f" ({REAL_RESOLV_CONF}; kubelet: resolvConf)",
        )  # fmt: skip
    elif address in STUBS:
        yield finding(
            "resolv-conf-stub", where, f"{told}, the stub of systemd-resolved",
            "in a Pod's network nobody listens there; on the host, resolved may ask this very"
            " server",
            f"`forward . {REAL_RESOLV_CONF}`, or kubelet's resolvConf: {REAL_RESOLV_CONF}",
        )  # fmt: skip


def nameservers(resolv_conf: str) -> list[str]:
    """Return what a resolv.conf(5) names."""
    lines: Iterable[Sequence[str]] = (line.split() for line in resolv_conf.splitlines())
    return [words[1] for words in lines if len(words) > 1 and words[0] == "nameserver"]


def _place(text: str) -> tuple[str, int] | None:
    """Read "10.0.0.1", "dns://10.0.0.1:5353", "[fd00::1]:53"; None for what is no address."""
    scheme, mark, rest = text.rpartition("://")
    if mark and scheme not in ("dns", ""):
        return None  # TLS: not a port of ours that answers in the clear
    if _address(rest) is not None:
        return rest, DNS_PORT
    address, _, port = rest.rpartition(":")
    address = address.strip("[]")
    if _address(address) is None or not port.isdecimal():
        return None
    return address, int(port)


def _address(text: str) -> Address | None:
    try:
        return ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
