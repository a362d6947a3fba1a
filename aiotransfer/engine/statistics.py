"""What an engine has counted, as a frozen record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Statistics:
    """Counts since the engine was opened; `pending_*`, `regions`, `peers` and `quarantined_bytes` are as of
    now."""

    operations_inline: int
    operations_queued: int
    bytes_written: int
    units_written: int
    arrivals: int
    strays: int
    early_values: int
    overflowed: int
    pending_operations: int
    regions: int
    remote_regions: int
    grants: int
    peers: int
    quarantined_bytes: int
    doorbells_rung: int
    doorbells_heard: int
    polls: int
    pulses_answered: int
    spins: int
    spins_found: int
    native_chunks: int
    refused_posts: int
    unknown_completions: int
    control_resumed: int

    @classmethod
    def none(cls) -> Statistics:
        """A record of zeros, for an engine that is not open."""
        return cls(*([0] * len(cls.__dataclass_fields__)))

    @classmethod
    def of(
        cls, lane: Mapping[str, int], *, peers: int, quarantined_bytes: int, strays: int, control_resumed: int
    ) -> Statistics:
        """The record now: of what the lane has counted (`lane`) and of what other parts of the engine have:
        `peers` that are up, `quarantined_bytes` of memory, ends that belonged to no operation (`strays`), and
        `control_resumed` connections."""
        return cls(
            operations_inline=lane["ops_inline"],
            operations_queued=lane["ops_queued"],
            bytes_written=lane["bytes_written"],
            units_written=lane["units_written"],
            arrivals=lane["arrivals"],
            strays=lane["strays"],
            early_values=lane["early_values"],
            overflowed=lane["overflowed"],
            pending_operations=lane["pending_ops"],
            regions=lane["regions"],
            remote_regions=lane["remote_regions"],
            grants=lane["grants"],
            peers=peers,
            quarantined_bytes=quarantined_bytes,
            doorbells_rung=lane["doorbells_rung"],
            doorbells_heard=lane["doorbells_heard"],
            polls=lane["polls"],
            pulses_answered=lane["pulses_answered"],
            spins=lane["spins"],
            spins_found=lane["spins_found"],
            native_chunks=lane["thread_chunks"],
            refused_posts=lane["refused_posts"],
            unknown_completions=lane["unknown_completions"] + strays,
            control_resumed=control_resumed,
        )
