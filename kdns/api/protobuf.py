"""Request bodies in protobuf, as kubectl create and every Go client send them, to JSON objects.

Reads the wire with schema.py's field numbers and gives what Go would have written as JSON.
Decides how far a stranger's bytes are followed; what the object may hold is strict.py's and
validation.py's.

Nothing here recurses deeper than the types do, and they do not contain themselves.
"""

from __future__ import annotations

import base64
from datetime import datetime, timedelta
from typing import Any, Final, NoReturn, TypeAlias

from kdns.api.schema import Field, Type, type_for, type_named
from kdns.api.status import bad_request
from kdns.api.strict import parse_json
from kdns.errors import ApiError

Obj: TypeAlias = dict[str, Any]

MAGIC: Final = b"k8s\0"
MEDIA_TYPE: Final = "application/vnd.kubernetes.protobuf"
MAX_BODY: Final = 3 << 20  # octets, as upstream
# A field takes two octets on the wire and a hundred in memory; what upstream's own objects hold
# of this is below 20,000.
MAX_FIELDS: Final = 200_000

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_WIRE: Final = {"int32": _VARINT, "int64": _VARINT, "bool": _VARINT}
_EPOCH: Final = datetime(1970, 1, 1)
_ZERO_TIME: Final = -62135596800  # seconds of 0001-01-01: Go's time that is not set
_LAST_TIME: Final = 253402300799  # seconds of 9999-12-31T23:59:59
_EMPTY: Final[dict[str, object]] = {
    "int32": 0, "int64": 0, "bool": False, "quantity": "0", "intorstring": 0,
}  # fmt: skip


def decode_protobuf(body: bytes) -> Obj:
    """Return the object of a body: the four octets `k8s\\0` and a runtime.Unknown.

    apiVersion and kind are the envelope's. Fields the schema does not know are skipped, as
    Go's decoder skips them. Raises ApiError: 400 for what cannot be read, 413 for more than
    MAX_BODY octets.
    """
    if len(body) > MAX_BODY:
        raise ApiError(
            413, "RequestEntityTooLarge", f"Request entity too large: limit is {MAX_BODY}"
        )
    if not body.startswith(MAGIC):
        raise bad_request(
            "provided data does not appear to be a protobuf message, expected prefix 6b 38 73 00"
        )
    envelope: dict[int, tuple[int, int]] = {}
    reader = _Reader(body)
    for number, wire, value, start in reader.fields(len(MAGIC), len(body)):
        if wire == _BYTES:
            envelope[number] = (start, value)
    type_meta = {
        number: reader.text(start, end)
        for number, wire, end, start in reader.fields(*envelope.get(1, (0, 0)))
        if wire == _BYTES
    }
    encoding, media = (reader.text(*envelope.get(number, (0, 0))) for number in (3, 4))
    if encoding or media not in ("", MEDIA_TYPE):
        raise bad_request(
            f"the object inside the protobuf envelope is {encoding or media}: expected {MEDIA_TYPE}"
        )
    api_version, kind = type_meta.get(1, ""), type_meta.get(2, "")
    try:
        found = type_for(api_version, kind)
    except KeyError:
        raise bad_request(f'no kind "{kind}" is registered for version "{api_version}"') from None
    obj: Obj = {"apiVersion": api_version, "kind": kind}
    reader.message(*envelope.get(2, (0, 0)), found, obj)
    return obj


