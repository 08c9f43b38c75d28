"""What a Corefile says: text in, server blocks out."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdns.corefile import Corefile, Directive, Problems, Token, parse_corefile
from kdns.corefile_tokens import MAX_SNIPPETS
from kdns.plugins import NOT_HERE, ORDER


def parse(
    text: str,
    files: Mapping[str, str] | None = None,
    environ: Mapping[str, str] | None = None,
    default_port: int = 53,
) -> tuple[Corefile, Problems]:
    """Parse with files and environment from memory; a glob's `*` stands for anything."""
    held = {} if files is None else files

    def read(path: str) -> str:
        if path not in held:
            raise FileNotFoundError(2, "No such file or directory", path)
        return held[path]

    def expand(pattern: str) -> list[str]:
        before, _, after = pattern.partition("*")
        return sorted(f for f in held if f.startswith(before) and f.endswith(after))

    return parse_corefile(
        text, read=read, expand=expand, environ=environ or {}, default_port=default_port
    )


def quoted(token: Token) -> str:
    return repr(token.text) if not token.text or set(token.text) & set(" \n{}") else token.text


def line(directive: Directive) -> str:
    """Return `forward . 1.1.1.1 {max_fails 2; force_tcp}`."""
    words = " ".join(map(quoted, (directive.word, *directive.args)))
    if directive.options is None:
        return words
    options = (" ".join(map(quoted, (o.word, *o.args))) for o in directive.options)
    return f"{words} {{{'; '.join(options)}}}"


def shown(corefile: Corefile) -> list[str]:
    """Return a line for each server block: its keys, and its directives behind bars."""
    return [
        " | ".join([" ".join(map(str, block.keys)), *map(line, block.directives)])
        for block in corefile.blocks
    ]


def without_problems(
    text: str,
    files: Mapping[str, str] | None = None,
    environ: Mapping[str, str] | None = None,
    default_port: int = 53,
) -> list[str]:
    corefile, problems = parse(text, files, environ, default_port)
    assert [str(p) for p in problems.found] == []
    return shown(corefile)


# --- grammar ------------------------------------------------------------------------------

GRAMMAR = {
    "one block": (". {\n  whoami\n}\n", ["dns://.:53 | whoami"]),
    "braces may be left out": (".:54\nerrors\nwhoami\n", ["dns://.:54 | errors | whoami"]),
    "the brace may stand in the next line": (".\n{\n  whoami\n}", ["dns://.:53 | whoami"]),
    "a directive may follow the brace": (". { whoami\n}\n", ["dns://.:53 | whoami"]),
    "a block may follow the brace": (
        "a {\n whoami\n} b {\n errors\n}\n",
        ["dns://a.:53 | whoami", "dns://b.:53 | errors"],
    ),
    "the last block may have no braces": (
        "a {\n whoami\n}\nb\nerrors\n",
        ["dns://a.:53 | whoami", "dns://b.:53 | errors"],
    ),
    "keys with blanks and commas": (
        "a b, c,\n  d {\n whoami\n}",
        ["dns://a.:53 dns://b.:53 dns://c.:53 dns://d.:53 | whoami"],
    ),
    "the same directive twice": (
        ". {\n forward a 1.1.1.1\n forward b 2.2.2.2\n}",
        ["dns://.:53 | forward a 1.1.1.1 | forward b 2.2.2.2"],
    ),
    "options": (
        ". {\n cache 30 {\n  success 100 60\n  keepttl\n }\n errors { stacktrace\n }\n}",
        ["dns://.:53 | cache 30 {success 100 60; keepttl} | errors {stacktrace}"],
    ),
    "options in one line": (". {\n errors { stacktrace }\n}", ["dns://.:53 | errors {stacktrace}"]),
    "no options in braces": (". {\n cache {\n }\n}", ["dns://.:53 | cache {}"]),
    "comments": (
        "# first\n. { # here\n whoami # there {\n # } no\n}\n#",
        ["dns://.:53 | whoami"],
    ),
    "quotes keep blanks, braces and #": (
        '. {\n template IN A {\n  answer "{{ .Name }} 60 IN A #1"\n }\n}',
        ["dns://.:53 | template IN A {answer '{{ .Name }} 60 IN A #1'}"],
    ),
    'only \\" is an escape': (
        '. {\n log "a\\"b" "\\d\\\\n"\n}',
        ['dns://.:53 | log a"b \\d\\\\n'],
    ),
    "a quoted brace is a word": ('. {\n log "{" "}"\n}', ["dns://.:53 | log '{' '}'"]),
    "a quoted word over two lines": (
        '. {\n log "a\nb" c\n errors\n}',
        ["dns://.:53 | log 'a\\nb' c | errors"],
    ),
    "a quote inside of a word is a letter": ('. {\n log a"b\n}', ['dns://.:53 | log a"b']),
    "an empty word": ('. {\n log ""\n}', ["dns://.:53 | log ''"]),
    "byte order mark and carriage returns": (
        "\ufeff. {\r\n  whoami\r\n}\r\n",
        ["dns://.:53 | whoami"],
    ),
    "blanks of other scripts": (".\u3000{\n\xa0whoami\u2003\n}", ["dns://.:53 | whoami"]),
    "template words are no braces": (
        ". {\n template IN ANY {\n  match a{2}\n  answer {{ .Name }}\n }\n}",
        ["dns://.:53 | template IN ANY {match 'a{2}'; answer '{{' .Name '}}'}"],
    ),
}


