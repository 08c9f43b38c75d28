"""One iptables rule: its words -> what it asks for and what it does, as values.

Decides what a rule's options mean (iptables(8), iptables-extensions(8)), and refuses what
iptables would refuse or what kdns does not know: nothing is passed over in silence. Tables
and chains are ruleset.py's; what becomes of a packet is packet.py's.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal, TypeAlias

from kdns.proxy.matches import (
    Address,
    AddressType,
    Assumed,
    Chance,
    Counter,
    Interface,
    MarkIs,
    Match,
    Never,
    Ports,
    ProtocolIs,
    Recent,
    State,
    TcpFlags,
    render_socket,
)

# table -> its built-in chains (iptables(8))
BUILT_IN: Mapping[str, tuple[str, ...]] = {
    "raw": ("PREROUTING", "OUTPUT"),
    "mangle": ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"),
    "nat": ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"),
    "filter": ("INPUT", "FORWARD", "OUTPUT"),
    "security": ("INPUT", "FORWARD", "OUTPUT"),
}
ALL_ONES = 0xFFFFFFFF  # of a packet mark


@dataclass(frozen=True, slots=True)
class Final:
    """ACCEPT, DROP, or RETURN to the calling chain."""

    word: Literal["ACCEPT", "DROP", "RETURN"]

    def __str__(self) -> str:
        return self.word


@dataclass(frozen=True, slots=True)
class Reject:
    """REJECT. answer -- the ICMP error or "tcp-reset"; "": the family's port unreachable."""

    answer: str

    def __str__(self) -> str:
        return f"REJECT with {self.answer or 'port unreachable'}"


@dataclass(frozen=True, slots=True)
class Jump:
    """To a chain of the table. goto: the way back is not to this chain but to its caller."""

    chain: str
    goto: bool = False

    def __str__(self) -> str:
        return f"go to {self.chain}" if self.goto else f"-> {self.chain}"


@dataclass(frozen=True, slots=True)
class Mark:
    """The packet's mark becomes (mark without `mask`) xor `value`."""

    value: int
    mask: int

    def __str__(self) -> str:
        if self.value == self.mask:
            return f"mark {self.value:#x} set"
        if self.mask == 0:
            return f"mark {self.value:#x} flipped"
        return f"mark set to {self.value:#x}/{self.mask:#x}"


@dataclass(frozen=True, slots=True)
class Masquerade:
    """The source becomes an address of the node."""

    def __str__(self) -> str:
        return "MASQUERADE"


@dataclass(frozen=True, slots=True)
class Rewrite:
    """DNAT and SNAT. address "" or port 0: stays as it is."""

    of_source: bool
    address: str
    port: int

    def __str__(self) -> str:
        to = render_socket(self.address, self.port) if self.port else self.address
        return f"{'SNAT' if self.of_source else 'DNAT'} to {to}"


@dataclass(frozen=True, slots=True)
class Redirect:
    """DNAT to the node itself. port 0: stays as it is."""

    port: int

    def __str__(self) -> str:
        return f"REDIRECT to port {self.port}" if self.port else "REDIRECT"


@dataclass(frozen=True, slots=True)
class Untrack:
    """conntrack does not see the packet, so no nat table does either."""

    def __str__(self) -> str:
        return "not tracked"


@dataclass(frozen=True, slots=True)
class PassOn:
    """A target that changes nothing a walk tells of, such as LOG; the next rule follows."""

    word: str

    def __str__(self) -> str:
        return self.word


Target: TypeAlias = (
    Final | Reject | Jump | Mark | Masquerade | Rewrite | Redirect | Untrack | PassOn | None
)


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule; equal to another that means the same, however it was written.

    matches -- in the order in which the kernel asks them
    target  -- None: the rule only counts
    text    -- as it was written, without "-A CHAIN "
    line    -- where, from 1
    """

    matches: tuple[Match, ...]
    target: Target
    comment: str = ""
    text: str = field(default="", compare=False)
    line: int = field(default=0, compare=False)


class Wrong(Exception):
    """What is wrong with a line, and what would be right."""


class Unknown(Wrong):
    """A match or target that iptables may well know, but kdns does not."""


# --- Words -------------------------------------------------------------------------------------

_WORD = re.compile(r'(?:[^\s"]|"(?:[^"\\]|\\.)*")+|"')
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
_ESCAPED = re.compile(r"\\(.)")
_PLAIN = re.compile(r"[^\s\"'\\]+")


def words_of(line: str) -> list[str]:
    """Split a line as iptables-restore does: "..." is one word, with \\ before " and \\."""
    if '"' not in line:
        return line.split()
    found = _WORD.findall(line)
    if '"' in found:
        raise Wrong('a quoted word does not end: write " after it')
    return [
        _QUOTED.sub(lambda m: _ESCAPED.sub(r"\1", m[1]), word) if '"' in word else word
        for word in found
    ]


