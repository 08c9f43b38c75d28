"""docs/API.md says what the embedded API serves: its table is what really happens.

WRITE_DOCS=1 writes it anew.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from asking_api import Api, Obj, service

from kdns.api.kinds import RESOURCES, Resource
from kdns.api.negotiate import JSON
from kdns.api.objects import APPLY_PATCH, JSON_PATCH, MERGE_PATCH, STRATEGIC_PATCH
from kdns.api.store import ObjectStore

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "API.md"
BEGIN, END = "<!-- supported: begin -->", "<!-- supported: end -->"
POD = {"containers": [{"name": "c", "image": "i"}]}
LABELS = {"app": "x"}
TEMPLATE = {"metadata": {"labels": LABELS}, "spec": POD}
WORKLOAD = {"selector": {"matchLabels": LABELS}, "template": TEMPLATE}
# What an object of each kind must say besides its name.
MEMBERS: dict[str, Obj] = {
    "Pod": {"spec": POD},
    "Event": {"involvedObject": {"kind": "Pod", "name": "p", "namespace": "default"}},
    "EndpointSlice": {"addressType": "IPv4", "endpoints": [], "ports": []},
    "ServiceCIDR": {"spec": {"cidrs": ["10.0.0.0/24"]}},
    "Deployment": {"spec": WORKLOAD},
    "ReplicaSet": {"spec": WORKLOAD},
    "StatefulSet": {"spec": {**WORKLOAD, "serviceName": "x"}},
}


def sample(resource: Resource, name: str) -> Obj:
    if resource.kind == "Service":
        return service(name)
    head = {"apiVersion": resource.api_version, "kind": resource.kind, "metadata": {"name": name}}
    return {**head, **MEMBERS.get(resource.kind, {})}


def place(resource: Resource) -> str:
    group = f"/apis/{resource.api_version}" if resource.group else "/api/v1"
    return f"{group}/{'namespaces/default/' if resource.namespaced else ''}{resource.plural}"


async def supported(api: Api, resource: Resource) -> list[str]:
    """Make every request of a kind; return the row of the table."""
    path = place(resource)
    one = f"{path}/x"
    labels = {"metadata": {"labels": {"a": "b"}}}

    async def works(method: str, path: str, body: Any = None, kind: str = JSON) -> str:
        answer = await api.ask(method, path, body, kind=kind)
        return "yes" if answer.code in (200, 201) else f"no ({answer.code})"

    row = [f"`{resource.api_version}` {resource.kind}"]
    row.append(await works("POST", path, sample(resource, "x")))
    row.append(await works("GET", one))
    row.append(await works("GET", path))
    async with api.watch("timeoutSeconds=1&sendInitialEvents=true"
                         "&resourceVersionMatch=NotOlderThan", path) as lines:  # fmt: skip
        row.append("yes" if (await lines.next())[0] == "ADDED" else "no")
    row.append(await works("PUT", one, (await api.get(one)).obj))
    add = [{"op": "add", "path": "/metadata/annotations", "value": {"a": "b"}}]
    for kind, body in ((JSON_PATCH, add), (MERGE_PATCH, labels), (STRATEGIC_PATCH, labels)):
        row.append(await works("PATCH", one, body, kind))
    text = yaml.safe_dump(sample(resource, "x")).encode()
    row.append(await works("PATCH", f"{one}?fieldManager=t&force=true", text, APPLY_PATCH))
    subs = []
    for sub in ("status", "scale"):
        answer = await api.get(f"{one}/{sub}")
        if answer.code == 200:
            subs.append(f"`{sub}`")
        else:
            assert answer.code == 404
    row.append(", ".join(subs) or "-")
    row.append(await works("DELETE", one))
    await api.create(sample(resource, "y"), path)
    row.append(await works("DELETE", f"{path}?fieldSelector=metadata.name%3Dy"))
    return row


def test_the_page_names_each_member_of_a_cluster() -> None:
    import inspect

    from kdns.cluster import Cluster

    text = DOCUMENT.read_text().split("## From Python")[1].split("\n## ")[0]
    members = {name for name in vars(Cluster) if not name.startswith("_")} - {"start", "stop"}
    options = set(inspect.signature(Cluster).parameters)
    named = set(re.findall(r"`([a-z_]+)[(`]", text))
    assert members - named == set()
    for_up = {"control", "gate_timeout", "guest", "node_addresses"}  # by `kdns up` alone
    assert options - named == for_up


@pytest.mark.asyncio
async def test_the_table_of_supported_requests_is_what_happens() -> None:
    columns = [
        "kind", "create", "get", "list", "watch", "replace", "JSON patch", "merge patch",
        "strategic merge patch", "server-side apply", "subresources", "delete",
        "deletecollection",
    ]  # fmt: skip
    rows = [columns, ["---"] * len(columns)]
    for resource in RESOURCES:
        async with Api(ObjectStore()) as api:
            rows.append(await supported(api, resource))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    held = DOCUMENT.read_text()
    before, _, rest = held.partition(BEGIN)
    _, _, after = rest.partition(END)
    wanted = f"{before}{BEGIN}\n{table}\n{END}{after}"
    if os.environ.get("WRITE_DOCS"):
        DOCUMENT.write_text(wanted)
    assert held == wanted or os.environ.get("WRITE_DOCS"), table
    assert "no (" not in table
