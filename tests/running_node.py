"""A node for tests on which `kdns node` runs, in a cluster of network namespaces (netcluster.py).

    with a cluster: site = NodeSite(cluster, folder)
        site.put(...)                 the registry: manifests in a folder
        site.start("--proxy-mode=nftables")
        site.ask("client", "10.96.0.10", "web.default.svc.cluster.local")

Questions are put with dnspython, by processes in the namespace of who asks.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import dns.exception
import dns.message
import dns.query
import dns.rcode
from netcluster import CLUSTER_CIDR, NODE_ADDRESS, NODE_NAME, NetCluster, lan, pod
from running_proxy import as_json, until

from kdns.registry.objects import Object

ROOT: Final = Path(__file__).parents[1]
SETTLE: Final = 30.0  # seconds a change may take; the folder is looked at each second
CIDRS: Final = f"--cluster-cidr={CLUSTER_CIDR[4]},{CLUSTER_CIDR[6]}"
VIP: Final = {4: "10.96.0.10", 6: "fd00:10:96::a"}
LOCAL: Final = {4: "169.254.20.10", 6: "fd00:169:254::a"}
ADDRESSES: Final = (*LOCAL.values(), *VIP.values())
BOTH_FAMILIES: Final = (
    f"--cluster-dns={VIP[4]},{VIP[6]}",
    f"--local-dns={LOCAL[4]},{LOCAL[6]}",
)
# Elsewhere than on port 53 another DNS server stands for the cluster's: an endpoint of kube-dns.
OTHER_PORT: Final = 1053
HEALTH: Final = "http://127.0.0.1:9256"
NODE: Final = {
    "kind": "Node",
    "metadata": {"name": NODE_NAME},
    "status": {
        "addresses": [{"type": "InternalIP", "address": ip} for ip in NODE_ADDRESS.values()]
    },
}
VERSIONS: Final = {"EndpointSlice": "discovery.k8s.io/v1"}
COREFILE: Final = """\
.:53 {{
    bind {bind}
    errors
    ready 127.0.0.1:9255
    kubernetes cluster.local in-addr.arpa ip6.arpa {{
        fallthrough in-addr.arpa ip6.arpa
    }}
    forward . {upstream}
}}
"""


def kube_dns(*endpoints: str, port: int = OTHER_PORT) -> list[dict[str, Any]]:
    """The Service of the cluster's DNS, at both VIPs, and where its rules lead."""
    ports = [("dns", "UDP"), ("dns-tcp", "TCP")]
    labels = {"kubernetes.io/service-name": "kube-dns"}
    found: list[dict[str, Any]] = [
        {
            "kind": "Service",
            "metadata": {"name": "kube-dns", "namespace": "kube-system"},
            "spec": {
                "clusterIP": VIP[4],
                "clusterIPs": [VIP[4], VIP[6]],
                "ipFamilies": ["IPv4", "IPv6"],
                "ipFamilyPolicy": "RequireDualStack",
                "ports": [{"name": n, "port": 53, "protocol": p} for n, p in ports],
            },
        }
    ]
    for family in (4, 6):
        mine = [one for one in endpoints if (":" in one) == (family == 6)]
        found.append(
            {
                "kind": "EndpointSlice",
                "addressType": f"IPv{family}",
                "metadata": {
                    "name": f"kube-dns-{family}",
                    "namespace": "kube-system",
                    "labels": labels,
                },
                "endpoints": [{"addresses": [a], "conditions": {"ready": True}} for a in mine],
                "ports": [{"name": n, "port": port, "protocol": p} for n, p in ports],
            }
        )
    return found


def put_question(server: str, name: str, kind: str, tcp: bool, port: int, seconds: float) -> str:
    """Ask once; return the answers' values, or the name of what came instead."""
    query = dns.message.make_query(name, kind)
    send = dns.query.tcp if tcp else dns.query.udp
    try:
        answer = send(query, server, seconds, port=port)
    except dns.exception.Timeout:
        return "timeout"
    except OSError as e:
        return type(e).__name__
    if answer.rcode() != dns.rcode.NOERROR:
        return dns.rcode.to_text(answer.rcode())
    return " ".join(sorted(rdata.to_text() for rrset in answer.answer for rdata in rrset))


