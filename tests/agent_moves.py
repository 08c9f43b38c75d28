"""Run in a network namespace by test_gate_traffic.py: an agent that has its registry from one
pipeline, and then from another one. Prints the names in the rules before and after, as JSON."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess

from objects import endpoint, service, slice_of

from kdns.agent import Agent
from kdns.metrics import Metrics
from kdns.pipeline import Pipeline
from kdns.proxy.flags import parse_flags, settle
from kdns.registry.gate import Gate
from kdns.registry.objects import ENDPOINT_SLICE, SERVICE
from kdns.registry.spec import KubeSpec
from kdns.registry.store import Store

FLAGS = [
    "--proxy-mode=iptables", "--cluster-cidr=10.244.0.0/16", "--hostname-override=node1",
    "--healthz-bind-address=", "--metrics-bind-address=", "--conntrack-max-per-core=0",
    "--conntrack-min=0", "--conntrack-tcp-timeout-established=0s",
    "--conntrack-tcp-timeout-close-wait=0s", "--oom-score-adj=0",
]  # fmt: skip
PATIENCE = 30.0


def pipeline(*names: str) -> Pipeline:
    made = Pipeline(Store((SERVICE, ENDPOINT_SLICE)), lambda deps: None, gate=Gate(60.0, Metrics()))
    made.replace(SERVICE, [service(name, ip=f"10.96.0.{n}") for name, n in map(numbered, names)])
    made.replace(
        ENDPOINT_SLICE,
        [slice_of(name, endpoint(f"10.244.0.{n}")) for name, n in map(numbered, names)],
    )
    made.mark_synced(SERVICE)
    made.mark_synced(ENDPOINT_SLICE)
    made.publish()
    return made


def numbered(name: str) -> tuple[str, int]:
    return name, int(name.removeprefix("s"))


async def written(one: Pipeline) -> list[str]:
    """Wait until the kernel has what a pipeline has; return whose rules are there."""
    async with asyncio.timeout(PATIENCE):
        while one.revisions().get("kernel_ipv4", 0) < one.registry.revision:
            await asyncio.sleep(0.01)
    saved = subprocess.run(
        ["iptables-save", "-t", "nat"], capture_output=True, text=True, check=True
    )
    return sorted(set(re.findall(r'"default/(s\d+):', saved.stdout)))


async def main() -> None:
    first, second = pipeline("s1", "s2"), pipeline("s2", "s3")
    config = settle(parse_flags(FLAGS), None).config
    agent = Agent(config, KubeSpec(), "node1", pipeline=first)
    running = asyncio.create_task(agent.run())
    found = {"before": await written(first)}
    agent.move(second)
    found["after"] = await written(second)
    second.apply(SERVICE, "DELETED", service("s2", ip="10.96.0.2"))
    first.apply(SERVICE, "DELETED", service("s1", ip="10.96.0.1"))  # nobody's any more
    first.publish()
    second.publish()
    found["later"] = await written(second)
    agent.stop()
    await running
    print(json.dumps(found))


asyncio.run(main())
