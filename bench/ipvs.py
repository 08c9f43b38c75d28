"""The ipvs mode at many Services: its stages, each beside the program that does the same.

Few kernels have IPVS. In the machine of .ci/ipvs_vm.py all is measured, but its processor is
emulated there; where IPVS is missing what needs none of it is: the same code over the same
Services, so that the two runs one after the other tell how much slower that machine is. All of
it happens in a network namespace of its own. Needs root, ip, ipset and iptables.

    python bench/ipvs.py [--services N]                     on this kernel
    python .ci/ipvs_vm.py .venv/bin/python bench/ipvs.py [...]            in the machine
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kdns.errors import ApplyError  # noqa: E402
from kdns.kernel import ipvs_netlink  # noqa: E402
from kdns.kernel.ipset import Ipset, plan_sets  # noqa: E402
from kdns.kernel.ipvs import IpvsDataplane, find_ipvs  # noqa: E402
from kdns.kernel.programs import Programs, find_programs  # noqa: E402
from kdns.proxy.ipvs import IpvsRules, compile_ipvs, render_servers, render_sets  # noqa: E402
from kdns.proxy.options import Family, Options  # noqa: E402
from kdns.proxy.table import Forwarding, ForwardingTable  # noqa: E402
from kdns.registry.endpoints import Endpoint  # noqa: E402
from kdns.registry.objects import Key  # noqa: E402

NODE = "192.168.77.1"
FAMILIES: tuple[Family, ...] = (4,)
SERVICES = 10_000
GOAL = 3.0  # seconds, for 10,000 Services of two endpoints
TURNS = 2_000_000


def table_of(services: int, revision: int = 1) -> ForwardingTable:
    """ClusterIPs with an endpoint here and one elsewhere; the last has another one here in each
    revision."""
    found: dict[Key, tuple[Forwarding, ...]] = {}
    for number in range(services):
        key = ("default", f"s{number}")
        high, low = number >> 8, number & 255
        here = Endpoint(f"10.244.{high}.{low}", 8080, local=True)
        if number == services - 1:
            here = Endpoint(f"10.245.0.{revision}", 8080, local=True)
        both = (here, Endpoint(f"10.246.{high}.{low}", 8080))
        found[key] = (
            Forwarding(
                key, f"default/s{number}:http", "tcp", f"10.97.{high}.{low}", 80,
                cluster=both, local=both[:1], has_endpoints=True,
            ),
        )  # fmt: skip
    return ForwardingTable(4, revision, found, 2 * services)


# --- measuring --------------------------------------------------------------------------------


@dataclass
class Took:
    """One stage. seconds -- by the clock; user, system -- of the processor, with the programs
    that were run"""

    stage: str
    seconds: float
    user: float
    system: float


class Stages:
    def __init__(self) -> None:
        self.all: list[Took] = []

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        before, began = _spent(), time.monotonic()
        yield
        seconds, after = time.monotonic() - began, _spent()
        self.all.append(Took(stage, seconds, after[0] - before[0], after[1] - before[1]))
        print(self.line(self.all[-1]), flush=True)

    @staticmethod
    def line(one: Took) -> str:
        return (
            f"  {one.stage:<58} {one.seconds:8.3f} s"
            f"  (user {one.user:.3f}, system {one.system:.3f})"
        )


def _spent() -> tuple[float, float]:
    """Return user and system seconds of this process and of the ended programs it ran."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime for one in both), sum(one.ru_stime for one in both)


def run(*argv: str, text: str = "") -> None:
    # From a file, as by hand: a pipe would be measured too.
    with tempfile.TemporaryFile("w+") as file:
        file.write(text)
        file.seek(0)
        done = subprocess.run(argv, stdin=file, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"bench: {' '.join(argv)}: {done.stderr}")


# --- without IPVS -----------------------------------------------------------------------------


async def measure_common(services: int, stages: Stages, name: str) -> None:
    """What needs no IPVS. name -- of the interface that gets the addresses"""
    with stages(f"python: {TURNS:,} turns of an empty loop"):
        for _ in range(TURNS):
            pass
    table, options = table_of(services), Options(4)
    with stages("python: what is wanted of the table"):
        rules = compile_ipvs(table, options)
    with stages("python: a message for each virtual and real server"):
        count = sum(len(one) > 0 for one in messages(rules))
    assert count == 3 * services
    index = socket.if_nametoindex(name)
    addresses = sorted(rules.addresses)
    with stages("addresses bound by netlink"):
        ipvs_netlink.change_addresses(4, index, addresses, ())
    with stages("addresses read"):
        ipvs_netlink.addresses_by_place(4)
    with stages("addresses taken away by netlink"):
        ipvs_netlink.change_addresses(4, index, (), addresses)
    batch = "".join(f"addr add {one}/32 dev {name}\n" for one in addresses)
    with stages("the same by `ip -batch`"):
        run("ip", "-batch", "-", text=batch)
    ipvs_netlink.change_addresses(4, index, (), addresses)
    ipset = Ipset()
    plan = plan_sets(rules.members, {}, 4)
    with stages("sets made and filled by `ipset restore`"):
        await ipset.restore("".join(plan.before))
    with stages("sets read by `ipset save`"):
        await ipset.held(4)
    run("ipset", "destroy")
    text = render_sets(rules)
    with stages("the same text by `ipset restore` alone"):
        run("ipset", "restore", text=text)
    run("ipset", "destroy")


