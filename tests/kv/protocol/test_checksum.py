"""Checksums of pages: the same wherever a page lies, another one whatever is changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from aiotransfer.kv.protocol import checksum
from aiotransfer.kv.protocol.checksum import block_sums, multipliers, page_sums

Bytes = NDArray[np.uint8]
SIZES = [1, 2, 3, 4, 5, 6, 7, 8, 30, 31, 32, 33, 256, 1022, 4096]


def random_bytes(n: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, n, np.uint8)


def starts_of(*starts: int) -> NDArray[np.int64]:
    return np.array(starts, np.int64)


def one(block: Bytes) -> int:
    return int(block_sums(block, starts_of(0), len(block))[0])


def plainly(block: Bytes) -> int:
    """The definition, word by word."""
    width = 4 if len(block) % 4 == 0 else 2 if len(block) % 2 == 0 else 1
    words = [int.from_bytes(block[k : k + width].tobytes(), "little") for k in range(0, len(block), width)]
    return sum(word * factor for word, factor in zip(words, multipliers(len(words)).tolist(), strict=True)) % 2**64


@pytest.mark.parametrize("nbytes", SIZES)
def test_a_sum_is_that_of_the_definition_wherever_the_block_lies(nbytes: int) -> None:
    block, memory = random_bytes(nbytes), random_bytes(5 * nbytes + 40, 1)
    for start in (0, 1, 2, 3, 4, 5, 7, nbytes, 4 * nbytes + 40):
        there = memory.copy()
        there[start : start + nbytes] = block
        assert block_sums(there, starts_of(start), nbytes).tolist() == [plainly(block)]


@pytest.mark.parametrize("nbytes", [size for size in SIZES if size <= 256])
def test_any_single_flipped_bit_is_found(nbytes: int) -> None:
    flips = np.zeros((8 * nbytes, nbytes), np.uint8)
    flips[np.arange(8 * nbytes), np.arange(8 * nbytes) // 8] = 1 << (np.arange(8 * nbytes) % 8)
    for block in (random_bytes(nbytes), np.zeros(nbytes, np.uint8), np.full(nbytes, 0xFF, np.uint8)):
        damaged = (block ^ flips).reshape(-1)
        sums = block_sums(damaged, np.arange(8 * nbytes) * nbytes, nbytes)
        assert one(block) not in sums.tolist()


@settings(max_examples=60)
@given(st.sampled_from([32, 256, 4096, 65536]), st.integers(0, 1 << 30), st.data())
def test_a_flipped_bit_of_a_large_block_is_found(nbytes: int, seed: int, data: st.DataObject) -> None:
    block = random_bytes(nbytes, seed)
    before = one(block)
    block[data.draw(st.integers(0, nbytes - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert one(block) != before


@settings(max_examples=60)
@given(st.sampled_from(SIZES), st.integers(1, 6), st.integers(0, 1 << 30))
def test_a_page_has_the_same_sum_wherever_its_blocks_lie(nbytes: int, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (count, nbytes), np.uint8)
    found = []
    for _ in range(3):
        memory = rng.integers(0, 256, 20 * nbytes + 7, np.uint8)
        starts = rng.permutation(20)[:count] * nbytes + rng.integers(0, 8)
        for start, block in zip(starts, blocks, strict=True):
            memory[start : start + nbytes] = block
        found.append(page_sums(block_sums(memory, starts, nbytes), np.zeros(count, np.int64), 1).tolist())
    assert found[0] == found[1] == found[2]


@settings(max_examples=60)
@given(st.sampled_from([4, 30, 33, 256]), st.integers(2, 8), st.integers(0, 1 << 30), st.data())
def test_two_blocks_that_changed_places_are_found_within_a_page_and_between_pages(
    nbytes: int, blocks: int, seed: int, data: st.DataObject
) -> None:
    memory = random_bytes(3 * blocks * nbytes, seed)
    pages = np.repeat(np.arange(3), blocks)
    a, b = data.draw(st.lists(st.integers(0, len(pages) - 1), min_size=2, max_size=2, unique=True))
    starts = np.arange(len(pages)) * nbytes
    right = page_sums(block_sums(memory, starts, nbytes), pages, 3)
    starts[[a, b]] = starts[[b, a]]
    wrong = page_sums(block_sums(memory, starts, nbytes), pages, 3)
    same = np.array_equal(memory[a * nbytes : (a + 1) * nbytes], memory[b * nbytes : (b + 1) * nbytes])
    assert same or set(np.flatnonzero(right != wrong)) == {a // blocks, b // blocks}


@pytest.mark.parametrize("nbytes", [8, 30, 256])
def test_two_pages_that_changed_places_are_found(nbytes: int) -> None:
    memory, pages = random_bytes(4 * nbytes), np.array([0, 0, 1, 1])
    starts = np.arange(4) * nbytes
    right = page_sums(block_sums(memory, starts, nbytes), pages, 2)
    swapped = page_sums(block_sums(memory, starts[[2, 3, 0, 1]], nbytes), pages, 2)
    assert right.tolist() == swapped[::-1].tolist()
    assert right[0] != right[1]


def test_words_that_changed_places_within_a_block_are_found() -> None:
    block = random_bytes(64)
    swapped = block.reshape(16, 4)[[1, 0, *range(2, 16)]].reshape(-1)
    assert one(block) != one(swapped)


def test_the_order_of_blocks_in_the_table_does_not_need_to_be_that_of_pages() -> None:
    sums = np.arange(1, 7, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    straight = page_sums(sums, np.array([0, 0, 0, 1, 1, 1]), 2)
    mixed = page_sums(sums[[0, 3, 1, 4, 2, 5]], np.array([0, 1, 0, 1, 0, 1]), 2)
    assert straight.tolist() == mixed.tolist()


def test_nothing_has_no_sums_and_a_page_without_blocks_that_of_nothing() -> None:
    nothing: NDArray[Any] = np.empty(0, np.int64)
    assert block_sums(random_bytes(10), nothing, 4).tolist() == []
    assert block_sums(np.empty(0, np.uint8), nothing, 4096).tolist() == []
    assert page_sums(np.empty(0, np.uint64), nothing, 3).tolist() == [0, 0, 0]
    assert page_sums(np.empty(0, np.uint64), nothing, 0).tolist() == []
    assert page_sums(np.array([5], np.uint64), np.array([1]), 3).tolist()[0::2] == [0, 0]


@pytest.mark.parametrize("start", [-1, 93, 100, 1 << 40])
def test_a_block_that_does_not_lie_in_memory_is_refused(start: int) -> None:
    with pytest.raises(IndexError, match="does not lie in 100 bytes"):
        block_sums(random_bytes(100), starts_of(0, start), 8)
    assert len(block_sums(random_bytes(100), starts_of(0, 92), 8)) == 2


def test_how_many_blocks_are_gathered_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, starts = random_bytes(64 * 100), np.arange(100) * 64
    whole = block_sums(memory, starts, 64)
    for at_a_time in (1, 64, 640, 6399):
        monkeypatch.setattr(checksum, "AT_A_TIME", at_a_time)
        assert np.array_equal(block_sums(memory, starts, 64), whole)


def test_factors_are_odd_and_those_of_a_longer_block_begin_with_those_of_a_shorter_one() -> None:
    factors = multipliers(10_000)
    assert (factors % 2 == 1).all()
    assert len(np.unique(factors)) == len(factors)
    assert np.array_equal(multipliers(100), factors[:100])
    assert factors[0] == FIRST_FACTOR, "both sides compute the same, of whatever version"


FIRST_FACTOR = 0xDE695CCA8A9B52A5
