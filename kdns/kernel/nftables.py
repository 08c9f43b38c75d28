"""The nftables dataplane of one family: what the kernel holds is made what is wanted.

Decides what to read and what to write, isolates a Service whose rules are refused, and finds
what somebody else changed. It owns the table kube-proxy of its family and touches no other.
The text of the rules is proxy/nftables.py's, when to do all this is sync.py's.

Each sync is one transaction of `nft -f -`; small changes go to the kernel without nft, which is
slow to start among many chains (nftables_netlink.py). What the table holds is read where a full
sync must know it: at the start, after a failure and after somebody else's change; the rest is
remembered. So affinity sets, which clients fill, outlive syncs and restarts.
"""

from __future__ import annotations

import asyncio
import io
import logging
import os
import re
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from kdns.errors import ApplyError
from kdns.kernel.generation import nft_generation
from kdns.kernel.nftables_netlink import MOST, NetlinkTables, NotPlain, Refused
from kdns.kernel.programs import run_program, which
from kdns.kernel.refusals import MOST_TOLD, Refusals, tell_changed
from kdns.metrics import Metrics
from kdns.proxy.nftables import TABLE, Held, NftablesRules
from kdns.proxy.nftables_listing import find_differences, parse_table
from kdns.proxy.nftables_rules import WORD
from kdns.proxy.options import Family, Options
from kdns.proxy.table import ForwardingTable
from kdns.registry.objects import Key

log = logging.getLogger("kdns.proxy")

NFT = "nft"
OLDEST_NFT = (1, 0, 1)  # reference 2.2: older ones misprint or refuse concatenated maps
OLDEST_KERNEL = (5, 13)
# From here on a chain may go in the transaction that takes away the map elements leading to it.
DELETES_AT_ONCE = (6, 2)

WRITE_TIMEOUT = 180.0  # seconds until nft is given up; 20,000 rules take less than 2
READ_TIMEOUT = 120.0
VERSION_TIMEOUT = 10.0


FAMILY_LABEL: dict[Family, str] = {4: "IPv4", 6: "IPv6"}

# All that rules of this mode need of nft and of the kernel, tried without being committed.
PROBE = """\
table {word} kdns-probe {{
	set clients {{ type {address}; size 16; flags dynamic,timeout; timeout 1m; }}
	map places {{ type {address} . inet_proto . inet_service : verdict; }}
	chain out {{ type nat hook postrouting priority 100; masquerade fully-random; }}
	chain in {{
		type nat hook prerouting priority -100;
		fib daddr type local {word} daddr . meta l4proto . th dport vmap @places
		update @clients {{ {word} saddr }}
		numgen random mod 2 0 meta l4proto tcp dnat to {target}
	}}
	chain check {{ type filter hook input priority 0; ct state new reject; }}
}}
"""

_VERSION = re.compile(r"v(\d+)\.(\d+)(?:\.(\d+))?")
_PLACE = re.compile(r"^/dev/stdin:(\d+):[\d-]*:?", re.MULTILINE)
_ADVICE = re.compile(r"^(\s*\^[\^~ ]*|)$")


# --- the program ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Nft:
    """The nft of this node. prefix -- what its command line begins with, for tests"""

    version: tuple[int, int, int]
    kernel: tuple[int, int]
    prefix: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{NFT} {'.'.join(map(str, self.version))}"

    async def apply(self, text: str, check: bool = False) -> None:
        """Do what `text` says in one transaction, or (check) only see whether it could be done.

        Raises ApplyError with the line that was not taken; then nothing was done.
        """
        flags = ("-c", "-f", "-") if check else ("-f", "-")
        status, output, stderr = await run_program(NFT, self._argv(*flags), WRITE_TIMEOUT, text)
        output.close()
        if status != 0:
            line = refused_line(stderr, text)
            raise ApplyError(NFT, blame(stderr, line), is_busy(stderr), line)

    async def held(self, family: Family) -> Held:
        """Return what the family's table holds."""
        # Priorities as numbers; no counters, no remaining seconds.
        argv = self._argv("-y", "-s", "list", "table", WORD[family], TABLE)
        status, output, stderr = await run_program(NFT, argv, READ_TIMEOUT)
        with output:
            if status == 0:
                return await asyncio.to_thread(_parsed, output, WORD[family])
        if "No such file or directory" in stderr:
            return Held()
        raise ApplyError(NFT, blame(stderr, ""), is_busy(stderr))

    def _argv(self, *words: str) -> tuple[str, ...]:
        path = which(NFT)
        if path is None:
            raise ApplyError(NFT, "not found in PATH any more; install the package nftables")
        return (*self.prefix, path, *words)


