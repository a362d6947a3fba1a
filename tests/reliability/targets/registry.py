"""Entries of a registry that somebody else wrote."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from aiotransfer import kv
from aiotransfer.errors import DescriptorError
from aiotransfer.kv.registry import FileBackend, Member
from aiotransfer.kv.registry.cache import Cache
from aiotransfer.kv.registry.stamp import Stamp, pack
from tests.reliability.absurd import Take, Target, Tree, alone

LAYOUT = kv.KVLayout(layers=4, kv_heads=2, head_dim=8, dtype="bfloat16", page_tokens=4, num_pages=64)
MEMBERS = (
    Member("prefill", "127.0.0.1:7070", "prefill 0", 7, LAYOUT),
    Member("decode", "10.0.0.1:7071", "decode 0", 8, LAYOUT, {"zone": "a", "model": "m"}),
)


def _plain(data: bytes) -> Tree:
    return json.loads(data)


def _text(tree: Tree) -> bytes:
    return json.dumps(tree).encode()


def _member(data: bytes) -> bool:
    try:
        member = Member.decode(data)
    except DescriptorError:
        return False
    assert Member.decode(member.encode()) == member
    assert len(str(member)) < 2000
    return True


@asynccontextmanager
async def _directory() -> AsyncIterator[Take]:
    """A registry of files, in which others' entries say absurd things: an honest one is seen all the time."""
    with tempfile.TemporaryDirectory() as name:
        backend, cache = FileBackend(name), Cache(5.0)
        honest, wanted = MEMBERS[1], MEMBERS[0].key
        number = 0

        async def take(data: bytes) -> bool:
            nonlocal number
            number += 1
            path = Path(name) / f"{wanted}.member"
            beside = Path(name) / f"{number}.new"
            beside.write_bytes(data)
            os.replace(beside, path)
            await backend.put(honest.key, honest.encode(), 60)
            entries = await backend.entries()
            for why in cache.take(entries, float(number)):
                assert len(why) < 1000
            assert cache.members[honest.key] == honest
            return wanted in entries

        try:
            yield take
        finally:
            await backend.aclose()


def _files() -> list[Tree]:
    stamp = Stamp.until(60.0, FileBackend("/nowhere").clocks())
    return [[*map(_plain, pack(stamp, member.encode()).split(b"\n"))] for member in MEMBERS[:1]]


def _file(tree: Tree) -> bytes:
    return b"\n".join(map(_text, tree))


TARGETS = (
    Target("member", "a member of the registry", lambda: [_plain(member.encode()) for member in MEMBERS], _text, alone(_member)),
    Target("registry file", "a file of the registry, with the time of its lease", _files, _file, _directory),
)  # fmt: skip
