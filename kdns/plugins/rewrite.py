"""`rewrite`: asks the plugins below something else, and answers what was asked.

Decides how rules are written, in which order they are tried and undone; what each does is in
rewrite_rules.py. The question of a reply is the client's own whatever happens here (the
server sees to that); owner names and values in records are repaired only as far as the rules
say, as in CoreDNS: `name exact` by itself, the others with `answer`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from struct import pack

from kdns.corefile import Directive, Token, nearest
from kdns.dns import types as t
from kdns.dns.goregexp import BadPattern, Pattern, compile_pattern
from kdns.dns.message import ECHOED_OPTIONS, RR, Edns, Query, Reply, failure
from kdns.dns.name import BadName, parse_name, render_name
from kdns.plugins.plugin import Ask, Outcome, Plugin
from kdns.plugins.rewrite_rules import (
    NSID,
    SUBNET,
    AnswerRule,
    ClassRule,
    CnameAnswer,
    EdnsRule,
    NameRule,
    OptionContent,
    OwnerAnswer,
    RcodeAnswer,
    ReplyRule,
    Rewritten,
    Rule,
    TtlAnswer,
    TypeRule,
    ValueAnswer,
    client_address,
    map_text,
    renaming,
    subnet_of,
)
from kdns.plugins.setup import Setup

KINDS = ("exact", "prefix", "suffix", "substring", "regex")
FIELDS = ("name", "type", "class", "edns0", "ttl", "cname", "rcode")
ACTIONS = ("set", "append", "replace", "unset")
MAX_GROUP = 100  # CoreDNS looks for {0} to {100}
MAX_TTL = 2147483647  # RFC 2181 s8

# Rcodes by the names CoreDNS knows, which has some more than one of.
RCODES = {**t.RCODES, "NOTIMPL": t.NOTIMP, "BADSIG": 16}


class Rewrite(Plugin):
    """rules, in the order of the Corefile; codes -- EDNS options they put into queries, which
    replies show to clients unless reverted."""

    word = "rewrite"

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = tuple(rules)
        codes = {rule.code for rule in rules if isinstance(rule, EdnsRule)}
        # None: replies show what the server shows of a query's options by itself.
        self._shown = ECHOED_OPTIONS | (codes - {SUBNET}) if codes else None

    def on_query(self, query: Query) -> Outcome:
        text = render_name(query.key)
        q = query
        for rule in self.rules:
            try:
                changed = rule.apply(q, text)
            except BadName as e:
                return failure(t.SERVFAIL, f"invalid name after rewrite: {e}")
            if changed is not None:
                q, text = changed, changed.text
                if rule.stop:
                    break
        if not isinstance(q, Rewritten):
            return None
        if any(isinstance(answer, CnameAnswer) for answer in q.answers):
            rewritten = q
            return Ask(q, lambda reply: self._answer(rewritten, reply), below=True)
        return q

    def on_reply(self, query: Query, reply: Reply) -> Reply:
        self._show_options(query, reply)
        if isinstance(query, Rewritten):
            for answer in self._start(query, reply):
                answer.apply(reply)
        return reply

    def _show_options(self, query: Query, reply: Reply) -> None:
        """Let the reply carry the query's options, unless an upstream has put in its own."""
        edns, shown = query.edns, self._shown
        if shown is not None and edns is not None and reply.edns is None:
            options = [option for option in edns.options if option[0] in shown]
            reply.edns = Edns(edns.size, edns.do, edns.version, options)

    def _start(self, query: Rewritten, reply: Reply) -> list[AnswerRule]:
        """Return what is to be done to the reply, first things first."""
        answers = query.answers[::-1]
        if reply.stream is not None:
            reply.stream = _change_batches(answers, reply.stream)
        return answers

    def _answer(self, query: Rewritten, reply: Reply | None) -> Outcome:
        """Go on with the reply to a query for which a CNAME may have to be followed."""
        assert reply is not None  # asked without a time limit
        self._show_options(query, reply)
        return _finish(query, reply, self._start(query, reply))


