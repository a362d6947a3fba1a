"""Plans as texts: what one does, and how two differ. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from aiotransfer.weights.planning.balance import Balance
from aiotransfer.weights.planning.links import KINDS

if TYPE_CHECKING:
    from aiotransfer.weights.planning.schedule import Schedule

Ints = npt.NDArray[Any]
MOST_LINES = 16  # of a list in a text
STEP = 1 << 19


def size(nbytes: float) -> str:
    """Bytes for people: `1.50 GB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def text(plan: Schedule) -> str:
    """The plan for people: totals, how even they are, what is cast or quantised, and the largest of what
    ranks send."""
    balance = Balance.of(plan)
    trainer = plan.trainer
    wanted = np.flatnonzero(plan.tensor_kind >= 0)
    lines = [
        f"{len(wanted)} tensors from {trainer.ranks} trainer ranks to {plan.receivers} ranks of {len(plan.instances)} instances "
        f"({', '.join(plan.instances)}), fanout {plan.fanout}",
        f"{size(int(balance.sent.sum()))} leave the trainers, {size(balance.bytes)} arrive in {len(plan.move_job)} moves"
        + (f", {size(int(balance.relayed.sum()))} are passed on in {len(plan.relay_move)}" if len(plan.relay_move) else ""),
        f"phases: {', '.join(repr(phase) for phase in plan.phases)}; at most {size(plan.staging_bytes)} of staging memory a rank",
        "",
        _spread("senders", balance.sent, balance.sender_bound),
        _spread("NICs", balance.nic_sent, balance.nic_bound),
        _spread("receivers", balance.received, 0),
    ]
    if gathered := int(balance.gathered.sum()):
        lines.append(f"gathered between trainers, for blocks that a shard's edge cuts: {size(gathered)}")
    lines += ["", "what is made on the way:"]
    lines += _kinds(plan, wanted) or ["  nothing: all tensors are copied as they are"]
    lines += ["", "who sends how much to whom (the largest):"]
    lines += _table(plan)
    return "\n".join(lines)


def _spread(what: str, values: Ints, bound: int) -> str:
    if not len(values):
        return f"{what}: none"
    best = f", {int(values.max()) / bound:.3f} of the best possible {size(bound)}" if bound else ""
    mean = float(values.mean())
    over = float(values.max()) / mean if mean else 1.0
    return f"{what}: {len(values)}, the most loaded {size(int(values.max()))}, {over:.3f} of the mean{best}"


def _kinds(plan: Schedule, wanted: Ints) -> list[str]:
    lines = []
    for kind in (1, 2):
        every = wanted[plan.tensor_kind[wanted] == kind].tolist()
        for k in every[:MOST_LINES]:
            sources = plan.source_names(k)
            names = ", ".join(sources[:3]) + (f" and {len(sources) - 3} more" if len(sources) > 3 else "")
            source = plan.trainer.dtypes[plan.trainer.find(sources[0]) or 0] if sources else "nothing"
            scale = f", scales in {plan.names[plan.tensor_scale[k]]}" if plan.tensor_scale[k] >= 0 else ""
            lines.append(f"  {KINDS[kind]} {plan.catalog.title(k)}: {source} to {plan.dtypes[k]}, of {names}{scale}")
        if len(every) > MOST_LINES:
            lines.append(f"  {KINDS[kind]} {len(every) - MOST_LINES} more")
    return lines


def matrix(plan: Schedule) -> tuple[Ints, Ints]:
    """Bytes from each trainer rank to each receiver [trainer ranks, receivers], and passed on between
    receivers [receivers, receivers]."""
    direct = np.zeros((plan.trainer.ranks, plan.receivers), np.int64)
    for begin in range(0, len(plan.move_job), STEP):
        moves = np.arange(begin, min(begin + STEP, len(plan.move_job)))
        np.add.at(
            direct, (plan.job_sender[plan.move_job[moves]], plan.piece_receiver[plan.move_piece[moves]]), plan.move_bytes(moves)
        )
    passed = np.zeros((plan.receivers, plan.receivers) if len(plan.relay_move) else (0, 0), np.int64)
    for begin in range(0, len(plan.relay_move), STEP):
        moves, pieces = plan.relay_move[begin : begin + STEP], plan.relay_piece[begin : begin + STEP]
        at = (plan.piece_receiver[plan.move_piece[moves]], plan.piece_receiver[pieces])
        np.add.at(passed, at, plan.move_bytes(moves, pieces))
    return direct, passed


def _table(plan: Schedule) -> list[str]:
    direct, passed = matrix(plan)
    found: list[tuple[int, int, str]] = []
    for values, name in ((direct, "trainer {}"), (passed, "")):
        if not values.size:
            continue
        flat = np.argsort(-values, axis=None, kind="stable")[:MOST_LINES]
        for sender, receiver in zip(*np.unravel_index(flat, values.shape), strict=True):
            if nbytes := int(values[sender, receiver]):
                who = name.format(sender) if name else "{} rank {}".format(*plan.who(int(sender)))
                found.append((-nbytes, len(found), f"  {who} to {'{} rank {}'.format(*plan.who(int(receiver)))}: {size(nbytes)}"))
    total = int(np.count_nonzero(direct)) + int(np.count_nonzero(passed))
    lines = [line for _, _, line in sorted(found)[:MOST_LINES]]
    return lines + ([f"  and {total - len(lines)} more pairs"] if total > len(lines) else [])


def diff(plan: Schedule, other: Schedule) -> list[str]:
    """How `other` differs from `plan`."""
    if plan == other:
        return []
    found = []
    for what in ("fanout", "staging_bytes", "phases"):
        if getattr(plan, what) != getattr(other, what):
            found.append(f"{what}: {getattr(plan, what)!r} became {getattr(other, what)!r}")
    found += [f"instance {name}: no longer there" for name in plan.instances if name not in other.instances]
    found += [f"instance {name}: new" for name in other.instances if name not in plan.instances]
    if plan.trainer != other.trainer:
        found.append(f"trainers: {plan.trainer!r} became {other.trainer!r}")
    for name in plan.instances:
        if name in other.instances and plan.instances[name] != other.instances[name]:
            found.append(f"instance {name}: {plan.instances[name]!r} became {other.instances[name]!r}")
    found += _tensors(plan, other)
    one, two = Balance.of(plan), Balance.of(other)
    for what in ("sent", "received", "relayed"):
        a, b = getattr(one, what), getattr(two, what)
        if len(a) != len(b):
            found.append(f"bytes {what}: {len(a)} ranks became {len(b)}")
        elif (a != b).any():
            worst = int(np.abs(a - b).argmax())
            most = f"most of all rank {worst}: {size(int(a[worst]))} became {size(int(b[worst]))}"
            found.append(f"bytes {what}: {int((a != b).sum())} ranks differ, {most}")
    for what, name in (("job_unit", "jobs"), ("move_job", "moves"), ("relay_move", "relays")):
        if len(getattr(plan, what)) != len(getattr(other, what)):
            found.append(f"{name}: {len(getattr(plan, what))} became {len(getattr(other, what))}")
    return found or ["the same moves in another order, or by other ranks"]


def _tensors(plan: Schedule, other: Schedule) -> list[str]:
    ours, theirs = _described(plan), _described(other)
    found = [f"{name}: no longer part of the update" for name in ours if name not in theirs]
    found += [f"{name}: new" for name in theirs if name not in ours]
    found += [f"{name}: {ours[name]} became {theirs[name]}" for name in ours if name in theirs and ours[name] != theirs[name]]
    return found


def _described(plan: Schedule) -> dict[str, str]:
    return {
        plan.catalog.title(k): f"{KINDS[plan.tensor_kind[k]]} to {plan.shapes[k]} {plan.dtypes[k]}"
        for k in np.flatnonzero(plan.tensor_kind >= 0).tolist()
    }
