"""Rollouts and deletions as a stock kubectl sees them: what it waits for comes."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from controlled import Clock, Place, running, workload

from kdns.api.http import ApiServer
from kdns.metrics import Metrics

BESIDE = Path(sys.executable).with_name("kubectl")
KUBECTL = str(BESIDE) if BESIDE.exists() else shutil.which("kubectl")

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.skipif(KUBECTL is None, reason="no kubectl is installed"),
]


class Now(Clock):
    """The clock on the wall."""

    def __call__(self) -> float:
        return time.time()


class Session:
    def __init__(self, place: Place, port: int, home: Path) -> None:
        self.place = place
        self._server = f"http://127.0.0.1:{port}"
        self._home = home

    async def run(self, command: str, given: str = "") -> str:
        """Return what kubectl prints; fails if it does."""
        assert KUBECTL is not None
        process = await asyncio.create_subprocess_exec(
            KUBECTL, "--server", self._server, *command.split(),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "HOME": str(self._home), "KUBECONFIG": os.devnull},
        )  # fmt: skip
        out, _ = await asyncio.wait_for(process.communicate(given.encode()), 50)
        assert process.returncode == 0, f"kubectl {command}: {out.decode()}"
        return out.decode()


@asynccontextmanager
async def session(home: Path) -> AsyncIterator[Session]:
    # Short delays, so that kubectl sees the steps and has something to wait for.
    async with running(clock=Now(), pod_ready_delay=0.1, pod_termination_delay=0.1) as place:
        server = ApiServer(place.objects, Metrics())
        await server.start()
        try:
            yield Session(place, server.port, home)
        finally:
            await server.stop()


async def test_a_deployment_is_rolled_out_and_back(tmp_path: Path) -> None:
    async with session(tmp_path) as kubectl:
        await kubectl.run("create deployment web --image=nginx --replicas=3 --port=8080")
        await kubectl.run("expose deployment web --port=80 --target-port=8080")
        done = 'deployment "web" successfully rolled out'
        assert done in await kubectl.run("rollout status deployment/web --timeout=30s")
        await kubectl.run("set image deployment/web nginx=nginx:2")
        assert done in await kubectl.run("rollout status deployment/web --timeout=30s")
        history = await kubectl.run("rollout history deployment/web")
        assert [line.split()[0] for line in history.splitlines()[2:] if line] == ["1", "2"]
        await kubectl.run("rollout undo deployment/web")
        assert done in await kubectl.run("rollout status deployment/web --timeout=30s")
        found = kubectl.place.get("Deployment", "web")
        assert found["spec"]["template"]["spec"]["containers"][0]["image"] == "nginx"
        await kubectl.run("scale deployment/web --replicas=5")
        await kubectl.run("wait --for=jsonpath={.status.availableReplicas}=5 deployment/web")
        told = await kubectl.run("describe deployment web")
        assert "5 desired | 5 updated | 5 total | 5 available | 0 unavailable" in told
        assert "Scaled up replica set web-" in told
        assert len(kubectl.place.endpoints("web")) == 5
        await kubectl.run("delete deployment web --cascade=foreground --timeout=30s")
        assert kubectl.place.names("Pod") == []


async def test_a_stateful_set_is_rolled_out(tmp_path: Path) -> None:
    async with session(tmp_path) as kubectl:
        await kubectl.run("apply -f -", json.dumps(workload("StatefulSet", "db", 3)))
        done = "roll out complete: 3 new pods have been updated"
        assert done in await kubectl.run("rollout status sts/db --timeout=30s")
        await kubectl.run("set image sts/db c=nginx:2")
        assert done in await kubectl.run("rollout status sts/db --timeout=30s")
        await kubectl.run("delete pod db-0 --timeout=30s")
        await kubectl.run("rollout restart sts/db")
        assert done in await kubectl.run("rollout status sts/db --timeout=30s")


async def test_a_namespace_is_deleted(tmp_path: Path) -> None:
    async with session(tmp_path) as kubectl:
        await kubectl.run("create namespace prod")
        await kubectl.run("create deployment web --image=nginx -n prod")
        await kubectl.run("wait --for=condition=Available deployment/web -n prod --timeout=30s")
        await kubectl.run("delete namespace prod --timeout=30s")
        assert kubectl.place.find("Namespace", "prod") is None
