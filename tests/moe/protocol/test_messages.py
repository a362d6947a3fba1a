"""What messages and views may hold: numbers, lengths and pieces beyond their bounds are refused as they are read."""

from __future__ import annotations

import pytest

from aiotransfer.errors import DescriptorError
from aiotransfer.moe.protocol import messages
from aiotransfer.moe.protocol.header import header
from aiotransfer.moe.protocol.membership import MOST_STEPS, View
from aiotransfer.moe.protocol.shape import Shape

SHAPE = Shape(ranks=2, num_experts=2, hidden=16, dtype="float32", combine_dtype="float32", max_tokens=4, topk=1)


@pytest.mark.parametrize("view", [
    View(5, ((2, 9),), (), 0, (), (), ()),
    View(5, (), ((1023, 9),), 0, (), (), ()),
    View(5, (), (), 0, (), (), ((2, 5, 0),)),
    View(5, (), (), 0, ((0, 2, bytes(SHAPE.header_bytes)),), (), ()),
    View(5, (), (), 0, (), ((0, 1, b"short"),), ()),
    View(5, (), (), 0, ((1, 1, header(SHAPE, 2, 5, 0, 0, None).tobytes()),), (), ()),
    View(5, (), (), 101, (), (), ()),
    View(5, (), (), 0, (), (), ((1, 5, 101),)),
    View(5, (), (), 0, ((0, 1, bytes(SHAPE.header_bytes)),) * 33, (), ()),
])  # fmt: skip
def test_a_view_says_what_of_it_cannot_be(view: View) -> None:
    assert view.impossible(2, 100, SHAPE.header_bytes, 2)


def test_a_view_that_can_be_is_taken() -> None:
    data = header(SHAPE, 3, 5, 0, 0, None).tobytes()
    view = View(5, ((0, 9), (1, 8)), ((0, 10),), 100, ((3, 0, data),), ((3, 1, data),), ((1, 5, 100),))
    assert view.impossible(2, 100, SHAPE.header_bytes, 2) == ""
    assert View(1, (), (), MOST_STEPS, (), (), ()).impossible(2, MOST_STEPS, SHAPE.header_bytes, 2) == ""


@pytest.mark.parametrize("message", [
    messages.WhoIsThere(rank=-1, incarnation=1, present=None),
    messages.WhoIsThere(rank=1024, incarnation=1, present=None),
    messages.WhoIsThere(rank=1, incarnation=1 << 63, present=None),
    messages.WhoIsThere(rank=1, incarnation=1, present=[0] * 1025),
    messages.Ready(rank=1, incarnation=1, incarnations=[1] * 1025),
    messages.Ready(rank=1, incarnation=1, incarnations=[-1]),
    messages.Leave(rank=1, incarnation=1, who=1, of=1, upto=1 << 62, reason="", present=[]),
    messages.ViewUpdate(rank=1, incarnation=1, view=View(1, tuple((0, i) for i in range(1, 16_386)), (), 0, (), (), ())),
    messages.ViewUpdate(rank=1, incarnation=1, view=View(1, (), (), MOST_STEPS, (), (), ())),
    messages.ViewUpdate(rank=1, incarnation=1, view=View(1, ((0, 0),), (), 0, (), (), ())),
    messages.Hello(rank=1, incarnation=1, shape={str(i): i for i in range(41)}, region=b"", direct=True, reads=True, computed=0,
                   running=True, ask=False, present=[], to=0),
    messages.Hello(rank=1, incarnation=1, shape={}, region=bytes(1 << 15), direct=True, reads=True, computed=0, running=True,
                   ask=False, present=[], to=0),
    messages.Hello(rank=1, incarnation=1, shape={}, region=b"", direct=True, reads=True, computed=1 << 62, running=True,
                   ask=False, present=[], to=0),
    messages.Piece(rank=1, incarnation=1, number=0, of=0, data=b""),
    messages.Piece(rank=1, incarnation=1, number=0, of=1, data=bytes((512 << 10) + 1)),
])  # fmt: skip
def test_numbers_and_lengths_beyond_their_bounds_are_not_read(message: messages.Message) -> None:
    key = messages.prefix("", "a,b")
    with pytest.raises(DescriptorError):
        messages.decode(key, messages.encode(key, message))


def test_a_long_message_travels_in_pieces() -> None:
    key = messages.prefix("", "a,b")
    view = View(5, (), (), 1, tuple((0, r, bytes([r]) * 60_000) for r in range(50)), (), ())
    told = messages.ViewUpdate(rank=1, incarnation=5, view=view)
    sent = messages.pieces(key, told)
    assert len(sent) == 6
    assert max(map(len, sent)) < 1 << 20
    pieces = messages.Pieces(key, 16 << 20)
    parts = [messages.decode(key, data) for data in sent]
    assert [pieces.add(part) for part in parts] == [None] * 5 + [told]  # type: ignore[arg-type]
    assert messages.pieces(key, messages.WhoIsThere(rank=1, incarnation=5, present=None)) == [
        messages.encode(key, messages.WhoIsThere(rank=1, incarnation=5, present=None))
    ]


def test_pieces_that_are_not_of_one_message_are_refused_and_nothing_is_kept() -> None:
    key = messages.prefix("", "a,b")
    whole = messages.encode(key, messages.WhoIsThere(rank=1, incarnation=5, present=None))

    def piece(number: int, of: int, data: bytes = b"", incarnation: int = 5) -> messages.Piece:
        return messages.Piece(rank=1, incarnation=incarnation, number=number, of=of, data=data)

    for parts in (
        [piece(1, 2)], [piece(0, 3), piece(2, 3)], [piece(0, 2), piece(1, 3)], [piece(0, 2), piece(1, 2, incarnation=6)],
        [piece(0, 100)], [piece(0, 2, whole), piece(1, 2, b"more")], [piece(0, 2, whole), piece(1, 2, incarnation=7)],
        [piece(0, 1, messages.encode(key, piece(0, 1, whole)))], [piece(0, 1, whole, 7)],
    ):  # fmt: skip
        pieces = messages.Pieces(key, 1 << 20)
        assert [pieces.add(part) for part in parts[:-1]] == [None] * (len(parts) - 1)
        with pytest.raises(DescriptorError):
            pieces.add(parts[-1])
        assert pieces._data == []
        assert pieces.add(piece(0, 1, whole)) is not None
