"""`whoami`: tells a client its own address, port and transport, in the additional section."""

from __future__ import annotations

import ipaddress
from struct import Struct

from kdns.corefile import Directive
from kdns.dns import types as t
from kdns.dns.message import RR, Query, Reply
from kdns.dns.name import MAX_NAME, ROOT
from kdns.plugins.plugin import Outcome, Plugin
from kdns.plugins.setup import Setup

_SRV = Struct("!HHH")  # priority, weight, port; the target follows
UDP, TCP = b"\x04_udp", b"\x04_tcp"


def packed_address(host: str) -> bytes:
    """Return the 4 or 16 octets of a client's address."""
    try:
        return bytes(map(int, host.split(".")))
    except ValueError:
        address = ipaddress.IPv6Address(host)
        return (address.ipv4_mapped or address).packed


class Whoami(Plugin):
    word = "whoami"
    per_client = True

    def on_query(self, query: Query) -> Outcome:
        host, port = query.client
        address = packed_address(host)
        name, qclass = query.name, query.qclass
        qtype = t.A if len(address) == 4 else t.AAAA
        additional = [RR(name, qtype, 0, address, qclass)]
        owner = (UDP if query.proto == "udp" else TCP) + name
        if len(owner) <= MAX_NAME:
            additional.append(RR(owner, t.SRV, 0, _SRV.pack(0, 0, port) + ROOT, qclass))
        return Reply(additional=additional, served_by="whoami")


def setup(directives: list[Directive], cx: Setup) -> list[Plugin]:
    """`whoami`"""
    directive = cx.once(directives)
    cx.no_args(directive)
    for option in directive.options or ():
        cx.unknown_option(option, ())
    return [Whoami()]
