"""The command line: flags in, exit code out.

Decides which command runs and how its outcome is told to a person or a script; what the
commands do is app.py's and server/client.py's business, imported when a command needs it so
that `kdns --help` stays quick. CoreDNS's own single-dash flags work with and without the word
`serve`, for the stock Deployment passes `-conf /etc/coredns/Corefile` and nothing else.

Exit codes: 0 well; 1 it failed (for `query`: an rcode other than NOERROR, or no answer);
2 wrong usage or configuration.
"""

from __future__ import annotations

import importlib
import ipaddress
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import click

from kdns import flags
from kdns.errors import ConfigError, KdnsError

if TYPE_CHECKING:
    from kdns.server.client import Exchange, Server

USAGE_ERROR = 2
DEFAULT_PORT = 53
DEFAULT_CONF = "Corefile"
# What CoreDNS serves where there is no Corefile (reference 2.5).
DEFAULT_COREFILE = ".:{port} {{\n    whoami\n    log\n}}\n"
STDIN = "stdin"
# The Pod ranges of kubeadm's documentation, and of Pods made from manifests.
DEFAULT_CLUSTER_CIDR = "10.244.0.0/16,fd00:10:244::/56"
DEFAULT_API_PORT = 6443  # kube-apiserver's
DEFAULT_UP_DNS_PORT = 10053  # needs no root, and is not multicast DNS's 5353


# Commands that stand in modules of their own: word -> (module, what `kdns --help` says). Each
# module has a click command `command`; it is imported when it is asked for.
ELSEWHERE: dict[str, tuple[str, str]] = {
    "check": (
        "kdns.explain.check_command",
        "Hold registry, DNS and kernel rules against each other.",
    ),
    "node": ("kdns.node_command", "Run DNS and forwarding of a node in one process."),
    "top": ("kdns.explain.top_command", "Watch who asks what, what is wasted, and who is slow."),
    "trace": ("kdns.explain.trace_command", "Follow one request from search list to kernel rule."),
    "wait": ("kdns.explain.wait_command", "Wait until a name resolves and connects."),
}


class Commands(click.Group):
    """A group to which flags without a command mean `serve`, as CoreDNS takes them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands' words in order."""
        return sorted([*super().list_commands(ctx), *ELSEWHERE])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command; those in modules of their own are imported now."""
        if cmd_name not in ELSEWHERE:
            return super().get_command(ctx, cmd_name)
        command: click.Command = importlib.import_module(ELSEWHERE[cmd_name][0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing any."""
        rows = []
        for word in self.list_commands(ctx):
            if word in ELSEWHERE:
                rows.append((word, ELSEWHERE[word][1]))
            elif (own := super().get_command(ctx, word)) is not None and not own.hidden:
                rows.append((word, own.get_short_help_str(70)))
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `serve` in front of CoreDNS's flags."""
        if args and args[0].startswith("-") and args[0] not in ("-h", "-help", "--help"):
            args = ["serve", *args]
        elif args[:1] == ["-help"]:
            args = ["--help"]
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Name the nearest command for a word that is none."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            from kdns.corefile import nearest

            known = self.list_commands(ctx)
            hint = nearest(args[0], known) or f"; the commands are {', '.join(known)}"
            raise click.UsageError(f"no command '{args[0]}'{hint}", ctx) from None


class ServeCommand(click.Command):
    """A command whose flags are also accepted in the forms of Go's flag package."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read `-p=53` and `-quiet=false`, and stop at the first argument that is no flag."""
        args = [word for arg in args for word in _go_flag(arg)]
        known = {flag for param in self.get_params(ctx) for flag in param.opts}
        for arg in args:
            # click would read an unknown -port as -p with the value "ort".
            flag = arg.partition("=")[0]
            if flag.startswith("-") and flag not in known:
                from kdns.corefile import nearest

                raise click.UsageError(f"no flag '{flag}'{nearest(flag, known)}", ctx)
        rest = super().parse_args(ctx, args)
        extra = ctx.params.pop("extra", ())
        if extra:
            isfile = os.path.exists(extra[0])
            hint = f"; did you mean '-conf {extra[0]}'?" if isfile else ""
            raise click.UsageError(f"unexpected argument '{extra[0]}' after the flags{hint}", ctx)
        return rest


