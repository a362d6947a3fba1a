"""A plan carried out in NumPy, byte by byte, beside what a naive reference says. For tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from aiotransfer.weights import Layout, Plan
from aiotransfer.weights.planning.tasks import Tasks, Writes, strides_of

Bytes = npt.NDArray[np.uint8]
TYPES = {"float32": np.float32, "float16": np.float16, "float64": np.float64, "uint8": np.uint8, "float8_e4m3fn": np.uint8}


def e4m3() -> npt.NDArray[np.float64]:
    """The values of the codes 0 to 126."""
    codes = np.arange(127)
    exponent, fraction = codes >> 3, codes & 7
    return np.where(exponent == 0, fraction * 2.0**-9, (8 + fraction) * 2.0 ** (exponent - 10.0))


def quantise(block: npt.NDArray[Any]) -> tuple[Bytes, np.float32]:
    """(codes, scale) of one block of float32: amax / 448, to nearest even."""
    amax = np.abs(block).max(initial=0.0)
    scale = np.float32(amax) / np.float32(448) if amax else np.float32(1)
    values = (block / scale).astype(np.float64)
    table = e4m3()
    above = np.clip(np.searchsorted(table, np.abs(values)), 0, 126)
    below = np.maximum(above - 1, 0)
    up, down = table[above] - np.abs(values), np.abs(values) - table[below]
    code = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below).astype(np.uint8)
    return code | (np.signbit(values).astype(np.uint8) << 7), scale


def convert(values: npt.NDArray[Any], kind: int, dtype: str, block: tuple[int, int]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """(values, scales) as a job makes them: `values` has the tensor's own dimensions."""
    if kind != 2:
        return values.astype(TYPES[dtype]), np.zeros(0, np.float32)
    lead, (rows, columns) = values.shape[:-2], values.shape[-2:]
    scales = np.zeros((*lead, -(-rows // block[0]), -(-columns // block[1])), np.float32)
    codes = np.zeros(values.shape, np.uint8)
    for at in np.ndindex(scales.shape):
        box = (*at[:-2], slice(at[-2] * block[0], (at[-2] + 1) * block[0]), slice(at[-1] * block[1], (at[-1] + 1) * block[1]))
        codes[box], scales[at] = quantise(values[box])
    return codes, scales


def memories(layout: Layout) -> list[Bytes]:
    return [np.full(int(n), 0xEE, np.uint8) for n in layout.buffer_bytes]


def elements(layout: Layout, piece: int) -> npt.NDArray[np.int64]:
    """The byte of every element of a piece, in its own dimensions."""
    at = np.array(int(layout.piece_offset[piece]))
    for d in range(layout.ndim):
        at = at[..., None] + np.arange(layout.piece_extent[piece, d]) * layout.piece_strides[piece, d]
    return at.reshape(layout.piece_extent[piece, : len(layout.shapes[layout.piece_tensor[piece]])])


def octets(values: npt.NDArray[Any]) -> Bytes:
    """The bytes of every element, in one more dimension."""
    return np.array(values)[..., None].copy().view(np.uint8)


def put(layout: Layout, memory: list[Bytes], values: Mapping[str, npt.NDArray[Any]]) -> None:
    """Global values into all pieces, element by element."""
    for piece in range(len(layout.piece_rank)):
        tensor = int(layout.piece_tensor[piece])
        ndim = len(layout.shapes[tensor])
        box = tuple(map(slice, layout.piece_start[piece, :ndim], layout.piece_stop[piece, :ndim]))
        at, raw = elements(layout, piece), octets(values[layout.names[tensor]][box])
        for k in range(int(layout.itemsizes[tensor])):
            memory[int(layout.piece_buffer[piece])][at + k] = raw[..., k]


def check(layout: Layout, memory: list[Bytes], counts: list[Bytes], values: Mapping[str, npt.NDArray[Any]]) -> None:
    """Every byte of every piece was written once and is right; no other byte was touched."""
    seen = [np.zeros_like(x) for x in memory]
    for piece in range(len(layout.piece_rank)):
        tensor, buffer = int(layout.piece_tensor[piece]), int(layout.piece_buffer[piece])
        if layout.names[tensor] not in values:
            continue
        ndim = len(layout.shapes[tensor])
        box = tuple(map(slice, layout.piece_start[piece, :ndim], layout.piece_stop[piece, :ndim]))
        at, raw = elements(layout, piece), octets(values[layout.names[tensor]][box])
        for k in range(int(layout.itemsizes[tensor])):
            np.testing.assert_array_equal(memory[buffer][at + k], raw[..., k], err_msg=layout.names[tensor])
            seen[buffer][at + k] = 1
    for mark, count in zip(seen, counts, strict=True):
        np.testing.assert_array_equal(mark, count)


def replay(plan: Plan, values: Mapping[str, npt.NDArray[Any]]) -> dict[str, tuple[list[Bytes], list[Bytes]]]:
    """The memory of every instance afterwards, and how often each byte was written. Checks the counts that receivers expect."""
    source = memories(plan.trainer)
    put(plan.trainer, source, values)
    memory = {name: memories(layout) for name, layout in plan.instances.items()}
    counts = {name: [np.zeros_like(x) for x in buffers] for name, buffers in memory.items()}
    landed: dict[tuple[int, ...], list[int]] = {}
    for sender in range(plan.trainer.ranks):
        tasks = plan.tasks(sender)
        order = list(zip(tasks.phase.tolist(), tasks.part.tolist(), strict=True))
        assert sorted(order) == order
        for part in np.unique(np.concatenate([tasks.part, tasks.writes.part])).tolist():
            staging = np.full(plan.staging_bytes, 0xDD, np.uint8)  # what an earlier part made is not needed any more
            used = np.zeros(plan.staging_bytes, bool)
            for job in np.flatnonzero(tasks.part == part).tolist():
                make(plan, tasks, job, source, staging, used, sender)
            rows = np.flatnonzero(tasks.writes.part == part)
            write(plan, tasks.writes, rows, source, staging, memory, counts, landed, (0, sender))
    for number in range(plan.receivers):
        name, rank = plan.who(number)
        writes = plan.relays(name, rank)
        rows = np.arange(len(writes.phase))
        write(plan, writes, rows, memory[name], np.zeros(0, np.uint8), memory, counts, landed, (1, number))
    for number in range(plan.receivers):
        expected = plan.expected(*plan.who(number))
        rows = zip(expected.relayed.tolist(), expected.sender.tolist(), expected.feeder.tolist(), expected.phase.tolist(),
                   expected.part.tolist(), expected.writes.tolist(), expected.nbytes.tolist(), strict=True)  # fmt: skip
        for relayed, who, feeder, phase, part, count, nbytes in rows:
            assert landed.pop((int(relayed), who, feeder, phase, part, number)) == [count, nbytes]
    assert not landed
    return {name: (memory[name], counts[name]) for name in memory}


def make(plan: Plan, tasks: Tasks, job: int, source: list[Bytes], staging: Bytes, used: Any, sender: int) -> None:
    """One job: gather, then convert."""
    inputs = np.flatnonzero(tasks.input_job == job)
    assert len(inputs) >= 1
    if tasks.in_offset[job] >= 0:
        row, at, to, nbytes = tasks.gather_runs(inputs)
        for r, a, b, n in zip(row.tolist(), at.tolist(), to.tolist(), nbytes.tolist(), strict=True):
            assert not used[b : b + n].any(), "two jobs share staging memory"
            staging[b : b + n] = source[int(tasks.input_buffer[r])][a : a + n]
            used[b : b + n] = True
    else:
        assert len(inputs) == 1
        assert tasks.input_rank[inputs[0]] == sender
        np.testing.assert_array_equal(tasks.input_start[inputs[0]], tasks.start[job])
        np.testing.assert_array_equal(tasks.input_stop[inputs[0]], tasks.stop[job])
    if tasks.kind[job] == 0 and tasks.out_offset[job] < 0:
        return
    tensor = int(tasks.tensor[job])
    ndim = len(plan.shapes[tensor])
    extent = tasks.stop[job] - tasks.start[job]
    dtype = plan.trainer.dtypes[plan.trainer.find(plan.source_names(tensor)[0])]
    item = np.dtype(TYPES[dtype]).itemsize
    if tasks.in_offset[job] >= 0:
        memory, offset, strides = staging, int(tasks.in_offset[job]), strides_of(extent[None], np.array([item]))[0]
    else:
        memory = source[int(tasks.input_buffer[inputs[0]])]
        offset, strides = int(tasks.input_offset[inputs[0]]), tasks.input_strides[inputs[0]]
    at = np.array(offset)
    for d in range(len(extent)):
        at = at[..., None] + np.arange(extent[d]) * strides[d]
    raw = np.stack([memory[at + k] for k in range(item)], axis=-1)
    values = np.ascontiguousarray(raw).view(TYPES[dtype])[..., 0].reshape(extent[:ndim])
    block = tuple(int(x) for x in plan.tensor_block[tensor])
    out, scales = convert(values, int(tasks.kind[job]), plan.dtypes[tensor], block)
    for offset, made in ((int(tasks.out_offset[job]), out), (int(tasks.scale_offset[job]), scales)):
        if offset >= 0:
            data = np.ascontiguousarray(made).reshape(-1).view(np.uint8)
            assert offset + len(data) <= len(staging)
            assert not used[offset : offset + len(data)].any(), "two jobs share staging memory"
            used[offset : offset + len(data)] = True
            staging[offset : offset + len(data)] = data


def write(
    plan: Plan, writes: Writes, rows: Any, source: list[Bytes], staging: Bytes, memory: Any, counts: Any, landed: Any,
    who: tuple[int, int],
) -> None:  # fmt: skip
    for w in rows.tolist():
        receiver = int(writes.receiver[w])
        name, rank = plan.who(receiver)
        buffer, at, n = int(writes.target_buffer[w]), int(writes.target_offset[w]), int(writes.nbytes[w])
        assert plan.instances[name].buffer_rank[buffer] == rank
        origin = staging if writes.source_buffer[w] < 0 else source[int(writes.source_buffer[w])]
        begin = int(writes.source_offset[w])
        assert 0 <= begin <= begin + n <= len(origin)
        assert 0 <= at <= at + n <= len(memory[name][buffer])
        memory[name][buffer][at : at + n] = origin[begin : begin + n]
        counts[name][buffer][at : at + n] += 1
        key = (*who, int(writes.feeder[w]), int(writes.phase[w]), int(writes.part[w]), receiver)
        entry = landed.setdefault(key, [0, 0])
        entry[0] += 1
        entry[1] += n
