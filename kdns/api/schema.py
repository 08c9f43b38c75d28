"""The types of the embedded API: which fields an object has, and how each may be written.

Reads the notation of schema_table.py, a type when it is first asked for. What is done with a
field is strict.py's (JSON), protobuf.py's, patch.py's, apply.py's and openapi.py's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final, Literal, TypeAlias

Shape: TypeAlias = Literal["one", "list", "map"]
ListType: TypeAlias = Literal["atomic", "set", "map"]

SCALARS: Final = frozenset(
    {
        "string", "int32", "int64", "bool", "bytes",
        "time", "microtime", "quantity", "intorstring", "fieldsv1",
        "strings",  # a list where only a map's values can be: authentication's ExtraValue
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a type.

    name       -- JSON name
    number     -- protobuf field number; 0: not in protobuf
    type       -- one of SCALARS, or the name of a type: "core/v1.ServiceSpec"
    shape      -- map: string to `type`
    merge_key  -- strategic merge patch: key of a merged list; "": the list is replaced;
                  "-": a list of scalars that merges
    list_type  -- server-side apply
    atomic     -- server-side apply: owned as a whole
    required   -- OpenAPI requires it
    written    -- Go writes it even when it is empty; `required` is
    inline     -- protobuf: an embedded message whose JSON fields stand one level up
    pointer    -- an empty value (0, false, "", {}) is a value, not the lack of one
    """

    name: str
    number: int
    type: str
    shape: Shape = "one"
    merge_key: str = ""
    retain_keys: bool = False
    list_type: ListType = "atomic"
    list_keys: tuple[str, ...] = ()
    atomic: bool = False
    required: bool = False
    inline: bool = False
    pointer: bool = False
    written: bool = False

    @property
    def scalar(self) -> bool:
        """Whether `type` is one of SCALARS."""
        return self.type in SCALARS


@dataclass(frozen=True, slots=True)
class Type:
    """A type.

    fields    -- by JSON name; those of embedded messages among them
    by_number -- by protobuf number; embedded messages as fields of their own
    atomic    -- server-side apply owns a value as a whole, wherever it stands
    """

    name: str
    fields: Mapping[str, Field]
    by_number: Mapping[int, Field]
    atomic: bool = False

    @property
    def kind(self) -> str:
        """The word after the version: "ServiceSpec"."""
        return self.name.rpartition(".")[2]

    @property
    def api_version(self) -> str:
        """As objects have it: "v1", "apps/v1"."""
        return self.name.rpartition(".")[0].removeprefix("core/")


_FIELD = re.compile(
    r"([A-Za-z0-9]+)(!?)(\??)(\+?)=(\d+)(?::(\[\]|\{\})?([a-z]\.)?([A-Za-z0-9]+))?"
    r"(?:@([A-Za-z-]+))?(?:(%)([A-Za-z,]*))?(\$?)(~?)(\^?)$"
)
_SHAPES: Final[Mapping[str, Shape]] = {"": "one", "[]": "list", "{}": "map"}
_PREFIXES: Final = {"m.": "meta/v1.", "c.": "core/v1."}


@cache
def type_named(name: str) -> Type:
    """Return a type by name, "core/v1.Service". Raises KeyError if there is none."""
    atomic, text = _sources()[name]
    group = name.rpartition(".")[0]
    own = [_read_field(word, group) for word in text.split()]
    fields: dict[str, Field] = {}
    for field in own:
        if field.inline:
            fields.update(type_named(field.type).fields)
        else:
            fields[field.name] = field
    return Type(name, fields, {f.number: f for f in own if f.number}, atomic)


def type_names() -> tuple[str, ...]:
    """Return the names of all types, in the table's order."""
    return tuple(_sources())


# Bodies that come under the group and version they are about, whichever that is.
_EVERYWHERE: Final = frozenset(
    {
        "DeleteOptions", "CreateOptions", "UpdateOptions", "PatchOptions", "GetOptions",
        "ListOptions", "Status",
    }
)  # fmt: skip


def type_for(api_version: str, kind: str) -> Type:
    """Return the type of a whole object: ("v1", "Service"), ("apps/v1", "DeleteOptions").
    Raises KeyError if there is none."""
    if kind in _EVERYWHERE:
        return type_named(f"meta/v1.{kind}")
    found = type_named(f"{api_version if '/' in api_version else 'core/' + api_version}.{kind}")
    kind_field = found.fields.get("kind")
    if kind_field is None or kind_field.number:  # a reference to an object has one with a number
        raise KeyError(found.name)
    return found


@cache
def _sources() -> Mapping[str, tuple[bool, str]]:
    """Cut the table into types: name to (atomic, its fields' text)."""
    from kdns.api.schema_table import TABLE

    found: dict[str, tuple[bool, str]] = {}
    group = name = ""
    atomic = False
    lines: list[str] = []
    for line in [*TABLE.splitlines(), "[]"]:
        if not line:
            continue
        if line[0] == " ":
            lines.append(line)
            continue
        if name:
            found[name] = (atomic, " ".join(lines))
        if line[0] == "[":
            group, name = line[1:-1], ""
        else:
            word, _, mark = line.partition(" ")
            name, atomic, lines = f"{group}.{word}", mark == "~", []
    return found


def _read_field(word: str, group: str) -> Field:
    match = _FIELD.match(word)
    if match is None:
        raise ValueError(f"schema_table.py: {group}: cannot read {word!r}")
    (name, required, pointer, plus, number, shape, prefix, kind,
     merge_key, listed, keys, retain, atomic, inline) = match.groups()  # fmt: skip
    kind = kind or "string"
    if kind not in SCALARS:
        kind = _PREFIXES.get(prefix or "", f"{group}.") + kind
    form = _SHAPES[shape or ""]
    whole = bool(atomic) or (form == "one" and kind not in SCALARS and _sources()[kind][0])
    return Field(
        name,
        int(number),
        kind,
        form,
        merge_key or "",
        bool(retain),
        "map" if keys else "set" if listed else "atomic",
        tuple(keys.split(",")) if keys else (),
        whole,
        bool(required),
        bool(inline),
        bool(pointer),
        bool(required or plus),
    )
