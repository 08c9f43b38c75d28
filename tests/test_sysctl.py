"""The kernel's settings: which values, which are left alone, and what is said of those that
may not be written (reference 1.9, 3.3)."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from kdns.kernel.sysctl import (
    BUCKETS,
    CONNTRACK,
    FLOWS,
    ROUTE_LOCALNET,
    TCP_BE_LIBERAL,
    TW_REUSE,
    ConntrackSettings,
    apply_conntrack,
    apply_route_localnet,
    apply_tw_reuse,
    flows_wanted,
    is_tcp_liberal,
)

ESTABLISHED = f"{CONNTRACK}/nf_conntrack_tcp_timeout_established"
CLOSE_WAIT = f"{CONNTRACK}/nf_conntrack_tcp_timeout_close_wait"
UDP = f"{CONNTRACK}/nf_conntrack_udp_timeout"
UDP_STREAM = f"{CONNTRACK}/nf_conntrack_udp_timeout_stream"
# As a node comes up.
NODE = {
    FLOWS: 65536,
    BUCKETS: 65536,
    ESTABLISHED: 432000,
    CLOSE_WAIT: 60,
    TCP_BE_LIBERAL: 0,
    UDP: 30,
    UDP_STREAM: 120,
    ROUTE_LOCALNET: 0,
}
NONE = ConntrackSettings(0, 0, 0, 0, False, 0, 0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A node's /proc/sys and /sys, in a folder."""
    for name, value in NODE.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n", encoding="ascii")
    return tmp_path


def held(root: Path) -> dict[str, int]:
    return {name: int((root / name).read_text(encoding="ascii")) for name in NODE}


@pytest.mark.parametrize(
    ("settings", "cores", "expected"),
    [
        (ConntrackSettings(), 2, 131072),
        (ConntrackSettings(), 8, 262144),
        (ConntrackSettings(), 32, 1048576),
        (ConntrackSettings(), 256, 1048576),
        (ConntrackSettings(min=2000000), 256, 2000000),
        (ConntrackSettings(max_per_core=1, min=0), 3, 3),
        (ConntrackSettings(max_per_core=0), 64, 0),
    ],
)
def test_so_many_flows_are_tracked(settings: ConntrackSettings, cores: int, expected: int) -> None:
    assert flows_wanted(settings, cores) == expected


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        (NONE, {}),
        (
            ConntrackSettings(),
            {FLOWS: 262144, ESTABLISHED: 86400, CLOSE_WAIT: 3600},
        ),
        (
            ConntrackSettings(max_per_core=65536, tcp_established=0, tcp_close_wait=0),
            {FLOWS: 524288, BUCKETS: 131072},
        ),
        (ConntrackSettings(0, 131072, 0, 0, True, 0, 0), {TCP_BE_LIBERAL: 1}),
        (ConntrackSettings(0, 0, 0, 0, False, 60, 180), {UDP: 60, UDP_STREAM: 180}),
        # Fewer than the node came up with: what is asked for counts.
        (ConntrackSettings(1, 1000, 0, 0), {FLOWS: 1000}),
    ],
)
def test_only_what_is_asked_for_and_differs_is_written(
    root: Path, settings: ConntrackSettings, changed: dict[str, int]
) -> None:
    outcomes = apply_conntrack(settings, 8, root)
    assert held(root) == {**NODE, **changed}
    written = {o.path: (o.found, o.wanted) for o in outcomes if o.state == "written"}
    assert written == {str(root / n): (NODE[n], value) for n, value in changed.items()}
    again = apply_conntrack(settings, 8, root)
    assert [o.path for o in again] == [o.path for o in outcomes]
    assert {o.state for o in again} <= {"kept"}


def test_the_operators_looser_setting_is_left(root: Path) -> None:
    (root / TCP_BE_LIBERAL).write_text("1\n", encoding="ascii")
    assert apply_conntrack(NONE, 8, root) == []
    assert is_tcp_liberal(root)


def test_route_localnet(root: Path) -> None:
    outcome = apply_route_localnet(root)
    assert (outcome.state, held(root)[ROUTE_LOCALNET]) == ("written", 1)
    assert str(outcome) == f"{root / ROUTE_LOCALNET} set to 1, was 0"
    assert apply_route_localnet(root).state == "kept"


def test_ports_of_ended_connections_are_taken_again(root: Path) -> None:
    (root / TW_REUSE).parent.mkdir(parents=True, exist_ok=True)
    (root / TW_REUSE).write_text("2\n", encoding="ascii")
    assert apply_tw_reuse(root).state == "written"
    assert (root / TW_REUSE).read_text() == "1\n"
    assert apply_tw_reuse(root).state == "kept"


def test_a_node_without_conntrack_is_told_which_module_to_load(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outcomes = apply_conntrack(ConntrackSettings(), 2, tmp_path)
    assert [(o.state, o.found) for o in outcomes] == [("refused", None)] * 4
    assert [r.getMessage() for r in caplog.records] == [str(o) for o in outcomes]
    assert str(outcomes[0]) == (
        f"{tmp_path / FLOWS} is not set to 131072:"
        " there is no such file: is the kernel module nf_conntrack loaded?"
    )
    assert not is_tcp_liberal(tmp_path)


def test_one_setting_that_cannot_be_read_does_not_keep_the_others_from_being_set(
    root: Path,
) -> None:
    (root / FLOWS).write_text("many\n", encoding="ascii")
    (root / ESTABLISHED).unlink()
    outcomes = apply_conntrack(ConntrackSettings(), 8, root)
    assert [(o.state, o.reason[:24]) for o in outcomes] == [
        ("refused", "it holds no number"),
        ("kept", ""),
        ("refused", "there is no such file: i"),
        ("written", ""),
    ]


def test_a_setting_that_may_not_be_written_is_skipped(root: Path) -> None:
    (root / ROUTE_LOCALNET).unlink()
    # A setting that nobody may write, not even root.
    (root / ROUTE_LOCALNET).symlink_to("/proc/sys/kernel/ngroups_max")
    outcome = apply_route_localnet(root)
    assert (outcome.state, outcome.found) == ("refused", 65536)
    assert outcome.reason.startswith("Permission denied: it takes root")


def test_what_is_written_is_logged_and_what_is_right_is_not(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "kdns.sysctl"):
        apply_conntrack(ConntrackSettings(), 8, root)
        apply_conntrack(ConntrackSettings(), 8, root)
    assert [r.getMessage() for r in caplog.records] == [
        f"{root / FLOWS} set to 262144, was 65536",
        f"{root / ESTABLISHED} set to 86400, was 432000",
        f"{root / CLOSE_WAIT} set to 3600, was 60",
    ]
