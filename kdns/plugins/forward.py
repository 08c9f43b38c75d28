"""`forward`: which questions go to which upstreams (reference 2.3, CoreDNS HEAD's options).

Decides whether a question is forwarded, to whom and under which rules; says so in a value
(Upstreams). Sockets, retries, health and time-outs are server/upstream.py's.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from kdns.corefile import Directive, Option, Token, nearest
from kdns.dns import ede
from kdns.dns import types as t
from kdns.dns.ede import Ede
from kdns.dns.message import AD, Query, Reply, failure
from kdns.dns.name import ROOT, BadName, is_subdomain, parse_name
from kdns.plugins.plugin import Forward as Send
from kdns.plugins.plugin import Outcome, Plugin, WatchFile, Work
from kdns.plugins.setup import Setup

MAX_UPSTREAMS = 15  # CoreDNS's bound for one forward
POLICIES = ("random", "round_robin", "sequential")
PORTS = {"dns": 53, "tls": 853}
# Transports CoreDNS's forward knows and kdns has not.
NOT_HERE = ("https", "https3", "grpc", "quic", "unix")


@dataclass(frozen=True, slots=True)
class Upstream:
    """One server to ask.

    host        -- an IP address, an IPv6 one perhaps with %interface
    transport   -- "dns" or "tls"
    server_name -- the name its certificate must carry; empty: Upstreams.server_name, and if
                   that is empty too, its IP address
    """

    host: str
    port: int
    transport: str = "dns"
    server_name: str = ""

    @property
    def label(self) -> str:
        """Return host:port, as in CoreDNS's `to` label."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, eq=False)
class Upstreams:
    """All that server/upstream.py needs to know of one `forward`. Times are in seconds.

    One object stands for one set of connections and health states, so two of them are never
    equal.

    expire         -- how long an idle connection is kept; max_age: how long any (0: no limit)
    max_idle       -- idle connections kept for each upstream and transport (0: no limit)
    max_fails      -- failed health checks in a row after which an upstream is down (0: never)
    max_attempts   -- tries for one question (0: until the time is up; None: 2 x upstreams)
    failover       -- rcodes that make it try the next upstream
    max_concurrent -- questions under way before more are refused (0: no limit)
    explains       -- a failure says what became of which upstream (RFC 8914)
    tls_files      -- (certificate, key, CA), each a path or empty
    """

    addresses: tuple[Upstream, ...]
    policy: str = "random"
    force_tcp: bool = False
    prefer_udp: bool = False
    expire: float = 10.0
    max_age: float = 0.0
    max_idle: int = 0
    read_timeout: float = 2.0
    max_fails: int = 2
    max_attempts: int | None = None
    health_interval: float = 0.5
    health_recursion: bool = True
    health_name: bytes = ROOT
    failfast: bool = False
    failover: frozenset[int] = frozenset()
    max_concurrent: int = 0
    explains: bool = True
    source_address: str = ""
    server_name: str = ""
    tls_files: tuple[str, str, str] = ("", "", "")


class ResolvConf(NamedTuple):
    """A TO that is a file with `nameserver` lines."""

    path: str