def quoted(words: Iterable[str]) -> str:
    """Put words together again so that words_of() finds them."""
    return " ".join(
        word if _PLAIN.fullmatch(word) else '"' + re.sub(r'(["\\])', r"\\\1", word) + '"'
        for word in words
    )


def comment_of(words: Sequence[str]) -> str:
    """Return a rule's comment; "" if it has none."""
    at = words.index("--comment") + 1 if "--comment" in words else len(words)
    return words[at] if at < len(words) else ""


# --- One rule ----------------------------------------------------------------------------------


@dataclass(slots=True)
class FamilySeen:
    """The family that the rules have shown to be of so far."""

    version: Literal[4, 6] | None = None

    def claim(self, version: int, what: str) -> None:
        if self.version is None:
            self.version = 4 if version == 4 else 6
        elif self.version != version:
            raise Wrong(f"{what} is IPv{version} among IPv{self.version} rules")

    def network(self, word: str) -> tuple[int, int]:
        """Return an address or CIDR as (network, mask)."""
        try:
            network = ipaddress.ip_network(word, strict=False)
        except ValueError:
            raise Wrong(
                f"{word!r} is no address: write one, or a CIDR such as 10.0.0.0/8"
            ) from None
        self.claim(network.version, word)
        return int(network.network_address), int(network.netmask)


@dataclass(frozen=True, slots=True)
class _Option:
    """An option with its arguments."""

    args: tuple[str, ...]
    negated: bool


_Options: TypeAlias = Mapping[str, _Option]

_ALIASES = {
    "--source": "-s",
    "--src": "-s",
    "--destination": "-d",
    "--dst": "-d",
    "--in-interface": "-i",
    "--out-interface": "-o",
    "--protocol": "-p",
    "--proto": "-p",
    "--jump": "-j",
    "--goto": "-g",
    "--match": "-m",
    "--source-port": "--sport",
    "--destination-port": "--dport",
    "--source-ports": "--sports",
    "--destination-ports": "--dports",
}
_PROTOCOL_NUMBERS = {
    "1": "icmp", "2": "igmp", "6": "tcp", "17": "udp", "33": "dccp", "47": "gre", "50": "esp",
    "51": "ah", "58": "ipv6-icmp", "89": "ospf", "112": "vrrp", "132": "sctp", "136": "udplite",
}  # fmt: skip
_PROTOCOLS = frozenset(_PROTOCOL_NUMBERS.values())
_PROTOCOL_ALIASES = {**_PROTOCOL_NUMBERS, "icmpv6": "ipv6-icmp", "icmp6": "ipv6-icmp"}


