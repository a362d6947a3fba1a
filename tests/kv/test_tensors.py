"""Layouts of the tensors of an engine: moved by what is derived, they arrive where the engine sees them."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer import kv

torch: Any = pytest.importorskip("torch", reason="make test-demo installs torch")
pytestmark = pytest.mark.demo
torch.set_num_threads(1)  # its own threads would stay

LAYERS, PAGES, HEADS, TOKENS, WIDTH = 3, 10, 4, 8, 16


def one_buffer(order: str, pad: int = 0, offset: int = 0) -> dict[str, Any]:
    """vLLM's views [page, head, token, vector] of one buffer, whose dimensions lie in memory as `order` says (L is the layer)."""
    sizes = {"L": LAYERS, "B": PAGES, "H": HEADS, "N": TOKENS, "C": WIDTH}
    steps, step = {}, 1
    for letter in reversed(order):
        steps[letter] = step
        step *= sizes[letter]
        step += pad if letter == order[2] else 0
    buffer = torch.zeros(offset + step, dtype=torch.bfloat16)
    shape, strides = [sizes[x] for x in "BHNC"], [steps[x] for x in "BHNC"]
    return {f"layer {k}": buffer.as_strided(shape, strides, offset + k * steps["L"]) for k in range(LAYERS)}


def apart() -> dict[str, Any]:
    return {f"layer {k}": torch.zeros(PAGES, HEADS, TOKENS, WIDTH, dtype=torch.bfloat16) for k in range(LAYERS)}


