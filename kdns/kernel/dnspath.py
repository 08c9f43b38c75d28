"""The DNS path of the node: packets to and from its own DNS server, past connection tracking.

Decides which rules that takes, writes them with the programs of the proxy's mode, sees that
they and the addresses stay, and removes them. Where the addresses stand is dnsaddress.py's.

A packet that is not tracked meets no NAT: so it reaches the server on this node although the
Service `kube-dns` has rules for the same address, and two questions sent at once from one
socket (A and AAAA, as libc does) cannot race for one entry, of which the later one was dropped.
Chains and tables here are ours alone, and are written in one transaction each:

    iptables  raw KDNS-DNS-IN, KDNS-DNS-OUT    -j NOTRACK
              filter, chains of these names    -j ACCEPT: a firewall that lets pass what is
                                               ESTABLISHED knows nothing of these packets
    nftables  inet kdns-dns                    notrack; there, to accept in one table is no
                                               word against a drop in another one
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import BinaryIO, Final, Protocol, TypeAlias

from kdns.errors import ApplyError, KdnsError
from kdns.kernel import dnsaddress
from kdns.kernel.generation import nft_generation
from kdns.kernel.nftables import NFT, READ_TIMEOUT, Nft, blame, kernel_version
from kdns.kernel.programs import Programs, find_programs, find_variants, run_program, which
from kdns.metrics import Metrics
from kdns.proxy.config import Mode
from kdns.proxy.options import Family

log = logging.getLogger("kdns.node")

PORT: Final = 53
PROTOCOLS: Final = ("udp", "tcp")
TABLE: Final = "kdns-dns"  # nftables', of family inet: both families in one
IN, OUT = "KDNS-DNS-IN", "KDNS-DNS-OUT"
HOOKS: Final[Mapping[str, Mapping[str, str]]] = {
    # Accepted first: what is not tracked any more must be let in already.
    "filter": {IN: "INPUT", OUT: "OUTPUT"},
    "raw": {IN: "PREROUTING", OUT: "OUTPUT"},
}
RAW: Final = -300  # nftables' priority before connection tracking, which has -200
LOOK: Final = 2.0  # seconds between two looks whether all stands
RETRY: Final = 30.0  # seconds until a failure is tried again
RELEASE: Final = 5.0  # seconds that the end waits for a program: kubelet kills after 30
# The ipvs mode answers for its virtual addresses where a packet is delivered: tracked or not, it
# goes to an endpoint.
NO_VIP_MODES: Final[frozenset[Mode]] = frozenset({"ipvs"})
_ANY_NFT: Final = (1, 0, 0)  # no rule here needs a newer one

Rules: TypeAlias = dict[str, dict[str, list[str]]]  # table -> chain -> rules


def families_of(addresses: Iterable[str]) -> tuple[Family, ...]:
    """Return the families of addresses, in order."""
    versions = {ip_address(one).version for one in addresses}
    return tuple(family for family in (4, 6) if family in versions)


def of_family(addresses: Iterable[str], family: Family) -> list[str]:
    return [one for one in addresses if ip_address(one).version == family]


# --- iptables -------------------------------------------------------------------------------


def wanted_rules(addresses: Sequence[str]) -> Rules:
    """Return the rules of one family's addresses, as iptables-save prints them."""
    raw: dict[str, list[str]] = {IN: [], OUT: []}
    accept: dict[str, list[str]] = {IN: [], OUT: []}
    for address in addresses:
        one = ip_address(address)
        place = f"{one}/{one.max_prefixlen}"
        for protocol in PROTOCOLS:
            words = f"-p {protocol} -m {protocol}"
            asked = f"-d {place} {words} --dport {PORT}"
            raw[IN].append(f"{asked} -j NOTRACK")
            raw[OUT].append(f"{asked} -j NOTRACK")  # by a program of this node
            raw[OUT].append(f"-s {place} {words} --sport {PORT} -j NOTRACK")
            accept[IN].append(f"{asked} -j ACCEPT")
            # Its answer, on its way in again. From elsewhere this source is a lie.
            accept[IN].append(f"-s {place} -i lo {words} --sport {PORT} -j ACCEPT")
            accept[OUT].append(f"{asked} -j ACCEPT")
            accept[OUT].append(f"-s {place} {words} --sport {PORT} -j ACCEPT")
    return {"filter": accept, "raw": raw}


@dataclass(slots=True)
class Saved:
    """What a table holds of ours: its chains' rules, and the rules that lead there."""

    chains: dict[str, list[str]] = field(default_factory=dict)
    jumps: list[str] = field(default_factory=list)