def parse_rule(words: list[str], table: str, family: FamilySeen, line: int, text: str = "") -> Rule:
    """Read a rule's words, "-A CHAIN" taken away.

    text -- the same as it was written; "": the words are put together again
    Raises Wrong, and Unknown for what iptables may know better than kdns.
    """
    header: dict[str, Match] = {}
    loaded: list[tuple[str, dict[str, _Option]]] = []
    jump: tuple[str, dict[str, _Option], bool] | None = None
    negated, at = False, 0

    def take(count: int, option: str) -> tuple[str, ...]:
        nonlocal at
        args = tuple(words[at : at + count])
        if len(args) < count:
            raise Wrong(f"{option} wants {count} argument{'s' if count > 1 else ''}")
        at += count
        return args

    while at < len(words):
        written = words[at]
        at += 1
        word = _ALIASES.get(written, written)
        if word == "!":
            if negated:
                raise Wrong("! twice: write it once")
            negated = True
            continue
        if word in ("-m", "-j", "-g"):
            (name,) = take(1, word)
            if negated:
                raise Wrong(f"! before {written}: write it before the option that is meant")
            if word == "-m":
                if name not in _MATCHES:
                    raise Unknown(_not_known("match", name, _MATCHES))
                loaded.append((name, {}))
            elif jump is not None:
                raise Wrong(f"a second target {name}: a rule has one")
            else:
                jump = name, {}, word == "-g"
        elif word in _HEADER:
            if word in header:
                raise Wrong(f"{written} twice: write it once")
            (arg,) = take(1, written)
            found = _HEADER[word](arg, negated, family)
            if found is not None:
                header[word] = found
        else:
            options, count = _owner(word, loaded, jump, header)
            if word in options:
                raise Wrong(f"{written} twice: write it once")
            if negated and word not in _NEGATABLE:
                raise Wrong(f"{written} cannot be negated: leave the ! out")
            options[word] = _Option(take(count, written), negated)
        negated = False
    if negated:
        raise Wrong("! at the end: write an option after it")

    protocol = header.get("-p")
    asked: list[Match] = [header[key] for key in _HEADER if key in header]
    for name, options in loaded:
        _check_protocol(name, protocol)
        if not options and name in _WANTS_OPTIONS:
            raise Wrong(f"match {name} wants one of {', '.join(_MATCHES[name].options)}")
        asked += _MATCHES[name].build(options, family)
    target = _target(*jump, table, family) if jump else None
    return Rule(tuple(asked), target, comment_of(words), text or quoted(words), line)


def _owner(
    word: str,
    loaded: list[tuple[str, dict[str, _Option]]],
    jump: tuple[str, dict[str, _Option], bool] | None,
    header: Mapping[str, Match],
) -> tuple[dict[str, _Option], int]:
    """Return where an option belongs, and how many arguments it has: to the target, or to the
    last match that knows it; `-p tcp` loads the match tcp if need be."""
    if jump is not None and not jump[2]:
        kind = _TARGETS.get(jump[0])
        if kind is not None and word in kind.options:
            return jump[1], kind.options[word]
    for name, options in reversed(loaded):
        if word in _MATCHES[name].options:
            return options, _MATCHES[name].options[word]
    protocol = header.get("-p")
    if isinstance(protocol, ProtocolIs) and protocol.name in _MATCHES:
        implied = _MATCHES[protocol.name]
        if word in implied.options:
            loaded.append((protocol.name, {}))
            return loaded[-1][1], implied.options[word]
    known: list[str] = [*_HEADER]
    names = [name for name, _ in loaded]
    if isinstance(protocol, ProtocolIs) and protocol.name in _MATCHES:
        names.append(protocol.name)
    for name in dict.fromkeys(names):
        known += _MATCHES[name].options
    if jump is not None and jump[0] in _TARGETS:
        known += _TARGETS[jump[0]].options
    raise Unknown(_not_known("option", word, known))


