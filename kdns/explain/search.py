"""A name as a Pod asks for it: which names its libc tries, in turn, and what each is answered.

Decides how glibc and musl read a search list (they differ: musl takes a name without records,
and a failing server, for the end of the search, and never searches for a name with enough
dots), what a Pod's dnsPolicy makes of its resolv.conf, and which server block, plugin and
object an answer is from. Answers come from the very chain that serves them, made from a
Corefile and a registry in this process; nothing is asked over a network but by ask_server().
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, TypeAlias

from kdns.dns import types as t
from kdns.dns.message import RR, Reply, make_query
from kdns.dns.name import BadName, parse_name, render_name
from kdns.dns.text import render_rdata
from kdns.errors import ConfigError, Problem
from kdns.explain.evidence import COREFILE, Evidence, Json
from kdns.metrics import Metrics
from kdns.plugins.chain import Chain, Pending, Result, Router
from kdns.plugins.forward import Upstreams
from kdns.plugins.plugin import Drop, WatchFile
from kdns.registry.snapshot import everything
from kdns.server.client import NoAnswer, Server, ask
from kdns.server.files import read_file
from kdns.site import Site, build_site, read_corefile
from kdns.zone.cluster import describe_dep

Libc: TypeAlias = Literal["glibc", "musl"]
LIBCS: Final[tuple[Libc, ...]] = ("glibc", "musl")
# What one candidate came to. unknown: an upstream would be asked, and was not.
State: TypeAlias = Literal["found", "nodata", "nxdomain", "failed", "unknown"]

NDOTS: Final = 5  # kubelet's, for the policy ClusterFirst
PLAIN_NDOTS: Final = 1  # resolv.conf(5) where nothing is said
MAX_DOTS: Final = 15  # of glibc and of musl
QTYPES: Final = (t.A, t.AAAA)
# Stands for "whatever that file says in the server's Pod": TEST-NET-1, which nobody has.
NOT_KNOWN: Final = "192.0.2.1"
RESOLV_CONF: Final = "resolv.conf"


# --- what a Pod's resolver is told -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Resolver:
    """A Pod's resolv.conf, as far as it follows from objects.

    policy      -- dnsPolicy as it takes effect
    cluster     -- its nameserver is the cluster's
    nameservers -- of dnsConfig, besides or in place of that
    hosts       -- name -> address: hostAliases, which come before DNS
    why         -- what makes it another one than Pods usually have; ""
    """

    search: tuple[str, ...]
    ndots: int = NDOTS
    policy: str = "ClusterFirst"
    cluster: bool = True
    nameservers: tuple[str, ...] = ()
    hosts: Mapping[str, str] = field(default_factory=dict)
    why: str = ""


def resolver_of(namespace: str, domain: str, spec: Json | None) -> Resolver:
    """Return what kubelet writes for a Pod. spec -- None: not known, so as Pods usually have"""
    usual = (f"{namespace}.svc.{domain}", f"svc.{domain}", domain)
    spec = spec or {}
    config = _map(spec.get("dnsConfig"))
    policy = str(spec.get("dnsPolicy") or "ClusterFirst")
    why = ""
    if policy == "ClusterFirst" and spec.get("hostNetwork") is True:
        policy, why = "Default", "hostNetwork without dnsPolicy ClusterFirstWithHostNet"
    elif policy != "ClusterFirst":
        why = f"dnsPolicy {policy}"
    cluster = policy in ("ClusterFirst", "ClusterFirstWithHostNet")
    search = [*(usual if cluster else ()), *map(str, config.get("searches") or ())]
    return Resolver(
        tuple(dict.fromkeys(one.rstrip(".") for one in search)),
        _ndots(config, NDOTS if cluster else PLAIN_NDOTS),
        policy,
        cluster,
        tuple(map(str, config.get("nameservers") or ())),
        dict(_aliases(spec)),
        why,
    )


def _ndots(config: Json, usual: int) -> int:
    for option in config.get("options") or ():
        value = str(_map(option).get("value") or "")
        if _map(option).get("name") == "ndots" and value.isdecimal():
            return min(int(value), MAX_DOTS)
    return usual


def _aliases(spec: Json) -> Iterator[tuple[str, str]]:
    for one in spec.get("hostAliases") or ():
        for name in _map(one).get("hostnames") or ():
            yield str(name).lower().rstrip("."), str(_map(one).get("ip") or "")


def _map(value: object) -> Json:
    return value if isinstance(value, Mapping) else {}


# --- which names are tried ---------------------------------------------------------------------


def candidates(name: str, resolver: Resolver, libc: Libc) -> list[str]:
    """Return the names that are tried in turn, each with a final dot. Raises BadName."""
    plain = name.rstrip(".")
    asis = render_name(parse_name(plain + "."))
    if name.endswith("."):
        return [asis]
    enough = plain.count(".") >= resolver.ndots
    if enough and libc == "musl":
        return [asis]
    below = []
    for domain in resolver.search:
        try:
            below.append(render_name(parse_name(f"{plain}.{domain}.")))
        except BadName:
            continue  # too long: both pass it over
    return list(dict.fromkeys([asis, *below] if enough else [*below, asis]))


def goes_on(state: State, libc: Libc) -> bool:
    """True if the search goes on after a candidate that came to this."""
    if libc == "musl":
        return state in ("nxdomain", "unknown")
    return state != "found"


# --- answers -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    """What a name is answered, of both address types.

    records   -- (owner, TYPE, value) of the answer section, in order
    block     -- the server block, by its zones
    objects   -- what it was made from: "Service default/web"
    upstreams -- who would be asked
    error     -- what the server says of a failure
    """

    name: str
    state: State
    rcode: str
    records: tuple[tuple[str, str, str], ...] = ()
    ttl: int = 0
    block: str = ""
    plugin: str = ""
    objects: tuple[str, ...] = ()
    upstreams: tuple[str, ...] = ()
    error: str = ""

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(value for _, kind, value in self.records if kind in ("A", "AAAA"))

    @property
    def aliases(self) -> tuple[str, ...]:
        return tuple(value for _, kind, value in self.records if kind == "CNAME")


class Names:
    """Answers for one client as the server would, from a Corefile and a registry."""

    def __init__(self, evidence: Evidence, client: str = "") -> None:
        self.notes: list[str] = []
        self.client = client or "127.0.0.1"
        self._known: dict[str, Answer] = {}
        self.site = self._site(evidence)
        self._router = self._router_of(self.site, evidence.corefile[0])
        self._blocks = {
            id(block.chain): " ".join(str(key) for key in block.facts.zones)
            for block in self.site.blocks
        }
        self.kubernetes: list[Any] = [p for p in self.site.plugins() if p.word == "kubernetes"]
        for plugin in self.kubernetes:
            plugin.publish(evidence.snapshot, everything(evidence.snapshot), 0.0)
        with _silence():
            self._read_files(evidence)

    @property
    def domain(self) -> str:
        """The cluster's domain, without a final dot."""
        for plugin in self.kubernetes:
            return render_name(plugin.primary).rstrip(".")
        return "cluster.local"

    @property
    def zones(self) -> tuple[bytes, ...]:
        return tuple(zone for plugin in self.kubernetes for zone in plugin.zones)

    def _site(self, evidence: Evidence) -> Site:
        path, text = evidence.corefile
        try:
            return _built(path, text)
        except ConfigError as e:
            if evidence.origin != "api":
                raise
            first = e.problems[0] if e.problems else e
            self.notes.append(
                f"names are answered by kubeadm's Corefile here, for the cluster's own is not"
                f" understood: {first}"
            )
            return _built("kubeadm's Corefile", COREFILE)

    def _router_of(self, site: Site, path: str) -> Router:
        """Return the router of plain DNS, on port 53 if there is such."""
        found = [(place.port != 53, n) for n, place in enumerate(site.routers)
                 if place.scheme == "dns"]  # fmt: skip
        if not found:
            text = "no server block answers plain DNS, which Pods ask"
            raise ConfigError([Problem(path, 0, text)])
        return list(site.routers.values())[min(found)[1]]

    def _read_files(self, evidence: Evidence) -> None:
        """Hand plugins their files: this host's, where the server is here or its Corefile is."""
        here = evidence.origin != "api"
        for plugin in self.site.plugins():
            for work in plugin.work():
                if not isinstance(work, WatchFile):
                    continue
                if os.path.basename(work.path) == RESOLV_CONF and evidence.origin != "kdns":
                    work.load(f"nameserver {NOT_KNOWN}\n".encode(), "")
                elif here:
                    work.load(*read_file(work.path))
                else:
                    work.load(None, "is in the server's Pod")
                    self.notes.append(f"{work.path} is in the server's Pod, so taken for empty")

    # --- asking -----------------------------------------------------------------------

    def ask(self, name: str) -> Answer:
        """Return what a name is answered; addresses of both families are one answer. The same
        name is asked for once: the second answer would be the cache's."""
        known = self._known.get(name.lower())
        if known is None:
            known = _merged([self._ask(name, qtype) for qtype in QTYPES])
            self._known[name.lower()] = known
        return known

    def _ask(self, name: str, qtype: int) -> Answer:
        wire = parse_name(name)
        query = make_query(
            wire, qtype, client=(self.client, 40000), proto="tcp", received=time.monotonic()
        )
        chain = self._router.route(query)
        block = self._blocks.get(id(chain), "")
        with _silence():
            result: Result = self._router.resolve(query)
        if isinstance(result, Pending):
            return self._pending(name, qtype, result, block, chain)
        if isinstance(result, Drop):
            return Answer(name, "failed", "no answer", block=block, plugin="acl")
        return self._answer(name, qtype, result, block, chain)

    def _pending(
        self, name: str, qtype: int, pending: Pending, block: str, chain: Chain | None
    ) -> Answer:
        """Say whom the server would ask; it is not asked. Where it is for the target of a CNAME,
        that much is answered."""
        upstreams = pending.forward.upstreams
        found = tuple(
            "the nameservers of its resolv.conf" if one.host == NOT_KNOWN else one.label
            for one in (upstreams.addresses if isinstance(upstreams, Upstreams) else ())
        )
        with _silence():
            resumed = pending.resume(Reply(t.NOERROR))
        if isinstance(resumed, Reply) and resumed.answer:
            answer = self._answer(name, qtype, resumed, block, chain)
            return replace(answer, state="found", upstreams=found)
        return Answer(name, "unknown", "", (), 0, block, "forward", (), found)

    def _answer(
        self, name: str, qtype: int, reply: Reply, block: str, chain: Chain | None
    ) -> Answer:
        objects = tuple(
            text
            for dep in reply.deps
            if (text := describe_dep(dep)) and not text.startswith("Namespace ")
        )
        plugin = reply.served_by
        if not plugin and (chain is None or chain.idle):
            block = ""
        return Answer(
            name,
            _state(reply.rcode, reply.answer, qtype),
            t.rcode_name(reply.rcode),
            tuple(_record(rr) for rr in reply.answer),
            min((rr.ttl for rr in reply.answer), default=0),
            block,
            plugin,
            tuple(dict.fromkeys(objects)),
            (),
            reply.error or "",
        )


