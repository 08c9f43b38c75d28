"""Records as text, as in zone files and as dig prints them, and back (RFC 1035 s5, 3597 s5).

Decides how each type's rdata is written; which records belong together and what a zone file
may hold is zone/zonefile.py's business. One table, `_LAYOUT`, says the fields of each type;
a type that is not in it is written `\\# length hex`. dnslib's rdata classes are not used:
they send names through IDNA, drop escapes and quotes, round LOC and leak a dozen exception
types, and what they do get right (DS, DNSKEY, SSHFP, TLSA) is one row of the table each.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from ipaddress import IPv4Address, IPv6Address
from struct import Struct

from kdns.dns import types as t
from kdns.dns.message import RR
from kdns.dns.name import MAX_NAME, ROOT, BadName, parse_name, render_name
from kdns.errors import KdnsError

MAX_RDATA = 65535
MAX_TTL = (1 << 31) - 1  # RFC 2181 s8
MAX_STRING = 255  # RFC 1035 s3.3

_U16 = Struct("!H")
_U32 = Struct("!I")


class BadText(KdnsError):
    """A text that is not the record it should be; the message says what is wrong."""


class _BadWire(Exception):
    """Rdata that does not have its type's layout; it is then written in hex."""


# --- words --------------------------------------------------------------------------------

# A quoted string, or an atom, which may hold a quoted string after "=" (SvcParams).
_QUOTED = r'"(?:[^"\\]|\\.)*"'
WORD = re.compile(rf'{_QUOTED}|(?:[^\s;()"\\]|\\.|(?<==){_QUOTED})+', re.DOTALL)
_GAP = re.compile(r"[\s()]*(?:;[^\n]*[\s()]*)*")


def split_words(text: str) -> list[str]:
    """Return the words of one record's text; quotes and escapes stay as they are.

    Comments and parentheses are dropped. Raises BadText for a quote without its partner.
    """
    words: list[str] = []
    at = 0
    while True:
        at = _GAP.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing too
        if at == len(text):
            return words
        match = WORD.match(text, at)
        if match is None:
            raise BadText(
                "a quote is not closed" if text[at] == '"' else "a backslash ends the text"
            )
        words.append(match[0])
        at = match.end()


class _Words:
    """The words of one record's rdata, taken one after another."""

    __slots__ = ("at", "origin", "type", "words")

    def __init__(self, type: int, words: Sequence[str], origin: bytes) -> None:
        self.type = type
        self.words = words
        self.origin = origin
        self.at = 0

    def take(self, what: str) -> str:
        if self.at >= len(self.words):
            raise BadText(f"{t.type_name(self.type)} record: {what} is missing")
        self.at += 1
        return self.words[self.at - 1]

    def rest(self) -> Sequence[str]:
        rest = self.words[self.at :]
        self.at = len(self.words)
        return rest

    def wrong(self, word: str, what: str) -> BadText:
        return BadText(f"{t.type_name(self.type)} record: '{word}' is not {what}")


_ESCAPE = re.compile(rb"\\(\d\d\d|[^\d])", re.DOTALL)


def parse_string(word: str) -> bytes:
    """Return the octets of a character-string, quoted or not (RFC 1035 s5.1 escapes)."""
    if len(word) > 1 and word[0] == '"':
        word = word[1:-1]
    try:
        raw = word.encode("utf-8", "surrogateescape")  # octets of a file that were not UTF-8
    except UnicodeEncodeError:
        raise BadText(f"{word!r} holds half a character") from None
    if b"\\" not in raw:
        return raw
    if b"\\" in _ESCAPE.sub(b"", raw):
        raise BadText(f"{word!r}: a backslash takes three digits or one other character")
    out = bytearray()
    at = 0
    for match in _ESCAPE.finditer(raw):
        out += raw[at : match.start()]
        code = match[1]
        if len(code) == 3:
            if int(code) > 255:
                raise BadText(f"'\\{code.decode()}' is not an octet; \\000 to \\255 are")
            out.append(int(code))
        else:
            out += code
        at = match.end()
    return bytes(out + raw[at:])


def render_string(octets: bytes) -> str:
    """Return a character-string in quotes, printable whatever it holds."""
    if octets.isascii():
        text = octets.decode("ascii")
        if text.isprintable() and '"' not in text and "\\" not in text:
            return f'"{text}"'
    return f'"{_escape(octets)}"'


