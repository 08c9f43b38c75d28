"""`template`: answers made from the question by Go templates.

Decides which template a question is for, what a template gets to see, and what becomes of a
text that is no record. The template language is dns/gotemplate.py's, records as text are
dns/text.py's. CoreDNS's `var` and `expr` (1.14.7) need its expression language, which kdns
does not have.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from struct import pack
from typing import Any

from kdns.corefile import Directive, Option, Token, nearest
from kdns.dns import types as t
from kdns.dns.gofunctions import Function, Record
from kdns.dns.goregexp import BadPattern, Pattern, compile_pattern
from kdns.dns.gotemplate import BadTemplate, RenderError, Template, parse_template
from kdns.dns.message import AA, AD, CD, FOREVER, RA, RD, RR, TC, Edns, Query, Reply, failure
from kdns.dns.name import ROOT, is_subdomain, render_name
from kdns.dns.text import BadText, parse_rr
from kdns.metrics import Family, Metrics
from kdns.plugins.plugin import Ask, Outcome, Plugin
from kdns.plugins.setup import Setup

EDE = 15  # EDNS option of RFC 8914
SECTIONS = ("answer", "additional", "authority")
OPTIONS = ("match", *SECTIONS, "rcode", "ederror", "fallthrough", "upstream", "var", "expr")
# What a template sees (CoreDNS templateData).
FIELDS = (
    "Zone", "Name", "Regex", "Match", "Group", "Class", "Type", "Message", "Question", "Remote",
    "Meta", "Var",
)  # fmt: skip
# What differs between clients, or between two queries of one client with the same question.
OF_CLIENT = frozenset(("Remote", "Meta", ""))
OF_QUERY = frozenset(("Message", ""))


def _parse_uint(text: Any, base: Any, bits: Any) -> int:
    """As strconv.ParseUint."""
    if not isinstance(text, str) or not isinstance(base, int) or not isinstance(bits, int):
        raise ValueError("wrong type for value; expected string, int and int")

    def wrong(why: str) -> ValueError:
        return ValueError(f'strconv.ParseUint: parsing "{text}": {why}')

    if base == 1 or not 0 <= base <= 36:
        raise wrong(f"invalid base {base}")
    if not 0 <= bits <= 64:
        raise wrong(f"invalid bit size {bits}")
    try:
        if not text.isalnum() or not text.isascii() or len(text) > 64:
            raise ValueError
        old_octal = base == 0 and len(text) > 1 and text.isdecimal() and text[0] == "0"
        value = int(text, 8 if old_octal else base)
    except ValueError:
        raise wrong("invalid syntax") from None
    if value >> (bits or 64):
        raise wrong("value out of range")
    return value


FUNCTIONS = {"parseInt": Function(3, 3, _parse_uint)}


@dataclass(slots=True)
class Block:
    """One `template CLASS TYPE [ZONE...] { ... }`.

    falls   -- zones in which a name that no pattern matches goes to the next template
    ederror -- content of an Extended DNS Error option, or None
    repeats -- True if the same question always gets the same reply
    """

    qclass: int
    qtype: int
    zones: tuple[bytes, ...]
    patterns: list[Pattern] = field(default_factory=list)
    sections: dict[str, list[Template]] = field(
        default_factory=lambda: {section: [] for section in SECTIONS}
    )
    rcode: int = t.NOERROR
    falls: tuple[bytes, ...] = ()
    ederror: bytes | None = None
    repeats: bool = True

    def zone_for(self, query: Query) -> bytes | None:
        """Return the longest of the zones that holds the name; None if the question is not
        for this template."""
        if not _meant(query.qclass, self.qclass, t.ANYCLASS) or not _meant(
            query.qtype, self.qtype, t.ANY
        ):
            return None
        return max(
            (zone for zone in self.zones if is_subdomain(query.key, zone)), key=len, default=None
        )

    def search(self, text: str) -> tuple[Pattern, tuple[str, ...]] | None:
        """Return the first pattern that matches a name, and its groups."""
        for pattern in self.patterns:
            groups = pattern.search(text)
            if groups is not None:
                return pattern, groups
        return None


def _meant(asked: int, given: int, all_of_them: int) -> bool:
    return asked == given or all_of_them in (asked, given)


class _Counters:
    """The plugin's metrics (reference 3.1)."""

    def __init__(self, metrics: Metrics, server: str) -> None:
        labels = ("server", "zone", "view", "class", "type")
        self.server = server
        self.matches = metrics.counter(
            "coredns_template_matches_total", "Counter of template regex matches.", labels
        )
        self.template_failures = metrics.counter(
            "coredns_template_template_failures_total",
            "Counter of go template failures.",
            (*labels, "section", "template"),
        )
        self.rr_failures = metrics.counter(
            "coredns_template_rr_failures_total",
            "Counter of mis-templated RRs.",
            (*labels, "section", "template"),
        )


