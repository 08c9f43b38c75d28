"""What single fields may hold: names, labels, ports, addresses; in upstream's words.

Each function returns what is wrong, as Causes or as the texts that go into one. Which field must
be what is said by validation.py and its neighbours.
Reference: apimachinery's validation packages (util/validation, api/validate/content, field).
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, TypeAlias

from kdns.api.status import Cause

Causes: TypeAlias = list[Cause]

IMMUTABLE: Final = "field is immutable"
NEGATIVE: Final = "must be greater than or equal to 0"
MAX_LABEL, MAX_SUBDOMAIN, MAX_LABEL_VALUE = 63, 253, 63
MAX_ANNOTATIONS = 256 * 1024
PROTOCOLS: Final = ("SCTP", "TCP", "UDP")
# Names and labels come again and again; each is looked at once.
REMEMBERED = 4096


# --- causes -----------------------------------------------------------------------------------


def quoted(value: object) -> str:
    """Return a value as it stands in a message."""
    if isinstance(value, str) and value.isprintable() and '"' not in value and "\\" not in value:
        return f'"{value}"'
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def required(field: str, detail: str = "") -> Cause:
    return Cause("FieldValueRequired", _with(detail, "Required value"), field)


def invalid(field: str, value: object, detail: str) -> Cause:
    return Cause("FieldValueInvalid", _with(detail, f"Invalid value: {quoted(value)}"), field)


def forbidden(field: str, detail: str) -> Cause:
    return Cause("FieldValueForbidden", _with(detail, "Forbidden"), field)


def duplicate(field: str, value: object) -> Cause:
    return Cause("FieldValueDuplicate", f"Duplicate value: {quoted(value)}", field)


def unsupported(field: str, value: object, supported: Iterable[str]) -> Cause:
    listed = ", ".join(quoted(one) for one in supported)
    text = f"Unsupported value: {quoted(value)}: supported values: {listed}"
    return Cause("FieldValueNotSupported", text, field)


def not_found(field: str, value: object) -> Cause:
    return Cause("FieldValueNotFound", f"Not found: {quoted(value)}", field)


def too_long(field: str, most: int) -> Cause:
    return Cause("FieldValueTooLong", f"Too long: may not be more than {most} bytes", field)


def too_many(field: str, count: int, most: int) -> Cause:
    text = f"Too many: {count}: must have at most {most} items"
    return Cause("FieldValueTooMany", text, field)


def immutable(field: str, new: object, old: object) -> Causes:
    """Refuse any change."""
    return [] if (new or None) == (old or None) else [invalid(field, new or "", IMMUTABLE)]


def one_of(field: str, value: object, supported: Sequence[str], *, needed: bool = True) -> Causes:
    """Allow the listed values."""
    if value in (None, ""):
        return [required(field)] if needed else []
    return [] if value in supported else [unsupported(field, value, supported)]


def not_negative(field: str, value: Any) -> Causes:
    return [invalid(field, value, NEGATIVE)] if value is not None and value < 0 else []


def each(field: str, value: object, texts: Iterable[str]) -> Causes:
    """Make a cause of each text."""
    return [invalid(field, value, text) for text in texts]


def _with(detail: str, text: str) -> str:
    return f"{text}: {detail}" if detail else text


# --- forms of text ------------------------------------------------------------------------------

_LABEL = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_SUBDOMAIN = rf"{_LABEL}(\.{_LABEL})*"
_NAME_PART = "([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]"
_LABEL_VALUE = f"({_NAME_PART})?"
_CONFIG_KEY = "[-._a-zA-Z0-9]+"
_PERCENT = "[0-9]+%"


def _form(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.ASCII)


# Compiled without the nested repetition of the patterns that messages quote.
_is_label = _form("[a-z0-9](?:[-a-z0-9]*[a-z0-9])?").fullmatch
_is_name_part = _form("[A-Za-z0-9](?:[-A-Za-z0-9_.]*[A-Za-z0-9])?").fullmatch
_is_config_key = _form(_CONFIG_KEY).fullmatch
_is_percent = _form(_PERCENT).fullmatch

_LABEL_TEXT = (
    "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and"
    " must start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex"
    f" used for validation is '{_LABEL}')"
)
_SUBDOMAIN_TEXT = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or"
    " '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used"
    f" for validation is '{_SUBDOMAIN}')"
)
_NAME_PART_TEXT = (
    "must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an"
    " alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for"
    f" validation is '{_NAME_PART}')"
)
_LABEL_VALUE_TEXT = (
    "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or"
    " '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  or"
    f" 'my_value',  or '12345', regex used for validation is '{_LABEL_VALUE}')"
)
_CONFIG_KEY_TEXT = (
    "a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g."
    f" 'key.name',  or 'KEY_NAME',  or 'key-name', regex used for validation is '{_CONFIG_KEY}')"
)
_PERCENT_TEXT = (
    "a valid percent string must be a numeric string followed by an ending '%' (e.g. '1%',  or"
    f" '93%', regex used for validation is '{_PERCENT}')"
)
_ENV_TEXT = (
    "a valid environment variable name must consist only of printable ASCII characters other"
    " than '='"
)


def _at_most(size: int) -> str:
    return f"must be no more than {size} characters"


@lru_cache(REMEMBERED)
def subdomain(text: str) -> tuple[str, ...]:
    """A lowercase DNS name of RFC 1123."""
    out = [_at_most(MAX_SUBDOMAIN)] if len(text) > MAX_SUBDOMAIN else []
    if not _is_subdomain(text):
        out.append(_SUBDOMAIN_TEXT)
    return tuple(out)


def _is_subdomain(text: str) -> bool:
    return all(map(_is_label, text.split(".")))


@lru_cache(REMEMBERED)
def dns_label(text: str) -> tuple[str, ...]:
    """One label of RFC 1123."""
    out = [_at_most(MAX_LABEL)] if len(text) > MAX_LABEL else []
    if not _is_label(text):
        out.append("must not contain dots" if _is_subdomain(text) else _LABEL_TEXT)
    return tuple(out)


@lru_cache(REMEMBERED)
def qualified_name(text: str) -> tuple[str, ...]:
    """A name with or without a domain before it: example.com/name."""
    parts = text.split("/")
    if len(parts) > 2:
        return (
            f"a valid label key {_NAME_PART_TEXT} with an optional DNS subdomain prefix and '/'"
            " (e.g. 'example.com/MyName')",
        )
    name = parts[-1]
    out = []
    if len(parts) == 2:
        problems = subdomain(parts[0]) if parts[0] else ("must be non-empty",)
        out += [f"prefix part {problem}" for problem in problems]
    if not name:
        out.append("name part must be non-empty")
    elif len(name) > MAX_LABEL:
        out.append(f"name part must be no more than {MAX_LABEL} bytes")
    if not _is_name_part(name):
        out.append(f"name part {_NAME_PART_TEXT}")
    return tuple(out)


@lru_cache(REMEMBERED)
def label_value(text: str) -> tuple[str, ...]:
    """The value of a label: may be empty."""
    out = []
    if len(text) > MAX_LABEL_VALUE:
        out.append(f"must be no more than {MAX_LABEL_VALUE} bytes")
    if text and not _is_name_part(text):
        out.append(_LABEL_VALUE_TEXT)
    return tuple(out)


@lru_cache(REMEMBERED)
def config_key(text: str) -> tuple[str, ...]:
    """A key of a ConfigMap or Secret: could be the name of a file."""
    out = [_at_most(MAX_SUBDOMAIN)] if len(text) > MAX_SUBDOMAIN else []
    if not _is_config_key(text):
        out.append(_CONFIG_KEY_TEXT)
    if text in (".", ".."):
        out.append(f"must not be '{text}'")
    elif text.startswith(".."):
        out.append("must not start with '..'")
    return tuple(out)


@lru_cache(REMEMBERED)
def port_name(text: str) -> tuple[str, ...]:
    """A port's name by RFC 6335: up to 15 letters, digits and hyphens."""
    out = [_at_most(15)] if len(text) > 15 else []
    if not re.fullmatch("[-a-z0-9]+", text, re.ASCII):
        out.append("must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)")
    if not re.search("[a-z]", text):
        out.append("must contain at least one letter (a-z)")
    if "--" in text:
        out.append("must not contain consecutive hyphens")
    if text and "-" in (text[0], text[-1]):
        out.append("must not begin or end with a hyphen")
    return tuple(out)


