"""The Corefile: text to server blocks (reference 2.5).

Grammar only: what a directive's words mean is its plugin's `setup`, which reads them through
Directive and reports to Problems, so that all mistakes of a file are said at once. After each
mistake the parser goes on at the next place it is sure of. Words and imports are
corefile_tokens.py's, zones and ports corefile_keys.py's.

Where CoreDNS is silent about a mistake, this is not: a stray brace, a plugin's name in a
zone's place, an encrypted zone without `tls` and the like are said here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha512

from kdns.corefile_keys import Key, Listeners, parse_key
from kdns.corefile_tokens import (
    Problems,
    Reader,
    Token,
    Word,
    expand_glob,
    nearest,
    read_text,
    snippet_name,
)
from kdns.plugins import NOT_HERE, ORDER

__all__ = [
    "Corefile",
    "Directive",
    "Key",
    "Option",
    "Problems",
    "ServerBlock",
    "Token",
    "nearest",
    "parse_corefile",
]

# Directives CoreDNS once had and removed: ignored, with a warning that says what to write.
REMOVED = {
    "proxy": "write 'forward FROM TO...' in its place",
    "federation": "take the line out, Kubernetes has no federation of this kind any more",
    "reverse": "write 'template' in its place, or list reverse zones with 'kubernetes'",
    "startup": "start the command outside of the DNS server",
    "shutdown": "start the command outside of the DNS server",
}

# What to do without a plugin that only CoreDNS has; for the others, take the line out.
INSTEAD = {
    "azure": "forward the zone to a server that has it",
    "clouddns": "forward the zone to a server that has it",
    "dnssec": "sign the zone beforehand and serve it with 'file'",
    "erratic": "use 'template' to make answers for tests",
    "etcd": "forward the zone to a server that has it",
    "grpc": "write 'forward' with an address or tls://ADDRESS",
    "grpc_server": "serve tls:// or https:// in its place",
    "https": "start the block's key with https://, it needs no options",
    "https3": "serve tls:// or https:// in its place",
    "k8s_external": "give such Services their names in a zone served with 'file' or 'hosts'",
    "nomad": "forward the zone to a server that has it",
    "on": "start the command outside of the DNS server",
    "quic": "serve tls:// or https:// in its place",
    "root": "write paths in full",
    "route53": "forward the zone to a server that has it",
    "secondary": "serve a copy of the zone with 'file', or forward the zone",
    "sign": "sign the zone beforehand and serve it with 'file'",
    "view": "give each kind of client a port or an address of its own",
}

# What people write who know the plugin by its package or by another program.
SYNONYMS = {"metrics": "prometheus", "k8s": "kubernetes", "zonefile": "file", "address": "bind"}


@dataclass(frozen=True, slots=True)
class Option:
    """One line inside a directive's braces: `ttl 30` -> name "ttl", args ("30",)."""

    word: Token
    args: tuple[Token, ...]

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
class ServerBlock:
    """keys is never empty: where none can be used, there is an error and a stand-in."""

    keys: tuple[Key, ...]
    directives: tuple[Directive, ...]


@dataclass(frozen=True, slots=True)
class Corefile:
    """A whole parsed configuration. digest changes only if the meaning may have; files are
    the Corefile and all it imports."""

    blocks: tuple[ServerBlock, ...]
    digest: str
    files: tuple[str, ...]


def parse_corefile(
    text: str,
    *,
    file: str = "Corefile",
    read: Callable[[str], str] = read_text,
    expand: Callable[[str], list[str]] = expand_glob,
    environ: Mapping[str, str] = os.environ,
    default_port: int = 53,
    words: Collection[str] = tuple(ORDER),
    unsupported: Collection[str] = NOT_HERE,
) -> tuple[Corefile, Problems]:
    """Return what `text` says, and everything that is wrong with it.

    file         -- its name in messages; relative imports start from its folder
    read, expand -- give a file's text (raises OSError), and the paths that match a pattern
    default_port -- for keys of scheme dns without a port
    words        -- the plugins there are; unsupported: those that only CoreDNS has

    Of a text with errors as much is returned as could be read.
    """
    problems = Problems()
    reader = Reader(text, file, problems, read, expand, environ)
    blocks = _Parser(reader, problems, default_port, words, unsupported).parse()
    if not blocks and not problems.errors:
        problems.error(
            Token("", file, 0), "no server block; the least that serves is '.:53 {', 'whoami', '}'"
        )
    # As they stand in the files, whatever the order in which they were found.
    order = {name: n for n, name in enumerate(reader.files)}
    problems.found.sort(key=lambda p: (order[p.file], p.line))
    return Corefile(tuple(blocks), _digest(blocks), tuple(reader.files)), problems


