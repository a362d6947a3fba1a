"""Parties for the tests of weight transfers, on shared memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest_asyncio

import aiotransfer as at
from tests.weights.party import Party


@pytest_asyncio.fixture
async def party() -> AsyncIterator[Party]:
    async def open_engine(**options: Any) -> at.Engine:
        return at.open_engine(providers="shm", **options)  # type: ignore[return-value]

    async with AsyncExitStack() as stack:
        yield Party(stack, open_engine)
