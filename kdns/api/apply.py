"""Who owns which field: server-side apply and metadata.managedFields.

Decides what an apply makes of an object, when it conflicts with another field manager, and
which fields belong to whom after any write (KEP-555, structured merge). What a field is (owned
as a whole, item by item, by which keys) is schema.py's; defaults and validation come after.

A set of fields is a frozenset of paths, a path the words that FieldsV1 uses for its steps:
`("f:spec", 'k:{"port":80,"protocol":"TCP"}', "f:targetPort")`. So union, intersection and
difference are Python's own; a path in a set says nothing about those below it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from kdns.api.patch import copied
from kdns.api.schema import Field, type_named
from kdns.api.status import bad_request
from kdns.errors import ApiError

Obj: TypeAlias = dict[str, Any]
Path: TypeAlias = tuple[str, ...]
Paths: TypeAlias = frozenset[Path]

BEFORE_FIRST_APPLY: Final = "before-first-apply"
ANCIENT: Final = "ancient-changes"
MAX_UPDATERS: Final = 10  # entries of operation Update; older ones become one, as upstream
LAST_APPLIED: Final = "kubectl.kubernetes.io/last-applied-configuration"
MAX_ANNOTATION: Final = 256 << 10  # bytes of all annotations of an object

NOBODYS: Final[Paths] = frozenset(
    {("f:apiVersion",), ("f:kind",), ("f:metadata",)}
    | {
        ("f:metadata", f"f:{name}")
        for name in (
            "name", "namespace", "creationTimestamp", "selfLink", "uid", "clusterName",
            "generation", "managedFields", "resourceVersion",
        )
    }
)  # fmt: skip

# Which part of an object a write through a subresource cannot change, so cannot own.
_IGNORED: Final[Mapping[str, str]] = {"": "status", "scale": "status", "status": "spec"}


# --- The schema, as ownership sees it --------------------------------------------------------


class _Absent:
    """What stands where no value is: null is a value."""

    def __bool__(self) -> bool:
        return False


ABSENT: Final = _Absent()


@dataclass(frozen=True, slots=True)
class _Node:
    """How values are owned.

    kind    -- leaf: as a whole; struct and map: field by field; items: a list whose items have
               keys; set: a list whose items are their own keys
    fields  -- of a struct
    always  -- those of `fields` that Go writes even when they are empty
    item    -- of map, items and set
    keys    -- of items: their names, and what an item has that lacks one (None: it may not)
    inside  -- of a leaf that is no scalar: what its parts are, though nobody owns them one by one
    zero    -- what Go writes for a field that nobody gave a value; ABSENT: nothing
    pointer -- an empty value is a value
    """

    kind: Literal["leaf", "struct", "map", "items", "set"]
    fields: Mapping[str, _Node] = field(default_factory=dict)
    always: frozenset[str] = frozenset()
    item: _Node | None = None
    keys: Mapping[str, Any] = field(default_factory=dict)
    inside: _Node | None = None
    zero: Any = ABSENT
    pointer: bool = False

    @property
    def scalar(self) -> bool:
        return self.kind == "leaf" and self.inside is None

    def below(self, step: str) -> _Node | None:
        """The node one step of a path further down."""
        if step.startswith("f:"):
            return self.fields.get(step[2:]) if self.kind == "struct" else self.item
        return self.item


_LEAF: Final = _Node("leaf")
# What Go writes for an empty scalar; those of _STRUCTS it writes wherever they may stand.
_ZEROS: Final[Mapping[str, Any]] = {
    "string": "", "bytes": "", "int32": 0, "int64": 0, "bool": False,
    "time": None, "microtime": None, "quantity": "0", "intorstring": 0,
}  # fmt: skip
_STRUCTS: Final = frozenset({"time", "microtime", "quantity", "intorstring"})


@cache
def _node_of_type(name: str) -> _Node:
    if "." not in name:
        return _LEAF
    found = type_named(name)
    fields = {one.name: _node_of_field(one) for one in found.fields.values()}
    always = frozenset(key for key, node in fields.items() if node.zero is not ABSENT)
    struct = _Node("struct", fields, always)
    return _Node("leaf", inside=struct) if found.atomic else struct


def _node_of_field(one: Field) -> _Node:
    node = _shape_of(one)
    if node.kind != "leaf" and (one.atomic or (one.shape == "list" and one.list_type == "atomic")):
        node = _Node("leaf", inside=node)
    return replace(node, zero=_zero_of(one), pointer=one.pointer)


def _shape_of(one: Field) -> _Node:
    item = _node_of_type(one.type)
    if one.shape == "one":
        return item
    if one.shape == "map":
        return _Node("map", item=item)
    keys = {key: _key_default(one.type, key) for key in one.list_keys}
    return _Node("items" if one.list_type == "map" else "set", item=item, keys=keys)


def _key_default(type_name: str, key: str) -> Any:
    """What stands for a key that an item lacks: OpenAPI's default."""
    one = type_named(type_name).fields[key]
    if key == "protocol":
        return "TCP"
    if one.required or type_name == "core/v1.LocalObjectReference":
        return _ZEROS[one.type]
    return None


