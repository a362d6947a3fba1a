"""Weights are cast and quantised on the GPU where they lie: to the bits of the host, within the memory that there is, else there.

The GPU's memory is that of a driver of ours; what runs on it are the kernels for the host, and Triton's interpreter."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer import weights
from aiotransfer.engine.memory.buffers import Plain
from aiotransfer.model.dtypes import lookup
from aiotransfer.providers import native
from aiotransfer.providers.numbers import Numbers
from aiotransfer.weights import Cast, Layout, Piece, Quantise, Tensor, Transpose
from aiotransfer.weights.kernels import kernels_for, numbers, quantise
from aiotransfer.weights.memory.box import Box
from aiotransfer.weights.memory.convert import dense
from aiotransfer.weights.memory.devices import DeviceBuffer, like
from aiotransfer.weights.planning.links import CAST, QUANTISE
from aiotransfer.weights.publisher import making, on_gpu, work
from tests.engine.gpu import Gpu, build
from tests.needs import skip_interpreter
from tests.weights.party import Party
from tests.weights.test_devices import Side, equal, publish, publisher, subscriber, whole

pytestmark = pytest.mark.skipif(native.lib is None, reason="no native extension")
STAGING = 16 << 20
TRAINED = [Tensor(name, (40, 24), "float32") for name in ("half", "turned", "codes", "across", "same")]
TARGETS = [
    Tensor("half", (40, 24), "float16"), Tensor("turned", (24, 40), "float16"), Tensor("codes", (40, 24), "float8_e4m3fn"),
    Tensor("scales", (5, 3), "float32"), Tensor("across", (24, 40), "float8_e4m3fn"), Tensor("lines", (3, 5), "float32"),
    Tensor("same", (40, 24), "float32"),
]  # fmt: skip
RULES = [
    Cast("half"), Transpose("turned"), Cast("turned"), Quantise("codes", "scales", (8, 8)), Transpose("across"),
    Quantise("across", "lines", (8, 8)),
]  # fmt: skip


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
    assert gpu.calls("cuMemAlloc") == gpu.calls("cuMemFree"), "memory of the GPU was not given back"


class Late:
    """The kernels for the host, which have done nothing before they are waited for."""

    def __init__(self) -> None:
        self._kernels: Any = kernels_for("cpu")
        self._launched: list[Callable[[], None]] = []

    def cast(self, *arguments: Any) -> None:
        self._launched.append(lambda: self._kernels.cast(*arguments))

    def quantise(self, *arguments: Any) -> None:
        self._launched.append(lambda: self._kernels.quantise(*arguments))

    def finish(self) -> None:
        launched, self._launched = self._launched, []
        for kernel in launched:
            kernel()


class OnHost:
    """Such kernels that see what only the GPU sees."""

    memory_of: Gpu
    failing = False
    most = 0

    def __init__(self, device: str) -> None:
        self.kernels: Any = Late()

    @staticmethod
    def takes(buffer: DeviceBuffer) -> bool:
        return True

    def memory(self, other: DeviceBuffer, nbytes: int) -> DeviceBuffer:
        type(self).most = max(self.most, nbytes)
        return like(other, nbytes)

    def numbers(self, buffer: DeviceBuffer, dtype: str, offset: int, shape: Any, strides: Any) -> Any:
        if self.failing:
            raise RuntimeError("no compiler is installed")
        seen = self.memory_of.seen(buffer.address + offset, buffer.nbytes - offset)
        return Numbers(seen.ctypes.data, dtype, tuple(shape), tuple(strides), True, seen)


class Interpreted(OnHost):
    """The same by Triton's interpreter."""

    def __init__(self, device: str) -> None:
        from aiotransfer.weights.kernels.gpu import TritonKernels

        self.kernels = TritonKernels("cpu")

    def numbers(self, buffer: DeviceBuffer, dtype: str, offset: int, shape: Any, strides: Any) -> Any:
        import torch

        flat = torch.from_numpy(self.memory_of.seen(buffer.address + offset, buffer.nbytes - offset))
        item = lookup(dtype).itemsize
        some = flat[: len(flat) // item * item].view(getattr(torch, dtype))
        return some.as_strided(tuple(shape), tuple(step // item for step in strides))


@pytest.fixture(params=["host", "interpreter"])
def kernels(request: pytest.FixtureRequest, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[OnHost]]:
    if request.param == "interpreter":
        skip_interpreter()
        pytest.importorskip("torch").set_num_threads(1)  # its own threads would stay
    base = Interpreted if request.param == "interpreter" else OnHost
    kind = type("Kernels", (base,), {"memory_of": gpu})
    monkeypatch.setattr(on_gpu, "Gpu", kind)
    with np.errstate(all="ignore"):  # the interpreter is NumPy
        yield kind


@pytest.fixture
def by_host(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The types between which the host has converted."""
    seen: list[tuple[str, str]] = []
    real = making.convert

    def noted(box: Box, source: Any, target: Any) -> None:
        seen.append((box.source, box.target))
        real(box, source, target)

    monkeypatch.setattr(making, "convert", noted)
    return seen


def made(number: int) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    return {tensor.name: rng.normal(size=tensor.shape).astype(np.float32) for tensor in TRAINED}


def wanted(values: dict[str, Any]) -> dict[str, Any]:
    found = {"half": values["half"].astype(np.float16), "turned": values["turned"].T.astype(np.float16), "same": values["same"]}
    for codes, scales, matrix in (("codes", "scales", values["codes"]), ("across", "lines", values["across"].T)):
        shape = matrix.shape
        found[codes], found[scales] = np.empty(shape, np.uint8), np.empty((-(-shape[0] // 8), -(-shape[1] // 8)), np.float32)
        quantise(numbers(found[codes], "float8_e4m3fn"), found[scales], np.ascontiguousarray(matrix), (8, 8))
    return found


async def roles(party: Party, gpu: Gpu, staging_bytes: int = STAGING) -> tuple[Side, weights.Publisher, weights.Subscriber]:
    source, target = Side(gpu, whole(TRAINED)), Side(gpu, whole(TARGETS))
    trainer = await publisher(party, source.bound, rules=RULES, staging_bytes=staging_bytes)
    return source, trainer, await subscriber(party, trainer, target.bound)


async def published(gpu: Gpu, source: Side, trainer: weights.Publisher, role: weights.Subscriber, number: int) -> None:
    """A version, which comes right."""
    source.set(**made(number))
    await publish(trainer, number)
    assert role.version == (1, number)
    assert equal(gpu, role, wanted(made(number)))


@pytest.mark.asyncio
@pytest.mark.parametrize("most", [STAGING // 8, 1024, 600])
async def test_what_the_gpu_casts_and_quantises_has_the_bits_of_the_host(
    party: Party, gpu: Gpu, kernels: type[OnHost], by_host: Any, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(work, "ON_GPU", STAGING // most)
    source, trainer, role = await roles(party, gpu)
    for number in (1, 2):
        await published(gpu, source, trainer, role, number)
        record = trainer.records[-1]
        assert record.converted == 4 * 40 * 24 * 4
        assert record.gathered == 40 * 24 * 4, "only what is copied is brought as it is"
        assert record.staging_peak == trainer.staging_held + kernels.most
        assert trainer.sources.on_gpu.held == 0
    assert not by_host
    assert 0 < kernels.most <= most


@pytest.mark.asyncio
async def test_a_slab_that_does_not_fit_is_left_to_the_host(
    party: Party, gpu: Gpu, kernels: type[OnHost], by_host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "ON_GPU", STAGING // 256)  # bytes: some rows of what is cast, no row of blocks
    await published(gpu, *await roles(party, gpu), 1)
    assert by_host == [("float32", "float8_e4m3fn")] * 2


@pytest.mark.asyncio
async def test_memory_of_the_gpu_is_part_of_the_staging_memory(
    party: Party, gpu: Gpu, kernels: type[OnHost], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "LEAST_ON_GPU", 1)
    source, trainer, role = await roles(party, gpu, 1 << 13)
    await published(gpu, source, trainer, role, 1)
    assert 0 < kernels.most <= 1 << 10
    assert trainer.staging_held <= 7 << 10
    assert trainer.records[-1].staging_peak <= 1 << 13


@pytest.mark.asyncio
async def test_of_little_staging_memory_nothing_is_left_for_the_gpu(
    party: Party, gpu: Gpu, kernels: type[OnHost], by_host: Any
) -> None:
    source, trainer, role = await roles(party, gpu, STAGING - 1)
    assert trainer.works.on_gpu_bytes == 0
    await published(gpu, source, trainer, role, 1)
    assert len(by_host) == 4
    assert kernels.most == 0


@pytest.mark.asyncio
@pytest.mark.parametrize("most", [STAGING // 8, 512])
async def test_a_number_that_cannot_be_quantised_is_named_by_its_place(
    party: Party, gpu: Gpu, kernels: type[OnHost], monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(work, "ON_GPU", STAGING // most)
    source, trainer, role = await roles(party, gpu)
    await published(gpu, source, trainer, role, 1)
    wrong = made(2)
    wrong["codes"][33, 4] = wrong["codes"][38, 20] = -np.inf
    source.set(**wrong)
    with pytest.raises(weights.UpdateError, match=r"codes: -inf at \(33, 4\): only finite numbers can be quantised"):
        await publish(trainer, 2)
    assert role.version == (1, 1)
    assert trainer.sources.on_gpu.held == 0
    await published(gpu, source, trainer, role, 3)


def missing(kernels: type[OnHost], monkeypatch: pytest.MonkeyPatch) -> str:
    def refuse(self: OnHost, device: str) -> None:
        raise at.ConfigurationError("Triton is missing")

    monkeypatch.setattr(kernels, "__init__", refuse)
    return "Triton is missing"


def too_old(kernels: type[OnHost], monkeypatch: pytest.MonkeyPatch) -> str:
    def refuse(self: OnHost, device: str) -> None:
        raise AttributeError("module 'triton' has no attribute 'knobs'")

    monkeypatch.setattr(kernels, "__init__", refuse)
    return "no attribute 'knobs'"


def failing(kernels: type[OnHost], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(kernels, "failing", True)
    return "no compiler is installed"


def full(kernels: type[OnHost], monkeypatch: pytest.MonkeyPatch) -> str:
    def refuse(self: OnHost, other: DeviceBuffer, nbytes: int) -> DeviceBuffer:
        raise at.RegistrationError(f"torch has no {nbytes} bytes left")

    monkeypatch.setattr(kernels, "memory", refuse)
    return "bytes left"


@pytest.mark.asyncio
@pytest.mark.parametrize("kernels", ["host"], indirect=True)
@pytest.mark.parametrize("break_it", [missing, too_old, failing, full])
async def test_where_the_gpu_cannot_the_host_does_it_and_one_line_says_why(
    party: Party, gpu: Gpu, kernels: type[OnHost], by_host: Any, break_it: Callable[..., str], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    why = break_it(kernels, monkeypatch)
    source, trainer, role = await roles(party, gpu)
    with caplog.at_level(logging.INFO, "aiotransfer"):
        for number in (1, 2):
            await published(gpu, source, trainer, role, number)
    assert len(by_host) == 8
    (line,) = [record.getMessage() for record in caplog.records if "on the host" in record.getMessage()]
    assert line.startswith("weights on cuda:1 are cast and quantised on the host: ")
    assert why in line


@pytest.mark.asyncio
async def test_memory_that_is_not_torchs_is_left_to_the_host_without_a_word(
    party: Party, gpu: Gpu, by_host: Any, caplog: pytest.LogCaptureFixture
) -> None:
    source, trainer, role = await roles(party, gpu)
    with caplog.at_level(logging.INFO, "aiotransfer"):
        await published(gpu, source, trainer, role, 1)
    assert len(by_host) == 4
    assert not [record for record in caplog.records if "on the host" in record.getMessage()]


def test_a_gpu_without_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "aiotransfer.weights.kernels.gpu", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(at.ConfigurationError, match="need torch and Triton"):
        on_gpu.Gpu("cuda:0")


@contextmanager
def current(streams: list[Any], stream: Any) -> Iterator[None]:
    streams.append(stream)
    yield


def test_memory_of_torch_is_allocated_on_the_stream_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    streams: list[Any] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: current(streams, stream))
    monkeypatch.setattr(on_gpu, "describe", lambda thing: Plain(thing.data_ptr(), thing.nbytes, "cuda:1", True, thing))
    there = on_gpu.Gpu("cpu")
    weight = torch.arange(12, dtype=torch.float32)
    source = DeviceBuffer(Plain(weight.data_ptr(), 48, "cuda:1", True, weight), weight)
    assert there.takes(source)
    memory = there.memory(source, 64)
    assert (memory.nbytes, memory.ordinal, streams) == (64, 1, ["stream of cpu"])
    there.kernels.cast(there.numbers(memory, "bfloat16", 0, (2, 3), (6, 2)), there.numbers(source, "float32", 4, (2, 3), (12, 4)))
    there.kernels.finish()
    assert memory.thing.view(torch.bfloat16)[:6].tolist() == [1, 2, 3, 4, 5, 6]
    with pytest.raises(at.RegistrationError, match="torch has no 1152921504606846976 bytes left on cpu"):
        there.memory(source, 1 << 60)


@pytest.mark.asyncio
@pytest.mark.parametrize("kernels", ["host"], indirect=True)  # Triton's interpreter is for one thread
async def test_ranks_that_lend_parts_of_blocks_to_one_another_convert_the_others_on_the_gpu(
    party: Party, gpu: Gpu, kernels: type[OnHost], by_host: Any
) -> None:
    edges = [0, 13, 20, 40]
    rows = [Piece("w", r, (a, 0), (b - a, 24)) for r, (a, b) in enumerate(itertools.pairwise(edges))]
    layout = Layout([Tensor("w", (40, 24), "float32")], rows, ranks=3)
    engines = [await party.stack.enter_async_context(await party.open_engine(name=f"trainer {r}")) for r in range(3)]
    members, values = [str(engine.address) for engine in engines], made(1)["codes"]
    trainers = []
    for rank, engine in enumerate(engines):
        side = Side(gpu, layout, rank)
        side.set(w=values[edges[rank] : edges[rank + 1]])
        role = weights.Publisher(engine, side.bound, group=engine.group(members), rules=[Quantise("w", "s", (8, 8))],
                                 staging_bytes=STAGING, timeout=20)  # fmt: skip
        trainers.append(await party.stack.enter_async_context(role))
    tensors = [Tensor("w", (40, 24), "float8_e4m3fn"), Tensor("s", (5, 3), "float32")]
    found = await subscriber(party, trainers[0], Side(gpu, whole(tensors)).bound)
    await asyncio.gather(*(publish(role, 1) for role in trainers))
    right = wanted(made(1))
    assert equal(gpu, found, {"w": right["codes"], "s": right["scales"]})
    assert sum(role.records[-1].converted for role in trainers) == 40 * 24 * 4
    assert len(by_host) == 2, "the rows 8 to 16 and 16 to 24, which two ranks hold"


def box(kind: int, shape: tuple[int, ...], block: tuple[int, ...], of: str = "float32", to: str = "") -> Box:
    to = to or ("bfloat16" if kind == CAST else "float8_e4m3fn")
    return Box(kind, of, to, shape, 0, tuple(dense(list(shape), lookup(of).itemsize)), block, 0, 0)


@pytest.mark.parametrize("most", [4, 100, 300, 2500, 1 << 20])
@pytest.mark.parametrize(
    "whole_box",
    [
        box(CAST, (7,), (0,)), box(CAST, (3, 50), (0, 0)), box(CAST, (1, 2, 5, 9), (0, 0, 0, 0)), box(QUANTISE, (40, 24), (8, 8)),
        box(QUANTISE, (3, 41, 24), (1, 8, 8)), box(QUANTISE, (2, 1, 5, 9), (1, 1, 2, 4)), box(QUANTISE, (1, 8, 300), (1, 8, 8)),
    ],
)  # fmt: skip
def test_slabs_are_dense_whole_blocks_and_small_enough(whole_box: Box, most: int) -> None:
    try:
        slabs = list(whole_box.slabs(most))
    except ValueError:
        rows = [min(step, n) for step, n in zip(whole_box.step[-2:-1], whole_box.shape[-2:-1], strict=True)]
        ones = (1,) * (len(whole_box.shape) - len(rows) - 1)
        assert whole_box.kind == QUANTISE
        assert whole_box.nbytes((*ones, *rows, whole_box.shape[-1])) > most, "a row of blocks would have fitted"
        return
    places = np.arange(math.prod(whole_box.shape)).reshape(whole_box.shape)
    at = 0
    for start, shape in slabs:
        assert whole_box.nbytes(shape) <= most
        assert all(low % step == 0 for low, step in zip(start, whole_box.step, strict=True))
        here = places[tuple(slice(low, low + n) for low, n in zip(start, shape, strict=True))]
        assert np.array_equal(here.reshape(-1), np.arange(at, at + math.prod(shape)))
        at += math.prod(shape)
    assert at == places.size


@pytest.mark.parametrize(
    ("given", "known"),
    [
        (box(CAST, (4, 4), (0, 0)), True), (box(CAST, (4, 4), (0, 0), "float64"), False),
        (box(CAST, (4, 4), (0, 0), "float32", "float32"), False), (box(CAST, (4, 4), (0, 0), "float32", "float64"), False),
        (box(CAST, (4, 0), (0, 0)), False), (box(QUANTISE, (4, 4), (128, 128)), True),
        (box(QUANTISE, (4, 4), (128, 128), "float64"), False), (box(QUANTISE, (300, 300), (257, 128)), True),
        (box(QUANTISE, (300, 300), (257, 129)), False), (box(QUANTISE, (256, 256), (1024, 512)), True),
    ],
)  # fmt: skip
def test_what_the_kernels_of_a_gpu_do_not_do_is_known_before(given: Box, known: bool) -> None:
    assert given.is_known == known
