"""kube-proxy's flags, and a few of our own: read, put together with the file, explained.

Decides which flags there are, what each one sets, which ones a file given with --config
overrides (as kube-proxy: nearly all), and what is said of flags that have no effect here.
What a setting is, and which values are right, is config.py's and settings.py's.

Accepted spellings: --flag=value, --flag value, -flag=value, --flag for a switch, --flag=false,
-v=2, -v2, and _ for - inside a name.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final, TypeAlias

from kdns.errors import ConfigError, Problem
from kdns.proxy import settings as s
from kdns.proxy.config import (
    HEALTHZ_PORT,
    METRICS_PORT,
    MODES,
    ProxyConfig,
    Read,
    cautions,
    mistakes,
)

COMMAND_LINE = "command line"
WIDTH = 96  # columns of the help text
_INDENT = 10

# Attributes from ProxyConfig down to one setting.
_Way: TypeAlias = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag.

    ways -- the settings that it sets; none for what is Parsed's own or has no effect
    kind -- how its value is written; of a flag with ways, the setting's
    outlives_file -- counts although --config is given
    """

    name: str
    group: str
    help: str
    ways: tuple[_Way, ...] = ()
    kind: s.Kind = field(default_factory=s.Text)
    outlives_file: bool = False
    adds_up: bool = False


def _setting(way: _Way) -> tuple[s.Kind, Any, str]:
    """Return the kind of a setting, its default and its name in a file."""
    part: Any = ProxyConfig()
    names = []
    kind: s.Kind | None = None
    for attribute in way:
        meta = next(one.metadata for one in fields(part) if one.name == attribute)
        names.append(meta["name"])
        part, kind = getattr(part, attribute), meta.get("kind")
    assert kind is not None, f"{way} is a group"
    return kind, part, ".".join(names)


def _sets(name: str, group: str, way: str, help: str, *more: str, **how: bool) -> Flag:
    ways = tuple(tuple(one.split(".")) for one in (way, *more))
    kind = _setting(ways[0])[0]
    return Flag(name, group, help, ways, kind, adds_up=type(kind) in _LISTS, **how)


_LISTS = (s.Cidrs, s.NodePortAddresses)  # given again they add up, as pflag's StringSlice
_PORT = s.Whole(0, 65535)
_NONE = "has no effect here"

START, API, IDENTITY, MODE, HTTP, IPTABLES, IPVS, LOCALITY, NODE_PORTS, CONNTRACK, PROCESS, OWN = (
    "Start", "API", "Identity", "Mode", "HTTP", "iptables",
    "ipvs", "Locality", "Node ports",
    "conntrack", "Process", "Not in kube-proxy",
)  # fmt: skip

