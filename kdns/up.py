"""`kdns up`: a cluster in one process, and the files, signals and words around it.

Decides what is said and written when it is ready, how manifests are followed, and how it
ends. What a cluster is made of is cluster.py's.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import click

from kdns import __version__
from kdns.api.access import NAME, write_private
from kdns.api.declare import Applied, Declared, apply_all, problem_at, prune, read_documents
from kdns.cluster import Cluster, broken_file
from kdns.control import ControlServer, Facts, facts_of
from kdns.errors import ConfigError, KdnsError, Problem
from kdns.logs import setup_logging
from kdns.runtime import raise_file_limit, settle_memory, take_turns_often
from kdns.server.loop import run_answering

if TYPE_CHECKING:
    from kdns.agent import Agent
    from kdns.registry.manifests import Document

log = logging.getLogger("kdns.up")

MANAGER: Final = "kdns-up"
STDIN: Final = "-"
INTERVAL: Final = 1.0  # seconds between two looks at the manifests
RULES_WAIT: Final = 10.0  # seconds the first rules may take before it counts as ready
LOOK: Final = 0.01
# What the control socket tells of the registry, also what forwarding does not read.
TOLD: Final = (
    "namespaces", "nodes", "services", "endpointslices", "pods", "servicecidrs",
    "deployments", "replicasets", "statefulsets",
)  # fmt: skip
LOCK_WAIT: Final = 5.0  # seconds that somebody else may take to write a kubeconfig
# How cluster.py's options are spelt on the command line.
FLAGS: Final[Mapping[str, str]] = {
    "api_names": "--api-name",
    "api_port": "--api-port",
    "dns_port": "--dns-port",
}


@dataclass(frozen=True, slots=True)
class Wishes:
    """The command line's flags."""

    manifests: tuple[str, ...] = ()
    data_dir: str = ""
    bind: str = "127.0.0.1"
    api_names: tuple[str, ...] = ()
    api_port: int = 0
    dns_port: int = 0
    insecure: bool = False
    proxy_mode: Literal["none", "iptables", "nftables", "ipvs", "userspace"] = "none"
    nodes: int = 1
    pod_ready_delay: float = 0.0
    pod_termination_delay: float = 0.0
    service_cidr: str = "10.96.0.0/12"
    pod_cidr: str = "10.244.0.0/16"
    lb_range: str = "203.0.113.0/24"
    gate_timeout: float = 2.0
    drain: Literal["ttl", "conntrack", "none"] = "ttl"
    corefile: str = ""
    control: str = ""
    write_kubeconfig: str = ""
    ready_file: str = ""
    output: Literal["text", "json"] = "text"


def command(wishes: Wishes, began: float) -> int:
    """Run until a signal comes; return the exit code. Raises KdnsError.

    began -- time.monotonic() of the start
    """
    setup_logging(sys.stderr, quiet=True)
    raise_file_limit()
    take_turns_often()  # a commit's thread, done, does not wait for a busy loop
    try:
        followed = Followed(wishes.manifests)
        # A broken file is said before anything is started. Not on the loop: a person may be
        # typing, and Ctrl-C is to end that, too.
        first = followed.look()
        if first.problems:
            raise ConfigError(first.problems)
        run_answering(_Up(wishes, began).run(followed, first))
    except ConfigError as e:
        spelt = [Problem(FLAGS.get(p.file, p.file), p.line, p.text) for p in e.problems]
        raise ConfigError(spelt) from None
    return 0