def port_number(value: Any) -> tuple[str, ...]:
    return () if 1 <= value <= 65535 else ("must be between 1 and 65535, inclusive",)


def percent(text: str) -> tuple[str, ...]:
    return () if _is_percent(text) else (_PERCENT_TEXT,)


def env_name(text: str) -> tuple[str, ...]:
    """The name of an environment variable (relaxed, as since 1.34)."""
    if not text:
        return ("environment variable name must be non-empty",)
    good = text.isascii() and text.isprintable() and "=" not in text
    return () if good else (_ENV_TEXT,)


def masked(base: str) -> str:
    """Return a generateName as it is checked: a hyphen may end it, as letters follow."""
    return f"{base[:-2]}a" if len(base) > 1 and base.endswith("-") else base


# --- groups of fields -------------------------------------------------------------------------


def label_map(field: str, value: Mapping[str, Any] | None) -> Causes:
    out: Causes = []
    for key, text in (value or {}).items():
        problems = qualified_name(key)
        if problems:
            out += each(field, key, problems)
        problems = label_value(text or "")
        if problems:
            out += each(field, text, problems)
    return out


def annotation_map(field: str, value: Mapping[str, Any] | None) -> Causes:
    if not value:
        return []
    out: Causes = []
    total = 0
    for key, text in value.items():
        problems = qualified_name(key.lower())
        if problems:
            out += each(field, key, problems)
        total += len(key.encode()) + len((text or "").encode())
    if total > MAX_ANNOTATIONS:
        out.append(too_long(field, MAX_ANNOTATIONS))
    return out


