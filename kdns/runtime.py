"""What a long-lived server asks of its own interpreter and of its limits."""

from __future__ import annotations

import gc
import math
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# File descriptors wanted: a thousand connections a listener, a thousand sockets to upstreams.
# The soft limit of 1,024 that services start with (systemd) is for programs that use select().
OPEN_FILES = 65536


def collect_rarely() -> None:
    """Have the garbage collector look seldom. Neither queries nor the registry's objects leave
    cycles, and to look at the same objects again and again takes a quarter of a start; a look at
    20,000 new ones, some 4 ms, bounds the cycles of errors."""
    gc.set_threshold(20_000, 50, 50)


@contextmanager
def without_collections() -> Iterator[None]:
    """Have the garbage collector rest while modules are imported: what they make stays, and to
    look at it time and again takes a seventh of it all."""
    active = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if active:
            gc.enable()


def leave_alone() -> None:
    """Have the garbage collector never look at what is there now. Where a great many objects
    have just been read that stay, even one look stops all threads for 100 ms and more."""
    gc.freeze()


def take_turns_often() -> None:
    """Have threads give way after half a millisecond, not five: while one renders 10,000
    Services the others' many short steps, such as starting a program, wait for it each time."""
    sys.setswitchinterval(0.0005)


def usable_cores() -> int:
    """Return how many cores this process may use: those it may run on, less where its control
    group has a quota of processor time (a container's CPU limit)."""
    cores = len(os.sched_getaffinity(0))
    try:
        with open("/sys/fs/cgroup/cpu.max") as f:
            quota, period = f.read().split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # none, "max", or another kernel's way
        return cores


def settle_memory() -> None:
    """Spare the garbage collector what lives as long as the server: with 10,000 Services a
    full collection would stop answering for tens of milliseconds. It is not done now either:
    what a start leaves of cycles is less than a megabyte, and questions come already."""
    gc.freeze()
    collect_rarely()


def give_back_memory() -> None:
    """Have the C library return what it keeps of freed memory, which OpenSSL's buffers are:
    after a flood that is many megabytes. Takes some 5 ms; another C library than glibc may have
    no such call."""
    import ctypes  # seldom wanted, and it takes a while

    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def raise_file_limit() -> None:
    """Raise the soft limit of open files as far as the hard one lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
