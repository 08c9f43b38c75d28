"""`auto`: answers from the zone files of a folder; a file's name says its zone.

Decides which files are zones and when one comes or goes. Answering is file.py's ZonePlugin.
Unlike CoreDNS it does not look into folders below (WatchFolder reads one level).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from kdns.corefile import Directive, Option, Token
from kdns.dns.goregexp import BadPattern, Pattern, compile_pattern
from kdns.dns.message import Query
from kdns.dns.name import ROOT, BadName, parse_name, render_name
from kdns.plugins.file import RELOAD, REMOVED, ZonePlugin, load_zone
from kdns.plugins.plugin import Outcome, Plugin, WatchFolder, Work
from kdns.plugins.setup import Setup
from kdns.zone.zone import Zone
from kdns.zone.zonefile import Read

_PATTERN, _TEMPLATE = r"db\.(.*)", "{1}"
_OPTIONS = ("directory", "reload")
_PLACE = re.compile(r"\{(\w*)\}")


@dataclass(slots=True)
class Folder:
    """What one `auto` directive says. The template's {n} and {name} are groups of pattern."""

    path: str = ""
    pattern: Pattern = field(default_factory=lambda: compile_pattern(_PATTERN))
    template: str = _TEMPLATE
    interval: float = RELOAD

    def origin_of(self, name: str) -> bytes | None:
        """Return the zone a file of this name holds; None if it is no zone file.

        Raises BadName if what the template makes of it is no domain name.
        """
        groups = self.pattern.search(name)
        if groups is None:
            return None
        by_name = dict(zip(self.pattern.names, groups, strict=True))
        text = _PLACE.sub(
            lambda m: groups[int(m[1])] if m[1].isdecimal() else by_name[m[1]], self.template
        )
        return parse_name(text if text.endswith(".") else text + ".").lower()


class Auto(ZonePlugin):
    """zones -- what the server answers for at all, whatever files there are."""

    word = "auto"

    def __init__(
        self, allowed: Sequence[bytes], folder: Folder, read: Read, log: logging.Logger
    ) -> None:
        super().__init__()
        self._allowed = frozenset(allowed)
        self._folder = folder
        self._read = read
        self._log = log
        self.zones: dict[bytes, Zone | None] = {}
        self._loaded: dict[bytes, tuple[str, int]] = {}  # origin -> file name, content's hash

    def on_query(self, query: Query) -> Outcome:
        allowed = self._allowed
        if ROOT not in allowed:
            key = query.key
            at = 0
            while key[at:] not in allowed:
                size = key[at]
                if size == 0:
                    return None
                at += size + 1
        return super().on_query(query)

    def work(self) -> Sequence[Work]:
        return [WatchFolder(self._folder.path, self._folder.interval, self.load)]

    def load(self, files: dict[str, bytes], error: str) -> bool:
        """Take over what changed; a zone whose file is gone goes, unless reading failed."""
        if error:
            self._log.warning("cannot read all zone files: %s", error)
        changed = False
        names = self._names(files)
        for origin, name in names.items():
            changed |= self._load_file(origin, name, files[name])
        if not error:
            for origin in [o for o in self.zones if o not in names]:
                self._log.info("zone %s is gone with its file", render_name(origin))
                del self.zones[origin]
                self._loaded.pop(origin, None)
                changed = True
        return changed

    def _names(self, files: dict[str, bytes]) -> dict[bytes, str]:
        """Return the file of each zone; the first by name has it."""
        names: dict[bytes, str] = {}
        for name in sorted(files):
            try:
                origin = self._folder.origin_of(name)
            except BadName as e:
                self._log.warning("%s: its name makes no zone: %s", name, e)
                continue
            if origin is None:
                continue
            if origin in names:
                self._log.warning(
                    "two files for zone %s: %s is used, %s is not",
                    render_name(origin), names[origin], name,
                )  # fmt: skip
                continue
            names[origin] = name
        return names

    def _load_file(self, origin: bytes, name: str, content: bytes) -> bool:
        stamp = (name, hash(content))
        if self._loaded.get(origin) == stamp:
            return False
        self._loaded[origin] = stamp
        path = f"{self._folder.path}/{name}"
        zone = load_zone(content, origin, path, self._read, self.zones.get(origin), self._log)
        if zone is None and origin in self.zones:
            return False
        # A zone whose first file is broken answers SERVFAIL: its names are not to be asked
        # of the plugins below (CoreDNS does), who know another world.
        self.zones[origin] = zone
        return True


def setup(directives: list[Directive], cx: Setup) -> list[Plugin]:
    """`auto [ZONES...] { directory DIR [REGEXP TEMPLATE]; reload D }`"""
    plugins: list[Plugin] = []
    for directive in directives:
        folder = Folder()
        for option in directive.options or ():
            match option.name:
                case "directory":
                    if cx.arg_count(option, 1, 3):
                        _read_directory(option, folder, cx)
                case "reload":
                    if cx.arg_count(option, 1, 1):
                        folder.interval = cx.duration(option.args[0])
                case name if name in REMOVED:
                    cx.problems.warn(option.word, f"'{name}' does nothing: {REMOVED[name]}")
                case _:
                    cx.unknown_option(option, _OPTIONS)
        if not any(option.name == "directory" for option in directive.options or ()):
            cx.problems.error(directive.word, "'directory DIR' is required: where the files are")
        plugins.append(Auto(cx.zones(directive.args), folder, cx.read, cx.logger("auto")))
    return plugins


def _read_directory(option: Option, folder: Folder, cx: Setup) -> None:
    folder.path = cx.path(option.args[0].text)
    if len(option.args) == 1:
        return
    if len(option.args) == 2:
        cx.problems.error(
            option.args[1],
            "a pattern needs a template behind it: directory DIR REGEXP TEMPLATE, such as"
            r" directory zones (.*)\.zone {1}",
        )
        return
    try:
        pattern = compile_pattern(option.args[1].text)
    except BadPattern as e:
        cx.problems.error(option.args[1], f"not a regular expression: {e}")
        return
    if pattern.groups == 0:
        cx.problems.error(option.args[1], "the pattern needs a group in parentheses: the zone")
    if _check_template(option.args[2], pattern, cx):
        folder.pattern, folder.template = pattern, option.args[2].text


def _check_template(template: Token, pattern: Pattern, cx: Setup) -> bool:
    for place in _PLACE.findall(template.text):
        known = int(place) <= pattern.groups if place.isdecimal() else place in pattern.names[1:]
        if not known or not place:
            cx.problems.error(
                template, f"'{{{place}}}': the pattern has no such group ({pattern.groups} in all)"
            )
            return False
    return True