def _escape(octets: bytes) -> str:
    return "".join(
        f"\\{chr(o)}" if o in b'"\\' else chr(o) if 0x20 <= o < 0x7F else f"\\{o:03d}"
        for o in octets
    )


_TTL_PART = re.compile(r"(\d+)([smhdw]?)", re.IGNORECASE)
_TTL_UNIT = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def parse_ttl(text: str) -> int | None:
    """Return seconds of "3600" or "1h30m" (as BIND writes them); None if it is neither or
    is over 2^31-1 (RFC 2181 s8)."""
    if not text.isascii() or len(text) > 40:
        return None
    if text.isdecimal():
        total = int(text)
    else:
        total = at = 0
        for match in _TTL_PART.finditer(text):
            if match.start() != at or not match[2]:
                return None
            total += int(match[1]) * _TTL_UNIT[match[2].lower()]
            at = match.end()
        if not at or at != len(text):
            return None
    return total if total <= MAX_TTL else None


# --- fields: how to read one, how to write one ---------------------------------------------

_Parse = Callable[[_Words], bytes]
_Render = Callable[[bytes, int], tuple[str, int]]


def _piece(rdata: bytes, at: int, size: int) -> bytes:
    piece = rdata[at : at + size]
    if len(piece) != size:
        raise _BadWire
    return piece


def _parse_number(words: _Words, size: int, what: str) -> bytes:
    word = words.take(what)
    if word.isascii() and word.isdecimal() and len(word) <= 10:
        number = int(word)
        if number < 1 << 8 * size:
            return number.to_bytes(size, "big")
    raise words.wrong(word, f"a number from 0 to {(1 << 8 * size) - 1} ({what})")


def _render_number(rdata: bytes, at: int, size: int) -> tuple[str, int]:
    return str(int.from_bytes(_piece(rdata, at, size), "big")), at + size


def _number(size: int, what: str) -> tuple[_Parse, _Render]:
    return partial(_parse_number, size=size, what=what), partial(_render_number, size=size)


def _parse_period(words: _Words, what: str) -> bytes:
    word = words.take(what)
    seconds = parse_ttl(word)
    if seconds is None and word.isascii() and word.isdecimal() and int(word) < 1 << 32:
        seconds = int(word)
    if seconds is None:
        raise words.wrong(word, f"a time such as 3600 or 1h ({what})")
    return _U32.pack(seconds)


def _period(what: str) -> tuple[_Parse, _Render]:
    return partial(_parse_period, what=what), partial(_render_number, size=4)


def _parse_owner(words: _Words, what: str) -> bytes:
    word = words.take(what)
    try:
        return parse_name(word, words.origin)
    except (BadName, UnicodeEncodeError) as e:
        raise BadText(f"{t.type_name(words.type)} record: {what}: {e}") from None


def _render_owner(rdata: bytes, at: int) -> tuple[str, int]:
    end = at
    while True:
        size = _piece(rdata, end, 1)[0]
        if size > 63 or end - at >= MAX_NAME:
            raise _BadWire
        end += size + 1
        if not size:
            break
    if end > len(rdata) or end - at > MAX_NAME:
        raise _BadWire
    return render_name(rdata[at:end]), end


def _name(what: str) -> tuple[_Parse, _Render]:
    return partial(_parse_owner, what=what), _render_owner


def _parse_ipv4(words: _Words) -> bytes:
    word = words.take("the address")
    try:
        return IPv4Address(word).packed
    except ValueError:
        raise words.wrong(word, "an IPv4 address") from None


def _parse_ipv6(words: _Words) -> bytes:
    word = words.take("the address")
    try:
        if "%" not in word:
            return IPv6Address(word).packed
    except ValueError:
        pass
    raise words.wrong(word, "an IPv6 address")


def _render_ipv4(rdata: bytes, at: int) -> tuple[str, int]:
    return str(IPv4Address(_piece(rdata, at, 4))), at + 4


def _render_ipv6(rdata: bytes, at: int) -> tuple[str, int]:
    return _ipv6(_piece(rdata, at, 16)), at + 16


