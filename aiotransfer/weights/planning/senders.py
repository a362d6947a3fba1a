"""Which trainer rank sends which unit to which targets, and from which pieces it makes it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from aiotransfer.core import boxes
from aiotransfer.weights.layouts.layout import Layout
from aiotransfer.weights.planning import assign
from aiotransfer.weights.planning.balance import host_numbers, nic_numbers
from aiotransfer.weights.planning.sources import Cells, Held, Units

Ints = npt.NDArray[Any]
FEW = 1 << 16  # parts that are looked at one by one, to even out what dealing left
ENOUGH = 1.005  # of the bound: nothing is evened out


@dataclass(slots=True)
class Moves:
    """A unit (or its scales, `scale` = 1) to a target piece: `unit`, `piece` (int32), `scale` (uint8),
    `nbytes` (int64)."""

    unit: Ints
    piece: Ints
    scale: Ints
    nbytes: Ints

    @classmethod
    def join(cls, parts: Sequence[Moves]) -> Moves:
        """The moves of all parts, in order."""
        if not parts:
            return cls(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.uint8), np.zeros(0, np.int64))
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__slots__))

    def take(self, rows: Ints) -> Moves:
        """The moves of these rows."""
        return Moves(self.unit[rows], self.piece[rows], self.scale[rows], self.nbytes[rows])


@dataclass(slots=True)
class Work:
    """Jobs (`unit`, `sender`), in the order of units and senders; the moves and for each its `job`; inputs
    (`input_job`, `input_row`: of `Held`), sorted by job; `gathers` (bool for each job: it has inputs of
    several pieces); `bound`: (sender, NIC) in bytes."""

    unit: Ints
    sender: Ints
    moves: Moves
    job: Ints
    input_job: Ints
    input_row: Ints
    gathers: Ints
    bound: tuple[int, int]


class _Touched(NamedTuple):
    """The units that are no single cell (`broken`, by number), and which cells they touch: pairs of `unit`,
    an index of `broken`, and `cell`, sorted by unit."""

    broken: Ints
    unit: Ints
    cell: Ints


@dataclass(slots=True)
class _Sets:
    """Sets of ranks: `of_unit` the set of each unit, `ranks` of each set."""

    of_unit: Ints
    ranks: list[list[int]]


def choose(
    trainer: Layout, targets: tuple[Ints, list[str]], units: Units, cells: Cells, have: Held, made: Ints, moves: Moves
) -> Work:
    """A sender for every move: of the ranks that hold the unit those on the receiver's host, where there are
    any; and of these so that all send about the same. A unit that is made on the way is made once, unless
    receivers on different hosts have holders there. `made`: for each inference tensor whether its units are
    made on the way."""
    broken = np.flatnonzero(units.cell < 0)
    touched = _Touched(broken, *boxes.overlaps(
        units.tensor[broken], units.start[broken], units.stop[broken], cells.tensor, cells.start, cells.stop
    ))  # fmt: skip
    sets = _holders(trainer, units, cells, touched)
    kind, candidates, near = _candidates(trainer, targets, sets, moves)
    made = made[units.tensor[moves.unit]]
    key = np.where(made, moves.unit.astype(np.int64) * len(candidates) + kind, -1)
    key[~made] = len(units.tensor) * len(candidates) + np.arange(int((~made).sum()))
    _, first, item = np.unique(key, return_index=True, return_inverse=True)
    item = item.reshape(-1)
    sizes = np.zeros(len(first), np.int64)
    np.add.at(sizes, item, moves.nbytes)
    chosen, bound = _deal(trainer, sizes, kind[first], candidates, near)
    sender = chosen[item]
    job_key, job = np.unique(moves.unit.astype(np.int64) * trainer.ranks + sender, return_inverse=True)
    unit, who = job_key // trainer.ranks, (job_key % trainer.ranks).astype(np.int32)
    rows = _inputs(trainer, unit, who, units, cells, touched)
    many = np.bincount(rows[0], minlength=len(unit)) > 1
    return Work(unit, who, moves, job.reshape(-1), rows[0], rows[1], many, bound)


def _holders(trainer: Layout, units: Units, cells: Cells, touched: _Touched) -> _Sets:
    """The set of ranks that hold (a part of) each unit."""
    broken = touched.broken
    held_by = np.diff(cells.begin)
    count = held_by[touched.cell]
    owner = np.repeat(touched.unit, count)
    at = np.repeat(cells.begin[touched.cell], count) + np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
    pairs = np.unique(owner * trainer.ranks + cells.holder_rank[at])
    owners = np.concatenate([cells.holder_cell, len(cells.tensor) + pairs // trainer.ranks])
    ranks = np.concatenate([cells.holder_rank, pairs % trainer.ranks])
    groups = len(cells.tensor) + len(broken)
    begin = np.searchsorted(owners, np.arange(groups + 1))
    number, lists = _distinct(owners, ranks, begin)
    of_unit = units.cell.copy()
    of_unit[broken] = len(cells.tensor) + np.arange(len(broken))
    return _Sets(number[of_unit], lists)


def _distinct(owners: Ints, ranks: Ints, begin: Ints) -> tuple[Ints, list[list[int]]]:
    """Equal sets get one number: by two 64-bit sums of a hash of the ranks, and the length."""
    groups = len(begin) - 1
    columns = [np.diff(begin).astype(np.uint64)]
    for seed in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F):
        mixed = (ranks.astype(np.uint64) + np.uint64(1)) * np.uint64(seed)
        mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(32)
        total = np.zeros(groups, np.uint64)
        np.add.at(total, owners, mixed)
        columns.append(total)
    order = np.lexsort(columns[::-1])
    new = np.zeros(groups, bool)
    for values in columns:
        new[1:] |= values[order][1:] != values[order][:-1]
    number = np.zeros(groups, np.int64)
    number[order] = np.cumsum(new)
    first = order[np.flatnonzero(np.concatenate([[True], new[1:]]))] if groups else order
    return number, [ranks[begin[g] : begin[g + 1]].tolist() for g in first.tolist()]


def _candidates(
    trainer: Layout, targets: tuple[Ints, list[str]], sets: _Sets, moves: Moves
) -> tuple[Ints, list[list[int]], list[bool]]:
    """For each move the number of its candidates, the candidates, and which of these are on the receivers'
    own host."""
    kind = sets.of_unit[moves.unit]
    ours, theirs = host_numbers(trainer.hosts, targets[1])
    if not set(ours.tolist()) & set(theirs.tolist()):
        return kind, sets.ranks, [False] * len(sets.ranks)
    host = theirs[targets[0][moves.piece]]
    low = int(theirs.min())
    span = int(theirs.max()) - low + 1
    pairs, number = np.unique(kind * span + (host - low), return_inverse=True)
    lists: list[list[int]] = []
    near: list[bool] = []
    index: dict[tuple[int, ...], int] = {}
    new = []
    for pair in pairs.tolist():
        ranks, where = sets.ranks[pair // span], pair % span + low
        here = [rank for rank in ranks if ours[rank] == where]
        found = tuple(here or ranks)
        if here:
            found = (*found, -1 - where)  # apart from the same ranks for another host
        if found not in index:
            index[found] = len(lists)
            lists.append(here or ranks)
            near.append(bool(here))
        new.append(index[found])
    return np.array(new, np.int64)[number.reshape(-1)], lists, near


def _deal(
    trainer: Layout, sizes: Ints, kind: Ints, candidates: list[list[int]], near: list[bool]
) -> tuple[Ints, tuple[int, int]]:
    weights = np.zeros(len(candidates), np.int64)
    np.add.at(weights, kind, sizes)
    used = np.flatnonzero(weights).tolist()
    every: list[list[int]] = [[0] * len(ranks) for ranks in candidates]
    bound = _share(every, used, weights, candidates, trainer.ranks)
    nic_of, nics = nic_numbers(trainer.nics)
    away = [k for k in used if not near[k]]
    by_nic = [sorted({int(nic_of[rank]) for rank in candidates[k]}) for k in away]
    _, nic_bound = assign.spread([int(weights[k]) for k in away], by_nic, len(nics))
    if len(nics) < trainer.ranks:  # what stays on its host uses no NIC, and is shared out first
        _share(every, [k for k in used if near[k]], weights, candidates, trainer.ranks)
        left = [bound] * trainer.ranks
        for k in used:
            for rank, part in zip(candidates[k], every[k] if near[k] else (), strict=False):
                left[rank] = max(left[rank] - part, 0)
        shares = assign.spread_within(
            [int(weights[k]) for k in away], [candidates[k] for k in away], left, nic_of.tolist(), nic_bound
        )
        for k, share in zip(away, shares, strict=True):
            every[k] = share
    chosen = assign.deal(sizes, kind, candidates, every)
    load = np.zeros(trainer.ranks, np.int64)
    np.add.at(load, chosen, sizes)
    if load.max(initial=0) > ENOUGH * bound:
        groups = nic_of.tolist() if len(nics) < trainer.ranks else [0] * trainer.ranks
        chosen = assign.even_out(sizes, kind, candidates, chosen, groups, FEW)
    return chosen, (bound, nic_bound)


def _share(every: list[list[int]], used: list[int], weights: Ints, candidates: list[list[int]], ranks: int) -> int:
    """Put the even shares of the classes `used` into `every`; the bound."""
    shares, bound = assign.spread([int(weights[k]) for k in used], [candidates[k] for k in used], ranks)
    for k, share in zip(used, shares, strict=True):
        every[k] = share
    return bound


def _inputs(trainer: Layout, unit: Ints, sender: Ints, units: Units, cells: Cells, touched: _Touched) -> tuple[Ints, Ints]:
    """(job, row of `Held`) of all that jobs are made of: the sender's own pieces where it has them, else
    those of another rank, on the sender's host where there is one."""
    whole = np.flatnonzero(units.cell[unit] >= 0)
    parts = np.flatnonzero(units.cell[unit] < 0)
    begin = np.searchsorted(touched.unit, np.arange(len(touched.broken) + 1))
    place = np.searchsorted(touched.broken, unit[parts])
    count = (begin[1:] - begin[:-1])[place]
    job = np.concatenate([whole, np.repeat(parts, count)])
    at = np.repeat(begin[place], count) + np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
    cell = np.concatenate([units.cell[unit[whole]], touched.cell[at]])
    order = np.argsort(job, kind="stable")
    job, cell = job[order], cell[order]
    keys = cells.holder_cell * trainer.ranks + cells.holder_rank
    wanted = cell * trainer.ranks + sender[job]
    found = np.minimum(np.searchsorted(keys, wanted), max(len(keys) - 1, 0))
    lacking = np.flatnonzero(keys[found] != wanted)
    if len(lacking):
        first, many = cells.begin[cell[lacking]], np.diff(cells.begin)[cell[lacking]]
        pick = first + (job[lacking] + sender[job[lacking]]) % many
        hosts, _ = host_numbers(trainer.hosts, ())
        if (many > 1).any():
            pick = _nearest(hosts, sender[job[lacking]], first, many, pick, cells.holder_rank)
        found[lacking] = pick
    return job, cells.holder[found]


def _nearest(hosts: Ints, sender: Ints, first: Ints, many: Ints, pick: Ints, holder_rank: Ints) -> Ints:
    """Where a holder on the sender's host exists, that one (the first) instead of the one that its turn
    gave."""
    row = np.repeat(np.arange(len(first)), many)
    at = np.repeat(first, many) + np.arange(len(row)) - np.repeat(np.cumsum(many) - many, many)
    same = np.flatnonzero((hosts[holder_rank[at]] == hosts[sender[row]]) & (hosts[sender[row]] >= 0))
    rows, begin = np.unique(row[same], return_index=True)
    result = pick.copy()
    result[rows] = at[same[begin]]
    return result
