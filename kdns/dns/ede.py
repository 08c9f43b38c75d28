"""Extended DNS Errors (RFC 8914): why an answer is what it is, in the OPT record of a reply.

Decides the codes' names and how an error is written into an EDNS option. Which one is true of
an answer is said by whoever made the answer; that it is left out where there is no room is
dns/message.py's.
"""

from __future__ import annotations

from typing import NamedTuple

OPTION = 15  # the EDNS option's code, RFC 8914 s2
MAX_TEXT = 200  # octets of UTF-8, so that no answer grows by more than 206

# Info-codes of RFC 8914 s4 that kdns gives out.
OTHER = 0
STALE_ANSWER = 3
CACHED_ERROR = 13
NOT_READY = 14
BLOCKED = 15
FILTERED = 17
PROHIBITED = 18
STALE_NXDOMAIN = 19
NOT_AUTHORITATIVE = 20
NOT_SUPPORTED = 21
NO_REACHABLE_AUTHORITY = 22
NETWORK_ERROR = 23
INVALID_DATA = 24


class Ede(NamedTuple):
    """One extended error. text -- for people; may be empty"""

    code: int
    text: str = ""


def render_ede(ede: Ede) -> tuple[int, bytes]:
    """Return the EDNS option (code, data); a text too long is cut, never within a character."""
    text = ede.text.encode("utf-8", "replace")
    if len(text) > MAX_TEXT:
        text = text[: MAX_TEXT - 3].decode("utf-8", "ignore").encode() + b"..."
    return OPTION, ede.code.to_bytes(2, "big") + text
