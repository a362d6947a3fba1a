"""The order of each sender's jobs, and where their input and output lie in its staging memory. Pure.

The staging memory has two halves. A sender's jobs come in parts that each fit into one half; while one part
is written from its half, the next is made in the other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from aiotransfer.weights.layouts.errors import PlanError
from aiotransfer.weights.layouts.layout import Layout
from aiotransfer.weights.planning.catalog import Catalog
from aiotransfer.weights.planning.links import QUANTISE, Links
from aiotransfer.weights.planning.senders import Work
from aiotransfer.weights.planning.sources import Held, Units

Ints = npt.NDArray[Any]
CUTS = 8  # parts at least, of what a sender writes in a phase, where instances pass parts on as they come
CUT_BYTES = 1 << 20  # that such a part has at least
GOLDEN = 2654435769  # 2**32 over the golden ratio: multiples of it are spread evenly over 32 bits


def largest(staging_bytes: int) -> int:
    """Bytes of staging memory that one job should use at most: a quarter of a half."""
    return max(staging_bytes // 8, 1)


class Material(NamedTuple):
    """What jobs are made from. Of each inference tensor: `blocks`, the elements that have one scale together,
    and `made`, whether its units are made in staging memory."""

    trainer: Layout
    catalog: Catalog
    links: Links
    units: Units
    have: Held
    blocks: Ints
    made: Ints


def arrange(
    material: Material, work: Work, tensor_phase: Ints, staging_bytes: int, receiver: Ints, *, relays: bool
) -> dict[str, Ints]:
    """The arrays of jobs, inputs and moves of a plan, sorted as it has them, and `move_order`: which of the
    work's moves each is. `relays`: instances pass parts on to one another."""
    units, have, made = material.units, material.have, material.made
    tensor = units.tensor[work.unit]
    phase = tensor_phase[tensor].astype(np.int64)
    order = _order(work, phase, receiver)
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    unit, sender, phase, tensor = work.unit[order], work.sender[order].astype(np.int64), phase[order], tensor[order]
    sizes = _sizes(material, work, order, 64 if staging_bytes >= 1 << 16 else 16)
    written = np.bincount(place[work.job], work.moves.nbytes, len(order)).astype(np.int64) if relays else None
    group = sender * (int(phase.max(initial=0)) + 1) + phase
    part, base = _parts(group, sender, sizes.sum(axis=0), staging_bytes, material.catalog, tensor, written)
    at = np.stack([base, base + sizes[0], base + sizes[0] + sizes[1]])
    at[sizes == 0] = -1
    at[1, ~made[tensor]] = -1
    input_order = np.argsort(place[work.input_job], kind="stable")
    input_job, row = place[work.input_job][input_order], work.input_row[input_order]
    job = place[work.job]
    move_order = np.lexsort((work.moves.piece, work.moves.scale, job))
    return {
        "job_unit": unit.astype(np.int32), "job_sender": sender.astype(np.int32), "job_part": part.astype(np.int32),
        "job_in": at[0], "job_out": at[1], "job_scale": at[2],
        "input_job": input_job.astype(np.int32), "input_piece": have.piece[row].astype(np.int32),
        "input_link": have.link[row].astype(np.int32),
        "move_job": job[move_order].astype(np.int32), "move_piece": work.moves.piece[move_order],
        "move_scale": work.moves.scale[move_order], "move_order": move_order, "bound": np.array(work.bound, np.int64),
    }  # fmt: skip