def _digest(blocks: Sequence[ServerBlock]) -> str:
    """Return the SHA-512 of the words without their places."""
    meaning = [
        (
            [str(key) for key in block.keys],
            [
                (
                    _texts(directive.word, directive.args),
                    None
                    if directive.options is None
                    else [_texts(option.word, option.args) for option in directive.options],
                )
                for directive in block.directives
            ],
        )
        for block in blocks
    ]
    return sha512(json.dumps(meaning).encode()).hexdigest()


def _texts(word: Token, args: Sequence[Token]) -> list[str]:
    return [word.text, *(arg.text for arg in args)]


def _glued(word: Word) -> Token | None:
    """Return `x` of a last word `x{`: somebody left out the blank before the brace."""
    token = word.token
    left = token.text[:-1]
    if token.quoted or not left or token.text[-1] != "{" or "{" in left or "}" in left:
        return None
    return Token(left, token.file, token.line)


class _Parser:
    def __init__(
        self,
        reader: Reader,
        problems: Problems,
        default_port: int,
        words: Collection[str],
        unsupported: Collection[str],
    ) -> None:
        self._reader = reader
        self._problems = problems
        self._default_port = default_port
        self._words = words
        self._unsupported = unsupported
        self._listeners = Listeners()
        self._nameless = 0  # blocks so far that have no key that can be used

    def parse(self) -> list[ServerBlock]:
        blocks = []
        while (word := self._reader.peek()) is not None:
            if word.closes:
                self._reader.take()
                self._stray(word.token)
                continue
            block = self._server_block(word.token)
            if block is not None:
                blocks.append(block)
        return blocks

    def _server_block(self, start: Token) -> ServerBlock | None:
        names, opened = self._names()
        name = snippet_name(names[0]) if len(names) == 1 else None
        if name is not None:
            self._snippet(names[0], name, opened)
            return None
        if not names and opened is None:
            return None
        if not any(name.text for name in names):
            self._problems.error(
                start, "server block without a zone; write '.:53 {' to serve all names"
            )
        directives, empty = self._directives(names, opened)
        keys = [
            key
            for name in names
            if name.text
            for key in parse_key(name, self._default_port, self._problems)
        ]
        block = ServerBlock(tuple(keys or [self._stand_in(start)]), tuple(directives))
        if keys:
            self._listeners.add(keys, _addresses(block), self._problems)
            self._check_tls(block)
        if not self._is_plugin(names, opened) and empty:
            self._problems.warn(
                start, "server block without plugins: it answers every query with REFUSED"
            )
        return block

    def _stand_in(self, start: Token) -> Key:
        """Return a key for a block without a good one, so that what is wrong with its
        plugins is said too. It is never served: there is an error."""
        self._nameless += 1
        return Key("dns", f"block-{self._nameless}.invalid.", 0, start)  # RFC 6761 s6.4

    # --- keys ---------------------------------------------------------------------------

    def _names(self) -> tuple[list[Token], Token | None]:
        """Read a block's keys and, if there is one, the '{' behind them."""
        names: list[Token] = []
        comma: Token | None = None
        while (word := self._reader.peek()) is not None:
            token = word.token
            if word.opens:
                self._reader.take()
                if comma is not None:
                    self._problems.error(
                        comma, "Expected another address but had '{' - check for extra comma"
                    )
                return names, token
            if (word.first and names and comma is None) or word.closes:
                return names, None
            self._reader.take()
            comma = None
            plain = _glued(word)
            if plain is not None:
                names += self._split(plain)
                self._problems.error(token, f"write a blank between '{plain}' and '{{'")
                return names, token
            names += self._split(token)
            if token.text.endswith(",") and not token.quoted:
                comma = token
        if comma is not None:
            self._problems.error(comma, f"Unexpected EOF: another key must follow '{comma}'")
        return names, None

    def _split(self, token: Token) -> list[Token]:
        if token.quoted or "," not in token.text:
            return [token]
        names = [part for part in token.text.split(",") if part]
        if len(names) > 1:
            self._problems.warn(
                token,
                f"'{token}' are {len(names)} zones here; CoreDNS takes it for one, so write a"
                " blank behind each comma",
            )
        return [Token(name, token.file, token.line) for name in names]

    def _snippet(self, token: Token, name: str, opened: Token | None) -> None:
        if opened is None:
            self._problems.error(
                token, f"Syntax error: expecting '{{' after the name of snippet ({name})"
            )
            return
        self._reader.define_snippet(token, name)

    # --- directives -----------------------------------------------------------------------

    def _directives(
        self, names: Sequence[Token], opened: Token | None
    ) -> tuple[list[Directive], bool]:
        """Read directives up to the '}' (the end of the file without '{'); also return
        whether there was none at all."""
        found: list[Directive] = []
        empty = True
        while (word := self._reader.peek()) is not None:
            if word.closes:
                self._reader.take()
                if opened is None:
                    self._stray(word.token, names[0] if names else None)
                return found, empty
            if self._starts_block(word):
                self._unfinished(word.token, names, opened)
                return found, empty
            if word.opens:
                self._reader.take()
                self._problems.error(word.token, "Unexpected '{': no directive stands before it")
                self._reader.skip_block()
                continue
            if self._reader.at_import():
                self._reader.do_import()
                continue
            empty = False
            directive = self._directive()
            if self._is_known(directive):
                found.append(directive)
            if self._ends_with_line():
                return found, empty
        if opened is not None:
            self._problems.error(
                opened, "Unexpected EOF: the '{' of this server block is never closed with '}'"
            )
        return found, empty

    def _starts_block(self, word: Word) -> bool:
        """True if this line can only be the head of another server block: its words look
        like keys and it ends in '{'."""
        if not word.first or word.token.quoted or word.token.text in self._words:
            return False
        line = self._reader.line()
        last = line[-1]
        keys = [w.token for w in line[:-1]]
        if not last.opens:
            glued = _glued(last)
            if glued is None:
                return False
            keys.append(glued)
        return bool(keys) and all(
            not key.quoted and (any(c in key.text for c in ".:/") or snippet_name(key) is not None)
            for key in keys
        )

    def _unfinished(self, found: Token, names: Sequence[Token], opened: Token | None) -> None:
        if opened is not None:
            self._problems.error(
                opened,
                "the '{' of this server block is not closed with '}' before the next one in line"
                f" {found.line}",
            )
        elif names:
            self._problems.error(
                names[0],
                f"the server block '{names[0]}' needs braces: only a file's last block can do"
                " without",
            )

    def _directive(self) -> Directive:
        """Read a directive with its arguments and options."""
        word, args, opened = self._line()
        if opened is None:
            ahead = self._reader.peek()
            if ahead is not None and ahead.opens:
                # CoreDNS takes the brace for a directive of this very name, given twice.
                self._reader.take()
                self._problems.error(
                    ahead.token, f"'{{' must stand in the line of '{word}', line {word.line}"
                )
                opened = ahead.token
        if opened is None:
            return Directive(word, tuple(args))
        options = self._options(word, opened)
        ahead = self._reader.peek()
        if ahead is not None and not ahead.first and not ahead.closes:
            self._problems.error(
                ahead.token, f"unexpected '{ahead.token}' behind '}}'; start a new line"
            )
        return Directive(word, tuple(args), tuple(options))

    def _ends_with_line(self) -> bool:
        """Report a '}' at the end of a directive's line; return whether it was meant to close
        the server block. It was not if the next line goes on with the block."""
        ahead = self._reader.peek()
        if ahead is None or ahead.first or not ahead.closes:
            return False
        self._reader.take()
        self._problems.error(
            ahead.token,
            "Unexpected '}' because no matching opening brace in this line; a server block's '}'"
            " needs a line of its own",
        )
        after = self._reader.peek()
        return after is None or not (after.closes or after.token.text in self._words)

    def _options(self, owner: Token, opened: Token) -> list[Option]:
        found: list[Option] = []
        while (ahead := self._reader.peek()) is not None:
            if ahead.closes:
                self._reader.take()
                return found
            if ahead.opens:
                self._reader.take()
                self._problems.error(ahead.token, f"Unexpected '{{' among options of '{owner}'")
                self._reader.skip_block()
                continue
            if self._reader.at_import():
                self._reader.do_import()
                continue
            word, args, nested = self._line()
            if nested is not None:
                self._problems.error(
                    nested,
                    f"Unexpected '{{': the option '{word}' of '{owner}' has no block of its own",
                )
                self._reader.skip_block()
            found.append(Option(word, tuple(args)))
        self._problems.error(
            opened, f"Unexpected EOF: the '{{' of '{owner}' is never closed with '}}'"
        )
        return found

    def _line(self) -> tuple[Token, list[Token], Token | None]:
        """Read a word and its arguments, and the '{' behind them if there is one."""
        words: list[Token] = []
        while (word := self._reader.peek()) is not None:
            if words and (word.first or word.closes):
                break
            self._reader.take()
            if word.opens:
                return words[0], words[1:], word.token
            plain = _glued(word)
            if plain is not None and self._line_ends():
                self._problems.error(word.token, f"write a blank between '{plain}' and '{{'")
                words.append(plain)
                return words[0], words[1:], word.token
            words.append(word.token)
        return words[0], words[1:], None

    def _line_ends(self) -> bool:
        ahead = self._reader.peek()
        return ahead is None or ahead.first

    # --- what CoreDNS would not say --------------------------------------------------------

    def _stray(self, token: Token, name: Token | None = None) -> None:
        hint = f": the server block '{name}' of line {name.line} has no '{{'" if name else ""
        self._problems.error(token, f"Unexpected '}}' because no matching opening brace{hint}")

    def _is_known(self, directive: Directive) -> bool:
        """Report a directive that is none of the plugins there are."""
        name, at = directive.name, directive.word
        if name in self._words:
            return True
        if name in self._unsupported:
            instead = INSTEAD.get(name, "take the line out")
            self._problems.error(at, f"CoreDNS's plugin '{name}' is not in kdns; {instead}")
        elif name in REMOVED:
            self._problems.warn(
                at, f"'{name}' is ignored: CoreDNS removed this plugin; {REMOVED[name]}"
            )
        else:
            synonym = SYNONYMS.get(name.lower())
            hint = f", did you mean '{synonym}'?" if synonym else nearest(name, self._words)
            self._problems.error(at, f"Unknown directive '{name}'{hint}")
        return False

    def _is_plugin(self, names: Sequence[Token], opened: Token | None) -> bool:
        """Say when a plugin's name stands where a zone is expected."""
        if not names or names[0].quoted:
            return False
        name = names[0]
        if name.text not in self._words and name.text not in self._unsupported:
            return False
        if opened is not None:
            self._problems.warn(
                name,
                f"'{name}' is taken for a zone, not for the plugin; write '{name}.' if that is"
                " meant, or put the line into a server block",
            )
        else:
            self._problems.error(
                name,
                f"'{name}' is a plugin, but the first line of a server block names its zones;"
                " write '.:53 {' above and '}' below",
            )
        return True

    def _check_tls(self, block: ServerBlock) -> None:
        tls = next((d for d in block.directives if d.name == "tls"), None)
        if tls is not None:
            if all(key.scheme == "dns" for key in block.keys):
                first = block.keys[0].token
                self._problems.warn(
                    tls.word, f"'tls' encrypts nothing here; write tls://{first} or https://{first}"
                )
            return
        for token, scheme in dict.fromkeys((key.token, key.scheme) for key in block.keys):
            if scheme == "tls":
                self._problems.error(token, f"'{token}' needs 'tls CERT KEY' in its block")
            elif scheme == "https":
                self._problems.warn(
                    token, f"'{token}' is plain HTTP: there is no 'tls CERT KEY' in its block"
                )


def _addresses(block: ServerBlock) -> frozenset[str]:
    """Return the words by which a block is bound, none if it listens everywhere."""
    found: set[str] = set()
    for directive in block.directives:
        if directive.name == "bind":
            kept = {arg.text for arg in directive.args}
            for option in directive.options or ():
                if option.name == "except":
                    kept -= {arg.text for arg in option.args}
            found |= kept
    return frozenset(found)
