"""What there is to reason from: registry, Corefile, settings, and what the kernel holds.

Decides where each piece is read, and says so in words; what follows from it is trace.py's and
check.py's. Three origins: manifests (nothing runs), a cluster's API server (neither kdns nor
root is needed there), and a running kdns (its control socket).

Objects are kept twice: as the registry reads them, and as they came, for what the registry has
no use for (a Pod's dnsPolicy, when an object was made).
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import struct
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, cast

import msgspec

from kdns.agent import families_here, list_registry, may_write
from kdns.errors import (
    ApplyError,
    ConfigError,
    KdnsError,
    ObjectError,
    Problem,
    SourceError,
    Unreachable,
)
from kdns.kernel.conntrack import (
    ADDRESS_FAMILY,
    CT_GET,
    CTA_PROTO_DST_PORT,
    CTA_PROTO_NUM,
    CTA_PROTO_SRC_PORT,
    CTA_TUPLE_IP,
    CTA_TUPLE_ORIG,
    CTA_TUPLE_PROTO,
    CTA_TUPLE_REPLY,
)
from kdns.kernel.modes import IPVS_INTERFACE, SIGNS
from kdns.kernel.netlink import NLMSG_DONE, Netfilter, attributes, messages, node_addresses
from kdns.kernel.programs import Variant, path_of, read_saved, run_program, which
from kdns.proxy.config import Mode, ProxyConfig, parse_config
from kdns.proxy.conntrack import Flow
from kdns.proxy.flags import parse_flags, settle
from kdns.proxy.options import Family, Protocol
from kdns.proxy.packet import Host
from kdns.registry.decode import convert
from kdns.registry.objects import (
    ENDPOINT_SLICE,
    NAMESPACE,
    NODE,
    POD,
    SERVICE,
    SERVICE_CIDR,
    SERVICE_IMPORT,
    Key,
    Kind,
    Object,
)
from kdns.registry.snapshot import Snapshot
from kdns.registry.spec import KubeSpec, ManifestSpec
from kdns.registry.store import Store
from kdns.server.client import Server

Origin: TypeAlias = Literal["manifests", "api", "kdns"]
# An object as it came: parsed JSON or YAML.
Json: TypeAlias = Mapping[str, Any]
# kind, namespace ("" for what has none), name
RawKey: TypeAlias = tuple[str, str, str]

# kubeadm's, for where nobody says by which Corefile names are answered.
COREFILE: Final = """\
.:53 {
    errors
    health
    ready
    kubernetes cluster.local in-addr.arpa ip6.arpa {
        pods insecure
        fallthrough in-addr.arpa ip6.arpa
        ttl 30
    }
    forward . /etc/resolv.conf {
        max_concurrent 1000
    }
    cache 30
    loop
    loadbalance
}
"""
COREFILE_MAP: Final = "/api/v1/namespaces/kube-system/configmaps/coredns"
CLUSTER_CIDR: Final = "10.244.0.0/16,fd00:10:244::/56"
KINDS: Final[tuple[Kind, ...]] = (
    SERVICE, NAMESPACE, ENDPOINT_SLICE, POD, NODE, SERVICE_CIDR, SERVICE_IMPORT,
)  # fmt: skip
# Many clusters do not have them: a CRD, and what came with 1.33.
NOT_EVERYWHERE: Final = (SERVICE_IMPORT, SERVICE_CIDR)
# Whose Pods may have no manifest of their own.
WORKLOADS: Final = ("Deployment", "ReplicaSet", "StatefulSet", "DaemonSet", "ReplicationController")
MOST_FLOWS: Final = 20_000
READ_TIMEOUT: Final = 60.0  # seconds a program may take to print its rules
API_TIMEOUT: Final = 30.0  # seconds one answer of the API server may take
CONNECT_TIMEOUT: Final = 5.0
_NFGEN: Final = struct.Struct("=BBH")  # struct nfgenmsg
_PROTOCOLS: Final[Mapping[int, Protocol]] = {6: "tcp", 17: "udp", 132: "sctp"}
_WORD: Final[Mapping[Family, str]] = {4: "ip", 6: "ip6"}


@dataclass(frozen=True, slots=True)
class Where:
    """Where to look, as a command line says it; "" or empty: not said.

    manifests  -- files and folders
    control    -- of a running kdns: the path of its socket
    corefile   -- a file in place of what would be found
    node       -- whose rules
    mode       -- of the rules that are computed
    server     -- a DNS server to ask, "ADDRESS" or "ADDRESS:PORT"
    use_kernel -- read this host's rules and flows if that is allowed
    """

    manifests: tuple[str, ...] = ()
    kubeconfig: str = ""
    context: str = ""
    control: str = ""
    corefile: str = ""
    node: str = ""
    mode: Mode | Literal[""] = ""
    cluster_cidr: str | None = None
    server: str = ""
    use_kernel: bool = True


@dataclass(frozen=True, slots=True)
class KernelEvidence:
    """What this network namespace holds.

    mode     -- whose rules were found
    rules    -- by family: what iptables-save prints, or `nft list ruleset`
    variant  -- of the iptables programs that showed them; "" for nftables
    flows    -- what conntrack follows, at most MOST_FLOWS; no_flows: why they cannot be read
    host     -- its addresses and routes
    listening -- where programs take packets: (protocol, address, port); None: not known
    other    -- what the other variant of iptables shows, where it holds rules
    """

    mode: Mode
    rules: Mapping[Family, str]
    host: Host
    variant: Variant | Literal[""] = ""
    flows: Sequence[Flow] = ()
    no_flows: str = ""
    listening: frozenset[tuple[Protocol, str, int]] | None = None
    other: Mapping[Family, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Evidence:
    """All there is to reason from.

    told      -- where it is from, in a line
    raw       -- objects as they came
    corefile  -- (where from, text)
    config    -- what rules are computed with
    node      -- whose rules; "": no Node is known
    ask       -- DNS servers to put questions to; may be empty
    kernel    -- None: `no_kernel` says why not
    status    -- what a running kdns says of itself
    now       -- Unix seconds
    notes     -- what could not be read, and what was taken in its place
    node_told -- how `node` was come by, where it was a guess
    """

    origin: Origin
    told: str
    snapshot: Snapshot
    raw: Mapping[RawKey, Json]
    corefile: tuple[str, str]
    config: ProxyConfig
    node: str
    ask: tuple[Server, ...] = ()
    kernel: KernelEvidence | None = None
    no_kernel: str = ""
    status: Mapping[str, Any] | None = None
    now: float = 0.0
    notes: tuple[str, ...] = ()
    node_told: str = ""

    def json_of(self, kind: str, key: Key) -> Json | None:
        """Return an object as it came; None if it did not."""
        return self.raw.get((kind, *key))

    def pod_spec(self, key: Key) -> Json | None:
        """Return a Pod's spec: its own, or its workload's template where manifests say no
        more; None if it is not known."""
        own = self.json_of(POD, key)
        if own is not None:
            spec = own.get("spec")
            return spec if isinstance(spec, Mapping) else None
        pod = self.snapshot.pods.get(key[0], {}).get(key[1])
        if pod is None:
            return None
        for (kind, namespace, name), one in self.raw.items():
            if kind not in WORKLOADS or namespace != key[0] or not key[1].startswith(name[:47]):
                continue
            template = _dig(one, "spec", "template")
            if (_dig(template, "metadata", "labels") or {}) == (pod.metadata.labels or {}):
                return cast("Json", _dig(template, "spec") or {})
        return None


def _dig(value: Any, *path: str) -> Any:
    """Return a member some levels down; None where there is none."""
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def gather(where: Where) -> Evidence:
    """Return the evidence. Raises ConfigError where nothing says what to look at, or what is
    said cannot be read, and KdnsError where somebody does not answer."""
    given = [
        flag
        for flag, value in (
            ("-f", where.manifests),
            ("--control", where.control),
            ("--kubeconfig", where.kubeconfig),
        )
        if value
    ]
    if len(given) > 1:
        raise _wrong(given[0], f"and {given[1]} are two origins; give one of them")
    if where.manifests:
        return of_manifests(where)
    if where.kubeconfig:
        return asyncio.run(of_api(where, where.kubeconfig))
    control = where.control or _control_found()
    if control:
        return of_kdns(where, control)
    kubeconfig = _default_kubeconfig()
    if kubeconfig:
        return asyncio.run(of_api(where, kubeconfig))
    raise _wrong(
        "-f",
        "nothing says what to look at: -f PATH for manifests, --kubeconfig FILE for a cluster,"
        " --control PATH for a running kdns (none was found)",
    )


def _wrong(what: str, text: str) -> ConfigError:
    return ConfigError([Problem(what, 0, text)])


def _control_found() -> str:
    from kdns.control import find_control

    return find_control(None) or ""


def _default_kubeconfig() -> str:
    """Return the first file kubectl would read; "" if there is none."""
    said = os.environ.get("KUBECONFIG", "")
    paths = said.split(os.pathsep) if said else [os.path.expanduser("~/.kube/config")]
    return next((path for path in paths if path and os.path.isfile(path)), "")


# --- manifests ------------------------------------------------------------------------------


def of_manifests(where: Where) -> Evidence:
    """Return the evidence that manifests give: what a cluster would make of them."""
    snapshot = list_registry(ManifestSpec(where.manifests))
    node, node_told = _node_of(snapshot, where.node)
    return Evidence(
        origin="manifests",
        told=f"manifests {', '.join(where.manifests)}; "
        + (f"{where.server} is asked too" if where.server else "nothing runs, all is computed"),
        snapshot=snapshot,
        raw=_raw_of(_documents(where.manifests)),
        corefile=_corefile_of(where, "kubeadm's Corefile", COREFILE),
        config=config_of(where),
        node=node,
        ask=_servers([where.server] if where.server else []),
        no_kernel="manifests are on no node, so the rules are computed",
        now=time.time(),
        node_told=node_told,
    )


def _documents(paths: Iterable[str]) -> Iterable[Json]:
    from kdns.source.manifests import files_below, parse_documents

    for path in paths:
        for file in files_below(path):
            for document in parse_documents(file, Path(file).read_bytes()):
                yield from _items(document.value)


def _items(value: Any) -> Iterable[Json]:
    """Yield an object, or those of a List."""
    if not isinstance(value, Mapping):
        return
    kind, items = str(value.get("kind") or ""), value.get("items")
    if kind.endswith("List") and isinstance(items, list):
        more = {} if kind == "List" else {"kind": kind.removesuffix("List")}
        for item in items:
            if isinstance(item, Mapping):
                yield from _items({**more, **item})
        return
    yield value


# Without a namespace of their own; what else names none is in "default".
_CLUSTER_WIDE: Final = (NAMESPACE, NODE, SERVICE_CIDR)


def _raw_of(objects: Iterable[Json]) -> dict[RawKey, Json]:
    found: dict[RawKey, Json] = {}
    for one in objects:
        kind, meta = str(one.get("kind") or ""), one.get("metadata")
        if not isinstance(meta, Mapping) or not meta.get("name"):
            continue
        space = "" if kind in _CLUSTER_WIDE else str(meta.get("namespace") or "default")
        found[kind, space, str(meta["name"])] = one
    return found


# --- an API server --------------------------------------------------------------------------


async def of_api(where: Where, kubeconfig: str) -> Evidence:
    """Return the evidence that a cluster's API server gives."""
    from kdns.source.kube import PATHS, Access, Connection

    access = Access(KubeSpec(kubeconfig=kubeconfig, context=where.context), time.monotonic)
    raw: dict[RawKey, Json] = {}
    objects: list[Json] = []
    notes: list[str] = []
    try:
        way = await access.get()
        async with Connection() as connection:

            async def get(path: str) -> Any:
                return await _get_json(connection, way, path)

            for kind in KINDS:
                try:
                    listed = await get(PATHS[kind])
                except SourceError as e:
                    if kind in (SERVICE, ENDPOINT_SLICE, NAMESPACE):
                        raise
                    if kind not in NOT_EVERYWHERE:
                        notes.append(f"{kind}s cannot be read, so what they say is not known: {e}")
                    continue
                objects += [{**item, "kind": kind} for item in _dig(listed, "items") or ()]
            corefile = _corefile_of(where, "kubeadm's Corefile", COREFILE)
            if not where.corefile:
                try:
                    text = _dig(await get(COREFILE_MAP), "data", "Corefile")
                    if isinstance(text, str):
                        corefile = "ConfigMap kube-system/coredns", text
                except SourceError as e:
                    notes.append(f"the Corefile is taken to be kubeadm's; the cluster's: {e}")
    except SourceError as e:
        raise KdnsError(f"{kubeconfig}: {e}") from None
    raw = _raw_of(objects)
    snapshot, broken = snapshot_of(objects)
    node, node_told = _node_of(snapshot, where.node)
    kernel, why = await _kernel(where)
    if kernel is not None:
        here = _node_here(snapshot, kernel.host)
        if here and where.node in ("", here):
            node, node_told = here, ""
        else:
            kernel, why = None, "this host is not the node in question, so rules are computed"
    return Evidence(
        origin="api",
        told=f"the API server {way.host} ({kubeconfig}); DNS and rules are computed"
        if kernel is None
        else f"the API server {way.host} ({kubeconfig}) and this host's kernel; DNS is computed",
        snapshot=snapshot,
        raw=raw,
        corefile=corefile,
        config=config_of(where),
        node=node,
        ask=_servers([where.server] if where.server else []),
        kernel=kernel,
        no_kernel=why,
        now=time.time(),
        notes=(*notes, *broken),
        node_told=node_told,
    )


