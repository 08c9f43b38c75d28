"""Shared test vocabulary: build plugins from Corefile text, put questions to them."""

from __future__ import annotations

import importlib
import random
import shlex
from collections.abc import Callable, Sequence

from kdns.corefile import Directive, Option, Problems, Token
from kdns.dns import types as t
from kdns.dns.message import RR, Edns, Query, Reply, make_query
from kdns.dns.name import ROOT, parse_name
from kdns.metrics import Metrics
from kdns.plugins import ORDER
from kdns.plugins.chain import Chain, Result, Router
from kdns.plugins.plugin import Outcome, Plugin, ServerFacts
from kdns.plugins.setup import Setup


class FakeClock:
    """Monotonic seconds that only move when told to."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def make_setup(zones: Sequence[str] = (".",), clock: Callable[[], float] | None = None) -> Setup:
    return Setup(
        Problems(),
        ServerFacts(tuple(zones), "dns://:53", "."),
        Metrics(),
        clock or FakeClock(),
        random.Random(1),
    )


def directives(text: str) -> list[Directive]:
    """Parse directives of one server block; a stand-in for the Corefile parser that knows
    no variables, snippets or imports."""
    found: list[Directive] = []
    options: list[Option] | None = None
    head: list[Token] = []
    for number, line in enumerate(text.strip().splitlines(), 1):
        words = [Token(w, "Corefile", number) for w in shlex.split(line, comments=True)]
        if not words:
            continue
        if words[-1].text == "{" and options is None:
            head, options = words[:-1], []
        elif words[0].text == "}" and options is not None:
            found.append(Directive(head[0], tuple(head[1:]), tuple(options)))
            options = None
        elif options is not None:
            options.append(Option(words[0], tuple(words[1:])))
        else:
            found.append(Directive(words[0], tuple(words[1:])))
    return found


def build(text: str, cx: Setup | None = None) -> list[Plugin]:
    """Build the plugins of a server block's text, in order of execution."""
    cx = cx or make_setup()
    plugins: list[Plugin] = []
    lines = directives(text)
    for word, module in ORDER.items():
        mine = [d for d in lines if d.name == word]
        if mine:
            setup = importlib.import_module(f"kdns.plugins.{module}").setup
            plugins += setup(mine, cx)
    return plugins


def errors_of(text: str, zones: Sequence[str] = (".",)) -> list[str]:
    """Return what setup finds wrong with a server block's text."""
    cx = make_setup(zones)
    build(text, cx)
    return [str(p) for p in cx.problems.found]


class Stub(Plugin):
    """A last plugin that answers what a table says: {(name, type): outcome or function}."""

    word = "stub"

    def __init__(self, table: dict[tuple[str, str], object] | None = None) -> None:
        self.table = table or {}
        self.asked: list[Query] = []

    def on_query(self, query: Query) -> Outcome:
        self.asked.append(query)
        from kdns.dns.name import render_name

        found = self.table.get((render_name(query.key), t.type_name(query.qtype)))
        if callable(found):
            found = found(query)
        if found is None:
            return Reply(t.NXDOMAIN, flags=0)
        return found.copy() if isinstance(found, Reply) else found  # type: ignore[return-value]


def question(
    name: str,
    qtype: str = "A",
    *,
    client: str = "127.0.0.1",
    proto: str = "udp",
    edns: Edns | None = None,
    rd: bool = True,
    qclass: str = "IN",
    received: float = 1000.0,
) -> Query:
    number = t.type_number(qtype)
    assert number is not None
    return make_query(
        parse_name(name), number, qclass=t.CLASSES[qclass], client=(client, 40000), proto=proto,
        edns=edns, rd=rd, id=4711, received=received,
    )  # fmt: skip


def run(plugins: Sequence[Plugin], query: Query) -> Result:
    """Put one question to a chain of these plugins that listens for every name."""
    return Router({ROOT: Chain(plugins)}, any_class=True).resolve(query)


def answer(plugins: Sequence[Plugin], query: Query) -> Reply:
    """As run, for questions that need no upstream."""
    result = run(plugins, query)
    assert isinstance(result, Reply), result
    return result


def a(name: str, address: str, ttl: int = 300) -> RR:
    import ipaddress

    packed = ipaddress.ip_address(address).packed
    return RR(parse_name(name), t.A if len(packed) == 4 else t.AAAA, ttl, packed)


def cname(name: str, target: str, ttl: int = 300) -> RR:
    return RR(parse_name(name), t.CNAME, ttl, parse_name(target))
