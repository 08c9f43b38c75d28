"""The modes of forwarding by their names: what each needs of this host, and what others left.

Decides which dataplane a mode has and what there is to clean when the mode changes. What a mode
writes is its own module's, imported when it is used; what is forwarded is proxy/table.py's.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO, Final, TypeAlias

from kdns.errors import ApplyError
from kdns.kernel.programs import Programs, find_programs, find_variants, leave_out_families
from kdns.kernel.sync import Dataplane
from kdns.metrics import Metrics
from kdns.proxy.config import Mode, ProxyConfig
from kdns.proxy.flags import UDP_IDLE
from kdns.proxy.options import Family, Options

if TYPE_CHECKING:
    from kdns.proxy.userspace import PortMap

# kube-proxy's, for distributions that brought what is needed to an older kernel.
ANY_KERNEL: Final = "KUBE_PROXY_NFTABLES_SKIP_KERNEL_VERSION_CHECK"

# As kube-proxy says of it since 1.35.
DEPRECATED: Final = "the ipvs mode is deprecated in Kubernetes: the nftables mode does as well"

# Makes one family's dataplane.
Maker: TypeAlias = Callable[[Options, Metrics], Dataplane]
Cleaner: TypeAlias = Callable[[Collection[Family]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Way:
    """A mode that can be used on this host.

    told     -- for each family that can be forwarded: what it is done with
    makers   -- for the same families
    warnings -- what an operator should know
    random_fully -- families whose masquerading can take ports at random (iptables 1.6.2)
    close    -- ends what all families share
    places   -- where Services listen, where somebody must be told
    writes   -- the kernel is told: then what other modes left there is in the way
    """

    told: Mapping[Family, str]
    makers: Mapping[Family, Maker]
    warnings: tuple[str, ...] = ()
    random_fully: frozenset[Family] = frozenset({4, 6})
    close: Callable[[], None] = field(default=lambda: None)
    places: Callable[[], Sequence[str]] = field(default=lambda: ())
    writes: bool = True


@dataclass(frozen=True, slots=True)
class Relaying:
    """What is said of the userspace mode alone.

    portmap  -- where each Service port listens, then without any rules; None: rules lead there,
                or, with no right to write any, each Service has a loopback address
    udp_idle -- seconds
    """

    portmap: PortMap | None = None
    udp_idle: float = UDP_IDLE
    may_write: bool = True


async def find_way(
    config: ProxyConfig,
    families: Collection[Family],
    addresses: Mapping[Family, str],
    metrics: Metrics,
    relaying: Relaying = Relaying(),
) -> Way:
    """Return how to forward in the mode that is wanted. Raises ApplyError that says what this
    host lacks.

    addresses -- the node's own, one a family
    """
    match config.mode:
        case "nftables":
            return await _nftables(families)
        case "ipvs":
            return await _ipvs(config, families)
        case "userspace":
            return await _userspace(families, addresses, metrics, relaying)
        case _:
            return await _iptables(families)


async def _iptables(families: Collection[Family]) -> Way:
    from kdns.kernel import iptables

    found = await leave_out_families(await find_programs(families))

    def maker(programs: Programs) -> Maker:
        return lambda options, metrics: iptables.IptablesDataplane(programs, options, metrics)

    return Way(
        {family: f"rules with {programs}" for family, programs in found.programs.items()},
        {family: maker(programs) for family, programs in found.programs.items()},
        found.warnings,
        frozenset(family for family, one in found.programs.items() if one.random_fully),
    )


async def _nftables(families: Collection[Family]) -> Way:
    from kdns.kernel import nftables

    nft = await nftables.find_nft(families=families, any_kernel=bool(os.environ.get(ANY_KERNEL)))
    usable, warnings = await nftables.usable_families(nft, families)
    return Way(
        dict.fromkeys(usable, f"rules with {nft}"),
        dict.fromkeys(
            usable, lambda options, metrics: nftables.NftablesDataplane(nft, options, metrics)
        ),
        warnings,
    )


async def _userspace(
    families: Collection[Family],
    addresses: Mapping[Family, str],
    metrics: Metrics,
    relaying: Relaying,
) -> Way:
    from kdns.kernel import userspace

    rootless = None
    warnings: tuple[str, ...] = ()
    programs: dict[Family, Programs | None] = dict.fromkeys(families)
    if relaying.portmap is not None or not relaying.may_write:
        rootless = userspace.Rootless(relaying.portmap)
        how = "connections through this process, on loopback addresses of their own"
        told = dict.fromkeys(families, how)
    else:
        found = await leave_out_families(await find_programs(families))
        programs, warnings = dict(found.programs), found.warnings
        told = {
            family: f"connections through this process, rules with {one}"
            for family, one in found.programs.items()
        }
    proxy = userspace.UserspaceProxy(metrics, relaying.udp_idle)
    planes: list[userspace.UserspaceDataplane] = []

    def maker(family: Family) -> Maker:
        def make(options: Options, metrics: Metrics) -> Dataplane:
            plane = userspace.UserspaceDataplane(
                programs[family], options, metrics, proxy=proxy, rootless=rootless,
                address=addresses.get(family, ""),
            )  # fmt: skip
            planes.append(plane)
            return plane

        return make

    return Way(
        told,
        {family: maker(family) for family in programs},
        warnings,
        close=proxy.close,
        places=lambda: [str(one) for plane in planes if rootless for one in plane.mappings()],
        writes=rootless is None,
    )


async def _ipvs(config: ProxyConfig, families: Collection[Family]) -> Way:
    from kdns.kernel import ipvs
    from kdns.proxy.ipvs import IpvsSettings

    found = await leave_out_families(await find_programs(families))
    await ipvs.find_ipvs(found.programs, config.ipvs.scheduler)
    wanted = IpvsSettings(
        config.ipvs.scheduler,
        config.ipvs.exclude_cidrs,
        config.ipvs.strict_arp,
        config.ipvs.tcp_timeout,
        config.ipvs.tcp_fin_timeout,
        config.ipvs.udp_timeout,
    )

    def maker(programs: Programs) -> Maker:
        return lambda options, metrics: ipvs.IpvsDataplane(programs, options, wanted, metrics)

    return Way(
        {
            family: f"virtual servers of IPVS (scheduler {config.ipvs.scheduler}), rules with {one}"
            for family, one in found.programs.items()
        },
        {family: maker(programs) for family, programs in found.programs.items()},
        (*found.warnings, DEPRECATED),
        frozenset(family for family, one in found.programs.items() if one.random_fully),
    )


# --- what other modes left ------------------------------------------------------------------


async def _clean_iptables(families: Collection[Family]) -> None:
    from kdns.kernel.iptables import cleanup_all

    await cleanup_all(families)


async def _clean_iptables_alone(families: Collection[Family]) -> None:
    """Leave the chains that the ipvs mode has under the same names."""
    from kdns.kernel.ipvs import clean_up_iptables

    await clean_up_iptables(families)


async def _clean_ipvs(families: Collection[Family]) -> None:
    from kdns.kernel.ipvs import clean_up

    await clean_up(families)


async def _clean_ipvs_alone(families: Collection[Family]) -> None:
    """Leave the chains that the iptables mode has under the same names."""
    from kdns.kernel.ipvs import clean_up

    await clean_up(families, shared=False)


async def _clean_nftables(families: Collection[Family]) -> None:
    from kdns.kernel.nftables import clean_up

    await clean_up(families)


async def _clean_userspace(families: Collection[Family]) -> None:
    from kdns.kernel.userspace import clean_up_all

    await clean_up_all(families)


# Removes all that a mode ever writes, ours and a kube-proxy's; what is not there is no error.
CLEANERS: Final[Mapping[Mode, Cleaner]] = {
    "iptables": _clean_iptables,
    "ipvs": _clean_ipvs,
    "nftables": _clean_nftables,
    "userspace": _clean_userspace,
}


# What only one mode's rules have, in what iptables-save prints.
SIGNS: Final[Mapping[bytes, Mode]] = {
    b":KUBE-SVC-": "iptables",
    b":KUBE-NODEPORTS ": "iptables",
    b":KUBE-PORTALS-": "userspace",
    b":KUBE-LOAD-BALANCER ": "ipvs",
}
IPVS_INTERFACE: Final = "kube-ipvs0"


async def find_leftovers(mode: Mode, families: Collection[Family]) -> frozenset[Mode]:
    """Return the other modes that left something on this node. What cannot be read is taken for
    empty."""
    from kdns.kernel.nftables import find_leftovers as find_tables

    found: set[Mode] = set()
    with suppress(ApplyError):
        if await find_tables(families):
            found.add("nftables")
    with suppress(OSError):
        socket.if_nametoindex(IPVS_INTERFACE)
        found.add("ipvs")
    for family in families:
        for programs in (await find_variants(family)).values():
            with suppress(ApplyError), await programs.save() as lines:
                found |= await asyncio.to_thread(_signs_in, lines)
    return frozenset(found - {mode})


def _signs_in(lines: BinaryIO) -> set[Mode]:
    return {
        mode
        for line in lines
        if line.startswith(b":KUBE-")
        for sign, mode in SIGNS.items()
        if line.startswith(sign)
    }


async def clean_after(
    mode: Mode, left: Collection[Mode], families: Collection[Family]
) -> list[str]:
    """Remove what other modes left, now that `mode` has its rules in place: no connection meets
    a gap. Return what could not be."""
    others = {name: clean for name, clean in CLEANERS.items() if name in left}
    if mode == "iptables" and "ipvs" in others:
        others["ipvs"] = _clean_ipvs_alone
    elif mode == "ipvs" and "iptables" in others:
        others["iptables"] = _clean_iptables_alone
    return await _clean(others, families)


async def clean_all(families: Collection[Family]) -> list[str]:
    """Remove what any mode wrote; return what could not be."""
    return await _clean(CLEANERS, families)


async def _clean(cleaners: Mapping[Mode, Cleaner], families: Collection[Family]) -> list[str]:
    failures = []
    for mode, clean in cleaners.items():
        try:
            await clean(families)
        except ApplyError as e:
            failures.append(f"what the {mode} mode left cannot be removed: {e}")
    return failures
