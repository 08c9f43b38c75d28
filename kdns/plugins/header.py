"""`header`: sets and clears header flags of queries going down and replies coming up.

Decides only AA, RA and RD, the three CoreDNS lets be changed. A query's RD shows in the
reply too, because CoreDNS copies it from the query that these rules have changed.
"""

from __future__ import annotations

from collections.abc import Sequence

from kdns.corefile import Directive, Option, nearest
from kdns.dns.message import AA, CLEAR_RD, RA, RD, SET_RD, Query, Reply
from kdns.plugins.plugin import Outcome, Plugin
from kdns.plugins.setup import Setup

FLAGS = {"aa": AA, "ra": RA, "rd": RD}
SELECTORS = ("query", "response")
ACTIONS = ("set", "clear")


class FlagRules:
    """The sum of all rules for one direction: the last word on each flag."""

    __slots__ = ("clear", "set")

    def __init__(self, rules: Sequence[tuple[str, int]] = ()) -> None:
        self.set = self.clear = 0
        for action, flag in rules:
            self.set = self.set | flag if action == "set" else self.set & ~flag
            self.clear = self.clear | flag if action == "clear" else self.clear & ~flag

    def __bool__(self) -> bool:
        return bool(self.set or self.clear)

    def apply(self, flags: int) -> int:
        return flags & ~self.clear | self.set


class Header(Plugin):
    word = "header"

    def __init__(self, queries: FlagRules, responses: FlagRules) -> None:
        self._queries = queries
        self._responses = responses
        # RD of a reply is said apart from its other flags (Reply.flags).
        rd = FlagRules([*_rd_rules(queries), *_rd_rules(responses)])
        self._set = responses.set & ~RD | (SET_RD if rd.set else 0)
        self._set |= CLEAR_RD if rd.clear else 0
        self._clear = responses.clear & ~RD

    def on_query(self, query: Query) -> Outcome:
        if not self._queries:
            return None
        changed = query.asking()
        changed.flags = self._queries.apply(query.flags)
        return changed

    def on_reply(self, query: Query, reply: Reply) -> Reply:
        if reply.is_written:
            reply.flags = reply.flags & ~self._clear | self._set
        return reply


def _rd_rules(rules: FlagRules) -> list[tuple[str, int]]:
    return [(a, RD) for a, flags in (("set", rules.set), ("clear", rules.clear)) if flags & RD]


def setup(directives: list[Directive], cx: Setup) -> list[Plugin]:
    """`header { query|response set|clear aa|ra|rd... }`"""
    directive = cx.once(directives)
    cx.no_args(directive)
    rules: dict[str, list[tuple[str, int]]] = {"query": [], "response": []}
    for option in directive.options or ():
        selector = option.name.lower()
        if selector not in SELECTORS:
            cx.unknown_option(option, SELECTORS)
        else:
            rules[selector] += _rules(option, cx)
    if not directive.options:
        cx.problems.error(directive.word, "'header' needs a rule, such as { response set ra }")
    return [Header(FlagRules(rules["query"]), FlagRules(rules["response"]))]


def _rules(option: Option, cx: Setup) -> list[tuple[str, int]]:
    if not cx.arg_count(option, 2):
        return []
    action = option.args[0].text.lower()
    if action not in ACTIONS:
        cx.problems.error(
            option.args[0],
            f"unknown flag action '{option.args[0]}', it must be 'set' or 'clear'"
            + nearest(action, ACTIONS),
        )
        return []
    found = []
    for token in option.args[1:]:
        flag = FLAGS.get(token.text.lower())
        if flag is None:
            cx.problems.error(token, f"unknown flag '{token}' (known: {', '.join(FLAGS)})")
        else:
            found.append((action, flag))
    return found