def _zero_of(one: Field) -> Any:
    always = one.required or one.written
    if one.name == "creationTimestamp":
        return ABSENT
    if one.pointer or one.shape != "one":
        return None if always else ABSENT
    if "." in one.type:
        return {}
    return _ZEROS.get(one.type) if always or one.type in _STRUCTS else ABSENT


def _step_of(item: Any, node: _Node) -> str:
    """The step to an item of a list with keys, or of a set."""
    if node.kind == "set":
        return f"v:{_canonical(item)}"
    there = item if isinstance(item, dict) else {}
    values = [there.get(key, default) for key, default in node.keys.items()]
    names = tuple(node.keys)
    try:
        return _key_step(names, *values)
    except TypeError:  # no scalars: where they may not be, but an applied object can have them
        return _key_step.__wrapped__(names, *values)


@lru_cache(4096, typed=True)  # 1 is not true
def _key_step(keys: tuple[str, ...], *values: Any) -> str:
    return f"k:{_canonical(dict(zip(keys, values, strict=True)))}"


_canonical: Final = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False
).encode


# --- FieldsV1 --------------------------------------------------------------------------------


def _tree_of(paths: Iterable[Path]) -> Obj:
    """Return the paths as a tree, for what goes through a value at the same time: by steps,
    with "." where a path ends."""
    root: Obj = {}
    for path in paths:
        tree = root
        for step in path:
            below = tree.get(step)
            if below is None:
                below = tree[step] = {}
            tree = below
        tree["."] = _END
    return root


_END: Final[Obj] = {}


def _steps(tree: Mapping[str, Any]) -> list[str]:
    """Return the steps of one level, sorted as upstream does."""
    steps = sorted(tree)
    if steps and steps[0] == ".":
        del steps[0]
    if steps and steps[0][0] != "f":
        steps.sort(key=_step_order)
    return steps


def _listed(tree: Obj, prefix: Path = ()) -> Iterator[Path]:
    """Yield the paths as upstream lists them: what is owned here, then what is below."""
    steps = _steps(tree)
    for step in steps:
        if "." in tree[step]:
            yield (*prefix, step)
    for step in steps:
        yield from _listed(tree[step], (*prefix, step))


def _rendered(tree: Obj) -> Obj:
    if len(tree) == 1 and "." in tree:
        return {}
    rendered: Obj = {".": {}} if "." in tree else {}
    for step in _steps(tree):
        rendered[step] = _rendered(tree[step])
    return rendered


def _step_order(step: str) -> tuple[int, Any]:
    return (0, step) if step[0] == "f" else _item_order(step)


@lru_cache(4096)
def _item_order(step: str) -> tuple[int, Any]:
    kind, text = step[0], step[2:]
    if kind == "i":
        return (3, int(text))
    value = json.loads(text)
    if kind == "k":
        return (1, [(key, _value_order(value[key])) for key in sorted(value)])
    return (2, _value_order(value))


def _value_order(value: Any) -> tuple[int, Any]:
    """Numbers before strings before the rest, each by size."""
    if isinstance(value, bool):
        return (2, str(value))
    if isinstance(value, int | float):
        return (0, value)
    return (1, value) if isinstance(value, str) else (3, _canonical(value))


def render_fields(paths: Paths) -> Obj:
    """Return FieldsV1 of a set of fields."""
    return _rendered(_tree_of(paths))


MAX_STEPS: Final = 100  # of a path: what an object can be deep


def parse_fields(fields: Any) -> Paths:
    """Return the set of fields that FieldsV1 tells. Raises ValueError for anything else."""
    found: set[Path] = set()
    _parse_level(fields, (), found)
    return frozenset(found)


def _parse_level(level: Any, path: Path, found: set[Path]) -> None:
    if not isinstance(level, dict):
        raise ValueError(f"FieldsV1: {'/'.join(path)} is no map")
    if len(path) > MAX_STEPS:
        raise ValueError("FieldsV1: nested too deeply")
    for step, below in level.items():
        if step == ".":
            if path:
                found.add(path)
            continue
        here = (*path, step if step.startswith("f:") else _parse_item(step))
        if below == {}:
            found.add(here)
        else:
            _parse_level(below, here, found)


@lru_cache(4096)
def _parse_item(step: str) -> str:
    kind, text = step[:2], step[2:]
    if kind == "i:":
        return f"i:{int(text)}"
    if kind in ("k:", "v:"):
        try:
            value = json.loads(text)
        except RecursionError:
            raise ValueError("FieldsV1: a key is nested too deeply") from None
        if kind == "k:" and not isinstance(value, dict):
            raise ValueError(f"FieldsV1: {step} is no key")
        return kind + _canonical(value)
    raise ValueError(f"FieldsV1: what is {step!r}?")


