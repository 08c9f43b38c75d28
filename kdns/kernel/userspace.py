"""The userspace mode of one family: a local socket for each door, and the rules that lead there.

Decides which sockets are open, where, and what the kernel must be told, in which order: a door
opens before a rule leads to it, and closes once none does. What doors are and what rules say is
proxy/userspace.py's; carrying octets is userspace_tcp.py's and userspace_udp.py's.

With no root there are no rules: each Service port listens on a loopback address of its own, or
where `--portmap` says.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import itertools
import logging
import random
import socket
import struct
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from kdns.errors import ApplyError
from kdns.kernel.generation import nft_generation
from kdns.kernel.iptables import FAMILY_LABEL, find_differences, target_of, tokens
from kdns.kernel.programs import Programs, find_variants
from kdns.kernel.refusals import tell_changed
from kdns.kernel.userspace_poll import Poller
from kdns.kernel.userspace_relay import RelayCounts
from kdns.kernel.userspace_tcp import BACKLOG, TcpListener, TcpRelays, listen_tcp
from kdns.kernel.userspace_udp import IDLE, UdpCounts, UdpFlows, UdpListener, bind_udp
from kdns.metrics import Metrics
from kdns.proxy import userspace
from kdns.proxy.options import Family, Options, Protocol
from kdns.proxy.table import Decision, Forwarding, ForwardingTable, Verdict
from kdns.proxy.userspace import Affinity, Balancer, Door, Place, PortalRules, PortMap
from kdns.registry.endpoints import Endpoint
from kdns.registry.objects import Key
from kdns.runtime import raise_file_limit

log = logging.getLogger("kdns.proxy")

FAMILIES: Final[dict[Family, socket.AddressFamily]] = {4: socket.AF_INET, 6: socket.AF_INET6}
WILDCARD: Final[dict[Family, str]] = {4: "0.0.0.0", 6: "::"}
# Ports that are tried before a door stays shut; others have at most a few of them.
MOST_TRIED: Final = 64
AT_ONCE: Final = 32  # Services whose doors are opened before others get their turn
FIRST_UNPRIVILEGED: Final = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
SO_ATTACH_FILTER: Final = 26  # asm-generic/socket.h
# A place that cannot be had, now or ever: another one may be.
TAKEN: Final = frozenset({errno.EADDRINUSE, errno.EACCES, errno.EADDRNOTAVAIL})


class UserspaceProxy:
    """What both families share: the sockets, in the loop that made it.

    udp_idle -- seconds until a UDP flow is over (kube-proxy's udpIdleTimeout)
    """

    def __init__(self, metrics: Metrics | None = None, udp_idle: float = IDLE) -> None:
        self.metrics = metrics or Metrics()
        raise_file_limit()
        self.poller = Poller()
        self.tcp = TcpRelays(self.poller)
        self.udp = UdpFlows(self.poller, udp_idle)

    def close(self) -> None:
        """End every connection and flow."""
        self.tcp.close()
        self.udp.close()
        self.poller.close()


@dataclass(frozen=True, slots=True)
class Rootless:
    """Listen on loopback addresses, and ask nothing of the kernel.

    portmap -- where the Service ports named in it listen, and then only these do; None: all
               do, each Service on an address of its own
    lowest  -- the first port that this process may listen on; None: what the kernel says
    """

    portmap: PortMap | None = None
    lowest: int | None = None


@dataclass(frozen=True, slots=True)
class Mapping:
    """Where a Service port listens with no root; None: nowhere, `why` says why."""

    name: str
    protocol: Protocol
    place: Place | None
    why: str = ""

    def __str__(self) -> str:
        where = str(self.place) if self.place is not None else f"not listening: {self.why}"
        return f"{self.name}/{self.protocol} {where}"


# --- one door -------------------------------------------------------------------------------


class _Gate:
    """One open door: its socket, in the state that the decision asks for."""

    def __init__(self, proxy: UserspaceProxy, counts: _Counts, door: Door, place: Place) -> None:
        self.door = door
        self.place = place
        self.verdict: Verdict | None = None
        self._proxy = proxy
        self._counts = counts
        self._forwarding: Forwarding | None = None
        self._balancer: Balancer | None = None
        self._listener: TcpListener | UdpListener | None = None
        self._sock: socket.socket | None = None

    def update(self, one: Forwarding, decision: Decision, balancer: Balancer) -> None:
        """Do what was decided. Raises OSError if the place is not to be had."""
        self._forwarding, self._balancer = one, balancer
        balancer.replace(decision.endpoints)
        if decision.verdict != self.verdict:
            self.close()
            self._open(decision.verdict)
            self.verdict = decision.verdict
        if isinstance(self._listener, UdpListener):
            self._listener.keep_only({str(e) for e in one.serving})

    def _open(self, verdict: Verdict) -> None:
        address, port = self.place
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        tcp = self.door.protocol == "tcp"
        sock = (listen_tcp if tcp else bind_udp)(family, address, port)
        try:
            if verdict == "drop":
                _drop_all(sock)
            if tcp and verdict != "reject":
                sock.listen(BACKLOG)  # that bound it is to keep the port: what comes is refused
            if not tcp and verdict == "reject":
                # Only from itself: to all others the port is as good as closed.
                sock.connect(("::1" if family == socket.AF_INET6 else "127.0.0.1", port))
        except OSError:
            sock.close()
            raise
        self._sock = sock
        if verdict != "forward":
            return
        admit = self._admits if self.door.ranged else None
        if tcp:
            self._listener = TcpListener(
                sock, self._proxy.tcp, self._counts.tcp, self._choose, admit
            )
        else:
            self._listener = UdpListener(
                sock, self._proxy.udp, self._counts.udp, self._choose, admit,
                wildcard=address in WILDCARD.values(),
            )  # fmt: skip

    def close(self) -> None:
        """Let nobody in any more. TCP connections go on."""
        if self._listener is not None:
            self._listener.close()
            # Its port must be free at once, for a socket in another state.
            self._listener.sock.close()
            self._listener = None
        elif self._sock is not None:
            self._sock.close()
        self._sock, self.verdict = None, None

    def _choose(self, client: str, tried: Collection[str]) -> Endpoint | None:
        assert self._balancer is not None
        return self._balancer.choose(client, self._proxy.poller.time(), tried)

    def _admits(self, client: str) -> bool:
        return self._forwarding is not None and userspace.admits(self._forwarding, client)


@dataclass(frozen=True, slots=True)
class _Counts:
    tcp: RelayCounts
    udp: UdpCounts


def _drop_all(sock: socket.socket) -> None:
    """Have the kernel drop all that comes to a socket, without a word (a classic BPF program of
    one instruction: return 0)."""
    program = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 0))
    filter = struct.pack("@HP", 1, ctypes.addressof(program))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, filter)


# --- all doors of a family ------------------------------------------------------------------


class Gates:
    """The open doors of one family."""

    def __init__(
        self,
        options: Options,
        proxy: UserspaceProxy,
        rootless: Rootless | None,
        rng: random.Random,
    ) -> None:
        self._options = options
        self._proxy = proxy
        self._rootless = rootless
        self._rng = rng
        label = FAMILY_LABEL[options.family]
        self._counts = _Counts(
            RelayCounts(proxy.metrics, label, "tcp"), UdpCounts(proxy.metrics, label)
        )
        self._gates: dict[Door, _Gate] = {}
        self._of: dict[Key, tuple[Door, ...]] = {}
        self._affinity: dict[tuple[str, str], Affinity] = {}
        self._balancers: dict[Door, Balancer] = {}
        self._taken: set[tuple[Protocol, Place]] = set()
        self._retired: list[_Gate] = []
        self.shut: dict[Door, str] = {}  # why they cannot be opened
        self._lowest = rootless.lowest if rootless and rootless.lowest else _lowest_port()

    @property
    def ports(self) -> dict[Door, int]:
        """Where the doors are that rules may lead to."""
        return {door: gate.place.port for door, gate in self._gates.items()}

    def mappings(self) -> Iterator[Mapping]:
        """Yield where Service ports listen with no root, in order."""
        for door in sorted({*self._gates, *self.shut}):
            gate = self._gates.get(door)
            why = self.shut.get(door, "")
            yield Mapping(door.name, door.protocol, gate.place if gate else None, why)

    def update(self, table: ForwardingTable, keys: Iterable[Key]) -> None:
        """Open and change the doors of these Services; what is not wanted any more is closed
        by retire()."""
        for key in keys:
            wanted: dict[Door, tuple[Forwarding, Decision]] = {}
            for one in table.services.get(key, ()):
                wanted.update((door, (one, decision)) for door, decision in self._doors(one))
            for door in self._of.get(key, ()):
                if door not in wanted:
                    self._retire(door)
            for door, (one, decision) in wanted.items():
                self._open(door, one, decision)
            if wanted:
                self._of[key] = tuple(wanted)
            else:
                self._of.pop(key, None)

    def known(self) -> Collection[Key]:
        return self._of.keys()

    def _doors(self, one: Forwarding) -> Iterable[tuple[Door, Decision]]:
        if self._rootless is None:
            return userspace.doors(one, self._options).items()
        if one.protocol not in userspace.PROTOCOLS:
            return ()
        portmap = self._rootless.portmap
        if portmap is not None:
            place = portmap.get((one.name, one.protocol))
            if place is None or (":" in place.address) != (self._options.family == 6):
                return ()
        return (userspace.inner_door(one),)

    def _open(self, door: Door, one: Forwarding, decision: Decision) -> None:
        balancer = self._balancer(door, one)
        gate = self._gates.get(door)
        if gate is not None:
            try:
                gate.update(one, decision, balancer)
                return
            except OSError:
                # Somebody took the port while the socket was exchanged.
                self._forget(door, gate)
        why = ""
        for place in itertools.islice(self._places(door, one), MOST_TRIED):
            if (door.protocol, place) in self._taken:
                continue
            gate = _Gate(self._proxy, self._counts, door, place)
            try:
                gate.update(one, decision, balancer)
            except OSError as e:
                gate.close()
                why = f"{place}: {e.strerror or e}"
                if e.errno in TAKEN:
                    continue
                break
            self._gates[door] = gate
            self._taken.add((door.protocol, place))
            self.shut.pop(door, None)
            return
        if self.shut.get(door) != why:
            log.error("Service port %s/%s is not forwarded: %s", door.name, door.protocol, why)
        self.shut[door] = why

    def _balancer(self, door: Door, one: Forwarding) -> Balancer:
        name = (door.name, door.protocol)
        affinity = self._affinity.get(name)
        if affinity is None or affinity.seconds != one.affinity:
            affinity = self._affinity[name] = Affinity(one.affinity)
        balancer = self._balancers.get(door)
        if balancer is None:
            balancer = self._balancers[door] = Balancer(affinity, self._rng)
        balancer.affinity = affinity
        return balancer

    def _places(self, door: Door, one: Forwarding) -> Iterator[Place]:
        family = self._options.family
        if self._rootless is None:
            for port in userspace.preferred_ports(door, family):
                yield Place(WILDCARD[family], port)
        elif self._rootless.portmap is not None:
            yield self._rootless.portmap[one.name, one.protocol]
        else:
            yield from userspace.loopback_places(one, family, self._lowest)

    def _retire(self, door: Door) -> None:
        self.shut.pop(door, None)
        self._balancers.pop(door, None)
        gate = self._gates.get(door)
        if gate is not None:
            self._forget(door, gate)
            self._retired.append(gate)
        if not any((d.name, d.protocol) == door[:2] for d in self._balancers):
            self._affinity.pop(door[:2], None)

    def _forget(self, door: Door, gate: _Gate) -> None:
        del self._gates[door]
        self._taken.discard((door.protocol, gate.place))

    def retire(self) -> None:
        """Close what no rule leads to any more."""
        for gate in self._retired:
            gate.close()
        self._retired.clear()

    def close(self) -> None:
        """Close all doors. TCP connections go on."""
        for door, gate in list(self._gates.items()):
            self._forget(door, gate)
            gate.close()
        self.retire()
        self._of.clear()
        self._balancers.clear()
        self._affinity.clear()
        self.shut.clear()


def _batches(keys: list[Key]) -> Iterator[list[Key]]:
    for start in range(0, len(keys), AT_ONCE):
        yield keys[start : start + AT_ONCE]


def _lowest_port() -> int:
    """Return the first port that needs no privilege."""
    try:
        return int(FIRST_UNPRIVILEGED.read_text())
    except (OSError, ValueError):
        return 1024


# --- the dataplane --------------------------------------------------------------------------


class UserspaceDataplane:
    """Forwards one family's traffic through this process.

    One call at a time: sync.py's loop sees to it, in the event loop that `proxy` was made in.
    Every method raises ApplyError.

    programs -- that write the rules; None: `rootless`, no rules
    proxy    -- what carries the octets; share it between families
    address  -- the node's, that its own processes are led to; "": a loopback address
    rng      -- for tests
    """

    def __init__(
        self,
        programs: Programs | None,
        options: Options,
        metrics: Metrics | None = None,
        *,
        proxy: UserspaceProxy | None = None,
        rootless: Rootless | None = None,
        address: str = "",
        generation: Callable[[], int | None] | None = None,
        rng: random.Random | None = None,
    ) -> None:
        if (programs is None) != (rootless is not None):
            raise ValueError("either programs that write rules, or rootless")
        self.programs = programs
        self.proxy = proxy or UserspaceProxy(metrics)
        self._owns_proxy = proxy is None
        self._family = options.family
        self._gates = Gates(options, self.proxy, rootless, rng or random.Random())
        self._rules = PortalRules(options, address)
        self._jumps = userspace.jumps(options)
        self._tally = _Tally(metrics or Metrics(), FAMILY_LABEL[options.family])
        if generation is None and programs and programs.variant == "nft" and not programs.prefix:
            generation = nft_generation
        self._generation = generation or (lambda: None)
        self._known = False  # the kernel holds what the rules were last committed as
        self._rendered = False  # the rules and doors follow the table
        self._written = False
        self._exact = True  # this iptables prints rules as we write them
        self._verified: int | None = None
        self._sctp_told: set[str] = set()

    def mappings(self) -> list[Mapping]:
        """Return where each Service port listens, for printing (rootless)."""
        return list(self._gates.mappings())

    # --- writing ----------------------------------------------------------------------

    async def sync(self, table: ForwardingTable, changed: Collection[Key], full: bool) -> None:
        """Bring doors and rules to `table`, of which `changed` is new since the last call."""
        full = full or not self._known
        self._known = False
        keys = changed
        if full or not self._rendered:
            keys = table.services.keys() | self._gates.known()
        self._rendered = False
        for some in _batches(sorted(keys)):
            self._gates.update(table, some)
            await asyncio.sleep(0)  # a Service takes 0.1 ms: others have work to do, too
        self._tell_sctp(table, keys)
        if self.programs is None:
            self._gates.retire()
        else:
            await asyncio.to_thread(
                self._rules.update, table, None if full else keys, self._gates.ports
            )
            await self._write(self.programs, full)
        self._rendered = self._known = True
        self._tally.total(dict(self._rules.counts()))

    async def _write(self, programs: Programs, full: bool) -> None:
        try:
            if full:
                await self._write_full(programs)
            else:
                text = await asyncio.to_thread(self._rules.partial)
                self._tally.written.clear()
                if text:
                    await self._restore(programs, text)
                self._rules.committed()
        except ApplyError:
            self._tally.failed(full)
            raise
        self._gates.retire()  # no rule leads there now

    async def _write_full(self, programs: Programs) -> None:
        with await programs.save() as lines:
            leading = await asyncio.to_thread(read_leading, lines)
        there = {(one.table, one.chain, tokens(one.rule)) for one in leading}
        missing = {
            (table, chain, rule)
            for table, chains in self._jumps.items()
            for chain, rules in chains.items()
            for rule in rules
            if (table, chain, tokens(rule)) not in there
        }
        self._tally.written.clear()
        more = userspace.jump_lines(self._jumps, missing)
        await self._restore(programs, self._rules.full(more))
        self._rules.committed()
        self._exact = True
        if await self._differences(programs):
            self._exact = False
            if not await self._differences(programs):
                log.info("%s prints rules in its own way: targets are compared", programs)

    async def _restore(self, programs: Programs, text: str) -> None:
        self._written = True
        await programs.restore(text)
        self._tally.wrote(text)

    def _tell_sctp(self, table: ForwardingTable, keys: Iterable[Key]) -> None:
        for key in keys:
            for one in table.services.get(key, ()):
                if one.protocol not in userspace.PROTOCOLS and one.name not in self._sctp_told:
                    self._sctp_told.add(one.name)
                    log.warning(
                        "Service port %s is not forwarded: userspace mode has no %s",
                        one.name, one.protocol.upper(),
                    )  # fmt: skip

    # --- verifying --------------------------------------------------------------------

    async def verify(self) -> bool:
        """Say whether doors and rules are as they should be; log what is not."""
        if self._gates.shut:
            return False  # time for another try
        if not self._written or self.programs is None:
            return True
        generation = self._generation()
        if generation is not None and generation == self._verified:
            return True
        found = await self._differences(self.programs)
        if found:
            tell_changed("rules", found)
            return False
        # Only a number that held all the while vouches for what was read.
        self._verified = generation if self._generation() == generation else None
        return True

    async def _differences(self, programs: Programs) -> list[str]:
        with await programs.save() as lines:
            return await asyncio.to_thread(
                find_differences, lines, self._rules.wanted(), self._jumps, self._exact, ()
            )

    # --- leaving ----------------------------------------------------------------------

    async def cleanup(self) -> None:
        """Remove the rules, then close the doors; established connections go on."""
        self._known = False
        if self.programs is not None:
            await clean_up(self.programs)
        self._written = False
        self._gates.close()

    def close(self) -> None:
        """Close the doors and, if nobody shares them, all connections. Rules stay."""
        self._gates.close()
        if self._owns_proxy:
            self.proxy.close()


# --- what the kernel holds -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Leading:
    """A rule outside our chains that leads to one of them; or, without a chain, that there is
    one. rule -- as iptables-save prints it"""

    table: str
    target: str
    chain: str = ""
    rule: str = ""


def read_leading(lines: BinaryIO) -> list[Leading]:
    """Read from what iptables-save prints which of our chains there are, and what leads there."""
    found: list[Leading] = []
    table = ""
    ours: tuple[str, ...] = ()
    for raw in lines:
        line = raw.decode("utf-8", "surrogateescape").rstrip("\n")
        if line.startswith("*"):
            table = line[1:]
            ours = userspace.CHAINS.get(table, ())
        elif line.startswith(":"):
            chain = line[1 : line.index(" ")]
            if chain in ours:
                found.append(Leading(table, chain))
        elif line.startswith("-A ") and ours:
            _, chain, rule = (*line.split(" ", 2), "")[:3]
            if chain not in ours and (target := target_of(rule)) in ours:
                found.append(Leading(table, target, chain, rule))
    return found


async def clean_up(programs: Programs) -> None:
    """Remove our chains and the jumps to them, each table in one transaction."""
    try:
        output = await programs.save()
    except ApplyError as e:
        # No such tables in this kernel, or not for us to read: then nor were they written.
        log.info("clean-up: %s", e)
        return
    with output:
        leading = await asyncio.to_thread(read_leading, output)
    for text in render_cleanup(leading):
        await programs.restore(text)


def render_cleanup(leading: Iterable[Leading]) -> list[str]:
    """Return the restore texts that remove what is ours, of whatever options it was written
    with. A chain that somebody else's rule leads to is emptied, but stays."""
    by_table: dict[str, list[Leading]] = {}
    for one in leading:
        by_table.setdefault(one.table, []).append(one)
    texts = []
    for table, held in by_table.items():
        chains = sorted({one.target for one in held if not one.chain})
        drop, stay = [], set()
        for one in held:
            if one.chain and _is_jump(one.rule):
                drop.append(f"-D {one.chain} {one.rule}")
            elif one.chain:
                stay.add(one.target)
                log.warning(
                    "clean-up: %s %s stays, empty: a rule of somebody else in %s leads to it",
                    table, one.target, one.chain,
                )  # fmt: skip
        flush = [f":{chain} - [0:0]" for chain in chains]
        remove = [f"-X {chain}" for chain in chains if chain not in stay]
        texts.append("\n".join((f"*{table}", *flush, *drop, *remove, "COMMIT", "")))
    return texts


def _is_jump(rule: str) -> bool:
    """Say whether a rule is a jump of ours: its comment is."""
    comments = ("handle ClusterIPs;", "handle service NodePorts;", "Ensure that non-local NodePort")
    return any(f'--comment "{comment}' in rule for comment in comments)


async def clean_up_all(families: Collection[Family] = (4, 6), prefix: Iterable[str] = ()) -> None:
    """Remove what the userspace mode wrote, ours or an old kube-proxy's, from every installed
    variant. Goes on after a failure, and raises the first at the end."""
    failure: ApplyError | None = None
    for family in families:
        for programs in (await find_variants(family, tuple(prefix))).values():
            try:
                await clean_up(programs)
            except ApplyError as e:
                log.error("clean-up: %s", e)
                failure = failure or e
    if failure is not None:
        raise failure


class _Tally:
    """kube-proxy's numbers about iptables, which this mode has in common.

    written -- rules in the texts of this sync, by table
    """

    def __init__(self, metrics: Metrics, family: str) -> None:
        prefix = "kubeproxy_sync_proxy_rules_iptables"
        self.written: dict[str, int] = {}
        self._family = family
        labels = ("ip_family", "table")
        self._total = metrics.gauge(f"{prefix}_total", "Rules that our chains hold.", labels)
        self._last = metrics.gauge(f"{prefix}_last", "Rules written by the last sync.", labels)
        self._failures = metrics.counter(
            f"{prefix}_restore_failures_total", "Syncs that failed.", ("ip_family",)
        ).labels(family)
        self._partial_failures = metrics.counter(
            f"{prefix}_partial_restore_failures_total", "Partial syncs that failed.", ("ip_family",)
        ).labels(family)

    def failed(self, full: bool) -> None:
        self._failures.add()
        if not full:
            self._partial_failures.add()

    def wrote(self, text: str) -> None:
        for section in text.split("COMMIT\n"):
            table, _, lines = section.partition("\n")
            if table:
                count = lines.count("-A ") + lines.count("-I ")
                self.written[table[1:]] = self.written.get(table[1:], 0) + count

    def total(self, counts: dict[str, int]) -> None:
        for table, count in counts.items():
            self._total.labels(self._family, table).set(count)
            self._last.labels(self._family, table).set(self.written.get(table, 0))
