"""What a request body must be before anybody looks at what it says: JSON or YAML of bounded
depth and size, with fields that its type has, each of the type it should have.

Also brings values into the one form Kubernetes keeps them in: times in UTC, quantities in
canonical form ("0.5" is "500m"). Which values are allowed is validation.py's. References:
Go's encoding/json with strict fields (sigs.k8s.io/json), YAML 1.1 as go-yaml 2 reads it.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from functools import cache, lru_cache
from itertools import islice
from typing import Any, Final, NoReturn, TypeAlias

from kdns.api.schema import Field, Type, type_named
from kdns.api.status import bad_request
from kdns.errors import ApiError

Obj: TypeAlias = dict[str, Any]

MAX_DEPTH: Final = 100  # of nested JSON or YAML; a Pod is 12 deep
MAX_JSON_PARTS: Final = 200_000  # lists and maps
MAX_YAML_NODES: Final = 200_000  # with what aliases stand for; a 3 MiB EndpointSlice has 20,000
LONG_TIME: Final = 40  # a time has 35 letters, with an offset and all of Go's digits
MAX_PROBLEMS: Final = 100  # told of one object, as upstream


@dataclass
class Checked:
    """obj -- the object with known fields only; problems -- 'unknown field "spec.foo"'."""

    obj: Obj
    problems: list[str] = field(default_factory=list)


def check_object(type_name: str, obj: Obj) -> Checked:
    """Hold an object against its type. The object given is not changed. Nulls are dropped,
    as Go drops them. Raises ApiError 400 at the first value of a wrong JSON type."""
    kind = type_named(type_name)
    checked = Checked({})
    try:
        checked.obj = _check_message(kind, obj, "", checked.problems)
    except (_Mismatch, _BadText) as e:
        raise bad_request(
            f'{kind.kind} in version "{kind.api_version}" cannot be handled as a {kind.kind}: {e}'
        ) from None
    del checked.problems[MAX_PROBLEMS:]
    return checked


def settle(type_name: str, obj: Obj) -> Obj:
    """Return an object as Go writes it back: empty values that say nothing are left out ("",
    0, false, [], {} where there is no pointer), structs that are no pointers are there
    ("status": {}), and so is what is required. Not for what somebody applies: there an empty
    value is owned, and what is not there is not. obj -- as check_object gives it
    """
    fields = type_named(type_name).fields
    found: Obj = {}
    for name, value in obj.items():
        known = fields[name]
        if known.shape != "one":
            if value or known.written:
                one_by_one = known.shape == "list" and not known.scalar
                found[name] = [settle(known.type, x) for x in value] if one_by_one else value
        elif not known.scalar:
            found[name] = settle(known.type, value)
        elif value or known.pointer or known.written:
            found[name] = value
    for name, inner, zero in _always(type_name):
        if name not in found:
            found[name] = settle(inner, {}) if inner else zero
    return found


def parse_json(body: bytes) -> tuple[Obj, list[str]]:
    """Return a body's object, and 'duplicate field "x"' for each key given twice (the last
    one counts). Raises ApiError 400."""
    repeated: list[tuple[Obj, str]] = []

    def collect(pairs: list[tuple[str, Any]]) -> Obj:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    repeated.append((found, key))
                seen.add(key)
        return found

    try:
        value = json.loads(
            body.decode(), object_pairs_hook=collect, parse_constant=_no_number, parse_float=_finite
        )
    except RecursionError:
        raise _too_deep() from None
    except ValueError as e:  # JSONDecodeError and UnicodeDecodeError are ones
        raise _malformed("json", str(e)) from None
    if not isinstance(value, dict):
        raise _malformed("json", f"an object was expected, not {_json_type(value)}")
    if body.count(b"{") + body.count(b"[") > MAX_DEPTH:
        _bound_size(value)
    problems: list[str] = []
    if repeated:
        problems = list(dict.fromkeys(islice(_paths_of(value, repeated), MAX_PROBLEMS)))
    return sound(body, value), problems


def parse_yaml(body: bytes, problems: list[str] | None = None) -> Obj:
    """Return the object in a body of YAML or JSON, one document. Raises ApiError 400.

    problems -- keys given twice are told here (the last one counts)
    """
    told = [] if problems is None else problems
    if body.lstrip().startswith(b"{"):
        try:
            obj, repeated = parse_json(body)
        except ApiError as e:
            try:  # braces are YAML as well
                return _YamlReader(told).read(body)
            except ApiError:
                raise e from None
        told += repeated
        return obj
    return _YamlReader(told).read(body)


# --- types --------------------------------------------------------------------------------


class _Mismatch(Exception):
    """A value that its field cannot hold. The way to it is put together as it is passed up."""

    def __init__(self, what: str, wanted: str) -> None:
        self.what, self.wanted = what, wanted
        self.struct = ""
        self.path: list[str] = []

    def __str__(self) -> str:
        return (
            f"json: cannot unmarshal {self.what} into Go struct field"
            f" {'.'.join((self.struct, *reversed(self.path)))} of type {self.wanted}"
        )


class _BadText(Exception):
    """A text that says nothing of what it should, in the words of Go's own reader of it; those
    do not know which field they read."""


def _check_message(kind: Type, value: Obj, path: str, problems: list[str]) -> Obj:
    found: Obj = {}
    fields = kind.fields
    for key, inner in value.items():
        known = fields.get(key)
        if known is None:
            problems.append(f'unknown field "{_join(path, key)}"')
        elif inner is not None:
            # Only what has fields of its own can have unknown ones, to be told with their place.
            at = "" if known.scalar else _join(path, key)
            try:
                if known.shape == "one":
                    found[key] = _check_value(known, inner, at, problems)
                elif known.shape == "list":
                    found[key] = _check_list(known, inner, at, problems)
                else:
                    found[key] = _check_map(known, inner, problems)
            except _Mismatch as e:
                if not e.struct:
                    e.struct = kind.kind
                    e.wanted = _go_type(kind, known, e.wanted)
                e.path.append(key)
                raise
    return found


def _check_list(known: Field, value: Any, path: str, problems: list[str]) -> list[Any]:
    if not isinstance(value, list):
        raise _Mismatch(_json_type(value), "[]")
    if known.scalar:
        return [_check_value(known, one, "", problems) for one in value]
    return [
        _check_value(known, one, f"{path}[{index}]", problems) for index, one in enumerate(value)
    ]


def _check_map(known: Field, value: Any, problems: list[str]) -> Obj:
    """Of scalars: no map of upstream's has messages in it."""
    if not isinstance(value, dict):
        raise _Mismatch(_json_type(value), "map[string]")
    return {key: _check_value(known, one, "", problems) for key, one in value.items()}


