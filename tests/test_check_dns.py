"""`kdns check` asks real DNS servers: what they leave out, add or say otherwise than the
registry, and otherwise than each other."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from running import RunningKdns, free_port
from test_check import HEALTHY, MANUAL, own_slice, second_pod

from kdns.cli import run
from kdns.explain.check import lasting
from kdns.explain.check_dns import Answer, Question, Replies, check_dns, questions_for
from kdns.explain.check_finding import Finding, finding
from kdns.registry.snapshot import Snapshot

COREFILE = """
.:0 {
    bind 127.0.0.1
    kubernetes cluster.local in-addr.arpa {
        manifests PATH
    }
}
"""
FRONT = """
---
apiVersion: v1
kind: Service
metadata: {name: front, namespace: default}
spec: {clusterIP: 10.96.0.70, selector: {app: web}, ports: [{name: http, port: 80}]}
"""
GROWN = HEALTHY + second_pod("db", "10.244.1.7")  # one more behind the headless Service


@dataclass(frozen=True)
class Case:
    """One server with faults, and what is found.

    registry -- the manifests that are right
    served   -- those that the server has
    corefile -- words of its Corefile -> others
    expect   -- (id, subject, words of the text, of the cause, of the advice); AT is its place
    """

    title: str
    expect: tuple[str, str, str, str, str]
    served: str = HEALTHY
    registry: str = HEALTHY
    corefile: Mapping[str, str] = ()  # type: ignore[assignment]


WEB, DB = "web.default.svc.cluster.local.", "db.default.svc.cluster.local."
CASES = [
    Case(
        "a Service that the server has not heard of",
        ("dns-name-missing", f"{WEB.replace('web', 'front')} A at AT",
         "NXDOMAIN, while Service default/front has 10.96.0.70",
         "does not know the Service yet: its watch of the API server hangs", "see the server's"
         " log"),
        registry=HEALTHY + FRONT,
    ),
    Case(
        "a Service that was made anew",
        ("dns-answer-differs", f"{WEB} A at AT", "gives 10.96.0.51, while Service default/web has"
         " 10.96.0.50", "the Service was made anew", "wait for the TTL"),
        HEALTHY.replace("10.96.0.50", "10.96.0.51"),
    ),
    Case(
        "an endpoint that the server has not heard of",
        ("dns-answer-missing", f"{DB} A at AT", "leaves out 10.244.1.7 of Service default/db",
         "the address is new", "wait for the TTL"),
        registry=GROWN,
    ),
    Case(
        "an endpoint that is gone",
        ("dns-answer-extra", f"{DB} A at AT", "gives 10.244.1.7 too, which Service default/db does"
         " not have", "the address is gone from the registry", "wait for the TTL"),
        GROWN,
    ),
    Case(
        "another port in SRV records",
        ("dns-port-differs", f"_http._tcp.{WEB} SRV at AT",
         "port 81, while Service default/web has 80", "its watch", "wait for the TTL"),
        HEALTHY.replace("name: http, port: 80,", "name: http, port: 81,"),
    ),
    Case(
        "an acl that refuses a name",
        ("dns-refused", f"{WEB} A at AT", "REFUSED, while Service default/web has 10.96.0.50",
         "an `acl` refuses us", "see the server's Corefile"),
        corefile={"    kubernetes": "    acl " + WEB + " {\n        block type A\n    }\n"
                                    "    kubernetes"},
    ),
    Case(
        "a wildcard for names that nobody has",
        ("dns-answers-anything", "DNS server AT",
         "kdns-check-asks-for-nobody.default.svc.cluster.local., which nobody has, with 192.0.2.1",
         "a wildcard: in a plugin `template`", "misspelt names"),
        corefile={"    kubernetes": "    template IN A cluster.local {\n"
                                    "        match ^kdns-check\n"
                                    '        answer "{{ .Name }} 60 IN A 192.0.2.1"\n'
                                    "        fallthrough\n    }\n    kubernetes"},
    ),
    Case(
        "a server of another zone",
        ("dns-not-a-cluster-dns", "DNS server AT", "knows none of 4 names of the registry",
         "no `kubernetes` for this zone", "the zone of `kubernetes`"),
        corefile={"cluster.local": "cluster.example"},
    ),
]  # fmt: skip


def asked(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    registry: str,
    corefiles: Sequence[str],
    more: Sequence[str] = (),
) -> tuple[int, list[dict[str, str]], list[str]]:
    """Serve each Corefile; return the exit code, the findings, and the servers' places.

    more -- further servers, which nobody serves
    """
    (folder / "registry.yaml").write_text(registry)

    async def main() -> tuple[int, list[str]]:
        async with contextlib.AsyncExitStack() as stack:
            servers = [await stack.enter_async_context(RunningKdns(text)) for text in corefiles]
            places = [f"127.0.0.1:{one.port}" for one in servers] + [*more]
            argv = ["check", "-f", str(folder / "registry.yaml"), "--server", ",".join(places),
                    "-o", "json", "--settle", "0"]  # fmt: skip
            return await asyncio.to_thread(run, argv), places

    code, places = asyncio.run(main())
    said = capsys.readouterr()
    told: Any = json.loads(said.out[said.out.index("{\n") :])
    return code, told["findings"], places


def corefile_of(folder: Path, manifests: str, name: str = "served.yaml") -> str:
    (folder / name).write_text(manifests)
    return COREFILE.replace("PATH", str(folder / name))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_a_server_that_answers_otherwise(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = corefile_of(tmp_path, case.served)
    for old, new in dict(case.corefile).items():
        assert old in text
        text = text.replace(old, new)
    code, found, (place,) = asked(tmp_path, capsys, case.registry, [text])
    id, subject, *words = case.expect
    one = next((one for one in found if one["id"] == id), None)
    assert one is not None and one["subject"] == subject.replace("AT", place), found
    for name, part in zip(("text", "cause", "advice"), words, strict=True):
        assert part in one[name], one
    assert {one["id"] for one in found} == {id}
    assert code == 1


def test_servers_that_are_right_have_no_finding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = corefile_of(tmp_path, GROWN)
    code, found, _ = asked(tmp_path, capsys, GROWN, [text, text])
    assert (code, found) == (0, [])


def test_two_replicas_that_answer_differently(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = corefile_of(tmp_path, GROWN)
    behind = corefile_of(tmp_path, HEALTHY, "behind.yaml")
    code, found, places = asked(tmp_path, capsys, GROWN, [right, behind])
    ids = {one["id"]: one for one in found}
    assert {*ids} == {"dns-answer-missing", "dns-servers-differ"}
    assert ids["dns-answer-missing"]["subject"] == f"{DB} A at {places[1]}"
    differ = ids["dns-servers-differ"]
    assert differ["subject"] == f"DNS servers {' and '.join(sorted(places))}"
    assert f"1 of 7 questions differently, {DB} A: " in differ["text"]
    assert "restart the one that is behind" in differ["advice"]
    assert code == 1


def test_a_server_that_does_not_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    text = corefile_of(tmp_path, HEALTHY)
    code, found, _ = asked(tmp_path, capsys, HEALTHY, [text], [nobody])
    (one,) = found
    assert (one["id"], one["subject"]) == ("dns-no-answer", f"DNS server {nobody}")
    assert "is a server listening there?" in one["text"]
    assert "UDP and TCP" in one["advice"] and code == 1


# --- by values ------------------------------------------------------------------------------

QUESTION = Question(WEB, "A")


def registry(tmp_path: Path, text: str = HEALTHY) -> Snapshot:
    from kdns.agent import list_registry
    from kdns.registry.spec import ManifestSpec

    (tmp_path / "registry.yaml").write_text(text)
    return list_registry(ManifestSpec((str(tmp_path / "registry.yaml"),)))


def test_every_name_of_the_registry_is_asked_for(tmp_path: Path) -> None:
    more = MANUAL.replace("10.96.0.60", "fd00:10:96::60") + own_slice("m", "manual", "10.9.9.9")
    asked = questions_for(registry(tmp_path, HEALTHY + more))
    assert {str(one): sorted(wanted.values) for one, wanted in asked.items()} == {
        f"{DB} A": ["10.244.1.6"],
        f"{DB} AAAA": [],
        "manual.default.svc.cluster.local. A": [],
        "manual.default.svc.cluster.local. AAAA": ["fd00:10:96::60"],
        "_http._tcp.manual.default.svc.cluster.local. SRV": ["80"],
        "outside.default.svc.cluster.local. CNAME": ["www.example.org."],
        f"{WEB} A": ["10.96.0.50"],
        f"{WEB} AAAA": [],
        f"_http._tcp.{WEB} SRV": ["80"],
    }


def of(
    answers: Mapping[str, Mapping[Question, Answer]], tmp_path: Path, **more: Any
) -> list[Finding]:
    expected = questions_for(registry(tmp_path), shown=[("default", "web")])
    return [*check_dns(expected, Replies(answers, **more))]


SILENT = {QUESTION: Answer("", why="no answer within 1 s")}
MISSING = {QUESTION: Answer("NXDOMAIN")}


def test_pods_that_cannot_be_reached_from_here_are_a_note(tmp_path: Path) -> None:
    (one,) = of({"10.244.0.2": SILENT, "10.244.0.3": SILENT}, tmp_path,
                found=["10.244.0.2", "10.244.0.3"])  # fmt: skip
    assert (one.id, one.severity) == ("dns-not-asked", "note")
    right = {QUESTION: Answer("NOERROR", frozenset({"10.96.0.50"}))}
    both = {"10.244.0.2": SILENT, "10.244.0.3": right}
    (one,) = of(both, tmp_path, found=[*both])
    assert (one.id, one.subject) == ("dns-no-answer", "DNS server 10.244.0.2")


def test_what_the_gate_keeps_back_is_not_missed(tmp_path: Path) -> None:
    assert [one.id for one in of({"a": MISSING}, tmp_path)] == ["dns-name-missing"]
    assert of({"a": MISSING}, tmp_path, hidden=[("default", "web")]) == []


def test_plugins_that_may_answer_first_are_named(tmp_path: Path) -> None:
    (one,) = of({"a": MISSING}, tmp_path, before=("rewrite", "hosts"))
    assert one.cause.startswith("the Corefile's `rewrite`, `hosts` may answer first; or ")


def test_what_a_second_look_does_not_find_again_was_on_its_way() -> None:
    passing = finding("dns-name-missing", "web A", "NXDOMAIN", "", "")
    other = passing._replace(subject="new A")
    lasts = finding("dns-no-answer", "DNS server a", "", "", "")
    assert lasting([passing], []) == []
    assert lasting([passing], [passing, other, lasts]) == [passing, lasts]
