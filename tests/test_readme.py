"""What README.md and docs/ show is true: Corefiles, commands, output, lists of plugins."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from kdns import cli
from kdns.app import check_corefile
from kdns.plugins import NOT_HERE, ORDER

PROJECT = Path(__file__).resolve().parent.parent
README = (PROJECT / "README.md").read_text(encoding="utf-8")
PLUGINS = (PROJECT / "docs/PLUGINS.md").read_text(encoding="utf-8")
COREDNS = (PROJECT / "docs/COREDNS.md").read_text(encoding="utf-8")
DOCUMENTS = ("README.md", "CHANGELOG.md", "docs/COREDNS.md", "docs/DESIGN.md", "docs/PLUGINS.md")

# Commands that README says are planned; the others it shows are there.
PLANNED = ("proxy", "up", "rules", "trace", "check")
# Words of NOT_HERE that are no plugins of CoreDNS's own repository, or keys' schemes.
UNLISTED = frozenset(("grpc_server", "https", "https3", "autocert", "alternate", "fanout"))


@dataclass(frozen=True)
class Fence:
    """A fenced block of Markdown."""

    language: str
    line: int
    text: str


def fences(text: str) -> Iterator[Fence]:
    language: str | None = None
    start, lines = 0, list[str]()
    for number, line in enumerate(text.splitlines(), 1):
        if not line.startswith("```"):
            lines.append(line)
        elif language is None:
            language, start, lines = line[3:], number + 1, []
        else:
            yield Fence(language, start, "\n".join(lines) + "\n")
            language = None


FENCES = list(fences(README))
COREFILES = [f for f in FENCES if f.language == "corefile"]
CONSOLES = [f for f in FENCES if f.language == "console"]


def typed(word: str) -> list[str]:
    """Return every command line that starts with `word`: in consoles, also behind a pipe, and
    in running text and tables."""
    found = []
    for fence in CONSOLES:
        for line in fence.text.splitlines():
            if line.startswith("$ "):
                found += [part.strip() for part in line[2:].split(" | ")]
    outside = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)
    found += re.findall(r"`([^`\n]+)`", outside)
    return [line for line in found if re.match(rf"(\w+=\S+ )*{word} ", line)]


# --- Corefiles ------------------------------------------------------------------------------


@pytest.mark.parametrize("fence", COREFILES, ids=lambda f: f"README.md:{f.line}")
def test_each_corefile_is_right(
    fence: Fence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "Corefile"
    path.write_text(fence.text)
    assert [str(p) for p in check_corefile(str(path))] == []


def test_the_corefile_of_deploy_is_shown_word_for_word() -> None:
    import yaml

    config = yaml.safe_load((PROJECT / "deploy/configmap.yaml").read_text())
    assert config["data"]["Corefile"] in [f.text for f in COREFILES]


def test_the_wrong_corefile_gets_the_messages_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = next(f.text for f in CONSOLES if f.text.startswith("$ cat -n Corefile\n"))
    listing, said = shown.split("$ kdns corefile check Corefile\n")
    lines = [line.split("\t", 1)[1] for line in listing.splitlines()[1:]]
    monkeypatch.chdir(tmp_path)
    Path("Corefile").write_text("\n".join(lines) + "\n")
    assert cli.run(["corefile", "check", "Corefile"]) == 2
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(said.splitlines())


# --- commands -------------------------------------------------------------------------------


def is_planned(words: list[str]) -> bool:
    return len(words) == 1 and words[0] in PLANNED


COMMANDS = [shlex.split(line, comments=True) for line in typed("kdns")]
COMMANDS = [words[words.index("kdns") + 1 :] for words in COMMANDS]


@pytest.mark.parametrize("words", [w for w in COMMANDS if not is_planned(w)], ids=" ".join)
def test_each_command_shown_is_there(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """--help keeps it from running; unknown commands and options are refused before."""
    assert cli.run([*words, "--help"]) == 0
    command = "serve" if words[0].startswith("-") else words[0]
    assert capsys.readouterr().out.startswith(f"Usage: kdns {command}")


def test_what_is_planned_is_not_there_yet() -> None:
    shown = {words[0] for words in COMMANDS if is_planned(words)}
    assert shown == set(PLANNED)
    assert not shown & set(cli.cli.commands)


def test_each_command_there_is_shown() -> None:
    for name, command in cli.cli.commands.items():
        inner = list(command.commands) if isinstance(command, click.Group) else [""]
        for word in inner:
            assert any(w[:2] == [name, word] or (w[0] == name and not word) for w in COMMANDS)


def test_each_make_target_shown_is_there() -> None:
    makefile = (PROJECT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    shown = {line.split()[1] for line in typed("make")}
    assert {"demo", "test"} <= shown <= targets


def test_the_demo_shown_is_the_demo() -> None:
    walkthrough = (PROJECT / "examples/walkthrough.py").read_text()
    demo = next(f.text for f in CONSOLES if "expected ones" in f.text)
    for why, command in re.findall(r"^# \d+\. (.*)\n(?:#.*\n)*\$ (.*)$", demo, re.MULTILINE):
        assert f'"{why}"' in walkthrough
        assert f'"{command}"' in walkthrough
    steps = len(re.findall(r"^    Step\($", walkthrough, re.MULTILINE))
    assert f"All {steps} answers are the expected ones." in demo


# --- lists ----------------------------------------------------------------------------------


def section(text: str, heading: str) -> str:
    """Return what stands between a heading and the next one of its level."""
    level = heading.split(" ", maxsplit=1)[0]
    return text.split(f"\n{heading}\n", 1)[1].split(f"\n{level} ", 1)[0]


def test_readme_lists_the_plugins_there_are() -> None:
    rows = re.findall(r"^\| (\w+) \| [^|\s]", section(README, "## The Corefile"), re.MULTILINE)
    assert rows == sorted(ORDER)


def test_the_reference_has_the_order_of_execution() -> None:
    text = PLUGINS.split("Plugins run in this order")[1].split(":", 1)[1].split(".\n", 1)[0]
    assert text.split() == list(ORDER)


def test_the_reference_has_a_section_for_each_plugin() -> None:
    assert re.findall(r"^## (\w+)$", PLUGINS, re.MULTILINE) == sorted(ORDER)


# The least that each plugin needs on its line, so that its options are looked at.
LEAST = {
    "autopath": "autopath @kubernetes",
    "bind": "bind 127.0.0.1",
    "file": "file db.example.org",
    "forward": "forward . 127.0.0.1",
    "template": "template IN A",
    "tls": "tls cert key",
}


@pytest.mark.parametrize("word", sorted(ORDER))
def test_the_reference_names_each_option(word: str, tmp_path: Path) -> None:
    """An option that cannot be meant makes the plugin say which it has."""
    path = tmp_path / "Corefile"
    path.write_text(f".:1053 {{\n {LEAST.get(word, word)} {{\n  0q0q0q0 x\n }}\n}}\n")
    said = "\n".join(str(p) for p in check_corefile(str(path)))
    known = re.search(r"\(known: ([^)]*)\)", said)
    text = section(PLUGINS, f"## {word}")
    for option in known[1].split(", ") if known else ():
        assert re.search(rf"(?<!\w){option}(?!\w)", text), option


def test_the_list_of_what_is_missing_is_whole() -> None:
    text = section(COREDNS, "### Not in kdns").split("- Plugins: ")[1].split(".\n", 1)[0]
    assert sorted(text.replace(",", "").split()) == sorted(NOT_HERE - UNLISTED)


# --- links ----------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """Return the anchors GitHub makes of a document's headings."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        found.add(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-"))
    return found


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    path = PROJECT / name
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_changelog_knows_this_version() -> None:
    from kdns import __version__

    assert f"## [{__version__}]" in (PROJECT / "CHANGELOG.md").read_text()
