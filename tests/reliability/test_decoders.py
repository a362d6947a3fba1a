"""Any bytes either parse or raise the one documented error; what parses holds together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.reliability.decoders import DECODERS, Decoder

IDS = [decoder.name for decoder in DECODERS]


@pytest.mark.parametrize("decoder", DECODERS, ids=IDS)
def test_the_seeds_of_the_fuzzer_are_valid(decoder: Decoder) -> None:
    assert all(map(decoder.check, decoder.seeds()))


@pytest.mark.parametrize("decoder", DECODERS, ids=IDS)
@given(data=st.binary(max_size=600))
def test_any_bytes(decoder: Decoder, data: bytes) -> None:
    decoder.check(data)


@pytest.mark.parametrize("decoder", DECODERS, ids=IDS)
@given(draw=st.data())
def test_valid_bytes_with_a_piece_of_something_else(decoder: Decoder, draw: st.DataObject) -> None:
    seed = draw.draw(st.sampled_from(decoder.seeds()))
    begin = draw.draw(st.integers(0, len(seed)))
    end = draw.draw(st.integers(begin, min(len(seed), begin + 12)))
    decoder.check(seed[:begin] + draw.draw(st.binary(max_size=12)) + seed[end:])
