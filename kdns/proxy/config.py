"""KubeProxyConfiguration: what an operator says about forwarding, read, checked, written back.

Decides which settings there are, their defaults, what is right together, and what they mean
for one family's rules on one node (options_of). How one value is written is settings.py's;
flags are flags.py's; reading files, and asking the node for its name and its addresses, is
left to whoever runs the proxy.

Reference 3.1. Null means the default everywhere; so does an empty or a zero value where
kube-proxy takes it so, for kubeadm writes those. One default is our own: minSyncPeriod of the
iptables mode is 0 and not 1s, because a burst of changes is one sync here anyway.
"""

# ruff: noqa: RUF009 -- _set() and _part() make fields

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final, Literal, TypeAlias, TypeVar

import yaml

from kdns.errors import ConfigError, Problem
from kdns.proxy import settings as s
from kdns.proxy.options import Detector, Family, NodeView, Options
from kdns.registry.objects import ZONE_LABEL, Node

API_VERSION = "kubeproxy.config.k8s.io/v1alpha1"
KIND = "KubeProxyConfiguration"
HEALTHZ_PORT, METRICS_PORT = 10256, 10249

Mode: TypeAlias = Literal["iptables", "nftables", "ipvs", "userspace"]
MODES: Final = ("iptables", "nftables", "ipvs", "userspace")
LOCAL_MODES: Final = ("ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix")
SCHEDULERS: Final = "rr wrr lc wlc lblc lblcr sh dh sed nq fo ovf mh".split()
_IPV4_LOOPBACK = ipaddress.ip_network("127.0.0.0/8")

# One local address of the node and the length of its prefix.
LocalAddress: TypeAlias = tuple[str, int]
_Path: TypeAlias = tuple[str, ...]
_P = TypeVar("_P")


def _set(name: str, kind: s.Kind, default: object, *, zero: bool = False) -> Any:
    """A setting. name -- in the file; zero -- an empty or zero value means the default."""
    return field(default=default, metadata={"name": name, "kind": kind, "zero": zero})


def _part(name: str, cls: type) -> Any:
    """A group of settings."""
    return field(default_factory=cls, metadata={"name": name, "part": cls})


# --- the settings -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ClientConnection:
    """kubeconfig -- "": the one a Pod gets from its cluster. The rest is read by kube-proxy's
    own client; ours asks for JSON and needs no rate limit for its few requests."""

    kubeconfig: str = _set("kubeconfig", s.Text("FILE"), "")
    accept_content_types: str = _set("acceptContentTypes", s.Text(), "")
    content_type: str = _set("contentType", s.Text(), "application/vnd.kubernetes.protobuf",
                             zero=True)  # fmt: skip
    qps: float = _set("qps", s.Number(), 5.0, zero=True)
    burst: int = _set("burst", s.Whole(), 10, zero=True)


@dataclass(frozen=True, slots=True)
class Logging:
    format: str = _set("format", s.Word(("text", "json"), "FORMAT"), "text", zero=True)
    verbosity: int = _set("verbosity", s.Whole(), 0)
    flush_frequency: float = _set("flushFrequency", s.Flush(), 5.0, zero=True)


@dataclass(frozen=True, slots=True)
class Iptables:
    """Periods are seconds. masquerade_bit is also that of the ipvs mode."""

    masquerade_bit: int = _set("masqueradeBit", s.Whole(0, 31), 14)
    masquerade_all: bool = _set("masqueradeAll", s.Switch(), False)
    localhost_node_ports: bool = _set("localhostNodePorts", s.Switch(), True)
    sync_period: float = _set("syncPeriod", s.Duration(positive=True), 30.0, zero=True)
    min_sync_period: float = _set("minSyncPeriod", s.Duration(), 0.0)


