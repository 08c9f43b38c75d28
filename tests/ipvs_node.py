"""kdns' ipvs dataplanes at work in the node of a netcluster.py.

They act in the network namespace of their thread: here one that moves into the node's, with an
event loop of its own.
"""

from __future__ import annotations

import asyncio
import ctypes
import threading
from collections.abc import Collection, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
from netcluster import IN_MACHINE, NetCluster

from kdns.errors import ApplyError
from kdns.kernel.ipvs import IpvsDataplane, clean_up, find_ipvs
from kdns.kernel.programs import Programs, find_programs
from kdns.proxy.ipvs import IpvsSettings
from kdns.proxy.options import Family, Options
from kdns.proxy.table import ForwardingTable
from kdns.registry.objects import Key

T = TypeVar("T")
PATIENCE = 120.0


class IpvsNode:
    """Both families' dataplanes; a context manager."""

    def __init__(self, cluster: NetCluster) -> None:
        self.cluster = cluster
        self.settings = IpvsSettings()
        self.programs: dict[Family, Programs] = {}
        self.planes: dict[Family, IpvsDataplane] = {}
        self.tables: dict[Family, ForwardingTable] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._live, daemon=True)

    def __enter__(self) -> IpvsNode:
        self._thread.start()
        self.programs = dict(self.call(find_programs()).programs)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the node's namespace; return what it returns."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE)

    def probe(self, scheduler: str = "rr") -> None:
        self.call(find_ipvs(self.programs, scheduler))

    def install(self, table: ForwardingTable, options: Options) -> None:
        """Program the node as a proxy does that starts over what an earlier one left."""
        plane = IpvsDataplane(self.programs[options.family], options, self.settings)
        self.planes[options.family] = plane
        self.tables[options.family] = table
        self.call(plane.sync(table, tuple(table.services), True))

    def restart(self, family: Family, options: Options) -> None:
        """Start anew over what is there."""
        plane = IpvsDataplane(self.programs[family], options, self.settings)
        self.planes[family] = plane
        self.call(plane.sync(self.tables[family], (), True))

    def follow(self, family: Family, table: ForwardingTable, changed: Collection[Key]) -> None:
        """Do what a running proxy does."""
        self.tables[family] = table
        self.call(self.planes[family].sync(table, changed, False))

    def sync_fully(self) -> None:
        for family, plane in self.planes.items():
            self.call(plane.sync(self.tables[family], (), True))

    def verify(self, family: Family) -> bool:
        return self.call(self.planes[family].verify())

    def forget(self, family: Family) -> None:
        if family in self.planes:
            self.call(self.planes.pop(family).cleanup())

    def clear(self) -> None:
        self.call(clean_up())
        self.planes.clear()

    def held(self, family: Family) -> str:
        """Return all that the kernel holds, as the programs print it."""
        programs = ("iptables-save" if family == 4 else "ip6tables-save",)
        parts = [self.cluster.run("node", one) for one in programs]
        parts.append(self.cluster.run("node", "ipset", "save"))
        parts.append(self.cluster.run("node", "cat", "/proc/net/ip_vs"))
        parts.append(self.cluster.run("node", "ip", "addr"))
        return "".join(parts)

    def _live(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/proc/{self.cluster.pids['node']}/ns/net") as namespace:
            if libc.setns(namespace.fileno(), 0) != 0:
                raise OSError(ctypes.get_errno(), "setns")
        self._loop.run_forever()


@contextmanager
def node_or_skip(cluster: NetCluster) -> Iterator[IpvsNode]:
    """Yield a node that can do IPVS. Where there can be none the test is skipped, but in the
    virtual machine that is made for it, where it fails."""
    with IpvsNode(cluster) as node:
        try:
            node.probe()
        except ApplyError as error:
            if IN_MACHINE:
                raise
            pytest.skip(f"no IPVS in this kernel, see `make test-ipvs`: {error}")
        yield node
