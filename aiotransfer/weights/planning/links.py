"""From names and rules to links: which box of which trainer tensor becomes which box of which inference
tensor. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from aiotransfer.quote import quote
from aiotransfer.weights.layouts.layout import Layout
from aiotransfer.weights.layouts.templates import Template
from aiotransfer.weights.planning.rules import Cast, Fuse, Quantise, Rename, Rule, Split, Stack, Tie, Transpose, Unstack

COPY, CAST, QUANTISE, SCALES = 0, 1, 2, 3
KINDS = ("copy", "cast", "quantise", "scales of")
FLOATS = ("float32", "float16", "bfloat16")  # what can be quantised
CASTS = (*FLOATS, "float64")  # what can be cast, in any direction
QUANTISED = "float8_e4m3fn"
SCALE_ENDINGS = ("_scale_inv", "_scale")
Ints = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Link:
    """A box of trainer tensor `source` is a box of inference tensor `target`: dimension j of the target is
    dimension `axes[j]` of the source, moved by `shift[j]` elements; where `axes[j]` is -1 the target's index
    is `shift[j]`. `low`, `high`: the source's box."""

    source: int
    target: int
    low: tuple[int, ...]
    high: tuple[int, ...]
    axes: tuple[int, ...]
    shift: tuple[int, ...]


@dataclass(slots=True)
class Links:
    """All links, and for each inference tensor what is done on the way: `kind` (COPY, CAST, QUANTISE),
    `scale` (index of the tensor of scales, -1: none), `block` (rows, columns; 1 where not quantised),
    `wanted` (False: not part of this update, or a scale, which is made on the way), `scale_of` (for a tensor
    of scales that is made on the way: the tensor whose scales they are, else -1)."""

    links: list[Link]
    kind: Ints
    scale: Ints
    block: Ints
    wanted: Ints
    scale_of: Ints
    problems: list[str] = field(default_factory=list)


class _Rows(NamedTuple):
    """Rows of a source: `size` of them from `low`, which are the target's from `at`."""

    low: int
    size: int
    at: int


def resolve(trainer: Layout, inference: Layout, rules: Sequence[Rule], names: Iterable[str] | None) -> Links:
    """Links for every tensor of the inference side (or for those whose names match the templates `names`)."""
    return _Resolver(trainer, inference, rules, names).run()


