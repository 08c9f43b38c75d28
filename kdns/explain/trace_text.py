"""A trace for people, and for programs.

Decides what is told of it and how it looks; nothing of what is so. Text is narrow and calm: a
heading, one block a stage, and the end in a line of its own. Colour is asked for, never needed.
The shape of the JSON is documented in docs/TRACE.md and held by a test.
"""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap
from typing import Any, Final

import click

from kdns.explain.search import Answer, Search, Tried
from kdns.explain.trace_endpoints import Seen
from kdns.explain.trace_findings import Finding
from kdns.explain.trace_rules import Met
from kdns.explain.trace_state import Owner, Place, Trace

SHAPE: Final = "kdns.trace/1"
LABEL: Final = 11  # columns of what stands at the left
FEW: Final = 8  # endpoints told without -v
_MARKS: Final = {"found": "green", "nodata": "yellow", "nxdomain": "", "failed": "red",
                 "unknown": "yellow"}  # fmt: skip


class Page:
    """Lines of text, narrow. width -- of all of it; details -- everything is told"""

    def __init__(self, width: int = 80, details: bool = False, colour: bool = False) -> None:
        self.width = max(width, 40)
        self.details = details
        self.colour = colour
        self.lines: list[str] = []

    def put(self, label: str, text: str, colour: str = "", indent: int = 0) -> None:
        """Add a paragraph beside a label."""
        room = self.width - LABEL
        parts = wrap(
            text, room, subsequent_indent=" " * indent,
            break_on_hyphens=False,
        ) or [""]  # fmt: skip
        for n, part in enumerate(parts):
            head = self._paint(f"{label if n == 0 else '':<{LABEL}}", "", dim=True)
            self.lines.append(f"{head}{self._paint(part, colour)}".rstrip())

    def raw(self, text: str) -> None:
        """Add a line as it is: rules are not to be broken."""
        self.lines.append(f"{'':<{LABEL}}{text}".rstrip())

    def gap(self) -> None:
        if self.lines and self.lines[-1]:
            self.lines.append("")

    def _paint(self, text: str, colour: str, dim: bool = False) -> str:
        if not self.colour or not text.strip() or not (colour or dim):
            return text
        return click.style(text, fg=colour or None, dim=dim)

    def strong(self, text: str, colour: str) -> None:
        parts = wrap(
            text, self.width, subsequent_indent="   ", break_long_words=False,
            break_on_hyphens=False,
        )  # fmt: skip
        for part in parts:
            self.lines.append(
                click.style(part, fg=colour or None, bold=True) if self.colour else part
            )


def render(trace: Trace, *, width: int = 80, details: bool = False, colour: bool = False) -> str:
    """Return a trace as text."""
    page = Page(width, details, colour)
    _head(page, trace)
    if trace.search is not None:
        _name(page, trace, trace.search)
    if trace.place is not None:
        _place(page, trace, trace.place)
    if trace.endpoints:
        _endpoints(page, trace.endpoints)
    met = trace.kernel or trace.rules
    if met is not None:
        _rules(page, trace, met)
    if trace.flows:
        _flows(page, trace)
    _findings(page, trace)
    _end(page, trace)
    return "\n".join(page.lines) + "\n"


def _head(page: Page, trace: Trace) -> None:
    page.strong(f"{trace.request}/{trace.request.protocol}", "")
    page.put("from", _who(trace))
    page.put("evidence", trace.evidence.told)
    for note in trace.notes if page.details else trace.notes[:2]:
        page.put("note", note, "yellow")


def _who(trace: Trace) -> str:
    client = trace.client
    address = ", ".join(client.addresses) if _few_addresses(trace) else client.addresses[0]
    where = f" on node {client.node}" if client.node and client.kind != "node" else ""
    if client.assumed:
        return f"some Pod of {client.namespace}{where} (--from NS/POD names one)"
    if client.kind == "node":
        pod = f"Pod {client.name} with hostNetwork, " if "/" in client.name else ""
        return f"{pod}node {client.node} itself ({address})"
    if client.kind == "outside":
        return f"{address}, outside of the cluster's Pods and nodes"
    if not client.name:
        return f"{address}, a Pod's address{where}"
    return f"Pod {client.name} ({address}){where}"


