"""Programs that forget their engines: dropped at a random moment of random work, while the program goes on or ends.

    python -m tests.reliability.forgotten living|ending PROVIDER asyncio|uvloop SEED POINTS

Each point opens a pair of engines, begins some kinds of work, and leaves in some way. Whether something was touched that had been
given back is seen by arrays in its place, by the exit status, and by descriptors and threads that are left. `ending` makes each
point a process of its own (forked off one that has imported everything), which ends as a program does.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import os
import random
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

import numpy as np
import uvloop

import aiotransfer as at
from aiotransfer import weights
from aiotransfer.testing.leaks import snapshot

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
TIMEOUT = 20 * float(os.environ.get("TESTS_SLOWNESS", "1"))
SIZE = 4 << 20
PATTERN = 0x5A
Keep = list[Any]


class Scene(NamedTuple):
    """A pair, and all that the program still refers to."""

    left: at.Engine
    right: at.Engine
    peer: at.Peer
    source: at.Region
    target: at.Region
    keep: Keep

    def task(self, work: Coroutine[Any, Any, object]) -> None:
        """Begin it; nobody looks at how it ends."""
        task = asyncio.ensure_future(work)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        self.keep.append(task)


def writes(s: Scene) -> None:
    s.keep.extend([s.left.write(s.source, s.target.descriptor) for _ in range(4)])


def writes_nobody_keeps(s: Scene) -> None:
    for _ in range(4):
        s.left.write(s.source, s.target.descriptor, imm=5)


def pages(s: Scene) -> None:
    every = list(range(SIZE >> 12))
    s.keep.append(s.left.write_pages(s.source, every, s.target.descriptor, every[::-1], page_bytes=1 << 12, imm=6))


def reads(s: Scene) -> None:
    lease = s.target.lease(next(iter(s.right.peers)), access="both") if s.right.peers else None
    if lease is not None:
        s.keep.append(s.left.read(lease.descriptor, s.source))


def scatter(s: Scene) -> None:
    targets = [at.ScatterTarget(i * 65536, 65536, s.target.descriptor[i * 65536 : (i + 1) * 65536]) for i in range(32)]
    s.keep.append(s.left.scatter(s.source, targets))


def prepared(s: Scene) -> None:
    plan = s.left.prepare_write(s.source, s.target.descriptor)
    s.keep.extend([plan, plan.post(imm=7), plan.post(imm=7)])


def waits(s: Scene) -> None:
    counter = s.right.counter(8)
    s.task(counter.wait(1000))
    for _ in range(10):
        s.left.signal(s.peer, 8)


def watched(s: Scene) -> None:
    word = np.zeros(1, np.uint64)

    async def look() -> None:
        async for _ in s.left.watch(word):
            pass

    s.task(look())
    word[0] = 1


def from_a_thread(s: Scene) -> None:
    handle = s.left.from_thread()
    source, target = s.source, s.target.descriptor

    def work() -> None:
        try:
            for _ in range(3):
                handle.write(source, target).wait(0.5)
        except (at.TransferError, RuntimeError, concurrent.futures.CancelledError):
            pass

    threading.Thread(target=work, daemon=True).start()


def messages(s: Scene) -> None:
    async def read() -> None:
        async for _ in s.right.messages():
            pass

    s.task(read())
    s.task(s.peer.send(b"x" * 1000))


def dials(s: Scene) -> None:
    s.task(s.left.connect("127.0.0.1:1", timeout=5))


def opens(s: Scene) -> None:
    async def another() -> None:
        engine = await at.open_engine(providers=s.peer.path.provider)
        await engine.connect(s.right.address)

    s.task(another())


def closes(s: Scene) -> None:
    s.task(s.right.aclose())


def ends_a_region(s: Scene) -> None:
    s.target.close()


def weights_come(s: Scene) -> None:
    layout = weights.Layout([weights.Tensor("w", (SIZE // 4,), "float32")], [weights.Piece("w", 0)], ranks=1)
    memory = {"w": np.full(SIZE // 4, 1.0, np.float32)}
    publisher = weights.Publisher(s.left, layout.bind(0, memory), timeout=5, staging_bytes=1 << 20)
    subscriber = weights.Subscriber(s.right, layout, instance="a", mode="double")

    async def publish() -> None:
        for number in range(100):
            async with publisher.publish(number):
                await asyncio.sleep(0)

    async def read() -> None:
        async for _ in subscriber:
            async with subscriber.reading():
                await asyncio.sleep(0)

    s.task(publish())
    s.task(read())


WORK: tuple[Callable[[Scene], None], ...] = (
    writes, writes_nobody_keeps, pages, reads, scatter, prepared, waits, watched, from_a_thread, messages, dials, opens, closes,
    ends_a_region, weights_come,
)  # fmt: skip


async def begin(provider: str, dice: random.Random) -> Scene:
    """Engines with work under way, after a random moment of it."""
    progress = dice.choice(("auto", "auto", "thread", "loop"))
    left = await at.open_engine(providers=provider, progress=progress)
    right = await at.open_engine(providers=provider)
    peer = await left.connect(right.address)
    source, target = (
        engine.register(np.full(SIZE, PATTERN, np.uint8)) if dice.random() < 0.5 else engine.allocate(SIZE)
        for engine in (left, right)
    )
    scene = Scene(left, right, peer, source, target, [])
    if dice.random() < 0.7:
        await left.write(source[:64], target.descriptor[:64])
    for work in dice.sample(WORK, dice.randint(1, 4)):
        try:
            work(scene)
        except at.TransferError:  # the engine or the region was closed by an earlier one
            pass
        if dice.random() < 0.2:
            gc.collect()
    if dice.random() < 0.5:
        for _ in range(dice.randrange(20)):
            await asyncio.sleep(0)
    else:
        await asyncio.sleep(dice.random() * 0.004)
    return scene


def fails(loop: str, provider: str, dice: random.Random) -> object:
    """An exception leaves asyncio.run."""

    async def main() -> None:
        scene = await begin(provider, dice)
        raise RuntimeError(f"a bug of the application: {len(scene)}")

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        try:
            runner.run(main())
        except RuntimeError:
            pass
    return None


def returns(loop: str, provider: str, dice: random.Random) -> object:
    """The program has its engines still when its loop has been closed."""
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        return runner.run(begin(provider, dice))


def stops(loop: str, provider: str, dice: random.Random) -> object:
    """The loop stops with tasks in it, and is closed."""
    own = LOOPS[loop]()
    scene = own.run_until_complete(begin(provider, dice))
    own.close()
    return scene if dice.random() < 0.5 else None


def loses_the_loop(loop: str, provider: str, dice: random.Random) -> object:
    """The loop is not even closed."""
    own = LOOPS[loop]()
    scene = own.run_until_complete(begin(provider, dice))
    if loop == "uvloop":
        HELD.append(scene)  # its loops are never collected, nor what they refer to
    return own, scene


def closes_too_late(loop: str, provider: str, dice: random.Random) -> object:
    """On another loop than the engine's."""
    scene = returns(loop, provider, dice)
    assert isinstance(scene, Scene)

    async def close() -> None:
        await scene.left.aclose()
        await scene.right.aclose()

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(close())
    return scene.keep


