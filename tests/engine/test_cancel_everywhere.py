"""Cancellation at every turn of the loop, not at a sample of them.

An operation is run once on the simulator to count its turns, then once for each turn with the same seed and a cancellation there.
However it ends, the memory it read is poisoned at once; the poison must never be seen by anybody, nothing stays behind, no count
is lost or doubled, and the engines go on working.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field

import anyio
import numpy as np
import pytest

import aiotransfer as at
from aiotransfer.testing.fabric import Fabric, fabric

N = 1 << 16
PAGE = 1 << 12
IMM = 7
POISON = 0xA5
CONFIG = at.Config(drain_timeout=0.01, peer_timeout=0.5)


@dataclass
class Scene:
    """One writer, two targets; `mine` is read by what is cancelled, `theirs` are written."""

    net: Fabric
    left: at.Engine
    rights: list[at.Engine]
    peers: list[at.Peer]
    source: at.Region
    targets: list[at.Region]
    remotes: list[at.RemoteRegion]
    landed: int = 0  # bytes that are known to have landed
    notes: list[str] = field(default_factory=list)

    @property
    def counted(self) -> int:
        return sum(right.counter(imm=IMM).total for right in self.rights)


async def set_up(net: Fabric) -> Scene:
    left = await net.open_engine(config=CONFIG)
    rights = [await net.open_engine(config=CONFIG) for _ in range(2)]
    peers = [await left.connect(right.address) for right in rights]
    source = left.allocate(N)
    source.numpy()[:] = 1
    targets = [right.allocate(N) for right in rights]
    for right, target in zip(rights, targets, strict=True):
        right.publish("target", target, access="both")
    remotes = [await peer.lookup("target") for peer in peers]
    return Scene(net, left, rights, peers, source, targets, remotes)


async def write(scene: Scene) -> None:
    await scene.left.write(scene.source, scene.remotes[0], imm=IMM)


async def pages(scene: Scene) -> None:
    order = np.random.default_rng(scene.net.seed).permutation(N // PAGE)
    await scene.left.write_pages(scene.source, order, scene.remotes[0], order[::-1], page_bytes=PAGE, imm=IMM)


async def scatter(scene: Scene) -> None:
    half = N // 2
    targets = [at.ScatterTarget(i * half, half, scene.remotes[i % 2][i * 64 : i * 64 + half]) for i in range(2)]
    await scene.left.scatter(scene.source, targets, imm=IMM)


async def scattered_pages(scene: Scene) -> None:
    rows = np.arange(N // PAGE // 2)
    targets = [at.PagesTarget(remote, rows + i * len(rows), rows[::-1]) for i, remote in enumerate(scene.remotes)]
    await scene.left.scatter_pages(scene.source, targets, page_bytes=PAGE, imm=IMM)


async def prepared(scene: Scene) -> None:
    plan = scene.left.prepare_write(scene.source, scene.remotes[0])
    await at.wait_all([plan.post(imm=IMM) for _ in range(3)])


async def signal(scene: Scene) -> None:
    await scene.left.signal(scene.peers[0], IMM)


async def several(scene: Scene) -> None:
    async with asyncio.TaskGroup() as group:
        for work in (pages, write, scatter):
            group.create_task(work(scene))


OPERATIONS = {work.__name__: work for work in (write, pages, scatter, scattered_pages, prepared, signal, several)}
PAGES = N // PAGE
UNITS = {"write": 1, "pages": PAGES, "scatter": 2, "scattered_pages": PAGES, "prepared": 3, "signal": 1, "several": PAGES + 3}

# Ways to cancel: each awaits `work` and says by `ready(stop)` how it is stopped.


async def plainly(scene: Scene, work: Awaitable[None], ready: Callable[[Callable[[], object]], None]) -> None:
    task = asyncio.ensure_future(work)
    ready(task.cancel)
    await task


async def every_turn(scene: Scene, work: Awaitable[None], ready: Callable[[Callable[[], object]], None]) -> None:
    task = asyncio.ensure_future(work)

    def stop() -> None:
        if not task.done():
            task.cancel()
            scene.net.at_turn(0, stop)

    ready(stop)
    await task


async def in_timeout(scene: Scene, work: Awaitable[None], ready: Callable[[Callable[[], object]], None]) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(None) as scope:
            ready(lambda: task.done() or scope.reschedule(scene.net.now))
            task = asyncio.ensure_future(work)
            await task


async def in_group(scene: Scene, work: Awaitable[None], ready: Callable[[Callable[[], object]], None]) -> None:
    broken = asyncio.Event()

    async def sibling() -> None:
        await broken.wait()
        raise RuntimeError("the sibling fails")

    async def wrapped() -> None:
        await work
        failing.cancel()

    with suppress(ExceptionGroup):
        async with asyncio.TaskGroup() as group:
            failing = group.create_task(sibling())
            group.create_task(wrapped())
            ready(broken.set)


async def in_anyio(scene: Scene, work: Awaitable[None], ready: Callable[[Callable[[], object]], None]) -> None:
    with anyio.CancelScope() as scope:
        ready(scope.cancel)
        await work


async def in_close(scene: Scene, work: Awaitable[None], ready: Callable[[Callable[[], object]], None]) -> None:
    closing: list[asyncio.Task[None]] = []
    ready(lambda: closing.append(asyncio.ensure_future(scene.left.aclose())))
    results: list[BaseException | None] = []
    try:
        await work
    except (at.ClosedError, ExceptionGroup):
        pass
    except at.ScatterError as error:
        results = error.results
    assert all(result is None or isinstance(result, at.ClosedError) for result in results)
    await asyncio.gather(*closing)


WAYS = {way.__name__: way for way in (plainly, every_turn, in_timeout, in_group, in_anyio, in_close)}


async def scenario(net: Fabric, name: str, way: str, turn: int | None, held: bool) -> int:
    """Run it, stopping it at `turn`. How many turns it took."""
    scene = await set_up(net)
    begin = net.turns
    if held:
        net.hold(scene.rights[0], True)

    async def work() -> None:
        try:
            await OPERATIONS[name](scene)
        finally:
            scene.source.numpy()[:] = POISON

    def ready(stop: Callable[[], object]) -> None:
        if turn is not None:
            net.at_turn(turn, stop)

    finished = True
    try:
        await WAYS[way](scene, work(), ready)
    except asyncio.CancelledError:
        finished = False
    except (at.PeerLostError, at.ScatterError):
        assert held
        finished = False
    turns = net.turns - begin
    statistics = scene.left.statistics()
    if held:
        net.hold(scene.rights[0], False)
    await asyncio.sleep(1)
    for target in scene.targets:
        assert not (target.numpy() == POISON).any(), "the poison was seen"
    counted = scene.counted
    assert counted <= UNITS[name]
    if finished and turn is None:
        assert counted == UNITS[name]
    assert (statistics.pending_operations if way != "in_close" else 0) == 0
    if way != "in_close" and scene.peers[0].state == "up":  # everything still works, and counts go on where they were
        scene.source.numpy()[:] = 2
        await scene.left.write(scene.source, scene.remotes[0], imm=IMM)
        assert (scene.targets[0].numpy() == 2).all()
        assert scene.counted == counted + 1
    return turns


def run(name: str, way: str, turn: int | None, *, held: bool = False, seed: int = 11, counts: Counter[str] | None = None) -> int:
    async def counted(net: Fabric) -> int:
        turns = await scenario(net, name, way, turn, held)
        if counts is not None:
            counts.update(net.counts())
        return turns

    net = fabric(seed=seed, delay=(1e-6, 1e-4), refuse=0.1, split=0.3)
    try:
        return net.run(counted)
    except BaseException as error:
        error.add_note(f"operation {name}, way {way}, turn {turn}, held {held}, seed {seed}")
        raise


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_cancelled_at_every_turn(name: str, way: str) -> None:
    turns = run(name, way, None)
    assert turns > 0
    for turn in range(turns + 1):
        run(name, way, turn)


@pytest.mark.parametrize("way", ["plainly", "every_turn", "in_timeout", "in_anyio"])
@pytest.mark.parametrize("name", ["write", "pages", "scatter"])
def test_a_target_that_does_not_move_cannot_keep_the_source(name: str, way: str) -> None:
    """What is posted cannot retire: past `drain_timeout` the connection is fenced, in a bounded number of turns."""
    counts: Counter[str] = Counter()
    for turn in range(12):
        turns = run(name, way, turn, held=True, counts=counts)
        assert way == "every_turn" or turns < 200, "cancelling burns turns"
    assert counts["fenced"] > 0
