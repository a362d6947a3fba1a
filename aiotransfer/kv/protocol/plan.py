"""From two layouts to page tables: which bytes of a prefill rank go where at a decode rank.

Both layouts are strided (see `layout`), so one grain serves a whole table (see `grain`): the largest block of
tokens, heads and planes that is contiguous on both sides and that every boundary (pages, the first token,
tokens that are dealt to several ranks) is a multiple of. A table is the places of these blocks in units of
either side, and one call of `write_pages` moves a layer. The last block of a request may hold tokens past its
last one: those of the same page on either side, which is the request's own. Tables of different layers differ
by an offset alone, and are made once.

Pure: NumPy, no clock, no engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aiotransfer.kv.protocol.dealing import unit_of
from aiotransfer.kv.protocol.grain import Dimension, Grain, is_fine, largest, unit
from aiotransfer.kv.protocol.layout import NO_PAGE, KVLayout, LayoutMismatch, Strides, check_match
from aiotransfer.kv.protocol.ranks import common, serves, turn_of
from aiotransfer.quote import quote

Indices = NDArray[np.int64]
MOST_CACHED = 4096  # tables: as many requests may be under way at a time without their tables being made again
MOST_ROWS = 1 << 21  # of all of these, with the pages they were made from: 32 MiB


@dataclass(frozen=True, slots=True)
class PageTable:
    """What `write_pages` takes, for one layer: block k goes from `src_offset + src_pages[k] * src_stride` to
    `dst_offset + dst_pages[k] * dst_stride`, `page_bytes` each. Its length is what it counts.

    `src_memory`, `dst_memory`: in which region, where there is one for each layer of a rank.
    """

    src_pages: Indices
    dst_pages: Indices
    page_bytes: int
    src_stride: int
    dst_stride: int
    src_offset: int
    dst_offset: int
    src_memory: int = 0
    dst_memory: int = 0

    def __len__(self) -> int:
        return len(self.src_pages)

    @property
    def nbytes(self) -> int:
        """How many bytes are moved by all of these pages."""
        return len(self.src_pages) * self.page_bytes


class _Side:
    """One of the two ranks, with what is asked of it for every table."""

    __slots__ = ("_base", "_first_layer", "_is_apart", "_layer_step", "layout", "strides")

    def __init__(self, layout: KVLayout, first_head: int) -> None:
        """`first_head`: the first one that moves, among this side's own."""
        self.layout = layout
        self.strides: Strides = layout.byte_strides
        self._is_apart = layout.outermost == "tensors"
        self._first_layer = layout.own_layers.start
        self._layer_step = 0 if self._is_apart else self.strides.layer
        self._base = layout.offset + first_head * self.strides.head

    def memory(self, layer: int) -> int:
        """Which region of this side the layer lies in."""
        return layer - self._first_layer if self._is_apart else 0

    def offset(self, layer: int) -> int:
        """Where the first head that moves begins, in the memory of this layer."""
        return self._base + (layer - self._first_layer) * self._layer_step


class Tables:
    """Tables that were made, of any number of plans, within bounds for all of them together: the oldest make
    room."""

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


def plan_transfer(prefill_layout: KVLayout, decode_layout: KVLayout, *, request: str = "") -> TransferPlan:
    """What goes from the rank of `prefill_layout` to that of `decode_layout`.

    `request`: the id of the request. Of prefill ranks that hold the same, one serves a decode rank, in turn
    by this id (`sources`); the plans of the others move nothing. Raises `LayoutMismatch` (of different
    models).
    """
    turn = turn_of(request)
    plan = TransferPlan(prefill_layout, decode_layout, Tables())
    if not serves(prefill_layout, prefill_layout.tp_rank, decode_layout.tp_rank, turn):
        plan.layers = range(plan.layers.start, plan.layers.start)
    return plan