def _ipv6(octets: bytes) -> str:
    if octets[:12] == b"\0" * 10 + b"\xff\xff":  # RFC 5952 s5; ipaddress does so from 3.13 on
        return f"::ffff:{IPv4Address(octets[12:])}"
    return str(IPv6Address(octets))


def _sized(octets: bytes, words: _Words, what: str) -> bytes:
    if len(octets) > MAX_STRING:
        raise BadText(
            f"{t.type_name(words.type)} record: {what} has {len(octets)} octets;"
            " at most 255 are allowed, write several strings"
        )
    return bytes((len(octets),)) + octets


def _parse_one_string(words: _Words, what: str) -> bytes:
    return _sized(parse_string(words.take(what)), words, what)


def _render_one_string(rdata: bytes, at: int) -> tuple[str, int]:
    size = _piece(rdata, at, 1)[0]
    return render_string(_piece(rdata, at + 1, size)), at + 1 + size


def _string(what: str) -> tuple[_Parse, _Render]:
    return partial(_parse_one_string, what=what), _render_one_string


def _parse_strings(words: _Words) -> bytes:
    first = words.take("the text")
    return b"".join(
        [_sized(parse_string(word), words, "a string") for word in (first, *words.rest())]
    )


def _render_strings(rdata: bytes, at: int) -> tuple[str, int]:
    texts: list[str] = []
    while at < len(rdata) or not texts:
        text, at = _render_one_string(rdata, at)
        texts.append(text)
    return " ".join(texts), at


def _parse_hex(words: _Words, what: str) -> bytes:
    text = words.take(what) + "".join(words.rest())
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise words.wrong(text[:20], f"hexadecimal ({what})") from None


def _render_hex(rdata: bytes, at: int) -> tuple[str, int]:
    if at >= len(rdata):
        raise _BadWire
    return rdata[at:].hex().upper(), len(rdata)


def _hex(what: str) -> tuple[_Parse, _Render]:
    return partial(_parse_hex, what=what), _render_hex


def _parse_base64(words: _Words, what: str) -> bytes:
    text = words.take(what) + "".join(words.rest())
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise words.wrong(text[:20], f"base64 ({what})") from None


def _render_base64(rdata: bytes, at: int) -> tuple[str, int]:
    if at >= len(rdata):
        raise _BadWire
    return base64.b64encode(rdata[at:]).decode("ascii"), len(rdata)


def _base64(what: str) -> tuple[_Parse, _Render]:
    return partial(_parse_base64, what=what), _render_base64


def _type_of(words: _Words, word: str) -> int:
    number = t.type_number(word)
    if number is None:
        raise words.wrong(word, "a record type")
    return number


def _parse_type(words: _Words) -> bytes:
    return _U16.pack(_type_of(words, words.take("the covered type")))


def _render_type(rdata: bytes, at: int) -> tuple[str, int]:
    return t.type_name(_U16.unpack(_piece(rdata, at, 2))[0]), at + 2


def _parse_types(words: _Words) -> bytes:
    """RFC 4034 s4.1.2: windows of up to 32 octets, one bit a type."""
    windows: dict[int, bytearray] = {}
    for word in words.rest():
        high, low = divmod(_type_of(words, word), 256)
        window = windows.setdefault(high, bytearray(32))
        window[low >> 3] |= 0x80 >> (low & 7)
    out = bytearray()
    for high, window in sorted(windows.items()):
        used = window.rstrip(b"\x00")
        out += bytes((high, len(used))) + used
    return bytes(out)


def _render_types(rdata: bytes, at: int) -> tuple[str, int]:
    names: list[str] = []
    last = -1
    while at < len(rdata):
        high, size = _piece(rdata, at, 2)
        window = _piece(rdata, at + 2, size)
        if high <= last or not 1 <= size <= 32 or not window[-1]:
            raise _BadWire
        last = high
        names += [
            t.type_name(high * 256 + bit)
            for bit in range(size * 8)
            if window[bit >> 3] & 0x80 >> (bit & 7)
        ]
        at += 2 + size
    return " ".join(names), at


