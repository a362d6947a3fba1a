"""Checkpoints into running subscribers: bit for bit, in parts, and not at all where a file does not rest."""

from __future__ import annotations

import asyncio
import itertools
import os
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer import weights
from aiotransfer.weights import Cast, Fuse, Layout, Piece, Quantise, Rename, Tensor, sharded
from aiotransfer.weights.checkpoint import open_checkpoint
from aiotransfer.weights.kernels import cast, numbers, quantise
from tests.weights.checkpoint.samples import write, write_index

pytestmark = pytest.mark.asyncio
RNG = np.random.default_rng(1)
Q, K = RNG.integers(0, 1 << 16, (24, 20)).astype(np.uint16), RNG.integers(0, 1 << 16, (8, 20)).astype(np.uint16)
DOWN = RNG.standard_normal((40, 96)).astype(np.float32)
WIDE = RNG.standard_normal((256, 130)).astype(np.float32)
CODES = RNG.integers(0, 256, (6, 10)).astype(np.uint8)
FILES: dict[str, dict[str, tuple[str, Any]]] = {
    "one.safetensors": {"q": ("bfloat16", Q), "down": ("float32", DOWN), "codes": ("float8_e4m3fn", CODES)},
    "two.safetensors": {"k": ("bfloat16", K), "wide": ("float32", WIDE), "none": ("float32", np.zeros((0, 3), np.float32)),
                        "one": ("int64", np.array(5)), "scaled": ("float32", WIDE)},
}  # fmt: skip
RULES = (Fuse(("q", "k"), "qk"), Cast("wide"), Quantise("scaled", "scaled_scale"), Rename("one", "number"))
TENSORS = (
    Tensor("qk", (32, 20), "bfloat16"), Tensor("down", (40, 96), "float32"), Tensor("codes", (6, 10), "float8_e4m3fn"),
    Tensor("wide", (256, 130), "bfloat16"), Tensor("none", (0, 3), "float32"), Tensor("number", (), "int64"),
    Tensor("scaled", (256, 130), "float8_e4m3fn"), Tensor("scaled_scale", (2, 2), "float32"),
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, tensors in FILES.items():
        write(tmp_path / name, tensors)
    write_index(tmp_path, {tensor: name for name, tensors in FILES.items() for tensor in tensors})
    return tmp_path


def inference() -> Layout:
    """Two ranks: columns of `down`, rows of the others, and all of the small ones on both."""
    pieces = [*sharded(TENSORS[0], range(2)), *sharded(TENSORS[1], range(2), 1), *sharded(TENSORS[3], range(2))]
    pieces += [*sharded(TENSORS[6], range(2)), *sharded(TENSORS[7], range(2))]
    pieces += [Piece(name, rank) for name in ("codes", "none", "number") for rank in range(2)]
    return Layout(TENSORS, pieces, ranks=2)


def bits(thing: Any) -> Any:
    """The bytes of a tensor of NumPy or torch."""
    if hasattr(thing, "detach"):
        import torch

        return thing.contiguous().reshape(-1).view(torch.uint8).numpy()
    return np.ascontiguousarray(thing).reshape(-1).view(np.uint8)


def expected(rank: int) -> dict[str, Any]:
    wide, codes, scales = np.zeros(WIDE.shape, np.uint16), np.zeros(WIDE.shape, np.uint8), np.zeros((2, 2), np.float32)
    cast(numbers(wide, "bfloat16"), WIDE)
    quantise(numbers(codes, "float8_e4m3fn"), scales, WIDE)
    return {
        "qk": np.concatenate([Q, K])[16 * rank : 16 * rank + 16], "down": DOWN[:, 48 * rank : 48 * rank + 48], "codes": CODES,
        "wide": wide[128 * rank : 128 * rank + 128], "number": np.array(5), "none": np.zeros((0, 3)),
        "scaled": codes[128 * rank : 128 * rank + 128], "scaled_scale": scales[rank : rank + 1],
    }  # fmt: skip


async def ends(
    stack: AsyncExitStack, folder: Path, ranks: int, instances: tuple[str, ...] = ("a",), **options: Any
) -> tuple[list[Any], list[Any]]:
    """Publishers of a checkpoint, and the subscribers of instances of two ranks."""
    engines = [await stack.enter_async_context(at.open_engine(providers="shm")) for _ in range(ranks)]
    members = [str(engine.address) for engine in engines]
    publishers = []
    for rank, engine in enumerate(engines):
        checkpoint = open_checkpoint(folder, ranks=ranks, rank=rank)
        how: Any = {"group": engine.group(members), "rules": RULES, "timeout": 30} | options
        publishers.append(await stack.enter_async_context(weights.Publisher(engine, checkpoint, **how)))
    subscribers = []
    for name, rank in itertools.product(instances, range(2)):
        engine = await stack.enter_async_context(at.open_engine(providers="shm"))
        await engine.connect(members[0])
        subscribers.append(await stack.enter_async_context(weights.Subscriber(engine, inference(), instance=name, rank=rank)))
    return publishers, subscribers


async def publish(publishers: list[Any], number: int) -> None:
    async def one(publisher: Any) -> None:
        async with publisher.publish(number):
            pass

    await asyncio.gather(*map(one, publishers))


@pytest.mark.parametrize(
    ("ranks", "instances", "options"),
    [
        (1, ("a",), {"staging_bytes": 1 << 20}), (2, ("a",), {"staging_bytes": 300_000, "checksum": True}),
        (2, ("a", "b"), {"staging_bytes": 300_000}), (2, ("a", "b"), {"staging_bytes": 300_000, "fanout": "relay"}),
    ],
)  # fmt: skip
async def test_files_come_bit_for_bit_fused_cast_and_quantised_in_parts(
    folder: Path, ranks: int, instances: tuple[str, ...], options: dict[str, Any]
) -> None:
    async with AsyncExitStack() as stack:
        publishers, subscribers = await ends(stack, folder, ranks, instances, **options)
        for number in (1, 2):
            await publish(publishers, number)
        assert len(subscribers) == 2 * len(instances)
        for number, subscriber in enumerate(subscribers):
            assert subscriber.version == (1, 2)
            wanted = expected(number % 2)
            assert subscriber.tensors.keys() == wanted.keys()
            for name, value in wanted.items():
                np.testing.assert_array_equal(bits(subscriber.tensors[name]), bits(value), err_msg=name)
        for publisher in publishers:
            assert 0 < publisher.staging_held <= options["staging_bytes"]


@pytest.mark.parametrize("when", ["before", "inside"])
async def test_a_file_that_does_not_rest_ends_the_version(folder: Path, when: str) -> None:
    path = folder / "one.safetensors"
    async with AsyncExitStack() as stack:
        (publisher,), subscribers = await ends(stack, folder, 1)
        await publish([publisher], 1)
        if when == "before":
            os.truncate(path, os.path.getsize(path) + 1)
        with pytest.raises(at.TransferError, match=r"one.safetensors was changed after it was opened"):
            async with publisher.publish(2):
                os.truncate(path, os.path.getsize(path) + 1)
        assert {subscriber.version for subscriber in subscribers} == {(1, 1)}
        np.testing.assert_array_equal(bits(subscribers[0].tensors["codes"]), bits(CODES))


async def test_a_file_that_is_cut_short_while_it_is_read_ends_the_version_and_not_the_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with AsyncExitStack() as stack:
        (publisher,), subscribers = await ends(stack, folder, 1)
        await publish([publisher], 1)
        with monkeypatch.context() as patch:
            patch.setattr(publisher.sources, "note", lambda: os.truncate(folder / "two.safetensors", 100))
            with pytest.raises(at.TransferError, match=r"two.safetensors ends at byte 100"):
                await publish([publisher], 2)
        assert {subscriber.version for subscriber in subscribers} == {(1, 1)}


async def test_bytes_that_change_behind_the_time_of_the_file_are_found_by_checksum(folder: Path) -> None:
    path = folder / "one.safetensors"
    async with AsyncExitStack() as stack:
        (publisher,), subscribers = await ends(stack, folder, 1, checksum=True)
        with pytest.raises(at.TransferError, match=r"one.safetensors was changed inside publish"):
            async with publisher.publish(1):
                times = os.stat(path)
                with path.open("r+b") as file:
                    file.seek(-1, os.SEEK_END)
                    file.write(b"x" if CODES[-1, -1] != ord("x") else b"y")
                os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert {subscriber.version for subscriber in subscribers} == {None}


async def test_publishers_of_files_and_of_memory_do_not_publish_together(folder: Path) -> None:
    """All ranks must have the same plan."""
    async with AsyncExitStack() as stack:
        (publisher,), _ = await ends(stack, folder, 1)
        digest = publisher.works.digest
        publisher.sources.staged = False
        assert publisher.works.digest != digest