@pytest.mark.parametrize(("text", "expected"), GRAMMAR.values(), ids=GRAMMAR)
def test_grammar(text: str, expected: list[str]) -> None:
    assert without_problems(text) == expected


KEYS = {
    ".": ["dns://.:53"],
    ":1053": ["dns://.:1053"],
    "example.org": ["dns://example.org.:53"],
    "EXAMPLE.Org.:1053": ["dns://example.org.:1053"],
    "dns://example.org": ["dns://example.org.:53"],
    "example.org:0": ["dns://example.org.:0"],
    "_tcp.example.org": ["dns://_tcp.example.org.:53"],
    "10.in-addr.arpa": ["dns://10.in-addr.arpa.:53"],
    "0/25.2.0.192.in-addr.arpa": ["dns://0/25.2.0.192.in-addr.arpa.:53"],  # RFC 2317
    "10.0.0.0/8": ["dns://10.in-addr.arpa.:53"],
    "10.96.7.8/16": ["dns://96.10.in-addr.arpa.:53"],
    "10.0.0.0/15:1053": ["dns://0.10.in-addr.arpa.:1053", "dns://1.10.in-addr.arpa.:1053"],
    "fd00:10:244::/32": ["dns://0.1.0.0.0.0.d.f.ip6.arpa.:53"],
    "2001:db8::/31:1053": [
        "dns://8.b.d.0.1.0.0.2.ip6.arpa.:1053",
        "dns://9.b.d.0.1.0.0.2.ip6.arpa.:1053",
    ],
}


@pytest.mark.parametrize(("key", "expected"), KEYS.items(), ids=list(KEYS))
def test_server_block_keys(key: str, expected: list[str]) -> None:
    assert without_problems(f"{key} {{\n whoami\n}}") == [" ".join(expected) + " | whoami"]


def test_encrypted_schemes_have_ports_of_their_own() -> None:
    found = without_problems(
        "tls://. https://. TLS://a:8853 {\n tls cert.pem key.pem\n}", default_port=1053
    )
    assert found == ["tls://.:853 https://.:443 tls://a.:8853 | tls cert.pem key.pem"]


def test_the_default_port_is_a_flag() -> None:
    assert without_problems("a dns://b c:53 {\n whoami\n}", default_port=0) == [
        "dns://a.:0 dns://b.:0 dns://c.:53 | whoami"
    ]


def test_a_network_that_is_not_on_a_boundary_becomes_many_zones() -> None:
    corefile, problems = parse("10.244.0.0/17 {\n whoami\n}")
    assert not problems.found
    zones = [key.zone for key in corefile.blocks[0].keys]
    assert len(zones) == 128
    assert zones[0] == "0.244.10.in-addr.arpa." and zones[-1] == "127.244.10.in-addr.arpa."


def test_one_zone_on_two_addresses() -> None:
    text = ". {\n bind 10.0.0.1 10.0.0.2 {\n except 10.0.0.2\n}\n}\n. {\n bind 10.0.0.2\n}\n"
    assert len(without_problems(text)) == 2


def test_tokens_know_their_place() -> None:
    corefile, _ = parse('. {\n\n  log "a\nb"\n  cache 30 {\n   keepttl\n }\n}')
    log, cache = corefile.blocks[0].directives
    assert (log.word.line, log.args[0].line, cache.word.line) == (3, 3, 5)
    assert cache.options is not None and cache.options[0].word.line == 6
    assert corefile.blocks[0].keys[0].token == Token(".", "Corefile", 1)


