"""How evenly a plan spreads its bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from aiotransfer.weights.planning.schedule import Schedule

Ints = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Balance:
    """Bytes of one update by who moves them (int64 arrays).

    `sent` [trainer ranks], `gathered` [trainer ranks] (read from other trainer ranks for blocks that a
    shard's edge cuts), `received` [receivers], `relayed` [receivers] (passed on to other instances). `nics`
    (tuple of names) and `nic_sent` (bytes that leave by each NIC of the trainers for another host).
    `sender_bound`, `nic_bound`: the smallest that the most loaded sender and NIC could have with these
    placements and with the same host first (the exact solution of the flow problem, in bytes).
    """

    sent: Ints
    gathered: Ints
    received: Ints
    relayed: Ints
    nics: tuple[str, ...]
    nic_sent: Ints
    sender_bound: int
    nic_bound: int

    @classmethod
    def of(cls, plan: Schedule) -> Balance:
        """Count the bytes that `plan` moves in one update."""
        trainer = plan.trainer
        sent, gathered = np.zeros(trainer.ranks, np.int64), np.zeros(trainer.ranks, np.int64)
        received, relayed = np.zeros(plan.receivers, np.int64), np.zeros(plan.receivers, np.int64)
        nic_of, nics = nic_numbers(trainer.nics)
        nic_sent = np.zeros(len(nics), np.int64)
        hosts = [host for layout in plan.instances.values() for host in layout.hosts]
        theirs, ours = host_numbers(trainer.hosts, hosts)
        for begin in range(0, len(plan.move_job), STEP):
            moves = np.arange(begin, min(begin + STEP, len(plan.move_job)))
            nbytes, sender = plan.move_bytes(moves), plan.job_sender[plan.move_job[moves]]
            receiver = plan.piece_receiver[plan.move_piece[moves]]
            np.add.at(sent, sender, nbytes)
            np.add.at(received, receiver, nbytes)
            away = theirs[sender] != ours[receiver]
            np.add.at(nic_sent, nic_of[sender[away]], nbytes[away])
        for begin in range(0, len(plan.relay_move), STEP):
            rows = slice(begin, begin + STEP)
            moves, pieces = plan.relay_move[rows], plan.relay_piece[rows]
            nbytes = plan.move_bytes(moves, pieces)
            np.add.at(relayed, plan.piece_receiver[plan.move_piece[moves]], nbytes)
            np.add.at(received, plan.piece_receiver[pieces], nbytes)
        sender = plan.job_sender[plan.input_job]
        foreign = np.flatnonzero(trainer.piece_rank[plan.input_piece] != sender)
        if len(foreign):
            start, stop, _, _ = plan.input_place(foreign)
            item = trainer.itemsizes[trainer.piece_tensor[plan.input_piece[foreign]]]
            np.add.at(gathered, sender[foreign], np.prod(np.maximum(stop - start, 0), axis=1) * item)
        return cls(sent, gathered, received, relayed, nics, nic_sent, int(plan.bound[0]), int(plan.bound[1]))

    @property
    def bytes(self) -> int:
        """All bytes that receivers get."""
        return int(self.received.sum())

    @property
    def sender(self) -> float:
        """The most loaded sender over the bound; 1.0 is the best."""
        return ratio(self.sent, self.sender_bound)

    @property
    def nic(self) -> float:
        """The most loaded NIC over the bound; 1.0 is the best."""
        return ratio(self.nic_sent, self.nic_bound)

    @staticmethod
    def over_mean(values: Ints) -> float:
        """The largest of `values` (an array) over their mean; 1.0 where all are equal, and where there are
        none."""
        mean = float(values.mean()) if len(values) else 0.0
        return float(values.max()) / mean if mean else 1.0


STEP = 1 << 19  # moves that are looked at together


def ratio(values: Ints, bound: int) -> float:
    """The largest value over a bound; 1.0 where nothing is to do."""
    return float(values.max(initial=0)) / bound if bound else 1.0


def nic_numbers(names: tuple[str, ...]) -> tuple[Ints, tuple[str, ...]]:
    """The NIC of each rank as a number, and the names; a rank without a name has a NIC of its own."""
    every = [name or f"rank {rank}" for rank, name in enumerate(names)]
    index = {name: k for k, name in enumerate(dict.fromkeys(every))}
    return np.array([index[name] for name in every], np.int64), tuple(index)


def host_numbers(ours: Any, theirs: Any) -> tuple[Ints, Ints]:
    """Hosts of two lists of ranks as numbers that are equal where the host is known and the same."""
    index: dict[str, int] = {}
    numbers = [[index.setdefault(h, len(index)) if h else -1 - side for h in hosts] for side, hosts in enumerate((ours, theirs))]
    return np.array(numbers[0], np.int64), np.array(numbers[1], np.int64)
