"""Plans as bytes and back. Pure; no pickle. A plan carries its layouts."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np

from aiotransfer.errors import DescriptorError
from aiotransfer.weights.layouts import pack
from aiotransfer.weights.layouts.layout import Layout, held_bytes
from aiotransfer.weights.planning.schedule import PLAN_ARRAYS, Schedule

PlanT = TypeVar("PlanT", bound=Schedule)
MAGIC = b"\x93ATpln\x02"
MOST_BYTES = 1 << 33  # of a decoded plan
MOST_INSTANCES = 1 << 12
_LIMITS = {  # an array of indices: the array or count that it points into
    "link_source": "trainer tensors", "link_target": "tensors", "unit_tensor": "tensors", "job_unit": "unit_tensor",
    "job_sender": "trainer ranks", "input_job": "job_unit", "input_piece": "trainer pieces", "input_link": "link_source",
    "move_job": "job_unit", "move_piece": "pieces", "relay_move": "move_job", "relay_piece": "pieces", "move_scale": "two",
}  # fmt: skip


def encode(plan: Schedule) -> bytes:
    """Encode as bytes for `decode`: versioned, compressed, with a checksum."""
    layouts = [plan.trainer.encode(), *(layout.encode() for layout in plan.instances.values())]
    arrays = {name: getattr(plan, name) for name in PLAN_ARRAYS}
    arrays |= {f"layout {k}": np.frombuffer(data, np.uint8) for k, data in enumerate(layouts)}
    header = {
        "instances": list(plan.instances), "fanout": plan.fanout, "staging_bytes": plan.staging_bytes, "phases": plan.phases,
    }  # fmt: skip
    return pack.encode(MAGIC, header, arrays)


def decode(kind: type[PlanT], data: Any, *, most_bytes: int = MOST_BYTES) -> PlanT:
    """The plan that `encode` was given. Raises `DescriptorError` for anything else, and before it would take
    more than `most_bytes`."""
    header, arrays = pack.decode(MAGIC, data, most_bytes)
    with pack.refusing("a plan"):
        names = [str(name) for name in header["instances"]]
        if not 0 < len(names) <= MOST_INSTANCES or len(set(names)) != len(names):
            raise ValueError(f"{len(names)} instances")
        left = most_bytes
        layouts = []
        for k in range(len(names) + 1):
            layouts.append(Layout.decode(arrays.pop(f"layout {k}"), most_bytes=left))
            left -= held_bytes(layouts[-1])
        if set(arrays) != set(PLAN_ARRAYS) or header["fanout"] not in ("direct", "relay"):
            raise ValueError("other fields than a plan has")
        plan = kind(
            layouts[0], dict(zip(names, layouts[1:], strict=True)), fanout=header["fanout"],
            staging_bytes=int(header["staging_bytes"]), phases=tuple(str(x) for x in header["phases"]), arrays=arrays,
        )  # fmt: skip
        _check(plan)
        return plan


def _check(plan: Schedule) -> None:
    """Every index points at something, every array has the shape that goes with the others."""
    ndim, tensors = plan.catalog.ndim, len(plan.names)
    rows = {"tensor": tensors, "instance": int(plan.catalog.begin[-1]),
            "link": len(plan.link_source), "unit": len(plan.unit_tensor), "job": len(plan.job_unit),
            "input": len(plan.input_job), "move": len(plan.move_job), "relay": len(plan.relay_move), "bound": 2}  # fmt: skip
    wide = {"tensor_block": 2, "tensor_home": 2, "link_low": plan.trainer.ndim, "link_high": plan.trainer.ndim, "link_axes": ndim,
            "link_shift": ndim, "unit_start": ndim, "unit_stop": ndim}  # fmt: skip
    for name in PLAN_ARRAYS:
        count = rows[name.split("_")[0]]
        if getattr(plan, name).shape != ((count, wide[name]) if name in wide else (count,)):
            raise ValueError(f"{name} has the shape {getattr(plan, name).shape}")
    counts = {
        "trainer tensors": len(plan.trainer.names), "tensors": tensors, "trainer ranks": plan.trainer.ranks, "two": 2,
        "trainer pieces": len(plan.trainer.piece_rank), "pieces": int(plan.piece_base[-1]),
    }  # fmt: skip
    for name, of in _LIMITS.items():
        limit = counts[of] if of in counts else len(getattr(plan, of))
        _between(name, getattr(plan, name), 0, limit - 1)
    _between("tensor_kind", plan.tensor_kind, -1, 3)
    _between("tensor_scale", plan.tensor_scale, -1, tensors - 1)
    _between("tensor_block", plan.tensor_block, 1, 1 << 30)
    _between("tensor_phase", plan.tensor_phase, 0, len(plan.phases) - 1)
    _between("link_axes", plan.link_axes, -1, plan.trainer.ndim - 1)
    _between("job_part", plan.job_part, 0, 1 << 31)
    for name in ("job_in", "job_out", "job_scale"):
        _between(name, getattr(plan, name), -1, plan.staging_bytes)
    shape = plan.catalog.shape_array[plan.unit_tensor]
    if not ((plan.unit_start >= 0) & (plan.unit_start <= plan.unit_stop) & (plan.unit_stop <= shape)).all():
        raise ValueError("a unit lies outside its tensor")
    for name in ("job_sender", "input_job", "move_job"):
        if (np.diff(getattr(plan, name)) < 0).any():
            raise ValueError(f"{name} is not sorted")


def _between(name: str, values: Any, low: int, high: int) -> None:
    if values.size and not (int(values.min()) >= low and int(values.max()) <= high):
        raise DescriptorError(f"no bytes of a plan: {name} must lie in {low}..{high}")
