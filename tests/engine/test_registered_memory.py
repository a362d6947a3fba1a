"""Registered memory stays what it was at registration, whatever its owner does with the object, and any dense order is taken."""

from __future__ import annotations

import array
import gc
import mmap
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer.testing import Pair

N = 65536
OF_TORCH = pytest.param("torch", marks=pytest.mark.demo)


def tensors() -> Any:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    torch.set_num_threads(1)  # it starts threads of its own otherwise, some day
    return torch


async def lands(pair: Pair, region: at.Region, value: int) -> None:
    """Bytes that the other side writes into the region come back from it."""
    source, back = pair.left.allocate(N), pair.left.allocate(N)
    source.numpy()[:] = value
    await pair.left.write(source, region._grant("both")[:N])
    await pair.left.read(region._grant("both")[:N], back)
    assert (back.numpy() == value).all()
    source.close()
    back.close()


# ---- objects that are pointed elsewhere ----


def by_data(tensor: Any, torch: Any) -> None:
    tensor.data = torch.zeros(N, dtype=torch.uint8)


def by_set(tensor: Any, torch: Any) -> None:
    tensor.set_(torch.zeros(N, dtype=torch.uint8))


def by_set_nothing(tensor: Any, torch: Any) -> None:
    tensor.set_()


@pytest.mark.demo
@pytest.mark.asyncio
@pytest.mark.parametrize("form", ["tensor", "parameter", "view", "numpy", "numpy view"])
@pytest.mark.parametrize("move", [by_data, by_set, by_set_nothing])
async def test_a_tensor_with_another_storage_leaves_the_first_in_place(pair: Pair, form: str, move: Callable[..., None]) -> None:
    torch = tensors()
    tensor = torch.zeros(N, dtype=torch.uint8)
    if form == "parameter":
        tensor = torch.nn.Parameter(tensor, requires_grad=False)
    given = {"view": tensor[:], "numpy": tensor.numpy(), "numpy view": tensor.numpy()[:]}.get(form, tensor)
    address, before = tensor.data_ptr(), np.frombuffer(tensor.detach().numpy(), np.uint8)
    region = pair.right.register(given)
    move(given if form == "view" else tensor, torch)
    with pair.right.register((address, N, "cpu")) as same:  # still mapped, and still this memory
        await lands(pair, region, 7)
        assert same.nbytes == N
    assert (before == 7).all()
    assert not tensor.numel() or form == "view" or not tensor.any()


