"""The memory of one rank: what the others write into, and what it sends from. Offsets are those of `Shape`.

    received   one region, under a lease of its own for each other rank; results that they fetch lie in it, too
    sent       per slot: a first message for each rank, and the tokens as rows
    packing    per slot, where a rank is reached by a network: packed rows and packed results
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aiotransfer.moe.protocol.shape import ROW_ALIGN, Shape
from aiotransfer.providers.rows import Rows

if TYPE_CHECKING:
    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.memory.region import Region, RegionView


def _allocate(engine: Engine, nbytes: int, gpu: bool) -> tuple[Region, Any, Any]:
    """A region of host memory, as an array, and as the kernels take it."""
    if not gpu:
        region = engine.allocate(nbytes)
        array = region.numpy()
        return region, array, array
    import torch

    tensor = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    return engine.register(tensor), tensor.numpy(), tensor


class Buffers:
    """All memory of an all-to-all on this rank: the host's. A GPU's kernels reach it where it is pinned."""

    def __init__(self, engine: Engine, shape: Shape, *, staged: bool, gpu: bool = False, in_place: bool = False) -> None:
        self.shape = shape
        self.staged = staged
        self.gpu = gpu
        self.computed_at = shape.computed_at(staged=staged) if in_place else 0  # where results that others fetch begin
        self.received, self.here, self._here = _allocate(engine, shape.nbytes(staged=staged, computed=in_place), gpu)
        self._first = shape.ranks * shape.first_bytes
        self._tokens = shape.max_tokens * shape.row_bytes
        self._slot = -(-(self._first + self._tokens) // 4096) * 4096
        self.sent, self.out, self._out = _allocate(engine, shape.slots * self._slot, gpu)
        self._engine = engine
        self._results = shape.max_tokens * shape.topk * shape.row_bytes  # apart: rows may be on their way when results are packed
        self.packing: Region | None = None
        if gpu:
            self.pack()

    def pack(self) -> None:
        """A rank takes rows in one piece: have room to pack them, and results. Twice is silent."""
        if self.packing is None:
            self._pack = -(-(self._results + self.shape.recv_rows * self.shape.result_bytes) // 4096) * 4096
            self.packing, _, self._packed = _allocate(self._engine, self.shape.slots * self._pack, self.gpu)

    # ---- what is sent ----

    def firsts(self, slot: int) -> Any:
        """The first messages: one row of bytes for each rank."""
        begin = slot * self._slot
        return self.out[begin : begin + self._first].reshape(self.shape.ranks, self.shape.first_bytes)

    def first_rows(self, slot: int) -> Rows:
        """Rows inside first messages, counted in units of `ROW_ALIGN` bytes from the beginning of the
        messages."""
        return Rows(self._out, slot * self._slot, ROW_ALIGN, self.shape.row_bytes)

    def tokens(self, slot: int, nbytes: int = 0, offset: int = 0) -> Rows:
        """The tokens of this rank as rows, or `nbytes` of each at `offset`."""
        begin = slot * self._slot + self._first + offset
        return Rows(self._out, begin, self.shape.row_bytes, nbytes or self.shape.row_bytes)

    def packed(self, slot: int) -> Rows:
        """Tokens in the order in which they are sent over a network."""
        return Rows(self._packed, slot * self._pack, self.shape.row_bytes, self.shape.row_bytes)

    def packed_results(self, slot: int) -> Rows:
        """Results in the order in which they are sent over a network."""
        return Rows(self._packed, slot * self._pack + self._results, self.shape.result_bytes, self.shape.result_bytes)

    def first_view(self, slot: int) -> RegionView:
        """The source of first writes."""
        begin = slot * self._slot
        return self.sent[begin : begin + self._first]

    def packed_view(self, slot: int) -> RegionView:
        """The source of packed tokens."""
        assert self.packing is not None
        return self.packing[slot * self._pack : slot * self._pack + self._results]

    def packed_results_view(self, slot: int) -> RegionView:
        """The source of packed results."""
        assert self.packing is not None
        return self.packing[slot * self._pack + self._results : (slot + 1) * self._pack]

    # ---- what is received ----

    def header(self, slot: int, source: int) -> bytes:
        """The bytes of the header of rank `source` in this slot."""
        begin = self.shape.first(slot, source)
        return bytes(self.here[begin : begin + self.shape.header_bytes])

    def arrived_first(self, slot: int) -> Rows:
        """Rows inside first messages, in units of `ROW_ALIGN` bytes from the first message of rank 0."""
        return Rows(self._here, self.shape.first(slot, 0), ROW_ALIGN, self.shape.row_bytes)

    def rows(self, slot: int) -> Rows:
        """The rows for the experts."""
        return Rows(self._here, self.shape.rows(slot), self.shape.row_bytes, self.shape.row_bytes)

    def staging(self, slot: int) -> Rows:
        """Where rows arrive in one piece, before they are put at their places."""
        return Rows(self._here, self.shape.staging(slot), self.shape.row_bytes, self.shape.row_bytes)

    def results(self, slot: int) -> Rows:
        """Where results arrive from the ranks of the experts."""
        return Rows(self._here, self.shape.results(slot), self.shape.result_bytes, self.shape.result_bytes)

    def computed(self, slot: int) -> Rows:
        """Results of the experts of this rank, where others fetch them."""
        begin = self.computed_at + slot * self.shape.computed_bytes
        return Rows(self._here, begin, self.shape.result_bytes, self.shape.result_bytes)

    def bytes_of_computed(self, slot: int) -> Any:
        """The same as flat uint8."""
        begin = self.computed(slot).offset
        return self.here[begin : begin + self.shape.recv_rows * self.shape.result_bytes]

    def bytes_of_rows(self, slot: int) -> Any:
        """The rows for the experts as flat uint8."""
        begin = self.shape.rows(slot)
        return self.here[begin : begin + self.shape.recv_rows * self.shape.row_bytes]

    async def aclose(self, timeout: float) -> None:
        """Take back every right to write here, and give the memory back. Raises `QuarantineError`, see
        `Region.aclose`."""
        self.sent.close()
        if self.packing is not None:
            self.packing.close()
        await self.received.aclose(timeout)
