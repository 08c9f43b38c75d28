"""One nftables rule: its words -> statements as values; and the words of sets' elements.

Decides what the words of nft(8) mean, and refuses what is wrong or what kdns does not know:
nothing is passed over in silence. Tables, chains and sets are nftables_text.py's; what a
statement does is nftables_statements.py's.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from kdns.proxy.matches import Assumed, Never, NotUnderstood
from kdns.proxy.nftables_statements import (
    ADDRESS_TYPES,
    ETHER_TYPES,
    FIELDS,
    NF_PROTO,
    PROTOCOLS,
    STATES,
    STATUS,
    TCP_FLAGS,
    Among,
    Bits,
    Compare,
    Destination,
    Do,
    Field,
    Key,
    Led,
    MarkBits,
    Members,
    Numgen,
    Part,
    Prefix,
    Range,
    Remember,
    RewriteMap,
    Statement,
    VerdictMap,
)
from kdns.proxy.rule import (
    ALL_ONES,
    Jump,
    Mark,
    Masquerade,
    PassOn,
    Redirect,
    Reject,
    Rewrite,
    Target,
    Unknown,
    Untrack,
    Wrong,
)
from kdns.proxy.rule import (
    Final as FinalVerdict,
)

MAX_MODULUS: Final = 20_000  # of numgen: each number is a way of its own


class Words:
    """The words of one statement or block, read from left to right."""

    __slots__ = ("at", "words")

    def __init__(self, words: Sequence[str]) -> None:
        self.words = words
        self.at = 0

    def __bool__(self) -> bool:
        return self.at < len(self.words)

    def peek(self, ahead: int = 0) -> str:
        at = self.at + ahead
        return self.words[at] if at < len(self.words) else ""

    def take(self, what: str = "a word") -> str:
        if not self:
            raise Wrong(f"it ends where {what} should be")
        self.at += 1
        return self.words[self.at - 1]

    def skip(self, *words: str) -> bool:
        """Pass these words, if they come next."""
        if tuple(self.words[self.at : self.at + len(words)]) != words:
            return False
        self.at += len(words)
        return True

    def expect(self, word: str) -> None:
        if self.peek() != word:
            raise Wrong(f"{self.peek() or 'its end'!r} where {word!r} should be")
        self.at += 1

    def rest(self) -> str:
        return " ".join(self.words[self.at :])


def unquoted(word: str) -> str:
    return word[1:-1] if len(word) > 1 and word[0] == word[-1] == '"' else word


# --- Values -------------------------------------------------------------------------------------

_NAMED: Final[Mapping[str, Mapping[str, int]]] = {
    "inet_proto": PROTOCOLS,
    "ct_state": STATES,
    "ct_status": STATUS,
    "tcp_flag": TCP_FLAGS,
    "fib_addrtype": ADDRESS_TYPES,
    "nf_proto": NF_PROTO,
    "ether_type": ETHER_TYPES,
}
_BITMASKS: Final = ("ct_state", "ct_status", "tcp_flag")
_IPV4: Final = re.compile(r"(\d{1,3})\.(\d{1,3})\.(\d{1,3})\.(\d{1,3})")


def part_of(datatype: str, word: str) -> Part:
    """Read one value, range or prefix of a type."""
    if datatype in ("ipv4_addr", "ipv6_addr"):
        return _addresses(word, 4 if datatype == "ipv4_addr" else 6)
    if datatype == "ifname":
        name = unquoted(word)
        return Prefix(name[:-1]) if name.endswith("*") else name
    if datatype == "other":
        return word
    named = _NAMED.get(datatype, {})
    if word in named:
        return named[word]
    if datatype in _BITMASKS:
        found = 0
        for one in word.split(","):
            if one not in named and (datatype == "ct_status" or not one[:1].isdecimal()):
                raise Unknown(f"{datatype} {one!r}: known are {', '.join(named)}")
            found |= named[one] if one in named else number_of(one, datatype)
        return found
    low, dash, high = word.partition("-")
    if dash:
        return Range(number_of(low, datatype), number_of(high, datatype))
    return number_of(word, datatype)


def number_of(word: str, what: str = "number") -> int:
    try:
        return int(word, 0)
    except ValueError:
        raise Unknown(f"{word!r} as {what}") from None


def _addresses(word: str, version: int) -> Part:
    low, dash, high = word.partition("-")
    if dash:
        return Range(_address(low, version), _address(high, version))
    if "/" not in word:
        return _address(word, version)
    try:
        network = ipaddress.ip_network(word, strict=False)
    except ValueError:
        raise Wrong(f"{word!r} is no CIDR") from None
    if network.version != version:
        raise Wrong(f"{word} is IPv{network.version}, where IPv{version} should be")
    if network.num_addresses == 1:
        return int(network.network_address)
    return Range(int(network.network_address), int(network.broadcast_address))


def _address(word: str, version: int) -> int:
    found = _IPV4.fullmatch(word) if version == 4 else None
    if found is not None:
        one, two, three, four = map(int, found.groups())
        if max(one, two, three, four) < 256:
            return one << 24 | two << 16 | three << 8 | four
    try:
        address = ipaddress.ip_address(word)
    except ValueError:
        raise Unknown(f"{word!r} as address") from None
    if address.version != version:
        raise Wrong(f"{word} is IPv{address.version}, where IPv{version} should be")
    return int(address)


def _split(datatypes: Sequence[str], words: Words) -> tuple[Part, ...]:
    """Read the parts of one key: words with a dot between them."""
    parts = []
    for number, datatype in enumerate(datatypes):
        if number:
            words.expect(".")
        parts.append(part_of(datatype, words.take(datatype)))
    return tuple(parts)


_DURATION: Final = re.compile(r"(\d+)(d|h|ms|m|s)")
_SECONDS: Final = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}


def seconds_of(word: str) -> float:
    """Read "1h30m" as seconds; a bare number is seconds too."""
    if word.isdecimal():
        return float(word)
    if not word or _DURATION.sub("", word):
        raise Wrong(f"{word!r} is no time: write it as 1h30m")
    return sum(int(count) * _SECONDS[unit] for count, unit in _DURATION.findall(word))


# --- Elements -----------------------------------------------------------------------------------

# The parts of a key, what it leads to (True: nothing, it is a set's), and the seconds until it
# goes (None: it was not put there by a rule).
Element = tuple[tuple[Part, ...] | None, Led, float | None]


def elements_of(
    words: Words, datatypes: Sequence[str], value: Callable[[Words], Led] | None
) -> Iterable[Element]:
    """Yield the elements up to a "}". value -- reads what a key of a map leads to"""
    while not words.skip("}"):
        parts = None if words.skip("*") else _split(datatypes, words)
        expires = None
        while words.peek() not in (":", ",", "}", ""):
            match words.take():
                case "timeout":
                    seconds_of(words.take())
                case "expires":
                    expires = seconds_of(words.take())
                case "comment":
                    words.take()
                case "counter":
                    _counter(words)
                case other:
                    raise Unknown(f"{other!r} of an element")
        led: Led = True
        if value is not None:
            words.expect(":")
            led = value(words)
        yield parts, led, expires
        if words.peek() != "}":
            words.expect(",")


def read_verdict(words: Words) -> Target:
    """Read a verdict, as maps lead to it."""
    word = words.take("a verdict")
    match word:
        case "accept" | "drop" | "return":
            return FinalVerdict(word.upper())  # type: ignore[arg-type]
        case "jump" | "goto":
            name = words.take("a chain")
            if name == "{":
                raise Unknown("chains without a name")
            return Jump(name, word == "goto")
        case "continue":
            return PassOn("continue")
    raise Unknown(f"verdict {word!r}")


def read_destination(words: Words) -> Destination:
    """Read where a map of `dnat to` leads: an address, and mostly a port."""
    address = words.take("an address")
    if "/" in address or "-" in address:
        raise Unknown(f"many addresses to choose from: {address}")
    _address(address, 6 if ":" in address else 4)
    port = number_of(words.take("a port"), "port") if words.skip(".") else 0
    return Destination(address, port)


# --- Rules --------------------------------------------------------------------------------------


def read_known(words: Sequence[str]) -> tuple[tuple[Statement, ...], str, Unknown | None]:
    """Read as far as is known: the last one then says what is not understood."""
    left, statements = Words(words), list[Statement]()
    comment = comment_of(words)
    while left:
        at = left.at
        try:
            found = _statement(left)
        except Unknown as error:
            text = f"{' '.join(words[at:])} ({error})"
            return (*statements, NotUnderstood(text)), comment, Unknown(text)
        if found is not None:
            statements.append(found)
    return tuple(statements), comment, None


def comment_of(words: Sequence[str]) -> str:
    return unquoted(words[-1]) if len(words) > 1 and words[-2] == "comment" else ""


def _statement(words: Words) -> Statement | None:
    read = _STATEMENTS.get(words.peek())
    if read is not None:
        words.take()
        return read(words)
    if words.skip("meta", "mark", "set"):
        return Do(_set_mark(words))
    if words.skip("meta", "nftrace", "set"):
        words.take()
        return Do(PassOn("traced"))
    return _expression(words)


def _verdict(words: Words) -> Statement:
    words.at -= 1
    return Do(read_verdict(words))


def _counter(words: Words) -> None:
    if words.skip("name"):
        words.take()
    elif words.skip("packets"):
        words.take()
        words.expect("bytes")
        words.take()


def _comment(words: Words) -> None:
    words.take("a comment")


_LOG: Final = ("prefix", "level", "group", "snaplen", "queue-threshold", "flags")


def _log(words: Words) -> Statement:
    while words.peek() in _LOG:
        words.take()
        words.take()
    return Do(PassOn("LOG"))


def _limit(words: Words) -> Statement:
    if not words.skip("rate"):
        raise Unknown("a limit by its name")
    over = words.skip("over")
    rate = words.take()
    if words.peek().endswith(("second", "minute", "hour", "day", "week")):
        rate += f" {words.take()}"
    if words.skip("burst"):
        words.take()
        words.skip("packets")
    if over:
        return Never(f"assumed: not over {rate}")
    return Assumed(f"not more than {rate} fit")


_REJECT: Final[Mapping[tuple[str, str], str]] = {
    ("icmp", "port-unreachable"): "", ("icmpv6", "port-unreachable"): "",
    ("icmpx", "port-unreachable"): "", ("icmp", "prot-unreachable"): "icmp-proto-unreachable",
    ("icmpv6", "admin-prohibited"): "icmp6-adm-prohibited", ("tcp", "reset"): "tcp-reset",
}  # fmt: skip


def _reject(words: Words) -> Statement:
    if not words.skip("with"):
        return Do(Reject(""))
    kind = words.take()
    words.skip("type")
    name = words.take("what to answer")
    prefix = {"icmpv6": "icmp6"}.get(kind, kind)
    if kind not in ("icmp", "icmpv6", "icmpx", "tcp"):
        raise Unknown(f"reject with {kind}")
    return Do(Reject(_REJECT.get((kind, name), f"{prefix}-{name}")))


_NAT_FLAGS: Final = {"random", "fully-random", "persistent"}


def _flags(words: Words) -> None:
    while set(words.peek().split(",")) <= _NAT_FLAGS:
        words.take()


def _masquerade(words: Words) -> Statement:
    if words.skip("to"):
        words.take()  # source ports to choose from: none of them is told of
    _flags(words)
    return Do(Masquerade())


def _redirect(words: Words) -> Statement:
    port = 0
    if words.skip("to"):
        port = number_of(words.take().removeprefix(":"), "port")
    _flags(words)
    return Do(Redirect(port))


def _translation(of_source: bool) -> Callable[[Words], Statement]:
    def read(words: Words) -> Statement:
        while words.peek() in ("ip", "ip6", "addr", ".", "port"):
            words.take()
        words.expect("to")
        if _is_key(words):
            key = read_key(words)
            words.expect("map")
            return RewriteMap(of_source, key, _among(words, key, read_destination))
        address, port = _socket(words.take("an address"))
        if words.skip(".") or words.skip(":"):
            port = number_of(words.take("a port"), "port")
        _flags(words)
        return Do(Rewrite(of_source, address, port))

    return read


def _socket(word: str) -> tuple[str, int]:
    """Read "10.0.0.1:80", "[fd00::1]:80", either alone, or ":80"."""
    bracket = re.fullmatch(r"\[([^\]]+)\](?::(.+))?", word)
    if bracket is not None:
        address, port = bracket[1], bracket[2] or ""
    elif word.count(":") > 1:
        address, port = word, ""
    else:
        address, _, port = word.partition(":")
    if "-" in address or "/" in address or "-" in port:
        raise Unknown(f"many to choose from: {word}")
    if address:
        _address(address, 6 if ":" in address else 4)
    return address, number_of(port, "port") if port else 0


def _set_mark(words: Words) -> Mark:
    if words.skip("meta", "mark"):
        bits = MarkBits(0, 0)
    else:
        bits = MarkBits(number_of(words.take("a mark"), "mark"), ALL_ONES)
    bits = _bits(words, bits)
    return Mark(bits.value, bits.mask)


_OPERATORS: Final = {"&": "&", "and": "&", "|": "|", "or": "|", "^": "^", "xor": "^"}


def _bits(words: Words, bits: MarkBits) -> MarkBits:
    """Read what is done to a mark's bits: all of it is one mask and one xor."""
    while words.peek() in _OPERATORS:
        operator = _OPERATORS[words.take()]
        number = number_of(words.take("a mark"), "mark")
        match operator:
            case "&":
                bits = MarkBits(bits.value & number, bits.mask | (~number & ALL_ONES))
            case "|":
                bits = MarkBits(bits.value & ~number | number, bits.mask | number)
            case _:
                bits = MarkBits(bits.value ^ number, bits.mask)
    return bits


