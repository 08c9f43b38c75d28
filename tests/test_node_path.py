"""The rules of the DNS path as text: what is written, what is found again, what is removed.

That the kernel takes them, and what they do to packets, is test_node.py's.
"""

from __future__ import annotations

import re

import pytest

from kdns.kernel.dnspath import (
    HOOKS,
    IN,
    OUT,
    families_of,
    parse_saved,
    render_nftables,
    render_removal,
    render_table,
    wanted_rules,
)

FRESH = "*raw\n:PREROUTING ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\nCOMMIT\n"


def lines_of(text: str) -> list[bytes]:
    return [line.encode() + b"\n" for line in text.splitlines()]


def written(table: str, addresses: list[str]) -> str:
    """What iptables-save prints after our rules came to a fresh table."""
    chains = wanted_rules(addresses)[table]
    out = [f"*{table}", *(f":{hook} ACCEPT [0:0]" for hook in HOOKS[table].values())]
    out += [f":{chain} - [0:0]" for chain in chains]
    out += [f"-A {hook} -j {chain}" for chain, hook in HOOKS[table].items()]
    out += [f"-A {chain} {rule}" for chain, rules in chains.items() for rule in rules]
    return "\n".join([*out, "COMMIT", ""])


@pytest.mark.parametrize(
    ("address", "place"),
    [("10.96.0.10", "10.96.0.10/32"), ("fd00:10:96:0::a", "fd00:10:96::a/128")],
)
def test_every_way_of_a_question_and_its_answer_has_a_rule_in_both_tables(
    address: str, place: str
) -> None:
    rules = wanted_rules([address])
    for protocol in ("udp", "tcp"):
        asked = f"-d {place} -p {protocol} -m {protocol} --dport 53"
        told = f"-s {place} -p {protocol} -m {protocol} --sport 53"
        assert f"{asked} -j NOTRACK" in rules["raw"][IN]
        for way in (asked, told):
            assert f"{way} -j NOTRACK" in rules["raw"][OUT]
            assert f"{way} -j ACCEPT" in rules["filter"][OUT]
        assert f"{asked} -j ACCEPT" in rules["filter"][IN]
    # Nobody else's packets, and of none that merely say they come from there.
    for table, chain in ((t, c) for t in rules for c in rules[t]):
        for rule in rules[table][chain]:
            assert place in rule
            assert re.search(r"--[ds]port 53 -j", rule)
            if chain == IN and rule.startswith("-s"):
                assert " -i lo " in rule


def test_what_is_written_is_found_again() -> None:
    for table in HOOKS:
        saved = parse_saved(lines_of(written(table, ["10.96.0.10", "169.254.20.10"])))
        assert saved.chains == wanted_rules(["10.96.0.10", "169.254.20.10"])[table]
        assert saved.jumps == [f"{hook} -j {chain}" for chain, hook in HOOKS[table].items()]


def test_chains_are_filled_in_one_transaction_and_led_to_once() -> None:
    chains = wanted_rules(["10.96.0.10"])["raw"]
    first = render_table("raw", chains, parse_saved(lines_of(FRESH)))
    assert (first.count("COMMIT"), first.count("-D ")) == (1, 0)
    assert first.count("\n-I ") == 2
    # Twice, as after a half-hearted flush, they go before they come again.
    doubled = written("raw", ["10.96.0.10"]).replace(
        f"-A PREROUTING -j {IN}\n", f"-A PREROUTING -j {IN}\n" * 2
    )
    again = render_table("raw", chains, parse_saved(lines_of(doubled)))
    assert again.count(f"-D PREROUTING -j {IN}\n") == 2
    assert again.count(f"-I PREROUTING -j {IN}\n") == 1


def test_a_removal_takes_what_is_ours_and_nothing_else() -> None:
    assert render_removal("raw", parse_saved(lines_of(FRESH))) == ""
    text = written("raw", ["10.96.0.10"]).replace(
        "COMMIT", "-A PREROUTING -d 192.0.2.1/32 -j NOTRACK\n-A OTHER -j ACCEPT\nCOMMIT"
    )
    removal = render_removal("raw", parse_saved(lines_of(text)))
    assert removal.splitlines() == [
        "*raw",
        f":{IN} - [0:0]",
        f":{OUT} - [0:0]",
        f"-D PREROUTING -j {IN}",
        f"-D OUTPUT -j {OUT}",
        f"-X {IN}",
        f"-X {OUT}",
        "COMMIT",
    ]


@pytest.mark.parametrize("addresses", [["10.96.0.10"], ["fd00::a"], ["10.96.0.10", "fd00::a"]])
def test_the_nftables_table_is_replaced_as_a_whole_with_the_families_there_are(
    addresses: list[str],
) -> None:
    text = render_nftables(addresses)
    assert text.startswith("table inet kdns-dns { }\ndelete table inet kdns-dns\n")
    words = {"ip" if "." in one else "ip6" for one in addresses}
    assert set(re.findall(r"(ip6?) [ds]addr", text)) == words
    assert text.count("notrack") == 3 * len(words)
    assert text.count("priority -300") == 2


def test_only_families_that_have_an_address_are_written() -> None:
    assert families_of(["10.0.0.1", "169.254.20.10"]) == (4,)
    assert families_of(["fd00::a", "10.0.0.1"]) == (4, 6)
    assert families_of([]) == ()
