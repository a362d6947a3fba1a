"""Members as bytes."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import aiotransfer as at
from aiotransfer.kv.registry import Member
from tests.kv.party import small
from tests.kv.registry.members import member

ONE = member("prefill 7", labels={"model": "λ"}, layout=small(windows=(None, 4, 8, None), layer_range=(1, 3)))
WIRE: dict[str, Any] = json.loads(ONE.encode())


def test_what_is_encoded_is_decoded() -> None:
    assert Member.decode(ONE.encode()) == ONE == pickle.loads(pickle.dumps(ONE))
    assert hash(Member.decode(ONE.encode())) == hash(ONE)
    assert member(address="[::1]:7").address == "[::1]:7"


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("role", "router", ValueError), ("address", "10.0.0.1", ValueError), ("address", "0.0.0.0:7", ValueError),
        ("address", "10.0.0.1:0", ValueError), ("name", "", ValueError), ("name", "a\nb", ValueError), ("name", 7, TypeError),
        ("incarnation", 1 << 64, ValueError), ("incarnation", True, TypeError), ("layout", {}, TypeError),
        ("labels", {"a": 1}, TypeError), ("labels", {str(n): "" for n in range(65)}, ValueError), ("labels", 1, TypeError),
    ],
)  # fmt: skip
def test_a_field_that_makes_no_sense_is_named(field: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=field if field != "address" else "address|has no port|port"):
        member(**{"name": "a"} | {field: value})


@pytest.mark.parametrize(
    "changes",
    [
        {"v": 2}, {"v": None}, {"role": "x"}, {"address": "y"}, {"incarnation": "7"}, {"incarnation": "-00000000000000f"},
        {"incarnation": "g" * 16}, {"layout": {}}, {"layout": WIRE["layout"] | {"tp": "2"}}, {"labels": [1]}, {"name": 3},
        {"layout": WIRE["layout"] | {"spare": 1}},
    ],
)  # fmt: skip
def test_bytes_that_are_no_member_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(at.DescriptorError):
        Member.decode(json.dumps(WIRE | changes).encode())


def test_fields_of_a_later_minor_version_are_ignored() -> None:
    assert Member.decode(json.dumps(WIRE | {"rails": 4}).encode()) == ONE


@pytest.mark.parametrize("data", [b"", b"\xff", b"[" * 60_000, b'{"v":1,"x":' + b"[" * 60_000, b"x" * 70_000, b'{"v":1}'])
def test_damaged_and_long_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(at.DescriptorError):
        Member.decode(data)


def test_a_member_that_is_too_long_is_not_encoded() -> None:
    with pytest.raises(ValueError, match="at most 65536 bytes"):
        member(labels={f"{n:01000}": "x" * 1024 for n in range(64)}).encode()


JUNK = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), st.lists)


@given(st.sampled_from([("top", name) for name in WIRE] + [("layout", name) for name in WIRE["layout"]]), JUNK)
def test_junk_in_any_field_raises_nothing_else(where: tuple[str, str], junk: object) -> None:
    wire = json.loads(ONE.encode())
    (wire if where[0] == "top" else wire["layout"])[where[1]] = junk
    try:
        Member.decode(json.dumps(wire).encode())
    except at.DescriptorError:
        pass
