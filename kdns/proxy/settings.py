"""How one setting of the proxy is written: in a file, as a flag, and back again.

Decides which values are right, and says so in one clause ("must be ..."). Which settings
there are is config.py's; how flags are spelt is flags.py's.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Iterable
from difflib import get_close_matches
from fractions import Fraction
from typing import Any, Final

MAX_SECONDS = (1 << 63) / 1e9  # Go's time.Duration, int64 of nanoseconds
MAX_INT32 = (1 << 31) - 1
MAX_INTERFACE = 15  # octets of an interface's name (IFNAMSIZ without its NUL)
MAX_PREFIX = 14  # of its beginning: iptables writes "+" behind it, and counts that

_UNITS: Final = {
    "ns": Fraction(1, 10**9),
    "us": Fraction(1, 10**6),
    "µs": Fraction(1, 10**6),
    "μs": Fraction(1, 10**6),
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "m": Fraction(60),
    "h": Fraction(3600),
}
_PIECE = r"(\d{1,20}(?:\.\d{0,20})?|\.\d{1,20})(ns|us|µs|μs|ms|s|m|h)"
_DURATION = re.compile(rf"([-+]?)((?:{_PIECE})+)", re.ASCII)
_PIECES = re.compile(_PIECE, re.ASCII)
# strconv.ParseBool's words.
BOOLS: Final = {
    **dict.fromkeys(("1", "t", "T", "true", "TRUE", "True"), True),
    **dict.fromkeys(("0", "f", "F", "false", "FALSE", "False"), False),
}


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `, did you mean 'x'?` or an empty string."""
    folded = {one.lower(): one for one in known}
    match = get_close_matches(word.lower(), list(folded), 1, 0.6)
    return f", did you mean '{folded[match[0]]}'?" if match else ""


def parse_duration(text: str) -> float | None:
    """Return the seconds of a Go duration ("1m30s", "250ms", "0"), or None if it is none."""
    if text in ("0", "+0", "-0"):
        return 0.0
    match = _DURATION.fullmatch(text)
    if match is None:
        return None
    total = sum((Fraction(n.rstrip(".")) * _UNITS[u] for n, u in _PIECES.findall(match[2])),
                Fraction(0))  # fmt: skip
    seconds = float(-total if match[1] == "-" else total)
    return seconds if abs(seconds) <= MAX_SECONDS else None


def render_duration(seconds: float) -> str:
    """Return seconds the way Go prints a duration: 90.0 -> "1m30s", 0.25 -> "250ms"."""
    left = round(abs(seconds) * 10**9)
    sign = "-" if seconds < 0 and left else ""
    if left == 0:
        return "0s"
    for unit, size in (("ns", 1), ("µs", 10**3), ("ms", 10**6)):
        if left < size * 1000:
            return f"{sign}{_decimal(left, size)}{unit}"
    minutes, rest = divmod(left, 60 * 10**9)
    hours, minutes = divmod(minutes, 60)
    head = f"{hours}h{minutes}m" if hours else f"{minutes}m" if minutes else ""
    return f"{sign}{head}{_decimal(rest, 10**9)}s"


def _decimal(amount: int, unit: int) -> str:
    whole, part = divmod(amount, unit)
    digits = str(part).rjust(len(str(unit)) - 1, "0").rstrip("0") if part else ""
    return f"{whole}.{digits}" if digits else str(whole)


class Kind:
    """One kind of value. Both readers raise ValueError with what would be right.

    metavar -- stands for the value in `--help`; "" for a switch, which needs none
    """

    metavar = "TEXT"

    def read(self, value: object) -> Any:
        """Return the value of a parsed YAML or JSON value."""
        raise NotImplementedError

    def is_zero(self, value: object) -> bool:
        """True for what Go writes for a value that nobody set."""
        return value == "" and isinstance(value, str)

    def parse(self, text: str) -> Any:
        """Return the value of a flag's text."""
        return self.read(text)

    def render(self, value: Any) -> object:
        """Return what read() takes."""
        return value

    def show(self, value: Any) -> str:
        """Return the text that parse() takes."""
        return str(self.render(value))


class Text(Kind):
    """Any text."""

    def __init__(self, metavar: str = "TEXT") -> None:
        self.metavar = metavar

    def read(self, value: object) -> str:
        if not isinstance(value, str):
            raise ValueError("must be text (put it in quotes)")
        return value


