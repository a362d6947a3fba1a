"""The same with torch: its own types, and the path of a GPU's tokens, run by Triton's interpreter where that is there."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from aiotransfer import moe
from tests.moe.world import HIDDEN, World, batch, combined, world
from tests.needs import skip_interpreter

pytestmark = [pytest.mark.demo, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def torch_or_skip() -> Any:
    return pytest.importorskip("torch", reason="torch is not installed (make test-demo has it)")


async def rank(a2a: moe.AllToAll, torch: Any, dtype: Any) -> None:
    async with a2a:
        for number in range(3):
            b = batch(np.random.default_rng(10 * number + a2a.rank), 4)
            x = torch.from_numpy(b.x).to(dtype)
            d = await a2a.dispatch(x, torch.from_numpy(b.idx), torch.from_numpy(b.weights))
            assert d.x.dtype == dtype
            assert d.counts.dtype == torch.int64
            y = d.x.to(torch.float32)
            for e, (count, offset) in enumerate(zip(d.counts.tolist(), d.offsets.tolist(), strict=True)):
                y[offset : offset + count] *= a2a.rank * len(d.counts) + e + 1
            combine = getattr(torch, a2a._ranks.shape.combine_dtype)
            out = await a2a.combine(y.to(combine), d.handle)
            assert out.dtype == combine
            assert torch.equal(out, torch.from_numpy(combined(b)).to(combine))
            assert not d.handle.dropped.any()


def test_results_in_place_are_a_tensor() -> None:
    torch = torch_or_skip()

    async def rank_in_place(a2a: moe.AllToAll) -> None:
        async with a2a:
            x = torch.ones((3, HIDDEN), dtype=torch.bfloat16)
            d = await a2a.dispatch(x, torch.tensor([[0], [3], [7]]), torch.full((3, 1), 0.5))
            assert d.y.shape == d.x.shape
            assert d.y.dtype == torch.bfloat16
            torch.mul(d.x, 4, out=d.y)
            assert (await a2a.combine(d.y, d.handle) == 2).all()

    async def script(w: World) -> None:
        await w.every(rank_in_place)

    world(4, script, dtype="bfloat16", direct=True, results_in_place=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn"])
def test_torch_tensors_of_every_type(dtype: str) -> None:
    torch = torch_or_skip()

    async def script(w: World) -> None:
        await w.every(lambda a2a: rank(a2a, torch, getattr(torch, dtype)))

    world(4, script, dtype=dtype)


@pytest.mark.parametrize("direct", [True, False])
def test_the_path_of_a_gpu_under_tritons_interpreter(monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    skip_interpreter()
    torch = torch_or_skip()
    from aiotransfer.moe.kernels.gpu import TritonKernels

    module = sys.modules["aiotransfer.moe.alltoall"]
    monkeypatch.setattr(module, "kernels_for", lambda device: TritonKernels("cpu"))

    async def script(w: World) -> None:
        assert w.a2a[0]._communicator.gpu
        await w.every(lambda a2a: rank(a2a, torch, torch.bfloat16))

    world(2, script, dtype="bfloat16", hidden=HIDDEN, direct=direct)


def test_a_tensor_in_the_wrong_place_is_refused_by_name() -> None:
    torch = torch_or_skip()

    async def script(w: World) -> None:
        async def one(a2a: moe.AllToAll) -> None:
            async with a2a:
                with pytest.raises((TypeError, moe.StepRefused), match="x is on meta"):
                    x = torch.zeros(2, HIDDEN, device="meta" if a2a.rank == 0 else "cpu")
                    await a2a.dispatch(x, torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))

        await w.every(one)

    world(2, script)


def test_tensors_that_want_gradients_are_refused_until_there_are_any() -> None:
    torch = torch_or_skip()
    given = (torch.ones(2, HIDDEN), torch.tensor([[0], [7]]), torch.ones(2, 1))

    async def wanting(a2a: moe.AllToAll) -> None:
        for number, name in enumerate(("x", "topk_weights")):
            wrong = list(given)
            wrong[2 * number] = given[2 * number].clone().requires_grad_()
            if a2a.rank == 1:
                with pytest.raises(ValueError, match=rf"^{name} requires gradients.*torch\.no_grad\(\)"):
                    await a2a.dispatch(*wrong)
            else:
                with pytest.raises(moe.StepRefused, match=f"rank 1.*{name} requires gradients"):
                    await a2a.dispatch(*given)
        d = await a2a.dispatch(*given)
        with pytest.raises(ValueError, match=r"^y requires gradients.*torch\.no_grad\(\)"):
            await a2a.combine(torch.ones(d.x.shape, requires_grad=True), d.handle)
        assert (await a2a.combine(torch.ones(d.x.shape), d.handle) == 1).all()

    async def none(a2a: moe.AllToAll) -> None:
        d = await a2a.dispatch(given[0].clone().requires_grad_(), *given[1:])
        assert (await a2a.combine(torch.ones(d.x.shape, requires_grad=True), d.handle) == 1).all()

    async def script(w: World) -> None:
        await w.every(wanting)
        for context in (torch.no_grad, torch.inference_mode):  # of the thread, so of all these ranks
            with context():
                await w.every(none)
        for a2a in w.a2a:
            await a2a.aclose()

    world(2, script, timeout=2)
