"""Dispatch and combine for expert parallelism: tokens go to the ranks that hold their experts and come back
weighted and summed."""

from __future__ import annotations

from aiotransfer.moe.alltoall import AllToAll
from aiotransfer.moe.protocol.errors import EvictedError, RoutingOverflow, ShapeMismatch, StepRefused
from aiotransfer.moe.step.handle import CombineHalf, Dispatched, DispatchHalf, Handle

__all__ = [
    "AllToAll",
    "CombineHalf",
    "DispatchHalf",
    "Dispatched",
    "EvictedError",
    "Handle",
    "RoutingOverflow",
    "ShapeMismatch",
    "StepRefused",
]
