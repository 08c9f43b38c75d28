"""What the embedded API acknowledged is there after kill -9 (kdns/api/store.py)."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdns.api.store import Conflicted, Delete, ObjectStore, Put

OBJECTS = 1000


async def write_for_ever(path: str, writers: int) -> None:
    """In the child: say each revision as soon as it is acknowledged, and of what."""
    store = ObjectStore(path)
    await store.open()
    numbers: Iterator[int] = iter(range(OBJECTS))

    async def one_after_the_other() -> None:
        for number in numbers:
            key = ("services", "default", f"svc-{number:04}")
            obj = {"metadata": {"name": key[2]}, "text": "x" * 1000}
            (made,) = await store.write(Put(key, obj, 0))
            say(f"put {key[2]} {made.revision}")
            if number % 5 == 0:
                (gone,) = await store.write(Delete(key, made.revision))
                say(f"delete {key[2]} {gone.revision}")

    await asyncio.gather(*(one_after_the_other() for _ in range(writers)))
    say("end")
    await asyncio.Event().wait()


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def acknowledged_until_killed(path: str, writers: int, after: int) -> list[str]:
    """Return all that the child could say before it was killed; that happens once it has said
    `after` lines, so in the middle of some write."""
    command = [sys.executable, __file__, path, str(writers)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        try:
            said = list(itertools.islice(child.stdout, after))
        finally:
            child.send_signal(signal.SIGKILL)
        said += child.stdout.readlines()
    assert child.returncode == -signal.SIGKILL
    # The last line may be cut.
    return [line.rstrip("\n") for line in said if line.endswith("\n")]


@pytest.mark.parametrize("writers", [1, 100])
@pytest.mark.parametrize("after", [1, 150, 600])
def test_every_acknowledged_write_survives_kill_9(tmp_path: Path, writers: int, after: int) -> None:
    path = str(tmp_path / "store.db")
    said = acknowledged_until_killed(path, writers, after)
    assert len(said) >= after and "end" not in said, "killed in the middle"

    last: dict[str, tuple[str, int]] = {}
    for line in said:
        what, name, revision = line.split()
        last[name] = (what, int(revision))

    async def check() -> None:
        store = ObjectStore(path)
        await store.open()
        assert store.revision >= max(revision for _, revision in last.values())
        there = {one.key[2]: one.revision for one in store.items("services")}
        for name, (what, revision) in last.items():
            if what == "delete":
                assert name not in there
            elif name in there:
                assert there[name] == revision
            else:  # the deletion that was on its way came through, unacknowledged
                assert int(name.removeprefix("svc-")) % 5 == 0
        # Beyond that only what was on its way: at most one write of each writer.
        assert len(set(there) - set(last)) <= writers
        assert all(one.obj["text"] == "x" * 1000 for one in store.items("services"))
        await goes_on(store)
        await store.close()

    asyncio.run(check())


async def goes_on(store: ObjectStore) -> None:
    revision = store.revision
    for one in store.items("services")[:1]:
        with pytest.raises(Conflicted):
            await store.write(Put(one.key, {"metadata": {}}, 0))
    (made,) = await store.write(Put(("services", "default", "new"), {"metadata": {}}, 0))
    assert made.revision > revision


async def empty(path: str) -> int:
    """Delete everything; return the revision of that."""
    store = ObjectStore(path)
    await store.open()
    for one in store.items("services"):
        await store.write(Delete(one.key))
    await store.close()
    return store.revision


def test_a_store_killed_again_and_again_never_gives_a_revision_twice(tmp_path: Path) -> None:
    path = str(tmp_path / "store.db")
    newest = 0
    for _ in range(3):
        said = acknowledged_until_killed(path, 20, 100)
        revisions = [int(line.split()[2]) for line in said]
        assert min(revisions) > newest
        assert len(revisions) == len(set(revisions))
        newest = asyncio.run(empty(path))
        assert newest >= max(revisions)


if __name__ == "__main__":
    asyncio.run(write_for_ever(sys.argv[1], int(sys.argv[2])))
