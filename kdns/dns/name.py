"""Domain names in wire form: labels with their lengths, ending in the root label.

Inside kdns a name is `bytes` in uncompressed wire form (RFC 1035 s3.1), with the
case it was typed in. Its lower-cased twin is the key: length octets are at most
63, so `bytes.lower()`, which touches 65-90 only, is safe on the whole. Text is
for people and for configuration; it is parsed and rendered here and nowhere else.
"""

from __future__ import annotations

from kdns.errors import KdnsError

ROOT = b"\x00"
MAX_NAME = 255  # RFC 1035 s3.1
MAX_LABEL = 63  # RFC 1035 s2.3.4


class BadName(KdnsError):
    """A text that is not a domain name; the message says why."""


def parse_name(text: str, origin: bytes = ROOT) -> bytes:
    """Return the wire form of `text` (RFC 1035 s5.1 escapes); a name without a
    final dot is taken relative to `origin`.

    Raises BadName for an empty label, a label over 63 or a name over 255 octets.
    """
    if text in (".", ""):
        return ROOT if text == "." else origin
    if text == "@":
        return origin
    if "\\" not in text and text.isascii():
        absolute = text.endswith(".")
        labels = [part.encode() for part in (text[:-1] if absolute else text).split(".")]
    else:
        labels, absolute = _split_escaped(text)
    return _join(labels, ROOT if absolute else origin, text)


def _join(labels: list[bytes], origin: bytes, text: str) -> bytes:
    out = bytearray()
    for label in labels:
        if not label:
            raise BadName(f"{text!r} has an empty label")
        if len(label) > MAX_LABEL:
            raise BadName(f"{text!r} has a label of {len(label)} octets; at most 63 are allowed")
        out.append(len(label))
        out += label
    out += origin
    if len(out) > MAX_NAME:
        raise BadName(f"{text[:40]!r}... is {len(out)} octets long; at most 255 are allowed")
    return bytes(out)


def _split_escaped(text: str) -> tuple[list[bytes], bool]:
    labels: list[bytes] = []
    label = bytearray()
    i, n = 0, len(text)
    while i < n:
        char = text[i]
        if char == "\\":
            digits = text[i + 1 : i + 4]
            if len(digits) == 3 and digits.isdecimal() and digits.isascii() and int(digits) < 256:
                label.append(int(digits))
                i += 4
                continue
            if i + 1 >= n:
                raise BadName(f"{text!r} ends in a backslash")
            label += text[i + 1].encode()
            i += 2
            continue
        if char == ".":
            labels.append(bytes(label))
            label = bytearray()
        else:
            label += char.encode()
        i += 1
    absolute = not label
    if label:
        labels.append(bytes(label))
    return labels, absolute


# Octets written behind a backslash, as miekg/dns does; so logs, templates and regular
# expressions see a name as CoreDNS shows it. Others outside of 21-7E hex are \DDD.
_ESCAPED = frozenset(b". '@;()\"\\")
_PLAIN = frozenset(range(0x21, 0x7F)) - _ESCAPED


def render_name(wire: bytes) -> str:
    """Return the text of a wire name, with a final dot and RFC 4343 escapes."""
    if len(wire) <= 1:
        return "."
    parts: list[str] = []
    i = 0
    while (size := wire[i]) != 0:
        label = wire[i + 1 : i + 1 + size]
        if _PLAIN.issuperset(label):
            parts.append(label.decode("ascii"))
        else:
            parts.append(_escape(label))
        i += size + 1
    return ".".join(parts) + "."


def _escape(label: bytes) -> str:
    out = []
    for octet in label:
        if octet in _PLAIN:
            out.append(chr(octet))
        elif octet in _ESCAPED:
            out.append("\\" + chr(octet))
        else:
            out.append(f"\\{octet:03d}")
    return "".join(out)


def labels_of(wire: bytes) -> list[bytes]:
    """Return the labels of a wire name from left to right, without the root."""
    out = []
    i = 0
    while (size := wire[i]) != 0:
        out.append(wire[i + 1 : i + 1 + size])
        i += size + 1
    return out


def name_of(labels: list[bytes]) -> bytes:
    """Return the wire name of `labels`, which must be valid already."""
    return b"".join([bytes((len(label),)) + label for label in labels]) + ROOT


def is_subdomain(key: bytes, zone: bytes) -> bool:
    """True if `key` is `zone` or below it. Both lower-cased wire names."""
    if not key.endswith(zone):
        return False
    at = len(key) - len(zone)
    i = 0
    while i < at:
        i += key[i] + 1
    return i == at


def parent(wire: bytes) -> bytes:
    """Return the name one label up; the root's parent is the root."""
    return wire[wire[0] + 1 :] if wire[0] else wire


def ancestors(wire: bytes) -> list[bytes]:
    """Return `wire`, its parent, ... down to the root, longest first."""
    out = [wire]
    i = 0
    while (size := wire[i]) != 0:
        i += size + 1
        out.append(wire[i:])
    return out
