"""Checksums as they travel: made by the prefill side, in front of its tail, and compared by the decode
side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aiotransfer.kv.protocol.checksum import Sums, block_sums, page_sums
from aiotransfer.kv.protocol.errors import WrongPageError
from aiotransfer.kv.roles.tails import HEADER_BYTES

if TYPE_CHECKING:
    from aiotransfer.kv.protocol.plan import TransferPlan

Bytes = NDArray[np.uint8]


def sums_of_layer(
    plan: TransferPlan, layer: int, memories: Sequence[Bytes], pages: tuple[Any, Any], tokens: int, skip_tokens: int, *,
    here: bool,
) -> Sums:  # fmt: skip
    """One number for each decode page of the request, from the memories of the prefill side (`here`) or of
    the decode side.

    `pages`: of the request, on both sides.
    """
    table = plan.table(layer, *pages, tokens=tokens, skip_tokens=skip_tokens)
    if here:
        memory, starts = memories[table.src_memory], table.src_offset + table.src_pages * table.src_stride
    else:
        memory, starts = memories[table.dst_memory], table.dst_offset + table.dst_pages * table.dst_stride
    index = plan.pages_of_blocks(layer, tokens=tokens, skip_tokens=skip_tokens)
    return page_sums(block_sums(memory, starts, table.page_bytes), index, plan.decode.pages_of(tokens))


def check_sums(
    plan: TransferPlan, memories: Sequence[Bytes], tail: Bytes, page_ids: NDArray[np.int64], order: Any, peer: Any
) -> None:  # fmt: skip
    """Compare what one prefill rank sent with what lies here. Raises `WrongPageError`."""
    count = plan.decode.pages_of(order.tokens)
    sent = tail[HEADER_BYTES : HEADER_BYTES + 8 * count * len(plan.layers)].view(np.uint64).reshape(len(plan.layers), count)
    if int(tail[8:HEADER_BYTES].view(np.uint64)[0]) != count * len(plan.layers):
        raise WrongPageError(f"{peer} sent no checksums with request {order.id!r}", id=order.id, peer=str(peer.address))
    theirs = np.zeros(plan.prefill.pages_of(order.tokens), np.int64)  # where they lay there does not matter
    for row, layer in zip(sent, plan.layers, strict=True):
        ours = sums_of_layer(plan, layer, memories, (theirs, page_ids), order.tokens, order.skip_tokens, here=False)
        wrong = np.flatnonzero(ours != row)
        if len(wrong):
            page = int(page_ids[wrong[0]])
            raise WrongPageError(
                f"request {order.id!r}: page {page} of layer {layer} is not what {peer} sent ({len(wrong)} wrong in this layer)",
                id=order.id, layer=layer, page=page, peer=str(peer.address),
                hint="the request failed, others did not; is the source changed before it has been sent?",
            )  # fmt: skip