def _go_flag(arg: str) -> tuple[str, ...]:
    name, equals, value = arg.partition("=")
    if equals and name in ("-p", "--p"):
        return ("-p", value)
    if equals and name.lstrip("-") in ("quiet", "version", "plugins") and name.startswith("-"):
        # strconv.ParseBool's words for false; anything else but true is left to be refused.
        if value in ("0", "f", "F", "false", "FALSE", "False"):
            return ()
        if value in ("1", "t", "T", "true", "TRUE", "True"):
            return (name,)
    return (arg,)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Flags without a command are those of 'serve': kdns -conf /etc/coredns/Corefile",
)
def cli() -> None:
    """A cluster's names and a node's forwarding, in CoreDNS's and kube-proxy's place."""


PORT = flags.Port(0, 65535)


@cli.command(cls=ServeCommand)
@click.option(
    "-conf", "--conf", metavar="FILE", envvar="KDNS_CONF",
    help="Corefile to load, or 'stdin'.  [default: ./Corefile; without one, whoami on the port]",
)  # fmt: skip
@click.option(
    "-dns.port", "--dns.port", "-p", "dns_port", metavar="N", envvar="KDNS_DNS_PORT",
    type=PORT, default=DEFAULT_PORT, show_default=True,
    help="Port of server blocks that name none; 0 picks a free one.",
)  # fmt: skip
@click.option(
    "-pidfile", "--pidfile", metavar="FILE", envvar="KDNS_PIDFILE", help="Write the process ID."
)
@click.option(
    "-quiet", "--quiet", is_flag=True, envvar="KDNS_QUIET", help="Do not print the first lines."
)
@click.option(
    "-control", "--control", metavar="PATH", default="", envvar="KDNS_CONTROL",
    help="Serve the control socket here, for 'kdns top' and others.  [default: none]",
)  # fmt: skip
@click.option("-version", "--version", is_flag=True, help="Print the version and leave.")
@click.option("-plugins", "--plugins", is_flag=True, help="List the plugins and leave.")
@click.argument("extra", nargs=-1, type=click.UNPROCESSED, metavar="")
def serve(
    conf: str | None,
    dns_port: int,
    pidfile: str | None,
    quiet: bool,
    control: str,
    version: bool,
    plugins: bool,
) -> int:
    """Run the DNS server; takes CoreDNS's own flags."""
    if version:
        return _print_version()
    if plugins:
        from kdns.plugins import ORDER

        click.echo("\n".join(sorted(ORDER)))
        return 0
    text = None
    if conf == STDIN:
        text = sys.stdin.read()
    elif conf is None and os.path.exists(DEFAULT_CONF):
        conf = DEFAULT_CONF
    elif conf is None:
        text = DEFAULT_COREFILE.format(port=dns_port)
    from kdns.runtime import collect_rarely

    collect_rarely()  # before all the rest is imported, which stays
    from kdns import app
    from kdns.logs import setup_logging

    setup_logging(sys.stdout, quiet)
    return app.serve(conf, text=text, dns_port=dns_port, pidfile=pidfile, control=control)


@cli.command()
def version() -> int:
    """Print the version, the platform and Python's version."""
    return _print_version()


def _print_version() -> int:
    from kdns.logs import start_lines

    click.echo("\n".join(start_lines()))
    return 0


@cli.group()
def corefile() -> None:
    """Work on Corefiles without serving them."""


@corefile.command()
@click.argument("file", metavar="FILE")
@click.option(
    "-dns.port", "--dns.port", "dns_port", metavar="N", envvar="KDNS_DNS_PORT", type=PORT,
    default=DEFAULT_PORT, show_default=True, help="As for 'serve'.",
)  # fmt: skip
def check(file: str, dns_port: int) -> int:
    """Report every mistake in FILE ('-' is standard input); 2 if it could not be served."""
    from kdns import app

    problems = app.check_corefile("/dev/stdin" if file == "-" else file, dns_port)
    for problem in problems:
        click.echo(str(problem))
    warnings = sum(problem.warning for problem in problems)
    errors = len(problems) - warnings
    found = ((errors, "error"), (warnings, "warning"))
    verdict = [] if errors else ["ok"]
    verdict += [_count(n, what) for n, what in found if n]
    click.echo(f"{file}: {', '.join(verdict)}")
    return USAGE_ERROR if errors else 0


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


