"""Element types of caches by the names that serving engines give them, and how many bits an element takes."""

from __future__ import annotations

import functools
from typing import NamedTuple

from aiotransfer.model.dtypes import lookup

ALIASES = {
    "fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2", "fp4": "float4_e2m1fn", "fp4_e2m1": "float4_e2m1fn",
}  # fmt: skip
FOUR_BITS = frozenset({"int4", "uint4", "float4_e2m1fn", "nvfp4", "mxfp4"})
PACKED = frozenset({"float4_e2m1fn_x2"})  # of torch: two of four bits are one element of a byte


class Element(NamedTuple):
    """An element type: the name that both sides compare, and how many bits one element takes."""

    name: str
    bits: int


@functools.lru_cache(maxsize=64)
def element(name: str) -> Element:
    """The element type of this name. Raises `TypeError` where there is none."""
    name = ALIASES.get(name, name)
    plain = name.removeprefix("torch.")
    if plain in FOUR_BITS:
        return Element(plain, 4)
    if plain in PACKED:
        return Element(plain, 8)
    found = lookup(name)
    return Element(found.name, 8 * found.itemsize)
