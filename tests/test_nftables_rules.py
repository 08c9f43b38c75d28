"""The rules of the nftables mode: as kube-proxy has them, as the kernel prints them, and the
same whichever way the kernel came to them."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from forwarding import CLUSTER_CIDRS, cluster_table, exposed, table_of
from hypothesis import given, settings
from hypothesis import strategies as st
from nft_text import PretendNft, Refused
from objects import endpoint, service, slice_of

from kdns.proxy import nftables_rules
from kdns.proxy.nftables import Held, NftablesRules, render_rules
from kdns.proxy.nftables_listing import find_differences, parse_table, respelt
from kdns.proxy.nftables_rules import MOST_RULES, WORD, chain_name, duration
from kdns.proxy.options import Detector, Family, Options
from kdns.proxy.table import Forwarding, ForwardingTable
from kdns.registry.endpoints import Endpoint
from kdns.registry.objects import Key

RECORDED = Path(__file__).parent / "golden" / "rules" / "nftables.txt"
FAMILIES: tuple[Family, ...] = (4, 6)
SERVICE_CIDRS: Mapping[Family, tuple[str, ...]] = {4: ("10.96.0.0/16",), 6: ("fd00:10:96::/112",)}

# Where our rules differ from the recorded ones, and why (reference 5.2).
FEW = "few endpoints are chosen by rules tried in turn: anonymous maps make loading slow"
INTENDED: Mapping[Family, Mapping[str, str]] = {
    4: {
        f"chain {name}: has other rules": FEW
        for name in (
            "service-AOCEHKF4-prod/sctp/sctp/assoc",
            "local-5XOYIXUH-prod/itp-local/tcp/http",
            "service-V3TISZYV-prod/sticky/tcp/http",
            "service-7BN5FZ75-default/dual/tcp/https",
            "service-7BAVV4EQ-prod/lb/tcp/http",
            "service-7JSNPWEZ-prod/api/tcp/http",
            "service-IF2LJNDZ-prod/two-slices/tcp/http",
            "service-LEGO42OA-default/terminating/tcp/http",
            "service-UQV7JMN5-prod/lb-local/tcp/http",
            "local-UQV7JMN5-prod/lb-local/tcp/http",
            "service-DAIXODRU-default/web/tcp/metrics",
            "service-X26Y6JVX-prod/lb-local-remote/tcp/http",
            "service-VZITUDKD-prod/zonal/tcp/http",
            "service-2QRHZV4L-default/kubernetes/tcp/https",
            "service-KY6CHJCF-default/unnamed/udp/",
            "service-GKZGWKTG-prod/extip/tcp/http",
            "service-SUSTUHLJ-default/web/tcp/http",
        )
    },
    6: {"chain service-7BN5FZ75-default/dual/tcp/https: has other rules": FEW},
}


def options(family: Family = 4, **more: Any) -> Options:
    """As the rules were recorded: node1 has a primary address of IPv4 only."""
    detector = Detector("cidr", CLUSTER_CIDRS[family])
    addresses = ("192.168.77.1",) if family == 4 else None
    settings = {"detector": detector, "node_port_addresses": addresses, **more}
    return Options(family=family, **settings)


def recorded(family: Family) -> Held:
    return parse_table(RECORDED.read_text().splitlines(), WORD[family])


def printed(table: ForwardingTable, with_options: Options | None = None) -> Held:
    """What `kdns rules --mode nftables` prints, read."""
    family = table.family
    text = render_rules(table, with_options or options(family), service_cidrs=SERVICE_CIDRS[family])
    return parse_table(text.splitlines(), WORD[family])


def rules_of(table: ForwardingTable, with_options: Options | None = None) -> NftablesRules:
    rules = NftablesRules(with_options or options(table.family))
    rules.update(table, None)
    return rules


@pytest.fixture
def namespace() -> Iterator[Callable[..., str]]:
    """Runs nft in a network namespace of its own."""
    if shutil.which("nft", path="/usr/sbin:/sbin:/usr/bin") is None or shutil.which("ip") is None:
        pytest.skip("needs nft and ip")
    name = f"kdns-nft-rules-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"cannot make a network namespace: {made.stderr!r}")

    def nft(*words: str, text: str = "") -> str:
        argv = ["ip", "netns", "exec", name, "nft", *words]
        done = subprocess.run(argv, input=text, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Refused(done.stderr)
        return done.stdout

    try:
        yield nft
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


# --- The same as kube-proxy -----------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rules_are_those_recorded_from_kube_proxy(family: Family) -> None:
    found = find_differences(recorded(family), printed(cluster_table(family)))
    assert set(found) == set(INTENDED[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_with_maps_for_few_endpoints_too_nothing_differs_from_kube_proxy(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nftables_rules, "MOST_RULES", 0)
    ours, theirs = printed(cluster_table(family)), recorded(family)
    assert list(find_differences(theirs, ours)) == []
    assert list(find_differences(ours, theirs)) == []
    # Nor in the words of definitions, with their comments.
    assert ours.sets == theirs.sets


@pytest.mark.root
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("explain", [False, True], ids=["plain", "explained"])
def test_a_kernel_given_the_rules_prints_what_was_recorded(
    namespace: Callable[..., str], family: Family, explain: bool
) -> None:
    table = cluster_table(family)
    text = render_rules(table, options(family), explain, SERVICE_CIDRS[family])
    namespace("-f", "-", text=text)
    held = parse_table(namespace("-s", "list", "ruleset").splitlines(), WORD[family])
    assert set(find_differences(recorded(family), held)) == set(INTENDED[family])
    assert list(find_differences(held, printed(table))) == []


@pytest.mark.root
@pytest.mark.parametrize("family", FAMILIES)
def test_a_kernel_prints_what_kube_proxy_would_have_it_print(
    namespace: Callable[..., str], family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nftables_rules, "MOST_RULES", 0)
    rules = NftablesRules(options(family), SERVICE_CIDRS[family])
    rules.update(cluster_table(family), None)
    namespace("-f", "-", text=rules.partial())
    held = parse_table(namespace("list", "ruleset").splitlines(), WORD[family])
    assert list(find_differences(held, recorded(family))) == []
    assert held.sets == recorded(family).sets


VECTORS = [
    ("ns1/svc1/tcp/p80", "ULMVA6XW-ns1/svc1/tcp/p80"),
    ("ns2/svc2/tcp/p80", "42NFTM6N-ns2/svc2/tcp/p80"),
    ("ns1/svc1/tcp/p80__10.180.0.1/80", "5OJB2KTY-ns1/svc1/tcp/p80__10.180.0.1/80"),
]


@pytest.mark.parametrize(("text", "name"), VECTORS)
def test_chain_names_are_those_of_other_clusters(text: str, name: str) -> None:
    assert chain_name(text) == name


def test_a_long_name_is_cut_and_stays_unique() -> None:
    one, other = (chain_name(f"{'n' * 63}/{'s' * 63}/tcp/{'p' * 180}{end}") for end in "ab")
    assert len(one) == len(other) == 240
    assert one.endswith("...")
    assert one != other


def test_chains_of_an_ipv6_endpoint_have_names_without_colons() -> None:
    sticky = service("web", ip="fd00:10:96::50", sessionAffinity="ClientIP")
    table = table_of(sticky, slice_of("web", endpoint("fd00:10:244::5"), family="IPv6"), family=6)
    wanted = rules_of(table).wanted()
    name = chain_name("default/web/tcp/http__fd00.10.244..5/80")
    assert wanted.chains[f"endpoint-{name}"].rules == (
        f"update @affinity-{name} {{ ip6 saddr }}",
        "meta l4proto tcp dnat to [fd00:10:244::5]:80",
    )
    assert wanted.sets[f"affinity-{name}"] == (
        "set",
        ("type ipv6_addr", "size 65535", "flags dynamic,timeout", "timeout 3h"),
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1, "1s"), (600, "10m"), (10800, "3h"), (86400, "1d"), (90061, "1d1h1m1s")],
)
def test_a_time_out_is_written_as_nft_prints_it(seconds: int, text: str) -> None:
    assert duration(seconds) == text


# --- Single decisions -----------------------------------------------------------------------


def chain_of(table: ForwardingTable, start: str, with_options: Options | None = None) -> list[str]:
    chains = rules_of(table, with_options).wanted().chains
    own = re.compile(rf"{start}[A-Z2-7]{{8}}-" if start.endswith("-") else f"{start}$")
    (name,) = filter(own.match, chains)
    return [re.sub(r"-[A-Z2-7]{8}-\S+", "", rule) for rule in chains[name].rules]


def test_few_endpoints_are_rules_and_many_a_map() -> None:
    def behind(count: int) -> list[str]:
        members = [endpoint(f"10.244.1.{n + 1}") for n in range(count)]
        return chain_of(table_of(service("web"), slice_of("web", *members)), "service-")

    assert behind(1) == ["meta l4proto tcp dnat to 10.244.1.1:80"]
    assert behind(3) == [
        "numgen random mod 3 0 meta l4proto tcp dnat to 10.244.1.1:80",
        "numgen random mod 2 0 meta l4proto tcp dnat to 10.244.1.2:80",
        "meta l4proto tcp dnat to 10.244.1.3:80",
    ]
    assert len(behind(MOST_RULES)) == MOST_RULES
    (only,) = behind(MOST_RULES + 1)
    assert only.startswith(
        f"meta l4proto tcp dnat ip to numgen random mod {MOST_RULES + 1} map {{ 0 : "
    )


MARK = "meta mark set meta mark | 0x00004000 comment"
OUTSIDE = f'{MARK} "masquerade clusterIP traffic from outside cluster"'
TO_VIP = "ip daddr @cluster-ips "
MASQUERADES = [
    (None, False, []),
    (Detector("cidr", "10.244.0.0/16"), False, [f"{TO_VIP}ip saddr != 10.244.0.0/16 {OUTSIDE}"]),
    (Detector("cidr", "10.244.0.7/32"), False, [f"{TO_VIP}ip saddr != 10.244.0.7 {OUTSIDE}"]),
    (Detector("cidr", "0.0.0.0/0"), False, []),
    (Detector("interface", "cbr0"), False, [f'{TO_VIP}iifname != "cbr0" {OUTSIDE}']),
    (Detector("prefix", "cali"), False, [f'{TO_VIP}iifname != "cali*" {OUTSIDE}']),
    (Detector("prefix", "cali"), True, [f'{TO_VIP}{MARK} "masquerade clusterIP traffic"']),
]


@pytest.mark.parametrize(("detector", "every", "rules"), MASQUERADES)
def test_who_is_masqueraded_on_the_way_to_a_cluster_ip(
    detector: Detector | None, every: bool, rules: list[str]
) -> None:
    chosen = options(detector=detector, masquerade_all=every)
    assert chain_of(ForwardingTable(), "services", chosen)[:-2] == rules


@pytest.mark.parametrize(
    ("addresses", "elements", "head"),
    [
        (None, None, "fib daddr type local ip daddr != 127.0.0.0/8"),
        (("192.0.2.1", "127.0.0.1", "192.0.2.2"), {"192.0.2.1": "", "192.0.2.2": ""},
         "ip daddr @nodeport-ips"),
        ((), {}, "ip daddr @nodeport-ips"),
    ],
)  # fmt: skip
def test_node_ports_answer_on_every_address_of_the_node_or_on_the_chosen_but_never_on_localhost(
    addresses: tuple[str, ...] | None, elements: dict[str, str] | None, head: str
) -> None:
    chosen = options(node_port_addresses=addresses)
    wanted = rules_of(ForwardingTable(), chosen).wanted()
    assert wanted.elements.get("nodeport-ips") == elements
    assert wanted.chains["services"].rules[-1] == (
        f"{head} meta l4proto . th dport vmap @service-nodeports"
    )


def test_source_ranges_that_overlap_are_one_and_let_the_node_in_by_the_balancers_address() -> None:
    one = exposed(
        vips=["192.0.2.1"],
        loadBalancerSourceRanges=["203.0.113.0/24", "203.0.113.7/32", "192.168.77.0/24"],
    )
    table = table_of(one, slice_of("web", endpoint("10.244.1.5")))
    assert chain_of(table, "firewall-") == [
        "ip saddr != { 192.0.2.1, 192.168.77.0/24, 203.0.113.0/24 } drop"
    ]


def test_without_service_cidrs_nothing_is_dropped_as_unallocated() -> None:
    assert chain_of(ForwardingTable(), "cluster-ips-check") == [
        'ip daddr @cluster-ips reject comment "Reject traffic to invalid ports of ClusterIPs"'
    ]


def test_an_address_that_two_services_claim_is_the_firsts_and_then_the_others() -> None:
    def both(*names: str) -> ForwardingTable:
        return table_of(
            *(exposed(name, ip=f"10.96.0.{ord(name)}", externalIPs=["192.0.2.9"])
              for name in names),
            *(slice_of(name, endpoint("10.244.1.5")) for name in names),
        )  # fmt: skip

    kernel, rules = PretendNft(), rules_of(both("a", "b"))
    for names, owner in (("ab", "a"), ("b", "b"), ("ab", "a"), ("a", "a")):
        rules.update(both(*names), None)
        kernel.apply(rules.partial())
        rules.committed()
        place = kernel.held.elements["service-ips"]["192.0.2.9 . tcp . 80"]
        assert f"default/{owner}/tcp" in place


EVIL = 'x" drop; } flush ruleset; #'


def test_a_name_from_elsewhere_does_not_become_a_rule() -> None:
    one = Forwarding(("default", EVIL), f"default/{EVIL}:p\n{{", "tcp", "10.96.0.9", 80)
    text = render_rules(ForwardingTable(4, 1, {one.key: (one,)}), options())
    assert "flush ruleset" not in text
    held = parse_table(text.splitlines(), "ip")
    assert held.elements["no-endpoint-services"] == {
        "10.96.0.9 . tcp . 80":
        ' comment "default/x??drop????flush?ruleset???:p??" : goto reject-chain'
    }  # fmt: skip


@pytest.mark.root
def test_a_name_from_elsewhere_is_taken_by_the_kernel(namespace: Callable[..., str]) -> None:
    key = ("default", EVIL * 10)
    ends = (Endpoint("10.244.1.5", 80, True), Endpoint("10.244.1.6", 80))
    one = Forwarding(
        key, f"{'/'.join(key)}:{'ü' * 99}", "tcp", "10.96.0.9", 80, 30080, affinity=90061,
        cluster=ends, has_endpoints=True,
    )  # fmt: skip
    other = Forwarding(("default", "other"), f"default/{'o' * 200}:p", "udp", "10.96.0.8", 80)
    rules = rules_of(ForwardingTable(4, 1, {key: (one,), other.key: (other,)}))
    namespace("-f", "-", text=rules.partial())
    held = parse_table(namespace("-y", "list", "table", "ip", "kube-proxy").splitlines(), "ip")
    assert list(find_differences(held, rules.wanted())) == []


# --- What is said to whom -------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_rule_and_element_is_explained(family: Family) -> None:
    table = cluster_table(family)
    plain = render_rules(table, options(family), service_cidrs=SERVICE_CIDRS[family]).splitlines()
    told = render_rules(table, options(family), True, SERVICE_CIDRS[family]).splitlines()
    assert [line.partition(" # ")[0] for line in told] == plain
    for line in told:
        unexplained = line.strip().startswith(
            ("table", "set", "map", "chain", "type ", "comment", "size", "flags", "timeout", "}")
        )
        assert bool(line.partition(" # ")[2]) != (unexplained or not line), line
    names = {f"{one.name} {one.port}/{one.protocol}: " for one in table}
    assert all(any(name in line for line in told) for name in names)


EXPLAINED = [
    ("10.96.10.1 . tcp . 80 : goto service-", "default/web:http 80/tcp: ClusterIP; its endpoints"),
    ("tcp . 30080 : goto", "prod/api:http 8080/tcp: node port"),
    ("numgen random mod 3 0 meta l4proto tcp dnat to 10.244.1.90:80",
     "prod/api:http 8080/tcp: to this endpoint one time in 3"),
    ("192.0.2.63 . tcp . 80 comment",
     "prod/lb-local-remote:http 80/tcp: traffic policy Local, and no endpoint on this node"),
    ("10.96.10.5 . tcp . 80 comment", "default/noeps:http 80/tcp: no endpoints: refused at once"),
    ("ip saddr != { 198.51.100.7", "prod/lb:http 8080/tcp: only clients in loadBalancerSource"),
    ("update @affinity-BOCFRJZS", "prod/sticky:http 80/tcp: the client stays with this endpoint"
     " for 600 s"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "why"), EXPLAINED)
def test_the_reason_is_the_right_one(rule: str, why: str) -> None:
    told = render_rules(cluster_table(4), options(4), True, SERVICE_CIDRS[4]).splitlines()
    (line,) = (one for one in told if f" # {why}" in one and rule in one)
    assert line.index(rule) < line.index(why)


def test_each_line_of_a_text_is_known_to_be_its_services() -> None:
    table = cluster_table(4)
    rules = rules_of(table)
    owned: set[Key] = set()
    for line in rules.partial().splitlines():
        owner = rules.owner(line)
        if owner is not None:
            owned.add(owner)
        name = re.search(
            r"(?:service|local|external|firewall)-[A-Z2-7]{8}-(\w[\w-]*/[\w-]+)/", line
        )
        if name is not None:
            assert owner is not None and "/".join(owner) == name[1], line
    assert owned == set(table.services)


# --- Whichever way the kernel came to them ----------------------------------------------------

_ADDRESSES = [f"10.244.{n // 8 + 1}.{n}" for n in range(16)]
_endpoints = st.lists(
    st.builds(Endpoint, st.sampled_from(_ADDRESSES), st.sampled_from([80, 8080]), st.booleans()),
    max_size=11, unique_by=str,
).map(lambda found: tuple(sorted(found, key=str)))  # fmt: skip


@st.composite
def forwardings(draw: st.DrawFn, number: int) -> tuple[Forwarding, ...]:
    """The ports of one Service; addresses of Services may be the same."""
    ports = []
    for name, protocol in draw(
        st.lists(st.sampled_from([("a", "tcp"), ("b", "udp"), ("a", "udp")]), unique=True)
    ):
        cluster = draw(_endpoints)
        local = tuple(one for one in cluster if one.local)
        ports.append(
            Forwarding(
                ("default", f"s{number}"), f"default/s{number}:{name}", protocol,  # type: ignore[arg-type]
                f"10.96.0.{number}", draw(st.sampled_from([80, 81])),
                draw(st.sampled_from([0, 30080])),
                tuple(draw(st.lists(st.sampled_from(["192.0.2.1", "192.0.2.2"]), unique=True))),
                tuple(draw(st.lists(st.sampled_from(["192.0.2.2", "192.0.2.3"]), unique=True))),
                draw(st.sampled_from([(), ("203.0.113.0/24",)])), draw(st.booleans()),
                draw(st.sampled_from([0, 600, 3600])), draw(st.booleans()), draw(st.booleans()), 0,
                cluster, local, bool(cluster),
            )
        )  # fmt: skip
    return tuple(ports)


@st.composite
def tables(draw: st.DrawFn) -> list[ForwardingTable]:
    """A sequence of tables."""
    found = []
    services: dict[Key, tuple[Forwarding, ...]] = {}
    for _ in range(draw(st.integers(1, 5))):
        for number in draw(st.lists(st.integers(1, 3), unique=True)):
            ports = draw(forwardings(number))
            services.pop(("default", f"s{number}"), None)
            if ports:
                services[ports[0].key] = ports
        found.append(ForwardingTable(4, 1, dict(services)))
    return found


def changed(before: ForwardingTable, after: ForwardingTable) -> set[Key]:
    keys = before.services.keys() | after.services.keys()
    return {key for key in keys if before.services.get(key) != after.services.get(key)}


@given(tables(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_change_by_change_the_kernel_comes_to_the_same_rules(
    sequence: list[ForwardingTable], delayed: bool
) -> None:
    kernel = PretendNft()
    rules = NftablesRules(options(), delayed=delayed)
    before = ForwardingTable()
    for table in sequence:
        rules.update(table, changed(before, table))
        kernel.apply(rules.partial())
        rules.committed()
        before = table
        fresh = rules_of(table)
        assert list(find_differences(kernel.held, fresh.wanted())) == []
        assert rules.counts() == fresh.counts()
        assert rules.partial() == ""
    kernel.apply(rules.leftovers())
    rules.tidied()
    assert kernel.held.chains.keys() == rules_of(before).wanted().chains.keys()


@given(tables(), st.data())
@settings(max_examples=150, deadline=None)
def test_whatever_the_kernel_holds_one_transaction_puts_it_right(
    sequence: list[ForwardingTable], data: st.DataObject
) -> None:
    """After a restart, a lost transaction, or somebody else's change."""
    kernel = PretendNft()
    kernel.apply(rules_of(sequence[0]).partial())
    held = kernel.held
    for name in data.draw(st.sets(st.sampled_from(sorted(held.chains)), max_size=4)):
        held.chains[name] = held.chains[name]._replace(rules=("drop",))
    for place in data.draw(st.sets(st.sampled_from(sorted(held.elements)), max_size=3)):
        if not place.startswith("affinity-"):
            held.elements[place] = dict(itertools.islice(held.elements[place].items(), 1))
    fresh = rules_of(sequence[-1])
    kernel.apply(fresh.full(held))
    fresh.committed()
    assert list(find_differences(kernel.held, fresh.wanted())) == []
    assert fresh.full(kernel.held) == ""