@pytest.mark.demo
@pytest.mark.asyncio
@pytest.mark.parametrize("form", ["tensor", "storage", "view", "transposed", "numpy"])
async def test_a_registered_storage_of_torch_cannot_be_resized(pair: Pair, form: str) -> None:
    torch = tensors()
    tensor = torch.zeros(256, N // 256, dtype=torch.uint8)
    forms = {"storage": tensor.untyped_storage, "view": lambda: tensor[:256], "transposed": tensor.t, "numpy": tensor.numpy}
    region, other = pair.right.register(forms.get(form, lambda: tensor)()), tensor[:]
    assert region.nbytes == N
    for size in (0, 2 * N):
        with pytest.raises(RuntimeError, match="not resizable"):
            tensor.untyped_storage().resize_(size)
    with pytest.raises(RuntimeError, match="not resizable"):
        tensor.resize_(2 * N)
    await lands(pair, region, 9)
    assert (other == 9).all()  # (`tensor` has the new shape already: torch refuses too late)


@pytest.mark.demo
@pytest.mark.asyncio
async def test_a_registered_storage_is_not_moved_into_shared_memory(pair: Pair) -> None:
    torch = tensors()
    tensor = torch.zeros(N, dtype=torch.uint8)
    address = tensor.data_ptr()
    regions = [pair.right.register(tensor), pair.right.register(tensor.untyped_storage()), pair.right.register(tensor.numpy())]
    for region in regions:
        with pytest.raises(RuntimeError, match="registered with aiotransfer"):
            tensor.share_memory_()
        with pytest.raises(RuntimeError, match="registered with aiotransfer"):
            torch.multiprocessing.reductions.reduce_storage(tensor.untyped_storage())
        assert tensor.data_ptr() == address
        await lands(pair, region, 4)
        await region.aclose()
    assert (tensor == 4).all()
    regions.clear()
    del region
    gc.collect()
    tensor.share_memory_()
    assert tensor.data_ptr() != address
    await lands(pair, pair.right.register(tensor), 6)
    assert (tensor == 6).all()


@pytest.mark.asyncio
async def test_a_registered_array_cannot_be_resized_while_it_is_registered(pair: Pair) -> None:
    base = np.zeros(N, np.uint8)
    region = pair.right.register(base)
    part = pair.right.register(base[: N // 2].reshape(2, -1).T)
    await lands(pair, region, 5)
    for held in (region, part):
        with pytest.raises(ValueError, match="cannot resize"):
            base.resize(0, refcheck=False)
        await held.aclose()
    gc.collect()
    base.resize(2 * N, refcheck=False)
    assert (base[:N] == 5).all()


@pytest.mark.asyncio
@pytest.mark.parametrize("make", [bytearray, lambda n: array.array("B", bytes(n)), lambda n: mmap.mmap(-1, n)])
@pytest.mark.parametrize("wrap", [lambda memory: memory, memoryview, lambda memory: np.frombuffer(memory, np.uint8)])
async def test_a_buffer_cannot_be_moved_while_it_is_registered(
    pair: Pair, make: Callable[[int], Any], wrap: Callable[[Any], Any]
) -> None:
    memory = make(N)
    move: Callable[[], object] = memory.close if isinstance(memory, mmap.mmap) else lambda: memory.extend(bytes(N))
    region = pair.right.register(wrap(memory))
    with pytest.raises(BufferError):
        move()
    await lands(pair, region, 3)
    assert bytes(memory[:4]) == b"\3\3\3\3"
    await region.aclose()
    del region
    gc.collect()
    move()


@pytest.mark.asyncio
async def test_the_memory_of_a_dlpack_exporter_is_kept_without_the_exporter(pair: Pair) -> None:
    base = np.zeros(N, np.uint8)

    class Exporter:
        """Gives its memory away at each export, and holds none itself."""

        def __dlpack_device__(self) -> tuple[int, int]:
            return 1, 0

        def __dlpack__(self, **options: Any) -> Any:
            fresh = base.view()
            self.last = weakref.ref(fresh)
            return fresh.__dlpack__(**options)

    exporter = Exporter()
    region = pair.right.register(exporter)
    gc.collect()
    assert exporter.last() is not None, "the exported memory is gone while it is registered"
    await region.aclose()
    gc.collect()
    assert exporter.last() is None


# ---- any dense order ----


class SimpleExporter:
    """Nothing but DLPack."""

    def __init__(self, array: Any) -> None:
        self.__dlpack__, self.__dlpack_device__ = array.__dlpack__, array.__dlpack_device__


@pytest.mark.asyncio
@pytest.mark.parametrize("owner", ["numpy", "memoryview", "dlpack", OF_TORCH])
async def test_every_dense_order_is_taken_byte_by_byte(pair: Pair, owner: str) -> None:
    heads = np.arange(2 * 4 * 2 * 2 * 8, dtype=np.int16).reshape(2, 4, 2, 2, 8)
    view = heads.transpose(0, 1, 3, 2, 4)  # neither C nor Fortran order
    wrap: dict[str, Callable[[], Any]] = {
        "numpy": lambda: view,
        "memoryview": lambda: memoryview(view),
        "dlpack": lambda: SimpleExporter(view),
        "torch": lambda: tensors().from_numpy(view),
    }
    region, target = pair.left.register(wrap[owner]()), pair.right.allocate(heads.nbytes)
    assert region.nbytes == heads.nbytes
    await pair.left.write(region, target.descriptor)
    assert bytes(target.numpy()) == heads.tobytes(), "in the order in which they lie in memory"


@pytest.mark.asyncio
@pytest.mark.parametrize("owner", ["numpy", "memoryview", OF_TORCH])
async def test_gaps_and_overlaps_are_refused_with_shape_and_strides(pair: Pair, owner: str) -> None:
    base = np.zeros((4, 6, 2), np.uint8)
    overlap = np.lib.stride_tricks.as_strided(base, (4, 6), (1, 1))
    for view in (base[:, ::2], base.transpose(2, 0, 1)[:, :, 1:], overlap):
        given: Any = view if owner == "numpy" else memoryview(view) if owner == "memoryview" else tensors().from_numpy(view)
        with pytest.raises(at.RegistrationError) as caught:
            pair.left.register(given)
        assert f"shape {view.shape}, strides {view.strides}" in str(caught.value)


@pytest.mark.demo
@pytest.mark.asyncio
async def test_tensors_whose_memory_is_not_their_values_are_refused(pair: Pair) -> None:
    torch = tensors()
    plain = torch.zeros(8, dtype=torch.complex64)
    for tensor, why in (
        (plain.conj(), "conjugated"), (plain.conj().imag, "negated"), (torch.zeros(4, 4).to_sparse(), "sparse"),
    ):  # fmt: skip
        with pytest.raises(at.RegistrationError, match=why):
            pair.left.register(tensor)
    assert pair.left.register(plain.conj().resolve_conj()).nbytes == 64
    assert pair.left.register(torch.zeros(0).untyped_storage()).nbytes == 0
