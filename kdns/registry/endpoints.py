"""Which endpoints count, for DNS and for forwarding alike: decided here and nowhere else.

The three conditions of an endpoint (ready, serving, terminating) stay three; what a reader
wants is asked for by its own word: `published` is what DNS shows.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator

from kdns.registry.objects import EndpointSlice, SliceEndpoint, SlicePort


def is_published(endpoint: SliceEndpoint) -> bool:
    """True if DNS shows the endpoint: ready, or nothing said of it (KEP-752: nil is true).

    serving and terminating do not matter to DNS; publishNotReadyAddresses works because the
    EndpointSlice controller writes ready=true for such a Service (reference 1.4).
    """
    ready = endpoint.conditions.ready
    return ready is None or ready


def published(
    slices: Iterable[EndpointSlice],
) -> Iterator[tuple[SliceEndpoint, str, bytes, tuple[SlicePort, ...]]]:
    """Yield (endpoint, address, packed address, ports of its slice) for all that DNS shows.

    An address of another family than its slice says, or none at all, is passed over.
    """
    for one in slices:
        if one.address_type == "FQDN":
            continue
        ports = tuple(one.ports or ())
        for endpoint in one.endpoints or ():
            if not is_published(endpoint):
                continue
            for address in endpoint.addresses:
                try:
                    packed = ipaddress.ip_address(address).packed
                except ValueError:
                    continue
                yield endpoint, address, packed, ports