# What Go makes of a null in a list or a map.
_ZERO: Final[dict[str, object]] = {
    "string": "", "bytes": "", "int32": 0, "int64": 0, "bool": False, "quantity": "0",
    "intorstring": 0, "strings": None,
}  # fmt: skip


def _check_value(known: Field, value: Any, path: str, problems: list[str]) -> Any:
    kind = known.type
    if value is None:
        return _ZERO.get(kind, {})
    match kind:
        case "string":
            if isinstance(value, str):
                return value
        case "bool":
            if isinstance(value, bool):
                return value
        case "int32" | "int64":
            if isinstance(value, int) and not isinstance(value, bool):
                half = 1 << (31 if kind == "int32" else 63)
                if -half <= value < half:
                    return value
            if _json_type(value) == "number":
                raise _Mismatch(f"number {_clipped(value)}", "")
        case "bytes":
            if isinstance(value, str):
                return _check_bytes(value)
        case "time" | "microtime":
            return _check_time(value, micro=kind == "microtime")
        case "quantity":
            return _check_quantity(value)
        case "intorstring":
            return _check_int_or_string(value)
        case "fieldsv1":
            if isinstance(value, dict):
                return value
        case "strings":
            if isinstance(value, list) and all(isinstance(one, str) for one in value):
                return value
        case _ if isinstance(value, dict):
            return _check_message(type_named(kind), value, path, problems)
    raise _Mismatch(_json_type(value), "")


