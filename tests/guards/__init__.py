"""Guards of the library, each with what takes its place and the tests that notice: `tests/mutants.py` takes them out."""

from __future__ import annotations

from tests.guards import (
    control,
    engine,
    kernels,
    kv,
    moe,
    native,
    providers,
    ray_transport,
    tools,
    vllm,
    weights,
    weights_devices,
    weights_files,
    weights_roles,
)
from tests.guards.mutant import Mutant

EVERY: tuple[Mutant, ...] = tuple(
    guard
    for room in (
        native,
        providers,
        control,
        engine,
        kv,
        moe,
        ray_transport,
        kernels,
        weights,
        weights_roles,
        weights_files,
        weights_devices,
        vllm,
        tools,
    )
    for guard in room.GUARDS
)