class _Reader:
    """One body. Positions are octets from its start, for messages about it."""

    __slots__ = ("body", "left")

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.left = MAX_FIELDS

    def fail(self, position: int, why: str) -> NoReturn:
        raise bad_request(f"the protobuf body cannot be read: octet {position}: {why}")

    def fields(self, position: int, end: int) -> list[tuple[int, int, int, int]]:
        """Return the fields between two positions: number, wire type, value, start. For
        bytes the value is where they end and start where they begin."""
        found: list[tuple[int, int, int, int]] = []
        body = self.body
        while position < end:
            at = position
            key = body[position]
            if key < 0x80:
                position += 1
            else:
                key, position = self.varint(position, end)
            number, wire = key >> 3, key & 7
            if number == 0:
                self.fail(at, "a field has the number 0")
            start = position
            if wire == _BYTES:
                length, start = self.varint(position, end)
                value = position = start + length
                if position > end:
                    self.fail(at, f"{length} octets announced, {end - start} there")
            elif wire == _VARINT:
                value, position = self.varint(position, end)
            elif wire in (_FIXED64, _FIXED32):
                width = 8 if wire == _FIXED64 else 4
                position += width
                if position > end:
                    self.fail(at, f"{width} octets expected, {end - start} there")
                value = int.from_bytes(body[start:position], "little")
            else:
                self.fail(at, f"wire type {wire} is none of protobuf 3")
            found.append((number, wire, value, start))
            if len(found) > self.left:
                self.fail(at, f"the object has more than {MAX_FIELDS} fields")
        self.left -= len(found)
        return found

    def varint(self, position: int, end: int) -> tuple[int, int]:
        """Return a number of up to 64 bits, and the position after it."""
        value = shift = 0
        for at in range(position, min(end, position + 10)):
            octet = self.body[at]
            value |= (octet & 0x7F) << shift
            if octet < 0x80:
                return value & 0xFFFFFFFFFFFFFFFF, at + 1
            shift += 7
        self.fail(position, "a number does not end")

    def text(self, start: int, end: int) -> str:
        try:
            return self.body[start:end].decode()
        except UnicodeDecodeError as e:
            self.fail(start + e.start, "a string is not UTF-8")

    def message(self, start: int, end: int, kind: Type, into: Obj) -> None:
        """Add a message's fields to `into`. A message that comes in parts is put together."""
        by_number = kind.by_number
        for number, wire, value, at in self.fields(start, end):
            field = by_number.get(number)
            if field is None:
                continue
            if field.shape == "map":
                self.entry(field, wire, value, at, into.setdefault(field.name, {}))
            elif field.shape == "list":
                into.setdefault(field.name, []).extend(self.elements(field, wire, value, at))
            elif field.inline:
                self.expect(field, wire, _BYTES, at)
                self.message(at, value, type_named(field.type), into)
            else:
                found = self.value(field, wire, value, at, into.get(field.name))
                if _stands(field, found):
                    into[field.name] = found
                else:
                    into.pop(field.name, None)

    def entry(self, field: Field, wire: int, end: int, start: int, into: Obj) -> None:
        """Read one entry of a map: a message of key and value."""
        self.expect(field, wire, _BYTES, start)
        key, found = "", _EMPTY.get(field.type, "")
        for number, inner, value, at in self.fields(start, end):
            if number == 1:
                self.expect(field, inner, _BYTES, at)
                key = self.text(at, value)
            elif number == 2:
                found = self.value(field, inner, value, at, None)
        into[key] = found

    def elements(self, field: Field, wire: int, value: int, at: int) -> list[Any]:
        """Return one element, or all of a packed list of numbers."""
        if wire != _BYTES or field.type not in ("int32", "int64"):
            return [self.value(field, wire, value, at, None)]
        found: list[Any] = []
        while at < value:
            if self.left == 0:
                self.fail(at, f"the object has more than {MAX_FIELDS} fields")
            self.left -= 1
            number, after = self.varint(at, value)
            found.append(self.value(field, _VARINT, number, at, None))
            at = after
        return found

    def expect(self, field: Field, wire: int, wanted: int, at: int) -> None:
        if wire != wanted:
            self.fail(at, f"{field.name} has wire type {wire}, expected {wanted}")

    def value(self, field: Field, wire: int, value: int, at: int, before: Any) -> Any:
        """Return one value as JSON has it; None for a time that is not set. before -- what
        earlier parts of the same message gave."""
        kind = field.type
        self.expect(field, wire, _WIRE.get(kind, _BYTES), at)
        match kind:
            case "string":
                return self.text(at, value)
            case "int32":
                return (value & 0xFFFFFFFF ^ 0x80000000) - 0x80000000
            case "int64":
                return (value ^ 1 << 63) - (1 << 63)
            case "bool":
                return value != 0
            case "bytes":
                return base64.b64encode(self.body[at:value]).decode()
            case "time" | "microtime":
                return self.time(at, value, micro=kind == "microtime")
            case "quantity":
                return self.only_text(field, at, value) or "0"
            case "intorstring":
                return self.int_or_string(field, at, value)
            case "fieldsv1":
                return self.json(at, value)
            case "strings":
                return [
                    self.text(start, end)
                    for number, inner, end, start in self.fields(at, value)
                    if number == 1 and inner == _BYTES
                ]
        found: Obj = before if isinstance(before, dict) else {}
        self.message(at, value, type_named(kind), found)
        return found

    def only_text(self, field: Field, start: int, end: int) -> str:
        """Return the string that is a message's field 1."""
        found = ""
        for number, wire, value, at in self.fields(start, end):
            if number == 1:
                self.expect(field, wire, _BYTES, at)
                found = self.text(at, value)
        return found

    def int_or_string(self, field: Field, start: int, end: int) -> int | str:
        of_type, number_value, text = 0, 0, ""
        for number, wire, value, at in self.fields(start, end):
            if number in (1, 2):
                self.expect(field, wire, _VARINT, at)
                if number == 1:
                    of_type = value
                else:
                    number_value = (value & 0xFFFFFFFF ^ 0x80000000) - 0x80000000
            elif number == 3:
                self.expect(field, wire, _BYTES, at)
                text = self.text(at, value)
        return text if of_type == 1 else number_value

    def time(self, start: int, end: int, *, micro: bool) -> str | None:
        seconds, nanos = _ZERO_TIME, 0
        if start < end:
            seconds = 0
        for number, wire, value, _ in self.fields(start, end):
            if wire == _VARINT and number == 1:
                seconds = (value ^ 1 << 63) - (1 << 63)
            elif wire == _VARINT and number == 2:
                nanos = value
        if seconds == _ZERO_TIME and not nanos:
            return None
        if not _ZERO_TIME <= seconds <= _LAST_TIME or nanos >= 1_000_000_000:
            self.fail(start, f"a time of {seconds} s and {nanos} ns is none of years 1 to 9999")
        moment = _EPOCH + timedelta(seconds=seconds, microseconds=nanos // 1000 if micro else 0)
        return moment.isoformat(timespec="microseconds" if micro else "seconds") + "Z"

    def json(self, start: int, end: int) -> Obj:
        """Return the object in a FieldsV1: JSON text in field 1."""
        found: Obj = {}
        for number, wire, value, at in self.fields(start, end):
            if number == 1 and wire == _BYTES:
                found = parse_json(self.body[at:value])[0]
        return found


def _stands(field: Field, value: Any) -> bool:
    """Whether Go's JSON would have the value: a pointer's, a message, what is always written,
    or what is not empty. A quantity is never empty, a time that is not set is null."""
    if value is None:
        return False
    if field.pointer or field.written or not field.scalar or field.type == "quantity":
        return True
    return bool(value)
