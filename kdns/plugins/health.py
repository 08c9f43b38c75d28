"""`health`: /health says that the process lives, and how long it lingers when stopped.

Decides the answer (always OK) and measures how late the loop is: CoreDNS asks itself over
HTTP each second and records how long that took, to show a process that cannot keep up. Here
one loop answers queries and HTTP alike, so the time a timer fires too late is the time such a
request would have waited.
"""

from __future__ import annotations

from collections.abc import Sequence

from kdns.corefile import Directive
from kdns.plugins.plugin import Every, HttpRoute, Plugin, Work
from kdns.plugins.setup import Setup

DEFAULT_ADDRESS = ":8080"
PERIOD = 1.0
LATE = 1.0  # seconds from which a line is logged, as CoreDNS
SECONDS = (0.00025, 0.0025, 0.025, 0.25, 2.5)


class Health(Plugin):
    """lameduck -- seconds that DNS and /health go on after the process was told to stop."""

    word = "health"

    def __init__(self, address: str, lameduck: float, cx: Setup) -> None:
        self.address = address
        self.lameduck = lameduck
        self._log = cx.logger("health")
        self._due: float | None = None
        self._durations = cx.metrics.histogram(
            "coredns_health_request_duration_seconds",
            "Seconds a request to /health would have waited.",
            (),
            SECONDS,
        ).labels()
        # Always 0, for nothing is sent that could fail: there for the dashboards that read it.
        cx.metrics.counter(
            "coredns_health_request_failures_total", "Requests to /health that failed."
        ).labels()

    def work(self) -> Sequence[Work]:
        return (
            HttpRoute(self.address, "/health", _ok, lameduck=self.lameduck),
            Every(PERIOD, self.tick),
        )

    def tick(self, now: float) -> None:
        """Record how much later than a period after the last call this one comes."""
        if self._due is not None:
            late = max(0.0, now - self._due)
            self._durations.add(late)
            if late > LATE:
                self._log.warning(
                    "/health would have answered %.3f s late: the process is overloaded", late
                )
        self._due = now + PERIOD


def _ok(headers: dict[str, str]) -> tuple[int, str, bytes]:
    return 200, "text/plain; charset=utf-8", b"OK"


def setup(directives: list[Directive], cx: Setup) -> list[Plugin]:
    """`health [ADDRESS] { lameduck DURATION }`"""
    address, lameduck = DEFAULT_ADDRESS, 0.0
    for directive in directives:
        if directive is not directives[-1]:
            cx.problems.warn(
                directive.word, f"'health' counts once; line {directives[-1].word.line} is used"
            )
        address = DEFAULT_ADDRESS
        if cx.arg_count(directive, 0, 1) and directive.args:
            address = cx.listen_address(directive.args[0])
        for option in directive.options or ():
            if option.name != "lameduck":
                cx.unknown_option(option, ("lameduck",))
            elif cx.arg_count(option, 1, 1):
                lameduck = cx.duration(option.args[0])
    return [Health(address, lameduck, cx)]
