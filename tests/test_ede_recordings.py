"""What CoreDNS was asked while it was recorded (tests/golden/dns), asked with EDNS: the answers
are the recorded ones, and what kdns says of them besides (RFC 8914) is a table.

tests/golden/ede/NAME.txt holds that table, a line for each question that gets a reason:
`NAME TYPE RCODE CODE TEXT`. It is the whole list of intended differences in OPT;
`EDE_GOLDEN=write pytest tests/test_ede_recordings.py` writes it anew, to be read before it is
committed.
"""

from __future__ import annotations

import json
import os

import dns.asyncquery
import pytest
from explained import reason_on_the_wire
from running import RunningKdns
from test_recordings import GOLDEN, NAMES, corefile, counted_down, query_of, sections
from upstream_server import UpstreamServer

pytestmark = pytest.mark.asyncio


@pytest.mark.parametrize("name", NAMES)
async def test_answers_are_coredns_s_and_their_reasons_are_in_the_table(name: str) -> None:
    rows = [json.loads(line) for line in (GOLDEN / "dns" / f"{name}.jsonl").open()]
    lines, differing = set(), []
    async with UpstreamServer() as upstream, RunningKdns(corefile(name, upstream.port)) as kdns:
        for row in rows:
            if "TC" in row["flags"].split():
                continue  # with EDNS there is more room
            query = query_of(row)
            query.use_edns(0, 0, payload=row["edns"] or 4096)
            # Over TCP: what does not fit is another test's matter.
            reply = await dns.asyncquery.tcp(query, "127.0.0.1", port=kdns.port, timeout=5)
            got = sections(reply)
            wanted = {key: row[key] for key in got}
            got["opt"] = wanted["opt"] = None
            if not counted_down(got, wanted):
                differing.append((row["q"], got, wanted))
            reason = reason_on_the_wire(reply)
            if reason:
                lines.add(f"{row['q'][0]} {row['q'][1]} {got['rcode']} {reason}")
    assert not differing, f"{len(differing)} differ; the first: {differing[:3]}"
    table = GOLDEN / "ede" / f"{name}.txt"
    if os.environ.get("EDE_GOLDEN") == "write":
        table.parent.mkdir(exist_ok=True)
        table.write_text("".join(f"{line}\n" for line in sorted(lines)))
    assert sorted(lines) == table.read_text().splitlines()
