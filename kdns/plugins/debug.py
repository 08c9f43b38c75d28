"""`debug`: a flag on the server block. What it switches on (debug lines in the log) is
app.py's business."""

from __future__ import annotations

from kdns.corefile import Directive
from kdns.plugins.plugin import Plugin
from kdns.plugins.setup import Setup


class Debug(Plugin):
    word = "debug"


def setup(directives: list[Directive], cx: Setup) -> list[Plugin]:
    """`debug`"""
    for directive in directives:
        cx.no_args(directive)
        for option in directive.options or ():
            cx.unknown_option(option, ())
    return [Debug()]
