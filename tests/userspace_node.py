"""A process that forwards in userspace mode in a namespace of netcluster.py, and its remote
control.

    node = UserspaceNode(cluster)
    node.sync(tables)

The process is a real one, with its own event loop and sockets; what it is told are tables, as the
agent would compile them.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from kdns.kernel.programs import find_variants
from kdns.kernel.userspace import UserspaceDataplane, UserspaceProxy
from kdns.metrics import Metrics
from kdns.proxy.options import Family, Options
from kdns.proxy.table import ForwardingTable
from kdns.registry.objects import Key

if TYPE_CHECKING:
    from netcluster import NetCluster

ROOT = Path(__file__).parents[1]
_LENGTH = struct.Struct("=I")


class UserspaceNode:
    """The process in the cluster's node, from here."""

    def __init__(self, cluster: NetCluster, variant: str = "nft") -> None:
        self.variant = variant
        prefix = cluster.enter("node")
        self.process = subprocess.Popen(
            [*prefix, sys.executable, str(Path(__file__))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def begin(self, options: Mapping[Family, Options], addresses: Mapping[Family, str]) -> None:
        """Forward these families with these options; what was before of them is cleaned up."""
        self.call("begin", self.variant, dict(options), dict(addresses))

    def sync(
        self,
        tables: Mapping[Family, ForwardingTable],
        changed: Collection[Key] | None = None,
        full: bool = False,
    ) -> None:
        """changed -- None: all, as at the start"""
        self.call("sync", dict(tables), changed, full or changed is None)

    def verify(self) -> bool:
        return bool(self.call("verify"))

    def cleanup(self) -> None:
        self.call("cleanup")

    def metric(self, name: str, *labels: str) -> float:
        return float(self.call("metric", name, labels))

    def call(self, *command: Any) -> Any:
        """Raises RuntimeError with what went wrong there."""
        assert self.process.stdin is not None and self.process.stdout is not None
        _write(self.process.stdin, command)
        good, result = _read(self.process.stdout)
        if not good:
            raise RuntimeError(result)
        return result

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def _write(file: BinaryIO | Any, value: Any) -> None:
    octets = pickle.dumps(value)
    file.write(_LENGTH.pack(len(octets)) + octets)
    file.flush()


def _read(file: BinaryIO | Any) -> Any:
    head = file.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError("the other side has ended")
    return pickle.loads(file.read(*_LENGTH.unpack(head)))


class _Process:
    """What runs in the namespace."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.proxy = UserspaceProxy(self.metrics)
        self.planes: dict[Family, UserspaceDataplane] = {}

    async def begin(
        self, variant: str, options: dict[Family, Options], addresses: dict[Family, str]
    ) -> None:
        for family, mine in options.items():
            await self._end(family)
            programs = (await find_variants(family))[variant]  # type: ignore[index]
            self.planes[family] = UserspaceDataplane(
                programs, mine, self.metrics, proxy=self.proxy, address=addresses[family]
            )

    async def sync(
        self,
        tables: dict[Family, ForwardingTable],
        changed: Collection[Key] | None,
        full: bool,
    ) -> None:
        for family, table in tables.items():
            keys = table.services.keys() if changed is None else changed
            await self.planes[family].sync(table, keys, full)

    async def verify(self) -> bool:
        return all([await plane.verify() for plane in self.planes.values()])

    async def cleanup(self) -> None:
        for family in list(self.planes):
            await self._end(family)

    async def _end(self, family: Family) -> None:
        plane = self.planes.pop(family, None)
        if plane is not None:
            await plane.cleanup()
            plane.close()

    async def metric(self, name: str, labels: tuple[str, ...]) -> float:
        return self.metrics.value(name, *labels)


async def _serve() -> None:
    process = _Process()
    while True:
        try:
            name, *arguments = await asyncio.to_thread(_read, sys.stdin.buffer)
        except EOFError:
            break
        answer: tuple[bool, Any]
        try:
            answer = True, await getattr(process, name)(*arguments)
        except Exception as e:
            answer = False, f"{type(e).__name__}: {e}"
        _write(sys.stdout.buffer, answer)
    for plane in process.planes.values():
        plane.close()
    process.proxy.close()


if __name__ == "__main__":
    asyncio.run(_serve())