@dataclass(frozen=True, slots=True)
class Nftables:
    masquerade_bit: int = _set("masqueradeBit", s.Whole(0, 31), 14)
    masquerade_all: bool = _set("masqueradeAll", s.Switch(), False)
    sync_period: float = _set("syncPeriod", s.Duration(positive=True), 30.0, zero=True)
    min_sync_period: float = _set("minSyncPeriod", s.Duration(), 0.0)


@dataclass(frozen=True, slots=True)
class Ipvs:
    """Time-outs are seconds; 0 leaves the kernel's."""

    sync_period: float = _set("syncPeriod", s.Duration(positive=True), 30.0, zero=True)
    min_sync_period: float = _set("minSyncPeriod", s.Duration(), 0.0)
    scheduler: str = _set("scheduler", s.Word(SCHEDULERS, "NAME"), "rr", zero=True)
    exclude_cidrs: tuple[str, ...] = _set("excludeCIDRs", s.Cidrs(), ())
    strict_arp: bool = _set("strictARP", s.Switch(), False)
    tcp_timeout: float = _set("tcpTimeout", s.Duration(), 0.0)
    tcp_fin_timeout: float = _set("tcpFinTimeout", s.Duration(), 0.0)
    udp_timeout: float = _set("udpTimeout", s.Duration(), 0.0)


@dataclass(frozen=True, slots=True)
class DetectLocal:
    bridge_interface: str = _set("bridgeInterface", s.Interface(), "")
    interface_name_prefix: str = _set("interfaceNamePrefix", s.Interface(s.MAX_PREFIX), "")


@dataclass(frozen=True, slots=True)
class Conntrack:
    """Limits are entries, time-outs seconds; 0 leaves the kernel's. With max_per_core 0, min
    does not count either (reference 3.3)."""

    max_per_core: int = _set("maxPerCore", s.Whole(), 32 * 1024)
    min: int = _set("min", s.Whole(), 128 * 1024)
    tcp_established_timeout: float = _set("tcpEstablishedTimeout", s.Duration(), 24 * 3600.0)
    tcp_close_wait_timeout: float = _set("tcpCloseWaitTimeout", s.Duration(), 3600.0)
    tcp_be_liberal: bool = _set("tcpBeLiberal", s.Switch(), False)
    udp_timeout: float = _set("udpTimeout", s.Duration(), 0.0)
    udp_stream_timeout: float = _set("udpStreamTimeout", s.Duration(), 0.0)