def test_affinity_sets_outlive_all_but_their_time_out() -> None:
    def sticky(seconds: int, *more: str) -> ForwardingTable:
        config = {"clientIP": {"timeoutSeconds": seconds}}
        one = service("web", sessionAffinity="ClientIP", sessionAffinityConfig=config)
        members = [endpoint(ip) for ip in ("10.244.1.5", *more)]
        return table_of(one, slice_of("web", *members))

    kernel, rules = PretendNft(), rules_of(sticky(600))
    kernel.apply(rules.partial())
    rules.committed()
    (name,) = (one for one in kernel.held.sets if one.startswith("affinity-"))
    for table in (sticky(600, "10.244.1.6"), sticky(600)):
        rules.update(table, None)
        text = rules.partial()
        assert f" {name} {{ type" not in text and f"delete set ip kube-proxy {name}\n" not in text
        kernel.apply(text)
        rules.committed()
    assert "set" not in re.findall(r"delete (\w+)", rules.full(kernel.held))
    rules.update(sticky(900), None)
    kernel.apply(rules.partial())
    assert "timeout 15m" in kernel.held.sets[name][1]


def test_a_table_of_another_make_is_made_anew() -> None:
    rules = rules_of(cluster_table(4))
    held = rules.wanted()
    other = held.chains["filter-input"]
    held.chains["filter-input"] = other._replace(
        head=("type filter hook input priority 10; policy accept;",)
    )
    text = rules.full(held)
    assert text.startswith("delete table ip kube-proxy\n")
    kernel = PretendNft()
    kernel.held.present = True
    kernel.apply(text)
    assert list(find_differences(kernel.held, rules.wanted())) == []


