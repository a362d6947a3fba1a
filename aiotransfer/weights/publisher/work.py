"""Plans of a publisher, for the subscribers of one update; made once for each set of instances and kept."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from aiotransfer.weights.layouts.errors import PlanError
from aiotransfer.weights.layouts.layout import Layout
from aiotransfer.weights.memory.aside import aside
from aiotransfer.weights.planning.passing import Coming, comings, route, step_of
from aiotransfer.weights.planning.plan import Plan
from aiotransfer.weights.planning.planner import make_plan
from aiotransfer.weights.planning.rules import Cast, Quantise, Rules
from aiotransfer.weights.planning.tasks import Call, Tasks, Writes, expected, instead, tasks
from aiotransfer.weights.protocol import wire
from aiotransfer.weights.roles.posting import Posting

if TYPE_CHECKING:
    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.memory.region import Region
    from aiotransfer.weights.publisher.context import Context
    from aiotransfer.weights.publisher.layouts import Layouts

MOST_WORKS = 8
LENT = 3  # quarters of the staging memory that are left for a plan where the last one is lent
ON_GPU = 8  # what part of the staging memory is left for memory of a GPU, on which weights are cast and quantised
LEAST_ON_GPU = 16 << 20  # bytes of staging memory: of less, nothing is left for a GPU
BURST_SECONDS = 0.1  # at the rate that a publisher may have: what is written at once


class Work:
    """What one publisher rank does for a set of instances. `misfits`: {instance: problems} of those that no
    plan brings anything. `burst`: bytes that are written at once."""

    def __init__(self, engine: Engine, plan: Plan, rank: int, misfits: dict[str, tuple[str, ...]], burst: float) -> None:
        self.plan = plan
        self.misfits = misfits
        self.tasks: Tasks = tasks(plan, rank)
        self.relays = plan.fanout == "relay"  # instances pass parts on to one another
        self.instead: Writes | None = instead(plan, rank) if self.relays else None
        self._postings = [Posting(engine, writes, burst) for writes in (self.tasks.writes, self.instead) if writes is not None]
        self.instead_calls: dict[tuple[int, int], list[Call]] = {}  # by receiver and relay
        for call in () if self.instead is None else self.instead.calls():
            self.instead_calls.setdefault((call.receiver, call.feeder), []).append(call)
        self.steps = self._steps() if self.relays else {}
        self._offered: Offered | None = None
        self.digest = hashlib.blake2b(repr((plan.digest, sorted(misfits))).encode(), digest_size=16).digest()
        self.staging_bytes = self._staging()

    def names(self, instance: str) -> list[str]:
        """The tensors of an instance that are part of the update; empty: all."""
        wanted = self.plan.tensor_kind[self.plan.catalog.numbers(instance)] >= 0
        return [] if wanted.all() else [self.plan.instances[instance].names[k] for k in np.flatnonzero(wanted)]

    def posting(self, writes: Writes) -> Posting:
        """What posts these: `tasks.writes`, or `instead`."""
        return next(posting for posting in self._postings if posting.writes is writes)

    def drop_prepared(self) -> None:
        """Memory that is written from is given back."""
        for posting in self._postings:
            posting.drop()

    def _staging(self) -> int:
        """Bytes of staging memory that this rank uses: up to the last byte that lies there."""
        tasks, plan = self.tasks, self.plan
        elements = np.prod(tasks.stop - tasks.start, axis=1)
        to_item = plan.itemsizes[tasks.tensor]
        from_item = np.zeros(len(tasks.job), np.int64)
        from_item[tasks.input_job] = plan.trainer.itemsizes[plan.trainer.piece_tensor[plan.input_piece[self._inputs()]]]
        low, high = plan.scale_box(tasks.tensor, tasks.start, tasks.stop)
        ends = [
            np.where(offset >= 0, offset + size, 0)
            for offset, size in (
                (tasks.in_offset, elements * from_item), (tasks.out_offset, elements * to_item),
                (tasks.scale_offset, 4 * np.prod(high - low, axis=1)),
            )
        ]  # fmt: skip
        return max((int(end.max(initial=0)) for end in ends), default=0)

    def _inputs(self) -> Any:
        job = self.tasks.job
        begin = self.plan.input_begin
        return np.arange(begin[job[0]], begin[job[-1] + 1]) if len(job) else np.zeros(0, np.int64)

    def _steps(self) -> dict[int, dict[tuple[int, int], int]]:
        """{receiver: {(phase, part): step}} of what this rank writes."""
        calls: dict[int, list[tuple[int, int]]] = {}
        for call in self.tasks.writes.calls():
            calls.setdefault(call.receiver, []).append((call.phase, call.part))
        ranks = self.plan.trainer.ranks
        return {to: {key: step_of(k, len(some), ranks) for k, key in enumerate(some)} for to, some in calls.items()}

    def imm_of(self, receiver: int, phase: int, part: int) -> int:
        """Which of the immediates of a grant belongs to a call."""
        return self.steps[receiver][phase, part] if self.relays else phase

    def imms(self, receiver: int) -> int:
        """How many immediates a grant has."""
        return max(self.steps[receiver].values()) + 1 if self.relays else len(self.plan.phases)

    def offered(self) -> Offered:
        """What offers say of relays. Computed once; takes long for large plans."""
        if self._offered is None:
            self._offered = Offered(self.plan)
        return self._offered

    def expected(self, instance: str, rank: int) -> dict[int, list[int]]:
        """{publisher rank: writes of each phase} that a subscriber rank counts."""
        found = expected(self.plan, instance, rank)
        counts: dict[int, list[int]] = {}
        for sender in np.unique(found.sender).tolist():
            mine = found.sender == sender
            counts[sender] = np.bincount(found.phase[mine], found.writes[mine], len(self.plan.phases)).astype(np.int64).tolist()
        return counts


class Offered:
    """Of a plan with relays, by the numbers of receivers: what is `coming` to each, the `routes` (digest and
    bytes; of those that pass something on), whom each passes on to (`onward`), and how many bytes
    (`relayed`)."""

    def __init__(self, plan: Plan) -> None:
        self.coming: list[Coming] = comings(plan)
        self.routes: dict[int, tuple[bytes, int]] = {}
        for number in range(plan.receivers):
            if data := self.route(plan, number):
                self.routes[number] = hashlib.blake2b(data, digest_size=16).digest(), len(data)
        self.relayed = plan.balance().relayed
        self.onward: dict[int, list[int]] = {}
        for number, what in enumerate(self.coming):
            for via in what.relayed:
                self.onward.setdefault(via, []).append(number)

    def route(self, plan: Plan, number: int) -> bytes:
        """The route of a receiver; empty where it passes nothing on."""
        return route(plan, *plan.who(number), self.coming[number].step)


class Works:
    """The works of one publisher, kept for each set of subscribers, and the staging memory that they
    share."""

    def __init__(
        self, context: Context, layouts: Layouts, rules: Rules, staging_bytes: int, names: tuple[str, ...] | None, fanout: str
    ) -> None:
        self._context, self._layouts = context, layouts
        self._rules, self._names, self._fanout = rules, names, fanout
        self.staging_bytes = staging_bytes
        self._known: dict[tuple[tuple[str, bytes], ...], Work] = {}
        self._staging: Region | None = None

    @property
    def digest(self) -> bytes:
        """What all publisher ranks must have alike."""
        context = self._context
        where = context.sources.staged, context.sources.apart, bool(context.sources.devices.ordinals)
        parts = context.layout.digest, where, self._rules, self.staging_bytes, self._names, self._fanout
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()

    async def make(self, instances: dict[str, list[wire.Entry]]) -> Work:
        """For these subscribers. Raises `PlanError` when none of them fits. The same on every publisher
        rank."""
        key = tuple((name, entries[0].digest) for name, entries in instances.items())
        work = self._known.get(key)
        if work is None:
            layouts = {name: await self._layouts.of(entries) for name, entries in instances.items()}
            work = await aside(self._context.engine, self._plan, layouts)
            self._known[key] = work
            while len(self._known) > MOST_WORKS:
                del self._known[next(iter(self._known))]
        return work

    async def route(self, digest: bytes) -> bytes | None:
        """The route with this digest, of a plan that is known here."""
        for work in self._known.values():
            for number, (known, _) in work.offered().routes.items() if work.relays else ():
                if known == digest:
                    return await aside(self._context.engine, work.offered().route, work.plan, number)
        return None

    @property
    def staging_held(self) -> int:
        """Bytes of staging memory that this rank holds; kept between versions."""
        return 0 if self._staging is None else self._staging.nbytes

    def staging(self, work: Work) -> Region:
        """The staging memory that a plan needs, at most `staging_bytes`."""
        devices = self._context.sources.devices
        if self._staging is None or self._staging.nbytes < work.staging_bytes:
            if self._staging is not None:
                self._drop_prepared()
                devices.unpin(self._staging)
                self._staging.close()
            self._staging = self._context.engine.allocate(work.staging_bytes)
            devices.pin(self._staging)
        return self._staging

    def close(self) -> None:
        """Give back the staging memory, and what was prepared for writes."""
        self._drop_prepared()
        self._context.sources.devices.unpin()
        if self._staging is not None:
            self._staging.close()

    def _drop_prepared(self) -> None:
        """Memory that is written from is given back."""
        for work in self._known.values():
            work.drop_prepared()

    def _plan(self, layouts: dict[str, Layout]) -> Work:
        misfits: dict[str, tuple[str, ...]] = {}
        while True:
            fitting = {name: layout for name, layout in layouts.items() if name not in misfits}
            try:
                burst = self._context.rate_limit * BURST_SECONDS
                return Work(self._context.engine, self._make(fitting), self._context.rank, misfits, burst)
            except PlanError:
                bad = self._alone(fitting) if len(layouts) > 1 else {}
                if not bad or len(bad) == len(fitting):
                    raise
                misfits |= bad

    def _make(self, layouts: dict[str, Layout]) -> Plan:
        how: Any = {"staging_bytes": self._planned_bytes(), "fanout": self._fanout, "names": self._names}
        how["staged"], how["apart"] = self._context.sources.staged, self._context.sources.apart
        return make_plan(self._context.layout, layouts, self._rules, **how)

    def _planned_bytes(self) -> int:
        """Of the staging memory what a plan may use: where ranks lend one another copies (of blocks that a
        shard's edge cuts, on a GPU), a part of it is left for these, and so it is for `on_gpu_bytes`."""
        context = self._context
        lends = context.sources.staged and context.sources.devices.ordinals and context.ranks > 1
        lent = self.staging_bytes * LENT // 4 if lends and self._has(Quantise) else self.staging_bytes
        return max(lent - self.on_gpu_bytes, 1)

    @property
    def on_gpu_bytes(self) -> int:
        """Memory of a GPU that a rank may take while it casts and quantises there: a part of `staging_bytes`.
        Whether it can use it makes no difference, so that all ranks have the same plan."""
        idle = self.staging_bytes < LEAST_ON_GPU or not self._context.sources.devices.ordinals or not self._has(Cast, Quantise)
        return 0 if idle else self.staging_bytes // ON_GPU

    def _has(self, *kinds: type) -> bool:
        return any(isinstance(rule, kinds) for some in self._rules.values() for rule in some)

    def _alone(self, layouts: dict[str, Layout]) -> dict[str, tuple[str, ...]]:
        """Which instances do not fit by themselves."""
        bad = {}
        for name, layout in layouts.items():
            try:
                self._make({name: layout})
            except PlanError as error:
                bad[name] = error.problems or (error.message,)
        return bad