def _few_addresses(trace: Trace) -> bool:
    """True if a client's addresses fit a line: a node has many."""
    return 0 < len(trace.client.addresses) <= 2


def _name(page: Page, trace: Trace, search: Search) -> None:
    resolver = trace.resolver
    page.gap()
    if resolver is not None and resolver.search:
        page.put("search", f"{' '.join(resolver.search)} (ndots {resolver.ndots}, {search.libc})")
        if resolver.why:
            page.put("", resolver.why)
    elif resolver is not None:
        page.put("search", resolver.why or "no search list")
    tried = search.tried
    for n, one in enumerate(tried, 1):
        if not page.details and 2 < n < len(tried) and one is not search.ended:
            if n == 3:
                page.put("", f"... and {len(tried) - 3} more in vain (-v)")
            continue
        page.put("name" if n == 1 else "", f"{n}  {_tried(one)}", _MARKS[one.state], 3)
    _answered(page, trace, search.ended)


def _tried(one: Tried) -> str:
    name = one.answer.name
    text = f"{name}  {_records(one.real or one.answer)}"
    if one.real is not None and one.answer.upstreams == () and (
        sorted(one.real.addresses) != sorted(one.answer.addresses)
    ):  # fmt: skip
        text += f" (the registry says {_records(one.answer)})"
    return text


def _records(answer: Answer) -> str:
    if answer.state == "unknown":
        return f"for {', '.join(answer.upstreams) or 'an upstream'}, not asked here"
    values = [f"{kind} {value}" for _, kind, value in answer.records]
    return ", ".join(values[:4]) + (f" and {len(values) - 4} more" if len(values) > 4 else "") or (
        "NODATA" if answer.rcode == "NOERROR" else answer.rcode
    )


def _answered(page: Page, trace: Trace, ended: Tried) -> None:
    answer = ended.answer
    parts = []
    if answer.plugin:
        parts.append(f"by {answer.plugin}, server block {answer.block}")
    if answer.ttl:
        parts.append(f"TTL {answer.ttl}")
    if parts:
        page.put("answered", "; ".join(parts))
    for owner in trace.owners:
        page.put("from", _owner(owner))
    if ended.real is not None:
        page.put("asked", f"{ended.real.plugin}: {_records(ended.real)}"
                 f"{ended.real.error and ' (' + ended.real.error + ')'}")  # fmt: skip
    if trace.other is not None and page.details:
        same = trace.other.ended.answer.name == answer.name and trace.other.state == ended.state
        page.put(trace.other.libc, "the same" if same else f"{_tried(trace.other.ended)}")


def _owner(owner: Owner) -> str:
    parts = []
    if owner.resource_version:
        parts.append(f"resourceVersion {owner.resource_version}")
    if owner.age is not None:
        parts.append(f"{age(owner.age)} old")
    return f"{owner}{' (' + ', '.join(parts) + ')' if parts else ''}"


def age(seconds: float) -> str:
    """Return seconds as people say them: "3d", "5h", "12m", "40s"."""
    for length, word in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= 2 * length:
            return f"{int(seconds / length)}{word}"
    return f"{int(seconds)}s"


