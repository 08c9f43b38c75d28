"""The ipvs dataplane of one family: what the kernel holds is made what is wanted.

Decides in which order sets, rules, addresses and virtual servers are written, so that a packet
meets no half of them; how a real server leaves while it has connections; and finds what somebody
else changed. What shall be there is proxy/ipvs.py's, netlink is ipvs_netlink.py's, ipsets are
ipset.py's, when to do all this is sync.py's.

A real server that goes gets weight 0, so that no new connection comes to it, and is deleted when
those it has are gone (TCP only: UDP and SCTP are left with nothing to wait for). IPVS forgets
nothing at a restart: what an earlier process left is taken over, be it about to leave or not.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import platform
import re
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

from kdns.errors import ApplyError
from kdns.kernel import ipvs_netlink, sysctl
from kdns.kernel.generation import nft_generation
from kdns.kernel.ipset import HeldSet, Ipset, find_ipset, plan_sets
from kdns.kernel.iptables import (
    FAMILY_LABEL,
    Held,
    find_differences,
    parse_held,
    render_cleanup,
    target_of,
    tokens,
)
from kdns.kernel.ipvs_fingerprint import fingerprint
from kdns.kernel.ipvs_netlink import (
    DEL_DEST,
    DEL_SERVICE,
    NEW_DEST,
    NEW_SERVICE,
    SET_CONFIG,
    SET_DEST,
    SET_SERVICE,
    HeldReal,
    HeldVirtual,
    Ipvs,
    addresses_by_place,
    held_servers,
    real_server,
    server_key,
    server_settings,
    timeouts,
)
from kdns.kernel.netlink import NetlinkError
from kdns.kernel.programs import Programs, find_variants, which
from kdns.kernel.refusals import tell_changed
from kdns.metrics import Cell, Metrics
from kdns.proxy import iptables
from kdns.proxy.iptables import SERVICE_CHAINS, RuleSet
from kdns.proxy.ipvs import (
    INTERFACE,
    JUMPS,
    SETS,
    At,
    Host,
    IpvsRules,
    IpvsSettings,
    Member,
    Real,
    Virtual,
    constant_chains,
    create_line,
    host_view,
    is_excluded,
    set_name,
)
from kdns.proxy.options import Family, Options
from kdns.proxy.table import ForwardingTable
from kdns.registry.objects import Key

log = logging.getLogger("kdns.proxy")

DEFAULTS = IpvsSettings()
# What the probe makes and deletes: an address of documentation (RFC 5737), as kube-proxy does.
PROBE = At("tcp", "198.51.100.0", 20000)
OTHER_MODES = "the modes iptables, nftables and userspace work without"
# Chains that the mode iptables has as well, under the same name.
SHARED_CHAINS = frozenset(
    {"KUBE-SERVICES", "KUBE-POSTROUTING", "KUBE-MARK-MASQ", "KUBE-FORWARD", "KUBE-PROXY-FIREWALL"}
)
# Kernels from 4.1 on, until 5.9 mended it, keep a client waiting a second for a real server that
# is gone if its port was used before (kubernetes#81775, #93297).
REUSE_SLOW = ((4, 1), (5, 9))


class IpvsDataplane:
    """Keeps one family's IPVS. One call at a time: sync.py's loop sees to it.

    Every method raises ApplyError, and acts in the network namespace of the thread that runs the
    event loop, and of its threads.

    programs -- iptables, for the constant rules
    root     -- the folder that holds proc/sys
    """

    def __init__(
        self,
        programs: Programs,
        options: Options,
        settings: IpvsSettings = DEFAULTS,
        metrics: Metrics | None = None,
        root: Path = Path("/"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.programs = programs
        self.family: Family = options.family
        self.settings = settings
        self.draining: dict[tuple[At, Real], float] = {}  # -> since when
        self._options = options
        self._ipset = Ipset(programs.prefix)
        self._rules = IpvsRules(options, settings)
        self._chains = constant_chains(options)
        self._tally = _Tally(metrics or Metrics(), FAMILY_LABEL[options.family])
        self._root = root
        self._clock = clock
        self._room: dict[str, int] = {}  # set, named as for IPv4 -> members it can hold
        self._servers: dict[At, Virtual] = {}  # as last written
        self._rendered = False  # the rules follow the table
        self._known = False  # the kernel holds what the rules say
        self._written = False  # something was written: there is something to verify
        self._exact = True  # this iptables prints rules as we write them
        # At which all was as it should be: of the rules, and of all else.
        self._generation: int | None = None
        self._fingerprint: bytes | None = None

    # --- writing ----------------------------------------------------------------------

    async def sync(self, table: ForwardingTable, changed: Collection[Key], full: bool) -> None:
        """Bring the kernel to `table`, of which `changed` is new since the last call.

        full -- trust nothing that is remembered; so is the first call and one after a failure
        """
        full = full or not self._known
        self._known, self._fingerprint = False, None
        try:
            if full or not await self._write_partial(table, changed):
                await self._write_full(table, changed)
        except ApplyError:
            self._tally.failures.add()
            raise
        self._known = True
        self._rules.touched.clear()
        self._tally.total(self._rules, len(self.draining))

    def _render(
        self, table: ForwardingTable, changed: Collection[Key], host: Host | None = None
    ) -> None:
        known, self._rendered = self._rendered, False
        self._rules.update(table, changed if known else None, host)
        self._rendered = True

    async def _write_full(self, table: ForwardingTable, changed: Collection[Key]) -> None:
        self._written = True
        host, index, bound = await asyncio.to_thread(self._look)
        await asyncio.to_thread(self._render, table, changed, host)
        await asyncio.to_thread(self._set_kernel)
        held = await self._ipset.held(self.family)
        plan = await asyncio.to_thread(plan_sets, self._rules.members, held, self.family)
        for note in plan.notes:
            log.warning("%s: %s", FAMILY_LABEL[self.family], note)
        await self._ipset.restore("".join(plan.before))
        self._room = plan.room
        chains = await self._look_at_chains()
        if chains is not None and _is_led_by_rules(chains):
            # Those of the mode iptables send packets on before IPVS sees any: until it is ready
            # they stay, and nobody meets a gap.
            await asyncio.to_thread(self._write_all_servers, index, bound)
            await self._write_chains(chains)
        else:
            # A VIP without them would lead to whatever listens on this node.
            await self._write_chains(chains)
            await asyncio.to_thread(self._write_all_servers, index, bound)
        await self._ipset.restore("".join(plan.after))

    def _look(self) -> tuple[Host, int, set[str]]:
        """Return this node's addresses, and kube-ipvs0 with what is bound to it."""
        index = ipvs_netlink.find_interface()
        if not index:
            ipvs_netlink.make_interface()
            index = ipvs_netlink.find_interface()
        bound, others = addresses_by_place(self.family)
        return host_view(others, self._options), index, bound

    def _set_kernel(self) -> None:
        """Load IPVS, and set what it and forwarding need (reference 2.1)."""
        with _ipvs() as ipvs:
            seconds = [
                int(one)
                for one in (
                    self.settings.tcp_timeout,
                    self.settings.tcp_fin_timeout,
                    self.settings.udp_timeout,
                )
            ]
            if any(seconds):
                (code,) = ipvs.tell_all([(SET_CONFIG, timeouts(*seconds))])
                if code:
                    raise ApplyError("ipvs", f"cannot set its time-outs: {os.strerror(code)}")
        for name, value in settings_wanted(self.settings.strict_arp, platform.release()):
            sysctl.put(self._root, f"proc/sys/net/ipv4/{name}", value)

    async def _write_partial(self, table: ForwardingTable, changed: Collection[Key]) -> bool:
        """Write what changed; False, and nothing is written, if that is better done in full."""
        await asyncio.to_thread(self._render, table, changed)
        touched, members = self._rules.touched, self._rules.members
        # A set that has become too small is filled anew.
        if any(len(members[name]) > self._room[name] for name in {m.set for m in touched.members}):
            return False
        new, gone = _member_lines(touched.members, members, self.family)
        await self._ipset.restore("".join(new))
        await asyncio.to_thread(self._write_touched)
        await self._ipset.restore("".join(gone))
        return True

    def _write_touched(self) -> None:
        touched, addresses = self._rules.touched, self._rules.addresses
        new = sorted(one for one in touched.addresses if one in addresses)
        gone = sorted(one for one in touched.addresses if one not in addresses)
        index = ipvs_netlink.find_interface()
        if not index:
            raise ApplyError("netlink", f"the interface {INTERFACE} is gone")
        ipvs_netlink.change_addresses(self.family, index, new, ())
        self._tell(touched.servers, self._remembered(touched.servers))
        ipvs_netlink.change_addresses(self.family, index, (), gone)
        if self.draining:
            self.reap()

    def _remembered(self, servers: Iterable[At]) -> dict[At, HeldVirtual]:
        """Return virtual servers as they were last written."""
        found = {}
        for at in servers:
            if (virtual := self._servers.get(at)) is not None:
                # Whether a real server has connections is seen once it gets no more.
                reals = {real: HeldReal(1, 1) for real in virtual.reals}
                found[at] = HeldVirtual(virtual.scheduler, virtual.persistence, reals)
        for at, real in self.draining:
            if at in found:
                found[at].reals[real] = HeldReal(0, 1)
        return found

    def _write_all_servers(self, index: int, bound: set[str]) -> None:
        addresses = self._rules.addresses.keys()
        ipvs_netlink.change_addresses(self.family, index, sorted(addresses - bound), ())
        held = held_servers(self.family)
        self.draining = {
            (at, real): self.draining.get((at, real), self._clock())
            for at, one in held.items()
            for real, state in one.reals.items()
            if state.weight == 0 and at in self._rules.servers
            and real not in self._rules.servers[at].reals
        }  # fmt: skip
        theirs = [at for at in held.keys() - self._rules.servers.keys()
                  if is_excluded(at.address, self.settings.exclude_cidrs)]  # fmt: skip
        for at in theirs:
            del held[at]
        self._servers.clear()
        self._tell(held.keys() | self._rules.servers.keys(), held)
        ipvs_netlink.change_addresses(self.family, index, (), sorted(bound - addresses))
        if self.draining:
            self.reap()

    def _tell(self, servers: Iterable[At], held: Mapping[At, HeldVirtual]) -> None:
        """Make the virtual servers what is wanted, from what is held."""
        orders: list[_Order] = []
        for at in sorted(servers):
            wanted = self._rules.servers.get(at)
            orders += self._orders(at, wanted, held.get(at))
            if wanted is None:
                self._servers.pop(at, None)
            else:
                self._servers[at] = wanted
        if orders:
            with _ipvs() as ipvs:
                _check(ipvs.tell_all(map(_Order.command, orders)), orders)

    def _orders(self, at: At, wanted: Virtual | None, held: HeldVirtual | None) -> Iterator[_Order]:
        if wanted is None:
            if held is not None:
                yield _Order(DEL_SERVICE, at)
            for one in [one for one in self.draining if one[0] == at]:
                del self.draining[one]
            return
        if held is None:
            yield _Order(NEW_SERVICE, at, virtual=wanted)
        elif (held.scheduler, held.persistence) != (wanted.scheduler, wanted.persistence):
            yield _Order(SET_SERVICE, at, virtual=wanted)
        reals = held.reals if held is not None else {}
        for real in wanted.reals:
            state = reals.get(real)
            if state is not None and state.weight == 1:
                continue
            if state is not None:  # it was about to leave
                yield _Order(DEL_DEST, at, real)
                self.draining.pop((at, real), None)
            yield _Order(NEW_DEST, at, real)
        for real, state in reals.items():
            if real in wanted.reals or (state.weight == 0 and (at, real) in self.draining):
                continue
            if at.protocol == "tcp":
                self.draining[at, real] = self._clock()
                yield _Order(SET_DEST, at, real)
            else:
                yield _Order(DEL_DEST, at, real)

    def reap(self) -> None:
        """Delete the real servers that were to leave and have no connection any more."""
        leaving: dict[At, list[Real]] = {}
        for at, real in self.draining:
            leaving.setdefault(at, []).append(real)
        gone: list[tuple[At, Real]] = []
        with _ipvs() as ipvs:
            for at, reals in leaving.items():
                held = ipvs.reals(at)
                for real in reals:
                    state = held.get(real)
                    if state is None:  # somebody else did it
                        del self.draining[at, real]
                    elif not state.flows:
                        gone.append((at, real))
            orders = [_Order(DEL_DEST, *one) for one in gone]
            _check(ipvs.tell_all(map(_Order.command, orders)), orders)
        for one in gone:
            del self.draining[one]
        self._tally.draining.set(len(self.draining))

    async def _look_at_chains(self) -> _HeldChains | None:
        """Return what the kernel has; None if that is what it shall have."""
        with await self.programs.save() as lines:
            if not await asyncio.to_thread(self._chain_differences, lines):
                return None
            lines.seek(0)
            return await asyncio.to_thread(_parse_chains, lines)

    async def _write_chains(self, held: _HeldChains | None) -> None:
        if held is None:
            return
        await self.programs.restore(chains_text(self._chains, held))
        if self._exact:
            with await self.programs.save() as lines:
                self._exact = not self._chain_differences(lines)
            if not self._exact:
                log.info("%s prints rules in its own way: targets are compared", self.programs)

    # --- verifying --------------------------------------------------------------------

    async def verify(self) -> bool:
        """Say whether all is as it was written. What differs is logged. True before the first
        write. Real servers whose last connection has ended are deleted on the way."""
        if not self._written:
            return True
        if self.draining:
            # Without IPVS there is more to be told than that.
            with contextlib.suppress(ApplyError):
                await asyncio.to_thread(self.reap)
        found = [*await self._differences_beside_rules(), *await self._rule_differences()]
        if not found:
            return True
        tell_changed("ipvs", found)
        return False

    async def _differences_beside_rules(self) -> list[str]:
        seen = await asyncio.to_thread(fingerprint, self.family)
        if seen is not None and seen == self._fingerprint:
            return []
        self._fingerprint = None
        found = await asyncio.to_thread(self._server_differences)
        found += await self._set_differences()
        # Only one that held all the while vouches for what was read.
        if not found and seen == await asyncio.to_thread(fingerprint, self.family):
            self._fingerprint = seen
        return found

    async def _rule_differences(self) -> list[str]:
        seen = self._nft_generation()
        if seen is not None and seen == self._generation:
            return []
        self._generation = None
        with await self.programs.save() as lines:
            found = await asyncio.to_thread(self._chain_differences, lines)
        if not found and seen == self._nft_generation():
            self._generation = seen
        return found

    def _nft_generation(self) -> int | None:
        # What runs behind a prefix may be in another namespace.
        mine = self.programs.variant == "nft" and not self.programs.prefix
        return nft_generation() if mine else None

    def _server_differences(self) -> list[str]:
        try:
            held = held_servers(self.family)
        except ApplyError as e:
            return [str(e)]
        bound, others = addresses_by_place(self.family)
        wanted = self._rules.addresses.keys()
        found = [f"{INTERFACE} has no {address}" for address in sorted(wanted - bound)]
        found += [f"{INTERFACE} has {address}" for address in sorted(bound - wanted)]
        if host_view(others, self._options) != self._rules.host:
            found.append("this node has other addresses")
        for at, virtual in self._rules.servers.items():
            one = held.get(at)
            if one is None:
                found.append(f"no virtual server {at}")
                continue
            if (one.scheduler, one.persistence) != (virtual.scheduler, virtual.persistence):
                found.append(f"virtual server {at} has other settings")
            weights = {real: state.weight for real, state in one.reals.items()
                       if (at, real) not in self.draining}  # fmt: skip
            if weights != dict.fromkeys(virtual.reals, 1):
                found.append(f"virtual server {at} has other real servers")
        found += [
            f"virtual server {at} is not wanted"
            for at in sorted(held.keys() - self._rules.servers.keys())
            if not is_excluded(at.address, self.settings.exclude_cidrs)
        ]
        return found

    async def _set_differences(self) -> list[str]:
        held = await self._ipset.held(self.family)
        return await asyncio.to_thread(_set_differences, self._rules.members, held, self.family)

    def _chain_differences(self, lines: BinaryIO) -> list[str]:
        return find_differences(lines, self._chains, JUMPS, self._exact, ())

    # --- leaving ----------------------------------------------------------------------

    async def cleanup(self) -> None:
        """Remove all that was written; what is not there is no error."""
        self._known = False
        await clean_up_family(self.programs, self._options)
        self._servers.clear()
        self.draining.clear()
        self._written = False