_OPERATORS_WITH_VALUES = ("In", "NotIn")
_OPERATORS_WITHOUT = ("Exists", "DoesNotExist")


def label_selector(field: str, value: Mapping[str, Any] | None) -> Causes:
    out = label_map(f"{field}.matchLabels", (value or {}).get("matchLabels"))
    for i, one in enumerate((value or {}).get("matchExpressions") or ()):
        at = f"{field}.matchExpressions[{i}]"
        operator, values = one.get("operator") or "", one.get("values") or ()
        if operator in _OPERATORS_WITH_VALUES:
            if not values:
                text = "must be specified when `operator` is 'In' or 'NotIn'"
                out.append(required(f"{at}.values", text))
        elif operator in _OPERATORS_WITHOUT:
            if values:
                text = "may not be specified when `operator` is 'Exists' or 'DoesNotExist'"
                out.append(forbidden(f"{at}.values", text))
        else:
            out.append(invalid(f"{at}.operator", operator, "not a valid selector operator"))
        key = one.get("key") or ""
        out += each(f"{at}.key", key, qualified_name(key))
        for j, text in enumerate(values):
            out += each(f"{at}.values[{j}]", text, label_value(text))
    return out


def selects(selector: Mapping[str, Any] | None, found: Mapping[str, str]) -> bool:
    """Whether a well-formed label selector chooses something with these labels."""
    selector = selector or {}
    for key, text in (selector.get("matchLabels") or {}).items():
        if found.get(key) != text:
            return False
    for one in selector.get("matchExpressions") or ():
        key, operator, values = one.get("key"), one.get("operator"), one.get("values") or ()
        if not {
            "In": key in found and found.get(key) in values,
            "NotIn": found.get(key) not in values if key in found else True,
            "Exists": key in found,
            "DoesNotExist": key not in found,
        }.get(operator, False):
            return False
    return True


def app_protocol(field: str, value: str | None) -> Causes:
    return [] if value is None else each(field, value, qualified_name(value))


def port_or_name(field: str, value: object) -> Causes:
    """A port by number, or by the name it has in a container."""
    if isinstance(value, str):
        return each(field, value, port_name(value))
    return each(field, value, port_number(value or 0))


def count_or_percent(field: str, value: object) -> Causes:
    if isinstance(value, str):
        return each(field, value, percent(value))
    return not_negative(field, value)


def not_over_all(field: str, value: object) -> Causes:
    """Refuse more than 100%."""
    if isinstance(value, str) and not percent(value) and int(value[:-1][:9]) > 100:
        return [invalid(field, value, "must not be greater than 100%")]
    return []


def is_zero(value: object) -> bool:
    """True for 0 and for 0%."""
    if isinstance(value, str):
        return not percent(value) and not value[:-1].strip("0")
    return not value


# --- addresses ------------------------------------------------------------------------------------

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
_BAD_ADDRESS = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"
_BAD_RANGE = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)"


