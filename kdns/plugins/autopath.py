"""`autopath`: goes through a client's search path for it, so that one query is enough.

Decides which queries those are and which reply wins (reference 1.13). Which search path a
client has is the `kubernetes` plugin's to say, or a file's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from kdns.corefile import Directive
from kdns.dns import types as t
from kdns.dns.message import RR, Query, Reply
from kdns.dns.name import MAX_NAME, ROOT, BadName, is_subdomain, parse_name
from kdns.metrics import Cell
from kdns.plugins import ORDER
from kdns.plugins.plugin import Ask, Outcome, Plugin, WatchFile, Work
from kdns.plugins.setup import Setup

# Elements of one search path that are asked for. Resolvers took 6 for long; glibc since 2.26
# has no limit, but each costs a question to the plugins below.
MAX_SEARCH = 32


@runtime_checkable
class SearchPaths(Protocol):
    """A plugin that knows its clients' search paths."""

    def autopath_search(self, client: str, key: bytes) -> list[bytes] | None:
        """Return the search path, wire names, the root last, of the client with this address
        that asks for `key`; None if there is none for it."""


class Autopath(Plugin):
    word = "autopath"
    per_client = True

    def __init__(self, zones: Sequence[bytes], log: logging.Logger, success: Cell) -> None:
        self._zones = tuple(zones)
        self._log = log
        self._success = success

    def search(self, query: Query) -> list[bytes] | None:
        """Return the search path of who asks, or None."""
        raise NotImplementedError

    def on_query(self, query: Query) -> Outcome:
        key = query.key
        if not any(is_subdomain(key, zone) for zone in self._zones):
            return None
        search = self.search(query)
        # The first element itself is not a name that was completed. (CoreDNS fails on it.)
        if not search or key == search[0] or not is_subdomain(key, search[0]):
            return None
        base = query.name[: len(key) - len(search[0])]
        names = [base + suffix for suffix in search[:MAX_SEARCH]]
        return self._ask(query, [name for name in names if len(name) <= MAX_NAME], 0, None)

    def _ask(self, query: Query, names: list[bytes], at: int, first: Reply | None) -> Ask:
        def then(reply: Reply | None) -> Outcome:
            assert reply is not None  # asked without a time limit
            if reply.error is not None:
                return reply
            if reply.rcode != t.NXDOMAIN and reply.is_written:
                reply.count(self._success)
                return _lead_to(query, reply)
            if at + 1 < len(names):
                return self._ask(query, names, at + 1, first or reply)
            # The client goes on by itself, and so has to see the reply to its own question.
            return first or reply

        return Ask(query.asking(name=names[at]), then, below=True)


def _lead_to(query: Query, reply: Reply) -> Reply:
    """Put a CNAME from what was asked for to what was found in front of the answer."""
    for rr in reply.answer:
        if rr.name.lower() != query.key:
            reply.answer.insert(0, RR(query.name, t.CNAME, rr.ttl, rr.name))
            break
    return reply


class AutopathOfPlugin(Autopath):
    """Search paths from another plugin of the server block: `autopath @kubernetes`."""

    def __init__(
        self, zones: Sequence[bytes], log: logging.Logger, success: Cell, source: str
    ) -> None:
        super().__init__(zones, log, success)
        self._source = source
        self._paths: SearchPaths | None = None

    def link(self, chain: Sequence[Plugin]) -> None:
        for plugin in chain:
            if plugin.word == self._source and isinstance(plugin, SearchPaths):
                self._paths = plugin
                return
        self._log.warning(
            "no '%s' in this server block to take search paths from; no query is completed",
            self._source,
        )

    def search(self, query: Query) -> list[bytes] | None:
        paths = self._paths
        return None if paths is None else paths.autopath_search(query.client[0], query.key)


class AutopathOfFile(Autopath):
    """One search path for all clients, from a file like resolv.conf, read at start."""

    def __init__(
        self, zones: Sequence[bytes], log: logging.Logger, success: Cell, path: str
    ) -> None:
        super().__init__(zones, log, success)
        self._path = path
        self._search: list[bytes] = []

    def search(self, query: Query) -> list[bytes] | None:
        return self._search

    def work(self) -> Sequence[Work]:
        return (WatchFile(self._path, 0, self._load),)

    def _load(self, content: bytes | None, error: str) -> bool:
        if content is None:
            self._log.error("failed to read %s: %s; no query is completed", self._path, error)
            return False
        search = []
        for word in parse_search(content.decode("utf-8", "replace")):
            try:
                search.append(parse_name(word).lower())
            except BadName as e:
                self._log.error("%s: 'search': %s; left out", self._path, e)
        if not search:
            self._log.warning("%s has no 'search' line; no query is completed", self._path)
            return False
        self._search = [*search, ROOT]
        return True


def parse_search(text: str) -> list[str]:
    """Return the search path of a resolv.conf: the last `search` or `domain` line counts
    (resolv.conf(5))."""
    search: list[str] = []
    for line in text.splitlines():
        words = line.split()
        if words[:1] == ["search"]:
            search = words[1:]
        elif words[:1] == ["domain"]:
            search = words[1:2]
    return search


def setup(directives: list[Directive], cx: Setup) -> list[Plugin]:
    """`autopath [ZONE...] RESOLV-CONF|@PLUGIN`"""
    directive = cx.once(directives)
    for option in directive.options or ():
        cx.unknown_option(option, ())
    if not directive.args:
        cx.problems.error(
            directive.word,
            "no resolv-conf specified; 'autopath' takes the path of one, or '@kubernetes'",
        )
        return []
    *zone_words, source = directive.args
    zones = cx.zones(zone_words)
    log = cx.logger("autopath")
    success = cx.metrics.counter(
        "coredns_autopath_success_total", "Counter of requests that did autopath.", ("server",)
    ).labels(cx.facts.label)
    if not source.text.startswith("@"):
        return [AutopathOfFile(zones, log, success, cx.path(source.text))]
    name = source.text[1:]
    if name != "kubernetes":
        known = name in ORDER
        cx.problems.error(
            source,
            f"plugin '{name}' {'has no search paths' if known else 'is not known'};"
            " write '@kubernetes' or the path of a resolv.conf",
        )
    return [AutopathOfPlugin(zones, log, success, name)]
