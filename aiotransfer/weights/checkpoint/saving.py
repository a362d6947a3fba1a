"""A version that runs, as safetensors files."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

from aiotransfer.aio.timeouts import Timeout
from aiotransfer.engine.runtime.runtime import platform_of, seconds
from aiotransfer.errors import ConfigurationError, TransferError, TransferTimeout
from aiotransfer.quote import quote
from aiotransfer.weights.checkpoint.header import library
from aiotransfer.weights.checkpoint.opening import SAVE, VERSION
from aiotransfer.weights.checkpoint.parts import OfInstance, OfTrainers, Parts
from aiotransfer.weights.checkpoint.placing import Target
from aiotransfer.weights.checkpoint.shards import shards_of
from aiotransfer.weights.checkpoint.writing import Writer, runs_of
from aiotransfer.weights.memory.aside import aside, steady
from aiotransfer.weights.protocol.version import Version
from aiotransfer.weights.publisher.publisher import Publisher
from aiotransfer.weights.subscriber.subscriber import Subscriber

SHARD_BYTES = 5 << 30
STAGING_BYTES = 64 << 20
SECONDS = 3600.0


async def save(
    role: Subscriber | Publisher,
    path: str | os.PathLike[str],
    *,
    shard_bytes: int = SHARD_BYTES,
    staging_bytes: int = STAGING_BYTES,
    metadata: Mapping[str, str] | None = None,
    timeout: float = SECONDS,
) -> Version:
    """Write one version of all weights of a side, under the names of its layout, and return which.

    `role`: a `Subscriber`, any one rank of its instance, which waits for a version and holds it (`reading()`)
    while it writes: a newer one may come meanwhile, but readers see it afterwards only. Or a `Publisher`,
    inside `async with publisher.publish(n)` on one rank: the files appear when all trainer ranks have found
    their sources at rest, at the end of the block. Either brings the parts of the other ranks to this one,
    which writes; the other ranks call nothing.

    `path`: a file (its name ends with ".safetensors"), or a folder, which is made where there is none: then
    files of at most `shard_bytes` (one larger tensor: as it needs), and `model.safetensors.index.json`. What
    is there already stays until all is written, and is replaced in one moment; a save that is killed leaves
    it, and the next one removes its rest. `staging_bytes`: temporary memory. `metadata`: texts for the
    headers of the files. A tied tensor is written once, and its other names are among these texts. `timeout`:
    seconds.

    Raises `ConfigurationError` (the library safetensors is not installed, another save into `path`, a
    `Publisher` outside of `publish`), `PlanError` (a type that such files have not), `TransferTimeout`,
    `BrokenError` (another rank is lost or has another version), `ClosedError`, `OSError` (the disk is full);
    `TypeError` and `ValueError` at once.
    """
    library()
    texts = dict(metadata or {})
    if not all(isinstance(text, str) for pair in texts.items() for text in pair):
        raise TypeError("metadata maps texts to texts")
    for name, value in (("shard_bytes", shard_bytes), ("staging_bytes", staging_bytes)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, not {quote(value)}")
        if value < 1:
            raise ValueError(f"{name} must be positive, not {quote(value)}")
    if not isinstance(role, Subscriber | Publisher):
        raise TypeError(f"save takes a Subscriber or a Publisher, not {type(role).__name__}")
    within = seconds(timeout)
    saving = _Saving(os.fspath(path), shard_bytes, staging_bytes, texts, platform_of(role.engine).entropy(8).hex())
    try:
        async with Timeout(within):
            if isinstance(role, Subscriber):
                return await _instance(role, saving, within)
            return await _trainers(role, saving)
    except TimeoutError as error:
        if isinstance(error, TransferError):
            raise
        raise TransferTimeout(f"the weights were not saved to {saving.path} within {within:g} s") from None


async def _instance(role: Subscriber, saving: _Saving, within: float) -> Version:
    async with role.reading(timeout=within) as version:
        role.memory.check_places()
        parts = OfInstance(role, version)
        try:
            target = await saving.write(parts, version)
        finally:
            parts.close()
        await steady(role.engine, target.commit)
        return version


async def _trainers(role: Publisher, saving: _Saving) -> Version:
    update = role.current
    if update is None or update.version is None or not update.is_inside:
        hint = "async with publisher.publish(number): await save(publisher, path)"
        raise ConfigurationError("a Publisher is saved while it publishes: its sources rest then", hint=hint)
    if role.sources.staged:
        where = "on a GPU, where no rail reaches them" if role.sources.devices.ordinals else "files already"
        hint = "save them from a Subscriber" if role.sources.devices.ordinals else "copy the files"
        raise ConfigurationError(f"the weights of this Publisher are {where}", hint=hint)
    update.afterwards(await saving.write(OfTrainers(role, update), update.version))
    return update.version


class _Saving:
    def __init__(self, path: str, shard_bytes: int, staging_bytes: int, texts: dict[str, str], token: str) -> None:
        self.path, self._shard_bytes, self._staging_bytes = path, shard_bytes, staging_bytes
        self._texts, self._token = texts, token

    async def write(self, parts: Parts, version: Version) -> Target:
        """All files, whole and safe on the disk, under names that they have until the target is committed."""
        texts = {**self._texts, VERSION: str(version), SAVE: self._token}
        target = Target(self.path, self._token)
        writer = None
        try:
            most = math.inf if target.is_file else self._shard_bytes
            shards = shards_of(parts.layout, most, target.name, texts)
            writer = Writer(parts, min(self._staging_bytes, 2 * max(shard.nbytes for shard in shards)))
            runs = await aside(parts.engine, runs_of, parts.layout, shards)
            for number, shard in enumerate(shards):
                await writer.write(target.add(shard.name), shard, runs.of_file(number))
            where = {parts.layout.names[k]: shard.name for shard in shards for k in shard.offsets}
            target.index(where, sum(shard.nbytes - len(shard.head) for shard in shards))
            await writer.aclose()
        except GeneratorExit:  # the coroutine was dropped: nothing may be awaited
            target.discard()
            raise
        except BaseException:
            if writer is not None:
                await writer.aclose()
            target.discard()
            raise
        return target