def settings_wanted(strict_arp: bool, release: str) -> Iterator[tuple[str, int]]:
    """Yield the kernel's settings below net/ipv4, and their values. release -- of the kernel."""
    yield "vs/conntrack", 1
    version = re.match(r"(\d+)\.(\d+)", release)
    if version and REUSE_SLOW[0] <= (int(version[1]), int(version[2])) < REUSE_SLOW[1]:
        yield "vs/conn_reuse_mode", 0
    yield "vs/expire_nodest_conn", 1
    yield "vs/expire_quiescent_template", 1
    yield "ip_forward", 1
    if strict_arp:
        yield "conf/all/arp_ignore", 1
        yield "conf/all/arp_announce", 2


def _ipvs() -> Ipvs:
    """Return a socket to IPVS. Raises ApplyError with what would help."""
    try:
        return Ipvs()
    except NetlinkError as error:
        if error.code != errno.ENOENT:
            raise
        if _modprobe("ip_vs"):
            with contextlib.suppress(NetlinkError):
                return Ipvs()
        raise ApplyError(
            "ipvs", f"this kernel has no IPVS: it takes the module ip_vs; {OTHER_MODES}"
        ) from None


class _Order(NamedTuple):
    """One order to IPVS. number -- which; virtual -- where its settings are told"""

    number: int
    at: At
    real: Real | None = None
    virtual: Virtual | None = None

    def command(self) -> tuple[int, bytes]:
        if self.real is not None:
            weight = 0 if self.number == SET_DEST else 1
            return self.number, real_server(self.at, self.real, weight)
        if self.virtual is not None:
            return self.number, server_settings(self.at, self.virtual)
        return self.number, server_key(self.at)

    def __str__(self) -> str:
        text = _PURPOSES[self.number].format(at=self.at, real=self.real)
        scheduler = self.virtual.scheduler if self.virtual is not None else ""
        return f"{text} with scheduler {scheduler}" if self.number == NEW_SERVICE else text


