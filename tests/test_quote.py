"""Errors repeat what they were given, and stay short whatever that was."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer import kv, moe, weights
from aiotransfer.config import Config
from aiotransfer.model.address import Address
from aiotransfer.quote import MOST, quote
from aiotransfer.testing import engine_pair


class Mute:
    """Its `repr` fails."""

    def __repr__(self) -> str:
        raise RuntimeError("nothing to show")


class Loud:
    """Its `repr` is long."""

    def __repr__(self) -> str:
        return "<" + "loud " * 50_000 + ">"


class int_like:  # noqa: N801
    """A class that is called like a built-in one is called by `reprlib`."""


int_like.__name__ = "int"
LONG: dict[str, Any] = {
    "text": "x" * 200_000,
    "text of control characters": "\x00" * 200_000,
    "bytes": b"\xff" * 200_000,
    "bytearray": bytearray(200_000),
    "integer": 10**6000,
    "negative integer": -(10**6000),
    "list": list(range(50_000)),
    "nested": [["w" * 1000] * 100] * 100,
    "dict": {str(n): "v" * 100 for n in range(5000)},
    "object": Loud(),
    "object without words": Mute(),
    "object of a misleading class": int_like(),
}


@pytest.mark.parametrize("what", LONG)
def test_a_long_value_is_cut(what: str) -> None:
    assert 0 < len(quote(LONG[what])) <= MOST + len("...")


@pytest.mark.parametrize("value", ["a'b", "é\n", "x" * (MOST - 2), b"abc", bytearray(b"x"), 5, 2.5, None, [1], (1,), {"a": 1}])
def test_a_short_value_is_shown_as_python_shows_it(value: object) -> None:
    assert quote(value) == repr(value)


def test_the_beginning_and_the_end_of_a_long_value_are_shown() -> None:
    assert re.fullmatch(r"'begin-+\.\.\.-+end'", quote("begin" + "-" * 100_000 + "end"))
    assert re.fullmatch(r"b'begin.+end' \(100008 bytes\)", quote(b"begin" + bytes(100_000) + b"end"))
    assert quote(1 << 20_000) == "an int of 20001 bits"


def calls(pair: Any) -> Iterator[tuple[str, Callable[..., Any], dict[str, Any]]]:
    """What users call without awaiting, each with arguments that it takes."""
    engine, peer = pair.left, pair.right_peer
    src, dst = pair.left.allocate(4096), pair.right.allocate(4096)
    there = at.RemoteRegion.decode(dst.descriptor.encode())
    readable = at.RemoteRegion.decode(pair.right.allocate(4096).lease(pair.left_peer, access="read").descriptor.encode())
    yield "Address.parse", Address.parse, {"text": "host:1"}
    for field in inspect.signature(Config).parameters:
        yield f"Config.{field}", Config, {field: getattr(Config(), field)}
    yield "open_engine", at.open_engine, {
        "listen": "127.0.0.1:0", "key": b"0123456789abcdef", "name": "n", "providers": "shm", "progress": "auto",
        "advertise": "127.0.0.1:1",
    }  # fmt: skip
    yield "allocate", engine.allocate, {"shape_or_nbytes": 64, "dtype": "uint8"}
    yield "register", engine.register, {"buffer": bytearray(64), "access": "auto"}
    yield "publish", engine.publish, {"name": "n", "region": src}
    yield "counter", engine.counter, {"imm": 1}
    yield "group", engine.group, {"members": [str(engine.address), "127.0.0.1:2"], "name": "g"}
    yield "write", engine.write, {"src": src, "dst": there, "imm": 1, "timeout": 1.0, "require": "shm"}
    yield "read", engine.read, {"dst": src, "src": readable, "timeout": 1.0, "require": "shm"}
    yield "signal", engine.signal, {"dst": peer, "imm": 1}
    yield "write_pages", engine.write_pages, {
        "src": src, "src_pages": [0], "dst": there, "dst_pages": [0], "page_bytes": 64, "src_stride": 64, "dst_stride": 64,
        "imm": 1,
    }  # fmt: skip
    yield "scatter", engine.scatter, {"src": src, "targets": [(0, 64, there[:64])], "imm": 1}
    yield "region slice", src.__getitem__, {"key": slice(0, 1)}
    yield "remote slice", there.__getitem__, {"key": slice(0, 1)}
    layout = {"layers": 2, "kv_heads": 2, "head_dim": 8, "dtype": "float16", "page_tokens": 16, "num_pages": 8, "windows": ()}
    yield "KVLayout", kv.KVLayout, layout
    yield "AllToAll", moe.AllToAll, {
        "engine": engine, "group": engine.group([str(engine.address)]), "num_experts": 2, "hidden": 8, "dtype": "float32",
        "max_tokens": 4, "topk": 1, "name": "m", "direct": "auto", "combine_dtype": "float32", "max_recv_tokens": 4,
    }  # fmt: skip
    for role in (kv.Decoder, kv.Prefiller):
        yield role.__name__, role, {"engine": engine, "layout": kv.KVLayout(**layout), "pages": src}
    yield "Layout", weights.Layout, {"tensors": (), "pieces": (), "ranks": 1, "buffers": {}}


async def refusal_of(call: Callable[..., Any], arguments: dict[str, Any]) -> str | None:
    """The text of the error that the call raises, sooner or later; None where it raises none."""
    try:
        given = call(**arguments)
        if inspect.isawaitable(given):
            given = await given
        if isinstance(given, at.Engine):
            await given.aclose()
    except (at.TransferError, TypeError, ValueError, LookupError, OverflowError) as error:
        return str(error)
    return None


@pytest.mark.one_loop
@pytest.mark.asyncio
async def test_no_error_repeats_a_long_argument_whole() -> None:
    """Every argument of what users call, replaced by each long value, one at a time."""
    refused = 0
    async with engine_pair() as pair:
        for name, call, arguments in list(calls(pair)):
            for argument in arguments:
                for what in ("text", "bytes", "integer", "list", "object", "object without words"):
                    text = await refusal_of(call, arguments | {argument: LONG[what]})
                    refused += text is not None
                    assert len(text or "") < 4 * MOST, f"{argument} of {name}: {what}"
                    assert "integer string conversion" not in (text or ""), f"{argument} of {name}: {what}"
    assert refused > 300


def test_an_array_is_as_short_as_numpy_makes_it() -> None:
    assert quote(np.arange(1_000_000)) == repr(np.arange(1_000_000))
