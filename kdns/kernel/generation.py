"""The number of nf_tables' present rule set: it is another after every change by anybody.

So what was compared once need not be read again while the number stays. What is compared is
iptables.py's. Asks in the network namespace of the thread that calls.
"""

from __future__ import annotations

import socket
import struct

NETLINK_NETFILTER = 12
GET_GENERATION = (10 << 8) | 16  # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETGEN
NEW_GENERATION = (10 << 8) | 15  # NFT_MSG_NEWGEN
REQUEST = 0x1  # NLM_F_REQUEST
NUMBER = 1  # NFTA_GEN_ID
PATIENCE = 1.0  # seconds; the kernel answers at once

_HEADER = struct.Struct("=IHHII")  # nlmsghdr
_FAMILY = struct.Struct("=BBH")  # nfgenmsg
_ATTRIBUTE = struct.Struct("=HH")  # nlattr
_START = _HEADER.size + _FAMILY.size


def nft_generation() -> int | None:
    """Return the number; None where the kernel does not tell, which is no error: then what it
    would have saved is done."""
    question = _HEADER.pack(_START, GET_GENERATION, REQUEST, 1, 0) + _FAMILY.pack(0, 0, 0)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as kernel:
            kernel.settimeout(PATIENCE)
            kernel.bind((0, 0))
            kernel.send(question)
            answer = kernel.recv(1 << 13)
    except OSError:
        return None
    return parse_generation(answer)


def parse_generation(answer: bytes) -> int | None:
    """Return the number in the kernel's answer; None if that is an error or none at all."""
    if len(answer) < _START or _HEADER.unpack_from(answer)[1] != NEW_GENERATION:
        return None
    end = min(len(answer), _HEADER.unpack_from(answer)[0])
    at = _START
    while at + _ATTRIBUTE.size <= end:
        size, kind = _ATTRIBUTE.unpack_from(answer, at)
        if kind == NUMBER and size == _ATTRIBUTE.size + 4 and at + size <= end:
            return int.from_bytes(answer[at + 4 : at + 8], "big")
        at += max(_ATTRIBUTE.size, (size + 3) & ~3)
    return None