def _told(path: Path) -> str:
    """A path in messages: .spec.ports[port=80,protocol="TCP"].targetPort"""
    words = []
    for step in path:
        kind, text = step[0], step[2:]
        if kind == "f":
            words.append(f".{text}")
        elif kind == "k":
            keys = json.loads(text)
            words.append(f"[{','.join(f'{key}={_canonical(keys[key])}' for key in sorted(keys))}]")
        else:
            words.append(f"[={text}]" if kind == "v" else f"[{text}]")
    return "".join(words)


# --- managedFields ---------------------------------------------------------------------------


class _Who(NamedTuple):
    """What makes one entry of managedFields different from another."""

    manager: str
    operation: str
    api_version: str
    subresource: str

    def __str__(self) -> str:
        text = json.dumps(self.manager, ensure_ascii=False)
        if self.subresource:
            text += f' with subresource "{self.subresource}"'
        return text if self.operation == "Apply" else f"{text} using {self.api_version}"


@dataclass(frozen=True, slots=True)
class _Share:
    """What one of them owns, and when it last wrote that ("": not known)."""

    paths: Paths
    time: str = ""


Managers: TypeAlias = dict[_Who, _Share]


def _parse_managers(entries: Any, api_version: str) -> Managers:
    """Raises ValueError for what is no list of managedFields. Entries of versions that are not
    served are dropped, as upstream drops them."""
    if not isinstance(entries, list):
        raise ValueError("managedFields is no list")
    found: Managers = {}
    for entry in entries:
        if not isinstance(entry, dict) or entry.get("operation") not in ("Apply", "Update"):
            raise ValueError("operation must be `Apply` or `Update`")
        if entry.get("fieldsType") != "FieldsV1" or not entry.get("apiVersion"):
            raise ValueError("fieldsType must be FieldsV1, and apiVersion not empty")
        who = _Who(
            str(entry.get("manager") or ""),
            entry["operation"],
            str(entry["apiVersion"]),
            str(entry.get("subresource") or ""),
        )
        fields = entry.get("fieldsV1")
        paths = parse_fields({} if fields is None else fields)
        if who.api_version == api_version:
            found[who] = _Share(paths, str(entry.get("time") or ""))
    return found


def _managers_of(obj: Obj | None, api_version: str) -> Managers:
    try:
        return _parse_managers(_metadata(obj).get("managedFields") or [], api_version)
    except ValueError:
        return {}


def _metadata(obj: Obj | None) -> Obj:
    found = (obj or {}).get("metadata")
    return found if isinstance(found, dict) else {}


def _render_managers(managers: Managers) -> list[Obj]:
    def order(one: tuple[_Who, _Share]) -> tuple[str, ...]:
        who, share = one
        return (who.operation, share.time, who.manager, who.api_version, who.subresource)

    return [_render_entry(who, share) for who, share in sorted(managers.items(), key=order)]


def _render_entry(who: _Who, share: _Share) -> Obj:
    return _entry(who, share.time, render_fields(share.paths))


def _entry(who: _Who, time: str, fields: Obj) -> Obj:
    entry: Obj = {
        "manager": who.manager,
        "operation": who.operation,
        "apiVersion": who.api_version,
        "time": time,
        "fieldsType": "FieldsV1",
        "fieldsV1": fields,
        "subresource": who.subresource,
    }
    return {key: value for key, value in entry.items() if value or key == "fieldsV1"}


def _with_managers(obj: Obj, managers: Managers) -> Obj:
    """A copy of the object, one level deep, with those managedFields."""
    return _with_entries(obj, _render_managers(managers))


def _with_entries(obj: Obj, entries: list[Obj]) -> Obj:
    metadata = {key: value for key, value in _metadata(obj).items() if key != "managedFields"}
    if entries:
        metadata["managedFields"] = entries
    return {**obj, "metadata": metadata}


# --- Comparing -------------------------------------------------------------------------------


@dataclass(slots=True)
class _Difference:
    """What one object has that another has not, or not so. raw -- the other one is not as Go
    writes it, but holds empty values that somebody applies"""

    raw: bool = False
    added: set[Path] = field(default_factory=set)
    changed: set[Path] = field(default_factory=set)
    removed: set[Path] = field(default_factory=set)

    @property
    def touched(self) -> Paths:
        """What the other one says."""
        return frozenset(self.added | self.changed) - NOBODYS

    @property
    def nothing(self) -> bool:
        return not (self.added or self.changed or self.removed)


def _difference(
    type_name: str, before: Obj, after: Obj, ignored: str, *, raw: bool = False
) -> _Difference:
    """What a write changed, apart from the part of the object that it could not change."""
    found = _Difference(raw)
    left, right = (
        {key: value for key, value in one.items() if key not in (ignored, "apiVersion", "kind")}
        for one in (before, after)
    )
    _compare_maps(left, right, _node_without(type_name, ignored), (), found)
    return found


@cache
def _node_without(type_name: str, ignored: str) -> _Node:
    """The object's node; what is ignored of it, Go does not write either."""
    node = _node_of_type(type_name)
    return replace(node, always=node.always - {ignored})


def _typed(value: Obj, name: str, node: _Node) -> Any:
    """Return a field as a Go client would write it: empty values are left out, or never are."""
    there = value.get(name)
    if there is None or (not there and node.zero is ABSENT and not node.pointer):
        return node.zero
    return there


