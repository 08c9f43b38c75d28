"""Forwarding table -> what nft must be told.

Holds the rules wanted, knows in what they differ from those the kernel was last given, and
says so as texts for `nft -f -`, each one transaction: whatever is wrong with what the kernel
holds, or the difference. Order is fixed, so that equal tables give equal text. What the rules
say is nftables_rules.py's; running nft is kernel/'s.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Final, NamedTuple, TypeAlias

from kdns.proxy.nftables_explain import Reasons
from kdns.proxy.nftables_listing import Held, is_built_alike, same_chain, same_set
from kdns.proxy.nftables_rules import (
    AFFINITY,
    NODE_PORT_IPS,
    TABLE,
    TABLE_COMMENT,
    UNALLOCATED,
    WORD,
    Chain,
    Definition,
    Spelling,
    affinity_set,
    fixed_chains,
    fixed_sets,
    node_port_elements,
)
from kdns.proxy.options import Options
from kdns.proxy.table import Forwarding, ForwardingTable
from kdns.registry.objects import Key

__all__ = ["TABLE", "Held", "NftablesRules", "render_rules"]

# Name of the Service port, protocol, how manieth of its elements, what follows the key. Where
# several ask for one key, the first gets it, as in every dataplane (table.conflicts).
_Claim: TypeAlias = tuple[str, str, int, str]


class _Holding(NamedTuple):
    """What is remembered of one Service: what it asks for."""

    chains: tuple[str, ...]
    sets: tuple[str, ...]
    claims: tuple[tuple[str, str, _Claim], ...]  # set or map, key, claim


_NOTHING: Final = _Holding((), (), ())


class _Difference(NamedTuple):
    """What the kernel has in place of what is wanted, where that is something else; None for
    nothing. elements -- set or map -> key -> what follows it"""

    chains: dict[str, Chain | None]
    sets: dict[str, Definition | None]
    elements: dict[str, dict[str, str | None]]


class NftablesRules:
    """The rules of one family: those wanted, and those the kernel was last given.

    Does no I/O. Whoever gives a text to the kernel says so with committed(), before the next
    update(); what failed to be applied is simply asked for again, as partial() or, to be sure,
    as full().

    service_cidrs -- those of the family that are known beside the table's: what is within and
                     no ClusterIP is dropped
    delayed -- the kernel cannot delete a chain in the transaction that takes away what leads
               there: it is emptied first, and goes with leftovers() a while later
    """

    def __init__(
        self, options: Options, service_cidrs: Iterable[str] = (), delayed: bool = False
    ) -> None:
        self._options = options
        self._delayed = delayed
        self._spelling = Spelling(options)
        self._word = WORD[options.family]
        self._holdings: dict[Key, _Holding] = {}
        self._given_cidrs = tuple(service_cidrs)
        self._cidrs: tuple[str, ...] = ()  # the table's
        self._fixed = fixed_chains(options, self._given_cidrs)
        self._chains: dict[str, Chain] = dict(self._fixed)
        self._sets: dict[str, Definition] = fixed_sets(options)
        self._claims: dict[str, dict[str, list[_Claim]]] = {name: {} for name in self._sets}
        self._difference = _Difference({}, {}, {})
        self._emptied: set[str] = set()  # chains in the kernel that await their deletion
        self._emptying: set[str] = set()  # those that the last text empties
        self._rules = sum(len(chain.rules) for chain in self._chains.values())
        self._committed = False
        for number, address in enumerate(node_port_elements(options)):
            self._claim(NODE_PORT_IPS, address, ("", "", number, ""))

    # --- what is wanted ---------------------------------------------------------------

    def update(
        self,
        table: ForwardingTable,
        changed: Collection[Key] | None,
        without: Collection[Key] = (),
    ) -> None:
        """Spell the Services in `changed` anew; None: all of them.

        without -- Services that get no rules
        """
        if table.service_cidrs != self._cidrs:
            self._cidrs = table.service_cidrs
            every = (*self._given_cidrs, *self._cidrs)
            self._set_chain(UNALLOCATED, fixed_chains(self._options, every)[UNALLOCATED])
        if changed is None:
            changed = table.services.keys() | self._holdings.keys()
        for key in sorted(changed):
            self._replace(key, () if key in without else table.services.get(key, ()))

    def _replace(self, key: Key, ports: Iterable[Forwarding]) -> None:
        chains: dict[str, Chain] = {}
        sets: dict[str, int] = {}
        claims: list[tuple[str, str, _Claim]] = []
        for port in ports:
            spelt = self._spelling.spell(port)
            chains.update(spelt.chains)
            sets.update(spelt.affinity)
            claims += [
                (one.place, one.key, (port.name, port.protocol, number, one.tail))
                for number, one in enumerate(spelt.elements)
            ]
        old = self._holdings.get(key, _NOTHING)
        new = _Holding(tuple(chains), tuple(sets), tuple(claims))
        for name in old.chains:
            if name not in chains:
                self._set_chain(name, None)
        for name, chain in chains.items():
            self._set_chain(name, chain)
        for name in old.sets:
            if name not in sets:
                self._set_set(name, None)
        for name, seconds in sets.items():
            self._set_set(name, affinity_set(self._options.family, seconds))
        self._set_claims(old, new)
        if ports:
            self._holdings[key] = new
        else:
            self._holdings.pop(key, None)

    def _set_chain(self, name: str, chain: Chain | None) -> None:
        old = self._chains.get(name)
        if chain == old:
            return
        if chain is None:
            del self._chains[name]
        else:
            self._chains[name] = chain
        self._rules += len(chain.rules if chain else ()) - len(old.rules if old else ())
        # Changed back before the kernel heard of it: no change.
        if self._difference.chains.setdefault(name, old) == chain:
            del self._difference.chains[name]

    def _set_set(self, name: str, definition: Definition | None) -> None:
        old = self._sets.get(name)
        if definition == old:
            return
        if definition is None:
            del self._sets[name]
        else:
            self._sets[name] = definition
        if self._difference.sets.setdefault(name, old) == definition:
            del self._difference.sets[name]

    def _set_claims(self, old: _Holding, new: _Holding) -> None:
        if old.claims == new.claims:
            return
        kept = set(old.claims).intersection(new.claims) if old.claims else ()
        for place, key, claim in old.claims:
            if (place, key, claim) not in kept:
                self._disclaim(place, key, claim)
        for place, key, claim in new.claims:
            if (place, key, claim) not in kept:
                self._claim(place, key, claim)

    def _claim(self, place: str, key: str, claim: _Claim) -> None:
        claims = self._claims[place].setdefault(key, [])
        old = claims[0][-1] if claims else None
        insort(claims, claim)
        self._note(place, key, old, claims[0][-1])

    def _disclaim(self, place: str, key: str, claim: _Claim) -> None:
        claims = self._claims[place][key]
        old = claims[0][-1]
        claims.remove(claim)
        if not claims:
            del self._claims[place][key]
        self._note(place, key, old, claims[0][-1] if claims else None)

    def _note(self, place: str, key: str, old: str | None, new: str | None) -> None:
        if old == new:
            return
        changed = self._difference.elements.setdefault(place, {})
        if changed.setdefault(key, old) == new:
            del changed[key]

    def wanted(self) -> Held:
        """Return what the kernel should hold."""
        return Held(
            True,
            dict(self._sets),
            {
                place: {key: claims[0][-1] for key, claims in keys.items()}
                for place, keys in self._claims.items()
            },
            dict(self._chains),
        )

    def counts(self) -> Mapping[str, int]:
        """Return how many chains, rules and elements are wanted."""
        return {
            "chains": len(self._chains),
            "rules": self._rules,
            "elements": sum(map(len, self._claims.values())),
        }

    def owner(self, line: str) -> Key | None:
        """Return the Service that a line of a text was written for; None: for none."""
        words = line.split(" ")
        if words[0] in ("add", "flush", "delete") and len(words) > 4:
            name = words[4]
            for key, holding in self._holdings.items():
                if name in holding.chains or name in holding.sets:
                    return key
            return None
        return self._claimant(line.strip().rstrip(","))

    def _claimant(self, text: str) -> Key | None:
        for keys in self._claims.values():
            for key, claims in keys.items():
                if text.startswith(key) and text == f"{key}{claims[0][-1]}" and claims[0][0]:
                    namespace, _, name = claims[0][0].partition(":")[0].partition("/")
                    return namespace, name
        return None

    # --- what to say ------------------------------------------------------------------

    def full(self, held: Held, exact: bool = True) -> str:
        """Return the text that leads from what the kernel holds to what is wanted; "" if there
        is nothing to do.

        exact -- nft prints rules as we write them: they are compared word by word
        """
        wanted = self.wanted()
        if held.present and is_built_alike(held, wanted):
            return self._text(self._compared(held, exact))
        text = f"delete table {self._word} {TABLE}\n" if held.present else ""
        nothing = _Difference(
            dict.fromkeys(wanted.chains),
            dict.fromkeys(wanted.sets),
            {place: dict.fromkeys(keys) for place, keys in wanted.elements.items()},
        )
        return text + self._text(nothing)

    def _compared(self, held: Held, exact: bool) -> _Difference:
        chains: dict[str, Chain | None] = {}
        sets: dict[str, Definition | None] = {}
        for name, definition in self._sets.items():
            there = held.sets.get(name)
            if there is None or not same_set(there, definition):
                sets[name] = there
        sets.update((name, one) for name, one in held.sets.items() if name not in self._sets)
        for name, chain in self._chains.items():
            found = held.chains.get(name)
            anew = any(one in sets for one, _ in chain.sets)
            if found is None or anew or not same_chain(found, chain, exact):
                chains[name] = found
        chains.update((name, one) for name, one in held.chains.items() if name not in self._chains)
        elements: dict[str, dict[str, str | None]] = {}
        for place, claims in self._claims.items():
            there_now = held.elements.get(place, {})
            changed: dict[str, str | None] = {
                key: there_now.get(key)
                for key, those in claims.items()
                if there_now.get(key) != those[0][-1]
            }
            changed.update((key, one) for key, one in there_now.items() if key not in claims)
            if changed:
                elements[place] = changed
        return _Difference(chains, sets, elements)

    def partial(self) -> str:
        """Return the text for what differs from what was last committed; "" if nothing does.

        As long as nothing was committed, that is everything.
        """
        return self._text(self._difference) if self._committed else self.full(Held())

    def committed(self) -> None:
        """Note that the kernel now holds what is wanted."""
        self._committed = True
        if self._delayed:
            self._emptied = (self._emptied | self._emptying) - self._chains.keys()
        for one in self._difference:
            one.clear()

    def leftovers(self) -> str:
        """Return the text that deletes the chains that were emptied; "" if there are none."""
        return "".join(
            f"delete chain {self._word} {TABLE} {name}\n" for name in sorted(self._emptied)
        )

    def tidied(self, there: Collection[str] | None = None) -> None:
        """Note that the leftovers are gone, but for those that are `there`."""
        self._emptied.intersection_update(there or ())

    def _text(self, difference: _Difference) -> str:
        """Return one transaction: what is in use is never taken away before its use is."""
        chains, sets, elements = difference
        self._emptying = chains.keys() - self._chains.keys()
        if not (chains or sets or any(elements.values())):
            return ""
        at = f"{self._word} {TABLE}"
        lines = [f'add table {at} {{ comment "{TABLE_COMMENT}"; }}\n']
        wanted = self._chains
        for name in sorted(chains, key=self._order):
            chain = wanted.get(name)
            if chain is not None and (chains[name] is None or name in self._emptied):
                head = f" {{ {' '.join(_closed(chain.head))} }}" if chain.head else ""
                lines.append(f"add chain {at} {name}{head}\n")
            if chains[name] is not None:
                lines.append(f"flush chain {at} {name}\n")
        for name, held in sets.items():
            if held is not None and name.startswith(AFFINITY):
                lines.append(f"delete {held[0]} {at} {name}\n")
        for name in sets:
            if (definition := self._sets.get(name)) is not None:
                kind, body = definition
                lines.append(f"add {kind} {at} {name} {{ {' '.join(_closed(body))} }}\n")
        for place, changed in elements.items():
            old = [key for key, tail in changed.items() if tail is not None]
            lines += _elements(f"delete element {at} {place}", sorted(old))
        for name in sorted(chains, key=self._order):
            if (chain := wanted.get(name)) is not None:
                lines += [f"add rule {at} {name} {rule}\n" for rule in chain.rules]
        for place, changed in elements.items():
            claims = self._claims.get(place, {})
            new = [f"{key}{claims[key][0][-1]}" for key in changed if key in claims]
            lines += _elements(f"add element {at} {place}", sorted(new))
        lines += self._farewell(difference, at)
        return "".join(lines)

    def _farewell(self, difference: _Difference, at: str) -> Iterator[str]:
        """Yield what deletes chains and sets that nothing leads to any more."""
        if not self._delayed:
            for name in sorted(self._emptying):
                yield f"delete chain {at} {name}\n"
        for name, held in difference.sets.items():
            if name not in self._sets and not name.startswith(AFFINITY) and held is not None:
                yield f"delete {held[0]} {at} {name}\n"

    def _order(self, name: str) -> tuple[bool, str]:
        return name not in self._fixed, name


def _closed(lines: Iterable[str]) -> Iterator[str]:
    """Yield lines of a definition as they must be where they are on one line."""
    return (line if line.endswith(";") else f"{line};" for line in lines)


def _elements(command: str, elements: list[str]) -> Iterator[str]:
    """Yield a command, an element a line: so nft says which it does not take."""
    if elements:
        yield f"{command} {{\n"
        yield ",\n".join(elements)
        yield "\n}\n"


# --- printing -------------------------------------------------------------------------------


def render_rules(
    table: ForwardingTable,
    options: Options,
    explain: bool = False,
    service_cidrs: Iterable[str] = (),
) -> str:
    """Return all rules as one text for `nft -f -` in an empty namespace, laid out as `nft list
    table` prints it.

    explain -- behind each rule and element a comment says whose it is and what it is for
    """
    rules = NftablesRules(options, service_cidrs)
    rules.update(table, None)
    wanted = rules.wanted()
    reasons = Reasons(table, options) if explain else None
    lines = [f"table {WORD[options.family]} {TABLE} {{", f'\tcomment "{TABLE_COMMENT}"']
    for name, (kind, body) in wanted.sets.items():
        lines += [f"\t{kind} {name} {{", *(f"\t\t{line}" for line in body)]
        elements = sorted(wanted.elements.get(name, {}).items())
        for number, (key, tail) in enumerate(elements):
            begin = "\t\telements = { " if number == 0 else "\t\t\t     "
            end = "," if number + 1 < len(elements) else ""
            why = f" # {reasons.element(name, key, tail)}" if reasons else ""
            lines.append(f"{begin}{key}{tail}{end}{why}")
        lines += [*(["\t\t}"] if elements else []), "\t}", ""]
    for name, chain in wanted.chains.items():
        lines += [f"\tchain {name} {{", *(f"\t\t{line}" for line in chain.head)]
        for rule in chain.rules:
            why = f" # {reasons.rule(name, rule)}" if reasons else ""
            lines.append(f"\t\t{rule}{why}")
        lines += ["\t}", ""]
    return "\n".join([*lines[:-1], "}", ""])