def _finish(query: Rewritten, reply: Reply, answers: list[AnswerRule]) -> Outcome:
    """Apply `answers`, up to the first that has to ask something."""
    for n, answer in enumerate(answers):
        if not isinstance(answer, CnameAnswer):
            answer.apply(reply)
            continue
        place = answer.target(reply)
        if place is not None:
            return _follow(query, reply, answer, place, answers[n + 1 :])
    return reply


def _follow(
    query: Rewritten,
    reply: Reply,
    answer: CnameAnswer,
    place: tuple[int, bytes],
    rest: list[AnswerRule],
) -> Ask:
    at, target = place

    def then(found: Reply | None) -> Outcome:
        if found is not None:
            answer.graft(reply, at, target, found)
        return _finish(query, reply, rest)

    return Ask(query.asking(name=target), then)


def _change_batches(answers: list[AnswerRule], batches: Iterable[list[RR]]) -> Iterator[list[RR]]:
    """Change the further records of a zone transfer as they are sent."""
    for batch in batches:
        part = Reply(answer=batch)
        for answer in answers:
            if not isinstance(answer, CnameAnswer):
                answer.apply(part)
        yield part.answer


class RewriteByClient(Rewrite):
    """Rewrite with rules that look at who asks."""

    per_client = True


# --- how rules are written ----------------------------------------------------------------


class _Mistake(Exception):
    """A rule that cannot be read: the word it is about, and why."""

    def __init__(self, at: Token, text: str) -> None:
        self.at = at
        self.text = text