def survives(loop: str, provider: str, dice: random.Random) -> object:
    """One engine lives on, on a loop of its own, and writes into memory of the one that was dropped."""
    survivor = at.run_in_thread(providers=provider)

    async def main() -> tuple[at.Engine, bytes]:
        doomed = await at.open_engine(providers=provider)
        target = doomed.register(np.full(SIZE, PATTERN, np.uint8))
        return doomed, target.descriptor.encode()

    async def write(there: at.RemoteRegion) -> None:
        source = survivor.engine.allocate(SIZE)
        try:
            await survivor.engine.connect(there.owner, timeout=2)
            while True:
                await survivor.engine.write(source, there, timeout=2)
        except at.TransferError:
            pass

    own = LOOPS[loop]()
    doomed, descriptor = own.run_until_complete(main())
    writing = asyncio.run_coroutine_threadsafe(write(at.RemoteRegion.decode(descriptor)), survivor._loop)
    own.run_until_complete(asyncio.sleep(0.01 + dice.random() * 0.01))
    own.close()
    del doomed
    canaries = collected()
    time.sleep(0.005)
    check(canaries)
    writing.result(TIMEOUT)
    survivor.close()
    return None


def collected() -> list[Any]:
    """What is given back is others' now."""
    gc.collect()
    return [np.full(SIZE, PATTERN ^ 0xFF, np.uint8) for _ in range(4)]


