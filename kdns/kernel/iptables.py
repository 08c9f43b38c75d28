"""The iptables dataplane of one family: what the kernel holds is made what is wanted.

Decides what to read, what to write and in how many transactions, and finds what somebody
else changed; never touches chains, rules or tables that are not ours. The text of the rules
is proxy/iptables.py's, when to do all this is sync.py's, running programs is programs.py's.

A full sync writes each table in one transaction, the jumps to our chains with the chains: a
fresh node never sends a packet into a chain half filled, and a restart over existing rules
leaves no gap that a connection could meet. iptables-nft takes more than linear time for many
chains at once; there the per-service chains go before the chains that lead to them, in several
transactions, two of them at a time (reference 5.2). Legacy rewrites its whole table each time:
there, one.
"""

from __future__ import annotations

import asyncio
import logging
import re
import shlex
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from typing import BinaryIO, Protocol

from kdns.errors import ApplyError
from kdns.kernel.generation import nft_generation
from kdns.kernel.programs import Programs, find_variants
from kdns.kernel.refusals import Refusals, tell_changed
from kdns.metrics import Metrics
from kdns.proxy import iptables
from kdns.proxy.iptables import SERVICE_CHAINS, Entry, RuleSet
from kdns.proxy.options import Family, Options
from kdns.proxy.table import ForwardingTable
from kdns.registry.objects import Key

log = logging.getLogger("kdns.proxy")

CANARY = "KUBE-PROXY-CANARY"
CANARY_TABLES = ("mangle", "nat", "filter")
KUBELET_CHAINS = ("KUBE-KUBELET-CANARY", "KUBE-IPTABLES-HINT")
FIREWALL = "KUBE-FIREWALL"

# Reference 1.12: what a clean-up removes besides the per-service chains.
OUR_CHAINS: Mapping[str, frozenset[str]] = {
    "mangle": frozenset({CANARY}),
    "filter": frozenset(
        "KUBE-SERVICES KUBE-EXTERNAL-SERVICES KUBE-FORWARD KUBE-NODEPORTS KUBE-PROXY-FIREWALL"
        f" {CANARY}".split()
    ),
    "nat": frozenset(
        f"KUBE-SERVICES KUBE-NODEPORTS KUBE-POSTROUTING KUBE-MARK-MASQ {CANARY}".split()
    ),
}

# Rules in one transaction of iptables-nft. Above LARGE it takes more than linear time; a CHUNK
# of 800 or 4,000 rules was no faster (5,000 Services, iptables 1.8.9).
LARGE = 4000
CHUNK = 2000
# Transactions of per-service chains at a time. They have no chain in common, and a program whose
# transaction the kernel puts off because of another's begins it again by itself. Two take 1.9 s
# where one takes 2.9 s (10,000 Services of two endpoints, iptables 1.8.9), three no less.
WRITERS = 2
_DOTTED = re.compile(r"::((?:[0-9]{1,3}\.){3}[0-9]{1,3})\b")

FAMILY_LABEL: Mapping[Family, str] = {4: "IPv4", 6: "IPv6"}


class Rules(Protocol):
    """What is used of proxy/iptables.py's IptablesRules."""

    def update(
        self,
        table: ForwardingTable,
        changed: Collection[Key] | None,
        without: Collection[Key] = ...,
    ) -> None: ...
    def owner(self, line: str) -> Key | None: ...
    def full(
        self, stale: Iterable[str] = (), entry: Entry = ..., stay: Collection[str] = ...
    ) -> str: ...
    def chunks(
        self,
        services: int,
        stale: Iterable[str] = (),
        entry: Entry = ...,
        stay: Collection[str] = ...,
    ) -> Iterator[str]: ...
    def partial(self) -> str: ...
    def committed(self) -> None: ...
    def wanted(self) -> RuleSet: ...
    def counts(self) -> Mapping[str, int]: ...
    @property
    def service_chains(self) -> Collection[str]: ...


