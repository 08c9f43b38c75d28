"""What kdns says about a Corefile that is wrong: everything, with the place and a way out."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from test_corefile import parse, shown

from kdns.corefile import INSTEAD, REMOVED
from kdns.plugins import NOT_HERE


def said(text: str, files: Mapping[str, str] | None = None) -> list[str]:
    """Return the problems of a Corefile, each without the file's name."""
    _, problems = parse(text, files)
    return [str(p).removeprefix("Corefile:") for p in problems.found]


def block(*lines: str) -> str:
    return "\n".join((". {", *lines, "}", ""))


DIRECTIVES = {
    "misspelt": (block("whoamy"), ["2: Unknown directive 'whoamy', did you mean 'whoami'?"]),
    "capitals": (block("Forward . 1.1.1.1"), [
        "2: Unknown directive 'Forward', did you mean 'forward'?"]),
    "package's name": (block("metrics"), ["2: Unknown directive 'metrics', did you mean"
                                          " 'prometheus'?"]),
    "nothing like it": (block("zzzz"), ["2: Unknown directive 'zzzz'"]),
    "its block is skipped": (
        block("nosuch a {", "cache x", "}", "whoamy"),
        ["2: Unknown directive 'nosuch'", "5: Unknown directive 'whoamy', did you mean 'whoami'?"],
    ),
    "only in CoreDNS": (
        block("secondary a {", "transfer from 1.1.1.1", "}"),
        ["2: CoreDNS's plugin 'secondary' is not in kdns; serve a copy of the zone with 'file', or"
         " forward the zone"],
    ),
    "only in CoreDNS, not needed": (block("pprof"), [
        "2: CoreDNS's plugin 'pprof' is not in kdns; take the line out"]),
    "removed": (
        block("proxy . /etc/resolv.conf {", "policy random", "}", "errors"),
        ["2: warning: 'proxy' is ignored: CoreDNS removed this plugin; write 'forward FROM TO...'"
         " in its place"],
    ),
}  # fmt: skip

BRACES = {
    "never closed": (". {\n whoami\n", [
        "1: Unexpected EOF: the '{' of this server block is never closed with '}'"]),
    "never closed, another block follows": (
        ". {\n errors\nexample.org {\n whoami\n}\n",
        ["1: the '{' of this server block is not closed with '}' before the next one in line 3"],
    ),
    "options never closed": (". {\n cache {\n", [
        "1: Unexpected EOF: the '{' of this server block is never closed with '}'",
        "2: Unexpected EOF: the '{' of 'cache' is never closed with '}'"]),
    "closed twice": (block("whoami") + "}\n", [
        "4: Unexpected '}' because no matching opening brace"]),
    "closed, never opened": (
        ".:53\n whoami\n}\n",
        ["3: Unexpected '}' because no matching opening brace: the server block '.:53' of line 1"
         " has no '{'"],
    ),
    "one line": (". { whoami }", [
        "1: Unexpected '}' because no matching opening brace in this line; a server block's '}'"
        " needs a line of its own"]),
    "closed at the end of a line": (". {\n errors\n whoami }\nexample.org {\n log\n}", [
        "3: Unexpected '}' because no matching opening brace in this line; a server block's '}'"
        " needs a line of its own"]),
    "a brace too many in a line": (block("errors }", "whoami"), [
        "2: Unexpected '}' because no matching opening brace in this line; a server block's '}'"
        " needs a line of its own"]),
    "no blank before it": (".:53{\n cache{\n keepttl\n}\n}", [
        "1: write a blank between '.:53' and '{'", "2: write a blank between 'cache' and '{'"]),
    "on the next line of a directive": (block("errors", "{", "stacktrace", "}"), [
        "3: '{' must stand in the line of 'errors', line 2"]),
    "an option's own": (block("cache {", "success {", "30", "}", "}", "log"), [
        "3: Unexpected '{': the option 'success' of 'cache' has no block of its own"]),
    "without anything before it": (block("{", "log", "}", "log"), [
        "2: Unexpected '{': no directive stands before it"]),
    "without an option before it": (block("cache {", "{", "log", "}", "}"), [
        "3: Unexpected '{' among options of 'cache'"]),
    "words behind it": (block("cache {", "keepttl", "} log"), [
        "4: unexpected 'log' behind '}'; start a new line"]),
    "quote never closed": (block('log "a b', "errors"), [
        '2: the quote that starts here is never closed with "']),
    "a comment inside of a word": (block("rewrite name a#b c"), [
        "2: warning: '#' starts a comment: only 'a' is left of this word; write it as \"...\" if"
        " the # belongs to it"]),
    "several blocks without braces": (
        ".\n errors\nexample.org {\n whoami\n}\n",
        ["1: the server block '.' needs braces: only a file's last block can do without"],
    ),
}  # fmt: skip

