"""Fixtures for tests of programs that live in a cluster: its API, its names, its faults.

pytest loads this in every test run of an environment that has kdns, so nothing is imported
here but what pytest itself has: a suite that asks for none of these fixtures pays nothing.

    def test_it_finds_its_database(kdns_cluster, kdns_resolver):
        kdns_cluster.apply("deploy/")
        assert socket.gethostbyname("db.shop") == kdns_cluster.resolve("db.shop")[0]

    @pytest.mark.kdns(nodes=3, services={"web": 80})   # what kdns.Cluster() takes
    async def test_with_three_nodes(kdns_cluster): ...
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from kdns.cluster import LocalCluster


def pytest_configure(config: pytest.Config) -> None:
    """Make the mark known."""
    config.addinivalue_line(
        "markers",
        "kdns(**options): what the test's kdns_cluster is like; takes what kdns.Cluster() takes",
    )


@pytest.fixture
def kdns_cluster(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LocalCluster]:
    """A cluster of its own for each test: a Kubernetes API, controllers and DNS in this process.

    For synchronous and asyncio tests alike; it runs in a thread of its own. While the test
    lasts, KUBECONFIG names its kubeconfig. Has apply, delete, get, list, resolve,
    wait_resolves, endpoints, settle, kubeconfig, kubeconfig_dict, api_url, dns and the faults
    expire_watches, drop_connections, delay, fail, dns_servfail, dns_stale, reset.
    @pytest.mark.kdns(nodes=3, ...) says what it is like.
    """
    from kdns import LocalCluster

    mark = request.node.get_closest_marker("kdns")
    with LocalCluster(*(mark.args if mark else ()), **(mark.kwargs if mark else {})) as cluster:
        monkeypatch.setenv("KUBECONFIG", cluster.kubeconfig)
        yield cluster


@pytest.fixture(scope="session")
def kdns_cluster_session() -> Iterator[LocalCluster]:
    """One cluster for the whole run (under xdist: one a worker), for what is costly to set up.

    What a test leaves in it, the next one finds. KUBECONFIG names its kubeconfig from the
    first test that asks for it on; kdns_cluster's takes precedence where both are used.
    """
    from kdns import LocalCluster

    with LocalCluster() as cluster, pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", cluster.kubeconfig)
        yield cluster


@pytest.fixture
def kdns_resolver(kdns_cluster: LocalCluster) -> Iterator[LocalCluster]:
    """Have this process find kdns_cluster's names, as in a Pod of the namespace default.

    Reaches what looks names up with socket.getaddrinfo(): asyncio, aiohttp, httpx, requests,
    urllib3, http.client, ... All other names are the host's own business, as before. Is the
    cluster.
    """
    with kdns_cluster.resolver():
        yield kdns_cluster