# --- environment ----------------------------------------------------------------------------

ENVIRONMENT = {"PORT": "1053", "ZONE": "example.org", "TTL": "7", "D": "cache", "BRACE": "{"}
VARIABLES = {
    ".:{$PORT} {\n whoami\n}": ["dns://.:1053 | whoami"],
    ".:{%PORT%} {\n whoami\n}": ["dns://.:1053 | whoami"],
    "a.{$ZONE} b.{%ZONE%}:{$PORT} {\n whoami\n}": [
        "dns://a.example.org.:53 dns://b.example.org.:1053 | whoami"
    ],
    ". {\n {$D} {$TTL}0\n}": ["dns://.:53 | cache 70"],
    '. {\n log "x {$ZONE} {%TTL%}"\n}': ["dns://.:53 | log 'x example.org 7'"],
    ". {\n log {$BRACE}\n errors\n}": ["dns://.:53 | log '{' | errors"],
    ". {\n log {$} {$PORT\n}": ["dns://.:53 | log '{$}' '{$PORT'"],
    ". {\n import {$D}\n}": ["dns://.:53 | whoami"],
}


@pytest.mark.parametrize(("text", "expected"), VARIABLES.items(), ids=list(VARIABLES))
def test_environment_variables(text: str, expected: list[str]) -> None:
    assert without_problems(text, environ=ENVIRONMENT, files={"cache": "whoami"}) == expected


# --- snippets and imports -------------------------------------------------------------------


def test_a_snippet_is_put_in_wherever_it_is_imported() -> None:
    text = """
        (common) {
            errors
            cache 30 {
                keepttl
            }
        }
        a {
            import common
            whoami
        }
        b {
            log
            import common
        }
    """
    assert without_problems(text) == [
        "dns://a.:53 | errors | cache 30 {keepttl} | whoami",
        "dns://b.:53 | log | errors | cache 30 {keepttl}",
    ]


IMPORTS = {
    "options of a directive": (
        "(more) {\n keepttl\n prefetch 3\n}\n. {\n cache {\n success 9\n import more\n }\n}",
        ["dns://.:53 | cache {success 9; keepttl; prefetch 3}"],
    ),
    "a snippet in a snippet": (
        "(a) {\n errors\n}\n(b) {\n import a\n log\n}\n. {\n import b\n whoami\n}",
        ["dns://.:53 | errors | log | whoami"],
    ),
    "server blocks": (
        "(both) {\n a {\n whoami\n }\n b {\n whoami\n }\n}\nimport both\nc {\n whoami\n}",
        ["dns://a.:53 | whoami", "dns://b.:53 | whoami", "dns://c.:53 | whoami"],
    ),
    "keys": ("import keys\n{\n whoami\n}", ["dns://x.:53 dns://y.:53 | whoami"]),
    "a file": (". {\n import one.conf\n whoami\n}", ["dns://.:53 | errors | whoami"]),
    "the same file twice": (
        "a {\n import one.conf\n}\nb {\n import one.conf\n}",
        ["dns://a.:53 | errors", "dns://b.:53 | errors"],
    ),
    "files by a pattern, in order of their names": (
        ". {\n import d/*.conf\n}",
        ["dns://.:53 | log a | errors | log b"],
    ),
    "snippets of a file": (
        "import snippets\n. {\n import s\n}",
        ["dns://.:53 | loop"],
    ),
    "an argument": (
        "(to) {\n forward {args[0]} {args[1]}:53 {\n force_tcp\n }\n}\n"
        ". {\n import to a 1.1.1.1\n import to b 2.2.2.2\n}",
        [
            "dns://.:53 | forward a 1.1.1.1:53 {force_tcp} | forward b 2.2.2.2:53 {force_tcp}",
        ],
    ),
    "an argument in the older form, handed on": (
        "(b) {\n log {args.0}\n}\n(a) {\n import b {args.0}x\n}\n. {\n import a y\n}",
        ["dns://.:53 | log yx"],
    ),
    "all arguments": (
        "(to) {\n forward . {args[:]}\n}\n. {\n import to 1.1.1.1 8.8.8.8\n}",
        ["dns://.:53 | forward . 1.1.1.1 8.8.8.8"],
    ),
    "the end of the last line of a file ends a directive": (
        ". {\n import noeol\n whoami\n}",
        ["dns://.:53 | cache 30 | whoami"],
    ),
}
FILES = {
    "one.conf": "errors\n",
    "keys": "x, y\n",
    "d/1.conf": "log a\nimport deep/x\n",
    "d/2.conf": "log b",
    "d/deep/x": "errors",
    "snippets": "(s) {\n loop\n}\n",
    "noeol": "cache 30",
}