def _not_known(kind: str, word: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(word, known, 1)
    right = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
    return f"{kind} {word} is not known here: {right}"


def _check_protocol(name: str, protocol: Match | None) -> None:
    """Ports are asked for where there are ports (the kernel refuses anything else)."""
    wanted = _NEEDS_PROTOCOL.get(name)
    if wanted is None or (isinstance(protocol, ProtocolIs) and not protocol.negated
                          and protocol.name in wanted):  # fmt: skip
        return
    raise Wrong(f"match {name} needs the protocol: write -p {wanted[0]}")


_NEGATABLE = frozenset(
    "--sport --dport --sports --dports --ports --syn --tcp-flags --icmp-type --icmpv6-type"
    " --src-type --dst-type --ctstate --state --mark --probability --every --set --rcheck"
    " --update --remove".split()
)
_WANTS_OPTIONS = frozenset(("comment", "multiport", "addrtype", "conntrack", "state"))
_NEEDS_PROTOCOL = {
    "tcp": ("tcp",),
    "udp": ("udp",),
    "sctp": ("sctp",),
    "multiport": ("tcp", "udp", "sctp", "udplite", "dccp"),
    "icmp": ("icmp",),
    "icmp6": ("ipv6-icmp",),
}


# What stands before the matches. The kernel compares these first, whatever the order.


def _protocol(word: str, negated: bool, family: FamilySeen) -> Match | None:
    name = word.lower()
    name = _PROTOCOL_ALIASES.get(name, name)
    if name in ("all", "0"):
        return None
    if name not in _PROTOCOLS:
        raise Wrong(_not_known("protocol", word, _PROTOCOLS))
    return ProtocolIs(name, negated)


def _address(of_source: bool) -> Callable[[str, bool, FamilySeen], Match]:
    return lambda word, negated, family: Address(of_source, *family.network(word), negated)


def _interface(incoming: bool) -> Callable[[str, bool, FamilySeen], Match]:
    def build(word: str, negated: bool, family: FamilySeen) -> Match:
        return Interface(incoming, word.removesuffix("+"), word.endswith("+"), negated)

    return build


_HEADER: Mapping[str, Callable[[str, bool, FamilySeen], Match | None]] = {
    "-p": _protocol,
    "-s": _address(True),
    "-d": _address(False),
    "-i": _interface(True),
    "-o": _interface(False),
}


# --- Matches -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _MatchKind:
    """options -- each with the number of its arguments."""

    options: Mapping[str, int]
    build: Callable[[_Options, FamilySeen], Iterable[Match]]


def _number(word: str, what: str, most: int) -> int:
    try:
        number = int(word, 0)
    except ValueError:
        number = -1
    if not 0 <= number <= most:
        raise Wrong(f"{what} {word!r}: write a number from 0 to {most}")
    return number


def _range(word: str) -> tuple[int, int]:
    """Read 80, 80:90, :90 or 80:."""
    low, colon, high = word.partition(":")
    if not colon:
        high = low
    found = _port(low or ("0" if colon else ""), word), _port(high or "65535", word)
    if found[0] > found[1]:
        raise Wrong(f"ports {word!r}: the first is higher than the last")
    return found


def _port(word: str, whole: str) -> int:
    if not (word.isascii() and word.isdecimal()) or int(word) > 65535:
        raise Wrong(f"port {whole!r}: write a number from 0 to 65535, or a range such as 80:90")
    return int(word)


def _ports(options: _Options, family: FamilySeen) -> Iterator[Match]:
    for name, of_source, of_destination in (
        ("--sport", True, False),
        ("--dport", False, True),
        ("--sports", True, False),
        ("--dports", False, True),
        ("--ports", True, True),
    ):
        if name in options:
            option = options[name]
            ranges = tuple(_range(word) for word in option.args[0].split(","))
            if len(ranges) > 1 and not name.endswith("s"):
                raise Wrong(f"{name} takes one port or range: write -m multiport {name}s")
            yield Ports(ranges, of_source, of_destination, option.negated)


_TCP_FLAGS = frozenset(("SYN", "ACK", "FIN", "RST", "URG", "PSH"))


def _tcp(options: _Options, family: FamilySeen) -> Iterator[Match]:
    yield from _ports(options, family)
    if "--syn" in options:
        looked_at = frozenset(("SYN", "RST", "ACK", "FIN"))
        yield TcpFlags(looked_at, frozenset(("SYN",)), options["--syn"].negated)
    if "--tcp-flags" in options:
        option = options["--tcp-flags"]
        yield TcpFlags(_flags(option.args[0]), _flags(option.args[1]), option.negated)


def _flags(word: str) -> frozenset[str]:
    names = {"ALL": _TCP_FLAGS, "NONE": frozenset[str]()}.get(word, frozenset(word.split(",")))
    if names - _TCP_FLAGS:
        raise Wrong(f"TCP flags {word!r}: of {', '.join(sorted(_TCP_FLAGS))}, ALL or NONE")
    return names


def _addrtype(options: _Options, family: FamilySeen) -> Iterator[Match]:
    for name, of_source in (("--src-type", True), ("--dst-type", False)):
        if name in options:
            kinds = frozenset(options[name].args[0].upper().split(","))
            if kinds - {"LOCAL", "MULTICAST"}:
                raise Unknown(f"{name} {options[name].args[0]}: known are LOCAL and MULTICAST")
            yield AddressType(of_source, kinds, options[name].negated)


_STATES = ("NEW", "ESTABLISHED", "RELATED", "INVALID", "UNTRACKED", "DNAT", "SNAT")


def _state(options: _Options, family: FamilySeen) -> Iterator[Match]:
    for option in options.values():
        states = frozenset(option.args[0].upper().split(","))
        for state in sorted(states.difference(_STATES)):
            raise Wrong(_not_known("connection state", state, _STATES))
        yield State(states, option.negated)


def _masked(word: str, what: str, mask: int = ALL_ONES) -> tuple[int, int]:
    """Read value[/mask]."""
    value, slash, written = word.partition("/")
    return _number(value, what, ALL_ONES), _number(written, what, ALL_ONES) if slash else mask


def _mark(options: _Options, family: FamilySeen) -> Iterator[Match]:
    if "--mark" not in options:
        raise Wrong("match mark wants --mark VALUE/MASK")
    option = options["--mark"]
    yield MarkIs(*_masked(option.args[0], "mark"), option.negated)


def _statistic(options: _Options, family: FamilySeen) -> Iterator[Match]:
    mode = options["--mode"].args[0] if "--mode" in options else ""
    if mode == "random" and "--probability" in options:
        option = options["--probability"]
        share = _probability(option.args[0])
    elif mode == "nth" and "--every" in options:
        # Which packet it is nobody can say beforehand, but how many it is.
        option = options["--every"]
        share = Fraction(1, max(1, _number(option.args[0], "--every", ALL_ONES)))
    else:
        raise Wrong("match statistic wants --mode random --probability P, or --mode nth --every N")
    yield Chance(1 - share if option.negated else share)


def _probability(word: str) -> Fraction:
    """Read a probability; what was 1/n before the kernel rounded it to 31 bits, or somebody to
    ten decimals, is 1/n again."""
    try:
        share = Fraction(word)
    except ValueError:
        share = Fraction(-1)
    if not 0 <= share <= 1:
        raise Wrong(f"probability {word!r}: write a number from 0 to 1")
    near = Fraction(1, round(1 / share)) if share else share
    return near if abs(near - share) < Fraction(1, 10**9) else share


_RECENT_ACTIONS: tuple[Literal["set", "rcheck", "update", "remove"], ...] = (
    "set",
    "rcheck",
    "update",
    "remove",
)


def _recent(options: _Options, family: FamilySeen) -> Iterator[Match]:
    actions = [action for action in _RECENT_ACTIONS if f"--{action}" in options]
    if len(actions) != 1:
        raise Wrong("match recent wants one of --set, --rcheck, --update and --remove")
    action = actions[0]
    seconds = 0
    if "--seconds" in options:
        seconds = _number(options["--seconds"].args[0], "--seconds", ALL_ONES)
    elif "--reap" in options:
        raise Wrong("--reap wants --seconds beside it")
    mask = (1 << 128) - 1
    if "--mask" in options:
        try:
            address = ipaddress.ip_address(options["--mask"].args[0])
        except ValueError:
            raise Wrong("--mask of match recent: write one such as 255.255.255.255") from None
        # All ones is what is meant where nothing is said; iptables-save prints it always.
        mask = int(address) if int(address) + 1 != 1 << address.max_prefixlen else mask
    name = options["--name"].args[0] if "--name" in options else "DEFAULT"
    negated = options[f"--{action}"].negated
    yield Recent(name, action, seconds, mask, "--rdest" not in options, negated)


def _limit(options: _Options, family: FamilySeen) -> Iterator[Match]:
    rate = options["--limit"].args[0] if "--limit" in options else "3/hour"
    yield Assumed(f"not more than {rate} fit")


def _nothing(options: _Options, family: FamilySeen) -> Iterable[Match]:
    return ()


def _icmp(options: _Options, family: FamilySeen) -> Iterable[Match]:
    return [Never("an ICMP type")] if options else ()


def _nfacct(options: _Options, family: FamilySeen) -> Iterator[Match]:
    if "--nfacct-name" not in options:
        raise Wrong("match nfacct wants --nfacct-name NAME")
    yield Counter(options["--nfacct-name"].args[0])


_PORT_OPTIONS = {"--sport": 1, "--dport": 1}
_MATCHES: Mapping[str, _MatchKind] = {
    "comment": _MatchKind({"--comment": 1}, _nothing),
    "tcp": _MatchKind({**_PORT_OPTIONS, "--syn": 0, "--tcp-flags": 2}, _tcp),
    "udp": _MatchKind(_PORT_OPTIONS, _ports),
    "sctp": _MatchKind(_PORT_OPTIONS, _ports),
    "multiport": _MatchKind({"--sports": 1, "--dports": 1, "--ports": 1}, _ports),
    "icmp": _MatchKind({"--icmp-type": 1}, _icmp),
    "icmp6": _MatchKind({"--icmpv6-type": 1}, _icmp),
    "addrtype": _MatchKind({"--src-type": 1, "--dst-type": 1}, _addrtype),
    "conntrack": _MatchKind({"--ctstate": 1}, _state),
    "state": _MatchKind({"--state": 1}, _state),
    "mark": _MatchKind({"--mark": 1}, _mark),
    "statistic": _MatchKind(
        {"--mode": 1, "--probability": 1, "--every": 1, "--packet": 1}, _statistic
    ),
    "recent": _MatchKind(
        {"--set": 0, "--rcheck": 0, "--update": 0, "--remove": 0, "--seconds": 1, "--reap": 0,
         "--name": 1, "--mask": 1, "--rsource": 0, "--rdest": 0},
        _recent,
    ),
    "limit": _MatchKind({"--limit": 1, "--limit-burst": 1}, _limit),
    "nfacct": _MatchKind({"--nfacct-name": 1}, _nfacct),
}  # fmt: skip


# --- Targets -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _TargetKind:
    """options -- each with the number of its arguments; tables -- where it may stand."""

    options: Mapping[str, int]
    build: Callable[[_Options, FamilySeen], Target]
    tables: tuple[str, ...] = tuple(BUILT_IN)


def _target(name: str, options: _Options, goto: bool, table: str, family: FamilySeen) -> Target:
    kind = None if goto else _TARGETS.get(name)
    if kind is None:
        # What is no chain either is found when the table is complete.
        return Jump(name, goto)
    if table not in kind.tables:
        raise Wrong(f"{name} belongs into table {' or '.join(kind.tables)}, not {table}")
    return kind.build(options, family)


# The words that iptables-save prints, and others that iptables takes for them.
_REJECTS = {
    4: ("icmp-net-unreachable", "icmp-host-unreachable", "icmp-port-unreachable",
        "icmp-proto-unreachable", "icmp-net-prohibited", "icmp-host-prohibited",
        "icmp-admin-prohibited"),
    6: ("icmp6-no-route", "icmp6-adm-prohibited", "icmp6-addr-unreachable",
        "icmp6-port-unreachable", "icmp6-policy-fail", "icmp6-reject-route"),
}  # fmt: skip
PORT_UNREACHABLE = {4: "icmp-port-unreachable", 6: "icmp6-port-unreachable"}


def _reject(options: _Options, family: FamilySeen) -> Target:
    word = options["--reject-with"].args[0] if "--reject-with" in options else ""
    if word in ("", "tcp-reset"):
        return Reject(word)
    for version, words in _REJECTS.items():
        if word in words:
            family.claim(version, word)
            return Reject("" if word == PORT_UNREACHABLE[version] else word)
    raise Wrong(_not_known("answer", word, ("tcp-reset", *_REJECTS[4], *_REJECTS[6])))


def _set_mark(options: _Options, family: FamilySeen) -> Target:
    if len(options) != 1:
        raise Wrong(f"MARK wants one of {', '.join(_MARK_OPTIONS)}")
    ((name, option),) = options.items()
    word = option.args[0]
    match name:
        case "--set-xmark":
            return Mark(*_masked(word, name))
        case "--set-mark":
            value, mask = _masked(word, name)
            return Mark(value, value | mask)
    value = _number(word, name, ALL_ONES)
    return {
        "--or-mark": Mark(value, value),
        "--xor-mark": Mark(value, 0),
        "--and-mark": Mark(0, ALL_ONES & ~value),
    }[name]


def _rewrite(of_source: bool, option: str) -> Callable[[_Options, FamilySeen], Target]:
    def build(options: _Options, family: FamilySeen) -> Target:
        if option not in options:
            raise Wrong(f"{'SNAT' if of_source else 'DNAT'} wants {option} ADDRESS:PORT")
        return Rewrite(of_source, *_socket(options[option].args[0], family))

    return build


def _socket(word: str, family: FamilySeen) -> tuple[str, int]:
    """Read address, address:port, [address]:port or :port; ranges are not understood."""
    if word.startswith("["):
        host, _, port = word[1:].partition("]")
        port = port.removeprefix(":")
    elif word.count(":") > 1:
        host, port = word, ""
    else:
        host, _, port = word.partition(":")
    if "-" in host or "-" in port:
        raise Unknown(f"range {word!r}: only one address and one port are understood here")
    if host:
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            raise Wrong(f"{word!r}: write ADDRESS:PORT, an IPv6 address in []") from None
        family.claim(address.version, host)
        host = str(address)
    return host, _port(port, word) if port else 0


def _redirect(options: _Options, family: FamilySeen) -> Target:
    word = options["--to-ports"].args[0] if "--to-ports" in options else "0"
    if "-" in word:
        raise Unknown(f"range {word!r}: only one port is understood here")
    return Redirect(_port(word, word))


def _masquerade(options: _Options, family: FamilySeen) -> Target:
    return Masquerade()


def _ct(options: _Options, family: FamilySeen) -> Target:
    if [*options] != ["--notrack"]:
        raise Unknown("target CT is known here with --notrack only")
    return Untrack()


def _final(word: Literal["ACCEPT", "DROP", "RETURN"]) -> _TargetKind:
    return _TargetKind({}, lambda options, family: Final(word))


def _pass_on(word: str, *with_argument: str, flags: Iterable[str] = ()) -> _TargetKind:
    options = {**dict.fromkeys(with_argument, 1), **dict.fromkeys(flags, 0)}
    return _TargetKind(options, lambda options, family: PassOn(word))


_MARK_OPTIONS = ("--set-xmark", "--set-mark", "--or-mark", "--xor-mark", "--and-mark")
_RANDOM = {"--random": 0, "--random-fully": 0}
_TARGETS: Mapping[str, _TargetKind] = {
    "ACCEPT": _final("ACCEPT"),
    "DROP": _final("DROP"),
    "RETURN": _final("RETURN"),
    "REJECT": _TargetKind({"--reject-with": 1}, _reject, ("filter",)),
    "MARK": _TargetKind(dict.fromkeys(_MARK_OPTIONS, 1), _set_mark),
    "MASQUERADE": _TargetKind({**_RANDOM, "--to-ports": 1}, _masquerade, ("nat",)),
    "DNAT": _TargetKind(
        {**_RANDOM, "--persistent": 0, "--to-destination": 1},
        _rewrite(False, "--to-destination"),
        ("nat",),
    ),
    "SNAT": _TargetKind(
        {**_RANDOM, "--persistent": 0, "--to-source": 1}, _rewrite(True, "--to-source"), ("nat",)
    ),
    "REDIRECT": _TargetKind({"--random": 0, "--to-ports": 1}, _redirect, ("nat",)),
    "NOTRACK": _TargetKind({}, lambda options, family: Untrack(), ("raw",)),
    "CT": _TargetKind({"--notrack": 0, "--zone": 1, "--helper": 1}, _ct, ("raw",)),
    "LOG": _pass_on(
        "LOG",
        "--log-level",
        "--log-prefix",
        flags=("--log-uid", "--log-ip-options", "--log-tcp-options", "--log-tcp-sequence"),
    ),
    "NFLOG": _pass_on("NFLOG", "--nflog-group", "--nflog-prefix", "--nflog-size"),
    "TCPMSS": _pass_on("TCPMSS", "--set-mss", flags=("--clamp-mss-to-pmtu",)),
    "CHECKSUM": _pass_on("CHECKSUM", flags=("--checksum-fill",)),
    "TRACE": _pass_on("TRACE"),
}
