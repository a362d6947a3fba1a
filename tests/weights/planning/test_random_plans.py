"""Plans for random meshes, placements and rules, carried out byte by byte beside a naive reference."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aiotransfer.weights import (
    Cast,
    Fuse,
    Layout,
    Piece,
    Plan,
    Quantise,
    Rename,
    Rule,
    Split,
    Stack,
    Tensor,
    Transpose,
    make_plan,
)  # fmt: skip
from aiotransfer.weights.layouts.layout import dense
from tests.weights.replay import TYPES, check, convert, replay

BLOCK = (3, 4)


def cuts(draw: st.DrawFn, size: int) -> list[tuple[int, int]]:
    edges = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=3))})
    return list(itertools.pairwise(edges))


def pieces(draw: st.DrawFn, tensor: Tensor, ranks: int) -> list[Piece]:
    """A grid over the tensor, each box on one to three ranks, in memory with gaps and any order of dimensions."""
    boxes: list[list[tuple[int, int]]] = [[]]
    for size in tensor.shape:
        spans = cuts(draw, size)
        boxes = [[*box, span] for box in boxes for span in spans]
    found = []
    item = np.dtype(TYPES[tensor.dtype]).itemsize
    for number, box in enumerate(boxes):
        for rank in draw(st.lists(st.integers(0, ranks - 1), min_size=1, max_size=min(3, ranks), unique=True)):
            extent = tuple(b - a for a, b in box)
            order = draw(st.permutations(range(len(extent))))
            spread = dense([extent[d] for d in order], item * draw(st.sampled_from([1, 2])))
            strides = tuple(spread[order.index(d)] for d in range(len(extent)))
            offset = item * draw(st.integers(0, 2))
            found.append(Piece(tensor.name, rank, tuple(a for a, _ in box), extent, f"{tensor.name}/{number}", offset, strides))
    return found


def values_of(tensors: list[Tensor]) -> dict[str, Any]:
    random = np.random.default_rng(3)
    return {
        t.name: (random.standard_normal(t.shape) * 8).astype(TYPES[t.dtype]) if t.dtype.startswith("float")
        else random.integers(0, 255, t.shape).astype(TYPES[t.dtype]) for t in tensors
    }  # fmt: skip


KINDS = ("same", "rename", "fuse", "heads", "split", "stack", "turn", "none")


def made_of(kind: str, v: dict[str, Any], a: int, b: int) -> dict[str, Any]:
    """What the rules of `models` make of values, in plain NumPy."""
    if kind in ("same", "none"):
        return v
    if kind == "rename":
        return {"new.w": v["old"]}
    if kind == "turn":
        return {"turn.w": v["turn.w"].T}
    if kind == "fuse":
        return {"fused.w": np.concatenate([v["fuse.q"], v["fuse.k"]])}
    if kind == "split":
        return {"one.w": v["split"][:, :a], "two.w": v["split"][:, a:]}
    if kind == "stack":
        return {"stack.w": np.stack([np.concatenate([v[f"e.{k}.g"], v[f"e.{k}.u"]]) for k in range(3)])}
    heads = [(v["h.q"][r * a : r * a + a], v["h.k"][r // 2 * b : r // 2 * b + b]) for r in range(4)]
    return {"heads.w": np.concatenate([part for pair in heads for part in pair])}


Made = dict[str, tuple[Any, str]]


@st.composite
def models(draw: st.DrawFn) -> tuple[list[Tensor], list[Rule], Made]:
    """(trainer tensors, rules that say what is made of them, {name: (values, type of the trainers)} of what is made)."""
    source: list[Tensor] = []
    rules: list[Rule] = []
    made: Made = {}
    size = st.integers(1, 9)
    rows, columns = draw(size), draw(size)
    for kind in draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4, unique=True)):
        group = draw(st.sampled_from(["", "experts"]))
        a, b = draw(size), draw(size)
        dtype = draw(st.sampled_from(["float32", "float16", "uint8"]))
        new: list[Tensor]
        if kind == "fuse":
            new = [Tensor("fuse.q", (a, columns), dtype, group), Tensor("fuse.k", (b, columns), dtype, group)]
            rules.append(Fuse(("fuse.q", "fuse.k"), "fused.w"))
        elif kind == "heads":
            new = [Tensor("h.q", (4 * a, columns), dtype, group), Tensor("h.k", (2 * b, columns), dtype, group)]
            rules.append(Fuse(("h.q", "h.k"), "heads.w", ranks=4, units=(4, 2)))
        elif kind == "split":
            new = [Tensor("split", (columns, a + b), dtype, group)]
            rules.append(Split("split", ("one.w", "two.w"), dim=1))
        elif kind == "stack":
            new = [Tensor(f"e.{k}.{n}", (r, columns), dtype, group) for k in range(3) for n, r in (("g", a), ("u", b))]
            rules.append(Stack(("e.{x}.g", "e.{x}.u"), "stack.w", index="x"))
        elif kind == "none":
            new = [Tensor("none.w", (0, columns), dtype, group)]
        else:
            new = [Tensor({"rename": "old", "turn": "turn.w", "same": "same.w"}[kind], (rows, columns), dtype, group)]
            rules += [Rename("old", "new.w")] if kind == "rename" else [Transpose("turn.w")] if kind == "turn" else []
        source += new
        made |= {name: (value, dtype) for name, value in made_of(kind, values_of(new), a, b).items()}
    return source, rules, made


def form(draw: st.DrawFn, made: Made) -> tuple[list[Tensor], list[Rule], dict[str, Any]]:
    """(tensors of an instance, rules for their types, what it must have)."""
    target: list[Tensor] = []
    rules: list[Rule] = []
    wanted: dict[str, Any] = {}
    for name, (value, dtype) in made.items():
        how = draw(st.sampled_from(["copy", "cast", "quantise"])) if dtype == "float32" else "copy"
        if how == "cast":
            rules.append(Cast(name))
            target.append(Tensor(name, value.shape, "float16"))
            wanted[name] = value.astype(np.float16)
        elif how == "quantise":
            rules.append(Quantise(name, name + "_scale", BLOCK))
            codes, scales = convert(value, 2, "float8_e4m3fn", BLOCK)
            target += [Tensor(name, value.shape, "float8_e4m3fn"), Tensor(name + "_scale", scales.shape, "float32")]
            wanted |= {name: codes, name + "_scale": scales}
        else:
            target.append(Tensor(name, value.shape, dtype))
            wanted[name] = value
    return target, rules, wanted


def values_of_all(source: list[Tensor]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    groups: dict[str, list[Tensor]] = {}
    for tensor in source:
        groups.setdefault(tensor.name.split(".")[0], []).append(tensor)
    for tensors in groups.values():
        values |= values_of(tensors)
    return values


@st.composite
def cases(draw: st.DrawFn) -> Any:
    source, common, made = draw(models())
    hosts = st.sampled_from(["", "a", "b"])
    ranks = draw(st.integers(1, 4))
    trainer = Layout(
        source, [piece for t in source for piece in pieces(draw, t, ranks)], ranks=ranks,
        hosts=[draw(hosts) for _ in range(ranks)], nics=[draw(st.sampled_from(["", "n0", "n1"])) for _ in range(ranks)],
    )  # fmt: skip
    instances: dict[str, Layout] = {}
    rules: dict[str, list[Rule]] = {}
    wanted: dict[str, dict[str, Any]] = {}
    alike = draw(st.booleans())
    target, own, values = form(draw, made)
    for name in ("left", "right", "third")[: draw(st.integers(1, 3))]:
        if not alike:
            target, own, values = form(draw, made)
        ranks = draw(st.integers(1, 3))
        held = [piece for t in target for piece in pieces(draw, t, ranks)]
        instances[name] = Layout(target, held, ranks=ranks, hosts=[draw(hosts) for _ in range(ranks)])
        rules[name], wanted[name] = [*common, *own], values
        if draw(st.booleans()):
            for other in ("left", "right"):
                instances[other], rules[other], wanted[other] = instances[name], rules[name], wanted[name]
    fanout, staging = draw(st.sampled_from(["direct", "relay"])), draw(st.sampled_from([4096, 1 << 20]))
    given_rules = rules["left"] if alike else rules
    return trainer, instances, given_rules, values_of_all(source), wanted, fanout, staging, draw(st.booleans())


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases())
def test_every_byte_is_written_once_and_is_what_the_reference_says(case: Any) -> None:
    trainer, instances, rules, values, wanted, fanout, staging, staged = case
    plan = make_plan(trainer, instances, rules, fanout=fanout, staging_bytes=staging, staged=staged)
    for sender in range(trainer.ranks if staged else 0):
        assert (plan.tasks(sender).writes.source_buffer < 0).all()
    for name, (memory, counts) in replay(plan, values).items():
        check(plan.instances[name], memory, counts, wanted[name])
    balance = plan.balance()
    assert balance.received.sum() == balance.sent.sum() + balance.relayed.sum()
    assert balance.received.sum() == sum(int(layout.piece_bytes.sum()) for layout in instances.values())
    assert balance.sender >= 0.999
    again = Plan.decode(plan.encode())
    assert again == plan
    assert again.explain() == plan.explain()
    assert plan.explain(svg=True).endswith("</svg>")


@pytest.mark.parametrize("fanout", ["direct", "relay"])
def test_the_same_host_comes_first(fanout: str) -> None:
    tensors = [Tensor("w", (64, 8), "float32")]
    trainer = Layout(tensors, [Piece("w", rank) for rank in range(3)], ranks=3, hosts=["a", "b", "c"])
    instance = Layout(tensors, [Piece("w", rank) for rank in range(2)], ranks=2, hosts=["b", "c"])
    plan = make_plan(trainer, instance, fanout=fanout)
    assert plan.balance().sent.tolist() == [0, 2048, 2048]
    assert plan.balance().nic_sent.tolist() == [0, 0, 0]