def _remember(action: str) -> Callable[[Words], Statement]:
    def read(words: Words) -> Statement:
        name = words.take("a set")
        if not name.startswith("@"):
            raise Unknown(f"{action} {name}")
        words.expect("{")
        key = read_key(words)
        if not words.skip("}"):
            raise Unknown(f"{words.rest()} of an element")
        return Remember(action, name[1:], key)  # type: ignore[arg-type]

    return read


_STATEMENTS: Final[Mapping[str, Callable[[Words], Statement | None]]] = {
    **dict.fromkeys(("accept", "drop", "return", "jump", "goto", "continue"), _verdict),
    "counter": _counter,
    "comment": _comment,
    "log": _log,
    "limit": _limit,
    "reject": _reject,
    "masquerade": _masquerade,
    "redirect": _redirect,
    "dnat": _translation(False),
    "snat": _translation(True),
    "notrack": lambda _: Do(Untrack()),
    "update": _remember("update"),
    "add": _remember("add"),
    "delete": _remember("delete"),
}  # fmt: skip


# --- Expressions --------------------------------------------------------------------------------

_FIRST: Final = {name.split()[0] for name in FIELDS} | {"numgen"}


def _is_key(words: Words) -> bool:
    return words.peek() in _FIRST


def read_key(words: Words) -> Key:
    """Read what a packet is asked for: fields with dots between them."""
    key: list[Field | MarkBits | Numgen] = [_field(words)]
    while words.skip("."):
        key.append(_field(words))
    if len(key) > 1 and any(isinstance(one, Numgen) for one in key):
        raise Unknown("numgen with something else")
    return tuple(key)