@cache
def _always(type_name: str) -> tuple[tuple[str, str, object], ...]:
    """What Go writes of a type though nobody gave it: name, type, and the value of a scalar."""
    found: list[tuple[str, str, object]] = []
    for one in type_named(type_name).fields.values():
        if one.shape == "one" and not one.pointer:
            if not one.scalar:
                found.append((one.name, one.type, None))
            elif one.type == "quantity" or (one.required and one.type not in ("time", "microtime")):
                found.append((one.name, "", _ZERO[one.type]))
    return tuple(found)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _json_type(value: Any) -> str:
    """Go's word for a JSON value."""
    match value:
        case None:
            return "null"
        case bool():
            return "bool"
        case str():
            return "string"
        case list():
            return "array"
        case dict():
            return "object"
    return "number"


# Go's names of types that are a string or a map: which fields have them. Of the fields that
# people write, those with a name of their own; all others say what they are.
_GO_NAMES: Final = """
types.UID ObjectMeta.uid OwnerReference.uid ObjectReference.uid Preconditions.uid
v1.AddressType EndpointSlice.addressType
v1.Capability Capabilities.add Capabilities.drop
v1.ConditionStatus Condition.status PodCondition.status NodeCondition.status
v1.ContainerRestartPolicy Container.restartPolicy
v1.DNSPolicy PodSpec.dnsPolicy
v1.DeletionPropagation DeleteOptions.propagationPolicy
v1.DeploymentStrategyType DeploymentStrategy.type
v1.FinalizerName NamespaceSpec.finalizers
v1.IPFamily ServiceSpec.ipFamilies
v1.IPFamilyPolicy ServiceSpec.ipFamilyPolicy
v1.LabelSelectorOperator LabelSelectorRequirement.operator
v1.LoadBalancerIPMode LoadBalancerIngress.ipMode
v1.NamespacePhase NamespaceStatus.phase
v1.NodeAddressType NodeAddress.type
v1.PersistentVolumeAccessMode PersistentVolumeClaimSpec.accessModes
v1.PodConditionType PodCondition.type PodReadinessGate.conditionType
v1.PodManagementPolicyType StatefulSetSpec.podManagementPolicy
v1.PodPhase PodStatus.phase
v1.Protocol ServicePort.protocol EndpointPort.protocol ContainerPort.protocol PortStatus.protocol
v1.PullPolicy Container.imagePullPolicy
v1.ResourceList ResourceRequirements.limits ResourceRequirements.requests
v1.ResourceList NodeStatus.capacity NodeStatus.allocatable PodSpec.overhead
v1.RestartPolicy PodSpec.restartPolicy
v1.SecretType Secret.type
v1.ServiceAffinity ServiceSpec.sessionAffinity
v1.ServiceExternalTrafficPolicy ServiceSpec.externalTrafficPolicy
v1.ServiceInternalTrafficPolicy ServiceSpec.internalTrafficPolicy
v1.ServiceType ServiceSpec.type
v1.StatefulSetUpdateStrategyType StatefulSetUpdateStrategy.type
v1.StorageMedium EmptyDirVolumeSource.medium
v1.TaintEffect Taint.effect Toleration.effect
v1.TolerationOperator Toleration.operator
v1.URIScheme HTTPGetAction.scheme
"""
_GO_WORDS: Final = {"bytes": "[]uint8", "quantity": "resource.Quantity", "strings": "v1.ExtraValue"}


@cache
def _go_names() -> dict[str, str]:
    rows = (line.split() for line in _GO_NAMES.strip().splitlines())
    return {place: name for name, *places in rows for place in places}


def _go_type(kind: Type, known: Field, wanted: str) -> str:
    """Return the type that a value did not have. wanted -- "": of one value; "[]" or
    "map[string]": of the field as a whole; or a type that is known."""
    if wanted not in ("", "[]", "map[string]"):
        return wanted
    named = _go_names().get(f"{kind.kind}.{known.name}")
    if named == "v1.ResourceList":
        return named
    if named is None and known.scalar:
        named = _GO_WORDS.get(known.type, known.type)
    return wanted + (named or f"v1.{known.type.rpartition('.')[2]}")


