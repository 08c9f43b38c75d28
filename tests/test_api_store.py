"""The embedded API's store: versions, order, restarts, refusals, watches (kdns/api/store.py)."""

from __future__ import annotations

import asyncio
import gc
import os
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdns.api.store import (
    Conflicted,
    Delete,
    Event,
    Key,
    ObjectStore,
    Put,
    Stored,
    Synchronous,
)
from kdns.errors import ApiError, ConfigError

T = TypeVar("T")
SERVICES, PODS = "services", "pods"


def key(name: str, resource: str = SERVICES) -> Key:
    """ "a", or with a namespace "ns/a"."""
    namespace, _, short = name.rpartition("/")
    return resource, namespace or "default", short


def made(name: str, *, resource: str = SERVICES, **spec: object) -> dict[str, Any]:
    _, namespace, short = key(name, resource)
    metadata = {"name": short, "namespace": namespace, "uid": f"uid-{short}"}
    return {"kind": "Service", "metadata": metadata, "spec": spec}


def put(name: str, expected: int | None = None, *, resource: str = SERVICES, **spec: object) -> Put:
    return Put(key(name, resource), made(name, resource=resource, **spec), expected)


def delete(name: str, expected: int | None = None) -> Delete:
    return Delete(key(name), expected)


def run_on(
    path: str,
    body: Callable[[ObjectStore], Awaitable[T]],
    *,
    history: int = 10_000,
    synchronous: Synchronous = "NORMAL",
) -> T:
    """Open a store, run `body` on it, close it."""

    async def run() -> T:
        store = ObjectStore(path, history=history, synchronous=synchronous)
        await store.open()
        try:
            return await body(store)
        finally:
            await store.close()

    return asyncio.run(run())


def names(found: Sequence[Stored]) -> list[str]:
    return [f"{one.key[1]}/{one.key[2]}" for one in found]


def told(events: Sequence[Event]) -> list[str]:
    return [f"{one.type} {one.stored.key[2]} {one.stored.revision}" for one in events]


@pytest.fixture(params=["memory", "file", "file FULL"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Synchronous]:
    """Where a store keeps its objects: every behaviour is the same in all places."""
    path = "" if request.param == "memory" else str(tmp_path / "store.db")
    return path, "FULL" if request.param == "file FULL" else "NORMAL"


# Versions and expectations


def test_a_created_object_has_the_revision_it_got(place: tuple[str, Synchronous]) -> None:
    async def body(store: ObjectStore) -> None:
        obj = made("a", port=80)
        obj["metadata"]["labels"] = {"app": "web"}
        (one,) = await store.write(Put(key("a"), obj, 0))
        assert (one.revision, one.uid, one.labels) == (1, "uid-a", {"app": "web"})
        assert one.obj["metadata"]["resourceVersion"] == "1"
        assert one.obj["spec"] == {"port": 80}
        assert "resourceVersion" not in obj["metadata"], "the caller's object stays as it was"
        assert store.get(key("a")) is one
        assert store.revision == 1
        one.obj["spec"]["port"] = 81
        assert one.obj["spec"] == {"port": 80}, "each reader has its own copy"

    run_on(place[0], body, synchronous=place[1])


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (put("a", 0), 1),  # create what is there
        (put("a", 7), 1),  # replace another version
        (put("b", 7), None),  # replace what is not there
        (delete("a", 7), 1),
        (delete("b"), None),
        (delete("b", 7), None),
    ],
)
def test_a_write_is_refused_whose_expectation_does_not_hold(
    place: tuple[str, Synchronous], change: Put | Delete, found: int | None
) -> None:
    async def body(store: ObjectStore) -> None:
        await store.write(put("a", 0))
        with pytest.raises(Conflicted) as refusal:
            await store.write(put("c"), change)
        met = refusal.value.found
        assert (met.revision if met is not None else None) == found
        assert names(store.items(SERVICES)) == ["default/a"], "all or none"
        assert store.revision == 1

    run_on(place[0], body, synchronous=place[1])


