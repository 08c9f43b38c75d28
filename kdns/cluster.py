"""A cluster in this process: the embedded API, its controllers and DNS on one registry.

    async with kdns.Cluster(services={"web": 80}) as cluster:
        await cluster.apply("deployment.yaml")
        assert await cluster.resolve("web")

Decides what is started with what, and offers it to programs and tests; `kdns up` is this with
files and the command line around it (up.py). LocalCluster is the same for programs without a
loop: it brings its own, in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

import msgspec

from kdns.api.access import (
    Credentials,
    is_host,
    kubeconfig,
    load_credentials,
    make_credentials,
    server_context,
    write_private,
)
from kdns.api.allocate import Allocator
from kdns.api.controllers import ControllerOptions, Controllers
from kdns.api.declare import Declared, apply_all, read_documents
from kdns.api.faults import ApiFaults, Fault
from kdns.api.feed import StoreFeed
from kdns.api.http import ApiServer
from kdns.api.kinds import BY_PLURAL, RESOURCES, Resource
from kdns.api.objects import Objects
from kdns.api.store import Obj, ObjectStore
from kdns.app import App
from kdns.control import fits
from kdns.dns import types as t
from kdns.dns.message import Query, Reply, failure, make_query
from kdns.dns.name import BadName, render_name
from kdns.dns.reverse import reverse_name
from kdns.dns.text import render_rdata
from kdns.errors import ApiError, ConfigError, KdnsError, Problem, reason_of
from kdns.lookup import Lookup, in_a_pod
from kdns.metrics import Metrics
from kdns.plugins.chain import Pending, Result
from kdns.registry.spec import KubeSpec
from kdns.server.client import candidates, search_path
from kdns.server.loop import new_loop

if TYPE_CHECKING:
    from kdns.registry.manifests import Document

T = TypeVar("T")
# A path, YAML or JSON text, an object, or several of all these.
Manifests: TypeAlias = "str | os.PathLike[str] | Mapping[str, Any] | Iterable[Manifests]"
# name or "namespace/name" -> a port; addresses, with or without one; a name elsewhere.
Services: TypeAlias = "Mapping[str, int | str | Sequence[str]]"
# Named here, for in Cluster `list` is a method.
Texts: TypeAlias = list[str]
Objs: TypeAlias = list[Obj]

MANAGER: Final = "kdns"
STORE_FILE: Final = "objects.db"
CONTROL: Final = "control.sock"
PATIENCE: Final = 5.0  # seconds that something is waited for, unless told otherwise
LOOK: Final = 0.05  # seconds between two looks at what no commit tells of
STOP: Final = 10.0  # seconds a thread may take to start and to end
EVERYWHERE: Final = ("0.0.0.0", "::")
SLICES: Final = BY_PLURAL["discovery.k8s.io", "endpointslices"]
# kubeadm's, without what listens on ports of its own.
COREFILE: Final = """\
. {{
    bind {bind}
    errors
    kubernetes cluster.local in-addr.arpa ip6.arpa {{
        pods insecure
        fallthrough in-addr.arpa ip6.arpa
        ttl 30
    }}
    loop
    forward . {upstream} {{
        max_concurrent 1000
    }}
    cache 30
    loadbalance
}}
"""
# Nobody else is asked: there is no other name.
ALONE: Final = """\
cluster.local in-addr.arpa ip6.arpa {{
    bind {bind}
    errors
    kubernetes cluster.local in-addr.arpa ip6.arpa {{
        pods insecure
        ttl 30
    }}
    cache 30
    loadbalance
}}
. {{
    bind {bind}
    template ANY ANY {{
        rcode NXDOMAIN
    }}
}}
"""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the DNS server says. name -- the one that was found on the search path"""

    name: str
    rcode: str
    values: tuple[str, ...]