FLAGS: Final[tuple[Flag, ...]] = (
    Flag("config", START, "Read a KubeProxyConfiguration (v1alpha1) from this file.",
         kind=s.Text("FILE"), outlives_file=True),
    Flag("write-config-to", START, "Write the configuration in effect to this file and leave.",
         kind=s.Text("FILE"), outlives_file=True),
    Flag("cleanup", START, "Remove our rules and leave.", kind=s.Switch(), outlives_file=True),
    Flag("init-only", START, "Do what needs all of root's rights (sysctls), and leave.",
         kind=s.Switch(), outlives_file=True),
    Flag("version", START, "Print the version and leave.", kind=s.Switch(), outlives_file=True),
    Flag("help", START, "Print this text and leave. Also -h.", kind=s.Switch(),
         outlives_file=True),
    _sets("kubeconfig", API, "client.kubeconfig", "Kubeconfig of the API server. Without one:"
          " that of the Pod that we run in."),
    Flag("master", API, "URL of the API server, in place of the kubeconfig's.",
         kind=s.Text("URL"), outlives_file=True),
    _sets("kube-api-qps", API, "client.qps", f"{_NONE}: kdns asks the API seldom."),
    _sets("kube-api-burst", API, "client.burst", f"{_NONE}, as --kube-api-qps."),
    _sets("kube-api-content-type", API, "client.content_type", f"{_NONE}: kdns asks for JSON."),
    _sets("config-sync-period", API, "config_sync_period",
          f"{_NONE}: the API is watched, not polled."),
    _sets("hostname-override", IDENTITY, "hostname_override",
          "Name of this Node. Without it: the host's name. Counts with --config, too.",
          outlives_file=True),
    _sets("bind-address", IDENTITY, "bind_address",
          "Primary IP of this node, if it is not the Node object's. Nothing is bound to it."),
    _sets("proxy-mode", MODE, "mode", f"How to forward: {', '.join(MODES[:-1])} or {MODES[-1]}."),
    _sets("healthz-bind-address", HTTP, "healthz_bind_address",
          "Serve /healthz and /livez here; '' does not."),
    _sets("metrics-bind-address", HTTP, "metrics_bind_address",
          "Serve /metrics, /proxyMode and /configz here; '' does not."),
    _sets("bind-address-hard-fail", HTTP, "bind_address_hard_fail",
          "Leave if one of these addresses is taken, instead of trying again."),
    Flag("healthz-port", HTTP, "Deprecated; port of --healthz-bind-address. 0 does not serve.",
         kind=_PORT),
    Flag("metrics-port", HTTP, "Deprecated; port of --metrics-bind-address. 0 does not serve.",
         kind=_PORT),
    _sets("profiling", HTTP, "enable_profiling", f"{_NONE}: there is no Go to profile."),
    _sets("show-hidden-metrics-for-version", HTTP, "show_hidden_metrics",
          f"{_NONE}: no metric is hidden."),
    _sets("iptables-masquerade-bit", IPTABLES, "iptables.masquerade_bit",
          "Bit of the packet mark that asks for masquerading, 0 to 31."),
    _sets("masquerade-all", IPTABLES, "iptables.masquerade_all",
          "Masquerade everything that goes to a ClusterIP.", "nftables.masquerade_all"),
    _sets("iptables-localhost-nodeports", IPTABLES, "iptables.localhost_node_ports",
          "NodePorts answer on 127.0.0.1, too."),
    _sets("iptables-sync-period", IPTABLES, "iptables.sync_period",
          "How often a failed sync is tried again, and looked whether our rules still stand."),
    _sets("iptables-min-sync-period", IPTABLES, "iptables.min_sync_period",
          "Time between two syncs at least. A burst of changes is one sync all the same."),
    _sets("ipvs-scheduler", IPVS, "ipvs.scheduler", "How ipvs chooses an endpoint."),
    _sets("ipvs-sync-period", IPVS, "ipvs.sync_period", "As --iptables-sync-period."),
    _sets("ipvs-min-sync-period", IPVS, "ipvs.min_sync_period", "As --iptables-min-sync-period."),
    _sets("ipvs-exclude-cidrs", IPVS, "ipvs.exclude_cidrs", "Addresses that are not ours."),
    _sets("ipvs-strict-arp", IPVS, "ipvs.strict_arp", "Set arp_ignore to 1, arp_announce to 2."),
    _sets("ipvs-tcp-timeout", IPVS, "ipvs.tcp_timeout", "Of idle connections; 0: the kernel's."),
    _sets("ipvs-tcpfin-timeout", IPVS, "ipvs.tcp_fin_timeout", "After a FIN; 0: the kernel's."),
    _sets("ipvs-udp-timeout", IPVS, "ipvs.udp_timeout", "Of UDP; 0: the kernel's."),
    _sets("cluster-cidr", LOCALITY, "cluster_cidrs",
          "CIDRs of the cluster's Pods, one a family: what does not come from there is"
          " masqueraded on its way to a ClusterIP."),
    _sets("detect-local-mode", LOCALITY, "detect_local_mode",
          "How Pods of this node are known: ClusterCIDR, NodeCIDR, BridgeInterface or"
          " InterfaceNamePrefix."),
    _sets("pod-bridge-interface", LOCALITY, "detect_local.bridge_interface",
          "Bridge of this node's Pods, for BridgeInterface."),
    _sets("pod-interface-name-prefix", LOCALITY, "detect_local.interface_name_prefix",
          "How the names of the Pods' interfaces begin, for InterfaceNamePrefix."),
    _sets("nodeport-addresses", NODE_PORTS, "node_port_addresses",
          "Node addresses that NodePorts answer on: CIDRs, or 'primary'. Without it: all."),
    _sets("conntrack-max-per-core", CONNTRACK, "conntrack.max_per_core",
          "Entries of nf_conntrack for each core; 0 leaves it, and --conntrack-min, alone."),
    _sets("conntrack-min", CONNTRACK, "conntrack.min", "Entries of nf_conntrack at least."),
    _sets("conntrack-tcp-timeout-established", CONNTRACK, "conntrack.tcp_established_timeout",
          "Of idle TCP connections; 0 leaves it alone."),
    _sets("conntrack-tcp-timeout-close-wait", CONNTRACK, "conntrack.tcp_close_wait_timeout",
          "Of TCP connections in CLOSE_WAIT; 0 leaves it alone."),
    _sets("conntrack-tcp-be-liberal", CONNTRACK, "conntrack.tcp_be_liberal",
          "Let packets outside the TCP window pass."),
    _sets("conntrack-udp-timeout", CONNTRACK, "conntrack.udp_timeout",
          "Of UDP flows without a reply; 0 leaves it alone."),
    _sets("conntrack-udp-timeout-stream", CONNTRACK, "conntrack.udp_stream_timeout",
          "Of UDP flows with replies; 0 leaves it alone."),
    _sets("oom-score-adj", PROCESS, "oom_score_adj",
          "How gladly the kernel kills us when it is out of memory, -1000 to 1000."),
    _sets("v", PROCESS, "logging.verbosity", f"{_NONE}: there is one kind of log.",
          outlives_file=True),
    _sets("logging-format", PROCESS, "logging.format", "Log as text or json.",
          outlives_file=True),
    _sets("feature-gates", PROCESS, "feature_gates", f"{_NONE}: what is there is on."),
    Flag("once", OWN, "Bring the rules up to date once, and leave.", kind=s.Switch(),
         outlives_file=True),
    Flag("dry-run", OWN, "Print the rules that would be applied; touch nothing.",
         kind=s.Switch(), outlives_file=True),
    Flag("manifests", OWN, "Read Services from this file or folder in place of a cluster; may"
         " be repeated. Also -f.", kind=s.Text("PATH"), outlives_file=True, adds_up=True),
    Flag("portmap", OWN, "In the userspace mode: write no rules and listen only here, a Service"
         " port each: NAMESPACE/SERVICE[:PORT][/udp]=[ADDRESS:]PORT. May be repeated.",
         kind=s.Text("MAP"), outlives_file=True, adds_up=True),
    Flag("control", OWN, "Serve the control socket here, for `kdns check` and others.",
         kind=s.Text("PATH"), outlives_file=True),
    Flag("udp-timeout", OWN, "In the userspace mode: how long a UDP flow may be idle, as 250ms."
         " A flag of kube-proxy's old userspace mode.",
         kind=s.Duration(positive=True), outlives_file=True),
)  # fmt: skip

