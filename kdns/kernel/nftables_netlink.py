"""Small transactions for nf_tables, handed to the kernel without nft.

nft asks the kernel for every chain of the table before it writes one, and at its end waits for
what it deleted to be gone: one changed endpoint takes it 50 ms among 10,000 Services, here less
than 1 ms. So what changes most, endpoints of plain Services and elements of maps, is read from
the text for nft and packed as nft packs it. Decides nothing: what is not understood here, and
what the kernel refuses, is nft's to do or to explain.
"""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Iterator
from ipaddress import ip_address

from kdns.kernel.generation import NETLINK_NETFILTER

TABLE = b"kube-proxy\0"
# Octets of a transaction; a socket's buffer and an attribute's length allow more.
MOST = 48 << 10
PATIENCE = 5.0  # seconds until the kernel has answered; it waits for other programs' transactions
ANSWER = 1 << 16

# linux/netlink.h, linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h
REQUEST, ACK, CREATE, APPEND = 0x1, 0x4, 0x400, 0x800
ERROR = 2
BATCH_BEGIN, BATCH_END = 0x10, 0x11
SUBSYSTEM = 10
NEW_CHAIN, DELETE_CHAIN, NEW_RULE, DELETE_RULE = 3, 5, 6, 8
NEW_ELEMENT, DELETE_ELEMENT = 12, 14
NESTED = 0x8000
LIST_ELEMENT = 1
GOTO, DROP = -4 & 0xFFFFFFFF, 0
L4PROTO = 16  # of expression meta
RANDOM = 1  # of expression numgen
DNAT = 1  # of expression nat
VERDICT_REGISTER, FIRST, SECOND = 0, 1, 2
PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132}
FAMILIES = {"ip": socket.AF_INET, "ip6": socket.AF_INET6}

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_COMMAND = re.compile(r"(add|flush|delete) (table|chain|rule|element) (ip6?) kube-proxy ?(.*)")
_CHOICE = r"(?:numgen random mod (\d+) 0 )?"
_DNAT = re.compile(
    rf"{_CHOICE}meta l4proto (tcp|udp|sctp) dnat to (?:([0-9.]+)|\[([0-9a-f:]+)\]):(\d+)"
)
_GOTO = re.compile(rf"{_CHOICE}goto ([A-Za-z0-9_./-]+)")
_ELEMENT = re.compile(r'([^" ]+(?: \. [^" ]+)*)(?: comment "([^"]*)")?(?: : (drop|goto (\S+)))?')


class NotPlain(Exception):
    """A command that is left to nft."""


class Refused(Exception):
    """The kernel did not take the transaction: an errno."""


# --- the socket -----------------------------------------------------------------------------


class NetlinkTables:
    """A socket to nf_tables of the network namespace it was opened in.

    It stays open: the kernel waits for all deletions to be done when one is closed.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        self._socket.settimeout(PATIENCE)
        self._socket.bind((0, 0))
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    def apply(self, text: str) -> None:
        """Do what a text for `nft -f -` says. Raises NotPlain, Refused, OSError: then nothing
        was done, but for a time-out."""
        messages = [*encode(text)]
        if sum(map(len, messages)) > MOST:
            raise NotPlain("too long")
        if messages:
            self._send(messages)

    def _send(self, messages: list[bytes]) -> None:
        first = self._sequence + 1
        last = first + len(messages) + 1
        self._sequence = last
        begin = _message(BATCH_BEGIN, REQUEST, socket.AF_UNSPEC, b"", SUBSYSTEM)
        end = _message(BATCH_END, REQUEST, socket.AF_UNSPEC, b"", SUBSYSTEM)
        batch = bytearray()
        for number, message in enumerate([begin, *messages, end], first):
            size, kind, flags, _, port = _HEADER.unpack_from(message)
            # The last command's acknowledgement comes behind all errors.
            flags |= ACK if number == last - 1 else 0
            batch += _HEADER.pack(size, kind, flags, number, port) + message[_HEADER.size :]
        self._socket.send(batch)
        self._await(last - 1)

    def _await(self, number: int) -> None:
        refusal = 0
        while True:
            answer = self._socket.recv(ANSWER)
            at = 0
            while at + _HEADER.size <= len(answer):
                size, kind, _, sequence, _ = _HEADER.unpack_from(answer, at)
                if kind == ERROR and sequence <= self._sequence:
                    refusal = refusal or -struct.unpack_from("=i", answer, at + _HEADER.size)[0]
                    if sequence == number:
                        if refusal:
                            raise Refused(refusal)
                        return
                at += max(_HEADER.size, (size + 3) & ~3)


# --- packing --------------------------------------------------------------------------------


def encode(text: str) -> Iterator[bytes]:
    """Yield a text's commands as messages, each with sequence number 0. Raises NotPlain."""
    lines = iter(text.splitlines())
    for line in lines:
        match = _COMMAND.fullmatch(line)
        if match is None:
            raise NotPlain(line)
        verb, what, word, rest = match.groups()
        family = FAMILIES[word]
        match verb, what:
            case "add", "table":
                continue  # there is nothing to change where it is not
            case "add", "chain" if " " not in rest:
                yield _command(NEW_CHAIN, CREATE, family, _string(3, rest))
            case "flush", "chain":
                yield _command(DELETE_RULE, 0, family, _string(2, rest))
            case "delete", "chain":
                yield _command(DELETE_CHAIN, 0, family, _string(3, rest))
            case "add", "rule":
                chain, _, rule = rest.partition(" ")
                body = _string(2, chain) + _nested(4, _rule(rule, family))
                yield _command(NEW_RULE, CREATE | APPEND, family, body)
            case "add" | "delete", "element" if rest.endswith(" {"):
                elements = b"".join(_elements(lines, adds=verb == "add"))
                body = _string(2, rest[:-2]) + _nested(3, elements)
                kind = NEW_ELEMENT if verb == "add" else DELETE_ELEMENT
                yield _command(kind, CREATE if verb == "add" else 0, family, body)
            case _:
                raise NotPlain(line)