@dataclass(frozen=True, slots=True)
class ProxyConfig:
    """All of a KubeProxyConfiguration, defaults applied.

    bind_address -- the node's primary IP, if another one than 0.0.0.0 or ::; nothing is bound
                    to it, the name is history
    healthz_bind_address, metrics_bind_address -- "IP:port"; "" (by a flag only): not served
    node_port_addresses -- CIDRs or words of settings.KEYWORDS; empty: all
    """

    feature_gates: tuple[tuple[str, bool], ...] = _set("featureGates", s.Gates(), ())
    client: ClientConnection = _part("clientConnection", ClientConnection)
    logging: Logging = _part("logging", Logging)
    hostname_override: str = _set("hostnameOverride", s.Text("NAME"), "")
    bind_address: str = _set("bindAddress", s.Ip(), "0.0.0.0", zero=True)
    healthz_bind_address: str = _set("healthzBindAddress", s.Listen(HEALTHZ_PORT),
                                     f"0.0.0.0:{HEALTHZ_PORT}", zero=True)  # fmt: skip
    metrics_bind_address: str = _set("metricsBindAddress", s.Listen(METRICS_PORT),
                                     f"127.0.0.1:{METRICS_PORT}", zero=True)  # fmt: skip
    bind_address_hard_fail: bool = _set("bindAddressHardFail", s.Switch(), False)
    enable_profiling: bool = _set("enableProfiling", s.Switch(), False)
    show_hidden_metrics: str = _set("showHiddenMetricsForVersion", s.Text("X.Y"), "")
    mode: Mode = _set("mode", s.Word(MODES, "MODE"), "iptables", zero=True)
    iptables: Iptables = _part("iptables", Iptables)
    ipvs: Ipvs = _part("ipvs", Ipvs)
    nftables: Nftables = _part("nftables", Nftables)
    detect_local_mode: str = _set("detectLocalMode", s.Word(LOCAL_MODES, "MODE"), "ClusterCIDR",
                                  zero=True)  # fmt: skip
    detect_local: DetectLocal = _part("detectLocal", DetectLocal)
    cluster_cidrs: tuple[str, ...] = _set("clusterCIDR", s.ClusterCidrs(), ())
    node_port_addresses: tuple[str, ...] = _set("nodePortAddresses", s.NodePortAddresses(), ())
    oom_score_adj: int = _set("oomScoreAdj", s.Whole(-1000, 1000), -999)
    conntrack: Conntrack = _part("conntrack", Conntrack)
    config_sync_period: float = _set("configSyncPeriod", s.Duration(positive=True), 900.0,
                                     zero=True)  # fmt: skip

    @property
    def sync_period(self) -> float:
        """Seconds between retries, and between looks whether our rules still stand."""
        return self._of_mode().sync_period

    @property
    def min_sync_period(self) -> float:
        """Seconds that must lie between two syncs."""
        return self._of_mode().min_sync_period

    @property
    def masquerade_all(self) -> bool:
        return (self.nftables if self.mode == "nftables" else self.iptables).masquerade_all

    @property
    def masquerade_bit(self) -> int:
        return (self.nftables if self.mode == "nftables" else self.iptables).masquerade_bit

    @property
    def needs_node(self) -> bool:
        """Options cannot be known before the Node object is."""
        return self.detect_local_mode == "NodeCIDR" or s.PRIMARY in self.node_port_addresses

    def _of_mode(self) -> Iptables | Nftables | Ipvs:
        match self.mode:
            case "nftables":
                return self.nftables
            case "ipvs":
                return self.ipvs
            case _:
                return self.iptables


# Read by kube-proxy for Windows, for the modes of old, or for its own log library: taken
# without a word, and without effect. A group stands for all in it.
_NO_EFFECT: Final = frozenset(
    {
        ("winkernel",),
        ("windowsRunAsService",),
        ("portRange",),
        ("logging", "vmodule"),
        ("logging", "options"),
    }
)
_GONE: Final[Mapping[_Path, str]] = {
    ("udpIdleTimeout",): "it went with kube-proxy's userspace mode; ours has --udp-timeout",
    ("resourceContainer",): "kube-proxy has dropped it",
    ("conntrack", "max"): "write maxPerCore and min",
}
_SYNCED: Final = (("iptables", "iptables"), ("nftables", "nftables"), ("ipvs", "ipvs"))


# --- reading ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Read:
    """A configuration, and what was odd about it."""

    config: ProxyConfig
    warnings: tuple[Problem, ...] = ()


class _Report:
    """Collects problems; knows the line of each field."""

    def __init__(self, file: str, lines: Mapping[_Path, int]) -> None:
        self.file, self.lines = file, lines
        self.problems: list[Problem] = []

    def add(self, path: _Path, text: str, *, warning: bool = False) -> None:
        known = path
        while known and known not in self.lines:
            known = known[:-1]
        where = f"{'.'.join(path)}: " if path else ""
        self.problems.append(
            Problem(self.file, self.lines.get(known, 0), f"{where}{text}", warning)
        )

    def result(self, config: ProxyConfig) -> Read:
        """Raises ConfigError, with the warnings too, if there was any error."""
        if any(not one.warning for one in self.problems):
            raise ConfigError(self.problems)
        return Read(config, tuple(self.problems))