@pytest.mark.parametrize(
    "change", [put("a", 1), put("a"), put("b"), put("b", 0), delete("a"), delete("a", 1)]
)
def test_a_write_is_made_whose_expectation_holds(
    place: tuple[str, Synchronous], change: Put | Delete
) -> None:
    async def body(store: ObjectStore) -> None:
        await store.write(put("a", 0))
        (one,) = await store.write(change)
        assert one.revision == store.revision == 2
        assert one.obj["metadata"]["resourceVersion"] == "2"
        left = store.get(change.key)
        assert left is (None if isinstance(change, Delete) else one)

    run_on(place[0], body, synchronous=place[1])


def test_of_many_writers_of_one_version_one_wins(place: tuple[str, Synchronous]) -> None:
    async def body(store: ObjectStore) -> None:
        await store.write(put("a", 0))
        tries = [store.write(put("a", 1, writer=number)) for number in range(50)]
        results = await asyncio.gather(*tries, return_exceptions=True)
        won = [one for one in results if not isinstance(one, BaseException)]
        lost = [one for one in results if isinstance(one, Conflicted)]
        assert (len(won), len(lost)) == (1, 49)
        assert won[0][0] is store.get(key("a"))
        # What a loser is told of is committed: who reads again sees it.
        assert all(one.found is won[0][0] for one in lost)

    run_on(place[0], body, synchronous=place[1])


def test_changes_of_one_write_build_upon_each_other(place: tuple[str, Synchronous]) -> None:
    async def body(store: ObjectStore) -> None:
        events: list[Event] = []
        store.subscribe(events.extend)
        await store.write(put("a", 0), put("a", 1, port=80), delete("a"), put("b"))
        assert told(events) == ["ADDED a 1", "MODIFIED a 2", "DELETED a 3", "ADDED b 4"]
        assert names(store.items(SERVICES)) == ["default/b"]
        assert await store.write() == []

    run_on(place[0], body, synchronous=place[1])


def test_readers_see_what_is_committed_only(tmp_path: Path) -> None:
    async def body(store: ObjectStore) -> None:
        writing = asyncio.create_task(store.write(put("a", 0)))
        await asyncio.sleep(0)  # accepted
        assert (store.get(key("a")), store.items(SERVICES), store.revision) == (None, [], 0)
        await writing
        assert store.get(key("a")) is not None

    run_on(str(tmp_path / "store.db"), body)


def test_writes_that_come_while_a_commit_runs_are_one_transaction(tmp_path: Path) -> None:
    async def body(store: ObjectStore) -> None:
        commits: list[list[str]] = []
        store.subscribe(lambda events: commits.append([one.stored.key[2] for one in events]))
        first = asyncio.create_task(store.write(put("first")))
        while not store._committing or store._queue:  # until its commit runs
            await asyncio.sleep(0)
        await asyncio.gather(first, *(store.write(put(f"{n:02}")) for n in range(99)))
        assert commits == [["first"], [f"{n:02}" for n in range(99)]]

    run_on(str(tmp_path / "store.db"), body)


def test_a_writer_that_stops_waiting_does_not_stop_its_write(tmp_path: Path) -> None:
    async def body(store: ObjectStore) -> None:
        writing = asyncio.create_task(store.write(put("a")))
        await asyncio.sleep(0)
        writing.cancel()
        await store.write(put("b"))
        assert names(store.items(SERVICES)) == ["default/a", "default/b"]

    run_on(str(tmp_path / "store.db"), body)


def test_items_are_in_order_of_namespace_and_name(place: tuple[str, Synchronous]) -> None:
    async def body(store: ObjectStore) -> None:
        for name in ("b/x", "a-b/x", "a/y", "a/x", "c/x"):
            await store.write(put(name))
        await store.write(put("a/x", resource=PODS), delete("c/x"), put("a/y", more=True))
        assert names(store.items(SERVICES)) == ["a/x", "a/y", "a-b/x", "b/x"]
        assert names(store.items(SERVICES, "a")) == ["a/x", "a/y"]
        assert names(store.items(PODS)) == ["a/x"]
        assert names(store.items(SERVICES, "none")) == names(store.items("none")) == []

    run_on(place[0], body, synchronous=place[1])


# Restarts


