"""Where a rank keeps which part of the KV cache.

A cache has, for each layer, token and head, one vector of keys and one of values (MLA: one latent vector;
packed: one vector of both, or a state). A rank holds some of the layers (pipeline parallel), of the heads
(tensor parallel) and of the tokens (context parallel), in pages of some number of tokens, and an engine lays
these out as it likes. All layouts that serving engines use are strided: the place of a vector is a sum of one
product for each of layer, key or value, page, token and head. `KVLayout` says what a rank holds and how;
everything else here is derived from that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from aiotransfer.kv.protocol.dealing import Deal
from aiotransfer.kv.protocol.elements import element
from aiotransfer.kv.protocol.fields import one_of, part, row, whole, windows
from aiotransfer.quote import quote

ORDERS = ("NHD", "HND")
KINDS = ("apart", "together", "mla", "packed")
OUTERMOST = ("layers", "pages", "tensors")
MOST_RANKS = 4096  # of one instance
MOST_NAME = 64  # characters of an element type
MOST_POOL_BYTES = 1 << 60  # every place in a pool fits 64 bits
NO_PAGE = -1  # in a list of pages: nothing is written there


class LayoutMismatch(ValueError):
    """Two caches that cannot be matched: `field`, and what each side has there."""

    def __init__(self, field: str, prefill: object, decode: object) -> None:
        super().__init__(
            f"the two caches differ in {field}: the prefill side has {quote(prefill)}, the decode side {quote(decode)}"
        )
        self.field = field
        self.prefill = prefill
        self.decode = decode

    def __reduce__(self) -> tuple[Any, ...]:
        return LayoutMismatch, (self.field, self.prefill, self.decode)


class Place(NamedTuple):
    """A rank within one instance of a model."""

    pp_rank: int
    tp_rank: int
    cp_rank: int = 0

    def __str__(self) -> str:
        return str(tuple(self) if self.cp_rank else (self.pp_rank, self.tp_rank))


class Strides(NamedTuple):
    """Bytes from one layer, plane (keys or values), page, token and head to the next."""

    layer: int
    plane: int
    page: int
    token: int
    head: int


@dataclass(frozen=True)
class KVLayout:
    """One rank's part of a KV cache: pages of layers that are alike.

    Of the model: `layers`, `kv_heads` (before they are divided among ranks; 1 for MLA), `head_dim` (MLA: of
    the latent; packed: of keys and values together, or of a state), `dtype` as torch or an engine names it
    ("bfloat16", "fp8", "fp8_e5m2", "int4"), `windows` (a sliding window in tokens for each layer, None for
    full attention; empty: no layer has one).

    Of its pages: `page_tokens` in each, `num_pages` in the pool, `order` within a page ("NHD": all heads of a
    token together, "HND": all tokens of a head), `kind` ("apart": all pages of keys, then all of values, as
    vLLM's [2, pages, ...]; "together": keys and values of a page side by side, as FlashInfer's [pages, 2,
    ...]; "mla": one latent, which no rank divides; "packed": one vector for each token and head, with heads
    divided: keys and values side by side, or a state), `outermost` ("layers": one tensor for each layer, one
    after the other; "pages": all layers of a page together; "tensors": a memory of its own for each layer),
    `offset`: bytes before the pool in its memory. `strides`: where pages do not lie as these say (padded,
    say), the bytes from one layer, plane, page, token and head to the next; None: as they say. `opaque`: the
    bytes of a page and head (order "NHD": of a page) have an order of their own, so that pages are moved
    whole.

    Of this rank: `tp`, `tp_rank`, `pp`, `pp_rank`, `cp`, `cp_rank`. Layers are divided evenly, the earlier
    ranks having one more; `partition`: else, how many each pipeline rank has. Heads are divided evenly, or
    each is held by several ranks. Where that is otherwise, `layer_range` and `head_range` (first, past the
    last) say what this rank has. Tokens are dealt to the `cp` context ranks in turn, `cp_tokens` at a time.

    Raises `TypeError` or `ValueError`, each naming the field: each number has a bound (`fields.MOST`),
    because layouts come from peers.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    page_tokens: int
    num_pages: int
    order: str = "NHD"
    kind: str = "apart"
    outermost: str = "layers"
    tp: int = 1
    tp_rank: int = 0
    pp: int = 1
    pp_rank: int = 0
    layer_range: tuple[int, int] | None = None
    head_range: tuple[int, int] | None = None
    windows: tuple[int | None, ...] = ()
    offset: int = 0
    strides: tuple[int, ...] | None = None
    opaque: bool = False
    partition: tuple[int, ...] = ()
    cp: int = 1
    cp_rank: int = 0
    cp_tokens: int = 1

    def __post_init__(self) -> None:
        for name in ("layers", "kv_heads", "head_dim", "page_tokens", "num_pages", "tp", "pp", "cp", "cp_tokens"):
            whole(name, getattr(self, name), 1)
        for name in ("tp_rank", "pp_rank", "cp_rank", "offset"):
            whole(name, getattr(self, name), 0)
        for name, known in (("order", ORDERS), ("kind", KINDS), ("outermost", OUTERMOST)):
            one_of(name, getattr(self, name), known)
        if not isinstance(self.dtype, str) or len(self.dtype) > MOST_NAME:
            raise TypeError(f"dtype must be a name such as 'bfloat16', not {quote(self.dtype)}")
        if not isinstance(self.opaque, bool):
            raise TypeError(f"opaque is True or False, not {quote(self.opaque)}")
        object.__setattr__(self, "dtype", element(self.dtype).name)
        if self.head_dim * element(self.dtype).bits % 8:
            raise ValueError(f"head_dim: {self.head_dim} elements of {self.dtype} are no whole bytes")
        self._check_ranks()
        object.__setattr__(self, "windows", windows(self.windows, self.layers))
        if self.strides is not None:
            object.__setattr__(self, "strides", row("strides", self.strides, len(Strides._fields), 0))
            self._check_strides()
        if self.offset + self.pool_bytes > MOST_POOL_BYTES:
            raise ValueError(f"num_pages: a pool of {self.pool_bytes} bytes is more than there can be")

    def _check_ranks(self) -> None:
        if self.tp * self.pp * self.cp > MOST_RANKS:
            raise ValueError(f"tp * pp * cp must not exceed {MOST_RANKS} ranks: {self.tp} * {self.pp} * {self.cp}")
        for name in ("tp", "pp", "cp"):
            rank, of = getattr(self, f"{name}_rank"), getattr(self, name)
            if rank >= of:
                raise ValueError(f"{name}_rank must lie below {name}: {rank} of {of}")
        if self.kind == "mla" and self.kv_heads != 1:
            raise ValueError(f"kv_heads must be 1 for MLA, not {self.kv_heads}")
        if self.head_range is not None:
            object.__setattr__(self, "head_range", part("head_range", self.head_range, self.kv_heads))
        elif self.kind != "mla" and max(self.tp, self.kv_heads) % min(self.tp, self.kv_heads):
            raise ValueError(f"tp must divide kv_heads or be a multiple of it: {self.kv_heads} heads among {self.tp} ranks")
        object.__setattr__(self, "partition", row("partition", self.partition, self.pp, 1) if self.partition else ())
        if self.partition and sum(self.partition) != self.layers:
            raise ValueError(f"partition must have {self.layers} layers in all, not {sum(self.partition)}")
        if self.layer_range is not None:
            object.__setattr__(self, "layer_range", part("layer_range", self.layer_range, self.layers))
        elif self.pp > self.layers:
            raise ValueError(f"pp must not exceed the number of layers: {self.pp} ranks for {self.layers}")

    def _check_strides(self) -> None:
        """No two vectors share a byte: each stride reaches past all that lies within it."""
        past = self.vector_bytes
        for stride, count, name in sorted((*each, name) for name, each in self._axes().items()):
            if count > 1:
                if stride < past:
                    raise ValueError(f"strides: from one {name} to the next are {stride} bytes, and what lies between has {past}")
                past += stride * (count - 1)
        strides, heads = self.byte_strides, len(self.own_heads)
        tokens_lie = self.page_tokens == 1 or strides.token == self.vector_bytes * (heads if self.order == "NHD" else 1)
        heads_lie = self.order == "HND" or heads == 1 or strides.head == self.vector_bytes
        if self.opaque and not (tokens_lie and heads_lie):
            raise ValueError("strides: an opaque page has no gaps (order 'HND': nor have the tokens of each of its heads)")

    def _axes(self) -> dict[str, tuple[int, int]]:
        """The stride and the length of each dimension in one memory."""
        lengths = (self.layers_in_memory, self.planes, self.num_pages, self.page_tokens, len(self.own_heads))
        return dict(zip(Strides._fields, zip(self.byte_strides, lengths, strict=True), strict=True))

    # ---- what this rank holds ----

    @property
    def place(self) -> Place:
        """Which rank this is, by its pipeline, tensor and context parallelism."""
        return Place(self.pp_rank, self.tp_rank, self.cp_rank)

    @property
    def own_layers(self) -> range:
        """The model's layers that this rank holds."""
        return self.layers_at(self.pp_rank) if self.layer_range is None else range(*self.layer_range)

    @property
    def own_heads(self) -> range:
        """The model's heads that this rank holds. With more ranks than heads several hold the same one."""
        return self.heads_at(self.tp_rank) if self.head_range is None else range(*self.head_range)

    @property
    def deal(self) -> Deal:
        """Which tokens of a request this rank holds."""
        return Deal(self.cp, self.cp_tokens, self.cp_rank)

    def layers_at(self, pp_rank: int) -> range:
        """The layers of pipeline rank `pp_rank` of this instance, where no `layer_range` says otherwise."""
        if self.partition:
            first = sum(self.partition[:pp_rank])
            return range(first, first + self.partition[pp_rank])
        each, more = divmod(self.layers, self.pp)
        first = pp_rank * each + min(pp_rank, more)
        return range(first, first + each + (pp_rank < more))

    def heads_at(self, tp_rank: int) -> range:
        """The heads of tensor rank `tp_rank` of this instance, where heads are divided evenly."""
        if self.replicas > 1 or self.kind == "mla":
            return range(tp_rank // self.replicas, tp_rank // self.replicas + 1)
        each = self.kv_heads // self.tp
        return range(tp_rank * each, (tp_rank + 1) * each)

    @property
    def replicas(self) -> int:
        """How many ranks hold the same heads."""
        if self.head_range is not None:
            return 1
        return self.tp if self.kind == "mla" else max(1, self.tp // self.kv_heads)

    @property
    def is_regular(self) -> bool:
        """Whether what other ranks of the instance hold follows from `tp`, `pp` and `partition`."""
        return self.layer_range is None and self.head_range is None

    # ---- how ----

    @property
    def planes(self) -> int:
        """Keys and values: 2; MLA, and both in one vector: 1."""
        return 2 if self.kind in ("apart", "together") else 1

    @property
    def vector_bytes(self) -> int:
        """One vector of one token and head."""
        return self.head_dim * element(self.dtype).bits // 8

    @property
    def page_bytes(self) -> int:
        """One page of one layer: keys or values (MLA: the latents), without gaps."""
        return self.page_tokens * len(self.own_heads) * self.vector_bytes

    @property
    def memories(self) -> int:
        """How many regions the pool lies in: one, or one for each layer of this rank."""
        return len(self.own_layers) if self.outermost == "tensors" else 1

    @property
    def layers_in_memory(self) -> int:
        """How many layers lie in one of these regions."""
        return 1 if self.outermost == "tensors" else len(self.own_layers)

    @property
    def pool_bytes(self) -> int:
        """All pages in one region, from the first byte of a vector to the last one."""
        if self.strides is None:
            return self.page_bytes * self.planes * self.num_pages * self.layers_in_memory
        return self.vector_bytes + sum(stride * (count - 1) for stride, count in self._axes().values())

    @property
    def byte_strides(self) -> Strides:
        """Where a vector lies, from the beginning of the pool: `strides`, or what follows from order, kind
        and outermost."""
        if self.strides is not None:
            return Strides(*self.strides)
        sizes = {"layer": self.layers_in_memory, "plane": self.planes, "page": self.num_pages}
        inner = ("plane", "page") if self.kind == "apart" else ("page", "plane")
        at = inner.index("page") + 1 if self.outermost == "pages" else 0
        order = (*inner[:at], "layer", *inner[at:])
        found: dict[str, int] = {}
        step = self.page_bytes
        for name in reversed(order):
            found[name] = step
            step *= sizes[name]
        heads = len(self.own_heads)
        token, head = (heads, 1) if self.order == "NHD" else (1, self.page_tokens)
        return Strides(found["layer"], found["plane"], found["page"], token * self.vector_bytes, head * self.vector_bytes)

    def pages_of(self, tokens: int) -> int:
        """How many pages the first `tokens` tokens of a request take here."""
        return -(-self.deal.count(tokens) // self.page_tokens)

    def tokens_in(self, pages: int) -> int:
        """How many tokens of a request `pages` pages have room for."""
        return self.deal.holding(pages * self.page_tokens)

    def written(self, skip_tokens: int, tokens: int) -> slice:
        """Which of a request's pages hold tokens from `skip_tokens` on, of `tokens` in all."""
        return slice(self.deal.count(skip_tokens) // self.page_tokens, self.pages_of(tokens))

    def check_skip(self, skip_tokens: int) -> None:
        """Raise `ValueError` unless a request may leave out its first `skip_tokens` tokens: opaque pages are
        left out whole."""
        if self.opaque and self.deal.count(skip_tokens) % self.page_tokens:
            raise ValueError(f"opaque pages of {self.page_tokens} tokens are skipped whole: skip_tokens is {skip_tokens}")

    # ---- as plain values ----

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON and msgpack take."""
        return {name: getattr(self, name) for name in _FIELDS}  # all are plain, or tuples of what is

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> KVLayout:
        """The layout out of `values`, as `to_dict` gives them. Raises `ValueError` or `TypeError`, naming the
        field, for all else."""
        if not isinstance(values, Mapping):
            raise TypeError(f"a layout is a mapping, not {type(values).__name__}")
        for name in values:
            if name not in _FIELDS:
                raise ValueError(f"a layout has no field {quote(name)}")
        try:
            given = dict(values)
            return cls(**given)
        except TypeError as error:
            raise TypeError(f"this is no layout: {error}") from None


_FIELDS = tuple(field.name for field in fields(KVLayout))


def check_match(prefill: KVLayout, decode: KVLayout) -> None:
    """Raise `LayoutMismatch` unless these are parts of caches of one model that can be brought from one to
    the other."""
    for name in ("layers", "kv_heads", "head_dim", "dtype", "windows", "opaque"):
        here, there = getattr(prefill, name), getattr(decode, name)
        if here != there:
            raise LayoutMismatch(name, here, there)
    if prefill.kind != decode.kind and (prefill.planes == 1 or decode.planes == 1):
        raise LayoutMismatch("kind", prefill.kind, decode.kind)
    if prefill.opaque:
        for name in ("page_tokens", "order"):
            here, there = getattr(prefill, name), getattr(decode, name)
            if here != there:
                raise LayoutMismatch(name, here, there)
        if prefill.deal.way != decode.deal.way:
            for layout in (prefill, decode):
                if layout.cp > 1 and layout.cp_tokens % layout.page_tokens:
                    raise LayoutMismatch("cp_tokens", prefill.cp_tokens, decode.cp_tokens)
