"""Values of Go's `text/template`, and the functions every template may call.

How Go writes a value, which values are true, which can be compared; index, len, printf and
their kin (https://pkg.go.dev/text/template#hdr-Functions, https://pkg.go.dev/fmt). A
function's mistakes are ValueErrors with Go's text; where they happened is gotemplate's to say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_OUTPUT = 65_536  # characters of one rendering: no record is longer than a message


class _Missing:
    """What a map has at a key it does not hold."""

    def __repr__(self) -> str:
        return "<no value>"


NO_VALUE = _Missing()


class Record:
    """A Go struct: fields and methods (callables) by name, those of `type` only."""

    __slots__ = ("fields", "type")

    def __init__(self, type: str, fields: Mapping[str, Any]) -> None:
        self.type = type
        self.fields = fields


@dataclass(frozen=True, slots=True)
class Function:
    """low, high -- how many arguments it takes; high None: any number
    call -- raises ValueError with the reason
    """

    low: int
    high: int | None
    call: Callable[..., Any]


# --- values -------------------------------------------------------------------------------


def type_of(value: Any) -> str:
    if value is None or value is NO_VALUE:
        return "nil"
    if isinstance(value, Record):
        return value.type
    for kind, name in (
        (bool, "bool"), (int, "int"), (float, "float64"), (str, "string"),
        (dict, "map[string]string"), (list, "[]string"),
    ):  # fmt: skip
        if isinstance(value, kind):
            return name
    return "func"


def is_true(value: Any) -> bool:
    """Return Go's truth of a value: the zero of a type and what is empty are false."""
    return value is not NO_VALUE and (isinstance(value, Record) or bool(value))


def render_value(value: Any) -> str:
    """Return what fmt.Print writes for a value."""
    if isinstance(value, str):
        return value
    if value is None:
        return "<nil>"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, dict):
        return "map[" + " ".join(f"{k}:{render_value(value[k])}" for k in sorted(value)) + "]"
    if isinstance(value, list):
        return "[" + " ".join(map(render_value, value)) + "]"
    if isinstance(value, Record):
        return "{" + " ".join(render_value(v) for v in value.fields.values()) + "}"
    return str(value)


def _float(value: float) -> str:
    """Return strconv's shortest form, with an exponent below 1e-4 and from 1e21 on."""
    if value == int(value) and abs(value) < 1e21:
        return str(int(value))
    return re.sub(r"e([+-])(\d)$", r"e\g<1>0\2", repr(value))


def quote(text: str) -> str:
    """Return strconv.Quote of a text."""
    return json.dumps(text, ensure_ascii=False).replace("\\u00", "\\x")


# --- built-in functions -------------------------------------------------------------------


def _index(value: Any, *keys: Any) -> Any:
    for key in keys:
        if isinstance(value, dict):
            if not isinstance(key, str):
                raise ValueError(f"value has type {type_of(key)}; should be string")
            value = value.get(key, "")
        elif isinstance(value, list | str):
            if not isinstance(key, int) or isinstance(key, bool):
                raise ValueError(f"cannot index slice/array with type {type_of(key)}")
            if not 0 <= key < len(value):
                raise ValueError(f"index out of range: {key}")
            value = ord(value[key]) if isinstance(value, str) else value[key]
        elif value is None or value is NO_VALUE:
            raise ValueError("index of untyped nil")
        else:
            raise ValueError(f"can't index item of type {type_of(value)}")
    return value


def _slice(value: Any, *bounds: Any) -> Any:
    if not isinstance(value, list | str):
        raise ValueError(f"can't slice item of type {type_of(value)}")
    low, high = 0, len(value)
    for n, bound in enumerate(bounds):
        if not isinstance(bound, int) or isinstance(bound, bool):
            raise ValueError(f"cannot index slice/array with type {type_of(bound)}")
        if not 0 <= bound <= len(value):
            raise ValueError(f"index out of range: {bound}")
        if n == 0:
            low = bound
        else:
            high = bound
    if low > high:
        raise ValueError(f"invalid slice index: {low} > {high}")
    return value[low:high]


def _len(value: Any) -> int:
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, list | dict):
        return len(value)
    raise ValueError(f"len of type {type_of(value)}")


def _comparable(value: Any) -> str:
    """Return what kind of value it is: those of one kind can be compared."""
    if isinstance(value, bool):
        return "bool"
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind.__name__
    if value is None or value is NO_VALUE:
        return "nil"
    raise ValueError(f"non-comparable type {render_value(value)}: {type_of(value)}")


def _incompatible(first: Any, second: Any) -> ValueError:
    return ValueError(f"incompatible types for comparison: {type_of(first)} and {type_of(second)}")


def _eq(first: Any, *others: Any) -> bool:
    kind = _comparable(first)
    for other in others:
        its = _comparable(other)
        if its != kind and "nil" not in (kind, its):
            raise _incompatible(first, other)
        if its == kind and (kind == "nil" or first == other):
            return True
    return False


