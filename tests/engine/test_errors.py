"""Errors say what was being done, to whom, by which path, with the lane's own code, and what to do next."""

from __future__ import annotations

import asyncio
import gc
import pickle
import re
import traceback
import weakref
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import pytest

import aiotransfer as at
from aiotransfer.engine.operations.refusals import refusal
from aiotransfer.errors import again
from aiotransfer.providers import native
from aiotransfer.testing import Pair, engine_pair

pytestmark = pytest.mark.asyncio
SIZE = 16 << 20
STATUSES = [name for name in dir(native.lib) if name.startswith("AT_E") and not name.startswith("AT_EV")]
NEVER_SEEN = {"AT_EVENTS", "AT_ETHREAD", "AT_EAGAIN", "AT_ECANCELED"}  # no status; a RuntimeError; not for users; a cancellation


@pytest.mark.parametrize("name", sorted(set(STATUSES) - NEVER_SEEN))
async def test_every_status_of_the_lane_is_an_error_with_a_peer_a_path_a_code_and_a_hint(name: str, pair: Pair) -> None:
    status = getattr(native.lib, name)
    error = refusal(pair.left, status, pair.right_peer)
    assert isinstance(error, at.TransferError)
    assert error.hint
    assert error.code is not None
    assert error.code[1]
    assert (error.peer, error.provider, error.rail) == (str(pair.right.address), "shm", 0)
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.peer, copy.code, copy.hint, str(copy)) == (error.peer, error.code, error.hint, str(error))


class Memory:
    """In a frame."""


class Scene:
    def __init__(self, pair: Pair) -> None:
        self.pair, self.engine, self.peer = pair, pair.left, pair.right_peer
        self.source, self.target = pair.left.allocate(SIZE), pair.right.allocate(SIZE)
        self.lease = self.target.lease(pair.left_peer, access="both")
        self.remote = self.lease.descriptor