def _go_value(value: Any, wanted: str) -> _BadText:
    """A value that has a reader of its own, which looks at no more than the value."""
    what = _json_type(value)
    if wanted == "int32" and what == "number":
        what = f"number {_clipped(value)}"
    return _BadText(f"json: cannot unmarshal {what} into Go value of type {wanted}")


def _clipped(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 256:
        return "of more than 77 digits"
    return str(value)


def _check_int_or_string(value: Any) -> int | str:
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and -(1 << 31) <= value < 1 << 31:
        return value
    raise _go_value(value, "int32")


def _check_bytes(value: str) -> str:
    plain = value.replace("\r", "").replace("\n", "")
    try:
        return base64.b64encode(base64.b64decode(plain, validate=True)).decode()
    except (binascii.Error, ValueError):
        bad = re.search(r"[^A-Za-z0-9+/]", plain)
        at = bad.start() if bad else len(plain) // 4 * 4
        raise _BadText(f"illegal base64 data at input byte {at}") from None


# --- times --------------------------------------------------------------------------------

_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:[.,](\d+))?(?:Z|[+-]\d\d:\d\d)", re.ASCII)
_LAYOUT: Final = "2006-01-02T15:04:05Z07:00"
_MICRO_LAYOUT: Final = "2006-01-02T15:04:05.000000Z07:00"
# The parts of both: as the layout has it, what a text has there, and the least and most of it.
_TIME_PARTS: Final = (
    ("2006", r"\d{4}", "", 0, 0), ("-", "-", "", 0, 0),
    ("01", r"\d\d", "month", 1, 12), ("-", "-", "", 0, 0),
    ("02", r"\d\d", "day", 1, 31), ("T", "T", "", 0, 0),
    ("15", r"\d\d", "hour", 0, 23), (":", ":", "", 0, 0),
    ("04", r"\d\d", "minute", 0, 59), (":", ":", "", 0, 0),
    ("05", r"\d\d", "second", 0, 59), (".000000", r"[.,]\d{6}", "", 0, 0),
    ("Z07:00", r"Z|[+-]\d\d:\d\d", "", 0, 0),
)  # fmt: skip


def _check_time(value: Any, *, micro: bool) -> str:
    if not isinstance(value, str):
        raise _go_value(value, "string")
    if len(value) > LONG_TIME:
        return _settled_time.__wrapped__(value, micro)  # nothing to keep
    return _settled_time(value, micro)


@lru_cache(1024)  # an object's times are read again at each of its writes
def _settled_time(value: str, micro: bool) -> str:
    match = _TIME.fullmatch(value)
    fraction = match[1] or "" if match else ""
    if match is None or (micro and len(fraction) != 6):
        raise _BadText(_why_no_time(value, micro))
    whole = value[:19] + value[19:].lstrip(".,0123456789") if fraction else value
    try:
        moment = datetime.fromisoformat(whole).astimezone(UTC).replace(tzinfo=None)
    except (ValueError, OverflowError):
        raise _BadText(_why_no_time(value, micro)) from None
    text = moment.isoformat(timespec="seconds")
    return f"{text}.{fraction}Z" if micro else f"{text}Z"


def _why_no_time(value: str, micro: bool) -> str:
    """Return what Go says of a text that is no time: the first part that does not fit."""
    shown = f"parsing time {json.dumps(value[:64], ensure_ascii=False)}"
    layout, rest = _MICRO_LAYOUT if micro else _LAYOUT, value
    for part, form, name, least, most in _TIME_PARTS:
        if part == ".000000" and not micro:
            rest = re.sub(r"^[.,]\d+", "", rest, count=1, flags=re.ASCII)
            continue
        match = re.match(form, rest, re.ASCII)
        if match is None:
            at = json.dumps(rest[:64], ensure_ascii=False)
            return f'{shown} as "{layout}": cannot parse {at} as "{part}"'
        if name and not least <= int(match[0]) <= most:
            return f"{shown}: {name} out of range"
        rest = rest[match.end() :]
    if rest:
        return f"{shown}: extra text: {json.dumps(rest[:64], ensure_ascii=False)}"
    return f"{shown}: day out of range"


