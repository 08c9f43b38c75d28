"""The kernel's rules and flows, held against the forwarding that the registry asks for.

Pure: what iptables-save and nft print is handed in, and so are the flows. The rules wanted are
proxy/'s; what differs is told by Service, for nobody knows a chain's hash. That rules of two
programs or two modes are there at once is found here too.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from ipaddress import ip_address
from typing import Final, NamedTuple, TypeAlias

from kdns.explain.check_finding import Finding, count, few, finding
from kdns.kernel.iptables import CANARY, CANARY_TABLES, FIREWALL, respelt, tokens
from kdns.kernel.ipvs_netlink import HeldVirtual
from kdns.kernel.modes import SIGNS
from kdns.kernel.programs import Variant
from kdns.proxy.config import Mode
from kdns.proxy.conntrack import AddressSet, Flow, compile_check, misled_frontends
from kdns.proxy.iptables import LARGE, SERVICE_CHAINS, IptablesRules, jumps
from kdns.proxy.iptables_rules import SHARED, RuleSet, Shared, Spelling
from kdns.proxy.ipvs import At, compile_ipvs, host_view
from kdns.proxy.nftables import NftablesRules
from kdns.proxy.nftables_listing import Held, is_built_alike, parse_table, same_chain, same_set
from kdns.proxy.nftables_rules import AFFINITY, TABLE, WORD
from kdns.proxy.options import Family, Options
from kdns.proxy.table import ForwardingTable

# table -> chain -> its rules, as iptables-save prints them
Saved: TypeAlias = Mapping[str, Mapping[str, Sequence[str]]]
Wanted: TypeAlias = Mapping[Family, tuple[ForwardingTable, Options]]

IPVS_INTERFACE: Final = "kube-ipvs0"
# Its rules are of the cluster's ServiceCIDRs, which not every registry tells.
OF_SERVICE_CIDRS: Final = ("cluster-ips-check",)
_OWNER: Final = re.compile(r'--comment "?([^\s"/]+/[^\s"]+)')
_NFT_OWNER: Final = re.compile(r"(?:[a-z]+-)+[A-Z2-7]{8}-([^/]+/[^/]+)/(\w+)/([^_\s]*)")
# An endpoint's own rule, and what the comment of a jump to it says.
_LEADS: Final = re.compile(r'''--to-destination (\S+)|dnat(?: ip6?)? to (\S+)| -> ([^\s"]+)"''')
BOTH: Final = re.compile(r"^-A KUBE-(?!FIREWALL\b|KUBELET)", re.MULTILINE)

REWRITE: Final = (
    "kdns puts it right at its next look, within a minute; if it is there again after that, look"
    " for the program that does it"
)


class HeldIpvs(NamedTuple):
    """IPVS of one family. servers -- virtual servers; bound -- addresses on kube-ipvs0; others --
    those of this host's other interfaces"""

    servers: Mapping[At, HeldVirtual]
    bound: Collection[str]
    others: Collection[str]


@dataclass
class Seen:
    """What was read of this network namespace.

    mode     -- whose rules there should be
    saved    -- what each variant of iptables-save prints, by family
    ruleset  -- what `nft list ruleset` prints; "" if it holds nothing or cannot be read
    written  -- somebody says that he has written rules here
    ipvs     -- what IPVS holds, where there is the interface kube-ipvs0
    """

    mode: Mode
    saved: Mapping[Variant, Mapping[Family, str]] = field(default_factory=dict)
    ruleset: str = ""
    written: bool = False
    ipvs: Mapping[Family, HeldIpvs] = field(default_factory=dict)