async def _get_json(connection: Any, way: Any, path: str) -> Any:
    """GET a path of the API. Raises SourceError."""
    import aiohttp

    from kdns.registry.decode import decode_status
    from kdns.source.reflector import Request

    request = Request((), False, API_TIMEOUT, API_TIMEOUT)
    try:
        async with asyncio.timeout(API_TIMEOUT):
            async with await connection.get(way, path, request, CONNECT_TIMEOUT) as response:
                body = await response.content.read(-1)
                if response.status != 200:
                    raise decode_status(body, response.status)
    except TimeoutError:
        raise Unreachable(f"{way.host}{path}: no answer in {API_TIMEOUT:g} s") from None
    except (aiohttp.ClientError, OSError) as e:
        raise Unreachable(f"{way.host}: {e or type(e).__name__}") from None
    try:
        return msgspec.json.decode(body)
    except msgspec.DecodeError as e:
        raise Unreachable(f"{way.host}{path}: the answer is not JSON: {e}") from None


def snapshot_of(objects: Iterable[Json], synced: bool = True) -> tuple[Snapshot, list[str]]:
    """Return the registry that objects as JSON make, and what is wrong with some of them."""
    by_kind: dict[Kind, list[Object]] = {kind: [] for kind in KINDS}
    broken: list[str] = []
    for one in objects:
        kind = cast("Kind", one.get("kind"))
        if kind not in by_kind:
            continue
        try:
            by_kind[kind].append(convert(kind, one))
        except ObjectError as e:
            broken.append(f"left out: {e}")
    store = Store(KINDS)
    for kind, found in by_kind.items():
        store.replace(kind, found)
        if synced:
            store.mark_synced(kind)
    published = store.publish(int(time.time()))
    return (published[0] if published else Snapshot()), broken