@pytest.mark.parametrize(("text", "expected"), IMPORTS.values(), ids=IMPORTS)
def test_import(text: str, expected: list[str]) -> None:
    assert without_problems(text, files=FILES) == expected


def test_imported_files_are_known_and_named_in_problems(tmp_path: Path) -> None:
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "a.conf").write_text("errors\nimport sub/b\n")
    (tmp_path / "conf.d" / ".hidden.conf").write_text("log\n")
    (tmp_path / "conf.d" / "sub").mkdir()
    (tmp_path / "conf.d" / "sub" / "b").write_text("\nwhoamy\n")
    main = tmp_path / "Corefile"
    text = ". {\n import conf.d/*.conf\n}\n"
    corefile, problems = parse_corefile(text, file=str(main), environ={})
    names = ["Corefile", "conf.d/.hidden.conf", "conf.d/a.conf", "conf.d/sub/b"]
    assert corefile.files == tuple(str(tmp_path / name) for name in names)
    assert shown(corefile) == ["dns://.:53 | log | errors"]
    assert [str(p) for p in problems.found] == [
        f"{tmp_path}/conf.d/sub/b:2: Unknown directive 'whoamy', did you mean 'whoami'?"
    ]


# --- digest ---------------------------------------------------------------------------------

BASE = "(s) {\n errors\n}\n. {\n import s\n cache 30 {\n  keepttl\n }\n}\n"
SAME = [
    "# why\n(s) {\n errors\n}\n\n. {\n\timport s # x\n cache   30 {\n  keepttl\n }\n}\n",
    ".:53 {\n errors\n cache 30 {\n  keepttl\n }\n}\n",
    '"." {\n errors\n "cache" "30" {\n  keepttl\n }\n}\n',
    "dns://.\nimport one.conf\ncache {$TTL} {\n keepttl\n}\n",
]
OTHER = [
    ".:54 {\n errors\n cache 30 {\n  keepttl\n }\n}\n",
    ". {\n errors\n cache 31 {\n  keepttl\n }\n}\n",
    ". {\n errors\n cache 30 {\n  keepttl 1\n }\n}\n",
    ". {\n errors\n cache 30\n}\n",
    ". {\n errors\n cache 30 {\n }\n}\n",
    ". {\n errors\n cache 30 keepttl\n}\n",
    "tls://.:53 {\n errors\n cache 30 {\n  keepttl\n }\n}\n",
]


def test_digest_is_that_of_the_meaning() -> None:
    def digest(text: str) -> str:
        return parse(text, files=FILES, environ={"TTL": "30"})[0].digest

    base = digest(BASE)
    assert len(base) == 128 and int(base, 16)
    assert [digest(text) == base for text in SAME] == [True] * len(SAME)
    others = [digest(text) for text in OTHER]
    assert len({base, *others}) == len(OTHER) + 1


def test_digest_changes_with_an_imported_file() -> None:
    text = ". {\n import x\n}"
    one, other = (parse(text, files={"x": words})[0].digest for words in ("log", "errors"))
    assert one != other


# --- the Corefiles people have (reference 2.1) ------------------------------------------------

