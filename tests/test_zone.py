"""What a zone answers: one row a question, with the sections a client sees.

The rows agree with CoreDNS's `file` at HEAD except where a comment names the RFC clause.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import dns.dnssec
import dns.dnssectypes
import dns.name
import dns.rdatatype
import dns.rrset
import dns.zone
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from kdns.dns import types as t
from kdns.dns.message import RR
from kdns.dns.name import parse_name, render_name
from kdns.dns.text import render_rdata, render_rr
from kdns.zone.zone import YXDOMAIN, Found, Zone
from kdns.zone.zonefile import parse_zone


def compile_zone(text: str, origin: str) -> Zone:
    key = parse_name(origin)
    return Zone(key, parse_zone(text.encode(), key, "db", lambda path: (None, path)).records)


ZONE = """
$TTL 300
@ 600 SOA ns admin 7 7200 1800 86400 60
@ NS ns
@ NS ns.elsewhere.net.
@ MX 10 Mail
@ MX 20 mail
@ TXT "apex"
ns A 192.0.2.53
mail A 192.0.2.25
mail AAAA 2001:db8::25
www A 192.0.2.1
www A 192.0.2.2
www A 192.0.2.1
_http._tcp SRV 1 2 80 mail
svc HTTPS 1 mail alpn=h2
deep.empty A 192.0.2.3
; aliases
alias CNAME www
chain CNAME alias
dangling CNAME nothing
halfway CNAME deep.empty
toempty CNAME empty
toapex CNAME @
out CNAME x.elsewhere.net.
chainout CNAME out
loop1 CNAME loop2
loop2 CNAME loop1
c0 CNAME c1
$GENERATE 1-20 c$ CNAME c${1}
; wildcards
*.wild A 192.0.2.9
*.wild TXT "w"
*.wild MX 5 mail
own.wild TXT "own"
x.below.wild A 192.0.2.10
*.wa CNAME www
*.wloop CNAME a.wloop
sub.*.wild A 192.0.2.11
; the wildcard itself is an empty non-terminal
a.*.we A 192.0.2.12
; delegations
sub NS ns.sub
sub NS NS.elsewhere.net.
sub DS 1 8 2 aabbcc
ns.sub A 192.0.2.54
ns.sub AAAA 2001:db8::54
sib NS ns
tosub CNAME a.sub
; DNAME
old DNAME new.example.net.
here DNAME wild
same DNAME same
long DNAME {long}
old TXT "beside"
""".replace("{long}", ".".join(["x" * 60] * 3) + ".example.org.").replace("c${1}", "c${1,0,d}")

SOA = "example.org. 600 IN SOA ns.example.org. admin.example.org. 7 7200 1800 86400 60"
NS = [
    "example.org. 300 IN NS ns.example.org.",
    "example.org. 300 IN NS ns.elsewhere.net.",
]
MAIL = ["mail.example.org. 300 IN A 192.0.2.25", "mail.example.org. 300 IN AAAA 2001:db8::25"]
REFERRAL = [
    "sub.example.org. 300 IN NS ns.sub.example.org.",
    "sub.example.org. 300 IN NS NS.elsewhere.net.",
]
GLUE = ["ns.sub.example.org. 300 IN A 192.0.2.54", "ns.sub.example.org. 300 IN AAAA 2001:db8::54"]


@dataclass
class Want:
    """rcode, the three sections, AA, and the outside name still to be asked for."""

    answer: list[str]
    authority: list[str]
    additional: list[str] | None = None
    rcode: int = t.NOERROR
    aa: bool = True
    target: str | None = None
    missing: bool = False


def yes(*answer: str, extra: list[str] | None = None, target: str | None = None) -> Want:
    return Want(list(answer), NS, extra, target=target)


def no(*answer: str, missing: bool = False) -> Want:
    return Want(list(answer), [SOA], missing=missing)


def never(*answer: str) -> Want:
    return Want(list(answer), [SOA], rcode=t.NXDOMAIN, missing=True)


WWW = ["www.example.org. 300 IN A 192.0.2.1", "www.example.org. 300 IN A 192.0.2.2"]

QUESTIONS: list[tuple[str, str, Want]] = [
    # the apex
    ("@", "SOA", yes(SOA)),
    ("@", "NS", Want(NS, [], ["ns.example.org. 300 IN A 192.0.2.53"])),
    ("@", "TXT", yes('example.org. 300 IN TXT "apex"')),
    ("@", "MX", yes("example.org. 300 IN MX 10 Mail.example.org.",
                    "example.org. 300 IN MX 20 mail.example.org.", extra=MAIL)),
    ("@", "A", no()),
    ("@", "DS", no()),
    # names and types
    ("www", "A", yes(*WWW)),
    ("WWW", "A", yes(*WWW)),
    ("www", "AAAA", no()),
    ("www", "ANY", no()),  # CoreDNS: a type like others; the `any` plugin answers it
    ("nothing", "A", never()),
    ("a.www", "A", never()),
    ("_http._tcp", "SRV", yes("_http._tcp.example.org. 300 IN SRV 1 2 80 mail.example.org.",
                              extra=MAIL)),
    ("svc", "HTTPS", yes('svc.example.org. 300 IN HTTPS 1 mail.example.org. alpn="h2"',
                         extra=MAIL)),
    # empty non-terminals (RFC 4592 s2.2.2)
    ("empty", "A", no(missing=True)),
    ("_tcp", "SRV", no(missing=True)),
    ("other.empty", "A", never()),
    # aliases
    ("alias", "A", yes("alias.example.org. 300 IN CNAME www.example.org.", *WWW)),
    ("chain", "A", yes("chain.example.org. 300 IN CNAME alias.example.org.",
                       "alias.example.org. 300 IN CNAME www.example.org.", *WWW)),
    ("chain", "CNAME", yes("chain.example.org. 300 IN CNAME alias.example.org.")),
    ("alias", "TXT", yes("alias.example.org. 300 IN CNAME www.example.org.")),  # as CoreDNS
    ("dangling", "A", never("dangling.example.org. 300 IN CNAME nothing.example.org.")),
    ("halfway", "A", yes("halfway.example.org. 300 IN CNAME deep.empty.example.org.",
                         "deep.empty.example.org. 300 IN A 192.0.2.3")),
    ("toempty", "A", no("toempty.example.org. 300 IN CNAME empty.example.org.", missing=True)),
    ("toapex", "NS", yes("toapex.example.org. 300 IN CNAME example.org.", *NS)),
    ("toapex", "TXT", yes("toapex.example.org. 300 IN CNAME example.org.",
                          'example.org. 300 IN TXT "apex"')),
    ("out", "A", yes("out.example.org. 300 IN CNAME x.elsewhere.net.",
                     target="x.elsewhere.net.")),
    ("out", "CNAME", yes("out.example.org. 300 IN CNAME x.elsewhere.net.")),
    ("chainout", "A", yes("chainout.example.org. 300 IN CNAME out.example.org.",
                          "out.example.org. 300 IN CNAME x.elsewhere.net.",
                          target="x.elsewhere.net.")),
    ("loop1", "A", yes("loop1.example.org. 300 IN CNAME loop2.example.org.",
                       "loop2.example.org. 300 IN CNAME loop1.example.org.")),
    ("c0", "A", yes(*[f"c{n}.example.org. 300 IN CNAME c{n + 1}.example.org."
                      for n in range(10)])),
    # wildcards (RFC 4592 s2.2.1, s3.3)
    ("a.wild", "A", yes("a.wild.example.org. 300 IN A 192.0.2.9")),
    ("A.b.Wild", "A", yes("a.b.wild.example.org. 300 IN A 192.0.2.9")),
    ("a.wild", "MX", yes("a.wild.example.org. 300 IN MX 5 mail.example.org.", extra=MAIL)),
    ("a.wild", "AAAA", no()),
    ("*.wild", "A", yes("*.wild.example.org. 300 IN A 192.0.2.9")),
    ("wild", "A", no(missing=True)),
    ("own.wild", "A", no()),
    ("a.own.wild", "A", never()),
    ("below.wild", "A", no(missing=True)),  # it exists, so no synthesis; CoreDNS synthesizes
    ("y.below.wild", "A", never()),
    ("sub.*.wild", "A", yes("sub.*.wild.example.org. 300 IN A 192.0.2.11")),
    ("a.wa", "A", yes("a.wa.example.org. 300 IN CNAME www.example.org.", *WWW)),
    ("a.wa", "CNAME", yes("a.wa.example.org. 300 IN CNAME www.example.org.")),
    ("b.wloop", "A", yes("b.wloop.example.org. 300 IN CNAME a.wloop.example.org.",
                         "a.wloop.example.org. 300 IN CNAME a.wloop.example.org.")),
    ("b.we", "A", no()),
    # delegations
    ("sub", "A", Want([], REFERRAL, GLUE, aa=False)),
    ("sub", "NS", Want([], REFERRAL, GLUE, aa=False)),
    ("a.b.sub", "A", Want([], REFERRAL, GLUE, aa=False)),
    ("ns.sub", "A", Want([], REFERRAL, GLUE, aa=False)),
    ("sub", "DS", yes("sub.example.org. 300 IN DS 1 8 2 AABBCC")),  # RFC 4035 s3.1.4.1
    ("a.sub", "DS", Want([], REFERRAL, GLUE, aa=False)),
    ("a.sib", "A", Want([], ["sib.example.org. 300 IN NS ns.example.org."], [], aa=False)),
    ("tosub", "A", Want(["tosub.example.org. 300 IN CNAME a.sub.example.org."], REFERRAL, GLUE)),
    # DNAME (RFC 6672)
    ("old", "TXT", yes('old.example.org. 300 IN TXT "beside"')),
    ("old", "DNAME", yes("old.example.org. 300 IN DNAME new.example.net.")),
    ("a.b.old", "A", yes("old.example.org. 300 IN DNAME new.example.net.",
                         "a.b.old.example.org. 300 IN CNAME a.b.new.example.net.",
                         target="a.b.new.example.net.")),
    ("a.old", "CNAME", yes("old.example.org. 300 IN DNAME new.example.net.",
                           "a.old.example.org. 300 IN CNAME a.new.example.net.")),
    ("own.here", "TXT", yes("here.example.org. 300 IN DNAME wild.example.org.",
                            "own.here.example.org. 300 IN CNAME own.wild.example.org.",
                            'own.wild.example.org. 300 IN TXT "own"')),
    ("a.same", "A", Want([], [], rcode=t.SERVFAIL, aa=False)),
    ("y" * 60 + ".long", "A",
     Want(["long.example.org. 300 IN DNAME " + ".".join(["x" * 60] * 3) + ".example.org."], NS,
          rcode=YXDOMAIN)),
]  # fmt: skip


def shown(found: Found) -> Want:
    return Want(
        [render_rr(rr) for rr in found.answer],
        [render_rr(rr) for rr in found.authority],
        [render_rr(rr) for rr in found.additional],
        found.rcode,
        found.aa,
        None if found.target is None else render_name(found.target),
        found.missing,
    )


ANSWERS = compile_zone(ZONE, "example.org.")


@pytest.mark.parametrize(("name", "qtype", "want"), QUESTIONS, ids=lambda v: str(v)[:30])
def test_the_zone_answers(name: str, qtype: str, want: Want) -> None:
    number = t.type_number(qtype)
    assert number is not None
    key = parse_name(name, parse_name("example.org.")).lower()
    got = shown(ANSWERS.lookup(key, number))
    want.additional = want.additional or []
    assert got == want


def test_answers_are_copies_that_may_be_changed() -> None:
    key = parse_name("www.example.org.")
    first = ANSWERS.lookup(key, t.A)
    first.answer.clear()
    first.authority.clear()
    assert [render_rr(rr) for rr in ANSWERS.lookup(key, t.A).answer] == WWW
    assert len(ANSWERS.lookup(key, t.A).authority) == 2


def test_a_dname_at_the_apex_moves_all_but_the_apex() -> None:
    zone = compile_zone("$TTL 5\n@ SOA ns a 1 2 3 4 5\n@ NS ns\n@ DNAME b.net.\n", "a.net.")
    assert shown(zone.lookup(parse_name("x.a.net."), t.A)).answer == [
        "a.net. 5 IN DNAME b.net.",
        "x.a.net. 5 IN CNAME x.b.net.",
    ]
    assert zone.lookup(parse_name("a.net."), t.SOA).answer == [zone.soa]


def test_a_dname_that_grows_the_name_ends() -> None:
    zone = compile_zone("$TTL 5\n@ SOA ns a 1 2 3 4 5\n@ NS ns\nx DNAME y.x.a.net.\n", "a.net.")
    found = zone.lookup(parse_name("q.x.a.net."), t.A)
    assert len(found.answer) <= 11
    assert found.rcode == t.NOERROR


def test_the_root_zone() -> None:
    zone = compile_zone("$TTL 5\n@ SOA ns. a. 1 2 3 4 5\n@ NS ns.\nns A 192.0.2.1\n", ".")
    assert zone.lookup(parse_name("ns."), t.A).answer
    assert zone.lookup(parse_name("x.y."), t.A).rcode == t.NXDOMAIN
    assert zone.lookup(parse_name("."), t.NS).additional


def test_malformed_rdata_from_elsewhere_adds_nothing() -> None:
    owner = parse_name("a.")
    for octets in (b"", b"\x00", b"\x00\x01", b"\x00\x01\x3fab", b"\x00\x01\xc0"):
        assert (
            ANSWERS.addresses([RR(owner, t.SVCB, 1, octets), RR(owner, t.MX, 1, octets)], False)
            == []
        )


def test_a_transfer_has_the_soa_first_and_last_and_every_record_once() -> None:
    text = [render_rr(rr) for rr in ANSWERS.records()]
    assert text[0] == text[-1] == SOA
    assert text[1:3] == NS
    middle = text[1:-1]
    assert len(set(middle)) == len(middle)
    everything = parse_zone(ZONE.encode(), parse_name("example.org."), "db", lambda p: (None, p))
    assert {x.lower() for x in text} == {render_rr(rr).lower() for rr in everything.records}
    owners = [line.split()[0] for line in middle if not line.startswith("example.org.")]
    assert owners == sorted(owners, key=lambda n: n.split(".")[::-1])


# --- signed zones: dnspython signs, kdns answers, dnspython validates ------------------------

UNSIGNED = """
$TTL 300
@ SOA ns adm 1 2 3 4 60
@ NS ns
ns A 192.0.2.1
a A 192.0.2.2
c CNAME a
*.w A 192.0.2.3
e.n.t A 192.0.2.4
sub NS ns.sub
sub DS 60485 13 2 d2abde240d7cd3ee6b4b28c54df034b97983a1d16e8a410e4561cb106618e971
ns.sub A 192.0.2.9
ins NS ns.ins
ns.ins A 192.0.2.8
d DNAME w
"""


@pytest.fixture(scope="module")
def signed() -> tuple[Zone, dict[dns.name.Name, Any]]:
    zone = dns.zone.from_text(UNSIGNED, "s.test.", relativize=False)
    key = ec.generate_private_key(ec.SECP256R1())
    algorithm = dns.dnssectypes.Algorithm.ECDSAP256SHA256
    dnskey = dns.dnssec.make_dnskey(key.public_key(), algorithm, 257)
    with zone.writer() as txn:
        dns.dnssec.sign_zone(zone, txn, [(key, dnskey)], lifetime=864000, add_dnskey=True)
    origin = dns.name.from_text("s.test.")
    keys = {origin: dns.rrset.from_rdata(origin, 300, dnskey)}
    return compile_zone(zone.to_text(relativize=False), "s.test."), keys


def rrsets(records: list[RR]) -> dict[tuple[str, int, int], list[RR]]:
    """Group by owner, type and covered type."""
    found: dict[tuple[str, int, int], list[RR]] = {}
    for rr in records:
        covered = int.from_bytes(rr.rdata[:2], "big") if rr.type == t.RRSIG else 0
        found.setdefault((render_name(rr.name), rr.type, covered), []).append(rr)
    return found


SIGNED_QUESTIONS = [
    # name, type, rcode, NSEC owners expected in authority
    ("s.test.", "SOA", 0, []),
    ("s.test.", "DNSKEY", 0, []),
    ("a.s.test.", "A", 0, []),
    ("c.s.test.", "A", 0, []),
    ("a.s.test.", "TXT", 0, ["a.s.test."]),
    ("s.test.", "TXT", 0, ["s.test."]),
    ("q.w.s.test.", "A", 0, ["*.w.s.test."]),
    ("q.w.s.test.", "TXT", 0, ["*.w.s.test."]),
    ("n.t.s.test.", "A", 0, ["sub.s.test."]),
    ("nope.s.test.", "A", 3, ["ins.s.test.", "s.test."]),
    ("f.e.n.t.s.test.", "A", 3, ["e.n.t.s.test."]),
    ("zz.s.test.", "A", 3, ["*.w.s.test.", "s.test."]),
    ("x.sub.s.test.", "A", 0, []),
    ("sub.s.test.", "DS", 0, []),
    ("x.ins.s.test.", "A", 0, ["ins.s.test."]),
    ("q.d.s.test.", "A", 0, ["*.w.s.test."]),
]


@pytest.mark.parametrize(("name", "qtype", "rcode", "denials"), SIGNED_QUESTIONS)
def test_a_signed_zone_answers_so_that_a_validator_is_content(
    signed: tuple[Zone, dict[dns.name.Name, Any]],
    name: str, qtype: str, rcode: int, denials: list[str],
) -> None:  # fmt: skip
    zone, keys = signed
    number = t.type_number(qtype)
    assert number is not None
    found = zone.lookup(parse_name(name), number, do=True)
    assert found.rcode == rcode
    sets = rrsets(found.answer + found.authority)
    assert sorted(n for n, rtype, _ in sets if rtype == t.NSEC) == sorted(denials)
    for (owner, rtype, _), records in sets.items():
        synthesized = rtype == t.CNAME and ".d." in owner  # RFC 6672 s5.3.1: not signed
        delegated = rtype == t.NS and owner != "s.test."  # RFC 4035 s2.2: nor are these
        if rtype == t.RRSIG or synthesized or delegated:
            continue
        signatures = sets[owner, t.RRSIG, rtype]
        dns.dnssec.validate(as_rrset(owner, records), as_rrset(owner, signatures), keys)
    plain = zone.lookup(parse_name(name), number)
    assert not {t.NSEC, t.RRSIG} & {rr.type for rr in plain.answer + plain.authority}


def as_rrset(owner: str, records: list[RR]) -> dns.rrset.RRset:
    return dns.rrset.from_text_list(
        owner, records[0].ttl, "IN", dns.rdatatype.RdataType.make(records[0].type),
        [render_rdata(rr.type, rr.rdata) for rr in records],
    )  # fmt: skip


def test_a_signed_zone_transfers_whole(
    signed: tuple[Zone, dict[dns.name.Name, Any]],
) -> None:
    zone = signed[0]
    text = [render_rr(rr) for rr in zone.records()]
    assert len(set(text)) == len(text) - 1  # the SOA twice
    assert sum(" RRSIG SOA " in line for line in text) == 1