class _Match:
    """A question that a template is for, and what the template sees of it."""

    __slots__ = ("block", "labels", "record")

    def __init__(
        self, query: Query, block: Block, zone: bytes, text: str,
        found: tuple[Pattern, tuple[str, ...]], server: str,
    ) -> None:  # fmt: skip
        pattern, groups = found
        self.block = block
        qclass = block.qclass if query.qclass == t.ANYCLASS else query.qclass
        qtype = block.qtype if query.qtype == t.ANY else query.qtype
        # As CoreDNS: nothing for a number without a name (which also bounds the labels).
        class_text, type_text = t.CLASS_NAMES.get(qclass, ""), t.TYPE_NAMES.get(qtype, "")
        zone_text = render_name(zone)
        self.labels = (server, zone_text, "", class_text, type_text)
        group = {str(n): value for n, value in enumerate(groups)}
        for name, value in zip(pattern.names, groups, strict=True):
            if name:
                group[name] = value
        meta = query.meta or {}
        self.record = Record(
            "*template.templateData",
            {
                "Zone": zone_text,
                "Name": text,
                "Regex": pattern.text,
                "Match": list(groups),
                "Group": group,
                "Class": class_text,
                "Type": type_text,
                "Message": lambda: _message(query),
                "Question": lambda: _question(query),
                "Remote": query.client[0],
                "Meta": lambda name: str(meta.get(name, "")),
                "Var": {},
            },
        )


def _question(query: Query) -> Record:
    return Record(
        "*dns.Question",
        {"Name": render_name(query.name), "Qtype": query.qtype, "Qclass": query.qclass},
    )


def _message(query: Query) -> Record:
    """Return the query as miekg/dns shows a message."""
    flags = query.flags
    return Record(
        "*dns.Msg",
        {
            "Id": query.id,
            "Response": False,
            "Opcode": flags >> 11 & 15,
            "Authoritative": bool(flags & AA),
            "Truncated": bool(flags & TC),
            "RecursionDesired": bool(flags & RD),
            "RecursionAvailable": bool(flags & RA),
            "AuthenticatedData": bool(flags & AD),
            "CheckingDisabled": bool(flags & CD),
            "Rcode": flags & 15,
            "Question": [_question(query)],
            "Answer": [],
            "Ns": [],
            "Extra": [],
        },
    )


class TemplatePlugin(Plugin):
    """blocks, tried in the order of the Corefile."""

    word = "template"

    def __init__(self, blocks: Sequence[Block], counters: _Counters) -> None:
        self._blocks = tuple(blocks)
        self._zones = tuple({zone for block in blocks for zone in block.zones})
        self._counters = counters

    def on_query(self, query: Query) -> Outcome:
        key = query.key
        if not any(is_subdomain(key, zone) for zone in self._zones):
            return None
        text = render_name(key)
        for block in self._blocks:
            zone = block.zone_for(query)
            if zone is None:
                continue
            found = block.search(text)
            if found is not None:
                match = _Match(query, block, zone, text, found, self._counters.server)
                return self._answer(query, match)
            if not any(is_subdomain(key, fall) for fall in block.falls):
                return failure(t.SERVFAIL)
        return None

    def _answer(self, query: Query, match: _Match) -> Outcome:
        block = match.block
        matched = self._counters.matches.labels(*match.labels)
        if block.rcode == t.SERVFAIL:
            # CoreDNS leaves it to the server to answer, so no section is filled.
            reply = failure(t.SERVFAIL)
            reply.count(matched)
            return reply
        reply = Reply(block.rcode, served_by="template")
        reply.count(matched)
        try:
            reply.answer = self._records(match, "answer")
            reply.additional = self._records(match, "additional")
            reply.authority = self._records(match, "authority")
        except (RenderError, BadText) as e:
            return failure(t.SERVFAIL, str(e))
        if block.ederror is not None:
            reply.edns = Edns(4096, True, options=[(EDE, block.ederror)])
        if query.qtype in (t.A, t.AAAA) and any(rr.type == t.CNAME for rr in reply.answer):
            return self._follow(query, reply, reply.answer, 0)
        reply.keep = FOREVER if block.repeats else 0
        return reply

    def _records(self, match: _Match, section: str) -> list[RR]:
        records = []
        for template in match.block.sections[section]:
            family = self._counters.template_failures
            try:
                text = template.render(match.record)
                family = self._counters.rr_failures
                records.append(parse_rr(text))
            except (RenderError, BadText):
                _count_failure(family, match, section, template)
                raise
        return records

    def _follow(self, query: Query, reply: Reply, made: list[RR], at: int) -> Outcome:
        """Put what each CNAME leads to behind it; `made` are the template's own records."""
        if at == 0:
            reply.answer = []
        while at < len(made):
            rr = made[at]
            at += 1
            reply.answer.append(rr)
            if rr.type == t.CNAME:
                return self._ask(query, reply, made, at, rr.rdata)
        return reply

    def _ask(self, query: Query, reply: Reply, made: list[RR], at: int, target: bytes) -> Ask:
        def then(found: Reply | None) -> Outcome:
            if found is not None:
                reply.answer += found.answer
                reply.flags = (reply.flags & ~TC) | (found.flags & TC)
            return self._follow(query, reply, made, at)

        return Ask(query.asking(name=target), then)


