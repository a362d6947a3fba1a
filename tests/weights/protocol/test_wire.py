"""Messages of weight transfers: read as they were written, and nothing else is read."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiotransfer.errors import DescriptorError
from aiotransfer.weights.protocol import relays, terms, wire
from aiotransfer.weights.protocol.pieces import Pieces, pieces

ENTRY = wire.Entry("a", 1, 2, 3, "127.0.0.1:1", (1 << 64) - 1, b"d" * 16, 100, 1, -1, False, 0)
PASSING = relays.Passing(
    2, 1, [relays.Relay(0, (1 << 64) - 1, [(0, 3)])], [relays.Onward(2, "b", 0, 5, "127.0.0.1:2", 9)], b"d" * 16, 100, 1e9, 0.5
)
MESSAGES = [
    wire.Call(), wire.Announce(ENTRY), wire.Leave("a", 0, 1), wire.Refuse(1, "plan", "no", ["x"]), wire.Want(b"d"),
    wire.Piece(b"d", 0, 1, b"data"), wire.Enter(0, 1, 2, 0, b"d", [ENTRY]), wire.Begin(1, 2, 3, 4, 5.0, [ENTRY]),
    wire.Sent(1, 0, [("a", 0, "why")]), wire.Outcome(1, ["a/0"], [("a/1", "why")]), wire.Abandon(1, 2, "late", "why", 0, -1, []),
    wire.Offer(1, 2, 3, 4, 5, 6.0, ["x:1"], [wire.Sender(0, 7, [1, 0])], [], "", "", True),
    wire.Grant(1, "a", 0, [b"r"], [9], ""),
    wire.Held(1, "a", 0, 1, 2, 3, 4), wire.Sum(1, 2, 3, (1 << 64) - 1), wire.Drop(1, "a", 0, "why"), wire.Sure(1, "a", 0),
    wire.Offer(1, 2, 3, 4, 5, 6.0, ["x:1"], [wire.Sender(0, 7, [1, 0])], [], "", "", True, PASSING),
    wire.Ask(1, 2, 3, 4, 5), wire.Grant(1, "a", 0, [b"r"], [9], "", 4), relays.Pass(1, 2, 3, 4),
    relays.Let(1, 2, [b"r"], [9], ""), relays.Short(1, "a", 0), relays.Instead(1, "a", 0), relays.Gathered(1, "a"),
    relays.Settle(1), relays.Stood(1, 0),
]  # fmt: skip


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_is_read_as_it_was_written(message: wire.Message) -> None:
    assert wire.decode(wire.encode(message)) == message


@given(st.sampled_from(MESSAGES), st.data())
def test_what_is_damaged_is_refused_or_another_message_within_the_bounds(message: wire.Message, data: st.DataObject) -> None:
    good = bytearray(wire.encode(message))
    place = data.draw(st.integers(0, len(good) - 1))
    good[place] ^= data.draw(st.integers(1, 255))
    end = data.draw(st.integers(0, len(good)))
    for bad in (bytes(good), bytes(good[:end])):
        try:
            wire.decode(bad)
        except DescriptorError:
            pass


@given(st.binary(max_size=200))
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(DescriptorError):
        wire.decode(b"\x93ATx" + data)


@pytest.mark.parametrize(
    "message",
    [
        wire.Announce(msgspec.structs.replace(ENTRY, rank=2)),
        wire.Announce(msgspec.structs.replace(ENTRY, ranks=wire.MOST_RANKS + 1)),
        wire.Announce(msgspec.structs.replace(ENTRY, instance="x" * (wire.MOST_NAME + 1))),
        wire.Announce(msgspec.structs.replace(ENTRY, layout_bytes=wire.MOST_LAYOUT + 1)),
        wire.Grant(1, "a", 0, [b"r" * (wire.MOST_DESCRIPTOR + 1)], [], ""),
        wire.Grant(1, "a", 0, [], [0xF000_0000], ""),
        wire.Piece(b"d", 0, 1, b"x" * (wire.PIECE + 1)),
        relays.Pass(1, 2, terms.MOST_ENTRIES, 0),
        relays.Let(1, 2, [], [0xF000_0000], ""),
        relays.Let(1, 2, [b"r" * (terms.MOST_DESCRIPTOR + 1)], [], ""),
        wire.Grant(1, "a", 0, [], [0] * (terms.MOST_STEPS + 1), ""),
        *(
            wire.Offer(1, 2, 3, 4, 5, 6.0, ["x:1"], [], [], "", "", True, msgspec.structs.replace(PASSING, **wrong))
            for wrong in ({"route_bytes": terms.MOST_LAYOUT + 1}, {"rate": -1.0}, {"seconds": 2e9}, {"route": b"d" * 65})
        ),
    ],
)
def test_numbers_and_lengths_beyond_their_bounds_are_refused(message: wire.Message) -> None:
    with pytest.raises(DescriptorError):
        wire.decode(wire.encode(message))


def test_a_layout_comes_in_pieces_in_order_and_no_more_of_it_than_was_announced() -> None:
    data = bytes(range(256)) * 2048
    parts = pieces(b"d", data)
    assert len(parts) == 2
    whole = Pieces(len(data))
    assert whole.add(parts[0]) is None
    assert whole.add(parts[1]) == data
    for some, most in ((parts[1:], len(data)), ([parts[0], parts[0]], len(data)), (parts, len(data) - 1)):
        found = Pieces(most)
        with pytest.raises(DescriptorError):
            for piece in some:
                found.add(piece)
        assert found.over
    with pytest.raises(DescriptorError, match="any more"):
        Pieces(10).add(wire.Piece(b"d", 0, 0, b""))
    with pytest.raises(ValueError, match="longer"):
        pieces(b"d", bytes(wire.MOST_LAYOUT + 1))


def test_texts_travel_clipped() -> None:
    assert len(wire.clip("x" * 5000)) == wire.MOST_TEXT
    assert wire.clip("a\udcffb") == "a\\udcffb"
