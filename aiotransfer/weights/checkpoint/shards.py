"""Which file of a checkpoint has which tensor, and where. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from aiotransfer.weights.checkpoint.header import NAMES, TEXTS
from aiotransfer.weights.layouts.errors import PlanError
from aiotransfer.weights.layouts.layout import Layout


class Shard(NamedTuple):
    """A file: its `name`, its first bytes, where its tensors (by their numbers in the layout) begin, and its
    size."""

    name: str
    head: bytes
    offsets: dict[int, int]
    nbytes: int


def shards_of(
    layout: Layout, shard_bytes: float, name: Callable[[int, int], str], texts: Mapping[str, str]
) -> list[Shard]:
    """Files of at most `shard_bytes` of tensors each, but for larger tensors. `name`: of a file, by its
    number and that of all of them; `texts`: for every header. Raises `PlanError` for what such files cannot
    have."""
    problems = [f"{layout.names[k]}: {dtype} has no name in safetensors files"
                for k, dtype in enumerate(layout.dtypes) if dtype not in NAMES]  # fmt: skip
    problems += [f"{name}: this name cannot stand in a safetensors file" for name in (TEXTS,) if layout.find(name) is not None]
    if problems:
        raise PlanError("the weights cannot be saved", problems=problems)
    sizes = [math.prod(shape) * int(item) for shape, item in zip(layout.shapes, layout.itemsizes.tolist(), strict=True)]
    parts: list[list[int]] = [[]]
    left = shard_bytes
    for k, size in enumerate(sizes):
        if size > left and parts[-1]:
            parts.append([])
            left = shard_bytes
        parts[-1].append(k)
        left -= size
    aliases: dict[int, list[str]] = {}
    for alias, k in layout.aliases.items():
        aliases.setdefault(k, []).append(alias)
    return [
        _shard(layout, sizes, aliases, part, name(number, len(parts)), texts) for number, part in enumerate(parts, 1)
    ]


def _shard(
    layout: Layout, sizes: list[int], aliases: Mapping[int, list[str]], part: list[int], name: str, texts: Mapping[str, str]
) -> Shard:
    tied = {alias: layout.names[k] for k in part for alias in aliases.get(k, ())}
    content: dict[str, object] = {TEXTS: {"format": "pt", **tied, **texts}}
    part = sorted(part, key=lambda k: (-int(layout.itemsizes[k]), layout.names[k]))  # so every tensor is aligned
    places, at = {}, 0
    for k in part:
        places[k] = at
        content[layout.names[k]] = {
            "dtype": NAMES[layout.dtypes[k]], "shape": layout.shapes[k], "data_offsets": [at, at + sizes[k]],
        }  # fmt: skip
        at += sizes[k]
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    return Shard(name, len(text).to_bytes(8, "little") + text, {k: begin + at for k, at in places.items()}, begin + at)
