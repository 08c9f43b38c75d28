"""The embedded API as any HTTP client meets it."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
import yaml
from asking_api import SERVICES, Api, named, service

from kdns.api.store import ObjectStore

MERGE = "application/merge-patch+json"
TABLE = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json"
pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def api() -> AsyncIterator[Api]:
    async with Api(ObjectStore()) as api:
        yield api


# --- objects --------------------------------------------------------------------------------


async def test_an_object_is_made_read_replaced_and_deleted(api: Api) -> None:
    made = await api.create(service("web"))
    assert made.code == 201
    meta = made.obj["metadata"]
    assert (meta["name"], meta["namespace"]) == ("web", "default")
    assert meta["uid"] and meta["creationTimestamp"]
    assert (await api.get(f"{SERVICES}/web")).obj == made.obj

    changed = made.obj
    changed["metadata"]["labels"] = {"a": "b"}
    replaced = await api.ask("PUT", f"{SERVICES}/web", changed)
    assert replaced.code == 200
    assert int(replaced.obj["metadata"]["resourceVersion"]) > int(meta["resourceVersion"])

    gone = await api.ask("DELETE", f"{SERVICES}/web")
    assert gone.code == 200
    assert gone.obj["metadata"]["uid"] == meta["uid"]
    missing = await api.get(f"{SERVICES}/web")
    assert (missing.code, missing.reason) == (404, "NotFound")
    assert missing.text == 'services "web" not found'
    assert missing.obj["details"] == {"name": "web", "kind": "services"}


async def test_a_kind_without_a_body_of_its_own_is_deleted_with_a_status(api: Api) -> None:
    path = "/api/v1/namespaces/default/configmaps"
    await api.create(named("settings", data={"a": "b"}), path)
    gone = await api.ask("DELETE", f"{path}/settings")
    assert (gone.obj["kind"], gone.obj["status"]) == ("Status", "Success")
    assert gone.obj["details"]["name"] == "settings"


async def test_yaml_is_taken_and_given(api: Api) -> None:
    text = yaml.safe_dump(service("web")).encode()
    made = await api.ask(
        "POST", SERVICES, text, kind="application/yaml", headers={"Accept": "application/yaml"}
    )
    assert made.code == 201
    assert made.headers["Content-Type"] == "application/yaml"
    assert yaml.safe_load(made.body)["metadata"]["name"] == "web"


async def test_an_old_version_is_not_written_over_a_new_one(api: Api) -> None:
    old = (await api.create(service("web"))).obj
    new = json.loads(json.dumps(old))
    new["metadata"]["labels"] = {"first": "yes"}
    assert (await api.ask("PUT", f"{SERVICES}/web", new)).code == 200
    late = await api.ask("PUT", f"{SERVICES}/web", old)
    assert (late.code, late.reason) == (409, "Conflict")
    assert "the object has been modified" in late.text


async def test_a_name_is_given_once(api: Api) -> None:
    await api.create(service("web"))
    again = await api.create(service("web"))
    assert (again.code, again.reason) == (409, "AlreadyExists")
    assert again.text == 'services "web" already exists'


async def test_a_generated_name(api: Api) -> None:
    obj = service("")
    obj["metadata"] = {"generateName": "web-"}
    names = {(await api.create(obj)).obj["metadata"]["name"] for _ in range(3)}
    assert len(names) == 3
    assert all(name.startswith("web-") and len(name) == 9 for name in names)


async def test_a_namespace_must_be_there(api: Api) -> None:
    answer = await api.create(service("web"), "/api/v1/namespaces/nowhere/services")
    assert (answer.code, answer.text) == (404, 'namespaces "nowhere" not found')


async def test_what_is_tried_dry_is_not_there(api: Api) -> None:
    answer = await api.create(service("web"), f"{SERVICES}?dryRun=All")
    assert answer.code == 201
    assert (await api.get(f"{SERVICES}/web")).code == 404
    wrong = await api.create(service("web"), f"{SERVICES}?dryRun=Some")
    assert wrong.code == 400


async def test_unknown_fields_are_refused_told_or_ignored(api: Api) -> None:
    obj = service("web", colour="red")
    strict = await api.create(obj, f"{SERVICES}?fieldValidation=Strict")
    assert strict.code == 400
    assert strict.text == (
        'Service in version "v1" cannot be handled as a Service: strict decoding error:'
        ' unknown field "spec.colour"'
    )
    warned = await api.create(obj)
    assert warned.code == 201
    assert warned.headers.getall("Warning") == ['299 - "unknown field \\"spec.colour\\""']
    assert "colour" not in warned.obj["spec"]
    obj["metadata"]["name"] = "web2"
    ignored = await api.create(obj, f"{SERVICES}?fieldValidation=Ignore")
    assert (ignored.code, ignored.headers.getall("Warning", [])) == (201, [])


async def test_a_patch_with_an_unknown_field(api: Api) -> None:
    await api.create(service("web"))
    patch = b'{"spec": {"colour": "red"}}'
    path = f"{SERVICES}/web?fieldValidation=Strict"
    answer = await api.ask("PATCH", path, patch, kind=MERGE)
    assert (answer.code, answer.reason) == (422, "Invalid")
    assert answer.text == (
        ' "" is invalid: patch: Invalid value: "{\\"spec\\": {\\"colour\\": \\"red\\"}}":'
        ' strict decoding error: unknown field "spec.colour"'
    )


async def test_a_field_said_twice(api: Api) -> None:
    body = b'{"metadata": {"name": "a", "name": "b"}, "spec": {"ports": [{"port": 80}]}}'
    path = f"{SERVICES}?fieldValidation=Strict"
    answer = await api.ask("POST", path, body)
    assert (answer.code, answer.reason) == (400, "BadRequest")
    assert 'duplicate field "metadata.name"' in answer.text
    await api.create(service("b"))
    assert (await api.ask("PUT", f"{SERVICES}/b?fieldValidation=Strict", body)).code == 400


async def test_finalizers_are_waited_for(api: Api) -> None:
    obj = service("web")
    obj["metadata"]["finalizers"] = ["example.com/tidy"]
    await api.create(obj)
    marked = await api.ask("DELETE", f"{SERVICES}/web")
    assert marked.obj["metadata"]["deletionTimestamp"]
    assert (await api.get(f"{SERVICES}/web")).code == 200
    patch = {"metadata": {"finalizers": None}}
    await api.ask("PATCH", f"{SERVICES}/web", patch, kind=MERGE)
    assert (await api.get(f"{SERVICES}/web")).code == 404


async def test_a_deletion_that_is_only_tried(api: Api) -> None:
    await api.create(service("web"))
    assert (await api.ask("DELETE", f"{SERVICES}/web", {"dryRun": ["All"]})).code == 200
    assert (await api.ask("DELETE", f"{SERVICES}/web?dryRun=All")).code == 200
    assert (await api.get(f"{SERVICES}/web")).code == 200


@pytest.mark.parametrize("said", [{"uid": "another"}, {"resourceVersion": "1"}])
async def test_a_deletion_that_meant_another_version(api: Api, said: dict[str, str]) -> None:
    await api.create(service("web"))
    answer = await api.ask("DELETE", f"{SERVICES}/web", {"preconditions": said})
    assert (answer.code, answer.reason) == (409, "Conflict")
    assert (await api.get(f"{SERVICES}/web")).code == 200


async def test_a_pod_on_a_node_is_gone_when_the_node_says_so(api: Api) -> None:
    path = "/api/v1/namespaces/default/pods"
    spec = {"nodeName": "node1", "containers": [{"name": "c", "image": "i"}]}
    await api.create(named("p", spec=spec), path)
    marked = (await api.ask("DELETE", f"{path}/p")).obj["metadata"]
    assert marked["deletionGracePeriodSeconds"] == 30
    assert marked["deletionTimestamp"] > marked["creationTimestamp"]
    assert (await api.get(f"{path}/p")).code == 200
    await api.ask("DELETE", f"{path}/p", {"gracePeriodSeconds": 0})
    assert (await api.get(f"{path}/p")).code == 404


async def test_all_of_a_selection_are_deleted_at_once(api: Api) -> None:
    for name, tier in (("a", "web"), ("b", "db"), ("c", "web")):
        await api.create(service(name, labels={"tier": tier}))
    gone = await api.ask("DELETE", f"{SERVICES}?labelSelector=tier%3Dweb")
    assert gone.names == ["a", "c"]
    assert (await api.get(SERVICES)).names == ["b"]


@pytest.mark.parametrize("name", ["default", "kube-system", "kube-public"])
async def test_some_namespaces_stay(api: Api, name: str) -> None:
    answer = await api.ask("DELETE", f"/api/v1/namespaces/{name}")
    assert (answer.code, answer.reason) == (403, "Forbidden")
    assert answer.text == f'namespaces "{name}" is forbidden: this namespace may not be deleted'


# --- patches and subresources --------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "patch"),
    [
        (MERGE, {"metadata": {"labels": {"a": "b"}}}),
        ("application/strategic-merge-patch+json", {"metadata": {"labels": {"a": "b"}}}),
        (
            "application/json-patch+json",
            [{"op": "add", "path": "/metadata/labels", "value": {"a": "b"}}],
        ),
    ],
)
async def test_patches(api: Api, kind: str, patch: Any) -> None:
    await api.create(service("web"))
    answer = await api.ask("PATCH", f"{SERVICES}/web", patch, kind=kind)
    assert answer.code == 200
    assert answer.obj["metadata"]["labels"] == {"a": "b"}
    assert (await api.ask("PATCH", f"{SERVICES}/no", patch, kind=kind)).code == 404


async def test_applying_makes_and_changes(api: Api) -> None:
    apply = "application/apply-patch+yaml"
    text = yaml.safe_dump(service("web")).encode()
    path = f"{SERVICES}/web?fieldManager=me"
    assert (await api.ask("PATCH", path, text, kind=apply)).code == 201
    assert (await api.ask("PATCH", path, text, kind=apply)).code == 200
    other = yaml.safe_dump(service("web", 80, internalTrafficPolicy="Local")).encode()
    await api.ask("PATCH", f"{SERVICES}/web?fieldManager=you", other, kind=apply)
    mine = yaml.safe_dump(service("web", 80, internalTrafficPolicy="Cluster")).encode()
    clash = await api.ask("PATCH", path, mine, kind=apply)
    assert (clash.code, clash.reason) == (409, "Conflict")
    assert 'conflict with "you"' in clash.text
    assert ".spec.internalTrafficPolicy" in clash.text
    assert (await api.ask("PATCH", f"{path}&force=true", mine, kind=apply)).code == 200


async def test_applying_a_field_that_is_none(api: Api) -> None:
    text = yaml.safe_dump(service("web", colour="red")).encode()
    path = f"{SERVICES}/web?fieldManager=me"
    answer = await api.ask("PATCH", path, text, kind="application/apply-patch+yaml")
    assert answer.code == 500
    assert answer.text == (
        "failed to create typed patch object (default/web; /v1, Kind=Service):"
        " .spec.colour: field not declared in schema"
    )


async def test_an_unknown_kind_of_patch(api: Api) -> None:
    await api.create(service("web"))
    answer = await api.ask("PATCH", f"{SERVICES}/web", {}, kind="application/json")
    assert (answer.code, answer.reason) == (415, "UnsupportedMediaType")


async def test_status_is_written_apart_from_the_rest(api: Api) -> None:
    obj = service("web", type="LoadBalancer")
    obj["status"] = {"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}]}}
    made = (await api.create(obj)).obj
    assert not made.get("status", {}).get("loadBalancer")
    made["status"] = obj["status"]
    made["metadata"]["labels"] = {"not": "now"}
    written = (await api.ask("PUT", f"{SERVICES}/web/status", made)).obj
    assert written["status"]["loadBalancer"]["ingress"][0]["ip"] == "192.0.2.1"
    assert "labels" not in written["metadata"]


def deployment(name: str) -> dict[str, Any]:
    labels = {"app": name}
    containers = [{"name": "c", "image": "i"}]
    return named(
        name,
        spec={
            "replicas": 2,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": containers}},
        },
    )


async def test_scale_stands_for_the_replicas(api: Api) -> None:
    path = "/apis/apps/v1/namespaces/default/deployments"
    await api.create(deployment("web"), path)
    scale = (await api.get(f"{path}/web/scale")).obj
    assert (scale["kind"], scale["spec"]["replicas"]) == ("Scale", 2)
    assert scale["status"]["selector"] == "app=web"
    scale["spec"]["replicas"] = 5
    assert (await api.ask("PUT", f"{path}/web/scale", scale)).obj["spec"]["replicas"] == 5
    patch = {"spec": {"replicas": 3}}
    assert (await api.ask("PATCH", f"{path}/web/scale", patch, kind=MERGE)).code == 200
    found = (await api.get(f"{path}/web")).obj
    assert found["spec"]["replicas"] == 3
    assert found["metadata"]["generation"] == 3
    wrong = await api.ask("PATCH", f"{path}/web/scale", {"spec": {"replicas": -1}}, kind=MERGE)
    assert (wrong.code, wrong.reason) == (422, "Invalid")
    assert wrong.obj["details"]["causes"][0]["field"] == "spec.replicas"


@pytest.mark.parametrize("sub", ["exec", "log", "portforward", "attach"])
async def test_a_pod_runs_nothing(api: Api, sub: str) -> None:
    path = "/api/v1/namespaces/default/pods"
    await api.create(named("p", spec={"containers": [{"name": "c", "image": "i"}]}), path)
    answer = await api.get(f"{path}/p/{sub}")
    assert answer.code == 501
    assert "runs no container" in answer.text


# --- lists ----------------------------------------------------------------------------------


async def test_lists_are_ordered_and_chosen_from(api: Api) -> None:
    await api.create(named("other"), "/api/v1/namespaces")
    await api.create(service("b", labels={"tier": "web"}))
    await api.create(service("a", labels={"tier": "db"}))
    await api.create(service("c"), "/api/v1/namespaces/other/services")
    listing = (await api.get(SERVICES)).obj
    assert listing["kind"] == "ServiceList"
    assert listing["metadata"]["resourceVersion"] == str(api.store.revision)
    table = [
        ("/api/v1/services", ["a", "b", "c"]),
        (SERVICES, ["a", "b"]),
        (f"{SERVICES}?labelSelector=tier%3Dweb", ["b"]),
        (f"{SERVICES}?labelSelector=tier+notin+(web)", ["a"]),
        (f"{SERVICES}?labelSelector=!tier", []),
        (f"{SERVICES}?fieldSelector=metadata.name%3Da", ["a"]),
        ("/api/v1/services?fieldSelector=metadata.namespace!%3Ddefault", ["c"]),
        (f"{SERVICES}?fieldSelector=spec.type%3DExternalName", []),
    ]
    assert [(path, (await api.get(path)).names) for path, _ in table] == table


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("fieldSelector=spec.colour%3Dred", 'field label not supported: "spec.colour"'),
        ("fieldSelector=name", "invalid selector"),
        ("labelSelector=a+in+b", "unable to parse requirement"),
        ("limit=many", "is not a whole number"),
        ("continue=x", "continue key is not valid"),
    ],
)
async def test_a_list_that_cannot_be_understood(api: Api, query: str, said: str) -> None:
    answer = await api.get(f"{SERVICES}?{query}")
    assert (answer.code, answer.reason) == (400, "BadRequest")
    assert said in answer.text


async def test_lists_in_pages(api: Api) -> None:
    for number in range(5):
        await api.create(service(f"s{number}"))
    names: list[str] = []
    more, left = "", []
    for _ in range(3):
        page = (await api.get(f"{SERVICES}?limit=2&continue={more}")).obj
        names += [item["metadata"]["name"] for item in page["items"]]
        more = page["metadata"].get("continue", "")
        left.append(page["metadata"].get("remainingItemCount"))
    assert names == ["s0", "s1", "s2", "s3", "s4"]
    assert (more, left) == ("", [3, 1, None])


async def test_a_revision_still_to_come(api: Api) -> None:
    answer = await api.get(f"{SERVICES}?resourceVersion=999999")
    assert (answer.code, answer.reason) == (504, "Timeout")
    assert answer.obj["details"]["causes"][0]["reason"] == "ResourceVersionTooLarge"
    assert answer.headers["Retry-After"] == "1"


async def test_a_large_list_is_compressed_for_who_asks(api: Api) -> None:
    filler = {f"k{n}": "x" * 1000 for n in range(200)}
    path = "/api/v1/namespaces/default/configmaps"
    await api.create(named("big", data=filler), path)
    async with (
        aiohttp.ClientSession(auto_decompress=False) as session,
        session.get(
            api.url + path,
            headers={"Authorization": "Bearer letmein", "Accept-Encoding": "gzip"},
        ) as answer,
    ):
        assert answer.headers["Content-Encoding"] == "gzip"
        body = await answer.read()
    assert len(body) < 20_000
    assert json.loads(gzip.decompress(body))["items"][0]["data"] == filler


async def test_a_table_of_thousands(api: Api) -> None:
    path = "/api/v1/namespaces/default/configmaps"
    for number in range(600):
        await api.create(named(f"c{number:03}", data={"a": "b"}), path)
    table = (await api.get(path, Accept=TABLE)).obj
    assert table["kind"] == "Table"
    assert [row["cells"][0] for row in table["rows"]] == [f"c{n:03}" for n in range(600)]


async def test_only_the_metadata(api: Api) -> None:
    await api.create(service("web", labels={"a": "b"}))
    kind = "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io"
    listing = (await api.get(SERVICES, Accept=kind)).obj
    assert listing["kind"] == "PartialObjectMetadataList"
    (item,) = listing["items"]
    assert item["metadata"]["labels"] == {"a": "b"}
    assert "spec" not in item


# --- watches ---------------------------------------------------------------------------------


async def test_a_watch_tells_what_happens_after_a_version(api: Api) -> None:
    since = (await api.create(service("before"))).obj["metadata"]["resourceVersion"]
    async with api.watch(f"resourceVersion={since}") as lines:
        await api.create(service("web"))
        patch = {"metadata": {"labels": {"a": "b"}}}
        await api.ask("PATCH", f"{SERVICES}/web", patch, kind=MERGE)
        await api.ask("DELETE", f"{SERVICES}/web")
        assert await lines.seen(3) == [("ADDED", "web"), ("MODIFIED", "web"), ("DELETED", "web")]


async def test_a_watch_of_one_object_and_of_another_namespace(api: Api) -> None:
    await api.create(named("other"), "/api/v1/namespaces")
    path = f"{SERVICES}/web"
    async with (
        api.watch("resourceVersion=1", path) as one,
        api.watch("resourceVersion=1", "/api/v1/namespaces/other/services") as other,
    ):
        await api.create(service("not"))
        await api.create(service("web"))
        await api.create(service("there"), "/api/v1/namespaces/other/services")
        assert await one.seen(1) == [("ADDED", "web")]
        assert await other.seen(1) == [("ADDED", "there")]


async def test_a_watch_without_a_version_begins_with_what_is_there(api: Api) -> None:
    await api.create(service("a"))
    async with api.watch("") as lines:
        assert await lines.seen(1) == [("ADDED", "a")]
        await api.create(service("b"))
        assert await lines.seen(1) == [("ADDED", "b")]


async def test_a_watch_says_where_what_was_there_ends(api: Api) -> None:
    """KEP-3157, which informers of client-go 1.35 and kubectl wait of 1.36 rely on."""
    await api.create(service("a"))
    ask = "sendInitialEvents=true&allowWatchBookmarks=true&resourceVersionMatch=NotOlderThan"
    async with api.watch(ask) as lines:
        assert await lines.seen(1) == [("ADDED", "a")]
        kind, obj = await lines.next()
        assert kind == "BOOKMARK"
        assert obj["metadata"]["annotations"] == {"k8s.io/initial-events-end": "true"}
        assert obj["metadata"]["resourceVersion"] == str(api.store.revision)
        assert obj["kind"] == "Service"
    wrong = await api.get(f"{SERVICES}?watch=1&sendInitialEvents=true")
    assert (wrong.code, wrong.reason) == (422, "Invalid")


async def test_a_watch_of_a_selection_sees_objects_come_and_go(api: Api) -> None:
    async with api.watch("resourceVersion=1&labelSelector=tier%3Dweb") as lines:
        await api.create(service("web", labels={"tier": "db"}))
        for tier in ("web", "db"):
            patch = {"metadata": {"labels": {"tier": tier}}}
            await api.ask("PATCH", f"{SERVICES}/web", patch, kind=MERGE)
        assert await lines.seen(2) == [("ADDED", "web"), ("DELETED", "web")]


async def test_a_watch_in_table_form_tells_its_columns_once(api: Api) -> None:
    async with api.watch("resourceVersion=1", Accept=TABLE) as lines:
        await api.create(service("a"))
        await api.create(service("b"))
        (_, first), (_, second) = await lines.next(), await lines.next()
    assert first["columnDefinitions"] and not second.get("columnDefinitions")
    assert [table["rows"][0]["cells"][0] for table in (first, second)] == ["a", "b"]


async def test_a_watch_ends_in_time(api: Api) -> None:
    async with api.watch("resourceVersion=1&timeoutSeconds=1") as lines:
        assert await lines.ended()


async def test_a_watch_from_a_version_no_longer_held(api: Api) -> None:
    async with Api(ObjectStore(history=3)) as small:
        for number in range(6):
            await small.create(service(f"s{number}"))
        async with small.watch("resourceVersion=1") as lines:
            kind, obj = await lines.next()
        assert (kind, obj["code"], obj["reason"]) == ("ERROR", 410, "Expired")


async def test_watches_end_with_the_server(api: Api) -> None:
    async with api.watch("resourceVersion=1") as lines:
        await api.server.stop()
        assert await lines.ended()


async def test_a_watcher_that_never_reads_is_cut_off() -> None:
    async with Api(ObjectStore(), patience=0.2) as api:
        path = "/api/v1/namespaces/default/configmaps"
        with socket.create_connection(("127.0.0.1", api.server.port)) as stuck:
            stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stuck.sendall(
                f"GET {path}?watch=1 HTTP/1.1\r\nHost: x\r\n"
                "Authorization: Bearer letmein\r\n\r\n".encode()
            )
            filler = {"x": "y" * 500_000}
            for number in range(20):
                await api.create(named(f"c{number}", data=filler), path)
            while api.server.watches:
                await asyncio.sleep(0.01)


async def test_a_thousand_watchers_hear_of_one_change(api: Api) -> None:
    connector = aiohttp.TCPConnector(limit=0)
    url = f"{api.url}{SERVICES}?watch=true&resourceVersion=1"
    headers = {"Authorization": "Bearer letmein"}
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:

        async def first() -> str:
            async with session.get(url) as answer:
                opened.release()
                line = await answer.content.readline()
                return str(json.loads(line)["object"]["metadata"]["name"])

        opened = asyncio.Semaphore(0)
        watchers = [asyncio.create_task(first()) for _ in range(1000)]
        for _ in watchers:
            await opened.acquire()
        await api.create(service("web"))
        assert set(await asyncio.gather(*watchers)) == {"web"}


async def test_endpoints_are_told_to_be_old(api: Api) -> None:
    path = "/api/v1/namespaces/default/endpoints"
    said = '299 - "v1 Endpoints is deprecated in v1.33+; use discovery.k8s.io/v1 EndpointSlice"'
    assert (await api.get(path)).headers.getall("Warning") == [said]
    assert (await api.create(named("web"), path)).headers.getall("Warning") == [said]
    async with api.watch("", path) as lines:
        assert lines.answer.headers.getall("Warning") == [said]


# --- what is asked around objects --------------------------------------------------------------


async def test_discovery_in_both_forms(api: Api) -> None:
    wanted = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"
    for path in ("/api", "/apis"):
        answer = await api.get(path, Accept=f"{wanted},application/json")
        assert answer.headers["Content-Type"] == wanted
        aggregated = {
            (group["metadata"].get("name", ""), version["version"], found["resource"])
            for group in answer.obj["items"]
            for version in group["versions"]
            for found in version["resources"]
        }
        if path == "/api":
            legacy = {
                ("", "v1", row["name"]) for row in (await api.get("/api/v1")).obj["resources"]
            }
        else:
            legacy = {
                (group["name"], "v1", row["name"])
                for group in (await api.get("/apis")).obj["groups"]
                for row in (await api.get(f"/apis/{group['name']}/v1")).obj["resources"]
            }
        assert aggregated == {row for row in legacy if "/" not in row[2]}
    assert (await api.get("/apis/nothing.example")).code == 404


async def test_version_and_health_are_for_everybody(api: Api) -> None:
    anybody = {"Authorization": "nobody"}
    assert (await api.get("/version", **anybody)).obj["minor"] == "36"
    for path in ("/healthz", "/livez", "/readyz"):
        assert (await api.get(path, **anybody)).body == b"ok"
    api.server.ready = lambda: False
    assert (await api.get("/readyz?verbose", **anybody)).code == 500
    assert (await api.get("/livez", **anybody)).code == 200


async def test_without_the_token_nobody_is_heard(api: Api) -> None:
    for said in ("", "Bearer ", "Bearer wrong", "Basic bGV0bWVpbg=="):
        answer = await api.get(SERVICES, Authorization=said)
        assert (answer.code, answer.reason) == (401, "Unauthorized")


async def test_who_may_do_what(api: Api) -> None:
    path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
    body = {"spec": {"resourceAttributes": {"verb": "create", "resource": "pods"}}}
    assert (await api.create(body, path)).obj["status"] == {"allowed": True}


@pytest.mark.parametrize(
    ("method", "path", "body", "kind", "code", "reason"),
    [
        ("POST", SERVICES, b"{", "application/json", 400, "BadRequest"),
        ("POST", SERVICES, b"[]", "application/json", 400, "BadRequest"),
        ("POST", SERVICES, b"\xff", "application/json", 400, "BadRequest"),
        ("POST", SERVICES, b"{}", "text/plain", 415, "UnsupportedMediaType"),
        ("POST", SERVICES, b"k8s\0\xff", "application/vnd.kubernetes.protobuf", 400, "BadRequest"),
        ("POST", SERVICES, b'{"kind": "Pod", "apiVersion": "v1"}', "application/json", 400,
         "BadRequest"),
        ("DELETE", f"{SERVICES}/x", b'{"preconditions": 1}', "application/json", 400,
         "BadRequest"),
        ("DELETE", f"{SERVICES}/x", b'{"propagationPolicy": "No"}', "application/json", 400,
         "BadRequest"),
        ("DELETE", f"{SERVICES}/x", b'{"dryRun": ["Some"]}', "application/json", 400,
         "BadRequest"),
        ("POST", SERVICES, b"x" * ((3 << 20) + 1), "application/json", 413,
         "RequestEntityTooLarge"),
        ("POST", "/api/v1/services", b"{}", "application/json", 405, "MethodNotAllowed"),
        ("PUT", SERVICES, b"{}", "application/json", 405, "MethodNotAllowed"),
        ("GET", "/api/v1/namespaces/default/gadgets", None, "", 404, "NotFound"),
        ("GET", "/apis/example.com/v1/gadgets", None, "", 404, "NotFound"),
        ("POST", "/apis/example.com/v1/gadgets", b"{}", "application/json", 404, "NotFound"),
        ("GET", "/nothing", None, "", 404, "NotFound"),
        ("POST", "/version", b"{}", "application/json", 405, "MethodNotAllowed"),
    ],
)  # fmt: skip
async def test_what_cannot_be_served_is_told(
    api: Api, method: str, path: str, body: bytes | None, kind: str, code: int, reason: str
) -> None:
    answer = await api.ask(method, path, body, kind=kind)
    assert (answer.code, answer.reason) == (code, reason)
    assert answer.obj["kind"] == "Status"
    assert answer.text


async def test_an_answer_in_protobuf_alone_cannot_be_had(api: Api) -> None:
    only = "application/vnd.kubernetes.protobuf"
    assert (await api.get(SERVICES, Accept=only)).code == 406
    assert (await api.get(SERVICES, Accept=f"{only},application/json")).code == 200
