"""`reload`: how often the Corefile is looked at.

Decides the pauses only; reading, comparing and taking over is app.py's business.
"""

from __future__ import annotations

import random

from kdns.corefile import Directive, Token
from kdns.plugins.plugin import Plugin
from kdns.plugins.setup import Setup

INTERVAL, MIN_INTERVAL = 30.0, 2.0
JITTER, MIN_JITTER = 15.0, 1.0


class Reload(Plugin):
    """interval, jitter -- seconds; a pause lies within half a jitter of the interval, so
    that the replicas of a Deployment do not all reload at once."""

    word = "reload"

    def __init__(self, interval: float, jitter: float, random: random.Random) -> None:
        self.interval = interval
        self.jitter = min(jitter, interval / 2)
        self._random = random

    def pause(self) -> float:
        """Return the seconds to wait before the next look."""
        return self.interval + self.jitter * (self._random.random() - 0.5)


def setup(directives: list[Directive], cx: Setup) -> list[Plugin]:
    """`reload [INTERVAL] [JITTER]`"""
    directive = directives[0]
    for extra in directives[1:]:
        cx.problems.warn(
            extra.word, f"'reload' counts once; the one in line {directive.word.line} is used"
        )
    for option in directive.options or ():
        cx.unknown_option(option, ())
    interval, jitter = INTERVAL, JITTER
    if cx.arg_count(directive, 0, 2):
        args = directive.args
        if args:
            interval = _seconds(args[0], INTERVAL, cx)
            if interval < MIN_INTERVAL:
                cx.problems.error(args[0], "interval value must be greater or equal to 2s")
        if len(args) > 1:
            jitter = _seconds(args[1], JITTER, cx)
            if 0 < jitter < MIN_JITTER:
                cx.problems.error(args[1], "jitter value must be 0 or greater or equal to 1s")
    return [Reload(interval, jitter, cx.random)]


def _seconds(token: Token, default: float, cx: Setup) -> float:
    """Return a duration; the default after one that is none, so that it is said once."""
    before = len(cx.problems.found)
    seconds = cx.duration(token)
    return seconds if len(cx.problems.found) == before else default
