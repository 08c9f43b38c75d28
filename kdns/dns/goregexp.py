"""Regular expressions as Go's `regexp` reads them (RE2 syntax), matched in bounded time.

A Corefile's patterns were written for Go: other syntax in places, and time that grows
with the length of the name only. Python's `re` backtracks, so a name made for the purpose
could hold the server up for seconds. A pattern is therefore parsed here; matched by `re`
where its shape keeps the steps within MAX_STEPS for the name at hand, else by running its
states side by side (R. Cox, "Regular Expression Matching: the Virtual Machine Approach",
https://swtch.com/~rsc/regexp/regexp2.html).

The subject is a name as text, which is ASCII: other characters match nothing but what
excludes characters.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from kdns.errors import KdnsError

MAX_PATTERN = 10_000  # characters, CoreDNS 1.14.0
MAX_REPEAT = 1000  # Go regexp/syntax: the largest n in x{n}
MAX_NESTING = 100  # groups in groups; Go allows 1000, which Python's recursion does not
MAX_STEPS = 20_000  # of choices in one subject: below a millisecond of backtracking
MAX_STATES = 5_000  # of a pattern that needs the state machine
UNBOUNDED = 99  # degree of a pattern whose backtracking no power of the length bounds


class BadPattern(KdnsError):
    """A pattern Go would refuse, or that is too large; the message says why."""


# --- the pattern's tree -------------------------------------------------------------------
# A set of characters is an int whose bit n stands for chr(n).


@dataclass(frozen=True, slots=True)
class Chars:
    mask: int


@dataclass(frozen=True, slots=True)
class Edge:
    """A place without width: kind is the operator as Python writes it."""

    kind: str


@dataclass(frozen=True, slots=True)
class Seq:
    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Alt:
    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """item low..high times; high None: without end."""

    item: Node
    low: int
    high: int | None
    greedy: bool


@dataclass(frozen=True, slots=True)
class Group:
    """A capturing group."""

    number: int
    item: Node


Node = Chars | Edge | Seq | Alt | Repeat | Group

ALL = (1 << 128) - 1
BEGIN, END, LINE_BEGIN, LINE_END = r"\A", r"\Z", "(?m:^)", "(?m:$)"
WORD_EDGE = r"\b"
NO_WORD_EDGE = r"(?!\b)"  # Python's \B does not hold in an empty subject


def _mask(chars: str) -> int:
    mask = 0
    for char in chars:
        if ord(char) < 128:
            mask |= 1 << ord(char)
    return mask


def _span(low: int, high: int) -> int:
    """Return the set of all characters from low to high."""
    high = min(high, 127)
    return (1 << high + 1) - (1 << low) if low <= high else 0


DIGIT = _span(48, 57)
UPPER, LOWER = _span(65, 90), _span(97, 122)
LETTER = UPPER | LOWER
WORDS = LETTER | DIGIT | _mask("_")
SPACE = _mask("\t\n\f\r ")
NOT_NEWLINE = ALL & ~_mask("\n")

PERL = {"d": DIGIT, "s": SPACE, "w": WORDS}
POSIX = {
    "alnum": LETTER | DIGIT, "alpha": LETTER, "ascii": ALL, "blank": _mask("\t "),
    "cntrl": _span(0, 31) | _span(127, 127), "digit": DIGIT, "graph": _span(33, 126),
    "lower": LOWER, "print": _span(32, 126),
    "punct": _span(33, 126) & ~(LETTER | DIGIT), "space": SPACE | _mask("\v"), "upper": UPPER,
    "word": WORDS, "xdigit": DIGIT | _mask("abcdefABCDEF"),
}  # fmt: skip
ESCAPES = {"a": "\a", "f": "\f", "t": "\t", "n": "\n", "r": "\r", "v": "\v"}


def _folded(mask: int) -> int:
    """Return `mask` without regard to case."""
    return mask | (mask & UPPER) << 32 | (mask & LOWER) >> 32


def _unicode_class(name: str) -> int:
    if name in ("L&", "LC"):
        return LETTER
    if name == "Any":
        return ALL
    if name == "Latin":
        return LETTER
    if name == "Common":
        return ALL & ~LETTER
    if not (1 <= len(name) <= 2) or name[0] not in "CLMNPSZ":
        # What is left are scripts and properties whose members are not ASCII, or no class.
        raise BadPattern(f"character class \\p{{{name}}} is not known")
    mask = 0
    for code in range(128):
        if unicodedata.category(chr(code)).startswith(name):
            mask |= 1 << code
    return mask


class _Parser:
    """Recursive descent over one pattern; `at` is the next character."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.depth = 0
        self.names: list[str] = [""]
        # (?i) (?m) (?s) (?U)
        self.fold = self.multi = self.dot_all = self.ungreedy = False

    def parse(self) -> Node:
        node = self.alternatives()
        if self.at < len(self.text):
            raise BadPattern(f"unexpected ): {self.text}")
        return node

    def peek(self, what: str) -> bool:
        return self.text.startswith(what, self.at)

    def alternatives(self) -> Node:
        flags = self.fold, self.multi, self.dot_all, self.ungreedy
        options = [self.sequence()]
        while self.peek("|"):
            self.at += 1
            options.append(self.sequence())
        self.fold, self.multi, self.dot_all, self.ungreedy = flags
        return options[0] if len(options) == 1 else Alt(tuple(options))

    def sequence(self) -> Node:
        items: list[Node] = []
        repeated = ""  # the operator just read, which no other may follow
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            start = self.at
            bounds = self.repetition()
            if bounds is None:
                if self.peek("\\Q"):
                    items += self.quoted()
                    repeated = ""
                    continue
                node = self.atom()
                if node is not None:
                    items.append(node)
                repeated = ""
                continue
            operator = self.text[start : self.at]
            if repeated:
                raise BadPattern(f"invalid nested repetition operator: {repeated}{operator}")
            if not items:
                raise BadPattern(f"missing argument to repetition operator: {operator}")
            low, high, greedy = bounds
            items.append(Repeat(items.pop(), low, high, greedy))
            repeated = operator
        return items[0] if len(items) == 1 else Seq(tuple(items))

    def repetition(self) -> tuple[int, int | None, bool] | None:
        """Read `* + ? {n,m}` with the `?` behind it; None if none is here."""
        char = self.text[self.at]
        low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(char, (-1, None))
        if low >= 0:
            self.at += 1
        else:
            match = _COUNTED.match(self.text, self.at)
            if match is None:
                return None
            self.at = match.end()
            low = int(match[1])
            high = low if match[2] is None else int(match[3]) if match[3] else None
            if low > MAX_REPEAT or (high is not None and not low <= high <= MAX_REPEAT):
                raise BadPattern(f"invalid repeat count: {match[0]}")
        lazy = self.peek("?")
        self.at += lazy
        return low, high, lazy == self.ungreedy

    def atom(self) -> Node | None:
        """Read one thing that can be repeated; None for a change of flags."""
        char = self.text[self.at]
        if char == "(":
            return self.group()
        if char == "[":
            return Chars(self.bracket())
        self.at += 1
        if char == ".":
            return Chars(ALL if self.dot_all else NOT_NEWLINE)
        if char == "^":
            return Edge(LINE_BEGIN if self.multi else BEGIN)
        if char == "$":
            return Edge(LINE_END if self.multi else END)
        if char == "\\":
            return self.escape()
        return self.literal(char)

    def literal(self, char: str) -> Chars:
        mask = _mask(char)
        return Chars(_folded(mask) if self.fold else mask)

    def group(self) -> Node | None:
        start = self.at
        self.at += 1
        number = 0
        flags = self.fold, self.multi, self.dot_all, self.ungreedy
        if self.peek("?"):
            named = _NAMED.match(self.text, self.at)
            if named is not None:
                if named[1] in self.names:
                    raise BadPattern(f"duplicate group name: {named[1]}")
                self.at = named.end()
                number = len(self.names)
                self.names.append(named[1])
            elif not self.flags(start):
                return None
        else:
            number = len(self.names)
            self.names.append("")
        self.depth += 1
        if self.depth > MAX_NESTING:
            raise BadPattern(f"groups nest deeper than {MAX_NESTING}")
        node = self.alternatives()
        self.depth -= 1
        if not self.peek(")"):
            raise BadPattern(f"missing closing ): {self.text}")
        self.at += 1
        self.fold, self.multi, self.dot_all, self.ungreedy = flags
        return Group(number, node) if number else Seq((node,))

    def flags(self, start: int) -> bool:
        """Read `?ims-U:` or `?ims-U)`; return True if a group follows."""
        match = _FLAGS.match(self.text, self.at)
        if match is None:
            if self.text.startswith(("?P<", "?<"), self.at) and self.text[self.at :][:3] not in (
                "?<=",
                "?<!",
            ):
                raise BadPattern(f"invalid named capture: {self.text[start : start + 20]}")
            raise BadPattern(f"invalid or unsupported Perl syntax: {self.text[start : start + 3]}")
        self.at = match.end()
        for letters, value in ((match[1], True), (match[2] or "", False)):
            for letter in letters:
                if letter == "i":
                    self.fold = value
                elif letter == "m":
                    self.multi = value
                elif letter == "s":
                    self.dot_all = value
                else:
                    self.ungreedy = value
        return match[3] == ":"

    def escape(self) -> Node:
        if self.at >= len(self.text):
            raise BadPattern("trailing backslash at end of expression")
        char = self.text[self.at]
        edge = {"A": BEGIN, "z": END, "b": WORD_EDGE, "B": NO_WORD_EDGE}.get(char)
        if edge is not None:
            self.at += 1
            return Edge(edge)
        mask = self.class_escape()
        if mask is not None:
            return Chars(mask)
        return self.literal(self.character())

    def quoted(self) -> list[Node]:
        """Read `\\Q...\\E`: what stands between is literal; the end may be left out."""
        end = self.text.find("\\E", self.at)
        content = self.text[self.at + 2 : end if end >= 0 else None]
        self.at = end + 2 if end >= 0 else len(self.text)
        return [self.literal(char) for char in content]

    def class_escape(self) -> int | None:
        """Read what follows a backslash if it names a set: d s w D S W p P."""
        char = self.text[self.at]
        if char.lower() in PERL:
            self.at += 1
            mask = PERL[char.lower()]
            return mask if char.islower() else ALL & ~mask
        if char not in "pP":
            return None
        match = _UNICODE.match(self.text, self.at)
        if match is None:
            raise BadPattern(f"invalid character class range: \\{self.text[self.at :][:8]}")
        self.at = match.end()
        name = match[3] or match[4]
        mask = _unicode_class(name)
        if self.fold:
            mask = _folded(mask)
        return mask if (match[1] == "p") == (not match[2]) else ALL & ~mask

    def character(self) -> str:
        """Read what follows a backslash as one character."""
        char = self.text[self.at]
        match = _CODE.match(self.text, self.at)
        if match is not None:
            self.at = match.end()
            digits = match[1] or match[2] or match[3]
            code = int(digits, 8 if match[1] else 16)
            if code > 0x10FFFF:
                raise BadPattern(f"invalid escape sequence: \\{match[0]}")
            return chr(code)
        self.at += 1
        if char in ESCAPES:
            return ESCAPES[char]
        if char.isascii() and not char.isalnum():
            return char
        # A back-reference (\1) ends here too: RE2 has none.
        raise BadPattern(f"invalid escape sequence: \\{char}")

    def bracket(self) -> int:
        start = self.at
        self.at += 1
        negated = self.peek("^")
        self.at += negated
        mask = 0
        first = True
        while first or not self.peek("]"):
            if self.at >= len(self.text):
                raise BadPattern(f"missing closing ]: {self.text[start:]}")
            first = False
            mask |= self.bracket_item()
        self.at += 1
        if self.fold:
            mask = _folded(mask)
        return ALL & ~mask if negated else mask

    def bracket_item(self) -> int:
        posix = _POSIX.match(self.text, self.at)
        if posix is not None:
            if posix[2] not in POSIX:
                raise BadPattern(f"invalid character class range: {posix[0]}")
            self.at = posix.end()
            return ALL & ~POSIX[posix[2]] if posix[1] else POSIX[posix[2]]
        start = self.at
        if self.peek("\\") and self.at + 1 < len(self.text):
            self.at += 1
            mask = self.class_escape()
            if mask is not None:
                return mask
            self.at -= 1
        low = self.bracket_character(start)
        high = low
        if self.peek("-") and self.at + 1 < len(self.text) and self.text[self.at + 1] != "]":
            self.at += 1
            high = self.bracket_character(start)
            if ord(high) < ord(low):
                raise BadPattern(f"invalid character class range: {self.text[start : self.at]}")
        return _span(ord(low), ord(high))

    def bracket_character(self, start: int) -> str:
        if self.at >= len(self.text):
            raise BadPattern(f"missing closing ]: {self.text[start:]}")
        if not self.peek("\\"):
            self.at += 1
            return self.text[self.at - 1]
        self.at += 1
        if self.at >= len(self.text):
            raise BadPattern("trailing backslash at end of expression")
        return self.character()