def _elements(lines: Iterator[str], adds: bool) -> Iterator[bytes]:
    for line in lines:
        if line == "}":
            return
        match = _ELEMENT.fullmatch(line.removesuffix(","))
        if match is None:
            raise NotPlain(line)
        key, comment, verdict, chain = match.groups()
        body = _nested(1, _attribute(1, b"".join(map(_field, key.split(" . ")))))
        if adds and verdict:
            body += _nested(2, _verdict(chain))
        if adds and comment is not None:
            octets = comment.encode() + b"\0"
            body += _attribute(6, bytes((0, len(octets))) + octets)
        yield _nested(LIST_ELEMENT, body)


def _field(text: str) -> bytes:
    """Return a part of a key, filled up to whole words."""
    try:
        if text in PROTOCOLS:
            return bytes((PROTOCOLS[text], 0, 0, 0))
        if text.isdecimal():
            return struct.pack(">HH", int(text), 0)
        return ip_address(text).packed
    except (ValueError, struct.error) as error:
        raise NotPlain(text) from error


def _rule(text: str, family: int) -> bytes:
    if (match := _DNAT.fullmatch(text)) is not None:
        modulus, protocol, v4, v6, port = match.groups()
        if (family == socket.AF_INET) != (v4 is not None):
            raise NotPlain(text)
        return _chosen(modulus) + _dnat(family, protocol, _field(v4 or v6), _field(port)[:2])
    if (match := _GOTO.fullmatch(text)) is not None:
        verdict = _number(1, VERDICT_REGISTER) + _nested(2, _verdict(match[2]))
        return _chosen(match[1]) + _expression("immediate", verdict)
    raise NotPlain(text)


def _chosen(modulus: str | None) -> bytes:
    """Return the match of one time in so many."""
    if modulus is None:
        return b""
    numgen = _number(1, FIRST) + _number(2, int(modulus)) + _number(3, RANDOM) + _number(4, 0)
    return _expression("numgen", numgen) + _equals(bytes(4))


def _dnat(family: int, protocol: str, address: bytes, port: bytes) -> bytes:
    return (
        _expression("meta", _number(2, L4PROTO) + _number(1, FIRST))
        + _equals(bytes((PROTOCOLS[protocol],)))
        + _expression("immediate", _number(1, FIRST) + _nested(2, _attribute(1, address)))
        + _expression("immediate", _number(1, SECOND) + _nested(2, _attribute(1, port)))
        + _expression(
            "nat",
            _number(1, DNAT) + _number(2, family) + _number(3, FIRST) + _number(5, SECOND),
        )
    )


def _equals(value: bytes) -> bytes:
    return _expression("cmp", _number(1, FIRST) + _number(2, 0) + _nested(3, _attribute(1, value)))


def _verdict(chain: str | None) -> bytes:
    """Return goto `chain`, or drop."""
    if chain is None:
        return _nested(2, _number(1, DROP))
    return _nested(2, _number(1, GOTO) + _string(2, chain))


def _expression(name: str, body: bytes) -> bytes:
    return _nested(LIST_ELEMENT, _string(1, name) + _nested(2, body))


def _command(kind: int, flags: int, family: int, body: bytes) -> bytes:
    return _message(SUBSYSTEM << 8 | kind, REQUEST | flags, family, _attribute(1, TABLE) + body)


def _message(kind: int, flags: int, family: int, body: bytes, resource: int = 0) -> bytes:
    family_header = struct.pack(">BBH", family, 0, resource)
    return _HEADER.pack(_HEADER.size + 4 + len(body), kind, flags, 0, 0) + family_header + body


def _attribute(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(4 + len(value), kind) + value + bytes(-len(value) % 4)


def _nested(kind: int, body: bytes) -> bytes:
    if len(body) > MOST:
        raise NotPlain("too long")
    return _attribute(kind | NESTED, body)


def _number(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack(">I", value))


def _string(kind: int, text: str) -> bytes:
    return _attribute(kind, text.encode() + b"\0")
