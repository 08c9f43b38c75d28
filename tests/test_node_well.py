"""A node that `kdns node` runs on and is well: what Pods meet there, what comes back when somebody
removes it, and what `kdns trace` and `kdns check` say of it, held against packets.

One start of `kdns node` for each mode, for all that look at it.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
from forwarding import endpoint, service, slice_of
from netcluster import NetCluster, lan, pod
from running_node import (
    ADDRESSES,
    BOTH_FAMILIES,
    LOCAL,
    SETTLE,
    VIP,
    NodeSite,
    kube_dns,
    pod_dns,
)
from running_proxy import until
from traffic import cluster_or_skip

# Imported here, so that the processes which are forked need not.
from kdns import cli
from kdns.explain import check_command, trace_command
from kdns.explain.evidence import Where, gather, read_kernel
from kdns.explain.trace import trace
from kdns.explain.trace_state import Request
from kdns.explain.trace_text import as_json
from kdns.proxy.options import Protocol

assert check_command and trace_command

FLAGS = (*BOTH_FAMILIES, "--masquerade-all", f"--nodeport-addresses={lan('node')}/32")
PROTOCOLS: tuple[Protocol, ...] = ("udp", "tcp")

pytestmark = pytest.mark.root

SPACES = [{"kind": "Namespace", "metadata": {"name": n}} for n in ("default", "kube-system")]
WEB_NAME, WEB_IP = "web.default.svc.cluster.local.", "10.96.0.80"
WEB = (
    service("web", ip=WEB_IP),
    slice_of("web", endpoint(pod(10)), ports=(("http", 8080, "TCP"),)),
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[NetCluster]:
    with cluster_or_skip() as made:
        yield made


@pytest.fixture(scope="module", params=["iptables", "nftables", "userspace"])
def well(
    request: pytest.FixtureRequest, cluster: NetCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[NodeSite]:
    """A node that is well. Its settings are none that one could guess."""
    site = NodeSite(cluster, tmp_path_factory.mktemp("node"), request.param)
    site.put(*SPACES, *kube_dns(pod_dns(4), pod_dns(6)), *WEB)
    site.corefile(bind=ADDRESSES)
    site.start(*FLAGS)
    yield site
    site.close()


def kdns(site: NodeSite, *argv: str) -> tuple[int, Any]:
    """Run a command there; return its exit code and its JSON."""
    control = ("--control", str(site.folder / "control.sock"))
    return site.cluster.call("node", _run, [*argv, *control, "-o", "json"])


def _run(argv: list[str]) -> tuple[int, Any]:
    with redirect_stdout(StringIO()) as out:
        code = cli.run(argv)
    return code, json.loads(out.getvalue())


# --- what Pods meet -------------------------------------------------------------------------


def test_pods_and_the_node_reach_its_dns_server_past_the_services_rules_untracked(
    well: NodeSite,
) -> None:
    """The Service has rules for the very address, and they lead to nobody: this server
    answers all the same, and conntrack hears of nothing."""
    for where in ("client", "node"):
        for server in ADDRESSES:
            for tcp in (False, True):
                found = well.ask(where, server, WEB_NAME, tcp=tcp)
                assert found == WEB_IP, f"{where} asks {server}, tcp={tcp}"
    assert well.flows() == []
    # Forwarding is there, too: the name leads somewhere.
    assert {r.who for r in well.cluster.ask("client", WEB_IP, 80)} == {"pod-a"}


def test_two_questions_at_once_from_one_socket_do_not_race(well: NodeSite) -> None:
    """As libc asks for A and AAAA: tracked, now and then one of the two was dropped."""

    def failed() -> list[str]:
        return re.findall(r"insert_failed=(\d+)", well.cluster.run("node", "conntrack", "-S"))

    before = failed()
    assert well.cluster.call("client", ask_in_pairs, VIP[4], 300) == 600
    assert well.flows() == []
    assert failed() == before != []


def ask_in_pairs(server: str, times: int) -> int:
    """Send A and AAAA at once from one socket, many times; return how many were answered."""
    import dns.message

    answered = 0
    for _ in range(times):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
            one.settimeout(5)
            one.connect((server, 53))
            queries = [dns.message.make_query(WEB_NAME, kind) for kind in ("A", "AAAA")]
            for query in queries:
                one.send(query.to_wire())
            ids = {dns.message.from_wire(one.recv(4096)).id for _ in queries}
            answered += len(ids & {query.id for query in queries})
    return answered


# --- what is said of it ---------------------------------------------------------------------


def test_its_dns_server_is_where_packets_to_the_cluster_dns_end(well: NodeSite) -> None:
    asked = [
        Request(address, 53, source, protocol)
        for address in ADDRESSES
        for source in ("", pod(5, 6 if ":" in address else 4), "node1")
        for protocol in PROTOCOLS
    ]
    for told in well.cluster.call("node", _traces, str(well.folder / "control.sock"), asked):
        assert told["end"]["kind"] == "process", told["end"]
        assert "node node1's own DNS server" in told["end"]["text"]
        assert told["findings"] == []
        if told["frontend"]["kind"] == "cluster IP" and well.mode != "userspace":
            assert told["rules"]["source"] == "kernel"
            assert [way["verdict"] for way in told["rules"]["ways"]] == ["local"]
            assert any("not tracked" in line for line in told["rules"]["lines"])


def _traces(control: str, requests: list[Request]) -> list[Any]:
    evidence = gather(Where(control=control))
    return [as_json(trace(evidence, one)) for one in requests]


def test_a_name_leads_to_where_packets_go(well: NodeSite) -> None:
    """By the name of a Pod that this registry does not hold, and by its address."""
    for source in ("default/client", pod(5)):
        code, told = kdns(well, "trace", "web:80", "--from", source)
        assert (code, told["end"]["kind"]) == (0, "endpoint"), told["end"]
        assert told["client"]["kind"] == "pod"
        assert [one["endpoint"] for one in told["end"]["endpoints"]] == [f"{pod(10)}:8080"]
        assert told["rules"]["masquerade"]  # --masquerade-all
    (reply, *_) = well.cluster.ask("client", WEB_IP, 80)
    assert (reply.who, reply.masqueraded) == ("pod-a", True)


def test_what_it_does_not_hold_it_does_not_know(well: NodeSite) -> None:
    """Its registry has no Pods: that none fits a selector would be a guess."""
    well.put(
        *SPACES, *kube_dns(pod_dns(4), pod_dns(6)), *WEB, service("empty", selector={"app": "x"})
    )
    name = "empty.default.svc.cluster.local."
    until("it is a name", lambda: well.ask("client", VIP[4], name) != "NXDOMAIN", SETTLE)
    code, told = kdns(well, "trace", "empty:80")
    assert (code, told["end"]["finding"]) == (1, "no-endpoints")
    assert "this kdns holds no Pods" in told["end"]["text"]
    assert "get pods -l app=x --show-labels" in told["end"]["advice"]
    well.put(*SPACES, *kube_dns(pod_dns(4), pod_dns(6)), *WEB)
    until("it is none", lambda: well.ask("client", VIP[4], name) == "NXDOMAIN", SETTLE)


def test_check_has_nothing_to_say_of_it(well: NodeSite) -> None:
    code, told = kdns(well, "check")
    faults = [one for one in told["findings"] if one["id"] != "mode-not-compared"]
    assert (code, faults) == (0, [])
    assert {*told["checked"]} >= {"registry", "gate", "dns", "rules", "host"}


def test_where_nobody_is_left_to_listen(well: NodeSite) -> None:
    """After a kill the addresses and the rules are there still."""
    well.end(signal.SIGKILL)
    if well.mode != "userspace":  # its rules cannot be walked
        told = well.cluster.call("node", _trace_kernel, str(well.folder / "manifests"))
        assert told["end"]["finding"] == "nobody-listens"
        assert "kdns node --cleanup" in told["end"]["advice"]
    assert well.ask("client", VIP[4], WEB_NAME, seconds=0.2) in (
        "ConnectionRefusedError", "timeout",
    )  # fmt: skip
    assert LOCAL[4] in well.addresses()
    well.start(*FLAGS)


def _trace_kernel(manifests: str) -> Any:
    """Trace with the registry of manifests and the kernel of here, as with an API server's."""
    evidence = replace(gather(Where(manifests=(manifests,))), kernel=asyncio.run(read_kernel()))
    return as_json(trace(evidence, Request(VIP[4], 53, pod(5), "udp")))


