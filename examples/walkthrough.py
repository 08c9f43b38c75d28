"""Start `kdns up` with the manifests in this folder, ask it what people ask a cluster's DNS, drive
its API with kubectl, and look at the rules by which a node forwards what is sent to the addresses
it answered.

    make demo            # or: .venv/bin/python examples/walkthrough.py

Everything stays on 127.0.0.1: the outside world is a second server block of
examples/Corefile.demo; real packets stay in a network namespace made for them. Each step is a
command that can be typed by hand; those with kubectl are left out where there is none. Leaves with
0 if every answer was the one expected.
"""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

PROJECT = Path(__file__).resolve().parent.parent
COREFILE = "examples/Corefile.demo"
MANIFESTS = ("examples/services.yaml", "examples/my-nginx.yaml", "examples/database.yaml")
PORTS = range(10_000, 30_000)
START_SECONDS = 20.0  # how long a slow machine may take
STOP_SECONDS = 10.0
RUN_SECONDS = 30.0  # one command
KUBECTL = shutil.which("kubectl", path=str(Path(sys.executable).parent)) or shutil.which("kubectl")
# How the programs of a step are run that may not be in PATH.
OURS = {
    "kdns": (sys.executable, "-m", "kdns"),
    "python": (sys.executable,),
    **({"kubectl": (KUBECTL,)} if KUBECTL else {}),
}


@dataclass(frozen=True, slots=True)
class Step:
    """One question. command: of one program or of some with `|` between them. expect: patterns
    that must be in the output; `{service}` in a pattern is the address that the first question
    brought. like: how one asks with other tools. needs: a program without which the step says
    nothing."""

    why: str
    command: str
    expect: tuple[str, ...]
    code: int = 0
    like: str = ""
    needs: str = ""