@dataclass(slots=True)
class Held:
    """What a full sync or a clean-up must know of the kernel's rules.

    leading -- (table, chain, rule) of rules outside our chains that jump to one of ours, as
               iptables-save prints them
    chains  -- by table: those of ours, per-service ones among them
    firewall -- the rules of KUBE-FIREWALL, where there is one
    kubelet -- kubelet's chains are there: KUBE-FIREWALL is its as well
    """

    leading: list[tuple[str, str, str]] = field(default_factory=list)
    chains: dict[str, set[str]] = field(default_factory=dict)
    firewall: list[str] | None = None
    kubelet: bool = False

    @property
    def per_service(self) -> list[str]:
        """The per-service chains of the nat table, sorted."""
        return sorted(c for c in self.chains.get("nat", ()) if c.startswith(SERVICE_CHAINS))

    @property
    def led_to(self) -> frozenset[str]:
        """Those of them that a rule of somebody else leads to."""
        targets = {target_of(rule) for table, _, rule in self.leading if table == "nat"}
        return frozenset(one for one in targets if one.startswith(SERVICE_CHAINS))


class IptablesDataplane:
    """Writes one family's rules with one variant of the programs.

    One call at a time: sync.py's loop sees to it. Every method raises ApplyError. A Service with
    a rule that iptables refuses is left out, told of, and tried again later.

    rules      -- for tests; what renders the rules
    generation -- nf_tables' present number, or None; asked in the programs' own namespace
    clock      -- monotonic seconds
    """

    def __init__(
        self,
        programs: Programs,
        options: Options,
        metrics: Metrics | None = None,
        rules: Rules | None = None,
        generation: Callable[[], int | None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.programs = programs
        self._rules: Rules = iptables.IptablesRules(options) if rules is None else rules
        self._jumps = iptables.jumps(options)
        self._fills_firewall = FIREWALL in iptables.fixed_chains(options)["filter"]
        self._tally = _Tally(metrics or Metrics(), FAMILY_LABEL[options.family])
        if generation is None and programs.variant == "nft" and not programs.prefix:
            generation = nft_generation
        self._generation = generation or (lambda: None)
        self._refused = Refusals(FAMILY_LABEL[options.family], clock)
        self._writers = WRITERS
        self._stay: frozenset[str] = frozenset()  # chains not wanted that cannot go
        self._known = False  # the kernel holds what the rules were last committed as
        self._rendered = False  # the rules follow the table; False after a bug in rendering
        self._written = False  # something was written: or found there: there is something to verify
        self._exact = True  # this iptables prints rules as we write them
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
            await asyncio.to_thread(self._render, table, changed)
            if full or not await self._write_partial():
                await self._write_accepted(table)
        except ApplyError as e:
            self._tally.failed(full, e)
            raise
        self._known = True
        self._tally.total(self._rules.counts(), len(self._refused))

    def _render(self, table: ForwardingTable, changed: Collection[Key]) -> None:
        known, self._rendered = self._rendered, False
        changed = {*changed, *self._refused.take_back(table, changed)}
        self._rules.update(table, changed if known else None, self._refused)
        self._rendered = True

    async def _write_partial(self) -> bool:
        """Write the difference; False, and nothing is written, if it is better done in chunks."""
        text = await asyncio.to_thread(self._rules.partial)
        if self.programs.variant == "nft" and text.count("\n-A ") > LARGE:
            return False
        written = self._tally.written
        written.clear()
        if text:
            await self._restore(text)
        self._rules.committed()
        return True

    async def _write_accepted(self, table: ForwardingTable) -> None:
        """Write all, but for Services with a rule that iptables refuses."""

        async def spell_without(key: Key) -> None:
            await asyncio.to_thread(self._rules.update, table, (key,), self._refused)

        await self._refused.write_accepted(
            lambda: self._write_full(table), self._rules.owner,
            lambda e: self._tally.failed(True, e), spell_without,
        )  # fmt: skip

    async def _write_full(self, table: ForwardingTable) -> None:
        rules = self._rules.counts().get("nat", 0)
        in_chunks = self.programs.variant == "nft" and rules > LARGE
        held, same = await self._read(compare=in_chunks)
        stale = held.per_service
        stay = held.led_to.difference(self._rules.service_chains)
        for chain in sorted(stay - self._stay):
            log.warning("nat %s stays, empty: a rule of somebody else leads to it", chain)
        self._stay = stay
        self._tally.written.clear()
        entry = entry_lines(self._jumps, held, self._fills_firewall)
        if same:
            # As after a restart: to write in chunks what is there takes ten times as long.
            if entry:
                await self._restore(iptables.render_entry(entry))
        elif in_chunks:
            services = max(1, CHUNK * len(table.services) // rules)
            await self._write_chunks(self._rules.chunks(services, stale, entry, stay))
        else:
            await self._restore(await asyncio.to_thread(self._rules.full, stale, entry, stay))
        self._rules.committed()
        self._written = True
        if self._doubt or not self._exact:
            self._exact = not await self._differences(exact=True)
            self._doubt = False
            if not self._exact:
                log.info("%s prints rules in its own way: targets are compared", self.programs)

    async def _write_chunks(self, texts: Iterator[str]) -> None:
        """Write `texts`: the first and the last one alone, those between WRITERS at a time.

        Each is rendered while those before it are written. Where one fails, those under way
        are stopped, which undoes them, and the last, which leads to all, is never written.
        """
        text = await _next(texts)
        following = await _next(texts)
        if following:  # the others need the first
            await self._restore(text)
            text, following = following, await _next(texts)
        writers: set[asyncio.Task[None]] = set()
        try:
            while following:
                writers = await _until_left(writers, self._writers - 1)
                writers.add(asyncio.create_task(self._restore(text)))
                text, following = following, await _next(texts)
            await _until_left(writers, 0)
        except ApplyError:
            self._writers = 1  # should two at a time be what this iptables fails at
            raise
        finally:
            for writer in writers:
                writer.cancel()
            await asyncio.gather(*writers, return_exceptions=True)
        await self._restore(text)

    async def _restore(self, text: str) -> None:
        self._written = True
        await self.programs.restore(text)
        self._tally.wrote(text)

    async def _read(self, compare: bool) -> tuple[Held, bool]:
        """Return what the kernel holds, and with `compare` whether our chains are as wanted."""
        with await self.programs.save() as lines:
            held = await asyncio.to_thread(parse_held, lines)
            if not compare or not held.per_service:
                return held, False
            lines.seek(0)
            wanted = self._rules.wanted()
            found = await asyncio.to_thread(find_differences, lines, wanted, {}, True, ())
            return held, not found

    # --- verifying --------------------------------------------------------------------

    async def verify(self) -> bool:
        """Say whether our chains, the jumps to them and the canaries are as they were written.

        What differs is logged. True before the first write.
        """
        if not self._written:
            return True
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
        with await self.programs.save() as lines:
            wanted = self._rules.wanted()
            return await asyncio.to_thread(
                find_differences, lines, wanted, self._jumps, exact, CANARY_TABLES, self._stay
            )

    # --- leaving ----------------------------------------------------------------------

    async def cleanup(self) -> None:
        """Remove all that is ours, of this variant; what is not there is no error."""
        self._known = False
        await clean_up(self.programs, self._jumps)
        self._written = False


async def cleanup_all(families: Collection[Family] = (4, 6), prefix: Iterable[str] = ()) -> None:
    """Remove all that is ours from every installed variant, also that of a kube-proxy.

    Goes on after a failure, and raises the first at the end. Kernels without a family or a
    variant hold nothing there.
    """
    failure: ApplyError | None = None
    for family in families:
        jumps = iptables.jumps(Options(family=family))
        for programs in (await find_variants(family, tuple(prefix))).values():
            try:
                await clean_up(programs, jumps)
            except ApplyError as e:
                log.error("clean-up: %s", e)
                failure = failure or e
    if failure is not None:
        raise failure


async def clean_up(programs: Programs, jumps: RuleSet) -> None:
    """Remove what is ours from the tables of one variant, each in one transaction."""
    try:
        output = await programs.save()
    except ApplyError as e:
        # No such tables in this kernel, or not for us to read: then nor were they written.
        log.info("clean-up: %s", e)
        return
    with output:
        held = await asyncio.to_thread(parse_held, output)
    for text in render_cleanup(jumps, held):
        await programs.restore(text)


def _next(texts: Iterator[str]) -> Awaitable[str]:
    """Return the next text; "" if there is none."""
    return asyncio.to_thread(next, texts, "")


async def _until_left(writers: set[asyncio.Task[None]], most: int) -> set[asyncio.Task[None]]:
    """Wait until at most `most` are left; return these. Raises what one of the others raised."""
    while len(writers) > most:
        done, writers = await asyncio.wait(writers, return_when=asyncio.FIRST_COMPLETED)
        for writer in done:
            writer.result()
    return writers


# --- reading -------------------------------------------------------------------------


def parse_held(lines: BinaryIO) -> Held:
    """Read what iptables-save prints, keeping only what leads to our chains and their names."""
    held, table = Held(), ""
    for line in _decoded(lines):
        if line.startswith(":"):
            chain = line[1 : line.index(" ")]
            if is_ours(table, chain):
                held.chains.setdefault(table, set()).add(chain)
            elif chain in KUBELET_CHAINS:
                held.kubelet = True
            elif (table, chain) == ("filter", FIREWALL):
                held.firewall = []
        elif line.startswith("-A "):
            _, chain, rule = line.split(" ", 2) if line.count(" ") > 1 else (*line.split(" "), "")
            if is_ours(table, chain):
                continue
            if (table, chain) == ("filter", FIREWALL) and held.firewall is not None:
                held.firewall.append(rule)
            target = target_of(rule)
            if is_ours(table, target) or (table, target) == ("filter", FIREWALL):
                held.leading.append((table, chain, rule))
        elif line.startswith("*"):
            table = line[1:]
    return held


def find_differences(
    lines: BinaryIO,
    wanted: RuleSet,
    jumps: RuleSet,
    exact: bool,
    canaries: Collection[str] = CANARY_TABLES,
    stay: Collection[str] = (),
) -> list[str]:
    """Compare what iptables-save prints with what should be there; name each chain that differs.

    exact -- compare the text of rules, else only how many there are and their targets. The
             lines are looked at one by one: at 80,000 rules nothing bigger than a line is held
    canaries -- the tables that must hold one
    stay     -- per-service chains that may be there though not wanted
    """
    comparison = _Comparison(wanted, jumps, exact, stay)
    comparison.absent.update((table, CANARY) for table in canaries)
    for line in _decoded(lines):
        comparison.look(line)
    return comparison.result()


class _Comparison:
    """Goes through what iptables-save prints: tables, their chains, then rules by chain."""

    def __init__(self, wanted: RuleSet, jumps: RuleSet, exact: bool, stay: Collection[str]) -> None:
        self._exact = exact
        self._stay = stay
        self._wanted = wanted
        # Chains to come, those with rules to come, and single rules to come in chains that
        # are not ours alone.
        self.absent = {(table, chain) for table in wanted for chain in wanted[table]}
        self._empty = {
            (table, chain) for table in wanted for chain, rules in wanted[table].items() if rules
        }
        self._single = {
            (table, chain, tokens(rule))
            for table in jumps
            for chain, rules in jumps[table].items()
            for rule in rules
        }
        shared = ("filter", FIREWALL)
        self._single.update(
            (*shared, tokens(rule)) for rule in wanted.get("filter", {}).get(FIREWALL, ())
        )
        self._empty.discard(shared)
        self._differ: list[str] = []
        self._table = ""
        self._chains: Mapping[str, tuple[str, ...]] = {}
        self._chain = ""
        self._start = f"-A {self._chain} "
        self._rules: tuple[str, ...] | None = None  # of the chain; None: it is not ours
        self._at = 0

    def look(self, line: str) -> None:
        if line.startswith("-A "):
            if not line.startswith(self._start):
                self._enter(line.split(" ", 2)[1])
            self._rule(line[len(self._start) :])
        elif line.startswith(":"):
            self._declared(line[1 : line.index(" ")])
        elif line.startswith("*"):
            self._table = line[1:]
            self._chains = self._wanted.get(self._table, {})
        elif line == "COMMIT":
            self._enter("")

    def _enter(self, chain: str) -> None:
        if self._rules is not None and self._at != len(self._rules):
            self._differ.append(
                f"{self._table} {self._chain}: {self._at} rules instead of {len(self._rules)}"
            )
        self._chain, self._start, self._at = chain, f"-A {chain} ", 0
        shared = (self._table, chain) == ("filter", FIREWALL)
        self._rules = None if shared else self._chains.get(chain)
        self._empty.discard((self._table, chain))

    def _rule(self, rule: str) -> None:
        rules, at = self._rules, self._at
        self._at += 1
        if rules is None:
            if self._single and (self._chain == FIREWALL or " KUBE-" in rule):
                self._single.discard((self._table, self._chain, tokens(rule)))
        elif at < len(rules) and not (rule == rules[at] or self._same(rule, rules[at])):
            self._differ.append(f"{self._table} {self._chain}: rule {at + 1} is another")

    def _same(self, found: str, wanted: str) -> bool:
        if self._exact:
            return respelt(found) == wanted
        return target_of(found) == target_of(wanted)

    def _declared(self, chain: str) -> None:
        self.absent.discard((self._table, chain))
        if chain in self._chains or chain in self._stay:
            return
        if self._table == "nat" and chain.startswith(SERVICE_CHAINS):
            self._differ.append(f"nat {chain}: not wanted any more")

    def result(self) -> list[str]:
        return [
            *(f"{table} {chain}: gone" for table, chain in sorted(self.absent)),
            *(
                f"{table} {chain}: no rule {' '.join(r)}"
                for table, chain, r in sorted(self._single)
            ),
            *(f"{table} {chain}: empty" for table, chain in sorted(self._empty - self.absent)),
            *self._differ,
        ]


def is_ours(table: str, chain: str) -> bool:
    """Say whether a chain is the proxy's; KUBE-FIREWALL, shared with kubelet, is not."""
    return chain in OUR_CHAINS.get(table, ()) or (
        table == "nat" and chain.startswith(SERVICE_CHAINS)
    )


def is_our_firewall(rules: Collection[str]) -> bool:
    """Say whether KUBE-FIREWALL holds what we write there, which for IPv6 is nothing."""
    ours = iptables.IptablesRules(Options()).wanted()["filter"].get(FIREWALL, ())
    return sorted(map(tokens, rules)) in ([], sorted(map(tokens, ours)))


def target_of(rule: str) -> str:
    """Return the chain or target a rule ends in; "" if it has none."""
    for option in (" -j ", " -g "):
        _, found, rest = f" {rule}".rpartition(option)
        if found:
            return rest.split(" ", 1)[0]
    return ""


def respelt(rule: str) -> str:
    """Return a rule with its IPv6 addresses as we write them: glibc prints ::102:304, and what
    else begins with 96 bits of 0, as ::1.2.3.4, Python and Go do not."""
    return _DOTTED.sub(lambda match: str(IPv6Address(int(IPv4Address(match[1])))), rule)


def tokens(rule: str) -> tuple[str, ...]:
    """Return a rule's words sorted: versions of iptables print matches in different order."""
    try:
        return tuple(sorted(shlex.split(rule)))
    except ValueError:  # a comment with a quote in it, so none of ours
        return tuple(sorted(rule.split()))


def _decoded(lines: BinaryIO) -> Iterator[str]:
    for line in lines:
        yield line.rstrip(b"\n").decode("utf-8", "surrogateescape")


# --- rendering -----------------------------------------------------------------------


def entry_lines(jumps: RuleSet, held: Held, fills_firewall: bool) -> Entry:
    """Return the jumps and canaries that are missing, and KUBE-FIREWALL if it is and the rules
    (fills_firewall) do not make it.

    Each jump is inserted on top, the last first: so a fresh node ends in the order of `jumps`
    (reference 1.3). One that is there stays where it is.
    """
    there = {(table, chain, tokens(rule)) for table, chain, rule in held.leading}
    entry = {}
    for table in CANARY_TABLES:
        chains = [] if CANARY in held.chains.get(table, ()) else [CANARY]
        if table == "filter" and held.firewall is None and not fills_firewall:
            # Jumped to whatever the options, and not among our chains where it stays empty.
            chains.append(FIREWALL)
        inserted = [
            f"-I {chain} {rule}\n"
            for chain, rules in jumps.get(table, {}).items()
            for rule in reversed(rules)
            if (table, chain, tokens(rule)) not in there
        ]
        if chains or inserted:
            declared = [f":{chain} - [0:0]\n" for chain in chains]
            entry[table] = "".join(declared), "".join(inserted)
    return entry


def render_cleanup(jumps: RuleSet, held: Held) -> list[str]:
    """Return the restore texts that remove what is ours, the jumps to it first.

    A chain of ours that somebody else's rule leads to is emptied but stays: it cannot go
    before that rule. KUBE-FIREWALL is kubelet's too (reference 1.12); it goes only when its
    rules are those we write and kubelet has never been here.
    """
    chains = {table: set(names) for table, names in held.chains.items()}
    if held.firewall is not None and not held.kubelet and is_our_firewall(held.firewall):
        chains.setdefault("filter", set()).add(FIREWALL)
    known = {
        (table, chain, tokens(rule))
        for table, by_chain in jumps.items()
        for chain, rules in by_chain.items()
        for rule in rules
    }
    texts = []
    for table, names in chains.items():
        drop, stay = [], set()
        for where, chain, rule in held.leading:
            target = target_of(rule)
            if where != table or target not in names:
                continue
            if (table, chain, tokens(rule)) in known:
                drop.append(f"-D {chain} {rule}")
            else:
                stay.add(target)
                log.warning(
                    "clean-up: %s %s stays, empty: a rule of somebody else in %s leads to it",
                    table, target, chain,
                )  # fmt: skip
        flush = [f":{name} - [0:0]" for name in sorted(names)]
        remove = [f"-X {name}" for name in sorted(names - stay)]
        texts.append("\n".join((f"*{table}", *flush, *drop, *remove, "COMMIT", "")))
    return texts


# --- counting ------------------------------------------------------------------------


class _Tally:
    """kube-proxy's numbers about iptables (reference 1.15), and ours.

    written -- rules in the texts of this sync, by table
    """

    def __init__(self, metrics: Metrics, family: str) -> None:
        prefix = "kubeproxy_sync_proxy_rules_iptables"
        self.family = family
        self.written: dict[str, int] = {}
        labels = ("ip_family", "table")
        self._total = metrics.gauge(f"{prefix}_total", "Rules that our chains hold.", labels)
        self._last = metrics.gauge(f"{prefix}_last", "Rules written by the last sync.", labels)
        self._failures = metrics.counter(
            f"{prefix}_restore_failures_total", "Syncs that failed.", ("ip_family",)
        ).labels(family)
        self._partial_failures = metrics.counter(
            f"{prefix}_partial_restore_failures_total", "Partial syncs that failed.", ("ip_family",)
        ).labels(family)
        self._refused = metrics.gauge(
            "kdns_proxy_services_refused",
            "Services left out, because iptables refuses a rule of theirs.",
            ("ip_family",),
        ).labels(family)
        self._locked = metrics.counter(
            "kdns_proxy_iptables_lock_failures_total",
            "Syncs that failed because another program held the lock.",
            ("ip_family",),
        ).labels(family)

    def failed(self, full: bool, error: ApplyError) -> None:
        self._failures.add()
        if not full:
            self._partial_failures.add()
        if error.busy:
            self._locked.add()

    def wrote(self, text: str) -> None:
        at = 0
        while (end := text.find("\nCOMMIT\n", at)) >= 0:
            table = text[at + 1 : text.index("\n", at)]
            rules = text.count("\n-A ", at, end) + text.count("\n-I ", at, end)
            self.written[table] = self.written.get(table, 0) + rules
            at = end + len("\nCOMMIT\n")

    def total(self, counts: Mapping[str, int], refused: int) -> None:
        self._refused.set(refused)
        for table, count in counts.items():
            self._total.labels(self.family, table).set(count)
            self._last.labels(self.family, table).set(self.written.get(table, 0))
