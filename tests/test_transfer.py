"""`transfer`: who gets a zone, and in which messages. dnspython is the secondary."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from ipaddress import ip_address

import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
import dns.xfr
import dns.zone
import pytest
from support import Stub, answer, build, errors_of, make_setup, question, run

from kdns.dns import types as t
from kdns.dns.message import RR, Query, Reply, parse_query, render_reply
from kdns.dns.name import parse_name
from kdns.plugins.plugin import Outcome, Plugin, WatchFile
from kdns.plugins.transfer import MAX_OCTETS, MAX_RECORDS

DB = "$TTL 300\n@ SOA ns admin 2026010101 7200 1800 86400 60\n@ NS ns\nns A 192.0.2.53\n"


def served(transfer: str, body: str = "www A 192.0.2.1\n") -> list[Plugin]:
    """Build `file db example.org` with a transfer directive above it."""
    plugins = build(f"{transfer}\nfile db example.org", make_setup(("example.org.",)))
    watch = plugins[-1].work()[0]
    assert isinstance(watch, WatchFile)
    assert watch.load((DB + body).encode(), "")
    return plugins


OPEN = "transfer {\nto *\n}"


def messages(plugins: list[Plugin], wire: bytes, client: str = "127.0.0.1") -> list[bytes]:
    """Return the messages a TCP client is sent."""
    query = parse_query(wire, (client, 40000), "tcp", 0.0)
    reply = answer(plugins, query)
    out = [render_reply(query, reply)]
    for batch in reply.stream or ():
        out.append(render_reply(query, Reply(reply.rcode, batch, flags=reply.flags)))
    return out


def axfr(plugins: list[Plugin], name: str = "example.org.") -> dns.zone.Zone:
    """Be a secondary: read a full transfer and return the zone it makes."""
    request = dns.message.make_query(name, "AXFR")
    zone = dns.zone.Zone(name, relativize=False)
    with dns.xfr.Inbound(zone, dns.rdatatype.AXFR) as inbound:
        done = False
        for wire in messages(plugins, request.to_wire()):
            assert not done
            assert len(wire) < 65536
            done = inbound.process_message(dns.message.from_wire(wire, xfr=True))
        assert done
    return zone


def test_a_secondary_gets_the_whole_zone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    plugins = served(OPEN, "www A 192.0.2.1\n*.w TXT a\nsub NS ns.sub\nns.sub A 192.0.2.2\n")
    expected = dns.zone.from_text(
        DB + "www A 192.0.2.1\n*.w TXT a\nsub NS ns.sub\nns.sub A 192.0.2.2\n",
        "example.org.", relativize=False,
    )  # fmt: skip
    assert axfr(plugins) == expected
    assert (
        "zone example.org. sent to 127.0.0.1: 8 records with SOA serial 2026010101" in caplog.text
    )


def test_a_large_zone_comes_in_many_messages() -> None:
    body = "".join(f"h{i} TXT {'x' * 200} {'y' * 200}\n" for i in range(400))
    plugins = served(OPEN, body + "$GENERATE 1-3000 g$ A 192.0.2.1\n")
    zone = axfr(plugins)
    assert len(list(zone.iterate_rdatas())) == 3403
    reply = answer(plugins, question("example.org.", "AXFR", proto="tcp"))
    sizes = []
    for batch in [reply.answer, *reply.stream]:
        assert len(batch) <= MAX_RECORDS
        sizes.append(sum(len(rr.name) + len(rr.tail) for rr in batch))
    assert max(sizes) <= MAX_OCTETS
    assert len(sizes) > 6


def ixfr(serial: int) -> bytes:
    request = dns.message.make_query("example.org.", "IXFR")
    soa = f"ns.example.org. a.example.org. {serial} 1 1 1 1"
    request.authority.append(dns.rrset.from_text("example.org.", 0, "IN", "SOA", soa))
    return request.to_wire()


@pytest.mark.parametrize(
    ("serial", "records"),
    [
        (2026010101, 1),  # up to date
        (2026010102, 1),  # newer than ours (RFC 1995 s2)
        (2026010100, 5),  # behind: the whole zone
        (1, 5),
        (0, 5),
        (4200000000, 5),  # behind in serial arithmetic (RFC 1982)
    ],
)
def test_an_incremental_transfer_is_one_soa_or_the_whole_zone(serial: int, records: int) -> None:
    found = messages(served(OPEN), ixfr(serial))
    read = [dns.message.from_wire(m, xfr=True, one_rr_per_rrset=True) for m in found]
    rrsets = [rrset for message in read for rrset in message.answer]
    assert read[0].rcode() == 0
    assert rrsets[0].rdtype == dns.rdatatype.SOA
    assert len(rrsets) == records


def test_an_incremental_transfer_must_say_from_where() -> None:
    plugins = served(OPEN)
    bare = dns.message.make_query("example.org.", "IXFR").to_wire()
    assert dns.message.from_wire(messages(plugins, bare)[0]).rcode() == dns.rcode.SERVFAIL


CLIENTS = [
    # the directive, who asks, the rcode
    ("to *", "198.51.100.7", "NOERROR"),
    ("to 198.51.100.7", "198.51.100.7", "NOERROR"),
    ("to 198.51.100.7", "198.51.100.8", "REFUSED"),
    ("to 198.51.100.7:5300", "198.51.100.7", "NOERROR"),
    ("to 198.51.100.1 198.51.100.7", "198.51.100.7", "NOERROR"),
    ("to 198.51.100.1\nto 198.51.100.7", "198.51.100.7", "NOERROR"),
    ("to 198.51.100.1\nto *", "198.51.100.7", "NOERROR"),
    ("to 198.51.100.7", "::ffff:198.51.100.7", "NOERROR"),
    ("to 2001:DB8:0::1", "2001:db8::1", "NOERROR"),
    ("to [2001:db8::1]:53", "2001:db8::1", "NOERROR"),
    ("to fe80::1", "fe80::1%eth0", "NOERROR"),
    ("to 2001:db8::1", "2001:db8::2", "REFUSED"),
]


@pytest.mark.parametrize(("to", "client", "rcode"), CLIENTS)
def test_only_those_named_get_it(to: str, client: str, rcode: str) -> None:
    plugins = served(f"transfer {{\n{to}\n}}")
    reply = answer(plugins, question("example.org.", "AXFR", proto="tcp", client=client))
    assert t.rcode_name(reply.rcode) == rcode
    assert bool(reply.answer) is (rcode == "NOERROR")
    assert reply.keep == 0


@pytest.mark.parametrize("qtype", ["AXFR", "IXFR"])
@pytest.mark.parametrize(("proto", "rcode"), [("udp", "REFUSED"), ("https", "REFUSED")])
def test_only_over_a_stream(qtype: str, proto: str, rcode: str) -> None:
    reply = answer(served(OPEN), question("example.org.", qtype, proto=proto))
    assert t.rcode_name(reply.rcode) == rcode


def test_over_tls_too() -> None:
    reply = answer(served(OPEN), question("EXAMPLE.org.", "AXFR", proto="tls"))
    assert reply.rcode == t.NOERROR
    assert reply.answer[0].type == t.SOA


OTHERS = [
    ("www.example.org.", "file's own refusal: no such zone"),
    ("example.net.", "no rule, no zone"),
]


@pytest.mark.parametrize(("name", "why"), OTHERS)
def test_a_name_that_is_no_zone_is_refused(name: str, why: str) -> None:
    reply = answer(served(OPEN), question(name, "AXFR", proto="tcp"))
    assert t.rcode_name(reply.rcode) == "REFUSED", why


def test_a_zone_whose_file_is_not_loaded_is_servfail() -> None:
    plugins = build(f"{OPEN}\nfile db example.org")
    reply = answer(plugins, question("example.org.", "AXFR", proto="tcp"))
    assert t.rcode_name(reply.rcode) == "SERVFAIL"


def test_other_types_are_none_of_its_business() -> None:
    stub = Stub()
    transfer = build(OPEN)[0]
    for qtype in ("A", "SOA", "ANY"):
        assert transfer.on_query(question("example.org.", qtype, proto="tcp")) is None
    run([transfer, stub], question("example.org.", "AXFR", proto="tcp"))
    assert len(stub.asked) == 1


class Two(Plugin):
    """Another plugin with a zone to give."""

    word = "two"

    def on_query(self, query: Query) -> Outcome:
        return Reply(t.REFUSED)

    def transfer_records(self, zone: bytes) -> tuple[int, Iterator[RR]] | None:
        if zone != parse_name("two.test."):
            return None
        soa = RR(zone, t.SOA, 5, zone + zone + bytes(20))
        address = RR(zone, t.A, 5, ip_address("192.0.2.2").packed)
        return 0, iter((soa, address, soa))


def test_the_longest_zone_rules_and_any_plugin_with_zones_is_asked() -> None:
    text = "transfer . {\nto 192.0.2.1\n}\ntransfer two.test example.org {\nto *\n}"
    plugins = [*served(text), Two()]
    reply = answer(plugins, question("two.test.", "AXFR", proto="tcp"))
    assert [rr.type for rr in reply.answer] == [t.SOA, t.A, t.SOA]
    assert answer(plugins, question("example.org.", "AXFR", proto="tcp")).rcode == t.NOERROR
    plugins = [*served("transfer . {\nto *\n}\ntransfer two.test {\nto 192.0.2.1\n}"), Two()]
    assert answer(plugins, question("two.test.", "AXFR", proto="tcp")).rcode == t.REFUSED
    assert answer(plugins, question("example.org.", "AXFR", proto="tcp")).rcode == t.NOERROR


def test_a_transfer_under_way_is_of_one_zone_even_if_the_file_changes() -> None:
    plugins = served(OPEN, "$GENERATE 1-2000 a$ A 192.0.2.1\n")
    reply = answer(plugins, question("example.org.", "AXFR", proto="tcp"))
    watch = plugins[-1].work()[0]
    assert isinstance(watch, WatchFile)
    assert watch.load(DB.replace("2026010101", "2026010102").encode(), "")
    records = [*reply.answer, *(rr for batch in reply.stream for rr in batch)]
    assert len(records) == 2000 + 4
    assert records[0] == records[-1]


SAID = [
    ("transfer", "'to ADDRESS...' is required; 'to *' is everyone"),
    ("transfer {\n}", "'to ADDRESS...' is required"),
    ("transfer {\nto\n}", "'to' needs an argument"),
    ("transfer {\nto ns1.example.org\n}", "'ns1.example.org' is not an address"),
    ("transfer {\nto 192.0.2.1:99999\n}", "'192.0.2.1:99999' is not an address"),
    ("transfer {\nto 192.0.2.1:x 192.0.2.300\n}", "'192.0.2.300' is not an address"),
    ("transfer {\nto [::1\n}", "'[::1' is not an address"),
    ("transfer {\nto 10.0.0.0/8\n}", "'10.0.0.0/8' is not an address"),
    ("transfer {\nfrom 192.0.2.1\nto *\n}", "unknown property 'from'"),
    ("transfer {\nto *\nsource 192.0.2.1\n}", "warning: 'source' does nothing: 'to' names nobody"),
    ("transfer {\nto *\nsource here\n}", "'here' is not an address; write an IP address of this"),
    ("transfer {\nto *\nsource 192.0.2.1:53\n}", "'192.0.2.1:53' is not an address"),
    ("transfer {\nto *\nsource ::1 ::2\n}", "unexpected '::2' after 'source'"),
    ("transfer {\nto ::1\nsource ::1\nsource ::2\n}", "one source for IPv6: ::1 (line 3), or this"),
    ("transfer a..b {\nto *\n}", "zone is not a valid domain name"),
]


@pytest.mark.parametrize(("text", "said"), SAID)
def test_mistakes_are_said(text: str, said: str) -> None:
    assert any(said in line for line in errors_of(text)), errors_of(text)
