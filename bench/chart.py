"""A bar chart as SVG: enough for a README, with no library."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

BAR, GAP, GROUP_GAP = 16, 4, 34
LEFT, WIDTH, RIGHT = 90, 560, 110
# Okabe and Ito's colours, told apart by all eyes.
COLOURS = ("#0072B2", "#E69F00", "#999999", "#009E73", "#CC79A7", "#56B4E9")


def bars(title: str, groups: Sequence[tuple[str, Sequence[tuple[str, float]]]]) -> str:
    """Return the chart. groups -- (title, [(name, value)])"""
    most = max(value for _, named in groups for _, value in named)
    names = list(dict.fromkeys(name for _, named in groups for name, _ in named))
    y = 40
    parts: list[str] = []
    for heading, named in groups:
        parts.append(f'<text x="{LEFT}" y="{y}" font-weight="bold">{escape(heading)}</text>')
        y += 8
        for name, value in named:
            width = max(1.0, value / most * WIDTH)
            colour = COLOURS[names.index(name) % len(COLOURS)]
            middle = y + BAR - 4
            parts += [
                f'<text x="{LEFT - 6}" y="{middle}" text-anchor="end">{escape(name)}</text>',
                f'<rect x="{LEFT}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{colour}"/>',
                f'<text x="{LEFT + width + 5:.1f}" y="{middle}">{value:,.0f}</text>',
            ]
            y += BAR + GAP
        y += GROUP_GAP - 8
    width = LEFT + WIDTH + RIGHT
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}"'
            f' viewBox="0 0 {width} {y}" font-family="sans-serif" font-size="12">',
            f'<rect width="{width}" height="{y}" fill="white"/>',
            f'<text x="{LEFT}" y="18" font-size="14">{escape(title)}</text>',
            *parts,
            "</svg>\n",
        ]
    )
