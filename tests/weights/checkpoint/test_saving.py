"""Versions as files: whole, of one version, and there at once or not at all."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer import weights
from aiotransfer.weights import Layout, Piece, PlanError, Tensor
from aiotransfer.weights.checkpoint import open_checkpoint, placing, save, writing
from tests.weights.checkpoint.samples import read, write
from tests.weights.party import Party, values

pytestmark = pytest.mark.asyncio
ROOT = Path(__file__).parent.parent.parent.parent


def check(tensors: dict[str, Any], number: int) -> None:
    """These are the values of a version of a party."""
    for name, value in values(number).items():
        assert (tensors[name].shape, tensors[name].dtype) == (value.shape, value.dtype)
        np.testing.assert_array_equal(tensors[name], value, err_msg=name)


def whole(folder: Path) -> dict[str, Any]:
    """What a folder has, by its index."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found: dict[str, Any] = {}
    for name in sorted(set(index["weight_map"].values())):
        found |= read(folder / name)[0]
    assert found.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in found.values())
    return found


async def served(party: Party, **options: Any) -> list[Any]:
    """Two trainers, and the subscribers of an instance of two ranks, at version 1."""
    await party.train(2, timeout=20)
    servers = await party.serve("a", 2, **options)
    await party.publish(1)
    return [server.subscriber for server in servers]


@pytest.mark.parametrize("mode", ["double", "in_place"])
@pytest.mark.parametrize("rank", [0, 1])
async def test_any_one_rank_saves_the_whole_instance_into_a_file(party: Party, tmp_path: Path, rank: int, mode: str) -> None:
    path = tmp_path / "now.safetensors"
    subscriber = (await served(party, mode=mode))[rank]
    assert await save(subscriber, path, metadata={"note": "x"}, staging_bytes=50) == (1, 1)
    tensors, texts = read(path)
    check(tensors, 1)
    assert tensors.keys() == values(1).keys()
    assert (texts["format"], texts["note"], texts["head"], texts["aiotransfer.version"]) == ("pt", "x", "embed", "1.1")
    await party.publish(2)
    assert await save(subscriber, path) == (1, 2)
    check(read(path)[0], 2)
    assert os.listdir(tmp_path) == ["now.safetensors"]


async def test_a_folder_has_shards_and_an_index_and_the_next_save_replaces_them(party: Party, tmp_path: Path) -> None:
    subscriber = (await served(party))[0]
    (tmp_path / "mine.safetensors").write_bytes(b"not ours")
    folder = tmp_path / "made"
    await save(subscriber, folder, shard_bytes=300)
    first = set(os.listdir(folder))
    check(whole(folder), 1)
    assert len(first) == 4  # of 288, 384 and 32 bytes, the last with nothing beside it; and the index
    await party.publish(2)
    (folder / "mine.safetensors").write_bytes(b"not ours")
    await save(subscriber, folder, shard_bytes=10_000)
    check(whole(folder), 2)
    assert len(os.listdir(folder)) == 3
    assert not first & set(os.listdir(folder)) - {"model.safetensors.index.json"}
    found = open_checkpoint(folder)
    assert found.version == (1, 2)
    assert found.layout.aliases == {"head": found.layout.names.index("embed")}


async def test_what_was_saved_is_published_again(party: Party, tmp_path: Path) -> None:
    subscriber = (await served(party))[1]
    await save(subscriber, tmp_path, shard_bytes=300)
    engine = await party.stack.enter_async_context(await party.open_engine())
    other = await party.serve("b", 2, connect=False)
    for server in other:
        await server.engine.connect(engine.address)
    publisher = await party.stack.enter_async_context(weights.Publisher(engine, open_checkpoint(tmp_path), timeout=20))
    async with publisher.publish(7):
        pass
    assert [server.holds() for server in other] == [1, 1]
    assert {server.subscriber.version for server in other} == {(1, 7)}