_COUNTED = re.compile(r"\{([0-9]{1,9})(,([0-9]{1,9})?)?\}")
_NAMED = re.compile(r"\?P?<([A-Za-z0-9_]+)>", re.ASCII)
_FLAGS = re.compile(r"\?([imsU]*)(?:-([imsU]+))?([:)])")
_UNICODE = re.compile(r"([pP])(?:\{(\^?)([A-Za-z_&]+)\}|([A-Z]))")
_CODE = re.compile(r"(0[0-7]{0,2}|[1-7][0-7]{1,2})|x([0-9A-Fa-f]{2})|x\{([0-9A-Fa-f]{1,8})\}")
_POSIX = re.compile(r"\[:(\^?)([a-z]+):\]")


# --- how much backtracking it may take ----------------------------------------------------


def _first(node: Node) -> tuple[int, bool]:
    """Return the characters a match of `node` may begin with, and whether it may be empty."""
    match node:
        case Chars(mask):
            return mask, False
        case Edge():
            return 0, True
        case Group(_, item):
            return _first(item)
        case Repeat(item, low, high, _):
            mask, empty = _first(item)
            return (mask, empty or low == 0) if high != 0 else (0, True)
        case Alt(items):
            firsts = [_first(item) for item in items]
            mask = 0
            for one, _ in firsts:
                mask |= one
            return mask, any(empty for _, empty in firsts)
        case Seq(items):
            mask = 0
            for item in items:
                one, empty = _first(item)
                mask |= one
                if not empty:
                    return mask, False
            return mask, True