# --- a running kdns -------------------------------------------------------------------------


def of_kdns(where: Where, control: str) -> Evidence:
    """Return the evidence that a running kdns gives."""
    from kdns.control import ControlClient

    client = ControlClient(control)
    status = client.get("/v1/status")
    registry = client.get("/v1/registry")
    try:
        text = client.get("/v1/corefile")
    except KdnsError:
        text = None  # a proxy alone answers no names
    objects = [one for one in _dig(registry, "objects") or () if isinstance(one, Mapping)]
    snapshot, broken = snapshot_of(objects, bool(status.get("synced", True)))
    revision = _dig(registry, "revision")
    if isinstance(revision, int):
        snapshot = _at_revision(snapshot, revision)
    node, node_told = _node_of(snapshot, where.node)
    if status.get("node") and not where.node:  # also one that is not among the Nodes
        node, node_told = str(status["node"]), ""
    mode = where.mode or _mode(status.get("mode"))
    cidr = where.cluster_cidr
    if cidr is None and isinstance(status.get("cluster_cidr"), str):
        cidr = status["cluster_cidr"]
    kernel, why = None, "kdns forwards nothing there: its mode is none"
    if mode or status.get("command") == "serve":  # beside it, another proxy may forward
        kernel, reason = asyncio.run(_kernel(where, int(status.get("pid") or 0)))
        why = reason if mode else why
    asked: Sequence[object] = status.get("dns") or ()
    if asked and not where.server and not _same_namespace(int(status.get("pid") or 0)):
        broken.append("kdns answers DNS in another network namespace: it is not asked")
        asked = ()
    corefile = str(_dig(text, "path") or "kdns's Corefile"), str(_dig(text, "text") or "")
    if not corefile[1]:
        corefile = "kubeadm's Corefile", COREFILE
        broken.append("kdns tells of no Corefile, so kubeadm's is taken")
    return Evidence(
        origin="kdns",
        told=f"kdns {status.get('command') or ''} {status.get('version') or ''}"
        f" (process {status.get('pid') or '?'}, {control})".replace("  ", " "),
        snapshot=snapshot,
        raw=_raw_of(objects),
        corefile=_corefile_of(where, *corefile),
        config=config_of(where, mode, cidr, status.get("proxy")),
        node=node,
        ask=_servers([where.server] if where.server else asked),
        kernel=kernel,
        no_kernel=why,
        status=status,
        now=time.time(),
        notes=tuple(broken),
        node_told=node_told,
    )


