"""`workers N|auto`: how many processes answer.

Decides nothing else; they are server/workers.py's. The word counts for the whole program, so it
stands once in a Corefile, in any server block (site.py sees to that).
"""

from __future__ import annotations

from collections.abc import Callable

from kdns.corefile import Directive, Token
from kdns.plugins.plugin import Plugin
from kdns.plugins.setup import Setup

AUTO = "auto"
MAX_WORKERS = 64


class Workers(Plugin):
    """count -- 0: as many as there are cores to use; at -- where it says so"""

    word = "workers"

    def __init__(self, count: int, at: Token) -> None:
        self.count = count
        self.at = at
        # Why not all of them answer; app.py puts its workers' here.
        self.why_not: Callable[[], str] = str

    def not_ready(self) -> str:
        return self.why_not()


def setup(directives: list[Directive], cx: Setup) -> list[Plugin]:
    """`workers N|auto`"""
    directive = cx.once(directives)
    for option in directive.options or ():
        cx.unknown_option(option, ())
    if not cx.arg_count(directive, 1, 1):
        return []
    token = directive.args[0]
    if token.text == AUTO:
        return [Workers(0, directive.word)]
    if not token.text.isdecimal():
        cx.problems.error(token, f"'workers' takes a number or auto, found '{token}'")
        return []
    return [Workers(cx.integer(token, 1, MAX_WORKERS, "workers"), directive.word)]