_PURPOSES: Mapping[int, str] = {
    NEW_SERVICE: "make virtual server {at}",
    SET_SERVICE: "change virtual server {at}",
    DEL_SERVICE: "delete virtual server {at}",
    NEW_DEST: "add real server {real} to {at}",
    SET_DEST: "let real server {real} of {at} leave",
    DEL_DEST: "delete real server {real} of {at}",
}


def _check(codes: Iterable[int], orders: Iterable[_Order]) -> None:
    """Raise ApplyError for the first order that the kernel refused."""
    for code, order in zip(codes, orders, strict=True):
        gone = code in (errno.ENOENT, errno.ESRCH)
        if not code or (gone and order.number in (DEL_SERVICE, DEL_DEST)):
            continue
        remedy = ""
        if code == errno.ENOENT and order.number == NEW_SERVICE and order.virtual is not None:
            remedy = f"; it takes the kernel module ip_vs_{order.virtual.scheduler}"
        elif code == errno.EPROTONOSUPPORT:
            remedy = "; the kernel's ip_vs has no such protocol"
        raise ApplyError("ipvs", f"cannot {order}: {os.strerror(code)}{remedy}")


def _member_lines(
    touched: Iterable[Member], members: Mapping[str, Mapping[str, int]], family: Family
) -> tuple[list[str], list[str]]:
    """Return the lines that add members, and those that take them out."""
    new: list[str] = []
    gone: list[str] = []
    for one in sorted(touched):
        there = one.text in members[one.set]
        verb, lines = ("add", new) if there else ("del", gone)
        lines.append(f"{verb} {set_name(one.set, family)} {one.text}\n")
    return new, gone