@lru_cache(REMEMBERED)
def parse_sloppy(text: str) -> Address | None:
    """Return the address that old clients mean: leading zeros are ignored, and an IPv6 address
    that stands for an IPv4 one is that."""
    if ":" not in text:
        parts = text.split(".")
        if not all(p.isascii() and p.isdigit() and len(p) < 12 for p in parts):
            return None
        text = ".".join(str(int(p)) for p in parts)
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(found, ipaddress.IPv6Address):
        if found.scope_id is not None:
            return None
        return found.ipv4_mapped or found
    return found


@lru_cache(REMEMBERED)
def address(text: str) -> tuple[str, ...]:
    """An address of a field that is as old as the API: any spelling but the ambiguous ones."""
    if parse_sloppy(text) is None:
        return (_BAD_ADDRESS,)
    if ":" in text:
        mapped = ipaddress.IPv6Address(text).ipv4_mapped is not None
        return ("must not be an IPv4-mapped IPv6 address",) if mapped else ()
    return ("must not have leading 0s",) if _has_leading_zeros(text) else ()


def _has_leading_zeros(text: str) -> bool:
    return any(len(part) > 1 and part[0] == "0" for part in text.split("."))


@lru_cache(REMEMBERED)
def special_address(text: str) -> tuple[str, ...]:
    """What speaks against an address as one that traffic goes to."""
    found = parse_sloppy(text)
    if found is None:
        return ("must be a valid IP address",)
    out = []
    if found.is_unspecified:
        out.append(f"may not be unspecified ({text})")
    if found.is_loopback:
        out.append("may not be in the loopback range (127.0.0.0/8, ::1/128)")
    if found.is_link_local:
        out.append("may not be in the link-local range (169.254.0.0/16, fe80::/10)")
    if _is_link_local_multicast(found):
        out.append("may not be in the link-local multicast range (224.0.0.0/24, ff02::/10)")
    return tuple(out)


def _is_link_local_multicast(found: Address) -> bool:
    if isinstance(found, ipaddress.IPv4Address):
        return found.packed[:3] == b"\xe0\x00\x00"
    return found.packed[0] == 0xFF and found.packed[1] & 0x0F == 2


@lru_cache(REMEMBERED)
def cidr(text: str) -> tuple[str, ...]:
    """A range of addresses, in any spelling but the ambiguous ones."""
    start, slash, length = text.partition("/")
    found = parse_sloppy(start)
    if not slash or found is None or not (length.isascii() and length.isdigit()):
        return (_BAD_RANGE,)
    mapped = ":" in start and found.version == 4
    if len(length) > 4 or int(length) > (128 if mapped else found.max_prefixlen):
        return (_BAD_RANGE,)
    if (len(length) > 1 and length[0] == "0") or (":" not in start and _has_leading_zeros(start)):
        return ("must not have leading 0s in IP or prefix length",)
    if mapped:
        return ("must not have an IPv4-mapped IPv6 address",)
    if int(found) & ((1 << (found.max_prefixlen - int(length))) - 1):
        return ("must not have bits set beyond the prefix length",)
    return ()


def address_warnings(field: str, text: str) -> Iterator[str]:
    """Yield what is said of an address in an unusual spelling."""
    found = parse_sloppy(text)
    if found is None:
        return
    if address(text):
        yield f'{field}: non-standard IP address "{text}" is invalid: use "{found}"'
    elif ":" in text and str(found) != text:
        yield (f'{field}: IPv6 address "{text}" should be in RFC 5952 canonical format ("{found}")')


def cidr_warnings(field: str, text: str) -> Iterator[str]:
    """Yield what is said of a range in an unusual spelling."""
    start, _, length = text.partition("/")
    found = parse_sloppy(start)
    if found is None or not length.isdigit() or int(length[:4]) > found.max_prefixlen:
        return
    meant = ipaddress.ip_network((found, int(length)), strict=False)
    problems = cidr(text)
    if meant.network_address != found:
        yield (
            f'{field}: CIDR value "{text}" is ambiguous in this context (should be "{meant}" or'
            f' "{found}/{found.max_prefixlen}"?)'
        )
    if any("0s" in problem or "mapped" in problem for problem in problems):
        yield f'{field}: non-standard CIDR value "{text}" is invalid: use "{meant}"'
    elif not problems and ":" in text and str(meant) != text:
        yield (
            f'{field}: IPv6 CIDR value "{text}" should be in RFC 5952 canonical format ("{meant}")'
        )