_KLOG = "a flag of kube-proxy's log library"
_OLD = "kube-proxy has dropped it"
_USERSPACE = "it went with kube-proxy's userspace mode"
# Accepted because manifests have them. A warning says why there is nothing to do; "" for what
# kube-proxy takes today and where nobody would miss an effect.
NO_EFFECT: Final[Mapping[str, tuple[s.Kind, str]]] = {
    "log-flush-frequency": (s.Duration(), ""),
    "log-json-info-buffer-size": (s.Text(), ""),
    "log-json-split-stream": (s.Switch(), ""),
    "log-text-info-buffer-size": (s.Text(), ""),
    "log-text-split-stream": (s.Switch(), ""),
    "vmodule": (s.Text(), _KLOG),
    "add-dir-header": (s.Switch(), _KLOG),
    "alsologtostderr": (s.Switch(), _KLOG),
    "log-backtrace-at": (s.Text(), _KLOG),
    "log-dir": (s.Text(), _KLOG),
    "log-file": (s.Text(), _KLOG),
    "log-file-max-size": (s.Text(), _KLOG),
    "logtostderr": (s.Switch(), _KLOG),
    "one-output": (s.Switch(), _KLOG),
    "skip-headers": (s.Switch(), _KLOG),
    "skip-log-headers": (s.Switch(), _KLOG),
    "stderrthreshold": (s.Text(), _KLOG),
    "azure-container-registry-config": (s.Text(), _OLD),
    "boot-id-file": (s.Text(), _OLD),
    "cleanup-ipvs": (s.Switch(), _OLD),
    "machine-id-file": (s.Text(), _OLD),
    "proxy-port-range": (s.Text(), _USERSPACE),
    "resource-container": (s.Text(), _OLD),
}
# Of what has no effect, what an operator may have counted on.
_MISSED: Final = {"feature-gates", "profiling", "show-hidden-metrics-for-version"}
_DEPRECATED: Final = {
    "healthz-port": ("healthz-bind-address", HEALTHZ_PORT),
    "metrics-port": ("metrics-bind-address", METRICS_PORT),
}
_BY_NAME: Final[Mapping[str, Flag]] = {
    **{one.name: one for one in FLAGS},
    **{name: Flag(name, "", "", kind=kind) for name, (kind, _) in NO_EFFECT.items()},
}
UDP_IDLE: Final = 0.25  # seconds, as kube-proxy's userspace mode had it
_SHORT: Final = {"f": "manifests", "h": "help"}