def _set_differences(
    wanted: Mapping[str, Mapping[str, int]], held: Mapping[str, HeldSet], family: Family
) -> list[str]:
    found = []
    for short, members in wanted.items():
        name = set_name(short, family)
        one = held.get(name)
        if one is None:
            found.append(f"no set {name}")
        elif one.kind != SETS[short]:
            found.append(f"set {name} is of type {one.kind}")
        elif one.members != members.keys():
            lacks, has = len(members.keys() - one.members), len(one.members - members.keys())
            found.append(f"set {name} lacks {lacks} members and has {has} that are not ours")
    return found


# --- iptables ---------------------------------------------------------------------------------


@dataclass(slots=True)
class _HeldChains:
    """chains -- by table, of any name; leading -- (table, chain, rule) that jump to KUBE-..."""

    chains: dict[str, set[str]]
    leading: list[tuple[str, str, str]]


def _parse_chains(lines: Iterable[bytes]) -> _HeldChains:
    held, table = _HeldChains({}, []), ""
    for octets in lines:
        line = octets.decode("utf-8", "surrogateescape").rstrip("\n")
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith(":"):
            held.chains.setdefault(table, set()).add(line[1 : line.index(" ")])
        elif line.startswith("-A ") and line.count(" ") > 1:
            _, chain, rule = line.split(" ", 2)
            if target_of(rule).startswith("KUBE-"):
                held.leading.append((table, chain, rule))
    return held