# --- it stays so ----------------------------------------------------------------------------

AGAIN = "somebody changed the rules of the DNS path; written again"
HARM = {
    "the table emptied": ("iptables -t raw -F", "nft delete table inet kdns-dns"),
    "the jump gone": ("iptables -t raw -D PREROUTING 1", "nft flush chain inet kdns-dns output"),
    "all of it gone": ("nft flush ruleset", "nft flush ruleset"),
}


@pytest.mark.parametrize("harm", HARM)
def test_rules_that_somebody_removed_come_back(well: NodeSite, harm: str) -> None:
    before, told = well.rules(), well.said.count(AGAIN)
    assert before
    well.cluster.run("node", "sh", "-c", HARM[harm][well.mode == "nftables"])
    assert well.rules() != before
    until("it says so", lambda: well.said.count(AGAIN) > told, SETTLE)
    until("the rules of before", lambda: well.rules() == before, SETTLE)
    assert well.ask("client", VIP[4], WEB_NAME) == WEB_IP


def test_addresses_that_somebody_removed_come_back(well: NodeSite) -> None:
    for address in ADDRESSES:
        device = well.health()[1]["path"]["interface"]
        well.cluster.run("node", "ip", "addr", "del", address, "dev", device)
    until("the addresses", lambda: well.addresses() == set(ADDRESSES), SETTLE)
    assert well.ask("client", VIP[4], WEB_NAME) == WEB_IP