class Forward(Plugin):
    """Sends the questions of its zones on.

    looping   -- set by the `loop` plugin once it has seen our own question come back: the
                 text of the error every forwarded question is answered with
    upstreams -- None while no usable upstream is known; `unusable` says why
    """

    word = "forward"

    def __init__(
        self,
        zones: Sequence[bytes],
        targets: Sequence[Upstream | ResolvConf],
        rules: Upstreams,
        cx: Setup,
        *,
        excluded: Sequence[bytes] = (),
        next_rcodes: frozenset[int] = frozenset(),
        next_on_nodata: bool = False,
    ) -> None:
        self.zones = tuple(zones)
        self.excluded = tuple(excluded)
        self.looping = ""
        self.unusable = "no upstream is known yet"
        self.upstreams: Upstreams | None = None
        self._targets = tuple(targets)
        self._rules = rules
        self._facts = cx.facts
        self._log: logging.Logger = cx.logger("forward")
        self._everything = ROOT in self.zones
        self._next_rcodes = next_rcodes
        self._next_on_nodata = next_on_nodata
        self._then: Callable[[Reply], Outcome] | None = None
        self._ask_authenticated = False
        self._nameservers: dict[str, tuple[Upstream, ...]] = {}
        self._unusable_gauge = cx.metrics.gauge(
            "kdns_forward_unusable_resolv_conf",
            "1 for a resolv.conf that names no nameserver which can be used.",
            ("server", "file"),
        )
        if not self._files():
            self._update()

    # --- the program around it ------------------------------------------------------------

    def link(self, chain: Sequence[Plugin]) -> None:
        at = chain.index(self)
        follower = chain[at + 1] if at + 1 < len(chain) else None
        if isinstance(follower, Forward) and (self._next_rcodes or self._next_on_nodata):
            self._then = self._go_on
        # As CoreDNS's cache: an entry must serve those who want the AD bit too, so it is asked
        # for; the cache clears it for the others (RFC 6840 s5.7).
        self._ask_authenticated = any(plugin.word == "cache" for plugin in chain[:at])
        if not all(plugin.explains for plugin in chain):
            self._rules = replace(self._rules, explains=False)
            self._update()

    def work(self) -> Sequence[Work]:
        # CoreDNS reads resolv.conf once, at start.
        return [WatchFile(file.path, 0, self._loader(file.path)) for file in self._files()]

    def _files(self) -> list[ResolvConf]:
        return [target for target in self._targets if isinstance(target, ResolvConf)]

    def _loader(self, path: str) -> Callable[[bytes | None, str], bool]:
        def load(content: bytes | None, error: str) -> bool:
            return self._load(path, content, error)

        return load

    def _load(self, path: str, content: bytes | None, error: str) -> bool:
        """Take over the nameservers of a resolv.conf; a bad one degrades, it ends nothing."""
        problem = ""
        found: list[Upstream] = []
        if content is None:
            problem = (error or "cannot be read").removeprefix(f"{path}: ")
        else:
            named = parse_resolv_conf(content)
            found = [address for address in named if not self._is_self(address)]
            if not named:
                problem = "no nameserver with an IP address found"
            elif not found:
                problem = "its nameservers are this server itself, so forwarding would loop"
            elif len(found) < len(named):
                self._log.warning("%s: this server itself is left out of the nameservers", path)
        if problem:
            self._log.error("%s: %s; put usable nameservers there or name them here", path, problem)
            problem = f"{path}: {problem}"
        self._unusable_gauge.labels(self._facts.label, path).set(1 if problem else 0)
        self._nameservers[path] = tuple(found)
        self._update()
        if self.upstreams is None and problem:
            self.unusable = problem
        return True

    def _is_self(self, address: Upstream) -> bool:
        """True if a question sent there comes back to this server block's listener. Where the
        block is bound to given addresses nothing is known; the `loop` plugin finds out."""
        local = self._facts.local_addresses
        if not local or address.port != self._facts.port:
            return False
        ip = ipaddress.ip_address(address.host)
        return ip.is_loopback or ip.is_unspecified or ip.packed in local

    def _update(self) -> None:
        """Put the addresses together in the order of the Corefile, each once."""
        found: dict[tuple[str, int], Upstream] = {}
        for target in self._targets:
            if isinstance(target, ResolvConf):
                for address in self._nameservers.get(target.path, ()):
                    found.setdefault((address.host, address.port), address)
            else:
                found.setdefault((target.host, target.port), target)
        addresses = tuple(found.values())[:MAX_UPSTREAMS]
        self.upstreams = replace(self._rules, addresses=addresses) if addresses else None

    # --- questions ------------------------------------------------------------------------

    def on_query(self, query: Query) -> Outcome:
        key = query.key
        if not self._everything and not any(is_subdomain(key, zone) for zone in self.zones):
            return None
        if self.excluded and self._is_excluded(key):
            return None
        if self.looping:
            return self._fail(query, self.looping, ede.OTHER)
        upstreams = self.upstreams
        if upstreams is None:
            return self._fail(query, self.unusable, ede.NO_REACHABLE_AUTHORITY)
        if self._ask_authenticated and not query.flags & AD:
            query = query.asking()
            query.flags |= AD
        return Send(upstreams, query, self._then)

    def _fail(self, query: Query, text: str, code: int) -> Reply:
        explains = query.edns is not None and self._rules.explains
        return failure(t.SERVFAIL, text, Ede(code, text) if explains else None)

    def _is_excluded(self, key: bytes) -> bool:
        if key in self.zones:
            return False
        return any(is_subdomain(key, zone) for zone in self.excluded)

    def _go_on(self, reply: Reply) -> Outcome:
        """Leave a reply to the next `forward` if the options say so."""
        if reply.error is not None:
            return reply  # nobody answered: CoreDNS goes on for an upstream's rcode only
        if reply.rcode in self._next_rcodes:
            return None
        if self._next_on_nodata and reply.rcode == t.NOERROR and not reply.answer:
            return None
        return reply


