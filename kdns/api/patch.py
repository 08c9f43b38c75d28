"""What a patch makes of an object: JSON patch, merge patch, strategic merge patch.

Decides what the object looks like afterwards, and which patches cannot be read. Whether the
result is a valid object, and who owns its fields then, is decided elsewhere (strict.py,
validation.py, apply.py). Arguments are never changed.

Strategic merge patch is Kubernetes' own: a merge patch that knows from the schema which lists
are merged, and by which key. As in kube-apiserver, items that a patch adds stand before those
that only the object has, unless `$setElementOrder` or the object's order says otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NoReturn, TypeAlias, TypeGuard

import jsonpatch

from kdns.api.schema import Field, type_named
from kdns.api.status import bad_request
from kdns.api.strict import sound
from kdns.errors import ApiError

Obj: TypeAlias = dict[str, Any]

# Kubernetes' objects are some 20 levels deep; Python's stack ends near 1,000 frames.
MAX_DEPTH: Final = 100
MAX_OPERATIONS: Final = 10_000  # of one JSON patch, as kube-apiserver
MAX_COPIED: Final = 3 << 20  # bytes that `copy` operations may make: else 20 of them fill a disk

DIRECTIVE: Final = "$patch"
RETAIN_KEYS: Final = "$retainKeys"
SET_ORDER: Final = "$setElementOrder/"
DELETE_PRIMITIVES: Final = "$deleteFromPrimitiveList/"

UNPROCESSABLE: Final = "the server rejected our request due to an error in our request"
BAD_RETAIN_KEYS: Final = "invalid patch format of retainKeys"
BAD_SET_ORDER: Final = "invalid patch format of setElementOrder list"
BAD_PRIMITIVES: Final = "invalid patch format of primitive list"


def copied(value: Any, depth: int = 0) -> Any:
    """Return a deep copy of JSON. Raises ApiError 400 if it is nested too deeply."""
    if depth > MAX_DEPTH:
        raise bad_request(f"the object is nested more than {MAX_DEPTH} levels deep")
    below = depth + 1
    if isinstance(value, dict):  # a call an item would take longer than all the rest
        return {
            key: copied(item, below) if isinstance(item, (dict, list)) else item
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [copied(x, below) if isinstance(x, (dict, list)) else x for x in value]
    return value


# --- JSON patch (RFC 6902) -------------------------------------------------------------------


def json_patch(obj: Obj, body: bytes) -> Obj:
    """Return the object after a JSON patch.

    Raises ApiError: 400 for a body that is no list of operations, 413 for too many of them, 422
    for one that does not apply (a `test` that fails, a path that is not there).
    """
    operations = _operations(body)
    result: Any = copied(obj)
    room = MAX_COPIED
    for operation in operations:
        try:
            if operation.get("op") == "copy":
                room -= len(json.dumps(_found(result, operation["from"])))
            if room < 0:
                raise jsonpatch.JsonPatchConflict("the copies are too large")
            if not _tests_absence(result, operation):
                result = jsonpatch.apply_patch(result, [operation], in_place=True)
        except _DOES_NOT_APPLY as error:
            raise _unprocessable() from error
    if not isinstance(result, dict):
        raise _unprocessable()
    patched: Obj = copied(result)  # and not too deep
    return patched


# What jsonpatch raises for operations that cannot be read or done.
_DOES_NOT_APPLY: Final = (
    jsonpatch.JsonPatchException,
    jsonpatch.JsonPointerException,
    KeyError,
    TypeError,
    ValueError,
    IndexError,
    AttributeError,
    RecursionError,
)


def _operations(body: bytes) -> list[Obj]:
    try:
        operations = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise bad_request(f"error decoding patch: {error}") from None
    if not isinstance(operations, list) or not all(isinstance(one, dict) for one in operations):
        raise bad_request("error decoding patch: a JSON patch is a list of operations")
    if len(operations) > MAX_OPERATIONS:
        text = (
            f"The allowed maximum operations in a JSON patch is {MAX_OPERATIONS}, "
            f"got {len(operations)}"
        )
        raise ApiError(413, "RequestEntityTooLarge", text)
    # An operation without a value means null, as in kube-apiserver.
    return [{"value": None, **one} for one in sound(body, copied(operations))]


def _found(value: Any, pointer: str) -> Any:
    return jsonpatch.JsonPointer(pointer).resolve(value)


def _tests_absence(value: Any, operation: Obj) -> bool:
    """Whether this is a `test` for null of a key that is not there: kube-apiserver lets it pass."""
    if operation.get("op") != "test" or operation["value"] is not None:
        return False
    parent, key = jsonpatch.JsonPointer(operation["path"]).to_last(value)
    return isinstance(parent, dict) and key not in parent


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _unprocessable() -> ApiError:
    """Which operation it was, kube-apiserver does not tell either."""
    return ApiError(422, "Invalid", UNPROCESSABLE)


# --- Merge patch (RFC 7386) ------------------------------------------------------------------


def merge_patch(obj: Obj, patch: Obj) -> Obj:
    """Return the object after a merge patch: null deletes, lists are replaced."""
    if not isinstance(patch, dict):
        raise bad_request("error decoding patch: a merge patch is an object")
    merged: Obj = _merged(copied(obj), copied(patch))
    return merged


def _merged(target: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return patch
    if not isinstance(target, dict):
        target = {}
    for key, value in patch.items():
        if value is None:
            target.pop(key, None)
        else:
            target[key] = _merged(target.get(key), value)
    return target


# --- Strategic merge patch -------------------------------------------------------------------


def strategic_merge(type_name: str, obj: Obj, patch: Obj) -> Obj:
    """Return the object after a strategic merge patch; type_name -- as in schema.py.

    Raises ApiError 400 for a patch that makes no sense: unknown directives, directives of the
    wrong type, items without their merge key.
    """
    if not isinstance(patch, dict):
        raise bad_request("error decoding patch: a strategic merge patch is an object")
    return _merge_map(copied(obj), copied(patch), type_named(type_name).fields)


_NO_FIELDS: Final[Mapping[str, Field]] = {}


def _fields_of(field: Field | None) -> Mapping[str, Field]:
    """The fields of what stands in `field` (of its items, for a list)."""
    if field is None or field.shape == "map" or "." not in field.type:
        return _NO_FIELDS
    return type_named(field.type).fields


def _merge_map(original: Obj, patch: Obj, fields: Mapping[str, Field]) -> Obj:
    """Merge `patch` into `original`; both are changed."""
    if DIRECTIVE in patch:
        return _directed(patch)
    _retain_keys(original, patch)
    _merge_ordered(original, patch, fields)
    for key, value in patch.items():
        if key.startswith(DELETE_PRIMITIVES):
            _delete_primitives(original, key, value)
        elif value is None:
            original.pop(key, None)
        elif isinstance(value, dict) and isinstance(original.get(key), dict):
            original[key] = _merge_map(original[key], value, _fields_of(fields.get(key)))
        elif isinstance(value, list) and isinstance(original.get(key), list):
            original[key] = _merge_list(original[key], value, fields.get(key), key)
        elif _stands_alone(value):
            original[key] = _plain(value)
        else:
            original.pop(key, None)
    return original


def _directed(patch: Obj) -> Obj:
    match patch.pop(DIRECTIVE):
        case "replace":
            replaced: Obj = _plain(patch)
            return replaced
        case "delete":
            return {}
        case unknown:
            raise bad_request(f"unknown patch type: {_told(unknown)} in map: {_told(patch)}")


def _stands_alone(value: Any) -> bool:
    """Whether something that the object lacks is to be added: a map with a directive is about
    what is there already."""
    return not (isinstance(value, dict) and DIRECTIVE in value)


def _plain(value: Any) -> Any:
    """Return a part of a patch that nothing is merged with: without nulls and directives."""
    if isinstance(value, dict):
        return {
            key: _plain(item)
            for key, item in value.items()
            if item is not None
            and _stands_alone(item)
            and key != RETAIN_KEYS
            and not key.startswith((SET_ORDER, DELETE_PRIMITIVES))
        }
    if isinstance(value, list):
        return [_plain(item) for item in value if _stands_alone(item)]
    return value


def _retain_keys(original: Obj, patch: Obj) -> None:
    """`$retainKeys`: drop what it does not name (a union's other member)."""
    if RETAIN_KEYS not in patch:
        return
    retained = patch.pop(RETAIN_KEYS)
    if not isinstance(retained, list) or not all(isinstance(key, str) for key in retained):
        raise bad_request(BAD_RETAIN_KEYS)
    for key, value in patch.items():
        directive = key.startswith((SET_ORDER, DELETE_PRIMITIVES))
        if value is not None and not directive and key not in retained:
            raise bad_request(BAD_RETAIN_KEYS)
    for key in [key for key in original if key not in retained]:
        del original[key]


def _delete_primitives(original: Obj, directive: str, values: Any) -> None:
    key = _list_named(directive, BAD_PRIMITIVES)
    if values is None:
        original.pop(key, None)  # as kube-apiserver
        return
    if not isinstance(values, list) or not all(_is_primitive(value) for value in values):
        raise bad_request(BAD_PRIMITIVES)
    there = original.get(key)
    if isinstance(there, list):
        gone = {_identity(value) for value in values}
        original[key] = [
            item for item in there if not _is_primitive(item) or _identity(item) not in gone
        ]


def _list_named(directive: str, complaint: str) -> str:
    parts = directive.split("/")
    if len(parts) != 2:
        raise bad_request(complaint)
    return parts[1]


def _merge_ordered(original: Obj, patch: Obj, fields: Mapping[str, Field]) -> None:
    """`$setElementOrder/<list>`: merge those lists, in the order asked for."""
    for directive in [key for key in patch if key.startswith(SET_ORDER)]:
        wanted = patch.pop(directive)
        key = _list_named(directive, BAD_SET_ORDER)
        if not isinstance(wanted, list):
            raise bad_request(BAD_SET_ORDER)
        there, added = original.get(key), patch.get(key)
        for side in (there, added):
            if side is not None and not isinstance(side, list):
                raise bad_request(f"{key}: {SET_ORDER[:-1]} goes with a list")
        field = fields.get(key)
        if field is None or field.shape != "list":
            raise bad_request(f'unable to find api field "{key}", a list, for {directive}')
        merge_key = _merge_key(field)
        if merge_key:
            _check_items(wanted, merge_key)
        _check_order(added or [], wanted, merge_key)
        if there is None and added is None:
            continue
        patch.pop(key, None)
        if there is None:
            merged = _plain(added)
        else:
            merged = there if added is None else _merge_list(copied(there), added, field, key)
        order = _with_successors(there or [], added or [], merge_key)
        original[key] = _ordered(merged, wanted, order, merge_key)


def _with_successors(there: list[Any], added: list[Any], merge_key: str) -> list[Any]:
    """Return the object's order once the patch's deletions are made. As in kube-apiserver, new
    items count as standing at its end, as many as were deleted."""
    if not merge_key:
        return there
    gone = {_key_of(i, merge_key) for i in added if i.get(DIRECTIVE) == "delete"}
    known = _places(there, merge_key)
    left = [item for item in there if _key_of(item, merge_key) not in gone]
    new = [i for i in added if DIRECTIVE not in i and _key_of(i, merge_key) not in known]
    return left + new[: len(there) - len(left)]


def _check_order(added: list[Any], wanted: list[Any], merge_key: str) -> None:
    """The patch's items must stand in the order that the patch asks for."""
    if not wanted:
        return
    if merge_key:
        _check_items(added, merge_key)
    left = [i for i in added if not (isinstance(i, dict) and i.get(DIRECTIVE) == "delete")]
    for item in wanted:
        while left and isinstance(left[0], dict) and DIRECTIVE in left[0]:
            del left[0]
        if left and _key_of(left[0], merge_key) == _key_of(item, merge_key):
            del left[0]
    if left:
        raise bad_request(
            f"The order in patch list:\n{_told(added)}\n doesn't match "
            f"{SET_ORDER[:-1]} list:\n{_told(wanted)}\n"
        )


def _merge_key(field: Field | None) -> str:
    """The merge key of a list of maps; "" for primitives and lists that are replaced."""
    return "" if field is None or field.merge_key == "-" else field.merge_key


def _merge_list(original: list[Any], patch: list[Any], field: Field | None, key: str) -> list[Any]:
    if field is None or not field.merge_key:
        replaced: list[Any] = _plain(patch)
        return replaced
    if not original and not patch:
        return original
    items = [*original, *patch]
    if any(isinstance(item, list) for item in items):
        raise bad_request("lists of lists are not supported")
    merge_key = _merge_key(field)
    if not merge_key:
        if not all(_is_primitive(item) for item in items):
            raise bad_request(f"{key}: list element types are not identical")
        merged = _unique(items)
    else:
        _check_items(items, merge_key)
        original, patch = _apply_item_directives(original, patch, merge_key)
        merged = _merge_items(original, patch, merge_key, _fields_of(field))
    return _ordered(merged, patch, original, merge_key)


def _check_items(items: Sequence[Any], merge_key: str) -> None:
    for item in items:
        if not isinstance(item, dict):
            raise bad_request(f"expected a map with {merge_key}, but received {_told(item)}")
        if item.get(DIRECTIVE) == "replace":
            continue  # stands for the whole list
        if not _is_primitive(item.get(merge_key)):
            raise bad_request(
                f"map: {_told(item)} does not contain declared merge key: {merge_key}"
            )


def _apply_item_directives(
    original: list[Any], patch: list[Any], merge_key: str
) -> tuple[list[Any], list[Any]]:
    """Return what is left of both once `$patch` items are obeyed."""
    rest = [item for item in patch if DIRECTIVE not in item]
    replace = False
    for item in patch:
        match item.get(DIRECTIVE, ""):
            case "":
                if DIRECTIVE in item:
                    raise bad_request(f'unknown patch type: "" in map: {_told(item)}')
            case "delete":
                gone = _key_of(item, merge_key)
                original = [one for one in original if _key_of(one, merge_key) != gone]
            case "replace":
                replace = True
            case "merge":
                raise bad_request("merging lists cannot yet be specified in the patch")
            case unknown:
                raise bad_request(f"unknown patch type: {_told(unknown)} in map: {_told(item)}")
    return (_plain(rest), []) if replace else (original, rest)


def _merge_items(
    original: list[Any], patch: list[Any], merge_key: str, fields: Mapping[str, Field]
) -> list[Any]:
    merged = list(original)
    places = _places(merged, merge_key)
    for item in patch:
        key = _key_of(item, merge_key)
        if key in places:
            place = places[key]
            merged[place] = _merge_map(merged[place], copied(item), fields)
        else:
            places[key] = len(merged)
            merged.append(_plain(item))
    return merged


def _ordered(
    merged: list[Any], wanted: Sequence[Any], there: Sequence[Any], merge_key: str
) -> list[Any]:
    """Return the items: those of `wanted` in its order, and among them those only the object
    has, in the object's order; in doubt the former come first."""
    in_patch, in_object = _places(wanted, merge_key), _places(there, merge_key)

    def by(places: Mapping[Any, int]) -> Callable[[Any], int]:
        return lambda item: places.get(_key_of(item, merge_key), len(places))

    patched = sorted((i for i in merged if _key_of(i, merge_key) in in_patch), key=by(in_patch))
    kept = sorted((i for i in merged if _key_of(i, merge_key) not in in_patch), key=by(in_object))
    result, left, right = [], 0, 0
    while left < len(kept) and right < len(patched):
        kept_at = in_object.get(_key_of(kept[left], merge_key))
        patched_at = in_object.get(_key_of(patched[right], merge_key))
        if kept_at is not None and patched_at is not None and kept_at < patched_at:
            result.append(kept[left])
            left += 1
        else:
            result.append(patched[right])
            right += 1
    return [*result, *patched[right:], *kept[left:]]


def _places(items: Sequence[Any], merge_key: str) -> dict[Any, int]:
    places: dict[Any, int] = {}
    for place, item in enumerate(items):
        places.setdefault(_key_of(item, merge_key), place)
    return places


def _key_of(item: Any, merge_key: str) -> Any:
    """What makes an item of a merged list the same as another."""
    return _identity(item.get(merge_key) if merge_key and isinstance(item, dict) else item)


def _identity(value: Any) -> Any:
    """A hashable stand-in for JSON: true is not 1."""
    if isinstance(value, dict | list):
        return json.dumps(value, sort_keys=True)
    return (isinstance(value, bool), value)


def _unique(items: Sequence[Any]) -> list[Any]:
    return list({_identity(item): item for item in items}.values())


def _is_primitive(value: Any) -> TypeGuard[str | int | float | bool]:
    return isinstance(value, str | int | float)  # bool is an int


def _told(value: Any) -> str:
    """A part of a patch in an error message: not more of it than one can read."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 500 else f"{text[:500]}..."
