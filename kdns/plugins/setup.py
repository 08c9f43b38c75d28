"""How a directive becomes plugins: the readers that all `setup` functions share.

Each plugin module has one `setup(directives, cx) -> list[Plugin]` that gets every directive
of its word in one server block, reports all it finds wrong to cx.problems and returns what
could be built. It opens nothing and starts nothing.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from kdns.corefile import Directive, Option, Problems, Token, nearest
from kdns.dns.name import BadName, parse_name
from kdns.metrics import Metrics
from kdns.plugins.plugin import ServerFacts

_DURATION = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")
_UNIT = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(slots=True)
class Setup:
    """What a setup function may use.

    clock  -- monotonic seconds; random -- for what need not be secret (rotation)
    facts  -- the server block the plugin stands in
    read   -- gives a file that another file names ($INCLUDE): (content, "") or (None, why not);
              called while a WatchFile is loaded, never during setup
    wall   -- seconds since 1970, for time stamps in metrics
    """

    problems: Problems
    facts: ServerFacts
    metrics: Metrics
    clock: Callable[[], float]
    random: random.Random
    log: logging.Logger = field(default_factory=lambda: logging.getLogger("kdns"))
    read: Callable[[str], tuple[bytes | None, str]] = lambda path: (None, f"{path}: not read here")
    wall: Callable[[], float] = lambda: 0.0

    def logger(self, word: str) -> logging.Logger:
        """Return the logger whose lines start with `plugin/WORD:`."""
        return self.log.getChild(f"plugin/{word}")

    def once(self, directives: Sequence[Directive]) -> Directive:
        """Return the first directive; report a second one as CoreDNS does."""
        for extra in directives[1:]:
            self.problems.error(
                extra.word,
                f"plugin/{extra.name}: this plugin can only be used once per Server Block;"
                f" the first is in line {directives[0].word.line}",
            )
        return directives[0]

    def arg_count(self, at: Directive | Option, low: int, high: int | None = None) -> bool:
        """Report a wrong number of arguments; high None: no upper limit."""
        n = len(at.args)
        if n < low:
            need = "an argument" if low == 1 else f"{low} arguments"
            self.problems.error(at.word, f"'{at.name}' needs {need}, found {n or 'none'}")
            return False
        if high is not None and n > high:
            extra = at.args[high]
            self.problems.error(extra, f"unexpected '{extra}' after '{at.name}'")
            return False
        return True

    def no_args(self, at: Directive | Option) -> bool:
        return self.arg_count(at, 0, 0)

    def unknown_option(self, option: Option, known: Iterable[str]) -> None:
        """Report an option the plugin does not have, with the nearest it has."""
        known = sorted(known)
        self.problems.error(
            option.word,
            f"unknown property '{option.name}'"
            + (nearest(option.name, known) or (f" (known: {', '.join(known)})" if known else "")),
        )

    def duration(self, token: Token, bare_unit: float | None = None) -> float:
        """Return seconds of a Go duration ("5s", "1m30s"). bare_unit: what a number without
        a unit counts; None: such a number is an error, except 0."""
        value = parse_duration(token.text)
        if value is None:
            try:
                number = float(token.text)
            except ValueError:
                number = -1.0
            if number == 0 or (number > 0 and bare_unit is not None):
                return number * (bare_unit or 0)
            self.problems.error(token, f"'{token}' is not a duration; write it as 5s or 1m30s")
            return 0.0
        return value

    def integer(self, token: Token, low: int, high: int, what: str) -> int:
        """Return the number in `token`; report one that is not in low..high."""
        try:
            value = int(token.text)
        except ValueError:
            self.problems.error(token, f"{what} must be a number, found '{token}'")
            return low
        if not low <= value <= high:
            self.problems.error(token, f"{what} must be in range [{low}, {high}]: {value}")
            return low
        return value

    def zones(self, tokens: Sequence[Token]) -> tuple[bytes, ...]:
        """Return the zones named by `tokens` as lower-case wire names, those of the server
        block if there are none. CIDRs become reverse zones."""
        if not tokens:
            return tuple(parse_name(zone).lower() for zone in self.facts.zones)
        return tuple(zone for token in tokens for zone in self.zone(token))

    def zone(self, token: Token) -> tuple[bytes, ...]:
        """Return the wire names a zone argument stands for (several for a CIDR)."""
        from kdns.dns.reverse import reverse_zones

        try:
            cidr = reverse_zones(token.text)
            if cidr is not None:
                return cidr
            text = token.text if token.text.endswith(".") else token.text + "."
            return (parse_name(text).lower(),)
        except BadName as e:
            self.problems.error(token, f"zone is not a valid domain name: {e}")
            return ()

    def listen_address(self, token: Token) -> str:
        """Return the `host:port` (host may be empty) to listen on; report what is not one."""
        host, colon, port = token.text.rpartition(":")
        if not colon or (":" in host and not (host.startswith("[") and host.endswith("]"))):
            self.problems.error(
                token, f"address {token}: missing port in address; write it as :8080 or [::1]:8080"
            )
        elif not (port.isascii() and port.isdecimal() and len(port) < 6 and int(port) < 65536):
            self.problems.error(token, f"address {token}: invalid port '{port}'")
        return token.text

    def path(self, text: str) -> str:
        """Return a file argument relative to the `root` of the server block."""
        return text if text.startswith("/") else f"{self.facts.root}/{text}"


def parse_duration(text: str) -> float | None:
    """Return seconds of a Go duration such as "1h2m3.5s"; None if it is not one."""
    total, at = 0.0, 0
    for match in _DURATION.finditer(text):
        if match.start() != at:
            return None
        total += float(match[1]) * _UNIT[match[2]]
        at = match.end()
    return total if at and at == len(text) else None
