"""What roles need of a plan in which instances pass parts on to one another. Pure.

What a trainer rank writes to a receiver in one phase and part is a *call*; a receiver may pass it on when all
of it has landed. So calls are counted apart from one another: each is a *step*, with a counter of its own.
Where a receiver would need too many counters, several calls that follow one another are one step. A *route*
is the table of all that one receiver passes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from aiotransfer.errors import DescriptorError
from aiotransfer.weights.layouts import pack
from aiotransfer.weights.planning.tasks import relays, run_counts
from aiotransfer.weights.protocol.terms import MOST_STEPS

if TYPE_CHECKING:
    from aiotransfer.weights.planning.plan import Plan

Ints = npt.NDArray[Any]
ROWS = 1 << 20  # moves that are looked at together
MAGIC = b"\x93ATrou\x01"
MOST_BYTES = 1 << 30  # of a route, unpacked
COLUMNS = ("source_buffer", "source_offset", "target_buffer", "target_offset", "nbytes")


def step_of(call: int, calls: int, senders: int) -> int:
    """The step of a call: number `call` of the `calls` that one of `senders` trainer ranks makes to one
    receiver."""
    most = max(MOST_STEPS // senders, 1)
    return call if calls <= most else call * most // calls


class Coming(NamedTuple):
    """What one receiver is sent. `steps`: {trainer rank: counted writes of each step}; `step`: {(trainer
    rank, phase, part): step}; `relayed`: {receiver that passes on: {trainer rank whose parts it passes on:
    counted writes}}."""

    steps: dict[int, list[int]]
    step: dict[tuple[int, int, int], int]
    relayed: dict[int, dict[int, int]]


def comings(plan: Plan) -> list[Coming]:
    """What comes to every receiver, by its number."""
    found = [Coming({}, {}, {}) for _ in range(plan.receivers)]
    ranks = plan.trainer.ranks
    calls: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for receiver, sender, phase, part, writes in _counted(plan, plan.move_piece, None):
        calls.setdefault((receiver, sender), []).append((phase, part, writes))
    for (receiver, sender), some in calls.items():
        counts = found[receiver].steps[sender] = [0] * (step_of(len(some) - 1, len(some), ranks) + 1)
        for k, (phase, part, writes) in enumerate(some):
            found[receiver].step[sender, phase, part] = number = step_of(k, len(some), ranks)
            counts[number] += writes
    for receiver, via, feeder, writes in _counted(plan, plan.relay_piece, plan.relay_move):
        found[receiver].relayed.setdefault(via, {})[feeder] = writes
    return found


def _counted(plan: Plan, piece: Ints, relayed: Ints | None) -> list[list[int]]:
    """Sorted rows: of direct moves (receiver, sender, phase, part, writes), of relays (receiver, relay,
    trainer rank, writes)."""
    parts = []
    for begin in range(0, len(piece), ROWS):
        pieces = piece[begin : begin + ROWS]
        moves = np.arange(begin, begin + len(pieces)) if relayed is None else relayed[begin : begin + ROWS]
        job = plan.move_job[moves]
        columns = [plan.piece_receiver[pieces]]
        if relayed is None:
            columns += [plan.job_sender[job], plan.job_phase[job], plan.job_part[job]]
        else:
            columns += [plan.piece_receiver[plan.move_piece[moves]], plan.job_sender[job]]
        writes = run_counts(plan, moves, None if relayed is None else pieces)
        parts.append(_summed(np.stack([*columns, writes]).astype(np.int64)))
    table = _summed(np.concatenate(parts, axis=1)) if parts else np.zeros((5, 0), np.int64)
    rows: list[list[int]] = table[:, table[-1] > 0].T.tolist()
    return rows


def _summed(table: Ints) -> Ints:
    """Columns that differ in the last row alone become one, with the sum; sorted by the rows before, the
    first first."""
    order = np.lexsort(table[-2::-1])
    table = table[:, order]
    new = np.ones(table.shape[1], bool)
    new[1:] = np.any(table[:-1, 1:] != table[:-1, :-1], axis=0)
    start = np.flatnonzero(new)
    sums = np.add.reduceat(table[-1], start) if len(start) else table[-1]
    return np.concatenate([table[:-1, start], sums[None]])


class Hop(NamedTuple):
    """The writes `begin` to `end` of a route: what goes to `receiver` once `step` of trainer rank `feeder`
    has landed."""

    feeder: int
    step: int
    receiver: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Route:
    """`hops`, in order, and their writes (int64 arrays): `source_buffer` and `target_buffer` count the
    buffers of the ranks that pass on and receive, in the order of their layouts; offsets and lengths in
    bytes."""

    hops: tuple[Hop, ...]
    source_buffer: Ints
    source_offset: Ints
    target_buffer: Ints
    target_offset: Ints
    nbytes: Ints


def route(plan: Plan, instance: str, rank: int, step: Mapping[tuple[int, int, int], int]) -> bytes:
    """What a rank passes on, for `decode`; empty where that is nothing. `step`: of what comes to it."""
    writes = relays(plan, instance, rank)
    if not len(writes.phase):
        return b""
    hops = [
        Hop(call.feeder, step[call.feeder, call.phase, call.part], call.receiver, call.begin, call.end) for call in writes.calls()
    ]
    target = writes.target_buffer.copy()
    for receiver in np.unique(writes.receiver).tolist():
        mine = writes.receiver == receiver
        target[mine] = _local(plan, receiver, target[mine])
    source = _local(plan, plan.receiver(instance, rank), writes.source_buffer)
    columns = (source, writes.source_offset, target, writes.target_offset, writes.nbytes)
    arrays = {name: np.asarray(column, np.int64) for name, column in zip(COLUMNS, columns, strict=True)}
    return pack.encode(MAGIC, {}, {"hops": np.array(hops, np.int64), **arrays})


def _local(plan: Plan, receiver: int, buffers: Ints) -> Ints:
    """Numbers of buffers in a layout as numbers among those of one rank."""
    instance, rank = plan.who(receiver)
    return np.searchsorted(np.flatnonzero(plan.instances[instance].buffer_rank == rank), buffers)


def decode(data: bytes, sizes: list[int], steps: dict[int, int], receivers: set[int]) -> Route:
    """The route of a rank whose buffers have `sizes` bytes. Raises `DescriptorError` for other bytes, for
    writes from outside of these buffers, for steps that do not come (`steps`: how many of each trainer rank)
    and for receivers that are not in `receivers`."""
    _, arrays = pack.decode(MAGIC, data, MOST_BYTES)
    with pack.refusing("a route"):
        table, columns = arrays["hops"], [arrays[name] for name in COLUMNS]
        if len(arrays) != len(COLUMNS) + 1 or any(values.dtype != np.int64 for values in arrays.values()):
            raise ValueError("other fields than a route has")
        if (
            table.ndim != 2
            or table.shape[1] != 5
            or any(column.shape != columns[0].shape or column.ndim != 1 for column in columns)
        ):
            raise ValueError("columns of different lengths")
        hops = tuple(Hop(*row) for row in table.tolist())
        edges = [0, *(hop.end for hop in hops)]
        if edges[-1] != len(columns[0]) or any(
            hop.begin != edge or hop.end <= edge for hop, edge in zip(hops, edges, strict=False)
        ):
            raise ValueError("hops that do not follow one another")
        for hop in hops:
            if not 0 <= hop.step < steps.get(hop.feeder, 0) or hop.receiver not in receivers:
                raise ValueError(f"a hop from step {hop.step} of publisher rank {hop.feeder} to receiver {hop.receiver}")
        found = Route(hops, *columns)
        limit = np.array(sizes, np.int64)
        if (found.source_buffer < 0).any() or (found.source_buffer >= len(limit)).any():
            raise ValueError("writes from buffers that this rank does not have")
        low, size = found.source_offset, found.nbytes
        if (low < 0).any() or (size < 0).any() or (low > limit[found.source_buffer] - size).any():
            raise ValueError("writes from outside of a buffer")
        if (found.target_buffer < 0).any() or (found.target_offset < 0).any():
            raise ValueError("writes to outside of a buffer")
        return found


def check_targets(found: Route, hops: list[Hop], regions: list[int]) -> None:
    """Raise `DescriptorError` unless these hops write into regions of `regions` bytes."""
    limit = np.array(regions, np.int64)
    for hop in hops:
        buffer, size = found.target_buffer[hop.begin : hop.end], found.nbytes[hop.begin : hop.end]
        if (buffer >= len(limit)).any() or (found.target_offset[hop.begin : hop.end] > limit[buffer] - size).any():
            raise DescriptorError("a subscriber lets other memory be written than its layout has")