class Cluster:
    """One cluster. `async with`, or start() and stop().

    services     -- what is there from the start: {"web": 80} is a Service with that port,
                    {"db": ["192.0.2.7:5432"]} one with these endpoints and no address of its
                    own, {"mail": "mail.example.com"} another name; "shop/web" is in a
                    namespace. Or manifests, as for apply()
    nodes        -- how many Nodes there are: node1, node2, ...
    node_addresses -- theirs; addresses of documentation where these end
    zones        -- topology zones, dealt out to the Nodes in turn
    dns          -- serve DNS, too
    tls          -- HTTPS and a token; else plain HTTP, for every program of this host
    data_dir     -- where objects, certificate and token outlive the cluster; "": nowhere
    api_names    -- more names and addresses by which the API is reached: TLS has them in its
                    certificate; without, a name that is neither here nor this host's is refused
    api_port, dns_port -- 0: any free one
    service_cidr, pod_cidr, lb_range -- ranges of addresses, one a family
    pod_ready_delay -- seconds until a new Pod is ready
    pod_termination_delay -- seconds that a deleted Pod is still there, terminating
    upstream     -- who answers for all other names: addresses, or a resolv.conf; "": nobody
    corefile     -- path of a Corefile for DNS instead of kubeadm's
    guest        -- the process is not the cluster's own: its log and memory stay as they are
    gate_timeout -- an agent in this process will forward: seconds that names wait for its
                    rules, at most; 0: they do not. None: nobody forwards
    control      -- somebody serves a control socket: its path, "": beside the kubeconfig. The
                    kubeconfig names it; None: nobody does
    """

    def __init__(
        self,
        services: Services | Manifests | None = None,
        *,
        nodes: int = 1,
        node_addresses: Sequence[str] = (),
        zones: Sequence[str] = (),
        dns: bool = True,
        tls: bool = False,
        data_dir: str | os.PathLike[str] = "",
        bind: str = "127.0.0.1",
        api_names: Sequence[str] = (),
        api_port: int = 0,
        dns_port: int = 0,
        service_cidr: str = "10.96.0.0/12",
        pod_cidr: str = "10.244.0.0/16",
        lb_range: str = "203.0.113.0/24",
        pod_ready_delay: float = 0.0,
        pod_termination_delay: float = 0.0,
        upstream: str = "",
        corefile: str | os.PathLike[str] = "",
        guest: bool = True,
        gate_timeout: float | None = None,
        control: str | None = None,
    ) -> None:
        self._control_wish = control
        self._control_folder: Path | None = None
        self.control = ""
        self._gate_timeout = gate_timeout
        self._services = services
        self._nodes = nodes
        self._node_addresses = tuple(node_addresses)
        self._zones = tuple(zones)
        self._with_dns = dns
        self._tls = tls
        self._data_dir = Path(data_dir) if data_dir else None
        self._bind = bind
        self._api_names = tuple(name.rstrip(".").lower() for name in api_names)
        self._ports = (api_port, dns_port)
        self._ranges = (service_cidr, pod_cidr, lb_range)
        self._pod_ready_delay = pod_ready_delay
        self._pod_termination_delay = pod_termination_delay
        self._upstream = upstream
        self._corefile = os.fspath(corefile)
        self._guest = guest
        self._folder = Path()
        self._temporary: Path | None = None
        self._credentials = Credentials()
        self._dns_task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = 0
        self._broken: Sequence[Fault] = ()
        self._wrote = False  # the kubeconfig
        self.store: ObjectStore | None = None
        self.api: ApiServer | None = None
        self.controllers: Controllers | None = None
        self.app: App | None = None

    # --- start and end ------------------------------------------------------------------

    async def __aenter__(self) -> Cluster:
        return await self.start()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    async def start(self) -> Cluster:
        """Start everything; return when names and objects are there. Raises ConfigError."""
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def _start(self) -> None:
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
        services, pods, balancers = map(_ranges, self._ranges)
        allocator = Allocator(services, pod_ranges=pods, lb_ranges=balancers)
        self._folder = self._make_folder()
        self.control = self._find_control()
        path = str(self._folder / STORE_FILE) if self._data_dir is not None else ""
        store = ObjectStore(path)
        await store.open()
        self.store = store
        given = (*store.items("services"), *store.items("pods"))
        allocator.load(one.obj for one in given)
        self.objects = Objects(store, allocator)
        self.feed = StoreFeed(store)
        self.metrics = Metrics()
        await self._start_api()
        if self._with_dns:
            await self._start_dns()
        await self._start_controllers()
        if self._services is not None:
            await self._apply_services(self._services)
        assert self.api is not None
        write_private(Path(self.kubeconfig), self.kubeconfig_text.encode())
        self._wrote = True
        self.api.ready = lambda: True

    def _make_folder(self) -> Path:
        if self._data_dir is None:
            self._temporary = Path(tempfile.mkdtemp(prefix="kdns-"))
            return self._temporary
        try:
            self._data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as e:
            text = f"cannot be made: {e.strerror}"
            raise ConfigError([Problem(str(self._data_dir), 0, text)]) from None
        return self._data_dir

    def _find_control(self) -> str:
        """Return the path of the control socket."""
        if self._control_wish is None:
            return ""
        path = os.path.abspath(self._control_wish or self._folder / CONTROL)
        if not self._control_wish and not fits(path):
            # The kubeconfig says where it is; so it may be anywhere.
            self._control_folder = Path(tempfile.mkdtemp(prefix="kdns-"))
            path = str(self._control_folder / CONTROL)
        return path

    async def _start_api(self) -> None:
        context = None
        hosts = self._hosts()
        if self._tls:
            if self._data_dir is not None:
                self._credentials = load_credentials(self._folder, hosts)
            else:
                self._credentials = make_credentials(hosts)
            context = server_context(self._credentials, self._folder)
        api = ApiServer(
            self.objects, self.metrics, host=self._bind, port=self._ports[0], context=context,
            token=self._credentials.token, names=[name.lower() for name in hosts],
        )  # fmt: skip
        assert self.store is not None
        self.faults = ApiFaults(api, self.store)
        api.ready = lambda: False  # until all the rest is there
        if self._guest:
            api.fault = self.faults.meet
        try:
            await api.start()
        except OSError as e:
            raise ConfigError(
                [Problem("api_port", 0, f"{self._bind}:{self._ports[0]}: cannot listen:"
                                        f" {reason_of(e)}; 0 picks a free port")]
            ) from None  # fmt: skip
        self.api = api

    def _hosts(self) -> Texts:
        """Return the names and addresses of the API server, which its certificate is for."""
        for name in self._api_names:
            if not is_host(name):
                text = f"'{name}' is neither a host name, such as kdns.example, nor an IP address"
                raise ConfigError([Problem("api_names", 0, text)])
        names = ["localhost", socket.gethostname(), "kubernetes", "kubernetes.default",
                 "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"]  # fmt: skip
        # Without TLS there is no certificate, and every address is right.
        if self._tls and self._bind in EVERYWHERE:
            from kdns.kernel.netlink import default_address

            names += filter(None, (default_address(4), default_address(6)))
        return list(dict.fromkeys([self._bind, "127.0.0.1", "::1", *names, *self._api_names]))

    async def _start_controllers(self) -> None:
        assert self.api is not None
        self.controllers = Controllers(
            self.objects,
            ControllerOptions(
                nodes=self._nodes,
                node_addresses=self._node_addresses,
                zones=self._zones,
                pod_ready_delay=self._pod_ready_delay,
                pod_termination_delay=self._pod_termination_delay,
                api_address=(_reachable(self._bind), self.api.port),
                dns_address=self.dns if self.app is not None else None,
                root_ca=self._credentials.ca.decode(),
            ),
        )
        await self.controllers.start()
        await self.controllers.settle()

    async def _start_dns(self) -> None:
        text = None
        if not self._corefile:
            text = COREFILE if self._upstream else ALONE
            text = text.format(bind=self._bind, upstream=self._upstream)
        self.app = App(
            self._corefile or None, text=text, dns_port=self._ports[1], follow=self.feed.follow,
            guest=True,
            forwarding=None if self._gate_timeout is None else KubeSpec(node=self.forwarder),
            gate_timeout=self._gate_timeout or 0.0,
        )  # fmt: skip
        started = asyncio.Event()
        self._dns_task = asyncio.create_task(self.app.run(started.set), name="kdns dns")
        waiting = asyncio.create_task(started.wait())
        await asyncio.wait((self._dns_task, waiting), return_when=asyncio.FIRST_COMPLETED)
        if not started.is_set():
            waiting.cancel()
            task, self._dns_task = self._dns_task, None
            try:
                await task
            except ConfigError as e:
                raise ConfigError([self._dns_problem(one) for one in e.problems]) from None
        if not any(one.place.scheme == "dns" for one in self.app.listeners.values()):
            text = "serves no plain DNS: write a block such as '. { ... }'"
            raise ConfigError([Problem(self._corefile, 0, text)])

    def _dns_problem(self, problem: Problem) -> Problem:
        """Name the port that cannot be had by what asked for it."""
        if self._corefile or "://" not in problem.file:
            return problem
        text = f"{problem.file.partition('://')[2]}: {problem.text}; 0 picks a free port"
        return Problem("dns_port", 0, text)

    async def stop(self) -> None:
        """End everything; what was acknowledged is kept where there is a data_dir."""
        try:
            if self.api is not None:
                await self.api.stop()
            if self.controllers is not None:
                await self.controllers.stop()
            await self._stop_dns()
        finally:
            if self.store is not None:
                await self.store.close()
            if self._control_folder is not None:
                shutil.rmtree(self._control_folder, ignore_errors=True)
            if self._temporary is not None:
                shutil.rmtree(self._temporary, ignore_errors=True)
            elif self._wrote:
                # Only ours: a start that failed may have met another one's.
                Path(self.kubeconfig).unlink(missing_ok=True)

    async def _stop_dns(self) -> None:
        task, self._dns_task = self._dns_task, None
        if self.app is None or task is None:
            return
        self.app.stop()
        self.app.stop()  # at once: nobody waits for a lameduck here
        await asyncio.wait((task,))
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error

    # --- where it is ----------------------------------------------------------------------

    @property
    def api_url(self) -> str:
        assert self.api is not None, "the cluster is not started"
        host = _reachable(self._bind)
        scheme = "https" if self._credentials.secure else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.api.port}"

    @property
    def dns(self) -> tuple[str, int]:
        """Where DNS is served, over UDP and TCP."""
        assert self.app is not None, "the cluster has no DNS, or is not started"
        return _reachable(self._bind), self.app.port()

    @property
    def kubeconfig_text(self) -> str:
        return kubeconfig(self.api_url, self._credentials, control=self.control)

    @property
    def kubeconfig_dict(self) -> dict[str, Any]:
        """For kubernetes.config.load_kube_config_from_dict()."""
        import yaml

        found: dict[str, Any] = yaml.safe_load(self.kubeconfig_text)
        return found

    @property
    def kubeconfig(self) -> str:
        """Path of a kubeconfig, there as long as the cluster is."""
        return str(self._folder / "kubeconfig")

    # --- objects --------------------------------------------------------------------------

    async def apply(
        self, manifests: Manifests, *, namespace: str = "default", settle: bool = True
    ) -> Objs:
        """Apply manifests (path, text, object, or several), and wait for what controllers
        make of them; return the objects. Raises ApiError for the first that is refused."""
        declared = self._declared(manifests, namespace)
        applied = await apply_all(self.objects, declared, MANAGER)
        refused = [one for one in applied if one.error is not None]
        if refused:
            error = refused[0].error
            assert error is not None
            for one in refused:
                error.add_note(f"{one.declared.where}: {one.declared}: {one.error}")
            raise error
        if settle:
            await self.settle()
        return [one.result.obj for one in applied if one.result is not None]

    async def delete(
        self,
        what: Manifests,
        name: str = "",
        *,
        namespace: str = "default",
        missing_ok: bool = False,
        settle: bool = True,
    ) -> None:
        """Delete delete("service", "web"), or what manifests name. Raises ApiError 404."""
        if name and isinstance(what, str):
            resource = resource_of(what)
            keys = [(resource, namespace if resource.namespaced else "", name)]
        else:
            declared = self._declared(what, namespace)
            keys = [(one.resource, one.namespace, one.name) for one in reversed(declared)]
        for resource, space, one in keys:
            try:
                await self.objects.delete(resource, space, one)
            except ApiError as e:
                if e.code != 404 or not missing_ok:
                    raise
        if settle:
            await self.settle()

    def get(self, kind: str, name: str, namespace: str = "default") -> Obj:
        """Return an object: get("svc", "web"). Raises ApiError 404."""
        return self.objects.get(resource_of(kind), namespace, name).obj

    def list(
        self, kind: str, namespace: str = "default", *, labels: str = "", fields: str = ""
    ) -> Objs:
        """Return objects by namespace and name; namespace "": of all."""
        resource = resource_of(kind)
        space = namespace if resource.namespaced else ""
        listing = self.objects.list(resource, space, labels=labels, fields=fields)
        return [one.obj for one in listing.items]

    def endpoints(self, service: str, namespace: str = "default") -> Texts:
        """Return where a Service's ready endpoints are: "10.244.0.5:8080", sorted; without
        ports the addresses alone."""
        selector = f"kubernetes.io/service-name={service}"
        listing = self.objects.list(SLICES, namespace, labels=selector)
        return sorted(place for one in listing.items for place in _places(one.obj))

    @property
    def forwarder(self) -> str:
        """The Node on whose behalf this host forwards, if it does: the first one."""
        assert self.store is not None, "the cluster is not started"
        given: Texts = [one.obj["metadata"]["name"] for one in self.store.items("nodes")]
        return min([*given, *(f"node{number}" for number in range(1, self._nodes + 1))])

    async def settle(self) -> None:
        """Wait until the controllers have nothing left to do, and names for no rules."""
        assert self.controllers is not None, "the cluster is not started"
        await self.controllers.settle()
        for pipeline, _ in [*self.app.pipelines.values()] if self.app is not None else ():
            await pipeline.settle()

    def _declared(self, manifests: Manifests, namespace: str) -> Sequence[Declared]:
        declared, problems = read_documents(_documents(manifests), namespace)
        if problems:
            raise ConfigError([Problem(p.file, p.line, p.text) for p in problems])
        return declared

    async def _apply_services(self, services: Services | Manifests) -> None:
        if isinstance(services, Mapping) and "kind" not in services:
            services = [obj for name, what in services.items() for obj in _service(name, what)]
        await self.apply(services)

    # --- names ----------------------------------------------------------------------------

    async def resolve(self, name: str, type: str = "A", namespace: str = "default") -> Texts:
        """Return what a Pod of `namespace` finds for a name (for an address: its name),
        sorted; [] where there is no such name. Raises KdnsError if DNS fails to say."""
        answer = await self.query(name, type, namespace)
        if answer.rcode not in ("NOERROR", "NXDOMAIN"):
            raise KdnsError(f"{answer.name} {type}: {answer.rcode}")
        return list(answer.values)

    async def query(self, name: str, type: str = "A", namespace: str = "default") -> Answer:
        """Return what the DNS server answers a Pod of `namespace`."""
        with contextlib.suppress(ValueError):
            return await self._ask_for(reverse_name(name), t.PTR)
        qtype = t.type_number(type)
        if qtype is None:
            raise ValueError(f"{type!r} is not a record type; say A, SRV, PTR, TXT, ...")
        try:
            names = candidates(name, search_path([namespace]))
        except (BadName, UnicodeError) as e:
            raise ValueError(f"{name!r} is not a domain name: {e}") from None
        tried = [await self._ask_for(names[0], qtype)]
        for one in names[1:]:
            if tried[-1].values:
                break
            tried.append(await self._ask_for(one, qtype))
        return min(tried, key=_usefulness)

    async def _ask_for(self, name: bytes, qtype: int) -> Answer:
        reply = await self._ask(name, qtype)
        found = [render_rdata(rr.type, rr.rdata) for rr in reply.answer or () if rr.type == qtype]
        return Answer(render_name(name), t.rcode_name(reply.rcode), tuple(sorted(found)))

    async def _ask(self, name: bytes, qtype: int) -> Reply:
        """Put a question to the server's own chain."""
        assert self._loop is not None
        future: asyncio.Future[Any] = self._loop.create_future()

        def done(outcome: Any) -> None:
            if not future.done():
                future.set_result(outcome)

        result = self._put(name, qtype, done)
        if isinstance(result, Pending):
            result = await future
        return result if isinstance(result, Reply) else failure(t.REFUSED)

    def _put(self, name: bytes, qtype: int, done: Callable[[Any], None]) -> Result:
        assert self.app is not None, "the cluster has no DNS, or is not started"
        listener = next(x for x in self.app.listeners.values() if x.place.scheme == "dns")
        query = make_query(name, qtype, proto="tcp", received=time.monotonic())
        return listener.exchange.answer(query, done)

    def _ask_now(self, name: bytes, qtype: int) -> Reply | None:
        """For Lookup: answer in whatever thread; None where an upstream must be asked."""
        assert self._loop is not None
        if threading.get_ident() == self._thread:
            result = self._put(name, qtype, lambda outcome: None)
            return result if isinstance(result, Reply) else None
        future: Future[Reply | None] = Future()

        def ask() -> None:
            try:
                result = self._put(name, qtype, lambda outcome: None)
                future.set_result(result if isinstance(result, Reply) else None)
            except BaseException as e:
                future.set_exception(e)

        self._loop.call_soon_threadsafe(ask)
        return future.result(PATIENCE)

    async def wait_resolves(
        self,
        name: str,
        type: str = "A",
        namespace: str = "default",
        *,
        to: str | Iterable[str] | None = None,
        timeout: float = PATIENCE,
    ) -> Texts:
        """Wait until a name resolves, to just these values if any are given (`to=[]`: until it
        does not); return what it resolves to. Raises TimeoutError."""
        wanted = None if to is None else sorted([to] if isinstance(to, str) else to)
        assert self.store is not None
        woken = asyncio.Event()
        end = self.store.subscribe(lambda events: woken.set())
        until = time.monotonic() + timeout
        answer = None
        try:
            while True:
                woken.clear()
                answer = await self.query(name, type, namespace)
                found = list(answer.values)
                if found == wanted or (wanted is None and found):
                    return found
                left = until - time.monotonic()
                if left <= 0:
                    break
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(left, LOOK)):
                        await woken.wait()
        finally:
            end()
        hoped = "" if wanted is None else f" to {', '.join(wanted) or 'nothing'}"
        says = ", ".join(answer.values) or answer.rcode
        raise TimeoutError(f"{name} {type} does not resolve{hoped} in {timeout:g} s: {says}")

    @contextlib.contextmanager
    def resolver(self, namespace: str = "default") -> Iterator[None]:
        """While the `with` lasts, have socket.getaddrinfo(), and with it asyncio, aiohttp,
        requests and others, find the cluster's names as in a Pod of `namespace`."""
        zones = [
            zone
            for plugin in (self.app.site.plugins() if self.app and self.app.site else ())
            if plugin.word == "kubernetes"
            for zone in plugin.zones  # type: ignore[attr-defined]
        ]
        with in_a_pod(Lookup(self._ask_now, zones, namespace)):
            yield

    # --- faults ---------------------------------------------------------------------------

    def delay(self, seconds: float, path: str = "") -> Fault:
        """Have requests whose path contains `path` wait."""
        return self.faults.delay(seconds, path)

    def fail(self, status: int = 500, times: int | None = None, path: str = "") -> Fault:
        """Have requests whose path contains `path` fail, all or the next `times`."""
        return self.faults.fail(status, times, path)

    async def expire_watches(self) -> None:
        """End all watches; going on from where they were gets 410 Expired."""
        await self.faults.expire_watches()

    def drop_connections(self) -> None:
        """Cut all connections to the API server; it can be reached again at once."""
        self.faults.drop_connections()

    def dns_servfail(self) -> Fault:
        """Have DNS answer SERVFAIL to everything."""
        assert self.app is not None
        if self.app.worker_pids():
            raise KdnsError("dns_servfail: the Corefile has 'workers'; only one process can do it")
        listeners = list(self.app.listeners.values())
        routers = [listener.exchange.router for listener in listeners]
        for listener in listeners:
            listener.exchange.router = _Failing()  # type: ignore[assignment]
        self._forget()

        def end() -> None:
            for listener, router in zip(listeners, routers, strict=True):
                if isinstance(listener.exchange.router, _Failing):
                    listener.exchange.router = router
            self._forget()

        return self._noted(Fault(end))

    def dns_stale(self) -> Fault:
        """Have DNS, and forwarding, learn of nothing new: as behind a watch that is dead."""
        self.feed.freeze()
        return self._noted(Fault(self.feed.thaw))

    def reset(self) -> None:
        """End all faults."""
        self.faults.reset()
        for fault in self._broken:
            fault.end()
        self._broken = ()

    def _noted(self, fault: Fault) -> Fault:
        self._broken = (*self._broken, fault)
        return fault

    def _forget(self) -> None:
        assert self.app is not None
        for listener in self.app.listeners.values():
            for cache in listener.caches:
                cache.clear()