def _place(page: Page, trace: Trace, place: Place) -> None:
    page.gap()
    address = f"[{place.address}]" if ":" in place.address else place.address
    where = f"{address}:{place.port}/{place.protocol}" if place.port else place.address
    parts = [f"{place.kind} {where}"]
    if place.port_name:
        parts.append(f"port {place.port_name}")
    if place.target and place.kind != "headless":
        parts.append(f"targetPort {place.target}")
    if place.policy == "Local":
        parts.append("policy Local")
    if place.affinity:
        parts.append(f"a client stays {place.affinity} s")
    if place.source_ranges:
        parts.append(f"only from {', '.join(place.source_ranges)}")
    page.put("frontend", ", ".join(parts))
    service = trace.service
    if service is not None:
        kind = "headless" if place.kind == "headless" else service.spec.type
        selector = ",".join(f"{k}={v}" for k, v in sorted((service.spec.selector or {}).items()))
        page.put("", f"of Service {service.metadata.namespace}/{service.metadata.name} ({kind}"
                 f"{', selector ' + selector if selector else ''})")  # fmt: skip


def _endpoints(page: Page, endpoints: Sequence[Seen]) -> None:
    inside = sum(one.chosen for one in endpoints)
    page.put("endpoints", f"{inside} of {len(endpoints)} in")
    told = endpoints if page.details else endpoints[:FEW]
    for one in told:
        word = "in " if one.chosen else "out"
        share = f" {_percent(one.chance)}" if one.chance else ""
        where = " ".join(
            text for text in (one.pod.partition("/")[2], one.node, one.topology_zone) if text
        )
        page.put("", f"{word} {one}{share}  {where}{where and ': '}{one.why}",
                 "" if one.chosen else "yellow", 4)  # fmt: skip
    if len(told) < len(endpoints):
        page.put("", f"... and {len(endpoints) - len(told)} more (-v)")


def _percent(share: float) -> str:
    return f"{share * 100:.3g} %"


def _rules(page: Page, trace: Trace, met: Met) -> None:
    origin = "in the kernel" if met.source == "kernel" else "computed"
    node = f" of node {met.node}" if met.node else ""
    page.put("rules", f"{origin}, mode {met.mode}{node}")
    if met.chains:
        page.put("", " > ".join(met.chains))
    if not met.walked:
        page.put("", "as the table decides; rules of this mode are not walked")
    masquerade = "masqueraded: the endpoint sees the node" if met.masquerade else (
        "source kept: the endpoint sees the client"
    )  # fmt: skip
    if met.endpoints:
        page.put("", masquerade)
    elif {way.verdict for way in met.ways} == {"local"}:
        page.put("", "past the Service's rules, to a program of the node")
    if page.details:
        for line in met.lines:
            page.raw(line)
    if met.source == "computed" and trace.evidence.no_kernel and page.details:
        page.put("", trace.evidence.no_kernel)


def _flows(page: Page, trace: Trace) -> None:
    page.put("conntrack", f"{trace.flow_count} live flows there")
    for one in trace.flows if page.details else trace.flows[:3]:
        stale = ", which is no endpoint any more" if one.stale else ""
        page.put("", f"{one.count} from {one.client} to {one.endpoint}{stale}",
                 "yellow" if one.stale else "")  # fmt: skip


def _findings(page: Page, trace: Trace) -> None:
    shown = [one for one in trace.findings if one is not trace.stop]
    if shown:
        page.gap()
    for one in shown:
        page.put("besides", f"{one.text} [{one.id}]", "yellow")
        if one.advice:
            page.put("", one.advice)


def _end(page: Page, trace: Trace) -> None:
    end = trace.outcome
    page.gap()
    if end.kind == "stopped":
        page.strong(f"=> stops: {end.text} [{end.finding}]", "red")
        if end.advice:
            page.put("   do", end.advice)
        return
    page.strong(f"=> {end.text}", "green")


# --- for programs ------------------------------------------------------------------------------


