"""How addresses are read: one address has one text, whoever wrote it (reference 1.1)."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdns.registry.endpoints import Endpoint, canonical_address, pack_address


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("10.0.0.1", (4, "10.0.0.1")),
        ("0.0.0.0", (4, "0.0.0.0")),
        ("255.255.255.255", (4, "255.255.255.255")),
        ("010.000.0.01", (4, "10.0.0.1")),  # not octal
        ("0000010.0.0.1", (4, "10.0.0.1")),
        ("256.0.0.1", None),
        ("0256.0.0.1", None),
        ("10.0.0", None),
        ("10.0.0.1.2", None),
        ("10.0.0.1\n", None),
        (" 10.0.0.1", None),
        ("10.0.0.+1", None),
        ("\u0661.0.0.1", None),  # a digit, but not of an address
        ("10.0.0.1/32", None),
        ("FD00:0:0::1", (6, "fd00::1")),
        ("::", (6, "::")),
        ("::ffff:10.0.0.1", (4, "10.0.0.1")),
        ("fe80::1%eth0", None),
        ("fe80::1%", None),
        ("1::2::3", None),
        ("", None),
        ("None", None),
        ("example.com", None),
    ],
)
def test_an_address_has_one_text(text: str, want: tuple[int, str] | None) -> None:
    assert canonical_address(text) == want


@given(st.ip_addresses())
def test_every_address_is_read_and_read_again(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    found = canonical_address(address.exploded)
    assert found is not None and canonical_address(found[1]) == found
    if found[0] == address.version:
        assert ipaddress.ip_address(found[1]) == address


@given(
    st.one_of(
        st.ip_addresses().map(str),
        st.text("0123456789abcdef.:% \n\0", max_size=40),
        st.text(max_size=20),
    )
)
def test_the_octets_of_an_address_are_those_of_the_library(text: str) -> None:
    """There is a shorter way for what most addresses are."""
    try:
        want = ipaddress.ip_address(text).packed
    except ValueError:
        want = None
    assert pack_address(text) == want


@given(st.text(max_size=40))
def test_whatever_is_written_no_address_is_made_up(text: str) -> None:
    found = canonical_address(text)
    assert found is None or ipaddress.ip_address(found[1]).version == found[0]


def test_an_endpoint_is_written_with_its_port() -> None:
    assert str(Endpoint("10.0.0.1", 80)) == "10.0.0.1:80"
    assert str(Endpoint("fd00::1", 80)) == "[fd00::1]:80"