def _lt(first: Any, second: Any) -> bool:
    kind = _comparable(first)
    if kind != _comparable(second):
        raise _incompatible(first, second)
    if kind in ("bool", "nil"):
        raise ValueError("invalid type for comparison")
    return bool(first < second)


def _print(*values: Any) -> str:
    """As fmt.Sprint: a space between two values of which neither is a text."""
    out: list[str] = []
    for n, value in enumerate(values):
        if n and not isinstance(value, str) and not isinstance(values[n - 1], str):
            out.append(" ")
        out.append(render_value(value))
    return "".join(out)


_VERB = re.compile(r"%([-+# 0]*)(\*|[0-9]+)?(?:\.(\*|[0-9]*))?(.)?", re.DOTALL)


def _printf(form: Any, *values: Any) -> str:
    """As fmt.Sprintf, without explicit argument numbers."""
    if not isinstance(form, str):
        raise ValueError(f"wrong type for value; expected string; got {type_of(form)}")
    rest = list(values)

    def size(text: str | None) -> int | None:
        if text == "*":
            star = rest.pop(0) if rest else None
            text = str(star) if isinstance(star, int) and 0 <= star <= MAX_OUTPUT else None
        if text is None:
            return None
        if len(text) > 5 or int(text or 0) > MAX_OUTPUT:
            raise ValueError(f"width {text} is too large")
        return int(text or 0)

    def one(match: re.Match[str]) -> str:
        flags, verb = match[1], match[4]
        width, precision = size(match[2]), size(match[3])
        if verb is None:
            return "%!(NOVERB)"
        if verb == "%":
            return "%"
        if not rest:
            return f"%!{verb}(MISSING)"
        value = rest.pop(0)
        text = _verb(verb, flags, precision, value)
        if text is None:
            return f"%!{verb}({type_of(value)}={render_value(value)})"
        return _pad(text, flags, width or 0, isinstance(value, int | float))

    out = _VERB.sub(one, form)
    if rest:
        extra = ", ".join(f"{type_of(value)}={render_value(value)}" for value in rest)
        out += f"%!(EXTRA {extra})"
    return out


def _verb(verb: str, flags: str, precision: int | None, value: Any) -> str | None:
    """Return a value in the form of one verb; None if the verb is not for its type."""
    if verb == "T":
        return type_of(value)
    if isinstance(value, bool):
        return render_value(value) if verb in "tv" else None
    if isinstance(value, int):
        digits = {"d": "d", "v": "d", "b": "b", "o": "o", "x": "x", "X": "X"}.get(verb)
        if digits is not None:
            text = format(abs(value), digits).rjust(precision or 0, "0")
            if "#" in flags and verb in "xX":
                text = f"0{verb}{text}"
            return ("-" if value < 0 else "+" if "+" in flags else "") + text
        if verb in "cqU" and 0 <= value < 0x110000:
            char = chr(value)
            return {"c": char, "q": f"'{char}'", "U": f"U+{value:04X}"}[verb]
        return None
    if isinstance(value, float):
        if verb == "v":
            return render_value(value)
        return format(value, f".{6 if precision is None else precision}{verb}") if verb in (
            "e", "f", "g", "E", "F", "G",
        ) else None  # fmt: skip
    if isinstance(value, str):
        if verb in "xX":
            return value.encode().hex().upper() if verb == "X" else value.encode().hex()
        text = value if precision is None else value[:precision]
        return {"s": text, "v": text, "q": quote(text)}.get(verb)
    return render_value(value) if verb in "sv" else None


def _pad(text: str, flags: str, width: int, number: bool) -> str:
    if "-" in flags:
        return text.ljust(width)
    if "0" in flags:
        sign = text[:1] if number and text[:1] in ("+", "-") else ""
        return sign + text[len(sign) :].rjust(width - len(sign), "0")
    return text.rjust(width)


BUILTINS: dict[str, Function] = {
    "not": Function(1, 1, lambda value: not is_true(value)),
    "index": Function(1, None, _index),
    "slice": Function(1, 4, _slice),
    "len": Function(1, 1, _len),
    "eq": Function(2, None, _eq),
    "ne": Function(2, 2, lambda a, b: not _eq(a, b)),
    "lt": Function(2, 2, _lt),
    "le": Function(2, 2, lambda a, b: _lt(a, b) or _eq(a, b)),
    "gt": Function(2, 2, lambda a, b: not _lt(a, b) and not _eq(a, b)),
    "ge": Function(2, 2, lambda a, b: not _lt(a, b)),
    "print": Function(0, None, _print),
    "println": Function(0, None, lambda *v: " ".join(map(render_value, v)) + "\n"),
    "printf": Function(1, None, _printf),
}
