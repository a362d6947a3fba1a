"""Large messages in pieces: there and back, and what a peer can make the other side keep."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiotransfer.errors import DescriptorError
from aiotransfer.kv.protocol import messages, pieces
from aiotransfer.kv.protocol.messages import HEADER_BYTES, PIECE_BYTES
from aiotransfer.kv.protocol.pieces import MARK, Pieces, is_piece, split


def message(number: int, nbytes: int) -> bytes:
    head = struct.pack("<4sBQ", messages.TO_PREFILLER, messages.VERSION, number)
    return head + bytes(k % 251 for k in range(101)) * (nbytes // 101)


def piece(number: int, k: int, parts: int, body: bytes) -> bytes:
    return message(number, 0) + struct.pack("<BHH", MARK, k, parts) + body


def test_a_message_that_is_small_travels_as_it_is() -> None:
    data = message(7, 5000)
    assert split(data) == [data]
    assert not is_piece(data)


@pytest.mark.parametrize("nbytes", [PIECE_BYTES + 200, 3 * PIECE_BYTES, messages.MOST_MESSAGE - HEADER_BYTES - 101])
def test_a_message_that_is_large_is_put_together_from_its_pieces(nbytes: int) -> None:
    one, other = message(7, nbytes), message(8, nbytes)
    whole = Pieces()
    found = []
    for a, b in zip(split(one), split(other), strict=False):
        assert is_piece(a)
        assert messages.number(a) == 7
        found += [whole.add("peer", a, 0.0), whole.add("peer", b, 0.0)]
    assert {data for data in found if data is not None} == {one, other}
    assert len(whole) == whole.nbytes == 0


def test_a_message_has_a_most() -> None:
    with pytest.raises(ValueError, match="at most 16777216 bytes"):
        split(bytes(messages.MOST_MESSAGE + 1))
    assert len(split(message(1, messages.MOST_MESSAGE - 101))) == messages.MOST_PIECES


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((0, 2, PIECE_BYTES), (0, 2, PIECE_BYTES)), ((0, 3, PIECE_BYTES), (2, 3, 5)), ((0, 3, PIECE_BYTES), (1, 2, 5)),
        ((0, 3, PIECE_BYTES), (1, 3, 5)), ((0, 2, PIECE_BYTES), (1, 2, 0)), ((0, 2, PIECE_BYTES), (1, 2, PIECE_BYTES + 1)),
        (None, (1, 2, 5)), (None, (0, 1, 5)), (None, (0, 33, PIECE_BYTES)), (None, (0, 0, 0)), (None, (0, 65535, PIECE_BYTES)),
    ],
)  # fmt: skip
def test_pieces_that_do_not_follow_each_other_are_refused_and_forgotten(
    first: tuple[int, int, int] | None, second: tuple[int, int, int]
) -> None:
    whole = Pieces()
    if first is not None:
        assert whole.add("peer", piece(7, *first[:2], bytes(first[2])), 0.0) is None
        assert whole.nbytes > 0
    with pytest.raises(DescriptorError, match="no message of the KV protocol"):
        whole.add("peer", piece(7, *second[:2], bytes(second[2])), 0.0)
    assert len(whole) == whole.nbytes == 0


def test_a_message_that_is_taken_back_is_forgotten() -> None:
    whole = Pieces()
    whole.add("peer", piece(7, 0, 2, bytes(PIECE_BYTES)), 0.0)
    whole.drop("peer", 8)
    whole.drop("another", 7)
    assert len(whole) == 1
    whole.drop("peer", 7)
    assert len(whole) == whole.nbytes == 0


def test_a_piece_that_does_not_come_is_waited_for_a_while() -> None:
    whole = Pieces()
    whole.add("peer", piece(7, 0, 3, bytes(PIECE_BYTES)), 0.0)
    whole.add("peer", piece(8, 0, 3, bytes(PIECE_BYTES)), 0.0)
    whole.add("peer", piece(7, 1, 3, bytes(PIECE_BYTES)), 50.0)
    whole.sweep(pieces.STALE_SECONDS)
    assert len(whole) == 1
    assert whole.add("peer", piece(7, 2, 3, b"end"), 61.0) == bytes(2 * PIECE_BYTES) + b"end"


def test_what_one_peer_has_begun_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "MOST_OF_ONE", 3 * PIECE_BYTES)
    whole = Pieces()
    for number in (1, 2):
        whole.add("peer", piece(number, 0, 3, bytes(PIECE_BYTES)), 0.0)
    with pytest.raises(DescriptorError, match="of one peer"):
        whole.add("peer", piece(3, 0, 3, bytes(PIECE_BYTES)), 0.0)
    whole.add("another", piece(3, 0, 3, bytes(PIECE_BYTES)), 0.0)
    assert len(whole) == 3
    assert whole.nbytes <= 4 * PIECE_BYTES


def test_the_peer_that_has_most_makes_room_for_one_that_has_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "MOST_OF_ALL", 4 * PIECE_BYTES)
    whole = Pieces()
    for number in (1, 2, 3):
        whole.add("greedy", piece(number, 0, 3, bytes(PIECE_BYTES)), 0.0)
    whole.add("modest", piece(1, 0, 3, bytes(PIECE_BYTES)), 0.0)
    assert len(whole) == 3
    assert whole.nbytes <= 4 * PIECE_BYTES
    with pytest.raises(DescriptorError, match="not whole yet take at most"):
        whole.add("greedy", piece(4, 0, 3, bytes(PIECE_BYTES)), 0.0)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.integers(0, 3), st.integers(0, 3), st.integers(0, 4), st.booleans()), max_size=20
    )
)
def test_whatever_comes_what_is_kept_is_what_is_counted(steps: list[tuple[str, int, int, int, bool]]) -> None:
    whole = Pieces()
    for peer, number, k, parts, is_full in steps:
        try:
            whole.add(peer, piece(number, k, parts, bytes(PIECE_BYTES if is_full else 9)), 0.0)
        except DescriptorError:
            assert (peer, number) not in whole._begun
        assert whole.nbytes == sum(part.nbytes for part in whole._begun.values())
        assert set(whole._taken) == {peer for peer, _ in whole._begun}
