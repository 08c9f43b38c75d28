"""What a trace holds: the request, what was seen on its way, and where it ends.

Decides what ends a trace when more than one thing is wrong: the first on the way. Who fills it:
trace_names.py what is before there is an address, trace_packet.py what comes after.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from difflib import get_close_matches
from typing import Any, Final, Literal, TypeAlias

from kdns.explain.evidence import Evidence
from kdns.explain.search import Answer, Libc, Names, Resolver, Search
from kdns.explain.trace_endpoints import (
    Seen,
)
from kdns.explain.trace_findings import Finding
from kdns.explain.trace_rules import (
    Client,
    Met,
    Tracked,
)
from kdns.proxy.options import Family, Protocol
from kdns.registry.endpoints import canonical_address
from kdns.registry.objects import Key, Pod, Service, key_of

EndKind: TypeAlias = Literal["endpoint", "process", "outside", "stopped"]
FrontendWord: TypeAlias = Literal[
    "cluster IP",
    "external IP",
    "loadbalancer IP",
    "node port",
    "headless",
    "Pod",
    "Node",
    "outside",
]
FAMILIES: Final[tuple[Family, ...]] = (4, 6)
MOST_NAMES: Final = 3


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for. source -- "NS/POD", an address, or "": some Pod of `default`"""

    name: str
    port: int | None = None
    source: str = ""
    protocol: Protocol = "tcp"
    libc: Libc = "glibc"

    def __str__(self) -> str:
        name = f"[{self.name}]" if ":" in self.name else self.name
        return f"{name}:{self.port}" if self.port else name


@dataclass(frozen=True, slots=True)
class Owner:
    """An object an answer was made from. age -- seconds; None: not known"""

    kind: str
    name: str
    resource_version: str = ""
    age: float | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


@dataclass(frozen=True, slots=True)
class Place:
    """What is connected to. target -- targetPort as the Service says it"""

    kind: FrontendWord
    address: str
    port: int
    protocol: Protocol
    port_name: str = ""
    target: str = ""
    policy: str = ""
    affinity: int = 0
    source_ranges: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class End:
    """Where it ends. finding -- the id of what stopped it; endpoints -- (where, its chance)"""

    kind: EndKind
    text: str
    finding: str = ""
    advice: str = ""
    endpoints: tuple[tuple[str, float], ...] = ()

    @property
    def arrives(self) -> bool:
        return self.kind != "stopped"


@dataclass(slots=True)
class Trace:
    """All that was seen on the way; filled from the top down."""

    request: Request
    evidence: Evidence
    client: Client
    resolver: Resolver | None = None
    search: Search | None = None
    other: Search | None = None  # as the other libc does
    owners: tuple[Owner, ...] = ()
    service: Service | None = None
    place: Place | None = None
    endpoints: list[Seen] = field(default_factory=list)
    rules: Met | None = None
    kernel: Met | None = None
    flows: list[Tracked] = field(default_factory=list)
    flow_count: int = 0
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    end: End | None = None

    def found(self, finding: Finding | None) -> None:
        if finding is not None and finding.id not in {one.id for one in self.findings}:
            self.findings.append(finding)

    @property
    def stop(self) -> Finding | None:
        """The finding where it stops: the first on its way."""
        return next((one for one in self.findings if one.stops), None)

    @property
    def outcome(self) -> End:
        assert self.end is not None, "run() has ended"
        return self.end


class Sight:
    """What every part of a trace looks at."""

    def __init__(self, trace: Trace, names: Names) -> None:
        self.trace = trace
        self.names = names
        self.evidence = trace.evidence
        self.request = trace.request
        self.client = trace.client
        self.snapshot = trace.evidence.snapshot

    def service_at(self, key: Key) -> Service | None:
        """Return a Service by a name in any case."""
        services = self.snapshot.services.get(key[0], {})
        found = services.get(key[1])
        if found is None:
            found = next((one for n, one in services.items() if n.lower() == key[1].lower()), None)
        return found

    def key_in(self, answer: Answer) -> Key | None:
        """Return the Service that an answer, or the last link of it, is from."""
        for text in reversed(answer.objects):
            kind, _, name = text.partition(" ")
            namespace, slash, name = name.partition("/")
            if kind == "Service" and slash and self.service_at((namespace, name)) is not None:
                return namespace, name
        return None

    def owners_of(self, answer: Answer) -> Iterator[Owner]:
        for text in answer.objects:
            kind, _, name = text.partition(" ")
            namespace, slash, one = name.partition("/")
            if slash:
                yield self.owner_at(kind, (namespace, one))
            elif kind == "Pod":
                yield Owner("Pod", name)

    def owner_at(self, kind: str, key: Key) -> Owner:
        service = self.service_at(key) if kind == "Service" else None
        if service is not None:
            key = key_of(service)
        raw = self.evidence.json_of(kind, key) or {}
        meta = raw.get("metadata") or {}
        version = str(meta.get("resourceVersion") or "")
        if service is not None:
            version = version or service.metadata.resource_version
        return Owner(kind, "/".join(key), version, age_of(meta, self.evidence.now))


def nearest(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" where something is spelt much the same."""
    found = get_close_matches(word, list(known), 1, 0.6)
    return f"; did you mean {found[0]!r}?" if found else ""


def some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def is_headless(service: Service) -> bool:
    return service.spec.cluster_ip == "None" or "None" in (service.spec.cluster_ips or ())


def age_of(meta: Mapping[str, Any], now: float) -> float | None:
    text = meta.get("creationTimestamp")
    if not isinstance(text, str):
        return None
    try:
        return max(0.0, now - datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp())
    except ValueError:
        return None


def pod_addresses(pod: Pod) -> tuple[str, ...]:
    texts = [pod.status.pod_ip, *(one.ip for one in pod.status.pod_ips or ())]
    found = [canonical_address(text) for text in texts if text]
    return tuple(dict.fromkeys(one[1] for one in found if one is not None))
