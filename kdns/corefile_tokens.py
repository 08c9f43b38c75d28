"""A Corefile's words: quotes, comments, environment variables, snippets and imports
(reference 2.5).

Decides what is one word, where a line starts, and what an `import` puts in its place. What
the words mean is corefile.py's business. Files and the environment are reached through
callables and a mapping, so that a whole configuration can be parsed from memory.
"""

from __future__ import annotations

import glob
import posixpath
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from kdns.errors import Problem

MAX_SNIPPETS = 10_000  # expansions in one Corefile, as CoreDNS
MAX_FILES = 100_000  # the same for files
MAX_TOKENS = 1_000_000  # snippets that import snippets double with each line; memory does not

# What Go's unicode.IsSpace takes as white space, and Caddy's lexer with it. A carriage
# return separates nothing: it is left out wherever it stands.
_SPACE = " \t\n\v\f\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_LEXEME = re.compile(
    rf'(?P<space>[{_SPACE}\r]+)|(?P<comment>\#[^\n]*)|"(?P<quoted>(?:[^"\\]|\\.)*+)"'
    rf'|(?P<open>"[^\n]*)|(?P<word>[^{_SPACE}\r"\#][^{_SPACE}\#]*)',
    re.DOTALL,
)
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_ARGUMENT = re.compile(r"\{args(?:\[(\d{1,4})\]|\.(\d{1,4}))\}")
ALL_ARGUMENTS = "{args[:]}"
_SNIPPET = re.compile(r"\((.*)\)", re.DOTALL)
_WILD = frozenset("*?[]")


@dataclass(frozen=True, slots=True)
class Token:
    """One word with its place. text is after quotes and environment variables."""

    text: str
    file: str
    line: int
    quoted: bool = False

    def __str__(self) -> str:
        return self.text


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


class Word(NamedTuple):
    """A token and whether it is the first of its line."""

    token: Token
    first: bool

    @property
    def opens(self) -> bool:
        return self.token.text == "{" and not self.token.quoted

    @property
    def closes(self) -> bool:
        return self.token.text == "}" and not self.token.quoted


class _Mark(NamedTuple):
    """Stands between words where an imported text begins, and where it ends."""

    enters: str


_LEAVE = _Mark("")


def read_text(path: str) -> str:
    """Return a file's text; octets that are not UTF-8 become U+FFFD. Raises OSError."""
    return Path(path).read_text(encoding="utf-8", errors="replace")


def expand_glob(pattern: str) -> list[str]:
    """Return the paths that match, sorted; a name that starts with a dot matches too."""
    return sorted(glob.glob(pattern, include_hidden=True))


def snippet_name(token: Token) -> str | None:
    """Return NAME of `(NAME)`, None for any other word."""
    match = _SNIPPET.fullmatch(token.text)
    return match[1] if match else None


def split_words(text: str, file: str, environ: Mapping[str, str], problems: Problems) -> list[Word]:
    """Return the words of one file's text."""
    words: list[Word] = []
    line, end = 1, 0  # end: the line in which the last word ended
    at, text = 0, text.removeprefix("\ufeff")
    while match := _LEXEME.match(text, at):
        kind, whole = match.lastgroup, match[0]
        at = match.end()
        if kind == "comment" and _is_glued(text, match.start(), words):
            problems.warn(
                words[-1].token,
                f"'#' starts a comment: only '{words[-1].token}' is left of this word;"
                ' write it as "..." if the # belongs to it',
            )
        if kind not in ("space", "comment"):
            token = Token(_unescape(match), file, line, kind != "word")
            if kind == "open":
                problems.error(token, 'the quote that starts here is never closed with "')
            words.append(Word(_with_variables(token, environ, problems), line > end))
            end = line + whole.count("\n")
        line += whole.count("\n")
    return words


def _is_glued(text: str, at: int, words: list[Word]) -> bool:
    """True if the '#' at `at` stands right behind a word."""
    return bool(words and not words[-1].token.quoted and text[at - 1].strip())


def _unescape(match: re.Match[str]) -> str:
    if match.lastgroup == "quoted":
        # Only \" is an escape; a backslash before anything else stays.
        return _ESCAPE.sub(lambda m: '"' if m[1] == '"' else m[0], match["quoted"])
    if match.lastgroup == "open":
        return match["open"][1:]
    return match["word"].replace("\r", "")


def _with_variables(token: Token, environ: Mapping[str, str], problems: Problems) -> Token:
    """Put the environment's values in for {$NAME} and {%NAME%}."""
    text = token.text
    for start, stop in (("{%", "%}"), ("{$", "}")):
        if start in text:
            text = _fill(text, start, stop, token, environ, problems)
    if text == token.text:
        return token
    # A brace out of a variable is text, as in CoreDNS: it opens and closes nothing.
    return Token(text, token.file, token.line, token.quoted or text in ("{", "}", "import"))