KEYS = {
    "unknown scheme": ("foo://.", ["1: unknown scheme 'foo'; there are dns:// and tls:// and"
                                   " https://"]),
    "scheme misspelt": ("htps://.", ["1: unknown scheme 'htps', did you mean 'https'?"]),
    "scheme of CoreDNS": ("quic://.", [
        "1: kdns does not have CoreDNS's quic://; it has dns:// and tls:// and https://"]),
    "grpc": ("grpc://.", [
        "1: kdns does not have CoreDNS's grpc://; it has dns:// and tls:// and https://"]),
    "prefix too long": ("10.0.0.0/33", [
        "1: '10.0.0.0/33' is not a network in CIDR notation; write all octets and a prefix length"
        " that fits, as in 10.96.0.0/16 or fd00:10::/48"]),
    "octets left out": ("10.96/16", [
        "1: '10.96/16' is not a network in CIDR notation; write all octets and a prefix length"
        " that fits, as in 10.96.0.0/16 or fd00:10::/48"]),
    "IPv6 prefix too long": ("fd00::/129", [
        "1: 'fd00::/129' is not a network in CIDR notation; write all octets and a prefix length"
        " that fits, as in 10.96.0.0/16 or fd00:10::/48"]),
    "port too high": (".:99999", ["1: address 99999: invalid port; the highest is 65535"]),
    "port by name": (".:dns", ["1: 'dns' in '.:dns' is not a port; write a number"]),
    "port left out": (".:", [
        '1: expecting data after last colon: ".:"; write a port or leave the colon out']),
    "empty label": ("a..b", [
        "1: zone is not a valid domain name: 'a..b.' has an empty label"]),
    "label too long": (64 * "a", [
        f"1: zone is not a valid domain name: '{64 * 'a'}.' has a label of 64 octets; at most 63"
        " are allowed"]),
    "blank in quotes": ('"a b"', [
        "1: zone is not a valid domain name: 'a b'; each key is one word"]),
    "glued to a brace": ("}a", [
        "1: zone is not a valid domain name: '}a'; braces are words of their own"]),
    "an address": ("127.0.0.1:53", [
        "1: warning: the address '127.0.0.1' is taken for the name of a zone; to listen on it"
        " write 'bind 127.0.0.1' in the block, to serve its reverse zone 127.0.0.1/32 as key"]),
    "an IPv6 address": ("[::1]:53", [
        "1: warning: the address '[::1]' is taken for the name of a zone; to listen on it"
        " write 'bind ::1' in the block, to serve its reverse zone ::1/128 as key"]),
    "an asterisk": ("*.example.org", [
        "1: warning: '*.example.org' serves only names below a label '*'; write example.org. for"
        " all names"]),
    "letters of other scripts": ("münchen.de", [
        "1: warning: no query carries the letters of 'münchen.de'; write xn--mnchen-3ya.de"]),
    "a plugin's name": ("whoami", [
        "1: warning: 'whoami' is taken for a zone, not for the plugin; write 'whoami.' if that is"
        " meant, or put the line into a server block"]),
    "a comma without a blank": ("a,b", [
        "1: warning: 'a,b' are 2 zones here; CoreDNS takes it for one, so write a blank behind"
        " each comma"]),
    "a comma too many": ("a, b,", [
        "1: Expected another address but had '{' - check for extra comma"]),
    "twice": (". .", [
        "1: cannot serve dns://.:53 - it is already defined in Corefile:1; give it another zone or"
        " port, or bind each to addresses of its own"]),
    "two protocols on one port": ("dns://.:8853 https://.:8853", [
        "1: cannot serve https://.:8853 - port 8853 speaks dns in Corefile:1; give it a port of"
        " its own",
        "1: warning: 'https://.:8853' is plain HTTP: there is no 'tls CERT KEY' in its block"]),
    "none": ("", ["1: server block without a zone; write '.:53 {' to serve all names"]),
    "encrypted without certificate": ("tls://.", ["1: 'tls://.' needs 'tls CERT KEY' in its"
                                                  " block"]),
}  # fmt: skip