def _degree(node: Node, follow: int) -> int:
    """Return to which power of the subject's length backtracking into `node` can multiply
    the steps; `follow` are the characters that may come behind it.

    A choice that the next character alone decides multiplies nothing.
    """
    match node:
        case Chars() | Edge():
            return 0
        case Group(_, item):
            return _degree(item, follow)
        case Seq(items):
            total = 0
            for item in reversed(items):
                total += _degree(item, follow)
                mask, empty = _first(item)
                follow = mask | (follow if empty else 0)
            return min(total, UNBOUNDED)
        case Alt(items):
            total, seen, overlap = 0, 0, False
            for item in items:
                mask, empty = _first(item)
                if empty:
                    mask |= follow
                overlap = overlap or bool(mask & seen)
                seen |= mask
                total = max(total, _degree(item, follow))
            return min(total + overlap, UNBOUNDED)
        case Repeat(item, low, high, _):
            mask, empty = _first(item)
            again = high is None or high > 1
            inner = _degree(item, (mask | follow) if again else follow)
            if again and (inner or empty):
                return UNBOUNDED
            decided = high == low or not mask & follow
            return min(inner + (not decided), UNBOUNDED)


def _anchored(node: Node) -> bool:
    """True if a match can only begin at the subject's begin."""
    match node:
        case Edge(kind):
            return kind == BEGIN
        case Group(_, item):
            return _anchored(item)
        case Seq(items):
            return bool(items) and _anchored(items[0])
        case Alt(items):
            return all(_anchored(item) for item in items)
        case _:
            return False


