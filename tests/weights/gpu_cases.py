"""Weights on a GPU that rails reach by themselves, run by test_devices_direct.py in a process whose libfabric and CUDA driver are
ours. What touched the GPU's addresses from the host would crash: nothing is mapped there."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

import aiotransfer as at
from aiotransfer import weights
from aiotransfer.engine.runtime.platform import Platform
from aiotransfer.providers.fabric.provider import Restrictions
from aiotransfer.weights import Cast, Tensor
from tests.engine.gpu import Gpu
from tests.weights.party import Party
from tests.weights.test_devices import Side, equal, publish, values, whole

pytestmark = pytest.mark.asyncio


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    gpu = Gpu(Path(os.environ["AIOTRANSFER_LIBCUDA"]))
    gpu.array(0)
    return gpu


@pytest_asyncio.fixture
async def party() -> AsyncIterator[Party]:
    async def open_engine(**options: Any) -> at.Engine:
        rails: Any = {"providers": "tcp", "_platform": Platform(restrictions=Restrictions(device_memory=1)), **options}
        return at.open_engine(**rails)  # type: ignore[return-value]

    async with AsyncExitStack() as stack:
        yield Party(stack, open_engine)


async def roles(
    party: Party, source: Any, targets: list[Any], mode: str = "double", **options: Any
) -> tuple[weights.Publisher, list[weights.Subscriber]]:
    """The engines are connected first: rails open with the first peer."""
    engines = [await party.stack.enter_async_context(await party.open_engine()) for _ in range(1 + len(targets))]
    for engine in engines[1:]:
        await engine.connect(engines[0].address)
    trainer = await party.stack.enter_async_context(weights.Publisher(engines[0], source, timeout=20, **options))
    subscribers = []
    for k, (engine, target) in enumerate(zip(engines[1:], targets, strict=True)):
        role = weights.Subscriber(engine, target, instance=f"i{k}", mode=mode)
        subscribers.append(await party.stack.enter_async_context(role))
    return trainer, subscribers


@pytest.mark.parametrize("mode", ["double", "in_place"])
async def test_versions_go_from_gpu_to_gpu_without_the_host(party: Party, gpu: Gpu, mode: str) -> None:
    source, target = Side(gpu, whole()), Side(gpu, whole())
    trainer, (role,) = await roles(party, source.bound, [target.bound], mode)
    copies, flushes = gpu.calls("cuStreamCreate"), gpu.calls("cuFlushGPUDirectRDMAWrites")
    for number in (1, 2, 3):
        source.set(**values(number))
        await publish(trainer, number)
        assert role.version == (1, number)
        assert equal(gpu, role, values(number))
    assert gpu.calls("cuStreamCreate") == copies
    assert gpu.calls("cuFlushGPUDirectRDMAWrites") > flushes
    assert trainer.staging_held == 0


async def test_what_is_cast_goes_by_the_host_and_the_rest_does_not(party: Party, gpu: Gpu) -> None:
    source = Side(gpu, whole())
    half = [Tensor("w", (40, 24), "float16"), Tensor("norm", (24,), "float32"), Tensor("none", (0, 3), "float32")]
    target, other = Side(gpu, whole(half)), Side(gpu, whole())
    trainer, (small, plain) = await roles(
        party, source.bound, [target.bound, other.bound], rules=[Cast("w")], checksum=True, staging_bytes=1 << 13
    )
    for number in (1, 2):
        wanted = values(number)
        source.set(**wanted)
        await publish(trainer, number)
        assert equal(gpu, plain, wanted)
        assert equal(gpu, small, {"w": wanted["w"].astype(np.float16), "norm": wanted["norm"]})
    assert 0 < trainer.staging_held <= 1 << 13


async def test_a_late_instance_reads_from_the_gpu_of_another_and_a_part_of_the_names_is_added(party: Party, gpu: Gpu) -> None:
    source, target, other = (Side(gpu, whole()) for _ in range(3))
    trainer, (role,) = await roles(party, source.bound, [target.bound])
    source.set(**values(1))
    await publish(trainer, 1)
    engine = await party.stack.enter_async_context(await party.open_engine())
    await engine.connect(trainer.engine.address)
    late = await party.stack.enter_async_context(weights.Subscriber(engine, other.bound, instance="late", staging=False))
    assert await late.ready(timeout=20) == (1, 1)
    assert equal(gpu, late, values(1))
    await trainer.aclose()
    part = weights.Publisher(trainer.engine, source.bound, names=["norm"], timeout=20)
    await party.stack.enter_async_context(part)
    source.set(**values(2))
    await publish(part, 2)
    for one in (role, late):
        assert equal(gpu, one, {"w": values(1)["w"], "norm": values(2)["norm"]})


async def test_memory_that_a_stopped_writer_may_still_write_into_is_replaced(party: Party, gpu: Gpu) -> None:
    source, target = Side(gpu, whole()), Side(gpu, whole())
    trainer, (role,) = await roles(party, source.bound, [target.bound])
    source.set(**values(1))
    await publish(trainer, 1)
    role.stopped.spoil([])
    await role.memory.leave_shadow()
    source.set(**values(2))
    await publish(trainer, 2)
    assert equal(gpu, role, values(2))
