"""A fork with live engines: the child is told at every call, nothing native runs there, and the parent notices nothing."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

import aiotransfer as at
from aiotransfer.providers import native
from aiotransfer.testing import Pair
from tests.engine.processes import other_process

pytestmark = pytest.mark.asyncio
CALLS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "allocate": lambda o: o["engine"].allocate(8),
    "register": lambda o: o["engine"].register(bytearray(8)),
    "publish": lambda o: o["engine"].publish("name", o["region"]),
    "unpublish": lambda o: o["engine"].unpublish("published"),
    "descriptor": lambda o: o["region"].descriptor,
    "lease": lambda o: o["region"].lease(o["peer"]),
    "revoke": lambda o: o["lease"].revoke(),
    "write": lambda o: o["engine"].write(o["region"], o["remote"]),
    "read": lambda o: o["engine"].read(o["remote"], o["region"]),
    "read pages": lambda o: o["engine"].read_pages(o["remote"], [0], o["region"], [0], page_bytes=8),
    "scatter pages": lambda o: o["engine"].scatter_pages(o["region"], [(o["remote"], [0], [0])], page_bytes=8),
    "pages": lambda o: o["engine"].write_pages(o["region"], [0], o["remote"], [0], page_bytes=8),
    "scatter": lambda o: o["engine"].scatter(o["region"], [at.ScatterTarget(0, 64, o["remote"])]),
    "signal": lambda o: o["engine"].signal(o["peer"], 1),
    "prepare": lambda o: o["engine"].prepare_write(o["region"], o["remote"]),
    "post": lambda o: o["plan"].post(),
    "counter": lambda o: o["engine"].counter(imm=77),
    "wait": lambda o: o["counter"].wait(1),
    "watch": lambda o: o["engine"].watch(o["region"][:8]),
    "connect": lambda o: o["engine"].connect("127.0.0.1:1", timeout=1),
    "lookup": lambda o: o["peer"].lookup("name", timeout=1),
    "ping": lambda o: o["peer"].ping(timeout=1),
    "send": lambda o: o["peer"].send(b"1"),
    "messages": lambda o: anext(o["engine"].messages()),
    "from_thread": lambda o: o["engine"].from_thread(),
    "await": lambda o: o["transfer"],
    "callback": lambda o: o["transfer"].add_done_callback(print),
    "value": lambda o: o["counter"].value,
    "thread wait": lambda o: o["thread transfer"].wait(1),
    "thread write": lambda o: o["handle"].write(o["region"], o["remote"]),
    "barrier": lambda o: o["group"].barrier(timeout=1),
}
SILENT: dict[str, Callable[[dict[str, Any]], Any]] = {  # ending and looking are no errors
    "close region": lambda o: o["region"].close(),
    "close counter": lambda o: o["counter"].close(),
    "done": lambda o: o["transfer"].done(),
    "cancel": lambda o: o["transfer"].cancel(),
    "close region and wait": lambda o: o["region"].aclose(),
    "close watch": lambda o: o["watcher"].close(),
    "landed": lambda o: o["transfer"].bytes_done,
    "aclose": lambda o: o["engine"].aclose(),
    "aclose again": lambda o: o["engine"].aclose(),
    "repr": lambda o: repr([*o.values()]),
    "bytes": lambda o: o["region"].numpy().sum(),
    "forget": lambda o: (o.clear(), gc.collect()),
}


# These look who calls before they touch anything.
DOORS = {"at_write", "at_read", "at_write_pages", "at_read_pages", "at_signal", "at_plan_post", "at_scatter", "at_scatter_pages"}


class Trap:
    """In place of the extension: a call of it is a mistake, but at the doors of the hot path, which must refuse it."""

    def __init__(self, real: Any, called: list[str]) -> None:
        self._real, self._called = real, called

    def __getattr__(self, name: str) -> Any:
        if name.startswith("AT_") or name == "at_segment_unmap":  # the child's own mapping goes
            return getattr(self._real, name)
        real = getattr(self._real, name)

        def call(*arguments: Any) -> Any:
            if name in DOORS and real(*arguments) == self._real.AT_EFORK:
                return self._real.AT_EFORK
            self._called.append(name)
            return -1

        return call


async def outcome(call: Callable[[dict[str, Any]], Any], objects: dict[str, Any]) -> str:
    try:
        result = call(objects)
        if isinstance(result, Awaitable):
            await asyncio.wait_for(asyncio.ensure_future(result), 5)
    except BaseException as error:
        return f"{type(error).__name__}: {error}" if isinstance(error, at.TransferError) else traceback.format_exc()
    return "nothing"


async def child(objects: dict[str, Any]) -> dict[str, Any]:
    called: list[str] = []
    native.lib = Trap(native.lib, called)
    told = {}
    for name, call in {**CALLS, **SILENT}.items():
        told[name] = await outcome(call, objects)
        if called:
            told[name] += f" [native: {called}]"
            called.clear()
    return told


def in_child(objects: dict[str, Any]) -> dict[str, str]:
    """What each call said in a forked child, which runs a loop of its own."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            asyncio._set_running_loop(None)
            told: Any = asyncio.new_event_loop().run_until_complete(child(objects))
        except BaseException:
            told = {"all": traceback.format_exc()}
        os.write(write, json.dumps(told).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as answers:
        data = answers.read()
    os.waitpid(pid, 0)
    result: dict[str, str] = json.loads(data)
    return result


@pytest.mark.parametrize("moving", [False, True])
async def test_a_child_is_told_at_every_call_and_calls_nothing_native(pair: Pair, moving: bool) -> None:
    engine = pair.left
    region, target = engine.allocate(64), pair.right.allocate(64)
    remote = target.descriptor
    await engine.write(region, remote)
    engine.publish("published", region)
    members = [engine.address, pair.right.address]
    counter = engine.counter(imm=3)
    handle = engine.from_thread()
    large, there = engine.allocate(64 << 20), pair.right.allocate(64 << 20).descriptor
    large.numpy()[:] = 5
    await engine.write(large[:1], there[:1])
    transfer = engine.write(large, there)
    if not moving:
        await transfer
    thread_transfer = handle.write(large, there)
    if not moving:
        thread_transfer.wait()
    told = in_child({
        "engine": engine, "region": region, "remote": remote, "peer": pair.right_peer, "lease": region.lease(pair.right_peer),
        "plan": engine.prepare_write(region, remote), "counter": counter, "handle": handle, "transfer": transfer,
        "thread transfer": thread_transfer, "watcher": engine.watch(bytearray(8)),
        "group": engine.group(members),
    })  # fmt: skip
    for name in CALLS:
        if name in ("await", "thread wait") and told[name] == "nothing":
            continue  # it had ended before the fork
        assert told[name].startswith("ClosedError"), (name, told[name])
        assert "native" not in told[name], (name, told[name])
    for name in SILENT:
        assert told[name] == "nothing", (name, told[name])
    await transfer
    thread_transfer.wait(10)
    await pair.right.counter(imm=3).wait(0)
    region.numpy()[:] = 4
    await engine.write(region, remote, imm=3)
    await pair.right.counter(imm=3).wait(1)
    assert (target.numpy() == 4).all()
    assert engine.statistics().pending_operations == 0


async def test_a_child_may_use_engines_of_its_own_while_the_parent_goes_on() -> None:
    async with at.open_engine(timeout=20) as engine, other_process(engine) as (_, peer):
        source, remote = engine.allocate(1 << 20), await peer.lookup("allocated")
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                asyncio._set_running_loop(None)
                asyncio.new_event_loop().run_until_complete(alone())
                os.write(write, b"well")
            except BaseException:
                os.write(write, traceback.format_exc().encode())
            os._exit(0)
        os.close(write)
        for _ in range(50):
            await engine.write(source, remote[: source.nbytes], imm=1)
        assert await asyncio.to_thread(os.read, read, 10_000) == b"well"
        os.close(read)
        os.waitpid(pid, 0)
        assert peer.state == "up"
        await peer.ping()


async def alone() -> None:
    async with at.open_engine(timeout=20) as one, at.open_engine(timeout=20) as two:
        await one.connect(two.address)
        source, target = one.allocate(1 << 20), two.allocate(1 << 20)
        source.numpy()[:] = 3
        await one.write(source, target.descriptor)
        assert (target.numpy() == 3).all()
