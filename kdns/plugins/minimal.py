"""`minimal`: leaves authority and additional out of answers that do not need them.

Decides that by the kind of answer: denials and errors need their SOA, referrals their NS
and glue, transfers everything.
"""

from __future__ import annotations

from kdns.corefile import Directive
from kdns.dns import types as t
from kdns.dns.message import OPCODE, Query, Reply
from kdns.plugins.plugin import Plugin
from kdns.plugins.setup import Setup

WHOLE = frozenset((t.AXFR, t.IXFR))


class Minimal(Plugin):
    word = "minimal"

    def on_reply(self, query: Query, reply: Reply) -> Reply:
        if reply.rcode or query.qtype in WHOLE or query.flags & OPCODE:
            return reply
        if not reply.answer and any(rr.type in (t.SOA, t.NS) for rr in reply.authority):
            return reply  # NODATA or a referral
        reply.authority = []
        reply.additional = []
        reply.edns = None
        return reply


def setup(directives: list[Directive], cx: Setup) -> list[Plugin]:
    """`minimal`"""
    directive = cx.once(directives)
    cx.no_args(directive)
    for option in directive.options or ():
        cx.unknown_option(option, ())
    return [Minimal()]