class TransferPlan:
    """What goes from one prefill rank, which is the one that is asked, to one decode rank. Made by
    `plan_transfer`.

    Raises `LayoutMismatch` where the cache of the one cannot become that of the other.
    """

    def __init__(self, prefill: KVLayout, decode: KVLayout, tables: Tables) -> None:
        check_match(prefill, decode)
        self.prefill = prefill
        self.decode = decode
        heads = common(prefill.own_heads, decode.own_heads)
        layers = common(prefill.own_layers, decode.own_layers)
        moves = len(heads) and prefill.deal.meets(decode.deal)
        self.layers = layers if moves else range(layers.start, layers.start)
        self._heads = heads
        if moves and prefill.opaque and prefill.order == "NHD" and not prefill.own_heads == decode.own_heads == heads:
            raise LayoutMismatch("heads of opaque pages", str(prefill.own_heads), str(decode.own_heads))
        self._here = _Side(prefill, heads.start - prefill.own_heads.start)
        self._there = _Side(decode, heads.start - decode.own_heads.start)
        self._deals = prefill.deal, decode.deal
        self._alike = prefill.deal.way == decode.deal.way  # what one rank has the other has, in the same order
        self._grains: dict[int, Grain] = {}
        self._tables = tables
        if moves:
            self._grain(0)  # raises where the strides are unfit

    @property
    def heads(self) -> range:
        """The heads of the model that this plan moves."""
        return self._heads

    def table(
        self, layer: int, src_pages: ArrayLike, dst_pages: ArrayLike, *, skip_tokens: int = 0, tokens: int | None = None,
        chunk: tuple[int, int] | None = None, window: int | None = None,
    ) -> PageTable:  # fmt: skip
        """The blocks of `layer` for tokens [`skip_tokens`, `tokens`) of a request, or for a chunk of them.

        `src_pages`, `dst_pages`: the request's pages on either side, in order from its first token on (also
        of tokens that are not sent). Where `dst_pages` says `NO_PAGE` nothing is written; there the other
        list may say so too. `tokens`: past the last one; None: as many as both lists hold. `chunk`: the part
        [first, past the last) that is ready; its ends are multiples of `unit(skip_tokens)`, or those of the
        request, so that all chunks together count what `count` says. Nothing before `skip_tokens` is written
        and nothing past the page of the last token; of a layer with a sliding window, and of a request with a
        `window` (in tokens), what the window reaches from `tokens`.

        Raises `IndexError` (a layer or page that is not there), `ValueError` (too few pages, a destination
        page twice, a range that makes no sense) or `TypeError`.
        """
        if layer not in self.layers:
            raise IndexError(f"layer {layer} does not go from this prefill rank to this decode rank: {self.layers} do")
        here, there = _pages("src_pages", src_pages, self.prefill), _pages("dst_pages", dst_pages, self.decode)
        if tokens is None:
            tokens = min(self.prefill.tokens_in(len(here)), self.decode.tokens_in(len(there)))
        start, end = self._range(layer, skip_tokens, tokens, window)
        grain = self._grain(skip_tokens)
        if chunk is not None:
            start, end = self._part(chunk, self.unit(skip_tokens), skip_tokens, start, end)
        if end > start:
            for name, pages, layout in (("src_pages", here, self.prefill), ("dst_pages", there, self.decode)):
                if len(pages) < layout.pages_of(end):
                    raise ValueError(f"{name} has {len(pages)} pages of {layout.page_tokens} tokens: too few for {end} tokens")
        key = self, here.tobytes(), there.tobytes(), start, end, grain
        ours, theirs = self._tables.get(key, len(here) + len(there), lambda: self._blocks(here, there, start, end, grain))
        return PageTable(
            ours, theirs, grain.nbytes, grain.here, grain.there, self._here.offset(layer), self._there.offset(layer),
            self._here.memory(layer), self._there.memory(layer),
        )  # fmt: skip

    def unit(self, skip_tokens: int = 0) -> int:
        """Where a request of which `skip_tokens` are not sent may be cut into chunks: at multiples of so many
        tokens."""
        self._range(None, skip_tokens, 0, None)
        tokens = self._grain(skip_tokens).tokens
        return unit_of(self._deals[1], tokens) if self._alike else tokens

    def count(
        self, tokens: int, skip_tokens: int = 0, *, window: int | None = None, dst_pages: ArrayLike | None = None
    ) -> int:  # fmt: skip
        """How many blocks all layers have for tokens [`skip_tokens`, `tokens`), or for the `window` at their
        end: what the decode side counts, with any division into chunks. `dst_pages`: its pages, where
        `NO_PAGE` is among them; else None."""
        grain = self._grain(skip_tokens)
        pages = None if dst_pages is None else _pages("dst_pages", dst_pages, self.decode)
        found: dict[int, int] = {}  # by the first token: layers with one window are alike
        rows = 0
        for layer in self.layers:
            start, end = self._range(layer, skip_tokens, tokens, window)
            if start not in found:
                found[start] = self._count(start, end, grain, pages)
            rows += found[start]
        return rows * (len(self._heads) // grain.heads) * (self.decode.planes // grain.planes) * grain.pieces

    def nbytes(
        self, tokens: int, skip_tokens: int = 0, *, window: int | None = None, dst_pages: ArrayLike | None = None
    ) -> int:  # fmt: skip
        """How many bytes the blocks have that `count` counts for the same `tokens`, `skip_tokens`, `window`
        and `dst_pages`."""
        return self.count(tokens, skip_tokens, window=window, dst_pages=dst_pages) * self._grain(skip_tokens).nbytes

    def pages_of_blocks(
        self, layer: int, *, tokens: int, skip_tokens: int = 0, window: int | None = None, dst_pages: ArrayLike | None = None
    ) -> Indices:  # fmt: skip
        """For each block of the `table` of `layer` with the same `tokens`, `skip_tokens` and `window`, in
        which of the request's decode pages it lies: an index into `dst_pages`, which is given where it has
        `NO_PAGE`."""
        start, end = self._range(layer, skip_tokens, tokens, window)
        grain = self._grain(skip_tokens)
        index = self._tokens(start, end, grain.tokens)[1] // self.decode.page_tokens
        if dst_pages is not None:
            index = index[_pages("dst_pages", dst_pages, self.decode)[index] != NO_PAGE]
        shape = (self.decode.planes // grain.planes, len(index), len(self._heads) // grain.heads, grain.pieces)
        return np.ascontiguousarray(np.broadcast_to(index[None, :, None, None], shape).reshape(-1))

    # ---- how ----

    def _range(self, layer: int | None, skip: int, tokens: int, window: int | None) -> tuple[int, int]:
        for name, value in (("skip_tokens", skip), ("tokens", tokens), ("window", window or 0)):
            if type(value) is int and value >= 0:
                continue
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise TypeError(f"{name} must be an int, not {quote(value)}")
            if value < 0:
                raise ValueError(f"{name} must not be negative: {value}")
        if self.decode.opaque:
            for side in (self.prefill, self.decode):
                side.check_skip(int(skip))
        of_layer = self.decode.windows[layer] if self.decode.windows and layer is not None else None
        if of_layer is None and window is None:
            return int(skip), int(tokens)
        reach = min(each for each in (of_layer, window) if each is not None)
        page = math.gcd(self.prefill.page_tokens, self.decode.page_tokens)  # a few tokens more, and larger blocks
        whole = unit_of(self._deals[1], page) if self._alike else page
        return max(int(skip), (int(tokens) - reach) // whole * whole), int(tokens)

    @staticmethod
    def _part(chunk: tuple[int, int], unit: int, skip: int, start: int, end: int) -> tuple[int, int]:
        first, past = chunk
        if not skip <= first <= past <= end:
            raise ValueError(f"the chunk {quote(chunk)} does not lie in the tokens [{skip}, {end}) of the request")
        for cut in chunk:
            if cut % unit and cut not in (skip, end):
                raise ValueError(f"a chunk of this request ends at multiples of {unit} tokens, not at {cut}")
        return max(first, start), past

    def _grain(self, skip: int) -> Grain:
        """The blocks of requests that begin at token `skip`."""
        here, there = self.prefill, self.decode
        if self._alike:
            most = math.gcd(here.page_tokens, there.page_tokens, self._deals[1].count(skip))
        else:
            dealt = [side.cp_tokens for side in (here, there) if side.cp > 1]
            most = math.gcd(here.page_tokens, there.page_tokens, skip, *dealt)
        found = self._grains.get(most)
        if found is None:
            found = self._grains[most] = self._largest(most)
        return found

    def _largest(self, most_tokens: int) -> Grain:
        a, b, vector, heads = self._here, self._there, self.prefill.vector_bytes, max(1, len(self._heads))
        if self.prefill.opaque:  # the bytes within have no order that this side knows: a block is a page, or a head of it
            size = 1 if self.prefill.order == "HND" else heads
            tokens, size, planes = self.prefill.page_tokens, size, 1
        else:
            dimensions = (
                Dimension(most_tokens, a.strides.token, b.strides.token),
                Dimension(heads, a.strides.head, b.strides.head),
                Dimension(self.decode.planes, a.strides.plane, b.strides.plane),
            )
            tokens, size, planes = largest(vector, dimensions)
        steps = []
        for side in (a, b):
            strides = [side.strides.page]
            strides += [tokens * side.strides.token] if tokens < side.layout.page_tokens else []
            strides += [size * side.strides.head] if size < heads else []
            strides += [planes * side.strides.plane] if planes < self.decode.planes else []
            steps.append(strides)
        nbytes = tokens * size * planes * vector
        piece, left, right = unit(nbytes, *steps)
        if not is_fine(piece, vector):
            raise LayoutMismatch("strides", list(a.strides), list(b.strides))
        return Grain(tokens, size, planes, nbytes // piece, piece, left, right)

    def _tokens(self, start: int, end: int, step: int) -> tuple[Indices, Indices]:
        """The first token of each block, as its place among those that either side holds."""
        if self._alike:
            deal = self._deals[1]
            first, past = deal.count(start), deal.count(end)
            same = np.arange(first, max(first, past), step, dtype=np.int64)
            return same, same
        token = np.arange(start, max(start, end), step, dtype=np.int64)
        ours, theirs = self._deals
        token = token[ours.has(token) & theirs.has(token)]
        return ours.own(token), theirs.own(token)

    def _count(self, start: int, end: int, grain: Grain, pages: Indices | None) -> int:
        if pages is None and self._alike:
            deal = self._deals[1]
            return -(-max(0, deal.count(end) - deal.count(start)) // grain.tokens)
        theirs = self._tokens(start, end, grain.tokens)[1]
        return len(theirs) if pages is None else int((pages[theirs // self.decode.page_tokens] != NO_PAGE).sum())

    def _blocks(self, here: Indices, there: Indices, start: int, end: int, grain: Grain) -> tuple[Indices, Indices]:
        if end <= start:
            nothing = np.empty(0, np.int64)
            return nothing, nothing
        used = there[self.decode.written(start, end)]
        used = used[used != NO_PAGE]
        if len(np.unique(used)) != len(used):
            raise ValueError("dst_pages names a page twice")
        ours, theirs = self._tokens(start, end, grain.tokens)
        wanted = there[theirs // self.decode.page_tokens] != NO_PAGE
        if not wanted.all():
            ours, theirs = ours[wanted], theirs[wanted]
        if (here[ours // self.prefill.page_tokens] == NO_PAGE).any():
            raise ValueError("src_pages says that there is no page where dst_pages names one")
        left = self._places(self._here, here, ours, grain, grain.here)
        return left, self._places(self._there, there, theirs, grain, grain.there)

    def _places(self, side: _Side, pages: Indices, token: Indices, grain: Grain, unit: int) -> Indices:
        """The places of all pieces, in units from where a layer begins."""
        size, strides = side.layout.page_tokens, side.strides
        by_token = (pages[token // size] * strides.page + token % size * strides.token) // unit
        by_head = np.arange(0, len(self._heads), grain.heads, dtype=np.int64) * strides.head // unit
        by_plane = np.arange(0, self.decode.planes, grain.planes, dtype=np.int64) * strides.plane // unit
        places = by_plane[:, None, None] + by_token[None, :, None] + by_head[None, None, :]
        if grain.pieces == 1:
            return np.ascontiguousarray(places.reshape(-1))
        return np.ascontiguousarray((places[..., None] + np.arange(grain.pieces, dtype=np.int64)).reshape(-1))


def _pages(name: str, pages: ArrayLike, layout: KVLayout) -> Indices:
    array: NDArray[Any] = np.asarray(pages)
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be a list of page numbers, not shape {array.shape} of {array.dtype}")
    low, high = int(array.min()), int(array.max())
    if low < NO_PAGE or high >= layout.num_pages:
        raise IndexError(f"{name} holds page {low if low < NO_PAGE else high}; the pool has pages 0 to {layout.num_pages - 1}")
    return np.ascontiguousarray(array, np.int64)