# --- quantities ---------------------------------------------------------------------------

_QUANTITY = re.compile(
    r"([+-]?)(\d+\.?\d*|\.\d+)(?:([numkMGTPE]|[KMGTPE]i)?|[eE]([+-]?\d{1,3}))", re.ASCII
)
_BAD_SUFFIX = re.compile(r"[+-]?\d[\d.]*[eEinumkKMGTP]+[+-]?\d*", re.ASCII)
_DECIMAL: Final = {
    -9: "n", -6: "u", -3: "m", 0: "", 3: "k", 6: "M", 9: "G", 12: "T", 15: "P", 18: "E",
}  # fmt: skip
_BINARY: Final = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")
_EXPONENT: Final = {suffix: exponent for exponent, suffix in _DECIMAL.items()}
_MAX_QUANTITY: Final = 64  # characters of one; upstream's own bound on values is 2**63


def canonical_quantity(text: str) -> str:
    """Return a quantity as Kubernetes prints it: the largest suffix that leaves an integer.
    Raises ValueError, in Kubernetes' words."""
    match = _QUANTITY.fullmatch(text) if len(text) <= _MAX_QUANTITY else None
    if match is None:
        if len(text) <= _MAX_QUANTITY and _BAD_SUFFIX.fullmatch(text):
            raise ValueError("unable to parse quantity's suffix")
        raise ValueError(
            "quantities must match the regular expression "
            "'^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'"
        )
    sign, digits, suffix, power = match[1].strip("+"), match[2], match[3] or "", match[4]
    amount = Decimal(digits)
    binary = suffix.endswith("i")
    if binary:
        amount *= 1024 ** _BINARY.index(suffix)
    else:
        amount = amount.scaleb(int(power) if power else _EXPONENT[suffix])
    # Finer than a nano is rounded away from zero; what is too large is the largest there is.
    amount = min(amount, Decimal((1 << 63) - 1))
    amount = Decimal(math.ceil(amount.scaleb(9))).scaleb(-9)
    if not amount:
        return "0"
    if binary and amount >= 1024 and amount == amount.to_integral_value():
        number, place = int(amount), 0
        while number % 1024 == 0 and place < len(_BINARY) - 1:
            number, place = number // 1024, place + 1
        return f"{sign}{number}{_BINARY[place]}"
    number, exponent = int(amount.scaleb(9)), -9
    while number % 1000 == 0 and exponent < 18:
        number, exponent = number // 1000, exponent + 3
    if power:
        return f"{sign}{number}{f'e{exponent}' if exponent else ''}"
    return f"{sign}{number}{_DECIMAL[exponent]}"


def _check_quantity(value: Any) -> str:
    # What is neither text nor number is read as its JSON, which is no quantity either.
    plain = isinstance(value, str | int | float) and not isinstance(value, bool)
    try:
        return canonical_quantity(
            (value if isinstance(value, str) else _clipped(value)).strip() if plain else "?"
        )
    except ValueError as e:
        raise _BadText(str(e)) from None


# --- JSON ---------------------------------------------------------------------------------

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def _malformed(form: str, why: str) -> ApiError:
    return bad_request(f"the body of the request cannot be read: {form} parse error: {why}")


def _too_deep() -> ApiError:
    return bad_request(f"the body of the request is nested more than {MAX_DEPTH} deep")


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:32]} is too large")
    return number


def _inside(value: Any) -> Iterator[Any]:
    """Yield the lists and dicts directly in one."""
    inner = value.values() if isinstance(value, dict) else value
    return (one for one in inner if isinstance(one, dict | list))