class _Resolver:
    def __init__(self, trainer: Layout, inference: Layout, rules: Sequence[Rule], names: Iterable[str] | None) -> None:
        self.trainer, self.inference = trainer, inference
        count = len(inference.names)
        self.result = Links(
            [], np.zeros(count, np.int8), np.full(count, -1, np.int64), np.ones((count, 2), np.int64), np.zeros(count, bool),
            np.full(count, -1, np.int64),
        )  # fmt: skip
        self.problems = self.result.problems
        self.names = None if names is None else [Template(name) for name in ([names] if isinstance(names, str) else names)]
        self.used: set[int] = set()
        self.ties: dict[str, str] = {}
        self.makers: list[tuple[Template, int, Rule]] = []  # a target's template, its place among the rule's targets, the rule
        self.turns: list[tuple[Template, Transpose]] = []
        self.casts: list[Template] = []
        self.quantised: list[tuple[Template, Template, Quantise]] = []
        self.cache: dict[str, Template] = {}
        for rule in rules:
            self._sort(rule)

    def _sort(self, rule: Rule) -> None:
        if isinstance(rule, Tie):
            present = [name for name in rule.names if self.trainer.find(name) is not None]
            self.ties.update(dict.fromkeys(rule.names, present[0]) if present else {})
        elif isinstance(rule, Transpose):
            self.turns.append((Template(rule.target), rule))
        elif isinstance(rule, Cast):
            self.casts.append(Template(rule.target))
        elif isinstance(rule, Quantise):
            self.quantised.append((Template(rule.target), Template(rule.scale), rule))
        elif isinstance(rule, Rename | Fuse | Stack):
            self.makers.append((Template(rule.target), 0, rule))
        else:
            self.makers += [(Template(target), k, rule) for k, target in enumerate(texts(rule.targets))]

    def run(self) -> Links:
        scales = self._scales()
        by_tensor: dict[int, list[str]] = {}
        for alias, k in self.inference.aliases.items():
            by_tensor.setdefault(k, []).append(alias)
        for k, name in enumerate(self.inference.names):
            if self.inference.find(name) != k:
                continue  # a name that stands twice is a problem of the layout
            every = [name, *sorted(by_tensor.get(k, ()))]
            asked = self.names is None or any(t.match(n) is not None for t in self.names for n in every)
            if k in scales:
                self._scale(k, scales[k], asked)
            elif asked:
                self.result.wanted[k] = True
                self._tensor(k, every)
        self._extra()
        self._lonely_scales()
        return self.result

    # ---- one tensor ----

    def _tensor(self, k: int, names: list[str]) -> None:
        made: list[tuple[str, list[Link]]] = []
        failed: list[str] = []
        for name in names:
            links = self._make(k, name)
            if isinstance(links, str):
                failed.append(links)
            elif links not in [other for _, other in made]:
                made.append((name, links))
        if not made:
            self.problems += failed[:1]
            return
        if len(made) > 1:
            which = " and ".join(f"{name} from {self.trainer.names[links[0].source]}" for name, links in made if links)
            self.problems.append(
                f"{' = '.join(names)} is one tensor at the inference side, but comes from several: {which}; a Tie rule says which"
            )
            return
        links = made[0][1]
        self.result.links += links
        self._types(k, names, links)

    def _make(self, k: int, name: str) -> list[Link] | str:
        """The links that make tensor k under this name, or what is wrong."""
        shape = self.inference.shapes[k]
        turn = [(template, rule) for template, rule in self.turns if template.match(name) is not None]
        axes = tuple(range(len(shape)))
        if turn:
            axes = tuple(reversed(axes)) if turn[0][1].axes is None else turn[0][1].axes
            if sorted(axes) != list(range(len(shape))):
                return f"{name}: a transpose by {axes} does not fit {len(shape)} dimensions"
        before = [0] * len(shape)  # the shape before it is turned
        for j, axis in enumerate(axes):
            before[axis] = shape[j]
        found = [(rule, place, values) for t, place, rule in self.makers if (values := t.match(name)) is not None]
        if len(found) > 1:
            return f"{name}: {len(found)} rules make it: {', '.join(repr(rule) for rule, _, _ in found)}"
        try:
            turned = tuple(before)
            links = self._by_rule(k, name, turned, *found[0]) if found else self._whole(k, name, name, turned)
        except _Unfit as unfit:
            return str(unfit)
        return [
            Link(x.source, x.target, x.low, x.high, tuple(x.axes[a] for a in axes), tuple(x.shift[a] for a in axes))
            for x in links
        ]

    def _by_rule(self, k: int, name: str, shape: tuple[int, ...], rule: Rule, place: int, values: dict[str, str]) -> list[Link]:
        if isinstance(rule, Rename):
            return self._whole(k, name, self._fill(rule.source, values), shape)
        if isinstance(rule, Fuse):
            return self._fused(k, name, shape, rule, values)
        if isinstance(rule, Split):
            sizes = self._sizes(name, [self._fill(t, values) for t in rule.targets], rule.dim)
            source = self._source(name, self._fill(rule.source, values))
            part = _Rows(sum(sizes[:place]), sizes[place], 0)
            return [self._part(k, name, source, shape, rule.dim, part, total=sum(sizes))]
        if isinstance(rule, Stack):
            return self._stacked(k, name, shape, rule, values)
        assert isinstance(rule, Unstack)
        return self._unstacked(k, name, shape, rule, place, values)

    def _whole(self, k: int, name: str, source_name: str, shape: tuple[int, ...]) -> list[Link]:
        source = self._source(name, source_name)
        theirs = self.trainer.shapes[source]
        if theirs != shape:
            turned = " (a Transpose rule would turn it)" if theirs == tuple(reversed(shape)) else ""
            raise _Unfit(f"{name}: its shape is {shape} at the inference side and {theirs} at the trainers{turned}")
        return [Link(source, k, (0,) * len(shape), shape, tuple(range(len(shape))), (0,) * len(shape))]

    def _part(
        self, k: int, name: str, source: int, shape: tuple[int, ...], dim: int, part: _Rows, total: int | None = None
    ) -> Link:
        """A part of the rows of a source along `dim`. `total`: rows that the source must have."""
        theirs = self.trainer.shapes[source]
        dim = self._dim(name, dim, len(shape))
        others = [n for d, n in enumerate(shape) if d != dim]
        rows = theirs[dim] if dim < len(theirs) else -1
        if (
            len(theirs) != len(shape)
            or [n for d, n in enumerate(theirs) if d != dim] != others
            or (total is not None and rows != total)
        ):
            wanted = tuple("*" if d == dim and total is None else total if d == dim else n for d, n in enumerate(shape))
            raise _Unfit(f"{name}: {self.trainer.names[source]} has the shape {theirs} at the trainers and would need {wanted}")
        lows, highs, shift = [0] * len(shape), list(theirs), [0] * len(shape)
        lows[dim], highs[dim], shift[dim] = part.low, part.low + part.size, part.at - part.low
        return Link(source, k, tuple(lows), tuple(highs), tuple(range(len(shape))), tuple(shift))

    def _fused(self, k: int, name: str, shape: tuple[int, ...], rule: Fuse, values: dict[str, str]) -> list[Link]:
        dim = self._dim(name, rule.dim, len(shape))
        sources = [self._source(name, self._fill(s, values)) for s in rule.sources]
        sizes = [self.trainer.shapes[s][dim] if dim < len(self.trainer.shapes[s]) else -1 for s in sources]
        units = sizes if rule.units is None else list(rule.units)
        if len(units) != len(sizes):
            raise _Unfit(f"{name}: {len(units)} units for {len(sizes)} sources")
        links, at = [], 0
        for rank in range(rule.ranks):
            for source, size, unit in zip(sources, sizes, units, strict=True):
                if rule.ranks == 1:
                    low, rows = 0, size
                elif unit < 1 or size % unit or (unit % rule.ranks and rule.ranks % unit):
                    raise _Unfit(
                        f"{name}: {size} rows of {self.trainer.names[source]} in {unit} units do not go to {rule.ranks} ranks"
                    )
                else:
                    many = max(unit // rule.ranks, 1)
                    low, rows = rank * unit // rule.ranks * (size // unit), many * (size // unit)
                links.append(self._part(k, name, source, shape, dim, _Rows(low, rows, at)))
                at += rows
        if at != shape[dim]:
            raise _Unfit(f"{name}: its sources have {at} rows along dimension {dim}, the shape {shape} has {shape[dim]}")
        return links

    def _stacked(self, k: int, name: str, shape: tuple[int, ...], rule: Stack, values: dict[str, str]) -> list[Link]:
        dim = self._dim(name, rule.dim, len(shape))
        inner = shape[:dim] + shape[dim + 1 :]
        fuse = self._dim(name, rule.fuse_dim, len(inner))
        links = []
        for entry in range(shape[dim]):
            at = 0
            for template in texts(rule.sources):
                source = self._source(name, self._fill(template, {**values, rule.index: str(entry)}))
                theirs = self.trainer.shapes[source]
                every = _Rows(0, theirs[fuse] if fuse < len(theirs) else 0, at)
                part = self._part(k, name, source, inner, fuse, every)
                at += theirs[fuse]
                axes, shift = list(part.axes), list(part.shift)
                axes.insert(dim, -1)
                shift.insert(dim, entry)
                links.append(Link(source, k, part.low, part.high, tuple(axes), tuple(shift)))
            if at != inner[fuse]:
                raise _Unfit(f"{name}: the sources of entry {entry} have {at} rows, the shape {shape} needs {inner[fuse]}")
        return links

    def _unstacked(
        self, k: int, name: str, shape: tuple[int, ...], rule: Unstack, place: int, values: dict[str, str]
    ) -> list[Link]:
        source = self._source(name, self._fill(rule.source, values))
        theirs = self.trainer.shapes[source]
        entry = values.get(rule.index, "")
        dim = self._dim(name, rule.dim, len(theirs))
        fuse = self._dim(name, rule.fuse_dim, len(shape))
        if not entry.isdecimal() or not int(entry) < theirs[dim]:
            raise _Unfit(f"{name}: {self.trainer.names[source]} has no entry {quote(entry)} among {theirs[dim]}")
        inner = theirs[:dim] + theirs[dim + 1 :]
        sizes = self._sizes(name, [self._fill(t, values) for t in texts(rule.targets)], rule.fuse_dim)
        if tuple(sum(sizes) if d == fuse else n for d, n in enumerate(shape)) != inner:
            raise _Unfit(f"{name}: an entry of {self.trainer.names[source]} has the shape {inner}, which {shape} does not fit")
        low, high, shift = [0] * len(inner), list(inner), [0] * len(inner)
        low[fuse], high[fuse], shift[fuse] = sum(sizes[:place]), sum(sizes[: place + 1]), -sum(sizes[:place])
        axes = [d + (d >= dim) for d in range(len(inner))]
        low.insert(dim, int(entry))
        high.insert(dim, int(entry) + 1)
        return [Link(source, k, tuple(low), tuple(high), tuple(axes), tuple(shift))]

    # ---- small things ----

    def _source(self, name: str, source: str) -> int:
        found = self.trainer.find(self.ties.get(source, source))
        if found is None:
            what = (
                f"{name}: the trainers have no such tensor" if source == name else f"{name}: the trainers have no tensor {source}"
            )
            raise _Unfit(what)
        self.used.add(found)
        return found

    def _sizes(self, name: str, targets: list[str], dim: int) -> list[int]:
        sizes = []
        for target in targets:
            k = self.inference.find(target)
            if k is None:
                raise _Unfit(f"{name}: {target}, which its rule names beside it, is no tensor of the inference side")
            sizes.append(self.inference.shapes[k][self._dim(target, dim, len(self.inference.shapes[k]))])
        return sizes

    @staticmethod
    def _dim(name: str, dim: int, ndim: int) -> int:
        if not -ndim <= dim < ndim:
            raise _Unfit(f"{name}: its rule names dimension {dim} of {ndim}")
        return dim % ndim

    def _fill(self, template: str, values: dict[str, str]) -> str:
        if template not in self.cache:
            self.cache[template] = Template(template)
        return self.cache[template].fill(values)

    # ---- types and scales ----

    def _types(self, k: int, names: list[str], links: list[Link]) -> None:
        name, dtype = names[0], self.inference.dtypes[k]
        sources = sorted({self.trainer.dtypes[link.source] for link in links})
        quantised = dtype == QUANTISED and any(t.match(n) is not None for t, _, _ in self.quantised for n in names)
        if len(sources) > 1:
            self.problems.append(f"{name}: its sources have different types: {', '.join(sources)}")
        elif quantised and (not sources or sources[0] != dtype):
            if sources and sources[0] not in FLOATS:
                self.problems.append(f"{name}: only {', '.join(FLOATS)} are quantised, the trainers have {sources[0]}")
            self.result.kind[k] = QUANTISE
        elif quantised:
            self.problems.append(f"{name}: a rule quantises it, but the trainers have {dtype} already")
        elif sources and sources[0] != dtype:
            if not any(t.match(n) is not None for t in self.casts for n in names):
                types = f"{dtype} at the inference side and {sources[0]} at the trainers"
                self.problems.append(f"{name}: its type is {types}; a Cast or Quantise rule says how")
            elif sources[0] not in CASTS or dtype not in CASTS:
                self.problems.append(f"{name}: {sources[0]} is not cast to {dtype}; casts are between {', '.join(CASTS)}")
            self.result.kind[k] = CAST

    def _scales(self) -> dict[int, int]:
        """{index of a tensor of scales: index of its tensor, -1 where that is missing}, by the rules; checks
        types and shapes."""
        scales: dict[int, int] = {}
        every = (*self.inference.names, *self.inference.aliases)
        for target, scale, rule in self.quantised:
            for name in every:
                values = scale.match(name)
                tensor = None if values is None or not set(target.holes) <= set(values) else target.fill(values)
                if tensor is not None and (k := self.inference.find(tensor)) is not None:
                    if self.inference.dtypes[k] == QUANTISED:
                        self._pair(tensor, name, rule, scales)
                elif target.match(name) is not None and self.inference.dtypes[self.inference.find(name) or 0] == QUANTISED:
                    scale_name = scale.fill(target.match(name) or {})
                    if self.inference.find(scale_name) is None:
                        lacks = f"the inference side has no {scale_name} for its scales"
                        self.problems.append(f"{name}: a rule quantises it, but {lacks}")
                elif tensor is not None and (s := self.inference.find(name)) is not None and self.trainer.find(name) is None:
                    self.problems.append(f"{name}: a scale without its tensor {tensor}, which the inference side does not have")
                    scales.setdefault(s, -1)
        return scales

    def _pair(self, name: str, scale_name: str, rule: Quantise, scales: dict[int, int]) -> None:
        k, s = self.inference.find(name), self.inference.find(scale_name)
        assert k is not None
        assert s is not None
        shape = self.inference.shapes[k]
        if scales.get(s, k) != k:
            self.problems.append(f"{scale_name}: the scale of two tensors, {self.inference.names[scales[s]]} and {name}")
        scales[s] = k
        if self.inference.dtypes[s] != "float32":
            self.problems.append(f"{scale_name}: scales are float32, not {self.inference.dtypes[s]}")
        if len(shape) < 2:
            self.problems.append(f"{name}: a tensor of shape {shape} has no blocks of {rule.block}")
            return
        wanted = (*shape[:-2], -(-shape[-2] // rule.block[0]), -(-shape[-1] // rule.block[1]))
        if self.inference.shapes[s] != wanted:
            self.problems.append(f"{scale_name}: its shape is {self.inference.shapes[s]}; the blocks of {name} need {wanted}")
        self.result.scale[k], self.result.block[k] = s, rule.block

    def _scale(self, s: int, k: int, asked: bool) -> None:
        """A tensor of scales that is made on the way comes with its tensor, and with nothing else."""
        self.result.scale_of[s] = k
        if asked and k >= 0 and self.names is not None:
            names = [self.inference.names[k], *(a for a, t in self.inference.aliases.items() if t == k)]
            if not any(t.match(n) is not None for t in self.names for n in names):
                self.problems.append(
                    f"{self.inference.names[s]}: a scale without its tensor {names[0]}, which this update leaves out"
                )

    def _extra(self) -> None:
        if self.names is not None:
            if not self.result.wanted.any():
                self.problems.append(f"no tensor of the inference side matches {', '.join(t.text for t in self.names)}")
            return
        tied = {k for name in self.ties if (k := self.trainer.find(name)) is not None}
        for k, name in enumerate(self.trainer.names):
            if k not in self.used and k not in tied and self.trainer.find(name) == k:
                self.problems.append(f"{name}: the trainers have it, and no tensor of the inference side takes it")

    def _lonely_scales(self) -> None:
        """Scales that are copied as they are belong to a tensor that is part of the same update."""
        for k in np.flatnonzero(self.result.wanted).tolist():
            name = self.inference.names[k]
            for end in SCALE_ENDINGS:
                if name.endswith("weight" + end) and self.inference.find(name.removesuffix(end)) is None:
                    self.problems.append(f"{name}: a scale without its tensor {name.removesuffix(end)}")
                base = self.inference.find(name.removesuffix(end)) if name.endswith(end) else None
                if base is not None and self.inference.itemsizes[base] == 1 and not self.result.wanted[base]:
                    self.problems.append(
                        f"{name}: a scale without its tensor {self.inference.names[base]}, which this update leaves out"
                    )
                scale = self.inference.find(name + end)
                if (
                    scale is not None
                    and self.inference.itemsizes[k] == 1
                    and self.result.kind[k] != QUANTISE
                    and not self.result.wanted[scale]
                ):
                    self.problems.append(
                        f"{name}: a tensor without its scale {self.inference.names[scale]}, which this update leaves out"
                    )


class _Unfit(Exception):
    """What is wrong with one tensor."""


def texts(value: tuple[str, ...] | list[str] | str) -> tuple[str, ...]:
    """One text or several, as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value)