def _field(words: Words) -> Field | MarkBits | Numgen:
    if words.skip("numgen"):
        return _numgen(words)
    for length in (3, 2, 1):
        text = " ".join(words.words[words.at : words.at + length])
        text = {"meta iifname": "iifname", "meta oifname": "oifname"}.get(text, text)
        if text in FIELDS:
            words.at += length
            if text == "meta mark":
                return _bits(words, MarkBits(0, 0))
            return Field(text)
    raise Unknown(f"{words.peek()} {words.peek(1)}".strip())


def _numgen(words: Words) -> Numgen:
    kind = words.take()
    if kind not in ("random", "inc"):
        raise Unknown(f"numgen {kind}")
    words.expect("mod")
    modulus = number_of(words.take("a number"))
    if not 0 < modulus <= MAX_MODULUS:
        raise Unknown(f"numgen of {modulus} numbers")
    return Numgen(modulus, number_of(words.take()) if words.skip("offset") else 0)


_ORDERS: Final = {"<", ">", "<=", ">=", "lt", "gt", "le", "ge"}


def _expression(words: Words) -> Statement:
    key = read_key(words)
    if words.skip("vmap"):
        return VerdictMap(key, _among(words, key, read_verdict))
    operator = words.peek()
    if operator in _ORDERS:
        words.take()
        return _ordered(key, operator, words)
    negated = operator in ("!=", "ne")
    written = negated or operator in ("==", "eq")
    if written:
        words.take()
    first = key[0]
    if isinstance(first, Field) and first.datatype in _BITMASKS and len(key) == 1:
        return _flagged(first, written, negated, words)
    if words.peek() == "{" or words.peek().startswith("@"):
        return Compare(key, _among(words, key, None), negated)
    members: Members[Led] = Members()
    members.add(_split(_datatypes(key), words), True)
    return Compare(key, members, negated)