def _as_go(value: Any, node: _Node, *, full: bool = False) -> Any:
    """Return a copy of a value as Go keeps it, without empty fields that say nothing.
    full -- and with what Go writes though it is empty"""
    node = node.inside or node
    if node.kind == "leaf" or value is None or not _fits(value, node):
        return copied(value)
    item = node.item or _LEAF
    if node.kind == "map":
        return {k: _as_go(v, item, full=full) for k, v in value.items() if v is not None}
    if node.kind != "struct":
        return [_as_go(one, item, full=full) for one in value]
    kept = {}
    for name in {**value, **dict.fromkeys(node.always)} if full else value:
        below = node.fields.get(name, _LEAF)
        there = _typed(value, name, below)
        if there is not ABSENT and (full or there is not None):
            kept[name] = _as_go(there, below, full=full)
    return kept


def _alike(left: Any, right: Any, node: _Node) -> bool:
    """Whether Go writes two values the same way."""
    if left == right:
        return isinstance(left, bool) == isinstance(right, bool)
    node = node.inside or node
    if node.kind == "leaf" or left is None or right is None or left is ABSENT or right is ABSENT:
        return False
    if not (_fits(left, node) and _fits(right, node)):
        return False
    item = node.item or _LEAF
    if node.kind == "struct":
        for name in {**left, **right}:
            below = node.fields.get(name, _LEAF)
            if not _alike(_typed(left, name, below), _typed(right, name, below), below):
                return False
        return True
    if len(left) != len(right):
        return False
    if node.kind == "map":
        return all(_alike(left[k], right.get(k, ABSENT), item) for k in left)
    return all(_alike(one, other, item) for one, other in zip(left, right, strict=True))


def _compare(left: Any, right: Any, node: _Node, path: Path, found: _Difference) -> None:
    if left is ABSENT and right is ABSENT:
        return
    whole = node.kind == "leaf" or not (_fits(left, node) and _fits(right, node))
    if not whole and not (_empty(left, node) and _empty(right, node)):
        if node.kind in ("struct", "map"):
            _compare_maps(left, right, node, path, found)
        else:
            _compare_lists(left, right, node, path, found)
    elif left is not ABSENT and right is not ABSENT:
        if not _same(left, right, node, found.raw):
            found.changed.add(path)
        return
    if left is ABSENT:
        found.added.add(path)
    elif right is ABSENT:
        found.removed.add(path)


def _fits(value: Any, node: _Node) -> bool:
    if value is None or value is ABSENT:
        return True
    return isinstance(value, dict if node.kind in ("struct", "map") else list)


def _empty(value: Any, node: _Node) -> bool:
    return not value and not (isinstance(value, dict) and node.always)


def _same(left: Any, right: Any, node: _Node, raw: bool) -> bool:
    if raw and node.inside is not None and left is not None and right is not None:
        # As upstream: what Go adds to the one, the other lacks.
        return bool(_as_go(left, node, full=True) == right)
    return _alike(left, right, node)


def _compare_maps(left: Any, right: Any, node: _Node, path: Path, found: _Difference) -> None:
    ours, theirs = left or {}, right or {}
    struct, item, raw = node.kind == "struct", node.item or _LEAF, found.raw
    for name in {**ours, **theirs}.keys() | node.always:
        if struct:
            item = node.fields.get(name, _LEAF)
            one = ABSENT if left is ABSENT else _typed(ours, name, item)
            if right is ABSENT:
                other = ABSENT
            elif not raw:
                other = _typed(theirs, name, item)
            elif name in theirs:
                other = theirs[name]
            else:  # Go's empty values come and go with the struct
                other = ABSENT if name in ours else one
        else:
            one, other = ours.get(name, ABSENT), theirs.get(name, ABSENT)
        if one is other or (one == other and (not raw or item.scalar)):
            continue
        _compare(one, other, item, (*path, f"f:{name}"), found)


def _compare_lists(left: Any, right: Any, node: _Node, path: Path, found: _Difference) -> None:
    """Items with the same keys stand for each other; those that several share are one whole."""
    ours, theirs = _by_step(left, node), _by_step(right, node)
    item = node.item or _LEAF
    for step in {**ours, **theirs}:
        here = (*path, step)
        one, other = ours.get(step, []), theirs.get(step, [])
        if len(one) < 2 and len(other) < 2:
            _compare(one[0] if one else ABSENT, other[0] if other else ABSENT, item, here, found)
        elif len(one) > 1 and len(other) > 1:
            if not _alike(one, other, _Node("set", item=item)):
                found.changed.add(here)
        elif len(one) > 1:
            if other:
                _compare(ABSENT, other[0], item, here, found)
            found.removed.add(here)
        else:
            if one:
                _compare(one[0], ABSENT, item, here, found)
            found.added.add(here)


def _by_step(value: Any, node: _Node) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for item in value if isinstance(value, list) else ():
        found.setdefault(_step_of(item, node), []).append(item)
    return found


# --- What a new object tells ------------------------------------------------------------------

