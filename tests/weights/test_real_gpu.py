"""With a real GPU and torch, where there are any: weights go from one model on it to another."""

from __future__ import annotations

from typing import Any

import pytest

from aiotransfer import weights
from aiotransfer.weights import Quantise, layout_of
from aiotransfer.weights.kernels import quantise
from tests.moe.kernels.conftest import gpu_is_awake
from tests.needs import skip_gpu
from tests.weights.party import Party

__all__ = ["gpu_is_awake"]  # before anything is counted

pytestmark = [pytest.mark.asyncio, pytest.mark.gpu]


@pytest.fixture
def torch() -> Any:
    return skip_gpu()


@pytest.mark.parametrize(("mode", "staging_bytes"), [("double", 1 << 18), ("in_place", 1 << 18), ("double", 1 << 24)])
async def test_tensors_of_torch_go_from_one_model_on_a_gpu_to_another(
    party: Party, torch: Any, mode: str, staging_bytes: int
) -> None:
    source = {name: torch.randn(size, device="cuda").bfloat16() for name, size in (("w", (300, 200)), ("v", (300, 200)))}
    target = {
        "w": torch.zeros((300, 200), dtype=torch.bfloat16, device="cuda"),
        "v": torch.zeros((300, 200), device="cuda").to(torch.float8_e4m3fn),
        "v_scale": torch.zeros((3, 2), device="cuda"),
    }
    left, right = [await party.stack.enter_async_context(await party.open_engine()) for _ in range(2)]
    await right.connect(left.address)
    trainer = weights.Publisher(left, layout_of(source), rules=[Quantise("v", "v_scale")], staging_bytes=staging_bytes,
                                timeout=60)  # fmt: skip
    await party.stack.enter_async_context(trainer)
    role = await party.stack.enter_async_context(weights.Subscriber(right, layout_of(target), instance="a", mode=mode))
    for number in (1, 2, 3):
        for tensor in source.values():
            tensor.mul_(1.5)  # a step whose kernels may not have ended when `publish` is entered
        async with trainer.publish(number):
            pass
        async with role.reading() as version:
            assert version == (1, number)
            assert role.tensors["w"].device.type == "cuda"
            assert torch.equal(role.tensors["w"], source["w"])
            codes, per = torch.empty((300, 200), dtype=torch.float8_e4m3fn), torch.empty((3, 2))
            quantise(codes, per, source["v"].cpu())
            assert torch.equal(role.tensors["v"].cpu().view(torch.uint8), codes.view(torch.uint8))
            assert torch.equal(role.tensors["v_scale"].cpu(), per)
            assert (trainer.records[-1].staging_peak > trainer.staging_held) == (staging_bytes == 1 << 24), "on the GPU, or not"
            scales = role.tensors["v_scale"].repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :200]
            wide = role.tensors["v"].float() * scales
            torch.testing.assert_close(wide, source["v"].float(), rtol=0.07, atol=0.07 * float(role.tensors["v_scale"].max()))