# --- What versions of nft print ---------------------------------------------------------------


def test_priorities_and_numbers_are_read_whichever_way_they_are_printed() -> None:
    rules = rules_of(cluster_table(4))
    text = render_rules(cluster_table(4), options())
    for ours, theirs in (
        ("prerouting priority -110", "prerouting priority dstnat - 10"),
        ("priority 100", "priority srcnat"),
        ("meta l4proto tcp", "meta l4proto 6"),
        (" . sctp . ", " . 132 . "),
        ("tcp . 30080", "6 . 30080"),
    ):
        assert ours in text
        text = text.replace(ours, theirs)
    held = parse_table(text.splitlines(), "ip")
    assert list(find_differences(held, rules.wanted())) == []


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("ip6 saddr ::192.0.2.1 drop", "ip6 saddr ::c000:201 drop"),
        ("::ffff:192.0.2.1 . tcp . 80", "::ffff:c000:201 . tcp . 80"),
        ("ip saddr != { 203.0.113.0/24, 10.0.0.1 } drop",
         "ip saddr != { 10.0.0.1, 203.0.113.0/24 } drop"),
        ("ip saddr != { 10.0.0.0/8 } drop", "ip saddr != 10.0.0.0/8 drop"),
    ],
)  # fmt: skip
def test_an_address_is_read_whichever_way_it_is_printed(theirs: str, ours: str) -> None:
    assert respelt(theirs) == ours


def test_a_version_that_prints_rules_its_own_way_is_compared_by_where_they_lead() -> None:
    rules = rules_of(cluster_table(4))
    held = rules.wanted()
    masquerading = held.chains["masquerading"]
    held.chains["masquerading"] = masquerading._replace(
        rules=tuple(one.replace("fully-random", "fully_random") for one in masquerading.rules)
    )
    assert list(find_differences(held, rules.wanted(), exact=False)) == []
    assert list(find_differences(held, rules.wanted())) == ["chain masquerading: has other rules"]
    held.chains["services"] = held.chains["services"]._replace(
        rules=(*held.chains["services"].rules[:-1], "ip daddr 10.0.0.1 drop")
    )
    assert list(find_differences(held, rules.wanted(), exact=False)) == [
        "chain services: has other rules"
    ]
