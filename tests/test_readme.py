"""What README.md and docs/ show is true: Corefiles, commands, output, lists of plugins, flags
and metrics."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
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
PROXY = (PROJECT / "docs/PROXY.md").read_text(encoding="utf-8")
MODES = (PROJECT / "docs/MODES.md").read_text(encoding="utf-8")
DOCUMENTS = ("README.md", "CHANGELOG.md", "docs/API.md", "docs/COREDNS.md", "docs/DESIGN.md",
             "docs/MODES.md", "docs/PLUGINS.md", "docs/PROXY.md", "docs/CHECK.md", "docs/EDE.md",
             "docs/GATE.md", "docs/LOG.md", "docs/NODE.md", "docs/TRACE.md",
             "docs/WORKERS.md")  # fmt: skip

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


def typed(word: str, document: str = README) -> list[str]:
    """Return every command line that starts with `word`: in consoles, also behind a pipe, and
    in running text and tables."""
    found = []
    for fence in fences(document):
        for line in fence.text.splitlines() if fence.language == "console" else ():
            if line.startswith("$ "):
                found += [part.strip() for part in line[2:].split(" | ")]
    outside = re.sub(r"^```.*?^```$", "", document, flags=re.DOTALL | re.MULTILINE)
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


COMMANDS = [
    shlex.split(line, comments=True)
    for line in [*typed("kdns"), *typed("kdns", PROXY), *typed("kdns", MODES)]
]
COMMANDS = [words[words.index("kdns") + 1 :] for words in COMMANDS]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_each_command_shown_is_there(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """--help keeps it from running; unknown commands and options are refused before."""
    assert cli.run([*words, "--help"]) == 0
    command = "serve" if words[0].startswith("-") else words[0]
    assert capsys.readouterr().out.startswith(f"Usage: kdns {command}")


def test_each_command_there_is_shown() -> None:
    for name in cli.cli.list_commands(click.Context(cli.cli)):
        command = cli.cli.get_command(click.Context(cli.cli), name)
        inner = list(command.commands) if isinstance(command, click.Group) else [""]
        for word in inner:
            assert any(w[:2] == [name, word] or (w[0] == name and not word) for w in COMMANDS)


def test_each_make_target_shown_is_there() -> None:
    makefile = (PROJECT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    shown = {line.split()[1] for line in typed("make")}
    assert {"demo", "test"} <= shown <= targets


def masked(text: str) -> list[str]:
    """Return the lines of a run without what differs from run to run."""
    text = re.sub(r"/tmp/\S+", "/tmp/#", text)
    text = re.sub(r"KUBE-SEP-\w+", "KUBE-SEP-#", text)
    return [" ".join(re.sub(r"\d+", "#", line).split()) for line in text.splitlines()]


def test_the_demo_gets_every_answer_it_expects_and_is_the_one_shown() -> None:
    done = subprocess.run(
        [sys.executable, "examples/walkthrough.py"], cwd=PROJECT, capture_output=True, text=True,
        timeout=50, check=False, env=os.environ | {"PYTHONPATH": str(PROJECT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("answers are the expected ones.\n")
    assert "Traceback" not in done.stdout + done.stderr
    shown = masked(next(f.text for f in CONSOLES if "expected ones" in f.text))
    real = {"$ make demo", "...", *masked(done.stdout)}
    if "no real packets" in done.stdout or "were left out" in done.stdout:
        pytest.skip("every answer was the expected one, but not every step can be run here")
    # Which came before which is shown, too.
    assert [line for line in shown if line not in real] == []
    heads = [line for line in shown if line.startswith("# #. ")]
    assert heads == [line for line in masked(done.stdout) if line in heads]


PYTHONS = [f for f in FENCES if f.language == "python"]


def test_the_program_shown_prints_what_it_says() -> None:
    program = next(f.text for f in PYTHONS if "asyncio.run" in f.text)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, timeout=50,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+ \S+\n\['10\.\d+\.\d+\.\d+'\]\n", done.stdout)


def test_the_tests_shown_pass(tmp_path: Path) -> None:
    path = tmp_path / "test_shown.py"
    path.write_text(next(f.text for f in PYTHONS if "kdns_cluster" in f.text))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull,
         "--rootdir", str(tmp_path), str(path)],
        cwd=PROJECT, capture_output=True, text=True, timeout=50, check=False,
    )  # fmt: skip
    assert "2 passed" in done.stdout, done.stdout + done.stderr


def printed(command: str) -> str:
    """Return what programs with pipes between them print, run in the project's folder."""
    output = ""
    for part in command.split(" | "):
        name, *words = shlex.split(part)
        program = {"kdns": [sys.executable, "-m", "kdns"], "python": [sys.executable]}
        done = subprocess.run([*program.get(name, [name]), *words], cwd=PROJECT, input=output,
                              capture_output=True, text=True, timeout=50, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr
        output = done.stdout
    return output


RULES = "kdns rules -f examples | "


def test_the_rules_and_the_packet_shown_are_real() -> None:
    shown = [f.text.removeprefix("$ ") for f in CONSOLES if f.text.startswith(f"$ {RULES}")]
    commands = [text.split("\n", 1) for text in shown if text.count("\n") > 1]
    said = [(command, output) for command, output in commands if output[:1] != "$"]
    assert [command.split()[5] for command, _ in said] == ["grep", "python"]
    for command, output in said:
        assert printed(command) == output


def test_one_service_in_each_mode_is_real() -> None:
    shown = [f.text.removeprefix("$ ").split("\n", 1) for f in fences(MODES)
             if f.text.startswith("$ kdns rules")]  # fmt: skip
    assert [re.findall(r"--mode (\w+)", command) for command, _ in shown] == [
        [], ["nftables"], ["ipvs"], ["userspace"],
    ]  # fmt: skip
    for command, output in shown:
        assert printed(command) == output


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


# --- the proxy's page -----------------------------------------------------------------------


def test_proxy_page_names_each_flag_once() -> None:
    from kdns.proxy.flags import FLAGS, NO_EFFECT

    tables = section(PROXY, "## Flags and fields")
    found = re.findall(r"`-{1,2}([a-z][a-z0-9-]*)`", tables)
    shorts = {"f"}  # of --manifests
    assert sorted(set(found) - shorts - {"config"}) == sorted(
        ({one.name for one in FLAGS} | set(NO_EFFECT)) - {"config"}
    )
    named = [name for name in found if name not in ("config", "f")]
    assert sorted(named) == sorted(set(named))


def test_proxy_page_puts_flags_without_effect_where_they_belong() -> None:
    from kdns.proxy.flags import FLAGS, NO_EFFECT

    without = section(PROXY, "## Flags and fields").split("| accepted without effect |")[1]
    names = set(re.findall(r"`-{1,2}([a-z][a-z0-9-]*)`", without))
    silent = {one.name for one in FLAGS if "has no effect" in one.help}
    assert silent | set(NO_EFFECT) <= names


def test_proxy_page_names_each_metric() -> None:
    """Every one that an agent registers, and no other."""
    from kdns.agent import Agent
    from kdns.kernel.conntrack import FlowCleaner
    from kdns.kernel.healthcheck import NodeHttp
    from kdns.kernel.iptables import IptablesDataplane
    from kdns.kernel.ipvs import IpvsDataplane
    from kdns.kernel.nftables import Nft, NftablesDataplane
    from kdns.kernel.programs import Programs
    from kdns.kernel.sync import SyncLoop
    from kdns.kernel.userspace_relay import RelayCounts
    from kdns.kernel.userspace_udp import UdpCounts
    from kdns.proxy.config import ProxyConfig
    from kdns.proxy.options import Options
    from kdns.registry.spec import ManifestSpec
    from kdns.source.sink import Tally

    agent = Agent(ProxyConfig(), ManifestSpec(("examples",)), "node1")
    programs = Programs(4, "nft", (1, 8, 9), "iptables")
    dataplane = IptablesDataplane(programs, Options(), agent.metrics)
    NftablesDataplane(Nft((1, 0, 6), (6, 1)), Options(), agent.metrics)
    IpvsDataplane(programs, Options(), metrics=agent.metrics)
    RelayCounts(agent.metrics, "IPv4", "tcp")
    UdpCounts(agent.metrics, "IPv4")
    SyncLoop(dataplane, 4, agent.metrics)
    FlowCleaner(Options(), agent.metrics)
    NodeHttp(ProxyConfig(), agent.metrics, agent.health)
    Tally(agent.metrics)
    named = re.findall(r"`((?:kubeproxy|kdns)_\w+)`", section(PROXY, "## Metrics"))
    # Registered only when it runs.
    late = {
        "kdns_source_last_event_age_seconds",
        "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
    }
    assert sorted(named) == sorted(set(agent.metrics.families) | late)


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
