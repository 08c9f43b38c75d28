"""`kdns proxy`, `kdns rules` and `kdns dump table` on the command line: what is printed where, exit
codes, and what a person who erred is told. No kernel is touched here.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from forwarding import CLUSTER_CIDRS, GOLDEN, endpoint, service, slice_of
from iptables_text import Rules, differences, normalised, parse_saved, without_counters
from running_proxy import as_json

from kdns import cli

RECORDED = Path(__file__).parent / "golden" / "rules"
WEB = """\
{apiVersion: v1, kind: Service, metadata: {name: web},
 spec: {clusterIP: 10.96.0.50, ports: [{name: http, port: 80}]}}
"""


class Ran(NamedTuple):
    """What came of a command line."""

    code: int
    out: str
    err: str


@pytest.fixture
def kdns(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Ran]]:
    def run(*argv: str) -> Ran:
        code = cli.run(list(argv))
        return Ran(code, *capsys.readouterr())

    root = logging.getLogger()
    handlers = root.handlers[:]
    yield run
    root.handlers[:] = handlers


@pytest.fixture
def web(tmp_path: Path) -> str:
    """A file with one Service and no Node."""
    file = tmp_path / "web.yaml"
    file.write_text(WEB)
    return str(file)


def recorded(family: int) -> Rules:
    name = "iptables" if family == 4 else "ip6tables"
    return normalised(without_counters(parse_saved((RECORDED / f"{name}.txt").read_text())))


# --- kdns proxy -----------------------------------------------------------------------------


def test_help_names_every_flag_once_and_fits_a_terminal(kdns: Callable[..., Ran]) -> None:
    from kdns.proxy.flags import FLAGS, NO_EFFECT

    ran = kdns("proxy", "--help")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("Usage: kdns proxy [FLAGS]\n")
    assert max(map(len, ran.out.splitlines())) <= 100
    heads = [line.split()[0] for line in ran.out.splitlines() if line.startswith("  -")]
    shown = {head.lstrip("-") for head in heads if head.rstrip(",") == head}
    assert {one.name for one in FLAGS} <= shown
    assert all(f"--{name}" in ran.out for name in NO_EFFECT)
    assert kdns("proxy", "-h") == ran
    assert "proxy" in kdns("--help").out


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ("--clutser-cidr=10.0.0.0/8", "no flag '--clutser-cidr', did you mean '--cluster-cidr'?"),
        ("--iptables-sync-period=5", "--iptables-sync-period: must be a duration such as 30s"),
        ("--iptables-sync-period=0s", "--iptables-sync-period: "),
        ("--iptables-min-sync-period=1h", "must be at most syncPeriod (30s), found 1h"),
        ("--masquerade-all false", "unexpected argument 'false': a switch's value is written"),
        ("--masquerade-all=maybe", "--masquerade-all: must be true or false, found 'maybe'"),
        ("--iptables-masquerade-bit=32", "--iptables-masquerade-bit: "),
        ("--cluster-cidr=10.0.0.0/33", "must be a CIDR such as 10.244.0.0/16"),
        ("--portmap=web=80", "--portmap: 'web=80' is not NAMESPACE/SERVICE[:PORT][/udp]="),
        ("--proxy-mode=fast", "--proxy-mode: "),
        ("--detect-local-mode=BridgeInterface", "must name the bridge of the Pods"),
        ("--metrics-bind-address=localhost:1", "--metrics-bind-address: "),
        ("--config", "--config needs a value (FILE)"),
        ("--config=/nowhere", "/nowhere: cannot be read: No such file or directory"),
        ("--config=/", "/: cannot be read: Is a directory"),
        ("-f /nowhere --dry-run", "/nowhere does not exist"),
    ],
)  # fmt: skip
def test_a_wrong_flag_is_named_with_what_would_be_right(
    kdns: Callable[..., Ran], argv: str, told: str
) -> None:
    ran = kdns("proxy", *argv.split())
    assert (ran.code, told in ran.err) == (2, True), ran
    assert "Traceback" not in ran.err
    mine = [line for line in ran.err.splitlines() if not line.startswith(("kdns: ", "[WARNING] "))]
    assert (mine, ran.out) == ([], "")


def test_all_mistakes_are_told_at_once(kdns: Callable[..., Ran]) -> None:
    ran = kdns("proxy", "--nonsense", "--masquerade-all=maybe", "word")
    assert ran.code == 2
    assert len(ran.err.splitlines()) == 3


def test_a_wrong_file_is_named_with_line_and_field(
    kdns: Callable[..., Ran], tmp_path: Path
) -> None:
    file = tmp_path / "config.conf"
    file.write_text(
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
        "iptables:\n  syncPeriod: soon\n"
    )
    ran = kdns("proxy", f"--config={file}")
    assert ran.code == 2
    assert ran.err.startswith(f"kdns: {file}:4: iptables.syncPeriod: must be a duration")

    file.write_text("kind: [\n")
    ran = kdns("proxy", f"--config={file}")
    assert (ran.code, f"kdns: {file}:2: not YAML: " in ran.err) == (2, True)


def test_the_configuration_in_effect_can_be_written(
    kdns: Callable[..., Ran], tmp_path: Path
) -> None:
    file = tmp_path / "out.conf"
    ran = kdns("proxy", "--cluster-cidr=10.1.0.0/16", f"--write-config-to={file}")
    assert (ran.code, str(file) in ran.out) == (0, True)
    written = yaml.safe_load(file.read_text())
    assert (written["kind"], written["clusterCIDR"]) == ("KubeProxyConfiguration", "10.1.0.0/16")

    ran = kdns("proxy", f"--write-config-to={tmp_path}/no/such/folder")
    assert ran.code == 1
    assert "no/such/folder: cannot be written: No such file or directory\n" in ran.err


def test_the_log_is_json_where_that_is_asked_for(kdns: Callable[..., Ran], tmp_path: Path) -> None:
    ran = kdns("proxy", "--logging-format=json", f"--write-config-to={tmp_path}/out.conf")
    line = json.loads(ran.out)
    assert (ran.code, line["level"], "out.conf" in line["message"]) == (0, "info", True)


def test_version(kdns: Callable[..., Ran]) -> None:
    assert kdns("proxy", "--version") == kdns("version")


def test_a_dry_run_prints_rules_on_stdout_and_all_else_on_stderr(
    kdns: Callable[..., Ran], web: str
) -> None:
    ran = kdns("proxy", "-f", web, "--dry-run")
    assert ran.code == 0
    assert ran.out.startswith("# for iptables-restore --noflush\n*filter\n")
    assert "[WARNING] proxy: command line: no clusterCIDR is given" in ran.err
    assert all(line.startswith(("*", ":", "-A ", "#", "COMMIT")) for line in ran.out.splitlines())


# --- kdns rules -----------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "word"), [(4, "ipv4"), (6, "ipv6")])
def test_rules_of_the_recorded_cluster_are_the_recorded_ones(
    kdns: Callable[..., Ran], family: int, word: str
) -> None:
    ran = kdns("rules", "-f", str(GOLDEN), "--node", "node1", "--family", word)
    assert ran.code == 0
    assert differences(normalised(parse_saved(ran.out)), recorded(family)) == []
    if family == 4:
        assert kdns("rules", "-f", str(GOLDEN), "--node", "node1").out == ran.out


def test_where_pods_are_changes_who_is_masqueraded(kdns: Callable[..., Ran], web: str) -> None:
    def heads(*flags: str) -> list[str]:
        out = kdns("rules", "-f", str(GOLDEN), "--node", "node1", *flags).out
        return [line for line in out.splitlines() if "cluster IP" in line and "MARK-MASQ" in line]

    assert all(f"! -s {CLUSTER_CIDRS[4]}" in line for line in heads())
    assert all("! -s 10.9.0.0/16" in line for line in heads("--cluster-cidr", "10.9.0.0/16"))
    assert heads("--cluster-cidr", "10.9.0.0/16") != []
    assert heads("--cluster-cidr", "") == []


@pytest.mark.parametrize("command", ["rules", "dump table"])
@pytest.mark.parametrize(
    ("node", "told"),
    [
        ([], "kdns: --node: say which of node1, node2\n"),
        (["--node", "nope"], "kdns: --node: there is no Node 'nope'; there is node1, node2\n"),
    ],
)
def test_whose_rules_they_are_must_be_said_where_there_are_several_nodes(
    kdns: Callable[..., Ran], command: str, node: list[str], told: str
) -> None:
    assert kdns(*command.split(), "-f", str(GOLDEN), *node) == (2, "", told)


def test_a_single_node_or_none_needs_no_name(kdns: Callable[..., Ran], tmp_path: Path) -> None:
    local = service("web", internalTrafficPolicy="Local")
    here = slice_of("web", endpoint("10.244.1.5", nodeName="alone"))
    its_slice = {"apiVersion": "discovery.k8s.io/v1", "addressType": "IPv4", **as_json(here)}
    items = [{"apiVersion": "v1", **as_json(local)}, its_slice]
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "alone"}}

    def verdict(objects: list[Any], *flags: str) -> str:
        file = tmp_path / "all.json"
        file.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))
        ran = kdns("rules", "-f", str(file), *flags)
        assert ran.code == 0
        return "DNAT" if "-j DNAT --to-destination 10.244.1.5:" in ran.out else "DROP"

    assert verdict([*items, node]) == "DNAT"
    assert verdict(items) == "DROP"  # this host is another
    assert verdict(items, "--node", "alone") == "DNAT"


def test_without_services_there_are_the_fixed_rules(
    kdns: Callable[..., Ran], tmp_path: Path
) -> None:
    file = tmp_path / "none.yaml"
    file.write_text("{apiVersion: v1, kind: Namespace, metadata: {name: empty}}\n")
    ran = kdns("rules", "-f", str(file))
    rules = parse_saved(ran.out)
    assert (ran.code, ran.err) == (0, "")
    assert len(rules["nat"]["KUBE-SERVICES"]) == 1
    assert not [chain for chain in rules["nat"] if chain.startswith("KUBE-SVC")]


def test_services_that_claim_one_address_are_told_on_stderr(
    kdns: Callable[..., Ran], tmp_path: Path
) -> None:
    file = tmp_path / "two.yaml"
    file.write_text(f"{WEB}---\n{WEB.replace('name: web', 'name: zeb')}")
    ran = kdns("rules", "-f", str(file))
    told = "10.96.0.50:80/tcp is claimed by default/web:http and default/zeb:http"
    assert (ran.code, ran.err.startswith(f"kdns: {told}")) == (0, True)


def test_broken_yaml_is_named_with_file_and_line(tmp_path: Path, web: str) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("kind: Service\nmetadata: [\n")
    for command in ("rules", "dump table"):
        argv = [sys.executable, "-m", "kdns", *command.split(), "-f", str(bad), "-f", web]
        ran = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert f"{bad}:3: not YAML: " in ran.stderr
        assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ("rules", "Missing option '-f'"),
        ("rules -f /nowhere", "/nowhere does not exist"),
        ("rules -f . --family ipv5", "'ipv5' is not one of 'ipv4', 'ipv6'"),
        ("rules -f . --mode ip", "'ip' is not one of 'iptables', 'nftables', 'ipvs', 'userspace'"),
        ("rules -f . --cluster-cidr 10.0.0.0/33", "must be a CIDR such as 10.244.0.0/16"),
        ("rules -f . --cluster-cidr 10.0.0.0/8,11.0.0.0/8", "--cluster-cidr"),
        ("dump table", "say what to read: -conf FILE or -f PATH"),
        ("dump table -conf Corefile", "-f PATH"),
        ("dump table -f /nowhere", "/nowhere does not exist"),
    ],
)
def test_wrong_usage_leaves_with_2_and_one_line(
    kdns: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: str, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = kdns(*argv.split())
    assert (ran.code, ran.out, len(ran.err.splitlines())) == (2, "", 1)
    assert ran.err.startswith("kdns: ") and told in ran.err


def test_dump_rules_prints_the_same_for_both_families(kdns: Callable[..., Ran]) -> None:
    node = ("-f", str(GOLDEN), "--node", "node1")
    dumped = kdns("dump", "rules", *node).out
    four, six = (kdns("rules", *node, "--family", word).out for word in ("ipv4", "ipv6"))
    assert dumped == f"# IPv4 on node node1\n{four}# IPv6 on node node1\n{six}"


# --- kdns dump table ------------------------------------------------------------------------


def test_dump_table_shows_frontends_and_what_is_behind_them(kdns: Callable[..., Ran]) -> None:
    ran = kdns("dump", "table", "-f", str(GOLDEN), "--node", "node1")
    lines = ran.out.splitlines()
    assert ran.code == 0
    assert [line for line in lines if line.startswith("#")] == [
        "# IPv4 on node node1", "# IPv6 on node node1"
    ]  # fmt: skip
    at = next(i for i, line in enumerate(lines) if "prod/api:http" in line and ":30080" in line)
    behind = []
    while lines[at + 1].startswith(" "):
        at += 1
        behind.append(lines[at].split()[0])
    assert behind, lines[at]
    # As the kernel's rules have it.
    rules = parse_saved(kdns("rules", "-f", str(GOLDEN), "--node", "node1").out)
    dnat = {r.split()[-1] for c in rules["nat"].values() for r in c if "-j DNAT" in r}
    assert set(behind) <= dnat