def _fill(
    text: str, start: str, stop: str, at: Token, environ: Mapping[str, str], problems: Problems
) -> str:
    out, done = [], 0
    while (begin := text.find(start, done)) >= 0:
        end = text.find(stop, begin + len(start))
        if end < 0:
            break
        name = text[begin + len(start) : end]
        out.append(text[done:begin])
        if not name:
            out.append(start + stop)
        elif name in environ:
            out.append(environ[name])
        else:
            hint = ""
            if text[begin - 1 : begin] == "{":
                hint = f"; if a template's variable is meant, write '{{{{ ${name} }}}}'"
            problems.warn(at, f"environment variable '{name}' is not set: it is empty{hint}")
        done = end + len(stop)
    out.append(text[done:])
    return "".join(out)


class Reader:
    """The words of a Corefile one after the other, with imports put in place.

    files -- every file read so far, the Corefile itself first
    """

    def __init__(
        self,
        text: str,
        file: str,
        problems: Problems,
        read: Callable[[str], str],
        expand: Callable[[str], list[str]],
        environ: Mapping[str, str],
    ) -> None:
        self.files = [file]
        self._problems = problems
        self._read = read
        self._expand = expand
        self._environ = environ
        self._snippets: dict[str, tuple[Token, list[Word]]] = {}
        self._counts = {"snippet": 0, "file": 0, "token": 0}
        self._full = False
        # What the next word comes from: the Corefile, what that imports, and so on.
        self._inside = [posixpath.normpath(file)]
        words = split_words(text, file, environ, problems)
        # Where snippets stand, for a word about those used above their place.
        self._places = {
            name: token for token, first in words if first and (name := snippet_name(token))
        }
        # Still to come, the next word last.
        self._pending: list[Word | _Mark] = list(reversed(words))

    def peek(self) -> Word | None:
        """Return the next word and leave it there; None at the end."""
        while True:
            word = self._next_plain()
            if word is None:
                return None
            self._pending.append(word)
            if not word.first or not _is_import(word):
                return word
            self.do_import()

    def take(self) -> Word | None:
        """Return the next word and go past it."""
        word = self.peek()
        if word is not None:
            self._pending.pop()
        return word

    def line(self) -> list[Word]:
        """Return what is left of the line, without going past it."""
        found: list[Word] = []
        for word in reversed(self._pending):
            if isinstance(word, _Mark) or (word.first and found):
                break
            found.append(word)
        return found

    def at_import(self) -> bool:
        """True if the next word is an `import` that is not the first of its line."""
        word = self.peek()
        return word is not None and _is_import(word)

    def define_snippet(self, token: Token, name: str) -> None:
        """Take the words up to the matching '}' as the snippet's; its '{' has been read."""
        body: list[Word] = []
        depth = 1
        while (word := self._next_plain()) is not None:
            depth += word.opens - word.closes
            if not depth:
                break
            body.append(word)
        else:
            self._problems.error(
                token, f"Unexpected EOF: the '{{' of snippet ({name}) is never closed"
            )
        if name in self._snippets:
            before = self._snippets[name][0]
            self._problems.error(
                token,
                f"redeclaration of previously declared snippet {name}: the first is in"
                f" {before.file}:{before.line}",
            )
            return
        if body:
            # A snippet may start on the line of its '{'; where it is used, a line starts.
            body[0] = Word(body[0].token, True)
        self._snippets[name] = (token, body)

    def skip_block(self) -> None:
        """Go past the '}' that matches a '{' just read."""
        depth = 1
        while depth and (word := self.take()) is not None:
            depth += word.opens - word.closes

    def _next_plain(self) -> Word | None:
        """Take the next word without looking for imports."""
        while self._pending:
            word = self._pending.pop()
            if isinstance(word, Word):
                return word
            if word is _LEAVE:
                self._inside.pop()
            else:
                self._inside.append(word.enters)
        return None

    def do_import(self) -> None:
        """Put what the `import` line that comes next names in its place."""
        line = self.line()
        for i, word in enumerate(line):
            if word.opens or word.closes:
                self._problems.error(
                    word.token, f"unexpected '{word.token}' after 'import'; start a new line"
                )
                self._pending[-1 - i] = Word(word.token, True)
                line = line[:i]
                break
        del self._pending[-len(line) :]
        at, args = line[0].token, [word.token for word in line[1:]]
        if not args:
            self._problems.error(
                at,
                "Wrong argument count or unexpected line ending after 'import': write"
                " 'import FILE' or 'import SNIPPET'",
            )
        elif not args[0].text:
            self._problems.error(at, "Import requires a non-empty file or snippet name")
        elif not self._full:
            self._import(args[0], args[1:])

    def _import(self, name: Token, args: list[Token]) -> None:
        snippet = self._snippets.get(name.text)
        if snippet is not None:
            if self._count("snippet", MAX_SNIPPETS, name):
                self._put([(f"({name})", snippet[1])], name, args)
            return
        texts: list[tuple[str, list[Word]]] = []
        for path in self._paths(name):
            if not self._count("file", MAX_FILES, name):
                break
            words = [] if path in self._inside else self._words_of(path, name)
            if words is not None:
                texts.append((path, words))
        self._put(texts, name, args)

    def _paths(self, name: Token) -> list[str]:
        """Return the files an import names, relative to the file it stands in."""
        pattern, folder = name.text, posixpath.dirname(name.file)
        if not _WILD.intersection(pattern):
            return [posixpath.normpath(posixpath.join(folder, pattern))]
        if pattern.count("*") > 1 or pattern.count("?") > 1 or "[" in pattern or "]" in pattern:
            # Many wildcards can take for ever to match; CoreDNS has the same limit.
            self._problems.error(
                name, f"Glob pattern may only contain one wildcard (*), but has others: {pattern}"
            )
            return []
        found = self._expand(posixpath.join(glob.escape(folder), pattern))
        if not found:
            self._problems.warn(name, f"No files matching import glob pattern: {pattern}")
        return [posixpath.normpath(path) for path in found]

    def _words_of(self, path: str, name: Token) -> list[Word] | None:
        try:
            text = self._read(path)
        except FileNotFoundError:
            place = self._places.get(name.text)
            if place is not None:
                hint = f"; the snippet ({name}) of line {place.line} must stand above its import"
            else:
                hint = nearest(name.text, self._snippets)
            self._problems.error(name, f"File to import not found: {name}{hint}")
            return None
        except (OSError, ValueError) as e:
            why = (e.strerror if isinstance(e, OSError) else None) or e
            self._problems.error(name, f"Could not import {path}: {why}")
            return None
        if path not in self.files:
            self.files.append(path)
        return split_words(text, path, self._environ, self._problems)

    def _count(self, what: str, limit: int, at: Token, n: int = 1) -> bool:
        self._counts[what] += n
        if self._counts[what] <= limit:
            return True
        if not self._full:
            self._full = True
            self._problems.error(
                at, f"imports expand to more than {limit} {what}s; no further one is followed"
            )
        return False

    def _put(self, texts: list[tuple[str, list[Word]]], at: Token, args: list[Token]) -> None:
        """Let the words of these snippets or files come next."""
        coming: list[Word | _Mark] = []
        for name, words in texts:
            if name in self._inside:
                way = " -> ".join([*self._inside[self._inside.index(name) :], name])
                self._problems.error(at, f"'{at}' imports itself: {way}")
                continue
            words = self._with_arguments(words, at, args)
            if self._count("token", MAX_TOKENS, at, len(words)):
                coming += [_Mark(name), *words, _LEAVE]
        self._pending.extend(reversed(coming))

    def _with_arguments(self, words: list[Word], at: Token, args: list[Token]) -> list[Word]:
        """Put an import's arguments in for {args[0]} or {args.0}, and for {args[:]} all.

        CoreDNS's import takes none; these are the forms Caddy 2 has.
        """
        used: set[int] = set()
        missing: set[int] = set()

        def fill(match: re.Match[str]) -> str:
            n = int(match[1] or match[2])
            (used if n < len(args) else missing).add(n)
            return args[n].text if n < len(args) else ""

        out: list[Word] = []
        for word in words:
            token, first = word
            if "{args" not in token.text:
                out.append(word)
            elif token.text == ALL_ARGUMENTS:
                used.update(range(len(args)))
                for i, arg in enumerate(args):
                    out.append(Word(Token(arg.text, token.file, token.line, True), first and not i))
            else:
                text = _ARGUMENT.sub(fill, token.text)
                quoted = token.quoted or text in ("{", "}", "import")
                out.append(Word(Token(text, token.file, token.line, quoted), first))
        for n in sorted(missing):
            self._problems.error(
                at, f"'{at}' uses {{args[{n}]}}, but its import gives it {len(args) or 'no'}"
                f" argument{'s' if len(args) != 1 else ''}"
            )  # fmt: skip
        for n in range(len(args)):
            if n not in used:
                self._problems.error(
                    args[n], f"'{at}' has no use for the argument '{args[n]}': it does not"
                    f" contain {{args[{n}]}}"
                )  # fmt: skip
        return out


def _is_import(word: Word) -> bool:
    return word.token.text == "import" and not word.token.quoted