def parse_config(text: str, file: str) -> Read:
    """Return the configuration in the YAML or JSON of a file.

    As kube-proxy: a field that is unknown or given twice (the last one counts) is a warning,
    a value that is not right an error. Raises ConfigError with all problems at once.
    """
    lines: dict[_Path, int] = {}
    report = _Report(file, lines)
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_node() if loader.check_node() else None
        more = loader.check_node()
        if node is not None:
            _note_lines(node, (), lines, report)
        value = None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as e:
        line = e.problem_mark.line + 1 if e.problem_mark else 0
        raise ConfigError([Problem(file, line, f"not YAML: {e.problem}")]) from None
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise ConfigError([Problem(file, 0, f"not YAML: {e}")]) from None
    finally:
        if loader is not None:
            loader.dispose()
    if more:
        report.add((), "only the first document of this file is read", warning=True)
    return _decode(value, report)


def decode_config(value: object, file: str) -> Read:
    """As parse_config, for a document that somebody else has parsed: without lines."""
    return _decode(value, _Report(file, {}))


class _Loader(yaml.SafeLoader):
    """Leaves dates as the text they are, as Go's reader does."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in known if tag != "tag:yaml.org,2002:timestamp"]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _note_lines(node: yaml.Node, path: _Path, lines: dict[_Path, int], report: _Report) -> None:
    lines.setdefault(path, node.start_mark.line + 1)
    if not isinstance(node, yaml.MappingNode) or len(path) > 2:
        return  # deeper than any field; also ends a mapping that holds itself
    seen = set()
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        below = (*path, key.value)
        lines[below] = key.start_mark.line + 1
        if below in seen:
            report.add(below, "is given twice; this one counts", warning=True)
        seen.add(below)
        _note_lines(value, below, lines, report)


def _decode(value: object, report: _Report) -> Read:
    if not isinstance(value, dict):
        report.add((), f"must be a {KIND} of {API_VERSION}")
        return report.result(ProxyConfig())
    if value.get("kind") != KIND or value.get("apiVersion") != API_VERSION:
        _refuse_kind(value, report)
        return report.result(ProxyConfig())
    config = _decode_part(ProxyConfig, value, (), report)
    config = _listen_defaults(config, value)
    for path, text in mistakes(config):
        report.add(path, text)
    return report.result(config)


def _refuse_kind(value: Mapping[Any, Any], report: _Report) -> None:
    kind, version = value.get("kind"), value.get("apiVersion")
    if kind == "ConfigMap":
        report.add(("kind",), "is a ConfigMap; give the text that it holds under config.conf")
    elif kind != KIND:
        report.add(("kind",), f"must be {KIND}, found {kind!r}")
    if kind != "ConfigMap" and version != API_VERSION:
        report.add(("apiVersion",), f"must be {API_VERSION}, found {version!r}")


def _decode_part(cls: type[_P], value: Mapping[Any, Any], path: _Path, report: _Report) -> _P:
    known = {one.metadata["name"]: one for one in fields(cls)}  # type: ignore[arg-type]
    found: dict[str, Any] = {}
    for key, given in value.items():
        below = (*path, str(key))
        if key not in known:
            _unknown(below, [*known], report)
            continue
        meta = known[key].metadata
        if given is None or (meta.get("zero") and meta["kind"].is_zero(given)):
            continue
        part = meta.get("part")
        if part is None:
            try:
                found[known[key].name] = meta["kind"].read(given)
            except ValueError as e:
                report.add(below, f"{e}, found {_short(given)}")
        elif isinstance(given, dict):
            found[known[key].name] = _decode_part(part, given, below, report)
        else:
            report.add(below, f"must be a mapping, found {_short(given)}")
    return cls(**found)


def _unknown(path: _Path, known: list[str], report: _Report) -> None:
    if path in _NO_EFFECT or path in (("apiVersion",), ("kind",)):
        return
    if path in _GONE:
        report.add(path, f"is ignored: {_GONE[path]}", warning=True)
    else:
        report.add(path, f"is no field, and ignored{s.nearest(path[-1], known)}", warning=True)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _listen_defaults(config: ProxyConfig, value: Mapping[Any, Any]) -> ProxyConfig:
    """With an IPv6 bindAddress the listeners that nothing is said of are IPv6, as upstream."""
    if ":" not in config.bind_address:
        return config
    if not value.get("healthzBindAddress"):
        config = replace(config, healthz_bind_address=f"[::]:{HEALTHZ_PORT}")
    if not value.get("metricsBindAddress"):
        config = replace(config, metrics_bind_address=f"[::1]:{METRICS_PORT}")
    return config


def mistakes(config: ProxyConfig) -> Iterator[tuple[_Path, str]]:
    """Yield (field, what would be right) for values that are not right together."""
    for name, attribute in _SYNCED:
        part: Iptables | Nftables | Ipvs = getattr(config, attribute)
        if part.min_sync_period > part.sync_period:
            yield (
                (name, "minSyncPeriod"),
                (
                    f"must be at most syncPeriod ({s.render_duration(part.sync_period)}),"
                    f" found {s.render_duration(part.min_sync_period)}"
                ),
            )
    detect = config.detect_local
    if config.detect_local_mode == "BridgeInterface" and not detect.bridge_interface:
        yield ("detectLocal", "bridgeInterface"), "must name the bridge of the Pods"
    if config.detect_local_mode == "InterfaceNamePrefix" and not detect.interface_name_prefix:
        yield (
            ("detectLocal", "interfaceNamePrefix"),
            "must say how the names of the Pods' interfaces begin",
        )


def cautions(config: ProxyConfig) -> Iterator[str]:
    """Yield what is allowed, but perhaps not meant."""
    if config.detect_local_mode == "ClusterCIDR" and not config.cluster_cidrs:
        yield (
            "no clusterCIDR is given: the Pods of this node cannot be told from other clients"
            " (write the CIDR of the Pods, or choose another detectLocalMode)"
        )


# --- writing ------------------------------------------------------------------------------


def render_config(config: ProxyConfig) -> dict[str, object]:
    """Return the v1alpha1 object, as /configz shows it; reading it gives `config` again (but
    for a listener that is switched off, which only a flag can say)."""
    return {"apiVersion": API_VERSION, "kind": KIND, **_render_part(config)}


def _render_part(part: object) -> dict[str, object]:
    out: dict[str, object] = {}
    for one in fields(part):  # type: ignore[arg-type]
        value = getattr(part, one.name)
        kind = one.metadata.get("kind")
        out[one.metadata["name"]] = kind.render(value) if kind else _render_part(value)
    return out


def render_yaml(config: ProxyConfig) -> str:
    """Return the text that --write-config-to writes."""
    return yaml.safe_dump(render_config(config), sort_keys=True)


# --- what it means on a node --------------------------------------------------------------


def node_name(config: ProxyConfig, host: str) -> str:
    """Return this node's name: hostnameOverride, else the host's, in lower case."""
    return (config.hostname_override.strip() or host.strip()).lower()


def node_address(config: ProxyConfig, family: Family, node: Node | None) -> str:
    """Return the node's primary address of a family, "" if it has none: bindAddress where that
    is an address, else the first InternalIP of its Node, else its first ExternalIP."""
    override = ipaddress.ip_address(config.bind_address)
    if not override.is_unspecified and override.version == family:
        return str(override)
    known = () if node is None else tuple(node.status.addresses or ())
    for kind in ("InternalIP", "ExternalIP"):
        for one in known:
            address = _address(one.address) if one.type == kind else None
            if address is not None and address.version == family:
                return str(address)
    return ""


def node_view(config: ProxyConfig, family: Family, name: str, node: Node | None) -> NodeView:
    """Return this node as the table sees it; `node` is None where there is no such Node yet."""
    labels = (node.metadata.labels if node is not None else None) or {}
    return NodeView(name, node_address(config, family, node), labels.get(ZONE_LABEL, ""))


def options_of(
    config: ProxyConfig, family: Family, node: Node | None, local: Sequence[LocalAddress]
) -> Options:
    """Return what the settings mean for the rules of one family on this node.

    node  -- None as long as there is no such Node; where `config.needs_node`, wait for it
    local -- the addresses of this node's interfaces, all families
    What depends on the programs found (`random_fully`) and on sysctls set by others
    (`drop_invalid`) is for the caller to replace.
    """
    localhost = family == 4 and _answers_on_localhost(config)
    return Options(
        family=family,
        masquerade_bit=config.masquerade_bit,
        masquerade_all=config.masquerade_all,
        detector=detector_of(config, family, node),
        localhost_node_ports=localhost,
        node_port_addresses=node_port_addresses(config, family, node, local, localhost),
        drop_invalid=not config.conntrack.tcp_be_liberal,
    )


def detector_of(config: ProxyConfig, family: Family, node: Node | None) -> Detector | None:
    """Return how this node's Pods are known (reference 1.8); None if they are not."""
    match config.detect_local_mode:
        case "BridgeInterface":
            return Detector("interface", config.detect_local.bridge_interface)
        case "InterfaceNamePrefix":
            return Detector("prefix", config.detect_local.interface_name_prefix)
        case "NodeCIDR":
            cidrs: Sequence[str] = () if node is None else node.spec.pod_cidrs or ()
        case _:
            cidrs = config.cluster_cidrs
    for text in cidrs:
        try:
            network = ipaddress.ip_network(text, strict=False)
        except ValueError:
            continue  # a Node's; our own were checked
        if network.version == family:
            return Detector("cidr", str(network))
    return None


