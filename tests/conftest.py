"""What holds for all tests."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# CI tries the same examples each time, so that it fails for a change and not for its luck;
# everywhere else new ones are tried. How long an example takes is no test: machines are busy.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("here", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "here")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what needs root."""
    if os.geteuid() == 0:
        return
    for item in items:
        if item.get_closest_marker("root") is not None:
            item.add_marker(pytest.mark.skip(reason="needs root"))


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a developer's own KDNS_* variables out of the tests."""
    for name in [name for name in os.environ if name.startswith("KDNS_")]:
        monkeypatch.delenv(name)
