"""Mistakes of a first day: a forgotten await, another library's loop, an engine in a pickle, one's own address for another's."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest

import aiotransfer as at
from aiotransfer.testing import Pair

AWAIT = r"open_engine\(\) was not awaited.*async with open_engine"


@pytest.mark.parametrize(
    "use",
    [
        lambda opening: opening.register(bytearray(8)),
        lambda opening: opening.address,
        lambda opening: opening.connect("127.0.0.1:1"),
        lambda opening: opening.no_such_name,
    ],
)
def test_a_forgotten_await_says_so(use: Callable[[Any], object]) -> None:
    opening = at.open_engine()
    with pytest.raises(AttributeError, match=AWAIT):
        use(opening)


def test_a_plain_with_says_what_to_write() -> None:
    opening = at.open_engine()
    with pytest.raises(TypeError, match="async with"):
        with opening:  # type: ignore[unused-ignore]
            pass
    opening._awaited = True


def test_an_engine_that_was_never_awaited_warns_and_python_asks_it_what_it_asks_everything() -> None:
    opening = at.open_engine()
    assert not hasattr(opening, "__len__")
    assert "not awaited" in repr(opening)
    kept = [opening]
    del opening
    with pytest.warns(RuntimeWarning, match="never awaited"):
        kept.clear()


@pytest.mark.asyncio
async def test_one_that_was_awaited_or_entered_does_not_warn() -> None:
    opening = at.open_engine()
    async with opening as engine:
        assert engine.address
    awaited = at.open_engine()
    await (await awaited).aclose()
    del opening, awaited
    gc.collect()


@pytest.mark.parametrize("trio", [True, False])
def test_without_a_loop_of_asyncio_the_error_says_that_it_is_needed(trio: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if trio:
        monkeypatch.setitem(sys.modules, "trio", types.ModuleType("trio"))
    for start in (lambda: at.open_engine().__aenter__(), lambda: at.open_engine().__await__()):
        coroutine = start()
        with pytest.raises(RuntimeError, match=f"needs asyncio.*{'trio' if trio else 'another library'}.*run_in_thread"):
            coroutine.send(None)


def test_trio_as_a_guest_of_asyncio_is_still_trio(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tasks are run by callbacks of the loop: there is a loop then, and no task of it."""
    monkeypatch.setitem(sys.modules, "trio", types.ModuleType("trio"))
    raised: list[BaseException] = []

    async def main() -> None:
        def callback() -> None:
            try:
                at.open_engine().__aenter__().send(None)  # type: ignore[attr-defined]
            except RuntimeError as error:
                raised.append(error)

        asyncio.get_running_loop().call_soon(callback)
        await asyncio.sleep(0.01)
        async with at.open_engine():  # in a task: trio is only installed
            pass

    asyncio.run(main())
    assert "trio" in str(raised[0])


@pytest.mark.asyncio
async def test_what_belongs_to_a_loop_is_neither_pickled_nor_copied_and_says_what_may_be_sent(pair: Pair) -> None:
    region = pair.left.allocate(64)
    things = {
        pair.left: "str(engine.address)",
        pair.right_peer: "str(peer.address)",
        pair.left.signal(pair.right_peer, 1): "what came of it",
        region: "region.descriptor.encode()",
        region[8:16]: "region.descriptor.encode()",
        region.lease(pair.right_peer): "lease.descriptor.encode()",
        pair.left.counter(): "counter.imm",
        pair.left.group([pair.left.address, pair.right.address]): "addresses of its members",
        pair.left.from_thread(): "make it in the process",
        pair.right_peer.path: "path.provider",
        (opening := at.open_engine()): "open an engine in the other process",
    }
    await (await opening).aclose()
    for thing, advice in things.items():
        for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="cannot be pickled") as refused:
                attempt(thing)
            assert advice in str(refused.value)
    assert pickle.loads(pickle.dumps(region.descriptor)).nbytes == 64
    assert pickle.loads(pickle.dumps(pair.left.address)) == pair.left.address


@pytest.mark.asyncio
async def test_an_engine_that_waits_for_itself_says_so() -> None:
    async with at.open_engine(timeout=0.3) as engine:
        itself = await engine.connect(engine.address)
        with pytest.raises(at.TransferTimeout) as late:
            await itself.lookup("cache")
        assert "own address: it waits for itself" in str(late.value)
        with pytest.raises(at.ConfigurationError, match="rank 1 is this engine itself"):
            itself._check_other("rank 1")


@pytest.mark.asyncio
async def test_a_group_whose_other_member_is_this_engine_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a name or a route that nobody can see from the address."""
    async with at.open_engine(timeout=5) as engine, at.open_engine() as other:
        group = engine.group([engine.address, other.address])
        real = engine._connections.connect
        monkeypatch.setattr(engine._connections, "connect", lambda _, *rest: real(engine.address, *rest))
        with pytest.raises(at.ConfigurationError, match=r"member 1 of the group .* is this engine itself"):
            await group.barrier()
