"""Questions that ask for reasons, and the reasons in answers (RFC 8914), as tests write them: code
and text in one line, "" for none."""

from __future__ import annotations

import re
from typing import Any

import dns.edns
import dns.message
from support import question

from kdns.dns.message import Edns, Query, Reply

EDNS = Edns(1232)


def asking(name: str = "www.example.com.", qtype: str = "A", **more: Any) -> Query:
    """Return a question of a client that hears reasons."""
    return question(name, qtype, edns=EDNS, **more)


def reason(reply: Reply) -> str:
    """Return the reason that a reply carries."""
    return f"{reply.ede.code} {reply.ede.text}" if reply.ede is not None else ""


def without_times(text: str) -> str:
    """Return a reason with seconds that were measured made N.N."""
    return re.sub(r"\d+\.\d s", "N.N s", text)


def reason_on_the_wire(message: dns.message.Message) -> str:
    """Return the one reason of a message, as others read it."""
    found = [o for o in message.options if isinstance(o, dns.edns.EDEOption)]
    assert len(found) < 2
    return f"{int(found[0].code)} {found[0].text}" if found else ""
