"""The command `kdns`: flags, exit codes, what is printed where, and the small dig."""

from __future__ import annotations

import io
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import pytest

import kdns
from kdns import cli
from kdns.dns.name import render_name
from kdns.errors import ConfigError, Problem
from kdns.server.client import candidates, first_nameserver, search_path

# --- serve: CoreDNS's flags -----------------------------------------------------------------


class FakeApp(ModuleType):
    """kdns.app with nothing behind it: remembers what it was asked to do."""

    def __init__(self) -> None:
        super().__init__("kdns.app")
        self.served: list[dict[str, Any]] = []
        self.problems: list[Problem] = []
        self.dumped: list[tuple[Any, ...]] = []

    def serve(self, conf: str | None, **rest: Any) -> int:
        self.served.append({"conf": conf} | rest)
        if self.problems:
            raise ConfigError(self.problems)
        return 0

    def check_corefile(self, path: str, dns_port: int = 53) -> list[Problem]:
        self.served.append({"conf": path, "dns_port": dns_port})
        return self.problems

    def hush(self, quiet: bool) -> None:
        self.quiet = quiet

    def dump(self, stage: str, conf: str | None, manifests: tuple[str, ...]) -> Iterator[str]:
        self.dumped.append((stage, conf, manifests))
        yield "line one"
        yield "line two"


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeApp:
    fake = FakeApp()
    monkeypatch.setitem(sys.modules, "kdns.app", fake)
    monkeypatch.setattr(kdns, "app", fake, raising=False)
    monkeypatch.setattr("kdns.logs.setup_logging", lambda stream, quiet: fake.hush(quiet))
    monkeypatch.chdir(tmp_path)
    return fake


DEFAULTS = {"text": None, "dns_port": 53, "pidfile": None, "control": ""}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        # As the stock Deployment passes it, and in every form Go's flag package takes.
        ("-conf /etc/coredns/Corefile", {"conf": "/etc/coredns/Corefile"}),
        ("serve -conf /etc/coredns/Corefile", {"conf": "/etc/coredns/Corefile"}),
        ("--conf /etc/coredns/Corefile", {"conf": "/etc/coredns/Corefile"}),
        ("-conf=/etc/coredns/Corefile", {"conf": "/etc/coredns/Corefile"}),
        ("--conf=c", {"conf": "c"}),
        ("-conf c -dns.port 1053", {"conf": "c", "dns_port": 1053}),
        ("-conf c -dns.port=1053", {"conf": "c", "dns_port": 1053}),
        ("-p 1053 -conf c", {"conf": "c", "dns_port": 1053}),
        ("-p=1053 -conf c", {"conf": "c", "dns_port": 1053}),
        ("-conf c -p 0", {"conf": "c", "dns_port": 0}),
        ("-conf c -pidfile /run/kdns.pid", {"conf": "c", "pidfile": "/run/kdns.pid"}),
        ("-conf c -control /run/c.sock", {"conf": "c", "control": "/run/c.sock"}),
        ("-conf c -quiet", {"conf": "c", "quiet": True}),
        ("-conf c -quiet=true", {"conf": "c", "quiet": True}),
        ("-conf c -quiet=false", {"conf": "c", "quiet": False}),
    ],
)
def test_coredns_flags_with_and_without_the_word_serve(
    app: FakeApp, line: str, expected: dict[str, Any]
) -> None:
    assert cli.run(line.split()) == 0
    assert app.quiet == expected.pop("quiet", False)
    assert app.served == [DEFAULTS | expected]


def test_without_conf_the_corefile_of_this_folder_is_served(app: FakeApp) -> None:
    Path("Corefile").write_text(". {\n whoami\n}\n")
    assert cli.run(["serve"]) == 0
    assert app.served == [DEFAULTS | {"conf": "Corefile"}]


def test_without_any_corefile_whoami_and_log_on_the_port(app: FakeApp) -> None:
    assert cli.run(["serve", "-p", "1053"]) == 0
    text = ".:1053 {\n    whoami\n    log\n}\n"
    assert app.served == [DEFAULTS | {"conf": None, "text": text, "dns_port": 1053}]


