"""`kdns trace` and `kdns check` on a node that `kdns node` runs on, held against what packets there
do: the addresses of its DNS server are the node's own, past the rules of the Service.

One node for each mode, and one start of `kdns node` for all that look at it while it is well.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import pytest
from forwarding import endpoint, service, slice_of
from netcluster import NetCluster, lan, pod
from running_node import ADDRESSES, BOTH_FAMILIES, LOCAL, VIP, NodeSite, kube_dns, pod_dns
from traffic import cluster_or_skip

from kdns import cli

pytestmark = pytest.mark.root

SPACES = [{"kind": "Namespace", "metadata": {"name": n}} for n in ("default", "kube-system")]
WEB = (
    service("web", ip="10.96.0.80"),
    slice_of("web", endpoint(pod(10)), ports=(("http", 8080, "TCP"),)),
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[NetCluster]:
    with cluster_or_skip() as made:
        yield made


@pytest.fixture(scope="module", params=["iptables", "nftables"])
def well(
    request: pytest.FixtureRequest, cluster: NetCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[NodeSite]:
    """A node that is well. Its settings are none that one could guess."""
    site = NodeSite(cluster, tmp_path_factory.mktemp("node"))
    site.put(*SPACES, *kube_dns(pod_dns(4), pod_dns(6)), *WEB)
    site.corefile(bind=ADDRESSES)
    site.start(
        f"--proxy-mode={request.param}", *BOTH_FAMILIES, "--masquerade-all",
        f"--nodeport-addresses={lan('node')}/32",
    )  # fmt: skip
    yield site
    site.close()


def kdns(site: NodeSite, *argv: str) -> tuple[int, Any]:
    """Run a command there; return its exit code and its JSON."""
    control = ("--control", str(site.folder / "control.sock"))
    origin = () if "-f" in argv or "--kubeconfig" in argv else control
    return site.cluster.call("node", _run, [*argv, *origin, "-o", "json"])


def _run(argv: list[str]) -> tuple[int, Any]:
    with redirect_stdout(StringIO()) as out:
        code = cli.run(argv)
    return code, json.loads(out.getvalue())


@pytest.mark.parametrize("protocol", ["udp", "tcp"])
def test_its_dns_server_is_where_packets_to_the_cluster_dns_end(
    well: NodeSite, protocol: str
) -> None:
    flags = ("--udp",) if protocol == "udp" else ()
    for address in ADDRESSES:
        for source in ((), ("--from", pod(5, 6 if ":" in address else 4)), ("--from", "node1")):
            target = f"[{address}]:53" if ":" in address else f"{address}:53"
            code, told = kdns(well, "trace", target, *flags, *source)
            assert (code, told["end"]["kind"]) == (0, "process"), told["end"]
            assert "node node1's own DNS server" in told["end"]["text"]
            assert told["findings"] == []
    code, told = kdns(well, "trace", f"{VIP[4]}:53", "--udp")
    assert told["rules"]["source"] == "kernel"
    assert [way["verdict"] for way in told["rules"]["ways"]] == ["local"]
    assert any("not tracked" in line for line in told["rules"]["lines"])


def test_a_name_leads_to_where_packets_go(well: NodeSite) -> None:
    """By the name of a Pod that this registry does not hold, and by its address."""
    for source in ("default/client", pod(5)):
        code, told = kdns(well, "trace", "web:80", "--from", source)
        assert (code, told["end"]["kind"]) == (0, "endpoint"), told["end"]
        assert told["client"]["kind"] == "pod"
        assert [one["endpoint"] for one in told["end"]["endpoints"]] == [f"{pod(10)}:8080"]
        assert told["rules"]["masquerade"]  # --masquerade-all
    (reply, *_) = well.cluster.ask("client", "10.96.0.80", 80)
    assert (reply.who, reply.masqueraded) == ("pod-a", True)


def test_check_has_nothing_to_say_of_it(well: NodeSite) -> None:
    code, told = kdns(well, "check")
    assert (code, told["findings"]) == (0, []), told["findings"]
    assert {*told["checked"]} == {"registry", "gate", "dns", "rules", "conntrack", "host"}


def test_where_nobody_is_left_to_listen(well: NodeSite) -> None:
    """After a kill the addresses and the rules are there still. It is the last test: the node is
    not well any more."""
    where = ("-f", str(well.folder / "manifests"))
    well.end(signal.SIGKILL)
    code, told = well.cluster.call("node", _trace_kernel, where[1])
    assert code == 1
    assert told["end"]["finding"] == "nobody-listens"
    assert "kdns node --cleanup" in told["end"]["advice"]
    assert well.ask("client", VIP[4], "web.default.svc.cluster.local.", seconds=0.2) in (
        "ConnectionRefusedError", "timeout",
    )  # fmt: skip
    assert LOCAL[4] in well.addresses()


def _trace_kernel(manifests: str) -> tuple[int, Any]:
    """Trace with the registry of manifests and the kernel of here, as with an API server's."""
    import asyncio
    from dataclasses import replace

    from kdns.explain.evidence import Where, gather, read_kernel
    from kdns.explain.trace import trace
    from kdns.explain.trace_state import Request
    from kdns.explain.trace_text import as_json

    evidence = gather(Where(manifests=(manifests,)))
    evidence = replace(evidence, kernel=asyncio.run(read_kernel()))
    made = trace(evidence, Request(VIP[4], 53, pod(5), "udp"))
    return int(not made.outcome.arrives), as_json(made)