@cli.command()
@click.option(
    "-f", "--manifests", "manifests", metavar="PATH", multiple=True,
    help="Apply this file or folder, and again when it changes; '-' is standard input. May be"
    " repeated.",
)  # fmt: skip
@click.option(
    "--data-dir", metavar="D", default="", envvar="KDNS_DATA_DIR",
    help="Keep objects, certificate and token here over restarts.  [default: nothing is kept]",
)  # fmt: skip
@click.option(
    "--bind", metavar="A", default="127.0.0.1", show_default=True,
    help="Address to listen on.",
)  # fmt: skip
@click.option(
    "--api-name", "api_names", metavar="NAME", multiple=True,
    help="One more name or address by which the API is reached: for its certificate, and with"
    " --insecure to be heard at all. May be repeated.",
)  # fmt: skip
@click.option(
    "--api-port", metavar="N", type=PORT, default=DEFAULT_API_PORT, show_default=True,
    envvar="KDNS_API_PORT", help="Port of the Kubernetes API; 0 picks a free one.",
)  # fmt: skip
@click.option(
    "--dns-port", metavar="N", type=PORT, default=DEFAULT_UP_DNS_PORT, show_default=True,
    envvar="KDNS_DNS_PORT", help="Port of DNS, UDP and TCP; 0 picks a free one.",
)  # fmt: skip
@click.option(
    "--proxy-mode", type=click.Choice(["none", *flags.MODES]), default="none", show_default=True,
    help="Forward Services on this host; iptables needs root.",
)  # fmt: skip
@click.option(
    "--write-kubeconfig", metavar="P", default="",
    help="Put the way to the API into this kubeconfig, as context 'kdns'.  [default: a file of"
    " its own, gone when this ends]",
)  # fmt: skip
@click.option(
    "--control", metavar="PATH", default="", envvar="KDNS_CONTROL",
    help="Serve the control socket here, for 'kdns top' and others.  [default: beside the"
    " kubeconfig, which names it]",
)  # fmt: skip
@click.option(
    "--ready-file", metavar="P", default="",
    help="Write the JSON line of '--output json' here when all is ready.",
)  # fmt: skip
@click.option(
    "--output", type=click.Choice(["text", "json"]), default="text", show_default=True,
    help="What to print when ready: words, or one line of JSON.",
)  # fmt: skip
@click.option(
    "--nodes", metavar="N", type=click.IntRange(1, 1000), default=1, show_default=True,
    help="How many Nodes there are.",
)  # fmt: skip
@click.option(
    "--pod-ready-delay", type=flags.Duration(0, 3600), default="0s", show_default=True,
    help="How long until a new Pod is ready.",
)  # fmt: skip
@click.option(
    "--pod-termination-delay", type=flags.Duration(0, 3600), default="0s", show_default=True,
    help="How long a deleted Pod is still there, terminating; its grace at most.",
)  # fmt: skip
@click.option(
    "--service-cluster-ip-range", "service_cidr", metavar="C", default="10.96.0.0/12",
    show_default=True, help="Where Services have their ClusterIPs; one CIDR a family.",
)  # fmt: skip
@click.option(
    "--pod-cidr", metavar="C", default="10.244.0.0/16", show_default=True,
    help="Where Pods have their addresses; one CIDR a family.",
)  # fmt: skip
@click.option(
    "--lb-range", metavar="C", default="203.0.113.0/24", show_default=True,
    help="Where Services of type LoadBalancer have theirs; one CIDR a family.",
)  # fmt: skip
@click.option(
    "--gate-timeout", type=flags.Duration(), default="2s", show_default=True,
    help="How long a new name waits for the rules of its Service, at most; 0: it does not.",
)  # fmt: skip
@click.option(
    "--drain", type=click.Choice(["ttl", "conntrack", "none"]), default="ttl", show_default=True,
    help="How long the rules of a name that is gone stay: as long as somebody may remember it,"
    " until no connection uses them, or not at all.",
)  # fmt: skip
@click.option("--insecure", is_flag=True, help="Serve the API as plain HTTP without a token.")
@click.option(
    "--corefile", "-conf", "--conf", metavar="FILE", default="",
    help="Serve DNS by this Corefile; its 'kubernetes' reads this registry unless it names"
    " another.  [default: kubeadm's]",
)  # fmt: skip
def up(**wishes: Any) -> int:
    """Run a Kubernetes API for Services, DNS and, if asked to, forwarding: all in one."""
    began = time.monotonic()
    from kdns.runtime import collect_rarely

    collect_rarely()  # before all the rest is imported, which stays
    from kdns.up import Wishes, command

    return command(Wishes(**wishes), began)