def parse_saved(lines: Iterable[bytes]) -> Saved:
    """Read what iptables-save prints of one table."""
    saved = Saved()
    for line in lines:
        words = line.decode("utf-8", "surrogateescape").rstrip("\n")
        if words.startswith((f":{IN} ", f":{OUT} ")):
            saved.chains.setdefault(words[1:].split(" ", 1)[0], [])
        elif words.startswith("-A "):
            _, chain, rule = (*words.split(" ", 2), "")[:3]
            if chain in (IN, OUT):
                saved.chains.setdefault(chain, []).append(rule)
            elif rule.endswith((f"-j {IN}", f"-j {OUT}", f"-g {IN}", f"-g {OUT}")):
                saved.jumps.append(f"{chain} {rule}")
    return saved


def render_table(table: str, chains: Mapping[str, Sequence[str]], saved: Saved) -> str:
    """Return what puts our chains and the jumps to them into a table, whatever is there."""
    lines = [f"*{table}", *(f":{chain} - [0:0]" for chain in chains)]
    lines += [f"-A {chain} {rule}" for chain, rules in chains.items() for rule in rules]
    lines += [f"-D {jump}" for jump in saved.jumps]
    lines += [f"-I {hook} -j {chain}" for chain, hook in HOOKS[table].items()]
    return "\n".join((*lines, "COMMIT", ""))


def render_removal(table: str, saved: Saved) -> str:
    """Return what removes our chains and the jumps to them; "" if there is nothing of ours."""
    if not saved.chains:
        return ""
    lines = [f"*{table}", *(f":{chain} - [0:0]" for chain in saved.chains)]
    lines += [f"-D {jump}" for jump in saved.jumps]
    lines += [f"-X {chain}" for chain in saved.chains]
    return "\n".join((*lines, "COMMIT", ""))


async def _saved(programs: Programs, table: str) -> Saved:
    with await programs.save(table) as lines:
        return await asyncio.to_thread(parse_saved, lines)


class Writer(Protocol):
    """Writes the rules of all families in one way. Every method raises ApplyError."""

    def __str__(self) -> str: ...
    async def write(self) -> None: ...
    async def stands(self) -> bool: ...
    async def remove(self) -> None: ...


class IptablesPath:
    """The rules by iptables, of one variant."""

    def __init__(self, programs: Mapping[Family, Programs], addresses: Sequence[str]) -> None:
        self._programs = dict(programs)
        self._wanted = {
            family: wanted_rules(of_family(addresses, family)) for family in self._programs
        }
        self._held: dict[tuple[Family, str], Saved] = {}
        plain = all(one.variant == "nft" and not one.prefix for one in programs.values())
        self._verified = _Verified(plain)

    def __str__(self) -> str:
        return ", ".join(str(one) for one in self._programs.values())

    async def write(self) -> None:
        self._verified.forget()
        for family, programs in self._programs.items():
            for table, chains in self._wanted[family].items():
                saved = await _saved(programs, table)
                await programs.restore(render_table(table, chains, saved))
                self._held[family, table] = await _saved(programs, table)

    async def stands(self) -> bool:
        return await self._verified.ask(self._as_written)

    async def _as_written(self) -> bool:
        for (family, table), held in self._held.items():
            if await _saved(self._programs[family], table) != held:
                return False
        return bool(self._held)

    async def remove(self) -> None:
        self._held.clear()
        for programs in self._programs.values():
            # Not tracked as long as they are accepted.
            for table in reversed(list(HOOKS)):
                await _remove(programs, table)


async def _remove(programs: Programs, table: str) -> None:
    text = render_removal(table, await _saved(programs, table))
    if text:
        await programs.restore(text)


# --- nftables -------------------------------------------------------------------------------


def render_nftables(addresses: Sequence[str]) -> str:
    """Return the transaction that makes our table what it is to be, whatever is there."""
    asked, told = [], []
    for family, word in ((4, "ip"), (6, "ip6")):
        mine = ", ".join(sorted(str(ip_address(a)) for a in addresses
                                if ip_address(a).version == family))  # fmt: skip
        if mine:
            ports = f"meta l4proto {{ {', '.join(PROTOCOLS)} }} th"
            asked.append(f"{word} daddr {{ {mine} }} {ports} dport {PORT} notrack")
            told.append(f"{word} saddr {{ {mine} }} {ports} sport {PORT} notrack")
    chains = (("prerouting", asked), ("output", [*asked, *told]))
    lines = [f"table inet {TABLE} {{ }}", f"delete table inet {TABLE}", f"table inet {TABLE} {{"]
    for hook, rules in chains:
        lines += [
            f"\tchain {hook} {{",
            f"\t\ttype filter hook {hook} priority {RAW}; policy accept;",
            *(f"\t\t{rule}" for rule in rules),
            "\t}",
        ]
    return "\n".join((*lines, "}", ""))


