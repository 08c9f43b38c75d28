"""Follow one packet through the rules of a node, rule by rule. No kernel is asked.

    kdns rules -f examples | python examples/follow.py 203.0.113.7 192.168.77.1:30080
    kdns proxy --dry-run --config FILE | python examples/follow.py 10.244.1.5 10.96.0.10:53/udp
    iptables-save | python examples/follow.py --node 192.168.77.1 10.244.1.5 10.96.0.10:53/udp

Reads rules from its input, as `kdns rules` or `iptables-save` print them. The packet is the
first of a connection from SOURCE to DESTINATION:PORT; it comes in by --interface, or, if that
is "", from a process of the node. Where the rules leave it to chance which endpoint gets it,
the first way is told rule by rule and of the others where they end.
"""

from __future__ import annotations

import argparse
import re
import sys
from typing import cast

from kdns.errors import KdnsError
from kdns.proxy.options import Protocol
from kdns.proxy.packet import Host, Packet, parse_rules, render_walk, walk

# The addresses of examples/node.yaml and of kdns up's first Node.
EXAMPLE_NODES = ("192.168.77.1", "192.0.2.1")


def main() -> int:
    """Read, walk, print; return the exit code."""
    first = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="follow.py", description=first)
    parser.add_argument("source", metavar="SOURCE", help="address that the packet comes from")
    parser.add_argument("to", metavar="DESTINATION:PORT", help="with /udp or /sctp, if not TCP")
    parser.add_argument("--interface", default="eth0", help="that it comes in by  [%(default)s]")
    nodes = ", ".join(EXAMPLE_NODES)
    parser.add_argument("--node", action="append", metavar="ADDRESS",
                        help=f"of the node itself; may be repeated  [{nodes}]")  # fmt: skip
    args = parser.parse_args()
    try:
        packet = packet_of(args.source, args.to, args.interface)
        text = of_family(sys.stdin.read(), 6 if ":" in packet.source else 4)
        rules = parse_rules(text, file="stdin", strict=False)
        ways = walk(rules, packet, Host(args.node or EXAMPLE_NODES))
    except (KdnsError, ValueError) as e:
        print(f"follow.py: {e}", file=sys.stderr)
        return 2
    told, *more = ways
    for line in render_walk(told):
        print(line)
    for way in more:
        print(list(render_walk(way))[-1])
    return 0


def of_family(text: str, family: int) -> str:
    """Return the rules of one family, where `kdns proxy --dry-run` printed both."""
    parts = re.split(r"^# for (ip6?tables)-restore.*\n", text, flags=re.MULTILINE)
    found = dict(zip(parts[1::2], parts[2::2], strict=True))
    return found.get("ip6tables" if family == 6 else "iptables", text)


def packet_of(source: str, to: str, interface: str) -> Packet:
    """Return the packet that the arguments mean. Raises ValueError."""
    place, _, protocol = to.partition("/")
    address, _, port = place.rpartition(":")
    if not port.isdecimal() or protocol not in ("", "tcp", "udp", "sctp"):
        raise ValueError(f"'{to}' must be ADDRESS:PORT or ADDRESS:PORT/udp")
    kind = cast("Protocol", protocol or "tcp")
    return Packet(source, address.strip("[]"), int(port), kind, interface=interface)


if __name__ == "__main__":
    sys.exit(main())
