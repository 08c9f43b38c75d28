"""Templates as Go's `text/template` reads them: text and a value to text.

The part of the language that Corefiles use: fields, methods, variables, pipelines, if, with,
range, comments, white-space trimming and the built-in functions. Not here, each an error that
says so: define, block, template, and the functions html, js, urlquery and call. What the
value holds and what the output means is the `template` plugin's business.

A template is the operator's, but what it is given is a stranger's name: steps and output of
one rendering are bounded. Error texts are Go's, which operators find on the web.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kdns.dns.gofunctions import (
    BUILTINS,
    MAX_OUTPUT,
    NO_VALUE,
    Function,
    Record,
    is_true,
    quote,
    render_value,
    type_of,
)
from kdns.errors import KdnsError

MAX_NESTING = 50  # parentheses and blocks in each other
MAX_STEPS = 10_000  # nodes run in one rendering; a long template has some dozens


class BadTemplate(KdnsError):
    """A template that cannot be parsed; the message says where and why."""


class RenderError(KdnsError):
    """A template that cannot be rendered for this value; the message says where and why."""


# These two see their arguments one by one and stop at the first that decides.
SHORT_CIRCUIT = {"and": False, "or": True}
NOT_HERE = frozenset(("html", "js", "urlquery", "call", "define", "block", "template"))


# --- the tree -----------------------------------------------------------------------------


class _Scope:
    """One rendering on its way."""

    __slots__ = ("dot", "out", "size", "steps", "variables")

    def __init__(self, dot: Any) -> None:
        self.dot = dot
        self.variables: list[tuple[str, Any]] = [("$", dot)]
        self.out: list[str] = []
        self.size = 0
        self.steps = 0

    def step(self, node: Node) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise _Failure(node, f"exceeded {MAX_STEPS} steps")

    def write(self, node: Node, text: str) -> None:
        self.size += len(text)
        if self.size > MAX_OUTPUT:
            raise _Failure(node, f"output is longer than {MAX_OUTPUT} characters")
        self.out.append(text)


class _Failure(Exception):
    """Rendering failed at a node; Template.render says where that is."""

    def __init__(self, node: Node, text: str) -> None:
        self.node = node
        self.text = text


class _Leave(Exception):
    """`break` (True) or `continue` (False) of the innermost range."""


ABSENT: Any = object()  # no value was piped into this command


@dataclass(slots=True)
class Node:
    """A part of a template. at: offset in its text."""

    at: int

    def __str__(self) -> str:
        """The part as text/template writes it (metrics label, error context)."""
        raise NotImplementedError

    def value(self, scope: _Scope) -> Any:
        """Return what the node stands for as an argument."""
        raise NotImplementedError

    def call(self, scope: _Scope, args: Sequence[Any]) -> Any:
        """Return the value of the node as first word of a command."""
        if args:
            raise _Failure(self, f"can't give argument to non-function {self}")
        return self.value(scope)


@dataclass(slots=True)
class Literal(Node):
    constant: Any
    written: str

    def __str__(self) -> str:
        return self.written

    def value(self, scope: _Scope) -> Any:
        return self.constant

    def call(self, scope: _Scope, args: Sequence[Any]) -> Any:
        if self.constant is None:
            raise _Failure(self, "nil is not a command")
        return Node.call(self, scope, args)


@dataclass(slots=True)
class Path(Node):
    """`.A.B`, `$x.A`, `(pipeline).A` or one of these without fields.

    root -- None for the dot, a variable's name, or a pipeline in parentheses
    """

    root: str | Pipeline | None
    names: tuple[str, ...]

    def __str__(self) -> str:
        root = self.root
        head = "" if root is None else root if isinstance(root, str) else f"({root})"
        return head + "".join(f".{name}" for name in self.names) or "."

    def value(self, scope: _Scope) -> Any:
        return self.call(scope, ())

    def call(self, scope: _Scope, args: Sequence[Any]) -> Any:
        value = self.start(scope)
        if not self.names:
            if args:
                raise _Failure(self, f"can't give argument to non-function {self}")
            return value
        for name in self.names[:-1]:
            value = self.step_into(value, name, ())
        return self.step_into(value, self.names[-1], args)

    def start(self, scope: _Scope) -> Any:
        if self.root is None:
            return scope.dot
        if isinstance(self.root, Pipeline):
            return self.root.value(scope)
        for name, value in reversed(scope.variables):
            if name == self.root:
                return value
        raise _Failure(self, f"undefined variable: {self.root}")

    def step_into(self, value: Any, name: str, args: Sequence[Any]) -> Any:
        if isinstance(value, Record):
            found = value.fields.get(name, ABSENT)
            if callable(found):
                return self.invoke(found, name, args)
        elif isinstance(value, dict):
            found = value.get(name, NO_VALUE)
        elif value is None or value is NO_VALUE:
            raise _Failure(self, f"nil data; no entry for key {quote(name)}")
        else:
            found = ABSENT
        if found is ABSENT:
            raise _Failure(self, f"can't evaluate field {name} in type {type_of(value)}")
        if args:
            raise _Failure(self, f"{name} has arguments but cannot be invoked as function")
        return found

    def invoke(self, method: Callable[..., Any], name: str, args: Sequence[Any]) -> Any:
        try:
            return method(*args)
        except TypeError:
            raise _Failure(self, f"wrong number or type of args for {name}") from None


@dataclass(slots=True)
class Name(Node):
    """A function's name; functions is what the template may call."""

    name: str
    functions: Mapping[str, Function]

    def __str__(self) -> str:
        return self.name

    def value(self, scope: _Scope) -> Any:
        return self.call(scope, ())

    def call(self, scope: _Scope, args: Sequence[Any]) -> Any:
        function = self.functions[self.name]
        high = function.high
        if len(args) < function.low or (high is not None and len(args) > high):
            want = f"at least {function.low}" if high is None else str(function.low)
            raise _Failure(
                self, f"wrong number of args for {self.name}: want {want} got {len(args)}"
            )
        try:
            return function.call(*args)
        except ValueError as e:
            raise _Failure(self, f"error calling {self.name}: {e}") from None


