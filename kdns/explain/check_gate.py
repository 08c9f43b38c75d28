"""What a running kdns says of itself: is DNS ahead of the kernel, or one of them behind?

Pure: the words of its control socket's /v1/status in, findings out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from kdns.explain.check_finding import Finding, count, few, finding

KERNEL: Final = "kernel_"


def check_status(status: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield what is wrong by a running kdns's own account."""
    subject = f"kdns (process {status.get('pid', '?')})"
    path = status.get("path")
    if isinstance(path, Mapping) and not path.get("healthy"):
        addresses = ", ".join(map(str, path.get("addresses") or ()))
        yield finding(
            "dns-path-broken", subject, str(path.get("problem") or "its rules are not written"),
            f"questions to {addresses} go by the rules of the Service, to other nodes, or are"
            " tracked",
            "see its log and /healthz; it tries again every 30 s",
        )  # fmt: skip
    if status.get("synced") is False:
        yield finding(
            "server-not-synced", subject, "has not listed its registry",
            "the API server does not answer, or refuses it",
            "see its log and /ready; DNS answers SERVFAIL for the cluster's names until then",
        )  # fmt: skip
        return
    gate = status.get("gate")
    if isinstance(gate, Mapping):
        yield from _check_gate(subject, gate)
    revisions = status.get("revision")
    if isinstance(revisions, Mapping):
        waits = isinstance(gate, Mapping) and bool(gate.get("waiting"))
        yield from _check_revisions(subject, revisions, waits)


def _check_gate(subject: str, gate: Mapping[str, Any]) -> Iterator[Finding]:
    timeout = float(gate.get("timeout") or 0)
    late = [one for one in gate.get("waiting") or () if float(one.get("seconds") or 0) > timeout]
    if gate.get("open"):
        yield finding(
            "gate-open", subject,
            f"rules were not written within {timeout:g} s: DNS shows names without waiting",
            "writing rules fails, hangs, or another program holds the lock of iptables",
            "see /healthz of the proxy and its log; the gate closes with the next sync that"
            " succeeds",
        )  # fmt: skip
    elif late:
        longest = max(float(one["seconds"]) for one in late)
        yield finding(
            "gate-waiting", subject,
            f"{count(len(late), 'Service')} not shown for {longest:.1f} s:"
            f" {few(str(one.get('service')) for one in late)}",
            f"their rules are still being written, and {timeout:g} s have passed",
            "see the proxy's log; a larger --gate-timeout only waits longer",
        )  # fmt: skip
    for service in gate.get("published_unprogrammed") or ():
        yield finding(
            "published-unprogrammed", f"Service {service}",
            "DNS shows it, and its rules are not in the kernel of this node",
            f"they could not be written within {timeout:g} s, or iptables refuses one of them",
            "clients that connect are refused or wait; see the proxy's log for this Service",
        )  # fmt: skip


def _check_revisions(subject: str, revisions: Mapping[str, Any], waits: bool) -> Iterator[Finding]:
    newest = revisions.get("registry")
    if not isinstance(newest, int):
        return
    for stage, revision in sorted(revisions.items()):
        if not isinstance(revision, int) or revision >= newest or waits:
            continue
        if stage == "dns":
            yield finding(
                "dns-behind", subject, f"DNS shows revision {revision}, the registry is at"
                f" {newest}",
                "a snapshot was not taken over: a bug, or the process has no time",
                "see its log and the load of this node",
            )  # fmt: skip
        elif stage.startswith(KERNEL):
            yield finding(
                "kernel-behind", f"{subject}, {stage.removeprefix(KERNEL)}",
                f"the kernel has revision {revision}, the registry is at {newest}",
                "rules cannot be written, or not as fast as the registry changes",
                "see the proxy's log, and kubeproxy_sync_proxy_rules_duration_seconds",
            )  # fmt: skip
