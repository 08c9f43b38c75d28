"""What a run side by side with CoreDNS 1.13.1 and 1.14.7 showed to differ, and no longer does.

Each case is a question whose answer was wrong; the answers expected are CoreDNS's.
"""

from __future__ import annotations

import dns.flags
import dns.message
import pytest
from objects import endpoint, kubernetes, service, slice_of
from support import Stub, a, answer, build, directives, make_setup, question, run

from kdns.dns import types as t
from kdns.dns.message import AA, RA, RR, Edns, Reply, failure, render_reply
from kdns.dns.name import ROOT, parse_name, render_name
from kdns.dns.text import render_rr
from kdns.plugins.bind import setup as setup_bind
from kdns.plugins.chain import Chain, Router
from kdns.plugins.plugin import DROP, Plugin, WatchFile
from kdns.server.http import freshness

DB = service("db", ip="None", ports=[("pg", 5432, "TCP")])
DB_SLICE = slice_of("db", endpoint("10.244.1.50", hostname="db-0"), ports=[("pg", 5432, "TCP")])


def word(reply: Reply) -> str:
    """The rcode, or NODATA for a NOERROR without answers."""
    rcode = t.rcode_name(reply.rcode)
    return "NODATA" if rcode == "NOERROR" and not reply.answer else rcode


def lines(section: list[RR]) -> list[str]:
    return [render_rr(rr) for rr in section]


# --- kubernetes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "qtype", "expected"),
    [
        # The structure of a forward zone is there in a reverse zone too, above the addresses.
        ("ns.dns.in-addr.arpa.", "A", "NODATA"),
        ("svc.in-addr.arpa.", "AAAA", "NODATA"),
        ("pod.in-addr.arpa.", "PTR", "NODATA"),
        ("svc.in-addr.arpa.", "TXT", "NXDOMAIN"),
        ("dns-version.in-addr.arpa.", "TXT", "NOERROR"),
        ("default.svc.in-addr.arpa.", "A", "NXDOMAIN"),
        ("db.default.svc.in-addr.arpa.", "A", "NXDOMAIN"),
        ("50.1.244.10.in-addr.arpa.", "PTR", "NOERROR"),
        ("50.1.244.10.in-addr.arpa.", "A", "NXDOMAIN"),
        ("1.244.10.in-addr.arpa.", "PTR", "NXDOMAIN"),
        # A PTR question for ns.dns asks for a name that does not exist.
        ("ns.dns.cluster.local.", "PTR", "NXDOMAIN"),
        ("ns.dns.cluster.local.", "A", "NODATA"),
    ],
)
def test_names_of_a_reverse_zone(name: str, qtype: str, expected: str) -> None:
    plugin = kubernetes("", DB, DB_SLICE)
    assert word(answer([plugin], question(name, qtype))) == expected


@pytest.mark.parametrize(
    ("zones", "primary"),
    [
        # 10.244.1.0/25 is cut into zones of one address: each such name is its own apex.
        ("cluster.local 10.244.1.0/25", "cluster.local."),
        # The root holds the reverse names too.
        (".", ""),
    ],
)
def test_a_pointer_is_found_in_whatever_zone_it_lies(zones: str, primary: str) -> None:
    plugin = kubernetes("", DB, DB_SLICE, zones=zones)
    name = "50.1.244.10.in-addr.arpa."
    reply = answer([plugin], question(name, "PTR"))
    assert lines(reply.answer) == [f"{name} 5 IN PTR db-0.db.default.svc.{primary}"]


# --- messages -----------------------------------------------------------------------------


def test_glue_points_at_the_target_of_its_srv_record() -> None:
    """miekg/dns does so; more glue fits into 512 octets. The target itself is written whole
    (RFC 2782)."""
    owner = parse_name("_pg._tcp.members.some-namespace.svc.cluster.local.")
    hosts = [f"member-{n}.members.some-namespace.svc.cluster.local." for n in range(5)]
    answers = [RR(owner, t.SRV, 5, b"\0\0\0\x14\x15\x38" + parse_name(host)) for host in hosts]
    reply = Reply(answer=answers, additional=[a(host, "10.0.0.1", 5) for host in hosts])
    wire = render_reply(
        question("_pg._tcp.members.some-namespace.svc.cluster.local.", "SRV"), reply
    )
    message = dns.message.from_wire(wire)
    assert not message.flags & dns.flags.TC
    assert [str(rrset.name) for rrset in message.additional] == hosts
    # Pointer, type, class, TTL, length, address: 16 octets each.
    glue = [wire[at : at + 16] for at in range(len(wire) - 5 * 16, len(wire), 16)]
    assert [record[0] & 0xC0 for record in glue] == [0xC0] * 5
    assert {record[2:] for record in glue} == {b"\0\1\0\1\0\0\0\5\0\4\x0a\0\0\1"}


# --- server blocks ------------------------------------------------------------------------


def test_a_block_of_directives_that_answer_nothing_refuses_as_an_empty_one() -> None:
    plugins = setup_bind(directives("bind 127.0.0.1"), make_setup())
    reply = Router({ROOT: Chain(plugins)}).resolve(question("a.test."))
    assert isinstance(reply, Reply)
    assert reply.rcode == t.REFUSED


def test_a_bad_edns_version_is_not_counted_as_dropped() -> None:
    counted: list[Reply] = []

    def unmatched(query: object, reply: Reply) -> Reply:
        counted.append(reply)
        return reply

    router = Router({parse_name("a.test."): Chain([Stub()])}, unmatched=unmatched)
    reply = router.resolve(question("a.test.", edns=Edns(1232, False, version=1)))
    assert isinstance(reply, Reply) and reply.rcode == t.BADVERS
    router.resolve(question("b.test."))
    assert [t.rcode_name(reply.rcode) for reply in counted] == ["REFUSED"]