class NftablesPath:
    """The rules by nft, in a table of their own."""

    def __init__(self, nft: Nft, addresses: Sequence[str]) -> None:
        self._nft = nft
        self._text = render_nftables(addresses)
        self._held = b""
        self._verified = _Verified(not nft.prefix)

    def __str__(self) -> str:
        return NFT

    async def write(self) -> None:
        self._verified.forget()
        await self._nft.apply(self._text)
        self._held = await _listed(self._nft)

    async def stands(self) -> bool:
        return await self._verified.ask(self._as_written)

    async def _as_written(self) -> bool:
        return bool(self._held) and await _listed(self._nft) == self._held

    async def remove(self) -> None:
        self._held = b""
        await _remove_table(self._nft)


async def _remove_table(nft: Nft) -> None:
    await nft.apply(f"table inet {TABLE} {{ }}\ndelete table inet {TABLE}\n")


async def _listed(nft: Nft) -> bytes:
    """Return our table as nft prints it; b"" if there is none."""
    path = which(NFT)
    if path is None:
        raise ApplyError(NFT, "not found in PATH any more; install the package nftables")
    argv = (*nft.prefix, path, "-s", "list", "table", "inet", TABLE)
    status, output, stderr = await run_program(NFT, argv, READ_TIMEOUT)
    with output:
        if status == 0:
            return output.read()
    if "No such file or directory" in stderr:
        return b""
    raise ApplyError(NFT, blame(stderr, ""))


def _nft(prefix: Sequence[str] = ()) -> Nft:
    return Nft(_ANY_NFT, kernel_version(os.uname().release), tuple(prefix))


class _Verified:
    """Spares a look as long as nf_tables' number says that nobody has changed anything.

    plain -- the rules are nf_tables', and those of this network namespace
    """

    def __init__(self, plain: bool) -> None:
        self._generation: Callable[[], int | None] = nft_generation if plain else lambda: None
        self._at: int | None = None

    def forget(self) -> None:
        self._at = None

    async def ask(self, look: Callable[[], Awaitable[bool]]) -> bool:
        before = self._generation()
        if before is not None and before == self._at:
            return True
        self._at = None
        if not await look():
            return False
        self._at = before if self._generation() == before else None
        return True


# --- all of it ------------------------------------------------------------------------------


async def find_writer(mode: Mode, addresses: Sequence[str]) -> Writer:
    """Return what writes the rules in the programs of a proxy's mode. Raises ApplyError."""
    if mode == "nftables":
        if which(NFT) is None:
            raise ApplyError(NFT, "not found in PATH: install the package nftables")
        return NftablesPath(_nft(), addresses)
    found = await find_programs(families_of(addresses))
    return IptablesPath(found.programs, addresses)


async def remove_rules(keep: Writer | None = None) -> list[str]:
    """Remove our rules of every way and variant, but for those of `keep`; return what could not
    be. What is not there, or cannot be there, is no error."""
    failures: list[str] = []
    if which(NFT) is not None and not isinstance(keep, NftablesPath):
        try:
            if await _listed(_nft()):
                await _remove_table(_nft())
        except ApplyError as e:
            failures.append(str(e))
    kept = set(keep._programs.values()) if isinstance(keep, IptablesPath) else set()
    for family in (4, 6):
        try:
            variants = await find_variants(family)
        except ApplyError as e:
            failures.append(str(e))
            continue
        for programs in variants.values():
            if programs not in kept:
                failures += await _remove_everywhere(programs)
    return failures


async def _remove_everywhere(programs: Programs) -> list[str]:
    try:
        # All at once, for that makes no table by asking for it.
        with await programs.save() as lines:
            tables = await asyncio.to_thread(_tables_with_ours, lines)
    except ApplyError as e:
        log.info("clean-up: %s", e)  # no such tables in this kernel: nothing was written
        return []
    try:
        for table in reversed(list(HOOKS)):
            if table in tables:
                await _remove(programs, table)
    except ApplyError as e:
        return [str(e)]
    return []


def _tables_with_ours(lines: BinaryIO) -> set[str]:
    table, found = "", set()
    for line in lines:
        if line.startswith(b"*"):
            table = line[1:].strip().decode()
        elif line.startswith((f":{IN} ".encode(), f":{OUT} ".encode())):
            found.add(table)
    return found


