"""The messages of decoders and prefillers: there and back, and whatever else the bytes are."""

from __future__ import annotations

import math
import struct
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aiotransfer.engine.runtime.arguments import RESERVED
from aiotransfer.errors import DescriptorError
from aiotransfer.kv.protocol import messages

NUMBERS = st.integers(0, 2**64 - 1)
TEXT = st.text(max_size=40)
VALUES = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | TEXT | st.lists(st.none() | st.integers(0, 99), max_size=4)
LAYOUTS = st.dictionaries(st.text(max_size=12), VALUES, max_size=6)


@st.composite
def reservations(draw: st.DrawFn) -> messages.Reserve:
    tokens = draw(st.integers(0, messages.MOST_TOKENS))
    return messages.Reserve(
        draw(NUMBERS), draw(st.text(min_size=1, max_size=messages.MOST_ID)), draw(LAYOUTS),
        draw(st.lists(st.binary(max_size=80), min_size=1, max_size=4)), draw(st.binary(max_size=80)),
        bytes(4 * draw(st.integers(0, 20))), tokens, draw(st.integers(0, tokens)),
        draw(st.integers(0, messages.MOST_IMM)), draw(st.integers(-(2**31), 2**31 - 1)),
        draw(st.floats(0, 1e9) | st.just(math.inf)), draw(st.booleans()), draw(st.binary(max_size=100)),
        draw(st.text(max_size=messages.MOST_INSTANCE)),
    )  # fmt: skip


MESSAGES = st.one_of(
    reservations(),
    st.builds(messages.Reserved, NUMBERS, LAYOUTS),  # flat values, see `messages.Plain`
    st.builds(messages.Refused, NUMBERS, TEXT, TEXT, TEXT, VALUES, VALUES),
    st.builds(messages.Cancel, NUMBERS, TEXT),
    st.builds(messages.Failed, NUMBERS, TEXT, st.booleans()),
)
RESERVE = messages.Reserve(7, "a", {"layers": 1}, [b"pool"], b"tail", bytes(16), 20, 4, 9, 0, 1.5, False, b"prompt")


def parse(data: bytes) -> Any:
    """Anything is a message or a `DescriptorError`; and whoever sent it can be answered if it has a header."""
    number = messages.number(data)
    assert (number is None) == (len(data) < 13)
    try:
        message = messages.decode(data)
    except DescriptorError:
        return None
    assert message.number == number
    return message


def replaced(message: messages.Reserve, **other: Any) -> bytes:
    return messages.encode(msgspec.structs.replace(message, **other))


@settings(max_examples=200)
@given(MESSAGES)
def test_what_is_encoded_is_decoded(message: Any) -> None:
    data = messages.encode(message)
    assert messages.decode(data) == message
    assert type(messages.decode(data)) is type(message)
    assert messages.number(data) == message.number
    assert data[:4] == (messages.TO_PREFILLER if isinstance(message, messages.Reserve | messages.Cancel) else messages.TO_DECODER)


@settings(max_examples=300)
@given(st.binary(max_size=200))
@example(b"")
@example(messages.TO_PREFILLER)
def test_any_bytes_are_a_message_or_a_descriptor_error(data: bytes) -> None:
    parse(data)


@settings(max_examples=300)
@given(st.sampled_from([messages.TO_PREFILLER, messages.TO_DECODER]), NUMBERS, st.binary(max_size=200))
@example(messages.TO_DECODER, 0, b"\xdd\xff\xff\xff\xff")  # an array of four billion
@example(messages.TO_PREFILLER, 0, b"\x91" * 190)
def test_any_body_behind_a_header_is_a_message_or_a_descriptor_error(mark: bytes, number: int, body: bytes) -> None:
    parse(struct.pack("<4sBQ", mark, messages.VERSION, number) + body)


@settings(max_examples=300)
@given(MESSAGES, st.data())
def test_a_damaged_message_is_a_message_or_a_descriptor_error(message: Any, data: st.DataObject) -> None:
    whole = bytearray(messages.encode(message))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    parse(bytes(whole))
    parse(bytes(whole[: data.draw(st.integers(0, len(whole)))]))


@settings(max_examples=200)
@given(
    st.sampled_from([messages.TO_PREFILLER, messages.TO_DECODER]), st.integers(0, 9), st.lists(VALUES | st.floats(), max_size=14)
)
def test_values_of_any_types_in_the_place_of_fields_are_a_message_or_a_descriptor_error(
    mark: bytes, tag: int, values: list[Any]
) -> None:
    parse(struct.pack("<4sBQ", mark, messages.VERSION, 1) + msgspec.msgpack.encode([tag, 1, *values]))


@pytest.mark.parametrize(
    "value",
    [[[1]], [["deep"]], {"a": 1}, ["text"], [1.5], b"bytes"],
    ids=["a list in a list", "a text in that", "a mapping", "a text in a list", "a fraction in a list", "bytes"],
)
@pytest.mark.parametrize("tag", [1, 2, 3])
def test_what_is_nested_or_of_another_kind_in_a_flat_value_is_refused(tag: int, value: Any) -> None:
    layout = {"layers": value}
    number, id, _, *rest = msgspec.structs.astuple(RESERVE)
    body = {1: [number, id, layout, *rest], 2: [7, layout], 3: [7, "layout", "text", "layers", value, None]}[tag]
    mark = messages.TO_PREFILLER if tag == 1 else messages.TO_DECODER
    data = struct.pack("<4sBQ", mark, messages.VERSION, 7) + msgspec.msgpack.encode([tag, *body])
    with pytest.raises(DescriptorError, match="no message of the KV protocol: "):
        messages.decode(data)