@dataclass(frozen=True, slots=True)
class Parsed:
    """A command line.

    given    -- flag -> value, as far as given; its order is that of the command line
    warnings -- of flags without effect
    """

    given: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[Problem, ...] = ()

    def _text(self, name: str) -> str:
        return str(self.given.get(name, ""))

    def _on(self, name: str) -> bool:
        return bool(self.given.get(name, False))

    @property
    def config_path(self) -> str:
        """The file to read with config.parse_config; "": none."""
        return self._text("config")

    @property
    def write_config_to(self) -> str:
        return self._text("write-config-to")

    @property
    def master(self) -> str:
        """URL of the API server; "": what the kubeconfig says."""
        return self._text("master")

    @property
    def cleanup(self) -> bool:
        return self._on("cleanup")

    @property
    def init_only(self) -> bool:
        return self._on("init-only")

    @property
    def show_version(self) -> bool:
        return self._on("version")

    @property
    def show_help(self) -> bool:
        return self._on("help")

    @property
    def once(self) -> bool:
        return self._on("once")

    @property
    def dry_run(self) -> bool:
        return self._on("dry-run")

    @property
    def manifests(self) -> tuple[str, ...]:
        return tuple(self.given.get("manifests", ()))

    @property
    def portmap(self) -> tuple[str, ...]:
        """As parse_portmap of userspace.py reads them."""
        return tuple(self.given.get("portmap", ()))

    @property
    def control(self) -> str:
        """Path of the control socket; empty: none."""
        return str(self.given.get("control", ""))

    @property
    def udp_idle(self) -> float:
        """Seconds that a flow of the userspace mode may be idle."""
        return float(self.given.get("udp-timeout", UDP_IDLE))


def parse_flags(args: Sequence[str]) -> Parsed:
    """Return what a command line says. Raises ConfigError with all mistakes at once; not of a
    command line that asks for help."""
    given: dict[str, Any] = {}
    problems: list[Problem] = []
    words = iter(args)
    for word in words:
        try:
            flag, value = _read_word(word, words)
        except ValueError as e:
            problems.append(Problem(COMMAND_LINE, 0, str(e)))
            continue
        given[flag.name] = (*given.get(flag.name, ()), *value) if flag.adds_up else value
    if problems and not given.get("help"):
        raise ConfigError(problems)
    return Parsed(given, tuple(_no_effect(given)))


def _read_word(word: str, more: Iterator[str]) -> tuple[Flag, Any]:
    """Return the flag of one argument and its value, which may be the next argument."""
    name, equals, text = word.lstrip("-").partition("=")
    if not word.startswith("-") or not name:
        raise ValueError(f"unexpected argument '{word}': a switch's value is written --flag=false")
    name = name.replace("_", "-")
    if not word.startswith("--") and re.fullmatch(r"v\d+", name):
        name, equals, text = "v", "=", name[1:]  # -v2
    flag = _BY_NAME.get(_SHORT.get(name, name))
    if flag is None:
        known = [f"--{one}" for one in _BY_NAME]
        raise ValueError(f"no flag '--{name}'{s.nearest(f'--{name}', known)}")
    if not equals:
        if isinstance(flag.kind, s.Switch):
            return flag, True
        found = next(more, None)
        if found is None:
            raise ValueError(f"--{flag.name} needs a value ({flag.kind.metavar})")
        text = found
    if flag.name == "version" and text not in s.BOOLS:
        return flag, True  # --version=raw
    try:
        value = flag.kind.parse(text)
    except ValueError as e:
        raise ValueError(f"--{flag.name}: {e}, found '{text}'") from None
    return flag, (value,) if flag.adds_up and isinstance(flag.kind, s.Text) else value


def _no_effect(given: Mapping[str, Any]) -> Iterator[Problem]:
    for name, value in given.items():
        if name in _DEPRECATED:
            why = f"is deprecated; write --{_DEPRECATED[name][0]}"
        elif name in _MISSED and value:
            why = _BY_NAME[name].help.rstrip(".")
        elif NO_EFFECT.get(name, ("", ""))[1]:
            why = f"{_NONE}: {NO_EFFECT[name][1]}"
        else:
            continue
        yield Problem(COMMAND_LINE, 0, f"--{name} {why}", True)


