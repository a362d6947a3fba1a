"""The readers of messages that `absurd.py` tries. One module for each part of the package; each has its own `TARGETS`."""

from __future__ import annotations

from tests.reliability.absurd import Target
from tests.reliability.targets import control, kv, moe, registry, rendezvous

TARGETS: tuple[Target, ...] = (*control.TARGETS, *kv.TARGETS, *moe.TARGETS, *registry.TARGETS, *rendezvous.TARGETS)
