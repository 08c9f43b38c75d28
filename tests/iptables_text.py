"""iptables rule text for tests: what is in it, what two texts have in common, and what a kernel
would make of it.

Knows chains and the order of rules; what a rule means to a packet is kdns/proxy/packet.py's.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

# table -> chain -> its rules, without "-A CHAIN ".
Rules: TypeAlias = dict[str, dict[str, list[str]]]

BUILT_IN: Mapping[str, tuple[str, ...]] = {
    "filter": ("INPUT", "FORWARD", "OUTPUT"),
    "nat": ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"),
    "mangle": ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"),
}
TARGETS = frozenset("ACCEPT DROP RETURN REJECT MARK MASQUERADE DNAT".split())
CANARY = "KUBE-PROXY-CANARY"
NFACCT = re.compile(r" -m nfacct --nfacct-name +\S+")
# Chains that all Service ports write to: kube-proxy's order there is that of a Go map.
SHARED = frozenset(
    "KUBE-SERVICES KUBE-NODEPORTS KUBE-EXTERNAL-SERVICES KUBE-PROXY-FIREWALL".split()
)


def parse_saved(text: str) -> Rules:
    """Return what `iptables-save` printed, or what a text with nothing but -A lines asks for."""
    rules: Rules = {}
    for line in text.splitlines():
        if line.startswith("*"):
            table = rules.setdefault(line[1:], {})
        elif line.startswith(":"):
            table.setdefault(line[1:].split()[0], [])
        elif line.startswith("-A "):
            _, chain, rule = line.split(" ", 2)
            table.setdefault(chain, []).append(rule)
        elif line and not line.startswith("#") and line != "COMMIT":
            raise ValueError(f"not iptables-save's: {line!r}")
    return rules


def written(rules: Mapping[str, Mapping[str, Iterable[str]]]) -> Rules:
    """Leave out what nobody wrote: built-in chains without rules, and tables without chains."""
    found: Rules = {}
    for table, chains in rules.items():
        for chain, lines in chains.items():
            if (kept := list(lines)) or chain not in BUILT_IN[table]:
                found.setdefault(table, {})[chain] = kept
    return found


def normalised(rules: Rules) -> Rules:
    """Return the rules as two proxies that mean the same both have them (reference 1.14).

    Left out: the canary, which is a chain nobody jumps to. In chains that all Services share,
    Services are put in order of their names; the rules of one Service stay as they were, and
    the way to the node ports stays last.
    """
    return {
        table: {
            chain: sorted(lines, key=_owner) if chain in SHARED else lines
            for chain, lines in chains.items()
            if chain != CANARY
        }
        for table, chains in written(rules).items()
        if table != "mangle"
    }


def _owner(rule: str) -> tuple[bool, str]:
    comment = re.search(r'--comment "([^"]*)"', rule)
    assert comment is not None, rule
    return "NOTE: this must be the last rule" in comment[1], comment[1].split()[0]


def differences(ours: Rules, theirs: Rules) -> list[tuple[str, str, str]]:
    """Return (table, chain, "+ our rule" or "- their rule") where two rule sets differ; a chain
    with the same rules in another order is one difference."""
    found = []
    for table in sorted(ours.keys() | theirs.keys()):
        mine, other = ours.get(table, {}), theirs.get(table, {})
        for chain in sorted(mine.keys() | other.keys()):
            here, there = mine.get(chain), other.get(chain)
            if here == there:
                continue
            if here is None or there is None:
                found.append((table, chain, "- no such chain" if here is None else "+ a chain"))
            lines = [f"+ {one}" for one in here or () if one not in (there or ())]
            lines += [f"- {one}" for one in there or () if one not in (here or ())]
            found += [(table, chain, line) for line in lines or ["order"]]
    return found


class Refused(Exception):
    """iptables-restore would fail: at which line, and why."""


class PretendKernel:
    """The rules of one namespace, as `iptables-restore --noflush` changes them.

    Each table's section is one transaction, as in both variants of iptables. It refuses what
    they refuse: a jump to, or a change of, a chain that is not there, a rule to delete or a
    place to insert that is not there, and to delete a chain that has rules or is jumped to.
    """

    def __init__(self) -> None:
        self.rules: Rules = {
            table: {chain: [] for chain in chains} for table, chains in BUILT_IN.items()
        }

    def restore(self, text: str) -> None:
        table, chains = "", dict[str, list[str]]()
        for line in text.splitlines():
            if line.startswith("*"):
                table = line[1:]
                chains = {name: list(rules) for name, rules in self.rules[table].items()}
            elif line == "COMMIT":
                _check_jumps(chains)
                self.rules[table] = chains
            else:
                try:
                    _change(chains, line)
                except (KeyError, ValueError, IndexError) as error:
                    raise Refused(f"{line}: {error!r}") from None

    def saved(self) -> Rules:
        return {table: dict(chains) for table, chains in self.rules.items()}


def _change(chains: dict[str, list[str]], line: str) -> None:
    word, chain, *_ = line.split()
    match word:
        case "-A":
            chains[chain].append(line.split(" ", 2)[2])
        case "-I":
            _, _, number, rule = line.split(" ", 3)
            if not 1 <= int(number) <= len(chains[chain]) + 1:
                raise IndexError(number)
            chains[chain].insert(int(number) - 1, rule)
        case "-D":
            chains[chain].remove(line.split(" ", 2)[2])
        case "-X":
            if chains[chain]:
                raise ValueError("has rules")
            jumped = [one for one, rules in chains.items() if any(map(_goes_to(chain), rules))]
            if jumped:
                raise ValueError(f"is jumped to from {jumped}")
            del chains[chain]
        case _ if word.startswith(":"):
            chains[word[1:]] = []
        case _:
            raise ValueError("not understood")


def _goes_to(chain: str) -> Callable[[str], bool]:
    return lambda rule: rule.endswith(f"-j {chain}")


def _check_jumps(chains: Mapping[str, list[str]]) -> None:
    for chain, rules in chains.items():
        for rule in rules:
            target = target_of(rule)
            if target and target not in chains and target not in TARGETS:
                raise Refused(f"{chain}: no chain {target} to jump to")


def target_of(rule: str) -> str:
    """Return where a rule leads to; "" if it has no target."""
    words = shlex.split(rule)
    return words[words.index("-j") + 1] if "-j" in words else ""


def without_counters(rules: Rules) -> Rules:
    """Leave out what kube-proxy writes where the kernel has nfacct: the match itself, and the
    rule that is there for nothing but to count what goes to node ports of 127.0.0.0/8."""
    return {
        table: {
            chain: [NFACCT.sub("", rule) for rule in lines if not _only_counts(rule)]
            for chain, lines in chains.items()
        }
        for table, chains in rules.items()
    }


def _only_counts(rule: str) -> bool:
    return "localhost_nps_accepted_pkts" in rule
