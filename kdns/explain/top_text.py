"""The pages of `kdns top`: what a summary looks like on a terminal of any width.

Decides rows, columns and colours; what the numbers are is top.py's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

WIDE = 78  # columns from which on every column is shown
HEAD = 4  # lines above the tables
TITLE = 2  # lines of a table besides its rows

# rcode -> style; others are plain
STYLES = {"NOERROR": "green", "NXDOMAIN": "yellow", "SERVFAIL": "red", "REFUSED": "red"}


def page(summary: Mapping[str, Any], source: str, width: int, height: int | None) -> RenderableType:
    """Return all of a summary, with no more rows than fit. height None: as many as there are"""
    storms, upstreams = summary["storms"], summary["upstreams"]
    questions = summary["questions"]
    if height is not None:
        room = max(height - HEAD - 1, TITLE + 1)
        upstreams = upstreams[: max(0, min(3, room // 6))]
        storms = storms[: max(0, min(3, room // 8))]
        used = (TITLE + len(upstreams) if upstreams else 0) + (
            TITLE + 2 * len(storms) if storms else 0
        )
        questions = questions[: max(1, room - used - TITLE)]
    parts: list[RenderableType] = [_head(summary, source)]
    if questions:
        parts.append(_questions(questions, width))
    if storms:
        parts.append(_storms(storms, width))
    if upstreams:
        parts.append(_upstreams(upstreams, width))
    if not questions:
        parts.append(Text("nobody has asked yet", "dim"))
    return Group(*parts)


def _head(summary: Mapping[str, Any], source: str) -> RenderableType:
    latency, cache = summary["latency_ms"], summary["cache"]
    first = Text(no_wrap=True, overflow="ellipsis")
    first.append(f"{summary['qps']:g}", "bold").append(" queries/s")
    first.append(f"  {summary['queries']} in {summary['seconds']:g} s", "dim")
    first.append(f"  {source}", "dim")
    second = Text(no_wrap=True, overflow="ellipsis")
    for rcode, count in summary["rcodes"].items():
        share = 100 * count / max(summary["queries"], 1)
        second.append(f"{rcode} {share:.0f}%  ", STYLES.get(rcode, ""))
    third = Text(no_wrap=True, overflow="ellipsis")
    third.append(
        f"latency p50 {_ms(latency['p50'])}  p90 {_ms(latency['p90'])}"
        f"  p99 {_ms(latency['p99'])}  max {_ms(latency['max'])}"
    )
    if cache["hit_ratio"] is not None:
        third.append(f"  cache hits {100 * cache['hit_ratio']:.0f}%")
    if summary["lost"]:
        third.append(f"  {summary['lost']} lost", "red")
    return Group(first, second, third)


def _table(title: str, columns: Sequence[str], first: int = 0) -> Table:
    """Columns that begin with "<" are names, which give way where it is narrow. first -- how
    wide the first one is to be at most; 0: it shares what there is"""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False,
        expand=True, header_style="dim",
    )  # fmt: skip
    for one in columns:
        name = one.removeprefix("<")
        if one != name:
            width = first if not table.columns and first else None
            table.add_column(
                name, overflow="ellipsis", no_wrap=True, width=width, ratio=None if width else 1
            )
        else:
            table.add_column(name, justify="right", no_wrap=True)
    return table


def _client_width(rows: Sequence[Mapping[str, Any]], width: int) -> int:
    """Return the width for clients, so that names have the rest: a third at most."""
    return max(6, min(width // 3, max(len(row["client"]) for row in rows)))


def _questions(rows: Sequence[Mapping[str, Any]], width: int) -> Table:
    wide = width >= WIDE
    table = _table(
        "who asks what",
        ["<client", "<name", "q/s", *(["queries", "nxdomain", "failed"] if wide else ["nx"])],
        _client_width(rows, width),
    )
    for row in rows:
        style = "red" if row["failed"] else "yellow" if row["nxdomain"] else ""
        nxdomain = str(row["nxdomain"] or "")
        more = [str(row["queries"]), nxdomain, str(row["failed"] or "")] if wide else [nxdomain]
        table.add_row(row["client"], row["name"], f"{row['qps']:g}", *more, style=style)
    return table


def _storms(rows: Sequence[Mapping[str, Any]], width: int) -> Group:
    table = _table(
        "wasted by search lists", ["<client", "<name", "look-ups", "wasted", "each"],
        _client_width(rows, width),
    )  # fmt: skip
    parts: list[RenderableType] = []
    for row in rows:
        table.add_row(
            row["client"], row["name"], str(row["lookups"]), str(row["wasted"]),
            f"{row['wasted_per_lookup']:g}", style="yellow",
        )  # fmt: skip
        parts.append(Text(f"  {row['name']}: {row['advice']}", "cyan", overflow="fold"))
    return Group(table, *parts)


def _upstreams(rows: Sequence[Mapping[str, Any]], width: int) -> Table:
    wide = width >= WIDE
    table = _table(
        "slowest upstreams",
        ["<upstream", "p50", "p90", "p99", *(["max", "queries", "failed"] if wide else ["failed"])],
    )
    for row in rows:
        failed = str(row["failed"] or "")
        more = [_ms(row["max"]), str(row["queries"]), failed] if wide else [failed]
        table.add_row(
            row["upstream"], *(_ms(row[key]) for key in ("p50", "p90", "p99")), *more,
            style="red" if row["failed"] else "",
        )  # fmt: skip
    return table


def _ms(milliseconds: float) -> str:
    if milliseconds >= 1000:
        return f"{milliseconds / 1000:.1f} s"
    return f"{milliseconds:.3g} ms"
