"""What is done to weights on the way: other element types, and float8 with scales for blocks. For host memory
and for a GPU's.

`cast` and `quantise` work on host memory, at once, on the calling thread; their `_parts` do it in steps.
`kernels_for(device)` gives the same for the memory of a device: C on the host, Triton on a GPU; torch and
Triton are imported when a GPU is first asked for. All give the same bits.
"""

from __future__ import annotations

from aiotransfer.providers.convert import BLOCK, NotFiniteError, cast, cast_parts, quantise, quantise_parts
from aiotransfer.providers.numbers import Numbers, numbers
from aiotransfer.weights.kernels.base import MOST_IN_BLOCK, Kernels, kernels_for

__all__ = [
    "BLOCK",
    "MOST_IN_BLOCK",
    "Kernels",
    "NotFiniteError",
    "Numbers",
    "cast",
    "cast_parts",
    "kernels_for",
    "numbers",
    "quantise",
    "quantise_parts",
]
