"""`errors`: logs why a query failed.

Decides which failures are said one by one and which are summed up (`consolidate`). Why a
query failed is Reply.error, set by whoever failed; this plugin changes no reply. The trace
of a bug is always logged, by whoever catches it, so `stacktrace` has nothing to switch on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from kdns.corefile import Directive, Option, Token, nearest
from kdns.dns.goregexp import BadPattern, Pattern, compile_pattern
from kdns.dns.message import Query, Reply
from kdns.dns.name import render_name
from kdns.dns.types import type_name
from kdns.plugins.plugin import Every, Plugin, Work
from kdns.plugins.setup import Setup

TICKS = (0.1, 1.0)  # shortest and longest seconds between two looks for due summaries

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
SHOW_FIRST = "show_first"
OPTIONS = ("stacktrace", "consolidate")


def render_duration(seconds: float) -> str:
    """Return seconds as Go prints them: 500ms, 30s, 5m0s, 1h0m0s."""
    if seconds < 1:
        return f"{seconds * 1000:g}ms" if seconds else "0s"
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    text = f"{rest:g}s"
    if hours or minutes:
        text = f"{minutes}m{text}"
    return f"{hours}h{text}" if hours else text


class Consolidation:
    """Errors like `pattern`, counted from the first one on for `period` seconds."""

    def __init__(self, period: float, pattern: Pattern, level: int, show_first: bool) -> None:
        self.period = period
        self.pattern = pattern
        self.level = level
        self.show_first = show_first
        self.seen = 0
        self.since = 0.0

    def take(self, now: float) -> bool:
        """Count one error; return True if it shall be logged by itself all the same."""
        self.seen += 1
        if self.seen > 1:
            return False
        self.since = now
        return self.show_first

    def flush(self, now: float) -> str | None:
        """Return the summary once the period is over, if there is anything left to say."""
        if not self.seen or now - self.since < self.period:
            return None
        seen, self.seen = self.seen, 0
        if seen == 1 and self.show_first:
            return None
        period = render_duration(self.period)
        return f"{seen} errors like '{self.pattern.text}' occurred in last {period}"


class Errors(Plugin):
    word = "errors"

    def __init__(
        self,
        log: logging.Logger,
        clock: Callable[[], float],
        consolidations: Sequence[Consolidation] = (),
    ) -> None:
        self._log = log
        self._clock = clock
        self._consolidations = tuple(consolidations)

    def heeds(self, zone: bytes) -> bool:
        return False

    def on_reply(self, query: Query, reply: Reply) -> Reply:
        error = reply.error
        if error is None:
            return reply
        line = f"{reply.rcode} {render_name(query.key)} {type_name(query.qtype)}: {error}"
        self._report(error, line)
        if reply.keep:
            repeats = reply.on_repeat = reply.on_repeat or []
            repeats.append(lambda client, qid, seconds: self._report(error, line))
        return reply

    def _report(self, error: str, line: str) -> None:
        for group in self._consolidations:
            if group.pattern.search(error) is not None:
                if group.take(self._clock()):
                    self._log.log(group.level, line)
                return
        self._log.error(line)

    def work(self) -> Sequence[Work]:
        if not self._consolidations:
            return ()
        shortest, longest = TICKS
        period = min(c.period for c in self._consolidations)
        return (Every(min(max(period, shortest), longest), self._tick),)

    def _tick(self, now: float) -> None:
        for group in self._consolidations:
            summary = group.flush(now)
            if summary is not None:
                self._log.log(group.level, summary)


def setup(directives: list[Directive], cx: Setup) -> list[Plugin]:
    """`errors [stdout] { stacktrace; consolidate DURATION REGEXP [LEVEL] [show_first] }`"""
    directive = cx.once(directives)
    if cx.arg_count(directive, 0, 1) and directive.args and directive.args[0].text != "stdout":
        cx.problems.error(
            directive.args[0],
            f"invalid log file: {directive.args[0]}; errors go to standard output, write only"
            " 'errors'",
        )
    consolidations = []
    for option in directive.options or ():
        match option.name:
            case "stacktrace":
                cx.no_args(option)
            case "consolidate":
                consolidation = _consolidate(option, cx)
                if consolidation is not None:
                    consolidations.append(consolidation)
            case _:
                cx.unknown_option(option, OPTIONS)
    return [Errors(cx.logger("errors"), cx.clock, consolidations)]


def _consolidate(option: Option, cx: Setup) -> Consolidation | None:
    if not cx.arg_count(option, 2, 4):
        return None
    period = cx.duration(option.args[0])
    pattern = _pattern(option.args[1], cx)
    level, show_first = None, False
    for token in option.args[2:]:
        if token.text == SHOW_FIRST:
            show_first = True
        elif token.text not in LEVELS:
            cx.problems.error(
                token,
                f"unknown option in consolidate: {token}"
                + (nearest(token.text, [*LEVELS, SHOW_FIRST]) or f" (levels: {', '.join(LEVELS)})"),
            )
        elif level is not None:
            cx.problems.error(token, f"consolidate takes one log level, found another: {token}")
        elif show_first:
            cx.problems.error(token, f"the log level must stand before show_first: {token}")
        else:
            level = LEVELS[token.text]
    if pattern is None:
        return None
    return Consolidation(period, pattern, level or logging.ERROR, show_first)


def _pattern(token: Token, cx: Setup) -> Pattern | None:
    try:
        return compile_pattern(token.text)
    except BadPattern as e:
        cx.problems.error(token, f"'{token}' is not a regular expression: {e}")
        return None
