"""`file` and `auto`: which zone answers, what a changed or broken file does."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from support import Stub, a, answer, build, cname, errors_of, make_setup, question

from kdns.dns import types as t
from kdns.dns.message import AA, FOREVER, Reply, failure
from kdns.dns.name import parse_name
from kdns.dns.text import render_rr
from kdns.plugins.auto import Auto
from kdns.plugins.chain import MAX_DEPTH
from kdns.plugins.file import File
from kdns.plugins.plugin import Plugin, WatchFile, WatchFolder
from kdns.plugins.setup import Setup
from kdns.server.files import load, read_file

HEAD = "$TTL 300\n@ SOA ns admin {serial} 7200 1800 86400 60\n@ NS ns\n"
BODY = "www A 192.0.2.{last}\nout CNAME x.elsewhere.net.\nmx MX 10 www\n"


def db(serial: int = 1, last: int = 1, more: str = "") -> bytes:
    return (HEAD.format(serial=serial) + BODY.format(last=last) + more).encode()


def served(text: str, *contents: bytes, cx: Setup | None = None) -> list[Plugin]:
    """Build a server block and hand its `file` directives their first content."""
    cx = cx or make_setup()
    plugins = build(text, cx)
    assert not cx.problems.errors, cx.problems.errors
    watches = [w for p in plugins for w in p.work() if isinstance(w, WatchFile)]
    for watch, content in zip(watches, contents, strict=True):
        assert watch.load(content, "")
    return plugins


def watch_of(plugins: list[Plugin]) -> WatchFile:
    watch = next(p for p in plugins if p.word == "file").work()[0]
    assert isinstance(watch, WatchFile)
    return watch


def ask(plugins: list[Plugin], name: str, qtype: str = "A") -> tuple[str, list[str]]:
    """Return (rcode, answer section) as a person would read them."""
    reply = answer(plugins, question(name, qtype))
    return t.rcode_name(reply.rcode), [render_rr(rr) for rr in reply.answer]


def test_a_zone_file_answers_and_other_names_go_on() -> None:
    stub = Stub({("other.test.", "A"): Reply(answer=[a("other.test.", "192.0.2.99")])})
    plugins = [*served("file db example.org", db()), stub]
    reply = answer(plugins, question("WWW.Example.ORG"))
    assert [render_rr(rr) for rr in reply.answer] == ["www.example.org. 300 IN A 192.0.2.1"]
    assert [render_rr(rr) for rr in reply.authority] == [
        "example.org. 300 IN NS ns.example.org."
    ]  # fmt: skip
    assert reply.flags == AA
    assert reply.keep == FOREVER
    assert reply.served_by == "file"
    assert ask(plugins, "nothing.example.org.") == ("NXDOMAIN", [])
    assert ask(plugins, "other.test.")[1] == ["other.test. 300 IN A 192.0.2.99"]


def test_the_longest_zone_answers_and_the_server_block_names_the_rest() -> None:
    plugins = served(
        "file db1\nfile db2 sub.example.org",
        db(last=1), db(last=2),
        cx=make_setup(("example.org.", "example.net.")),
    )  # fmt: skip
    assert ask(plugins, "www.example.org.")[1] == ["www.example.org. 300 IN A 192.0.2.1"]
    assert ask(plugins, "www.example.net.")[1] == ["www.example.net. 300 IN A 192.0.2.1"]
    assert ask(plugins, "www.sub.example.org.")[1] == ["www.sub.example.org. 300 IN A 192.0.2.2"]


def test_with_nothing_behind_it_other_names_are_refused() -> None:
    plugins = served("file db example.org", db())
    assert ask(plugins, "other.test.") == ("REFUSED", [])


@pytest.mark.parametrize("qtype", ["AXFR", "IXFR"])
def test_without_transfer_a_transfer_is_refused(qtype: str) -> None:
    plugins = served("file db example.org", db())
    assert ask(plugins, "example.org.", qtype) == ("REFUSED", [])


# --- fallthrough ---------------------------------------------------------------------------

FALLS = [
    # options, name, type -> does the plugin below answer?
    ("", "nothing.example.org.", "A", False),
    ("fallthrough", "nothing.example.org.", "A", True),
    ("fallthrough", "www.example.org.", "A", False),
    ("fallthrough", "www.example.org.", "TXT", False),  # NODATA stays
    ("fallthrough", "empty.example.org.", "A", True),  # an empty non-terminal does not
    ("fallthrough", "example.org.", "A", True),  # nor an apex with SOA and NS alone (CoreDNS)
    ("fallthrough", "example.org.", "SOA", False),
    ("fallthrough sub.example.org", "nothing.example.org.", "A", False),
    ("fallthrough sub.example.org", "a.sub.example.org.", "A", True),
    ("fallthrough test. sub.example.org", "sub.example.org.", "A", True),
]


@pytest.mark.parametrize(("option", "name", "qtype", "below"), FALLS)
def test_fallthrough(option: str, name: str, qtype: str, below: bool) -> None:
    stub = Stub()
    text = f"file db example.org {{\n{option}\n}}" if option else "file db example.org"
    plugins = [*served(text, db(more="a.empty A 192.0.2.7\n")), stub]
    answer(plugins, question(name, qtype))
    assert bool(stub.asked) is below


# --- aliases out of the zone ---------------------------------------------------------------

NS = ["example.org. 300 IN NS ns.example.org."]
SOA = ["example.org. 300 IN SOA ns.example.org. admin.example.org. 1 7200 1800 86400 60"]
ALIAS = "out.example.org. 300 IN CNAME x.elsewhere.net."
FOUND = Reply(
    answer=[cname("x.elsewhere.net.", "y.elsewhere.net."), a("y.elsewhere.net.", "192.0.2.50")]
)
OUTSIDE = [
    (FOUND, "NOERROR",
     [ALIAS, "x.elsewhere.net. 300 IN CNAME y.elsewhere.net.",
      "y.elsewhere.net. 300 IN A 192.0.2.50"], NS),
    (Reply(), "NOERROR", [ALIAS], SOA),
    (Reply(t.NXDOMAIN), "NXDOMAIN", [ALIAS], SOA),
    (failure(t.SERVFAIL), "SERVFAIL", [ALIAS], NS),
    (failure(t.REFUSED), "NOERROR", [ALIAS], NS),
]  # fmt: skip


@pytest.mark.parametrize(("outside", "rcode", "answers", "authority"), OUTSIDE)
def test_an_alias_out_of_the_zone_is_looked_up(
    outside: Reply, rcode: str, answers: list[str], authority: list[str]
) -> None:
    stub = Stub({("x.elsewhere.net.", "A"): outside})
    plugins = [*served("file db example.org", db()), stub]
    reply = answer(plugins, question("out.example.org."))
    assert t.rcode_name(reply.rcode) == rcode
    assert [render_rr(rr) for rr in reply.answer] == answers
    assert [render_rr(rr) for rr in reply.authority] == authority
    assert reply.flags == AA
    assert reply.keep == 0  # the upstream's TTL is not ours to promise


def test_an_alias_into_another_zone_of_the_same_server_gets_its_mail_host_along() -> None:
    one = db(more="to CNAME mx.example.net.\n")
    two = db(more="\n@ MX 10 www.example.org.\n")
    plugins = served("file db1 example.org\nfile db2 example.net", one, two)
    assert ask(plugins, "to.example.org.", "MX")[1] == [
        "to.example.org. 300 IN CNAME mx.example.net.",
        "mx.example.net. 300 IN MX 10 www.example.net.",
    ]


def test_two_zones_that_point_at_each_other_end() -> None:
    one = db(more="a CNAME a.example.net.\n")
    two = db(more="a CNAME a.example.org.\n")
    plugins = served("file db1 example.org\nfile db2 example.net", one, two)
    rcode, answers = ask(plugins, "a.example.org.")
    assert rcode == "SERVFAIL"
    assert 1 < len(answers) <= MAX_DEPTH + 1


# --- files that change ---------------------------------------------------------------------


def test_a_new_serial_is_served_and_an_old_one_is_not(caplog: pytest.LogCaptureFixture) -> None:
    plugins = served("file db example.org", db(serial=1, last=1))
    watch = watch_of(plugins)
    assert watch.interval == 60
    assert not watch.load(db(serial=1, last=2), "")
    assert "its SOA serial is still 1" in caplog.text
    assert ask(plugins, "www.example.org.")[1] == ["www.example.org. 300 IN A 192.0.2.1"]
    assert watch.load(db(serial=2, last=3), "")
    assert ask(plugins, "www.example.org.")[1] == ["www.example.org. 300 IN A 192.0.2.3"]


def test_reload_by_mtime_does_not_ask_for_a_new_serial() -> None:
    plugins = served("file db example.org {\nreload 10s\nreload_by_mtime\n}", db(last=1))
    watch = watch_of(plugins)
    assert watch.interval == 10
    assert watch.load(db(last=2), "")
    assert ask(plugins, "www.example.org.")[1] == ["www.example.org. 300 IN A 192.0.2.2"]


@pytest.mark.parametrize("content", [None, b"", b"www A 1\n", db(serial=2) + b"x BANANA\n"])
def test_a_broken_or_missing_file_keeps_the_old_zone(
    content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    plugins = served("file db example.org", db())
    assert not watch_of(plugins).load(content, "" if content is not None else "db: No such file")
    assert any(r.levelno == logging.ERROR for r in caplog.records)
    assert ask(plugins, "www.example.org.")[1] == ["www.example.org. 300 IN A 192.0.2.1"]


def test_until_a_first_good_file_the_zone_is_servfail(caplog: pytest.LogCaptureFixture) -> None:
    plugins = build("file db example.org")
    watch = watch_of(plugins)
    assert not watch.load(None, "./db: No such file or directory")
    assert "./db: No such file or directory" in caplog.text
    assert ask(plugins, "www.example.org.") == ("SERVFAIL", [])
    assert not watch.load(db() + b"www MX ten mail\n", "")
    assert "./db:7: MX record: 'ten' is not a number from 0 to 65535 (preference)" in caplog.text
    assert ask(plugins, "www.example.org.") == ("SERVFAIL", [])
    assert watch.load(db(), "")
    assert ask(plugins, "www.example.org.")[0] == "NOERROR"


def test_files_on_disk_with_an_include(tmp_path: Path) -> None:
    (tmp_path / "db").write_bytes(db(more="$INCLUDE more\n"))
    (tmp_path / "more").write_text("inc A 192.0.2.8\n")
    cx = make_setup()
    cx.facts.root = str(tmp_path)
    cx.read = read_file
    plugins = build("file db example.org", cx)
    assert load(watch_of(plugins))
    assert ask(plugins, "inc.example.org.")[1] == ["inc.example.org. 300 IN A 192.0.2.8"]


# --- options -------------------------------------------------------------------------------

SAID = [
    ("file", "'file' needs an argument"),
    ("file db a..b", "zone is not a valid domain name"),
    ("file db {\nrelaod 5s\n}", "unknown property 'relaod', did you mean 'reload'?"),
    ("file db {\nreload soon\n}", "'soon' is not a duration"),
    ("file db {\nreload\n}", "'reload' needs an argument"),
    ("file db {\nreload_by_mtime yes\n}", "unexpected 'yes'"),
    ("file db {\nupstream\n}", "warning: 'upstream' does nothing: remove it"),
    ("file db {\ntransfer to *\n}", "warning: 'transfer' does nothing: write a directive"),
    ("file db {\nno_reload\n}", "warning: 'no_reload' does nothing: write `reload 0`"),
    ("file db1 a.test\nfile db2 a.test", "warning: zone a.test. is served from this file"),
    ("auto", "'directory DIR' is required"),
    ("auto {\nreload 1m\n}", "'directory DIR' is required"),
    ("auto {\ndirectory\n}", "'directory' needs an argument"),
    ("auto {\ndirectory d (.*)\n}", "a pattern needs a template"),
    ("auto {\ndirectory d .* {1}\n}", "the pattern needs a group"),
    ("auto {\ndirectory d (.*) {2}\n}", "'{2}': the pattern has no such group"),
    ("auto {\ndirectory d (.* {1}\n}", "not a regular expression"),
    ("auto {\ndirectory d (.*) {1} x\n}", "unexpected 'x'"),
    ("auto {\ndirectory d\nupstream 8.8.8.8\n}", "warning: 'upstream' does nothing"),
    ("auto {\ndirectory d\nfallthrough\n}", "unknown property 'fallthrough'"),
]


@pytest.mark.parametrize(("text", "said"), SAID)
def test_mistakes_are_said(text: str, said: str) -> None:
    assert any(said in line for line in errors_of(text)), errors_of(text)


def test_all_mistakes_are_said_at_once() -> None:
    found = errors_of("file db {\nreload soon\nbanana\n}\nauto {\nreload never\n}")
    assert [line.split(":")[1] for line in found] == ["2", "3", "6", "5"]


def test_reload_0_reads_once() -> None:
    assert watch_of(build("file db example.org {\nreload 0\n}")).interval == 0


# --- auto ----------------------------------------------------------------------------------


def folder(text: str, files: dict[str, bytes], cx: Setup | None = None) -> tuple[Auto, WatchFolder]:
    cx = cx or make_setup()
    plugins = build(text, cx)
    assert not cx.problems.errors, cx.problems.errors
    auto = plugins[0]
    assert isinstance(auto, Auto)
    watch = auto.work()[0]
    assert isinstance(watch, WatchFolder)
    watch.load(files, "")
    return auto, watch


def test_each_file_of_a_folder_is_a_zone() -> None:
    files = {"db.example.org": db(last=1), "db.example.net": db(last=2), "README": b"no zone"}
    auto, watch = folder("auto {\ndirectory zones\n}", files)
    assert (watch.path, watch.interval) == ("./zones", 60)
    assert ask([auto], "www.example.org.")[1] == ["www.example.org. 300 IN A 192.0.2.1"]
    assert ask([auto], "www.example.net.")[1] == ["www.example.net. 300 IN A 192.0.2.2"]
    assert ask([auto], "www.example.com.") == ("REFUSED", [])
    assert auto.on_query(question("www.example.org.")).served_by == "auto"  # type: ignore[union-attr]


def test_pattern_and_template_make_the_zone() -> None:
    text = r"auto {" + "\n" + r"directory zones ^(.*)-(.*)\.zone$ {2}.{1}.test" + "\nreload 5s\n}"
    auto, watch = folder(text, {"a-b.zone": db(), "a-b.zone.bak": db(), "c.zone": db()})
    assert watch.interval == 5
    assert list(auto.zones) == [parse_name("b.a.test.")]


def test_named_groups_in_a_template() -> None:
    auto, _ = folder(
        "auto {\ndirectory zones zone\\.(?P<name>.*) {name}\n}".replace("\\", "\\\\"),
        {"zone.Example.ORG": db()},
    )
    assert ask([auto], "www.example.org.")[0] == "NOERROR"


def test_only_the_zones_of_the_directive_are_answered_for() -> None:
    stub = Stub()
    files = {"db.example.org": db(), "db.example.net": db()}
    auto, _ = folder("auto example.org {\ndirectory zones\n}", files)
    assert ask([auto, stub], "www.example.org.")[0] == "NOERROR"
    assert not stub.asked
    ask([auto, stub], "www.example.net.")
    assert stub.asked


def test_zones_come_change_and_go_with_their_files() -> None:
    auto, watch = folder("auto {\ndirectory zones\n}", {"db.a.test": db(last=1)})
    assert not watch.load({"db.a.test": db(last=1)}, "")
    assert not watch.load({"db.a.test": db(last=2)}, "")  # same serial
    assert watch.load({"db.a.test": db(serial=2, last=2), "db.b.test": db(last=3)}, "")
    assert ask([auto], "www.a.test.")[1] == ["www.a.test. 300 IN A 192.0.2.2"]
    assert ask([auto], "www.b.test.")[1] == ["www.b.test. 300 IN A 192.0.2.3"]
    assert watch.load({"db.b.test": db(last=3)}, "")
    assert ask([auto], "www.a.test.") == ("REFUSED", [])
    assert watch.load({"db.a.test": db(last=5), "db.b.test": db(last=3)}, "")
    assert ask([auto], "www.a.test.")[1] == ["www.a.test. 300 IN A 192.0.2.5"]


def test_a_folder_that_cannot_be_read_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    auto, watch = folder("auto {\ndirectory zones\n}", {"db.a.test": db()})
    assert not watch.load({}, "./zones: Permission denied")
    assert "./zones: Permission denied" in caplog.text
    assert ask([auto], "www.a.test.")[0] == "NOERROR"


def test_a_broken_file_is_said_and_the_others_are_served(caplog: pytest.LogCaptureFixture) -> None:
    auto, watch = folder("auto {\ndirectory z\n}", {"db.a.test": b"x A 1\n", "db.b.test": db()})
    assert "./z/db.a.test:1:" in caplog.text
    assert ask([auto], "www.a.test.") == ("SERVFAIL", [])
    assert ask([auto], "www.b.test.")[0] == "NOERROR"
    assert watch.load({"db.a.test": db(), "db.b.test": db()}, "")
    assert ask([auto], "www.a.test.")[0] == "NOERROR"
    assert not watch.load({"db.a.test": b"x A 1\n", "db.b.test": db()}, "")
    assert ask([auto], "www.a.test.")[0] == "NOERROR"


def test_two_files_for_one_zone_and_a_name_that_is_no_zone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    files = {"a.db.a.test": db(last=1), "b.db.a.test": db(last=2), "db.a..b": db()}
    auto, _ = folder("auto {\ndirectory z\n}", files)
    assert ask([auto], "www.a.test.")[1] == ["www.a.test. 300 IN A 192.0.2.1"]
    assert "a.db.a.test is used, b.db.a.test is not" in caplog.text
    assert "db.a..b: its name makes no zone" in caplog.text


def test_what_can_be_transferred() -> None:
    plugins = served("file db example.org", db(serial=9))
    file = plugins[0]
    assert isinstance(file, File)
    found = file.transfer_records(parse_name("example.org."))
    assert found is not None
    assert found[0] == 9
    assert [rr.type for rr in found[1]][-1] == t.SOA
    assert file.transfer_records(parse_name("www.example.org.")) is None
