"""What all ranks of an all-to-all must agree on, and where everything lies in their buffers.

Each rank has one region that the others write into, cut into `slots` equal sets (step n uses set n mod
slots):

    first[source]     header, then up to `private_tokens` rows of that source       (only that source writes there)
    rows              what the experts get: grouped by expert, R rows
    results           what comes back: one row for each (token, choice), in the order of the plan

and, where a source is reached by a network, behind all sets a staging area of R rows for each; behind those,
where a rank lets others fetch what its experts compute (`results_in_place`), R rows of results for each set.
A row on the wire is the token's `hidden` elements, its scales behind them, filled up to 16 bytes. Offsets
follow from the shape alone, so a writer knows where things lie at every other rank.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field, fields

from aiotransfer.model.dtypes import lookup
from aiotransfer.quote import quote

TOKEN_TYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
RESULT_TYPES = ("float32", "bfloat16", "float16")
ROW_ALIGN, AREA_ALIGN = 16, 256
MOST_RANKS, MOST_EXPERTS = 1024, 16384
TEXT_BYTES = 256
TAG_BYTES = 64
HEAD = struct.Struct("<QIHHQII")  # step, tokens and scales, bytes of text (0: not refused), of the tag, incarnation, digest, 0


def _up(n: int, align: int) -> int:
    return -(-n // align) * align


@dataclass(frozen=True)
class Shape:
    """The sizes of an all-to-all; equal on all its ranks. Rows and tokens are counted, bytes are named so."""

    ranks: int
    num_experts: int
    hidden: int
    dtype: str
    topk: int
    max_tokens: int
    combine_dtype: str
    scales: int = 0
    private_tokens: int = 32
    padding: int = 1
    dp_size: int = 1
    max_recv: int = 0
    """Rows that a rank takes in one step, padding included; 0: as many as the others can send."""
    slots: int = 2
    align: int = 1

    local_experts: int = field(init=False)
    row_bytes: int = field(init=False)
    result_bytes: int = field(init=False)
    recv_rows: int = field(init=False)
    header_bytes: int = field(init=False)
    first_bytes: int = field(init=False)
    rows_at: int = field(init=False)
    results_at: int = field(init=False)
    slot_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self._check()
        put = object.__setattr__
        put(self, "local_experts", self.num_experts // self.ranks)
        put(self, "row_bytes", _up(self.token_bytes + 4 * self.scales, ROW_ALIGN))
        put(self, "result_bytes", self.hidden * lookup(self.combine_dtype).itemsize)
        most = self.ranks // self.dp_size * self.max_tokens * self.topk + self.local_experts * (self.padding - 1)
        put(self, "recv_rows", min(self.max_recv, most) if self.max_recv else most)
        put(self, "header_bytes", _up(HEAD.size + 4 * self.num_experts + TEXT_BYTES, AREA_ALIGN))
        put(self, "first_bytes", self.header_bytes + _up(self.private_tokens * self.row_bytes, AREA_ALIGN))
        put(self, "rows_at", self.ranks * self.first_bytes)
        put(self, "results_at", self.rows_at + _up(self.recv_rows * self.row_bytes, AREA_ALIGN))
        put(self, "slot_bytes", self.results_at + _up(self.max_tokens * self.topk * self.result_bytes, AREA_ALIGN))

    def _check(self) -> None:
        for name, least, most in (
            ("ranks", 1, MOST_RANKS), ("num_experts", 1, MOST_EXPERTS), ("hidden", 1, 1 << 20), ("topk", 1, 256),
            ("max_tokens", 1, (1 << 24) - 1), ("scales", 0, 255), ("private_tokens", 0, 1 << 24), ("padding", 1, 1 << 16),
            ("dp_size", 1, self.ranks), ("max_recv", 0, 1 << 40), ("slots", 1, 16), ("align", 1, 1 << 32),
        ):  # fmt: skip
            value = getattr(self, name)
            if type(value) is not int:
                raise TypeError(f"{name} must be an int, not {quote(value)}")
            if not least <= value <= most:
                raise ValueError(f"{name} must lie in [{least}, {most}], not {quote(value)}")
        if self.dtype not in TOKEN_TYPES:
            raise ValueError(f"tokens are of {', '.join(TOKEN_TYPES)}, not {quote(self.dtype)}")
        if self.combine_dtype not in RESULT_TYPES:
            raise ValueError(f"results are of {', '.join(RESULT_TYPES)}, not {quote(self.combine_dtype)}")
        if self.num_experts % self.ranks:
            raise ValueError(f"{self.num_experts} experts cannot be divided equally among {self.ranks} ranks")
        if self.ranks % self.dp_size:
            raise ValueError(f"{self.ranks} ranks cannot be divided into groups of {self.dp_size}")

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's elements, without scales."""
        return self.hidden * lookup(self.dtype).itemsize

    @property
    def staging_bytes(self) -> int:
        """Bytes of one staging area."""
        return _up(self.recv_rows * self.row_bytes, AREA_ALIGN)

    def first(self, slot: int, source: int) -> int:
        """Byte at which the first write of `source` lands."""
        return slot * self.slot_bytes + source * self.first_bytes

    def rows(self, slot: int) -> int:
        """Byte at which the rows for the experts begin."""
        return slot * self.slot_bytes + self.rows_at

    def results(self, slot: int) -> int:
        """Byte at which results begin."""
        return slot * self.slot_bytes + self.results_at

    def staging(self, slot: int) -> int:
        """Byte at which the staging area begins."""
        return self.slots * self.slot_bytes + slot * self.staging_bytes

    @property
    def computed_bytes(self) -> int:
        """Bytes of one area of results that others fetch."""
        return _up(self.recv_rows * self.result_bytes, AREA_ALIGN)

    def computed_at(self, *, staged: bool) -> int:
        """Byte at which results begin that others fetch, behind all else, slot after slot; never 0."""
        return self.slots * (self.slot_bytes + (self.staging_bytes if staged else 0))

    def nbytes(self, *, staged: bool, computed: bool = False) -> int:
        """Bytes that others may write into or read, of one rank."""
        return self.computed_at(staged=staged) + (self.slots * self.computed_bytes if computed else 0)

    def agreed(self) -> dict[str, int | str]:
        """What is compared at set-up, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}

    def difference(self, other: dict[str, int | str]) -> str:
        """How another rank's shape differs from this one, in words; empty where it does not."""
        mine = self.agreed()
        return ", ".join(
            f"{name} {quote(other.get(name))} there and {quote(mine.get(name))} here"
            for name in {**mine, **other}
            if mine.get(name) != other.get(name)
        )


def immediates(name: str, members: str, shape: Shape) -> int:
    """The first immediate of an all-to-all: a block of its own by its name, so that nothing has to be agreed
    on."""
    size = 3 * shape.slots * shape.ranks
    low, high = 0x8000_0000, 0xF000_0000
    digest = hashlib.blake2b(f"{name}\0{members}".encode(), digest_size=8).digest()
    return low + int.from_bytes(digest, "little") % ((high - low) // size) * size
