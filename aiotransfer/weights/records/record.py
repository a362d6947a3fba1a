"""What is known of an update when it is over: one frozen value, made on every rank that took part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from aiotransfer.weights.protocol.version import Version

PUBLISHED = ("committed", "partial", "version", "plan", "late", "lost", "failed", "closed", "cancelled")
RECEIVED = ("committed", "abandoned", "late", "lost", "failed", "closed")
STAGES = {
    "publisher": ("agree", "plan", "offer", "grant", "write", "relay", "block", "confirm"),
    "subscriber": ("prepare", "receive", "confirm"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateRecord:
    """One update, seen from one rank. Times are of `time.time()`, sizes in bytes, durations in seconds.

    `role`: "publisher" or "subscriber"; `rank`: of it; `instance`: of a subscriber, else empty. `update`: a
    text that all ranks of one update have alike; empty where the publishers never began one. `version`: what
    was to come, None where that was not agreed. `source`: the address that a subscriber read the version from
    when it caught up; empty where publishers wrote it.

    `outcome` of a publisher: "committed" (every rank of every instance has it), "partial" (some have, see
    `left_behind`), or why it was given up: "version", "plan", "late", "lost", "failed", "closed",
    "cancelled". Of a subscriber: "committed", "abandoned" (by the publishers or by its instance), "late",
    "lost", "failed", "closed". `error`: the reason as text.

    `began`, `finished`: of the update at this rank. `steps`: {stage: when it ended}, in order, of the stages
    that did end. `gather`, `convert`: how long this rank read from other ranks and copied, and cast or
    quantised; both lie inside "write". `total`: bytes that were to be written by this rank, or to come to it;
    `nbytes`: those that were (for a subscriber that did not get the version: estimated by counted writes).
    `gathered`, `converted`: bytes that were brought together, and bytes of the sources that were cast or
    quantised. `staging`: staging memory that the rank holds, `staging_peak`: the most that this update used
    of it. `relayed`: bytes that a subscriber rank passed on to other instances; `instead`: those of `nbytes`
    that a publisher rank wrote beyond `total` because a relay did not. `subscribers`: ranks that the
    publishers knew. `left_behind`: instances without the version, where others have it.

    `present`: the version that readers of a subscriber see now, None for none; of a publisher the version
    that was committed. `pause`: how long no reading could begin on this rank, or, in place, from calling
    `pause` until `resume` returned; `waits`: how long each reading was held up by it (at most 1,000 of them).
    """

    role: str
    rank: int
    outcome: str
    began: float
    finished: float
    instance: str = ""
    update: str = ""
    version: Version | None = None
    source: str = ""
    error: str = ""
    steps: Mapping[str, float] = field(default_factory=dict)
    gather: float = 0.0
    convert: float = 0.0
    total: int = 0
    nbytes: int = 0
    gathered: int = 0
    converted: int = 0
    staging: int = 0
    staging_peak: int = 0
    relayed: int = 0
    instead: int = 0
    subscribers: int = 0
    left_behind: tuple[str, ...] = ()
    present: Version | None = None
    pause: float = 0.0
    waits: tuple[float, ...] = ()

    @property
    def seconds(self) -> float:
        """Seconds from the beginning to the end."""
        return max(0.0, self.finished - self.began)

    @property
    def stages(self) -> dict[str, float]:
        """{stage: seconds} of the stages that ended, and of gathering and converting where there was any.

        Of a publisher: "agree" (all ranks have entered, the version is agreed), "plan", "offer" (the
        subscribers take it, and those in place have paused), "grant" (each lets this rank write), "write",
        "relay" (with `fanout="relay"`: everything has been passed on, or was written in the place of a
        relay), "block" (the host's block went on longer), "confirm" (the instances change). Of a subscriber:
        "prepare" (it pauses in place, and is ready), "receive" (all bytes are there), "confirm".
        """
        found, before = {}, self.began
        for stage, ended in self.steps.items():
            found[stage] = max(0.0, ended - before)  # the clock may be set back
            before = ended
        return found | {name: value for name, value in (("gather", self.gather), ("convert", self.convert)) if value}