def _at_revision(snapshot: Snapshot, revision: int) -> Snapshot:
    return replace(snapshot, revision=revision)


def _mode(word: object) -> Mode | Literal[""]:
    modes = ("iptables", "nftables", "ipvs", "userspace")
    return cast("Mode", word) if word in modes else ""


# --- settings -------------------------------------------------------------------------------


def config_of(
    where: Where,
    mode: Mode | Literal[""] = "",
    cluster_cidr: str | None = None,
    running: object = None,
) -> ProxyConfig:
    """Return what rules are computed with: as a running proxy has it, and then as it is asked
    for. Raises ConfigError.

    running -- a KubeProxyConfiguration, as a running proxy tells it
    """
    cidr = where.cluster_cidr if where.cluster_cidr is not None else cluster_cidr
    flags = [
        f"--proxy-mode={where.mode or mode or 'iptables'}",
        f"--cluster-cidr={CLUSTER_CIDR if cidr is None else cidr}",
    ]
    asked = settle(parse_flags(flags), None).config
    if not isinstance(running, Mapping):
        return asked
    found = parse_config(msgspec.json.encode(running).decode(), "the running proxy").config
    if where.mode:
        found = replace(found, mode=asked.mode)
    if where.cluster_cidr is not None:
        found = replace(found, cluster_cidrs=asked.cluster_cidrs)
    return found