def test_a_restart_changes_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    path = str(tmp_path / "store.db")

    async def before(store: ObjectStore) -> list[Stored]:
        for n in range(20):
            await store.write(put(f"n{n % 3}/{n:02}", port=n))
        await store.write(put("n0/00", port=100), delete("n1/01"))
        return list(store.items(SERVICES))

    async def after(store: ObjectStore) -> list[Stored]:
        assert store.revision == 22
        return list(store.items(SERVICES))

    assert run_on(path, before) == run_on(path, after)


def test_the_revision_does_not_go_back_when_the_last_change_was_a_deletion(
    tmp_path: Path,
) -> None:
    path = str(tmp_path / "store.db")

    async def before(store: ObjectStore) -> None:
        await store.write(put("a"))
        await store.write(delete("a"))

    async def after(store: ObjectStore) -> None:
        assert store.revision == 2
        (one,) = await store.write(put("a", 0))
        assert one.revision == 3

    run_on(path, before)
    run_on(path, after)


def test_writes_of_any_size_are_kept(tmp_path: Path) -> None:
    """Also such as one SQL statement does not hold."""
    path = str(tmp_path / "store.db")

    async def before(store: ObjectStore) -> list[Stored]:
        await store.write(*(put(f"{n:04}", 0) for n in range(9_000)))
        await store.write(*(delete(f"{n:04}") for n in range(0, 9_000, 2)), put("last", 0))
        return list(store.items(SERVICES))

    async def after(store: ObjectStore) -> list[Stored]:
        assert store.revision == 13_501
        return list(store.items(SERVICES))

    assert run_on(path, before) == run_on(path, after)


def test_closing_waits_for_what_is_being_written(tmp_path: Path) -> None:
    path = str(tmp_path / "store.db")

    async def before(store: ObjectStore) -> None:
        writes = [asyncio.create_task(store.write(put(f"{n:03}"))) for n in range(100)]
        await asyncio.sleep(0)
        await store.close()
        await asyncio.gather(*writes)
        with pytest.raises(ApiError) as refusal:
            await store.write(put("late"))
        assert refusal.value.code == 503

    async def after(store: ObjectStore) -> int:
        return len(store.items(SERVICES))

    run_on(path, before)
    assert run_on(path, after) == 100


def test_a_loop_that_is_cancelled_still_closes_in_order(tmp_path: Path) -> None:
    """As Ctrl-C does it: all tasks are cancelled, among them the one that has the store."""
    path = str(tmp_path / "store.db")

    async def before(store: ObjectStore) -> None:
        writing = asyncio.create_task(store.write(put("a")))
        await asyncio.sleep(0)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.wait(others)
        assert writing.cancelled()
        await store.close()
        assert names(store.items(SERVICES)) == ["default/a"]

    async def after(store: ObjectStore) -> list[str]:
        return names(store.items(SERVICES))

    run_on(path, before)
    assert run_on(path, after) == ["default/a"]


def test_the_file_is_its_owners_only(tmp_path: Path) -> None:
    """It holds Secrets."""
    path = tmp_path / "store.db"

    async def body(store: ObjectStore) -> None:
        await store.write(put("a"))
        assert {one.stat().st_mode & 0o777 for one in tmp_path.iterdir()} == {0o600}

    run_on(str(path), body)


# Files that are refused