def parse_resolv_conf(content: bytes) -> list[Upstream]:
    """Return the nameservers of a resolv.conf(5); lines that name none are skipped."""
    found = []
    for line in content.decode("utf-8", "replace").splitlines():
        words = line.split()
        if len(words) < 2 or words[0] != "nameserver":
            continue
        if _is_ip(words[1]):
            found.append(Upstream(words[1], 53))
    return found


# --- reading the Corefile -----------------------------------------------------------------


def setup(directives: list[Directive], cx: Setup) -> list[Plugin]:
    """`forward FROM TO... { OPTIONS }`, any number of times; they are asked in this order."""
    plugins: list[Plugin] = []
    for directive in directives:
        plugin = _Reader(directive, cx).read()
        if plugin is not None:
            plugins.append(plugin)
    return plugins


class _Reader:
    """Reads one directive."""

    def __init__(self, directive: Directive, cx: Setup) -> None:
        self.directive = directive
        self.cx = cx
        self.rules = Upstreams(())
        self.excluded: list[bytes] = []
        self.next_rcodes: frozenset[int] = frozenset()
        self.next_on_nodata = False
        self.tls_options: list[Token] = []

    def read(self) -> Forward | None:
        directive, cx = self.directive, self.cx
        for option in directive.options or ():
            read = _OPTIONS.get(option.name)
            if read is None:
                cx.unknown_option(option, _OPTIONS)
            else:
                read(self, option)
        rules = self.rules
        if rules.max_age and rules.max_age < rules.expire:
            cx.problems.error(
                directive.word,
                f"max_age ({rules.max_age:g}s) must not be less than expire ({rules.expire:g}s)",
            )
        if not cx.arg_count(directive, 2):
            return None
        zones = cx.zone(directive.args[0])
        targets = [x for x in map(self._target, directive.args[1:]) if x is not None]
        if len(directive.args) - 1 > MAX_UPSTREAMS:
            cx.problems.error(
                directive.args[MAX_UPSTREAMS + 1],
                f"more than {MAX_UPSTREAMS} TOs configured: {len(directive.args) - 1}",
            )
        self._check_tls(targets)
        if not zones or not targets:
            return None
        return Forward(
            zones,
            targets,
            rules,
            cx,
            excluded=self.excluded,
            next_rcodes=self.next_rcodes,
            next_on_nodata=self.next_on_nodata,
        )

    def _check_tls(self, targets: Sequence[Upstream | ResolvConf]) -> None:
        secure = [x for x in targets if isinstance(x, Upstream) and x.transport == "tls"]
        if self.tls_options and targets and not secure:
            self.cx.problems.warn(
                self.tls_options[0],
                f"'{self.tls_options[0]}' has no effect: no upstream is written as tls://ADDRESS,"
                " so questions go out in the clear",
            )
        for upstream in secure:
            if upstream.server_name and self.rules.server_name:
                self.cx.problems.error(
                    self.directive.word,
                    f"both forward ('{self.rules.server_name}') and proxy level"
                    f" ('{upstream.server_name}') TLS servernames are set for upstream"
                    f" '{upstream.label}'; leave out one",
                )

    # --- TO -------------------------------------------------------------------------------

    def _target(self, token: Token) -> Upstream | ResolvConf | None:
        text = token.text
        transport, mark, rest = text.partition("://")
        if not mark:
            transport, rest = "dns", text
        if transport not in PORTS:
            why = (
                f"kdns does not forward over {transport}; it has dns:// and tls://"
                if transport in NOT_HERE
                else "'" + transport + "' is not supported as a destination protocol"
                + (nearest(transport, PORTS) or "; write dns:// or tls://")
            )  # fmt: skip
            self.cx.problems.error(token, f"{text}: {why}")
            return None
        host, port, zone = split_address(rest)
        if _is_ip(host):
            return self._address(token, transport, host, port, zone)
        if transport == "dns" and ("/" in rest or rest.endswith(".conf")):
            return ResolvConf(rest)
        self._refuse(token)
        return None

    def _refuse(self, token: Token) -> None:
        self.cx.problems.error(
            token,
            f'not an IP address or file: "{token}"; write an address, ADDRESS:PORT or the path'
            " of a resolv.conf (kdns resolves no host names here)",
        )

    def _address(
        self, token: Token, transport: str, host: str, port_text: str | None, zone: str
    ) -> Upstream | None:
        port = PORTS[transport]
        if port_text is not None:
            if not (port_text.isascii() and port_text.isdecimal() and 0 < int(port_text) < 65536):
                self.cx.problems.error(token, f"address {token}: invalid port '{port_text}'")
                return None
            port = int(port_text)
        if transport == "tls":
            return Upstream(host, port, "tls", zone)
        if zone and ":" in host and ipaddress.ip_address(host).is_link_local:
            return Upstream(f"{host}%{zone}", port)
        if zone:
            self.cx.problems.warn(
                token, f"'%{zone}' is ignored: only tls:// upstreams have a server name"
            )
        return Upstream(host, port)

    # --- options --------------------------------------------------------------------------

    def _set(self, **changes: object) -> None:
        self.rules = replace(self.rules, **changes)  # type: ignore[arg-type]

    def except_(self, option: Option) -> None:
        if self.cx.arg_count(option, 1):
            for token in option.args:
                self.excluded += self.cx.zone(token)

    def force_tcp(self, option: Option) -> None:
        if self.cx.no_args(option):
            self._set(force_tcp=True)

    def prefer_udp(self, option: Option) -> None:
        if self.cx.no_args(option):
            self._set(prefer_udp=True)

    def next_on_nodata_(self, option: Option) -> None:
        if self.cx.no_args(option):
            self.next_on_nodata = True

    def failfast(self, option: Option) -> None:
        if self.cx.no_args(option):
            self._set(failfast=True)

    def expire(self, option: Option) -> None:
        if self.cx.arg_count(option, 1, 1):
            self._set(expire=self.cx.duration(option.args[0]))

    def max_age(self, option: Option) -> None:
        if self.cx.arg_count(option, 1, 1):
            self._set(max_age=self.cx.duration(option.args[0]))

    def read_timeout(self, option: Option) -> None:
        if not self.cx.arg_count(option, 1, 1):
            return
        before = len(self.cx.problems.found)
        seconds = self.cx.duration(option.args[0])
        if seconds > 0:
            self._set(read_timeout=seconds)
        elif len(self.cx.problems.found) == before:
            self.cx.problems.error(
                option.args[0], f"read_timeout must be positive: {option.args[0]}"
            )

    def max_fails(self, option: Option) -> None:
        if self.cx.arg_count(option, 1, 1):
            self._set(max_fails=self.cx.integer(option.args[0], 0, 2**32 - 1, "max_fails"))

    def max_connect_attempts(self, option: Option) -> None:
        if self.cx.arg_count(option, 1, 1):
            n = self.cx.integer(option.args[0], 0, 2**32 - 1, "max_connect_attempts")
            self._set(max_attempts=n)

    def max_idle_conns(self, option: Option) -> None:
        if self.cx.arg_count(option, 1, 1):
            self._set(max_idle=self.cx.integer(option.args[0], 0, 2**31, "max_idle_conns"))

    def max_concurrent(self, option: Option) -> None:
        if self.cx.arg_count(option, 1, 1):
            self._set(max_concurrent=self.cx.integer(option.args[0], 0, 2**31, "max_concurrent"))

    def tls(self, option: Option) -> None:
        """Take none, CA, CERT KEY, or CERT KEY CA."""
        self.tls_options.append(option.word)
        if self.cx.arg_count(option, 0, 3):
            paths = [self.cx.path(token.text) for token in option.args]
            certificate, key = paths[:2] if len(paths) >= 2 else ("", "")
            authority = paths[-1] if len(paths) in (1, 3) else ""
            self._set(tls_files=(certificate, key, authority))

    def tls_servername(self, option: Option) -> None:
        self.tls_options.append(option.word)
        if self.cx.arg_count(option, 1, 1):
            self._set(server_name=option.args[0].text)

    def policy(self, option: Option) -> None:
        if not self.cx.arg_count(option, 1, 1):
            return
        word = option.args[0]
        if word.text in POLICIES:
            self._set(policy=word.text)
        else:
            hint = nearest(word.text, POLICIES) or f" (known: {', '.join(POLICIES)})"
            self.cx.problems.error(word, f"unknown policy '{word}'{hint}")

    def health_check(self, option: Option) -> None:
        if not self.cx.arg_count(option, 1):
            return
        before = len(self.cx.problems.found)
        seconds = self.cx.duration(option.args[0])
        if seconds > 0:
            self._set(health_interval=seconds)
        elif len(self.cx.problems.found) == before:
            self.cx.problems.error(
                option.args[0],
                "health_check must be more than 0s; 'max_fails 0' turns health checks off",
            )
        words = iter(option.args[1:])
        for word in words:
            if word.text == "no_rec":
                self._set(health_recursion=False)
            elif word.text == "domain":
                self._health_domain(word, next(words, None))
            else:
                hint = nearest(word.text, ("no_rec", "domain")) or " (known: domain, no_rec)"
                self.cx.problems.error(word, f"health_check: unknown option {word}{hint}")

    def _health_domain(self, at: Token, token: Token | None) -> None:
        if token is None:
            self.cx.problems.error(at, "health_check: 'domain' needs a domain name")
            return
        try:
            self._set(health_name=parse_name(token.text).lower())
        except BadName as e:
            self.cx.problems.error(token, f"health_check: invalid domain name: {e}")

    def next_(self, option: Option) -> None:
        self.next_rcodes |= self._rcodes(option)

    def failover(self, option: Option) -> None:
        rcodes = self._rcodes(option)
        if t.NOERROR in rcodes:
            self.cx.problems.error(option.word, "NOERROR cannot be used in failover")
        self._set(failover=self.rules.failover | rcodes)

    def _rcodes(self, option: Option) -> frozenset[int]:
        if not self.cx.arg_count(option, 1):
            return frozenset()
        found = set()
        for token in option.args:
            rcode = t.RCODES.get(token.text.upper())
            if rcode is None:
                hint = nearest(token.text, (name.lower() for name in t.RCODES))
                self.cx.problems.error(token, f"{token} is not a valid rcode{hint}")
            else:
                found.add(rcode)
        return frozenset(found)

    def source_address(self, option: Option) -> None:
        if not self.cx.arg_count(option, 1, 1):
            return
        try:
            self._set(source_address=str(ipaddress.ip_address(option.args[0].text)))
        except ValueError:
            self.cx.problems.error(option.args[0], f"invalid IP address: {option.args[0]}")

    def resolver(self, option: Option) -> None:
        self.cx.problems.error(
            option.word,
            "kdns resolves no host names for forward, so it has no 'resolver';"
            " name the upstreams by IP address",
        )

    def doh_method(self, option: Option) -> None:
        self.cx.problems.error(
            option.word,
            "kdns does not forward over https, so it has no 'doh_method'; use tls:// upstreams",
        )


