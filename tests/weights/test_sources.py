"""Sources and sinks of torch: what changes or moves inside an update ends it, and is never written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer import weights
from tests.weights.party import Party

torch = pytest.importorskip("torch", reason="make test-demo installs torch")
pytestmark = [pytest.mark.demo, pytest.mark.asyncio]


async def model_party(party: Party, **options: Any) -> tuple[Any, weights.Publisher, weights.Subscriber]:
    """A module of torch on one trainer rank, and a subscriber with the same tensors."""
    model = torch.nn.Linear(6, 4)
    layout = weights.layout_of(model, ranks=1)
    left = await party.stack.enter_async_context(await party.open_engine())
    right = await party.stack.enter_async_context(await party.open_engine())
    await right.connect(left.address)
    publisher = await party.stack.enter_async_context(weights.Publisher(left, layout, timeout=20))
    copy = torch.nn.Linear(6, 4)
    inference = weights.layout_of(copy, ranks=1)
    subscriber = await party.stack.enter_async_context(weights.Subscriber(right, inference, instance="a", **options))
    return model, publisher, subscriber


@pytest.mark.parametrize("mode", ["double", "in_place"])
async def test_a_module_of_torch_arrives_bitwise(party: Party, mode: str) -> None:
    model, publisher, subscriber = await model_party(party, mode=mode)
    for number in (1, 2, 3):
        with torch.no_grad():
            model.weight += number
        async with publisher.publish(number):
            pass
        async with subscriber.reading() as version:
            assert version == (1, number)
            assert torch.equal(subscriber.tensors["weight"], model.weight)
            assert torch.equal(subscriber.tensors["bias"], model.bias)


async def test_an_operation_in_place_inside_publish_ends_the_version(party: Party) -> None:
    model, publisher, subscriber = await model_party(party)
    async with publisher.publish(1):
        pass
    with pytest.raises(at.TransferError, match="weight was changed inside publish"):
        async with publisher.publish(2):
            with torch.no_grad():
                model.weight.mul_(2)
    assert subscriber.version == (1, 1)
    async with publisher.publish(3):
        pass
    assert subscriber.version == (1, 3)
    assert torch.equal(subscriber.tensors["weight"], model.weight)


@pytest.mark.parametrize("when", ["before", "inside"])
async def test_a_source_that_moves_ends_the_version(party: Party, when: str) -> None:
    model, publisher, subscriber = await model_party(party)
    async with publisher.publish(1):
        pass
    kept = model.weight.data
    if when == "before":
        model.weight.data = kept.clone()
    with pytest.raises(at.TransferError, match="weight has moved"):
        async with publisher.publish(2):
            model.weight.data = kept.clone()
    assert subscriber.version == (1, 1)
    model.weight.data = kept
    async with publisher.publish(3):
        pass
    assert subscriber.version == (1, 3)


async def test_a_sink_that_has_moved_is_never_written_and_says_so(party: Party) -> None:
    target = torch.zeros(8)
    layout = weights.Layout([weights.Tensor("w", (8,), "float32")], [weights.Piece("w", 0)], ranks=1)
    left = await party.stack.enter_async_context(await party.open_engine())
    right = await party.stack.enter_async_context(await party.open_engine())
    await right.connect(left.address)
    source = {"w": np.arange(8, dtype=np.float32)}
    publisher = await party.stack.enter_async_context(weights.Publisher(left, layout.bind(0, source), timeout=20))
    holder = torch.nn.Parameter(target, requires_grad=False)
    subscriber = await party.stack.enter_async_context(
        weights.Subscriber(right, layout.bind(0, {"w": holder}), instance="a", mode="in_place")
    )
    async with publisher.publish(1):
        pass
    assert torch.equal(target, torch.arange(8.0))
    holder.data = torch.zeros(8)
    source["w"] += 1
    with pytest.raises(weights.UpdateError) as caught:
        async with publisher.publish(2):
            pass
    assert "has moved" in caught.value.missing["a/0"]
    assert subscriber.version == (1, 1)
    assert torch.equal(target, torch.arange(8.0))
    assert not holder.data.any()
