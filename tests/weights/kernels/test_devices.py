"""The kernels of every device convert as plain NumPy does, to the bit; what they cannot do is refused."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer.providers import native
from aiotransfer.weights.kernels import Kernels, NotFiniteError, kernels_for
from tests.needs import skip_gpu, skip_interpreter
from tests.weights.kernels.reference import FLOATS, RAW, Array, converted, narrowed, quantised, some, widened

pytestmark = [pytest.mark.asyncio, pytest.mark.one_loop, pytest.mark.skipif(native.lib is None, reason="no native extension")]
DEVICES = ["cpu", "interpreter", pytest.param("cuda", marks=pytest.mark.gpu)]
on_all = pytest.mark.parametrize("on", DEVICES, indirect=True)
on_triton = pytest.mark.parametrize("on", DEVICES[1:], indirect=True)


class Device:
    """Kernels, and how numbers get to where they work and back; as tensors."""

    def __init__(self, kernels: Kernels, where: str, torch: Any) -> None:
        self.kernels, self.where, self.torch = kernels, where, torch

    def put(self, raw: Array, dtype: str, gap: int = 0) -> Any:
        """Bits as a tensor of this type; `gap` elements lie between its rows."""
        wide = np.zeros((*raw.shape[:-1], raw.shape[-1] + gap), raw.dtype)
        wide[..., : raw.shape[-1]] = raw
        signed = wide.view(f"i{raw.itemsize}")
        return self.torch.from_numpy(signed).to(self.where).view(getattr(self.torch, dtype))[..., : raw.shape[-1]]

    def get(self, tensor: Any) -> Array:
        size = tensor.element_size()
        signed = {1: self.torch.int8, 2: self.torch.int16, 4: self.torch.int32}[size]
        return tensor.contiguous().view(signed).cpu().numpy().view(f"u{size}")  # type: ignore[no-any-return]


@pytest.fixture
def on(request: pytest.FixtureRequest) -> Iterator[Device]:
    if request.param == "interpreter":
        skip_interpreter()
        from aiotransfer.weights.kernels.gpu import TritonKernels

        kernels: Kernels = TritonKernels("cpu")
    elif request.param == "cuda":
        skip_gpu()
        kernels = kernels_for("cuda")
    else:
        kernels = kernels_for("cpu")
    torch = pytest.importorskip("torch", reason="torch is not installed")
    torch.set_num_threads(1)  # its own threads would stay
    with np.errstate(all="ignore"):  # the interpreter is NumPy
        yield Device(kernels, kernels.device, torch)


def edges(of: str) -> Array:
    """Bits of all kinds of numbers, NaN and infinity among them."""
    if of != "float32":
        return np.arange(1 << 16, dtype=np.uint16).reshape(8, -1)
    small = np.concatenate([widened(np.arange(0, 1 << 16, 7, dtype=np.uint16), name) for name in ("bfloat16", "float16")])
    bits = small.view(np.uint32)[:, None] + np.array([0, 1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001], np.uint32)
    return bits.reshape(8, -1)


@on_all
@pytest.mark.parametrize(("of", "to"), list(itertools.product(FLOATS, FLOATS)))
async def test_numbers_are_cast(on: Device, of: str, to: str) -> None:
    raw = edges(of)
    dst = on.put(np.full(raw.shape, 0x55, RAW[to]), to, gap=5)
    on.kernels.cast(dst, on.put(raw, of, gap=3))
    await on.kernels.settle(60)
    assert np.array_equal(on.get(dst), converted(raw, of, to))


@on_all
@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 5), (2, 2, 2, 3), (0, 4), (2, 1100)])
async def test_arrays_of_any_shape_are_cast(on: Device, shape: tuple[int, ...]) -> None:
    raw = some(shape, "float32", 1)
    dst, src = on.put(np.zeros(shape, np.uint16), "bfloat16", gap=2), on.put(raw, "float32", gap=1)
    on.kernels.cast(dst, src)
    if len(shape) > 2:
        on.kernels.cast(dst.transpose(0, 1), src.transpose(0, 1))
    await on.kernels.settle(60)
    assert np.array_equal(on.get(dst), narrowed(raw.view(np.float32), "bfloat16"))


@on_all
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("shape", "block"),
    [((256, 128), (128, 128)), ((130, 200), (128, 128)), ((2, 128, 130), (128, 128)), ((3, 40), (128, 128)),
     ((2, 2, 5, 70), (2, 64)), ((9, 33), (5, 7)), ((4, 256), (1, 128)), ((0, 128), (128, 128)), ((2, 3, 0), (128, 128))],
)  # fmt: skip
async def test_matrices_are_quantised(on: Device, dtype: str, shape: tuple[int, ...], block: tuple[int, int]) -> None:
    raw = some(shape, dtype, 2)
    raw[..., :1, :] = 0
    codes, scales = quantised(raw, dtype, block)
    dst = on.put(np.zeros(shape, np.uint8), "float8_e4m3fn", gap=3)
    per = on.put(np.zeros(scales.shape, np.uint32), "float32", gap=1)
    on.kernels.quantise(dst, per, on.put(raw, dtype, gap=2), block)
    await on.kernels.settle(60)
    assert np.array_equal(on.get(per), scales.view(np.uint32))
    assert np.array_equal(on.get(dst), codes)


@on_all
async def test_a_source_may_lie_in_the_order_of_its_columns(on: Device) -> None:
    raw = some((2, 70, 40), "bfloat16", 8)
    codes, scales = quantised(raw, "bfloat16", (32, 32))
    src = on.put(np.ascontiguousarray(raw.swapaxes(1, 2)), "bfloat16", gap=2).transpose(1, 2)
    dst, per = on.put(np.zeros(raw.shape, np.uint8), "float8_e4m3fn"), on.put(np.zeros(scales.shape, np.uint32), "float32")
    wide = on.put(np.zeros(raw.shape, np.uint32), "float32")
    on.kernels.quantise(dst, per, src, (32, 32))
    on.kernels.cast(wide, src)
    await on.kernels.settle(60)
    assert np.array_equal(on.get(per), scales.view(np.uint32))
    assert np.array_equal(on.get(dst), codes)
    assert np.array_equal(on.get(wide), converted(raw, "bfloat16", "float32"))


@on_all
async def test_every_bfloat16_and_the_smallest_scales_are_quantised(on: Device) -> None:
    raw = np.arange(1 << 16, dtype=np.uint16)
    raw = raw[np.isfinite(widened(raw, "bfloat16"))].reshape(-1, 256)
    tiny = np.zeros((6, 32), np.float32)
    tiny[:, 3] = np.array([0, 1, 224, 225, 671, 65536]) * 2.0**-149
    for bits, dtype, block in ((raw, "bfloat16", (8, 256)), (tiny.view(np.uint32), "float32", (1, 32))):
        codes, scales = quantised(bits, dtype, block)
        dst = on.put(np.zeros(bits.shape, np.uint8), "float8_e4m3fn")
        per = on.put(np.zeros(scales.shape, np.uint32), "float32")
        on.kernels.quantise(dst, per, on.put(bits, dtype), block)
        await on.kernels.settle(60)
        assert np.array_equal(on.get(per), scales.view(np.uint32))
        assert np.array_equal(on.get(dst), codes)


@on_all
async def test_rows_may_be_done_alone_from_a_block_on(on: Device) -> None:
    raw = some((2, 300, 40), "bfloat16", 3)
    codes, scales = quantised(raw, "bfloat16")
    dst, per = on.put(np.zeros(raw.shape, np.uint8), "float8_e4m3fn"), on.put(np.zeros(scales.shape, np.uint32), "float32")
    for rows in ((128, 256), (256, 300), (0, 128), (128, 128)):
        on.kernels.quantise(dst, per, on.put(raw, "bfloat16"), rows=rows)
    await on.kernels.settle(60)
    assert np.array_equal(on.get(per), scales.view(np.uint32))
    assert np.array_equal(on.get(dst), codes)


@on_all
async def test_what_is_not_finite_is_refused_with_its_position(on: Device) -> None:
    raw = some((2, 2, 300, 40), "bfloat16", 4)
    raw[1, 0, 299, 39] = raw[1, 0, 290, 7] = raw[1, 1, 0, 0] = 0xFF80
    good, bad = (on.put(bits, "bfloat16") for bits in (some(raw.shape, "bfloat16", 5), raw))
    dst, per = on.put(np.zeros(raw.shape, np.uint8), "float8_e4m3fn"), on.put(np.zeros((2, 2, 3, 1), np.uint32), "float32")
    for place, rows in (((1, 0, 290, 7), None), ((1, 0, 290, 7), (256, 300)), ((1, 1, 0, 0), (0, 128))):
        with pytest.raises(NotFiniteError) as caught:  # on a GPU it is seen later
            on.kernels.quantise(dst, per, bad, rows=rows)
            await on.kernels.settle(60)
        assert caught.value.position == place
        assert caught.value.value == -np.inf
        on.kernels.quantise(dst, per, good)
        await on.kernels.settle(60)  # what was reported is not reported again
    swapped = bad.transpose(0, 1)
    with pytest.raises(NotFiniteError) as caught:
        on.kernels.quantise(dst, per, swapped)
        await on.kernels.settle(60)
    assert caught.value.position == (0, 1, 290, 7)


@on_all
async def test_a_thread_may_wait_instead(on: Device) -> None:
    raw = some((3, 4), "bfloat16", 7)
    codes, scales = quantised(raw, "bfloat16")
    dst, per = on.put(np.zeros(raw.shape, np.uint8), "float8_e4m3fn"), on.put(np.zeros((1, 1), np.uint32), "float32")
    on.kernels.quantise(dst, per, on.put(raw, "bfloat16"))
    on.kernels.finish()
    assert np.array_equal(on.get(per), scales.view(np.uint32))
    assert np.array_equal(on.get(dst), codes)
    raw[1, 2] = 0x7FC0
    with pytest.raises(NotFiniteError, match=r"nan at \(1, 2\)"):
        on.kernels.quantise(dst, per, on.put(raw, "bfloat16"))
        on.kernels.finish()
    on.kernels.finish()  # what was reported is not reported again


@on_triton
async def test_a_call_that_met_what_is_not_finite_is_reported_by_the_next_settle_that_ends(on: Device) -> None:
    raw = some((3, 4), "bfloat16", 6)
    raw[1, 2] = 0x7FC0
    dst, per = on.put(np.zeros(raw.shape, np.uint8), "float8_e4m3fn"), on.put(np.zeros((1, 1), np.uint32), "float32")
    on.kernels.quantise(dst, per, on.put(raw, "bfloat16"))
    launches = on.kernels._launches  # type: ignore[attr-defined]
    real = launches.settle

    async def late(timeout: float | None = None) -> None:
        raise at.TransferTimeout("not yet")

    launches.settle = late
    with pytest.raises(at.TransferTimeout):
        await on.kernels.settle(0.1)
    launches.settle = real
    with pytest.raises(NotFiniteError, match=r"nan at \(1, 2\)"):
        await on.kernels.settle(60)


@on_triton
async def test_what_cannot_be_converted_is_refused(on: Device) -> None:
    torch = on.torch
    f32, half = (on.put(np.zeros((4, 40), RAW[name]), name) for name in ("float32", "float16"))
    codes, per = on.put(np.zeros((4, 40), np.uint8), "float8_e4m3fn"), on.put(np.zeros((1, 1), np.uint32), "float32")
    with pytest.raises(TypeError, match="dst must be a torch tensor on"):
        on.kernels.cast(np.zeros((4, 40), np.float16), f32)
    with pytest.raises(ValueError, match="src: the tensor is on meta"):
        on.kernels.cast(half, torch.zeros(4, 40, device="meta"))
    with pytest.raises(ValueError, match=r"dst has the shape \(4, 39\), src \(4, 40\)"):
        on.kernels.cast(half[:, :39], f32)
    with pytest.raises(ValueError, match="overlap"):
        on.kernels.cast(f32[:3], f32[1:])
    with pytest.raises(TypeError, match="dst must be of float8_e4m3fn, not of float16"):
        on.kernels.quantise(half, per, f32)
    with pytest.raises(ValueError, match="scales must have the shape"):
        on.kernels.quantise(codes, per, f32, (2, 128))
    with pytest.raises(ValueError, match="rows 0 to 3 cut a block"):
        on.kernels.quantise(codes, per, f32, rows=(0, 3))
    with pytest.raises(ValueError, match="dst and scales overlap"):
        on.kernels.quantise(codes, codes.view(torch.float32)[:1, :1], f32)
    large, many = (torch.zeros(300, 300, device=on.where).to(kind) for kind in (torch.float16, torch.float8_e4m3fn))
    with pytest.raises(ValueError, match="a block of 300 x 300 is too large for a GPU"):
        on.kernels.quantise(many, per, large, (1024, 512))
    await on.kernels.settle(60)
    assert not on.get(codes).any()


CODE = """
import sys
from aiotransfer.weights.kernels import kernels_for
kernels_for("cpu")
assert not {"torch", "triton"} & set(sys.modules)
"""


async def test_the_host_needs_neither_torch_nor_triton() -> None:
    subprocess.run([sys.executable, "-c", CODE], check=True, timeout=60)


@pytest.mark.parametrize("device", ["xpu:0", "cuda:", "cuda:x", "cpu:1", ""])
async def test_other_devices_are_refused(device: str) -> None:
    with pytest.raises(at.ConfigurationError, match="no kernels for"):
        kernels_for(device)


@pytest.mark.parametrize("module", ["torch", "triton"])
async def test_a_gpu_without_the_libraries_is_refused_with_what_is_missing(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    for name in ("aiotransfer.weights.kernels.gpu", "aiotransfer.weights.kernels.gpu_programs"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    if module == "triton":
        pytest.importorskip("torch", reason="torch is not installed: that is what would be missing first")
    with pytest.raises(at.ConfigurationError, match=module) as caught:
        kernels_for("cuda")
    assert "pip install" in str(caught.value)