async def test_a_version_that_comes_meanwhile_waits_and_the_file_is_of_one(
    party: Party, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subscribers = await served(party)
    begun, go, sync = threading.Event(), threading.Event(), os.fsync

    def slow(fd: int) -> None:
        begun.set()
        assert go.wait(60)
        sync(fd)

    monkeypatch.setattr(writing.os, "fsync", slow)
    saving = asyncio.ensure_future(save(subscribers[0], tmp_path / "x.safetensors", staging_bytes=50))
    await asyncio.to_thread(begun.wait, 60)
    publishing = asyncio.ensure_future(party.publish(2))
    done, _ = await asyncio.wait([publishing, saving], timeout=0.3)
    assert not done
    assert {subscriber.version for subscriber in subscribers} == {(1, 1)}
    go.set()
    assert await saving == (1, 1)
    assert await publishing == (1, 2)
    check(read(tmp_path / "x.safetensors")[0], 1)
    assert {subscriber.version for subscriber in subscribers} == {(1, 2)}


async def test_one_that_comes_while_another_rank_is_read_does_not_end_the_save(
    party: Party, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory that is lent is not the one that is written."""
    subscribers = await served(party)
    publishing: list[Any] = []
    gather = writing.Writer._gather

    async def after(self: Any, *arguments: Any) -> None:
        await gather(self, *arguments)
        if not publishing:
            publishing.append(asyncio.ensure_future(party.publish(2)))
            while not any(subscriber._sessions for subscriber in subscribers):
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.05)  # time to take back what it needs; what comes later meets the next part

    monkeypatch.setattr(writing.Writer, "_gather", after)
    assert await save(subscribers[0], tmp_path / "x.safetensors", staging_bytes=50) == (1, 1)
    check(read(tmp_path / "x.safetensors")[0], 1)
    assert await publishing[0] == (1, 2)


async def test_a_publisher_is_saved_inside_publish_and_the_file_appears_when_that_has_ended(party: Party, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    await served(party)
    first, second = party.trainers
    for trainer in party.trainers:
        trainer.load(2)

    async def other() -> None:
        async with second.publisher.publish(2):
            pass

    async def saver() -> None:
        async with first.publisher.publish(2) as update:
            assert await save(first.publisher, path) == update.version == (1, 2)
            assert not path.exists()

    await asyncio.gather(other(), saver())
    check(read(path)[0], 2)
    with pytest.raises(at.ConfigurationError, match="while it publishes"):
        await save(first.publisher, path)
    assert os.listdir(tmp_path) == ["x.safetensors"]


async def test_a_publisher_whose_version_is_abandoned_leaves_no_file(party: Party, tmp_path: Path) -> None:
    await served(party)
    first, second = party.trainers

    async def other() -> None:
        async with second.publisher.publish(2):
            pass

    async def saver() -> None:
        async with first.publisher.publish(2):
            await save(first.publisher, tmp_path / "x.safetensors")
            raise RuntimeError("no")

    results = await asyncio.gather(other(), saver(), return_exceptions=True)
    assert [type(result) for result in results] == [weights.UpdateError, RuntimeError]
    assert os.listdir(tmp_path) == []


async def test_a_lost_rank_ends_the_save_by_name_and_leaves_what_was_there(party: Party, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    subscribers = await served(party)
    await save(subscribers[0], path)
    await subscribers[1].aclose()
    await party.instances["a"][1].engine.aclose()
    with pytest.raises(at.TransferError):
        await save(subscribers[0], path, timeout=10)
    check(read(path)[0], 1)
    assert os.listdir(tmp_path) == ["x.safetensors"]


async def test_a_full_disk_or_a_cancel_leaves_what_was_there(
    party: Party, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"before")
    subscriber = (await served(party))[0]

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writing.os, "pwrite", full)
        with pytest.raises(OSError, match="No space left"):
            await save(subscriber, path)
    reading, gather = asyncio.Event(), writing.Writer._gather

    async def slow(self: Any, *arguments: Any) -> None:
        await gather(self, *arguments)
        reading.set()
        await asyncio.sleep(60)

    with monkeypatch.context() as patch:
        patch.setattr(writing.Writer, "_gather", slow)
        task = asyncio.ensure_future(save(subscriber, path))
        await reading.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(at.TransferTimeout, match=r"were not saved to .* within 0.2 s"):
            await save(subscriber, path, timeout=0.2)
    assert (os.listdir(tmp_path), path.read_bytes()) == (["x.safetensors"], b"before")
    assert await save(subscriber, path) == (1, 1)
    await party.publish(2)


KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from contextlib import AsyncExitStack
import aiotransfer as at
from aiotransfer.weights.checkpoint import placing, save
from tests.weights.party import Party

async def main():
    async def open_engine(**options):
        return at.open_engine(providers="shm", **options)
    async with AsyncExitStack() as stack:
        party = Party(stack, open_engine)
        await party.train(1, timeout=20)
        (server,) = await party.serve("a", 1)
        await party.publish(1)
        await save(server.subscriber, sys.argv[2], shard_bytes=300)
        await party.publish(2)
        count, replace = iter(range(100)), os.replace
        def killing(*arguments):
            if next(count) == int(sys.argv[3]):
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*arguments)
        placing.os.replace = killing
        await save(server.subscriber, sys.argv[2], shard_bytes=300)

asyncio.run(main())
"""


@pytest.mark.one_loop
@pytest.mark.parametrize("at_file", [0, 1, 3])
async def test_killed_while_it_saves_the_old_files_stay_and_the_next_save_clears_up(
    party: Party, tmp_path: Path, at_file: int
) -> None:
    """In front of the first rename, among those of the shards, and in front of that of the index."""
    folder = tmp_path / "folder"
    command = [sys.executable, "-c", KILLED, str(ROOT), str(folder), str(at_file)]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    check(whole(folder), 1)
    assert len(os.listdir(folder)) == 4 + 3 + (at_file == 3)
    assert open_checkpoint(folder).version == (1, 1)
    subscriber = (await served(party))[0]
    await party.publish(2)
    await save(subscriber, folder, shard_bytes=300)
    check(whole(folder), 2)
    assert len(os.listdir(folder)) == 4


async def test_two_saves_into_one_place_and_a_folder_whose_readers_look_elsewhere(party: Party, tmp_path: Path) -> None:
    subscriber = (await served(party))[0]
    for path in (tmp_path / "x.safetensors", tmp_path / "folder"):
        held = placing.Target(str(path), "0" * 16)
        if held.is_file:
            held.add(path.name)
        with pytest.raises(at.ConfigurationError, match="another save into"):
            await save(subscriber, path)
        held.discard()
        await save(subscriber, path)
    write(tmp_path / "folder" / "model.safetensors", {"w": ("float32", np.zeros(1, np.float32))})
    with pytest.raises(at.ConfigurationError, match=r"has a model.safetensors"):
        await save(subscriber, tmp_path / "folder")


async def test_what_such_files_cannot_have_is_listed(party: Party, tmp_path: Path) -> None:
    tensors = [Tensor("z", (2,), "complex128"), Tensor("__metadata__", (1,), "float32")]
    layout = Layout(tensors, [Piece(tensor.name, 0) for tensor in tensors], ranks=1)
    left, right = [await party.stack.enter_async_context(await party.open_engine()) for _ in range(2)]
    await right.connect(left.address)
    memory = {"z": np.zeros(2, np.complex128), "__metadata__": np.zeros(1, np.float32)}
    publisher = await party.stack.enter_async_context(weights.Publisher(left, layout.bind(0, memory), timeout=20))
    subscriber = await party.stack.enter_async_context(weights.Subscriber(right, layout, instance="a"))
    async with publisher.publish(1):
        pass
    with pytest.raises(PlanError) as caught:
        await save(subscriber, tmp_path / "x.safetensors")
    assert caught.value.problems == (
        "z: complex128 has no name in safetensors files", "__metadata__: this name cannot stand in a safetensors file",
    )  # fmt: skip
    assert os.listdir(tmp_path) == []


async def test_arguments_that_cannot_be(party: Party, tmp_path: Path) -> None:
    subscriber = (await served(party))[0]
    for arguments, error in (
        ({"shard_bytes": 0}, ValueError), ({"shard_bytes": "1"}, TypeError), ({"staging_bytes": -1}, ValueError),
        ({"metadata": {"a": 1}}, TypeError), ({"timeout": "1"}, TypeError),
    ):  # fmt: skip
        with pytest.raises(error):
            await save(subscriber, tmp_path / "x.safetensors", **arguments)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Subscriber or a Publisher"):
        await save(tmp_path, tmp_path / "x.safetensors")  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []
