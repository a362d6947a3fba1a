"""Passing on: each unit goes from the trainers to one instance, and from there to the others. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from aiotransfer.weights.planning.senders import Moves, Work
from aiotransfer.weights.planning.sources import Units

Ints = npt.NDArray[Any]


@dataclass(slots=True)
class Relays:
    """Moves that are passed on: `fed` [X] (index of the direct move whose landed bytes are passed on),
    `piece` (target piece)."""

    fed: Ints
    piece: Ints


def separate(
    moves: Moves, instance: Ints, instances: int, start: Ints, stop: Ints, units: Units, blocks: Ints
) -> tuple[Moves, Relays]:
    """Direct moves, and those that an instance passes on.

    Instances take turns in being the first for a unit, so that each passes on about as many bytes as another.
    A move to another instance is passed on by a rank of the first that gets all of its box in one piece (with
    several such ranks in turn); where there is none (instances that are cut differently), the trainers send
    it.
    """
    of = instance[moves.piece]
    key = moves.unit.astype(np.int64) * 2 + moves.scale
    takes = np.unique(moves.unit.astype(np.int64) * instances + of)
    unit, begin, many = np.unique(takes // instances, return_index=True, return_counts=True)  # the takers of each unit
    at = np.searchsorted(unit, moves.unit)
    root = of == takes[begin[at] + moves.unit % many[at]] % instances
    first, other = np.flatnonzero(root), np.flatnonzero(~root)
    first = first[np.argsort(key[first], kind="stable")]
    begin = np.searchsorted(key[first], key[other], side="left")
    count = np.searchsorted(key[first], key[other], side="right") - begin
    row = np.repeat(np.arange(len(other)), count)
    at = first[np.repeat(begin, count) + np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)]
    unit = moves.unit[other[row]]
    low, high = units.start[unit], units.stop[unit]
    per = np.where(moves.scale[other[row]][:, None] == 1, blocks[units.tensor[unit]], 1)
    low, high = low // per, -(-high // per)
    theirs, ours = moves.piece[other[row]], moves.piece[at]
    low, high = np.maximum(low, start[theirs]), np.minimum(high, stop[theirs])
    whole = np.flatnonzero(np.all((start[ours] <= low) & (stop[ours] >= high), axis=1))
    row, at = row[whole], at[whole]
    # several ranks of the first instance have it: they take turns by unit and by the instance that it goes to
    some, begins, many = np.unique(row, return_index=True, return_counts=True)
    pick = at[begins + (moves.unit[other[some]].astype(np.int64) // instances + of[other[some]]) % many]
    keep = np.ones(len(moves.unit), bool)
    keep[other[some]] = False
    number = np.cumsum(keep) - 1
    return moves.take(np.flatnonzero(keep)), Relays(number[pick], moves.piece[other[some]])


def arrays(relays: Relays | None, move_order: Ints, piece_receiver: Ints, work: Work) -> dict[str, Ints]:
    """The plan's arrays of relays, by the receiver that passes on, then in the order of its moves."""
    if relays is None:
        return {"relay_move": np.zeros(0, np.int32), "relay_piece": np.zeros(0, np.int32)}
    place = np.empty(len(move_order), np.int64)
    place[move_order] = np.arange(len(move_order))
    move = place[relays.fed]
    order = np.lexsort((relays.piece, move, piece_receiver[work.moves.piece[relays.fed]]))
    return {"relay_move": move[order].astype(np.int32), "relay_piece": relays.piece[order].astype(np.int32)}
