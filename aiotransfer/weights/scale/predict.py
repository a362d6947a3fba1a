"""How long an update takes, by stages: as the paper's trainers do it, and as a plan of this library does.
Pure.

Both are sums of the constants and of a plan's bytes; nothing is fitted to the compared figures. For Kimi-K2
the paper's stages by bytes are its own table by definition; what is predicted there are the bytes' way and
the total.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from aiotransfer.weights.planning.balance import Balance, nic_numbers
from aiotransfer.weights.planning.plan import Plan
from aiotransfer.weights.planning.tasks import run_counts
from aiotransfer.weights.scale import constants as c
from aiotransfer.weights.scale.models import MODELS, Model, weights
from aiotransfer.weights.scale.placements import Placement, received_bytes

STEP = 1 << 19  # moves that are looked at together


@dataclass(frozen=True, slots=True)
class Loads:
    """What the most loaded ranks have to do: bytes that leave a NIC of the trainers (`sent`) and come by one
    of the inference side (`received`), bytes that a rank reads from other trainers (`gathered`), its
    contiguous `writes`, its prepared `calls` (for each peer, phase and part), and the most `parts` that a
    rank's staging memory is filled in."""

    sent: int
    received: int
    gathered: int = 0
    writes: int = 0
    calls: int = 0
    parts: int = 1


class Row(NamedTuple):
    """A stage: predicted milliseconds, and the published ones where there are any."""

    name: str
    ms: float
    published: float | None = None


class Comparison(NamedTuple):
    """A published figure beside predictions in seconds (None: nothing here is comparable): by the paper's
    way, by a plan's."""

    figure: c.Published
    paper: float | None
    plan: float | None


def loads(plan: Plan, balance: Balance) -> tuple[Loads, int]:
    """The loads of a plan, and the number of contiguous writes in all."""
    by_sender = np.zeros(plan.trainer.ranks, np.int64)
    for begin in range(0, len(plan.move_job), STEP):
        moves = np.arange(begin, min(begin + STEP, len(plan.move_job)))
        np.add.at(by_sender, plan.job_sender[plan.move_job[moves]], run_counts(plan, moves))
    calls = sum(1 for _ in plan.tasks(int(by_sender.argmax())).writes.calls())
    load = Loads(
        int(balance.nic_sent.max()), int(by_nic(plan, balance).max()), int(balance.gathered.max()), int(by_sender.max()), calls,
        int(plan.job_part.max(initial=0)) + 1,
    )  # fmt: skip
    return load, int(by_sender.sum())


def by_nic(plan: Plan, balance: Balance) -> npt.NDArray[Any]:
    """Bytes that come by each NIC of the inference side."""
    nic_of, nics = nic_numbers(tuple(nic for layout in plan.instances.values() for nic in layout.nics))
    arrived = np.zeros(len(nics), np.int64)
    np.add.at(arrived, nic_of, balance.received)
    return arrived


def counted(model: Model) -> int:
    """How many parameters the tensors of a model have together."""
    return sum(weight.parameters for weight in weights(model))


