"""What several commands ask on their command lines: ports, durations, and where to look.

Decides how these are written, what is right and what is told when they are wrong, so that one
word means the same to every command. What is done with them is each command's own. kube-proxy's
flags, which `kdns proxy` and `kdns node` take, are proxy/flags.py's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

DAY = 86400.0  # seconds
# kdns/proxy/config.py's, which would cost each command its import.
MODES = ("iptables", "nftables", "ipvs", "userspace")


class Port(click.IntRange):
    """A port number."""

    name = "port number"


class Duration(click.ParamType):  # type: ignore[type-arg]  # older ones have none
    """Seconds, written as a Go duration ("250ms", "1m30s") or as a number of them.

    least, most -- seconds, both allowed; most None: as much as can be written
    """

    name = "duration"  # which `--help` shows as DURATION

    def __init__(self, least: float = 0.0, most: float | None = None) -> None:
        self.least, self.most = least, most

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the seconds."""
        # Imported by the command that reads one, not by each.
        from kdns.proxy.settings import parse_duration

        text = str(value)
        number = text.isascii() and text.replace(".", "", 1).isdecimal()
        seconds = parse_duration(f"{text}s" if number else text)
        if seconds is None:
            self.fail(
                f"'{text}' is not a duration; write it as 500ms, 30s or 1m30s, or as a number of"
                " seconds", param, ctx,
            )  # fmt: skip
        if seconds < self.least or (self.most is not None and seconds > self.most):
            self.fail(f"'{text}' is out of range; it must be {self._range()}", param, ctx)
        return seconds

    def _range(self) -> str:
        from kdns.proxy.settings import render_duration

        least = render_duration(self.least)
        return f"{least} or more" if self.most is None else f"{least} to {self.most:g}s"


def manifests(*, required: bool = False) -> Callable[[Decorated], Decorated]:
    """Give a command -f: what it looks at in place of anything that runs."""
    return click.option(
        "-f", "--manifests", "manifests", metavar="PATH", multiple=True, required=required,
        help="Look at this file or folder of manifests; nothing need run. May be repeated.",
    )  # fmt: skip


def control() -> Callable[[Decorated], Decorated]:
    """Give a command --control: the running kdns that it looks at (control.find_control)."""
    return click.option(
        "--control", metavar="PATH", default="",
        help="Look at the running kdns of this control socket.  [default: $KDNS_CONTROL, the one"
        " in the kubeconfig, or /run/kdns/control.sock]",
    )  # fmt: skip