def check(canaries: list[Any]) -> None:
    for canary in canaries:
        assert (canary == PATTERN ^ 0xFF).all(), "memory of others was written into"


LEAVE: tuple[Callable[[str, str, random.Random], object], ...] = (
    fails, returns, stops, loses_the_loop, closes_too_late, survives,
)  # fmt: skip


def one(loop: str, provider: str, dice: random.Random) -> object:
    """One point; what the program still refers to."""
    if dice.random() < 0.3:
        gc.set_threshold(dice.choice((1, 10, 100)))  # the collector comes at any moment
    try:
        return dice.choice(LEAVE)(loop, provider, dice)
    finally:
        gc.set_threshold(700)


def living(loop: str, provider: str, seed: int, points: int) -> None:
    uvloop.new_event_loop().close()  # the first opens a pipe for good
    one(loop, provider, random.Random(seed))  # libraries have opened what they keep
    gc.collect()
    before = snapshot()
    for point in range(points):
        dice = random.Random(seed + point)
        try:
            held = one(loop, provider, dice)
            canaries = collected()
            del held
            canaries += collected()
            time.sleep(dice.random() * 0.003)
            check(canaries)
        except BaseException:
            print(f"point {seed + point} of {provider} on {loop}", file=sys.stderr)
            raise
    until = time.monotonic() + TIMEOUT
    while (left := _counted(before)) and time.monotonic() < until:
        gc.collect()
        time.sleep(0.01)
    assert not left, left


def _counted(before: Any) -> list[str]:
    now = snapshot()
    left = now.since(before) if len(now.fds) > len(before.fds) else []
    return [] if HELD else left + [f"{now.threads - before.threads} threads"] * (now.threads > before.threads)


def ending(loop: str, provider: str, seed: int, points: int) -> None:
    """Returns in the children, which end by returning from the program."""
    for point in range(points):
        child = os.fork()
        if child == 0:
            dice = random.Random(seed + point)
            ends_in_a_thread = dice.random() < 0.2
            if ends_in_a_thread:
                global _thread
                _thread = at.run_in_thread(providers=provider)
                asyncio.run_coroutine_threadsafe(begin(provider, dice), _thread._loop)
                time.sleep(dice.random() * 0.05)
            else:
                HELD.append(one(loop, provider, dice))
            return
        until = time.monotonic() + TIMEOUT
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > until:
                os.kill(child, 9)
            time.sleep(0.001)
        assert ended[1] == 0, f"point {seed + point} of {provider} on {loop}: status {ended[1]}"


def unraisable(problem: Any) -> None:
    """No finaliser fails, but for coroutines that want their loop when they are taken apart."""
    words = str(problem.exc_value)
    if "Event loop is closed" not in words and "the handler is closed" not in words:
        traceback.print_exception(problem.exc_value)
        os._exit(77)


HELD: list[object] = []  # until the interpreter takes its modules apart
_thread: at.EngineThread | None = None

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    what, provider, loop, seed, points = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
    sys.unraisablehook = unraisable
    {"living": living, "ending": ending}[what](loop, provider, seed, points)