def _is_led_by_rules(held: _HeldChains) -> bool:
    """Say whether the mode iptables is at work."""
    return any(chain.startswith(SERVICE_CHAINS) for chain in held.chains.get("nat", ()))


def chains_text(wanted: Mapping[str, Mapping[str, tuple[str, ...]]], held: _HeldChains) -> str:
    """Return the restore text of all our chains, and of the jumps that are missing."""
    there = {(table, chain, tokens(rule)) for table, chain, rule in held.leading}
    lines = []
    for table, chains in wanted.items():
        lines.append(f"*{table}")
        lines += [f":{chain} - [0:0]" for chain in chains]
        lines += [f"-A {chain} {rule}" for chain, rules in chains.items() for rule in rules]
        lines += [
            f"-I {chain} {rule}"
            for chain, rules in JUMPS[table].items()
            for rule in reversed(rules)
            if (table, chain, tokens(rule)) not in there
        ]
        lines.append("COMMIT")
    return "".join(f"{line}\n" for line in lines)


def cleanup_text(held: _HeldChains, options: Options, shared: bool) -> str:
    """Return the restore text that removes our chains and the jumps to them; "": there are none.

    A chain that a rule of somebody else leads to is emptied, and stays.
    """
    lines: list[str] = []
    known = _known(JUMPS)
    if not shared:
        known -= _known(iptables.jumps(options))
    for table, chains in constant_chains(options).items():
        ours = {one for one in chains if shared or one not in SHARED_CHAINS}
        ours &= held.chains.get(table, set())
        drop, stay = [], set()
        for where, chain, rule in held.leading:
            target = target_of(rule)
            if where != table or chain in ours:
                continue
            if (table, chain, tokens(rule)) in known:
                drop.append(f"-D {chain} {rule}")
            elif target in ours:
                stay.add(target)
                log.warning("clean-up: %s %s stays, empty: a rule of somebody else in %s leads"
                            " to it", table, target, chain)  # fmt: skip
        if ours or drop:
            lines += [f"*{table}", *(f":{one} - [0:0]" for one in sorted(ours)), *drop]
            lines += [*(f"-X {one}" for one in sorted(ours - stay)), "COMMIT"]
    return "".join(f"{line}\n" for line in lines)


