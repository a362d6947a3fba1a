"""Guards of the weights' planner."""

from __future__ import annotations

from tests.guards.mutant import Mutant

REFUSALS = "tests/weights/test_refusals.py"
CODEC = "tests/weights/planning/test_codec.py"
DERIVE = "tests/weights/layouts/test_derive.py"
SCALE = "tests/weights/scale"
BIND = "tests/weights/layouts/test_bind.py"
BALANCE, PLANNER = "tests/weights/planning/test_balance.py", "tests/weights/planning/test_planner.py"
GUARDS = (
    Mutant(
        "weights: elements that no rank holds", "aiotransfer/weights/layouts/layoutcheck.py",
        "    for tensor in np.flatnonzero(held != wanted)[:200].tolist():\n",
        "    for tensor in np.flatnonzero(held < 0)[:200].tolist():\n", REFUSALS,
    ),
    Mutant(
        "weights: pieces that overlap", "aiotransfer/weights/layouts/layoutcheck.py",
        "        found += _overlaps(layout, scales, only)\n", "", REFUSALS,
    ),
    Mutant(
        "weights: pieces that share bytes", "aiotransfer/weights/planning/planner.py",
        "layoutcheck.shared_bytes(layout)]", "[]]", REFUSALS,
    ),
    Mutant(
        "weights: a type without a rule", "aiotransfer/weights/planning/links.py",
        "            if not any(t.match(n) is not None for t in self.casts for n in names):\n", "            if False:\n",
        REFUSALS,
    ),
    Mutant(
        "weights: names that are not taken", "aiotransfer/weights/planning/links.py",
        "            if k not in self.used and k not in tied", "            if False and k not in tied", REFUSALS,
    ),
    Mutant(
        "weights: one memory of two sources", "aiotransfer/weights/planning/links.py",
        "        if len(made) > 1:\n", "        if False:\n", REFUSALS,
    ),
    Mutant(
        "weights: a part larger than staging memory", "aiotransfer/weights/planning/staging.py",
        "    if most > half:\n", "    if False:\n", REFUSALS,
    ),
    Mutant(
        "weights: staging memory has two halves", "aiotransfer/weights/planning/staging.py",
        "before - before[part_start] + part % 2 * half", "before - before[part_start]", PLANNER,
    ),
    Mutant(
        "weights: the same host first", "aiotransfer/weights/planning/senders.py",
        "[rank for rank in ranks if ours[rank] == where]", "[]", "tests/weights/planning/test_random_plans.py",
    ),
    Mutant(
        "weights: only what came whole is passed on", "aiotransfer/weights/planning/relay.py",
        "np.flatnonzero(np.all((start[ours] <= low) & (stop[ours] >= high), axis=1))", "np.arange(len(row))", BALANCE,
    ),
    Mutant(
        "weights: what dealing left is evened out", "aiotransfer/weights/planning/senders.py",
        "    if load.max(initial=0) > ENOUGH * bound:\n", "    if False:\n", BALANCE,
    ),
    Mutant(
        "weights: the checksum of a layout or plan", "aiotransfer/weights/layouts/pack.py",
        "    if check.digest() != wanted:\n", "    if False:\n", CODEC,
    ),
    Mutant(
        "weights: bytes are bounded before they are unpacked", "aiotransfer/weights/layouts/pack.py",
        "head_bytes > MOST_HEADER or head_bytes + length > most_bytes or ", "", CODEC,
    ),
    Mutant(
        "weights: a plan's indices", "aiotransfer/weights/planning/codec.py",
        "        _between(name, getattr(plan, name), 0, limit - 1)\n", "        pass\n", CODEC,
    ),
    Mutant(
        "weights: a plan's tensors are those of each instance", "aiotransfer/weights/planning/catalog.py",
        "(found.shape_array[of] != theirs).any() or (found.itemsizes[of] != sizes).any()", "False", CODEC,
    ),
    Mutant(
        "weights: tensors that are made otherwise are not one", "aiotransfer/weights/planning/catalog.py",
        "how, tuple(made.get(k, ()))", "how, ()", "tests/weights/test_types_of_instances.py",
    ),
    Mutant(
        "weights: scales belong to the tensor of their instance", "aiotransfer/weights/planning/catalog.py",
        "np.where(mine < 0, -1, numbers[mine]).astype(np.int64) if name in", "mine if name in",
        "tests/weights/test_types_of_instances.py",
    ),
    Mutant(
        "weights: who passes a unit on is one that takes it", "aiotransfer/weights/planning/relay.py",
        "takes[begin[at] + moves.unit % many[at]] % instances", "moves.unit % instances",
        "tests/weights/test_types_of_instances.py",
    ),
    Mutant(
        "weights: a plan's units", "aiotransfer/weights/planning/codec.py",
        "    if not ((plan.unit_start >= 0) & ", "    if not (", CODEC,
    ),
    Mutant(
        "weights: numbers of a layout", "aiotransfer/weights/layouts/layoutcheck.py",
        "        if values.size and (values.min() < 0 or values.max() > 1 << 59):\n", "        if False:\n", CODEC,
    ),
    Mutant(
        "weights: memory that moved", "aiotransfer/weights/layouts/bind.py",
        " or _place_or_none(thing) != self.places[name]]", "]", BIND,
    ),
    Mutant(
        "weights: tensors that a module has no more", "aiotransfer/weights/layouts/bind.py",
        "if name in replaced or ", "if ", BIND,
    ),
    Mutant(
        "weights: memory of another form than the layout says", "aiotransfer/weights/layouts/bind.py",
        "elif why := _misfit(layout, pieces.get(name, []), given):", 'elif why := "":', BIND,
    ),
    Mutant(
        "weights: a view is not all of its storage", "aiotransfer/weights/layouts/bind.py",
        "if given.span < wanted[name]:", "if self.places[name].reach < wanted[name]:", BIND,
    ),
    Mutant(
        "weights: memory that would be written twice", "aiotransfer/weights/subscriber/memory.py",
        "(shared := bound.shared())", "(shared := [])", BIND,
    ),
    Mutant(
        "weights: a piece that lies on itself", "aiotransfer/weights/layouts/layoutcheck.py",
        "    doubtful[np.isin(order, _folded(layout, some))] = True\n", "", BIND,
    ),
    Mutant(
        "weights: what is unpacked is bounded by what came", "aiotransfer/weights/layouts/pack.py",
        "    if length > FREE + packed * MOST_TIMES:\n", "    if False:\n", CODEC,
    ),
    Mutant(
        "weights: a pipeline stage is no replica", "aiotransfer/weights/layouts/derive.py",
        "[k for k in others if every[k] not in stages]", "others", DERIVE,
    ),
    Mutant(
        "weights: tensor parallel cuts before FSDP", "aiotransfer/weights/layouts/derive.py",
        "        if k in strided and plain and factor ==", "        if False and factor ==", DERIVE,
    ),
    Mutant(
        "weights: whole rows where a unit is only cut to be spread", "aiotransfer/weights/planning/planner.py",
        "np.maximum(np.maximum(grain // times, 1 << 12), self._whole_rows(units, item))", "np.maximum(grain // times, 1 << 12)",
        f"{SCALE}/test_predict.py",
    ),
    Mutant(
        "weights: a mesh that is not all trainers", "aiotransfer/weights/scale/placements.py",
        "        if self.fsdp * self.pp * self.ep != self.trainers:\n", "        if False:\n", f"{SCALE}/test_layouts.py",
    ),
    Mutant(
        "weights: experts that do not divide", "aiotransfer/weights/scale/placements.py",
        "            if model.experts % ranks:\n", "            if False:\n", f"{SCALE}/test_layouts.py",
    ),
    Mutant(
        "weights: a placement that cannot be is not planned", "aiotransfer/cli/weights.py",
        "    if problems := where.problems(model):\n", "    if problems := []:\n", "tests/cli/test_weights.py",
    ),
)  # fmt: skip