def as_json(trace: Trace) -> dict[str, Any]:
    """Return a trace as JSON-able values. Members are always there; what is not known is null
    or empty."""
    end, client, place = trace.outcome, trace.client, trace.place
    met = trace.kernel or trace.rules
    return {
        "shape": SHAPE,
        "request": {
            "name": trace.request.name,
            "port": trace.request.port,
            "protocol": trace.request.protocol,
            "libc": trace.request.libc,
        },
        "client": {
            "kind": client.kind,
            "name": client.name,
            "namespace": client.namespace,
            "addresses": list(client.addresses),
            "node": client.node,
            "assumed": client.assumed,
        },
        "evidence": {
            "origin": trace.evidence.origin,
            "told": trace.evidence.told,
            "node": trace.evidence.node,
            "kernel": trace.evidence.kernel is not None,
            "no_kernel": trace.evidence.no_kernel,
            "notes": list(trace.notes),
        },
        "resolver": None if trace.resolver is None else {
            "search": list(trace.resolver.search),
            "ndots": trace.resolver.ndots,
            "policy": trace.resolver.policy,
            "cluster": trace.resolver.cluster,
            "nameservers": list(trace.resolver.nameservers),
        },
        "search": None if trace.search is None else _search(trace.search),
        "other_libc": None if trace.other is None else _search(trace.other),
        "objects": [
            {"kind": o.kind, "name": o.name, "resource_version": o.resource_version,
             "age_seconds": o.age}
            for o in trace.owners
        ],
        "frontend": None if place is None else {
            "kind": place.kind,
            "address": place.address,
            "port": place.port,
            "protocol": place.protocol,
            "port_name": place.port_name,
            "target_port": place.target,
            "policy": place.policy,
            "affinity_seconds": place.affinity,
            "source_ranges": list(place.source_ranges),
            "service": "" if trace.service is None
            else f"{trace.service.metadata.namespace}/{trace.service.metadata.name}",
        },
        "endpoints": [_endpoint(one) for one in trace.endpoints],
        "rules": None if met is None else {
            "source": met.source,
            "mode": met.mode,
            "node": met.node,
            "walked": met.walked,
            "chains": list(met.chains),
            "lines": list(met.lines),
            "masquerade": met.masquerade,
            "ways": [
                {"verdict": w.verdict, "endpoint": w.endpoint, "chance": float(w.chance),
                 "masquerade": w.masquerade, "by": w.by}
                for w in met.ways
            ],
        },
        "conntrack": {
            "flows": trace.flow_count,
            "told": [
                {"client": f.client, "endpoint": f.endpoint, "count": f.count, "stale": f.stale}
                for f in trace.flows
            ],
        },
        "findings": [_finding(one) for one in trace.findings],
        "end": {
            "kind": end.kind,
            "arrives": end.arrives,
            "text": end.text,
            "finding": end.finding,
            "advice": end.advice,
            "endpoints": [{"endpoint": e, "chance": c} for e, c in end.endpoints],
        },
    }  # fmt: skip


def _search(search: Search) -> dict[str, Any]:
    return {
        "libc": search.libc,
        "state": search.state,
        "ended": search.ended.answer.name,
        "tried": [
            {
                "name": one.answer.name,
                "state": one.state,
                "computed": _answer(one.answer),
                "real": None if one.real is None else _answer(one.real),
            }
            for one in search.tried
        ],
    }


def _answer(answer: Answer) -> dict[str, Any]:
    return {
        "rcode": answer.rcode,
        "records": [f"{kind} {value}" for _, kind, value in answer.records],
        "ttl": answer.ttl,
        "block": answer.block,
        "plugin": answer.plugin,
        "objects": list(answer.objects),
        "upstreams": list(answer.upstreams),
        "error": answer.error,
    }


def _endpoint(one: Seen) -> dict[str, Any]:
    return {
        "address": one.address,
        "port": one.port,
        "pod": one.pod,
        "node": one.node,
        "zone": one.topology_zone,
        "slice": one.slice,
        "ready": one.ready,
        "serving": one.serving,
        "terminating": one.terminating,
        "chosen": one.chosen,
        "why": one.why,
        "chance": one.chance,
    }


def _finding(one: Finding) -> dict[str, Any]:
    return {
        "id": one.id,
        "stage": one.stage,
        "stops": one.stops,
        "text": one.text,
        "advice": one.advice,
    }
