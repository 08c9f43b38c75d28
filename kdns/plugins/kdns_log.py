"""`kdns_log json`: one JSON object for each query, with the reasons for its answer.

Decides which fields a query event has and how they are written (docs/LOG.md); the control
socket's /v1/queries shows the same events. `log` stays CoreDNS's own. As there, queries
answered from the packet cache are logged through Reply.on_repeat: what the reply fixes is
rendered once, what differs from asker to asker is filled in each time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import TypeAlias

import msgspec

from kdns.corefile import Directive, Option
from kdns.dns import types as t
from kdns.dns.message import Query, Reply, reply_size
from kdns.dns.name import render_name
from kdns.dns.text import render_rdata
from kdns.plugins.log import (
    CLASSES,
    Rule,
    answer_flags,
    chosen_classes,
    on_each_repeat,
    read_words,
    rule_for,
    scopes_of,
)
from kdns.plugins.plugin import Feed, Plugin, Work
from kdns.plugins.setup import Setup
from kdns.registry.clients import Clients
from kdns.registry.spec import KubeSpec, ManifestSpec
from kdns.zone.cluster import describe_dep

MAX_ANSWERS = 8
MAX_VALUE = 256  # characters of one answer; a TXT record may have 64 kB
DROPPED = "DROPPED"  # the rcode of a query that gets no answer at all
OPTIONS = ("class", "fields")

Client: TypeAlias = tuple[str, int]
Write: TypeAlias = Callable[[str], object]
_encode = msgspec.json.Encoder().encode


def _json(value: object) -> str:
    return _encode(value).decode()


# The same names, values and objects come again and again, and writing them costs most of a
# line. What is remembered is bounded: REMEMBERED texts each, of SHORT octets at most.
REMEMBERED, SHORT = 2048, 255


@lru_cache(REMEMBERED)
def _name(key: bytes) -> str:
    return _json(render_name(key))


@lru_cache(REMEMBERED)
def _short_value(rtype: int, rdata: bytes) -> str:
    return _value(rtype, rdata)


def _value(rtype: int, rdata: bytes) -> str:
    text = f"{t.type_name(rtype)} {render_rdata(rtype, rdata)}"
    return _json(text if len(text) <= MAX_VALUE else f"{text[: MAX_VALUE - 3]}...")


@lru_cache(REMEMBERED)
def _described(dep: Hashable) -> str:
    text = describe_dep(dep)
    return _json(text) if text else ""


# --- what the fields hold -----------------------------------------------------------------


def _rcode(query: Query, reply: Reply | None) -> str:
    return _json(DROPPED if reply is None else t.rcode_name(reply.rcode))


def _flags(query: Query, reply: Reply | None) -> str | None:
    return None if reply is None else _json(answer_flags(query, reply))


def _answers(query: Query, reply: Reply | None) -> str:
    if reply is None or not reply.answer:
        return "[]"
    shown = ",".join([
        (_short_value if len(rr.rdata) <= SHORT else _value)(rr.type, rr.rdata)
        for rr in reply.answer[:MAX_ANSWERS]
    ])  # fmt: skip
    more = len(reply.answer) - MAX_ANSWERS
    return f"[{shown}]" if more <= 0 else f'[{shown}],"more":{more}'


def _plugin(query: Query, reply: Reply | None) -> str:
    if reply is None:
        return '""'
    # A failure of the upstreams is made above all plugins, as CoreDNS counts it.
    return _json(reply.served_by or ("forward" if reply.upstream else ""))


def _object(query: Query, reply: Reply | None) -> str | None:
    for dep in () if reply is None else reply.deps:
        text = _described(dep)
        if text:
            return text
    return None


def _upstream(query: Query, reply: Reply | None) -> str | None:
    return _json(reply.upstream) if reply is not None and reply.upstream else None


def _ede(query: Query, reply: Reply | None) -> str | None:
    if reply is None or reply.ede is None:
        return None
    return _json({"code": reply.ede.code, "text": reply.ede.text})


def _error(query: Query, reply: Reply | None) -> str | None:
    return _json(reply.error) if reply is not None and reply.error else None


# Fixed by question and reply, as JSON; None: the field is absent.
FIXED: dict[str, Callable[[Query, Reply | None], str | None]] = {
    "proto": lambda q, r: f'"{q.proto}"',
    "name": lambda q, r: _name(q.key),
    "type": lambda q, r: f'"{t.type_name(q.qtype)}"',
    "class": lambda q, r: f'"{t.class_name(q.qclass)}"',
    "rcode": _rcode,
    "flags": _flags,
    "answers": _answers,
    "plugin": _plugin,
    "object": _object,
    "upstream": _upstream,
    "ede": _ede,
    "error": _error,
    "size": lambda q, r: str(0 if r is None else reply_size(q, r)),
}

# All there are, in the order in which they are written; "more" comes with "answers".
FIELDS = (
    "time", "server", "client", "pod", "proto", "id", "name", "type", "class", "rcode", "flags",
    "answers", "plugin", "object", "cache_age", "upstream", "ede", "error", "size", "duration_ms",
)  # fmt: skip


class Event:
    """One reply's line: what is fixed, rendered, and room for what varies."""

    __slots__ = ("_form", "_pieces", "_stored")

    def __init__(self, form: EventForm, pieces: list[str], stored: float | None) -> None:
        self._form = form
        self._pieces = pieces
        self._stored = stored

    def line(self, client: Client, qid: int, seconds: float) -> str:
        """Return the line for one asker; may be called again for the next."""
        pieces = self._pieces
        for place, show in self._form.varying:
            pieces[place] = show(client, qid, seconds, self._stored)
        return f"{{{''.join(pieces)[:-1]}}}"


