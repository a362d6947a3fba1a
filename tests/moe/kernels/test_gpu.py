"""With a real GPU, where there is one: a captured graph packs rows and counts, and a coroutine follows it."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer.moe.kernels import GraphWord, Rows, kernels_for
from tests.needs import skip_gpu

pytestmark = [pytest.mark.asyncio, pytest.mark.gpu]


@pytest.fixture
def torch() -> Any:
    return skip_gpu()


async def test_a_captured_graph_packs_rows_and_says_so_each_time(torch: Any) -> None:
    kernels = kernels_for("cuda")
    many, n, nbytes = 512, 64, 14336
    x = torch.zeros(many * nbytes, dtype=torch.uint8, device="cuda")
    packed = torch.zeros(n * nbytes, dtype=torch.uint8, device="cuda")
    order = torch.zeros(n, dtype=torch.int64, device="cuda")
    aside = torch.cuda.Stream()
    async with at.open_engine() as engine:
        with GraphWord(engine, kernels) as word:

            def step() -> None:
                kernels.move(Rows(packed, 0, nbytes, nbytes), None, Rows(x, 0, nbytes, nbytes), order, n)
                word.bump()

            step()  # compiles, which cannot be done while capturing
            await kernels.settle(60)
            assert await word.reached(1, 20) == 1
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            assert word.value == 1
            rng = np.random.default_rng(1)
            for turn in range(2, 8):
                rows = rng.integers(0, 256, (many, nbytes), np.uint8)
                chosen = rng.integers(0, many, n)
                x.copy_(kernels.place(rows.ravel()))
                order.copy_(kernels.place(chosen))
                graph.replay()
                assert await word.reached(turn, 20) == turn
                with torch.cuda.stream(aside):  # it waits for nothing: what the word says must be true already
                    found = packed.cpu().numpy().reshape(n, nbytes)
                assert np.array_equal(found, rows[chosen])


async def test_the_loop_turns_while_the_gpu_works(torch: Any) -> None:
    kernels = kernels_for("cuda", torch.cuda.Stream())
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    with torch.cuda.stream(kernels._stream):  # type: ignore[attr-defined]
        torch.cuda._sleep(200_000_000)  # clock cycles: 0.1 s or so
    counting = asyncio.ensure_future(count())
    with pytest.raises(at.TransferTimeout):
        await kernels.settle(0.001)
    await kernels.settle(20)
    assert turns > 50
    counting.cancel()