def _datatypes(key: Key) -> tuple[str, ...]:
    return tuple(one.datatype for one in key)


def _ordered(key: Key, operator: str, words: Words) -> Compare:
    if len(key) > 1:
        raise Unknown(f"{operator} of more than one thing")
    value = part_of(key[0].datatype, words.take("a number"))
    if not isinstance(value, int):
        raise Wrong(f"{operator} wants a number")
    members: Members[Led] = Members()
    top = (1 << 128) - 1
    match operator:
        case "<" | "lt":
            members.add((Range(0, value - 1),), True)
        case "<=" | "le":
            members.add((Range(0, value),), True)
        case ">" | "gt":
            members.add((Range(value + 1, top),), True)
        case _:
            members.add((Range(value, top),), True)
    return Compare(key, members)


def _flagged(of: Field, written: bool, negated: bool, words: Words) -> Statement:
    """Read what is asked of bits: without an operator, whether any of them is set."""
    if words.peek() in ("{", "&") or words.peek().startswith("@"):
        if words.peek() == "&":
            return _masked_flags(of, words)
        if of.datatype != "ct_state":
            raise Unknown(f"a set of {of.text}")
        return Compare((of,), _among(words, (of,), None), negated)
    value = _bitmask(of.datatype, words.take("flags"))
    if words.skip("/"):
        mask = _bitmask(of.datatype, words.take("flags"))
        return Bits(of, mask, value, negated)
    if not written:
        return Bits(of, value)
    if of.datatype == "ct_status":
        raise Unknown("all of a connection's status")  # a packet alone does not show the rest
    return Bits(of, ALL_ONES, value, negated)