class EventForm:
    """Which fields a line has, taken apart once.

    wall, clock -- seconds since 1970, and monotonic ones
    who    -- the Pod that has an address, or ""
    """

    def __init__(
        self,
        server: str,
        wall: Callable[[], float],
        clock: Callable[[], float],
        who: Callable[[str], str],
        fields: Iterable[str] = FIELDS,
    ) -> None:
        self._wall, self._clock, self._who = wall, clock, who
        self._second, self._stamp = -1, ""
        varying: dict[str, Callable[[Client, int, float, float | None], str]] = {
            "time": self._show_time,
            "client": self._show_client,
            "pod": self._show_pod,
            "id": lambda client, qid, seconds, stored: f'"id":{qid},',
            "cache_age": self._show_age,
            "duration_ms": lambda client, qid, seconds, stored: (
                f'"duration_ms":{seconds * 1000:.3f},'
            ),
        }
        wanted = frozenset(fields)
        self._parts: list[str | list[str]] = []
        self.varying: list[tuple[int, Callable[[Client, int, float, float | None], str]]] = []
        for name in FIELDS:
            if name not in wanted:
                continue
            if name in varying:
                self.varying.append((len(self._parts), varying[name]))
                self._parts.append("")
            elif name == "server":
                self._parts.append(f'"server":{_json(server)},')
            elif self._parts and isinstance(last := self._parts[-1], list):
                last.append(name)
            else:
                self._parts.append([name])

    def fix(self, query: Query, reply: Reply | None) -> Event:
        """Return the line of a reply (None: none was sent), for any number of askers."""
        pieces = []
        for part in self._parts:
            if isinstance(part, str):
                pieces.append(part)
                continue
            text = ""
            for name in part:
                value = FIXED[name](query, reply)
                if value is not None:
                    text += f'"{name}":{value},'
            pieces.append(text)
        return Event(self, pieces, None if reply is None else reply.stored)

    def _show_time(self, client: Client, qid: int, seconds: float, stored: float | None) -> str:
        now = self._wall()
        second = int(now)
        if second != self._second:
            self._second = second
            self._stamp = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        return f'"time":"{self._stamp}.{int((now - second) * 1000):03d}Z",'

    def _show_client(self, client: Client, qid: int, seconds: float, stored: float | None) -> str:
        host, port = client
        return f'"client":{_json(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")},'

    def _show_pod(self, client: Client, qid: int, seconds: float, stored: float | None) -> str:
        pod = self._who(client[0])
        return f'"pod":{_json(pod)},' if pod else ""

    def _show_age(self, client: Client, qid: int, seconds: float, stored: float | None) -> str:
        return "" if stored is None else f'"cache_age":{max(0.0, self._clock() - stored):.3f},'