class _Failing:
    """In the place of a Router."""

    def resolve(self, query: Query) -> Reply:
        return failure(t.SERVFAIL, "a fault asked for")


# --- what is handed to a cluster -----------------------------------------------------------


def _ranges(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def resource_of(word: str) -> Resource:
    """Return the resource that a word stands for as kubectl takes it: svc, service, services,
    Service, deployments.apps. Raises ValueError."""
    small = word.lower()
    for one in RESOURCES:
        if small in (one.singular, one.plural, *one.short_names, one.qualified):
            return one
    known = ", ".join(one.plural for one in RESOURCES)
    raise ValueError(f"there is no resource {word!r} here; there are {known}")


def _documents(what: Manifests) -> Iterator[Document]:
    """Yield the documents of all that apply() takes."""
    from kdns.registry.manifests import Document
    from kdns.source.manifests import files_below

    if isinstance(what, Mapping):
        yield Document("manifest", json.loads(msgspec.json.encode(what)))
    elif isinstance(what, str) and ("\n" in what or what.lstrip().startswith("{")):
        yield from _parsed("manifest", what.encode())
    elif isinstance(what, (str, os.PathLike)):
        path = os.fspath(what)
        found = list(files_below(path))
        if not found:
            text = "holds no manifests" if os.path.isdir(path) else "does not exist"
            raise ConfigError([Problem(path, 0, text)])
        for file in found:
            yield from _parsed(file, Path(file).read_bytes())
    else:
        for one in what:
            yield from _documents(one)


def _parsed(path: str, content: bytes) -> Sequence[Document]:
    from kdns.source.manifests import parse_documents

    try:
        return parse_documents(path, content)
    except ValueError as e:
        raise ConfigError([broken_file(str(e))]) from None


def broken_file(text: str) -> Problem:
    """Return a problem from parse_documents' "FILE:LINE: text"."""
    where, _, rest = text.partition(": ")
    file, _, line = where.rpartition(":")
    return Problem(file, int(line), rest) if line.isdigit() and file else Problem(where, 0, rest)


def _service(name: str, what: int | str | Sequence[str]) -> Iterator[Obj]:
    """Yield the objects of one of `services`."""
    namespace, _, short = name.rpartition("/")
    meta = {"name": short, "namespace": namespace or "default"}
    head = {"apiVersion": "v1", "kind": "Service", "metadata": meta}
    if isinstance(what, int):
        yield {**head, "spec": {"ports": [{"port": what}]}}
        return
    places = [what] if isinstance(what, str) else list(what)
    parsed = [_place(one) for one in places]
    if len(places) == 1 and parsed[0] is None:
        yield {**head, "spec": {"type": "ExternalName", "externalName": places[0]}}
        return
    by_kind: dict[tuple[str, int], list[str]] = {}
    for text, place in zip(places, parsed, strict=True):
        if place is None:
            raise ValueError(f"services: {name}: {text!r} is not ADDRESS or ADDRESS:PORT")
        family = "IPv6" if ":" in place[0] else "IPv4"
        by_kind.setdefault((family, place[1]), []).append(place[0])
    ports = sorted({port for _, port in by_kind if port})
    named = [{"name": f"p{port}", "port": port} for port in ports]
    families = list(dict.fromkeys(family for family, _ in by_kind))
    spec: Obj = {"clusterIP": "None", "ipFamilies": families[:1]}
    yield {**head, "spec": spec | ({"ports": named} if named else {})}
    for number, ((family, port), addresses) in enumerate(by_kind.items()):
        yield {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": f"{short}-{number}",
                "namespace": meta["namespace"],
                "labels": {"kubernetes.io/service-name": short},
            },
            "addressType": family,
            "ports": [{"name": f"p{port}", "port": port}] if port else [],
            "endpoints": [{"addresses": [one]} for one in addresses],
        }


