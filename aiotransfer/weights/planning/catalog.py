"""The tensors of all instances of an update in one table: those that are made alike stand in it once. Pure.

Instances may hold the same model in different forms: one takes bfloat16, another float8 with scales. What is
the same for several instances (name, shape, type, and the parts of the trainers' tensors that it is made of)
is made once, and sent to all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from aiotransfer.weights.layouts.layout import Layout
from aiotransfer.weights.planning.links import Link, Links, resolve
from aiotransfer.weights.planning.rules import Rules, rules_of

Ints = npt.NDArray[Any]
ONES = ("piece_stop", "piece_extent")  # have 1 in dimensions that a tensor lacks, the others 0


class Catalog:
    """T tensors: `names`, `shapes`, `dtypes`, `groups` (tuples), `itemsizes` (int64 [T]), `shape_array`
    (int64 [T, D], with 1 in dimensions that a tensor lacks), `ndim` (D, of all instances). `home` (int32 [T,
    2]): the instance that describes the tensor, and its number there; `of` (int32): the catalog's numbers of
    all tensors of each instance, one instance after the other.
    """

    def __init__(self, instances: Mapping[str, Layout], home: Ints, of: Ints) -> None:
        layouts = list(instances.values())
        self.home, self.of = home, of
        self.ndim = max(layout.ndim for layout in layouts)
        self.begin = np.concatenate([[0], np.cumsum([len(layout.names) for layout in layouts])]).astype(np.int64)
        self._number = {name: k for k, name in enumerate(instances)}
        if len(layouts) == 1 or not home[:, 0].any():
            first = layouts[0]
            self.names, self.shapes, self.dtypes, self.groups = first.names, first.shapes, first.dtypes, first.groups
        else:
            at = home.tolist()
            self.names = tuple(layouts[i].names[k] for i, k in at)
            self.shapes = tuple(layouts[i].shapes[k] for i, k in at)
            self.dtypes = tuple(layouts[i].dtypes[k] for i, k in at)
            self.groups = tuple(layouts[i].groups[k] for i, k in at)
        tables = [padded("piece_extent", layout.shape_array, self.ndim) for layout in layouts]
        where = self.begin[home[:, 0]] + home[:, 1]
        self.shape_array = np.concatenate(tables)[where]
        self.itemsizes = np.concatenate([layout.itemsizes for layout in layouts])[where]

    @classmethod
    def checked(cls, instances: Mapping[str, Layout], home: Ints, of: Ints) -> Catalog:
        """The same, of numbers that came from elsewhere. Raises `ValueError`."""
        layouts = list(instances.values())
        counts = np.array([len(layout.names) for layout in layouts], np.int64)
        if home.ndim != 2 or home.shape[1] != 2 or of.shape != (int(counts.sum()),):
            raise ValueError("the tensors of the instances are not those of their layouts")
        if home.size and not ((home >= 0).all() and (home[:, 0] < len(counts)).all() and (home[:, 1] < counts[home[:, 0]]).all()):
            raise ValueError("a tensor is described by an instance that does not have it")
        if of.size and not (int(of.min()) >= 0 and int(of.max()) < len(home)):
            raise ValueError("an instance has a tensor that does not exist")
        found = cls(instances, home, of)
        theirs = np.concatenate([padded("piece_extent", layout.shape_array, found.ndim) for layout in layouts])
        sizes = np.concatenate([layout.itemsizes for layout in layouts])
        if (found.shape_array[of] != theirs).any() or (found.itemsizes[of] != sizes).any():
            raise ValueError("a tensor differs from the one that stands for it")
        return found

    def numbers(self, instance: str) -> Ints:
        """The catalog's numbers of the tensors of an instance, in the order of its layout."""
        k = self._number[instance]
        return self.of[self.begin[k] : self.begin[k + 1]]

    @functools.cached_property
    def _taken(self) -> Ints:
        """Which instance takes which tensor (bool [instances, T])."""
        taken = np.zeros((len(self._number), len(self.names)), bool)
        for k, name in enumerate(self._number):
            taken[k, self.numbers(name)] = True
        return taken

    def title(self, tensor: int) -> str:
        """The name of a tensor, with the instances that take it where these are not all."""
        taken = self._taken[:, tensor] if self.home[:, 0].any() else np.ones(1, bool)
        takers = [name for name, takes in zip(self._number, taken, strict=False) if takes]
        return self.names[tensor] if taken.all() else f"{self.names[tensor]} for {' and '.join(takers)}"