def check_kernel(wanted: Wanted, seen: Seen) -> Iterator[Finding]:
    """Yield in what the kernel differs from what is wanted, and who else is in there."""
    left = modes_in(seen)
    yield from _check_variants(seen)
    yield from _check_other_modes(seen, left)
    if not left and not seen.written:
        yield finding(
            "kernel-not-seen", "kernel", "this host's kernel holds no rules for Services",
            "no proxy has run here: it is no node of the cluster, or another network namespace",
            "run it on a node (nsenter -t PID -n, for the namespace of process PID)",
        )  # fmt: skip
        return
    compare = COMPARE.get(seen.mode)
    if compare is None:
        yield finding(
            "mode-not-compared", f"mode {seen.mode}", "its rules are not compared one by one",
            "they depend on ports and addresses that only the running proxy knows",
            "see the proxy's own health and its log",
        )  # fmt: skip
        return
    for family, (table, options) in sorted(wanted.items()):
        yield from compare(family, table, options, seen)


# --- who is in there ------------------------------------------------------------------------


def modes_in(seen: Seen) -> set[Mode]:
    """Return the modes of kube-proxy that have something in the kernel."""
    found: set[Mode] = set()
    for texts in seen.saved.values():
        for text in texts.values():
            found |= {mode for sign, mode in SIGNS.items() if f"\n{sign.decode()}" in text}
    if any(f"table {word} {TABLE} {{" in seen.ruleset for word in WORD.values()):
        found.add("nftables")
    if seen.ipvs:
        found.add("ipvs")
    return found


def _check_variants(seen: Seen) -> Iterator[Finding]:
    rules = {
        variant: sum(len(BOTH.findall(text)) for text in texts.values())
        for variant, texts in seen.saved.items()
    }
    if sum(bool(number) for number in rules.values()) > 1:
        told = " and ".join(f"{n} in iptables-{variant}" for variant, n in sorted(rules.items()))
        yield finding(
            "iptables-both-variants", "iptables", f"rules in KUBE- chains: {told}",
            "kube-proxy, kubelet or a CNI plugin were run with different variants; every packet"
            " meets both sets, and neither program shows the other's",
            "let all use one (update-alternatives --set iptables; a container's image brings its"
            " own), then remove the old ones: `kdns proxy --cleanup`, and start the proxy anew",
        )  # fmt: skip


WORDS: Final[Mapping[Mode, str]] = {
    "iptables": "chains KUBE-SVC-, KUBE-SEP- and KUBE-NODEPORTS",
    "nftables": f"table {TABLE}",
    "ipvs": f"interface {IPVS_INTERFACE}, its virtual servers or chain KUBE-LOAD-BALANCER",
    "userspace": "chains KUBE-PORTALS-",
}


def _check_other_modes(seen: Seen, left: set[Mode]) -> Iterator[Finding]:
    for mode in sorted(left - {seen.mode}):
        yield finding(
            "other-mode-left", f"mode {mode}",
            f"{WORDS[mode]} beside the {seen.mode} mode's rules",
            "a proxy of that mode ran here, or still runs: its rules send packets to endpoints"
            " of then",
            "stop the other proxy, then `kube-proxy --cleanup` or `kdns proxy --cleanup`, and"
            " start kdns anew; kdns removes what it finds when it starts",
        )  # fmt: skip


def _gone(family: Family, what: str) -> Finding:
    return finding(
        "rules-gone", f"IPv{family} rules", f"{what}: no Service is reached through this node",
        "somebody flushed them (iptables -F, nft flush ruleset, a restart of firewalld or of"
        " nftables.service), or the proxy has not written any yet",
        "kdns writes them again within a minute; look for what flushes them, and let it reload"
        " only its own tables",
    )  # fmt: skip


# --- by Service -----------------------------------------------------------------------------