def _bitmask(datatype: str, word: str) -> int:
    found = part_of(datatype, word)
    if not isinstance(found, int):
        raise Unknown(f"{word!r} as {datatype}")
    return found


def _masked_flags(of: Field, words: Words) -> Bits:
    """Read `& (syn | rst) == syn`, as older versions print it."""
    words.expect("&")
    text = words.take("flags")
    while text.count("(") > text.count(")"):
        text += words.take("a )")
    mask = _bitmask(of.datatype, text.strip("()").replace("|", ","))
    operator = words.take("an operator")
    if operator not in ("==", "!="):
        raise Unknown(f"{of.text} & ... {operator}")
    value = _bitmask(of.datatype, words.take("flags").replace("|", ","))
    return Bits(of, mask, value, operator == "!=")


def _among(words: Words, key: Key, value: Callable[[Words], Led] | None) -> Among:
    """Read a set or map: its name, or what is in it."""
    word = words.take("a set")
    if word.startswith("@"):
        return word[1:]
    if word != "{":
        raise Wrong(f"{word!r} where a set should be: @NAME or {{ ... }}")
    members: Members[Led] = Members()
    for parts, led, _ in elements_of(words, _datatypes(key), value):
        if parts is None:
            members.other = led
        else:
            members.add(parts, led)
    return members