class Word(Kind):
    """One of a few words."""

    def __init__(self, words: Iterable[str], metavar: str) -> None:
        self.words = tuple(words)
        self.metavar = metavar

    def read(self, value: object) -> str:
        if isinstance(value, str) and value in self.words:
            return value
        raise ValueError(f"must be {_either(self.words)}{nearest(str(value), self.words)}")


class Interface(Kind):
    """The name of a network interface, or how it begins. most -- octets it may have"""

    metavar = "NAME"

    def __init__(self, most: int = MAX_INTERFACE) -> None:
        self.most = most

    def read(self, value: object) -> str:
        if not isinstance(value, str) or len(value.encode()) > self.most:
            raise ValueError(f"must be an interface's name of at most {self.most} characters")
        # Linux takes nearly all else; but iptables' words are quoted, and may begin like these.
        if any(c.isspace() or c in "/\\\"'" for c in value) or value.startswith(("-", "!")):
            raise ValueError("must be an interface's name, without spaces, slashes and quotes")
        return value


class Switch(Kind):
    """Yes or no."""

    metavar = ""

    def read(self, value: object) -> bool:
        if not isinstance(value, bool):
            raise ValueError("must be true or false")
        return value

    def parse(self, text: str) -> bool:
        found = BOOLS.get(text)
        if found is None:
            raise ValueError("must be true or false")
        return found

    def show(self, value: Any) -> str:
        return str(value).lower()


class Whole(Kind):
    """A whole number with bounds."""

    metavar = "N"

    def __init__(self, low: int = 0, high: int = MAX_INT32) -> None:
        self.low, self.high = low, high

    def is_zero(self, value: object) -> bool:
        return value == 0 and isinstance(value, int | float) and not isinstance(value, bool)

    def read(self, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"must be a whole number from {self.low} to {self.high}")
        if not self.low <= value <= self.high:
            raise ValueError(f"must be from {self.low} to {self.high}")
        return value

    def parse(self, text: str) -> int:
        try:
            number = int(text, 0)
        except ValueError:
            return self.read(text)
        return self.read(number)


