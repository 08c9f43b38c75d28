"""`kdns node` on the command line: which flags are ours, and which are kube-proxy's.

Decides that, and what our flags may say. All that this module does not know is a flag of
kube-proxy, which proxy/flags.py reads. What is done is node.py's.
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any, Final

import click

from kdns.errors import ConfigError, Problem
from kdns.flags import Duration

DRAINS: Final = ("ttl", "conntrack", "none")


class NodeCommand(click.Command):
    """A command whose unknown flags are kube-proxy's; -conf as CoreDNS has it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take what is ours, as far as it stands before a `--`, and leave the rest in order."""
        ours, rest = split_flags(args)
        if "--help" in rest or "-h" in rest:
            ours = ["--help"]
        ctx.obj = rest
        return super().parse_args(ctx, ours)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write kube-proxy's flags after ours."""
        from kdns.proxy.flags import help_text

        _, _, flags = help_text().partition("\n\n")[2].partition("\n\n")
        formatter.write("\nkube-proxy's flags. With --config, those marked * are ignored.\n\n")
        formatter.write(flags)


def split_flags(args: list[str]) -> tuple[list[str], list[str]]:
    """Return our flags, as click reads them, and kube-proxy's."""
    ours: list[str] = []
    rest: list[str] = []
    words = iter(args)
    for word in words:
        name, equals, value = word.partition("=")
        name = f"--{name.lstrip('-').replace('_', '-')}" if name.startswith("-") else name
        if name not in OURS:
            rest.append(word)
            continue
        if not equals:
            value = next(words, "")
            if not value and word == args[-1]:
                ours.append(name)  # click says that a value is missing
                continue
        ours.append(f"{name}={value}")
    return ours, rest


def _addresses(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> list[str]:
    """Read addresses: several in one value, with commas between, or the flag again; '' is none."""
    words = [one.strip() for text in value for one in text.split(",") if one.strip()]
    for one in words:
        try:
            found = ip_address(one)
        except ValueError:
            raise click.BadParameter(f"'{one}' is not an IP address") from None
        if found.is_unspecified or found.is_multicast or found.is_loopback:
            raise click.BadParameter(f"{one} cannot be the address of a DNS server of Pods")
    return words


@click.command(cls=NodeCommand, name="node", add_help_option=True)
@click.option(
    "-conf", "--conf", "conf", metavar="FILE", default="", envvar="KDNS_CONF",
    help="Serve DNS by this Corefile.  [default: kubeadm's, on the addresses below]",
)  # fmt: skip
@click.option(
    "--cluster-dns", metavar="IP,...", multiple=True, default=("10.96.0.10",), show_default=True,
    callback=_addresses,
    help="The cluster's DNS addresses, as kubelet writes them into Pods. This node answers at"
    " them itself; '' leaves them to the Service.",
)  # fmt: skip
@click.option(
    "--local-dns", metavar="IP,...", multiple=True, default=("169.254.20.10",), show_default=True,
    callback=_addresses, help="More addresses of this node's DNS server; '' for none.",
)  # fmt: skip
@click.option(
    "--health-address", metavar="IP:PORT", default="127.0.0.1:9256", show_default=True,
    help="Serve /healthz, of both halves, /livez and /readyz, of DNS, here; '' does not.",
)  # fmt: skip
@click.option(
    "--gate-timeout", type=Duration(), default="2s", show_default=True,
    help="How long a name waits for its rules at most; 0: names do not wait.",
)  # fmt: skip
@click.option(
    "--drain", type=click.Choice(DRAINS), default="ttl", show_default=True,
    help="When the rules of a name that is gone go: after the TTL it was told with, when no"
    " connection needs them, or at once.",
)  # fmt: skip
@click.option(
    "--control", metavar="PATH", default="/run/kdns/control.sock", show_default=True,
    envvar="KDNS_CONTROL", help="Serve the control socket here; '' does not.",
)  # fmt: skip
@click.pass_context
def command(ctx: click.Context, /, **flags: Any) -> int:
    """Run DNS and forwarding of this node in one process; takes kube-proxy's flags, too.

    It answers at the cluster's DNS address itself, past connection tracking, and shows no name
    before the rules that make it reachable are in the kernel. `kdns node --cleanup` removes all
    that it, or a proxy in any mode, wrote.
    """
    from kdns import __version__
    from kdns.node import Wishes
    from kdns.node import command as run
    from kdns.proxy.flags import parse_flags

    parsed = parse_flags(ctx.obj)
    if parsed.show_version:
        click.echo(f"kdns {__version__}")
        return 0
    _refuse(parsed.given)
    return run(
        Wishes(
            conf=flags["conf"],
            cluster_dns=tuple(flags["cluster_dns"]),
            local_dns=tuple(flags["local_dns"]),
            health=_place(flags["health_address"]),
            control=flags["control"],
            gate_timeout=flags["gate_timeout"],
            drain=flags["drain"],
            proxy=parsed,
        )
    )


# kube-proxy's and our proxy's flags that make no sense for a node.
NOT_HERE: Final = ("once", "dry-run", "init-only", "write-config-to", "portmap")


def _refuse(given: Any) -> None:
    problems = [
        Problem("command line", 0, f"--{name} is for `kdns proxy`")
        for name in NOT_HERE
        if name in given
    ]
    if problems:
        raise ConfigError(problems)


def _place(text: str) -> str:
    """Check where /healthz is. Raises ConfigError."""
    if not text:
        return ""
    host, colon, port = text.rpartition(":")
    try:
        if not colon:
            raise ValueError
        if host:
            ip_address(host.strip("[]"))
        if not 0 <= int(port) <= 65535:
            raise ValueError
    except ValueError:
        raise ConfigError(
            [Problem("--health-address", 0, f"'{text}' must be IP:PORT, as in 127.0.0.1:9256")]
        ) from None
    return text


OURS: Final = frozenset(
    option for param in command.params for option in (f"--{one.lstrip('-')}" for one in param.opts)
)