def takeover_texts(held: Held, options: Options) -> list[str]:
    """Return the restore texts that remove what the mode iptables has beside this one."""
    ours, texts = constant_chains(options), []
    known = _known(iptables.jumps(options)) - _known(JUMPS)
    for table, chain, rule in held.leading:
        if (table, chain, tokens(rule)) in known and target_of(rule) in ours.get(table, ()):
            texts.append(f"*{table}\n-D {chain} {rule}\nCOMMIT\n")
    theirs = {table: names - ours.get(table, {}).keys() for table, names in held.chains.items()}
    return texts + render_cleanup(iptables.jumps(options), replace(held, chains=theirs))


def _known(jumps: RuleSet) -> set[tuple[str, str, tuple[str, ...]]]:
    return {
        (table, chain, tokens(rule))
        for table, chains in jumps.items()
        for chain, rules in chains.items()
        for rule in rules
    }


# --- cleaning up ------------------------------------------------------------------------------


async def clean_up(
    families: Collection[Family] = (4, 6), prefix: Sequence[str] = (), shared: bool = True
) -> None:
    """Remove all of this mode's, also that of a kube-proxy, from every variant of iptables.

    shared -- False: the chains that the mode iptables has under the same name stay; it must have
              written them anew by then
    Goes on after a failure, and raises the first at the end.
    """
    failure: ApplyError | None = None
    for family in families:
        for programs in (await find_variants(family, tuple(prefix))).values():
            try:
                await clean_up_family(programs, Options(family=family), shared)
            except ApplyError as e:
                log.error("clean-up: %s", e)
                failure = failure or e
    if failure is not None:
        raise failure