# The address of kdns up's first Node is 192.0.2.1.
RULES = (
    "kdns proxy --dry-run --kubeconfig $KUBECONFIG --hostname-override node1"
    " --cluster-cidr 10.244.0.0/16"
)
STEPS = (
    Step(
        "A pod in namespace default asks for a Service by its short name. Its resolv.conf"
        " completes the name; the first try is the right one.",
        "kdns query myservice --search default",
        (r"myservice\.default\.svc\.cluster\.local\. 30 IN A 10\.\d+\.\d+\.\d+$",),
        like="getent hosts myservice",
    ),
    Step(
        "By a partial name. This works from every namespace.",
        "kdns query myservice.default --search shop",
        (
            r"myservice\.default\.shop\.svc\.cluster\.local\. -> NXDOMAIN",
            r"myservice\.default\.svc\.cluster\.local\. 30 IN A {service}$",
        ),
        like="getent hosts myservice.default",
    ),
    Step(
        "By its full name.",
        "kdns query myservice.default.svc.cluster.local --short",
        (r"^{service}$",),
        like="dig +short myservice.default.svc.cluster.local",
    ),
    Step(
        "NodePort and LoadBalancer Services have a cluster address too.",
        "kdns query node-port --search default --short",
        (r"^10\.\d+\.\d+\.\d+$",),
    ),
    Step(
        "The DNS server itself, from another namespace.",
        "kdns query kube-dns.kube-system.svc.cluster.local. --search shop",
        (r"kube-dns\.kube-system\.svc\.cluster\.local\. 30 IN A 10\.96\.0\.10$",),
        like="nslookup kube-dns.kube-system.svc.cluster.local",
    ),
    Step(
        "Which name belongs to 10.96.0.10?",
        "kdns query 10.96.0.10",
        (r"10\.0\.96\.10\.in-addr\.arpa\. 30 IN PTR kube-dns\.kube-system\.svc\.cluster\.local\.",),
        like="dig -x 10.96.0.10",
    ),
    Step(
        "On which port is the Service's port named http? The address comes along.",
        "kdns query _http._tcp.myservice.default.svc.cluster.local SRV",
        (
            r"IN SRV 0 100 8080 myservice\.default\.svc\.cluster\.local\.$",
            r"^myservice\.default\.svc\.cluster\.local\. 30 IN A {service}$",
        ),
        like="dig SRV _http._tcp.myservice.default.svc.cluster.local",
    ),
    Step(
        "An IPv6 address it does not have: no error, but no answer either (NODATA).",
        "kdns query myservice.default.svc.cluster.local AAAA",
        (r"status: NOERROR", r"^cluster\.local\. 30 IN SOA "),
        like="dig AAAA myservice.default.svc.cluster.local",
    ),
    Step(
        "A headless Service stands for its pods: one address each.",
        "kdns query db.shop.svc.cluster.local --short",
        (r"^(10\.244\.\d+\.\d+\n?){3}$",),
    ),
    Step(
        "One pod of the database by its own name, for it keeps its identity.",
        "kdns query db-0.db --search shop",
        (r"^db-0\.db\.shop\.svc\.cluster\.local\. 30 IN A 10\.244\.\d+\.\d+$",),
    ),
    Step(
        "Who are the members of the database, and on which port?",
        "kdns query _postgres._tcp.db.shop.svc.cluster.local SRV",
        tuple(rf"IN SRV 0 33 5432 db-{n}\.db\.shop\.svc\.cluster\.local\.$" for n in range(3)),
    ),
    Step(
        "ExternalName: an alias for a name outside the cluster, which is looked up as well.",
        "kdns query google-svc --search default",
        (
            r"google-svc\.default\.svc\.cluster\.local\. 30 IN CNAME google\.com\.",
            r"google\.com\. \d+ IN A 192\.0\.2\.99",
        ),
        like="nslookup google-svc",
    ),
    Step(
        "A name that does not exist: every completion is tried, and all say NXDOMAIN.",
        "kdns query nosuchservice --search default",
        (
            r"nosuchservice\.default\.svc\.cluster\.local\. -> NXDOMAIN",
            r"nosuchservice\.svc\.cluster\.local\. -> NXDOMAIN",
            r"nosuchservice\.cluster\.local\. -> NXDOMAIN",
            r"status: NXDOMAIN",
        ),
        code=1,
        like="getent hosts nosuchservice",
    ),
    Step(
        "A name outside: forwarded to the upstream.",
        "kdns query www.example.org.",
        (
            r"www\.example\.org\. \d+ IN A 192\.0\.2\.80",
            r"www\.example\.org\. \d+ IN A 192\.0\.2\.81",
        ),
        like="dig www.example.org",
    ),
    Step(
        "Who takes mail for it? Asked over TCP this time.",
        "kdns query example.org. MX --tcp",
        (r"IN MX 10 mail\.example\.org\.$", r"over tcp"),
    ),
    Step(
        "The same objects through the API, with a stock kubectl.",
        "kubectl get services",
        (
            r"^NAME +TYPE +CLUSTER-IP +EXTERNAL-IP +PORT\(S\) +AGE$",
            r"^myservice +ClusterIP +{service} +<none> +8080/TCP ",
            r"^node-port +NodePort +10\.\S+ +<none> +80:30080/TCP ",
            r"^load-bal +LoadBalancer +10\.\S+ +203\.0\.113\.\d+ +80:30088/TCP ",
            r"^google-svc +ExternalName +<none> +google\.com ",
        ),
    ),
    Step(
        "Something new, as one makes it by hand: three pods ...",
        "kubectl create deployment hello --image=hello:1 --replicas=3",
        (r"^deployment\.apps/hello created$",),
    ),
    Step(
        "... and a Service in front of them.",
        "kubectl expose deployment hello --port=80 --target-port=8080",
        (r"^service/hello exposed$",),
    ),
    Step(
        "What kubectl says of it.",
        "kubectl describe service hello",
        (r"^Selector: +app=hello$", r"^Endpoints: +(10\.244\.\d+\.\d+:8080,?){3}$"),
    ),
    Step(
        "Its name is there.",
        "kdns query hello --search default --short",
        (r"^10\.\d+\.\d+\.\d+$",),
        needs="kubectl",
    ),
    Step(
        "It goes ...",
        "kubectl delete service/hello deployment/hello",
        (r'^service "hello" deleted', r'^deployment\.apps "hello" deleted'),
    ),
    Step(
        "... and its name with it.",
        "kdns query hello.default.svc.cluster.local.",
        (r"status: NXDOMAIN",),
        code=1,
    ),
    Step(
        "How a node forwards what is sent to Service node-port: its rules, as kube-proxy"
        " writes them, from the same API.",
        f"{RULES} | grep default/node-port",
        (
            r"^-A KUBE-NODEPORTS .* --dport 30080 -j KUBE-EXT-\w+$",
            r"^-A KUBE-SERVICES -d 10\.\d+\.\d+\.\d+/32 .* --dport 80 -j KUBE-SVC-\w+$",
            r"--probability 0\.5\d* -j KUBE-SEP-\w+$",
            r"-j DNAT --to-destination 10\.244\.\d+\.\d+:80$",
        ),
        like="iptables-save | grep default/node-port",
    ),
    Step(
        "A packet from outside to NodePort 30080 of that node, rule by rule.",
        f"{RULES} | python examples/follow.py 203.0.113.7 192.0.2.1:30080",
        (
            r"^nat KUBE-NODEPORTS rule \d+: default/node-port -> KUBE-EXT-\w+$",
            r"^nat KUBE-POSTROUTING rule \d+: .*: MASQUERADE$",
            r"^(=> DNAT to 10\.244\.\d+\.\d+:80 \(50 %\), masqueraded\n?){2}",
        ),
    ),
    Step(
        "A packet from a pod to myservice, at the address of the first answer above. The pod's"
        " own address is kept.",
        f"{RULES} | python examples/follow.py 10.244.1.5 {{service}}:8080",
        (
            r"^nat KUBE-SERVICES rule \d+: default/myservice:http cluster IP -> KUBE-SVC-\w+$",
            r"^(=> DNAT to 10\.244\.\d+\.\d+:80 \(50 %\), source kept\n?){2}",
        ),
    ),
    Step(
        "Real connections through a real kernel, to a Service of every kind, in a network"
        " namespace of its own. Which pod answered how often?",
        "python examples/real_packets.py",
        (
            r"^default/node-port node port 192\.168\.77\.1:30080: 10\.244\.|^no real packets: ",
            r"^default/load-bal loadbalancer IP 198\.51\.100\.88:80: 10\.244\.|needs root",
        ),
    ),
)