class DnsPath:
    """The addresses of this node's DNS server and the rules for them.

    addresses -- IPv4 and IPv6
    mode      -- the proxy's
    written   -- told when the rules are there for the first time
    """

    def __init__(
        self,
        addresses: Sequence[str],
        mode: Mode,
        metrics: Metrics,
        written: Callable[[], None] = lambda: None,
    ) -> None:
        self.addresses = tuple(dict.fromkeys(map(dnsaddress.canonical, addresses)))
        self.interface = ""
        self.problem = "the rules are not written yet"
        self._mode = mode
        self._tell_written = written
        self._writer: Writer | None = None
        self._written = False
        self._leaving = False
        metrics.gauge(
            "kdns_dns_path_untracked", "1 while packets of the node's DNS path are not tracked."
        ).read = lambda: [((), float(self.untracked))]
        self._healed = metrics.counter(
            "kdns_dns_path_healed_total",
            "Times that rules or addresses of the DNS path were gone and put back.", ("what",),
        )  # fmt: skip

    @property
    def untracked(self) -> bool:
        """The rules stand."""
        return self._written and not self.problem

    async def open(self) -> None:
        """Give the node the addresses. Raises NetlinkError."""
        if self.addresses:
            self.interface = await asyncio.to_thread(dnsaddress.take_addresses, self.addresses)
            log.info("%s on %s: the addresses of this node's DNS server",
                     ", ".join(self.addresses), self.interface)  # fmt: skip

    async def keep(self) -> None:
        """Write the rules, and see for ever that they and the addresses stay; a failure is told,
        and tried again. Ends by cancellation, after leave() has been called."""
        if not self.addresses:
            self.problem = ""
            return
        # Python 3.11's wait_for() may lose a cancellation: leave() is heard in any case.
        while not self._leaving:
            try:
                await self._look()
                wait = LOOK
            except KdnsError as e:
                self._tell(str(e))
                wait = LOOK if getattr(e, "busy", False) else RETRY
            if not self._leaving:
                await asyncio.sleep(wait)

    def leave(self) -> None:
        """Have keep() write nothing any more."""
        self._leaving = True

    async def _look(self) -> None:
        missing = await asyncio.to_thread(dnsaddress.missing_addresses, self.addresses)
        if missing:
            log.warning("%s: somebody took these addresses from the node; given back",
                        ", ".join(missing))  # fmt: skip
            self.interface = await asyncio.to_thread(dnsaddress.take_addresses, self.addresses)
            self._healed.labels("addresses").add()
        if self._written and self._writer is not None:
            if await self._writer.stands():
                self.problem = ""
                return
            log.warning("somebody changed the rules of the DNS path; written again")
            self._healed.labels("rules").add()
        await self._write()

    async def _write(self) -> None:
        first = not self._written
        if self._writer is None:
            self._writer = await find_writer(self._mode, self.addresses)
        await self._writer.write()
        self._written, self.problem = True, ""
        if first:
            log.info("port %d there is not tracked, by rules with %s", PORT, self._writer)
            self._tell_written()
            for failure in await remove_rules(keep=self._writer):
                log.warning("what another mode left cannot be removed: %s", failure)

    def _tell(self, why: str) -> None:
        """Say it once."""
        if why != self.problem:
            log.error(
                "DNS packets are tracked, DNS goes on all the same: %s; trying again every %g s",
                why, RETRY,
            )  # fmt: skip
        self.problem = why

    async def release_rules(self) -> None:
        """Remove the rules: the Service's own rules take over what comes from now on."""
        if self._writer is None:
            return
        why = ""
        try:
            async with asyncio.timeout(RELEASE):
                await self._writer.remove()
        except KdnsError as e:
            why = str(e)
        except TimeoutError:
            why = f"{self._writer} took longer than {RELEASE:g} s"
        if why:
            log.error("the rules of the DNS path are still there: %s; `kdns node --cleanup`"
                      " removes them", why)  # fmt: skip
        self._written = False

    async def release_addresses(self) -> None:
        """Take the addresses from the node."""
        if not self.interface:
            return
        try:
            await asyncio.to_thread(dnsaddress.give_back_addresses)
        except KdnsError as e:
            log.error("the addresses are still there: %s; `kdns node --cleanup` removes them", e)
        self.interface = ""

    def status(self) -> dict[str, object]:
        """Say how it is, for /healthz."""
        return {
            "healthy": bool(self.untracked or not self.addresses),
            "interface": self.interface,
            "addresses": list(self.addresses),
            "notrack": str(self._writer) if self.untracked else "",
            **({"problem": self.problem} if self.problem else {}),
        }


async def clean_up() -> list[str]:
    """Remove all that any run gave the node; return what could not be."""
    failures = await remove_rules()
    try:
        gone = await asyncio.to_thread(dnsaddress.give_back_addresses)
    except KdnsError as e:
        return [*failures, str(e)]
    if gone:
        log.info("%s: taken from the node", ", ".join(gone))
    return failures
