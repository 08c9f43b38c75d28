"""Reverse names: addresses to in-addr.arpa / ip6.arpa and back, and the zones of a CIDR."""

from __future__ import annotations

import ipaddress

from kdns.dns.name import labels_of, name_of, parse_name

IN_ADDR = parse_name("in-addr.arpa.")
IP6_ARPA = parse_name("ip6.arpa.")


def reverse_name(address: str) -> bytes:
    """Return the wire name of an address's PTR record (RFC 1035 s3.5, RFC 3596 s2.5)."""
    return parse_name(ipaddress.ip_address(address).reverse_pointer + ".")


def address_of(key: bytes) -> str | None:
    """Return the address that a complete, lower-cased reverse name stands for, else None."""
    if key.endswith(IN_ADDR):
        labels = labels_of(key)[:-2]
        if len(labels) != 4:
            return None
        octets = [label.decode("ascii", "replace") for label in reversed(labels)]
        try:
            return str(ipaddress.IPv4Address(".".join(octets)))
        except ValueError:
            return None
    if key.endswith(IP6_ARPA):
        labels = labels_of(key)[:-2]
        if len(labels) != 32 or any(len(label) != 1 for label in labels):
            return None
        try:
            return str(ipaddress.IPv6Address(int(b"".join(reversed(labels)), 16)))
        except ValueError:
            return None
    return None


def reverse_zones(text: str) -> tuple[bytes, ...] | None:
    """Return the reverse zones of a CIDR such as "10.0.0.0/17", expanded to whole octets or
    nibbles (reference 1.7); None if `text` is not a CIDR."""
    if "/" not in text:
        return None
    try:
        net = ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None
    step = 8 if net.version == 4 else 4
    aligned = -(-net.prefixlen // step) * step
    zones = []
    for sub in net.subnets(new_prefix=aligned):
        if net.version == 4:
            labels = str(sub.network_address).split(".")[: aligned // 8]
            zones.append(name_of([x.encode() for x in reversed(labels)])[:-1] + IN_ADDR)
        else:
            nibbles = sub.network_address.exploded.replace(":", "")[: aligned // 4]
            zones.append(name_of([x.encode() for x in reversed(nibbles)])[:-1] + IP6_ARPA)
    return tuple(zones)
