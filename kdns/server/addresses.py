"""This host's addresses, by interface (Linux)."""

from __future__ import annotations

import array
import fcntl
import ipaddress
import socket
import struct
from dataclasses import dataclass

_SIOCGIFCONF = 0x8912
_IFREQ = struct.Struct("16s16s8x" if struct.calcsize("P") == 8 else "16s16s")
MAX_ADDRESSES = 1024


@dataclass(frozen=True, slots=True)
class LocalAddress:
    """interface -- its name; address -- text, with %interface where link-local IPv6."""

    interface: str
    address: str
    packed: bytes
    loopback: bool


def local_addresses() -> list[LocalAddress]:
    """Return all addresses of this host, IPv4 first."""
    return [*_ipv4(), *_ipv6()]


def _ipv4() -> list[LocalAddress]:
    buffer = array.array("B", bytes(_IFREQ.size * MAX_ADDRESSES))
    address, _ = buffer.buffer_info()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        filled = fcntl.ioctl(sock.fileno(), _SIOCGIFCONF, struct.pack("iP", len(buffer), address))
    size = struct.unpack("iP", filled)[0]
    out = []
    for at in range(0, size, _IFREQ.size):
        name, sockaddr = _IFREQ.unpack_from(buffer, at)
        packed = sockaddr[4:8]
        ip = ipaddress.IPv4Address(packed)
        interface = name.split(b"\0", 1)[0].decode().split(":", 1)[0]
        out.append(LocalAddress(interface, str(ip), packed, ip.is_loopback))
    return out


def _ipv6() -> list[LocalAddress]:
    out = []
    try:
        with open("/proc/net/if_inet6") as f:
            lines = f.read().splitlines()
    except OSError:
        return []
    for line in lines:
        fields = line.split()
        packed = bytes.fromhex(fields[0])
        ip = ipaddress.IPv6Address(packed)
        text = f"{ip}%{fields[5]}" if ip.is_link_local else str(ip)
        out.append(LocalAddress(fields[5], text, packed, ip.is_loopback))
    return out


def resolve_binds(binds: tuple[str, ...], excepted: tuple[str, ...]) -> list[str] | str:
    """Return the addresses that `bind` arguments (addresses or interface names) stand for,
    or a text that says which argument is neither."""
    out: list[str] = []
    known = local_addresses()
    for bind in binds:
        try:
            ipaddress.ip_address(bind.split("%", 1)[0])
            found = [bind]
        except ValueError:
            found = [a.address for a in known if a.interface == bind]
            if not found:
                names = ", ".join(sorted({a.interface for a in known}))
                return f"'{bind}' is not a valid IP address or interface name (there is {names})"
        skip = {a.address for a in known if a.interface in excepted} | set(excepted)
        out += [a for a in found if a not in skip]
    return list(dict.fromkeys(out))
