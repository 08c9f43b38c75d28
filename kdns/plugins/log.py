"""`log`: one line for each query, in CoreDNS's format.

Decides which queries are logged and what a line says. A line is the message alone, without
the `plugin/log:` that other plugins' lines start with; level and destination are the
logger's. Queries answered from the packet cache are logged through Reply.on_repeat: what
the reply fixes is rendered once, what differs from asker to asker is filled in each time.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from kdns.corefile import Directive, Option, Token, nearest
from kdns.dns import types as t
from kdns.dns.message import (
    AA,
    AD,
    CD,
    CLEAR_RD,
    OPCODE,
    RA,
    RD,
    SET_RD,
    TC,
    Query,
    Reply,
    is_cut,
    reply_size,
)
from kdns.dns.name import ROOT, is_subdomain, render_name
from kdns.plugins.plugin import Plugin
from kdns.plugins.setup import Setup

COMMON = (
    '{remote}:{port} - {>id} "{type} {class} {name} {proto} {size} {>do} {>bufsize}"'
    " {rcode} {>rflags} {rsize} {duration}"
)
COMBINED = COMMON + ' "{>opcode}"'
EMPTY = "-"
LIKE_A_PLACEHOLDER = re.compile(r"\{[>]?\w+\}")

SUCCESS, DENIAL, ERROR, ALL = "success", "denial", "error", "all"
CLASSES = (SUCCESS, DENIAL, ERROR, ALL)

NOTIFY = t.NOTIFY << 11


def response_type(query: Query, reply: Reply | None) -> str:
    """Return CoreDNS's name for the kind of answer; None is no answer at all.

    It also knows expired signatures as an error; nothing here looks into RRSIGs.
    """
    if reply is None:
        return "OTHERERROR"
    if query.flags & OPCODE == NOTIFY or query.qtype in (t.AXFR, t.IXFR):
        return "META"
    rcode = reply.rcode
    if reply.answer:
        if rcode == t.NOERROR:
            return "NOERROR"
        if rcode == t.NXDOMAIN:
            return "OTHERERROR"
    if rcode == t.NXDOMAIN:
        return "NXDOMAIN"
    if rcode in (t.SERVFAIL, t.NOTIMP):
        return "SERVERERROR"
    if rcode != t.NOERROR:
        return "OTHERERROR"
    held = {rr.type for rr in reply.authority}
    if t.SOA in held:
        return "NODATA"
    return "DELEGATION" if t.NS in held else "NOERROR"


RESPONSE_CLASS = {
    "NOERROR": SUCCESS,
    "DELEGATION": SUCCESS,
    "NXDOMAIN": DENIAL,
    "NODATA": DENIAL,
}  # all else is an error


# --- what a placeholder shows -------------------------------------------------------------

_FLAG_NAMES = ((AA, "aa"), (TC, "tc"), (RD, "rd"), (RA, "ra"), (AD, "ad"), (CD, "cd"))


def _rflags(query: Query, reply: Reply | None) -> str:
    return EMPTY if reply is None else answer_flags(query, reply)


def answer_flags(query: Query, reply: Reply) -> str:
    """Return the names of the flags that the answer is sent with: "qr,aa,rd"."""
    flags = (reply.flags & (AA | TC | RA | AD)) | (query.flags & (RD | CD))
    if not flags & TC and is_cut(query, reply):
        flags |= TC
    if reply.flags & (SET_RD | CLEAR_RD):
        flags = flags | RD if reply.flags & SET_RD else flags & ~RD
    names = _FLAGS_SEEN.get(flags)
    if names is None:
        names = ",".join(["qr", *(name for bit, name in _FLAG_NAMES if flags & bit)])
        _FLAGS_SEEN[flags] = names
    return names


_FLAGS_SEEN: dict[int, str] = {}  # six bits, so 64 at most


def _rcode(query: Query, reply: Reply | None) -> str:
    if reply is None:
        return EMPTY
    return t.RCODE_NAMES.get(reply.rcode) or str(reply.rcode)


# Fixed by question and reply. `size` and `rsize` are octets without compression.
FIXED: dict[str, Callable[[Query, Reply | None], str]] = {
    "{type}": lambda q, r: t.type_name(q.qtype),
    "{class}": lambda q, r: t.class_name(q.qclass),
    "{name}": lambda q, r: render_name(q.key),
    "{proto}": lambda q, r: "udp" if q.proto == "udp" else "tcp",
    "{size}": lambda q, r: str(q.size),
    "{rcode}": _rcode,
    "{rsize}": lambda q, r: "0" if r is None else str(reply_size(q, r)),
    "{>rflags}": _rflags,
    "{>opcode}": lambda q, r: str((q.flags & OPCODE) >> 11),
    "{>do}": lambda q, r: "true" if q.do else "false",
    "{>bufsize}": lambda q, r: str(q.limit),
    "{/log/type}": response_type,
    "{/log/class}": lambda q, r: RESPONSE_CLASS.get(response_type(q, r), ERROR),
}

Client = tuple[str, int]
Form = TypeVar("Form")  # what a line looks like


def _remote(client: Client, qid: int, seconds: float) -> str:
    host = client[0]
    return f"[{host}]" if ":" in host else host


def _duration(client: Client, qid: int, seconds: float) -> str:
    """Nanoseconds are what a clock resolves; Go prints them without trailing zeros."""
    text = f"{seconds:.9f}".rstrip("0")
    return (text[:-1] if text[-1] == "." else text) + "s"


# Another one for each time the reply is sent.
VARYING: dict[str, Callable[[Client, int, float], str]] = {
    "{remote}": _remote,
    "{port}": lambda client, qid, seconds: str(client[1]),
    "{>id}": lambda client, qid, seconds: str(qid),
    "{duration}": _duration,
}


def _metadata(label: str) -> Callable[[Query, Reply | None], str]:
    def show(query: Query, reply: Reply | None) -> str:
        meta = query.meta
        return EMPTY if meta is None else str(meta.get(label, EMPTY))

    return show


class Format:
    """A log format, taken apart once.

    _parts   -- text between placeholders (also in place of what varies) or functions of
                (query, reply)
    _varying -- (place in _parts, function of (client, id, seconds)) of what varies
    unknown  -- what looks like a placeholder and is none
    """

    def __init__(self, text: str, local: str) -> None:
        text = text.replace("{common}", COMMON).replace("{combined}", COMBINED)
        self._parts: list[str | Callable[[Query, Reply | None], str]] = []
        self._varying: list[tuple[int, Callable[[Client, int, float], str]]] = []
        self.unknown: list[str] = []
        for piece in re.split(r"(\{[^{}]*\})", text):
            if piece in VARYING:
                self._varying.append((len(self._parts), VARYING[piece]))
                self._parts.append("")
            elif piece in FIXED:
                self._parts.append(FIXED[piece])
            elif piece.startswith("{/") and piece.endswith("}"):
                self._parts.append(_metadata(piece[2:-1]))
            elif piece == "{local}":
                self._parts.append(local)
            else:
                if LIKE_A_PLACEHOLDER.fullmatch(piece):
                    self.unknown.append(piece)
                self._parts.append(piece)

    def fix(self, query: Query, reply: Reply | None) -> list[str]:
        """Return the pieces of a line, empty where it varies from asker to asker."""
        return [part if isinstance(part, str) else part(query, reply) for part in self._parts]

    def fill(self, pieces: list[str], client: Client, qid: int, seconds: float) -> str:
        """Return the finished line; the pieces may be filled again for another asker."""
        for place, show in self._varying:
            pieces[place] = show(client, qid, seconds)
        return "".join(pieces)


class Rule(Generic[Form]):
    """Which names and classes of answers are logged, and how. classes None: all."""

    __slots__ = ("classes", "form", "scope")

    def __init__(self, scope: bytes, form: Form, classes: frozenset[str] | None) -> None:
        self.scope = scope
        self.form = form
        self.classes = classes


def rule_for(rules: Sequence[Rule[Form]], query: Query, reply: Reply | None) -> Rule[Form] | None:
    """Return the first rule whose scope holds the name, if it logs this kind of answer."""
    for rule in rules:
        if is_subdomain(query.key, rule.scope):
            classes = rule.classes
            if classes is None:
                return rule
            found = RESPONSE_CLASS.get(response_type(query, reply), ERROR)
            return rule if found in classes else None
    return None


def on_each_repeat(reply: Reply, call: Callable[[Client, int, float], None]) -> None:
    """Have `call` told of each time that a reply which may be said again is."""
    if reply.on_repeat is None:
        reply.on_repeat = []
    reply.on_repeat.append(call)


class Log(Plugin):
    """The first rule whose scope holds the name decides, even if it then logs nothing."""

    word = "log"

    def __init__(
        self, log: logging.Logger, clock: Callable[[], float], rules: Sequence[Rule[Format]]
    ) -> None:
        self._info = log.info
        self._clock = clock
        self._rules = tuple(rules)

    def on_reply(self, query: Query, reply: Reply) -> Reply:
        rule = rule_for(self._rules, query, reply)
        if rule is None:
            return reply
        form = rule.form
        pieces = form.fix(query, reply)
        info = self._info
        info(form.fill(pieces, query.client, query.id, self._clock() - query.received))
        if reply.keep:

            def repeat(client: Client, qid: int, seconds: float) -> None:
                info(form.fill(pieces, client, qid, seconds))

            on_each_repeat(reply, repeat)
        return reply

    def on_drop(self, query: Query) -> None:
        rule = rule_for(self._rules, query, None)
        if rule is not None:
            form = rule.form
            seconds = self._clock() - query.received
            self._info(form.fill(form.fix(query, None), query.client, query.id, seconds))


# --- the Corefile -------------------------------------------------------------------------


def setup(directives: list[Directive], cx: Setup) -> list[Plugin]:
    """`log [NAMES...] [FORMAT] { class success|denial|error|all... }`, any number of times"""
    rules: list[Rule[Format]] = []
    for directive in directives:
        names, text = _split_args(directive.args, cx)
        form = Format(text, _local(cx))
        for unknown in form.unknown:
            cx.problems.warn(
                directive.word,
                f"'{unknown}' is no placeholder and is printed as it stands"
                + nearest(unknown, [*FIXED, *VARYING, "{local}", "{common}", "{combined}"]),
            )
        classes = _classes(directive, cx)
        rules += [Rule(scope, form, classes) for scope in scopes_of(names, cx)]
    return [Log(cx.log, cx.clock, rules)]


def _split_args(args: tuple[Token, ...], cx: Setup) -> tuple[tuple[Token, ...], str]:
    """Return the names and the format; only what follows a name can be a format."""
    if args and "{" in args[-1].text:
        if len(args) == 1:
            cx.problems.error(
                args[0], f"a format stands after a name: write log . '{args[0]}' in double quotes"
            )
        return args[:-1], args[-1].text
    return args, COMMON


def _local(cx: Setup) -> str:
    """Return the server's address: the one it is bound to, else the wildcard, which is what
    CoreDNS sees of a UDP query."""
    host = cx.facts.label.partition("://")[2].rpartition(":")[0]
    return host or "[::]"


def scopes_of(names: Sequence[Token], cx: Setup) -> list[bytes]:
    """Return the zones that names stand for; without any, all there is."""
    return [zone for name in names for zone in cx.zone(name)] if names else [ROOT]


def _classes(directive: Directive, cx: Setup) -> frozenset[str] | None:
    found: frozenset[str] = frozenset()
    for option in directive.options or ():
        if option.name != "class":
            cx.unknown_option(option, ("class",))
            continue
        found |= read_words(option, CLASSES, "class", cx)
    return chosen_classes(found)


def chosen_classes(found: frozenset[str]) -> frozenset[str] | None:
    """Return the classes that are logged; None: all."""
    return found if found and ALL not in found else None


def read_words(option: Option, known: Sequence[str], what: str, cx: Setup) -> frozenset[str]:
    """Return those of an option's words that are known; the others are reported."""
    found = set()
    if cx.arg_count(option, 1):
        for token in option.args:
            if token.text in known:
                found.add(token.text)
            else:
                cx.problems.error(
                    token,
                    f"invalid {what}: {token}"
                    + (nearest(token.text, known) or f" (known: {', '.join(known)})"),
                )
    return frozenset(found)