@dataclass
class _Differences:
    """What was found, by the name of the Service port."""

    missing: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    other: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    extra: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    frame: list[str] = field(default_factory=list)

    def findings(self, family: Family, known: Collection[str]) -> Iterator[Finding]:
        """known -- the Service ports there are"""
        for name, told in sorted(self.missing.items()):
            if name in self.extra or name in self.other:  # it has rules, but not these
                self.other[name] += [*told, *self.extra.pop(name, [])]
                continue
            yield finding(
                "rules-missing", f"Service {name}, IPv{family}", few(told),
                "the proxy has not written them yet, was refused, or somebody took them away",
                f"see the proxy's log and its /healthz; {REWRITE}",
            )  # fmt: skip
        for name, told in sorted(self.other.items()):
            yield finding(
                "rules-differ", f"Service {name}, IPv{family}", few([*told, *self.extra[name]]),
                "the kernel has the rules of an older registry, or somebody changed them",
                REWRITE,
            )  # fmt: skip
        for name, told in sorted(self.extra.items()):
            if told and name not in self.other:
                there = name in known
                yield finding(
                    "rules-extra", f"Service {name}, IPv{family}", few(told),
                    "rules beside those wanted" if there else
                    "the registry has no such Service port: it was deleted, and its rules stay",
                    f"see the proxy's log; {REWRITE}",
                )  # fmt: skip
        if self.frame:
            yield finding(
                "frame-differs", f"IPv{family} rules", few(self.frame),
                "another program wrote into a chain that is kdns's alone",
                REWRITE,
            )  # fmt: skip


# --- iptables -------------------------------------------------------------------------------


def _compare_iptables(
    family: Family, table: ForwardingTable, options: Options, seen: Seen
) -> Iterator[Finding]:
    texts = [text for one in seen.saved.values() if (text := one.get(family))]
    text = max(texts, key=lambda one: len(BOTH.findall(one)), default="")
    held = read_saved(text)
    if "KUBE-SERVICES" not in held.get("nat", {}):
        yield _gone(family, "no chain KUBE-SERVICES in table nat")
        return
    rules = IptablesRules(options)
    rules.update(table, None)
    wanted, leading = rules.wanted(), jumps(options)
    yield from _check_jumps(family, held, leading)
    found = _Differences()
    owners = _chain_owners(table, options)
    _compare_service_chains(held.get("nat", {}), wanted["nat"], owners, found)
    for place in SHARED:
        _compare_shared(held, wanted, place, found)
    _compare_frame(held, wanted, found)
    yield from found.findings(family, {one.name for one in table})


def read_saved(text: str) -> dict[str, dict[str, list[str]]]:
    """Read what iptables-save prints."""
    tables: dict[str, dict[str, list[str]]] = {}
    chains: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("*"):
            chains = tables.setdefault(line[1:], {})
        elif line.startswith(":"):
            chains.setdefault(line[1:].split(" ", 1)[0], [])
        elif line.startswith("-A "):
            _, chain, rule = (*line.split(" ", 2), "")[:3]
            chains.setdefault(chain, []).append(respelt(rule))
    return tables


def _chain_owners(table: ForwardingTable, options: Options) -> dict[str, str]:
    spelling = Spelling(options, table.endpoints > LARGE)
    return {chain: one.name for one in table for chain in spelling.spell(one).chains}


def _check_jumps(family: Family, held: Saved, wanted: RuleSet) -> Iterator[Finding]:
    missing = []
    for table, chains in wanted.items():
        for chain, rules in chains.items():
            there = {tokens(rule) for rule in held.get(table, {}).get(chain, ())}
            if not all(tokens(rule) in there for rule in rules):
                missing.append(f"{table} {chain}")
    if missing:
        yield finding(
            "jumps-missing", f"IPv{family} rules", f"no jump to KUBE- chains from {few(missing)}",
            "somebody flushed the built-in chains (iptables -F INPUT, a firewall's reload) and"
            " left ours",
            "kdns puts the jumps back within a minute; let the other program leave rules alone"
            " that are not its own",
        )  # fmt: skip


def _same(one: str, other: str) -> bool:
    # Versions of iptables print matches in another order.
    return one == other or tokens(one) == tokens(other)


def _compare_service_chains(
    held: Mapping[str, Sequence[str]],
    wanted: Mapping[str, Sequence[str]],
    owners: Mapping[str, str],
    found: _Differences,
) -> None:
    for chain, name in owners.items():
        there, rules = held.get(chain), wanted[chain]
        if there is None:
            found.missing[name].append(f"chain {chain} is gone")
        elif not there and rules:
            found.missing[name].append(f"chain {chain} is empty")
        elif len(there) != len(rules) or not all(map(_same, there, rules)):
            found.other[name].append(f"chain {chain} {_how(there, rules)}")
    for chain, there in held.items():
        if chain.startswith(SERVICE_CHAINS) and chain not in owners:
            found.extra[_owner(there) or f"unknown ({chain})"].append(f"chain {chain}")