def _bound_size(value: Any) -> None:
    """Raise ApiError for what is nested too deep or has too many parts; breadth first, so it
    takes no stack."""
    level: list[Any] = [value]
    left = MAX_JSON_PARTS
    for _ in range(MAX_DEPTH):
        level = list(islice((inner for one in level for inner in _inside(one)), left))
        left -= len(level)
        if left <= 0:
            raise _malformed("json", f"more than {MAX_JSON_PARTS} lists and maps")
        if not level:
            return
    raise _too_deep()


def sound(body: bytes, value: Any) -> Any:
    """Return what JSON says as texts that can be encoded. The depth is bounded already."""
    return _without_surrogates(value) if _SURROGATE.search(body) else value


def _without_surrogates(value: Any) -> Any:
    """Return the value with halves of surrogate pairs replaced, as Go replaces them."""
    match value:
        case str():
            return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        case list():
            return [_without_surrogates(one) for one in value]
        case dict():
            return {
                _without_surrogates(key): _without_surrogates(one) for key, one in value.items()
            }
    return value


def _paths_of(value: Any, repeated: list[tuple[Obj, str]]) -> Iterator[str]:
    """Yield 'duplicate field "path"' for the keys of dicts that are still in the value."""
    keys: dict[int, list[str]] = {}
    for holder, key in repeated:
        keys.setdefault(id(holder), []).append(key)
    rest: list[tuple[Any, str]] = [(value, "")]
    while rest:
        one, path = rest.pop()
        if isinstance(one, dict):
            for key in keys.get(id(one), ()):
                yield f'duplicate field "{_join(path, key)}"'
            inner = [(below, _join(path, key)) for key, below in one.items()]
        else:
            inner = [(below, f"{path}[{index}]") for index, below in enumerate(one)]
        rest += [(below, at) for below, at in reversed(inner) if isinstance(below, dict | list)]


# --- YAML ---------------------------------------------------------------------------------

_YAML_WORDS: Final[dict[str, bool | None]] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys("y Y yes Yes YES on On ON true True TRUE".split(), True),
    **dict.fromkeys("n N no No NO off Off OFF false False FALSE".split(), False),
}
_YAML_INT = re.compile(r"[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0o?[0-7_]+|[1-9][0-9_]*|0)", re.ASCII)
_YAML_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", re.ASCII)
_YAML_NO_NUMBER = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_YAML_TAGS: Final = frozenset(
    f"tag:yaml.org,2002:{word}"
    for word in ("str", "int", "float", "bool", "null", "map", "seq", "merge")
)


class _BadYaml(Exception):
    """What is wrong, and in which line (from 1)."""


@dataclass(slots=True)
class _Open:
    """A list or map that has not ended. keys -- given in words and not by `<<`; line -- of
    the key that waits for its value"""

    value: Any
    anchor: str
    size: int
    key: str | None = None
    merging: bool = False
    line: int = 0
    keys: set[str] = field(default_factory=set)


