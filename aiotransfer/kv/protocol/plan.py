"""From two layouts to page tables: which bytes of a prefill rank go where at a decode rank.

Both layouts are strided (see `layout`), so one grain serves a whole table: the largest block of tokens and heads that is
contiguous on both sides and that every boundary (pages, heads, the first token) is a multiple of. Its place is a whole number
of grains from the beginning of the layer on either side; a table is those numbers, and one call of `write_pages` moves a layer.
The last grain of a request may hold tokens past its last one: those of the same page on either side, which is the request's
own. Tables of different layers differ by an offset alone, and are made once.

Pure: NumPy, no clock, no engine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aiotransfer.kv.protocol.layout import KVLayout, Place, Strides, check_match
from aiotransfer.quote import quote

Indices = NDArray[np.int64]
MOST_CACHED = 4096  # tables: as many requests may be under way at a time without their tables being made again
MOST_ROWS = 1 << 21  # of all of these, with the pages they were made from: 32 MiB


@dataclass(frozen=True, slots=True)
class PageTable:
    """What `write_pages` takes, for one layer: block k goes from `src_offset + src_pages[k] * src_stride` to
    `dst_offset + dst_pages[k] * dst_stride`, `page_bytes` each. Its length is what it counts."""

    src_pages: Indices
    dst_pages: Indices
    page_bytes: int
    src_stride: int
    dst_stride: int
    src_offset: int
    dst_offset: int

    def __len__(self) -> int:
        return len(self.src_pages)

    @property
    def nbytes(self) -> int:
        """How many bytes are moved by all of these pages."""
        return len(self.src_pages) * self.page_bytes


@dataclass(frozen=True, slots=True)
class _Grain:
    """A block: so many tokens and heads of `planes` planes, contiguous on both sides."""

    tokens: int
    heads: int
    planes: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Side:
    layout: KVLayout
    strides: Strides
    first_head: int  # of the heads that move, among this side's own

    def offset(self, layer: int) -> int:
        return self.layout.offset + (layer - self.layout.own_layers.start) * self.strides.layer


def pairs(prefill: KVLayout, decode: KVLayout) -> list[tuple[Place, Place]]:
    """Every (prefill rank, decode rank) of which the first sends the second something, in order of the decode rank. `prefill`,
    `decode`: the layout of any rank of either instance.

    Each head and layer of a decode rank comes from exactly one prefill rank; of several that hold the same one, decode ranks
    take them in turn. The ranks named in the two layouts do not matter. Raises `LayoutMismatch`, or `ValueError`
    where a layout says by a range what its rank has: then that of others is not known.
    """
    check_match(prefill, decode)
    if not (prefill.is_regular and decode.is_regular):
        raise ValueError("with layer_range or head_range it is not known what other ranks hold: ask plan_transfer for each pair")
    layers = [
        [here for here in range(prefill.pp) if len(_common(prefill.layers_at(here), decode.layers_at(there)))]
        for there in range(decode.pp)
    ]
    heads = [
        [here for here in range(prefill.tp) if len(_heads_between(prefill, here, decode, there))] for there in range(decode.tp)
    ]
    return [
        (Place(source_pp, source_tp), Place(pp, tp))
        for pp, tp in np.ndindex(decode.pp, decode.tp) for source_pp in layers[pp] for source_tp in heads[tp]
    ]  # fmt: skip


def sources(prefill: KVLayout, decode: KVLayout) -> list[Place]:
    """The prefill ranks that the rank of `decode` gets something of. `prefill`: the layout of any rank of their instance."""
    return [here for here, there in pairs(prefill, decode) if there == decode.place]


@dataclass(frozen=True, slots=True)
class Receivers:
    """The decode ranks that one prefill rank sends something to: of each of these pipeline ranks, each of these tensor ranks."""

    pp: frozenset[int]
    tp: frozenset[int]

    def __contains__(self, place: Place) -> bool:
        return place.pp_rank in self.pp and place.tp_rank in self.tp

    def __len__(self) -> int:
        return len(self.pp) * len(self.tp)


def receivers(prefill: KVLayout, decode: KVLayout) -> Receivers:
    """Those of the rank of `prefill`, in the instance that the rank of `decode` belongs to.

    Where a layout says by a range what its rank has, that of others is not known: the rank of `decode` alone.
    """
    if not (prefill.is_regular and decode.is_regular):
        return Receivers(frozenset({decode.pp_rank}), frozenset({decode.tp_rank}))
    return Receivers(
        frozenset(pp for pp in range(decode.pp) if len(_common(prefill.own_layers, decode.layers_at(pp)))),
        frozenset(tp for tp in range(decode.tp) if len(_heads_between(prefill, prefill.tp_rank, decode, tp))),
    )


def coverage(plans: Sequence[TransferPlan], decode: KVLayout) -> str:
    """What these plans together do not bring of this decode rank's cache, or bring more than once, in words; empty: nothing."""
    own_layers, own_heads = decode.own_layers, decode.own_heads
    cuts = {own_layers.start, own_layers.stop}
    for plan in plans:
        cuts |= {plan.layers.start, plan.layers.stop}
    edges = sorted(cut for cut in cuts if own_layers.start <= cut <= own_layers.stop)
    for first, past in itertools.pairwise(edges):  # between two edges every plan has all layers or none
        where, at = f"layers {first} to {past - 1}", own_heads.start
        for heads in sorted((plan.heads for plan in plans if first in plan.layers), key=lambda heads: heads.start):
            if heads.start > at:
                break
            if heads.start < at:
                return f"{where}, heads {heads.start} to {min(at, heads.stop) - 1} come from more than one of them"
            at = heads.stop
        if at < own_heads.stop:
            return f"{where}, heads from {at} on (this rank has {own_heads.start} to {own_heads.stop - 1}) come from none of them"
    return ""


