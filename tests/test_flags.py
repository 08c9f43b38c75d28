"""Flags that several commands share: a duration is read alike by each, and told alike when it is
wrong; where to look is said alike."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest

from kdns import cli, flags
from kdns.flags import Duration
from kdns.proxy import config

NOT_ONE = "is not a duration; write it as 500ms, 30s or 1m30s, or as a number of seconds"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0.0), ("2", 2.0), ("0.25", 0.25), ("5.", 5.0), ("250ms", 0.25), ("1m30s", 90.0),
     ("1.5h", 5400.0), ("0s", 0.0)],
)  # fmt: skip
def test_durations_are_gos_or_seconds(text: str, seconds: float) -> None:
    assert Duration().convert(text, None, None) == seconds


@pytest.mark.parametrize("text", ["", ".", "soon", "1d", "1m30", "1.2.3", "-1", "inf", "nan", "²"])
def test_what_is_no_duration_is_told_with_what_would_be_one(text: str) -> None:
    with pytest.raises(click.BadParameter) as refused:
        Duration().convert(text, None, None)
    assert refused.value.message == f"'{text}' {NOT_ONE}"


@pytest.mark.parametrize(
    ("kind", "text", "range_"),
    [
        (Duration(), "-1s", "0s or more"),
        (Duration(0.1, 60), "99ms", "100ms to 60s"),
        (Duration(0.1, 60), "61", "100ms to 60s"),
    ],
)
def test_a_duration_out_of_range_is_told_with_the_range(
    kind: Duration, text: str, range_: str
) -> None:
    with pytest.raises(click.BadParameter) as refused:
        kind.convert(text, None, None)
    assert refused.value.message == f"'{text}' is out of range; it must be {range_}"


def commands() -> Iterator[tuple[str, click.Command]]:
    context = click.Context(cli.cli)
    for word in cli.cli.list_commands(context):
        command = cli.cli.get_command(context, word)
        assert command is not None
        yield word, command


DURATIONS = [
    (word, option.opts[-1])
    for word, command in commands()
    for option in command.params
    if isinstance(option.type, Duration) and option.opts
]


@pytest.mark.parametrize(("word", "flag"), DURATIONS)
def test_each_command_says_the_same_of_a_wrong_duration(
    word: str, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run([word, f"{flag}=soon"]) == cli.USAGE_ERROR
    said = capsys.readouterr().err
    assert f"'soon' {NOT_ONE}" in said and "Traceback" not in said


def test_no_command_reads_seconds_in_a_way_of_its_own() -> None:
    kinds = {type(one.type) for _, command in commands() for one in command.params}
    assert not {click.types.FloatRange, click.types.FloatParamType} & kinds
    assert {word for word, _ in DURATIONS} >= {"up", "node", "wait", "check", "top", "query"}


def test_where_to_look_is_said_alike() -> None:
    found: dict[str, dict[str, list[str]]] = {"manifests": {}, "control": {}}
    for word, command in commands():
        for one in command.params:
            if one.name in found and isinstance(one, click.Option) and word != "up":
                found[one.name].setdefault(str(one.help), []).append(word)
    assert [*found["manifests"].values()] == [["check", "dump", "rules", "trace"]]
    assert ["check", "top", "trace", "wait"] in found["control"].values()


def test_the_modes_are_those_there_are() -> None:
    assert flags.MODES == config.MODES
