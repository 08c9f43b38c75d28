"""`explain on|off`: whether answers of a server block say why they are what they are (RFC 8914).

Decides nothing else. On where the word is not there. The plugins that answer look at it when
they are linked; what they say is theirs.
"""

from __future__ import annotations

from collections.abc import Sequence

from kdns.corefile import Directive, nearest
from kdns.plugins.plugin import Plugin
from kdns.plugins.setup import Setup

STATES = ("on", "off")


class Explain(Plugin):
    word = "explain"

    def __init__(self, explains: bool) -> None:
        self.explains = explains


def setup(directives: Sequence[Directive], cx: Setup) -> list[Plugin]:
    """`explain on|off`, once in a server block."""
    directive = cx.once(directives)
    for option in directive.options or ():
        cx.unknown_option(option, ())
    if not cx.arg_count(directive, 1, 1):
        return []
    state = directive.args[0]
    if state.text not in STATES:
        cx.problems.error(
            state, f"'explain' takes on or off, found '{state}'" + nearest(state.text, STATES)
        )
        return []
    return [Explain(state.text == "on")]