def _parse_moment(words: _Words, what: str) -> bytes:
    """RFC 4034 s3.2: YYYYMMDDHHmmSS, or seconds since 1970."""
    word = words.take(what)
    if word.isascii() and word.isdecimal():
        if len(word) <= 10 and int(word) < 1 << 32:
            return _U32.pack(int(word))
        try:
            moment = datetime.strptime(word, "%Y%m%d%H%M%S").replace(tzinfo=UTC)
        except ValueError:
            pass
        else:
            if len(word) == 14:
                return _U32.pack(int(moment.timestamp()) & 0xFFFFFFFF)
    raise words.wrong(word, f"a time such as 20261231235959 ({what})")


def _render_moment(rdata: bytes, at: int) -> tuple[str, int]:
    seconds = _U32.unpack(_piece(rdata, at, 4))[0]
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y%m%d%H%M%S"), at + 4


def _moment(what: str) -> tuple[_Parse, _Render]:
    return partial(_parse_moment, what=what), _render_moment


def _parse_tag(words: _Words) -> bytes:
    """RFC 8659 s4.1: the tag of a CAA record is ASCII letters and digits."""
    word = words.take("the tag")
    if not (word.isascii() and word.isalnum() and len(word) <= MAX_STRING):
        raise words.wrong(word, "a tag of letters and digits")
    return bytes((len(word),)) + word.encode("ascii")


def _render_tag(rdata: bytes, at: int) -> tuple[str, int]:
    size = _piece(rdata, at, 1)[0]
    tag = _piece(rdata, at + 1, size)
    if not tag.isalnum():
        raise _BadWire
    return tag.decode("ascii"), at + 1 + size


def _parse_tail(words: _Words) -> bytes:
    return parse_string(words.take("the value"))


def _render_tail(rdata: bytes, at: int) -> tuple[str, int]:
    return render_string(rdata[at:]), len(rdata)


def _parse_salt(words: _Words) -> bytes:
    word = words.take("the salt")
    try:
        return _sized(b"" if word == "-" else bytes.fromhex(word), words, "the salt")
    except ValueError:
        raise words.wrong(word, "a salt in hexadecimal, or - for none") from None


def _render_salt(rdata: bytes, at: int) -> tuple[str, int]:
    size = _piece(rdata, at, 1)[0]
    return _piece(rdata, at + 1, size).hex().upper() or "-", at + 1 + size


def _parse_hash(words: _Words) -> bytes:
    word = words.take("the next hashed owner name")
    try:
        hashed = base64.b32hexdecode(word.upper() + "=" * (-len(word) % 8))
    except (binascii.Error, ValueError):
        raise words.wrong(word, "base32hex") from None
    return _sized(hashed, words, "the hash")


def _render_hash(rdata: bytes, at: int) -> tuple[str, int]:
    size = _piece(rdata, at, 1)[0]
    text = base64.b32hexencode(_piece(rdata, at + 1, size)).decode("ascii").rstrip("=")
    if not text:
        raise _BadWire
    return text, at + 1 + size


# --- SVCB and HTTPS (RFC 9460) --------------------------------------------------------------

_SVC_KEYS = {
    "mandatory": 0, "alpn": 1, "no-default-alpn": 2, "port": 3, "ipv4hint": 4, "ech": 5,
    "ipv6hint": 6, "dohpath": 7, "ohttp": 8,
}  # fmt: skip
_SVC_NAMES = {number: name for name, number in _SVC_KEYS.items()}
_SVC_EMPTY = frozenset((2, 8))


def _svc_key(words: _Words, word: str) -> int:
    number = _SVC_KEYS.get(word)
    if number is not None:
        return number
    if word.startswith("key") and word[3:].isascii() and word[3:].isdecimal():
        number = int(word[3:])
        if number < 65536:
            return number
    raise words.wrong(word, "a service parameter")


def _split_list(value: bytes) -> list[bytes]:
    """RFC 9460 A.1: a comma-separated list; backslash protects a comma or a backslash."""
    items, item, escaped = [], bytearray(), False
    for octet in value:
        if escaped or octet not in b",\\":
            item.append(octet)
            escaped = False
        elif octet == 0x5C:
            escaped = True
        else:
            items.append(bytes(item))
            item = bytearray()
    items.append(bytes(item))
    return items