# --- file and flags together --------------------------------------------------------------


def settle(parsed: Parsed, read: Read | None) -> Read:
    """Return the configuration in effect, and all that was odd about file and flags.

    read -- what parse_config made of the file of `parsed.config_path`; None without one
    With a file nearly every flag is ignored, with a warning, as kube-proxy does.
    Raises ConfigError for what is not right together.
    """
    problems = [*parsed.warnings, *(read.warnings if read is not None else ())]
    config = ProxyConfig() if read is None else read.config
    file = parsed.config_path if read is not None else COMMAND_LINE
    for name, value in parsed.given.items():
        flag = _BY_NAME[name]
        if name in NO_EFFECT:
            continue
        if read is not None and not flag.outlives_file:
            problems.append(_ignored(flag, file))
            continue
        for way in flag.ways:
            config = _with(config, way, value)
    if read is None:
        config = _with_ports(config, parsed.given)
    name = config.hostname_override
    if name and not name.strip():
        problems.append(Problem(file, 0, "hostnameOverride: must be a name, found spaces"))
    config = replace(config, hostname_override=name.strip().lower())
    if read is None:
        problems += (Problem(file, 0, f"{'.'.join(at)}: {text}") for at, text in mistakes(config))
    # To clean up, or to write a file for another day, no dataplane is needed.
    if not (parsed.cleanup or parsed.write_config_to):
        problems += (Problem(file, 0, text, True) for text in cautions(config))
    if any(not one.warning for one in problems):
        raise ConfigError(problems)
    return Read(config, tuple(problems))


def _ignored(flag: Flag, file: str) -> Problem:
    instead = f": write {_setting(flag.ways[0])[2]} in {file}" if flag.ways else ""
    text = f"--{flag.name} is ignored because of --config{instead}"
    return Problem(COMMAND_LINE, 0, text, True)


def _with(part: Any, way: _Way, value: Any) -> Any:
    name, *rest = way
    return replace(part, **{name: _with(getattr(part, name), tuple(rest), value)
                            if rest else value})  # fmt: skip


def _with_ports(config: ProxyConfig, given: Mapping[str, Any]) -> ProxyConfig:
    """Obey the deprecated port flags: 0 switches a listener off, any other number is for an
    address without a port, so that it changes the default only."""
    for name, (instead, default) in _DEPRECATED.items():
        port = given.get(name, default)
        (attribute,) = _BY_NAME[instead].ways[0]
        address = getattr(config, attribute)
        if port == 0:
            address = ""
        elif port != default and instead not in given:
            address = s.render_listen(address.rpartition(":")[0].strip("[]"), port)
        config = replace(config, **{attribute: address})
    return config


# --- help ---------------------------------------------------------------------------------


def help_text() -> str:
    """Return what `kdns proxy --help` prints."""
    out = [
        "Usage: kdns proxy [FLAGS]",
        "",
        "  Program this node's forwarding, in kube-proxy's place. Takes kube-proxy's flags and",
        "  its configuration file. With --config, flags marked * are ignored.",
    ]
    groups = dict.fromkeys(one.group for one in FLAGS)
    for group in groups:
        out += ["", f"{group}:"]
        for one in FLAGS:
            if one.group == group:
                out += _help_of(one)
    out += ["", "Accepted without effect:"]
    names = ", ".join(f"--{name}" for name in NO_EFFECT)
    out += textwrap.wrap(names, WIDTH, initial_indent="  ", subsequent_indent="  ",
                         break_on_hyphens=False, break_long_words=False)  # fmt: skip
    return "\n".join(out) + "\n"


def _help_of(flag: Flag) -> list[str]:
    dashes = "-" if len(flag.name) == 1 else "--"
    metavar = f" {flag.kind.metavar}" if flag.kind.metavar else ""
    star = "" if flag.outlives_file else " *"
    text = flag.help[0].upper() + flag.help[1:]
    default = flag.kind.show(_setting(flag.ways[0])[1]) if flag.ways else ""
    if default and default != "false":
        text += f"  [default: {default}]"
    indent = " " * _INDENT
    return [
        f"  {dashes}{flag.name}{metavar}{star}",
        *textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent),
    ]
