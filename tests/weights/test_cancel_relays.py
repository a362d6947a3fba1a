"""As `test_cancel_everywhere`, where instances pass parts on to one another, and where one catches up from another."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.weights.party import Server
from tests.weights.test_cancel_everywhere import (
    SOON,
    Stage,
    Strike,
    everywhere,
    publish_cancelled_again_and_again,
    publish_on_both_ranks,
    publish_on_rank_0,
    stage,
    subscriber_closes,
)

TURNS = 12  # of each call, unless all are tried
MODES = ["double", "in_place"]
RELAYED = (publish_on_rank_0, publish_on_both_ranks, publish_cancelled_again_and_again, subscriber_closes)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("call", RELAYED, ids=lambda call: call.__name__)
def test_a_call_is_cancelled_at_any_turn_while_parts_are_passed_on(
    call: Callable[[Stage, Strike], Awaitable[None]], mode: str
) -> None:
    everywhere(call, lambda net: stage(net, mode, "ab", fanout="relay"), TURNS)


# ---- catching up ----


async def restart(stage: Stage) -> list[Server]:
    """Instance b has no version any more, and is going to catch up from a."""
    servers = stage.party.instances["b"]
    for rank, server in enumerate(servers):
        await server.subscriber.aclose()
        await stage.serve(rank, "b")
    return servers


async def caught_up(servers: list[Server]) -> None:
    """All have a version, which other attempts bring where one was disturbed."""
    for server in servers:
        await server.subscriber.ready(timeout=SOON)


async def ready_is_cancelled(stage: Stage, strike: Strike) -> None:
    servers = await restart(stage)
    tasks = [asyncio.ensure_future(server.subscriber.ready(timeout=SOON)) for server in servers]
    strike(tasks[0].cancel)
    await asyncio.wait(tasks)
    assert tasks[1].exception() is None
    await caught_up(servers)


async def closes(stage: Stage, strike: Strike, instance: str) -> None:
    """A rank of `instance`, by a call that is cancelled at once."""
    servers = await restart(stage)
    closing, subscriber = list[asyncio.Task[None]](), stage.party.instances[instance][1].subscriber
    is_over = False

    def stop() -> None:
        if not is_over:
            closing.append(asyncio.ensure_future(subscriber.aclose()))
            closing[0].cancel()
            stage.net.at_turn(3, closing[0].cancel)

    strike(stop)
    await asyncio.wait([asyncio.ensure_future(server.subscriber.ready(timeout=0.05)) for server in servers])
    is_over = True
    if closing:
        await asyncio.wait(closing, timeout=SOON)
        await subscriber.aclose()
        await stage.serve(1, instance)
        await asyncio.sleep(0.001)
        await stage.next()
    await caught_up(stage.servers)


async def one_that_catches_up_closes(stage: Stage, strike: Strike) -> None:
    await closes(stage, strike, "b")


async def one_that_lends_closes(stage: Stage, strike: Strike) -> None:
    await closes(stage, strike, "a")


async def publish_comes_meanwhile_and_is_cancelled(stage: Stage, strike: Strike) -> None:
    servers, tasks, is_over = await restart(stage), list[asyncio.Task[Any]](), False

    def begin() -> None:
        if not is_over:
            tasks.extend(stage.begin())
            stage.net.at_turn(20, tasks[1].cancel)

    strike(begin)
    await asyncio.wait([asyncio.ensure_future(server.subscriber.ready(timeout=0.05)) for server in servers])
    is_over = True
    if tasks:
        await stage.ends(tasks)
    await caught_up(servers)


CATCHING = (
    ready_is_cancelled, one_that_catches_up_closes, one_that_lends_closes, publish_comes_meanwhile_and_is_cancelled,
)  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("call", CATCHING, ids=lambda call: call.__name__)
def test_a_call_is_cancelled_at_any_turn_while_an_instance_catches_up(
    call: Callable[[Stage, Strike], Awaitable[None]], mode: str
) -> None:
    everywhere(call, lambda net: stage(net, mode, "ab"), TURNS)