BLOCKS = {
    "empty file": ("", [" no server block; the least that serves is '.:53 {', 'whoami',"
                        " '}'"]),
    "only comments": ("# later\n", [" no server block; the least that serves is '.:53 {',"
                                    " 'whoami', '}'"]),
    "a plugin and nothing else": ("whoami\n", [
        "1: 'whoami' is a plugin, but the first line of a server block names its zones; write"
        " '.:53 {' above and '}' below"]),
    "plugins without a zone": ("errors\nforward . 1.1.1.1 {\n force_tcp\n}\n", [
        "1: 'errors' is a plugin, but the first line of a server block names its zones; write"
        " '.:53 {' above and '}' below"]),
    "without plugins": ("example.org {\n}\n", [
        "1: warning: server block without plugins: it answers every query with REFUSED"]),
    "a zone and nothing else": ("example.org\n", [
        "1: warning: server block without plugins: it answers every query with REFUSED"]),
    "a comma at the end": ("example.org,\n", [
        "1: Unexpected EOF: another key must follow 'example.org,'",
        "1: warning: server block without plugins: it answers every query with REFUSED"]),
    "the same zone in another block": (
        "a b {\n log\n}\nB {\n log\n}\n",
        ["4: cannot serve dns://b.:53 - it is already defined in Corefile:1; give it another zone"
         " or port, or bind each to addresses of its own"],
    ),
    "the same zone on the same address": (
        ". {\n bind lo 10.0.0.1\n}\n. {\n bind 10.0.0.1\n}\n",
        ["4: cannot serve dns://.:53 - it is already defined in Corefile:1; give it another zone"
         " or port, or bind each to addresses of its own"],
    ),
    "bound and not bound": (
        ". {\n bind 10.0.0.1\n}\n. {\n log\n}\n",
        ["4: cannot serve dns://.:53 - it is already defined in Corefile:1; give it another zone"
         " or port, or bind each to addresses of its own"],
    ),
    "overlapping networks, said once": (
        "10.0.0.0/23 {\n log\n}\n10.0.0.0/22 {\n log\n}\n",
        ["4: cannot serve dns://0.0.10.in-addr.arpa.:53 - it is already defined in Corefile:1;"
         " give it another zone or port, or bind each to addresses of its own"],
    ),
    "certificate without encryption": (block("tls cert.pem key.pem"), [
        "2: warning: 'tls' encrypts nothing here; write tls://. or https://."]),
}  # fmt: skip

IMPORTS = {
    "of nothing": (block("import", "log"), [
        "2: Wrong argument count or unexpected line ending after 'import': write 'import FILE' or"
        " 'import SNIPPET'"]),
    "of an empty name": (block('import ""', "log"), [
        "2: Import requires a non-empty file or snippet name"]),
    "of a missing file": (block("import nosuch", "log"), [
        "2: File to import not found: nosuch"]),
    "of a misspelt snippet": ("(common) {\n log\n}\n" + block("import comon", "log"), [
        "5: File to import not found: comon, did you mean 'common'?"]),
    "of a snippet further down": (block("import s", "log") + "(s) {\n log\n}\n", [
        "2: File to import not found: s; the snippet (s) of line 5 must stand above its import"]),
    "of a folder": (block("import folder", "log"), [
        "2: Could not import folder: Is a directory"]),
    "of what cannot be read": (block("import secret", "log"), [
        "2: Could not import secret: Permission denied"]),
    "with two wildcards": (block("import */*.conf", "log"), [
        "2: Glob pattern may only contain one wildcard (*), but has others: */*.conf"]),
    "that matches nothing": (block("import no/*.conf", "log"), [
        "2: warning: No files matching import glob pattern: no/*.conf"]),
    "and a brace": (". {\n log\n import nosuch }\n", [
        "3: unexpected '}' after 'import'; start a new line",
        "3: File to import not found: nosuch"]),
    "of a snippet in itself": ("(s) {\n import s\n}\n" + block("log", "import s"), [
        "2: 's' imports itself: (s) -> (s)"]),
    "in a circle": (
        "(a) {\n import b\n}\n(b) {\n import a\n}\n" + block("log", "import a"),
        ["5: 'a' imports itself: (a) -> (b) -> (a)"],
    ),
    "of the Corefile in itself": (block("log", "import Corefile"), [
        "3: 'Corefile' imports itself: Corefile -> Corefile"]),
    "snippet named twice": ("(s) {\n}\n(s) {\n log\n}\n" + block("log"), [
        "3: redeclaration of previously declared snippet s: the first is in Corefile:1"]),
    "snippet without braces": ("(s)\n" + block("log"), [
        "1: Syntax error: expecting '{' after the name of snippet (s)"]),
    "snippet never closed": (block("log") + "(s) {\n log\n", [
        "4: Unexpected EOF: the '{' of snippet (s) is never closed"]),
    "too few arguments": ("(s) {\n log {args[0]} {args[2]}\n}\n" + block("import s a"), [
        "5: 's' uses {args[2]}, but its import gives it 1 argument"]),
    "no arguments": ("(s) {\n log {args.0}\n}\n" + block("import s"), [
        "5: 's' uses {args[0]}, but its import gives it no arguments"]),
    "an argument nobody wants": ("(s) {\n log\n}\n" + block("import s a"), [
        "5: 's' has no use for the argument 'a': it does not contain {args[0]}"]),
}  # fmt: skip

