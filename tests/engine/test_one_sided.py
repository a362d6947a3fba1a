"""One-sided for real: a blocked event loop on either side delays no byte and no count. Progress modes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer.testing import Pair, engine_pair, payload
from tests.engine.processes import NBYTES, other_process
from tests.engine.stuck import Stuck
from tests.needs import needs_tcp


@pytest.fixture
def stuck(tmp_path: Path) -> Iterator[Stuck]:
    one = Stuck(tmp_path / "fifo")
    yield one
    one.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("memory", ["allocated", "foreign"])
@pytest.mark.parametrize("progress", ["auto", "thread", "loop"])
async def test_bytes_and_counts_land_in_a_blocked_process(memory: str, progress: str, stuck: Stuck, tmp_path: Path) -> None:
    async with at.open_engine(progress=progress) as engine, other_process(engine) as (_, peer):
        remote = await peer.lookup(memory)
        source = engine.allocate(NBYTES)
        source.numpy()[:] = payload(NBYTES)
        await engine.write(source[:8], remote[:8])
        await peer.send(f"stuck {tmp_path}/fifo".encode())
        messages = engine.messages()
        assert (await anext(messages)).data == b"stuck"
        await asyncio.sleep(0.1)
        await engine.write(source[: NBYTES // 2], remote[: NBYTES // 2], imm=1)
        pages = np.arange(NBYTES // 2 // 4096, NBYTES // 4096)
        await engine.write_pages(source, pages, remote, pages, page_bytes=4096, imm=1)
        await engine.write(source[:4096], remote[:4096], imm=1)
        with open(f"/proc/{peer.pid}/mem", "rb") as theirs:  # what its memory holds while nobody there runs
            theirs.seek(remote.base + NBYTES - 4096)
            assert theirs.read(4096) == payload(NBYTES)[-4096:].tobytes()
        stuck.end()
        counted = int((await anext(messages)).data)
        assert counted == 2 + len(pages)
        await messages.aclose()  # type: ignore[attr-defined]


@pytest.mark.asyncio
@pytest.mark.parametrize("progress", ["auto", "thread"])
@pytest.mark.parametrize("provider", ["shm", pytest.param("tcp", marks=needs_tcp())])
async def test_a_blocked_writer_finishes_what_it_has_submitted(
    provider: str, progress: str, stuck: Stuck, tmp_path: Path
) -> None:
    async with at.open_engine(providers=provider, progress=progress) as engine, other_process(engine) as (_, peer):
        remote = await peer.lookup("allocated")
        source = engine.allocate(NBYTES)
        source.numpy()[:] = payload(NBYTES)
        await engine.write(source[:8], remote[:8])
        messages = engine.messages()
        await peer.send(f"end 1 {tmp_path}/fifo".encode())
        assert (await anext(messages)).data == b"waiting"
        await engine.write(source[:8], remote[:8])  # this task was woken just now: the loop has not been back to look for more
        transfer = engine.write(source, remote, imm=1)  # may be over by the next line where this thread lost its turn
        assert stuck.wait(), "it was not counted while this loop was stuck"
        assert (await anext(messages)).data == b"ended"
        await transfer
        await messages.aclose()  # type: ignore[attr-defined]


@pytest.mark.asyncio
@pytest.mark.parametrize("progress", ["auto", "thread", "loop"])
async def test_every_mode_moves_every_byte(progress: str) -> None:
    async with engine_pair(progress=progress) as pair:
        nbytes = (24 << 20) + 5
        target = pair.right.allocate(nbytes)
        pair.right.publish("target", target)
        remote = await pair.right_peer.lookup("target")
        source = pair.left.allocate(nbytes)
        source.numpy()[:] = payload(nbytes)
        sizes = [1, 4096, 100_000, 900_000, 5 << 20]
        transfers, at_byte = [], 0
        while at_byte < nbytes:
            n = min(sizes[len(transfers) % len(sizes)], nbytes - at_byte)
            place = slice(at_byte, at_byte + n)
            transfers.append(pair.left.write(source[place], remote[place], imm=1))
            at_byte += n
        await at.wait_all(transfers)
        assert (target.numpy() == payload(nbytes)).all()
        await pair.right.counter(imm=1).wait(len(transfers), timeout=5)


@pytest.mark.asyncio
async def test_in_loop_mode_the_loop_turns_during_a_large_copy() -> None:
    async with engine_pair(progress="loop") as pair:
        nbytes = 256 << 20
        target, source = pair.right.allocate(nbytes), pair.left.allocate(nbytes)
        pair.right.publish("target", target)
        remote = await pair.right_peer.lookup("target")
        transfer = pair.left.write(source, remote)
        turns = 0
        while transfer._state != 0:
            turns += 1
            await asyncio.sleep(0)
        assert turns > 5
        assert pair.left.statistics().native_chunks > 0


@pytest.mark.asyncio
async def test_a_cancel_in_loop_mode_gives_the_source_back() -> None:
    async with engine_pair(progress="loop") as pair:
        nbytes = 64 << 20
        target, source = pair.right.allocate(nbytes), pair.left.allocate(nbytes)
        pair.right.publish("target", target)
        remote = await pair.right_peer.lookup("target")
        transfer = pair.left.write(source, remote)
        await asyncio.sleep(0)
        transfer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await transfer
        source.numpy()[:] = 1
        await asyncio.sleep(0.01)
        assert not target.numpy().any()


@pytest.mark.asyncio
async def test_finished_awaits_do_not_starve_the_loop(pair: Pair) -> None:
    target, source = pair.right.allocate(4096), pair.left.allocate(4096)
    pair.right.publish("target", target)
    remote = await pair.right_peer.lookup("target")
    plan = pair.left.prepare_write(source, remote)
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0)
            ticks += 1

    ticker = asyncio.ensure_future(tick())
    start = time.monotonic()
    while time.monotonic() - start < 0.2:
        await plan.post()
    assert ticks > 10
    ticker.cancel()
    await asyncio.wait([ticker])