@dataclass(slots=True)
class Kind:
    """Instances whose tensors are alike and are made by the same rules. `layout`: of the first of them;
    `instances`: names."""

    layout: Layout
    links: Links
    instances: list[str]


def kinds(trainer: Layout, instances: Mapping[str, Layout], rules: Rules, names: list[str] | None) -> list[Kind]:
    """The kinds of instances, in the order of the first of each. Their links may have problems."""
    found: dict[Hashable, Kind] = {}
    for name, layout in instances.items():
        mine = rules_of(rules, name)
        key = layout.names, layout.shapes, layout.dtypes, tuple(sorted(layout.aliases.items())), mine
        if key in found:
            found[key].instances.append(name)
        else:
            found[key] = Kind(layout, resolve(trainer, layout, mine, names), [name])
    return list(found.values())


def problems(found: Sequence[Kind]) -> list[str]:
    """What is wrong with the links of all kinds: once where it is wrong with all, else with the first
    instance of the kind."""
    if len(found) == 1:
        return list(found[0].links.problems)
    every = set.intersection(*(set(kind.links.problems) for kind in found))
    own = [f"{kind.instances[0]}: {text}" for kind in found for text in kind.links.problems if text not in every]
    return [*(text for text in found[0].links.problems if text in every), *own]


def join(found: Sequence[Kind], instances: Mapping[str, Layout]) -> tuple[Catalog, Links]:
    """One table of the tensors of all kinds, and their links in its numbers."""
    position = {name: k for k, name in enumerate(instances)}
    table: dict[Hashable, int] = {}
    home: list[tuple[int, int]] = []
    of: list[Ints] = [np.zeros(0, np.int32)] * len(instances)
    parts: list[tuple[Kind, Ints, Ints]] = []  # with the numbers of all tensors, and which of them are new
    for kind in found:
        keys: Sequence[Hashable] = _keys(kind) if len(found) > 1 else range(len(kind.layout.names))
        fresh = [k for k, key in enumerate(keys) if key not in table]
        for k in fresh:
            table[keys[k]] = len(home)
            home.append((position[kind.instances[0]], k))
        numbers = np.array([table[key] for key in keys], np.int32)
        for name in kind.instances:
            of[position[name]] = numbers
        parts.append((kind, numbers, np.array(fresh, np.int64)))
    catalog = Catalog(instances, np.array(home, np.int32).reshape(-1, 2), np.concatenate(of).astype(np.int32))
    return catalog, _joined(parts)


def _joined(parts: Sequence[tuple[Kind, Ints, Ints]]) -> Links:
    links: list[Link] = []
    columns: dict[str, list[Ints]] = {name: [] for name in ("kind", "scale", "block", "wanted", "scale_of")}
    for kind, numbers, fresh in parts:
        new = set(fresh.tolist())
        links += [
            Link(x.source, int(numbers[x.target]), x.low, x.high, x.axes, x.shift) for x in kind.links.links if x.target in new
        ]
        for name, values in columns.items():
            mine = getattr(kind.links, name)[fresh]
            values.append(np.where(mine < 0, -1, numbers[mine]).astype(np.int64) if name in ("scale", "scale_of") else mine)
    whole = {name: np.concatenate(values) for name, values in columns.items()}
    return Links(links, whole["kind"], whole["scale"], whole["block"], whole["wanted"], whole["scale_of"])


def _keys(kind: Kind) -> list[Hashable]:
    """What must be equal for two tensors to be one; of a tensor of scales also the tensor whose scales they
    are."""
    layout, links = kind.layout, kind.links
    made: dict[int, list[Hashable]] = {}
    for x in links.links:
        made.setdefault(x.target, []).append((x.source, x.low, x.high, x.axes, x.shift))

    def key(k: int) -> Hashable:
        scale = int(links.scale[k])
        how = bool(links.wanted[k]), int(links.kind[k]), tuple(links.block[k].tolist()), "" if scale < 0 else layout.names[scale]
        return layout.names[k], layout.shapes[k], layout.dtypes[k], how, tuple(made.get(k, ()))

    def both(k: int) -> Hashable:
        return key(k), key(int(links.scale_of[k])) if links.scale_of[k] >= 0 else None

    return [both(k) for k in range(len(layout.names))]


def padded(name: str, values: Ints, ndim: int) -> Ints:
    """The values `name` of pieces with D columns, where they have fewer."""
    if values.ndim < 2 or values.shape[1] == ndim:
        return values
    return np.pad(values, ((0, 0), (0, ndim - values.shape[1])), constant_values=1 if name in ONES else 0)