PAGES = list(range(SIZE >> 12))
OPERATIONS: dict[str, tuple[Callable[[Scene], Awaitable[None]], str]] = {
    "write": (
        lambda s: s.engine.write(s.source, s.remote, imm=7, timeout=0.0),
        "while writing 16,777,216 bytes to .* with immediate 7; [0-9,]+ bytes had landed",
    ),
    "pages": (
        lambda s: s.engine.write_pages(s.source, PAGES, s.remote, PAGES, page_bytes=1 << 12, timeout=0.0),
        "while writing 16,777,216 bytes in pages to",
    ),
    "read": (lambda s: s.engine.read(s.remote, s.source, timeout=0.0), "while reading 16,777,216 bytes from"),
    "prepared": (lambda s: s.engine.prepare_write(s.source, s.remote).post(timeout=0.0), "while writing 16,777,216 bytes to"),
    "scatter": (
        lambda s: s.engine.scatter(s.source, [at.ScatterTarget(0, SIZE, s.remote)], imm=3, timeout=0.0),
        "while scattering 16,777,216 bytes to .* with immediate 3",
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
async def test_a_late_operation_is_named(name: str) -> None:
    async with engine_pair(progress="loop") as pair:
        scene = Scene(pair)
        await pair.left.write(scene.source[:1], scene.remote[:1])
        work, words = OPERATIONS[name]
        with pytest.raises((at.TransferTimeout, at.ScatterError)) as caught:
            await work(scene)
        text = "".join(traceback.format_exception(caught.value))
        assert len(caught.value.__notes__) == 1
        assert str(scene.peer.address) in caught.value.__notes__[0]
        assert re.search(words, text), text
        if isinstance(caught.value, at.ScatterError):
            assert caught.value.results[0] is not None
            assert caught.value.results[0].__notes__ == ["target 0 of the scatter"]


async def test_awaited_twice_it_is_named_once(pair: Pair) -> None:
    async with engine_pair(progress="loop") as slow:
        scene = Scene(slow)
        await slow.left.write(scene.source[:1], scene.remote[:1])
        transfer = slow.left.write(scene.source, scene.remote, timeout=0.0)
        notes = []
        for _ in range(3):
            with pytest.raises(at.TransferTimeout) as caught:
                await transfer
            caught.value.add_note("of this awaiter")
            notes.append(caught.value.__notes__)
        assert [len(n) for n in notes] == [2, 2, 2]


async def test_a_refusal_at_the_call_is_named_as_well(pair: Pair) -> None:
    scene = Scene(pair)
    await pair.left.write(scene.source[:1], scene.remote[:1])
    await scene.lease.revoke()
    with pytest.raises(at.StaleRegionError) as caught:
        pair.left.write(scene.source, scene.remote, imm=5)
    assert "writing 16,777,216 bytes" in caught.value.__notes__[0]
    assert "immediate 5" in caught.value.__notes__[0]


async def test_waits_are_named(pair: Pair) -> None:
    waits = {
        "7 arrivals of immediate 4": pair.left.counter(imm=4).wait(7, peers=[pair.right_peer]),
        "never": pair.right_peer.lookup("never"),
        "barrier": pair.left.group([pair.left.address, pair.right.address]).barrier(),
    }
    tasks = [asyncio.ensure_future(wait) for wait in waits.values()]
    await asyncio.sleep(0.02)
    await pair.right.aclose()
    for words, task in zip(waits, tasks, strict=True):
        with pytest.raises(at.PeerLostError) as caught:
            await asyncio.wait_for(task, 5)
        assert any(words in note for note in caught.value.__notes__), caught.value.__notes__


async def test_a_broken_group_keeps_nothing_of_who_waited(pair: Pair) -> None:
    """Its error is kept for later calls, but not the frames that it went through, nor those of its causes."""
    members = [pair.left.address, pair.right.address]
    groups = [engine.group(members) for engine in (pair.left, pair.right)]

    async def wait(group: at.PeerGroup) -> weakref.ref[Memory]:
        memory = Memory()
        with pytest.raises(at.TransferError):
            while True:
                await group.barrier()
        return weakref.ref(memory)

    tasks = [asyncio.ensure_future(wait(group)) for group in groups]
    await asyncio.sleep(0.02)
    await pair.right.aclose()
    kept = [await task for task in tasks]
    gc.collect()
    assert [reference() for reference in kept] == [None, None]
    assert groups[0]._failure is not None


async def test_causes_are_kept_without_their_frames() -> None:
    def stored() -> tuple[at.TransferError, weakref.ref[object]]:
        memory = Memory()  # in the frame that the cause was raised in
        try:
            try:
                raise ConnectionResetError(104, "reset")
            except OSError as cause:
                raise at.BrokenError("it broke") from cause
        except at.BrokenError as error:
            return again(error), weakref.ref(memory)

    error, memory = stored()
    gc.collect()
    assert memory() is None
    assert isinstance(error.__cause__, ConnectionResetError)
    assert error.__cause__.errno == 104


async def test_a_copy_of_an_error_has_notes_of_its_own() -> None:
    error = at.BusyError("full", peer="1.2.3.4:5", hint="wait")
    error.add_note("first")
    copy = again(error)
    copy.add_note("second")
    assert (error.__notes__, copy.__notes__) == (["first"], ["first", "second"])
    assert (copy.peer, copy.hint) == (error.peer, error.hint)


async def test_the_error_of_a_group_names_the_rank_and_the_address_of_who_has_left() -> None:
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(at.open_engine(name=f"e{i}")) for i in range(3)]
        members = [str(engine.address) for engine in engines]
        groups = [engine.group(members) for engine in engines]
        async with asyncio.timeout(30):
            await asyncio.gather(*(group.barrier(timeout=30) for group in groups))
            await engines[1].aclose()
            stay = (groups[0], groups[2])
            first = await asyncio.gather(*(group.barrier(timeout=30) for group in stay), return_exceptions=True)
            again = await asyncio.gather(*(group.barrier(timeout=30) for group in stay), return_exceptions=True)
        for error in first + again:
            assert isinstance(error, at.BrokenError)
            assert f"member 1 ({members[1]})" in error.message
            assert f"'e1' at {members[1]}" in error.message or f"has lost member 1 ({members[1]})" in error.message
            assert error.peer == members[1]
            assert "target" not in error.message
        assert all(error.message.count("member 1") == 1 for error in first)
