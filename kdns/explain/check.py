"""`kdns check`: holds registry, DNS answers, kernel rules and connection tracking against each
other.

Decides what can be compared with what there is to see, and which findings are more than a change
on its way. The comparing itself is pure and in modules of its own (check_registry.py,
check_dns.py, check_gate.py, check_kernel.py, check_host.py); reading is evidence.py's and
check_sight.py's, printing check_command.py's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from kdns.agent import FAMILIES, host_name, table_for
from kdns.errors import ApplyError
from kdns.explain import check_sight as sight
from kdns.explain.check_dns import Replies, check_dns, nobody, questions_for
from kdns.explain.check_finding import KINDS, Finding, Part, count, few, finding, in_order
from kdns.explain.check_gate import check_status
from kdns.explain.check_host import check_host, check_resolvers
from kdns.explain.check_kernel import Wanted, check_flows, check_kernel
from kdns.explain.check_registry import Registry, check_registry
from kdns.explain.evidence import Evidence, Where, gather
from kdns.kernel.conntrack import dump_udp_flows
from kdns.kernel.netlink import local_networks
from kdns.proxy.conntrack import node_port_networks
from kdns.proxy.options import Family
from kdns.proxy.table import ForwardingTable
from kdns.registry.objects import Key
from kdns.server.client import Server

# Seconds between two looks, where the first found what may be but a change on its way. Longer
# than a sync and a watch event take, and than the gate's usual wait.
SETTLE: Final = 3.0
NO_RULES: Final = "holds no rules for Services"


@dataclass(frozen=True)
class Wishes:
    """What is asked for.

    servers       -- DNS servers to ask, in place of those that are found
    service_cidrs -- where Services have their addresses
    may_ask       -- ask DNS servers at all
    """

    where: Where
    servers: tuple[Server, ...] = ()
    service_cidrs: tuple[str, ...] = ()
    may_ask: bool = True


@dataclass(frozen=True)
class Report:
    """told -- where from; checked -- part -> what was compared; notes -- what could not be"""

    told: str
    findings: tuple[Finding, ...]
    checked: dict[Part, str]
    notes: tuple[str, ...] = ()

    @property
    def faults(self) -> int:
        """How many findings there are but for notes."""
        return sum(one.severity != "note" for one in self.findings)


def check(
    wishes: Wishes, settle: float = SETTLE, sleep: Callable[[float], Any] = time.sleep
) -> Report:
    """Look, and look again at what may be on its way; report what is wrong.

    settle -- seconds between the two looks; 0: one look must do
    Raises ConfigError, and KdnsError where somebody does not answer.
    """
    first = _look(wishes)
    passing = [one for one in first.findings if KINDS[one.id].passing]
    if not passing or not settle or (wishes.where.manifests and not wishes.servers):
        return first
    sleep(settle)
    again = _look(wishes)
    return replace(again, findings=tuple(lasting(first.findings, again.findings)))


def lasting(before: Iterable[Finding], after: Iterable[Finding]) -> list[Finding]:
    """Return the findings of a second look without those passing ones that the first did not
    have."""
    known = {(one.id, one.subject) for one in before}
    return [one for one in after if not KINDS[one.id].passing or (one.id, one.subject) in known]


def _look(wishes: Wishes) -> Report:
    evidence, chosen = _for_node(gather(wishes.where))
    notes = list(evidence.notes)
    checked: dict[Part, str] = {}
    found: list[Finding] = []
    node = evidence.node or host_name().lower()
    tables = {
        family: table_for(evidence.snapshot, evidence.config, family, node)[0]
        for family in FAMILIES
    }
    about = node if chosen else ""
    found += check_registry(_registry_of(evidence, tables, about, wishes.service_cidrs))
    checked["registry"] = _told_registry(evidence)
    if evidence.status is not None:
        found += check_status(evidence.status)
        checked["gate"] = "what the running kdns says of itself"
    if wishes.may_ask:
        found += _ask_dns(evidence, wishes, checked, notes)
    if evidence.origin != "manifests" and wishes.where.use_kernel:
        found += asyncio.run(_look_at_node(evidence, wishes, tables, checked, notes))
    return Report(evidence.told, tuple(in_order(found)), checked, tuple(notes))


def _for_node(evidence: Evidence) -> tuple[Evidence, bool]:
    """Return the evidence for this very host where it is a Node and no other was asked for; and
    whether its node is more than a guess."""
    if not evidence.node_told:
        return evidence, True
    host = host_name().lower()
    if host in evidence.snapshot.nodes:
        return replace(evidence, node=host, node_told=""), True
    return evidence, False


def _registry_of(
    evidence: Evidence,
    tables: dict[Family, ForwardingTable],
    node: str,
    service_cidrs: Sequence[str],
) -> Registry:
    return Registry(
        evidence.snapshot,
        tables,
        node,
        evidence.config.cluster_cidrs,
        service_cidrs or _service_cidrs(evidence),
        evidence.origin == "manifests" or bool(evidence.snapshot.pods),
    )


def _service_cidrs(evidence: Evidence) -> list[str]:
    return [
        text for one in evidence.snapshot.service_cidrs.values() for text in one.spec.cidrs or ()
    ]


def _told_registry(evidence: Evidence) -> str:
    snapshot = evidence.snapshot
    services = sum(map(len, snapshot.services.values()))
    slices = sum(len(one) for owners in snapshot.slices.values() for one in owners.values())
    pods = sum(map(len, snapshot.pods.values()))
    return ", ".join(
        (count(services, "Service"), count(slices, "EndpointSlice"), count(pods, "Pod"),
         count(len(snapshot.nodes), "Node"))
    )  # fmt: skip


# --- DNS ------------------------------------------------------------------------------------


def _ask_dns(
    evidence: Evidence, wishes: Wishes, checked: dict[Part, str], notes: list[str]
) -> Iterator[Finding]:
    shown = sight.read_shown(evidence)
    notes += [shown.note] if shown.note else []
    if shown.corefile is not None:
        yield from check_resolvers(shown.corefile, sight.read_resolvers(evidence, shown.corefile))
    servers, guessed = _servers_of(evidence, wishes)
    if not servers and not guessed:
        if evidence.origin != "manifests":
            yield finding(
                "dns-not-asked", "DNS", "no DNS server is known",
                "there is no endpoint behind Service kube-system/kube-dns",
                "say --server ADDRESS[:PORT]",
            )  # fmt: skip
        return
    expected = questions_for(evidence.snapshot, shown.zone, shown.keys)
    questions = [nobody(shown.zone), *expected]
    if len(questions) > sight.MOST_QUESTIONS:
        notes.append(f"DNS was asked {sight.MOST_QUESTIONS} of {len(questions)} questions")
    answers = sight.ask_servers([*servers, *guessed], questions)
    found = [sight.place_of(one) for one in guessed]
    # Beside a server that was reached, and from a host that is no node, Pods' addresses that do
    # not answer say nothing.
    silent = [one for one in found if not any(answer.rcode for answer in answers[one].values())]
    if silent and (servers or (evidence.kernel is None and len(silent) < len(found))):
        answers = {place: one for place, one in answers.items() if place not in silent}
        notes.append(f"DNS at {few(silent)}: endpoints of kube-dns that this host does not reach")
    yield from check_dns(expected, Replies(answers, found, _hidden(evidence), shown.before))
    checked["dns"] = f"{count(len(expected), 'answer')} of {few(answers) or 'nobody'}"


def _servers_of(evidence: Evidence, wishes: Wishes) -> tuple[list[Server], list[Server]]:
    """Return the servers to ask: those named, and those found behind the kube-dns Service."""
    if wishes.servers:
        return [*wishes.servers], []
    if evidence.origin == "manifests":
        return [], []
    named = [*evidence.ask]
    return named, [one for one in sight.replicas(evidence.snapshot) if one not in named]


def _hidden(evidence: Evidence) -> list[Key]:
    """Return the Services whose names the gate keeps back, or shows as they were."""
    gate = (evidence.status or {}).get("gate") or {}
    names = [str(one.get("service", "")) for one in gate.get("waiting") or ()]
    return [(namespace, name) for namespace, _, name in (one.partition("/") for one in names)]


# --- this node ------------------------------------------------------------------------------


async def _look_at_node(
    evidence: Evidence,
    wishes: Wishes,
    tables: dict[Family, ForwardingTable],
    checked: dict[Part, str],
    notes: list[str],
) -> list[Finding]:
    written = _written(evidence, wishes)
    if evidence.kernel is None and not (written and NO_RULES in evidence.no_kernel):
        notes.append(f"kernel rules and connections: {evidence.no_kernel}")
        return []
    mode = evidence.config.mode
    if evidence.status is None and evidence.kernel is not None and not wishes.where.mode:
        mode = evidence.kernel.mode  # whoever wrote them
    evidence = replace(evidence, config=replace(evidence.config, mode=mode))
    try:
        seen = await sight.see_kernel(mode, written)
        wanted = await sight.rules_wanted(evidence, seen)
    except ApplyError as e:
        notes.append(f"kernel rules cannot be read: {e}")
        return []
    leaving = _leaving(evidence)
    found = [one for one in check_kernel(wanted, seen) if not _is_leaving(one, leaving)]
    rules = sum(text.count("\n-A KUBE-") for one in seen.saved.values() for text in one.values())
    lines = seen.ruleset.count("\n")
    checked["rules"] = f"mode {mode}: " + (
        f"{lines} lines of nft" if mode == "nftables" else count(rules, "rule")
    )
    if mode != "userspace":  # there, flows are the proxy's own
        found += _flow_findings(evidence, wanted, bool(leaving), checked, notes)
    found += check_host(evidence.config, tables, sight.see_host())
    checked["host"] = "sysctls, ports and networks of this host"
    return found


def _written(evidence: Evidence, wishes: Wishes) -> bool:
    """Say whether there must be rules in this kernel: a running kdns has written them, this host
    is a Node, or the user says which mode's."""
    revisions = (evidence.status or {}).get("revision") or {}
    return (
        any(stage.startswith("kernel") and revisions[stage] for stage in revisions)
        or host_name().lower() in evidence.snapshot.nodes
        or bool(wishes.where.mode)
    )


