"""What a mutant is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One guard: where it stands, what takes its place, and which tests must notice."""

    name: str
    path: str
    guard: str
    instead: str
    tests: str
