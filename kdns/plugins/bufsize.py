"""`bufsize`: lowers the UDP payload size a query announces, so that answers are not
fragmented (DNS flag day 2020)."""

from __future__ import annotations

from kdns.corefile import Directive
from kdns.dns.message import MIN_UDP, Edns, Query
from kdns.plugins.plugin import Outcome, Plugin
from kdns.plugins.setup import Setup

DEFAULT = 1232
LOWEST, HIGHEST = MIN_UDP, 4096


class Bufsize(Plugin):
    word = "bufsize"

    def __init__(self, size: int = DEFAULT) -> None:
        self._size = size

    def on_query(self, query: Query) -> Outcome:
        edns = query.edns
        size = self._size
        if edns is not None and edns.size > size:
            # In place: the lower size must also hold where the reply is rendered, which is
            # done for the query as it came.
            query.edns = Edns(size, edns.do, edns.version, edns.options)
            if query.proto == "udp":
                query.limit = min(query.limit, size)
        return None


def setup(directives: list[Directive], cx: Setup) -> list[Plugin]:
    """`bufsize [SIZE]`"""
    directive = cx.once(directives)
    for option in directive.options or ():
        cx.unknown_option(option, ())
    if not cx.arg_count(directive, 0, 1) or not directive.args:
        return [Bufsize()]
    return [Bufsize(cx.integer(directive.args[0], LOWEST, HIGHEST, "bufsize"))]