def _parsed(output: BinaryIO, word: str) -> Held:
    lines = io.TextIOWrapper(output, "utf-8", "surrogateescape")
    try:
        return parse_table(lines, word)
    finally:
        lines.detach()


async def find_nft(
    prefix: Sequence[str] = (),
    families: Collection[Family] = (4, 6),
    any_kernel: bool = False,
    release: str | None = None,
) -> Nft:
    """Return the nft to use. Raises ApplyError that says what is missing, and what would do,
    unless one of the families can be had: usable_families() says which.

    any_kernel -- do not mind the kernel's version (kube-proxy has an environment variable for
                  it: some distributions brought what is needed to older ones)
    release    -- the kernel's; None: ask it
    """
    if which(NFT) is None:
        raise ApplyError(
            NFT,
            "not found in PATH: mode nftables writes its rules with nft; install the package"
            " nftables, or use mode iptables",
        )
    kernel = kernel_version(os.uname().release if release is None else release)
    if kernel < OLDEST_KERNEL and not any_kernel:
        raise ApplyError(
            NFT,
            f"this kernel is {_dotted(kernel)}: mode nftables needs {_dotted(OLDEST_KERNEL)};"
            " use mode iptables",
        )
    nft = Nft((0, 0, 0), kernel, tuple(prefix))
    status, output, stderr = await run_program(NFT, nft._argv("--version"), VERSION_TIMEOUT)
    with output:
        text = output.read().decode("utf-8", "replace")
    if status != 0:
        raise ApplyError(NFT, blame(stderr, ""))
    nft = Nft(parse_version(text), kernel, tuple(prefix))
    if nft.version < OLDEST_NFT:
        raise ApplyError(
            NFT, f"{nft} is too old: mode nftables needs {_dotted(OLDEST_NFT)}; use mode iptables"
        )
    failures = [e for family in families if (e := await _probe(nft, family)) is not None]
    if failures and len(failures) == len(families):
        raise failures[0]
    return nft


async def usable_families(
    nft: Nft, families: Collection[Family]
) -> tuple[tuple[Family, ...], tuple[str, ...]]:
    """Return the families that this kernel can translate, and a warning for each other one: a
    node whose kernel has no IPv6 nat has IPv4 all the same (as kube-proxy)."""
    failures = {family: await _probe(nft, family) for family in sorted(families)}
    return (
        tuple(family for family, failure in failures.items() if failure is None),
        tuple(
            f"no Service is forwarded to over IPv{family}, this kernel cannot: {failure}"
            for family, failure in failures.items()
            if failure is not None
        ),
    )


async def _probe(nft: Nft, family: Family) -> ApplyError | None:
    """Return why the kernel does not take every kind of rule; None if it does."""
    word = WORD[family]
    target = "192.0.2.1:80" if family == 4 else "[2001:db8::1]:80"
    try:
        await nft.apply(
            PROBE.format(word=word, address=f"ipv{family}_addr", target=target), check=True
        )
    except ApplyError as e:
        if "ermi" in e.stderr:  # not permitted, permission denied
            why = "it takes the capability NET_ADMIN to write rules"
        elif e.line:
            why = f"this kernel lacks what `{e.line.strip()}` needs; modes iptables and userspace"
            why += " need less"
        else:
            why = "this kernel has no nf_tables; use mode iptables (legacy) or userspace"
        return ApplyError(NFT, f"{why} ({e.stderr})")
    return None


def parse_version(text: str) -> tuple[int, int, int]:
    """Read `nft --version`: "nftables v1.0.6 (Lester Gooch #5)"."""
    match = _VERSION.search(text)
    if match is None:
        raise ApplyError(NFT, f"--version says {text.strip()[:80]!r}, which names no version")
    major, minor, patch = (int(part or 0) for part in match.groups())
    return major, minor, patch


def kernel_version(release: str) -> tuple[int, int]:
    """Read "6.1.0-13-amd64"; what cannot be read counts as new."""
    match = re.match(r"(\d+)\.(\d+)", release)
    return (int(match[1]), int(match[2])) if match else (999, 0)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def is_busy(stderr: str) -> bool:
    """Say whether nft failed for something that may have passed in a moment."""
    return any(sign in stderr for sign in ("temporarily unavailable", "Interrupted system call"))


def refused_line(stderr: str, text: str) -> str:
    """Return the line of `text` that was not taken; "" if nft does not say which."""
    place = _PLACE.search(stderr)
    if place is None:
        return ""
    lines = text.splitlines()
    number = int(place[1])
    return lines[number - 1] if 0 < number <= len(lines) else ""