@dataclass(slots=True)
class Command(Node):
    words: list[Node]

    def __str__(self) -> str:
        return " ".join(
            f"({word})" if isinstance(word, Pipeline) else str(word) for word in self.words
        )

    def value(self, scope: _Scope) -> Any:
        return self.piped(scope, ABSENT)

    def piped(self, scope: _Scope, last: Any) -> Any:
        """Return the command's value, with `last` as its last argument."""
        scope.step(self)
        first = self.words[0]
        if isinstance(first, Name) and first.name in SHORT_CIRCUIT:
            return self.short_circuit(scope, last, SHORT_CIRCUIT[first.name])
        args = [word.value(scope) for word in self.words[1:]]
        if last is not ABSENT:
            args.append(last)
        args = [None if arg is NO_VALUE else arg for arg in args]
        try:
            return first.call(scope, args)
        except _Failure as failure:
            if failure.node is first and isinstance(first, Name):
                raise _Failure(self, failure.text) from None
            raise

    def short_circuit(self, scope: _Scope, last: Any, stop: bool) -> Any:
        value = ABSENT
        for word in self.words[1:]:
            value = word.value(scope)
            if is_true(value) is stop:
                return value
        value = value if last is ABSENT else last
        if value is ABSENT:
            raise _Failure(self, f"wrong number of args for {self.words[0]}: want at least 1 got 0")
        return value


@dataclass(slots=True)
class Pipeline(Node):
    """commands, each given the value of the one before; `$a, $b :=` or `$a =` in front."""

    commands: list[Command]
    variables: tuple[str, ...] = ()
    assigns: bool = False

    def __str__(self) -> str:
        head = ""
        if self.variables:
            head = ", ".join(self.variables) + (" = " if self.assigns else " := ")
        return head + " | ".join(map(str, self.commands))

    def value(self, scope: _Scope) -> Any:
        value: Any = ABSENT
        for command in self.commands:
            value = command.piped(scope, value)
        if len(self.variables) == 1:
            self.bind(scope, self.variables[0], value)
        return value

    def bind(self, scope: _Scope, name: str, value: Any) -> None:
        if not self.assigns:
            scope.variables.append((name, value))
            return
        for n in range(len(scope.variables) - 1, -1, -1):
            if scope.variables[n][0] == name:
                scope.variables[n] = (name, value)
                return


@dataclass(slots=True)
class Statement(Node):
    def run(self, scope: _Scope) -> None:
        raise NotImplementedError