# The same as _difference() from {} and render_fields() of what it touched, in one walk and
# without paths: half of what a create took was spent there.

_IDENTITY: Final = frozenset(path[1][2:] for path in NOBODYS if len(path) == 2)


def _created(type_name: str, obj: Obj, ignored: str) -> Obj:
    """Return FieldsV1 of what a new object tells."""
    left_out = (ignored, "apiVersion", "kind")
    told = {key: value for key, value in obj.items() if key not in left_out}
    tree = _grown_map({}, told, _node_without(type_name, ignored))
    metadata = tree.get("f:metadata")
    if metadata is not None:
        kept = {
            step: below for step, below in metadata.items()
            if step != "." and (below or step[2:] not in _IDENTITY)
        }  # fmt: skip
        if kept:
            tree["f:metadata"] = kept
        else:
            del tree["f:metadata"]
    return tree


def _grown(left: Any, right: Any, node: _Node) -> Obj | None:
    """Return FieldsV1 of a value where there was nothing, or Go's empty value (`left`); None
    if the value says no more than that."""
    if right is ABSENT:
        return None
    whole = node.kind == "leaf" or not (_fits(left, node) and _fits(right, node))
    if whole or (_empty(left, node) and _empty(right, node)):
        return {} if left is ABSENT or not _alike(left, right, node) else None
    below = _grown_map if node.kind in ("struct", "map") else _grown_list
    tree = below(left, right, node)
    if left is ABSENT:
        return {".": {}, **tree} if tree else {}
    return tree or None


def _grown_map(left: Any, right: Obj, node: _Node) -> Obj:
    found: Obj = {}
    if node.kind == "map":
        for name in sorted(right):
            below = _grown(ABSENT, right[name], node.item or _LEAF)
            if below is not None:
                found[f"f:{name}"] = below
        return found
    absent = left is ABSENT
    fields = node.fields
    for name in sorted(right.keys() | node.always if node.always else right):
        item = fields.get(name, _LEAF)
        one, other = ABSENT if absent else item.zero, _typed(right, name, item)
        if one is other or one == other:
            continue
        below = _grown(one, other, item)
        if below is not None:
            found[f"f:{name}"] = below
    return found


def _grown_list(left: Any, right: list[Any], node: _Node) -> Obj:
    items_of = _by_step(right, node)
    found: Obj = {}
    for step in _steps(items_of):
        items = items_of[step]
        below = _grown(ABSENT, items[0], node.item or _LEAF) if len(items) == 1 else {}
        if below is not None:
            found[step] = below
    return found


# --- Sets of fields from values, values from sets --------------------------------------------


def _fields_in(value: Any, node: _Node, path: Path, found: set[Path]) -> None:
    """Collect the fields that an applied object tells."""
    if node.kind == "leaf" or not _fits(value, node):
        found.add(path)
    elif node.kind in ("struct", "map"):
        for name, below in (value or {}).items():
            here = (*path, f"f:{name}")
            item = node.fields.get(name, _LEAF) if node.kind == "struct" else node.item or _LEAF
            _fields_in(below, item, here, found)
            if below is None or below == {} or node.kind == "map":
                found.add(here)
    else:
        for step, items in _by_step(value, node).items():
            found.add((*path, step))
            if len(items) == 1:
                _fields_in(items[0], node.item or _LEAF, (*path, step), found)


def _field_set(type_name: str, obj: Obj) -> Paths:
    found: set[Path] = set()
    _fields_in(obj, _node_of_type(type_name), (), found)
    return frozenset(found)


def _with_parents(paths: Iterable[Path], type_name: str) -> Paths:
    """The set and, of each path, the fields on the way that the schema names (a Service's
    `spec`, but not a label's key or an item of a list)."""
    found: set[Path] = set()
    for path in paths:
        found.add(path)
        node: _Node | None = _node_of_type(type_name)
        for depth, step in enumerate(path[:-1], 1):
            if node is None:
                break
            named = node.kind == "struct" and step[2:] in node.fields
            node = node.below(step)
            if named:
                found.add(path[:depth])
    return frozenset(found)


def _without(value: Any, node: _Node, tree: Obj) -> Any:
    """A copy of the value without the fields in `tree`; null where nothing is left."""
    if node.kind == "leaf" or not value or not _fits(value, node):
        return None if node.kind != "leaf" and not value else value
    if node.kind in ("struct", "map"):
        kept = {}
        for name, below in value.items():
            sub = tree.get(f"f:{name}")
            if sub is None:
                kept[name] = below
            elif "." not in sub:
                item = node.below(f"f:{name}") or _LEAF
                kept[name] = _without(below, item, sub)
        return kept or None
    left = []
    for one in value:
        sub = tree.get(_step_of(one, node))
        if sub is None:
            left.append(one)
        elif "." not in sub:
            left.append(_without(one, node.item or _LEAF, sub))
    return left or None


def _remove(type_name: str, obj: Obj, paths: Paths) -> Obj:
    left: Obj = _without(obj, _node_of_type(type_name), _tree_of(paths)) or {}
    return left