class _YamlReader:
    """Builds JSON values from YAML events: no tags that make objects, no dates, no stack, and
    a bound on what aliases expand to."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        self.repeated: list[str] = []
        self.line = 0
        self.anchors: dict[str, tuple[Any, int]] = {}  # value, nodes in it
        self.open: list[_Open] = []
        self.nodes = 0
        self.root: Any = None

    def read(self, body: bytes) -> Obj:
        import yaml  # only for those who send it

        documents = 0
        try:
            for event in yaml.parse(body, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
                if event.start_mark is not None:
                    self.line = event.start_mark.line + 1
                if isinstance(event, yaml.DocumentStartEvent):
                    documents += 1
                    if documents > 1:
                        raise _BadYaml("more than one document; one object is expected")
                elif isinstance(event, yaml.ScalarEvent):
                    self.start(event)
                    self.add(self.scalar(event), event.anchor or "", 1, 1)
                elif isinstance(event, yaml.AliasEvent):
                    self.alias(str(event.anchor))
                elif isinstance(event, yaml.CollectionStartEvent):
                    self.start(event)
                    empty: Any = {} if isinstance(event, yaml.MappingStartEvent) else []
                    self.open.append(_Open(empty, event.anchor or "", 1))
                    if len(self.open) > MAX_DEPTH:
                        raise _BadYaml(f"nested more than {MAX_DEPTH} deep")
                elif isinstance(event, yaml.CollectionEndEvent):
                    done = self.open.pop()
                    self.add(done.value, done.anchor, done.size, 1)
        except _BadYaml as e:
            raise _malformed("yaml", f"line {self.line}: {e}") from None
        except yaml.MarkedYAMLError as e:
            mark = e.problem_mark or e.context_mark
            line = mark.line + 1 if mark is not None else self.line
            raise _malformed("yaml", f"line {line}: {e.problem or e.context}") from None
        except (yaml.YAMLError, ValueError) as e:
            raise _malformed("yaml", " ".join(str(e).split())) from None
        if self.repeated:
            self.problems.append(f"yaml: unmarshal errors:{''.join(self.repeated)}")
        if not isinstance(self.root, dict):
            raise _malformed("yaml", f"an object was expected, not {_json_type(self.root)}")
        return self.root

    def start(self, event: Any) -> None:
        if event.tag and event.tag not in _YAML_TAGS and event.tag != "!":
            raise _BadYaml(f"the tag {event.tag} is none of JSON's types")

    def scalar(self, event: Any) -> Any:
        """Return what a scalar stands for: go-yaml 2 in all that kubectl's users see."""
        text: str = event.value
        if event.style or event.tag in ("!", "tag:yaml.org,2002:str"):
            return text
        if text in _YAML_WORDS:
            return _YAML_WORDS[text]
        if _YAML_INT.fullmatch(text):
            plain = text.replace("_", "")
            octal = re.match(r"[-+]?0[0-7]", plain)
            number = int(plain, 8) if octal else int(plain, 0)
            if number.bit_length() > 64:
                raise _BadYaml("a number of more than 64 bits")
            return number
        if _YAML_FLOAT.fullmatch(text):
            real = _finite(text)  # written as JSON it has no fraction if it needs none
            return int(real) if real.is_integer() and abs(real) < 1e21 else real
        if _YAML_NO_NUMBER.fullmatch(text):
            raise _BadYaml(f"{text} is no JSON number")
        return text

    def alias(self, name: str) -> None:
        if name not in self.anchors:
            raise _BadYaml(f"*{name} has no &{name} that ends before it")
        value, size = self.anchors[name]
        if self.nodes + size > MAX_YAML_NODES:
            raise _BadYaml(f"its aliases expand to more than {MAX_YAML_NODES} nodes")
        self.add(_copy(value), "", size, size)

    def add(self, value: Any, anchor: str, size: int, new: int) -> None:
        """Put a finished value where it belongs. new -- its nodes that are not counted yet."""
        self.nodes += new
        if self.nodes > MAX_YAML_NODES:
            raise _BadYaml(f"more than {MAX_YAML_NODES} nodes")
        if anchor:
            self.anchors[anchor] = (value, size)
        if not self.open:
            self.root = value
            return
        into = self.open[-1]
        into.size += size
        if isinstance(into.value, list):
            into.value.append(value)
        elif into.key is None:
            into.merging, into.line = value == "<<", self.line
            into.key = _key_text(value)
        elif into.merging:
            self.merge(into, value)
            into.key = None
        else:
            if into.key in into.keys and len(self.repeated) < MAX_PROBLEMS:
                self.repeated.append(f'\n  line {into.line}: key "{into.key}" already set in map')
            into.keys.add(into.key)
            into.value[into.key] = value
            into.key = None

    def merge(self, into: _Open, value: Any) -> None:
        """`<<: *x`: what is not given in words, the first of several counts."""
        for one in value if isinstance(value, list) else [value]:
            if not isinstance(one, dict):
                raise _BadYaml("<< is followed by what is no map")
            for key, inner in one.items():
                into.value.setdefault(key, inner)


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_copy(one) for one in value]
    return value


def _key_text(value: Any) -> str:
    match value:
        case str():
            return value
        case bool():
            return "true" if value else "false"
        case int() | float():
            return str(value)
    raise _BadYaml(f"a key is {_json_type(value)}, expected a string")