class TemplateByClient(TemplatePlugin):
    """Templates that look at who asks."""

    per_client = True


def _count_failure(family: Family, match: _Match, section: str, template: Template) -> None:
    family.labels(*match.labels, section, template.source).add()


# --- how templates are written ------------------------------------------------------------


def setup(directives: list[Directive], cx: Setup) -> list[Plugin]:
    """`template CLASS TYPE [ZONE...] { match, answer, additional, authority, rcode, ederror,
    fallthrough }`; one plugin for all of them."""
    blocks = []
    for directive in directives:
        block = _read(directive, cx)
        if block is not None:
            blocks.append(block)
    uses = {root for b in blocks for s in b.sections.values() for tpl in s for root in tpl.roots}
    make = TemplateByClient if uses & OF_CLIENT else TemplatePlugin
    return [make(blocks, _Counters(cx.metrics, cx.facts.label))]


def _read(directive: Directive, cx: Setup) -> Block | None:
    if len(directive.args) < 2:
        cx.problems.error(directive.word, "'template' needs a CLASS and a TYPE, as in 'IN A'")
        return None
    class_word, type_word, *zones = directive.args
    qclass = t.CLASSES.get(class_word.text.upper())
    qtype = t.type_number(type_word.text)
    if qclass is None:
        cx.problems.error(
            class_word, f"invalid query class '{class_word}'{_near(class_word, t.CLASSES)}"
        )
    if qtype is None:
        cx.problems.error(type_word, f"invalid RR type '{type_word}'{_near(type_word, t.TYPES)}")
    block = Block(qclass or 0, qtype or 0, cx.zones(zones))
    for option in directive.options or ():
        _read_option(option, block, cx)
    # Without `match` every name is meant.
    block.patterns = block.patterns or [compile_pattern(".*")]
    for templates in block.sections.values():
        for template in templates:
            if template.roots & (OF_CLIENT | OF_QUERY):
                block.repeats = False
    return block if qclass is not None and qtype is not None else None


def _near(token: Token, names: Iterable[str]) -> str:
    return nearest(token.text, [name.lower() for name in names])


def _read_option(option: Option, block: Block, cx: Setup) -> None:
    match option.name:
        case "match":
            if cx.arg_count(option, 1):
                block.patterns += [p for arg in option.args if (p := _pattern(arg, cx))]
        case "answer" | "additional" | "authority":
            if cx.arg_count(option, 1):
                block.sections[option.name] += [
                    template
                    for arg in option.args
                    if (template := _template(option.name, arg, cx)) is not None
                ]
        case "rcode":
            if cx.arg_count(option, 1, 1):
                rcode = {**t.RCODES, "NOTIMPL": t.NOTIMP}.get(option.args[0].text.upper())
                if rcode is None:
                    word = option.args[0]
                    cx.problems.error(word, f"unknown rcode '{word}'{_near(word, t.RCODES)}")
                block.rcode = rcode or t.NOERROR
        case "ederror":
            if cx.arg_count(option, 1, 2):
                code = cx.integer(option.args[0], 0, 65535, "an extended DNS error code")
                reason = option.args[1].text if len(option.args) == 2 else ""
                block.ederror = pack("!H", code) + reason.encode()
        case "fallthrough":
            block.falls = cx.zones(option.args) if option.args else (ROOT,)
        case "upstream":
            cx.problems.warn(
                option.word,
                "'upstream' has no effect any more: what a CNAME leads to is always asked of"
                " this server itself; leave the line out",
            )
        case "var" | "expr":
            cx.problems.error(
                option.word,
                f"CoreDNS's '{option.name}' is not in kdns; write the condition into 'match' and"
                " the value into the template",
            )
        case _:
            cx.unknown_option(option, OPTIONS)


def _pattern(token: Token, cx: Setup) -> Pattern | None:
    try:
        return compile_pattern(token.text)
    except BadPattern as e:
        cx.problems.error(token, f"could not parse regex: {token}, {e}")
        return None


def _template(section: str, token: Token, cx: Setup) -> Template | None:
    try:
        template = parse_template(section, token.text, FUNCTIONS)
    except BadTemplate as e:
        cx.problems.error(token, f"could not compile template: {token}, {e}")
        return None
    for name in sorted(template.roots - {"", *FIELDS}):
        # CoreDNS takes it and answers every query with SERVFAIL.
        cx.problems.error(token, f"a template has no field .{name} (known: {', '.join(FIELDS)})")
    return template