def _leaving(evidence: Evidence) -> frozenset[str]:
    """Return the Services that the registry has no more, whose rules stay for a while."""
    gate = (evidence.status or {}).get("gate") or {}
    return frozenset(str(one.get("service", "")) for one in gate.get("draining") or ())


def _is_leaving(one: Finding, leaving: frozenset[str]) -> bool:
    # "Service default/web:http, IPv4"
    name = one.subject.removeprefix("Service ").partition(",")[0].partition(":")[0].split(" ")[0]
    return one.id in ("rules-extra", "rules-differ") and name in leaving


def _flow_findings(
    evidence: Evidence,
    wanted: Wanted,
    leaving: bool,
    checked: dict[Part, str],
    notes: list[str],
) -> Iterator[Finding]:
    total = 0
    # A frontend that is being drained is in no table, and may have flows.
    pods = () if leaving else evidence.config.cluster_cidrs
    for family, (table, options) in sorted(wanted.items()):
        try:
            flows = dump_udp_flows(family).flows
            local = local_networks(family)
        except ApplyError as e:
            notes.append(f"connections cannot be read: {e}")
            return
        total += len(flows)
        node = node_port_networks(options, local)
        yield from check_flows(table, flows, node, pods)
    checked["conntrack"] = count(total, "UDP flow")
