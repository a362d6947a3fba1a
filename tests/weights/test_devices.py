"""Weights on a GPU that no rail reaches: a driver of ours, whose memory crashes what touches it from the host."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer import weights
from aiotransfer.engine.memory.views import memory_of
from aiotransfer.weights import Cast, Layout, Piece, PlanError, Quantise, Tensor, Transpose
from aiotransfer.weights.kernels import numbers, quantise
from aiotransfer.weights.memory.devices import DeviceBuffer, torch_bytes
from aiotransfer.weights.publisher import work
from tests.engine.gpu import Gpu, build
from tests.weights.party import Party

pytestmark = pytest.mark.asyncio
TENSORS = (Tensor("w", (40, 24), "float32"), Tensor("norm", (24,), "float32"), Tensor("none", (0, 3), "float32"))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = build("fake_cuda", tmp_path_factory.mktemp("cuda"))
    Gpu(library).array(0)  # its memory lives as long as the process: before anything is counted
    return library


@pytest.fixture(autouse=True)  # before any engine, so that it ends after all of them
def gpu(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    monkeypatch.setenv("AIOTRANSFER_LIBCUDA", str(library))
    gpu = Gpu(library)
    yield gpu
    gpu.slow_us = 0
    assert gpu.calls("cuMemHostRegister") == gpu.calls("cuMemHostUnregister"), "memory stayed pinned"
    assert gpu.calls("cuMemAlloc") == gpu.calls("cuMemFree"), "memory of the GPU was not given back"


class Side:
    """The buffers of one rank on the GPU, and their bytes as only that sees them."""

    def __init__(self, gpu: Gpu, layout: Layout, rank: int = 0, *, host: Sequence[str] = ()) -> None:
        self.layout, self.rank = layout, rank
        self.memory: dict[str, Any] = {}
        self.seen: dict[str, Any] = {}
        for name, nbytes in layout.buffers_of(rank).items():
            if name in host:
                self.memory[name] = self.seen[name] = np.zeros(nbytes, np.uint8)
            else:
                self.memory[name], self.seen[name] = gpu.array(nbytes)

    @property
    def bound(self) -> weights.Bound:
        return self.layout.bind(self.rank, self.memory)

    def set(self, **values: Any) -> None:
        for name, value in values.items():
            self.seen[name][:] = np.ascontiguousarray(value).reshape(-1).view(np.uint8)


def whole(tensors: Sequence[Tensor] = TENSORS, **pieces: Any) -> Layout:
    return Layout(tensors, [Piece(t.name, 0) for t in tensors if 0 not in t.shape], ranks=1, **pieces)


def values(number: int) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    return {"w": rng.normal(size=(40, 24)).astype(np.float32), "norm": rng.normal(size=24).astype(np.float32)}


def on_gpu(gpu: Gpu, subscriber: weights.Subscriber, name: str) -> Any:
    """The bytes of a tensor that readers see."""
    interface = subscriber.tensors[name].__cuda_array_interface__
    nbytes = int(np.prod(interface["shape"])) * np.dtype(interface["typestr"]).itemsize
    return gpu.seen(interface["data"][0], nbytes).view(interface["typestr"]).reshape(interface["shape"])


def equal(gpu: Gpu, subscriber: weights.Subscriber, wanted: dict[str, Any]) -> bool:
    return all(np.array_equal(on_gpu(gpu, subscriber, name), value) for name, value in wanted.items())


async def publisher(party: Party, bound: Any, **options: Any) -> weights.Publisher:
    engine = await party.stack.enter_async_context(await party.open_engine(name="trainer"))
    return await party.stack.enter_async_context(weights.Publisher(engine, bound, **{"timeout": 20, **options}))


async def subscriber(party: Party, leader: weights.Publisher, layout: Any, name: str = "a", **options: Any) -> weights.Subscriber:
    engine = await party.stack.enter_async_context(await party.open_engine(name=name))
    await engine.connect(leader.engine.address)
    return await party.stack.enter_async_context(weights.Subscriber(engine, layout, instance=name, **options))


async def publish(role: weights.Publisher, number: int) -> None:
    async with role.publish(number):
        pass


@pytest.mark.parametrize("mode", ["double", "in_place"])
async def test_versions_go_from_gpu_to_gpu_by_host_memory(party: Party, gpu: Gpu, mode: str) -> None:
    source, target = Side(gpu, whole()), Side(gpu, whole(), host=["norm"])
    trainer = await publisher(party, source.bound, staging_bytes=2048, checksum=True)
    role = await subscriber(party, trainer, target.bound, mode=mode)
    for number in (1, 2, 3):
        wanted = values(number)
        source.set(**wanted)
        await publish(trainer, number)
        async with role.reading() as version:
            assert version == (1, number)
            assert np.array_equal(on_gpu(gpu, role, "w"), wanted["w"])
            assert np.array_equal(role.tensors["norm"], wanted["norm"])
        first = target.seen["w"].view(np.float32).reshape(40, 24)
        assert np.array_equal(first, wanted["w"]) == (mode == "in_place" or number == 2), "the two sets take turns"
    assert trainer.staging_held <= 2048
    assert trainer.records[-1].staging_peak <= 2048


async def test_what_is_cast_quantised_or_turned_comes_right_from_a_gpu(party: Party, gpu: Gpu) -> None:
    trained = [Tensor(name, (40, 24), "float32") for name in ("half", "turned", "codes", "same")]
    half, turned = Tensor("half", (40, 24), "float16"), Tensor("turned", (24, 40), "float32")
    codes, scales = Tensor("codes", (40, 24), "float8_e4m3fn"), Tensor("scales", (5, 3), "float32")
    source, target = Side(gpu, whole(trained)), Side(gpu, whole([half, turned, codes, scales, trained[3]]))
    rules = [Cast("half"), Transpose("turned"), Quantise("codes", "scales", (8, 8))]
    trainer = await publisher(party, source.bound, rules=rules, staging_bytes=1 << 13)
    role = await subscriber(party, trainer, target.bound)
    made = {tensor.name: np.random.default_rng(k).normal(size=(40, 24)).astype(np.float32) for k, tensor in enumerate(trained)}
    source.set(**made)
    await publish(trainer, 1)
    small, per = np.empty((40, 24), np.uint8), np.empty((5, 3), np.float32)
    quantise(numbers(small, "float8_e4m3fn"), per, made["codes"], (8, 8))
    wanted = {"half": made["half"].astype(np.float16), "turned": made["turned"].T, "codes": small, "scales": per}
    wanted["same"] = made["same"]
    assert equal(gpu, role, wanted)
    made["codes"][3, 4] = np.inf
    source.set(codes=made["codes"])
    with pytest.raises(weights.UpdateError, match=r"codes: inf at \(3, 4\)"):
        await publish(trainer, 2)
    assert role.version == (1, 1)
    assert equal(gpu, role, wanted)


@pytest.mark.parametrize(("staging_bytes", "fits"), [(1 << 12, True), (1 << 16, True), (2400, False)])
async def test_a_block_that_a_shards_edge_cuts_is_lent_by_a_copy(
    party: Party, gpu: Gpu, staging_bytes: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fits:
        monkeypatch.setattr(work, "LENT", 4)  # nothing is left for what is lent
    trained = [Tensor("w", (40, 24), "float32")]
    tensors = [Tensor("w", (40, 24), "float8_e4m3fn"), Tensor("s", (5, 3), "float32")]
    edges = [0, 13, 20, 40]
    rows = [Piece("w", r, (a, 0), (b - a, 24)) for r, (a, b) in enumerate(itertools.pairwise(edges))]
    layout = Layout(trained, rows, ranks=3)
    engines = [await party.stack.enter_async_context(await party.open_engine(name=f"trainer {r}")) for r in range(3)]
    members, made = [str(engine.address) for engine in engines], values(1)["w"]
    roles = []
    for rank, engine in enumerate(engines):
        side = Side(gpu, layout, rank)
        side.set(w=made[edges[rank] : edges[rank + 1]])
        role = weights.Publisher(engine, side.bound, group=engine.group(members), rules=[Quantise("w", "s", (8, 8))],
                                 staging_bytes=staging_bytes, timeout=20, checksum=True)  # fmt: skip
        roles.append(await party.stack.enter_async_context(role))
    found = await subscriber(party, roles[0], Side(gpu, whole(tensors)).bound)
    codes, scales = np.empty((40, 24), np.uint8), np.empty((5, 3), np.float32)
    quantise(numbers(codes, "float8_e4m3fn"), scales, made, (8, 8))
    for number in (1, 2):
        results = await asyncio.gather(*(publish(role, number) for role in roles), return_exceptions=True)
        if not fits:
            assert all(isinstance(result, weights.UpdateError) for result in results), results
            assert any("staging_bytes must be" in str(result) for result in results), results
            continue
        assert results == [None, None, None]
        assert equal(gpu, found, {"w": codes, "s": scales})
    assert all(role.staging_held <= staging_bytes for role in roles)


async def test_a_training_step_that_has_not_ended_is_waited_for(party: Party, gpu: Gpu) -> None:
    source = Side(gpu, whole())
    trainer = await publisher(party, source.bound)
    role = await subscriber(party, trainer, whole())
    gpu.launch(source.memory["norm"], 7)
    await publish(trainer, 1)
    assert (role.tensors["norm"].view(np.uint8) == 7).all()


@pytest.mark.parametrize("mode", ["double", "in_place"])
async def test_a_forward_step_that_still_uses_the_memory_is_waited_for(party: Party, gpu: Gpu, mode: str) -> None:
    target = Side(gpu, whole())
    trainer = await publisher(party, whole().bind(0, {name: np.full_like(x, 7) for name, x in values(0).items()}))
    role = await subscriber(party, trainer, target.bound, mode=mode)
    if mode == "double":
        await publish(trainer, 1)
    gpu.launch(target.memory["norm"], 9)
    await publish(trainer, 2)
    await role.memory._devices.finished()  # type: ignore[attr-defined]
    assert (on_gpu(gpu, role, "norm") == 7).all()


async def test_nothing_but_tensors_is_written_on_the_gpu(party: Party, gpu: Gpu) -> None:
    tensors = [Tensor("w", (4, 6), "float32")]
    pieces = [Piece("w", 0, (0, 0), (4, 3), "b", 8, (32, 4)), Piece("w", 0, (0, 3), (4, 3), "b", 200, (12, 4))]
    gaps = Layout(tensors, pieces, ranks=1, buffers={(0, "b"): 300})
    source, target = Side(gpu, whole(tensors)), Side(gpu, gaps)
    trainer = await publisher(party, source.bound)
    role = await subscriber(party, trainer, target.bound, mode="in_place")
    target.seen["b"][:] = 0xEE
    wanted = np.arange(24, dtype=np.float32).reshape(4, 6)
    source.set(w=wanted)
    await publish(trainer, 1)
    left, right = (gpu.seen(x.__cuda_array_interface__["data"][0], 108).copy() for x in role.tensors["w"])
    assert [x.shape for x in role.tensors["w"]] == [(4, 3), (4, 3)]
    assert np.array_equal(np.ndarray((4, 3), np.float32, left.data, 0, role.tensors["w"][0].strides), wanted[:, :3])
    assert np.array_equal(np.ndarray((4, 3), np.float32, right.data, 0, (12, 4)), wanted[:, 3:])
    untouched = np.ones(300, bool)
    for row in range(4):
        untouched[8 + 32 * row :][:12] = False
    untouched[200:248] = False
    assert (target.seen["b"][untouched] == 0xEE).all()


@pytest.mark.parametrize("mode", ["double", "in_place"])
async def test_until_all_has_come_nothing_is_stored_on_the_gpu(
    party: Party, gpu: Gpu, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = Side(gpu, whole()), Side(gpu, whole())
    trainer = await publisher(party, source.bound, staging_bytes=2048)
    over, real = threading.Event(), DeviceBuffer.read_runs
    role = await subscriber(party, trainer, target.bound, mode=mode, on_record=lambda record: over.set())
    source.set(**values(1))
    await publish(trainer, 1)
    source.set(**values(2))
    over.clear()
    seen: list[None] = []

    def second_part(buffer: DeviceBuffer, runs: Any) -> None:
        seen.append(None)
        if len(seen) > 1:
            assert over.wait(20)
        real(buffer, runs)

    monkeypatch.setattr(DeviceBuffer, "read_runs", second_part)
    with pytest.raises(ValueError, match="given up"):
        await given_up(trainer, 2, lambda: len(seen) > 1)
    monkeypatch.setattr(DeviceBuffer, "read_runs", real)
    assert over.wait(20)
    assert role.version == ((1, 1) if mode == "double" else None)
    assert equal(gpu, role, values(1))
    late = await subscriber(party, trainer, Side(gpu, whole()).bound, "late")
    with pytest.raises(at.TransferTimeout):  # the host's copy is neither of the versions, and is not lent
        await late.ready(timeout=0.3)
    await publish(trainer, 3)
    for one in (role, late):
        assert one.version == (1, 3)
        assert equal(gpu, one, values(2))


async def given_up(role: weights.Publisher, number: int, when: Callable[[], bool]) -> None:
    async with role.publish(number):
        while not when():
            await asyncio.sleep(0.001)
        raise ValueError("given up")


async def test_a_part_of_the_names_leaves_the_others_as_they_are(party: Party, gpu: Gpu) -> None:
    source, target = Side(gpu, whole()), Side(gpu, whole())
    trainer = await publisher(party, source.bound)
    role = await subscriber(party, trainer, target.bound)
    source.set(**values(1))
    await publish(trainer, 1)
    await trainer.aclose()
    part = await party.stack.enter_async_context(
        weights.Publisher(trainer.engine, source.bound, names=["norm"], timeout=20)
    )
    for number, spoil in ((2, False), (3, True), (4, False)):
        if spoil:  # as a version that was given up leaves it
            memory_of(role.memory.shadow["w"])[:] = 0xEE
            role.memory._is_copy = False  # type: ignore[attr-defined]
        source.set(**values(number))
        await publish(part, number)
        assert role.version == (2, number)
        assert equal(gpu, role, {"w": values(1)["w"], "norm": values(number)["norm"]})


async def test_an_instance_on_a_gpu_feeds_one_that_is_late_and_is_saved(party: Party, gpu: Gpu, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    from aiotransfer.weights.checkpoint import open_checkpoint, save

    source, target, other = (Side(gpu, whole()) for _ in range(3))
    trainer = await publisher(party, source.bound)
    role = await subscriber(party, trainer, target.bound)
    source.set(**values(1))
    await publish(trainer, 1)
    late = await subscriber(party, trainer, other.bound, "late")
    assert await late.ready(timeout=20) == (1, 1)
    assert equal(gpu, late, values(1))
    assert await save(late, tmp_path / "model.safetensors") == (1, 1)
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    again = await publisher(party, checkpoint, epoch=5)
    engine = await party.stack.enter_async_context(await party.open_engine(name="host"))
    await engine.connect(again.engine.address)
    plain = await party.stack.enter_async_context(weights.Subscriber(engine, checkpoint.layout, instance="host"))
    await publish(again, 2)
    assert all(np.array_equal(plain.tensors[name], value) for name, value in values(1).items())
    with pytest.raises(at.ConfigurationError, match="on a GPU, where no rail reaches them"):
        async with trainer.publish(2):
            await save(trainer, tmp_path / "trained.safetensors")
    assert role.version == (1, 1)


@pytest.mark.parametrize("call", ["cuMemcpyDtoHAsync", "cuMemcpyHtoDAsync", "cuCtxSynchronize"])
async def test_what_the_driver_refuses_ends_the_version_by_name(
    party: Party, gpu: Gpu, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = Side(gpu, whole()), Side(gpu, whole())
    trainer = await publisher(party, source.bound)
    role = await subscriber(party, trainer, target.bound)
    source.set(**values(1))
    await publish(trainer, 1)
    monkeypatch.setenv("FAKE_CUDA_FAIL", call)
    with pytest.raises(weights.UpdateError, match=f"{call}.* was refused by the CUDA driver"):
        await publish(trainer, 2)
    monkeypatch.delenv("FAKE_CUDA_FAIL")
    assert role.version == (1, 1)
    assert equal(gpu, role, values(1))
    await publish(trainer, 3)
    assert role.version == (1, 3)


async def test_host_memory_that_a_lost_peer_may_still_write_into_is_replaced(party: Party, gpu: Gpu) -> None:
    source, target = Side(gpu, whole()), Side(gpu, whole())
    trainer = await publisher(party, source.bound)
    role = await subscriber(party, trainer, target.bound, mode="in_place")
    source.set(**values(1))
    await publish(trainer, 1)
    before = memory_of(role.memory.shadow["w"]).ctypes.data
    role.stopped.spoil([])
    assert memory_of(role.memory.shadow["w"]).ctypes.data != before
    assert role.memory.stale
    source.set(**values(2))
    await publish(trainer, 2)
    assert role.version == (1, 2)
    assert equal(gpu, role, values(2))
    before = memory_of(role.memory.shadow["w"]).ctypes.data
    await role.memory.leave_shadow()
    assert memory_of(role.memory.shadow["w"]).ctypes.data != before
    assert np.array_equal(memory_of(role.memory.shadow["w"]).view(np.float32), values(2)["w"].reshape(-1))


@pytest.mark.demo
async def test_bytes_of_torch_tensors_are_seen_as_they_lie() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    storage = torch.arange(24, dtype=torch.int16)
    part = storage[4:20].view(torch.bfloat16)
    assert torch_bytes(part, 32).tolist() == storage.view(torch.uint8)[8:40].tolist()
    assert torch_bytes(storage.untyped_storage(), 48).data_ptr() == storage.data_ptr()
    torch_bytes(part, 32)[0] = 77
    assert storage[4] == 77


async def test_memory_that_no_driver_knows_is_refused_before_anything_moves(party: Party, gpu: Gpu) -> None:
    source, target = Side(gpu, whole()), Side(gpu, whole())
    trainer = await publisher(party, source.bound)
    for wrong, why in ((0x1000, "w: cuPointerGetAttribute"), (0x600000000000, "w: the memory at .* is managed")):
        array, _ = gpu.array(40 * 24 * 4)
        array.__cuda_array_interface__["data"] = (wrong, False)
        bound = whole().bind(0, {**target.memory, "w": array})
        for role in (lambda e, b=bound: weights.Publisher(e, b), lambda e, b=bound: weights.Subscriber(e, b, instance="a")):
            engine = await party.stack.enter_async_context(await party.open_engine())
            with pytest.raises(at.RegistrationError, match=why):
                role(engine)
            await engine.aclose()
    array, _ = gpu.array(40 * 24 * 4)
    array.__cuda_array_interface__["data"] = (array.__cuda_array_interface__["data"][0], True)
    with pytest.raises(at.RegistrationError, match="the memory of w may not be written"):
        await subscriber(party, trainer, whole().bind(0, {**target.memory, "w": array}))
    gaps, _ = gpu.array((40, 24), "<f4")
    gaps.__cuda_array_interface__["strides"] = (192, 8)
    with pytest.raises(PlanError, match="an array on a GPU with gaps cannot be bound"):
        whole().bind(0, {**target.memory, "w": gaps})
