"""Let a real kernel forward real connections by the rules of examples/, in its own namespace.

    python examples/real_packets.py

Makes a network namespace (as root, or in a user namespace where the system allows those),
gives it the addresses of the node and of the pods, lets `kdns proxy --once` write its rules
there, and connects to every kind of Service. Each pod answers with its own address. Nothing
outside the namespace is touched, and it goes when this program ends. Where no namespace can
be had, or no iptables, it says so and leaves with 0; with 1 only if a connection goes astray.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
INSIDE = "--inside"
NODE = "192.168.77.1"
HTTP = 80
CONNECTIONS = 12  # to each address
SECONDS = 5.0
SKIPPED = 3  # exit status of the inner program where something it needs is not there
KDNS = (sys.executable, "-m", "kdns")
# The namespace has no probes to answer, and the node's conntrack is none of its business.
PROXY = (
    "proxy --once -f examples --hostname-override node1 --cluster-cidr 10.244.0.0/16"
    " --healthz-bind-address= --metrics-bind-address= --conntrack-max-per-core 0 --oom-score-adj 0"
).split()


def main() -> int:
    """Start this program again in a namespace; return the exit code."""
    for program in ("unshare", "ip"):
        if shutil.which(program) is None:
            return skipped(f"the program {program} is not installed")
    flags = ["-n"] if os.geteuid() == 0 else ["-Urn"]
    inner = ["unshare", *flags, sys.executable, __file__, INSIDE]
    done = subprocess.run(inner, cwd=PROJECT, check=False, stderr=subprocess.PIPE, text=True)
    if done.returncode == SKIPPED or done.stderr.startswith("unshare:"):
        return skipped(done.stderr.strip() or "no network namespace can be made")
    sys.stderr.write(done.stderr)
    return done.returncode


def skipped(why: str) -> int:
    """Say why there is nothing to see."""
    print(f"no real packets: {why}")
    print("(this needs root, or user namespaces, and iptables; the rules above need neither)")
    return 0


def inside() -> int:
    """Do it all, in the namespace; return the exit code."""
    table = said_by([*KDNS, "dump", "table", "-f", "examples"])
    pods = sorted(set(re.findall(rf"^ +(\S+):{HTTP}$", table, re.MULTILINE)))
    ip("link set lo up")
    for address in (NODE, *pods):
        ip(f"address add {address}/32 dev lo")
    ip("route add default dev lo")
    for pod in pods:
        serve(pod)
    written = subprocess.run([*KDNS, *PROXY], capture_output=True, text=True, check=False)
    if written.returncode != 0:
        print((written.stdout + written.stderr).strip().splitlines()[-1], file=sys.stderr)
        return SKIPPED
    wrong = 0
    for what, address, port in frontends(table):
        answers = Counter(answer_of(address, port) for _ in range(CONNECTIONS))
        told = ", ".join(f"{who} ({count})" for who, count in sorted(answers.items()))
        print(f"{what} {address}:{port}: {told}")
        wrong += not set(answers) <= set(pods)
    return 1 if wrong else 0


def frontends(table: str) -> list[tuple[str, str, int]]:
    """Return (what, address, port) of the Services whose pods serve here."""
    line = re.compile(r"^(default/\S+ [\w ]+) (\S+):(\d+)/tcp forward$", re.MULTILINE)
    found = []
    for what, address, port in line.findall(table):
        found.append((what, NODE if address == "*" else address, int(port)))
        if address == "*":
            found.append((what, "127.0.0.1", int(port)))
    return found


def serve(pod: str) -> None:
    """Answer every connection to a pod with the pod's address."""
    listener = socket.create_server((pod, HTTP))

    def answer() -> None:
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(pod.encode())

    threading.Thread(target=answer, daemon=True).start()


def answer_of(address: str, port: int) -> str:
    """Connect; return the answer, or how it failed."""
    try:
        with socket.create_connection((address, port), SECONDS) as connection:
            return connection.recv(100).decode()
    except OSError as e:
        return e.strerror or str(e)


def ip(command: str) -> None:
    """Run the program ip."""
    said_by(["ip", *command.split()])


def said_by(argv: list[str]) -> str:
    """Return a program's output; its failure ends us."""
    return subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout


def run_inside() -> int:
    """As inside(), but a program that is missing or fails is told in one line."""
    try:
        return inside()
    except (OSError, subprocess.CalledProcessError) as e:
        print(e, file=sys.stderr)
        return SKIPPED


if __name__ == "__main__":
    sys.exit(run_inside() if sys.argv[1:] == [INSIDE] else main())