def _starts_with_anything(node: Node) -> bool:
    """True for `.*...`: if it matches anywhere, the first match begins at the begin.

    `.` leaves out the line feed, which a name as text never has (it is written \\010).
    """
    match node:
        case Repeat(Chars(mask), 0, None, True):
            return mask & NOT_NEWLINE == NOT_NEWLINE
        case Group(_, item):
            return _starts_with_anything(item)
        case Seq(items):
            return bool(items) and _starts_with_anything(items[0])
        case _:
            return False


# --- the two ways to match ----------------------------------------------------------------


def _python(node: Node) -> str:
    """Return the same pattern for Python's `re`."""
    match node:
        case Chars(mask):
            return _python_set(mask)
        case Edge(kind):
            return kind
        case Group(_, item):
            return f"({_python(item)})"
        case Seq(items):
            return "(?:" + "".join(map(_python, items)) + ")"
        case Alt(items):
            return "(?:" + "|".join(map(_python, items)) + ")"
        case Repeat(item, low, high, greedy):
            bounds = f"{{{low},{'' if high is None else high}}}"
            return f"(?:{_python(item)}){bounds}{'' if greedy else '?'}"


def _python_set(mask: int) -> str:
    if not mask:
        return "(?!)"
    if mask & (mask - 1) == 0:
        return re.escape(chr(mask.bit_length() - 1))
    out, code = [], 0
    while mask >> code:
        if mask >> code & 1:
            end = code
            while mask >> (end + 1) & 1:
                end += 1
            out.append(f"\\x{code:02x}" + (f"-\\x{end:02x}" if end > code else ""))
            code = end
        code += 1
    return f"[{''.join(out)}]"


