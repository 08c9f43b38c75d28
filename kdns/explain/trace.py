"""One request, from the search list of the asker's libc to the rule of the kernel.

The order of it: who asks, the name, the address. What was read, and where, is evidence.py's.
"""

from __future__ import annotations

from kdns.explain.evidence import Evidence
from kdns.explain.search import Names
from kdns.explain.trace_client import client_of
from kdns.explain.trace_names import NameWay
from kdns.explain.trace_packet import PacketWay
from kdns.explain.trace_state import (
    End,
    Request,
    Trace,
    some,
)
from kdns.registry.endpoints import canonical_address


def trace(evidence: Evidence, request: Request) -> Trace:
    """Follow a request. Raises ConfigError where it names nobody, and for a bad name."""
    client = client_of(evidence, request.source)
    names = Names(evidence, client.addresses[0] if client.addresses else "")
    made = Trace(request, evidence, client, notes=[*evidence.notes, *names.notes])
    if evidence.node_told and (client.assumed or not client.node):
        made.notes.append(evidence.node_told)
    if client.assumed and client.name:
        made.notes.append(
            f"this kdns holds no Pods: {client.name} is taken for some Pod of its namespace"
        )
    found = canonical_address(request.name)
    address = found[1] if found is not None else NameWay(made, names).resolve()
    if address:
        PacketWay(made, names).connect(address)
    if made.end is None:
        made.end = end_of(made)
    return made


def end_of(made: Trace) -> End:
    """Return where it ends: at the first thing that stops it, or at the endpoints."""
    stop = made.stop
    if stop is not None:
        return End("stopped", stop.text, stop.id, stop.advice)
    chances = tuple((str(one), one.chance) for one in made.endpoints if one.chance)
    places = some([place for place, _ in chances])
    would = any(one.id == "nothing-forwards" for one in made.findings)
    arrives = "would arrive" if would else "arrives"
    one_of = f"{arrives} at" if len(chances) == 1 else f"{arrives} at one of {len(chances)}:"
    return End("endpoint", f"{one_of} {places}", endpoints=chances)