def serves_localhost(config: ProxyConfig) -> bool:
    """True if NodePorts answer on 127.0.0.1 so that sysctl route_localnet must be 1
    (reference 1.9). Not in mode userspace: there they lead to a process of this node."""
    return config.mode == "iptables" and _answers_on_localhost(config)


def _answers_on_localhost(config: ProxyConfig) -> bool:
    """True if NodePorts answer on 127.0.0.1: where a mode can do that, unless switched off or
    not among the addresses."""
    if config.mode not in ("iptables", "userspace") or not config.iptables.localhost_node_ports:
        return False
    cidrs = _node_port_networks(config, 4, None)
    return any(one.overlaps(_IPV4_LOOPBACK) for one in cidrs)


def node_port_addresses(
    config: ProxyConfig,
    family: Family,
    node: Node | None,
    local: Sequence[LocalAddress],
    localhost: bool,
) -> tuple[str, ...] | None:
    """Return the node's addresses that NodePorts answer on, in order; None: on every one.

    Loopback addresses are among them only with `localhost`, and never in IPv6 (reference 1.4).
    """
    networks = _node_port_networks(config, family, node)
    if any(one.prefixlen == 0 for one in networks):
        return None
    found = set()
    for text, _ in local:
        address = _address(text)
        if address is None or address.version != family:
            continue
        if address.is_loopback and not (localhost and family == 4):
            continue
        if any(address in one for one in networks):
            found.add(address)
    return tuple(str(one) for one in sorted(found, key=int))


_Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network
_Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address


def _node_port_networks(
    config: ProxyConfig, family: Family, node: Node | None
) -> tuple[_Network, ...]:
    """Return the networks of one family; where nothing is said of it, all, as upstream."""
    said = config.node_port_addresses
    texts = [cidr for one in said for cidr in s.KEYWORDS.get(one, (one,))]
    if s.PRIMARY in said:
        address = node_address(config, family, node)
        texts += [address] if address else []
    networks = [ipaddress.ip_network(one, strict=False) for one in texts]
    of_family = tuple(one for one in networks if one.version == family)
    if of_family or s.PRIMARY in said:
        return of_family
    return (ipaddress.ip_network("0.0.0.0/0" if family == 4 else "::/0"),)


def _address(text: str) -> _Address | None:
    try:
        return ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
