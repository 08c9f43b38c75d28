"""`any`: answers questions of type ANY with one small record (RFC 8482 s4.2)."""

from __future__ import annotations

from kdns.corefile import Directive
from kdns.dns import types as t
from kdns.dns.message import FOREVER, RR, Query, Reply
from kdns.plugins.plugin import Outcome, Plugin
from kdns.plugins.setup import Setup

TTL = 8482  # the RFC's number, as CoreDNS
HINFO = b"".join(bytes((len(part),)) + part for part in (b"ANY obsoleted", b"See RFC 8482"))


class Any(Plugin):
    word = "any"

    def on_query(self, query: Query) -> Outcome:
        if query.qtype != t.ANY:
            return None
        answer = [RR(query.name, t.HINFO, TTL, HINFO)]
        return Reply(answer=answer, flags=0, served_by="any", keep=FOREVER)


def setup(directives: list[Directive], cx: Setup) -> list[Plugin]:
    """`any`"""
    directive = cx.once(directives)
    cx.no_args(directive)
    for option in directive.options or ():
        cx.unknown_option(option, ())
    return [Any()]
