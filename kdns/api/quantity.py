"""Amounts of resources as Kubernetes writes them: "100m", "1.5Gi", "1e3".

Decides what an amount is worth; who compares which amounts is validation.py's.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Final

_QUANTITY = re.compile(
    r"([+-]?)(\d+(?:\.\d*)?|\.\d+)(?:([eE][+-]?\d{1,3})|([numkMGTPE]|[KMGTPE]i)?)", re.ASCII
)
SUFFIXES: Final = {
    **{f"{letter}i": Decimal(1024) ** (i + 1) for i, letter in enumerate("KMGTPE")},
    **{letter: Decimal(10) ** (3 * (i + 1)) for i, letter in enumerate("kMGTPE")},
    **{letter: Decimal(10) ** (-3 * (i + 1)) for i, letter in enumerate("mun")},
}
# Longer text is nobody's amount, and arithmetic on it would be slow.
LONGEST = 64


def parse_quantity(value: object) -> Decimal | None:
    """Return what an amount is worth; None for what is none. Numbers of JSON are amounts too."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Decimal(str(value))
    if not isinstance(value, str) or len(value) > LONGEST:
        return None
    found = _QUANTITY.fullmatch(value)
    if found is None:
        return None
    sign, digits, exponent, suffix = found.groups()
    amount = Decimal(f"{sign}{digits}{exponent or ''}")
    return amount * SUFFIXES[suffix] if suffix else amount
