"""What an operator and the node decide about forwarding, as plain values.

Read from flags and KubeProxyConfiguration by config.py; obeyed by table.py and by every
dataplane. One value is for one IP family, as kube-proxy runs one proxier a family.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Family: TypeAlias = Literal[4, 6]
Protocol: TypeAlias = Literal["tcp", "udp", "sctp"]


@dataclass(frozen=True, slots=True)
class Detector:
    """How a packet of one of this node's Pods is known (reference 1.8).

    kind  -- cidr: by its source address; interface: by the one it came in on; prefix: by how
             the name of that interface begins
    value -- the CIDR, the interface's name or its prefix
    """

    kind: Literal["cidr", "interface", "prefix"]
    value: str


@dataclass(frozen=True, slots=True)
class NodeView:
    """This node, as forwarding sees it.

    name          -- as EndpointSlices name it
    address       -- its primary IP of this family; "" if it has none
    topology_zone -- of the Node's label; "" if it has none
    """

    name: str
    address: str = ""
    topology_zone: str = ""


@dataclass(frozen=True, slots=True)
class Options:
    """Settings of one family's rules.

    masquerade_bit       -- bit of the packet mark that asks for masquerading, 0 to 31
    masquerade_all       -- masquerade all that goes to a ClusterIP
    detector             -- None: Pods of this node are not told from others
    localhost_node_ports -- NodePorts also answer on 127.0.0.1 (IPv4 only)
    node_port_addresses  -- the node's addresses that NodePorts answer on; None: on every one
    random_fully         -- `MASQUERADE --random-fully` is there (iptables 1.6.2)
    drop_invalid         -- drop packets conntrack finds invalid; not where
                            nf_conntrack_tcp_be_liberal was set at start (reference 1.4)
    """

    family: Family = 4
    masquerade_bit: int = 14
    masquerade_all: bool = False
    detector: Detector | None = None
    localhost_node_ports: bool = True
    node_port_addresses: tuple[str, ...] | None = None
    random_fully: bool = True
    drop_invalid: bool = True

    @property
    def mark(self) -> int:
        """The packet mark that asks for masquerading."""
        return 1 << self.masquerade_bit
