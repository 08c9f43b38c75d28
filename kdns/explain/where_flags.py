"""What `kdns trace` and `kdns check` look at, as flags.

Decides how it is said on a command line and gives the command one Where; what is found there,
and which of the flags exclude each other, is evidence.py's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from kdns import flags
from kdns.explain.evidence import Where

OPTIONS = (
    flags.manifests(),
    click.option(
        "--kubeconfig", metavar="FILE", default="",
        help="Look at this cluster; neither kdns nor root is needed.  [default: the user's, where"
        " no kdns is found]",
    ),
    click.option("--context", metavar="NAME", default="", help="Which context of it."),
    flags.control(),
    click.option(
        "--corefile", "-conf", "--conf", metavar="FILE", default="",
        help="What answers names.  [default: the cluster's; for manifests kubeadm's]",
    ),
    click.option(
        "--node", metavar="NAME", default="",
        help="Whose rules, where nothing else tells.  [default: the first]",
    ),
    click.option(
        "--mode", type=click.Choice(flags.MODES), default=None,
        help="Of the rules that are computed.  [default: as kdns runs, or of those that are"
        " there; else iptables]",
    ),
    click.option(
        "--cluster-cidr", metavar="C", default=None,
        help="Where Pods have their addresses.  [default: as kdns runs; else kdns rules' own]",
    ),
    click.option(
        "--no-kernel", is_flag=True, help="Do not look at this host's rules and settings.",
    ),
)  # fmt: skip


def looks_at(command: Callable[..., int]) -> Callable[..., int]:
    """Give a command all of these; it is called with `where` in their place."""

    @wraps(command)
    def with_where(
        *, manifests: tuple[str, ...], kubeconfig: str, context: str, control: str, corefile: str,
        node: str, mode: Any, cluster_cidr: str | None, no_kernel: bool, **others: Any,
    ) -> int:  # fmt: skip
        where = Where(
            manifests=manifests, kubeconfig=kubeconfig, context=context, control=control,
            corefile=corefile, node=node, mode=mode or "", cluster_cidr=cluster_cidr,
            use_kernel=not no_kernel,
        )  # fmt: skip
        return command(where=where, **others)

    decorated: Callable[..., int] = with_where
    for option in reversed(OPTIONS):
        decorated = option(decorated)
    return decorated