async def carried(here: dict[str, Any], there: dict[str, Any], **options: Any) -> None:
    """Fill some pages of one side, send a request, and look at the other side through its tensors."""
    options = {"dims": "BHNC", "kv_heads": HEADS} | options
    truth = torch.randn(LAYERS, 20, HEADS, WIDTH, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    ours, theirs = [7, 2, 5], [1, 9, 4]
    for layer, tensor in enumerate(here.values()):
        for token in range(20):
            tensor[ours[token // TOKENS], :, token % TOKENS] = truth[layer, token]
    async with at.open_engine() as left, at.open_engine() as right:
        (a,), (b,) = kv.layout_from_tensors(here, engine=left, **options), kv.layout_from_tensors(there, engine=right, **options)
        assert a.names == b.names == tuple(here)
        async with (
            kv.Prefiller(left, a.layout, a.pages) as prefiller,
            kv.Decoder(right, b.layout, b.pages, checksums=True) as decoder,
        ):

            async def serve() -> None:
                async with await prefiller.accept(timeout=20) as request:
                    request.use(ours)
                    for layer in request.layers:
                        request.layer_ready(layer)
                    await request.finish()

            serving = asyncio.create_task(serve())
            async with decoder.request(await right.connect(left.address, timeout=20), "a", theirs, tokens=20) as handle:
                await handle.arrived(timeout=20)
            await serving
    for layer, tensor in enumerate(there.values()):
        for token in range(20):
            assert torch.equal(tensor[theirs[token // TOKENS], :, token % TOKENS], truth[layer, token])
        assert not tensor[[0, 2, 3, 5, 6, 7, 8]].any()


ORDERS = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")


@pytest.mark.asyncio
@pytest.mark.parametrize("order", ORDERS)
async def test_every_order_of_vllm_becomes_every_other(order: str) -> None:
    for other in ORDERS:
        await carried(one_buffer(order), one_buffer(other))


@pytest.mark.asyncio
@pytest.mark.parametrize("pair", [("apart", "apart"), ("apart", "LBHNC"), ("BLNHC", "apart")])
async def test_a_tensor_for_each_layer_is_a_region_for_each(pair: tuple[str, str]) -> None:
    here, there = (apart() if each == "apart" else one_buffer(each) for each in pair)
    await carried(here, there)


@pytest.mark.asyncio
async def test_padded_pages_and_layers_at_odd_places_of_one_storage() -> None:
    await carried(one_buffer("LBHNC", pad=32, offset=8), one_buffer("LBNHC", pad=64))
    odd = one_buffer("LBHNC", offset=8)
    swapped = {"layer 0": odd["layer 2"], "layer 1": odd["layer 0"], "layer 2": odd["layer 1"]}
    await carried(swapped, one_buffer("LBHNC"))


@pytest.mark.asyncio
async def test_opaque_pages_arrive_as_they_are() -> None:
    await carried(one_buffer("LBHNC"), apart(), opaque=True)


def test_what_dimensions_are_says_the_kind() -> None:
    def of(shape: list[int], dims: str, **other: Any) -> kv.KVLayout:
        tensors = {"a": torch.zeros(shape, dtype=torch.uint8)}
        return kv.layout_from_tensors(tensors, dims=dims, **({"kv_heads": 4} | other))[0].layout

    both = of([2, 10, 8, 4, 16], "KBNHC")
    assert (both.kind, both.planes, both.page_tokens, both.num_pages, both.head_dim) == ("apart", 2, 8, 10, 16)
    assert of([10, 2, 4, 8, 16], "BKHNC").byte_strides == (0, 4 * 8 * 16, 2 * 4 * 8 * 16, 16, 8 * 16)
    assert of([10, 8, 576], "BNC", kv_heads=1).kind == "mla"
    assert of([10, 2, 8, 32], "BHNC", tp=2, tp_rank=1).own_heads == range(2, 4)
    assert of([10, 4, 8, 16], "BHNC", dtype="fp8").dtype == "float8_e4m3fn"
    assert of([10, 4, 8, 16], "BHNC", dtype="int4").head_dim == 32


def test_layers_of_several_kinds_are_several_pools() -> None:
    tensors = {f"{k}": torch.zeros(10, 4, 8, 16 if k % 2 else 32) for k in range(5)}
    pools = kv.layout_from_tensors(tensors, dims="BHNC", kv_heads=4)
    assert [pool.names for pool in pools] == [("0", "2", "4"), ("1", "3")]
    assert [pool.layout.head_dim for pool in pools] == [32, 16]
    assert all(pool.pages is None for pool in pools)


@pytest.mark.parametrize(
    ("tensors", "options", "words"),
    [
        ({}, {}, "a mapping from the name"), ([1], {}, "a mapping from the name"),
        ({"a": np.zeros((2, 2, 2, 2))}, {}, "a: a tensor of torch is wanted, not ndarray"),
        ({"a": torch.zeros(2, 2, 2)}, {}, "a: it has 3 dimensions"),
        ({"a": torch.zeros(2, 4, 0, 2)}, {}, "a: it is empty"),
        ({"a": torch.zeros(2, 4, 2, 2).transpose(2, 3)}, {}, r"a: its vectors \(C\) are not contiguous"),
        ({"a": torch.zeros(3, 2, 4, 2, 2)}, {"dims": "KBHNC"}, "K is keys and values, 2, and not 3"),
        ({"a": torch.zeros(2, 4, 2, 2)}, {"dims": "BHN"}, "dims must name B, N and C"),
        ({"a": torch.zeros(2, 4, 2, 2)}, {"dims": "BBNC"}, "dims must name"),
        ({"a": torch.zeros(2, 3, 2, 2)}, {}, "this rank has 4 of 4 heads, and the tensors have 3"),
        ({"a": torch.zeros(2, 4, 2, 2)}, {"layers": 3}, "this rank has 3 layers of 3, and 1 tensors"),
        ({"a": torch.zeros(1, 4, 2, 2).expand(2, 4, 2, 2)}, {}, "strides: from one page to the next are 0"),
        ({"a": torch.zeros(2, 4, 2, 3, dtype=torch.uint8)}, {"dtype": "bfloat16"}, "no whole number of bfloat16"),
    ],
)  # fmt: skip
def test_what_is_no_cache_is_refused_by_name_and_reason(tensors: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        kv.layout_from_tensors(tensors, **({"dims": "BHNC", "kv_heads": 4} | options))


def test_groups_that_overlay_each_other_are_named() -> None:
    tensor = torch.zeros(2, 4, 2, 2)
    with pytest.raises(ValueError, match="b: it is the same memory as a; give each group of layers by itself"):
        kv.layout_from_tensors({"a": tensor, "b": tensor}, dims="BHNC", kv_heads=4)


def test_every_problem_is_said_at_once() -> None:
    tensors = {f"{k}": torch.zeros(2, 2) for k in range(12)}
    with pytest.raises(ValueError, match=r"0: it has 2 dimensions.*; 7: it has.*; and 4 more"):
        kv.layout_from_tensors(tensors, dims="BHNC", kv_heads=4)