KUBEADM = """.:53 {
    errors
    health {
       lameduck 5s
    }
    ready
    kubernetes cluster.local in-addr.arpa ip6.arpa {
       pods insecure
       fallthrough in-addr.arpa ip6.arpa
       ttl 30
    }
    prometheus :9153
    forward . /etc/resolv.conf {
       max_concurrent 1000
    }
    cache 30 {
       disable success cluster.local
       disable denial cluster.local
    }
    loop
    reload
    loadbalance
}
"""
K3S = """.:53 {
    errors
    health
    ready
    kubernetes cluster.local in-addr.arpa ip6.arpa {
      pods insecure
      fallthrough in-addr.arpa ip6.arpa
    }
    hosts /etc/coredns/NodeHosts {
      ttl 60
      reload 15s
      fallthrough
    }
    prometheus :9153
    cache 30
    loop
    reload
    loadbalance
    import CUSTOM/*.override
    forward . /etc/resolv.conf
}
import CUSTOM/*.server
"""
NODE_LOCAL = "".join(
    f"""{zone}:53 {{
    errors
    {cache}
    reload
    loop
    bind 169.254.20.10 10.96.0.10
    forward . {upstream} {{
            force_tcp
    }}
    prometheus :9253
    {health}
    }}
"""
    for zone, cache, upstream, health in (
        (
            "cluster.local",
            "cache {\n  success 9984 30\n  denial 9984 5\n}",
            "10.96.0.11",
            "health 169.254.20.10:8080",
        ),
        ("in-addr.arpa", "cache 30", "10.96.0.11", ""),
        ("ip6.arpa", "cache 30", "10.96.0.11", ""),
        (".", "cache 30", "/etc/resolv.conf", ""),
    )
)
MINIKUBE = KUBEADM.replace(".:53 {\n", ".:53 {\n    log\n").replace(
    "    prometheus",
    "    hosts {\n       192.168.49.1 host.minikube.internal\n       fallthrough\n    }\n"
    "    prometheus",
)


@pytest.mark.parametrize(
    ("text", "blocks", "words"),
    [(KUBEADM, 1, 10), (NODE_LOCAL, 4, 8), (MINIKUBE, 1, 12)],
    ids=["kubeadm", "node-local-dns", "minikube"],
)
def test_default_corefiles(text: str, blocks: int, words: int) -> None:
    corefile, problems = parse(text)
    assert not problems.found
    assert len(corefile.blocks) == blocks
    assert len(corefile.blocks[0].directives) == words


def test_kubeadm_corefile_in_detail() -> None:
    (found,) = without_problems(KUBEADM)
    assert found == (
        "dns://.:53 | errors | health {lameduck 5s} | ready"
        " | kubernetes cluster.local in-addr.arpa ip6.arpa"
        " {pods insecure; fallthrough in-addr.arpa ip6.arpa; ttl 30}"
        " | prometheus :9153 | forward . /etc/resolv.conf {max_concurrent 1000}"
        " | cache 30 {disable success cluster.local; disable denial cluster.local}"
        " | loop | reload | loadbalance"
    )


def test_k3s_corefile_with_custom_files(tmp_path: Path) -> None:
    text = K3S.replace("CUSTOM", str(tmp_path))
    corefile, problems = parse_corefile(text, file="/etc/coredns/Corefile", environ={})
    assert len(corefile.blocks) == 1
    assert [str(p) for p in problems.found] == [
        f"/etc/coredns/Corefile:{line}: warning: No files matching import glob pattern:"
        f" {tmp_path}/*.{kind}"
        for line, kind in ((19, "override"), (22, "server"))
    ]
    (tmp_path / "log.override").write_text("log\n")
    (tmp_path / "corp.server").write_text("corp.example:53 {\n  forward . 10.0.0.1\n}\n")
    (tmp_path / "lab.server").write_text("lab.example {\n  forward . 10.0.0.2\n}")
    corefile, problems = parse_corefile(text, file="/etc/coredns/Corefile", environ={})
    assert not problems.found
    assert [d.name for d in corefile.blocks[0].directives][-2:] == ["log", "forward"]
    assert shown(corefile)[1:] == [
        "dns://corp.example.:53 | forward . 10.0.0.1",
        "dns://lab.example.:53 | forward . 10.0.0.2",
    ]


# --- properties -------------------------------------------------------------------------------

BARE = st.from_regex(r"[a-zA-Z0-9./:_*^$()\[\]\\-]{1,8}", fullmatch=True)
ANY_TEXT = st.text(
    st.characters(codec="utf-8", exclude_characters='\\$%"\r'), max_size=8
)  # what quotes can hold, less variables
WORD_NAME = st.sampled_from([word for word in ORDER if word not in ("bind", "tls")])
ARGUMENTS = st.lists(BARE.filter(lambda text: text != "import") | ANY_TEXT, max_size=3)
OPTION = st.tuples(BARE.filter(lambda text: text != "import"), ARGUMENTS)
DIRECTIVE = st.tuples(WORD_NAME, ARGUMENTS, st.none() | st.lists(OPTION, max_size=3))
BLOCK = st.tuples(
    st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True),
    st.lists(DIRECTIVE, min_size=1, max_size=4),
)
BLANK = st.sampled_from([" ", "  ", "\t", "\xa0", " \r"])
BREAK = st.sampled_from(["\n", "\r\n", "\n\n", " # x { y\n", "\n\t# }\n  "])