def foreign(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE bookmarks (url)")
    db.close()


def newer(path: Path) -> None:
    changed(path, "PRAGMA user_version = 2")


def without_tables(path: Path) -> None:
    changed(path, "DROP TABLE objects")


def without_counter(path: Path) -> None:
    changed(path, "DELETE FROM objects")


def with_a_broken_object(path: Path) -> None:
    changed(path, "INSERT INTO objects VALUES ('services', 'default', 'a', 1, x'7b')")


def changed(path: Path, statement: str) -> None:
    async def nothing(store: ObjectStore) -> None:
        pass

    run_on(str(path), nothing)
    with sqlite3.connect(path) as db:
        db.execute(statement)
    db.close()


@pytest.mark.parametrize(
    ("prepare", "expected"),
    [
        (lambda path: path.write_bytes(b"apiVersion: v1\n" * 100), "nor any SQLite file"),
        (lambda path: path.mkdir(), "cannot be opened"),
        (foreign, "of another program"),
        (newer, "written by a newer kdns (schema 2; this one knows 1)"),
        (without_tables, "no such table: objects"),
        (without_counter, "damaged"),
        (with_a_broken_object, "damaged: services default/a is not an object"),
    ],
)
def test_a_file_that_is_no_store_is_refused_and_left_alone(
    tmp_path: Path, prepare: Callable[[Path], None], expected: str
) -> None:
    path = tmp_path / "store.db"
    prepare(path)
    before = path.read_bytes() if path.is_file() else b""

    async def body(store: ObjectStore) -> None:
        raise AssertionError("it was opened")

    with pytest.raises(ConfigError) as refusal:
        run_on(str(path), body)
    (problem,) = refusal.value.problems
    assert problem.file == str(path)
    assert expected in problem.text
    assert (path.read_bytes() if path.is_file() else b"") == before


def test_a_file_in_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    async def body(store: ObjectStore) -> None:
        raise AssertionError("it was opened")

    with pytest.raises(ConfigError, match="cannot be opened: No such file or directory"):
        run_on(str(tmp_path / "none" / "store.db"), body)


def test_an_empty_file_becomes_a_store(tmp_path: Path) -> None:
    """As a start leaves it that was killed at once."""
    path = tmp_path / "store.db"
    path.touch()

    async def body(store: ObjectStore) -> None:
        await store.write(put("a"))

    run_on(str(path), body)


HOLD = """
    import asyncio, sys
    from kdns.api.store import ObjectStore

    async def hold():
        store = ObjectStore(sys.argv[1])
        await store.open()
        print("open", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        await store.close()

    asyncio.run(hold())
"""


def test_a_second_process_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    path = str(tmp_path / "store.db")

    async def body(store: ObjectStore) -> None:
        await store.write(put("a"))

    with child(HOLD, path) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "open\n"
        with pytest.raises(ConfigError, match="another process has it open"):
            run_on(path, body)
        first.communicate("end\n")
    run_on(path, body)


def test_a_second_store_in_the_same_process_is_refused_too(tmp_path: Path) -> None:
    path = str(tmp_path / "store.db")

    async def body(store: ObjectStore) -> None:
        for _ in range(2):  # the refusal must not take the first one's lock with it
            with pytest.raises(ConfigError, match="has it open"):
                await ObjectStore(path).open()
        with child(HOLD, path) as other:
            assert "has it open" in other.communicate()[1]
        await store.write(put("a"))

    run_on(path, body)


def child(script: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


# A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", f"kdns-test-{os.getpid()}", str(folder)]
    tried = subprocess.run(mount, capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no tmpfs can be mounted: {tried.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


async def fill(store: ObjectStore) -> tuple[int, ApiError]:
    """Write until the disk is full; return how many there are, and the refusal."""
    for number in range(1000):
        try:
            await store.write(put(f"{number:04}", text="x" * 20_000))
        except ApiError as refusal:
            return number, refusal
    raise AssertionError("the disk took 20 MB")


@pytest.mark.root
def test_a_full_disk_refuses_writes_and_nothing_else(small_disk: Path) -> None:
    path = str(small_disk / "store.db")

    async def full(store: ObjectStore) -> list[Stored]:
        await store.write(put("small"))
        ballast = small_disk / "ballast"
        ballast.write_bytes(b"x" * 500_000)
        count, refusal = await fill(store)
        assert (refusal.code, refusal.reason) == (507, "InsufficientStorage")
        assert "full" in str(refusal)
        before = (store.revision, list(store.items(SERVICES)))
        assert len(before[1]) == count + 1
        events: list[Event] = []
        store.subscribe(events.extend)
        watch = store.watch(SERVICES, store.revision, idle=0)
        # Writers at once: what meets, or builds upon, what fails, fails too and in its own right.
        text = "x" * 200_000
        tries = [
            store.write(put("big", 0, text=text)),
            store.write(put("big", 0, text=text)),
            store.write(put("small", text=text)),
            store.write(delete("small"), put("other", text=text)),
        ]
        results = await asyncio.gather(*tries, return_exceptions=True)
        assert [getattr(one, "code", one) for one in results] == [507] * 4
        assert (store.revision, list(store.items(SERVICES))) == before
        assert (events, await anext(watch)) == ([], ())
        # As soon as there is space, all goes on, with the expectations of before.
        ballast.unlink()
        small = store.get(key("small"))
        assert small is not None
        (one,) = await store.write(put("small", small.revision, text="again"))
        assert one.revision > before[0]
        assert told(await anext(watch)) == told(events) == [f"MODIFIED small {one.revision}"]
        return list(store.items(SERVICES))

    async def after(store: ObjectStore) -> list[Stored]:
        return list(store.items(SERVICES))

    assert run_on(path, full) == run_on(path, after)


@pytest.mark.root
def test_a_store_opens_on_a_full_disk_for_its_readers(small_disk: Path) -> None:
    path = str(small_disk / "store.db")

    async def before(store: ObjectStore) -> None:
        await store.write(put("a"))

    async def after(store: ObjectStore) -> None:
        with pytest.raises(ApiError, match="full"):
            await store.write(put("b"))
        assert names(store.items(SERVICES)) == ["default/a"]

    run_on(path, before)
    with pytest.raises(OSError, match="No space"):
        (small_disk / "ballast").write_bytes(b"x" * 2_000_000)
    run_on(path, after)


LIMITED = """
    import asyncio, resource, sys
    from kdns.errors import ApiError
    from kdns.api.store import ObjectStore, Put

    async def run():
        store = ObjectStore(sys.argv[1])
        await store.open()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        sizes = [*range(20)]
        for number in sizes:
            obj = {"metadata": {"name": str(number)}, "text": "x" * 20_000}
            try:
                await store.write(Put(("services", "default", str(number)), obj))
            except ApiError as refusal:
                assert refusal.code == 507, refusal
                break
        else:
            raise AssertionError("400 kB went into 100 kB")
        assert 0 < store.revision == number == len(store.items("services"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        await store.write(Put(("services", "default", "last"), {"metadata": {}}))
        await store.close()
        print(number)

    asyncio.run(run())
"""


def test_a_limit_on_the_file_refuses_writes_until_it_is_lifted(tmp_path: Path) -> None:
    path = str(tmp_path / "store.db")
    with child(LIMITED, path) as limited:
        out, err = limited.communicate()
    assert limited.returncode == 0, err

    async def body(store: ObjectStore) -> int:
        return len(store.items(SERVICES))

    assert run_on(path, body) == int(out) + 1


def test_what_does_not_build_upon_a_failed_commit_is_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Only the order is made here, by a commit that fails once: the disks are above."""

    async def body(store: ObjectStore) -> None:
        await store.write(put("a"))
        assert store._file is not None
        commit = store._file.commit
        fail_with: list[Exception] = [RuntimeError("a bug")]

        def fails_once(events: Sequence[Event]) -> None:
            if fail_with:
                raise fail_with.pop()
            commit(events)

        store._file.commit = fails_once  # type: ignore[method-assign]
        failing = asyncio.create_task(store.write(put("a", 1), put("b", 0)))
        while not store._committing or store._queue:
            await asyncio.sleep(0)
        results = await asyncio.gather(
            failing,
            store.write(put("b", 2)),  # meets another version, which then never is
            store.write(put("a"), put("c")),  # builds upon it
            store.write(put("c", 0)),  # meets what built upon it: holds after all
            store.write(put("d")),  # is of its own
            return_exceptions=True,
        )
        assert [type(one).__name__ for one in results] == [
            "ApiError", "Conflicted", "ApiError", "list", "list",
        ]  # fmt: skip
        assert [getattr(results[n], "code", None) for n in (0, 2)] == [500, 500]
        assert getattr(results[1], "found", "") is None
        assert names(store.items(SERVICES)) == ["default/a", "default/c", "default/d"]
        kept = store.get(key("a"))
        assert kept is not None and kept.revision == 1

    run_on(str(tmp_path / "store.db"), body)
    assert "a bug" in caplog.text, "what nobody foresaw is in the log"


# Watches


async def until(watch: Any, count: int) -> list[Event]:
    """The next `count` events."""
    found: list[Event] = []
    while len(found) < count:
        found.extend(await anext(watch))
    return found


def test_a_watch_tells_of_one_resource_from_a_revision_on(place: tuple[str, Synchronous]) -> None:
    async def body(store: ObjectStore) -> None:
        await store.write(put("a"), put("b"), put("p", resource=PODS))
        watch = store.watch(SERVICES, 1)
        await store.write(put("a", port=80), put("p", port=80, resource=PODS))
        await store.write(delete("b"))
        events = await until(watch, 3)
        assert told(events) == ["ADDED b 2", "MODIFIED a 4", "DELETED b 6"]
        assert [one.before.revision if one.before else None for one in events] == [None, 1, 2]
        assert events[2].stored.obj["metadata"]["resourceVersion"] == "6"

    run_on(place[0], body, synchronous=place[1])


@pytest.mark.parametrize(
    ("since", "expected"),
    [
        (3, "410 Expired: too old resource version: 3 (4)"),  # before the restart
        (4, ["ADDED d 5", "ADDED e 6"]),
        (5, ["ADDED e 6"]),
        (6, []),
        (7, "504 Timeout: Timeout: Too large resource version: 7, current: 6"),
    ],
)
def test_after_a_restart_a_watch_resumes_from_what_was_loaded(
    tmp_path: Path, since: int, expected: str | list[str]
) -> None:
    path = str(tmp_path / "store.db")

    async def before(store: ObjectStore) -> None:
        await store.write(put("a"), put("b"), put("c"), delete("c"))

    async def after(store: ObjectStore) -> str | list[str]:
        await store.write(put("d"), put("e"))
        try:
            return told(await anext(store.watch(SERVICES, since, idle=0)))
        except ApiError as refusal:
            return f"{refusal.code} {refusal.reason}: {refusal}"

    run_on(path, before)
    assert run_on(path, after) == expected


def test_the_history_is_bounded_and_each_resource_refused_by_its_own_losses() -> None:
    async def body(store: ObjectStore) -> None:
        await store.write(put("a"), put("p", resource=PODS))
        for _ in range(5):
            await store.write(put("p", resource=PODS))
        # Held: revisions 5, 6, 7 of pods; of services revision 1 is gone.
        with pytest.raises(ApiError, match=r"too old resource version: 0 \(1\)"):
            store.watch(SERVICES, 0)
        with pytest.raises(ApiError, match=r"too old resource version: 3 \(4\)"):
            store.watch(PODS, 3)
        assert told(await anext(store.watch(SERVICES, 1, idle=0))) == []
        assert told(await anext(store.watch(PODS, 4))) == [
            f"MODIFIED p {revision}" for revision in (5, 6, 7)
        ]
        assert told(await anext(store.watch("never written", 0, idle=0))) == []

    run_on("", body, history=3)


def test_a_quiet_watch_says_so_after_each_idle_time() -> None:
    async def body(store: ObjectStore) -> None:
        watch = store.watch(SERVICES, 0, idle=0)
        assert [await anext(watch) for _ in range(3)] == [(), (), ()]
        await store.write(put("a"))
        assert told(await anext(watch)) == ["ADDED a 1"]
        assert await anext(watch) == ()

    run_on("", body)


def test_a_reader_that_falls_behind_is_ended_and_others_are_not() -> None:
    async def body(store: ObjectStore) -> None:
        slow = store.watch(SERVICES, 0, limit=2)
        prompt = store.watch(SERVICES, 0, limit=2)
        for number in range(3):
            await store.write(put(str(number)))
            assert len(await anext(prompt)) == 1
        with pytest.raises(StopAsyncIteration):
            await anext(slow)
        assert slow.ended and not prompt.ended

    run_on("", body)


def test_what_a_watch_asked_for_at_its_start_does_not_count_as_behind() -> None:
    async def body(store: ObjectStore) -> None:
        await store.write(*(put(str(number)) for number in range(9)))
        watch = store.watch(SERVICES, 0, limit=2)
        await store.write(put("9"))
        assert len(await until(watch, 10)) == 10

    run_on("", body)


@pytest.mark.parametrize("how", ["aclose", "forgotten"])
def test_a_watch_that_is_over_is_forgotten(how: Literal["aclose", "forgotten"]) -> None:
    async def body(store: ObjectStore) -> None:
        watch = store.watch(SERVICES, 0)
        reading = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(0)
        if how == "aclose":
            await watch.aclose()
            with pytest.raises(StopAsyncIteration):
                await reading
            await store.write(put("a"))
        else:
            reading.cancel()
            await asyncio.wait([reading])  # gather() would hold its frames, and so the watch
            del watch, reading
            gc.collect()
        assert not store._watches[SERVICES]

    run_on("", body)


def test_closing_the_store_ends_its_watches() -> None:
    async def body(store: ObjectStore) -> None:
        waiting, full = store.watch(SERVICES, 0), store.watch(PODS, 0)
        reading = asyncio.ensure_future(anext(waiting))
        await store.write(put("p", resource=PODS))
        await store.close()
        with pytest.raises(StopAsyncIteration):
            await reading
        assert told(await anext(full)) == ["ADDED p 1"], "what came is still read"
        with pytest.raises(StopAsyncIteration):
            await anext(full)
        with pytest.raises(StopAsyncIteration):
            await anext(store.watch(SERVICES, 1))

    run_on("", body)


def test_a_thousand_watches_share_the_same_events() -> None:
    async def body(store: ObjectStore) -> None:
        watches = [store.watch(SERVICES, 0) for _ in range(1000)]
        reading = [asyncio.ensure_future(until(watch, 20)) for watch in watches]
        for number in range(20):
            await store.write(put(str(number)))
        seen = await asyncio.gather(*reading)
        assert {tuple(id(event) for event in events) for events in seen} == {
            tuple(id(event) for event in seen[0])
        }
        assert [one.stored.revision for one in seen[0]] == list(range(1, 21))

    run_on("", body)


# Subscribers


def test_a_subscriber_hears_of_a_write_before_its_writer(place: tuple[str, Synchronous]) -> None:
    async def body(store: ObjectStore) -> None:
        heard: list[str] = []
        end = store.subscribe(lambda events: heard.extend(told(events)))
        await store.write(put("a"))
        assert heard == ["ADDED a 1"]
        end()
        end()
        await store.write(put("b"))
        assert heard == ["ADDED a 1"]

    run_on(place[0], body, synchronous=place[1])


def test_a_subscriber_that_fails_harms_nobody(
    place: tuple[str, Synchronous], caplog: pytest.LogCaptureFixture
) -> None:
    async def body(store: ObjectStore) -> None:
        heard: list[Event] = []

        def broken(events: Sequence[Event]) -> None:
            raise ValueError("a bug of this subscriber")

        store.subscribe(broken)
        store.subscribe(heard.extend)
        await store.write(put("a"))
        assert told(heard) == ["ADDED a 1"]

    run_on(place[0], body, synchronous=place[1])
    assert "a bug of this subscriber" in caplog.text


# Against a model

NAMES = st.sampled_from(["a", "b", "n/a"])
KEYS = st.builds(
    lambda resource, name: key(name, resource), st.sampled_from([SERVICES, PODS]), NAMES
)
# Which version a writer expects: any, none, the one there is, an old one.
EXPECTED = st.sampled_from(["any", "none", "current", "old"])
CHANGE = st.tuples(st.sampled_from(["put", "delete"]), KEYS, EXPECTED)
STEP = st.one_of(
    st.lists(CHANGE, min_size=1, max_size=3),  # one write
    st.lists(CHANGE, min_size=2, max_size=5).map(tuple),  # several writers at once
    st.just("restart"),
)

Model = dict[Key, tuple[int, int]]  # revision, value


def change_of(kind: str, at: Key, expectation: str, model: Model, value: int) -> Put | Delete:
    there = model.get(at)
    expected = {
        "any": None,
        "none": 0,
        "current": there[0] if there else 0,
        "old": there[0] - 1 if there and there[0] > 1 else 999_999,
    }[expectation]
    if kind == "put":
        return Put(at, {"metadata": {"name": at[2]}, "value": value}, expected)
    return Delete(at, expected or None)


def changes_of(
    step: Sequence[tuple[str, Key, str]], model: Model, value: int
) -> list[Put | Delete]:
    return [change_of(kind, at, expectation, model, value) for kind, at, expectation in step]


def holds(change: Put | Delete, model: Model) -> bool:
    """Say the contract a second time."""
    there = model.get(change.key)
    match change:
        case Put(expected=None):
            return True
        case Put(expected=0):
            return there is None
        case Delete(expected=None):
            return there is not None
    return there is not None and there[0] == change.expected


def state(store: ObjectStore) -> Model:
    found = [*store.items(SERVICES), *store.items(PODS)]
    for resource in (SERVICES, PODS):
        keys = [one.key for one in store.items(resource)]
        assert keys == sorted(keys)
    assert all(store.get(one.key) is one for one in found)
    assert all(one.obj["metadata"]["resourceVersion"] == str(one.revision) for one in found)
    return {one.key: (one.revision, one.obj["value"]) for one in found}


def replayed(model: Model, resource: str, events: Sequence[Event]) -> Model:
    built = {at: value for at, value in model.items() if at[0] == resource}
    for event in events:
        at, before = event.stored.key, event.before
        assert (before.revision if before else None) == (built[at][0] if at in built else None)
        assert (event.type == "ADDED") == (before is None)
        if event.type == "DELETED":
            del built[at]
        else:
            built[at] = (event.stored.revision, event.stored.obj["value"])
    return built


@settings(deadline=None, max_examples=60)
@given(steps=st.lists(STEP, max_size=25), history=st.integers(0, 12), on_disk=st.booleans())
def test_any_sequence_of_writes_and_restarts_equals_a_dict(
    steps: list[Any], history: int, on_disk: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "store.db")) if on_disk else ""
        asyncio.run(play(path, steps, history))


async def play(path: str, steps: list[Any], history: int) -> None:
    store = ObjectStore(path, history=history)
    await store.open()
    model: Model = {}
    past: dict[int, Model] = {0: {}}
    value = 0
    for step in steps:
        if step == "restart":
            if path:
                await store.close()
                store = ObjectStore(path, history=history)
                await store.open()
        elif isinstance(step, tuple):
            value += 1
            await at_once(store, changes_of(step, model, value), model, value)
        else:
            value += 1
            await alone(store, changes_of(step, model, value), model, value)
        assert state(store) == model
        past[store.revision] = dict(model)
    replays(store, past, model)
    await store.close()


async def alone(store: ObjectStore, changes: list[Put | Delete], model: Model, value: int) -> None:
    """One write of several changes."""
    revision, after = store.revision, dict(model)
    possible = True
    for number, change in enumerate(changes, revision + 1):
        possible = possible and holds(change, after)
        if possible and isinstance(change, Put):
            after[change.key] = (number, value)
        elif possible:
            del after[change.key]
    try:
        written = await store.write(*changes)
    except Conflicted:
        assert not possible
        assert store.revision == revision
    else:
        assert possible
        assert [one.revision for one in written] == list(
            range(revision + 1, revision + 1 + len(changes))
        )
        model.clear()
        model.update(after)


async def at_once(
    store: ObjectStore, changes: list[Put | Delete], model: Model, value: int
) -> None:
    """Writers at the same time: as if one after the other, in the order of their revisions."""
    results = await asyncio.gather(
        *(store.write(change) for change in changes), return_exceptions=True
    )
    won = [
        (done[0].revision, change)
        for done, change in zip(results, changes, strict=True)
        if not isinstance(done, BaseException)
    ]
    for revision, change in sorted(won, key=lambda one: one[0]):
        assert holds(change, model)
        if isinstance(change, Put):
            model[change.key] = (revision, value)
        else:
            del model[change.key]
    # Who lost met, when it came, what others had been granted; never nothing at all.
    lost = [one for one in results if isinstance(one, BaseException)]
    assert all(isinstance(one, Conflicted) for one in lost)
    assert store.revision == max([revision for revision, _ in won], default=store.revision)


def replays(store: ObjectStore, past: dict[int, Model], model: Model) -> None:
    """From every revision that is held, the events lead to what is there now."""
    for resource in (SERVICES, PODS):
        now = {at: value for at, value in model.items() if at[0] == resource}
        refused = []
        for since, then in past.items():
            try:
                watch = store.watch(resource, since)
            except ApiError as refusal:
                assert refusal.code == 410
                refused.append(since)
            else:
                events = [event for batch in watch._batches for event in batch]
                assert replayed(then, resource, events) == now
        assert store.revision not in refused
        assert not refused or max(refused) < min(set(past) - set(refused))