def messages(rules: IpvsRules) -> Iterator[bytes]:
    for at, virtual in rules.servers.items():
        yield ipvs_netlink.server_settings(at, virtual)
        for real in virtual.reals:
            yield ipvs_netlink.real_server(at, real)


# --- with it ----------------------------------------------------------------------------------


@contextmanager
def split(stages: Stages) -> Iterator[None]:
    """Time what a sync calls, too."""
    inner: list[tuple[object, str, str]] = [
        (ipvs_netlink, "change_addresses", "    addresses"),
        (ipvs_netlink, "addresses_by_place", "    addresses read"),
        (ipvs_netlink.Ipvs, "tell_all", "    virtual and real servers told"),
        (IpvsDataplane, "_tell", "    of them and what to tell"),
        (IpvsDataplane, "_render", "    python: what is wanted of the table"),
        (Ipset, "restore", "    sets written"),
        (Ipset, "held", "    sets read"),
        (Programs, "restore", "    rules written"),
        (Programs, "save", "    rules read"),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in inner]
    for owner, name, stage in inner:
        setattr(owner, name, _timed(getattr(owner, name), stage, stages))
    try:
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def _timed(function: Callable[..., Any], stage: str, stages: Stages) -> Callable[..., Any]:
    if asyncio.iscoroutinefunction(function):

        async def wait(*arguments: Any, **more: Any) -> Any:
            with stages(stage):
                return await function(*arguments, **more)

        return wait

    def call(*arguments: Any, **more: Any) -> Any:
        with stages(stage):
            return function(*arguments, **more)

    return call


async def measure_ipvs(services: int, stages: Stages) -> None:
    """Load, change, verify, clean up; then ipvsadm over the same servers."""
    programs = (await find_programs(FAMILIES)).programs
    await find_ipvs(programs)
    plane = IpvsDataplane(programs[4], Options(4))
    table = table_of(services)

    async def timed(stage: str, work: Awaitable[Any]) -> Any:
        with stages(stage):
            return await work

    with split(stages):
        await timed("ipvs: loaded", plane.sync(table, (), True))
    assert await timed("ipvs: verified", plane.verify())
    assert await timed("ipvs: verified, nothing has changed", plane.verify())
    changed = table_of(services, 2)
    await timed(
        "ipvs: one endpoint changed", plane.sync(changed, list(changed.services)[-1:], False)
    )
    with split(stages):
        assert await timed("ipvs: verified after it", plane.verify())
    await timed("ipvs: once more in full", plane.sync(changed, (), True))
    await timed("ipvs: cleaned up", plane.cleanup())
    text = render_servers(compile_ipvs(table, Options(4)))
    # The addresses must be there for neither.
    with stages("peer: the same servers by `ipvsadm --restore`"):
        run("ipvsadm", "--restore", text=text)
    assert len(ipvs_netlink.held_servers(4)) == services
    with stages("peer: `ipvsadm --save -n`"):
        run("ipvsadm", "--save", "-n")
    with stages("peer: `ipvsadm --clear`"):
        run("ipvsadm", "--clear")


def has_ipvs() -> str:
    """Return why there is no IPVS; "": there is."""
    try:
        with ipvs_netlink.Ipvs():
            return ""
    except ApplyError as error:
        return str(error)


async def measure(services: int) -> Stages:
    stages = Stages()
    without = has_ipvs()
    print(f"{services:,} Services of two endpoints on Linux {os.uname().release}", flush=True)
    await measure_common(services, stages, "lo")
    if without:
        print(f"  no IPVS here: {without}")
    else:
        await measure_ipvs(services, stages)
    return stages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--services", type=int, default=SERVICES)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.inside:
        command = ["unshare", "-m", "-n", sys.executable, __file__, "--inside"]
        sys.exit(
            subprocess.run([*command, "--services", str(args.services)], check=False).returncode
        )
    subprocess.run(["mount", "-t", "tmpfs", "kdns-bench", "/run"], check=True)
    for line in ("link set lo up", f"addr add {NODE}/32 dev lo"):
        subprocess.run(["ip", *line.split()], check=True)
    asyncio.run(measure(args.services))


if __name__ == "__main__":
    main()