def _parse_svc_value(words: _Words, key: int, word: str) -> bytes:
    value = parse_string(word)
    if key in _SVC_EMPTY:
        if value:
            raise words.wrong(word, f"allowed: {_SVC_NAMES[key]} takes no value")
        return b""
    if not value and key < 8:
        raise BadText(f"{t.type_name(words.type)} record: {_SVC_NAMES[key]} needs a value")
    try:
        match key:
            case 0:
                keys = sorted(_svc_key(words, item.decode()) for item in _split_list(value))
                return b"".join([_U16.pack(k) for k in keys])
            case 1:
                items = _split_list(value)
                if not all(items):
                    raise ValueError
                return b"".join([_sized(item, words, "an ALPN") for item in items])
            case 3:
                if not value.isdigit() or len(value) > 5:
                    raise ValueError
                return int(value).to_bytes(2, "big")
            case 4:
                return b"".join([IPv4Address(v.decode()).packed for v in _split_list(value)])
            case 5:
                return base64.b64decode(value, validate=True)
            case 6:
                return b"".join([IPv6Address(v.decode()).packed for v in _split_list(value)])
    except (ValueError, OverflowError):
        raise words.wrong(word, f"a value of {_SVC_NAMES[key]}") from None
    return value


def _parse_svc(words: _Words) -> bytes:
    found: dict[int, bytes] = {}
    for word in words.rest():
        name, _, value = word.partition("=")
        key = _svc_key(words, name)
        if key in found:
            raise BadText(f"{t.type_name(words.type)} record: '{name}' is given twice")
        found[key] = _parse_svc_value(words, key, value)
    missing = [
        key for key in _chunks(found.get(0, b""), 2) if int.from_bytes(key, "big") not in found
    ]
    if missing:
        raise BadText(f"{t.type_name(words.type)} record: a mandatory parameter is not given")
    # RFC 9460 s2.2: in ascending order of key.
    return b"".join(
        [_U16.pack(k) + _U16.pack(len(value)) + value for k, value in sorted(found.items())]
    )


def _chunks(octets: bytes, size: int) -> list[bytes]:
    if len(octets) % size:
        raise _BadWire
    return [octets[i : i + size] for i in range(0, len(octets), size)]


def _render_svc_value(key: int, value: bytes) -> str:
    match key:
        case 0:
            keys = [_U16.unpack(k)[0] for k in _chunks(value, 2)]
            return ",".join([_SVC_NAMES.get(k) or f"key{k}" for k in keys])
        case 1:
            items, at = [], 0
            while at < len(value):
                size = value[at]
                item = _piece(value, at + 1, size)
                items.append(item.replace(b"\\", b"\\\\").replace(b",", b"\\,"))
                at += 1 + size
            if not all(items):
                raise _BadWire
            return render_string(b",".join(items))
        case 3:
            return str(_U16.unpack(_piece(value, 0, 2))[0])
        case 4:
            return ",".join([str(IPv4Address(a)) for a in _chunks(value, 4)])
        case 5:
            return base64.b64encode(value).decode("ascii")
        case 6:
            return ",".join([_ipv6(a) for a in _chunks(value, 16)])
    return render_string(value)


def _render_svc(rdata: bytes, at: int) -> tuple[str, int]:
    texts: list[str] = []
    last = -1
    while at < len(rdata):
        key, size = _U16.unpack(_piece(rdata, at, 2))[0], _U16.unpack(_piece(rdata, at + 2, 2))[0]
        value = _piece(rdata, at + 4, size)
        if key <= last or (key in _SVC_EMPTY and value) or (key == 3 and size != 2):
            raise _BadWire
        last = key
        name = _SVC_NAMES.get(key) or f"key{key}"
        if not value and key < 8 and key not in _SVC_EMPTY:
            raise _BadWire
        texts.append(f"{name}={_render_svc_value(key, value)}" if value else name)
        at += 4 + size
    return " ".join(texts), at


# --- LOC (RFC 1876) -------------------------------------------------------------------------

_EQUATOR = 1 << 31  # s2: in thousandths of a second of arc
_SEA = 10_000_000  # s2: altitude counts centimetres from 100 km below
_DEGREE = 3_600_000


def _thousandths(words: _Words, word: str, digits: int, limit: int, what: str) -> int:
    """Return a decimal with at most `digits` behind the point as an integer of that unit."""
    whole, _, part = word.partition(".")
    if (
        whole.isascii() and whole.isdecimal() and len(whole) <= 10 and len(part) <= digits
        and (not part or (part.isascii() and part.isdecimal()))
    ):  # fmt: skip
        number = int(whole + part.ljust(digits, "0"))
        if number <= limit:
            return number
    raise words.wrong(word, what)