# --- replies that are a mere rcode ---------------------------------------------------------


class Fails(Plugin):
    """Ends every query as a `forward` does that no upstream answers."""

    def on_query(self, query: object) -> Reply:
        return failure(t.SERVFAIL, "no upstream answers")


def test_header_leaves_a_failure_alone_that_nobody_wrote() -> None:
    rule = "header {\n response set aa ra\n}"
    assert answer([*build(rule), Fails()], question("a.test.")).flags & (AA | RA) == 0
    nobody = build(f"{rule}\ntemplate IN A . {{\n rcode SERVFAIL\n}}")
    assert answer(nobody, question("a.test.")).flags & (AA | RA) == 0
    written = build(f"{rule}\ntemplate IN A . {{\n rcode REFUSED\n}}")
    assert answer(written, question("a.test.")).flags & (AA | RA) == AA | RA


# --- file ---------------------------------------------------------------------------------

ZONE = b"""$TTL 300
@ SOA ns admin 1 7200 1800 86400 60
@ NS ns
www CNAME web
web A 192.0.2.1
chain CNAME www
gone CNAME nowhere
empty CNAME ent
a.ent A 192.0.2.2
"""


def zone(text: str) -> list[Plugin]:
    plugins = build(text)
    for plugin in plugins:
        for work in plugin.work():
            if isinstance(work, WatchFile):
                assert work.load(ZONE, "")
    return plugins


def test_a_notify_for_a_zone_file_is_dropped() -> None:
    query = question("example.org.", "SOA")
    query.flags |= t.NOTIFY << 11
    assert run(zone("file db example.org"), query) is DROP


@pytest.mark.parametrize(
    ("name", "authority"),
    [
        # Behind one CNAME the NS that are not there have the SOA; behind two, as other types.
        ("www.example.org.", "SOA"),
        ("chain.example.org.", "NS"),
    ],
)
def test_ns_of_an_alias(name: str, authority: str) -> None:
    reply = answer(zone("file db example.org"), question(name, "NS"))
    assert {t.type_name(rr.type) for rr in reply.answer} == {"CNAME"}
    assert [t.type_name(rr.type) for rr in reply.authority] == [authority]


@pytest.mark.parametrize("target", ["nowhere.example.org.", "ent.example.org."])
def test_what_an_alias_leads_to_falls_through_too(target: str) -> None:
    alias = {"nowhere.example.org.": "gone.example.org.", "ent.example.org.": "empty.example.org."}
    below = Stub({(target, "A"): Reply(answer=[a(target, "192.0.2.9")])})
    plugins = zone("file db example.org {\n fallthrough\n}")
    reply = answer([*plugins, below], question(alias[target]))
    assert lines(reply.answer) == [
        f"{alias[target]} 300 IN CNAME {target}",
        f"{target} 300 IN A 192.0.2.9",
    ]
    assert lines(reply.authority) == ["example.org. 300 IN NS ns.example.org."]


def test_what_an_alias_leads_to_is_missing_all_the_same() -> None:
    plugins = zone("file db example.org")
    reply = answer(plugins, question("gone.example.org."))
    assert t.rcode_name(reply.rcode) == "NXDOMAIN"
    assert lines(reply.answer) == ["gone.example.org. 300 IN CNAME nowhere.example.org."]
    assert [t.type_name(rr.type) for rr in reply.authority] == ["SOA"]


# --- what people see ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "text"),
    [
        (b"a b", "a\\ b."),
        (b"it's", "it\\'s."),
        (b"$x", "$x."),
        (b"a.b", "a\\.b."),
        (b'"();@\\', '\\"\\(\\)\\;\\@\\\\.'),
        (b"\t\x7f", "\\009\\127."),
    ],
)
def test_names_are_written_as_miekg_dns_writes_them(label: bytes, text: str) -> None:
    wire = bytes((len(label),)) + label + ROOT
    assert render_name(wire) == text
    assert parse_name(text) == wire


def test_the_log_shows_tc_where_the_answer_was_cut(caplog: pytest.LogCaptureFixture) -> None:
    many = [a("many.test.", f"10.0.0.{n}") for n in range(60)]
    below = Stub({("many.test.", "A"): Reply(answer=many)})
    plugins = [*build('log . "{>rflags} {rsize}"'), below]
    with caplog.at_level("INFO"):
        answer(plugins, question("many.test."))
        answer(plugins, question("many.test.", proto="tcp"))
        answer(plugins, question("many.test.", edns=Edns(1232, False)))
    assert [record.getMessage() for record in caplog.records] == [
        "qr,aa,tc,rd 1527",
        "qr,aa,rd 1527",
        "qr,aa,rd 1527",  # fits once it is compressed
    ]


def test_the_error_says_after_which_plugin_there_was_none() -> None:
    reply = answer(build("errors\nlog"), question("a.test."))
    assert reply.error == "plugin/log: no next plugin found"


@pytest.mark.parametrize(
    ("reply", "seconds"),
    [
        (Reply(answer=[a("a.test.", "192.0.2.1", 300)]), 300),
        (Reply(answer=[a("a.test.", "192.0.2.1", 90000)]), 3600),
        # The lowest TTL of all sections.
        (Reply(answer=[a("a.test.", "192.0.2.1")], additional=[a("b.test.", "192.0.2.1", 7)]), 7),
        (Reply(t.SERVFAIL), 5),
        (Reply(), 5),
    ],
)
def test_how_long_an_answer_over_https_stays_fresh(reply: Reply, seconds: int) -> None:
    assert freshness(reply) == seconds
