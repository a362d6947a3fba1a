"""Messages of weight transfers that are longer than one message of the engine."""

from __future__ import annotations

import numpy as np
import pytest

from aiotransfer.errors import DescriptorError
from aiotransfer.weights import Publisher, Subscriber, layout_of
from aiotransfer.weights.protocol import terms, wire
from aiotransfer.weights.protocol.parts import Parts, parts
from aiotransfer.weights.roles import mail
from tests.weights.party import Party


def test_a_long_message_comes_in_parts_and_in_order() -> None:
    message = wire.Grant(1, "a", 0, [bytes([k % 256]) * 200 for k in range(9000)], [9], "")
    data = wire.encode(message)
    found = [wire.decode(part) for part in parts(7, data)]
    assert len(found) == 4
    assert parts(7, b"x" * terms.PART) == [b"x" * terms.PART]
    joined = Parts()
    assert [joined.add(part) for part in found[:3]] == [None] * 3
    whole = joined.add(found[3])
    assert whole is not None
    assert wire.decode(whole) == message
    for wrong in (found[1:], [found[0], found[2]], [found[0], terms.Part(8, 1, 4, b"")], [found[0], terms.Part(7, 1, 1, b"")]):
        joined = Parts()
        with pytest.raises(DescriptorError, match="does not follow"):
            for part in wrong:
                joined.add(part)
        assert [joined.add(part) for part in found][-1] == whole  # the next one is read again
    with pytest.raises(ValueError, match="longer than"):
        parts(1, bytes(terms.MOST_PARTS * terms.PART + 1))


@pytest.mark.asyncio
async def test_a_grant_of_many_buffers_is_longer_than_one_message(party: Party, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terms, "PART", 1 << 12)
    many = {f"layers.{k}.experts.weight": np.full(3, k, np.float32) for k in range(120)}
    left = await party.stack.enter_async_context(await party.open_engine())
    right = await party.stack.enter_async_context(await party.open_engine())
    await right.connect(left.address)
    sent: list[int] = []

    def counted(serial: int, data: bytes) -> list[bytes]:
        found = parts(serial, data)
        sent.append(len(found))
        return found

    monkeypatch.setattr(mail, "parts", counted)
    target = {name: np.zeros_like(values) for name, values in many.items()}
    async with (
        Publisher(left, layout_of(many)) as publisher,
        Subscriber(right, layout_of(target), instance="a", mode="in_place"),
    ):
        for number in (1, 2):
            async with publisher.publish(number):
                pass
    assert max(sent) > 1
    for name, values in many.items():
        np.testing.assert_array_equal(target[name], values)


@pytest.mark.asyncio
async def test_a_subscriber_allocates_one_piece_of_memory_and_leases_it_as_one(party: Party) -> None:
    many = {f"layers.{k}.weight": np.full(k % 5, k, np.float32) for k in range(60)}
    left = await party.stack.enter_async_context(await party.open_engine())
    right = await party.stack.enter_async_context(await party.open_engine())
    await right.connect(left.address)
    layout = layout_of(many)
    async with Publisher(left, layout) as publisher:
        layout.memory = None
        async with Subscriber(right, layout, instance="a") as subscriber:
            assert len(subscriber.memory._own) == 2
            for number in (1, 2, 3):
                for values in many.values():
                    values += 1
                async with publisher.publish(number):
                    assert len(right._regions) == 2
                for name, values in many.items():
                    np.testing.assert_array_equal(subscriber.tensors[name], values)
