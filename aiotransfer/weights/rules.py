"""Rules: how a tensor of the inference side is made of tensors of the trainers, where it is not simply the one of the same name.

Names are templates. `{x}` stands for a part of a name without dots, the same text wherever `{x}` stands in one rule:
`Rename("layers.{i}.attn.wq", "model.layers.{i}.self_attn.q_proj.weight")`. A tensor that no rule makes is the trainers' tensor
of the same name. One rule of `Rename`, `Fuse`, `Split`, `Stack`, `Unstack` may make a tensor; `Transpose` and one of `Cast` and
`Quantise` may come on top.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Rename:
    """`target` of the inference side is `source` of the trainers."""

    source: str
    target: str


@dataclass(frozen=True, slots=True)
class Fuse:
    """`target` is the `sources` one after the other along `dim`.

    `ranks`: with 1 (the default) the target is [q; k; v]. With tensor parallelism, where each of `ranks` ranks holds its part
    as [q_r; k_r; v_r] and the target is declared as those parts one after the other, `ranks` is their number and `units` says
    into how many parts each source may be divided (heads; default: rows). A source with fewer units than ranks is repeated:
    unit `r * units // ranks` goes to rank r (key and value heads that are replicated); the target then has the repeated rows,
    too.
    """

    sources: tuple[str, ...]
    target: str
    dim: int = 0
    ranks: int = 1
    units: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Split:
    """The `targets`, one after the other along `dim`, are `source`. Their sizes are those of the inference side."""

    source: str
    targets: tuple[str, ...]
    dim: int = 0


@dataclass(frozen=True, slots=True)
class Stack:
    """`target` holds one entry for each `index` along `dim` (logical experts, for example): the `sources` of that index, one
    after the other along `fuse_dim` (a dimension of the sources). `Stack(("experts.{e}.gate", "experts.{e}.up"), "experts.w13",
    index="e")`.
    """

    sources: tuple[str, ...] | str
    target: str
    index: str
    dim: int = 0
    fuse_dim: int = 0


@dataclass(frozen=True, slots=True)
class Unstack:
    """The reverse of `Stack`: entry `index` of `source` along `dim` is made of the `targets`, along `fuse_dim` of those."""

    source: str
    targets: tuple[str, ...] | str
    index: str
    dim: int = 0
    fuse_dim: int = 0


@dataclass(frozen=True, slots=True)
class Tie:
    """All `names` are one tensor at the trainers: where several of them exist there, the first one that does is sent for all."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Transpose:
    """`target` is what its other rule (or its name) says, with its dimensions in another order: dimension j of the target is
    dimension `axes[j]` of that (None: reversed). Without this rule a tensor of another shape is refused, and one is never
    turned silently."""

    target: str
    axes: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Cast:
    """`target` may have another floating type than its sources; values are rounded to nearest even on their way."""

    target: str


@dataclass(frozen=True, slots=True)
class Quantise:
    """Where `target` has the type float8_e4m3fn at the inference side, it is quantised on its way, and the tensor `scale` there
    (float32) gets one scale for each block of `block` elements of the last two dimensions: amax / 448 of the block, 1 for a block
    of zeros. Sources are float32, bfloat16 or float16. Tensors of another type that `target` matches are left to other rules."""

    target: str
    scale: str
    block: tuple[int, int] = (128, 128)


Rule: TypeAlias = Rename | Fuse | Split | Stack | Unstack | Tie | Transpose | Cast | Quantise
