"""What a plugin is, what it may answer, and what it may ask of the program around it.

A plugin is a pair of plain functions (docs/DESIGN.md 1.3 point 1). It does no I/O: what
needs a socket, a file or a clock is said in a value (Forward, Ask, WatchFile, ...) that
server/ and app.py carry out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from kdns.dns.message import Query, Reply

if TYPE_CHECKING:
    from kdns.registry.snapshot import Changes, Snapshot


class Drop:
    """Answer nothing at all."""

    __slots__ = ()


DROP = Drop()


class Forward:
    """Ask an upstream. server/upstream.py carries it out.

    upstreams -- the value that names whom and how (plugins/forward.py Upstreams)
    query     -- what to ask
    then      -- called with the Reply (an error is a Reply with rcode SERVFAIL and `error`
                 set); returns the outcome that goes on from there. None: the reply itself.
    """

    __slots__ = ("query", "then", "upstreams")

    def __init__(
        self,
        upstreams: Any,
        query: Query,
        then: Callable[[Reply], Outcome] | None = None,
    ) -> None:
        self.upstreams = upstreams
        self.query = query
        self.then = then


class Ask:
    """Put another question, then go on.

    below   -- True: to the plugins below the asking one in the same server block.
               False: to the whole server, from the choice of the server block on.
    then    -- called with the Reply (REFUSED or SERVFAIL where nobody answers); returns the
               next outcome: a Reply, another Ask (bounded by chain.MAX_ASKS), ...
               None from `then` means: go on down the chain with the original query.
    timeout -- seconds to wait before `then` gets None instead of a Reply; None: for ever.
    """

    __slots__ = ("below", "query", "then", "timeout")

    def __init__(
        self,
        query: Query,
        then: Callable[[Reply | None], Outcome],
        *,
        below: bool = False,
        timeout: float | None = None,
    ) -> None:
        self.query = query
        self.then = then
        self.below = below
        self.timeout = timeout


class Refresh:
    """Answer `reply` now and put `query` to the plugins below once more, in the background;
    its reply goes to `then` (cache prefetch, serve_stale)."""

    __slots__ = ("query", "reply", "then")

    def __init__(self, reply: Reply, query: Query, then: Callable[[Reply], None]) -> None:
        self.reply = reply
        self.query = query
        self.then = then


# None: not mine, go on down the chain. Query: go on with this one.
Outcome: TypeAlias = Reply | Query | Forward | Ask | Refresh | Drop | None


# --- what a plugin asks of app.py ---------------------------------------------------------


@dataclass(slots=True)
class WatchFile:
    """Read `path` now and whenever it changes, every `interval` seconds (0: only now).

    load -- called with the content, or None if it is missing or unreadable (error text as
            second argument). Returns True if answers may have changed (packet caches are
            then emptied).
    """

    path: str
    interval: float
    load: Callable[[bytes | None, str], bool]


@dataclass(slots=True)
class WatchFolder:
    """As WatchFile for all files directly below `path`: load gets {file name: content}."""

    path: str
    interval: float
    load: Callable[[dict[str, bytes], str], bool]


@dataclass(slots=True)
class HttpRoute:
    """Serve GET `path` on `address` ("host:port", port 0 allowed, host may be empty).

    handle -- returns (status, content type, body)
    tls    -- (certificate file, key file, client CA file or "") or None
    """

    address: str
    path: str
    handle: Callable[[dict[str, str]], tuple[int, str, bytes]]
    tls: tuple[str, str, str] | None = None
    lameduck: float = 0.0


@dataclass(slots=True)
class Every:
    """Call `tick` with monotonic seconds every `interval` seconds while serving."""

    interval: float
    tick: Callable[[float], None]


@dataclass(slots=True)
class Probe:
    """At start, put `query` to this very server over its own listener, until `done()` or
    `seconds` have passed (the `loop` plugin)."""

    query: Query
    seconds: float
    interval: float
    done: Callable[[], bool]


def unread(snapshot: Snapshot, changes: Changes, now: float) -> Sequence[Any]:
    """Make nothing of a snapshot."""
    return ()


@dataclass(slots=True)
class Feed:
    """Follow a registry: `source` is a source/ spec (plugins/kubernetes.py), `publish` gets
    each snapshot with what changed and returns the deps of answers that are no longer true
    (None: all of them).

    glance -- in place of `publish` where other processes answer (`workers`)
    """

    source: Any
    publish: Callable[[Snapshot, Changes, float], Sequence[Any] | None]
    glance: Callable[[Snapshot, Changes, float], Sequence[Any] | None] = unread


@dataclass(frozen=True, slots=True)
class Notice:
    """A zone's SOA serial that a secondary is to hear of (NOTIFY, RFC 1996).

    zone   -- origin, lower-case wire name
    to     -- the secondary's address and port
    source -- address to send from; empty: the one that the kernel takes
    """

    zone: bytes
    serial: int
    to: tuple[str, int]
    source: str = ""


@dataclass(slots=True)
class Notify:
    """Tell secondaries of new serials (server/notify.py).

    due  -- returns what they are to be told now, each notice once; called at start, and when a
            WatchFile or WatchFolder has said that answers may have changed
    done -- called with a notice, and why it was not accepted; empty: it was
    """

    due: Callable[[], Sequence[Notice]]
    done: Callable[[Notice, str], None]


Work: TypeAlias = WatchFile | WatchFolder | HttpRoute | Every | Probe | Feed | Notify


class Plugin:
    """Base of all plugins. Subclasses override on_query, on_reply or both."""

    word: ClassVar[str] = ""
    # True if the outcome depends on who asks; such a chain's replies are never repeated
    # from the packet cache.
    per_client: ClassVar[bool] = False
    # False in `explain off`: no plugin of its server block says why an answer is what it is.
    explains: bool = True

    def on_query(self, query: Query) -> Outcome:
        """Decide on a query coming down. None passes it on."""
        return None

    def on_reply(self, query: Query, reply: Reply) -> Reply:
        """Return the reply to pass up; `query` is the one this plugin passed down.

        `reply` belongs to the chain run: it may be changed in place, its RRs may not.
        """
        return reply

    def on_drop(self, query: Query) -> None:
        """Called in place of on_reply when a plugin below dropped the query."""

    def on_sent(self) -> None:
        """Called when an answer that an upstream was waited for has left: the time for what its
        asker need not wait for. It is not called for each of them: what must not be left undone
        is done at the next question at the latest."""

    def work(self) -> Sequence[Work]:
        """What app.py shall do for this plugin while it serves."""
        return ()

    def not_ready(self) -> str:
        """Return why the plugin is not ready, for /ready; empty if it is."""
        return ""

    def stale(self) -> str:
        """Return why what the plugin knows may be out of date; empty if it is not. /ready
        asks only with `monitor continuously`: an answer that is old beats none."""
        return ""

    def keeps(self, zone: bytes) -> bool:
        """True if the plugin may keep answers for names in `zone`, to give them out again."""
        return False

    def heeds(self, zone: bytes) -> bool:
        """True if it may depend on a question's name in `zone` what the plugin does."""
        kind = type(self)
        return not (kind.on_query is Plugin.on_query and kind.on_reply is Plugin.on_reply)

    def link(self, chain: Sequence[Plugin]) -> None:
        """Called once with all plugins of the server block, in order of execution."""


@dataclass(slots=True)
class ServerFacts:
    """What a plugin may know about the server block it stands in.

    zones  -- the block's zone names, text with final dot
    label  -- metrics label, e.g. "dns://:53"
    root   -- folder that relative paths start from
    local_addresses -- packed addresses of this host that are not loopback; none where the
              block is bound to given addresses (reference 1.10)
    host_search -- the search list of this host's resolv.conf, wire names (autopath)
    """

    zones: tuple[str, ...]
    label: str
    root: str
    scheme: str = "dns"
    port: int = 53
    local_addresses: tuple[bytes, ...] = ()
    host_search: tuple[bytes, ...] = ()
