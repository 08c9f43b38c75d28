"""What DNS servers answer, held against what the registry says, and against each other.

Pure: what to ask follows from a snapshot, and the answers are handed in. The answers expected
are worked out here from the objects and not with zone/'s code, so that the two cannot share a
mistake; only which names are shown at all is taken from the Corefile's `kubernetes`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Final, NamedTuple

from kdns.dns.text import render_rdata
from kdns.explain.check_finding import Finding, count, few, finding
from kdns.registry.endpoints import canonical_address, published
from kdns.registry.objects import Key, Service
from kdns.registry.snapshot import Snapshot
from kdns.zone.records import external_target

CNAME: Final = 5
FAMILY: Final = {"A": 4, "AAAA": 6}
# A name that nobody has. In a namespace that there is, below a Service that there is not.
NOBODY: Final = "kdns-check-asks-for-nobody"
# So many names unknown, and none known: that server serves another zone, or nothing.
ALL_WRONG: Final = 2


class Question(NamedTuple):
    """name -- in full, with a dot at its end; type -- A, AAAA, CNAME (asked for as A) or SRV"""

    name: str
    type: str

    def __str__(self) -> str:
        return f"{self.name} {self.type}"


class Answer(NamedTuple):
    """rcode -- "" if there was no answer, for `why`; values -- addresses, targets or ports"""

    rcode: str
    values: frozenset[str] = frozenset()
    why: str = ""

    def __str__(self) -> str:
        return few(sorted(self.values)) if self.values else self.rcode or "no answer"


class Expected(NamedTuple):
    """values -- none: no records of this type; owner -- the Service whose name it is"""

    values: frozenset[str]
    owner: Key


@dataclass
class Replies:
    """What was answered.

    answers -- server -> question -> answer
    found   -- servers that nobody named: an endpoint of the kube-dns Service. That none of them
               can be reached from here says nothing
    hidden  -- Services that DNS does not show yet: their rules are still on their way
    before  -- plugins of the Corefile that may answer in the place of `kubernetes`
    """

    answers: Mapping[str, Mapping[Question, Answer]] = field(default_factory=dict)
    found: Collection[str] = ()
    hidden: Collection[Key] = ()
    before: Collection[str] = ()


# --- what to ask ----------------------------------------------------------------------------


def questions_for(
    snapshot: Snapshot, zone: str = "cluster.local.", shown: Collection[Key] | None = None
) -> dict[Question, Expected]:
    """Return what DNS must answer for each Service's names.

    shown -- the Services that the Corefile lets DNS show; None: all in Namespaces that exist
    """
    found: dict[Question, Expected] = {}
    for namespace, services in sorted(snapshot.services.items()):
        if namespace not in snapshot.namespaces:
            continue
        for name, service in sorted(services.items()):
            if shown is None or (namespace, name) in shown:
                found.update(_of_service(snapshot, (namespace, name), service, zone))
    return found


def _of_service(
    snapshot: Snapshot, key: Key, service: Service, zone: str
) -> Iterator[tuple[Question, Expected]]:
    name = f"{key[1]}.{key[0]}.svc.{zone}"
    spec = service.spec
    if spec.type == "ExternalName":
        target = external_target(spec.external_name)
        if target is not None:
            values = frozenset({render_rdata(CNAME, target)})
            yield Question(name, "CNAME"), Expected(values, key)
        return
    headless = spec.cluster_ip == "None"
    slices = snapshot.slices.get(key[0], {}).get(key[1], ())
    if headless:
        addresses = {str(ip_address(packed)) for _, _, packed, _ in published(slices)}
    else:
        texts = [*(spec.cluster_ips or ()), spec.cluster_ip]
        addresses = {read[1] for text in texts if (read := canonical_address(text)) is not None}
    if not addresses and not headless:
        return  # nobody has given it an address yet
    for qtype, family in FAMILY.items():
        values = frozenset(one for one in addresses if (":" in one) == (family == 6))
        yield Question(name, qtype), Expected(values, key)
    if headless:
        return
    for port in spec.ports or ():
        if port.name:
            asked = f"_{port.name}._{(port.protocol or 'TCP').lower()}.{name}"
            yield Question(asked, "SRV"), Expected(frozenset({str(port.port)}), key)


def nobody(zone: str = "cluster.local.") -> Question:
    """Return a question to which there is no answer in a cluster."""
    return Question(f"{NOBODY}.default.svc.{zone}", "A")


# --- what was answered ----------------------------------------------------------------------


def check_dns(expected: Mapping[Question, Expected], replies: Replies) -> Iterator[Finding]:
    """Yield what servers leave out, add or say otherwise."""
    unreached = {
        server
        for server, answers in replies.answers.items()
        if answers and not any(answer.rcode for answer in answers.values())
    }
    if unreached and unreached == set(replies.answers) and unreached <= {*replies.found}:
        yield finding(
            "dns-not-asked", "DNS",
            f"none of {few(sorted(unreached))} can be reached from here",
            "they are Pods' addresses, and this host is not on the Pods' network",
            "run it on a node, or say --server ADDRESS[:PORT] of one that can be reached",
        )  # fmt: skip
        return
    for server, answers in sorted(replies.answers.items()):
        if server in unreached:
            yield _no_answer(server, answers, len(answers))
        else:
            yield from _check_server(server, expected, answers, replies)
    yield from _check_alike(
        {server: one for server, one in replies.answers.items() if server not in unreached}
    )


def _no_answer(server: str, answers: Mapping[Question, Answer], times: int) -> Finding:
    why = next(answer.why for answer in answers.values() if not answer.rcode)
    return finding(
        "dns-no-answer", f"DNS server {server}",
        f"does not answer ({times} of {count(len(answers), 'question')}): {why}",
        "it does not run, does not listen there, or a firewall or a NetworkPolicy is between",
        "see that its Pod is ready and that UDP and TCP to its port are let through",
    )  # fmt: skip


def _check_server(
    server: str,
    expected: Mapping[Question, Expected],
    answers: Mapping[Question, Answer],
    replies: Replies,
) -> Iterator[Finding]:
    silent = sum(not answer.rcode for answer in answers.values())
    if silent:
        yield _no_answer(server, answers, silent)
    asked = {
        question: answers[question]
        for question, wanted in expected.items()
        if question in answers and answers[question].rcode and wanted.owner not in replies.hidden
    }
    with_records = [question for question in asked if expected[question].values]
    lost = [question for question in with_records if not asked[question].values]
    if len(with_records) >= ALL_WRONG and len(lost) == len(with_records):
        rcodes = few(rcode for rcode, _ in Counter(asked[q].rcode for q in lost).most_common())
        yield finding(
            "dns-not-a-cluster-dns", f"DNS server {server}",
            f"knows none of {len(lost)} names of the registry ({rcodes})",
            "its Corefile has no `kubernetes` for this zone, it reads another registry, or it has"
            " not listed it yet",
            "see the server's Corefile (the zone of `kubernetes`) and its log for the API server",
        )  # fmt: skip
        return
    unknown = {expected[question].owner for question in lost if question.type != "SRV"}
    for question, answer in asked.items():
        if question.type == "SRV" and question in lost and expected[question].owner in unknown:
            continue  # its Service's own name is told
        yield from _check_answer(server, question, expected[question], answer, replies)
    for question, answer in answers.items():
        if question.name.startswith(NOBODY) and answer.values:
            yield finding(
                "dns-answers-anything", f"DNS server {server}",
                f"answers {question.name}, which nobody has, with {answer}",
                _blamed(replies, "a wildcard: in a plugin `template`, or of the domain that"
                        " names are forwarded to"),
                "let the wildcard not hold for the cluster's zone; misspelt names of Services"
                " now lead to a stranger",
            )  # fmt: skip


def _check_answer(
    server: str, question: Question, expected: Expected, answer: Answer, replies: Replies
) -> Iterator[Finding]:
    wanted, given = expected.values, answer.values
    if given == wanted:
        return
    subject = f"{question} at {server}"
    owner = f"Service {'/'.join(expected.owner)}"
    late = "its watch of the API server hangs, or its cache still holds the answer of before"
    advice = "see the server's log for the API server; with `cache`, wait for the TTL and ask again"
    missing, extra = sorted(wanted - given), sorted(given - wanted)
    if not given and answer.rcode not in ("NOERROR", "NXDOMAIN"):
        yield finding(
            "dns-refused", subject, f"{answer.rcode}, while {owner} has {few(missing)}",
            "an `acl` refuses us, the zone is not served, or the server has no registry",
            "see the server's Corefile and its log",
        )  # fmt: skip
    elif not given:
        yield finding(
            "dns-name-missing", subject, f"{answer.rcode}, while {owner} has {few(missing)}",
            _blamed(replies, f"the server does not know the Service yet: {late}"), advice,
        )  # fmt: skip
    elif question.type == "SRV":
        yield finding(
            "dns-port-differs", subject,
            f"port {few(sorted(given))}, while {owner} has {few(sorted(wanted))}",
            _blamed(replies, late), advice,
        )  # fmt: skip
    elif not missing:
        yield finding(
            "dns-answer-extra", subject,
            f"gives {few(extra)} too, which {owner} does not have",
            _blamed(replies, f"the address is gone from the registry, and {late}"), advice,
        )  # fmt: skip
    elif not extra:
        yield finding(
            "dns-answer-missing", subject, f"leaves out {few(missing)} of {owner}",
            _blamed(replies, f"the address is new, and {late}"), advice,
        )  # fmt: skip
    else:
        yield finding(
            "dns-answer-differs", subject,
            f"gives {few(extra)}, while {owner} has {few(missing)}",
            _blamed(replies, f"the Service was made anew, and {late}"), advice,
        )  # fmt: skip


def _blamed(replies: Replies, otherwise: str) -> str:
    """Return the cause, with the plugins that may have answered instead."""
    if not replies.before:
        return otherwise
    words = few(f"`{word}`" for word in replies.before)
    return f"the Corefile's {words} may answer first; or {otherwise}"


def _check_alike(answers: Mapping[str, Mapping[Question, Answer]]) -> Iterator[Finding]:
    """Compare each server with the first."""
    servers = sorted(answers)
    for other in servers[1:]:
        first = servers[0]
        both = answers[first].keys() & answers[other].keys()
        heard = [q for q in sorted(both) if answers[first][q].rcode and answers[other][q].rcode]
        differ = [q for q in heard if answers[first][q] != answers[other][q]]
        if differ:
            example = differ[0]
            yield finding(
                "dns-servers-differ", f"DNS servers {first} and {other}",
                f"answer {len(differ)} of {count(len(heard), 'question')} differently, {example}:"
                f" {answers[first][example]} and {answers[other][example]}",
                "they have other Corefiles, or one has lost its watch of the API server: which"
                " of them a client asks is chance",
                "compare their Corefiles and the age of their last event"
                " (kdns_source_last_event_age_seconds); restart the one that is behind",
            )  # fmt: skip
