"""`ready`: /ready says whether every plugin of the server block can do its work.

Decides when a plugin is asked. CoreDNS asks a plugin no more once it was ready; here it is
asked each time, so that a server which has lost what it needs can say so, unless the Corefile
says `monitor until-ready`. Only an explicit `monitor continuously` asks for stale knowledge
too: by default an API server that is down must not take all DNS with it. Several blocks may
name one address: app.py puts their answers together.
"""

from __future__ import annotations

from collections.abc import Sequence

from kdns.corefile import Directive, Option, nearest
from kdns.plugins.plugin import HttpRoute, Plugin, Work
from kdns.plugins.setup import Setup

DEFAULT_ADDRESS = ":8181"
MONITORS = ("until-ready", "continuously")


class Ready(Plugin):
    """lameduck -- set by app.py once the process was told to stop: no new clients."""

    word = "ready"

    def __init__(self, address: str, monitor: str, cx: Setup) -> None:
        self.address = address
        self.lameduck = False
        self._log = cx.logger("ready")
        self._once = monitor == "until-ready"
        self._strict = monitor == "continuously"
        self._asked: list[Plugin] = []
        self._told = ""

    def link(self, chain: Sequence[Plugin]) -> None:
        self._asked = [
            p
            for p in chain
            if type(p).not_ready is not Plugin.not_ready
            or (self._strict and type(p).stale is not Plugin.stale)
        ]

    def ask_also(self, plugin: Plugin) -> None:
        """Ask one of another server block, too."""
        if plugin not in self._asked:
            self._asked.append(plugin)

    def work(self) -> Sequence[Work]:
        return (HttpRoute(self.address, "/ready", self._serve),)

    def _serve(self, headers: dict[str, str]) -> tuple[int, str, bytes]:
        if self.lameduck:
            return 503, "text/plain; charset=utf-8", b"Shutting down"
        missing = [(p, why) for p in self._asked if (why := self._why(p))]
        if self._once:
            self._asked = [p for p, _ in missing]
        self._tell(missing)
        if not missing:
            return 200, "text/plain; charset=utf-8", b"OK"
        return 503, "text/plain; charset=utf-8", _words(missing).encode()

    def _why(self, plugin: Plugin) -> str:
        return plugin.not_ready() or (plugin.stale() if self._strict else "")

    def _tell(self, missing: list[tuple[Plugin, str]]) -> None:
        """Log a change; a probe every few seconds would fill the log with one line."""
        text = "; ".join(f"{p.word}: {why}" for p, why in missing)
        if text and text != self._told:
            self._log.info('Plugins not ready: "%s" (%s)', _words(missing), text)
        elif self._told and not text:
            self._log.info("All plugins are ready")
        self._told = text


def _words(missing: list[tuple[Plugin, str]]) -> str:
    return ",".join(sorted({p.word for p, _ in missing}))


def setup(directives: list[Directive], cx: Setup) -> list[Plugin]:
    """`ready [ADDRESS] { monitor until-ready|continuously }`"""
    directive = cx.once(directives)
    address = DEFAULT_ADDRESS
    if cx.arg_count(directive, 0, 1) and directive.args:
        address = cx.listen_address(directive.args[0])
    monitor = ""
    for option in directive.options or ():
        if option.name == "monitor":
            monitor = _monitor(option, cx)
        else:
            cx.unknown_option(option, ("monitor",))
    return [Ready(address, monitor, cx)]


def _monitor(option: Option, cx: Setup) -> str:
    if not cx.arg_count(option, 1, 1):
        return ""
    token = option.args[0]
    if token.text not in MONITORS:
        hint = nearest(token.text, MONITORS) or f"; there are {' and '.join(MONITORS)}"
        cx.problems.error(token, f"monitor type '{token}' not supported{hint}")
    return token.text