def _corefile_of(where: Where, path: str, text: str) -> tuple[str, str]:
    """Return (where from, text): the file that is asked for, else what is given."""
    if not where.corefile:
        return path, text
    try:
        return where.corefile, Path(where.corefile).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        why = getattr(e, "strerror", None) or str(e)
        raise _wrong(where.corefile, f"cannot be read: {why}") from None


def _node_of(snapshot: Snapshot, wanted: str) -> tuple[str, str]:
    """Return whose rules to look at, and what to say of it where that is a guess. Raises
    ConfigError."""
    nodes = sorted(snapshot.nodes)
    if wanted and nodes and wanted not in nodes:
        raise _wrong("--node", f"there is no Node {wanted!r}; there is {', '.join(nodes)}")
    if wanted or len(nodes) < 2:
        return wanted or next(iter(nodes), ""), ""
    return nodes[0], f"rules are those of {nodes[0]}, the first of {len(nodes)} Nodes (--node)"


def _node_here(snapshot: Snapshot, host: Host) -> str:
    """Return the Node that this host is, by its addresses; "" if it is none of them."""
    return next(
        (
            name
            for name, node in sorted(snapshot.nodes.items())
            for one in node.status.addresses or ()
            if one.address in host.addresses
        ),
        "",
    )


def _servers(texts: Iterable[object]) -> tuple[Server, ...]:
    """Read "ADDRESS", "ADDRESS:PORT" and "[V6]:PORT". Raises ConfigError."""
    found = []
    for text in map(str, texts):
        address, colon, port = text.rpartition(":")
        if text.count(":") > 1 and not text.startswith("["):
            address, colon, port = text, "", ""
        elif not colon:
            address, port = text, ""
        if (colon and not port.isdecimal()) or int(port or 53) > 65535 or not address:
            raise _wrong("--server", f"{text!r} is not ADDRESS or ADDRESS:PORT")
        found.append(Server(address.strip("[]"), int(port or 53)))
    return tuple(found)


