"""The Corefile: text to server blocks (reference 2.5). No plugin is known here by name.

Grammar and expansion only: what a directive's words mean is its plugin's `setup`, which
reads them through Directive and reports to Problems, so that all mistakes of a file are
said at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches
from collections.abc import Iterable

from kdns.errors import Problem


@dataclass(frozen=True, slots=True)
class Token:
    """One word with its place. text is after quotes and environment variables."""

    text: str
    file: str
    line: int
    quoted: bool = False

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Option:
    """One line inside a directive's braces: `ttl 30` -> name "ttl", args ("30",)."""

    word: Token
    args: tuple[Token, ...]
    block: tuple[Option, ...] | None = None

    @property
    def name(self) -> str:
        return self.word.text


@dataclass(frozen=True, slots=True)
class Directive:
    """One plugin line of a server block with its options; options is None without braces."""

    word: Token
    args: tuple[Token, ...]
    options: tuple[Option, ...] | None = None

    @property
    def name(self) -> str:
        return self.word.text


@dataclass(frozen=True, slots=True)
class Key:
    """One server-block key: `[scheme://]zone[:port]`; zone is lower-case text with a final
    dot (a CIDR has been turned into its reverse zones)."""

    scheme: str
    zone: str
    port: int
    token: Token


@dataclass(frozen=True, slots=True)
class ServerBlock:
    keys: tuple[Key, ...]
    directives: tuple[Directive, ...]


@dataclass(frozen=True, slots=True)
class Corefile:
    """A whole parsed configuration. digest changes only if the meaning may have."""

    blocks: tuple[ServerBlock, ...]
    digest: str
    files: tuple[str, ...]


@dataclass(slots=True)
class Problems:
    """Collects what is wrong; nothing is raised until everything was read."""

    found: list[Problem] = field(default_factory=list)

    def error(self, at: Token, text: str) -> None:
        self.found.append(Problem(at.file, at.line, text))

    def warn(self, at: Token, text: str) -> None:
        self.found.append(Problem(at.file, at.line, text, warning=True))

    @property
    def errors(self) -> list[Problem]:
        return [p for p in self.found if not p.warning]


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `, did you mean 'x'?` or an empty string."""
    match = get_close_matches(word.lower(), list(known), 1, 0.6)
    return f", did you mean '{match[0]}'?" if match else ""