@cli.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def proxy(args: tuple[str, ...]) -> int:
    """Program this node's forwarding; takes kube-proxy's flags."""
    from kdns.proxy.flags import help_text, parse_flags

    parsed = parse_flags(args)
    if parsed.show_help:
        click.echo(help_text(), nl=False)
        return 0
    if parsed.show_version:
        return _print_version()
    from kdns import agent

    return agent.command(parsed)


@cli.command()
@flags.manifests(required=True)
@click.option(
    "--node", metavar="NAME", default="",
    help="Whose rules.  [default: the only Node there is; without Nodes, this host]",
)  # fmt: skip
@click.option(
    "--mode", type=click.Choice(flags.MODES), default="iptables", show_default=True,
    help="How the rules are written: for iptables-restore, nft, or ipvsadm and ipset.",
)  # fmt: skip
@click.option(
    "--family", type=click.Choice(["ipv4", "ipv6"]), default="ipv4", show_default=True,
    help="Whose rules.",
)  # fmt: skip
@click.option("--explain", is_flag=True, help="Say of each rule whose it is and what it is for.")
@click.option(
    "--cluster-cidr", metavar="C", default=DEFAULT_CLUSTER_CIDR, show_default=True,
    help="Where the cluster's Pods have their addresses, one CIDR a family; '' for nowhere.",
)  # fmt: skip
def rules(
    manifests: tuple[str, ...], node: str, mode: str, family: str, explain: bool, cluster_cidr: str
) -> int:
    """Print the rules of a node as text; the kernel is not touched."""
    from kdns import agent

    given = [
        f"--proxy-mode={mode}",
        f"--cluster-cidr={cluster_cidr}",
        f"--hostname-override={node}",
    ]
    text, notes = agent.rules_of(given, manifests, 4 if family == "ipv4" else 6, explain)
    for note in notes:
        click.echo(f"kdns: {note}", err=True)
    click.echo(text, nl=False)
    return 0


@cli.command()
@click.argument("stage", type=click.Choice(["snapshot", "zone", "table", "rules"]))
@click.option(
    "-conf", "--conf", metavar="FILE", envvar="KDNS_CONF",
    help="Read what this Corefile's kubernetes block reads.",
)  # fmt: skip
@flags.manifests()
@click.option("--node", metavar="NAME", default="", help="Whose table or rules.")
def dump(stage: str, conf: str | None, manifests: tuple[str, ...], node: str) -> int:
    """Print one stage between objects and what is made of them: the registry's objects, the DNS
    records, a node's forwarding table, or its rules ('kdns rules' prints them for one family)."""
    if conf is None and not manifests:
        raise click.UsageError("say what to read: -conf FILE or -f PATH")
    if stage in ("table", "rules"):
        if not manifests:
            raise click.UsageError(f"the {stage} of a node are made of manifests: -f PATH")
        from kdns import agent

        for line in agent.dump(stage, manifests, node, DEFAULT_CLUSTER_CIDR):
            click.echo(line)
        return 0
    from kdns import app

    for line in app.dump(stage, conf, manifests):
        click.echo(line)
    return 0