class NodeSite:
    """The node of a cluster, the folder that is its registry, and `kdns node` on it."""

    # The hash of conntrack is the whole machine's.
    FLAGS = (
        f"--hostname-override={NODE_NAME}",
        "--conntrack-max-per-core=0",
        "--oom-score-adj=0",
        CIDRS,
    )

    def __init__(self, cluster: NetCluster, folder: Path, mode: str = "") -> None:
        self.cluster = cluster
        self.mode = mode  # "": as flags say
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0
        self._others: list[subprocess.Popen[bytes]] = []
        (folder / "manifests").mkdir()
        self.corefile()

    # --- what it is given -------------------------------------------------------------------

    def put(self, *objects: Object | dict[str, Any]) -> None:
        """Have these in the registry and nothing else, from one moment to the next."""
        items = [as_json(one) for one in (NODE, *objects)]
        for item in items:
            item["apiVersion"] = VERSIONS.get(item["kind"], "v1")
        draft = self.folder / "draft"
        draft.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
        draft.rename(self.folder / "manifests" / "all.json")

    def corefile(self, text: str = "", bind: Sequence[str] = (VIP[4], LOCAL[4])) -> Path:
        """Write the Corefile that start() uses; without a lameduck time."""
        path = self.folder / "Corefile"
        path.write_text(text or COREFILE.format(bind=" ".join(bind), upstream=lan("outside")))
        return path

    # --- the process ------------------------------------------------------------------------

    def command(self, *flags: str, prefix: Sequence[str] = ()) -> list[str]:
        """Return a command line of `kdns node` on the node. It dies with the tests."""
        on_node = [*self.cluster.enter("node"), *prefix, "setpriv", "--pdeathsig", "KILL"]
        registry = [] if any(f.startswith("--master") for f in flags) else [
            "-f", str(self.folder / "manifests")
        ]  # fmt: skip
        mode = [f"--proxy-mode={self.mode}"] if self.mode else []
        ours = [*self.FLAGS, *mode, *registry]
        return [*on_node, sys.executable, "-m", "kdns", "node", *ours, *flags]

    def launch(self, *flags: str, prefix: Sequence[str] = (), path: str = "") -> None:
        """Start it, without waiting for anything. path -- folders before PATH"""
        self.starts += 1
        control = f"--control={self.folder / 'control.sock'}"
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        if path:
            env["PATH"] = f"{path}:{env['PATH']}"
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                self.command(control, *flags, prefix=prefix), env=env,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def start(self, *flags: str, **more: Any) -> None:
        """Start it with our Corefile and wait until all of it is well."""
        self.launch("-conf", str(self.folder / "Corefile"), *flags, **more)
        self.until_well()

    def until_well(self) -> None:
        """Wait until both halves, and the way to DNS, are as they should be."""
        try:
            until("/healthz is 200", lambda: self.health()[0] == 200, SETTLE)
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.health()}\n{self.said}") from None

    @property
    def log_file(self) -> Path:
        return self.folder / f"node-{self.starts}.log"

    @property
    def said(self) -> str:
        """What the run of now has said."""
        return self.log_file.read_text()

    def until_said(self, text: str) -> None:
        try:
            until(f"it says {text!r}", lambda: text in self.said, SETTLE)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.said}") from None

    def health(self, path: str = "/healthz") -> tuple[int, Any]:
        """Return (status, body) of its health; (0, None) if nobody listens."""
        assert self.process is not None
        assert self.process.poll() is None, self.said
        argv = [*self.cluster.enter("node"), "curl", "-s", "-w", "%{http_code}", HEALTH + path]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        body, status = done.stdout[:-3], done.stdout[-3:]
        return (int(status), json.loads(body)) if body else (0, None)

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal; return the exit status."""
        assert self.process is not None
        self.process.send_signal(how)
        status = self.process.wait(SETTLE)
        self.process = None
        return status

    def finish(self, *flags: str, prefix: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """Run a `kdns node` to its end."""
        return subprocess.run(
            self.command(*flags, prefix=prefix), capture_output=True, text=True, check=False,
            timeout=2 * SETTLE, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def spawn(self, where: str, *argv: str) -> subprocess.Popen[bytes]:
        """Start another program somewhere; it ends with the site."""
        die = ["setpriv", "--pdeathsig", "KILL"]
        process = subprocess.Popen(
            [*self.cluster.enter(where), *die, *argv],
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._others.append(process)
        return process

    def serve_elsewhere(self, where: str, address: str, text: str, port: int = OTHER_PORT) -> None:
        """Have another DNS server somewhere, and wait for it."""
        corefile = self.folder / f"Corefile-{where}"
        corefile.write_text(f".:{port} {{\n bind {address}\n {text}\n}}\n")
        process = self.spawn(where, sys.executable, "-m", "kdns", "-conf", str(corefile))

        def answers() -> bool:
            assert process.poll() is None, process.stdout and process.stdout.read()
            return self.cluster.call(
                where, put_question, address, ".", "NS", False, port, 0.5
            ) not in ("timeout", "ConnectionRefusedError")  # fmt: skip

        until(f"the DNS server in {where}", answers, SETTLE)

    def close(self) -> None:
        """End what is left, and remove what a killed run left."""
        for process in (*self._others, *([self.process] if self.process else [])):
            with suppress(ProcessLookupError):
                process.kill()
            process.communicate()
        for number in range(1, self.starts + 1):
            # pytest shows it where a test has failed.
            print(f"--- run {number}\n{(self.folder / f'node-{number}.log').read_text()}")
        # As `kdns node --cleanup` does, which takes a second to start.
        self.cluster.run("node", "nft", "flush", "ruleset")
        shown = self.cluster.run("node", "ip", "-o", "addr", "show").splitlines()
        for _, device, _, address, *_ in map(str.split, shown):
            if address.partition("/")[0] in ADDRESSES:
                self.cluster.run("node", "ip", "addr", "del", address, "dev", device)

    # --- what others see of it --------------------------------------------------------------

    def ask(
        self, where: str, server: str, name: str, kind: str = "A", tcp: bool = False,
        port: int = 53, seconds: float = 5.0,
    ) -> str:  # fmt: skip
        """Put a question from a namespace."""
        return self.cluster.call(where, put_question, server, name, kind, tcp, port, seconds)

    def flows(self, *addresses: str) -> list[str]:
        """Return the conntrack entries of the node that have to do with port 53 there."""
        lines: list[str] = []
        for family in ("ipv4", "ipv6"):
            lines += self.cluster.run("node", "conntrack", "-L", "-f", family).splitlines()
        wanted = addresses or ADDRESSES
        return [
            line
            for line in lines
            if "port=53 " in line and any(f"{one} " in line for one in wanted)
        ]

    def rules(self) -> str:
        """Return everything in the kernel that is of the DNS path."""
        saved = "".join(
            self.cluster.run("node", f"{tool}-save", "-t", table)
            for tool in ("iptables", "ip6tables")
            for table in ("raw", "filter")
        )
        ours = [line for line in saved.splitlines() if "KDNS-DNS" in line]
        tables = self.cluster.run("node", "nft", "list", "tables").splitlines()
        if "table inet kdns-dns" in tables:
            ours += self.cluster.run("node", "nft", "list", "table", "inet", "kdns-dns").split("\n")
        return "\n".join(ours)

    def addresses(self) -> set[str]:
        """Return those of ADDRESSES that the node has."""
        text = self.cluster.run("node", "ip", "-o", "addr", "show")
        found = {word.partition("/")[0] for word in text.split()}
        return found & set(ADDRESSES)


def pod_dns(family: int = 4) -> str:
    """Where the other DNS server of the cluster is: on another node."""
    return pod(10, family, node=2)