class _Reader:
    """Reads the rules of one server block."""

    def __init__(self, cx: Setup) -> None:
        self.cx = cx
        self.by_client = False

    def rule(self, directive: Directive) -> Rule:
        words = self.words(directive)
        if not words:
            raise _Mistake(directive.word, "no rule type specified for rewrite")
        first = words[0].text.lower()
        stop = first != "continue"
        if first in ("stop", "continue"):
            words = words[1:]
            if not words:
                raise _Mistake(directive.word, f"{first} rule must begin with a rule type")
        kind, args = words[0].text.lower(), words[1:]
        readers: dict[str, Callable[[bool, Token, list[Token]], Rule]] = {
            "name": self.name_rule, "type": self.type_rule, "class": self.class_rule,
            "edns0": self.edns_rule, "ttl": self.ttl_rule, "cname": self.cname_rule,
            "rcode": self.rcode_rule,
        }  # fmt: skip
        if kind == "answer":
            raise _Mistake(words[0], "response rewrites must begin with a name rule")
        if kind not in readers:
            raise _Mistake(
                words[0],
                f"invalid rule type '{words[0]}'" + _known(words[0], FIELDS),
            )
        return readers[kind](stop, words[0], args)

    def words(self, directive: Directive) -> list[Token]:
        """Return the words of a rule; those of a block are one rule, as if on one line."""
        words = list(directive.args)
        if directive.options is None:
            return words
        if len(words) > 1:
            raise _Mistake(directive.word, "a rule is either on the line or in the block, not both")
        for option in directive.options:
            words += (option.word, *option.args)
        return words

    def kind(self, token: Token, what: str) -> str:
        kind = token.text.lower()
        if kind not in KINDS:
            raise _Mistake(
                token,
                f"{what} rule supports only exact, prefix, suffix, substring, and regex name"
                f" matching, found '{token}'{nearest(kind, KINDS)}",
            )
        return kind

    def pattern(self, token: Token) -> Pattern:
        try:
            return compile_pattern(token.text)
        except BadPattern as e:
            raise _Mistake(token, f"invalid regex matching pattern: {e}") from None

    def groups(self, pattern: Pattern, to: Token) -> None:
        """Check that no more groups are used than there are."""
        used = [int(n) for n in re.findall(r"\{([0-9]{1,3})\}", to.text) if int(n) <= MAX_GROUP]
        if max(used, default=0) > pattern.groups:
            raise _Mistake(
                to,
                f"the rewrite regex pattern ({to}) uses more subexpressions than its"
                f" corresponding matching regex pattern ({pattern.text})",
            )

    # name

    def name_rule(self, stop: bool, at: Token, args: list[Token]) -> Rule:
        if len(args) < 2 or (len(args) == 2 and args[0].text.lower() in KINDS):
            raise _Mistake(at, "too few arguments for a name rule: FROM and TO are needed")
        kind = "exact"
        if len(args) > 2:
            kind = self.kind(args[0], "name")
            args = args[1:]
        given, to = args[0], args[1]
        undo, answers = self.answers(kind, args[2:])
        if kind == "regex":
            pattern = self.pattern(given)
            self.groups(pattern, to)
            return NameRule(
                stop, renaming(kind, given.text, _full(to.text), pattern), undo, answers
            )
        old, new = _full(given.text), _full(to.text)
        if kind == "exact":
            undo = True
            for token, text in ((given, old), (to, new)):
                try:
                    parse_name(text)
                except BadName as e:
                    raise _Mistake(token, f"not a name: {e}") from None
        if kind == "suffix" and undo:
            # The suffixes exchanged lead back further than what was asked for this once.
            back = map_text(renaming("suffix", new, old))
            answers = [OwnerAnswer(back), ValueAnswer(back), *answers]
            undo = False
        return NameRule(stop, renaming(kind, old, new), undo, answers)

    def answers(self, kind: str, words: list[Token]) -> tuple[bool, list[AnswerRule]]:
        """Read `answer (auto | (name|value FROM TO)) { [answer] (auto | ...) }`."""
        auto = named = False
        answers: list[AnswerRule] = []
        at = 0
        while at < len(words):
            if words[at].text == "answer":
                at += 1
                if at == len(words):
                    raise _Mistake(words[-1], f"type missing for answer rule for {kind} rule")
            elif at == 0:
                raise _Mistake(
                    words[0],
                    f"unexpected '{words[0]}' after a {kind} rule; only 'answer' may follow",
                )
            what = words[at]
            at += 1
            if what.text == "auto":
                auto = True
                continue
            if what.text not in ("name", "value"):
                raise _Mistake(
                    what,
                    f"invalid type '{what}' for answer rule for {kind} rule"
                    + _known(what, ("auto", "name", "value")),
                )
            if what.text == "name" and words[at : at + 1] and words[at].text == "auto" and (
                at + 1 == len(words) or words[at + 1].text == "answer"
            ):  # fmt: skip
                # CoreDNS's README writes `answer auto` this way.
                auto = True
                at += 1
                continue
            if len(words) - at < 2:
                raise _Mistake(
                    what, f"{what} answer rule for {kind} rule: 2 arguments required, FROM and TO"
                )
            pattern = self.pattern(words[at])
            self.groups(pattern, words[at + 1])
            change = map_text(renaming("regex", pattern.text, _full(words[at + 1].text), pattern))
            answers.append(OwnerAnswer(change) if what.text == "name" else ValueAnswer(change))
            named = named or what.text == "name"
            at += 2
        if auto and named:
            raise _Mistake(
                words[0], "auto name answer rule cannot be combined with explicit name answer rules"
            )
        return auto, answers

    # type, class

    def type_rule(self, stop: bool, at: Token, args: list[Token]) -> Rule:
        old, new = self.two(at, args, t.type_number, t.TYPES)
        return TypeRule(stop, old, new)

    def class_rule(self, stop: bool, at: Token, args: list[Token]) -> Rule:
        old, new = self.two(at, args, lambda text: t.CLASSES.get(text.upper()), t.CLASSES)
        return ClassRule(stop, old, new)

    def two(
        self,
        at: Token,
        args: list[Token],
        number: Callable[[str], int | None],
        known: Iterable[str],
    ) -> tuple[int, int]:
        if len(args) != 2:
            raise _Mistake(at, f"{at} rules must have exactly two arguments, FROM and TO")
        found = []
        for token in args:
            value = number(token.text)
            if value is None:
                lower = [name.lower() for name in known]
                raise _Mistake(token, f"invalid {at} '{token}'{nearest(token.text, lower)}")
            found.append(value)
        return found[0], found[1]

    # ttl, rcode, cname

    def matches(self, what: str, args: list[Token]) -> Callable[[str], bool]:
        """Read `[exact|prefix|suffix|substring|regex] STRING`."""
        kind = self.kind(args[0], what) if len(args) > 1 else "exact"
        given = args[-1]
        if kind == "regex":
            pattern = self.pattern(given)
            return lambda text: pattern.search(text) is not None
        change = renaming(kind, _full(given.text), "")
        return lambda text: change(text) is not None

    def ttl_rule(self, stop: bool, at: Token, args: list[Token]) -> Rule:
        if not 2 <= len(args) <= 3:
            raise _Mistake(
                at, "a ttl rule takes [exact|prefix|suffix|substring|regex] STRING"
                f" SECONDS|MIN-MAX, found {len(args)} arguments"
            )  # fmt: skip
        match = re.fullmatch(r"([0-9]*)(-?)([0-9]*)", args[-1].text)
        low = int(match[1] or 0) if match else 0
        high = low
        if match and match[2]:
            high = int(match[3]) if match[3] else MAX_TTL
        if not match or not (match[1] or match[3]) or not low <= high < 1 << 32:
            raise _Mistake(
                args[-1], f"invalid TTL '{args[-1]}' for a ttl rule; write 30, 30-300, -300 or 30-"
            )
        return ReplyRule(stop, self.matches("ttl", args[:-1]), TtlAnswer(low, high))

    def rcode_rule(self, stop: bool, at: Token, args: list[Token]) -> Rule:
        if not 3 <= len(args) <= 4:
            raise _Mistake(
                at, "a rcode rule takes [exact|prefix|suffix|substring|regex] STRING FROM TO,"
                f" found {len(args)} arguments"
            )  # fmt: skip
        old, new = (self.rcode(token) for token in args[-2:])
        return ReplyRule(stop, self.matches("rcode", args[:-2]), RcodeAnswer(old, new))

    def rcode(self, token: Token) -> int:
        if token.text.isdecimal() and int(token.text) <= 23:
            return int(token.text)
        number = RCODES.get(token.text.upper())
        if number is None:
            lower = [name.lower() for name in RCODES]
            raise _Mistake(
                token,
                f"invalid RCODE '{token}' for a rcode rule{nearest(token.text, lower)}",
            )
        return number

    def cname_rule(self, stop: bool, at: Token, args: list[Token]) -> Rule:
        if not 2 <= len(args) <= 3:
            raise _Mistake(
                at, "a cname rule takes [exact|prefix|suffix|substring|regex] FROM TO,"
                f" found {len(args)} arguments"
            )  # fmt: skip
        kind = self.kind(args[0], "cname") if len(args) == 3 else "exact"
        given, to = args[-2].text.lower(), args[-1].text.lower()
        if kind == "exact":
            given, to = _full(given), _full(to)
        pattern = self.pattern(args[-2]) if kind == "regex" else None
        change = renaming(kind, given, to, pattern)
        return ReplyRule(stop, lambda text: True, CnameAnswer(change))

    # edns0

    def edns_rule(self, stop: bool, at: Token, args: list[Token]) -> Rule:
        if len(args) < 2:
            raise _Mistake(at, "too few arguments for an EDNS0 rule: TYPE and ACTION are needed")
        kind, action = args[0].text.lower(), args[1].text.lower()
        if kind not in ("local", "nsid", "subnet"):
            raise _Mistake(
                args[0],
                f"invalid rule type '{args[0]}'" + _known(args[0], ("local", "nsid", "subnet")),
            )
        if action not in ACTIONS:
            raise _Mistake(args[1], f"invalid action: '{args[1]}'" + _known(args[1], ACTIONS))
        rest = args[2:]
        revert = action != "unset" and bool(rest) and rest[-1].text == "revert"
        if revert:
            rest = rest[:-1]
        takes = {"local": "CODE DATA", "nsid": "", "subnet": "V4-BITS V6-BITS"}[kind]
        if action == "unset":
            takes = "CODE" if kind == "local" else ""
        if len(rest) != len(takes.split()):
            raise _Mistake(
                at, f"edns0 {kind} {action} takes {takes or 'no arguments'}, found {len(rest)}"
            )
        code, content = {
            "local": self.local_option, "nsid": self.nsid_option, "subnet": self.subnet_option
        }[kind](rest)  # fmt: skip
        return EdnsRule(stop, action, code, content, revert)

    def local_option(self, rest: list[Token]) -> tuple[int, OptionContent]:
        code = self.number(rest[0], 65535, "an EDNS option code")
        if len(rest) == 1:
            return code, lambda query: b""
        text = rest[1].text
        if text.startswith("{") and text.endswith("}"):
            return code, self.variable(rest[1], text[1:-1])
        constant = text.encode()
        if text.startswith("0x"):
            try:
                constant = bytes.fromhex(text[2:])
            except ValueError:
                raise _Mistake(rest[1], f"'{text}' is not hexadecimal") from None
        return code, lambda query: constant

    def nsid_option(self, rest: list[Token]) -> tuple[int, OptionContent]:
        return NSID, lambda query: b""

    def subnet_option(self, rest: list[Token]) -> tuple[int, OptionContent]:
        if not rest:
            return SUBNET, lambda query: b""
        v4 = self.number(rest[0], 32, "an IPv4 bit mask length")
        v6 = self.number(rest[1], 128, "an IPv6 bit mask length")
        self.by_client = True
        return SUBNET, lambda query: subnet_of(query, v4, v6)

    def number(self, token: Token, high: int, what: str) -> int:
        try:
            value = int(token.text, 0)
        except ValueError:
            value = -1
        if not 0 <= value <= high:
            raise _Mistake(token, f"{what} is a number from 0 to {high}, found '{token}'")
        return value

    def variable(self, token: Token, name: str) -> OptionContent:
        port = pack("!H", self.cx.facts.port)
        variables: dict[str, OptionContent] = {
            "qname": lambda query: render_name(query.name).encode(),
            "qtype": lambda query: pack("!H", query.qtype),
            "client_ip": lambda query: client_address(query).packed,
            "client_port": lambda query: pack("!H", query.client[1]),
            "protocol": lambda query: b"udp" if query.proto == "udp" else b"tcp",
            "server_ip": self.server_ip(token) if name == "server_ip" else lambda query: None,
            "server_port": lambda query: port,
        }
        content = variables.get(name)
        if name not in ("qname", "qtype"):
            self.by_client = True
        if content is not None:
            return content
        if "/" not in name.strip("/"):
            raise _Mistake(token, f"unsupported variable name '{token}'{nearest(name, variables)}")

        # A label of the metadata that plugins leave: PLUGIN/NAME.
        def from_meta(query: Query) -> bytes | None:
            value = (query.meta or {}).get(name)
            return str(value).encode() if value else None

        return from_meta

    def server_ip(self, token: Token) -> OptionContent:
        """A plugin does not see which address was asked: it is known where the host has one of
        the client's family."""
        local: dict[int, list[bytes]] = {4: [], 16: []}
        for packed in self.cx.facts.local_addresses:
            if not ipaddress.ip_address(packed).is_link_local:
                local[len(packed)].append(packed)
        known = {size: only[0] for size, only in local.items() if len(only) == 1}
        if not known:
            self.cx.problems.warn(
                token, "{server_ip} is known only on a host with one address; this rule never fires"
            )
        return lambda query: known.get(len(client_address(query).packed))


def _full(text: str) -> str:
    """Return a name's text in lower case and with a final dot."""
    text = text.lower()
    return text if text.endswith(".") else text + "."


def _known(token: Token, words: Sequence[str]) -> str:
    """Return the nearest right word, or all of them."""
    return nearest(token.text, words) or f" (known: {', '.join(words)})"


def setup(directives: list[Directive], cx: Setup) -> list[Plugin]:
    """`rewrite [continue|stop] FIELD ...` or the same with a block; one plugin for all lines."""
    reader = _Reader(cx)
    rules = []
    for directive in directives:
        try:
            rules.append(reader.rule(directive))
        except _Mistake as mistake:
            cx.problems.error(mistake.at, mistake.text)
    return [RewriteByClient(rules) if reader.by_client else Rewrite(rules)]
