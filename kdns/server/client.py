"""Asking a server one question and waiting for the answer: what `kdns query` does.

Decides how often to ask, over what, and which datagrams are answers to the question put.
Blocking and small; queries that the server itself sends upstream go through upstream.py.
"""

from __future__ import annotations

import secrets
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kdns.dns import types as t
from kdns.dns.message import QR, TC, Message, parse_message
from kdns.dns.name import labels_of, parse_name
from kdns.errors import KdnsError, WireError

PAYLOAD = 1232  # DNS Flag Day 2020: fits one frame on every path
NDOTS = 5  # what kubelet writes into a pod's /etc/resolv.conf
CLUSTER_DOMAIN = "cluster.local"
RESOLV_CONF = "/etc/resolv.conf"


class NoAnswer(KdnsError):
    """Nobody answered, or not with a DNS message; the text says whom was asked and why not."""


@dataclass(frozen=True, slots=True)
class Server:
    """Whom to ask. address is an IP address or a host name."""

    address: str
    port: int = 53

    def __str__(self) -> str:
        return f"{self.address} port {self.port}"


@dataclass(frozen=True, slots=True)
class Exchange:
    """An answer and how it came.

    size    -- octets of the answer
    seconds -- from sending the last try to its answer
    proto   -- "udp" or "tcp"
    """

    message: Message
    size: int
    seconds: float
    proto: str


def ask(
    server: Server,
    name: bytes,
    qtype: int,
    *,
    tcp: bool = False,
    timeout: float = 2.0,
    tries: int = 3,
) -> Exchange:
    """Put a question and return the answer; a truncated one is asked for again over TCP.

    timeout -- seconds for each of `tries`. Raises NoAnswer.
    """
    try:
        found = socket.getaddrinfo(server.address, server.port, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError) as e:
        raise NoAnswer(f"cannot find server {server.address}: {_reason(e)}") from None
    family, place = found[0][0], found[0][4]
    proto = "tcp" if tcp else "udp"
    why = "not asked"
    for _ in range(tries):
        # RFC 5452 s4.3: an unpredictable ID for every try.
        qid = secrets.randbelow(65536)
        wire = _question(qid, name, qtype)
        started = time.monotonic()
        try:
            once = _over_tcp if tcp else _over_udp
            message, size = once(family, place, wire, started + timeout)
        except TimeoutError:
            why = f"no answer within {timeout:g} s"
            continue
        except ConnectionRefusedError:
            why = "connection refused: is a server listening there?"
            break
        except WireError as e:
            why = f"not a DNS answer: {e}"
            break
        except OSError as e:
            why = _reason(e)
            break
        if message.flags & TC and not tcp:  # RFC 7766 s5
            return ask(server, name, qtype, tcp=True, timeout=timeout, tries=tries)
        return Exchange(message, size, time.monotonic() - started, proto)
    raise NoAnswer(f"no answer from {server} over {proto}: {why}")


def _question(qid: int, name: bytes, qtype: int) -> bytes:
    """Return the octets of a query. Made with dnslib and not with the server's own code, so
    that what asks does not share a mistake with what answers."""
    from dnslib import EDNS0, DNSHeader, DNSLabel, DNSQuestion, DNSRecord

    question = DNSQuestion(DNSLabel(tuple(labels_of(name))), qtype)
    header = DNSHeader(id=qid, qr=0, aa=0, ra=0, rd=1)
    return bytes(DNSRecord(header, q=question, ar=[EDNS0(udp_len=PAYLOAD)]).pack())


def _reason(e: Exception) -> str:
    return e.strerror or str(e) if isinstance(e, OSError) else str(e)


def _over_udp(family: int, place: object, wire: bytes, until: float) -> tuple[Message, int]:
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        # Connected: datagrams from anybody else do not arrive, and a refusal does.
        sock.connect(place)  # type: ignore[arg-type]
        sock.send(wire)
        while True:
            sock.settimeout(_left(until))
            received = sock.recv(65535)
            message = _answer_to(wire, received)
            if message is not None:
                return message, len(received)


