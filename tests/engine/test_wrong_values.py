"""Values of the wrong kind are a `TypeError` or `ValueError` of the call that was given them, here and in the roles above."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer import kv, moe
from aiotransfer.testing import Pair

pytestmark = pytest.mark.asyncio
LAYOUT = kv.KVLayout(layers=1, kv_heads=1, head_dim=8, dtype="bfloat16", page_tokens=4, num_pages=4)

CALLS: dict[str, tuple[Callable[[Pair], Any], type[Exception]]] = {
    "a prefix that is a number": (lambda pair: pair.left.messages(prefix=3), TypeError),  # type: ignore[arg-type]
    "a shape that is text": (lambda pair: pair.left.allocate("12"), TypeError),
    "a shape that is bytes": (lambda pair: pair.left.allocate(b"x"), TypeError),
    "a shape that is a fraction": (lambda pair: pair.left.allocate(2.5), TypeError),  # type: ignore[arg-type]
    "half a byte of a region": (lambda pair: pair.left.allocate(8)[0:1.5], TypeError),
    "half a byte of a descriptor": (lambda pair: pair.left.allocate(8).descriptor[1.5:], TypeError),
    "a host that is no text": (lambda pair: at.Address(None, 1), TypeError),  # type: ignore[arg-type]
    "half a character as a name": (lambda pair: pair.left.publish("\ud800", pair.left.allocate(8)), ValueError),
    "half a character as a group": (lambda pair: pair.left.group([pair.left.address], name="\ud800"), ValueError),
    "a name for an all-to-all that is no text": (lambda pair: all_to_all(pair, name=3), TypeError),
    "room for no rows": (lambda pair: all_to_all(pair, max_recv_tokens=0), ValueError),
    "no decoder for an error": (lambda pair: role(kv.Decoder, pair, checksums="yes"), TypeError),
    "a number of requests that is text": (lambda pair: role(kv.Decoder, pair, most_requests="many"), TypeError),
    "a negative number of requests": (lambda pair: role(kv.Prefiller, pair, most_requests=-1), ValueError),
    "time that is no number": (lambda pair: role(kv.Decoder, pair, revoke_timeout=float("nan")), ValueError),
    "bytes that are text": (lambda pair: role(kv.Prefiller, pair, peer_bytes="1"), TypeError),
    "a record for nobody": (lambda pair: role(kv.Prefiller, pair, on_record=3), TypeError),
}


def all_to_all(pair: Pair, **options: Any) -> moe.AllToAll:
    sizes: dict[str, Any] = {"num_experts": 1, "hidden": 8, "dtype": "float32", "max_tokens": 1, "topk": 1}
    return moe.AllToAll(pair.left, pair.left.group([pair.left.address]), **sizes | options)


def role(kind: Any, pair: Pair, **options: Any) -> Any:
    return kind(pair.left, LAYOUT, pair.left.allocate(LAYOUT.pool_bytes), **options)


@pytest.mark.parametrize("case", CALLS)
async def test_a_value_of_the_wrong_kind_is_refused_by_the_call(pair: Pair, case: str) -> None:
    act, error = CALLS[case]
    with pytest.raises(error):
        act(pair)


async def test_a_configuration_is_a_config() -> None:
    for value in ({}, 0, True):
        with pytest.raises(TypeError, match="config is a Config"):
            await at.open_engine(config=value)  # type: ignore[arg-type]


async def test_what_is_looked_up_could_be_a_name(pair: Pair) -> None:
    for name in ("", "n" * 1025, "\ud800"):
        with pytest.raises(ValueError):
            await pair.right_peer.lookup(name)


async def test_names_may_have_1024_characters(pair: Pair) -> None:
    pair.right.publish("n" * 1024, pair.right.allocate(8))
    assert (await pair.right_peer.lookup("n" * 1024)).nbytes == 8


async def test_more_arrivals_than_can_be_counted_are_refused(pair: Pair) -> None:
    with pytest.raises(ValueError, match=r"2\*\*63"):
        await pair.left.counter(imm=1).wait(1 << 64)


async def test_a_prompt_is_bytes_and_not_so_many_zeros(pair: Pair) -> None:
    async with role(kv.Decoder, pair) as decoder:
        with pytest.raises(TypeError, match="data must be bytes"):
            decoder.request(pair.right_peer, "r", [0], data=1 << 40)


async def test_integers_of_numpy_are_shapes(pair: Pair) -> None:
    assert pair.left.allocate(np.prod([2, 3])).nbytes == 6  # type: ignore[arg-type]
    assert pair.left.allocate(np.array([2, 3])).nbytes == 6  # type: ignore[arg-type]
    assert pair.left.allocate((np.int32(2), 3), "float32").nbytes == 24  # type: ignore[arg-type]


async def test_a_counter_is_shown_on_any_thread(pair: Pair) -> None:
    counter = pair.left.counter(imm=1)
    assert await asyncio.to_thread(repr, counter) == "<Counter imm=1>"
    assert "total=0" in repr(counter)
