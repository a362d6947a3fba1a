"""Where one side's weights lie: its tensors, its ranks, and the pieces of the tensors that the ranks hold.

A side is all trainer ranks, or all ranks of one inference instance. Pure: NumPy alone, no memory is touched.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from aiotransfer.model import dtypes
from aiotransfer.quote import quote
from aiotransfer.weights.layouts import layoutcheck, pack
from aiotransfer.weights.layouts.bind import Bound
from aiotransfer.weights.layouts.errors import PlanError

MAGIC = b"\x93ATlay\x01"
MOST_BYTES = 1 << 31  # of a decoded layout
MOST_RANKS, MOST_TENSORS, MOST_NDIM, MOST_SIZE = 1 << 16, 1 << 22, 8, 1 << 48
PIECE_ARRAYS = {  # of a layout with P pieces in D dimensions: type and whether there is one value for each dimension
    "piece_rank": (np.int32, False),
    "piece_tensor": (np.int32, False),
    "piece_buffer": (np.int32, False),
    "piece_start": (np.int64, True),
    "piece_extent": (np.int64, True),
    "piece_offset": (np.int64, False),
    "piece_strides": (np.int64, True),
}
Ints = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor as a whole: `name`, global `shape`, `dtype` (a name as NumPy or torch spells it), `group` (the
    mesh group, which says in which phase it is sent: phases follow the order in which groups first appear),
    `aliases` (further names of the same memory)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    group: str = ""
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor in one rank's memory.

    `tensor`: its name; `start`, `extent`: the box in global elements (None: the whole tensor); `buffer`: the
    rank's memory in which it lies (default: the tensor's name); `offset`: bytes from the buffer's first byte
    to the box's first element; `strides`: bytes from one element to the next in each dimension (None: row
    after row without gaps).
    """

    tensor: str
    rank: int
    start: tuple[int, ...] | None = None
    extent: tuple[int, ...] | None = None
    buffer: str | None = None
    offset: int = 0
    strides: tuple[int, ...] | None = None


