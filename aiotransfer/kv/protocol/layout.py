"""Where a rank keeps which part of the KV cache.

A cache has, for each layer, token and head, one vector of keys and one of values (MLA: one latent vector). A rank holds some of
the layers (pipeline parallel) and some of the heads (tensor parallel), in pages of some number of tokens, and an engine lays
these out as it likes. All layouts that serving engines use are strided: the place of a vector is a sum of one product for each
of layer, key or value, page, token and head. `KVLayout` says what a rank holds and how; everything else here is derived from
that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from aiotransfer.model.dtypes import lookup
from aiotransfer.quote import quote

ORDERS = ("NHD", "HND")
KINDS = ("apart", "together", "mla")
OUTERMOST = ("layers", "pages")
MOST = {
    "layers": 1024, "kv_heads": 1 << 12, "head_dim": 1 << 16, "page_tokens": 1 << 20, "num_pages": 1 << 31, "tp": 512, "pp": 512,
    "tp_rank": 511, "pp_rank": 511, "offset": 1 << 48,
}  # fmt: skip
MOST_RANKS = 4096  # of one instance
MOST_POOL_BYTES = 1 << 60  # every place in a pool fits 64 bits


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


class Strides(NamedTuple):
    """Bytes from one layer, plane (keys or values), page, token and head to the next."""

    layer: int
    plane: int
    page: int
    token: int
    head: int


@dataclass(frozen=True)
class KVLayout:
    """One rank's part of a KV cache, in one region of memory.

    Of the model: `layers`, `kv_heads` (before they are divided among ranks; 1 for MLA), `head_dim` (MLA: of the latent),
    `dtype` as torch names it, `windows` (a sliding window in tokens for each layer, None for full attention; empty: no layer
    has one).

    Of its pages: `page_tokens` in each, `num_pages` in the pool, `order` within a page ("NHD": all heads of a token together,
    "HND": all tokens of a head), `kind` ("apart": all pages of keys, then all of values, as vLLM's [2, pages, ...]; "together":
    keys and values of a page side by side, as FlashInfer's [pages, 2, ...]; "mla": one latent), `outermost` ("layers": one
    tensor for each layer, one after the other; "pages": all layers of a page together), `offset`: bytes before the pool in its
    region.

    Of this rank: `tp`, `tp_rank`, `pp`, `pp_rank`. Layers are divided evenly, the earlier ranks having one more, heads evenly
    or each held by several ranks; where that is otherwise, `layer_range` and `head_range` (first, past the last) say what this
    rank has.

    Raises `TypeError` or `ValueError`, each naming the field: each number has a bound (`MOST`), because layouts come from peers.
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

    def __post_init__(self) -> None:
        for name in ("layers", "kv_heads", "head_dim", "page_tokens", "num_pages", "tp", "pp"):
            _whole(name, getattr(self, name), 1)
        for name in ("tp_rank", "pp_rank", "offset"):
            _whole(name, getattr(self, name), 0)
        for name, known in (("order", ORDERS), ("kind", KINDS), ("outermost", OUTERMOST)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, not {quote(getattr(self, name))}")
        if not isinstance(self.dtype, str):
            raise TypeError(f"dtype must be a name such as 'bfloat16', not {quote(self.dtype)}")
        object.__setattr__(self, "dtype", lookup(self.dtype).name)
        if self.tp * self.pp > MOST_RANKS:
            raise ValueError(f"tp * pp must not exceed {MOST_RANKS} ranks: {self.tp} * {self.pp}")
        if self.tp_rank >= self.tp or self.pp_rank >= self.pp:
            raise ValueError(
                f"tp_rank and pp_rank must lie below tp and pp: {self.tp_rank} of {self.tp}, {self.pp_rank} of {self.pp}"
            )
        if self.kind == "mla" and self.kv_heads != 1:
            raise ValueError(f"kv_heads must be 1 for MLA, not {self.kv_heads}")
        if self.head_range is not None:
            object.__setattr__(self, "head_range", _range("head_range", self.head_range, self.kv_heads))
        elif self.kind != "mla" and max(self.tp, self.kv_heads) % min(self.tp, self.kv_heads):
            raise ValueError(f"tp must divide kv_heads or be a multiple of it: {self.kv_heads} heads among {self.tp} ranks")
        if self.layer_range is not None:
            object.__setattr__(self, "layer_range", _range("layer_range", self.layer_range, self.layers))
        elif self.pp > self.layers:
            raise ValueError(f"pp must not exceed the number of layers: {self.pp} ranks for {self.layers}")
        if not isinstance(self.windows, tuple | list) or len(self.windows) not in (0, self.layers):
            raise ValueError(
                f"windows must be empty or have one entry for each of {self.layers} layers, not {quote(self.windows)}"
            )
        for window in self.windows:
            if window is not None:
                _whole("windows", window, 1)
        object.__setattr__(self, "windows", tuple(self.windows))
        if self.offset + self.pool_bytes > MOST_POOL_BYTES:
            raise ValueError(f"num_pages: a pool of {self.pool_bytes} bytes is more than there can be")

    # ---- what this rank holds ----

    @property
    def itemsize(self) -> int:
        """How many bytes one element takes."""
        return lookup(self.dtype).itemsize

    @property
    def place(self) -> Place:
        """Which rank this is, by its pipeline and tensor parallelism."""
        return Place(self.pp_rank, self.tp_rank)

    @property
    def own_layers(self) -> range:
        """The model's layers that this rank holds."""
        return self.layers_at(self.pp_rank) if self.layer_range is None else range(*self.layer_range)

    @property
    def own_heads(self) -> range:
        """The model's heads that this rank holds. With more ranks than heads several hold the same one."""
        return self.heads_at(self.tp_rank) if self.head_range is None else range(*self.head_range)

    def layers_at(self, pp_rank: int) -> range:
        """The layers of pipeline rank `pp_rank` of this instance, where layers are divided evenly."""
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
        """Whether what other ranks of the instance hold follows from `tp` and `pp`."""
        return self.layer_range is None and self.head_range is None

    # ---- how ----

    @property
    def planes(self) -> int:
        """Keys and values: 2; MLA: 1."""
        return 1 if self.kind == "mla" else 2

    @property
    def vector_bytes(self) -> int:
        """One vector of one token and head."""
        return self.head_dim * self.itemsize

    @property
    def page_bytes(self) -> int:
        """One page of one layer: keys or values (MLA: the latents)."""
        return self.page_tokens * len(self.own_heads) * self.vector_bytes

    @property
    def pool_bytes(self) -> int:
        """All pages of all layers of this rank."""
        return self.page_bytes * self.planes * self.num_pages * len(self.own_layers)

    @property
    def strides(self) -> Strides:
        """Where a vector lies, from the beginning of the pool."""
        sizes = {"layer": len(self.own_layers), "plane": self.planes, "page": self.num_pages}
        inner = ("plane", "page") if self.kind == "apart" else ("page", "plane")
        at = 0 if self.outermost == "layers" else inner.index("page") + 1
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
        """How many pages the first `tokens` tokens of a request take."""
        return -(-tokens // self.page_tokens)

    # ---- as plain values ----

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON and msgpack take."""
        return {name: getattr(self, name) for name in _FIELDS}  # all are plain, or tuples of what is

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> KVLayout:
        """The layout out of `values`, as `to_dict` gives them. Raises `ValueError` or `TypeError`, naming the field, for all
        else."""
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


def _whole(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {quote(value)}")
    most = MOST.get(name, 1 << 48)
    if not least <= value <= most:
        raise ValueError(f"{name} must lie in [{least}, {most}], not {quote(value)}")
    return value


def _pair(name: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"{name} must be two ints, not {quote(value)}")
    return _whole(name, value[0], 0), _whole(name, value[1], 0)


def _range(name: str, value: Any, most: int) -> tuple[int, int]:
    low, high = _pair(name, value)
    if not 0 <= low < high <= most:
        raise ValueError(f"{name} must lie in [0, {most}] and not be empty, not {quote(value)}")
    return low, high


def check_match(prefill: KVLayout, decode: KVLayout) -> None:
    """Raise `LayoutMismatch` unless these are parts of caches of one model."""
    for name in ("layers", "kv_heads", "head_dim", "dtype", "windows"):
        here, there = getattr(prefill, name), getattr(decode, name)
        if here != there:
            raise LayoutMismatch(name, here, there)
    if (prefill.kind == "mla") != (decode.kind == "mla"):
        raise LayoutMismatch("kind", prefill.kind, decode.kind)
