"""Memory that roles are given: whether it is what the layout says, and whether it is still the model's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer.weights import Layout, Piece, PlanError, Publisher, Subscriber, Tensor, layout_of
from tests.weights.party import Party

W = Layout([Tensor("w", (4, 6), "float32")], [Piece("w", 0)], ranks=1)
SQUARE = np.arange(36, dtype=np.float32).reshape(6, 6)


@pytest.mark.parametrize("memory", [
    SQUARE[:4].astype(np.float64), SQUARE[:4].astype(np.int32), SQUARE[:, :4].T, SQUARE[:4, ::-1],
    np.zeros((4, 12), np.float32)[:, ::2], SQUARE[:4, :6][:3], np.zeros((24,), ">f4"), np.zeros(24, object),
], ids=["double", "int", "turned", "backwards", "gaps", "short", "byte order", "objects"])  # fmt: skip
def test_memory_that_is_not_as_the_layout_says_is_refused(memory: Any) -> None:
    with pytest.raises(PlanError, match="w: ") as caught:
        W.bind(0, {"w": memory})
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("memory", [
    SQUARE[:4], np.zeros(96, np.uint8), bytearray(96), np.zeros((24,), np.float32), np.zeros((5, 6), np.float32),
    SQUARE.T[:, :4].T,
], ids=["same", "bytes", "bytearray", "flat", "longer", "turned twice"])  # fmt: skip
def test_memory_that_holds_the_buffer_is_bound(memory: Any) -> None:
    assert W.bind(0, {"w": memory}).moved() == []


def test_arguments_of_bind() -> None:
    for rank in ("0", True, 0.0):
        with pytest.raises(TypeError, match=repr(rank)):
            W.bind(rank, {"w": SQUARE[:4]})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="list"):
        W.bind(0, [SQUARE])  # type: ignore[arg-type]
    with pytest.raises(IndexError, match="no rank 1"):
        W.bind(1, {"w": SQUARE[:4]})


@pytest.mark.demo
def test_a_view_is_bound_as_far_as_it_goes_and_not_to_the_end_of_its_storage() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(PlanError, match="w: 48 bytes of memory for a buffer of 96"):
        W.bind(0, {"w": torch.zeros(100)[:12]})
    with pytest.raises(PlanError, match="w: memory with the strides"):
        W.bind(0, {"w": torch.zeros(6, 4).T})


@pytest.mark.demo
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_memory_that_does_not_hold_its_values_is_refused_by_name() -> None:
    torch = pytest.importorskip("torch")
    turned = torch.ones(3, dtype=torch.complex64).conj()
    with pytest.raises(PlanError) as caught:
        layout_of(
            {
                "good": torch.ones(3), "sparse": torch.eye(3).to_sparse(), "conjugated": turned, "negated": turned.imag,
                "half": torch.zeros(3, dtype=torch.complex32),
            }
        )  # fmt: skip
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["sparse", "conjugated", "negated", "half"]


def test_a_layout_of_arrays() -> None:
    both = np.arange(20, dtype=np.int16)
    arrays = {
        "rows": SQUARE,
        "turned": SQUARE.T,
        "same": SQUARE,
        "even": both[::2],
        "odd": both[1::2],
        "none": np.zeros((0, 3), bool),
        "one": np.array(2.5),
    }
    layout = layout_of(arrays)
    layout.check()
    assert layout.names == ("rows", "turned", "even", "odd", "none", "one")
    assert layout.aliases == {"same": 0}
    assert layout.dtypes == ("float32", "float32", "int16", "int16", "bool", "float64")
    assert layout.memory is not None
    assert layout.bind(0, layout.memory).shared()[0].startswith("rows[0:6, 0:6] on rank 0")
    assert layout_of({"even": both[::2], "odd": both[1::2]}).digest != layout.digest
    for bad in (SQUARE, None, "w", [SQUARE]):
        with pytest.raises(TypeError, match=type(bad).__name__):
            layout_of(bad)
    for wrong, text in (({"w": 3}, "'w' is no tensor"), ({3: SQUARE}, "not 3")):
        with pytest.raises(TypeError, match=text):
            layout_of(wrong)


def test_arguments_of_layout_of() -> None:
    for name, value, error in (
        ("ranks", 0, ValueError), ("ranks", "2", TypeError), ("ranks", [1, 1], ValueError), ("ranks", True, TypeError),
        ("shards", {"nosuch": 0}, PlanError), ("shards", {"w": 5}, PlanError), ("shards", {"w": "0"}, PlanError),
        ("mesh_group", 3, TypeError), ("hosts", ["a", "b"], ValueError),
    ):  # fmt: skip
        with pytest.raises(error):
            layout_of({"w": SQUARE}, **{name: value})


MOVES: dict[str, Callable[[Any, Any], Any]] = {
    "another parameter": lambda m, torch: setattr(m, "weight", torch.nn.Parameter(torch.zeros(3, 3))),
    "another buffer": lambda m, torch: setattr(m, "stat", torch.zeros(2)),
    "loaded in its place": lambda m, torch: m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}, assign=True),
    "deleted": lambda m, torch: delattr(m, "weight"),
    "data": lambda m, torch: setattr(m.weight, "data", torch.zeros(3, 3)),
    "another type and back": lambda m, torch: m.double().float(),
    "on no device": lambda m, torch: m.to("meta"),
}


@pytest.mark.demo
@pytest.mark.parametrize("move", MOVES)
def test_tensors_that_a_module_has_no_more_have_moved(move: str) -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(3, 3)
    model.register_buffer("stat", torch.ones(2))
    layout = layout_of(model)
    bound = layout.bind(0, layout.memory)
    before = [parameter.data for parameter in model.parameters()]
    assert bound.moved() == []
    MOVES[move](model, torch)
    assert bound.moved()
    del before


@pytest.mark.demo
def test_tensors_that_torch_does_not_count_changes_of_are_bound() -> None:
    torch = pytest.importorskip("torch")
    with torch.inference_mode():
        made = {"w": torch.zeros(4, 6)}
    bound = W.bind(0, made)
    assert bound.versions() == {"w": ()}
    assert bound.changed(bound.versions()) == []


@pytest.mark.asyncio
async def test_regions_are_bound_and_stay_the_users(party: Party) -> None:
    left = await party.stack.enter_async_context(await party.open_engine())
    right = await party.stack.enter_async_context(await party.open_engine())
    await right.connect(left.address)
    source, target = left.allocate((4, 6), "float32"), right.allocate((4, 6), "float32")
    source.numpy()[:] = SQUARE[:4]
    publisher = Publisher(left, layout_of({"w": source}))
    subscriber = Subscriber(right, W.bind(0, {"w": target}), instance="a", mode="in_place")
    async with publisher, subscriber:
        async with publisher.publish(1):
            pass
        np.testing.assert_array_equal(target.numpy(), SQUARE[:4])
    target.numpy()[:] = 0
    assert source.numpy()[3, 5] == SQUARE[3, 5]
    source.close()
    target.close()
    with pytest.raises(PlanError, match="w: a region that is closed"):
        W.bind(0, {"w": source})


@pytest.mark.asyncio
async def test_memory_that_would_be_written_twice_is_refused_by_a_subscriber_alone(party: Party) -> None:
    engine = await party.stack.enter_async_context(await party.open_engine())
    flat = np.zeros(10, np.float32)
    layout = layout_of({"a": flat[:6], "b": flat[4:]})
    with pytest.raises(PlanError, match=r"a\[0:6\] on rank 0 .* and b\[0:6\] on rank 0 .* share bytes"):
        Subscriber(engine, layout, instance="a")
    await Publisher(engine, layout).aclose()
    repeated = layout_of({"w": np.broadcast_to(np.float32(1), (4,))})
    with pytest.raises(PlanError, match=r"w\[0:4\] on rank 0 .* has elements on one another"):
        Subscriber(engine, repeated, instance="a")
    flat.flags.writeable = False
    with pytest.raises(at.RegistrationError, match="w may not be written"):
        Subscriber(engine, layout_of({"w": flat}), instance="a", mode="in_place")
    assert not engine._regions


@pytest.mark.asyncio
async def test_arrays_with_gaps_are_written_between_their_gaps(party: Party) -> None:
    left = await party.stack.enter_async_context(await party.open_engine())
    right = await party.stack.enter_async_context(await party.open_engine())
    await right.connect(left.address)
    even, turned = np.zeros(20, np.int16), np.zeros((6, 6), np.float32)
    async with (
        Publisher(left, layout_of({"even": np.arange(10, dtype=np.int16), "turned": SQUARE, "none": SQUARE[:0]})) as publisher,
        Subscriber(
            right, layout_of({"even": even[::2], "turned": turned.T, "none": SQUARE[:0]}), instance="a", mode="in_place"
        ) as subscriber,
    ):
        async with publisher.publish(1):
            pass
        np.testing.assert_array_equal(even[::2], np.arange(10))
        assert not even[1::2].any()
        np.testing.assert_array_equal(turned, SQUARE.T)
        np.testing.assert_array_equal(subscriber.tensors["turned"], SQUARE)
        assert subscriber.tensors["none"].shape == (0, 6)
