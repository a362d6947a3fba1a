"""Addresses: compared as places, not as text; what can be dialled and what cannot."""

from __future__ import annotations

import pytest

from aiotransfer.model.address import Address

SAME = [
    ("LOCALHOST:7070", "localhost:7070"),
    ("localhost.:7070", "localhost:7070"),
    ("[0:0:0:0:0:0:0:1]:7070", "[::1]:7070"),
    ("[2001:DB8::0A]:1", "[2001:db8::a]:1"),
    ("[::ffff:10.0.0.1]:5", "10.0.0.1:5"),
    ("[::ffff:0a00:0001]:5", "10.0.0.1:5"),
    ("127.1:5", "127.0.0.1:5"),
    ("0x7f000001:5", "127.0.0.1:5"),
    ("0177.0.0.1:5", "127.0.0.1:5"),
    ("Host.Example:9", "host.example:9"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_two_spellings_of_one_place_are_equal(one: str, other: str) -> None:
    assert Address.parse(one) == Address.parse(other)
    assert hash(Address.parse(one)) == hash(Address.parse(other))
    assert str(Address.parse(one)) == str(Address.parse(other)) == other


@pytest.mark.parametrize(
    ("one", "other"), [("10.0.0.1:5", "10.0.0.1:6"), ("256.1:5", "0.0.1.1:5"), ("08.1:1", "8.0.0.1:1"), ("a:1", "a.b:1")]
)
def test_different_places_stay_different(one: str, other: str) -> None:
    assert Address.parse(one) != Address.parse(other)


WILDCARDS = ["0.0.0.0:7070", "[::]:7070", "[::ffff:0.0.0.0]:7070", "0:7070", "0x0:1", "*:7070", "[0:0:0:0:0:0:0:0]:1"]
NO_ADDRESSES = ["", "pod:", "pod:x", "pod:65536", "a:b:c", "[::1", "http://pod", "tcp://a:7", "pod/7", "a b", "a\tb:7", "pod\0"]


@pytest.mark.parametrize("text", WILDCARDS)
def test_a_wildcard_cannot_be_dialled_or_advertised_however_it_is_written(text: str) -> None:
    address = Address.parse(text)
    assert address.is_wildcard
    with pytest.raises(ValueError, match="advertise='HOST'"):
        address.dialable()
    with pytest.raises(ValueError, match="not the wildcard"):
        Address.parse_advertised(text)


def test_port_0_cannot_be_dialled() -> None:
    with pytest.raises(ValueError, match="has no port"):
        Address.parse("10.0.0.1:0").dialable()


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("pod", "pod", 0), ("pod:70", "pod", 70), ("10.0.0.1", "10.0.0.1", 0),
        ("::1", "::1", 0), ("[::1]", "::1", 0), ("[::1]:7", "::1", 7),
    ],
)
def test_an_advertised_address_may_come_without_a_port(text: str, host: str, port: int) -> None:
    assert Address.parse_advertised(text) == Address(host, port)


@pytest.mark.parametrize("text", NO_ADDRESSES)
def test_what_is_no_address_is_refused_with_the_value(text: str) -> None:
    with pytest.raises(ValueError, match=r"address|host|brackets"):
        Address.parse_advertised(text)
