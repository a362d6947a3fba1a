"""A share of the cycles in every run of the tests; `make test-cycles` does 10,000 and writes the report."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest
import uvloop

from tests.reliability import cycles


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_nothing_is_left_after_connecting_transferring_closing_and_killing(
    loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    with asyncio.Runner(loop_factory=loop) as runner:
        outcome = runner.run(cycles.cycles(100, random.randrange(1 << 31)))
    assert set(outcome.done) == set(cycles.KINDS)
    assert all(outcome.ended), "the kills ended nothing"
