"""The planner beside a re-layout by torch, where torch is installed (`make test-demo`)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from aiotransfer.kv import KVLayout, plan_transfer

pytestmark = pytest.mark.demo
torch: Any = pytest.importorskip("torch", reason="make test-demo installs torch")

torch.set_num_threads(1)  # its own threads would stay
MODEL: dict[str, Any] = {"layers": 3, "kv_heads": 4, "head_dim": 8, "dtype": "bfloat16", "num_pages": 16}


def pool_of(layout: KVLayout, cache: Any, pages: list[int]) -> Any:
    """Pages of this rank's part of `cache` [layer, keys or values, token, head, dim], as the layout keeps them."""
    part = cache[layout.own_layers.start : layout.own_layers.stop, :, :, layout.own_heads.start : layout.own_heads.stop]
    paged = part.unflatten(2, (-1, layout.page_tokens))  # [layer, plane, page, token, head, dim]
    pool = torch.zeros((paged.shape[0], 2, layout.num_pages, *paged.shape[3:]), dtype=cache.dtype)
    pool[:, :, torch.tensor(pages)] = paged
    if layout.order == "HND":
        pool = pool.transpose(3, 4)
    if layout.kind == "together":
        pool = pool.transpose(1, 2)
    return pool.contiguous()


@pytest.mark.parametrize(("order", "kind"), [*itertools.product(["NHD", "HND"], ["apart", "together"])])
@pytest.mark.parametrize("tp", [(1, 1), (4, 2), (2, 4), (4, 1)])
def test_pages_are_where_torch_would_put_them(order: str, kind: str, tp: tuple[int, int]) -> None:
    tokens = 32
    cache = torch.randn((3, 2, tokens, 4, 8), generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for rank in range(tp[1]):
        decode = KVLayout(**MODEL, page_tokens=8, order="HND", kind=kind, tp=tp[1], tp_rank=rank)
        here, there = [5, 2, 9, 0, 15, 7, 1, 4], [3, 11, 6, 8]
        expected = pool_of(decode, cache, there)
        target = torch.zeros_like(expected).view(torch.uint8).flatten()
        for source_rank in range(tp[0]):
            prefill = KVLayout(**MODEL, page_tokens=4, order=order, kind="apart", tp=tp[0], tp_rank=source_rank)
            source = pool_of(prefill, cache, here).view(torch.uint8).flatten()
            plan = plan_transfer(prefill, decode)
            for layer in plan.layers:
                table = plan.table(layer, here, there, tokens=tokens)
                for a, b in zip(table.src_pages.tolist(), table.dst_pages.tolist(), strict=True):
                    start, end = table.src_offset + a * table.src_stride, table.dst_offset + b * table.dst_stride
                    target[end : end + table.page_bytes] = source[start : start + table.page_bytes]
        assert torch.equal(target, expected.view(torch.uint8).flatten())