def _how(there: Sequence[str], rules: Sequence[str]) -> str:
    """Say in what a chain differs, best by where it leads."""
    leads, wanted = (
        {one[1] or one[2] or one[3] for rule in those for one in _LEADS.finditer(rule)}
        for those in (there, rules)
    )
    if leads != wanted:
        return f"leads to {few(sorted(leads)) or 'nowhere'}, not to {few(sorted(wanted))}"
    if len(there) != len(rules):
        return f"has {count(len(there), 'rule')}, not {len(rules)}"
    other = next((one for one, rule in zip(there, rules, strict=True) if not _same(one, rule)), "")
    return f"has another rule: {other}"


def _owner(rules: Iterable[str]) -> str:
    return next((match[1] for rule in rules if (match := _OWNER.search(rule))), "")


def _compare_shared(held: Saved, wanted: RuleSet, place: Shared, found: _Differences) -> None:
    there = Counter(held.get(place.table, {}).get(place.chain, ()))
    should = Counter(wanted[place.table][place.chain])
    where = f"{place.table} {place.chain}"
    lost, added = _unlike([*(should - there).elements()], [*(there - should).elements()])
    for rule in lost:
        name = _owner([rule])
        if name:
            found.missing[name].append(f"no rule in {where}")
        else:
            found.frame.append(f"{where} has lost {rule}")
    for rule in added:
        name = _owner([rule])
        if name:
            found.extra[name].append(f"a rule in {where}: {rule}")
        else:
            found.frame.append(f"{where} also has {rule}")