# --- the kernel -----------------------------------------------------------------------------


async def _kernel(where: Where, pid: int = 0) -> tuple[KernelEvidence | None, str]:
    """Return what this host's kernel holds, or None and why not.

    pid -- the process that writes the rules; 0: any
    """
    if not where.use_kernel:
        return None, "the kernel was not to be asked"
    if not may_write():
        return None, "rules in the kernel are for root to read, so they are computed"
    if pid and not _same_namespace(pid):
        return None, (
            f"process {pid} is in another network namespace, so its rules are computed (nsenter"
            f" -t {pid} -n kdns trace ... reads them)"
        )
    try:
        found = await read_kernel()
    except ApplyError as e:
        return None, f"the kernel's rules cannot be read, so they are computed: {e}"
    if found is None:
        return None, "this host's kernel holds no rules for Services, so they are computed"
    return found, ""


def _same_namespace(pid: int) -> bool:
    """True if a process has our network namespace, or nobody can say."""
    if not pid:
        return True
    try:
        return os.readlink(f"/proc/{pid}/ns/net") == os.readlink("/proc/thread-self/ns/net")
    except OSError:
        return True


async def read_kernel(families: Collection[Family] | None = None) -> KernelEvidence | None:
    """Return what the kernel of this network namespace holds for Services, whoever wrote it;
    None if it holds nothing. Raises ApplyError."""
    families = families_here() if families is None else families
    by_variant = await read_saved(families)
    modes = {variant: _modes_in(texts.values()) for variant, texts in by_variant.items()}
    nft = await _nft_ruleset()
    if nft and any(f"table {_WORD[family]} kube-proxy" in nft for family in families):
        held = {family: nft for family in families if f"table {_WORD[family]} kube-proxy" in nft}
        return _with_host("nftables", held, "", families, {})
    for variant, found in modes.items():
        if not found:
            continue
        mode: Mode = "ipvs" if _is_ipvs(found) else found[0]
        other = next((t for v, t in by_variant.items() if v != variant), {})
        other = {family: text for family, text in other.items() if "\n-A " in text}
        return _with_host(mode, by_variant[variant], variant, families, other)
    return None


def _modes_in(texts: Iterable[str]) -> list[Mode]:
    return [mode for sign, mode in SIGNS.items() for text in texts if f"\n{sign.decode()}" in text]


def _is_ipvs(found: Sequence[Mode]) -> bool:
    return "ipvs" in found and os.path.exists(f"/sys/class/net/{IPVS_INTERFACE}")


async def _nft_ruleset() -> str:
    """Return what `nft list ruleset` prints; "" where there is no nft."""
    if which("nft") is None:
        return ""
    argv = (path_of("nft"), "-y", "-s", "list", "ruleset")
    status, output, stderr = await run_program("nft", argv, READ_TIMEOUT)
    with output:
        text = output.read().decode("utf-8", "replace")
    if status != 0:
        raise ApplyError("nft", stderr.strip() or "list ruleset failed")
    return text


def _with_host(
    mode: Mode,
    rules: Mapping[Family, str],
    variant: Variant | Literal[""],
    families: Collection[Family],
    other: Mapping[Family, str],
) -> KernelEvidence:
    flows: list[Flow] = []
    no_flows = ""
    try:
        for family in families:
            flows += read_flows(family, MOST_FLOWS - len(flows))
    except ApplyError as e:
        no_flows = e.stderr
    return KernelEvidence(
        mode, rules, host_here(families), variant, flows, no_flows, listening_here(), other
    )


def host_here(families: Collection[Family]) -> Host:
    """Return this network namespace's addresses and routes. Raises ApplyError."""
    addresses = [
        one.address.partition("%")[0] for family in families for one in node_addresses(family)
    ]
    return Host(addresses, {**_routes_4(), **_routes_6()})


