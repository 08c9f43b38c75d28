"""kdns: a cluster DNS server and service registry in one Python program."""

from __future__ import annotations

__version__ = "0.1.0"