class Tables:
    """Tables that were made, of any number of plans, within bounds for all of them together: the oldest make room."""

    def __init__(self) -> None:
        self.rows = 0
        self._made: dict[tuple[Any, ...], tuple[Indices, Indices]] = {}
        self._sizes: dict[tuple[Any, ...], int] = {}

    def __len__(self) -> int:
        return len(self._made)

    def get(self, key: tuple[Any, ...], pages: int, make: Callable[[], tuple[Indices, Indices]]) -> tuple[Indices, Indices]:
        """The table of this key, which was made from so many pages."""
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = make()
            size = self._sizes[key] = len(made[0]) + pages
            self.rows += size
            while len(self._made) > MOST_CACHED or (self.rows > MOST_ROWS and len(self._made) > 1):
                oldest = next(iter(self._made))
                del self._made[oldest]
                self.rows -= self._sizes.pop(oldest)
        return made


def plan_transfer(prefill_layout: KVLayout, decode_layout: KVLayout) -> TransferPlan:
    """What goes from the rank of `prefill_layout` to that of `decode_layout`. Raises `LayoutMismatch` (of different models)."""
    return TransferPlan(prefill_layout, decode_layout, Tables())


class TransferPlan:
    """What goes from one prefill rank to one decode rank. Made by `plan_transfer`."""

    def __init__(self, prefill: KVLayout, decode: KVLayout, tables: Tables) -> None:
        check_match(prefill, decode)
        self.prefill = prefill
        self.decode = decode
        heads = _heads(prefill, decode)
        layers = _common(prefill.own_layers, decode.own_layers)
        self.layers = layers if len(heads) else range(layers.start, layers.start)
        self._heads = heads
        self._here = _Side(prefill, prefill.strides, heads.start - prefill.own_heads.start)
        self._there = _Side(decode, decode.strides, heads.start - decode.own_heads.start)
        self._grains: dict[int, _Grain] = {}
        self._tables = tables

    @property
    def heads(self) -> range:
        """The heads of the model that this plan moves."""
        return self._heads

    def table(
        self,
        layer: int,
        src_pages: ArrayLike,
        dst_pages: ArrayLike,
        *,
        skip_tokens: int = 0,
        tokens: int | None = None,
        chunk: tuple[int, int] | None = None,
    ) -> PageTable:
        """The blocks of `layer` for tokens [`skip_tokens`, `tokens`) of a request, or for a chunk of them.

        `src_pages`, `dst_pages`: the request's pages on either side, in order from its first token on (also of tokens that are
        not sent). `tokens`: past the last one; None: as many as both lists hold. `chunk`: the part [first, past the last) that
        is ready; its ends are multiples of `unit(skip_tokens)`, or those of the request, so that all chunks together count what
        `count` says. Nothing before `skip_tokens` is written and nothing past the page of the last token; of a layer with a
        sliding window, what the window reaches from `tokens`.

        Raises `IndexError` (a layer or page that is not there), `ValueError` (too few pages, a destination page twice, a range
        that makes no sense) or `TypeError`.
        """
        if layer not in self.layers:
            raise IndexError(f"layer {layer} does not go from this prefill rank to this decode rank: {self.layers} do")
        here, there = _pages("src_pages", src_pages, self.prefill), _pages("dst_pages", dst_pages, self.decode)
        if tokens is None:
            tokens = min(len(here) * self.prefill.page_tokens, len(there) * self.decode.page_tokens)
        start, end = self._range(layer, skip_tokens, tokens)
        grain = self._grain(skip_tokens)
        if chunk is not None:
            start, end = self._part(chunk, grain, skip_tokens, start, end)
        if end > start:
            for name, pages, layout in (("src_pages", here, self.prefill), ("dst_pages", there, self.decode)):
                if len(pages) < layout.pages_of(end):
                    raise ValueError(f"{name} has {len(pages)} pages of {layout.page_tokens} tokens: too few for {end} tokens")
        key = self, here.tobytes(), there.tobytes(), start, end, grain.tokens
        ours, theirs = self._tables.get(key, len(here) + len(there), lambda: self._blocks(here, there, start, end, grain))
        return PageTable(
            ours, theirs, grain.nbytes, grain.nbytes, grain.nbytes,
            self._here.offset(layer) + self._here.first_head * self._here.strides.head,
            self._there.offset(layer) + self._there.first_head * self._there.strides.head,
        )  # fmt: skip

    def unit(self, skip_tokens: int = 0) -> int:
        """Where a request of which `skip_tokens` are not sent may be cut into chunks: at multiples of so many tokens."""
        self._range(None, skip_tokens, 0)
        return self._grain(skip_tokens).tokens

    def count(self, tokens: int, skip_tokens: int = 0) -> int:
        """How many blocks all layers have for tokens [`skip_tokens`, `tokens`): what the decode side counts, with any division
        into chunks."""
        grain = self._grain(skip_tokens)
        rows = 0
        for layer in self.layers:
            start, end = self._range(layer, skip_tokens, tokens)
            rows += -(-max(0, end - start) // grain.tokens)
            if not self.decode.windows:  # all layers are alike
                rows *= len(self.layers)
                break
        return rows * (len(self._heads) // grain.heads) * (self.decode.planes // grain.planes)

    def nbytes(self, tokens: int, skip_tokens: int = 0) -> int:
        """How many bytes the blocks that `count` counts have for tokens [`skip_tokens`, `tokens`)."""
        return self.count(tokens, skip_tokens) * self._grain(skip_tokens).nbytes

    def pages_of_blocks(self, layer: int, *, tokens: int, skip_tokens: int = 0) -> Indices:
        """For each block of `table(layer, tokens=, skip_tokens=)`, in which of the request's decode pages it lies: an index into
        `dst_pages`."""
        start, end = self._range(layer, skip_tokens, tokens)
        grain = self._grain(skip_tokens)
        token = np.arange(start, max(start, end), grain.tokens, dtype=np.int64) // self.decode.page_tokens
        shape = (self.decode.planes // grain.planes, len(token), len(self._heads) // grain.heads)
        return np.ascontiguousarray(np.broadcast_to(token[None, :, None], shape).reshape(-1))

    # ---- how ----

    def _range(self, layer: int | None, skip: int, tokens: int) -> tuple[int, int]:
        for name, value in (("skip_tokens", skip), ("tokens", tokens)):
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise TypeError(f"{name} must be an int, not {quote(value)}")
            if value < 0:
                raise ValueError(f"{name} must not be negative: {value}")
        window = self.decode.windows[layer] if self.decode.windows and layer is not None else None
        if window is None:
            return int(skip), int(tokens)
        unit = math.gcd(self.prefill.page_tokens, self.decode.page_tokens)  # a few tokens more, and larger blocks
        return max(int(skip), (int(tokens) - window) // unit * unit), int(tokens)

    @staticmethod
    def _part(chunk: tuple[int, int], grain: _Grain, skip: int, start: int, end: int) -> tuple[int, int]:
        first, past = chunk
        if not skip <= first <= past <= end:
            raise ValueError(f"the chunk {quote(chunk)} does not lie in the tokens [{skip}, {end}) of the request")
        for cut in chunk:
            if cut % grain.tokens and cut != end:
                raise ValueError(f"a chunk of this request ends at multiples of {grain.tokens} tokens, not at {cut}")
        return max(first, start), past

    def _grain(self, start: int) -> _Grain:
        most_tokens = math.gcd(self.prefill.page_tokens, self.decode.page_tokens, start)
        found = self._grains.get(most_tokens)
        if found is None:
            found = self._grains[most_tokens] = self._largest(most_tokens)
        return found

    def _largest(self, most_tokens: int) -> _Grain:
        here, there, heads = self.prefill, self.decode, max(1, len(self._heads))
        n, m = len(here.own_heads), len(there.own_heads)
        most_heads = math.gcd(heads, n, m)
        blocks = [(1, 1)]
        if all(side.strides.head == here.vector_bytes for side in (self._here, self._there)):
            blocks.append((1, most_heads))
        if all(side.strides.token == here.vector_bytes for side in (self._here, self._there)):
            blocks.append((most_tokens, 1))
        if here.order == there.order == "NHD" and most_heads == n == m:
            blocks.append((most_tokens, most_heads))
        if here.order == there.order == "HND" and most_tokens == here.page_tokens == there.page_tokens:
            blocks.append((most_tokens, most_heads))
        tokens, size = max(blocks, key=math.prod)
        page = tokens * size == here.page_tokens * n == there.page_tokens * m
        planes = 2 if page and here.kind == there.kind == "together" else 1
        return _Grain(tokens, size, planes, tokens * size * planes * here.vector_bytes)

    def _blocks(self, here: Indices, there: Indices, start: int, end: int, grain: _Grain) -> tuple[Indices, Indices]:
        if end <= start:
            nothing = np.empty(0, np.int64)
            return nothing, nothing
        token = np.arange(start, end, grain.tokens, dtype=np.int64)
        head = np.arange(0, len(self._heads), grain.heads, dtype=np.int64)
        plane = np.arange(0, self.decode.planes, grain.planes, dtype=np.int64)
        if len(np.unique(used := there[start // self.decode.page_tokens : self.decode.pages_of(end)])) != len(used):
            raise ValueError("dst_pages names a page twice")
        ours = self._places(self._here, here, plane, token, head, grain)
        return ours, self._places(self._there, there, plane, token, head, grain)

    @staticmethod
    def _places(side: _Side, pages: Indices, plane: Indices, token: Indices, head: Indices, grain: _Grain) -> Indices:
        """The places of all vectors, in grains from the beginning of a layer."""
        size, strides = side.layout.page_tokens, side.strides
        places = (pages[token // size] * strides.page + token % size * strides.token) // grain.nbytes
        by_head = head * strides.head // grain.nbytes
        by_plane = plane * strides.plane // grain.nbytes
        return np.ascontiguousarray((by_plane[:, None, None] + places[None, :, None] + by_head[None, None, :]).reshape(-1))


def _common(a: range, b: range) -> range:
    start, stop = max(a.start, b.start), min(a.stop, b.stop)
    return range(start, max(start, stop))


def _heads(prefill: KVLayout, decode: KVLayout) -> range:
    """The heads that go from this one to that one. Of prefill ranks that hold the same, decode ranks take one in turn."""
    return _in_turn(_common(prefill.own_heads, decode.own_heads), prefill, prefill.tp_rank, decode.tp_rank)


def _heads_between(prefill: KVLayout, here: int, decode: KVLayout, there: int) -> range:
    """The same for two tensor ranks of two regular layouts."""
    return _in_turn(_common(prefill.heads_at(here), decode.heads_at(there)), prefill, here, there)


def _in_turn(heads: range, prefill: KVLayout, here: int, there: int) -> range:
    replicas = prefill.replicas
    return range(heads.start, heads.start) if replicas > 1 and here % replicas != there % replicas else heads


def _pages(name: str, pages: ArrayLike, layout: KVLayout) -> Indices:
    array: NDArray[Any] = np.asarray(pages)
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be a list of page numbers, not shape {array.shape} of {array.dtype}")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= layout.num_pages:
        raise IndexError(f"{name} holds page {low if low < 0 else high}; the pool has pages 0 to {layout.num_pages - 1}")
    return np.ascontiguousarray(array, np.int64)