# --- Merging ---------------------------------------------------------------------------------


def _merge(live: Any, applied: Any, node: _Node) -> Any:
    """What stands there after an apply: ABSENT if nothing does."""
    if applied is ABSENT:
        return live
    if live is ABSENT or node.kind == "leaf" or not (_fits(live, node) and _fits(applied, node)):
        return applied
    if not live and not applied:
        return applied
    if node.kind in ("struct", "map"):
        return _merge_maps(live or {}, applied or {}, node)
    return _merge_lists(live or [], applied or [], node)


def _merge_maps(live: Obj, applied: Obj, node: _Node) -> Obj:
    merged = {}
    for name in {**live, **applied}:
        below = node.below(f"f:{name}") or _LEAF
        merged[name] = _merge(live.get(name, ABSENT), applied.get(name, ABSENT), below)
    return merged


def _merge_lists(live: list[Any], applied: list[Any], node: _Node) -> list[Any]:
    """Both lists' items: the applied ones in their order, the others near where they were."""
    item = node.item or _LEAF
    ours = [_step_of(one, node) for one in live]
    theirs = [_step_of(one, node) for one in applied]
    wanted = dict(zip(theirs, applied, strict=True))
    there = _by_step(live, node)
    shared = iter([step for step in theirs if step in there])
    next_shared = next(shared, None)
    merged: list[Any] = []
    done: set[str] = set()

    def take(step: str) -> None:
        same = there.get(step, [])
        merged.append(_merge(same[0] if len(same) == 1 else ABSENT, wanted[step], item))
        done.add(step)

    left = right = 0
    while left < len(ours) or right < len(theirs):
        if left < len(ours) and right < len(theirs):
            if ours[left] == theirs[right]:
                take(ours[left])
                left, right = left + 1, right + 1
                next_shared = next(shared, None)
                continue
            if ours[left] in wanted and next_shared not in (None, ours[left]):
                left += 1  # its turn comes where the applied list has it
                continue
        if left < len(ours):
            if ours[left] not in wanted:
                merged.append(live[left])
                left += 1
                continue
            if ours[left] in done:
                left += 1
        if right < len(theirs):
            step = theirs[right]
            take(step)
            right += 1
            if step == next_shared:
                next_shared = next(shared, None)
    return merged