@pytest.mark.parametrize("mark", [messages.TO_PREFILLER, messages.TO_DECODER])
@pytest.mark.parametrize("place", range(1, 14))
def test_a_value_of_ten_thousand_levels_is_refused_wherever_it_stands(mark: bytes, place: int) -> None:
    good = msgspec.msgpack.encode(7)
    deep = b"\x91" * 10_000 + b"\x90"
    for tag in range(1, 6):
        body = b"\xdc\x00\x0f" + msgspec.msgpack.encode(tag) + good * (place - 1) + deep + good * (14 - place)
        assert parse(struct.pack("<4sBQ", mark, messages.VERSION, 7) + body) is None
        keyed = b"\x81" + msgspec.msgpack.encode("layers") + deep
        body = b"\xdc\x00\x0f" + msgspec.msgpack.encode(tag) + good * (place - 1) + keyed + good * (14 - place)
        assert parse(struct.pack("<4sBQ", mark, messages.VERSION, 7) + body) is None


@pytest.mark.parametrize("make", [lambda text: messages.Refused(7, "busy", text), lambda text: messages.Failed(7, text)])
def test_a_long_text_is_cut_by_its_sender_and_refused_by_its_receiver(make: Any) -> None:
    sent = messages.decode(messages.encode(make("x" * 100_000)))
    assert isinstance(sent, messages.Refused | messages.Failed)
    assert len(sent.text) == messages.MOST_TEXT
    with pytest.raises(DescriptorError, match="too long"):
        body = msgspec.msgpack.encode(make("x" * (messages.MOST_TEXT + 1)))
        messages.decode(struct.pack("<4sBQ", messages.TO_DECODER, messages.VERSION, 7) + body)


def test_the_immediates_that_may_be_named_are_those_that_can_be_written() -> None:
    assert messages.MOST_IMM == RESERVED - 1


@given(MESSAGES)
def test_a_message_cut_short_is_none(message: Any) -> None:
    data = messages.encode(message)
    for length in range(0, len(data), max(1, len(data) // 20)):
        assert parse(data[:length]) is None
    assert parse(data + b"\x00") is None


@given(MESSAGES)
def test_a_message_for_one_side_is_none_for_the_other(message: Any) -> None:
    data = messages.encode(message)
    other = messages.TO_DECODER if data[:4] == messages.TO_PREFILLER else messages.TO_PREFILLER
    assert parse(other + data[4:]) is None


@given(MESSAGES, st.integers(0, 255).filter(lambda version: version != messages.VERSION))
def test_another_version_is_refused_by_name_and_can_be_answered(message: Any, version: int) -> None:
    data = messages.encode(message)
    data = data[:4] + bytes([version]) + data[5:]
    with pytest.raises(DescriptorError, match=f"version {version} .* not {messages.VERSION}"):
        messages.decode(data)
    assert messages.number(data) == message.number


def test_two_numbers_are_refused() -> None:
    data = messages.encode(RESERVE)
    with pytest.raises(DescriptorError, match="two numbers"):
        messages.decode(data[:5] + struct.pack("<Q", 8) + data[13:])


@pytest.mark.parametrize(
    "other",
    [
        {"id": "x" * (messages.MOST_ID + 1)}, {"id": ""}, {"instance": "x" * (messages.MOST_INSTANCE + 1)}, {"priority": 1 << 31},
        {"priority": -(1 << 31) - 1}, {"page_ids": bytes(7)}, {"page_ids": bytes(4 * messages.MOST_PAGES + 4)}, {"pages": []},
        {"pages": [b""] * 1025}, {"tokens": -1},
        {"tokens": messages.MOST_TOKENS + 1}, {"skip_tokens": -1}, {"skip_tokens": 21}, {"imm": -1},
        {"imm": messages.MOST_IMM + 1},
        {"seconds": -0.5}, {"seconds": math.nan}, {"seconds": -math.inf},
    ],
    ids=lambda other: next(iter(other)),
)  # fmt: skip
def test_a_reservation_that_makes_no_sense_is_refused(other: dict[str, Any]) -> None:
    with pytest.raises(DescriptorError, match="makes no sense"):
        messages.decode(replaced(RESERVE, **other))


@pytest.mark.parametrize(
    "other",
    [
        {"page_ids": bytes(4 * messages.MOST_PAGES)}, {"pages": [b""] * 1024}, {"seconds": math.inf},
        {"tokens": messages.MOST_TOKENS}, {"id": "x" * messages.MOST_ID},
        {"instance": "x" * messages.MOST_INSTANCE}, {"priority": -(1 << 31)}, {"imm": messages.MOST_IMM},
    ],
    ids=lambda other: next(iter(other)),
)  # fmt: skip
def test_the_bounds_of_a_reservation_lie_within(other: dict[str, Any]) -> None:
    assert messages.decode(replaced(RESERVE, **other)) == msgspec.structs.replace(RESERVE, **other)
