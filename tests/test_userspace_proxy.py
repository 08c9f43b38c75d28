"""The userspace mode as its users without root meet it: real sockets on loopback addresses, and
endpoints that are slow, dead, or gone."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import logging
import os
import resource
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
from forwarding import endpoint, service, slice_of, table_of

from kdns.kernel.userspace import Rootless, UserspaceDataplane, UserspaceProxy
from kdns.kernel.userspace_poll import COPY, MAX_PIPES, PIPE, RESERVE
from kdns.kernel.userspace_udp import MAX_FLOWS
from kdns.metrics import Metrics
from kdns.proxy.options import Family, Options
from kdns.proxy.table import ForwardingTable
from kdns.proxy.userspace import Place, parse_portmap
from kdns.runtime import raise_file_limit

pytestmark = pytest.mark.asyncio

PATIENCE = 20.0
Session = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
TCP_CONNECTIONS = "kdns_userspace_connections"


class Node:
    """The userspace mode with no root, and endpoints for it."""

    def __init__(self, **settings: Any) -> None:
        self.metrics = Metrics()
        self.proxy = UserspaceProxy(self.metrics, **settings)
        self.planes: dict[Family, UserspaceDataplane] = {}
        self.tables: dict[Family, ForwardingTable] = {}
        self.servers: list[asyncio.Server] = []
        self.transports: list[asyncio.BaseTransport] = []
        self.begin()

    def begin(self, rootless: Rootless = Rootless()) -> None:  # noqa: B008
        families: tuple[Family, ...] = (4, 6)
        for family in families:
            plane = self.planes.get(family)
            if plane is not None:
                plane.close()
            self.planes[family] = UserspaceDataplane(
                None, Options(family), self.metrics, proxy=self.proxy, rootless=rootless
            )

    async def load(self, *objects: Any, family: Family = 4) -> None:
        table = table_of(*objects, family=family)
        before = self.tables.get(family, ForwardingTable(family))
        touched = before.services.keys() | table.services.keys()
        self.tables[family] = table
        await self.planes[family].sync(table, touched, False)

    def place(self, name: str = "web", family: Family = 4) -> Place:
        (found,) = [
            one.place for one in self.planes[family].mappings()
            if one.name.startswith(f"default/{name}:")
        ]  # fmt: skip
        assert found is not None
        return found

    async def server(self, session: Session, host: str = "127.0.0.1") -> int:
        """Start an endpoint; return its port."""
        server = await asyncio.start_server(session, host, 0)
        self.servers.append(server)
        return int(server.sockets[0].getsockname()[1])

    async def web(self, session: Session, *more: int) -> Place:
        """One Service with this endpoint, and those at ports `more`."""
        await self.endpoints(await self.server(session), *more)
        return self.place()

    async def endpoints(self, *ports: int, **spec: Any) -> None:
        """The endpoints of Service web, on 127.0.0.1, are these now."""
        slices = [
            slice_of("web", endpoint("127.0.0.1"), ports=[("http", p, "TCP")], name=f"web-{p}")
            for p in ports
        ]
        await self.load(service("web", **spec), *slices)

    async def udp(
        self, *answers: str, **spec: Any
    ) -> tuple[Place, list[asyncio.DatagramTransport]]:
        """A Service dns, each of whose endpoints answers with its own word and what it got."""
        loop, made, slices = asyncio.get_running_loop(), [], []
        for word in answers:
            transport, _ = await loop.create_datagram_endpoint(
                lambda word=word: _Answers(word), ("127.0.0.1", 0)  # type: ignore[misc]
            )  # fmt: skip
            made.append(transport)
            port = transport.get_extra_info("sockname")[1]
            slices.append(
                slice_of("dns", endpoint("127.0.0.1"), ports=[("dns", port, "UDP")], name=word)
            )
        self.transports += made
        await self.load(service("dns", ports=[("dns", 53, "UDP")], **spec), *slices)
        return self.place("dns"), made

    async def until(self, what: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not what():
                await asyncio.sleep(0.005)

    def open(self, protocol: str = "tcp") -> int:
        return int(self.metrics.value(TCP_CONNECTIONS, "IPv4", protocol))

    async def close(self) -> None:
        for plane in self.planes.values():
            plane.close()
        self.proxy.close()
        for server in self.servers:
            server.close()
        for transport in self.transports:
            transport.close()
        await asyncio.sleep(0)


class _Answers(asyncio.DatagramProtocol):
    def __init__(self, word: str) -> None:
        self.word = word.encode()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, address: Any) -> None:
        self.transport.sendto(self.word + b" " + data, address)


@contextlib.asynccontextmanager
async def running(**settings: Any) -> AsyncIterator[Node]:
    node = Node(**settings)
    try:
        yield node
    finally:
        await node.close()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while octets := await reader.read(65536):
            writer.write(octets)
            await writer.drain()
    writer.close()


def saying(word: bytes) -> Session:
    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(word)
        writer.close()

    return say


async def fetch(place: Place) -> bytes:
    reader, writer = await asyncio.wait_for(asyncio.open_connection(*place), PATIENCE)
    octets = await asyncio.wait_for(reader.read(), PATIENCE)
    writer.close()
    return octets


async def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


# --- TCP --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", (0, 1, COPY, 20_000_003))
async def test_what_a_client_sends_comes_back_whole(size: int) -> None:
    async with running() as node:
        reader, writer = await asyncio.open_connection(*await node.web(echo))
        sent = os.urandom(size)

        async def send() -> None:
            writer.write(sent)
            await writer.drain()
            writer.write_eof()

        sending = asyncio.create_task(send())
        async with asyncio.timeout(PATIENCE):
            back = await reader.read()
        await sending
        assert hashlib.sha256(back).digest() == hashlib.sha256(sent).digest()
        writer.close()
        await node.until(lambda: node.open() == 0)
        assert not node.proxy.tcp.relays and not node.proxy.tcp.dialing


async def test_a_client_that_has_said_all_still_gets_its_answer() -> None:
    """HTTP/1.0 over nc: the client's end of input is passed on, the answer comes after it."""

    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"%d octets" % len(await reader.read()))
        writer.close()

    async with running() as node:
        reader, writer = await asyncio.open_connection(*await node.web(count))
        writer.write(b"x" * 1000)
        writer.write_eof()
        async with asyncio.timeout(PATIENCE):
            assert await reader.read() == b"1000 octets"
        writer.close()


