"""The embedded API in a thread of the test's process, and a stock kubectl that talks to it."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

from kdns.api.access import Credentials, kubeconfig
from kdns.api.allocate import Allocator
from kdns.api.http import ApiServer
from kdns.api.kinds import BY_KIND
from kdns.api.objects import Objects
from kdns.api.store import Obj, ObjectStore, Put
from kdns.metrics import Metrics

T = TypeVar("T")


def all_kubectls() -> list[str]:
    """Return what there is: KDNS_TEST_KUBECTL, the test environment's, the one on PATH."""
    beside = shutil.which("kubectl", path=str(Path(sys.executable).parent))
    found = (os.environ.get("KDNS_TEST_KUBECTL"), beside, shutil.which("kubectl"))
    return list(dict.fromkeys(filter(None, found)))


def find_kubectl() -> str:
    """Return the first kubectl there is; skip without."""
    found = all_kubectls()
    if not found:
        pytest.skip("no kubectl: neither beside the interpreter nor on PATH")
    return found[0]


class Kubectl:
    """A kubectl with a kubeconfig and a cache of its own.

    folder -- for both; namespace -- "": the context's; path -- "": the first there is
    """

    def __init__(self, folder: Path, config: str, namespace: str = "", path: str = "") -> None:
        self.path = path or find_kubectl()
        self.config = folder / "kubeconfig"
        self.config.write_text(config)
        self.namespace = namespace
        # No proxy, no plugin, no kubeconfig of the person who runs the tests.
        self.environment = {
            "PATH": os.defpath,
            "HOME": str(folder),
            "KUBECONFIG": str(self.config),
            "LC_ALL": "C.UTF-8",
        }

    def inside(self, namespace: str) -> Kubectl:
        """Return one that works in another namespace."""
        return Kubectl(self.config.parent, self.config.read_text(), namespace, self.path)

    def other(self, path: str) -> Kubectl:
        """Return another kubectl for the same cluster and namespace."""
        return Kubectl(self.config.parent, self.config.read_text(), self.namespace, path)

    def command(self, words: Sequence[str]) -> list[str]:
        return [self.path, *(["-n", self.namespace] if self.namespace else []), *words]

    def run(
        self, *words: str, text: str | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run it, whatever comes of it. text -- its standard input"""
        return subprocess.run(
            self.command(words), input=text, capture_output=True, text=True, timeout=30,
            env=self.environment | environment, check=False,
        )  # fmt: skip

    def __call__(self, *words: str, text: str | None = None, **environment: str) -> str:
        """Run it and return what it prints; it must succeed."""
        done = self.run(*words, text=text, **environment)
        assert done.returncode == 0, f"kubectl {' '.join(words)}: {done.stderr or done.stdout}"
        return done.stdout

    def refused(self, *words: str, text: str | None = None) -> str:
        """Run what must fail, and return its complaint."""
        done = self.run(*words, text=text)
        assert done.returncode != 0, f"kubectl {' '.join(words)} succeeded: {done.stdout}"
        return done.stderr


class RunningApi:
    """Store, objects and HTTP without TLS and without controllers, in a thread of their own."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="api", daemon=True)
        self._thread.start()
        self._clock = clock
        self.store, self.objects, self.server = self.run(self._start())

    async def _start(self) -> tuple[ObjectStore, Objects, ApiServer]:
        store = ObjectStore()
        await store.open()
        objects = Objects(store, Allocator(), clock=self._clock)
        server = ApiServer(objects, Metrics(), clock=self._clock)
        await server.start()
        return store, objects, server

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something in the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    @property
    def kubeconfig(self) -> str:
        return kubeconfig(f"http://127.0.0.1:{self.server.port}", Credentials())

    def put(self, obj: Obj) -> None:
        """Keep an object as it is: with a status, without what a write would make of it."""
        resource = BY_KIND[obj["apiVersion"], obj["kind"]]
        meta = obj["metadata"]
        key = (resource.qualified, meta.get("namespace", ""), meta["name"])
        self.run(self._write(Put(key, obj)))

    async def _write(self, put: Put) -> None:
        await self.store.write(put)

    def stop(self) -> None:
        async def end() -> None:
            await self.server.stop()
            await self.store.close()

        self.run(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