class Failed(Exception):
    """The walk-through cannot go on; the text says why."""


def main() -> int:
    """Run the walk-through; return the exit code."""
    try:
        return walk_through(free_ports(2))
    except Failed as e:
        print(f"walkthrough: {e}", file=sys.stderr)
        return 1


def walk_through(ports: list[int]) -> int:
    """Start kdns, ask, stop it. Raises Failed if it does not serve."""
    environ = os.environ | {
        "KDNS_DEMO_PORT": str(ports[0]),
        "KDNS_DEMO_UPSTREAM": str(ports[1]),
        "KDNS_QUERY_SERVER": "127.0.0.1",
        "KDNS_QUERY_PORT": str(ports[0]),
    }
    words = ["up", *(w for path in MANIFESTS for w in ("-f", path)), "--corefile", COREFILE,
             "--api-port", "0"]  # fmt: skip
    print(f"$ KDNS_DEMO_PORT={ports[0]} KDNS_DEMO_UPSTREAM={ports[1]} kdns {shlex.join(words)}")
    steps = [step for step in STEPS if KUBECTL or "kubectl" not in f"{step.needs} {step.command}"]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
        ready = Path(folder, "ready")
        server = subprocess.Popen(
            [*OURS["kdns"], *words, "--ready-file", str(ready)],
            cwd=PROJECT, env=environ, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            environ["KUBECONFIG"] = wait_ready(server, ready)["kubeconfig"]
            environ["HOME"] = folder  # kubectl's cache
            print(written(log))
            print(f"$ export KDNS_QUERY_SERVER=127.0.0.1 KDNS_QUERY_PORT={ports[0]}")
            print(f"$ export KUBECONFIG={environ['KUBECONFIG']}\n")
            wrong = ask_all(steps, environ)
        except Failed as e:
            raise Failed(f"{e}\n{written(log)}") from None
        finally:
            stop(server)
    if server.returncode != 0:
        print(f"walkthrough: kdns left with {server.returncode}", file=sys.stderr)
        return 1
    if wrong:
        print(f"walkthrough: {wrong} of {len(steps)} answers are not the expected ones")
        return 1
    if len(steps) < len(STEPS):
        print(f"There is no kubectl here: {len(STEPS) - len(steps)} steps were left out.")
    print(f"All {len(steps)} answers are the expected ones.")
    return 0


def free_ports(count: int) -> list[int]:
    """Return ports of 127.0.0.1 that are free over UDP and TCP just now.

    Below those that the kernel hands out by itself, so that nobody else is given them
    between this look and the server's start.
    """
    ports: list[int] = []
    for port in random.sample(PORTS, 200):
        with (
            socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tcp,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        ):
            try:
                tcp.bind(("127.0.0.1", port))
                udp.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise Failed("found no free port on 127.0.0.1")


def wait_ready(process: subprocess.Popen[bytes], ready: Path) -> dict[str, str]:
    """Wait for the file that says where everything is; return what it says."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if ready.exists():
            found: dict[str, str] = json.loads(ready.read_text())
            return found
        if process.poll() is not None:
            raise Failed(f"kdns ended with {process.returncode} instead of serving:")
        time.sleep(0.02)
    raise Failed(f"kdns was not ready after {START_SECONDS:g} s")


def ask_all(steps: Sequence[Step], environ: dict[str, str]) -> int:
    """Ask every question, print questions and answers; return how many answers are wrong."""
    wrong = 0
    service = ""
    for number, step in enumerate(steps, 1):
        print(f"# {number}. {step.why}")
        if step.like:
            print(f"#    (as with: {step.like})")
        command = step.command.replace("{service}", service)
        print(f"$ {command}")
        output, code = run(command, environ)
        print(output)
        if not service:
            found = re.search(r" IN A (\S+)$", output, re.MULTILINE)
            service = found[1] if found else "no address was found"
        patterns = [p.replace("{service}", re.escape(service)) for p in step.expect]
        missing = [p for p in patterns if not re.search(p, output, re.MULTILINE)]
        for pattern in missing:
            print(f"walkthrough: this answer should have had: {pattern}")
        if code != step.code:
            print(f"walkthrough: left with {code}, should have been {step.code}")
        if missing or code != step.code:
            wrong += 1
    return wrong


def run(command: str, environ: dict[str, str]) -> tuple[str, int]:
    """Run programs, each with the output of the one before as its input; return what the last
    one printed, and its exit code."""
    output, code = "", 0
    for part in command.split(" | "):
        name, *words = shlex.split(part.replace("$KUBECONFIG", environ["KUBECONFIG"]))
        program = OURS.get(name, (name,))
        done = subprocess.run(
            [*program, *words], cwd=PROJECT, env=environ, capture_output=True, input=output,
            text=True, timeout=RUN_SECONDS, check=False,
        )  # fmt: skip
        output, code = done.stdout + done.stderr, done.returncode
    return output, code


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server as Kubernetes does: SIGTERM first."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def written(log: IO[str]) -> str:
    """Return what the server has written."""
    log.seek(0)
    return log.read()


if __name__ == "__main__":
    sys.exit(main())
