"""`python -m kdns` is the command `kdns`."""

from __future__ import annotations

from kdns.cli import main

main()