async def test_an_endpoint_that_has_said_all_still_hears_its_client() -> None:
    heard: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        writer.write_eof()
        heard.set_result(await reader.read())
        writer.close()

    async with running() as node:
        reader, writer = await asyncio.open_connection(*await node.web(greet))
        async with asyncio.timeout(PATIENCE):
            assert await reader.read() == b"hello"
            writer.write(b"still here")
            writer.write_eof()
            assert await heard == b"still here"
        writer.close()


@pytest.mark.parametrize("who", ("client", "endpoint"))
async def test_a_slow_reader_slows_its_sender_and_costs_no_memory(who: str) -> None:
    """The other end sends until it cannot: what is held here stays within COPY and a pipe."""
    most = 200 << 20
    proceed = asyncio.Event()
    done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    sent = 0

    async def pump(writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        while sent < most:
            writer.write(bytes(1 << 20))
            await writer.drain()
            sent += 1 << 20
        writer.write_eof()

    async def drink(reader: asyncio.StreamReader) -> None:
        await proceed.wait()
        count = 0
        while octets := await reader.read(1 << 20):
            count += len(octets)
        done.set_result(count)

    async def session(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await (drink(reader) if who == "endpoint" else pump(writer))

    async with running() as node:
        reader, writer = await asyncio.open_connection(*await node.web(session))
        mine = asyncio.create_task(pump(writer) if who == "endpoint" else drink(reader))
        before = -1
        while sent != before:  # until it cannot send any more
            before = sent
            await asyncio.sleep(0.3)
        assert 0 < sent < most // 2
        (relay,) = node.proxy.tcp.relays
        assert relay.server is not None
        for side in (relay.client, relay.server):
            assert len(side.held or b"") <= COPY
            assert side.pipe is None or side.pipe.held <= PIPE
        proceed.set()
        async with asyncio.timeout(PATIENCE):
            assert await done == most
            await mine
        writer.close()


async def test_dead_endpoints_cost_no_connection() -> None:
    async with running() as node:
        dead = [await closed_port(), await closed_port()]
        place = await node.web(saying(b"alive"), *dead)
        assert [await fetch(place) for _ in range(9)] == [b"alive"] * 9
        failures = node.metrics.value("kdns_userspace_dial_failures_total", "IPv4", "tcp")
        assert failures >= 6


async def test_an_endpoint_that_does_not_answer_is_given_up_for_the_next() -> None:
    """Its queue is full, so that it neither takes nor refuses a connection."""
    with contextlib.ExitStack() as stack:
        silent = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            assert filler.connect_ex(silent.getsockname()) == errno.EINPROGRESS
        async with running() as node:
            place = await node.web(saying(b"alive"), silent.getsockname()[1])
            assert [await fetch(place) for _ in range(3)] == [b"alive"] * 3


async def test_where_all_endpoints_are_dead_the_client_is_told_at_once() -> None:
    async with running() as node:
        await node.endpoints(await closed_port(), await closed_port())
        with pytest.raises(ConnectionResetError):
            await fetch(node.place())
        await node.until(lambda: node.open() == 0)


@pytest.mark.parametrize("who", ("client", "endpoint"))
async def test_a_reset_reaches_the_other_side(who: str) -> None:
    noticed: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def reset(writer: asyncio.StreamWriter) -> None:
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async def notice(reader: asyncio.StreamReader) -> None:
        try:
            await reader.read()
            noticed.set_result("end")
        except ConnectionResetError:
            noticed.set_result("reset")

    async def session(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readexactly(1))
        if who == "endpoint":
            reset(writer)
        else:
            await notice(reader)
            writer.close()

    async with running() as node:
        reader, writer = await asyncio.open_connection(*await node.web(session))
        writer.write(b"x")
        async with asyncio.timeout(PATIENCE):
            if who == "client":
                assert await reader.readexactly(1) == b"x"
                reset(writer)
            else:
                await notice(reader)
            assert await noticed == "reset"
        writer.close()
        await node.until(lambda: node.open() == 0)


async def test_a_service_without_endpoints_refuses_until_there_is_one() -> None:
    async with running() as node:
        await node.endpoints()
        place = node.place()
        for _ in range(2):
            with pytest.raises(ConnectionRefusedError):
                await fetch(place)
            assert await node.web(saying(b"alive")) == place, "the place stays"
            assert await fetch(place) == b"alive"
            await node.endpoints()


async def test_policy_local_without_an_endpoint_here_is_silent() -> None:
    async with running() as node:
        one = slice_of("web", endpoint("127.0.0.1", nodeName="elsewhere"))
        await node.load(service("web", internalTrafficPolicy="Local"), one)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.open_connection(*node.place()), 0.2)


async def test_connections_outlive_endpoint_and_service_new_ones_go_elsewhere() -> None:
    async with running() as node:
        old = await node.server(echo)
        await node.endpoints(old)
        place = node.place()
        reader, writer = await asyncio.open_connection(*place)

        async def works() -> bool:
            writer.write(b"ping")
            return await asyncio.wait_for(reader.readexactly(4), PATIENCE) == b"ping"

        assert await works()
        await node.endpoints(await node.server(saying(b"new")))
        assert await works() and await fetch(place) == b"new"
        await node.load()
        assert node.planes[4].mappings() == []
        with pytest.raises(ConnectionRefusedError):
            await fetch(place)
        assert await works()
        writer.close()


async def test_round_robin_and_affinity() -> None:
    async with running() as node:
        ports = [await node.server(saying(word)) for word in (b"a", b"b", b"c")]
        await node.endpoints(*ports)
        place = node.place()
        answers = [await fetch(place) for _ in range(6)]
        assert sorted(answers[:3]) == [b"a", b"b", b"c"] and answers[:3] == answers[3:]
        await node.endpoints(*ports, sessionAffinity="ClientIP")
        assert len({await fetch(place) for _ in range(6)}) == 1


async def test_ipv6_without_root() -> None:
    async with running() as node:
        try:
            port = await node.server(saying(b"six"), "::1")
        except OSError as e:
            pytest.skip(f"no IPv6 here: {e}")
        one = slice_of("web", endpoint("::1"), ports=[("http", port, "TCP")], family="IPv6")
        await node.load(service("web", ip="fd00:10:96::50"), one, family=6)
        assert node.place("web", 6).address == "::1"
        assert await fetch(node.place("web", 6)) == b"six"


# --- many -------------------------------------------------------------------------------------


@pytest.fixture
def many_files() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    raise_file_limit()
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 12_000:
        pytest.skip("needs 12,000 open files: ulimit -Hn")
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("many_files")
async def test_two_thousand_connections_at_once() -> None:
    count = 2000
    async with running() as node:
        place = await node.web(echo)
        made = [await asyncio.open_connection(*place) for _ in range(count)]
        await node.until(lambda: node.open() == count)
        for _, writer in made:
            writer.write(b"ping")
        async with asyncio.timeout(PATIENCE):
            for reader, writer in made:
                assert await reader.readexactly(4) == b"ping"
                writer.close()
        await node.until(lambda: node.open() == 0)


@pytest.fixture
def file_limit() -> Iterator[Callable[[int | None], None]]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def leave(files: int | None) -> None:
        """Let this process open only so many more; None: as many as before."""
        if files is None:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
            return
        used = len(os.listdir("/proc/self/fd")) - 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + files, before[1]))

    yield leave
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_out_of_files_new_connections_wait_and_come_in_later(
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limit = RESERVE + 2 * MAX_PIPES + 60
    monkeypatch.setattr("kdns.kernel.userspace_poll._descriptors", lambda: limit)
    caplog.set_level(logging.WARNING)
    async with running() as node:
        place = await node.web(echo)
        made = [await asyncio.open_connection(*place) for _ in range(60)]
        await node.until(lambda: "out of descriptors" in caplog.text)
        taken = node.open()
        assert 10 < taken < 60
        for _, writer in made:
            writer.write(b"ping")
        async with asyncio.timeout(PATIENCE):
            for reader, writer in made:  # each that ends lets another one in
                assert await reader.readexactly(4) == b"ping"
                writer.close()
        await node.until(lambda: node.open() == 0)
        assert count_of(caplog, "out of descriptors") < 10, "not once for each client"


async def test_a_full_table_of_files_is_survived(
    file_limit: Callable[[int | None], None],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Others may have taken what was thought to be free: accept() and socket() fail."""
    monkeypatch.setattr("kdns.kernel.userspace_poll._descriptors", lambda: 1 << 20)
    caplog.set_level(logging.WARNING)
    async with running() as node:
        place = await node.web(saying(b"alive"))
        clients = [socket.socket() for _ in range(8)]
        for client in clients:
            client.setblocking(False)
        file_limit(1)  # half of what a connection takes
        for client in clients:
            client.connect_ex(place)
        await node.until(lambda: "out of descriptors" in caplog.text)
        file_limit(None)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(PATIENCE):
            for client in clients:
                assert await loop.sock_recv(client, 100) == b"alive"
                client.close()
        assert count_of(caplog, "out of descriptors") < 10


def count_of(caplog: pytest.LogCaptureFixture, text: str) -> int:
    return sum(text in record.getMessage() for record in caplog.records)


# --- UDP --------------------------------------------------------------------------------------


class Client:
    """A UDP client with a socket of its own."""

    def __init__(self, place: Place, own: str) -> None:
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.sock.bind((own, 0))
        self.sock.connect(place)

    async def ask(self, question: bytes = b"?", patience: float = PATIENCE) -> bytes:
        self.sock.send(question)
        loop = asyncio.get_running_loop()
        return await asyncio.wait_for(loop.sock_recv(self.sock, 65536), patience)

    def close(self) -> None:
        self.sock.close()


@contextlib.contextmanager
def client_of(place: Place, own: str = "127.0.0.1") -> Iterator[Client]:
    client = Client(place, own)
    try:
        yield client
    finally:
        client.close()


async def test_each_udp_client_has_a_flow_that_ends_when_it_rests() -> None:
    async with running(udp_idle=0.25) as node:
        place, _ = await node.udp("a", "b")
        with client_of(place) as one, client_of(place) as other:
            assert {await one.ask(), await other.ask()} == {b"a ?", b"b ?"}
            word = await one.ask()
            assert [await one.ask() for _ in range(5)] == [word] * 5, "a flow stays where it is"
            assert node.open("udp") == 2
            await node.until(lambda: node.open("udp") == 0)
            assert await one.ask() in (b"a ?", b"b ?")


@pytest.mark.parametrize("size", (0, 1, 1400, 60_000))
async def test_datagrams_of_any_size_pass(size: int) -> None:
    async with running() as node:
        place, _ = await node.udp("a")
        with client_of(place) as client:
            assert await client.ask(b"x" * size) == b"a " + b"x" * size


async def test_a_dead_udp_endpoint_costs_no_question() -> None:
    """The kernel says that nobody is there: the same question goes to the next endpoint."""
    async with running() as node:
        place, made = await node.udp("a", "b")
        made[0].close()
        await asyncio.sleep(0)
        for _ in range(4):
            with client_of(place) as client:
                assert await client.ask() == b"b ?"


async def test_udp_flows_leave_an_endpoint_that_is_gone() -> None:
    async with running(udp_idle=60.0) as node:
        place, _ = await node.udp("a")
        with client_of(place) as client:
            assert await client.ask() == b"a ?"
            same, _ = await node.udp("b")
            assert same == place and await client.ask() == b"b ?"


async def test_udp_without_endpoints_is_refused() -> None:
    async with running() as node:
        place, _ = await node.udp()
        with client_of(place) as client, pytest.raises(ConnectionRefusedError):
            await client.ask()


async def test_udp_affinity_is_of_the_client_not_its_port() -> None:
    async with running() as node:
        place, _ = await node.udp("a", "b", "c", sessionAffinity="ClientIP")
        answers = set()
        for _ in range(5):
            with client_of(place) as client:
                answers.add(await client.ask())
        assert len(answers) == 1


@pytest.mark.usefixtures("many_files")
async def test_ten_thousand_udp_clients_are_as_many_as_there_may_be() -> None:
    """One more ends the flow that rests longest; who asks again has another one at once."""
    async with running(udp_idle=3600.0) as node:
        place, _ = await node.udp("a")
        with client_of(place) as first:
            assert await first.ask() == b"a ?"
            for number in range(MAX_FLOWS + 50):
                # An address for each: ports would come back.
                own = f"127.1.{number // 250}.{number % 250 + 1}"
                with client_of(place, own) as client:
                    client.sock.send(b"?")
                if number % 64 == 0:
                    assert await first.ask() == b"a ?", "it never rests, so it stays"
            await node.until(
                lambda: node.metrics.value("kdns_userspace_flows_evicted_total", "IPv4") >= 51
            )
            assert node.open("udp") == len(node.proxy.udp) == MAX_FLOWS
            assert await first.ask() == b"a ?"
            with client_of(place) as client:
                assert await client.ask() == b"a ?"


# --- where Services listen --------------------------------------------------------------------


async def test_the_places_are_printed_and_stay() -> None:
    async with running() as node:
        ports = [("http", 8080, "TCP"), ("dns", 53, "UDP")]
        await node.load(service("web", ports=ports), service("sctp", ports=[("s", 1, "SCTP")]))
        printed = [str(one) for one in node.planes[4].mappings()]
        assert [line.split()[0] for line in printed] == [
            "default/web:dns/udp",
            "default/web:http/tcp",
        ]
        assert [line.rpartition(":")[2] for line in printed] == ["10053", "8080"]
        node.begin()
        node.tables.clear()
        await node.load(service("web", ports=ports))
        assert [str(one) for one in node.planes[4].mappings()] == printed


async def test_portmap_says_who_listens_and_where() -> None:
    free = await closed_port()
    async with running() as node:
        node.begin(Rootless(parse_portmap([f"default/web:http=127.0.0.1:{free}"])))
        port = await node.server(saying(b"mapped"))
        await node.load(
            service("web"), slice_of("web", endpoint("127.0.0.1"), ports=[("http", port, "TCP")]),
            service("other", ip="10.96.0.51"),
        )  # fmt: skip
        assert [str(one) for one in node.planes[4].mappings()] == [
            f"default/web:http/tcp 127.0.0.1:{free}"
        ]
        assert await fetch(Place("127.0.0.1", free)) == b"mapped"


async def test_a_place_that_somebody_has_is_told_and_taken_once_it_is_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as squatter:
        place = squatter.getsockname()
        async with running() as node:
            node.begin(Rootless(parse_portmap([f"default/web:http={place[0]}:{place[1]}"])))
            port = await node.server(saying(b"at last"))
            await node.endpoints(port)
            (told,) = node.planes[4].mappings()
            assert told.place is None and "Address already in use" in str(told)
            assert not await node.planes[4].verify(), "so that it is tried again"
            squatter.close()
            await node.planes[4].sync(node.tables[4], (), True)
            assert await node.planes[4].verify()
            assert await fetch(Place(*place)) == b"at last"


async def test_what_is_closed_leaves_no_descriptor() -> None:
    before = len(os.listdir("/proc/self/fd"))
    async with running() as node:
        place = await node.web(echo)
        _, writer = await asyncio.open_connection(*place)
        dns, _ = await node.udp("a")
        with client_of(dns) as client:
            await client.ask()
        await node.until(lambda: node.open() == 1)
        writer.close()
    await asyncio.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) <= before
