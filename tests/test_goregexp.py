"""Patterns as Go reads them: what they match, what they refuse, and in what time.

Expected values were taken from Go 1.26's `regexp`.
"""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdns.dns.goregexp import MAX_PATTERN, UNBOUNDED, BadPattern, compile_pattern

MATCHES = [
    # pattern, name, the match and its groups
    (r"(.*)-(us-west-1)\.example\.org", "ftp-us-west-1.example.org.",
     ("ftp-us-west-1.example.org", "ftp", "us-west-1")),
    (r"^ip-(?P<a>\d+)-(?P<b>[0-9]*)\.x\.$", "ip-10-.x.", ("ip-10-.x.", "10", "")),
    (r"(?i)WWW", "www.example.", ("www",)),
    (r"(a)|(b)", "xb", ("b", "", "b")),
    (r"\Qa.b\E+", "xa.bbb", ("a.bbb",)),
    (r"[[:alpha:]]+", "12ab3", ("ab",)),
    (r"[^[:digit:]\-]+", "1-ab-2", ("ab",)),
    (r"\pN+", "ab12", ("12",)),
    (r"\x61\101\x{62}", "aAb", ("aAb",)),
    (r"(?U)a+", "aaa", ("a",)),
    (r"(?U)a+?", "aaa", ("aaa",)),
    (r"a{2,}?", "aaaa", ("aa",)),
    (r"a{,2}", "a{,2}", ("a{,2}",)),
    (r"(|a)*", "aa", ("", "")),
    (r"(|a)+", "aa", ("", "")),
    (r"(a|b*)*", "ab", ("ab", "b")),
    (r"(?s)a.b", "a\nb", ("a\nb",)),
    (r"(?m)^b$", "a\nb", ("b",)),
    (r"\bexample\b", "www.example.", ("example",)),
    (r"[]a]+", "a]", ("a]",)),
    (r"é|x", "x", ("x",)),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "name", "groups"), MATCHES)
def test_a_pattern_matches_what_it_matches_in_go(
    pattern: str, name: str, groups: tuple[str, ...]
) -> None:
    assert compile_pattern(pattern).search(name) == groups


@pytest.mark.parametrize(
    ("pattern", "name"),
    [(r"a\z", "ab"), (r"^b", "ab"), (r"\Bexample", "www.example."), (r"a.b", "a\nb"),
     (r"\pL", "12"), ("é", "e"), (r"(?i:a)b", "AB")],
)  # fmt: skip
def test_a_pattern_leaves_what_it_leaves_in_go(pattern: str, name: str) -> None:
    assert compile_pattern(pattern).search(name) is None


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("*a", "missing argument to repetition operator: *"),
        ("a**", "invalid nested repetition operator: **"),
        ("a{2}{3}", "invalid nested repetition operator: {2}{3}"),
        ("a{2,1}", "invalid repeat count: {2,1}"),
        ("a{1001}", "invalid repeat count: {1001}"),
        ("(a", "missing closing )"),
        ("a)", "unexpected )"),
        ("[a", "missing closing ]"),
        ("[z-a]", "invalid character class range: z-a"),
        ("[[:foo:]]", "invalid character class range: [:foo:]"),
        ("(?=a)", "invalid or unsupported Perl syntax: (?="),
        ("(?<!a)", "invalid or unsupported Perl syntax: (?<"),
        (r"(a)\1", r"invalid escape sequence: \1"),
        (r"a\Z", r"invalid escape sequence: \Z"),
        ("(?P<a", "invalid named capture"),
        ("(?P<n>a)(?P<n>b)", "duplicate group name: n"),
        ("a\\", "trailing backslash"),
        (r"\p{Nope}", "is not known"),
        ("a" * (MAX_PATTERN + 1), "regex pattern too long: 10001 > 10000"),
        ("(" * 200 + "a" + ")" * 200, "nest deeper"),
        ("((a*){1000})*b", "expression too large"),
    ],
)
def test_what_go_refuses_is_refused_with_its_reason(pattern: str, reason: str) -> None:
    with pytest.raises(BadPattern, match=re.escape(reason)):
        compile_pattern(pattern)


def test_groups_have_numbers_and_names() -> None:
    pattern = compile_pattern(r"(?P<host>a)(b)(?<zone>c)(?:d)")
    assert pattern.groups == 3
    assert pattern.names == ("", "host", "", "zone")


@pytest.mark.timeout(20)  # a backtracking matcher would need years
@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("(a+)+$", "a" * 250 + "."),
        ("(a|a)*b", "a" * 250),
        ("(a?){50}a{50}", "a" * 49),
        (r"(.*)\.(.*)\.(.*)\.(.*)\.(.*)\.(.*)\.x", "a." * 125),
        ("([a-z]+)*[.]x$", "a" * 60 + "." + "b" * 60),
    ],
)
def test_a_name_made_to_make_it_slow_is_answered_at_once(pattern: str, name: str) -> None:
    assert compile_pattern(pattern).search(name) is None


_PIECES = st.sampled_from(
    ["a", "b", ".", "[ab]", "[^a]", r"\.", "-", "a*", "b+", ".*", "a?", "b{1,2}", "(a|b)", "(a|ab)",
     "(b*)", "(?:a.)*", "^", "$", r"\b", "(a+?)"]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(_PIECES, max_size=6), st.text("ab.-", max_size=12))
def test_both_ways_to_match_agree(pieces: list[str], name: str) -> None:
    pattern = compile_pattern("".join(pieces))
    if pattern._machine is None or pattern._degree >= UNBOUNDED:
        return
    spans = pattern._machine.run(name)
    match = pattern._compiled.search(name)
    assert (spans is None) == (match is None)
    if spans is not None and match is not None:
        assert [spans[i : i + 2] for i in range(0, len(spans), 2)] == [
            match.span(n) for n in range(pattern.groups + 1)
        ]


@settings(max_examples=300, deadline=None)
@given(st.text(r"ab()[]{}*+?|\^$.-:?P<>1,0iQEpLd", max_size=20))
def test_any_text_is_a_pattern_or_a_reason(text: str) -> None:
    try:
        pattern = compile_pattern(text)
    except BadPattern as e:
        assert str(e)
    else:
        found = pattern.search("ab.example.")
        assert found is None or len(found) == pattern.groups + 1