def _cleaned(value: Any) -> Any:
    """A copy without nulls, which no object keeps."""
    if isinstance(value, dict):
        return {key: _cleaned(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_cleaned(item) for item in value]
    return value


# --- Apply -----------------------------------------------------------------------------------


def apply_object(
    type_name: str,
    current: Obj | None,
    applied: Obj,
    manager: str,
    *,
    force: bool,
    now: str,
    api_version: str,
    subresource: str = "",
) -> Obj:
    """Return the object after a server-side apply, with its managedFields.

    current -- None if the apply creates it
    applied -- what the manager wants, and nothing else
    now     -- RFC 3339, whole seconds; an apply that changes nothing keeps the old time

    Raises ApiError: 409 Conflict if other managers own what it would change and it does not
    force; 400 or, as upstream, 500 for what cannot be applied. Arguments are never changed.
    """
    ignored = _IGNORED.get(subresource, "")
    wanted = copied(applied)
    wanted.pop(ignored, None)
    _check_applied(type_name, wanted, api_version)
    who = _Who(manager or "unknown", "Apply", api_version, subresource)
    owned = _field_set(type_name, wanted)
    if current is None:
        merged = _cleaned(wanted)
        if manager == "kubectl":
            _sync_last_applied(merged, wanted)
        return _with_managers(merged, _without_empty({who: _Share(owned - NOBODYS, now)}))
    node = _node_of_type(type_name)
    live: Obj = _as_go(_with_managers(current, {}), node)
    managers = _managers_of(current, api_version)
    if not managers:
        before = _Who(BEFORE_FIRST_APPLY, "Update", api_version, subresource)
        found = _difference(type_name, {}, live, ignored)
        managers = _without_empty({before: _Share(found.touched, now)})
    merged = _merged(type_name, live, wanted, owned, managers, who)
    found = _difference(type_name, live, merged, ignored, raw=True)
    _settle_conflicts(type_name, live, found, managers, who, force)
    merged = _cleaned(merged)
    # An apply that changes no value keeps the old time, and has none if it is the manager's
    # first: so does upstream.
    idle = found.nothing and _alike(merged, live, node)
    kept = managers[who].time if who in managers else ""
    managers[who] = _Share(owned - NOBODYS, kept if idle else now)
    if who.manager == "kubectl":
        _sync_last_applied(merged, wanted)
    _keep_identity(merged, live)
    return _with_managers(merged, _without_empty(managers))


def _merged(
    type_name: str, live: Obj, wanted: Obj, owned: Paths, managers: Managers, who: _Who
) -> Obj:
    """Return both as one, without what `who` applied last time and does not apply now."""
    merged = _merge_maps(live, wanted, _node_of_type(type_name))
    if who not in managers or managers[who].paths <= owned:
        return merged
    others = [share.paths for one, share in managers.items() if one != who]
    return _prune(type_name, merged, managers[who].paths, [owned, *others])


def _settle_conflicts(
    type_name: str, live: Obj, found: _Difference, managers: Managers, who: _Who, force: bool
) -> None:
    """Take from the others what the apply changes. Raises ApiError 409."""
    others = {one: share for one, share in managers.items() if one != who}
    touched = found.added | found.changed
    conflicts = {one: share.paths & touched for one, share in others.items()}
    conflicts = {one: paths for one, paths in conflicts.items() if paths}
    if conflicts and not force:
        conflicts = _not_excused(type_name, conflicts, live, who)
        if conflicts:
            raise _conflict(conflicts)
    for one, share in others.items():
        managers[one] = replace(share, paths=share.paths - touched - found.removed)


def _prune(type_name: str, merged: Obj, last: Paths, owners: Iterable[Paths]) -> Obj:
    """Drop what the manager applied last time and nobody applies or owns now. What stands below
    it and belongs to nobody goes with it, what others own below it stays."""
    owned = _with_parents(frozenset().union(*owners), type_name)
    before = _with_parents(last, type_name)
    there = _with_parents(_field_set(type_name, merged), type_name)
    pruned = _remove(type_name, merged, before)
    left = _with_parents(_field_set(type_name, pruned), type_name)
    pruned = _remove(type_name, merged, there - (left | owned))
    left = _with_parents(_field_set(type_name, pruned), type_name)
    return _remove(type_name, merged, (there - left) & before)


def _without_empty(managers: Managers) -> Managers:
    return {who: share for who, share in managers.items() if share.paths}


def _keep_identity(merged: Obj, live: Obj) -> None:
    """`creationTimestamp: null`, as kubectl prints it, does not clear what the API set."""
    for path in NOBODYS:
        if len(path) == 2 and (name := path[1][2:]) in _metadata(live):
            merged.setdefault("metadata", {}).setdefault(name, _metadata(live)[name])


def _conflict(conflicts: Mapping[_Who, Paths]) -> ApiError:
    causes, lines = [], []
    ordered = sorted(conflicts, key=lambda who: (who.manager, who))
    for who in ordered:
        lines.append(f"conflicts with {who}:")
        for path in _listed(_tree_of(conflicts[who])):
            lines.append(f"- {_told(path)}")
            causes.append(
                {
                    "reason": "FieldManagerConflict",
                    "message": f"conflict with {who}",
                    "field": _told(path),
                }
            )
    if len(causes) == 1:
        text = f"Apply failed with 1 conflict: {causes[0]['message']}: {causes[0]['field']}"
    else:
        text = f"Apply failed with {len(causes)} conflicts: " + "\n".join(lines)
    return ApiError(409, "Conflict", text, {"causes": causes})


# kubectl's change from client-side to server-side apply: the annotation with the last applied
# configuration says that what it holds, unchanged since, was kubectl's own.


def _not_excused(
    type_name: str,
    conflicts: dict[_Who, Paths],
    live: Obj,
    who: _Who,
) -> dict[_Who, Paths]:
    if who.manager != "kubectl":
        return conflicts
    try:
        last = copied(json.loads(_annotations(live).get(LAST_APPLIED) or ""))
    except (ValueError, RecursionError, ApiError):
        return conflicts
    if not isinstance(last, dict) or last.get("apiVersion") != who.api_version:
        return conflicts
    found = _difference(type_name, live, last, "", raw=True)
    own = _field_set(type_name, last) - found.added - found.changed - found.removed
    left = {one: paths - own for one, paths in conflicts.items()}
    return {one: paths for one, paths in left.items() if paths}


def _sync_last_applied(merged: Obj, wanted: Obj) -> None:
    """Keep the annotation true for those who go back to client-side apply."""
    annotations = _annotations(merged)
    if not annotations.get(LAST_APPLIED):
        return
    said = copied(wanted)
    _annotations(said).pop(LAST_APPLIED, None)
    text = _canonical(said) + "\n"
    for letter in "<>&\u2028\u2029":  # as Go writes JSON
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    annotations[LAST_APPLIED] = text
    if sum(len(f"{key}{value}".encode()) for key, value in annotations.items()) > MAX_ANNOTATION:
        del annotations[LAST_APPLIED]


def _annotations(obj: Obj) -> Obj:
    found = _metadata(obj).get("annotations")
    return found if isinstance(found, dict) else {}


# --- What can be applied ---------------------------------------------------------------------


def _check_applied(type_name: str, applied: Obj, api_version: str) -> None:
    metadata = applied.get("metadata", {})
    if not isinstance(metadata, dict):
        raise bad_request("metadata must be a map")
    group, _, version = str(applied.get("apiVersion") or "").rpartition("/")
    kind = f"{group}/{version}, Kind={applied.get('kind') or ''}"
    if (applied.get("apiVersion"), applied.get("kind")) != (
        api_version,
        type_named(type_name).kind,
    ):
        raise bad_request(f"invalid object type: {kind}")
    if metadata.get("managedFields") is not None:
        raise bad_request("metadata.managedFields must be nil")
    problems: list[str] = []
    _check_value(applied, _node_of_type(type_name), (), problems)
    if problems:
        text = problems[0]
        if len(problems) > 1:
            text = "\n".join(["errors:", *(f"  {problem}" for problem in problems)])
        name = f"{metadata.get('namespace') or ''}/{metadata.get('name') or ''}"
        # So it is upstream: no 400, and no reason.
        raise ApiError(500, "", f"failed to create typed patch object ({name}; {kind}): {text}")


def _check_value(value: Any, node: _Node, path: Path, problems: list[str]) -> None:
    if node.kind == "leaf" or value is None:
        return
    if not _fits(value, node):
        word = "map" if node.kind in ("struct", "map") else "list"
        problems.append(f"{_told(path)}: expected {word}, got {_canonical(value)[:100]}")
    elif node.kind in ("struct", "map"):
        for name, below in value.items():
            here = (*path, f"f:{name}")
            item = node.below(f"f:{name}")
            if item is None:
                problems.append(f"{_told(here)}: field not declared in schema")
                return
            _check_value(below, item, here, problems)
    else:
        _check_list(value, node, path, problems)


def _check_list(value: list[Any], node: _Node, path: Path, problems: list[str]) -> None:
    seen: set[str] = set()
    for place, item in enumerate(value):
        complaint = _complaint_about(item, node)
        if complaint:
            problems.append(f"{_told(path)}: element {place}: associative list {complaint}")
            return
        step = _step_of(item, node)
        if step in seen:
            problems.append(f"{_told(path)}: duplicate entries for key {_told((step,))}")
        seen.add(step)
        _check_value(item, node.item or _LEAF, (*path, step), problems)


def _complaint_about(item: Any, node: _Node) -> str:
    if node.kind == "set":
        if item is None:
            return "without keys has an element that's an explicit null"
        return "" if isinstance(item, str | int | float) else "without keys has a map or a list"
    if item is None:
        return "with keys may not have a null element"
    if not isinstance(item, dict):
        return "with keys may not have non-map elements"
    for key, default in node.keys.items():
        if item.get(key) is None and (default is None or key in item):
            return (
                f'with keys has an element that omits key field "{key}" '
                "(and doesn't have default value)"
            )
    return ""


# --- Create, update, patch -------------------------------------------------------------------


def track_update(
    type_name: str,
    before: Obj | None,
    after: Obj,
    manager: str,
    *,
    now: str,
    api_version: str,
    subresource: str = "",
) -> Obj:
    """Return `after` with the managedFields of a create, update or patch: what it changed is
    the manager's, what it removed is nobody's.

    before -- None for a create
    after  -- as the client wrote it: managedFields in it replace the stored ones, [] or [{}]
              forgets them, and then none are kept until the next apply. Not changed; the result
              shares its values.
    """
    ignored = _IGNORED.get(subresource, "")
    if before is None and not _metadata(after).get("managedFields"):
        # By far the most frequent of all: there is nobody to take anything from.
        who = _Who(manager or "unknown", "Update", api_version, subresource)
        fields = _created(type_name, after, ignored)
        return _with_entries(after, [_entry(who, now, fields)] if fields else [])
    managers = _managers_after(before, after, api_version, subresource)
    if not managers and before is not None:
        return _with_managers(after, {})
    found = _difference(type_name, before or {}, after, ignored)
    touched = found.touched
    gone = touched | found.removed
    managers = {who: replace(s, paths=s.paths - gone) for who, s in managers.items()}
    if touched:
        who = _Who(manager or "unknown", "Update", api_version, subresource)
        share = managers.get(who, _Share(frozenset()))
        managers[who] = _Share(share.paths | touched, now)
    return _with_managers(after, _capped(_without_empty(managers)))


def _managers_after(before: Obj | None, after: Obj, api_version: str, subresource: str) -> Managers:
    """The owners to start from: those the client wrote, else the stored ones."""
    told = _metadata(after).get("managedFields")
    if subresource or told is None:
        return _managers_of(before, api_version)
    if told in ([], [{}]):
        return {}
    try:
        return _parse_managers(told, api_version) or _managers_of(before, api_version)
    except ValueError:
        return _managers_of(before, api_version)


def _capped(managers: Managers) -> Managers:
    """Make one entry of the oldest updates, if there are too many."""
    updates = sorted(
        (who for who in managers if who.operation == "Update"),
        key=lambda who: (managers[who].time, who),
    )
    if len(updates) <= MAX_UPDATERS:
        return managers
    bucket = _Who(ANCIENT, "Update", updates[0].api_version, "")
    old = [who for who in updates if who != bucket]
    room = MAX_UPDATERS - 1
    merged = old[: len(old) - room]
    result = {who: share for who, share in managers.items() if who not in (*merged, bucket)}
    shares = [managers[who] for who in (*merged, bucket) if who in managers]
    paths = frozenset().union(*(share.paths for share in shares))
    result[bucket] = _Share(paths, max(share.time for share in shares))
    return result
