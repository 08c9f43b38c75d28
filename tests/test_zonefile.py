"""Zone files as operators write them: what is read, what is refused and in which words."""

from __future__ import annotations

import dns.zone
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdns.dns import types as t
from kdns.dns.name import parse_name
from kdns.dns.text import render_rr
from kdns.errors import ConfigError
from kdns.zone.zonefile import MAX_PROBLEMS, ZoneText, parse_zone

ORIGIN = parse_name("example.org.")
SOA = "@ 3600 IN SOA ns admin 1 7200 1800 86400 300\n"


def zone(text: str | bytes, files: dict[str, str] | None = None) -> ZoneText:
    def read(path: str) -> tuple[bytes | None, str]:
        found = (files or {}).get(path)
        return (None, f"{path}: No such file") if found is None else (found.encode(), "")

    content = text.encode() if isinstance(text, str) else text
    return parse_zone(content, ORIGIN, "/zones/db.example.org", read)


def lines(text: str, files: dict[str, str] | None = None) -> list[str]:
    """Return the records behind the SOA as dig would print them."""
    return [render_rr(rr) for rr in zone(text, files).records if rr.type != t.SOA]


def complaints(text: str | bytes, files: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as e:
        zone(text, files)
    return [str(p) for p in e.value.problems]


READ = {
    "relative, absolute and @ names": (
        SOA + "www A 192.0.2.1\nmail.example.org. A 192.0.2.2\n@ MX 10 mail\n",
        [
            "www.example.org. 3600 IN A 192.0.2.1",
            "mail.example.org. 3600 IN A 192.0.2.2",
            "example.org. 3600 IN MX 10 mail.example.org.",
        ],
    ),
    "a blank owner is the last one": (
        SOA + "www A 192.0.2.1\n\tA 192.0.2.2\n   \n ; nothing\n    60 IN AAAA 2001:db8::1\n",
        [
            "www.example.org. 3600 IN A 192.0.2.1",
            "www.example.org. 3600 IN A 192.0.2.2",
            "www.example.org. 60 IN AAAA 2001:db8::1",
        ],
    ),
    "$TTL, TTL and class in both orders": (
        "$TTL 1h30m\n" + SOA + "a A 192.0.2.1\na 60 IN A 192.0.2.2\na IN 2m A 192.0.2.3\n"
        "$TTL 9\na IN A 192.0.2.4\n",
        [
            "a.example.org. 5400 IN A 192.0.2.1",
            "a.example.org. 60 IN A 192.0.2.2",
            "a.example.org. 120 IN A 192.0.2.3",
            "a.example.org. 9 IN A 192.0.2.4",
        ],
    ),
    "without $TTL the last TTL goes on": (
        SOA + "a 60 A 192.0.2.1\nb A 192.0.2.2\n",
        ["a.example.org. 60 IN A 192.0.2.1", "b.example.org. 60 IN A 192.0.2.2"],
    ),
    "$ORIGIN moves relative names": (
        SOA + "$ORIGIN sub\na A 192.0.2.1\n$ORIGIN deep.example.org.\na A 192.0.2.2\n",
        ["a.sub.example.org. 3600 IN A 192.0.2.1", "a.deep.example.org. 3600 IN A 192.0.2.2"],
    ),
    "names that look like types and classes": (
        SOA + "a A 192.0.2.1\nin A 192.0.2.2\nmx IN A 192.0.2.3\n123 A 192.0.2.4\n",
        [
            "a.example.org. 3600 IN A 192.0.2.1",
            "in.example.org. 3600 IN A 192.0.2.2",
            "mx.example.org. 3600 IN A 192.0.2.3",
            "123.example.org. 3600 IN A 192.0.2.4",
        ],
    ),
    "strings with semicolons, quotes and parentheses": (
        SOA + 'txt TXT "a;b" "c\\"(d" ( "e"\n  f ) ; g\nx\\;y A 192.0.2.1\n',
        [
            'txt.example.org. 3600 IN TXT "a;b" "c\\"(d" "e" "f"',
            "x\\;y.example.org. 3600 IN A 192.0.2.1",
        ],
    ),
    "carriage returns and a byte order mark": (
        "\ufeff" + SOA.replace("\n", "\r\n") + "www A 192.0.2.1\r\n",
        ["www.example.org. 3600 IN A 192.0.2.1"],
    ),
    "unknown types": (
        SOA + "a TYPE65280 \\# 3 abcdef\n",
        ["a.example.org. 3600 IN TYPE65280 \\# 3 ABCDEF"],
    ),
    "$GENERATE": (
        SOA + "$GENERATE 1-3 host$ A 192.0.2.$\n"
        "$GENERATE 0-4/2 ${0,3,d} 60 IN CNAME ${16,4,x}.x\n"
        "$GENERATE 10-10 a$$\\$ TXT $-${-1}-${0,5,n}-${0,0,X}-${0,0,o}\n",
        [
            "host1.example.org. 3600 IN A 192.0.2.1",
            "host2.example.org. 3600 IN A 192.0.2.2",
            "host3.example.org. 3600 IN A 192.0.2.3",
            "000.example.org. 60 IN CNAME 0010.x.example.org.",
            "002.example.org. 60 IN CNAME 0012.x.example.org.",
            "004.example.org. 60 IN CNAME 0014.x.example.org.",
            'a$$.example.org. 60 IN TXT "10-9-a.0.0-A-12"',
        ],
    ),
}


@pytest.mark.parametrize("case", READ)
def test_a_zone_file_is_read(case: str) -> None:
    text, expected = READ[case]
    assert lines(text) == expected


def test_the_soa_over_several_lines() -> None:
    text = zone(
        "$TTL 1d\n@ IN SOA ns admin.example.org. ( ; begins here\n"
        "  2026010101 ; serial\n  2h 30m\n\n  2w ; (comment)\n 1h )\n"
    )
    assert render_rr(text.soa) == (
        "example.org. 86400 IN SOA ns.example.org. admin.example.org."
        " 2026010101 7200 1800 1209600 3600"
    )
    assert text.warnings == []


def test_an_soa_without_any_ttl_takes_its_minimum() -> None:
    text = zone("@ SOA ns admin 1 2 3 4 300\nwww A 192.0.2.1\n")
    assert [rr.ttl for rr in text.records] == [300, 300]


def test_include_with_and_without_its_own_origin() -> None:
    files = {
        "/zones/part": "a A 192.0.2.1\n$ORIGIN elsewhere.\n",
        "/zones/sub/part": "@ A 192.0.2.2\n$INCLUDE deeper\n",
        "/zones/sub/deeper": "b A 192.0.2.3\n",
        "/etc/absolute": "  A 192.0.2.9\n",
    }
    text = (
        SOA + "first A 192.0.2.8\n$INCLUDE part\n$INCLUDE sub/part sub\n$INCLUDE /etc/absolute\n"
        "c A 192.0.2.4\n"
    )
    assert lines(text, files) == [
        "first.example.org. 3600 IN A 192.0.2.8",
        "a.example.org. 3600 IN A 192.0.2.1",
        "sub.example.org. 3600 IN A 192.0.2.2",
        "b.sub.example.org. 3600 IN A 192.0.2.3",
        "first.example.org. 3600 IN A 192.0.2.9",
        "c.example.org. 3600 IN A 192.0.2.4",
    ]


WRONG = [
    ("", "db.example.org: no SOA record for example.org."),
    ("; only a comment\n", "no SOA record for example.org."),
    (SOA + SOA, ":2: a second SOA; a zone has one"),
    ("sub 60 SOA ns admin 1 2 3 4 5\n", ":1: the SOA is that of sub.example.org."),
    (SOA + "www BANANA 1\n", ":2: 'BANANA' is not a record type"),
    (SOA + "www A 192.0.2\n", ":2: A record: '192.0.2' is not an IPv4 address"),
    (SOA + "www A\n", ":2: A record: the address is missing"),
    (SOA + "\n\nwww CH A 192.0.2.1\n", ":4: class CH"),
    (SOA + "www AXFR 1\n", "AXFR"),
    ("  A 192.0.2.1\n", ":1: the first record needs an owner name"),
    ("www A 192.0.2.1\n", ":1: no TTL; put one here, or a line such as $TTL 3600"),
    ("$TTL soon\n", ":1: 'soon' is not a TTL"),
    ("$TTL\n", ":1: $TTL takes one time, found nothing"),
    ("$ORIGIN a b\n", ":1: $ORIGIN takes one name, found 2"),
    ("$BANANA a\n", ":1: unknown directive '$BANANA' (known: $ORIGIN, $TTL, $INCLUDE, $GENERATE)"),
    (SOA + "a..b A 192.0.2.1\n", ":2: 'a..b' has an empty label"),
    (SOA + 'txt TXT "open\nwww A 192.0.2.1\n', ":2: a quote is not closed on its line"),
    (SOA + "www A ( 192.0.2.1\nx A 192.0.2.2\n", ":2: the parenthesis opened here is never closed"),
    (SOA + "www A 192.0.2.1 )\n", ":2: a ) without its ("),
    (SOA + "www A 192.0.2.1 \\", ":2: a backslash ends the line"),
    (SOA + "$INCLUDE nowhere\n", ":2: $INCLUDE nowhere: /zones/nowhere: No such file"),
    (SOA + "$INCLUDE part\n", "part:1: A record: 'x' is not an IPv4 address"),
    (SOA + "$INCLUDE itself\n", "itself:1: $INCLUDE itself: too many files in files"),
    (SOA + "$GENERATE 5-1 a$ A 192.0.2.$\n", ":2: '5-1' is not a range"),
    (SOA + "$GENERATE 0-70000 a$ A 192.0.2.1\n", "at most 65536"),
    (SOA + "$GENERATE 1-2 a$ A\n", ":2: $GENERATE takes a range, an owner, a type and its rdata"),
    (SOA + "$GENERATE 1-2 a${0,9999} A 192.0.2.1\n", "${offset,width,base}"),
    (SOA + "$GENERATE 1-2 a${-5} A 192.0.2.1\n", "${offset,width,base}"),
    (SOA + "$GENERATE 250-260 a$ A 192.0.2.$\n", "'192.0.2.256' is not an IPv4 address"),
    (SOA.encode() + b"caf\xe9 A 192.0.2.1\n", ":2: a name is not UTF-8"),
]


@pytest.mark.parametrize(("text", "complaint"), WRONG, ids=lambda v: str(v)[-40:])
def test_a_wrong_zone_file_is_refused_with_file_and_line(text: str | bytes, complaint: str) -> None:
    files = {"/zones/part": "a A x\n", "/zones/itself": "$INCLUDE itself\n$INCLUDE itself\n"}
    assert any(complaint in line for line in complaints(text, files)), complaints(text, files)


def test_all_mistakes_are_said_at_once_and_no_more_than_a_screenful() -> None:
    found = complaints(SOA + "a A 1\nb A 192.0.2.1\nc MX 1\nd BANANA\n")
    assert [line.split(":")[1] for line in found] == ["2", "4", "5"]
    assert len(complaints(SOA + "a A 1\n" * 500)) == MAX_PROBLEMS


WARNED = [
    ("www.example.com. A 192.0.2.1\n", ":2: warning: www.example.com. is not in the zone"),
    ("www.badexample.org. A 192.0.2.1\n", "is not in the zone"),
    ("a CNAME b\na A 192.0.2.1\n", ":2: warning: a.example.org. has a CNAME and also A"),
    ("a CNAME b\nA CNAME c\n", ":3: warning: A.example.org. has two CNAMEs"),
]


@pytest.mark.parametrize(("text", "warning"), WARNED)
def test_what_looks_like_a_mistake_is_a_warning(text: str, warning: str) -> None:
    read = zone(SOA + text)
    assert warning in str(read.warnings[0])
    assert all("example.com" not in render_rr(rr) for rr in read.records)


def test_octets_that_are_not_utf8_do_not_matter_in_comments_and_survive_in_strings() -> None:
    read = zone(SOA.encode() + b'www TXT "caf\xe9" ; caf\xe9\n')
    assert read.records[1].rdata == b"\x04caf\xe9"


PIECES = st.sampled_from(
    ["www", "@", "*.w", "example.org.", "a\\.b", "IN", "CH", "60", "1h", "A", "AAAA", "MX", "TXT",
     "SOA", "10", "192.0.2.1", "::1", '"x y"', '"', "(", ")", ";c", "\n", "\n", "\n ", "\\", "$TTL",
     "$ORIGIN", "$GENERATE", "1-3", "a$", "$INCLUDE", "part", "ns admin 1 2 3 4 5", "\r\n", "\x00",
     "é", "\udce9"]
)  # fmt: skip


@settings(max_examples=600, deadline=None)
@given(st.lists(PIECES, max_size=40), st.booleans())
def test_any_text_is_a_zone_or_a_list_of_problems(pieces: list[str], start: bool) -> None:
    text = (SOA if start else "") + " ".join(pieces)
    try:
        read = zone(text.encode("utf-8", "surrogateescape"), {"/zones/part": "p A 192.0.2.3\n"})
    except ConfigError as e:
        assert e.problems
        assert all(p.file.startswith("/zones/") for p in e.problems)
    else:
        assert sum(rr.type == t.SOA for rr in read.records) == 1


OWNERS = st.sampled_from(["@", "www", "a.b", "*", "*.x", "mail", "x-y_z", "q\\.r"])
RDATA = st.sampled_from(
    [("A", "192.0.2.1"), ("A", "192.0.2.2"), ("AAAA", "2001:db8::1"), ("MX", "10 mail"),
     ("TXT", '"a b" c'), ("SRV", "1 2 3 www"), ("CAA", '0 issue "ca"'), ("NS", "ns2.example.net."),
     ("PTR", "a.b"), ("LOC", "1 2 3 N 4 5 6 E 7m")]
)  # fmt: skip
LINES = st.tuples(OWNERS, st.sampled_from(["", "60", "1h", "IN 5m", "60 IN"]), RDATA)


@settings(max_examples=200, deadline=None)
@given(st.lists(LINES, max_size=12))
def test_dnspython_reads_the_same_records(found: list[tuple[str, str, tuple[str, str]]]) -> None:
    text = "$TTL 7m\n" + SOA + "@ NS ns\n"
    text += "".join(f"{owner} {head} {type} {rdata}\n" for owner, head, (type, rdata) in found)
    theirs = dns.zone.from_text(text, "example.org.", relativize=False)
    expected = {
        (name.to_wire(), int(rdataset.rdtype), rdata.to_wire())
        for name, rdataset in theirs.iterate_rdatasets()
        for rdata in rdataset
    }
    assert {(rr.name, rr.type, rr.rdata) for rr in zone(text).records} == expected