def show(query: Query, reply: Reply | None, form: EventForm, seconds: float, write: Write) -> None:
    """Write the line of a query, and that of each repeat of its reply."""
    event = form.fix(query, reply)
    write(event.line(query.client, query.id, seconds))
    if reply is not None and reply.keep:

        def repeat(client: Client, qid: int, seconds: float) -> None:
            write(event.line(client, qid, seconds))

        on_each_repeat(reply, repeat)


# --- the plugin ---------------------------------------------------------------------------


class KdnsLog(Plugin):
    """The first rule whose scope holds the name decides, even if it then logs nothing.

    clients -- the Pods of the registry that a `kubernetes` reads, in this block or another
    """

    word = "kdns_log"

    def __init__(self, cx: Setup, clients: Clients, rules: Sequence[Rule[EventForm]]) -> None:
        # Lines that are JSON already: no level, no name in front (logs.py).
        self._write: Write = cx.log.getChild("queries").info
        self._clock = cx.clock
        self._rules = tuple(rules)
        self._clients = clients
        self._source: KubeSpec | ManifestSpec | None = None

    def link(self, chain: Sequence[Plugin]) -> None:
        """Take the first registry there is. Called once more with the plugins of all blocks."""
        if self._source is None:
            found = (getattr(p, "source", None) for p in chain if p.word == "kubernetes")
            self._source = next(filter(None, found), None)

    def work(self) -> Sequence[Work]:
        return () if self._source is None else (Feed(self._source, self._clients.publish),)

    def on_reply(self, query: Query, reply: Reply) -> Reply:
        rule = rule_for(self._rules, query, reply)
        if rule is not None:
            show(query, reply, rule.form, self._clock() - query.received, self._write)
        return reply

    def on_drop(self, query: Query) -> None:
        rule = rule_for(self._rules, query, None)
        if rule is not None:
            show(query, None, rule.form, self._clock() - query.received, self._write)


# --- the Corefile -------------------------------------------------------------------------


def setup(directives: list[Directive], cx: Setup) -> list[Plugin]:
    """`kdns_log json [NAMES...] { class success|denial|error|all... ; fields FIELD... }`, any
    number of times"""
    rules: list[Rule[EventForm]] = []
    clients = Clients()
    for directive in directives:
        args = directive.args
        if not cx.arg_count(directive, 1):
            continue
        if args[0].text != "json":
            cx.problems.error(
                args[0],
                f"'kdns_log' writes json: kdns_log json {args[0]}; CoreDNS's own lines are"
                " plugin 'log'",
            )
            continue
        classes, fields = _read_options(directive.options or (), cx)
        form = EventForm(cx.facts.label, cx.wall, cx.clock, clients.pod_at, fields)
        rules += [Rule(scope, form, classes) for scope in scopes_of(args[1:], cx)]
    return [KdnsLog(cx, clients, rules)]


def _read_options(
    options: Sequence[Option], cx: Setup
) -> tuple[frozenset[str] | None, frozenset[str]]:
    classes: frozenset[str] = frozenset()
    fields: frozenset[str] = frozenset()
    for option in options:
        if option.name == "class":
            classes |= read_words(option, CLASSES, "class", cx)
        elif option.name == "fields":
            fields |= read_words(option, FIELDS, "field", cx)
        else:
            cx.unknown_option(option, OPTIONS)
    return (
        chosen_classes(classes),
        fields or frozenset(FIELDS),
    )
