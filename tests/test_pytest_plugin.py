"""The fixtures of kdns.pytest_plugin, as a test suite elsewhere uses them, in a run of its own."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

PROJECT = Path(__file__).resolve().parent.parent
INSTALLED = any(one.name == "kdns" for one in entry_points(group="pytest11"))
# A checkout that was installed before there was the entry point names the plugin instead.
LOADED = () if INSTALLED else ("-p", "kdns.pytest_plugin")


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function\n")
    return pytester


def run(suite: pytest.Pytester, *args: str) -> pytest.RunResult:
    return suite.runpytest_subprocess(*LOADED, "-p", "no:cacheprovider", "--strict-markers", *args)


def test_pyproject_names_the_plugin() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"kdns": "kdns.pytest_plugin"}


def test_a_synchronous_test(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        """
        import os, socket
        import urllib.request, json

        def test_objects_and_names(kdns_cluster):
            assert os.environ["KUBECONFIG"] == kdns_cluster.kubeconfig
            kdns_cluster.apply('''
        apiVersion: v1
        kind: Service
        metadata: {name: web}
        spec: {ports: [{port: 80}]}
            ''')
            web = kdns_cluster.get("svc", "web")
            assert kdns_cluster.resolve("web") == [web["spec"]["clusterIP"]]
            with urllib.request.urlopen(kdns_cluster.api_url + "/api/v1/services") as answer:
                names = [one["metadata"]["name"] for one in json.load(answer)["items"]]
            assert "web" in names

        def test_the_next_one_starts_anew(kdns_cluster):
            assert kdns_cluster.resolve("web") == []

        def test_the_resolver(kdns_cluster, kdns_resolver):
            assert kdns_resolver is kdns_cluster
            kdns_cluster.apply({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
                                "spec": {"clusterIP": "10.96.7.7", "ports": [{"port": 80}]}})
            assert socket.gethostbyname("web") == "10.96.7.7"
            assert socket.gethostbyname("localhost") == "127.0.0.1"

        def test_without(monkeypatch):
            assert "KUBECONFIG" not in os.environ
            assert socket.getaddrinfo.__module__ == "socket"
        """
    )
    run(suite).assert_outcomes(passed=4)


def test_asyncio_tests(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        """
        import asyncio
        import aiohttp, pytest
        from aiohttp import web

        @pytest.mark.asyncio
        @pytest.mark.kdns(services={"web": "localhost"})
        async def test_a_client_by_name(kdns_cluster, kdns_resolver):
            async def hello(request):
                return web.Response(text="hello")
            runner = web.ServerRunner(web.Server(hello))
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            port = runner.addresses[0][1]
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://web.default.svc:{port}/") as answer:
                    assert await answer.text() == "hello"
                async with session.get(kdns_cluster.api_url + "/readyz") as answer:
                    assert answer.status == 200
            await runner.cleanup()

        @pytest.mark.asyncio
        async def test_blocking_calls_do_not_lock_up(kdns_cluster, kdns_resolver):
            kdns_cluster.apply({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
                                "spec": {"clusterIP": "10.96.7.7", "ports": [{"port": 80}]}})
            found = await asyncio.get_running_loop().getaddrinfo("web", 80)
            assert found[0][4] == ("10.96.7.7", 80)
        """
    )
    run(suite).assert_outcomes(passed=2)


def test_the_mark_says_what_the_cluster_is_like(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        """
        import pytest

        @pytest.mark.kdns(nodes=3, services={"db": ["192.0.2.7:5432"]})
        def test_it(kdns_cluster):
            assert len(kdns_cluster.list("nodes")) == 3
            assert kdns_cluster.endpoints("db") == ["192.0.2.7:5432"]

        @pytest.mark.kdns({"web": 80})
        def test_services_come_first(kdns_cluster):
            assert kdns_cluster.resolve("web")

        @pytest.mark.kdns(no_such_option=1)
        def test_wrong(kdns_cluster):
            pass
        """
    )
    result = run(suite)
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*unexpected keyword argument 'no_such_option'*"])


def test_one_cluster_for_the_session(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        """
        import os

        def test_first(kdns_cluster_session):
            kdns_cluster_session.apply({"apiVersion": "v1", "kind": "Namespace",
                                        "metadata": {"name": "shared"}})

        def test_second(kdns_cluster_session):
            assert kdns_cluster_session.get("ns", "shared")
            assert os.environ["KUBECONFIG"] == kdns_cluster_session.kubeconfig

        def test_beside_one_of_its_own(kdns_cluster_session, kdns_cluster):
            assert os.environ["KUBECONFIG"] == kdns_cluster.kubeconfig
            assert kdns_cluster.api_url != kdns_cluster_session.api_url
        """
    )
    run(suite).assert_outcomes(passed=3)


def test_under_xdist(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        """
        import pytest

        @pytest.mark.parametrize("number", range(8))
        def test_many_at_once(kdns_cluster, kdns_cluster_session, number):
            name = {"name": f"web-{number}"}
            kdns_cluster.apply({"apiVersion": "v1", "kind": "Service", "metadata": name,
                                "spec": {"ports": [{"port": 80}]}})
            assert len(kdns_cluster.list("services")) == 2
            assert kdns_cluster.resolve(f"web-{number}")
        """
    )
    run(suite, "-n", "2").assert_outcomes(passed=8)


def test_a_suite_that_asks_for_nothing_pays_nothing(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        """
        import sys

        def test_nothing_is_imported():
            ours = [m for m in sys.modules if m.startswith("kdns")]
            assert sorted(ours) == ["kdns", "kdns.pytest_plugin"]
            assert "aiohttp" not in sys.modules
        """
    )
    run(suite, "-p", "no:randomly").assert_outcomes(passed=1)


def test_the_fixtures_explain_themselves(suite: pytest.Pytester) -> None:
    result = run(suite, "--fixtures")
    result.stdout.fnmatch_lines(
        [
            "kdns_cluster -- *",
            "    A cluster of its own for each test*",
            "kdns_resolver -- *",
            "    Have this process find kdns_cluster's names*",
        ]
    )
    run(suite, "--markers").stdout.fnmatch_lines(["@pytest.mark.kdns(*"])


def test_the_plugin_imports_only_pytest() -> None:
    code = (
        "import sys, pytest\nbefore = set(sys.modules)\nimport kdns.pytest_plugin\n"
        "print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT
    )
    assert done.stdout == "['kdns', 'kdns.pytest_plugin']\n"
