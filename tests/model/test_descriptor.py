"""Descriptors: what was encoded comes back, anything else is the one error."""

from __future__ import annotations

import pickle
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiotransfer.errors import DescriptorError, RegionError
from aiotransfer.model.address import Address
from aiotransfer.model.descriptor import Grant, RemoteRegion
from aiotransfer.model.dtypes import lookup

U64 = st.integers(0, (1 << 64) - 1)
grants = st.builds(
    Grant,
    owner=st.just("127.0.0.1:7070"),
    incarnation=U64,
    base=st.integers(0, 1 << 47),
    nbytes=st.integers(0, 1 << 40),
    access=st.sampled_from(["write", "read", "both"]),
    device=st.just("cpu"),
    slot=st.integers(0, 65535),
    epoch=U64,
    segment=st.just(0),
    segment_offset=st.just(0),
    keys=st.just(()),
)
SAMPLE = RemoteRegion.of(Grant("h:1", 5, 4096, 100, "write", "cpu", 1, 1, 0, 0, ()))


@given(grants)
def test_a_descriptor_survives_its_bytes(grant: Grant) -> None:
    region = RemoteRegion.of(grant)
    for other in (RemoteRegion.decode(region.encode()), pickle.loads(pickle.dumps(region))):
        assert (other.owner, other.incarnation, other.nbytes, other.base) == (
            grant.owner, grant.incarnation, grant.nbytes, grant.base,
        )  # fmt: skip


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_with_one_error(data: bytes) -> None:
    with pytest.raises(DescriptorError):
        RemoteRegion.decode(data)


@given(st.binary(max_size=200), st.binary(max_size=40), st.integers(0, 200))
def test_bytes_with_a_good_checksum_parse_or_are_refused(body: bytes, patch: bytes, at: int) -> None:
    good = SAMPLE.encode()[:-4]
    for data in (good[:5] + body, good[:at] + patch + good[at + len(patch) :]):
        raw = data + zlib.crc32(data).to_bytes(4, "little")
        try:
            region = RemoteRegion.decode(raw)
        except DescriptorError:
            continue
        assert 0 <= region.nbytes < 1 << 64


@given(st.integers(0, 8 * (len(SAMPLE.encode()) - 4) - 1))
def test_a_flipped_bit_is_noticed(bit: int) -> None:
    data = bytearray(SAMPLE.encode())
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(DescriptorError):
        RemoteRegion.decode(bytes(data))


@pytest.mark.parametrize("piece", [slice(0, 101), slice(101, 102), slice(-1, 5), slice(0, 10, 2), slice(50, 40)])
def test_slices_never_clamp_and_take_no_steps(piece: slice) -> None:
    with pytest.raises((RegionError, ValueError, TypeError)):
        SAMPLE[piece]


def test_slices_of_slices_add_up_and_nothing_can_be_changed() -> None:
    part = SAMPLE[10:90][5:15]
    assert (part.nbytes, part.base) == (10, 4096 + 15)
    with pytest.raises(AttributeError):
        part.nbytes = 50  # type: ignore[misc]


@pytest.mark.parametrize(
    "text", ["", "host", "host:", ":80", "host:65536", "host:-1", "a:b:1", "host:8o", "host:٣", "a..b:5", "a\0b:5"]
)
def test_bad_addresses_are_refused_with_their_text(text: str) -> None:
    with pytest.raises(ValueError, match=r"address|brackets|no host"):
        Address.parse(text)


@pytest.mark.parametrize("text", ["127.0.0.1:0", "localhost:7070", "[::1]:9"])
def test_addresses_survive_their_text(text: str) -> None:
    assert str(Address.parse(text)) == text


def test_element_types_by_every_name() -> None:
    assert lookup("bfloat16").itemsize == 2
    assert lookup("half") == lookup("float16")
    assert lookup(float).name == "float64"
    for bad in ("object", "nonsense", object, 5):
        with pytest.raises(TypeError):
            lookup(bad)
