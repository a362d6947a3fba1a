"""Layouts from torch beside what torch really puts into each rank's local tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from aiotransfer.weights import Layout, Piece, PlanError, Tensor, layout_of, make_plan, memory_of
from tests.weights.replay import check, replay

pytestmark = pytest.mark.demo
torch = pytest.importorskip("torch", reason="make test-demo installs torch")


@contextmanager
def rank_of(rank: int, world: int) -> Iterator[None]:
    """This process as a rank of a group that never communicates."""
    dist = pytest.importorskip("torch.distributed")
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    dist.init_process_group("fake", rank=rank, world_size=world, store=fake.FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


class Model(torch.nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(10, 12)
        self.b = torch.nn.Linear(12, 7, bias=False)
        self.odd = torch.nn.Linear(10, 7, bias=False)
        self.embed = torch.nn.Embedding(13, 12)
        self.head = torch.nn.Linear(12, 13, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.arange(3, dtype=torch.float32))


def model() -> Any:
    torch.manual_seed(0)
    return Model()


def whole(made: Any) -> dict[str, np.ndarray[Any, Any]]:
    return {name: thing.detach().numpy().copy() for name, thing in made.state_dict().items()}


def local_part(layout: Layout, piece: int, memory: dict[str, Any]) -> Any:
    name, ndim = layout.names[layout.piece_tensor[piece]], len(layout.shapes[layout.piece_tensor[piece]])
    part = memory[name]._local_tensor if hasattr(memory[name], "_local_tensor") else memory[name].detach()
    strides = (layout.piece_strides[piece, :ndim] // 4).tolist()
    at = part.storage_offset() + int(layout.piece_offset[piece]) // 4
    return torch.as_strided(part.detach(), layout.piece_extent[piece, :ndim].tolist(), strides, at).numpy()


def box_of(layout: Layout, piece: int) -> tuple[slice, ...]:
    ndim = len(layout.shapes[layout.piece_tensor[piece]])
    return tuple(map(slice, layout.piece_start[piece, :ndim], layout.piece_stop[piece, :ndim]))


def compare(world: int, place: Callable[[Any], Any]) -> Layout:
    """Every rank derives the same layout, and each of its pieces is what the rank holds."""
    first = None
    for rank in range(world):
        with rank_of(rank, world):
            made = model()
            values = whole(made)
            placed = place(made)
            layout = layout_of(placed)
            layout.check()
            first = first or layout
            assert layout == first
            memory = memory_of(placed)
            bound = layout.bind(rank, memory)
            assert bound.moved() == []
            for piece in np.flatnonzero(layout.piece_rank == rank).tolist():
                name = layout.names[layout.piece_tensor[piece]]
                np.testing.assert_array_equal(local_part(layout, piece, memory), values[name][box_of(layout, piece)])
    assert first is not None
    return first


@pytest.mark.parametrize(("world", "shards"), [(3, 3), (4, 2), (6, 3)])
def test_fsdp_over_tensor_parallel_with_uneven_shards_is_where_torch_puts_it(world: int, shards: int) -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    parallel = pytest.importorskip("torch.distributed.tensor.parallel")

    def place(made: Any) -> Any:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (shards, world // shards), mesh_dim_names=("dp", "tp"))
        plan = {"a": parallel.ColwiseParallel(), "b": parallel.RowwiseParallel(), "odd": parallel.ColwiseParallel()}
        parallel.parallelize_module(made, mesh["tp"], plan, src_data_rank=None)
        fsdp.fully_shard(made, mesh=mesh["dp"])
        return made

    layout = compare(world, place)
    assert layout.aliases == {"head.weight": layout.find("embed.weight")}
    values = whole(model())
    plan = make_plan(layout, layout, staging_bytes=4096)
    memory, counts = replay(plan, values)["inference"]
    check(layout, memory, counts, values)


@pytest.mark.parametrize("kind", ["shard 1", "twice", "strided", "replicated"])
def test_any_mix_of_placements_is_where_torch_puts_it(kind: str) -> None:
    tensor = pytest.importorskip("torch.distributed.tensor")
    strided = tensor.placement_types._StridedShard
    placements = {
        "shard 1": (tensor.Replicate(), tensor.Shard(1)), "twice": (tensor.Shard(0), tensor.Shard(0)),
        "strided": (strided(0, split_factor=3), tensor.Replicate()), "replicated": (tensor.Replicate(), tensor.Replicate()),
    }[kind]  # fmt: skip

    def place(made: Any) -> Any:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2, 3))
        value = torch.arange(77, dtype=torch.float32).reshape(11, 7)
        return {"w": tensor.distribute_tensor(value, mesh, placements, src_data_rank=None)}

    for rank in range(6):
        with rank_of(rank, 6):
            placed = place(None)
            layout = layout_of(placed)
            layout.check()
            value = np.arange(77, dtype=np.float32).reshape(11, 7)
            for piece in np.flatnonzero(layout.piece_rank == rank).tolist():
                np.testing.assert_array_equal(local_part(layout, piece, placed), value[box_of(layout, piece)])


def locals_of(values: dict[str, Any], shape: tuple[int, ...], placements: dict[str, Any]) -> tuple[Layout, list[dict[str, Any]]]:
    """The layout of tensors that torch distributes over a mesh, and what torch gives to each rank."""
    tensor = pytest.importorskip("torch.distributed.tensor")
    layout, every = None, []
    world = int(np.prod(shape))
    for rank in range(world):
        with rank_of(rank, world):
            mesh = torch.distributed.device_mesh.init_device_mesh("cpu", shape)
            made = {n: tensor.distribute_tensor(v, mesh, placements[n], src_data_rank=None) for n, v in values.items()}
            layout = layout_of(made)
            every.append({n: x.to_local().clone() for n, x in made.items()})
    assert layout is not None
    return layout, every


@pytest.mark.parametrize("seed", range(5))
def test_any_mesh_to_any_other_gives_each_rank_what_torch_would_give_it(seed: int) -> None:
    tensor = pytest.importorskip("torch.distributed.tensor")
    random = np.random.default_rng(seed)
    kinds = [tensor.Shard(0), tensor.Shard(1), tensor.Replicate(), tensor.placement_types._StridedShard(0, split_factor=2)]
    values = {
        f"t{k}": torch.from_numpy(random.standard_normal((int(random.integers(1, 12)), int(random.integers(1, 9))), np.float32))
        for k in range(4)
    }
    sides = []
    for shape in ((3, 2), (2, 2)):
        pairs = [(a, b) for a in range(4) for b in range(4) if (a, b) != (3, 0)]  # that is how FSDP2 says something else
        placements = {name: tuple(kinds[k] for k in pairs[random.integers(len(pairs))]) for name in values}
        sides.append(locals_of(values, shape, placements))
    (trainer, _), (inference, wanted) = sides
    plan = make_plan(trainer, inference, staging_bytes=4096)
    memory, counts = replay(plan, {name: value.numpy() for name, value in values.items()})["inference"]
    check(inference, memory, counts, {name: value.numpy() for name, value in values.items()})
    for rank, parts in enumerate(wanted):
        for name, part in parts.items():
            if part.numel():
                (buffer,) = (b for b in np.flatnonzero(inference.buffer_rank == rank) if inference.buffer_names[b] == name)
                np.testing.assert_array_equal(memory[buffer].view(np.float32).reshape(part.shape), part.numpy())


def test_pipeline_stages_are_not_taken_for_replicas() -> None:
    tensor = pytest.importorskip("torch.distributed.tensor")
    with rank_of(1, 4):
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
        placed = {"w": tensor.distribute_tensor(torch.zeros(6), mesh["dp"], (tensor.Shard(0),), src_data_rank=None)}
        assert set(layout_of(placed).piece_rank.tolist()) == {0, 1}
        assert set(layout_of(placed, stages=()).piece_rank.tolist()) == {0, 1, 2, 3}


def test_a_sum_that_is_pending_is_refused_by_name() -> None:
    tensor = pytest.importorskip("torch.distributed.tensor")
    with rank_of(0, 2):
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
        pending = tensor.DTensor.from_local(torch.zeros(4), mesh, (tensor.Partial(),), run_check=False)
        with pytest.raises(PlanError, match="pending") as caught:
            layout_of({"w": pending, "v": torch.zeros(2)})
        assert len(caught.value.problems) == 1


def test_plain_tensors_are_replicas_or_the_equal_parts_that_are_named() -> None:
    named = {"x.q": torch.zeros(4, 6), "x.k": torch.zeros(5), "t": torch.zeros(4, 6).t()}
    layout = layout_of(named, ranks=2, shards={"x.{n}": 0})
    layout.check()
    assert layout.shapes == ((8, 6), (10,), (6, 4))
    assert layout.piece_start[layout.piece_tensor == 0].tolist() == [[0, 0], [4, 0]]
    assert layout.piece_strides[layout.piece_tensor == 2].tolist() == [[4, 24], [4, 24]]


def test_memory_that_moves_or_changes_is_noticed() -> None:
    weights = {"w": torch.zeros(4, 6), "n": np.zeros(3, np.float32)}
    tensors = [Tensor("w", (4, 6), "float32"), Tensor("n", (3,), "float32")]
    layout = Layout(tensors, [Piece("w", 0), Piece("n", 0)], ranks=1)
    bound = layout.bind(0, weights)
    before = bound.versions()
    weights["w"].add_(1)
    assert bound.changed(before) == ["w"]
    assert bound.moved() == []
    weights["w"].untyped_storage().resize_(0)
    assert bound.moved() == ["w"]
    with pytest.raises(PlanError) as caught:
        layout.bind(0, {"w": torch.zeros(2, device="meta"), "other": np.zeros(3)})
    assert sorted(caught.value.problems) == [
        "n: no memory for this buffer of rank 0", "other: rank 0 has no such buffer", "w: a meta tensor has no memory",
    ]  # fmt: skip