async def clean_up_iptables(
    families: Collection[Family] = (4, 6), prefix: Sequence[str] = ()
) -> None:
    """Remove what the mode iptables left, also a kube-proxy's. Where our own rules are by now,
    the chains that this mode has under the same name stay.

    Goes on after a failure, and raises the first at the end.
    """
    failure: ApplyError | None = None
    for family in families:
        options = Options(family=family)
        for programs in (await find_variants(family, tuple(prefix))).values():
            try:
                for text in await _iptables_texts(programs, options):
                    await programs.restore(text)
            except ApplyError as e:
                log.error("clean-up: %s", e)
                failure = failure or e
    if failure is not None:
        raise failure


async def _iptables_texts(programs: Programs, options: Options) -> list[str]:
    try:
        lines = await programs.save()
    except ApplyError as e:  # no such tables in this kernel
        log.info("clean-up: %s", e)
        return []
    with lines:
        held = await asyncio.to_thread(parse_held, lines)
        lines.seek(0)
        chains = await asyncio.to_thread(_parse_chains, lines)
    if "KUBE-IPVS-FILTER" in chains.chains.get("filter", ()):
        return takeover_texts(held, options)
    return render_cleanup(iptables.jumps(options), held)


async def clean_up_family(programs: Programs, options: Options, shared: bool = True) -> None:
    """Remove what is there of one family. Kernels without IPVS hold nothing."""
    family = options.family
    await asyncio.to_thread(_remove_servers, family)
    try:
        with await programs.save() as lines:
            held = await asyncio.to_thread(_parse_chains, lines)
    except ApplyError as e:
        log.info("clean-up: %s", e)
        held = _HeldChains({}, [])
    text = cleanup_text(held, options, shared)
    if text:
        await programs.restore(text)
    if which("ipset") is not None:
        ipset = Ipset(programs.prefix)
        try:
            sets = await ipset.held(family)
        except ApplyError as e:  # a kernel without ipsets
            log.info("clean-up: %s", e)
            sets = {}
        # Those that a rule of somebody else looks into stay.
        for name in sorted(sets):
            try:
                await ipset.restore(f"destroy {name}\n")
            except ApplyError as e:
                log.warning("clean-up: set %s stays: %s", name, e)
    await asyncio.to_thread(_remove_addresses, family)


def _remove_servers(family: Family) -> None:
    """Delete the virtual servers at our VIPs and, as node ports, at the node's addresses."""
    if not ipvs_netlink.find_interface():
        return
    try:
        held = held_servers(family)
    except ApplyError:
        return
    bound, others = addresses_by_place(family)
    ours = [_Order(DEL_SERVICE, at) for at in sorted(held)
            if at.address in bound or at.address in others]  # fmt: skip
    if ours:
        with Ipvs("delete virtual servers") as ipvs:
            _check(ipvs.tell_all(map(_Order.command, ours)), ours)


def _remove_addresses(family: Family) -> None:
    """Take the family's addresses from kube-ipvs0, and remove it with the last one."""
    index = ipvs_netlink.find_interface()
    if not index:
        return
    bound, _ = addresses_by_place(family)
    ipvs_netlink.change_addresses(family, index, (), sorted(bound))
    other: Family = 6 if family == 4 else 4
    with contextlib.suppress(ApplyError):
        if addresses_by_place(other)[0]:
            return
    ipvs_netlink.remove_interface()


# --- probing ----------------------------------------------------------------------------------


async def find_ipvs(
    programs: Mapping[Family, Programs], scheduler: str = "rr", prefix: Sequence[str] = ()
) -> None:
    """Raise ApplyError unless this kernel and its programs can do all that this mode needs.

    The error names each module that is missing. What is made to find out is removed again.
    """
    await find_ipset(prefix)
    missing: list[str] = await asyncio.to_thread(_missing_modules, scheduler)
    ipset = Ipset(tuple(prefix))
    name = f"KUBE-PROBE-{secrets.token_hex(4)}"
    for family, program in programs.items():
        try:
            await _try_sets(ipset, program, name, family)
        except ApplyError as e:
            if "ermi" in e.stderr:
                raise
            missing.append(str(e))
            break
    if missing:
        raise ApplyError(
            "ipvs",
            f"this kernel lacks what mode ipvs needs: {', '.join(missing)}; load these modules,"
            f" or choose another mode: {OTHER_MODES}",
        )