def _unlike(lost: Sequence[str], added: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return those that are not the same in other words. Reading words takes time: by their text
    almost all were found equal before."""
    words = Counter(map(tokens, added))
    still = []
    for rule in lost:
        if words[tokens(rule)]:
            words[tokens(rule)] -= 1
        else:
            still.append(rule)
    return still, [rule for rule in added if words[tokens(rule)] > 0]


def _compare_frame(held: Saved, wanted: RuleSet, found: _Differences) -> None:
    shared = {*SHARED}
    for table, chains in wanted.items():
        for chain, rules in chains.items():
            if (table, chain) in shared or chain.startswith(SERVICE_CHAINS):
                continue
            there = held.get(table, {}).get(chain)
            if there is None:
                found.frame.append(f"{table} {chain} is gone")
            elif chain == FIREWALL:  # kubelet writes there too
                lost = {*map(tokens, rules)} - {*map(tokens, there)}
                found.frame += [f"{table} {chain} has lost a rule"] * bool(lost)
            elif len(there) != len(rules) or not all(map(_same, there, rules)):
                found.frame.append(f"{table} {chain} {_how(there, rules)}")
    found.frame += [
        f"{table} {CANARY} is gone: the table was flushed"
        for table in CANARY_TABLES
        if CANARY not in held.get(table, {})
    ]


# --- nftables -------------------------------------------------------------------------------


def _compare_nftables(
    family: Family, table: ForwardingTable, options: Options, seen: Seen
) -> Iterator[Finding]:
    held = parse_table(seen.ruleset.splitlines(), WORD[family])
    if not held.present:
        yield _gone(family, f"no table {WORD[family]} {TABLE}")
        return
    rules = NftablesRules(options)
    rules.update(table, None)
    wanted, found = rules.wanted(), _Differences()
    if not is_built_alike(held, wanted):
        found.frame.append("a base chain or a set is of another kind")
    same = partial(same_chain, exact=_prints_alike(held, wanted))
    unknown = () if table.service_cidrs else OF_SERVICE_CIDRS
    for name, chain in wanted.chains.items():
        owner = _nft_owner(rules, f"add chain {WORD[family]} {TABLE} {name}", name)
        there = held.chains.get(name)
        if there is None or (chain.rules and not there.rules):
            told = f"chain {name} is {'gone' if there is None else 'empty'}"
            found.missing[owner].append(told) if owner else found.frame.append(told)
        elif name in unknown:
            continue
        elif not same(there, chain):
            told = f"chain {name} {_how(there.rules, chain.rules)}"
            found.other[owner].append(told) if owner else found.frame.append(told)
    for name, chain in held.chains.items():
        if name not in wanted.chains and (chain.rules or chain.head):
            owner = _nft_owner(None, "", name)
            told = f"chain {name}"
            found.extra[owner].append(told) if owner else found.frame.append(f"also {told}")
    for name, definition in wanted.sets.items():
        if name not in held.sets or not same_set(held.sets[name], definition):
            owner = _nft_owner(rules, f"add set {WORD[family]} {TABLE} {name}", name)
            told = f"set {name} is {'another' if name in held.sets else 'gone'}"
            found.missing[owner].append(told) if owner else found.frame.append(told)
    stray: list[tuple[str, str]] = []
    for name, elements in wanted.elements.items():
        if not name.startswith(AFFINITY) and name in held.sets:
            stray += _compare_elements(rules, name, held.elements.get(name, {}), elements, found)
    _ascribe(stray, found)
    yield from found.findings(family, {one.name for one in table})


def _prints_alike(held: Held, wanted: Held) -> bool:
    """Say whether this nft prints rules as we write them: then they are compared by the word."""
    both = [(held.chains[name], one) for name, one in wanted.chains.items() if name in held.chains]
    exact = sum(same_chain(there, one, exact=True) for there, one in both)
    leading = sum(same_chain(there, one, exact=False) for there, one in both)
    return exact * 2 >= leading


def _compare_elements(
    rules: NftablesRules,
    place: str,
    there: Mapping[str, str],
    wanted: Mapping[str, str],
    found: _Differences,
) -> list[tuple[str, str]]:
    """Note what differs; return (set, element) of those that are nobody's by their own words."""
    stray = []
    for key, tail in wanted.items():
        if there.get(key) == tail:
            continue
        owner = _nft_owner(rules, f"{key}{tail}", tail)
        told = f"{place} {'has no' if key not in there else 'leads elsewhere for'} {key}"
        if not owner:
            found.frame.append(told)
        elif key in there:
            found.other[owner].append(told)
        else:
            found.missing[owner].append(told)
    for key in there.keys() - wanted.keys():
        owner = _nft_owner(None, "", there[key])
        if owner:
            found.extra[owner].append(f"{place} has {key}{there[key]}")
        else:
            stray.append((place, key))
    return stray


def _ascribe(stray: Iterable[tuple[str, str]], found: _Differences) -> None:
    """Note an element that names only an address with the Service that has more of it."""
    for place, key in stray:
        told = f"{place} has {key}"
        owner = next(
            (n for n, those in found.extra.items() if any(f" {key} ." in one for one in those)), ""
        )
        found.extra[owner].append(told) if owner else found.frame.append(told)


def _nft_owner(rules: NftablesRules | None, line: str, name: str) -> str:
    """Return "namespace/name:port" of whom a chain, a set or an element is; "" for nobody's.
    What is wanted knows it; what is not tells by its name."""
    match = _NFT_OWNER.search(name)
    if match is not None:
        return f"{match[1]}:{match[3]}" if match[3] else match[1]
    key = rules.owner(line) if rules is not None else None
    return "/".join(key) if key is not None else ""


# --- ipvs -----------------------------------------------------------------------------------


def _compare_ipvs(
    family: Family, table: ForwardingTable, options: Options, seen: Seen
) -> Iterator[Finding]:
    """Compare virtual servers and addresses; the few chains and the sets are looked at for being
    there."""
    held = seen.ipvs.get(family, HeldIpvs({}, (), ()))
    rules = compile_ipvs(table, options, host=host_view(held.others, options))
    chains = any("\n:KUBE-SERVICES " in texts.get(family, "") for texts in seen.saved.values())
    if rules.servers and not (held.servers and chains):
        what = "no chain KUBE-SERVICES in table nat" if held.servers else "no virtual server"
        yield _gone(family, what)
        return
    found, owners = _Differences(), rules.owners()
    for at, virtual in rules.servers.items():
        there = held.servers.get(at)
        if there is None:
            found.missing[owners[at]].append(f"no virtual server {at}")
            continue
        # One of weight 0 only finishes its connections.
        reals = {str(real) for real, state in there.reals.items() if state.weight}
        if reals != (wanted := {*map(str, virtual.reals)}):
            leads = f"sends to {few(sorted(reals)) or 'nobody'}, not to {few(sorted(wanted))}"
            found.other[owners[at]].append(f"virtual server {at} {leads}")
    at_address = {at.address: name for at, name in owners.items()}
    for address in sorted({*rules.addresses} - {*held.bound}):
        found.missing[at_address[address]].append(f"{IPVS_INTERFACE} has no {address}")
    for at in sorted(held.servers.keys() - rules.servers.keys()):
        found.extra[f"unknown ({at})"].append(f"virtual server {at}")
    yield from found.findings(family, {one.name for one in table})


Compare: TypeAlias = Callable[[Family, ForwardingTable, Options, Seen], Iterator[Finding]]
COMPARE: Final[Mapping[Mode, Compare]] = {
    "iptables": _compare_iptables,
    "nftables": _compare_nftables,
    "ipvs": _compare_ipvs,
}


# --- flows ----------------------------------------------------------------------------------


def check_flows(
    table: ForwardingTable,
    flows: Iterable[Flow],
    node: Collection[str] = (),
    pods: Collection[str] = (),
) -> Iterator[Finding]:
    """Yield the UDP flows that the kernel still leads to where no endpoint is.

    node -- addresses and networks that node ports answer on
    pods -- where Pods have their addresses: what is translated to one of them by no frontend
            there is was led there by one that is gone
    """
    check = compile_check(misled_frontends(ForwardingTable(table.family), table, None), table)
    flows = [flow for flow in flows if flow.protocol == "udp"]
    names = _frontend_names(table)
    stale: defaultdict[tuple[str, str], list[Flow]] = defaultdict(list)
    for flow in check.stale(flows, node):
        place = _spell(flow.destination, flow.destination_port)
        name = names.get(place) or names.get(f":{flow.destination_port}", "")
        stale[name, place].append(flow)
    here, range_of_pods = AddressSet(node), AddressSet(pods)
    for flow in flows:
        destination = (flow.destination, flow.destination_port)
        if (
            (flow.reply_source, flow.reply_port) != destination
            and flow.destination_port not in check.node_ports
            and destination not in check.frontends
            and flow.destination not in here
            and flow.reply_source in range_of_pods
        ):
            stale["", _spell(*destination)].append(flow)
    for (name, place), those in sorted(stale.items()):
        ends = Counter(_spell(flow.reply_source, flow.reply_port) for flow in those)
        clients = few(dict.fromkeys(str(ip_address(flow.source)) for flow in those))
        yield finding(
            "stale-flow", f"{name and f'Service {name}, '}{place}/udp",
            f"{count(len(those), 'flow')} from {clients} to {few(end for end, _ in ends.items())}"
            + (", no endpoint of it" if name else ", and no Service has this address any more"),
            "the kernel translates a flow as its first packet was; a client that never rests"
            " keeps it alive",
            f"kdns deletes such flows at its next sync; by hand: conntrack -D -p udp"
            f" --orig-dst {ip_address(those[0].destination)} --dport {those[0].destination_port}",
        )  # fmt: skip


def _frontend_names(table: ForwardingTable) -> dict[str, str]:
    """Return whose a destination is: by "ip:port", a node port by ":port"."""
    found: dict[str, str] = {}
    for one in table:
        for place in one.frontends:
            if one.protocol == "udp":
                address = f"[{place.address}]" if ":" in place.address else place.address
                found.setdefault(f"{address}:{place.port}", one.name)
    return found


def _spell(packed: bytes, port: int) -> str:
    ip = ip_address(packed)
    return f"[{ip}]:{port}" if ip.version == 6 else f"{ip}:{port}"