def blame(stderr: str, line: str) -> str:
    """Return what nft said in one line, with the line of its input that it said it about."""
    said = [part.strip() for part in stderr.splitlines() if not _ADVICE.match(part)]
    said = [_PLACE.sub("line \\1:", part) for part in said if part != line.strip()]
    told = "; ".join(said[:MOST_TOLD]) or "failed and said nothing"
    return f"{told}; of its input: {line.strip()}" if line else told


# --- the dataplane --------------------------------------------------------------------------


class NftablesDataplane:
    """Writes one family's table.

    One call at a time: sync.py's loop sees to it. Every method raises ApplyError. A Service with
    a rule that is refused is left out, told of, and tried again later.

    service_cidrs -- those of the family, where they are known
    generation    -- nf_tables' present number, or None; asked in nft's own namespace
    clock         -- monotonic seconds
    tables        -- a socket to nf_tables of nft's own namespace; None: open one
    """

    def __init__(
        self,
        nft: Nft,
        options: Options,
        metrics: Metrics | None = None,
        service_cidrs: Iterable[str] = (),
        generation: Callable[[], int | None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        tables: NetlinkTables | None = None,
    ) -> None:
        self.nft = nft
        self._tables = tables
        self._family = options.family
        self._rules = NftablesRules(options, service_cidrs, nft.kernel < DELETES_AT_ONCE)
        self._tally = _Tally(metrics or Metrics(), FAMILY_LABEL[options.family])
        if generation is None and not nft.prefix:
            generation = nft_generation
        self._generation = generation or (lambda: None)
        self._refused = Refusals(FAMILY_LABEL[options.family], clock)
        self._known = False  # the kernel holds what the rules were last committed as
        self._rendered = False  # the rules follow the table; False after a bug in rendering
        self._written = False
        self._exact = True  # this nft prints rules as we write them
        self._doubt = False  # whether it does is to be found out after the next full sync
        self._verified: int | None = None  # the generation at which all was as it should be

    # --- writing ----------------------------------------------------------------------

    async def sync(self, table: ForwardingTable, changed: Collection[Key], full: bool) -> None:
        """Bring the kernel to `table`, of which `changed` is new since the last call.

        full -- trust nothing that is remembered; so is the first call and one after a failure
        """
        full = full or not self._known
        self._known = False
        try:
            await self._render(table, changed)
            if full:
                await self._write_accepted(table)
            else:
                await self._write(self._rules.partial(), self._apply_small)
        except ApplyError:
            self._tally.failed()
            raise
        self._known = True
        self._tally.total(self._rules, len(self._refused))

    async def _render(self, table: ForwardingTable, changed: Collection[Key]) -> None:
        known, self._rendered = self._rendered, False
        changed = {*changed, *self._refused.take_back(table, changed)}
        anew = changed if known else None
        if known and len(changed) < 100:  # a thread takes longer to start
            self._rules.update(table, anew, self._refused)
        else:
            await asyncio.to_thread(self._rules.update, table, anew, self._refused)
        self._rendered = True

    async def _write(
        self, text: str, apply: Callable[[str], Awaitable[None]] | None = None
    ) -> None:
        """Write a transaction. Where all was as it should be and nobody but us has changed
        anything since, it still is, and need not be read again."""
        before = self._generation()
        if text:
            self._written = True
            await (apply or self.nft.apply)(text)
        self._rules.committed()
        if text and before is not None and before == self._verified:
            self._verified = before + 1

    async def _apply_small(self, text: str) -> None:
        """Write a change without nft, if it is small and plain enough."""
        if len(text) < MOST:
            try:
                if self._tables is None and not self.nft.prefix:
                    self._tables = NetlinkTables()
                if self._tables is not None:
                    # Elsewhere: another program's transaction may have to be waited for.
                    await asyncio.to_thread(self._tables.apply, text)
                    return
            except NotPlain:
                pass
            except (Refused, OSError) as e:
                # nft says why; or, should it have been done after all, that it was, which the
                # full sync that follows will find.
                log.debug("%s: not written without nft: %r", self._tally.family, e)
        await self.nft.apply(text)

    async def _write_accepted(self, table: ForwardingTable) -> None:
        """Write all, but for Services with a rule that is refused."""

        async def spell_without(key: Key) -> None:
            await asyncio.to_thread(self._rules.update, table, (key,), self._refused)

        await self._refused.write_accepted(
            self._write_full, self._rules.owner, lambda e: self._tally.failed(), spell_without
        )

    async def _write_full(self) -> None:
        held = await self.nft.held(self._family)
        await self._write(await asyncio.to_thread(self._rules.full, held, self._exact))
        self._rules.tidied(held.chains)
        self._written = True
        self._verified = None
        if self._doubt:
            self._exact = not await self._differences(exact=True)
            self._doubt = False
            if not self._exact:
                log.info("%s prints rules in its own way: targets are compared", self.nft)

    # --- verifying --------------------------------------------------------------------

    async def verify(self) -> bool:
        """Say whether the table holds what was written; log what it does not. True before the
        first write. Chains that had to wait for it are deleted."""
        if not self._written:
            return True
        await self._tidy()
        if self._refused.due:
            return False
        generation = self._generation()
        if generation is not None and generation == self._verified:
            return True
        found = await self._differences(self._exact)
        if found:
            tell_changed("rules", found)
            self._doubt = True
            return False
        # Only a number that held all the while vouches for what was read.
        self._verified = generation if self._generation() == generation else None
        return True

    async def _differences(self, exact: bool) -> list[str]:
        held = await self.nft.held(self._family)
        wanted = self._rules.wanted()
        return await asyncio.to_thread(lambda: list(find_differences(held, wanted, exact)))

    async def _tidy(self) -> None:
        text = self._rules.leftovers()
        if not text:
            return
        try:
            await self.nft.apply(text)
        except ApplyError as e:
            # They lead nowhere and nothing leads there: it can wait for the next time.
            self._tally.failed_cleanup()
            log.warning("%s: chains not used any more stay: %s", self._tally.family, e)
            if e.line and "No such file" in e.stderr:
                self._rules.tidied((await self.nft.held(self._family)).chains)
            return
        self._rules.tidied()

    # --- leaving ----------------------------------------------------------------------

    async def cleanup(self) -> None:
        """Remove the table; that it is not there is no error."""
        self._known = False
        if self._tables is not None:
            self._tables.close()
            self._tables = None
        await clean_up((self._family,), self.nft.prefix)
        self._written = False


async def clean_up(families: Collection[Family] = (4, 6), prefix: Sequence[str] = ()) -> None:
    """Remove the tables, also those of a kube-proxy. Without nft there are none."""
    if which(NFT) is None:
        return
    nft = Nft((0, 0, 0), (999, 0), tuple(prefix))
    failure: ApplyError | None = None
    for family in families:
        try:
            await nft.apply(f"delete table {WORD[family]} {TABLE}\n")
        except ApplyError as e:
            if any(sign in e.stderr for sign in ("No such file", "not supported")):
                continue
            log.error("clean-up: %s", e)
            failure = failure or e
    if failure is not None:
        raise failure


async def find_leftovers(
    families: Collection[Family] = (4, 6), prefix: Sequence[str] = ()
) -> list[str]:
    """Return the tables of this mode that are there: "ip kube-proxy"."""
    if which(NFT) is None:
        return []
    argv = Nft((0, 0, 0), (999, 0), tuple(prefix))._argv("list", "tables")
    status, output, _ = await run_program(NFT, argv, READ_TIMEOUT)
    with output:
        there = output.read().decode("utf-8", "replace").splitlines() if status == 0 else []
    ours = [f"{WORD[family]} {TABLE}" for family in families]
    return [one for one in ours if f"table {one}" in there]


class _Tally:
    """kube-proxy's numbers about this mode (reference 1.15), and ours."""

    def __init__(self, metrics: Metrics, family: str) -> None:
        prefix = "kubeproxy_sync_proxy_rules_nftables"
        self.family = family
        self._failures = metrics.counter(
            f"{prefix}_sync_failures_total", "Transactions that failed.", ("ip_family",)
        ).labels(family)
        self._cleanup_failures = metrics.counter(
            f"{prefix}_cleanup_failures_total",
            "Deletions of unused chains that failed.",
            ("ip_family",),
        ).labels(family)
        self._refused = metrics.gauge(
            "kdns_proxy_services_refused",
            "Services left out, because a rule of theirs is refused.",
            ("ip_family",),
        ).labels(family)
        self._total = metrics.gauge(
            "kdns_proxy_nftables_total",
            "What our table holds, by kind: chains, rules, elements.",
            ("ip_family", "kind"),
        )

    def failed(self) -> None:
        self._failures.add()

    def failed_cleanup(self) -> None:
        self._cleanup_failures.add()

    def total(self, rules: NftablesRules, refused: int) -> None:
        self._refused.set(refused)
        for kind, count in rules.counts().items():
            self._total.labels(self.family, kind).set(count)
