"""Updates of weights under random losses, kills, restarts and late joiners, on the simulator, checked byte for byte.

    python -m tests.reliability.weights_chaos --updates 10000        (`make test-chaos-weights`)
    python -m tests.reliability.weights_chaos --seed 1234            one run again, as it was
    python -m tests.reliability.weights_chaos --state FILE --seconds 500    a portion; the same again goes on

A run has one to three trainer ranks and two or three inference instances of one, two or four ranks, each with a second buffer or
in place, and publishes version after version; in half of the runs the instances pass parts on to one another. Every subscriber
rank has readers that hold versions for a while. Meanwhile connections are cut, engines are held as by SIGSTOP, ranks of either
side are killed and come back, instances join late, blocks raise, calls are cancelled, hosts close their
roles, and numbers are skipped by all trainers or by one.

What must hold:

- *mixed*: what a reader sees is one version, byte for byte, from the beginning of its block to the end, and it is the one that it
  was told; readers of one instance that run at one time all see the same. Versions of a rank rise.
- *named*: every update ends within its deadline, in success or in an error that the documentation names; a rank that is listed as
  having the version has it, or a later one, or is gone.
- *goes on*: when all faults are over, the next version reaches every rank.
- *leak*: in the end no lease, counter, region or task is left.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import aiotransfer as at
from aiotransfer import weights
from aiotransfer.testing.fabric import Fabric, fabric
from tests.reliability.reports import publish
from tests.weights.party import inference_layout, shard, trainer_layout, values

UPDATES = 12  # of a run
CONFIG = at.Config(peer_timeout=0.05, drain_timeout=0.01)
TIMEOUT = 0.5
BOUND = TIMEOUT + 1.5 + 6 * CONFIG.peer_timeout  # of one update, in virtual seconds
FAULTS = (
    "subscriber killed", "trainer killed", "held", "cut", "block raised", "cancelled", "subscriber closed", "publisher closed",
    "late instance", "old number", "skipped number", "control cut",
)  # fmt: skip
KINDS = ("instances with two buffers", "instances in place", "runs with checksums", "runs with several trainers")
OUTCOMES = ("whole", "in part", "abandoned", "refused", "cancelled here")
REPORT = Path(__file__).resolve().parents[2] / "docs" / "reliability" / "weights-chaos.md"


class Server:
    """A rank of an instance, with readers."""

    def __init__(self, run: Run, name: str, rank: int, engine: at.Engine) -> None:
        self.run, self.name, self.rank, self.engine = run, name, rank, engine
        layout = run.layouts[name]
        how = {"mode": run.modes[name], "timeout": 5.0}
        if run.modes[name] == "in_place":
            how |= {"pause": self.pause, "resume": lambda: None}
        self.subscriber = weights.Subscriber(engine, layout, instance=name, rank=rank, **how)
        self.alive = True
        self.last = weights.Version(0, -1)
        self.reader = asyncio.create_task(self.read())

    async def pause(self) -> None:
        await asyncio.sleep(self.run.rng.choice([0, 1e-4]))

    async def read(self) -> None:
        rng, run = self.run.rng, self.run
        while self.alive:
            try:
                async with self.subscriber.reading() as version:
                    mine = (self, version)
                    active = run.active.setdefault(self.name, [])
                    active.append(mine)
                    try:
                        seen = {other for server, other in active if server.alive}
                        assert len(seen) <= 1, f"mixed: readers of {self.name} see {sorted(seen)} at one time"
                        assert version >= self.last, f"{self} fell from {self.last} to {version}"
                        self.last = version
                        self.check(version)
                        await asyncio.sleep(rng.choice([0, 1e-5, 1e-3, 5e-3]))
                        if self.alive:
                            assert self.subscriber.version == version, f"{self} changed under a reader"
                            self.check(version)
                    finally:
                        active.remove(mine)
            except at.TransferTimeout:
                pass
            except at.ClosedError:
                return
            await asyncio.sleep(rng.choice([0, 1e-4, 1e-2]))

    def check(self, version: weights.Version) -> None:
        layout, tensors = self.subscriber.layout, self.subscriber.tensors
        for name, array in shard(layout, self.rank, values(version.number)).items():
            assert np.array_equal(tensors[name], array), f"mixed: {self} has no whole version {version} in {name}"

    async def stop(self, *, kill: bool) -> None:
        self.alive = False
        if kill:
            self.run.net.kill(self.engine)
            self.reader.cancel()
            await asyncio.wait([self.reader])
        else:
            with contextlib.suppress(at.QuarantineError):
                await self.subscriber.aclose()

    def __repr__(self) -> str:
        return f"{self.name}/{self.rank}"


class Trainer:
    """A trainer rank."""

    def __init__(self, run: Run, rank: int, engine: at.Engine, members: list[str]) -> None:
        self.run, self.rank, self.engine = run, rank, engine
        self.memory = shard(run.trainer, rank, values(0))
        bound = run.trainer.bind(rank, self.memory)
        group = engine.group(members)
        self.publisher = weights.Publisher(engine, bound, group=group, timeout=TIMEOUT, checksum=run.checksum, fanout=run.fanout)
        self.raises = False

    async def publish(self, number: int) -> Any:
        for name, array in shard(self.run.trainer, self.rank, values(number)).items():
            self.memory[name][...] = array
        async with self.publisher.publish(number) as update:
            await asyncio.sleep(self.run.rng.choice([0, 0, 1e-4]))
            if self.raises:
                raise ArithmeticError("the loss is no number")
        return update.version


class Run:
    """One scenario of some updates."""

    def __init__(self, net: Fabric, seed: int, struck: Counter[str]) -> None:
        self.net, self.rng, self.struck = net, random.Random(seed), struck
        rng = self.rng
        self.ranks = rng.choice([1, 2, 2, 3])
        self.trainer = trainer_layout(self.ranks)
        self.fanout = rng.choice(["direct", "relay"])
        names = "abc" if self.fanout == "relay" and rng.random() < 0.5 else "ab"
        self.sizes = {name: rng.choice([1, 2, 2, 4]) for name in names}
        self.layouts = {name: inference_layout(size) for name, size in self.sizes.items()}
        self.modes = {name: rng.choice(["double", "double", "in_place"]) for name in self.sizes}
        self.checksum = rng.random() < 0.2
        for mode in self.modes.values():
            struck[KINDS[mode == "in_place"]] += 1
        struck[KINDS[2]] += self.checksum
        struck[KINDS[3]] += self.ranks > 1
        self.trainers: list[Trainer] = []
        self.servers: dict[str, list[Server]] = {}
        self.active: dict[str, list[tuple[Server, weights.Version]]] = {}
        self.before = self.number = 0
        self.is_stale = False

    async def engine(self) -> at.Engine:
        return await self.net.open_engine(config=CONFIG, timeout=TIMEOUT)

    # ---- the two sides ----

    async def train(self) -> None:
        engines = [await self.engine() for _ in range(self.ranks)]
        members = [str(engine.address) for engine in engines]
        self.trainers = [Trainer(self, rank, engine, members) for rank, engine in enumerate(engines)]

    async def serve(self, name: str) -> None:
        self.servers[name] = [Server(self, name, rank, await self.engine()) for rank in range(self.sizes[name])]

    async def connect(self) -> None:
        for server in self.all():
            with contextlib.suppress(at.TransferError):
                await server.engine.connect(self.trainers[0].engine.address, timeout=0.1, reuse=True)

    def all(self) -> list[Server]:
        return [server for servers in self.servers.values() for server in servers if server.alive]

    # ---- updates and faults ----

    async def scenario(self) -> None:
        await self.train()
        await self.serve("a")
        if self.rng.random() < 0.7:
            await self.serve("b")
        if "c" in self.sizes:
            await self.serve("c")
        await self.connect()
        for _ in range(UPDATES - 1):
            await self.update(self.rng.random() < 0.75)
            await self.mend()
        await asyncio.sleep(1.0)
        await self.update(False)
        await self.mend()
        await asyncio.sleep(0.1)  # until whoever was dialled knows it
        await self.update(False, last=True)
        await self.finish()

    async def update(self, faulty: bool, *, last: bool = False) -> None:
        self.before, self.number = self.number, self.number + self.rng.choice([1, 1, 1, 4])
        number, began = self.number, self.net.now
        tasks = [asyncio.create_task(trainer.publish(number)) for trainer in self.trainers]
        fault = asyncio.create_task(self.strike(tasks)) if faulty else None
        _, late = await asyncio.wait(tasks, timeout=BOUND)
        assert not late, f"hang: version {number} has not ended after {self.net.now - began:g} virtual seconds"
        if fault is not None:
            await fault
        results = [task.exception() if not task.cancelled() else asyncio.CancelledError() for task in tasks]
        self.is_stale = any(isinstance(error, weights.VersionError) for error in results)
        for task, error in zip(tasks, results, strict=True):
            self.judge(task, error, number, last)

    def judge(self, task: Any, error: BaseException | None, number: int, last: bool) -> None:
        if error is None:
            self.struck["whole"] += 1
        elif isinstance(error, weights.VersionError):
            self.struck["refused"] += 1
        elif isinstance(error, weights.UpdateError):
            self.struck["in part" if error.committed else "abandoned"] += 1
            for name in error.committed:
                self.has(name, error.version)
        elif isinstance(error, ArithmeticError | asyncio.CancelledError | at.ClosedError):
            self.struck["cancelled here"] += 1
        elif isinstance(error, at.TransferError):
            self.struck["abandoned"] += 1
        else:
            raise error
        if error is None or last:
            assert not last or error is None, f"not mended: version {number} ended in {error!r}"
            for server in self.all():
                if last:
                    self.has(repr(server), task.result())

    def has(self, name: str, version: Any) -> None:
        instance, _, rank = name.partition("/")
        for server in self.servers.get(instance, []):
            if str(server.rank) == rank and server.alive:
                now = server.subscriber.version
                assert now is not None, f"{name} is said to have {version}, and has none"
                assert now >= version, f"{name} is said to have {version}, and has {now}"

    async def strike(self, tasks: list[asyncio.Task[Any]]) -> None:
        rng, net = self.rng, self.net
        fault = rng.choice(FAULTS)
        await asyncio.sleep(rng.choice([0, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3]) * rng.random() * 2)
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)
        server, trainer = rng.choice(self.all() or [None]), rng.choice(self.trainers)
        if fault in ("subscriber killed", "subscriber closed"):
            if server is None:
                return
            await server.stop(kill=fault == "subscriber killed")
        elif fault == "trainer killed":
            net.kill(trainer.engine)
            for other, task in zip(self.trainers, tasks, strict=True):
                if other is trainer:
                    task.cancel()
            self.trainers = [other for other in self.trainers if other is not trainer]
        elif fault == "publisher closed":
            await trainer.publisher.aclose()
            self.trainers = [other for other in self.trainers if other is not trainer]
        elif fault == "held":
            place = rng.choice([trainer.engine, *(one.engine for one in self.all())])
            with net.held(place):
                await asyncio.sleep(rng.choice([1e-3, 1e-2, 0.12]))
        elif fault == "cut":
            if server is None:
                return
            net.cut(trainer.engine, server.engine)
        elif fault == "block raised":
            trainer.raises = True
            await asyncio.wait(tasks)
            trainer.raises = False
        elif fault == "old number":
            await asyncio.wait(tasks)
            known = max((server.subscriber.claims.highest for server in self.all()), default=weights.Version(0, -1))
            results = await asyncio.gather(*(one.publish(self.before) for one in self.trainers), return_exceptions=True)
            for error in results:
                assert not isinstance(error, weights.Version) or error > known, f"version {error} was published after {known}"
                self.struck["refused"] += isinstance(error, weights.VersionError)
        elif fault == "skipped number":
            await asyncio.wait(tasks)
            await self.skip(trainer)
        elif fault == "control cut":
            if server is None:
                return
            net.cut_control(trainer.engine, server.engine)
        elif fault == "cancelled":
            rng.choice(tasks).cancel()
        elif fault == "late instance":
            if "b" in self.servers:
                return
            await self.serve("b")
            await self.connect()
        self.struck[fault] += 1

    async def skip(self, ahead: Trainer) -> None:
        """One rank publishes a number that the others do not: they are refused, it waits, and all meet at that number."""
        self.number += 2
        others = [one for one in self.trainers if one is not ahead]
        waiting = asyncio.create_task(ahead.publish(self.number))
        await asyncio.sleep(self.rng.choice([0, 1e-4]))
        behind = [asyncio.create_task(one.publish(self.number - 1)) for one in others]
        if behind:
            _, late = await asyncio.wait(behind, timeout=BOUND)
            assert not late, f"hang: version {self.number - 1}, which rank {ahead.rank} skipped"
        for task in behind:
            assert task.exception() is not None, f"version {self.number - 1} was published without rank {ahead.rank}"
        meeting = [waiting, *(asyncio.create_task(one.publish(self.number)) for one in others)]
        _, late = await asyncio.wait(meeting, timeout=BOUND)
        assert not late, f"hang: version {self.number}, after one that rank {ahead.rank} skipped"
        for task in meeting:
            self.judge(task, task.exception(), self.number, last=False)

    async def mend(self) -> None:
        """Whatever is gone comes back; instances that lost a rank are started anew, rank by rank."""
        if len(self.trainers) < self.ranks or self.is_stale:  # the latter: a subscriber that was away knows a higher epoch
            for trainer in self.trainers:
                await trainer.publisher.aclose()
            await self.train()
        for name, servers in self.servers.items():
            for rank, server in enumerate(servers):
                if not server.alive:
                    servers[rank] = Server(self, name, rank, await self.engine())
        await self.connect()

    # ---- the end ----

    async def finish(self) -> None:
        await asyncio.sleep(0.5)
        for server in self.all():
            assert not server.subscriber._sessions, f"leak: {server} has {server.subscriber._sessions}"
            server.alive = False
            await server.subscriber.aclose()
            if server.reader.done():
                server.reader.result()
            await server.reader
        for trainer in self.trainers:
            await trainer.publisher.aclose()
        await asyncio.sleep(0.2)
        for place in (*(one.engine for servers in self.servers.values() for one in servers), *(t.engine for t in self.trainers)):
            assert not place._counters, f"leak: counters {place._counters}"
            assert not place._regions, f"leak: regions {place._regions}"
            assert not [lease for peer in place.peers for lease in peer._leases], "leak: leases"


def run(seed: int, struck: Counter[str] | None = None) -> int:
    """One run of some updates; returns the trace. Raises AssertionError with the seed."""
    struck = Counter() if struck is None else struck
    rng = random.Random(seed)
    net = fabric(seed, delay=(0, rng.choice([1e-6, 1e-5, 1e-4])), refuse=rng.choice([0, 0.2]), split=rng.choice([0, 0.3]))

    async def scenario(net: Fabric) -> int:
        failures: list[BaseException] = []

        def heard(loop: Any, context: Any) -> None:
            error = context.get("exception")
            if isinstance(error, AssertionError):
                failures.append(error)

        net.loop.set_exception_handler(heard)
        one = Run(net, seed, struck)
        await one.scenario()
        if failures:
            raise failures[0]
        return net.counts()["trace"]

    try:
        return net.run(scenario)
    except BaseException as error:
        error.add_note(f"python -m tests.reliability.weights_chaos --seed {seed}")
        raise


@dataclass
class Tally:
    """What the runs so far came to: from seed `first`, `done` of them, in `seconds`."""

    first: int
    done: int = 0
    seconds: float = 0.0
    struck: Counter[str] = field(default_factory=Counter)

    def go_on(self, updates: int, seconds: float = math.inf) -> bool:
        """Run until there are so many updates, for about so many seconds. Whether all were run. Raises at the first run that
        fails, and in the end when a fault or an outcome never came."""
        begin, many = time.monotonic(), -(-updates // UPDATES)
        before = self.seconds
        while self.done < many and time.monotonic() - begin < seconds:
            run(self.first + self.done, self.struck)
            self.done += 1
            self.seconds = before + time.monotonic() - begin
        if self.done < many:
            return False
        never = [name for name in (*FAULTS, *OUTCOMES, *KINDS) if not self.struck[name]] if updates >= 2000 else []
        assert not never, f"seeds from {self.first}: these never came: {never}"
        return True


def report(first: int, updates: int, struck: Counter[str], seconds: float) -> str:
    """A page of the documentation."""
    rows = "\n".join(f"| {name} | {struck[name]:,} |" for name in (*OUTCOMES, *FAULTS, *KINDS))
    return f"""# Weights chaos report

