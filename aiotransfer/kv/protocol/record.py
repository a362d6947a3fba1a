"""What is known of a request when it is over: one frozen value, made on either side."""

from __future__ import annotations

from dataclasses import dataclass

OUTCOMES = ("delivered", "refused", "cancelled", "failed", "lost", "late", "wrong", "quarantined")


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request, seen from one side. Times are of `time.time()`, in seconds; None: it did not come to that.

    Decode side: `queued` when it was asked for, `reserved` when every prefill rank had taken it, `first_page`
    and `last_page` when those had landed here. Prefill side: `queued` when all its decode ranks had asked,
    `reserved` when the application accepted it, `first_page` when the first was posted, `last_page` when the
    last was acknowledged. `pages` and `nbytes` are of the blocks that were written (tails not included),
    `retries` how often a write had to wait for room in the engine, `path` the provider, `instance` the decode
    side's.
    """

    id: str
    role: str
    peers: tuple[str, ...]
    path: str
    priority: int
    tokens: int
    skip_tokens: int
    pages: int
    nbytes: int
    queued: float
    reserved: float | None
    first_page: float | None
    last_page: float | None
    finished: float
    retries: int
    outcome: str
    error: str = ""
    instance: str = ""

    @property
    def seconds(self) -> float:
        """Seconds from the beginning to the end."""
        return self.finished - self.queued