def _place(text: str) -> tuple[str, int] | None:
    """Return (address, port or 0) of "192.0.2.7:80", "[2001:db8::1]:80" or an address."""
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(text)), 0
    host, _, port = text.rpartition(":")
    try:
        return str(ipaddress.ip_address(host.strip("[]"))), int(port)
    except ValueError:
        return None


def _places(one: Obj) -> Iterator[str]:
    numbers = [p["port"] for p in one.get("ports") or () if p.get("port") is not None]
    for endpoint in one.get("endpoints") or ():
        if (endpoint.get("conditions") or {}).get("ready") is False:
            continue
        for address in endpoint["addresses"]:
            host = f"[{address}]" if ":" in address and numbers else address
            yield from (f"{host}:{number}" for number in numbers)
            if not numbers:
                yield address


def _usefulness(answer: Answer) -> int:
    """As a resolver: records, else that there are none, else a failure, else no such name."""
    if answer.rcode == "NOERROR":
        return 0 if answer.values else 1
    return 3 if answer.rcode == "NXDOMAIN" else 2


def _reachable(address: str) -> str:
    """Return where a program of this host reaches what listens at an address."""
    return {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(address, address)


# --- without a loop -------------------------------------------------------------------------


class LocalCluster:
    """A Cluster in a thread of its own, for programs and tests without a loop: `with`, or
    start() and stop(). Takes what Cluster takes, and its methods wait."""

    def __init__(self, services: Services | Manifests | None = None, **options: Any) -> None:
        self.cluster = Cluster(services, **options)
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def __enter__(self) -> LocalCluster:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> LocalCluster:
        """Start it; return when names and objects are there. Raises ConfigError."""
        self._loop = new_loop()
        self._thread = threading.Thread(
            target=self._run, args=(self._loop,), name="kdns cluster", daemon=True
        )
        self._thread.start()
        try:
            self._wait(self.cluster.start())
        except BaseException:
            self._end()
            raise
        return self

    def stop(self) -> None:
        if self._loop is None:
            return
        try:
            self._wait(self.cluster.stop())
        finally:
            self._end()

    @staticmethod
    def _run(loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
        finally:
            left = asyncio.all_tasks(loop)
            for task in left:
                task.cancel()
            if left:
                loop.run_until_complete(asyncio.wait(left, timeout=STOP))
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()

    def _end(self) -> None:
        loop, self._loop = self._loop, None
        if loop is not None and self._thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            self._thread.join(STOP)

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        assert self._loop is not None, "the cluster is not started"
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call a function in the cluster's own thread: its state is that thread's."""

        async def call() -> T:
            return function(*args, **kwargs)

        return self._wait(call())

    # --- as Cluster -----------------------------------------------------------------------

    @property
    def api_url(self) -> str:
        return self.cluster.api_url

    @property
    def dns(self) -> tuple[str, int]:
        """Where DNS is served, over UDP and TCP."""
        return self.cluster.dns

    @property
    def kubeconfig(self) -> str:
        """Path of a kubeconfig, there as long as the cluster is."""
        return self.cluster.kubeconfig

    @property
    def kubeconfig_dict(self) -> dict[str, Any]:
        """For kubernetes.config.load_kube_config_from_dict()."""
        return self.cluster.kubeconfig_dict

    def apply(
        self, manifests: Manifests, *, namespace: str = "default", settle: bool = True
    ) -> Objs:
        """Apply manifests (path, text, object, or several), and wait for what controllers
        make of them; return the objects. Raises ApiError for the first that is refused."""
        return self._wait(self.cluster.apply(manifests, namespace=namespace, settle=settle))

    def delete(
        self,
        what: Manifests,
        name: str = "",
        *,
        namespace: str = "default",
        missing_ok: bool = False,
        settle: bool = True,
    ) -> None:
        """Delete delete("service", "web"), or what manifests name. Raises ApiError 404."""
        self._wait(
            self.cluster.delete(
                what, name, namespace=namespace, missing_ok=missing_ok, settle=settle
            )
        )

    def get(self, kind: str, name: str, namespace: str = "default") -> Obj:
        """Return an object: get("svc", "web"). Raises ApiError 404."""
        return self._call(self.cluster.get, kind, name, namespace)

    def list(
        self, kind: str, namespace: str = "default", *, labels: str = "", fields: str = ""
    ) -> Objs:
        """Return objects by namespace and name; namespace "": of all."""
        return self._call(self.cluster.list, kind, namespace, labels=labels, fields=fields)

    def endpoints(self, service: str, namespace: str = "default") -> Texts:
        """Return where a Service's ready endpoints are: "10.244.0.5:8080", sorted."""
        return self._call(self.cluster.endpoints, service, namespace)

    def settle(self) -> None:
        """Wait until the controllers have nothing left to do."""
        self._wait(self.cluster.settle())

    def resolve(self, name: str, type: str = "A", namespace: str = "default") -> Texts:
        """Return what a Pod of `namespace` finds for a name, sorted; [] where there is none."""
        return self._wait(self.cluster.resolve(name, type, namespace))

    def query(self, name: str, type: str = "A", namespace: str = "default") -> Answer:
        """Return what the DNS server answers a Pod of `namespace`."""
        return self._wait(self.cluster.query(name, type, namespace))

    def wait_resolves(
        self,
        name: str,
        type: str = "A",
        namespace: str = "default",
        *,
        to: str | Iterable[str] | None = None,
        timeout: float = PATIENCE,
    ) -> Texts:
        """Wait until a name resolves, to just these values if any are given (`to=[]`: until it
        does not); return what it resolves to. Raises TimeoutError."""
        return self._wait(self.cluster.wait_resolves(name, type, namespace, to=to, timeout=timeout))

    @contextlib.contextmanager
    def resolver(self, namespace: str = "default") -> Iterator[None]:
        """While the `with` lasts, have socket.getaddrinfo(), and with it asyncio, aiohttp,
        requests and others, find the cluster's names as in a Pod of `namespace`."""
        with self.cluster.resolver(namespace):
            yield

    def delay(self, seconds: float, path: str = "") -> Fault:
        """Have requests whose path contains `path` wait."""
        return self._fault(self.cluster.delay, seconds, path)

    def fail(self, status: int = 500, times: int | None = None, path: str = "") -> Fault:
        """Have requests whose path contains `path` fail, all or the next `times`."""
        return self._fault(self.cluster.fail, status, times, path)

    def expire_watches(self) -> None:
        """End all watches; going on from where they were gets 410 Expired."""
        self._wait(self.cluster.expire_watches())

    def drop_connections(self) -> None:
        """Cut all connections to the API server; it can be reached again at once."""
        self._call(self.cluster.drop_connections)

    def dns_servfail(self) -> Fault:
        """Have DNS answer SERVFAIL to everything."""
        return self._fault(self.cluster.dns_servfail)

    def dns_stale(self) -> Fault:
        """Have DNS, and forwarding, learn of nothing new: as behind a watch that is dead."""
        return self._fault(self.cluster.dns_stale)

    def reset(self) -> None:
        """End all faults."""
        self._call(self.cluster.reset)

    def _fault(self, function: Callable[..., Fault], *args: Any) -> Fault:
        fault = self._call(function, *args)
        return Fault(lambda: self._call(fault.end))
