"""A Corefile made into plugins and places to listen at; nothing is opened yet.

Decides which plugins stand behind which place. Grammar is corefile.py's, options are the
plugins', sockets and tasks are app.py's.
"""

from __future__ import annotations

import importlib
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from kdns.corefile import Corefile, Key, Problems, ServerBlock, Token, parse_corefile
from kdns.corefile_tokens import read_text
from kdns.dns.message import Query, Reply
from kdns.dns.name import BadName, parse_name
from kdns.errors import ConfigError, Problem
from kdns.metrics import Metrics
from kdns.plugins import ORDER, bind
from kdns.plugins.chain import Chain, Router
from kdns.plugins.plugin import Feed, Plugin, ServerFacts
from kdns.plugins.setup import Setup
from kdns.plugins.workers import Workers
from kdns.registry.spec import Spec
from kdns.server import files
from kdns.server.addresses import local_addresses, resolve_binds
from kdns.server.listen import Place

# Classes other than IN reach the chains of a listener only with one of these (CoreDNS).
ANY_CLASS = frozenset(("chaos", "forward"))


@dataclass(slots=True)
class Block:
    """One server block with its plugins."""

    keys: tuple[Key, ...]
    addresses: tuple[str, ...]
    plugins: list[Plugin]
    chain: Chain
    facts: ServerFacts

    def find(self, word: str) -> Plugin | None:
        """Return the first plugin of a word."""
        return next((p for p in self.plugins if p.word == word), None)


@dataclass(slots=True)
class Site:
    """Everything one Corefile asks for."""

    corefile: Corefile
    blocks: list[Block]
    routers: dict[Place, Router]
    text: str = ""
    warnings: list[Problem] = field(default_factory=list)

    def plugins(self) -> list[Plugin]:
        return [p for block in self.blocks for p in block.plugins]

    def registries(self) -> list[Spec]:
        """Return what the plugins read, in their order."""
        work = [item for plugin in self.plugins() for item in plugin.work()]
        return list(dict.fromkeys(item.source for item in work if isinstance(item, Feed)))

    def workers(self) -> Workers | None:
        """Return the `workers` plugin."""
        found = [p for p in self.plugins() if isinstance(p, Workers)]
        return found[0] if found else None

    def tls_of(self, place: Place) -> Plugin | None:
        """Return the `tls` plugin of the blocks at a place."""
        for block in self.blocks:
            if any(p == place for p in places_of(block)):
                found = block.find("tls")
                if found is not None:
                    return found
        return None


def read_corefile(
    path: str | None, text: str | None, default_port: int, environ: Mapping[str, str]
) -> tuple[Corefile, Problems]:
    """Return the parsed Corefile and all that is wrong with its grammar.

    Raises ConfigError where the file itself cannot be read.
    """
    text = corefile_text(path, text)
    return parse_corefile(text, file=path or "Corefile", environ=environ, default_port=default_port)


def corefile_text(path: str | None, text: str | None) -> str:
    """Return `text`, or what the file says. Raises ConfigError."""
    if text is not None:
        return text
    assert path is not None
    try:
        return read_text(path)
    except OSError as e:
        raise ConfigError([Problem(path, 0, e.strerror or str(e))]) from None


def build_site(
    corefile: Corefile, problems: Problems, metrics: Metrics, host_search: tuple[bytes, ...] = ()
) -> Site:
    """Return the site. Raises ConfigError with everything that is wrong at once."""
    blocks = [_build_block(block, problems, metrics, host_search) for block in corefile.blocks]
    routers = _routers(blocks, problems, metrics)
    everyone = [plugin for block in blocks for plugin in block.plugins]
    for plugin in everyone:
        if plugin.word == "kdns_log":
            plugin.link(everyone)  # the registry may be another block's
    _once_in_all([p for p in everyone if isinstance(p, Workers)], problems)
    if problems.errors:
        raise ConfigError(problems.found)
    warnings = sorted(problems.found, key=lambda p: (p.file, p.line))
    return Site(corefile, blocks, routers, warnings=warnings)


def _once_in_all(found: Sequence[Workers], problems: Problems) -> None:
    for extra in found[1:]:
        problems.error(
            extra.at,
            "'workers' counts for all server blocks and is written once; the first is in line"
            f" {found[0].at.line}",
        )


def _build_block(
    block: ServerBlock, problems: Problems, metrics: Metrics, host_search: tuple[bytes, ...]
) -> Block:
    key = block.keys[0]
    facts = ServerFacts(
        zones=tuple(dict.fromkeys(k.zone for k in block.keys)),
        label=str(Place(key.scheme, "", key.port)),
        root=os.getcwd(),
        scheme=key.scheme,
        port=key.port,
        host_search=host_search,
    )
    if not any(d.name == "bind" for d in block.directives):
        facts.local_addresses = tuple(a.packed for a in local_addresses() if not a.loopback)
    cx = Setup(
        problems,
        facts,
        metrics,
        time.monotonic,
        random.Random(os.urandom(16)),
        read=files.read_file,
        wall=time.time,
    )
    plugins: list[Plugin] = []
    addresses: tuple[str, ...] = ("",)
    for word, module in ORDER.items():
        mine = [d for d in block.directives if d.name == word]
        if word == "bind" and mine:
            binds = bind.setup(mine, cx)
            plugins += binds
            addresses = _addresses(mine[0].word, binds, problems)
            if len(addresses) == 1:
                facts.label = str(Place(key.scheme, addresses[0], key.port))
        elif mine:
            plugins += importlib.import_module(f"kdns.plugins.{module}").setup(mine, cx)
    return Block(block.keys, addresses, plugins, Chain(plugins), facts)


def _addresses(at: Token, binds: Sequence[Plugin], problems: Problems) -> tuple[str, ...]:
    """Return the addresses that a block's `bind` lines stand for."""
    out: list[str] = []
    for one in binds:
        assert isinstance(one, bind.Bind)
        found = resolve_binds(one.addresses, one.excepted)
        if isinstance(found, str):
            problems.error(at, found)
        else:
            out += found
    return tuple(dict.fromkeys(out))


def places_of(block: Block) -> list[Place]:
    """Return where a block's keys listen."""
    return list(
        dict.fromkeys(
            Place(key.scheme, address, key.port)
            for key in block.keys
            for address in block.addresses
        )
    )


def _routers(blocks: list[Block], problems: Problems, metrics: Metrics) -> dict[Place, Router]:
    chains: dict[Place, dict[bytes, Chain]] = {}
    any_class: set[Place] = set()
    counted: set[Place] = set()
    for block in blocks:
        for key in block.keys:
            for address in block.addresses:
                place = Place(key.scheme, address, key.port)
                try:
                    zone = parse_name(key.zone).lower()
                except BadName as e:
                    problems.error(key.token, f"zone is not a valid domain name: {e}")
                    continue
                chains.setdefault(place, {})[zone] = block.chain
                if any(p.word in ANY_CLASS for p in block.plugins):
                    any_class.add(place)
                if block.find("prometheus") is not None:
                    counted.add(place)
    return {
        place: Router(
            table, place in any_class, _unmatched(place, metrics) if place in counted else None
        )
        for place, table in chains.items()
    }


def _unmatched(place: Place, metrics: Metrics) -> Callable[[Query, Reply], Reply]:
    """Return what counts the questions that no block answers: zone "dropped" (CoreDNS)."""
    from kdns.plugins.prometheus import Prometheus

    facts = ServerFacts(("dropped",), str(place), "")
    return Prometheus(Setup(Problems(), facts, metrics, time.monotonic, random.Random())).on_reply
