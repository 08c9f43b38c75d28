"""The answers recorded from CoreDNS 1.13.1 (tests/golden/dns), asked of a running kdns.

Real sockets, kdns's own listener, dnspython as the reader. A difference must stand in the
table of docs/COREDNS.md, which DIFFERENCES repeats; nothing else may differ.
"""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

import dns.asyncquery
import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import pytest
from running import RunningKdns
from upstream_server import UpstreamServer

GOLDEN = pathlib.Path(__file__).parent / "golden"
pytestmark = pytest.mark.asyncio
NAMES = ("kubeadm", "minimal", "noendpoints", "verified")

# (recording, name, type) -> what kdns does differently, each a row in docs/COREDNS.md.
DIFFERENCES: dict[tuple[str, str, str], str] = {}


def corefile(name: str, upstream_port: int) -> str:
    """The recorded Corefile, with the objects as manifests and a free port."""
    text = (GOLDEN / "dns" / f"{name}.Corefile").read_text()
    text = text.replace(".:5300", ".:0").replace("127.0.0.1:5399", f"127.0.0.1:{upstream_port}")
    return text.replace("kubeconfig KUBECONFIG", f"manifests {GOLDEN / 'cluster.json'}")


def sections(message: dns.message.Message) -> dict[str, Any]:
    """A message in the recordings' own words."""

    def lines(section: Any) -> list[str]:
        out = []
        for rrset in section:
            for rdata in rrset:
                kind = dns.rdatatype.to_text(rrset.rdtype)
                text = rdata.to_text()
                if kind == "SOA":
                    text = re.sub(r"^(\S+ \S+) \d+", r"\1 SERIAL", text)
                out.append(f"{rrset.name} {rrset.ttl} {kind} {text}")
        return sorted(out)

    opt = None
    if message.edns >= 0:
        opt = {"payload": message.payload, "flags": message.ednsflags}
    return {
        "rcode": dns.rcode.to_text(message.rcode()),
        "flags": dns.flags.to_text(message.flags),
        "question": [f"{q.name} IN {dns.rdatatype.to_text(q.rdtype)}" for q in message.question],
        "answer": lines(message.answer),
        "authority": lines(message.authority),
        "additional": lines(message.additional),
        "opt": opt,
    }


def query_of(row: dict[str, Any]) -> dns.message.Message:
    query = dns.message.make_query(row["q"][0], row["q"][1])
    query.flags = dns.flags.RD if row["rd"] else dns.flags.Flag(0)
    if row["edns"]:
        query.use_edns(0, dns.flags.DO if row["do"] else 0, payload=row["edns"])
    return query


def counted_down(got: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """True if `got` is what was recorded, or that a few seconds later.

    The upstream's records come a second time from `cache`; between the two a second may have
    passed here, which none did while recording.
    """
    if got == wanted:
        return True
    return any(_in_seconds(wanted, n) == got for n in range(1, 6))


def _in_seconds(wanted: dict[str, Any], n: int) -> dict[str, Any]:
    def older(line: str) -> str:
        name, ttl, rest = line.split(" ", 2)
        outside = name.endswith("example.com.")
        return f"{name} {int(ttl) - n} {rest}" if outside else line

    return {
        key: [older(line) for line in value] if key in ("answer", "authority", "additional")
        else value
        for key, value in wanted.items()
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
async def test_every_recorded_question_is_answered_as_coredns_did(name: str) -> None:
    rows = [json.loads(line) for line in (GOLDEN / "dns" / f"{name}.jsonl").open()]
    assert len(rows) == 558
    differing = []
    async with UpstreamServer() as upstream, RunningKdns(corefile(name, upstream.port)) as kdns:
        for row in rows:
            ask = dns.asyncquery.tcp if row["tcp"] else dns.asyncquery.udp
            reply = await ask(query_of(row), "127.0.0.1", port=kdns.port, timeout=5)
            got = sections(reply)
            wanted = {key: row[key] for key in got}
            if not counted_down(got, wanted) and (name, *row["q"]) not in DIFFERENCES:
                differing.append((row["q"], got, wanted))
    assert not differing, f"{len(differing)} differ; the first: {differing[:3]}"