def _over_tcp(family: int, place: object, wire: bytes, until: float) -> tuple[Message, int]:
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.settimeout(_left(until))
        sock.connect(place)  # type: ignore[arg-type]
        sock.sendall(struct.pack("!H", len(wire)) + wire)
        (size,) = struct.unpack("!H", _exactly(sock, 2, until))
        message = _answer_to(wire, _exactly(sock, size, until))
        if message is None:
            raise WireError(None, "the answer is to another question")
        return message, size


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _exactly(sock: socket.socket, size: int, until: float) -> bytes:
    received = bytearray()
    while len(received) < size:
        sock.settimeout(_left(until))
        part = sock.recv(size - len(received))
        if not part:
            raise WireError(None, "the connection was closed before the answer was complete")
        received += part
    return bytes(received)


def _answer_to(asked: bytes, received: bytes) -> Message | None:
    """Return the message in `received` if it answers `asked`, else None (RFC 5452 s9.1)."""
    if len(received) < 12 or received[:2] != asked[:2]:
        return None
    message = parse_message(received)
    if not message.flags & QR:
        return None
    if message.question is None:
        # FORMERR and NOTIMP come with the bare header (reference 1.15).
        return message if message.rcode in (t.FORMERR, t.NOTIMP) else None
    name, qtype, qclass = message.question
    end = 12 + len(name)
    same = (
        name.lower() == asked[12:end].lower()
        and struct.pack("!HH", qtype, qclass) == asked[end : end + 4]
    )
    return message if same else None


# --- names as a pod asks for them -----------------------------------------------------------


def search_path(words: Sequence[str]) -> tuple[str, ...]:
    """Return the search domains for `words`: a namespace stands for the three that kubelet
    gives its pods; a word with a dot is a domain itself."""
    path: list[str] = []
    for word in words:
        if "." in word.rstrip("."):
            path.append(word.rstrip("."))
        else:
            path += [f"{word}.svc.{CLUSTER_DOMAIN}", f"svc.{CLUSTER_DOMAIN}", CLUSTER_DOMAIN]
    return tuple(path)


def candidates(name: str, path: Sequence[str]) -> list[bytes]:
    """Return the names to ask for in turn, as resolv.conf(5) says for `path` and ndots 5.

    Raises BadName.
    """
    if not path or name.endswith("."):
        return [parse_name(name)]
    asis = parse_name(name)
    below = [parse_name(name, parse_name(domain + ".")) for domain in path]
    dots = len(labels_of(asis)) - 1
    return [asis, *below] if dots >= NDOTS else [*below, asis]


def walk(
    server: Server, names: Sequence[bytes], qtype: int, *, tcp: bool, timeout: float
) -> Iterator[tuple[bytes, Exchange]]:
    """Ask for each name until one has records; yield each (name, exchange) as it comes."""
    for name in names:
        exchange = ask(server, name, qtype, tcp=tcp, timeout=timeout)
        yield name, exchange
        if exchange.message.rcode == t.NOERROR and exchange.message.answer:
            return


def best(tried: Sequence[tuple[bytes, Exchange]]) -> tuple[bytes, Exchange]:
    """Return the one of `tried` that a resolver reports: records, else NODATA, else a
    server's failure, else that the name does not exist."""

    def rank(one: tuple[bytes, Exchange]) -> int:
        message = one[1].message
        if message.rcode == t.NOERROR:
            return 0 if message.answer else 1
        return 3 if message.rcode == t.NXDOMAIN else 2

    return min(tried, key=rank)


def first_nameserver(path: str = RESOLV_CONF) -> str:
    """Return the first nameserver of resolv.conf, 127.0.0.1 if there is none (resolv.conf(5))."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                words = line.split()
                if len(words) > 1 and words[0] == "nameserver":
                    return words[1]
    except OSError:
        pass
    return "127.0.0.1"