def _state(rcode: int, answer: Sequence[RR], qtype: int) -> State:
    if rcode == t.NXDOMAIN:
        return "nxdomain"
    if rcode != t.NOERROR:
        return "failed"
    return "found" if any(rr.type == qtype for rr in answer) else "nodata"


_ORDER: Final[Mapping[State, int]] = {
    "found": 0, "unknown": 1, "failed": 2, "nodata": 3, "nxdomain": 4
}  # fmt: skip


def _merged(answers: Sequence[Answer]) -> Answer:
    """Return what answers for several types come to: the best of them, with all records."""
    best = min(answers, key=lambda answer: _ORDER[answer.state])
    return replace(best, records=tuple(dict.fromkeys(r for a in answers for r in a.records)))


def _record(rr: RR) -> tuple[str, str, str]:
    return render_name(rr.name), t.type_name(rr.type), render_rdata(rr.type, rr.rdata)


def _built(path: str, text: str) -> Site:
    corefile, problems = read_corefile(path, text, 53, os.environ)
    return build_site(corefile, problems, Metrics())


@contextmanager
def _silence() -> Iterator[None]:
    """Keep `log` and `errors` from writing: these are no questions of anybody."""
    log = logging.getLogger("kdns")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.setLevel(level)


# --- a real server -----------------------------------------------------------------------------


