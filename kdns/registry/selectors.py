"""Label selectors: the text an API takes, a Service's map, a Deployment's LabelSelector.

Decides whether labels match; what is selected with it is for others. The grammar is
Kubernetes' (docs "Labels and Selectors"): `a=b`, `a!=b`, `a in (b,c)`, `a notin (b,c)`,
`a`, `!a`, joined by commas that all must hold.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kdns.errors import KdnsError

_TOKEN = re.compile(r"==|!=|=|!|,|\(|\)|[^\s=!,()<>]+|[<>]")
_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?\Z")
_PREFIX = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*\Z")
MAX_PART = 63  # characters of a label value or of a key after its prefix
MAX_PREFIX = 253


class BadSelector(KdnsError):
    """The text is not a label selector."""


@dataclass(frozen=True, slots=True)
class Requirement:
    """One condition.

    values -- what the value must be one of; None: any value
    negate -- the condition holds if it is none of them
    """

    key: str
    values: frozenset[str] | None
    negate: bool = False

    def matches(self, labels: Mapping[str, str]) -> bool:
        value = labels.get(self.key)
        if value is None:
            return self.negate  # `!=` and `notin` hold for labels without the key
        found = self.values is None or value in self.values
        return found is not self.negate


@dataclass(frozen=True, slots=True)
class Selector:
    """Requirements that all must hold; none: everything matches."""

    requirements: tuple[Requirement, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        return all(requirement.matches(labels) for requirement in self.requirements)


def selector_of(
    labels: Mapping[str, str] | None, expressions: Sequence[Requirement] = ()
) -> Selector:
    """Return the selector of a map of labels (a Service's, a workload's matchLabels) and of
    further requirements (its matchExpressions)."""
    pairs = sorted((labels or {}).items())
    return Selector((*(Requirement(k, frozenset((v,))) for k, v in pairs), *expressions))


def requirement_of(key: str, operator: str, values: Sequence[str]) -> Requirement:
    """Return one of a LabelSelector's matchExpressions. Raises BadSelector."""
    match operator:
        case "In" | "NotIn":
            if not values:
                raise BadSelector(f"operator {operator} of {key!r} needs values")
            return Requirement(key, frozenset(values), operator == "NotIn")
        case "Exists" | "DoesNotExist":
            return Requirement(key, None, operator == "DoesNotExist")
    raise BadSelector(f"operator {operator!r} is not one of In, NotIn, Exists, DoesNotExist")


def parse_selector(text: str) -> Selector:
    """Return the selector `text` says. Raises BadSelector, which tells what is wrong."""
    tokens = _TOKEN.findall(text)  # every character but space starts a token
    requirements: list[Requirement] = []
    at = 0
    while at < len(tokens):
        requirement, at = _requirement(tokens, at)
        requirements.append(requirement)
        if at == len(tokens):
            break
        if tokens[at] != ",":
            raise BadSelector(f"expected ',' before {tokens[at]!r} in {text!r}")
        at += 1
        if at == len(tokens):
            raise BadSelector(f"nothing after the last ',' in {text!r}")
    return Selector(tuple(requirements))


def _requirement(tokens: Sequence[str], at: int) -> tuple[Requirement, int]:
    """Read one requirement from tokens[at]; return it and where the next token stands."""
    negate = tokens[at] == "!"
    if negate:
        at += 1
    key = _key(_at(tokens, at, "a key"))
    at += 1
    operator = tokens[at] if at < len(tokens) else ","
    if negate or operator == ",":
        return Requirement(key, None, negate), at
    at += 1
    match operator:
        case "=" | "==" | "!=":
            # `a=` means: the value is empty.
            value = tokens[at] if at < len(tokens) and tokens[at] != "," else ""
            at += 1 if value else 0
            return Requirement(key, frozenset((_value(value),)), operator == "!="), at
        case "in" | "notin":
            values, at = _values(tokens, at)
            return Requirement(key, values, operator == "notin"), at
        case "<" | ">" | "gt" | "lt":
            raise BadSelector(f"operator {operator!r} is not supported; use in, notin, = or !=")
    raise BadSelector(f"{operator!r} after {key!r} is not an operator; use =, !=, in or notin")


def _values(tokens: Sequence[str], at: int) -> tuple[frozenset[str], int]:
    if _at(tokens, at, "'('") != "(":
        raise BadSelector(f"expected '(' before {tokens[at]!r}: write in (a,b)")
    at += 1
    values: set[str] = set()
    last = ","
    while True:
        token = _at(tokens, at, "')'")
        at += 1
        if token in (",", ")"):
            if last == ",":
                values.add("")  # `in (a,)` has an empty value
        elif last == ",":
            values.add(_value(token))
        else:
            raise BadSelector(f"expected ',' or ')' before {token!r}")
        if token == ")":
            return frozenset(values), at
        last = token


def _at(tokens: Sequence[str], at: int, expected: str) -> str:
    if at >= len(tokens):
        raise BadSelector(f"expected {expected} at the end")
    return tokens[at]


def _key(text: str) -> str:
    prefix, slash, name = text.rpartition("/")
    if slash and (not _PREFIX.match(prefix) or len(prefix) > MAX_PREFIX):
        raise BadSelector(f"prefix of key {text!r} is not a DNS name")
    if not name or len(name) > MAX_PART or not _VALUE.match(name):
        raise BadSelector(f"{text!r} is not a label key")
    return text


def _value(text: str) -> str:
    if len(text) > MAX_PART or not _VALUE.match(text):
        raise BadSelector(f"{text!r} is not a label value")
    return text
