"""Rules: how a tensor of the inference side is made of tensors of the trainers, where it is not simply the
one of the same name.

Names are templates. `{x}` stands for a part of a name without dots, the same text wherever `{x}` stands in
one rule: `Rename("layers.{i}.attn.wq", "model.layers.{i}.self_attn.q_proj.weight")`. A tensor that no rule
makes is the trainers' tensor of the same name. Where instances need different ones (they have other numbers
of ranks, and fused tensors), rules are given as {instance: rules}. One rule of `Rename`, `Fuse`, `Split`,
`Stack`, `Unstack` may make a tensor; `Transpose` and one of `Cast` and `Quantise` may come on top.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from aiotransfer.quote import quote
from aiotransfer.weights.layouts.templates import Template


@dataclass(frozen=True, slots=True)
class Rename:
    """`target` of the inference side is `source` of the trainers."""

    source: str
    target: str


@dataclass(frozen=True, slots=True)
class Fuse:
    """`target` is the `sources` one after the other along `dim`.

    `ranks`: with 1 (the default) the target is [q; k; v]. With tensor parallelism, where each of `ranks`
    ranks holds its part as [q_r; k_r; v_r] and the target is declared as those parts one after the other,
    `ranks` is their number and `units` says into how many parts each source may be divided (heads; default:
    rows). A source with fewer units than ranks is repeated: unit `r * units // ranks` goes to rank r (key and
    value heads that are replicated); the target then has the repeated rows, too.
    """

    sources: tuple[str, ...]
    target: str
    dim: int = 0
    ranks: int = 1
    units: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Split:
    """The `targets`, one after the other along `dim`, are `source`. Their sizes are those of the inference
    side."""

    source: str
    targets: tuple[str, ...]
    dim: int = 0


@dataclass(frozen=True, slots=True)
class Stack:
    """`target` holds one entry for each `index` along `dim` (logical experts, for example): the `sources` of
    that index, one after the other along `fuse_dim` (a dimension of the sources).
    `Stack(("experts.{e}.gate", "experts.{e}.up"), "experts.w13", index="e")`.
    """

    sources: tuple[str, ...] | str
    target: str
    index: str
    dim: int = 0
    fuse_dim: int = 0


@dataclass(frozen=True, slots=True)
class Unstack:
    """The reverse of `Stack`: entry `index` of `source` along `dim` is made of the `targets`, along
    `fuse_dim` of those."""

    source: str
    targets: tuple[str, ...] | str
    index: str
    dim: int = 0
    fuse_dim: int = 0


@dataclass(frozen=True, slots=True)
class Tie:
    """All `names` are one tensor at the trainers: where several of them exist there, the first one that does
    is sent for all."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Transpose:
    """`target` is what its other rule (or its name) says, with its dimensions in another order: dimension j
    of the target is dimension `axes[j]` of that (None: reversed). Without this rule a tensor of another shape
    is refused, and one is never turned silently."""

    target: str
    axes: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Cast:
    """`target` may have another floating type than its sources; values are rounded to nearest even on their
    way."""

    target: str


@dataclass(frozen=True, slots=True)
class Quantise:
    """Where `target` has the type float8_e4m3fn at the inference side, it is quantised on its way, and the
    tensor `scale` there (float32) gets one scale for each block of `block` elements of the last two
    dimensions: amax / 448 of the block, 1 for a block of zeros. Sources are float32, bfloat16 or float16.
    Tensors of another type that `target` matches are left to other rules."""

    target: str
    scale: str
    block: tuple[int, int] = (128, 128)


Rule: TypeAlias = Rename | Fuse | Split | Stack | Unstack | Tie | Transpose | Cast | Quantise
GivenRules: TypeAlias = Iterable[Rule] | Mapping[str, Iterable[Rule]] | None
Rules: TypeAlias = dict[str, tuple[Rule, ...]]  # by instance; "": of those that are not named


def by_instance(rules: GivenRules) -> Rules:
    """Rules as users give them, for all instances or for each, in one form: equal ones are equal on every
    rank. Raises `TypeError` and `ValueError`, with the rule in the text."""
    if not isinstance(rules, Mapping):
        return {"": checked(rules)}
    if unnamed := [name for name in rules if not isinstance(name, str)]:
        raise TypeError(f"rules of instances are {{instance: rules}}, not {{{quote(unnamed[0])}: rules}}")
    return {name: checked(rules[name]) for name in sorted(rules)}


def rules_of(rules: Rules, instance: str) -> tuple[Rule, ...]:
    """The rules of an instance: its own where it is named, else those of the key ""."""
    return rules.get(instance, rules.get("", ()))


def checked(rules: Iterable[Rule] | None) -> tuple[Rule, ...]:
    """Rules as users give them. Raises `TypeError` and `ValueError`, with the rule in the text."""
    if rules is None:
        return ()
    if isinstance(rules, str | bytes) or not isinstance(rules, Iterable):
        raise TypeError(f"rules are a list of rules, not {quote(rules)}")
    found = tuple(rules)
    for rule in found:
        if not isinstance(rule, Rule):
            raise TypeError(f"{quote(rule)} is no rule of weights")
        try:
            _check(rule)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{quote(rule)}: {error}") from None
    return found


def _check(rule: Rule) -> None:
    for name in ("source", "target", "scale"):
        if hasattr(rule, name):
            Template(getattr(rule, name))
    for name, may_be_one in (
        ("sources", isinstance(rule, Stack)),
        ("targets", isinstance(rule, Split | Unstack)),
        ("names", False),
    ):
        if hasattr(rule, name):
            _texts(name, getattr(rule, name), may_be_one)
    for name in ("dim", "fuse_dim"):
        if hasattr(rule, name):
            _integer(name, getattr(rule, name), None)
    match rule:
        case Fuse():
            _integer("ranks", rule.ranks, 1)
            for unit in () if rule.units is None else _several("units", rule.units):
                _integer("a unit", unit, 1)
        case Stack() | Unstack():
            if not isinstance(rule.index, str) or not rule.index.isidentifier():
                raise TypeError(f"index is the word in the braces of the templates, not {quote(rule.index)}")
        case Transpose() if rule.axes is not None:
            for axis in _several("axes", rule.axes):
                _integer("an axis", axis, 0)
        case Quantise():
            if rule.scale == rule.target:
                raise ValueError("its scales are in a tensor of their own")
            block = _several("block", rule.block)
            for size in block:
                _integer("an extent of a block", size, 1)
            if len(block) != 2:
                raise ValueError(f"a block has two extents, not {len(block)}")


def _integer(name: str, value: Any, least: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, not {quote(value)}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, not {quote(value)}")


def _several(name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, tuple | list):
        raise TypeError(f"{name} must be a tuple, not {quote(value)}")
    return tuple(value)


def _texts(name: str, value: Any, may_be_one: bool) -> None:
    values = (value,) if may_be_one and isinstance(value, str) else _several(name, value)
    if not values:
        raise ValueError(f"{name} must name a tensor")
    for text in values:
        if name == "names" and not isinstance(text, str):
            raise TypeError(f"names must be texts, not {quote(text)}")
        if name != "names":
            Template(text)
