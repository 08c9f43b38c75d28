"""`bind`: the addresses a server block listens on.

Decides what may stand for an address. Which addresses an interface has is app.py's to find
out; what is neither an address nor an interface is reported there.
"""

from __future__ import annotations

import re
from ipaddress import ip_address

from kdns.corefile import Directive, Token
from kdns.plugins.plugin import Plugin
from kdns.plugins.setup import Setup

_INTERFACE = re.compile(r"[^\s/:]{1,15}")  # Linux: IFNAMSIZ less its final zero octet
_DOTTED = re.compile(r"[0-9.]+")


class Bind(Plugin):
    """One `bind` line: addresses or interface names, and those of them to leave out."""

    word = "bind"

    def __init__(self, addresses: tuple[str, ...], excepted: tuple[str, ...]) -> None:
        self.addresses = addresses
        self.excepted = excepted


def setup(directives: list[Directive], cx: Setup) -> list[Plugin]:
    """`bind ADDRESS|INTERFACE... { except ADDRESS|INTERFACE... }`, as often as wanted; an
    `except` counts for its own line only."""
    return [_bind(directive, cx) for directive in directives]


def _bind(directive: Directive, cx: Setup) -> Bind:
    if not directive.args:
        cx.problems.error(
            directive.word, "'bind' needs at least one address or interface name, as in bind lo"
        )
    excepted: list[Token] = []
    for option in directive.options or ():
        if option.name != "except":
            cx.unknown_option(option, ("except",))
        elif cx.arg_count(option, 1):
            excepted += option.args
    return Bind(_checked(directive.args, cx), _checked(excepted, cx))


def _checked(tokens: tuple[Token, ...] | list[Token], cx: Setup) -> tuple[str, ...]:
    for token in tokens:
        if not _is_address(token.text) and (
            not _INTERFACE.fullmatch(token.text) or _DOTTED.fullmatch(token.text)
        ):
            hint = ""
            host, _, end = token.text.replace("/", ":").rpartition(":")
            if end.isdecimal() and _is_address(host.strip("[]")):
                hint = f"; write 'bind {host.strip('[]')}', ports stand in the block's key"
            cx.problems.error(token, f"not a valid IP address or interface name: '{token}'{hint}")
    return tuple(token.text for token in tokens)


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True