# One state: (what, argument, second argument). "set" MASK -> the next state; "save" SLOT;
# "edge" KIND; "split" FIRST SECOND and "jump" TO name states; "done".
_State = tuple[str, int, int, str]


class _Machine:
    """All states of a pattern, run side by side: steps are at most states x characters."""

    def __init__(self, node: Node, groups: int) -> None:
        self.states: list[_State] = []
        self.slots = 2 * (groups + 1)
        self.emit(Group(0, node))
        self.states.append(("done", 0, 0, ""))

    def put(self, what: str, one: int = 0, two: int = 0, kind: str = "") -> int:
        if len(self.states) >= MAX_STATES:
            raise BadPattern(f"expression too large: more than {MAX_STATES} states")
        self.states.append((what, one, two, kind))
        return len(self.states) - 1

    def emit(self, node: Node) -> None:
        match node:
            case Chars(mask):
                self.put("set", mask)
            case Edge(kind):
                self.put("edge", kind=kind)
            case Group(number, item):
                self.put("save", 2 * number)
                self.emit(item)
                self.put("save", 2 * number + 1)
            case Seq(items):
                for item in items:
                    self.emit(item)
            case Alt(items):
                ends = []
                for item in items[:-1]:
                    split = self.put("split")
                    self.emit(item)
                    ends.append(self.put("jump"))
                    self.fork(split, len(self.states), True)
                self.emit(items[-1])
                for end in ends:
                    self.states[end] = ("jump", len(self.states), 0, "")
            case Repeat(item, low, high, greedy):
                self.emit_repeat(item, low, high, greedy)

    def emit_repeat(self, item: Node, low: int, high: int | None, greedy: bool) -> None:
        splits = []
        if high is None:
            # x* is (x+)?, as in Go: it tells what x caught last when x may be empty.
            if low == 0:
                splits.append(self.put("split"))
            for _ in range(low - 1):
                self.emit(item)
            start = len(self.states)
            self.emit(item)
            end = self.put("split")
            one, two = (start, end + 1) if greedy else (end + 1, start)
            self.states[end] = ("split", one, two, "")
        else:
            for _ in range(low):
                self.emit(item)
            for _ in range(high - low):
                splits.append(self.put("split"))
                self.emit(item)
        for split in splits:
            self.fork(split, len(self.states), greedy)

    def fork(self, split: int, other: int, greedy: bool) -> None:
        one, two = (split + 1, other) if greedy else (other, split + 1)
        self.states[split] = ("split", one, two, "")

    def run(self, subject: str) -> tuple[int, ...] | None:
        """Return begin and end of the match and of each group, -1 for one without part."""
        found: tuple[int, ...] | None = None
        none = (-1,) * self.slots
        threads: list[tuple[int, tuple[int, ...]]] = []
        for at in range(len(subject) + 1):
            waiting: list[tuple[int, tuple[int, ...]]] = []
            seen: set[int] = set()
            code = ord(subject[at]) if at < len(subject) else -1
            starts = threads if found else [*threads, (0, none)]
            for state, saved in starts:
                done = self.follow(state, saved, subject, at, seen, waiting)
                if done is not None:
                    found = done  # of lower priority than the threads already waiting
                    break
            threads = [
                (state + 1, saved)
                for state, saved in waiting
                if 0 <= code < 128 and self.states[state][1] >> code & 1
            ]
            if not threads and found:
                break
        return found

    def follow(
        self,
        state: int,
        saved: tuple[int, ...],
        subject: str,
        at: int,
        seen: set[int],
        waiting: list[tuple[int, tuple[int, ...]]],
    ) -> tuple[int, ...] | None:
        """Add to `waiting`, best first, the states reached before the next character; return
        what is saved if the match is done."""
        stack = [(state, saved)]
        while stack:
            state, saved = stack.pop()
            if state in seen:
                continue
            seen.add(state)
            what, one, two, kind = self.states[state]
            if what == "set":
                waiting.append((state, saved))
            elif what == "split":
                stack.append((two, saved))
                stack.append((one, saved))
            elif what == "jump":
                stack.append((one, saved))
            elif what == "save":
                stack.append((state + 1, (*saved[:one], at, *saved[one + 1 :])))
            elif what == "done":
                return saved
            elif _holds(kind, subject, at):
                stack.append((state + 1, saved))
        return None