Written by `make test-chaos-weights` (`python -m tests.reliability.weights_chaos --updates {updates} --first {first} --report`).

{updates:,} updates from trainers to inference instances on the simulator under random losses, kills, restarts and late joiners,
seeds from {first} on: 0 mixed versions seen by readers, 0 updates past their bound of {BOUND:g} virtual seconds, 0 leaked leases,
counters and regions; {seconds:,.0f} s on {os.cpu_count()} cores. A single run again: `python -m tests.reliability.weights_chaos
--seed N`.

How updates ended on each trainer rank, how often each fault struck, and of what kind the runs were (no row may be 0):

| what | times |
|---|--:|
{rows}
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--updates", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=random.randrange(1 << 28))
    parser.add_argument("--seed", type=int)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--state", type=Path, help="a file for what the runs so far came to: the next call goes on")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so many, with --state")
    options = parser.parse_args()
    if options.seed is not None:
        print(run(options.seed))
        return
    tally = Tally(options.first)
    if options.state is not None and options.state.exists():
        known = json.loads(options.state.read_text())
        tally = Tally(**known | {"struck": Counter(known["struck"])})
    is_whole = tally.go_on(options.updates, options.seconds)
    if options.state is not None:
        options.state.write_text(json.dumps({name: getattr(tally, name) for name in ("first", "done", "seconds", "struck")}))
    if is_whole:
        publish(REPORT, report(tally.first, options.updates, tally.struck, tally.seconds), write=options.report)
    else:
        print(f"{tally.done * UPDATES:,} of {options.updates:,} updates, in {tally.seconds:,.0f} s; call it again to go on")


if __name__ == "__main__":
    main()