async def _try_sets(ipset: Ipset, program: Programs, name: str, family: Family) -> None:
    """Make a set of each type, and a rule that looks into one, and remove them again."""
    kinds = sorted(set(SETS.values()))
    modules = ", ".join(f"ip_set_{kind.replace(':', '_').replace(',', '')}" for kind in kinds)
    made = [create_line(name, kind, family) for kind in kinds]
    try:
        await ipset.restore(f"destroy {name}\n".join([*made, ""]))
        await ipset.restore(made[-1])
    except ApplyError as e:
        raise ApplyError("ipset", f"{e.stderr} (modules ip_set, {modules})") from None
    directions = ",".join(["dst"] * len(kinds[-1].partition(":")[2].split(",")))
    rule = f"-A {name} -m set --match-set {name} {directions} -j RETURN\n"
    try:
        await program.restore(f"*filter\n:{name} - [0:0]\n{rule}COMMIT\n")
    except ApplyError as e:
        raise ApplyError(e.program, f"{e.stderr} (module xt_set)") from None
    finally:
        with contextlib.suppress(ApplyError):
            await program.restore(f"*filter\n:{name} - [0:0]\n-X {name}\nCOMMIT\n")
        await ipset.restore(f"destroy {name}\n")


def _missing_modules(scheduler: str) -> list[str]:
    """Try IPVS with its scheduler, and a dummy interface; name the modules that are not there."""
    missing = []
    virtual = Virtual(scheduler, 0, ())
    try:
        with _ipvs() as ipvs:
            for _ in range(2):
                (code,) = ipvs.tell_all([(NEW_SERVICE, server_settings(PROBE, virtual))])
                if code != errno.ENOENT or not _modprobe(f"ip_vs_{scheduler}"):
                    break
            if code == errno.EPERM:
                raise ApplyError("ipvs", "not permitted: it takes the capability CAP_NET_ADMIN")
            if code == errno.ENOENT:
                missing.append(f"ip_vs_{scheduler}")
            elif code not in (0, errno.EEXIST):
                missing.append(f"ip_vs ({os.strerror(code)})")
            else:
                ipvs.tell_all([(DEL_SERVICE, server_key(PROBE))])
    except NetlinkError:
        raise
    except ApplyError as e:
        if "no IPVS" not in e.stderr:
            raise
        missing += ["ip_vs", f"ip_vs_{scheduler}"]
    if not ipvs_netlink.find_interface():
        name = f"kube{secrets.token_hex(4)}"
        try:
            ipvs_netlink.make_interface(name)
            ipvs_netlink.remove_interface(name)
        except NetlinkError as e:
            if e.code in (errno.EPERM, errno.EACCES):
                raise
            missing.append("dummy")
    return missing


def _modprobe(module: str) -> bool:
    """Try to load a kernel module; most kernels do so by themselves where they can."""
    program = which("modprobe")
    if program is None:
        return False
    try:
        pid = os.posix_spawn(program, [program, "-q", module], os.environ)
    except OSError:
        return False
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status) == 0


class _Tally:
    """Numbers about this mode."""

    def __init__(self, metrics: Metrics, family: str) -> None:
        self._servers = self._gauge(metrics, family, "virtual_servers", "Virtual servers wanted.")
        self._reals = self._gauge(metrics, family, "real_servers", "Real servers wanted.")
        self.draining = self._gauge(
            metrics, family, "draining_real_servers", "Real servers that wait for connections."
        )
        self.failures = metrics.counter(
            "kdns_proxy_ipvs_failures_total", "Syncs that failed.", ("ip_family",)
        ).labels(family)

    @staticmethod
    def _gauge(metrics: Metrics, family: str, name: str, text: str) -> Cell:
        return metrics.gauge(f"kdns_proxy_ipvs_{name}", text, ("ip_family",)).labels(family)

    def total(self, rules: IpvsRules, draining: int) -> None:
        self._servers.set(len(rules.servers))
        self._reals.set(sum(len(one.reals) for one in rules.servers.values()))
        self.draining.set(draining)
