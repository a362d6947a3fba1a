"""`make_plan`: from two layouts and rules to a schedule. Pure and deterministic."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from aiotransfer.core import boxes
from aiotransfer.quote import quote
from aiotransfer.weights.layouts import layoutcheck
from aiotransfer.weights.layouts.bind import Bound
from aiotransfer.weights.layouts.errors import PlanError
from aiotransfer.weights.layouts.layout import Layout
from aiotransfer.weights.planning import catalog, relay, sources, staging
from aiotransfer.weights.planning.links import CAST, COPY, QUANTISE, SCALES, Links
from aiotransfer.weights.planning.plan import Plan
from aiotransfer.weights.planning.rules import GivenRules, Rules, by_instance
from aiotransfer.weights.planning.schedule import block_table
from aiotransfer.weights.planning.senders import Moves, choose

Ints = npt.NDArray[Any]
STAGING_BYTES = 1 << 30
GRAINS = 64  # parts that a sender's share is cut into, where several ranks could send it


def make_plan(
    trainer: Layout,
    inference: Layout | Mapping[str, Layout],
    rules: GivenRules = (),
    *,
    staging_bytes: int = STAGING_BYTES,
    fanout: str = "direct",
    names: Iterable[str] | None = None,
    staged: bool = False,
    apart: bool = False,
) -> Plan:
    """A schedule of writes that brings every byte of the inference side's tensors from the trainers, each
    exactly once.

    `trainer`: where the trainers' tensors lie; `inference`: the same of one instance, or {name: layout} of
    several (alone, it is named "inference"); they may hold the model in different types. `rules`: see
    `aiotransfer.weights.planning.rules`; a list for all instances, or {instance: list} with the key "" for
    those that are not named. `staging_bytes` (default 1 GiB): temporary memory that each trainer rank may use
    for tensors that are cast or quantised on the way; larger ones go in parts. `fanout`: "direct" (trainers
    write to all instances) or "relay" (each byte leaves the trainers about once, instances pass parts on to
    one another). `names`: templates of the inference tensors that are part of the update (default: all).
    `staged`: the trainers' tensors cannot be written from where they lie (files, a GPU): what is only copied
    goes through the staging memory, too. `apart`: they can, but not be converted there (a GPU that rails
    reach): what is cast or quantised is first brought into the staging memory.

    Raises `PlanError`, whose `.problems` lists everything that does not fit, before anything is moved;
    `TypeError` and `ValueError` for arguments that cannot be.
    """
    if fanout not in ("direct", "relay"):
        raise ValueError(f'fanout is "direct" or "relay", not {quote(fanout)}')
    if isinstance(staging_bytes, bool) or not isinstance(staging_bytes, int):
        raise TypeError(f"staging_bytes must be an integer, not {quote(staging_bytes)}")
    if staging_bytes < 1:
        raise ValueError(f"staging_bytes must be positive, not {quote(staging_bytes)}")
    trainer, inference = _layout(trainer), _layout(inference)
    instances = {"inference": inference} if not isinstance(inference, Mapping) else dict(inference)
    instances = {name: _layout(layout) for name, layout in instances.items()}
    wrong = [layout for layout in (trainer, *instances.values()) if not isinstance(layout, Layout)]
    if not instances or wrong:
        what = f"not {type(wrong[0]).__name__}" if wrong else "there is none of the inference side"
        raise TypeError(f"make_plan takes Layouts, the trainers' and one or more {{name: layout}} of the inference side: {what}")
    if unnamed := [name for name in instances if not isinstance(name, str)]:
        raise TypeError(f"instances have texts for names, not {quote(unnamed[0])}")
    where = bool(staged), bool(apart)
    return _Planner(trainer, instances, by_instance(rules), staging_bytes, fanout, _templates(names), where).run()


def _layout(given: Any) -> Any:
    """The layout itself, or that of a `Bound`."""
    return given.layout if isinstance(given, Bound) else given


def _templates(names: Iterable[str] | None) -> list[str] | None:
    if names is None or isinstance(names, str):
        return None if names is None else [names]
    if not isinstance(names, Iterable):
        raise TypeError(f"names are templates of names of tensors, not {quote(names)}")
    return list(names)


class _Planner:
    def __init__(
        self, trainer: Layout, instances: dict[str, Layout], rules: Rules, staging_bytes: int, fanout: str,
        names: list[str] | None, where: tuple[bool, bool],
    ) -> None:  # fmt: skip
        self.staged, self.apart = where
        self.trainer, self.instances, self.fanout, self.staging_bytes = trainer, instances, fanout, staging_bytes
        self.names = names
        self.kinds = catalog.kinds(trainer, instances, rules, names)

    def run(self) -> Plan:
        problems = [*self._sides(), *catalog.problems(self.kinds)]
        if problems:
            raise PlanError("the weights of the trainers and of the inference side do not fit", problems=problems)
        self.catalog, self.links = catalog.join(self.kinds, self.instances)
        self.ndim = self.catalog.ndim
        self._reordered()
        self._targets()
        links = self.links.links
        have = sources.held(self.trainer, links, self.ndim)
        cells = sources.cells(self.trainer, have)
        self._covered(cells)
        shapes, ndims = self.catalog.shape_array, np.array([len(shape) for shape in self.catalog.shapes], np.int64)
        units = self._cut(sources.units(cells, self.links, shapes, ndims), cells)
        moves = self._moves(units)
        relays = None
        if self.fanout == "relay" and len(self.instances) > 1:
            moves, relays = relay.separate(
                moves, self.target_instance, len(self.instances), self.target_start, self.target_stop, units, self.blocks
            )
        made = (self.links.kind != COPY) | self.staged
        work = choose(self.trainer, (self.target_receiver, self.target_hosts), units, cells, have, made, moves)
        if self.staged or self.apart:
            work.gathers = self.links.kind[units.tensor[work.unit]] != COPY
        phases, tensor_phase = self._phases()
        material = staging.Material(self.trainer, self.catalog, self.links, units, have, self.blocks, made)
        arrays = staging.arrange(
            material, work, tensor_phase, self.staging_bytes, self.target_receiver, relays=relays is not None
        )
        arrays |= relay.arrays(relays, arrays.pop("move_order"), self.target_receiver, work)
        low, high, axes, shift = sources.link_table(links, self.trainer.ndim, self.ndim)
        arrays |= {
            "tensor_kind": self._kinds(),
            "tensor_scale": self.links.scale.astype(np.int32), "tensor_block": self.links.block.astype(np.int32),
            "tensor_phase": tensor_phase,
            "tensor_home": self.catalog.home, "instance_tensor": self.catalog.of,
            "link_low": low, "link_high": high, "link_axes": axes.astype(np.int32), "link_shift": shift,
            "link_source": np.array([x.source for x in links], np.int32),
            "link_target": np.array([x.target for x in links], np.int32),
            "unit_tensor": units.tensor.astype(np.int32), "unit_start": units.start, "unit_stop": units.stop,
        }  # fmt: skip
        return Plan(
            self.trainer, self.instances, fanout=self.fanout, staging_bytes=self.staging_bytes, phases=phases, arrays=arrays
        )

    # ---- what can be wrong ----

    def _sides(self) -> list[str]:
        found = [f"trainers: {text}" for text in layoutcheck.problems(self.trainer, only=self._sources())]
        for kind in self.kinds:
            scales = frozenset(np.flatnonzero(kind.links.scale_of >= 0).tolist())
            only = None if self.names is None else _wanted(kind.links)
            for name in kind.instances:
                layout = self.instances[name]
                found += [f"{name}: {text}" for text in layoutcheck.problems(layout, scales=scales, only=only)]
                found += [f"{name}: {text}" for text in layoutcheck.shared_bytes(layout)]
        return found

    def _sources(self) -> frozenset[int] | None:
        """The trainer tensors that are sent; None: all."""
        return None if self.names is None else frozenset(link.source for kind in self.kinds for link in kind.links.links)

    def _covered(self, cells: sources.Cells) -> None:
        """Every element of a wanted tensor has a holder."""
        volume = np.prod(self.catalog.shape_array, axis=1, dtype=np.int64)
        held = boxes.covered(len(self.catalog.names), cells.tensor, cells.start, cells.stop)
        problems = []
        for k in np.flatnonzero(self.links.wanted & (held != volume)).tolist():
            mine = np.flatnonzero(cells.tensor == k)
            gaps = boxes.holes(tuple(self.catalog.shape_array[k].tolist()), cells.start[mine], cells.stop[mine])
            ndim = len(self.catalog.shapes[k])
            where = ", ".join(layoutcheck.text(a[:ndim], b[:ndim]) for a, b in gaps)
            problems.append(f"{self.catalog.title(k)}: no trainer rank holds what {where or 'some of it'} is made of")
        if problems:
            raise PlanError("some bytes of the inference side have no source", problems=problems)

    # ---- steps ----

    def _reordered(self) -> None:
        """A tensor whose dimensions change places is made in staging memory, as one that is cast."""
        for link in self.links.links:
            order = [axis for axis in link.axes if axis >= 0]
            if order != sorted(order) and self.links.kind[link.target] == COPY:
                self.links.kind[link.target] = CAST

    def _targets(self) -> None:
        """All instances' pieces in one table, in the numbers of the catalog's tensors."""
        tensor, start, stop, receiver, instance = [], [], [], [], []
        hosts: list[str] = []
        base = 0
        for k, (name, layout) in enumerate(self.instances.items()):
            tensor.append(self.catalog.numbers(name).astype(np.int64)[layout.piece_tensor])
            start.append(catalog.padded("piece_start", layout.piece_start, self.ndim))
            stop.append(catalog.padded("piece_stop", layout.piece_stop, self.ndim))
            receiver.append(layout.piece_rank.astype(np.int64) + base)
            instance.append(np.full(len(layout.piece_rank), k))
            hosts += layout.hosts
            base += layout.ranks
        self.target_tensor, self.target_start, self.target_stop = map(np.concatenate, (tensor, start, stop))
        self.target_receiver, self.target_instance = np.concatenate(receiver), np.concatenate(instance)
        self.target_hosts = hosts
        self.blocks = block_table(self.catalog.shapes, self.links.block, self.ndim)

    def _cut(self, units: sources.Units, cells: sources.Cells) -> sources.Units:
        """Units small enough for staging memory, and to be spread evenly where several ranks could send
        them."""
        kind = self.links.kind[units.tensor]
        item = self.catalog.itemsizes[units.tensor].copy()
        source_item = np.zeros(len(self.catalog.names), np.int64)
        for link in self.links.links:
            source_item[link.target] = self.trainer.itemsizes[link.source]
        item[kind != COPY] += source_item[units.tensor[kind != COPY]]
        elements = np.prod(self.links.block[units.tensor], axis=1)
        item[kind == QUANTISE] += -(-4 // elements[kind == QUANTISE])  # scales, rounded up to whole bytes an element
        copies = np.zeros(len(self.catalog.names), np.int64)
        np.add.at(
            copies,
            self.target_tensor,
            boxes.volume(self.target_start, self.target_stop) * self.catalog.itemsizes[self.target_tensor],
        )
        grain = max(int(copies.sum()) // (self.trainer.ranks * GRAINS), 1 << 12)
        size = np.prod(self.catalog.shape_array, axis=1, dtype=np.int64) * self.catalog.itemsizes
        times = np.maximum(copies // np.maximum(size, 1), 1)[units.tensor]
        most = np.full(len(units.tensor), 1 << 62, np.int64)
        several = (units.cell >= 0) & (np.diff(cells.begin)[units.cell] > 1)
        even = np.maximum(np.maximum(grain // times, 1 << 12), self._whole_rows(units, item))
        most[several | (units.cell < 0)] = even[several | (units.cell < 0)]
        made = (kind != COPY) | self.staged
        most[made] = np.minimum(most[made], staging.largest(self.staging_bytes))
        return sources.cut_to(most, units, self.blocks[units.tensor], item)

    def _whole_rows(self, units: sources.Units, item: Ints) -> Ints:
        """Bytes of the smallest part of each unit that has whole rows: what is cut smaller would be many
        short writes."""
        ndims = np.array([len(shape) for shape in self.catalog.shapes], np.int64)[units.tensor]
        extent, rows = units.stop - units.start, self.blocks[units.tensor].copy()
        several = np.flatnonzero(ndims > 1)
        rows[several, ndims[several] - 1] = extent[several, ndims[several] - 1]
        return np.asarray(np.prod(np.minimum(rows, np.maximum(extent, 1)), axis=1) * item)

    def _moves(self, units: sources.Units) -> Moves:
        """Every unit to every target piece that it meets; and its scales to the pieces of its tensor of
        scales."""
        parts = []
        for unit, piece in boxes.overlaps_in_parts(
            units.tensor, units.start, units.stop, self.target_tensor, self.target_start, self.target_stop
        ):
            parts.append(self._measured(unit, piece, units.start[unit], units.stop[unit], 0, units.tensor[unit]))
        rows = np.flatnonzero(self.links.kind[units.tensor] == QUANTISE)
        per = self.blocks[units.tensor[rows]]
        start, stop = units.start[rows] // per, -(-units.stop[rows] // per)
        scale = self.links.scale[units.tensor[rows]]
        for k, piece in boxes.overlaps_in_parts(scale, start, stop, self.target_tensor, self.target_start, self.target_stop):
            parts.append(self._measured(rows[k], piece, start[k], stop[k], 1, scale[k]))
        return Moves.join(parts)

    def _measured(self, unit: Ints, piece: Ints, start: Ints, stop: Ints, scale: int, tensor: Ints) -> Moves:
        low, high = boxes.intersect(start, stop, self.target_start[piece], self.target_stop[piece])
        nbytes = boxes.volume(low, high) * self.catalog.itemsizes[tensor]
        return Moves(unit.astype(np.int32), piece.astype(np.int32), np.full(len(unit), scale, np.uint8), nbytes)

    def _kinds(self) -> Ints:
        """What is done with each tensor, as a plan has it."""
        kinds = np.where(self.links.wanted, self.links.kind, -1).astype(np.int32)
        made = np.flatnonzero(self.links.wanted & (self.links.scale >= 0) & (self.links.kind == QUANTISE))
        kinds[self.links.scale[made]] = SCALES
        return kinds

    def _phases(self) -> tuple[tuple[str, ...], Ints]:
        """The mesh groups in the order of the trainers, and the phase of each inference tensor."""
        group: dict[int, str] = {}
        for link in self.links.links:
            group.setdefault(link.target, self.trainer.groups[link.source] or self.catalog.groups[link.target])
        known = {text: k for k, text in enumerate(dict.fromkeys((*self.trainer.groups, *self.catalog.groups)))}
        order = sorted(set(group.values()), key=lambda text: known[text])
        phases = tuple(order) or ("",)
        index = {text: k for k, text in enumerate(phases)}
        phase = np.array([index[group.get(k, phases[0])] for k in range(len(self.catalog.names))], np.int32)
        return phases, phase


def _wanted(links: Links) -> frozenset[int]:
    """The tensors of a kind of instances that are part of the update, and the scales that come with them."""
    wanted = np.flatnonzero(links.wanted)
    return frozenset([*wanted.tolist(), *(s for s in links.scale[wanted].tolist() if s >= 0)])
