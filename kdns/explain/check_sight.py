"""Reads what `kdns check` compares and evidence.py does not: all rules there are, DNS servers'
answers, and settings of this host.

Decides whom to ask and what cannot be seen from here; what it means is for the comparers.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

from kdns.agent import host_name, table_for
from kdns.corefile import Corefile, ServerBlock, parse_corefile
from kdns.dns import types as t
from kdns.dns.name import parse_name
from kdns.dns.text import render_rdata
from kdns.errors import ApplyError, ConfigError, KdnsError, Problem
from kdns.explain.check_dns import Answer, Question
from kdns.explain.check_host import SYSCTLS, Host, Resolvers
from kdns.explain.check_kernel import IPVS_INTERFACE, HeldIpvs, Seen, Wanted
from kdns.explain.evidence import Evidence
from kdns.kernel.ipvs_netlink import addresses_by_place, held_servers
from kdns.kernel.netlink import node_addresses
from kdns.kernel.programs import find_variants, path_of, read_saved, run_program, which
from kdns.kernel.sysctl import is_tcp_liberal
from kdns.metrics import Metrics
from kdns.plugins import ORDER
from kdns.plugins.kubernetes import Kubernetes
from kdns.proxy.config import Mode
from kdns.proxy.nftables_rules import TABLE, WORD
from kdns.proxy.options import Family
from kdns.registry.objects import Key
from kdns.registry.snapshot import Snapshot, everything
from kdns.server.client import NoAnswer, Server, ask
from kdns.site import build_site

FAMILIES: Final[tuple[Family, ...]] = (4, 6)
READ_TIMEOUT: Final = 60.0  # seconds a program may take to print its rules
# Of one server; as many at a time, each of which it answers in well under a millisecond.
MOST_QUESTIONS: Final = 20_000
AT_ONCE: Final = 8
ANSWER_TIMEOUT: Final = 1.0
TRIES: Final = 2
RCODES: Final = {
    0: "NOERROR",
    1: "FORMERR",
    2: "SERVFAIL",
    3: "NXDOMAIN",
    4: "NOTIMP",
    5: "REFUSED",
}
QTYPES: Final = {"A": t.A, "AAAA": t.AAAA, "CNAME": t.A, "SRV": t.SRV}
# Where every distribution of Kubernetes has its DNS, by convention.
DNS_SERVICE: Final[Key] = ("kube-system", "kube-dns")
DNS_PORT_NAME: Final = "dns"
# Plugins that may answer, or change the question, before `kubernetes` sees it.
ANSWERS: Final = ("rewrite", "acl", "template", "hosts")
ZONE: Final = "cluster.local."


# --- the kernel -----------------------------------------------------------------------------


async def see_kernel(mode: Mode, written: bool, families: Collection[Family] = FAMILIES) -> Seen:
    """Return all rules of this network namespace, whoever wrote them. Raises ApplyError where
    they may not be read."""
    saved = await read_saved(families)
    tables = [await _nft_table(family) for family in families] if which("nft") else []
    ipvs = {}
    if os.path.exists(f"/proc/sys/net/ipv4/conf/{IPVS_INTERFACE}"):
        ipvs = {family: _ipvs(family) for family in families}
    return Seen(mode, saved, "".join(tables), written, ipvs)


def _ipvs(family: Family) -> HeldIpvs:
    """Return what IPVS holds; nothing where this kernel has none."""
    bound, others = addresses_by_place(family)
    try:
        return HeldIpvs(held_servers(family), bound, others)
    except ApplyError:
        return HeldIpvs({}, bound, others)


async def _nft_table(family: Family) -> str:
    """Return what kube-proxy's table holds; "" where there is none."""
    argv = (path_of("nft"), "-y", "-s", "list", "table", WORD[family], TABLE)
    status, output, _ = await run_program("nft", argv, READ_TIMEOUT)
    with output:
        text = output.read().decode("utf-8", "replace")
    return text if status == 0 else ""


async def rules_wanted(evidence: Evidence, seen: Seen) -> Wanted:
    """Return the forwarding of the node and what its rules are written with here."""
    node = evidence.node or host_name().lower()
    liberal = is_tcp_liberal()
    found = {}
    for family in FAMILIES:
        here = addresses_here(family)
        table, options = table_for(evidence.snapshot, evidence.config, family, node, here)
        variants = await find_variants(family)
        fully = all(one.random_fully for one in variants.values())
        if table.services or _has_rules(seen, family):
            options = replace(options, random_fully=fully, drop_invalid=not liberal)
            found[family] = table, options
    return found