def ask_server(server: Server, name: str, qtypes: Sequence[int] = QTYPES) -> Answer:
    """Return what a running server answers. Raises NoAnswer."""
    answers = []
    for qtype in qtypes:
        message = ask(server, parse_name(name), qtype, timeout=2.0, tries=2).message
        answers.append(
            Answer(
                name,
                _state(message.rcode, message.answer, qtype),
                t.rcode_name(message.rcode),
                tuple(_record(rr) for rr in message.answer),
                min((rr.ttl for rr in message.answer), default=0),
                plugin=str(server),
                error=_explained(message.edns),
            )
        )
    return _merged(answers)


EDE: Final = 15  # RFC 8914


def _explained(edns: Any) -> str:
    """Return the text of an Extended DNS Error, if the answer has one."""
    for number, content in getattr(edns, "options", None) or ():
        if number == EDE and len(content) >= 2:
            code = int.from_bytes(content[:2], "big")
            text = content[2:].decode("utf-8", "replace").rstrip("\0")
            return f"EDE {code}: {text}" if text else f"EDE {code}"
    return ""


# --- one search --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tried:
    """One candidate: what is computed for it, and what a running server answered."""

    answer: Answer
    real: Answer | None = None

    @property
    def state(self) -> State:
        return (self.real or self.answer).state


@dataclass(frozen=True, slots=True)
class Search:
    """A search: what was tried, in order, and which of them a program is told of.

    ended -- the candidate that decided; None: it was never found out
    """

    libc: Libc
    tried: tuple[Tried, ...]
    ended: Tried

    @property
    def state(self) -> State:
        return self.ended.state


def search(
    name: str,
    resolver: Resolver,
    libc: Libc,
    compute: Callable[[str], Answer],
    real: Callable[[str], Answer] | None = None,
) -> Search:
    """Try the candidates in turn as this libc does. Raises BadName, NoAnswer."""
    tried: list[Tried] = []
    names = candidates(name, resolver, libc)
    for one in names:
        now = Tried(compute(one), real(one) if real is not None else None)
        tried.append(now)
        if not goes_on(now.state, libc):
            return Search(libc, tuple(tried), now)
    # Nothing was found. What a program is told: an upstream may know; else as glibc, that the
    # name is there without records, before that a server fails, before that there is none.
    order: tuple[State, ...] = ("unknown", "nodata", "failed", "nxdomain")
    ended = min(reversed(tried), key=lambda one: order.index(one.state))
    return Search(libc, tuple(tried), ended)


__all__ = [
    "LIBCS", "Answer", "Libc", "Names", "NoAnswer", "Resolver", "Search", "Tried",
    "ask_server", "candidates", "resolver_of", "search",
]  # fmt: skip
