"""Where a store keeps what it was given: in the log first, in its place when it is quiet."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from kdns.api import store as stores
from kdns.api.store import ObjectStore, Put

SERVICES = "services"
WRITES = 150


def put(name: str) -> Put:
    obj = {"metadata": {"namespace": "default", "name": name, "uid": name}, "spec": {"a": "b" * 99}}
    return Put((SERVICES, "default", name), obj)


async def names_in(path: Path) -> list[str]:
    store = ObjectStore(str(path))
    await store.open()
    try:
        return [one.key[2] for one in store.items(SERVICES)]
    finally:
        await store.close()


async def names_without_log(path: Path, folder: Path) -> list[str]:
    """Return what the file itself holds: a copy of it that has no log."""
    folder.mkdir(exist_ok=True)
    return await names_in(Path(shutil.copy(path, folder)))


def test_the_log_is_emptied_when_nobody_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "QUIET", 0.01)
    path = tmp_path / "store.db"

    async def run() -> None:
        store = ObjectStore(str(path))
        await store.open()
        wanted = [f"{n:03}" for n in range(WRITES)]
        for name in wanted:
            await store.write(put(name))
        async with asyncio.timeout(30):
            while await names_without_log(path, tmp_path / "copy") != wanted:
                shutil.rmtree(tmp_path / "copy")
                await asyncio.sleep(0)
        await store.write(put("zzz"))  # and then it goes on
        await store.close()
        assert await names_in(path) == [*wanted, "zzz"]

    asyncio.run(run())


def test_a_store_can_be_closed_before_it_is_quiet(tmp_path: Path) -> None:
    path = tmp_path / "store.db"

    async def run() -> None:
        store = ObjectStore(str(path))
        await store.open()
        for number in range(WRITES):
            await store.write(put(f"{number:03}"))
        await store.close()
        assert len(await names_in(path)) == WRITES

    asyncio.run(run())