def _parse_angle(words: _Words, plus: str, minus: str, most: int) -> int:
    total, unit, digits = 0, _DEGREE, 0
    for what in ("degrees", "minutes", "seconds", f"{plus} or {minus}"):
        word = words.take(what)
        if word.upper() in (plus, minus) and what != "degrees":
            if total > most * _DEGREE:
                raise BadText(f"LOC record: more than {most} degrees")
            return _EQUATOR + (total if word.upper() == plus else -total)
        if unit == 0:
            break
        digits = 3 if what == "seconds" else 0
        limit = most if what == "degrees" else 59_999 if digits else 59
        total += _thousandths(words, word, digits, limit, what) * (1 if digits else unit)
        unit = {_DEGREE: 60_000, 60_000: 1_000}.get(unit, 0)
    raise words.wrong(word, f"{plus} or {minus}")


def _metres(words: _Words, word: str, limit: int) -> int:
    """Return centimetres."""
    text = word[:-1] if word[-1:] in "mM" else word
    return _thousandths(words, text, 2, limit, "a distance in metres")


def _parse_loc(words: _Words) -> bytes:
    latitude = _parse_angle(words, "N", "S", 90)
    longitude = _parse_angle(words, "E", "W", 180)
    word = words.take("the altitude")
    if word.startswith("-"):
        altitude = _SEA - _metres(words, word[1:], _SEA)
    else:
        altitude = _SEA + _metres(words, word, 0xFFFFFFFF - _SEA)
    sizes = bytearray()
    for default in (100, 1_000_000, 1_000):
        given = words.at < len(words.words)
        size = _metres(words, words.take("a size"), 9_000_000_000) if given else default
        power = len(str(size)) - 1
        sizes.append((size // 10**power) << 4 | power)
    return b"\x00" + sizes + _U32.pack(latitude) + _U32.pack(longitude) + _U32.pack(altitude)


def _render_angle(value: int, plus: str, minus: str) -> str:
    distance = abs(value - _EQUATOR)
    minutes, part = divmod(distance, 60_000)
    side = plus if value >= _EQUATOR else minus
    return f"{minutes // 60} {minutes % 60} {part // 1000}.{part % 1000:03d} {side}"


def _render_loc(rdata: bytes, at: int) -> tuple[str, int]:
    piece = _piece(rdata, at, 16)
    latitude, longitude, altitude = (_U32.unpack(piece[i : i + 4])[0] for i in (4, 8, 12))
    if (
        piece[0]
        or abs(latitude - _EQUATOR) > 90 * _DEGREE
        or abs(longitude - _EQUATOR) > 180 * _DEGREE
    ):
        raise _BadWire
    texts = [_render_angle(latitude, "N", "S"), _render_angle(longitude, "E", "W")]
    height = altitude - _SEA
    texts.append(f"{'-' if height < 0 else ''}{abs(height) // 100}.{abs(height) % 100:02d}m")
    for octet in piece[1:4]:
        digit, power = octet >> 4, octet & 15
        if digit > 9 or power > 9 or (power and not digit):
            raise _BadWire
        size = digit * 10**power
        texts.append(f"{size // 100}.{size % 100:02d}m" if size % 100 else f"{size // 100}m")
    return " ".join(texts), at + 16


# --- types ----------------------------------------------------------------------------------

_RP, _AFSDB, _X25, _RT, _PX = 17, 18, 19, 21, 26
_LOC, _KX, _SSHFP, _NSEC3PARAM, _TLSA, _SMIMEA, _CDS, _CDNSKEY = 29, 36, 44, 51, 52, 53, 59, 60
_DHCID, _OPENPGPKEY, _CSYNC, _ZONEMD, _SPF, _LP, _URI, _DLV = 49, 61, 62, 63, 99, 107, 256, 32769

_Layout = tuple[tuple[_Parse, _Render], ...]
_TARGET: _Layout = (_name("the target"),)
_RANKED: _Layout = (_number(2, "preference"), _name("the target"))
_DIGEST: _Layout = (
    _number(2, "key tag"), _number(1, "algorithm"), _number(1, "digest type"), _hex("digest"),
)  # fmt: skip
_KEY: _Layout = (
    _number(2, "flags"), _number(1, "protocol"), _number(1, "algorithm"), _base64("key"),
)  # fmt: skip
_CERTIFICATE: _Layout = (
    _number(1, "usage"), _number(1, "selector"), _number(1, "matching type"), _hex("association"),
)  # fmt: skip
_SERVICE: _Layout = (
    _number(2, "priority"), _name("the target"), (_parse_svc, _render_svc),
)  # fmt: skip
_NSEC3_HEAD: _Layout = (
    _number(1, "hash algorithm"), _number(1, "flags"), _number(2, "iterations"),
    (_parse_salt, _render_salt),
)  # fmt: skip
_TYPES: tuple[_Parse, _Render] = (_parse_types, _render_types)
_TEXTS: _Layout = ((_parse_strings, _render_strings),)

_LAYOUT: dict[int, _Layout] = {
    t.A: ((_parse_ipv4, _render_ipv4),),
    t.AAAA: ((_parse_ipv6, _render_ipv6),),
    **dict.fromkeys((t.NS, t.CNAME, t.PTR, t.DNAME), _TARGET),
    t.SOA: (
        _name("the primary server"), _name("the mailbox"), _number(4, "serial"),
        _period("refresh"), _period("retry"), _period("expire"), _period("minimum"),
    ),
    t.HINFO: (_string("the CPU"), _string("the operating system")),
    **dict.fromkeys((t.MX, _AFSDB, _RT, _KX, _LP), _RANKED),
    t.TXT: _TEXTS,
    _SPF: _TEXTS,
    _RP: (_name("the mailbox"), _name("the text's name")),
    _X25: (_string("the address"),),
    _PX: (_number(2, "preference"), _name("the RFC 822 name"), _name("the X.400 name")),
    _LOC: ((_parse_loc, _render_loc),),
    t.SRV: (
        _number(2, "priority"), _number(2, "weight"), _number(2, "port"), _name("the target"),
    ),
    t.NAPTR: (
        _number(2, "order"), _number(2, "preference"), _string("the flags"),
        _string("the services"), _string("the regular expression"), _name("the replacement"),
    ),
    **dict.fromkeys((t.DS, _CDS, _DLV), _DIGEST),
    _SSHFP: (_number(1, "algorithm"), _number(1, "fingerprint type"), _hex("fingerprint")),
    t.RRSIG: (
        (_parse_type, _render_type), _number(1, "algorithm"), _number(1, "labels"),
        _period("original TTL"), _moment("expiration"), _moment("inception"),
        _number(2, "key tag"), _name("the signer"), _base64("signature"),
    ),
    t.NSEC: (_name("the next name"), _TYPES),
    **dict.fromkeys((t.DNSKEY, _CDNSKEY), _KEY),
    _DHCID: (_base64("identifier"),),
    t.NSEC3: (*_NSEC3_HEAD, (_parse_hash, _render_hash), _TYPES),
    _NSEC3PARAM: _NSEC3_HEAD,
    **dict.fromkeys((_TLSA, _SMIMEA), _CERTIFICATE),
    _OPENPGPKEY: (_base64("key"),),
    _CSYNC: (_number(4, "serial"), _number(2, "flags"), _TYPES),
    _ZONEMD: (_number(4, "serial"), _number(1, "scheme"), _number(1, "hash"), _hex("digest")),
    **dict.fromkeys((t.SVCB, t.HTTPS), _SERVICE),
    _URI: (_number(2, "priority"), _number(2, "weight"), (_parse_tail, _render_tail)),
    t.CAA: (_number(1, "flags"), (_parse_tag, _render_tag), (_parse_tail, _render_tail)),
}  # fmt: skip


# --- whole records --------------------------------------------------------------------------


def parse_rdata(type: int, text: str | Sequence[str], origin: bytes = ROOT) -> bytes:
    """Return the wire form of rdata given as text or as its words (see split_words).

    Names without a final dot are relative to `origin`. Raises BadText.
    """
    words = _Words(type, split_words(text) if isinstance(text, str) else text, origin)
    if words.words and words.words[0] == "\\#":
        return _parse_generic(words)
    layout = _LAYOUT.get(type)
    if layout is None:
        raise BadText(
            f"{t.type_name(type)} record: kdns does not know this type's text form;"
            " write \\# LENGTH HEX (RFC 3597)"
        )
    rdata = b"".join([parse(words) for parse, _ in layout])
    if words.at < len(words.words):
        raise BadText(f"{t.type_name(type)} record: unexpected '{words.words[words.at]}'")
    if len(rdata) > MAX_RDATA:
        raise BadText(f"{t.type_name(type)} record: {len(rdata)} octets; at most 65535 fit")
    return rdata


def _parse_generic(words: _Words) -> bytes:
    """RFC 3597 s5."""
    words.take("\\#")
    size = int.from_bytes(_parse_number(words, 2, "length"), "big")
    rdata = _parse_hex(words, "rdata") if size else b""
    if len(rdata) != size:
        raise BadText(
            f"{t.type_name(words.type)} record: \\# says {size} octets, found {len(rdata)}"
        )
    if words.at < len(words.words):
        raise BadText(f"{t.type_name(words.type)} record: unexpected '{words.words[words.at]}'")
    if words.type in _LAYOUT:
        try:
            _render_known(words.type, rdata)
        except _BadWire:
            raise BadText(
                f"{t.type_name(words.type)} record: the octets are not of this type"
            ) from None
    return rdata


def _render_known(type: int, rdata: bytes) -> str:
    texts: list[str] = []
    at = 0
    for _, render in _LAYOUT[type]:
        text, at = render(rdata, at)
        if text:
            texts.append(text)
    if at != len(rdata):
        raise _BadWire
    return " ".join(texts)


def render_rdata(type: int, rdata: bytes) -> str:
    """Return rdata as text; `\\# length hex` if the type is unknown or the octets are not
    of its layout. Never fails."""
    if type in _LAYOUT:
        try:
            return _render_known(type, rdata)
        except _BadWire:
            pass
    return f"\\# {len(rdata)} {rdata.hex().upper()}".rstrip()


def render_rr(rr: RR) -> str:
    """Return `name TTL CLASS TYPE rdata`, the order of dig."""
    return (
        f"{render_name(rr.name)} {rr.ttl} {t.class_name(rr.cls)} {t.type_name(rr.type)}"
        f" {render_rdata(rr.type, rr.rdata)}"
    )


def class_number(word: str) -> int | None:
    """Return the number of a class a record may have, by name or as CLASS32; else None."""
    upper = word.upper()
    if upper in ("IN", "CH", "HS", "CS"):
        return t.CLASSES[upper]
    if upper.startswith("CLASS") and upper[5:].isascii() and upper[5:].isdecimal():
        number = int(upper[5:])
        return number if number < 65536 else None
    return None


def parse_head(words: Sequence[str], at: int) -> tuple[int | None, int | None, int, int]:
    """Read `[TTL] [CLASS] TYPE` in either order (RFC 1035 s5.1) from words[at] on.

    Returns (ttl or None, class or None, type, index of the first rdata word).
    """
    ttl: int | None = None
    cls: int | None = None
    while at < len(words):
        word = words[at]
        at += 1
        if word[0].isdecimal():
            if ttl is not None:
                raise BadText(f"'{word}': there is a TTL already; a record type should be here")
            ttl = parse_ttl(word)
            if ttl is None:
                raise BadText(f"'{word}' is not a TTL; write seconds or 1h30m, at most 2^31-1")
            continue
        if cls is None and (found := class_number(word)) is not None:
            cls = found
            continue
        type = t.type_number(word)
        if type is None:
            raise BadText(f"'{word}' is not a record type")
        return ttl, cls, type, at
    raise BadText("the record type is missing")


def parse_rr(text: str, origin: bytes = ROOT, default_ttl: int = 3600) -> RR:
    """Return the record in `text`: `name [TTL] [CLASS] TYPE rdata`. Raises BadText."""
    words = split_words(text)
    if not words:
        raise BadText("an empty text is not a record")
    try:
        name = parse_name(words[0], origin)
    except (BadName, UnicodeEncodeError) as e:
        raise BadText(str(e)) from None
    ttl, cls, type, at = parse_head(words, 1)
    rdata = parse_rdata(type, words[at:], origin)
    return RR(name, type, default_ttl if ttl is None else ttl, rdata, t.IN if cls is None else cls)