_OPTIONS: dict[str, Callable[[_Reader, Option], None]] = {
    "except": _Reader.except_,
    "force_tcp": _Reader.force_tcp,
    "prefer_udp": _Reader.prefer_udp,
    "expire": _Reader.expire,
    "max_age": _Reader.max_age,
    "max_idle_conns": _Reader.max_idle_conns,
    "read_timeout": _Reader.read_timeout,
    "max_fails": _Reader.max_fails,
    "max_connect_attempts": _Reader.max_connect_attempts,
    "tls": _Reader.tls,
    "tls_servername": _Reader.tls_servername,
    "policy": _Reader.policy,
    "health_check": _Reader.health_check,
    "max_concurrent": _Reader.max_concurrent,
    "next": _Reader.next_,
    "next_on_nodata": _Reader.next_on_nodata_,
    "failover": _Reader.failover,
    "failfast_all_unhealthy_upstreams": _Reader.failfast,
    "source_address": _Reader.source_address,
    "resolver": _Reader.resolver,
    "doh_method": _Reader.doh_method,
}


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def split_address(text: str) -> tuple[str, str | None, str]:
    """Return (host, port or None, what stands behind a %) of a TO without its scheme."""
    head, percent, tail = text.rpartition("%")
    if not percent:
        head, tail = text, ""
    if percent:
        # 9.9.9.9%name:853, [::1]%name:853 or [::1%name]:853
        zone, colon, port = tail.partition(":")
        return head.strip("[]"), port if colon else None, zone.strip("]")
    if head.startswith("["):
        host, _, rest = head[1:].partition("]")
        return host, rest[1:] if rest.startswith(":") else None, ""
    if head.count(":") == 1:
        host, _, port = head.partition(":")
        return host, port, ""
    return head, None, ""