@cli.command()
@click.argument("name")
@click.argument("qtype", metavar="[TYPE]", default="")
@click.option(
    "--server", metavar="A", envvar="KDNS_QUERY_SERVER",
    help="Whom to ask.  [default: the first nameserver of /etc/resolv.conf]",
)  # fmt: skip
@click.option(
    "--port", metavar="N", envvar="KDNS_QUERY_PORT", type=flags.Port(1, 65535),
    default=DEFAULT_PORT, show_default=True,
)  # fmt: skip
@click.option(
    "--search", metavar="NS", multiple=True, envvar="KDNS_QUERY_SEARCH",
    help="Complete NAME as a pod of this namespace does; or with this domain. May be repeated.",
)  # fmt: skip
@click.option("--tcp", is_flag=True, help="Ask over TCP.")
@click.option("--short", is_flag=True, help="Print only the answers' values.")
@click.option(
    "--timeout", type=flags.Duration(0.001, 60), default="2s", show_default=True,
    help="How long to wait for each of three tries.",
)  # fmt: skip
def query(
    name: str,
    qtype: str,
    server: str | None,
    port: int,
    search: tuple[str, ...],
    tcp: bool,
    short: bool,
    timeout: float,
) -> int:
    """Ask a DNS server for NAME (an IP address: for its name). TYPE is A unless given."""
    from kdns.dns import types as t
    from kdns.dns.name import BadName
    from kdns.dns.reverse import reverse_name
    from kdns.server import client

    number = t.type_number(qtype or "A")
    if number is None:
        raise click.UsageError(f"'{qtype}' is not a record type; write A, SRV, PTR, TYPE65, ...")
    path = client.search_path(search)
    if _is_address(name) and (not qtype or number == t.PTR):
        names, number = [reverse_name(name)], t.PTR
    else:
        try:
            names = client.candidates(name, path)
        except (BadName, UnicodeEncodeError) as e:
            raise click.UsageError(f"not a domain name: {e}") from None
    whom = client.Server(server or client.first_nameserver(), port)
    tried: list[tuple[bytes, Exchange]] = []
    if len(names) > 1 and not short:
        click.echo(f";; search {' '.join(path)} (ndots {client.NDOTS})")
    for one in client.walk(whom, names, number, tcp=tcp, timeout=timeout):
        tried.append(one)
        if len(names) > 1 and not short:
            click.echo(f";; {_one_line(*one)}")
    exchange = client.best(tried)[1]
    for line in _short(exchange) if short else _sections(exchange, whom):
        click.echo(line)
    return 0 if exchange.message.rcode == t.NOERROR else 1


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _one_line(name: bytes, exchange: Exchange) -> str:
    from kdns.dns.name import render_name
    from kdns.dns.types import rcode_name

    message = exchange.message
    found = f", {_count(len(message.answer), 'record')}" if not message.rcode else ""
    return f"{render_name(name)} -> {rcode_name(message.rcode)}{found}"


def _short(exchange: Exchange) -> list[str]:
    from kdns.dns.text import render_rdata

    return [render_rdata(rr.type, rr.rdata) for rr in exchange.message.answer]


def _sections(exchange: Exchange, server: Server) -> list[str]:
    """Return the answer's lines, in the manner of dig."""
    from kdns.dns import message as m
    from kdns.dns import types as t
    from kdns.dns.name import render_name
    from kdns.dns.text import render_rr

    message = exchange.message
    flags = (("qr", m.QR), ("aa", m.AA), ("tc", m.TC), ("rd", m.RD), ("ra", m.RA), ("ad", m.AD),
             ("cd", m.CD))  # fmt: skip
    shown = " ".join(word for word, bit in flags if message.flags & bit)
    lines = [f";; status: {t.rcode_name(message.rcode)}, flags: {shown}, id: {message.id}"]
    if message.edns is not None:
        do = " do" if message.edns.do else ""
        lines.append(f";; EDNS: version {message.edns.version},{do} udp size {message.edns.size}")
    if message.question is not None:
        name, qtype, qclass = message.question
        lines += [
            ";; QUESTION",
            f";{render_name(name)} {t.class_name(qclass)} {t.type_name(qtype)}",
        ]
    for title, records in (
        ("ANSWER", message.answer),
        ("AUTHORITY", message.authority),
        ("ADDITIONAL", message.additional),
    ):
        if records:
            lines += [f";; {title}", *(render_rr(rr) for rr in records)]
    lines.append(
        f";; {exchange.seconds * 1000:.1f} ms, from {server} over {exchange.proto},"
        f" {exchange.size} octets"
    )
    return lines


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command line and leave with its exit code."""
    sys.exit(run(list(sys.argv[1:] if argv is None else argv)))


def run(argv: list[str]) -> int:
    """Run a command line and return its exit code; what goes wrong is said on stderr."""
    try:
        code: Any = cli.main(argv, prog_name="kdns", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as e:
        click.echo(e.format_message())
        return 0 if not argv else USAGE_ERROR
    except click.UsageError as e:
        where = e.ctx.command_path if e.ctx is not None else "kdns"
        return _complain(f"{e.format_message()} (see '{where} --help')", USAGE_ERROR)
    except click.ClickException as e:
        return _complain(e.format_message(), USAGE_ERROR)
    except ConfigError as e:
        for problem in e.problems:
            _complain(str(problem), USAGE_ERROR)
        return USAGE_ERROR
    except KdnsError as e:
        return _complain(str(e), 1)
    except (KeyboardInterrupt, click.Abort):
        return 130
    except BrokenPipeError:
        # The reader of our output has gone; Python must not find out again while it leaves.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, UnicodeDecodeError) as e:
        return _complain(str(e), 1)


def _complain(text: str, code: int) -> int:
    click.echo(f"kdns: {text}", err=True)
    return code
