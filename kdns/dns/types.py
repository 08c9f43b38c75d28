"""Numbers of the DNS and their names (IANA DNS parameters)."""

from __future__ import annotations

A, NS, CNAME, SOA, PTR, HINFO, MX, TXT = 1, 2, 5, 6, 12, 13, 15, 16
AAAA, SRV, NAPTR, DNAME, OPT, DS, RRSIG, NSEC, DNSKEY = 28, 33, 35, 39, 41, 43, 46, 47, 48
NSEC3, SVCB, HTTPS, IXFR, AXFR, ANY, CAA = 50, 64, 65, 251, 252, 255, 257

IN, CH, HS, NONE, ANYCLASS = 1, 3, 4, 254, 255

NOERROR, FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED = 0, 1, 2, 3, 4, 5
BADVERS = 16

QUERY, IQUERY, STATUS, NOTIFY, UPDATE = 0, 1, 2, 4, 5

TYPE_NAMES: dict[int, str] = {
    1: "A", 2: "NS", 3: "MD", 4: "MF", 5: "CNAME", 6: "SOA", 7: "MB", 8: "MG", 9: "MR", 10: "NULL",
    11: "WKS", 12: "PTR", 13: "HINFO", 14: "MINFO", 15: "MX", 16: "TXT", 17: "RP", 18: "AFSDB",
    19: "X25", 20: "ISDN", 21: "RT", 22: "NSAP", 23: "NSAP-PTR", 24: "SIG", 25: "KEY", 26: "PX",
    27: "GPOS", 28: "AAAA", 29: "LOC", 30: "NXT", 31: "EID", 32: "NIMLOC", 33: "SRV", 34: "ATMA",
    35: "NAPTR", 36: "KX", 37: "CERT", 38: "A6", 39: "DNAME", 41: "OPT", 42: "APL", 43: "DS",
    44: "SSHFP", 45: "IPSECKEY", 46: "RRSIG", 47: "NSEC", 48: "DNSKEY", 49: "DHCID", 50: "NSEC3",
    51: "NSEC3PARAM", 52: "TLSA", 53: "SMIMEA", 55: "HIP", 56: "NINFO", 57: "RKEY", 58: "TALINK",
    59: "CDS", 60: "CDNSKEY", 61: "OPENPGPKEY", 62: "CSYNC", 63: "ZONEMD", 64: "SVCB", 65: "HTTPS",
    66: "DSYNC", 67: "HHIT", 68: "BRID", 99: "SPF", 100: "UINFO", 101: "UID", 102: "GID",
    103: "UNSPEC", 104: "NID", 105: "L32", 106: "L64", 107: "LP", 108: "EUI48", 109: "EUI64",
    128: "NXNAME", 249: "TKEY", 250: "TSIG", 251: "IXFR", 252: "AXFR", 253: "MAILB", 254: "MAILA",
    255: "ANY", 256: "URI", 257: "CAA", 258: "AVC", 259: "DOA", 260: "AMTRELAY", 261: "RESINFO",
    262: "WALLET", 263: "CLA", 264: "IPN", 32768: "TA", 32769: "DLV",
}  # fmt: skip
TYPES = {name: number for number, name in TYPE_NAMES.items()}
CLASS_NAMES = {1: "IN", 2: "CS", 3: "CH", 4: "HS", 254: "NONE", 255: "ANY"}
CLASSES = {name: number for number, name in CLASS_NAMES.items()}
RCODE_NAMES = {
    0: "NOERROR", 1: "FORMERR", 2: "SERVFAIL", 3: "NXDOMAIN", 4: "NOTIMP", 5: "REFUSED",
    6: "YXDOMAIN", 7: "YXRRSET", 8: "NXRRSET", 9: "NOTAUTH", 10: "NOTZONE", 16: "BADVERS",
    17: "BADKEY", 18: "BADTIME", 19: "BADMODE", 20: "BADNAME", 21: "BADALG", 22: "BADTRUNC",
    23: "BADCOOKIE",
}  # fmt: skip
RCODES = {name: number for number, name in RCODE_NAMES.items()}


def type_name(number: int) -> str:
    """Return "A" for 1, and "TYPE65280" for a number without a name (RFC 3597 s5)."""
    return TYPE_NAMES.get(number) or f"TYPE{number}"


def class_name(number: int) -> str:
    """Return "IN" for 1, and "CLASS7" for a number without a name (RFC 3597 s5)."""
    return CLASS_NAMES.get(number) or f"CLASS{number}"


def rcode_name(number: int) -> str:
    """Return "NXDOMAIN" for 3, and "RCODE11" for a number without a name."""
    return RCODE_NAMES.get(number) or f"RCODE{number}"


def type_number(text: str) -> int | None:
    """Return the number of a type given by name or as TYPE123; None if it is neither."""
    upper = text.upper()
    number = TYPES.get(upper)
    if number is None and upper.startswith("TYPE") and upper[4:].isdecimal():
        number = int(upper[4:])
    return number if number is not None and number < 65536 else None
