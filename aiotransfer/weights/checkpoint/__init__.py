"""Weights from files and to files: safetensors checkpoints, whole or in shards with an index.

`open_checkpoint` gives what a `Publisher` publishes, `save` writes what a `Subscriber` or a `Publisher` has.
"""

from __future__ import annotations

from aiotransfer.weights.checkpoint.opening import Checkpoint, open_checkpoint
from aiotransfer.weights.checkpoint.saving import save

__all__ = ["Checkpoint", "open_checkpoint", "save"]
