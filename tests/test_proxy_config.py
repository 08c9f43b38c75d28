"""What an operator says to `kdns proxy`: kube-proxy's configuration file and flags."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from kubeadm import KUBEADM_PROXY

from kdns.errors import ConfigError, Problem
from kdns.proxy import settings
from kdns.proxy.config import (
    API_VERSION,
    KIND,
    LocalAddress,
    ProxyConfig,
    Read,
    decode_config,
    detector_of,
    node_address,
    node_name,
    node_view,
    options_of,
    parse_config,
    render_config,
    render_yaml,
    serves_localhost,
)
from kdns.proxy.flags import FLAGS, NO_EFFECT, help_text, parse_flags, settle
from kdns.proxy.options import Detector, Family, NodeView
from kdns.registry.objects import Meta, Node, NodeAddress, NodeSpec, NodeStatus

HEAD = f"apiVersion: {API_VERSION}\nkind: {KIND}\n"


def read(text: str) -> Read:
    return parse_config(HEAD + text, "f.yaml")


def config(**changed: Any) -> ProxyConfig:
    return replace(ProxyConfig(), **changed)


def mistakes(act: Callable[[], object]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        act()
    return [str(one) for one in caught.value.problems]


def effective(*args: str) -> ProxyConfig:
    return settle(parse_flags(args), None).config


# --- the file -----------------------------------------------------------------------------


def test_kubeadms_file_means_the_defaults() -> None:
    found = parse_config(KUBEADM_PROXY, "config.conf")
    assert found.warnings == ()
    client = replace(ProxyConfig().client, kubeconfig="/var/lib/kube-proxy/kubeconfig.conf")
    assert found.config == config(client=client, cluster_cidrs=("10.244.0.0/16",))


def test_defaults_are_kube_proxys() -> None:
    """The one that is our own is minSyncPeriod: 0s in place of 1s."""
    rendered = render_config(read("").config)
    assert rendered == {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "featureGates": {},
        "clientConnection": {
            "kubeconfig": "",
            "acceptContentTypes": "",
            "contentType": "application/vnd.kubernetes.protobuf",
            "qps": 5,
            "burst": 10,
        },
        "logging": {"format": "text", "verbosity": 0, "flushFrequency": "5s"},
        "hostnameOverride": "",
        "bindAddress": "0.0.0.0",
        "healthzBindAddress": "0.0.0.0:10256",
        "metricsBindAddress": "127.0.0.1:10249",
        "bindAddressHardFail": False,
        "enableProfiling": False,
        "showHiddenMetricsForVersion": "",
        "mode": "iptables",
        "iptables": {
            "masqueradeBit": 14,
            "masqueradeAll": False,
            "localhostNodePorts": True,
            "syncPeriod": "30s",
            "minSyncPeriod": "0s",
        },
        "ipvs": {
            "syncPeriod": "30s",
            "minSyncPeriod": "0s",
            "scheduler": "rr",
            "excludeCIDRs": [],
            "strictARP": False,
            "tcpTimeout": "0s",
            "tcpFinTimeout": "0s",
            "udpTimeout": "0s",
        },
        "nftables": {
            "masqueradeBit": 14,
            "masqueradeAll": False,
            "syncPeriod": "30s",
            "minSyncPeriod": "0s",
        },
        "detectLocalMode": "ClusterCIDR",
        "detectLocal": {"bridgeInterface": "", "interfaceNamePrefix": ""},
        "clusterCIDR": "",
        "nodePortAddresses": [],
        "oomScoreAdj": -999,
        "conntrack": {
            "maxPerCore": 32768,
            "min": 131072,
            "tcpEstablishedTimeout": "24h0m0s",
            "tcpCloseWaitTimeout": "1h0m0s",
            "tcpBeLiberal": False,
            "udpTimeout": "0s",
            "udpStreamTimeout": "0s",
        },
        "configSyncPeriod": "15m0s",
    }


@pytest.mark.parametrize(
    ("text", "way", "value"),
    [
        ("iptables: {masqueradeBit: 0}", "iptables.masquerade_bit", 0),
        ("iptables: {minSyncPeriod: 1s}", "iptables.min_sync_period", 1.0),
        ("iptables: {localhostNodePorts: false}", "iptables.localhost_node_ports", False),
        ("iptables: null", "iptables.sync_period", 30.0),
        ("oomScoreAdj: 0", "oom_score_adj", 0),
        ("conntrack: {maxPerCore: 0}", "conntrack.max_per_core", 0),
        ("conntrack: {tcpEstablishedTimeout: 0s}", "conntrack.tcp_established_timeout", 0.0),
        ("metricsBindAddress: 0.0.0.0", "metrics_bind_address", "0.0.0.0:10249"),
        ("metricsBindAddress: '::'", "metrics_bind_address", "[::]:10249"),
        ("healthzBindAddress: '[::1]:99'", "healthz_bind_address", "[::1]:99"),
        ("bindAddress: '::'", "healthz_bind_address", "[::]:10256"),
        ("bindAddress: 2001:db8::1", "metrics_bind_address", "[::1]:10249"),
        ("clusterCIDR: 10.1.2.3/16,fd00::/56", "cluster_cidrs", ("10.1.0.0/16", "fd00::/56")),
        ("nodePortAddresses: [primary]", "node_port_addresses", ("primary",)),
        ("nodePortAddresses: [10.0.0.0/8]", "node_port_addresses", ("10.0.0.0/8",)),
        ("featureGates: {B: false, A: true}", "feature_gates", (("A", True), ("B", False))),
        ("hostnameOverride: 2026-01-01", "hostname_override", "2026-01-01"),
        ("logging: {flushFrequency: 250ms}", "logging.flush_frequency", 0.25),
    ],
)
def test_a_field_sets(text: str, way: str, value: object) -> None:
    found: Any = read(text)
    assert found.warnings == ()
    part = found.config
    for name in way.split("."):
        part = getattr(part, name)
    assert part == value


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("iptables:\n  masqueradeBit: 40", "f.yaml:4: iptables.masqueradeBit: must be from 0 to"
         " 31, found 40"),
        ("iptables: {masqueradeBit: '14'}", "f.yaml:3: iptables.masqueradeBit: must be a whole"
         " number from 0 to 31, found '14'"),
        ("iptables: {masqueradeAll: 'yes'}", "f.yaml:3: iptables.masqueradeAll: must be true or"
         " false, found 'yes'"),
        ("iptables: {syncPeriod: 30}", "f.yaml:3: iptables.syncPeriod: must be a duration such as"
         " 30s or 1m30s, found 30"),
        ("iptables: {syncPeriod: -1s}", "f.yaml:3: iptables.syncPeriod: must be more than 0,"
         " found '-1s'"),
        ("iptables: {minSyncPeriod: -1s}", "f.yaml:3: iptables.minSyncPeriod: must be 0 or more,"
         " found '-1s'"),
        ("iptables: {minSyncPeriod: 1m}", "f.yaml:3: iptables.minSyncPeriod: must be at most"
         " syncPeriod (30s), found 1m0s"),
        ("bindAddress: 0", "f.yaml:3: bindAddress: must be an IP address such as 192.0.2.1 or"
         " 2001:db8::1, found 0"),
        ("configSyncPeriod: 0", "f.yaml:3: configSyncPeriod: must be a duration such as 30s or"
         " 1m30s, found 0"),
        ("hostnameOverride: 0", "f.yaml:3: hostnameOverride: must be text (put it in quotes),"
         " found 0"),
        ("iptables: 5", "f.yaml:3: iptables: must be a mapping, found 5"),
        ("oomScoreAdj: -1001", "f.yaml:3: oomScoreAdj: must be from -1000 to 1000, found -1001"),
        ("bindAddress: node1", "f.yaml:3: bindAddress: must be an IP address such as 192.0.2.1 or"
         " 2001:db8::1, found 'node1'"),
        ("healthzBindAddress: localhost:1", "f.yaml:3: healthzBindAddress: must be IP:port such as"
         " 0.0.0.0:10256 or [::1]:10256, found 'localhost:1'"),
        ("metricsBindAddress: 0.0.0.0:0", "f.yaml:3: metricsBindAddress: must have a port from 1"
         " to 65535, found '0.0.0.0:0'"),
        ("clusterCIDR: 10.0.0.0/8,10.1.0.0/16", "f.yaml:3: clusterCIDR: must be at most one IPv4"
         " and one IPv6 CIDR, found '10.0.0.0/8,10.1.0.0/16'"),
        ("clusterCIDR: 10.0.0.1", "f.yaml:3: clusterCIDR: entry '10.0.0.1' must be a CIDR such as"
         " 10.244.0.0/16 or fd00:10:244::/56; write 10.0.0.1/32 for the one address 10.0.0.1,"
         " found '10.0.0.1'"),
        ("nodePortAddresses: [primry]", "f.yaml:3: nodePortAddresses: entry 'primry' must be a"
         " CIDR such as 10.244.0.0/16 or fd00:10:244::/56; or the word primary, all or localhost,"
         " found ['primry']"),
        ("mode: iptabels", "f.yaml:3: mode: must be iptables, nftables, ipvs or userspace, did"
         " you mean 'iptables'?, found 'iptabels'"),
        ("detectLocalMode: clustercidr", "f.yaml:3: detectLocalMode: must be ClusterCIDR,"
         " NodeCIDR, BridgeInterface or InterfaceNamePrefix, did you mean 'ClusterCIDR'?, found"
         " 'clustercidr'"),
        ("detectLocalMode: BridgeInterface", "f.yaml:1: detectLocal.bridgeInterface: must name the"
         " bridge of the Pods"),
        ("ipvs: {scheduler: random}", "f.yaml:3: ipvs.scheduler: must be rr, wrr, lc, wlc, lblc,"
         " lblcr, sh, dh, sed, nq, fo, ovf or mh, found 'random'"),
        ("a: [", "f.yaml:4: not YAML: expected the node content, but found '<stream end>'"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_line_and_what_would_be_right(text: str, problem: str) -> None:
    assert mistakes(lambda: read(text + "\n")) == [problem]


def test_all_mistakes_are_told_at_once() -> None:
    found = mistakes(lambda: read("oomScoreAdj: 5000\nmode: x\nmodes: y\n"))
    assert [one.partition(" must")[0] for one in found] == [
        "f.yaml:3: oomScoreAdj:",
        "f.yaml:4: mode:",
        "f.yaml:5: warning: modes: is no field, and ignored, did you mean 'mode'?",
    ]


def test_unknown_and_repeated_fields_are_warnings() -> None:
    found = read(
        "iptables:\n  masqeradeBit: 3\n  syncPeriod: 1s\n  syncPeriod: 5s\n"
        "udpIdleTimeout: 250ms\nxyzzy: 1\n"
    )
    assert found.config.sync_period == 5.0
    assert [str(one) for one in sorted(found.warnings, key=lambda p: p.line)] == [
        "f.yaml:4: warning: iptables.masqeradeBit: is no field, and ignored, did you mean"
        " 'masqueradeBit'?",
        "f.yaml:6: warning: iptables.syncPeriod: is given twice; this one counts",
        "f.yaml:7: warning: udpIdleTimeout: is ignored: it went with"
        " kube-proxy's userspace mode; ours has --udp-timeout",
        "f.yaml:8: warning: xyzzy: is no field, and ignored",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", f"f: must be a {KIND} of {API_VERSION}"),
        ("\n[1]", f"f:2: must be a {KIND} of {API_VERSION}"),
        (f"kind: {KIND}", f"f:1: apiVersion: must be {API_VERSION}, found None"),
        (f"apiVersion: {API_VERSION}", f"f:1: kind: must be {KIND}, found None"),
        ("kind: ConfigMap\napiVersion: v1\ndata: {}",
         "f:1: kind: is a ConfigMap; give the text that it holds under config.conf"),
    ],
)  # fmt: skip
def test_a_file_that_is_something_else(text: str, problem: str) -> None:
    assert mistakes(lambda: parse_config(text, "f")) == [problem]


@pytest.mark.parametrize(
    "text",
    ["\x00", "a: &a [*a]\n", "*x", "? [1]\n: 2\n", "[" * 3000, "!!python/object:os.system {}"],
)
def test_no_file_is_answered_with_a_traceback(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_config(text, "f")


def test_only_the_first_document_is_read() -> None:
    found = parse_config(f"{HEAD}---\nmode: x\n", "f")
    assert [one.text for one in found.warnings] == ["only the first document of this file is read"]


# --- writing ------------------------------------------------------------------------------


def _values(kind: settings.Kind) -> st.SearchStrategy[Any]:
    """Return what one setting may hold."""
    cidr4 = st.sampled_from(["10.0.0.0/8", "192.0.2.0/24", "0.0.0.0/0"])
    cidr6 = st.sampled_from(["fd00::/56", "2001:db8::/32"])
    match kind:
        case settings.Word():
            return st.sampled_from(kind.words)
        case settings.Switch():
            return st.booleans()
        case settings.Whole():
            return st.integers(kind.low, kind.high)
        case settings.Number():
            return st.integers(1, 1000) | st.floats(0.001, 1e6).map(lambda x: round(x, 3))
        case settings.Duration():
            return st.integers(1, 10**14).map(lambda ns: ns / 1e9)
        case settings.Listen():
            return st.sampled_from(["127.0.0.1:1", "[::1]:65535", "0.0.0.0:80"])
        case settings.Ip():
            return st.sampled_from(["0.0.0.0", "192.0.2.7"])
        case settings.NodePortAddresses():
            return st.lists(cidr4 | st.sampled_from(["primary", "all"]), max_size=3).map(tuple)
        case settings.ClusterCidrs():
            both = st.tuples(cidr4, cidr6)
            return both | st.tuples(cidr6) | st.just(())
        case settings.Cidrs():
            return st.lists(cidr4 | cidr6, max_size=3).map(tuple)
        case settings.Gates():
            names = st.text("AbC", min_size=1)
            return st.dictionaries(names, st.booleans()).map(lambda x: tuple(sorted(x.items())))
        case settings.Interface():
            return st.sampled_from(["cni0", "veth", ""])
        case _:
            return st.sampled_from(["", "x", "a: b", "2026-01-01", "no", "0x10", "#"])


def _configs(cls: type) -> st.SearchStrategy[Any]:
    ways: dict[str, st.SearchStrategy[Any]] = {}
    for one in fields(cls):
        part = one.metadata.get("part")
        if part is not None:
            ways[one.name] = _configs(part)
            continue
        ways[one.name] = _values(one.metadata["kind"])
        if one.metadata["zero"]:
            ways[one.name] = ways[one.name].filter(bool)
    built = st.fixed_dictionaries(ways)
    return built.map(lambda given: cls(**_ordered(given)))


def _ordered(given: dict[str, Any]) -> dict[str, Any]:
    """Make the periods fit together, as validation wants them."""
    if "min_sync_period" in given:
        low, high = sorted((given["min_sync_period"], given["sync_period"]))
        given = {**given, "min_sync_period": low, "sync_period": high}
    if given.get("detect_local_mode") in ("BridgeInterface", "InterfaceNamePrefix"):
        given = {**given, "detect_local_mode": "NodeCIDR"}
    return given


@given(_configs(ProxyConfig))
def test_what_is_written_is_read_back(one: ProxyConfig) -> None:
    assert decode_config(render_config(one), "f") == Read(one)
    assert parse_config(render_yaml(one), "f") == Read(one)


@given(st.integers(-(10**17), 10**17))
def test_durations_are_read_back(ns: int) -> None:
    text = settings.render_duration(ns / 1e9)
    again = settings.parse_duration(text)
    assert again is not None
    assert round(again * 1e9) == pytest.approx(ns, abs=16)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0s"), (90.0, "1m30s"), (0.25, "250ms"), (3600.0, "1h0m0s"), (1.5, "1.5s"),
        (1e-9, "1ns"), (1.5e-6, "1.5µs"), (-2.0, "-2s"), (86400.0, "24h0m0s"),
    ],
)  # fmt: skip
def test_durations_look_as_go_prints_them(seconds: float, text: str) -> None:
    assert settings.render_duration(seconds) == text
    assert settings.parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "s", "1m 30s", "1e3s", "1d", "9" * 20 + "h", "٣s"])
def test_what_is_no_duration(text: str) -> None:
    assert settings.parse_duration(text) is None


@pytest.mark.parametrize("text", ["2h22m", "1.5h", ".5s", "+3s", "1h15m30.918273645s", "1us"])
def test_what_is_a_duration(text: str) -> None:
    assert settings.parse_duration(text) is not None


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["iptables", "mode", "syncPeriod", "conntrack", "min",
                                       "clusterCIDR", "nodePortAddresses", "logging", "qps",
                                       "clientConnection", "featureGates", "healthzBindAddress",
                                       "flushFrequency"]), inner, max_size=6),
    max_leaves=20,
))  # fmt: skip
def test_whatever_a_document_holds_is_a_configuration_or_a_config_error(value: object) -> None:
    if isinstance(value, dict):
        value = {"apiVersion": API_VERSION, "kind": KIND, **value}
    try:
        found = decode_config(value, "f").config
    except ConfigError:
        return
    assert decode_config(render_config(found), "f").config == found


# --- flags --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "changed"),
    [
        (["--masquerade-all"], {"iptables.masquerade_all": True, "nftables.masquerade_all": True}),
        (["--masquerade-all=false"], {}),
        (["-masquerade-all=T"],
         {"iptables.masquerade_all": True, "nftables.masquerade_all": True}),
        (["--iptables_masquerade_bit", "0x3"], {"iptables.masquerade_bit": 3}),
        (["--iptables-sync-period=1m30s"], {"iptables.sync_period": 90.0}),
        (["--iptables-min-sync-period=1s"], {"iptables.min_sync_period": 1.0}),
        (["--cluster-cidr", "10.244.0.0/16,fd00::/56"],
         {"cluster_cidrs": ("10.244.0.0/16", "fd00::/56")}),
        (["--nodeport-addresses=10.0.0.0/8", "--nodeport-addresses", "fd00::/8,192.0.2.0/24"],
         {"node_port_addresses": ("10.0.0.0/8", "fd00::/8", "192.0.2.0/24")}),
        (["--oom-score-adj", "-998"], {"oom_score_adj": -998}),
        (["--hostname-override", " Node1 "], {"hostname_override": "node1"}),
        (["--kubeconfig=/k"], {"client.kubeconfig": "/k"}),
        (["-v=4"], {"logging.verbosity": 4}),
        (["-v4"], {"logging.verbosity": 4}),
        (["--v", "4"], {"logging.verbosity": 4}),
        (["--logging-format=json"], {"logging.format": "json"}),
        (["--healthz-bind-address="], {"healthz_bind_address": ""}),
        (["--healthz-bind-address=::"], {"healthz_bind_address": "[::]:10256"}),
        (["--metrics-bind-address=0.0.0.0"], {"metrics_bind_address": "0.0.0.0:10249"}),
        (["--metrics-port=0", "--healthz-port=99"],
         {"metrics_bind_address": "", "healthz_bind_address": "0.0.0.0:99"}),
        (["--metrics-port=99", "--metrics-bind-address=127.0.0.2:7"],
         {"metrics_bind_address": "127.0.0.2:7"}),
        (["--detect-local-mode=BridgeInterface", "--pod-bridge-interface=cni0"],
         {"detect_local_mode": "BridgeInterface", "detect_local.bridge_interface": "cni0"}),
        (["--conntrack-tcp-timeout-established=0"], {"conntrack.tcp_established_timeout": 0.0}),
        (["--feature-gates=A=true,B=false"], {"feature_gates": (("A", True), ("B", False))}),
        (["--logtostderr=true", "--vmodule", "x=3", "--proxy-port-range="], {}),
    ],
)  # fmt: skip
def test_a_flag_sets(args: list[str], changed: dict[str, object]) -> None:
    found = _flat(effective(*args))
    assert found == _flat(ProxyConfig()) | changed


def _flat(part: Any, prefix: str = "") -> dict[str, object]:
    out: dict[str, object] = {}
    for one in fields(part):
        value = getattr(part, one.name)
        if is_dataclass(value):
            out |= _flat(value, f"{prefix}{one.name}.")
        else:
            out[prefix + one.name] = value
    return out


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (["--iptables-masquerade-bit=32"], "--iptables-masquerade-bit: must be from 0 to 31, found"
         " '32'"),
        (["--iptables-sync-period=0s"], "--iptables-sync-period: must be more than 0, found '0s'"),
        (["--proxy-mod=ipvs"], "no flag '--proxy-mod', did you mean '--proxy-mode'?"),
        (["--masquerade-all", "false"],
         "unexpected argument 'false': a switch's value is written --flag=false"),
        (["--cluster-cidr"], "--cluster-cidr needs a value (CIDR,...)"),
        (["--cluster-cidr=x"], "--cluster-cidr: entry 'x' must be a CIDR such as 10.244.0.0/16 or"
         " fd00:10:244::/56, found 'x'"),
        (["--masquerade-all=maybe"], "--masquerade-all: must be true or false, found 'maybe'"),
        (["-"], "unexpected argument '-': a switch's value is written --flag=false"),
        (["--iptables-min-sync-period=1m"],
         "iptables.minSyncPeriod: must be at most syncPeriod (30s), found 1m0s"),
        (["--hostname-override= "], "hostnameOverride: must be a name, found spaces"),
        (["--udp-timeout=0s"], "--udp-timeout: must be more than 0, found '0s'"),
        (["--proxy-mode=kernelspace"], "--proxy-mode: must be iptables, nftables, ipvs or"
         " userspace, did you mean 'userspace'?, found 'kernelspace'"),
    ],
)  # fmt: skip
def test_a_wrong_flag_is_named_with_what_would_be_right(args: list[str], problem: str) -> None:
    found = mistakes(lambda: effective("--cluster-cidr=10.0.0.0/8", *args))
    assert found == [f"command line: {problem}"]


def test_all_wrong_flags_are_told_at_once() -> None:
    assert len(mistakes(lambda: parse_flags(["--x", "--v=y", "z"]))) == 3


def test_what_the_command_does_besides() -> None:
    parsed = parse_flags(
        "--config c.yaml --write-config-to=w --cleanup --init-only --master http://m --once"
        " --dry-run -f a --manifests=b,c --version=raw".split()
    )
    assert parsed.config_path == "c.yaml"
    assert parsed.write_config_to == "w"
    assert (parsed.cleanup, parsed.init_only, parsed.once, parsed.dry_run) == (True,) * 4
    assert parsed.show_version
    assert parsed.master == "http://m"
    assert parsed.manifests == ("a", "b,c")
    assert not parsed.show_help
    assert parse_flags([]).config_path == ""


@pytest.mark.parametrize("args", [["-h"], ["--help"], ["--nonsense", "-h"]])
def test_help_is_given_whatever_else_is_said(args: list[str]) -> None:
    assert parse_flags(args).show_help


def test_help_names_every_flag_and_fits_a_terminal() -> None:
    text = help_text()
    for flag in FLAGS:
        assert f"-{flag.name}" in text
    for name in NO_EFFECT:
        assert f"--{name}" in text
    assert max(map(len, text.splitlines())) <= 100


def test_flags_without_effect_say_so() -> None:
    args = ["--cluster-cidr=10.0.0.0/8", "--profiling", "--logtostderr", "--metrics-port=1",
            "--log-flush-frequency=5s", "--profiling=true", "-v=2"]  # fmt: skip
    assert [str(one) for one in settle(parse_flags(args), None).warnings] == [
        "command line: warning: --profiling has no effect here: there is no Go to profile",
        "command line: warning: --logtostderr has no effect here: a flag of kube-proxy's log"
        " library",
        "command line: warning: --metrics-port is deprecated; write --metrics-bind-address",
    ]


def test_kubeadms_pod_runs_without_a_warning() -> None:
    parsed = parse_flags(["--config=/var/lib/kube-proxy/config.conf", "--hostname-override=Node-1"])
    found = settle(parsed, parse_config(KUBEADM_PROXY, parsed.config_path))
    assert found.warnings == ()
    assert found.config.hostname_override == "node-1"


def test_a_file_overrides_flags_and_each_one_is_named() -> None:
    parsed = parse_flags(
        ["--config=f.yaml", "--masquerade-all", "--kubeconfig=k", "--healthz-port=0", "-v=3"]
    )
    found = settle(parsed, read("clusterCIDR: 10.0.0.0/8"))
    assert found.config.masquerade_all is False
    assert found.config.client.kubeconfig == ""
    assert found.config.healthz_bind_address == "0.0.0.0:10256"
    assert found.config.logging.verbosity == 3
    assert [one.text for one in found.warnings if "ignored" in one.text] == [
        "--masquerade-all is ignored because of --config: write iptables.masqueradeAll in f.yaml",
        "--kubeconfig is ignored because of --config: write clientConnection.kubeconfig in f.yaml",
        "--healthz-port is ignored because of --config",
    ]


@pytest.mark.parametrize("flag", ["--cleanup", "--write-config-to=x"])
def test_cleaning_up_and_writing_need_no_dataplane(flag: str) -> None:
    assert effective("--proxy-mode=ipvs", flag).mode == "ipvs"


def test_no_cluster_cidr_is_a_warning() -> None:
    found = settle(parse_flags([]), None)
    assert [one.warning for one in found.warnings] == [True]
    assert "no clusterCIDR is given" in found.warnings[0].text
    assert settle(parse_flags(["--detect-local-mode=NodeCIDR"]), None).warnings == ()


@pytest.mark.parametrize("mode", ["iptables", "nftables", "ipvs", "userspace"])
def test_a_file_says_the_mode(mode: str) -> None:
    parsed = parse_flags(["--config=f.yaml"])
    assert settle(parsed, read(f"mode: {mode}\nclusterCIDR: 10.0.0.0/8")).config.mode == mode


def test_periods_are_those_of_the_mode() -> None:
    text = (
        "ipvs: {syncPeriod: 7s, minSyncPeriod: 2s}\nnftables: {syncPeriod: 9s, masqueradeBit: 3}\n"
    )
    ipvs, nftables = read(f"mode: ipvs\n{text}").config, read(f"mode: nftables\n{text}").config
    assert (ipvs.sync_period, ipvs.min_sync_period) == (7.0, 2.0)
    assert (nftables.sync_period, nftables.masquerade_bit, ipvs.masquerade_bit) == (9.0, 3, 14)


# --- what it means on a node --------------------------------------------------------------

LOCAL: tuple[LocalAddress, ...] = (
    ("127.0.0.1", 8), ("10.0.0.7", 24), ("192.0.2.7", 24), ("10.0.0.3", 24),
    ("::1", 128), ("fd00::7", 64), ("fe80::1%eth0", 64),
)  # fmt: skip
NODE = Node(
    metadata=Meta(name="n", labels={"topology.kubernetes.io/zone": "z1"}),
    spec=NodeSpec(pod_cidrs=["10.244.1.0/24", "fd00:1::/64"]),
    status=NodeStatus(
        addresses=[
            NodeAddress("Hostname", "n"),
            NodeAddress("ExternalIP", "203.0.113.1"),
            NodeAddress("InternalIP", "192.0.2.7"),
            NodeAddress("InternalIP", "fd00::7"),
        ]
    ),
)


@pytest.mark.parametrize(
    ("said", "family", "expected"),
    [
        ((), 4, None),
        ((), 6, None),
        (("0.0.0.0/0",), 4, None),
        (("10.0.0.0/8", "0.0.0.0/0"), 4, None),
        (("all",), 6, None),
        (("10.0.0.0/8",), 4, ("10.0.0.3", "10.0.0.7")),
        (("10.0.0.0/8",), 6, None),  # nothing is said of IPv6: as upstream, all
        (("127.0.0.0/8", "192.0.2.0/24"), 4, ("127.0.0.1", "192.0.2.7")),
        (("::1/128", "fd00::/8"), 6, ("fd00::7",)),
        (("localhost",), 6, ()),
        (("fe80::/10",), 6, ("fe80::1",)),
        (("203.0.113.0/24",), 4, ()),
        (("primary",), 4, ("192.0.2.7",)),
        (("primary",), 6, ("fd00::7",)),
        (("primary", "10.0.0.0/30"), 4, ("10.0.0.3", "192.0.2.7")),
    ],
)
def test_node_port_addresses(
    said: tuple[str, ...], family: Family, expected: tuple[str, ...] | None
) -> None:
    options = options_of(config(node_port_addresses=said), family, NODE, LOCAL)
    assert options.node_port_addresses == expected


@pytest.mark.parametrize(
    ("said", "on", "mode", "expected"),
    [
        ((), True, "iptables", True),
        ((), False, "iptables", False),
        ((), True, "nftables", False),
        (("127.0.0.0/8",), True, "iptables", True),
        (("127.0.0.1/32",), True, "iptables", True),
        (("10.0.0.0/8",), True, "iptables", False),
        (("10.0.0.0/8", "0.0.0.0/0"), True, "iptables", True),
        (("fd00::/8",), True, "iptables", True),  # of IPv4 nothing is said: all
        (("primary",), True, "iptables", False),
        (("localhost",), True, "iptables", True),
    ],
)
def test_route_localnet_where_node_ports_answer_on_localhost(
    said: tuple[str, ...], on: bool, mode: str, expected: bool
) -> None:
    iptables = replace(ProxyConfig().iptables, localhost_node_ports=on)
    one = config(node_port_addresses=said, iptables=iptables, mode=mode)
    assert serves_localhost(one) is expected
    assert options_of(one, 4, NODE, LOCAL).localhost_node_ports is expected
    assert options_of(one, 6, NODE, LOCAL).localhost_node_ports is False


def test_loopback_answers_node_ports_only_where_it_may() -> None:
    off = replace(ProxyConfig().iptables, localhost_node_ports=False)
    one = config(node_port_addresses=("127.0.0.0/8", "10.0.0.0/29"), iptables=off)
    assert options_of(one, 4, NODE, LOCAL).node_port_addresses == ("10.0.0.3", "10.0.0.7")


@pytest.mark.parametrize(
    ("args", "family", "expected"),
    [
        ("", 4, None),
        ("--cluster-cidr=10.244.0.0/16", 4, Detector("cidr", "10.244.0.0/16")),
        ("--cluster-cidr=10.244.0.0/16", 6, None),
        ("--cluster-cidr=10.244.0.0/16,fd00::/56", 6, Detector("cidr", "fd00::/56")),
        ("--detect-local-mode=NodeCIDR", 4, Detector("cidr", "10.244.1.0/24")),
        ("--detect-local-mode=NodeCIDR", 6, Detector("cidr", "fd00:1::/64")),
        ("--detect-local-mode=BridgeInterface --pod-bridge-interface=cni0", 6,
         Detector("interface", "cni0")),
        ("--detect-local-mode=InterfaceNamePrefix --pod-interface-name-prefix=veth", 4,
         Detector("prefix", "veth")),
    ],
)  # fmt: skip
def test_how_pods_of_this_node_are_known(
    args: str, family: Family, expected: Detector | None
) -> None:
    assert options_of(effective(*args.split()), family, NODE, LOCAL).detector == expected


@pytest.mark.parametrize("prefix", ["abcdefghijklmno", 'a"b', "it's", "-x", "!x", "a b", "a/b"])
def test_an_interface_that_iptables_would_never_take_is_refused_at_the_start(prefix: str) -> None:
    """iptables counts the "+" behind a prefix."""
    mode = "--detect-local-mode=InterfaceNamePrefix"
    with pytest.raises(ConfigError, match="must be an interface's name"):
        effective(mode, f"--pod-interface-name-prefix={prefix}")
    assert effective(mode, "--pod-interface-name-prefix=abcdefghijklmn")


def test_node_cidr_waits_for_its_node() -> None:
    one = effective("--detect-local-mode=NodeCIDR")
    assert one.needs_node
    assert detector_of(one, 4, None) is None
    odd = Node(metadata=Meta(name="n"), spec=NodeSpec(pod_cidrs=["nonsense", "10.9.0.0/24"]))
    assert detector_of(one, 4, odd) == Detector("cidr", "10.9.0.0/24")
    assert effective("--nodeport-addresses=primary").needs_node
    assert not ProxyConfig().needs_node


def test_the_marks_and_conntrack_settings_reach_the_rules() -> None:
    one = effective("--iptables-masquerade-bit=3", "--masquerade-all", "--conntrack-tcp-be-liberal")
    options = options_of(one, 4, None, LOCAL)
    assert (options.mark, options.masquerade_all, options.drop_invalid) == (8, True, False)
    assert options_of(ProxyConfig(), 4, None, LOCAL).drop_invalid


@pytest.mark.parametrize(
    ("bind", "family", "node", "expected"),
    [
        ("0.0.0.0", 4, NODE, "192.0.2.7"),
        ("::", 6, NODE, "fd00::7"),
        ("198.51.100.9", 4, NODE, "198.51.100.9"),
        ("198.51.100.9", 6, NODE, "fd00::7"),
        ("0.0.0.0", 4, None, ""),
        ("0.0.0.0", 4, Node(Meta(), status=NodeStatus([NodeAddress("ExternalIP", "1.2.3.4")])),
         "1.2.3.4"),
        ("0.0.0.0", 4, Node(Meta(), status=NodeStatus([NodeAddress("InternalIP", "x")])), ""),
    ],
)  # fmt: skip
def test_the_nodes_own_address(bind: str, family: Family, node: Node | None, expected: str) -> None:
    assert node_address(config(bind_address=bind), family, node) == expected


def test_this_node_by_name_and_zone() -> None:
    assert node_name(ProxyConfig(), "Host.Example\n") == "host.example"
    assert node_name(config(hostname_override=" N1 "), "host") == "n1"
    assert node_view(ProxyConfig(), 4, "n", NODE) == NodeView("n", "192.0.2.7", "z1")
    assert node_view(ProxyConfig(), 6, "n", None) == NodeView("n")


def test_problems_are_values_that_a_command_can_print() -> None:
    found = settle(parse_flags([]), None).warnings[0]
    assert isinstance(found, Problem)
    assert str(found).startswith("command line: warning: no clusterCIDR")


def test_the_written_file_is_plain_yaml() -> None:
    assert yaml.safe_load(render_yaml(ProxyConfig())) == render_config(ProxyConfig())