def _holds(kind: str, subject: str, at: int) -> bool:
    if kind == BEGIN:
        return at == 0
    if kind == END:
        return at == len(subject)
    if kind == LINE_BEGIN:
        return at == 0 or subject[at - 1] == "\n"
    if kind == LINE_END:
        return at == len(subject) or subject[at] == "\n"
    before = at > 0 and _is_word(subject[at - 1])
    after = at < len(subject) and _is_word(subject[at])
    return (before != after) == (kind == WORD_EDGE)


def _is_word(char: str) -> bool:
    return char.isascii() and (char.isalnum() or char == "_")


class Pattern:
    """A compiled pattern.

    text   -- as written
    groups -- how many groups it has
    names  -- names of group 0 (all of the match), 1, ...; "" for one without a name
    """

    __slots__ = ("_compiled", "_degree", "_machine", "groups", "names", "text")

    def __init__(self, text: str) -> None:
        parser = _Parser(text)
        node = parser.parse()
        self.text = text
        self.names = tuple(parser.names)
        self.groups = len(self.names) - 1
        degree = _degree(node, 0)
        if not _anchored(node):
            if _starts_with_anything(node):
                node = Seq((Edge(BEGIN), node))
            else:
                degree += 1
        self._degree = degree
        self._machine = _Machine(node, self.groups) if degree > 1 else None
        self._compiled = re.compile(_python(node), re.ASCII)

    def search(self, subject: str) -> tuple[str, ...] | None:
        """Return the first match and its groups ("" for one without part), or None."""
        machine = self._machine
        degree = self._degree
        if machine is None or (degree < UNBOUNDED and len(subject) ** degree <= MAX_STEPS):
            match = self._compiled.search(subject)
            return None if match is None else (match[0], *match.groups(""))
        spans = machine.run(subject)
        if spans is None:
            return None
        return tuple(
            subject[spans[i] : spans[i + 1]] if spans[i + 1] >= 0 else ""
            for i in range(0, len(spans), 2)
        )


def compile_pattern(text: str) -> Pattern:
    """Return the pattern; raises BadPattern with Go's reason."""
    if len(text) > MAX_PATTERN:
        raise BadPattern(f"regex pattern too long: {len(text)} > {MAX_PATTERN}")
    return Pattern(text)