def _order(work: Work, phase: Ints, receiver: Ints) -> Ints:
    """Jobs by sender and phase, and in these by their first receiver; but each sender begins at another place
    of its list, so that not all write to the same receivers at one time."""
    first = np.full(len(work.unit), np.iinfo(np.int64).max)
    np.minimum.at(first, work.job, receiver[work.moves.piece])
    order = np.lexsort((work.unit, first, phase, work.sender))
    if not len(order):
        return order
    sender, group = work.sender[order].astype(np.int64), phase[order]
    new = np.concatenate([[True], (sender[1:] != sender[:-1]) | (group[1:] != group[:-1])])
    begin = np.flatnonzero(new)
    number = np.cumsum(new) - 1
    count = np.diff(np.append(begin, len(order)))[number]
    away = np.arange(len(order)) - begin[number]
    turn = (away - sender * GOLDEN % (1 << 32) * count // (1 << 32)) % count
    return order[np.lexsort((turn, number))]


def _sizes(material: Material, work: Work, order: Ints, align: int) -> Ints:
    """Staging bytes [3, J] of each job in the new order: gathered input, output, scales; each rounded up."""
    trainer, units, have = material.trainer, material.units, material.have
    unit = work.unit[order]
    tensor = units.tensor[unit]
    elements = np.prod(units.stop[unit] - units.start[unit], axis=1)
    sizes = np.zeros((3, len(order)), np.int64)
    kind = material.links.kind[tensor]
    first = np.searchsorted(work.input_job, np.arange(len(work.unit)))
    source_item = (
        trainer.itemsizes[trainer.piece_tensor[have.piece[work.input_row[first]]]] if len(work.unit) else np.zeros(0, np.int64)
    )
    sizes[0] = np.where(work.gathers[order], elements * source_item[order], 0)
    sizes[1] = np.where(material.made[tensor], elements * material.catalog.itemsizes[tensor], 0)
    per = material.blocks[tensor]
    scales = np.prod(-(-units.stop[unit] // per) - units.start[unit] // per, axis=1) * 4
    sizes[2] = np.where(kind == QUANTISE, scales, 0)
    return -(-sizes // align) * align


def _parts(
    group: Ints, sender: Ints, size: Ints, staging_bytes: int, catalog: Catalog, tensor: Ints, written: Ints | None
) -> tuple[Ints, Ints]:
    """The part of each job (counted through the phases of a sender) and where in staging memory its first
    byte lies. `written`: bytes that each job writes, where parts of about equal bytes are wanted."""
    if not len(size):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    half = staging_bytes // 2 // 16 * 16
    most = int(size.max())
    if most > half:
        name = catalog.names[tensor[int(size.argmax())]]
        raise PlanError(problems=[f"{name}: a part of it takes {most} bytes of staging memory: staging_bytes must be {2 * most}"])
    before = np.cumsum(size) - size
    new_group = np.concatenate([[True], group[1:] != group[:-1]])
    start = np.maximum.accumulate(np.where(new_group, np.arange(len(size)), 0))
    within = before - before[start]
    part = within // max(half - most, 1)
    if written is not None:
        part = _finer(part, written, start, new_group)
    # parts are numbered on through the phases of a sender; a phase without a job has none
    last = np.concatenate([new_group[1:], [True]])
    parts_before = np.concatenate([[0], np.cumsum((part + 1)[last])])[np.cumsum(new_group) - 1]
    new_sender = np.concatenate([[True], sender[1:] != sender[:-1]])
    sender_start = np.maximum.accumulate(np.where(new_sender, np.arange(len(size)), 0))
    part = part + parts_before - parts_before[sender_start]
    new_part = new_sender | new_group | np.concatenate([[True], part[1:] != part[:-1]])
    part_start = np.maximum.accumulate(np.where(new_part, np.arange(len(size)), 0))
    return part, before - before[part_start] + part % 2 * half


def _finer(part: Ints, written: Ints, start: Ints, new_group: Ints) -> Ints:
    """Parts within each group (whose first job is `start`), cut into `CUTS` by what they write."""
    number = np.cumsum(new_group) - 1
    total = np.bincount(number, written).astype(np.int64)[number]
    before = np.cumsum(written) - written
    cuts = np.clip(total // CUT_BYTES, 1, CUTS)
    cut = (before - before[start]) * cuts // np.maximum(total, 1)
    new = new_group.copy()
    new[1:] |= (part[1:] != part[:-1]) | (cut[1:] != cut[:-1])
    counted = np.cumsum(new)
    return np.asarray(counted - counted[start])