VARIABLES = {
    "in a key": (".:{$PORT} {\n log\n}\n", [
        "1: warning: environment variable 'PORT' is not set: it is empty",
        '1: expecting data after last colon: ".:"; write a port or leave the colon out']),
    "the whole key": ("{$ZONE} {\n log\n}\n", [
        "1: warning: environment variable 'ZONE' is not set: it is empty",
        "1: server block without a zone; write '.:53 {' to serve all names"]),
    "an argument": (block("forward . {%UP%}"), [
        "2: warning: environment variable 'UP' is not set: it is empty"]),
    "a template's variable": (block("log {{$x}}"), [
        "2: warning: environment variable 'x' is not set: it is empty; if a template's variable"
        " is meant, write '{{ $x }}'"]),
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), DIRECTIVES.values(), ids=DIRECTIVES)
def test_directives(text: str, expected: list[str]) -> None:
    assert said(text) == expected


@pytest.mark.parametrize(("text", "expected"), BRACES.values(), ids=BRACES)
def test_braces(text: str, expected: list[str]) -> None:
    assert said(text) == expected


@pytest.mark.parametrize(("key", "expected"), KEYS.values(), ids=KEYS)
def test_keys(key: str, expected: list[str]) -> None:
    assert said(f"{key} {{\n log\n}}\n") == expected


@pytest.mark.parametrize(("text", "expected"), BLOCKS.values(), ids=BLOCKS)
def test_blocks(text: str, expected: list[str]) -> None:
    assert said(text) == expected


@pytest.mark.parametrize(("text", "expected"), VARIABLES.values(), ids=VARIABLES)
def test_variables_that_are_not_set(text: str, expected: list[str]) -> None:
    assert said(text) == expected


class Folder(dict[str, str]):
    """Files of which some cannot be read."""

    def __contains__(self, path: object) -> bool:
        return path in ("folder", "secret") or super().__contains__(path)

    def __getitem__(self, path: str) -> str:
        if path == "folder":
            raise IsADirectoryError(21, "Is a directory", path)
        if path == "secret":
            raise PermissionError(13, "Permission denied", path)
        return super().__getitem__(path)


@pytest.mark.parametrize(("text", "expected"), IMPORTS.values(), ids=IMPORTS)
def test_imports(text: str, expected: list[str]) -> None:
    assert said(text, files=Folder()) == expected


def test_files_that_import_each_other() -> None:
    files = {"a": "import b\n", "b": "errors\nimport a\n"}
    _, problems = parse(block("import a"), files=files)
    assert [str(p) for p in problems.found] == ["b:2: 'a' imports itself: a -> b -> a"]


def test_all_mistakes_are_said_at_once_and_the_rest_is_read() -> None:
    corefile, problems = parse(
        "(s) {\n whoamy\n}\n"
        "foo://a b:99999 c {\n import s\n import t\n cache 30 {\n keepttl\n }\n etcd\n}\n"
        "}\n"
        "c {\n proxy . 1.1.1.1\n log \"x\n}\n"
    )  # fmt: skip
    assert [(p.line, p.warning) for p in problems.found] == [
        (2, False), (4, False), (4, False), (6, False), (10, False), (12, False), (13, False),
        (14, True), (15, False),
    ]  # fmt: skip
    assert shown(corefile) == ["dns://c.:53 | cache 30 {keepttl}", "dns://c.:53 | log x"]


def test_a_block_without_a_good_key_keeps_its_plugins_for_their_own_mistakes() -> None:
    corefile, problems = parse("a..b {\n cache x y z\n}\nc..d {\n log\n}\n")
    assert len(problems.errors) == 2
    keys = [block.keys for block in corefile.blocks]
    assert all(len(k) == 1 and k[0].zone.endswith(".invalid.") for k in keys)
    assert keys[0][0] != keys[1][0]
    assert corefile.blocks[0].directives[0].name == "cache"


def test_every_word_of_coredns_that_is_not_here_says_what_to_do() -> None:
    for word in NOT_HERE:
        (line,) = said(block(word, "log"))
        assert line.startswith(f"2: CoreDNS's plugin '{word}' is not in kdns; "), line
    assert set(INSTEAD) <= NOT_HERE
    for word in REMOVED:
        (line,) = said(block(word, "log"))
        assert line.startswith(f"2: warning: '{word}' is ignored: "), line