def write(word: str) -> str:
    """Return a word as it must be written, in quotes where it needs them."""
    plain = set(string.ascii_letters + string.digits + "./:_*^$()[]\\-")
    if word and set(word) <= plain:
        return word
    return '"' + word.replace('"', '\\"') + '"'


@settings(max_examples=150, deadline=None)
@given(st.lists(BLOCK, min_size=1, max_size=3), st.data())
def test_what_is_written_is_read(
    blocks: list[tuple[list[int], list[tuple[str, list[str], list[tuple[str, list[str]]] | None]]]],
    draws: st.DataObject,
) -> None:
    def words(*texts: str) -> str:
        return draws.draw(BLANK).join(write(text) for text in texts)

    def end() -> str:
        return draws.draw(BREAK)

    text, expected = "", []
    for n, (zones, directives) in enumerate(blocks):
        names = [f"z{zone}.b{n}.example" for zone in zones]
        text += words(*names) + " {" + end()
        meaning = []
        for word, args, options in directives:
            text += words(word, *args)
            if options is not None:
                text += " {" + end()
                for option, values in options:
                    text += words(option, *values) + end()
                text += "}"
            text += end()
            meaning.append(
                (word, args, None if options is None else [(o, list(v)) for o, v in options])
            )
        text += "}" + end()
        expected.append(([f"dns://{name}.:53" for name in names], meaning))
    corefile, problems = parse(text)
    assert [str(p) for p in problems.found] == []
    assert [
        (
            [str(key) for key in block.keys],
            [
                (
                    d.name,
                    [arg.text for arg in d.args],
                    None
                    if d.options is None
                    else [(o.name, [arg.text for arg in o.args]) for o in d.options],
                )
                for d in block.directives
            ],
        )
        for block in corefile.blocks
    ] == expected


PIECES = st.sampled_from(
    [*"{}(),:./#\"\\\n \r", "import", " {\n", "\n}\n", "(a)", "a", "{$A}", "{%A%}", "{args[0]}",
     "{args[:]}", "import a", "import x", "import *", "whoami", "cache", ".:53", "tls://", "quic",
     "10.0.0.0/9", "forward", "1.1.1.1", "proxy", "\ufeff", "ü", "::", "]:99999"]
)  # fmt: skip
PIECED = st.lists(PIECES, max_size=40).map("".join)


@settings(max_examples=400, deadline=None)
@given(PIECED | st.text(max_size=60), PIECED, PIECED)
def test_any_text_is_read_to_its_end(text: str, imported: str, variable: str) -> None:
    files = {"x": imported, "y": text}
    corefile, problems = parse(text, files=files, environ={"A": variable})
    assert corefile.blocks or problems.errors
    assert all(block.keys for block in corefile.blocks)
    assert {p.file for p in problems.found} <= {"Corefile", "x", "y"}
    assert all("\n" not in d.name for b in corefile.blocks for d in b.directives)
    again, same = parse(text, files=files, environ={"A": variable})
    assert (again, same.found) == (corefile, problems.found)


HUGE: dict[str, Callable[[], str]] = {
    "braces": lambda: ". " + "{ " * 50_000,
    "braces of options": lambda: ". {\n cache {\n" + "x {\n" * 50_000,
    "closing braces": lambda: "}\n" * 50_000,
    "quotes": lambda: '"\n' * 50_001,
    "variables": lambda: "{$" * 50_000 + "{%" * 50_000,
    "blocks": lambda: "".join(f"z{n} {{\n whoami\n}}\n" for n in range(5_000)),
}


@pytest.mark.parametrize("text", HUGE.values(), ids=HUGE)
def test_long_texts_take_no_more_time_than_they_are_long(text: Callable[[], str]) -> None:
    parse(text())


def test_snippets_that_double_are_stopped() -> None:
    text = "(s0) {\n whoami\n}\n" + "".join(
        f"(s{n}) {{\n import s{n - 1}\n import s{n - 1}\n}}\n" for n in range(1, 40)
    )
    _, problems = parse(text + ". {\n import s39\n}\n")
    assert [p.text for p in problems.found] == [
        f"imports expand to more than {MAX_SNIPPETS} snippets; no further one is followed"
    ]


def test_words_of_kdns_and_of_coredns_do_not_overlap() -> None:
    assert not NOT_HERE & set(ORDER)