@dataclass(slots=True)
class Text(Statement):
    text: str

    def __str__(self) -> str:
        return self.text

    def run(self, scope: _Scope) -> None:
        scope.write(self, self.text)


@dataclass(slots=True)
class Action(Statement):
    pipeline: Pipeline

    def __str__(self) -> str:
        return f"{{{{{self.pipeline}}}}}"

    def run(self, scope: _Scope) -> None:
        value = self.pipeline.value(scope)
        if not self.pipeline.variables:
            scope.write(self, "<no value>" if value is None else render_value(value))


@dataclass(slots=True)
class Leave(Statement):
    breaks: bool

    def __str__(self) -> str:
        return "{{break}}" if self.breaks else "{{continue}}"

    def run(self, scope: _Scope) -> None:
        raise _Leave(self.breaks)


@dataclass(slots=True)
class Branch(Statement):
    """if, with or range."""

    word: str
    pipeline: Pipeline
    body: list[Statement] = field(default_factory=list)
    other: list[Statement] = field(default_factory=list)

    def __str__(self) -> str:
        other = "{{else}}" + "".join(map(str, self.other)) if self.other else ""
        body = "".join(map(str, self.body))
        return f"{{{{{self.word} {self.pipeline}}}}}{body}{other}{{{{end}}}}"

    def run(self, scope: _Scope) -> None:
        scope.step(self)
        dot, mark = scope.dot, len(scope.variables)
        try:
            if self.word == "range":
                self.repeat(scope)
                return
            value = self.pipeline.value(scope)
            if not is_true(value):
                _run(self.other, scope)
                return
            if self.word == "with":
                scope.dot = value
            _run(self.body, scope)
        finally:
            scope.dot = dot
            del scope.variables[mark:]

    def repeat(self, scope: _Scope) -> None:
        pipeline = self.pipeline
        mark = len(scope.variables)
        value = pipeline.value(scope)
        if not pipeline.assigns:
            del scope.variables[mark:]
        pairs = self.pairs(value)
        ran = False
        outer = scope.dot
        for key, item in pairs:
            ran = True
            scope.step(self)
            names = pipeline.variables
            if len(names) == 1:
                pipeline.bind(scope, names[0], item)
            elif names:
                pipeline.bind(scope, names[0], key)
                pipeline.bind(scope, names[1], item)
            scope.dot = item
            try:
                _run(self.body, scope)
            except _Leave as leave:
                if leave.args[0]:
                    break
            finally:
                scope.dot = outer
                del scope.variables[mark:]
        if not ran:
            _run(self.other, scope)

    def pairs(self, value: Any) -> Iterable[tuple[Any, Any]]:
        if isinstance(value, dict):
            return [(key, value[key]) for key in sorted(value)]
        if isinstance(value, list):
            return enumerate(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return ((n, n) for n in range(value))
        if value is None or value is NO_VALUE:
            return ()
        raise _Failure(self.pipeline, f"range can't iterate over {render_value(value)}")


def _run(statements: list[Statement], scope: _Scope) -> None:
    for statement in statements:
        statement.run(scope)


# --- text to tree -------------------------------------------------------------------------

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+)
      | (?P<string>"(?:[^"\\\n]|\\.)*"|`[^`]*`)
      | (?P<char>'(?:[^'\\\n]|\\[^\n]+?)')
      | (?P<number>[+-]?(?:0[xX][0-9a-fA-F_]+|0[bB][01_]+|0[oO][0-7_]+
          |(?:[0-9][0-9_]*(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)(?![0-9A-Za-z_]))
      | (?P<field>\.[A-Za-z_][A-Za-z0-9_]*)
      | (?P<variable>\$[A-Za-z0-9_]*)
      | (?P<word>[A-Za-z_][A-Za-z0-9_]*)
      | (?P<sign>:=|[=|,().])""",
    re.VERBOSE,
)
_ESCAPE = re.compile(
    r"\\(?:([abfnrtv\\'\"])|x([0-9a-fA-F]{2})|([0-7]{3})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)",
    re.DOTALL,
)
_SHORT = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
SPACES = " \t\r\n"
BLOCKS = ("if", "with", "range")


@dataclass(slots=True)
class _Token:
    kind: str
    text: str
    at: int
    spaced: bool  # white space stands before it


class _Parser:
    def __init__(self, name: str, text: str, functions: Mapping[str, Function]) -> None:
        self.name = name
        self.text = text
        self.functions = functions
        self.tokens: list[_Token] = []  # of the action being parsed
        self.next = 0
        self.variables = ["$"]
        self.nesting = 0
        self.inner = 0  # how many with and range the dot has been changed by
        self.ranges = 0
        self.roots: set[str] = set()

    def fail(self, text: str, at: int) -> BadTemplate:
        line = self.text.count("\n", 0, at) + 1
        return BadTemplate(f"template: {self.name}:{line}: {text}")

    # Statements: a flat list of texts and actions first, then the blocks they make.

    def parse(self) -> list[Statement]:
        self.parts = list(self.split())
        self.part = 0
        body, stop = self.block()
        if stop is not None:
            raise self.fail(f"unexpected {{{{{stop.text}}}}}", stop.at)
        return body

    def split(self) -> Iterable[Text | list[_Token]]:
        at, trim = 0, False
        while at <= len(self.text):
            start = self.text.find("{{", at)
            end = start if start >= 0 else len(self.text)
            content = self.text[at:end]
            if trim:
                content = content.lstrip(SPACES)
            trim_before = start >= 0 and self.text[start + 2 : start + 3] == "-" and (
                self.text[start + 3 : start + 4] in tuple(SPACES)
            )  # fmt: skip
            if trim_before:
                content = content.rstrip(SPACES)
            if content:
                yield Text(at, content)
            if start < 0:
                return
            tokens, at, trim = self.action(start, start + (4 if trim_before else 2))
            if tokens is not None:
                yield tokens

    def action(self, start: int, at: int) -> tuple[list[_Token] | None, int, bool]:
        """Return the tokens of one action (None for a comment), where it ends, and whether
        the white space behind it goes."""
        if self.text.startswith("/*", at):
            end = self.text.find("*/", at)
            match = re.compile(r"(?:[ \t\r\n]+-)?\}\}").match(self.text, end + 2)
            if end < 0 or match is None:
                raise self.fail("unclosed comment" if end < 0 else
                                "comment ends before closing delimiter", start)  # fmt: skip
            return None, match.end(), match[0] != "}}"
        tokens: list[_Token] = []
        spaced = False
        while True:
            if self.text.startswith("}}", at):
                break
            if spaced and self.text.startswith("-}}", at):
                break
            match = _TOKEN.match(self.text, at)
            if match is None or match.lastgroup is None:
                if at >= len(self.text):
                    raise self.fail("unclosed action", start)
                if self.text[at] in "\"'`":
                    raise self.fail("unterminated quoted string", at)
                raise self.fail(f"unexpected {quote(self.text[at])} in action", at)
            if match.lastgroup == "space":
                spaced = True
            else:
                tokens.append(_Token(match.lastgroup, match[0], at, spaced))
                spaced = False
            at = match.end()
        if not tokens:
            raise self.fail("missing value for command", start)
        trim = self.text[at] == "-"
        return tokens, at + (3 if trim else 2), trim

    def block(self) -> tuple[list[Statement], _Token | None]:
        """Parse up to an `end` or `else`, which is returned."""
        self.nesting += 1
        if self.nesting > MAX_NESTING:
            raise self.fail(f"blocks nest deeper than {MAX_NESTING}", len(self.text))
        body: list[Statement] = []
        while self.part < len(self.parts):
            part = self.parts[self.part]
            self.part += 1
            if isinstance(part, Text):
                body.append(part)
                continue
            self.tokens, self.next = part, 0
            first = part[0]
            if first.kind == "word":
                if first.text in ("end", "else"):
                    self.nesting -= 1
                    return body, first
                if first.text in NOT_HERE:
                    raise self.fail(f"{{{{{first.text}}}}} is not part of kdns's templates",
                                    first.at)  # fmt: skip
                if first.text in BLOCKS:
                    body.append(self.branch(first))
                    continue
                if first.text in ("break", "continue"):
                    if not self.ranges:
                        raise self.fail(f"{{{{{first.text}}}}} outside {{{{range}}}}", first.at)
                    self.next = 1
                    self.finish()
                    body.append(Leave(first.at, first.text == "break"))
                    continue
            pipeline = self.pipeline()
            self.finish()
            body.append(Action(first.at, pipeline))
        self.nesting -= 1
        return body, None

    def branch(self, first: _Token) -> Branch:
        word = first.text
        mark = len(self.variables)
        self.next += 1
        pipeline = self.pipeline(ranging=word == "range")
        self.finish()
        branch = Branch(first.at, word, pipeline)
        changes_dot = word != "if"
        self.inner += changes_dot
        self.ranges += word == "range"
        branch.body, stop = self.block()
        self.inner -= changes_dot
        self.ranges -= word == "range"
        if stop is not None and stop.text == "else":
            chained = self.tokens[1:2]
            if chained and chained[0].text == word != "range":
                # {{else if}}: a block in the else part that shares this one's end.
                self.next = 1
                self.nesting += 1
                if self.nesting > MAX_NESTING:
                    raise self.fail(f"blocks nest deeper than {MAX_NESTING}", stop.at)
                branch.other = [self.branch(chained[0])]
                self.nesting -= 1
                del self.variables[mark:]
                return branch
            self.next = 1
            self.finish()
            branch.other, stop = self.block()
        if stop is None:
            raise self.fail("unexpected EOF", len(self.text))
        if stop.text == "else":
            raise self.fail("expected end; found {{else}}", stop.at)
        self.next = 1
        self.finish()
        del self.variables[mark:]
        return branch

    # One action.

    def peek(self, *texts: str) -> bool:
        if self.next >= len(self.tokens):
            return False
        token = self.tokens[self.next]
        return token.kind == "sign" and token.text in texts

    def finish(self) -> None:
        if self.next < len(self.tokens):
            token = self.tokens[self.next]
            raise self.fail(f"unexpected {quote(token.text)} in {self.tokens[0].text}", token.at)

    def pipeline(self, ranging: bool = False) -> Pipeline:
        names, assigns = self.declaration(ranging)
        commands = [self.command()]
        while self.peek("|"):
            self.next += 1
            commands.append(self.command())
        for command in commands[1:]:
            word = command.words[0]
            if isinstance(word, Literal) or (isinstance(word, Path) and not word.names):
                raise self.fail(f"non executable command in pipeline: {word}", command.at)
        if not assigns:
            self.variables += names
        return Pipeline(commands[0].at, commands, names, assigns)

    def declaration(self, ranging: bool) -> tuple[tuple[str, ...], bool]:
        """Read `$x :=`, `$x =` or, for range, `$k, $v :=`."""
        tokens = self.tokens[self.next : self.next + 4]
        kinds = [t.text if t.kind == "sign" else t.kind for t in tokens]
        if kinds[:2] in (["variable", ":="], ["variable", "="]):
            names: tuple[str, ...] = (tokens[0].text,)
        elif (
            ranging and kinds[:3] == ["variable", ",", "variable"] and kinds[3:] in ([":="], ["="])
        ):
            names = (tokens[0].text, tokens[2].text)
        else:
            return (), False
        count = 2 * len(names)
        assigns = kinds[count - 1] == "="
        for name in names if assigns else ():
            if name not in self.variables:
                raise self.fail(f"undefined variable {quote(name)}", tokens[0].at)
        self.next += count
        return names, assigns

    def command(self) -> Command:
        words: list[Node] = []
        start = self.tokens[self.next].at if self.next < len(self.tokens) else len(self.text)
        while self.next < len(self.tokens) and not self.peek("|", ")"):
            token = self.tokens[self.next]
            if words and not token.spaced:
                raise self.fail(f"unexpected {quote(token.text)} in operand", token.at)
            words.append(self.operand())
        if not words:
            raise self.fail("missing value for command", start)
        return Command(start, words)

    def operand(self) -> Node:
        token = self.tokens[self.next]
        self.next += 1
        match token.kind:
            case "string":
                return Literal(token.at, self.string(token), token.text)
            case "char":
                return Literal(token.at, ord(self.unescape(token.text[1:-1], token)), token.text)
            case "number":
                return Literal(token.at, self.number(token), token.text)
            case "field":
                return self.path(token.at, None, (token.text[1:],))
            case "variable":
                if token.text not in self.variables:
                    raise self.fail(f"undefined variable {quote(token.text)}", token.at)
                return self.path(token.at, token.text, ())
            case "word":
                return self.word(token)
        if token.text == ".":
            path = self.path(token.at, None, ())
            if path.names:
                raise self.fail('unexpected . after term "."', token.at)
            return path
        if token.text == "(":
            return self.parentheses(token)
        raise self.fail(f"unexpected {quote(token.text)} in operand", token.at)

    def parentheses(self, token: _Token) -> Node:
        self.nesting += 1
        if self.nesting > MAX_NESTING:
            raise self.fail(f"parentheses nest deeper than {MAX_NESTING}", token.at)
        pipeline = self.pipeline()
        self.nesting -= 1
        if not self.peek(")"):
            raise self.fail("unclosed left paren", token.at)
        self.next += 1
        names = self.fields()
        return Path(token.at, pipeline, names) if names else pipeline

    def fields(self) -> tuple[str, ...]:
        """Read the fields that stand right behind an operand."""
        names = []
        while self.next < len(self.tokens):
            token = self.tokens[self.next]
            if token.kind != "field" or token.spaced:
                break
            names.append(token.text[1:])
            self.next += 1
        return tuple(names)

    def path(self, at: int, root: str | None, names: tuple[str, ...]) -> Path:
        after = self.next
        names += self.fields()
        if self.next > after:
            at = self.tokens[after].at  # where text/template says such a path is
        if root == "$" or (root is None and not self.inner):
            self.roots.add(names[0] if names else "")
        return Path(at, root, names)

    def word(self, token: _Token) -> Node:
        text = token.text
        constants = {"true": True, "false": False, "nil": None}
        if text in constants:
            return Literal(token.at, constants[text], text)
        if text in NOT_HERE:
            raise self.fail(f"function {quote(text)} is not part of kdns's templates", token.at)
        if text not in self.functions and text not in SHORT_CIRCUIT:
            raise self.fail(f"function {quote(text)} not defined", token.at)
        return Name(token.at, text, self.functions)

    def string(self, token: _Token) -> str:
        if token.text[0] == "`":
            return token.text[1:-1].replace("\r", "")
        return self.unescape(token.text[1:-1], token)

    def unescape(self, text: str, token: _Token) -> str:
        def one(match: re.Match[str]) -> str:
            if match[1]:
                return _SHORT.get(match[1], match[1])
            digits = match[2] or match[4] or match[5]
            code = int(digits, 16) if digits else int(match[3], 8) if match[3] else -1
            if not 0 <= code <= 0x10FFFF:
                raise self.fail(f"invalid syntax: {token.text}", token.at)
            return chr(code)

        out = _ESCAPE.sub(one, text)
        if token.kind == "char" and len(out) != 1:
            raise self.fail(f"malformed character constant: {token.text}", token.at)
        return out

    def number(self, token: _Token) -> int | float:
        text = token.text.replace("_", "")
        try:
            if re.fullmatch(r"[+-]?0[0-7]+", text):
                return int(text, 8)
            return int(text, 0) if re.fullmatch(r"[+-]?(0[xXbBoO]\w+|\d+)", text) else float(text)
        except ValueError:
            raise self.fail(f"bad number syntax: {quote(token.text)}", token.at) from None


class Template:
    """A parsed template.

    source -- its text as text/template writes it
    roots  -- the fields of the outermost value that it uses; "" if it uses the value whole
    """

    __slots__ = ("_body", "_text", "name", "roots", "source")

    def __init__(self, name: str, text: str, functions: Mapping[str, Function]) -> None:
        parser = _Parser(name, text, {**BUILTINS, **functions})
        self._text = text
        self._body = parser.parse()
        self.name = name
        self.source = "".join(map(str, self._body))
        self.roots = frozenset(parser.roots)

    def render(self, value: Any) -> str:
        """Return the template's output for `value`; raises RenderError."""
        scope = _Scope(value)
        try:
            _run(self._body, scope)
        except _Failure as failure:
            at = failure.node.at
            line = self._text.count("\n", 0, at) + 1
            column = len(self._text[self._text.rfind("\n", 0, at) + 1 : at].encode())
            raise RenderError(
                f"template: {self.name}:{line}:{column}: executing {quote(self.name)}"
                f" at <{failure.node}>: {failure.text}"
            ) from None
        return "".join(scope.out)


def parse_template(
    name: str, text: str, functions: Mapping[str, Function] | None = None
) -> Template:
    """Return the template; raises BadTemplate. name is what errors call it."""
    return Template(name, text, functions or {})