def _routes_4() -> dict[str, str]:
    """Return CIDR -> interface of the main table."""
    found: dict[str, str] = {}
    for words in _words("/proc/thread-self/net/route")[1:]:
        network, mask = (int(words[at], 16).to_bytes(4, "little") for at in (1, 7))
        length = bin(int.from_bytes(mask, "big")).count("1")
        found.setdefault(f"{ipaddress.IPv4Address(network)}/{length}", words[0])
    return found


def _routes_6() -> dict[str, str]:
    found: dict[str, str] = {}
    for words in _words("/proc/thread-self/net/ipv6_route"):
        address = ipaddress.IPv6Address(bytes.fromhex(words[0]))
        if words[-1] != "lo":
            found.setdefault(f"{address}/{int(words[1], 16)}", words[-1])
    return found


# The files of /proc/net, and the state of a socket there that takes what comes from anybody
# (net/tcp_states.h: TCP_LISTEN; of UDP, one that is not connected: TCP_CLOSE).
_SOCKETS: Final[Mapping[str, tuple[Protocol, str]]] = {
    "tcp": ("tcp", "0A"), "tcp6": ("tcp", "0A"), "udp": ("udp", "07"), "udp6": ("udp", "07"),
}  # fmt: skip


def listening_here() -> frozenset[tuple[Protocol, str, int]]:
    """Return where programs of this network namespace take packets. An IPv6 wildcard is told
    as both families' own."""
    found: set[tuple[Protocol, str, int]] = set()
    for name, (protocol, state) in _SOCKETS.items():
        for words in _words(f"/proc/thread-self/net/{name}")[1:]:
            if words[3] != state:
                continue
            packed, _, port = words[1].partition(":")
            octets = bytes.fromhex(packed)
            # Four octets at a time, each in this machine's order.
            swapped = b"".join(octets[at : at + 4][::-1] for at in range(0, len(octets), 4))
            address = ipaddress.ip_address(swapped if sys.byteorder == "little" else octets)
            found.add((protocol, str(address), int(port, 16)))
            if address == ipaddress.IPv6Address("::"):
                found.add((protocol, "0.0.0.0", int(port, 16)))
    return frozenset(found)


def _words(path: str) -> list[list[str]]:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return [line.split() for line in file if line.strip()]
    except OSError:
        return []


def read_flows(family: Family, most: int) -> list[Flow]:
    """Return the flows of all protocols with ports that conntrack follows, at most so many.
    Raises ApplyError."""
    found: list[Flow] = []
    with Netfilter("list flows") as link:
        for datagram in link.dump(CT_GET, _NFGEN.pack(ADDRESS_FAMILY[family], 0, 0)):
            for one in messages(datagram):
                if one.kind == NLMSG_DONE or len(found) >= most:
                    return found
                flow = _flow(datagram, one.start + _NFGEN.size, one.end)
                if flow is not None:
                    found.append(flow)
    return found


def _flow(octets: bytes, start: int, end: int) -> Flow | None:
    parts = attributes(octets, start, end)
    if CTA_TUPLE_ORIG not in parts or CTA_TUPLE_REPLY not in parts:
        return None
    there = _tuple(octets, *parts[CTA_TUPLE_ORIG])
    back = _tuple(octets, *parts[CTA_TUPLE_REPLY])
    if there is None or back is None:
        return None
    protocol, source, source_port, destination, port = there
    return Flow(protocol, source, source_port, destination, port, back[1], back[2])


def _tuple(octets: bytes, start: int, end: int) -> tuple[Protocol, bytes, int, bytes, int] | None:
    """Return (protocol, source, its port, destination, its port); None: it has no ports."""
    parts = attributes(octets, start, end)
    if CTA_TUPLE_IP not in parts or CTA_TUPLE_PROTO not in parts:
        return None
    ips = [octets[a:b] for _, (a, b) in sorted(attributes(octets, *parts[CTA_TUPLE_IP]).items())]
    numbers = {
        number: int.from_bytes(octets[a:b], "big")
        for number, (a, b) in attributes(octets, *parts[CTA_TUPLE_PROTO]).items()
    }
    protocol = _PROTOCOLS.get(numbers.get(CTA_PROTO_NUM, 0))
    if protocol is None or len(ips) != 2:
        return None
    return (
        protocol,
        ips[0],
        numbers.get(CTA_PROTO_SRC_PORT, 0),
        ips[1],
        numbers.get(CTA_PROTO_DST_PORT, 0),
    )