class Number(Kind):
    """A number."""

    metavar = "N"

    def is_zero(self, value: object) -> bool:
        return value == 0 and isinstance(value, int | float) and not isinstance(value, bool)

    def read(self, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError("must be a number")
        if not math.isfinite(value):
            raise ValueError("must be a number that is not infinite")
        return float(value)

    def parse(self, text: str) -> float:
        try:
            return self.read(float(text))
        except ValueError:
            raise ValueError("must be a number") from None

    def render(self, value: Any) -> object:
        return int(value) if float(value).is_integer() else value


class Duration(Kind):
    """Seconds, written as Go does. positive -- 0 is not right."""

    metavar = "DURATION"

    def __init__(self, positive: bool = False) -> None:
        self.positive = positive

    def is_zero(self, value: object) -> bool:
        return isinstance(value, str) and parse_duration(value) == 0

    def read(self, value: object) -> float:
        seconds = parse_duration(value) if isinstance(value, str) else None
        if seconds is None:
            raise ValueError("must be a duration such as 30s or 1m30s")
        if seconds < 0 or (self.positive and seconds == 0):
            raise ValueError(f"must be {'more than 0' if self.positive else '0 or more'}")
        return seconds

    def render(self, value: Any) -> object:
        return render_duration(value)


class Flush(Duration):
    """A duration that may also be a number of nanoseconds (Go's TimeOrMetaDuration)."""

    def is_zero(self, value: object) -> bool:
        return (isinstance(value, int) and value == 0) or super().is_zero(value)

    def read(self, value: object) -> float:
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value / 1e9
        return super().read(value)


class Ip(Kind):
    """An IP address."""

    metavar = "IP"

    def read(self, value: object) -> str:
        try:
            if isinstance(value, str):
                return str(ipaddress.ip_address(value))
        except ValueError:
            pass
        raise ValueError("must be an IP address such as 192.0.2.1 or 2001:db8::1")


class Listen(Kind):
    """An address to listen on, "IP:port"; "": do not listen. A lone IP gets `port`."""

    metavar = "IP:PORT"

    def __init__(self, port: int) -> None:
        self.port = port

    def read(self, value: object) -> str:
        if value == "":
            return ""
        if not isinstance(value, str):
            raise ValueError(self._right())
        try:
            return render_listen(str(ipaddress.ip_address(value.strip("[]"))), self.port)
        except ValueError:
            pass
        host, colon, port = value.rpartition(":")
        try:
            if not colon or (":" in host and not (host[0] == "[" and host[-1] == "]")):
                raise ValueError
            address = str(ipaddress.ip_address(host.strip("[]")))
        except ValueError:
            raise ValueError(self._right()) from None
        if not (port.isascii() and port.isdecimal() and 0 < int(port[:6]) < 65536):
            raise ValueError("must have a port from 1 to 65535")
        return render_listen(address, int(port))

    def _right(self) -> str:
        return f"must be IP:port such as 0.0.0.0:{self.port} or [::1]:{self.port}"


def render_listen(address: str, port: int) -> str:
    """Return "address:port", with brackets where the address is IPv6."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def parse_cidr(text: object) -> str:
    """Return a CIDR with its host bits cleared. Raises ValueError with what would be right."""
    right = "must be a CIDR such as 10.244.0.0/16 or fd00:10:244::/56"
    if not isinstance(text, str):
        raise ValueError(right)
    address, slash, _ = text.partition("/")
    try:
        network = ipaddress.ip_network(text.strip(), strict=False)
    except ValueError:
        raise ValueError(right) from None
    if not slash:
        raise ValueError(f"{right}; write {network} for the one address {address}")
    return str(network)


class Cidrs(Kind):
    """A list of CIDRs; as a flag they are separated by commas."""

    metavar = "CIDR,..."

    def read(self, value: object) -> tuple[str, ...]:
        if not isinstance(value, list | tuple):
            raise ValueError("must be a list of CIDRs")
        return tuple(self._one(one) for one in value)

    def _one(self, value: object) -> str:
        try:
            return parse_cidr(value)
        except ValueError as e:
            raise ValueError(f"entry {value!r} {e}") from None

    def parse(self, text: str) -> tuple[str, ...]:
        return self.read([one.strip() for one in text.split(",")] if text else [])

    def render(self, value: Any) -> object:
        return list(value)

    def show(self, value: Any) -> str:
        return ",".join(value)


class ClusterCidrs(Cidrs):
    """One CIDR a family, in one text separated by a comma, also in a file."""

    def read(self, value: object) -> tuple[str, ...]:
        if not isinstance(value, str):
            raise ValueError("must be one text with the CIDRs, separated by a comma")
        return self.parse(value)

    def parse(self, text: str) -> tuple[str, ...]:
        found = tuple(self._one(one.strip()) for one in text.split(",")) if text else ()
        if len({":" in one for one in found}) < len(found):
            raise ValueError("must be at most one IPv4 and one IPv6 CIDR")
        return found

    def render(self, value: Any) -> object:
        return ",".join(value)


PRIMARY, ALL, LOCALHOST = "primary", "all", "localhost"
# Words for CIDRs among the node-port addresses; `primary` is known by the Node alone.
KEYWORDS: Final = {
    PRIMARY: (),
    ALL: ("0.0.0.0/0", "::/0"),
    LOCALHOST: ("127.0.0.0/8", "::1/128"),
}


class NodePortAddresses(Cidrs):
    """CIDRs, or words that stand for some."""

    metavar = "CIDR,...|primary"

    def _one(self, value: object) -> str:
        if isinstance(value, str) and value in KEYWORDS:
            return value
        try:
            return super()._one(value)
        except ValueError as e:
            raise ValueError(f"{e}; or the word {_either(KEYWORDS)}") from None


class Gates(Kind):
    """Feature gates: name -> on or off, kept as pairs in order of name."""

    metavar = "NAME=BOOL,..."

    def read(self, value: object) -> tuple[tuple[str, bool], ...]:
        if not isinstance(value, dict) or not all(isinstance(on, bool) for on in value.values()):
            raise ValueError("must map names to true or false")
        return tuple(sorted((str(name), on) for name, on in value.items()))

    def parse(self, text: str) -> tuple[tuple[str, bool], ...]:
        gates = {}
        for one in filter(None, text.split(",")):
            name, _, on = one.partition("=")
            if on.strip() not in BOOLS:
                raise ValueError("must be NAME=true or NAME=false, separated by commas")
            gates[name.strip()] = BOOLS[on.strip()]
        return self.read(gates)

    def render(self, value: Any) -> object:
        return dict(value)

    def show(self, value: Any) -> str:
        return ",".join(f"{name}={str(on).lower()}" for name, on in value)


def _either(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last