def estimated(model: Model, placement: Placement) -> Loads:
    """Loads without a plan: everything even, in parts of half a GiB."""
    received = received_bytes(model, placement)
    sent = received * placement.inference // placement.trainers
    parts = -(-counted(model) // placement.trainers // (1 << 29))
    return Loads(sent * placement.gpus_per_nic, received * placement.gpus_per_nic, parts=parts)


def rate(nic_gbit: float) -> float:
    """Bytes a second of a NIC as it can be used."""
    return nic_gbit * 1e9 / 8 * c.NIC_USED.value


def parameters(model: Model, placement: Placement) -> int:
    """The most parameters that a trainer rank holds; those of all experts of a layer are one."""
    count = np.zeros(placement.pp, np.int64)
    for weight in weights(model):
        count[placement.stage(model, weight.layer)] += 1
    return int(count.max())


def left_out(placement: Placement) -> set[str]:
    """Stages that an update with this placement does not have."""
    return {name for name, has in (("quantise", placement.quantise), ("H2D memcpy", placement.offloaded)) if not has}


def paper_way(model: Model, placement: Placement, load: Loads, nic_gbit: float) -> list[Row]:
    """The stages one after the other, as the paper's table has them; the bytes are on their way meanwhile."""
    held = 2 * counted(model) / placement.trainers
    many = parameters(model, placement)
    grow = {"bytes": held / c.STAGE_BYTES.value, "calls": many / c.STAGE_PARAMETERS.value}
    ours = model == MODELS["kimi-k2"] and placement == DEFAULTS["kimi-k2"]
    rows = []
    for stage in c.STAGES:
        skipped = stage.name in left_out(placement)
        if stage.by != "wire":
            ms = 0.0 if skipped else stage.total_ms * grow[stage.by]
            rows.append(Row(stage.name, ms, stage.total_ms if ours else None))
    busy = sum(row.ms for row in rows)
    wire = 1e3 * max(load.sent, load.received) / rate(nic_gbit)
    left = sum(stage.total_ms for stage in c.STAGES if stage.by == "wire")
    rows.append(Row("waiting and remaining", max(busy / many + wire - busy, 0.0), left if ours else None))
    rows.append(Row("total", sum(row.ms for row in rows), c.TOTAL_MS.value if ours else None))
    return rows


def plan_way(model: Model, placement: Placement, load: Loads, nic_gbit: float) -> list[Row]:
    """The stages of a plan, which overlap: the longest, and what it takes to fill the others with the first
    part."""
    held = 2 * counted(model) / placement.trainers
    by_name = {stage.name: stage.total_ms * held / c.STAGE_BYTES.value for stage in c.STAGES}
    speed = rate(nic_gbit) / 1e3  # bytes a millisecond
    skipped = left_out(placement)
    before = [
        Row("H2D memcpy", 0.0 if "H2D memcpy" in skipped else by_name["H2D memcpy"]),
        Row("blocks cut by shards, read from other trainers", load.gathered / speed),
        Row("quantise", 0.0 if "quantise" in skipped else by_name["quantise"]),
        Row("posting", (load.writes * c.POST_US.value + load.calls * c.CALL_US.value) / 1e3),
    ]
    wire = [
        Row("bytes out by the most loaded NIC", (load.sent + load.gathered) / speed),
        Row("bytes in by the most loaded NIC", load.received / speed),
    ]
    parts = load.parts if placement.quantise else parameters(model, placement)  # what is only copied is in no part
    fill = sum(row.ms for row in before) / parts
    return [*before, *wire, Row("total", max(row.ms for row in (*before, *wire)) + fill)]


def total(rows: list[Row]) -> float:
    """Seconds of the row "total", the last one."""
    return rows[-1].ms / 1e3


def compared(nic_gbit: float, known: dict[tuple[Model, Placement], Loads]) -> list[Comparison]:
    """Every published figure. `known`: loads of plans that were made; others are estimated."""
    result = []
    for figure in c.PUBLISHED:
        if not figure.model:
            wire = figure.gb_per_gpu * 1e9 / rate(nic_gbit) if figure.gb_per_gpu else None
            result.append(Comparison(figure, None, wire))
            continue
        model, placement = MODELS[figure.model], placement_of(figure)
        load = known.get((model, placement)) or estimated(model, placement)
        ways = (paper_way(model, placement, load, nic_gbit), plan_way(model, placement, load, nic_gbit))
        result.append(Comparison(figure, total(ways[0]), total(ways[1])))
    return result


def placement_of(figure: c.Published) -> Placement:
    """The placement of a published figure."""
    return Placement(
        figure.trainers, figure.inference, figure.fsdp, figure.pp, figure.ep, figure.inference_ep, quantise=figure.quantise,
        offloaded=figure.offloaded,
    )  # fmt: skip


DEFAULTS = {
    "kimi-k2": Placement(),
    "deepseek-v3": Placement(),
    "qwen3-235b": Placement(128, 32, 16, 1, 8, 8),
}