def test_conf_stdin_reads_the_corefile_from_there(
    app: FakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(". {\n whoami\n}\n"))
    assert cli.run(["-conf", "stdin"]) == 0
    assert app.served == [DEFAULTS | {"conf": "stdin", "text": ". {\n whoami\n}\n"}]


def test_flags_from_the_environment(app: FakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDNS_CONF", "from-environment")
    monkeypatch.setenv("KDNS_DNS_PORT", "1053")
    assert cli.run(["serve"]) == 0
    assert cli.run(["serve", "-dns.port", "1054"]) == 0
    assert [(x["conf"], x["dns_port"]) for x in app.served] == [
        ("from-environment", 1053),
        ("from-environment", 1054),
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("serv", "no command 'serv', did you mean 'serve'?"),
        (
            "x",
            "no command 'x'; the commands are check, corefile, dump, node, proxy, query, rules,"
            " serve, top, trace, up, version, wait",
        ),
        ("-cnof f", "no flag '-cnof', did you mean '-conf'?"),
        ("-port 53", "no flag '-port', did you mean '-dns.port'?"),
        ("serve --dnsport=53", "no flag '--dnsport', did you mean '--dns.port'?"),
        ("-conf", "Option '-conf' requires an argument."),
        ("-p 65536", "65536 is not in the range 0<=x<=65535."),
        ("-p domain", "'domain' is not a valid port number."),
        ("-quiet=perhaps", "Option '-quiet' does not take a value."),
        ("serve Corefile", "unexpected argument 'Corefile' after the flags"),
        ("-conf c extra", "unexpected argument 'extra' after the flags"),
        ("query", "Missing argument 'NAME'."),
        ("query a..b", "not a domain name: 'a..b' has an empty label"),
        ("query example.org ADRESS", "'ADRESS' is not a record type"),
        ("dump zone", "say what to read: -conf FILE or -f PATH"),
        ("dump tables -f x", "'tables' is not one of 'snapshot', 'zone', 'table', 'rules'."),
        ("corefile chek x", "No such command 'chek'"),
    ],
)
def test_wrong_usage_is_one_line_and_2(
    app: FakeApp, capsys: pytest.CaptureFixture[str], line: str, said: str
) -> None:
    assert cli.run(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("kdns: ")
    assert err.count("\n") == 1
    assert said in err
    assert app.served == []


def test_a_file_named_without_conf_gets_the_flag_suggested(
    app: FakeApp, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("my.conf").touch()
    assert cli.run(["serve", "my.conf"]) == 2
    assert "did you mean '-conf my.conf'?" in capsys.readouterr().err


def test_all_mistakes_of_a_corefile_are_printed_and_2(
    app: FakeApp, capsys: pytest.CaptureFixture[str]
) -> None:
    app.problems = [Problem("f", 2, "unknown directive 'cahe'"), Problem("f", 4, "bad")]
    assert cli.run(["-conf", "f"]) == 2
    assert capsys.readouterr() == ("", "kdns: f:2: unknown directive 'cahe'\nkdns: f:4: bad\n")


def test_no_arguments_show_the_commands(app: FakeApp, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([]) == 0
    out = capsys.readouterr().out
    assert "serve" in out
    assert "query" in out
    assert app.served == []


@pytest.mark.parametrize("line", ["version", "-version", "--version", "serve -version"])
def test_version_names_program_and_platform(
    app: FakeApp, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    assert cli.run(line.split()) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"kdns-{kdns.__version__}"
    assert "python3." in second
    assert app.served == []


def test_plugins_lists_the_words(app: FakeApp, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["-plugins"]) == 0
    assert {"cache", "forward", "kubernetes"} <= set(capsys.readouterr().out.splitlines())


def test_help_and_version_load_none_of_the_heavy_packages() -> None:
    code = (
        "import sys; from kdns import cli; cli.run(['--help']); cli.run(['version'])\n"
        "heavy = {'kubernetes', 'aiohttp', 'asyncio', 'dnslib', 'yaml', 'kdns.app'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_python_m_kdns_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kdns", "-version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("kdns-")


def test_a_reader_that_leaves_early_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m kdns --help | head -c 1", shell=True, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("U", "")


# --- corefile check, dump -------------------------------------------------------------------

WARNING = Problem("Corefile", 3, "'upstream' is gone; take the line out", warning=True)
ERROR = Problem("Corefile", 5, "unknown directive 'cahe', did you mean 'cache'?")


@pytest.mark.parametrize(
    ("problems", "code", "out"),
    [
        ([], 0, "Corefile: ok\n"),
        ([WARNING], 0, f"{WARNING}\nCorefile: ok, 1 warning\n"),
        ([ERROR, WARNING], 2, f"{ERROR}\n{WARNING}\nCorefile: 1 error, 1 warning\n"),
        ([ERROR, ERROR], 2, f"{ERROR}\n{ERROR}\nCorefile: 2 errors\n"),
    ],
)
def test_corefile_check_prints_all_and_sums_up(
    app: FakeApp, capsys: pytest.CaptureFixture[str], problems: list[Problem], code: int, out: str
) -> None:
    app.problems = problems
    assert cli.run(["corefile", "check", "Corefile"]) == code
    assert capsys.readouterr().out == out


def test_corefile_check_reads_standard_input_for_a_dash(app: FakeApp) -> None:
    cli.run(["corefile", "check", "-", "-dns.port", "1053"])
    assert app.served == [{"conf": "/dev/stdin", "dns_port": 1053}]


def test_dump_prints_a_stage(app: FakeApp, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["dump", "zone", "-f", "a.yaml", "-f", "b"]) == 0
    assert cli.run(["dump", "snapshot", "-conf", "c"]) == 0
    assert app.dumped == [("zone", None, ("a.yaml", "b")), ("snapshot", "c", ())]
    assert capsys.readouterr().out == "line one\nline two\n" * 2


# --- query ----------------------------------------------------------------------------------

Answerer = Callable[[dns.message.Message, str], list[bytes]]


class LoopbackServer:
    """A DNS server on one port of 127.0.0.1, UDP and TCP; `answer` gives what to send back
    for a query and a transport: no, one or several messages."""

    def __init__(self, answer: Answerer) -> None:
        self.answer = answer
        self.asked: list[tuple[str, str]] = []
        self.udp, self.tcp, self.port = _two_sockets()
        self._threads = [
            threading.Thread(target=self._serve_udp), threading.Thread(target=self._serve_tcp)
        ]  # fmt: skip
        for thread in self._threads:
            thread.start()

    def _replies(self, wire: bytes, proto: str) -> list[bytes]:
        query = dns.message.from_wire(wire)
        self.asked.append((str(query.question[0].name), proto))
        return self.answer(query, proto)

    def _serve_udp(self) -> None:
        while True:
            wire, client = self.udp.recvfrom(65535)
            if not wire:
                return
            for reply in self._replies(wire, "udp"):
                self.udp.sendto(reply, client)

    def _serve_tcp(self) -> None:
        while True:
            connection, _ = self.tcp.accept()
            with connection:
                head = connection.recv(2)
                if not head:
                    return
                (size,) = struct.unpack("!H", head)
                for reply in self._replies(connection.recv(size), "tcp"):
                    connection.sendall(struct.pack("!H", len(reply)) + reply)

    def close(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"", ("127.0.0.1", self.port))
        socket.create_connection(("127.0.0.1", self.port)).close()
        for thread in self._threads:
            thread.join()
        self.udp.close()
        self.tcp.close()


def _two_sockets() -> tuple[socket.socket, socket.socket, int]:
    for _ in range(100):
        tcp = socket.create_server(("127.0.0.1", 0))
        port = tcp.getsockname()[1]
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            udp.bind(("127.0.0.1", port))
        except OSError:
            tcp.close()
            udp.close()
            continue
        return udp, tcp, port
    raise AssertionError("no port is free over both UDP and TCP")


Start = Callable[[Answerer], LoopbackServer]


@pytest.fixture
def start() -> Iterator[Start]:
    servers: list[LoopbackServer] = []

    def begin(answer: Answerer) -> LoopbackServer:
        servers.append(LoopbackServer(answer))
        return servers[-1]

    yield begin
    for server in servers:
        server.close()


def reply_to(
    query: dns.message.Message, *records: str, rcode: dns.rcode.Rcode = dns.rcode.NOERROR
) -> dns.message.Message:
    reply = dns.message.make_response(query)
    reply.flags |= dns.flags.AA
    reply.set_rcode(rcode)
    for record in records:
        name, ttl, rdclass, rdtype, rdata = record.split(maxsplit=4)
        reply.answer.append(dns.rrset.from_text(name, int(ttl), rdclass, rdtype, rdata))
    return reply


def table(answers: dict[str, list[str]]) -> Answerer:
    """Answer names of the table; NXDOMAIN for the rest."""

    def answer(query: dns.message.Message, proto: str) -> list[bytes]:
        records = answers.get(str(query.question[0].name))
        if records is None:
            return [reply_to(query, rcode=dns.rcode.NXDOMAIN).to_wire()]
        return [reply_to(query, *records).to_wire()]

    return answer


def query(port: int, line: str) -> int:
    return cli.run(["query", "--server", "127.0.0.1", "--port", str(port), *line.split()])


FULL = "web.default.svc.cluster.local."
WEB = f"{FULL} 30 IN A 10.96.0.7"


def test_query_prints_status_sections_time_and_server(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    server = start(table({FULL: [WEB]}))
    assert query(server.port, FULL) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].startswith(";; status: NOERROR, flags: qr aa rd, id: ")
    assert lines[-5:-1] == [";; QUESTION", f";{FULL} IN A", ";; ANSWER", WEB]
    assert f"from 127.0.0.1 port {server.port} over udp" in lines[-1]


def test_query_short_prints_only_values(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    server = start(table({FULL: [WEB, f"{FULL} 30 IN A 10.96.0.8"]}))
    assert query(server.port, f"{FULL} --short") == 0
    assert capsys.readouterr().out == "10.96.0.7\n10.96.0.8\n"


def test_query_for_a_name_that_does_not_exist_leaves_with_1(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    assert query(start(table({})).port, "nosuch.example.org") == 1
    assert "status: NXDOMAIN" in capsys.readouterr().out


def test_query_search_shows_every_try_and_stops_at_the_first_with_records(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    server = start(table({FULL: [WEB]}))
    assert query(server.port, "web.default --search shop") == 0
    out = capsys.readouterr().out
    assert server.asked == [
        ("web.default.shop.svc.cluster.local.", "udp"),
        (FULL, "udp"),
    ]
    assert out.startswith(
        ";; search shop.svc.cluster.local svc.cluster.local cluster.local (ndots 5)\n"
        ";; web.default.shop.svc.cluster.local. -> NXDOMAIN\n"
        f";; {FULL} -> NOERROR, 1 record\n"
    )
    assert WEB in out


def test_query_search_reports_nodata_before_nxdomain(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    server = start(table({FULL: []}))
    assert query(server.port, "web AAAA --search default") == 0
    assert len(server.asked) == 4
    assert f";{FULL} IN AAAA" in capsys.readouterr().out


def test_query_of_an_address_asks_for_its_name(start: Start) -> None:
    server = start(table({}))
    query(server.port, "10.96.0.10")
    query(server.port, "2001:db8::1 PTR")
    query(server.port, "10.96.0.10 A")
    assert [name for name, _ in server.asked] == [
        "10.0.96.10.in-addr.arpa.",
        "1." + "0." * 23 + "8.b.d.0.1.0.0.2.ip6.arpa.",
        "10.96.0.10.",
    ]


def test_query_asks_again_over_tcp_for_a_truncated_answer(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(query: dns.message.Message, proto: str) -> list[bytes]:
        if proto == "tcp":
            return [reply_to(query, WEB).to_wire()]
        reply = reply_to(query)
        reply.flags |= dns.flags.TC
        return [reply.to_wire()]

    server = start(answer)
    assert query(server.port, FULL) == 0
    assert [proto for _, proto in server.asked] == ["udp", "tcp"]
    assert WEB in capsys.readouterr().out


def test_query_tcp(start: Start) -> None:
    server = start(table({FULL: [WEB]}))
    assert query(server.port, f"{FULL} --tcp") == 0
    assert server.asked == [(FULL, "tcp")]


def test_query_takes_no_answer_to_another_question(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(query: dns.message.Message, proto: str) -> list[bytes]:
        forged = reply_to(query, f"{FULL} 30 IN A 192.0.2.66")
        other_id = forged.to_wire()
        other_id = bytes([other_id[0] ^ 1]) + other_id[1:]
        other_name = dns.message.make_query("other.example.", "A", id=query.id)
        return [
            other_id,
            reply_to(other_name).to_wire(),
            query.to_wire(),
            reply_to(query, WEB).to_wire(),
        ]

    server = start(answer)
    assert query(server.port, f"{FULL} --short") == 0
    assert capsys.readouterr().out == "10.96.0.7\n"


def test_query_tries_again_when_a_datagram_is_lost(start: Start) -> None:
    def answer(query: dns.message.Message, proto: str) -> list[bytes]:
        return [] if len(server.asked) == 1 else [reply_to(query, WEB).to_wire()]

    server = start(answer)
    assert query(server.port, f"{FULL} --timeout 0.2") == 0
    assert len(server.asked) == 2


def test_query_to_a_silent_server_says_so_in_one_line(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    server = start(lambda query, proto: [])
    assert query(server.port, f"{FULL} --timeout 0.05") == 1
    said = f"kdns: no answer from 127.0.0.1 port {server.port} over udp: no answer within 0.05 s\n"
    assert capsys.readouterr() == ("", said)
    assert len(server.asked) == 3


@pytest.mark.parametrize("flag", ["", "--tcp"])
def test_query_where_nobody_listens_says_so_in_one_line(
    capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    udp, tcp, port = _two_sockets()
    udp.close()
    tcp.close()
    assert query(port, f"example.org {flag}") == 1
    assert "connection refused: is a server listening there?" in capsys.readouterr().err


def test_query_over_tcp_says_when_the_connection_ends_early(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    server = start(lambda query, proto: [])
    assert query(server.port, f"{FULL} --tcp") == 1
    assert "closed before the answer was complete" in capsys.readouterr().err


def test_query_says_what_is_wrong_with_rubbish(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    server = start(lambda query, proto: [query.id.to_bytes(2, "big") + b"\x80\x00" + b"\xff" * 8])
    assert query(server.port, FULL) == 1
    assert "not a DNS answer: " in capsys.readouterr().err


def test_query_shows_a_bare_formerr(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    server = start(lambda query, proto: [query.id.to_bytes(2, "big") + b"\x80\x01" + bytes(8)])
    assert query(server.port, FULL) == 1
    assert "status: FORMERR" in capsys.readouterr().out


def test_query_server_that_has_no_address(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["query", "--server", "no..host", "example.org"]) == 1
    assert "kdns: cannot find server no..host" in capsys.readouterr().err


def test_query_server_and_search_from_the_environment(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start(table({FULL: [WEB]}))
    monkeypatch.setenv("KDNS_QUERY_SERVER", "127.0.0.1")
    monkeypatch.setenv("KDNS_QUERY_PORT", str(server.port))
    monkeypatch.setenv("KDNS_QUERY_SEARCH", "default")
    assert cli.run(["query", "web"]) == 0
    assert server.asked == [(FULL, "udp")]


# --- names as a pod asks for them -------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "search", "expected"),
    [
        ("web", [], ["web."]),
        ("web.", ["default"], ["web."]),
        (
            "web",
            ["default"],
            ["web.default.svc.cluster.local.", "web.svc.cluster.local.", "web.cluster.local.",
             "web."],
        ),
        ("web", ["svc.k8s.test", "k8s.test."], ["web.svc.k8s.test.", "web.k8s.test.", "web."]),
        # Five dots or more: first as it is (ndots).
        ("a.b.c.d.e.f", ["x.y"], ["a.b.c.d.e.f.", "a.b.c.d.e.f.x.y."]),
        ("a.b.c.d.e", ["x.y"], ["a.b.c.d.e.x.y.", "a.b.c.d.e."]),
    ],
)  # fmt: skip
def test_candidates_as_resolv_conf_says(name: str, search: list[str], expected: list[str]) -> None:
    assert [render_name(x) for x in candidates(name, search_path(search))] == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("search a b\nnameserver 10.96.0.10\nnameserver 10.96.0.11\n", "10.96.0.10"),
        ("# nothing\nnameserver\n", "127.0.0.1"),
        (None, "127.0.0.1"),
    ],
)
def test_first_nameserver(tmp_path: Path, content: str | None, expected: str) -> None:
    path = tmp_path / "resolv.conf"
    if content is not None:
        path.write_text(content)
    assert first_nameserver(str(path)) == expected
