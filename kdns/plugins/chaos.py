"""`chaos`: says in class CH what runs here: version.bind, authors.bind, hostname.bind.

Decides what each of these names answers. That a listener with this plugin lets questions of
class CH through is the router's business.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from kdns import __version__
from kdns.corefile import Directive
from kdns.dns import types as t
from kdns.dns.message import FOREVER, RR, Query, Reply
from kdns.dns.name import parse_name
from kdns.plugins.plugin import Outcome, Plugin, WatchFile, Work
from kdns.plugins.setup import Setup

VERSION = f"kdns-{__version__}"
AUTHORS = ("The kdns authors",)
MAX_STRING = 255  # RFC 1035 s3.3: a character-string has one length octet
HOSTNAME_FILE = "/proc/sys/kernel/hostname"  # Linux; elsewhere it is missing
NO_HOSTNAME = "localhost"

VERSION_NAMES = frozenset(map(parse_name, ("version.bind.", "version.server.")))
HOSTNAME_NAMES = frozenset(map(parse_name, ("hostname.bind.", "id.server.")))
AUTHORS_NAME = parse_name("authors.bind.")


def txt(text: str) -> bytes:
    """Return the rdata of a TXT record with one string, cut at 255 octets."""
    octets = text.encode()[:MAX_STRING]
    return bytes((len(octets),)) + octets


class Chaos(Plugin):
    word = "chaos"

    def __init__(self, rng: random.Random, version: str, authors: Sequence[str]) -> None:
        self._random = rng
        self._version = txt(version)
        self._authors = [txt(author) for author in authors]
        self._hostname = txt(NO_HOSTNAME)

    def on_query(self, query: Query) -> Outcome:
        if query.qclass != t.CH or query.qtype != t.TXT:
            return None
        key = query.key
        if key in VERSION_NAMES:
            strings, keep = [self._version], FOREVER
        elif key in HOSTNAME_NAMES:
            strings, keep = [self._hostname], FOREVER
        elif key == AUTHORS_NAME:
            # Another order for each asker, so that nobody comes first.
            strings = self._random.sample(self._authors, len(self._authors))
            keep = FOREVER if len(strings) < 2 else 0.0
        else:
            return None
        answer = [RR(query.name, t.TXT, 0, rdata, t.CH) for rdata in strings]
        return Reply(answer=answer, flags=0, served_by="chaos", keep=keep)

    def work(self) -> Sequence[Work]:
        return (WatchFile(HOSTNAME_FILE, 0, self._load_hostname),)

    def _load_hostname(self, content: bytes | None, error: str) -> bool:
        if content is not None:
            self._hostname = txt(content.decode("utf-8", "replace").strip())
        return True


def setup(directives: list[Directive], cx: Setup) -> list[Plugin]:
    """`chaos [VERSION] [AUTHORS...]`"""
    directive = cx.once(directives)
    for option in directive.options or ():
        cx.unknown_option(option, ())
    words = [token.text for token in directive.args]
    version = words[0] if words else VERSION
    return [Chaos(cx.random, version, sorted(set(words[1:])) or AUTHORS)]
