"""Conversions on the host beside torch's, which rounds the same way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from aiotransfer.providers import native
from aiotransfer.weights.kernels import NotFiniteError, Numbers, cast, numbers, quantise

torch: Any = pytest.importorskip("torch", reason="torch is not installed")
torch.set_num_threads(1)  # its own threads would stay
pytestmark = pytest.mark.skipif(native.lib is None, reason="no native extension")


def bits(tensor: Any) -> np.ndarray[Any, Any]:
    return tensor.contiguous().view(torch.uint8).numpy()  # type: ignore[no-any-return]


def by_torch(src: Any) -> tuple[Any, Any]:
    """Matrices of sizes that 128 divides."""
    *stack, height, width = src.shape
    blocks = src.float().reshape(*stack, height // 128, 128, width // 128, 128)
    scales = blocks.abs().amax((-3, -1)) / 448
    scales = torch.where(scales == 0, 1.0, scales)
    codes = (blocks / scales[..., :, None, :, None]).to(torch.float8_e4m3fn)
    return codes.reshape(src.shape), scales


@pytest.mark.parametrize(("of", "to"), [("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "float32"),
                                        ("bfloat16", "float16"), ("float16", "float32"), ("float16", "bfloat16")])  # fmt: skip
def test_tensors_are_cast_as_torch_casts_them(of: str, to: str) -> None:
    src = (torch.randn(33, 257, generator=torch.Generator().manual_seed(1)) * 100).to(getattr(torch, of))
    wide = torch.zeros(33, 300, dtype=getattr(torch, to))
    cast(wide[:, 20:277], src)
    assert np.array_equal(bits(wide[:, 20:277]), bits(src.to(getattr(torch, to))))
    assert not wide[:, :20].any()
    assert not wide[:, 277:].any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("shape", [(256, 384), (3, 128, 256), (2, 2, 128, 128)])
def test_tensors_are_quantised_as_torch_does_it(dtype: str, shape: tuple[int, ...]) -> None:
    src = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(getattr(torch, dtype))
    src[..., :128, :128] = 0
    codes, scales = by_torch(src)
    found, per = torch.empty(shape, dtype=torch.float8_e4m3fn), torch.empty(scales.shape)
    quantise(found, per, src)
    assert torch.equal(per, scales)
    assert np.array_equal(bits(found), bits(codes))
    raw = Numbers(src.data_ptr(), dtype, shape, tuple(n * src.element_size() for n in src.stride()), keep=src)
    again = torch.empty_like(found)
    quantise(again, per.zero_(), raw, block=(128, 128))
    assert torch.equal(per, scales)
    assert np.array_equal(bits(again), bits(codes))


def test_a_stack_that_lies_otherwise_in_memory_is_quantised() -> None:
    src = torch.randn(128, 3, 256, generator=torch.Generator().manual_seed(3)).bfloat16().transpose(0, 1)
    codes, scales = by_torch(src)
    found, per = torch.empty(3, 128, 256, dtype=torch.float8_e4m3fn), torch.empty(scales.shape)
    quantise(found, per, src)
    assert torch.equal(per, scales)
    assert np.array_equal(bits(found), bits(codes))


def test_a_thread_that_takes_subnormal_numbers_for_zero_gets_the_same_and_keeps_its_mode() -> None:
    tiny = torch.full((128, 128), 2.0**-130)
    tiny[0, 0] = 2.0**-127
    codes, scales = by_torch(tiny)
    assert scales[0, 0] > 0
    found, per = torch.empty(128, 128, dtype=torch.float8_e4m3fn), torch.empty(1, 1)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    try:
        quantise(found, per, tiny)
        flushed = float(np.float32(2.0**-126) * np.float32(0.5)) == 0
        tiny[3, 3] = torch.inf
        with pytest.raises(NotFiniteError):
            quantise(found.clone(), per.clone(), tiny)
        assert flushed == (float(np.float32(2.0**-126) * np.float32(0.5)) == 0)
    finally:
        torch.set_flush_denormal(False)
    assert flushed
    assert torch.equal(per.view(torch.int32), scales.view(torch.int32))
    assert np.array_equal(bits(found), bits(codes))


def test_tensors_whose_memory_does_not_hold_their_values_are_refused() -> None:
    with pytest.raises(ValueError, match="plain memory on cpu is needed"):
        numbers(torch.zeros(2, device="meta"))
    with pytest.raises(ValueError, match="negated or conjugated"):
        numbers(torch.zeros(2, dtype=torch.complex64).conj().imag)
    with pytest.raises(ValueError, match="plain memory on cpu is needed"):
        numbers(torch.eye(2).to_sparse())
    with pytest.raises(TypeError, match="src must be of float32 or bfloat16 or float16 or float64, not of int64"):
        cast(torch.zeros(2), torch.zeros(2, dtype=torch.int64))