def addresses_here(family: Family) -> list[str]:
    """Return the addresses of this network namespace: what a proxy here chooses NodePorts'
    addresses from. Raises ApplyError."""
    return [one.address.partition("%")[0] for one in node_addresses(family)]


def _has_rules(seen: Seen, family: Family) -> bool:
    """Say whether a family has rules, though no Service asks for any."""
    texts = [texts.get(family, "") for texts in seen.saved.values()]
    return any("\n:KUBE-SERVICES " in text for text in texts) or (
        f"table {WORD[family]} {TABLE} {{" in seen.ruleset
    )


def see_host(proc: Path = Path("/proc"), sys: Path = Path("/sys")) -> Host:
    """Return the settings and networks of this host, as this thread has them."""
    sysctls = {}
    for name in SYSCTLS:
        try:
            sysctls[name] = (proc / "sys" / name).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            continue
    bridges = any(any(path.iterdir()) for path in sys.glob("class/net/*/brif"))
    return Host(sysctls, {**_networks_4(proc), **_networks_6(proc)}, bridges)


def _networks_4(proc: Path) -> dict[str, str]:
    found = {}
    for words in _rows(proc / "thread-self/net/route")[1:]:
        network, gateway, mask = (int(words[at], 16).to_bytes(4, "little") for at in (1, 2, 7))
        if not any(gateway):
            length = int.from_bytes(mask, "big").bit_count()
            found[f"{ipaddress.IPv4Address(network)}/{length}"] = words[0]
    return found


def _networks_6(proc: Path) -> dict[str, str]:
    return {
        f"{ipaddress.IPv6Address(bytes.fromhex(words[0]))}/{int(words[1], 16)}": words[-1]
        for words in _rows(proc / "thread-self/net/ipv6_route")
        if not int(words[4], 16) and words[-1] != "lo"
    }


def _rows(path: Path) -> list[list[str]]:
    try:
        text = path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return []
    return [line.split() for line in text.splitlines() if line.strip()]


# --- the Corefile ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """What a Corefile lets DNS show.

    corefile -- None where it has errors
    zone     -- of the cluster, with a dot at its end
    keys     -- the Services that are shown; None: all
    before   -- plugins that may answer first
    note     -- why it is not known better
    """

    corefile: Corefile | None
    zone: str = ZONE
    keys: frozenset[Key] | None = None
    before: tuple[str, ...] = ()
    note: str = ""


def read_shown(evidence: Evidence) -> Shown:
    """Return what the Corefile of the evidence says of the cluster's names."""
    path, text = evidence.corefile
    port = evidence.ask[0].port if evidence.origin == "kdns" and evidence.ask else 53
    corefile, problems = parse_corefile(text, file=path, default_port=port)
    if problems.errors:
        return Shown(None, note=f"{path}: {problems.errors[0]}; taken to be kubeadm's")
    block, zone = _cluster_block(corefile)
    if block is None:
        return Shown(corefile, keys=frozenset(), note=f"{path} has no `kubernetes`: no name is"
                     " expected of DNS")  # fmt: skip
    words = {directive.name for directive in block.directives}
    before = tuple(one for one in ORDER if one in ANSWERS and one in words)
    try:
        site = build_site(corefile, problems, Metrics())
    except KdnsError as e:
        return Shown(corefile, zone, None, before, f"{path}: {e}")
    plugin = next((one for one in site.plugins() if isinstance(one, Kubernetes)), None)
    keys = _shown_by(plugin, evidence.snapshot) if plugin is not None else None
    return Shown(corefile, zone, keys, before)


def _cluster_block(corefile: Corefile) -> tuple[ServerBlock | None, str]:
    """Return the first server block with `kubernetes`, and the cluster's zone in it."""
    for block in corefile.blocks:
        for directive in block.directives:
            if directive.name == "kubernetes":
                zones = [arg.text for arg in directive.args] or [key.zone for key in block.keys]
                names = [
                    zone.rstrip(".") for zone in zones if not zone.rstrip(".").endswith(".arpa")
                ]
                return block, f"{names[0]}." if names and names[0] else ZONE
    return None, ZONE


def _shown_by(plugin: Kubernetes, snapshot: Snapshot) -> frozenset[Key]:
    plugin.publish(snapshot, everything(snapshot), 0.0)
    return frozenset(
        (one.namespace.decode("ascii", "replace"), one.name.decode("ascii", "replace"))
        for one in plugin.records.services()
    )


