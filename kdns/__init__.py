"""kdns: a cluster DNS server and service registry in one Python program.

async with kdns.Cluster() as cluster: ...     # see kdns/cluster.py
with kdns.LocalCluster() as cluster: ...
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdns.cluster import Cluster, LocalCluster

__all__ = ["Cluster", "LocalCluster", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the library at its first use: the command line does without."""
    if name in ("Cluster", "LocalCluster"):
        from kdns.runtime import without_collections

        with without_collections():
            from kdns import cluster
        return getattr(cluster, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