class _Up:
    """One run."""

    def __init__(self, wishes: Wishes, began: float) -> None:
        self.wishes = wishes
        self._began = began
        self._stop = asyncio.Event()
        self._why: BaseException | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._agent: Agent | None = None
        self._control: ControlServer | None = None
        self._agent_task: asyncio.Task[None] | None = None
        self.cluster = Cluster(
            nodes=wishes.nodes,
            tls=not wishes.insecure,
            data_dir=wishes.data_dir,
            bind=wishes.bind,
            api_names=wishes.api_names,
            api_port=wishes.api_port,
            dns_port=wishes.dns_port,
            service_cidr=wishes.service_cidr,
            pod_cidr=wishes.pod_cidr,
            lb_range=wishes.lb_range,
            pod_ready_delay=wishes.pod_ready_delay,
            pod_termination_delay=wishes.pod_termination_delay,
            node_addresses=_node_addresses(wishes),
            upstream="/etc/resolv.conf",
            corefile=wishes.corefile,
            guest=False,
            gate_timeout=None if wishes.proxy_mode == "none" else wishes.gate_timeout,
            control=wishes.control,
        )

    async def run(self, followed: Followed, first: Look) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, self._reload)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._stop.set)
        wishes = self.wishes
        if wishes.proxy_mode not in ("none", "userspace"):
            _check_permission()
        if wishes.ready_file:
            Path(wishes.ready_file).unlink(missing_ok=True)
        stopped = asyncio.create_task(self._stop.wait())
        try:
            work = asyncio.create_task(self._bring_up(followed, first))
            await asyncio.wait((work, stopped), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
                await self._until_stopped(stopped)
            else:  # asked to end while still starting
                work.cancel()
                await asyncio.wait((work,))
        finally:
            stopped.cancel()
            await self._end()
        if self._why is not None:
            raise self._why

    def _reload(self) -> None:
        if self.cluster.app is not None:
            self.cluster.app.reload_soon()

    async def _bring_up(self, followed: Followed, first: Look) -> None:
        wishes = self.wishes
        await self.cluster.start()
        self._control = ControlServer(self.cluster.control, self._facts())
        await self._control.start()
        if wishes.manifests:
            problems = await followed.take(self.cluster, first)
            if problems:
                raise ConfigError(problems)
        if wishes.proxy_mode != "none":
            await self._start_proxy()
        await self.cluster.settle()
        if wishes.write_kubeconfig:
            path = Path(wishes.write_kubeconfig)
            await asyncio.to_thread(merge_kubeconfig, path, self.cluster.kubeconfig_dict)
        self._tell_ready()
        settle_memory()
        if wishes.manifests:
            self._tasks.append(asyncio.create_task(self._follow(followed)))

    async def _until_stopped(self, stopped: asyncio.Task[Any]) -> None:
        ends: list[asyncio.Task[Any]] = [stopped, *self._tasks]
        if self._agent_task is not None:
            ends.append(self._agent_task)
        done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if not task.cancelled() and (error := task.exception()) is not None:
                self._why = error

    def _facts(self) -> Facts:
        app = self.cluster.app
        assert app is not None
        return facts_of(
            "up",
            app.any_pipeline,
            app=app,
            node=self.cluster.forwarder,
            mode=self.wishes.proxy_mode,
            cluster_cidr=self.wishes.pod_cidr,
            objects=lambda: [one for plural in TOLD for one in self.cluster.list(plural, "")],
            config=lambda: None if self._agent is None else self._agent.config,
        )

    async def _end(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._control is not None:
            await self._control.stop()
        if self._agent is not None and self._agent_task is not None:
            self._agent.stop()
            await asyncio.wait((self._agent_task,))
            # The addresses that the rules forward end with this process.
            await self._agent.clean_up()
        await self.cluster.stop()
        if self.wishes.ready_file:
            Path(self.wishes.ready_file).unlink(missing_ok=True)

    # --- manifests ------------------------------------------------------------------------

    async def _follow(self, followed: Followed) -> None:
        failed = ""
        while True:
            await asyncio.sleep(INTERVAL)
            look = await asyncio.to_thread(followed.look)
            for problem in look.problems:
                log.error("%s; what was applied stays", problem)
            if look.broken or not look.changed:
                continue
            try:
                problems = await followed.take(self.cluster, look)
            except KdnsError as e:
                # Tried again at the next look; said once.
                if str(e) != failed:
                    log.error("the manifests are not applied: %s", e)
                failed = str(e)
                continue
            failed = ""
            for problem in problems:
                log.error("%s", problem)
            log.info("applied %s", ", ".join(sorted(look.changed)))

    # --- forwarding -----------------------------------------------------------------------

    async def _start_proxy(self) -> None:
        from kdns import agent
        from kdns.proxy.flags import parse_flags, settle
        from kdns.registry.spec import KubeSpec

        node = self.cluster.forwarder
        flags = [
            f"--proxy-mode={self.wishes.proxy_mode}",
            f"--cluster-cidr={self.wishes.pod_cidr}",
            f"--hostname-override={node}",
            # A guest on this host: its ports and limits stay as they are.
            "--healthz-bind-address=",
            "--metrics-bind-address=",
            "--conntrack-max-per-core=0",
            "--conntrack-min=0",
            "--conntrack-tcp-timeout-established=0s",
            "--conntrack-tcp-timeout-close-wait=0s",
            "--oom-score-adj=0",
        ]
        config = settle(parse_flags(flags), None).config
        spec = KubeSpec(node=node, only_forwarded=True)
        assert self.cluster.app is not None
        self._agent = agent.Agent(
            config, spec, node, follow=self.cluster.feed.follow,
            pipeline=self.cluster.app.registry_pipeline(), drain=self.wishes.drain,
            longest_ttl=self.cluster.app.longest_ttl,
        )  # fmt: skip
        self.cluster.app.moved = self._agent.move
        self._agent_task = asyncio.create_task(self._agent.run(), name="kdns proxy")
        until = time.monotonic() + RULES_WAIT
        while not self._agent_task.done() and time.monotonic() < until:
            sides = self._agent.sides.values()
            if sides and all(side.synced is not None for side in sides):
                return
            await asyncio.sleep(LOOK)
        if self._agent_task.done():
            await self._agent_task  # raises why
        log.warning("the rules are not written yet after %g s; see above", RULES_WAIT)

    # --- what is said ---------------------------------------------------------------------

    def _tell_ready(self) -> None:
        if not _only_here(self.wishes.bind):
            log.warning("--bind %s: %s", self.wishes.bind, _open_to(self.wishes.insecure))
        host, port = self.cluster.dns
        dns = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        path = os.path.abspath(self.wishes.write_kubeconfig or self.cluster.kubeconfig)
        facts = {
            "api": self.cluster.api_url,
            "kubeconfig": path,
            "control": self.cluster.control,
            "dns": dns,
            "proxyMode": self.wishes.proxy_mode,
            "pid": os.getpid(),
            "version": __version__,
        }
        line = json.dumps(facts)
        if self.wishes.ready_file:
            try:
                write_private(Path(self.wishes.ready_file), f"{line}\n".encode())
            except OSError as e:
                text = f"cannot be written: {e.strerror}"
                raise ConfigError([Problem(self.wishes.ready_file, 0, text)]) from None
        if self.wishes.output == "json":
            click.echo(line)
        else:
            click.echo(self._greeting(path, dns))

    def _greeting(self, path: str, dns: str) -> str:
        wishes = self.wishes
        host, port = self.cluster.dns
        proxy = {
            "none": "none: ClusterIPs have names, and nobody forwards to them"
                    " (as root: --proxy-mode iptables)",
        }.get(wishes.proxy_mode, f"{wishes.proxy_mode}, removed when this ends")  # fmt: skip
        open_to = "plain HTTP, for everybody who reaches it" if wishes.insecure else "TLS, token"
        lines = [
            f"kdns {__version__} is up after {time.monotonic() - self._began:.2f} s",
            f"  API     {self.cluster.api_url}  ({open_to})",
            f"  DNS     {dns}  (cluster.local; other names go to /etc/resolv.conf's servers)"
            if not wishes.corefile else f"  DNS     {dns}  ({wishes.corefile})",
            f"  proxy   {proxy}",
            f"  data    {os.path.abspath(wishes.data_dir) if wishes.data_dir else 'in memory'}",
            "",
            f"  export KUBECONFIG={path}",
            "  kubectl get services --all-namespaces",
            f"  dig @{host} -p {port} kubernetes.default.svc.cluster.local +short",
        ]  # fmt: skip
        return "\n".join(lines)


def _only_here(bind: str) -> bool:
    """True for an address that other machines do not reach."""
    with suppress(ValueError):
        return ipaddress.ip_address(bind).is_loopback
    return bind == "localhost"


def _open_to(insecure: bool) -> str:
    if insecure:
        return (
            "other machines reach the API, and with --insecure everybody there may read and"
            " change all of it, Secrets too"
        )
    return "other machines reach the API, with the token, and DNS, without"


def _node_addresses(wishes: Wishes) -> list[str]:
    """Return what the first Node's address is: where forwarding is written, this host's."""
    if wishes.proxy_mode == "none":
        return []
    from kdns.kernel.netlink import default_address

    found = default_address(4)
    return [found] if found else []


def _check_permission() -> None:
    from kdns.agent import check_permission

    try:
        check_permission()
    except KdnsError as e:
        raise KdnsError(f"--proxy-mode: {e}; or leave it out, for names alone") from None


# --- manifests that are followed -------------------------------------------------------------


@dataclass(slots=True)
class Look:
    """What a look at the files found.

    changed  -- files that are new, gone or different
    broken   -- nothing is to be applied
    problems -- why, as far as it was not said before
    """

    declared: list[Declared] = field(default_factory=list)
    changed: frozenset[str] = frozenset()
    broken: bool = False
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)


@dataclass(slots=True)
class _File:
    stamp: tuple[int, int, int]
    documents: Sequence[Document] = ()


class Followed:
    """Files and folders whose objects are to be there; "-" is standard input, read once."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = tuple(paths)
        self._files: dict[str, _File] = {}
        self._waiting: set[str] = set()  # changed, and not yet applied
        self._said: set[str] = set()
        self._stdin: Sequence[Document] | None = None

    def look(self) -> Look:
        """Read what has changed; blocks."""
        problems: list[Problem] = []
        documents: list[Document] = []
        seen: set[str] = set()
        for path in self._paths:
            if path == STDIN:
                documents += self._read_stdin(problems)
                continue
            from kdns.source.manifests import MAX_FILES, files_below  # YAML's reader with it

            found = list(islice(files_below(path), MAX_FILES + 1))
            if len(found) > MAX_FILES:
                problems.append(Problem(path, 0, f"holds over {MAX_FILES} manifests"))
                continue
            if not found and not os.path.isdir(path):
                problems.append(Problem(path, 0, "does not exist"))
                continue
            for file in found:
                if file not in seen:
                    seen.add(file)
                    documents += self._read(file, problems)
        for gone in self._files.keys() - seen:
            del self._files[gone]
            self._waiting.add(gone)
        declared, wrong = read_documents(documents)
        problems += [one for one in wrong if not one.warning]
        return Look(
            declared,
            frozenset(self._waiting),
            bool(problems),
            self._unsaid(problems),
            [one for one in wrong if one.warning] if self._waiting else [],
        )

    def _unsaid(self, problems: list[Problem]) -> list[Problem]:
        """Return those not said before; what is over may be said again."""
        new = [one for one in problems if str(one) not in self._said]
        self._said = {str(one) for one in problems}
        return new

    def _read(self, path: str, problems: list[Problem]) -> Sequence[Document]:
        from kdns.source.manifests import MAX_FILE, parse_documents

        known = self._files.get(path)
        try:
            status = os.stat(path)
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
            if known is not None and known.stamp == stamp:
                return known.documents
            if status.st_size > MAX_FILE:
                problems.append(Problem(path, 0, f"over {MAX_FILE >> 20} MiB; not read"))
                return ()
            content = Path(path).read_bytes()
            documents = parse_documents(path, content)
        except OSError as e:
            problems.append(Problem(path, 0, e.strerror or str(e)))
            return ()
        except ValueError as e:
            problems.append(broken_file(str(e)))
            return ()
        self._files[path] = _File(stamp, documents)
        self._waiting.add(path)
        return documents

    def _read_stdin(self, problems: list[Problem]) -> Sequence[Document]:
        from kdns.source.manifests import MAX_FILE, parse_documents

        if self._stdin is None:
            self._stdin = ()
            try:
                self._stdin = parse_documents("stdin", sys.stdin.buffer.read(MAX_FILE))
            except ValueError as e:
                problems.append(broken_file(str(e)))
            self._waiting.add("stdin")
        return self._stdin

    async def take(self, cluster: Cluster, look: Look) -> list[Problem]:
        """Apply what has changed and take away what is declared no more; return what was
        refused. Raises ApiError if the store takes nothing."""
        for warning in look.warnings:
            log.warning("%s; skipped", warning.text if not warning.file else _plain(warning))
        changed = [one for one in look.declared if _file_of(one.where) in look.changed]
        applied = await apply_all(cluster.objects, changed, MANAGER)
        for one in applied:
            if one.error is not None and one.error.code >= 500:
                raise one.error
        await prune(cluster.objects, [one.key for one in look.declared], MANAGER)
        self._waiting -= look.changed
        await cluster.settle()
        return [_refusal(one) for one in applied if one.error is not None]


def _plain(problem: Problem) -> str:
    return str(Problem(problem.file, problem.line, problem.text))


def _refusal(one: Applied) -> Problem:
    return problem_at(one.declared.where, f"{one.declared}: {one.error}")


def _file_of(where: str) -> str:
    return where.rpartition(":")[0] or where


# --- kubeconfig --------------------------------------------------------------------------------


def merge_kubeconfig(path: Path, ours: Mapping[str, Any]) -> None:
    """Put our cluster, user and context into a kubeconfig, made if there is none; what else is
    in it stays, also what others write meanwhile. Raises ConfigError."""
    import yaml  # only for those who ask for it

    path = path.resolve()  # what a link points to, not the link, is replaced
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            _merge(path, ours)
    except OSError as e:
        raise ConfigError([Problem(str(path), 0, f"cannot be written: {e.strerror}")]) from None
    except (ValueError, AttributeError, yaml.YAMLError):
        raise ConfigError(
            [Problem(str(path), 0, "is there and is not a kubeconfig; name another file")]
        ) from None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep out kubectl, which does likewise, and other runs of kdns while a file is changed."""
    lock = path.with_name(f"{path.name}.lock")
    until = time.monotonic() + LOCK_WAIT
    while True:
        try:
            os.close(os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            break
        except FileExistsError:
            if time.monotonic() > until:
                text = "is there: if nothing writes the kubeconfig now, remove it"
                raise ConfigError([Problem(str(lock), 0, text)]) from None
            time.sleep(LOOK)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)


def _merge(path: Path, ours: Mapping[str, Any]) -> None:
    import yaml

    merged: dict[str, Any] = {}
    with suppress(FileNotFoundError):
        merged = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(merged, dict) or any(
        not isinstance(merged.get(part) or [], list) for part in _PARTS
    ):
        raise ValueError("not a kubeconfig")
    for part in _PARTS:
        others = [one for one in merged.get(part) or [] if one.get("name") != NAME]
        merged[part] = [*others, *ours[part]]
    merged |= {name: ours[name] for name in ("apiVersion", "kind", "current-context")}
    write_private(path, yaml.safe_dump(merged, sort_keys=False).encode())


_PARTS: Final = ("clusters", "users", "contexts")