class Layout:
    """All ranks of one side.

    Values of tensors (T of them): `names`, `shapes`, `dtypes`, `groups` (tuples), `itemsizes` (int64 [T]),
    `aliases` ({alias: index of its tensor}). Values of ranks: `ranks` (their number), `hosts` and `nics`
    (tuples of texts: "" is unknown, an unknown host is no other rank's, an unnamed NIC is the rank's own).
    Buffers (B): `buffer_names` (tuple), `buffer_rank` (int32 [B]), `buffer_bytes` (int64 [B]).

    Pieces (P, in D = `ndim` dimensions), one value for each piece: `piece_rank`, `piece_tensor`,
    `piece_buffer` (int32, indices of the above), `piece_start`, `piece_extent` (int64 [P, D]: the box in the
    tensor's global elements), `piece_offset` (int64: bytes in the buffer), `piece_strides` (int64 [P, D]:
    bytes). A tensor with fewer than D dimensions has start 0, extent 1 and stride 0 in those that it lacks,
    which are the last ones (D is at least 1). All arrays are read-only.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    groups: tuple[str, ...]
    repeated: tuple[str, ...]
    buffer_names: tuple[str, ...]
    buffer_rank: Ints
    buffer_bytes: Ints
    piece_rank: Ints
    piece_tensor: Ints
    piece_buffer: Ints
    piece_start: Ints
    piece_extent: Ints
    piece_offset: Ints
    piece_strides: Ints

    def __init__(
        self,
        tensors: Iterable[Tensor],
        pieces: Iterable[Piece],
        *,
        ranks: int,
        hosts: Sequence[str] | None = None,
        nics: Sequence[str] | None = None,
        buffers: Mapping[tuple[int, str], int] | None = None,
    ) -> None:
        """By hand. `tensors`: of the whole side, in an order that is kept; `pieces`: what each rank holds of
        them; `ranks`: their number (1 to 65,536); `hosts`, `nics`: a text for each rank (default: unknown);
        `buffers`: {(rank, buffer): bytes} (default: up to the end of the last piece in it). Raises
        `TypeError` or `ValueError` for values that cannot be; whether the pieces make whole tensors is
        checked by `problems()` and by `make_plan`."""
        tensors = list(tensors)
        self._name(tensors, ranks, hosts, nics)
        index = {name: k for k, name in reversed(list(enumerate(self.names)))} | self.aliases
        ndim = max((1, *map(len, self.shapes)))
        rows: list[tuple[Any, ...]] = []
        table: dict[tuple[int, str], int] = {}
        for piece in pieces:
            if not isinstance(piece, Piece):
                raise TypeError(f"a layout has Pieces, not {quote(piece)}")
            tensor = index.get(piece.tensor)
            if tensor is None:
                raise ValueError(f"a piece is of {quote(piece.tensor)}, which is no tensor of this layout")
            shape, item = self.shapes[tensor], int(self.itemsizes[tensor])
            start = (0,) * len(shape) if piece.start is None else tuple(piece.start)
            extent = tuple(n - a for n, a in zip(shape, start, strict=False)) if piece.extent is None else tuple(piece.extent)
            strides = dense(extent, item) if piece.strides is None else tuple(piece.strides)
            if not len(start) == len(extent) == len(strides) == len(shape):
                raise ValueError(f"{quote(piece.tensor)} has {len(shape)} dimensions; its piece {piece} has not")
            lacks = ndim - len(shape)
            buffer = table.setdefault((piece.rank, self.names[tensor] if piece.buffer is None else piece.buffer), len(table))
            rows.append(
                (piece.rank, tensor, buffer, start + (0,) * lacks, extent + (1,) * lacks, piece.offset, strides + (0,) * lacks)
            )
        if not isinstance(buffers, Mapping | None):
            raise TypeError(f"buffers is a mapping of (rank, buffer) to bytes, not {quote(buffers)}")
        for key in buffers or {}:
            if not isinstance(key, tuple) or len(key) != 2:
                raise TypeError(f"buffers is a mapping of (rank, buffer), not of {quote(key)}")
            table.setdefault(key, len(table))
        columns = list(zip(*rows, strict=True)) or [()] * len(PIECE_ARRAYS)
        arrays = {
            name: _integers(name, values).reshape((len(rows), ndim) if wide else len(rows))
            for (name, (_, wide)), values in zip(PIECE_ARRAYS.items(), columns, strict=True)
        }
        for (rank, name), nbytes in (buffers or {}).items():
            if isinstance(nbytes, bool) or not isinstance(nbytes, int) or not 0 <= nbytes < 1 << 60:
                raise ValueError(f"buffer {quote(name)} of rank {rank} cannot have {quote(nbytes)} bytes")
        self._take(tuple(b for _, b in table), [r for r, _ in table], [(buffers or {}).get(key, -1) for key in table], arrays)

    @classmethod
    def from_arrays(
        cls,
        tensors: Iterable[Tensor],
        *,
        ranks: int,
        buffers: Sequence[str],
        buffer_rank: Any,
        buffer_bytes: Any = None,
        hosts: Sequence[str] | None = None,
        nics: Sequence[str] | None = None,
        **pieces: Any,
    ) -> Layout:
        """From arrays, for many pieces: `buffers` (a name for each), `buffer_rank`, `buffer_bytes` (default,
        and where negative: up to the end of the last piece in it), and `pieces`: all of the arrays `piece_*`,
        as the class describes them. `tensors`, `ranks`, `hosts` and `nics` are those of the constructor, and
        so is what is raised."""
        self = cls.__new__(cls)
        self._name(list(tensors), ranks, hosts, nics)
        if set(pieces) != set(PIECE_ARRAYS):
            raise TypeError(f"the arrays of pieces are {', '.join(PIECE_ARRAYS)}; not {', '.join(sorted(pieces))}")
        if isinstance(buffers, str):
            raise TypeError(f"buffers is a list of names, not {quote(buffers)}")
        names = tuple(buffers)
        self._take(names, buffer_rank, [-1] * len(names) if buffer_bytes is None else buffer_bytes, pieces)
        return self

    def _name(self, tensors: list[Tensor], ranks: int, hosts: Sequence[str] | None, nics: Sequence[str] | None) -> None:
        if isinstance(ranks, bool) or not isinstance(ranks, int):
            raise TypeError(f"ranks must be an integer, not {quote(ranks)}")
        if not 0 < ranks <= MOST_RANKS:
            raise ValueError(f"a side has 1 to {MOST_RANKS} ranks, not {quote(ranks)}")
        if len(tensors) > MOST_TENSORS:
            raise ValueError(f"a side has at most {MOST_TENSORS} tensors, not {len(tensors)}")
        self.ranks = ranks
        self.hosts = self._texts("hosts", hosts)
        self.nics = self._texts("nics", nics)
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                raise TypeError(f"a layout has Tensors, not {quote(tensor)}")
            if not isinstance(tensor.shape, tuple | list) or not isinstance(tensor.aliases, tuple | list):
                raise TypeError(f"{quote(tensor)}: shape and aliases are tuples")
            texts = (tensor.name, tensor.dtype, tensor.group, *tensor.aliases)
            if not all(isinstance(text, str) for text in texts) or any(type(n) is not int for n in tensor.shape):
                raise TypeError(f"{quote(tensor)}: names, type and group are texts, the shape has integers")
            if len(tensor.shape) > MOST_NDIM or any(not 0 <= n <= MOST_SIZE for n in tensor.shape):
                raise ValueError(f"{quote(tensor.name)} cannot have the shape {quote(tuple(tensor.shape))}")
            if np.prod([float(max(n, 1)) for n in tensor.shape]) >= 2.0**59:
                raise ValueError(f"{quote(tensor.name)} of the shape {quote(tuple(tensor.shape))} has too many elements")
        self.names = tuple(tensor.name for tensor in tensors)
        _travels("name", [*self.names, *(alias for tensor in tensors for alias in tensor.aliases)])
        self.shapes = tuple(tuple(int(n) for n in tensor.shape) for tensor in tensors)
        known = {text: dtypes.lookup(text) for text in {tensor.dtype for tensor in tensors}}
        self.dtypes = tuple(known[tensor.dtype].name for tensor in tensors)
        self.itemsizes = _fixed(np.array([known[tensor.dtype].itemsize for tensor in tensors], np.int64))
        self.groups = tuple(tensor.group for tensor in tensors)
        self.aliases: dict[str, int] = {}
        seen, repeated = set(), []
        for k, tensor in enumerate(tensors):
            for name in (tensor.name, *tensor.aliases):
                if name in seen:
                    repeated.append(name)
                seen.add(name)
            self.aliases.update(dict.fromkeys(tensor.aliases, k))
        self.repeated = tuple(repeated)  # names that stand more than once

    def _texts(self, what: str, values: Sequence[str] | None) -> tuple[str, ...]:
        if isinstance(values, str):
            raise TypeError(f"{what} is a list of texts, not {quote(values)}")
        texts = ("",) * self.ranks if values is None else tuple(values)
        if len(texts) != self.ranks or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{what} must be a text for each of the {self.ranks} ranks")
        _travels(what, texts)
        return texts

    def _take(self, buffers: tuple[str, ...], buffer_rank: Any, buffer_bytes: Any, arrays: Mapping[str, Any]) -> None:
        self.ndim = max((1, *map(len, self.shapes)))
        count = len(arrays["piece_rank"])
        for name, (kind, wide) in PIECE_ARRAYS.items():
            values = np.ascontiguousarray(arrays[name])
            if values.shape != ((count, self.ndim) if wide else (count,)) or (values.size and values.dtype.kind not in "iu"):
                raise ValueError(f"{name} must hold integers, {'one for each dimension' if wide else 'one'} of each piece")
            setattr(self, name, _fixed(values.astype(kind)))
        if not all(isinstance(name, str) for name in buffers):
            raise TypeError("buffers have texts for names")
        _travels("buffer", buffers)
        self.buffer_names = buffers
        self.buffer_rank = _fixed(_whole_numbers("buffer_rank", buffer_rank).astype(np.int32))
        sizes = _whole_numbers("buffer_bytes", buffer_bytes)
        if not len(buffers) == len(self.buffer_rank) == len(sizes):
            raise ValueError("buffers, buffer_rank and buffer_bytes must have one length")
        layoutcheck.within(self)
        needed = np.zeros(len(sizes), np.int64)
        np.maximum.at(needed, self.piece_buffer, self.piece_offset + self.piece_span)
        self.buffer_bytes = _fixed(np.where(sizes < 0, needed, sizes))

    # ---- what follows from the arrays ----

    @functools.cached_property
    def piece_stop(self) -> Ints:
        """`piece_start + piece_extent` (int64 [P, D])."""
        return _fixed(self.piece_start + self.piece_extent)

    @functools.cached_property
    def piece_bytes(self) -> Ints:
        """Bytes of the elements of each piece (int64 [P])."""
        return _fixed(np.prod(self.piece_extent, axis=1, dtype=np.int64) * self.itemsizes[self.piece_tensor])

    @functools.cached_property
    def piece_span(self) -> Ints:
        """Bytes from the first byte of each piece to the end of its last element (int64 [P]); 0 for a piece
        without elements."""
        reach = np.sum((self.piece_extent - 1) * self.piece_strides, axis=1) + self.itemsizes[self.piece_tensor]
        return _fixed(np.where(np.any(self.piece_extent == 0, axis=1), 0, reach))

    @functools.cached_property
    def shape_array(self) -> Ints:
        """The shapes (int64 [T, D]), with 1 in dimensions that a tensor lacks."""
        table = np.ones((len(self.shapes), self.ndim), np.int64)
        for k, shape in enumerate(self.shapes):
            table[k, : len(shape)] = shape
        return _fixed(table)

    @functools.cached_property
    def digest(self) -> str:
        """32 hexadecimal digits of everything that the layout says: equal layouts have equal digests, on
        every machine."""
        return pack.digest(self._header(), self._arrays())

    def find(self, name: str) -> int | None:
        """The index of the tensor whose name or alias is `name`, or None."""
        return self._index.get(name)

    @functools.cached_property
    def _index(self) -> dict[str, int]:
        return {**self.aliases, **{name: k for k, name in reversed(list(enumerate(self.names)))}}

    def buffers_of(self, rank: int) -> dict[str, int]:
        """{name: bytes} of the buffers of rank `rank`: what `bind` wants memory for. Empty for a rank without
        any."""
        return {self.buffer_names[b]: int(self.buffer_bytes[b]) for b in np.flatnonzero(self.buffer_rank == rank)}

    def bind(self, rank: int, memory: Mapping[str, Any]) -> Bound:
        """This layout with the memory of rank `rank`, for a `Publisher` or `Subscriber`. `memory`: {buffer:
        torch tensor, NumPy array or other buffer}, one for each of `buffers_of(rank)`.

        Raises `PlanError` that lists what does not fit, `IndexError` for a rank that the layout has not, and
        `TypeError`."""
        return Bound(self, rank, memory)

    memory: Mapping[str, Any] | None = None  # of the rank that derived it from a model (`layout_of`)
    memory_rank: int | None = None  # which rank that is; None: it says the same on all

    def problems(self) -> list[str]:
        """What is wrong with this side alone, as texts: a name twice, pieces outside their tensor or buffer,
        elements that no rank holds, pieces that overlap. Empty for a good layout."""
        return layoutcheck.problems(self)

    def check(self) -> None:
        """Raise `PlanError` with all `problems()`, if there are any."""
        if found := self.problems():
            raise PlanError("the layout is not whole", problems=found)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and (self is other or self.digest == other.digest)

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> tuple[Any, ...]:
        return Layout.decode, (self.encode(),)  # without the memory of the rank that derived it

    def __repr__(self) -> str:
        total = int(self.piece_bytes.sum())
        return f"<Layout: {len(self.names)} tensors, {len(self.piece_rank)} pieces, {self.ranks} ranks, {total} bytes held>"

    # ---- as bytes ----

    def _header(self) -> dict[str, Any]:
        return {
            "names": self.names, "shapes": self.shapes, "dtypes": self.dtypes, "groups": self.groups, "ranks": self.ranks,
            "aliases": sorted(self.aliases.items()), "hosts": self.hosts, "nics": self.nics, "buffers": self.buffer_names,
        }  # fmt: skip

    def _arrays(self) -> dict[str, Ints]:
        return {name: getattr(self, name) for name in ("buffer_rank", "buffer_bytes", *PIECE_ARRAYS)}

    def encode(self) -> bytes:
        """As bytes for `decode`: versioned, compressed, with a checksum; no pickle."""
        return pack.encode(MAGIC, self._header(), self._arrays())

    @classmethod
    def decode(cls, data: Any, *, most_bytes: int = MOST_BYTES) -> Layout:
        """The layout of which `encode` made `data` (bytes or another buffer). Raises `DescriptorError` for
        anything else, and before it would take more than `most_bytes` (default: 2 GiB)."""
        header, arrays = pack.decode(MAGIC, data, most_bytes)
        with pack.refusing("a layout"):
            if len(header["names"]) > MOST_TENSORS or len(header["aliases"]) > MOST_TENSORS:
                raise ValueError(f"a side has at most {MOST_TENSORS} tensors")
            aliases: dict[int, list[str]] = {}
            for alias, k in header["aliases"]:
                aliases.setdefault(int(k), []).append(alias)
            tensors = [
                Tensor(name, tuple(shape), dtype, group, tuple(aliases.get(k, ())))
                for k, (name, shape, dtype, group) in enumerate(
                    zip(header["names"], header["shapes"], header["dtypes"], header["groups"], strict=True)
                )
            ]
            return cls.from_arrays(
                tensors, ranks=header["ranks"], buffers=header["buffers"], hosts=header["hosts"], nics=header["nics"], **arrays
            )


def held_bytes(layout: Layout) -> int:
    """Bytes of the arrays of a layout."""
    return sum(getattr(layout, name).nbytes for name in ("buffer_rank", "buffer_bytes", *PIECE_ARRAYS))


def merge(layouts: Iterable[Layout]) -> Layout:
    """One layout of a side whose ranks described only themselves in `layouts` (one or more): tensors are
    united by name, pieces are put together. What an earlier layout says of a rank's buffer holds; later ones
    add buffers.

    All must have the same number of ranks, and each tensor must be the same in all that have it (shape,
    dtype, group, aliases), else `PlanError` lists the differences. Hosts and NICs are taken from the first
    that knows them. Raises `TypeError` for what is no layout, and `ValueError` where there is none.
    """
    problems: list[str] = []
    tensors: dict[str, Tensor] = {}
    layouts = list(layouts)
    if wrong := [layout for layout in layouts if not isinstance(layout, Layout)]:
        raise TypeError(f"merge takes Layouts, not {quote(wrong[0])}")
    if not layouts:
        raise ValueError("merge takes one layout or more")
    if len({layout.ranks for layout in layouts}) != 1:
        raise PlanError("layouts of one side differ in their number of ranks", problems=[repr(layout) for layout in layouts])
    for number, layout in enumerate(layouts):
        by_tensor: dict[int, list[str]] = {}
        for alias, k in layout.aliases.items():
            by_tensor.setdefault(k, []).append(alias)
        for k, name in enumerate(layout.names):
            mine = Tensor(name, layout.shapes[k], layout.dtypes[k], layout.groups[k], tuple(sorted(by_tensor.get(k, ()))))
            first = tensors.setdefault(name, mine)
            if first != mine:
                problems.append(f"{name}: layout {number} says {mine}, an earlier one {first}")
    if problems:
        raise PlanError("layouts of one side differ", problems=problems)
    index = {name: k for k, name in enumerate(tensors)}
    ndim = max((1, *(len(tensor.shape) for tensor in tensors.values())))
    parts: dict[str, list[Ints]] = {name: [] for name in (*PIECE_ARRAYS, "buffer_rank", "buffer_bytes")}
    known: dict[tuple[int, str], int] = {}
    for layout in layouts:
        keys = list(zip(layout.buffer_rank.tolist(), layout.buffer_names, strict=True))
        new = np.array([key not in known for key in keys], bool)
        for key in keys:
            known.setdefault(key, len(known))
        places = np.array([known[key] for key in keys], np.int64)
        of_tensor = np.array([index[name] for name in layout.names], np.int64)
        fresh = np.flatnonzero(new[layout.piece_buffer])  # a buffer that an earlier layout described is as it was described there
        for name in parts:
            values = getattr(layout, name)[new if name.startswith("buffer") else fresh]
            if name in ("piece_tensor", "piece_buffer"):
                values = (of_tensor if name == "piece_tensor" else places)[values] if len(values) else values
            elif values.ndim == 2:
                fill = np.full((len(values), ndim - layout.ndim), 1 if name == "piece_extent" else 0, np.int64)
                values = np.concatenate([values, fill], axis=1)
            parts[name].append(values)
    buffers = [name for _, name in known]
    joined = {name: np.concatenate(values) for name, values in parts.items()}
    hosts = [next((h for h in every if h), "") for every in zip(*(layout.hosts for layout in layouts), strict=True)]
    nics = [next((n for n in every if n), "") for every in zip(*(layout.nics for layout in layouts), strict=True)]
    return Layout.from_arrays(tensors.values(), ranks=layouts[0].ranks, hosts=hosts, nics=nics, buffers=buffers, **joined)


def dense(extent: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Byte strides of an array of `extent` that lies row after row without gaps."""
    strides, step = [], itemsize
    for size in reversed(extent):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _integers(what: str, values: Any) -> Ints:
    found = np.array(values)
    if found.size and found.dtype.kind not in "iu":
        bad = next(x for row in values for x in (row if isinstance(row, tuple) else (row,)) if not _is_integer(x))
        raise TypeError(f"{what} must hold integers that memory can have, not {quote(bad)}")
    return found.astype(np.int64)


def _whole_numbers(what: str, values: Any) -> Ints:
    found = np.array(values if hasattr(values, "__len__") else list(values)).reshape(-1)
    if found.size and found.dtype.kind not in "iu":
        raise TypeError(f"{what} must hold integers, not {quote(found.tolist()[0])}")
    return found.astype(np.int64)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and abs(int(value)) < 1 << 62


def _travels(what: str, texts: Sequence[str]) -> None:
    """Raise `ValueError` unless these texts can be encoded."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        bad = next(text for text in texts if any("\ud800" <= letter <= "\udfff" for letter in text))
        raise ValueError(f"a {what} that cannot be written as UTF-8: {quote(bad)}") from None


def _fixed(values: Ints) -> Ints:
    values.flags.writeable = False
    return values