def read_resolvers(evidence: Evidence, corefile: Corefile) -> Resolvers:
    """Return what `forward` names, as far as it can be known here: files are those of the
    process that serves, so only those of a kdns on this host are read."""
    files = {}
    pid = (evidence.status or {}).get("pid")
    for block in corefile.blocks:
        for directive in block.directives:
            for token in directive.args[1:] if directive.name == "forward" else ():
                if token.text.startswith("/") and evidence.origin == "kdns":
                    text = _read_of(pid, token.text)
                    if text is not None:
                        files[token.text] = text
    own: list[str] = []
    service = evidence.snapshot.services.get(DNS_SERVICE[0], {}).get(DNS_SERVICE[1])
    if service is not None:
        own = [ip for ip in (service.spec.cluster_ips or [service.spec.cluster_ip]) if ip]
    # Where `kdns node` answers itself, beside the Service's address.
    for place in (evidence.status or {}).get("dns") or ():
        address, _, port = str(place).rpartition(":")
        if port == "53":
            own.append(address.strip("[]"))
    return Resolvers(files, own)


def _read_of(pid: object, path: str) -> str | None:
    """Return a file as a process sees it."""
    for start in (f"/proc/{pid}/root", ""):
        try:
            return Path(f"{start}{path}").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
    return None


# --- DNS servers ----------------------------------------------------------------------------


def read_servers(text: str) -> list[Server]:
    """Read "ADDRESS[:PORT],...". Raises ConfigError."""
    found = []
    for word in text.replace(",", " ").split():
        address, colon, port = word, "", ""
        if word.startswith("["):
            address, _, rest = word[1:].partition("]")
            colon, port = rest[:1], rest[1:]
        elif word.count(":") == 1:
            address, colon, port = word.partition(":")
        if not address or (colon and not (port.isdecimal() and 0 < int(port) < 65536)):
            raise ConfigError(
                [Problem("--server", 0, f"{word!r} is not ADDRESS, ADDRESS:PORT or [IPV6]:PORT")]
            )
        found.append(Server(address, int(port or 53)))
    return found


def replicas(snapshot: Snapshot) -> list[Server]:
    """Return the endpoints of the kube-dns Service that are ready."""
    found: dict[Server, None] = {}
    for one in snapshot.slices.get(DNS_SERVICE[0], {}).get(DNS_SERVICE[1], ()):
        ports = [
            port.port for port in one.ports or ()
            if port.port and port.protocol == "UDP" and (port.name or "").startswith(DNS_PORT_NAME)
        ]  # fmt: skip
        for endpoint in one.endpoints or ():
            if endpoint.conditions.ready is not False:
                for address in endpoint.addresses[:1]:
                    found.update({Server(address, port): None for port in ports})
    return [*found]


def place_of(server: Server) -> str:
    """Return "ADDRESS" or "ADDRESS:PORT"."""
    if server.port == 53:
        return server.address
    return f"[{server.address}]:{server.port}" if ":" in server.address else (
        f"{server.address}:{server.port}"
    )  # fmt: skip


def ask_servers(
    servers: Iterable[Server], questions: Sequence[Question]
) -> dict[str, Mapping[Question, Answer]]:
    """Put all questions to all servers. Of one that does not answer the first no more is asked."""
    chosen = questions[:MOST_QUESTIONS]
    found: dict[str, Mapping[Question, Answer]] = {}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for server in servers:
            first = {one: _ask(server, one) for one in chosen[:1]}
            rest = chosen[1:] if all(answer.rcode for answer in first.values()) else ()
            answers = pool.map(partial(_ask, server), rest)
            found[place_of(server)] = {**first, **dict(zip(rest, answers, strict=True))}
    return found


def _ask(server: Server, question: Question) -> Answer:
    """Return what a server says to one question."""
    try:
        name = parse_name(question.name)
        message = ask(
            server, name, QTYPES[question.type], timeout=ANSWER_TIMEOUT, tries=TRIES
        ).message
    except (NoAnswer, KdnsError) as e:
        return Answer("", why=str(e).rpartition(": ")[2] or str(e))
    wanted = t.CNAME if question.type == "CNAME" else QTYPES[question.type]
    texts = [render_rdata(rr.type, rr.rdata) for rr in message.answer if rr.type == wanted]
    if question.type == "SRV":
        texts = [text.split()[2] for text in texts]
    if question.type == "CNAME":
        texts = texts[:1]  # what comes after it is the target's own
    return Answer(RCODES.get(message.rcode, f"rcode {message.rcode}"), frozenset(texts))
