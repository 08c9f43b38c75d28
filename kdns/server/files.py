"""Files that plugins want to know of: read now, and again when they change.

Polls modification time and size, as CoreDNS does: it works on every file system, also where
a ConfigMap is swapped by a symbolic link, which no inotify watch on the file would see.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from typing import TypeAlias

from kdns.plugins.plugin import WatchFile, WatchFolder

log = logging.getLogger("kdns")

# Files larger than this are not configuration: refused with a line that says so.
MAX_FILE = 256 << 20


def read_file(path: str) -> tuple[bytes | None, str]:
    """Return (content, "") or (None, why not)."""
    try:
        if os.path.getsize(path) > MAX_FILE:
            return None, f"{path}: larger than {MAX_FILE >> 20} MiB"
        with open(path, "rb") as f:
            return f.read(), ""
    except OSError as e:
        return None, f"{path}: {e.strerror or e}"


def read_folder(path: str) -> tuple[dict[str, bytes], str]:
    """Return ({name: content} of the files directly in a folder, error text)."""
    found: dict[str, bytes] = {}
    error = ""
    try:
        names = sorted(os.listdir(path))
    except OSError as e:
        return {}, f"{path}: {e.strerror or e}"
    for name in names:
        full = os.path.join(path, name)
        if not os.path.isfile(full):
            continue
        content, problem = read_file(full)
        if content is None:
            error = problem
        else:
            found[name] = content
    return found, error


# What of a file or folder is different when its content is.
Stamp: TypeAlias = tuple[object, ...]


def stamp(path: str) -> Stamp:
    """Return the stamp of a path; empty if there is nothing."""
    try:
        if os.path.isdir(path):
            return tuple(
                (entry.name, entry.stat().st_mtime_ns, entry.stat().st_size)
                for entry in sorted(os.scandir(path), key=lambda e: e.name)
            )
        stat = os.stat(path)
        return (stat.st_mtime_ns, stat.st_size, stat.st_ino)
    except OSError:
        return ()


def load(watch: WatchFile | WatchFolder) -> bool:
    """Read once and hand over; return True if answers may have changed."""
    if isinstance(watch, WatchFolder):
        files, error = read_folder(watch.path)
        return watch.load(files, error)
    content, error = read_file(watch.path)
    return watch.load(content, error)


async def follow(
    watch: WatchFile | WatchFolder, changed: Callable[[], None], seen: Stamp | None = None
) -> None:
    """Hand over the content again whenever it changed, for ever. The first reading is the
    caller's (load), so that a server has its files before it listens; `seen` is the stamp
    from before that, so that no change in between is missed."""
    if watch.interval <= 0:
        return
    if seen is None:
        seen = stamp(watch.path)
    while True:
        await asyncio.sleep(watch.interval)
        now = stamp(watch.path)
        if now == seen:
            continue
        seen = now
        try:
            if load(watch):
                changed()
        except Exception:
            log.exception("a bug in kdns while reading %s; the old content stays", watch.path)
