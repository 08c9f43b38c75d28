"""Templates as Go reads them. Expected values were taken from Go 1.26's `text/template`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdns.dns.gofunctions import Record
from kdns.dns.gotemplate import BadTemplate, RenderError, parse_template

QUESTION = Record("*dns.Question", {"Name": "Www.example.", "Qtype": 1, "Qclass": 1})


def value(**fields: Any) -> Record:
    known: Mapping[str, Any] = {
        "Name": "www.example.",
        "Type": "A",
        "Match": ["www.example.", "www", "0a"],
        "Group": {"1": "www", "a": "www", "b": "0a"},
        "Message": lambda: Record("*dns.Msg", {"Id": 4711, "Question": [QUESTION]}),
        "Question": QUESTION,
        "Meta": lambda name: "myfoo" if name == "foo" else "",
    }
    return Record("*template.templateData", {**known, **fields})


@pytest.mark.parametrize(
    ("template", "output"),
    [
        ("{{ .Name }} 60 IN A 10.{{ .Group.b }}", "www.example. 60 IN A 10.0a"),
        ('{{ .Group.nope }}|{{ index .Group "nope" }}|', "<no value>||"),
        ("{{ index .Match 1 }}", "www"),
        ('{{ printf "%03d" 7 }} {{ 255 | printf "%x" }}', "007 ff"),
        ('{{ .Group.b | printf "%s-%s" .Name }}', "www.example.-0a"),
        ('{{if eq .Type "AAAA"}}a{{else if eq .Type "A"}}b{{else}}c{{end}}', "b"),
        ('{{if and .Name (eq .Type "A") (not .Group.nope)}}yes{{end}}', "yes"),
        ('{{if or (eq .Type "X" "A") nil}}yes{{end}}', "yes"),
        ("{{with .Group.a}}<{{.}}>{{else}}none{{end}}", "<www>"),
        ("{{with .Group.zz}}x{{else with .Type}}y{{.}}{{end}}", "yA"),
        ("{{with $x := .Group.a}}<{{$x}}{{$.Name}}>{{end}}", "<wwwwww.example.>"),
        ("{{range .Match}}[{{.}}]{{end}}", "[www.example.][www][0a]"),
        ("{{range $i, $e := .Match}}{{if $i}}, {{end}}{{$i}}={{$e}}{{end}}",
         "0=www.example., 1=www, 2=0a"),
        ("{{range $k, $v := .Group}}{{$k}}:{{$v}};{{end}}", "1:www;a:www;b:0a;"),
        ("{{range $i := 3}}{{if eq $i 1}}{{continue}}{{end}}{{$i}}{{end}}", "02"),
        ("{{range .Match}}{{break}}{{end}}x", "x"),
        ("{{range .Group.nope}}x{{else}}none{{end}}", "none"),
        ("a  {{- .Type -}}   b", "aAb"),
        ("a {{/* note */}} b {{- /* note */ -}} c", "a  bc"),
        ("{{ .Message.Id }} {{ (index .Message.Question 0).Name }} {{ .Question.Qtype }}",
         "4711 Www.example. 1"),
        ('{{ .Meta "foo" }}|{{ .Meta "bar" }}|', "myfoo||"),
        ('{{ printf "%q %v %5s|%-5s|%05d|%+d|%c|%t|%%" "a\\"b" 5 "x" "y" 42 7 65 true }}',
         '"a\\"b" 5     x|y    |00042|+7|A|true|%'),
        ('{{ printf "%d" "x" }} {{ printf "%d" }} {{ printf "a" 1 }}',
         "%!d(string=x) %!d(MISSING) a%!(EXTRA int=1)"),
        ('{{ print 1 2 "a" 3 4 true }} {{ println "a" 1 }}', "1 2a3 4 true a 1\n"),
        ("{{ len .Name }} {{ slice .Name 0 3 }} {{ slice .Match 1 2 }}", "12 www [www]"),
        ('{{ lt 1 2 }} {{ gt "b" "a" }} {{ le 2 2 }} {{ ge 1 2 }} {{ ne 1 1 }}',
         "true true true false false"),
        ("{{ $x := 5 }}{{ $x }}{{ $x = 6 }}{{ $x }}", "56"),
        ("{{ 0x1F }} {{ 'a' }} {{ 1_000 }} {{ 017 }} {{ -5 }} {{ 1.5 }} {{ 1e3 }}",
         "31 97 1000 15 -5 1.5 1000"),
        (r'{{ "a\tb\x41\u0042" }} {{ `raw\n` }}', "a\tbAB raw\\n"),
        ("{{ .Match }} {{ .Group }}", "[www.example. www 0a] map[1:www a:www b:0a]"),
        ("{{ (.Group).a }} {{ ($.Group).a }}", "www www"),
        ('{{ printf "%s" (printf "%s" .Type) | printf "%3s" }}', "  A"),
    ],
)  # fmt: skip
def test_a_template_writes_what_it_writes_in_go(template: str, output: str) -> None:
    assert parse_template("answer", template).render(value()) == output


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{", "unclosed action"),
        ('{{ "abc }}', "unterminated quoted string"),
        ("{{ notAFunction }}", 'function "notAFunction" not defined'),
        ("{{ if .Name }}x", "unexpected EOF"),
        ("{{ end }}", "unexpected {{end}}"),
        ("{{ if true }}{{ else }}{{ else }}{{ end }}", "expected end; found {{else}}"),
        ("{{}}", "missing value for command"),
        ("{{ $y }}", 'undefined variable "$y"'),
        ("{{with $x := 1}}{{end}}{{ $x }}", 'undefined variable "$x"'),
        ("{{ (.Name }}", "unclosed left paren"),
        ("{{ .Name) }}", 'unexpected ")"'),
        ("{{ .Name | 5 }}", "non executable command in pipeline"),
        ("{{ break }}", "{{break}} outside {{range}}"),
        ("{{ /* x }}", "unexpected"),
        ("{{/* x }}", "unclosed comment"),
        ('{{ define "x" }}{{end}}', "{{define}} is not part of kdns's templates"),
        ("{{ .Name | html }}", 'function "html" is not part of kdns\'s templates'),
        ("{{ " + "(" * 60 + "1" + ")" * 60 + " }}", "nest deeper"),
        ("{{if 1}}" * 60 + "{{end}}" * 60, "nest deeper"),
    ],
)
def test_a_template_that_cannot_be_parsed(template: str, reason: str) -> None:
    with pytest.raises(BadTemplate) as caught:
        parse_template("answer", template)
    assert str(caught.value).startswith("template: answer:1: ")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ('{{ .Name }} 60 IN TXT "{{ index .Match 7 }}"',
         '1:26: executing "answer" at <index .Match 7>: error calling index:'
         " index out of range: 7"),
        ("a\nb {{ .Nope }}",
         "2:5: executing \"answer\" at <.Nope>: can't evaluate field Nope in type"
         " *template.templateData"),
        ("{{ .Name.Foo }}", "can't evaluate field Foo in type string"),
        ('{{ eq 1 "a" }}', "incompatible types for comparison: int and string"),
        ("{{ not }}", "wrong number of args for not: want 1 got 0"),
        ('{{ .Name "y" }}', "Name has arguments but cannot be invoked as function"),
        ('{{ "x" "y" }}', 'can\'t give argument to non-function "x"'),
        ("{{ nil }}", "nil is not a command"),
        ("{{ .Meta }}", "wrong number or type of args for Meta"),
        ("{{ range 1.5 }}x{{end}}", "range can't iterate over 1.5"),
        ("{{ range 1000000000 }}x{{end}}", "exceeded 10000 steps"),
        ('{{ range 9999 }}{{printf "%60000s" ""}}{{end}}', "output is longer than"),
        ('{{ printf "%99999999s" "" }}', "width 99999999 is too large"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_rendered(template: str, reason: str) -> None:
    with pytest.raises(RenderError) as caught:
        parse_template("answer", template).render(value())
    assert reason in str(caught.value)


def test_the_source_is_written_as_go_writes_it_in_metrics() -> None:
    text = '{{- .Name }}  {{if eq .Type  "A"}}x{{else}}{{ .Group.a | printf "%s" }}{{end}}'
    written = '{{.Name}}  {{if eq .Type "A"}}x{{else}}{{.Group.a | printf "%s"}}{{end}}'
    assert parse_template("answer", text).source == written


@pytest.mark.parametrize(
    ("template", "roots"),
    [
        ("{{ .Name }}{{ .Group.a }}", {"Name", "Group"}),
        ("{{ with .Message }}{{ .Id }}{{ end }}", {"Message"}),
        (
            "{{ with .Match }}{{ $.Remote }}{{else}}{{ .Zone }}{{ end }}",
            {"Match", "Remote", "Zone"},
        ),
        ('{{ printf "%v" . }}', {""}),
    ],
)
def test_a_template_says_which_fields_it_uses(template: str, roots: set[str]) -> None:
    assert parse_template("answer", template).roots == roots


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["{{", "}}", "{{- ", " -}}", " ", ".Name", ".Group.a", "$x", ":=", "|", "(", ")", "if",
             "range", "with", "else", "end", "eq", "index", "printf", '"%s"', "1", "x", "`", '"',
             "nil", ".", "/*", "*/", "break", "and", "len"]
        ),
        max_size=14,
    )
)  # fmt: skip
def test_any_text_is_a_template_or_a_reason(pieces: list[str]) -> None:
    try:
        template = parse_template("answer", "".join(pieces))
        template.render(value())
    except (BadTemplate, RenderError) as e:
        assert str(e).startswith("template: answer:1")
