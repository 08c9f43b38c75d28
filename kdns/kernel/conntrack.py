"""The kernel's connection tracking: reads flows, and deletes those that became stale.

Which ones are stale is proxy/conntrack.py's to say. Flows are read and deleted by our own
code and not pyroute2's: it takes 9 s to read 100,000 of them, this module 1 s, and 0.6 s to
delete them (`pytest -m bench tests/test_kernel_conntrack.py`).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import struct
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple, TypeAlias

from kdns.kernel.netlink import (
    NLM_F_DUMP_INTR,
    NLMSG_DONE,
    Netfilter,
    NetlinkError,
    attribute,
    attributes,
    local_networks,
    messages,
    nest,
)
from kdns.metrics import Metrics
from kdns.proxy.conntrack import (
    Destination,
    Flow,
    StaleCheck,
    compile_check,
    misled_frontends,
    node_port_networks,
)
from kdns.proxy.options import Family, Options
from kdns.proxy.table import ForwardingTable
from kdns.registry.objects import Key

log = logging.getLogger("kdns.conntrack")

# linux/netfilter/nfnetlink_conntrack.h; the high octet of a kind is the subsystem.
CT_GET, CT_DELETE = 0x101, 0x102
CTA_TUPLE_ORIG, CTA_TUPLE_REPLY, CTA_ID, CTA_ZONE, CTA_FILTER = 1, 2, 12, 18, 25
CTA_TUPLE_IP, CTA_TUPLE_PROTO = 1, 2
CTA_IP_SRC, CTA_IP_DST = {4: 1, 16: 3}, {4: 2, 16: 4}  # by the octets of an address
CTA_PROTO_NUM, CTA_PROTO_SRC_PORT, CTA_PROTO_DST_PORT = 1, 2, 3
CTA_FILTER_ORIG_FLAGS = 1
# net/netfilter/nf_conntrack_netlink.c: the parts of a tuple that a dump is filtered by.
BY_PROTOCOL, BY_DESTINATION_PORT = 1 << 3, 1 << 5
UDP = 17
ADDRESS_FAMILY = {4: 2, 6: 10}  # AF_INET, AF_INET6
_NFGEN = struct.Struct("=BBH")  # struct nfgenmsg: family, version, resource

# Up to so many ports are asked for one by one, each a walk through the kernel's table (30 ms
# at 262,144 buckets) that leaves out the flows to others; more than that, in one walk.
FEW_PORTS = 4
# A table that changes its size interrupts a dump; after so many the last one must do.
ATTEMPTS = 3
# Flows held at a time, some 400 octets each: of a million only those that go are looked at
# twice, so many at a time; and so often, lest it never ends where they come as fast.
MOST_HELD = 1 << 16
MOST_ROUNDS = 64
# Deletions sent at once: their answers, about 1 kB of memory each, fit a socket's buffer.
BATCH = 64

# Frontends of cleanings that failed, at most; beyond that their flows are left to end by
# themselves, as they do when nothing is sent for 2 minutes.
MOST_OWED = 1 << 14
# Seconds; kube-proxy's buckets for what it does in a sync (reference 1.15).
BUCKETS = tuple(0.001 * 2**n for n in range(15))


Chosen: TypeAlias = Callable[[Iterator[Flow]], Iterator[Flow]]


class Dump(NamedTuple):
    """Flows read. complete -- False: the table changed meanwhile, some may be missing."""

    flows: Sequence[Flow]
    complete: bool


class Cleaned(NamedTuple):
    """What became of a cleaning. complete -- False: some stale flows may be left."""

    deleted: int
    complete: bool


class FlowCleaner:
    """Deletes the stale flows of one family, after each sync of its rules.

    What failed is tried again with the next sync. A failure is told once, until it is another
    one or over.
    """

    def __init__(self, options: Options, metrics: Metrics) -> None:
        family = options.family
        self._options = options
        self._table = ForwardingTable(family)
        self._owed: frozenset[Destination] = frozenset()
        self._told = ""
        label = ("ip_family",)
        self._seconds = metrics.histogram(
            "kubeproxy_conntrack_reconciler_sync_duration_seconds",
            "Seconds that looking for stale flows took.",
            label,
            BUCKETS,
        ).labels(f"IPv{family}")
        self._deleted = metrics.counter(
            "kubeproxy_conntrack_reconciler_deleted_entries_total",
            "Stale flows deleted.",
            label,
        ).labels(f"IPv{family}")
        self._failures = metrics.counter(
            "kdns_conntrack_failures_total",
            "Times that stale flows could not be looked for, or only in part.",
            label,
        ).labels(f"IPv{family}")

    def note(self, table: ForwardingTable, changed: Collection[Key] | None) -> None:
        """Remember what to look at now that the kernel's rules say `table`. Cheap: for each
        sync, also where another follows before clean().

        changed -- Services that may differ from the table of the call before; None: all may
        """
        self._owed |= misled_frontends(self._table, table, changed)
        self._table = table

    async def clean(
        self, table: ForwardingTable | None = None, changed: Collection[Key] | None = ()
    ) -> Cleaned:
        """Delete the flows that are stale by the last table noted, or by `table`, noted first.

        Raises nothing for what the kernel refuses. Calls must not overlap; note() may come in
        between.
        """
        if table is not None:
            self.note(table, changed)
        owed, self._owed = self._owed, frozenset()
        if not owed:
            return Cleaned(0, True)
        check = compile_check(owed, self._table)
        start = time.perf_counter()
        try:
            cleaned = await asyncio.to_thread(clean_flows, self._options, check)
        except NetlinkError as e:
            self._failed(owed, f"{e}; UDP clients may go on to endpoints that are gone")
            return Cleaned(0, False)
        self._seconds.add(time.perf_counter() - start)
        self._deleted.add(cleaned.deleted)
        if cleaned.complete:
            self._told = ""
        else:
            self._failed(owed, "the table of flows changed too often while it was read")
        return cleaned

    def _failed(self, owed: frozenset[Destination], text: str) -> None:
        if len(owed | self._owed) <= MOST_OWED:
            self._owed |= owed
        self._failures.add()
        if text != self._told:
            log.warning("IPv%d: %s", self._options.family, text)
        self._told = text


def clean_flows(options: Options, check: StaleCheck) -> Cleaned:
    """Delete the flows that `check` calls stale; blocks. Raises NetlinkError."""
    node: Collection[str] = ()
    if check.node_ports:
        local = local_networks(options.family) if options.node_port_addresses is None else ()
        node = node_port_networks(options, local)
    deleted = 0
    for _ in range(MOST_ROUNDS):
        dump = dump_udp_flows(
            options.family, check.ports, lambda flows: check.stale(flows, node), MOST_HELD
        )
        if dump.flows:
            deleted += delete_flows(options.family, dump.flows)
        if len(dump.flows) < MOST_HELD:
            return Cleaned(deleted, dump.complete)
    return Cleaned(deleted, False)


def dump_udp_flows(
    family: Family,
    ports: Collection[int] | None = None,
    chosen: Chosen = iter,
    most: int | None = None,
) -> Dump:
    """Return the UDP flows whose original destination port is in `ports`; None: any port.

    chosen -- picks from what is read while it is read
    most   -- of these are enough, or more if ports are asked for one by one
    Raises NetlinkError.
    """
    if ports is None or len(ports) > FEW_PORTS:
        return retried(lambda: _dump(family, ports, None, chosen, most))
    dumps = [retried(partial(_dump, family, ports, port, chosen, most)) for port in sorted(ports)]
    return Dump([flow for one in dumps for flow in one.flows], all(one.complete for one in dumps))


def retried(attempt: Callable[[], Dump]) -> Dump:
    """Return the first complete dump of a few attempts, or the last one as it is."""
    for _ in range(ATTEMPTS - 1):
        dump = attempt()
        if dump.complete:
            return dump
    return attempt()


def _dump(
    family: Family,
    ports: Collection[int] | None,
    port: int | None,
    chosen: Chosen,
    most: int | None,
) -> Dump:
    with Netfilter("list UDP flows") as link:
        body = _NFGEN.pack(ADDRESS_FAMILY[family], 0, 0) + _filter(port)
        return collect_flows(link.dump(CT_GET, body), ports, chosen, most)


def _filter(port: int | None) -> bytes:
    """Return the attributes that ask for UDP flows only, to one port or to any.

    Kernels before 5.8 ignore them and give everything; collect_flows() looks itself.
    """
    flags, proto = BY_PROTOCOL, attribute(CTA_PROTO_NUM, bytes([UDP]))
    if port is not None:
        flags |= BY_DESTINATION_PORT
        proto += attribute(CTA_PROTO_DST_PORT, port.to_bytes(2, "big"))
    return nest(CTA_TUPLE_ORIG, nest(CTA_TUPLE_PROTO, proto)) + nest(
        CTA_FILTER, attribute(CTA_FILTER_ORIG_FLAGS, struct.pack("=I", flags))
    )


def delete_flows(family: Family, flows: Sequence[Flow]) -> int:
    """Delete the flows; return how many there were still. Raises NetlinkError.

    One that has ended meanwhile, or was made anew to another endpoint, is left alone. If the
    kernel refuses one, the others of its batch are deleted all the same.
    """
    deleted = 0
    head = _NFGEN.pack(ADDRESS_FAMILY[family], 0, 0)
    with Netfilter("delete UDP flows") as link:
        for first in range(0, len(flows), BATCH):
            batch = flows[first : first + BATCH]
            codes = link.tell(CT_DELETE, (head + flow.handle for flow in batch))
            deleted += codes.count(0)
            refused = next((code for code in codes if code not in (0, errno.ENOENT)), 0)
            if refused:
                raise NetlinkError(link.purpose, refused)
    return deleted


# --- reading -----------------------------------------------------------------------------------


def collect_flows(
    datagrams: Iterable[bytes],
    ports: Collection[int] | None = None,
    chosen: Chosen = iter,
    most: int | None = None,
) -> Dump:
    """Return the UDP flows in the datagrams of one dump, up to the message that ends it, or the
    first `most` of those that are `chosen`."""
    complete = False

    def read() -> Iterator[Flow]:
        nonlocal complete
        interrupted = False
        for datagram in datagrams:
            for one in messages(datagram):
                if one.flags & NLM_F_DUMP_INTR:
                    interrupted = True
                if one.kind == NLMSG_DONE:
                    # Its body is 0, or an errno if the kernel could not go on.
                    failed = any(datagram[one.start : one.start + 4])
                    complete = not (interrupted or failed)
                    return
                flow = parse_flow(datagram, one.start + _NFGEN.size, one.end, ports)
                if flow is not None:
                    yield flow

    flows = list(islice(chosen(read()), most))
    return Dump(flows, complete or len(flows) == most)


class _Tuple(NamedTuple):
    source: bytes
    destination: bytes
    protocol: int
    source_port: int
    destination_port: int


def parse_flow(
    octets: bytes, start: int, end: int, ports: Collection[int] | None = None
) -> Flow | None:
    """Return the flow whose attributes are octets[start:end]; None if it is not an UDP flow to
    one of `ports`, or not understood."""
    found = attributes(octets, start, end)
    if CTA_TUPLE_ORIG not in found or CTA_TUPLE_REPLY not in found:
        return None
    there = _parse_tuple(octets, *found[CTA_TUPLE_ORIG])
    if there is None or there.protocol != UDP:
        return None
    if ports is not None and there.destination_port not in ports:
        return None
    back = _parse_tuple(octets, *found[CTA_TUPLE_REPLY])
    if back is None:
        return None
    # The tuple of the replies and not the original one: that would also name a flow made anew
    # since, to a right endpoint (and so, at times, does the ID, which the kernel forms of the
    # original tuple and of where the flow lies in memory). The zone is part of the name.
    handle = b"".join(
        _whole(octets, *found[number])
        for number in (CTA_TUPLE_REPLY, CTA_ZONE, CTA_ID)
        if number in found
    )
    return Flow(
        "udp",
        there.source,
        there.source_port,
        there.destination,
        there.destination_port,
        back.source,
        back.source_port,
        handle,
    )


def _whole(octets: bytes, start: int, end: int) -> bytes:
    """Return an attribute with its head and padding, as it came."""
    return octets[start - 4 : end] + bytes((start - end) % 4)


def _parse_tuple(octets: bytes, start: int, end: int) -> _Tuple | None:
    shape = SHAPES.get(end - start)
    if shape is not None:
        mask, same, reader = shape
        if int.from_bytes(octets[start:end], "big") & mask == same:
            return _Tuple._make(reader.unpack_from(octets, start))
    return _walk_tuple(octets, start, end)


def _walk_tuple(octets: bytes, start: int, end: int) -> _Tuple | None:
    """Read a tuple attribute by attribute, in whatever order; None: not one with ports."""
    parts = attributes(octets, start, end)
    if CTA_TUPLE_IP not in parts or CTA_TUPLE_PROTO not in parts:
        return None
    ips = [octets[a:b] for a, b in attributes(octets, *parts[CTA_TUPLE_IP]).values()]
    proto = {
        number: int.from_bytes(octets[a:b], "big")
        for number, (a, b) in attributes(octets, *parts[CTA_TUPLE_PROTO]).items()
    }
    if len(ips) != 2 or not {CTA_PROTO_NUM, CTA_PROTO_SRC_PORT, CTA_PROTO_DST_PORT} <= set(proto):
        return None
    source, destination = ips
    ports = proto[CTA_PROTO_SRC_PORT], proto[CTA_PROTO_DST_PORT]
    return _Tuple(source, destination, proto[CTA_PROTO_NUM], *ports)


def _render_tuple(size: int, fill: bytes) -> bytes:
    """Return a UDP flow's tuple as the kernel writes it, all its addresses and ports `fill`.

    size -- octets of an address
    """
    proto = (
        attribute(CTA_PROTO_NUM, bytes([UDP]))
        + attribute(CTA_PROTO_SRC_PORT, fill * 2)
        + attribute(CTA_PROTO_DST_PORT, fill * 2)
    )
    ips = attribute(CTA_IP_SRC[size], fill * size) + attribute(CTA_IP_DST[size], fill * size)
    return nest(CTA_TUPLE_IP, ips) + nest(CTA_TUPLE_PROTO, proto)


def _shape(size: int) -> tuple[int, int, struct.Struct]:
    """Return (mask of what is the same in all tuples, what it is, reader of the rest)."""
    low, high = (int.from_bytes(_render_tuple(size, fill), "big") for fill in (b"\0", b"\xff"))
    reader = struct.Struct(f">8x{size}s4x{size}s8xB7xH6xH2x")
    return (1 << 8 * reader.size) - 1 & ~(low ^ high), low, reader


# Octets of a tuple -> its shape. One comparison tells that fixed offsets may be read, which
# is twice as fast as to walk; what looks otherwise (a zone inside, another order) is walked.
SHAPES = {shape[2].size: shape for shape in (_shape(4), _shape(16))}
